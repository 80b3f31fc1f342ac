"""An export made in training mode: normalisation by the batch, and dropout that drops."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant

_NORMALISATION = "batch normalisation by its stored mean and variance"
_DROPOUT = "dropout left out"
_BOTH = f"{_NORMALISATION}, and {_DROPOUT}"
_DROPOUT_IS_INPUT = 12  # training_mode is Dropout's third input from here on


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment in evaluation mode."""
    model = segment.model
    normalisations, dropouts = _training(model)
    if normalisations and dropouts:
        yield Variant(_BOTH, _evaluated(model, normalisations, dropouts))
    if normalisations:
        yield Variant(_NORMALISATION, _evaluated(model, normalisations, []))
    if dropouts:
        yield Variant(_DROPOUT, _evaluated(model, [], dropouts))


def in_training(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes whose results depend on the batch at hand, or on chance."""
    normalisations, dropouts = _training(model)
    return [model.graph.node[index] for index in (*normalisations, *dropouts)]


def _training(model: onnx.ModelProto) -> tuple[list[int], list[int]]:
    """Positions of batch normalisations and of dropouts in training mode."""
    constants = surgery.constants(model)
    normalisations, dropouts = (
        surgery.find(model, (of,)) for of in ("BatchNormalization", "Dropout")
    )
    return (
        [i for i, n in normalisations if surgery.attributes(n).get("training_mode", 0)],
        [i for i, n in dropouts if _drops(n, model, constants)],
    )


def _drops(node: onnx.NodeProto, model: onnx.ModelProto, constants: dict[str, Array]) -> bool:
    if surgery.opset(model) < _DROPOUT_IS_INPUT or len(node.input) < 3 or not node.input[2]:
        return False
    mode = constants.get(node.input[2])
    return mode is None or bool(mode.reshape(-1)[:1].any())


def _evaluated(
    model: onnx.ModelProto, normalisations: list[int], dropouts: list[int]
) -> onnx.ModelProto:
    changed = surgery.copied(model)
    for index in normalisations:
        node = changed.graph.node[index]
        surgery.set_attributes(node, training_mode=0)
        del node.output[1:]  # the running statistics, which nothing in a deployed model reads
    for index in dropouts:
        node = changed.graph.node[index]
        del node.input[1:]  # without a ratio and a mode it hands its input on
    return changed


NOISE = Cause(
    id="export.training_mode",
    type="training mode",
    title="The model was exported in training mode: batch statistics, or dropout that drops",
    cause=(
        "In training mode batch normalisation uses the mean and variance of the batch at hand, and "
        "dropout sets values to zero at random; an export that was not put into evaluation mode "
        "keeps both."
    ),
    applies=(
        "BatchNormalization with training_mode, from operator set 14 on, and Dropout with "
        "training_mode, from operator set 12 on"
    ),
    source=(
        "PyTorch, torch.onnx.export, argument training (TrainingMode); ONNX operators "
        "BatchNormalization-15 and Dropout-13 (training_mode)"
    ),
    advice="call eval() on the module, and export it again with training=TrainingMode.EVAL",
    forms=(_BOTH, _NORMALISATION, _DROPOUT),
    variants=_variants,
    simulated=False,
)
