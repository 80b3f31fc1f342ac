"""What an audit was asked: from the command line, or from the command that a report carries."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from auditor.commands._app import MAIN, app
from auditor.commands._options import (
    backend_specs,
    engine_options,
    parse_artifacts,
    parse_kind,
    parse_shape,
    parse_traces,
    with_training,
)
from auditor.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from auditor.options import AuditOptions
    from auditor.verdict.policy import Policy


def again(command: Sequence[str]) -> typer.Context:
    """The arguments of an earlier audit, parsed: a context whose ``invoke`` runs it.

    Raises:
        UsageError: they are missing, or no arguments of an audit.
    """
    from typer.exceptions import TyperException
    from typer.main import get_command

    if not command:
        raise UsageError(
            "the report does not say how it was made", "Run the audit again with `-o report.json`."
        )
    verb: Any = get_command(app)
    try:
        context: typer.Context = verb.commands[MAIN].make_context(MAIN, list(command))
        return context
    except (TyperException, typer.Exit) as error:
        raise UsageError(
            f"the report's own command cannot be run: {error}", "Run the audit again."
        ) from error


def asked_for(given: Mapping[str, Any], rules: Policy | None) -> AuditOptions:
    """The options of an audit, from the command line's parameters.

    Raises:
        UsageError: they contradict one another, or name what there is not.
    """
    from auditor.options import AuditOptions
    from auditor.processes import cache
    from auditor.processes.limits import Limits

    traces = parse_traces(given["trace"])
    backends = given["backends"] or (list(rules.backends) if rules else None)
    # A trace is compared alone unless backends are named.
    source = given["source"]
    specs = () if traces and not backends else backend_specs(backends)
    specs = with_training(specs, source)
    taken = {spec.label for spec in specs} | {"reference"}
    if twice := [name for name, _ in traces if name in taken]:
        whose = " that the policy asks for" if backends and not given["backends"] else ""
        raise UsageError(
            f"--trace `{twice[0]}` has the name of a backend{whose}",
            "Write NAME=FILE with another name.",
        )
    images, pipeline, data = (given[key] for key in ("images", "pipeline", "data"))
    if (images is None) != (pipeline is None) or (images is not None and data is not None):
        raise UsageError(
            "--images and --pipeline belong together, and take the place of --data",
            "Write --images DIR --pipeline p.toml, or a preset such as imagenet-torchvision.",
        )
    names, memory = given["trace_names"], given["worker_memory"]
    kept = cache.folder() if given["cache"] else None
    return AuditOptions(
        backends=specs,
        requested=bool(backends),
        candidate=given["candidate"],
        data=data,
        images=images,
        pipeline=pipeline,
        seed=given["seed"],
        samples=given["samples"],
        shapes=dict(parse_shape(text) for text in given["shape"] or ()),
        nonfinite=given["allow_nonfinite"],
        timeout=given["timeout"],
        threads=given["threads"],
        options=engine_options(given["option"], specs),
        fail_on=given["fail_on"] or (rules.fail_on if rules else None) or "medium",
        output_kinds=dict(parse_kind(text) for text in given["output_kind"] or ()),
        tokens=_tokens(given["tokens"]) if given["tokens"] else (),
        confirm=given["confirm"],
        calibration=given["calibration"],
        artifacts=parse_artifacts(given["artifact"], specs),
        source=source,
        trust_source=given["trust_source"],
        custom_ops=tuple(given["custom_ops"] or ()),
        traces=traces,
        trace_names=_trace_names(names) if names else {},
        cache=kept,
        memory=_bytes(given["memory"]),
        latency=given["latency"] or (rules is not None and rules.limits_latency),
        pictures=given["pictures"],
        limits=None if memory is None else Limits(_bytes(memory)),
    )


def _bytes(gib: float) -> int:
    """The largest number that setrlimit(2) takes, where it is more or infinite."""
    from auditor.processes.limits import GIB

    return int(min(gib * GIB, sys.maxsize))


def _tokens(path: Path) -> tuple[str, ...]:
    from auditor.comparison import texts  # reads arrays too

    return texts.tokens(path)


def _trace_names(path: Path) -> dict[str, str]:
    """Imported for this alone: reading arrays takes numpy, and the workers are not started yet."""
    from auditor.capture.recording import read_names

    return read_names(path)
