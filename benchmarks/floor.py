"""The floor that an audit is measured against: import each runtime, compile, run once, plainly.

``python -m benchmarks.floor MODEL.onnx DATA.npz --backends ort,ov`` does just that, in one
process, as anybody would write it. With ``--reference N`` it prints instead the median seconds of
N runs of the unoptimised model on ONNX Runtime, the unit in which further inputs are counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np


def run_ort(model: str, feeds: dict[str, Any]) -> None:
    """Compile at the deployed level and run once."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    session.run(None, feeds)


def run_ov(model: str, feeds: dict[str, Any]) -> None:
    """Compile with the device's default properties and run once."""
    import openvino

    openvino.Core().compile_model(model, "CPU")(feeds)


def run_tvm(model: str, feeds: dict[str, Any]) -> None:
    """Compile for this processor with the target's default pipeline and run once."""
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    shapes = {name: list(value.shape) for name, value in feeds.items()}
    module = from_onnx(onnx.load(model), shapes)
    processor = tvm.target.codegen.llvm_get_system_cpu()
    target = tvm.target.Target({"kind": "llvm", "mcpu": processor})
    with tvm.transform.PassContext(opt_level=3):
        lowered = relax.get_default_pipeline(target)(module)
        built = relax.build(lowered, target=target, relax_pipeline=None)
    machine = relax.VirtualMachine(built, tvm.cpu())
    machine["main"](*(tvm.runtime.tensor(value) for value in feeds.values()))


RUNTIMES = {"ort": run_ort, "ov": run_ov, "tvm": run_tvm}


def reference_run(model: str, feeds: dict[str, Any], repeats: int) -> float:
    """Median seconds of one run of the reference, after one to warm up."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backends", default="ort,ov")
    parser.add_argument("--reference", type=int, metavar="N")
    arguments = parser.parse_args()
    with np.load(arguments.data, allow_pickle=False) as data:
        feeds = {name: data[name][0] for name in data.files}
    if arguments.reference:
        print(reference_run(str(arguments.model), feeds, arguments.reference))
        return
    for name in arguments.backends.split(","):
        RUNTIMES[name](str(arguments.model), feeds)


if __name__ == "__main__":
    main()
