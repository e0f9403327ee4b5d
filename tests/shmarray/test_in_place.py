"""Writing stored arrays and expressions: a NumPy array and ours undergo the same program and agree after each step.

The programs are random; what must hold beside the values (errors, `ChangedInput`, handles, exclusion) has tests of its own below.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shmarray as sa

EXECUTORS = ("synchronous", "threads", "processes")
EXAMPLES = {"synchronous": 150, "threads": 50, "processes": 20}
DTYPES = ("i8", "f8", "c16", "i2", "f4")

pytestmark = pytest.mark.usefixtures("pool")


def same(ours: Any, theirs: np.ndarray) -> None:
    got = np.asarray(ours)
    assert got.dtype == theirs.dtype
    np.testing.assert_array_equal(got, theirs)


def here() -> str:
    """Return file:line of the caller."""
    frame = inspect.currentframe().f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# --- random programs -------------------------------------------------------------------------------------------------------


class Twins:
    """A NumPy array and a stored array, views of both, and values lent out on the way."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        shape = self.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=5), "shape")
        dtype = self.draw(st.sampled_from(DTYPES), "dtype")
        values = np.arange(np.prod(shape)).reshape(shape) % 11 - 3
        values = values.astype(dtype)
        if dtype == "c16":
            values = values + 1j * (np.arange(values.size).reshape(shape) % 5)
        chunks = self.draw(st.integers(1, 4), "chunks")
        self.pairs: list[tuple[np.ndarray, Any]] = [(values, sa.array(values, chunks=chunks))]
        self.lent: list[tuple[np.ndarray, np.ndarray]] = []

    def pair(self, label: str) -> tuple[np.ndarray, Any]:
        return self.pairs[self.draw(st.integers(0, len(self.pairs) - 1), label)]

    def operand(self, into: tuple[int, ...]) -> tuple[Any, Any]:
        """Return what broadcasts to ``into``: a number, an array, or an expression of the arrays themselves."""
        kind = self.draw(st.sampled_from(["number", "array", "view", "sum", "max", "mean", "where"]), "operand")
        if kind == "number":
            number = self.draw(st.sampled_from([2, -3, 1.5, np.float32(0.5), np.int8(7)]), "number")
            return number, number
        if kind == "array":
            shape = tuple(n if self.draw(st.booleans(), "keep") else 1 for n in into)
            shape = shape[self.draw(st.integers(0, len(shape)), "drop") :]
            array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(self.draw(st.sampled_from(["i4", "f8"]), "of")) - 2
            return array, array
        a, x = self.pair("source")
        if kind in ("view", "where"):
            for b, y in ((a, x), (a.T, x.T)):
                with contextlib.suppress(ValueError):
                    if np.broadcast_shapes(b.shape, into) == into:
                        return (b, y) if kind == "view" else (np.where(b != 1, b, 4), sa.where(y != 1, y, 4))
            kind = "sum"
        if kind == "mean":
            return np.round(a.astype("f8" if a.dtype.kind != "c" else "c16").mean()), np.round(
                x.astype(f"{'c16' if a.dtype.kind == 'c' else 'f8'}").mean()
            )
        if kind == "max" and a.size and a.dtype.kind != "c":
            return np.asarray(a.max()), x.max()
        return np.asarray(a.sum()), x.sum()

    # Each step does the same to both; an error of NumPy's must be ours, and nothing be changed by it.

    def step_operator(self) -> None:
        (a, x), name = self.pair("target"), self.draw(st.sampled_from(["add", "subtract", "multiply", "maximum"]), "ufunc")
        b, y = self.operand(a.shape)
        self.both(lambda: getattr(np, name)(a, b, out=a, casting="same_kind"), lambda: getattr(np, name)(x, y, out=x, casting="same_kind"))

    def step_augmented(self) -> None:
        a, x = self.pair("target")
        b, y = self.operand(a.shape)

        def theirs(a: Any = a) -> None:
            a += b

        def ours(x: Any = x) -> None:
            x += y

        self.both(theirs, ours)

    def step_region(self) -> None:
        a, x = self.pair("target")
        key = self.draw(hnp.basic_indices(a.shape, allow_newaxis=True, max_dims=4), "region")
        b, y = self.operand(a[key].shape)
        self.both(lambda: a.__setitem__(key, b), lambda: x.__setitem__(key, y))

    def step_compute_out(self) -> None:
        a, x = self.pair("target")
        b, y = self.operand(a.shape)
        with contextlib.suppress(TypeError):
            theirs = np.add(a, b)
            ours = x + y
            if theirs.shape == a.shape and np.can_cast(theirs.dtype, a.dtype, "same_kind"):
                a[...] = theirs
                ours.compute(out=x)

    def step_mask(self) -> None:
        a, x = self.pair("target")
        if a.dtype.kind != "c":
            a[a > 3], x[x > 3] = 1, 1
        else:
            a[a.real > 3], x[x.real > 3] = 1j, 1j

    def step_itself(self) -> None:
        (a, x), kind = self.pair("target"), self.draw(st.sampled_from(["shift", "flip", "cumsum", "swap", "transpose", "roll"]), "itself")
        if not a.ndim:
            return
        for z in (a, x):
            if kind == "shift":
                z[1:] = z[:-1] + z.dtype.type(1)
            elif kind == "flip":
                z[...] = z[::-1]
            elif kind == "cumsum":
                z[...] = z.cumsum(0)
            elif kind == "swap":
                z[0], z[-1] = np.array(z[-1]), np.array(z[0])
            elif kind == "transpose" and z.shape == z.T.shape:
                z += z.T
            elif kind == "roll":
                z[...] = np.roll(z, 2, 0) + z

    def step_view(self) -> None:
        a, x = self.pair("base")
        kind = self.draw(st.sampled_from(["index", "T", "reshape", "part", "rechunk"]), "view")
        if kind == "index":
            key = self.draw(hnp.basic_indices(a.shape, allow_newaxis=True, max_dims=4), "key")
            parts = key if isinstance(key, tuple) else (key,)
            b, y = a[key if Ellipsis in parts else (*parts, ...)], x[key]  # the dots: 0-d views, not scalars
        elif kind == "T":
            b, y = a.T, x.T
        elif kind == "reshape":
            b, y = a.reshape(-1), x.reshape(-1)
            assert y.is_stored or b.size == 0 or not np.shares_memory(a, b)
            if not y.is_stored:
                return
            assert b.size == 0 or np.shares_memory(a, b), "ours is a view where NumPy's is a copy"
        elif kind == "part" and a.dtype.kind == "c":
            b, y = (a.real, x.real) if self.draw(st.booleans(), "real") else (a.imag, x.imag)
        else:
            b, y = a[...], x.rechunk(self.draw(st.integers(1, 5), "rechunk"))
        assert y.is_stored
        if b.size and len(self.pairs) < 5:
            self.pairs.append((b, y))

    def step_lend(self) -> None:
        a, x = self.pair("lent")
        values = np.asarray(x)
        self.lent.append((values, a.copy()))

    def both(self, theirs: Callable[[], Any], ours: Callable[[], Any]) -> None:
        before = [a.copy() for a, _ in self.pairs]
        with np.errstate(all="ignore"):
            try:
                theirs()
            except Exception as error:
                for (a, _), old in zip(self.pairs, before):
                    np.testing.assert_array_equal(a, old)
                with pytest.raises(type(error)):
                    ours()
            else:
                ours()

    def check(self) -> None:
        for a, x in self.pairs:
            assert x.is_stored and x.shape == a.shape and tuple(map(sum, x.chunks)) == a.shape
            same(x, a)
        for values, copy in self.lent:
            np.testing.assert_array_equal(values, copy)


STEPS = sorted(name for name in dir(Twins) if name.startswith("step_"))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
def test_the_same_program_gives_the_same_values_as_in_numpy(name: str) -> None:
    @settings(
        derandomize=True, deadline=None, max_examples=EXAMPLES[name], suppress_health_check=list(HealthCheck), report_multiple_bugs=False
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with sa.config.set(scheduler=name):
            twins = Twins(data)
            for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=8), "steps"):
                getattr(twins, step)()
                twins.check()

    run()


# --- views and aliases -----------------------------------------------------------------------------------------------------


def test_a_basic_index_of_a_stored_array_writes_it_whatever_handle_is_used(executor: str) -> None:
    values = np.arange(24.0).reshape(4, 6)
    grid, expected = sa.array(values, chunks=(2, 3)), values.copy()
    alias, centre = grid, grid[1:-1, 1:-1]

    centre[...] = (grid[:-2, 1:-1] + grid[2:, 1:-1] + grid[1:-1, :-2] + grid[1:-1, 2:]) / 4
    grid.T[0] += 100
    grid.reshape(-1)[-1:] = -1

    old = expected.copy()
    expected[1:-1, 1:-1] = (old[:-2, 1:-1] + old[2:, 1:-1] + old[1:-1, :-2] + old[1:-1, 2:]) / 4
    expected.T[0] += 100
    expected[-1, -1] = -1
    same(grid, expected)
    same(alias, expected)
    same(centre, expected[1:-1, 1:-1])


def test_real_and_imaginary_parts_are_views_and_can_be_set(executor: str) -> None:
    values = np.arange(6) * (1 + 2j)
    x = sa.array(values, chunks=2)

    x.real += 1
    x.imag[::2] = x.real[::2]
    x.imag = x.imag - 1
    x.real = 5

    expected = values.copy()
    expected.real += 1
    expected.imag[::2] = expected.real[::2]
    expected.imag = expected.imag - 1
    expected.real = 5
    same(x, expected)


def test_a_broadcast_view_cannot_be_written(executor: str) -> None:
    x = sa.array(np.arange(4.0))
    wide = sa.broadcast_to(x, (3, 4))

    with pytest.raises(ValueError, match="read-only"):
        wide[...] = 1
    with pytest.raises(ValueError, match="read-only"):
        wide += 1

    same(x, np.arange(4.0))


@pytest.mark.parametrize("update", ["iadd", "setitem", "out"])
def test_a_cast_that_is_not_same_kind_fails_as_in_numpy_and_changes_nothing(executor: str, update: str) -> None:
    a = np.arange(4)
    x = sa.array(a)

    def run(z: Any, half: Any) -> None:
        if update == "iadd":
            z += half
        elif update == "out":
            np.add(z, half, out=z)
        else:
            z[...] = half  # assignment casts as it must

    if update == "setitem":
        run(a, 1.5)
        run(x, 1.5)
    else:
        with pytest.raises(TypeError) as theirs:
            run(a, 1.5)
        with pytest.raises(TypeError) as ours:
            run(x, 1.5)
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value) == str(theirs.value)
    same(x, a)


@pytest.mark.parametrize("key, value", [(slice(0, 2), np.zeros(3)), ((slice(None), 0), np.zeros((5, 2))), (9, 1), ((0, 0, 0), 1)])
def test_a_value_that_does_not_fit_or_an_index_out_of_range_fails_as_in_numpy(key: Any, value: Any) -> None:
    a = np.arange(8.0).reshape(4, 2)
    x, y = sa.array(a), sa.asarray(a) + 0

    for z in (x, y):
        with pytest.raises(Exception) as theirs:
            a[key] = value
        with pytest.raises(type(theirs.value)):
            z[key] = value
        same(z, a)


def test_an_update_whose_operand_is_larger_fails_and_names_both_shapes() -> None:
    x = sa.array(np.zeros(4))

    with pytest.raises(ValueError, match=r"\(4,\).*\(3, ?4\)"):
        x += np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        x += np.zeros(2)


def test_compute_into_a_numpy_array_and_into_a_view(executor: str) -> None:
    x = sa.array(np.arange(6.0), chunks=2)
    out = np.empty(6, "f4")

    assert (x * 2).compute(out=out) is out
    target = x[::-1]
    assert (x[:3].compute().sum() + sa.arange(6.0)).compute(out=target) is target

    same(out, np.arange(0, 12, 2, dtype="f4"))
    same(x, (3 + np.arange(6.0))[::-1])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        (x[:3] + 1).compute(out=x)
    with pytest.raises(TypeError, match="same_kind"):
        (x * 1j).compute(out=x)
    with pytest.raises(TypeError, match="list"):
        (x + 1).compute(out=[0] * 6)


def test_ufuncs_write_out_and_several_outputs(executor: str) -> None:
    a = np.arange(6.0) - 2
    whole, part, flags = sa.array(np.zeros(6)), sa.array(np.zeros(6)), sa.array(np.zeros(6, bool))

    assert np.modf(sa.asarray(a) / 4, out=(part, whole))[0] is part
    assert np.isfinite(part, out=flags) is flags
    np.multiply(whole, 2, out=whole, where=whole > 0)
    np.copyto(part[:3], whole[3:])

    fraction, integer = np.modf(a / 4)
    np.multiply(integer, 2, out=integer, where=integer > 0)
    fraction[:3] = integer[3:]
    same(whole, integer)
    same(part, fraction)
    same(flags, np.ones(6, bool))


def test_masks_and_integer_arrays_can_be_assigned(executor: str) -> None:
    a = np.arange(20.0).reshape(4, 5)
    x, y = sa.array(a, chunks=2), sa.asarray(a.copy()) + 0

    for z in (a, x, y):
        z[z > 12] = -1
        z[[0, 2]] = z[[2, 0]]
        z[:, np.array([1, 3])] *= 2
        z[z < 0] = np.arange((a < 0).sum()) if z is a else np.arange(int((z < 0).sum()))
        z[np.array([True, False, True, False]), 2] = 7

    same(x, a)
    same(y, a)


# --- expressions -----------------------------------------------------------------------------------------------------------


def test_an_update_of_an_expression_is_seen_by_its_own_handle_alone(executor: str) -> None:
    a = np.arange(6.0)
    x = sa.asarray(a) * 1
    same_handle, built_before, piece = x, x + 0, x[1:3]

    x += 1
    x[2:4] = [-1, -2]
    x[0] = 9
    np.multiply(x, 2, out=x)

    expected = a + 1
    expected[2:4] = [-1, -2]
    expected[0] = 9
    expected *= 2
    assert same_handle is x
    same(same_handle, expected)
    same(built_before, a)
    same(piece, a[1:3])
    same(sa.asarray(a), np.arange(6.0))


def test_a_slice_of_an_expression_is_a_value_not_a_view(executor: str) -> None:
    x = sa.arange(6.0) * 2
    piece = x[1:4]

    piece[...] = 0
    piece += 5

    same(piece, np.full(3, 5.0))
    same(x, np.arange(6.0) * 2)


def test_an_update_of_an_expression_keeps_dtype_and_shape() -> None:
    x = sa.arange(4) + 0

    x[...] = 2.7
    with pytest.raises(TypeError, match="same_kind"):
        x += 0.5
    with pytest.raises(ValueError):
        x += np.zeros((2, 4), int)

    same(x, np.full(4, 2))


# --- changed inputs --------------------------------------------------------------------------------------------------------


def test_an_expression_on_bytes_that_were_written_since_raises_and_names_both_lines(executor: str) -> None:
    x = sa.array(np.arange(8.0), chunks=2)
    y, built = x[2:5] * 2, here()
    x[4:] = 0
    written = f"{__file__}:{inspect.currentframe().f_lineno - 1}"

    with pytest.raises(sa.ChangedInput) as raised:
        y.compute()

    assert built in str(raised.value)
    assert written in str(raised.value)
    with pytest.raises(sa.ChangedInput):
        y.persist()
    with pytest.raises(sa.ChangedInput):
        y.compute(out=x[:3])


REGIONS = st.tuples(st.integers(0, 7), st.integers(0, 8), st.integers(1, 3), st.integers(0, 5), st.integers(0, 6), st.integers(1, 3))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(REGIONS, REGIONS)
def test_exactly_a_write_that_overlaps_what_is_read_changes_an_input(read: tuple[int, ...], written: tuple[int, ...]) -> None:
    keys = [(slice(k[0], k[1], k[2]), slice(k[3], k[4], k[5])) for k in (read, written)]
    a = np.arange(48.0).reshape(8, 6)
    x = sa.array(a, chunks=3)
    y = x[keys[0]] + 1

    x[keys[1]] = -1

    if np.shares_memory(a[keys[0]], a[keys[1]]):
        with pytest.raises(sa.ChangedInput):
            y.compute()
    else:
        same(y, a[keys[0]] + 1)


def test_live_arrays_read_what_is_there_when_they_are_computed(executor: str) -> None:
    x = sa.array(np.arange(4.0))
    late, part = x.live * 2, x.live[1:3].sum()

    x += 10

    same(late, (np.arange(4.0) + 10) * 2)
    assert part.compute() == 23
    with pytest.raises(TypeError, match="stored"):
        (x + 1).live


@pytest.mark.parametrize("keep", ["persist", "copy", "compute"])
def test_what_is_kept_before_a_write_is_not_changed_by_it(executor: str, keep: str) -> None:
    x = sa.array(np.arange(4.0))
    kept = getattr(x * 2 if keep != "copy" else x, keep)()

    later = kept + 1
    x[...] = -1

    same(later, np.arange(4.0) * (1 if keep == "copy" else 2) + 1)


@pytest.mark.parametrize("limit", [0, 1 << 22], ids=["as a plan", "at once"])
def test_a_copy_is_of_all_that_is_there_and_waits_for_who_writes(
    executor: str, pool: sa.Pool, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(sys.modules["shmarray.compute"], "AT_ONCE_NBYTES", limit)
    values = np.arange(60).reshape(5, 12)
    x = sa.array(values, chunks=(2, 5))
    views = (lambda a: a[::-2, 3:], lambda a: a.T, lambda a: a[2], lambda a: a[:0], lambda a: a[1, 1:2])

    with x.lock() as view:
        thread, results = in_thread(lambda: [cut(x).copy() for cut in views])
        wait_until_one_waits(pool)
        view += 100
    thread.join()
    x[...] = -1

    for copy, cut in zip(results[0], views, strict=True):
        assert copy.is_stored
        same(copy, cut(values + 100))
    x._storage.tear({0: "Torn."})
    with pytest.raises(sa.TornChunkError):
        x[:1].copy()
    x[2:].copy()


def test_a_write_through_any_alias_changes_the_input_of_what_was_built_on_another(executor: str) -> None:
    z = sa.array(np.arange(4) * 1j)
    by_view, by_part, disjoint = z[1:3] + 1, z.imag + 1, z.real + 1

    z.imag[2:] = 7

    for y in (by_view, by_part):
        with pytest.raises(sa.ChangedInput):
            y.compute()
    same(disjoint, np.ones(4))


def test_more_writes_than_are_remembered_still_count(executor: str) -> None:
    x = sa.array(np.arange(4.0))
    y = x + 1
    x[0] = 5
    for _ in range(100):
        x[3] = 1

    with pytest.raises(sa.ChangedInput):
        y.compute()


# --- locks -----------------------------------------------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run ``work`` in another thread under this one's settings; return the thread and where its result or error will be."""
    results: list[Any] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=context.run, args=(run,), daemon=True)
    thread.start()
    return thread, results


def wait_until_one_waits(pool: sa.Pool) -> None:
    """Return when a thread waits in the lock table: the only sign there is of a thread that has begun to wait."""
    pause = threading.Event()
    for _ in range(10_000):
        if pool.locks.statistics().waiting:
            return
        pause.wait(0.001)
    raise AssertionError("nobody came to wait")


def test_a_locked_chunk_is_a_live_view_of_that_chunk() -> None:
    x = sa.array(np.zeros((4, 6)), chunks=(2, 3))

    with x.lock((1, 0), "w") as view:
        view += 1
        assert view.shape == (2, 3)
        assert x[2, 0].compute() == 1  # this thread does not wait for itself
        x[0, 0] = 5
    with x.lock((-1, -2), "r") as view:
        assert not view.flags.writeable
        assert view.sum() == 6
    with x.lock() as view:
        assert view.shape == (4, 6)

    expected = np.zeros((4, 6))
    expected[2:, :3] = 1
    expected[0, 0] = 5
    same(x, expected)


def test_values_lent_out_before_a_lock_do_not_see_what_is_written_under_it() -> None:
    x = sa.array(np.arange(4.0), chunks=2)
    before = x.compute()

    with x.lock(0, "w") as view:
        view[...] = -1

    np.testing.assert_array_equal(before, np.arange(4.0))
    same(x, np.array([-1, -1, 2, 3.0]))


def test_values_lent_out_under_a_lock_do_not_see_what_is_written_later_under_it() -> None:
    x = sa.array(np.arange(4.0), chunks=2)

    with x.lock(0, "w") as view:
        within = x.compute()
        view[...] = -1

    np.testing.assert_array_equal(within, np.arange(4.0))
    same(x, np.array([-1, -1, 2, 3.0]))


def test_a_writer_excludes_other_threads_until_it_leaves(pool: sa.Pool, executor: str) -> None:
    x = sa.array(np.zeros(4), chunks=2)

    with x.lock(0, "w") as view:
        thread, results = in_thread(lambda: x.live.sum().compute())
        wait_until_one_waits(pool)
        view[...] = 1
    thread.join(30)

    assert results == [2.0]


def test_an_update_by_another_thread_waits_and_is_not_lost(pool: sa.Pool, executor: str) -> None:
    x = sa.array(np.zeros(4), chunks=2)
    before = x.compute()  # so that the next write has to move the array

    def add() -> None:
        z = x
        z += 1

    with x.lock(None, "w") as view:
        thread, results = in_thread(add)
        wait_until_one_waits(pool)
        view += 10
    thread.join(30)

    assert results == [None]
    same(x, np.full(4, 11.0))
    np.testing.assert_array_equal(before, np.zeros(4))


def test_a_write_under_a_lock_changes_the_input_of_who_waits(pool: sa.Pool) -> None:
    x = sa.array(np.zeros(4), chunks=2)
    y = x + 1

    with x.lock(1, "w") as view:
        thread, results = in_thread(y.compute)
        wait_until_one_waits(pool)
        view[...] = 1
    thread.join(30)

    assert isinstance(results[0], sa.ChangedInput)


def test_readers_share_a_chunk_and_other_chunks_are_free() -> None:
    x = sa.array(np.zeros(4), chunks=2)

    def read_and_write() -> float:
        with x.lock(0, "r", timeout=30) as view:
            x[2:] = 1
            return float(view.sum())

    with x.lock(0, "r"):
        thread, results = in_thread(read_and_write)
        thread.join(30)

    assert results == [0.0]


def test_a_lock_that_is_not_free_in_time_raises() -> None:
    x = sa.array(np.zeros(4), chunks=2)

    def take() -> None:
        with x.lock(0, "w", timeout=0.01):
            pass

    with x.lock(0, "w"):
        thread, results = in_thread(take)
        thread.join(30)

    assert isinstance(results[0], TimeoutError)


def test_threads_that_add_at_once_are_all_counted(executor: str) -> None:
    x = sa.array(np.zeros(64), chunks=8)
    go = threading.Event()

    def add() -> None:
        go.wait()
        z = x[1:]
        for _ in range(5):
            z += 1

    started = [in_thread(add) for _ in range(4)]
    go.set()
    for thread, _ in started:
        thread.join(60)

    assert [results for _, results in started] == [[None]] * 4
    same(x, np.array([0.0] + [20.0] * 63))


def test_what_cannot_be_locked_says_why() -> None:
    x = sa.array(np.zeros((4, 4)), chunks=2)

    with pytest.raises(IndexError, match=r"\(2, 0\)"), x.lock((2, 0)):
        pass
    with pytest.raises(IndexError, match="2 dimensions"), x.lock(0):
        pass
    with pytest.raises(TypeError, match="stored"), (x + 1).lock((0, 0)):
        pass
    with pytest.raises(ValueError, match="'x'"), x.lock((0, 0), "x"):
        pass


def test_an_error_under_a_lock_gives_it_back(pool: sa.Pool) -> None:
    x = sa.array(np.zeros(4), chunks=2)

    with pytest.raises(KeyError), x.lock(0, "w") as view:
        view[...] = 3
        raise KeyError("mine")

    assert pool.locks.statistics().granted == 0
    same(x, np.array([3.0, 3, 0, 0]))


def test_an_expression_written_several_times_keeps_every_write(executor: str) -> None:
    a = np.arange(50.0).reshape(5, 10)
    x = sa.array(a)

    y, expected = x * 2, a * 2
    for which, source in ((y, x), (expected, a)):
        which[0] = which[-1] = 0
        which[1:-1] = source[:-2]
        which[:, 3:5] = which[:, :2]
        which[2] = source.sum(axis=0)

    same(y, expected)


def test_adding_to_a_view_by_index_from_threads_counts_every_time_and_raises_nothing() -> None:
    grid = sa.array(np.zeros((20, 50)))
    errors: list[BaseException] = []

    def add() -> None:
        try:
            for _ in range(40):
                grid[0:10] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (np.asarray(grid)[:10] == 120).all()
    assert not np.asarray(grid)[10:].any()


def test_outputs_of_one_ufunc_may_be_its_inputs() -> None:
    values = np.arange(5.0) + 0.5
    x, y = sa.array(values), sa.array(np.zeros(5))
    np.divmod(x, 3, out=(x, y))
    np.testing.assert_array_equal(np.asarray(x), values // 3)
    np.testing.assert_array_equal(np.asarray(y), values % 3)


def test_ufunc_at_writes_the_array_and_spares_what_was_lent() -> None:
    x = sa.array(np.zeros(4))
    before, expression = np.asarray(x), x + 1
    np.add.at(x, [0, 0, 2], 1)
    np.testing.assert_array_equal(np.asarray(x), [2, 0, 1, 0])
    assert not before.any()
    with pytest.raises(sa.ChangedInput):
        expression.compute()


def test_a_function_that_raises_leaves_the_target_as_it_was() -> None:
    def picky(block: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        if block_id == (3,):
            raise ValueError("no")
        return block + 1

    x, y = sa.array(np.zeros(8)), sa.array(np.zeros(8)).rechunk(2)
    with pytest.raises(ValueError, match="no"):
        x[...] = y.map_blocks(picky, dtype=float)
    assert not np.asarray(x).any()


# --- what NumPy copies is no alias -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.flatten(),
        lambda m, x: x[0].flatten(),
        lambda m, x: x.take(1, 0),
        lambda m, x: m.take(x, 1, axis=1),
        lambda m, x: m.take(x, [0, 1], axis=0),
        lambda m, x: m.roll(x, 0),
        lambda m, x: m.roll(x, 3, axis=1),
        lambda m, x: m.roll(x, (0, 2), axis=(1, 0)),
        lambda m, x: m.clip(x, None, None),
        lambda m, x: x.clip(-100, 100),
        lambda m, x: x.astype(float),
        lambda m, x: m.astype(x, x.dtype),
        lambda m, x: m.full((4, 2, 3), x),
        lambda m, x: m.full(x.shape, x, x.dtype),
        lambda m, x: m.full_like(x, x),
        lambda m, x: x[np.array(1)],
        lambda m, x: x[np.array(1), 1:],
        lambda m, x: x[[0, 1]],
        lambda m, x: x[x > -100],
        lambda m, x: x.copy(),
        lambda m, x: m.array(x),
        lambda m, x: np.copy(x),
        lambda m, x: m.round(x),
        lambda m, x: x.conj(),  # of real numbers itself
        lambda m, x: (x * 1j).conj(),
        lambda m, x: m.conj(x),
        lambda m, x: +x,
        lambda m, x: abs(x),
        lambda m, x: m.nan_to_num(x),
        lambda m, x: m.sum(x, axis=()),
        lambda m, x: m.max(x, axis=()),
        lambda m, x: m.mean(x[None], axis=0),
        lambda m, x: m.cumsum(x[:1], axis=0),
        lambda m, x: m.concatenate([x]),
        lambda m, x: m.stack([x]),
        lambda m, x: m.vstack([x]),
        lambda m, x: m.hstack([x]),
        lambda m, x: m.block([x]),
        lambda m, x: m.where(True, x, 0),
        lambda m, x: m.astype(x, float, copy=False),
        lambda m, x: m.asarray(x),
        lambda m, x: m.asarray(x, dtype=float),
        lambda m, x: m.squeeze(x),
        lambda m, x: m.ravel(x),
        lambda m, x: m.atleast_2d(x),
        lambda m, x: x[1],
        lambda m, x: x[..., 1],
    ],
)
def test_writing_what_a_function_gave_changes_its_source_exactly_when_it_does_in_numpy(function: Callable[[Any, Any], Any]) -> None:
    theirs = np.arange(6.0).reshape(2, 3)
    ours = sa.array(theirs, chunks=2)
    expected, result = function(np, theirs), function(sa, ours)

    expected += 1
    result += 1

    np.testing.assert_array_equal(ours.compute(), theirs)
    np.testing.assert_array_equal(result.compute(), expected)
