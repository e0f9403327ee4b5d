"""Values laid down in shared memory, and the kernel that calls a function on one and lays down what it returns.

A *parcel* is any value that can be pickled; its arrays lie beside the pickle, where they are read without copying:

    0         64           64 * k                  stream - 8 n     stream
    +---------+------------+------------+-----+---+----------------+---------------+
    | header  | buffer 0   | buffer 1   | ... |   | sizes, n int64 | pickle        |
    +---------+------------+------------+-----+---+----------------+---------------+

Promises: where a buffer lies depends on the sizes of the buffers alone, so that plans that read or write it can be used again; a
function is called once, unless its worker dies: a result that does not fit the memory meant for it travels as an answer.
Never put here: whose memory it is, frames, stages.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np

from scheduler.task import Context

__all__ = ["SENT", "CallKernel", "Parcel", "elapsed_s", "laid_nbytes", "make_room", "map_leaves", "packed", "unpacked"]

NDArray = np.ndarray[Any, Any]

ALIGNMENT = 64
_NBYTES, _ROOM, _STREAM, _STREAM_NBYTES, _BUFFERS, _ELAPSED_NS = range(6)  # words of the header
HEADER_NBYTES = 64
SENT = -1  # in the place of the length: the parcel went as an answer
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})


@dataclass(frozen=True, slots=True)
class Parcel:
    """A value taken apart: its pickle, and the bytes of its arrays."""

    stream: bytes
    buffers: Sequence[memoryview]

    def offsets(self) -> list[int]:
        """Return where each buffer lies, and after them where they end."""
        found, at = [], HEADER_NBYTES
        for buffer in self.buffers:
            found.append(at)
            at += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        return [*found, at]

    @property
    def nbytes(self) -> int:
        """The bytes it takes."""
        return self.offsets()[-1] + 8 * len(self.buffers) + len(self.stream)

    def lay(self, memory: NDArray, elapsed_ns: int = 0, *, with_buffers: bool = True) -> None:
        """Lay it down in ``memory`` (uint8, large enough), its length last: with that it is there."""
        *starts, end = self.offsets()
        header = memory[:HEADER_NBYTES].view(np.int64)
        if with_buffers:
            for start, buffer in zip(starts, self.buffers, strict=True):
                memory[start : start + buffer.nbytes] = np.frombuffer(buffer, np.uint8)
        stream = end + 8 * len(self.buffers)
        memory[end:stream].view(np.int64)[:] = [buffer.nbytes for buffer in self.buffers]
        memory[stream : stream + len(self.stream)] = np.frombuffer(self.stream, np.uint8)
        header[[_STREAM, _STREAM_NBYTES, _BUFFERS, _ELAPSED_NS]] = stream, len(self.stream), len(self.buffers), elapsed_ns
        header[_NBYTES] = stream + len(self.stream)


def packed(value: Any) -> Parcel:
    """Return a value taken apart; raise what pickling it raises. Arrays that are contiguous are not copied."""
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> None:
        buffers.append(buffer.raw())

    # What is defined in the user's script has to go by value, which takes ten times as long.
    is_plain = type(value) in _PLAIN or (type(value) is np.ndarray and not value.dtype.hasobject)
    dumps = pickle.dumps if is_plain else cloudpickle.dumps
    return Parcel(dumps(value, 5, buffer_callback=keep), buffers)


def unpacked(memory: NDArray, take: Callable[[NDArray], NDArray] | None = None) -> Any:
    """Return the value that was laid down in ``memory``: its arrays are read-only views, 0-d ones scalars.

    ``take``: is given the bytes of each array, and returns those that the array is to lie over.
    """
    header = memory[:HEADER_NBYTES].view(np.int64)
    stream, nbuffers = int(header[_STREAM]), int(header[_BUFFERS])
    sizes = memory[stream - 8 * nbuffers : stream].view(np.int64).tolist()
    buffers, at = [], HEADER_NBYTES
    for size in sizes:
        part = memory[at : at + size]
        if take is None:
            part.flags.writeable = False
        else:
            part = take(part)
        buffers.append(part)
        at += -(-size // ALIGNMENT) * ALIGNMENT
    value = pickle.loads(memory[stream : stream + int(header[_STREAM_NBYTES])].data, buffers=buffers)
    return map_leaves(value, lambda x: x[()] if type(x) is np.ndarray and not x.ndim else x)


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a value with ``function`` called on what is in its tuples, lists and dicts; on itself, if it is none of them."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([map_leaves(v, function) for v in value])
    if kind is dict:
        return {k: map_leaves(v, function) for k, v in value.items()}
    return function(value)


def make_room(memory: NDArray) -> None:
    """Say that nothing lies in ``memory``, and how much may."""
    header = memory[:HEADER_NBYTES].view(np.int64)
    header[_NBYTES], header[_ROOM] = 0, memory.nbytes


def laid_nbytes(memory: NDArray) -> int:
    """Return the length of the parcel in ``memory``: 0 when there is none, `SENT` when it went as an answer."""
    return int(memory[:HEADER_NBYTES].view(np.int64)[_NBYTES])


def elapsed_s(memory: NDArray) -> float:
    """Return how long the function took that gave the value in ``memory``."""
    return int(memory[:HEADER_NBYTES].view(np.int64)[_ELAPSED_NS]) / 1e9


@dataclass(frozen=True, slots=True)
class CallKernel:
    """Calls ``function`` on the value in buffer 0, and lays what it returns down in buffer 1."""

    function: Callable[[Any], Any]

    def bind(self, context: Context) -> Callable[[int], None]:
        function = self.function

        def window(buffer: int, nbytes: int) -> NDArray:
            found: NDArray = context.memory.window(context.addresses[buffer], 0, (nbytes,), (1,), np.dtype(np.uint8))
            return found

        def run(index: int) -> None:
            value = unpacked(window(0, laid_nbytes(window(0, HEADER_NBYTES))))
            began = time.perf_counter_ns()
            result = function(value)
            elapsed_ns = time.perf_counter_ns() - began
            try:
                parcel = packed(result)
            except Exception as error:
                error.add_note(f"while pickling what the function returned, a {type(result).__name__}, for the next stage")
                raise
            header = window(1, HEADER_NBYTES).view(np.int64)
            if parcel.nbytes <= header[_ROOM]:
                parcel.lay(window(1, parcel.nbytes), elapsed_ns)
                return
            aside = np.empty(parcel.nbytes, np.uint8)
            parcel.lay(aside, elapsed_ns)
            context.answer(aside.tobytes())
            header[_NBYTES] = SENT

        return run
