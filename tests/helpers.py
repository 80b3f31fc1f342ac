"""Models that several tests are about."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NETS = Path(__file__).parent / "source" / "nets.py"


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
