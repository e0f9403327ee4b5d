"""Functions of whole chunks: what they are given, what they may give, and what is said when they fail. As in dask."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from typing import Any

import cloudpickle
import numpy as np
import pytest

import shmarray as sa

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the folder of the tests
EXECUTORS = ("synchronous", "threads", "processes")

pytestmark = pytest.mark.usefixtures("pool")


def both(shape: tuple[int, ...], chunks: Any, dtype: str = "f8") -> tuple[Any, Any]:
    """Return dask's array and ours of the same values and chunks."""
    da = pytest.importorskip("dask.array")
    a = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return da.from_array(a, chunks=chunks), sa.array(a, chunks=chunks)


def agree(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if hasattr(theirs, "chunks"):
        assert ours.chunks == theirs.chunks
        theirs = theirs.compute(scheduler="synchronous")
    np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_a_function_sees_one_chunk_at_a_time(executor: str) -> None:
    d, x = both((5, 7), (2, 3))

    agree(x.map_blocks(lambda b: b - b.mean()), d.map_blocks(lambda b: b - b.mean()))
    agree(sa.map_blocks(np.cumsum, x, axis=1, dtype=float), d.map_blocks(np.cumsum, axis=1, dtype=float))
    agree((x * 2).map_blocks(np.sort).sum(0) + 1, ((d * 2).map_blocks(np.sort).sum(0) + 1).compute())


def test_arguments_are_passed_on_and_the_dtype_is_found_out(executor: str) -> None:
    d, x = both((6,), 4, "i4")
    weights = np.arange(4)

    def f(b: np.ndarray, scale: Any, *, shift: Any, names: Any) -> Any:
        return b * scale + shift + len(names["a"])

    agree(x.map_blocks(f, 2.5, shift=weights[0], names={"a": [1, 2]}), d.map_blocks(f, 2.5, shift=weights[0], names={"a": [1, 2]}))
    assert x.map_blocks(lambda b: b > 2).dtype == bool
    assert x.map_blocks(lambda b: b.astype("f4")).dtype == np.float32
    assert x.map_blocks(lambda b: b * 1.0, dtype="i8").dtype == np.int64
    with pytest.raises(TypeError, match="same_kind"):
        x.map_blocks(lambda b: b + 0.5, dtype="i8").compute()


def test_the_result_may_have_other_chunks(executor: str) -> None:
    d, x = both((4, 6), (2, 3))

    def halve(b: np.ndarray) -> Any:
        return b[:, ::3]

    for chunks in (((2, 2), (1, 1)), (2, 1)):
        agree(x.map_blocks(halve, chunks=chunks, dtype=float), d.map_blocks(halve, chunks=chunks, dtype=float))


def test_axes_may_go_and_come(executor: str) -> None:
    d, x = both((4, 6), (2, 6))

    agree(x.map_blocks(lambda b: b.sum(1), drop_axis=1, dtype=float), d.map_blocks(lambda b: b.sum(1), drop_axis=1, dtype=float))
    agree(x.map_blocks(lambda b: b[None], new_axis=0, dtype=float), d.map_blocks(lambda b: b[None], new_axis=0, dtype=float))

    def swap(b: np.ndarray) -> Any:
        return np.stack([b.min(1), b.max(1)], axis=-1)

    given = {"drop_axis": 1, "new_axis": 1, "chunks": ((2, 2), (2,)), "dtype": float}
    agree(x.map_blocks(swap, **given), d.map_blocks(swap, **given))
    with pytest.raises(sa.ChunkError, match="2 chunks"):
        sa.zeros((4, 6), chunks=(2, 3)).map_blocks(lambda b: b.sum(1), drop_axis=1)


def test_block_id_is_as_dask_gives_it(executor: str) -> None:
    d, x = both((4, 6), (2, 3))

    def f(b: np.ndarray, block_id: Any = None) -> Any:
        return b * 0 + 10 * block_id[0] + block_id[1]

    agree(x.map_blocks(f, dtype=float), d.map_blocks(f, dtype=float))


def test_block_info_is_as_dask_gives_it() -> None:
    d, x = both((4, 6), (2, 4))
    seen: dict[str, dict[Any, Any]] = {"ours": {}, "theirs": {}}

    def look(b: np.ndarray, block_info: Any = None, who: str = "") -> Any:
        if block_info is not None and block_info[None].get("dtype") is not None:
            seen[who][tuple(block_info[None]["chunk-location"])] = block_info
        return b

    with sa.config.set(scheduler="synchronous"):
        x.map_blocks(look, who="ours", dtype=float).compute()
    d.map_blocks(look, who="theirs", dtype=float).compute(scheduler="synchronous")

    assert seen["ours"].keys() == seen["theirs"].keys()
    for index, info in seen["theirs"].items():
        for key in (0, None):
            for name, value in info[key].items():
                ours = seen["ours"][index][key][name]
                assert (list(map(tuple, ours)) if name == "array-location" else ours) == value, (index, key, name)


def test_several_arrays_go_block_by_block_and_single_blocks_are_spread(executor: str) -> None:
    d, x = both((4, 6), (2, 3))
    e, y = both((6,), 3)
    g, z = both((4, 1), (2, 1))

    agree(sa.map_blocks(lambda a, b: a + 10 * b, x, y, dtype=float), d.map_blocks(lambda a, b: a + 10 * b, e, dtype=float))
    agree(sa.map_blocks(lambda a, b, c: a + b * c, x, z, y, dtype=float), d.map_blocks(lambda a, b, c: a + b * c, g, e, dtype=float))
    with pytest.raises(sa.ChunkError, match=r"2 chunks.*3"):
        sa.map_blocks(np.add, x, sa.zeros(6, chunks=2))


def test_no_array_but_chunks_makes_one_from_nothing(executor: str) -> None:
    def f(block_id: Any = None) -> Any:
        return np.full((2, 3), block_id[0] * 10 + block_id[1])

    x = sa.map_blocks(f, chunks=((2, 2), (3, 3)), dtype=int)

    np.testing.assert_array_equal(x.compute(), np.kron([[0, 1], [10, 11]], np.ones((2, 3), int)))
    with pytest.raises(ValueError, match="chunks"):
        sa.map_blocks(f)


def test_blocks_are_read_only(executor: str) -> None:
    def scribble(b: np.ndarray) -> Any:
        b += 1
        return b

    a = np.zeros(4)
    for x in (sa.array(a), sa.asarray(a), sa.asarray(a) + 0):
        with pytest.raises(ValueError, match="read-only"):
            x.map_blocks(scribble, dtype=float).compute()
        np.testing.assert_array_equal(x.compute(), a)


def test_a_result_of_the_wrong_shape_names_chunk_and_shapes(executor: str) -> None:
    x = sa.array(np.zeros((4, 6)), chunks=(2, 3))

    with pytest.raises(ValueError) as raised:
        x.map_blocks(lambda b: b[:1], dtype=float).compute()

    text = str(raised.value) + "\n".join(getattr(raised.value, "__notes__", []))
    assert "(1, 3)" in text and "(2, 3)" in text and "chunks=" in text
    assert "(0, 0)" in text or "(0, 1)" in text or "(1, 0)" in text or "(1, 1)" in text


class MyError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code


def test_an_error_has_its_own_type_and_notes_that_name_chunk_and_line(executor: str) -> None:
    x = sa.array(np.arange(6.0), chunks=2)

    def fail(b: np.ndarray) -> Any:
        if b[0] == 4:
            raise MyError(7, "no fours")
        return b

    y = x.map_blocks(fail, dtype=float)
    line = inspect.currentframe().f_lineno - 1
    with pytest.raises(MyError) as raised:
        (y + 1).sum().compute()

    notes = "\n".join(raised.value.__notes__)
    assert raised.value.code == 7
    assert "chunk (2,)" in notes and "fail" in notes
    assert f"{__file__}:{line}" in notes
    np.testing.assert_array_equal((x + 1).compute(), np.arange(6.0) + 1)  # and the pool works on


def test_a_function_that_cannot_be_pickled_is_named_at_once() -> None:
    x = sa.array(np.zeros(4), chunks=2)
    lock = threading.Lock()

    def hold(b: np.ndarray) -> Any:
        return b if lock else b + 1

    with pytest.raises(Exception, match=r"(?i)pickle") as raised:
        x.map_blocks(hold, dtype=float).compute(scheduler="processes")

    text = str(raised.value) + "\n".join(getattr(raised.value, "__notes__", []))
    assert "hold" in text
    np.testing.assert_array_equal(x.map_blocks(hold, dtype=float).compute(scheduler="threads"), np.zeros(4))


def test_a_dtype_that_cannot_be_found_out_asks_for_one() -> None:
    x = sa.array(np.arange(6.0), chunks=3)

    def picky(b: np.ndarray) -> Any:
        return b.reshape(3, 1)[:, 0]

    with pytest.raises(ValueError, match="dtype="):
        x.map_blocks(picky)
    np.testing.assert_array_equal(x.map_blocks(picky, dtype=float).compute(), np.arange(6.0))


def test_what_is_no_function_or_gives_no_numbers_is_refused_when_built() -> None:
    with pytest.raises(TypeError, match="function"):
        sa.zeros(3).map_blocks(5)
    with pytest.raises(TypeError, match="object"):
        sa.zeros(3).map_blocks(lambda b: b, dtype=object)
    with pytest.raises(TypeError, match="object"):
        sa.zeros(3).map_blocks(lambda b: b.astype(object))


def test_partials_and_callables_have_names_too(executor: str) -> None:
    class Add:
        def __call__(self, b: Any) -> Any:
            return b + 1

    x = sa.array(np.zeros(4), chunks=2)

    np.testing.assert_array_equal(x.map_blocks(functools.partial(np.add, 2)).compute(), np.full(4, 2.0))
    np.testing.assert_array_equal(x.map_blocks(Add()).compute(), np.ones(4))


def test_a_function_may_compute_arrays_of_its_own() -> None:
    def nested(b: np.ndarray) -> Any:
        import shmarray

        return b + shmarray.arange(4.0).sum().compute()

    x = sa.array(np.zeros(4), chunks=2)

    for executor in EXECUTORS:
        np.testing.assert_array_equal(x.map_blocks(nested, dtype=float).compute(scheduler=executor), np.full(4, 6.0))


def test_blocks_are_indexed_like_an_array_of_chunks() -> None:
    d, x = both((5, 7), ((2, 3), (3, 3, 1)))

    for key in (0, (1, 2), (-1, -1), (slice(0, 1), 2), (slice(None), slice(1, 3)), (..., 1), slice(1, 2)):
        agree(x.blocks[key], d.blocks[key])
    assert x.blocks.shape == (2, 3) and x.blocks.size == 6
    assert [b.shape for b in x.blocks.ravel()] == [b.shape for b in d.blocks.ravel()]
    assert x.blocks[0, 1].is_stored
    for wrong in ((2, 0), (0, 0, 0), (0, "a"), (slice(None, None, 2),)):
        with pytest.raises(IndexError):
            x.blocks[wrong]


def test_fromfunction_is_called_for_each_chunk(executor: str) -> None:
    x = sa.fromfunction(lambda i, j: i * 10 + j, (4, 5), dtype=int, chunks=2)

    np.testing.assert_array_equal(x.compute(), np.fromfunction(lambda i, j: i * 10 + j, (4, 5), dtype=int))


@pytest.mark.parametrize("new_axis, shape", [(-1, (2, 3, 1)), (-3, (1, 2, 3)), ((-1, 0), (1, 2, 3, 1)), ([1, -1], (2, 1, 3, 1))])
def test_negative_new_axes_count_from_the_end_of_the_result(new_axis: Any, shape: tuple[int, ...]) -> None:
    x = sa.array(np.arange(6.0).reshape(2, 3), chunks=(1, 3))

    y = x.map_blocks(lambda b: np.expand_dims(b, new_axis), new_axis=new_axis, dtype=float)

    assert y.shape == shape
    np.testing.assert_array_equal(y.compute(scheduler="synchronous"), np.arange(6.0).reshape(shape))


@pytest.mark.parametrize("new_axis", [3, -4, (0, 0)])
def test_new_axes_that_are_not_there_are_refused(new_axis: Any) -> None:
    with pytest.raises(ValueError, match="axis"):
        sa.ones((2, 3)).map_blocks(lambda b: b, new_axis=new_axis, dtype=float)


def test_a_function_that_cannot_travel_is_named_with_the_setting_that_helps() -> None:
    lock = threading.Lock()

    with pytest.raises(TypeError) as caught:
        sa.ones(4).map_blocks(lambda b: b + lock.locked(), dtype=float).compute(scheduler="processes")

    assert any("scheduler='threads'" in note and "lock" in note for note in caught.value.__notes__)
