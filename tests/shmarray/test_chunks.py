"""Chunks in every form that dask takes; they tile the shape, whatever is done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmarray as sa

SIZES = st.integers(1, 12)


@st.composite
def explicit(draw: Any) -> tuple[tuple[int, ...], Any]:
    """Return a shape and chunks for it in a form that leaves nothing to choose."""
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))

    def entry(n: int) -> Any:
        kind = draw(st.sampled_from(["int", "tuple", "whole", "none"]))
        if kind == "int":
            return draw(SIZES)
        if kind == "tuple":
            cuts = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=4))) if n > 1 else []
            return tuple(b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True))
        return -1 if kind == "whole" else None

    form = draw(st.sampled_from(["one", "each", "dict"]))
    if form == "one":
        return shape, draw(st.one_of(SIZES, st.just(-1)))
    if form == "dict":
        return shape, {k: entry(n) for k, n in enumerate(shape) if draw(st.booleans())}
    return shape, tuple(entry(n) for n in shape)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(explicit())
def test_explicit_chunks_are_as_in_dask(case: tuple[tuple[int, ...], Any]) -> None:
    core = pytest.importorskip("dask.array.core")
    shape, chunks = case

    assert sa.normalize_chunks(chunks, shape) == core.normalize_chunks(chunks, shape)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 5000), max_size=4),
    st.sampled_from(["i1", "f4", "f8", "c16"]),
    st.sampled_from(["auto", "1KiB", "64 kB", "2MiB"]),
)
def test_automatic_chunks_tile_fit_and_are_contiguous_slabs(shape: list[int], dtype: str, chunks: str) -> None:
    limit = {"auto": 16 << 20, "1KiB": 1 << 10, "64 kB": 64_000, "2MiB": 2 << 20}[chunks]

    sizes = sa.normalize_chunks(chunks, shape, dtype)

    assert tuple(map(sum, sizes)) == tuple(shape)
    largest = [max(s, default=0) for s in sizes]
    assert np.prod(largest, dtype=float) * np.dtype(dtype).itemsize <= limit
    cut = [a for a, s in enumerate(sizes) if len(s) > 1]
    if cut:
        assert all(len(s) == 1 for s in sizes[cut[-1] + 1 :])
        assert all(n == 1 for n in largest[: cut[-1]])


def test_every_form_is_understood_where_arrays_are_made() -> None:
    shape = (10, 6)
    for chunks, expected in (
        (4, ((4, 4, 2), (4, 2))),
        ((4, -1), ((4, 4, 2), (6,))),
        (((5, 5), (1, 2, 3)), ((5, 5), (1, 2, 3))),
        ((None, 3), ((10,), (3, 3))),
        ({0: 5}, ((5, 5), (6,))),
        ({-1: 2}, ((10,), (2, 2, 2))),
        (-1, ((10,), (6,))),
        ("96B", ((2,) * 5, (6,))),
        (("auto", 2), ((10,), (2, 2, 2))),
        ([5, np.int64(6)], ((5, 5), (6,))),
        ((10, 6), ((10,), (6,))),
        (100, ((10,), (6,))),
    ):
        for x in (sa.zeros(shape, chunks=chunks), sa.array(np.zeros(shape), chunks=chunks), sa.asarray(np.zeros(shape), chunks=chunks)):
            assert x.chunks == expected, chunks
        assert sa.zeros(shape).rechunk(chunks).chunks == expected


@pytest.mark.parametrize(
    "chunks, words",
    [
        ((4, 4, 4), ["3 entries", "(10, 6)"]),
        (((5, 4), -1), ["9", "10", "axis 0"]),
        (((5, 5), (7, -1)), ["axis 1"]),
        (0, ["0"]),
        (-2, ["-2"]),
        (2.5, ["2.5"]),
        ({5: 2}, ["axis 5"]),
        (((2.5, 7.5), -1), ["whole numbers"]),
        (("1KiB", "2KiB"), ["more than one size"]),
        (("x", 2), ["x"]),
        (((),), ["1 entries"]),
    ],
    ids=repr,
)
def test_chunks_that_do_not_tile_are_refused_with_a_value_error(chunks: Any, words: list[str]) -> None:
    for make in (lambda: sa.zeros((10, 6), chunks=chunks), lambda: sa.array(np.zeros((10, 6)), chunks=chunks)):
        with pytest.raises(ValueError) as raised:
            make()
        assert all(word in str(raised.value) for word in words), raised.value


def test_what_chunks_say_of_an_array() -> None:
    x = sa.zeros((10, 6), chunks=(4, 3))

    assert x.chunksize == (4, 3)
    assert x.numblocks == (3, 2)
    assert x.npartitions == 6
    assert sa.zeros(()).chunks == () and sa.zeros(()).npartitions == 1
    assert sa.zeros((0, 3)).chunks == ((0,), (3,))


def test_rechunk_moves_nothing_keeps_axes_that_are_left_out_and_can_balance() -> None:
    x = sa.array(np.arange(100.0).reshape(10, 10), chunks=(4, 5))

    y = x.rechunk({0: 3})

    assert y.chunks == ((3, 3, 3, 1), (5, 5))
    assert y.is_stored and np.shares_memory(x.compute(), y.compute())
    assert x.rechunk((6, -1), balance=True).chunks == ((5, 5), (10,))
    assert x.rechunk({0: 3}, balance=True).chunks[0] == (3, 3, 2, 2)
    assert (x + 1).rechunk(2).chunks == ((2,) * 5, (2,) * 5)


def test_the_configured_size_is_that_of_automatic_chunks() -> None:
    with sa.config.set(chunk_size="8 KiB"):
        assert sa.zeros((64, 64)).chunks == ((16,) * 4, (64,))
    assert sa.zeros((64, 64)).chunks == ((64,), (64,))


def test_chunks_of_an_elementwise_result_are_the_finest_of_its_operands() -> None:
    x = sa.zeros((8, 6), chunks=(4, 6)) + sa.zeros(6, chunks=2)

    assert x.chunks == ((4, 4), (2, 2, 2))


def test_values_do_not_depend_on_chunks() -> None:
    a = np.random.default_rng(0).random((37, 11))

    results = {
        ((sa.array(a, chunks=c) * 1.1 + 3).sum().compute(), (sa.asarray(a, chunks=c) - 1).mean(0).compute().tobytes()) for c in (1, 5, 40)
    }

    assert len(results) == 1


def test_none_keeps_the_old_chunks_of_its_axis() -> None:
    x = sa.zeros((4, 6), chunks=((1, 3), (2, 4)))

    assert x.rechunk((None, 3)).chunks == ((1, 3), (3, 3))
    assert x.rechunk({0: None, 1: 3}).chunks == ((1, 3), (3, 3))
    assert x.rechunk({0: None, -1: None}).chunks == x.rechunk((None, None)).chunks == x.chunks
    assert sa.zeros((4, 6), chunks=(None, 3)).chunks == ((4,), (3, 3))
