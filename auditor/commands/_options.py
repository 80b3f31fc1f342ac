"""Options that several verbs share, and the reading of those that are more than a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.options import BackendSpec
    from auditor.records.terms import OutputKind

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The exported ONNX model.")]
Report = Annotated[
    Path, typer.Argument(metavar="REPORT.json", help="A report written by audit -o.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Recorded inputs (.npz or .safetensors keyed by input name, or .npy), samples "
        "stacked on the first axis; seeded random inputs when not given.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the random inputs.")]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="How many samples to use; the first 4 recorded or 1 random when not given.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="INPUT:1x3x224x224",
        help="Shape of an input whose dimensions the model leaves open; repeatable.",
    ),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID[:DEVICE],…",
        help="Backends to compare with the reference, such as ort,ov:GPU,tvm; all that are "
        "available here when not given.",
    ),
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID.KEY=VALUE",
        help="Engine option, such as ov.INFERENCE_PRECISION_HINT=f32; repeatable.",
    ),
]
JsonOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE.json", help="Write everything as JSON too."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Threads of each engine and of the reference; the engines' own default when not "
        "given.",
    ),
]
Cores = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads; all cores when not given.")
]
Timeout = Annotated[
    float, typer.Option(min=1, metavar="S", help="Seconds that one step of a backend may take.")
]
TrustSource = Annotated[
    bool,
    typer.Option(
        "--trust-source",
        help="Load a source file even though loading it can run code that is in it.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Report format: terminal, json, sarif, junit, markdown, html or model-explorer; from "
        "the suffix of -o (.json, .sarif, .xml, .md, .html, .nodes.json) when not given.",
    ),
]


def backend_specs(names: Sequence[str] | None) -> tuple[BackendSpec, ...]:
    from auditor import discovery
    from auditor.options import BackendSpec

    known = discovery.backend_ids()
    if not names:
        return tuple(BackendSpec(id) for id in known if id not in training_ids())
    specs: list[BackendSpec] = []
    for name in (part.strip() for text in names for part in text.split(",")):
        id, _, device = name.partition(":")
        discovery.require(id, known, "backend", "Backends")
        spec = BackendSpec(id, device or None)
        if spec in specs:
            raise UsageError(f"--backends names `{name}` twice", "Name each backend once.")
        specs.append(spec)
    return tuple(specs)


def training_ids() -> tuple[str, ...]:
    """Ids of the backends that run what a model was exported from."""
    from auditor import discovery
    from auditor.ports import Training

    return tuple(i for i in discovery.backend_ids() if isinstance(discovery.backend(i), Training))


def with_training(specs: Sequence[BackendSpec], source: str | None) -> tuple[BackendSpec, ...]:
    """The backends of an audit, the training side first where there is a source."""
    from auditor.options import BackendSpec

    if source is None:  # no look at each backend: that takes longer than starting their processes
        return tuple(specs)
    training = training_ids()
    named = [spec for spec in specs if spec.id in training]
    others = [spec for spec in specs if spec.id not in training]
    return (*(named or [BackendSpec(training[0])]), *others)


def engine_options(
    texts: Sequence[str] | None, specs: Sequence[BackendSpec]
) -> dict[str, dict[str, str]]:
    from auditor import discovery

    options: dict[str, dict[str, str]] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        id, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise UsageError(
                f"--option `{text}` is not of the form ID.KEY=VALUE",
                "Write it as in --option ov.INFERENCE_PRECISION_HINT=f32.",
            )
        discovery.require(id, {spec.id for spec in specs}, "audited backend", "Audited")
        options.setdefault(id, {})[key] = value
    return options


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    # Tensor names may contain colons (TensorFlow's `input:0`): the last one counts.
    name, _, dimensions = text.rpartition(":")
    sizes = dimensions.lower().split("x")
    if not name or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError(
            f"--shape `{text}` is not of the form INPUT:1x3x224x224",
            "Give the input's name and its positive sizes.",
        )
    return name, tuple(int(size) for size in sizes)


def parse_pair(option: str, text: str, such: str) -> tuple[str, str]:
    """``NAME=OTHER`` of an option; ``such`` is an example of it."""
    name, found, other = text.rpartition("=")
    if not (name and found and other):
        raise UsageError(f"{option} `{text}` is no pair", f"Such as {such}.")
    return name, other


def parse_kind(text: str) -> tuple[str, OutputKind]:
    from typing import cast, get_args

    from auditor.records.terms import OutputKind

    name, _, kind = text.rpartition(":")  # names may contain colons
    if not name or kind not in get_args(OutputKind):
        raise UsageError(
            f"--output-kind `{text}` is not of the form NAME:KIND",
            f"Give the output's name and one of {', '.join(get_args(OutputKind))}.",
        )
    return name, cast(OutputKind, kind)


def parse_traces(texts: Sequence[str] | None) -> tuple[tuple[str, Path], ...]:
    """The name to report each trace under, and its file; the file's stem when none is given."""
    traces: dict[str, Path] = {}
    for text in texts or ():
        name, equals, file = text.partition("=")
        if not equals or "/" in name:  # a path may hold the sign too
            name, file = Path(text).stem, text
        if not name or not file:
            raise UsageError(f"--trace `{text}` is not of the form [NAME=]FILE", "Name a file.")
        if name in traces:
            raise UsageError(
                f"two traces are called `{name}`", "Give each a name of its own: NAME=FILE."
            )
        traces[name] = Path(file)
    return tuple(traces.items())


def parse_artifacts(texts: Sequence[str] | None, specs: Sequence[BackendSpec]) -> dict[str, Path]:
    """``ov=model.xml`` → the backend's label: the file.

    Raises:
        UsageError: no such backend is audited, it loads no such files, or there is none.
    """
    if not texts:  # what says what a backend loads imports numpy
        return {}
    from auditor import discovery
    from auditor.ports import Loadable

    found: dict[str, Path] = {}
    for text in texts:
        label, equals, name = text.partition("=")
        spec = next((s for s in specs if s.label == label), None)
        if not equals or spec is None:
            audited = ", ".join(s.label for s in specs)
            raise UsageError(
                f"--artifact `{text}` names no audited backend", f"Write ID=FILE; ID is {audited}."
            )
        backend = discovery.backend(spec.id)
        endings = backend.artifacts if isinstance(backend, Loadable) else ()
        if not name.lower().endswith(endings or ("\0",)):
            what = (
                f"loads files in {', '.join(endings)}" if endings else "loads no files of its own"
            )
            raise UsageError(
                f"--artifact {text}: the {spec.id} backend {what}",
                "Another export is audited with --candidate, other runtimes with --trace.",
            )
        if not Path(name).is_file():
            raise UsageError(f"--artifact {name} does not exist", "Give the file that you ship.")
        found[label] = Path(name).resolve()
    return found
