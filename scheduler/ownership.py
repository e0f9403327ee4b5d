"""Who owns which bytes of a shared segment: words in a table that every process of a family maps, and the rules for changing them.

Promises: at whatever store a process is killed, the others find a table from which no live object is lost, none overlaps
another, and what nobody holds is found by `sweep`. So there are no counters (a killed process would not count down), every word has
one writer at a time, and the word that makes a change known is stored last. Relies on: stores of 8 aligned bytes are whole, and
the caller holds the allocator lock of the segment wherever a method says so.
Never put here: memfds, /proc, locks, clocks, processes (`shared`): they come in as values and functions.

    header        magic, uuid, inodes, epoch, high waters          made by the founder; epoch and high waters: the lock holder
    participants  state | identity | descriptors | waits           itself, or its reaper under the lock; of a collection (STORE),
                  whose identity names its root object: the lock holder
    objects       generation << 8 | state, offset, nbytes, used    the lock holder
    tokens        nonce << 1 | pending, object, generation,        the lock holder
                  sender, found dead at
    held[p][o]    one byte: participant p holds object o           p (sets it under the lock, clears it without); p's reaper;
                  of a collection the lock holder

What a collection holds counts as long as its root is held by a process, by a handle on its way, or by another collection that counts.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from scheduler.errors import HandleExpired, SharedMemoryError
from scheduler.extents import _Ranges
from scheduler.limits import format_bytes

__all__ = ["TABLE_NBYTES", "Table"]

ROWS = 1024  # processes at once
OBJECTS = 1 << 15
TOKENS = 1 << 14  # handles on their way
MAGIC = 0x73686D617272_0001  # with the version of this layout

FREE, LIVE = 0, 1  # of objects; a participant is FREE, EMBRYO, LIVE or STORE
EMBRYO, STORE = 2, 3
PAGE_NBYTES = mmap.PAGESIZE
FEW = 256
NUMBER_BITS = 15  # of an object, in the identity of a collection
STEPS_PER_DOUBLING = 16  # size classes, so that freed ranges fit later objects

# Words of the header.
UUID, FOUNDED, NBYTES, EPOCH, ROWS_USED, OBJECTS_USED, TOKENS_USED, INODES = 1, 2, 3, 4, 5, 6, 7, 8
HEADER = 64
_STATE = HEADER
_IDENTITY = _STATE + ROWS
_WHERE = _IDENTITY + ROWS
_WAITS = _WHERE + ROWS
_OBJECT = _WAITS + ROWS
_OFFSET = _OBJECT + OBJECTS
_LENGTH = _OFFSET + OBJECTS
_USED = _LENGTH + OBJECTS
_TOKEN = _USED + OBJECTS
_TOKEN_OBJECT = _TOKEN + TOKENS
_TOKEN_GENERATION = _TOKEN_OBJECT + TOKENS
_TOKEN_SENDER = _TOKEN_GENERATION + TOKENS
_TOKEN_DEAD = _TOKEN_SENDER + TOKENS
WORDS = _TOKEN_DEAD + TOKENS
TABLE_NBYTES = -(-(WORDS * 8 + ROWS * OBJECTS) // PAGE_NBYTES) * PAGE_NBYTES  # sparse: what is not used costs nothing

U64 = np.dtype(np.uint64)


class Table:
    """The table over any writable buffer of TABLE_NBYTES zeros, or one that another `Table` has used."""

    def __init__(self, buffer: Any) -> None:
        self.words: Any = memoryview(buffer)[: WORDS * 8].cast("Q")  # single words: memoryviews are faster than arrays
        self._array = np.frombuffer(buffer, U64, WORDS)
        self.held = np.frombuffer(buffer, np.uint8, ROWS * OBJECTS, WORDS * 8).reshape(ROWS, OBJECTS)
        self._held_bytes = memoryview(buffer)[WORDS * 8 :].cast("B")
        self._gaps = _Ranges()
        self._epoch = -1  # of the gaps; another process may have changed the objects since
        self._spare = -1  # an object that nobody holds, between a `sweep` that left it and the `allocate` that takes it

    # --- stores: all of them, so that a test can die at each --------------------------------------------------------------------

    def _set(self, word: int, value: int) -> None:
        self.words[word] = value

    def _hold(self, row: int, obj: int, value: int) -> None:
        self._held_bytes[row * OBJECTS + obj] = value

    def _wipe(self, held: np.ndarray[Any, Any]) -> None:
        held[...] = 0

    # --- reading ----------------------------------------------------------------------------------------------------------------

    def found(self, uuid: int, nbytes: int, inodes: tuple[int, ...]) -> None:
        """Begin: the founder, before anybody else has the table."""
        for at, inode in enumerate(inodes):
            self._set(INODES + at, inode)
        self._set(UUID, uuid)
        self._set(NBYTES, nbytes)
        self._set(EPOCH, 1)
        self._set(0, MAGIC)

    def identity(self, row: int) -> int:
        return int(self.words[_IDENTITY + row])

    def where(self, row: int) -> int:
        return int(self.words[_WHERE + row])

    def rows(self) -> list[int]:
        """Return the participants that are LIVE: processes, as far as anybody knows."""
        used = int(self.words[ROWS_USED])
        return [int(row) for row in np.flatnonzero(self._array[_STATE : _STATE + used] == LIVE)]

    def is_live(self, obj: int, generation: int) -> bool:
        """Return whether the object is there, and is the one of that generation."""
        return bool(0 <= obj < OBJECTS and self.words[_OBJECT + obj] == generation << 8 | LIVE)

    def extent(self, obj: int) -> tuple[int, int, int]:
        """Return where a live object lies: offset, bytes taken, bytes asked for."""
        return int(self.words[_OFFSET + obj]), int(self.words[_LENGTH + obj]), int(self.words[_USED + obj])

    def live(self) -> list[int]:
        """Return the objects that are live."""
        used = int(self.words[OBJECTS_USED])
        return [int(obj) for obj in np.flatnonzero(self._array[_OBJECT : _OBJECT + used] & 255)]

    def holders(self, obj: int) -> list[int]:
        """Return the participants that hold an object."""
        used = int(self.words[ROWS_USED])
        states = self._array[_STATE : _STATE + used]
        return [int(row) for row in np.flatnonzero((self.held[:used, obj] != 0) & (states != FREE))]

    def collections(self) -> list[tuple[int, int]]:
        """Return the collections: (row, root object)."""
        used = int(self.words[ROWS_USED])
        found = np.flatnonzero(self._array[_STATE : _STATE + used] == STORE).tolist()
        return [(row, self._root(row)[0]) for row in found]

    def held_by(self, row: int) -> list[int]:
        """Return the objects that a participant holds."""
        return [int(obj) for obj in np.flatnonzero(self.held[row, : self.words[OBJECTS_USED]])]

    def pending(self) -> list[tuple[int, int, int, int]]:
        """Return the handles on their way: (token, object, generation, identity of the sender)."""
        words, used = self.words, int(self.words[TOKENS_USED])
        if used <= FEW:
            found = [token for token, word in enumerate(words[_TOKEN : _TOKEN + used].tolist()) if word & 1]
        else:
            found = np.flatnonzero(self._array[_TOKEN : _TOKEN + used] & 1).tolist()
        return [(t, words[_TOKEN_OBJECT + t], words[_TOKEN_GENERATION + t], words[_TOKEN_SENDER + t]) for t in found]

    def anybody_waits(self) -> bool:
        """Return whether a participant says that it waits for a lock of cells. A hint."""
        return any(self.words[_WAITS : _WAITS + self.words[ROWS_USED]])

    def say_waits(self, row: int, waits: bool) -> None:
        """Set the hint of one's own row; without the lock."""
        self.words[_WAITS + row] = waits

    # --- participants; the caller holds the lock ----------------------------------------------------------------------------------

    def register(self, identity: int, where: int) -> int:
        """Return the row of a new participant, which holds nothing.

        A row of the same identity is what a program that has replaced itself (exec) has left: it is taken over.
        """
        used = int(self.words[ROWS_USED])
        for row in range(used):
            if self.words[_STATE + row] == LIVE and self.words[_IDENTITY + row] == identity:
                self._bury(row)
        row = self._free_row()
        self._wipe(self.held[row])
        self._set(_WHERE + row, where)
        self._set(_WAITS + row, 0)
        self._set(_IDENTITY + row, identity)
        self._set(_STATE + row, LIVE)
        return row

    def conceive(self, parent: int, lock_embryo: Callable[[int], None]) -> int:
        """Return the row of a child about to be forked, which holds what ``parent`` does.

        It counts as long as the child, or its parent, holds what ``lock_embryo(row)`` takes. A row of which that raises
        BlockingIOError is passed over: its last embryo has been born and has died, and its parent has not returned from the fork.
        """
        for row in self._free_rows():
            try:
                lock_embryo(row)  # before the state: a reaper that sees an embryo asks for the lock
                break
            except BlockingIOError:
                pass
        self._wipe(self.held[row])
        used = int(self.words[OBJECTS_USED])
        self.held[row, :used] = self.held[parent, :used]
        self._set(_WHERE + row, self.where(parent))  # a child has the descriptors of its parent
        self._set(_WAITS + row, 0)
        self._set(_STATE + row, EMBRYO)
        return row

    def adopt(self, row: int, identity: int) -> None:
        """Make the row of an embryo the caller's, who is the child."""
        assert self.words[_STATE + row] == EMBRYO, (row, self.words[_STATE + row])
        self._set(_IDENTITY + row, identity)
        self._set(_STATE + row, LIVE)

    def reserve(self) -> int:
        """Return a row for a new collection. What it is made to hold counts from `enlist` on; until then the lock must not be left."""
        row = self._free_row()
        self._wipe(self.held[row])
        self._set(_WAITS + row, 0)
        return row

    def enlist(self, row: int, obj: int, generation: int) -> None:
        """Make a reserved row that of the collection with the root ``obj``, which it does not hold itself."""
        self._set(_IDENTITY + row, generation << NUMBER_BITS | obj)
        self._set(_STATE + row, STORE)

    def hold(self, row: int, obj: int, generation: int) -> bool:
        """Have ``row`` hold an object, and return True; False when it was freed."""
        if not self.is_live(obj, generation):
            return False
        self._hold(row, obj, 1)
        return True

    def _root(self, row: int) -> tuple[int, int]:
        """Return object and generation of the root of a collection."""
        identity = self.identity(row)
        return identity & ((1 << NUMBER_BITS) - 1), identity >> NUMBER_BITS

    def abandon(self, row: int) -> None:
        """Give up a row: of an embryo that was not born, or one's own."""
        self._bury(row)

    def reap(self, is_alive: Callable[[int], bool], is_embryo: Callable[[int], bool]) -> int:
        """Free the rows of participants that are gone, and return how many: ``is_alive(identity)``, ``is_embryo(row)``."""
        used, count = int(self.words[ROWS_USED]), 0
        for row in np.flatnonzero(self._array[_STATE : _STATE + used]).tolist():
            if self.words[_STATE + row] == STORE:
                continue  # of which `sweep` takes care
            alive = is_embryo(row) if self.words[_STATE + row] == EMBRYO else is_alive(self.identity(row))
            if not alive:
                self._bury(row)
                count += 1
        return count

    def _bury(self, row: int) -> None:
        self._set(_WAITS + row, 0)
        self._set(_STATE + row, FREE)  # what it holds counts no more; it is wiped before the row is used again

    def _free_row(self) -> int:
        return next(self._free_rows())

    def _free_rows(self) -> Iterator[int]:
        """Yield the rows that are free. Raises SharedMemoryError after the last."""
        used = int(self.words[ROWS_USED])
        for row in range(used):
            if self.words[_STATE + row] == FREE:
                yield row
        for row in range(used, ROWS):
            self._set(ROWS_USED, row + 1)
            yield row
        raise SharedMemoryError(
            f"joining a family of processes that share arrays, or making a store or list in it: {ROWS} of these are in it, and no more "
            f"can be. End some, or drop some."
        )

    # --- objects; the caller holds the lock, but for `drop` ---------------------------------------------------------------------------

    def allocate(self, row: int, nbytes: int, used: int) -> tuple[int, int, int]:
        """Return (object, generation, offset) of ``nbytes`` bytes, held by ``row``; ``used`` is kept with it.

        What was there before is still there: the caller clears it. Raises SharedMemoryError when there is no room.
        """
        length = size_class(nbytes)
        spare, self._spare = self._spare, -1
        if spare >= 0 and self.words[_LENGTH + spare] == length:
            # It stays where it lies, so the holes are what they were: half the work. Killed anywhere in here, it is still its old self,
            # that nobody holds but who has died.
            generation = (int(self.words[_OBJECT + spare]) >> 8) + 1
            self._own(row, spare, generation, used)
            return spare, generation, int(self.words[_OFFSET + spare])
        self._look()
        at = bisect_left(self._gaps.sizes, (length, 0))  # the smallest that holds it, and of those the lowest
        if at == len(self._gaps.sizes):
            largest = self._gaps.sizes[-1][0] if self._gaps.sizes else 0
            raise SharedMemoryError(
                f"a shared array of {format_bytes(nbytes)}: {format_bytes(self._gaps.nbytes)} of {format_bytes(self.words[NBYTES])} are "
                f"free, the largest hole has {format_bytes(largest)}. Drop arrays that are no longer needed, in all processes."
            )
        offset = self._gaps.sizes[at][1]
        obj = self._free_object()
        generation = (int(self.words[_OBJECT + obj]) >> 8) + 1
        self._change()
        self._set(_OFFSET + obj, offset)
        self._set(_LENGTH + obj, length)
        self._own(row, obj, generation, used)
        self._gaps.remove(offset, offset + length)
        self._changed()
        return obj, generation, offset

    def _own(self, row: int, obj: int, generation: int, used: int) -> None:
        self._set(_USED + obj, used)
        self._wipe(self.held[: self.words[ROWS_USED], obj])
        self._hold(row, obj, 1)
        self._set(_OBJECT + obj, generation << 8 | LIVE)  # last: until here it is not there

    def issue(self, obj: int, generation: int, sender: int) -> tuple[int, int]:
        """Return (token, nonce) of a new handle of an object that the caller holds: it keeps the object until it is received."""
        token = self._free_token()
        nonce = (int(self.words[_TOKEN + token]) >> 1) + 1
        self._set(_TOKEN_OBJECT + token, obj)
        self._set(_TOKEN_GENERATION + token, generation)
        self._set(_TOKEN_SENDER + token, sender)
        self._set(_TOKEN_DEAD + token, 0)
        self._set(_TOKEN + token, nonce << 1 | 1)
        return token, nonce

    def receive(self, row: int, obj: int, generation: int, token: int, nonce: int) -> None:
        """Hold an object that a handle names. Raises HandleExpired when it was freed."""
        if not self.is_live(obj, generation):
            raise HandleExpired(
                f"receiving shared array {obj}.{generation}: it was freed. Nobody holds it any more, and its handle was received "
                f"before, or whoever sent it ended a while ago. Keep the array where it was made until the other side has it."
            )
        self._hold(row, obj, 1)  # before the token: killed between, the token still counts
        if self.words[_TOKEN + token] == nonce << 1 | 1:
            self._set(_TOKEN + token, nonce << 1)

    def forget_spare(self) -> None:
        """Forget what an earlier `sweep` left, as after it the lock was let go of: Ctrl-C can strike before `allocate` takes it."""
        self._spare = -1

    def drop(self, row: int, obj: int) -> None:
        """Let go of an object. Without the lock."""
        self._hold(row, obj, 0)

    def sweep(self, now_ns: int, handle_ttl_ns: int, is_alive: Callable[[int], bool], wanted: int = 0) -> int:
        """Free what nobody holds and no handle on its way names; return how many bytes.

        A handle whose sender is dead counts for ``handle_ttl_ns`` from when that was first seen. Of ``wanted`` bytes, which the caller
        is about to allocate under the same lock, one object is left that has just the length.
        """
        self._spare = -1
        pending = self.pending()
        senders: dict[int, bool] = {}
        kept = []
        for token, obj, generation, sender in pending:
            alive = senders.get(sender)
            if alive is None:
                alive = senders[sender] = is_alive(sender)
            if not alive:
                since = int(self.words[_TOKEN_DEAD + token])
                if since == 0:
                    self._set(_TOKEN_DEAD + token, now_ns)
                elif now_ns - since > handle_ttl_ns:
                    self._set(_TOKEN + token, int(self.words[_TOKEN + token]) & ~1)
                    continue
            if self.is_live(obj, generation):
                kept.append(obj)
        unheld = self._unheld(kept)
        if pending or self.words[TOKENS_USED]:
            self._lower(TOKENS_USED, _TOKEN, 1)
        if wanted:
            length = size_class(wanted)
            self._spare = next((obj for obj in unheld if self.words[_LENGTH + obj] == length), -1)
            unheld = [obj for obj in unheld if obj != self._spare]
        if not unheld:
            return 0
        self._look()
        self._change()
        freed = 0
        for obj in unheld:
            offset, length, _ = self.extent(obj)
            self._set(_OBJECT + obj, int(self.words[_OBJECT + obj]) & ~255)
            self._gaps.add(offset, offset + length)
            freed += length
        self._lower(OBJECTS_USED, _OBJECT, 255)
        self._changed()
        return freed

    def _unheld(self, kept: list[int]) -> list[int]:
        """Return the live objects that nobody holds, but for ``kept``. Buries the collections of which that is true."""
        used = int(self.words[OBJECTS_USED])
        states = self.words[_STATE : _STATE + self.words[ROWS_USED]].tolist()
        roots = 0  # one byte an object: integers of Python are faster here than arrays, which cost a microsecond a call
        for row, state in enumerate(states):
            if state in (LIVE, EMBRYO):
                roots |= self._holds(row, used)
        for obj in kept:
            roots |= 1 << 8 * obj
        collections = [row for row, state in enumerate(states) if state == STORE]
        if collections:
            roots, unreached = self._trace(roots, collections, used)
            for row in unreached:
                self._bury(row)  # before its root is freed, whose number may come again
        flags = roots.to_bytes(used, "little")
        if used <= FEW:
            words = self.words[_OBJECT : _OBJECT + used].tolist()
            return [obj for obj, word in enumerate(words) if word & 255 and not flags[obj]]
        live = self._array[_OBJECT : _OBJECT + used] & 255
        return [int(obj) for obj in ((live != FREE) & (np.frombuffer(flags, np.uint8) == 0)).nonzero()[0]]

    def _holds(self, row: int, used: int) -> int:
        """Return the first ``used`` bytes of what a participant holds, as one number."""
        return int.from_bytes(self._held_bytes[row * OBJECTS : row * OBJECTS + used], "little")

    def _trace(self, roots: int, collections: list[int], used: int) -> tuple[int, list[int]]:
        """Return ``roots`` with what collections hold that it reaches, and the collections that it does not reach."""
        while True:
            found: list[int] = []
            unreached: list[int] = []
            for row in collections:
                obj, generation = self._root(row)
                (found if roots >> 8 * obj & 255 and self.is_live(obj, generation) else unreached).append(row)
            if not found:
                return roots, unreached
            for row in found:
                roots |= self._holds(row, used)
            collections = unreached

    def _lower(self, high_water: int, first: int, mask: int) -> None:
        """Let a high water sink to what is in use: what is looked at each time stays as little as that."""
        used = before = int(self.words[high_water])
        while used and not self.words[first + used - 1] & mask:
            used -= 1
        if used != before:
            self._set(high_water, used)

    def gaps(self) -> list[tuple[int, int]]:
        """Return the holes, [start, stop), in order of address."""
        self._look()
        return list(zip(self._gaps.starts, self._gaps.stops, strict=True))

    def _look(self) -> None:
        """Compute the holes when somebody else, or this process before it was interrupted, has changed the objects."""
        if self._epoch == self.words[EPOCH]:
            return
        self._gaps = _Ranges()
        at = 0
        for start, stop in [*self._extents(), (int(self.words[NBYTES]), 0)]:
            if at < start:
                self._gaps.add(at, start)
            at = stop
        self._epoch = int(self.words[EPOCH])

    def _extents(self) -> list[tuple[int, int]]:
        used = int(self.words[OBJECTS_USED])
        live = np.flatnonzero(self._array[_OBJECT : _OBJECT + used] & 255)
        offsets = self._array[_OFFSET : _OFFSET + used][live]
        lengths = self._array[_LENGTH : _LENGTH + used][live]
        order = np.argsort(offsets)
        return [(int(a), int(a) + int(n)) for a, n in zip(offsets[order], lengths[order], strict=True)]

    def _change(self) -> None:
        # Before the change: killed in the middle of it, everybody computes anew. Unknown here until it is done, for the same reason.
        self._epoch = -1
        self._set(EPOCH, int(self.words[EPOCH]) + 1)

    def _changed(self) -> None:
        self._epoch = int(self.words[EPOCH])

    def _free_object(self) -> int:
        used = int(self.words[OBJECTS_USED])
        if used <= FEW:
            free = [obj for obj, word in enumerate(self.words[_OBJECT : _OBJECT + used].tolist()) if not word & 255]
        else:
            free = np.flatnonzero((self._array[_OBJECT : _OBJECT + used] & 255) == FREE).tolist()
        if free:
            return int(free[0])
        if used == OBJECTS:
            raise SharedMemoryError(f"a shared array beside {OBJECTS} others: there is no room for more in the table. Drop some.")
        self._set(OBJECTS_USED, used + 1)
        return used

    def _free_token(self) -> int:
        used = int(self.words[TOKENS_USED])
        if used <= FEW:
            free = [token for token, word in enumerate(self.words[_TOKEN : _TOKEN + used].tolist()) if not word & 1]
        else:
            free = np.flatnonzero((self._array[_TOKEN : _TOKEN + used] & 1) == 0).tolist()
        if free:
            return int(free[0])
        if used == TOKENS:
            raise SharedMemoryError(
                f"pickling a shared array: {TOKENS} handles were pickled that nobody has unpickled yet, and each keeps its array. Let the "
                f"other side receive, or end the processes that pickled and dropped them."
            )
        self._set(TOKENS_USED, used + 1)
        return used

    def check(self) -> None:
        """Assert that objects lie within the segment and do not overlap, and that what is known of the holes is right. With the lock."""
        extents = self._extents()
        end = 0
        for start, stop in extents:
            assert start >= end, f"[{start}, {stop}) overlaps what ends at {end}"
            assert stop > start
            end = stop
        assert end <= self.words[NBYTES]
        used = int(self.words[OBJECTS_USED])
        assert not (self._array[_OBJECT + used : _OBJECT + OBJECTS] & 255).any(), "an object above the high water"
        if self._epoch == self.words[EPOCH]:
            self._gaps.check()
            assert self._gaps.nbytes == self.words[NBYTES] - sum(stop - start for start, stop in extents)


def size_class(nbytes: int) -> int:
    """Return ``nbytes`` in whole pages, 16 classes to a doubling."""
    step = max(PAGE_NBYTES, (1 << max(nbytes - 1, 1).bit_length() - 1) // STEPS_PER_DOUBLING)
    return max(-(-nbytes // step) * step, PAGE_NBYTES)
