"""Products of arrays: shapes, dtypes, errors and values as NumPy's, whole tiles and split sums alike."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import shmarray as sa

DTYPES = ["?", "i2", "i8", "f2", "f4", "f8", "c16"]


@pytest.fixture(autouse=True)
def _in_this_process() -> Any:
    with sa.config.set(scheduler="synchronous"):
        yield


def values(shape: tuple[int, ...], dtype: Any = "f8", seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    found = rng.integers(-3, 4, shape)
    return (found + 1j * rng.integers(-3, 4, shape)).astype(dtype) if np.dtype(dtype).kind == "c" else found.astype(dtype)


MATMUL = [
    ((3,), (3,)), ((3,), (3, 4)), ((4, 3), (3,)), ((9, 30), (30, 7)), ((5, 1), (1, 5)), ((1, 40), (40, 1)), ((2, 3, 4), (4, 5)),
    ((2, 3, 4), (2, 4, 5)), ((6, 1, 3, 4), (2, 4, 5)), ((3, 4), (2, 4, 5)), ((4,), (2, 4, 5)), ((2, 3, 4), (4,)), ((0, 3), (3, 2)),
    ((3, 0), (0, 2)), ((2, 0, 3), (3, 4)), ((3,), (4,)), ((2, 3), (2, 3)), ((), (3,)), ((3, 2, 2), (2, 2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", MATMUL)
@pytest.mark.parametrize("call", [np.matmul, sa.matmul, lambda a, b: a @ b])
def test_matmul_of_any_shapes_agrees_with_numpy(shapes: Any, call: Any, small_grids: Any, assert_same: Any, outcome: Any) -> None:
    a, b = values(shapes[0], seed=1), values(shapes[1], seed=2)
    expected, error, _ = outcome(lambda: np.matmul(a, b))
    with small_grids():
        for x, y in ((sa.asarray(a), sa.array(b)), (sa.array(a.T.copy()).T, b), (a, sa.asarray(b) * 1)):
            if isinstance(x, sa.Array) or isinstance(y, sa.Array):
                found, our_error, _ = outcome(lambda p=x, q=y: call(p, q))
                assert our_error is error
                if error is None:
                    assert_same(found, expected, rtol=1e-12)


@pytest.mark.parametrize("shapes", [*MATMUL, ((), ()), ((3, 4), ()), ((2, 3, 4), (5, 4, 2)), ((2, 3), (5, 3, 2))])
@pytest.mark.parametrize("name", ["dot", "inner", "outer", "vdot", "tensordot"])
def test_other_products_agree_with_numpy(name: str, shapes: Any, small_grids: Any, assert_same: Any, outcome: Any) -> None:
    extra = (1,) if name == "tensordot" else ()
    for dtype in ("f8", "c16"):
        a, b = values(shapes[0], dtype, 1), values(shapes[1], dtype, 2)
        expected, error, _ = outcome(lambda p=a, q=b: getattr(np, name)(p, q, *extra))
        for module in (np, sa):
            with small_grids():
                found, our_error, _ = outcome(lambda m=module, p=a, q=b: getattr(m, name)(sa.asarray(p), sa.asarray(q), *extra))
            assert (our_error is None) == (error is None)
            if error is None:
                assert_same(found, expected, rtol=1e-12)


@pytest.mark.parametrize("axes", [0, 1, 2, ([1], [0]), (1, 0), ([0, 1], [1, 0]), ([2, 0], [0, 2]), ([-1], [-3])])
def test_tensordot_over_any_axes_agrees_with_numpy(axes: Any, small_grids: Any, assert_same: Any, outcome: Any) -> None:
    a, b = values((4, 4, 4), seed=1), values((4, 4, 4), seed=2)
    with small_grids():
        assert_same(sa.tensordot(sa.asarray(a), sa.asarray(b), axes).compute(), np.tensordot(a, b, axes), rtol=1e-12)


@pytest.mark.parametrize("one, other", list(itertools.product(DTYPES, DTYPES)))
def test_dtypes_promote_as_in_numpy(one: str, other: str, small_grids: Any, assert_same: Any) -> None:
    a, b = values((6, 20), one, 1), values((20, 5), other, 2)
    with small_grids():
        assert_same((sa.asarray(a) @ sa.asarray(b)).compute(), a @ b, rtol=1e-3)
        assert_same(np.dot(sa.asarray(a), sa.asarray(b)).compute(), np.dot(a, b), rtol=1e-3)


def test_a_long_summed_axis_is_split_and_still_right(small_grids: Any, assert_same: Any) -> None:
    for k in (16, 17, 31, 100):
        a, b = values((3, k), seed=1), values((k, 2), seed=2)
        with small_grids():
            assert_same((sa.asarray(a) @ sa.asarray(b)).compute(), a @ b)
            assert_same((sa.array(b.T.copy()) @ sa.asarray(a).T).compute(), b.T @ a.T)
            assert_same(sa.dot(sa.asarray(a[0]), sa.asarray(b[:, 0])).compute(), np.dot(a[0], b[:, 0]))


def test_products_of_real_size_have_the_same_bits_for_any_workers_and_chunks() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((600, 900)), rng.standard_normal((900, 550))
    long = rng.standard_normal((2, 300_000))
    expected = [r.tobytes() for r in sa.compute(sa.asarray(a) @ sa.asarray(b), sa.asarray(long) @ sa.asarray(long).T)]
    for workers in (1, 2):
        with sa.Pool(workers=workers), sa.config.set(scheduler="processes"):
            x, y, z = sa.array(a, chunks=(100, 100)), sa.asarray(b, chunks=(77, 550)), sa.array(long)
            assert [r.tobytes() for r in sa.compute(x @ y, z @ z.T)] == expected
    np.testing.assert_allclose(np.frombuffer(expected[0]).reshape(600, 550), a @ b, atol=1e-10)
    np.testing.assert_allclose(np.frombuffer(expected[1]).reshape(2, 2), long @ long.T, atol=1e-8)


def test_out_and_in_place_products(executor: str) -> None:
    a, b = values((8, 8), seed=1), values((8, 8), seed=2)
    for out in (np.zeros((8, 8)), sa.array(np.zeros((8, 8))), sa.zeros((8, 8))):
        assert np.matmul(sa.asarray(a), b, out=out) is out
        np.testing.assert_array_equal(np.asarray(out), a @ b)
    x = sa.array(a)
    alias = x[:]
    x @= b
    np.testing.assert_array_equal(alias.compute(), a @ b)


def test_products_of_expressions_fuse_with_what_follows(small_grids: Any) -> None:
    a = values((12, 9), seed=1)
    with small_grids():
        x = sa.asarray(a)
        found = (((x * 2) @ (x.T + 1)) - 3).sum(axis=0).compute()
    np.testing.assert_allclose(found, (((a * 2) @ (a.T + 1)) - 3).sum(axis=0))


@pytest.mark.parametrize("name", ["inv", "det", "norm", "solve", "svd", "eigvalsh"])
def test_decompositions_are_one_call_of_numpy(name: str) -> None:
    a = values((5, 5), seed=4) + 9 * np.eye(5)
    args = (a, np.arange(5.0)) if name == "solve" else (a,)
    function = getattr(np.linalg, name)
    found, expected = function(*[sa.asarray(x) for x in args]), function(*args)
    for one, other in zip(found if name == "svd" else (found,), expected if name == "svd" else (expected,), strict=True):
        np.testing.assert_allclose(np.asarray(one), other)


@pytest.mark.parametrize(
    "name, first, second",
    [
        ("vecdot", (5,), (5,)),
        ("vecdot", (4, 5), (5,)),
        ("vecdot", (3, 1, 5), (4, 5)),
        ("matvec", (4, 5), (5,)),
        ("matvec", (4, 5), (5, 5)),
        ("matvec", (4, 5), (2, 3, 5)),
        ("matvec", (2, 4, 5), (5,)),
        ("matvec", (2, 4, 5), (3, 1, 5)),
        ("vecmat", (4,), (4, 5)),
        ("vecmat", (4, 4), (4, 5)),
        ("vecmat", (2, 3, 4), (4, 5)),
        ("vecmat", (4,), (2, 4, 5)),
        ("vecmat", (3, 1, 4), (2, 4, 5)),
    ],
)
@pytest.mark.parametrize("kind", ["f8", "i4", "c16", "?"])
def test_products_of_vectors_are_numpys(name: str, first: tuple[int, ...], second: tuple[int, ...], kind: str) -> None:
    rng = np.random.default_rng(3)
    a, b = ((rng.integers(-3, 4, shape) + (1j if kind == "c16" else 0)).astype(kind) for shape in (first, second))
    expected = getattr(np, name)(a, b)

    found = getattr(sa, name)(sa.array(a), b)

    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found.compute(), expected)
    np.testing.assert_allclose(np.asarray(getattr(np, name)(sa.array(a), b)), expected)


def test_products_of_vectors_refuse_shapes_that_do_not_match() -> None:
    for name in ("vecdot", "matvec", "vecmat"):
        for shapes in (((4, 4), (3, 3)), ((4, 4), (1, 1)), ((4,), ()), ((), (4,))):
            with pytest.raises(ValueError, match=name):
                getattr(sa, name)(*(sa.ones(s) for s in shapes))


def test_vecdot_takes_an_axis() -> None:
    a, b = np.arange(12.0).reshape(3, 4), np.arange(12.0).reshape(3, 4) + 1

    np.testing.assert_allclose(sa.vecdot(sa.array(a), b, axis=0).compute(), np.vecdot(a, b, axis=0))


def test_products_with_constants_along_a_long_axis() -> None:
    n = 1 << 17
    a = np.random.default_rng(1).random((4, n))
    x = sa.array(a)
    np.testing.assert_allclose((x @ sa.ones((n, 4))).compute(), a @ np.ones((n, 4)))
    np.testing.assert_allclose((sa.ones((3, n)) @ sa.full((n, 2), 2.0)).compute(), np.full((3, 2), 2.0 * n))
