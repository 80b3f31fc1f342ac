"""Replays of what OpenVINO really computed in bfloat16, recorded: runs on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from auditor.attribution.explainer import Explainer
from auditor.decomposition import divergence
from auditor.graphs.model import key
from auditor.graphs.segments import Cut, Graph
from auditor.noises import bf16, fp16, tf32
from auditor.ports import Arrays, SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays import branches
from auditor.replays.replay import Replayer

DATA = Path(__file__).parents[1] / "data" / "openvino_bf16"
RECORDINGS = sorted(DATA.glob("*.npz"))
NOISES = (bf16.NOISE, fp16.NOISE, tf32.NOISE)
# Below this a segment shows FP32 rounding alone (its kernel ran in FP32, or only moved values).
FLOOR = 3e-6


class Recording:
    """One model, and what OpenVINO did with it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.meta = json.loads(stored["meta"].tobytes())
            parts: dict[str, Arrays] = {"i": {}, "o": {}, "t": {}}
            for name in set(stored.files) - {"meta"}:
                parts[name[0]][name[2:]] = stored[name]
        self.feeds = parts["i"]
        self.captured = parts["i"] | parts["t"] | parts["o"]
        # One model has recordings from several processors: MODEL.PROCESSOR.npz.
        self.graph = Graph(onnx.load(DATA / f"{path.name.split('.')[0]}.onnx"))
        self.replayer = Replayer(self.graph, 1)
        self.cuts = self.graph.cut({*parts["t"], *parts["o"]})
        self.base = self.replayer.walk(self.cuts, self.feeds)

    def kernels(self, cut: Cut) -> tuple[Kernel, ...]:
        """What the engine says it ran for a segment."""
        nodes = [self.graph.nodes[i] for i in cut.nodes]
        keys = {*map(key, nodes), *branches.inner_names(nodes)}
        stated = (_kernel(k) for k in self.meta["provenance"]["kernels"])
        return tuple(k for k in stated if keys & set(k.nodes))


def _kernel(stored: dict[str, Any]) -> Kernel:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return Kernel(**fields)


def test_there_are_recordings() -> None:
    assert RECORDINGS


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_every_segment_is_explained_by_bf16(path: Path) -> None:
    recording = Recording(path)
    explained = 0
    for cut in recording.cuts:
        local = divergence.replay(recording.replayer, cut, recording.captured)
        meter = divergence.Meter(cut)
        meter.add(local, recording.captured, recording.base)
        if meter.relative(meter.introduced) <= FLOOR:
            continue
        model = recording.replayer.model(cut, local.inputs)
        segment = SegmentGraph(model, recording.kernels(cut))
        found = Explainer(NOISES).explain(segment, local, thorough=True)
        assert found.noise == bf16.NOISE.id, (cut.outputs, found.hypotheses)
        assert found.explained >= 0.99, (cut.outputs, found.hypotheses)
        # The last tensor is FP32: sums in another order differ in their last bits.
        if not set(cut.outputs) & set(recording.graph.outputs):
            assert found.bit_identical >= 0.98, (cut.outputs, found.hypotheses)
        assert all(h.explained < 0.5 for h in found.hypotheses if h.noise != bf16.NOISE.id)
        explained += 1
    assert explained


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_recorded_program_was_proved_unchanged(path: Path) -> None:
    recording = Recording(path)
    assert recording.meta["unchanged"]
    assert recording.meta["equal"]
    assert recording.meta["provenance"]["options"]["INFERENCE_PRECISION_HINT"] == "bf16"
