"""Names by which unrelated processes of one user find each other: a directory of mode 0700, a socket for each name, a few bytes.

Promises: whoever is not this user gets nothing, neither through the directory nor through the socket; the answer is data of a fixed
form, never a pickle; who is silent, or sends garbage, keeps nobody waiting; a name is served by one process at a time, and a socket whose
process is gone is swept by the next one that asks for it. A forked child does not answer. Relies on Linux (AF_UNIX, SO_PEERCRED,
flock of a directory, /proc/self/fd).
Never put here: what the bytes mean.

    $XDG_RUNTIME_DIR/shmarray/run42.sock         or /tmp/shmarray-UID/run42.sock
    answer: magic, version, pid, length | bytes              what an opener sends is not read
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import re
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator

from scheduler.errors import SharedMemoryError

__all__ = ["Server", "ask", "check_name", "directories", "names", "sweep"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
SUFFIX = ".sock"
LOGINS, TEMPORARY = "/run/user", "/tmp"  # where directories are looked for beside $XDG_RUNTIME_DIR
MAGIC = b"shmstore"
VERSION = 1
HEAD = struct.Struct("<8sIIi")  # magic, version, length, pid
LARGEST_ANSWER_NBYTES = 4096
PATIENCE_S = 5.0  # for an answer, and for the lock of the directory
MOST_OPENERS = 64  # at once; the longest there goes first
PEER = struct.Struct("3i")  # pid, uid, gid


class Gone(Exception):
    """The socket is there, and the process that made it is not."""


def check_name(name: str) -> None:
    """Raise ValueError for what is no name of a store: it becomes a file's."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a store is a str; got {type(name).__name__}")
    if not NAME.match(name):
        raise ValueError(
            f"{name!r} is no name for a store: names have up to 64 letters, digits, '.', '_' and '-', of which the first is a letter "
            f"or digit"
        )


def directories() -> list[str]:
    """Return where names of this user are looked for; they are made in the first."""
    uid = os.geteuid()
    found = []
    # The second is that of a login, which a job that was started otherwise does not know of.
    for runtime in (os.environ.get("XDG_RUNTIME_DIR", ""), f"{LOGINS}/{uid}"):
        with contextlib.suppress(OSError):  # after `su` it may name another user's
            if os.stat(runtime).st_uid == uid:
                found.append(os.path.join(runtime, "shmarray"))
    found.append(f"{TEMPORARY}/shmarray-{uid}")
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def _opened(path: str, *, make: bool = False) -> Iterator[int | None]:
    """Give a descriptor of a directory that is this user's alone; None when there is none."""
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        if make:
            raise
        yield None
        return
    except NotADirectoryError as error:
        raise _refused(path, "it is no directory, or a symbolic link") from error
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise _refused(path, f"it belongs to user {status.st_uid}, and this process is of user {os.geteuid()}")
        if status.st_mode & 0o077:
            raise _refused(path, f"its mode is {stat.S_IMODE(status.st_mode):o}, and must be 700: others could take part")
        yield fd
    finally:
        os.close(fd)


def _refused(path: str, why: str) -> SharedMemoryError:
    return SharedMemoryError(
        f"using {path} to find stores by name: {why}. Remove it, or set XDG_RUNTIME_DIR to a directory of your own, in all processes."
    )


@contextlib.contextmanager
def _locked(fd: int, path: str) -> Iterator[None]:
    """Hold the lock of a directory: between finding a name dead and using it, nobody else does."""
    deadline, pause_s = time.monotonic() + PATIENCE_S, 0.001
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SharedMemoryError(
                    f"locking {path}: another process has had it for {PATIENCE_S:g} s, perhaps one that was stopped (fuser {path})"
                ) from None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # said, not left to closing: a child forked meanwhile has the description, too


def _address(fd: int, name: str) -> str:
    """Return a path of the socket that is short, whatever the directory: the system takes 107 bytes."""
    return f"/proc/self/fd/{fd}/{name}{SUFFIX}"


def _connect(fd: int, name: str) -> socket.socket:
    """Return a connection to the socket of a name. Raises FileNotFoundError, or Gone when nobody listens."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(PATIENCE_S)
        made.connect(_address(fd, name))
    except (ConnectionRefusedError, ConnectionResetError) as error:
        made.close()
        raise Gone from error
    except BaseException:
        made.close()
        raise
    return made


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process at the other end, as the kernel knows them."""
    pid, uid, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    return pid, uid


# --- asking -----------------------------------------------------------------------------------------------------------------------


def ask(name: str) -> tuple[bytes, int]:
    """Return what the server of a name answers, and its pid.

    Raises FileNotFoundError when there is none, and sweeps what is dead; SharedMemoryError for an answer that is none, or does not come.
    """
    check_name(name)
    swept = False
    for path in directories():
        with _opened(path) as fd:
            if fd is None:
                continue
            try:
                connection = _connect(fd, name)
            except FileNotFoundError:
                continue
            except Gone:
                swept |= _sweep(fd, path, name)
                continue
            except TimeoutError:
                raise _silent(name, path, 0) from None
        with connection:
            return _answer(connection, name, path)
    looked = " or ".join(f"{path}/{name}{SUFFIX}" for path in directories())
    there = names()
    others = f"There are: {', '.join(there)}." if there else "There are no others of this user."
    if swept:
        raise FileNotFoundError(
            f"opening store {name!r}: the process that served it is gone, killed perhaps, and nobody can join its store any more (its "
            f"socket is swept now). Processes that had opened it go on. Start it again, with create=True. {others}"
        )
    raise FileNotFoundError(
        f"opening store {name!r}: there is none. Looked for {looked}. {others} Make it with "
        f"Store({name!r}, create=True); with exist_ok=True beside it, whichever process comes first makes it and the others open it."
    )


def _answer(connection: socket.socket, name: str, path: str) -> tuple[bytes, int]:
    pid, uid = _peer(connection)
    if uid != os.geteuid():
        raise SharedMemoryError(f"opening store {name!r}: {path}/{name}{SUFFIX} is answered by user {uid}, not by {os.geteuid()}")
    deadline = time.monotonic() + PATIENCE_S
    text, wanted = b"", HEAD.size
    while len(text) < wanted:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            part = connection.recv(wanted - len(text))
        except TimeoutError:
            raise _silent(name, path, pid) from None
        except ConnectionResetError:
            part = b""
        if not part:
            raise SharedMemoryError(
                f"opening store {name!r}: process {pid} hung up after {len(text)} bytes; it is closing, or no store. Try again."
            )
        text += part
        if len(text) == HEAD.size:
            magic, version, length, told = HEAD.unpack(text)
            if magic != MAGIC or length > LARGEST_ANSWER_NBYTES:
                raise SharedMemoryError(f"opening store {name!r}: process {pid} answers {text[:12]!r}, which is not how a store answers")
            if version != VERSION:
                raise SharedMemoryError(
                    f"opening store {name!r}: process {pid} speaks version {version} of the protocol, this one {VERSION}. Use one version "
                    f"of shmarray in both."
                )
            if told != pid:
                raise SharedMemoryError(
                    f"opening store {name!r}: its owner is process {told} to itself and {pid} here: it runs in another PID namespace "
                    f"(container), whose memory cannot be reached. Run both in one (docker run --pid=container:...)."
                )
            wanted += length
    return text[HEAD.size :], pid


def _silent(name: str, path: str, pid: int) -> SharedMemoryError:
    who = f"its owner, process {pid}," if pid else "its owner"
    return SharedMemoryError(
        f"opening store {name!r} through {path}/{name}{SUFFIX}: {who} has not answered for {PATIENCE_S:g} s. It is stopped, or has its "
        f"hands full in a call that does not let other threads run."
    )


def names() -> list[str]:
    """Return the names there are, of living processes and dead ones."""
    found: list[str] = []
    for path in directories():
        with _opened(path) as fd:
            entries = [] if fd is None else sorted(os.listdir(fd))
        found += [name for entry in entries if (name := entry.removesuffix(SUFFIX)) != entry and NAME.match(name)]
    return list(dict.fromkeys(found))


def sweep(name: str) -> bool:
    """Remove the sockets of a name at which nobody listens, and return whether there were any."""
    check_name(name)
    found = False
    for path in directories():
        with _opened(path) as fd:
            found |= fd is not None and _sweep(fd, path, name)
    return found


def _sweep(fd: int, path: str, name: str) -> bool:
    """Remove the socket of a name if nobody listens there, and return whether that was so."""
    with _locked(fd, path):
        try:
            _connect(fd, name).close()
        except Gone:
            os.unlink(name + SUFFIX, dir_fd=fd)
            return True
        except (FileNotFoundError, TimeoutError):
            pass
    return False


# --- answering --------------------------------------------------------------------------------------------------------------------

_servers: set[Server] = set()  # of this process


class Server:
    """A name, and a thread that answers whoever asks for it, until `close` or the end of the process.

    Raises FileExistsError when a living process has the name.
    """

    def __init__(self, name: str, answer: bytes) -> None:
        check_name(name)
        assert len(answer) <= LARGEST_ANSWER_NBYTES
        self.name = name
        self.path = f"{directories()[0]}/{name}{SUFFIX}"
        self._answer = HEAD.pack(MAGIC, VERSION, len(answer), os.getpid()) + answer
        self._pid = os.getpid()
        self._openers: dict[socket.socket, float] = {}  # and until when each is kept; the thread's
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._wake, self._woken = socket.socketpair()
        try:
            self._inode = self._bind(name)
        except BaseException:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._serve, name=f"shmarray-store-{name}", daemon=True)
        _servers.add(self)
        self._thread.start()

    def _bind(self, name: str) -> int:
        own, *others = directories()
        for path in others:
            with _opened(path) as fd:
                if fd is not None:
                    with contextlib.suppress(Gone):
                        self._refuse_living(fd, path, name)
        with _opened(own, make=True) as fd:
            assert fd is not None
            with _locked(fd, own):
                try:
                    self._refuse_living(fd, own, name)
                except Gone:
                    os.unlink(name + SUFFIX, dir_fd=fd)
                self._listener.bind(_address(fd, name))
                self._listener.listen(MOST_OPENERS)
                self._listener.setblocking(False)
                return os.stat(name + SUFFIX, dir_fd=fd, follow_symlinks=False).st_ino

    def _refuse_living(self, fd: int, path: str, name: str) -> None:
        try:
            connection = _connect(fd, name)
        except FileNotFoundError:
            return
        except TimeoutError:
            raise _silent(name, path, 0) from None
        with connection:
            raise FileExistsError(
                f"creating store {name!r}: process {_peer(connection)[0]} has one of that name ({path}/{name}{SUFFIX}). Open that with "
                f"Store({name!r}), either with Store({name!r}, create=True, exist_ok=True), or take another name."
            )

    def _serve(self) -> None:
        openers = self._openers
        with selectors.PollSelector() as selector:  # which has no descriptor that a forked child would inherit
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(0.5 if openers else None)]
                if self._woken in ready:
                    break
                now = time.monotonic()
                for opener in [o for o, until in openers.items() if o in ready or until < now]:
                    # It has what it wanted, has hung up, sends what nobody asked for, or has had its time.
                    del openers[opener]
                    selector.unregister(opener)
                    opener.close()
                if self._listener in ready:
                    opener_or_none = self._accept()
                    if opener_or_none is not None:
                        openers[opener_or_none] = now + PATIENCE_S
                        selector.register(opener_or_none, selectors.EVENT_READ)
                        if len(openers) > MOST_OPENERS:
                            openers[next(iter(openers))] = 0.0
        self._close_sockets()

    def _accept(self) -> socket.socket | None:
        """Answer somebody, if it is of this user; the few bytes fit the socket's buffer, so that nothing waits."""
        try:
            opener, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # it is ready until there is a descriptor for it
            return None  # or it hung up at once
        try:
            opener.setblocking(False)
            if _peer(opener)[1] == os.geteuid() and opener.send(self._answer) == len(self._answer):
                return opener
        except OSError:
            pass
        opener.close()
        return None

    def close(self) -> None:
        """Give the name up; calling it again does nothing. What was told keeps its meaning."""
        if self not in _servers:
            return
        _servers.discard(self)
        if self._pid != os.getpid():
            return
        # While the socket still listens: so nobody has found it dead, and put another in its place.
        with contextlib.suppress(OSError, SharedMemoryError), _opened(os.path.dirname(self.path)) as fd:
            name = os.path.basename(self.path)
            if fd is not None and os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino == self._inode:
                os.unlink(name, dir_fd=fd)
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE_S)

    def _close_sockets(self) -> None:
        for each in (self._listener, self._wake, self._woken, *self._openers):
            each.close()


def _close_all() -> None:
    for server in list(_servers):
        server.close()


def _start_anew_in_child() -> None:
    # The child must not keep the socket: as long as anybody does, who asks waits, and none finds it dead.
    for server in list(_servers):
        server._close_sockets()
    _servers.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew_in_child)
