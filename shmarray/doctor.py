"""What this machine offers: each thing that shmarray uses is done once, and what follows where it fails is said.

Promises: nothing is left behind, nothing is raised, whatever is missing; a few seconds at most. Versions are printed, never believed.
Never put here: anything that another module needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from scheduler.hugepages import chosen_of, first_line, huge_file, why_none
from scheduler.limits import DEFAULT_SHARE, available_nbytes, cpu_count, format_bytes
from scheduler.run import Pool
from scheduler.segments import permit_workers
from scheduler.spill import OFF, default_directory
from scheduler.task import Context, Layer, Plan
from scheduler.worker import tie
from shmarray.config import config
from shmarray.engines import OLDEST_LLVMLITE

__all__ = ["Probe", "main", "probe"]

OK, DEGRADED, MISSING = "ok", "degraded", "missing"
PATIENCE_S = 20.0  # with a process that was started to try something
LONGEST_VALUE = 600  # characters: the stderr of a worker may be a long one
HUGE_NBYTES = 2 << 20
LITTLE_MEMORY_NBYTES = 512 << 20
LITTLE_SPACE_NBYTES = 1 << 30
FEW_DESCRIPTORS = 64
_F_ADD_SEALS, _F_SEALS = 1033, 1 | 2 | 4  # seal, shrink, grow


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found: ``state`` is "ok", "degraded" or "missing"; ``advice`` says what follows from that and what to do."""

    name: str
    state: str
    value: str
    advice: str = ""
    is_needed: bool = False  # by worker processes


def probe() -> list[Probe]:
    """Try everything once, in the order in which it is printed."""
    return [_try(*each) for each in _PROBES]


def main() -> int:
    """Print what was found; return 0 when worker processes can be used, else 1."""
    found = probe()
    width = max(len(each.name) for each in found)
    for each in found:
        print(f"{each.name:<{width}}  {each.state:<8}  {each.value}".rstrip())
        if each.state != OK:
            print(f"{'':<{width}}  {'':<8}  -> {each.advice}")
    lacking = [each.name for each in found if each.is_needed and each.state == MISSING]
    if lacking:
        print(f"\nOnly threads can be used here (scheduler='threads'): {', '.join(lacking)} missing.")
        return 1
    print("\nWorker processes can be used.")
    return 0


_Found = tuple[str, str]  # state and value


def _try(name: str, look: Callable[[], _Found], advice: str, is_needed: bool) -> Probe:
    try:
        state, value = look()
    except Exception as error:  # whatever it is, it does not work here
        state, value = MISSING, f"{type(error).__name__}: {error}"
    return Probe(name, state, " ".join(value.split())[:LONGEST_VALUE], "" if state == OK else advice, is_needed)


# ------------------------------------------------------------------------------------------------- what workers need


@contextlib.contextmanager
def _memory_file(nbytes: int = mmap.PAGESIZE, fd: int | None = None) -> Iterator[int]:
    if fd is None:
        fd = os.memfd_create("shmarray-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, nbytes)
        yield fd
    finally:
        os.close(fd)


def _memfd() -> _Found:
    with _memory_file() as fd, mmap.mmap(fd, mmap.PAGESIZE) as mapping:
        mapping[:4] = b"here"
        return (OK if os.pread(fd, 4, 0) == b"here" else MISSING), f"mode {os.fstat(fd).st_mode & 0o777:o}, no name"


def _seals() -> _Found:
    with _memory_file() as fd:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEALS)
        try:
            os.ftruncate(fd, 0)
        except OSError:
            return OK, "size cannot be changed"
        return DEGRADED, "sealed, and yet its size could be changed"


def _pidfd() -> _Found:
    child = _child("pass")
    try:
        fd = os.pidfd_open(child.pid)
        try:
            return (OK, "tells the end of a process") if _readable(fd) else (MISSING, "did not tell the end of a process")
        finally:
            os.close(fd)
    finally:
        _end(child)


def _events() -> _Found:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with select.epoll() as epoll:
            epoll.register(fd, select.EPOLLIN)
            os.eventfd_write(fd, 1)
            return (OK, "") if epoll.poll(PATIENCE_S) else (MISSING, "epoll did not see an event")
    finally:
        os.close(fd)


def _sockets() -> _Found:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.sendall(b"one")
        near.sendall(b"two")
        return (OK, "messages keep their bounds") if far.recv(100) == b"one" else (MISSING, "messages run together")


def _life_socket() -> _Found:
    child = _child("import time; time.sleep(60)")
    try:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with far:
            with near:
                tie(far.fileno(), child.pid)
            code = child.wait(PATIENCE_S)
        return (OK, "a worker dies with its driver") if code == -signal.SIGKILL else (MISSING, f"it ended with {code}")
    except subprocess.TimeoutExpired:
        return MISSING, "a process outlived its driver"
    finally:
        _end(child)


class _Tell:
    """A kernel that reports which process it runs in."""

    def bind(self, context: Context) -> Callable[[int], None]:
        return lambda i: context.warn("UserWarning", str(os.getpid()))


def _worker() -> _Found:
    began = time.perf_counter()
    with Pool(1, memory_limit="64MiB") as pool:
        report = pool.run(Plan(buffers=(), layers=(Layer(name="doctor", kernel=_Tell(), ntasks=1),)), "processes")
    ((_, pid, _),) = report.warnings
    if int(pid) == os.getpid():
        return MISSING, "the task ran in this process"
    return OK, f"started and did a task in {time.perf_counter() - began:.1f} s"


def _process_vm() -> _Found:
    yama = "/proc/sys/kernel/yama/ptrace_scope"
    scope = f"ptrace_scope {first_line(yama)}" if os.path.exists(yama) else "no Yama"
    if os.environ.get("SHMARRAY_NO_PROCESS_VM"):
        return DEGRADED, f"switched off by SHMARRAY_NO_PROCESS_VM; {scope}"
    permit_workers()
    there = np.frombuffer(b"from the driver", np.uint8)
    child = _child(
        "import ctypes, sys; pid, at, n = map(int, sys.argv[1:]); c = ctypes; b = c.create_string_buffer(n); "
        "libc = c.CDLL(None, use_errno=True); V = c.c_ulong * 2; "
        "got = libc.process_vm_readv(pid, c.byref(V(c.addressof(b), n)), c.c_ulong(1), c.byref(V(at, n)), c.c_ulong(1), c.c_ulong(0)); "
        "print(b.raw.decode() if got == n else f'errno {c.get_errno()}')",
        str(os.getpid()),
        str(there.ctypes.data),
        str(there.size),
    )
    try:
        said = child.communicate(timeout=PATIENCE_S)[0].strip()
    finally:
        _end(child)
    return (OK, scope) if said == there.tobytes().decode() else (DEGRADED, f"refused ({said}); {scope}")


# ---------------------------------------------------------------------------------------------------------- speed


def _llvmlite() -> _Found:
    try:
        import llvmlite  # an extra
    except ImportError:
        return MISSING, "not installed"
    version = str(llvmlite.__version__)
    if tuple(int(n) for n in version.split(".")[:2] if n.isdigit()) < OLDEST_LLVMLITE:
        return DEGRADED, f"{version} is too old"
    from shmarray.kernels.llvm.target import machine  # needs llvmlite

    return OK, f"{version}, code for {machine().cpu}"


def _libmvec() -> _Found:
    prefixes = {"x86_64": ("_ZGVbN2v_", "_ZGVdN4v_", "_ZGVeN8v_"), "aarch64": ("_ZGVnN2v_",)}.get(platform.machine(), ())
    library = ctypes.CDLL("libmvec.so.1")
    names = [prefix + name for prefix in prefixes for name in ("exp", "sin", "pow") if hasattr(library, _symbol(prefix, name))]
    return (OK, f"{len(names)} of {3 * len(prefixes)} variants looked for") if names else (MISSING, "no vector variants")


def _symbol(prefix: str, name: str) -> str:
    return prefix[:-1] + "v_" + name if name == "pow" else prefix + name  # two arguments


def _huge_private() -> _Found:
    with mmap.mmap(-1, 3 * HUGE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        return _huge(mapping, "AnonHugePages", "enabled")


def _huge_shared() -> _Found:
    with _memory_file(3 * HUGE_NBYTES, huge_file()) as fd, mmap.mmap(fd, 3 * HUGE_NBYTES) as mapping:
        state, found = _huge(mapping, "ShmemPmdMapped", "shmem_enabled")
    if why_none() is None:
        return state, f"{found}; in a file system of this process's own"
    return state, found if why_none() == found else f"{found}; {why_none()}"


def _huge(mapping: mmap.mmap, field: str, setting: str) -> _Found:
    mapping.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(mapping, np.uint8)
    array[:: mmap.PAGESIZE] = 1
    at, nbytes, inside = array.ctypes.data, 0, False
    del array
    with open("/proc/self/smaps") as file:
        for line in file:
            word, _, rest = line.partition(" ")
            if "-" in word and not word.endswith(":"):
                low, high = (int(part, 16) for part in word.split("-"))
                inside = low <= at < high
            elif inside and word == field + ":":
                nbytes = 1024 * int(rest.split()[0])
    return (OK if nbytes else DEGRADED), f"{setting}: {chosen_of(_HUGE + setting)}"


# ---------------------------------------------------------------------------------------------------------- limits


def _limit(name: str, enough: int, unit: Callable[[int], str]) -> Callable[[], _Found]:
    def look() -> _Found:
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft == resource.RLIM_INFINITY:
            return OK, "unlimited"
        return (OK if soft >= enough else DEGRADED), unit(soft)

    return look


def _dev_shm() -> _Found:
    try:
        size = os.statvfs("/dev/shm")
    except OSError:
        return OK, "not there, and not needed"
    return OK, f"{format_bytes(size.f_frsize * size.f_blocks)}, not needed: shared memory has no name and does not lie there"


def _memory() -> _Found:
    available, total = available_nbytes(), int(psutil.virtual_memory().total)
    text = f"{format_bytes(available)} of {format_bytes(total)} available, cgroups heeded; memory_limit "
    text += f"{format_bytes(config.memory_limit or int(DEFAULT_SHARE * available))}"
    return (OK if available >= LITTLE_MEMORY_NBYTES else DEGRADED), text


def _cpus() -> _Found:
    count = cpu_count()
    return (OK if count > 1 else DEGRADED), f"{count} of {os.cpu_count()}, affinity and cgroups heeded"


def _spill() -> _Found:
    if config.spill_directory == OFF:
        return OK, "switched off"
    directory = config.spill_directory or default_directory() or tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=directory) as file:  # without a name, where the file system can
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        os.pwrite(file.fileno(), b"x", 1 << 19)
    size = os.statvfs(directory)
    free = size.f_frsize * size.f_bavail
    kind = _file_system(directory)
    state = DEGRADED if kind in ("tmpfs", "ramfs") or free < LITTLE_SPACE_NBYTES else OK
    return state, f"{directory}: {kind}, {format_bytes(free)} free"


def _file_system(directory: str) -> str:
    """Return the type of the file system that is mounted nearest above a directory."""
    path, best, kind = os.path.realpath(directory), "", "unknown"
    with open("/proc/self/mounts") as file:
        for line in file:
            _, where, this, *_ = line.split()
            where = where.replace("\\040", " ")
            if len(where) >= len(best) and (path + "/").startswith(where.rstrip("/") + "/"):
                best, kind = where, this
    return kind


def _versions() -> _Found:
    libc = " ".join(platform.libc_ver()) or "unknown libc"
    return OK, f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.system()} {platform.release()}, {libc}"


# ------------------------------------------------------------------------------------------------------------ hands


def _child(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _end(child: subprocess.Popen[Any]) -> None:
    child.kill()
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * PATIENCE_S))


_THREADS = "without it there are no worker processes: threads are used. It needs "
_LIFE = "workers could outlive a driver that is killed (O_ASYNC with F_SETSIG has no effect here): use scheduler='threads'."
_PROCESS_VM = (
    "arrays in your own memory are copied through shared memory, at the speed of one core. In a container: allow it "
    "(--cap-add SYS_PTRACE, or a newer seccomp profile); with Yama: ptrace_scope 0 or 1."
)
_LIBMVEC = "exp, sin and the like are called number by number in compiled code. It comes with glibc 2.22 and later."
_HUGE = "/sys/kernel/mm/transparent_hugepage/"
_HUGE_PRIVATE = f"results cost more page faults: echo madvise > {_HUGE}enabled (as root)."
_HUGE_SHARED = (
    f"stored arrays are read a fifth slower, and written slower the first time. Where user namespaces are forbidden, allow them; or, as "
    f"root: echo advise > {_HUGE}shmem_enabled."
)
_AS = "shared memory is mapped smaller, here and in every worker: ulimit -v unlimited."
_NOFILE = "a pool needs some 10 descriptors and 4 for each worker: ulimit -n 1024."
_FSIZE = "shared memory, and files written, can be no larger: ulimit -f unlimited."
_NPROC = "workers, counted with the threads of all your processes, may not start: ulimit -u 4096, or fewer workers."
_SPILL = "what does not fit memory needs a file system that is not memory itself, with space: sa.config.set(spill_directory=...)."

_PROBES: tuple[tuple[str, Callable[[], _Found], str, bool], ...] = (
    ("versions", _versions, "they could not be read; nothing depends on them.", False),
    ("memfd", _memfd, _THREADS + "Linux 3.17, and that no seccomp filter forbids memfd_create.", True),
    ("seals", _seals, "whoever truncates shared memory could crash the others; nobody else has it. Nothing to do.", False),
    ("pidfd", _pidfd, _THREADS + "Linux 5.3, and that no seccomp filter forbids pidfd_open.", True),
    ("eventfd, epoll", _events, _THREADS + "Linux, and that no seccomp filter forbids them.", True),
    ("message sockets", _sockets, _THREADS + "Unix sockets of type SEQPACKET.", True),
    ("life socket", _life_socket, _LIFE, True),
    ("worker process", _worker, _THREADS + "that processes can be started and map shared memory.", True),
    ("process_vm_readv", _process_vm, _PROCESS_VM, False),
    ("llvmlite", _llvmlite, "expressions run in NumPy, several times slower: pip install shmarray[jit].", False),
    ("libmvec", _libmvec, _LIBMVEC, False),
    ("huge pages, private", _huge_private, _HUGE_PRIVATE, False),
    ("huge pages, shared", _huge_shared, _HUGE_SHARED, False),
    ("RLIMIT_AS", _limit("RLIMIT_AS", 1 << 40, format_bytes), _AS, False),
    ("RLIMIT_NOFILE", _limit("RLIMIT_NOFILE", FEW_DESCRIPTORS, str), _NOFILE, False),
    ("RLIMIT_FSIZE", _limit("RLIMIT_FSIZE", 1 << 40, format_bytes), _FSIZE, False),
    ("RLIMIT_NPROC", _limit("RLIMIT_NPROC", 128, str), _NPROC, False),
    ("/dev/shm", _dev_shm, "it is not needed.", False),
    ("memory", _memory, "only small arrays fit: give the machine or the container more.", False),
    ("processors", _cpus, "there is nobody to share the work with: expect the speed of NumPy, or of compiled kernels.", False),
    ("spill directory", _spill, _SPILL, False),
)
