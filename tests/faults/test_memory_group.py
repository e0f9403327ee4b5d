"""Programs in a memory cgroup of their own, where one can be made: the out-of-memory killer, for real, and what the kernel counts."""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTLE_S, Script, wait_until

from scheduler.limits import _ancestors, _find_stat
from scheduler.shared import ROOT as FAMILY

MIB = 1 << 20
GROUP_NBYTES = 256 * MIB

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="worker processes need Linux")]

Run = Callable[[str], Any]  # the fixture `script_in_group`

JOIN = """
with open(os.environ["GROUP"] + "/cgroup.procs", "w") as file:
    file.write("0")
from scheduler.limits import oom_kills
assert oom_kills() == 0  # ours, not the machine's
"""


def new_group() -> tuple[Path, str, str]:
    """Return where a group can be made, and what its limits of memory, and of memory with swap or swap alone, are called.

    Version 1: below our own, so that what limits us limits it as well. Version 2: beside it, for what has processes has no parts.
    """
    name = f"shmarray-test-{uuid.uuid4().hex[:8]}"
    for folder in _ancestors(Path("/"), "", ("", "unified")):
        if (folder / "memory.max").exists():
            return folder.parent / name, "memory.max", "memory.swap.max"
    for folder in _ancestors(Path("/"), "memory", ("memory",)):
        if (folder / "memory.limit_in_bytes").exists():
            return folder / name, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    pytest.skip("no cgroup of this process counts memory")


@pytest.fixture
def group() -> Iterator[Path]:
    """The folder of a new group with `GROUP_NBYTES` of memory and no swap. At the end nobody may be in it."""
    folder, limit, swap = new_group()
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        try:
            (folder / limit).write_text(str(GROUP_NBYTES))
        except OSError as error:
            pytest.skip(f"the memory of a new cgroup cannot be limited: {error}")
        with contextlib.suppress(OSError):  # swap that is not counted
            (folder / swap).write_text("0" if swap == "memory.swap.max" else str(GROUP_NBYTES))
        yield folder
    finally:
        folder.rmdir()


@pytest.fixture
def script_in_group(script: Callable[..., Any], group: Path) -> Run:
    """``script_in_group(body)`` runs a script in that group."""
    return lambda body: script(JOIN + textwrap.dedent(body), GROUP=str(group))


def test_a_task_that_the_system_runs_out_of_memory_for_is_named_and_the_pool_works_on(script_in_group: Run) -> None:
    outcome = script_in_group(
        """
        def eats(b, block_id):
            held = []
            while block_id == (1,):
                held.append(np.ones(1 << 20))
            return b * 2

        def plain(b):
            return b * 3

        with sa.Pool(workers=2, memory_limit="64MiB") as pool:
            x = sa.ones(8, chunks=2)
            try:
                x.map_blocks(eats, dtype=float).compute()
            except sa.WorkerDied as error:
                text = str(error)
                print("chunk (1,)" in text, "map_blocks(eats)" in text, "script.py" in text)
                print(text.count("killed by SIGKILL, by the kernel's out-of-memory killer"), "use smaller chunks" in text)
            print(oom_kills(), float(x.map_blocks(plain, dtype=float).sum()), (x + 1).compute(scheduler="processes").tolist() == [2] * 8)
            pool.check()
        """
    )
    assert outcome.lines == ["True True True", "3 True", "3 24.0 True"]


def test_tasks_that_are_too_large_together_are_done_one_by_one(script_in_group: Run) -> None:
    """Each has memory enough when it is alone; the first time both hold theirs until one of them is killed."""
    outcome = script_in_group(
        """
        def eats(b, block_id):
            begun = [f"begun-{k}" for k in (0, 1)]
            open(begun[block_id[0]], "w").close()
            wait_until(lambda: all(map(os.path.exists, begun)), "the other task")
            held = np.ones(140 << 17)  # 140 MiB
            wait_until(lambda: oom_kills() > 0, "a kill")
            return b + held[-1]

        with sa.Pool(workers=2, memory_limit="64MiB") as pool:
            # Also when the results of both go through one worker: no task waits for the other once somebody was killed.
            found = sa.ones(2, chunks=1).map_blocks(eats, dtype=float).compute()
            print(found.tolist(), oom_kills())
            pool.check()
        """
    )
    assert outcome.lines == ["[2.0, 2.0] 1"]


def test_by_default_a_pool_keeps_to_what_its_group_may_use(script_in_group: Run) -> None:
    """Work on several times as much, and nobody is killed."""
    outcome = script_in_group(
        """
        with sa.Pool(workers=2) as pool:
            print(pool.statistics().limit_nbytes < 256 << 20)
            x = sa.random.default_rng(1).random((8, 8 << 20), dtype="f4").persist()
            print(x.nbytes == 256 << 20, pool.statistics().spilled_nbytes == x.nbytes)
            y = (x * 2).persist()
            y -= x
            print(bool((y == x).all()), oom_kills(), pool.statistics().starts)
            print(pool.statistics().peak_nbytes <= pool.statistics().limit_nbytes)
            pool.check()
        """
    )
    assert outcome.lines == ["True", "True True", "True 0 2", "True"]


def test_the_shared_memory_of_a_program_goes_with_it_when_it_is_killed(start: Callable[..., Script], group: Path) -> None:
    """As the kernel counts it for the group alone; `Shmem:` of the machine has everybody's."""

    def shared_nbytes() -> int:
        return _find_stat(group / "memory.stat", "shmem") or 0

    running = start(
        JOIN
        + textwrap.dedent("""
        from shmarray import shared
        pool = sa.Pool(workers=2, memory_limit="64MiB")
        with pool:
            x = sa.array(np.ones(1 << 20))
            y = (x * 2).persist(scheduler="processes")
            x += y
            z = shared.array(np.ones(1 << 19))
            print("there", flush=True)
            wait_until(lambda: False, "the end")
        """),
        GROUP=str(group),
        **{FAMILY: ""},  # its shared arrays lie in memory of its own, not in ours
    )
    running.wait_for("there")
    assert shared_nbytes() >= 20 << 20
    os.kill(running.pid, signal.SIGKILL)
    assert running.end().returncode == -signal.SIGKILL
    wait_until(lambda: shared_nbytes() == 0, "the end of shared memory", SETTLE_S)
