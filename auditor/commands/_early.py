"""Which workers a command will need, seen before its arguments are understood."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

_OPTION = "--backends"
# With these nothing runs, or workers under other limits.
_OTHERWISE = {"-h", "--help", "--version", "--sandbox", "--worker-memory"}


def named(arguments: Sequence[str]) -> list[str]:
    """Ids of the backends whose workers can start at once.

    A guess: what the command asks for in the end counts, and only Linux ends for certain what
    nobody asked for (``auditor.processes.guard``).
    """
    words = [argument.partition("=") for argument in arguments]
    if sys.platform != "linux" or any(word in _OTHERWISE for word, _, _ in words):
        return []
    lists = [value for word, _, value in words if word == _OPTION]
    lists += [value for word, value in pairwise(arguments) if word == _OPTION]
    ids = [part.strip().partition(":")[0] for text in lists for part in text.split(",")]
    if not any(ids):
        return []
    from auditor import discovery

    known = discovery.backend_ids()
    return [id for id in ids if id in known]
