"""The state of a simulation, published: copies of its cells, each under a seqlock, made where and when somebody asked for them.

    reader    wanted[cell] = 1 ...; asked = now ───▶ driver, between two plans: copies the cells that are wanted, all of one step
    reader    copies a cell, and again when its sequence says that it was written meanwhile

Promises: what is read are whole cells, each of one step; the driver takes no lock and waits for nobody, so that readers, stopped or
killed ones too, cannot hold it up; while nobody asks it looks at one word. A reader waits for a while and then takes what is there.
Relies on stores and loads of 8 aligned bytes being single, and seen in the order in which they were made: x86-64 promises that (and
``memcpy`` ends its non-temporal stores with a fence). On aarch64 `Seqlocks` would need store-release and load-acquire in `end` and
`read`, and a fence after the store in `begin` and before the last load in `read`.
Never put here: when batches end (`iterate`), names (`store`).

One allocation holds it all:

    header      8-byte words: magic, driver, asked, over, step, time, finished, where the directory is, and how long; when it looks next
    fields      values, C order | sequence of each cell (8 bytes) | step of each cell (8) | wanted, of each cell (1)
    directory   JSON, of each field: dtype, shape, chunks, sizes of cells, where its values are, where its words are
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.shared import START_BITS, Lease, Segment, identity_of, is_alive
from shmarray.chunks import Chunks
from shmarray.errors import TornChunkError
from shmarray.expr import Expr, Foreign, View, make
from shmarray.handle import in_memory, wrap
from shmarray.packing import FIRST_REGISTERED, register
from shmarray.region import IndexMap
from shmarray.shared_memory import SharedArray, _tuples, allocate, lease_of, over

__all__ = ["Published", "Publisher", "Seqlocks", "cell_sizes", "snapshots"]

NDArray = np.ndarray[Any, Any]
Box = tuple[slice, ...]

PUBLISHED = FIRST_REGISTERED + 8  # of the kinds in stores
MAGIC = 0x5EB1_15ED_0001
HEADER_NBYTES = 128
_MAGIC, _DRIVER, _ASKED, _OVER, _STEP, _TIME, _FINISHED, _DIRECTORY, _LENGTH, _DUE = range(10)
LINE_NBYTES = 64
CELL_NBYTES = 1 << 18  # a frame of a megabyte is a few cells; more, smaller ones would cost more to look at than to copy
FRESH_S = 0.2  # for which a reader waits to be served
CONSISTENT_S = 5.0  # for which it waits for cells of one step
TORN_S = 5.0  # for which it waits for a cell to be whole whose writer lives
LATELY_S = 1.0  # somebody who asked so long ago is taken to ask again
LOOK_FOR_DRIVER_S = 0.1
SHORTEST_POLL_S, LONGEST_POLL_S = 0.0001, 0.002


class Seqlocks:
    """The words of ``n`` cells in ``buffer``: of each its sequence, odd while it is written; the step it is of; whether it is wanted.

    Sequences and steps are written by the one writer alone; ``wanted`` is set by readers, and cleared by the writer before it copies.
    """

    def __init__(self, buffer: Any, n: int) -> None:
        data = memoryview(buffer).cast("B")
        self.sequences = data[: 8 * n].cast("q")
        self.steps = data[8 * n : 16 * n].cast("q")
        self.wanted = data[16 * n : 17 * n]

    @staticmethod
    def nbytes(n: int) -> int:
        """Return how many bytes the words of ``n`` cells take."""
        return 17 * n

    def begin(self, cell: int) -> None:
        """Say that a cell is neither old nor new from now on."""
        self.sequences[cell] |= 1

    def end(self, cell: int, step: int) -> None:
        """Say that it is whole, and of which step."""
        self.steps[cell] = step
        self.sequences[cell] += 1  # last: who sees it even sees what was written before

    def read(self, cell: int, copy: Callable[[], None]) -> int | None:
        """Return the step that a cell was of while ``copy()`` copied it; None when it was being written, and what was copied is no good."""
        sequence = self.sequences[cell]
        if sequence & 1:
            return None
        step = self.steps[cell]
        copy()
        return step if self.sequences[cell] == sequence else None


def cell_sizes(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the sizes of cells of about `CELL_NBYTES`: as wide along all axes, so that parts of any form touch few."""
    sizes = [max(1, n) for n in shape]
    while math.prod(sizes) * itemsize > CELL_NBYTES and max(sizes) > 1:
        axis = sizes.index(max(sizes))
        sizes[axis] = -(-sizes[axis] // 2)
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A field, in the directory; offsets in bytes from the start of the allocation."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Chunks
    cells: tuple[int, ...]
    values: int
    words: int

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(-(-n // size) for n, size in zip(self.shape, self.cells, strict=True))

    @property
    def n(self) -> int:
        return math.prod(self.counts)

    def box(self, cell: int) -> Box:
        """Return the box of a cell, by its number in C order."""
        index = np.unravel_index(cell, self.counts) if self.counts else ()
        return tuple(slice(int(i) * s, min((int(i) + 1) * s, n)) for i, s, n in zip(index, self.cells, self.shape, strict=True))

    def touched(self, box: Iterable[slice]) -> NDArray:
        """Return the numbers of the cells that a box, of steps 1, touches."""
        found = np.zeros(1, np.int64)
        for part, size, count in zip(box, self.cells, self.counts, strict=True):
            along = np.arange(part.start // size, -(-part.stop // size)) if part.stop > part.start else np.arange(0)
            found = (found[:, None] * count + along).ravel()
        return found

    def dump(self) -> list[Any]:
        return [np.lib.format.dtype_to_descr(self.dtype), self.shape, self.chunks, self.cells, self.values, self.words]

    @classmethod
    def parsed(cls, row: list[Any]) -> _Entry:
        descr, shape, chunks, cells, values, words = row
        dtype = np.lib.format.descr_to_dtype(_tuples(descr))
        return cls(dtype, tuple(shape), tuple(tuple(axis) for axis in chunks), tuple(cells), values, words)


class _Board:
    """An allocation that a state is published in, and the words of its header."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        data = lease.segment.data
        self.header = data[lease.offset : lease.offset + HEADER_NBYTES].cast("q")
        self.times = data[lease.offset : lease.offset + HEADER_NBYTES].cast("d")

    def directory(self) -> list[_Entry]:
        start = self.lease.offset + self.header[_DIRECTORY]
        return [_Entry.parsed(row) for row in json.loads(bytes(self.lease.segment.data[start : start + self.header[_LENGTH]]))]

    def locks(self, entry: _Entry) -> Seqlocks:
        start = self.lease.offset + entry.words
        return Seqlocks(self.lease.segment.data[start : start + Seqlocks.nbytes(entry.n)], entry.n)

    def values(self, entry: _Entry) -> SharedArray:
        return over(self.lease, entry.shape, entry.dtype, entry.values)

    def word(self, number: int, dtype: Any) -> SharedArray:
        """Return a word of the header as an array without axes."""
        return over(self.lease, (), np.dtype(dtype), 8 * number)

    @property
    def driver(self) -> int:
        """The pid of who publishes."""
        return int(self.header[_DRIVER]) >> START_BITS

    def is_over(self) -> bool:
        return bool(self.header[_OVER])

    def has_driver(self) -> bool:
        return is_alive(self.header[_DRIVER])


# --- writing ----------------------------------------------------------------------------------------------------------------------


class Publisher:
    """The driver's side: fields of ``forms`` (shape, dtype, chunks), in memory of ``segment``.

    ``fields`` are what a store holds of it, ``facts`` arrays without axes that go with the simulation: step, time, finished.
    """

    def __init__(self, segment: Segment, forms: Sequence[tuple[tuple[int, ...], np.dtype[Any], Chunks]], start: int) -> None:
        entries: list[_Entry] = []
        at = HEADER_NBYTES
        for shape, dtype, chunks in forms:
            cells = cell_sizes(shape, dtype.itemsize)
            words = _line_ceil(at + math.prod(shape) * dtype.itemsize)
            entries.append(_Entry(dtype, shape, chunks, cells, at, words))
            at = _line_ceil(words + Seqlocks.nbytes(entries[-1].n))
        text = json.dumps([entry.dump() for entry in entries], separators=(",", ":")).encode()
        nbytes = at + len(text)
        lease = lease_of(allocate((nbytes,), np.uint8, ((nbytes,),), segment))
        assert lease is not None
        data = lease.segment.data
        for entry in entries:
            begin = lease.offset + entry.words
            data[begin : begin + Seqlocks.nbytes(entry.n)] = bytes(Seqlocks.nbytes(entry.n))
        data[lease.offset : lease.offset + HEADER_NBYTES] = bytes(HEADER_NBYTES)
        data[lease.offset + at : lease.offset + nbytes] = text
        self.board = board = _Board(lease)
        board.header[_DRIVER] = identity_of(os.getpid())
        board.header[_DIRECTORY], board.header[_LENGTH] = at, len(text)
        board.header[_STEP] = start
        board.header[_MAGIC] = MAGIC
        self.began_s = time.perf_counter()
        self.entries = entries
        self.locks = [board.locks(entry) for entry in entries]
        self.values = [np.asarray(board.values(entry)) for entry in entries]
        self.seen = 0  # the last request that was looked at
        self.looked_ns, self.usual_ns = time.monotonic_ns(), 0  # when it last looked, and how long it usually is until the next time
        self.not_before_s = 0.0
        self.fields = [Published(board, entry) for entry in entries]
        self.facts = {"step": board.word(_STEP, np.int64), "time": board.word(_TIME, float), "finished": board.word(_FINISHED, bool)}

    def look(self, step: int, state: Callable[[], Sequence[NDArray]]) -> None:
        """Publish what is wanted of the state after ``step`` steps, if somebody asked: called between two plans.

        However often they ask, at most every other second goes into copying.
        """
        header = self.board.header
        header[_STEP] = step
        self.board.times[_TIME] = time.perf_counter() - self.began_s
        now_ns = time.monotonic_ns()
        took_ns = now_ns - self.looked_ns
        self.looked_ns, self.usual_ns = now_ns, min(took_ns, 5 * self.usual_ns // 4 or took_ns)  # one that took long says little
        header[_DUE] = now_ns + self.usual_ns
        asked = header[_ASKED]
        if asked == self.seen:
            return
        began = time.perf_counter()
        if began < self.not_before_s:
            return
        self.seen = asked  # before looking at what is wanted: who asks from now on is seen the next time
        for values, target, locks, entry in zip(state(), self.values, self.locks, self.entries, strict=True):
            for cell in np.flatnonzero(np.frombuffer(locks.wanted, np.uint8)).tolist():
                locks.wanted[cell] = 0
                _copy(locks, cell, step, values, target, entry.box(cell))
        ended = time.perf_counter()
        self.not_before_s = ended + (ended - began)

    def is_asked(self) -> bool:
        """Return whether somebody has asked within the last second, and so will again."""
        asked: int = self.board.header[_ASKED]
        return asked != 0 and time.monotonic_ns() - asked < LATELY_S * 1e9

    def publish(self, step: int, state: Sequence[NDArray]) -> None:
        """Publish all of the state."""
        for values, target, locks, entry in zip(state, self.values, self.locks, self.entries, strict=True):
            for cell in range(entry.n):
                _copy(locks, cell, step, values, target, entry.box(cell))
        self.board.header[_STEP] = step
        self.board.times[_TIME] = time.perf_counter() - self.began_s

    def end(self, *, is_finished: bool) -> None:
        """Say that nothing more will be published; readers do not wait from now on."""
        self.board.header[_FINISHED] = int(is_finished)
        self.board.header[_OVER] = 1


def _copy(locks: Seqlocks, cell: int, step: int, values: NDArray, target: NDArray, box: Box) -> None:
    locks.begin(cell)
    part: Any = (*box, ...)  # without the dots an array without axes would give a number
    np.copyto(target[part], values[part])
    locks.end(cell, step)


def _line_ceil(nbytes: int) -> int:
    return -(-nbytes // LINE_NBYTES) * LINE_NBYTES


# --- reading ----------------------------------------------------------------------------------------------------------------------


class Published:
    """A field of a running simulation: ``field[100:200]`` is a NumPy array of what is there now, in whole cells.

    Reading asks the simulation for what it needs, and waits for up to 0.2 s; from one that has ended, or is stopped, it takes what was
    published last. With ``is_consistent`` all cells are of one step. `lazy` is the same as an `Array`.

    Raises TornChunkError when the simulation was killed while it published a cell that is read, or is stopped there; with
    ``is_consistent`` TimeoutError when cells of one step could not be had.
    """

    __slots__ = ("_board", "_entry", "is_consistent")

    kind_told = "published"  # in lists of what a store holds

    def __init__(self, board: _Board, entry: _Entry, is_consistent: bool = False) -> None:
        self._board = board
        self._entry = entry
        self.is_consistent = is_consistent

    @property
    def shape(self) -> tuple[int, ...]:
        return self._entry.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._entry.dtype

    @property
    def ndim(self) -> int:
        return len(self._entry.shape)

    @property
    def chunks(self) -> Chunks:
        """The chunks of the simulation's array."""
        return self._entry.chunks

    def __len__(self) -> int:
        return self._entry.shape[0]

    def __getitem__(self, key: Any) -> NDArray:
        box = _bounds(key, self.shape)
        (values,) = _read(self._board, [(self._entry, self._entry.touched(box))], self.is_consistent)
        return np.array(values[key])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        if copy is False:
            raise ValueError("np.asarray(..., copy=False) of what a simulation publishes: reading it is copying it")
        return np.asarray(self[...], dtype)

    def lazy(self, is_consistent: bool = False) -> Any:
        """Return a lazy `Array`, which reads it whenever it is computed."""
        source = Published(self._board, self._entry, is_consistent)
        return wrap(make(Foreign, self.shape, self.dtype, source, (0,) * self.ndim), self.chunks)

    def __repr__(self) -> str:
        where = "has ended" if self._board.is_over() else f"runs in process {self._board.driver}"
        return f"<a field of a simulation that {where}: shape {self.shape}, {self.dtype}, step {self._board.header[_STEP]}>"


def _of(array: SharedArray) -> Any:
    """Return the field whose values lie in an array; the array itself where it is a copy, of another store."""
    lease = lease_of(array)
    assert lease is not None
    at = array.__array_interface__["data"][0] - lease.start if array.size else None
    if lease.nbytes >= HEADER_NBYTES:
        board = _Board(lease)
        if board.header[_MAGIC] == MAGIC:
            for entry in board.directory():
                if (at == entry.values or at is None) and entry.shape == array.shape and entry.dtype == array.dtype:
                    return Published(board, entry)
    return array


register(Published, PUBLISHED, lambda field: field._board.values(field._entry), _of)


def _bounds(key: Any, shape: tuple[int, ...]) -> Box:
    """Return a box of ``shape`` that holds all that a key of slices and integers takes; of another key, all of it."""
    whole = tuple(slice(0, n) for n in shape)
    keys: list[Any] = list(key) if isinstance(key, tuple) else [key]
    if not all(isinstance(k, (int, np.integer, slice)) or k is Ellipsis for k in keys) or sum(k is Ellipsis for k in keys) > 1:
        return whole
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(shape) - len(keys) + 1)
    if len(keys) > len(shape):
        return whole  # NumPy says what is wrong with it
    box = []
    for k, n in zip([*keys, *[slice(None)] * (len(shape) - len(keys))], shape, strict=True):
        part: slice = k if isinstance(k, slice) else slice(k, k + 1 or None)
        taken = range(*part.indices(n))
        box.append(slice(min(taken), max(taken) + 1) if taken else slice(0, 0))
    return tuple(box)


def snapshots(nodes: Iterable[Expr], roots: Iterable[Expr]) -> dict[Expr, Expr]:
    """Return what each of ``nodes`` that is a published field is replaced by: its values, read now, all of one simulation together.

    ``nodes`` are all that ``roots`` are made of. Only cells that are looked at are read: of the others the values are arbitrary.
    """
    fields = [node for node in nodes if isinstance(node, Foreign) and isinstance(node.source, Published)]
    needed: dict[Expr, set[int]] = {node: set() for node in fields}

    def need(node: Foreign, box: Iterable[slice]) -> None:
        moved = [slice(s.start + o, s.stop + o) for s, o in zip(box, node.origin, strict=True)]
        needed[node].update(node.source._entry.touched(moved).tolist())

    for x in [*roots, *(x for n in nodes if not isinstance(n, View) for x in n.inputs)]:
        map: IndexMap | None = None
        while isinstance(x, View):
            map = x.map if map is None else map.after(x.map)
            x = x.x
        if isinstance(x, Foreign) and x in needed and x.size:
            need(x, [slice(0, n) for n in x.shape] if map is None else _box_of(map))
    groups: dict[tuple[int, bool], list[Foreign]] = {}
    for node in fields:
        groups.setdefault((id(node.source._board.lease), node.source.is_consistent), []).append(node)
    found: dict[Expr, Expr] = {}
    for (_, is_consistent), group in groups.items():
        wanted = [(node.source._entry, np.array(sorted(needed[node]), np.int64)) for node in group]
        for node, values in zip(group, _read(group[0].source._board, wanted, is_consistent), strict=True):
            part = values[tuple(slice(o, o + n) for o, n in zip(node.origin, node.shape, strict=True))] if node.ndim else values
            found[node] = in_memory(part)
    return found


def _box_of(map: IndexMap) -> list[slice]:
    """Return the box of its input that a view looks at."""
    low, high = list(map.offsets), list(map.offsets)
    if 0 in map.shape:
        return [slice(0, 0)] * len(low)
    for n, (axis, step) in zip(map.shape, map.axes, strict=True):
        if axis >= 0:
            low[axis] = min(low[axis], low[axis] + step * (n - 1))
            high[axis] = max(high[axis], high[axis] + step * (n - 1))
    return [slice(a, b + 1) for a, b in zip(low, high, strict=True)]


def _read(board: _Board, wanted: Sequence[tuple[_Entry, NDArray]], is_consistent: bool) -> list[NDArray]:
    """Return arrays of the shapes of the fields, in which the wanted cells are filled: others were never touched, and cost nothing."""
    results = [_room(entry, len(cells)) for entry, cells in wanted]
    locks = [board.locks(entry) for entry, _ in wanted]
    if not any(len(cells) for _, cells in wanted):
        return results
    until_s = time.monotonic() + CONSISTENT_S
    while True:
        is_live = _wait_for_news(board, [(lock, cells) for lock, (_, cells) in zip(locks, wanted, strict=True)])
        steps = {
            _copied(board, lock, entry, int(cell), result)
            for lock, (entry, cells), result in zip(locks, wanted, results, strict=True)
            for cell in cells
        }
        if not is_consistent or len(steps) == 1:
            return results
        if not is_live or time.monotonic() > until_s:
            raise TimeoutError(
                f"reading {sum(len(cells) for _, cells in wanted)} cells of one step from the simulation of process {board.driver}: they "
                f"are of steps {min(steps)} to {max(steps)}, and " + _why_not(board, is_live)
            )


def _room(entry: _Entry, n: int) -> NDArray:
    """Return an array of a field's shape, for ``n`` of its cells."""
    if 2 * n > entry.n:
        return np.empty(entry.shape, entry.dtype)
    # NumPy's has huge pages: to write a few rows of a large array would be to clear many times as much.
    nbytes = math.prod(entry.shape) * entry.dtype.itemsize
    try:
        memory = mmap.mmap(-1, max(1, nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # NumPy raises MemoryError, and says how much
        return np.empty(entry.shape, entry.dtype)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.ndarray(entry.shape, entry.dtype, memory)


def _why_not(board: _Board, is_live: bool) -> str:
    if not is_live:
        return "it has ended, without publishing its last state. sa.attach(name), without consistent=True, reads what is there."
    return (
        f"after {CONSISTENT_S:g} s that has not changed: its steps take longer than that, it is stopped, or others read so much at once "
        f"that cells are never of one step for long enough. Read fewer cells, or attach without consistent=True, which reads what is there."
    )


def _wait_for_news(board: _Board, wanted: Sequence[tuple[Seqlocks, NDArray]]) -> bool:
    """Ask for cells, and wait until they are published, for a while; return whether there is anybody who will."""
    if board.is_over() or not board.has_driver():
        return False
    before = [[lock.sequences[cell] for cell in cells.tolist()] for lock, cells in wanted]
    for lock, cells in wanted:
        np.frombuffer(lock.wanted, np.uint8)[cells] = 1
    board.header[_ASKED] = now_ns = time.monotonic_ns()  # last: who sees it sees what is wanted
    until_s = now_ns / 1e9 + FRESH_S
    pause_s, look_s = SHORTEST_POLL_S, now_ns / 1e9 + LOOK_FOR_DRIVER_S
    while True:
        if all(
            lock.sequences[cell] != old and not lock.sequences[cell] & 1
            for (lock, cells), olds in zip(wanted, before, strict=True)
            for cell, old in zip(cells.tolist(), olds, strict=True)
        ):
            return True
        now_s = time.monotonic()
        if board.is_over() or now_s > until_s:
            return True
        if now_s > look_s:
            look_s = now_s + LOOK_FOR_DRIVER_S
            if not board.has_driver():
                return False
        due_s = board.header[_DUE] / 1e9
        if now_s < due_s:  # nothing will come before
            time.sleep(min(due_s, until_s, look_s) - now_s + SHORTEST_POLL_S)
            continue
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_POLL_S)


def _copied(board: _Board, lock: Seqlocks, entry: _Entry, cell: int, result: NDArray) -> int:
    """Copy a cell, whole, into its place in ``result``, and return the step it is of."""
    box = entry.box(cell)
    part: Any = (*box, ...)  # of an array without axes the array, not a number
    source, target = np.asarray(board.values(entry))[part], result[part]
    until_s = math.inf
    while True:
        step = lock.read(cell, lambda: np.copyto(target, source))
        if step is not None:
            return step
        now_s = time.monotonic()
        until_s = min(until_s, now_s + TORN_S)
        is_dead = not board.has_driver() and lock.sequences[cell] & 1  # in this order: nobody makes it even any more
        if is_dead or now_s > until_s:
            where = ", ".join(f"{s.start}:{s.stop}" for s in box)
            raise TornChunkError(
                f"reading cell [{where}] of a field of shape {entry.shape} of the simulation of process {board.driver}, which "
                + (
                    "was killed while it published that cell. Read other parts, or start the simulation again from a checkpoint."
                    if is_dead
                    else f"has been publishing that cell for {TORN_S:g} s: it is stopped. Read again when it goes on."
                )
            )
        time.sleep(SHORTEST_POLL_S)
