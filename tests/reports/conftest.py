"""Reports: one made by hand with the figures of a real audit, and arbitrary ones."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from auditor.records.backend import Gap, Kernel, Provenance, Skipped
from auditor.records.measured import (
    CategoryShare,
    Concentration,
    Consequence,
    Counterfactual,
    Distance,
    FidelityProof,
    Hypothesis,
    Latency,
    OutputChange,
    OutputDistance,
    Picture,
    Segment,
    Spread,
    TensorStats,
)
from auditor.records.model import ModelInfo, ReferenceInfo, StimulusInfo
from auditor.records.report import (
    Agreement,
    AuditReport,
    BackendReport,
    Broken,
    Finding,
    Judgement,
    NoiseInfo,
    Waiver,
)

LAYERS = 16
_EDGES = tuple(e * math.log10(2) for e in range(-30, 4, 3))
_SHAPE = (1, 112, 14, 14)


def _distance(relative: float, scale: float = 2.6) -> Distance:
    if relative == 0:
        return Distance(0.0, 0.0, math.inf, 1.0)
    return Distance(
        relative, relative * scale, -20 * math.log10(relative), 1 - relative * relative / 2
    )


def _tensor(name: str, role: str, relative: float) -> TensorStats:
    return TensorStats(
        name=name,
        dtype="float32",
        shape=_SHAPE,
        role="input" if role == "input" else "output",
        reference_range=(-3.1412, 5.9876),
        backend_range=(-3.1406, 6.0),
        distance=_distance(relative),
        histogram=(812, 41, 160, 902, 2403, 6800, 9100, 1702, 31, 1, 0),
        histogram_edges=_EDGES,
    )


def _segment(index: int, *, bf16: bool) -> Segment:
    base = f"efficientnet-lite0/model/blocks_{index}"
    out = f"{base}/Relu6:0"
    before = f"efficientnet-lite0/model/blocks_{index - 1}/Relu6:0" if index else "images:0"
    introduced = (4.1e-3 if bf16 else 2.1e-7) / (1 + index % 5)
    accumulated = introduced * (1 + index / 4)
    nodes = (
        f"{base}/depthwise_conv2d/depthwise",
        f"{base}/tpu_batch_normalization/FusedBatchNormV3",
        f"{base}/Relu6",
    )
    return Segment(
        id=f"s{index}",
        nodes=nodes,
        node_keys=(f"{nodes[0]}:0", f"{nodes[1]}:0", out),
        op_types=("Conv", "BatchNormalization", "Clip"),
        inputs=(before,),
        outputs=(out,),
        kernel="Convolution brgconv_avx512_amx" if bf16 else "FusedConv",
        precision="bf16" if bf16 else "f32",
        fidelity="output-proved",
        accumulated=accumulated,
        introduced=introduced,
        inherited=accumulated * 0.9,
        amplification=1.08 if index else None,
        leave_one_in=0.383 / (1 + index) if bf16 else None,
        impact_share=0.42 / (1 + index) - 0.05 if bf16 else None,
        floor=1.2e-6,
        noise="precision.bf16" if bf16 else "precision.fp32_rounding",
        explained=0.99984 if bf16 else None,
        bit_identical=0.9921 if bf16 else 0.71,
        residual=6.4e-7 if bf16 else introduced,
        hypotheses=(
            Hypothesis(
                "precision.bf16", "inputs+weights bf16, f32 bias, output rounded", 0.99984, 0.9921
            ),
            Hypothesis("precision.bf16", "inputs+weights bf16", 0.7312, 0.124),
            Hypothesis("precision.fp16", "inputs+weights fp16, fp16 bias", -0.0213, 0.0),
            Hypothesis("precision.tf32", "inputs+weights tf32", -417.3, 0.0),
        )
        if bf16
        else (),
        tensors=(
            _tensor(before, "input", accumulated * 0.8 if index else 0.0),
            _tensor(out, "output", accumulated),
        ),
        concentration=Concentration(1, 37, 112, 0.44) if index == 3 else None,
        leave_one_in_spread=_spread(0.383, 0.2) if bf16 and index == 0 else None,
        impact_share_spread=_spread(0.37, 0.01, 2) if bf16 and index == 0 else None,
        explained_spread=_spread(0.9, 0.0999) if bf16 and index == 0 else None,
        explained_on=1 if bf16 and index == 0 else None,
        contradicted=2 if bf16 and index == 0 else 0,
        one_step=0.0032 if bf16 and index == 0 else None,
        picture=_picture(out) if bf16 and index == 0 else None,
        consequences=(_consequence(0, 0.69, "top-1 stays in all 4 rows; margin 0.71 → 0.69"),)
        if bf16 and index == 0
        else (),
    )


def _picture(tensor: str) -> Picture:
    """Three rows of four cells, the last of which is no number on the backend."""
    values, apart = bytes(range(1, 254, 23)) + b"\xff", bytes([128, 1, 255, *[128] * 8, 0])
    return Picture(
        tensor=tensor,
        sample=1,
        plane="[0, 37, :, :]",
        size=(14, 14),
        cells=(3, 4),
        range=(-3.14, 5.99),
        most_accumulated=4.1e-3,
        most_introduced=2e-3,
        reference=values,
        deployed=values[:-1] + b"\0",
        accumulated=apart,
        introduced=bytes(12),
    )


def _spread(mean: float, deviation: float, samples: int = 4) -> Spread:
    return Spread(samples, mean, deviation, mean - deviation, mean + deviation, 1, 2)


def _consequence(changed: int, margin_after: float, sentence: str) -> Consequence:
    return Consequence(
        output="Softmax:0",
        kind="scores",
        samples=4,
        items=4,
        changed=changed,
        first_changed=2 if changed else None,
        margin=0.71,
        margin_after=margin_after,
        kl=0.0021,
        sentence=sentence,
    )


def _kernel(segment: Segment) -> Kernel:
    kind, _, primitive = segment.kernel.partition(" ")
    return Kernel(
        name=segment.nodes[0],
        type=kind,
        nodes=segment.node_keys,
        outputs=segment.outputs,
        primitive=primitive,
        precision=segment.precision,
        output_precision=segment.precision,
    )


def _backend(id: str, engine: str, version: str, *, bf16: bool) -> BackendReport:
    segments = tuple(_segment(i, bf16=bf16) for i in range(LAYERS))
    return BackendReport(
        id=id,
        device="CPU",
        status="audited",
        gap=None,
        provenance=Provenance(
            engine=engine,
            version=version,
            device="CPU",
            options={"INFERENCE_NUM_THREADS": "2"},
            kernels=tuple(_kernel(s) for s in segments),
        ),
        fidelity=FidelityProof(
            outputs_bitwise_equal=True,
            program_unchanged=True,
            candidates=51 if bf16 else 52,
            output_proved=41 if bf16 else 52,
            cone_proved=9 if bf16 else 0,
            perturbing=0,
            run_to_run=0.0,
            rebuild=0.0 if bf16 else None,
            skipped=(Skipped("blocks_9/Add:0", "observing it changed the program's fusion"),)
            if bf16
            else (),
        ),
        latency=Latency(2.1e-3, 5e-3) if bf16 else None,
        outputs=(
            OutputDistance(
                "Softmax:0",
                _distance(1.2e-2, 0.8),
                0.75,
                kind="scores",
                consequence=_consequence(1, 0.64, "top-1 flips in 1 of 4 rows, first on sample 2"),
                spread=_spread(1.1e-2, 0.4e-2),
            )
            if bf16
            else OutputDistance("Softmax:0", _distance(2.1e-7, 0.8), 1.0),
        ),
        categories=(
            CategoryShare("precision.bf16", "inference", 0.9981, _spread(0.9981, 0.0052)),
            CategoryShare("precision.fp32_rounding", "inference", 0.0003),
        )
        if bf16
        else (CategoryShare("precision.fp32_rounding", "inference", 1.0),),
        unexplained_share=0.0016 if bf16 else 0.0,
        segments=segments,
        booked=tuple((s.id, s.impact_share or 0.0) for s in segments),
        additivity=3.78 if bf16 else None,
        input_control=1.4 if bf16 else None,
        warnings=(
            "Contributions do not add here (sum of squared impacts 3.78, 1 where errors are "
            "independent): repairing several segments helps less than their impacts suggest.",
            "44% of the error of output `Softmax:0` sits at index 37 of axis 1 (size 112).",
        )
        if bf16
        else (),
        seconds={"start": 0.4, "build": 0.9, "run": 0.05},
        unexplained_spread=_spread(0.0016, 0.001) if bf16 else None,
        booked_samples=2 if bf16 else 1,
        counterfactuals=_counterfactuals() if bf16 else (),
    )


def _counterfactuals() -> tuple[Counterfactual, ...]:
    return (
        Counterfactual(
            factor="inference in bf16",
            options={"INFERENCE_PRECISION_HINT": "f32"},
            noises=("precision.bf16", "precision.fp16"),
            conclusion="confirmed",
            samples=4,
            before=1.2e-2,
            after=2.1e-7,
            removed=0.99999,
            claimed=0.9981,
            latency_before=0.0053,
            latency_after=0.0112,
            outputs=(OutputChange("Softmax:0", 1.2e-2, 2.1e-7),),
            sentence="built again without inference in bf16 (INFERENCE_PRECISION_HINT=f32), the "
            "final divergence is 2.10e-07 instead of 1.20e-02",
        ),
        Counterfactual(
            factor="execution mode PERFORMANCE",
            options={"EXECUTION_MODE_HINT": "ACCURACY"},
            noises=(),
            conclusion="failed",
            failure="the process was killed by SIGSEGV",
            sentence="built again without execution mode PERFORMANCE: not measured",
        ),
    )


def _finding(rank: int, segment: Segment) -> Finding:
    return Finding(
        rank=rank,
        backend="ov",
        segment=segment.id,
        segments=(segment.id,),
        nodes=segment.nodes,
        op_types=segment.op_types,
        kernel=segment.kernel,
        noise=segment.noise if rank != 3 else None,
        stage="inference",
        leave_one_in=segment.leave_one_in,
        impact_share=segment.impact_share,
        introduced=segment.introduced,
        effect=(segment.leave_one_in or 0.0) * 1.2e-2,
        explained=segment.explained if rank != 3 else None,
        bit_identical=segment.bit_identical if rank != 3 else 0.11,
        severity="medium" if rank == 1 else "low",
        confidence="high" if rank != 3 else "medium",
        evidence=("replaying precision.bf16 explains 0.9998 of the error",),
        remedy="Set INFERENCE_PRECISION_HINT=f32 (--option ov.INFERENCE_PRECISION_HINT=f32)."
        if rank != 3
        else None,
        fingerprint=f"{rank:032x}",
        leave_one_in_spread=segment.leave_one_in_spread,
        explained_spread=segment.explained_spread if rank != 3 else None,
        consequences=segment.consequences,
    )


@pytest.fixture
def judged(report: AuditReport) -> AuditReport:
    """The same audit under a policy that waives its first finding."""
    first, second, *_ = report.findings
    judgement = Judgement(
        "audit.toml",
        (
            Broken("output `Softmax:0` on ov: relative_l2 is 0.012", "ov", output="Softmax:0"),
            Broken("finding 2 on ov: severity low", "ov", fingerprint=second.fingerprint),
            Broken("ov: latency_ratio is 0.42, and its tolerance 0.4", "ov"),
        ),
        (Waiver(first.fingerprint, "accepted: checked on the test set"),),
        ("The acceptance of 00000000000000000000000000000009 ended on 2026-01-01.",),
    )
    return replace(report, judgement=judgement)


@pytest.fixture
def report() -> AuditReport:
    """An audit of three backends, one of which could only be built."""
    ort = _backend("ort", "ONNX Runtime", "1.32.0", bf16=False)
    ov = _backend("ov", "OpenVINO", "2026.4.1", bf16=True)
    trt_gap = Gap(
        "trt",
        "run",
        "built, not run: no CUDA device",
        "Run this audit on a machine that has the device.",
        ("[W] CUDA initialization failure with error: 35",),
    )
    trt = BackendReport(
        id="trt",
        device="",
        status="built",
        gap=trt_gap,
        provenance=Provenance(
            engine="TensorRT-RTX",
            version="1.7.1",
            device="none",
            kernels=tuple(replace(_kernel(s), precision="tf32") for s in ov.segments),
            notes=("TF32 is on by default.",),
        ),
    )
    tvm_gap = Gap("tvm", "start", "TVM is not installed", "pip install 'sysnoise-auditor[tvm]'")
    return AuditReport(
        tool_version="0.1.0",
        model=ModelInfo(
            path="models/efficientnet_lite0.onnx",
            sha256="3f2a9c1be0" * 6 + "abcd",
            opset=11,
            nodes=105,
            parameters=4_652_008,
            producer="tf2onnx 1.9.3",
        ),
        stimulus=StimulusInfo(
            kind="recorded",
            samples=4,
            seed=None,
            source="photos.npz",
            shapes={"images:0": (1, 3, 224, 224)},
        ),
        reference=ReferenceInfo("ONNX Runtime CPU, unoptimised", "1.32.0", "fp32"),
        backends=(
            ort,
            ov,
            BackendReport(id="tvm", device="", status="gap", gap=tvm_gap),
            trt,
        ),
        findings=tuple(_finding(i + 1, s) for i, s in enumerate(ov.segments)),
        agreement=(
            Agreement("reference", "ort", 2.1e-7),
            Agreement("reference", "ov", 1.2e-2),
            Agreement("ort", "ov", 1.2e-2),
        ),
        outlier="ov",
        gaps=(tvm_gap, trt_gap),
        verdict="fail",
        exit_code=1,
        timing={"load": 0.41, "measure": 6.1, "report": 0.02, "total": 6.53},
        requested=("ort", "ov", "tvm"),
        noises=(
            NoiseInfo(
                "precision.bf16",
                "inference",
                "data precision",
                "Tensors are rounded to bfloat16",
                "Engines with AMX compute in bfloat16 by default.",
                "SysNoise, section 3.2",
            ),
        ),
    )


# --- arbitrary reports ---------------------------------------------------------------------------

# What an unkind model or engine may put into a name.
_UNKIND = (
    "",
    "[red]x[/red]",
    ":smile:",
    "\x1b[2J",
    "a\nb",
    "\u202egnp",
    "`a|b`",
    "\\|",
    " x ",
    "<script>alert(1)</script>",
    "a]]>b&amp;",
    "{0}[x](1)",
    "@octocat #1 :x: https://example.org www.example.org",
    "\x00\ufffe",
    "\udc80",
    "名前",
    "/a" * 90,
)
_NAMES = st.sampled_from(_UNKIND) | st.text(max_size=12)
_FINITE = st.floats(allow_nan=False, allow_infinity=False)
_POSITIVE = st.floats(0, 1e30)
_ERRORS = {"accumulated", "introduced", "inherited", "residual", "floor", "run_to_run"}
_SHARES = {"share", "unexplained_share", "cosine", "bit_identical"}


def _values(hint: Any, field: str) -> st.SearchStrategy[Any]:
    """Values that a record's field can have."""
    if hint is Distance:
        return _distances()
    if hint is Picture:
        return _pictures()
    if is_dataclass(hint):
        return _records(hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, UnionType):
        (some,) = (i for i in inner if i is not NoneType)
        return st.none() | _values(some, "")  # None is "not measured", so there is no NaN
    if origin is dict:
        return st.dictionaries(_NAMES, _values(inner[1], field), max_size=2)
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(_values(inner[0], field), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*(_values(i, field) for i in inner))
    if hint is float and field in _ERRORS:
        return _POSITIVE | st.just(math.inf)
    if hint is float and field in _SHARES:
        return _FINITE | st.just(math.nan)
    if hint is int:
        return st.integers(3, 2**40)  # the least that every count may be: a search has 3 items
    return {float: _FINITE, bool: st.booleans(), str: _NAMES}[hint]


def _records(kind: type[Any]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    made = st.builds(kind, **{f.name: _values(hints[f.name], f.name) for f in fields(kind)})
    return made.map(_with_edges) if kind is TensorStats else made


def _with_edges(tensor: TensorStats) -> TensorStats:
    """A histogram has one edge more than counts."""
    return replace(tensor, histogram_edges=(-500.5, *map(float, range(len(tensor.histogram)))))


def _pictures() -> st.SearchStrategy[Picture]:
    """Pictures with a byte for each cell."""

    @st.composite
    def made(draw: st.DrawFn) -> Picture:
        rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        levels = st.binary(min_size=rows * columns, max_size=rows * columns)
        return Picture(
            *(draw(_NAMES), draw(st.integers(0, 9)), draw(_NAMES)),
            *((rows * 3, columns), (rows, columns), draw(st.tuples(_FINITE, _FINITE))),
            *(draw(_POSITIVE), draw(_POSITIVE)),
            *(draw(levels) for _ in range(4)),
        )

    return made()


def _distances() -> st.SearchStrategy[Distance]:
    apart = st.builds(
        Distance, _POSITIVE, _POSITIVE, st.floats(-1e3, 1e3), st.floats(-1, 1), st.none() | _NAMES
    )
    equal = st.just(Distance(0.0, 0.0, math.inf, 1.0))
    unlike = st.builds(
        Distance,
        st.just(math.inf),
        st.just(math.inf),
        st.just(-math.inf),
        st.just(0.0),
        st.none() | _NAMES,
    )
    return st.one_of(apart, equal, unlike)


@pytest.fixture(scope="session")
def any_reports() -> tuple[AuditReport, ...]:
    """Arbitrary reports, with unkind names and numbers: drawing one takes longer than using it."""
    drawn: list[AuditReport] = []

    @settings(
        max_examples=60,
        derandomize=True,
        phases=[Phase.generate],  # shrinking whole reports takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(_records(AuditReport))
    def draw(report: AuditReport) -> None:
        drawn.append(report)

    draw()
    return tuple(drawn)
