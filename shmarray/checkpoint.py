"""Checkpoints: arrays that belong together, on disk as a whole or not at all.

    path/
        step-000000000100/          a checkpoint; one is whole from the instant it has this name
            u.npy  v.npy            NumPy's format
            checkpoint.json         step, time, other values; of each array shape, dtype, checksums
        step-000000000200/
        .saving-1f0c...7a.lock      locked (flock) by a writer as long as it lives
        .saving-1f0c...7a/          its own: new/ will be renamed, what is removed is moved here first

Promises: whoever is killed whenever, and whatever becomes of the disk's last writes, the newest whole checkpoint is found; all bytes
and checksums are on the disk before a checkpoint has its name; nothing of a living writer is swept away, by whichever machine.
Relies on `npy` for the files. Never put here: how arrays are written and read, formats of one array.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import operator
import os
import re
import secrets
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shmarray import compute as running
from shmarray import npy
from shmarray.chunks import normalize_chunks
from shmarray.errors import CheckpointError, DamagedFile
from shmarray.handle import Handle, as_handle, wrap, wrap_stored
from shmarray.shared_memory import _tuples, lease_of, stored

__all__ = ["Checkpoint", "CheckpointInfo", "list_checkpoints", "load_checkpoint", "save_checkpoint"]

NDArray = np.ndarray[Any, Any]

FORMAT = "shmarray checkpoint"
VERSION = 1
MANIFEST = "checkpoint.json"
MOST_STEPS = 10**12
_NAME = re.compile(r"step-(\d{12})(?:\.(\d+))?")
_LOCK = re.compile(r"\.saving-[0-9a-f]{16}\.lock")
_log = logging.getLogger("shmarray")


# ---------------------------------------------------------------------------------------------------- what users hold


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Any]):
    """What `load_checkpoint` found: a mapping from names to stored arrays, NumPy scalars and plain values, as they were saved.

    ``time`` is when it was saved, in UTC; ``path`` the directory that it lies in.
    """

    step: int
    path: str
    time: datetime.datetime
    values_by_name: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        try:
            return self.values_by_name[name]
        except KeyError:
            raise KeyError(f"{name!r}: the checkpoint of step {self.step} holds {', '.join(self.values_by_name) or 'nothing'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __repr__(self) -> str:
        return f"<Checkpoint of step {self.step}: {', '.join(self)}>"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint in a directory. ``problem`` is empty where a look at its files, not at their bytes, finds nothing wrong."""

    step: int
    path: str
    time: datetime.datetime | None
    nbytes: int
    names: tuple[str, ...]
    problem: str


def save_checkpoint(path: str | os.PathLike[str], /, step: int = 0, *, keep: int | None = 2, **values: Any) -> str:
    """Save arrays and values that belong together as checkpoint ``step`` in the directory ``path``; return the checkpoint's own.

    ``values`` are arrays of this package, stored or lazy (those are computed, together, as they are written), NumPy arrays and
    scalars, and what JSON has: None, bool, int, float, str, lists, dicts with names. Any dtype but object. All cells of stored
    arrays are locked to read until their bytes are out of memory, so that none of them changes meanwhile. Worker processes write,
    a slab of 1 MiB at a time, with its CRC-32. The checkpoint is on the disk when this returns; until then, whatever happens, the
    directory holds what it held before. One of the same step is replaced. Of older steps the newest ``keep - 1`` whole ones stay;
    None: all stay. Those of later steps are never touched.

    Raises TypeError for what cannot be saved, ValueError for a bad step, ``keep`` or name, OSError when the disk is full or fails, and
    what computing raises.

    >>> import shmarray as sa, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> u = sa.zeros((100, 100)).persist()
    >>> for step in range(1, 11):
    ...     u += 1
    ...     if step % 5 == 0:
    ...         path = sa.save_checkpoint(directory, step, u=u, t=step * 0.1)
    >>> sa.load_checkpoint(directory)
    <Checkpoint of step 10: u, t>
    """
    root = os.path.abspath(os.fspath(path))
    number = _checked_step(step)
    if keep is not None and operator.index(keep) < 1:
        raise ValueError(f"save_checkpoint(keep={keep}): keep at least 1 checkpoint, the one that is saved, or None for all")
    arrays, plain = _sorted_out(values)
    what = f"saving checkpoint {number} in {root!r}"
    with contextlib.ExitStack() as stack:
        with _explained(what, root):
            _make_directory(root)
            _sweep(root)
            own = stack.enter_context(_own_directory(root))
            new = os.path.join(own, "new")
            os.mkdir(new)
            files = [_Written(given, new, stack) for given in arrays]
        full = [file for file in files if file.given.array.size]
        try:
            found = running.compute(*(file.checksums() for file in full))
        except npy.WriteError as error:  # what else computing may raise is not about the files
            with _explained(what, root):
                raise OSError(error.errno, error.strerror, error.filename) from error
        with _explained(what, root):
            for file in files:
                os.fsync(file.number)
            checksums = dict(zip((file.given.name for file in full), found, strict=True))
            entries = {file.given.name: file.entry(checksums.get(file.given.name)) for file in files}
            _write_manifest(new, number, [*values], entries, plain, stack)
            _sync(new)
            with _alone(root):
                place = _publish(own, root, number)
                if keep is not None:
                    _prune(own, root, number, keep - 1)
            return place


def load_checkpoint(path: str | os.PathLike[str], /, step: int | None = None) -> Checkpoint:
    """Return the newest whole checkpoint in the directory ``path``; with ``step`` exactly that one.

    "Newest" is the one of the highest step. Arrays come as stored ones, with the chunks they had; worker processes read them and
    look at the checksum of every slab. A checkpoint that is torn, or of which a byte has changed, is passed over with a
    RuntimeWarning that says what is wrong with it.

    Raises FileNotFoundError when there is none, CheckpointError when there are but none is whole, MemoryBudgetError or SpillError
    when it does not fit.
    """
    root = os.path.abspath(os.fspath(path))
    problems: dict[tuple[str, tuple[int, ...]], str] = {}  # of those that were tried
    wanted = None if step is None else _checked_step(step)
    while True:
        # Anew each time: a writer may have replaced it, or removed what it no longer keeps, when something newer was there.
        names = [name for name in _names(root) if wanted in (None, _step_of(name))]
        found = [(name, _identity(os.path.join(root, name))) for name in names]
        untried = [one for one in found if one not in problems]
        if not untried:
            break
        name, identity = untried[0]
        if not identity:
            continue  # it went between the two looks
        directory = os.path.join(root, name)
        try:
            return _load(directory)
        except DamagedFile as error:
            problems[name, identity] = str(error)
        if _identity(directory) != identity:
            problems[name, identity] += " (it was removed meanwhile)"
        elif step is None:
            warnings.warn(f"the checkpoint {directory} is passed over: {problems[name, identity]}", RuntimeWarning, stacklevel=2)
    if not problems:
        there = sorted({_step_of(n) for n in _names(root)})
        which = f"no checkpoint of step {step}" if step is not None and there else "no checkpoint"
        steps = f"; there are those of steps {', '.join(map(str, there[-10:]))}" if there else ""
        raise FileNotFoundError(errno.ENOENT, f"{which} in this directory{steps}", root)
    listed = "".join(f"\n  {name}: {problem}" for (name, _), problem in problems.items())
    raise CheckpointError(f"loading {'a checkpoint' if step is None else f'checkpoint {step}'} from {root!r}: none is whole.{listed}")


def list_checkpoints(path: str | os.PathLike[str], /) -> list[CheckpointInfo]:
    """Return what checkpoints there are in the directory ``path``, by step; an empty list when there are none, or no directory.

    Looks at names and lengths of files, and at the JSON file, not at the bytes of arrays.
    """
    root = os.path.abspath(os.fspath(path))
    found = []
    for name in reversed(_names(root)):
        directory = os.path.join(root, name)
        try:
            manifest = _manifest(directory)
        except DamagedFile as error:
            found.append(CheckpointInfo(_step_of(name), directory, None, 0, (), str(error)))
            continue
        nbytes = sum(_file(directory, name, entry).nbytes for name, entry in manifest["arrays"].items())
        time = datetime.datetime.fromisoformat(manifest["time"])
        found.append(CheckpointInfo(manifest["step"], directory, time, nbytes, tuple(manifest["names"]), ""))
    return found


# ------------------------------------------------------------------------------------------------------ what is given


@dataclass(frozen=True, slots=True)
class _Given:
    """An array to be saved, and what its file will say of it."""

    name: str
    array: Any  # an Array
    is_scalar: bool
    descr: Any


def _checked_step(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(
            f"a checkpoint of step {step!r}: steps are whole numbers, not a {type(step).__name__}; save the time as a value"
        ) from None
    if not 0 <= number < MOST_STEPS:
        raise ValueError(f"a checkpoint of step {step}: steps are whole numbers from 0 to {MOST_STEPS - 1}")
    return number


def _sorted_out(values: Mapping[str, Any]) -> tuple[list[_Given], dict[str, Any]]:
    """Return (arrays, plain values); raise for what can be neither."""
    arrays = []
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if not re.fullmatch(r"\w[\w.-]{0,199}", name):
            raise ValueError(f"save_checkpoint({name!r}=...): names become names of files; use letters, digits, '_', '-' and '.'")
        if isinstance(value, (Handle, np.ndarray, np.generic)):
            arrays.append(_given(name, value))
        else:
            _check_plain(value, f"save_checkpoint({name}=...)")
            plain[name] = value
    return arrays, plain


def _given(name: str, value: Any) -> _Given:
    descr = npy.storable_descr(value.dtype, f"save_checkpoint({name}=...)")
    array = stored(value) if lease_of(value) is not None else as_handle(np.asarray(value) if isinstance(value, np.generic) else value)
    if array._storage is not None:
        # Whatever is there when all cells are locked, not what was there when this line was reached.
        array = wrap_stored(array._storage, array._layout, array.chunks, live=True)
    return _Given(name, array, isinstance(value, np.generic), descr)


def _check_plain(value: Any, what: str) -> None:
    """Raise TypeError for what JSON would not give back (tuples become lists, though)."""
    if value is None or type(value) in (bool, int, float, str):
        return
    if isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            _check_plain(item, f"{what}[{k}]")
    elif isinstance(value, dict) and all(type(key) is str for key in value):
        for key, item in value.items():
            _check_plain(item, f"{what}[{key!r}]")
    else:
        raise TypeError(
            f"{what} is of type {type(value).__name__}, which has no place in a checkpoint: give arrays, NumPy scalars, None, bool, int, "
            f"float, str, and lists and dicts (with str as keys) of those but arrays. A complex number can be saved as np.complex128(z)."
        )


# ------------------------------------------------------------------------------------------------------------ writing


class _Written:
    """The file of an array that is being saved."""

    def __init__(self, given: _Given, directory: str, stack: contextlib.ExitStack) -> None:
        x = given.array
        self.given = given
        self.header = npy.header_of(x.shape, given.descr)
        self.slabs = npy.slabs_of(x.shape, x.dtype)
        self.file = npy.File(os.path.join(directory, f"{given.name}.npy"), x.shape, x.dtype, len(self.header))
        # Open from before the first write by a worker to the end: then fsync here tells of every write that failed.
        self.number = _create(self.file.path, self.header, self.file.nbytes, stack)

    def checksums(self) -> Any:
        """Return the array whose computing writes the file."""
        return wrap(npy.write(self.given.array.node, self.file, self.slabs))

    def entry(self, checksums: NDArray | None) -> dict[str, Any]:
        """Return what the JSON file says of it."""
        return {
            "file": os.path.basename(self.file.path),
            "shape": self.file.shape,
            "dtype": self.given.descr,
            "order": "C",
            "is_scalar": self.given.is_scalar,
            "chunks": self.given.array.chunks,
            "offset": self.file.offset,
            "header_crc32": f"{zlib.crc32(self.header):08x}",
            "slabs": self.slabs,
            "slab_crc32": [] if checksums is None else [f"{value:08x}" for value in checksums.tolist()],
        }


def _create(path: str, head: bytes, nbytes: int, stack: contextlib.ExitStack) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, file)
    _write_all(file, head)
    os.ftruncate(file, nbytes)
    return file


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _write_manifest(
    directory: str, step: int, names: list[str], entries: Mapping[str, Any], plain: Mapping[str, Any], stack: contextlib.ExitStack
) -> None:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
        "shmarray": sys.modules["shmarray"].__version__,
        "names": names,
        "arrays": entries,
        "values": plain,
    }
    data = _lines({**document, "crc32": _checksum(document)}).encode()
    os.fsync(_create(os.path.join(directory, MANIFEST), data, len(data), stack))


def _lines(document: Mapping[str, Any], depth: int = 2) -> str:
    """Return JSON with a line for each value, and for each within those that are objects themselves."""
    parts = [
        f"{json.dumps(key)}: {_lines(value, depth - 1) if depth > 1 and isinstance(value, Mapping) else json.dumps(value)}"
        for key, value in document.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}"


def _checksum(document: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a document as compact JSON with sorted keys, which is the same again when it was read back."""
    return f"{zlib.crc32(json.dumps(document, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _publish(own: str, root: str, step: int) -> str:
    """Give the new checkpoint its name, for good; return its directory.

    One of the same step cannot be replaced by renaming, so the new one is numbered at first: step-000000000012.1 is newer than
    step-000000000012, and takes that name when it is free.
    """
    new, target = os.path.join(own, "new"), os.path.join(root, f"step-{step:012d}")
    before = [name for name in _names(root) if _step_of(name) == step]
    found = target if not before else f"{target}.{_generation_of(before[0]) + 1}"
    while not _renamed(new, found):  # only without locks: another writer of this very step was faster
        found = f"{target}.{_generation_of(os.path.basename(found)) + 1}"
    _sync(root)
    if found != target:
        for name in before:
            _move_away(own, os.path.join(root, name))
        if _renamed(found, target):
            found = target
            _sync(root)
    return found


def _renamed(old: str, new: str) -> bool:
    """Rename a directory, unless one of that name has something in it; return whether it was done."""
    try:
        os.rename(old, new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _prune(own: str, root: str, step: int, others: int) -> None:
    """Remove checkpoints of steps before ``step``, but for the newest ``others`` whole ones and what is newer than those."""
    for name in _names(root):
        if _step_of(name) >= step:
            continue
        directory = os.path.join(root, name)
        if not others:
            _move_away(own, directory)
            continue
        with contextlib.suppress(DamagedFile):
            _manifest(directory)
            others -= 1


def _move_away(own: str, directory: str) -> None:
    """Take a checkpoint's name away, at once; its bytes go with our own directory. The new one is saved, whatever happens here."""
    try:
        os.rename(directory, os.path.join(own, f"old-{secrets.token_hex(4)}"))
    except FileNotFoundError:
        pass  # only without locks: another writer was faster
    except OSError as error:
        _log.warning("the old checkpoint %s could not be removed: %s", directory, error)


# -------------------------------------------------------------------------------------------------------- directories


def _make_directory(root: str) -> None:
    """Make the directory and those above it, and have their names on the disk."""
    missing = []
    at = root
    while not os.path.isdir(at):
        if os.path.lexists(at):
            raise NotADirectoryError(errno.ENOTDIR, "this is not a directory", at)
        missing.append(at)
        at = os.path.dirname(at)
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made by somebody else by now
            os.mkdir(directory)
        _sync(os.path.dirname(directory))


def _sync(directory: str) -> None:
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def _alone(root: str) -> Iterator[None]:
    """Keep other writers waiting: who replaces a checkpoint must not take away the one that another has just put there."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then one writer at a time is the user's duty
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


@contextlib.contextmanager
def _own_directory(root: str) -> Iterator[str]:
    """Make a directory that is swept away by others once this process does not live, and by us at the end.

    Its lock is a file beside it, made before and removed after: a directory without one is never there.
    """
    lock = -1
    while lock < 0:
        own = os.path.join(root, f".saving-{secrets.token_hex(8)}")
        lock = _locked(f"{own}.lock", os.O_CREAT | os.O_EXCL)
    try:
        os.mkdir(own)
        yield own
    finally:
        try:
            _remove(own)
        finally:
            os.close(lock)


def _locked(path: str, flags: int = 0) -> int:
    """Return a descriptor that holds the lock of a file; -1 when somebody else has it, or took the file away."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return -1
        except OSError:
            if not flags:
                raise  # a file system without locks: nobody knows whether the writer lives, and nothing is swept
        if os.fstat(file).st_nlink:
            kept, file = file, -1
            return kept
        return -1  # swept between the opening and the lock
    finally:
        if file >= 0:
            os.close(file)


def _remove(own: str) -> None:
    shutil.rmtree(own, ignore_errors=True)
    if not os.path.lexists(own):  # else the next writer tries again
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{own}.lock")


def _sweep(root: str) -> None:
    """Remove what writers that no longer live left."""
    for name in os.listdir(root):
        if _LOCK.fullmatch(name):
            with contextlib.suppress(OSError):  # somebody else's file, or it is gone by now
                lock = _locked(os.path.join(root, name))
                if lock >= 0:
                    try:
                        _remove(os.path.join(root, name.removesuffix(".lock")))
                    finally:
                        os.close(lock)


def _names(root: str) -> list[str]:
    """Return the names of checkpoints, the newest first."""
    try:
        found = [name for name in os.listdir(root) if _NAME.fullmatch(name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda name: (_step_of(name), _generation_of(name)), reverse=True)


def _identity(directory: str) -> tuple[int, ...]:
    """Return what tells a checkpoint from another one that gets its name; an empty tuple when there is none."""
    with contextlib.suppress(OSError):
        found = os.stat(directory)
        return found.st_ino, found.st_mtime_ns
    return ()


def _step_of(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def _generation_of(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[2] or 0)


@contextlib.contextmanager
def _explained(what: str, root: str) -> Iterator[None]:
    """Have an error of the file system say what was attempted, and what is there now."""
    try:
        yield
    except OSError as error:
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = _names(root)
        there = f"The newest checkpoint there is {names[0]}." if names else "There is no checkpoint there."
        advice = " Free some space, or save elsewhere." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(error.errno or errno.EIO, f"{what}: {error.strerror or error}. {there}{advice}", error.filename) from error


# ------------------------------------------------------------------------------------------------------------ reading


def _manifest(directory: str) -> dict[str, Any]:
    """Return what the JSON file says, when it is whole and the files have the lengths that it says. Raises DamagedFile."""
    path = os.path.join(directory, MANIFEST)
    try:
        document = json.loads(Path(path).read_bytes())
        expected = document.pop("crc32")
        version = document["version"]
    except OSError as error:
        raise DamagedFile(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{MANIFEST} is torn or changed: {error}") from error
    if document.get("format") != FORMAT or version != VERSION:
        raise DamagedFile(f"{MANIFEST} is of format {document.get('format')!r}, version {version!r}; this is {FORMAT!r}, version {VERSION}")
    if _checksum(document) != expected:
        raise DamagedFile(f"{MANIFEST} was changed: its checksum is {_checksum(document)}, not {expected}")
    for name, entry in document["arrays"].items():
        file = _file(directory, name, entry)
        try:
            nbytes = os.stat(file.path).st_size
        except OSError as error:
            raise DamagedFile(f"{name}.npy cannot be read: {error.strerror}") from error
        if nbytes != file.nbytes:
            raise DamagedFile(f"{name}.npy has {nbytes} bytes, not {file.nbytes}")
    return dict(document)


def _file(directory: str, name: str, entry: Mapping[str, Any]) -> npy.File:
    dtype = np.dtype(np.lib.format.descr_to_dtype(_tuples(entry["dtype"])))
    return npy.File(os.path.join(directory, f"{name}.npy"), tuple(entry["shape"]), dtype, entry["offset"])


def _load(directory: str) -> Checkpoint:
    """Return a checkpoint, or raise DamagedFile. All arrays are read in one run."""
    manifest = _manifest(directory)
    lazy = []
    for name, entry in manifest["arrays"].items():
        file = _file(directory, name, entry)
        _check_header(file, entry["header_crc32"])
        chunks = normalize_chunks(tuple(tuple(c) for c in entry["chunks"]), file.shape, file.dtype)
        if 0 in file.shape:
            lazy.append(as_handle(np.empty(file.shape, file.dtype)))
            continue
        checksums = np.array([int(text, 16) for text in entry["slab_crc32"]], np.uint32)
        slabs = tuple(tuple(sizes) for sizes in entry["slabs"])
        lazy.append(wrap(npy.read(file, slabs, checksums), chunks))
    arrays = dict(zip(manifest["arrays"], running.persist(*lazy), strict=True))
    values = {**arrays, **manifest["values"]}
    for name, entry in manifest["arrays"].items():
        if entry["is_scalar"]:
            values[name] = running.compute(values[name])[0]
    time = datetime.datetime.fromisoformat(manifest["time"])
    return Checkpoint(manifest["step"], directory, time, {name: values[name] for name in manifest["names"]})


def _check_header(file: npy.File, expected: str) -> None:
    try:
        with open(file.path, "rb") as opened:
            found = f"{zlib.crc32(opened.read(file.offset)):08x}"
    except OSError as error:
        raise DamagedFile(f"{file.path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise DamagedFile(f"the header of {file.path} has the checksum {found}, not {expected}")
