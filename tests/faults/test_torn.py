"""Updates in place that nobody finishes: whatever a cell holds then, it is never read as if it were whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome

import shmarray as sa
from scheduler import faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

# A worker stops in the middle of a copy over its target.
STOPPED = """
values = np.random.default_rng(1).random(600_000)
os.environ["SHMARRAY_FAULT"], os.environ["SHMARRAY_FAULT_COUNT"] = "worker.half:2:stop", os.path.abspath("count")

def is_stopped(pool):
    return any(psutil.Process(p).status() == psutil.STATUS_STOPPED for p in pool.statistics().pids)

def sound(x):
    "Each chunk is all old or all new, or says that it is torn; return how many say so."
    torn = 0
    for start in range(0, len(values), 100_000):
        try:
            found = np.asarray(x[start : start + 100_000])
        except sa.TornChunkError:
            torn += 1
            continue
        assert any(np.array_equal(found, values[start : start + 100_000] + k) for k in (0, 1)), "neither old nor new"
    return torn
"""


def test_a_pool_closed_in_the_middle_of_an_update_leaves_torn_cells_marked(script: Callable[..., Outcome]) -> None:
    out = script(
        STOPPED
        + """
pool = sa.Pool(workers=2)
with pool:
    x = sa.array(values, chunks=100_000)
    def close():
        wait_until(lambda: is_stopped(pool), "the stop")
        pool.close()
    thread = threading.Thread(target=close)
    thread.start()
    try:
        with sa.config.set(scheduler="processes"):
            x += 1
    except sa.PoolClosed:
        print("closed", sound(x) > 0)
    thread.join()
"""
    )
    assert out.lines == ["closed True"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_middle_of_an_update_leaves_torn_cells_marked(script: Callable[..., Outcome], times: int) -> None:
    out = script(
        STOPPED
        + f"""
with sa.Pool(workers=2) as pool:
    x = sa.array(values, chunks=100_000)
    def press():
        wait_until(lambda: is_stopped(pool), "the stop")
        for _ in range({times}):
            os.kill(os.getpid(), signal.SIGINT)
            select.select([], [], [], 0.05)  # the second comes while the first is dealt with
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with sa.config.set(scheduler="processes"):
            x += 1
    except KeyboardInterrupt:
        print("interrupted", sound(x) > 0)
    thread.join()
    x[...] = 2.0
    print(float((x + 1).sum().compute(scheduler="processes")))
"""
    )
    assert out.lines == ["interrupted True", "1800000.0"]


@pytest.mark.parametrize("executor", ["synchronous", "threads"])
@pytest.mark.parametrize("point", ["bind", "bound", "task", "ran", "results", "copy", "half", "copied"])
def test_an_update_in_the_driver_that_fails_anywhere_is_resumed_exactly(executor: str, point: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).random(400_000)
    with sa.Pool(workers=2), sa.config.set(scheduler=executor):
        for nth in range(1, 100):
            x = sa.array(values, chunks=100_000)
            count = tmp_path / str(nth)
            faults.arm(faults.Fault(point, nth, "raise", "driver", str(count)))
            try:
                x += 1
            except faults.InjectedFault as error:
                faults.arm(None)
                if isinstance(error, sa.PartialUpdateError):
                    check_chunks(x, values)
                    error.resume()
                    np.testing.assert_array_equal(np.asarray(x), values + 1)
                else:  # nothing was written, or all of it
                    assert any(np.array_equal(np.asarray(x), values + k) for k in (0, 1))
            faults.arm(None)
            passages = count.stat().st_size if count.exists() else 0
            if passages < nth:
                break
        assert nth > 1
        np.testing.assert_array_equal(np.asarray(x), values + 1)


def check_chunks(x: sa.Array, values: np.ndarray) -> None:
    """Assert that each chunk is old or new, or says that it is torn."""
    for start in range(0, len(values), 100_000):
        piece = slice(start, start + 100_000)
        with contextlib.suppress(sa.TornChunkError):
            assert any(np.array_equal(np.asarray(x[piece]), values[piece] + k) for k in (0, 1))
