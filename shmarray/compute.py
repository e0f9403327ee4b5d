"""Running expressions: into NumPy arrays, into new stored arrays, into stored arrays in place.

Promises: what `compute` returns is the caller's alone, except for stored arrays, of which it is a read-only view that never
changes; inputs that were written after an expression was built on them are noticed before anything runs; warnings of tasks
arrive here, at the user's line.
Never put here: what is fused, how tasks run.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scheduler.errors import SharedMemoryError, UnreachableMemory
from scheduler.limits import format_bytes
from scheduler.run import Pool, configure_default, default_pool
from scheduler.task import Address, Outcome, Plan, Progress, Report
from shmarray.chunks import Chunks, default_chunks
from shmarray.config import config
from shmarray.errors import ChangedInput, MemoryBudgetError, PartialUpdateError, cut_short
from shmarray.expr import Elementwise, Expr, InMemory, Stored, line_of, make, postorder, user_line
from shmarray.fuse import is_zero
from shmarray.handle import Handle, in_memory, wrap_stored
from shmarray.optimise import substitute
from shmarray.partial import Damage, damage_of
from shmarray.plan import Target
from shmarray.progress import shown
from shmarray.publish import snapshots
from shmarray.shared_memory import hold_all
from shmarray.storage import Layout, Storage
from shmarray.templates import plan_for

__all__ = [
    "asked",
    "check_inputs",
    "compute",
    "copied",
    "current_pool",
    "fill",
    "goes_straight",
    "is_traced",
    "persist",
    "plan_of",
    "run",
    "values_of",
    "warn",
    "write",
]

NDArray = np.ndarray[Any, Any]
AT_ONCE_NBYTES = 1 << 22  # what is smaller is copied here, in less time than a plan takes
_log = logging.getLogger("shmarray")

_configured: tuple[Any, ...] = (None, None, None)  # what the default pool is made with; any thread may set it to what it sees


def current_pool() -> Pool:
    """Return the pool of this context: the innermost ``with Pool(...)``, else the default one, made with `config`'s settings."""
    global _configured
    settings = (config.workers, config.memory_limit, config.spill_directory)
    if settings != _configured:
        configure_default(workers=settings[0], memory_limit=settings[1], spill_directory=settings[2])
        _configured = settings
    return default_pool()


def asked(progress: bool | None) -> contextlib.AbstractContextManager[Any]:
    """Return a block in which computations of this thread show how far they are, or do not; None: as `config.progress` says."""
    return contextlib.nullcontext() if progress is None else config.set(progress=progress)


def compute(*args: Any, scheduler: str | None = None, progress: bool | None = None) -> tuple[Any, ...]:
    """Return the values of several arrays, computed together: work they share is done once, one pass reads a common input.

    Arguments that are not shmarray arrays come back as they are. Each result is a fresh, writable NumPy array of the caller's
    own; of a stored array a read-only view without a copy; of a 0-d array a NumPy scalar. ``progress``: whether to show how far it
    is, as in `ProgressBar`; None: ``config.progress``.

    >>> import shmarray as sa
    >>> x = sa.arange(5.0)
    >>> sa.compute(x.sum(), x.max())
    (np.float64(10.0), np.float64(4.0))
    """
    lazy = [a for a in args if isinstance(a, Handle) and a._storage is None]
    with asked(progress):
        values = iter(_fresh([a.node for a in lazy], scheduler))
    out: list[Any] = []
    for a in args:
        if not isinstance(a, Handle):
            out.append(a)
            continue
        value = next(values) if a._storage is None else a._storage.lend(_layout(a))
        out.append(value[()] if value.ndim == 0 else value)
    return tuple(out)


def values_of(x: Handle, scheduler: str | None = None) -> NDArray:
    """Return the values of one array as an ndarray, 0-d included."""
    if x._storage is not None:
        return x._storage.lend(_layout(x))
    return _fresh([x.node], scheduler)[0]


def _layout(x: Handle) -> Layout:
    assert x._layout is not None
    return x._layout


def _fresh(nodes: Sequence[Expr], scheduler: str | None) -> list[NDArray]:
    nbytes = sum(math.prod(node.shape) * node.dtype.itemsize for node in nodes)
    if nbytes:
        _check_result(nbytes, [node.shape for node in nodes])
    targets = [Target(node.shape, node.dtype) for node in nodes]
    run(nodes, targets, scheduler)
    return [np.empty(t.shape, t.dtype) if t.array is None else t.array for t in targets]


def _check_result(nbytes: int, shapes: list[tuple[int, ...]]) -> None:
    """Raise MemoryBudgetError for NumPy results that are larger than all the memory there may be."""
    limit = current_pool().budget.limit_nbytes
    if nbytes > limit:
        raise MemoryBudgetError(
            f"computing {format_bytes(nbytes)} of NumPy arrays, of shape {', '.join(map(str, shapes[:3]))}{', ...' * (len(shapes) > 3)}: "
            f"the memory limit is {format_bytes(limit)}. persist() it, which may lie in the spill file, give compute() a stored or NumPy "
            f"array as out=, compute parts or reductions of it, or raise memory_limit."
        )


def goes_straight(node: Expr, out: NDArray) -> bool:
    """Return whether ``node`` has to be computed straight into ``out``, for want of memory for a result beside it, and can be."""
    if math.prod(node.shape) * node.dtype.itemsize <= current_pool().budget.limit_nbytes or not out.flags.writeable:
        return False
    return not builtins.any(np.may_share_memory(n.held.array, out) for n in postorder([node]) if isinstance(n, InMemory))


def persist(*args: Any, scheduler: str | None = None, progress: bool | None = None) -> tuple[Any, ...]:
    """Return the arrays as stored ones, computed together; one that is stored is returned itself. ``progress`` as in `compute`."""
    lazy = [a for a in args if isinstance(a, Handle) and a._storage is None]
    pool = current_pool()
    storages = [Storage(pool, a.shape, a.dtype, a.chunks) for a in lazy]
    # Memory that nobody has touched is zero already.
    work = [(a.node, s) for a, s in zip(lazy, storages, strict=True) if not (s.extent.was_cold and is_zero(a.node))]
    with asked(progress):
        run([n for n, _ in work], [Target(s.shape, s.dtype, storage=s, layout=s.layout, is_new=True) for _, s in work], scheduler, pool)
    stored = iter([wrap_stored(s, s.layout, a.chunks) for s, a in zip(storages, lazy, strict=True)])
    return tuple(next(stored) if isinstance(a, Handle) and a._storage is None else a for a in args)


def new_stored(values: NDArray, chunks: Chunks) -> Any:
    """Return a stored copy of a NumPy array."""
    storage = Storage(current_pool(), values.shape, values.dtype, chunks)
    if values.nbytes < AT_ONCE_NBYTES:
        storage.fill(storage.layout, values)
    else:
        fill(in_memory(values), storage)
    return wrap_stored(storage, storage.layout, chunks)


def copied(x: Handle) -> Any:
    """Return a stored copy of a stored array."""
    source, layout = x._storage, _layout(x)
    assert source is not None
    storage = Storage(current_pool(), x.shape, x.dtype, x.chunks)
    if layout.nbytes < AT_ONCE_NBYTES:
        with hold_all([(source, layout, "r")]):
            source.check_whole(layout)
            source.save_windows()
            storage.fill(storage.layout, source.read(layout))
    else:
        fill(wrap_stored(source, layout, live=True).node, storage)  # of what is there when it is free to be read
    return wrap_stored(storage, storage.layout, x.chunks)


def fill(node: Expr, storage: Storage, scheduler: str | None = None) -> None:
    """Compute an expression into a new storage of its shape and dtype."""
    run([node], [Target(node.shape, node.dtype, storage=storage, layout=storage.layout, is_new=True)], scheduler, storage.pool)


def write(target: Handle, value: Expr, scheduler: str | None = None) -> None:
    """Write ``value``, of any dtype that casts safely enough and broadcasts, over the stored array ``target``."""
    storage, layout = target._storage, target._layout
    assert storage is not None and layout is not None
    line = user_line()
    if value.dtype != layout.dtype:
        value = make(Elementwise, value.shape, layout.dtype, "astype", (value,))
    pool = current_pool()
    if _reads_elsewhere(value, storage, layout) and _write_aside(value, storage, scheduler, line):
        return
    run([value], [Target(layout.shape, layout.dtype, storage=storage, layout=layout)], scheduler, pool, line)


def _reads_elsewhere(value: Expr, storage: Storage, layout: Layout) -> bool:
    """Whether the new values of a whole array are made of its old ones at other places: ``f(u[1:], u[:-1]).compute(out=u)``."""
    if layout != storage.layout or storage.is_shared or storage.is_spilled or storage.torn:
        return False
    return builtins.any(isinstance(n, Stored) and n.storage is storage and Layout.of(n) != layout for n in postorder([value]))


def _write_aside(value: Expr, storage: Storage, scheduler: str | None, line: str) -> bool:
    """Compute the new values into memory of their own, and have the array be that: nothing is copied, nothing left half done."""
    fresh = Storage(storage.pool, storage.shape, storage.dtype, default_chunks(storage.shape, storage.dtype))
    if fresh.is_spilled:
        return False
    target = Target(storage.shape, storage.dtype, storage=fresh, layout=fresh.layout, is_new=True)
    with hold_all([(storage, storage.layout, "w")]):
        run([value], [target], scheduler, storage.pool, line)
        return storage.exchange(fresh, line)  # not while this thread itself has a part of it open to write


def plan_of(nodes: Sequence[Expr]) -> Plan:
    """Return the plan that computing ``nodes`` would run."""
    targets = [Target(n.shape, n.dtype) for n in nodes]
    return plan_for(nodes, targets, current_pool())


def run(
    nodes: Sequence[Expr],
    targets: Sequence[Target],
    scheduler: str | None = None,
    pool: Pool | None = None,
    line: str = "",
) -> Report:
    """Fill the targets, one after the other seen by every alias: all cells that are read or written are locked throughout."""
    pairs = [(n, t) for n, t in zip(nodes, targets, strict=True) if math.prod(t.shape)]
    if not pairs:
        return Report()
    everything = list(postorder(n for n, _ in pairs))
    if taken := snapshots(everything, [n for n, _ in pairs]):
        pairs = list(zip(substitute([n for n, _ in pairs], taken), [t for _, t in pairs], strict=True))
    stored = [node for node in everything if isinstance(node, Stored)]
    places = [*(node.storage for node in stored), *(target.storage for _, target in pairs if target.storage is not None)]
    for place in places:
        place.require_readable()
    homes = {place.pool for place in places if place.is_spilled}
    # Only the workers of its own pool reach a spill file.
    pool = homes.pop() if len(homes) == 1 else pool or current_pool()
    uses = [(node.storage, Layout.of(node), "r") for node in stored]
    uses += [(target.storage, target.layout, "w") for _, target in pairs if target.storage is not None and target.layout is not None]
    # All at once, before looking: no write can come between the check and the run, and nobody waits holding half of them.
    with hold_all(uses) if uses else contextlib.nullcontext(), shown():
        return _run_locked(pairs, stored, scheduler, pool, line)


def _run_locked(pairs: list[tuple[Expr, Target]], stored: list[Stored], scheduler: str | None, pool: Pool, line: str) -> Report:
    check_inputs(stored, {x: node for node in postorder(n for n, _ in pairs) for x in node.inputs})
    report = _Run(pairs, stored, scheduler, pool, line).run()
    warn(report)
    return report


class _Run:
    """A plan, the stored arrays that it writes, and how it went."""

    def __init__(self, pairs: list[tuple[Expr, Target]], stored: list[Stored], scheduler: str | None, pool: Pool, line: str) -> None:
        self.pairs = pairs
        self.inputs = [(node.storage, Layout.of(node)) for node in stored]
        self.scheduler = scheduler
        self.pool = pool
        self.line = line
        self.written = [(t.storage, t.layout) for _, t in pairs if t.storage is not None and t.layout is not None]
        self.is_update = len(self.written) == 1 and not any(t.is_new for _, t in pairs)
        self.plan: Plan | None = None
        self.outcome = Outcome()
        self.addresses: list[Address] = []  # of what is written, as the plan has them
        self.versions: dict[Storage, int] = {}  # after the run was cut short
        self.torn: dict[Storage, Mapping[int, str]] = {}  # the cells that it tore
        self.error: weakref.ref[PartialUpdateError] | None = None

    def run(self) -> Report:
        """Run the plan, or what is left of it; raise PartialUpdateError when a stored array is left between old and new."""
        begun: list[tuple[Storage, Layout]] = []
        told: str | None = None  # at which line they were written; None: nothing was
        failed: BaseException | None = None
        damages: list[Damage] = []
        is_clear = False  # what was done to the targets is known
        try:
            try:
                for storage, layout in self.written:
                    storage.begin_write(stays=self.plan is not None and not storage.is_spilled)
                    begun.append((storage, layout))
                report = self._first_run() if self.plan is None else self._rest()
                told = self.line
                for storage, layout in begun:
                    storage.mend(layout)
                    self._mark(storage, {})
                is_clear = True
            except BaseException as error:
                failed = error
                damages = self._damages()
                if not builtins.all(damage.is_none for damage in damages):
                    told = self.line
                for (storage, layout), damage in zip(begun, damages, strict=False):
                    self._mark(storage, damage.torn)
                    if damage.is_whole:
                        storage.mend(layout)
                is_clear = True
            finally:
                for storage, layout in begun:
                    if not is_clear:  # a second Ctrl-C, while the first was dealt with
                        told = self.line
                        self._mark(storage, dict.fromkeys(storage.cells_of(layout), "An update was interrupted twice."))
                    storage.end_write(layout, told)
            if failed is None:
                return report
            is_partial = self.is_update and damages and not damages[0].is_none and not damages[0].is_whole
            if is_partial and isinstance(failed, (Exception, KeyboardInterrupt)):  # SystemExit goes its way as it is
                raise self._partial(failed, damages[0]) from failed
            raise failed
        finally:
            del failed  # no circle with its traceback

    def _mark(self, storage: Storage, torn: Mapping[int, str]) -> None:
        """Have the cells ``torn`` marked, and no others by this run; the marks of other updates stay."""
        before = self.torn.get(storage, {})
        for cell in before:
            if cell not in torn:
                storage.torn.pop(cell, None)
        mine = {cell: why for cell, why in torn.items() if cell in before or cell not in storage.torn}
        storage.tear(mine)
        self.torn[storage] = mine

    def resume(self) -> None:
        """Do what is left; if it still runs, after it has ended."""
        storage, layout = self.written[0]
        with hold_all([(storage, layout, "w"), *((s, where, "r") for s, where in self.inputs)]):
            for other, version in self.versions.items():
                if other.version != version:
                    at = self.line or "an unknown line"
                    raise ChangedInput(
                        f"resuming the update of the stored array of shape {storage.shape} at {at}: the stored array of shape "
                        f"{other.shape} was written at {other.writes[-1][1] or 'an unknown line'} after the update was cut short. "
                        f"Write the torn chunks anew: what was to be done can no longer be told from what was done since."
                    )
            error = self.error() if self.error is not None else None
            if error is not None:
                error._finish = None  # until here it can be tried again
            warn(self.run())

    def _first_run(self) -> Report:
        pool = self.pool
        self._use(plan_for([n for n, _ in self.pairs], [t for _, t in self.pairs], pool))
        if pool.is_driver_reachable:
            try:
                return self._run_plan()
            except UnreachableMemory as error:  # raised by the first access, before any task has written anything
                _log.warning("workers may not reach the memory of this process (%s): staging through shared memory", error)
                pool.is_driver_reachable = False
        return self._run_staged()

    def _run_staged(self) -> Report:
        """Run with every input and output in the arena: this process copies what lies in its own memory in before, and out after."""
        pool, pairs = self.pool, self.pairs
        new: dict[Expr, Expr] = {}
        for node in postorder(n for n, _ in pairs):
            if isinstance(node, InMemory):
                values = node.held.array
            elif isinstance(node, Stored) and node.storage.pool is not pool:
                values = node.storage.read(Layout.of(node))
            else:
                continue
            copy = Storage(pool, node.shape, node.dtype, default_chunks(node.shape, node.dtype))
            copy.fill(copy.layout, values)
            new[node] = make(Stored, node.shape, node.dtype, copy, 0, copy.layout.strides, copy.version)
        targets = []
        for _, target in pairs:
            if target.storage is not None and target.storage.pool is pool:
                targets.append(target)
                continue
            aside = Storage(pool, target.shape, target.dtype, default_chunks(target.shape, target.dtype))
            targets.append(Target(target.shape, target.dtype, storage=aside, layout=aside.layout))
        self._use(plan_for(substitute([n for n, _ in pairs], new), targets, pool))
        report = self._run_plan()
        for (_, target), staged in zip(pairs, targets, strict=True):
            if staged is target:
                continue
            assert staged.storage is not None and staged.layout is not None
            if target.storage is not None and target.layout is not None:
                target.storage.fill(target.layout, staged.storage.read(staged.layout))
            else:
                assert target.array is not None
                np.copyto(target.array, staged.storage.read(staged.layout))
        return report

    def _rest(self) -> Report:
        """Run the plan on from where it was cut short; the target may have moved since, to leave an array lent out as it was."""
        plan, outcome = self.plan, self.outcome
        assert plan is not None
        if outcome.finished:
            return Report()
        if outcome.began and outcome.progress is None:  # it has ended: we have its locks
            raise RuntimeError("what this update had done when it was cut short is not known; write the torn chunks anew.")
        places = [storage.address(self.pool) for storage, _ in self.written]
        moved = {old: new for old, (new, _) in zip(self.addresses, places, strict=True)}
        buffers = tuple(replace(b, address=moved.get(b.address, b.address)) if b.address else b for b in plan.buffers)
        keep = (*plan.keep, *(held for _, held in places))
        self._use(replace(plan, buffers=buffers, keep=keep, progress=outcome.progress or plan.progress))
        return self._run_plan()

    def _use(self, plan: Plan) -> None:
        # The plan last: from then on the others are looked at, whenever Ctrl-C comes.
        self.addresses = [storage.address(self.pool)[0] for storage, _ in self.written]
        self.outcome = Outcome()
        self.plan = plan

    def _run_plan(self) -> Report:
        assert self.plan is not None
        limit_s = config.task_timeout
        plan = self.plan if limit_s is None else replace(self.plan, task_timeout_s=limit_s)
        try:
            return self.pool.run(plan, self.scheduler or config.scheduler, self.outcome)
        except SharedMemoryError as error:
            for node in postorder(n for n, _ in self.pairs):
                if isinstance(node, InMemory) and node.held.file:
                    error.add_note(f"reading the mapped file {node.held.file}, of which {node.held.array.nbytes} bytes were mapped")
            raise

    def _damages(self) -> list[Damage]:
        plan = self.plan
        if plan is None:
            return []
        targets = zip(self.written, self.addresses, strict=True)
        return [damage_of(storage, layout, address, plan, self.outcome) for (storage, layout), address in targets]

    def _partial(self, error: BaseException, damage: Damage) -> PartialUpdateError:
        storage, _ = self.written[0]
        counts = f"{len(damage.new)} of {len(damage.new) + len(damage.old) + len(damage.torn)} chunks have their new values"
        if damage.torn:
            first = ", ".join(str(storage.cell_index(cell)) for cell in sorted(damage.torn)[:3])
            counts += f", {len(damage.torn)} some of each ({first}{', ...' if len(damage.torn) > 3 else ''})"
        try:
            said = f": {error}".rstrip(". :")
        except Exception:
            said = ""  # a class whose __str__ fails
        what = type(error).__name__ + said
        at = f" at {self.line}" if self.line else ""
        assert self.plan is not None
        progress = self.outcome.progress or self.plan.progress
        can_resume = not damage.is_known or (progress is not None and not self._is_lost(progress))
        if not damage.is_known:
            advice = "it may still be running, in the background: resume() of this error waits for its end, and does the rest"
        elif can_resume:
            advice = "resume() of this error does the rest"
        else:
            advice = "a step of it may be half done, so that the rest cannot be done: write the torn chunks anew"
        begun = f"the update of the stored array of shape {storage.shape}{at} was cut short by {what}"
        found = cut_short(error, f"{begun}. {counts}, the others their old ones; {advice}.")
        found.updated, found.untouched, found.torn = (
            [storage.cell_index(cell) for cell in sorted(cells)] for cells in (damage.new, damage.old, damage.torn)
        )
        if can_resume:
            self.versions = {s: s.version for s in (storage, *(s for s, _ in self.inputs))}
            self.error = weakref.ref(found)
            found._finish = self.resume
        return found

    def _is_lost(self, progress: Progress) -> bool:
        """Whether a task that must not run twice is half done."""
        assert self.plan is not None
        return builtins.any(self.plan.layers[layer].in_place for layer, _, _ in progress.unfinished)


def is_traced(node: Expr) -> bool:
    """Whether an expression reads arrays that have no values yet."""
    return builtins.any(isinstance(n, Stored) and n.storage.is_role for n in postorder([node]))


def check_inputs(stored: Iterable[Stored], readers: Mapping[Expr, Expr]) -> None:
    """Raise TornChunkError or ChangedInput where stored arrays are not what an expression was built on; the caller has their locks."""
    for node in stored:
        layout = Layout.of(node)
        node.storage.check_whole(layout)
        node.storage.save_windows()
        if node.version is not None:
            line = node.storage.changed_since(node.version, layout)
            if line is not None:
                built = line_of(readers.get(node, node)) or "an unknown line"
                raise ChangedInput(
                    f"the stored array of shape {node.shape} that an expression built at {built} reads "
                    f"was written at {line} before the expression was computed. Compute or persist() the expression before the "
                    f"write, build it on x.copy(), or on x.live if it is meant to read whatever is there."
                )


def warn(report: Report) -> None:
    """Raise the warnings of tasks here, as of the user's lines."""
    for category, message, line in report.warnings:
        kind = getattr(builtins, category, RuntimeWarning)
        if not (isinstance(kind, type) and issubclass(kind, Warning)):
            kind = RuntimeWarning
        file, _, number = line.rpartition(":")
        if file and number.isdigit():
            warnings.warn_explicit(message, kind, file, int(number))
        else:
            file, _, number = user_line().rpartition(":")
            warnings.warn_explicit(message, kind, file or "unknown", int(number or 0))
