"""Functions of chunks with halos: what dask gives, without copying what lies side by side."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmarray as sa
from shmarray.errors import ChunkError

RNG = np.random.default_rng(0)
VALUES = RNG.random((60, 70))


def spread(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sum of an item and its neighbours, two away at most, zero beyond the block: a function of places near by."""
    result = block.copy()
    for axis in range(block.ndim):
        lead = (slice(None),) * axis
        for k in (1, 2):
            result[(*lead, slice(k, None))] += block[(*lead, slice(None, -k))]
            result[(*lead, slice(None, -k))] += 2 * block[(*lead, slice(k, None))]
    return result


def cut(data: Any, n: int, least: int) -> tuple[int, ...]:
    """Draw chunk sizes of an axis, none smaller than ``least``."""
    sizes: list[int] = []
    while n:
        size = data.draw(st.integers(max(1, least), max(1, n)))
        if n - size < least:
            size = n
        sizes.append(size)
        n -= size
    return tuple(sizes)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_halos_and_results_are_dasks(data: Any) -> None:
    da = pytest.importorskip("dask.array")
    shape = tuple(data.draw(st.lists(st.integers(4, 9), min_size=1, max_size=3)))
    a = RNG.integers(0, 99, shape).astype(float)
    depth: Any = {}
    boundary: dict[int, Any] = {}
    for axis in range(a.ndim):
        boundary[axis] = data.draw(st.sampled_from(["none", "periodic", "reflect", "nearest", 7.0]))
        one = st.integers(0, 3)
        depth[axis] = data.draw(st.one_of(one, st.tuples(one, one)) if boundary[axis] == "none" else one)
    chunks = tuple(cut(data, n, max(np.atleast_1d(depth[axis]))) for axis, n in enumerate(shape))
    theirs = da.from_array(a, chunks=chunks)
    kind = data.draw(st.sampled_from(["stored", "given", "turned", "expression"]))
    x = {
        "stored": lambda: sa.array(a, chunks=chunks),
        "given": lambda: sa.asarray(a).rechunk(chunks),
        "turned": lambda: sa.array(a.T.copy()).T.rechunk(chunks),
        "expression": lambda: sa.array(a - 1, chunks=chunks) + 1,
    }[kind]()

    with sa.config.set(scheduler=data.draw(st.sampled_from(["synchronous", "threads"]))):
        expected = da.map_overlap(spread, theirs, depth=depth, boundary=boundary, dtype=float)
        found = sa.map_overlap(spread, x, depth=depth, boundary=boundary)
        assert found.chunks == expected.chunks
        np.testing.assert_array_equal(found.compute(), expected.compute(scheduler="synchronous"))
        if not any(isinstance(d, tuple) for d in depth.values()):  # dask trims nothing of halos that are not symmetric
            wider = da.overlap.overlap(theirs, depth, boundary)
            ours = sa.overlap.overlap(x, depth, boundary)
            assert ours.chunks == wider.chunks
            np.testing.assert_array_equal(ours.compute(), wider.compute(scheduler="synchronous"))
            np.testing.assert_array_equal(sa.overlap.trim_internal(ours, depth, boundary).compute(), a)
        untrimmed = sa.map_overlap(lambda b: b[tuple(slice(0, 1) for _ in range(b.ndim))] * 0 + b.size, x, depth=depth, trim=False)
        assert untrimmed.chunks == chunks


def test_asymmetric_halos_go_with_any_boundary() -> None:
    x = sa.array(np.arange(6), chunks=3)

    found = sa.overlap.overlap(x, {0: (2, 1)}, "periodic")

    np.testing.assert_array_equal(found.compute(), [4, 5, 0, 1, 2, 3, 1, 2, 3, 4, 5, 0])
    np.testing.assert_array_equal(sa.overlap.trim_overlap(found, {0: (2, 1)}, "periodic").compute(), np.arange(6))


@pytest.mark.parametrize("mode", ["reflect", "nearest", "constant", "wrap"])
def test_filters_of_scipy_see_what_they_see_in_one_piece(mode: str, executor: str) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    boundary = {"reflect": "reflect", "nearest": "nearest", "constant": 0.0, "wrap": "periodic"}[mode]
    x = sa.array(VALUES, chunks=(20, 35))

    found = x.map_overlap(ndimage.gaussian_filter, depth=9, boundary=boundary, sigma=2, mode=mode, truncate=4.0)

    np.testing.assert_allclose(found.compute(), ndimage.gaussian_filter(VALUES, 2, mode=mode, truncate=4.0), rtol=1e-12)


def test_numba_functions_work(executor: str) -> None:
    numba = pytest.importorskip("numba")

    @numba.njit
    def laplace(u: Any) -> Any:
        out = np.zeros_like(u)
        for i in range(1, u.shape[0] - 1):
            for j in range(1, u.shape[1] - 1):
                out[i, j] = u[i - 1, j] + u[i + 1, j] + u[i, j - 1] + u[i, j + 1] - 4 * u[i, j]
        return out

    found = sa.map_overlap(laplace, sa.array(VALUES, chunks=(25, 30)), depth=1, boundary="periodic", dtype=float)

    expected = sum(np.roll(VALUES, s, a) for s, a in ((1, 0), (-1, 0), (1, 1), (-1, 1))) - 4 * VALUES
    np.testing.assert_allclose(found.compute(), expected, rtol=1e-12, atol=1e-12)


def test_chunks_inside_are_views_of_the_stored_array_and_read_only(pool: sa.Pool) -> None:
    x = sa.array(np.arange(16.0).reshape(16), chunks=4)
    seen = []

    def look(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen.append((block.flags.owndata, block.base is not None, block.flags.writeable, block.shape))
        return block

    with sa.config.set(scheduler="synchronous"):
        sa.map_overlap(look, x, depth=1, boundary="periodic", dtype=float).compute()

    assert [owned for owned, *_ in seen] == [True, False, False, True]  # at the ends halos are made
    assert {(writeable, shape) for _, _, writeable, shape in seen} == {(False, (6,))}


def test_several_arrays_are_aligned_and_broadcast() -> None:
    a, b = np.arange(48.0).reshape(6, 8), np.arange(8.0)
    x, y = sa.array(a, chunks=(3, 4)), sa.array(b, chunks=2)

    def mixed(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return p + np.roll(q, 1)

    found = sa.map_overlap(mixed, x, y, depth=1, boundary=["reflect", "periodic"])

    assert found.chunks == ((3, 3), (2, 2, 2, 2))
    np.testing.assert_array_equal(found.compute(), a + np.roll(b, 1))
    with pytest.raises(ChunkError, match="one array has 2 chunks"):
        sa.map_overlap(mixed, x, y, depth=1, boundary="none", align_arrays=False)


def test_a_depth_of_nothing_is_map_blocks() -> None:
    x = sa.array(VALUES, chunks=(20, 35))

    np.testing.assert_array_equal(sa.map_overlap(np.negative, x).compute(), -VALUES)


def test_axes_can_be_dropped_and_added() -> None:
    x = sa.array(VALUES, chunks=(20, 70))

    dropped = sa.map_overlap(lambda b: b.sum(axis=1), x, depth={0: 1}, boundary="nearest", drop_axis=1, dtype=float)
    added = sa.map_overlap(lambda b: b[None], x, depth={0: 1}, boundary="nearest", new_axis=0, dtype=float)

    np.testing.assert_allclose(dropped.compute(), VALUES.sum(axis=1))
    np.testing.assert_array_equal(added.compute(), VALUES[None])


def test_small_chunks_are_put_together() -> None:
    x = sa.array(np.arange(10.0), chunks=2)

    found = sa.map_overlap(spread, x, depth=3, boundary="reflect")

    assert found.chunks == ((4, 6),)
    with pytest.raises(ChunkError, match="depth 3 along axis 0 is more than the smallest of its chunks"):
        sa.map_overlap(spread, x, depth=3, boundary="reflect", allow_rechunk=False)
    with pytest.raises(ChunkError, match="depth 11 along axis 0 is more than the 10 items"):
        sa.map_overlap(spread, x, depth=11, boundary="reflect")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: sa.map_overlap(x, np.sin, depth=1), TypeError, "takes a function, then arrays"),
        (lambda x: sa.map_overlap(np.sin, x, 3, depth=1), TypeError, "takes arrays after the function, got Array, int"),
        (lambda x: sa.map_overlap(np.sin, x, depth=-1), ValueError, "give an int from 0 on"),
        (lambda x: sa.map_overlap(np.sin, x, depth={5: 1}), ValueError, "5 is no axis of an array of 2"),
        (lambda x: sa.map_overlap(np.sin, x, depth=(1, 1, 1)), ValueError, "has 3 entries, the array 2 axes"),
        (lambda x: sa.map_overlap(np.sin, x, depth=1, boundary="wrap"), ValueError, "give 'none', 'periodic', 'reflect', 'nearest' or a"),
        (lambda x: sa.map_overlap(np.sin, x, depth=[1, 1]), ValueError, "one entry for each of the 1 arrays"),
        (lambda x: sa.map_overlap(np.sum, x, depth=1, chunks=(1, 1)), ChunkError, "less than the halo"),
    ],
)
def test_misuse_says_what_to_do(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(sa.array(VALUES, chunks=30))


def test_a_result_of_another_shape_names_the_chunk_and_both_shapes() -> None:
    x = sa.array(VALUES, chunks=30)

    with pytest.raises(ValueError, match=r"gave shape \(30, 30\) for chunk \(0, 0\), expected \(31, 31\)"):
        sa.map_overlap(lambda b: b[:30, :30], x, depth=1, boundary="none", dtype=float).compute(scheduler="synchronous")


def test_functions_may_ask_for_the_place_of_their_chunk() -> None:
    x = sa.array(np.arange(8.0), chunks=4)

    def place(block: np.ndarray[Any, Any], block_id: Any = None, block_info: Any = None) -> np.ndarray[Any, Any]:
        assert block_info[0]["chunk-location"] == block_id
        return block * 0 + block_info[0]["array-location"][0][0]

    found = sa.map_overlap(place, x, depth=1, boundary=0, dtype=float)

    np.testing.assert_array_equal(found.compute(), [0] * 4 + [6] * 4)  # where the chunk with its halo begins among those


def test_a_worker_killed_by_the_function_is_replaced(tmp_path: Path, pool: sa.Pool) -> None:
    mark = str(tmp_path / "killed")

    def once_deadly(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if not os.path.exists(mark):
            with open(mark, "w") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return spread(block)

    x = sa.array(VALUES, chunks=(20, 35))

    found = sa.map_overlap(once_deadly, x, depth=2, boundary="periodic", dtype=float).compute()

    wide = np.pad(VALUES, 2, "wrap")
    np.testing.assert_allclose(found, spread(wide)[2:-2, 2:-2])
