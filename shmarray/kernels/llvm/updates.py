"""The loops of a kernel that updates operands in place: step by step, each exactly once, as `scheduler.redo` has it.

    for outer loops:
      for rows, some at a time; for items of the inner loop, some at a time:    a step
        not before `first_step`, and before `stop`:
          for rows: strips: load, compute, store into the slot
          flags to stop at: this is where to stop
          record where the results belong | cursor: COPY | slot -> target | cursor: COMPUTE the next step

A step takes several rows only where it has them whole, so steps are ranges of the items in the order of the loops. While a step is copied,
operands of the next one are asked for: else memory would have nothing to do meanwhile.

Whoever finds the cursor after this process's end has to find its stores in the order of the code. LLVM would change that, but for the
fences. A processor may, too, above all for those past the caches; but nobody is told of a process's end before its processor was in the
kernel, where locks and barriers have brought all that it stored to where others see it. That is no more than a prefix of the code's
stores, and no less than all that were stored before the last one of the cursor.

Never put here: what the words of the slot mean beside the addresses that are given.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from shmarray.kernels.llvm.lanes import I1, I8, I32, I64
from shmarray.kernels.llvm.structure import STRIP_ALIGNMENT
from shmarray.kernels.llvm.writer import PTR, Writer, i32, i64

__all__ = ["map_in_steps"]

LINE_NBYTES = 64  # of cache: one prefetch each


def map_in_steps(w: Writer) -> None:
    build, args = w.builder, w.args
    inner = len(w.s.reduced) - 1
    row_loop = inner - 1  # -1: there is none
    number, stop = w.variable(I64), w.variable(I64)
    build.store(w.argument(args.number), number)
    build.store(w.argument(args.stop), stop)
    first, mask = w.argument(args.first_step), build.trunc(w.argument(args.mask), I32)
    rows, width = w.argument(args.rows), w.argument(args.width)
    nrows = w.counts[row_loop] if row_loop >= 0 else i64(1)
    slots = [build.inttoptr(w.argument(args.results + n), PTR) for n in range(len(w.s.updated))]
    with w.loops(range(max(0, row_loop)), w.pointers) as (there, _), w.loop(nrows, rows) as top, w.loop(w.counts[inner], width) as low:
        step = build.load(number, typ=I64)
        is_wanted = build.and_(build.icmp_signed(">=", step, first), build.icmp_signed("<", step, build.load(stop, typ=I64)))
        with w.when(is_wanted):
            some_rows, some = _least(w, build.sub(nrows, top), rows), _least(w, build.sub(w.counts[inner], low), width)
            here = [_forward(w, _forward(w, p, k, row_loop, top), k, inner, low) for k, p in enumerate(there)]
            with w.loop(some_rows) as row:
                w.results = {k: _result(w, k, slots[n], build.mul(row, some), some) for n, k in enumerate(w.s.updated)}
                w.strips([_forward(w, p, k, row_loop, row) for k, p in enumerate(here)], some, lambda j, row: None)
            raised = build.icmp_unsigned("!=", build.and_(w.raised(), mask), i32(0))
            with w.when(raised):
                build.store(step, stop)
            with w.when(build.xor(raised, ir.Constant(I1, 1))):
                _commit(w, step, here, slots, some_rows, some)
        build.store(build.add(step, i64(1)), number)
    address = build.gep(w.function.args[0], [i64(args.stop)], source_etype=I64)
    build.store(build.load(stop, typ=I64), address)


def _commit(w: Writer, step: ir.Value, here: list[ir.Value], slots: list[ir.Value], rows: ir.Value, count: ir.Value) -> None:
    """Bring the results of a step, which are whole in the slot, to their places."""
    build, args = w.builder, w.args
    row_loop, updated = len(w.s.reduced) - 2, w.s.updated
    targets = [_lowest(w, k, here[k], count) for k in updated]
    for n, target in enumerate(targets):
        build.store(build.ptrtoint(target, I64), build.inttoptr(w.argument(args.pointers + n), PTR))
        shape = build.inttoptr(w.argument(args.shapes + n), PTR)
        build.store(rows, shape)
        build.store(count, w.at(shape, i64(8)))
    _say(w, args.copying, step)
    ahead = _next_step(w, here, rows, count)
    whole = build.and_(count, i64(-w.s.lanes))
    with w.loop(rows) as row:
        for n, (k, target, slot) in enumerate(zip(updated, targets, slots, strict=True)):
            source = w.at(slot, build.mul(build.mul(row, count), i64(_itemsize(w, k))))
            place = _forward(w, target, k, row_loop, row)
            with w.loop(whole, w.s.lanes) as j:
                _copy_strip(w, k, source, place, j)
                for operand, pointer in ahead.items() if n == 0 else ():
                    _prefetch(w, operand, _forward(w, pointer, operand, row_loop, row), j)
            with w.loop(build.sub(count, whole)) as j:
                _copy_item(w, k, source, place, build.add(whole, j))
    _say(w, args.computing, build.add(step, i64(1)))


def _say(w: Writer, phase: int, step: ir.Value) -> None:
    """Set the cursor, after all that is stored before, and before all that is stored behind."""
    build = w.builder
    word = build.add(w.argument(phase), build.mul(step, w.argument(w.args.each)))
    build.fence("seq_cst", "singlethread")  # binds the compiler alone, and costs nothing
    # Not a plain store: LLVM may take one away that another follows.
    build.store_atomic(word, build.inttoptr(w.argument(w.args.cursor), ir.PointerType(I64)), "monotonic", 8)
    build.fence("seq_cst", "singlethread")


def _copy_strip(w: Writer, operand: int, source: ir.Value, target: ir.Value, j: ir.Value) -> None:
    """Copy a whole strip of results from item ``j`` on to its place."""
    build, o, size = w.builder, w.s.operands[operand], _itemsize(w, operand)
    if o.inner == "strided":
        for lane in range(w.s.lanes):
            _copy_item(w, operand, source, target, build.add(j, i64(lane)))
        return
    at = build.mul(j, i64(size))
    value = build.load(w.at(source, at), typ=ir.VectorType(I8, w.s.lanes * size))
    value.align = 1
    store = build.store(value, w.at(target, at), align=STRIP_ALIGNMENT if o.streams else 1)
    if o.streams:
        w.stream(store)


def _copy_item(w: Writer, operand: int, source: ir.Value, target: ir.Value, item: ir.Value) -> None:
    build, size = w.builder, _itemsize(w, operand)
    stride: ir.Value = i64(size)
    if w.s.operands[operand].inner == "strided":
        stride = w.argument(w.args.stride(operand, len(w.s.reduced) - 1))
    value = build.load(w.at(source, build.mul(item, i64(size))), typ=ir.IntType(8 * size))
    value.align = 1
    build.store(value, w.at(target, build.mul(item, stride)), align=1)


def _next_step(w: Writer, here: list[ir.Value], rows: ir.Value, count: ir.Value) -> dict[int, ir.Value]:
    """Return, for operands whose items lie side by side, where the next step begins, if it does not begin in another row or round."""
    build, inner = w.builder, len(w.s.reduced) - 1
    is_part_of_row = build.icmp_signed("<", count, w.counts[inner])
    found = {}
    for k, o in enumerate(w.s.operands):
        if o.is_loaded and o.inner in ("forward", "backward"):
            along = _forward(w, here[k], k, inner, count)
            found[k] = build.select(is_part_of_row, along, _forward(w, here[k], k, inner - 1, rows))
    return found


def _prefetch(w: Writer, operand: int, row: ir.Value, j: ir.Value) -> None:
    """Ask for a strip of an operand from item ``j`` of a row on. It may lie behind the operand's end: then nothing happens."""
    build, size = w.builder, _itemsize(w, operand)
    sign = -1 if w.s.operands[operand].inner == "backward" else 1
    for line in range(0, size * w.s.lanes, LINE_NBYTES):
        address = w.at(row, build.add(build.mul(j, i64(sign * size)), i64(sign * line)))
        w.lanes.call("llvm.prefetch.p0", ir.VoidType(), address, i32(0), i32(3), i32(1))  # to read; to every cache; data


def _least(w: Writer, a: ir.Value, b: ir.Value) -> ir.Value:
    return w.builder.select(w.builder.icmp_signed("<", a, b), a, b)


def _forward(w: Writer, pointer: ir.Value, operand: int, loop: int, index: ir.Value) -> ir.Value:
    return pointer if loop < 0 else w.step_by(pointer, operand, loop, index)


def _itemsize(w: Writer, operand: int) -> int:
    return np.dtype(w.s.operands[operand].dtype).itemsize


def _result(w: Writer, operand: int, slot: ir.Value, first: ir.Value, count: ir.Value) -> ir.Value:
    """Return where, in the slot, the result for the first item of a row of ``count`` items lies, ``first`` items behind the step's first.

    A row lies there as it does in the target's memory, without gaps: where the loop goes backward, its first item is the last.
    """
    build = w.builder
    if w.s.operands[operand].inner == "backward":
        first = build.add(first, build.sub(count, i64(1)))
    return w.at(slot, build.mul(first, i64(_itemsize(w, operand))))


def _lowest(w: Writer, operand: int, pointer: ir.Value, count: ir.Value) -> ir.Value:
    """Return where a row of ``count`` items of the target, whose first is at ``pointer``, begins in memory."""
    if w.s.operands[operand].inner != "backward":
        return pointer
    return w.at(pointer, w.builder.mul(w.builder.sub(count, i64(1)), i64(-_itemsize(w, operand))))
