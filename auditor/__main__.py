"""The ``audit`` command, also as ``python -m auditor``."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; Ctrl-C is quiet even while it is still being imported."""
    try:
        from auditor import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
