"""Which segments of a deep network matter most: what is found by following a few, and what by all.

``python -m benchmarks.impact 1000 2000`` audits networks of so many nodes (``deep.py``) on
OpenVINO, whose default rounds every layer where the processor has bfloat16, and measures beside it,
in the same run, the leave-one-in of every segment. The unit is a plain run of the whole reference,
in one session and one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx

from auditor import audit, discovery
from auditor.audit import AuditOptions, BackendSpec
from auditor.decomposition import impact, leave_one_in
from auditor.decomposition.divergence import Local
from auditor.decomposition.impact import Chain
from auditor.ports import Silent
from auditor.replays import sessions
from benchmarks import deep

TOP = 10
CLOCKED = 10  # plain runs


class _Both(leave_one_in.LeaveOneIn):
    """Leave-one-in that also follows every segment's error, once its own were chosen."""

    found: Mapping[str, Any] = {}

    def add(self, index: int, chain: Chain, flagged: Mapping[str, Local], *how: Any) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        super().add(index, chain, flagged, *how)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        cuts = [cut for cut in chain.cuts if cut.id in flagged]
        if not cuts:
            raise SystemExit("no segment is above its floor: OpenVINO computes in float32 here")

        def alone(id: int) -> float:
            return impact.leave_one_in(chain, cuts[id], flagged[cuts[id].id])[0]

        start = time.perf_counter()
        effects = list(chain.replayer.beside(alone, range(len(cuts))))
        every = {cut.id: effect for cut, effect in zip(cuts, effects, strict=True)}
        right = sorted(every, key=every.__getitem__, reverse=True)[:TOP]
        found = self.top(TOP)
        type(self).found = {
            "segments": len(cuts),
            "followed": len(self.effects),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "every_seconds": time.perf_counter() - start,
            "found": len(found & {*right}),
            "weight": sum(every[i] ** 2 for i in found) / sum(every[i] ** 2 for i in right),
        }


def measured(nodes: int) -> dict[str, Any]:
    """One network: seconds, and how many of the largest effects were among those followed."""
    model = deep.network(nodes)
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)
    whole = sessions.session(model, 1)
    with tempfile.TemporaryDirectory(prefix="impact-") as folder:
        path, data = Path(folder) / "deep.onnx", Path(folder) / "x.npz"
        onnx.save(model, path)
        np.savez(data, x=x[None])
        options = AuditOptions((BackendSpec("ov"),), data=data, confirm=False)
        with mock.patch.object(leave_one_in, "LeaveOneIn", _Both):
            audit.audit(path, options, noises=discovery.noises(), progress=Silent())
    start = time.process_time()
    for _ in range(CLOCKED):
        whole.run(None, {"x": x})
    plain = (time.process_time() - start) / CLOCKED
    return {"nodes": len(model.graph.node), "plain_cpu_s": plain, **_Both.found}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.impact", description=__doc__)
    parser.add_argument("nodes", type=int, nargs="+")
    for count in parser.parse_args().nodes:
        print(json.dumps(measured(count)), flush=True)


if __name__ == "__main__":
    main()
