"""Workers that die, stop or fail in the middle of steps done block by block: the bits of an undisturbed run, or the error that says why.

A sweep is one task of many steps, whose cursor says how far it is; ``part`` is passed before each tile of each step. Without faults armed
tiles that lie side by side are one call, so that only signals at random moments come in the middle of one.
Never put here: what steps compute (`tests/shmarray/test_blocked_steps.py`), other points (`test_points.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import SOAK_MINUTES, Script
from test_iterate_kill import Killer

import shmarray as sa
from scheduler.blocking import blocked

pytest.importorskip("llvmlite", reason="the compiled engine needs llvmlite (extra jit)")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 if SOAK_MINUTES else 120)]

PROGRAM = """
import contextlib, traceback
from scheduler.blocking import blocked
from shmarray import plan, tiles
loops = sys.modules["shmarray.iterate"]
tiles.TILE_ITEMS, plan.THIN_ITEMS, loops.SMALL_NBYTES = 64, 8, -1
sa.config.set(engine="llvm", scheduler="processes")
STEPS = 37  # one, to see how long it takes; the others at once
values = [np.random.default_rng(k).random((160, 8)) for k in range(2)]
done_in_blocks = 0

def wave(u, before):
    "Periodic along the blocks: there are sweeps of all three kinds; three buffers in turn."
    return 1.9 * u - 0.95 * before + 0.1 * (np.roll(u, 1, 0) + np.roll(u, -1, 0) - 2 * u), u

def two_layers(u, v):
    "The second field looks at what the first has become."
    new = u.copy()
    new[1:-1] = u[1:-1] + 0.25 * (u[2:] - 2 * u[1:-1] + u[:-2])
    return new, v * 0.5 + 0.25 * (np.roll(new, 1, 0) + np.roll(new, -1, 0))

def counting(steps, workers):
    global done_in_blocks
    found, done = blocked(steps, workers)
    done_in_blocks += done
    return found, done

def bits(arrays):
    return tuple(np.asarray(x).tobytes() for x in arrays)

def run(step, u):
    "Run the steps; u is the state then, or says that it is torn."
    global done_in_blocks
    done_in_blocks = 0
    for x, given in zip(u, values):
        x[...] = given
    sa.iterate(step, *u, steps=STEPS, out=u)
    assert done_in_blocks >= 32, done_in_blocks
    return bits(u)

def arm(text, count):
    os.environ["SHMARRAY_FAULT"], os.environ["SHMARRAY_FAULT_COUNT"] = text, count

def case(step, nth, action):
    "Run the steps with one fault; print what came of it; return whether the point was passed often enough to act."
    count = os.path.abspath(f"count-{step.__name__}-{nth}-{action}")
    with sa.Pool(workers=2, memory_limit="64MiB") as pool:
        arm(f"worker.part:{nth}:{action}", count)  # for workers: they are started for the first steps
        u = tuple(map(sa.array, values))
        try:
            result = "right" if run(step, u) == right[step] else "WRONG"
        except faults.InjectedFault as error:
            result = "InjectedFault"
            assert any("of iterate() at" in note for note in error.__notes__), error.__notes__
            for k, x in enumerate(u):
                with contextlib.suppress(sa.TornChunkError):
                    assert np.asarray(x).tobytes() in known[step][k], "the values of no step"
        os.environ.pop("SHMARRAY_FAULT")
        acted = os.path.getsize(count) >= nth
        with open(count, "ab") as file:
            file.write(b"." * nth)  # workers stay armed: nobody may be the Nth from here on
        if run(step, u) != right[step]:
            result = "WRONG AFTER " + result
        pool.check()
        del u
    print("case", step.__name__, nth, action, result, acted, pool.statistics().starts - 2, flush=True)
    return acted

right, known = {}, {}
with sa.Pool(workers=2, memory_limit="64MiB") as pool:
    for step in (wave, two_layers):
        u = tuple(map(sa.array, values))
        loops.blocked = lambda steps, workers: ([], 0)
        known[step] = [set(), set()]
        def look(frame):
            for found, x in zip(known[step], frame.state):
                found.add(np.asarray(x).tobytes())
        for found, x in zip(known[step], values):
            found.add(x.tobytes())
        sa.iterate(step, *u, steps=STEPS, callback=look)
        right[step] = bits(sa.iterate(step, *u, steps=STEPS))
        loops.blocked = counting
        assert run(step, u) == right[step]  # nobody disturbs it
        del u
del pool
"""

CASES = """
for step, action, factor in {cases}:
    nth = 1
    while case(globals()[step], nth, action):
        nth = max(nth + 1, int(nth * factor))
        assert nth < 50_000, "it is passed again and again"
check_nothing_left()
"""


ORDINARY = {"kill": ("wave", "two_layers"), "raise": ("wave",), "stop": ("two_layers",)}


@pytest.mark.parametrize("action", ORDINARY)
def test_a_fault_in_a_block_ends_in_the_right_bits_or_the_error(start: Callable[..., Script], action: str) -> None:
    steps, factor = (("wave", "two_layers"), 1.03) if SOAK_MINUTES else (ORDINARY[action], 120)
    cases = [(step, action, factor) for step in steps]
    out = start(PROGRAM + CASES.format(cases=cases), limit_s=1500 if SOAK_MINUTES else 90).end(continue_stopped=True)
    assert out.returncode == 0, out.stdout + out.stderr
    found = re.findall(r"^case (\w+) (\d+) (\w+) (.*) (True|False) (\d+)$", out.stdout, re.MULTILINE)
    expected = {"kill": "right", "raise": "InjectedFault", "stop": "right"}[action]
    acted = [row for row in found if row[4] == "True"]
    assert {row[0] for row in acted} == {*steps}
    assert {row[3] for row in acted} == {expected}, out.stdout + out.stderr
    assert {row[3] for row in found if row[4] == "False"} == {"right"}  # the one that was to come after the last
    assert {row[5] for row in acted} == {"1" if action == "kill" else "0"}, found


# ------------------------------------------------------------------------------------------------- at random moments


def wave(u: Any, before: Any) -> Any:
    return 1.9 * u - 0.95 * before + 0.1 * (np.roll(u, 1, 0) + np.roll(u, -1, 0) - 2 * u), u


def gray_scott(u: Any, v: Any) -> Any:
    reaction = u * v * v
    spread_u, spread_v = (np.roll(x, 1, 0) + np.roll(x, -1, 0) + np.roll(x, 1, 1) + np.roll(x, -1, 1) - 4 * x for x in (u, v))
    return u + 0.16 * spread_u - reaction + 0.035 * (1 - u), v + 0.08 * spread_v + reaction - 0.1 * v


@pytest.mark.parametrize("step", [wave, gray_scott] if SOAK_MINUTES else [gray_scott])
def test_workers_killed_while_blocks_are_done_change_no_bit(
    small_grids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, step: Callable[..., Any]
) -> None:
    loops: Any = sys.modules["shmarray.iterate"]
    counts = []

    def counting(steps: Any, workers: int) -> Any:
        found, done = blocked(steps, workers)
        counts.append(done)
        return found, done

    state = [np.random.default_rng(k).random((3000, 40)) for k in range(2)]
    steps = 33 * 12
    with small_grids(TILE_ITEMS=6000, BLOCK_ITEMS=1 << 16, THIN_ITEMS=200), sa.config.set(engine="llvm", scheduler="processes"):
        monkeypatch.setattr(loops, "SMALL_NBYTES", -1)
        with sa.Pool(workers=2, memory_limit="64MiB") as pool:
            monkeypatch.setattr(loops, "blocked", lambda steps, workers: ([], 0))
            expected = [np.array(x) for x in sa.iterate(step, *state, steps=steps)]
            monkeypatch.setattr(loops, "blocked", counting)
            u = tuple(map(sa.array, state))
            killer = Killer(pool, 1)
            sa.iterate(step, *u, steps=steps, out=u, every=33, callback=killer)
            for timer in killer.timers:
                timer.join()
            for one, other in zip(u, expected, strict=True):
                np.testing.assert_array_equal(one, other)
            print(f"{step.__name__}: {killer.kills} kills in {steps} steps")
            assert killer.kills >= 3 and sum(counts) >= 33
            pool.check()
