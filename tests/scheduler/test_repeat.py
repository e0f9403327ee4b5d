"""Chains of plans: what waits for what, against brute force; plans prepared in a thread.

Never put here: steps of simulations (`tests/shmarray/test_iterate.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from scheduler.repeat import Prepared, Spans, Step, chain, with_pickles
from scheduler.run import Pool
from scheduler.state import RangeFinished, SendRange, State, Submitted, WorkerJoined
from scheduler.task import ARENA, Address, Buffer, Context, Dependency, Layer, Plan

pytestmark = pytest.mark.timeout(60)


class NoKernel:
    def bind(self, context: Context) -> Callable[[int], None]:
        raise AssertionError("nothing is run here")


def layer(name: str, ntasks: int, reads: tuple[int, ...] = (), writes: tuple[int, ...] = (), **more: Any) -> Layer:
    return Layer(name=name, kernel=more.pop("kernel", NoKernel()), ntasks=ntasks, reads=reads, writes=writes, **more)


def place(number: int, nbytes: int = 8) -> Buffer:
    return Buffer(nbytes, Address(ARENA, 1000 * number))


def even(ntasks: int, nbytes: int, halo: int = 0) -> Spans:
    """Return spans that cut ``nbytes`` into ``ntasks`` parts, and reach ``halo`` bytes into the neighbours."""
    cuts = [k * nbytes // ntasks for k in range(ntasks + 1)]
    return Spans([max(0, a - halo) for a in cuts[:-1]], [min(nbytes, b + halo) for b in cuts[1:]])


# ------------------------------------------------------------------------------------------------------------ spans


def test_meeting_is_the_smallest_range_of_those_that_touch() -> None:
    rng = random.Random(2)
    for _ in range(300):
        n = rng.randrange(1, 8)
        lows = [rng.randrange(20) for _ in range(n)]
        if rng.random() < 0.5:
            lows.sort(reverse=rng.random() < 0.3)
        highs = [low + rng.randrange(1, 6) for low in lows]
        spans = Spans(lows, highs)
        for low in range(22):
            for high in range(low + 1, 24):
                touching = [i for i in range(n) if lows[i] < high and low < highs[i]]
                first, stop = spans.meeting(low, high)
                if touching:
                    assert first <= touching[0] and touching[-1] < stop, (lows, highs, low, high)
                    if lows == sorted(lows) and highs == sorted(highs):
                        assert (first, stop) == (touching[0], touching[-1] + 1)


def step_of(plan: Plan, reads: Sequence[Mapping[int, Any]], writes: Sequence[Mapping[int, Any]]) -> Step:
    """Return a step; where spans are not in a tuple, they are all there are."""

    def whole(uses: Mapping[int, Any]) -> dict[int, tuple[Spans, ...] | None]:
        return {b: (spans,) if isinstance(spans, Spans) else spans for b, spans in uses.items()}

    return Step(plan, tuple(map(whole, reads)), tuple(map(whole, writes)))


# --------------------------------------------------------------------------------------------------------- brute force


class Random:
    """Steps of random layers over a few buffers with addresses, and a temporary or two of their own."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.nbytes = rng.choice([6, 12, 24])
        self.nbuffers = rng.randrange(2, 5)
        self.steps = [self.step() for _ in range(rng.randrange(2, 6))]

    def spans(self, ntasks: int) -> Spans | tuple[Spans, ...] | None:
        kind = self.rng.random()
        if kind < 0.2:
            return None
        if kind < 0.4:  # tasks at the ends touch the other end, too
            far = [(1 << 62, -1)] * ntasks
            far[0] = self.nbytes - 1, self.nbytes
            far[-1] = (0, 1) if ntasks > 1 else far[-1]
            return even(ntasks, self.nbytes), Spans([low for low, _ in far], [high for _, high in far])
        if kind < 0.8:
            return even(ntasks, self.nbytes, self.rng.randrange(3))
        lows = [self.rng.randrange(self.nbytes) for _ in range(ntasks)]
        return Spans(lows, [min(self.nbytes, low + self.rng.randrange(1, 5)) for low in lows])

    def step(self) -> Step:
        """A step writes a buffer from end to end, as those of simulations do, by one layer or by two; or half of one."""
        rng = self.rng
        target = rng.randrange(self.nbuffers)
        if rng.random() < 0.2:  # a part alone
            buffers = [place(b, self.nbytes) for b in range(self.nbuffers)]
            half = Spans([self.nbytes // 2], [self.nbytes])
            return step_of(Plan(buffers=tuple(buffers), layers=(layer("half", 1, (), (target,)),)), ({},), ({target: half},))
        ntasks = rng.randrange(1, 5)
        others = [b for b in range(self.nbuffers) if b != target]
        read = rng.sample(others, rng.randrange(1, len(others) + 1))
        buffers = [place(b, self.nbytes) for b in range(self.nbuffers)]
        layers, reads, writes = [], [], []
        if rng.random() < 0.4:  # a temporary in between
            buffers.append(Buffer(self.nbytes))
            temporary = len(buffers) - 1
            layers.append(layer("aside", ntasks, tuple(read), (temporary,)))
            reads.append({b: self.spans(ntasks) for b in read})
            writes.append({temporary: even(ntasks, self.nbytes)})
            layers.append(layer("from it", ntasks, (temporary,), (target,), dependencies=(Dependency(0, lambda a, b: (a, b)),)))
            reads.append({temporary: even(ntasks, self.nbytes)})
            writes.append({target: even(ntasks, self.nbytes)})
        elif rng.random() < 0.4:  # two layers write a part each
            half = self.nbytes // 2
            for low in (0, half):
                layers.append(layer("part", ntasks, tuple(read), (target,)))
                reads.append({b: self.spans(ntasks) for b in read})
                part = even(ntasks, half)
                writes.append({target: Spans([low + a for a in part.lows], [low + max(b, 1) for b in part.highs])})
        else:
            layers.append(layer("whole", ntasks, tuple(read), (target,)))
            reads.append({b: self.spans(ntasks) for b in read})
            writes.append({target: even(ntasks, self.nbytes)})
        if rng.random() < 0.3:  # who looks at what was just written
            buffers.append(place(100, 8))
            last = len(layers) - 1
            behind = tuple(Dependency(k) for k in range(last + 1))
            layers.append(layer("look", 1, (target,), (len(buffers) - 1,), dependencies=behind))
            reads.append({target: None})
            writes.append({len(buffers) - 1: None})
        return step_of(Plan(buffers=tuple(buffers), layers=tuple(layers)), tuple(reads), tuple(writes))

    def accesses(self) -> Iterator[tuple[int, int, int, int, str, int, int]]:
        """Yield (step, layer of the chain, task, address, "r" or "w", low, high)."""
        index = 0
        for number, step in enumerate(self.steps):
            for k, one in enumerate(step.plan.layers):
                for mode, uses in (("r", step.reads[k]), ("w", step.writes[k])):
                    for buffer, spans in uses.items():
                        address = step.plan.buffers[buffer].address
                        for task in range(one.ntasks if address else 0):
                            assert address is not None
                            for low, high in [(0, 10**6)] if spans is None else [(some.lows[task], some.highs[task]) for some in spans]:
                                if low < high:
                                    yield number, index, task, address.offset, mode, low, high
                index += 1


def run_in_random_order(plan: Plan, rng: random.Random, nslots: int) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Return when each task began and ended, in a run in which ranges end in any order."""
    state = State(nslots)
    for slot in range(nslots):
        state.handle(WorkerJoined(slot))
    clock = 0
    began: dict[tuple[int, int], int] = {}
    ended: dict[tuple[int, int], int] = {}
    held: list[SendRange] = []
    commands = state.handle(Submitted(1, plan))
    while True:
        for command in commands:
            if isinstance(command, SendRange):
                held.append(command)
                for task in range(command.start, command.stop):
                    began[command.layer, task] = clock
        if not held:
            break
        # A lane ends its ranges in order.
        first = {c.worker: c for c in reversed(held)}
        one = rng.choice(list(first.values()))
        held.remove(one)
        clock += 1
        for task in range(one.start, one.stop):
            ended[one.layer, task] = clock
        commands = state.handle(RangeFinished(one.worker, one.run_id, rng.choice([1e-6, 1e-3, 0.1])))
        state.check()
    return began, ended


@pytest.mark.parametrize("seed", range(150))
def test_conflicting_accesses_of_steps_keep_their_order(seed: int) -> None:
    rng = random.Random(seed)
    made = Random(rng)
    plan = chain(made.steps)
    plan.check()
    began, ended = run_in_random_order(plan, rng, rng.randrange(1, 5))
    assert len(ended) == sum(one.ntasks for one in plan.layers)
    uses = list(made.accesses())
    for step, index, task, address, mode, low, high in uses:
        for other, index2, task2, address2, mode2, low2, high2 in uses:
            if other > step and address == address2 and "w" in (mode, mode2) and low < high2 and low2 < high:
                assert ended[index, task] <= began[index2, task2], (step, other, plan.layers[index].name, plan.layers[index2].name)


def test_the_check_of_orders_can_fail() -> None:
    """The same simulation finds tasks out of order where the plans are put together without `chain`."""
    found = 0
    for seed in range(30):
        rng = random.Random(seed)
        made = Random(rng)
        layers = [one for step in made.steps for one in step.plan.layers]
        loose = Plan(buffers=(place(0),), layers=tuple(layer(one.name, one.ntasks) for one in layers))
        began, ended = run_in_random_order(loose, rng, 2)
        uses = list(made.accesses())
        found += any(
            ended[a[1], a[2]] > began[b[1], b[2]]
            for a in uses
            for b in uses
            if b[0] > a[0] and a[3] == b[3] and "w" in (a[4], b[4]) and a[5] < b[6] and b[5] < a[6]
        )
    assert found > 10


# ----------------------------------------------------------------------------------------------------------- by itself


def stencil(k: int, ntasks: int, nbytes: int = 800) -> Step:
    """Step ``k`` of a stencil that reads a halo of 8 bytes, over two buffers that take turns."""
    plan = Plan(buffers=(place(k % 2, nbytes), place(1 - k % 2, nbytes)), layers=(layer(f"step {k}", ntasks, (0,), (1,)),))
    return step_of(plan, ({0: even(ntasks, nbytes, 8)},), ({1: even(ntasks, nbytes)},))


def test_a_step_begins_before_the_one_before_has_ended() -> None:
    plan = chain([stencil(k, 8) for k in range(4)])
    state = State(2)
    state.handle(WorkerJoined(0))
    state.handle(WorkerJoined(1))
    commands = state.handle(Submitted(1, plan))
    order: list[tuple[int, int]] = []
    while pieces := [c for c in commands if isinstance(c, SendRange) and c.worker == 0]:  # worker 1 stays in task 4 of the first step
        commands = []
        for one in pieces:
            order += [(one.layer, task) for task in range(one.start, one.stop)]
            commands += state.handle(RangeFinished(one.worker, one.run_id, 0.1))  # long: one task in a range
    assert set(order) == {(0, k) for k in (0, 1, 2, 3, 5, 6, 7)} | {(1, k) for k in (0, 1, 2, 6, 7)} | {(2, k) for k in (0, 1, 7)} | {
        (3, 0)
    }


def test_tasks_wait_for_their_neighbours_and_no_others() -> None:
    plan = chain([stencil(k, 8) for k in range(3)])
    (first,) = plan.layers[1].dependencies
    assert first.layer == 0 and first.requires is not None
    assert [first.requires(k, k + 1) for k in range(8)] == [(0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (5, 8), (6, 8)]
    # Step 2 writes what step 0 wrote, and step 1 read.
    over, behind = plan.layers[2].dependencies
    assert (over.layer, behind.layer) == (0, 1) and over.requires is not None and behind.requires is not None
    assert [over.requires(k, k + 1) for k in range(8)] == [(k, k + 1) for k in range(8)]
    assert [behind.requires(k, k + 1) for k in range(1, 7)] == [(k - 1, k + 2) for k in range(1, 7)]


def test_dependencies_do_not_grow_with_the_number_of_steps() -> None:
    mask = place(7, 800)

    def masked(k: int) -> Step:
        one = stencil(k, 8)
        plan = Plan(buffers=(*one.plan.buffers, mask), layers=(layer("masked", 8, (0, 2), (1,)),))
        return step_of(plan, ({**one.reads[0], 2: even(8, 800)},), one.writes)

    plan = chain([masked(k) for k in range(50)])
    assert len(plan.buffers) == 3
    assert max(len(one.dependencies) for one in plan.layers) == 2


def test_spans_that_do_not_meet_leave_no_dependency() -> None:
    def half(low: int) -> Step:
        plan = Plan(buffers=(place(0, 80),), layers=(layer("half", 2, (), (0,)),))
        return step_of(plan, ({},), ({0: Spans([low, low + 20], [low + 20, low + 40])},))

    plan = chain([half(0), half(40)])
    assert plan.layers[1].dependencies == ()


def test_kernels_know_buffers_by_their_own_numbers() -> None:
    plan = chain([stencil(k, 2) for k in range(2)])
    assert plan.layers[0].names == ((0, 0), (1, 1))
    assert plan.layers[1].names == ((0, 1), (1, 0))
    assert (plan.layers[1].reads, plan.layers[1].writes) == ((1,), (0,))


def test_temporaries_are_those_of_one_step() -> None:
    def one() -> Step:
        layers = (layer("a", 1, (), (0,)), layer("b", 1, (0,), (1,), dependencies=(Dependency(0),)))
        return step_of(Plan(buffers=(Buffer(10), place(0)), layers=layers), ({}, {0: None}), ({0: None}, {1: None}))

    plan = chain([one(), one()])
    assert [b.address is None for b in plan.buffers] == [True, False, True]
    assert plan.layers[3].dependencies == (Dependency(1), Dependency(2))
    assert plan.peak_nbytes()[0] == 10


class Fill:
    """Add one to task ``i``'s byte of a buffer; a kernel that travels."""

    def __init__(self, buffer: int, fails_at: int = -1) -> None:
        self.buffer, self.fails_at = buffer, fails_at

    def bind(self, context: Context) -> Callable[[int], None]:
        address = context.addresses[self.buffer]
        window = context.memory.window(address, 0, (4,), (1,), "u1")
        context.warn("RuntimeWarning", "bound", "")

        def run(task: int) -> None:
            if task == self.fails_at:
                raise ValueError("no more")
            window[task] += 1
            context.warn("RuntimeWarning", f"task {task}", "")

        return run


def test_pickles_are_those_of_the_step() -> None:
    one = step_of(Plan(buffers=(place(0),), layers=(layer("fill", 4, (), (0,), kernel=Fill(0)),)), ({},), ({0: even(4, 4)},))
    once = with_pickles(one)
    plan = chain([once, once])
    assert plan.pickles[0] is plan.pickles[1] is once.plan.pickles[0]
    assert chain([one, one]).pickles == {}


# ------------------------------------------------------------------------------------------------------------ prepared


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(workers=0, memory_limit=1 << 24) as made:
        yield made
        made.check()


def test_a_prepared_plan_runs_again_and_again(pool: Pool) -> None:
    extent = pool.allocate(4)
    values = pool.arena.bytes[extent.offset : extent.offset + 4]
    values[:] = 0
    plan = Plan(
        buffers=(Buffer(4, extent.address), Buffer(4)),
        layers=(layer("a", 4, (), (0,), kernel=Fill(0)), layer("b", 2, (), (1,), kernel=Fill(1))),
    )
    with Prepared(pool, plan) as prepared:
        assert pool.statistics().temporary_nbytes > 0
        for _ in range(100):
            prepared.run()
        assert bytes(values) == bytes([100] * 4)
        assert {text for _, text, _ in prepared.report().warnings} == {"bound", "task 0", "task 1", "task 2", "task 3"}
        assert prepared.report().warnings == ()
    assert pool.statistics().temporary_nbytes == 0
    prepared.close()  # again


def test_an_error_in_a_prepared_plan_says_where(pool: Pool) -> None:
    plan = Plan(
        buffers=(Buffer(4), Buffer(4)),
        layers=(layer("a", 4, (), (0,), kernel=Fill(0)), layer("b", 4, (), (1,), kernel=Fill(1, 2), line="f.py:3")),
    )
    with Prepared(pool, plan) as prepared:
        for _ in range(2):
            with pytest.raises(ValueError, match="no more") as caught:
                prepared.run()
            note = " ".join(caught.value.__notes__)
            assert "task 2" in note and "'b'" in note and "f.py:3" in note
    assert pool.statistics().temporary_nbytes == 0


def test_what_cannot_be_bound_gives_back_what_was_taken(pool: Pool) -> None:
    plan = Plan(buffers=(Buffer(4),), layers=(layer("a", 4, (), (0,), kernel=Fill(0)), layer("b", 4, (), (0,))))
    with pytest.raises(AssertionError, match="nothing is run here"):
        Prepared(pool, plan)
    assert pool.statistics().temporary_nbytes == 0
    pool.check()


def test_the_same_plan_on_other_buffers_takes_no_more_room(pool: Pool) -> None:
    limit = pool.statistics().limit_nbytes
    ends = [pool.allocate(4) for _ in range(2)]
    layers = (layer("a", 4, (), (0,), kernel=Fill(0)), layer("b", 4, (0,), (1,), kernel=Fill(1)))

    def plan(k: int) -> Plan:
        return Plan(buffers=(Buffer(limit // 2), Buffer(4, ends[k].address)), layers=layers, scratch_nbytes=limit // 8)

    windows = [pool.arena.bytes[end.offset : end.offset + 4] for end in ends]
    for window in windows:
        window[:] = 0
    with Prepared(pool, plan(0)) as one, Prepared(pool, plan(1), one) as other:  # twice is more than there is: it would wait for itself
        reserved = pool.statistics().temporary_nbytes
        for _ in range(3):
            one.run()
            other.run()
    assert limit // 2 <= reserved < limit
    assert [bytes(window) for window in windows] == [bytes([3] * 4)] * 2
    assert pool.statistics().temporary_nbytes == 0
