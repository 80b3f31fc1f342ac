"""Known vulnerabilities of the locked packages: none, or each with a dated reason.

``python .ci/advisories.py`` asks pip-audit about every pin in ``locks/``. The exit code is 1 where
a package has one that ``locks/exceptions.toml`` does not excuse, and where an excuse has run out. A
package that the database does not tell about is said to be unchecked; where it tells about none,
that is said in one line and the exit code is 0, as no network is no vulnerability.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

LOCKS = Path(__file__).parents[1] / "locks"
_SECONDS = 180
_NO_NETWORK = ("Max retries exceeded", "ConnectionError", "ReadTimeout", "Failed to resolve")


def judge(
    dependencies: list[dict[str, Any]], excused: list[dict[str, Any]], today: date
) -> tuple[list[str], bool]:
    """What to say about pip-audit's answer, and whether it is clean.

    Args:
        dependencies: its JSON report's list of that name: ``name``, and ``version`` with ``vulns``
            (``id``, ``aliases``, ``fix_versions``) or ``skip_reason``.
        excused: tables with ``id``, ``package``, ``reason`` and ``until``, a date.
        today: the day on which an excuse must still hold.
    """
    reasons = {(e["package"], e["id"]): e for e in excused if e["until"] >= today}
    lines = [
        f"{e['package']}: the exception for {e['id']} ended on {e['until']}"
        for e in excused
        if e["until"] < today
    ]
    clean = not lines
    unchecked = [d["name"] for d in dependencies if "vulns" not in d]
    for found in dependencies:
        for advisory in found.get("vulns", []):
            names = {advisory["id"], *advisory.get("aliases", [])}
            excuse = next(filter(None, (reasons.get((found["name"], n)) for n in names)), None)
            what = f"{found['name']} {found['version']}: {advisory['id']}"
            if excuse:
                lines.append(f"{what}, accepted until {excuse['until']}: {excuse['reason']}")
            else:
                fixed = ", ".join(advisory.get("fix_versions", [])) or "no version yet"
                lines.append(f"{what}, fixed in {fixed}")
                clean = False
    checked = len(dependencies) - len(unchecked)
    if not checked:
        lines.append("skipped: the database of advisories cannot be reached")
    else:
        if unchecked:
            lines.append(f"the database does not know {', '.join(unchecked)}")
        lines.append(f"{checked} packages looked up")
    return lines, clean


def ask() -> list[dict[str, Any]]:
    """pip-audit's answer about every pin; empty where its database cannot be reached.

    Raises:
        RuntimeError: with its last words, where it fails for another reason.
    """
    locks = [part for lock in sorted(LOCKS.glob("*.txt")) for part in ("-r", str(lock))]
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-f", "json"]
    try:
        done = subprocess.run(
            [*command, *locks], capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        answer = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return []
    except (ValueError, KeyError):
        if any(sign in done.stderr for sign in _NO_NETWORK):
            return []
        raise RuntimeError(f"pip-audit failed: {done.stderr[-2000:]}") from None
    assert isinstance(answer, list)
    return answer


def main() -> int:
    """The command line; see the module's docstring."""
    excused = tomllib.loads((LOCKS / "exceptions.toml").read_text("utf-8")).get("exception", [])
    lines, clean = judge(ask(), excused, date.today())
    print(*(f"advisories: {line}" for line in lines), sep="\n")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
