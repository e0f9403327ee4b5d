"""Random programs under SIGKILL: the same bits as undisturbed, with 1, 2 and 4 workers, and the values NumPy gives.

A program is a function of its seed: expressions, reductions, scans, random numbers, functions of the user's, and updates in place of
every kind of view. ``make soak MINUTES=60`` runs as many as fit, from a seed that it prints; ``SHMARRAY_SOAK_SEED`` repeats one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
from conftest import SOAK_MINUTES

import shmarray as sa

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker would find another conftest
CHAOS_S = 60 * SOAK_MINUTES or 30.0
LEAST_PROGRAMS, LEAST_KILLS = 3, 8  # also where the machine has other things to do
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * CHAOS_S + 240)]

DTYPES = ("f8", "f4", "i8", "i2", "c16")
TOLERANCE = {"f8": 1e-9, "f4": 1e-3, "i8": 0.0, "i2": 0.0, "c16": 1e-9}  # of what sums over an axis add up in another order
WORKERS = (1, 2, 4)

VIEWS: dict[str, Callable[[Any], Any]] = {
    "all": lambda x: x,
    "rows": lambda x: x[5:-7],
    "columns": lambda x: x[:, 3:-5],
    "steps": lambda x: x[1::2, ::3],
    "flipped": lambda x: x[::-1, ::-1],
    "transposed": lambda x: x.T,
    "row": lambda x: x[33],
    "corner": lambda x: x[-300:, :200],
}


def halved(block: Any) -> Any:
    return block // 2 if block.dtype.kind == "i" else block * block.dtype.type(0.5)


class Program:
    """Steps drawn from a seed; `run` carries them out with NumPy or with shmarray, and returns what was computed on the way."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(seed)
        self.dtype = rng.choice(DTYPES)
        self.shape = rng.choice([(700, 601), (90, 5000), (4001, 131)])
        self.chunks = rng.choice([None, (97, 211), (1000, 1000)])
        self.steps = [self._step(rng) for _ in range(rng.randint(4, 8))]

    def _step(self, rng: random.Random) -> tuple[Any, ...]:
        kind = rng.choice(["update", "update", "shifted", "assign", "expression", "reduction", "scan", "blocks", "random"])
        view = rng.choice(sorted(VIEWS))
        return kind, view, rng.randrange(3), rng.randrange(3), rng.choice([0, 1, None]), rng.randrange(1000)

    def start(self) -> list[Any]:
        rng = np.random.default_rng(self.seed)
        values = [rng.random(self.shape) * 100 - 50 for _ in range(3)]
        if self.dtype == "c16":
            return [v + 1j * v[::-1] for v in values]
        return [v.astype(self.dtype) for v in values]

    def run(self, xp: Any) -> list[Any]:
        arrays = self.start()
        if xp is sa:
            arrays = [sa.array(a, chunks=self.chunks) for a in arrays]
        kept: list[Any] = []
        for step in self.steps:
            self._do(xp, arrays, kept, *step)
            kept[-1:] = map(np.asarray, kept[-1:])  # now: what it was built on is written next
        return [*kept, *map(np.asarray, arrays)]

    def _do(self, xp: Any, arrays: list[Any], kept: list[Any], kind: str, view: str, i: int, j: int, axis: Any, number: int) -> None:
        x, y = arrays[i], arrays[j]
        look = VIEWS[view]
        half = np.dtype(self.dtype).type(3 if self.dtype[0] == "i" else 0.5)
        if kind == "update":
            target = look(x)
            target += look(y) * half if number % 3 else look(y)[..., :1]  # all of it, or broadcast
        elif kind == "shifted":  # reads elsewhere in what it writes
            target = x[1:]
            target -= x[:-1] * half
        elif kind == "assign":
            look(x)[...] = look(x) * half + look(y) if number % 2 else number % 7
        elif kind == "expression":
            kept.append(look(x) * half - look(y) + (look(x) - look(y)) * half)
        elif kind == "reduction":
            how = ("sum", "max", "min", "mean", "std")[number % (3 if self.dtype == "c16" else 5)]
            kept.append(getattr(xp, "sum" if self.dtype == "c16" else how)(look(x) + y.dtype.type(1), axis=None if view == "row" else axis))
        elif kind == "scan":
            kept.append(xp.cumsum(look(x), axis=0))
        elif kind == "blocks":
            kept.append(look(x).map_blocks(halved, dtype=x.dtype) if xp is sa else halved(look(x)))
        elif kind == "random" and xp is sa:  # NumPy's are others: the bits alone are compared
            kept.append((sa.random.default_rng(number).normal(size=self.shape) + 1).sum(axis=axis))
        elif kind == "random":
            kept.append(np.float64(np.nan))


def same_bits(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True)
    )


def check_against_numpy(program: Program, found: list[Any]) -> None:
    """Compare values; integers exactly, sums of floats as closely as another order of adding allows."""
    with np.errstate(all="ignore"):
        expected = program.run(np)
    for one, other in zip(found, expected, strict=True):
        if other.shape == () and np.isnan(other):
            continue
        assert one.shape == other.shape and one.dtype == other.dtype, program.seed
        rtol = TOLERANCE[program.dtype] or (1e-13 if other.dtype.kind in "fc" else 0)  # means of integers
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * float(np.abs(other).max()), err_msg=f"seed {program.seed}")


class Killer:
    """Kills a random worker at random times while something runs inside ``with``."""

    def __init__(self, pool: sa.Pool, seed: int) -> None:
        self.pool = pool
        self.rng = random.Random(seed)
        self.kills = 0

    def __enter__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._kill)
        self._thread.start()

    def _kill(self) -> None:
        struck = -1  # the plan that saw the last one
        while not self._ended.wait(self.rng.choice([0.001, 0.01, 0.05]) * self.rng.random()):
            # One for each plan, and one more where it has just ended: the third death of one task would be that task's own
            # fault, as far as anyone can tell. Likewise three in a row of workers that only start.
            plan = self.pool.statistics().plans
            pids = [m.process.pid for m in list(self.pool.worker_pool()._loop.members.values()) if m.has_joined]
            if pids and plan != struck:
                struck = plan
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(pids), signal.SIGKILL)
                    self.kills += 1

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, sa.Pool]]:
    made = {count: sa.Pool(workers=count, memory_limit="512MiB") for count in WORKERS}
    yield made
    for pool in made.values():
        pool.check()
        pool.close()


def run_in(pool: sa.Pool, program: Program, engine: str) -> list[Any]:
    # An array of a pool is worked on by the pool of the context, so that is the same one.
    with sa.config.set(scheduler="processes", engine=engine), entered(pool):
        return program.run(sa)


@contextlib.contextmanager
def entered(pool: sa.Pool) -> Iterator[None]:
    """Make it the pool of the context, as ``with pool`` does, but do not close it."""
    from scheduler import run  # the context's own stack: there is no public way that leaves the pool open

    token = run._entered.set((*run._entered.get(), pool))
    try:
        yield
    finally:
        run._entered.reset(token)


def test_random_programs_give_the_same_bits_whatever_dies(pools: dict[int, sa.Pool]) -> None:
    engines = ["numpy"]
    with contextlib.suppress(ImportError):
        import llvmlite  # noqa: F401  # asked for, not used

        engines.append("llvm")
    first = int(os.environ.get("SHMARRAY_SOAK_SEED", random.SystemRandom().randrange(1 << 30) if SOAK_MINUTES else 1))
    print(f"first seed {first}", flush=True)
    until = time.monotonic() + CHAOS_S
    programs = kills = 0
    seed = first
    while time.monotonic() < until or programs < LEAST_PROGRAMS or kills < LEAST_KILLS:
        program = Program(seed)
        engine = engines[seed % len(engines)]
        try:
            reference = run_in(pools[1], program, engine)
            check_against_numpy(program, reference)
            for count in (2, 4):
                assert same_bits(run_in(pools[count], program, engine), reference), f"{count} workers give other bits"
            for count in (2, 4):
                killer = Killer(pools[count], seed)
                for _ in range(2):
                    with killer:
                        found = run_in(pools[count], program, engine)
                    assert same_bits(found, reference), f"{count} workers, {killer.kills} kills: other bits"
                kills += killer.kills
        except BaseException as error:
            error.add_note(
                f"SHMARRAY_SOAK_SEED={seed}, engine {engine!r}: {program.dtype} {program.shape} {program.chunks} {program.steps}"
            )
            raise
        programs += 1
        seed += 1
    print(f"{programs} programs, {kills} kills, seeds {first} to {seed - 1}")
