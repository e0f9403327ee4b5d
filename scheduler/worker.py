"""What runs tasks: the context a kernel is given, how an error is told, and the worker process around both.

Promises: a worker reports every range it was sent, as done, stopped, or failed with an error that can travel, and never dies of
what a task raises or of a function it cannot load; it is gone within milliseconds of its driver, even stopped or stuck in C.
Relies on inherited descriptors alone: a socket, a life socket, the arena, the control page.
Never put here: choices (`scheduler.state`), allocation, anything that opens a port or a name.

The control file, shared by the driver and all its workers (int64 words, then the redo slots of `scheduler.redo`):

    word 0..7            8..15            ...      8*(slots+1) ...               a page
    +----------------+ +----------------+         +--------------------------+  +-------------+ +-------------+
    | slot 0         | | slot 1         |         | cancel words, by         |  | redo slot 0 | | redo slot 1 |
    | cursor, run id,| | cursor, run id,|         | plan id % CANCEL_WORDS   |  |             | |             |
    | binding        | | binding        |         |                          |  |             | |             |
    +----------------+ +----------------+         +--------------------------+  +-------------+ +-------------+
      written by that worker alone, read by          written by the driver alone:  written by that worker alone, read by the
      the driver only after the worker's death       the id of a plan that stops   driver only after the worker's death

A driver sends pickled tuples over SOCK_SEQPACKET; a message longer than a packet goes as several, each with one byte in front
that says whether more follow. The descriptors are those of one process pair, so unpickling is as safe as the user's own code.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import fcntl
import hashlib
import io
import mmap
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import cloudpickle
import numpy as np

from scheduler import faults
from scheduler.errors import TaskError
from scheduler.redo import NOT_BEGUN, SLOT_NBYTES, Redo, pack
from scheduler.segments import Memory, advise_huge_pages
from scheduler.spill import SpillFile
from scheduler.task import Address, Layer

__all__ = ["CANCEL_WORDS", "IN_WORKER", "KernelCache", "TaskContext", "annotate", "control_nbytes", "digest_of", "main"]

IN_WORKER = False  # True in a worker process: a nested run then happens inline

CANCEL_WORDS = 1024
WORDS_PER_SLOT = 8  # 64 bytes: no two workers write one cache line
PACKET_NBYTES = 1 << 16
MOST_TOGETHER = 8  # tasks: enough that what a call costs is lost in them, few enough to stop between
MOST_KERNELS = 256
MOST_KERNEL_NBYTES = 64 << 20
MOST_ERROR_NBYTES = 64 << 20  # beyond, an exception does not travel, only what it says
SUMMARY_LENGTH = 4000
TRACE_LENGTH = 100_000  # a chain of ten thousand causes is of no use to anyone
_F_SETSIG = 10
_MORE, _LAST = b"\x01", b"\x00"

_forked: list[bool] = []  # filled in a forked child of a worker: a list's truth is cheap enough to ask per task

Warned = tuple[str, str, str]


# ------------------------------------------------------------------------------------------- for every executor


class TaskContext:
    """What a kernel is bound to: memory, where its buffers lie, and where its warnings go. One per thread or process."""

    __slots__ = ("_answers", "_warnings", "addresses", "memory", "redo")

    def __init__(
        self, memory: Memory, addresses: Mapping[int, Address], warned: dict[Warned, None], redo: Redo, answers: list[bytes] | None = None
    ) -> None:
        self.memory = memory
        self.addresses = addresses
        self.redo = redo
        self._warnings = warned  # an ordered set
        self._answers = [] if answers is None else answers

    def beside(self, addresses: Mapping[int, Address]) -> TaskContext:
        """Return the same with other buffers."""
        return TaskContext(self.memory, addresses, self._warnings, self.redo, self._answers)

    def warn(self, category: str, message: str, line: str = "") -> None:
        """Report a warning to the driver, once per text and line; ``category`` names a builtin warning class."""
        self._warnings[category, message, line] = None

    def answer(self, blob: bytes) -> None:
        """Send the driver bytes that no buffer has room for; see `scheduler.task.Context`."""
        self._answers.append(blob)


def run_some(function: Callable[[int], None], task: int, stop: int) -> int:
    """Run ``task``, and those behind it that go together with it where a kernel can do several at once; return the first not run."""
    many = getattr(function, "many", None)
    upto = min(stop, task + MOST_TOGETHER)
    if many is not None and upto - task > 1 and faults.ARMED is None:  # faults are counted by task
        with contextlib.suppress(Exception):  # one after the other tells which of them it was
            many(task, upto)
            return upto
    function(task)
    return task + 1


def annotate(error: BaseException, layer: Layer, task: int, trace: str = "") -> BaseException:
    """Return the error, with notes that say which task it is from, which line built it, and the remote traceback."""
    notes = [f"in {_describe(layer, task)} of {layer.name!r}"]
    if layer.line:
        notes.append(f"built at {layer.line}")
    if trace:
        notes.append("in a worker process:\n" + trace.rstrip())
    for note in notes:
        _add_note(error, note)
    return error


def _add_note(error: BaseException, note: str) -> None:
    try:
        if note not in getattr(error, "__notes__", ()):  # the same exception object may be raised by several tasks
            error.add_note(note)
    except Exception:  # a class that takes no notes: what it says itself matters more
        pass


def _describe(layer: Layer, task: int) -> str:
    try:
        return str(layer.describe(task))
    except Exception:  # a mistake in a description must not hide the error it was to describe
        return f"task {task}"


def contain(error: BaseException) -> BaseException:
    """Return what a task's error is for the driver: what would end a process or an interpreter becomes a `TaskError`."""
    if isinstance(error, Exception):
        return error
    contained = TaskError(f"the task raised {type(error).__name__}: {_repr(error)}. A task cannot end the process; return instead.")
    return contained.with_traceback(error.__traceback__)


def _repr(value: object) -> str:
    try:
        return str.__str__(repr(value))
    except Exception:
        return f"<{type(value).__name__} whose repr fails>"


def _text(value: object) -> str:
    try:
        return "".join(str(value))  # not an instance of a class that only the worker knows
    except Exception:
        return f"<{type(value).__name__} whose str fails>"


def category_of(category: type[Warning]) -> str:
    """Return the name of the nearest builtin warning class: other classes may not be known in the driver."""
    for base in category.__mro__:
        if getattr(builtins, base.__name__, None) is base:
            return str(base.__name__)
    return "UserWarning"


def digest_of(blob: bytes) -> bytes:
    """Return the name under which a pickled kernel is known on both sides."""
    return hashlib.blake2b(blob, digest_size=16).digest()


class KernelCache:
    """Which kernels a worker has, by digest; the driver keeps one per worker that does the same steps, so they agree.

    Bounded in number and in bytes; the least recently used goes first.
    """

    __slots__ = ("_held", "nbytes")

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, tuple[int, Any]] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._held

    def use(self, digest: bytes) -> Any:
        """Return the value, as the most recently used."""
        self._held.move_to_end(digest)
        return self._held[digest][1]

    def put(self, digest: bytes, nbytes: int, value: Any) -> None:
        """Add a value; evict what no longer fits, but never the newest."""
        self._held[digest] = nbytes, value
        self.nbytes += nbytes
        while len(self._held) > MOST_KERNELS or (self.nbytes > MOST_KERNEL_NBYTES and len(self._held) > 1):
            self.nbytes -= self._held.popitem(last=False)[1][0]


def _words_nbytes(slots: int) -> int:
    nbytes = 8 * (WORDS_PER_SLOT * (slots + 1) + CANCEL_WORDS)
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def control_nbytes(slots: int) -> int:
    """Return the size of the control file."""
    return _words_nbytes(slots) + slots * SLOT_NBYTES


def redo_of(control: mmap.mmap, words: memoryview, slots: int, slot: int) -> Redo:
    """Return the cursor and the redo slot of a worker."""
    room = np.frombuffer(control, np.uint8, SLOT_NBYTES, _words_nbytes(slots) + slot * SLOT_NBYTES)
    return Redo(words, WORDS_PER_SLOT * slot, room)


def cancel_word(slots: int, plan_id: int) -> int:
    """Return the index of the word that holds ``plan_id`` when that plan stops.

    Two plans whose ids are equal modulo CANCEL_WORDS share it; the later cancel then hides the earlier, whose ranges run on.
    """
    return WORDS_PER_SLOT * (slots + 1) + plan_id % CANCEL_WORDS


def packets(message: bytes) -> Iterable[bytes]:
    """Yield the packets of one message."""
    if len(message) < PACKET_NBYTES:
        yield _LAST + message
        return
    for at in range(0, len(message), PACKET_NBYTES):
        yield (_MORE if at + PACKET_NBYTES < len(message) else _LAST) + message[at : at + PACKET_NBYTES]


# ------------------------------------------------------------------------------------------------ worker process


class _Process:
    """A worker process: one thread, one socket, ranges one after the other."""

    def __init__(self, link: socket.socket, words: memoryview, slot: int) -> None:
        self.redo: Redo
        self.link = link
        self._link_id = os.fstat(link.fileno()).st_ino
        self.words = words
        self.slot = slot
        self.slots = 0
        self.memory: Memory
        self.kernels = KernelCache()
        self.bound: dict[tuple[int, int], tuple[Callable[[int], None] | None, dict[Warned, None], list[bytes]]] = {}
        # By plan, digest and addresses: layers that call one kernel on the same bytes, as every other step of a chain does, are bound once.
        self.alike: dict[tuple[int, Any, tuple[Any, ...]], tuple[Callable[[int], None], dict[Warned, None], list[bytes]]] = {}

    def receive(self) -> Any:
        """Wait for a message; None when the driver has closed its end."""
        whole = io.BytesIO()
        while True:
            try:
                packet = self.link.recv(PACKET_NBYTES + 1)
            except ConnectionError:
                return None  # closed before it read all we sent
            if not packet:
                return None
            whole.write(packet[1:])
            if packet[:1] == _LAST:
                return pickle.loads(whole.getbuffer())

    def has_link(self) -> bool:
        """Return whether the socket is still ours: a task may have closed it, and what it opened then have its number."""
        try:
            return os.fstat(self.link.fileno()).st_ino == self._link_id
        except OSError:
            return False

    def send(self, message: tuple[Any, ...]) -> None:
        for packet in packets(pickle.dumps(message, pickle.HIGHEST_PROTOCOL)):
            try:
                self.link.sendall(packet)
            except ConnectionError:
                return  # the driver closed its end: `receive` sees that next

    def serve(self) -> None:
        while True:
            message = self.receive()
            if message is None:
                return
            _, run_id, plan_id, layer, start, stop, step, setup, path, forget = message
            for old in forget:
                for key in [k for k in self.bound if k[0] == old]:
                    del self.bound[key]
                for same in [k for k in self.alike if k[0] == old]:
                    del self.alike[same]
            if path is not None:
                self.move_to(*path)
            self.run(run_id, plan_id, layer, start, stop, step, setup)

    def leave(self) -> None:
        """End, without a word to the driver: the cursor says what is done, and another worker does the rest."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(
                f"shmarray: a task closed descriptors that are not its own (os.closerange?). Worker process {os.getpid()} cannot speak "
                f"to its driver any more and ends; another takes its place.\n"
            )
            sys.stderr.flush()
        os._exit(1)

    def move_to(self, path: list[str], directory: str) -> None:
        """Take over where the driver finds modules and relative paths."""
        sys.path[:] = path
        with contextlib.suppress(OSError):  # the driver stands in a directory that is gone: so do we, in another
            os.chdir(directory)

    def run(self, run_id: int, plan_id: int, layer: int, start: int, stop: int, step: int, setup: Any) -> None:
        words, redo = self.words, self.redo
        cursor = WORDS_PER_SLOT * self.slot
        cancel = cancel_word(self.slots, plan_id)
        # Never (this run id, an old cursor): the driver would charge a task that was not begun.
        words[cursor] = NOT_BEGUN
        words[cursor + 1] = run_id
        words[cursor + 2] = is_binding = 1  # until then nothing was written
        words[cursor] = pack(start, step)  # before bind: a function that kills whoever loads it must be charged too
        failed: tuple[int, BaseException] | None = None
        task = start
        warned: dict[Warned, None] = {}
        answers: list[bytes] = []
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                faults.point("bind")
                function, warned, answers = self.bind(plan_id, layer, setup)
                faults.point("bound")
                words[cursor + 2] = is_binding = 0
                while task < stop:
                    if words[cancel] == plan_id or _forked:
                        break
                    redo.begin(task, step if task == start else 0)
                    faults.point("task")
                    task = run_some(function, task, stop)
                    faults.point("ran")
                else:
                    # All done: should this process die before the driver hears of it, nothing has to run again.
                    task = stop
                    words[cursor] = pack(stop)
            except BaseException as error:
                failed = task, error
        if _forked:  # a task forked, and the child came back here: neither socket nor tasks are its own
            os._exit(1)
        elapsed = time.perf_counter() - began
        for item in caught:
            warned[category_of(item.category), _text(item.message), f"{item.filename}:{item.lineno}"] = None
        told = list(warned)
        warned.clear()
        answered = list(answers)
        answers.clear()
        _flush()
        if not self.has_link():
            self.leave()
        faults.point("reply")
        if failed is not None:
            left_at = settled(redo, self.memory, failed[0], step if failed[0] == start else 0)
            self.send(("failed", run_id, failed[0], left_at, not is_binding, *_luggage(failed[1]), told))
        elif task < stop:
            self.send(("stopped", run_id, task, told))
        else:
            self.send(("done", run_id, elapsed, told, answered))
        faults.point("replied")

    def bind(self, plan_id: int, layer: int, setup: Any) -> tuple[Callable[[int], None], dict[Warned, None], list[bytes]]:
        """Return the function of a layer; made at the layer's first range here, for which ``setup`` came along."""
        key = plan_id, layer
        if setup is not None:
            digest, blob, addresses = setup
            # The cache first, and the blob whether it can be loaded or not: the driver has noted that we have it.
            if blob is not None:
                self.kernels.put(digest, len(blob), [blob, None])
            entry = self.kernels.use(digest)
            same = plan_id, digest, tuple(sorted(addresses.items()))
            if same in self.alike:
                self.bound[key] = self.alike[same]
                return self.alike[same]
            # Kept for the next range: a bind that fails must fail again in the same way, with the same setup.
            self.bound[key] = None, {}, []
            if entry[1] is None:
                try:
                    entry[1] = cloudpickle.loads(entry[0])
                except BaseException as error:
                    _add_note(error, "while loading the function in a worker process: is its module importable there?")
                    raise
                entry[0] = b""
            warned: dict[Warned, None] = {}
            answers: list[bytes] = []
            context = TaskContext(self.memory, {b: Address(*a) for b, a in addresses.items()}, warned, self.redo, answers)
            self.bound[key] = self.alike[same] = entry[1].bind(context), warned, answers
        function, warned, answers = self.bound[key]
        if function is None:
            raise TaskError("the function of this layer could not be loaded in this worker, as an earlier error says")
        return function, warned, answers


def settled(redo: Redo, memory: Memory, task: int, step: int) -> int:
    """Return the first step of a lane's task that is still to do, after an exception in it; -1: its target is torn.

    ``step``: with which it was to begin, should it not have.
    """
    while True:
        try:
            found = redo.settle(memory)
            return step if found is None or found[0] != task else found[1]
        except KeyboardInterrupt:
            continue  # it was told already: once more, for what is settled halfway is torn
        except Exception:
            return -1  # the target cannot be written at all


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed terminal is no reason to lose a result
            stream.flush()


def _luggage(error: BaseException) -> tuple[bytes | None, str, str]:
    """Return an error as (pickle or None, summary, traceback text): what can travel, whatever the error is made of."""
    try:
        summary = _shortened(f"{type(error).__name__}: {_repr(error)}", SUMMARY_LENGTH)
    except BaseException:  # a repr that calls sys.exit()
        summary = f"{type(error).__name__}: <its repr fails>"
    try:
        # The first frame is this file's, of no use to anyone.
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next))
    except BaseException:
        trace = summary
    trace = _shortened(trace, TRACE_LENGTH)
    if not isinstance(error, Exception):
        return None, summary, trace
    try:
        blob = cloudpickle.dumps(error)
        # What can be pickled cannot always be loaded: an exception whose __init__ takes two arguments, for one.
        if len(blob) > MOST_ERROR_NBYTES or type(pickle.loads(blob)) is not type(error):
            blob = None
    except BaseException:
        blob = None
    return blob, summary, trace


def _shortened(text: str, length: int) -> str:
    """Return the beginning and the end of a text that is longer than ``length``."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}\n... {len(text) - length} characters left out ...\n{text[-(length // 2) :]}"


def unpack_error(blob: bytes | None, summary: str) -> BaseException:
    """Return the error that a worker packed; a `TaskError` where it cannot be had."""
    if blob is not None:
        try:
            error = pickle.loads(blob)
            if isinstance(error, BaseException):
                return error
        except BaseException:
            pass  # defined in a module that only the worker has
    return TaskError(f"the task raised {summary}; this exception cannot travel between processes, its traceback follows")


def tie(life: int, pid: int) -> None:
    """Have the kernel send SIGKILL to ``pid`` when the other end of the life socket closes. ``life``: the worker's end.

    A signal by the kernel reaches a process that is stopped, or that sits in C code; a thread waiting for EOF would not,
    and PR_SET_PDEATHSIG fires when the *thread* that started the worker ends. What is set here belongs to the open file, which
    both processes share: so the driver does it, and a worker stopped before its first instruction is tied as well.
    """
    fcntl.fcntl(life, fcntl.F_SETOWN, pid)
    fcntl.fcntl(life, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)


def _volunteer() -> None:
    """Let the system, out of memory, choose a worker rather than the driver. Best effort."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            score = int(file.read())
            file.seek(0)
            file.write(str(min(1000, score + 500)))
    except (OSError, ValueError):
        pass


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C is the driver's business. A handler rather than SIG_IGN, which programs started by a task would inherit."""


def main(arguments: Sequence[str]) -> None:
    """Be a worker: ``arguments`` are descriptors (socket, life, arena, control, stderr, spill or -1), the driver's pid, and the slot."""
    global IN_WORKER
    IN_WORKER = True
    faults.arm(faults.ARMED, who="worker")
    link_fd, _life, arena_fd, control_fd, stderr, spill_fd, driver, slot = map(int, arguments)
    if os.getppid() != driver:  # it died before it could `tie` us to its end
        os._exit(1)
    os.register_at_fork(after_in_child=lambda: _forked.append(True))
    signal.signal(signal.SIGINT, _ignore)
    _volunteer()
    faults.point("start")
    control = mmap.mmap(control_fd, os.fstat(control_fd).st_size)
    os.close(control_fd)
    link = socket.socket(fileno=link_fd)
    words = memoryview(control).cast("q")
    process = _Process(link, words, slot)
    hello = process.receive()
    if hello is None:
        return
    _, slots, arena_nbytes, path, directory, environment, spill_directory = hello
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    process.slots = slots
    process.redo = redo_of(control, words, slots, slot)
    process.move_to(path, directory)
    arena = mmap.mmap(arena_fd, arena_nbytes, flags=mmap.MAP_SHARED)
    advise_huge_pages(arena)
    os.close(arena_fd)
    spill = None
    if spill_fd >= 0:
        os.set_inheritable(spill_fd, False)  # programs that tasks start have no business with it
        spill = SpillFile(spill_fd, spill_directory)
    process.memory = Memory(np.frombuffer(arena, np.uint8), driver=driver, spill=spill)
    faults.point("hello")
    process.send(("hello", os.getpid(), np.__version__))
    # Up to here stderr was a memory file in which the driver finds why a start failed; from here it is the user's.
    sys.stderr.flush()
    os.dup2(stderr, 2)
    os.close(stderr)
    faulthandler.enable()
    process.serve()


if __name__ == "__main__":
    # Under its own name: the module that runs as __main__ would be a second copy, whose IN_WORKER nobody else sees.
    from scheduler.worker import main as _main

    _main(sys.argv[1:])
