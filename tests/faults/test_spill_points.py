"""The disk of what is spilled, at its worst: at each place where a worker writes to it or reads from it the worker dies, is held up, or
meets an error. A right result, or the error that says why; then the work can be done again, or the rest of it.

A few passages of each point are run always, all with ``make soak``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import SOAK_MINUTES, Script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 if SOAK_MINUTES else 120)]

# What is stored, updated in place (elementwise; from other places of itself), and made anew, of four times the memory.
PROGRAM = """
import json
values = np.random.default_rng(3).random((512, 1024))
expected = values + 1
expected[1:] = expected[:-1].copy() * 2
sa.config.set(scheduler="processes")

def arm(text):
    os.environ["SHMARRAY_FAULT"], os.environ["SHMARRAY_FAULT_COUNT"] = text, os.path.abspath("count-" + text.replace(":", "-"))
    faults.arm(faults.read_environment())

def disarm():
    os.environ.pop("SHMARRAY_FAULT", None)
    faults.arm(None)

def passages():
    path = os.environ["SHMARRAY_FAULT_COUNT"]
    return os.path.getsize(path) if os.path.exists(path) else 0

def content(x):
    out = np.empty(x.shape)
    x.compute(out=out)
    return out

def again(act, redo):
    "Do something; where a disk that fails ends it, say so, and do the rest, or all of it once more: workers stay armed, but it is over."
    try:
        act()
    except sa.PartialUpdateError as error:
        told.append(type(error.__cause__).__name__)
        error.resume()
    except sa.SpillError as error:
        told.append(type(error).__name__)
        assert error.path and "spill file in" in str(error), error
        redo()

def program(pool):
    stored = []
    store = lambda: stored.append(sa.array(values, chunks=(128, 1024)))
    again(store, store)
    x = stored.pop()
    assert pool.statistics().spilled_nbytes == x.nbytes
    def add():
        x.__iadd__(1)
    def shift():
        x[1:] = x[:-1] * 2
    again(add, add)
    again(shift, shift)
    again(lambda: stored.append((x * 3).persist()), lambda: stored.append((x * 3).persist()))
    found = []
    again(lambda: found.append(content(x)), lambda: found.append(content(x)))
    again(lambda: found.append(content(stored[0])), lambda: found.append(content(stored[0])))
    return np.array_equal(found[0], expected) and np.array_equal(found[1], expected * 3)
"""

CASES = """
for point, action, numbers in json.loads(os.environ["CASES"]):
    for nth in numbers or range(1, 1000):
        told = []
        with sa.Pool(workers=2, memory_limit="1MiB", spill_directory=os.getcwd()) as pool:
            arm(f"{point}:{nth}:{action}")
            is_right = program(pool)
            acted, starts = passages() >= nth, pool.statistics().starts
            disarm()
            pool.check()
        if not acted and not numbers:
            break
        print(point, action, nth, is_right, acted, starts - 2, ",".join(told), flush=True)
del pool
check_nothing_left()
"""


def test_a_fault_at_the_disk_costs_a_worker_or_is_told_and_nothing_is_lost(start: Callable[..., Script]) -> None:
    points = [(f"worker.{name}", action) for name in ("spill", "unspill") for action in ("kill", "stop", "raise")]
    points.append(("worker.spill", "enospc"))
    cases = [(point, action, [] if SOAK_MINUTES else [2 + 3 * number]) for number, (point, action) in enumerate(points)]
    running = start(PROGRAM + CASES, CASES=json.dumps(cases), limit_s=1500 if SOAK_MINUTES else 100)
    outcome = running.end(continue_stopped=True)
    assert (outcome.returncode, outcome.stderr) == (0, ""), outcome.stdout + outcome.stderr
    assert {tuple(line.split()[:2]) for line in outcome.lines} == {case[:2] for case in cases}
    for line in outcome.lines:
        _point, action, _nth, is_right, acted, deaths, *told = line.split(" ")
        assert (is_right, acted, deaths) == ("True", "True", "1" if action == "kill" else "0"), outcome.stdout
        assert told == (["SpillError"] if action in ("raise", "enospc") else [""]), outcome.stdout


def test_a_write_that_hangs_can_be_interrupted_and_the_update_finished(script: Callable[..., Any]) -> None:
    outcome = script(
        PROGRAM
        + """
interrupted = []

def interrupt(pool):
    wait_until(lambda: any(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pool.statistics().pids), "a write that hangs")
    interrupted.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

with sa.Pool(workers=2, memory_limit="1MiB", spill_directory=os.getcwd()) as pool:
    arm("worker.spill:7:stop")  # after the four chunks that are stored
    x = sa.array(values, chunks=(128, 1024))
    threading.Thread(target=interrupt, args=(pool,)).start()
    try:
        x += 1
    except sa.PartialUpdateError as error:
        print(isinstance(error, KeyboardInterrupt), time.monotonic() - interrupted[0] < 5)
        error.resume()
    print(np.array_equal(content(x), values + 1))
    pool.check()
"""
    )
    assert outcome.lines == ["True True", "True"]
