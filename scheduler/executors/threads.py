"""Runs a plan in threads of this process: where worker processes cannot be had, or a function cannot be pickled.

Promises: nothing is pickled; a Ctrl-C comes within a second, though a task that is running then ends in its own time, in the
background, where it still holds what it uses. Threads live as long as the run: one that stays would have to be forked around.
Never put here: choices about tasks (`scheduler.state`).
"""

from __future__ import annotations

import contextvars
import queue
import threading
import traceback
from collections import deque

from scheduler.errors import SchedulerError
from scheduler.running import (
    GIVE_UP_AFTER_S,
    Host,
    Lane,
    Running,
    Signal,
    raise_failure,
    set_inline,
    start_thread,
)
from scheduler.state import (
    DRIVER_LANE,
    BufferDone,
    CancelRequested,
    Command,
    Event,
    OpenLayer,
    PlanFailed,
    PlanFinished,
    RangeStopped,
    SendRange,
    State,
    StopPlan,
    Submitted,
    WorkerJoined,
)
from scheduler.task import Outcome, Plan, Report

__all__ = ["run"]


def run(pool: Host, plan: Plan, outcome: Outcome) -> Report:
    """Run the plan in as many threads as the pool has workers, and wait for it."""
    running = Running(pool, plan, outcome)
    crew = _Crew(pool, running)
    threads = []
    try:
        for lane in reversed(crew.queues):  # lane 0, which submits, last: nobody is sent a range before they are there
            context = contextvars.copy_context()  # what the caller set (errstate, the entered pool) holds in its tasks too
            thread = threading.Thread(target=context.run, args=(crew.serve, lane), name=f"shmarray-{lane}", daemon=True)
            threads.append(thread)
            start_thread(thread)
        # Only the threads touch the state: a Ctrl-C in this one cannot leave it half changed.
        crew.done.wait()
    except BaseException as error:
        crew.reason = error
        running.is_stopping = True  # after the reason: a thread that sees this one needs that one
        if crew.take_submission() is not None:  # nothing had begun
            crew.dismiss()
            running.close(PlanFailed(running.plan_id, error))
        else:
            try:
                crew.done.wait(GIVE_UP_AFTER_S)
            finally:
                if not crew.done.is_set:
                    running.abandon()
        raise
    for thread in threads:
        thread.join()
    if crew.failure is not None:
        try:
            raise_failure(plan, crew.failure)
        finally:
            crew.failure = None
    return running.report()


class _Crew:
    """The threads of one run, and the state they drive under one lock."""

    def __init__(self, pool: Host, running: Running) -> None:
        self.running = running
        self.memory = pool.memory
        self.state = State(pool.workers)
        lanes = [*range(pool.workers)]
        for lane in lanes:
            self.state.handle(WorkerJoined(lane))
        if any(layer.place == "driver" for layer in running.plan.layers):
            lanes.append(DRIVER_LANE)
        self.queues: dict[int, queue.SimpleQueue[SendRange | None]] = {k: queue.SimpleQueue() for k in lanes}
        self.mutex = threading.Lock()  # guards state and the three below
        self.broken = False
        self.failure: PlanFailed | None = None
        self.is_cancel_told = False
        self.reason: BaseException | None = None  # written by the waiting thread, once, before running.is_stopping
        self.done = Signal()
        # Whoever pops it, lane 0 or an interrupted `run`, decides whether the plan ever begins.
        self.submission = deque([running.submission()])

    def take_submission(self) -> Submitted | None:
        try:
            return self.submission.pop()
        except IndexError:
            return None

    def serve(self, lane: int) -> None:
        """Be one thread."""
        set_inline()
        runner = Lane(self.memory)
        if lane == 0 and (submission := self.take_submission()) is not None:
            self.tell(submission)
        while (item := self.queues[lane].get()) is not None:
            self.tell(runner.run(self.running, item))

    def tell(self, event: Event) -> None:
        with self.mutex:
            try:
                self.feed(self.running.noted(event))
            except BaseException as bug:
                told = "the scheduler failed; this is a bug of ours:\n" + "".join(traceback.format_exception(bug))
                self.end(PlanFailed(self.running.plan_id, SchedulerError(told)))

    def feed(self, event: Event) -> None:
        events = deque([event])
        if self.reason is not None and not self.is_cancel_told:
            self.is_cancel_told = True
            events.append(CancelRequested(self.running.plan_id, self.reason))
            if not isinstance(event, Submitted):
                events.rotate()  # a range given back before the plan is known to stop would be sent out again
        while events:
            for command in self.state.handle(events.popleft()):
                self.act(command, events)

    def act(self, command: Command, events: deque[Event]) -> None:
        running = self.running
        match command:
            case SendRange():
                if self.broken:
                    events.append(RangeStopped(command.worker, command.run_id, command.start))
                else:
                    self.queues[command.worker].put(command)
            case OpenLayer():
                try:
                    running.open(command.layer)
                except Exception as error:
                    self.broken = True
                    events.append(CancelRequested(running.plan_id, error))
            case BufferDone():
                if not self.broken:
                    running.buffer_done(command.buffer)
            case StopPlan():
                running.is_stopping = True
            case PlanFinished():
                self.end(None)
            case PlanFailed():
                self.end(command)

    def end(self, failure: PlanFailed | None) -> None:
        self.failure = failure
        self.running.close(failure, is_done=failure is None)
        self.dismiss()
        self.done.set()

    def dismiss(self) -> None:
        for work in self.queues.values():
            work.put(None)
