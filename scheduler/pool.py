"""The driver's side of the worker processes.

Promises: a plan that was submitted ends, in a result or an error, whatever its workers do: die, stop, or never start; what it
holds (temporaries, locks, its share of the budget) is let go exactly when nobody can run a task of it any more.
Relies on `scheduler.state` for every choice, `scheduler.worker` for the other side, and Linux: epoll, pidfd, eventfd, memfd.
Never put here: choices about tasks, anything that blocks on a worker, user code (the thread below must never run any).

    any thread                     the loop: one daemon thread                     worker process (one per slot)
    +------------+   inbox,       +---------------------------+   SEQPACKET       +------------------+
    | submit     | -- eventfd --> | State; epoll over sockets, | <-- socketpair --> | runs ranges      |
    | wait       | <-- Event ---- | pidfds, eventfd; timers    | -- life socket --> | dies with driver |
    +------------+                +---------------------------+                   +------------------+
                                        | SimpleQueue
                                        v
                                  helper thread: layers whose place is the driver
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import mmap
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import scheduler
from scheduler import faults
from scheduler.errors import PoolClosed, SchedulerError, WorkerStartError
from scheduler.limits import oom_kills
from scheduler.redo import NOT_BEGUN, unpack
from scheduler.running import (
    GIVE_UP_AFTER_S,
    Lane,
    RemoteError,
    Running,
    Signal,
    current_group,
    raise_failure,
    set_inline,
    start_thread,
)
from scheduler.segments import Memory
from scheduler.state import (
    DRIVER_LANE,
    OUT_OF_MEMORY,
    BufferDone,
    CancelRequested,
    Command,
    Event,
    OpenLayer,
    PlanFailed,
    PlanFinished,
    RangeFailed,
    RangeFinished,
    RangeStopped,
    SendRange,
    StartWorker,
    State,
    StopPlan,
    WorkerJoined,
    WorkerLost,
    WorkerNotStarted,
)
from scheduler.task import Report
from scheduler.watch import STALLED_S, Attempts, Watch, look_again_s
from scheduler.worker import (
    PACKET_NBYTES,
    WORDS_PER_SLOT,
    KernelCache,
    cancel_word,
    control_nbytes,
    packets,
    redo_of,
    settled,
    tie,
)

__all__ = ["Ticket", "WorkerPool", "can_start_workers", "describe_exit"]

START_S = 60.0  # a worker that has not said hello by then never will
OOM_S = 1.0  # deaths by SIGKILL this soon after the out-of-memory killer counted one more are its doing
KILL_AFTER_S = 0.3  # a worker still busy with a cancelled plan
CLOSE_S = 0.5
TAIL_NBYTES = 4000  # of a worker's stderr, in an error

_log = logging.getLogger("shmarray")


def can_start_workers() -> bool:
    """Return whether this system has what worker processes need."""
    needed = ((os, "memfd_create"), (os, "pidfd_open"), (os, "eventfd"), (select, "epoll"), (socket, "SOCK_SEQPACKET"))
    return all(hasattr(module, name) for module, name in needed) and bool(sys.executable)


# ------------------------------------------------------------------------------------------------ the loop's data


@dataclass(slots=True, eq=False)
class Ticket:
    """A submitted plan: filled in by the loop, waited for by the thread that submitted it."""

    running: Running
    kernels: Mapping[int, tuple[bytes, bytes]]  # layer -> (digest, pickle)
    path: tuple[list[str], str]  # sys.path and directory when submitted
    done: Signal = field(default_factory=Signal)
    failure: PlanFailed | None = None
    deaths: int = 0
    broken: BaseException | None = None  # a layer could not be opened


class _Member:
    """A worker process, from its start on. Belongs to the loop's thread."""

    def __init__(self, slot: int, process: subprocess.Popen[bytes], link: socket.socket, life: socket.socket, capture: int) -> None:
        self.slot = slot
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        self.link = link
        self.life = life
        self.capture = capture  # memory file that holds what it wrote before its hello
        self.has_joined = False
        self.is_open = True  # its socket
        self.outgoing: deque[bytes] = deque()
        self.incoming: list[bytes] = []
        self.kernels = KernelCache()
        self.known: set[tuple[int, int]] = set()  # (plan, layer) that were set up there
        self.to_forget: list[int] = []
        self.path: tuple[list[str], str] | None = None
        self.watch = Watch()
        self.doom = ""  # why we killed it
        self.doomed_at: tuple[int, int] | None = None  # the run id and the task for which

    def flush(self) -> bool:
        """Send as much as goes without waiting; return whether all of it went. A stopped worker takes nothing."""
        try:
            while self.outgoing:
                self.link.send(self.outgoing[0])
                self.outgoing.popleft()
        except BlockingIOError:
            return False
        except OSError:
            self.outgoing.clear()  # it is dead; its pidfd says so in a moment
        return True

    def receive(self) -> list[tuple[Any, ...]]:
        """Return the messages that have come."""
        messages = []
        while self.is_open:
            try:
                packet = self.link.recv(PACKET_NBYTES + 1)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                self.is_open = False
                break
            self.incoming.append(packet[1:])
            if packet[0] == 0:
                messages.append(pickle.loads(b"".join(self.incoming)))
                self.incoming.clear()
        return messages

    def tail(self) -> str:
        """Return the end of what it wrote to stderr before its hello."""
        size = os.fstat(self.capture).st_size
        return os.pread(self.capture, TAIL_NBYTES, max(0, size - TAIL_NBYTES)).decode(errors="replace").strip()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        self.link.close()
        self.life.close()
        os.close(self.pidfd)
        os.close(self.capture)


_loops: weakref.WeakSet[_Loop] = weakref.WeakSet()
_is_exiting = False  # the interpreter ends: written once, by `_close_all`


class _Loop:
    """The thread that starts workers, listens to them, and acts for the state machine.

    Everything here belongs to that thread, except ``inbox`` (any thread appends) and ``_wake_fd``, ``_thread`` and
    ``_is_closing``, which are changed under ``_gate`` alone: a descriptor that was closed may be somebody's file by now.
    """

    def __init__(self, slots: int, arena_fd: int, arena_nbytes: int, memory: Memory, task_timeout_s: float | None = None) -> None:
        self.slots = slots
        self.task_timeout_s = task_timeout_s
        self.arena_fd, self.arena_nbytes = arena_fd, arena_nbytes
        self.memory = memory
        self.pid = os.getpid()
        self.state = State(slots)
        self.tickets: dict[int, Ticket] = {}
        self.members: dict[int, _Member] = {}
        self.by_fd: dict[int, _Member] = {}
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.restarts = 0  # timers that will start a worker
        self.attempts = [Attempts() for _ in range(slots)]
        self.start_error = ""
        self.look_at_s = math.inf  # when the workers will next be looked at; never, while they rest
        self.oom_kills = 0
        self.oom_until_s = -math.inf
        self.events: deque[Event] = deque()
        self.inbox: deque[Callable[[], None]] = deque()
        self.helper: _Work | None = None
        self.starts = 0
        self._is_over = False  # the state machine hears no more
        # Reentrant: the garbage collector may close a pool in a thread that is just posting to another.
        self._gate = threading.RLock()
        self._is_closing = False
        self._claim = deque([True])  # whichever thread pops it is the loop
        self._thread: threading.Thread | None = None
        self._wake_fd = self.control_fd = -1
        self.epoll = select.epoll()
        try:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.epoll.register(self._wake_fd, select.EPOLLIN)
            self.control_fd = os.memfd_create("shmarray-control", os.MFD_CLOEXEC)
            os.fchmod(self.control_fd, 0o600)
            os.ftruncate(self.control_fd, control_nbytes(slots))
            control = mmap.mmap(self.control_fd, control_nbytes(slots))
            self.words = memoryview(control).cast("q")
            self.redos = [redo_of(control, self.words, slots, slot) for slot in range(slots)]
        except BaseException:
            self._close_descriptors()  # no descriptor left, most likely
            raise
        _loops.add(self)

    # -- from any thread

    def post(self, action: Callable[[], None]) -> bool:
        """Have the loop do something; return False when it is closed."""
        with self._gate:
            if self._is_closing or self.pid != os.getpid():
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="shmarray-loop", daemon=True)
                # A Ctrl-C in here leaves in doubt whether it runs: then another is started, and the claim decides.
                start_thread(thread)
                self._thread = thread
            self.inbox.append(action)  # after what may fail: what its caller was told is not done must not be done later
            os.eventfd_write(self._wake_fd, 1)
        return True

    def close(self, *, wait: bool) -> None:
        """End the workers and the thread; plans that still run fail."""
        if self.pid != os.getpid():
            return
        with self._gate:
            thread = self._thread
            if not self._is_closing:
                self._is_closing = True
                if thread is None:
                    self._close_descriptors()
                else:
                    os.eventfd_write(self._wake_fd, 1)
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(4 * CLOSE_S)

    def become_foreign(self) -> None:
        """In a forked child: let go of the parent's workers without touching them."""
        self._gate = threading.RLock()  # its holder may not exist here
        self._is_closing = True
        self._thread = None
        for member in self.members.values():
            member.process.returncode = 0  # not ours to wait for
            member.close()
        self.members.clear()
        self.by_fd.clear()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self.epoll.close()
        for fd in (self.control_fd, self._wake_fd):
            if fd >= 0:
                os.close(fd)
        self._wake_fd = self.control_fd = -1

    # -- the thread

    def _serve(self) -> None:
        try:
            self._claim.pop()
        except IndexError:
            return
        try:
            while not self._is_closing:
                self._step()
            error: BaseException = PoolClosed("the pool was closed while this plan ran; make a new pool and run it again.")
        except BaseException as bug:
            error = SchedulerError("the scheduler's loop failed; this is a bug of ours:\n" + "".join(traceback.format_exception(bug)))
        self._end(error)

    def _step(self) -> None:
        timeout = -1.0
        if self.timers:
            timeout = max(0.0, min(when for when, _ in self.timers) - time.monotonic())
        dead: list[_Member] = []
        for fd, mask in self.epoll.poll(timeout):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                continue
            member = self.by_fd.get(fd)
            if member is None:
                continue
            if fd == member.pidfd:
                dead.append(member)
                continue
            if mask & select.EPOLLOUT and member.flush():
                self.epoll.modify(member.link, select.EPOLLIN)
            if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._listen(member)
        # Deaths last, and after everything the dead have said: what was reported must not run again.
        for member in dead:
            self._listen(member)
            self._bury(member)
        while self.inbox:
            self.inbox.popleft()()
        if self.timers:
            now = time.monotonic()
            due = [t for t in self.timers if t[0] <= now]
            self.timers = [t for t in self.timers if t[0] > now]
            for _, action in due:
                action()

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.timers.append((time.monotonic() + delay_s, action))

    def _end(self, error: BaseException) -> None:
        """Close: end the workers, then fail the plans, then let go of the descriptors. Nobody waits in vain, whatever fails."""
        with self._gate:
            self._is_closing = True
        try:
            with contextlib.suppress(Exception):  # the bug that ends us may strike again: the workers must go all the same
                for plan_id in list(self.tickets):
                    self._feed(CancelRequested(plan_id, error))
            self._end_members()
        finally:
            self._is_over = True
            for plan_id, ticket in list(self.tickets.items()):
                ticket.running.is_stopping = True
                failure = PlanFailed(plan_id, error)
                with contextlib.suppress(Exception):  # it may be the state that has the bug
                    failure = self.state.abandoned(plan_id, error)
                with contextlib.suppress(Exception):  # one that cannot be closed must not keep the others waiting
                    self._settle(plan_id, failure)
            while self.inbox:
                self.inbox.popleft()()  # a plan submitted meanwhile: `submit` sees that we are closing
            # What a bug left undone there holds the error, that its callers' frames, and these the pool.
            self.events.clear()
            self.state = State(self.slots)
            with self._gate:
                self._close_descriptors()

    def _end_members(self) -> None:
        """Tell them by the end of their input, wait half a second, then SIGKILL."""
        for member in self.members.values():
            with contextlib.suppress(OSError):
                member.link.shutdown(socket.SHUT_WR)
        if self.helper is not None:
            self.helper.put(None)
        deadline = time.monotonic() + CLOSE_S
        self._wait_members(deadline)
        for member in self.members.values():
            member.kill()
        self._wait_members(time.monotonic() + CLOSE_S)
        for member in self.members.values():
            member.process.poll()
            member.close()

    def _wait_members(self, deadline: float) -> None:
        for slot, member in list(self.members.items()):
            left = max(0.0, deadline - time.monotonic())
            if select.select([member.pidfd], [], [], left)[0] if member.pidfd < 1024 else _poll(member.pidfd, left):
                code = member.process.poll()
                if member.has_joined:  # what it did in place is done, though the plan fails
                    with contextlib.suppress(Exception):  # as in `_end`
                        self._listen(member)
                        self._lose(member, describe_exit(code))
                member.close()
                del self.members[slot]

    # -- plans

    def submit(self, ticket: Ticket) -> None:
        running = ticket.running
        if self._is_closing:
            ticket.failure = PlanFailed(running.plan_id, PoolClosed("the pool is closed; make a new one."))
            _finish(ticket)
            return
        self.tickets[running.plan_id] = ticket
        was_given_up = all(attempts.is_over for attempts in self.attempts)
        for attempts in self.attempts:
            if was_given_up:
                attempts.succeeded()
            else:
                attempts.try_again()
        self._feed(running.submission())

    def abandon(self, ticket: Ticket, reason: BaseException) -> None:
        """Cancel a plan whose caller goes away. Comes after its `submit` if there was one: the inbox keeps order."""
        plan_id = ticket.running.plan_id
        if plan_id in self.tickets:
            self._feed(CancelRequested(plan_id, reason))
            self._after(KILL_AFTER_S, lambda: self._kill_busy(plan_id))
        elif not ticket.done.is_set:  # the Ctrl-C came before it was in the inbox
            ticket.failure = PlanFailed(plan_id, reason)
            _finish(ticket)

    def _kill_busy(self, plan_id: int) -> None:
        for slot, member in list(self.members.items()):
            self._listen(member)  # it may be done with that plan, and in the middle of another that must not be torn
            queued = self.state.in_flight(slot)
            if queued and queued[0][1] == plan_id and self.words[WORDS_PER_SLOT * slot + 1] <= queued[0][0]:
                member.kill()

    def _settle(self, plan_id: int, failure: PlanFailed | None) -> None:
        faults.point("settle")
        ticket = self.tickets.pop(plan_id)
        ticket.failure = failure
        for member in self.members.values():
            old = {key for key in member.known if key[0] == plan_id}
            if old:
                member.known -= old
                member.to_forget.append(plan_id)
        if self.helper is not None:
            self.helper.put(plan_id)
        _finish(ticket)

    # -- the state machine's hands

    def _feed(self, event: Event) -> None:
        if self._is_over:
            return
        self.events.append(event)
        if len(self.events) > 1:
            return  # the caller further up goes on with it
        while self.events:
            for command in self.state.handle(self.events[0]):
                self._do(command)
            self.events.popleft()

    def _do(self, command: Command) -> None:
        match command:
            case SendRange():
                ticket = self.tickets[command.plan_id]
                if ticket.broken is not None:
                    self.events.append(RangeStopped(command.worker, command.run_id, command.start))
                elif command.worker == DRIVER_LANE:
                    self._help(ticket.running, command)
                else:
                    self._send(self.members[command.worker], ticket, command)
            case OpenLayer():
                ticket = self.tickets[command.plan_id]
                try:
                    ticket.running.open(command.layer)
                except Exception as error:
                    ticket.broken = error
                    self.events.append(CancelRequested(command.plan_id, error))
            case BufferDone():
                if self.tickets[command.plan_id].broken is None:
                    self.tickets[command.plan_id].running.buffer_done(command.buffer)
            case PlanFinished():
                self._settle(command.plan_id, None)
            case PlanFailed():
                self._settle(command.plan_id, command)
            case StopPlan():
                self.tickets[command.plan_id].running.is_stopping = True
                self.words[cancel_word(self.slots, command.plan_id)] = command.plan_id
            case StartWorker():
                self._start_soon(command.worker)

    def _help(self, running: Running, command: SendRange) -> None:
        if self.helper is None:
            self.helper = queue.SimpleQueue()
            threading.Thread(target=_helper, args=(self.helper, self, self.memory), name="shmarray-driver", daemon=True).start()
        self.helper.put((running, command))

    def _send(self, member: _Member, ticket: Ticket, command: SendRange) -> None:
        faults.point("send")
        setup: tuple[bytes, bytes | None, dict[int, tuple[int, ...]]] | None = None
        key = command.plan_id, command.layer
        if key not in member.known:
            member.known.add(key)
            digest, blob = ticket.kernels[command.layer]
            addresses = {b: tuple(a) for b, a in ticket.running.addresses_of(command.layer).items()}
            if digest in member.kernels:
                member.kernels.use(digest)
                setup = digest, None, addresses
            else:
                member.kernels.put(digest, len(blob), None)
                setup = digest, blob, addresses
        path = None
        if member.path != ticket.path:
            path = member.path = ticket.path
        forget, member.to_forget = member.to_forget, []
        message = ("range", command.run_id, *key, command.start, command.stop, command.step, setup, path, forget)
        self._post(member, message)
        self._look_within(look_again_s(self._timeout_s(ticket)))

    def _post(self, member: _Member, message: tuple[Any, ...]) -> None:
        idle = not member.outgoing
        member.outgoing.extend(packets(pickle.dumps(message, pickle.HIGHEST_PROTOCOL)))
        if idle and not member.flush():
            self.epoll.modify(member.link, select.EPOLLIN | select.EPOLLOUT)

    def _listen(self, member: _Member) -> None:
        was_open = member.is_open
        for message in member.receive():
            match message:
                case ("done", run_id, elapsed_s, warned, answers):
                    self._note(member, run_id, warned, answers, elapsed_s)
                    self.attempts[member.slot].succeeded()
                    self._feed(RangeFinished(member.slot, run_id, elapsed_s))
                case ("failed", run_id, task, step, is_bound, blob, summary, trace, warned):
                    self._note(member, run_id, warned)
                    self._feed(RangeFailed(member.slot, run_id, task, RemoteError(blob, summary, trace), is_bound, step))
                case ("stopped", run_id, task, warned):
                    self._note(member, run_id, warned)
                    self._feed(RangeStopped(member.slot, run_id, task))
                case ("hello", *_):
                    member.has_joined = True
                    self._feed(WorkerJoined(member.slot))
        if was_open and not member.is_open:
            # Usually it is dying. If it only lost its socket (a task that closed every descriptor) it is of no use to anyone.
            self.epoll.unregister(member.link)
            self._after(CLOSE_S, lambda: member.kill() if self.members.get(member.slot) is member else None)

    def _note(
        self, member: _Member, run_id: int, warned: Iterable[tuple[str, str, str]], answers: Iterable[bytes] = (), elapsed_s: float = 0.0
    ) -> None:
        if warned or answers or elapsed_s:
            for queued, plan_id, _ in self.state.in_flight(member.slot):
                if queued == run_id:
                    running = self.tickets[plan_id].running
                    running.warnings.update(dict.fromkeys(warned))
                    running.answers.extend(answers)
                    running.busy_s += elapsed_s

    # -- workers that do not get on

    def _timeout_s(self, ticket: Ticket) -> float | None:
        """Return how long a task of this plan may take: the shorter of what plan and pool say."""
        return min((t for t in (ticket.running.plan.task_timeout_s, self.task_timeout_s) if t is not None), default=None)

    def _look_within(self, delay_s: float) -> None:
        when = time.monotonic() + delay_s
        if when < self.look_at_s:
            self.look_at_s = when
            self.timers.append((when, self._look))

    def _look(self) -> None:
        """See where the workers are, and come back as long as one of them has work."""
        now = time.monotonic()
        if now < self.look_at_s:
            return  # a nearer look was asked for, and has been
        self.look_at_s = math.inf
        self._was_out_of_memory()
        for member in list(self.members.values()):
            queued = self.state.in_flight(member.slot)
            if not queued:
                member.watch.look(None, now)
                continue
            timeout_s = self._timeout_s(self.tickets[queued[0][1]])
            run_id, cursor = self._place(member)
            is_binding = self.words[WORDS_PER_SLOT * member.slot + 2]
            elapsed_s = member.watch.look((queued[0][0], run_id, cursor, is_binding), now)
            # Importing what a function needs is not its fault, and takes seconds in every new worker.
            if timeout_s is not None and elapsed_s > (max(timeout_s, STALLED_S) if is_binding else timeout_s):
                self._time_out(member, timeout_s, elapsed_s)
            if elapsed_s > STALLED_S and not member.watch.is_told:
                self._tell_if_stopped(member, elapsed_s)
            self._look_within(look_again_s(timeout_s))

    def _place(self, member: _Member) -> tuple[int, int]:
        """Return the run id that a worker shows, and the task; `NOT_BEGUN` when there is none."""
        at = WORDS_PER_SLOT * member.slot
        word = self.words[at]
        return self.words[at + 1], unpack(word)[0] if word != NOT_BEGUN else NOT_BEGUN

    def _time_out(self, member: _Member, timeout_s: float, elapsed_s: float) -> None:
        """Kill a worker for the task it is at. One that did not even begin its range is given longer: nobody is to blame."""
        place = self._place(member)
        self._listen(member)  # it may have done it by now
        if self._place(member) != place or not self.state.in_flight(member.slot):
            return
        if self.state.place(member.slot, *place) is not None:
            member.doom, member.doomed_at = f"task_timeout of {timeout_s:g} s", place
            member.kill()
        elif elapsed_s > max(timeout_s, STALLED_S):
            member.doom = f"it did not get to its tasks within {elapsed_s:.0f} s"
            member.kill()

    def _tell_if_stopped(self, member: _Member, elapsed_s: float) -> None:
        what = {"T": "stopped (T)", "D": "waiting for a device (D)"}.get(_state_of(member.process.pid))
        if what is None:
            return
        member.watch.is_told = True
        where = self.state.place(member.slot, *self._place(member)) or "its next tasks"
        pid = member.process.pid
        text = (
            f"worker process {pid} has not got on with {where} for {elapsed_s:.0f} s: it is {what}. Let it go on (kill -CONT {pid}) or "
            f"end it (kill -KILL {pid}; another does its work); sa.config.set(task_timeout=...) does that by itself."
        )
        # Not in this thread: a handler is the user's code, and may wait for us.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=_log.warning, args=(text,), name="shmarray-log", daemon=True).start()

    def _was_out_of_memory(self) -> bool:
        """Return whether the out-of-memory killer has been here just now."""
        count, now = oom_kills(), time.monotonic()
        if count > self.oom_kills:
            self.oom_kills, self.oom_until_s = count, now + OOM_S
        return now < self.oom_until_s

    def _why(self, member: _Member, code: int | None) -> str:
        """Return how a worker ended, in words."""
        if code != -signal.SIGKILL:
            return describe_exit(code)
        if member.doom:
            return member.doom
        return describe_exit(code) + (f", by the kernel's {OUT_OF_MEMORY}" if self._was_out_of_memory() else "")

    # -- workers

    def _start_soon(self, slot: int) -> None:
        """Start a worker, after a pause when others have died in this slot; or give the slot up when too many have."""
        attempts = self.attempts[slot]
        if attempts.is_over:
            self._give_up(slot)
        elif not attempts.pause_s:
            self._start(slot)
        else:
            self.restarts += 1
            self._after(attempts.pause_s, lambda: self._restart(slot))

    def _restart(self, slot: int) -> None:
        self.restarts -= 1
        self._start(slot)

    def _start(self, slot: int) -> None:
        if not self.starts:
            self.oom_kills = oom_kills()
        self.starts += 1
        at = WORDS_PER_SLOT * slot
        self.words[at], self.words[at + 1], self.words[at + 2] = NOT_BEGUN, 0, 0
        try:
            member = self._spawn(slot)
        except OSError as error:
            self._start_failed(slot, f"{type(error).__name__}: {error}")
            return
        self.members[slot] = member
        self.by_fd[member.link.fileno()] = self.by_fd[member.pidfd] = member
        self.epoll.register(member.link, select.EPOLLIN)
        self.epoll.register(member.pidfd, select.EPOLLIN)
        member.path = [*sys.path], _directory()
        environment = {"PYTHONPATH": os.environ.get("PYTHONPATH")}
        spill_directory = "" if self.memory.spill is None else self.memory.spill.directory
        self._post(member, ("hello", self.slots, self.arena_nbytes, *member.path, environment, spill_directory))
        self._after(START_S, lambda: self._expect(member))

    def _expect(self, member: _Member) -> None:
        if self.members.get(member.slot) is member and not member.has_joined:
            member.doom = f"not ready {START_S:.0f} s after its start"
            member.kill()

    def _spawn(self, slot: int) -> _Member:
        """Start a process. Only ever called by the loop's thread."""
        opened: list[Any] = []
        process = None
        try:
            link, far_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened += [link, far_link]
            life, far_life = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            opened += [life, far_life]
            capture = os.memfd_create("shmarray-stderr", os.MFD_CLOEXEC)
            opened.append(capture)
            os.fchmod(capture, 0o600)
            stderr = _duplicate_stderr()
            opened.append(stderr)
            faults.point("spawn")
            spill_fd = -1 if self.memory.spill is None else self.memory.spill.fd
            numbers = [far_link.fileno(), far_life.fileno(), self.arena_fd, self.control_fd, stderr, spill_fd]
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "scheduler.worker", *map(str, numbers), str(os.getpid()), str(slot)],
                stdin=subprocess.DEVNULL,
                stderr=capture,
                pass_fds=[number for number in numbers if number >= 0],
                env=_environment(),
                start_new_session=True,  # so that a Ctrl-C at the terminal does not shoot it
            )
            tie(far_life.fileno(), process.pid)
            link.setblocking(False)
            member = _Member(slot, process, link, life, capture)
        except BaseException:
            if process is not None:
                process.kill()
                process.wait()
            for each in opened:
                each.close() if isinstance(each, socket.socket) else os.close(each)
            raise
        far_link.close()
        far_life.close()
        os.close(stderr)
        return member

    def _bury(self, member: _Member) -> None:
        """Clear up after a death: what it was at, who replaces it."""
        faults.point("bury")
        code = member.process.poll()
        reason = self._why(member, code)
        if code != -signal.SIGKILL:
            member.doom = ""  # something else was faster
        was_killed = code == -signal.SIGKILL and not member.doom
        if member.is_open:
            self.epoll.unregister(member.link)
        self.epoll.unregister(member.pidfd)
        del self.by_fd[member.link.fileno()], self.by_fd[member.pidfd], self.members[member.slot]
        tail = "" if member.has_joined else member.tail()
        member.close()
        if not member.has_joined:
            self._start_failed(member.slot, f"{reason}\n{tail}".strip(), was_killed=was_killed)
            return
        at = WORDS_PER_SLOT * member.slot
        if not self.words[at + 1]:  # it was ready, and never began anything
            self.start_error = f"{reason}, before it began its first task"
            self.attempts[member.slot].failed(was_killed=was_killed)
        elif not self.words[at + 2]:  # it came as far as its tasks
            self.attempts[member.slot].succeeded()
        elif was_killed:  # the next one after a pause: who kills whatever starts would be through with all attempts in two seconds
            self.attempts[member.slot].failed(was_killed=True)
        self._lose(member, reason, was_killed=was_killed and OUT_OF_MEMORY not in reason)

    def _lose(self, member: _Member, reason: str, *, was_killed: bool = False) -> None:
        """Tell the state of a death, with what the dead worker left: its cursor, and a step that it was copying, which is finished here."""
        at = WORDS_PER_SLOT * member.slot
        run_id, is_binding = self.words[at + 1], self.words[at + 2]
        queued = self.state.in_flight(member.slot)
        found: tuple[int, int] | None = None
        if queued and queued[0][0] == run_id and self.words[at] != NOT_BEGUN:
            redo = self.redos[member.slot]
            task = unpack(self.words[at])[0]
            faults.point("repair")
            found = task, settled(redo, self.memory, task, 0)
            faults.point("repaired")
        for plan_id in {plan_id for _, plan_id, _ in queued}:
            self.tickets[plan_id].deaths += 1
        cursor, step = found or (None, 0)
        is_charged = not member.doom or member.doomed_at == (run_id, cursor)
        self._feed(WorkerLost(member.slot, cursor, reason, member.process.pid, not is_binding, step, is_charged, was_killed))
        faults.point("buried")

    def _start_failed(self, slot: int, why: str, *, was_killed: bool = False) -> None:
        self.start_error = why
        self.attempts[slot].failed(was_killed=was_killed)
        self._start_soon(slot)

    def _give_up(self, slot: int) -> None:
        """Go on with fewer workers; without any, tell every plan why. The next plan that is submitted tries anew."""
        attempts = self.attempts[slot]
        times = attempts.failures + attempts.kills
        self._feed(WorkerNotStarted(slot))
        if self.members or self.restarts:
            return
        for plan_id in list(self.tickets):
            error = WorkerStartError(
                f"starting worker processes failed {times} times in a row, and none is left. The last one, "
                f"{sys.executable!r}, said:\n{self.start_error}\nUse scheduler='threads' if processes cannot be started here."
            )
            self._feed(CancelRequested(plan_id, error))


def _finish(ticket: Ticket) -> None:
    try:
        ticket.running.close(ticket.failure, is_done=ticket.failure is None)
    finally:
        ticket.done.set()


_Work = queue.SimpleQueue[tuple[Running, SendRange] | int | None]  # a range, the id of a plan that has ended, or the end


def _helper(work: _Work, loop: _Loop, memory: Memory) -> None:
    """The thread that runs the layers only the driver can."""
    set_inline()
    lane = Lane(memory)
    while True:
        item = work.get()
        if item is None:
            return
        if isinstance(item, int):
            lane.forget(item)  # what was bound may hold open files, large arrays, or the pool
            continue
        running, command = item
        event = lane.run(running, command)
        if not loop.post(lambda event=event: loop._feed(event)):  # type: ignore[misc]  # a lambda's default is untyped
            return
        del item, running, event


def _poll(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _state_of(pid: int) -> str:
    """Return the letter that the kernel has for what a process is doing; "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return chr(file.read().rpartition(b") ")[2][0])
    except (OSError, IndexError):
        return ""


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return os.sep  # it was deleted


def _duplicate_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _environment() -> dict[str, str]:
    """Return the environment a worker starts in; it gives PYTHONPATH back its value once it runs."""
    environment = dict(os.environ)
    # Before NumPy is imported there: W workers with W threads each would be W * W.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    root = os.path.dirname(os.path.dirname(os.path.abspath(scheduler.__file__)))
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        # Only where it is needed: PYTHONPATH comes before the standard library, and site-packages may shadow that.
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


def describe_exit(code: int | None) -> str:
    """Return how a process ended, in words."""
    if code is None:
        return "it is gone"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


# --------------------------------------------------------------------------------------------------- for callers


class WorkerPool:
    """The handle on a loop and its workers. Nothing in the loop refers to it: dropped, the workers go."""

    def __init__(self, slots: int, arena_fd: int, arena_nbytes: int, memory: Memory, task_timeout_s: float | None = None) -> None:
        self._loop = _Loop(slots, arena_fd, arena_nbytes, memory, task_timeout_s)
        self._finalizer = weakref.finalize(self, self._loop.close, wait=False)
        self._finalizer.atexit = False  # _close_all does that, and waits

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are running now, joined or not."""
        return tuple(m.process.pid for m in list(self._loop.members.values()))

    @property
    def starts(self) -> int:
        """How many processes were ever started."""
        return self._loop.starts

    @property
    def is_over(self) -> bool:
        """Whether its loop takes nothing more: closed, or ended by a bug that the plans of then are told of."""
        return self._loop._is_closing

    def run(self, running: Running, kernels: Mapping[int, tuple[bytes, bytes]]) -> Report:
        """Run a plan and wait for it; raise what it raised. Closes ``running`` in any case, if need be later."""
        ticket = Ticket(running, kernels, ([*sys.path], _directory()))
        loop = self._loop
        group = current_group()
        try:
            if not loop.post(lambda: loop.submit(ticket)):
                closed = PoolClosed("the pool is closed, or was made before a fork; make a new one.")
                running.close(PlanFailed(running.plan_id, closed))
                _stay_out_of_the_exit()
                raise closed
            if group is not None:
                group.add(running.plan_id, lambda reason: loop.post(lambda: loop.abandon(ticket, reason)))
            ticket.done.wait()
        except BaseException as error:  # Ctrl-C, most likely
            reason = error if isinstance(error, Exception) else type(error)()
            # A loop that is closed knows already, and ends the plan when nobody works at it any more.
            try:
                if loop.post(lambda: loop.abandon(ticket, reason)):
                    ticket.done.wait(GIVE_UP_AFTER_S)
            finally:  # a second one, perhaps
                if not ticket.done.is_set:
                    running.abandon()
            raise
        finally:
            if group is not None:
                group.discard(running.plan_id)
        if ticket.failure is not None:
            _stay_out_of_the_exit()
            try:
                raise_failure(running.plan, ticket.failure)
            finally:
                ticket.failure = None
        return running.report(ticket.deaths)

    def close(self) -> None:
        """End the workers: at once when idle, after half a second with SIGKILL when not."""
        self._loop.close(wait=True)


def _close_all() -> None:
    global _is_exiting
    _is_exiting = True
    loops = list(_loops)
    for wait in (False, True):  # all of them at once, then one after the other
        for loop in loops:
            loop.close(wait=wait)


def _stay_out_of_the_exit() -> None:
    """In a daemon thread, when the interpreter ends: wait for that, rather than fail noisily because workers have gone first."""
    if _is_exiting and threading.current_thread().daemon:
        Signal().wait()


def _become_foreign() -> None:
    for loop in list(_loops):
        loop.become_foreign()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_become_foreign)
