"""A few strings of ``run.py``, which has them all, and that its checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.injection import run


@pytest.mark.parametrize("text", ["../../</script>|`[red]\x1b[2J", run.BYTES[0]])
def test_names_stay_names(tmp_path: Path, text: str | bytes) -> None:
    what, wrong, reports = run.tried(text, tmp_path)
    assert wrong == []
    assert what == ("refused" if isinstance(text, bytes) else "audited")
    assert bool(reports) == (what == "audited")
    assert not reports or set(run.CHECKS) < set(reports)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("json", "{'a': 1}"),
        ("sarif", '{"runs": [{"results": [{"message": {"text": "[x](javascript:1)"}}]}]}'),
        ("junit", "<testsuites><script/></testsuites>"),
        ("markdown", "<img src=x>"),
        ("model-explorer", "[\x1b[2J]"),
    ],
)
def test_what_is_interpreted_is_seen(format: str, text: str) -> None:
    assert run.CHECKS[format](text)
