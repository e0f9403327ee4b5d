"""Tight limits, tasks that break what they run in, and who can reach us from outside. Whole scripts, each in a process of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import shmarray as sa

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.timeout(90), pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="worker processes need Linux")]

Run = Callable[..., Any]  # the fixture `script`

# ---------------------------------------------------------------------------------------------------------- limits

WORK = """
values = np.random.default_rng(0).random((1000, 500))
with sa.Pool(workers=2, memory_limit="64MiB") as pool:
    x = sa.array(values)
    x += 1
    print(np.array_equal(np.asarray(x), values + 1))
    print(np.allclose((x * 2).sum(axis=0).compute(scheduler="processes"), ((values + 1) * 2).sum(axis=0)))
    print(np.array_equal(sa.asarray(values).map_blocks(lambda b: b * 2).compute(), values * 2))
    pool.check()
    print(pool.statistics().starts >= 2)
"""


@pytest.mark.parametrize(
    ("limit", "nbytes"), [("RLIMIT_AS", 4 << 30), ("RLIMIT_FSIZE", 256 << 20), ("RLIMIT_NOFILE", 64), ("RLIMIT_CORE", 0)]
)
def test_limits_of_the_process_are_lived_with(script: Run, limit: str, nbytes: int) -> None:
    assert script(WORK, limits={limit: nbytes}).lines == ["True"] * 4


def test_too_little_address_space_is_an_error_with_numbers(script: Run) -> None:
    """For NumPy it is enough, for what is asked for it is not."""
    outcome = script(
        """
        in_use = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20),) * 2)
        try:
            with sa.Pool(workers=1, memory_limit="4GiB"):
                sa.ones((20_000, 20_000)).persist(scheduler="synchronous")
        except MemoryError as error:
            print(type(error).__name__, "MiB" in str(error) or "bytes" in str(error))
        print("on")
        """,
        is_silent=False,
    )
    assert outcome.lines[-1] == "on" and outcome.lines[0].endswith("True")


def test_ten_thousand_chunks_need_no_more_descriptors_than_workers(script: Run) -> None:
    outcome = script(
        """
        with sa.Pool(workers=2, memory_limit="256MiB"):
            x = sa.arange(100_000.0, chunks=10)
            assert x.numblocks == (10_000,)
            stored = x.map_blocks(lambda b: b + 1, dtype=float).persist()
            print(len(os.listdir("/proc/self/fd")) < 40, float(stored.sum().compute(scheduler="processes")))
            many = [sa.arange(10.0).persist() for _ in range(500)]
            print(len(os.listdir("/proc/self/fd")) < 40, sum(float(m.sum()) for m in many))
        """,
        limits={"RLIMIT_NOFILE": 64},
    )
    assert outcome.lines == [f"True {sum(range(100_000)) + 100_000:.1f}", f"True {500 * 45.0}"]


def test_without_a_descriptor_left_there_is_an_error_and_work_after(script: Run) -> None:
    outcome = script(
        """
        with sa.Pool(workers=2, memory_limit="64MiB"):
            x = sa.ones(100, chunks=10)
            held = []
            try:
                while True:
                    held.append(open(os.devnull))
            except OSError:
                pass
            try:
                x.map_blocks(lambda b: b + 1, dtype=float).compute()
            except (OSError, sa.WorkerStartError) as error:
                print("Too many open files" in str(error))
            held.clear()
            print(float(x.map_blocks(lambda b: b + 1, dtype=float).sum().compute()))
        """,
        limits={"RLIMIT_NOFILE": 64},
        is_silent=False,
    )
    assert outcome.lines == ["True", "200.0"]


# ------------------------------------------------------------------------------------- tasks that break their process

BREAKING = """
values = np.random.default_rng(0).random((64, 100))

def breaks(b):
    {what}
    return b * 2

def plain(b):
    return b * 3

with sa.Pool(workers=2, memory_limit="64MiB") as pool:
    x = sa.asarray(values, chunks=(16, 100))
    for _ in range(2):
        try:
            print(np.array_equal(x.map_blocks(breaks, dtype=float).compute(), values * 2))
        except Exception as error:
            print(type(error).__name__, "breaks" in "".join(error.__notes__), file=sys.stderr)
            print(True)
    print(np.array_equal(x.map_blocks(plain, dtype=float).compute(), values * 3))
    print(np.array_equal((sa.array(values) + 1).compute(scheduler="processes"), values + 1))
    pool.check()
"""


@pytest.mark.parametrize(
    "what",
    [
        "import os; os.closerange(3, 256)",
        "import os; os.closerange(0, 256)",
        "import os; os.closerange(3, 256); [os.open(os.devnull, os.O_RDWR) for _ in range(20)]",
    ],
)
def test_a_task_that_closes_every_descriptor_costs_a_worker_not_the_result(script: Run, what: str) -> None:
    outcome = script(BREAKING.format(what=what), is_silent=False)
    assert outcome.lines == ["True"] * 4
    assert "Traceback" not in outcome.stderr and "breaks" not in outcome.stderr
    if "(0," not in what:
        assert "closed descriptors" in outcome.stderr


def test_a_worker_never_writes_to_what_has_taken_its_sockets_place(script: Run, tmp_path: Path) -> None:
    """A task closes everything; its own connection then gets our number. Not a byte of ours may come out there."""
    outcome = script(
        """
        def takes_over(b, path):
            import os, socket, threading
            os.closerange(3, 256)
            near, far = socket.socketpair()
            os.closerange(100, 256)
            for fd in range(3, 40):
                if fd not in (near.fileno(), far.fileno()):
                    os.dup2(near.fileno(), fd)
            far.settimeout(5)
            def listen():
                try:
                    data = far.recv(100)
                except OSError:
                    data = b""
                with open(path, "ab") as file:
                    file.write(data)
            threading.Thread(target=listen).start()
            return b * 2

        with sa.Pool(workers=1, memory_limit="64MiB"):
            print(sa.ones(4, chunks=2).map_blocks(takes_over, os.environ["LEAKED"], dtype=float).sum().compute())
        """,
        is_silent=False,
        LEAKED=str(tmp_path / "leaked"),
    )
    assert outcome.lines == ["8.0"]
    assert not (tmp_path / "leaked").exists() or (tmp_path / "leaked").read_bytes() == b""


@pytest.mark.parametrize(
    "what",
    [
        "import os; os.chdir('/'); os.environ.clear(); os.umask(0o777); os.nice(5); os.getsid(0) == os.getpid() or os.setsid()",
        """import resource as r
    if r.getrlimit(r.RLIMIT_NOFILE)[0] > 3:  # once: it opens a file
        mapped = int(open("/proc/self/statm").read().split()[0]) * r.getpagesize()  # shared memory, most of it, and more than there is
        for name, most in (("AS", mapped + (1 << 30)), ("NOFILE", 3), ("FSIZE", 0)):
            r.setrlimit(getattr(r, "RLIMIT_" + name), (most, most))""",
        "import sys; sys.path.clear(); sys.modules.pop('scheduler', None); import gc; gc.disable(); "
        "import warnings; warnings.simplefilter('error')",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.alarm(0); import sys; sys.stdout = sys.stderr = None",
        "import sys; sys.stdout.close()",
    ],
)
def test_a_task_that_changes_its_process_harms_no_result(script: Run, what: str) -> None:
    assert script(BREAKING.format(what=what)).lines == ["True"] * 4


def test_a_task_that_leaves_itself_no_memory_is_told_of(script: Run) -> None:
    what = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1, 1)); np.ones(50_000_000)"
    outcome = script(BREAKING.format(what=what), is_silent=False)
    assert outcome.lines[:2] == ["True"] * 2
    assert "MemoryError True" in outcome.stderr  # its own, with chunk and line


def test_a_segmentation_fault_shows_its_stack_and_its_name(script: Run) -> None:
    outcome = script(
        """
        import ctypes

        def breaks(b):
            ctypes.string_at(0)

        with sa.Pool(workers=1, memory_limit="64MiB"):
            try:
                sa.ones(4, chunks=2).map_blocks(breaks, dtype=float).compute()
            except sa.WorkerDied as error:
                print("killed by SIGSEGV" in str(error), "script.py" in str(error), "map_blocks(breaks)" in str(error))
        """,
        is_silent=False,
    )
    assert outcome.lines == ["True True True"]
    assert "Segmentation fault" in outcome.stderr and "in breaks" in outcome.stderr


# --------------------------------------------------------------------------------------------------- from outside


def test_there_is_no_socket_to_connect_to_and_no_memory_for_others(script: Run) -> None:
    outcome = script(
        """
        import stat
        with sa.Pool(workers=2, memory_limit="64MiB") as pool:
            stored = sa.ones(1000).persist()
            stored += 1
            print(float((stored + 1).map_blocks(lambda b: b).sum()))
            sockets, modes = set(), set()
            for pid in (os.getpid(), *pool.statistics().pids):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    try:
                        link = os.readlink(f"/proc/{pid}/fd/{fd}")
                        mode = os.stat(f"/proc/{pid}/fd/{fd}").st_mode
                    except OSError:
                        continue
                    if link.startswith("socket:["):
                        sockets.add(link[8:-1])
                    if link.startswith(("/memfd:", "/shmarray.")):
                        modes.add((link.split()[0], oct(stat.S_IMODE(mode))))
            mapped = {line.split()[5] for line in open("/proc/self/maps") if "shmarray" in line}
        print(len(sockets) >= 4, len(modes) >= 2)
        print(sorted(m for m in modes if m[1] != "0o600"))
        for kind in ("tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6", "packet", "netlink"):
            try:
                rows = open(f"/proc/net/{kind}").read().split("\\n")[1:]
            except OSError:
                continue
            found = [row for row in rows if sockets & set(row.split())]
            if found:
                print(kind, found)
        for row in open("/proc/net/unix").read().split("\\n")[1:]:
            words = row.split()
            if len(words) > 6 and words[6] in sockets and (len(words) > 7 or int(words[3], 16) & 0x10000):
                print("unix", row)  # it has a name, or it listens
        """,
    )
    assert outcome.lines == ["3000.0", "True True", "[]"]


# -------------------------------------------------------------------------------------------------------- patience


def test_the_configuration_has_a_task_timeout() -> None:
    def hangs(b: object, block_id: tuple[int, ...]) -> object:
        if block_id == (1,):
            time.sleep(60)
        return b

    with sa.Pool(workers=2, memory_limit="64MiB"):
        hanging = sa.ones(8, chunks=2).map_blocks(hangs, dtype=float)
        with sa.config.set(task_timeout=0.3):
            with pytest.raises(sa.WorkerDied, match=r"chunk \(1,\).*hangs.*task_timeout of 0\.3 s"):
                hanging.compute()
            assert float(sa.ones(8, chunks=2).map_blocks(lambda b: b, dtype=float).sum()) == 8.0
        assert sa.config.task_timeout is None
    for bad in (0, -1, "soon", "nan"):
        with pytest.raises(ValueError, match="task_timeout"):
            sa.config.set(task_timeout=bad)


def test_a_mapped_file_that_gets_shorter_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "shrinking.dat"
    for n in (1000, 3_000_000):  # little work is done at once elsewhere, in the process that would be killed by a SIGBUS
        np.arange(float(n)).tofile(path)
        mapped = np.memmap(path, float, "r")
        with sa.Pool(workers=1):
            x = sa.from_array(mapped[10:])
            assert float(x.sum().compute()) == sum(range(10, n))
            os.truncate(path, 4096)
            if n == 1000:
                os.truncate(path, 0)
            with pytest.raises(sa.SharedMemoryError, match="has become shorter") as caught:
                (x + 1).sum().compute()
            assert any("shrinking.dat" in note for note in caught.value.__notes__)
            assert any("part [" in note or "task" in note for note in caught.value.__notes__)
        del mapped, x
