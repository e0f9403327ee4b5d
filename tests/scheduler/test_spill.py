"""The spill file: reserved, copied in and out, given back; and what is said when the disk does not do its part."""

from __future__ import annotations

import concurrent.futures
import errno
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import run, spill
from scheduler.errors import MemoryBudgetError, SpillError
from scheduler.run import Pool
from scheduler.segments import Memory
from scheduler.spill import SpillFile, default_directory
from scheduler.task import ARENA, SPILL, Address, Buffer, Context, Dependency, Layer, Outcome, Plan

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> SpillFile:
    return SpillFile.make(str(tmp_path))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool(2, memory_limit=8 * MIB, spill_directory=str(tmp_path)) as made:
        yield made


def test_the_file_has_no_name_and_is_its_owners_alone(file: SpillFile, tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []
    status = os.fstat(file.fd)
    assert (status.st_nlink, status.st_mode & 0o777) == (0, 0o600)
    assert not os.get_inheritable(file.fd)


def test_where_there_are_no_nameless_files_one_is_made_and_unlinked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    made = SpillFile.make(str(tmp_path))

    made.reserve(0, 10)
    made.write_from(memoryview(b"0123456789"), 0)
    assert list(tmp_path.iterdir()) == []


def test_the_descriptor_is_closed_when_the_last_user_goes(tmp_path: Path) -> None:
    made = SpillFile.make(str(tmp_path))
    fd = made.fd
    del made
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_reserving_takes_disk_and_punching_gives_it_back(file: SpillFile) -> None:
    assert file.resident_nbytes() == 0
    file.reserve(3 * MIB, 2 * MIB)
    assert 2 * MIB <= file.resident_nbytes() < 3 * MIB
    file.punch(3 * MIB, 2 * MIB)
    assert file.resident_nbytes() < MIB


def test_memory_is_no_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if Path("/dev/shm").is_dir():
        monkeypatch.setattr(spill.tempfile, "gettempdir", lambda: "/dev/shm")
        assert default_directory() in ("/var/tmp", None)
    monkeypatch.setattr(spill, "_is_on_disk", lambda directory: False)
    assert default_directory() is None
    monkeypatch.setattr(spill, "_is_on_disk", lambda directory: directory == str(tmp_path))
    monkeypatch.setattr(spill.tempfile, "gettempdir", lambda: str(tmp_path))
    assert default_directory() == str(tmp_path)
    monkeypatch.setattr(spill.tempfile, "gettempdir", none_usable)
    assert default_directory() is None


def none_usable() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")


def test_descriptors_that_are_used_up_are_told_and_no_reason_to_never_spill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def used_up(directory: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(run, "default_directory", lambda: str(tmp_path))
    with Pool(0, memory_limit=8 * MIB) as made:
        with monkeypatch.context() as patch:
            patch.setattr(spill, "_open_nameless", used_up)
            with pytest.raises(SpillError, match=r"Too many open files\. Close files") as caught:
                made.allocate(16 * MIB)
            assert caught.value.errno == errno.EMFILE
        assert made.allocate(16 * MIB).address.segment == SPILL


# ---------------------------------------------------------------------------------------------------------------- boxes


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...], str]:
    """A C-ordered base, steps per axis that make a view of it, a box of that view, a dtype."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    steps = tuple(draw(st.sampled_from((1, 2, -1, -3))) for _ in shape)
    seen = [len(range(n)[::s]) for n, s in zip(shape, steps, strict=True)]
    box = []
    for n in seen:
        low = draw(st.integers(0, n))
        box.append(slice(low, draw(st.integers(low, n))))
    return shape, steps, tuple(box), draw(st.sampled_from(("u1", "f8", "c16", "M8[s]", "?")))


@settings(max_examples=200, deadline=None)
@given(case=boxes(), gap=st.sampled_from((-1, 1 << 13)), order=st.permutations(range(3)))
def test_boxes_are_read_and_written_as_those_of_an_array(case: Any, gap: int, order: list[int], tmp_path_factory: Any) -> None:
    shape, steps, box, name = case
    dtype = np.dtype(name)
    base = np.arange(np.prod(shape)).astype("u1").astype(dtype).reshape(shape)
    made = SpillFile.make(str(tmp_path_factory.getbasetemp()))
    made.reserve(100, base.nbytes)
    made.write_from(memoryview(base.reshape(-1).view(np.uint8)), 100)  # type: ignore[arg-type]  # an array is a buffer
    view = base[tuple(slice(None, None, s) for s in steps)].transpose([a for a in order if a < base.ndim])
    offset = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    memory = Memory(np.empty(0, np.uint8), spill=made)
    box = tuple(slice(min(p.start, n), min(p.stop, n)) for p, n in zip(box, view.shape, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduler.segments.WIDEST_GAP_NBYTES", gap)
        window = memory.window(Address(SPILL, 100), offset, view.shape, view.strides, dtype)[box]

        assert not isinstance(window, np.ndarray)
        np.testing.assert_array_equal(window.read(), view[box])
        fresh = np.full(view[box].shape, 1).astype(dtype)
        window.write(fresh)
        view[box] = fresh

    found = bytearray(base.nbytes)
    made.read_into(memoryview(found), 100)
    np.testing.assert_array_equal(np.frombuffer(bytes(found), np.uint8), base.reshape(-1).view(np.uint8))


def test_what_was_written_leaves_a_page_cache_that_has_no_room(file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int, int]] = []
    room = [False]
    monkeypatch.setattr(spill, "page_cache_has_room", lambda: room[0])
    monkeypatch.setattr(file, "_send", lambda start, stop, flags: sent.append((start, stop, flags)))
    for k in range(48):
        file.written([(k * MIB, (k + 1) * MIB)])

    begun = [(start, stop) for start, stop, flags in sent if flags == 2]
    waited = [(start, stop) for start, stop, flags in sent if flags == 7]
    assert begun == [(k * 8 * MIB, (k + 1) * 8 * MIB) for k in range(6)]
    assert waited == begun[:-1]  # one step behind
    room[0] = True
    sent.clear()
    for k in range(48):
        file.written([(k * MIB, (k + 1) * MIB)])
    assert sent == []


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_full_disk_is_told_with_numbers_and_changes_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = pool.allocate(20 * MIB)
    before = pool.statistics()

    def full(fd: int, offset: int, nbytes: int) -> None:
        os.pwrite(fd, b"x" * 4096, offset)  # part of it was taken
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SpillError, match=r"30 MiB.*free.*disk is full.*spill_directory") as caught:
        pool.allocate(30 * MIB)

    error = caught.value
    assert (error.path, error.needed_nbytes, error.errno) == (str(tmp_path), 30 * MIB, errno.ENOSPC)
    assert error.free_nbytes > 0
    after = pool.statistics()
    assert (after.live_nbytes, after.spilled_nbytes) == (before.live_nbytes, before.spilled_nbytes)
    assert pool.memory.spill is not None and pool.memory.spill.resident_nbytes() < 21 * MIB
    monkeypatch.undo()
    assert pool.allocate(30 * MIB).address.segment == SPILL
    assert kept.nbytes == 20 * MIB
    pool.check()


def test_a_limit_on_file_sizes_is_an_error_and_no_signal(tmp_path: Path) -> None:
    source = f"""
    import resource, sys
    sys.path.insert(0, {str(ROOT)!r})
    from scheduler.run import Pool
    from scheduler.errors import SpillError
    pool = Pool(0, memory_limit="8 MiB", spill_directory={str(tmp_path)!r})
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))
    try:
        pool.allocate(64 << 20)
    except SpillError as error:
        assert "ulimit -f" in str(error), error
    else:
        raise AssertionError("it was given")
    assert pool.allocate(12 << 20).address.segment == 2
    print("fine")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_a_directory_that_cannot_be_used_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpillError, match=r"nowhere.*No such file.*spill_directory"):
        Pool(1, spill_directory=str(tmp_path / "nowhere"))

    def read_only(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(spill, "_open_nameless", read_only)
    with pytest.raises(SpillError, match="Read-only file system") as caught:
        Pool(1, spill_directory=str(tmp_path))
    assert caught.value.errno == errno.EROFS
    with Pool(0, memory_limit=8 * MIB) as made:  # nobody asked for that directory: only what does not fit fails
        assert made.allocate(MIB).address.segment == ARENA
        with pytest.raises(MemoryBudgetError, match=r"16 MiB.*nothing can be spilled.*(Read-only|lies on a disk).*spill_directory"):
            made.allocate(16 * MIB)


def test_without_a_disk_or_with_spilling_off_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "default_directory", lambda: None)
    with Pool(0, memory_limit=8 * MIB) as made, pytest.raises(MemoryBudgetError, match=r"no temporary directory lies on a disk"):
        made.allocate(16 * MIB)
    with Pool(0, memory_limit=8 * MIB, spill_directory="off") as made, pytest.raises(MemoryBudgetError, match="spill_directory is 'off'"):
        made.allocate(16 * MIB)


@pytest.mark.parametrize("name", ["_read_some", "_write_some"])
def test_an_error_of_the_disk_is_told(file: SpillFile, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path) -> None:
    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file.reserve(0, 4096)
    monkeypatch.setattr(spill, name, broken)
    move = file.read_into if name == "_read_some" else file.write_from
    with pytest.raises(SpillError, match=r"ing 10 B of the spill file.*Input/output error") as caught:
        move(memoryview(bytearray(10)), 5)

    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.path, error.errno, str(error)) == (str(tmp_path), errno.EIO, str(caught.value))
    assert isinstance(error, OSError)


def test_short_counts_are_gone_on_with(file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = spill._read_some, spill._write_some
    monkeypatch.setattr(spill, "_read_some", lambda fd, into, offset: read(fd, into[:3], offset))
    monkeypatch.setattr(spill, "_write_some", lambda fd, part, offset: write(fd, part[:2], offset))
    file.reserve(0, 4096)
    file.write_from(memoryview(b"something"), 7)
    found = bytearray(9)
    file.read_into(memoryview(found), 7)
    assert bytes(found) == b"something"


def test_reading_past_what_was_reserved_is_an_error_not_zeros(file: SpillFile) -> None:
    with pytest.raises(SpillError, match="ends after 0"):
        file.read_into(memoryview(bytearray(4)), 1 << 30)


# ------------------------------------------------------------------------------------------------------------------ pool


def test_what_does_not_fit_goes_to_the_file_and_small_things_stay(pool: Pool) -> None:
    large, small = pool.allocate(64 * MIB), pool.allocate(MIB)

    assert (large.address.segment, small.address.segment) == (SPILL, ARENA)
    assert pool.statistics().spilled_nbytes == 64 * MIB
    del large
    assert pool.statistics().spilled_nbytes == 0
    assert pool.memory.spill is not None and pool.memory.spill.resident_nbytes() < MIB
    pool.check()


def test_closing_a_pool_gives_the_disk_back_and_leaves_no_bytes_to_read(tmp_path: Path) -> None:
    pool = Pool(0, memory_limit=8 * MIB, spill_directory=str(tmp_path))
    extent, file = pool.allocate(16 * MIB), pool.memory.spill
    assert file is not None
    pool.close()

    assert file.resident_nbytes() == 0
    with pytest.raises(SpillError, match="pool was closed"):
        file.read_into(memoryview(bytearray(4)), extent.offset)


def test_a_forked_child_neither_reads_nor_writes_its_parents_file(pool: Pool) -> None:
    pool.allocate(16 * MIB)
    file = pool.memory.spill
    assert file is not None
    child = os.fork()
    if child == 0:
        try:
            file.write_from(memoryview(b"no"), 0)
        except SpillError as error:
            os._exit(0 if "forked" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Fill:
    """Writes its number to each of ten blocks, through whatever kind of window there is."""

    def bind(self, context: Context) -> Any:
        window = context.memory.window(context.addresses[0], 0, (10, 1000), (8000, 8), np.dtype("i8"))

        def run(i: int) -> None:
            part = window[i : i + 1] if isinstance(window, np.ndarray) else window[slice(i, i + 1), slice(0, 1000)]
            if isinstance(part, np.ndarray):
                part[...] = i
            else:
                part.write(np.full((1, 1000), i, "i8"))

        return run


class Check:
    """Warns with the sum."""

    def bind(self, context: Context) -> Any:
        window = context.memory.window(context.addresses[0], 0, (10, 1000), (8000, 8), np.dtype("i8"))

        def run(i: int) -> None:
            values = window if isinstance(window, np.ndarray) else window.read()
            context.warn("UserWarning", f"{type(window).__name__} {values.sum()}")

        return run


@pytest.mark.parametrize("executor", ["synchronous", "threads", "processes"])
def test_a_spilled_temporary_takes_no_room_and_goes_with_the_plan(pool: Pool, executor: str) -> None:
    layers = (
        Layer(name="fill", kernel=Fill(), ntasks=10, writes=(0,)),
        Layer(name="check", kernel=Check(), ntasks=1, reads=(0,), dependencies=(Dependency(0),)),
    )
    told = pool.run(Plan(buffers=(Buffer(64 * MIB, is_spilled=True),), layers=layers), executor)

    assert told.warnings[0][1] == "_Spilled 45000"
    assert pool.statistics().spilled_nbytes == 0
    assert pool.memory.spill is not None and pool.memory.spill.resident_nbytes() < MIB
    pool.check()


# ------------------------------------------------------------------------------------------ what a plan is going to spill


def lifetimes(plan: Plan) -> dict[int, tuple[int, int]]:
    first, last = plan.first_writers(), plan.last_readers()
    return {b: (first[b], last[b]) for b in first if plan.buffers[b].is_spilled}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_of_spill_space_hold_one_temporary_after_the_other(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from((10, 10, 25, 40)), min_size=1, max_size=8))
    buffers = tuple(Buffer(nbytes, is_spilled=data.draw(st.booleans())) for nbytes in sizes)
    layers = []
    for k in range(data.draw(st.integers(1, 8))):
        used = tuple(data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3)))
        layers.append(Layer(name=str(k), kernel=Fill(), ntasks=1, writes=used))
    plan = Plan(buffers=buffers, layers=tuple(layers))
    pieces, piece_of = plan.spilled_in_turn()

    lives = lifetimes(plan)
    assert piece_of.keys() == lives.keys() and set(piece_of.values()) == set(range(len(pieces)))
    for buffer, piece in piece_of.items():
        assert pieces[piece] >= sizes[buffer]
        for other, (first, last) in lives.items():
            if other != buffer and piece_of[other] == piece:
                assert last < lives[buffer][0] or lives[buffer][1] < first, "two live in one place"
    peak = max((sum(sizes[b] for b, (first, last) in lives.items() if first <= k <= last) for k in range(len(layers))), default=0)
    assert peak <= sum(pieces) <= sum(sizes[b] for b in lives)
    if len({sizes[b] for b in lives}) <= 1:
        assert sum(pieces) == peak


class Disk:
    """A disk of ``nbytes`` for the spill file alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
        self.nbytes = nbytes
        self.most = 0
        fallocate = os.posix_fallocate

        def limited(fd: int, offset: int, nbytes: int) -> None:
            used = os.fstat(fd).st_blocks * 512
            if used + nbytes > self.nbytes:
                if used + 4096 <= self.nbytes:
                    fallocate(fd, offset, (self.nbytes - used) // 4096 * 4096)  # as file systems do: all that there is, and then fail
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fallocate(fd, offset, nbytes)
            self.most = max(self.most, used + nbytes)

        monkeypatch.setattr(os, "posix_fallocate", limited)
        monkeypatch.setattr(SpillFile, "free_nbytes", lambda file: self.nbytes - os.fstat(file.fd).st_blocks * 512)


class Add:
    """Adds one to each of ten blocks on the way from one buffer to the next; says in the last one, in memory, that it ran."""

    def __init__(self, source: int, target: int, told: int, fails: bool = False) -> None:
        self.buffers, self.told, self.fails = (source, target), told, fails

    def bind(self, context: Context) -> Any:
        read, write = (context.memory.window(context.addresses[b], 0, (10, 1000), (8000, 8), np.dtype("i8")) for b in self.buffers)
        told = context.memory.window(context.addresses[self.told], 0, (2,), (8,), np.dtype("i8"))

        def run(i: int) -> None:
            told[0] += 1
            if self.fails and told[1] == 0:
                raise ValueError("not yet")
            box = slice(i, i + 1), slice(0, 1000)
            values = read[box] if isinstance(read, np.ndarray) else read[box].read()
            write[box].write(values + 1)

        return run


def chain(pool: Pool, length: int, fails: int = -1) -> tuple[Plan, Any, Any]:
    """Return a plan of ``length`` spilled temporaries of 16 MiB, each made of the one before; it warns with the last one's sum."""
    extent = pool.allocate(64)
    told = pool.memory.window(extent.address, 0, (2,), (8,), np.dtype("i8"))
    told[...] = 0
    buffers = (*(Buffer(16 * MIB, is_spilled=True) for _ in range(length)), Buffer(64, extent.address))
    layers = [Layer(name="fill", kernel=Fill(), ntasks=10, writes=(0,), line="script.py:4")]
    for k in range(1, length):
        kernel = Add(k - 1, k, length, k == fails)
        layers.append(Layer(name="add", kernel=kernel, ntasks=10, reads=(k - 1, length), writes=(k,), dependencies=(Dependency(k - 1),)))
    check = Layer(name="check", kernel=CheckLast(length - 1), ntasks=1, reads=(length - 1,), dependencies=(Dependency(length - 1),))
    plan = Plan(buffers=buffers, layers=(*layers, check), keep=(extent,))
    plan.check()
    return plan, told, 45000 + 10_000 * (length - 1)


class CheckLast:
    """Warns with the sum of a spilled buffer."""

    def __init__(self, buffer: int) -> None:
        self.buffer = buffer

    def bind(self, context: Context) -> Any:
        window = context.memory.window(context.addresses[self.buffer], 0, (10, 1000), (8000, 8), np.dtype("i8"))
        return lambda i: context.warn("UserWarning", str(window.read().sum()))


@pytest.mark.parametrize("executor", ["synchronous", "threads", "processes"])
@pytest.mark.parametrize(("disk", "needed"), [(200, 80), (80, 80), (47, 32), (32, 32)])
def test_a_plan_reserves_its_disk_before_it_begins(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, executor: str, disk: int, needed: int
) -> None:
    """Space for each of five temporaries if there is, else for as many as live at once."""
    limit = Disk(monkeypatch, disk * MIB)
    plan, _told, expected = chain(pool, 5)
    report = pool.run(plan, executor)
    assert report.warnings[0][1] == str(expected)
    assert needed * MIB <= limit.most < (needed + 1) * MIB
    assert pool.statistics().spilled_nbytes == 0
    assert pool.memory.spill is not None and pool.memory.spill.resident_nbytes() < MIB
    pool.check()


@pytest.mark.parametrize("executor", ["synchronous", "threads", "processes"])
def test_a_plan_that_cannot_fit_the_disk_is_refused_before_anything_runs(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, executor: str, tmp_path: Path
) -> None:
    Disk(monkeypatch, 31 * MIB)
    plan, ran, _expected = chain(pool, 5)
    with pytest.raises(
        SpillError, match=r"running 'fill' \(built at script.py:4\) was not begun: the temporaries .* \(5\) need 32 MiB"
    ) as caught:
        pool.run(plan, executor)
    assert "31 MiB are free there: the disk is full" in str(caught.value) and str(tmp_path) in str(caught.value)
    told = caught.value
    assert (told.path, told.needed_nbytes, told.free_nbytes, told.errno) == (str(tmp_path), 32 * MIB, 31 * MIB, errno.ENOSPC)
    assert ran[0] == 0
    assert pool.statistics().spilled_nbytes == 0
    assert pool.memory.spill is not None and pool.memory.spill.resident_nbytes() < MIB
    pool.check()


@pytest.mark.parametrize("disk", [200, 48])
def test_a_plan_cut_short_keeps_its_temporaries_and_reserves_the_rest_anew(pool: Pool, monkeypatch: pytest.MonkeyPatch, disk: int) -> None:
    limit = Disk(monkeypatch, disk * MIB)
    plan, told, expected = chain(pool, 5, fails=3)
    outcome = Outcome()
    with pytest.raises(ValueError, match="not yet"):
        pool.run(plan, "processes", outcome)
    assert outcome.progress is not None and outcome.progress.temporaries.keys() == {2, 3}
    assert pool.statistics().spilled_nbytes == 32 * MIB
    limit.nbytes = 31 * MIB
    with pytest.raises(SpillError, match=r"\(1\) need 16 MiB"):
        pool.run(replace(plan, progress=outcome.progress), "processes")
    limit.nbytes = disk * MIB
    told[1] = 1
    assert pool.run(replace(plan, progress=outcome.progress), "processes").warnings[0][1] == str(expected)
    del outcome
    gc.collect()
    assert pool.statistics().spilled_nbytes == 0
    pool.check()


def test_a_plan_waits_for_disk_that_another_has_reserved(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, 40 * MIB)
    first, second = chain(pool, 2), chain(pool, 2)
    has_begun, may_go_on = threading.Event(), threading.Event()

    class Held:
        def bind(self, context: Context) -> Any:
            has_begun.set()
            assert may_go_on.wait(30)
            return Fill().bind(context)

    held = replace(first[0], layers=(replace(first[0].layers[0], kernel=Held()), *first[0].layers[1:]))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        try:
            one = threads.submit(pool.run, held, "threads")
            assert has_begun.wait(30)
            other = threads.submit(pool.run, second[0], "threads")
            until = time.monotonic() + 30
            while not pool._waiting:
                assert time.monotonic() < until and not other.done(), "it did not wait"
        finally:
            may_go_on.set()
        assert one.result().warnings[0][1] == other.result().warnings[0][1] == str(first[2])
    pool.check()


def test_address_space_limits_do_not_forbid_spilling(tmp_path: Path) -> None:
    source = f"""
    import resource, sys
    sys.path.insert(0, {str(ROOT)!r})
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    from scheduler.run import Pool
    pool = Pool(0, memory_limit="8 MiB", spill_directory={str(tmp_path)!r})
    assert pool.allocate(64 << 20).address.segment == 2
    print("fine")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
