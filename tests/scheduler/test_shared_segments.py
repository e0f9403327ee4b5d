"""Shared segments: memory that outlives its maker, between processes that are started, forked and killed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from soak import SOAK_MINUTES

from scheduler import locks, shared
from scheduler.errors import AbandonedLockError, HandleExpired, LockError, SharedMemoryError
from scheduler.shared import Lease, Segment, family

pytestmark = pytest.mark.timeout(120)

LONG_S = 60.0  # longer than anything takes; a test that gets there has failed
CHAOS_S = 6 * SOAK_MINUTES or 4.0
HERE = Path(__file__).parent
OURS = [tracemalloc.Filter(True, module.__file__) for module in (shared, locks)]


@pytest.fixture
def segment() -> Iterator[Segment]:
    """The family's segment; a test leaves nothing in it."""
    gc.collect()
    before = family().statistics()["arrays"]
    yield family()
    gc.collect()
    family().check()
    wait_until(lambda: family().statistics()["arrays"] <= before)


def wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


@contextlib.contextmanager
def child(act: Callable[[Any], None]) -> Iterator[tuple[int, Any]]:
    """Fork a child that calls ``act(file)``; give its pid, and the other end of a pipe that ``file`` writes to."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb", buffering=0) as file:
                act(file)
            status = 0
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as file:
            yield pid, file
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def wait_child(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fill(lease: Lease, value: int) -> None:
    np.asarray(lease)[:] = value


def make(value: int = 7, nbytes: int = 10_000, cells: int = 4) -> Lease:
    lease = family().allocate(nbytes, cells=cells, meta=b"meta")
    fill(lease, value)
    return lease


def test_a_lease_has_what_was_given(segment: Segment) -> None:
    lease = segment.allocate(1000, cells=3, meta=b"what it is")

    assert (lease.nbytes, lease.meta, list(lease.cells)) == (1000, b"what it is", [0, 0, 0])
    assert np.asarray(lease).nbytes == 1000 and np.asarray(lease).flags.writeable


def test_memory_goes_when_the_last_view_of_it_does(segment: Segment) -> None:
    before = segment.statistics()["arrays"]
    lease = make()
    view = np.asarray(lease)[10:20]
    del lease

    assert segment.statistics()["arrays"] == before + 1 and view[0] == 7
    del view
    assert segment.statistics()["arrays"] == before


def test_a_child_that_ends_first_leaves_what_it_made(segment: Segment) -> None:
    with child(lambda file: file.write(make(9).handle())) as (pid, file):
        assert wait_child(pid) == 0
        lease = shared.receive(file.read())

    assert (np.asarray(lease) == 9).all() and lease.meta == b"meta"
    assert list(segment.statistics()["owners"]) == [os.getpid()]


def test_what_a_killed_process_held_is_freed(segment: Segment) -> None:
    before = segment.statistics()["arrays"]

    def act(file: Any) -> None:
        keep = [make(nbytes=1 << 20) for _ in range(3)]
        file.write(b"made")
        signal.pause()
        del keep

    with child(act) as (pid, file):
        assert file.read(4) == b"made"
        assert segment.statistics()["arrays"] == before + 3
        os.kill(pid, signal.SIGKILL)
        wait_child(pid)
        wait_until(lambda: segment.statistics()["arrays"] == before)


def test_a_forked_child_holds_what_its_parent_held(segment: Segment) -> None:
    leases = [make(5)]
    go, told = os.pipe()

    def act(file: Any) -> None:
        os.read(go, 1)  # the parent has let go
        others = [make(6) for _ in range(20)]  # would take its place
        file.write(bytes([int((np.asarray(leases[0]) == 5).all()), len(others)]))

    with child(act) as (pid, file):
        number = leases.pop().number
        gc.collect()
        owners = segment.table.holders(number)
        os.write(told, b"x")
        assert file.read(2) == b"\x01\x14"
        assert wait_child(pid) == 0
    assert len(owners) == 1, "the child alone"
    os.close(go)
    os.close(told)


def test_a_fork_is_prepared_while_another_has_not_returned_to_its_parent(segment: Segment) -> None:
    """The embryo's byte of a row is locked by the parent until it returns, when the child may be dead and its row free again."""
    leases = [make(5)]
    segment._before_fork()
    assert segment._embryo is not None
    row, _ = segment._embryo
    segment.table.abandon(row)
    stale, segment._embryo = segment._embryo, None

    segment._before_fork()
    embryo = segment._embryo
    segment._after_fork_in_parent()

    os.close(stale[1])
    assert embryo is not None and embryo[0] != row
    del leases


def test_a_fork_that_could_not_be_prepared_leaves_nothing_locked(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    lease = make(5)
    fds = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(segment.table, "_set", interrupt)
        with pytest.raises(KeyboardInterrupt):
            segment._before_fork()

    assert os.listdir("/proc/self/fd") == fds and segment._embryo is None
    del lease


def test_what_was_let_go_of_and_interrupted_leaves_the_number_to_the_next(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = [make()]
    number, drop = leases[0].number, segment.table.drop

    def drop_and_stop(row: int, obj: int) -> None:
        drop(row, obj)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(segment.table, "drop", drop_and_stop)
        with pytest.raises(MemoryError):
            segment._locked(leases.clear)
    assert segment._dropped
    after = make(3)

    assert after.number == number and segment.table.holders(number) == [segment.row]


def test_what_an_interrupted_allocation_left_to_be_used_is_not_taken_later(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may have it by then; journals allocate without a sweep, which would look again."""
    nbytes = 100_000
    number = segment.allocate(nbytes).number  # dropped at once

    def strike(*_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(segment.table, "allocate", strike)
        segment.allocate(nbytes)

    def take(file: Any) -> None:
        lease = segment.allocate(nbytes)
        file.write(lease.number.to_bytes(8, "little"))
        signal.pause()

    with child(take) as (_, file):
        assert int.from_bytes(file.read(8), "little") == number
        length = segment.table.extent(number)[1]
        mine = segment._locked(lambda: segment.table.allocate(segment.row, length, nbytes))[0]
        segment.table.drop(segment.row, mine)
    assert mine != number


def test_a_child_of_a_child_is_reached_when_all_before_it_ended(segment: Segment) -> None:
    def act(file: Any) -> None:
        lease = make(3)
        if os.fork() == 0:
            file.write(lease.handle())
            os._exit(0)
        os.wait()

    with child(act) as (pid, file):
        assert wait_child(pid) == 0
        lease = shared.receive(file.read())
    assert (np.asarray(lease) == 3).all()


def test_an_expired_handle_says_so(segment: Segment) -> None:
    lease = make()
    handle = lease.handle()
    assert shared.receive(handle) is lease
    del lease
    gc.collect()
    segment.statistics()

    with pytest.raises(HandleExpired, match=r"it was freed\. Nobody holds it any more"):
        shared.receive(handle)


def test_the_handle_of_a_family_that_has_ended_says_so() -> None:
    code = "from scheduler import shared; import sys; sys.stdout.write(shared.family().allocate(10).handle().hex())"
    environment = {name: value for name, value in os.environ.items() if name != shared.ROOT}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=LONG_S)
    assert (done.returncode, done.stderr) == (0, "")

    with pytest.raises(HandleExpired, match=r"neither that process nor the first of its family can be\s+reached"):
        shared.receive(bytes.fromhex(done.stdout))


def test_an_unrelated_process_is_reached_through_the_sender() -> None:
    """A family of its own, found by what the handle says alone."""
    code = (
        "from scheduler import shared; import sys; a = shared.family().allocate(10); print(a.handle().hex(), flush=True); sys.stdin.read()"
    )
    environment = {name: value for name, value in os.environ.items() if name != shared.ROOT}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdin and other.stdout
        lease = shared.receive(bytes.fromhex(other.stdout.readline()))
        assert lease.segment is not family()
        fill(lease, 4)
        other.stdin.close()
        assert other.wait(LONG_S) == 0
    assert (np.asarray(lease) == 4).all()
    assert list(lease.segment.statistics()["owners"]) == [os.getpid()]


def test_files_are_private_sealed_and_without_names() -> None:
    segment = family()
    for fd in (segment.data_fd, segment.table_fd, segment.lock_fd, segment.embryo_fd):
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)


def test_freed_memory_is_used_again_and_trimmed(segment: Segment) -> None:
    lease = make(nbytes=4 << 20)
    offset = lease.offset
    del lease
    lease = make(nbytes=4 << 20)
    assert lease.offset == offset

    assert not lease.is_cold()
    del lease
    assert segment.statistics()["warm_nbytes"] >= 4 << 20
    assert segment.trim() >= 4 << 20
    statistics = segment.statistics()
    assert statistics["warm_nbytes"] == 0
    assert segment.allocate(4 << 20).is_cold()


def test_only_so_much_freed_memory_is_kept(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "WARM_LIMIT_NBYTES", 4 << 20)
    leases = [make(nbytes=2 << 20) for _ in range(8)]

    leases.clear()

    assert segment.statistics()["warm_nbytes"] <= 4 << 20


def test_threads_allocate_send_receive_and_drop_together(segment: Segment) -> None:
    failures: list[BaseException] = []

    def work(value: int) -> None:
        try:
            for i in range(60):
                lease = make(value, nbytes=5000 + 100 * i)
                other = shared.receive(lease.handle())
                assert other is lease
                del lease
                assert (np.asarray(other) == value).all()
                with other.lock([(0, 1)], "w"):
                    pass
                other.segment.statistics()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_an_operation_inside_another_of_its_thread_is_refused(segment: Segment) -> None:
    def inside() -> None:
        segment.allocate(10)

    with pytest.raises(SharedMemoryError, match="from a finalizer or signal handler"):
        segment._locked(inside)
    segment.allocate(10)


def test_what_is_dropped_in_the_middle_of_an_operation_is_let_go_after_it(segment: Segment) -> None:
    leases = [make()]
    number = leases[0].number

    segment._locked(leases.clear)

    assert segment.table.holders(number) == []


def test_what_threads_drop_at_once_is_let_go_by_one_of_them(segment: Segment) -> None:
    start = threading.Barrier(6)

    def drop(mine: list[Lease]) -> None:
        start.wait()
        mine.clear()

    for _ in range(30):
        leases = [[make(nbytes=10)] for _ in range(6)]
        numbers = [lease[0].number for lease in leases]
        threads = [threading.Thread(target=drop, args=(mine,)) for mine in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [segment.table.holders(number) for number in numbers] == [[]] * 6


def test_writers_exclude_each_other_between_processes_and_readers_do_not(segment: Segment) -> None:
    lease = make()

    def act(file: Any) -> None:
        with lease.lock([(0, 1)], "r", timeout=LONG_S):
            file.write(b"r")
        try:
            lease.lock([(0, 1)], "w", timeout=0.02)
        except TimeoutError as error:
            file.write(str(error).encode())

    with lease.lock([(0, 1)], "r"), child(act) as (pid, file):
        text = file.read().decode()
        assert wait_child(pid) == 0
    assert text.startswith("r") and f"process {os.getpid()}" in text


def test_the_next_owner_of_what_a_dead_writer_held_is_told_once(segment: Segment) -> None:
    lease = make()

    def act(file: Any) -> None:
        with lease.lock([(1, 3)], "w"):
            file.write(b"locked")
            signal.pause()

    for mode in ("w", "r"):
        with child(act) as (pid, file):
            assert file.read(6) == b"locked"
            with pytest.raises(TimeoutError, match=f"process {pid}"):
                lease.lock([(2, 3)], mode, timeout=0.02)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(AbandonedLockError, match=rf"locking 2 cells \(1, 2\) of a shared array: process {pid} held them to write"):
                lease.lock([(0, 4)], mode, timeout=LONG_S)
        with lease.lock([(0, 4)], mode):
            pass
        assert list(lease.cells) == [0, 0, 0, 0]


def test_a_dead_reader_leaves_nothing_to_tell(segment: Segment) -> None:
    lease = make()

    def act(file: Any) -> None:
        with lease.lock([(0, 1)], "r"):
            file.write(b"locked")
            signal.pause()

    with child(act) as (pid, file):
        assert file.read(6) == b"locked"
        os.kill(pid, signal.SIGKILL)
        with lease.lock([(0, 1)], "w", timeout=LONG_S):
            pass


def test_a_thread_takes_its_own_lock_again_and_the_mark_stays_till_the_end(segment: Segment) -> None:
    lease = make()

    with lease.lock([(0, 2)], "w"):
        with lease.lock([(1, 3)], "w"):
            assert all(lease.cells[:3])
        assert all(lease.cells[:2]) and not lease.cells[2]
        with lease.lock([(0, 1)], "r"):
            pass
        assert lease.alone(lambda: lease.cells[0]) != 0
    assert not any(lease.cells)


def marks(lease: Lease) -> list[bool]:
    return [bool(mark) for mark in lease.cells]


def test_a_lock_inside_another_that_is_released_before_it_keeps_its_mark(segment: Segment) -> None:
    lease = make()
    outer = lease.lock([(0, 3)], "w")
    reader = lease.lock([(0, 1)], "r")
    inner = lease.lock([(1, 2)], "w")
    last = lease.lock([(1, 4)], "w")

    outer.release()
    assert marks(lease) == [False, True, True, True]
    assert segment.locks.holds(lease.number + 1) == [reader, inner, last]
    with lease.lock([(1, 2)], "w"):
        pass
    inner.release()
    assert marks(lease) == [False, True, True, True]
    last.release()
    assert marks(lease) == [False] * 4
    reader.release()


def test_who_dies_in_the_inner_of_two_locks_is_told_though_the_outer_was_released(segment: Segment) -> None:
    lease = make()

    def act(file: Any) -> None:
        outer = lease.lock([(0, 2)], "w")
        inner = lease.lock([(1, 2)], "w")
        outer.release()
        file.write(b"locked")
        signal.pause()
        inner.release()

    with child(act) as (pid, file):
        assert file.read(6) == b"locked"
        with lease.lock([(0, 1)], "w"):
            pass
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(AbandonedLockError, match=rf"1 cell \(1\) of a shared array: process {pid}"):
            lease.lock([(0, 4)], "w", timeout=LONG_S)


def test_a_lock_inside_one_that_was_dropped_is_marked_when_that_has_been_told(segment: Segment) -> None:
    lease = make()
    kept = [lease.lock([(0, 2)], "w")]
    inner = lease.lock([(0, 1)], "w")
    kept.clear()

    with pytest.raises(AbandonedLockError, match=r"2 cells \(0, 1\)"):
        lease.lock([(0, 4)], "w")
    assert marks(lease) == [True, False, False, False]
    inner.release()
    assert marks(lease) == [False] * 4


def test_locks_that_are_dropped_leave_nothing_behind_in_this_process(segment: Segment) -> None:
    lease = make(0)

    def lock() -> None:
        with contextlib.suppress(AbandonedLockError):
            lease.lock([(0, 4)], "w")

    for _ in range(10):
        lock()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(1000):
            lock()
        gc.collect()
        kept = sum(each.size for each in tracemalloc.take_snapshot().filter_traces(OURS).statistics("filename"))
    finally:
        tracemalloc.stop()
    assert kept < 10_000, "ten bytes for each of them"
    with contextlib.suppress(AbandonedLockError):
        lease.lock([(0, 4)], "w").release()


def test_a_reader_inside_another_is_told_of_a_dead_writer_beside(segment: Segment) -> None:
    lease = make()

    with lease.lock([(0, 1)], "r"):
        lease.lock([(2, 3)], "w")
        with pytest.raises(AbandonedLockError, match=r"1 cell \(2\)"):
            lease.lock([(0, 4)], "r")
        with lease.lock([(0, 4)], "r"):
            pass


def test_a_child_forked_under_a_lock_leaves_it_to_its_parent(segment: Segment) -> None:
    lease = make()

    with lease.lock([(0, 1)], "w") as hold:
        with child(lambda file: hold.release()) as (pid, _):
            assert wait_child(pid) == 0
        assert lease.cells[0] >> 32 == os.getpid()
        with child(lambda file: file.write(type_of_error(lambda: lease.lock([(0, 1)], "w", timeout=0.02)))) as (pid, file):
            assert file.read() == b"TimeoutError"
    assert not lease.cells[0]


def lock_at_once(lease: Lease) -> bytes:
    """Return how a forked child, to whom no lock of its parent belongs, fares with all cells."""
    with child(lambda file: file.write(type_of_error(lambda: lease.lock([(0, 4)], "w", 0).release()))) as (_, file):
        return bytes(file.read())


def test_a_lock_that_is_dropped_is_free_for_others_who_are_told(segment: Segment) -> None:
    lease = make()

    lease.lock([(1, 3)], "w")

    assert segment.statistics()["locks"] == []
    assert lock_at_once(lease) == b"AbandonedLockError"
    assert lock_at_once(lease) == b"none"
    lease.lock([(0, 4)], "r")
    assert lock_at_once(lease) == b"none"


def drop_together(box: list[Any]) -> None:
    box.clear()


def drop_as_a_circle(box: list[Any]) -> None:
    box[0].memo = tuple(box)  # the collector alone finds it, in an order of its own
    box.clear()
    gc.collect()


def drop_inside_the_table(box: list[Any]) -> None:
    family()._locked(box.clear)


def drop_inside_the_locks(box: list[Any]) -> None:
    family().locks._read(box.clear)


def drop_while_a_thread_is_inside_the_locks(box: list[Any]) -> None:
    inside, may_go = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: family().locks._read(lambda: inside.set() or may_go.wait()))
    thread.start()
    inside.wait()
    number = box[0].number
    box.clear()
    assert family().table.holders(number), "it was let go of while its cells were locked"
    may_go.set()
    thread.join()


def drop_while_a_thread_is_inside_the_table(box: list[Any]) -> None:
    inside, may_go = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: family()._locked(lambda: inside.set() or may_go.wait()))
    thread.start()
    inside.wait()
    box.clear()
    may_go.set()
    thread.join()


@pytest.mark.parametrize("mode", ["r", "w"])
@pytest.mark.parametrize(
    "drop",
    [
        drop_together,
        drop_as_a_circle,
        drop_inside_the_table,
        drop_inside_the_locks,
        drop_while_a_thread_is_inside_the_locks,
        drop_while_a_thread_is_inside_the_table,
    ],
)
def test_a_lock_that_is_dropped_with_its_memory_does_not_hold_what_comes_after(
    segment: Segment, drop: Callable[[list[Any]], None], mode: str
) -> None:
    box: list[Any] = [make()]
    number = box[0].number
    box.append(box[0].lock([(1, 3)], mode))

    drop(box)

    assert segment.table.holders(number) == []
    after = make()
    assert after.number == number
    assert lock_at_once(after) == b"none"


def test_of_many_that_are_collected_with_their_locks_all_go(segment: Segment) -> None:
    others = [make(nbytes=10) for _ in range(50)]
    leases = [make(nbytes=10) for _ in range(50)]
    numbers = [lease.number for lease in leases]
    for lease in leases:
        lease.memo = lease, lease.lock([(0, 1)], "w"), lease.lock([(0, 1)], "r"), leases

    del leases, lease
    gc.collect()

    assert [segment.table.holders(number) for number in numbers] == [[]] * 50
    assert segment.locks.statistics().granted == 0
    assert segment.statistics()["locks"] == []
    assert all(segment.table.holders(other.number) for other in others)


def type_of_error(act: Callable[[], Any]) -> bytes:
    try:
        act()
    except Exception as error:
        return type(error).__name__.encode()
    return b"none"


def test_a_deadlock_between_processes_is_told_with_the_pid(segment: Segment) -> None:
    lease = make()
    go, told = os.pipe()

    def act(file: Any) -> None:
        with lease.lock([(1, 2)], "w"):
            file.write(b"l")
            os.read(go, 1)
            with contextlib.suppress(LockError):
                lease.lock([(0, 1)], "w").release()
                file.write(b"granted")

    with child(act) as (pid, file):
        text = ""
        with lease.lock([(0, 1)], "w"):
            assert file.read(1) == b"l"
            os.write(told, b"x")
            try:
                lease.lock([(1, 2)], "w").release()
            except LockError as error:
                text = str(error)
        other = file.read()
        assert wait_child(pid) == 0
    assert bool(text) or other != b"granted", "one of the two is refused"
    assert not text or (f"process {pid}" in text and "the system found a deadlock" in text)
    os.close(go)
    os.close(told)


def test_who_waits_is_seen_by_the_others_who_then_stand_in_turn(segment: Segment) -> None:
    """Others take a cell past the turnstile only as long as nobody says that it waits: else readers would shut a writer out."""
    lease = make()

    def write(file: Any) -> None:
        with lease.lock([(0, 1)], "w"):
            file.write(b"w")

    def read(file: Any) -> None:
        with contextlib.suppress(TimeoutError):
            lease.lock([(0, 1)], "r", timeout=0.05).release()
            file.write(b"r")

    assert not segment.anybody_waits()
    with lease.lock([(0, 1)], "r") as hold, child(write) as (writer, written):
        wait_until(segment.anybody_waits)
        with child(read) as (_, told):
            assert told.read() == b"", "it went past the writer who waits"
        hold.release()
        assert written.read() == b"w"
        assert wait_child(writer) == 0
    assert not segment.anybody_waits()


def test_processes_count_exactly_under_a_lock_and_alone(segment: Segment) -> None:
    lease = make(0, nbytes=16)
    numbers = np.asarray(lease).view(np.int64)

    def act(file: Any) -> None:
        def add() -> None:
            numbers[0] += 1

        for _ in range(500):
            lease.alone(add)
            with lease.lock([(0, 1)], "w"):
                numbers[0] += 1

    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(child(act))[0] for _ in range(4)]
        assert [wait_child(pid) for pid in pids] == [0] * 4
    assert numbers[0] == 4000


def test_statistics_name_who_holds_and_who_waits(segment: Segment) -> None:
    lease = make(cells=8)

    def act(file: Any) -> None:
        lease.lock([(2, 4)], "w").release()

    with lease.lock([(3, 5)], "w"), child(act) as (pid, _):
        wait_until(lambda: any(held["pid"] == pid for held in segment.statistics()["locks"]))
        statistics = segment.statistics()
    held = [lock for lock in statistics["locks"] if lock["pid"] == os.getpid() and not lock["waits"]]
    assert {"array": lease.number, "cells": (3, 5), "mode": "w", "pid": os.getpid(), "waits": False} in held
    assert statistics["owners"].keys() >= {os.getpid(), pid}


def test_nothing_of_multiprocessing_is_started() -> None:
    code = "import sys; from scheduler.shared import family; a = family().allocate(10); a.handle(); print(*sys.modules)"

    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=LONG_S)

    assert (done.returncode, done.stderr) == (0, "")
    assert "scheduler.shared" in done.stdout.split() and "multiprocessing.resource_tracker" not in done.stdout.split()


@pytest.mark.slow
@pytest.mark.timeout(CHAOS_S + 110)
def test_nothing_is_torn_lost_or_left_whoever_is_killed() -> None:
    environment = {name: value for name, value in os.environ.items() if name != shared.ROOT}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "chaos_shared.py"), str(CHAOS_S), "1"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=CHAOS_S + 100,
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = json.loads(done.stdout)
    assert found["violations"] == found["left"] == found["resident"] == 0
    assert found["kills"] > 10 and found["received"] > 10, "it did something"
