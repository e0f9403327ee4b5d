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
    Submitted,
    WorkerJoined,
)
from scheduler.task import Plan, Report

__all__ = ["run"]


def run(pool: Host, plan: Plan) -> Report:
    """Run the plan here and now; raise what its first failing task raises."""
    running = Running(pool, plan)
    try:
        state = State(1)
        lane = Lane(pool.memory)
        state.handle(WorkerJoined(0))
        events: deque[Event] = deque([Submitted(running.plan_id, plan, running.room_nbytes)])
        failure: PlanFailed | None = None
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
                            return running.report()
                        case StopPlan():
                            running.is_stopping = True
            if failure is not None:
                try:
                    raise_failure(plan, failure)
                finally:
                    del failure, commands, command
            events.append(lane.run(running, ranges.popleft(), interruptible=True))
    finally:
        running.close()
