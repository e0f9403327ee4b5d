"""What the code of a kernel depends on, and where its arguments stand: plain values, for whoever writes the code and whoever calls it.

    args (int64 words):  operand addresses | counts per loop | strides per operand and loop | scalars, 16 bytes each
                         | scratch | state addresses | per loop: stride of states in items, stride of places | first place
                         | where operands are updated: the words of `Arguments.first_step` and behind it

An operand that is *updated* is read where it is written. Its results go into the lane's redo slot (`scheduler.redo`) step by step, a
step being some rows of the inner loop, or part of one; the words say which steps, where the cursor lies and what it is to say.

Never put here: LLVM, addresses.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "BLOCK_ITEMS",
    "FLAGS",
    "LEAF_STRIPS",
    "MOST_LEVELS",
    "STEP_NBYTES",
    "STRIP_ALIGNMENT",
    "Arguments",
    "FoldForm",
    "OperandForm",
    "StepForm",
    "Structure",
]

# fenv.h's numbers of what the processor notes, by np.errstate's names.
FLAGS = {"invalid": 1, "divide": 2, "over": 4} if platform.machine() == "aarch64" else {"invalid": 1, "divide": 4, "over": 8}
LEAF_STRIPS = 128  # strips (or rows) of a leaf: a lane adds so many values one after the other, pairs of leaves above
MOST_LEVELS = 40  # of the tree: 2**40 leaves
STRIP_ALIGNMENT = 64  # bytes: a line of cache, and the widest vector
STEP_NBYTES = 2048  # of a step's results, of the widest of them: they stay in the first cache until they are copied
BLOCK_ITEMS = 1024  # items of the inner loop that a reduction across it keeps accumulators for: they stay in the first cache


@dataclass(frozen=True, slots=True)
class OperandForm:
    """How an operand is reached: ``inner`` is "still", "forward", "backward" or "strided"; ``moves``: in which loops it moves.

    ``streams``: stored past the caches, every strip at a multiple of `STRIP_ALIGNMENT`.
    """

    dtype: str
    inner: str
    moves: tuple[bool, ...]
    is_loaded: bool
    is_stored: bool
    streams: bool = False


@dataclass(frozen=True, slots=True)
class StepForm:
    """``kind`` "load" (operand), "scalar" (slot), "apply" or "store" (operand). ``args``: ("r", register), ("s", slot) or ("v", value)."""

    kind: str
    outs: tuple[int, ...]
    place: int = -1
    name: str = ""
    args: tuple[tuple[str, Any], ...] = ()
    dtypes: tuple[str, ...] = ()  # operands are cast to
    results: tuple[str, ...] = ()
    params: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class FoldForm:
    kind: str
    register: int
    given: str
    states: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Structure:
    """What the code of a kernel depends on, as plain values: equal structures share one compiled kernel."""

    lanes: int
    reduced: tuple[bool, ...]  # per loop, outermost first
    operands: tuple[OperandForm, ...]
    registers: tuple[tuple[str, bool], ...]  # dtype, whether it varies along the inner loop
    steps: tuple[StepForm, ...]
    nscalars: int
    folds: tuple[FoldForm, ...] = ()
    updated: tuple[int, ...] = ()  # operands whose results go through the redo slot

    @property
    def step_items(self) -> int:
        """The most items of a step of an update."""
        widest = max(np.dtype(self.operands[k].dtype).itemsize for k in self.updated)
        return max(1, STEP_NBYTES // (widest * self.lanes)) * self.lanes


class Arguments:
    """Where each argument stands, in int64 words."""

    def __init__(self, s: Structure) -> None:
        operands, loops = len(s.operands), len(s.reduced)
        self.loops = loops
        self.counts = operands
        self.strides = self.counts + loops
        self.scalars = self.strides + operands * loops
        self.scratch = self.scalars + 2 * s.nscalars
        self.states = self.scratch + 1
        self.state_strides = self.states + sum(len(f.states) for f in s.folds)
        self.place_strides = self.state_strides + loops
        self.first_place = self.place_strides + loops
        # Of updates: the number of the call's first step, of the first one to do, and of the one to stop before (which the code sets to
        # the one it did stop before); the flags to stop at; rows and items of the inner loop in a step; the cursor's address; its word
        # in step 0, while results are computed and while they are copied, and what a step adds to it.
        self.number = self.first_place + 1
        self.first_step, self.stop, self.mask, self.rows, self.width = range(self.number + 1, self.number + 6)
        self.cursor, self.computing, self.copying, self.each = range(self.width + 1, self.width + 5)
        # For each updated operand: the addresses of its results, and of pointer and shape in its record.
        self.results = self.each + 1
        self.pointers = self.results + len(s.updated)
        self.shapes = self.pointers + len(s.updated)
        self.count = self.shapes + len(s.updated)

    def stride(self, operand: int, loop: int) -> int:
        return self.strides + operand * self.loops + loop
