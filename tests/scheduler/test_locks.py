"""Locks of cells: among threads, steered by events; between processes, with a second process that does what it is told."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from types import FrameType
from typing import Any

import pytest

from scheduler.errors import LockError
from scheduler.locks import CellLocks, Hold
from scheduler.task import LockRequest

pytestmark = pytest.mark.timeout(60)

LONG_S = 30.0  # longer than anything takes; a test that gets there has failed


def cells(start: int, stop: int, mode: str, extent: int = 7) -> list[LockRequest]:
    return [LockRequest(extent, start, stop, mode)]


class Actor:
    """A thread that does one thing after another, as told."""

    def __init__(self, locks: CellLocks, name: str) -> None:
        self.locks = locks
        self._todo: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._ready = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            self._ready.acquire()
            act, future = self._todo.pop(0)
            if act is None:
                return
            try:
                future.set_result(act())
            except BaseException as error:
                future.set_exception(error)
            del act, future  # the result is not this thread's to keep

    def start(self, act: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._todo.append((act, future))
        self._ready.release()
        return future

    def do(self, act: Callable[[], Any]) -> Any:
        return self.start(act).result(LONG_S)

    def lock(self, requests: list[LockRequest], **options: Any) -> Hold:
        hold = self.do(lambda: self.locks.acquire(requests, timeout=LONG_S, **options))
        assert isinstance(hold, Hold)
        return hold

    def ask(self, requests: list[LockRequest], **options: Any) -> Future[Any]:
        """Ask for cells that are not free, and return once the request is in the queue."""
        queued = threading.Event()

        def tell() -> bool:
            queued.set()
            return False

        future = self.start(lambda: self.locks.acquire(requests, timeout=LONG_S, cancelled=tell, **options))
        assert queued.wait(LONG_S), "it was granted at once, or failed"
        return future

    def end(self) -> None:
        self._todo.append((None, Future()))  # type: ignore[arg-type]  # the end
        self._ready.release()
        self._thread.join(LONG_S)


@pytest.fixture
def locks() -> Iterator[CellLocks]:
    table = CellLocks()
    yield table
    table.check()


@pytest.fixture
def actor(locks: CellLocks) -> Iterator[Callable[[str], Actor]]:
    actors: list[Actor] = []

    def make(name: str) -> Actor:
        actors.append(Actor(locks, name))
        return actors[-1]

    yield make
    for each in actors:
        each.end()


Make = Callable[[str], Actor]


def test_readers_share_and_a_writer_excludes(locks: CellLocks, actor: Make) -> None:
    a, b, c = actor("a"), actor("b"), actor("c")
    first, second = a.lock(cells(0, 10, "r")), b.lock(cells(5, 15, "r"))
    writer = c.ask(cells(9, 10, "w"))
    locks.check()
    first.release()
    assert not writer.done()
    second.release()
    hold = writer.result(LONG_S)
    reader = a.ask(cells(0, 100, "r"))
    hold.release()
    reader.result(LONG_S).release()
    statistics = locks.statistics()
    assert (statistics.granted, statistics.waiting, statistics.extents, statistics.contended) == (0, 0, 0, 2)


def test_neighbours_and_other_extents_do_not_wait(locks: CellLocks, actor: Make) -> None:
    a, b = actor("a"), actor("b")
    a.lock(cells(0, 10, "w"))
    b.lock(cells(10, 20, "w")).release()
    b.lock(cells(0, 10, "w", extent=8)).release()
    assert locks.statistics().contended == 0


def test_request_is_granted_whole_or_not_at_all(locks: CellLocks, actor: Make) -> None:
    a, b, c = actor("a"), actor("b"), actor("c")
    held = a.lock(cells(0, 1, "w", extent=2))
    both = b.ask([LockRequest(1, 0, 5, "w"), LockRequest(2, 0, 5, "w")])
    assert locks.statistics().granted == 1
    assert b.locks.held_by_caller(1, 0, 5) is None
    passing = c.lock(cells(5, 9, "w", extent=1))  # conflicts with nobody: passes
    held.release()
    both.result(LONG_S).release()
    passing.release()


def test_requests_of_one_call_are_merged() -> None:
    locks = CellLocks()
    requests = [
        LockRequest(1, 0, 4, "r"),
        LockRequest(1, 2, 6, "w"),
        LockRequest(1, 5, 9, "r"),
        LockRequest(1, 9, 12, "r"),
        LockRequest(1, 20, 20, "w"),
        LockRequest(2, 7, 8, "r"),
    ]
    with locks.acquire(requests) as hold:
        assert hold._ticket is not None
        assert hold._ticket.wanted == {1: ((0, 2, False), (2, 6, True), (6, 12, False)), 2: ((7, 8, False),)}
        locks.check()
    with locks.acquire([]) as hold:
        assert locks.statistics().granted == 0


@pytest.mark.parametrize("request_", [(7, 3, 2, "r"), (7, -1, 2, "r"), (7, 0, 2, "x")])
def test_senseless_request_is_refused(locks: CellLocks, request_: tuple[int, int, int, str]) -> None:
    with pytest.raises(ValueError, match="extent 7"):
        locks.acquire([LockRequest(*request_)])


def test_waiting_writer_is_not_passed_by_later_readers(locks: CellLocks, actor: Make) -> None:
    a, b, c, d = actor("a"), actor("b"), actor("c"), actor("d")
    reading = a.lock(cells(0, 10, "r"))
    writer = b.ask(cells(0, 10, "w"))
    late = c.ask(cells(0, 5, "r"))
    beside = d.lock(cells(10, 12, "r"))
    reading.release()
    hold = writer.result(LONG_S)
    assert not late.done()
    hold.release()
    late.result(LONG_S).release()
    beside.release()


def test_conflicting_requests_are_granted_in_order_of_arrival(locks: CellLocks, actor: Make) -> None:
    held = actor("holder").lock(cells(0, 1, "w"))
    actors = [actor(f"waiter {i}") for i in range(6)]
    waiting = [each.ask(cells(0, 1, "w")) for each in actors]
    for i in range(6):
        held.release()
        held = waiting[i].result(LONG_S)
        assert not any(later.done() for later in waiting[i + 1 :])
        locks.check()
    held.release()


def test_thread_reuses_what_it_holds(locks: CellLocks, actor: Make) -> None:
    a, b = actor("a"), actor("b")
    outer = a.lock(cells(0, 10, "w"))
    inner = a.lock(cells(2, 5, "r"))
    again = a.lock(cells(3, 4, "w"))
    locks.check()
    again.release()
    assert a.do(lambda: locks.held_by_caller(7, 0, 10)) == "w"
    reader, writer = b.ask(cells(2, 5, "r")), actor("c").ask(cells(9, 10, "w"))
    outer.release()  # what the inner one reads stays locked, to read
    reader.result(LONG_S).release()
    writer.result(LONG_S).release()
    blocked = b.ask(cells(2, 3, "w"))
    inner.release()
    blocked.result(LONG_S).release()


def test_held_by_caller_tells_of_this_thread_only(locks: CellLocks, actor: Make) -> None:
    a = actor("a")
    holds = [a.lock(cells(0, 4, "w")), a.lock(cells(4, 8, "r")), a.lock(cells(8, 9, "w"))]
    asked = [(0, 4), (1, 3), (4, 8), (0, 8), (3, 9), (8, 9), (8, 10), (20, 21)]
    answers = [a.do(lambda s=start, e=stop: locks.held_by_caller(7, s, e)) for start, stop in asked]
    assert answers == ["w", "w", "r", "r", "r", "w", None, None]
    assert locks.held_by_caller(7, 0, 4) is None
    for hold in holds:
        hold.release()


def test_thread_that_reads_may_read_again_past_a_waiting_writer(locks: CellLocks, actor: Make) -> None:
    a, b = actor("a"), actor("b")
    outer = a.lock(cells(0, 10, "r"))
    writer = b.ask(cells(0, 20, "w"))
    inner, beside = a.lock(cells(0, 5, "r")), a.lock(cells(15, 16, "r"))  # behind the writer they would wait for themselves
    for hold in (outer, inner, beside):
        assert not writer.done()
        hold.release()
    writer.result(LONG_S).release()


def test_upgrade_raises_at_once(locks: CellLocks, actor: Make) -> None:
    a = actor("a")
    hold = a.lock(cells(0, 10, "r"))
    with pytest.raises(LockError, match=r"cells \[8, 10\) of extent 7 to write, while thread 'a' .* to read"):
        a.lock(cells(8, 12, "w"))
    locks.check()
    assert locks.statistics().granted == 1
    hold.release()
    a.lock(cells(8, 12, "w")).release()


def test_deadlock_of_two_threads_raises_naming_both(locks: CellLocks, actor: Make) -> None:
    a, b = actor("a"), actor("b")
    one, two = a.lock(cells(0, 1, "w")), b.lock(cells(1, 2, "w"))
    waiting = a.ask(cells(1, 2, "w"))
    with pytest.raises(LockError, match=r"deadlock.*thread 'b' .* \[0, 1\).*thread 'a' .*holds.* \[1, 2\)"):
        b.lock(cells(0, 1, "r"))
    two.release()
    waiting.result(LONG_S).release()
    one.release()


def test_deadlock_of_three_threads_raises(locks: CellLocks, actor: Make) -> None:
    a, b, c = actor("a"), actor("b"), actor("c")
    holds = [each.lock(cells(i, i + 1, "w")) for i, each in enumerate((a, b, c))]
    waiting = [a.ask(cells(1, 2, "w")), b.ask(cells(2, 3, "w"))]
    with pytest.raises(LockError, match=r"'c'.*'a'.*'b'"):
        c.lock(cells(0, 1, "w"))
    holds[2].release()
    for future, hold in ((waiting[1], holds[1]), (waiting[0], holds[0])):
        future.result(LONG_S).release()
        hold.release()


def test_circle_of_politeness_is_broken_instead_of_reported(locks: CellLocks, actor: Make) -> None:
    w, y, z = actor("w"), actor("y"), actor("z")
    of_z, of_y = z.lock(cells(0, 1, "w")), y.lock(cells(2, 3, "w"))
    first = w.ask(cells(0, 2, "w"))  # waits for z
    polite = y.ask(cells(1, 2, "w"))  # cell 1 is free, but w asked first
    last = z.ask(cells(2, 3, "w"))  # waits for y, who waits for w, who waits for z
    polite.result(LONG_S).release()
    of_y.release()
    last.result(LONG_S).release()
    of_z.release()
    first.result(LONG_S).release()


def test_timeout_names_the_holders_and_leaves_nothing(locks: CellLocks, actor: Make) -> None:
    a, b = actor("a"), actor("b")
    hold = a.lock(cells(3, 5, "w"))
    with pytest.raises(TimeoutError, match=r"cells \[0, 9\) of extent 7 to read .* thread 'a' .* holds cells \[3, 5\) .* to write"):
        b.do(lambda: locks.acquire(cells(0, 9, "r"), timeout=0))
    with pytest.raises(TimeoutError, match="thread 'a'"):
        b.do(lambda: locks.acquire(cells(0, 9, "r"), timeout=0.01))
    assert locks.statistics().waiting == 0
    hold.release()


def test_timeout_names_who_asked_first(locks: CellLocks, actor: Make) -> None:
    hold = actor("a").lock(cells(0, 10, "r"))
    waiting = actor("c").ask(cells(0, 10, "w"))
    with pytest.raises(TimeoutError, match=r"thread 'c' \(\d+\) asked first"):
        locks.acquire(cells(0, 5, "r"), timeout=0)
    hold.release()
    waiting.result(LONG_S).release()


def test_cancelled_request_leaves_the_queue_and_those_behind_go_on(locks: CellLocks, actor: Make) -> None:
    hold = actor("a").lock(cells(0, 10, "r"))
    stop = threading.Event()
    queued = threading.Event()

    def cancelled() -> bool:
        queued.set()
        return stop.is_set()

    writer = actor("b").start(lambda: locks.acquire(cells(0, 10, "w"), cancelled=cancelled))
    assert queued.wait(LONG_S)
    reader = actor("c").ask(cells(0, 10, "r"))
    stop.set()
    with pytest.raises(CancelledError, match="extent 7"):
        writer.result(LONG_S)
    reader.result(LONG_S).release()
    hold.release()


def test_exception_while_waiting_leaves_nothing(locks: CellLocks, actor: Make) -> None:
    hold = actor("a").lock(cells(0, 10, "w"))

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locks.acquire(cells(0, 1, "w"), cancelled=interrupt)
    assert locks.statistics().waiting == 0
    hold.release()


@pytest.fixture
def alarm() -> Iterator[None]:
    """A signal soon, that raises as Ctrl-C does."""

    def strike(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_signal_interrupts_a_waiting_thread(locks: CellLocks, actor: Make, alarm: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        hold = actor("a").lock(cells(0, 10, "w"))
        locks.acquire(cells(0, 1, "w"))
    assert locks.statistics().waiting == 0
    hold.release()


def raise_at(number: int, act: Callable[[], None]) -> bool:
    """Run ``act`` with a KeyboardInterrupt at the n-th place in the lock table where a signal can strike; False: it has fewer."""
    left = number

    def strike(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        # CPython looks for signals when a function begins and when a call has returned.
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith("locks.py"):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(strike)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return left <= 0


@pytest.mark.timeout(240)  # an interrupt at each of thousands of lines
def test_interrupt_at_any_instant_leaves_no_cell_locked(locks: CellLocks, actor: Make, request: pytest.FixtureRequest) -> None:
    a, b = actor("a"), actor("b")
    number, struck = 0, True
    gc.collect()
    gc.freeze()  # each collection below then looks at what has come since, not at every module
    request.addfinalizer(gc.unfreeze)
    while struck:
        number += 1
        other = a.lock(cells(0, 2, "r"))
        waiting = b.ask(cells(0, 1, "w"))

        def act() -> None:
            with locks.acquire(cells(5, 8, "w"), os_lock=True), locks.acquire(cells(6, 7, "r"), os_lock=True):
                locks.held_by_caller(7, 5, 6)
            with contextlib.suppress(TimeoutError):
                locks.acquire(cells(0, 1, "w"), timeout=0)
            locks.acquire([LockRequest(8, 0, 1, "w"), LockRequest(7, 1, 2, "r")]).release()
            locks.statistics()

        struck = raise_at(number, act)
        gc.collect()
        locks.check()
        assert locks.statistics().granted == 1, f"lost at {number}"
        assert locks.statistics().waiting == 1, f"lost at {number}"
        assert not byte_locks(locks), f"bytes lost at {number}"
        other.release()
        waiting.result(LONG_S).release()
    assert number > 100


def byte_locks(locks: CellLocks) -> list[str]:
    """Return what the system knows of locks on the file of the table, held or waited for."""
    inode = f":{os.fstat(locks.fileno()).st_ino} "
    with open("/proc/locks") as lines:
        return [line for line in lines if inode in line]


def test_dropped_hold_is_released(locks: CellLocks, actor: Make) -> None:
    locks.acquire(cells(0, 10, "w"))
    assert locks.statistics().granted == 0
    box = [actor("a").lock(cells(0, 10, "w"))]
    waiting = actor("b").ask(cells(0, 1, "w"))
    box.clear()  # nobody calls the table from here on but the waiting thread
    waiting.result(LONG_S).release()


def test_release_is_idempotent_and_open_to_any_thread(locks: CellLocks, actor: Make) -> None:
    a = actor("a")
    hold = a.lock(cells(0, 10, "w"))
    assert hold.owner == a._thread.ident != threading.get_ident()
    hold.release()
    hold.release()
    assert hold.is_released
    other = actor("b").lock(cells(0, 10, "w"))
    hold.release()
    del hold
    with pytest.raises(TimeoutError):
        locks.acquire(cells(0, 10, "w"), timeout=0)
    other.release()


def test_new_thread_does_not_inherit_the_locks_of_an_ended_one(locks: CellLocks) -> None:
    first = Actor(locks, "first")
    hold = first.lock(cells(0, 10, "w"))
    first.end()
    for i in range(5):  # the system is quick to give its number to another
        other = Actor(locks, f"other {i}")
        with pytest.raises(TimeoutError, match="thread 'first'"):
            other.do(lambda: locks.acquire(cells(0, 10, "w"), timeout=0))
        other.end()
    hold.release()


def test_finalizer_may_release_in_the_middle_of_the_table(locks: CellLocks) -> None:
    def suspended() -> Iterator[None]:
        with locks.acquire(cells(0, 10, "r")):
            yield

    threshold = gc.get_threshold()
    gc.set_threshold(1)  # collect at almost every allocation of a container, those of the table included
    try:
        for _ in range(300):
            generator = suspended()
            next(generator)
            cycle: list[Any] = [generator]
            cycle.append(cycle)  # only the collector closes it
            del generator, cycle
            with locks.acquire(cells(10, 20, "w")):
                pass
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    locks.check()
    assert locks.statistics().granted == 0


def test_forget_frees_the_bytes_and_refuses_while_locked(locks: CellLocks) -> None:
    with locks.acquire(cells(0, 1, "r", extent=5)), pytest.raises(LockError, match="extent 5"):
        locks.forget(5)
    bases = {extent: locks.base(extent) for extent in (5, 6)}
    assert bases[5] != bases[6]
    locks.forget(5)
    locks.forget(5)
    assert locks.base(9) == bases[5]
    assert locks.base(6) == bases[6]


def test_extent_is_placed_where_another_process_has_it(locks: CellLocks) -> None:
    locks.place(5, 1 << 40)
    locks.place(5, 1 << 40)
    assert locks.base(5) == 1 << 40
    assert locks.base(6) > 1 << 40
    with pytest.raises(LockError, match="extent 5"):
        locks.place(5, 0)


def test_lock_file_is_private(locks: CellLocks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.fstat(locks.fileno()).st_mode & 0o777 == 0o600
    monkeypatch.delattr(os, "memfd_create")
    other = CellLocks()
    status = os.fstat(other.fileno())
    assert status.st_mode & 0o777 == 0o600 and status.st_nlink == 0
    with other.acquire(cells(0, 1, "w"), os_lock=True):
        assert byte_locks(other)
    fd = other.fileno()
    del other
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_of_many_threads_never_overlap(locks: CellLocks, seed: int) -> None:
    ncells = 12
    writers = [0] * ncells  # who writes the cell; changed by its holder alone
    readers = [[0] * 4 for _ in range(ncells)]
    problems: list[str] = []
    refused = [0] * 4
    start = threading.Barrier(4)

    def requests(rng: random.Random) -> list[LockRequest]:
        found = []
        for _ in range(rng.randrange(1, 4)):
            low = rng.randrange(ncells)
            found.append(LockRequest(1, low, min(ncells, low + rng.randrange(1, 4)), rng.choice("rrw")))
        return found

    def touch(me: int, asked: list[LockRequest]) -> Callable[[], None]:
        writes = {cell for r in asked if r.mode == "w" for cell in range(r.start, r.stop)}
        reads = {cell for r in asked for cell in range(r.start, r.stop)} - writes
        for cell in writes | reads:
            if writers[cell] not in (0, me) or (cell in writes and any(readers[cell][k] for k in range(4) if k != me - 1)):
                problems.append(f"{me} at {cell}: {writers[cell]} {readers[cell]}")
        fresh = {cell for cell in writes if writers[cell] == 0}
        for cell in fresh:
            writers[cell] = me
        for cell in reads:
            readers[cell][me - 1] += 1

        def undo() -> None:
            for cell in fresh:
                writers[cell] = 0
            for cell in reads:
                readers[cell][me - 1] -= 1

        return undo

    def work(me: int) -> None:
        rng = random.Random(100 * seed + me)
        start.wait()
        for _ in range(150):
            asked = requests(rng)
            with locks.acquire(asked, timeout=LONG_S, os_lock=rng.random() < 0.3):
                undo = touch(me, asked)
                if rng.random() < 0.3:
                    more = requests(rng)
                    try:
                        with locks.acquire(more, timeout=rng.choice((0, LONG_S))):
                            touch(me, more)()
                    except (LockError, TimeoutError):
                        refused[me - 1] += 1
                if rng.random() < 0.1:
                    locks.check()
                undo()

    def guarded(me: int) -> None:
        try:
            work(me)
        except BaseException as error:
            problems.append(f"{me}: {error!r}")

    threads = [threading.Thread(target=guarded, args=(me,), daemon=True) for me in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert problems == []
    assert not any(thread.is_alive() for thread in threads)
    assert locks.statistics().granted == 0
    assert not byte_locks(locks)


# Between processes ------------------------------------------------------------------------------------------------------------

OTHER = """
import errno, fcntl, sys
fd = int(sys.argv[1])
modes = {"r": fcntl.LOCK_SH, "w": fcntl.LOCK_EX}
print("ready", flush=True)
for line in sys.stdin:
    act, mode, byte, nbytes = line.split()
    try:
        if act == "try":
            fcntl.lockf(fd, modes[mode] | fcntl.LOCK_NB, int(nbytes), int(byte))
        elif act == "wait":
            fcntl.lockf(fd, modes[mode], int(nbytes), int(byte))
        else:
            fcntl.lockf(fd, fcntl.LOCK_UN, int(nbytes), int(byte))
        print("ok", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno] if error.errno != errno.EDEADLK else "EDEADLK", flush=True)
"""


class Other:
    """Another process that has inherited the lock file."""

    def __init__(self, fd: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", OTHER, str(fd)],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.answer() == "ready"

    def ask(self, act: str, mode: str, byte: int, nbytes: int) -> None:
        assert self.process.stdin is not None
        print(act, mode, byte, nbytes, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, act: str, mode: str, byte: int, nbytes: int = 1) -> str:
        self.ask(act, mode, byte, nbytes)
        return self.answer()

    def may(self, mode: str, byte: int, nbytes: int = 1) -> bool:
        """Return whether it gets these bytes now; it gives them back at once."""
        answer = self.tell("try", mode, byte, nbytes)
        if answer == "ok":
            self.tell("free", mode, byte, nbytes)
        assert answer in ("ok", "EAGAIN", "EACCES"), answer
        return answer == "ok"

    def wait_until_it_waits(self, locks: CellLocks) -> None:
        limit = time.monotonic() + LONG_S
        while not any("->" in line and f" {self.process.pid} " in line for line in byte_locks(locks)):
            assert time.monotonic() < limit, byte_locks(locks)
            time.sleep(0.001)  # between looks at the state that is waited for

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LONG_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def other(locks: CellLocks) -> Iterator[Other]:
    process = Other(locks.fileno())
    yield process
    process.kill()


def test_os_lock_excludes_another_process_until_released(locks: CellLocks, other: Other) -> None:
    base = locks.base(7)
    with locks.acquire(cells(2, 5, "w"), os_lock=True):
        assert [other.may("r", base + cell) for cell in range(7)] == [True, True, False, False, False, True, True]
        with locks.acquire(cells(5, 6, "r")):  # without os_lock the system hears nothing
            assert other.may("w", base + 5)
    assert other.may("w", base, 10)
    with locks.acquire(cells(2, 5, "r"), os_lock=True):
        assert other.may("r", base, 10)
        assert not other.may("w", base + 4)
    assert other.may("w", base, 10)


def test_os_lock_is_one_entry_for_adjacent_cells(locks: CellLocks) -> None:
    requests = [LockRequest(7, cell, cell + 1, "w") for cell in range(1000)]
    with locks.acquire(requests, os_lock=True):
        assert len(byte_locks(locks)) == 1
    assert not byte_locks(locks)


def test_os_lock_stays_until_the_last_reader_of_the_process(locks: CellLocks, actor: Make, other: Other) -> None:
    base = locks.base(7)
    one, two = actor("a").lock(cells(0, 6, "r"), os_lock=True), actor("b").lock(cells(4, 9, "r"), os_lock=True)
    one.release()
    assert [other.may("w", base + cell) for cell in (0, 3, 4, 5, 8, 9)] == [True, True, False, False, False, True]
    two.release()
    assert other.may("w", base, 10)


def test_reading_inside_writing_keeps_the_bytes_written_until_only_the_reading_is_left(locks: CellLocks, other: Other) -> None:
    base = locks.base(7)
    outer = locks.acquire(cells(0, 6, "w"), os_lock=True)
    inner = locks.acquire(cells(2, 8, "r"), os_lock=True)
    assert [other.may("r", base + cell) for cell in (0, 3, 6)] == [False, False, True]
    assert not other.may("w", base + 6)
    again = locks.acquire(cells(3, 4, "w"), os_lock=True)
    outer.release()
    assert [other.may("w", base + cell) for cell in range(9)] == [True, True, *[False] * 6, True]
    assert [other.may("r", base + cell) for cell in (2, 3, 4)] == [True, False, True]
    again.release()
    assert other.may("r", base + 3) and not other.may("w", base + 3)
    inner.release()
    assert other.may("w", base, 10)


def test_bytes_of_another_process_are_waited_for(locks: CellLocks, actor: Make, other: Other) -> None:
    base = locks.base(7)
    assert other.tell("try", "w", base + 3) == "ok"
    with pytest.raises(TimeoutError, match=rf"\[0, 5\) of extent 7 .* process {other.process.pid} holds"):
        locks.acquire(cells(0, 5, "w"), os_lock=True, timeout=0)
    assert other.may("w", base, 3), "bytes taken before the timeout were kept"
    waiting = actor("a").start(lambda: locks.acquire(cells(0, 5, "w"), os_lock=True))
    other.tell("free", "w", base + 3)
    waiting.result(LONG_S).release()
    assert other.may("w", base, 10)


def test_cancelled_while_another_process_holds(locks: CellLocks, other: Other) -> None:
    assert other.tell("try", "w", locks.base(7)) == "ok"
    with pytest.raises(CancelledError, match="another process"):
        locks.acquire(cells(0, 5, "w"), os_lock=True, cancelled=lambda: True)
    assert locks.statistics().granted == 0


def test_signal_interrupts_waiting_for_another_process(locks: CellLocks, other: Other, alarm: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        other.tell("try", "w", locks.base(7))
        locks.acquire(cells(0, 5, "w"), os_lock=True)
    assert locks.statistics().granted == 0


def test_killed_holder_frees_its_bytes(locks: CellLocks, actor: Make, other: Other) -> None:
    assert other.tell("try", "w", locks.base(7)) == "ok"
    waiting = actor("a").start(lambda: locks.acquire(cells(0, 5, "w"), os_lock=True))
    other.kill()
    waiting.result(LONG_S).release()


READER = """
import sys, time
from scheduler.locks import CellLocks
from scheduler.task import LockRequest
locks = CellLocks(int(sys.argv[1]))
locks.place(7, int(sys.argv[2]))
print("ready", flush=True)
while True:  # always reading, but for moments
    with locks.acquire([LockRequest(7, 0, 3, "r")], os_lock=True):
        time.sleep(0.005)
"""


def test_readers_of_other_processes_do_not_shut_a_writer_out(locks: CellLocks) -> None:
    command = [sys.executable, "-c", READER, str(locks.fileno()), str(locks.base(7))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    readers = [subprocess.Popen(command, pass_fds=[locks.fileno()], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        for reader in readers:
            assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
        for _ in range(50):  # without the turnstile one turn takes seconds
            locks.acquire(cells(1, 2, "w"), os_lock=True, timeout=LONG_S).release()
    finally:
        for reader in readers:
            reader.kill()
            reader.wait(LONG_S)
            if reader.stdout is not None:
                reader.stdout.close()
    assert not byte_locks(locks)


def test_who_holds_other_bytes_goes_past_the_turnstile(locks: CellLocks, other: Other) -> None:
    base = locks.base(7)
    with locks.acquire(cells(0, 1, "r"), os_lock=True):
        # A writer of both cells, which waits for the first: it stands in the turnstile of both.
        assert other.tell("try", "w", 2**62 + base, 2) == "ok"
        other.ask("wait", "w", base, 2)
        other.wait_until_it_waits(locks)
        locks.acquire(cells(1, 2, "r"), os_lock=True, timeout=LONG_S).release()
    assert other.answer() == "ok"


def test_deadlock_between_processes_raises(locks: CellLocks, other: Other) -> None:
    base = locks.base(7)
    hold = locks.acquire(cells(0, 1, "w"), os_lock=True)
    assert other.tell("try", "w", base + 1) == "ok"
    other.ask("wait", "w", base, 1)
    other.wait_until_it_waits(locks)
    with pytest.raises(LockError, match=r"between processes.*deadlock"):
        locks.acquire(cells(1, 2, "w"), os_lock=True)
    hold.release()
    assert other.answer() == "ok"
    other.tell("free", "w", base, 2)
    locks.acquire(cells(1, 2, "w"), os_lock=True, timeout=LONG_S).release()


def test_what_only_looks_like_a_deadlock_between_processes_is_waited_out(locks: CellLocks, actor: Make, other: Other) -> None:
    base = locks.base(7)
    hold = locks.acquire(cells(0, 1, "w"), os_lock=True)  # this thread waits for nobody
    assert other.tell("try", "w", base + 1) == "ok"
    other.ask("wait", "w", base, 1)
    other.wait_until_it_waits(locks)
    waiting = actor("a").start(lambda: locks.acquire(cells(1, 2, "w"), os_lock=True))
    hold.release()
    assert other.answer() == "ok"
    other.tell("free", "w", base, 2)
    waiting.result(LONG_S).release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # 3.12: fork with threads; the child only locks and leaves
def test_forked_child_starts_with_an_empty_table_and_leaves_the_parent_alone(locks: CellLocks, actor: Make, other: Other) -> None:
    a = actor("a")
    theirs, mine = a.lock(cells(0, 5, "w"), os_lock=True), locks.acquire(cells(5, 8, "w"))
    with locks._mutex:  # as if another thread had it in the moment of the fork
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert locks.statistics().granted == 0
            assert locks.held_by_caller(7, 5, 8) is None
            try:
                locks.acquire(cells(0, 1, "w"), os_lock=True, timeout=0)  # the parent's byte
            except TimeoutError:
                with locks.acquire(cells(0, 8, "w"), timeout=0):  # of this process alone
                    theirs.release()
                    mine.release()
                    locks.check()
                    assert locks.held_by_caller(7, 0, 8) == "w"
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert locks.statistics().granted == 2
    assert locks.held_by_caller(7, 5, 8) == "w"
    assert not other.may("r", locks.base(7))
    theirs.release()
    mine.release()


def test_table_over_an_inherited_file_excludes_the_maker(locks: CellLocks) -> None:
    script = (
        "import sys; from scheduler.locks import CellLocks; from scheduler.task import LockRequest\n"
        "locks = CellLocks(int(sys.argv[1])); locks.place(3, int(sys.argv[2]))\n"
        "try: locks.acquire([LockRequest(3, 4, 5, 'r')], os_lock=True, timeout=0)\n"
        "except TimeoutError as error: print(error)\n"
        "locks.acquire([LockRequest(3, 5, 6, 'r')], os_lock=True, timeout=0); print('free')\n"
    )
    fd = locks.fileno()
    with locks.acquire(cells(4, 5, "w"), os_lock=True):
        command = [sys.executable, "-c", script, str(fd), str(locks.base(7))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, pass_fds=[fd], env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    assert f"process {os.getpid()} holds" in done.stdout and done.stdout.endswith("free\n")


def test_an_owner_that_goes_has_its_bytes_forgotten_quietly_even_while_held(locks: CellLocks) -> None:
    class Owner:
        pass

    owners = [Owner(), Owner()]
    bases = []
    for extent, owner in enumerate(owners):
        locks.forget_after(owner, extent)
        locks.acquire(cells(0, 1, "w", extent), os_lock=True).release()
        bases.append(locks.base(extent))
    hold = locks.acquire(cells(0, 1, "w", 1), os_lock=True)
    owners.clear()
    del owner
    gc.collect()
    assert locks.base(10) == bases[0]  # the other still has a holder
    assert locks.base(11) not in bases
    hold.release()
    assert locks.base(12) == bases[1]
    locks.check()


class Crowd:
    """What processes tell each other, in one process."""

    def __init__(self) -> None:
        self.waits: list[bool] = []
        self.says = False

    def anybody_waits(self) -> bool:
        return self.says

    def say_waits(self, waits: bool) -> None:
        self.waits.append(waits)


@pytest.mark.parametrize("somebody_waits, told", [(False, []), (True, [True, False])])
def test_free_bytes_are_taken_past_the_turnstile_unless_somebody_waits(somebody_waits: bool, told: list[bool]) -> None:
    crowd = Crowd()
    locks = CellLocks(crowd=crowd)
    locks.place(7, 0)
    crowd.says = somebody_waits

    with locks.acquire(cells(0, 4, "w"), os_lock=True):
        assert crowd.waits == told
    locks.check()


def test_work_done_briefly_needs_a_cell_that_nobody_holds() -> None:
    locks = CellLocks()
    locks.place(7, 0)

    assert locks.briefly(7, 3, lambda: "done") == "done"
    with locks.acquire(cells(3, 4, "r"), os_lock=True), pytest.raises(BlockingIOError):
        locks.briefly(7, 3, lambda: "done")
    with pytest.raises(ZeroDivisionError):
        locks.briefly(7, 3, lambda: 1 // 0)
    assert locks.briefly(7, 3, lambda: "done") == "done"
