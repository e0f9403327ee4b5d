"""The values of a store as records: arrays by where they lie, numbers and text as they are, the rest pickled.

Promises: what is needed to reach or to describe arrays, numbers, text and bytes is data; a pickle is loaded only when its own value is
asked for. Shared arrays within a pickled value are held by the record, not copied. Relies on `shared_memory` and `scheduler.journal`.
Never put here: names, changes, locks (`store`).

    kind                payload
    PLAIN               JSON: None, bool, int, float, str
    BYTES               the bytes
    NUMBER              a NumPy scalar: its dtype as JSON, a zero, its bytes
    ARRAY, and those    JSON: dtype, shape, strides, offset, writeable; the first object has the bytes
      registered
    PICKLE              a pickle, whose handles of shared memory are good as long as the objects are held
    ... | LARGE         how many bytes, as 8 of them; the first object has them
"""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from scheduler.journal import Record
from scheduler.shared import Lease, Segment
from shmarray.handle import Handle
from shmarray.shared_memory import SharedArray, _tuples, allocate, fill, form_of, layout_of, lease_of, over, reduced

__all__ = ["Item", "Rooted", "array_of", "describe", "is_over_array", "kind_of", "pack", "register", "unpack"]

NDArray = np.ndarray[Any, Any]

PLAIN, BYTES, NUMBER, ARRAY, PICKLE = range(5)
FIRST_REGISTERED = 8
LARGE = 0x80
LARGE_NBYTES = 2048  # from here on a payload has memory of its own: the journal is copied now and then
LENGTH = struct.Struct("<Q")
_COPIED_KINDS = (np.ndarray, np.memmap, SharedArray)  # masked arrays and the like are pickled: their other parts would be lost


class Rooted(Protocol):
    """What stands for a collection: it can be in a store of the same segment, by its root."""

    @classmethod
    def _over(cls, lease: Lease) -> Any: ...

    def _root(self) -> Lease: ...

    def _reduced(self, handle: bytes) -> tuple[Any, ...]: ...


@dataclass(frozen=True, slots=True)
class _OverArray:
    """A registered kind that is an array underneath, such as `shared.Value`: of the array, from the array."""

    name: str
    array: Callable[[Any], SharedArray]
    made: Callable[[SharedArray], Any]


_over_array: dict[type, tuple[int, _OverArray]] = {}
_rooted: dict[type, int] = {}
_by_kind: dict[int, Any] = {}


def register(cls: type, kind: int, array: Any = None, made: Any = None) -> None:
    """Name a type of values over one array (with ``array(value)`` and ``made(array)``), or over a collection; ``kind`` lies in stores."""
    assert FIRST_REGISTERED <= kind < LARGE and kind not in _by_kind
    if array is None:
        _rooted[cls] = kind
        _by_kind[kind] = cls
    else:
        _over_array[cls] = kind, _OverArray(getattr(cls, "kind_told", f"shared.{cls.__name__}"), array, made)
        _by_kind[kind] = _over_array[cls][1]


@dataclass(frozen=True, slots=True)
class Item:
    """A value, packed: what a record needs, and the leases that the packer holds until the record is published."""

    kind: int
    payload: bytes
    leases: tuple[Lease, ...] = ()

    def record(self, op: int, key: str = "", argument: int = 0) -> Record:
        """Return the record that sets it."""
        return Record(op, key, argument, self.kind, tuple((x.number, x.generation) for x in self.leases), self.payload)


def kind_of(record: Record) -> int:
    """Return the kind of the value of a record."""
    return record.kind & ~LARGE


# --- packing ----------------------------------------------------------------------------------------------------------------------


def pack(value: Any, segment: Segment) -> Item:
    """Return a value, packed for a store in ``segment``: an array is copied, once, unless it lies there already.

    Raises what pickling raises; TypeError for a store or list of another family of processes.
    """
    if isinstance(value, Handle):
        value = value.shared()  # type: ignore[attr-defined]  # every Handle is an Array
    cls = type(value)
    if value is None or cls in (bool, float, str) or (cls is int and -(1 << 63) <= value < 1 << 63):
        return _large(PLAIN, json.dumps(value).encode(), (), segment)
    if cls is bytes:
        return _large(BYTES, value, (), segment)
    if isinstance(value, np.generic) and value.dtype.kind in "biufcmM":
        return Item(NUMBER, _described(value.dtype) + b"\0" + value.tobytes())
    if cls in _COPIED_KINDS and not value.dtype.hasobject and value.dtype.itemsize:
        return _array(ARRAY, value, segment)
    if cls in _over_array:
        kind, how = _over_array[cls]
        return _array(kind, how.array(value), segment)
    if cls in _rooted:
        return Item(_rooted[cls], b"", (_root(value, segment),))
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, segment)
    pickler.dump(value)
    return _large(PICKLE, buffer.getvalue(), tuple(pickler.leases), segment)


def _array(kind: int, value: NDArray, segment: Segment) -> Item:
    array = _inside(value, segment)
    lease = lease_of(array)
    assert lease is not None
    layout = layout_of(array, lease)
    form = [layout.shape, layout.strides, layout.offset, bool(array.flags.writeable)]
    return Item(kind, _described(layout.dtype) + b"\0" + json.dumps(form, separators=(",", ":")).encode(), (lease,))


def _inside(array: NDArray, segment: Segment) -> SharedArray:
    """Return the array itself if it lies in ``segment``, else a copy that does."""
    lease = lease_of(array)
    if lease is not None and lease.segment is segment and isinstance(array, SharedArray):
        return array
    chunks = None
    if lease is not None and form_of(lease).shape == array.shape:
        chunks = form_of(lease).chunks
    made = allocate(array.shape, array.dtype, chunks, segment)
    fill(made, np.asarray(array))
    return made


def _root(value: Rooted, segment: Segment) -> Lease:
    lease = value._root()
    if lease.segment is not segment:
        raise TypeError(
            f"storing {value!r} in a store of another family of processes: what keeps one alive is known in its own family only. Store its "
            f"contents, dict(...) or list(...), or make it in the process that made the store."
        )
    return lease


def _large(kind: int, payload: bytes, leases: tuple[Lease, ...], segment: Segment) -> Item:
    if len(payload) < LARGE_NBYTES:
        return Item(kind, payload, leases)
    lease = segment.allocate(len(payload))
    np.asarray(lease)[:] = np.frombuffer(payload, np.uint8)
    return Item(kind | LARGE, LENGTH.pack(len(payload)), (lease, *leases))


def _described(dtype: np.dtype[Any]) -> bytes:
    return json.dumps(np.lib.format.dtype_to_descr(dtype), separators=(",", ":")).encode()


class _Pickler(pickle.Pickler):
    """Pickles what is in a value, but of shared arrays, stores and lists handles that keep nothing: the record does."""

    def __init__(self, file: Any, segment: Segment) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._segment = segment
        self.leases: list[Lease] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, SharedArray) and lease_of(obj) is not None:
            array = _inside(obj, self._segment)
            lease = lease_of(array)
            assert lease is not None
            self._keep(lease)
            return reduced(array, lease, lease.reference())
        if type(obj) in _rooted:
            lease = _root(obj, self._segment)
            self._keep(lease)
            return obj._reduced(lease.reference())
        return NotImplemented

    def _keep(self, lease: Lease) -> None:
        if lease not in self.leases:
            self.leases.append(lease)


# --- unpacking --------------------------------------------------------------------------------------------------------------------


def unpack(record: Record, leases: list[Lease]) -> Any:
    """Return the value of a record, of whose objects ``leases`` are."""
    kind, payload = kind_of(record), record.payload
    if record.kind & LARGE:
        payload = np.asarray(leases[0]).tobytes()
    if kind == PLAIN:
        return json.loads(payload)
    if kind == BYTES:
        return payload
    if kind == NUMBER:
        dtype, rest = _parsed_dtype(payload)
        return np.frombuffer(rest, dtype)[0]
    if kind == PICKLE:
        return pickle.loads(payload)
    if kind == ARRAY:
        return array_of(record, leases[0])
    how = _by_kind.get(kind)
    if how is None:
        raise ValueError(f"{record.key!r} is of a kind, {kind}, that this version of shmarray does not know: use one version everywhere")
    return how.made(array_of(record, leases[0])) if isinstance(how, _OverArray) else how._over(leases[0])


def is_over_array(record: Record) -> bool:
    """Return whether the value of a record is an array, or of a registered kind over one."""
    return kind_of(record) == ARRAY or isinstance(_by_kind.get(kind_of(record)), _OverArray)


def array_of(record: Record, lease: Lease) -> SharedArray:
    """Return the array that a record describes, over the lease of its first object."""
    dtype, rest = _parsed_dtype(record.payload)
    shape, strides, offset, writeable = json.loads(rest)
    found = over(lease, tuple(shape), dtype, offset, tuple(strides))
    if not writeable:
        found.flags.writeable = False
    return found


def _parsed_dtype(payload: bytes) -> tuple[np.dtype[Any], bytes]:
    descr, _, rest = payload.partition(b"\0")
    return np.lib.format.descr_to_dtype(_tuples(json.loads(descr))), rest


def describe(record: Record) -> tuple[str, tuple[int, ...] | None, np.dtype[Any] | None, int | None]:
    """Return what a record holds, without loading it: a word, shape, dtype, bytes; None where it has none, or nobody counts them."""
    kind = kind_of(record)
    if kind == NUMBER:
        dtype, rest = _parsed_dtype(record.payload)
        return "number", (), dtype, len(rest)
    if kind in (PLAIN, BYTES, PICKLE):
        nbytes = LENGTH.unpack(record.payload)[0] if record.kind & LARGE else len(record.payload)
        return ("value", "bytes", "", "", "object")[kind], None, None, nbytes
    how = _by_kind.get(kind)
    if is_over_array(record):
        dtype, rest = _parsed_dtype(record.payload)
        shape = tuple(json.loads(rest)[0])
        word = how.name if isinstance(how, _OverArray) else "array"
        return word, shape, dtype, int(np.prod(shape, dtype=object)) * dtype.itemsize
    return getattr(how, "__name__", "unknown").lower(), None, None, None
