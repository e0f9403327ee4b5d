"""Processes that save checkpoints are killed: the newest whole one is found, and the next save takes away what was left."""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SOAK_MINUTES, Outcome, Script, wait_until

import shmarray as sa

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
POINTS = ("task", "ran", "reply", "replied", "bind")
PASSAGES = (3, 6, 15)  # all of them in a soak; else each point has one, and each number its turn

SAVING = """
sa.config.set(workers=2)
found = sa.load_checkpoint({directory!r})
u, v = found["u"], found["v"]
print("loaded", found.step, flush=True)
for step in range(found.step + 1, found.step + 1000):
    u += 1
    v[...] = u * 2
    sa.save_checkpoint({directory!r}, step, u=u, v=v, w=u + v, t=float(step))
    print("saved", step, flush=True)
"""


def check(directory: Path, least: int) -> int:
    found = sa.load_checkpoint(directory)
    assert found.step >= least
    assert found["t"] == found.step
    base = np.arange(600_000.0).reshape(600, 1000)
    np.testing.assert_array_equal(np.asarray(found["u"]), base + found.step)
    np.testing.assert_array_equal(np.asarray(found["v"]), (base + found.step) * 2)
    np.testing.assert_array_equal(np.asarray(found["w"]), (base + found.step) * 3)
    return found.step


def test_a_driver_killed_at_random_instants(start: Callable[..., Script], tmp_path: Path) -> None:
    """Each run goes on from what the one before left. It is killed while it saves: when so many files there have come and gone."""
    with sa.Pool(workers=0):  # what is left of it is looked for
        _kill_at_random(start, tmp_path / "there")


def _kill_at_random(start: Callable[..., Script], directory: Path) -> None:
    base = sa.arange(600_000.0).reshape(600, 1000).persist()
    sa.save_checkpoint(directory, 0, u=base, v=base * 2, w=base * 3, t=0.0)
    generator = random.Random(1)
    step = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is torn
        for _ in range(60 if SOAK_MINUTES else 4):
            running = start(SAVING.format(directory=str(directory)))
            running.wait_for(f"saved {step + 1}\n")
            looks = generator.randrange(300)
            seen: list[object] = []
            wait_until(lambda seen=seen, looks=looks: seen.append(_names(directory)) or len(seen) > looks, "so many looks")  # type: ignore[misc]
            os.kill(running.pid, signal.SIGKILL)
            last = int(running.end().lines[-1].split()[1])
            step = check(directory, last)
            assert step - last in (0, 1)
    sa.save_checkpoint(directory, step + 1, keep=1, u=base)
    assert os.listdir(directory) == [f"step-{step + 1:012d}"]


def _names(directory: Path) -> list[str]:
    return os.listdir(directory)


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_while_it_writes_or_reads(script: Callable[..., Outcome], point: str) -> None:
    passages = PASSAGES if SOAK_MINUTES else PASSAGES[POINTS.index(point) % 3 :][:1]
    out = script(
        """
        sa.config.set(scheduler="processes")
        for nth in map(int, os.environ["PASSAGES"].split()):
            directory, count = f"there-{nth}", os.path.abspath(f"count-{nth}")
            os.environ["SHMARRAY_FAULT"] = f"worker.{os.environ['POINT']}:{nth}:kill"
            os.environ["SHMARRAY_FAULT_COUNT"] = count
            faults.arm(faults.read_environment())
            with sa.Pool(workers=2):
                u = sa.array(np.arange(600_000.0).reshape(600, 1000))
                for step in range(4):
                    sa.save_checkpoint(directory, step, u=u, v=u * 2)
                    found = sa.load_checkpoint(directory)
                    assert (np.asarray(found["v"]) == np.asarray(u) * 2).all()
            assert os.path.getsize(count) >= nth  # it did happen
            print(*sorted(os.listdir(directory)))
        """,
        POINT=point,
        PASSAGES=" ".join(map(str, passages)),
    )
    assert out.lines == ["step-000000000002 step-000000000003"] * len(passages)


def test_ctrl_c_leaves_what_was_there(start: Callable[..., Script], tmp_path: Path) -> None:
    directory = tmp_path / "there"
    running = start(f"""
        import shmarray.npy
        sa.config.set(workers=2, scheduler="processes")
        u = sa.ones((400, 1000))
        sa.save_checkpoint({str(directory)!r}, 1, u=u)
        def slow(block):
            open("begun", "w").close()
            time.sleep(60)
            return block
        try:
            sa.save_checkpoint({str(directory)!r}, 2, u=u.map_blocks(slow, dtype=float))
        except KeyboardInterrupt:
            print(*os.listdir({str(directory)!r}))
        """)
    wait_until(lambda: (running.directory / "begun").exists(), "the first task", 60)
    os.kill(running.pid, signal.SIGINT)
    assert running.end().lines == ["step-000000000001"]
