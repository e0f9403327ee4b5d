"""Arrays and processes: starting, dying, interrupting, forking, leaking. Scripts run in processes of their own, each with a limit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import shmarray as sa
from shmarray.errors import MemoryBudgetError, TornChunkError

LIMIT_S = 60


def run_script(source: str, *arguments: str, how: str = "file", tmp_path: Path | None = None, **environment: str) -> str:
    """Run a script to its end; it must succeed in silence. Return what it printed."""
    source = textwrap.dedent(source)
    command, stdin = [sys.executable], None
    if how == "file":
        assert tmp_path is not None
        path = tmp_path / "script.py"
        path.write_text(source)
        command += [str(path), *arguments]
    elif how == "-c":
        command += ["-c", source]
    else:
        command, stdin = [*command, "-"], source
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **environment}, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def gone(pids: list[int], limit_s: float = 5.0) -> bool:
    """Wait until none of the processes runs any more."""
    deadline = time.monotonic() + limit_s
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)  # polled: the kernel tells only parents
    return True


@pytest.mark.parametrize("how", ["file", "-c", "stdin"])
def test_a_script_needs_no_guard(how: str, tmp_path: Path) -> None:
    out = run_script(
        """
        import shmarray as sa
        print(sa.arange(10.0).map_blocks(lambda b: b * 2).sum().compute())
        """,
        how=how,
        tmp_path=tmp_path,
    )
    assert out.split() == ["90.0"]


def test_a_module_in_the_directory_does_not_shadow_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "socket.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "mine.py").write_text("def double(b): return b * 2")
    out = run_script(
        """
        import sys, importlib.util
        here = sys.path.pop(0)
        import shmarray as sa
        sys.path.append(here)
        import mine
        print(sa.ones(4).map_blocks(mine.double).sum().compute())
        """,
        tmp_path=tmp_path,
    )
    assert out.split() == ["8.0"]


def test_ctrl_c_ends_a_compute_within_a_second_and_the_pool_works_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            import signal
            import time
            import shmarray as sa

            signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it

            def slow(block):
                os.write(1, b"begun\\n")  # in one piece: two workers write at once
                time.sleep(60)
                return block

            x = sa.ones(4, chunks=2)
            try:
                x.map_blocks(slow, dtype=float).compute()
            except KeyboardInterrupt:
                print("interrupted", time.monotonic(), flush=True)
            print((x + 1).map_blocks(lambda b: b).sum().compute())
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "begun"
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=LIMIT_S)
    lines = [line.split() for line in out.splitlines() if line != "begun"]
    assert process.returncode == 0, err
    assert err == ""
    assert lines[0][0] == "interrupted"
    assert float(lines[0][1]) - sent < 1.5  # one second, and a slow machine's scheduling
    assert lines[1] == ["8.0"]


def test_a_killed_worker_costs_nothing_but_its_tasks(tmp_path: Path) -> None:
    flag = tmp_path / "died"
    values = np.random.default_rng(0).random((40, 5))

    def once(block: np.ndarray, path: str) -> np.ndarray:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return block * 2
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with sa.Pool(workers=2):
        result = sa.asarray(values, chunks=(4, 5)).map_blocks(once, str(flag), dtype=float).compute()
    assert flag.exists()
    np.testing.assert_array_equal(result, values * 2)


def test_a_task_that_kills_every_worker_is_named_and_refused() -> None:
    def deadly(block: np.ndarray, block_id: tuple[int, ...]) -> np.ndarray:
        if block_id == (2,):
            os.kill(os.getpid(), signal.SIGKILL)
        return block

    with sa.Pool(workers=2):
        with pytest.raises(sa.WorkerDied, match=r"chunk \(2,\).*deadly") as caught:
            sa.ones(8, chunks=2).map_blocks(deadly, dtype=float).compute()
        assert "SIGKILL" in str(caught.value)
        assert Path(__file__).name in str(caught.value)
        assert float((sa.ones(8, chunks=2) + 1).map_blocks(lambda b: b).sum()) == 16.0


def test_workers_killed_during_updates_in_place_leave_right_values_or_torn_chunks() -> None:
    seed = random.Random(5)
    rows = np.random.default_rng(0).random((600, 5000))
    torn = 0
    with sa.Pool(workers=2) as pool:
        y = sa.array(rows)
        for _ in range(12):
            x = sa.array(rows)
            (x + 1).sum().compute(scheduler="processes")  # workers are up
            victim = seed.choice(pool.statistics().pids)
            timer = threading.Timer(seed.random() * 0.02, os.kill, (victim, signal.SIGKILL))
            timer.start()
            try:
                for _ in range(3):
                    np.add(x, y, out=x)
            except TornChunkError:
                torn += 1
                with pytest.raises(TornChunkError, match=r"half|interrupted|neither"):
                    np.asarray(x)
                x[...] = 1.0
                assert float(x.sum()) == rows.size
            else:
                np.testing.assert_array_equal(np.asarray(x), rows + rows + rows + rows)
            finally:
                timer.join()
    assert torn < 12


def test_repeated_computes_leak_nothing() -> None:
    with sa.Pool(workers=2) as pool:
        x = sa.array(np.ones(300_000))
        for _ in range(3):
            (x + 1).persist(scheduler="processes")
        this = psutil.Process()
        fds, threads, live = this.num_fds(), this.num_threads(), pool.statistics().live_nbytes
        for k in range(100):
            (x + k).persist(scheduler="processes").sum().compute()
        assert this.num_fds() <= fds + 1
        assert this.num_threads() <= threads
        assert pool.statistics().live_nbytes == live
        pids = pool.statistics().pids
        pool.check()
    assert gone(list(pids))


def test_what_cannot_fit_is_refused_with_both_numbers() -> None:
    with sa.Pool(workers=1, memory_limit="64MiB", spill_directory="off"):
        big = sa.random.default_rng(0).random((2000, 6000))
        with pytest.raises(MemoryBudgetError, match=r"MiB.*64"):
            big.persist()
        with pytest.raises(MemoryBudgetError, match="64"):
            big.cumsum(axis=0).cumsum(axis=1)[0].sum().compute(scheduler="processes")
        assert 0.4 < float(big.mean()) < 0.6  # one pass needs no memory to speak of


def test_a_compute_inside_a_task_runs_there() -> None:
    def nested(block: np.ndarray) -> np.ndarray:
        return block + float(sa.ones(1000).sum().compute())

    np.testing.assert_array_equal(sa.zeros(4, chunks=2).map_blocks(nested, dtype=float).compute(), np.full(4, 1000.0))


def test_threads_compute_at_once() -> None:
    values = np.random.default_rng(0).random(400_000)
    x = sa.array(values)
    results: dict[int, float] = {}

    def work(k: int) -> None:
        results[k] = float((x + k).sum().compute(scheduler="processes"))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    alone = {k: float((x + k).sum().compute(scheduler="synchronous")) for k in range(6)}
    assert results == alone


def test_two_threads_that_update_two_arrays_crosswise_do_not_deadlock() -> None:
    a, b = sa.array(np.ones(300_000)), sa.array(np.ones(300_000))

    def work(x: sa.Array, y: sa.Array) -> None:
        for _ in range(10):
            with contextlib.suppress(sa.ChangedInput):  # the other thread may write y after y * 0 was built
                x += y * 0

    threads = [threading.Thread(target=work, args=pair) for pair in ((a, b), (b, a))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(LIMIT_S)
        assert not t.is_alive()
    assert float(a.sum()) == float(b.sum()) == 300_000


def test_a_forked_child_has_a_copy_and_computes(tmp_path: Path) -> None:
    out = run_script(
        """
        import os, sys, warnings
        import numpy as np
        warnings.simplefilter("ignore")
        import shmarray as sa
        x = sa.array(np.arange(1e6))
        (x + 1).sum().compute(scheduler="processes")
        pid = os.fork()
        if pid == 0:
            x += 1
            good = float(x[0]) == 1.0 and float((x * 2).sum().compute()) == float((np.arange(1e6) + 1).sum() * 2)
            os._exit(0 if good else 1)
        _, status = os.waitpid(pid, 0)
        print(status, float(x[0]), float((x + 1).sum().compute(scheduler="processes")))
        """,
        tmp_path=tmp_path,
    )
    assert out.split() == ["0", "0.0", str(float((np.arange(1e6) + 1).sum()))]


def test_where_workers_may_not_reach_the_driver_memory_is_staged(tmp_path: Path) -> None:
    out = run_script(
        """
        import logging
        logging.disable(logging.WARNING)
        import numpy as np
        import shmarray as sa
        values = np.random.default_rng(0).random((500, 400))
        x = sa.asarray(values)
        print(np.array_equal((x * 2).compute(scheduler="processes"), values * 2))
        s = x.persist(scheduler="processes")
        s += x
        print(np.array_equal(np.asarray(s), values * 2), np.array_equal(x.map_blocks(lambda b: b + 1).compute(), values + 1))
        """,
        tmp_path=tmp_path,
        SHMARRAY_NO_PROCESS_VM="1",
    )
    assert out.split() == ["True"] * 3


def test_an_array_of_a_closed_pool_is_still_readable() -> None:
    with sa.Pool(workers=1):
        x = sa.array(np.arange(6.0))
    np.testing.assert_array_equal((x + 1).compute(), np.arange(6.0) + 1)
    np.testing.assert_array_equal((x + 1).compute(scheduler="processes"), np.arange(6.0) + 1)
    np.testing.assert_array_equal(np.asarray(x), np.arange(6.0))


def test_a_forked_child_sees_what_was_there_when_it_was_forked() -> None:
    run_script(
        """
import gc, os, signal, numpy as np, shmarray as sa
x = sa.zeros((1000, 1000)).persist()
view = x[:10].compute()
asked, told = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    os.read(asked[0], 1)  # until the parent has written
    assert (view == 0).all() and (np.asarray(x) == 0).all() and float(x[5].sum()) == 0
    os.write(told[1], b"1")
    os.read(asked[0], 1)
    assert (view == 0).all() and (np.asarray(x) == 0).all()
    os._exit(0)
x += 1
os.write(asked[1], b"1")
os.read(told[0], 1)
del view
gc.collect()
others = [sa.full((1000, 1000), k).persist() for k in range(5)]  # would be where x was
x += 1
os.write(asked[1], b"1")
assert os.waitpid(pid, 0)[1] == 0
place = x._storage.extent
x += 1
assert x._storage.extent is place and (np.asarray(x) == 3).all()  # nobody sees it: it stays
del others
gc.collect()
before = x._storage.pool.statistics().live_nbytes
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    x += 1
assert x._storage.pool.statistics().live_nbytes <= before
assert len(os.listdir("/proc/self/fd")) < 40
""",
        how="-c",
    )


def test_a_child_of_a_child_has_what_its_parent_had() -> None:
    run_script(
        """
import os, numpy as np, shmarray as sa
x = sa.zeros((1000, 1000)).persist()
pid = os.fork()
if pid == 0:
    with x.lock() as values:
        values[0, 0] = 5
    pid = os.fork()
    if pid == 0:
        assert x[0, 0].compute() == 5 and (np.asarray(x[1:]) == 0).all()
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert os.waitpid(pid, 0)[1] == 0
assert (np.asarray(x) == 0).all()
""",
        how="-c",
    )


def test_memory_kept_for_a_child_is_there_again_when_it_has_ended() -> None:
    run_script(
        """
import gc, os, shmarray as sa
with sa.Pool(workers=0, memory_limit="64MiB", spill_directory="off"):
    x = sa.zeros((5000, 1000)).persist()
    x += 1
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    del x
    gc.collect()
    y = sa.ones((5000, 1000)).persist()
""",
        how="-c",
    )
