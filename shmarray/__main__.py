"""``python -m shmarray doctor``: what this machine offers; ``stores``: what stores there are. Never put here: what a command does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shmarray import doctor, store

__all__ = ["main"]

USAGE = """usage: python -m shmarray doctor | stores

doctor   try once what shmarray needs of this machine, and say what follows where something is missing;
         the exit status is 0 when worker processes can be used, 1 when only threads can
stores   list the stores of this user that processes have open: owner, users, names, shapes, dtypes, bytes; dead ones are swept
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; return the exit status."""
    match list(arguments):
        case ["doctor"]:
            return doctor.main()
        case ["stores"]:
            print(store.stores())
            return 0
        case [] | ["-h" | "--help"]:
            print(USAGE, end="")
            return 0
        case _:
            print(f"python -m shmarray {' '.join(arguments)}: no such command\n\n{USAGE}", end="", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
