"""Arrays in shared segments: a NumPy array whose pickle is a handle, and the same bytes as the storage of a lazy array.

Promises: a `SharedArray`, a slice or another view of one arrives in another process over the same memory; what has memory of its
own (results of operations, copies, fancy indexing) is an ordinary ndarray, and travels like one. Relies on `scheduler.shared`.
Never put here: the public functions (``shared``), who owns the memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from scheduler.locks import process_locks
from scheduler.shared import Lease, Segment, family, receive
from scheduler.task import DRIVER, Address, LockRequest
from shmarray.chunks import Chunks, normalize_chunks
from shmarray.config import config
from shmarray.handle import wrap_stored
from shmarray.storage import Layout, Storage, _cell_starts

__all__ = ["Form", "SharedArray", "SharedStorage", "allocate", "form_of", "hold_all", "layout_of", "lease_of", "reduced", "stored"]

NDArray = np.ndarray[Any, Any]

MOST_FORMS = 512
PWRITE_NBYTES = 1 << 20  # from here on writing cold memory by a system call is cheaper than by page faults


class Form:
    """What the bytes of a lease are: shape, dtype, chunks. Kept with them, as JSON. Does not change: leases that look alike share it."""

    __slots__ = ("chunks", "counts", "dtype", "is_chunks", "meta", "shape", "slices")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: Chunks) -> None:
        self.shape = shape
        self.dtype = dtype
        self.chunks = chunks
        self.slices = tuple([slice(*ends) for ends in itertools.pairwise(starts)] for starts in _cell_starts(shape, chunks))
        self.counts = tuple(map(len, self.slices))
        self.is_chunks = self.counts == tuple(len(sizes) for sizes in chunks)  # else there were too many
        self.meta = self._dump()

    def _dump(self) -> bytes:
        axes = [n[0] if len(set(n[:-1])) <= 1 and n[-1] <= n[0] else n for n in self.chunks]  # even ones: the first says it all
        return json.dumps([np.lib.format.dtype_to_descr(self.dtype), self.shape, axes], separators=(",", ":")).encode()


def form_of(lease: Lease) -> Form:
    """Return what a lease holds."""
    form: Form | None = lease.extra
    if form is None:
        form = lease.extra = _parsed(lease.meta)
    return form


@functools.lru_cache(MOST_FORMS)
def _parsed(meta: bytes) -> Form:
    descr, shape, axes = json.loads(meta)
    dtype = np.lib.format.descr_to_dtype(_tuples(descr))
    chunks = tuple(max(axis, 1) if isinstance(axis, int) else tuple(axis) for axis in axes)
    return Form(tuple(shape), dtype, normalize_chunks(chunks, shape, dtype))


@functools.lru_cache(MOST_FORMS)
def _automatic(shape: tuple[int, ...], dtype: np.dtype[Any], chunk_size: int) -> Form:
    """Return the form with chunks that `config.chunk_size` decides."""
    return Form(shape, dtype, normalize_chunks("auto", shape, dtype))


def _tuples(descr: Any) -> Any:
    """Return a descr with the lists that JSON makes of tuples as tuples, but for lists of fields."""
    if isinstance(descr, str):
        return descr
    return [tuple(tuple(x) if isinstance(x, list) and i == 2 else _field_type(x) for i, x in enumerate(field)) for field in descr]


def _field_type(part: Any) -> Any:
    if isinstance(part, list):
        return _tuples(part) if part and isinstance(part[0], list) else tuple(part)
    return part


class SharedArray(np.ndarray[Any, Any]):
    """A NumPy array in shared memory; made by `shmarray.shared.array`, `empty`, `zeros`, `full`, `copy`.

    Pickling it, or a view of it, gives a handle of about a hundred bytes. Results of ufuncs, copies and fancy indexing are plain
    ndarrays, as are those of `numpy.memmap`.
    """

    __slots__ = ()

    def __array_wrap__(self, array: NDArray, context: Any = None, return_scalar: bool = False) -> Any:
        if array is self or lease_of(array) is not None:
            return array  # ``out=`` was shared: ``a += 1`` stays what it is
        plain = np.asarray(array)
        return plain[()] if return_scalar else plain

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _plain(super().__array_function__(func, types, args, kwargs))  # np.zeros_like(a) would look shared, and not be

    def __getitem__(self, key: Any) -> Any:
        found = np.ndarray.__getitem__(self, key)
        return found.view(np.ndarray) if type(found) is SharedArray and lease_of(found) is None else found

    def copy(self, order: Any = "C") -> Any:
        """Return an ordinary array; `shmarray.shared.copy` gives a shared one."""
        return np.array(self, order=order, subok=False)

    def __copy__(self) -> Any:
        return self.copy("K")

    def __deepcopy__(self, memo: Any) -> Any:
        return self.copy("K")

    def astype(self, dtype: Any, order: Any = "K", casting: Any = "unsafe", subok: bool = True, copy: Any = True) -> Any:
        """Return an ordinary array of another dtype; this one itself if ``copy`` is False and nothing changes."""
        found = np.ndarray.astype(self, dtype, order, casting, subok, copy)
        return found if found is self else found.view(np.ndarray)

    def flatten(self, order: Any = "C") -> Any:
        """Return an ordinary array of one axis."""
        return np.ndarray.flatten(self.view(np.ndarray), order)

    @property
    def chunks(self) -> Chunks:
        """The sizes of the chunks along each axis of the array this is, or is a view of."""
        return form_of(_lease(self)).chunks

    def lock(self, chunk: Any = None, mode: str = "w", timeout: float | None = None) -> Any:
        """Return a lock of it, or of one of its chunks; see `shmarray.shared.lock`."""
        return _lock_type[0](self, chunk, mode, timeout)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        lease = lease_of(self)
        return np.asarray(self).__reduce_ex__(protocol) if lease is None else reduced(self, lease, lease.handle())


def reduced(array: NDArray, lease: Lease, handle: bytes) -> tuple[Any, ...]:
    """Return how an array over a lease is pickled: what is to be called with which arguments."""
    form = form_of(lease)
    if array.shape == form.shape and array.dtype == form.dtype and array.flags.c_contiguous and array.flags.writeable:
        return _arrive, (handle,)
    layout = layout_of(array, lease)
    dtype = None if layout.dtype == form.dtype else layout.dtype
    return _arrive, (handle, layout.offset, layout.shape, layout.strides, dtype, array.flags.writeable)


def _plain(found: Any) -> Any:
    """Return what NumPy made, arrays with memory of their own as ordinary ones."""
    if type(found) is SharedArray:
        return found if lease_of(found) is not None else found.view(np.ndarray)
    return type(found)(map(_plain, found)) if type(found) in (tuple, list) else found


def _plain_method(name: str) -> Any:
    method = getattr(np.ndarray, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _plain(method(self, *args, **kwargs))

    return call


for _name in ("argmax", "argmin", "argpartition", "argsort", "byteswap", "choose", "compress", "dot", "repeat", "take"):
    setattr(SharedArray, _name, _plain_method(_name))  # those that do not ask __array_wrap__


_lock_type: list[Any] = []  # `shared` puts its own here, which stands above


def _arrive(
    handle: bytes, offset: int = 0, shape: Any = None, strides: Any = None, dtype: Any = None, writeable: bool = True
) -> SharedArray:
    lease = receive(handle)
    form = form_of(lease)
    found = over(lease, form.shape if shape is None else shape, form.dtype if dtype is None else dtype, offset, strides)
    if not writeable:
        found.flags.writeable = False
    return found


def over(lease: Lease, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int = 0, strides: Any = None) -> SharedArray:
    """Return an array over the bytes of a lease, which lives as long as the array or a view of it does."""
    return np.ndarray.__new__(SharedArray, shape, dtype, np.asarray(lease), offset, strides)


def lease_of(array: Any) -> Lease | None:
    """Return the lease whose bytes an array is a view of, or None."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if type(array) is Lease else None


def _lease(array: NDArray) -> Lease:
    lease = lease_of(array)
    if lease is None:
        raise TypeError(
            f"this array of shape {array.shape} has memory of its own, which is not shared: sa.shared.copy(x) gives a shared copy."
        )
    return lease


def layout_of(array: NDArray, lease: Lease) -> Layout:
    """Return where in a lease an array lies."""
    offset = array.__array_interface__["data"][0] - lease.start if array.size else 0
    return Layout(offset, array.shape, array.strides, array.dtype)


def allocate(shape: Any, dtype: Any, chunks: Any = None, segment: Segment | None = None) -> SharedArray:
    """Return a new array with whatever bytes were there, in the family's segment unless another is given."""
    dtype = np.dtype(dtype)
    if dtype.hasobject or dtype.itemsize == 0:
        raise TypeError(f"a shared array of dtype {dtype}: Python objects and elements without a size cannot lie in shared memory")
    sizes = tuple(int(n) for n in shape)
    form = _automatic(sizes, dtype, config.chunk_size) if chunks is None else Form(sizes, dtype, normalize_chunks(chunks, sizes, dtype))
    nbytes = max(1, math.prod(sizes) * dtype.itemsize)
    lease = (segment or family()).allocate(nbytes, cells=math.prod(form.counts), meta=form.meta)
    lease.extra = form
    return over(lease, sizes, dtype)


def fill(array: SharedArray, values: NDArray) -> None:
    """Copy ``values``, of any dtype that can be cast, over a new array."""
    lease = _lease(array)
    same = values.dtype == array.dtype and values.shape == array.shape and values.flags.c_contiguous
    if same and values.nbytes >= PWRITE_NBYTES and lease.is_cold():
        at, rest = lease.offset, values.reshape(-1).view(np.uint8)
        while len(rest):
            done = os.pwrite(lease.segment.data_fd, rest.data, at)
            rest, at = rest[done:], at + done
        return
    np.copyto(array.view(np.ndarray), values, casting="unsafe")


class SharedStorage(Storage):
    """The bytes of a lease as those of a stored array. Other processes write them too: nothing is lent, the bytes never move."""

    is_shared = True
    is_watched = False

    def __init__(self, lease: Lease, form: Form) -> None:
        self._stand_in(form.shape, form.dtype, form.chunks)
        self.pool = None  # type: ignore[assignment]  # of no pool: workers reach the bytes as they do the driver's own
        self.lease = lease
        self.nbytes = lease.nbytes
        self.chunks = form.chunks

    @property
    def is_spilled(self) -> bool:
        return False

    def put_back(self, layout: Layout, values: NDArray, held: Any) -> None:
        """Do nothing: `window` gave the bytes themselves."""

    def address(self, pool: Any) -> tuple[Address, Any]:
        return Address(DRIVER, self.lease.start), self.lease

    def array(self, layout: Layout) -> NDArray:
        return np.ndarray(layout.shape, layout.dtype, np.asarray(self.lease), layout.offset, layout.strides)

    def window(self, layout: Layout) -> tuple[NDArray, Any]:
        return self.array(layout), self.lease

    def lend(self, layout: Layout) -> NDArray:
        """Return a read-only copy: who else writes the bytes cannot be made to move them first."""
        with self.hold(layout, "r"):
            self.check_whole(layout)
            values = self.array(layout).copy()
        values.flags.writeable = False
        return values

    def begin_write(self, *, stays: bool = False) -> None:
        with self._mutex:
            self._writers += 1

    def requests(self, layout: Layout, mode: str) -> list[LockRequest]:
        return []  # its locks are of its segment, between processes: see `hold`

    def hold(self, layout: Layout, mode: str, timeout: float | None = None) -> Any:
        return self.hold_runs(self.touched_cells(layout), mode, timeout)

    def hold_runs(self, runs: list[tuple[int, int]], mode: str, timeout: float | None = None) -> Any:
        """Return a lock of cells that is held already; a context manager."""
        return self.lease.lock(runs, mode, timeout)


class WatchedStorage(SharedStorage):
    """The same, of an array that somebody else works on: it is read as it is at that moment, without a lock, and never written.

    A lock to read would have the other side wait for a watcher that was stopped.
    """

    is_watched = True

    def hold_runs(self, runs: list[tuple[int, int]], mode: str, timeout: float | None = None) -> Any:
        if mode == "w":
            raise ValueError(
                f"assignment destination is read-only: this array of shape {self.shape} was attached to be watched. To write it, open it "
                f"with sa.attach(name, writeable=True), or with sa.shared.Store(name)."
            )
        return contextlib.nullcontext()


def storage_of(lease: Lease) -> SharedStorage:
    """Return the storage over a lease: one at a time, so that all arrays over it have its versions and marks."""
    storage: SharedStorage | None = lease.memo() if lease.memo is not None else None
    if storage is None:
        storage = SharedStorage(lease, form_of(lease))
        lease.memo = weakref.ref(storage)  # weak, as it holds the lease
    return storage


def stored(array: NDArray, chunks: Any = None, watched: bool = False) -> Any:
    """Return a stored lazy `Array` over the memory of a shared array, without copying. It reads whatever is there when computed.

    ``watched``: takes no locks, and cannot be written.
    """
    lease = _lease(array)
    storage = WatchedStorage(lease, form_of(lease)) if watched else storage_of(lease)
    layout = layout_of(array, lease)
    if chunks is None:
        sizes = storage.chunks if layout == storage.layout else normalize_chunks("auto", layout.shape, layout.dtype)
    else:
        sizes = normalize_chunks(chunks, layout.shape, layout.dtype)
    return wrap_stored(storage, layout, sizes, live=True)


def view_of_storage(storage: SharedStorage, layout: Layout) -> SharedArray:
    """Return the array that a stored `Array` over shared memory is."""
    found = over(storage.lease, layout.shape, layout.dtype, layout.offset, layout.strides)
    if storage.is_watched:
        found.flags.writeable = False
    return found


def hold_all(uses: Iterable[tuple[Storage, Layout, str]]) -> Any:
    """Return a lock of all parts of storages, to read or to write, that is held already; between processes where they are shared."""
    requests: list[LockRequest] = []
    shared: dict[SharedStorage, tuple[set[tuple[int, int]], set[str]]] = {}
    for storage, layout, mode in uses:
        if isinstance(storage, SharedStorage):
            runs, modes = shared.setdefault(storage, (set(), set()))
            runs.update(storage.touched_cells(layout))
            modes.add(mode)
        else:
            requests.extend(storage.requests(layout, mode))
    return _hold_shared(requests, shared) if shared else process_locks().acquire(requests)


@contextlib.contextmanager
def _hold_shared(requests: list[LockRequest], shared: dict[SharedStorage, tuple[set[tuple[int, int]], set[str]]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if requests:
            stack.enter_context(process_locks().acquire(requests))
        for storage in sorted(shared, key=lambda s: (s.lease.segment.uuid, s.lease.number)):  # in one order, everywhere
            runs, modes = shared[storage]
            # What is read and written is locked to write at once: a reader who then wants to write would wait for another such.
            stack.enter_context(storage.hold_runs(sorted(runs), "w" if "w" in modes else "r"))
        yield
