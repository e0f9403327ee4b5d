"""Random arrays: the numbers depend on the seed and the number of draws before, on nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import shmarray as sa

DRAWS = {
    "random": lambda g, **k: g.random(**k),
    "random float32": lambda g, **k: g.random(dtype="f4", **k),
    "integers": lambda g, **k: g.integers(-5, 6, **k),
    "integers uint8": lambda g, **k: g.integers(0, 255, dtype="u1", endpoint=True, **k),
    "uniform": lambda g, **k: g.uniform(-1, 3, **k),
    "normal": lambda g, **k: g.normal(5, 2, **k),
    "standard_normal": lambda g, **k: g.standard_normal(**k),
    "exponential": lambda g, **k: g.exponential(2.0, **k),
    "poisson": lambda g, **k: g.poisson(3.0, **k),
}
MOMENTS = {  # mean, standard deviation
    "random": (0.5, 12**-0.5), "random float32": (0.5, 12**-0.5), "integers": (0, 10**0.5), "integers uint8": (127.5, (65535 / 12) ** 0.5),
    "uniform": (1, (16 / 12) ** 0.5), "normal": (5, 2), "standard_normal": (0, 1), "exponential": (2, 2), "poisson": (3, 3**0.5),
}  # fmt: skip
SHAPE = (37, 1100)  # crosses blocks of the streams


def draw(label: str, seed: int = 3, **kwargs: Any) -> Any:
    return DRAWS[label](sa.random.default_rng(seed), **kwargs)


@pytest.mark.parametrize("label", DRAWS)
def test_the_numbers_depend_on_neither_chunks_nor_tiles_nor_executors(label: str, small_grids: Any) -> None:
    whole = draw(label, size=SHAPE).compute()
    assert whole.shape == SHAPE
    for chunks in (5, (37, 100), (1, -1)):
        np.testing.assert_array_equal(draw(label, size=SHAPE, chunks=chunks).compute(), whole)
    with small_grids(TILE_ITEMS=3000, BLOCK_ITEMS=700):
        np.testing.assert_array_equal(draw(label, size=SHAPE).compute(scheduler="synchronous"), whole)
        np.testing.assert_array_equal(draw(label, size=SHAPE).compute(scheduler="threads"), whole)
    np.testing.assert_array_equal(draw(label, size=SHAPE).compute(scheduler="processes"), whole)
    with sa.Pool(workers=1):
        np.testing.assert_array_equal(draw(label, size=SHAPE).compute(scheduler="processes"), whole)


@pytest.mark.parametrize("label", ["random", "integers"])
def test_slices_transposes_and_broadcasts_of_a_draw_are_those_of_its_numbers(label: str, small_grids: Any) -> None:
    x = draw(label, size=(6, 5, 1200))
    a = x.compute()
    views = [
        lambda v: v[2:5],
        lambda v: v[::-1, ::2, 7::13],
        lambda v: v[3, :, -1],
        lambda v: v.T,
        lambda v: v.transpose(1, 2, 0)[1:, ::-3],
        lambda v: v[:, :1] + v,
        lambda v: v[0, 0] * v,
        lambda v: v[:, None, 2, :5],
        lambda v: v.reshape(30, 1200)[::7],
        lambda v: v[1:1],
    ]
    for grids in ({}, {"TILE_ITEMS": 400, "BLOCK_ITEMS": 90}):
        for view in views:
            if grids:
                with small_grids(**grids):
                    found = view(x).compute(scheduler="synchronous")
            else:
                found = view(x).compute()
            np.testing.assert_array_equal(found, view(a))


def test_a_draw_broadcast_along_an_axis_of_length_one() -> None:
    x, y = sa.random.default_rng(1).random((700, 1)), sa.random.default_rng(2).random((1, 300))
    np.testing.assert_array_equal((sa.ones((700, 300)) * x + y).compute(), x.compute() + y.compute())


@pytest.mark.parametrize("label", DRAWS)
def test_moments_are_plausible_and_numbers_do_not_repeat(label: str) -> None:
    a = draw(label, size=200_000).compute().astype(float)
    mean, deviation = MOMENTS[label]
    assert abs(a.mean() - mean) < 5 * deviation / len(a) ** 0.5
    assert abs(a.std() - deviation) < 0.02 * deviation
    blocks = a[: 12 * 16384].reshape(12, 16384)
    for one, other in itertools.combinations(range(12), 2):
        assert not np.array_equal(blocks[one], blocks[other])
        assert abs(np.corrcoef(blocks[one], blocks[other])[0, 1]) < 0.04


def test_seeds_and_draws() -> None:
    def three(seed: Any) -> list[bytes]:
        g = sa.random.default_rng(seed)
        return [g.random(50).compute().tobytes() for _ in range(3)]

    assert three(1) == three(1)
    assert len({*three(1), *three(2), *three([1, 2]), *three(np.random.SeedSequence(9))}) == 12
    assert three(None) != three(None)
    generator = sa.random.default_rng(5)
    assert sa.random.default_rng(generator) is generator


def test_the_order_of_computing_does_not_matter() -> None:
    g, h = sa.random.default_rng(5), sa.random.default_rng(5)
    a, b = g.random(100), g.normal(size=100)
    later_b, later_a = (lambda p, q: (q.compute(), p.compute()))(h.random(100), h.normal(size=100))
    np.testing.assert_array_equal(a.compute(), later_a)
    np.testing.assert_array_equal(b.compute(), later_b)


def test_a_draw_used_twice_is_one_draw() -> None:
    x = sa.random.default_rng(5).random((300, 300))
    assert not (x - x).any().compute()
    assert (x.mean() - x.compute().mean()).compute() < 1e-12


@pytest.mark.parametrize("size", [None, (), 0, (0, 3), 1, (1, 1), (3, 0)])
def test_sizes_of_any_kind(size: Any) -> None:
    x = sa.random.default_rng(1).random(size)
    expected = np.random.default_rng(1).random(size)
    assert x.shape == np.shape(expected)
    assert np.shape(x.compute()) == np.shape(expected)


def test_misuse_raises_when_the_draw_is_made() -> None:
    g = sa.random.default_rng(1)
    with pytest.raises(ValueError):
        g.normal(0, -1, 3)
    with pytest.raises(ValueError):
        g.integers(5, 5, 3)
    with pytest.raises(ValueError):
        g.random(-1)
    with pytest.raises(TypeError):
        g.random(2.5)
    with pytest.raises(TypeError):
        g.random(3, dtype="i4")
    with pytest.raises(TypeError, match="number"):
        g.normal(np.zeros(3), 1, 3)


def test_the_stream_is_pinned() -> None:
    """Numbers of a seed are part of what users rely on: a change here is a change of every result in every notebook."""
    found = sa.random.default_rng(12345).random(4).compute()
    key = np.random.SeedSequence(12345).generate_state(2, np.uint64)
    np.testing.assert_array_equal(found, np.random.Generator(np.random.Philox(key=key, counter=np.zeros(4, np.uint64))).random(4))
