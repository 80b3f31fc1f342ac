"""Labels that are one class or one line of text for each photograph."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from auditor.errors import UsageError
from auditor.pipeline.scoring import Label, Labels, listed


def classes(names: Sequence[str], source: str) -> Labels:
    """Class indices by photograph.

    Args:
        names: the photographs, relative to their folder.
        source: ``from-folder``: the folder a photograph is in; its number if all folders are
            numbers, else its place among the sorted names (torchvision's ImageFolder).
            ``from-name``: the number that the file's name begins with. A file: a name and an index
            per line, separated by a comma, a tab or spaces.

    Raises:
        UsageError: the source says nothing of the kind.
    """
    if source == "from-folder":
        inside = {n: n.rpartition("/")[0] for n in names}
        found = sorted(set(inside.values()))
        if found == [""]:
            raise UsageError(
                "--labels from-folder, but the photographs are not in folders by class",
                "Give a file with a name and a class index per line.",
            )
        if all(c.isdecimal() for c in found):
            return Labels({n: int(c) for n, c in inside.items()})
        return Labels({n: found.index(c) for n, c in inside.items()})
    if source == "from-name":
        numbers = {n: re.match(r"\d+", n.rpartition("/")[2]) for n in names}
        return Labels({n: int(match[0]) for n, match in numbers.items() if match})

    def index(text: str) -> int | None:
        return int(text) if text.strip().isdecimal() else None

    return from_file(names, Path(source), index, "a name and a class index", "photo.jpg,17")


def from_file(
    names: Sequence[str],
    path: Path,
    read: Callable[[str], Label | None],
    what: str,
    example: str,
) -> Labels:
    """Labels from lines of a name and a value; a first line that has no value is a header.

    Args:
        names: the photographs, relative to their folder; a line may leave the folders out.
        path: the file.
        read: the label in a line's second part, None where there is none.
        what: what a line holds, in words.
        example: such a line.

    Raises:
        UsageError: the file cannot be read, or a line holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read --labels {path}: {error}", "Or say from-folder or from-name."
        ) from error
    given: dict[str, Label] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, value = _halves(line)
        label = read(value)
        if label is None:
            if at == 1:  # a header
                continue
            raise UsageError(
                f"{path}, line {at}: `{line[:60]}` is not {what}",
                f"Write lines such as {example}.",
            )
        given[name] = label
    matched, unused = match(names, given)
    notes = [listed(f"Labels in {path} that belong to no photograph", unused)] if unused else []
    return Labels(matched, tuple(notes))


def match(names: Sequence[str], given: dict[str, Label]) -> tuple[dict[str, Label], list[str]]:
    """Labels by photograph, and the names that belong to none; folders may be left out."""
    short: dict[str, str] = {}
    for name in names:
        short.setdefault(name.rpartition("/")[2], name)
    matched = {name: given[name] for name in names if name in given}
    unused = []
    for name, label in given.items():
        if name in matched:
            continue
        if name in short and short[name] not in matched:
            matched[short[name]] = label
        else:
            unused.append(name)
    return matched, unused


def _halves(line: str) -> tuple[str, str]:
    """A line's name and the rest: separated by a tab, a comma, or the last spaces."""
    if "\t" in line:
        name, _, value = line.partition("\t")
    elif "," in line:
        row = next(csv.reader([line]))
        name, value = row[0], ",".join(row[1:])
    else:
        name, _, value = line.strip().rpartition(" ")
    return name.strip(), value.strip()
