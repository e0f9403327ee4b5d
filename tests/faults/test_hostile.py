"""Tight limits, tasks that break what they run in, and who can reach us from outside. Whole scripts, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

import shmarray as sa

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.timeout(90), pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="worker processes need Linux")]

ROOT = str(Path(sa.__file__).parents[1])
PROLOGUE = f"""
import faulthandler, os, resource, sys
faulthandler.dump_traceback_later(50, exit=True)
sys.path.insert(0, {ROOT!r})
"""


def script(tmp_path: Path, body: str, *, status: int = 0) -> tuple[list[str], str]:
    """Run a script; return the lines it printed, and its stderr."""
    path = tmp_path / "script.py"
    path.write_text(PROLOGUE + textwrap.dedent(body))
    out = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert out.returncode == status, out.stderr
    return out.stdout.splitlines(), out.stderr


# ---------------------------------------------------------------------------------------------------------- limits

WORK = """
import numpy as np
import shmarray as sa
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
def test_limits_of_the_process_are_lived_with(tmp_path: Path, limit: str, nbytes: int) -> None:
    lines, stderr = script(tmp_path, f"resource.setrlimit(resource.{limit}, ({nbytes}, {nbytes}))\n{WORK}")
    assert lines == ["True"] * 4 and stderr == ""


def test_too_little_address_space_is_an_error_with_numbers(tmp_path: Path) -> None:
    """For NumPy it is enough, for what is asked for it is not."""
    lines, _ = script(
        tmp_path,
        """
        import numpy as np
        import shmarray as sa
        in_use = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20),) * 2)
        try:
            with sa.Pool(workers=1, memory_limit="4GiB"):
                sa.ones((20_000, 20_000)).persist(scheduler="synchronous")
        except MemoryError as error:
            print(type(error).__name__, "MiB" in str(error) or "bytes" in str(error))
        print("on")
        """,
    )
    assert lines[-1] == "on" and lines[0].endswith("True")


def test_ten_thousand_chunks_need_no_more_descriptors_than_workers(tmp_path: Path) -> None:
    lines, stderr = script(
        tmp_path,
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        import numpy as np
        import shmarray as sa
        with sa.Pool(workers=2, memory_limit="256MiB"):
            x = sa.arange(100_000.0, chunks=10)
            assert x.numblocks == (10_000,)
            stored = x.map_blocks(lambda b: b + 1, dtype=float).persist()
            print(len(os.listdir("/proc/self/fd")) < 40, float(stored.sum().compute(scheduler="processes")))
            many = [sa.arange(10.0).persist() for _ in range(500)]
            print(len(os.listdir("/proc/self/fd")) < 40, sum(float(m.sum()) for m in many))
        """,
    )
    assert lines == [f"True {sum(range(100_000)) + 100_000:.1f}", f"True {500 * 45.0}"] and stderr == ""


def test_without_a_descriptor_left_there_is_an_error_and_work_after(tmp_path: Path) -> None:
    lines, _ = script(
        tmp_path,
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        import numpy as np
        import shmarray as sa
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
    )
    assert lines == ["True", "200.0"]


# ------------------------------------------------------------------------------------- tasks that break their process

BREAKING = """
import numpy as np
import shmarray as sa
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
def test_a_task_that_closes_every_descriptor_costs_a_worker_not_the_result(tmp_path: Path, what: str) -> None:
    lines, stderr = script(tmp_path, BREAKING.format(what=what))
    assert lines == ["True"] * 4
    assert "Traceback" not in stderr and "breaks" not in stderr
    if "(0," not in what:
        assert "closed descriptors" in stderr


def test_a_worker_never_writes_to_what_has_taken_its_sockets_place(tmp_path: Path) -> None:
    """A task closes everything; its own connection then gets our number. Not a byte of ours may come out there."""
    lines, _ = script(
        tmp_path,
        """
        import numpy as np
        import shmarray as sa

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
            print(sa.ones(4, chunks=2).map_blocks(takes_over, "leaked", dtype=float).sum().compute())
        """,
    )
    assert lines == ["8.0"]
    assert not (tmp_path / "leaked").exists() or (tmp_path / "leaked").read_bytes() == b""


@pytest.mark.parametrize(
    "what",
    [
        "import os; os.chdir('/')",
        "import os; os.environ.clear()",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))",
        "import sys; sys.path.clear(); sys.modules.pop('scheduler', None)",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.alarm(0)",
        "import os; os.setsid() if os.getsid(0) != os.getpid() else None; os.umask(0o777)",
        "import gc; gc.disable(); import warnings; warnings.simplefilter('error')",
        "import sys; sys.stdout = sys.stderr = None",
        "import sys; sys.stdout.close()",
        "import os; os.nice(5)",
    ],
)
def test_a_task_that_changes_its_process_harms_no_result(tmp_path: Path, what: str) -> None:
    lines, stderr = script(tmp_path, BREAKING.format(what=what))
    assert lines == ["True"] * 4
    assert stderr == ""


def test_a_task_that_leaves_itself_no_memory_is_told_of(tmp_path: Path) -> None:
    what = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1, 1)); np.ones(50_000_000)"
    lines, stderr = script(tmp_path, BREAKING.format(what=what))
    assert lines[:2] == ["True"] * 2
    assert "MemoryError True" in stderr  # its own, with chunk and line


def test_a_segmentation_fault_shows_its_stack_and_its_name(tmp_path: Path) -> None:
    lines, stderr = script(
        tmp_path,
        """
        import ctypes
        import shmarray as sa

        def breaks(b):
            ctypes.string_at(0)

        with sa.Pool(workers=1, memory_limit="64MiB"):
            try:
                sa.ones(4, chunks=2).map_blocks(breaks, dtype=float).compute()
            except sa.WorkerDied as error:
                print("killed by SIGSEGV" in str(error), "script.py" in str(error), "map_blocks(breaks)" in str(error))
        """,
    )
    assert lines == ["True True True"]
    assert "Segmentation fault" in stderr and "in breaks" in stderr


# --------------------------------------------------------------------------------------------------- from outside


def test_there_is_no_socket_to_connect_to_and_no_memory_for_others(tmp_path: Path) -> None:
    lines, stderr = script(
        tmp_path,
        """
        import stat
        import shmarray as sa
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
                    if link.startswith("/memfd:"):
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
    assert lines == ["3000.0", "True True", "[]"] and stderr == ""


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
