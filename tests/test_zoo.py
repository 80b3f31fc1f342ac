"""The real models are what the other tests and the benchmarks take them for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import zoo


@pytest.mark.parametrize("name", sorted(zoo.RECIPES))
def test_inputs_fit_the_graph(zoo_model: Callable[[str], Path], name: str) -> None:
    path = zoo_model(name)
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    computed = {output for node in graph.node for output in node.output}
    declared = {i.name: i for i in graph.input if i.name not in weights | computed}
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as data:
        assert set(data.files) <= set(declared)
        for key in data.files:
            tensor = declared[key].type.tensor_type
            assert data[key].dtype == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            assert data[key].shape[0] >= 4, "impact is averaged over at least four inputs"
            sizes = [d.dim_value for d in tensor.shape.dim]
            assert len(sizes) == data[key].ndim - 1
            assert all(s in (0, -1, n) for s, n in zip(sizes, data[key].shape[1:], strict=True))
            if data[key].dtype == np.float32:
                samples = {sample.tobytes() for sample in data[key]}
                assert len(samples) == len(data[key]), "samples repeat"


def test_efficientnet_recognises_the_photographs(
    zoo_model: Callable[[str], Path], efficientnet_int8: Path
) -> None:
    """Espresso, a cat, a missile, a motor scooter: weights and pre-processing belong together."""
    import onnxruntime

    session = onnxruntime.InferenceSession(zoo_model("efficientnet_lite0"))
    with np.load(efficientnet_int8.with_suffix(".npz")) as data:
        classes = [int(session.run(None, {"input": x})[0].argmax()) for x in data["input"]]
    assert classes[0] == 967  # espresso
    assert classes[1] in range(281, 286)  # domestic cats
    assert classes[2] == 657  # missile
    assert classes[4] in (665, 670)  # moped, motor scooter


def test_obtain_is_idempotent(zoo_model: Callable[[str], Path], tmp_path: Path) -> None:
    (made,) = zoo.obtain(["ppocr_cls"], tmp_path)
    before = made.stat().st_mtime_ns
    assert zoo.obtain(["ppocr_cls"], tmp_path) == [made]
    assert made.stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ppocr_cls.npz", "ppocr_cls.onnx"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(zoo.MissingPackageError, match="rapidocr_onnxruntime"):
        zoo.obtain(["ppocr_det"], tmp_path)
    assert not list(tmp_path.iterdir())
