"""Steps that are done block by block give the bits that they give one after the other, whatever the step, the boundary and the executor.

Arrays of a few hundred items are cut into tiles of a few, and `Blocks` counts the steps that were done so: a test in which none was fails.
Never put here: which tasks a block gets (`tests/scheduler/test_blocking.py`), deaths of workers (`tests/faults/test_blocked_kill.py`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import shmarray as sa
from scheduler.blocking import blocked

pytest.importorskip("llvmlite", reason="the compiled engine needs llvmlite (extra jit)")

from shmarray.kernels.llvm import engine

loops = sys.modules["shmarray.iterate"]  # the package's `iterate` is the function
EXAMPLES = 300 if float(os.environ.get("SHMARRAY_SOAK_MINUTES", "0")) else 4
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 10, suppress_health_check=list(hypothesis.HealthCheck)
)
STEPS = 40  # one step alone, which is measured; then as many as are done at once, and some more
pytestmark = pytest.mark.timeout(120 if EXAMPLES < 10 else 3600)


@dataclass
class Blocks:
    """Counts steps that are done block by block. ``is_off``: none is."""

    is_off: bool = False
    steps: int = 0

    def __call__(self, steps: Any, workers: int) -> Any:
        found, done = ([], 0) if self.is_off else blocked(steps, workers)
        self.steps += done
        return found, done


@contextlib.contextmanager
def small_blocks(small_grids: Callable[..., Any], *, is_off: bool = False, tile: int = 64, thin: int = 8) -> Iterator[Blocks]:
    """Cut small arrays into tiles, thin ones for steps done block by block, and have all steps go to an executor."""
    counted = Blocks(is_off)
    # Compiled reductions and copies have constants of their own; workers know this one as it is.
    with small_grids(TILE_ITEMS=tile, BLOCK_ITEMS=1 << 16, THIN_ITEMS=thin), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loops, "blocked", counted)
        patch.setattr(loops, "SMALL_NBYTES", -1)  # else tiny steps stay in this thread
        with sa.config.set(engine="llvm"):
            yield counted


def values(shape: Any, seed: int = 0, dtype: Any = float) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(-9, 9, shape).astype(dtype) if np.dtype(dtype).kind == "i" else rng.random(shape).astype(dtype)


def loop(step: Callable[..., Any], *state: Any, steps: int, scalars: Callable[[int], dict[str, Any]] = lambda k: {}) -> list[Any]:
    """Do with NumPy what `iterate` does."""
    arrays: Any = tuple(np.array(x) for x in state)
    for k in range(steps):
        found = step(*arrays, **scalars(k))
        arrays = found if isinstance(found, tuple) else (found,)
    return list(arrays)


def run(step: Callable[..., Any], *state: Any, steps: int = STEPS, **more: Any) -> list[np.ndarray[Any, Any]]:
    found = sa.iterate(step, *(sa.array(x) for x in state), steps=steps, **more)
    return [np.array(x) for x in (found if isinstance(found, tuple) else (found,))]


def assert_bits(found: list[Any], expected: list[Any]) -> None:
    assert [x.tobytes() for x in found] == [x.tobytes() for x in expected]


def assert_near(found: list[Any], expected: list[Any]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        if x.dtype.kind == "f":  # a rounding of each step, which steps that do not amplify them add up
            np.testing.assert_allclose(x, y, rtol=0, atol=8 * STEPS * np.finfo(x.dtype).eps * max(1.0, float(abs(y).max())))
        else:
            np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------------------------------------------ random programs


@dataclass(frozen=True)
class Program:
    """A stencil on one or several fields; ``edges``, per axis: what stands beyond the ends."""

    shape: tuple[int, ...]
    dtype: str
    edges: tuple[str, ...]
    reach: int
    nfields: int
    is_leapfrog: bool
    has_mask: bool
    has_source: bool
    has_scalars: bool

    def neighbours(self, u: Any, axis: int) -> Any:
        """Return what stands before and behind, added up; where nothing does, what an edge of the state itself says."""
        edge, reach = self.edges[axis], self.reach
        if edge == "roll":
            return np.roll(u, reach, axis) + np.roll(u, -reach, axis)
        beside = [(reach, reach) if a == axis else (0, 0) for a in range(u.ndim)]
        wide = np.pad(u, beside, mode=edge)
        cut = [slice(None)] * u.ndim
        cut[axis] = slice(2 * reach, None)
        behind = wide[tuple(cut)]
        cut[axis] = slice(None, -2 * reach)
        return wide[tuple(cut)] + behind

    def __call__(self, *state: Any, mask: Any = None, source: Any = None, dt: Any = None) -> Any:
        fields = state[: self.nfields]
        spread = [self.spread(u) for u in fields]
        if self.nfields > 1:  # each looks at the one before as well
            spread = [self.mixed(one, fields[k - 1]) for k, one in enumerate(spread)]
        if source is not None:
            spread = [one + source for one in spread]
        if dt is not None:
            spread = [one + dt for one in spread]
        if mask is not None:
            spread = [np.where(mask, one, u) for one, u in zip(spread, fields, strict=True)]
        if self.is_leapfrog:
            before = state[-1]
            new = spread[0] - before if np.dtype(self.dtype).kind == "i" else (spread[0] + before) * np.dtype(self.dtype).type(0.5)
            return (new, *spread[1:], fields[0])
        return tuple(spread)

    def mixed(self, one: Any, other: Any) -> Any:
        return one + other % 3 if np.dtype(self.dtype).kind == "i" else one * one.dtype.type(0.75) + other * one.dtype.type(0.25)

    def spread(self, u: Any) -> Any:
        if np.dtype(self.dtype).kind == "i":
            inner = (u * 3 + sum(self.neighbours(u, axis) for axis in self.moving)) % 1009
        else:
            weight = u.dtype.type(0.5 / max(1, 2 * len(self.moving)))
            inner = u * u.dtype.type(0.5) + weight * sum(self.neighbours(u, axis) for axis in self.moving)
        fixed = [axis for axis, edge in enumerate(self.edges) if edge == "fixed"]
        if not fixed:
            return inner
        v, half = u.copy(), u.dtype.type(0.5)
        place = tuple(slice(self.reach, -self.reach) if axis in fixed else slice(None) for axis in range(u.ndim))
        part = inner[place]
        for axis in fixed:
            low, high = list(place), list(place)
            low[axis], high[axis] = slice(0, -2 * self.reach), slice(2 * self.reach, None)
            sides = u[tuple(low)], u[tuple(high)]
            part = (part + sides[0] - sides[1]) % 1009 if u.dtype.kind == "i" else part * half + (sides[0] + sides[1]) * half * half
        v[place] = part
        return v

    @property
    def moving(self) -> list[int]:
        return [axis for axis, edge in enumerate(self.edges) if edge != "fixed"]

    def scalars(self, step: int) -> dict[str, Any]:
        if not self.has_scalars:
            return {}
        return {"dt": np.dtype(self.dtype).type(step % 5 if np.dtype(self.dtype).kind == "i" else 0.01 * (step % 7))}

    def constants(self) -> dict[str, np.ndarray[Any, Any]]:
        found = {}
        if self.has_mask:
            found["mask"] = values(self.shape, 21) < 0.8
        if self.has_source:
            found["source"] = values(self.shape, 22, self.dtype)
            if self.dtype != "i4":
                found["source"] *= 0.01
        return found

    def state(self, seed: int) -> list[np.ndarray[Any, Any]]:
        return [values(self.shape, seed + k, self.dtype) for k in range(self.nfields + self.is_leapfrog)]


@st.composite
def programs(draw: Any) -> Program:
    ndim = draw(st.integers(1, 3))
    first = {1: (1500, 3000), 2: (90, 200), 3: (60, 130)}[ndim]
    shape = (draw(st.integers(*first)), *(draw(st.integers(3, 9)) for _ in range(ndim - 1)))
    # "wrap" is left to `roll`: NumPy's pad takes as long as all else here.
    edges = tuple(draw(st.sampled_from(["fixed", "roll", "edge", "reflect", "constant", "symmetric"])) for _ in shape)
    return Program(
        shape,
        draw(st.sampled_from(["f8", "f4", "i4"])),
        edges,
        draw(st.sampled_from([1, 1, 1, 2])) if min(shape) > 4 else 1,
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def check(program: Program, small_grids: Callable[..., Any], scheduler: str, thin: int, tile: int, seed: int) -> int:
    """Run a program in blocks, one step after the other, and with NumPy; return how many steps blocks did."""
    state, constants = program.state(seed), program.constants()
    scalars = {name: (lambda k, name=name: program.scalars(k)[name]) for name in program.scalars(0)}
    stored = {name: sa.array(x) for name, x in constants.items()}

    def step(*arrays: Any, **more: Any) -> Any:
        return program(*arrays, **stored, **more)

    found = []
    for is_off in (False, True):
        with small_blocks(small_grids, is_off=is_off, tile=tile, thin=thin) as blocks:
            found.append((run(step, *state, scheduler=scheduler, scalars=scalars), blocks.steps))
    (result, count), (expected, none) = found
    assert none == 0
    assert_bits(result, expected)
    assert_near(result, loop(lambda *a, **k: program(*a, **constants, **k), *state, steps=STEPS, scalars=program.scalars))
    return count


class Tally:
    """How many of some programs were done in blocks."""

    def __init__(self) -> None:
        self.programs = self.blocked = 0

    def add(self, count: int) -> None:
        self.programs += 1
        self.blocked += count > 0


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_random_stencils_have_the_bits_of_steps_one_after_the_other(small_grids: Callable[..., Any], scheduler: str) -> None:
    tally = Tally()

    @SETTINGS
    @hypothesis.given(
        programs(), st.integers(1, 3), st.sampled_from([1, 8, 30, 70]), st.sampled_from([64, 150, 400]), st.integers(0, 1 << 20)
    )
    def property_(program: Program, workers: int, thin: int, tile: int, seed: int) -> None:
        with sa.Pool(workers=workers, memory_limit="64MiB"):
            tally.add(check(program, small_grids, scheduler, thin, tile, seed))

    property_()
    assert 3 * tally.blocked > tally.programs, vars(tally)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_random_stencils_have_the_same_bits_in_worker_processes(small_grids: Callable[..., Any], workers: int) -> None:
    tally = Tally()

    @SETTINGS
    @hypothesis.given(programs(), st.sampled_from([1, 8, 30, 70]), st.sampled_from([64, 150, 400]), st.integers(0, 1 << 20))
    def property_(program: Program, thin: int, tile: int, seed: int) -> None:
        tally.add(check(program, small_grids, "processes", thin, tile, seed))

    with sa.Pool(workers=workers, memory_limit="64MiB"):
        property_()
    assert 3 * tally.blocked > tally.programs, vars(tally)


# ------------------------------------------------------------------------------------------------- layouts of the code


def heat(u: Any) -> Any:
    v = u.copy()
    v[1:-1] = u[1:-1] + 0.25 * (u[2:] - 2 * u[1:-1] + u[:-2])
    return v


def wave(u: Any, before: Any) -> Any:
    v = 2 * u - before
    v[1:-1] += 0.25 * (u[2:] - 2 * u[1:-1] + u[:-2])
    return v, u


def two_layers(u: Any, v: Any) -> Any:
    """The second field looks at what the first has become."""
    new = heat(u)
    return new, v * 0.5 + 0.25 * (np.roll(new, 1, 0) + np.roll(new, -1, 0))


def damped(u: Any) -> Any:
    return u * 0.5 + 1


def mirrored_end(u: Any) -> Any:
    """Two rows that no loop of the others goes over: one of them runs backwards."""
    return np.concatenate([u[:-2] * 0.5 + 0.25, np.flip(u[-2:], 0) * 0.5 + u[-2:] * 0.25], axis=0)


@pytest.mark.parametrize(
    ("step", "shape", "tile", "thin"),
    [
        (damped, (60, 20), 20, 60),  # of one row each, of three
        (mirrored_end, (177, 8), 128, 24),  # of 16 rows each, so that the last is alone in one; of three, and it is not
        (mirrored_end, (177, 8), 128, 8),
        (heat, (60, 20), 20, 60),
    ],
)
def test_code_without_a_loop_along_the_tiles_is_not_given_wider_ones(
    small_grids: Callable[..., Any], step: Callable[..., Any], shape: tuple[int, ...], tile: int, thin: int
) -> None:
    x = values(shape)
    with sa.Pool(workers=2, memory_limit="64MiB"), small_blocks(small_grids, tile=tile, thin=thin):
        assert_near(run(step, x, scheduler="threads"), loop(step, x, steps=STEPS))


def test_results_that_are_written_past_the_caches_go_step_after_step(
    small_grids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such stores are of whole lines of cache: tiles of 8 rows of 72 bytes begin with one, each row by itself does not."""
    monkeypatch.setattr(engine, "STREAMED_NBYTES", 1)
    x = values((200, 9))
    with sa.Pool(workers=2, memory_limit="64MiB"), small_blocks(small_grids, tile=72, thin=9) as blocks:
        assert_near(run(damped, x, scheduler="processes"), loop(damped, x, steps=STEPS))  # else it dies
    assert not blocks.steps


def test_arrays_that_workers_have_to_copy_are_not_copied_in_thin_tiles(
    small_grids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of the system for each took four times as long as steps one after the other do: copies in the arena stand for them.

    But not where a copy is many times what is copied.
    """
    x, source, row = values((200, 9)), 0.01 * values((200, 9), 1), 0.01 * values((9,), 2)

    def count(scheduler: str, source: np.ndarray = source) -> int:
        def step(u: Any) -> Any:
            return heat(u) + source

        with sa.Pool(workers=2, memory_limit="64MiB"), small_blocks(small_grids) as blocks:
            assert_near(run(step, x, scheduler=scheduler), loop(step, x, steps=STEPS))
        return blocks.steps

    assert count("processes") > STEPS // 2
    assert count("threads") == STEPS - 1  # they lie in this process
    assert not count("processes", np.broadcast_to(row, x.shape))
    monkeypatch.setenv("SHMARRAY_NO_PROCESS_VM", "1")
    assert count("processes", np.broadcast_to(row, x.shape)) > STEPS // 2


# -------------------------------------------------------------------------------------------- what happens beside steps


STATES: dict[str, tuple[Callable[..., Any], tuple[np.ndarray[Any, Any], ...]]] = {
    "heat": (heat, (values((200, 9)),)),
    "leapfrog": (wave, (values((200, 9)), values((200, 9), 1))),
    "two layers": (two_layers, (values((200, 9)), values((200, 9), 1))),
    "turn": (lambda a, b, c: (b, c, 0.5 * np.roll(a, 1, 0) + 0.5 * np.roll(b, -1, 0)), tuple(values((200, 9), k) for k in range(3))),
    "one thing twice": (lambda a, b: (0.5 * np.roll(a, 1, 0) + 0.5 * b,) * 2, (values((200, 9)), values((200, 9), 1))),
    "swapped": (
        lambda a, b: (0.5 * np.roll(b, 1, 0) + 0.25 * b, np.roll(a, -1, 0) * 0.75 + 0.125 * a),
        (values((200, 9)), values((200, 9), 1)),
    ),
}


@pytest.fixture(scope="module")
def workers() -> Iterator[sa.Pool]:
    with sa.Pool(workers=2, memory_limit="64MiB") as pool:
        yield pool


@pytest.mark.parametrize("scheduler", ["processes", "threads"])
@pytest.mark.parametrize("name", STATES)
def test_fields_that_change_places_stay_apart(small_grids: Callable[..., Any], workers: sa.Pool, name: str, scheduler: str) -> None:
    step, state = STATES[name]
    for steps in (2, 3, 16, 17, 33, 70):
        with small_blocks(small_grids, is_off=True):
            expected = run(step, *state, steps=steps, scheduler=scheduler)
        with small_blocks(small_grids) as blocks:
            assert_bits(run(step, *state, steps=steps, scheduler=scheduler), expected)
            assert blocks.steps or steps < 3 or name == "one thing twice"  # both fields are in one place: one after the other
            u = tuple(map(sa.array, state))
            sa.iterate(step, *u, steps=steps, scheduler=scheduler, out=u)
            assert_bits([np.array(x) for x in u], expected)
        assert_near(expected, loop(step, *state, steps=steps))


def test_a_field_given_twice_and_a_constant_that_is_the_state(small_grids: Callable[..., Any], workers: sa.Pool) -> None:
    x = values((200, 9))
    with small_blocks(small_grids) as blocks:
        u = sa.array(x)
        found = sa.iterate(wave, u, u, steps=STEPS, scheduler="processes")
        assert_near([np.array(one) for one in found], loop(wave, x, x, steps=STEPS))
        found = sa.iterate(lambda v: heat(v) + 0.01 * u, u, steps=STEPS, scheduler="processes")
        assert_near([np.array(found)], loop(lambda v: heat(v) + 0.01 * x, x, steps=STEPS))
        np.testing.assert_array_equal(u, x)
    assert blocks.steps


@pytest.mark.parametrize("every", [1, 7, 20, 32])
def test_callbacks_and_until_see_the_states_of_their_steps(small_grids: Callable[..., Any], workers: sa.Pool, every: int) -> None:
    x = values((200, 9))

    def frames(*, is_off: bool) -> tuple[list[Any], int]:
        seen: list[Any] = []

        def look(frame: sa.Frame) -> None:
            seen.append((frame.step, np.array(frame.state[0]).tobytes(), float(frame.values["sum"]), frame.values["row"].tobytes()))

        with small_blocks(small_grids, is_off=is_off) as blocks:
            found = sa.iterate(
                heat,
                x,
                steps=90,
                every=every,
                callback=look,
                observe={"sum": lambda u: u.sum(), "row": lambda new, old: new[3] - old[3]},
                until=lambda new, old: abs(new - old).max() < 3e-3,
                scheduler="processes",
                start=5,
            )
            return [*seen, np.array(found).tobytes()], blocks.steps

    expected, none = frames(is_off=True)
    found, count = frames(is_off=False)
    assert found == expected
    assert none == 0 and (count > 0) == (every > 2)
    assert expected[0][0] == 5 + every and len(expected) > 2 and (len(expected) - 1) * every < 90


def test_scalars_and_steps_are_numbered_from_start_and_runs_may_be_parted(small_grids: Callable[..., Any], workers: sa.Pool) -> None:
    x = values((200, 9))
    more: dict[str, Any] = {"scalars": {"dt": lambda k: 0.01 * k, "a": [0.5 + k / 1000 for k in range(100)]}, "scheduler": "processes"}

    def step(u: Any, dt: Any, a: Any) -> Any:
        return heat(u) * a + dt

    expected = x
    for k in range(20, 90):
        expected = step(expected, 0.01 * k, 0.5 + k / 1000)
    with small_blocks(small_grids) as blocks:
        whole = run(step, x, steps=70, start=20, **more)
        middle = run(step, x, steps=33, start=20, **more)
        assert_bits(run(step, *middle, steps=37, start=53, **more), whole)
    assert_near(whole, [expected])
    assert blocks.steps


def test_random_numbers_and_positions_in_a_step_are_those_of_the_step(small_grids: Callable[..., Any], workers: sa.Pool) -> None:
    def step(u: Any) -> Any:
        return heat(u) + 0.1 * sa.random.default_rng(3).standard_normal(u.shape) + 0.01 * sa.arange(9.0)

    with small_blocks(small_grids, is_off=True):
        expected = run(step, values((200, 9)), scheduler="processes")
    with small_blocks(small_grids):
        assert_bits(run(step, values((200, 9)), scheduler="processes"), expected)


# --------------------------------------------------------------------------------------------------- warnings and errors


def divided(u: Any) -> Any:
    return 1.0 / (u - 1.0) + 0.0 * np.roll(u, 1, 0)


@pytest.mark.parametrize("scheduler", ["processes", "threads"])
def test_a_warning_of_many_steps_is_told_once_with_the_line_of_the_step(
    small_grids: Callable[..., Any], workers: sa.Pool, scheduler: str
) -> None:
    x = values((200, 9))
    x[150:153] = 1.0
    told: list[list[tuple[str, str, int]]] = []
    for is_off in (True, False):
        with small_blocks(small_grids, is_off=is_off) as blocks, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            u = sa.array(x)
            sa.iterate(divided, u, steps=33, scheduler=scheduler, callback=lambda frame: None, every=33)
        told.append(sorted({(str(w.message), w.filename, w.lineno) for w in caught}))
        batches = 2  # one step, to see how long it takes, and the rest
        assert len(caught) <= batches * len(told[-1])
    assert blocks.steps
    assert told[0] == told[1]
    assert {message.split(" encountered")[0] for message, _, _ in told[1]} == {"divide by zero", "invalid value"}
    assert {(name, line) for _, name, line in told[1]} == {(__file__, divided.__code__.co_firstlineno + 1)}


@pytest.mark.parametrize("scheduler", ["processes", "threads", "synchronous"])
def test_an_error_in_a_block_names_its_line_and_leaves_an_array_that_says_so(
    small_grids: Callable[..., Any], workers: sa.Pool, scheduler: str
) -> None:
    x = values((200, 9)) * 0
    x[150, 3] = 1e300

    def grows(u: Any) -> Any:
        calm = u * 0.5
        with np.errstate(over="raise"):
            return calm + u * 1.5

    with small_blocks(small_grids) as blocks:
        u = sa.array(x)
        with pytest.raises(FloatingPointError, match="overflow") as caught:
            sa.iterate(grows, u, steps=200, scheduler=scheduler, out=u)
        notes = "\n".join(caught.value.__notes__)
        assert "steps" in notes and "of iterate() at" in notes and "test_blocked_steps.py" in notes
        with pytest.raises(sa.TornChunkError, match="FloatingPointError"):
            np.asarray(u)
        u[...] = x
        with np.errstate(over="ignore"):
            assert np.isfinite(np.array(sa.iterate(lambda u: u * 2, u, steps=3, scheduler=scheduler))).all()
    assert blocks.steps


def test_a_published_state_is_that_of_one_step(small_grids: Callable[..., Any], workers: sa.Pool) -> None:
    x = np.zeros((200, 9))
    x[100] = 1.0
    expected = list(states(heat, x, 130))
    seen: list[int] = []

    def number_of(found: Any) -> int:
        """Return the step that what was found is the state of."""
        (number,) = (k for k, state in enumerate(expected) if np.allclose(found, state, rtol=0, atol=1e-12))
        return number

    with small_blocks(small_grids) as blocks, sa.shared.Store() as store:

        def look(frame: sa.Frame) -> None:
            seen.append(number_of(store["u"][...]))
            assert seen[-1] <= frame.step

        sa.iterate(heat, x, steps=130, scheduler="processes", publish=store, callback=look, every=33)
        assert number_of(store["u"][...]) == 130
    assert blocks.steps and seen == sorted(seen) and len(set(seen)) > 1


def states(step: Callable[[Any], Any], x: Any, steps: int) -> Iterator[np.ndarray[Any, Any]]:
    yield x
    for _ in range(steps):
        x = step(x)
        yield x
