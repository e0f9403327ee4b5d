"""Histograms, bincount, digitize and ufunc.at: NumPy's counts to the last one, the same bits for any chunks, workers and executors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa
from shmarray.kernels.accumulate import BinFinder
from shmarray.ops import accumulators
from shmarray.tiles import accumulation_grid

COMMON = settings(derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]
WEIGHTS = [None, "i1", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
SHAPES = st.sampled_from([(0,), (1,), (7,), (130,), (), (16, 9), (1, 40), (3, 60), (2, 25, 3), (4, 0)])
BINS = st.sampled_from([1, 2, 7, 10, 100, [0, 1, 2], [0.0, 0.5, 3.0], [1.0, 1.0, 2.0, 2.0], [-2.5, 4.0], [3], np.arange(9, dtype="i4")])
RANGES = st.sampled_from([None, (0, 4), (-1.5, 2.0), (0.1, 0.7), (2, 2), (-100, 100)])


def values(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray[Any, Any]:
    """Small numbers, half of the floats on a lattice, so that many lie on edges."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    if kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    if kind == "f":
        lattice, anywhere = rng.integers(-12, 20, shape) / 4, rng.normal(1, 2, shape)
        return np.asarray(np.where(rng.random(shape) < 0.5, lattice, anywhere)).astype(dtype)
    if kind == "c":
        return np.asarray(rng.random(shape) + 1j * rng.random(shape)).astype(dtype)
    return np.asarray(rng.integers(0 if kind == "u" else -3, 6, shape)).astype(dtype)


def cut(x: np.ndarray[Any, Any], seed: int) -> Any:
    """Return a stored array with chunks of its own."""
    rng = np.random.default_rng(seed)
    return sa.array(x, chunks=tuple(int(rng.integers(1, n + 1)) if n else 1 for n in x.shape))


def both(call: Any, theirs: Any) -> tuple[Any, Any]:
    """Return the results of our call and NumPy's, or the types of their errors."""
    results = []
    for one in (call, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = one()
                found = found if isinstance(found, tuple) else (found,)
                results.append(tuple(np.asarray(f) for f in found))
            except (ValueError, TypeError, IndexError) as error:
                results.append((type(error),))
    return results[0], results[1]


def assert_alike(found: Any, expected: Any, rtol: float) -> None:
    if isinstance(expected[0], type):
        assert found == expected
        return
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, (one.dtype, other.dtype)
        if rtol and other.dtype.kind in "fc":
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)
        else:
            np.testing.assert_array_equal(one, other)


@COMMON
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    bins=BINS,
    range=RANGES,
    weights=st.sampled_from(WEIGHTS),
    density=st.booleans(),
    small=st.booleans(),
    seed=st.integers(0, 99),
)
def test_histogram_is_numpys(
    small_grids: Any, shape: Any, dtype: str, bins: Any, range: Any, weights: Any, density: bool, small: bool, seed: int
) -> None:
    x = values(shape, dtype, seed)
    w = None if weights is None else values(shape, weights, seed + 1)
    rtol = 0.0 if w is None or w.dtype.kind in "iu" else {"f2": 0.05, "f4": 1e-5, "c8": 1e-5}.get(weights, 1e-12)

    with sa.config.set(scheduler="synchronous"), small_grids(**({} if small else {"MOST_PARTIAL_ITEMS": 1 << 20})):
        ours = cut(x, seed)
        found, expected = both(
            lambda: sa.compute(*sa.histogram(ours, bins, range, density, None if w is None else cut(w, seed + 2))),
            lambda: np.histogram(x, bins, range, density, w),
        )

    assert_alike(found, expected, max(rtol, 1e-12 if density and weights else 0.0))


@COMMON
@given(
    n=st.sampled_from([0, 1, 5, 60, 200]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    data=st.data(),
    density=st.booleans(),
    weights=st.sampled_from([None, "i1", "i4", "f4", "f8", "c8"]),
    joined=st.booleans(),
    seed=st.integers(0, 99),
)
def test_histogramdd_is_numpys(
    small_grids: Any, n: int, dtypes: list[str], data: Any, density: bool, weights: Any, joined: bool, seed: int
) -> None:
    sample: Any = [values((n,), dtype, seed + k) for k, dtype in enumerate(dtypes)]
    if joined:
        sample = np.stack(sample, axis=1)
    bins = data.draw(st.one_of(st.sampled_from([1, 3, 10]), st.tuples(*[BINS] * len(dtypes)).map(list)))
    range = data.draw(st.one_of(st.none(), st.tuples(*[RANGES] * len(dtypes))))
    w = None if weights is None else values((n,), weights, seed + 9)

    with sa.config.set(scheduler="synchronous"), small_grids():
        ours = cut(sample, seed) if joined else [cut(c, seed) for c in sample]
        found, expected = both(
            lambda: _flat(sa.histogramdd(ours, bins, range, density, w)), lambda: _flat(np.histogramdd(sample, bins, range, density, w))
        )

    assert_alike(found, expected, 1e-12 if weights in ("f4", "f8") else 0.0)


def _flat(result: Any) -> tuple[Any, ...]:
    counts, edges = result
    return (counts, *edges)


@pytest.mark.parametrize("bins", [5, [5, 3], [0.0, 1.0, 2.5], [[0.0, 1.0, 2.5], [0, 1]], [[0.0, 1.0], 4], (2, 2)])
def test_histogram2d_takes_bins_as_numpy_does(executor: str, bins: Any) -> None:
    x, y = values((500,), "f8", 1), values((500,), "f4", 2)

    found = sa.compute(*sa.histogram2d(sa.array(x, chunks=77), y, bins))

    for one, other in zip(found, np.histogram2d(x, y, bins), strict=True):
        np.testing.assert_array_equal(one, other)


@COMMON
@given(
    count=st.integers(1, 300),
    first=st.floats(-1e6, 1e6),
    width=st.floats(1e-9, 1e9),
    dtype=st.sampled_from(["f4", "f8"]),
    seed=st.integers(0, 99),
)
def test_a_computed_bin_is_that_which_bisection_finds(count: int, first: float, width: float, dtype: str, seed: int) -> None:
    edges = np.linspace(first, first + width, count + 1).astype(dtype)
    if edges[0] == edges[-1]:
        return
    finder = BinFinder(edges)
    near = np.concatenate([edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf), edges[0] + width * _uniform(seed)])
    x = near[(near >= edges[0]) & (near <= edges[-1])].astype(dtype)
    x = x[(x >= edges[0]) & (x <= edges[-1])]
    found, scratch = np.empty(len(x)), np.empty(len(x))

    finder.find(x, found, scratch)

    np.testing.assert_array_equal(found, np.minimum(edges.searchsorted(x, "right") - 1, count - 1))


def _uniform(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(1000)


@pytest.mark.parametrize(
    "edges, is_even",
    [
        (np.linspace(-6, 6, 101), True),
        (np.arange(10), True),
        (np.logspace(0, 3, 7), False),
        (np.array([1e16, 1e16 + 2, 1e16 + 6]), False),
        (np.array([0.0, 0.0, 1.0]), False),
        (np.array([2**60, 2**60 + 1]), False),
        (np.array([0.0, np.inf]), False),
        (np.array([0.0, 1e-320]), False),
        (np.array([-1.7e308, 0.0, 1.7e308]), False),
    ],
)
def test_bins_are_computed_only_from_even_edges(edges: Any, is_even: bool) -> None:
    assert BinFinder(edges).is_even == is_even


def test_large_integers_are_compared_as_integers(executor: str) -> None:
    edges = np.array([2**60, 2**60 + 1, 2**60 + 2])
    x = np.array([2**60, 2**60 + 1, 2**60 + 2, 2**60 - 1])

    assert sa.histogram(sa.array(x), edges)[0].compute().tolist() == np.histogram(x, edges)[0].tolist() == [1, 2]


def test_nan_and_infinities_are_in_no_bin(executor: str) -> None:
    x = np.array([np.nan, 0.0, np.inf, 1.0, -np.inf, 0.5, np.nan])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bins in (2, [0.0, 0.5, 1.0], [0.0, 0.1, 1.0]):
            counts, _ = sa.histogram(sa.array(x), bins, (0.0, 1.0))
            assert counts.compute().tolist() == np.histogram(x, bins, (0.0, 1.0))[0].tolist()
        assert sa.histogram2d(sa.array(x), sa.array(x[::-1].copy()), 2, [(0, 1)] * 2)[0].sum().compute() == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_range_that_is_not_finite_is_an_error_when_it_is_known(executor: str, bad: float) -> None:
    x = sa.array(np.array([1.0, bad, 2.0]))

    counts, edges = sa.histogram(x)
    square, *_ = sa.histogram2d(x, x)

    for lazy in (counts, edges, square):
        with pytest.raises(ValueError, match="autodetected range of"):
            lazy.compute()


def test_too_many_bins_for_the_data_is_an_error_when_it_is_known(executor: str) -> None:
    with pytest.raises(ValueError, match="Too many bins for data range"):
        sa.histogram(sa.array(np.array([1.0, np.nextafter(1.0, 2)])), 10)[0].compute()


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda a: sa.histogram(a, 0), ValueError),
        (lambda a: sa.histogram(a, 2.5), TypeError),
        (lambda a: sa.histogram(a, [2, 1]), ValueError),
        (lambda a: sa.histogram(a, range=(2, 1)), ValueError),
        (lambda a: sa.histogram(a, range=(0, np.nan)), ValueError),
        (lambda a: sa.histogram(a, weights=[1.0]), ValueError),
        (lambda a: sa.histogram(a, "no such rule"), ValueError),
        (lambda a: sa.histogram2d(a, a[1:]), ValueError),
        (lambda a: sa.histogramdd((a, a), [2, 2, 2]), ValueError),
        (lambda a: sa.histogramdd((a, a), range=[(0, 1)]), ValueError),
        (lambda a: sa.histogramdd((a, a), weights=a[1:]), ValueError),
        (lambda a: sa.bincount(a), TypeError),
        (lambda a: sa.bincount(sa.array([1, -1])), ValueError),
        (lambda a: sa.bincount(sa.array([[1]])), ValueError),
        (lambda a: sa.bincount(sa.array([1, 2]), [1.0]), ValueError),
        (lambda a: sa.bincount(sa.array([1, 2]), [1j, 2]), TypeError),
        (lambda a: sa.bincount(sa.array([1, 2]), minlength=-1), ValueError),
        (lambda a: sa.digitize(a, [1, 3, 2]), ValueError),
        (lambda a: sa.digitize(a * 1j, [1, 3]), TypeError),
    ],
)
def test_mistakes_are_told_at_the_call(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call(sa.array(np.arange(4.0)))


@pytest.mark.parametrize("rule", ["auto", "fd", "sturges", "sqrt"])
def test_bins_chosen_by_a_rule_are_numpys(rule: str) -> None:
    x = values((300,), "f8", 3)

    counts, edges = sa.compute(*sa.histogram(sa.array(x, chunks=50), rule, (-2, 4)))

    expected = np.histogram(x, rule, (-2, 4))
    np.testing.assert_array_equal(counts, expected[0])
    np.testing.assert_array_equal(edges, expected[1])


def test_edges_are_lazy_and_a_plan_finds_the_range_by_itself() -> None:
    x = sa.array(np.arange(1000.0))

    counts, edges = sa.histogram(x * 2 + 1, 4)

    assert not counts.is_stored and not edges.is_stored
    assert [n.name for n in edges.plan().layers][-1] == "bin edges"
    np.testing.assert_array_equal(edges.compute(), np.linspace(1, 1999, 5))
    assert counts.compute().tolist() == [250] * 4


def test_what_is_counted_is_not_stored_on_the_way() -> None:
    x = sa.array(np.zeros(1 << 20))
    with sa.config.set(scheduler="synchronous"):
        plan = sa.histogram(x * 2 + x, 10, (0, 1))[0].plan()

    assert sum(b.nbytes for b in plan.buffers if b.address is None) < 1 << 10
    assert plan.layers[0].name == "multiply-add-histogram"


def test_numpys_functions_give_arrays_of_ours() -> None:
    x = sa.array(np.arange(10))

    for result in (np.histogram(x, 3)[0], np.histogram2d(x, x)[0], np.bincount(x), np.digitize(x, [2, 5]), np.histogram_bin_edges(x)):
        assert isinstance(result, sa.Array)


@pytest.mark.parametrize("dtype, weights", [("f16", None), ("f8", "?"), ("f8", "f16"), ("c16", None)])
def test_what_numpy_alone_knows_is_asked_of_numpy(dtype: str, weights: Any) -> None:
    x = values((50,), "f8", 4).astype(dtype)
    w = None if weights is None else values((50,), "f8", 5).astype(weights)

    found, expected = both(
        lambda: sa.compute(*sa.histogram(sa.array(x), 5, (0, 2), weights=w)), lambda: np.histogram(x, 5, (0, 2), weights=w)
    )

    assert_alike(found, expected, 0.0)


def test_a_source_that_only_the_driver_reads_and_functions_of_chunks_can_be_counted(executor: str) -> None:
    class Source:
        shape, dtype, chunks = (1000,), np.dtype("f8"), (300,)

        def __getitem__(self, key: Any) -> Any:
            return np.arange(1000.0)[key]

    x = sa.from_array(Source(), chunks=300)

    assert sa.histogram(x, 4)[0].compute().tolist() == [250] * 4
    assert sa.histogram(x.map_blocks(np.negative), 4)[0].compute().tolist() == [250] * 4
    assert sa.bincount((x % 3).astype(int)).compute().tolist() == [334, 333, 333]


# --- bincount, digitize -------------------------------------------------------------------------------------------------------------


@COMMON
@given(
    n=st.sampled_from([0, 1, 5, 300]),
    dtype=st.sampled_from(["?", "i1", "u1", "u4", "i8"]),
    weights=st.sampled_from([None, "?", "i4", "i8", "f4", "f8"]),
    minlength=st.sampled_from([0, 1, 3, 40]),
    seed=st.integers(0, 99),
)
def test_bincount_is_numpys(small_grids: Any, n: int, dtype: str, weights: Any, minlength: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 30, n).astype(dtype)
    w = None if weights is None else values((n,), weights, seed)

    with sa.config.set(scheduler="synchronous"), small_grids():
        found, expected = both(lambda: sa.bincount(cut(x, seed), w, minlength), lambda: np.bincount(x, w, minlength))

    assert_alike(found, expected, 1e-12)


@COMMON
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    bins=st.sampled_from([[1], [0.0, 0.5, 3.0], [3, 2, 0], [1, 1], np.arange(5, dtype="f4")]),
    right=st.booleans(),
    seed=st.integers(0, 99),
)
def test_digitize_is_numpys(small_grids: Any, shape: Any, dtype: str, bins: Any, right: bool, seed: int) -> None:
    x = values(shape, dtype, seed)

    with sa.config.set(scheduler="synchronous"), small_grids():
        found = np.asarray(sa.digitize(cut(x, seed), bins, right) + 0)

    np.testing.assert_array_equal(found, np.digitize(x, bins, right))


def test_bincount_of_what_was_written_after_it_was_looked_at_is_refused() -> None:
    x = sa.array(np.array([1, 2, 3]))
    counts = sa.bincount(x.live)
    x[0] = 7

    with pytest.raises(ValueError, match="bincount met 7, and its result has length 4"):
        counts.compute()


# --- the same bits ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def points() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(7)
    return rng.standard_normal(700_001), rng.standard_normal(700_001), rng.random(700_001) * 10.0 ** rng.integers(-8, 8, 700_001)


def weighted(points: tuple[Any, Any, Any], chunks: int, bins: int = 13) -> bytes:
    x, y, w = (sa.array(p, chunks=chunks) for p in points)
    cells = sa.zeros(50).persist()
    sa.add.at(cells, sa.digitize(x, np.linspace(-3, 3, 49)), w)
    parts = (*sa.histogram(x, bins, weights=w), *sa.histogram2d(x, y, bins, weights=w), sa.bincount(sa.digitize(y, [-1, 0, 1]), w), cells)
    return b"".join(p.tobytes() for p in sa.compute(*parts))


@pytest.fixture(scope="module")
def expected_bits(points: Any) -> bytes:
    with sa.Pool(workers=0, memory_limit="256MiB"), sa.config.set(scheduler="synchronous"):
        return weighted(points, 700_001)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("chunks", [700_001, 40_000])
def test_float_weights_have_the_same_bits_for_any_workers_and_chunks(points: Any, expected_bits: bytes, workers: int, chunks: int) -> None:
    with sa.Pool(workers=workers, memory_limit="256MiB"), sa.config.set(scheduler="processes" if workers else "synchronous"):
        assert weighted(points, chunks) == expected_bits


def test_float_weights_have_the_same_bits_in_threads(points: Any, expected_bits: bytes) -> None:
    with sa.config.set(scheduler="threads"):
        assert weighted(points, 99_999) == expected_bits


def test_float_weights_have_the_same_bits_whichever_way_the_input_lies(points: Any, executor: str) -> None:
    x, w = (p[:700_000].reshape(700, 1000) for p in (points[0], points[2]))
    straight = sa.histogram(sa.array(x), 9, weights=sa.array(w))[0].compute()

    crossed = sa.histogram(sa.asarray(np.asfortranarray(x)), 9, weights=sa.asarray(np.asfortranarray(w)))[0].compute()

    assert crossed.tobytes() == straight.tobytes()


@pytest.mark.parametrize("count, splits", [(1_000, 2), (100_000, 2), (600_000, 1)])
def test_many_cells_have_few_partial_results(executor: str, count: int, splits: int) -> None:
    n = 300_000
    x = np.random.default_rng(8).integers(0, count, n)
    w = np.random.default_rng(9).integers(0, 100, n)
    ours = sa.array(x)

    lazy = sa.bincount(ours, w, minlength=count)

    np.testing.assert_array_equal(lazy.compute(), np.bincount(x, w, count))
    assert lazy.plan().layers[0].ntasks == splits


@COMMON
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), count=st.integers(1, 2000))
def test_a_grid_bounds_what_partial_results_take(small_grids: Any, shape: Any, count: int) -> None:
    with small_grids():
        grid = accumulation_grid(shape, count)

    items = int(np.prod(shape))
    assert grid.ntasks == 1 or grid.ntasks * count <= max(256, items // 2)
    assert sum(int(np.prod([s.stop - s.start for s in grid.box(k)])) for k in range(grid.ntasks)) == items


# --- ufunc.at -----------------------------------------------------------------------------------------------------------------------

UFUNCS = ["add", "subtract", "multiply", "minimum", "maximum", "bitwise_and", "bitwise_or", "bitwise_xor", "logical_or", "divide", "fmax"]


@pytest.fixture
def always_by_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulators, "MANY_INDICES", 1)
    monkeypatch.setattr(accumulators, "ITEMS_PER_CELL", 0)


@pytest.mark.parametrize("by_tasks", [False, True])
@settings(COMMON, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    name=st.sampled_from(UFUNCS),
    shape=st.sampled_from([(1,), (20,), (4, 5), (2, 3, 4)]),
    dtypes=st.tuples(st.sampled_from([*DTYPES, "c16"]), st.sampled_from([*DTYPES, "c16"])),
    index=st.sampled_from(["i1", "u2", "i8"]),
    nindices=st.sampled_from([(0,), (1,), (90,), (6, 15)]),
    scalar=st.booleans(),
    seed=st.integers(0, 99),
)
def test_at_is_numpys(
    small_grids: Any, by_tasks: bool, name: str, shape: Any, dtypes: Any, index: str, nindices: Any, scalar: bool, seed: int
) -> None:
    ufunc = getattr(np, name)
    rng = np.random.default_rng(seed)
    x, v = values(shape, dtypes[0], seed), values(() if scalar else nindices[-1:], dtypes[1], seed + 1)
    low = [0 if index == "u2" else -n for n in shape]
    parts = tuple(rng.integers(a, n, nindices).astype(index) for a, n in zip(low, shape, strict=True))
    key = parts if len(parts) > 1 else parts[0]
    rtol = 0.0 if np.dtype(dtypes[0]).kind not in "fc" else {"f2": 0.1, "f4": 1e-4}.get(dtypes[0], 1e-9)

    def ours() -> Any:
        stored = cut(x, seed)
        ufunc.at(stored, key, v)
        return stored.compute()

    def theirs() -> Any:
        values = x.copy()
        ufunc.at(values, key, np.array(np.broadcast_to(v, nindices)))  # to be broadcast, NumPy 2.4 reads beyond them
        return values

    with sa.config.set(scheduler="synchronous"), small_grids(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulators, "MANY_INDICES", 1 if by_tasks else 1 << 18)
        patch.setattr(accumulators, "ITEMS_PER_CELL", 0)
        with np.errstate(all="ignore"):
            found, expected = both(ours, theirs)

    assert_alike(found, expected, rtol)


def test_many_indices_are_added_by_tasks_once_each(executor: str) -> None:
    rng = np.random.default_rng(1)
    x, at = rng.integers(0, 9, 1000), rng.integers(-1000, 1000, 600_000)
    stored, view = sa.array(x, chunks=99), None
    view = stored[::-1]
    expected = x.copy()
    np.add.at(expected[::-1], at, 3)

    sa.add.at(view, sa.array(at), 3)

    np.testing.assert_array_equal(stored.compute(), expected)


def test_what_was_lent_before_at_keeps_its_values(executor: str) -> None:
    x = sa.zeros(10).persist()
    before = x.compute()

    np.add.at(x, [1, 1], 1.0)

    assert before.tolist() == [0.0] * 10
    assert x.compute().tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("key", [[0, 99], np.array([0, -6]), (slice(None), [7])])
def test_an_index_out_of_bounds_is_an_error_before_anything_is_written(executor: str, always_by_tasks: None, key: Any) -> None:
    x = sa.zeros((5, 5) if isinstance(key, tuple) else 5).persist()

    with pytest.raises(IndexError, match="out of bounds"):
        np.add.at(x, key, 1.0)

    assert not np.asarray(x).any()


@pytest.mark.parametrize(
    "key", [slice(1, 3), [True, False, True, False], np.array([True, True, False, False]), (Ellipsis, 2), (slice(None), [1, 1, 2]), 1]
)
def test_at_takes_any_key_of_numpys(executor: str, always_by_tasks: None, key: Any) -> None:
    x = np.arange(16.0).reshape(4, 4)
    stored = sa.array(x, chunks=3)

    np.add.at(x, key, 1.5)
    np.add.at(stored, key, 1.5)

    np.testing.assert_array_equal(stored.compute(), x)


def test_values_that_do_not_fit_the_indices_are_an_error_before_anything_is_written(executor: str, always_by_tasks: None) -> None:
    x = sa.zeros(5).persist()

    for key in ([0, 1], np.array([0, 1])):
        with pytest.raises(ValueError, match="broadcast"):
            np.add.at(x, key, np.ones(3))
    with pytest.raises(TypeError, match="bitwise_or"):
        np.bitwise_or.at(x, np.array([0, 1]), np.ones(2))

    assert not np.asarray(x).any()


def test_untouched_elements_keep_their_bits(executor: str, always_by_tasks: None) -> None:
    x = np.array([-0.0, np.nan, np.inf, -np.inf, 1.0, -0.0])
    for name in ("add", "subtract", "multiply", "minimum", "maximum"):
        stored = sa.array(x)

        getattr(np, name).at(stored, np.array([4, 4]), np.array([2.0, 3.0]))

        expected = x.copy()
        getattr(np, name).at(expected, [4, 4], [2.0, 3.0])
        assert stored.compute().tobytes() == expected.tobytes(), name


def test_the_values_may_be_read_from_the_array_itself(executor: str, always_by_tasks: None) -> None:
    x = sa.array(np.arange(6.0))

    np.add.at(x, np.array([0, 0, 5, 1, 2, 3]), x * 2)

    expected = np.arange(6.0)
    np.add.at(expected, [0, 0, 5, 1, 2, 3], np.arange(6.0) * 2)
    np.testing.assert_array_equal(x.compute(), expected)


def test_at_on_an_expression_changes_the_handle_alone() -> None:
    x = sa.array(np.zeros(3))
    y = x + 1

    np.add.at(y, [1, 1], 1.0)

    assert y.compute().tolist() == [1, 3, 1]
    assert not np.asarray(x).any()


def test_at_on_a_numpy_array_takes_our_indices_and_values() -> None:
    x = np.zeros(3)

    sa.add.at(x, sa.array([1, 1]), sa.array([1.0, 2.0]) * 2)

    assert x.tolist() == [0, 6, 0]


def test_a_broadcast_is_not_written_to() -> None:
    x = sa.broadcast_to(sa.zeros(3).persist(), (2, 3))

    with pytest.raises(ValueError, match="read-only"):
        np.add.at(x, ([0], [1]), 1.0)
    with pytest.raises(ValueError, match="read-only"):
        x[[0]] = 1.0


def test_writing_at_index_arrays_moves_only_what_it_writes(executor: str) -> None:
    x = np.arange(20.0).reshape(4, 5)
    stored = sa.array(x, chunks=2)
    view = stored[1:, ::2]
    lent = stored.compute()

    view[[0, 2], [1, -1]] = sa.array([50.0, 60.0])
    view[:, [0]] = 7

    expected = x.copy()
    expected[1:, ::2][[0, 2], [1, -1]] = [50.0, 60.0]
    expected[1:, ::2][:, [0]] = 7
    np.testing.assert_array_equal(stored.compute(), expected)
    np.testing.assert_array_equal(lent, x)
