"""Memory of results: nobody's but the holder's while any array over it lives, used again after, bounded."""

from __future__ import annotations

import gc
import random

import numpy as np

from scheduler.results import SMALLEST_NBYTES, ResultMemory

FLOAT = np.dtype(float)
ITEMS = SMALLEST_NBYTES // 8


def pointer(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_memory_is_used_again_only_when_the_last_array_over_it_is_gone() -> None:
    memory = ResultMemory(1 << 30)
    first = memory.empty((ITEMS,), FLOAT)
    at = pointer(first)
    view = first[10:].reshape(-1, 2)[::3]
    del first
    other = memory.empty((ITEMS,), FLOAT)
    assert pointer(other) != at
    del view
    assert pointer(memory.empty((ITEMS,), FLOAT)) == at
    memory.check()


def test_a_result_is_writable_and_of_the_shape_and_dtype_asked_for() -> None:
    array = ResultMemory(1 << 30).empty((3, ITEMS), np.dtype("f4"))
    array[...] = 5
    assert array.shape == (3, ITEMS)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert (array == 5).all()


def test_what_is_kept_is_bounded_and_can_be_given_back() -> None:
    memory = ResultMemory(3 * SMALLEST_NBYTES)
    arrays = [memory.empty((ITEMS,), FLOAT) for _ in range(8)]
    del arrays
    assert 0 < memory.warm_nbytes() <= 3 * SMALLEST_NBYTES
    memory.trim()
    assert memory.warm_nbytes() == 0


def test_a_large_mapping_is_not_wasted_on_a_small_result() -> None:
    memory = ResultMemory(1 << 30)
    large = memory.empty((16 * ITEMS,), FLOAT)
    at = pointer(large)
    del large
    assert pointer(memory.empty((ITEMS,), FLOAT)) != at


def test_random_use_never_lends_bytes_twice() -> None:
    seed = random.Random(3)
    memory = ResultMemory(16 * SMALLEST_NBYTES)
    live: list[tuple[np.ndarray, int]] = []
    for step in range(300):
        if live and seed.random() < 0.5:
            array, mark = live.pop(seed.randrange(len(live)))
            assert array[0] == array[-1] == mark
        else:
            array = memory.empty((seed.choice((1, 2, 3)) * ITEMS,), FLOAT)
            array[0] = array[-1] = step
            live.append((array, step))
        del array
        memory.check()
        if step % 50 == 0:
            gc.collect()
    assert all(array[0] == mark for array, mark in live)
