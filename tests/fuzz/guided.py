"""Coverage-guided fuzzing of the auditor's own parsers, with atheris (``pip install atheris``).

``python -m tests.fuzz.guided --target report --seconds 300`` lets libFuzzer change sound files byte
by byte towards code that was not run yet. Anything but an ``AuditError`` ends it, and the input is
kept in ``.reliability/``; ``--input FILE`` runs that one again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

_KEPT = Path(__file__).parents[2] / ".reliability"


TARGETS = ("data", "npy", "report", "policy", "pipeline")


def _targets(made: Path) -> dict[str, tuple[str, Callable[[Path], object], list[bytes]]]:
    """By name: the file's ending, what reads it, and sound examples."""
    import numpy as np

    from auditor import datafiles
    from auditor.pipeline import description
    from auditor.verdict import policy
    from reports import json_v1
    from tests.fuzz import run

    run.prepare(made)
    np.save(made / "x.npy", np.zeros((1, 3, 2, 2), np.float32))
    presets = sorted((Path(description.__file__).parent / "presets").glob("*.toml"))
    return {
        "data": (".npz", lambda path: datafiles.read(path, "--data"), _read(made / "trace.npz")),
        "npy": (".npy", lambda path: datafiles.read(path, "--data"), _read(made / "x.npy")),
        "report": (".json", json_v1.load, _read(made / "report.json")),
        "policy": (".toml", policy.load, [run._POLICY.encode()]),
        "pipeline": (".toml", lambda path: description.load(str(path)), _read(*presets)),
    }


def _read(*paths: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="report")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--input", type=Path)
    asked = parser.parse_args()
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["auditor", "reports"]):
        from auditor.errors import AuditError

        folder = Path(tempfile.mkdtemp(prefix="guided-"))
        targets = _targets(folder)
    ending, read, examples = targets[asked.target]
    path = folder / f"input{ending}"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except AuditError as error:
            assert error.hint.strip() and "\n" not in error.message, error

    if asked.input:
        one(asked.input.read_bytes())
        return 0
    _KEPT.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="guided-") as corpus:
        for number, example in enumerate(examples):
            Path(corpus, str(number)).write_bytes(example)
        limits = [f"-max_total_time={asked.seconds}", "-timeout=20", "-rss_limit_mb=6144"]
        atheris.Setup(
            [sys.argv[0], *limits, f"-artifact_prefix={_KEPT}/{asked.target}-", corpus], one
        )
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
