"""Updating memory exactly once, whoever dies: a cursor and a redo slot for each lane.

A task that reads what it writes goes in *steps*, a fixed sequence of boxes of which each is read and written by one step alone. The
results of a step go into the slot first, then over the target:

    cursor (task, step, COMPUTE)    results of the step -> slot               target untouched: do the step again
    cursor (task, step, COPY)       slot -> target                            slot is whole: copy it again
    cursor (task, step+1, COMPUTE)  ...                                       never again

The cursor is one aligned word, so whoever looks at it after the lane's end (the driver, after a worker's death; the lane itself, after
an exception) sees exactly one of these. The slot says where its results belong, so `Redo.settle` needs to know nothing of kernels.

    slot:  | count | record 0: segment, origin, pointer, data, itemsize, ndim, shape, strides | record 1 ... | results

Relies on `segments` for addresses. Never put here: what a step computes, which tasks there are, who waits for whom.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scheduler import faults
from scheduler.task import ARENA, Address

if TYPE_CHECKING:
    from scheduler.segments import Memory

    NDArray = np.ndarray[Any, Any]

__all__ = [
    "COMPUTE",
    "COPY",
    "DATA_NBYTES",
    "MOST_STEPS",
    "NOT_BEGUN",
    "RECORD_WORDS",
    "SLOT_NBYTES",
    "Redo",
    "address_of",
    "pack",
    "unpack",
]

SLOT_NBYTES = 4 << 20  # of memory that costs nothing until it is touched
MOST_RECORDS = 8
RECORD_WORDS = 6 + 2 * 64  # NumPy arrays have at most 64 axes
FIRST_RECORD = 8
HEADER_NBYTES = 16 << 10
ALIGNMENT = 64
DATA_NBYTES = SLOT_NBYTES - HEADER_NBYTES - (MOST_RECORDS + 1) * ALIGNMENT  # room for the results of one step
SEGMENT, ORIGIN, POINTER, DATA, ITEMSIZE, NDIM, AXES = range(7)  # words of a record

NOT_BEGUN = -1
COMPUTE, COPY = 0, 1
MOST_STEPS = 1 << 31


def pack(task: int, step: int = 0, phase: int = COMPUTE) -> int:
    """Return the cursor's word."""
    return task << 32 | step << 1 | phase


def unpack(word: int) -> tuple[int, int, int]:
    """Return (task, step, phase) of a cursor that is not `NOT_BEGUN`."""
    return word >> 32, word >> 1 & (MOST_STEPS - 1), word & 1


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Return where the first item of an array lies in this process."""
    return int(array.__array_interface__["data"][0])


_NONE = np.empty(0, np.uint8)
_spare: deque[NDArray] = deque(maxlen=4)  # slots of lanes that ended; appended to and taken from by any thread


class Redo:
    """A lane's cursor, ``words[cursor]``, and its slot.

    Kernels of layers that are `in_place` do, for each step of a task from `first_step` on: ``room``, ``record``, compute, ``commit``.
    """

    __slots__ = ("_memory", "_task", "cursor", "first_step", "header", "slot", "start", "step", "words")

    def __init__(self, words: memoryview, cursor: int, slot: np.ndarray[Any, np.dtype[np.uint8]] | None = None) -> None:
        """``slot`` None: one of this process, made when first needed."""
        self.words = words
        self.cursor = cursor
        self._attach(_NONE if slot is None else slot)
        self.first_step = self.step = 0
        self._task = 0

    def _attach(self, slot: NDArray) -> None:
        self.slot = slot
        self.start = address_of(slot)
        self.header = slot[:HEADER_NBYTES].view(np.int64)

    def close(self) -> None:
        """Give the slot back, when it is one of this process: to be used by the next lane, for fresh memory costs page faults."""
        if self.slot is not _NONE:
            _spare.append(self.slot)
            self._attach(_NONE)

    def begin(self, task: int, step: int = 0) -> None:
        """Say which task runs now, and from which step on."""
        self._task = task
        self.first_step = step
        self.at(step)

    def at(self, step: int) -> None:
        """Say which step of the task comes now, where steps need no slot: none reads what it, or a later one that was begun, writes."""
        self.step = step
        self.words[self.cursor] = pack(self._task, step)

    def room(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> list[np.ndarray[Any, Any]]:
        """Return arrays in the slot for the results of one step."""
        if self.slot is _NONE:
            try:
                self._attach(_spare.pop())
            except IndexError:
                self._attach(np.empty(SLOT_NBYTES, np.uint8))
        starts, at = [], HEADER_NBYTES + -self.start % ALIGNMENT
        for shape, dtype in zip(shapes, dtypes, strict=True):
            starts.append(at)
            at += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if at > SLOT_NBYTES:
            raise ValueError(
                f"updating items of {[dtype.itemsize for dtype in dtypes]} bytes in place: the results of one step take {at} bytes, of "
                f"which {SLOT_NBYTES} are there at most. Compute a new array instead (x = x + y)."
            )
        return [np.ndarray(shape, dtype, self.slot, start) for shape, dtype, start in zip(shapes, dtypes, starts, strict=True)]

    def record(self, number: int, memory: Memory, segment: int, place: Any, array: np.ndarray[Any, Any]) -> None:
        """Note that ``array``, in the slot, belongs over ``place``: an array over the bytes, or what copies them.

        Pointers are those of this process; less their ``origin`` they are offsets in the segment.
        """
        self._memory = memory
        at = FIRST_RECORD + number * RECORD_WORDS
        if isinstance(place, np.ndarray):
            pointer = address_of(place)
            origin = memory.start if segment == ARENA else 0
        else:
            pointer, origin = place.start, 0
        n = array.ndim
        data = address_of(array) - self.start
        self.header[at : at + AXES + 2 * n] = (segment, origin, pointer, data, array.itemsize, n, *array.shape, *place.strides)

    def cursor_address(self) -> int:
        """Return where the cursor lies in this process: for code that goes in steps itself."""
        return address_of(np.asarray(self.words)) + 8 * self.cursor

    def word(self, phase: int = COMPUTE) -> int:
        """Return the cursor's word for step 0 of the task that runs; ``pack(0, 1)`` more for each later step."""
        return pack(self._task, 0, phase)

    def outline(self, number: int, memory: Memory, segment: int, array: NDArray, strides: tuple[int, ...]) -> tuple[int, int]:
        """Fill in record ``number`` but for what is of one step; return the addresses of its pointer and of its shape.

        The results of a step lie in C order where ``array``, in the slot, begins; their place is an array of this process, whose axes lie
        ``strides`` apart. Only while the cursor does not say `COPY`.
        """
        at = FIRST_RECORD + number * RECORD_WORDS
        n = len(strides)
        origin = memory.start if segment == ARENA else 0
        data = address_of(array) - self.start
        self.header[at : at + AXES + 2 * n] = (segment, origin, 0, data, array.itemsize, n, *(0,) * n, *strides)
        start = self.start + 8 * at
        return start + 8 * POINTER, start + 8 * AXES

    def outlined(self, count: int) -> NDArray:
        """Return a copy of the slot up to the end of ``count`` records, for `restore` before each task."""
        self.header[0] = count
        return self.header[: FIRST_RECORD + count * RECORD_WORDS].copy()

    def restore(self, outlined: NDArray) -> None:
        self.header[: outlined.size] = outlined

    def commit(self, count: int, copies: Sequence[Callable[[Any], None]], step: Any) -> None:
        """Carry out the step whose results lie in the slot: ``copies`` bring the ``count`` records to their places."""
        self.header[0] = count
        word = pack(self._task, self.step)
        if faults.ARMED is not None:
            faults.point("results")
        self.words[self.cursor] = word | COPY
        if faults.ARMED is not None:
            self._copy_half(count)
        for copy in copies:
            copy(step)
        if faults.ARMED is not None:
            faults.point("copied")
        self.words[self.cursor] = word + 2
        self.step += 1

    def _copy_half(self, count: int) -> None:
        """Have faults before and in the middle of a copy: then half of each record is over its place."""
        faults.point("copy")
        assert self._memory is not None
        for number in range(count):
            self._copy(number, self._memory, 2)
        faults.point("half")

    def settle(self, memory: Memory) -> tuple[int, int] | None:
        """Finish a step that was being copied; return the task and the first of its steps that is still to do; None: not begun.

        Only when the lane runs nothing any more. Doing it twice does no harm.
        """
        word = self.words[self.cursor]
        if word == NOT_BEGUN:
            return None
        task, step, phase = unpack(word)
        if phase != COPY:
            return task, step
        for number in range(int(self.header[0])):
            self._copy(number, memory)
        self.words[self.cursor] = pack(task, step + 1)
        return task, step + 1

    def _copy(self, number: int, memory: Memory, divisor: int = 1) -> None:
        """Bring the results of a record to their place; all of them, or the first half along the first axis."""
        at = FIRST_RECORD + number * RECORD_WORDS
        segment, origin, pointer, data, itemsize, n = self.header[at : at + AXES].tolist()
        shape = tuple(self.header[at + AXES : at + AXES + n].tolist())
        strides = tuple(self.header[at + AXES + n : at + AXES + 2 * n].tolist())
        if shape:
            shape = (shape[0] // divisor, *shape[1:])
        dtype = np.dtype((np.void, itemsize))
        target = memory.window(Address(segment, pointer - origin), 0, shape, strides, dtype)
        results = np.ndarray(shape, dtype, self.slot, data)
        if isinstance(target, np.ndarray):
            target[...] = results
        else:
            target.write(results)
