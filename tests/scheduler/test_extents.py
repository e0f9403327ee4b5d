"""The allocator: on an arena that is only a number where nothing more is needed, on real memory where bytes matter."""

from __future__ import annotations

import gc
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.errors import SchedulerError, SharedMemoryError
from scheduler.extents import Extent, Extents
from scheduler.segments import PAGE_NBYTES, Arena

MIB = 1 << 20
GIB = 1 << 30


class FakeArena:
    """An arena without memory, which remembers what is punched."""

    def __init__(self, nbytes: int = 64 * GIB) -> None:
        self.nbytes = nbytes
        self.punched: list[tuple[int, int]] = []

    def punch(self, offset: int, nbytes: int) -> None:
        assert offset % PAGE_NBYTES == 0 and nbytes % PAGE_NBYTES == 0 and nbytes > 0 and offset + nbytes <= self.nbytes
        self.punched.append((offset, nbytes))


def make(nbytes: int = 64 * GIB, warm_limit_nbytes: int = 64 * GIB) -> Extents:
    return Extents(FakeArena(nbytes), warm_limit_nbytes=warm_limit_nbytes)


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000, 4097, MIB - 1, MIB, MIB + 1, 100_000_000])
def test_extent_is_aligned_and_not_much_larger_than_asked_for(nbytes: int) -> None:
    extents = make()
    extent = extents.allocate(nbytes)
    taken = extents.statistics().live_nbytes
    assert extent.nbytes == nbytes <= taken
    assert taken - nbytes < max(64, nbytes / 8) or (nbytes == 0 and taken == 64)
    assert extent.offset % (PAGE_NBYTES if nbytes >= MIB else 64) == 0
    extents.check()


def test_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-3"):
        make().allocate(-3)


def test_identities_are_never_used_again() -> None:
    extents = make()
    assert len({extents.allocate(100).identity for _ in range(50)} | {make().allocate(5).identity for _ in range(50)}) == 100


def test_free_is_idempotent_and_collection_after_it_harmless() -> None:
    extents = make()
    extent = extents.allocate(2 * MIB)
    offset = extent.offset
    extent.free()
    extent.free()
    other = extents.allocate(2 * MIB)
    assert other.offset == offset
    del extent  # must not free what `other` has now
    assert extents.statistics().live_extents == 1
    third = extents.allocate(2 * MIB)
    assert third.offset != offset
    extents.check()


def test_warm_memory_is_used_before_cold() -> None:
    extents = make()
    first, keep, second = extents.allocate(8 * MIB), extents.allocate(MIB), extents.allocate(4 * MIB)
    high, low = second.offset, first.offset
    first.free()
    second.free()
    assert extents.allocate(4 * MIB).offset == high  # the smaller of the two warm ranges, though it lies higher
    high_water = extents.statistics().high_water_nbytes
    extents.trim(keep_nbytes=8 * MIB)
    big = extents.allocate(8 * MIB)
    assert big.offset == low
    assert extents.statistics().high_water_nbytes == high_water
    assert keep.offset == 8 * MIB


def test_cold_memory_is_used_from_the_lowest_address() -> None:
    extents = make()
    held = [extents.allocate(2 * MIB) for _ in range(10)]
    for i in (7, 3, 5):
        held[i].free()
    extents.trim()
    again = [extents.allocate(2 * MIB) for _ in range(4)]
    assert [extent.offset // (2 * MIB) for extent in again] == [3, 5, 7, 10]
    extents.check()


def test_gap_that_is_partly_warm_is_used_rather_than_the_end() -> None:
    extents = make()
    first = extents.allocate(4 * MIB)
    first.free()
    assert extents.allocate(8 * MIB).offset == 0
    extents.check()


def test_small_extents_share_a_slab_and_give_it_back() -> None:
    extents = make()
    held = [extents.allocate(1000) for _ in range(1000)]
    assert extents.statistics().high_water_nbytes <= 4 * MIB
    extents.check()
    held.clear()
    extents.trim()
    assert extents.statistics().warm_nbytes == 0
    assert extents.allocate(4 * MIB).offset == 0
    extents.check()


def test_trim_reaches_whole_free_pages_between_small_extents() -> None:
    extents = make()
    held = [extents.allocate(64 << 10) for _ in range(32)]
    for extent in held[1::2]:
        extent.free()
    assert extents.trim() == 16 * (64 << 10)
    extents.check()
    for extent in held[::2]:
        extent.free()
    assert extents.trim() == 16 * (64 << 10)
    extents.check()


def test_warm_limit_is_kept_largest_ranges_first() -> None:
    arena = FakeArena()
    extents = Extents(arena, warm_limit_nbytes=16 * MIB)
    small = [extents.allocate(2 * MIB) for _ in range(4)]
    big = extents.allocate(12 * MIB)
    for extent in small[::2]:
        extent.free()
    extents.drain()
    assert arena.punched == []
    offset = big.offset
    big.free()
    extents.drain()
    assert extents.statistics().warm_nbytes <= 16 * MIB
    big = extents.allocate(12 * MIB)
    other = extents.allocate(12 * MIB)
    big.free()
    other.free()
    statistics = extents.statistics()
    assert 0 < statistics.warm_nbytes <= 16 * MIB
    assert arena.punched and all(start >= offset for start, _ in arena.punched)
    extents.check()


def test_arena_that_cannot_punch_keeps_working_and_says_so_when_asked() -> None:
    class Stubborn(FakeArena):
        def punch(self, offset: int, nbytes: int) -> None:
            raise SharedMemoryError("giving back failed: Operation not supported")

    extents = Extents(Stubborn(), warm_limit_nbytes=0)
    extents.allocate(4 * MIB)
    assert extents.allocate(4 * MIB).offset == 0
    extents.drain()
    assert extents.statistics().warm_nbytes == 4 * MIB
    with pytest.raises(SharedMemoryError, match="not supported"):
        extents.trim()
    extents.check()


def test_full_arena_says_what_is_needed_and_what_is_there() -> None:
    extents = make(16 * MIB)
    held = [extents.allocate(2 * MIB) for _ in range(8)]
    held[2].free()
    held[5].free()
    with pytest.raises(SharedMemoryError, match=r"needs 3 MiB; 4 MiB free of 16 MiB, largest gap 2 MiB\. .*larger arena"):
        extents.allocate(3 * MIB)
    extents.check()
    assert extents.allocate(2 * MIB).offset == 2 * 2 * MIB


def test_small_extents_fill_an_arena_smaller_than_a_slab() -> None:
    extents = make(10 * PAGE_NBYTES + 100)
    held = []
    with pytest.raises(SharedMemoryError):
        while True:
            held.append(extents.allocate(64))
            extents.check()
    assert len(held) == 10 * PAGE_NBYTES // 64
    held.clear()
    assert extents.allocate(9 * PAGE_NBYTES).offset == 0


def test_empty_slabs_make_room_for_large_extents() -> None:
    extents = make(8 * MIB)
    small = [extents.allocate(512 << 10) for _ in range(16)]
    small.clear()
    assert extents.allocate(8 * MIB).offset == 0
    extents.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aaftu"), st.integers(0, 1 << 30)), max_size=60), st.sampled_from([0, 5 * MIB, GIB]))
def test_books_stay_right_whatever_happens(steps: list[tuple[str, int]], warm_limit_nbytes: int) -> None:
    extents = Extents(FakeArena(64 * MIB), warm_limit_nbytes=warm_limit_nbytes)
    live: list[Extent] = []
    for step, number in steps:
        if step == "a":
            try:
                live.append(extents.allocate(number % (1 << number % 25)))
            except SharedMemoryError:
                assert number % (1 << number % 25) > 0
        elif step == "f" and live:
            live.pop(number % len(live)).free()
        elif step == "t":
            given = extents.trim(number % (16 * MIB))
            assert given % PAGE_NBYTES == 0 and given <= extents.statistics().high_water_nbytes
        elif step == "u":
            assert extents.statistics().live_extents == len(live)
        extents.check()
        spans = sorted((extent.offset, extent.offset + extent.nbytes) for extent in live)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    live.clear()
    extents.trim()
    extents.check()
    statistics = extents.statistics()
    assert (statistics.live_nbytes, statistics.warm_nbytes) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_arena_stays_bounded_under_random_churn(seed: int) -> None:
    rng = random.Random(seed)
    extents = make()
    live: list[Extent] = []
    live_nbytes = 0
    for step in range(15_000):
        nbytes = int(2 ** rng.uniform(5, 25))
        while live_nbytes + nbytes > 256 * MIB:
            live_nbytes -= live.pop(rng.randrange(len(live))).nbytes
        live.append(extents.allocate(nbytes))
        live_nbytes += nbytes
        if step % 1000 == 0:
            extents.check()
    statistics = extents.statistics()
    assert statistics.peak_nbytes <= 1.125 * 256 * MIB
    assert statistics.high_water_nbytes <= 1.75 * statistics.peak_nbytes
    live.clear()
    extents.trim()
    extents.check()
    assert extents.allocate(statistics.high_water_nbytes).offset == 0  # everything has grown together again


def test_thousand_cycles_leave_the_books_flat() -> None:
    extents = make()
    shapes = (10, 5000, 300_000, MIB, 8_000_000)

    def cycle() -> None:
        held = [extents.allocate(nbytes) for nbytes in shapes]
        held.clear()

    cycle()
    before = extents.statistics()
    for _ in range(1000):
        cycle()
    assert extents.statistics() == before
    assert not extents._dead
    extents.check()


def test_garbage_collector_may_free_extents_in_the_middle_of_allocate() -> None:
    extents = make()
    threshold = gc.get_threshold()
    gc.set_threshold(1)  # collect at almost every allocation of a container, those of the allocator included
    try:
        rng = random.Random(5)
        for _ in range(2000):
            cycle: list[Any] = [extents.allocate(rng.choice((100, 70_000, 2 * MIB)))]
            cycle.append(cycle)  # only the collector frees it
            del cycle
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    extents.check()
    assert extents.statistics().live_extents == 0
    assert extents.statistics().high_water_nbytes < 64 * MIB


def raise_at(number: int, act: Callable[[], None]) -> bool:
    """Run ``act`` with a KeyboardInterrupt at the n-th place in the allocator where a signal can strike; False: it has fewer."""
    left = number

    def strike(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        # CPython looks for signals when a function begins and when a call has returned.
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith("extents.py"):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(strike)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return left <= 0


@pytest.mark.parametrize("nbytes", [1000, 3 * MIB])
def test_interrupt_at_any_instant_leaves_the_books_right(nbytes: int) -> None:
    number = 0
    struck = True
    while struck:
        number += 1
        extents = make(warm_limit_nbytes=2 * MIB)
        held = [extents.allocate(size) for size in (500, 700_000, 2 * MIB, 4 * MIB, 900, 8 * MIB)]
        live = held[::2]

        def act(extents: Extents = extents, held: list[Extent] = held) -> None:
            for extent in held[1::2]:
                extent.free()
            extents.allocate(nbytes)
            extents.drain()
            extents.allocate(nbytes).free()
            extents.trim()
            extents.statistics()

        struck = raise_at(number, act)
        extents.check()
        kept = {extent.offset for extent in live}
        more = [extents.allocate(nbytes) for _ in range(20)]
        assert not kept & {extent.offset for extent in more}
        for extent in held:
            extent.free()
        held.clear()
        live.clear()
        more.clear()
        extents.trim()
        extents.check()
        assert extents.statistics().live_nbytes == 0, f"lost at {number}"
    assert number > 100


def test_finalizer_in_the_middle_of_a_change_may_free_and_read() -> None:
    extents = make()
    other = extents.allocate(5000)
    large = extents.allocate(2 * MIB)
    seen: list[object] = []

    class Nosy(FakeArena):
        def punch(self, offset: int, nbytes: int) -> None:  # stands for a finalizer: it runs inside trim()
            other.free()
            large.free()
            seen.append(extents.statistics())
            seen.append(extents.trim())
            extents.drain()
            with pytest.raises(SchedulerError, match="finalizer"):
                extents.allocate(10)

    extents.arena = Nosy()
    extents.allocate(4 * MIB).free()
    assert extents.trim() == 4 * MIB
    assert seen[1] == 0
    extents.check()
    assert extents.statistics().live_nbytes == 0


@pytest.mark.timeout(60)
def test_threads_never_share_bytes() -> None:
    arena = Arena(64 * MIB)
    extents = Extents(arena, warm_limit_nbytes=8 * MIB)
    problems: list[str] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        rng = random.Random(number)
        start.wait()
        held: list[tuple[Extent, int]] = []
        for step in range(400):
            if len(held) > 6 or (held and rng.random() < 0.4):
                extent, value = held.pop(rng.randrange(len(held)))
                piece = arena.bytes[extent.offset : extent.offset + extent.nbytes]
                if not (piece == value).all():
                    problems.append(f"thread {number}, step {step}")
                extent.free()
            else:
                extent = extents.allocate(int(2 ** rng.uniform(6, 21)))
                value = rng.randrange(256)
                arena.bytes[extent.offset : extent.offset + extent.nbytes] = value
                held.append((extent, value))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    extents.check()
    assert extents.statistics().live_extents == 0


def test_bytes_of_an_extent_survive_what_happens_to_others() -> None:
    rng = random.Random(7)
    arena = Arena(128 * MIB)
    extents = Extents(arena, warm_limit_nbytes=4 * MIB)
    held: dict[Extent, int] = {}
    for step in range(600):
        if held and (len(held) > 30 or rng.random() < 0.4):
            extent = rng.choice(list(held))
            value = held.pop(extent)
            assert (arena.bytes[extent.offset : extent.offset + extent.nbytes] == value).all(), f"step {step}"
            extent.free()
        else:
            extent = extents.allocate(int(2 ** rng.uniform(4, 21)))
            held[extent] = rng.randrange(1, 256)
            arena.bytes[extent.offset : extent.offset + extent.nbytes] = held[extent]
        if step % 50 == 0:
            extents.trim(rng.randrange(4 * MIB))
            extents.check()


def test_trim_gives_memory_back_to_the_system() -> None:
    arena = Arena(64 * MIB)
    extents = Extents(arena, warm_limit_nbytes=GIB)
    keep, gone = extents.allocate(4 * MIB), extents.allocate(16 * MIB)
    arena.bytes[keep.offset : gone.offset + gone.nbytes] = 1
    assert arena.resident_nbytes() == 20 * MIB
    gone.free()
    assert extents.statistics().warm_nbytes == 16 * MIB
    assert arena.resident_nbytes() == 20 * MIB
    assert extents.trim(keep_nbytes=6 * MIB) == 10 * MIB
    assert arena.resident_nbytes() == 10 * MIB
    assert extents.trim() == 6 * MIB
    assert arena.resident_nbytes() == 4 * MIB
    assert np.all(arena.bytes[keep.offset : keep.offset + keep.nbytes] == 1)


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12: fork with threads; the child only frees and leaves
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_frees_without_harm_to_the_parent() -> None:
    arena = Arena(16 * MIB)
    extents = Extents(arena, warm_limit_nbytes=0)
    extent = extents.allocate(4 * MIB)
    arena.bytes[extent.offset : extent.offset + extent.nbytes] = 7
    with extents._lock:  # as if another thread had it in the moment of the fork
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            extent.free()
            assert extents.trim() == 0
            other = extents.allocate(4 * MIB)
            arena.bytes[other.offset : other.offset + other.nbytes] = 9
            extents.check()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.all(arena.bytes[extent.offset : extent.offset + extent.nbytes] == 7)
    assert extents.statistics().live_extents == 1
    extents.check()


def test_memory_that_nobody_touched_is_known_to_be_zero() -> None:
    arena = Arena(64 << 20)
    extents = Extents(arena, warm_limit_nbytes=64 << 20)
    first = extents.allocate(2 << 20)
    assert first.was_cold
    arena.bytes[first.offset : first.offset + first.nbytes] = 7
    first.free()
    assert not extents.allocate(2 << 20).was_cold
    extents.drain()
    extents.trim()
    again = extents.allocate(2 << 20)
    assert again.was_cold
    assert not arena.bytes[again.offset : again.offset + again.nbytes].any()
