"""Workers killed again and again while a simulation runs, and Ctrl-C at random moments of one: the same bits, or an array that says so.

Never put here: what simulations compute (`tests/shmarray/test_iterate.py`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Outcome

import shmarray as sa

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def heat(u: Any) -> Any:
    v = u.copy()
    v[1:-1, 1:-1] += 0.2 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1])
    return v


def wave(u: Any, before: Any) -> Any:
    return 2 * u - before + 0.1 * (np.roll(u, 1, 0) + np.roll(u, -1, 0) - 2 * u) - 1e-3 * u.mean(), u


def noisy(u: Any) -> Any:
    return heat(u) + 0.1 * sa.random.default_rng(3).standard_normal(u.shape)


class Killer:
    """Kills a worker of a pool some instant after each frame, if it has been there for two: a new one has joined by then."""

    def __init__(self, pool: sa.Pool, seed: int) -> None:
        self.pool, self.rng = pool, random.Random(seed)
        self.seen: dict[int, int] = {}  # pid -> frames
        self.timers: list[threading.Timer] = []
        self.kills = 0

    def __call__(self, frame: sa.Frame) -> None:
        pids = self.pool.statistics().pids
        self.seen = {pid: self.seen.get(pid, 0) + 1 for pid in pids}
        old = [pid for pid, frames in self.seen.items() if frames > 2]
        if old:
            victim = self.rng.choice(old)
            del self.seen[victim]
            self.timers.append(threading.Timer(self.rng.random() * 0.02, self.kill, (victim,)))
            self.timers[-1].start()

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills += 1


@pytest.mark.parametrize(("step", "nfields"), [(heat, 1), (wave, 2), (noisy, 1)])
def test_killed_workers_change_no_bit(small_grids: Callable[..., Any], step: Callable[..., Any], nfields: int) -> None:
    state = [np.random.default_rng(k).random((60, 50)) for k in range(nfields)]
    steps = 500
    with small_grids(TILE_ITEMS=300, REDUCTION_TILE_ITEMS=300, BLOCK_ITEMS=1 << 16):  # which workers go by, too
        with sa.Pool(workers=0):
            found = sa.iterate(step, *state, steps=steps)
            expected = [np.array(x) for x in (found if nfields > 1 else (found,))]
        with sa.Pool(workers=2, memory_limit="64MiB") as pool:
            u = tuple(map(sa.array, state))
            killer = Killer(pool, nfields)
            sa.iterate(step, *u, steps=steps, scheduler="processes", out=u, every=40, callback=killer)
            for timer in killer.timers:
                timer.join()
            for one, other in zip(u, expected, strict=True):
                np.testing.assert_array_equal(one, other)
            print(f"{step.__name__}: {killer.kills} kills in {steps} steps")
            assert killer.kills >= 3


def test_a_step_that_hangs_is_ended_by_the_task_timeout() -> None:
    def hangs(block: Any) -> Any:
        if block[0] == 3:
            threading.Event().wait(600)
        return block + 1

    with sa.Pool(workers=2, memory_limit="64MiB"), sa.config.set(task_timeout=0.3):
        u = sa.array(np.zeros(4), chunks=2)
        with pytest.raises(sa.WorkerDied, match=r"hangs.*task_timeout of 0\.3 s") as caught:
            sa.iterate(lambda u: u.map_blocks(hangs, dtype=float), u, steps=6, scheduler="processes")
        assert any("of iterate() at" in note for note in caught.value.__notes__)
        assert np.asarray(sa.iterate(lambda u: u + 1, u, steps=6)).tolist() == [6.0] * 4


CTRL_C = """
import random
rng = random.Random({seed})

def heat(u):
    v = u.copy()
    v[1:-1] += 0.25 * (u[2:] - 2 * u[1:-1] + u[:-2])
    return v

def press(delay_s, ended):
    if not ended.wait(delay_s):
        os.kill(os.getpid(), signal.SIGINT)

hits = 0
x = np.random.default_rng(0).random(600_000)
with sa.Pool(workers=2, memory_limit="256MiB") as pool:
    u = sa.array(x)
    sa.iterate(heat, x, steps=5, scheduler={scheduler!r})
    began = time.monotonic()
    sa.iterate(heat, x, steps=40, scheduler={scheduler!r})
    usual = time.monotonic() - began
    number = 0
    while number < 6 or hits < 3:
        number += 1
        u[...] = x
        ended = threading.Event()
        presser = threading.Thread(target=press, args=(rng.random() * usual, ended))
        try:
            presser.start()
            sa.iterate(heat, u, steps=40, scheduler={scheduler!r}, out=u)
            ended.set()
            presser.join()
        except KeyboardInterrupt:
            hits += 1
            ended.set()
            presser.join()
        try:
            values = np.asarray(u)
        except sa.TornChunkError as error:
            assert "iterate() at" in str(error), error
        else:
            y = x.copy()
            for _ in range(41):
                if np.array_equal(y, values):
                    break
                z = y.copy()
                z[1:-1] += 0.25 * (y[2:] - 2 * y[1:-1] + y[:-2])
                y = z
            else:
                raise AssertionError("the values of no step")
            del values
        u[...] = 1.0  # waits for tasks that were left behind
        assert float(u.min()) == float(u.max()) == 1.0
    wait_until(lambda: pool._reserved_nbytes() == 0, "the end of what was interrupted")
    pool.check()
    del u
del pool
check_nothing_left()
print("done")
"""


@pytest.mark.parametrize("scheduler", ["processes", "threads", "synchronous"])
def test_ctrl_c_at_random_moments_of_a_simulation(script: Callable[..., Outcome], scheduler: str) -> None:
    out = script(CTRL_C.format(seed=len(scheduler), scheduler=scheduler))
    assert out.lines[-1] == "done"
