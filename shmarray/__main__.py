"""``python -m shmarray doctor``: what this machine offers. Never put here: what a command does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shmarray import doctor

__all__ = ["main"]

USAGE = """usage: python -m shmarray doctor

doctor   try once what shmarray needs of this machine, and say what follows where something is missing;
         the exit status is 0 when worker processes can be used, 1 when only threads can
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; return the exit status."""
    match list(arguments):
        case ["doctor"]:
            return doctor.main()
        case [] | ["-h" | "--help"]:
            print(USAGE, end="")
            return 0
        case _:
            print(f"python -m shmarray {' '.join(arguments)}: no such command\n\n{USAGE}", end="", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
