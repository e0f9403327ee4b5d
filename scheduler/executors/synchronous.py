"""Runs a plan in the calling thread, ascending: for tiny work, and for a debugger.

Promises: plain tracebacks through the user's function, no threads, nothing pickled. Never put here: anything concurrent.
"""

from __future__ import annotations

from collections import deque

from scheduler.running import Host, Lane, Running, raise_failure
from scheduler.state import (
    BufferDone,
    Event,
    OpenLayer,
    PlanFailed,
    PlanFinished,
    SendRange,
    State,
    StopPlan,
    WorkerJoined,
)
from scheduler.task import Outcome, Plan, Report

__all__ = ["run"]


def run(pool: Host, plan: Plan, outcome: Outcome) -> Report:
    """Run the plan here and now; raise what its first failing task raises."""
    running = Running(pool, plan, outcome)
    lane = Lane(pool.memory)
    failure: PlanFailed | None = None
    is_done = was_struck = False
    try:
        state = State(1)
        state.handle(WorkerJoined(0))
        events: deque[Event] = deque([running.submission()])
        ranges: deque[SendRange] = deque()
        while True:
            while events:
                commands = state.handle(events.popleft())
                for command in commands:
                    match command:
                        case SendRange():
                            ranges.append(command)
                        case OpenLayer():
                            running.open(command.layer)  # an error here ends the run: nothing is in flight but this thread
                        case BufferDone():
                            running.buffer_done(command.buffer)
                        case PlanFailed():
                            failure = command
                        case PlanFinished():
                            is_done = True
                        case StopPlan():
                            running.is_stopping = True
            if is_done:
                return running.report()
            if failure is not None:
                try:
                    raise_failure(plan, failure)
                finally:
                    del commands, command
            events.append(running.noted(lane.run(running, ranges.popleft(), interruptible=True)))
    except BaseException as error:  # Ctrl-C may strike anywhere here, also in the state machine: the lane knows what was done
        while failure is None and not is_done:
            try:  # no function of Python's stands before it, not even `suppress`: as that begins, Ctrl-C would get past it
                failure = lane.account(running, error)
            except KeyboardInterrupt:
                was_struck = True
        raise
    finally:
        is_closed = False
        while not is_closed:
            try:
                running.close(failure, is_done=is_done)
                is_closed = True
            except KeyboardInterrupt:
                was_struck = True
        lane.redo.close()
        is_told = failure is not None and isinstance(failure.error, KeyboardInterrupt)
        del failure  # no circle with the traceback
        if was_struck and not is_told:
            raise KeyboardInterrupt
