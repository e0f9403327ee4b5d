"""What lies between the source and the sink of a pipeline: the ring of buffers, frames in it, and what stages do to a frame.

Promises: a buffer is used for one frame at a time, and what users built on an earlier one of its frames says that it is void; what
leaves the ring (for the sink, for a stage that keeps order) is a copy. Relies on `kernels.calls` for how values lie in a buffer.
Never put here: threads, order (but for waiting for one's turn), when to stop.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from scheduler.results import result_memory
from scheduler.run import Pool
from scheduler.running import Signal
from scheduler.task import Buffer, Layer, Plan
from shmarray.compute import run, values_of, warn
from shmarray.config import config
from shmarray.errors import WorkerDied
from shmarray.handle import Handle, as_handle, wrap_stored
from shmarray.kernels.calls import SENT, CallKernel, Parcel, elapsed_s, laid_nbytes, make_room, map_leaves, packed, unpacked
from shmarray.plan import Target
from shmarray.region import c_strides
from shmarray.storage import Layout, Storage

__all__ = ["Call", "Dropped", "Flow", "Frame", "InOrder", "Lazy", "Ring", "Stage", "settled"]

NDArray = np.ndarray[Any, Any]

MOST_LOST = 3  # answers of one frame that died with their worker
GRAIN_NBYTES = 4096  # buffers are of whole pages


class Flow(Protocol):
    """What stages need of the pipeline they are in."""

    pool: Pool
    ring: Ring
    line: str

    def is_dropped(self, number: int) -> bool:
        """Whether a frame need not go on."""


class Ring:
    """The buffers: as many as were ever in use at once, used again and again."""

    def __init__(self, pool: Pool, line: str) -> None:
        self.pool = pool
        self.line = line
        self.returned: deque[Storage] = deque()  # any thread appends, without a lock
        self._mutex = threading.Lock()  # guards the one below; never taken by the calling thread
        self._free: list[Storage] = []

    def take(self, nbytes: int) -> Storage:
        """Return a buffer of at least so many bytes; what expressions were built on what was there is void."""
        with self._mutex:
            while self.returned:
                self._free.append(self.returned.popleft())
            fitting = [storage for storage in self._free if storage.nbytes >= nbytes]
            found = min(fitting, key=lambda storage: storage.nbytes) if fitting else None
            if found is not None:
                self._free.remove(found)
            elif self._free:
                self._free.pop()  # one that is too small makes room
        if found is None:
            rounded = -(-nbytes // GRAIN_NBYTES) * GRAIN_NBYTES
            found = Storage(self.pool, (rounded,), np.dtype(np.uint8), ((rounded,),), may_spill=False)
        found.begin_write(stays=True)
        found.end_write(found.layout, self.line)
        return found

    def laid(self, parcel: Parcel, *, with_buffers: bool = True) -> Storage:
        """Return a buffer with a parcel in it."""
        storage = self.take(parcel.nbytes)
        parcel.lay(_bytes(storage), with_buffers=with_buffers)
        return storage

    def clear(self) -> None:
        self.returned.clear()
        self._free = []


def _bytes(storage: Storage) -> NDArray:
    return storage.array(storage.layout)


class Frame:
    """A frame on its way: a parcel in a buffer, or a value of this process."""

    __slots__ = ("number", "passed", "previous", "slot", "value")

    def __init__(self, number: int, slot: Storage | None, previous: Frame | None, signals: int) -> None:
        self.number = number
        self.slot = slot
        self.value: Any = None
        self.previous = previous  # until this one has passed the last stage that keeps order
        self.passed = [Signal() for _ in range(signals)]  # by such a stage: set by the frame's carrier when it lets the next one in

    def to_slot(self, ring: Ring) -> Storage:
        """Have it lie in a buffer, and return that."""
        if self.slot is None:
            self.slot, self.value = ring.laid(packed(map_leaves(self.value, settled))), None
        return self.slot

    def to_value(self, ring: Ring) -> Any:
        """Have it as a value that shares no memory, and return that."""
        if self.slot is not None:
            self.value = map_leaves(unpacked(_bytes(self.slot), _private), _writable)
            ring.returned.append(self.slot)
            self.slot = None
        return self.value


def settled(value: Any) -> Any:
    """Return a lazy array's values; anything else itself."""
    if not isinstance(value, Handle):
        return value
    values = values_of(value)
    return values if values.ndim else values[()]


def _private(part: NDArray) -> NDArray:
    copy = result_memory().empty(part.shape, part.dtype)
    np.copyto(copy, part)
    return copy


def _writable(value: Any) -> Any:
    """Return an array that its holder may write: what a function returns as it was given it says that it is read-only."""
    return value.copy() if type(value) is np.ndarray and not value.flags.writeable else value


# ---------------------------------------------------------------------------------------------------------- stages


class Stage:
    """What is done to each frame. ``name`` is that of errors and reports."""

    where = "workers"

    def __init__(self, flow: Flow, function: Callable[[Any], Any], name: str, *, is_laid: bool) -> None:
        self.flow = flow
        self.function = function
        self.name = name
        self.is_laid = is_laid  # what comes next wants the result in a buffer
        self.busy_s = 0.0
        self._mutex = threading.Lock()  # guards busy_s

    def add(self, seconds: float) -> None:
        with self._mutex:
            self.busy_s += seconds

    def run(self, frame: Frame) -> None:
        """Put the result in the frame's place."""
        raise NotImplementedError


class Call(Stage):
    """A Python function, called in a worker."""

    def __init__(self, flow: Flow, function: Callable[[Any], Any], name: str, *, is_laid: bool) -> None:
        super().__init__(flow, function, name, is_laid=is_laid)
        layer = Layer(name=name, kernel=CallKernel(function), ntasks=1, reads=(0,), writes=(1,), line=flow.line)
        self.plan = Plan(buffers=(), layers=(layer,), isolated=True, task_timeout_s=config.task_timeout)
        self.nbytes = 0  # of the largest result there was: any carrier may set it to what it sees

    def run(self, frame: Frame) -> None:
        ring, pool = self.flow.ring, self.flow.pool
        given = frame.to_slot(ring)
        room = max(self.nbytes, 0 if self.nbytes else given.nbytes)
        taken = ring.take(room)
        layer = replace(self.plan.layers[0], describe=lambda _: f"frame {frame.number}")
        places = [storage.address(pool) for storage in (given, taken)]
        plan = replace(
            self.plan,
            buffers=tuple([Buffer(s.nbytes, address) for s, (address, _) in zip((given, taken), places, strict=True)]),
            layers=(layer,),
            keep=tuple([held for _, held in places]),
        )
        for _ in range(MOST_LOST):
            make_room(_bytes(taken))
            report = pool.run(plan, config.scheduler)
            warn(report)
            nbytes = laid_nbytes(_bytes(taken))
            if nbytes != SENT:
                break
            if report.answers:  # else the worker died with it
                answer = np.frombuffer(report.answers[-1], np.uint8)
                nbytes = answer.nbytes
                ring.returned.append(taken)
                taken = ring.take(nbytes)
                _bytes(taken)[:nbytes] = answer
                break
        else:
            raise WorkerDied(f"{MOST_LOST} workers in a row died with the result of frame {frame.number} of {self.name!r} in hand.")
        self.nbytes = max(self.nbytes, nbytes)
        self.add(elapsed_s(_bytes(taken)))
        frame.slot = taken
        ring.returned.append(given)


class Lazy(Stage):
    """A function of lazy arrays: called here, computed by the workers."""

    def run(self, frame: Frame) -> None:
        ring, pool = self.flow.ring, self.flow.pool
        given = frame.slot
        value = frame.value if given is None else unpacked(_bytes(given))
        frame_of_arrays = map_leaves(value, lambda x: self._lazy(x, given))
        began = time.perf_counter()
        lazy = self.function(frame_of_arrays)
        self.add(time.perf_counter() - began)
        frame.value = None
        if self.is_laid:
            result = self._into_slot(lazy, ring, pool)
            frame.slot = result
        else:
            frame.value, frame.slot = self._into_values(lazy, pool), None
        if given is not None:
            ring.returned.append(given)

    @staticmethod
    def _lazy(x: Any, slot: Storage | None) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        if slot is not None and type(x) is np.ndarray and x.size:
            offset = x.__array_interface__["data"][0] - slot.array(slot.layout).__array_interface__["data"][0]
            if 0 <= offset < slot.nbytes:
                return wrap_stored(slot, Layout(offset, x.shape, x.strides, x.dtype))
        return as_handle(x)

    def _into_slot(self, lazy: Any, ring: Ring, pool: Pool) -> Storage:
        """Compute straight into a buffer: arrays that nobody fills stand for the results when their places are chosen."""
        made: dict[int, tuple[NDArray, Handle]] = {}

        def stand_in(x: Any) -> Any:
            if not isinstance(x, Handle):
                return x
            empty = np.empty(x.shape, x.dtype)
            if empty.size:
                made[empty.__array_interface__["data"][0]] = empty, x
            return empty

        parcel = packed(map_leaves(lazy, stand_in))
        found = [made.pop(np.frombuffer(b, np.uint8).__array_interface__["data"][0], None) if b.nbytes else None for b in parcel.buffers]
        if made:  # of a dtype that has no buffer for pickle, such as datetime64
            return ring.laid(packed(self._into_values(lazy, pool)))
        slot = ring.laid(parcel, with_buffers=False)
        nodes, targets = [], []
        for start, buffer, pair in zip(parcel.offsets(), parcel.buffers, found, strict=False):
            if pair is None:
                _bytes(slot)[start : start + buffer.nbytes] = np.frombuffer(buffer, np.uint8)
                continue
            empty, x = pair
            layout = Layout(start, empty.shape, c_strides(empty.shape, empty.dtype.itemsize), empty.dtype)
            nodes.append(x.node)
            targets.append(Target(empty.shape, empty.dtype, storage=slot, layout=layout, is_new=True))
        self.add(run(nodes, targets, None, pool, self.flow.line).busy_s)
        return slot

    def _into_values(self, lazy: Any, pool: Pool) -> Any:
        handles: list[Handle] = []
        map_leaves(lazy, lambda x: handles.append(x) if isinstance(x, Handle) else None)
        targets = [Target(x.shape, x.dtype) for x in handles]
        self.add(run([x.node for x in handles], targets, None, pool, self.flow.line).busy_s)
        values = iter([np.empty(t.shape, t.dtype) if t.array is None else t.array for t in targets])

        def value(x: Any) -> Any:
            if not isinstance(x, Handle):
                return x
            found = next(values)
            return found if found.ndim else found[()]

        return map_leaves(lazy, value)


class InOrder(Stage):
    """A function that sees one frame after the other."""

    where = "here"

    def __init__(self, flow: Flow, function: Callable[[Any], Any], name: str, *, is_laid: bool, index: int, is_last: bool) -> None:
        super().__init__(flow, function, name, is_laid=is_laid)
        self.index = index  # among the stages of its kind
        self.is_last = is_last

    def run(self, frame: Frame) -> None:
        value = frame.to_value(self.flow.ring)
        if frame.previous is not None:
            frame.previous.passed[self.index].wait()
        if self.flow.is_dropped(frame.number):
            raise Dropped
        if self.is_last:
            frame.previous = None
        frame.value = None
        began = time.perf_counter()
        frame.value = map_leaves(self.function(value), settled)
        self.add(time.perf_counter() - began)
        frame.passed[self.index].set()


class Dropped(Exception):
    """A frame goes no further: an earlier one has failed, or all is over."""
