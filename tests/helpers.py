"""What several tests need: models, the command in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper, numpy_helper

import reports
from auditor.attribution.explainer import Explanation
from auditor.ports import Arrays
from tests import started

if TYPE_CHECKING:
    import subprocess

    from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
_TIMED = ("seconds", "timing", "latency_before", "latency_after", "sentence", "command")
NETS = Path(__file__).parent / "source" / "nets.py"


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what changes a report's looks."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    dropped = ("COLUMNS", "NO_COLOR", "PYTEST_CURRENT_TEST")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return kept | {"PYTHONPATH": path} | extra


def audit_in(
    folder: Path, *arguments: object, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``audit`` with arguments in a folder; the variables are some that it reads itself."""
    return started.audit(folder, [*map(str, arguments)], environment(), variables)


def named(id: str, found: Explanation, variant: str | None = None) -> None:
    """Hold that a cause was named, in that form, and that all its forms could be replayed."""
    assert found.noise == id and found.explained > 0.9999
    assert variant is None or found.variant == variant
    assert not [f for f in found.failures if id in f]


def closed(schema: Any) -> Any:
    """A JSON schema with every object closed, to find keys that it does not describe."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found["additionalProperties"] = False
    return found


def conforms(document: object, name: str) -> None:
    """Hold a document against a published schema whose objects are closed: it is complete."""
    path = Path(reports.__file__).parent / f"{name}_v1.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(closed(schema)).validate(document)


def jpeg(image: Image.Image, **options: object) -> bytes:
    """A photograph's file."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", **{"quality": 90, "subsampling": "4:2:0", **options})
    return stream.getvalue()


def nodes_of(text: str) -> list[onnx.NodeProto]:
    """Nodes in ONNX's text syntax, such as ``h = MatMul(x, w) y = Relu(h)``."""
    return list(onnx.parser.parse_graph(f"g () => () {{ {text} }}").node)


def onnx_model(
    text: str, weights: Arrays | None = None, *, opset: int = 17, ir_version: int = 8
) -> onnx.ModelProto:
    """A model in ONNX's text syntax.

    Args:
        text: as in ``(float[4, 16] x) => (float[4, 8] y) { y = MatMul(x, w) }``.
        weights: its initialisers.
        opset: of the standard operators.
        ir_version: of the file.
    """
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in (weights or {}).items())
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def scaled(weight: float) -> onnx.ModelProto:
    """A product and a Relu, its weights scaled."""
    w = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32) * weight
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
            helper.make_node("Relu", ["h"], ["y"], "second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def needs_bf16() -> None:
    """Skip where OpenVINO cannot compute in bfloat16, even when it is asked to."""
    openvino = pytest.importorskip("openvino", reason="needs the [ov] extra")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("OpenVINO has no bfloat16 on this processor: it lacks AVX-512")


def in_4_bits(model: onnx.ModelProto, block: int = 32) -> onnx.ModelProto:
    """A model of opset 21 whose products' weights have 4 bits, a scale for ``block`` of them.

    Those with fewer rows than a block stay as they are. ONNX Runtime reads them through
    MatMulNBits, which by default quantises activations to 8 bits too: an error on every processor,
    which the cause ``precision.int8_dynamic`` makes.
    """
    constants = {t.name: t for t in model.graph.initializer if len(t.dims) == 2}
    constants = {n: t for n, t in constants.items() if t.dims[0] % block == 0}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            name = node.input[1]
            weights = numpy_helper.to_array(constants[name])
            blocks = weights.reshape(-1, block, weights.shape[1])
            scales = np.abs(blocks).max(axis=1) / np.float32(7)
            steps = np.rint(blocks / scales[:, None]).reshape(weights.shape)
            given = {f"{name}.int4": steps.astype(ml_dtypes.int4), f"{name}.scales": scales}
            model.graph.initializer.remove(constants[name])
            model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in given.items())
            real = helper.make_node("DequantizeLinear", [*given], [name], axis=0, block_size=block)
            nodes.append(real)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def untimed(value: Any) -> Any:
    """A report without what a clock says."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in _TIMED}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def unused(names: set[str]) -> set[str]:
    """Those in /dev/shm that no process has mapped: others on this machine use the rest."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text()
            names = {name for name in names if f"/dev/shm/{name}" not in text}
    return names


def nets() -> Any:
    """The PyTorch networks of ``source/nets.py``, loaded by path as ``--source`` does."""
    spec = importlib.util.spec_from_file_location("nets_of_tests", NETS)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
