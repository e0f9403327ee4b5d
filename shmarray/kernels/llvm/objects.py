"""Object code of kernels: compiled once, kept on disk for the next process, loaded where it runs.

Promises: equal kernels are compiled once per process, and once per machine where the cache directory can be written. A file of the
cache is written atomically, and used only when it is the user's own, whole, and made by this very version for this very CPU.
Never put here: code generation, plans.

    file:  MAGIC | BLAKE2b digest of the file's name and of the code, 32 bytes | object code (ELF)
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from shmarray.config import config
from shmarray.kernels.llvm.target import machine

__all__ = ["cache_directory", "load", "object_for", "optimised", "statistics"]

MAGIC = b"shmarray kernel 1\n"
MOST_KEPT = 512  # kernels whose object code this process remembers
_log = logging.getLogger("shmarray")
_mutex = threading.Lock()
_compiling = threading.Lock()  # taken before `_mutex`, which is never held for long
_objects: OrderedDict[str, bytes] = OrderedDict()
_loaded: dict[bytes, tuple[Any, int]] = {}  # digest of object code -> (what keeps it alive, address)
_counts = {"compiled": 0, "read": 0, "loaded": 0}


def statistics() -> dict[str, int]:
    """Return how many kernels this process has compiled, read from disk, and loaded."""
    return dict(_counts)


def object_for(key: str, write: Callable[[], str]) -> bytes:
    """Return the object code of what ``write`` gives in LLVM assembly, named by ``key``: from this process, from disk, or compiled now."""
    with _mutex:
        known = _objects.get(key)
        if known is not None:
            _objects.move_to_end(key)
            return known
    with _compiling:
        with _mutex:
            known = _objects.get(key)
        if known is not None:
            return known  # another thread has just made it
        path = _path(key)
        code = _read(path) if path is not None else None
        if code is not None:
            _counts["read"] += 1
        else:
            code = _compile(write())
            _counts["compiled"] += 1
            if path is not None:
                _write(path, code)
    with _mutex:
        _objects[key] = code
        while len(_objects) > MOST_KEPT:
            _objects.popitem(last=False)
    return code


def optimised(text: str) -> str:
    """Return LLVM assembly, optimised as it is compiled."""
    module = llvm.parse_assembly(text)
    _optimise(module, _target_machine())
    return str(module)


def load(code: bytes) -> int:
    """Return the address of the function in object code, which stays loaded as long as the process lives."""
    digest = hashlib.blake2b(code, digest_size=32).digest()
    with _mutex:
        found = _loaded.get(digest)
        if found is None:
            found = _loaded[digest] = _link(code)
            _counts["loaded"] += 1
        return found[1]


# -------------------------------------------------------------------------------------------------------------- compiling


def _target_machine() -> Any:
    m = machine()
    target = llvm.Target.from_triple(m.triple)
    return target.create_target_machine(cpu=m.cpu, features=m.features, opt=2, reloc="static", codemodel="large", jit=True)


def _optimise(module: Any, target: Any) -> None:
    module.verify()
    # Vectors are in the code already, and what does not change in a loop stands before it: what is left is to turn variables into
    # registers and to tidy up. LLVM's own level 1 took ten times as long and made nothing faster.
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=1))
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)


def _compile(text: str) -> bytes:
    machine()
    module = llvm.parse_assembly(text)
    target = _target_machine()
    _optimise(module, target)
    return bytes(target.emit_object(module))


def _link(code: bytes) -> tuple[Any, int]:
    machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, int(engine.get_function_address("kernel"))


# ------------------------------------------------------------------------------------------------------------ on the disk


def cache_directory() -> Path | None:
    """Return where kernels are kept: ``config.cache_directory``, else in the user's cache directory (XDG); None: nowhere."""
    if config.cache_directory is not None:
        return Path(config.cache_directory) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return home / "shmarray" / "kernels"


@cache
def _made_by() -> bytes:
    """Return what object code depends on beside the structure: versions, this package's code generator, the CPU."""
    digest = hashlib.blake2b(digest_size=32)
    m = machine()
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    for part in (version("llvmlite"), _own_version(), m.triple, m.cpu, m.features, m.isa, libc or ""):
        digest.update(part.encode() + b"\0")
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()


def _own_version() -> str:
    try:
        return version("shmarray")
    except Exception:  # run from a checkout
        return "unknown"


def _path(key: str) -> Path | None:
    try:
        directory = cache_directory()
    except RuntimeError:  # no home
        return None
    if directory is None:
        return None
    name = hashlib.blake2b(_made_by() + key.encode(), digest_size=20).hexdigest()
    return directory / f"{name}.o"


def _read(path: Path) -> bytes | None:
    """Return the object code in a file of the cache, or None when it is not there, not ours, or not whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            _log.warning("kernel cache: %s belongs to somebody else, or others may write it: compiling again", path)
            return None
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    head, digest, code = data[: len(MAGIC)], data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    return code if head == MAGIC and digest == _digest(path, code) else None


def _digest(path: Path, code: bytes) -> bytes:
    """Return what proves that a file is whole, and the kernel that its name says."""
    return hashlib.blake2b(path.name.encode() + b"\0" + code, digest_size=32).digest()


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    except (OSError, ValueError):
        return  # a full or read-only disk: the next process compiles again
    try:
        with open(descriptor, "wb") as file:
            file.write(MAGIC + _digest(path, code) + code)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
