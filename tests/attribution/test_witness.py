from __future__ import annotations

import numpy as np
import pytest

from auditor.attribution import witness
from auditor.ports import SegmentGraph
from tests.segments import make_segment

X = np.random.default_rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def pooling() -> SegmentGraph:
    return make_segment("y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)")


def test_what_onnx_itself_computes_speaks_for_a_backend(pooling: SegmentGraph) -> None:
    right = {"y": X.reshape(2, 3, 4, 2, 4, 2).max((3, 5))}
    wrong = {"y": right["y"] + np.float32(0.1)}
    said = witness.sides_with(pooling, {"x": X}, right, wrong)
    assert said is not None and "L2 0.0e+00" in said
    assert witness.sides_with(pooling, {"x": X}, right, {"y": wrong["y"][..., :3]}) is not None


def test_otherwise_nothing_is_said(pooling: SegmentGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"y": X.reshape(2, 3, 4, 2, 4, 2).max((3, 5))}
    wrong = {"y": right["y"] + np.float32(0.1)}
    assert witness.sides_with(pooling, {"x": X}, wrong, right) is None
    both = {"y": right["y"] - np.float32(0.1)}
    assert witness.sides_with(pooling, {"x": X}, wrong, both) is None
    near = {"y": right["y"] * np.float32(1.0001)}  # a matter of rounding
    assert witness.sides_with(pooling, {"x": X}, right, near) is None
    monkeypatch.setattr(witness, "LARGEST", 100)
    assert witness.sides_with(pooling, {"x": X}, right, wrong) is None
