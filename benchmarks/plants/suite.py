"""Draws cases, audits them and scores the reports; see the package's docstring for the rules."""

from __future__ import annotations

import json
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.ports import Silent
from auditor.records.report import AuditReport, BackendReport
from benchmarks import zoo
from benchmarks.plants import faults
from benchmarks.plants.faults import PLANTS, Plant, Site, UnsuitableError
from benchmarks.plants.network import Array, Network, Rewrite, change, values

# A plant must change its node's output by this much, relative L2: well above what rounding does
# to float32 (1e-6) and to float16 (1e-3).
MEASURABLE = {"float32": 5e-5, "float16": 1e-2}
# … and what operators up to three further on write by this much: a bias before a saturated
# sigmoid does nothing.
REACHES = 1e-5
# A rewrite that changes nothing must not change the outputs by more than this.
EQUAL = {"float32": 1e-4, "float16": 2e-2}

# Nodes at which a plant's effect is measured before it is given up.
TRIED = 8

# Precision of the build that carries the plant; "native-bf16" is the engine's own.
BUILDS = ("fp32", "bf16", "native-bf16")

# What bfloat16 operands hide: narrower roundings of the same operands.
SAME_IN_BF16 = ("bf16", "fp16", "tf32")
# What is no longer nothing once operands, or results, are rounded: they are other numbers.
NOT_NULL = (
    "null/weights by 3, result by 1/3",
    "null/batch normalisation unfolded",
    "null/split by inputs",
)

# Models that are not made by ``benchmarks.zoo`` itself: of which they are copies.
FP16 = {"mtcnn_o_fp16": "mtcnn_o", "efficientnet_lite0_fp16": "efficientnet_lite0"}
# … with −10000 for the lowest float32 in masks, of which OpenVINO's bfloat16 makes NaN in the first
# attention already: behind it nothing can be told.
FINITE = {"minilm_finite_mask": "minilm"}
_MASKED, _BEYOND = np.float32(-10000), -1e38
MODELS = (
    "mtcnn_p",
    "mtcnn_r",
    "mtcnn_o",
    "ppocr_cls",
    "ppocr_det",
    "ppocr_rec",
    "efficientnet_lite0",
    "minilm",
    "efficientnet_lite0_int8",
    "efficientnet_lite0_fp16",
)


def models(build: str) -> tuple[str, ...]:
    """The models that carry plants in a build."""
    finite = {source: copy for copy, source in FINITE.items()}
    return tuple(finite.get(m, m) if build == "native-bf16" else m for m in MODELS)


# Engine options of every build but the native one: the precision that the model is written in.
OPTIONS = {"ov": {"INFERENCE_PRECISION_HINT": "f32"}}
NATIVE_BF16 = {"ov": {"INFERENCE_PRECISION_HINT": "bf16"}}


@dataclass(frozen=True)
class Found:
    """What is kept of a finding: ``beside`` are the causes that it names beside ``noise``."""

    nodes: tuple[str, ...]
    noise: str | None
    introduced: float
    effect: float | None
    explained: float | None
    hypotheses: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def causes(self) -> set[str]:
        """All that it names."""
        return {*((self.noise,) if self.noise else ()), *self.beside}


@dataclass(frozen=True)
class Planted:
    """One plant of a case: ``change`` is the relative L2 of its own node's output."""

    id: str
    node: str
    op_type: str
    change: float


@dataclass(frozen=True)
class Result:
    """One case on one backend, scored.

    Attributes:
        kind: ``noise``, ``defect`` or ``null`` of a single plant, or ``two``.
        located, named: by plant; whether it was found, and given a cause that describes it.
        causes: by plant, the cause that its finding names; None where there is none.
        stray: causes of new findings that hold no changed node.
        outcome: ``right``, ``unexplained``, ``wrong cause``, ``not located``, ``silent``,
            ``false positive`` or ``failed``.
    """

    model: str
    backend: str
    build: str
    seed: int
    number: int
    kind: str
    plants: tuple[Planted, ...]
    outcome: str
    located: tuple[bool, ...] = ()
    named: tuple[bool, ...] = ()
    causes: tuple[str | None, ...] = ()
    stray: tuple[str | None, ...] = ()
    findings: tuple[Found, ...] = ()
    failure: str = ""
    seconds: float = 0.0

    @property
    def id(self) -> tuple[str, str, str, int, int, str]:
        """What makes a case the same one."""
        return (self.model, self.backend, self.build, self.seed, self.number, self.kind)


@dataclass(frozen=True)
class Case:
    """A changed model, ready to be compiled."""

    model: str
    build: str
    seed: int
    number: int
    kind: str
    network: Network
    plants: tuple[Planted, ...] = ()


@dataclass
class Subject:
    """A real model with what is known of it."""

    name: str
    folder: Path = field(default_factory=zoo.zoo_dir)

    @cached_property
    def path(self) -> Path:
        """The model's file; its inputs lie beside it."""
        if self.name in FINITE:
            return _masked(zoo.obtain([FINITE[self.name]], self.folder)[0], self.name)
        if self.name not in FP16:
            return zoo.obtain([self.name], self.folder)[0]
        return _in_half(zoo.obtain([FP16[self.name]], self.folder)[0], self.name)

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model."""
        return onnx.load(self.path)

    @cached_property
    def real(self) -> str:
        """The type it computes in."""
        kinds = {t.data_type for t in self.proto.graph.initializer}
        return "float16" if onnx.TensorProto.FLOAT16 in kinds else "float32"

    def _sample(self, index: int) -> dict[str, Array]:
        with np.load(self.path.with_suffix(".npz"), allow_pickle=False) as data:
            return values(self.proto, {n: data[n][index % len(data[n])] for n in data.files})

    @cached_property
    def values(self) -> dict[str, Array]:
        """Every tensor on the audited input."""
        return self._sample(0)

    @cached_property
    def others(self) -> dict[str, Array]:
        """Every tensor on another input."""
        return self._sample(1)

    @cached_property
    def sites(self) -> dict[str, list[str]]:
        """Keys of nodes that depend on the input, by operator type."""
        moving = set(self.feeds)
        result: dict[str, list[str]] = {}
        for node in self.proto.graph.node:
            if any(i in moving for i in node.input) and node.op_type != "Shape":
                moving.update(node.output)
                result.setdefault(node.op_type, []).append(node.output[0])
        return result

    @cached_property
    def feeds(self) -> dict[str, Array]:
        """The audited input."""
        weights = {t.name for t in self.proto.graph.initializer}
        names = [i.name for i in self.proto.graph.input if i.name not in weights]
        return {n: self.values[n] for n in names}

    def plantable(self, kind: str, build: str) -> list[Plant]:
        """Plants of a kind for which the model has operators, in order of name."""
        plants = [p for _, p in sorted(PLANTS.items()) if p.kind == kind]
        if build != "fp32":
            plants = [p for p in plants if p.family not in SAME_IN_BF16 and p.id not in NOT_NULL]
        return [p for p in plants if any(o in self.sites for o in p.operators)]


def _masked(path: Path, name: str) -> Path:
    """A copy of a model with finite masks."""
    target = path.with_name(f"{name}.onnx")
    if not target.exists():
        model = onnx.load(path)
        values = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute]
        for tensor in (*values, *model.graph.initializer):
            if tensor.data_type == onnx.TensorProto.FLOAT:
                value = numpy_helper.to_array(tensor)
                if (value < _BEYOND).any():
                    finite = np.where(value < _BEYOND, _MASKED, value)
                    tensor.CopyFrom(numpy_helper.from_array(finite, tensor.name))
        onnx.save(model, target)
        target.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes())
    return target


def _in_half(path: Path, name: str) -> Path:
    """A float16 copy of a model that reads and writes float32, by ONNX Runtime's converter."""
    target = path.with_name(f"{name}.onnx")
    if not target.exists():
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        half = OnnxModel(convert_float_to_float16(onnx.load(path), keep_io_types=True))
        half.topological_sort()  # the converter appends its casts at the end
        onnx.save(half.model, target)
        target.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes())
    return target


# ------------------------------------------------------------------------------ cases


def narrowed(network: Network, skip: Sequence[str] = ()) -> None:
    """A build in bfloat16: operands of every product rounded, sums in float32."""
    for node in list(network.proto.graph.node):
        if node.op_type not in faults.PRODUCTS or node.output[0] in skip:
            continue
        rewrite = Rewrite(network, node.output[0])
        inputs = list(node.input)
        for position in (0, 1):
            weights = network.constants.get(inputs[position])
            inputs[position] = (
                faults.rounded(rewrite, inputs[position], 8)
                if weights is None
                else network.constant(faults.in_bfloat16(weights))
            )
        rewrite.done(rewrite.again(*inputs))


def draw(subject: Subject, kind: str, build: str, seed: int, number: int) -> Case | None:
    """Case ``number`` of a kind: None when the model can carry none.

    Raises:
        RuntimeError: a rewrite that should change nothing did.
    """
    random = np.random.default_rng([seed, number, zlib.crc32(f"{subject.name} {kind}".encode())])
    network = Network(subject.proto)
    chosen: list[Planted] = []
    for which in ("noise", "defect") if kind == "two" else (kind,):
        plants = subject.plantable(which, build)
        shuffled = np.random.default_rng([seed, zlib.crc32(which.encode())]).permutation(
            len(plants)
        )
        begin = number * (2 if kind == "two" else 1)
        order = [plants[shuffled[(begin + i) % len(plants)]] for i in range(len(plants))]
        taken = {p.node for p in chosen}
        planted = next(
            (
                p
                for plant in order
                if (p := _place(subject, network, plant, random, taken)) is not None
            ),
            None,
        )
        if planted is None:
            return None
        chosen.append(planted)
    if build == "bf16":
        narrowed(network)
    return Case(subject.name, build, seed, number, kind, network, tuple(chosen))


def plant(subject: Subject, name: str, seed: int = 0) -> Case | None:
    """A case of one given plant, somewhere; None when the model cannot carry it."""
    network, form = Network(subject.proto), PLANTS[name]
    placed = _place(subject, network, form, np.random.default_rng(seed), set())
    if placed is None:
        return None
    return Case(subject.name, "fp32", seed, 0, form.kind, network, (placed,))


def _place(
    subject: Subject,
    network: Network,
    form: Plant,
    random: np.random.Generator,
    taken: set[str],
) -> Planted | None:
    """Plant at a random node where it can be measured, into ``network``."""
    keys = [k for o in form.operators for k in subject.sites.get(o, ()) if k not in taken]
    tried = 0
    for index in random.permutation(len(keys)):
        key = keys[index]
        seed = int(random.integers(2**31))
        alone = Network(subject.proto)
        try:
            _apply(subject, alone, form, key, seed)
        except UnsuitableError:
            continue
        tried += 1
        if tried > TRIED:
            return None
        changed = values(alone.proto, subject.feeds)
        moved = change(changed[key], subject.values[key])
        if form.kind == "null":
            if subject.real == "float16" and not np.isfinite(changed[key]).all():
                continue  # the rewrite overflows: it is something, in that type
            if not moved <= EQUAL[subject.real]:
                raise RuntimeError(f"{form.id} at {key} of {subject.name} changed {moved:.1e}")
        elif not moved >= MEASURABLE[subject.real]:
            continue
        outputs = [o.name for o in subject.proto.graph.output]
        if not all(np.isfinite(changed[o]).all() for o in outputs):
            continue
        if form.kind != "null" and not _reaches(subject, key, changed):
            continue
        _apply(subject, network, form, key, seed)
        return Planted(form.id, key, network_type(subject, key), moved)
    return None


def _reaches(subject: Subject, key: str, changed: Mapping[str, Array]) -> bool:
    """Whether a change at a node is not lost right behind it."""
    front = {key}
    for _ in range(3):
        readers = [n for n in subject.proto.graph.node if front & set(n.input)]
        front = {o for n in readers for o in n.output if o}
        moved = [change(changed[o], subject.values[o]) for o in front]
        if moved and not max(moved) >= REACHES:
            return False
    return True


def network_type(subject: Subject, key: str) -> str:
    """Operator type of a node of the unchanged model."""
    return next(o for o, keys in subject.sites.items() if key in keys)


def _apply(subject: Subject, network: Network, form: Plant, key: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    form.plant(Site(network, key, subject.values, subject.others, random))


# ------------------------------------------------------------------------------ audit


def _options(build: str) -> dict[str, dict[str, str]]:
    return NATIVE_BF16 if build == "native-bf16" else OPTIONS


def _refused(measured: BackendReport, build: str) -> str:
    """What the engine says of an option that it did not follow; empty where it followed all."""
    built = measured.provenance
    asked = _options(build).get(measured.id, {})
    if built is None or all(built.options.get(k) == v for k, v in asked.items()):
        return ""
    return " ".join((*built.denied, *built.notes)) or "compiled with other options than asked for"


def examine(subject: Subject, backend: str, build: str, network: Network | None) -> AuditReport:
    """Audit a changed model, or the model itself, in process."""
    with tempfile.TemporaryDirectory() as folder:
        candidate = None
        if network is not None:
            candidate = Path(folder, "candidate.onnx")
            network.save(candidate)
        options = AuditOptions(
            backends=(BackendSpec(backend),),
            candidate=candidate,
            data=subject.path.with_suffix(".npz"),
            samples=1,
            options=_options(build),
            threads=1,
        )
        return audit(subject.path, options, noises=discovery.noises(), progress=Silent())


def found(report: AuditReport) -> list[Found]:
    """The findings of a one-backend report, worst first."""
    segments = {s.id: s for b in report.backends for s in b.segments}
    return [
        Found(
            nodes=tuple(dict.fromkeys(k for s in f.segments for k in segments[s].node_keys)),
            noise=f.noise,
            introduced=f.introduced,
            effect=f.effect,
            explained=f.explained,
            hypotheses=tuple(
                f"{h.noise}: {h.variant} {h.explained:.4f}"
                for h in segments[f.segment].hypotheses[:3]
            ),
            beside=f.beside,
        )
        for f in report.findings
    ]


def new(findings: Sequence[Found], baseline: Sequence[Found]) -> list[Found]:
    """Findings that the build has not without its plant.

    Where its segments are cut otherwise, one finding may name what two of them name without it.
    """

    def there(finding: Found) -> bool:
        shared = [b for b in baseline if set(finding.nodes) & set(b.nodes)]
        if not finding.causes:
            return any(not b.causes for b in shared)
        together = {cause for b in shared for cause in b.causes}
        return finding.causes in (together, *(b.causes for b in shared))

    return [f for f in findings if not there(f)]


def run(subject: Subject, backend: str, case: Case, baseline: Sequence[Found]) -> Result:
    """Audit and score one case."""
    begin = time.perf_counter()
    blank = Result(
        case.model, backend, case.build, case.seed, case.number, case.kind, case.plants, "failed"
    )
    report = examine(subject, backend, case.build, case.network)
    (measured,) = report.backends
    seconds = round(time.perf_counter() - begin, 2)
    if measured.status != "audited":
        reason = measured.gap.reason if measured.gap else "not audited"
        return replace(blank, failure=reason, seconds=seconds)
    if refused := _refused(measured, case.build):
        return replace(blank, failure=refused, seconds=seconds)
    findings = found(report)
    return replace(
        score(blank, findings, baseline),
        findings=tuple(new(findings, baseline)[:8]),
        seconds=seconds,
    )


def score(blank: Result, findings: Sequence[Found], baseline: Sequence[Found]) -> Result:
    """The outcome of a case, by the rules of the package's docstring."""
    fresh = new(findings, baseline)
    if blank.kind == "null":
        causes = tuple(f.noise for f in fresh)
        return replace(blank, outcome="false positive" if fresh else "silent", stray=causes)
    top = fresh[: len(blank.plants)]
    located, named, causes_of = [], [], []
    for planted in blank.plants:
        home = next((f for f in top if planted.node in f.nodes), None)
        cause = home.noise if home else None
        expected = PLANTS[planted.id].expected
        located.append(home is not None)
        causes_of.append(cause)
        causes = home.causes if home else set()
        named.append(home is not None and bool(causes & expected if expected else not causes))
    nodes = {p.node for p in blank.plants}
    stray = tuple(f.noise for f in fresh if not nodes & set(f.nodes))
    if not all(located):
        outcome = "not located"
    elif all(named):
        outcome = "right"
    elif any(c is not None and not n for c, n in zip(causes_of, named, strict=True)):
        outcome = "wrong cause"
    else:
        outcome = "unexplained"
    return replace(
        blank,
        outcome=outcome,
        located=tuple(located),
        named=tuple(named),
        causes=tuple(causes_of),
        stray=stray,
    )


# ------------------------------------------------------------------------------ results


class Results:
    """Results and baselines in a file of JSON lines, appended as they come."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        self.done: dict[tuple[Any, ...], Result] = {}
        self.baselines: dict[tuple[str, str, str], list[Found]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            if "baseline" in record:
                key = (record["model"], record["backend"], record["build"])
                self.baselines[key] = [_found(f) for f in record["baseline"]]
            else:
                result = _result(record)
                self.done[result.id] = result

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.done[result.id] = result
        self._write(asdict(result))

    def baseline(self, subject: Subject, backend: str, build: str) -> list[Found]:
        """Findings of a build without a plant, audited once."""
        key = (subject.name, backend, build)
        if key not in self.baselines:
            network = None
            if build == "bf16":
                network = Network(subject.proto)
                narrowed(network)
            findings = found(examine(subject, backend, build, network))
            self.baselines[key] = findings
            record = dict(zip(("model", "backend", "build"), key, strict=True))
            self._write({**record, "baseline": [asdict(f) for f in findings]})
        return self.baselines[key]

    def _write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _found(record: Mapping[str, Any]) -> Found:
    lists = {k: tuple(v) for k, v in record.items() if isinstance(v, list)}
    return Found(**{**record, **lists})


def _result(record: Mapping[str, Any]) -> Result:
    lists = {k: tuple(v) for k, v in record.items() if isinstance(v, list)}
    lists["plants"] = tuple(Planted(**p) for p in record["plants"])
    lists["findings"] = tuple(_found(f) for f in record["findings"])
    return Result(**{**record, **lists})


def cases(
    subject: Subject, backend: str, build: str, counts: Mapping[str, int], seed: int
) -> Iterator[tuple[str, str, str, int, int, str]]:
    """Identities of the cases to run, as ``Result.id`` gives them."""
    for number in range(max(counts.values())):
        for kind, count in counts.items():
            if number < count:
                yield (subject.name, backend, build, seed, number, kind)
