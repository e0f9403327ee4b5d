"""The table of a shared segment, without processes: its rules, and a death at each of its stores."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scheduler import ownership
from scheduler.errors import HandleExpired, SharedMemoryError
from scheduler.ownership import TABLE_NBYTES, Table, size_class

NBYTES = 64 << 20
PAGE = ownership.PAGE_NBYTES
SECOND = 10**9
ANNA, BELA, CARO = 11, 12, 13  # identities


class Death(BaseException):
    """The process is killed here."""


class Mortal(Table):
    """A table whose process dies at a certain store."""

    left = 10**9

    def _tick(self) -> None:
        if self.left == 0:
            raise Death
        self.left -= 1

    def _set(self, word: int, value: int) -> None:
        self._tick()
        super()._set(word, value)

    def _hold(self, row: int, obj: int, value: int) -> None:
        self._tick()
        super()._hold(row, obj, value)

    def _wipe(self, held: np.ndarray[Any, Any]) -> None:
        self._tick()
        super()._wipe(held)


@pytest.fixture
def buffer() -> np.ndarray[Any, Any]:
    made = np.zeros(TABLE_NBYTES, np.uint8)  # untouched pages cost nothing
    Table(made).found(1, NBYTES, (0, 0, 0, 0))
    return made


@pytest.fixture
def table(buffer: np.ndarray[Any, Any]) -> Table:
    return Table(buffer)


def sweep(table: Table, *, alive: tuple[int, ...] = (ANNA, BELA, CARO), now: int = SECOND, ttl: int = 60 * SECOND, wanted: int = 0) -> int:
    return table.sweep(now, ttl, lambda identity: identity in alive, wanted)


def bury(table: Table, *alive: int, embryos: tuple[int, ...] = ()) -> int:
    return table.reap(lambda identity: identity in alive, lambda row: row in embryos)


def test_what_nobody_holds_is_taken_as_it_lies_by_who_wants_just_that(table: Table) -> None:
    anna, bela = table.register(ANNA, 0), table.register(BELA, 0)
    dropped = [table.allocate(bela, nbytes, nbytes) for nbytes in (5000, 9000, 9000)]
    handle = table.issue(dropped[1][0], dropped[1][1], BELA)
    table.receive(bela, dropped[1][0], dropped[1][1], *handle)
    for obj, _, _ in dropped:
        table.drop(bela, obj)

    assert sweep(table, wanted=9001) == 5 * PAGE, "but for one"
    obj, generation, offset = table.allocate(anna, 9001, 8000)

    assert (obj, generation, offset) == (dropped[1][0], dropped[1][1] + 1, dropped[1][2])
    assert table.holders(obj) == [anna] and table.extent(obj) == (offset, 3 * PAGE, 8000)
    with pytest.raises(HandleExpired):
        table.receive(bela, *dropped[1][:2], *handle)
    table.check()
    other = table.allocate(anna, 9000, 9000)
    assert other[0] != obj and table.live() == sorted((obj, other[0])), "it is taken once"
    table.check()


def test_what_was_left_for_one_who_did_not_take_it_is_freed_later(table: Table) -> None:
    anna = table.register(ANNA, 0)
    obj, _, _ = table.allocate(anna, 9000, 9000)
    table.drop(anna, obj)

    assert sweep(table, wanted=9000) == 0
    table.allocate(anna, 5000, 5000)
    table.check()
    assert sweep(table) == 3 * PAGE
    table.check()


def test_an_object_lives_while_anybody_holds_it(table: Table) -> None:
    anna, bela = table.register(ANNA, 0), table.register(BELA, 0)
    obj, generation, _ = table.allocate(anna, 1000, 1000)
    table.receive(bela, obj, generation, *table.issue(obj, generation, ANNA))

    table.drop(anna, obj)
    assert sweep(table) == 0 and table.is_live(obj, generation)

    table.drop(bela, obj)
    assert sweep(table) == PAGE and not table.is_live(obj, generation)
    table.check()


def test_a_handle_on_its_way_keeps_its_object(table: Table) -> None:
    anna, bela = table.register(ANNA, 0), table.register(BELA, 0)
    obj, generation, _ = table.allocate(anna, 1000, 1000)
    token = table.issue(obj, generation, ANNA)
    table.drop(anna, obj)

    sweep(table)
    table.receive(bela, obj, generation, *token)

    assert table.holders(obj) == [bela] and table.pending() == []


def test_a_handle_is_good_again_while_the_object_lives_and_no_longer(table: Table) -> None:
    anna, bela = table.register(ANNA, 0), table.register(BELA, 0)
    obj, generation, _ = table.allocate(anna, 1000, 1000)
    token = table.issue(obj, generation, ANNA)
    for _ in range(2):
        table.receive(bela, obj, generation, *token)
    table.drop(anna, obj)
    table.drop(bela, obj)
    sweep(table)

    with pytest.raises(HandleExpired, match=f"shared array {obj}.{generation}: it was freed"):
        table.receive(bela, obj, generation, *token)

    again, other, _ = table.allocate(anna, 1000, 1000)
    assert again == obj and other == generation + 1
    with pytest.raises(HandleExpired):
        table.receive(bela, obj, generation, *token)


def test_the_handle_of_a_dead_sender_expires_after_a_while(table: Table) -> None:
    anna, bela = table.register(ANNA, 0), table.register(BELA, 0)
    obj, generation, _ = table.allocate(anna, 1000, 1000)
    table.issue(obj, generation, ANNA)
    assert bury(table, BELA) == 1

    assert sweep(table, alive=(BELA,), now=SECOND) == 0
    assert sweep(table, alive=(BELA,), now=60 * SECOND) == 0
    assert sweep(table, alive=(BELA,), now=62 * SECOND) == PAGE
    assert bela in table.rows() and table.live() == []


def test_what_the_dead_held_is_freed(table: Table) -> None:
    anna, bela = table.register(ANNA, 0), table.register(BELA, 0)
    mine, _, _ = table.allocate(bela, 1000, 1000)
    table.allocate(anna, 5000, 5000)

    assert bury(table, BELA) == 1 and sweep(table) == 2 * PAGE
    assert table.live() == [mine]
    assert table.register(CARO, 0) == anna and table.holders(mine) == [bela]


def test_a_program_that_replaced_itself_takes_its_row_over(table: Table) -> None:
    table.allocate(table.register(ANNA, 0), 1000, 1000)

    row = table.register(ANNA, 0)

    assert sweep(table) == PAGE and table.rows() == [row]


def test_an_embryo_counts_as_long_as_its_lock_is_held(table: Table) -> None:
    anna = table.register(ANNA, 0)
    obj, _, _ = table.allocate(anna, 1000, 1000)
    child = table.conceive(anna, lambda row: None)
    table.drop(anna, obj)

    assert bury(table, ANNA, embryos=(child,)) == 0 and sweep(table) == 0
    table.adopt(child, CARO)
    assert bury(table, CARO) == 1 and sweep(table) == 0 and table.holders(obj) == [child]


def test_an_embryo_that_was_not_born_holds_nothing(table: Table) -> None:
    anna = table.register(ANNA, 0)
    obj, _, _ = table.allocate(anna, 1000, 1000)
    table.conceive(anna, lambda row: None)
    table.drop(anna, obj)

    assert bury(table, ANNA) == 1 and sweep(table) == PAGE


def test_a_row_whose_last_embryo_still_has_its_lock_in_another_process_is_passed_over(table: Table) -> None:
    anna = table.register(ANNA, 0)
    obj, _, _ = table.allocate(anna, 1000, 1000)
    locked = {table.conceive(anna, lambda row: None)}
    table.abandon(min(locked))

    def lock(row: int) -> None:
        if row in locked:
            raise BlockingIOError

    child = table.conceive(anna, lock)

    assert child not in locked and table.holders(obj) == [anna, child]
    assert table.register(BELA, 0) in locked


def test_without_room_the_error_has_the_numbers(table: Table) -> None:
    anna = table.register(ANNA, 0)
    table.allocate(anna, NBYTES - PAGE, 1)

    with pytest.raises(SharedMemoryError, match=r"64 MiB: .* of 64 MiB are free, the largest hole has"):
        table.allocate(anna, NBYTES, 1)


@pytest.mark.parametrize("what, most", [("ROWS", 3), ("OBJECTS", 3), ("TOKENS", 3)])
def test_a_full_table_is_an_error_and_stays_good(table: Table, monkeypatch: pytest.MonkeyPatch, what: str, most: int) -> None:
    anna = table.register(ANNA, 0)
    obj, generation, _ = table.allocate(anna, 1, 1)
    monkeypatch.setattr(ownership, what, most)
    act: Callable[[int], Any] = {
        "ROWS": lambda i: table.register(100 + i, 0),
        "OBJECTS": lambda i: table.allocate(anna, 1, 1),
        "TOKENS": lambda i: table.issue(obj, generation, ANNA),
    }[what]

    with pytest.raises(SharedMemoryError, match=str(most)):
        for i in range(10):
            act(i)
    table.check()


def test_another_table_over_the_same_bytes_sees_the_holes(buffer: np.ndarray[Any, Any]) -> None:
    one, other = Table(buffer), Table(buffer)
    anna, bela = one.register(ANNA, 0), other.register(BELA, 0)
    taken = []
    for i in range(20):
        who, row = (one, anna) if i % 2 else (other, bela)
        taken.append(who.allocate(row, 3000 * (i + 1), 1)[2])
        who.check()

    assert len(set(taken)) == 20
    assert one.gaps() == other.gaps()


def scenario(table: Mortal, op: str) -> Callable[[], Any]:
    """Bring a table to where ``op`` can be done by Anna, and return it."""
    anna = table.register(ANNA, 0)
    bela = table.register(BELA, 0)
    kept = table.allocate(bela, 9000, 9000)
    token = table.issue(kept[0], kept[1], BELA)
    own = table.allocate(anna, 5000, 5000)
    dropped = table.allocate(anna, 70_000, 70_000)
    if op in ("sweep", "sweep pending", "reuse"):
        if op == "sweep pending":
            table.issue(dropped[0], dropped[1], CARO)
        table.drop(anna, dropped[0])
    return {
        "register": lambda: table.register(CARO, 7),
        "allocate": lambda: table.allocate(anna, 20_000, 20_000),
        "reuse": lambda: (sweep(table, wanted=70_000), table.allocate(anna, 70_000, 60_000)),
        "issue": lambda: table.issue(own[0], own[1], ANNA),
        "receive": lambda: table.receive(anna, kept[0], kept[1], *token),
        "drop": lambda: table.drop(anna, own[0]),
        "sweep": lambda: sweep(table),
        "sweep pending": lambda: sweep(table, alive=(ANNA, BELA), ttl=0),
        "conceive": lambda: table.conceive(anna, lambda row: None),
        "adopt": lambda: table.adopt(table.conceive(anna, lambda row: None), CARO),
        "reap": lambda: table.reap(lambda identity: identity != ANNA, lambda row: False),
    }[op]


OPERATIONS = ("register", "allocate", "reuse", "issue", "receive", "drop", "sweep", "sweep pending", "conceive", "adopt", "reap")


@pytest.mark.parametrize("op", OPERATIONS)
def test_whoever_dies_at_whatever_store_the_others_find_a_good_table(op: str) -> None:
    deaths = 0
    for at in range(1000):
        buffer = np.zeros(TABLE_NBYTES, np.uint8)
        mortal = Mortal(buffer)
        mortal.found(1, NBYTES, (0, 0, 0, 0))
        act = scenario(mortal, op)
        before = [(obj, mortal.extent(obj)) for obj in mortal.live() if 1 in mortal.holders(obj)]
        mortal.left = at
        try:
            act()
        except Death:
            deaths += 1
        table = Table(buffer)

        bury(table, BELA)
        sweep(table, alive=(BELA,), now=SECOND)
        sweep(table, alive=(BELA,), now=100 * SECOND)

        table.check()
        assert [(obj, table.extent(obj)) for obj in table.live()] == before, f"what Bela holds, after a death at store {at}"
        table.allocate(table.rows()[0], NBYTES // 2, 1)
        table.check()
        if deaths <= at:
            break
    assert deaths > 0 and deaths == at, "the last run was to the end"


def test_fragmentation_stays_bounded_over_random_frees_and_allocations(table: Table) -> None:
    rnd = random.Random(5)
    anna = table.register(ANNA, 0)
    live: dict[int, int] = {}
    limit, worst = 24 << 20, 0.0
    for step in range(20_000):
        if live and (sum(live.values()) > limit or rnd.random() < 0.45):
            obj = rnd.choice(list(live))
            del live[obj]
            table.drop(anna, obj)
        else:
            nbytes = int(2 ** rnd.uniform(8, 21))
            sweep(table, wanted=nbytes)
            obj, _, _ = table.allocate(anna, nbytes, nbytes)
            live[obj] = nbytes
        if step > 1000:
            top = max((table.extent(obj)[0] + table.extent(obj)[1] for obj in live), default=0)
            worst = max(worst, top / limit)
        if step % 500 == 0:
            table.check()

    assert worst < 2.0, f"what was live spread over {worst} times the most that was live at once"
    for obj in live:
        table.drop(anna, obj)
    sweep(table)
    assert table.gaps() == [(0, NBYTES)], "free ranges coalesce"


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 65536, 65537, 100_000, 1 << 20, (1 << 20) + 1, 12345678, 1 << 40])
def test_size_classes_are_whole_pages_and_waste_little(nbytes: int) -> None:
    taken = size_class(nbytes)

    assert taken % PAGE == 0 and taken >= max(nbytes, 1)
    assert taken - nbytes <= max(PAGE, nbytes // 8)
    assert size_class(taken) == taken
