"""The NumPy engine: runs fused programs over blocks that stay in cache, each step into a reused buffer with ``out=``.

Promises: 2 to 2.5 times whole-array NumPy on one core, by touching memory once; NumPy's values, casts and warnings, because every
step is a NumPy call. Results depend on the program and the grid alone.
Never put here: grids (`tiles`), what is fused (`plan`), what makes operands within a task (`sources`), what a row or a reduction
means (`ops`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from scheduler.redo import DATA_NBYTES, Redo
from scheduler.segments import Remote
from scheduler.task import Context
from shmarray.kernels.program import Apply, Constant, FillStep, Load, Operand, Program, Store
from shmarray.ops.table import row_for
from shmarray.region import Box
from shmarray.tiles import Grid, blocks, slab_sizes

__all__ = [
    "Evaluator",
    "Made",
    "MapKernel",
    "Redone",
    "Staged",
    "Tiled",
    "Together",
    "fill_reader",
    "floating_state",
    "open_window",
    "put",
    "run_step",
    "stage",
    "step_sizes",
]

NDArray = np.ndarray[Any, Any]
Window = NDArray | Remote
Values = list[Any]
_ONE = slice(0, 1)
MOST_STEP_ITEMS = 1 << 17  # of an update in place
MOST_STAGED_ITEMS = 1 << 19  # a tile larger than this is fetched block by block: scratch stays small


def open_window(context: Context, operand: Operand) -> Window:
    """Return the bytes of an operand in this process."""
    window: Window = context.memory.window(context.addresses[operand.buffer], operand.offset, operand.shape, operand.strides, operand.dtype)
    return window if operand.shape or isinstance(window, Remote) else window.view(_ZeroD)


class _ZeroD(np.ndarray[Any, Any]):
    """A window without axes: an index of it gives the array, as for every other window, where NumPy gives a scalar."""

    def __getitem__(self, key: Any) -> NDArray:
        return self.view(np.ndarray)


class Tiled:
    """An operand whose tiles come into scratch, one after the other, before blocks load from it.

    After `fetch(tile)`, ``tile`` is the array, until the next call, and ``origin`` the index of its first element.
    """

    __slots__ = ("_scratch", "_shape", "dtype", "origin", "tile")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape, self.dtype = shape, dtype
        self._scratch = np.empty(0, np.uint8)
        self.tile: NDArray = np.empty((0,) * len(shape), dtype)
        self.origin: tuple[int, ...] = ()

    def fetch(self, tile: Box) -> None:
        """Get a tile of the iteration space, to be loaded from."""
        raise NotImplementedError

    def _room(self, nbytes: int) -> NDArray:
        if self._scratch.nbytes < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch

    def _begin(self, tile: Box) -> None:
        """Make room for a tile."""
        self.origin = tuple([piece.start for piece in tile])
        shape = tuple([piece.stop - piece.start for piece in tile])
        nbytes = self.dtype.itemsize
        for n in shape:
            nbytes *= n
        self.tile = np.ndarray(shape, self.dtype, self._room(nbytes))

    def __getitem__(self, box: Box) -> NDArray:
        index = [_ONE if n == 1 else slice(b.start - o, b.stop - o) for b, o, n in zip(box, self.origin, self._shape, strict=True)]
        part: NDArray = self.tile[(*index, ...)]  # the dots: without axes it would be a scalar
        return part


class Staged(Tiled):
    """An operand in the driver's memory, moved tile by tile: one system call for a megabyte, not one for each cache block."""

    __slots__ = ("window",)

    def __init__(self, window: Remote) -> None:
        super().__init__(window.shape, window.dtype)
        self.window = window

    def fetch(self, tile: Box) -> None:
        # The box of this operand, which may broadcast, for a box of the iteration space.
        box = tuple([_ONE if n == 1 else piece for piece, n in zip(tile, self._shape, strict=True)])
        self.origin = tuple([piece.start for piece in box])
        part = self.window[box]
        self.tile = part.read(self._room(part.nbytes_with_gaps()))

    def begin(self, tile: Box) -> None:
        """Make room for a tile, to be filled box by box and sent by `flush`."""
        self._begin(tile)

    def flush(self, tile: Box) -> None:
        self.window[tile].write(self.tile)


class Redone(Tiled):
    """An operand that is read where it is written: the results of a step go into the redo slot, and over it when they are whole."""

    __slots__ = ("memory", "segment", "window")

    def __init__(self, window: Window, operand: Operand, context: Context) -> None:
        super().__init__(operand.shape, operand.dtype)
        self.window = window
        self.segment = context.addresses[operand.buffer].segment
        self.memory = context.memory

    def begin(self, redo: Redo, number: int, step: Box, room: NDArray) -> None:
        """Take ``room``, in the slot, for the results of a step; record ``number`` says where they belong."""
        self.origin = tuple([piece.start for piece in step])
        self.tile = room
        redo.record(number, self.memory, self.segment, self.window[step], room)

    def flush(self, step: Box) -> None:
        put(self.window, step, self.tile)


def run_step(redo: Redo, targets: Sequence[Redone], step: Box, compute: Callable[[], object]) -> None:
    """Have the results of a step computed into the slot, then brought to the targets: exactly once, whoever dies."""
    shape = tuple([piece.stop - piece.start for piece in step])
    for number, (target, room) in enumerate(zip(targets, redo.room([shape] * len(targets), [t.dtype for t in targets]), strict=True)):
        target.begin(redo, number, step, room)
    compute()
    redo.commit(len(targets), [target.flush for target in targets], step)


class Made(Tiled):
    """An operand made within the task, tile by tile, by its source."""

    __slots__ = ("fill",)

    def __init__(self, operand: Operand, context: Context) -> None:
        assert operand.source is not None
        super().__init__(operand.shape, operand.dtype)
        self.fill = operand.source.open(context)

    def fetch(self, tile: Box) -> None:
        self._begin(tile)
        self.fill(self.tile, tile)


def stage(window: Window | Staged) -> Window | Staged:
    """Return the window, staged where it lies in the driver's memory."""
    return Staged(window) if isinstance(window, Remote) else window


def floating_state(context: Context, errstate: tuple[tuple[str, str], ...], label: str, line: str) -> np.errstate:
    """Return the floating-point state of one operation: as `np.errstate` had it; what NumPy would warn of is reported to the driver."""
    modes: dict[str, Any] = {"divide": "call", "over": "call", "invalid": "call", "under": "ignore"}
    modes.update((kind, mode if mode in ("ignore", "raise") else "call") for kind, mode in errstate)

    def warn(problem: str, flag: int) -> None:
        context.warn("RuntimeWarning", f"{problem} encountered in {label}", line)

    return np.errstate(**modes, call=warn)


def put(window: Window | Tiled, box: Box, values: NDArray) -> None:
    """Write ``values``, broadcast, over a box of a window."""
    if isinstance(window, Remote):
        part = window[box]
        part.write(np.broadcast_to(values, part.shape).astype(part.dtype, copy=False))
    else:
        np.copyto(window[box], values, casting="unsafe")


class Together:
    """A function that runs a task, and one that runs several as if they were one."""

    __slots__ = ("many", "one")

    def __init__(self, one: Callable[[int], None], many: Callable[[int, int], None]) -> None:
        self.one, self.many = one, many

    def __call__(self, index: int) -> None:
        self.one(index)


class Evaluator:
    """A program bound to one process's memory: `run` executes it on a block and leaves the registers in a list.

    ``results``: registers that are read from there, which no later step may write over. ``made``: operands whose tiles the caller fetches.
    ``updated``: those whose results the caller takes from `targets`, block by block.
    """

    def __init__(
        self,
        program: Program,
        context: Context,
        tile_items: int = 0,
        results: Iterable[int] = (),
        made: Mapping[int, Tiled] = MappingProxyType({}),
        updated: Iterable[int] = (),
    ) -> None:
        self.program = program
        self.context = context
        self.windows: list[Window | Tiled] = [
            made[k] if k in made else Made(operand, context) if operand.source is not None else open_window(context, operand)
            for k, operand in enumerate(program.operands)
        ]
        stored_to = {step.operand for step in program.steps if isinstance(step, Store)}
        loaded = {step.operand for step in program.steps if isinstance(step, Load)}
        self.fetched: list[Tiled] = [window for k, window in enumerate(self.windows) if isinstance(window, Made) and k not in made]
        self.flushed: list[Staged] = []
        if tile_items <= MOST_STAGED_ITEMS:
            for k, window in enumerate(self.windows):
                # Beside an update, what is stored is sent block by block: who goes on in the middle of a tile has lost its scratch.
                if isinstance(window, Remote) and not (k in stored_to and (k in loaded or updated)):
                    staged = self.windows[k] = Staged(window)
                    (self.flushed if k in stored_to else self.fetched).append(staged)
        # Where results go, operand by operand: for those that are updated not where they are read.
        self.places = self.windows.copy()
        self.targets = [Redone(open_window(context, program.operands[k]), program.operands[k], context) for k in updated]
        for k, target in zip(updated, self.targets, strict=True):
            self.places[k] = target
        self.layouts: dict[tuple[int, ...], Values] = {}
        self.current = ("", "")  # (operation, user's line) that runs now, for warnings
        self.slots = _assign_slots(program, results)
        self.scratch: dict[int, NDArray] = {}
        stored = {step.register: step.operand for step in program.steps if isinstance(step, Store)}
        self.steps: list[Callable[[Values, Box], None]] = []
        direct: set[int] = set()
        for step in program.steps:
            match step:
                case Load():
                    self.steps.append(self._load(step))
                case Constant():
                    self.steps.append(_constant(step, len(program.shape)))
                case FillStep():
                    self.steps.append(self._fill(step))
                case Apply():
                    targets = {r: stored[r] for r in step.outs if r in stored and self._goes_direct(step, r, stored[r])}
                    direct.update(targets)
                    self.steps.append(self._apply(step, targets))
                case Store():
                    if step.register not in direct or stored[step.register] != step.operand:
                        self.steps.append(self._store(step))

    def errstate(self) -> np.errstate:
        """Return the floating-point state to run under: conditions NumPy would warn of are reported to the driver."""
        return np.errstate(divide="call", over="call", invalid="call", under="ignore", call=self._warn)

    def begin(self, tile: Box) -> None:
        """Fetch what blocks of ``tile`` will load from the driver's memory, and make what is made within the task.

        Not under `errstate`: a user's function may be among the latter.
        """
        for tiled in self.fetched:
            tiled.fetch(tile)
        for staged in self.flushed:
            staged.begin(tile)

    def end(self, tile: Box) -> None:
        """Send what blocks of ``tile`` have stored to the driver's memory."""
        for staged in self.flushed:
            staged.flush(tile)

    def run(self, box: Box) -> Values:
        """Execute every step on ``box`` and return the registers, valid until the next call."""
        shape = tuple([piece.stop - piece.start for piece in box])
        layout = self.layouts.get(shape)
        if layout is None:
            layout = self._layout(shape)
        values = layout.copy()
        for step in self.steps:
            step(values, box)
        return values

    def _warn(self, problem: str, flag: int) -> None:
        name, line = self.current
        self.context.warn("RuntimeWarning", f"{problem} encountered in {name}", line)

    def _layout(self, shape: tuple[int, ...]) -> Values:
        """Return, for blocks of ``shape``, an array over scratch for every register that needs one."""
        if len(self.layouts) > 64:
            self.layouts.clear()
        layout: Values = []
        for register, slot in zip(self.program.registers, self.slots, strict=True):
            if slot is None:
                layout.append(None)
                continue
            mine = tuple([n if varies else 1 for n, varies in zip(shape, register.varies, strict=True)])
            nbytes = register.dtype.itemsize
            for n in mine:
                nbytes *= n
            scratch = self.scratch.get(slot)
            if scratch is None or scratch.nbytes < nbytes:
                scratch = self.scratch[slot] = np.empty(nbytes, np.uint8)
            layout.append(np.ndarray(mine, register.dtype, scratch))
        self.layouts[shape] = layout
        return layout

    def _goes_direct(self, step: Apply, register: int, operand: int) -> bool:
        """Whether a step may write its result straight into the array it is stored to."""
        target = self.program.operands[operand]
        info = self.program.registers[register]
        return (
            isinstance(self.places[operand], (np.ndarray, Staged, Redone))
            and row_for(step.name).in_place
            and info.dtype == target.dtype
            and all(varies or n == 1 for varies, n in zip(info.varies, self.program.shape, strict=True))
        )

    def _load(self, step: Load) -> Callable[[Values, Box], None]:
        window, out = self.windows[step.operand], step.out
        shape = self.program.operands[step.operand].shape
        whole = shape == self.program.shape
        varies = tuple(n != 1 for n in shape)

        def box_of(box: Box) -> Box:
            return box if whole else tuple([b if v else _ONE for b, v in zip(box, varies, strict=True)])

        if isinstance(window, Tiled):

            def load_tiled(values: Values, box: Box) -> None:
                values[out] = window[box]

            return load_tiled
        if isinstance(window, Remote):
            scratch = np.empty(0, np.uint8)

            def fetch(values: Values, box: Box) -> None:
                nonlocal scratch
                part = window[box_of(box)]
                wanted = part.nbytes_with_gaps()
                if scratch.nbytes < wanted:
                    scratch = np.empty(wanted, np.uint8)
                values[out] = part.read(scratch)

            return fetch
        array = window
        if whole:

            def load(values: Values, box: Box) -> None:
                values[out] = array[box]
        else:

            def load(values: Values, box: Box) -> None:
                values[out] = array[box_of(box)]

        return load

    def _fill(self, step: FillStep) -> Callable[[Values, Box], None]:
        read, out = fill_reader(step, self.program.registers[step.out].dtype), step.out

        def fill(values: Values, box: Box) -> None:
            values[out] = read(box)

        return fill

    def _apply(self, step: Apply, targets: dict[int, int]) -> Callable[[Values, Box], None]:
        function, outs = row_for(step.name).function, step.outs
        kwargs = dict(step.params)
        args = step.args
        windows = {register: self.places[operand] for register, operand in targets.items()}
        single = len(outs) == 1
        label = ({"astype": "cast"}.get(step.name, step.name.removeprefix("masked:")), step.line)
        state = {kind: {"warn": "call", "log": "call", "print": "call"}.get(mode, mode) for kind, mode in step.errstate}
        out = outs[0]
        target = windows.get(out)
        constants = [value for _, value in args]
        places = [(k, value) for k, (kind, value) in enumerate(args) if kind == "r"]

        def apply(values: Values, box: Box) -> None:
            self.current = label
            operands = constants.copy()
            for k, register in places:
                operands[k] = values[register]
            if single:
                if target is not None:
                    values[out] = target[box]
                function(*operands, out=values[out], **kwargs)
                return
            for register, window in windows.items():
                values[register] = window[box]
            function(*operands, out=tuple([values[r] for r in outs]), **kwargs)

        if not state and not kwargs and single and isinstance(function, np.ufunc) and len(args) <= 2:
            return self._apply_ufunc(function, args, out, target, label)
        if not state:
            return apply

        def apply_under(values: Values, box: Box) -> None:
            with np.errstate(**state):  # type: ignore[arg-type]  # the modes were taken from np.geterr
                apply(values, box)

        return apply_under

    def _apply_ufunc(
        self, function: np.ufunc, args: tuple[tuple[str, Any], ...], out: int, target: Any, label: tuple[str, str]
    ) -> Callable[[Values, Box], None]:
        """The most frequent step, without its loops: a block costs microseconds of Python, and there are thousands."""
        (kind, a), (other, b) = (*args, ("", None))[:2]

        def unary(values: Values, box: Box) -> None:
            self.current = label
            if target is not None:
                values[out] = target[box]
            function(values[a], out=values[out])

        def binary(values: Values, box: Box) -> None:
            self.current = label
            if target is not None:
                values[out] = target[box]
            function(values[a] if kind == "r" else a, values[b] if other == "r" else b, out=values[out])

        if len(args) == 1:
            return unary if kind == "r" else lambda values, box: function(a, out=values[out])
        return binary

    def _store(self, step: Store) -> Callable[[Values, Box], None]:
        window, register = self.places[step.operand], step.register

        def store(values: Values, box: Box) -> None:
            put(window, box, values[register])

        return store


def fill_reader(step: FillStep, dtype: np.dtype[Any]) -> Callable[[Box], NDArray]:
    """Return what gives the elements of a box of the iteration space, valid until the next call."""
    operation, map = step.operation, step.map
    axis_of = {axis: k for k, (axis, _) in enumerate(map.axes) if axis >= 0}
    naxes = len(map.offsets)
    moved = [axis for axis, _ in map.axes if axis >= 0]
    pick = tuple(slice(None) if a in axis_of else 0 for a in range(naxes))
    order = np.argsort(np.argsort(moved)).tolist() if moved else []
    new = tuple(slice(None) if axis >= 0 else None for axis, _ in map.axes)
    buffers: dict[tuple[int, ...], NDArray] = {}  # used again: fresh memory costs a page fault for every 4 KiB

    def read(box: Box) -> NDArray:
        starts, steps, counts = [], [], []
        for a in range(naxes):
            k = axis_of.get(a)
            step_of = map.axes[k][1] if k is not None else 1
            starts.append(map.offsets[a] + (step_of * box[k].start if k is not None else 0))
            steps.append(step_of)
            counts.append(box[k].stop - box[k].start if k is not None else 1)
        shape = tuple(counts)
        buffer = buffers.get(shape)
        if buffer is None:
            if len(buffers) > 8:
                buffers.clear()
            buffer = buffers[shape] = np.empty(shape, dtype)
        operation.fill(buffer, tuple(starts), tuple(steps))
        part: NDArray = buffer[pick].transpose(order)[new]
        return part

    return read


def _constant(step: Constant, ndim: int) -> Callable[[Values, Box], None]:
    out, value = step.out, np.asarray(step.value).reshape((1,) * ndim)

    def constant(values: Values, box: Box) -> None:
        values[out] = value

    return constant


def _assign_slots(program: Program, results: Iterable[int]) -> list[int | None]:
    """Give registers that `Apply` writes a scratch slot each, reusing the slot of a register whose last reader has run.

    A row that allows it writes over an operand that dies with it: fewer bytes in cache.
    """
    last: dict[int, int] = {}
    for position, step in enumerate(program.steps):
        if isinstance(step, Apply):
            for kind, value in step.args:
                if kind == "r":
                    last[value] = position
        elif isinstance(step, Store):
            last[step.register] = position
    never_dies = len(program.steps)
    last.update(dict.fromkeys(results, never_dies))
    slots: list[int | None] = [None] * len(program.registers)
    free: dict[tuple[np.dtype[Any], tuple[bool, ...]], list[int]] = {}
    count = 0
    for position, step in enumerate(program.steps):
        if not isinstance(step, Apply):
            continue
        dying = [
            v for v in dict.fromkeys(v for k, v in step.args if k == "r") if slots[v] is not None and last.get(v, never_dies) == position
        ]
        in_place = row_for(step.name).in_place and len(step.outs) == 1
        if in_place:
            _release(program, slots, dying, free)
        for out in step.outs:
            register = program.registers[out]
            key = (register.dtype, register.varies)
            if free.get(key):
                slots[out] = free[key].pop()
            else:
                slots[out] = count
                count += 1
        if not in_place:
            _release(program, slots, dying, free)
    return slots


def _release(
    program: Program, slots: list[int | None], registers: list[int], free: dict[tuple[np.dtype[Any], tuple[bool, ...]], list[int]]
) -> None:
    for r in registers:
        slot = slots[r]
        assert slot is not None
        free.setdefault((program.registers[r].dtype, program.registers[r].varies), []).append(slot)


@dataclass(frozen=True, slots=True)
class MapKernel:
    """Fills the stored operands of a program, tile by tile."""

    program: Program
    grid: Grid

    def bind(self, context: Context) -> Callable[[int], None]:
        grid = self.grid
        updated = self.program.updated
        evaluator = Evaluator(self.program, context, math.prod(grid.sizes), updated=updated)
        sizes = grid.block_sizes
        if updated:
            return self._in_place(evaluator, context.redo)

        def run(index: int) -> None:
            tile = grid.box(index)
            evaluator.begin(tile)
            with evaluator.errstate():
                for block in blocks(tile, sizes):
                    evaluator.run(block)
                evaluator.end(tile)

        return run

    def _in_place(self, evaluator: Evaluator, redo: Redo) -> Callable[[int], None]:
        grid, targets = self.grid, evaluator.targets
        sizes = step_sizes(grid, [target.dtype.itemsize for target in targets])

        def run(index: int) -> None:
            tile = grid.box(index)
            evaluator.begin(tile)
            with evaluator.errstate():
                for block in itertools.islice(blocks(tile, sizes), redo.first_step, None):
                    run_step(redo, targets, block, lambda block=block: evaluator.run(block))  # type: ignore[misc]  # a lambda's default
                evaluator.end(tile)

        return run


def step_sizes(grid: Grid, itemsizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the steps of an update in place: tiles, not much larger than two cache blocks, whose results fit the redo slot.

    A step costs tens of microseconds of Python beside its items, and a block of its own saves less than that in the caches.
    """
    most = min(MOST_STEP_ITEMS, DATA_NBYTES // sum(itemsizes))
    return grid.sizes if math.prod(grid.sizes) <= most else slab_sizes(grid.sizes, max(1, most))
