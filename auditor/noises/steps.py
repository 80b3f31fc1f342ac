"""Causes before and after the network: steps of a pipeline, switched instead of replayed."""

from __future__ import annotations

from functools import partial

from auditor.noises._cause import Cause
from auditor.records.terms import Stage


def _step(
    stage: Stage, name: str, *, type: str, title: str, cause: str, advice: str, source: str
) -> Cause:
    return Cause(
        id=f"{stage.replace('-', '')}.{name}",
        stage=stage,
        type=type,
        title=title,
        cause=cause,
        applies="photographs given with `--images` and `--pipeline`, where the two sides differ "
        "in it",
        source=source,
        advice=advice,
        variants=lambda segment: (),
        simulated=False,
    )


_before, _after = partial(_step, "pre-processing"), partial(_step, "post-processing")

# In the order of execution.
NOISES = (
    _before(
        "decoder",
        type="decoder",
        title="Another JPEG decoder, or another of its ways to decode",
        cause=(
            "Decoders differ in the inverse DCT (exact, fast, floating point), in how they enlarge "
            "the colour channels, and in the rounding of the conversion to RGB."
        ),
        advice=(
            "decode in deployment with the library and the settings of training, or train on "
            "several decoders"
        ),
        source=(
            "SysNoise (Wang et al., MLSys 2023), sec. 3.1; ITU-T T.81, annex A.3.3, which leaves "
            "the accuracy of the inverse DCT open"
        ),
    ),
    _before(
        "orientation",
        type="decoder",
        title="The orientation that a camera wrote into the file is applied on one side only",
        cause=(
            "Most decoders hand out pixels as they are stored; some libraries and every viewer "
            "turn them upright first."
        ),
        advice="apply the EXIF orientation on both sides, or on neither",
        source="CIPA DC-008 (EXIF), tag 0x0112",
    ),
    _before(
        "colour",
        type="colour space",
        title="A round trip through YUV 4:2:0 as hardware decoders and cameras hand out pixels",
        cause=(
            "Matrix (BT.601, BT.709), range (limited, full), the rounding of its arithmetic and "
            "the halved resolution of the colour channels all change RGB values."
        ),
        advice=(
            "convert with the matrix and range that the pixels were made with, and train with the "
            "same round trip"
        ),
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.1 and eq. 7; ITU-R BT.601 and BT.709",
    ),
    _before(
        "framing",
        type="resize",
        title="Another part of the photograph, or another size, reaches the network",
        cause=(
            "Squashing, cropping and letterboxing are chosen anew by whoever writes the deployment."
        ),
        advice="use the sizes, crop and padding of training",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.1",
    ),
    _before(
        "resize",
        type="resize",
        title="Another library or interpolation for the same change of size",
        cause=(
            "Libraries of the same interpolation's name differ in where they sample, whether they "
            "smooth before making smaller, and in the precision of their weights."
        ),
        advice=(
            "resize in deployment with the library, interpolation and anti-aliasing of training, "
            "or train on several resizers"
        ),
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.1 and Table 7",
    ),
    _before(
        "channels",
        type="colour space",
        title="Red and blue are exchanged",
        cause="OpenCV hands out BGR, most other libraries RGB.",
        advice="give the network the order that it was trained with",
        source="OpenCV documentation, imread",
    ),
    _before(
        "normalise",
        type="normalisation",
        title="Other constants turn pixels into the network's numbers",
        cause=(
            "Scale, mean and deviation are copied by hand between training code, converter options "
            "and application code."
        ),
        advice="use the scale, mean and deviation of training",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.1",
    ),
    _before(
        "layout",
        type="normalisation",
        title="Another type or order of axes of the network's input",
        cause="Deployments feed 8 bits, 16-bit floats or channels last where a runtime takes them.",
        advice="feed the type and layout that the model was exported with",
        source="ONNX operator specification, Conv (layout NCHW)",
    ),
    _after(
        "activation",
        type="activation",
        title="Another function makes scores of the network's numbers",
        cause=(
            "Softmax or sigmoid is left to the application, or done twice when the model already "
            "has it."
        ),
        advice="apply the activation of training exactly once",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.3",
    ),
    _after(
        "box_decode",
        type="detection proposal",
        title="Boxes are read off the outputs in another way",
        cause=(
            "Anchors, variances and the order of the columns are written down in the training code "
            "only."
        ),
        advice="decode with the anchors and the coding of training",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.3",
    ),
    _after(
        "box_offset",
        type="detection proposal",
        title="A box from x1 to x2 is taken for x2 - x1 or x2 - x1 + 1 wide",
        cause=(
            "The offset differs between detection libraries and their versions, and between "
            "training and exported decoders."
        ),
        advice="use the offset of training when boxes are decoded",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.3 (ALIGNED_FLAG.offset)",
    ),
    _after(
        "box_rounding",
        type="detection proposal",
        title="Corners are rounded or cut at the border on one side only",
        cause=(
            "Applications that crop what was detected turn corners into whole numbers, down or to "
            "the nearest."
        ),
        advice="keep corners in floating point until pixels are cut out",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.3 and appendix",
    ),
    _after(
        "nms",
        type="detection proposal",
        title="Overlapping boxes are suppressed by another rule",
        cause=(
            "Implementations differ in the offset with which overlaps are measured, in whether "
            "classes compete, in the limit and in the order of ties."
        ),
        advice="use the suppression of training, with its limit and its offset",
        source=(
            "SysNoise (Wang et al., MLSys 2023), appendix; ONNX operator specification, "
            "NonMaxSuppression"
        ),
    ),
    _after(
        "mask_resize",
        type="upsample",
        title="A mask is enlarged in another way",
        cause=(
            "The network's mask is smaller than the photograph. Libraries place its pixels "
            "differently under the same interpolation's name, and applications enlarge before or "
            "after they decide what belongs to it."
        ),
        advice="enlarge as the evaluation did: same library, interpolation and order",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.2 and 3.3",
    ),
    _after(
        "threshold",
        type="threshold",
        title="Another threshold decides what counts",
        cause=(
            "Detections and masks are cut at a score that evaluation and application choose for "
            "themselves."
        ),
        advice="use the threshold that the model was evaluated with",
        source="SysNoise (Wang et al., MLSys 2023), sec. 3.3",
    ),
    _after(
        "text_decode",
        type="text decoding",
        title="A text is read off the scores in another way",
        cause=(
            "Connectionist temporal classification merges repeated classes and drops blanks; a "
            "deployment that takes every step's best class, or another blank, reads other "
            "characters."
        ),
        advice="decode as training's evaluation did, with its blank",
        source="Graves et al., Connectionist temporal classification (ICML 2006), sec. 3.2",
    ),
)
