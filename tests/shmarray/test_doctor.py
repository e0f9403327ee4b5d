"""The doctor: says what there is by trying it, what follows where it is not, and leaves nothing behind."""

from __future__ import annotations

import builtins
import contextlib
import errno
import gc
import os
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

import shmarray as sa
from shmarray import doctor

pytestmark = [pytest.mark.timeout(90), pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="worker processes need Linux")]

ROOT = str(Path(sa.__file__).parents[1])
NEEDED = {"memfd", "pidfd", "eventfd, epoll", "message sockets", "life socket", "worker process"}
NAMES = NEEDED | {"versions", "seals", "process_vm_readv", "llvmlite", "libmvec", "huge pages, private", "huge pages, shared"}
NAMES |= {"RLIMIT_AS", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_NPROC", "/dev/shm", "memory", "processors", "spill directory"}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shmarray", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


def named(name: str, found: list[doctor.Probe] | None = None) -> doctor.Probe:
    (each,) = [each for each in (found or doctor.probe()) if each.name == name]
    return each


def test_the_command_prints_a_line_for_each_thing_and_succeeds_where_workers_start() -> None:
    done = command("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    assert lines.pop() == "Worker processes can be used."
    column = len(max(NAMES, key=len)) + 2
    assert {line[:column].strip() for line in lines} == NAMES
    assert {line[column:].split()[0] for line in lines} <= {"ok", "degraded", "missing"}
    advice = [line for line in done.stdout.splitlines() if line.lstrip().startswith("->")]
    assert len(advice) == sum(line[column:].split()[0] != "ok" for line in lines)


def test_without_a_command_it_says_which_there_are() -> None:
    done = command()
    assert done.returncode == 0 and "doctor" in done.stdout and done.stderr == ""
    done = command("nurse")
    assert done.returncode == 2 and "nurse" in done.stderr and "doctor" in done.stderr


def test_what_is_missing_is_told_with_what_to_do() -> None:
    for each in doctor.probe():
        assert each.state in ("ok", "degraded", "missing")
        assert (each.advice == "") == (each.state == "ok"), each
        assert each.is_needed == (each.name in NEEDED)
        if each.is_needed:
            assert each.state == "ok", each  # this very machine runs the tests of worker processes


def test_nothing_is_left_behind() -> None:
    doctor.probe()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), len(psutil.Process().children())
    doctor.probe()
    gc.collect()
    after = len(os.listdir("/proc/self/fd")), len(psutil.Process().children())
    assert all(now <= then for now, then in zip(after, before, strict=True))  # workers of earlier tests may have ended meanwhile


@pytest.mark.parametrize("lacking", ["memfd_create", "pidfd_open"])
def test_without_what_workers_need_only_threads_are_left(
    lacking: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(os, lacking)
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "Only threads can be used here" in said.splitlines()[-1]
    assert lacking.partition("_")[0] in said.splitlines()[-1] and "worker process" in said.splitlines()[-1]
    assert "missing" in said and "seccomp" in said


def test_a_system_call_that_is_forbidden_is_missing_though_python_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", forbidden)
    found = named("pidfd")
    assert found.state == "missing" and "Function not implemented" in found.value and "5.3" in found.advice


def test_workers_that_cannot_start_are_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    found = named("worker process")
    assert found.state == "missing" and "no such luck" in found.value


def test_memory_that_cannot_be_reached_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMARRAY_NO_PROCESS_VM", "1")
    found = named("process_vm_readv")
    assert found.state == "degraded" and "ptrace_scope" in found.advice and not found.is_needed


def test_without_llvmlite_it_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "llvmlite":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    found = named("llvmlite")
    assert (found.state, found.value) == ("missing", "not installed") and "shmarray[jit]" in found.advice


def test_tight_limits_are_degraded() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (63, hard))
        found = named("RLIMIT_NOFILE")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.state, found.value) == ("degraded", "63") and "ulimit -n" in found.advice


def test_a_spill_directory_in_memory_or_without_space_is_degraded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with sa.config.set(spill_directory=tmp_path / "missing"):
        assert named("spill directory").state == "missing"
    with sa.config.set(spill_directory=tmp_path):
        kind = doctor._file_system(str(tmp_path))
        assert kind in named("spill directory").value
        monkeypatch.setattr(doctor, "_file_system", lambda _: "tmpfs")
        assert named("spill directory").state == "degraded"
        monkeypatch.setattr(doctor, "_file_system", lambda _: "ext4")
        size = namedtuple("size", "f_frsize f_bavail f_blocks")
        monkeypatch.setattr(os, "statvfs", lambda _: size(4096, 2, 100))
        assert named("spill directory").value.endswith("8 KiB free") and named("spill directory").state == "degraded"
    assert os.listdir(tmp_path) == []


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    for mount in psutil.disk_partitions(all=True):
        with contextlib.suppress(OSError):
            if mount.mountpoint in ("/proc", "/dev/shm", "/sys"):
                assert doctor._file_system(mount.mountpoint + "/self") == mount.fstype
