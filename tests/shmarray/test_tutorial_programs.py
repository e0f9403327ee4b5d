"""The programs that tutorials of multiprocessing teach, as they stand there, and the same over shared arrays: both say the same.

Promises: each program is run as a script, in a process of its own, ours by one start method after the other (in a soak each by every
one) and every Python that is given, theirs by the fastest method; where nothing is said beside it, ours differs from theirs in its
imports alone. Other interpreters are named by SHMARRAY_TEST_PYTHONS (paths with a colon between); they need what shmarray needs.
Never put here: single features (`test_shared`), programs of our own (`test_examples`).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scheduler.shared import ROOT as FAMILY

pytestmark = pytest.mark.timeout(180)

LONG_S = 90
METHODS = ("fork", "spawn", "forkserver")
FASTEST = METHODS[0]
HERE = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
OWN_VERSION = "{}.{}".format(*sys.version_info)


class Program(NamedTuple):
    """A program as it is taught, what is replaced in it (old, new), and what it prints either way."""

    theirs: str
    replace: tuple[tuple[str, str], ...]
    prints: str

    @property
    def ours(self) -> str:
        text = textwrap.dedent(self.theirs)
        for old, new in self.replace:
            assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
            text = text.replace(old, new)
        return text


PROGRAMS = {
    "a number and an array, set by a worker": Program(  # docs.python.org, multiprocessing: sharing state
        """
        from multiprocessing import Process, Value, Array

        def f(n, a):
            n.value = 3.1415927
            for i in range(len(a)):
                a[i] = -a[i]

        if __name__ == '__main__':
            num = Value('d', 0.0)
            arr = Array('i', range(10))

            p = Process(target=f, args=(num, arr))
            p.start()
            p.join()

            print(num.value)
            print(arr[:])
        """,
        (("import Process, Value, Array", "import Process\nfrom shmarray.shared import Value, Array"),),
        "3.1415927\n[0, -1, -2, -3, -4, -5, -6, -7, -8, -9]\n",
    ),
    "structures and text, with one lock for them": Program(  # docs.python.org, multiprocessing: the module sharedctypes
        """
        from multiprocessing import Process, Lock
        from multiprocessing.sharedctypes import Value, Array
        from ctypes import Structure, c_double

        class Point(Structure):
            _fields_ = [('x', c_double), ('y', c_double)]

        def modify(n, x, s, A):
            n.value **= 2
            x.value **= 2
            s.value = s.value.upper()
            for a in A:
                a.x **= 2
                a.y **= 2

        if __name__ == '__main__':
            lock = Lock()

            n = Value('i', 7)
            x = Value(c_double, 1.0/3.0, lock=False)
            s = Array('c', b'hello world', lock=lock)
            A = Array(Point, [(1.875,-6.25), (-5.75,2.0), (2.375,9.5)], lock=lock)

            p = Process(target=modify, args=(n, x, s, A))
            p.start()
            p.join()

            print(n.value)
            print(x.value)
            print(s.value)
            print([(float(a.x), float(a.y)) for a in A])
        """,
        (("multiprocessing.sharedctypes import", "shmarray.shared import"),),
        "49\n0.1111111111111111\nb'HELLO WORLD'\n[(3.515625, 39.0625), (33.0625, 4.0), (5.640625, 90.25)]\n",
    ),
    "a counter under its lock": Program(
        """
        from multiprocessing import Process, Value

        def func(val):
            for i in range(50):
                with val.get_lock():
                    val.value += 1

        if __name__ == '__main__':
            v = Value('i', 0)
            procs = [Process(target=func, args=(v,)) for i in range(4)]

            for p in procs: p.start()
            for p in procs: p.join()

            print(v.value)
        """,
        (("import Process, Value", "import Process\nfrom shmarray.shared import Value"),),
        "200\n",
    ),
    "a matrix through Array and np.frombuffer": Program(
        """
        import multiprocessing as mp
        import numpy as np
        from multiprocessing import Array

        def to_numpy(shared_arr):
            return np.frombuffer(shared_arr.get_obj())

        def worker(shared_arr, rows, i):
            with shared_arr.get_lock():
                a = to_numpy(shared_arr).reshape(rows, -1)
                a[i] = i ** 2

        if __name__ == '__main__':
            shared_arr = Array('d', 2 * 50000)
            procs = [mp.Process(target=worker, args=(shared_arr, 2, i)) for i in range(2)]
            for p in procs: p.start()
            for p in procs: p.join()

            a = to_numpy(shared_arr).reshape(2, -1)
            print(a.shape, a[:, 0].tolist(), a.sum())
        """,
        (("from multiprocessing import Array", "from shmarray.shared import Array"),),
        "(2, 50000) [0.0, 1.0] 50000.0\n",
    ),
    "the same, without np.frombuffer": Program(
        """
        import multiprocessing as mp
        import numpy as np

        def worker(shared_arr, shape, i):
            with shared_arr.get_lock():
                a = np.frombuffer(shared_arr.get_obj()).reshape(shape)
                a[i] = i ** 2

        if __name__ == '__main__':
            shape = (2, 50000)
            shared_arr = mp.Array('d', shape[0] * shape[1])
            procs = [mp.Process(target=worker, args=(shared_arr, shape, i)) for i in range(2)]
            for p in procs: p.start()
            for p in procs: p.join()

            a = np.frombuffer(shared_arr.get_obj()).reshape(shape)
            print(a.shape, a[:, 0].tolist(), a.sum())
        """,
        (
            ("import numpy as np\n", "import numpy as np\nfrom shmarray import shared\n"),
            ("mp.Array('d', shape[0] * shape[1])", "shared.zeros(shape)"),
            ("with shared_arr.get_lock():\n        a = np.frombuffer(shared_arr.get_obj()).reshape(shape)", "with shared_arr.lock() as a:"),
            ("a = np.frombuffer(shared_arr.get_obj()).reshape(shape)", "a = shared_arr"),
        ),
        "(2, 50000) [0.0, 1.0] 50000.0\n",
    ),
    "a matrix for a pool, through its initializer": Program(
        """
        import numpy as np
        from multiprocessing import Pool, Array

        var_dict = {}

        def init_worker(X, X_shape):
            var_dict['X'] = X
            var_dict['X_shape'] = X_shape

        def worker_func(i):
            X_np = np.frombuffer(var_dict['X']).reshape(var_dict['X_shape'])
            return float(np.sum(X_np[i, :]))

        if __name__ == '__main__':
            X_shape = (16, 10000)
            data = np.arange(160000.0).reshape(X_shape)
            X = Array('d', X_shape[0] * X_shape[1], lock=False)
            X_np = np.frombuffer(X).reshape(X_shape)
            np.copyto(X_np, data)
            with Pool(processes=2, initializer=init_worker, initargs=(X, X_shape)) as pool:
                result = pool.map(worker_func, range(X_shape[0]))
                print(result == data.sum(axis=1).tolist(), sum(result))
        """,
        (("import Pool, Array", "import Pool\nfrom shmarray.shared import Array"),),
        "True 12799920000.0\n",
    ),
    "the same as an argument of the tasks": Program(
        """
        import numpy as np
        from multiprocessing import Pool

        def worker_func(task):
            X, i = task
            return float(np.sum(X[i, :]))

        if __name__ == '__main__':
            data = np.arange(160000.0).reshape(16, 10000)
            X = data.copy()
            with Pool(processes=2) as pool:
                result = pool.map(worker_func, [(X, i) for i in range(len(X))])
                print(result == data.sum(axis=1).tolist(), sum(result))
        """,
        (("import Pool\n", "import Pool\nfrom shmarray import shared\n"), ("data.copy()", "shared.copy(data)")),
        "True 12799920000.0\n",
    ),
    "arrays in a list of a Manager": Program(
        """
        import numpy as np
        from multiprocessing import Process, Manager

        def worker(i, results):
            results.append((i, np.full((100, 100), float(i))))

        if __name__ == '__main__':
            with Manager() as manager:
                results = manager.list()
                procs = [Process(target=worker, args=(i, results)) for i in range(2)]
                for p in procs: p.start()
                for p in procs: p.join()
                found = dict(results)
                print(sorted(found), [float(found[i].sum()) for i in sorted(found)])
        """,
        (("import Process, Manager\n", "import Process, Manager\nfrom shmarray import shared\n"), ("np.full(", "shared.full(")),
        "[0, 1] [0.0, 10000.0]\n",
    ),
    "a large array that a Manager holds": Program(
        """
        import numpy as np
        from multiprocessing import Process, Manager

        def worker(box):
            a = box[0]
            a[::2] *= -1
            box[0] = a

        if __name__ == '__main__':
            with Manager() as manager:
                box = manager.list([np.arange(100000.0)])
                p = Process(target=worker, args=(box,))
                p.start()
                p.join()
                print(box[0].sum(), box[0][:4].tolist())
        """,
        (
            ("import Process, Manager\n", "import Process\nfrom shmarray import shared\n"),
            ("a = box[0]\n    a[::2] *= -1\n    box[0] = a\n", "box[::2] *= -1\n"),
            ("with Manager() as manager:", "if True:"),
            ("manager.list([np.arange(100000.0)])", "shared.array(np.arange(100000.0))"),
            ("box[0].sum(), box[0][:4]", "box.sum(), box[:4]"),
        ),
        "50000.0 [-0.0, 1.0, -2.0, 3.0]\n",
    ),
    "a list of a Manager, appended by workers": Program(
        """
        from multiprocessing import Process, Manager

        def worker(L, i):
            L.append('worker %d' % i)
            L.append({'square': i ** 2})

        if __name__ == '__main__':
            with Manager() as manager:
                L = manager.list(['main'])
                for i in range(3):
                    p = Process(target=worker, args=(L, i))
                    p.start()
                    p.join()
                print(L[0], L[1:], len(L))
        """,
        (
            ("import Process, Manager\n", "import Process\nfrom shmarray import shared\n"),
            ("with Manager() as manager:", "if True:"),
            ("manager.list(", "shared.List("),
        ),
        "main ['worker 0', {'square': 0}, 'worker 1', {'square': 1}, 'worker 2', {'square': 4}] 7\n",
    ),
    "a dict and a list of a Manager": Program(  # docs.python.org, multiprocessing: server process; of a store names are text
        """
        from multiprocessing import Process, Manager

        def f(d, l):
            d['1'] = '1'
            d['2'] = 2
            d['0.25'] = None
            l.reverse()

        if __name__ == '__main__':
            with Manager() as manager:
                d = manager.dict()
                l = manager.list(range(10))

                p = Process(target=f, args=(d, l))
                p.start()
                p.join()

                print(dict(d))
                print(l[:])
        """,
        (
            ("import Process, Manager\n", "import Process\nfrom shmarray import shared\n"),
            ("with Manager() as manager:", "if True:"),
            ("manager.dict()", "shared.Store()"),
            ("manager.list(", "shared.List("),
        ),
        "{'1': '1', '2': 2, '0.25': None}\n[9, 8, 7, 6, 5, 4, 3, 2, 1, 0]\n",
    ),
    "a counter in a dict of a Manager": Program(
        """
        from multiprocessing import Process, Manager

        def worker(d, lock):
            for i in range(50):
                with lock:
                    d['count'] += 1

        if __name__ == '__main__':
            with Manager() as manager:
                d, lock = manager.dict(), manager.Lock()
                d['count'] = 0
                procs = [Process(target=worker, args=(d, lock)) for i in range(2)]
                for p in procs: p.start()
                for p in procs: p.join()
                print(d['count'])
        """,
        (
            ("import Process, Manager\n", "import Process\nfrom shmarray import shared\n"),
            ("with Manager() as manager:", "if True:"),
            ("d, lock = manager.dict(), manager.Lock()", "d = shared.Store()\n        lock = d.lock('count')"),
        ),
        "100\n",
    ),
    "an array through SharedMemory, by name": Program(  # docs.python.org, multiprocessing.shared_memory, the second shell a process
        """
        import numpy as np
        from multiprocessing import Process
        from multiprocessing.shared_memory import SharedMemory

        def second(name, shape, dtype):
            existing_shm = SharedMemory(name=name)
            c = np.ndarray(shape, dtype=dtype, buffer=existing_shm.buf)
            c[-1] = 888
            del c
            existing_shm.close()

        if __name__ == '__main__':
            a = np.array([1, 1, 2, 3, 5, 8])
            shm = SharedMemory(create=True, size=a.nbytes)
            b = np.ndarray(a.shape, dtype=a.dtype, buffer=shm.buf)
            b[:] = a[:]
            p = Process(target=second, args=(shm.name, b.shape, b.dtype))
            p.start()
            p.join()
            print(b.tolist())
            del b
            shm.close()
            shm.unlink()
        """,
        (
            ("from multiprocessing.shared_memory import SharedMemory", "from shmarray import shared"),
            ("def second(name, shape, dtype)", "def second(c)"),
            ("existing_shm = SharedMemory(name=name)\n    c = np.ndarray(shape, dtype=dtype, buffer=existing_shm.buf)\n    ", ""),
            ("\n    del c\n    existing_shm.close()", ""),
            (
                "shm = SharedMemory(create=True, size=a.nbytes)\n    b = np.ndarray(a.shape, dtype=a.dtype, buffer=shm.buf)",
                "b = shared.copy(a)",
            ),
            ("\n    b[:] = a[:]", ""),
            ("args=(shm.name, b.shape, b.dtype)", "args=(b,)"),
            ("\n    del b\n    shm.close()\n    shm.unlink()", ""),
        ),
        "[1, 1, 2, 3, 5, 888]\n",
    ),
    "producer and consumer with a Queue": Program(
        """
        import numpy as np
        from multiprocessing import Process, Queue
        from numpy import full

        def producer(q):
            for i in range(10):
                q.put(full((200, 200), i, float))
            q.put(None)

        def consumer(q, results):
            total = 0.0
            while (item := q.get()) is not None:
                item *= 2
                total += float(item.sum())
            results.put(total)

        if __name__ == '__main__':
            q, results = Queue(), Queue()
            procs = [Process(target=producer, args=(q,)), Process(target=consumer, args=(q, results))]
            for p in procs: p.start()
            print(results.get())
            for p in procs: p.join()
        """,
        (("from numpy import full", "from shmarray.shared import full"),),
        "3600000.0\n",
    ),
    "concurrent.futures": Program(
        """
        import numpy as np
        from concurrent.futures import ProcessPoolExecutor

        def scale(a, i):
            a[i] *= i
            return a[i]

        if __name__ == '__main__':
            a = np.ones((8, 1000))
            with ProcessPoolExecutor(2) as executor:
                futures = [executor.submit(scale, a, i) for i in range(8)]
                for i, future in enumerate(futures):
                    a[i] = future.result()
            print(a[:, 0].tolist(), a.sum())
        """,
        (("import numpy as np\n", "from shmarray import shared\n"), ("np.ones((8, 1000))", "shared.full((8, 1000), 1.0)")),
        "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0] 28000.0\n",
    ),
}

# What runs a program as `python program.py` would, but for the start method, which the programs of tutorials leave to the system.
RUN = "import multiprocessing, runpy, sys; multiprocessing.set_start_method(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"


def environment(**more: str) -> dict[str, str]:
    """Return that of a script which is no relation of this process."""
    found = {name: value for name, value in os.environ.items() if name != FAMILY and not name.startswith("COV")}
    return {**found, "PYTHONPATH": str(HERE), **more}


def run(*commands: list[Any]) -> list[str]:
    """Return what scripts print that run side by side, and end well and in silence."""
    scripts = [
        subprocess.Popen(
            [python, "-W", "error", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        for python, *arguments in commands
    ]
    said = [script.communicate(timeout=LONG_S) for script in scripts]
    assert [(script.returncode, errors) for script, (_, errors) in zip(scripts, said)] == [(0, "")] * len(scripts)
    return [output for output, _ in said]


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


@functools.cache
def others() -> dict[str, str]:
    """Return the interpreters of other versions that can import shmarray: version -> path."""
    found = {}
    for python in filter(None, os.environ.get("SHMARRAY_TEST_PYTHONS", "").split(":")):
        asked = "import sys, json, shmarray; print(json.dumps('.'.join(map(str, sys.version_info[:2]))))"
        done = subprocess.run([python, "-c", asked], capture_output=True, text=True, env=environment(), timeout=LONG_S)
        if done.returncode == 0:
            found.setdefault(json.loads(done.stdout), python)
    return found


def interpreter(version: str) -> str:
    if version == OWN_VERSION:
        return sys.executable
    if version not in others():
        pytest.skip(f"SHMARRAY_TEST_PYTHONS names no Python {version} that can import shmarray")
    return others()[version]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_tutorials_says_what_ours_says(tmp_path: Path, name: str) -> None:
    program = PROGRAMS[name]
    theirs = write(tmp_path / "theirs.py", program.theirs)
    ours = write(tmp_path / "ours.py", program.ours)

    commands = [[sys.executable, "-c", RUN, FASTEST, theirs], *([sys.executable, "-c", RUN, method, ours] for method in METHODS)]

    found = run(*commands)

    assert found == [program.prints] * len(commands)


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != OWN_VERSION])
def test_ours_say_the_same_in_other_pythons(tmp_path: Path, version: str) -> None:
    python = interpreter(version)
    commands = []
    for i, program in enumerate(PROGRAMS.values()):
        commands.append([python, "-c", RUN, METHODS[i % 3], write(tmp_path / f"ours{i}.py", program.ours)])

    found = [output for i in range(0, len(commands), 2) for output in run(*commands[i : i + 2])]

    assert found == [program.prints for program in PROGRAMS.values()]


# --- scripts that know nothing of each other --------------------------------------------------------------------------------------

SERVER = """
import sys
from multiprocessing.connection import Listener
import numpy as np
from shmarray import shared

a = shared.array(np.arange(12.0).reshape(3, 4), chunks=(1, 4))
n = shared.Value("q", 5)
with Listener(sys.argv[1]) as listener:
    print("listening", flush=True)
    connection = listener.accept()
    connection.send((a, n, a[1:, ::2]))
    mine = connection.recv()
    print(a.tolist(), n.value, float(mine.sum()), mine.base is not None)
    try:
        with a.lock((2, 0)):
            pass
    except shared.AbandonedLockError as error:
        print("abandoned:", "died" in str(error))
    connection.send("end")
"""

CLIENT = """
import os, sys
from multiprocessing.connection import Client
from shmarray import shared

with Client(sys.argv[1]) as connection:
    a, n, view = connection.recv()
    view += 100
    n.add(1)
    if os.fork() == 0:
        a.lock((2, 0)).acquire()
        os.kill(os.getpid(), 9)
    os.wait()
    made = shared.full((1000, 100), 0.5)
    connection.send(made)
    assert connection.recv() == "end"
    print(float(a[1, 0]), n.value)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_two_unrelated_scripts_exchange_arrays(tmp_path: Path, version: str) -> None:
    """By a socket, as the documentation of multiprocessing.connection has it; the second may be of another Python."""
    python = interpreter(version)

    def start(python: str, script: Path) -> subprocess.Popen[str]:
        arguments = [python, "-W", "error::UserWarning", str(script), "socket"]  # 3.12 warns of forks beside threads otherwise
        # The name of a socket has at most 107 bytes: one relative to its folder is short wherever that lies.
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path)

    server = start(sys.executable, write(tmp_path / "server.py", SERVER))
    assert server.stdout is not None
    said = server.stdout.readline()
    assert said == "listening\n", server.communicate(timeout=LONG_S)
    client = start(python, write(tmp_path / "client.py", CLIENT))
    (served, server_said), (got, client_said) = (script.communicate(timeout=LONG_S) for script in (server, client))

    assert (server_said, client_said) == ("", "")
    assert served == ("[[0.0, 1.0, 2.0, 3.0], [104.0, 5.0, 106.0, 7.0], [108.0, 9.0, 110.0, 11.0]] 6 50000.0 True\nabandoned: True\n")
    assert got == "104.0 6\n"


FIRST = """
import sys
from shmarray import shared

with shared.Store(sys.argv[1], create=True) as store:
    store["temperature"] = shared.zeros((4, 5), chunks=(2, 5))
    store["n"] = shared.Value("q")
    store["params"] = {"dt": 0.5}
    print("made", flush=True)
    store.wait("done", timeout=60)
    print(store["temperature"].sum(), store["n"].value, store.list("log")[:], store["mine"].tolist())
"""

SECOND = """
import sys
import shmarray as sa
from shmarray import shared

with shared.Store(sys.argv[1]) as store:
    with store.lock("temperature") as t:
        t += store["params"]["dt"]
    store["n"].add(3)
    store.list("log").append("second was here")
    store["mine"] = shared.full(3, 7)
    with sa.attach(sys.argv[1]) as run:
        print(float(run["temperature"].sum()))
    store["done"] = True
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_two_unrelated_scripts_share_a_store(tmp_path: Path, version: str) -> None:
    python = interpreter(version)
    name = f"test-{os.getpid()}-{version}"

    def start(python: str, script: Path) -> subprocess.Popen[str]:
        arguments = [python, "-W", "error::UserWarning", str(script), name]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())

    first = start(sys.executable, write(tmp_path / "first.py", FIRST))
    assert first.stdout is not None and first.stdout.readline() == "made\n"
    second = start(python, write(tmp_path / "second.py", SECOND))

    said = [script.communicate(timeout=LONG_S) for script in (second, first)]

    assert said == [("10.0\n", ""), ("10.0 3 ['second was here'] [7, 7, 7]\n", "")]
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_owner_of_a_store_is_killed_and_its_users_go_on(tmp_path: Path, method: str) -> None:
    """A worker has the store by its start, another script by its name; whoever comes later is told."""
    name = f"test-{os.getpid()}-{method}"
    program = write(
        tmp_path / "owner.py",
        """
        import multiprocessing, os, select, sys
        from shmarray import shared

        def work(store, reader, killed):
            a = store["a"]
            print("ready", flush=True)
            reader.recv()
            gone = os.pidfd_open(killed)
            os.kill(killed, 9)
            select.select([gone], [], [])
            a += 1
            store["b"] = 2
            try:
                shared.Store(sys.argv[1])
            except FileNotFoundError as error:
                print(a.sum(), store["b"], sorted(store), "told" if sys.argv[1] in str(error) else error, flush=True)

        if __name__ == "__main__":
            context = multiprocessing.get_context(sys.argv[2])
            store = shared.Store(sys.argv[1], create=True)
            store["a"] = shared.zeros(1000)
            reader, writer = context.Pipe(duplex=False)
            context.Process(target=work, args=(store, reader, os.getpid())).start()
            writer.send("go")
            while True:
                store["a"].sum()
        """,
    )
    owner = subprocess.Popen(
        [sys.executable, str(program), name, method], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )

    output, errors = owner.communicate(timeout=LONG_S)

    assert (owner.returncode, output) == (-9, "ready\n1000.0 2 ['a', 'b'] told\n"), errors
