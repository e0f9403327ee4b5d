"""How a program ends: its own exit code, silence, no delay, with arrays alive, threads at work, errors on the way.

Exit codes with an idle pool and daemon threads of plans are in tests/scheduler/test_pool.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Outcome, Script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ARRAYS = """
x = sa.array(np.ones(1_000_000))
y = (x + 1).persist(scheduler="processes")
view, lazy = np.asarray(y), (y * 2).sum()
"""

SLOW = """
def slow(block):
    open("begun", "w").close()
    time.sleep(60)
    return block

def compute():
    sa.ones(4, chunks=2).map_blocks(slow, dtype=float).compute()

def wait_for_task():
    wait_until(lambda: os.path.exists("begun"), "the first task")
"""

ENDINGS = {
    "arrays at module level": ("print(float(lazy))", 0),
    "sys.exit in a signal handler during a compute": (
        SLOW
        + """
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(6))
threading.Thread(target=lambda: (wait_for_task(), os.kill(os.getpid(), signal.SIGUSR1)), daemon=True).start()
compute()
""",
        6,
    ),
    "daemon threads that compute over and over": (
        """
def work():
    while True:
        (y + 1).sum().compute(scheduler="processes")
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
wait_until(lambda: current_pool().statistics().plans > 20, "twenty plans")
sys.exit(8)
""",
        8,
    ),
    "streams that were left in the middle": (
        SLOW
        + """
def endless():
    yield 1
    threading.Event().wait()
streams = [sa.stream(endless(), lambda k: k), sa.stream(range(99), lambda k: np.zeros(k)), sa.stream(range(2), lambda k: k or slow(k))]
for stream in streams[:2]:
    next(stream)
threading.Thread(target=next, args=streams[2:], daemon=True).start()
wait_for_task()
sys.exit(7)
""",
        7,
    ),
    "a thread that computes when the main one has ended": (
        """
def work():
    wait_until(lambda: not threading.main_thread().is_alive(), "the end of the main thread")
    print(float((y + 1).sum().compute(scheduler="processes")), flush=True)
threading.Thread(target=work).start()
""",
        0,
    ),
    "pool closed with a compute in another thread": (
        SLOW
        + """
def work():
    try:
        with sa.Pool(workers=1) as pool:
            pools.append(pool)
            compute()
    except sa.PoolClosed:
        print("told")
pools = []
thread = threading.Thread(target=work)
thread.start()
wait_for_task()
pools[0].close()
thread.join()
sys.exit(9)
""",
        9,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_with_its_own_code_and_in_silence(start: Callable[..., Script], ending: str) -> None:
    body, code = ENDINGS[ending]
    out = start("from shmarray.compute import current_pool\n" + ARRAYS + body, "-W", "error").end()
    assert (out.returncode, out.stderr) == (code, ""), out.stdout
    print(f"{ending}: {out.exit_s:.2f} s to end")


def test_an_error_while_a_module_is_imported_is_the_only_thing_told(start: Callable[..., Script]) -> None:
    body = """
open("broken.py", "w").write("import shmarray as sa\\nz = sa.ones(9).persist()\\nraise LookupError(float(z.sum()))")
import broken
"""
    out = start(ARRAYS + body).end()
    assert out.returncode == 1
    assert out.stderr.rstrip().endswith("LookupError: 9.0") and out.stderr.count("Traceback") == 1, out.stderr


def test_sys_exit_in_a_task_is_an_error_of_the_task_not_the_end_of_a_process(script: Callable[..., Outcome]) -> None:
    out = script(
        ARRAYS
        + """
try:
    y.map_blocks(lambda b: sys.exit(3), dtype=float).compute()
except sa.TaskError as error:
    print("SystemExit" in str(error))
print(float(lazy))
"""
    )
    assert out.lines == ["True", "4000000.0"]
