"""The fused program: what one task does to a box of its iteration space, as plain values, for every engine.

An iteration space is the shape that all operands of a layer share, after broadcasting. A program reads operands and fills
(positions to values), applies rows of the elementwise table to registers, and stores registers.

    operands   buffer + offset + strides per iteration axis (length 1 where it broadcasts); or a *source*, of the shape of the
               space, that makes each tile of it within the task, in scratch
    registers  one value per step; `varies` says along which axes it is more than one element wide
    steps      Load, FillStep, Apply, Store: in order, each register written once

Never put here: how a step is executed (`kernels.numpy`), addresses (buffers are numbers until a task runs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shmarray.expr import FillOperation
from shmarray.region import Box, IndexMap

if TYPE_CHECKING:
    from scheduler.task import Context

__all__ = ["NO_BUFFER", "Apply", "Constant", "FillStep", "Load", "Operand", "Program", "Register", "Source", "Step", "Store"]

NO_BUFFER = -1


class Source(Protocol):
    """What makes an operand within the task (`kernels.sources`): a plain value, like a kernel; equal when it is the same object."""

    @property
    def loads(self) -> tuple[Operand, ...]:
        """What lies in buffers and is read to make it."""

    def scratch(self, sizes: tuple[int, ...]) -> int:
        """Return the bytes needed to make a tile of ``sizes``, beside the tile."""

    def open(self, context: Context) -> Callable[[np.ndarray[Any, Any], Box], None]:
        """Return the function that fills an array with a box; called once per process, plan and layer."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A strided array in a buffer, axis by axis of the iteration space.

    With a ``source`` it lies nowhere (``buffer`` is `NO_BUFFER`, the strides are those of a C-ordered array): an engine has its
    tiles made.
    """

    buffer: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    source: Source | None = None

    def view(self, map: IndexMap) -> Operand:
        """Return the operand that ``map`` makes of this one."""
        assert self.source is None, "what is made in the task has no views"
        offset, strides = map.apply_strides(self.strides)
        return Operand(self.buffer, self.offset + offset, map.shape, strides, self.dtype)

    def permuted(self, order: tuple[int, ...]) -> Operand:
        """Return the operand with its axes in another order."""
        if self.source is not None:
            assert list(order) == sorted(order), "what is made in the task has its axes in C order"
            return self
        shape, strides = tuple(self.shape[a] for a in order), tuple(self.strides[a] for a in order)
        return Operand(self.buffer, self.offset, shape, strides, self.dtype)


@dataclass(frozen=True, slots=True)
class Register:
    dtype: np.dtype[Any]
    varies: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Load:
    out: int
    operand: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A NumPy scalar, one for the whole space."""

    out: int
    value: np.generic


@dataclass(frozen=True, slots=True)
class FillStep:
    """Values made from position; ``map`` leads from the iteration space to the fill's own index space."""

    out: int
    operation: FillOperation
    map: IndexMap


@dataclass(frozen=True, slots=True)
class Apply:
    """Row ``name`` on ``args``, each a register ("r", number) or a scalar ("c", value)."""

    outs: tuple[int, ...]
    name: str
    args: tuple[tuple[str, Any], ...]
    params: tuple[tuple[str, Any], ...]
    errstate: tuple[tuple[str, str], ...]
    line: str


@dataclass(frozen=True, slots=True)
class Store:
    register: int
    operand: int


Step = Load | Constant | FillStep | Apply | Store


@dataclass(frozen=True, slots=True)
class Program:
    shape: tuple[int, ...]
    operands: tuple[Operand, ...]
    registers: tuple[Register, ...]
    steps: tuple[Step, ...]

    @property
    def loads(self) -> tuple[Operand, ...]:
        """The operands in buffers that are read, also by what makes the others."""
        found: list[Operand] = []
        for operand in (self.operands[step.operand] for step in self.steps if isinstance(step, Load)):
            found.extend((operand,) if operand.source is None else operand.source.loads)
        return tuple(found)

    @property
    def made(self) -> tuple[Operand, ...]:
        """The operands that are made within the task."""
        return tuple(operand for operand in self.operands if operand.source is not None)

    def scratch(self, sizes: tuple[int, ...]) -> int:
        """Return the bytes that what is made within the task takes, for a tile of ``sizes``."""
        items = math.prod(sizes)
        return sum(items * o.dtype.itemsize + o.source.scratch(sizes) for o in self.operands if o.source is not None)

    @property
    def stores(self) -> tuple[Operand, ...]:
        """The operands that are written."""
        return tuple(self.operands[step.operand] for step in self.steps if isinstance(step, Store))

    @property
    def updated(self) -> tuple[int, ...]:
        """The operands, by number, that are written where the program reads: what makes a layer one that works in place."""
        read = set(self.loads)
        stored = dict.fromkeys(step.operand for step in self.steps if isinstance(step, Store))
        return tuple(k for k in stored if self.operands[k] in read)

    def permuted(self, order: tuple[int, ...]) -> Program:
        """Return the same program with its axes in another order: axis k of the result is axis ``order[k]``."""
        steps = tuple(
            FillStep(step.out, step.operation, step.map.permuted(order)) if isinstance(step, FillStep) else step for step in self.steps
        )
        registers = tuple(Register(r.dtype, tuple(r.varies[a] for a in order)) for r in self.registers)
        return Program(tuple(self.shape[a] for a in order), tuple(o.permuted(order) for o in self.operands), registers, steps)

    def check(self) -> None:
        """Assert that each register is written once, before it is read, and that operands fit the space."""
        written: set[int] = set()
        for step in self.steps:
            match step:
                case Store():
                    assert step.register in written
                    assert self.operands[step.operand].shape == self.shape
                    continue
                case Apply():
                    assert all(value in written for kind, value in step.args if kind == "r")
                    outs = step.outs
                case _:
                    outs = (step.out,)
            assert not written.intersection(outs)
            written.update(outs)
        for operand in self.operands:
            assert operand.source is None or operand.shape == self.shape, (operand.shape, self.shape)
            assert all(n in (1, m) for n, m in zip(operand.shape, self.shape, strict=True)), (operand.shape, self.shape)
