"""From a plain kernel to a compiled one: its operands as the code sees them, its loops, its scalars, its folds.

Promises: the same kernel gives the same structure, whatever is cached. Never put here: LLVM, addresses, running.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scheduler.redo import DATA_NBYTES
from shmarray.kernels.llvm.folds import fold_of, folds_of
from shmarray.kernels.llvm.kernel import CompiledKernel, PlainKernel
from shmarray.kernels.llvm.lanes import BOOL, NotLowered, element_type, part_dtype
from shmarray.kernels.llvm.lower import LOWERINGS, loop_dtypes
from shmarray.kernels.llvm.module import write_module
from shmarray.kernels.llvm.nest import Nest, Traffic, choose_nest, lanes_of
from shmarray.kernels.llvm.objects import object_for, optimised
from shmarray.kernels.llvm.structure import (
    BLOCK_ITEMS,
    LEAF_STRIPS,
    MOST_LEVELS,
    STRIP_ALIGNMENT,
    FoldForm,
    OperandForm,
    StepForm,
    Structure,
)
from shmarray.kernels.llvm.target import machine
from shmarray.kernels.numpy import MapKernel
from shmarray.kernels.program import Apply, Constant, FillStep, Load, Operand, Program, Store
from shmarray.kernels.reduce import ReduceKernel
from shmarray.region import c_strides
from shmarray.tiles import PartGrid, slab_sizes

__all__ = ["NotLowered", "assembly", "compiled", "compiled_parts"]

PIECE_ITEMS = 1 << 15  # what goes through scratch at once: it stays in cache
STAGED_ITEMS = 1 << 17  # from the driver's memory: one system call for a megabyte
STREAMED_NBYTES = 64 << 20  # larger results are written past the caches: no line is read only to be overwritten
_PLAIN = {np.dtype(name) for name in ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")}
_EXACT = frozenset({"add", "subtract", "multiply", "divide", "sqrt"})  # their flags are IEEE 754's, and NumPy's
NARROW_ITEMS = 1 << 10  # a narrow part with more items pays for code of its own
REDUCED_ITEMS = 1 << 20  # of a reduction's tile: so that what is copied stays small beside the arrays, and merging pieces costs nothing


def compiled(plain: PlainKernel, is_remote: Callable[[int], bool]) -> CompiledKernel:
    """Return the compiled form of a kernel. ``is_remote``: whether a buffer lies in the driver's memory. Raises NotLowered."""
    return _finished(_Draft(plain, is_remote))


def compiled_parts(parts: Sequence[MapKernel], is_remote: Callable[[int], bool]) -> tuple[CompiledKernel, ...]:
    """Return the compiled forms of the parts of one space. Where they can, all go through the loops of the largest: one code."""
    largest = max(parts, key=lambda part: part.grid.items_per_task)
    nest = _Draft(largest, is_remote).nest
    return tuple(_finished(_Draft(part, is_remote, None if part is largest else nest)) for part in parts)


def _finished(draft: _Draft) -> CompiledKernel:
    plain, structure = draft.plain, draft.structure()
    modes = [dict(step.errstate) for step in plain.program.steps if isinstance(step, Apply)]
    modes += [dict(spec.errstate) for spec in plain.specs] if isinstance(plain, ReduceKernel) else []
    if any(mode.get("under", "ignore") != "ignore" for mode in modes):
        raise NotLowered("np.errstate(under=...) is not ignore")
    said = ("divide", "over", "invalid")
    return CompiledKernel(
        plain,
        structure,
        tuple(loop.axes for loop in draft.nest.loops),
        tuple(draft.fills),
        draft.aside,
        draft.ragged,
        draft.piece_sizes,
        b"".join(draft.scalars),
        _scratch_nbytes(structure, math.prod(draft.piece_sizes[a] for a in draft.axes)),
        any(mode.get(kind) == "raise" for mode in modes for kind in said),
        draft.blamed,
        isinstance(plain, MapKernel) and all(mode.get(kind) == "ignore" for mode in modes for kind in said),
        object_for(repr(structure), lambda: write_module(structure, machine())),
    )


def assembly(kernel: CompiledKernel) -> str:
    """Return the LLVM assembly of a kernel, optimised as it is compiled."""
    return optimised(write_module(kernel.structure, machine()))


def _scratch_nbytes(s: Structure, most: int) -> int:
    """Return what a reduction of ``most`` items for each kept one needs for accumulators, where they lie in memory, and the tree."""
    folds = folds_of(s)
    is_across = not s.reduced[-1]
    node = sum(d.itemsize for f in folds for d in f.nodes())
    accumulators = sum(d.itemsize for f in folds for d in f.accumulators()) if is_across else 0
    levels = min(MOST_LEVELS, (most // LEAF_STRIPS + 2).bit_length() + 1)
    return accumulators * BLOCK_ITEMS + (levels + 1) * node * (BLOCK_ITEMS if is_across else 2 * s.lanes)


class _Draft:
    """Turns a program into a structure: operands as the code sees them, scalars as arguments."""

    def __init__(self, plain: PlainKernel, is_remote: Callable[[int], bool], like: Nest | None = None) -> None:
        program = self.program = plain.program
        self.plain = plain
        self.axes = plain.axes if isinstance(plain, ReduceKernel) else ()
        self.fills = [step for step in program.steps if isinstance(step, FillStep)]
        self.scalars: list[bytes] = []
        loaded = {s.operand for s in program.steps if isinstance(s, Load)}
        stored = {s.operand for s in program.steps if isinstance(s, Store)}
        self.blamed = _only_suspect(program) if isinstance(plain, MapKernel) else None
        self.loaded, self.stored = loaded, stored
        remote = {k for k, o in enumerate(program.operands) if o.source is None and is_remote(o.buffer)}
        if program.updated and isinstance(plain, ReduceKernel):
            raise NotLowered("a reduction beside an update in place")
        in_pieces = bool(stored & remote)  # what is copied there is copied when a piece is done, which then is the step
        self.updated: tuple[int, ...] = () if in_pieces else program.updated
        self.aside: tuple[int, ...] = program.updated if in_pieces else ()
        self.piece_sizes = plain.grid.sizes
        if isinstance(plain, ReduceKernel):
            # Of one size wherever operands lie: pieces are nodes of the tree, and so decide bits.
            self.piece_sizes = _smaller(plain.grid.sizes, self.axes, REDUCED_ITEMS)
        elif self.aside:
            most = DATA_NBYTES // sum(program.operands[k].dtype.itemsize for k in self.aside)
            self.piece_sizes = slab_sizes(plain.grid.sizes, min(STAGED_ITEMS, max(1, most)))
        elif remote or self.fills:
            self.piece_sizes = _smaller(plain.grid.sizes, (), STAGED_ITEMS if remote else PIECE_ITEMS)
        self.traffic = [self._traffic(k, o, k in remote or k in self.aside) for k, o in enumerate(program.operands)]
        # An operand that is updated piece by piece is two: the code reads the one and writes the other.
        self.traffic += [self.traffic[k] for k in self.aside]
        self.traffic += [self._fill_traffic(step) for step in self.fills]
        dtypes = [r.dtype for r in program.registers] + [o.dtype for o in program.operands]
        for spec in plain.specs if isinstance(plain, ReduceKernel) else ():
            fold = fold_of(spec.kind, program.registers[spec.register].dtype, spec.state_dtypes)
            dtypes += fold.accumulators()
        for dtype in dtypes:
            element_type(dtype)
        self.lanes = lanes_of([part_dtype(d).itemsize for d in dtypes])
        traffic = self.traffic
        if isinstance(plain, ReduceKernel):
            traffic = [replace(t, exact=True) for t in traffic]  # wherever operands lie, so that bits do not depend on it
        self.nest: Nest = choose_nest(program.shape, self.piece_sizes, traffic, self.lanes, self.axes)
        inner = math.prod(program.shape[a] for a in like.inner.axes) if like is not None else 0
        is_narrow = inner < self.lanes and math.prod(program.shape) > NARROW_ITEMS * inner
        if like is not None and not is_narrow and like.holds(program.shape, self.piece_sizes, traffic):
            self.nest = like
        self.ragged = tuple(k for k in sorted(remote) if not self.traffic[k].exact)

    def _traffic(self, number: int, o: Operand, is_copied: bool) -> Traffic:
        if o.source is not None:  # its tiles are C-ordered
            sizes = [1 if n == 1 else size for n, size in zip(o.shape, self.plain.grid.sizes, strict=True)]
            ordered = c_strides(sizes, o.dtype.itemsize)
            return Traffic(tuple(0 if n == 1 else s for n, s in zip(o.shape, ordered, strict=True)), o.dtype.itemsize, is_copied=True)
        # A part that is one item wide has the strides of the others, though it does not move: so that the code is the same.
        is_narrow = [n == 1 and isinstance(self.plain.grid, PartGrid) for n in self.program.shape]
        strides = tuple(0 if n == 1 and not narrow else stride for n, stride, narrow in zip(o.shape, o.strides, is_narrow, strict=True))
        if not is_copied:
            return Traffic(strides, o.dtype.itemsize, offset=o.offset)
        moving = [n if stride else 1 for n, stride in zip(o.shape, strides, strict=True)]
        ordered = tuple(s if n > 1 else 0 for n, s in zip(moving, c_strides(moving, o.dtype.itemsize), strict=True))
        return Traffic(strides, o.dtype.itemsize, exact=strides == ordered, is_copied=True)

    def _fill_traffic(self, step: FillStep) -> Traffic:
        itemsize = self.program.registers[step.out].dtype.itemsize
        moves = [axis >= 0 for axis, _ in step.map.axes]
        sizes = [size if moving else 1 for size, moving in zip(self.piece_sizes, moves, strict=True)]
        return Traffic(tuple(s if moving else 0 for s, moving in zip(c_strides(sizes, itemsize), moves, strict=True)), itemsize)

    def _form(self, traffic: Traffic, dtype: np.dtype[Any], is_loaded: bool, is_stored: bool) -> OperandForm:
        loops = self.nest.loops
        moves = tuple(any(traffic.strides[a] for a in loop.axes) for loop in loops)
        inner = "still"
        if moves[-1]:
            stride = traffic.strides[loops[-1].axes[-1]]
            inner = "strided"
            if traffic.exact and stride == dtype.itemsize:
                inner = "forward"
            elif traffic.exact and stride == -dtype.itemsize:
                inner = "backward"
        elif is_stored:
            inner = "strided"  # one item, or one again and again: of a strip only those that count are stored
        streams = is_stored and inner == "forward" and self._streams(traffic, dtype)
        return OperandForm(dtype.str, inner, moves, is_loaded, is_stored, streams)

    def _streams(self, traffic: Traffic, dtype: np.dtype[Any]) -> bool:
        """Whether an array is so large that nothing of it stays in cache, and every strip of every tile is aligned."""
        shape, grid = self.program.shape, self.plain.grid
        if math.prod(shape) * dtype.itemsize < STREAMED_NBYTES or traffic.is_copied or traffic.offset % STRIP_ALIGNMENT:
            return False
        if not grid.is_regular:
            return False
        starts = [
            size * stride
            for sizes in (grid.sizes, self.piece_sizes)
            for n, size, stride in zip(shape, sizes, traffic.strides, strict=True)
            if size < n
        ]
        rows = [traffic.strides[a] for loop in self.nest.loops[:-1] for a in loop.axes]
        return self.lanes * dtype.itemsize % STRIP_ALIGNMENT == 0 and all(step % STRIP_ALIGNMENT == 0 for step in (*starts, *rows))

    def structure(self) -> Structure:
        program, shape = self.program, self.program.shape
        operands = [
            self._form(self.traffic[k], o.dtype, k in self.loaded, k in self.stored and k not in self.aside)
            for k, o in enumerate(program.operands)
        ]
        copies = {k: len(operands) + n for n, k in enumerate(self.aside)}
        operands += [self._form(self.traffic[copies[k]], program.operands[k].dtype, False, True) for k in self.aside]
        first_fill = len(operands)
        operands += [
            self._form(t, program.registers[step.out].dtype, True, False)
            for t, step in zip(self.traffic[first_fill:], self.fills, strict=True)
        ]
        varies = [False] * len(program.registers)
        steps: list[StepForm] = []
        for step in program.steps:
            match step:
                case Load():
                    varies[step.out] = operands[step.operand].inner != "still"
                    steps.append(StepForm("load", (step.out,), step.operand))
                case FillStep():
                    place = first_fill + self.fills.index(step)
                    varies[step.out] = operands[place].inner != "still"
                    steps.append(StepForm("load", (step.out,), place))
                case Constant():
                    steps.append(StepForm("scalar", (step.out,), self._slot(step.value, program.registers[step.out].dtype)))
                case Apply():
                    for out in step.outs:
                        varies[out] = any(varies[value] for kind, value in step.args if kind == "r")
                    steps.append(self._apply(step))
                case Store():
                    steps.append(StepForm("store", (step.register,), copies.get(step.operand, step.operand)))
        folds = tuple(
            FoldForm(spec.kind, spec.register, program.registers[spec.register].dtype.str, tuple(d.str for d in spec.state_dtypes))
            for spec in (self.plain.specs if isinstance(self.plain, ReduceKernel) else ())
        )
        assert len(shape) == len(self.piece_sizes)
        registers = tuple((r.dtype.str, v) for r, v in zip(program.registers, varies, strict=True))
        reduced = tuple(loop.reduced for loop in self.nest.loops)
        return Structure(self.lanes, reduced, tuple(operands), registers, tuple(steps), len(self.scalars), folds, self.updated)

    def _apply(self, step: Apply) -> StepForm:
        outs = tuple(self.program.registers[r].dtype for r in step.outs)
        given = [self.program.registers[value].dtype if kind == "r" else _scalar_type(value) for kind, value in step.args]
        inputs, results = loop_dtypes(step.name, given, outs, step.params)
        for dtype in (*inputs, *results):
            element_type(dtype)
        lowering = LOWERINGS[step.name.removeprefix("masked:")]
        args = []
        for position, ((kind, value), dtype) in enumerate(zip(step.args, inputs, strict=True)):
            if kind == "r":
                args.append((kind, value))
            elif position in lowering.baked and lowering.bakes(_exact_scalar(value, dtype).item(), dtype):
                args.append(("v", _exact_scalar(value, dtype).item()))
            else:
                args.append(("s", self._slot(value, dtype)))
        params = tuple((k, v) for k, v in step.params if k != "dtype")
        return StepForm("apply", step.outs, -1, step.name, tuple(args), tuple(d.str for d in inputs), tuple(d.str for d in results), params)

    def _slot(self, value: Any, dtype: np.dtype[Any]) -> int:
        self.scalars.append(_exact_scalar(value, dtype).tobytes().ljust(16, b"\0"))
        return len(self.scalars) - 1


def _only_suspect(program: Program) -> Apply | None:
    """Return the one step that can have raised a flag, where one is all there is and its flags are exact: ``x += y``.

    Its flags need no second look.
    """
    steps = [step for step in program.steps if isinstance(step, Apply)]
    if len(steps) != 1 or steps[0].name not in _EXACT or any(mode == "raise" for _, mode in steps[0].errstate):
        return None
    dtypes = {program.registers[value].dtype for kind, value in steps[0].args if kind == "r"}
    dtypes |= {o.dtype for o in program.operands} | {program.registers[r].dtype for r in steps[0].outs}
    # Not float16: where it is one value for all lanes, LLVM computes it in one and lets the others raise what they will.
    return steps[0] if len(dtypes) == 1 and dtypes.pop() in _PLAIN else None


def _scalar_type(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.dtype
    return BOOL if isinstance(value, bool) else type(value)


def _exact_scalar(value: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return a scalar as the loop sees it. One that NumPy would say something of when it casts it is left to NumPy."""
    try:
        with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
            warnings.simplefilter("error")
            return np.asarray(value).astype(dtype) if isinstance(value, np.generic) else np.asarray(value, dtype)
    except (ArithmeticError, TypeError, ValueError, Warning) as error:
        raise NotLowered(f"scalar {value!r} as {dtype}: {error}") from None


def _smaller(sizes: tuple[int, ...], reduced: tuple[int, ...], items: int) -> tuple[int, ...]:
    """Return the sizes of pieces of about ``items`` items, cut along the outermost axes that can be cut, reduced ones first."""
    pieces = list(sizes)
    for axis in [*reduced, *(a for a in range(len(sizes)) if a not in reduced)]:
        rest = math.prod(pieces)
        if rest <= items:
            break
        pieces[axis] = max(1, -(-pieces[axis] // -(-rest // items)))
    return tuple(pieces)
