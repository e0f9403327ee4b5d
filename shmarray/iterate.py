"""Time stepping: a step that is traced and planned once, and run n times on buffers that take turns.

    step(u) ──traced──▶ expression of a placeholder ──planned──▶ Step      the plan, with a *role* for each array that changes places
    roles ◀── buffers: those of the state now, free ones for the next         which buffer stands where differs from step to step
    several steps ──chain──▶ one plan, without a barrier between them       or, where a step is tiny, bound and run in this thread

A field that a step returns as it got it changes hands without a copy: leapfrog's ``return new, u`` takes three buffers in turn.
Promises: graph and plan do not grow with the number of steps; memory is the state twice; bits depend on neither workers nor where a run
was split by callbacks, tests or restarts.
Never put here: what a step computes, what a chain of plans waits for (`scheduler.repeat`), files.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scheduler.blocking import DEPTH, blocked
from scheduler.repeat import Prepared, Step, chain, with_pickles
from scheduler.run import TINY_NBYTES, Pool
from scheduler.task import ARENA, Address, LockRequest, Outcome, Plan, Report
from shmarray.chunks import Chunks, default_chunks
from shmarray.compute import check_inputs, current_pool, fill, run, warn
from shmarray.config import config
from shmarray.errors import ChangedInput, MemoryBudgetError
from shmarray.expr import Expr, InMemory, Stored, make, postorder, user_line
from shmarray.handle import Handle, as_handle, in_memory, linking, wrap, wrap_stored
from shmarray.ops.random import stepped
from shmarray.optimise import substitute
from shmarray.plan import Target, buffer_of, build_step, lock_requests
from shmarray.region import c_strides, is_broadcast
from shmarray.shared_memory import hold_all
from shmarray.storage import Layout, Storage
from shmarray.store import Store
from shmarray.watching import Watch

__all__ = ["Frame", "iterate"]

AT_ONCE_S = 0.03  # of steps at once: enough that what a plan costs is lost in it
FEWEST, MOST = 4, 32  # steps in one plan, once it is known how long one takes
MOST_S = 1.0  # of steps at once
READ_S = 0.2  # the same where others may read the state: as long as they wait for it
LIVE_S = 0.1  # of steps at once while others read the state: they see 10 frames a second or more, and blocks stay deep
WORTH_WORKERS_S = 2e-4  # a step that takes longer here may take less in worker processes
WARM_UP = 1, 1, 4, 16  # steps in the first batches here: at first code is loaded and memory touched, at last what a batch costs is small
WARM_UP_S = 0.01  # but not more than take so long
SMALL_NBYTES = 16 * TINY_NBYTES  # steps that move more than this always do
KEPT_PLANS = 16


class _Role(Storage):
    """A place in a step: which storage stands there is said when it runs. Its arrays have no values while the step is traced."""

    is_role = True

    def __init__(self, pool: Pool, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: Chunks, number: int) -> None:
        self._stand_in(shape, dtype, chunks)
        self.pool = pool
        self.number = number

    def address(self, pool: Pool) -> tuple[Address, Any]:
        return Address(ARENA, -1 - self.number), self  # of no extent: `_Loop` puts another in its place

    @property
    def is_spilled(self) -> bool:
        raise TypeError(
            f"computing an array inside a step of iterate(), at {user_line()}: the step is called once, with arrays that have no values "
            f"yet, to find out what it computes. So it cannot branch on values, print them, or turn them into numbers. Use sa.where for "
            f"choices, until= to stop, observe= and callback= to look, scalars= for numbers that vary by step. What is computed at once "
            f"has no place in it: sort, the number of elements that a mask picks, picking from NumPy arrays (sa.take(array, index) does), "
            f"values assigned to index arrays made of the state (sa.add.at adds them), writing into stored arrays but a copy() of them."
        )

    def requests(self, layout: Layout, mode: str) -> list[LockRequest]:
        return []


@dataclass(frozen=True, slots=True)
class Frame:
    """What a callback of `iterate` gets: the state after ``step`` steps (counted from ``start``).

    ``state``: stored arrays; they change when the simulation goes on, NumPy arrays computed from them do not. ``values``: what ``observe``
    asked for. ``time``: seconds since the call.
    """

    step: int
    time: float
    state: tuple[Any, ...]
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Traced:
    """A step, planned: which buffer of the plan each role is. ``thin``: to be done block by block with others, where that can be.

    ``fields``, ``scalars``: of what it reads (None: it does not); ``fresh``: of what it computes of the state; ``looks``: of what was
    asked for beside; ``constants``: (storage, buffer) of other stored arrays that it reads.
    """

    step: Step
    thin: Step | None
    fields: tuple[int | None, ...]
    scalars: tuple[int | None, ...]
    fresh: tuple[int, ...]
    looks: tuple[int, ...]
    constants: tuple[tuple[Storage, int], ...]


def iterate(
    step: Callable[..., Any],
    *state: Any,
    steps: int | None = None,
    until: Callable[..., Any] | None = None,
    every: int = 1,
    callback: Callable[[Frame], Any] | None = None,
    observe: Mapping[str, Callable[..., Any]] | None = None,
    scalars: Mapping[str, Any] | None = None,
    start: int = 0,
    out: Any = None,
    scheduler: str | None = None,
    progress: bool | None = None,
    publish: str | Store | None = None,
    names: Sequence[str] | None = None,
) -> Any:
    """Return the state after ``steps`` steps: ``state = step(*state)``, again and again, in place.

    ``step`` takes the arrays of the state, and returns as many, of the same shapes and dtypes; it is called once, with arrays that
    have no values, and what it computes is run for every step: with two sets of buffers, and without a barrier between steps. Slices,
    `roll`, `pad`, ``v = u.copy(); v[1:-1] = ...``, reductions, masks (``v[m] = u[m] * 2``, ``u[m].sum()``), other arrays, and indices made
    of the state (``u[i]``, ``add.at(v, i, w)``, ``bincount(i, w, minlength=n)``) may stand in it. Views are of the same memory,
    as in NumPy: ``inner = v[1:-1]; inner[...] = ...`` and ``out=v[1:]`` write ``v``. Random numbers drawn in it
    are new in every step, and depend on the seed and the number of the step alone.

    Parameters
    ----------
    step : the function of a step, ``step(u, v, dt=...) -> (u, v)``; one array in, one array out.
    state : arrays, stored or lazy, or NumPy arrays. They are not changed, unless they are ``out``.
    steps : how many steps. None: until ``until`` says so.
    until : called once, with the arrays after a step and, if it takes twice as many, those before it; returns a boolean array of one
        element, true when it is enough: ``until=lambda new, old: abs(new - old).max() < 1e-6``. It is computed every ``every`` steps.
    every : how many steps lie between two calls of ``callback``, or of ``until``.
    callback : called here with a `Frame`, every ``every`` steps and after the last. The simulation waits for it.
    observe : by name, functions as ``until`` is one, whose results are computed with the step and given to ``callback``.
    scalars : by name, numbers that vary by step: a sequence (one for each step) or a function of the number of the step (``start`` for
        the first). Python's numbers take the dtype of the state, as in NumPy. ``step`` is given them by name, as arrays without axes.
    start : the number of the first step. A run that goes on from a checkpoint continues exactly.
    out : stored arrays (one, or a tuple) for the result, which may be those of the state: their memory is then one of the two sets.
    scheduler : "processes", "threads" or "synchronous"; None: the first, or, where a step is tiny, this thread.
    progress : whether to show steps, rate, time left and memory while it runs, as `ProgressBar` does; None: ``config.progress``.
    publish : a name, or an open `shared.Store`: where other processes read the state while it runs, with `attach`. Takes memory of the
        state once more. Beside the fields there are ``step``, ``steps``, ``time`` (seconds) and ``finished``. A name is given up at the
        end; who has attached by then keeps the last state.
    names : under which the fields are published; None: the names of the parameters of ``step``.

    Returns
    -------
    A stored `Array`, or a tuple of them.

    Raises ValueError or TypeError where ``step`` returns other shapes or dtypes than it was given, or needs values while it is traced;
    MemoryBudgetError when two sets of the state do not fit in memory.

    >>> import shmarray as sa
    >>> u = sa.zeros(100)
    >>> u[50] = 1.0
    >>> def heat(u):
    ...     v = u.copy()
    ...     v[1:-1] = u[1:-1] + 0.25 * (u[2:] - 2 * u[1:-1] + u[:-2])
    ...     return v
    >>> u = sa.iterate(heat, u, steps=200)
    >>> float(u.sum().compute().round(6)), int(u.argmax().compute())
    (0.999999, 50)
    """
    if not callable(step):
        raise TypeError(f"iterate() takes the function of a step first, got {type(step).__name__}: {step!r:.80}")
    if not state:
        raise TypeError("iterate(step, *state): give at least one array of the state")
    if steps is None and until is None:
        raise TypeError("iterate(...): say how many steps=, or until= when")
    if steps is not None and (not isinstance(steps, (int, np.integer)) or steps < 0):
        raise ValueError(f"iterate(steps={steps!r}): give a whole number of steps, not negative")
    if not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"iterate(every={every!r}): give a whole number of steps from 1 on")
    if observe and callback is None:
        raise TypeError("iterate(observe=...) computes what a callback= is given; there is none")
    if not isinstance(start, (int, np.integer)) or start < 0:
        raise ValueError(f"iterate(start={start!r}): give the number of the first step, a whole number that is not negative")
    arrays = tuple(as_handle(x) for x in state)
    outs = None if out is None else tuple(out) if isinstance(out, (tuple, list)) else (out,)
    _check_outs(outs, arrays)
    values = _Scalars(scalars or {}, np.result_type(*(a.dtype for a in arrays)), int(start))
    watch = Watch(current_pool(), step, arrays, int(start), None if steps is None else int(steps), progress, publish, names)
    loop = _Loop(step, arrays, until, observe or {}, values, outs or (), scheduler, user_line())
    with watch:
        results = loop.run(int(start), None if steps is None else int(steps), int(every), callback, watch)
    if outs is not None:
        loop.give(results, outs)
        results = outs
    return results[0] if len(state) == 1 else results


def _check_outs(outs: tuple[Any, ...] | None, arrays: tuple[Any, ...]) -> None:
    if outs is None:
        return
    if len(outs) != len(arrays):
        raise ValueError(f"iterate(out=...) of {len(outs)} arrays for a state of {len(arrays)}")
    for place, x in zip(outs, arrays, strict=True):
        if not isinstance(place, Handle) or place._storage is None:
            raise TypeError(f"iterate(out=...) takes stored arrays, got {type(place).__name__}")
        if place.shape != x.shape or place.dtype != x.dtype:
            raise ValueError(f"iterate(out=...) of shape {place.shape}, {place.dtype} for a field of shape {x.shape}, {x.dtype}")
    for k, place in enumerate(outs):
        for n, other in enumerate(outs[:k]):
            if place._storage is other._storage and place._storage.overlap(place._layout, other._layout):
                raise ValueError(f"iterate(out=...): arrays {n} and {k} share memory, and cannot hold a field each")


def _is_whole(x: Any) -> bool:
    return x._storage is not None and x._layout == x._storage.layout and not x._storage.is_shared


class _Loop:
    """One call of `iterate`: what was traced, the buffers, where each field is now."""

    def __init__(
        self,
        step: Callable[..., Any],
        arrays: tuple[Any, ...],
        until: Callable[..., Any] | None,
        observe: Mapping[str, Callable[..., Any]],
        values: _Scalars,
        outs: tuple[Any, ...],
        scheduler: str | None,
        line: str,
    ) -> None:
        self.pool = pool = current_pool()
        self.line = line
        self.scheduler = scheduler or config.scheduler
        self.until, self.observe = until, dict(observe)
        self.values = values
        numbers = itertools.count()
        self.roles = [_Role(pool, a.shape, a.dtype, a.chunks, next(numbers)) for a in arrays]
        self.slots = [_Role(pool, (), dtype, (), next(numbers)) for dtype in self.values.dtypes]
        self.chunks = [a.chunks for a in arrays]
        self.sources: list[int] = []  # per field: which of `new` it becomes, or -1 - k: what field k was
        self.new: list[Expr] = []
        self.looks: list[Expr] = []
        self._trace(step, numbers)
        self.plain = self._planned([])
        self.looking = self._planned(self.looks) if self.looks else self.plain
        nodes = list(postorder([*self.new, *self.looks]))
        self.readers = {x: node for node in nodes for x in node.inputs}
        self.inputs = [node for node in nodes if isinstance(node, Stored) and not node.storage.is_role]
        # What lies outside of the pool's memory: see `_reach`. With the copies that stand for it.
        self.outside = [n for n in nodes if isinstance(n, InMemory) or (n in self.inputs and n.storage.pool is not pool)]
        self.copies: list[Storage] = []
        self.is_copied = False  # and the copies are what is there now
        self.is_reached = not self.outside or self.scheduler == "threads"
        own: dict[int, Storage] = {}
        self.own = own  # storages that may be written
        self.fields = [self._place(a, k, outs) for k, a in enumerate(arrays)]
        read = {id(node.storage) for node in self.inputs}  # by every step, so that it gets the result last
        for place in outs:
            if _is_whole(place) and place._storage.pool is pool and not place._storage.is_spilled and id(place._storage) not in read:
                own.setdefault(place._storage.identity, place._storage)
        self.scalar_places: list[list[Storage]] = []  # per step of a plan
        self.look_places = [self._look_place(node) for node in self.looks]
        self.plans: dict[Any, Plan] = {}
        self.is_touched = False  # by the steps that run now: buffers may hold neither what they did nor what they will
        self.used = [
            k for k, pair in enumerate(zip(self.plain.scalars, self.looking.scalars, strict=True)) if any(n is not None for n in pair)
        ]
        # Seconds that a step takes here, and in worker processes; where it may run.
        self.rates: dict[str, float] = dict.fromkeys(self._places_to_run(), math.inf)
        self.is_published = False
        self.warmed_up = 0  # batches here before workers are thought of: they take a second to start, which tiny steps would wait for

    # --- tracing and planning ----------------------------------------------------------------------------------------------

    def _trace(self, step: Callable[..., Any], numbers: Iterator[int]) -> None:
        def arrays(nodes: Sequence[Expr]) -> list[Any]:
            return [
                wrap(node, chunks) for node, chunks in zip(nodes, self.chunks, strict=True)
            ]  # of their own: ``u += 1`` is no news to others

        before = [_whole(role) for role in self.roles]
        slots = dict(zip(self.values.names, (wrap(_whole(role)) for role in self.slots[1:]), strict=True))
        with stepped(_whole(self.slots[0])), linking() as self.looked:
            given = step(*arrays(before), **slots)
            results = given if isinstance(given, (tuple, list)) else (given,)
            if len(results) != len(before):
                raise ValueError(
                    f"the step of iterate() returned {len(results)} array{'s' * (len(results) != 1)} for a state of {len(before)}: it "
                    f"returns as many as it takes, in the same order"
                )
            nodes = [self._checked(k, result) for k, result in enumerate(results)]
            fields = {_whole(role): k for k, role in enumerate(self.roles)}
            for node in nodes:
                if node in fields:
                    self.sources.append(-1 - fields[node])
                    continue
                if node not in self.new:
                    self.new.append(node)
                self.sources.append(self.new.index(node))
            for name, function in (*((("until", self.until),) if self.until else ()), *self.observe.items()):
                look = as_handle(_call(function, arrays(nodes), arrays(before)))
                if name == "until" and (look.size != 1 or look.dtype != bool):
                    raise TypeError(
                        f"iterate(until=...) returned an array of shape {look.shape} and {look.dtype}; it must be one boolean: "
                        f"abs(new - old).max() < 1e-6"
                    )
                self.looks.append(look.node)
        self._check_looked("the step itself, afterwards,")

    def _check_looked(self, who: str) -> None:
        """Raise ChangedInput where an array whose values are part of the step has others now."""
        for array, before in self.looked:
            if not np.array_equal(array, before):
                raise ChangedInput(
                    f"iterate() at {self.line}: {who} wrote an array of shape {array.shape}, {array.dtype}, with which the step picks or "
                    f"assigns: where that is was found when the step was traced. Make it part of the state, or begin a new iterate()."
                )

    def _checked(self, k: int, result: Any) -> Expr:
        role = self.roles[k]
        if result is None:
            raise TypeError("the step of iterate() returned None: it returns the arrays of the new state")
        x = as_handle(result)
        if x.shape != role.shape:
            raise ValueError(f"the step of iterate() was given field {k} of shape {role.shape} and returned shape {x.shape}")
        if x.dtype != role.dtype:
            raise TypeError(
                f"the step of iterate() was given field {k} of {role.dtype} and returned {x.dtype}: return x.astype({role.dtype}), or "
                f"begin with a state of {x.dtype}"
            )
        node: Expr = x.node
        return node

    def _planned(self, looks: Sequence[Expr]) -> _Traced:
        roots = [*self.new, *looks]
        first = len(self.roles) + len(self.slots)
        places = [_Role(self.pool, n.shape, n.dtype, default_chunks(n.shape, n.dtype), first + k) for k, n in enumerate(roots)]
        targets = [Target(role.shape, role.dtype, storage=role, layout=role.layout, is_new=True) for role in places]
        pairs = [(n, t) for n, t in zip(roots, targets, strict=True) if n.size]
        step, thin, bindings = build_step([n for n, _ in pairs], [t for _, t in pairs], self.pool)
        numbers = bindings.storages
        stored = {n.storage for n in postorder(roots) if isinstance(n, Stored) and not n.storage.is_role}
        # What workers copy they would copy for each thin tile by itself: a call of the system each, which takes longer than all else.
        is_copied = any(isinstance(n, InMemory) for n in postorder(roots)) or any(s.is_spilled or s.pool is not self.pool for s in stored)
        is_thick = bool(looks) or (is_copied and self.scheduler in (None, "processes"))
        step = replace(step, plan=replace(step.plan, locks=()))
        if self.scheduler in (None, "processes"):
            step = with_pickles(step)
        for layer in step.plan.layers:
            assert not layer.in_place, layer.name
        return _Traced(
            step,
            None if thin is None or is_thick else replace(thin, plan=replace(thin.plan, locks=())),
            tuple(numbers.get(role.identity) for role in self.roles),
            tuple(numbers.get(role.identity) for role in self.slots),
            tuple(numbers.get(role.identity, -1) for role in places[: len(self.new)]),
            tuple(numbers.get(role.identity, -1) for role in places[len(self.new) :]),
            tuple((s, numbers[s.identity]) for s in stored if s.identity in numbers),
        )

    def _places_to_run(self) -> tuple[str, ...]:
        """Return where steps may run, what is tried first first: "here" is this thread."""
        plan = self.looking.step.plan
        is_here = self.scheduler == "synchronous" or self.pool.workers == 0
        if plan.isolated or not 0 <= plan.cost_nbytes() <= SMALL_NBYTES or not (is_here or self.scheduler is None):
            return ("pool",)
        return ("here",) if is_here else ("here", "pool")

    def _batch(self, *, is_short: bool) -> tuple[str, int]:
        """Return where the next steps run, and how many of them at once; ``is_short``: somebody waits for the end."""
        if len(self.rates) > 1 and self.warmed_up < len(WARM_UP):
            self.warmed_up += 1
            return "here", max(1, min(WARM_UP[self.warmed_up - 1], int(WARM_UP_S / self.rates["here"])))
        (first, rate), *_ = self.rates.items()
        if rate == math.inf:
            return first, 1
        place = min(self.rates, key=lambda place: self.rates[place])
        if self.rates.get("pool") == math.inf and self.rates[place] > WORTH_WORKERS_S:
            place = "pool"  # to be tried
        step_s = self.rates[place] if self.rates[place] < math.inf else self.rates["here"]
        if is_short:
            at_once = max(1, int(LIVE_S / step_s))
            return place, min(MOST, at_once) if place == "pool" else at_once
        at_once = 1 << int(math.log2(max(1.0, AT_ONCE_S / step_s)))
        if place == "here":
            return place, at_once
        wanted = at_once if self.plain.thin is None else max(at_once, 2 * DEPTH)  # for blocks to go deep
        return place, max(FEWEST, min(MOST, wanted, int((READ_S if self.is_published else MOST_S) / step_s)))

    def _reach(self) -> None:
        """Have copies stand for arrays that lie in this process's own memory.

        Workers may not reach that; where they do, they would copy what they read in every step, and could not do steps block by block.
        """
        if self.is_reached:
            return
        self.is_reached = True
        if self.pool.is_driver_reachable:
            run([in_memory(np.zeros(1))], [Target((1,), np.dtype(float))], "processes", self.pool)  # finds out
        may_stay = self.pool.is_driver_reachable  # else there is no other way than copies, whatever they take
        if may_stay:
            most = sum(role.nbytes for role in self.roles)  # of a larger one a step looks at parts, or it costs more than the state
            nbytes = {n: n.size * n.dtype.itemsize for n in self.outside}
            strides = {n: n.held.array.strides if isinstance(n, InMemory) else n.strides for n in self.outside}
            self.outside = [n for n in self.outside if nbytes[n] <= most and not is_broadcast(n.shape, strides[n])]
            if not self.pool.has_room(sum(nbytes[n] for n in self.outside)):
                return  # without asking for it: where nothing is spilled that is an error, elsewhere it would be taken from the disk
        try:
            self.copies = [
                Storage(self.pool, n.shape, n.dtype, default_chunks(n.shape, n.dtype), may_spill=not may_stay) for n in self.outside
            ]
        except MemoryBudgetError:
            if may_stay:  # another thread has taken it
                return
            raise
        new: dict[Expr, Expr] = {
            node: make(Stored, copy.shape, copy.dtype, copy, 0, copy.layout.strides, None)
            for node, copy in zip(self.outside, self.copies, strict=True)
        }
        self.new, self.looks = list(substitute(self.new, new)), list(substitute(self.looks, new))
        self.plain = self._planned([])
        self.looking = self._planned(self.looks) if self.looks else self.plain
        self.plans.clear()

    # --- buffers -----------------------------------------------------------------------------------------------------------

    def _place(self, x: Any, k: int, outs: tuple[Any, ...]) -> Storage:
        """Return the storage that field ``k`` begins in: its own where it is whole, which is then read and never written."""
        pool = self.pool
        if _is_whole(x) and x._storage.pool is pool and not x._storage.is_spilled:
            storage: Storage = x._storage
            return storage
        storage = self._allocate(x.shape, x.dtype, self.chunks[k])
        if x.size:
            fill(x.node, storage, self.scheduler)
        return storage

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: Chunks) -> Storage:
        storage = Storage(self.pool, shape, dtype, chunks)
        if storage.is_spilled:
            raise MemoryBudgetError(
                f"iterating over a state of shape {shape}, {dtype}: two sets of it, {storage.nbytes} bytes each, do not fit in the memory "
                f"limit of {self.pool.budget.limit_nbytes} bytes beside what is stored. Delete stored arrays, give out= the arrays of the "
                f"state, or raise memory_limit."
            )
        self.own[storage.identity] = storage
        return storage

    def _look_place(self, node: Expr) -> Storage:
        place = Storage(self.pool, node.shape, node.dtype, default_chunks(node.shape, node.dtype))
        if place.is_spilled:
            raise MemoryBudgetError(
                f"iterate(observe=...) asks for an array of shape {node.shape}, {node.dtype}: its {place.nbytes} bytes do not fit in the "
                f"memory limit of {self.pool.budget.limit_nbytes} bytes beside the state. Observe reductions or parts of it, or raise "
                f"memory_limit."
            )
        return place

    def _next(self, fields: list[Storage]) -> tuple[list[Storage], list[Storage]]:
        """Return (where the next step writes what it computes, where the fields are then)."""
        taken = {storage.identity for storage in fields}
        targets: list[Storage] = []
        for node, k in zip(self.new, (self.sources.index(n) for n in range(len(self.new))), strict=True):
            free = (s for s in self.own.values() if s.identity not in taken and s.shape == node.shape and s.dtype == node.dtype)
            storage = next(free, None) or self._allocate(node.shape, node.dtype, self.chunks[k])
            taken.add(storage.identity)
            targets.append(storage)
        return targets, [targets[n] if n >= 0 else fields[-1 - n] for n in self.sources]

    def _scalars_of(self, position: int) -> list[Storage]:
        while len(self.scalar_places) <= position:
            self.scalar_places.append([Storage(self.pool, (), role.dtype, ()) for role in self.slots])
        return self.scalar_places[position]

    def _bound(self, traced: _Traced, fields: list[Storage], targets: list[Storage], position: int, *, is_thin: bool = False) -> Step:
        """Return the step with storages in its places."""
        step = traced.thin if is_thin else traced.step
        assert step is not None
        buffers = list(step.plan.buffers)
        looks = self.look_places if traced.looks else []
        places = (
            *zip(traced.fields, fields, strict=True),
            *zip(traced.scalars, self._scalars_of(position), strict=True),
            *zip(traced.fresh, targets, strict=True),
            *zip(traced.looks, looks, strict=True),
            *((number, storage) for storage, number in traced.constants),
        )
        for number, storage in places:
            if number is not None and number >= 0:
                buffers[number] = buffer_of(storage, self.pool)[0]
        return replace(step, plan=replace(step.plan, buffers=tuple(buffers)))

    # --- running -----------------------------------------------------------------------------------------------------------

    def run(self, start: int, steps: int | None, every: int, callback: Callable[[Frame], Any] | None, watch: Watch) -> tuple[Any, ...]:
        began = time.perf_counter()
        done = 0
        is_watched = callback is not None or self.until is not None
        self.is_published = watch.publisher is not None
        watch.begin(self._values)
        while steps is None or done < steps:
            most = math.inf if steps is None else steps - done
            place, at_once = self._batch(is_short=watch.is_asked())
            if is_watched:
                most = min(most, every - done % every)
                at_once = math.ceil(most / math.ceil(most / at_once))  # as many in each batch up to the next look
            count = int(min(most, at_once))
            done += count
            is_look = is_watched and (done % every == 0 or done == steps)
            self._advance(place, start + done - count, count, is_look=is_look)
            watch.batch(done, self._values)
            if not is_look:
                continue
            looks = [place.array(place.layout).copy()[()] for place in self.look_places]
            is_enough = self.until is not None and bool(np.all(looks.pop(0)))
            if callback is not None:
                callback(Frame(start + done, time.perf_counter() - began, self._state(), dict(zip(self.observe, looks, strict=True))))
                self.is_copied = False  # it may have written what the step reads
            if is_enough:
                break
            if callback is not None and done != steps:
                self._check_looked(f"the callback after step {start + done}")
        watch.end(done, self._values)
        return self._state()

    def _values(self) -> list[np.ndarray[Any, Any]]:
        """Return the state as it lies there, between plans."""
        return [storage.array(storage.layout) for storage in self.fields]

    def _state(self) -> tuple[Any, ...]:
        return tuple(wrap_stored(storage, storage.layout, chunks) for storage, chunks in zip(self.fields, self.chunks, strict=True))

    def give(self, results: Sequence[Any], outs: Sequence[Any]) -> None:
        """Have ``outs``, stored arrays, be the results; without a copy where both are whole and nobody has the result."""
        known = {place._storage.identity for place in outs}
        mine = {identity for identity in self.own if identity not in known}  # to be exchanged, each once
        moves: list[tuple[bool, Any, Any]] = []
        for result, place in zip(results, outs, strict=True):
            source = result._storage
            if source is place._storage and result._layout == place._layout:
                continue
            if source.identity in known:  # what lies in another field's place is taken away before that is written
                source = Storage(self.pool, result.shape, result.dtype, result.chunks)
                fill(result.node, source)
                mine.add(source.identity)
            is_exchanged = source.identity in mine and not source.is_spilled and _is_whole(place)
            if is_exchanged:
                mine.discard(source.identity)
            moves.append((is_exchanged, source, place))
        for is_exchanged, source, place in sorted(moves, key=lambda move: move[0]):  # copies first: an exchange ends what it takes from
            with hold_all([(place._storage, place._layout, "w")]):
                if not (is_exchanged and place._storage.exchange(source, self.line)):
                    place._overwrite(wrap_stored(source, source.layout).node)

    def _advance(self, place: str, first: int, count: int, *, is_look: bool) -> None:
        """Do ``count`` steps from number ``first`` on; with the last of them compute what was asked for, if ``is_look``."""
        self._next(self.fields)  # allocates what is missing, before anything is held
        if place == "pool":
            self._reach()
        uses = [(n.storage, Layout.of(n), "r") for n in self.inputs]
        uses += [(s, s.layout, "r") for s in dict.fromkeys(self.fields) if s.identity not in self.own]
        uses += [(s, s.layout, "w") for s in self.own.values()]
        with hold_all(uses):
            check_inputs(self.inputs, self.readers)
            if not self.is_copied:
                for node, copy in zip(self.outside, self.copies, strict=False):
                    copy.fill(copy.layout, node.held.array if isinstance(node, InMemory) else node.storage.read(Layout.of(node)))
                self.is_copied = bool(self.copies) and not self.values.are_called
            for storage in self.fields:
                storage.check_whole(storage.layout)
            begun: list[Storage] = []
            self.is_touched = False
            try:
                for storage in self.own.values():
                    storage.begin_write(stays=True)
                    begun.append(storage)
                began = time.perf_counter()
                report = self._run_here(first, count, is_look) if place == "here" else self._run_chained(first, count, is_look, uses)
                self.rates[place] = min(self.rates[place], (time.perf_counter() - began) / count)
                for storage in begun:
                    storage.mend(storage.layout)  # a step fills all of it
            except BaseException as error:
                where = f"in step {first}" if count == 1 else f"in steps {first} to {first + count - 1}"
                with contextlib.suppress(Exception):  # a class that takes no notes
                    error.add_note(f"{where} of iterate() at {self.line}")
                for storage in begun if self.is_touched else ():
                    if storage not in self.fields or (place == "pool" and count > 1):  # one step leaves the state before it as it was
                        why = f"It was a buffer of iterate() at {self.line}, which {type(error).__name__} ended {where}."
                        storage.tear(dict.fromkeys(range(math.prod(storage.counts)), why))
                raise
            finally:
                for storage in begun:
                    storage.end_write(storage.layout, self.line)
        warn(report)

    def _run_chained(self, first: int, count: int, is_look: bool, uses: Sequence[tuple[Storage, Layout, str]]) -> Report:
        """Do the steps as one plan."""
        fields, sequence, key = self.fields, [], []
        for position in range(count):
            targets, after = self._next(fields)
            if self.used:
                values, places = self.values.at(first + position), self._scalars_of(position)
                for k in self.used:
                    places[k].array(places[k].layout)[...] = values[k]
            sequence.append((fields, targets))
            key.append(tuple(s.extent.offset for s in (*fields, *targets)))
            fields = after
        traced = [self.plain] * (count - 1) + [self.looking if is_look else self.plain]
        constants = tuple(storage.address(self.pool)[0] for storage, _ in traced[-1].constants)
        whole = (tuple(key), is_look, constants)
        plan = self.plans.pop(whole, None)
        if plan is None:
            plan = chain(self._steps(traced, sequence))
        self.plans[whole] = plan  # the latest last
        while len(self.plans) > KEPT_PLANS:
            del self.plans[next(iter(self.plans))]
        if not plan.layers:  # fields change places, or nothing does
            self.fields = fields
            return Report()
        # Where Ctrl-C leaves tasks behind that still run, these keep, and lock, what they write until they end.
        locks = lock_requests(use for use in uses if not use[0].is_shared)
        held = [storage.address(self.pool)[1] for storage, _, _ in uses]
        plan = replace(
            plan,
            locks=locks,
            keep=(*plan.keep, held, self.look_places, self.scalar_places, self.copies),
            task_timeout_s=config.task_timeout,
        )
        outcome = Outcome()
        try:
            report = self.pool.run(plan, self.scheduler, outcome)
        finally:
            self.is_touched = outcome.began
        self.fields = fields
        return report

    def _steps(self, traced: Sequence[_Traced], sequence: Sequence[tuple[list[Storage], list[Storage]]]) -> list[Step]:
        """Return steps with storages in their places, block by block where several can be done so."""
        thin = [self._bound(t, *places, k, is_thin=True) for k, (t, places) in enumerate(zip(traced, sequence, strict=True)) if t.thin]
        steps, done = blocked(thin, self.pool.workers)
        if self.scheduler in (None, "processes"):
            steps = [with_pickles(step) for step in steps]
        return steps + [self._bound(traced[k], *sequence[k], k) for k in range(done, len(traced))]

    def _run_here(self, first: int, count: int, is_look: bool) -> Report:
        """Do the steps in this thread."""
        warned: dict[tuple[str, str, str], None] = {}
        prepared: dict[Any, tuple[Prepared, list[Storage]]] = {}
        fields = self.fields
        slots = [s.array(s.layout) for s in self._scalars_of(0)]
        with contextlib.ExitStack() as stack:
            for position in range(count):
                looks = is_look and position == count - 1
                key = (looks, *(id(s) for s in fields))
                found = prepared.get(key)
                if found is None:
                    if looks and self.looks:  # another plan, and the last: it takes the room of the others
                        for one, _ in prepared.values():
                            warned.update(dict.fromkeys(one.report().warnings))
                        prepared.clear()
                        stack.close()
                    targets, after = self._next(fields)
                    step = self._bound(self.looking if looks else self.plain, fields, targets, 0)
                    beside = next((one for one, _ in prepared.values()), None)
                    found = prepared[key] = stack.enter_context(Prepared(self.pool, step.plan, beside)), after
                one, after = found
                if self.used:
                    values = self.values.at(first + position)
                    for k in self.used:
                        slots[k][...] = values[k]
                self.is_touched = True
                one.run()
                self.fields = fields = after
                self.is_touched = False
            for one, _ in prepared.values():
                warned.update(dict.fromkeys(one.report().warnings))
        return Report(tuple(warned))


class _Scalars:
    """What varies by step: its number, and the user's numbers."""

    def __init__(self, given: Mapping[str, Any], kind: np.dtype[Any], start: int) -> None:
        self.names = tuple(given)
        self.given = tuple(given.values())
        self.are_called = any(callable(value) for value in self.given)  # by whoever may write what a step reads
        self.dtypes = [np.dtype(np.int64)]
        for name, value in given.items():
            if not callable(value) and np.ndim(value) != 1:
                raise TypeError(f"iterate(scalars={{{name!r}: ...}}) takes a function of the step's number, or one number for each step")
            # Of a list the first number, as it is beside the others: of 1 and 0.5 it is 1.0.
            sample: Any = value(start) if callable(value) else value if isinstance(value, np.ndarray) else np.asarray([*value, 0])[0].item()
            if callable(value) and np.ndim(sample):
                raise TypeError(
                    f"iterate(scalars={{{name!r}: ...}}) gave an array of shape {np.shape(sample)} for a step; it takes one number"
                )
            # Python's numbers have the dtype that they would have beside arrays of the state.
            is_weak = isinstance(sample, (int, float, complex)) and not isinstance(sample, bool)
            self.dtypes.append(np.result_type(kind, sample) if is_weak else np.asarray(sample).dtype)

    def at(self, step: int) -> list[Any]:
        """Return the numbers of a step."""
        found: list[Any] = [step]
        for name, value in zip(self.names, self.given, strict=True):
            if callable(value):
                found.append(value(step))
            elif not 0 <= step < len(value):
                raise IndexError(f"iterate(scalars={{{name!r}: ...}}) has {len(value)} numbers, and none for step {step}")
            else:
                found.append(value[step])
        return found


def _whole(role: _Role) -> Stored:
    return make(Stored, role.shape, role.dtype, role, 0, c_strides(role.shape, role.dtype.itemsize), None)


def _call(function: Callable[..., Any], after: list[Any], before: list[Any]) -> Any:
    """Call a function of the state after a step and, where it takes twice as many arrays, before it."""
    try:
        kinds = [p.kind for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        takes = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    except (TypeError, ValueError):
        takes = len(after)
    return function(*after, *before) if takes == 2 * len(after) else function(*after)
