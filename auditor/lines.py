"""Where in a TOML file something stands, for errors that name the line."""

from __future__ import annotations

import re
from collections import Counter


class Lines:
    """On which line of a text each key stands; TOML readers do not tell."""

    _HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
    _ENTRY = re.compile(r"\s*\[\[\s*([^\[\]]+?)\s*\]\]")
    _KEY = re.compile(r"\s*([A-Za-z0-9_.\"'-]+)\s*=")

    def __init__(self, text: str, source: str) -> None:
        """``source`` is what the file is called."""
        self._source = source
        self._found: dict[str, int] = {}
        entries: Counter[str] = Counter()
        table = ""
        for number, line in enumerate(text.splitlines(), 1):
            if entry := self._ENTRY.match(line):
                table = f"{entry[1]}.{entries[entry[1]]}"
                entries[entry[1]] += 1
                self._found[table] = number
            elif header := self._HEADER.match(line):
                table = header[1]
                if last := entries[table.partition(".")[0]]:  # a table inside the last entry
                    table = table.replace(".", f".{last - 1}.", 1)
                self._found.setdefault(table, number)
            elif key := self._KEY.match(line):
                name = key[1].strip("\"'")
                self._found.setdefault(f"{table}.{name}" if table else name, number)

    def where(self, key: str) -> str:
        """File and line of a dotted key, or of what it stands in.

        In an array of tables its entries are numbered: ``model.0.path``.
        """
        while key:
            if key in self._found:
                return f"{self._source}, line {self._found[key]}"
            key = key.rpartition(".")[0]
        return self._source
