"""Finding each other by name: who is answered, who is not, and what the dead leave."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler import rendezvous
from scheduler.errors import SharedMemoryError
from scheduler.rendezvous import HEAD, MAGIC, VERSION, Server, ask, directories, names

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of the test's own, so long that no socket's path would fit."""
    runtime = tmp_path / ("long" * 30)
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr(rendezvous, "LOGINS", str(tmp_path / "logins"))
    monkeypatch.setattr(rendezvous, "TEMPORARY", str(tmp_path))
    return runtime / "shmarray"


@contextlib.contextmanager
def served(name: str = "run", answer: bytes = b"where it is") -> Iterator[Server]:
    server = Server(name, answer)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def strange_server(directory: Path, answer: bytes | None, name: str = "run") -> Iterator[None]:
    """Listen as somebody who is no store: send ``answer`` and hang up, or with None be silent."""
    directory.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{fd}/{name}.sock")
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                if answer is None:
                    connection.recv(1)  # until the other side hangs up
                else:
                    connection.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(OSError):
                last.connect(f"/proc/self/fd/{fd}/{name}.sock")  # lets it end if nobody came
            thread.join()
            os.close(fd)


def die(name: str) -> None:
    """Have a process serve a name, and kill it."""
    code = "import sys, signal\nfrom scheduler.rendezvous import Server\nServer(sys.argv[1], b'x')\nprint(1, flush=True)\nsignal.pause()"
    with subprocess.Popen(
        [sys.executable, "-c", code, name], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as process:
        assert process.stdout and process.stdout.readline() == b"1\n"
        process.kill()


def test_who_asks_is_told_and_by_whom() -> None:
    with served() as server, served("other", b""):
        assert ask("run") == (b"where it is", os.getpid())
        assert ask("other") == (b"", os.getpid())
        assert names() == ["other", "run"] and not rendezvous.sweep("run")
        assert os.stat(os.path.dirname(server.path)).st_mode & 0o777 == 0o700
    assert names() == [] and os.listdir(os.path.dirname(server.path)) == []


def test_a_name_that_nobody_has_is_told_with_those_there_are(directory: Path) -> None:
    with (
        served("tomato"),
        pytest.raises(FileNotFoundError, match=r"opening store 'potato': there is none\. Looked for .*potato\.sock.* There are: tomato"),
    ):
        ask("potato")


def test_a_living_name_is_not_taken_and_says_whose_it_is() -> None:
    with served(answer=b"first"):
        with pytest.raises(FileExistsError, match=f"process {os.getpid()} has one of that name"):
            Server("run", b"second")
        assert ask("run")[0] == b"first"
    with served(answer=b"third"):
        assert ask("run")[0] == b"third"


@pytest.mark.parametrize("name", ["", ".", "..", "../run", "a/b", "/tmp/x", ".hidden", "-x", "a b", "a\0b", "a\n", "x" * 65, "é"])
def test_a_name_cannot_lead_elsewhere(name: str) -> None:
    for act in (lambda: ask(name), lambda: Server(name, b"")):
        with pytest.raises(ValueError, match="is no name for a store"):
            act()


def test_the_longest_name_will_do() -> None:
    with served("x" * 64):
        assert ask("x" * 64)[0] == b"where it is"


def test_a_dead_socket_is_swept_by_the_next_who_asks(directory: Path) -> None:
    die("run")
    assert os.listdir(directory) == ["run.sock"] == [f"{name}.sock" for name in names()]

    with pytest.raises(FileNotFoundError, match="the process that served it is gone"):
        ask("run")

    assert os.listdir(directory) == []
    with pytest.raises(FileNotFoundError, match="there is none"):
        ask("run")


def test_a_dead_socket_is_swept_by_the_next_who_takes_the_name_and_by_who_looks(directory: Path) -> None:
    die("run")
    die("other")
    with served(answer=b"anew"):
        assert ask("run")[0] == b"anew"
        assert [name for name in names() if rendezvous.sweep(name)] == ["other"] and names() == ["run"]
    assert os.listdir(directory) == []


def test_of_many_who_take_a_dead_name_at_once_one_gets_it(directory: Path) -> None:
    for _ in range(10):
        die("run")
        barrier, made, refused = threading.Barrier(6), [], []

        def take(barrier: Any = barrier, made: Any = made, refused: Any = refused) -> None:
            barrier.wait()
            try:
                made.append(Server("run", b"mine"))
            except FileExistsError:
                refused.append(1)

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(made), len(refused)) == (1, 5)
        assert ask("run")[0] == b"mine"
        made[0].close()


def test_a_dead_name_is_swept_and_taken_under_the_lock_of_the_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two who find it dead could each take away what the other has made since."""
    die("run")
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.05)

    for act in (lambda: ask("run"), lambda: Server("run", b""), lambda: rendezvous.sweep("run")):
        with pytest.raises(SharedMemoryError, match=r"another process has had it for 0\.05 s"):
            act()

    assert os.listdir(directory) == ["run.sock"]
    os.close(fd)
    assert rendezvous.sweep("run")


@pytest.mark.parametrize(
    "answer, text",
    [
        (b"", "hung up after 0 bytes"),
        (HEAD.pack(MAGIC, VERSION, 100, os.getpid()) + b"short", "hung up after"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "which is not how a store answers"),
        (HEAD.pack(MAGIC, VERSION, 1 << 30, os.getpid()), "which is not how a store answers"),
        (HEAD.pack(MAGIC, 99, 0, os.getpid()), "speaks version 99 of the protocol"),
        (HEAD.pack(MAGIC, VERSION, 0, 1), "is process 1 to itself and .* another PID namespace"),
    ],
    ids=["nothing", "too little", "another protocol", "too long", "another version", "another process"],
)
def test_an_answer_that_is_none_is_an_error(directory: Path, answer: bytes, text: str) -> None:
    with strange_server(directory, answer), pytest.raises(SharedMemoryError, match=text):
        ask("run")


def test_a_silent_server_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.1)
    with strange_server(directory, None), pytest.raises(SharedMemoryError, match=f"process {os.getpid()}, has not answered for 0.1 s"):
        ask("run")


def test_a_stopped_owner_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal\nfrom scheduler.rendezvous import Server\nServer('run', b'x')\nprint(1, flush=True)\nsignal.pause()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as process:
        assert process.stdout and process.stdout.readline() == b"1\n"
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.1)
        with pytest.raises(SharedMemoryError, match=f"process {process.pid}, has not answered"):
            ask("run")
        os.kill(process.pid, signal.SIGCONT)
        monkeypatch.setattr(rendezvous, "PATIENCE_S", 30.0)
        assert ask("run") == (b"x", process.pid)
        process.kill()


def test_strangers_who_are_silent_or_talk_keep_nobody_waiting() -> None:
    with served() as server, contextlib.ExitStack() as stack:
        fd = os.open(os.path.dirname(server.path), os.O_RDONLY)
        stack.callback(os.close, fd)
        strangers = []
        for i in range(3 * rendezvous.MOST_OPENERS):
            stranger = stack.enter_context(socket.socket(socket.AF_UNIX))
            stranger.settimeout(20)
            stranger.connect(f"/proc/self/fd/{fd}/run.sock")
            if i % 3 == 0:
                with contextlib.suppress(BrokenPipeError):
                    stranger.send(b"\x80\x05garbage" * 100)
            strangers.append(stranger)
            if i % 10 == 0:
                assert ask("run")[0] == b"where it is"
        assert ask("run")[0] == b"where it is"
        assert len(server._openers) <= rendezvous.MOST_OPENERS + 1


def test_another_user_gets_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.getpid(), os.geteuid()
    seen = {"who asks": mine, "the server": mine}  # at the other end
    main = threading.current_thread()
    monkeypatch.setattr(rendezvous, "_peer", lambda _: seen["who asks" if threading.current_thread() is main else "the server"])
    with served():
        seen["who asks"] = (7, os.geteuid() + 1)
        with pytest.raises(SharedMemoryError, match=f"answered by user {os.geteuid() + 1}, not by"):
            ask("run")
        seen.update({"who asks": mine, "the server": (7, os.geteuid() + 1)})
        with pytest.raises(SharedMemoryError, match="hung up after 0 bytes"):
            ask("run")
        seen["the server"] = mine
        assert ask("run")[0] == b"where it is"


@pytest.mark.parametrize("what", ["open to others", "a link", "a file"])
def test_a_directory_that_others_could_use_is_refused(directory: Path, what: str) -> None:
    if what == "open to others":
        directory.mkdir()
        directory.chmod(0o755)
    elif what == "a link":
        (directory.parent / "other").mkdir(mode=0o700)
        directory.symlink_to(directory.parent / "other")
    else:
        directory.write_text("")

    for act in (lambda: ask("run"), lambda: Server("run", b""), names):
        with pytest.raises(SharedMemoryError, match="mode is 755" if what == "open to others" else "no directory, or a symbolic link"):
            act()


def test_a_directory_of_another_user_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = directories()
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(rendezvous, "directories", lambda: there)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)

    with pytest.raises(SharedMemoryError, match=f"belongs to user {uid}, and this process is of user {uid + 1}"):
        Server("run", b"")


def test_without_a_runtime_directory_of_this_user_there_is_one_in_tmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    last = f"{tmp_path}/shmarray-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert directories() == [last]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert directories() == [last]
    with served():
        assert ask("run")[0] == b"where it is" and os.listdir(last) == ["run.sock"]


def test_a_forked_child_does_not_answer_and_does_not_keep_the_name(directory: Path) -> None:
    """The owner is killed while its child lives: the socket is dead all the same."""
    code = (
        "import os, signal\nfrom scheduler.rendezvous import Server\nserver = Server('run', b'x')\npid = os.fork()\n"
        "if pid == 0:\n    server.close()\n    print(os.getpid(), flush=True)\nsignal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        try:
            assert ask("run") == (b"x", process.pid), "what the child closed is its own"
            process.kill()
            process.wait()
            with pytest.raises(FileNotFoundError, match="is gone"):
                ask("run")
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_end_of_a_program_takes_its_name_along(directory: Path) -> None:
    code = "from scheduler.rendezvous import Server\nserver = Server('run', b'x')\nprint('done')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=50,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert os.listdir(directory) == []


def test_nothing_is_left_of_a_server_that_was_closed() -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        with served():
            ask("run")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
