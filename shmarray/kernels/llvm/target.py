"""What this machine offers compiled kernels: its CPU, and the vector variants of libm's functions in glibc's libmvec.

Asked once per process. Never put here: code generation, files.

libmvec's names are those of the vector function ABI, ``_ZGV<isa>N<lanes>v..._<function>``: "b" SSE (16 bytes), "d" AVX2 (32), "e"
AVX-512 (64) on x86-64 (https://sourceware.org/glibc/wiki/libmvec), "n" Advanced SIMD (16) on aarch64.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np

__all__ = ["Machine", "machine"]

_ISAS = {  # isa letter -> bytes of a vector
    "x86_64": (("e", 64, ("avx512f", "avx512dq")), ("d", 32, ("avx2", "fma")), ("b", 16, ())),
    "aarch64": (("n", 16, ()),),
}


@dataclass(frozen=True)
class Machine:
    """The CPU as LLVM names it, and which vector functions there are."""

    triple: str
    cpu: str
    features: str
    isa: str  # "" where there is no libmvec
    vector_nbytes: int
    library: Any = field(repr=False, compare=False, default=None)

    @property
    def has_half(self) -> bool:
        """Whether float16 converts to and from float32 in hardware."""
        return "+f16c" in self.features or platform.machine() == "aarch64"

    def vector_function(self, name: str, dtype: np.dtype[Any], nargs: int) -> tuple[str, int] | None:
        """Return (symbol, lanes) of the vector variant of libm's ``name`` (of doubles; floats get its ``f``), or None."""
        if not self.isa:
            return None
        lanes = self.vector_nbytes // dtype.itemsize
        symbol = f"_ZGV{self.isa}N{lanes}{'v' * nargs}_{name}{'f' if dtype.itemsize == 4 else ''}"
        return (symbol, lanes) if hasattr(self.library, symbol) else None


@cache
def machine() -> Machine:
    """Return this machine."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features()
    library, isa, nbytes = None, "", 16
    try:
        library = ctypes.CDLL("libmvec.so.1")
        llvm.load_library_permanently("libmvec.so.1")
    except (OSError, RuntimeError):
        library = None
    for letter, width, needed in _ISAS.get(platform.machine(), ()):
        if all(features.get(f) for f in needed):
            nbytes = width
            if library is not None:
                isa = letter
            break
    return Machine(llvm.get_default_triple(), cpu, features.flatten(), isa, nbytes, library)
