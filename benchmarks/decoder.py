"""A decoder of any size with Llama's architecture and generated weights, as external data.

``python -m benchmarks.decoder -o decoder.onnx`` writes TinyLlama's shape (22 layers, 1.1 billion
parameters, 4.4 GB in float32). With ``--caches`` it takes one token or several, any number of
earlier ones being in key and value caches that it takes and gives. Grouped-query attention, rotary
positions, RMS normalisation and SwiGLU as in Touvron et al., "Llama 2" (2023) and transformers'
modeling_llama.py, written out in ONNX's own operators as torch exports them. Weights are drawn as
Llama initialises them, with a standard deviation of 0.02, and go to disk piece by piece. With
``--bits 4`` those of products are integers with a scale for each 32 of them, in the operator that
ONNX Runtime's quantiser writes (``com.microsoft.MatMulNBits``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
_PIECE = 1 << 24  # weights generated at a time
_BLOCK = 32  # weights that share a scale, where they have few bits
_ALIGNMENT = 4096  # of each weight in the file, so that it can be mapped


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the defaults are TinyLlama's."""

    layers: int = 22
    hidden: int = 2048
    inner: int = 5632
    heads: int = 32
    groups: int = 4  # key and value heads
    vocabulary: int = 32000
    tokens: int = 16
    theta: float = 10000.0  # of the rotary positions
    bits: int = 32  # of each weight of a product: 32, or 4
    caches: bool = (
        False  # take and give key and value caches; ``tokens`` is then the most there are
    )

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


class _Writer:
    """Collects nodes, and puts weights into the data file."""

    def __init__(
        self,
        data: IO[bytes],
        location: str,
        seed: int,
        given: Mapping[str, np.ndarray],
        bits: int,
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.parameters = 0
        self._bits = bits
        self._data = data
        self._location = location
        self._given = given
        self._generator = np.random.default_rng(seed)

    def node(self, kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def gain(self, name: str, size: int) -> str:
        """A vector: the one given, else ones."""
        return self.constant(name, self._given.get(name, np.ones(size, np.float32)))

    def weight(self, name: str, *dims: int) -> str:
        """A matrix: the one given, else normal values with a standard deviation of 0.02."""
        start, left = self._aligned(), math.prod(dims)
        self.parameters += left
        if name in self._given:
            values = self._given[name]
            assert values.shape == dims
            self._data.write(np.ascontiguousarray(values, np.float32).tobytes())
            left = 0
        while left:
            count = min(left, _PIECE)
            values = self._generator.standard_normal(count, np.float32) * np.float32(0.02)
            self._data.write(values.tobytes())
            left -= count
        return self._stored(name, TensorProto.FLOAT, dims, start)

    def product(self, given: str, name: str, weights: str, into: int, out: int) -> str:
        """A matrix product with weights of the model's bits."""
        if self._bits == 32:
            return self.node("MatMul", [given, self.weight(weights, into, out)], name)
        blocks = into // _BLOCK
        start, left = self._aligned(), out * blocks * _BLOCK // 2
        self.parameters += into * out
        while left:
            count = min(left, _PIECE)
            self._data.write(self._generator.bytes(count))
            left -= count
        packed = self._stored(
            f"{weights}.packed", TensorProto.UINT8, (out, blocks, _BLOCK // 2), start
        )
        start = self._aligned()
        spread = math.sqrt((16**2 - 1) / 12)  # of sixteen integers
        self._data.write(np.full(out * blocks, 0.02 / spread, np.float32).tobytes())
        scales = self._stored(f"{weights}.scales", TensorProto.FLOAT, (out * blocks,), start)
        sizes = {"K": into, "N": out, "bits": self._bits, "block_size": _BLOCK}
        inputs = [given, packed, scales]
        return self.node("MatMulNBits", inputs, name, domain="com.microsoft", **sizes)

    def _aligned(self) -> int:
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        return self._data.tell()

    def _stored(self, name: str, kind: int, dims: tuple[int, ...], start: int) -> str:
        """An initialiser that lies in the file from ``start`` to where it ends now."""
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        length = self._data.tell() - start
        for key, value in (("location", self._location), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.constants.append(tensor)
        return name


def write(
    path: Path, shape: Shape, seed: int = 0, given: Mapping[str, np.ndarray] | None = None
) -> int:
    """Write the model and, beside it, its weights; returns how many parameters there are.

    Args:
        path: the ONNX file.
        shape: its sizes.
        seed: of the weights that are not given.
        given: float32 weights by name; matrices as ``[into, out]``.
    """
    location = f"{path.name}.data"
    with (path.parent / location).open("wb") as data:
        writer = _Writer(data, location, seed, given or {}, shape.bits)
        _constants(writer, shape)
        table = writer.weight("embedding", shape.vocabulary, shape.hidden)
        last = writer.node("Gather", [table, "input_ids"], "embedded")
        for index in range(shape.layers):
            last = _layer(writer, shape, last, f"layer{index}")
        last = _normalised(writer, shape, last, "norm")
        writer.product(last, "logits", "head", shape.hidden, shape.vocabulary)
    taken, given_back = _interface(shape)
    graph = helper.make_graph(writer.nodes, "decoder", taken, given_back, writer.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="decoder")
    onnx.save(model, path)
    return writer.parameters


def _interface(shape: Shape) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Inputs and outputs; caches are named as transformers and optimum name them."""
    tokens = "tokens" if shape.caches else shape.tokens

    def ids(name: str, count: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.INT64, [1, count])

    def cache(name: str, count: str) -> onnx.ValueInfoProto:
        dims = [1, shape.groups, count, shape.head]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    taken = [ids("input_ids", tokens)]
    logits = [1, tokens, shape.vocabulary]
    given = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
    if shape.caches:
        taken += [ids("attention_mask", "all"), ids("position_ids", "tokens")]
        parts = [f"{i}.{part}" for i in range(shape.layers) for part in ("key", "value")]
        taken += [cache(f"past_key_values.{part}", "past") for part in parts]
        given += [cache(f"present.{part}", "all") for part in parts]
    return taken, given


def _constants(writer: _Writer, shape: Shape) -> None:
    positions = np.arange(shape.tokens)[:, None]
    frequencies = shape.theta ** (-np.arange(0, shape.head, 2) / shape.head)
    angles = np.concatenate([positions * frequencies] * 2, axis=1)
    tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    above = np.triu(np.ones((shape.tokens, shape.tokens), bool), 1)
    tables["mask"] = np.where(above, np.float32(-1e9), np.float32(0))
    for name, table in tables.items():  # [position, …]
        if shape.caches:  # of the positions that are asked for
            rows = f"{name}.rows" if name == "mask" else name
            writer.node("Gather", [writer.constant(f"{name}.table", table), "position_ids"], rows)
        else:
            writer.constant(name, table)
    writer.constant("epsilon", np.float32(1e-5).reshape(()))
    writer.constant("two", np.float32(2).reshape(()))
    writer.constant("scale", np.float32(1 / math.sqrt(shape.head)).reshape(()))
    tokens = -1 if shape.caches else shape.tokens
    for name, heads in (("heads", shape.heads), ("groups", shape.groups)):
        writer.constant(name, np.array([1, tokens, heads, shape.head], np.int64))
    writer.constant("joined", np.array([1, tokens, shape.hidden], np.int64))
    repeats = shape.heads // shape.groups
    writer.constant("repeated", np.array([1, shape.groups, repeats, 1, shape.head], np.int64))
    writer.constant("all_heads", np.array([1, shape.heads, tokens, shape.head], np.int64))
    writer.constant("axis2", np.array([2], np.int64))
    for name, value in (("zero", 0), ("half", shape.head // 2), ("end", shape.head), ("last", 3)):
        writer.constant(name, np.array([value], np.int64))
    if shape.caches:  # columns for all tokens, the earlier ones too
        size = writer.node("Shape", ["attention_mask"], "mask.shape")
        writer.node("Slice", [size, writer.constant("one", np.array([1])), "axis2", "zero"], "all")
        writer.node("Slice", ["mask.rows", "zero", "all", "axis2"], "mask")


def _layer(writer: _Writer, shape: Shape, last: str, name: str) -> str:
    attended = _attention(writer, shape, _normalised(writer, shape, last, f"{name}.norm1"), name)
    last = writer.node("Add", [last, attended], f"{name}.residual1")
    given = _normalised(writer, shape, last, f"{name}.norm2")
    gate = _projected(writer, given, f"{name}.gate", shape.hidden, shape.inner)
    gate = writer.node(
        "Mul", [gate, writer.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu"
    )
    up = _projected(writer, given, f"{name}.up", shape.hidden, shape.inner)
    inner = writer.node("Mul", [gate, up], f"{name}.gated")
    down = _projected(writer, inner, f"{name}.down", shape.inner, shape.hidden)
    return writer.node("Add", [last, down], f"{name}.residual2")


def _attention(writer: _Writer, shape: Shape, given: str, name: str) -> str:
    narrow = shape.groups * shape.head
    query = _heads(writer, _projected(writer, given, f"{name}.q", shape.hidden, shape.hidden))
    key = _heads(writer, _projected(writer, given, f"{name}.k", shape.hidden, narrow), "groups")
    value = _heads(writer, _projected(writer, given, f"{name}.v", shape.hidden, narrow), "groups")
    query, key = (_rotated(writer, tensor) for tensor in (query, key))
    if shape.caches:
        index = name.removeprefix("layer")
        key, value = (
            writer.node(
                "Concat",
                [f"past_key_values.{index}.{part}", new],
                f"present.{index}.{part}",
                axis=2,
            )
            for part, new in (("key", key), ("value", value))
        )
    key, value = (_repeated(writer, tensor) for tensor in (key, value))
    turned = writer.node("Transpose", [key], f"{name}.keys", perm=[0, 1, 3, 2])
    scores = writer.node("MatMul", [query, turned], f"{name}.scores")
    scores = writer.node("Mul", [scores, "scale"], f"{name}.scaled")
    scores = writer.node("Add", [scores, "mask"], f"{name}.masked")
    weights = writer.node("Softmax", [scores], f"{name}.softmax", axis=-1)
    mixed = writer.node("MatMul", [weights, value], f"{name}.mixed")
    mixed = writer.node("Transpose", [mixed], f"{name}.turned", perm=[0, 2, 1, 3])
    mixed = writer.node("Reshape", [mixed, "joined"], f"{name}.joined")
    return _projected(writer, mixed, f"{name}.o", shape.hidden, shape.hidden)


def _projected(writer: _Writer, given: str, name: str, into: int, out: int) -> str:
    return writer.product(given, name, f"{name}.weight", into, out)


def _heads(writer: _Writer, tensor: str, split: str = "heads") -> str:
    apart = writer.node("Reshape", [tensor, split], f"{tensor}.split")
    return writer.node("Transpose", [apart], f"{tensor}.heads", perm=[0, 2, 1, 3])


def _rotated(writer: _Writer, tensor: str) -> str:
    """Rotary positions: x·cos + (−second half, first half)·sin."""
    first = writer.node("Slice", [tensor, "zero", "half", "last"], f"{tensor}.first")
    second = writer.node("Slice", [tensor, "half", "end", "last"], f"{tensor}.second")
    negative = writer.node("Neg", [second], f"{tensor}.negative")
    swapped = writer.node("Concat", [negative, first], f"{tensor}.swapped", axis=-1)
    straight = writer.node("Mul", [tensor, "cos"], f"{tensor}.cos")
    turned = writer.node("Mul", [swapped, "sin"], f"{tensor}.sin")
    return writer.node("Add", [straight, turned], f"{tensor}.rotated")


def _repeated(writer: _Writer, tensor: str) -> str:
    """Each key and value head serves several query heads."""
    apart = writer.node("Unsqueeze", [tensor, "axis2"], f"{tensor}.apart")
    wide = writer.node("Expand", [apart, "repeated"], f"{tensor}.wide")
    return writer.node("Reshape", [wide, "all_heads"], f"{tensor}.repeated")


def _normalised(writer: _Writer, shape: Shape, tensor: str, name: str) -> str:
    squares = writer.node("Pow", [tensor, "two"], f"{name}.squares")
    mean = writer.node("ReduceMean", [squares], f"{name}.mean", axes=[-1], keepdims=1)
    root = writer.node(
        "Sqrt", [writer.node("Add", [mean, "epsilon"], f"{name}.shifted")], f"{name}.root"
    )
    unit = writer.node("Div", [tensor, root], f"{name}.unit")
    gain = writer.gain(f"{name}.weight", shape.hidden)
    return writer.node("Mul", [unit, gain], name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    for name, value in vars(Shape()).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    path = arguments.pop("output")
    parameters = write(path, Shape(**arguments))
    print(f"{path}: {parameters:,} parameters")


if __name__ == "__main__":
    main()
