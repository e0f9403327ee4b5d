"""The driver's process ends, in every way, whatever its workers are at: they go, and the memory with them; nothing has a name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil
import pytest
from conftest import SETTLE_S, SOAK_MINUTES, Script, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ENDS = {  # how the driver ends -> the code it ends with
    "os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "import ctypes; ctypes.string_at(0)": -signal.SIGSEGV,
    "os._exit(3)": 3,
}

STATES = {
    "idle": "",
    "busy": """
def busy(block):
    import ctypes
    open("busy", "w").close()
    ctypes.PyDLL(None).sleep(60)  # in C, holding the GIL
    return block
threading.Thread(target=lambda: sa.ones(2, chunks=1).map_blocks(busy, dtype=float).compute(), daemon=True).start()
wait_until(lambda: os.path.exists("busy"), "the first task")
""",
    "stopped": """
for pid in pids:
    os.kill(pid, signal.SIGSTOP)
wait_until(lambda: all(psutil.Process(p).status() == "stopped" for p in pids), "the stop")
""",
    "started by a thread that has ended": "",
}

SCRIPT = """
from shmarray.compute import current_pool
sa.config.set(workers=2)
x = sa.array(np.ones(3_000_000))  # in the arena; a view of it, and an expression, stay alive
view = np.asarray(x)
def use():
    (x + 1).sum().compute(scheduler="processes")
if {in_thread}:
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
else:
    use()
pids = current_pool().statistics().pids
{state}
print(" ".join(map(str, ["workers", *pids])), flush=True)  # in one piece
wait_until(lambda: os.path.exists("go"), "the word to go")
{end}
"""


def begun(start: Callable[..., Script], state: str, end: str) -> Script:
    return start(SCRIPT.format(in_thread=state.startswith("started"), state=STATES[state], end=end))


def memory_files(pids: list[int]) -> list[str]:
    """Return the anonymous files that these processes hold."""
    found = []
    for pid in pids:
        for number in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{number}")
            if target.startswith(("/memfd:shmarray", "/shmarray.")):
                found.append(target)
    return found


@pytest.mark.parametrize("state", STATES)
def test_workers_and_memory_go_when_the_driver_is_gone(
    start: Callable[..., Script], state: str, record_property: Callable[[str, object], None]
) -> None:
    # Each state sees SIGKILL and one of the other ends, each of which has its turn; all of them in a soak.
    kill, *others = ENDS
    ends = ENDS if SOAK_MINUTES else (kill, others[list(STATES).index(state) % len(others)])
    scripts = {end: begun(start, state, end) for end in ends}
    try:
        for end, running in scripts.items():
            running.wait_for("workers")
            pids = [int(p) for p in running.output().split()[1:]]
            assert len(pids) == 2
            assert memory_files([running.pid, *pids])  # what has to go
            (running.directory / "go").touch()
            assert running.process.wait(60) == ENDS[end], running.errors()
            taken_s = wait_until(lambda pids=pids: not any(map(is_alive, pids)), f"the end of {pids}", SETTLE_S)  # type: ignore[misc]
            record_property(f"workers gone after, ms: {end}", round(1000 * taken_s, 1))
            print(f"workers {state}, {end}: gone after {1000 * taken_s:.1f} ms")
    finally:
        for running in scripts.values():
            out = running.end()
            assert out.stderr == ""


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("first", ["driver", "workers"])
def test_everything_killed_at_once_leaves_nothing(start: Callable[..., Script], first: str) -> None:
    running = begun(start, "busy", "pass")
    running.wait_for("workers")
    pids = [running.pid, *map(int, running.output().split()[1:])]
    for pid in pids if first == "driver" else reversed(pids):
        os.kill(pid, signal.SIGKILL)
    out = running.end()
    assert (out.returncode, out.stderr) == (-signal.SIGKILL, "")
