"""The journal of a store or list, without processes: what it says after any changes, and after a death at each store of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scheduler import journal as journals
from scheduler.errors import SharedMemoryError
from scheduler.journal import APPEND, CLEAR, DELETE, DELETE_AT, INSERT, NUMBER, ROOT_NBYTES, SET, SET_AT, Journal, Record, unpack
from scheduler.ownership import TABLE_NBYTES, Table

NBYTES = 1 << 20
SECOND = 10**9
ANNA, BELA = 11, 12  # identities


class Death(BaseException):
    """The process is killed here."""


class Clock:
    """How many stores are left until death."""

    left = 10**9

    def tick(self) -> None:
        if self.left == 0:
            raise Death
        self.left -= 1


class MortalTable(Table):
    """A table whose process dies at a certain store."""

    clock = Clock()

    def _set(self, word: int, value: int) -> None:
        self.clock.tick()
        super()._set(word, value)

    def _hold(self, row: int, obj: int, value: int) -> None:
        self.clock.tick()
        super()._hold(row, obj, value)

    def _wipe(self, held: np.ndarray[Any, Any]) -> None:
        self.clock.tick()
        super()._wipe(held)


class MortalJournal(Journal):
    """A journal whose process dies at a certain store; of a record, in its middle, too."""

    clock = Clock()

    def _set(self, word: int, value: int) -> None:
        self.clock.tick()
        super()._set(word, value)

    def _write(self, offset: int, values: bytes) -> None:
        self.clock.tick()
        super()._write(offset, values[: len(values) // 2])
        self.clock.tick()
        super()._write(offset, values)


class World:
    """A segment of Anna, who dies, and Bela, who does not, and a journal in it whose root both hold."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.buffer = np.zeros(TABLE_NBYTES, np.uint8)
        self.data = memoryview(bytearray(b"\xa5" * NBYTES))  # what was there before
        self.table = MortalTable(self.buffer)
        self.table.clock = self.clock
        self.table.found(1, NBYTES, (0, 0, 0, 0))
        self.anna, self.bela = self.table.register(ANNA, 0), self.table.register(BELA, 0)
        self.root = self.table.allocate(self.anna, ROOT_NBYTES, ROOT_NBYTES)
        self.table.hold(self.bela, *self.root[:2])
        self.journal = MortalJournal(self.table, self.data, self.root[2])
        self.journal.clock = self.clock
        self.journal.found(*self.root[:2])

    def other(self) -> Journal:
        """Return the same journal, as Bela, a process of its own, has it."""
        return Journal(Table(self.buffer), self.data, self.root[2])

    def make(self) -> tuple[int, int]:
        """Return a new object, which Anna holds."""
        return self.table.allocate(self.anna, 100, 100)[:2]

    def sweep(self, *alive: int) -> None:
        table = Table(self.buffer)
        table.reap(lambda identity: identity in alive, lambda row: False)
        table.sweep(SECOND, SECOND, lambda identity: identity in alive)
        table.check()


def put(journal: Journal, *records: Record) -> None:
    journal.change(lambda state: (records, None))


def contents(journal: Journal) -> tuple[dict[str, bytes], list[bytes]]:
    state = journal.refresh()

    def payload(position: int) -> bytes:
        found = journal.record(state, position)
        assert found is not None
        return found.payload

    return {name: payload(at) for name, at in state.names.items()}, [payload(at) for at in state.items]


@pytest.mark.parametrize(
    "record",
    [
        Record(SET, "temperature", payload=b"values"),
        Record(SET, "naïve ☃", 3, 200, ((5, 1), (1 << 14, 1 << 40)), b""),
        Record(APPEND, payload=bytes(range(256)) * 5),
        Record(CLEAR),
        Record(INSERT, argument=2**32 - 1),
    ],
)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    packed = record.pack()

    assert unpack(b"12345678" + packed + b"rest", 8) == record and len(packed) % 8 == 0


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="names take up to 4096 bytes"):
        Record(SET, "x" * 5000).pack()


def test_random_changes_are_those_of_a_dict_and_a_list_for_every_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "SMALLEST_BLOCK_NBYTES", 1 << 9)
    rnd = random.Random(3)
    world = World()
    writers, reader = [world.journal, world.other()], world.other()
    names: dict[str, bytes] = {}
    items: list[bytes] = []
    serials = set()
    for step in range(3000):
        value = rnd.randbytes(rnd.choice((0, 3, 8, 60)))
        name, place = f"n{rnd.randrange(12)}", rnd.randrange(len(items)) if items else 0
        draw = rnd.random()
        if draw < 0.3:
            record = Record(SET, name, payload=value)
            names[name] = value
        elif draw < 0.4:
            record = Record(DELETE, name)
            if names.pop(name, None) is None:
                continue
        elif draw < 0.6:
            record = Record(APPEND, payload=value)
            items.append(value)
        elif draw < 0.7:
            record = Record(INSERT, argument=place, payload=value)
            items.insert(place, value)
        elif draw < 0.98 and items:
            take = draw > 0.8
            record = Record(DELETE_AT if take else SET_AT, argument=place, payload=b"" if take else value)
            if take:
                items.pop(place)
            else:
                items[place] = value
        elif draw > 0.99:
            record = Record(CLEAR)
            names.clear()
            items.clear()
        else:
            continue
        put(rnd.choice(writers), record)
        if step % 7 == 0:
            assert contents(reader) == (names, items)
            serials.add(reader.refresh().serial)
        if step % 100 == 0:
            world.journal.check()
            world.sweep(ANNA, BELA)
    assert contents(world.other()) == contents(reader) == (names, items)
    assert list(contents(reader)[0]) == list(names), "in the order of a dict"
    assert len(serials) > 5, "it went through several blocks"
    world.sweep(ANNA, BELA)
    assert len(world.table.live()) == 2, "the root and one block"


def test_objects_are_held_as_long_as_a_record_names_them() -> None:
    world = World()
    first, second = world.make(), world.make()
    put(world.journal, Record(SET, "a", objects=(first,)), Record(SET, "b", objects=(first, second)), Record(APPEND, objects=(second,)))
    for obj in (first, second):
        world.table.drop(world.anna, obj[0])

    def live() -> list[bool]:
        world.sweep(ANNA, BELA)
        world.journal.check()
        return [world.table.is_live(*first), world.table.is_live(*second)]

    assert live() == [True, True]
    put(world.other(), Record(DELETE, "a"))
    assert live() == [True, True]
    put(world.journal, Record(SET, "b", payload=b"x"))
    assert live() == [False, True]
    put(world.journal, Record(CLEAR))
    assert live() == [False, False]


def test_it_ends_with_its_last_holder_and_a_handle_on_its_way_counts() -> None:
    world = World()
    obj = world.make()
    put(world.journal, Record(SET, "a", objects=(obj,)))
    token = world.table.issue(*world.root[:2], ANNA)
    for row in (world.anna, world.bela):
        world.table.drop(row, world.root[0])
    world.table.drop(world.anna, obj[0])

    world.sweep(ANNA, BELA)
    assert world.table.is_live(*obj)
    world.table.receive(world.bela, *world.root[:2], *token)
    world.sweep(BELA)
    assert world.table.is_live(*obj) and contents(world.other()) == ({"a": b""}, [])

    world.table.drop(world.bela, world.root[0])
    world.sweep(BELA)
    assert world.table.live() == [] and world.table.collections() == []


def test_collections_hold_each_other_and_circles_are_freed() -> None:
    world = World()
    table = world.table
    inner = table.allocate(world.anna, ROOT_NBYTES, ROOT_NBYTES)
    journal = Journal(table, world.data, inner[2])
    journal.found(*inner[:2])
    obj = world.make()
    put(journal, Record(APPEND, objects=(obj,)), Record(APPEND, objects=(world.root[:2],)))
    put(world.journal, Record(SET, "inner", objects=(inner[:2],)))
    table.drop(world.anna, inner[0])
    table.drop(world.anna, obj[0])

    world.sweep(ANNA, BELA)
    assert table.is_live(*obj) and len(table.collections()) == 2
    table.drop(world.anna, world.root[0])
    table.drop(world.bela, world.root[0])
    world.sweep(ANNA, BELA)
    assert table.live() == [] and table.collections() == []


def test_when_there_is_no_room_nothing_changes() -> None:
    world = World()
    put(world.journal, Record(SET, "a", payload=b"old"))

    with pytest.raises(SharedMemoryError, match="largest hole"):
        put(world.journal, Record(SET, "a", payload=bytes(NBYTES)))

    assert contents(world.journal) == contents(world.other()) == ({"a": b"old"}, [])
    put(world.other(), Record(SET, "a", payload=b"new"))
    assert contents(world.journal) == ({"a": b"new"}, [])
    world.journal.check()


def test_a_decision_that_raises_changes_nothing() -> None:
    world = World()

    def decide(state: Any) -> Any:
        return [Record(DELETE, "a")], state.names["a"]

    with pytest.raises(KeyError):
        world.journal.change(decide)
    assert contents(world.other()) == ({}, [])


def test_a_reader_whose_block_is_replaced_while_it_copies_looks_again() -> None:
    """It copies what the next owner of the memory has written there, notices, and takes the new block."""
    world = World()
    put(world.journal, Record(SET, "a", payload=b"first"))
    reader = world.other()
    slot = world.journal._slot(world.journal.refresh().serial)
    writes: list[Callable[[], None]] = []

    class Slow:
        def __getitem__(self, key: slice) -> memoryview:
            if writes:
                writes.pop()()
            return world.data[key]

    def replace() -> None:
        put(world.journal, Record(SET, "a", payload=b"y" * 20_000))
        world.data[slot.offset : slot.offset + slot.capacity] = b"\xff" * slot.capacity

    reader.data = Slow()  # type: ignore[assignment]  # what a slow copy looks like
    writes.append(replace)
    assert reader.refresh().names.keys() == {"a"}

    for nbytes, copies in ((60_000, 0), (150_000, 1)):  # before the head of a record is copied, and before the rest is
        state = reader.refresh()
        values = b"z" * nbytes
        writes[:] = [lambda values=values: put(world.journal, Record(SET, "a", payload=values)), *[lambda: None] * copies]  # type: ignore[misc]  # a default
        assert reader.record(state, state.names["a"]) is None
        state = reader.refresh()
        found = reader.record(state, state.names["a"])
        assert found is not None and found.payload == values


def test_a_replay_that_was_interrupted_is_begun_again() -> None:
    world = World()
    put(world.journal, *(Record(APPEND, payload=b"%d" % i) for i in range(10)))
    reader = world.other()
    state = reader.refresh()
    put(world.journal, *(Record(APPEND, payload=b"%d" % i) for i in range(10, 20)))
    state.items.append(7)  # half of a replay
    state.is_whole = False

    assert contents(reader) == ({}, [b"%d" % i for i in range(20)])


OPERATIONS = ("found", "set", "replace", "delete", "append", "several", "clear", "compact", "compact with objects", "number")


def scenario(world: World, op: str) -> tuple[Callable[[], Any], tuple[Any, Any]]:
    """Bring a journal to where ``op`` can be done by Anna; return it, and what is there when it was done."""
    kept, gone, new = world.make(), world.make(), world.make()
    journal = world.journal
    put(journal, Record(SET, "kept", objects=(kept,), payload=b"k"), Record(SET, "old", objects=(gone,), payload=b"o"))
    put(journal, Record(APPEND, objects=(kept,), payload=b"0"), Record(APPEND, payload=b"1"))
    for obj in (kept, gone):
        world.table.drop(world.anna, obj[0])
    if op.startswith("compact"):
        while journal.refresh().position < journal._slot(journal.refresh().serial).capacity - 64:
            put(journal, Record(SET, "x", payload=b"x"))
    names: dict[str, bytes]
    names, items = contents(journal)
    big = b"b" * 200
    records: list[Record] = {
        "found": [],
        "set": [Record(SET, "new", objects=(new,), payload=b"n")],
        "replace": [Record(SET, "old", objects=(new,), payload=b"n")],
        "delete": [Record(DELETE, "old")],
        "append": [Record(APPEND, objects=(new,), payload=b"2")],
        "several": [
            Record(DELETE_AT, argument=0),
            Record(SET, "new", objects=(new,), payload=b"n"),
            Record(SET_AT, argument=0, payload=b"3"),
        ],
        "clear": [Record(CLEAR)],
        "compact": [Record(SET, "new", payload=big)],
        "compact with objects": [Record(SET, "old", objects=(new,), payload=big)],
        "number": [Record(NUMBER, "lock", 1)],
    }[op]
    after: tuple[dict[str, bytes], list[bytes]] = {
        "found": (names, items),
        "set": ({**names, "new": b"n"}, items),
        "replace": ({**names, "old": b"n"}, items),
        "delete": ({name: value for name, value in names.items() if name != "old"}, items),
        "append": (names, [*items, b"2"]),
        "several": ({**names, "new": b"n"}, [b"3"]),
        "clear": ({}, []),
        "compact": ({**names, "new": big}, items),
        "compact with objects": ({**names, "old": big}, items),
        "number": (names, items),
    }[op]
    if op != "found":
        return lambda: put(journal, *records), after

    def found() -> None:
        root = world.table.allocate(world.anna, ROOT_NBYTES, ROOT_NBYTES)
        other = MortalJournal(world.table, world.data, root[2])
        other.clock = world.clock
        other.found(*root[:2])

    return found, after


@pytest.mark.parametrize("op", OPERATIONS)
def test_whoever_dies_at_whatever_store_the_others_find_the_old_or_the_new_whole(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "SMALLEST_BLOCK_NBYTES", 1 << 10)
    outcomes, deaths = set(), 0
    for at in range(1000):
        world = World()
        act, after = scenario(world, op)
        before = contents(world.other())
        is_new = before == after
        world.clock.left = at
        try:
            act()
        except Death:
            deaths += 1
        world.clock.left = 10**9
        world.sweep(BELA)

        journal = world.other()
        found = contents(journal)
        assert found in (before, after), f"after a death at store {at}"
        journal.check()  # what counts is held
        outcomes.add("same" if is_new else "new" if found == after else "old")
        put(journal, Record(SET, "next", payload=b"next"))
        journal.check()
        assert not journal._root[journals._DIRTY]
        world.sweep(BELA)
        state = journal.refresh()
        assert contents(journal) == ({**found[0], "next": b"next"}, found[1])
        assert set(world.table.live()) == {world.root[0], journal._slot(state.serial).obj, *state.counts}, (
            f"leaked by a death at store {at}"
        )

        world.table.drop(world.bela, world.root[0])
        world.sweep(BELA)
        assert world.table.live() == [] and world.table.collections() == [], "nothing is left after the last user"
        if deaths <= at:
            break
    assert deaths > 0 and deaths == at, "the last run was to the end"
    assert outcomes in ({"old", "new"}, {"same"})
