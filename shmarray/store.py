"""Names for what processes share: `Store`, a mapping that several of them open, also unrelated ones; `List`; `attach`, to watch one.

    with shared.Store("run42", create=True) as store:       # a simulation
        store["temperature"] = a                            # the same memory from here on, not a copy
    sa.attach("run42")["temperature"].mean().compute()      # a notebook

Promises: a change is one step for all processes; what is got is live memory where it is an array, and a value where it is not; nothing is
loaded that was not asked for; a store ends with its last user. Relies on `scheduler.collection` and `scheduler.rendezvous`.
Never put here: how values are written down (`packing`), who owns the memory (`scheduler`).
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import sys
import time
import weakref
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence, ValuesView
from dataclasses import replace
from typing import Any, Self, SupportsIndex, TypeVar

from scheduler import rendezvous
from scheduler.collection import Collection
from scheduler.errors import HandleExpired
from scheduler.journal import APPEND, CLEAR, DELETE, DELETE_AT, INSERT, NUMBER, SET, SET_AT, Record, State
from scheduler.limits import format_bytes
from scheduler.shared import START_BITS, Lease, family, identity_of, is_alive, receive
from shmarray.packing import FIRST_REGISTERED, Item, array_of, describe, is_over_array, pack, register, unpack
from shmarray.publish import Published
from shmarray.shared_memory import SharedArray, _lock_type, allocate, stored

__all__ = ["Attached", "List", "Store", "attach", "stores"]

STORE, LIST = FIRST_REGISTERED, FIRST_REGISTERED + 1
LOCKS = 4096  # names that can be locked without holding an array
LOCKS_NAME = ""  # under which the array of their cells is kept
SHORTEST_POLL_S, LONGEST_POLL_S = 0.0001, 0.005
LOOK_FOR_USERS_S = 0.25
_MISSING = object()
T = TypeVar("T")


class List(MutableSequence[Any]):
    """A list that processes share: made by `Store.list`, or of values; it travels by pickle as a handle.

    What `multiprocessing.Manager().list()` is, without its process. Items are values: changing one that was got changes the list only when
    it is a shared array, or when it is set again. Each call is one step for all processes: `append` of several at once lose nothing, and of
    a process that is killed in it the item is there whole, or not. `sort` and `remove` look at the items before they change the list, and
    begin again when another process has changed it meanwhile. ``+``, ``*`` and `copy` give ordinary lists, as those of a manager's do.

    >>> from shmarray import shared
    >>> log = shared.List(["begin"])
    >>> log.append({"step": 1})
    >>> log[-1], len(log)
    ({'step': 1}, 2)
    """

    __slots__ = ("__weakref__", "_collection")

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self._collection = Collection.found(family(), _meta("list"))
        self.extend(values)

    @classmethod
    def _over(cls, lease: Lease) -> List:
        made = cls.__new__(cls)
        made._collection = Collection.of(lease)
        return made

    def _root(self) -> Lease:
        return self._collection.lease

    def _reduced(self, handle: bytes) -> tuple[Any, ...]:
        return _list_again, (handle,)

    def __reduce__(self) -> Any:
        return self._reduced(self._root().handle())

    def __len__(self) -> int:
        return self._collection.read(lambda state: len(state.items))

    def __getitem__(self, index: Any) -> Any:
        """Return an item, or of a slice a list of those that were there at one time. Raises IndexError."""
        if isinstance(index, slice):
            return self._values(lambda state: state.items[index].tolist())
        return self._values(lambda state: [state.items[_place(index, state, "index")]])[0]

    def _values(self, find: Any) -> list[Any]:
        while True:
            found = []
            for record in self._collection.records(find):
                leases = self._collection.leases(record)
                if leases is None:
                    break  # taken out meanwhile
                found.append(unpack(record, leases))
            else:
                return found

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items that are there now."""
        return iter(self[:])

    def __reversed__(self) -> Iterator[Any]:
        return iter(self[::-1])

    def copy(self) -> list[Any]:
        """Return the items that are there now, as an ordinary list."""
        values: list[Any] = self[:]
        return values

    def index(self, value: Any, start: int = 0, stop: int = sys.maxsize) -> int:
        """Return the place of the first such item of those that are there now. Raises ValueError when there is none."""
        return self.copy().index(value, start, stop)

    def __add__(self, other: Any) -> list[Any]:
        return [*self, *other] if isinstance(other, (list, List)) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> list[Any]:
        return self.copy() * times

    __rmul__ = __mul__

    def _pack(self, values: Iterable[Any]) -> list[Item]:
        return [pack(value, self._collection.segment) for value in values]

    def append(self, value: Any) -> None:
        """Add an item at the end. Of several processes that do so at once all items arrive."""
        self.extend((value,))

    def extend(self, values: Iterable[Any]) -> None:
        """Add items at the end, all in one step: those of others do not come between them."""
        items = self._pack(values)
        self._collection.change(lambda _: ([item.record(APPEND) for item in items], None))

    def insert(self, index: int, value: Any) -> None:
        """Add an item before that at ``index``."""
        (item,) = self._pack((value,))

        def decide(state: State) -> tuple[list[Record], None]:
            n = len(state.items)
            place = min(max(index + n if index < 0 else index, 0), n)
            return [item.record(INSERT, argument=place)], None

        self._collection.change(decide)

    def __setitem__(self, index: Any, value: Any) -> None:
        items = self._pack(value if isinstance(index, slice) else (value,))

        def decide(state: State) -> tuple[list[Record], None]:
            if not isinstance(index, slice):
                return [items[0].record(SET_AT, argument=_place(index, state, "assignment index"))], None
            places = range(*index.indices(len(state.items)))
            if places.step != 1 and len(places) != len(items):
                raise ValueError(f"attempt to assign sequence of size {len(items)} to extended slice of size {len(places)}")
            if places.step != 1:
                return [item.record(SET_AT, argument=place) for item, place in zip(items, places, strict=True)], None
            taken = [Record(DELETE_AT, argument=places.start)] * len(places)
            return [*taken, *(item.record(INSERT, argument=place) for place, item in enumerate(items, places.start))], None

        self._collection.change(decide)

    def __delitem__(self, index: Any) -> None:
        def decide(state: State) -> tuple[list[Record], None]:
            if not isinstance(index, slice):
                return [Record(DELETE_AT, argument=_place(index, state, "assignment index"))], None
            places = sorted(range(*index.indices(len(state.items))), reverse=True)
            return [Record(CLEAR)] if len(places) == len(state.items) else [Record(DELETE_AT, argument=place) for place in places], None

        self._collection.change(decide)

    def pop(self, index: int = -1) -> Any:
        """Take an item out and return it: of several processes one gets it. Raises IndexError."""

        def decide(state: State) -> tuple[list[Record], tuple[Record, list[Lease]]]:
            if not state.items:
                raise IndexError("pop from empty list")
            place = _place(index, state, "pop index")
            return [Record(DELETE_AT, argument=place)], self._collection.taken(state, state.items[place])

        return unpack(*self._collection.change(decide))

    def clear(self) -> None:
        """Take all items out."""
        self._collection.change(lambda state: ([Record(CLEAR)] if state.items else [], None))

    def __imul__(self, times: SupportsIndex) -> Self:
        more = operator.index(times) - 1
        if more < 0:
            self.clear()
        else:
            self._collection.change(lambda state: (self._again(state, [*state.items] * more), None))
        return self

    def reverse(self) -> None:
        """Turn the order of the items round; writes the list again."""
        self._collection.change(lambda state: ([Record(CLEAR), *self._again(state, state.items[::-1])], None))

    def remove(self, value: Any) -> None:
        """Take the first such item out. Raises ValueError when there is none."""
        self._look_and_change(lambda values: values.index(value), lambda _, place: [Record(DELETE_AT, argument=place)])

    def sort(self, *, key: Callable[[Any], Any] | None = None, reverse: bool = False) -> None:
        """Bring the items into order, equal ones in the order that they had; writes the list again. ``key`` is called in this process."""

        def order(values: list[Any]) -> list[int]:
            keys = values if key is None else [key(value) for value in values]
            return sorted(range(len(values)), key=keys.__getitem__, reverse=reverse)

        self._look_and_change(order, lambda state, places: [Record(CLEAR), *self._again(state, [state.items[place] for place in places])])

    def _again(self, state: State, positions: Iterable[int]) -> list[Record]:
        """Return records that append, once more, what is at some positions."""
        return [replace(self._collection.there(state, position), op=APPEND, argument=0) for position in positions]

    def _look_and_change(self, look: Callable[[list[Any]], T], change: Callable[[State, T], list[Record]]) -> None:
        """Publish ``change(state, look(values))`` in one step, if nobody has changed the list since; else begin again.

        ``look`` is the user's code, for one that compares items: under the lock of the table it has no place.
        """
        done = False
        while not done:
            tail = self._collection.tail  # before the values: what changes after this is noticed
            found = look(self[:])

            def decide(state: State, tail: int = tail, found: T = found) -> tuple[list[Record], bool]:
                return (change(state, found), True) if self._collection.tail == tail else ([], False)

            done = self._collection.change(decide)

    def __eq__(self, other: object) -> bool:
        return self[:] == (other[:] if isinstance(other, List) else other) if isinstance(other, (list, List)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of any list

    def __repr__(self) -> str:
        n = len(self)
        return f"shared.List({self[:]!r})" if n <= 20 else f"<shared.List of {n} items>"


def _place(index: Any, state: State, what: str) -> int:
    n = len(state.items)
    try:
        place = operator.index(index)
    except TypeError:
        raise TypeError(f"shared list indices must be integers or slices, not {type(index).__name__}") from None
    place += n if place < 0 else 0
    if not 0 <= place < n:
        raise IndexError(f"shared list {what} {index} out of range: it has {n} items")
    return int(place)


def _list_again(handle: bytes) -> List:
    return List._over(receive(handle))


class _Items(ItemsView[str, Any]):
    """Those that are there: a name that another process takes out meanwhile is left out."""

    _mapping: Store

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name in self._mapping:
            with contextlib.suppress(KeyError):
                yield name, self._mapping[name]


class _Values(ValuesView[Any]):
    """The same, of values."""

    _mapping: Store

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in _Items(self._mapping))


class Store(MutableMapping[str, Any]):
    """Arrays, numbers, lists and small picklable objects by name, that several processes read and change: all see the same.

    ``Store(name, create=True)`` makes one that other processes of this user open with ``Store(name)``, related or not. Without a name it is
    passed on like anything of `shmarray.shared`: as an argument of a process, through queues and pipes.

    An array is stored as the memory it is: what one process writes into ``store["x"]`` the others read. An array that does not lie in the
    store's memory (of NumPy, of another family of processes) is copied into it, once: use ``store["x"]`` from then on. Lazy arrays are
    computed into it. Everything else is a value: pickled when set, unpickled when got, so that ``store["d"]["k"] = 1`` changes a copy.

    It ends with its last user. Names are served by the process that created it: when that has ended, or closed it, those who have opened it
    go on, and nobody else can join.

    Raises FileExistsError when ``create`` meets a living store of that name (with ``exist_ok``, that is opened), FileNotFoundError when
    there is none to open, ValueError for what is no name: 64 letters, digits, ".", "_", "-".

    >>> from shmarray import shared
    >>> import numpy as np
    >>> with shared.Store("docs-example", create=True) as store:
    ...     store["temperature"] = np.zeros((2, 3))
    ...     store["step"] = 7
    ...     shared.Store("docs-example")["temperature"][0] = 20
    ...     print(store["temperature"].sum(), store["step"], list(store))
    60.0 7 ['temperature', 'step']
    """

    __slots__ = ("__weakref__", "_close_server", "_collection", "name")

    def __init__(self, name: str | None = None, create: bool = False, *, exist_ok: bool = False) -> None:
        self.name = name
        self._collection: Collection | None = None
        self._close_server: Any = None
        if exist_ok and (name is None or not create):
            raise ValueError(
                f"Store({name!r}, exist_ok=True): exist_ok says what to do when one is to be made of a name that there is already. Say "
                f"Store(name, create=True, exist_ok=True) to make or open it, Store(name) to open it."
            )
        if name is None:
            self._collection = Collection.found(family(), _meta("store"))
            return
        rendezvous.check_name(name)
        if not create:
            self._collection = _open(name)
        elif not exist_ok:
            self._create(name)
        else:
            self._open_or_create(name)

    def _create(self, name: str) -> None:
        collection = Collection.found(family(), _meta("store", name))
        server = rendezvous.Server(name, collection.lease.reference())
        self._collection = collection
        self._close_server = weakref.finalize(self, server.close)

    def _open_or_create(self, name: str) -> None:
        while True:  # somebody else may make or end it between the two
            try:
                self._collection = _open(name)
                return
            except FileNotFoundError:
                pass
            with contextlib.suppress(FileExistsError):
                self._create(name)
                return

    @classmethod
    def _over(cls, lease: Lease, name: str | None = None) -> Store:
        made = cls.__new__(cls)
        made._collection = Collection.of(lease)
        made._close_server = None
        made.name = name or json.loads(lease.meta).get("name")
        return made

    def _root(self) -> Lease:
        return self._live.lease

    def _reduced(self, handle: bytes) -> tuple[Any, ...]:
        return _store_again, (handle,)

    def __reduce__(self) -> Any:
        return self._reduced(self._root().handle())

    @property
    def _live(self) -> Collection:
        if self._collection is None:
            raise ValueError(f"{self._told()} was closed here; open it again, or keep what it held: arrays that were got stay good")
        return self._collection

    def _told(self) -> str:
        return "a store without a name" if self.name is None else f"store {self.name!r}"

    # --- its end ------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of it; the last process that does so frees what it holds. Arrays that were got stay good. Calling it again does nothing.

        Of the process that created it: nobody can open it by name from now on.
        """
        if self._close_server is not None:
            self._close_server()
        self._collection = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading ------------------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        """Return the array, the same memory for all; the shared Value, Array, List or Store; else a copy of the value. Raises KeyError."""
        return self._got(_checked(key))

    def _got(self, key: str) -> Any:
        collection, refused = self._live, None
        while True:
            record = collection.record(lambda state: state.names[key])
            leases = collection.leases(record)
            if leases is not None:
                return unpack(record, leases)
            assert record != refused, f"what {key!r} names was freed"
            refused = record  # it was set anew, or taken out, meanwhile

    def __contains__(self, key: object) -> bool:
        return self._live.read(lambda state: key in state.names and key != LOCKS_NAME)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names that are there now, in the order in which they were first set."""
        return iter(self._live.read(lambda state: [name for name in state.names if name != LOCKS_NAME]))

    def __len__(self) -> int:
        return self._live.read(lambda state: len(state.names) - (LOCKS_NAME in state.names))

    def items(self) -> ItemsView[str, Any]:
        """Return a view of (name, value); iterating leaves out what is taken out meanwhile."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """Return a view of the values; iterating leaves out what is taken out meanwhile."""
        return _Values(self)

    def copy(self) -> dict[str, Any]:
        """Return an ordinary dict of what is there; the arrays in it are the shared ones."""
        return dict(self.items())

    __eq__ = object.__eq__  # of mappings it would compare arrays
    __hash__ = object.__hash__

    def describe(self) -> list[tuple[str, str, Any, Any, int | None]]:
        """Return (name, kind, shape, dtype, bytes) of all, without loading any: None where a value has no shape or dtype."""
        found = self._live.records(lambda state: list(state.names.values()))
        return [(record.key, *describe(record)) for record in found if record.key != LOCKS_NAME]

    def __repr__(self) -> str:
        if self._collection is None:
            return f"<shared.Store, closed: {self._told()}>"
        lines = [f"  {_line(*row)}" for row in self.describe()]
        return "\n".join(
            [f"<shared.Store {self.name!r}: {len(lines)} names>" if self.name else f"<shared.Store: {len(lines)} names>", *lines]
        )

    # --- changing -----------------------------------------------------------------------------------------------------------------

    def __setitem__(self, key: str, value: Any) -> None:
        """Store a value under a name, for all processes. See the class for what is copied."""
        self.update({key: value})

    def update(self, other: Any = (), /, **named: Any) -> None:
        """Store several values, of a mapping, pairs, or keyword arguments, all in one step."""
        values = dict(other, **named)
        items = [(_checked(key), pack(value, self._live.segment)) for key, value in values.items()]
        self._live.change(lambda _: ([item.record(SET, key) for key, item in items], None))

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value of a name; store ``default`` first if there is none. Of several processes one stores it."""
        while key not in self:
            item = pack(default, self._live.segment)
            self._live.change(lambda state, item=item: ([] if key in state.names else [item.record(SET, _checked(key))], None))  # type: ignore[misc]  # a default
            with contextlib.suppress(KeyError):
                return self[key]
        return self[key]

    def __delitem__(self, key: str) -> None:
        def decide(state: State) -> tuple[list[Record], None]:
            state.names[_checked(key)]
            return [Record(DELETE, key)], None

        self._live.change(decide)

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        """Take a name out and return its value: of several processes one gets it. Without a default raises KeyError."""
        found = self._taken(lambda state: _checked(key) if key in state.names else None)
        if found is not None:
            return found[1]
        if default is _MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[str, Any]:
        """Take the name that was set last out, and return it with its value. Raises KeyError when there is none."""
        found = self._taken(lambda state: next((name for name in reversed(state.names) if name != LOCKS_NAME), None))
        if found is None:
            raise KeyError(f"popitem(): {self._told()} is empty")
        return found

    def _taken(self, choose: Any) -> tuple[str, Any] | None:
        collection = self._live

        def decide(state: State) -> tuple[list[Record], Any]:
            name = choose(state)
            return ([], None) if name is None else ([Record(DELETE, name)], collection.taken(state, state.names[name]))

        found = collection.change(decide)
        return None if found is None else (found[0].key, unpack(*found))

    def clear(self) -> None:
        """Take all names out."""
        self._live.change(lambda state: ([Record(DELETE, name) for name in state.names if name != LOCKS_NAME], None))

    # --- lists, locks, waiting ------------------------------------------------------------------------------------------------------

    def list(self, key: str) -> List:
        """Return the shared `List` of that name, which is made when there is none. Raises TypeError when something else has the name."""
        made: List | None = None
        while True:
            with contextlib.suppress(KeyError):
                found = self[key]
                if isinstance(found, List):
                    return found
                raise TypeError(
                    f"{self._told()} has a {type(found).__name__} under {key!r}, no list: take another name, or take it out first"
                )
            if made is None:
                made = List._over(Collection.found(self._live.segment, _meta("list", key)).lease)
            item = pack(made, self._live.segment)
            self._live.change(lambda state, item=item: ([] if key in state.names else [item.record(SET, _checked(key))], None))  # type: ignore[misc]  # a default

    def lock(self, key: str, mode: str = "w", timeout: float | None = None) -> Any:
        """Return a `Lock` for what the name stands for, for ``with``: one at a time among all processes and threads.

        Of an array, `Value` or `Array` it is their own lock, and ``with`` gives the array. Of other values, and of names that are not
        there yet, it is one of the name alone. Reading and setting do not wait for it: it is for those who take it. ``mode``, ``timeout``:
        as in `shmarray.shared.lock`. When its holder is killed the next one is told once, by AbandonedLockError.

        >>> from shmarray import shared
        >>> store = shared.Store()
        >>> with store.lock("counter"):
        ...     store["counter"] = store.get("counter", 0) + 1
        """
        _checked(key)
        with contextlib.suppress(KeyError):
            array = self._array_of(key)
            if array is not None:
                return _lock_type[0](array, None, mode, timeout)
        number = self._live.read(lambda state: state.numbers.get(key))
        if number is None:
            number = self._numbered(key)
        return _lock_type[0](self._got(LOCKS_NAME), number, mode, timeout)

    def _array_of(self, key: str) -> SharedArray | None:
        """Return the array that a name stands for, also that of a Value or Array; None when it is something else. Nothing is unpickled."""
        while True:
            record = self._live.record(lambda state: state.names[key])
            if not is_over_array(record):
                return None
            leases = self._live.leases(record)
            if leases is not None:
                return array_of(record, leases[0])

    def _numbered(self, key: str) -> int:
        made = allocate((LOCKS,), "u1", 1, self._live.segment)
        item = pack(made, self._live.segment)

        def decide(state: State) -> tuple[list[Record], int]:
            records = [] if LOCKS_NAME in state.names else [item.record(SET, LOCKS_NAME)]
            number = state.numbers.get(key, len(state.numbers))
            if number == LOCKS:
                raise ValueError(
                    f"locking {key!r}: {LOCKS} other names of {self._told()} were locked, and that is the most. Lock arrays instead."
                )
            return [*records, Record(NUMBER, key, number)] if key not in state.numbers else records, number

        return self._live.change(decide)

    def wait(self, key: str, timeout: float | None = None) -> Any:
        """Return the value of a name as soon as it is there.

        Looks again after 0.1 ms at first and 5 ms at last. Raises TimeoutError after ``timeout`` seconds; EOFError when the process that
        created the store has gone and no other one uses it, so that nobody is left who could set it; ValueError when it is closed here.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause_s, looked, tail = SHORTEST_POLL_S, time.monotonic(), -1
        while True:
            now_tail = self._live.tail
            if now_tail != tail:
                tail = now_tail
                with contextlib.suppress(KeyError):
                    return self[key]
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                there = ", ".join(list(self)[:20]) or "nothing"
                raise TimeoutError(f"waiting {timeout:g} s for {key!r} in {self._told()}: nobody has set it. There is: {there}")
            if now - looked > LOOK_FOR_USERS_S:
                looked = now
                self._check_for_others(key)
            time.sleep(pause_s if deadline is None else min(pause_s, deadline - now))
            pause_s = min(1.5 * pause_s, LONGEST_POLL_S)

    def _check_for_others(self, key: str) -> None:
        maker = json.loads(self._root().meta)["maker"]
        if not is_alive(maker) and not self._live.is_used_by_others():
            raise EOFError(
                f"waiting for {key!r} in {self._told()}: process {maker >> START_BITS}, which created it, has ended, and no other one "
                f"uses it. Nobody is left who could set it."
            )


def _meta(kind: str, name: str | None = None) -> bytes:
    return json.dumps({"kind": kind, "name": name, "maker": identity_of(os.getpid())}).encode()


def _checked(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"names in a store are str; got {key!r}")
    if not key:
        raise ValueError("the name of a value in a store is not empty")
    return key


def _store_again(handle: bytes) -> Store:
    return Store._over(receive(handle))


def _open(name: str) -> Collection:
    answer, pid = rendezvous.ask(name)
    try:
        return Collection.of(receive(answer))
    except HandleExpired as error:
        raise FileNotFoundError(f"opening store {name!r}: process {pid} was just closing it") from error


register(Store, STORE)
register(List, LIST)


# --- watching ---------------------------------------------------------------------------------------------------------------------


class Attached(Mapping[str, Any]):
    """What `attach` gives: the names of a store, its arrays as lazy ones that read whatever is there when they are computed."""

    __slots__ = ("_consistent", "_store", "_writeable")

    def __init__(self, store: Store, writeable: bool = False, consistent: bool = False) -> None:
        self._store = store
        self._writeable = writeable
        self._consistent = consistent

    @property
    def name(self) -> str | None:
        """The name of the store."""
        return self._store.name

    def __getitem__(self, key: str) -> Any:
        """Return the lazy `Array` over an array, a `Value` (without axes), an `Array`, a field of a simulation; of a list a copy;
        else the value.
        """
        array = self._store._array_of(_checked(key))
        if array is not None:
            value = self._store[key]
            if isinstance(value, Published):
                return value.lazy(self._consistent)
            return stored(array, watched=not self._writeable)
        value = self._store[key]
        if isinstance(value, SharedArray):
            return self[key]  # it was set meanwhile
        if isinstance(value, Store):
            return Attached(value, self._writeable, self._consistent)
        return value if self._writeable or not isinstance(value, List) else value[:]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def wait(self, key: str, timeout: float | None = None) -> Any:
        """Return what a name stands for as soon as it is there; see `Store.wait`."""
        self._store.wait(key, timeout)
        return self[key]

    def close(self) -> None:
        """Let go of the store. Arrays that were got stay good."""
        self._store.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        if self._store._collection is None:
            return f"<sa.attach({self.name!r}), closed>"
        mode = "writeable" if self._writeable else "read-only"
        return "\n".join(
            [f"<sa.attach({self.name!r}), {mode}: {len(self)} names>", *(f"  {_line(*row)}" for row in self._store.describe())]
        )


def attach(name: str, *, writeable: bool = False, consistent: bool = False, timeout: float | None = None) -> Attached:
    """Return the arrays of the store ``name`` of another process, as lazy `Array`s over its memory: nothing is copied.

    They are live: each `compute()` reads what is there then. Unless ``writeable`` they cannot be written, and reading takes no lock, so
    that a notebook that is stopped holds nothing up; what is being written meanwhile is read half old, half new. With ``writeable``,
    computing locks chunks as it does in the other process. ``timeout``: how many seconds to wait for the store to be made.

    Fields that `iterate` publishes are read in whole cells instead, never half old and half new: each `compute()` asks the simulation for
    the cells it needs, waits for up to 0.2 s, and copies them; nothing that a reader does holds the simulation up. ``consistent``: all that
    one `compute()` reads of it is of one step.

    Raises FileNotFoundError when there is none.

    >>> import numpy as np, shmarray as sa
    >>> store = sa.shared.Store("docs-run", create=True)
    >>> store["temperature"] = np.full((100, 100), 20.0)
    >>> run = sa.attach("docs-run")
    >>> run
    <sa.attach('docs-run'), read-only: 1 names>
      temperature  array (100, 100) float64, 78.1 KiB
    >>> mean = run["temperature"].mean()
    >>> store["temperature"][50:] = 30
    >>> mean.compute()
    np.float64(25.0)
    >>> run.close()
    >>> store.close()
    """
    deadline, pause_s = time.monotonic() + (timeout or 0.0), SHORTEST_POLL_S
    while True:
        try:
            return Attached(Store(name), writeable, consistent)
        except FileNotFoundError as error:
            if timeout is None:
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:g} s for store {name!r}: {error}") from None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)


def _line(name: str, word: str, shape: Any, dtype: Any, nbytes: int | None) -> str:
    form = "" if shape is None else f" {shape}" if shape != () else ""
    kind = "" if dtype is None else f" {dtype}"
    return f"{name}  {word}{form}{kind}" + ("" if nbytes is None else f", {format_bytes(nbytes)}")


# --- from the shell ---------------------------------------------------------------------------------------------------------------


def stores() -> str:
    """Return what stores of this user there are, as text: owner, names, shapes, dtypes, bytes. Those whose owner is dead are swept."""
    lines = []
    for name in rendezvous.names():
        if rendezvous.sweep(name):
            lines.append(f"{name}: dead; its owner is gone, and its socket is swept")
            continue
        try:
            with Store(name) as store:
                maker = json.loads(store._root().meta)["maker"] >> START_BITS
                users: Sequence[int] = sorted({user >> START_BITS for user in store._live.users()} - {os.getpid(), maker})
                rows = store.describe()
        except FileNotFoundError:
            lines.append(f"{name}: closed just now")
            continue
        except (OSError, RuntimeError) as error:
            lines.append(f"{name}: cannot be opened: {error}")
            continue
        also = f", used by {', '.join(map(str, users))}" if users else ""
        total = sum(row[4] or 0 for row in rows)
        lines.append(f"{name}: owner {maker}{also}; {len(rows)} name{'s' * (len(rows) != 1)}, {format_bytes(total)}")
        lines += [f"  {_line(*row)}" for row in rows]
    return "\n".join(lines) if lines else f"There are no stores of this user (looked in {', '.join(rendezvous.directories())})."
