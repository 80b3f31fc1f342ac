"""The locks fit what the project asks for, and what is made of pip-audit's answer."""

from __future__ import annotations

import re
import runpy
import tomllib
from datetime import date
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
judge = runpy.run_path(str(ROOT / ".ci/advisories.py"))["judge"]
TODAY = date(2026, 11, 28)


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "locks" / name).read_text("utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_pin_has_a_hash_and_no_place(lock: Path) -> None:
    text = re.sub(r" *#.*", "", lock.read_text("utf-8"))
    assert "://" not in text
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.fullmatch(
            r"[a-z0-9._-]+==\S+( ; .*?)?( *\\\s+--hash=sha256:[0-9a-f]{64})+\s*", entry
        )


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_the_locks_hold_what_the_project_asks_for(extra: str | None) -> None:
    asked = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    lock = f"{extra}.txt" if (ROOT / "locks" / f"{extra}.txt").exists() else "dev.txt"
    held = {name: pins(name) for name in ({lock, "dev.txt"} if extra else {"base.txt", "dev.txt"})}
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name == "torch":
            continue
        for locked in held.values():
            assert locked[name] in requirement.specifier


def test_all_locks_agree() -> None:
    everything = pins("dev.txt")
    for lock in LOCKS:
        for name, version in pins(lock.name).items():
            assert everything.get(name, version) == version


def advisory(**more: object) -> dict[str, object]:
    return {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"], **more}


def test_an_advisory_fails_unless_it_is_excused_today() -> None:
    found = [{"name": "a", "version": "1", "vulns": [advisory()]}]
    excuse = {"package": "a", "id": "CVE-1", "reason": "not reached", "until": TODAY}
    lines, clean = judge(found, [], TODAY)
    assert not clean
    assert "a 1: PYSEC-1, fixed in 2" in lines
    lines, clean = judge(found, [excuse], TODAY)
    assert clean
    assert "not reached" in lines[0]
    assert not judge(found, [excuse | {"until": date(2026, 11, 27)}], TODAY)[1]
    assert not judge(found, [excuse | {"package": "b"}], TODAY)[1]


def test_what_is_not_looked_up_is_said() -> None:
    known = {"name": "a", "version": "1", "vulns": []}
    unknown = {"name": "b", "skip_reason": "not found"}
    assert judge([known, unknown], [], TODAY) == (
        ["the database does not know b", "1 packages looked up"],
        True,
    )
    for nothing in ([], [unknown]):
        (line,), clean = judge(nothing, [], TODAY)
        assert clean
        assert line.startswith("skipped: ")
