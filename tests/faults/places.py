"""Audits in places where something is missing: each ends soundly, or in one sentence.

``python -m tests.faults.places`` audits one model without a network, with /dev/shm full, with full
and read-only folders, and with a clock that jumps. The report must then have the bytes that it has
without that (what a clock says aside), or one error message with a hint must say what is missing;
nothing may stay behind, and no traceback may be seen. Needs Linux, and root or user namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.endurance.run import digest, model
from tests.faults.run import bound, processes

ROOT = Path(__file__).parents[2]
CLOCK = Path(__file__).parent / "clock"
_UNSHARE = ["unshare"] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
_SECONDS = 300


@dataclass
class Setting:
    """Where an audit runs: its folder, command line and environment."""

    folder: Path
    backends: str
    report: str
    wrap: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    stdout: str = os.devnull


def _mounted(setting: Setting, place: Path, size: str, fill: bool) -> None:
    """A small file system at ``place``, filled to its last byte or not."""
    filling = 'cat /dev/zero > "$0/filler" 2>/dev/null; ' if fill else ""
    script = f'mount -t tmpfs -o size={size} none "$0" || exit 99; {filling}"$@"'
    setting.wrap = [*_UNSHARE, "--mount", "sh", "-c", script, str(place)]


def _alone(setting: Setting) -> None:
    setting.wrap = [*_UNSHARE, "--net"]


def _full_shm(setting: Setting) -> None:
    _mounted(setting, Path("/dev/shm"), "64k", fill=True)


def _full_temporary(setting: Setting) -> None:
    _mounted(setting, Path(setting.environment["TMPDIR"]), "64k", fill=True)


def _small_temporary(setting: Setting) -> None:
    _mounted(setting, Path(setting.environment["TMPDIR"]), "96k", fill=False)


def _full_report(setting: Setting) -> None:
    place = setting.folder / "out"
    place.mkdir()
    setting.report = str(place / "report.json")
    _mounted(setting, place, "64k", fill=True)


def _full_cache(setting: Setting) -> None:
    place = setting.folder / "cache"
    place.mkdir()
    setting.environment["SYSNOISE_CACHE"] = str(place)
    setting.more = [m for m in setting.more if m != "--no-cache"]
    _mounted(setting, place, "64k", fill=True)


def _full_screen(setting: Setting) -> None:
    setting.more += ["--format", "json"]
    setting.report = ""
    setting.stdout = "/dev/full"


def _read_only(setting: Setting, name: str) -> Path:
    place = setting.folder / name
    place.mkdir()
    place.chmod(0o555)
    setting.wrap = bound([])
    return place


def _read_only_report(setting: Setting) -> None:
    setting.report = str(_read_only(setting, "out") / "report.json")


def _read_only_temporary(setting: Setting) -> None:
    setting.environment["TMPDIR"] = str(_read_only(setting, "tmp2"))


def _read_only_cache(setting: Setting) -> None:
    setting.environment["SYSNOISE_CACHE"] = str(_read_only(setting, "cache"))
    setting.more = [m for m in setting.more if m != "--no-cache"]


def _no_home(setting: Setting) -> None:
    setting.environment["HOME"] = str(setting.folder / "nowhere")


def _clock(setting: Setting) -> None:
    setting.environment["SYSNOISE_CACHE"] = str(setting.folder / "cache")
    setting.more = [m for m in setting.more if m != "--no-cache"]
    setting.environment["PYTHONPATH"] = os.pathsep.join([str(CLOCK), str(ROOT)])


@dataclass(frozen=True)
class Place:
    """A place, and what an audit must do there: ``same`` report, or ``refuse`` in one message.

    Attributes:
        arrange: sets it up.
        may: what may come of it.
    """

    arrange: Callable[[Setting], None]
    may: tuple[str, ...] = ("same",)


PLACES = {
    "no network (namespace without interfaces)": Place(_alone),
    "full /dev/shm": Place(_full_shm),
    "full temporary folder": Place(_full_temporary, ("refused", "gaps", "same")),
    "temporary folder of 96 KiB": Place(_small_temporary, ("refused", "gaps", "same")),
    "full folder of the report": Place(_full_report, ("refused",)),
    "full cache": Place(_full_cache),
    "standard output full": Place(_full_screen, ("refused",)),
    "read-only folder of the report": Place(_read_only_report, ("refused",)),
    "read-only temporary folder": Place(_read_only_temporary, ("refused", "same")),
    "read-only cache": Place(_read_only_cache),
    "no home": Place(_no_home, ("same", "gaps")),
    "clock jumps 400 days to and fro": Place(_clock),
}


def audited(folder: Path, backends: str, arrange: Callable[[Setting], None] | None) -> Any:
    """One audit in such a place.

    Returns:
        What came of it (``same`` stands for any whole report), the report without what a clock
        says, and what was wrong.
    """
    scratch = folder / "tmp"
    scratch.mkdir()
    setting = Setting(folder, backends, str(folder / "report.json"))
    setting.environment = {"TMPDIR": str(scratch), "HOME": str(folder), "FAULT_AUDIT": folder.name}
    setting.more = ["--no-cache", "--threads", "1"]
    if arrange:
        arrange(setting)
    command = [*setting.wrap, sys.executable, "-m", "auditor", "model.onnx", "--backends", backends]
    command += setting.more + (["-o", setting.report] if setting.report else [])
    with open(setting.stdout, "w") as out:
        job = subprocess.Popen(
            command,
            cwd=folder,
            stdout=out,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | setting.environment,
            text=True,
            errors="replace",
        )
        try:
            _, errors = job.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            job.kill()
            return "hang", None, [f"no end after {_SECONDS} s"]
    wrong = [f"left behind: process {p}" for p in processes(folder.name)]
    wrong += [f"left behind: {p.name}" for p in Path(setting.environment["TMPDIR"]).iterdir()]
    if "Traceback" in errors or "internal error" in errors:
        wrong.append(f"traceback: {errors[-500:]}")
    made = Path(setting.report) if setting.report else None
    if made and made.exists():
        report = json.loads(made.read_text())
        what = "gaps" if report["gaps"] else "same"
        return what, report, wrong
    if job.returncode != 2 or "hint:" not in errors:
        wrong.append(f"exit code {job.returncode}: {errors[-400:]}")
    return "refused", None, wrong


def tried(backends: str, names: list[str]) -> list[dict[str, Any]]:
    """Try places one after another, beside the audit that lacks nothing."""
    with TemporaryDirectory(prefix="places-") as name:
        base = Path(name)
        base.chmod(0o755)

        def one(arrange: Callable[[Setting], None] | None) -> Any:
            folder = base / "here"  # the same for all: reports name it
            folder.mkdir()
            model(folder / "model.onnx")
            result = audited(folder, backends, arrange)
            shutil.rmtree(folder)
            return result

        what, sound, wrong = one(None)
        assert what == "same" and not wrong, (what, wrong)
        results = []
        for place in names:
            rule = PLACES[place]
            what, report, wrong = one(rule.arrange)
            if what not in rule.may:
                wrong.append(f"{what} instead of {' or '.join(rule.may)}")
            if what == "same" and digest(report) != digest(sound):
                wrong.append(f"another report: {', '.join(_changed(sound, report))}")
            results.append({"place": place, "what": what, "wrong": wrong})
            print(f"{place:<45}{what:<10}{'; '.join(wrong) or 'ok'}", flush=True)
    return results


def _changed(old: Any, new: Any, at: str = "") -> list[str]:
    """Where two reports differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [x for k in keys for x in _changed(old.get(k), new.get(k), f"{at}.{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [x for i, (a, b) in pairs for x in _changed(a, b, f"{at}[{i}]")]
    return [] if old == new or at.rpartition(".")[2] in ("seconds", "command") else [at]


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", default="ort,ov,tvm")
    parser.add_argument("--place", choices=PLACES, action="append")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    asked = parser.parse_args()
    results = tried(asked.backends, asked.place or list(PLACES))
    if asked.json:
        earlier = json.loads(asked.json.read_text()) if asked.json.exists() else []
        asked.json.write_text(json.dumps([*earlier, *results], indent=1))
    return 1 if any(result["wrong"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
