"""Steps done block by block, against the same steps one after the other: on a model of memory, with deaths in between.

Never put here: what the steps of simulations compute (`tests/shmarray/test_iterate.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from soak import SOAK_MINUTES

from scheduler import blocking
from scheduler.blocking import DEPTH, blocked
from scheduler.repeat import FAR, Spans, Step, chain
from scheduler.state import PlanFinished, RangeFinished, SendRange, State, Submitted, WorkerJoined, WorkerLost
from scheduler.task import ARENA, Address, Buffer, Context, Dependency, Layer, Plan

pytestmark = pytest.mark.timeout(60)


class Marked:
    """The kernel of one layer of one step, known by its numbers."""

    def __init__(self, step: int, index: int) -> None:
        self.step, self.index = step, index

    def bind(self, context: Context) -> Callable[[int], None]:
        raise AssertionError("nothing is run here")


class Simulation:
    """Steps of stencils over a few fields, of which each is written from end to end; made at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.ntasks = rng.choice([1, 2, 16, 40, 64, 100])
        self.nbytes = self.ntasks * rng.choice([1, 2, 5])
        self.is_periodic = rng.random() < 0.4
        self.halo = rng.choice([0, 1, 1, 1, 2, 5])
        self.nfields = rng.choice([1, 1, 2])
        self.nlayers = rng.choice([1, 1, 2])  # of a step: the second reads what the first wrote
        self.has_temporary = rng.random() < 0.5  # where the first layer writes
        count = rng.randrange(1, 2 * DEPTH + 3)
        sets = rng.choice([2, 2, 3])  # of buffers that take turns
        cuts = [k * self.nbytes // self.ntasks for k in range(self.ntasks + 1)]
        self.own = Spans(cuts[:-1], cuts[1:])
        self.around = self.spans(cuts)
        self.steps = [self.step(k, sets) for k in range(count)]

    def spans(self, cuts: list[int]) -> tuple[Spans, ...]:
        """Return what tasks read: their own bytes, those of neighbours, and, at the ends, those of the other end."""
        n, halo = self.nbytes, self.halo
        near = Spans([max(0, a - halo) for a in cuts[:-1]], [min(n, b + halo) for b in cuts[1:]])
        if not self.is_periodic or not halo:
            return (near,)
        below = [(0, b + halo - n) if b + halo > n else (FAR, -1) for b in cuts[1:]]
        above = [(n + a - halo, n) if a < halo else (FAR, -1) for a in cuts[:-1]]
        return near, *(Spans([max(a, 0) for a, _ in far], [min(b, n) for _, b in far]) for far in (below, above))

    def step(self, k: int, sets: int) -> Step:
        def places(which: int) -> list[Buffer]:
            return [Buffer(self.nbytes, Address(ARENA, 1000 * (which % sets * self.nfields + f))) for f in range(self.nfields)]

        aside = [Buffer(self.nbytes, None if self.has_temporary else Address(ARENA, 100_000))]
        buffers = [*places(k), *places(k + 1), *aside]
        old, new, middle = range(self.nfields), range(self.nfields, 2 * self.nfields), 2 * self.nfields
        uses = [(tuple(old), tuple(new))] if self.nlayers == 1 else [(tuple(old), (middle,)), ((*old, middle), tuple(new))]
        layers = tuple(
            Layer(
                name=f"layer {i}",
                kernel=Marked(k, i),
                ntasks=self.ntasks,
                reads=reads,
                writes=writes,
                dependencies=(Dependency(0),) if i else (),
            )
            for i, (reads, writes) in enumerate(uses)
        )
        return Step(
            Plan(buffers=tuple(buffers), layers=layers),
            tuple(dict.fromkeys(reads, self.around) for reads, _ in uses),
            tuple(dict.fromkeys(writes, (self.own,)) for _, writes in uses),
        )


class Memory:
    """Bytes of every place, and tasks that fold what they read into what they write."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.bytes: dict[int, list[int]] = {}
        for step in steps:
            for buffer in step.plan.buffers:
                place = place_of(buffer)
                self.bytes.setdefault(place, [hash((place, i)) for i in range(buffer.nbytes)])

    def run(self, number: int, index: int, task: int) -> None:
        step = self.steps[number]

        def place(buffer: int) -> list[int]:
            return self.bytes[place_of(step.plan.buffers[buffer])]

        seen = [
            tuple(place(buffer)[max(0, one.lows[task]) : max(0, one.highs[task])])
            for buffer, spans in step.reads[index].items()
            for one in spans or ()
        ]
        for buffer, spans in step.writes[index].items():
            for one in spans or ():
                for at in range(one.lows[task], one.highs[task]):
                    place(buffer)[at] = hash((number, index, buffer, at, tuple(seen)))


def place_of(buffer: Buffer) -> int:
    """Return where a buffer lies in the model: all temporaries at one place, as if they were allocated there again and again."""
    return buffer.address.offset if buffer.address is not None else 100_000


def in_order(steps: list[Step]) -> dict[int, list[int]]:
    memory = Memory(steps)
    for number, step in enumerate(steps):
        for index, layer in enumerate(step.plan.layers):
            for task in range(layer.ntasks):
                memory.run(number, index, task)
    return memory.bytes


class Lane:
    """A worker of the model: does ranges in order, level by level, so that others come in between."""

    def __init__(self) -> None:
        self.held: list[SendRange] = []
        self.task = self.level = 0
        self.begun: SendRange | None = None


def run_at_random(plan: Plan, memory: Memory, rng: random.Random, workers: int, deaths: int) -> int:
    """Run a chain with workers that interleave in any way, some of which die within a level; return how many did."""
    state = State(workers)
    lanes = {slot: Lane() for slot in range(workers)}
    commands = [c for slot in lanes for c in state.handle(WorkerJoined(slot))] + state.handle(Submitted(1, plan))
    died = 0
    while True:
        for command in commands:
            if isinstance(command, SendRange):
                lanes[command.worker].held.append(command)
            elif isinstance(command, PlanFinished):
                return died
        slot = rng.choice([s for s, lane in lanes.items() if lane.held])
        lane = lanes[slot]
        one = lane.held[0]
        if lane.begun is not one:
            lane.begun, lane.task, lane.level = one, one.start, one.step
        kernel = plan.layers[one.layer].kernel
        commands = []
        levels = parts_of(kernel, lane.task)
        marks, tasks = levels[lane.level]
        if died < deaths and rng.random() < 0.02:  # in the middle of the level
            died += 1
            for task in rng.sample(tasks, rng.randrange(len(tasks) + 1)):
                memory.run(marks.step, marks.index, task)
            lane.held.clear()
            lane.begun = None
            commands = state.handle(WorkerLost(slot, lane.task, "killed", 1, step=lane.level)) + state.handle(WorkerJoined(slot))
            state.check()
            continue
        for task in tasks:
            memory.run(marks.step, marks.index, task)
        lane.level += 1
        if lane.level == len(levels):
            lane.task, lane.level = lane.task + 1, 0
        if lane.task == one.stop:
            lane.held.pop(0)
            commands = state.handle(RangeFinished(slot, one.run_id, rng.choice([1e-6, 1e-3, 0.1])))
            state.check()


def parts_of(kernel: Any, task: int) -> list[tuple[Marked, list[int]]]:
    """Return the levels of a task: of which layer of which step, and which of its tasks."""
    if isinstance(kernel, Marked):
        return [(kernel, [task])]
    ranges = kernel.ranges[task].tolist()
    return [
        (kernel.kernels[number], [t for start, stop in pieces for t in range(start, stop)])
        for (number, _), pieces in zip(kernel.levels, ranges, strict=True)
    ]


@pytest.mark.parametrize("seed", range(250 if SOAK_MINUTES else 120))
def test_blocks_do_what_the_steps_do_in_order(seed: int) -> None:
    rng = random.Random(seed)
    made = Simulation(rng)
    workers = rng.randrange(1, 4)
    together, done = blocked(made.steps, workers)
    plan = chain([*together, *made.steps[done:]])
    plan.check()
    memory = Memory(made.steps)
    run_at_random(plan, memory, rng, workers, deaths=rng.choice([0, 0, 3]))
    assert memory.bytes == in_order(made.steps)


def test_the_model_sees_blocks_that_go_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison fails where a block computes what its neighbours have not reached."""
    honest = blocking._regions

    def greedy(levels: Any, needs: Any, ntasks: int, count: int) -> tuple[list[Any], list[Any]]:
        lows, highs = honest(levels, needs, ntasks, count)
        return [lows[0]] * len(lows), [highs[0]] * len(highs)

    monkeypatch.setattr(blocking, "_regions", greedy)
    wrong = 0
    for seed in range(30):
        rng = random.Random(seed)
        made = Simulation(rng)
        together, done = blocked(made.steps, 2)
        memory = Memory(made.steps)
        run_at_random(chain([*together, *made.steps[done:]]), memory, rng, 2, deaths=0)
        wrong += memory.bytes != in_order(made.steps)
    assert wrong > 5


def test_simulations_are_cut_into_blocks_and_workers_do_die() -> None:
    """What the test of all seeds stands on."""
    cut = died = wrapped = 0
    for seed in range(30):
        rng = random.Random(seed)
        made = Simulation(rng)
        together, done = blocked(made.steps, 2)
        cut += bool(done)
        wrapped += any(len(step.plan.layers) == 3 for step in together)
        died += run_at_random(chain([*together, *made.steps[done:]]), Memory(made.steps), rng, 2, deaths=3)
    assert cut > 7 and wrapped > 1 and died > 30


# ----------------------------------------------------------------------------------------------------------- by itself


def stencils(count: int, ntasks: int, nbytes: int = 1 << 20, halo: int = 1) -> list[Step]:
    """Return steps of a stencil over two buffers that take turns."""
    own = Spans(range(ntasks), range(1, ntasks + 1))
    around = Spans([max(0, k - halo) for k in range(ntasks)], [min(ntasks, k + 1 + halo) for k in range(ntasks)])
    steps = []
    for k in range(count):
        buffers = tuple(Buffer(nbytes, Address(ARENA, nbytes * (j % 2))) for j in (k, k + 1))
        layer = Layer(name="step", kernel=Marked(k, 0), ntasks=ntasks, reads=(0,), writes=(1,), nbytes_per_task=100)
        steps.append(Step(Plan(buffers=buffers, layers=(layer,)), ({0: (around,)},), ({1: (own,)},)))
    return steps


def test_levels_of_blocks_get_narrower_and_those_of_gaps_wider() -> None:
    (one,), done = blocked(stencils(4, 32), 1)
    assert done == 4
    blocks, gaps = (layer.kernel.ranges for layer in one.plan.layers)  # type: ignore[attr-defined]
    assert blocks[:, :, 0].tolist() == [
        [[0, 8], [0, 7], [0, 6], [0, 5]],
        [[8, 16], [9, 15], [10, 14], [11, 13]],
        [[16, 24], [17, 23], [18, 22], [19, 21]],
        [[24, 32], [25, 32], [26, 32], [27, 32]],
    ]
    assert gaps[0, :, 0].tolist() == [[8, 8], [7, 9], [6, 10], [5, 11]]
    assert one.plan.layers[1].dependencies[0].requires(1, 2) == (1, 3)  # type: ignore[misc]
    tasks = sum(int((ranges[..., 1] - ranges[..., 0]).sum()) for ranges in (blocks, gaps))
    assert tasks == 4 * 32
    assert sum(layer.nbytes_per_task * layer.ntasks for layer in one.plan.layers) == 100 * tasks


def test_a_task_that_died_goes_on_at_the_level_its_cursor_names() -> None:
    (one,), _ = blocked(stencils(4, 32), 1)
    assert all(layer.in_place for layer in one.plan.layers)  # what the scheduler keeps steps of
    calls: list[tuple[int, int, int]] = []

    class Recorder:
        def __init__(self, number: int) -> None:
            self.number = number

        def bind(self, context: Any) -> Any:
            def run(task: int) -> None:
                raise AssertionError("tasks that go together are done together")

            run.many = lambda start, stop: calls.append((context.addresses[0].offset, start, stop))  # type: ignore[attr-defined]
            return run

    class Cursor:
        first_step = 2
        at_levels: list[int] = []

        def at(self, level: int) -> None:
            self.at_levels.append(level)

    class Place:
        redo = Cursor()

        def __init__(self, addresses: Any) -> None:
            self.addresses = addresses

        def beside(self, addresses: Any) -> Any:
            return Place(addresses)

    kernel: Any = one.plan.layers[0].kernel
    sweep = type(kernel)(tuple(Recorder(n) for n in range(len(kernel.kernels))), kernel.levels, kernel.ranges)
    sweep.bind(Place({b: Address(ARENA, 10 * b) for b in range(2)}))(1)
    assert Place.redo.at_levels == [2, 3]
    assert calls == [(0, 10, 14), (10, 11, 13)]


def test_steps_are_shared_out_evenly() -> None:
    steps, done = blocked(stencils(DEPTH + 2, 400), 1)
    assert done == DEPTH + 2
    assert [int(step.plan.layers[0].kernel.ranges.shape[1]) for step in steps] == [DEPTH // 2 + 1] * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    [
        lambda step: Step(step.plan, ({0: None},), step.writes),  # reads anything
        lambda step: Step(Plan(buffers=step.plan.buffers, layers=(replace(step.plan.layers[0], retry=False),)), step.reads, step.writes),
    ],
)
def test_steps_that_cannot_be_cut_are_left_alone(change: Callable[[Step], Step]) -> None:
    assert blocked([change(step) for step in stencils(8, 64)], 2) == ([], 0)


def test_steps_that_reach_far_are_left_alone() -> None:
    assert blocked(stencils(8, 64, halo=64), 2) == ([], 0)
    assert blocked(stencils(8, 2), 2) == ([], 0)
    assert blocked(stencils(1, 64), 2) == ([], 0)
    assert blocked([], 2) == ([], 0)


def test_blocks_are_as_large_as_the_cache_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "_aimed_nbytes", lambda workers: 1 << 20)
    (one, *_), _ = blocked(stencils(8, 4096, nbytes=32 << 20), 2)
    assert one.plan.layers[0].ntasks == 64
    assert np.diff(one.plan.layers[0].kernel.ranges[:, 0, 0]).max() == 64  # type: ignore[attr-defined]
