"""Seeded damage to what the auditor reads: models, bytes, JSON and TOML."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Names that are paths, markup, escapes, too long, or somebody else's.
NAMES = (
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "\x00",
    "[red]x[/]",
    "\x1b[2J",
    "<script>alert(1)</script>",
    "a" * 100_000,
    "%s%n",
    "\u202e",
    "input/0/x",
    "x",
    "y",
    "c",
    "w",
)
NUMBERS = (0, 1, -1, 3, 5, 99, 2**31, 2**40, 2**62, -(2**63))
TYPES = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 21, 22, 99)
OPERATORS = (
    *("", "Add", "Cast", "Constant", "Conv", "Foo", "Gather", "If", "LSTM", "Loop", "NonZero"),
    *("Relu", "Reshape", "Scan", "SequenceEmpty", "Split", "TopK", "RandomNormal"),
)
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 2**70, 1e400, float("nan"), "", "x", "[red]", "\ud800", "9" * 5000),
    *([], {}, [[]], {"a": 1}),
)
TOML_VALUES = (
    *("1", "-1", "true", "[]", "{}", '""', '"x"', "1e400", "nan", "2020-01-01", "[[1], 2]"),
    *("99999999999999999999", '[1, "a"]', "{a = 1}", "[" * 500),
)


def network() -> onnx.ModelProto:
    """Convolution, ceil-mode pool, resize, a branch with bodies, and quantisation."""

    def body(operator: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(f"{operator}_out", TensorProto.FLOAT, None)
        node = helper.make_node(operator, ["r"], [f"{operator}_out"])
        return helper.make_graph([node], operator, [], [result])

    weight = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
    constants = {
        "w": weight,
        "b": np.zeros(4, np.float32),
        "sizes": np.array([1, 4, 8, 8], np.int64),
        "cond": np.array(True),
        "scale": np.float32(0.1),
        "zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node(
            "MaxPool", ["c"], ["p"], "pool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1
        ),
        helper.make_node("Resize", ["p", "", "", "sizes"], ["r"], "resize", mode="linear"),
        helper.make_node("If", ["cond"], ["i"], then_branch=body("Relu"), else_branch=body("Neg")),
        helper.make_node("QuantizeLinear", ["i", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("ReduceMean", ["d"], ["y"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "fuzzed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


def damaged_model(draw: random.Random) -> onnx.ModelProto:
    """The network with one to three changes of its structure."""
    model = network()
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        change = draw.choice(_CHANGES)
        try:
            change(model, draw)
        except (IndexError, ValueError):  # nothing left to change, or protobuf's own refusal
            continue
    return model


def odd_network(draw: random.Random) -> onnx.ModelProto:
    """A valid network of drawn operators, whose numbers may be none, infinite, tiny or missing."""
    numbers = np.random.default_rng(draw.getrandbits(32))
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray[Any, Any]] = {}
    last = ["x"]

    def constant(*shape: int) -> str:
        value = numbers.standard_normal(shape).astype(np.float32)
        if value.size and draw.random() < 0.3:
            value.flat[draw.randrange(value.size)] = draw.choice(_ODD)
        name = f"k{len(constants)}"
        constants[name] = value
        return name

    def index(*values: int) -> str:
        name = f"k{len(constants)}"
        constants[name] = np.array(values, np.int64)
        return name

    def add(operator: str, *more: str, source: str = "", **attributes: Any) -> None:
        made = f"t{len(nodes)}"
        node = helper.make_node(operator, [source or last[0], *more], [made], **attributes)
        nodes.append(node)
        last.append(last[0])  # for those that take two
        last[0] = made

    def cast_and_back(kind: int) -> None:
        add("Cast", to=kind)
        add("Cast", to=TensorProto.FLOAT)

    steps: tuple[Callable[[], None], ...] = (
        lambda: add("Conv", constant(4, 4, 3, 3), constant(4), pads=[1, 1, 1, 1]),
        lambda: add("Conv", constant(4, 1, 3, 3), group=4, dilations=[2, 2], pads=[2, 2, 2, 2]),
        lambda: add("ConvTranspose", constant(4, 4, 2, 2), strides=[2, 2]),
        lambda: add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=draw.randrange(2)),
        lambda: add(
            "AveragePool",
            kernel_shape=[2, 2],
            pads=[1, 1, 0, 0],
            count_include_pad=draw.randrange(2),
        ),
        lambda: add(
            draw.choice(["Relu", "Sigmoid", "Erf", "Tanh", "Exp", "Sqrt", "Floor", "Round"])
        ),
        lambda: add(draw.choice(["Add", "Mul", "Div", "Pow", "Max"]), constant(1, 4, 1, 1)),
        lambda: add(draw.choice(["Add", "Sub"]), last[0]),
        lambda: add("Softmax", axis=draw.choice([-1, 1, 2])),
        lambda: add("Transpose", perm=[0, 1, 3, 2]),
        lambda: add("Pad", index(0, 0, 1, 1, 0, 0, 0, 1), mode=draw.choice(["constant", "edge"])),
        lambda: add("Slice", index(draw.randrange(3)), index(9), index(2)),
        lambda: add("Resize", "", "", index(1, 4, 5, 7), mode=draw.choice(["nearest", "linear"])),
        lambda: add("InstanceNormalization", constant(4), constant(4)),
        lambda: add("Gather", index(3, 2, 1, 0), axis=1),
        lambda: add("CumSum", index(2)),
        lambda: add("Identity"),
        lambda: cast_and_back(
            draw.choice([TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT32])
        ),
    )
    for _ in range(draw.randrange(1, 9)):
        draw.choice(steps)()
    if draw.random() < 0.1:
        add("Slice", index(2), index(2), index(3))  # nothing is left
    outputs = {last[0], *(n.output[0] for n in nodes if draw.random() < 0.1)}
    names = draw.random() < 0.2
    graph = helper.make_graph(
        nodes,
        draw.choice(NAMES[5:9]) if names else "odd",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in sorted(outputs)],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    for node in graph.node:
        node.name = f"{draw.choice(NAMES[5:])}{node.output[0]}" if names else ""
    opset = [helper.make_opsetid("", draw.choice([13, 15, 17, 18, 19, 20, 21, 22]))]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


_ODD = (np.nan, np.inf, -np.inf, 1e-42, 3e38, 0.0, -0.0)


def picture(draw: random.Random) -> tuple[bytes, str]:
    """A small photograph in some format, sound or damaged, and its ending."""
    import io

    from PIL import Image

    shape = (draw.choice([1, 7, 24]), draw.choice([1, 16, 33]), 3)
    pixels = np.random.default_rng(draw.getrandbits(32)).integers(0, 256, shape, np.uint8)
    image = Image.fromarray(pixels).convert(draw.choice(["RGB", "L", "CMYK", "P", "RGBA", "1"]))
    kind = draw.choice(["JPEG", "JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
    if kind in ("JPEG", "WEBP", "BMP") and image.mode not in ("RGB", "L"):
        image = image.convert("CMYK" if image.mode == "CMYK" and kind == "JPEG" else "RGB")
    if image.mode == "CMYK" and kind in ("PNG", "GIF"):
        image = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = draw.choice([0, 1, 3, 6, 8, 9, 255])  # how it is turned
    file = io.BytesIO()
    image.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    whole = file.getvalue()
    return (whole if draw.random() < 0.1 else damaged_bytes(whole, draw)), kind.lower()


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """``data`` with bits flipped, bytes put in or taken out, or its end cut off."""
    spoiled = bytearray(data)
    for _ in range(draw.choice([1, 2, 8])):
        at = draw.randrange(len(spoiled) + 1)
        match draw.randrange(4):
            case 0 if at < len(spoiled):
                spoiled[at] ^= 1 << draw.randrange(8)
            case 1:
                del spoiled[at:]
            case 2:
                spoiled[at:at] = draw.randbytes(draw.randrange(9))
            case _:
                del spoiled[at : at + draw.randrange(9)]
    return bytes(spoiled)


def damaged_json(data: Any, draw: random.Random) -> Any:
    """``data`` with one or two values gone, or of another kind."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(data)
    for _ in range(draw.choice([1, 1, 2])):
        holder, key = draw.choice(places)
        try:
            if draw.random() < 0.2:
                del holder[key]
            else:
                holder[key] = draw.choice(JUNK)
        except (KeyError, IndexError):  # the first change took it away
            continue
    return data


def damaged_toml(text: str, draw: random.Random) -> str:
    """``text`` with one line of another kind."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    key, equals, _ = lines[at].partition("=")
    if equals:
        lines[at] = f"{key}= {draw.choice(TOML_VALUES)}"
    else:
        lines[at] = draw.choice(["[x]", "[[x]]", "a.b.c = 1", "[" * 500])
    return "\n".join(lines)


# --- one change of a model's structure each ------------------------------------------------------


def _tensor_names(model: onnx.ModelProto) -> list[str]:
    return [*NAMES, *(name for node in model.graph.node for name in node.output)]


def _input(model: onnx.ModelProto, draw: random.Random) -> None:
    node = draw.choice(model.graph.node)
    node.input[draw.randrange(len(node.input))] = draw.choice(_tensor_names(model))


def _output(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice(model.graph.node).output[0] = draw.choice(_tensor_names(model))


def _operator(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice(model.graph.node).op_type = draw.choice(OPERATORS)


def _domain(model: onnx.ModelProto, draw: random.Random) -> None:
    domains = ["foo", "ai.onnx", "ai.onnx.ml", "com.microsoft", "\x1b[2J"]
    draw.choice(model.graph.node).domain = draw.choice(domains)


def _attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    attribute = draw.choice([a for node in model.graph.node for a in node.attribute])
    match draw.randrange(3):
        case 0:
            attribute.ints[:] = draw.choices(NUMBERS, k=draw.randrange(5))
        case 1:
            attribute.type = draw.choice([0, *range(1, 12), 13])
        case _:
            attribute.name = draw.choice([*NAMES, "axis", "mode"])


def _constant(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = draw.choice(model.graph.initializer)
    match draw.randrange(5):
        case 0:
            tensor.data_type = draw.choice(TYPES)
        case 1:
            tensor.dims[:] = draw.choices(NUMBERS, k=draw.randrange(6))
        case 2:
            tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
        case 3:
            tensor.name = draw.choice(NAMES)
        case _:
            weights = model.graph.initializer[0]
            values = np.frombuffer(weights.raw_data, np.float32).copy()
            values[draw.randrange(values.size)] = draw.choice([np.nan, np.inf, 1e-42, 3e38])
            weights.raw_data = values.tobytes()


def _external(model: onnx.ModelProto, draw: random.Random) -> None:
    tensor = draw.choice(model.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    places = [*NAMES, "./", "weights.bin", "link.bin"]
    entries = {"location": draw.choice(places)}
    for key in ("offset", "length"):
        if draw.random() < 0.5:
            entries[key] = draw.choice(["-1", "99999999999999", "x", "0", "1e3", "4"])
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _declared(model: onnx.ModelProto, draw: random.Random) -> None:
    value = draw.choice([*model.graph.input, *model.graph.output])
    match draw.randrange(4):
        case 0:
            value.type.tensor_type.elem_type = draw.choice(TYPES)
        case 1:
            draw.choice(value.type.tensor_type.shape.dim).dim_value = draw.choice(NUMBERS)
        case 2:
            value.name = draw.choice(NAMES)
        case _:
            value.ClearField("type")


def _versions(model: onnx.ModelProto, draw: random.Random) -> None:
    if draw.random() < 0.5:
        versions = [*range(12), 13, 18, 21, 23, 24, 25, 26, 99, -1, 2**40]
        model.opset_import[0].version = draw.choice(versions)
    else:
        model.ir_version = draw.choice([0, 1, 3, 7, 11, 12, 13, 99, -1])


def _nodes(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = list(model.graph.node)
    match draw.randrange(3):
        case 0:
            del nodes[draw.randrange(len(nodes))]
        case 1:
            nodes.append(copy.deepcopy(draw.choice(nodes)))
        case _:
            draw.shuffle(nodes)
    kept = [copy.deepcopy(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


_CHANGES: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    *(_input, _output, _operator, _domain, _attribute, _constant, _external, _declared),
    *(_versions, _nodes),
)
