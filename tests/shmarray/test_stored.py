"""What comes out: fresh arrays of expressions, views of stored arrays that are values, memory that comes back, copies and pickles."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

import shmarray as sa

pytestmark = pytest.mark.usefixtures("pool")


def live_nbytes(pool: sa.Pool) -> int:
    gc.collect()
    return pool.statistics().live_nbytes


def start_of(values: np.ndarray) -> int:
    return int(values.__array_interface__["data"][0])


# --- expressions -----------------------------------------------------------------------------------------------------------


def test_computing_an_expression_gives_a_fresh_array_of_the_callers_own(executor: str) -> None:
    source = np.arange(12.0).reshape(3, 4)
    for x in (
        sa.asarray(source),
        sa.asarray(source) * 2,
        sa.asarray(source).T,
        sa.zeros((3, 4)),
        sa.array(source) + 0,
        sa.array(source).T + 0,
    ):
        first, second = x.compute(), x.compute()

        owner = first if first.base is None else first.base  # a transpose, where that is the order in which it was computed
        assert first.flags.writeable and owner.flags.owndata and owner.nbytes == first.nbytes
        assert not np.shares_memory(first, second) and not np.shares_memory(first, source)
        first[...] = -1
        np.testing.assert_array_equal(second, x.compute())
    np.testing.assert_array_equal(source, np.arange(12.0).reshape(3, 4))


def test_computing_one_expression_twice_at_once_gives_two_arrays(executor: str) -> None:
    x = sa.array(np.arange(4.0)) + 1

    first, second, piece = sa.compute(x, x, x[:2])

    first[...] = 0
    np.testing.assert_array_equal(second, np.arange(4.0) + 1)
    np.testing.assert_array_equal(piece, [1, 2])
    assert not np.shares_memory(first, piece)


def test_no_axes_give_a_numpy_scalar(executor: str) -> None:
    x = sa.array(np.arange(4.0))

    for scalar, expected in ((x.sum(), 6.0), (x[2], 2.0), (x[1] + 1, 2.0), (sa.array(3.5), 3.5), (sa.zeros(()), 0.0), (x.max() > 2, True)):
        value = scalar.compute()
        assert isinstance(value, np.generic) and value == expected
        assert np.asarray(scalar).shape == ()


def test_compute_passes_on_what_is_no_array() -> None:
    assert sa.compute(1, "a", None, sa.arange(3).sum()) == (1, "a", None, 3)
    assert sa.compute() == ()


# --- stored arrays ---------------------------------------------------------------------------------------------------------


def test_computing_a_stored_array_gives_a_read_only_view_without_a_copy(executor: str) -> None:
    x = sa.array(np.arange(12.0).reshape(3, 4), chunks=2)

    first, second, array, piece = x.compute(), x.compute(), np.asarray(x), x[1:, ::2].compute()

    assert start_of(first) == start_of(second) == start_of(array)
    assert start_of(piece) == start_of(first) + 32
    assert np.shares_memory(first, piece)
    for values in (first, array, piece):
        assert not values.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            values[...] = 1
        with pytest.raises(ValueError):
            values.flags.writeable = True


def test_views_of_stored_arrays_copy_nothing(pool: sa.Pool) -> None:
    x = sa.array(np.arange(24.0).reshape(4, 6), chunks=2)
    before = live_nbytes(pool)

    views = [
        x.T, x[1:, ::-2], x[None, 2], x.reshape(2, 12), x.reshape(-1), x.ravel(), x.rechunk(3), x.swapaxes(0, 1), np.moveaxis(x, 0, 1),
        sa.broadcast_to(x, (2, 4, 6)), np.flip(x), np.expand_dims(x, 1), x[:1].squeeze(), x[..., 1:3].T, x.blocks[1, 2], x.live,
    ]  # fmt: skip

    assert all(v.is_stored for v in views)
    assert live_nbytes(pool) == before
    base = x.compute()
    assert all(np.shares_memory(v.compute(), base) for v in views)


def test_values_lent_out_stay_what_they_were_and_the_array_moves(executor: str) -> None:
    x = sa.array(np.arange(6.0), chunks=2)
    before, part = x.compute(), x[1:3].compute()
    where = start_of(before)

    x += 1
    after = x.compute()
    x[0] = 100

    np.testing.assert_array_equal(before, np.arange(6.0))
    np.testing.assert_array_equal(part, [1, 2])
    np.testing.assert_array_equal(after, np.arange(6.0) + 1)
    assert start_of(before) == where != start_of(after)
    assert x[0].compute() == 100


def test_an_array_whose_lent_values_are_gone_is_written_where_it_lies(executor: str) -> None:
    x = sa.array(np.arange(6.0), chunks=2)
    where = start_of(x.compute())
    gc.collect()

    x += 1

    assert start_of(x.compute()) == where


def test_lent_values_outlive_the_array_and_give_its_memory_back(pool: sa.Pool, executor: str) -> None:
    before = live_nbytes(pool)
    x = sa.array(np.arange(100_000.0))
    values = x.compute()
    piece = values[10:20:3]

    del x, values
    held = live_nbytes(pool) - before
    others = [sa.zeros(100_000).persist() for _ in range(3)]  # would come to lie in its memory, were it free
    np.testing.assert_array_equal(piece, [10, 13, 16, 19])
    del piece, others

    assert held >= 800_000
    assert live_nbytes(pool) == before


def test_an_array_that_moved_gives_the_old_memory_back_with_the_last_value(pool: sa.Pool) -> None:
    before = live_nbytes(pool)
    x = sa.array(np.zeros(50_000))
    one = live_nbytes(pool) - before
    lent = x.compute()

    x += 1
    assert live_nbytes(pool) - before == 2 * one
    del lent
    assert live_nbytes(pool) - before == one
    del x

    assert live_nbytes(pool) == before


def test_views_keep_the_memory_and_expressions_do_too(pool: sa.Pool, executor: str) -> None:
    before = live_nbytes(pool)
    x = sa.array(np.arange(10_000.0))
    view, expression = x[5:7], x + 1
    del x

    np.testing.assert_array_equal(view.compute(), [5, 6])
    del view
    assert live_nbytes(pool) > before
    assert expression[0].compute() == 1
    del expression

    assert live_nbytes(pool) == before


def test_results_leave_no_temporaries_behind(pool: sa.Pool, executor: str) -> None:
    x = sa.array(np.random.default_rng(0).random((60, 70)), chunks=16)
    before = live_nbytes(pool)

    for _ in range(3):
        ((x - x.mean(0)) / x.std(0)).cumsum(1).T.reshape(-1).sum().compute()

    assert live_nbytes(pool) == before
    pool.check()


def test_persist_gives_a_stored_array_and_itself_when_stored(executor: str) -> None:
    y = sa.asarray(np.arange(6.0)).rechunk(4) + 1

    x = y.persist()
    a, b, c = sa.persist(y, x, 3)

    assert x.is_stored and x.chunks == y.chunks == ((4, 2),)
    assert not y.is_stored
    assert x.persist() is x and b is x and c == 3
    a += 1
    np.testing.assert_array_equal(x.compute(), np.arange(6.0) + 1)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 0)])
def test_arrays_without_elements_are_stored_written_and_computed(shape: tuple[int, ...], executor: str) -> None:
    x = sa.array(np.zeros(shape))

    x += 1
    x[...] = 2

    assert x.is_stored and x.compute().shape == shape
    assert (x + 1).compute().shape == shape
    assert (x + 1).persist().shape == shape
    assert x.sum().compute() == 0
    assert pickle.loads(pickle.dumps(x)).shape == shape


# --- copies ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["copy", "deepcopy", "method", "pickle", "array"])
@pytest.mark.parametrize("what", ["whole", "view"])
def test_copies_of_a_stored_array_are_stored_and_independent(how: str, what: str, executor: str) -> None:
    a = np.arange(24.0).reshape(4, 6)
    x = sa.array(a, chunks=2)
    if what == "view":
        a, x = a[::2, ::-1], x[::2, ::-1]
    make = {
        "copy": copy.copy, "deepcopy": copy.deepcopy, "method": lambda v: v.copy(), "pickle": lambda v: pickle.loads(pickle.dumps(v)),
        "array": sa.array,
    }[how]  # fmt: skip

    y = make(x)
    x += 1
    y[0] = -1

    assert y.is_stored
    if how != "array":
        assert y.chunks == x.chunks
    np.testing.assert_array_equal(x.compute(), a + 1)
    np.testing.assert_array_equal(y.compute()[1:], a[1:])


def test_an_expression_goes_through_pickle_and_deepcopy(executor: str) -> None:
    stored = sa.array(np.arange(12.0).reshape(3, 4), chunks=2)
    x = (stored.T - stored.mean()) * np.arange(3.0) + sa.arange(3)
    expected = x.compute()

    for y in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x), copy.copy(x)):
        assert y.chunks == x.chunks and y.dtype == x.dtype
        np.testing.assert_array_equal(y.compute(), expected)


def test_array_copies_what_it_is_given_and_asarray_does_not(executor: str) -> None:
    values = np.arange(4.0)
    stored, seen = sa.array(values), sa.asarray(values)

    values += 10

    np.testing.assert_array_equal(stored.compute(), np.arange(4.0))
    np.testing.assert_array_equal(seen.compute(), np.arange(4.0) + 10)
    assert sa.asarray(stored) is stored and sa.array(stored) is not stored


def test_a_numpy_array_is_kept_while_an_expression_reads_it_and_no_longer(executor: str) -> None:
    class Watched(np.ndarray):
        pass

    values = np.arange(4.0).view(Watched)
    gone = weakref.ref(values)
    x = sa.asarray(values) + 1
    del values

    np.testing.assert_array_equal(x.compute(), np.arange(4.0) + 1)
    del x
    gc.collect()

    assert gone() is None


def test_threads_that_compute_one_stored_array_share_one_view_of_it() -> None:
    x = sa.array(np.arange(1000.0))
    starts: list[int] = []
    go = threading.Barrier(4)

    def read() -> None:
        go.wait()
        starts.append(start_of(x.compute()))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert starts == [start_of(x.compute())] * 4


def test_strings_dates_and_structures_are_stored_and_come_back(executor: str) -> None:
    for values in (
        np.array(["a", "bcd", ""]), np.array([b"x", b"yz"]), np.array(["2024-01-01", "NaT"], "M8[D]"), np.array([1, 2], "m8[s]"),
        np.array([(1, 2.5), (3, 4.5)], "i4,f8"), np.array([1, 2], ">i4"), np.array([True, False]), np.arange(3, dtype="f2"),
    ):  # fmt: skip
        x = sa.array(values)

        assert x.dtype == values.dtype
        np.testing.assert_array_equal(x.compute(), values)
        np.testing.assert_array_equal(x[::-1].persist().compute(), values[::-1])
        np.testing.assert_array_equal(sa.asarray(values)[1:].compute(), values[1:])


def test_zeros_are_zero_in_memory_that_was_used_before() -> None:
    with sa.Pool(workers=1):
        x = sa.ones(1 << 18).persist()
        del x
        gc.collect()
        assert not np.asarray(sa.zeros(1 << 18).persist()).any()
        assert not np.asarray(sa.zeros(1 << 19).persist()).any()  # cold: nothing runs
        assert np.signbit(np.asarray(sa.full(1 << 19, -0.0).persist())).all()
