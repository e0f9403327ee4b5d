"""Memory files of huge pages, where the system's own have none.

A memfd has pages of 4 KiB unless an administrator has chosen otherwise (shmem_enabled), which nobody does. A tmpfs that is mounted with
huge=always has pages of 2 MiB, and in a user namespace of its own any process may mount one:

    this process ── python -I -S -c _MOUNT ──▶ new user and mount namespace: fsopen, fsmount ── descriptor of the root ──▶ this process

The other process ends at once; the file system is attached nowhere, has no limit of its own, and goes with the last descriptor and mapping.
Promises: nothing has a name, nobody else reaches it; None, and no noise, where any of this is forbidden. Files cannot be sealed.
Never put here: who maps a file, how it is divided.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

__all__ = ["HUGE_FILES", "chosen_of", "first_line", "huge_file", "why_none"]

HUGE_FILES = "SHMARRAY_HUGE_FILES"  # an environment variable: with "0" all is as where they cannot be had, for tests and doubts
LONGEST_MOUNT_S = 5.0
_SETTING = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
# What says that user namespaces are not for us: to ask all the same would be an entry in the system's log.
_FORBIDDING = (
    ("/proc/sys/user/max_user_namespaces", "0"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
)
# System calls by number, the same on all architectures: 430 fsopen, 431 fsconfig, 432 fsmount.
_MOUNT = """
import ctypes, os, sys, _socket
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    return result
user, group = os.geteuid(), os.getegid()
call(libc.unshare(0x10000000 | 0x20000))  # CLONE_NEWUSER, CLONE_NEWNS
for name, text in ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"):
    with open("/proc/self/" + name, "w") as file:
        file.write(text)
made = call(libc.syscall(430, b"tmpfs", 1))
for key, value in (b"huge", b"always"), (b"size", b"0"), (b"mode", b"700"):
    call(libc.syscall(431, made, 1, key, value, 0))
call(libc.syscall(431, made, 6, None, None, 0))
root = call(libc.syscall(432, made, 1, 0))
link = _socket.socket(fileno=int(sys.argv[1]))
link.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, root.to_bytes(4, sys.byteorder))])
"""

_mutex = threading.RLock()
_is_mounting = False  # a signal handler that comes in meanwhile does without
_root: int | None = None  # of the file system, once it is mounted; a forked child uses its parent's
_device: int | None = None  # what it is; who becomes a daemon closes all descriptors, and its number is another file's then
_why_none: str | None = None  # why there is none; not tried again


def huge_file() -> int | None:
    """Return a descriptor of a new, empty memory file; None where there are none of huge pages."""
    global _root, _device, _why_none, _is_mounting
    with _mutex:
        if _root is None and _why_none is None and not _is_mounting:
            _is_mounting = True
            try:
                _root = _mount()
                _device = os.fstat(_root).st_dev
            except OSError as error:
                _why_none = str(error)
            finally:
                _is_mounting = False
        if _root is None:
            return None
        try:
            if os.fstat(_root).st_dev != _device:
                return None
            name = f"shmarray.{os.getpid()}"  # what /proc shows of it, without that it is deleted
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=_root)
            os.unlink(name, dir_fd=_root)
        except OSError:
            return None
        return fd


def why_none() -> str | None:
    """Return why `huge_file` gives None, as far as it has been asked."""
    return _why_none


def _mount() -> int:
    """Return a descriptor of the root of a new file system; raise OSError where that cannot be."""
    chosen = chosen_of(_SETTING)
    if chosen != "never":  # else a memfd has them where it may
        raise OSError(f"shmem_enabled: {chosen}")
    if os.environ.get(HUGE_FILES) == "0":
        raise OSError(f"switched off by {HUGE_FILES}")
    for path, forbidden in _FORBIDDING:
        if first_line(path) == forbidden:
            raise OSError(f"{path}: {forbidden}")
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("this program is not a Python interpreter, and names none")
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(LONGEST_MOUNT_S)
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _MOUNT, str(far.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[far.fileno()],
            env={**os.environ, HUGE_FILES: "0"},  # if it is another program with us in it, it does not start yet another
            start_new_session=True,  # Ctrl-C is for this process
        ) as child:
            far.close()
            try:
                # Not recv_fds, which leaves out the flag.
                _, received, _, _ = near.recvmsg(1, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
            finally:
                child.kill()
            if not received:
                assert child.stderr is not None
                said = child.stderr.read().decode(errors="replace").split("\n")
                raise OSError("mounting in a user namespace: " + (next(filter(None, reversed(said)), "no answer")))
    return int.from_bytes(received[0][2][:4], sys.byteorder)


def first_line(path: str) -> str:
    """Return the first line of a file of the system's, or "" where there is none."""
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return ""


def chosen_of(path: str) -> str:
    """Return which of the values in a file such as ``always [madvise] never`` is chosen, or "unknown"."""
    return first_line(path).partition("[")[2].partition("]")[0] or "unknown"


def _start_anew() -> None:
    global _mutex, _is_mounting
    _mutex, _is_mounting = threading.RLock(), False  # a thread that is not here may have it


os.register_at_fork(after_in_child=_start_anew)
