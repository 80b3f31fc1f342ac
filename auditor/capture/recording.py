"""Tensors that were captured elsewhere: by ``audit record``, or by any other runtime.

A recording stands where a live backend would: it has the attributes and the ``sample`` of a
``Tracer``, so that the analysis needs to know nothing of it.

``audit record`` writes a ``.npz`` file that any NumPy reads. Its arrays are named
``input/SAMPLE/TENSOR``, ``tensor/SAMPLE/TENSOR`` and, where the program does not repeat its own
bits, ``again/SAMPLE/TENSOR``; the array ``audit-trace`` holds what else is known, as JSON. Any
other file of arrays is a dump, named by ONNX tensor, with nothing proved about it.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from auditor import datafiles, stimulus
from auditor.capture.trace import SampleTrace, Tracer
from auditor.comparison import metrics
from auditor.datafiles import Stored
from auditor.errors import UsageError, reason, suggestion
from auditor.graphs.model import Model, Shape
from auditor.graphs.segments import Graph
from auditor.ports import Array, Arrays, Progress
from auditor.processes.wire import decode, encode
from auditor.records.backend import Gap, Probe, Provenance, Skipped
from auditor.records.model import StimulusInfo

_HEADER = "audit-trace"
_FORMAT = "audit-trace/1"
_AGAIN = "Record it again with audit record."
_MAX_NAMES = 16 * 2**20  # bytes of a --trace-names file


@dataclass(slots=True)
class Recording:
    """What one runtime did with the samples, read from a file.

    ``id`` is the name under which the report speaks of it; the other public attributes are those
    of ``Tracer``.
    """

    id: str
    path: Path
    progress: Progress
    provenance: Provenance | None = None
    probes: tuple[Probe, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    program_unchanged: bool = False
    rebuilt: bool = False
    unproved: str | None = None
    gap: Gap | None = None
    unobserved: Gap | None = None
    built_only: bool = False
    recalled: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    info: StimulusInfo | None = None
    sha256: str | None = None
    _stored: dict[str, Stored] = field(default_factory=dict)
    _runs: tuple[_Run, ...] = ()
    _names: dict[str, str] = field(default_factory=dict)  # a dump's names → the model's

    def stated(self) -> Provenance | None:
        """What made it, as the report says it."""
        return self.provenance

    def bind(self, model: Model) -> None:
        """Check that it was made with ``model``, and find the tensors in it.

        Raises:
            UsageError: it was recorded from another model, or holds none of its tensors.
        """
        graph = Graph(model.proto)
        if self.sha256 is not None:
            if self.sha256 != model.info.sha256:
                raise UsageError(
                    f"{self.path} was recorded from another file than {model.path}",
                    "Audit the very file that was recorded, or name it with --candidate.",
                )
            return
        known = {*graph.inputs, *graph.producer}
        mapped = dict(self._names)
        self._names = {mapped.get(name, name): name for name in self._stored}
        found = [name for name in self._names if name in known]
        if not set(found) - set(graph.inputs):
            other = next((n for n in self._names if n not in known), "")
            raise UsageError(
                f"{self.path} holds no tensor of the model",
                suggestion(other, sorted(known)) + "Name arrays as the ONNX tensors, or give "
                "--trace-names a JSON file that maps its names to them.",
            )
        ends = {*graph.inputs, *graph.outputs}
        self.probes = tuple(
            # A name from the map is the user's belief: it is confirmed by the values.
            Probe(name, "perturbing", inferred=name in mapped.values())
            for name in found
            if name not in ends
        )
        self.skipped = tuple(
            Skipped(name, "is no tensor of the model") for name in self._names if name not in known
        )

    def stimulus(
        self,
        model: Model,
        samples: int | None,
        shapes: Mapping[str, Shape],
        names: Mapping[str, str],
        *,
        nonfinite: bool,
    ) -> stimulus.Stimulus | None:
        """The inputs that it was made with; None where they are not in the file.

        Args:
            model: the reference model.
            samples: how many to use; None for all that were recorded, or the first 4 of a dump.
            shapes: shapes chosen by the user, by input.
            names: the reference's input names → the compiled model's.
            nonfinite: accept NaN and infinities.

        Raises:
            UsageError: they do not fit the model, or there are fewer than ``samples``.
        """
        theirs = {spec.name: names.get(spec.name, spec.name) for spec in model.inputs}
        if self.info is None:
            keys = {ours: self._names.get(name, "") for ours, name in theirs.items()}
            if not keys.keys() or not all(key in self._stored for key in keys.values()):
                return None
            stored = {ours: self._stored[key] for ours, key in keys.items()}
            return stimulus.of_arrays(
                model, self.path, stored, samples, shapes, nonfinite=nonfinite
            )
        count = len(self._runs)
        if samples is not None and samples > count:
            raise UsageError(
                f"--samples asks for {samples} samples, but {self.path} holds {count}", _AGAIN
            )
        # Each was checked when it was recorded; checked again, since a file can be anything.
        first = {o: self._array(f"input/0/{name}") for o, name in theirs.items()}
        whole = stimulus.of_arrays(model, self.path, first, None, shapes, nonfinite=nonfinite)
        info = replace(self.info, samples=samples or count, shapes=whole.info.shapes)

        def sample(index: int) -> Arrays:
            arrays = {o: self._array(f"input/{index}/{n}").read(None) for o, n in theirs.items()}
            for spec in model.inputs:
                array = arrays[spec.name]
                if array.dtype != spec.dtype or array.shape != info.shapes[spec.name]:
                    raise UsageError(f"{self.path}: sample {index} does not fit the model", _AGAIN)
            return arrays

        return stimulus.Stimulus(info, sample, count)

    def sample(self, feeds: Arrays, index: int, available: int) -> SampleTrace | None:
        """What was recorded of one sample; None (with ``gap`` set) where there is nothing.

        Args:
            feeds: the inputs by the compiled model's names.
            index: the sample's number.
            available: how many samples a dump holds, one after another on the first axis.

        Raises:
            UsageError: it was made with other inputs.
        """
        self.progress.update(self.id, "read")
        if self.info is None:
            return self._dumped(feeds, index, available)
        if index >= len(self._runs):
            self.gap = Gap(
                self.id, "read", f"{self.path} holds {len(self._runs)} samples only", _AGAIN
            )
            return None
        self._check_inputs(feeds, self._group("input", index))
        run = self._runs[index]
        tensors = self._group("tensor", index)
        if missing := [n for n in run.outputs if n not in tensors]:
            raise UsageError(f"{self.path} lacks output `{missing[0]}`", _AGAIN)
        return SampleTrace(
            outputs={name: tensors[name] for name in run.outputs},
            tensors=tensors,
            again=self._group("again", index) or None,
            bitwise_equal=run.bitwise_equal,
            difference=run.difference,
            run_to_run=run.run_to_run,
        )

    def _dumped(self, feeds: Arrays, index: int, available: int) -> SampleTrace | None:
        arrays: Arrays = {}
        for name, key in self._names.items():
            stored = self._stored[key]
            if available > 1 and (not stored.shape or stored.shape[0] % available):
                if index == 0 and any(p.tensor == name for p in self.probes):
                    self.probes = tuple(p for p in self.probes if p.tensor != name)
                    self.skipped += (
                        Skipped(name, f"its first axis does not hold {available} samples"),
                    )
                continue
            array = stored.read(None)
            if available > 1:
                step = array.shape[0] // available
                array = array[index * step : (index + 1) * step]
            arrays[name] = np.ascontiguousarray(array) if array.shape else array
        self._check_inputs(feeds, {n: a for n, a in arrays.items() if n in feeds})
        tensors = {n: a for n, a in arrays.items() if n not in feeds}
        observed = {p.tensor for p in self.probes}
        outputs = {n: a for n, a in tensors.items() if n not in observed}
        return SampleTrace(outputs, tensors, None, True, 0.0, 0.0)

    def _check_inputs(self, feeds: Arrays, recorded: Arrays) -> None:
        for name, value in recorded.items():
            if name in feeds and not metrics.bitwise_equal(
                {name: value.astype(feeds[name].dtype).reshape(-1)},
                {name: feeds[name].reshape(-1)},
            ):
                raise UsageError(
                    f"{self.path} was made with other values of input `{name}`",
                    "Give --data the inputs that it was made with, or leave --data out where the "
                    "file holds them.",
                )

    def _array(self, key: str) -> Stored:
        if key not in self._stored:
            raise UsageError(f"{self.path} has no `{key}`", _AGAIN)
        return self._stored[key]

    def _group(self, kind: str, index: int) -> Arrays:
        start = f"{kind}/{index}/"
        return {
            key.removeprefix(start): stored.read(None)
            for key, stored in self._stored.items()
            if key.startswith(start)
        }


@dataclass(frozen=True, slots=True)
class _Run:
    """What is known of one recorded sample besides its tensors; see ``SampleTrace``."""

    outputs: tuple[str, ...]
    bitwise_equal: bool
    difference: float
    run_to_run: float


Source = Tracer | Recording  # what an analysis can be made of


@dataclass(frozen=True, slots=True)
class _Header:
    """What ``audit record`` knows besides arrays."""

    format: str
    sha256: str
    stimulus: StimulusInfo
    provenance: Provenance
    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    rebuilt: bool
    runs: tuple[_Run, ...]


def load(id: str, path: Path, names: Mapping[str, str], progress: Progress) -> Recording:
    """Open a recording or a dump; its arrays are read when they are needed.

    Args:
        id: the name under which the report shall speak of it.
        path: ``.npz`` or ``.safetensors``.
        names: a dump's names → ONNX tensor names, where they differ.
        progress: where to say what is being read.

    Raises:
        UsageError: the file cannot be used.
    """
    stored = datafiles.read(path, "--trace")
    if _HEADER not in stored:
        if "" in stored:
            raise UsageError(
                f"{path} is one array without a name", "Save a .npz keyed by ONNX tensor name."
            )
        if unknown := [name for name in names if name not in stored]:
            raise UsageError(
                f"--trace-names speaks of `{unknown[0]}`, which is not in {path}",
                suggestion(unknown[0], sorted(stored)),
            )
        return Recording(
            id,
            path,
            progress,
            provenance=Provenance("recorded tensors", "unknown", "unknown"),
            unproved="These tensors come from another program: nothing proves that observing "
            "them left it unchanged.",
            _stored=stored,
            _names=dict(names),
        )
    try:
        raw = stored.pop(_HEADER).read(None)
        header: _Header = decode(_Header, json.loads(raw.tobytes().decode()))
        if header.format != _FORMAT:
            raise ValueError(f"format {header.format!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not a trace that this version reads: {error}", _AGAIN) from (
            error
        )
    return Recording(
        id,
        path,
        progress,
        provenance=header.provenance,
        probes=header.probes,
        skipped=header.skipped,
        program_unchanged=header.program_unchanged,
        rebuilt=header.rebuilt,
        info=replace(header.stimulus, source=f"{header.stimulus.source}, in {path}"),
        sha256=header.sha256,
        _stored=stored,
        _runs=header.runs,
    )


def read_names(path: Path) -> dict[str, str]:
    """A map from a dump's names to ONNX tensor names: a JSON object of strings.

    Raises:
        UsageError: it is something else.
    """
    try:
        if path.stat().st_size > _MAX_NAMES:
            raise ValueError("it is too large")
        names = json.loads(path.read_text("utf-8"))
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise ValueError("it is not an object of strings")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--trace-names {path} cannot be read: {reason(error)}",
            'Write a JSON object such as {"conv1_out": "/layer1/Conv_output_0"}.',
        ) from error
    return names


def write(path: Path, model: Model, samples: stimulus.Stimulus, tracer: Tracer) -> bool:
    """Run every sample on a built backend and write what it did, one sample at a time.

    Args:
        path: the ``.npz`` file to make.
        model: what was compiled.
        samples: what it is fed.
        tracer: the backend, built.

    Returns:
        False (with ``tracer.gap`` set) when the backend failed.

    Raises:
        UsageError: a tensor is of a type that ``.npz`` cannot hold.
    """
    runs: list[_Run] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for index in range(len(samples)):
            feeds = samples.sample(index)
            trace = tracer.sample(feeds, last=index + 1 == len(samples))
            if trace is None or tracer.unobserved is not None:
                tracer.gap = tracer.gap or tracer.unobserved
                return False
            for kind, arrays in (
                ("input", feeds),
                ("tensor", trace.tensors),
                ("again", trace.again or {}),
            ):
                for name, value in arrays.items():
                    _add(archive, f"{kind}/{index}/{name}", value)
            runs.append(
                _Run(tuple(trace.outputs), trace.bitwise_equal, trace.difference, trace.run_to_run)
            )
        assert tracer.provenance is not None
        header = _Header(
            _FORMAT,
            model.info.sha256,
            samples.info,
            tracer.provenance,
            tracer.probes,
            tracer.skipped,
            tracer.program_unchanged,
            tracer.rebuilt,
            tuple(runs),
        )
        text = json.dumps(_finite(encode(header)), allow_nan=False).encode()
        _add(archive, _HEADER, np.frombuffer(text, np.uint8))
    return True


def _add(archive: zipfile.ZipFile, name: str, value: Array) -> None:
    if value.dtype.kind not in "fiubc":
        raise UsageError(
            f"`{name}` is {value.dtype}, which .npz cannot hold", "Record another build."
        )
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, np.asarray(value, order="C"), allow_pickle=False)


def _finite(data: Any) -> Any:
    """JSON has no infinity: a difference that is infinite becomes the largest number."""
    if isinstance(data, float) and not math.isfinite(data):
        return float(np.finfo(np.float64).max)
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_finite(value) for value in data]
    return data
