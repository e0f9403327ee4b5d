"""Fusing: a chain of elementwise nodes becomes one program, down to what lies in memory or is made from positions.

Promises: each node is computed once per program; operands get an axis for each of the iteration space, of length 1 where they
broadcast. Plain values: nothing runs.
Never put here: which nodes get memory and which layers there are (`plan`), how a program is executed (`kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from shmarray.dtypes import result_dtypes
from shmarray.expr import Elementwise, Expr, Fill, InMemory, Stored, View, exact, line_of, postorder
from shmarray.kernels.program import Apply, Constant, FillStep, Load, Operand, Program, Register, Step, Store
from shmarray.ops.table import row_for
from shmarray.region import IndexMap, identity_map
from shmarray.tiles import Grid

__all__ = ["ProgramWriter", "broadcast_operand", "constant_of", "crossing_axes", "is_leaf", "is_zero", "memory_order"]


def is_leaf(node: Expr) -> bool:
    return isinstance(node, (Stored, InMemory, Fill))


def constant_of(node: Expr) -> np.generic | None:
    """Return the one value of a constant array, or None."""
    while isinstance(node, View):
        node = node.x
    value = getattr(node.operation, "value", None) if isinstance(node, Fill) else None
    return value if isinstance(value, np.generic) else None


def is_zero(node: Expr) -> bool:
    """Return whether an array is one constant, every byte of which is zero (and so not -0.0)."""
    value = constant_of(node)
    return value is not None and not any(value.tobytes())


class ProgramWriter:
    """Writes the program of one layer: nodes become registers, once each."""

    def __init__(self, where: Callable[[Expr], Operand | None], shape: tuple[int, ...]) -> None:
        self.where = where  # where a node lies already, if it does
        self.shape = shape
        self.operands: list[Operand] = []
        self.operand_numbers: dict[Operand, int] = {}
        self.registers: list[Register] = []
        self.steps: list[Step] = []
        self.known: dict[Expr, int] = {}
        self.applied: dict[Any, tuple[int, ...]] = {}
        self.weight = 0
        self.nbytes = 0

    def add(self, root: Expr, force: bool = False) -> int:
        """Return the register that holds ``root``. ``force``: compute it, though it is a memory node (that of this layer)."""

        def inputs(node: Expr) -> Iterable[Expr]:
            if node in self.known or not isinstance(node, Elementwise):
                return ()
            return () if self.where(node) is not None and not (force and node is root) else node.inputs

        for node in postorder([root], inputs):
            if node not in self.known:
                self.known[node] = self._write(node, force and node is root)
        return self.known[root]

    def store(self, register: int, place: Operand) -> None:
        self.steps.append(Store(register, self._operand(broadcast_operand(place, self.shape))))
        self.nbytes += place.dtype.itemsize

    def cost(self, grid: Grid) -> int:
        """Return what a task is worth, in bytes of memory traffic."""
        return max(1, self.rate * grid.items_per_task)

    @property
    def rate(self) -> int:
        """What an item is worth, in bytes of memory traffic."""
        return self.nbytes + 2 * self.weight

    def program(self) -> Program:
        return Program(self.shape, tuple(self.operands), tuple(self.registers), tuple(self.steps))

    def _operand(self, operand: Operand) -> int:
        number = self.operand_numbers.get(operand)
        if number is None:
            number = self.operand_numbers[operand] = len(self.operands)
            self.operands.append(operand)
        return number

    def _register(self, dtype: np.dtype[Any], varies: tuple[bool, ...]) -> int:
        self.registers.append(Register(dtype, varies))
        return len(self.registers) - 1

    def _write(self, node: Expr, force: bool) -> int:
        place = None if force and not is_leaf(node) and not isinstance(node, View) else self.where(node)
        if place is not None:
            operand = broadcast_operand(place, self.shape)
            register = self._register(node.dtype, tuple(n != 1 for n in operand.shape))
            self.steps.append(Load(register, self._operand(operand)))
            self.nbytes += node.dtype.itemsize
            return register
        constant = constant_of(node)
        if constant is not None:
            register = self._register(node.dtype, (False,) * len(self.shape))
            self.steps.append(Constant(register, constant))
            return register
        fill = node.x if isinstance(node, View) else node
        if isinstance(fill, Fill):
            map = node.map if isinstance(node, View) else identity_map(node.shape)
            register = self._register(node.dtype, _varies(node.shape, self.shape))
            lead = len(self.shape) - len(map.shape)
            # An axis of length 1 may be broadcast here: it stays at its offset, whatever box is asked for.
            axes = tuple((-1, 0) if n == 1 else axis for n, axis in zip(map.shape, map.axes, strict=True))
            full = IndexMap((1,) * lead + map.shape, map.offsets, ((-1, 0),) * lead + axes)
            self.steps.append(FillStep(register, fill.operation, full))
            self.weight += fill.operation.cost
            return register
        assert isinstance(node, Elementwise), f"{node.name} has no memory"
        args = tuple(("r", self.known[a]) if isinstance(a, Expr) else ("c", a) for a in node.args)
        dtype = node.dtype if row_for(node.op).nout == 1 else None  # of a cast nothing else says it
        key = (node.op, exact(args), exact(node.params), node.errstate, dtype)
        outs = self.applied.get(key)
        if outs is None:
            row = row_for(node.op)
            # What varies is what the operands vary in: a node may be broadcast beyond them.
            varies = tuple(any(self.registers[value].varies[a] for kind, value in args if kind == "r") for a in range(len(self.shape)))
            dtypes = [node.dtype] * row.nout if row.nout == 1 else _output_dtypes(node, row.nout)
            outs = tuple(self._register(dtype, varies) for dtype in dtypes)
            self.steps.append(Apply(outs, node.op, args, node.params, node.errstate, line_of(node)))
            self.applied[key] = outs
            # float16 is computed by way of float32, however few its bytes.
            self.weight += row.weight * (4 if node.dtype == np.float16 else 1)
        return outs[node.index]


def _axis_order(operand: Operand) -> tuple[int, ...]:
    """Return the axes along which an operand moves, from its widest stride to its narrowest."""
    moving = [a for a, n in enumerate(operand.shape) if n > 1 and operand.strides[a]]
    return tuple(sorted(moving, key=lambda a: -abs(operand.strides[a])))


def memory_order(operands: Iterable[Operand], ndim: int) -> tuple[int, ...] | None:
    """Return the order of axes in which every operand lies in memory; None when they differ.

    A loop over the axes in that order goes through all of them as they lie: ``(x.T + 1).sum()`` as fast as ``(x + 1).sum()``.
    """
    orders = {_axis_order(o) for o in operands}
    longest = max(orders, key=len, default=())
    for order in orders:
        if [a for a in longest if a in order] != list(order):
            return None
    if list(longest) == sorted(longest):
        return tuple(range(ndim))
    places = iter(longest)  # axes along which nothing moves stay where they are
    return tuple(next(places) if a in longest else a for a in range(ndim))


def crossing_axes(operands: Iterable[Operand]) -> tuple[int, int] | None:
    """Return two axes that operands run along in memory, the narrowest of one and of another."""
    narrowest = dict.fromkeys(order[-1] for o in operands if len(order := _axis_order(o)) > 1)
    if len(narrowest) < 2:
        return None
    first, second, *_ = narrowest
    return first, second


def _output_dtypes(node: Elementwise, nout: int) -> list[np.dtype[Any]]:
    given = [a.dtype if isinstance(a, Expr) else a for a in node.args]
    return list(result_dtypes(row_for(node.op).numpy, given, dict(node.params)))


def _varies(shape: tuple[int, ...], space: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(n != 1 for n in (1,) * (len(space) - len(shape)) + shape)


def broadcast_operand(operand: Operand, shape: tuple[int, ...]) -> Operand:
    """Return an operand with an axis for each of ``shape``, of length 1 where it broadcasts."""
    lead = len(shape) - len(operand.shape)
    if not lead:
        return operand
    return Operand(operand.buffer, operand.offset, (1,) * lead + operand.shape, (0,) * lead + operand.strides, operand.dtype)
