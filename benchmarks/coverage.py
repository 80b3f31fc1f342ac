"""What is observed of each model on each backend, what is proved of it, and why not the rest.

``python -m benchmarks.coverage`` audits one sample of every model of the zoo on every backend and
writes ``docs/coverage.md``. With names it measures those models alone, and prints.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.ports import Silent
from auditor.records.report import BackendReport
from benchmarks import zoo
from reports import _words as words

BACKENDS = ("ort", "ov", "tvm", "trt")
PAGE = zoo.ROOT / "docs" / "coverage.md"
_HEAD = """\
# What capture covers

Made by `python -m benchmarks.coverage`: one sample of every model of `benchmarks/zoo.py` on every
backend. *Candidates* are the tensors that survive in the compiled program and can be compared,
final outputs included; *proved* are those that were observed with bitwise-equal outputs and an
unchanged program. What is not proved has its reason below; a backend that gives no comparison has
its gap.

| model | """
_LONGEST = 240  # characters of a reason


def measured(path: Path, backends: Sequence[str]) -> dict[str, BackendReport]:
    """The part of each backend in an audit of one recorded sample."""
    options = AuditOptions(
        backends=tuple(BackendSpec(id) for id in backends),
        data=path.with_suffix(".npz"),
        samples=1,
        confirm=False,
    )
    report = audit(path, options, noises=discovery.noises(), progress=Silent())
    return {part.id: part for part in report.backends}


def cell(part: BackendReport) -> str:
    """``57/58``, or that there is a gap."""
    proof = part.fidelity
    if part.gap is not None or proof is None:
        return "gap"
    return f"{proof.output_proved + proof.cone_proved}/{proof.candidates}"


def reasons(part: BackendReport) -> Iterator[str]:
    """Why what is not proved is not, with how many tensors each reason is about."""
    if part.gap is not None:
        yield words.elide(f"{part.gap.stage}: {part.gap.reason}", _LONGEST)
    if part.fidelity is None:
        return
    proof = part.fidelity
    if not proof.outputs_bitwise_equal:
        yield "the outputs with probes differ from the plain program's"
    if not proof.program_unchanged:
        yield "probes changed the compiled program"
    counted = Counter(skipped.reason for skipped in proof.skipped)
    yield from (f"{reason} ({count})" for reason, count in counted.most_common())


def page(found: dict[str, dict[str, BackendReport]]) -> str:
    """The whole page as Markdown."""
    titles = {id: discovery.backend(id).title for id in BACKENDS}
    versions = {
        id: next((p[id].provenance.version for p in found.values() if p[id].provenance), "")
        for id in BACKENDS
    }
    named = [f"{titles[id]} {versions[id]}".strip() for id in BACKENDS]
    lines = [_HEAD + " | ".join(named) + " |", "|---|" + "--:|" * len(BACKENDS)]
    for name, parts in found.items():
        cells = " | ".join(cell(parts[id]) for id in BACKENDS)
        lines.append(f"| {zoo.RECIPES[name].title} | {cells} |")
    lines += ["", "## Why not", ""]
    for id in BACKENDS:
        lines += [f"### {titles[id]}", ""]
        said: dict[str, list[str]] = {}
        for name, parts in found.items():
            for reason in reasons(parts[id]):
                said.setdefault(reason, []).append(zoo.RECIPES[name].title)
        lines += [f"- {reason}: {'; '.join(models)}" for reason, models in said.items()]
        lines += [] if said else ["Everything is proved."]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MODEL", help="models; all when none is named")
    names = parser.parse_args().names or list(zoo.RECIPES)
    found = {}
    for name, path in zip(names, zoo.obtain(names), strict=True):
        found[name] = measured(path, BACKENDS)
        cells = (f"{id} {cell(part)}" for id, part in found[name].items())
        print(f"{name:24} {'  '.join(cells)}", flush=True)
    text = page(found)
    if len(names) == len(zoo.RECIPES):
        PAGE.write_text(text)
        print(PAGE)
    else:
        print(text)


if __name__ == "__main__":
    main()
