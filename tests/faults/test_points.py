"""Every fault point, every action, at the first, second, third passage, until a run passes it no more: a right result or the one
error that says why, never a hang; the pool works on, or the process is gone and nothing of it is left.

The loop is SQLite's: fail at step N until the operation succeeds. A few N of each point are run always, all with ``make soak``.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable

import pytest
from conftest import SOAK_MINUTES, Outcome, Script

import scheduler.faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800 if SOAK_MINUTES else 120)]

WORKER = ("start", "hello", "bind", "bound", "task", "ran", "results", "copy", "half", "copied", "reply", "replied")
DRIVER = ("spawn", "send", "lock", "locked", "allocate", "bury", "repair", "repaired", "buried", "settle", "return")
ELSEWHERE = ("part", "spill", "unspill")  # the first needs the compiled engine: `test_blocked_kill.py`; `test_spill_points.py`
FULL = ("allocate", "spawn")  # where a full disk, or memory, is to be expected
PASSAGES = {
    "worker.start": 2,
    "worker.hello": 2,
    "driver.spawn": 2,
    "driver.allocate": 2,
    "driver.bury": 1,
    "driver.repair": 1,
    "driver.repaired": 1,
    "driver.buried": 1,
}  # fewer
MOST_PASSAGES = 60  # no point of the program is passed more often: beyond, something goes round in circles

# Elementwise with a reduction, a scan, an update in place, a function of the user's; three tiles or more each.
PROGRAM = """
DEATH = ("driver.bury", "driver.repair", "driver.repaired", "driver.buried")  # passed only when somebody dies
import contextlib, hashlib, json, traceback
values = np.random.default_rng(3).random(600_000)

def user(block):
    with contextlib.suppress(FileNotFoundError):
        os.unlink("die")  # once, when asked: somebody has to be buried
        os.kill(os.getpid(), signal.SIGKILL)
    return block * 2 + 1

def program(pool):
    digest = hashlib.sha256()
    with sa.config.set(scheduler="processes"):
        x = sa.array(values, chunks=100_000)
        digest.update((x * 2 + 1).sum().compute().tobytes())
        digest.update(sa.cumsum(x).compute().tobytes())
        try:
            x += 1
        except BaseException as error:
            check_cells(x)
            if isinstance(error, sa.PartialUpdateError):
                disarm()
                go_on(x, error)
            x[...] = 5.0  # what is overwritten as a whole is sound again
            assert float(x.sum()) == 5.0 * len(values)
            raise
        digest.update(np.asarray(x).tobytes())
        digest.update(x.map_blocks(user, dtype=float).compute().tobytes())
    return digest.hexdigest()

def check_cells(x):
    "Each chunk of a failed update is all old, all new, or says that it is torn."
    for start in range(0, len(values), 100_000):
        piece = slice(start, start + 100_000)
        with contextlib.suppress(sa.TornChunkError):
            found = np.asarray(x[piece])
            assert any(np.array_equal(found, values[piece] + k) for k in (0, 1)), "neither old nor new"

def go_on(x, error):
    "Do the rest of an update, unless nobody knows what was done."
    try:
        error.resume()
    except RuntimeError as refused:
        assert "cannot be resumed" in str(refused), refused
    else:
        assert np.array_equal(np.asarray(x), values + 1), "resumed, and wrong"

def passages(count):
    return os.path.getsize(count) if os.path.exists(count) else 0

def arm(text, count):
    os.environ["SHMARRAY_FAULT"], os.environ["SHMARRAY_FAULT_COUNT"] = text, count
    faults.arm(faults.read_environment())

def disarm():
    os.environ.pop("SHMARRAY_FAULT", None)
    faults.arm(None)

def case(text, nth, expected):
    "Run the program with one fault; print what came of it; return whether the point was passed often enough to act."
    count = os.path.abspath("count-" + text.replace(":", "-") + "-" + str(nth))
    name, action = text.split(":")
    if name in DEATH:
        open("die", "w").close()
    print("case", name, nth, action, end=" ", flush=True)
    began = time.monotonic()
    with sa.Pool(workers=2, memory_limit="256MiB") as pool:
        arm(name + ":" + str(nth) + ":" + action, count)
        try:
            result = "right" if program(pool) == right else "WRONG"
        except Exception as error:
            result = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in expected), type(error).__name__)
            if result not in expected:
                traceback.print_exc()
        disarm()
        acted = passages(count) >= nth
        with open(count, "ab") as file:
            file.write(b"." * nth)  # workers stay armed: nobody may be the Nth from here on
        if program(pool) != right:
            result = "WRONG AFTER " + result
        pool.check()
    print(result, acted, round(time.monotonic() - began, 3), flush=True)
    return acted

with sa.Pool(workers=2, memory_limit="256MiB") as pool:
    right = program(pool)
del pool
"""

MANY = """
for text, numbers, expected in json.loads(os.environ["CASES"]):
    for nth in numbers or range(1, MOST_PASSAGES):
        if not case(text, nth, expected) and not numbers:
            break
    else:
        assert numbers, "it is passed again and again"
check_nothing_left()
"""


def expected(point: str, action: str) -> set[str]:
    """Return what may come of it: "right", or the type of the error."""
    where, name = point.split(".")
    if action == "stop":
        return {"right"}
    if where == "worker":
        if action == "kill":
            return {"right"}
        return {"right"} if name in ("start", "hello", "reply", "replied") else {"InjectedFault"}
    if name == "spawn":
        return {"right"}  # tried again
    if name in ("send", "bury", "repair", "repaired", "buried", "settle"):
        return {"SchedulerError", "right"}  # the loop's thread: a bug, as far as anyone can tell; it may come when all is done
    return {"OSError"} if action == "enospc" else {"InjectedFault"}


def survivable() -> list[tuple[str, list[int], list[str]]]:
    """Return (point and action, which passages, what may come of it) of all faults that the driver survives."""
    actions = {"worker": ("kill", "raise", "stop"), "driver": ("raise", "stop")}
    pairs = [(f"worker.{name}", action) for name in WORKER for action in actions["worker"]]
    pairs += [(f"driver.{name}", action) for name in DRIVER for action in actions["driver"]]
    pairs += [(f"driver.{name}", "enospc") for name in FULL]
    cases = []
    for number, (point, action) in enumerate(pairs):
        if not SOAK_MINUTES and (number + number // 2) % 2:
            continue
        # Evenly: across all pairs each of the first few passages has its turn.
        numbers = [] if SOAK_MINUTES else [1 + number % PASSAGES.get(point, 5)]
        cases.append((f"{point}:{action}", numbers, sorted(expected(point, action))))
    return cases


@pytest.mark.parametrize("part", range(2))
def test_a_fault_ends_in_the_right_result_or_the_error_that_says_why(start: Callable[..., Script], part: int) -> None:
    cases = survivable()[part::2]
    running = start(
        PROGRAM + MANY.replace("MOST_PASSAGES", str(MOST_PASSAGES)), CASES=json.dumps(cases), limit_s=1500 if SOAK_MINUTES else 100
    )
    out = running.end(continue_stopped=True)
    judge(out, {text: set(allowed) for text, _, allowed in cases})


def judge(out: Outcome, allowed: dict[str, set[str]]) -> None:
    """Check what every case came to."""
    assert out.returncode == 0, out.stdout + out.stderr
    found = re.findall(r"^case (\S+) (\d+) (\S+) (.*) (True|False) (\S+)$", out.stdout, re.MULTILINE)
    wrong = [row for row in found if row[3] not in allowed[f"{row[0]}:{row[2]}"] and row[4] == "True"]
    assert not wrong, f"{wrong}\n{out.stderr}"
    assert not [row for row in found if row[4] == "False" and row[3] != "right"], found
    assert {f"{row[0]}:{row[2]}" for row in found if row[4] == "True"} == set(allowed), "points that were never passed"


ONE = """
arm(os.environ["CASE"], os.path.abspath("count"))
if os.environ["CASE"].split(":")[0] in DEATH:
    open("die", "w").close()
with sa.Pool(workers=2, memory_limit="256MiB") as pool:
    print(program(pool))
"""


def test_a_driver_killed_at_any_point_leaves_nothing_behind(start: Callable[..., Script]) -> None:
    for number, name in enumerate(DRIVER if SOAK_MINUTES else DRIVER[::2]):
        limit = PASSAGES.get(f"driver.{name}", 5)
        for nth in range(1, MOST_PASSAGES) if SOAK_MINUTES else [1 + number % limit]:
            running = start(PROGRAM.partition("with sa.Pool")[0] + ONE, CASE=f"driver.{name}:{nth}:kill")
            out = running.end()  # which fails when anything is left
            assert out.stderr == "", (name, nth)
            if not out.returncode and SOAK_MINUTES:
                break
            assert out.returncode == -signal.SIGKILL, (name, nth)


def test_every_point_that_is_documented_is_tried_and_there_is_no_other() -> None:
    text = scheduler.faults.__doc__ or ""
    listed = set(re.findall(r"^    (?:worker|driver|      ) {3}(\w+) ", text, re.MULTILINE))
    assert listed == {*WORKER, *DRIVER, *ELSEWHERE}
    assert {case[0].rpartition(":")[0].partition(".")[2] for case in survivable()} == listed - {*ELSEWHERE}
