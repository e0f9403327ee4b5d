"""How much of this machine a process may use: bytes and processors, and the budget that a pool keeps itself to.

Promises: the smallest of what the machine has free and what every cgroup above this process still allows. Relies on psutil
(which knows nothing of cgroups) and on the cgroup files, versions 1 and 2.
Never put here: what the bytes are for (`extents`), or a decision to wait, spill or refuse.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import psutil

__all__ = [
    "Budget",
    "available_nbytes",
    "cpu_count",
    "format_bytes",
    "oom_kills",
    "page_cache_has_room",
    "parse_bytes",
]

DEFAULT_SHARE = 0.6  # of what is available: the rest is for the user's own arrays and everybody else
UNUSED_SHARE = 8  # an eighth of the machine's memory that nobody uses is for caching what was written
NO_LIMIT_V1_NBYTES = 1 << 62  # version 1 writes "none" as the largest multiple of a page, 9223372036854771712

_UNITS = {"": 1, "b": 1}
_UNITS |= {unit: 1000**power for power, unit in enumerate(("kb", "mb", "gb", "tb"), 1)}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), 1)}
_BYTES = re.compile(r"\s*(\d+\.?\d*(?:[eE]\+?\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: int | str) -> int:
    """Return the number of bytes that "16MiB" (2**20 each), "1.5 GB" (10**9), "4096" or an integer means.

    Fractions of a byte are dropped. Raises ValueError for anything else, TypeError for what is neither text nor integer.
    """
    if isinstance(text, str):
        match = _BYTES.fullmatch(text)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"a number of bytes was given as {text!r}; accepted are a number that is not negative and a unit: B or none, "
                f"kB MB GB TB (powers of 1000), KiB MiB GiB TiB (powers of 1024), as in '512MiB' or '1.5 GB'."
            )
        return int(Decimal(match[1]) * unit)
    try:
        nbytes = operator.index(text)
    except TypeError:
        raise TypeError(
            f"a number of bytes was given as {text!r} ({type(text).__name__}); give an integer, or text such as '1.5 GB'."
        ) from None
    if nbytes < 0:
        raise ValueError(f"a number of bytes was given as {nbytes}; it must not be negative.")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """Return a number of bytes as people read it: "1.5 GiB", "64 MiB", "17 B"; one decimal, rounded."""
    if nbytes < 0:
        return "-" + format_bytes(-nbytes)
    if nbytes < 1024:
        return f"{nbytes} B"
    value, unit = float(nbytes), "B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007  (the last unit is used after the loop)
        value /= 1024
        if value < 1023.95:  # what would be printed as 1024 is one of the next unit
            break
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def available_nbytes(root: str | os.PathLike[str] = "/") -> int:
    """Return the bytes that this process can still use before the machine, or a cgroup above it, runs out.

    ``root`` is where proc and sys are found.
    """
    found = [int(psutil.virtual_memory().available)]
    for folder in _ancestors(Path(root), "", ("", "unified")):
        # Above memory.high a group is throttled until it hardly moves, so that is a limit as well.
        limit = min(_read_limit(folder / "memory.max"), _read_limit(folder / "memory.high"))
        if limit < math.inf:
            used = _read_int(folder / "memory.current") - _read_stat(folder / "memory.stat", "inactive_file")
            found.append(int(limit) - max(used, 0))
    for folder in _ancestors(Path(root), "memory", ("memory",)):
        limit = _read_limit(folder / "memory.limit_in_bytes")
        if limit < NO_LIMIT_V1_NBYTES:
            used = _read_int(folder / "memory.usage_in_bytes") - _read_stat(folder / "memory.stat", "total_inactive_file")
            found.append(int(limit) - max(used, 0))
    return max(min(found), 0)


def page_cache_has_room(root: str | os.PathLike[str] = "/") -> bool:
    """Return whether what is written to files may stay in memory: much of the machine's is unused, and no cgroup counts it against us."""
    memory = psutil.virtual_memory()
    if memory.free < memory.total // UNUSED_SHARE:
        return False
    second = (
        _read_limit(folder / name) for folder in _ancestors(Path(root), "", ("", "unified")) for name in ("memory.max", "memory.high")
    )
    first = (_read_limit(folder / "memory.limit_in_bytes") for folder in _ancestors(Path(root), "memory", ("memory",)))
    return min(second, default=math.inf) == math.inf and min(first, default=math.inf) >= NO_LIMIT_V1_NBYTES


def cpu_count(root: str | os.PathLike[str] = "/") -> int:
    """Return how many processors this process may keep busy, at least 1: its affinity, and the quotas of its cgroups.

    Part of a processor counts as one: a worker that is throttled now and then wastes less than a quota left unused.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    found = float(len(affinity(0)) if affinity is not None else os.cpu_count() or 1)
    for folder in _ancestors(Path(root), "", ("", "unified")):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            found = min(found, int(quota) / int(period))
    for folder in _ancestors(Path(root), "cpu", ("cpu", "cpu,cpuacct", "cpuacct,cpu")):
        quota_us, period_us = _read_int(folder / "cpu.cfs_quota_us"), _read_int(folder / "cpu.cfs_period_us")
        if quota_us > 0 and period_us > 0:  # -1: no quota
            found = min(found, quota_us / period_us)
    return max(math.ceil(found), 1)


def oom_kills(root: str | os.PathLike[str] = "/") -> int:
    """Return how often the kernel has killed a process of our cgroup (without one: of this machine) because memory ran out.

    0 where that is not told. Only differences mean anything: the count begins when the group was made.
    """
    # The victim's own group counts it, whichever limit above it was hit; folders that are not mounted here say nothing.
    for folder in _ancestors(Path(root), "", ("", "unified")):
        if (count := _find_stat(folder / "memory.events", "oom_kill")) is not None:
            return count
    for folder in _ancestors(Path(root), "memory", ("memory",)):
        if (count := _find_stat(folder / "memory.oom_control", "oom_kill")) is not None:
            return count
    return _read_stat(Path(root) / "proc/vmstat", "oom_kill")


def _ancestors(root: Path, controller: str, mounts: tuple[str, ...]) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of all above it; controller "" is the one hierarchy of version 2.

    In a container /proc may name the group as the host sees it while only its own subtree is mounted: folders that do not
    exist read as "no limit", and the mount point itself is then the container's group.
    """
    path = None
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, where = rest.partition(":")
        if controller in controllers.split(",") if controller else (number == "0" and not controllers):
            path = where
    if path is None:
        return
    parts = [part for part in path.split("/") if part not in ("", "..")]  # "/../x": a group beside our namespace
    for mount in mounts:
        for depth in range(len(parts), -1, -1):
            yield (root / "sys/fs/cgroup" / mount).joinpath(*parts[:depth])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""  # not this version, not this controller, or not ours to read: no limit is known here


def _read_int(path: Path) -> int:
    try:
        return int(_read(path))
    except ValueError:
        return 0


def _read_limit(path: Path) -> float:
    text = _read(path)
    return int(text) if text.isdigit() else math.inf


def _read_stat(path: Path, name: str) -> int:
    return _find_stat(path, name) or 0


def _find_stat(path: Path, name: str) -> int | None:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return None


class Budget:
    """How many bytes a pool keeps itself to: fixed once and for all, so that a plan fits or not whatever runs beside."""

    __slots__ = ("limit_nbytes",)

    def __init__(self, limit: int | str | None = None) -> None:
        """``limit`` None: 0.6 of what is available now."""
        self.limit_nbytes = int(DEFAULT_SHARE * available_nbytes()) if limit is None else parse_bytes(limit)
