"""Arrays, numbers and locks that several processes share: `shmarray.shared`, for programs with processes of their own.

    from shmarray import shared
    a = shared.zeros((1000, 1000), chunks=(100, 1000))     # a NumPy array
    Process(target=work, args=(a,)).start()                # the other side has the same memory
    with a.lock((3, 0)) as rows: rows += 1                 # one writer at a time, in all processes

Promises: handing over copies nothing, by whatever way a pickle travels; memory goes when the last process lets go, or dies; locks
go with their holder, whose successor is told. Linux only.
Never put here: how memory is owned (`scheduler.shared`), what an array in it is (`shared_memory`).
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import reprlib
import threading
from collections.abc import Callable, Iterator, Sized
from typing import Any, TypeVar

import numpy as np

from scheduler.limits import format_bytes
from scheduler.shared import CellHold, family, prepare
from shmarray.chunks import chunk_box
from shmarray.errors import AbandonedLockError, HandleExpired, LockError
from shmarray.handle import Handle
from shmarray.packing import register
from shmarray.shared_memory import (
    Form,
    SharedArray,
    _lock_type,
    allocate,
    fill,
    form_of,
    layout_of,
    lease_of,
    over,
    storage_of,
)
from shmarray.store import LIST, List, Store

__all__ = [
    "AbandonedLockError",
    "Array",
    "HandleExpired",
    "List",
    "Lock",
    "LockError",
    "Report",
    "SharedArray",
    "Store",
    "Value",
    "array",
    "copy",
    "empty",
    "full",
    "lock",
    "report",
    "trim",
    "zeros",
]

NDArray = np.ndarray[Any, Any]
T = TypeVar("T")


def array(obj_or_shape: Any, dtype: Any = None, chunks: Any = None) -> SharedArray:
    """Return a shared array: of a shape (an int or a tuple of ints) zeros, of anything else a copy of its values.

    ``dtype``: float64 for a shape, else that of the values. ``chunks``, as in `normalize_chunks`: the boxes that can be locked apart.
    Raises TypeError for what NumPy makes objects or text of, unless that is what the dtype, or an array, says: ``dtype="U8"``.

    >>> from shmarray import shared
    >>> shared.array([[1, 2], [3, 4]]).sum()
    np.int64(10)
    """
    if _is_shape(obj_or_shape):
        return zeros(obj_or_shape, dtype, chunks)
    if isinstance(obj_or_shape, Handle):
        if dtype is None or np.dtype(dtype) == obj_or_shape.dtype:
            made: SharedArray = obj_or_shape.rechunk(chunks).shared() if chunks is not None else obj_or_shape.shared()  # type: ignore[attr-defined]  # every Handle is an Array
            return made
        obj_or_shape = np.asarray(obj_or_shape)
    values = _values("array", obj_or_shape, dtype)
    made = allocate(values.shape, values.dtype, chunks)
    fill(made, values)
    return made


def copy(source: Any, chunks: Any = None) -> SharedArray:
    """Return a shared copy of an array; of a shared one with its chunks."""
    values = _values("copy", source)
    if chunks is None and isinstance(source, SharedArray) and (lease := lease_of(source)) is not None:
        form = form_of(lease)
        chunks = form.chunks if form.shape == values.shape else None
    made = allocate(values.shape, values.dtype, chunks)
    fill(made, values)
    return made


def empty(shape: Any, dtype: Any = float, chunks: Any = None) -> SharedArray:
    """Return a shared array of whatever the memory holds."""
    return allocate(_sizes(shape), dtype, chunks)


def zeros(shape: Any, dtype: Any = None, chunks: Any = None) -> SharedArray:
    """Return a shared array of zeros. Memory that nobody has touched is zero already, and costs nothing until it is."""
    made = allocate(_sizes(shape), float if dtype is None else dtype, chunks)
    lease = lease_of(made)
    assert lease is not None
    lease.clear()
    return made


def full(shape: Any, value: Any, dtype: Any = None, chunks: Any = None) -> SharedArray:
    """Return a shared array filled with ``value``, which broadcasts; ``dtype``: that of the value."""
    made = allocate(_sizes(shape), _values("full", value).dtype if dtype is None else dtype, chunks)
    made[...] = value
    return made


def _values(function: str, given: Any, dtype: Any = None) -> NDArray:
    """Return what NumPy makes of values. Raises TypeError when these are objects or text, and nobody said that they should be."""
    values = np.asarray(given, dtype=dtype)
    is_said = dtype is not None or (hasattr(given, "dtype") and not isinstance(given, (str, bytes)))
    if values.dtype.kind in "OSU" and not is_said:
        shape = "a shape (an int or a tuple of ints), or " if function == "array" else ""
        raise TypeError(
            f"shared.{function}() takes {shape}values that NumPy makes an array of numbers, bools, dates or structures of; got "
            f"{reprlib.repr(given)} ({type(given).__name__}), of which it makes {'objects' if values.dtype.kind == 'O' else 'text'}. Text "
            f"takes a dtype, such as 'U8'; Python objects go into a shared.Store or shared.List."
        )
    return values


def _is_shape(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in value)
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _sizes(shape: Any) -> tuple[int, ...]:
    if type(shape) is int and shape >= 0:
        return (shape,)
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not _is_shape(sizes) or any(n < 0 for n in sizes):
        raise ValueError(f"the shape of a shared array is an int or a tuple of ints, none of them negative; got {shape!r}")
    return sizes


# --- locks ------------------------------------------------------------------------------------------------------------------------


class Lock:
    """A lock of a part of a shared array, between all processes and threads. For ``with``, which gives the part as an array.

    The thread that holds it may take it again. It is released when its holder dies; when that one was writing, the next owner is
    told once, by AbandonedLockError.
    """

    __slots__ = ("_holds", "_lease", "_runs", "_view", "mode", "timeout")

    def __init__(self, array: Any, chunk: Any = None, mode: str = "w", timeout: float | None = None) -> None:
        if mode not in ("r", "w"):
            raise ValueError(f"lock(mode={mode!r}): the mode is 'r' to read or 'w' to write")
        lease = lease_of(array)
        if lease is None:
            raise TypeError(f"lock() takes an array of sa.shared or a view of one, whose memory others see; got {type(array).__name__}")
        form: Form = lease.extra or form_of(lease)
        self._lease = lease
        self.mode = mode
        self.timeout = timeout
        self._holds: dict[int, list[CellHold]] = {}  # of each thread
        if chunk is not None:
            if array.shape != form.shape:
                raise ValueError(
                    f"locking chunk {chunk} of a view of shape {array.shape}: chunks are those of the whole array, of shape {form.shape}. "
                    f"Lock the view as it is, or a chunk of the whole."
                )
            index = chunk if isinstance(chunk, (tuple, list)) else (chunk,)
            if form.is_chunks and len(index) == len(form.counts):
                cell, box = 0, []
                try:
                    for i, n, slices in zip(index, form.counts, form.slices):  # as long as each other; this is the hot path
                        if not 0 <= i < n:
                            i += n
                            if not 0 <= i < n:
                                raise IndexError
                        cell = cell * n + i
                        box.append(slices[i])
                except (TypeError, IndexError) as error:
                    raise _chunk_error(type(error), chunk, form) from None
                array = np.ndarray.__getitem__(array, tuple(box))
                self._runs: list[tuple[int, int]] = [(cell, cell + 1)]
            else:
                try:
                    found = chunk_box(form.chunks, index)
                except (TypeError, IndexError) as error:
                    raise _chunk_error(type(error), chunk, form) from None
                array = np.ndarray.__getitem__(array, found)
                self._runs = storage_of(lease).touched_cells(layout_of(array, lease))
        elif array.shape == form.shape:
            self._runs = [(0, math.prod(form.counts))]
        else:
            self._runs = storage_of(lease).touched_cells(layout_of(array, lease))
        if mode == "r":
            array = array.view()
            array.flags.writeable = False
        self._view = array

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take the lock and return True; False when it is held elsewhere, and still after ``timeout`` seconds, or not ``block``.

        Raises AbandonedLockError, once, when its last holder died writing; LockError where waiting would be for ever.
        """
        try:
            self._take(timeout if block else 0.0)
        except TimeoutError:
            return False
        return True

    def release(self) -> None:
        """Give it back. Raises RuntimeError when this thread does not hold it."""
        ident = threading.get_ident()
        holds = self._holds.get(ident)
        if not holds:
            raise RuntimeError(
                "releasing a lock that this thread does not hold. Each call of lock() makes a new one, which is given back when nothing "
                "refers to it: keep what you acquire (lock = a.lock(); lock.acquire(); ...; lock.release()), or use `with`."
            )
        hold = holds.pop()
        if not holds:
            del self._holds[ident]
        hold.release()

    def _take(self, timeout: float | None) -> None:
        hold = self._lease.segment.lock(self._lease, self._runs, self.mode, timeout)
        ident = threading.get_ident()
        if ident in self._holds:
            self._holds[ident].append(hold)
        else:
            self._holds[ident] = [hold]

    def __enter__(self) -> Any:
        self._take(self.timeout)
        return self._view

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self) -> Any:
        return _lock_again, (self._view.view() if self.mode == "w" else self._view, self._runs, self.mode, self.timeout)


def _chunk_error(kind: type[Exception], chunk: Any, form: Form) -> Exception:
    """Return what is wrong with an index of the chunk grid, and what would be right."""
    counts = tuple(len(sizes) for sizes in form.chunks)
    given = tuple(chunk) if isinstance(chunk, (tuple, list)) else (chunk,)
    if kind is TypeError:
        wrong = "an index is made of ints"
    elif len(given) != len(counts):
        entries, axes = "entry" if len(given) == 1 else "entries", "axis" if len(counts) == 1 else "axes"
        wrong = f"the index has {len(given)} {entries}, the grid {len(counts)} {axes}"
    else:
        wrong = "the index is out of bounds"
    several = "chunk" if math.prod(counts) == 1 else "chunks"
    grid = f"{math.prod(counts)} {several}, {' x '.join(map(str, counts))}" if counts else "one chunk, which lock() takes without an index"
    if 0 not in counts and counts:
        padded = [i if isinstance(i, int) and 0 <= i < n else 0 for i, n in zip((*given, *[0] * len(counts)), counts, strict=False)]
        grid += f". Give an index of that grid, such as {tuple(padded)} (the last one is {tuple(n - 1 for n in counts)})"
    return kind(
        f"locking chunk {chunk!r} of a shared array of shape {form.shape}: {wrong}. It has {grid}; or lock a view, as a[2:4].lock()."
    )


def _lock_again(view: Any, runs: Any, mode: str, timeout: float | None) -> Lock:
    made = Lock(view, None, mode, timeout)
    made._runs = runs
    return made


_lock_type[:] = [Lock]


def lock(array: Any, chunk: Any = None, mode: str = "w", timeout: float | None = None) -> Lock:
    """Return a lock of a shared array, of a view of one, or of its chunk ``chunk`` (an index of the chunk grid), for ``with``.

    ``mode`` "w": one writer and nobody else; "r": readers together. ``timeout`` seconds after which ``with`` raises TimeoutError,
    naming the process that holds it; with None a deadlock between processes is noticed, and raises LockError. Raises
    AbandonedLockError once when who held it to write died: what it guards may be half written, and the lock is not held then.
    Who is told has to see to it: if that one dies as well before it has put things right, nobody is told again. A lock that nothing
    refers to any more is given back, and the next owner told. Arrays in the same memory under other views exclude each other where they
    touch the same chunks.
    """
    return Lock(array, chunk, mode, timeout)


# --- numbers ----------------------------------------------------------------------------------------------------------------------


def _dtype_of(code: Any) -> np.dtype[Any]:
    """Return the dtype of what `multiprocessing.Value` and `Array` take: a typecode, a ctypes type; or anything that NumPy takes."""
    if code == "u" or code is ctypes.c_wchar:
        return np.dtype("<U1")
    if code == "c" or code is ctypes.c_char:
        return np.dtype("S1")
    try:
        dtype: np.dtype[Any] = np.dtype(code)
    except TypeError:
        raise TypeError(
            f"{code!r} is not a type of numbers: Value and Array take a typecode of `array`, a ctypes type or a dtype"
        ) from None
    if dtype.hasobject or dtype.itemsize == 0:
        raise TypeError(f"{code!r} is not a type of numbers or single characters, as Value and Array share")
    return dtype


def _range_of(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the least and the largest integer of a dtype; of one that is not of integers an empty range."""
    bits = 8 * dtype.itemsize
    if dtype.kind == "i":
        return -1 << bits - 1, (1 << bits - 1) - 1
    return (0, (1 << bits) - 1) if dtype.kind == "u" else (1, 0)


def _alone(numbers: Value | Array, act: Callable[[], T]) -> T:
    """Return ``act()``, done while nobody else has the lock of what it changes."""
    if numbers._own is None:
        return numbers._lease.alone(act)
    with numbers._own:
        return numbers._lease.alone(act)


class Value:
    """A number that processes share. What `multiprocessing.Value` is, and can be pickled, and adds without a lock of yours.

    ``lock`` may be a lock of your own, such as a `multiprocessing.Lock` for several of them; it is then what `get_lock` returns.

    >>> from shmarray import shared
    >>> n = shared.Value("i", 3)
    >>> n.add(2)
    5
    >>> n.value
    5
    """

    __slots__ = ("_lease", "_lock", "_number", "_own", "_range", "_single")

    def __init__(self, dtype: Any, initial: Any = 0, *, lock: Any = True) -> None:
        made = allocate((), _dtype_of(dtype))
        made[()] = initial
        self._use(made, _lock_given(lock))

    def _use(self, number: SharedArray, own: Any = None) -> None:
        lease = lease_of(number)
        assert lease is not None
        self._lease = lease
        self._number = number.view(np.ndarray)
        self._single = number.itemsize <= 8  # one store, or one load: whole without a lock
        self._range = _range_of(number.dtype)
        self._lock: Any = own
        self._own = own  # the lock that the user gave, or None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the number."""
        dtype: np.dtype[Any] = self._number.dtype
        return dtype

    @property
    def value(self) -> Any:
        """The number, as a Python object. Reading does not wait; setting waits for whoever holds the lock."""
        return self._number.item() if self._single else _alone(self, self._number.item)

    @value.setter
    def value(self, value: Any) -> None:
        _alone(self, lambda: self._number.__setitem__((), value))

    def get_lock(self) -> Any:
        """Return its `Lock`, or the lock that was given, for ``with``: what is done inside is one step for all processes."""
        if self._lock is None:
            self._lock = Lock(over(self._lease, (), self.dtype))
        return self._lock

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take the lock of `get_lock`."""
        taken: bool = self.get_lock().acquire(block, timeout)
        return taken

    def release(self) -> None:
        """Give it back."""
        self.get_lock().release()

    def __enter__(self) -> Any:
        return self.get_lock().__enter__()

    def __exit__(self, *_: object) -> None:
        self.get_lock().release()

    def add(self, n: Any) -> Any:
        """Add ``n`` and return the sum: exact, however many processes do so at once. Integers wrap as in NumPy."""
        lowest, highest = self._range
        number = self._number
        if type(n) is int and lowest <= n <= highest:  # as the ufunc does, which takes a hundred times as long as this

            def do() -> Any:
                total = number.item() + n
                if not lowest <= total <= highest:
                    total = (total - lowest) % (highest - lowest + 1) + lowest
                number[()] = total
                return total
        else:
            is_double = type(n) is float and number.dtype.char == "d"

            def do() -> Any:
                if is_double and (total := number.item() + n) == total:  # not a number: NumPy warns where it has to
                    number[()] = total
                    return total
                with np.errstate(over="ignore"):
                    np.add(number, n, out=number)
                return number.item()

        return _alone(self, do)

    def max(self, n: Any) -> Any:
        """Make it ``n`` if that is larger, and return what it is then."""

        def do() -> Any:
            now = self._number.item()
            if n > now:
                self._number[()] = n
                return self._number.item()
            return now

        return _alone(self, do)

    def compare_and_set(self, old: Any, new: Any) -> bool:
        """Make it ``new`` and return True if it is ``old``; else leave it and return False."""

        def do() -> bool:
            if self._number.item() != old:
                return False
            self._number[()] = new
            return True

        return _alone(self, do)

    def __reduce__(self) -> Any:
        return _made_over, (Value, over(self._lease, (), self.dtype), *([self._own] if self._own is not None else ()))

    def __repr__(self) -> str:
        return f"shared.Value({self.dtype.str!r}, {self.value!r})"


class Array:
    """Numbers that processes share, under one lock. What `multiprocessing.Array` is, and can be pickled.

    Items are Python numbers, slices are lists, ``value`` and ``raw`` are the bytes of an array of "c". Of a structure, an item is a
    `numpy.record`, whose fields can be set: ``a[0].x = 1``. `get_obj` gives the NumPy array, which no lock guards.

    ``lock`` may be a lock of your own, as for `Value`; with False there is none, and you get the NumPy array itself.
    """

    __slots__ = ("_array", "_lease", "_lock", "_own")

    def __new__(cls, typecode: Any = None, size_or_initializer: Any = None, *, lock: Any = True) -> Any:
        return cls._numbers(typecode, size_or_initializer) if lock is False else object.__new__(cls)

    def __init__(self, typecode: Any, size_or_initializer: Any, *, lock: Any = True) -> None:
        self._use(self._numbers(typecode, size_or_initializer), _lock_given(lock))

    @staticmethod
    def _numbers(typecode: Any, size_or_initializer: Any) -> SharedArray:
        dtype = _dtype_of(typecode)
        if isinstance(size_or_initializer, (int, np.integer)):
            made = zeros(int(size_or_initializer), dtype)
        else:
            if isinstance(size_or_initializer, str) or not isinstance(size_or_initializer, (Sized, np.ndarray)):
                size_or_initializer = list(size_or_initializer)
            if dtype.kind == "S" and isinstance(size_or_initializer, (bytes, bytearray)):
                values: NDArray = np.frombuffer(size_or_initializer, dtype)
            else:
                values = np.asarray(size_or_initializer, dtype)
            if values.ndim != 1:
                raise ValueError(f"shared.Array has one axis, as that of multiprocessing; of shape {values.shape} make a shared.array")
            made = allocate(values.shape, dtype, -1)
            fill(made, values)
        return made

    def _use(self, array: SharedArray, own: Any = None) -> None:
        lease = lease_of(array)
        assert lease is not None
        self._array = array
        self._lease = lease
        self._lock: Any = own
        self._own = own

    def get_obj(self) -> SharedArray:
        """Return the NumPy array, which no lock guards."""
        return self._array

    def get_lock(self) -> Any:
        """Return the `Lock` of all of it, or the lock that was given, for ``with``."""
        if self._lock is None:
            self._lock = Lock(self._array)
        return self._lock

    acquire = Value.acquire
    release = Value.release
    __enter__ = Value.__enter__
    __exit__ = Value.__exit__

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: Any) -> Any:
        found = np.ndarray.__getitem__(self._array, key)
        is_text = self._array.dtype.kind == "S"  # of which `tolist` would drop zeros
        if not isinstance(key, slice):
            if found.dtype.names:
                return self._array.view(np.recarray)[key]
            return found.tobytes() if is_text else found.item()
        with self.get_lock():
            if self._array.dtype.kind == "U":
                return found.tobytes().decode("utf-32")
            return found.tobytes() if is_text else found.tolist()

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, slice):
            values = list(value) if not isinstance(value, (bytes, bytearray)) else [bytes([b]) for b in value]
            wanted = len(range(*key.indices(len(self))))
            if len(values) != wanted:
                raise ValueError(f"can only assign a sequence of the same size: {len(values)} values to a slice of {wanted}")
            with self.get_lock():
                self._array[key] = values
        else:
            _alone(self, lambda: self._array.__setitem__(key, value))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    @property
    def raw(self) -> bytes:
        """All bytes of an array of "c"."""
        with self.get_lock():
            return self._array.tobytes()

    @raw.setter
    def raw(self, value: bytes) -> None:
        if len(value) > self._array.nbytes:
            raise ValueError(f"{len(value)} bytes into an array of {self._array.nbytes}")
        with self.get_lock():
            self._array.view(np.uint8)[: len(value)] = np.frombuffer(value, np.uint8)

    @property
    def value(self) -> bytes:
        """The bytes of an array of "c" up to the first zero."""
        return self.raw.partition(b"\0")[0]

    @value.setter
    def value(self, value: bytes) -> None:
        self.raw = value + b"\0" if len(value) < self._array.nbytes else value

    def __reduce__(self) -> Any:
        return _made_over, (Array, self._array, *([self._own] if self._own is not None else ()))

    def __repr__(self) -> str:
        return f"shared.Array({self._array.dtype.str!r}, {self._array.tolist()!r})"


def _lock_given(lock: Any) -> Any:
    """Return the lock that the user brought, or None. Raises TypeError for what is neither a lock nor a bool."""
    if isinstance(lock, bool):
        return None
    if not hasattr(lock, "acquire"):
        raise TypeError(f"lock={lock!r}: it is True, False or a lock, which has acquire and release")
    return lock


def _made_over(kind: type[Value] | type[Array], array: SharedArray, own: Any = None) -> Value | Array:
    """Return a `Value` or `Array` over what has arrived."""
    made: Value | Array = object.__new__(kind)
    made._use(array, own)
    return made


register(Value, LIST + 1, lambda value: over(value._lease, (), value.dtype), lambda array: _made_over(Value, array))
register(Array, LIST + 2, Array.get_obj, lambda array: _made_over(Array, array))


# --- looking ----------------------------------------------------------------------------------------------------------------------


class Report(dict[str, Any]):
    """What the shared memory of this family of processes holds, as a dict; as a string, a table."""

    def __str__(self) -> str:
        lines = [
            f"{self['arrays']} shared arrays, {format_bytes(self['live_nbytes'])} in {format_bytes(self['reserved_nbytes'])} of addresses",
            f"free {format_bytes(self['free_nbytes'])}, largest hole {format_bytes(self['largest_hole_nbytes'])}; "
            f"warm {format_bytes(self['warm_nbytes'])}; occupied {format_bytes(self['resident_nbytes'])}",
            f"{self['handles_on_their_way']} handles on their way",
        ]
        for pid, owner in sorted(self["owners"].items()):
            me = " (this one)" if pid == os.getpid() else ""
            lines.append(f"process {pid}{me} holds {owner['arrays']} arrays, {format_bytes(owner['nbytes'])}")
        for store in self["stores"]:
            name = "" if store["name"] is None else f" {store['name']!r}"
            users = ", ".join(map(str, store["users"])) or "a store"
            lines.append(f"{store['kind']}{name}, which holds {store['holds']} of them, is used by {users}")
        for held in self["locks"]:
            first, stop = held["cells"]
            verb = "waits for" if held["waits"] else "has locked"
            what = "read" if held["mode"] == "r" else "write"
            lines.append(f"process {held['pid']} {verb} chunks [{first}, {stop}) of array {held['array']} to {what}")
        return "\n".join(lines)

    __repr__ = __str__


def report() -> Report:
    """Return what there is: live, free and warm bytes, the largest hole, owners, stores and lists, locks held and by whom.

    Frees what nobody holds first.
    """
    found = Report(family().statistics())
    found["stores"] = [{**json.loads(store.pop("meta")), **store} for store in found["stores"]]
    return found


def trim(keep_nbytes: int = 0) -> int:
    """Give freed memory that is kept for reuse back to the system, but for ``keep_nbytes``; return how much that was."""
    return family().trim(keep_nbytes)


prepare()
