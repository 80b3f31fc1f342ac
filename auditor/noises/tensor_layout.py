"""Type and order of axes of the input."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "layout",
    type="normalisation",
    title="Another type or order of axes of the network's input",
    cause="Deployments feed 8 bits, 16-bit floats or channels last where a runtime takes them.",
    advice="feed the type and layout that the model was exported with",
    source="ONNX operator specification, Conv (layout NCHW)",
)
