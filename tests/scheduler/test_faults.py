"""Fault points: what the environment may ask for, who acts, and that it happens once in all processes together."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scheduler
from scheduler import faults

ROOT = str(Path(scheduler.__file__).parent.parent)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.arm(None, who="driver")


def armed(tmp_path: Path, text: str) -> Path:
    """Arm this process as the environment would; return the file that counts."""
    count = tmp_path / "count"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHMARRAY_FAULT", text)
        patch.setenv("SHMARRAY_FAULT_COUNT", str(count))
        faults.arm(faults.read_environment())
    return count


def test_nothing_happens_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHMARRAY_FAULT", raising=False)
    assert faults.read_environment() is None
    faults.point("task")


def test_the_nth_passage_acts_and_no_other(tmp_path: Path) -> None:
    count = armed(tmp_path, "task:3:raise")
    faults.point("task")
    faults.point("bind")  # another point is not counted
    faults.point("task")
    with pytest.raises(faults.InjectedFault, match=r"'task', passage 3") as caught:
        faults.point("task")
    assert caught.value.errno == errno.EIO
    faults.point("task")
    assert count.stat().st_size == 4


def test_a_full_disk_is_an_oserror_like_any_other(tmp_path: Path) -> None:
    armed(tmp_path, "allocate:1:enospc")
    with pytest.raises(OSError) as caught:
        faults.point("allocate")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("text", ["worker.task:1:raise", "task:1:raise:worker"])
def test_what_is_meant_for_a_worker_spares_the_driver(tmp_path: Path, text: str) -> None:
    count = armed(tmp_path, text)
    faults.point("task")
    assert not count.exists()
    faults.arm(faults.ARMED, who="worker")
    with pytest.raises(faults.InjectedFault):
        faults.point("task")


@pytest.mark.parametrize(
    "text", ["task", "task:1", "task:0:kill", "task:x:kill", "task:1:burn", "task:1:kill:me", ":1:kill", "task:1:kill:any:more"]
)
def test_what_cannot_be_meant_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SHMARRAY_FAULT", text)
    monkeypatch.setenv("SHMARRAY_FAULT_COUNT", "/nowhere")
    with pytest.raises(ValueError, match="point:N:action"):
        faults.read_environment()


def test_a_fault_that_nobody_counts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMARRAY_FAULT", "task:1:kill")
    monkeypatch.delenv("SHMARRAY_FAULT_COUNT", raising=False)
    with pytest.raises(ValueError, match="SHMARRAY_FAULT_COUNT"):
        faults.read_environment()


def test_of_many_processes_exactly_one_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "SHMARRAY_FAULT": "task:5:kill", "SHMARRAY_FAULT_COUNT": str(tmp_path / "count"), "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", "from scheduler import faults\nfor _ in range(50): faults.point('task')"]
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert sorted(p.wait(60) for p in processes) == [-signal.SIGKILL, 0, 0]
