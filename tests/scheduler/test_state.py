"""The state machine, driven without a process: random runs against its promises, and each promise by itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from scheduler.errors import TornChunkError, WorkerDied
from scheduler.state import (
    DRIVER_LANE,
    MOST_KILLS_BINDING,
    OUT_OF_MEMORY,
    BufferDone,
    CancelRequested,
    Command,
    IntervalSet,
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
    Submitted,
    WorkerJoined,
    WorkerLost,
    WorkerNotStarted,
)
from scheduler.task import Address, Buffer, Dependency, Layer, Plan

pytestmark = pytest.mark.timeout(60)


class NoKernel:
    def bind(self, context: object) -> Callable[[int], None]:
        raise AssertionError("the state machine runs nothing")


def layer(name: str = "layer", ntasks: int = 1, **more: object) -> Layer:
    return Layer(name=name, kernel=NoKernel(), ntasks=ntasks, **more)  # type: ignore[arg-type]


def plan(*layers: Layer, buffers: tuple[Buffer, ...] = ()) -> Plan:
    made = Plan(buffers=buffers, layers=layers)
    made.check()
    return made


def ready_state(nslots: int) -> State:
    state = State(nslots)
    for slot in range(nslots):
        state.handle(WorkerJoined(slot))
    return state


def sent(commands: list[Command]) -> list[SendRange]:
    return [c for c in commands if isinstance(c, SendRange)]


def drain(state: State, commands: list[Command], task_s: float = 0.001) -> list[Command]:
    """Finish every range, oldest first; return all commands, in order."""
    seen = list(commands)
    waiting = sent(commands)
    while waiting:
        piece = waiting.pop(0)
        more = state.handle(RangeFinished(piece.worker, piece.run_id, task_s * (piece.stop - piece.start)))
        state.check()
        seen += more
        waiting += sent(more)
    return seen


# ------------------------------------------------------------------------------------------------- interval sets


def test_interval_set_agrees_with_a_set_of_integers() -> None:
    rng = random.Random(1)
    for _ in range(200):
        cuts = sorted(rng.sample(range(40), 12))
        pieces = list(pairwise(cuts))
        rng.shuffle(pieces)
        intervals, plain = IntervalSet(), set[int]()
        for start, stop in pieces[: rng.randrange(1, 11)]:
            intervals.add(start, stop)
            plain |= set(range(start, stop))
            assert intervals.count == len(plain)
            assert {i for a, b in intervals for i in range(a, b)} == plain
            for low in range(40):
                high = rng.randrange(low + 1, 42)
                assert intervals.has(low, high) == (set(range(low, high)) <= plain)
        assert all(b < c for (_, b), (c, _) in pairwise(intervals))


# ----------------------------------------------------------------------------------------------------- dispatch


def test_few_tasks_are_spread_over_all_workers() -> None:
    for ntasks in (4, 5, 8):
        state = ready_state(4)
        commands = state.handle(Submitted(1, plan(layer(ntasks=ntasks, nbytes_per_task=100))))
        assert {c.worker for c in sent(commands)} == {0, 1, 2, 3}
        drain(state, commands)


def test_nothing_waits_behind_a_task_of_unknown_length() -> None:
    state = ready_state(2)
    commands = state.handle(Submitted(1, plan(layer(ntasks=100))))
    assert [c.worker for c in sent(commands)] == [0, 1]
    first = sent(commands)[0]
    slow = state.handle(RangeFinished(0, first.run_id, 5.0))
    assert len(sent(slow)) == 1


def test_short_ranges_are_queued_two_deep() -> None:
    state = ready_state(2)
    commands = drain_once(state, state.handle(Submitted(1, plan(layer(ntasks=10_000)))))
    assert max(len(queue) for queue in state.lanes.values()) == 2
    drain(state, commands)


def drain_once(state: State, commands: list[Command]) -> list[Command]:
    rest = sent(commands)
    out: list[Command] = list(rest[1:])
    return out + state.handle(RangeFinished(rest[0].worker, rest[0].run_id, 0.001))


def test_repeated_plans_send_the_same_tasks_to_the_same_workers() -> None:
    def halves() -> list[tuple[int, int]]:
        state = ready_state(2)
        commands = drain(state, state.handle(Submitted(1, plan(layer(ntasks=1000, nbytes_per_task=10**6)))))
        return [(c.worker, i) for c in sent(commands) for i in range(c.start, c.stop)]

    once = halves()
    assert once == halves()
    at_home = sum((i >= 500) == worker for worker, i in once)
    assert at_home > 900


def test_who_is_done_steals_from_the_end_of_the_largest_part() -> None:
    state = ready_state(2)
    commands = state.handle(Submitted(1, plan(layer(ntasks=100))))
    stuck = next(c for c in sent(commands) if c.worker == 1)
    seen = [c for c in sent(commands) if c.worker == 0]
    waiting = list(seen)
    while waiting:  # worker 1 stays at its first range
        more = sent(state.handle(RangeFinished(0, waiting.pop(0).run_id, 0.1)))
        seen += more
        waiting += more
    done = {i for c in seen for i in range(c.start, c.stop)}
    assert done == set(range(100)) - set(range(stuck.start, stuck.stop))
    stolen = [c.start for c in seen if c.start >= 50]
    assert stolen == sorted(stolen, reverse=True)


def test_a_million_tasks_cost_few_commands() -> None:
    state = ready_state(2)
    started = time.process_time()
    commands = drain(state, state.handle(Submitted(1, plan(layer(ntasks=1_000_000)))), task_s=1e-6)
    assert len(sent(commands)) < 500
    assert sum(c.stop - c.start for c in sent(commands)) == 1_000_000
    assert time.process_time() - started < 5


def test_two_thousand_layers_are_dispatched_in_linear_time() -> None:
    layers = [layer(f"source {i}", 2, nbytes_per_task=1000) for i in range(1000)]
    layers += [layer(f"sink {i}", 2, nbytes_per_task=1000, dependencies=(Dependency(i),)) for i in range(1000)]
    state = ready_state(2)
    commands = state.handle(Submitted(1, plan(*layers)))
    started = time.process_time()
    count = 0
    while pieces := sent(commands):
        commands = []
        for piece in pieces:
            commands += state.handle(RangeFinished(piece.worker, piece.run_id, 0.001))
            count += 1
    assert commands == [PlanFinished(1)]
    assert time.process_time() - started < 2


def test_range_sizes_follow_the_measured_cost() -> None:
    state = ready_state(2)
    commands = drain(state, state.handle(Submitted(1, plan(layer(ntasks=100_000)))), task_s=1e-4)
    middle = [c.stop - c.start for c in sent(commands)][20:200]
    assert all(20 <= size <= 200 for size in middle)  # 2 .. 20 ms


def test_a_later_layer_is_preferred_as_soon_as_it_is_ready() -> None:
    same = Dependency(0, lambda a, b: (a, b))
    state = ready_state(1)
    commands = drain(state, state.handle(Submitted(1, plan(layer("a", 4), layer("b", 4, dependencies=(same,)), layer("c", 4)))))
    order = [c.layer for c in sent(commands)]
    opened = [c.layer for c in commands if isinstance(c, OpenLayer)]
    assert opened == [0, 1, 2]  # the consumer before the next source
    assert order == sorted(order)


def test_layers_overlap_where_ranges_allow_it() -> None:
    same = Dependency(0, lambda a, b: (a, b))
    state = ready_state(2)
    commands = state.handle(Submitted(1, plan(layer("a", 2), layer("b", 2, dependencies=(same,)))))
    more = state.handle(RangeFinished(0, sent(commands)[0].run_id, 1.0))
    assert [(c.worker, c.layer, c.start, c.stop) for c in sent(more)] == [(0, 1, 0, 1)]  # task 1 of a is still running


def test_driver_layers_go_to_the_driver_alone() -> None:
    state = ready_state(2)
    made = plan(layer("read", 6, place="driver"), layer("work", 6, dependencies=(Dependency(0, lambda a, b: (a, b)),)))
    commands = drain(state, state.handle(Submitted(1, made)))
    assert {c.worker for c in sent(commands) if c.layer == 0} == {DRIVER_LANE}
    assert DRIVER_LANE not in {c.worker for c in sent(commands) if c.layer == 1}
    assert commands[-1] == PlanFinished(1)


def test_plans_take_turns() -> None:
    state = ready_state(1)
    state.handle(Submitted(1, plan(layer(ntasks=50))))
    commands = state.handle(Submitted(2, plan(layer(ntasks=50))))
    order = []
    waiting = [SendRange(0, state.lanes[0][0].run_id, 1, 0, 0, 1), *sent(commands)]
    while waiting:
        piece = waiting.pop(0)
        order.append(piece.plan_id)
        waiting += sent(state.handle(RangeFinished(0, piece.run_id, 0.1)))
    assert order[:8] in ([1, 2] * 4, [1, 1, 2, 1, 2, 1, 2, 1])


def test_a_plan_without_layers_is_finished_at_once() -> None:
    assert State(2).handle(Submitted(1, Plan(buffers=(), layers=()))) == [PlanFinished(1)]


# ------------------------------------------------------------------------------------------------------- memory


def chain(length: int, nbytes: int = 10) -> Plan:
    layers = [layer("0", 8, writes=(0,))]
    for i in range(1, length):
        need = Dependency(i - 1, lambda a, b: (a, b))
        layers.append(layer(str(i), 8, reads=(i - 1,), writes=(i,), dependencies=(need,)))
    return plan(*layers, buffers=tuple(Buffer(nbytes) for _ in range(length)))


def test_temporaries_live_from_the_first_range_to_the_last_reader() -> None:
    state = ready_state(2)
    commands = drain(state, state.handle(Submitted(1, chain(5))))
    live, most = set[int](), 0
    for command in commands:
        match command:
            case OpenLayer(_, index):
                live |= {index}
            case BufferDone(_, buffer):
                live.remove(buffer)
        most = max(most, len(live))
    assert not live and most <= 3


def test_layers_run_ahead_only_while_there_is_room() -> None:
    for room, most in ((None, 30), (20, 2), (1, 2)):
        state = ready_state(2)
        sources = [layer(f"s{i}", 4, writes=(2 * i,)) for i in range(6)]
        sinks = [
            layer(f"t{i}", 4, reads=(2 * i,), writes=(2 * i + 1,), dependencies=(Dependency(i, lambda a, b: (a, b)),)) for i in range(6)
        ]
        made = plan(*sources, *sinks, buffers=tuple(Buffer(10) if i % 2 == 0 else Buffer(10, Address(0, 0)) for i in range(12)))
        commands = drain(state, state.handle(Submitted(1, made, room)))
        live, peak = 0, 0
        for command in commands:
            live += isinstance(command, OpenLayer) and command.layer < 6
            live -= isinstance(command, BufferDone)
            peak = max(peak, live)
        assert commands[-1] == PlanFinished(1)
        assert peak <= most


# ------------------------------------------------------------------------------------------------------- deaths


def test_workers_are_asked_for_at_the_first_plan_that_needs_them() -> None:
    state = State(2)
    assert sent(state.handle(Submitted(1, plan(layer("read", place="driver"))))) != []
    assert state.handle(Submitted(2, plan(layer()))) == [StartWorker(0), StartWorker(1)]
    assert state.handle(Submitted(3, plan(layer()))) == []
    assert len(sent(state.handle(WorkerJoined(1)))) == 1  # work starts with the first that comes
    state.handle(WorkerNotStarted(0))
    assert state.handle(Submitted(4, plan(layer()))) == [StartWorker(0)]


def test_a_death_is_charged_to_the_task_at_the_cursor_alone() -> None:
    state = ready_state(1)
    state.handle(Submitted(1, plan(layer(ntasks=640))))
    piece = state.lanes[0][0]
    state.handle(RangeFinished(0, piece.run_id, 0.001))
    first, second = state.lanes[0]
    assert first.stop - first.start >= 3
    commands = state.handle(WorkerLost(0, first.start + 1, "killed by SIGKILL", 77))
    state.check()
    assert commands == [StartWorker(0)]
    commands = state.handle(WorkerJoined(0))
    redone = drain(state, commands)
    ranges = [(c.start, c.stop) for c in sent(redone)]
    assert (first.start + 1, first.start + 2) in ranges
    assert first.start not in {a for a, _ in ranges}
    assert (second.start, second.stop) in ranges
    assert redone[-1] == PlanFinished(1)


def test_a_worker_that_died_after_its_last_task_has_done_its_range() -> None:
    state = ready_state(1)
    commands = state.handle(Submitted(1, plan(layer(ntasks=1, retry=False))))
    assert sent(commands)[0].stop == 1
    assert PlanFinished(1) in state.handle(WorkerLost(0, 1, "exit code 0", 5))


def test_a_task_that_ends_three_workers_is_refused_by_name() -> None:
    state = ready_state(1)
    made = plan(layer("evil", 3, describe=lambda i: f"chunk ({i}, 0)", line="script.py:12"))
    commands = state.handle(Submitted(1, made))
    for death in range(3):
        piece = sent(commands)[0]
        assert piece.start == 0
        commands = state.handle(WorkerLost(0, 0, "killed by SIGSEGV", 100 + death))
        state.check()
        if death < 2:
            commands = state.handle(WorkerJoined(0))
    failure = next(c for c in commands if isinstance(c, PlanFailed))
    assert isinstance(failure.error, WorkerDied)
    for part in ("'evil'", "chunk (0, 0)", "script.py:12", "SIGSEGV", "100", "101", "102"):
        assert part in str(failure.error)


def test_a_worker_killed_for_an_earlier_task_charges_nobody() -> None:
    state = ready_state(1)
    (piece,) = sent(state.handle(Submitted(1, plan(layer(ntasks=1)))))
    for _ in range(5):
        assert state.handle(WorkerLost(0, 0, "task_timeout of 5 s", 7, is_charged=False)) == [StartWorker(0)]
        (piece,) = sent(state.handle(WorkerJoined(0)))
        state.check()
    assert PlanFinished(1) in state.handle(RangeFinished(0, piece.run_id, 0.1))


def test_the_place_of_a_worker_is_told_only_while_it_is_at_a_task() -> None:
    state = ready_state(1)
    (piece,) = sent(state.handle(Submitted(1, plan(layer(ntasks=1, line="script.py:8", describe=lambda i: f"chunk {i}")))))
    place = state.place(0, piece.run_id, 0)
    assert place is not None and all(part in place for part in ("chunk 0", "'layer'", "script.py:8"))
    assert state.place(0, piece.run_id, 1) is None  # all done, not reported yet
    assert state.place(0, piece.run_id, -1) is None
    assert state.place(0, piece.run_id + 1, 0) is None
    assert state.place(1, piece.run_id, 0) is None


def test_a_task_that_died_for_lack_of_memory_is_done_again_with_nothing_beside_it() -> None:
    state = ready_state(4)
    pieces = sent(state.handle(Submitted(1, plan(layer(ntasks=100)))))
    assert len(pieces) == 4
    commands = state.handle(WorkerLost(pieces[0].worker, pieces[0].start, f"killed by SIGKILL, by the kernel's {OUT_OF_MEMORY}", 7))
    commands += state.handle(WorkerJoined(pieces[0].worker))
    assert sent(commands) == []  # the others are at work
    for piece in pieces[1:3]:
        assert sent(state.handle(RangeFinished(piece.worker, piece.run_id, 0.1))) == []
    (alone,) = sent(state.handle(RangeFinished(pieces[3].worker, pieces[3].run_id, 0.1)))
    assert (alone.start, alone.stop) == (pieces[0].start, pieces[0].start + 1)
    commands = state.handle(RangeFinished(alone.worker, alone.run_id, 0.1))
    assert len({piece.worker for piece in sent(commands)}) == 4  # and then all together again
    assert isinstance(drain(state, commands)[-1], PlanFinished)


def killed(cursor: int, pid: int = 7, **more: object) -> WorkerLost:
    return WorkerLost(0, cursor, "killed by SIGKILL", pid, was_killed=True, **more)  # type: ignore[arg-type]


def lose(state: State, events: list[WorkerLost]) -> list[Command]:
    """Lose the worker of a state of one slot again and again, until the plan ends; return the last commands."""
    commands: list[Command] = []
    for event in events:
        commands = state.handle(event)
        state.check()
        if any(isinstance(c, PlanFailed) for c in commands):
            return commands
        commands = state.handle(WorkerJoined(0))
    return commands


def test_kills_from_outside_while_our_own_code_is_loaded_charge_no_task() -> None:
    state = ready_state(1)
    state.handle(Submitted(1, plan(layer(ntasks=1, in_place=True))))
    (piece,) = sent(lose(state, [killed(0, is_bound=False)] * (MOST_KILLS_BINDING - 1)))
    assert PlanFinished(1) in state.handle(RangeFinished(0, piece.run_id, 0.1))


def test_kills_from_outside_while_code_is_loaded_come_to_an_end() -> None:
    state = ready_state(1)
    state.handle(Submitted(1, plan(layer("add", 4, describe=lambda i: f"chunk {i}", line="script.py:3", in_place=True))))
    events = [killed(0, is_bound=False, pid=100 + i) for i in range(50)]
    (failed,) = [c for c in lose(state, events) if isinstance(c, PlanFailed)]
    assert state.counts["deaths"] == MOST_KILLS_BINDING
    assert isinstance(failed.error, WorkerDied) and (failed.layer, failed.task) == (0, 0)
    assert failed.unfinished == () == failed.finished  # nothing was written
    for part in ("20 worker processes in a row", "chunk 0", "'add'", "script.py:3", "process 119: killed by SIGKILL"):
        assert part in str(failed.error)


def test_any_progress_of_the_layer_begins_the_count_of_such_kills_anew() -> None:
    for progress in ("a task", "a step"):
        state = ready_state(1)
        state.handle(Submitted(1, plan(layer(ntasks=50, in_place=True))))
        for turn in range(1, 4):
            lose(state, [killed(state.lanes[0][0].start, is_bound=False)] * (MOST_KILLS_BINDING - 1))
            piece = state.lanes[0][0]
            if progress == "a task":
                state.handle(RangeFinished(0, piece.run_id, 1.0))
            else:
                lose(state, [killed(piece.start, step=turn)])
            state.check()
        assert 1 in state.plans


def test_what_is_charged_to_a_task_though_its_kernel_was_not_bound() -> None:
    """A user's function that is loaded, a crash, the out-of-memory killer (not ``was_killed``): three are enough."""
    crash = WorkerLost(0, 0, "killed by SIGSEGV", 7, is_bound=False)
    no_memory = WorkerLost(0, 0, f"killed by SIGKILL, by the kernel's {OUT_OF_MEMORY}", 7, is_bound=False)
    for isolated, event in ((True, killed(0, is_bound=False)), (False, crash), (False, no_memory), (False, killed(0))):
        state = ready_state(1)
        state.handle(Submitted(1, replace(plan(layer(ntasks=1)), isolated=isolated)))
        (failed,) = [c for c in lose(state, [event] * 9) if isinstance(c, PlanFailed)]
        assert state.counts["deaths"] == 3 and "ended 3 worker processes" in str(failed.error)


def test_deaths_of_a_task_in_place_that_got_on_in_between_are_not_added_up() -> None:
    state = ready_state(1)
    state.handle(Submitted(1, plan(layer(ntasks=1, in_place=True))))
    commands = lose(state, [killed(0, step=step) for step in range(1, 100)])
    (piece,) = sent(commands)
    assert piece.step == 99 and PlanFinished(1) in state.handle(RangeFinished(0, piece.run_id, 0.1))
    # Two at one step and one at the next, over and over; then three at one.
    state = ready_state(1)
    state.handle(Submitted(2, plan(layer(ntasks=1, in_place=True))))
    lose(state, [killed(0, step=at // 2) for at in range(2, 60)])
    assert 2 in state.plans
    assert any(isinstance(c, PlanFailed) for c in lose(state, [killed(0, step=29)] * 1))


def test_a_refusal_advises_according_to_what_killed() -> None:
    for reason, advice in (
        (f"killed by SIGKILL, by the kernel's {OUT_OF_MEMORY}", "ran out of memory"),
        ("task_timeout of 5 s", "longer than task_timeout allows"),
        ("killed by SIGSEGV", "come from the function itself"),
    ):
        state = ready_state(1)
        state.handle(Submitted(1, plan(layer(ntasks=1))))
        for _ in range(2):
            state.handle(WorkerLost(0, 0, reason, 7))
            state.handle(WorkerJoined(0))
        (failed,) = [c for c in state.handle(WorkerLost(0, 0, reason, 7)) if isinstance(c, PlanFailed)]
        assert advice in str(failed.error) and str(failed.error).count(reason) == 3


def test_a_task_that_must_not_run_twice_leaves_a_torn_chunk() -> None:
    state = ready_state(1)
    made = plan(layer("add", 1, describe=lambda i: f"chunk {i}", line="script.py:3", retry=False))
    state.handle(Submitted(1, made))
    commands = state.handle(WorkerLost(0, 0, "killed by SIGKILL", 9))
    failure = next(c for c in commands if isinstance(c, PlanFailed))
    assert isinstance(failure.error, TornChunkError)
    assert failure.error.layer == 0 and failure.error.tasks == (0,)
    assert failure.unfinished == ((0, 0, 1),)
    assert all(part in str(failure.error) for part in ("'add'", "chunk 0", "script.py:3", "SIGKILL"))


def test_a_range_that_was_not_begun_is_given_to_another() -> None:
    state = ready_state(2)
    commands = state.handle(Submitted(1, plan(layer("add", 2, retry=False))))
    mine = next(c for c in sent(commands) if c.worker == 0)
    commands = state.handle(WorkerLost(0, None, "killed by SIGKILL", 9))
    state.check()
    other = next(c for c in sent(drain_all(state)) if (c.start, c.stop) == (mine.start, mine.stop))
    assert other.worker == 1


def drain_all(state: State) -> list[Command]:
    out: list[Command] = []
    while any(state.lanes.values()):
        lane, queue = next((k, q) for k, q in state.lanes.items() if q)
        out += state.handle(RangeFinished(lane, queue[0].run_id, 0.001))
    return out


# ----------------------------------------------------------------------------------------------------- failures


def test_the_lowest_failing_task_is_told_whoever_was_faster() -> None:
    for order in ((0, 1), (1, 0)):
        state = ready_state(2)
        commands = state.handle(Submitted(1, plan(layer(ntasks=2))))
        pieces = sent(commands)
        seen: list[Command] = []
        for at in order:
            piece = pieces[at]
            seen += state.handle(RangeFailed(piece.worker, piece.run_id, piece.start, ValueError(str(piece.start))))
            state.check()
        assert [c for c in seen if isinstance(c, StopPlan)] == [StopPlan(1)]
        failure = next(c for c in seen if isinstance(c, PlanFailed))
        assert str(failure.error) == "0" and (failure.layer, failure.task) == (0, 0)
        assert failure.unfinished == ((0, 0, 1), (0, 1, 2))


def test_a_plan_fails_only_when_nobody_holds_a_range_of_it() -> None:
    state = ready_state(2)
    pieces = sent(state.handle(Submitted(1, plan(layer(ntasks=100)))))
    commands = state.handle(CancelRequested(1, "no longer wanted"))
    assert commands == [StopPlan(1)]
    assert state.handle(RangeFinished(0, pieces[0].run_id, 0.1)) == []
    commands = state.handle(RangeStopped(1, pieces[1].run_id, pieces[1].start))
    assert [type(c) for c in commands] == [PlanFailed]
    assert state.handle(CancelRequested(1, "again")) == []


def test_one_failing_plan_leaves_the_others_alone() -> None:
    state = ready_state(2)
    bad = sent(state.handle(Submitted(1, plan(layer(ntasks=1)))))[0]
    good = state.handle(Submitted(2, plan(layer(ntasks=20))))
    commands = state.handle(RangeFailed(bad.worker, bad.run_id, 0, ValueError("no")))
    assert any(isinstance(c, PlanFailed) and c.plan_id == 1 for c in commands)
    assert drain(state, good + commands)[-1] == PlanFinished(2)


# --------------------------------------------------------------------------------------------------- random runs


def random_plan(rng: random.Random) -> Plan:
    layers: list[Layer] = []
    buffers = [Buffer(rng.randrange(1, 100)) for _ in range(rng.randrange(1, 12))]
    written: list[int] = []
    for index in range(rng.randrange(1, 12)):
        ntasks = rng.choice((1, 2, 3, 7, 20, 100))
        dependencies = []
        for other in rng.sample(range(index), min(index, rng.randrange(0, 3))):
            total = layers[other].ntasks
            halo = rng.randrange(0, 3)

            def requires(a: int, b: int, n: int = ntasks, m: int = total, h: int = halo) -> tuple[int, int]:
                return max(0, a * m // n - h), min(m, -(-b * m // n) + h)

            dependencies.append(Dependency(other, None if rng.random() < 0.3 else requires))
        writes = tuple(rng.sample(range(len(buffers)), rng.randrange(0, min(3, len(buffers)))))
        reads = tuple(rng.sample(written, min(len(written), rng.randrange(0, 3))))
        layers.append(
            layer(
                f"layer {index}",
                ntasks,
                dependencies=tuple(dependencies),
                reads=reads,
                writes=writes,
                nbytes_per_task=rng.choice((0, 1000, 10**7)),
                place="driver" if rng.random() < 0.15 else "worker",
                retry=rng.random() < 0.8,
            )
        )
        written = sorted({*written, *writes})
    return plan(*layers, buffers=tuple(buffers))


class World:
    """Plays the runner: keeps what the promises are checked against."""

    def __init__(self, seed: int, *, harm: bool, resumes: bool = False) -> None:
        self.rng = random.Random(seed)
        self.harm = harm
        self.resumes = resumes
        self.resumed: set[int] = set()
        self.nslots = self.rng.choice((1, 2, 3, 8))
        self.state = State(self.nslots)
        self.plans: dict[int, Plan] = {}
        self.in_order: set[int] = set()
        self.done: dict[tuple[int, int], list[int]] = {}  # how often each task was done
        self.steps: dict[tuple[int, int], list[int]] = {}  # how many steps of each, in layers in place
        self.opened: set[tuple[int, int]] = set()
        self.freed: set[tuple[int, int]] = set()
        self.ended: dict[int, Command] = {}
        self.stopping: set[int] = set()
        self.starting: list[int] = []
        self.alive: set[int] = set()
        self.trace: list[Command] = []

    def feed(self, event: object) -> None:
        commands = self.state.handle(event)  # type: ignore[arg-type]
        self.state.check()
        self.trace += commands
        for command in commands:
            self.see(command)

    def see(self, command: Command) -> None:
        match command:
            case OpenLayer(plan_id, index):
                assert (plan_id, index) not in self.opened
                self.opened.add((plan_id, index))
                if plan_id in self.in_order:
                    assert all(all(self.done[plan_id, before]) for before in range(index))
            case SendRange(worker, _, plan_id, index, start, stop, first):
                assert (plan_id, index) in self.opened
                steps = self.steps[plan_id, index]
                assert first == steps[start] and not any(steps[start + 1 : stop]), "steps done twice, or left out"
                assert plan_id not in self.ended and plan_id not in self.stopping
                assert worker == DRIVER_LANE or worker in self.alive
                made = self.plans[plan_id].layers[index]
                assert 0 <= start < stop <= made.ntasks
                for dependency in made.dependencies:
                    have = self.done[plan_id, dependency.layer]
                    low, high = dependency.requires(start, stop) if dependency.requires else (0, len(have))
                    assert all(have[low:high]), "sent before what it needs was done"
                for buffer in (*made.reads, *made.writes):
                    assert (plan_id, buffer) not in self.freed
            case BufferDone(plan_id, buffer):
                assert (plan_id, buffer) not in self.freed
                self.freed.add((plan_id, buffer))
                for index, made in enumerate(self.plans[plan_id].layers):
                    if buffer in (*made.reads, *made.writes):
                        assert all(self.done[plan_id, index])
            case PlanFinished(plan_id) | PlanFailed(plan_id):
                assert plan_id not in self.ended, "the end was told twice"
                self.ended[plan_id] = command
                assert not any(r.plan.plan_id == plan_id for q in self.state.lanes.values() for r in q)
            case StopPlan(plan_id):
                self.stopping.add(plan_id)
            case StartWorker(worker):
                self.starting.append(worker)

    def submit(self) -> None:
        plan_id = len(self.plans) + 1
        made = random_plan(self.rng)
        layers = tuple(replace(each, in_place=self.harm and self.rng.random() < 0.3) for each in made.layers)
        self.plans[plan_id] = made = replace(made, layers=layers)
        for index, each in enumerate(made.layers):
            self.done[plan_id, index] = [0] * each.ntasks
            self.steps[plan_id, index] = [0] * each.ntasks
        room = self.rng.choice((None, None, made.peak_nbytes()[0], 1))
        in_order = self.rng.random() < 0.3
        if in_order:
            self.in_order.add(plan_id)
        self.feed(Submitted(plan_id, made, room, in_order=in_order))

    def resume(self, plan_id: int, end: PlanFailed) -> None:
        """Submit what is left of a plan that failed, as a new one."""
        made, new_id = self.plans[plan_id], len(self.plans) + 1
        self.plans[new_id] = made
        for index, each in enumerate(made.layers):
            told = [0] * each.ntasks
            for layer, start, stop in end.finished:
                told[start:stop] = [1] * (stop - start) if layer == index else told[start:stop]
            assert told == [min(count, 1) for count in self.done[plan_id, index]], "what is done was not told as it is"
            self.done[new_id, index] = self.done[plan_id, index].copy()
            self.steps[new_id, index] = steps = self.steps[plan_id, index].copy()
            begun = {task: step for layer, task, step in end.steps if layer == index}
            assert begun == {task: step for task, step in enumerate(steps) if step and not told[task]}
        in_order = self.rng.random() < 0.3
        if in_order:
            self.in_order.add(new_id)
        self.feed(Submitted(new_id, made, None, end.finished, end.steps, in_order))

    def leave(self, plan_id: int, index: int, task: int) -> int:
        """Do some more steps of a task in place, and return how many are done then."""
        if not self.plans[plan_id].layers[index].in_place:
            return 0
        steps = self.steps[plan_id, index]
        steps[task] = self.rng.randrange(steps[task], 4)
        return steps[task]

    def mark(self, plan_id: int, index: int, start: int, stop: int) -> None:
        for task in range(start, stop):
            self.done[plan_id, index][task] += 1

    def step(self) -> bool:
        """Let one random thing happen; False when nothing can."""
        rng = self.rng
        busy = [lane for lane, queue in self.state.lanes.items() if queue]
        if self.starting and (rng.random() < 0.3 or not busy):
            worker = self.starting.pop(rng.randrange(len(self.starting)))
            self.alive.add(worker)
            self.feed(WorkerJoined(worker))
            return True
        if not busy:
            return False
        lane = rng.choice(busy)
        head = self.state.lanes[lane][0]
        key = head.plan.plan_id, head.layer.index
        roll = rng.random() if self.harm else 1.0
        if roll < 0.06 and lane != DRIVER_LANE:
            cursor = rng.choice((None, *range(head.start, head.stop + 1)))
            self.alive.discard(lane)
            step, is_bound = 0, cursor != head.start or rng.random() < 0.5
            if not is_bound:
                step = self.steps[key][head.start]
            elif cursor is not None:
                self.mark(*key, head.start, cursor)
                step = self.leave(*key, cursor) if cursor < head.stop else 0
            reason = rng.choice(["killed by SIGKILL", OUT_OF_MEMORY])
            was_killed = reason != OUT_OF_MEMORY and rng.random() < 0.5
            self.feed(WorkerLost(lane, cursor, reason, rng.randrange(1000), is_bound, step, rng.random() < 0.9, was_killed))
            if lane not in self.starting and self.state.turn and rng.random() < 0.5:
                self.starting = [w for w in self.starting if w not in self.alive]
        elif roll < 0.08:
            task = rng.randrange(head.start, head.stop)
            self.mark(*key, head.start, task)
            step = self.leave(*key, task)
            self.feed(RangeFailed(lane, head.run_id, task, ValueError(str(task)), True, step))
        elif roll < 0.10:
            self.feed(CancelRequested(rng.choice(list(self.plans)), "cancelled"))
        elif key[0] in self.stopping and rng.random() < 0.7:
            task = rng.randrange(head.start, head.stop)
            self.mark(*key, head.start, task)
            self.feed(RangeStopped(lane, head.run_id, task))
        else:
            self.mark(*key, head.start, head.stop)
            self.feed(RangeFinished(lane, head.run_id, rng.choice((0.0, 1e-5, 1e-3, 0.1)) * (head.stop - head.start)))
        return True

    def play(self) -> None:
        wanted = self.rng.randrange(1, 5)
        self.submit()
        for _ in range(60_000):
            if len(self.plans) < wanted and self.rng.random() < 0.2:
                self.submit()
            if not self.step() and len(self.plans) >= wanted:
                failed = [(i, e) for i, e in self.ended.items() if isinstance(e, PlanFailed) and i not in self.resumed]
                if not failed or not self.resumes:
                    break
                for plan_id, end in failed:
                    self.resumed.add(plan_id)
                    self.resume(plan_id, end)
        else:
            raise AssertionError("it does not end")
        assert set(self.ended) == set(self.plans), "a plan never ended"


@pytest.mark.parametrize("seed", range(60))
def test_random_runs_without_harm_do_every_task_once(seed: int) -> None:
    world = World(seed, harm=False)
    world.play()
    assert all(isinstance(end, PlanFinished) for end in world.ended.values())
    assert all(count == 1 for counts in world.done.values() for count in counts)
    wanted = {(plan_id, buffer) for plan_id, made in world.plans.items() for each in made.layers for buffer in (*each.reads, *each.writes)}
    assert world.freed == wanted


@pytest.mark.parametrize("seed", range(150))
def test_random_runs_with_deaths_failures_and_cancels_end_once(seed: int) -> None:
    world = World(1000 + seed, harm=True)
    world.play()
    for plan_id, end in world.ended.items():
        for index, made in enumerate(world.plans[plan_id].layers):
            counts = world.done[plan_id, index]
            if isinstance(end, PlanFinished):
                assert all(counts)
            # What was told as done is done once; only a task that somebody died in runs again, and not where it must not.
            assert all(count <= 1 for count in counts)
            assert made.ntasks == len(counts)


@pytest.mark.parametrize("seed", range(100))
def test_plans_that_failed_go_on_where_they_were(seed: int) -> None:
    world = World(5000 + seed, harm=True, resumes=True)
    world.play()
    for plan_id, end in world.ended.items():
        assert isinstance(end, PlanFinished) or plan_id in world.resumed
        for index, made in enumerate(world.plans[plan_id].layers):
            assert isinstance(end, PlanFailed) or world.done[plan_id, index] == [1] * made.ntasks


def test_a_plan_of_which_all_is_done_ends_at_once() -> None:
    made = random_plan(random.Random(1))
    done = tuple((index, 0, each.ntasks) for index, each in enumerate(made.layers))
    assert State(2).handle(Submitted(1, made, None, done)) == [PlanFinished(1)]


def test_the_same_events_give_the_same_commands() -> None:
    for seed in range(20):
        traces = []
        for _ in range(2):
            world = World(seed, harm=True)
            world.play()
            traces.append([str(c) for c in world.trace])
        assert traces[0] == traces[1]
