"""An array as a ``.npy`` file that workers write and read slab by slab, with a checksum for each slab.

A slab is a box whose elements lie together in the file; which there are depends on shape and dtype alone. The format is
NumPy's (`numpy.lib.format`), always in C order.

    | magic, version, length, {'descr': ..., 'fortran_order': False, 'shape': ...}, padding | slab 0 | slab 1 | ... |
    0                                                                                 header.nbytes

Promises: writing a slab twice, as after the death of a worker, is writing it once; what is read is what was written, or
`DamagedFile` says where it is not. Nothing of a file is read or written in the driver but the header.
Never put here: directories, what files belong together, running plans.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from shmarray.chunks import Chunks
from shmarray.errors import DamagedFile
from shmarray.expr import Block, BlockOperation, Expr, make
from shmarray.region import Box
from shmarray.tiles import Edges, Grid, edges_of, slab_sizes

__all__ = ["File", "WriteError", "header_of", "read", "slabs_of", "storable_descr", "write"]

NDArray = np.ndarray[Any, Any]

SLAB_NBYTES = 1 << 20  # few enough checksums, small enough to be in cache when they are taken
ALIGNMENT = 64  # of the first element, as NumPy does it


class WriteError(OSError):
    """Writing a file failed: not what an array that is computed as it is written raised."""


@dataclass(frozen=True, slots=True)
class File:
    """Where an array lies: ``offset`` is the length of the header."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        """The length of the whole file."""
        return self.offset + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def storable_descr(dtype: np.dtype[Any], what: str) -> Any:
    """Return what the header says of a dtype. Raises TypeError for one that would come back as another."""
    if dtype.hasobject or dtype.kind == "T" or not dtype.itemsize:
        raise TypeError(f"{what} has dtype {dtype}: a .npy file holds elements that are plain bytes, at least one each. Convert it first.")
    descr = np.lib.format.dtype_to_descr(dtype)
    if np.lib.format.descr_to_dtype(descr) != dtype:
        raise TypeError(f"{what} has dtype {dtype}, which a .npy file would give back as {descr!r}. Save x.view(...) of a NumPy dtype.")
    return descr


def header_of(shape: tuple[int, ...], descr: Any) -> bytes:
    """Return the header of a file in C order."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape})
    try:
        encoded, version = text.encode("latin1"), 1
    except UnicodeEncodeError:
        encoded, version = text.encode("utf8"), 3
    if version == 1 and len(encoded) > 65_000:
        version = 2
    start = np.lib.format.magic(version, 0)
    length = "<H" if version == 1 else "<I"
    used = len(start) + struct.calcsize(length) + len(encoded) + 1
    encoded += b" " * (-used % ALIGNMENT) + b"\n"
    return start + struct.pack(length, len(encoded)) + encoded


def slabs_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Chunks:
    """Return the sizes of the slabs along each axis; in C order of their grid they follow each other in the file."""
    sizes = slab_sizes(shape, SLAB_NBYTES // max(1, dtype.itemsize))
    return tuple((*(s,) * (n // s), *((n % s,) if n % s else ())) for n, s in zip(shape, sizes, strict=True))


def write(x: Expr, file: File, slabs: Chunks) -> Expr:
    """Return the expression whose values are the checksums of the slabs, and whose computing writes them over ``file``, which is there."""
    operation = _Write(file, slabs)
    return make(Block, (operation.slabs.ntasks,), np.dtype(np.uint32), operation, (x,), ("write", operation))


def read(file: File, slabs: Chunks, checksums: NDArray) -> Expr:
    """Return the array in ``file``, whose slabs have these checksums."""
    operation = _Read(file, slabs, checksums)
    return make(Block, file.shape, file.dtype, operation, (), ("read", operation))


class _Write(BlockOperation):
    """Element k of the output is the checksum of slab k, which is in the file by then."""

    def __init__(self, file: File, slabs: Chunks) -> None:
        self.file = file
        self.slabs = Grid.of(edges_of(slabs))
        self.name = f"write {os.path.basename(file.path)}"

    def grid(self) -> Chunks:
        return ((1,) * self.slabs.ntasks,)

    def needs(self, at: Box) -> tuple[Box, ...]:
        return (self.slabs.box(at[0].start),)

    def asks_once(self, k: int) -> Edges | None:
        return self.slabs.edges

    def run(self, out: NDArray, inputs: tuple[NDArray, ...], at: Box) -> None:
        data = _bytes_of(np.ascontiguousarray(inputs[0]))
        offset = _offset(self.file, self.slabs.box(at[0].start))
        try:
            with _opened(self.file.path, os.O_WRONLY) as file:
                done = 0
                while done < len(data):
                    done += os.pwrite(file, data[done:], offset + done)
        except OSError as error:
            raise WriteError(error.errno, error.strerror, self.file.path) from error
        out[0] = zlib.crc32(data)

    def scratch(self, at: Box) -> int:
        return self.slabs.items_per_task * self.file.dtype.itemsize

    def cost(self, at: Box) -> int:
        return max(1, 2 * self.slabs.items_per_task * self.file.dtype.itemsize)

    def label(self, at: Box) -> str:
        return super().label(self.slabs.box(at[0].start))


class _Read(BlockOperation):
    """The slabs of a file, looked at as they are read."""

    def __init__(self, file: File, slabs: Chunks, checksums: NDArray) -> None:
        self.file, self.sizes, self.checksums = file, slabs, checksums
        self.counts = tuple(len(sizes) for sizes in slabs)
        self.edges = edges_of(slabs)
        self.name = f"read {os.path.basename(file.path)}"

    def grid(self) -> Chunks:
        return self.sizes

    def needs(self, at: Box) -> tuple[Box, ...]:
        return ()

    def run(self, out: NDArray, inputs: tuple[NDArray, ...], at: Box) -> None:
        values = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        data = _bytes_of(values)
        offset = _offset(self.file, at)
        where = f"bytes {offset} to {offset + len(data)} of {self.file.path}"
        try:
            with _opened(self.file.path, os.O_RDONLY) as file:
                done = 0
                while done < len(data):
                    count = os.preadv(file, [data[done:]], offset + done)
                    if not count:
                        raise DamagedFile(f"{where} end after {done}")
                    done += count
        except OSError as error:
            raise DamagedFile(f"{where} cannot be read: {error}") from error
        index = tuple([bisect_left(edges, piece.start) for edges, piece in zip(self.edges, at, strict=True)])
        found, expected = zlib.crc32(data), int(self.checksums.reshape(self.counts)[index])
        if found != expected:
            raise DamagedFile(f"{where} have the checksum {found:08x}, not {expected:08x}")
        if values is not out:
            np.copyto(out, values)

    def scratch(self, at: Box) -> int:
        return int(np.prod([s.stop - s.start for s in at], dtype=object)) * self.file.dtype.itemsize

    def cost(self, at: Box) -> int:
        return max(1, 2 * self.scratch(at))


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    # Never O_CREAT: a task of a plan that was given up must not bring back a file that was removed meanwhile.
    file = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _bytes_of(values: NDArray) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _offset(file: File, at: Box) -> int:
    number = 0
    for n, piece in zip(file.shape, at, strict=True):
        number = number * n + piece.start
    return file.offset + number * file.dtype.itemsize
