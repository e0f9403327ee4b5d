"""Memory files of huge pages: what is in them lies in huge pages, nobody else reaches them, and where they cannot be had nothing breaks."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from scheduler import hugepages
from scheduler.segments import Arena

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="user namespaces and tmpfs are Linux's")
MIB = 1 << 20


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """As in a process that has not asked yet. Gives the processes that other tests have left for later."""
    monkeypatch.delenv(hugepages.HUGE_FILES, raising=False)
    monkeypatch.setattr(hugepages, "_root", None)
    monkeypatch.setattr(hugepages, "_device", None)
    monkeypatch.setattr(hugepages, "_why_none", None)
    yield children()
    if hugepages._root is not None:
        os.close(hugepages._root)


@pytest.fixture
def file(anew: set[int]) -> Iterator[int]:
    fd = hugepages.huge_file()
    if fd is None:
        pytest.skip(f"no memory files of huge pages here: {hugepages.why_none()}")
    yield fd
    os.close(fd)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def huge_nbytes(array: Any) -> int:
    """Return how much of the mapping of an array lies in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= array.ctypes.data < high
        elif inside and first == "ShmemPmdMapped:":
            return 1024 * int(rest.split()[0])
    return 0


def test_an_arena_lies_in_huge_pages(file: int) -> None:
    arena = Arena(64 * MIB)
    arena.bytes[: 16 * MIB] = 1

    assert huge_nbytes(arena.bytes) == arena.resident_nbytes() == 16 * MIB
    arena.punch(8 * MIB, 4 * MIB)
    arena.punch(4096, 4096)
    assert not arena.bytes[8 * MIB : 12 * MIB].any() and not arena.bytes[4096:8192].any()
    assert arena.bytes[: 16 * MIB].sum() == 12 * MIB - 4096
    arena.close()


def test_files_are_private_without_names_and_of_any_size(file: int) -> None:
    assert os.fstat(file).st_mode & 0o777 == 0o600 and os.fstat(file).st_nlink == 0
    assert not os.get_inheritable(file)
    assert os.readlink(f"/proc/self/fd/{file}") == f"/shmarray.{os.getpid()} (deleted)"
    assert hugepages._root is not None and not os.get_inheritable(hugepages._root)
    directory = os.open(".", os.O_RDONLY, dir_fd=hugepages._root)
    assert os.listdir(directory) == []
    os.close(directory)
    assert "shmarray" not in Path("/proc/self/mounts").read_text()
    os.ftruncate(file, 4 * psutil.virtual_memory().total)
    assert os.fstatvfs(file).f_blocks == 0, "a limit of its own would be a SIGBUS where it ends"


def test_the_file_system_is_mounted_once_and_nobody_stays(anew: set[int], file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert children() <= anew
    monkeypatch.setattr(hugepages, "_mount", None)  # not called again

    again = hugepages.huge_file()

    assert again is not None and os.fstat(again).st_dev == os.fstat(file).st_dev and os.fstat(again).st_ino != os.fstat(file).st_ino
    os.close(again)


@pytest.mark.timeout(30)
def test_a_signal_handler_that_asks_meanwhile_does_without(anew: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def mount() -> int:
        found.append(hugepages.huge_file())
        raise OSError("later")

    monkeypatch.setattr(hugepages, "_mount", mount)

    assert hugepages.huge_file() is None and found == [None]
    assert hugepages.why_none() == "later"


def test_a_forked_child_makes_its_own(file: int) -> None:
    pid = os.fork()
    if pid == 0:
        mine = hugepages.huge_file()
        os._exit(mine is None or os.fstat(mine).st_ino == os.fstat(file).st_ino)
    assert os.waitpid(pid, 0)[1] == 0


def _never(folder: Path) -> str:
    (folder / "shmem_enabled").write_text("always within_size advise [never] deny force")
    return str(folder / "shmem_enabled")


FAILING = {
    "says why": ("import sys; sys.exit('Operation not permitted')", "Operation not permitted"),
    "dies": ("import os; os.kill(os.getpid(), 9)", "no answer"),
    "hangs": ("import time; time.sleep(1000)", "timed out"),
    "sends nothing": ("import sys, _socket; _socket.socket(fileno=int(sys.argv[1])).send(b'.')", "no answer"),
}


@pytest.mark.parametrize("how", FAILING)
def test_where_mounting_fails_arenas_are_sealed_memfds(anew: set[int], file: int, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    program, said = FAILING[how]
    assert hugepages._root is not None
    os.close(hugepages._root)
    monkeypatch.setattr(hugepages, "_root", None)
    monkeypatch.setattr(hugepages, "_MOUNT", program)
    monkeypatch.setattr(hugepages, "LONGEST_MOUNT_S", 0.2 if how == "hangs" else 60.0)
    gc.collect()  # of pools of other tests
    before = len(os.listdir("/proc/self/fd"))

    arena = Arena(16 * MIB)

    assert said in str(hugepages.why_none()) and children() <= anew
    assert os.readlink(f"/proc/self/fd/{arena.fd}").startswith("/memfd:shmarray")
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, MIB)
    monkeypatch.setattr(hugepages, "_mount", None)  # not tried again
    assert hugepages.huge_file() is None
    arena.close()
    del arena
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("setting", ["always within_size advise never deny [force]", "always within_size [advise] never deny force", ""])
def test_where_a_memfd_has_them_or_nothing_may_there_is_no_mounting(
    anew: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "shmem_enabled").write_text(setting)
    monkeypatch.setattr(hugepages, "_SETTING", str(tmp_path / "shmem_enabled"))
    monkeypatch.setattr(subprocess, "Popen", None)

    assert hugepages.huge_file() is None
    assert (setting.partition("[")[2].partition("]")[0] or "unknown") in str(hugepages.why_none())


def test_what_says_that_it_is_forbidden_is_asked_first(anew: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "never").write_text("[never]")
    (tmp_path / "max_user_namespaces").write_text("0\n")
    monkeypatch.setattr(hugepages, "_SETTING", str(tmp_path / "never"))
    monkeypatch.setattr(hugepages, "_FORBIDDING", ((str(tmp_path / "none"), "0"), (str(tmp_path / "max_user_namespaces"), "0")))
    monkeypatch.setattr(subprocess, "Popen", None)

    assert hugepages.huge_file() is None
    assert "max_user_namespaces: 0" in str(hugepages.why_none())


def test_they_can_be_switched_off(anew: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "never").write_text("[never]")
    monkeypatch.setattr(hugepages, "_SETTING", str(tmp_path / "never"))
    monkeypatch.setenv(hugepages.HUGE_FILES, "0")

    assert hugepages.huge_file() is None
    assert hugepages.HUGE_FILES in str(hugepages.why_none())


@pytest.mark.parametrize(("attribute", "value"), [("executable", None), ("executable", ""), ("frozen", True)])
def test_a_program_that_is_not_an_interpreter_is_not_started(
    anew: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, attribute: str, value: Any
) -> None:
    monkeypatch.setattr(hugepages, "_SETTING", _never(tmp_path))
    monkeypatch.setattr(hugepages, "_FORBIDDING", ())
    monkeypatch.setattr(sys, attribute, value, raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)

    assert hugepages.huge_file() is None
    assert "not a Python interpreter" in str(hugepages.why_none())


def test_what_is_started_to_mount_starts_no_other(anew: set[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where ``sys.executable`` is the program that Python is embedded in, that would go on for ever."""
    monkeypatch.setattr(hugepages, "_SETTING", _never(tmp_path))
    monkeypatch.setattr(hugepages, "_FORBIDDING", ())
    monkeypatch.setattr(hugepages, "_MOUNT", f"import os, sys; sys.exit('it has ' + os.environ.get('{hugepages.HUGE_FILES}', 'nothing'))")
    monkeypatch.setattr(hugepages, "LONGEST_MOUNT_S", 60.0)

    assert hugepages.huge_file() is None
    assert "it has 0" in str(hugepages.why_none())


def test_no_file_is_made_where_another_directory_has_the_number(file: int, tmp_path: Path) -> None:
    """As in a daemon, which has closed all that was open."""
    root = hugepages._root
    assert root is not None
    kept, other = os.dup(root), os.open(tmp_path, os.O_RDONLY)
    try:
        os.dup2(other, root, inheritable=False)
        found = hugepages.huge_file()
    finally:
        os.dup2(kept, root, inheritable=False)
        os.close(kept)
        os.close(other)

    assert found is None
    again = hugepages.huge_file()
    assert again is not None
    os.close(again)


def test_what_a_child_of_a_fork_writes_stays_its_own(file: int) -> None:
    arena = Arena(8 * MIB)
    arena.bytes[: 4 * MIB] = 1
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = int(arena.bytes[: 4 * MIB].sum())
        arena.bytes[: 4 * MIB] = 2
        os.write(writer, f"{before} {int(arena.bytes[: 4 * MIB].sum())}".encode())
        os._exit(0)
    os.close(writer)
    assert os.waitpid(pid, 0)[1] == 0

    assert os.read(reader, 100) == f"{4 * MIB} {8 * MIB}".encode()
    assert int(arena.bytes[: 4 * MIB].sum()) == 4 * MIB
    os.close(reader)
    arena.close()


def test_another_process_maps_what_lies_there(file: int) -> None:
    os.ftruncate(file, 4 * MIB)
    with mmap.mmap(file, 4 * MIB) as mapping:
        np.frombuffer(mapping, np.uint8)[:] = 3
        code = "import mmap, sys; print(sum(mmap.mmap(int(sys.argv[1]), 4 << 20)[:: 4096]))"
        found = subprocess.run([sys.executable, "-c", code, str(file)], pass_fds=[file], capture_output=True, text=True, check=True)
        assert int(found.stdout) == 3 * 1024
        gc.collect()
