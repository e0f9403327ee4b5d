"""From optimised expressions to a plan: which nodes get memory, what is fused into one layer, what each layer depends on.

    roots --optimise--> nodes --memory nodes, levels--> groups --programs, grids--> layers --hazards--> scheduler.task.Plan

A *memory node* has bytes of its own: a root, a reduction, scan or reshape, a kept elementwise node, and a block, assembly or source
only the driver reads that is not made within the tasks of the one pass that reads it (`passes`). Everything elementwise between memory
nodes is fused into the layers that need it, computed again rather than stored where that is cheap. Memory nodes of one level and one
iteration space that read the same source share a layer, so ``mean`` and ``std`` of one array read it once.

Promises: cost grows with nodes, not with tiles or chunks; a layer depends on every earlier layer that wrote what it reads, and
on those that touched what it writes.
Never put here: which nodes share a pass (`passes`), how kernels compute, who runs tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from scheduler.repeat import FAR, Spans, Step
from scheduler.results import result_memory
from scheduler.run import RESERVED_SHARE, Pool
from scheduler.task import ARENA, DRIVER, SPILL, Address, Buffer, Dependency, Kernel, Layer, LockRequest, Plan
from shmarray.engines import engine_for, why_not_compiled
from shmarray.expr import (
    Accumulate,
    Assemble,
    Block,
    Elementwise,
    Expr,
    Fill,
    Foreign,
    InMemory,
    Reduction,
    Reshape,
    Scan,
    Stored,
    View,
    line_of,
    postorder,
)
from shmarray.fuse import ProgramWriter, broadcast_operand, crossing_axes, is_leaf, memory_order
from shmarray.hoist import MOST_BOXES, hoist
from shmarray.kernels.accumulate import AccumulateKernel
from shmarray.kernels.numpy import MOST_STAGED_ITEMS, MapKernel
from shmarray.kernels.parts import PartsKernel
from shmarray.kernels.program import NO_BUFFER, Load, Operand, Program, Register, Source, Store
from shmarray.kernels.reduce import FinishKernel, ReduceKernel, ReduceSpec
from shmarray.kernels.scan import CarryKernel, ScanKernel
from shmarray.kernels.sources import BlockKernel, BlockSource, ForeignSource, Piece, PiecesSource
from shmarray.ops.reductions_table import REDUCTIONS
from shmarray.optimise import Optimised, optimise, weight_below
from shmarray.passes import Division, Making, Pass, divide, inside, source_edges
from shmarray.region import Box, IndexMap, c_strides, full_box
from shmarray.storage import Layout, Storage
from shmarray.tiles import (
    BLOCK_ITEMS,
    ENOUGH_TASKS,
    REDUCTION_TILE_ITEMS,
    TILE_ITEMS,
    Edges,
    Grid,
    accumulation_grid,
    edges_of,
    in_small_tiles,
    map_grid,
    part_grid,
    reduction_grid,
    slab_sizes,
    thinner,
    walked_grid,
)

__all__ = [
    "ANY_ROOM",
    "Bindings",
    "LayerOutline",
    "Outline",
    "Space",
    "Target",
    "buffer_of",
    "build_plan",
    "build_step",
    "lock_requests",
    "make_result",
    "outline",
]

NDArray = np.ndarray[Any, Any]
Space = tuple[tuple[int, ...], tuple[int, ...] | None]  # shape; axes that are reduced, None where nothing is
BLOCKS_NBYTES = 16 * BLOCK_ITEMS * 8  # of scratch that every task may need, in a pool that has so much; else it is part of a constant
ANY_ROOM = 0, math.inf  # see `Bindings`
FEW_PARTIAL_ITEMS = 1 << 13  # partial results that this process folds itself
SLAB_ITEMS = 1 << 20  # of a scan through a file: moved at once
THIN_ITEMS = 1 << 12  # of a tile of steps done block by block: how far a block gets is counted in tiles
MOST_THIN = 1 << 14
MOST_PARTS_TILES = 4  # a task calls the code of several parts, ten microseconds each: so many tiles make up for them
SHARED_WEIGHT_LIMIT = 12  # additions per element up to which two layers compute a shared node each for itself


@dataclass(slots=True)
class Target:
    """Where a root goes: a NumPy array of this process, or part of a storage.

    With neither, `build_plan` makes the array, in the memory order of what it is computed from, as NumPy does.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    array: np.ndarray[Any, Any] | None = None
    storage: Storage | None = None
    layout: Layout | None = None
    is_new: bool = False  # nobody has seen the storage yet, so that nobody minds it half written
    order: tuple[int, ...] | None = None  # of the axes in memory, of an array made by `build_plan`


@dataclass(frozen=True, slots=True)
class LayerOutline:
    """What the planner knew of a layer and running it does not need: for those who ask why."""

    kernel: Kernel  # as the NumPy engine runs it
    why_not_compiled: str  # empty when it is
    loads: tuple[Operand, ...]
    stores: tuple[Operand, ...]
    level: int  # -1: not of a level
    space: Space | None  # nodes of one level and space may share a pass


@dataclass(frozen=True, slots=True)
class Outline:
    """A plan, its layers, the buffer of each root, and for temporaries the operation that is kept there and why."""

    plan: Plan
    layers: tuple[LayerOutline, ...]
    results: tuple[int, ...]
    owners: dict[int, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Bindings:
    """What in a plan is of one time: which buffer each storage and each NumPy array is, what is read and written of storages."""

    storages: dict[int, int]  # by identity
    arrays: dict[int, int]  # by id()
    uses: tuple[tuple[int, Layout, str], ...]  # identity, part, "r" or "w"
    room: tuple[int, float]  # the plan is this one where what the pool has free is from (bytes) up to, and without, (bytes)


Empty = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray[Any, Any]]


def build_plan(roots: Sequence[Expr], targets: Sequence[Target], pool: Pool) -> tuple[Plan, Bindings]:
    """Return the plan that fills ``targets`` with ``roots``, which have their shapes and dtypes, and what in it is of this time."""
    builder = _built(roots, targets, pool, result_memory().empty)
    return builder.plan(), Bindings(builder.storage_buffers, builder.array_buffers, tuple(builder.uses), builder.room)


def build_step(roots: Sequence[Expr], targets: Sequence[Target], pool: Pool) -> tuple[Step, Step | None, Bindings]:
    """Return the plan that fills ``targets``, to be run so often that compiling always pays, and what its tasks touch.

    And once more in thin tiles, for several steps to be done block by block; None where a layer cannot be cut so.
    """
    builder = _built(roots, targets, pool, result_memory().empty, is_repeated=True)
    plan = builder.plan()
    grids = [draft.grid for draft in builder.layers]
    bindings = Bindings(builder.storage_buffers, builder.array_buffers, tuple(builder.uses), builder.room)
    return _step(plan, builder.layers, grids), _thin_step(plan, builder.layers), bindings


def _step(plan: Plan, drafts: Sequence[_LayerDraft], grids: Sequence[Grid | None]) -> Step:
    touched = [_touched(draft, grid) for draft, grid in zip(drafts, grids, strict=True)]
    return Step(plan, tuple(reads for reads, _ in touched), tuple(writes for _, writes in touched))


def _thin_step(plan: Plan, drafts: Sequence[_LayerDraft]) -> Step | None:
    layers, grids = [], []
    for layer, draft in zip(plan.layers, drafts, strict=True):
        grid = draft.grid if not draft.is_made else None
        if grid is not None:
            grid = thinner(grid, max(THIN_ITEMS, math.prod(grid.shape) // MOST_THIN))
        kernel = layer.kernel.on(grid) if grid is not None and hasattr(layer.kernel, "on") else None
        if grid is None or kernel is None:
            return None
        cost = max(1, layer.nbytes_per_task * layer.ntasks // grid.ntasks)
        layers.append(replace(layer, kernel=kernel, ntasks=grid.ntasks, dependencies=(), nbytes_per_task=cost))
        grids.append(grid)
    return _step(replace(plan, layers=tuple(layers)), drafts, grids)


def buffer_of(place: Storage | np.ndarray[Any, Any], pool: Pool) -> tuple[Buffer, tuple[Any, Any]]:
    """Return the buffer that a storage, or a NumPy array of this process, is to a plan, and what to hold while it runs."""
    if isinstance(place, Storage):
        address, extent = place.address(pool)
        return Buffer(place.nbytes, address), (place, extent)
    owner = place if place.base is None else place.base
    return Buffer(max(1, place.nbytes), Address(DRIVER, int(place.ctypes.data))), (place, owner)


def lock_requests(uses: Iterable[tuple[Storage, Layout, str]]) -> tuple[LockRequest, ...]:
    """Return the cells of parts of storages to be locked, to read or to write."""
    modes: dict[tuple[int, int, int], str] = {}
    for storage, layout, mode in uses:
        for request in storage.requests(layout, mode):
            key = (request.extent, request.start, request.stop)
            modes[key] = "w" if "w" in (mode, modes.get(key)) else "r"
    return tuple(LockRequest(e, a, b, mode) for (e, a, b), mode in sorted(modes.items()))


def outline(roots: Sequence[Expr], pool: Pool) -> Outline:
    """Return what `build_plan` decides for new results, to look at and never to run: the results have no memory."""
    return _built(roots, [Target(root.shape, root.dtype) for root in roots], pool, _without_memory).outline()


def _without_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return as_strided(np.empty(1, dtype), shape, c_strides(shape, dtype.itemsize))


def make_result(target: Target, order: tuple[int, ...], empty: Empty | None = None) -> None:
    """Give a target an array, its axes in memory in this order."""
    array = (empty or result_memory().empty)(tuple(target.shape[a] for a in order), target.dtype)
    target.array, target.order = array.transpose(np.argsort(order)), order


def _built(roots: Sequence[Expr], targets: Sequence[Target], pool: Pool, empty: Empty, *, is_repeated: bool = False) -> _Builder:
    optimised = optimise(tuple(roots))
    if not _reads_targets(roots, targets):
        optimised = hoist(optimised)
    builder = _filled(optimised, targets, pool, empty, is_spilling=False)
    if any(b.is_spilled for b in builder.buffers) and any(isinstance(layer.kernel, ScanKernel) for layer in builder.layers):
        builder = _filled(optimised, targets, pool, empty, is_spilling=True)
    builder.is_repeated = is_repeated
    return builder


def _reads_targets(roots: Sequence[Expr], targets: Sequence[Target]) -> bool:
    """Whether something is read of an array that is written: what does so at one place is computed in place, as it stands."""
    written = {target.storage.identity for target in targets if target.storage is not None and not target.is_new}
    return bool(written) and any(isinstance(n, Stored) and n.storage.identity in written for n in postorder(roots))


def _filled(optimised: Optimised, targets: Sequence[Target], pool: Pool, empty: Empty, *, is_spilling: bool) -> _Builder:
    builder = _Builder(pool, frozenset(optimised.kept), is_spilling)
    for root, target in zip(optimised.roots, targets, strict=True):
        if target.array is None and target.storage is None:
            make_result(target, _memory_order_of(root), empty)
        builder.add_target(target)
        if target.storage is not None and not target.is_new and _may_fail(root):
            builder.aside.add(builder.targets[-1])
    builder.build(optimised.roots)
    builder.spill()
    return builder


def _may_fail(root: Expr) -> bool:
    """Whether a user's function, or a source, stands between here and the values: what it raises must not leave them half written."""
    return any(isinstance(n, Foreign) or (isinstance(n, Block) and n.operation.isolated) for n in postorder([root]))


def _memory_order_of(root: Expr) -> tuple[int, ...]:
    """Return the order of axes in memory for the values of ``root``: that of what it reads."""
    order: tuple[int, ...] | None = None
    if isinstance(root, Assemble) and root.disjoint:  # as most of it lies
        root = max(zip(root.pieces, root.maps, strict=True), key=lambda piece: math.prod(piece[1].shape))[0]
    if isinstance(root, Elementwise) and len(root.shape) > 1:
        chain = postorder([root], lambda n: n.inputs if isinstance(n, Elementwise) else ())
        strides = [_strides_of(n) for n in chain if n.shape == root.shape and not isinstance(n, Elementwise)]
        if strides and all(s is not None for s in strides):
            order = memory_order([Operand(0, 0, root.shape, s, root.dtype) for s in strides if s is not None], len(root.shape))
    return tuple(range(len(root.shape))) if order is None else order


def _strides_of(node: Expr) -> tuple[int, ...] | None:
    if isinstance(node, Stored):
        return node.strides
    if isinstance(node, InMemory):
        return node.held.array.strides
    if isinstance(node, View) and isinstance(node.x, InMemory):
        return node.map.apply_strides(node.x.held.array.strides)[1]
    return None


@dataclass
class _LayerDraft:
    kernel: Kernel
    ntasks: int
    name: str
    line: str
    grid: Grid | None  # of the iteration space, where the kernel has one
    loads: tuple[Operand, ...]
    stores: tuple[Operand, ...]
    nbytes_per_task: int
    place: str = "worker"
    describe: Callable[[int], str] | None = None
    reads: dict[int, None] = field(default_factory=dict)
    writes: dict[int, None] = field(default_factory=dict)
    dependencies: list[Dependency] = field(default_factory=list)
    in_place: bool = False
    own_nbytes: int = 0  # what a task is worth without what is made within it, which may be unknown
    is_made: bool = False  # part of what it reads is made within its tasks, of loads of any shape
    beside: frozenset[int] = frozenset()  # earlier layers that write other parts of the same buffers
    places: tuple[Box, ...] = ()  # where in the grid's space each of the loads is read, where that is not everywhere
    level: int = -1
    space: Space | None = None

    @property
    def work_nbytes(self) -> int:
        """What all tasks are worth, as far as it is known."""
        return max(self.nbytes_per_task, self.own_nbytes) * self.ntasks


class _Builder:
    """Grows one plan: buffers, layers, and which layers last wrote or read each buffer."""

    def __init__(self, pool: Pool, kept: frozenset[Expr], is_spilling: bool) -> None:
        self.pool = pool
        self.is_spilling = is_spilling  # some temporaries will be in the spill file: it is not yet known which
        self.kept = kept
        self.buffers: list[Buffer] = []
        self.layers: list[_LayerDraft] = []
        self.operands: dict[Expr, Operand] = {}  # memory nodes and leaves that lie somewhere already
        self.storage_buffers: dict[int, int] = {}
        self.array_buffers: dict[int, int] = {}
        self.uses: dict[tuple[int, Layout, str], Storage] = {}
        self.keep: list[Any] = []
        self.writers: dict[int, list[int]] = {}
        self.readers: dict[int, list[int]] = {}
        self.targets: list[Operand] = []
        self.aside: set[Operand] = set()  # targets to be computed elsewhere first
        self.target_views: list[tuple[Storage, Layout]] = []
        self.outputs: set[Expr] = set()  # roots that are computed in place wherever else they are needed
        self.reshaped: set[Expr] = set()  # what a reshape reads, and so must lie in C order
        self.reasons: dict[Expr, str] = {}  # memory node -> why it is one
        self.level = -1  # of the layers that are added now, and their space where it decides what shares a pass
        self.space: Space | None = None
        self.updated: set[int] = set()  # storages that layers write while others read them
        self.division = Division(frozenset(), {})
        self.makings: dict[Operand, tuple[Making, float]] = {}  # of operands made in the task, with the cost of an element (0: unknown)
        self.isolated = False
        self.scratch = 0
        self.room: tuple[int, float] = ANY_ROOM
        self.is_repeated = False  # so often that compiling pays, however little work there is

    # --- memory ----------------------------------------------------------------------------------------------------------

    def temporary(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Operand:
        """Return a new C-ordered array in the arena, allocated and freed by the run."""
        self.buffers.append(Buffer(max(1, math.prod(shape) * dtype.itemsize)))
        return Operand(len(self.buffers) - 1, 0, shape, c_strides(shape, dtype.itemsize), dtype)

    def _bound(self, place: Storage | np.ndarray[Any, Any]) -> int:
        buffer, held = buffer_of(place, self.pool)
        self.buffers.append(buffer)
        self.keep.extend(held)
        return len(self.buffers) - 1

    def of_storage(self, storage: Storage, layout: Layout, mode: str) -> Operand:
        """Return the operand of part of a stored array, and ask for its cells."""
        buffer = self.storage_buffers.get(storage.identity)
        if buffer is None:
            buffer = self.storage_buffers[storage.identity] = self._bound(storage)
        self.uses[storage.identity, layout, mode] = storage
        return Operand(buffer, layout.offset, layout.shape, layout.strides, layout.dtype)

    def of_array(self, array: np.ndarray[Any, Any]) -> Operand:
        """Return the operand of a NumPy array of this process."""
        buffer = self.array_buffers.get(id(array))
        if buffer is None:
            buffer = self.array_buffers[id(array)] = self._bound(array)
        return Operand(buffer, 0, array.shape, array.strides, array.dtype)

    def add_target(self, target: Target) -> None:
        if target.array is not None:
            self.targets.append(self.of_array(target.array))
            return
        assert target.storage is not None and target.layout is not None
        self.target_views.append((target.storage, target.layout))
        self.targets.append(self.of_storage(target.storage, target.layout, "w"))

    def operand(self, node: Expr) -> Operand | None:
        """Return where a node lies already, or None."""
        match node:
            case Stored():
                return self.of_storage(node.storage, Layout.of(node), "r")
            case InMemory():
                self.isolated |= bool(node.held.file)
                return self.of_array(node.held.array)
            case View():
                base = self.operand(node.x)
                return None if base is None else base.view(node.map)
            case Reshape():
                base = self.operands.get(node.x)
                if base is None:
                    return None
                return Operand(base.buffer, base.offset, node.shape, c_strides(node.shape, node.dtype.itemsize), node.dtype)
            case _:
                if node in self.division.made and node not in self.operands:
                    self._make(node)
                return self.operands.get(node)

    # --- what becomes a layer --------------------------------------------------------------------------------------------

    def build(self, roots: Sequence[Expr]) -> None:
        """Add the layers that fill the targets with ``roots``."""
        conflicts = self._conflicting(roots) | self.aside
        self.reshaped = {node.x for node in postorder(roots) if isinstance(node, Reshape)}
        in_place = {target.buffer for target in self.targets if target not in conflicts}
        self.updated = {storage.identity for storage, _ in self.target_views if self.storage_buffers[storage.identity] in in_place}
        outputs: list[tuple[Expr, Operand]] = []
        finals: list[tuple[Operand, Operand, str]] = []
        for root, target in zip(roots, self.targets, strict=True):
            if math.prod(root.shape) == 0:
                continue
            if target in conflicts:
                staged = self.temporary(target.shape, root.dtype)
                outputs.append((root, staged))
                finals.append((staged, target, line_of(root)))
            else:
                outputs.append((root, target))
        wanted: dict[Expr, Operand] = {}
        extra: list[tuple[Expr, Operand]] = []
        for root, target in outputs:
            node, place = self._memory_root(root, target)
            if node in wanted:
                extra.append((node, place))
            else:
                wanted[node] = place
        self._build_groups(wanted)
        for node, place in extra:
            self._copy(wanted[node], place, line_of(node))
        for staged, target, line in finals:
            self._copy(staged, target, line)

    def _conflicting(self, roots: Sequence[Expr]) -> set[Operand]:
        """Return the targets that a root reads elsewhere than where it writes: these are computed aside first."""
        found: set[Operand] = set()
        placed = {s.identity: (s, layout) for s, layout in self.target_views}
        if not placed:
            return found
        spots = {node for node in postorder(roots) if isinstance(node, Stored) and node.storage.identity in placed}
        if not spots:
            return found
        for root, target in zip(roots, self.targets, strict=True):
            fused = set(self._program_nodes(root)) if isinstance(root, Elementwise) else set()
            for storage, layout in self.target_views:
                if self.storage_buffers[storage.identity] != target.buffer:
                    continue
                for node in spots:
                    if node.storage is not storage:
                        continue
                    here = Layout.of(node)
                    aligned = here == layout
                    if node in fused and aligned:
                        continue  # read and written at one place by one task
                    if storage.overlap(here, layout) and (node in fused or not isinstance(root, Elementwise) or len(roots) > 1):
                        found.add(target)
        return found

    def _program_nodes(self, root: Expr) -> Iterable[Expr]:
        """Yield what is computed within the task that computes ``root``, down to memory."""
        return postorder([root], lambda n: n.inputs if isinstance(n, Elementwise) and (n is root or not self._has_memory(n)) else ())

    def _has_memory(self, node: Expr) -> bool:
        return node in self.operands or node in self.kept or not isinstance(node, (Elementwise, View, Fill, Stored, InMemory))

    def _memory_root(self, root: Expr, target: Operand) -> tuple[Expr, Operand]:
        """Return the memory node to compute straight into ``target``, seen through a view or reshape where that is possible."""
        while True:
            if isinstance(root, View) and not is_leaf(root.x) and not isinstance(root.x, Foreign) and root.x not in self.reshaped:
                seen_through = _through(target, root.map, root.x)
                if seen_through is None or (isinstance(root.x, Reshape) and not _is_c_ordered(seen_through)):
                    return root, target
                root, target = root.x, seen_through
            elif isinstance(root, Reshape) and _is_c_ordered(target):
                root = root.x
                target = Operand(target.buffer, target.offset, root.shape, c_strides(root.shape, root.dtype.itemsize), root.dtype)
            else:
                return root, target

    def _build_groups(self, wanted: dict[Expr, Operand]) -> None:
        """Find the memory nodes below ``wanted``, level by level, and emit their layers."""
        memory = self._memory_nodes(wanted)
        nodes = list(postorder(wanted))
        # What reads a target as it was must be done before that is written, not while.
        late: set[Expr] = {n for n in nodes if isinstance(n, Stored) and n.storage.identity in self.updated}
        for node in nodes if late else ():
            if any(x in late for x in node.inputs):
                late.add(node)
        barred = late | self.kept | self.reshaped
        self.division = divide(list(wanted), memory, self.outputs, lambda n: n in wanted or n in barred)
        for one in self.division.passes:
            self.level = one.level
            self._emit_pass(one, wanted)
        self.level = -1

    def _memory_nodes(self, wanted: dict[Expr, Operand]) -> set[Expr]:
        memory = {
            n for n in postorder(wanted) if n in wanted or n in self.kept or not isinstance(n, (Elementwise, View, Fill, Stored, InMemory))
        }
        why = self.reasons
        why.update((n, "seen through several views; computing it again for each costs more") for n in self.kept)
        why.update((n, _nature(n)) for n in memory if n not in why)
        reshaped = {n.x for n in memory if isinstance(n, Reshape)}  # even a view: it must lie in C order
        for node in list(memory):
            if isinstance(node, Reshape):
                memory.discard(node)
                memory.add(node.x)
                why[node.x] = why.get(node.x) or "reshape needs it in C order"
            if isinstance(node, Block) and node.operation.memory_inputs:
                memory.update(_memory_base(a) for a in node.args)
                why.update((b, f"{node.name} needs it as an array") for b in map(_memory_base, node.args) if not why.get(b))
        memory = {n for n in memory if not isinstance(n, (Stored, InMemory, View)) or n in wanted or n in reshaped}
        weights = weight_below(list(postorder(wanted)))
        users: dict[Expr, set[Any]] = {}  # elementwise node -> the passes it is computed in
        for node in memory:
            if not is_leaf(node):
                for inner in inside(node, memory):
                    if isinstance(inner, Elementwise) and inner is not node:
                        users.setdefault(inner, set()).add(_pass_key(node))
        # A root that others are made of is computed along with them where they share a space, not read back.
        for root in wanted:
            if isinstance(root, Elementwise) and root not in self.kept:
                passes = users.get(root, set())
                if all(key[0] == root.shape for key in passes) and (len(passes) < 2 or weights[root] <= SHARED_WEIGHT_LIMIT):
                    memory.discard(root)
        self.outputs = {root for root in wanted if root not in memory}
        # A costly chain that several passes need is computed once; of a chain only its last shared node.
        shared = {n for n, passes in users.items() if len(passes) > 1 and weights[n] > SHARED_WEIGHT_LIMIT and n not in memory}
        covered = {x for n in shared for x in n.inputs if x in shared and users[n] >= users[x]}
        memory.update(shared - covered)
        why.update((n, f"read by {len(users[n])} passes; computing it again in each costs more") for n in shared - covered)
        return memory

    def _emit_pass(self, one: Pass, wanted: dict[Expr, Operand]) -> None:
        placed = [(node, wanted.get(node)) for node in one.nodes if isinstance(node, Reduction)]
        maps = [(node, wanted.get(node) or self.temporary(node.shape, node.dtype)) for node in one.nodes if not isinstance(node, Reduction)]
        if placed:
            self.space = one.shape, placed[0][0].axes
            self._emit_reduction(placed, maps, one.shape, placed[0][0].axes)
            self.space = None
            return
        node, place = maps[0]
        match node:
            case Scan():
                self._emit_scan(node, place)
            case Accumulate():
                self._emit_accumulation(node, place)
            case Block() | Foreign():
                self._emit_source(node, place)
            case Assemble():
                if not self._emit_parts(maps):
                    for each, out in maps:
                        self._emit_assembly(each, out)
            case _:
                self.space = one.shape, None
                self._emit_map(maps)
                self.space = None

    # --- layers ----------------------------------------------------------------------------------------------------------

    def _emit_map(self, members: list[tuple[Expr, Operand]]) -> None:
        """One layer that computes elementwise nodes (or copies) of one shape."""
        shape = members[0][0].shape
        writer = ProgramWriter(self.operand, shape)
        for node, place in members:
            writer.store(writer.add(node, force=True), place)
        program = writer.program()
        order = memory_order(program.operands, len(shape))
        if order is not None and order != tuple(range(len(shape))):
            program = program.permuted(order)
        edges = self._edges(program)
        grid = map_grid(program.shape, crossing_axes(program.operands) if order is None else None) if edges is None else Grid.of(edges)
        names = self._layer_name([n for n, _ in members], "copy")
        self._add(
            _LayerDraft(
                MapKernel(program, grid),
                grid.ntasks,
                names,
                line_of(members[-1][0]),
                grid,
                program.loads,
                program.stores,
                writer.cost(grid),
            ),
            program,
        )
        for node, place in members:
            self.operands.setdefault(node, place)

    def _copy(self, source: Operand, target: Operand, line: str) -> None:
        padded = [broadcast_operand(o, target.shape) for o in (source, target)]
        registers = (Register(source.dtype, tuple(n != 1 for n in padded[0].shape)),)
        program = Program(target.shape, tuple(padded), registers, (Load(0, 0), Store(0, 1)))
        grid = map_grid(target.shape)
        nbytes = 2 * math.prod(grid.sizes) * source.dtype.itemsize
        self._add(_LayerDraft(MapKernel(program, grid), grid.ntasks, "copy", line, grid, (padded[0],), (padded[1],), nbytes))

    def _emit_reduction(
        self,
        members: list[tuple[Reduction, Operand | None]],
        along: list[tuple[Expr, Operand]],
        shape: tuple[int, ...],
        axes: tuple[int, ...],
    ) -> None:
        """One pass for all reductions (and stored results) over one space; a layer each to fold partials, where there are any."""
        writer = ProgramWriter(self.operand, shape)
        for root, part in along:
            writer.store(writer.add(root, force=True), part)
        inputs = [writer.add(node.x) for node, _ in members]
        writer.weight += sum(4 if node.kind.endswith(("var", "std")) else 1 for node, _ in members)
        program = writer.program()
        order = memory_order(program.operands, len(shape))
        if order is None or any(node.kind in ("argmin", "argmax") for node, _ in members):  # indices count in C order
            order = tuple(range(len(shape)))
        program = program.permuted(order)
        axes = tuple(k for k, a in enumerate(order) if a in axes)
        edges = self._edges(program)
        grid = reduction_grid(program.shape, axes) if edges is None else walked_grid(edges, axes)
        if program.made and edges is None:
            grid = in_small_tiles(grid, axes)
        splits = _split_counts(grid, axes)
        specs: list[ReduceSpec] = []
        outs: list[tuple[Reduction, Operand]] = []
        for (node, place), register in zip(members, inputs, strict=True):
            whole = place or self.temporary(node.shape, node.dtype)
            self.operands.setdefault(node, whole)
            out = whole.permuted(order)
            outs.append((node, out))
            dtypes = REDUCTIONS[node.kind].states(node.x.dtype, node.dtype)
            partials: tuple[Operand, ...] = ()
            if len(splits) > 1:
                partials = tuple(self.temporary((len(splits), *out.shape), dtype) for dtype in dtypes)
            params = dict(node.params)
            label, errstate = params.pop("label", node.kind), params.pop("errstate", ())
            specs.append(
                ReduceSpec(
                    node.kind,
                    register,
                    node.dtype,
                    tuple(params.items()),
                    dtypes,
                    partials,
                    None if partials else out,
                    label,
                    line_of(node),
                    errstate,
                )
            )
        kernel = ReduceKernel(program, grid, axes, tuple(specs))
        stores = [*program.stores, *(o for spec in specs for o in ((spec.out,) if spec.out is not None else spec.partials))]
        chain = self._layer_name([n for n, _ in along] + [m.x for m, _ in members], "")
        name = "-".join(filter(None, [chain, *dict.fromkeys(node.name for node, _ in members)]))
        self._add(
            _LayerDraft(
                kernel,
                grid.ntasks,
                name,
                specs[-1].line,
                grid,
                program.loads,
                tuple(stores),
                writer.cost(grid) + 8 * len(specs),
            ),
            program,
            _tree_nbytes(grid, axes, specs) if program.made else 0,
        )
        for (node, out), spec in zip(outs, specs, strict=True):
            if spec.partials:
                self._fold(spec, out, splits, node.name)
        for root, part in along:
            self.operands.setdefault(root, part)

    def _fold(self, spec: ReduceSpec, out: Operand, splits: tuple[int, ...], name: str) -> None:
        """One layer that folds the partial results of all splits."""
        fold = Grid(out.shape, slab_sizes(out.shape, max(1, TILE_ITEMS // len(splits))))
        self._add(
            _LayerDraft(
                FinishKernel(spec, out, splits, fold),
                fold.ntasks,
                f"{name} of partials",
                spec.line,
                None,
                spec.partials,
                (out,),
                16 * len(splits) * math.prod(fold.sizes),
                # Waking a worker takes longer.
                place="driver" if len(splits) * math.prod(out.shape) <= FEW_PARTIAL_ITEMS else "worker",
            )
        )

    def _emit_accumulation(self, node: Accumulate, out: Operand) -> None:
        """One pass over the items, into partial results of each split, where there are several, which a second layer folds."""
        shape = node.data[0].shape
        writer = ProgramWriter(self.operand, shape)
        registers = [writer.add(x) for x in node.data]
        writer.weight += 12 * len(node.tables) + 6
        program = writer.program()
        order = memory_order(program.operands, len(shape)) if node.dtype.kind in "iu" else None
        if order is not None:  # else it decides in which order floats are added, which must not depend on memory
            program = program.permuted(order)
        tables = tuple([self._table(table) for table in node.tables])
        grid = accumulation_grid(program.shape, node.size)
        splits = grid.ntasks
        partials = self.temporary((splits, *node.shape), node.dtype) if splits > 1 else None
        values = registers.pop() if node.has_values else None
        place = out if partials is None else partials
        line = line_of(node)
        kernel = AccumulateKernel(
            program, grid, node.shape, node.ufunc, tuple(registers), values, tables, place, node.is_at, node.label, line
        )
        self._needs_scratch(node.size * node.dtype.itemsize, splits)
        name = "-".join(filter(None, [self._layer_name(list(node.data), ""), node.name]))
        self._add(_LayerDraft(kernel, splits, name, line, grid, (*program.loads, *tables), (place,), writer.cost(grid)))
        if partials is not None:
            spec = ReduceSpec(node.ufunc, 0, node.dtype, (), (node.dtype,), (partials,), None, node.label, line)
            self._fold(spec, out, (1,) * splits, node.name)
        self.operands.setdefault(node, out)

    def _table(self, node: Expr) -> Operand:
        """Return where an array lies that all tasks of a layer read as a whole."""
        place = self.operand(node)
        assert place is not None, f"{node.name} has no memory"
        return place

    def _emit_scan(self, node: Scan, out: Operand) -> None:
        shape, axis = node.x.shape, node.axis
        n = shape[axis]
        lanes = max(1, math.prod(shape) // max(1, n))
        writer = ProgramWriter(self.operand, shape)
        register = writer.add(node.x)
        program = writer.program()
        kept = tuple(1 if a == axis else m for a, m in enumerate(shape))
        segment = n
        if math.prod(shape) > REDUCTION_TILE_ITEMS and lanes < ENOUGH_TASKS * 8:
            segment = max(1, min(n, REDUCTION_TILE_ITEMS // lanes))
            width = lanes
        else:
            width = max(1, min(lanes, max(64, lanes // ENOUGH_TASKS)))
        sizes = tuple(segment if a == axis else s for a, s in enumerate(slab_sizes(kept, width)))
        grid = Grid(shape, sizes)
        carry = None
        in_file = self.is_spilling or any(self._is_spilled(o.buffer) for o in (*program.loads, out))
        in_slabs = in_file and segment == n and axis != len(shape) - 1
        if in_slabs:
            # Wider tiles, worked through in the same blocks: long runs of the file, and the same bits.
            rows = grid.block_sizes[axis]
            allowed = self.pool.budget.limit_nbytes // (4 * RESERVED_SHARE * max(1, self.pool.workers)) // node.dtype.itemsize
            wide = slab_sizes(kept, max(math.prod(grid.block_sizes), min(SLAB_ITEMS, allowed)) // rows)
            grid = Grid(shape, tuple(n if a == axis else w for a, w in enumerate(wide)), grid.block_sizes)
        if segment < n:
            splits = _split_counts(grid, (axis,))
            row = {"cumsum": "add"}.get(node.ufunc, node.ufunc)
            shape_of = (len(splits), *kept)
            partials = self.temporary(shape_of, node.dtype)
            carry = self.temporary(shape_of, node.dtype)
            spec = ReduceSpec(row, register, node.dtype, (), (node.dtype,), (partials,), None, "accumulate", line_of(node), node.errstate)
            self._add(
                _LayerDraft(
                    ReduceKernel(program, grid, (axis,), (spec,)),
                    grid.ntasks,
                    f"{node.name} of segments",
                    line_of(node),
                    grid,
                    program.loads,
                    (partials,),
                    writer.cost(grid),
                )
            )
            lanes_grid = Grid(kept, slab_sizes(kept, TILE_ITEMS))
            self._add(
                _LayerDraft(
                    CarryKernel(node.ufunc, partials, carry, lanes_grid, line_of(node), node.errstate),
                    lanes_grid.ntasks,
                    f"{node.name} of carries",
                    line_of(node),
                    None,
                    (partials,),
                    (carry,),
                    16 * len(splits) * math.prod(lanes_grid.sizes),
                )
            )
        kernel = ScanKernel(program, grid, axis, node.ufunc, register, out, carry, line_of(node), node.errstate, in_slabs)
        loads = program.loads if carry is None else (*program.loads, carry)
        self._add(_LayerDraft(kernel, grid.ntasks, node.name, line_of(node), grid, loads, (out,), writer.cost(grid) * 2))
        self.operands.setdefault(node, out)

    def _emit_source(self, node: Block | Foreign, out: Operand) -> None:
        """Written straight into memory, box by box of its own grid."""
        source, making, cost = self._block_source(node) if isinstance(node, Block) else self._foreign_source(node)
        assert making.edges is not None
        grid = Grid.of(making.edges)
        self.isolated |= making.is_isolated
        if isinstance(source, BlockSource):
            self._needs_scratch(source.scratch(grid.sizes), grid.ntasks)
        self._add(
            _LayerDraft(
                BlockKernel(source, out, grid),
                grid.ntasks,
                _name_of(node),
                line_of(node),
                None,
                source.loads,
                (out,),
                cost,
                place="driver" if making.is_foreign else "worker",
                describe=lambda index: source.label(grid.box(index)),
            )
        )
        self.operands.setdefault(node, out)

    def _emit_assembly(self, node: Expr, out: Operand) -> None:
        """The pieces write straight into their part."""
        assert isinstance(node, Assemble)
        first = len(self.layers)
        for piece, map in zip(node.pieces, node.maps, strict=True):
            if math.prod(map.shape) == 0:
                continue
            part = out.view(map)
            writer = ProgramWriter(self.operand, map.shape)
            register = writer.add(piece)  # one that has memory of its own is read from there
            writer.store(register, part)
            program = writer.program()
            edges = self._edges(program)
            grid = map_grid(map.shape) if edges is None else Grid.of(edges)
            self._add(
                _LayerDraft(
                    MapKernel(program, grid),
                    grid.ntasks,
                    "-".join(filter(None, [self._layer_name([piece], "") if program.made else "", node.name])),
                    line_of(node),
                    grid,
                    program.loads,
                    (part,),
                    writer.cost(grid),
                    beside=frozenset(range(first, len(self.layers))) if node.disjoint else frozenset(),
                ),
                program,
            )
        self.operands.setdefault(node, out)

    def _emit_parts(self, members: list[tuple[Expr, Operand]]) -> bool:
        """One layer for assemblies of pieces in the same places, side by side; False where there are many, or something made in the
        task gives one its tiles."""
        nodes = [node for node, _ in members if isinstance(node, Assemble)]
        shape, maps = nodes[0].shape, nodes[0].maps
        straight = tuple((a, 1) for a in range(len(shape)))
        # The largest first: narrow parts touch a line of cache for each item, which is there when their neighbours have been computed.
        filled = sorted((k for k, map in enumerate(maps) if math.prod(map.shape)), key=lambda k: -math.prod(maps[k].shape))
        if not nodes[0].disjoint or not 0 < len(filled) <= MOST_BOXES or any(maps[k].axes != straight for k in filled):
            return False
        largest = max(filled, key=lambda k: math.prod(maps[k].shape))
        writers = {k: ProgramWriter(self.operand, maps[k].shape) for k in filled}
        for k, writer in writers.items():
            for node, (_, out) in zip(nodes, members, strict=True):
                writer.store(writer.add(node.pieces[k]), out.view(maps[k]))
            if any(operand.source is not None for operand in writer.operands):
                return False
        programs = {k: writer.program() for k, writer in writers.items()}
        order = memory_order(programs[largest].operands, len(shape))
        axes = order or tuple(range(len(shape)))
        across = crossing_axes(programs[largest].operands) if order is None else None
        grid = map_grid(tuple(shape[a] for a in axes), across, MOST_PARTS_TILES)
        places = [tuple(slice(maps[k].offsets[a], maps[k].offsets[a] + maps[k].shape[a]) for a in axes) for k in filled]
        parts = tuple(MapKernel(programs[k].permuted(axes), part_grid(grid, place)) for k, place in zip(filled, places, strict=True))
        outs = tuple(out.permuted(axes) for _, out in members)
        loads = [(load, place) for part, place in zip(parts, places, strict=True) for load in part.program.loads]
        labels = dict.fromkeys(node.name for node in nodes)
        self._add(
            _LayerDraft(
                PartsKernel(parts, tuple(places), grid, outs),
                grid.ntasks,
                "-".join(filter(None, [*labels, self._layer_name([node.pieces[largest] for node in nodes], "")])),
                line_of(nodes[-1]),
                grid,
                tuple(load for load, _ in loads),
                outs,
                writers[largest].cost(grid),
                places=tuple(place for _, place in loads),
            )
        )
        self.operands.update((node, out) for node, out in members if node not in self.operands)
        return True

    # --- made within the task --------------------------------------------------------------------------------------------

    def _make(self, node: Expr) -> None:
        """Note how a node is made within the tasks that read it, in place of memory."""
        source: Source
        match node:
            case Block():
                source, making, cost = self._block_source(node)
                items = math.prod(axis[1] for axis in making.edges or ())
                rate = cost / items
            case Foreign():
                source, making, _ = self._foreign_source(node)
                rate = node.dtype.itemsize
            case _:
                assert isinstance(node, Assemble)
                source, making, rate = self._pieces_source(node)
        operand = Operand(NO_BUFFER, 0, node.shape, c_strides(node.shape, node.dtype.itemsize), node.dtype, source)
        self.operands[node] = operand
        self.makings[operand] = making, rate

    def _block_source(self, node: Block) -> tuple[BlockSource, Making, int]:
        """Return the source of a block operation, and what its first box costs (0: unknown)."""
        operation = node.operation
        making = self.division.made.get(node) or Making(edges_of(operation.grid()), operation.isolated)
        assert making.edges is not None
        programs: list[Program] = []
        results: list[int | None] = []
        is_known = True
        for arg in node.args:
            where = self.operand(arg)
            if where is not None and where.source is None:
                registers = (Register(arg.dtype, (True,) * len(arg.shape)),)
                programs.append(Program(arg.shape, (where,), registers, (Load(0, 0),)))
                results.append(None)
            else:
                writer = ProgramWriter(self.operand, arg.shape)
                results.append(writer.add(arg))
                programs.append(writer.program())
                is_known &= all(self.makings[o][1] for o in programs[-1].made)
        source = BlockSource(operation, tuple(programs), tuple(results), making.edges, line_of(node))
        first = tuple(slice(axis[0], axis[1]) for axis in making.edges)
        return source, making, operation.cost(first) if is_known else 0

    def _foreign_source(self, node: Foreign) -> tuple[ForeignSource, Making, int]:
        making = self.division.made.get(node) or Making(source_edges(node), is_foreign=True)
        assert making.edges is not None
        source = ForeignSource(node.source, node.origin, node.dtype, making.edges, line_of(node))
        return source, making, max(1, math.prod(Grid.of(making.edges).sizes) * node.dtype.itemsize)

    def _pieces_source(self, node: Assemble) -> tuple[PiecesSource, Making, float]:
        pieces: list[Piece] = []
        rates = [float(node.dtype.itemsize)]
        for piece, map in zip(node.pieces, node.maps, strict=True):
            if math.prod(map.shape):
                writer = ProgramWriter(self.operand, map.shape)
                register = writer.add(piece)
                program = writer.program()
                pieces.append(Piece(program, register, map))
                rates.extend(0.0 if not self.makings[o][1] else writer.rate + self.makings[o][1] for o in program.made)
                rates.append(float(writer.rate) or 1.0)
        making = self.division.made[node]
        return PiecesSource(tuple(pieces), node.ndim, making.edges), making, max(rates) if all(rates) else 0.0

    def _edges(self, program: Program) -> Edges | None:
        """Return the edges of the tiles of a program, where something made within its tasks gives them."""
        return next((edges for o in program.made if (edges := self.makings[o][0].edges) is not None), None)

    def _needs_scratch(self, nbytes: int, ntasks: int) -> None:
        """Count what a task needs, for each worker: where there are fewer tasks, its share of what all of them need."""
        workers = max(1, self.pool.workers)
        self.scratch = max(self.scratch, -(-nbytes * min(ntasks, workers) // workers))

    def _layer_name(self, nodes: list[Expr], otherwise: str) -> str:
        """Return a short name: the operations of the chains, outermost last."""
        lying = self.operands  # only read here
        chains = postorder(nodes, lambda n: n.inputs if isinstance(n, Elementwise) and n not in lying else ())
        names = [_name_of(n) for n in chains if (isinstance(n, Elementwise) and n not in lying) or n in self.division.made]
        if not names:
            return otherwise or ""
        return "-".join(names) if len(names) <= 4 else f"{names[0]}-..{len(names) - 2} more..-{names[-1]}"

    # --- dependencies ----------------------------------------------------------------------------------------------------

    def _add(self, draft: _LayerDraft, program: Program | None = None, scratch: int = 0) -> None:
        """Add a layer; ``program``: what its tasks compute, part of which they may make (with ``scratch`` beside what that takes)."""
        position = len(self.layers)
        if program is not None and program.made:
            self._note_making(draft, program, scratch)
        draft.reads = {o.buffer: None for o in draft.loads}
        draft.writes = {o.buffer: None for o in draft.stores}
        draft.level, draft.space = self.level, self.space if draft.grid is not None else None
        after: dict[int, Callable[[int, int], tuple[int, int]] | None] = {}
        for buffer in draft.reads:
            for writer in self.writers.get(buffer, ()):
                requires = self._requires(draft, writer, buffer)
                if writer in after and (after[writer] is None or requires is None or after[writer] is not requires):
                    requires = None
                after[writer] = requires
        for buffer in draft.writes:
            for other in (*self.readers.get(buffer, ()), *self.writers.get(buffer, ())):
                if other not in draft.beside:
                    after[other] = None
        # What overlaps its target elsewhere was computed aside (`_conflicting`): only a task that reads where it writes is left.
        draft.in_place = bool(set(draft.loads) & set(draft.stores))
        draft.dependencies = [Dependency(layer, requires) for layer, requires in sorted(after.items(), key=lambda kv: kv[0])]
        self.layers.append(draft)
        for buffer in draft.reads:
            self.readers.setdefault(buffer, []).append(position)
        for buffer in draft.writes:
            self.writers.setdefault(buffer, []).append(position)

    def _note_making(self, draft: _LayerDraft, program: Program, scratch: int) -> None:
        """Say of a layer what follows from what is made within its tasks."""
        grid, makings = draft.grid, [self.makings[o] for o in program.made]
        assert grid is not None
        draft.is_made = True
        draft.own_nbytes = draft.nbytes_per_task
        draft.place = "driver" if any(making.is_foreign for making, _ in makings) else "worker"
        is_known = all(rate for _, rate in makings)
        draft.nbytes_per_task = draft.nbytes_per_task + int(grid.items_per_task * sum(r for _, r in makings)) if is_known else 0
        draft.describe = next((_chunk_description(o.source, grid) for o in program.made if isinstance(o.source, BlockSource)), None)
        self.isolated |= any(making.is_isolated for making, _ in makings)
        self._needs_scratch(program.scratch(grid.sizes) + scratch, grid.ntasks if draft.place == "worker" else 1)

    def _requires(self, draft: _LayerDraft, writer: int, buffer: int) -> Callable[[int, int], tuple[int, int]] | None:
        """Return which tasks of ``writer`` tasks of ``draft`` need, where both go through the bytes in one direction."""
        made = self.layers[writer]
        if len(self.writers.get(buffer, ())) != 1 or draft.grid is None or made.grid is None or draft.is_made:
            return None
        if draft.grid.ntasks == 1 or made.grid.ntasks == 1:
            return None
        axis, made_axis = draft.grid.slab_axis(), made.grid.slab_axis()
        stored = [o for o in made.stores if o.buffer == buffer]
        if axis is None or made_axis is None or len(stored) != 1:
            return None
        target = stored[0]
        if target.shape != made.grid.shape or target.strides != c_strides(target.shape, target.dtype.itemsize):
            return None
        itemsize = target.dtype.itemsize
        per_task = math.prod(made.grid.sizes)
        everywhere = full_box(draft.grid.shape)
        places = draft.places or (everywhere,) * len(draft.loads)
        loads = [(o, place) for o, place in zip(draft.loads, places, strict=True) if o.buffer == buffer]
        grid, ntasks = draft.grid, made.ntasks

        def requires(start: int, stop: int) -> tuple[int, int]:
            low_box, high_box = grid.box(start), grid.box(stop - 1)
            low, high = None, None
            for operand, place in loads:
                first = last = operand.offset
                for n, stride, a, b, here in zip(operand.shape, operand.strides, low_box, high_box, place, strict=True):
                    from_, to = max(a.start, here.start) - here.start, min(b.stop, here.stop) - here.start
                    if from_ >= to:
                        break  # none of these tasks has something of where it is read
                    ends = (0,) if n == 1 else (from_ * stride, (to - 1) * stride)
                    first += min(ends)
                    last += max(ends)
                else:
                    low = first if low is None else min(low, first)
                    high = last if high is None else max(high, last)
            if low is None or high is None:
                return 0, 0
            base = target.offset
            return (low - base) // itemsize // per_task, min(ntasks, (high - base) // itemsize // per_task + 1)

        return requires

    def _is_remote(self, buffer: int) -> bool:
        """Whether a buffer lies in the driver's own memory or in the spill file, where workers copy from."""
        address = self.buffers[buffer].address
        return self.buffers[buffer].is_spilled if address is None else address.segment != ARENA

    def _scratch_nbytes(self) -> int:
        """Return what one worker needs beside the buffers."""
        workers = max(1, self.pool.workers)
        blocks = min(BLOCKS_NBYTES, self.pool.budget.limit_nbytes // (RESERVED_SHARE * workers))
        copies = max((_copies_nbytes(draft, self._is_spilled) for draft in self.layers), default=0)
        return self.scratch + blocks + copies

    def _is_spilled(self, buffer: int) -> bool:
        address = self.buffers[buffer].address
        return self.buffers[buffer].is_spilled if address is None else address.segment == SPILL

    def spill(self) -> None:
        """Send temporaries to the spill file, the largest first of those that live where the peak is, until the rest has room.

        Which ones depends on the plan and on what is free for it, nothing else.
        """
        if not any(buffer.address is None for buffer in self.buffers):
            return
        free, workers = self.pool.free_nbytes(), max(1, self.pool.workers)
        layers = tuple(Layer(name="", kernel=d.kernel, ntasks=d.ntasks, reads=tuple(d.reads), writes=tuple(d.writes)) for d in self.layers)
        below: float = math.inf
        while True:
            sketch = Plan(buffers=tuple(self.buffers), layers=layers)
            peak, where = sketch.peak_nbytes()
            needed = peak + self._scratch_nbytes() * workers
            self.room = needed, below
            if needed <= free or not peak or not self.pool.can_spill():
                return  # one that does not fit even so is refused when it is to run
            last, first = sketch.last_readers(), sketch.first_writers()
            live = [b for b in last if first[b] <= where <= last[b] and not self.buffers[b].is_spilled]
            largest = max(live, key=lambda b: (self.buffers[b].nbytes, -b))
            self.buffers[largest] = replace(self.buffers[largest], is_spilled=True)
            below = min(below, needed)

    def plan(self) -> Plan:
        """Return the finished plan."""
        layers = []
        for draft in self.layers:
            describe = draft.describe or _tile_description(draft)
            layers.append(
                Layer(
                    name=draft.name,
                    kernel=engine_for(draft.kernel, math.inf if self.is_repeated else draft.work_nbytes, self._is_remote),
                    ntasks=draft.ntasks,
                    reads=tuple(draft.reads),
                    writes=tuple(draft.writes),
                    dependencies=tuple(draft.dependencies),
                    nbytes_per_task=draft.nbytes_per_task,
                    place=draft.place,
                    in_place=draft.in_place,
                    describe=describe,
                    line=draft.line,
                )
            )
        locks = lock_requests((storage, layout, mode) for (_, layout, mode), storage in self.uses.items())
        return Plan(
            buffers=tuple(self.buffers),
            layers=tuple(layers),
            scratch_nbytes=self._scratch_nbytes(),
            isolated=self.isolated,
            locks=locks,
            keep=tuple(self.keep),
        )

    def outline(self) -> Outline:
        """Return the finished plan with what there is to tell about it."""
        layers = tuple(
            LayerOutline(
                draft.kernel,
                why_not_compiled(draft.kernel, draft.work_nbytes, self._is_remote),
                draft.loads,
                draft.stores,
                draft.level,
                draft.space,
            )
            for draft in self.layers
        )
        owners = {
            operand.buffer: (node.name, self.reasons.get(node, ""))
            for node, operand in self.operands.items()
            if self.buffers[operand.buffer].address is None
        }
        return Outline(self.plan(), layers, tuple(target.buffer for target in self.targets), owners)


Uses = dict[int, tuple[Spans, ...] | None]


def _touched(draft: _LayerDraft, grid: Grid | None) -> tuple[Uses, Uses]:
    """Return which bytes of its buffers each task of a layer, in boxes of ``grid``, reads, and which it writes; None where unknown."""
    kernel = draft.kernel
    if isinstance(kernel, BlockKernel):
        return _read_by(kernel.source, kernel.grid), _spans((kernel.out,), kernel.grid)
    made = {o.buffer for operand in kernel.program.made for o in operand.source.loads} if draft.is_made else set()  # type: ignore[attr-defined]
    reads = _spans([o for o in draft.loads if o.buffer not in made], grid, draft.places)
    return {**reads, **dict.fromkeys(made)}, _spans(draft.stores, grid)


def _read_by(source: Any, grid: Grid) -> Uses:
    """Return which bytes a source reads to make each box of a grid."""
    unknown: Uses = dict.fromkeys(o.buffer for o in source.loads)
    if not isinstance(source, BlockSource) or any(program.made or len(program.operands) > 1 for program in source.inputs):
        return unknown
    starts, stops = [], []  # [box, input, axis]; of several rounds, from the first to the last
    for k in range(grid.ntasks):
        rounds = list(source.operation.rounds(grid.box(k)))
        starts.append([[min(s.start for s in axis) for axis in zip(*boxes, strict=True)] for boxes in zip(*rounds, strict=True)])
        stops.append([[max(s.stop for s in axis) for axis in zip(*boxes, strict=True)] for boxes in zip(*rounds, strict=True)])
    by_buffer: dict[int, list[_Read]] = {}
    for n, program in enumerate(source.inputs):
        if not program.operands:
            continue  # made of positions alone
        first, last = (np.array([box[n] for box in ends], np.int64).reshape(grid.ntasks, -1) for ends in (starts, stops))
        by_buffer.setdefault(program.operands[0].buffer, []).append((program.operands[0], full_box(program.shape), first, last))
    return {buffer: _spans_of(some) for buffer, some in by_buffer.items()}


def _spans(operands: Sequence[Operand], grid: Grid | None, places: Sequence[Box] = ()) -> Uses:
    """Return, per buffer, which bytes each task of a layer touches through ``operands``.

    ``places``: where in the grid's shape operands belong that are read in a part of it.
    """
    if grid is None:
        return dict.fromkeys(o.buffer for o in operands)
    starts, stops = _bounds(grid)
    by_buffer: dict[int, list[_Read]] = {}
    for operand, place in zip(operands, places or itertools.repeat(full_box(grid.shape))):
        by_buffer.setdefault(operand.buffer, []).append((operand, place, starts, stops))
    return {buffer: _spans_of(some) for buffer, some in by_buffer.items()}


def _bounds(grid: Grid) -> tuple[NDArray, NDArray]:
    """Return where the boxes of a grid begin and end, [box, axis]."""
    if grid.edges is None:
        numbers = np.stack(np.unravel_index(np.arange(grid.ntasks), grid.counts), -1) if grid.counts else np.zeros((1, 0), np.int64)
        starts = numbers * np.array(grid.sizes, np.int64)
        return starts, np.minimum(starts + np.array(grid.sizes, np.int64), grid.shape)
    boxes = [grid.box(k) for k in range(grid.ntasks)]
    starts = np.array([[s.start for s in box] for box in boxes], np.int64).reshape(len(boxes), -1)
    return starts, np.array([[s.stop for s in box] for box in boxes], np.int64).reshape(len(boxes), -1)


_Read = tuple[Operand, Box, NDArray, NDArray]  # where in a space an operand belongs, and where tasks' boxes begin and end there


def _spans_of(operands: Sequence[_Read]) -> tuple[Spans, ...] | None:
    """Return which bytes of a buffer tasks touch through operands: with what lies far from the rest of a task's apart."""
    lows, highs = [], []
    for o, place, starts, stops in operands:
        if len(o.shape) != len(place) or any(m not in (1, p.stop - p.start) for m, p in zip(o.shape, place, strict=True)):
            return None
        begin = np.array([p.start for p in place], np.int64)
        first = np.maximum(starts - begin, 0)
        last = np.minimum(stops, [p.stop for p in place]) - 1 - begin
        strides = np.array([0 if n == 1 else stride for n, stride in zip(o.shape, o.strides, strict=True)], np.int64)
        touched = (first <= last).all(axis=1)
        low = o.offset + np.minimum(first * strides, last * strides).sum(axis=1)
        high = o.offset + np.maximum(first * strides, last * strides).sum(axis=1) + o.dtype.itemsize
        lows.append(np.where(touched, low, FAR))
        highs.append(np.where(touched, high, -1))
    order = np.argsort(lows, axis=0, kind="stable")
    low, high = np.take_along_axis(np.array(lows), order, 0), np.take_along_axis(np.array(highs), order, 0)
    reached = np.maximum.accumulate(high, axis=0)
    gaps = np.where(low[1:] < FAR, low[1:] - reached[:-1], 0)
    task = np.arange(low.shape[1])
    cut = gaps.argmax(axis=0) + 1 if len(gaps) else np.ones(low.shape[1], np.int64)  # the first operand behind the widest gap
    is_cut = gaps[cut - 1, task] > 0 if len(gaps) else np.zeros(low.shape[1], bool)
    if not is_cut.any():
        return (Spans(low[0].tolist(), reached[-1].tolist()),)
    pieces = (
        (low[0], np.where(is_cut, reached[cut - 1, task], reached[-1])),
        (np.where(is_cut, low[np.minimum(cut, len(low) - 1), task], FAR), np.where(is_cut, reached[-1], -1)),
    )
    # Near is what a task would touch if all tasks went through the bytes evenly: so tasks touch in order what is near, what is below
    # that, and what is above it.
    middle = low[0].min() + (task + 0.5) / len(task) * (reached[-1].max() - low[0].min())
    (first, first_end), (second, second_end) = pieces
    is_below = is_cut & (abs(first + first_end - 2 * middle) > abs(second + second_end - 2 * middle))
    near = Spans(np.where(is_below, second, first).tolist(), np.where(is_below, second_end, first_end).tolist())
    far = [
        Spans(np.where(has, low_, FAR).tolist(), np.where(has, high_, -1).tolist())
        for has, low_, high_ in ((is_below, first, first_end), (is_cut & ~is_below, second, second_end))
        if has.any()
    ]
    return near, *far


def _copies_nbytes(draft: _LayerDraft, is_spilled: Callable[[int], bool]) -> int:
    """Return what a task needs for copies of what lies in the spill file, as far as that is more than `BLOCKS_NBYTES` has room for."""
    kernel = draft.kernel
    if isinstance(kernel, BlockKernel):  # whole boxes: of the result, of what lies somewhere and is given as it is
        box = kernel.grid.box(0)
        nbytes = _items(box) * kernel.out.dtype.itemsize if is_spilled(kernel.out.buffer) else 0
        return nbytes + (_inputs_nbytes(kernel.source, box, is_spilled) if isinstance(kernel.source, BlockSource) else 0)
    if draft.grid is None:
        return 0
    most = MOST_STAGED_ITEMS * (2 if isinstance(kernel, (ReduceKernel, ScanKernel)) else 1)  # compiled ones take larger pieces
    items = min(math.prod(draft.grid.sizes), most)
    operands = (*draft.loads, *draft.stores)
    if isinstance(kernel, PartsKernel):  # of one part at a time
        operands = (*kernel.program.loads, *kernel.program.stores)
    staged = sum(items * o.dtype.itemsize for o in dict.fromkeys(operands) if is_spilled(o.buffer))
    made = 0
    for operand in kernel.program.made if isinstance(kernel, (MapKernel, ReduceKernel)) else ():
        if isinstance(operand.source, BlockSource):
            made += _inputs_nbytes(operand.source, draft.grid.box(0), is_spilled)
    return max(0, staged - BLOCKS_NBYTES) + made


def _inputs_nbytes(source: BlockSource, box: Box, is_spilled: Callable[[int], bool]) -> int:
    boxes = next(source.operation.rounds(box))
    return sum(
        _items(needed) * program.operands[0].dtype.itemsize
        for program, result, needed in zip(source.inputs, source.results, boxes, strict=True)
        if result is None and is_spilled(program.operands[0].buffer)
    )


def _items(box: Box) -> int:
    return math.prod(piece.stop - piece.start for piece in box)


def _through(target: Operand, map: IndexMap, x: Expr) -> Operand | None:
    """Return where all of ``x`` goes so that its view ``map`` fills ``target``; None when the view is not one to one."""
    strides = [0] * len(x.shape)
    offset = target.offset
    seen: set[int] = set()
    for k, (axis, step) in enumerate(map.axes):
        n = map.shape[k]
        if axis < 0:
            if n != 1:
                return None
            continue
        if n != x.shape[axis] or (n > 1 and step not in (1, -1)):
            return None
        seen.add(axis)
        strides[axis] = target.strides[k] * (step if n > 1 else 1)
        if n > 1 and step == -1:
            offset += target.strides[k] * (n - 1)
    if any(n != 1 for axis, n in enumerate(x.shape) if axis not in seen):
        return None
    return Operand(target.buffer, offset, x.shape, tuple(strides), target.dtype)


def _is_c_ordered(operand: Operand) -> bool:
    return operand.strides == c_strides(operand.shape, operand.dtype.itemsize)


def _nature(node: Expr) -> str:
    """Return why a node has memory wherever it stands; empty for one that has it only where something else asks for it."""
    match node:
        case Reduction():
            return "a reduction"
        case Scan():
            return "a running result"
        case Accumulate():
            return "items added to cells"
        case Block() if node.operation.isolated:
            return "a user's function"
        case Block():
            return "an operation on whole blocks"
        case Assemble():
            return "written piece by piece"
        case Foreign():
            return "a source that only this process reads"
        case _:
            return ""


def _memory_base(node: Expr) -> Expr:
    """Return the node that must get memory so that ``node`` can be read as an array."""
    while isinstance(node, Reshape) or (isinstance(node, View) and not is_leaf(node.x)):
        node = node.x
    return node


def _pass_key(node: Expr) -> tuple[Any, ...]:
    """Return what memory nodes have in common that share a pass: the space first."""
    if isinstance(node, Reduction):
        return (node.x.shape, node.axes)
    if isinstance(node, Assemble) and node.disjoint:
        return ((node.shape, node.maps),)
    return (node.shape,) if isinstance(node, Elementwise) else (node, None)


def _split_counts(grid: Grid, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many items of the reduced axes each split has, in the order of split numbers."""
    counts = [1]
    for a in axes:
        counts = [c * p for c in counts for p in grid.lengths(a) or [0]]
    return tuple(counts)


def _tile_description(draft: _LayerDraft) -> Callable[[int], str]:
    grid = draft.grid

    def describe(index: int) -> str:
        if grid is None:
            return f"task {index}"
        return f"part [{', '.join(f'{s.start}:{s.stop}' for s in grid.box(index))}]"

    return describe


def _chunk_description(source: BlockSource, grid: Grid) -> Callable[[int], str]:
    def describe(index: int) -> str:
        tiles = list(grid.tiles(index))
        first, last = source.label(tiles[0]), source.label(tiles[-1])
        return first if len(tiles) == 1 else f"{first} to {last}"

    return describe


def _name_of(node: Expr) -> str:
    return f"read {type(node.source).__name__}" if isinstance(node, Foreign) else node.name


def _tree_nbytes(grid: Grid, axes: tuple[int, ...], specs: list[ReduceSpec]) -> int:
    """Return what the states of a task take that walks through several tiles: trees for all of its kept box at once."""
    if grid.edges is None:
        return 0
    kept = math.prod(size for a, size in enumerate(grid.sizes) if a not in axes)
    leaves = math.prod(
        -(-size * g // block) for a, (size, g, block) in enumerate(zip(grid.sizes, grid.group, grid.block_sizes)) if a in axes
    )
    return kept * leaves.bit_length() * sum(dtype.itemsize for spec in specs for dtype in spec.state_dtypes)
