"""What one pass reads is made within its tasks: user's functions of chunks, sources that only slice, arrays put together."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa
from scheduler.task import Plan
from shmarray.compute import plan_of
from shmarray.kernels.sources import _part, _straight_part
from shmarray.region import index_map
from shmarray.tiles import MOST_PARTIAL_ITEMS, Grid, edges_of, in_small_tiles, reduction_grid, walked_grid

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the folder of the tests

pytestmark = pytest.mark.usefixtures("pool")


class Source:
    """What h5py and zarr arrays have: shape, dtype, chunks and slicing. Counts how often each element is read."""

    def __init__(self, values: np.ndarray[Any, Any], chunks: tuple[int, ...] | None = None) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        if chunks is not None:
            self.chunks = chunks
        self.reads = np.zeros(values.shape, int)
        self.asked: list[Any] = []

    def __getitem__(self, key: Any) -> Any:
        self.reads[key] += 1
        self.asked.append(key)
        return self.values[key]


class Calls:
    """Counts the calls of a function in whichever process, by the chunk it was called for."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def counting(self, function: Callable[[Any], Any], name: str = "f") -> Callable[..., Any]:
        path = self.path

        def counted(b: Any, block_id: Any = None) -> Any:
            if not all(n == 1 for n in b.shape):  # else the probe for the dtype
                with open(path, "a") as file:
                    file.write(f"{name}{block_id} {b.shape}\n")
            return function(b)

        return counted

    def count(self) -> Counter[str]:
        return Counter(Path(self.path).read_text().splitlines()) if os.path.exists(self.path) else Counter()


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path / "calls")


def plan(*arrays: Any) -> Plan:
    made = plan_of([a.node for a in arrays])
    made.check()
    for layer in made.layers:
        if hasattr(layer.kernel, "program"):
            layer.kernel.program.check()
    return made


def temporaries(*arrays: Any) -> int:
    """Return the bytes of all temporaries of the plan."""
    return sum(b.nbytes for b in plan(*arrays).buffers if b.address is None)


VALUES = np.random.default_rng(1).normal(size=(600, 500))


# --- memory -----------------------------------------------------------------------------------------------------------------


def reductions(x: Any) -> list[Any]:
    return [x.sum(), x.mean(), x.std(), x.argmin(), x.argmax(axis=1), x.mean(axis=0), x.std(axis=0), x.sum(axis=1), x.max(axis=(0, 1))]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.map_blocks(lambda b: b * 2),
        lambda x: np.sqrt(abs((x + 1).map_blocks(np.sin).map_blocks(np.exp) * 2 + x)),
        lambda x: sa.concatenate([x, x * 2]),
        lambda x: sa.concatenate([x[k : k + 1] for k in range(600)]),
        lambda x: sa.concatenate([x[:, k : k + 1] + 1 for k in range(500)], axis=1),
        lambda x: sa.stack([x, x + 1, x], axis=1),
        lambda x: sa.concatenate([x.map_blocks(np.sin), x, x.map_blocks(np.cos)]),
        lambda x: sa.roll(x, (3, -7), (0, 1)) - x,
        lambda x: sa.block([[x, x + 1], [x.map_blocks(np.sin), x]]),
        lambda x: sa.from_array(Source(VALUES, (20, 50))),
        lambda x: sa.from_array(Source(VALUES))[10:] * 2,
        lambda x: sa.concatenate([sa.from_array(Source(VALUES, (20, 50))) for _ in range(20)]),
    ],
)
def test_reductions_have_no_memory_of_the_size_of_their_input(make: Any) -> None:
    x = sa.array(VALUES, chunks=(10, 500))
    y = make(x)
    for reduced in reductions(y):
        assert temporaries(reduced) < y.nbytes // 2, reduced


def pieces(count: int, axis: int) -> tuple[sa.Array, np.ndarray[Any, Any]]:
    """Return an array put together of so many, and its values."""
    a = np.arange(64.0 * count).reshape((count, 64) if axis == 0 else (64, count))
    x = sa.array(a)
    return sa.concatenate([x[(slice(None),) * axis + (slice(k, k + 1),)] * 2 + 1 for k in range(count)], axis), a * 2 + 1


@pytest.mark.parametrize("axis", [0, 1])
def test_a_hundred_pieces_are_one_layer(executor: str, axis: int) -> None:
    y, values = pieces(100, axis)

    for reduced, expected in zip(reductions(y), reductions(values), strict=True):
        assert len(plan(reduced).layers) == 1 and temporaries(reduced) == 0
        np.testing.assert_allclose(reduced.compute(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_thousand_pieces_are_one_layer(axis: int) -> None:
    y, values = pieces(1000, axis)

    for reduced, expected in ((y.sum(), values.sum()), (y.std(axis=0), values.std(axis=0))):
        assert len(plan(reduced).layers) == 1
        np.testing.assert_allclose(reduced.compute(scheduler="processes"), expected)


def test_a_map_of_what_is_made_has_no_temporary_at_all() -> None:
    x = sa.array(VALUES, chunks=(100, 100))

    for y in (
        x.map_blocks(np.sin) + 1,
        sa.concatenate([x, x]) * 2,
        sa.from_array(Source(VALUES)) - x,
        x.map_blocks(np.sin).map_blocks(np.cos),
    ):
        assert temporaries(y) == 0


def test_alone_they_are_written_straight_into_the_result() -> None:
    x = sa.array(VALUES, chunks=(100, 100))

    assert [layer.ntasks for layer in plan(x.map_blocks(np.sin)).layers] == [30]
    assert [layer.name for layer in plan(sa.concatenate([x, x])).layers] == ["concatenate"]
    assert temporaries(x.map_blocks(np.sin)) == temporaries(sa.concatenate([x, x])) == 0


def test_the_budget_counts_the_scratch_of_what_is_made() -> None:
    x = sa.zeros((4, 1 << 20), chunks=(1, -1))
    without, within = plan(x.sum()), plan(x.map_blocks(lambda b: b + 1).sum())

    assert within.scratch_nbytes - without.scratch_nbytes >= 8 << 20
    assert within.isolated and not without.isolated


def test_more_than_there_is_room_for_is_reduced(executor: str) -> None:
    def large() -> Any:
        return sa.map_blocks(lambda block_id: np.full(1 << 20, float(block_id[0])), chunks=((1 << 20,) * 40,), dtype=float)

    with sa.Pool(workers=2, memory_limit="128MiB"):
        assert large().sum().compute() == sum(range(40)) << 20
        assert sa.concatenate([large(), large() * 2]).max().compute() == 78


# --- values -----------------------------------------------------------------------------------------------------------------


def cuts(draw: Any, n: int) -> tuple[int, ...]:
    edges = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))})
    return tuple(b - a for a, b in itertools.pairwise(edges)) or (0,)


CALLED: list[Any] = []  # (function, chunk): appended to by any thread of this process


def doubling() -> Callable[..., Any]:
    name = object()

    def double(b: Any, block_id: Any = None) -> Any:
        CALLED.append((name, block_id))
        return b * 2 - 1

    return double


def computed_once(*arrays: Any) -> tuple[Any, ...]:
    """Return the values of arrays computed together, having seen that no function was called twice for a chunk."""
    CALLED.clear()
    values = sa.compute(*arrays)
    assert not CALLED or Counter(CALLED).most_common(1)[0][1] == 1
    return values


@st.composite
def made(draw: Any) -> tuple[Any, np.ndarray[Any, Any]]:
    """An array of ours and NumPy's, of some of what can be made within a task."""
    shape = tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=3)))
    seed = draw(st.integers(0, 99))

    def leaf() -> tuple[Any, np.ndarray[Any, Any]]:
        a = np.random.default_rng(seed).integers(-9, 9, shape).astype(float)
        kind = draw(st.sampled_from(["stored", "given", "fill", "foreign"]))
        if kind == "fill":
            return sa.full(shape, 3.0), np.full(shape, 3.0)
        if kind == "foreign":
            own = tuple(draw(st.integers(1, n)) for n in shape)
            return sa.from_array(Source(a, own if draw(st.booleans()) else None)), a
        return (sa.array(a) if kind == "stored" else sa.asarray(a)), a

    def grow(x: Any, a: np.ndarray[Any, Any]) -> tuple[Any, np.ndarray[Any, Any]]:
        axis = draw(st.integers(0, len(shape) - 1))
        match draw(st.sampled_from(["map", "map", "concatenate", "roll", "set", "add", "flip"])):
            case "map":
                return x.rechunk(tuple(cuts(draw, n) for n in shape)).map_blocks(doubling(), dtype=float), a * 2 - 1
            case "concatenate":
                y, b = leaf()
                if draw(st.booleans()):
                    y, b = y.map_blocks(doubling(), dtype=float), b * 2 - 1
                k = draw(st.integers(0, shape[axis]))
                first, second = (slice(None),) * axis + (slice(None, k),), (slice(None),) * axis + (slice(k, None),)
                if draw(st.booleans()):
                    return sa.concatenate([x[first], y[second]], axis), np.concatenate([a[first], b[second]], axis)
                half = (slice(None),) * axis + (slice(None, shape[axis]),)
                return sa.concatenate([x, y], axis)[half], np.concatenate([a, b], axis)[half]
            case "roll":
                n = draw(st.integers(-5, 5))
                return sa.roll(x, n, axis), np.roll(a, n, axis)
            case "set":
                step = draw(st.sampled_from([1, 2, -1, -2]))
                key = (*(slice(None),) * axis, slice(None, None, step))
                x, a = x + 0, a.copy()
                values = np.arange(float(a[key].size)).reshape(a[key].shape)
                x[key] = sa.asarray(values) if draw(st.booleans()) else values
                a[key] = values
                return x, a
            case "add":
                y, b = leaf()
                return x + y, a + b
            case _:
                return sa.flip(x, axis), np.flip(a, axis)

    x, a = leaf()
    for _ in range(draw(st.integers(1, 4))):
        x, a = grow(x, a)
    return x, a


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(pair=made(), data=st.data())
def test_whatever_is_made_reductions_and_maps_agree_with_numpy(pair: Any, data: Any, small_grids: Any, assert_same: Any) -> None:
    x, a = pair
    axes = [None, *range(a.ndim), *itertools.combinations(range(a.ndim), 2)]
    axis = data.draw(st.sampled_from(axes))
    scheduler = data.draw(st.sampled_from(["synchronous", "threads"]))
    with small_grids(), sa.config.set(scheduler=scheduler):
        ours = computed_once(x.sum(axis=axis), x.mean(axis=axis), (x * 2).std(axis=axis), x.max(axis=axis), x + 1)
        theirs = (a.sum(axis=axis), a.mean(axis=axis), (a * 2).std(axis=axis), a.max(axis=axis), a + 1)
        assert_same(ours, theirs, 1e-12, 1e-12)
        assert_same(computed_once((x + 1).sum(axis=axis))[0], (a + 1).sum(axis=axis), 1e-12)
        centred = (x - x.mean(axis=axis, keepdims=True)).sum()
        assert_same(computed_once(x + 1, centred, (x + 1).sum(axis=0))[:1], (a + 1,))
        if not isinstance(axis, tuple):
            assert_same(x.argmin(axis=axis).compute(), np.argmin(a, axis=axis))


def test_all_executors_and_pools_give_the_same_bits(executor: str) -> None:
    x = sa.array(VALUES, chunks=(77, 130))
    y = sa.concatenate([np.exp(x.map_blocks(np.sin)), x, sa.from_array(VALUES).map_blocks(np.cos, dtype=float)])
    with sa.Pool(workers=1):
        expected = [r.compute(scheduler="synchronous") for r in reductions(y) + reductions(sa.from_array(Source(VALUES, (50, 50))) * x)]

    found = [r.compute() for r in reductions(y) + reductions(sa.from_array(Source(VALUES, (50, 50))) * x)]

    for one, other in zip(found, expected, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    a = np.concatenate([np.exp(np.sin(VALUES)), VALUES, np.cos(VALUES)])
    for one, other in zip(found, reductions(a), strict=False):
        np.testing.assert_allclose(one, other)


def test_what_is_computed_beside_has_the_bits_it_has_alone(executor: str) -> None:
    x = sa.array(VALUES, chunks=(7, 130))
    beside = (x.map_blocks(np.sin) + x).mean()

    assert sa.compute(beside, x.mean(), x.std(axis=0).sum())[1:] == (x.mean().compute(), x.std(axis=0).sum().compute())


# --- exactly once -----------------------------------------------------------------------------------------------------------


def test_each_chunk_is_given_to_each_function_once(executor: str, calls: Calls) -> None:
    x = sa.array(VALUES, chunks=((100, 300, 200), (250, 250)))
    y = x.map_blocks(calls.counting(np.sin), dtype=float)
    z = (y * 2).map_blocks(calls.counting(np.cos, "g"), dtype=float)
    expected = np.cos(np.sin(VALUES) * 2)

    np.testing.assert_allclose((z + 1).mean(axis=0).compute(), (expected + 1).mean(axis=0))

    shapes = {(i, j): (rows, 250) for i, rows in enumerate((100, 300, 200)) for j in range(2)}
    assert calls.count() == Counter({f"{name}{index} {shape}": 1 for name in "fg" for index, shape in shapes.items()})


USES = {
    "several passes": lambda m: ((m - m.mean()) ** 2).sum(),
    "two axes": lambda m: m.sum(axis=0).sum() + m.sum(axis=1).sum(),
    "one pass": lambda m: sa.stack(sa.compute(m.sum(), (m + 1).max(), m.std())).sum(),
    "stored beside": lambda m: sa.stack([v.sum() for v in map(sa.asarray, sa.compute(m + 1, (m + 1).sum(), m))]).sum(),
    "a running sum": lambda m: m.cumsum(axis=0).max(),
    "twice in one": lambda m: (sa.roll(m, 1, 0) - m).sum() + sa.concatenate([m, m]).sum(),
    "a view": lambda m: (m.T + m[::-1].T).sum(),
    "broadcast": lambda m: (m[None] + np.zeros((2, 1, 1))).sum(),
    "its own neighbour": lambda m: sa.map_blocks(lambda a, b: a + b, m, m, dtype=float).sum(),
    "spread": lambda m: sa.map_blocks(lambda a, b: a + b.sum(), m, m.rechunk(-1)[:1, :1], dtype=float).sum(),
    "other chunks": lambda m: m.rechunk((60, 500)).map_blocks(np.sort, dtype=float).sum(),
    "two grids": lambda m: (m + m.rechunk((60, 500)).map_blocks(np.sort, dtype=float)).sum(),
    "a product": lambda m: (m @ m.T).sum(),
    "another shape": lambda m: m.reshape(-1).sum(),
}


@pytest.mark.parametrize("use", USES)
def test_however_it_is_used_each_chunk_is_computed_once(executor: str, calls: Calls, use: str) -> None:
    x = sa.array(VALUES, chunks=(200, 250))

    value = USES[use](x.map_blocks(calls.counting(np.sin), dtype=float)).compute()

    assert calls.count() == Counter({f"f{index} (200, 250)": 1 for index in np.ndindex(3, 2)})
    np.testing.assert_allclose(value, USES[use](sa.asarray(np.sin(VALUES), chunks=(200, 250))).compute())


@pytest.mark.parametrize("own", [None, (50, 100), (70, 500), (600, 30)])
def test_each_part_of_a_source_is_read_once_in_whole_chunks(executor: str, own: Any) -> None:
    for use in (
        lambda f: f.sum(axis=0),
        lambda f: (f[30:, 20:] * 2).std(),
        lambda f: f + 1,
        lambda f: f.map_blocks(np.sin, dtype=float).sum(axis=1),
        lambda f: sa.concatenate([f[:100], f[100:]]).mean(),
        lambda f: (f - f.mean(axis=0)).sum(),
    ):
        source = Source(VALUES, own)

        np.testing.assert_allclose(use(sa.from_array(source)).compute(), np.asarray(use(sa.asarray(VALUES)).compute()))

        assert source.reads.max() == 1
        if own is not None:
            for key in source.asked:
                for piece, n, c, low in zip(key, (600, 500), own, (30, 20), strict=True):
                    assert piece.start in (0, low, 100) or piece.start % c == 0
                    assert piece.stop in (n, 100) or piece.stop % c == 0


def test_a_users_function_never_runs_where_only_the_driver_reads(executor: str) -> None:
    x = sa.array(VALUES, chunks=(100, 500))
    f = sa.from_array(Source(VALUES, (100, 500)))
    for y in ((f + x.map_blocks(np.sin)).sum(), f.map_blocks(np.sin).sum(), sa.concatenate([f, x.map_blocks(np.sin)]).sum()):
        for layer in plan(y).layers:
            assert not (layer.place == "driver" and "map_blocks" in layer.name)
        assert any(layer.place == "driver" for layer in plan(y).layers)
    np.testing.assert_allclose((f + x.map_blocks(np.sin)).sum().compute(), (VALUES + np.sin(VALUES)).sum())
    np.testing.assert_allclose(sa.concatenate([f, x.map_blocks(np.sin)]).sum().compute(), (VALUES + np.sin(VALUES)).sum())


@pytest.mark.slow
def test_a_worker_that_dies_in_a_function_leaves_no_trace(tmp_path: Path) -> None:
    x = sa.array(VALUES, chunks=(100, 500))
    mark = str(tmp_path / "killed")

    def die_once(b: Any, block_id: Any = None) -> Any:
        if block_id == (3, 0) and b.size > 1 and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return np.sin(b)

    y = (x.map_blocks(die_once, dtype=float) + 1).mean(axis=0)

    assert y.compute(scheduler="processes").tobytes() == (x.map_blocks(np.sin) + 1).mean(axis=0).compute().tobytes()
    assert os.path.exists(mark)


# --- errors and warnings ----------------------------------------------------------------------------------------------------


def test_errors_name_the_chunk_and_the_line_of_the_function(executor: str) -> None:
    x = sa.array(np.arange(40.0), chunks=2)

    def fail(b: Any) -> Any:
        if b[0] == 24:
            raise KeyError("no")
        return b

    y = x.map_blocks(fail, dtype=float)
    line = f"{__file__}:{inspect.currentframe().f_lineno - 1}"
    for use in (y.sum(), y + 1, y.map_blocks(np.sin, dtype=float).std(), sa.concatenate([x, y, x]).mean(), sa.concatenate([y, x])):
        with pytest.raises(KeyError) as caught:
            use.compute()
        notes = caught.value.__notes__
        where = next(i for i, note in enumerate(notes) if "chunk (12,)" in note and "fail" in note)
        assert line in notes[where + 1]


def test_what_would_end_the_process_names_the_chunk_too(executor: str) -> None:
    def leave(b: Any) -> Any:
        if b[0] == 4:
            sys.exit(3)
        return b

    with pytest.raises(Exception, match="SystemExit") as caught:
        (sa.array(np.arange(6.0), chunks=2).map_blocks(leave, dtype=float) + 1).sum().compute()

    assert "chunk (2,)" in "\n".join(caught.value.__notes__)


def test_a_source_that_fails_names_what_was_read(executor: str) -> None:
    class Broken(Source):
        def __getitem__(self, key: Any) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone") as caught:
        (sa.from_array(Broken(VALUES))[5:] + 1).sum().compute()

    assert "5:600" in "\n".join(caught.value.__notes__) and "Broken" in "\n".join(caught.value.__notes__)


def test_warnings_of_the_function_and_of_what_follows_arrive(executor: str) -> None:
    x = sa.array(np.zeros(4), chunks=2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (np.log(x.map_blocks(lambda b: b / b, dtype=float)) + 1 / x).sum().compute()

    texts = " ".join(str(w.message) for w in caught)
    assert "invalid value encountered in divide" in texts and "divide by zero encountered in divide" in texts


# --- in place ---------------------------------------------------------------------------------------------------------------


def test_updates_read_what_was_there_before(executor: str) -> None:
    a = VALUES.copy()
    x = sa.array(a, chunks=(100, 100))

    x += sa.concatenate([x[50:], x[:50]])
    a += np.concatenate([a[50:], a[:50]])
    np.testing.assert_array_equal(x.compute(), a)
    x[:, 1:] += sa.roll(x, 3, 0)[:, 1:]
    a[:, 1:] += np.roll(a, 3, 0)[:, 1:]
    np.testing.assert_array_equal(x.compute(), a)
    x -= x.map_blocks(np.sort, dtype=float).map_blocks(np.flip, dtype=float) + 1
    tiles = a.reshape(6, 100, 5, 100)
    a -= np.flip(np.sort(tiles, axis=-1), (1, 3)).reshape(a.shape) + 1
    np.testing.assert_array_equal(x.compute(), a)
    x *= sa.from_array(Source(VALUES, (64, 64))) + x[::-1]
    a *= VALUES + a[::-1]
    np.testing.assert_array_equal(x.compute(), a)


def test_an_update_by_a_function_that_fails_leaves_the_target_as_it_was(executor: str) -> None:
    x = sa.array(np.arange(40.0), chunks=4)

    def fail(b: Any) -> Any:
        if b[0] == 24:
            raise KeyError("no")
        return b + 1

    with pytest.raises(KeyError):
        x += sa.array(np.arange(40.0), chunks=4).map_blocks(fail, dtype=float)

    np.testing.assert_array_equal(x.compute(), np.arange(40.0))


# --- corners ----------------------------------------------------------------------------------------------------------------


def test_chains_of_any_length_are_planned_and_run(calls: Calls) -> None:
    x = sa.array(np.arange(6.0), chunks=2)
    for _ in range(60):
        x = x.map_blocks(calls.counting(lambda b: b + 1), dtype=float)
    y = sa.zeros(300)
    for k in range(300):
        y[k : k + 1] = float(k)

    assert x.sum().compute(scheduler="synchronous") == 15 + 6 * 60
    assert set(calls.count().values()) == {60}
    assert y.sum().compute(scheduler="synchronous") == 299 * 150


def test_tiny_empty_and_odd_ones(executor: str, assert_same: Any) -> None:
    for shape in ((), (1,), (0,), (3, 0), (1, 1, 1)):
        a = np.ones(shape)
        for x in (sa.from_array(Source(a)), sa.array(a).map_blocks(lambda b: b + 0, dtype=float)):
            assert_same(x.sum().compute(), a.sum())
            assert_same((x + 1).compute(), a + 1)
            assert_same(sa.stack([x, x]).mean(axis=0).compute() if a.size else 0.0, np.stack([a, a]).mean(axis=0) if a.size else 0.0)
    assert_same(sa.concatenate([sa.zeros(0), sa.arange(3.0), sa.zeros(0)]).sum().compute(), np.float64(3))


def test_other_dtypes_and_memory_orders(executor: str, assert_same: Any) -> None:
    a = np.asfortranarray(np.arange(600).reshape(20, 30).astype("i2"))
    x = sa.array(a.T, chunks=(10, 10)).T
    for y, b in (
        (x.map_blocks(lambda b: b + b), a + a),
        (sa.concatenate([x, sa.asarray(a).T[:20, :20]], 1), np.concatenate([a, a.T[:20, :20]], 1)),
    ):
        assert_same((y + 1).compute(), b + np.int16(1))
        assert_same(y.sum(axis=0).compute(), b.sum(axis=0))
        assert_same((y > 100).sum().compute(), (b > 100).sum())
    dates = np.arange("2020-01-01", "2020-02-10", dtype="M8[D]")
    assert_same(sa.concatenate([sa.array(dates), sa.array(dates)]).max().compute(), dates.max())
    assert_same((sa.array(dates, chunks=8).map_blocks(lambda b: b + 1) - dates[0]).max().compute(), dates.max() + 1 - dates[0])


def test_a_chunk_as_large_as_the_array_leaves_the_rest_to_all_workers() -> None:
    x = sa.zeros((1000, 1000), chunks=-1).map_blocks(lambda b: b + 1, dtype=float)

    assert [layer.ntasks > 1 for layer in plan(np.sin(x).sum()).layers[:2]] == [False, True]


# --- grids ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tiles_of_a_walked_grid_are_all_of_it_once(data: Any) -> None:
    sizes = tuple(tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))) for _ in range(data.draw(st.integers(1, 3))))
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1)))))
    edges = edges_of(sizes)

    for grid in (walked_grid(edges, axes), Grid.of(edges)):
        seen = np.zeros(grid.shape, int)
        for task in range(grid.ntasks):
            box = grid.box(task)
            inside = np.zeros(grid.shape, int)
            tiles = list(grid.tiles(task))
            for tile in tiles:
                assert tile == tuple(
                    slice(axis[k], axis[k + 1]) for axis, k in zip(edges, (a.index(p.start) for a, p in zip(edges, tile)), strict=True)
                )
                inside[tile] += 1
                assert all(tile[a] == box[a] for a in range(len(sizes)) if a not in axes)
            assert (inside[box] == 1).all() and inside.sum() == inside[box].size
            seen += inside
        assert (seen == 1).all()
        assert math.prod(grid.counts) == grid.ntasks
        for a in range(len(sizes)):
            assert sum(grid.lengths(a)) == grid.shape[a] and len(grid.lengths(a)) == grid.counts[a]


def test_partial_results_of_given_tiles_are_bounded() -> None:
    for rows, row, columns, column in ((5000, 1, 1, 10), (3000, 2, 10, 100_000), (40, 3, 1, 10_000_000), (100, 1, 100, 10)):
        grid = walked_grid(edges_of(((row,) * rows, (column,) * columns)), (0,))
        items = grid.counts[0] * columns * column
        assert items <= max(MOST_PARTIAL_ITEMS, 8 * columns * column)
        assert grid.counts[0] == 1 or grid.counts[0] <= 1024
        assert grid.ntasks >= min(8, rows)


def test_large_boxes_are_walked_through_in_small_tiles() -> None:
    for shape, axes in (((100_000, 100_000), (0,)), ((10, 1 << 30), (0, 1)), ((1 << 15, 3, 1 << 15), (0, 2))):
        regular = reduction_grid(shape, axes)
        grid = in_small_tiles(regular, axes)
        assert math.prod(grid.sizes) <= 1 << 19 or all(grid.sizes[a] == 1 for a in axes)
        assert grid.counts == regular.counts
        for task in (0, grid.ntasks // 2, grid.ntasks - 1):
            assert grid.box(task) == regular.box(task)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_part_of_a_piece_is_found_for_every_map(data: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    key = tuple(
        data.draw(
            st.one_of(st.integers(0, n - 1), st.builds(slice, st.integers(0, n), st.integers(0, n), st.sampled_from([1, 2, -1, -3, None])))
        )
        for n in shape
    )
    key = (None, *key) if data.draw(st.booleans()) else key
    map = index_map(key, shape)
    if math.prod(map.shape) == 0:
        return
    values = np.arange(1, math.prod(map.shape) + 1).reshape(map.shape)
    whole = np.zeros(shape, int)
    whole[key] = values
    at = tuple(slice(*sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2)))) for n in shape)
    straight = map.axes == tuple((a, 1) for a in range(len(shape)))

    for find in (_part, _straight_part) if straight else (_part,):
        out = np.zeros([s.stop - s.start for s in at], int)
        found = find(map, at, out)
        if found is not None:
            found[1][...] = values[found[0]]
        np.testing.assert_array_equal(out, whole[at])
