"""ONNX Runtime sessions that compute a model as it is written."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from auditor.graphs import custom_ops, surgery
from auditor.ports import Arrays
from auditor.replays import integers

# onnxruntime_session_options_config_keys.h
_FOLDER = "session.model_external_initializers_file_folder_path"


def session(model: onnx.ModelProto, threads: int, folder: Path | None = None) -> Any:
    """An ONNX Runtime CPU session that runs the model as written, without optimisation.

    Products of 8-bit integers are exact, whatever the processor (``auditor.replays.integers``).

    Spinning threads are off: hundreds of short sessions would otherwise fight for the cores. So
    are arenas: each session would keep one as large as its tensors.

    Args:
        model: the model.
        threads: intra-op threads.
        folder: where the files of its detached weights are (``auditor.graphs.weights``).
    """
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # some kernels warn past their session's options
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    own = integers.threads(model)
    options.intra_op_num_threads = threads if own is None else own
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        options.add_session_config_entry(_FOLDER, str(folder))
    custom_ops.register(options)
    return ort.InferenceSession(
        integers.exact(model, folder).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def inside(
    model: onnx.ModelProto, threads: int, feeds: Arrays, only: Collection[str] | None = None
) -> Arrays:
    """Every tensor that nodes of a small model compute, and the inputs, by name.

    Only the inputs where the model holds sequences or optionals, which cannot be outputs.

    Args:
        model: the model.
        threads: intra-op threads.
        feeds: its inputs.
        only: which of them; all unless given.
    """
    opened = surgery.copied(model)
    finals = {o.name for o in opened.graph.output}
    names = [n for node in opened.graph.node for n in node.output if n]
    names = [n for n in names if only is None or n in only]
    opened.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in finals)
    try:
        found = session(opened, threads).run(names, feeds)
    except Exception:  # ORT raises a family of classes that share no base
        return dict(feeds)
    known = {n: v for n, v in zip(names, found, strict=True) if hasattr(v, "dtype")}
    return known | dict(feeds)


def one_line(error: Exception) -> str:
    """What ONNX Runtime says; which sizes are wrong stands in further lines."""
    return " ".join(str(error).split())[:300] or repr(error)
