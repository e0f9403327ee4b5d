"""Arrays that do not fit the memory limit: whatever is done with stored arrays, with NumPy's values, by each engine and executor."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmarray as sa
from scheduler import spill
from shmarray import templates
from shmarray.errors import MemoryBudgetError, SpillError, TornChunkError
from shmarray.ops import gather
from shmarray.plan import Target

MIB = 1 << 20
SHAPE = (2048, 1024)  # 16 MiB of float64, twice the limit
LARGE = (4096, 2048)  # 64 MiB
ENGINES = ("numpy", "llvm") if importlib.util.find_spec("llvmlite") else ("numpy",)


@pytest.fixture(scope="module")
def values() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).random(SHAPE)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with sa.config.set(engine=request.param):
        yield request.param


@pytest.fixture
def small(tmp_path: Path) -> Iterator[sa.Pool]:
    """A pool that an array of 16 MiB does not fit; at its end nothing of it may be held, on disk neither."""
    with sa.Pool(workers=2, memory_limit="8MiB", spill_directory=str(tmp_path)) as made:
        yield made
        gc.collect()
        assert made.statistics().spilled_nbytes == 0
        assert made.memory.spill is not None and made.memory.spill.resident_nbytes() < MIB
        made.check()


def same(found: Any, expected: np.ndarray[Any, Any], rtol: float = 0.0) -> None:
    """Compare an array part by part: as a whole it may not be computed."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    out = np.empty(found.shape, found.dtype)
    found.compute(out=out)
    if rtol:
        np.testing.assert_allclose(out, expected, rtol=rtol)
    else:
        np.testing.assert_array_equal(out, expected)


# --------------------------------------------------------------------------------------------------------------- values


def test_elementwise_reductions_and_updates(small: sa.Pool, executor: str, engine: str) -> None:
    values = np.random.default_rng(8).random(LARGE)
    x = sa.array(values)
    y = (x * 2 + 1).persist()
    assert small.statistics().spilled_nbytes == 128 * MIB
    assert small.statistics().live_nbytes < MIB

    same(y, values * 2 + 1)
    np.testing.assert_allclose((x + y).sum().compute(), (values * 3 + 1).sum(), rtol=1e-12)
    np.testing.assert_allclose(x.sum(axis=0).compute(), values.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(x.std(axis=1).compute(), values.std(axis=1), rtol=1e-12)
    assert int(x.argmax().compute()) == int(values.argmax())
    y += x
    y[1:-1] *= 2
    expected = values * 2 + 1 + values
    expected[1:-1] *= 2
    same(y, expected)


def test_updates_that_read_other_places_of_their_target(small: sa.Pool, executor: str, values: np.ndarray[Any, Any]) -> None:
    x, expected = sa.array(values), values.copy()
    x[1:-1, 1:-1] = x[:-2, :-2] * 2 + x[2:, 2:]
    expected[1:-1, 1:-1] = values[:-2, :-2] * 2 + values[2:, 2:]
    same(x, expected)
    x[...] = x[::-1]
    same(x, expected[::-1])


def test_running_sums_have_the_bits_they_have_in_memory(small: sa.Pool, executor: str, values: np.ndarray[Any, Any]) -> None:
    with sa.Pool(workers=0, memory_limit="1GiB") as roomy:
        there = sa.array(values)
        expected = [there.cumsum(axis=axis).compute() for axis in (0, 1)]
        twice = there.cumsum(axis=0).cumsum(axis=1)[5].compute()
        assert roomy.statistics().spilled_nbytes == 0
    x = sa.array(values)
    for axis in (0, 1):
        same(x.cumsum(axis=axis).persist(), expected[axis])
    np.testing.assert_array_equal(x.cumsum(axis=0).cumsum(axis=1)[5].compute(), twice)  # two spilled temporaries


def test_sums_have_the_bits_they_have_in_memory(small: sa.Pool, engine: str, values: np.ndarray[Any, Any]) -> None:
    with sa.Pool(workers=0, memory_limit="1GiB"):
        there = sa.array(values)
        expected = sa.compute((there * 1.1).sum(), there.mean(axis=0), there.var(axis=1))
    x = sa.array(values)
    found = sa.compute((x * 1.1).sum(), x.mean(axis=0), x.var(axis=1))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_views_rechunks_and_transposes(small: sa.Pool, executor: str, values: np.ndarray[Any, Any]) -> None:
    x = sa.array(values)
    before = small.statistics().spilled_nbytes
    view, again = x[::3, 5:-7:2], x.rechunk((128, 512))
    assert small.statistics().spilled_nbytes == before  # no bytes moved
    np.testing.assert_array_equal(view[100:110].compute(), values[::3, 5:-7:2][100:110])
    same(x.T.copy(), values.T)
    same(x[:, ::-1].copy(), values[:, ::-1])
    same(x.reshape(1024, 2, 1024)[:, 1].persist(), values.reshape(1024, 2, 1024)[:, 1])
    same(again.map_blocks(lambda block: block.round(1)).persist(), np.round(values, 1))
    same(sa.concatenate([x[:100], x[-100:]]).persist(), np.concatenate([values[:100], values[-100:]]))


def test_products_of_panels(small: sa.Pool, executor: str, values: np.ndarray[Any, Any]) -> None:
    x = sa.array(values).reshape(-1, 64)
    b = np.random.default_rng(1).random((64, 24))
    np.testing.assert_allclose((x @ b)[1000:1100].compute(), values.reshape(-1, 64)[1000:1100] @ b, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["?", "i2", "f4", "c8", "M8[s]"])
def test_other_dtypes(small: sa.Pool, executor: str, dtype: str) -> None:
    expected = np.arange(16 * MIB // np.dtype(dtype).itemsize).astype("u1").astype(dtype)
    x = sa.array(expected)
    assert small.statistics().spilled_nbytes == 16 * MIB
    same(x[::-1].copy(), expected[::-1])
    same((x == expected[3]).persist(), expected == expected[3])


def test_zeros_need_no_writing(small: sa.Pool) -> None:
    x = sa.zeros(SHAPE).persist()
    assert small.statistics().plans == 0
    assert float(x.max().compute()) == 0.0


# ------------------------------------------------------------------------------------------------- what is stored, as such


def test_what_compute_gives_of_a_stored_array_is_a_private_read_only_copy(tmp_path: Path) -> None:
    with sa.Pool(workers=0, memory_limit="32MiB", spill_directory=str(tmp_path)) as made:
        x = sa.array(np.arange(4.0 * MIB))  # 32 MiB do not fit beside scratch, and fit as a result
        assert made.statistics().spilled_nbytes == 32 * MIB
        assert "stored on disk" in repr(x)
        found = x[:MIB].compute()
        x += 1
        assert found[5] == 5.0 and not found.flags.writeable
        assert x.compute()[5] == 6.0
        with pytest.raises(ValueError, match="spill file"):
            np.asarray(x, copy=False)
        assert np.asarray(x, copy=True).flags.writeable
        assert [float(row) for row in x[3:6]] == [4.0, 5.0, 6.0]
        assert x[7].item() == 8.0


def test_a_locked_chunk_is_read_in_and_written_back(small: sa.Pool, executor: str, values: np.ndarray[Any, Any]) -> None:
    x = sa.array(values, chunks=(256, 256))
    with x.lock((1, 2), "w") as chunk:
        np.testing.assert_array_equal(chunk, values[256:512, 512:768])
        chunk[...] = -1
    with x.lock((1, 2), "r") as chunk:
        assert (chunk == -1).all()
        with pytest.raises(ValueError, match="read-only"):
            chunk[0, 0] = 0
    expected = values.copy()
    expected[256:512, 512:768] = -1
    same(x, expected)
    with pytest.raises(MemoryBudgetError, match=r"16 MiB.*8 MiB"), x.lock():
        pass
    with pytest.raises(RuntimeError, match="mine"), x.lock((0, 0), "w") as chunk:
        chunk[0, 0] = 5
        raise RuntimeError("mine")
    assert x[0, 0].compute() == 5  # as through a live view: what was done was done


def test_a_write_that_moves_an_array_may_move_it_to_the_file(tmp_path: Path) -> None:
    with sa.Pool(workers=0, memory_limit="64MiB", spill_directory=str(tmp_path)) as made:
        x = sa.array(np.arange(4.0 * MIB))
        assert made.statistics().spilled_nbytes == 0
        view = x.compute()
        x += 1  # the view is a value: the bytes move
        assert made.statistics().spilled_nbytes == 32 * MIB
        assert (view[9], x[9].compute()) == (9.0, 10.0)
        same(x, np.arange(4.0 * MIB) + 1)


def test_the_pool_of_the_file_computes_wherever_the_caller_stands(small: sa.Pool, values: np.ndarray[Any, Any]) -> None:
    x = sa.array(values)
    with sa.Pool(workers=0, memory_limit="8MiB") as other:
        y = sa.array(values)
        near = sa.array(np.arange(1024.0))
        plans = other.statistics().plans
        same((x + near)[:100].persist(), (values + np.arange(1024.0))[:100])
        x += near
        assert other.statistics().plans == plans
        with pytest.raises(SpillError, match=r"spill file of one pool.*no worker reaches both"):
            (x + y).sum().compute()
    same(x, values + np.arange(1024.0))


def test_a_directory_in_memory_is_used_when_it_is_named(values: np.ndarray[Any, Any]) -> None:
    if os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize < 32 * MIB:
        pytest.skip("/dev/shm is too small")
    with sa.Pool(workers=1, memory_limit="8MiB", spill_directory="/dev/shm") as made:
        same((sa.array(values) + 1).persist(), values + 1)
        assert made.memory.spill is not None and made.memory.spill.directory == "/dev/shm"


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_a_result_larger_than_the_limit_is_refused_before_anything_runs(small: sa.Pool) -> None:
    x = sa.ones(SHAPE) + 1
    for attempt in (x.compute, lambda: np.asarray(x), lambda: sa.compute(x[:400], x[400:])):
        with pytest.raises(MemoryBudgetError, match=r"MiB of NumPy arrays.*8 MiB.*persist\(\).*out=.*memory_limit"):
            attempt()
    stored = x.persist()
    plans = small.statistics().plans
    with pytest.raises(MemoryBudgetError, match=r"16 MiB lies in the spill file.*8 MiB"):
        stored.compute()
    assert small.statistics().plans == plans


def test_scratch_that_cannot_fit_is_refused_with_numbers(small: sa.Pool) -> None:
    x = sa.ones(SHAPE, chunks=SHAPE).persist()
    plans = small.statistics().plans
    with pytest.raises(MemoryBudgetError, match=r"scratch for 2 workers.*8 MiB memory limit.*smaller chunks"):
        x.map_blocks(np.sqrt, dtype=float).persist()
    assert small.statistics().plans == plans + 1  # asked for, and refused when admitted
    assert float(x.rechunk((64, 1024)).map_blocks(np.sqrt, dtype=float).sum().compute()) == 2048 * 1024


def test_results_go_straight_to_an_array_that_is_given(small: sa.Pool, values: np.ndarray[Any, Any]) -> None:
    out = np.zeros(SHAPE, "f4")
    (sa.array(values) * 2).compute(out=out)
    np.testing.assert_array_equal(out, (values * 2).astype("f4"))


def test_explain_tells_of_spilled_temporaries(small: sa.Pool) -> None:
    x = sa.ones(SHAPE)
    assert "32 MiB of temporaries do not fit the memory limit" in str(x.cumsum(axis=0).cumsum(axis=1).sum().explain())
    assert "spill" not in str(x.sum().explain())


def test_plans_of_different_free_memory_are_not_mixed(tmp_path: Path) -> None:
    with sa.Pool(workers=0, memory_limit="64MiB", spill_directory=str(tmp_path)) as made:
        x = sa.array(np.arange(2.0 * MIB).reshape(1024, 2048) % 10)

        def spilled() -> list[bool]:
            plan = templates.plan_for([node], [Target((), np.dtype(float))], made)
            return [b.is_spilled for b in plan.buffers if b.address is None and b.nbytes == 16 * MIB]

        node = x.cumsum(axis=0).cumsum(axis=1).max().node
        assert spilled() == [False, False]
        assert spilled() == [False, False]
        taken = sa.zeros(2 * MIB).persist()
        assert spilled() == [True, False]
        assert spilled() == [True, False]
        del taken
        assert spilled() == [False, False]


# ---------------------------------------------------------------------------------------------------------------- failures


def failing(monkeypatch: pytest.MonkeyPatch, name: str, after: int, code: int = errno.EIO) -> None:
    """Have call ``after`` of a function of the spill file fail, and all that follow."""
    real: Callable[..., int] = getattr(spill, name)
    left = [after]

    def call(*args: Any) -> int:
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        left[0] -= 1
        return real(*args)

    monkeypatch.setattr(spill, name, call)


@pytest.mark.parametrize("name", ["_read_some", "_write_some"])
@pytest.mark.parametrize("after", [0, 1, 8])
def test_a_disk_that_fails_fails_the_computation_and_loses_nothing(
    small: sa.Pool, monkeypatch: pytest.MonkeyPatch, name: str, after: int, values: np.ndarray[Any, Any]
) -> None:
    x = sa.array(values)
    with sa.config.set(scheduler="synchronous"):
        failing(monkeypatch, name, after)
        with pytest.raises(SpillError, match="Input/output error") as caught:
            (x + 1).persist()
        assert any("part [" in note for note in caught.value.__notes__)
        monkeypatch.undo()
        del caught  # its traceback holds the result
        gc.collect()
        assert small.statistics().spilled_nbytes == 16 * MIB
        same((x + 1).persist(), values + 1)


def test_an_update_that_the_disk_cuts_short_leaves_torn_chunks(small: sa.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sa.array(np.ones(SHAPE), chunks=(256, 1024))
    with sa.config.set(scheduler="synchronous"):
        failing(monkeypatch, "_write_some", 9)
        with pytest.raises(SpillError, match="Input/output error"):
            x += 1
        monkeypatch.undo()
        with pytest.raises(TornChunkError):
            x.sum().compute()
        x[...] = 3
        assert float(x.sum().compute()) == 3 * 2048 * 1024


def test_a_lock_whose_chunk_cannot_be_written_back_leaves_it_torn(small: sa.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sa.array(np.ones(SHAPE), chunks=(256, 1024))
    x = x.rechunk((128, 1024))
    with pytest.raises(SpillError, match="Input/output error"), x.lock((1, 0), "w") as chunk:
        chunk[...] = 2
        failing(monkeypatch, "_write_some", 0)
    monkeypatch.undo()
    with pytest.raises(TornChunkError, match="back to the spill file"):
        x[:200].sum().compute()
    assert float(x[256:].min().compute()) == 1.0


def test_a_full_disk_fails_before_anything_is_written(
    small: sa.Pool, monkeypatch: pytest.MonkeyPatch, values: np.ndarray[Any, Any]
) -> None:
    x = sa.array(values)

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SpillError, match=r"16 MiB.*disk is full"):
        x.persist().cumsum(axis=0).persist()
    with pytest.raises(SpillError, match=r"disk is full"):
        x[1:] = x[:-1]  # the temporary
    monkeypatch.undo()
    same(x, values)


def test_who_holds_a_chunk_of_the_file_may_use_the_array(small: sa.Pool) -> None:
    x = sa.zeros(SHAPE, chunks=(256, 1024)).persist()
    x[...] = sa.random.default_rng(1).random(SHAPE) * 0
    assert x._storage is not None and x._storage.is_spilled
    with x.lock((1, 0), "w") as chunk:
        chunk[...] = 9
        assert float(x[256:512].min().compute()) == 9
        x[256:512] += 1
        assert (chunk == 10).all()
        with x.lock((1, 0), "w") as inner:
            assert (inner == 10).all()
            inner[0, 0] = 1
        assert chunk[0, 0] == 1
        chunk[0, 1] = 2
        assert np.asarray(x[256, :2]).tolist() == [1, 2]
    assert np.asarray(x[256, :3]).tolist() == [1, 2, 10] and float(x[:256].max().compute()) == 0


def test_what_is_deleted_leaves_the_disk_with_the_next_allocation(small: sa.Pool) -> None:
    x = sa.zeros(SHAPE).persist()
    x[...] = 1.0
    del x
    gc.collect()
    kept = sa.array(np.ones(1000))
    assert small.memory.spill is not None and small.memory.spill.resident_nbytes() < MIB
    assert float(kept.sum().compute()) == 1000


def test_products_whose_panels_exceed_the_limit(tmp_path: Path) -> None:
    a = np.random.default_rng(5).integers(0, 9, (1024, 20_000)).astype(float)
    with sa.Pool(workers=2, memory_limit="64MiB", spill_directory=str(tmp_path)):
        x = sa.array(a)  # 156 MiB; a panel of 512 rows is 78
        assert x._storage is not None and x._storage.is_spilled
        np.testing.assert_array_equal((x @ x.T).compute(), a @ a.T)
        np.testing.assert_array_equal((x @ np.ones(20_000)).compute(), a.sum(axis=1))


# ------------------------------------------------------------------------------------- picked rows, differences, whole lines

Picking = Callable[[Any, Any, np.random.Generator], Any]  # (numpy, array, random numbers: the same for both)
PICKED: dict[str, Picking] = {
    "rows, some again and again": lambda m, x, r: x[r.integers(-2048, 2048, 3000)],
    "a list of rows": lambda m, x, r: x[[5, 7, -1]],
    "columns": lambda m, x, r: x[:, r.integers(-1024, 1024, 500)],
    "columns of a part": lambda m, x, r: x[10:2000:3, [4, 3, 3]],
    "an index of two axes": lambda m, x, r: x[..., r.integers(0, 1024, (30, 4))],
    "a mask of rows": lambda m, x, r: x[r.random(2048) < 0.5],
    "a mask of columns": lambda m, x, r: x[:, r.random(1024) < 0.5],
    "nothing": lambda m, x, r: x[np.zeros(2048, bool)],
    "of a transposed array": lambda m, x, r: x.T[[3, 1]],
    "of an expression": lambda m, x, r: (x * 2 + 1)[r.integers(0, 2048, 700)],
    "take": lambda m, x, r: m.take(x, [[1, 2], [5, -3]], axis=0),
    "take of the flattened array": lambda m, x, r: m.take(x, r.integers(0, 2048 * 1024, 3000)),
}
LINES: dict[str, Picking] = {
    "diff": lambda m, x, r: m.diff(x, axis=0),
    "second differences": lambda m, x, r: m.diff(x, 2),
    "sort": lambda m, x, r: m.sort(x),
    "sort of an expression": lambda m, x, r: m.sort(x * 2, axis=1),
    "sort along the axis that is cut": lambda m, x, r: m.sort(x, axis=0),
    "argsort": lambda m, x, r: m.argsort(x, axis=1, kind="stable"),
    "median": lambda m, x, r: m.median(x, axis=0),
    "median, axes kept": lambda m, x, r: m.median(x, 1, keepdims=True),
    "percentile": lambda m, x, r: m.percentile(x, 30, axis=1),
    "quantile": lambda m, x, r: m.quantile(x, 0.75, axis=-1, method="nearest"),
    "nanmedian": lambda m, x, r: m.nanmedian(x, axis=1),
}


Spilled = tuple[sa.Pool, sa.Array, np.ndarray[Any, Any]]


@contextlib.contextmanager
def spilled(dtype: str, directory: Path) -> Iterator[Spilled]:
    """A pool, an array that does not fit it, and the values of that."""
    values = (np.random.default_rng(7).random(SHAPE) * 1000).astype(dtype)
    with sa.Pool(workers=2, memory_limit=values.nbytes // 2, spill_directory=str(directory)) as pool:
        yield pool, sa.array(values), values


# Two, not one with a parameter: where a table of parameters names it, pytest makes one anew for each row.
@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spilled]:
    with spilled("f8", tmp_path_factory.mktemp("floats")) as made:
        yield made


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spilled]:
    with spilled("i2", tmp_path_factory.mktemp("integers")) as made:
        yield made


def assert_needs_memory_for_blocks_alone(made: Spilled, function: Picking) -> None:
    pool, x, values = made
    assert x._storage is not None and x._storage.is_spilled
    found = function(np, x, np.random.default_rng(1))
    assert isinstance(found, sa.Array)
    same(found, function(np, values, np.random.default_rng(1)))
    assert pool.statistics().peak_nbytes <= values.nbytes // 2
    pool.check()


@pytest.mark.parametrize("name", [*PICKED, *LINES])
def test_what_is_picked_sorted_or_compared_with_its_neighbour_needs_memory_for_blocks_alone(floats: Spilled, name: str) -> None:
    assert_needs_memory_for_blocks_alone(floats, {**PICKED, **LINES}[name])


@pytest.mark.parametrize("name", ["columns", "take of the flattened array", "sort", "argsort", "median"])
def test_what_is_picked_or_sorted_of_integers_needs_memory_for_blocks_alone(integers: Spilled, name: str) -> None:
    assert_needs_memory_for_blocks_alone(integers, {**PICKED, **LINES}[name])


def test_picked_elements_are_a_copy(small: sa.Pool, values: np.ndarray[Any, Any]) -> None:
    x = sa.array(values)
    rows, ordered = x[[3, 2, 1]], np.sort(x)
    x[...] = 0.0
    same(rows, values[[3, 2, 1]])
    same(ordered, np.sort(values))


@pytest.mark.parametrize(
    "key", [[2048], [-2049], (slice(None), [1024]), np.zeros(5, bool), (slice(None), np.zeros(3, bool)), ([1], [1], [1])]
)
def test_an_index_that_is_wrong_is_refused_in_the_words_of_numpy(small: sa.Pool, values: np.ndarray[Any, Any], key: Any) -> None:
    x = sa.array(values)
    with pytest.raises(IndexError) as theirs:
        values[key]
    with pytest.raises((IndexError, MemoryBudgetError)) as ours:
        x[key]
    if not isinstance(key, tuple) or len(key) < 3:
        assert (type(ours.value), str(ours.value)) == (IndexError, str(theirs.value))


def test_more_indices_than_travel_at_once(small: sa.Pool, monkeypatch: pytest.MonkeyPatch, values: np.ndarray[Any, Any]) -> None:
    monkeypatch.setattr(gather, "MOST_INDICES", 1000)
    index = np.random.default_rng(3).integers(0, SHAPE[0], 3500)
    same(sa.array(values)[index], values[index])


@pytest.mark.parametrize("what", ["compute", "sum", "rows", "sort", "update"])
def test_a_forked_child_is_told_that_it_cannot_reach_what_is_spilled(small: sa.Pool, values: np.ndarray[Any, Any], what: str) -> None:
    def update() -> None:
        x[:3] = 1.0

    x = sa.array(values)
    act: Callable[[], object] = {
        "compute": lambda: x[:3].compute(),
        "sum": lambda: float(x.sum()),
        "rows": lambda: x[[1, 2]],
        "sort": lambda: np.sort(x),
        "update": update,
    }[what]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            told = "nothing"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode()
    assert told.startswith("SpillError: the spill file") and "compute() what the child needs before the fork" in told
    same(x, values)
