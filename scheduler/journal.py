"""A journal in a shared segment: records that any process appends and every process replays to the same names and items.

Promises: a change is whole or absent at whatever store its process is killed, for ONE word publishes it, and the one after it; what is
published and still in use is held by the collection's row of the table, and what is not is let go, at the latest by the next
change. Reading takes no lock. Relies on `ownership`, and on the caller, who holds the allocator lock for every change.
Never put here: locks, processes, clocks (`collection`), what payloads mean.

    root    magic, row, tail = serial << 32 | bytes / 8, dirty, and where block `serial` lies: slot serial & 1
    block   record record ... | room for more
    record  bytes, op, kind, key length, objects, argument | (object, generation) ... | key | payload | padding to 8

A full block is replaced by another one, with the next serial, of the records that still count. So looking again tells a reader whether what
it copied was the block: the slot of a serial is written again two serials later.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from scheduler.errors import SharedMemoryError
from scheduler.ownership import Table

__all__ = ["ROOT_NBYTES", "Journal", "Record", "State"]

T = TypeVar("T")

MAGIC = 0x73686D6A726E_0001  # with the version of this layout
ROOT_NBYTES = 128
SMALLEST_BLOCK_NBYTES = 1 << 14
LARGEST_BLOCK_NBYTES = 1 << 34
LARGEST_KEY_NBYTES = 1 << 12

# Words of the root. All are written by the holder of the lock.
_MAGIC, _ROW, _TAIL, _DIRTY, _SLOTS = 0, 1, 2, 3, 4
SLOT_WORDS = 4  # object, generation, offset, capacity

SET, DELETE, CLEAR, NUMBER, APPEND, SET_AT, INSERT, DELETE_AT = range(8)
HEAD = struct.Struct("<IBBHII")
OBJECT = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Record:
    """A change of a name (SET, DELETE), of an item (APPEND, SET_AT, INSERT, DELETE_AT), of all (CLEAR); NUMBER gives a name a number.

    ``kind`` and ``payload`` are the caller's; ``objects`` are held as long as the record counts.
    """

    op: int
    key: str = ""
    argument: int = 0  # the place of an item; the number of a name
    kind: int = 0
    objects: tuple[tuple[int, int], ...] = ()
    payload: bytes = b""

    def pack(self) -> bytes:
        """Return its bytes, a multiple of 8 of them. Raises ValueError for a name that is too long."""
        key = self.key.encode()
        if len(key) > LARGEST_KEY_NBYTES:
            raise ValueError(f"a name of {len(key)} bytes, {self.key[:40]!r}...: names take up to {LARGEST_KEY_NBYTES} bytes")
        body = b"".join(OBJECT.pack(*obj) for obj in self.objects) + key + self.payload
        nbytes = HEAD.size + len(body)
        packed = HEAD.pack(nbytes, self.op, self.kind, len(key), len(self.objects), self.argument) + body
        return packed + bytes(-nbytes % 8)


def unpack(data: Any, at: int = 0) -> Record:
    """Return the record that begins at ``at``."""
    nbytes, op, kind, key_nbytes, count, argument = HEAD.unpack_from(data, at)
    first = at + HEAD.size
    key = first + count * OBJECT.size
    payload = key + key_nbytes
    objects = tuple(OBJECT.iter_unpack(data[first:key])) if count else ()
    return Record(op, bytes(data[key:payload]).decode(), argument, kind, objects, bytes(data[payload : at + nbytes]))


class State:
    """What a process has replayed: where in the block the record of each name and item is. ``tail`` is how far."""

    __slots__ = ("counts", "is_whole", "items", "lost", "names", "numbers", "objects", "position", "serial", "tail")

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.position = 0
        self.tail = -1
        self.names: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        self.items = array("Q")
        self.objects: dict[int, tuple[int, ...]] = {}  # of records that have any
        self.counts: dict[int, int] = {}  # of each object: how many records that count name it
        self.lost: set[int] = set()  # objects that were named and are not any more
        self.is_whole = True  # else a replay was interrupted

    def replay(self, chunk: bytes) -> None:
        """Replay the records that follow."""
        self.is_whole = False
        at, base = 0, self.position
        while at < len(chunk):
            nbytes, op, _, key_nbytes, count, argument = HEAD.unpack_from(chunk, at)
            position = base + at
            if count:
                numbers = tuple(number for number, _ in OBJECT.iter_unpack(chunk[at + HEAD.size : at + HEAD.size + count * OBJECT.size]))
                self.objects[position] = numbers
                for number in numbers:
                    self.counts[number] = self.counts.get(number, 0) + 1
            if op == APPEND:
                self.items.append(position)
            elif op in (SET, DELETE, NUMBER):
                first = at + HEAD.size + count * OBJECT.size
                self._name(op, chunk[first : first + key_nbytes].decode(), position, argument)
            else:
                self._item(op, argument, position)
            at += nbytes + -nbytes % 8
        self.position = base + at
        self.is_whole = True

    def _name(self, op: int, key: str, position: int, argument: int) -> None:
        if op == NUMBER:
            self.numbers[key] = argument
            return
        before = self.names.pop(key, None) if op == DELETE else self.names.get(key)
        if op == SET:
            self.names[key] = position
        self._forget(before)

    def _item(self, op: int, argument: int, position: int) -> None:
        if op == INSERT:
            self.items.insert(argument, position)
        elif op == SET_AT:
            before, self.items[argument] = self.items[argument], position
            self._forget(before)
        elif op == DELETE_AT:
            self._forget(self.items.pop(argument))
        else:  # CLEAR; numbers stay, as somebody may hold the lock that one stands for
            self.names.clear()
            self.items = array("Q")
            self.lost |= self.counts.keys()
            self.objects.clear()
            self.counts.clear()

    def _forget(self, position: int | None) -> None:
        for number in self.objects.pop(position, ()) if position is not None else ():
            left = self.counts[number] - 1
            if left:
                self.counts[number] = left
            else:
                del self.counts[number]
                self.lost.add(number)


class Slot(NamedTuple):
    """Where a block lies."""

    obj: int
    generation: int
    offset: int
    capacity: int


class Journal:
    """The journal whose root lies at ``offset`` of the bytes of a segment. One thread of a process at a time."""

    def __init__(self, table: Table, data: memoryview, offset: int) -> None:
        self.table = table
        self.data = data
        self._root: Any = data[offset : offset + ROOT_NBYTES].cast("Q")
        self._state = State(-1)

    # --- stores: all of them, so that a test can die at each --------------------------------------------------------------------

    def _set(self, word: int, value: int) -> None:
        self._root[word] = value

    def _write(self, offset: int, values: bytes) -> None:
        self.data[offset : offset + len(values)] = values

    # --- reading, without the lock ----------------------------------------------------------------------------------------------

    @property
    def is_good(self) -> bool:
        """Whether this is the root of a journal of this layout."""
        return bool(self._root[_MAGIC] == MAGIC)

    @property
    def tail(self) -> int:
        """A number that every change changes."""
        return int(self._root[_TAIL])

    @property
    def row(self) -> int:
        """Its row of the table."""
        return int(self._root[_ROW])

    def refresh(self) -> State:
        """Return what is there now."""
        while True:
            state, tail = self._state, self.tail
            if state.tail == tail and state.is_whole:
                return state
            serial, stop = tail >> 32, (tail & 0xFFFFFFFF) * 8
            if state.serial != serial or not state.is_whole:
                state = State(serial)
            offset = self._slot(serial).offset
            chunk = bytes(self.data[offset + state.position : offset + stop])
            if self.tail >> 32 != serial:
                continue  # what was copied may be anything
            state.replay(chunk)
            state.tail = tail
            self._state = state
            return state

    def record(self, state: State, position: int) -> Record | None:
        """Return the record at a position that ``state`` names; None when there is another block since."""
        at = self._slot(state.serial).offset + position
        head = bytes(self.data[at : at + HEAD.size])
        if self.tail >> 32 != state.serial:
            return None
        copied = bytes(self.data[at : at + HEAD.unpack(head)[0]])
        return unpack(copied) if self.tail >> 32 == state.serial else None

    def _slot(self, serial: int) -> Slot:
        first = _SLOTS + (serial & 1) * SLOT_WORDS
        return Slot(*self._root[first : first + SLOT_WORDS].tolist())

    # --- changing; the caller holds the lock --------------------------------------------------------------------------------------

    def found(self, obj: int, generation: int) -> None:
        """Begin: the founder, who holds the root object, before anybody else has it."""
        self._write_words(range(ROOT_NBYTES // 8), 0)
        row = self.table.reserve()
        self._place(0, self._allocate(row, SMALLEST_BLOCK_NBYTES))
        self._set(_ROW, row)
        self._set(_MAGIC, MAGIC)
        self.table.enlist(row, obj, generation)

    def _write_words(self, words: range, value: int) -> None:
        for word in words:
            self._set(word, value)

    def change(self, decide: Callable[[State], tuple[Sequence[Record], T]]) -> T:
        """Publish the records that ``decide(state)`` gives, all of them at once, and return the other thing that it gives.

        Who decides holds the objects that the records name. Raises SharedMemoryError when there is no room; nothing is changed then.
        """
        state = self.refresh()
        if self._root[_DIRTY]:
            self._repair(state)
        records, result = decide(state)
        if records:
            self._commit(state, records)
        return result

    def _commit(self, state: State, records: Sequence[Record]) -> None:
        row, serial = int(self._root[_ROW]), state.serial
        slot, values = self._slot(serial), b"".join(record.pack() for record in records)
        position = state.position
        state.lost.clear()
        self._set(_DIRTY, 1)  # from here on the row may hold more than counts
        left_block = None
        if position + len(values) > slot.capacity:
            live = b"".join(self._live(state))
            left_block, lost = slot.obj, set(state.counts)
            capacity = max(SMALLEST_BLOCK_NBYTES, 2 * (len(live) + len(values)))
            slot = self._allocate(row, capacity)
            serial = serial + 1 & 0xFFFFFFFF
            self._place(serial, slot)
            self._write(slot.offset, live)
            position = len(live)
        else:
            lost = state.lost
        for record in records:
            for obj, generation in record.objects:
                held = self.table.hold(row, obj, generation)
                assert held, f"object {obj}.{generation}, which is to be kept, was freed"
        self._write(slot.offset + position, values)
        self._set(_TAIL, serial << 32 | (position + len(values)) // 8)  # until here nothing has changed
        state = self.refresh()
        for obj in list((lost | state.lost) - state.counts.keys()):
            self.table.drop(row, obj)
        if left_block is not None:
            self.table.drop(row, left_block)
        self._set(_DIRTY, 0)

    def _repair(self, state: State) -> None:
        """Let go of what a process that died in the middle of a change has left: what counts is what is published."""
        row = int(self._root[_ROW])
        wanted = {self._slot(state.serial).obj, *state.counts}
        for obj in self.table.held_by(row):
            if obj not in wanted:
                self.table.drop(row, obj)
        self._set(_DIRTY, 0)

    def _live(self, state: State) -> Iterator[bytes]:
        """Yield the records that make, of nothing, what is there."""
        for key, number in state.numbers.items():
            yield Record(NUMBER, key, number).pack()
        offset = self._slot(state.serial).offset
        for position in state.names.values():
            yield self._raw(offset + position)
        for position in state.items:
            raw = self._raw(offset + position)
            nbytes, op, kind, key_nbytes, count, _ = HEAD.unpack_from(raw)
            yield raw if op == APPEND else HEAD.pack(nbytes, APPEND, kind, key_nbytes, count, 0) + raw[HEAD.size :]

    def _raw(self, at: int) -> bytes:
        nbytes = HEAD.unpack_from(self.data, at)[0]
        return bytes(self.data[at : at + nbytes + -nbytes % 8])

    def _allocate(self, row: int, capacity: int) -> Slot:
        if capacity > LARGEST_BLOCK_NBYTES:
            raise SharedMemoryError(
                f"growing the journal of a shared store or list to {capacity >> 30} GiB: {LARGEST_BLOCK_NBYTES >> 30} GiB is the most. "
                f"Store fewer or smaller items; arrays and objects of more than a few KiB do not count."
            )
        obj, generation, offset = self.table.allocate(row, capacity, capacity)
        return Slot(obj, generation, offset, capacity)

    def _place(self, serial: int, slot: Slot) -> None:
        first = _SLOTS + (serial & 1) * SLOT_WORDS
        for word, value in enumerate(slot, first):
            self._set(word, value)

    def check(self) -> None:
        """Assert that the row holds what counts and, unless a change was cut short, nothing else. With the lock."""
        state = self.refresh()
        fresh = State(state.serial)
        slot = self._slot(state.serial)
        fresh.replay(bytes(self.data[slot.offset : slot.offset + state.position]))
        assert (fresh.names, fresh.items, fresh.numbers) == (state.names, state.items, state.numbers)
        assert fresh.counts == state.counts
        held = set(self.table.held_by(int(self._root[_ROW])))
        wanted = {slot.obj, *state.counts}
        assert held >= wanted, f"not held: {wanted - held}"
        assert held == wanted or self._root[_DIRTY], f"held for nothing: {held - wanted}"
        assert self.table.is_live(slot.obj, slot.generation)
        for position in (*state.names.values(), *state.items):
            found = self.record(state, position)
            assert found is not None and all(self.table.is_live(*obj) for obj in found.objects)
