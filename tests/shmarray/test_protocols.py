"""What Python and NumPy ask of an array: conversions, operators from either side, functions nobody has parallelised, a picture."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import shmarray as sa

pytestmark = pytest.mark.usefixtures("pool")


def both() -> list[tuple[np.ndarray, Any]]:
    a = np.array([[4.0, 1, 3], [2, 5, 2], [1, 7, 6]])
    return [(a, sa.array(a, chunks=2)), (a, sa.asarray(a)), (a + 1, sa.asarray(a) + 1)]


def agree(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for one, two in zip(ours, theirs):
            agree(one, two)
        return
    got = ours.compute() if isinstance(ours, sa.Array) else ours
    assert np.shape(got) == np.shape(theirs)
    assert np.asarray(got).dtype == np.asarray(theirs).dtype
    np.testing.assert_array_equal(got, theirs)


# --- conversions -----------------------------------------------------------------------------------------------------------


def test_asarray_gives_the_values_with_dtype_and_copy_as_asked() -> None:
    a, x = both()[0]

    agree(np.asarray(x, dtype="f4"), a.astype("f4"))
    copied = np.array(x)
    copied[0] = 9
    forced = np.asarray(x, copy=True)
    forced[0] = 9
    agree(x, a)
    assert np.shares_memory(np.asarray(x, copy=False), x.compute())
    for never in (x + 1, x):
        with pytest.raises(ValueError):
            np.asarray(never, dtype="f4" if never is x else None, copy=False)
    computed = np.asarray(x + 1)
    assert computed.flags.writeable


def test_scalars_become_python_numbers_and_others_do_not() -> None:
    x = sa.array(np.arange(6.0))

    assert float(x[2]) == 2.0 and int(x.sum()) == 15 and bool(x.any()) is True and complex(x[1]) == 1 + 0j
    assert operator.index(sa.array(3)) == 3 and [10, 20, 30][sa.array(1)] == 20
    assert x[2].item() == 2.0 and x.tolist() == list(range(6)) and x[:1].item() == 0.0
    assert not sa.array(0) and sa.array([5]).shape == (1,)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x)
    for convert in (float, int, complex):
        with pytest.raises(TypeError):
            convert(x)
    assert f"{x.sum():.1f}" == "15.0" and f"{x.sum()}" == repr(x.sum())
    for wrong in (sa.array(1.5), x):
        with pytest.raises(TypeError):
            operator.index(wrong)


def test_containers_words_work() -> None:
    for a, x in both():
        assert len(x) == 3
        assert (5.0 in x) == (5.0 in a) and 99 not in x
        for ours, theirs in zip(x, a):
            agree(ours, theirs)
        assert [float(v) for v in x.flat] == list(a.flat)
        first, *rest = x
        agree(first, a[0])
        assert len(rest) == 2


def test_an_array_has_no_hash_and_is_not_made_directly() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(sa.zeros(3))
    with pytest.raises(TypeError, match=r"sa\.array"):
        sa.Array([1, 2])


# --- operators -------------------------------------------------------------------------------------------------------------

BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne"]


@pytest.mark.parametrize("name", BINARY)
def test_operators_take_arrays_of_numpy_on_either_side(name: str) -> None:
    op = getattr(operator, name)

    for a, x in both():
        for other in (a[0], 2, 1.5, np.float32(3), a[:, :1].tolist()):
            for ours, theirs in (
                (op(x, other), op(a, np.asarray(other) if isinstance(other, list) else other)),
                (op(other, x), op(other if not isinstance(other, list) else np.asarray(other), a)),
            ):
                assert isinstance(ours, sa.Array)
                agree(ours, theirs)


def test_whole_numbers_have_their_operators() -> None:
    a = np.array([5, 3, 12])
    x = sa.array(a)

    for op in (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift, divmod):
        agree(op(x, 2), op(a, 2))
        agree(op(7, x), op(7, a))
        agree(op(a, x), op(a, a))
    for op in (operator.neg, operator.pos, operator.abs, operator.invert):
        agree(op(x), op(a))
    agree(a @ x, a @ a)
    agree(x @ a, a @ a)


def test_numpy_arrays_can_be_updated_with_ours() -> None:
    a = np.arange(3.0)
    x = sa.array(a) * 2

    b = a.copy()
    b += x
    b *= x
    b[1:] = x[1:]
    c = np.zeros(3)
    np.add(a, x, out=c)

    agree(b, np.array([0.0, 2, 4]))
    agree(c, a * 3)
    with pytest.raises(TypeError, match="same_kind"):
        np.add(a, x, out=np.zeros(3, int))


def test_what_is_no_array_has_its_own_say() -> None:
    class Mine:
        __array_ufunc__ = None

        def __radd__(self, other: Any) -> str:
            return "mine"

    x = sa.zeros(3)

    assert x + Mine() == "mine"
    with pytest.raises(TypeError):
        x + object()
    with pytest.raises(TypeError):
        x + None
    with pytest.raises(TypeError):
        "a" + x


# --- functions of NumPy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        np.median,
        np.sort,
        np.linalg.inv,
        np.linalg.det,
        np.unique,
        np.argsort,
        np.diff,
        np.percentile,
        np.histogram,
        np.interp,
        np.linalg.qr,
        np.fft.fft,
        np.nonzero,
        np.tile,
        np.searchsorted,
        np.lexsort,
        np.allclose,
        np.array_equal,
        np.trapezoid,
        np.diagonal,
        np.triu,
        np.apply_along_axis,
    ],
    ids=lambda f: f.__name__,
)
def test_a_function_that_nobody_has_parallelised_works_on_the_values(call: Callable[..., Any]) -> None:
    extra: dict[Any, Callable[[Any], tuple[Any, ...]]] = {
        np.percentile: lambda v: (v, 30),
        np.interp: lambda v: (v[0], np.arange(3), v[1]),
        np.tile: lambda v: (v, (2, 1)),
        np.searchsorted: lambda v: (np.arange(5), v),
        np.allclose: lambda v: (v, v + 1e-12),
        np.array_equal: lambda v: (v, v),
        np.apply_along_axis: lambda v: (sum, 0, v),
    }
    for a, x in both():
        args = extra.get(call, lambda v: (v,))
        agree(call(*args(x)), call(*args(a)))


def test_results_of_such_functions_are_arrays_again() -> None:
    x = sa.array(np.array([3.0, 1, 2]))

    y = np.sort(x)

    assert isinstance(y, sa.Array)
    agree((y + 1).sum(), np.float64(9))


def test_functions_that_change_an_array_change_it() -> None:
    x = sa.array(np.zeros(4))

    np.copyto(x, 3)
    np.copyto(x, [1, 2, 3, 4], where=np.array([True, False, False, True]))

    agree(x, np.array([1, 3, 3, 4.0]))


def test_shape_ndim_and_size_compute_nothing() -> None:
    x = sa.ones((1 << 20, 1 << 15)) + 1  # 256 GiB

    assert np.shape(x) == x.shape and np.ndim(x) == 2 and np.size(x) == 1 << 35 and np.size(x, 1) == 1 << 15
    assert np.zeros_like(x).shape == x.shape


# --- what is seen ----------------------------------------------------------------------------------------------------------


def test_the_text_says_shape_dtype_chunks_bytes_and_what_is_pending() -> None:
    x = sa.array(np.zeros((4, 6)), chunks=(2, 3))

    assert "shape=(4, 6)" in repr(x) and "float64" in repr(x) and "(2, 3)" in repr(x) and "2x2 chunks" in repr(x) and "stored" in repr(x)
    assert "192" in repr(x)
    assert "operations pending" in repr((x + 1).sum(0))
    assert "1 operation pending" in repr(x + 1)
    assert "shape=()" in repr(x.sum())


def test_the_graph_is_one_of_networkx() -> None:
    networkx = pytest.importorskip("networkx")
    x = sa.array(np.zeros((4, 6)), chunks=(2, 3))

    graph = ((x + 1) * (x + 1)).sum(axis=0).graph()

    assert isinstance(graph, networkx.DiGraph) and networkx.is_directed_acyclic_graph(graph)
    names = [graph.nodes[n]["name"] for n in networkx.topological_sort(graph)]
    assert names[:3] == ["stored", "add", "multiply"] and "sum" in names
    assert all(isinstance(graph.nodes[n]["shape"], tuple) for n in graph)


def test_the_plan_can_be_had_as_a_graph() -> None:
    networkx = pytest.importorskip("networkx")
    x = sa.array(np.zeros((4, 6)))

    graph = (x - x.mean(0)).plan().to_networkx()

    assert isinstance(graph, networkx.DiGraph) and networkx.is_directed_acyclic_graph(graph)


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: sa.array([object()]),
        lambda: sa.array([1, None]),
        lambda: sa.asarray(np.array([1, "a"], object)),
        lambda: sa.zeros(3, dtype=object),
        lambda: sa.zeros(3).astype(object),
        lambda: sa.array(np.array(["a"], np.dtypes.StringDType())),
        lambda: sa.from_array(np.array([{}])),
        lambda: sa.zeros(3, dtype="O,i4"),
        lambda: sa.zeros(3) + np.array([object()]),
        lambda: sa.zeros(3, dtype="no such"),
        lambda: sa.empty(3, np.dtypes.StringDType()),
    ],
)
def test_dtypes_whose_elements_are_objects_are_refused_when_built(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError):
        make()
