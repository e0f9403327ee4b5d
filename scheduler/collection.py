"""Collections: names and items in a shared segment that threads and processes read and change together, over a `Journal`.

Promises: a change is one step for everybody, made under the lock of the table; reading takes no lock between processes. A collection
lives, with what it holds, while a process holds its root's Lease, a handle of it is on its way, or another collection that lives holds
it. A forked child goes on with what its parent had.
Never put here: how records are laid out (`journal`), what they mean, how an unrelated process finds a root (`rendezvous`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

from scheduler.errors import HandleExpired, SharedMemoryError
from scheduler.journal import ROOT_NBYTES, Journal, Record, State
from scheduler.shared import Lease, Segment, is_alive

__all__ = ["Collection"]

T = TypeVar("T")

_live: weakref.WeakSet[Collection] = weakref.WeakSet()


class Collection:
    """What `journal` keeps under a root, for the threads of this process. Made by `found` and `of`."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.segment = lease.segment
        self._journal = Journal(self.segment.table, self.segment.data, lease.offset)
        self._mutex = threading.RLock()  # guards what the journal has replayed; a forked child gets another
        _live.add(self)

    @classmethod
    def found(cls, segment: Segment, meta: bytes) -> Collection:
        """Return a new, empty one. Raises SharedMemoryError when there is no room."""
        lease = segment.allocate(ROOT_NBYTES, meta=meta)
        made = cls(lease)
        segment._locked(lambda: made._journal.found(lease.number, lease.generation))
        lease.memo = weakref.ref(made)
        return made

    @classmethod
    def of(cls, lease: Lease) -> Collection:
        """Return the one whose root a lease is: one object in a process. Raises SharedMemoryError when it is no root."""
        known: Collection | None = lease.memo() if lease.memo is not None else None
        if known is not None:
            return known
        made = cls(lease)
        if lease.nbytes != ROOT_NBYTES or not made._journal.is_good:
            raise SharedMemoryError(
                f"opening object {lease.number}.{lease.generation} as a shared store or list: it is none of this version of shmarray. "
                f"Processes that share one run the same version."
            )
        lease.memo = weakref.ref(made)  # weak, as it holds the lease
        return made

    @property
    def tail(self) -> int:
        """A number that every change changes."""
        return self._journal.tail

    def read(self, look: Callable[[State], T]) -> T:
        """Return ``look(state)`` of what is there now; it must not keep ``state``."""
        with self._mutex:
            return look(self._journal.refresh())

    def record(self, find: Callable[[State], int]) -> Record:
        """Return the record at the position that ``find(state)`` gives, which may raise."""
        with self._mutex:
            while True:
                state = self._journal.refresh()
                found = self._journal.record(state, find(state))
                if found is not None:
                    return found

    def records(self, find: Callable[[State], Sequence[int]]) -> list[Record]:
        """Return the records at several positions, as they were at one time."""
        with self._mutex:
            while True:
                state = self._journal.refresh()
                found = [self._journal.record(state, position) for position in find(state)]
                whole = [record for record in found if record is not None]
                if len(whole) == len(found):
                    return whole

    def change(self, decide: Callable[[State], tuple[Sequence[Record], T]]) -> T:
        """`Journal.change`, under the lock of the table: ``decide`` is quick, and calls nothing of a segment but `taken` and `there`."""
        with self._mutex:
            self._journal.refresh()  # the most of it before others have to wait
            return self.segment._locked(lambda: self._journal.change(decide))

    def taken(self, state: State, position: int) -> tuple[Record, list[Lease]]:
        """Return a record, and leases of its objects, within ``decide``: for what is about to be taken out."""
        found = self.there(state, position)
        return found, [self.segment.take_inside(*obj) for obj in found.objects]

    def there(self, state: State, position: int) -> Record:
        """Return a record, within ``decide``: for what stays in, elsewhere."""
        found = self._journal.record(state, position)
        assert found is not None, "under the lock nobody else makes a new block"
        return found

    def leases(self, record: Record) -> list[Lease] | None:
        """Return leases of the objects of a record; None when it was taken out meanwhile, and they were freed."""
        try:
            return [self.segment.take(*obj) for obj in record.objects]
        except HandleExpired:
            return None

    def users(self) -> list[int]:
        """Return the processes that hold the root, dead ones that nobody has missed yet among them."""
        table = self.segment.table
        return sorted({table.identity(row) for row in table.rows() if table.held[row, self.lease.number]})

    def is_used_by_others(self) -> bool:
        """Return whether another process that lives holds the root, or a child that is being forked, or a handle or collection does."""
        table, number = self.segment.table, self.lease.number
        if any(obj == number for _, obj, _, _ in table.pending()):
            return True
        mine, processes = (self.segment.row, self._journal.row), table.rows()
        others = [row for row in table.holders(number) if row not in mine]
        return any(row not in processes or is_alive(table.identity(row)) for row in others)

    def check(self) -> None:
        """Assert what `Journal.check` does."""
        with self._mutex:
            self.segment._locked(self._journal.check)


def _start_anew_in_child() -> None:
    for made in list(_live):
        made._mutex = threading.RLock()  # its holder may not be here; a replay that it had begun is begun again


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)
