"""What does it cost to hand an array to another process, and to change numbers there under a lock?

    python benchmarks/handover.py [--small]

Handing over: the consumer is a process that was started before, with a pipe to it. A time ends when it has answered; the time that it
takes to read the array (its sum) is measured there, and subtracted. "Extra" is how much more memory all the processes together use
then, beside the array itself. sharedmem, joblib and Ray are shown where they are installed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.shared_memory
import os
import pickle
import statistics
import sys
import time

import measure
import numpy as np
import psutil

from shmarray import shared

SMALL = "--small" in sys.argv
NBYTES = (64 if SMALL else 1024) << 20
MANY = 500 if SMALL else 10_000
LOCKS = 2_000 if SMALL else 20_000
ADDS = 5_000 if SMALL else 100_000
ROUNDS = 3 if SMALL else 7
START = "fork"


def installed(package):
    return importlib.util.find_spec(package) is not None


# --- the consumer's side ----------------------------------------------------------------------------------------------------------


def read(a):
    """Return (seconds, sum) of reading every page, which is what the reader would do anyway."""
    begin = time.perf_counter()
    total = float(a.sum())
    return time.perf_counter() - begin, total


def consume(connection):
    """Answer each message: a function and its arguments, by name."""
    kept = None
    while True:
        message = connection.recv()
        if message is None:
            return
        kept = message[0](*message[1:])
        connection.send(kept)
        kept = None


def take_array(a):
    return read(a)


def touch_array(a):
    return float(a[0])


def give_back(message):
    return message


def take_proxy(proxy):
    return read(proxy[0])


def take_name(name, shape):
    block = multiprocessing.shared_memory.SharedMemory(name)
    a = np.ndarray(shape, np.float64, block.buf)
    result = read(a)
    del a
    block.close()
    return result


def usage(pids):
    """Return the bytes that processes use together (PSS: what they share counts once)."""
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_full_info().pss
        except psutil.NoSuchProcess:
            pass
    return total


# --- handing over one large array ---------------------------------------------------------------------------------------------------


def ask(connection, *message):
    """Return seconds beyond the read itself."""
    begin = time.perf_counter()
    connection.send(message)
    read_s, total = connection.recv()
    return time.perf_counter() - begin - read_s, total


def hand_over_large(context):
    values = np.random.default_rng(0).random(NBYTES // 8)
    expected = float(values.sum())
    here, there = context.Pipe()
    consumer = context.Process(target=consume, args=(there,), daemon=True)
    consumer.start()

    a = shared.copy(values)
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=NBYTES)
    np.ndarray(values.shape, np.float64, block.buf)[:] = values
    cases = {
        "shmarray.shared": lambda: ask(here, take_array, a),
        "pickled through a pipe": lambda: ask(here, take_array, values),
        "shared_memory, by name": lambda: ask(here, take_name, block.name, values.shape),
    }
    times = {name: [] for name in cases}
    for round_number in range(ROUNDS):
        for name, case in cases.items():
            if round_number > 2 and name.startswith("pickled"):
                continue  # seconds each
            seconds, total = case()
            assert abs(total - expected) < 1e-6 * expected, name
            if round_number:  # the first maps it
                times[name].append(max(seconds, 0.0))
            else:
                print(f"    first: {name:28s}{seconds * 1e3:12.3f} ms")
    block.close()
    block.unlink()

    manager = multiprocessing.Manager()
    proxy = manager.list([values])
    times["Manager().list"] = [ask(here, take_proxy, proxy)[0] for _ in range(2)]
    del proxy
    manager.shutdown()
    here.send(None)
    consumer.join()

    # multiprocessing.Array goes to children only, when they are started: an empty process started beside it is subtracted.
    array = multiprocessing.Array("d", len(values), lock=False)
    np.frombuffer(array)[:] = values
    times["multiprocessing.Array (with the process's start)"] = [start_with(context, array) for _ in range(3)]
    del array
    if installed("sharedmem"):
        import sharedmem

        copied = sharedmem.copy(values)
        times["sharedmem (with the process's start)"] = [start_with(context, copied) for _ in range(3)]
        del copied
    if installed("joblib"):
        import joblib

        with joblib.Parallel(n_jobs=2, max_nbytes="1M") as parallel:
            parallel(joblib.delayed(touch_array)(values[:10]) for _ in range(2))
            found = []
            for _ in range(3):
                begin = time.perf_counter()
                (answer,) = parallel([joblib.delayed(take_array)(values)])
                found.append(time.perf_counter() - begin - answer[0])
        times["joblib, memmapped (it writes a file, first)"] = found
    if installed("ray"):
        import ray

        ray.init(num_cpus=1, object_store_memory=3 * NBYTES, include_dashboard=False, logging_level="error")
        remote = ray.remote(take_array)
        reference = ray.put(values)
        ray.get(remote.remote(reference))
        found = []
        for _ in range(3):
            begin = time.perf_counter()
            answer = ray.get(remote.remote(reference))
            found.append(time.perf_counter() - begin - answer[0])
        times["Ray, put before"] = found
        del reference
        ray.shutdown()
    return times


def start_with(context, array):
    here, there = context.Pipe()
    begin = time.perf_counter()
    process = context.Process(target=answer_once, args=(there, array))
    process.start()
    read_s, _ = here.recv()
    seconds = time.perf_counter() - begin - read_s
    process.join()
    return seconds


def answer_once(connection, array):
    connection.send(read(np.frombuffer(array)))


# --- memory -----------------------------------------------------------------------------------------------------------------------


def hold(connection):
    """Keep what is sent until the next message."""
    while True:
        message = connection.recv()
        if message is None:
            return
        value = message[0][0] if message[1] else message[0]
        connection.send(float(np.asarray(value).sum()))


def extra_memory(context):
    """Return, by way, the bytes that the processes use beyond one copy of the array, when the other side holds it."""
    nbytes = min(NBYTES, 256 << 20)
    result = {}
    for name in ("shmarray.shared", "pickled through a pipe", "Manager().list"):
        here, there = context.Pipe()
        consumer = context.Process(target=hold, args=(there,), daemon=True)
        consumer.start()
        manager = multiprocessing.Manager() if name.startswith("Manager") else None
        pids = [os.getpid(), consumer.pid, *([manager._process.pid] if manager else [])]
        before = usage(pids)
        a = shared.empty(nbytes // 8) if name == "shmarray.shared" else np.empty(nbytes // 8)
        a[:] = 1.0
        sent = manager.list([a]) if manager else a
        here.send((sent, manager is not None))
        here.recv()
        result[name] = usage(pids) - before - nbytes
        here.send(None)
        consumer.join()
        del a, sent
        if manager:
            manager.shutdown()
        shared.trim()
    return result


# --- many small ones --------------------------------------------------------------------------------------------------------------


def hand_over_many(context, window):
    """Return, by way, seconds for each of MANY arrays of 1 MB that are made, handed over, looked at, dropped.

    ``window``: how many are on their way at once. With 1, the time that processes take to wake each other is in it, twice: what of a
    time is that is shown beside, as the round trip of 100 bytes through the same pipe, in the same rounds.
    """
    here, there = context.Pipe()
    consumer = context.Process(target=consume, args=(there,), daemon=True)
    consumer.start()

    def through(make, n):
        begin = time.perf_counter()
        for i in range(n + window - 1):
            if i < n:
                a = make()
                a[0] = i
                here.send((touch_array, a))
                del a
            if i >= window - 1:
                assert here.recv() == i - window + 1
        return (time.perf_counter() - begin) / n

    def by_name(n):
        begin = time.perf_counter()
        for _ in range(n):
            block = multiprocessing.shared_memory.SharedMemory(create=True, size=1_000_000)
            here.send((take_name, block.name, (10,)))
            here.recv()
            block.close()
            block.unlink()
        return (time.perf_counter() - begin) / n

    def bare(n):
        begin = time.perf_counter()
        for _ in range(n):
            here.send((give_back, bytes(100)))
            here.recv()
        return (time.perf_counter() - begin) / n

    names = ("shmarray.shared", "pickled through a pipe", "shared_memory, by name", "100 bytes there and back: the floor")
    result = {name: [] for name in names[: 4 if window == 1 else 2]}
    for _ in range(3):
        if window == 1:
            result[names[3]].append(bare(MANY // 3))
        result["shmarray.shared"].append(through(lambda: shared.empty(125_000), MANY // 3))
        result["pickled through a pipe"].append(through(lambda: np.empty(125_000), MANY // 30))
        if window == 1:
            result["shared_memory, by name"].append(by_name(MANY // 30))
    here.send(None)
    consumer.join()
    return result


# --- numbers and locks --------------------------------------------------------------------------------------------------------------


def lock_a_chunk():
    """Return seconds for ``with a.lock(chunk): pass`` and for a lock made before."""
    a = shared.zeros((100, 100), chunks=(10, 100))
    kept = a.lock((3, 0))

    def fresh():
        for _ in range(LOCKS):
            with a.lock((3, 0)):
                pass

    def again():
        for _ in range(LOCKS):
            with kept:
                pass

    theirs = multiprocessing.Lock()

    def standard():
        for _ in range(LOCKS):
            with theirs:
                pass

    cases = {"with a.lock(chunk)": fresh, "with lock, made before": again, "with multiprocessing.Lock()": standard}
    times = {name: [] for name in cases}
    for _ in range(5):
        for name, case in cases.items():
            times[name].append(measure.timed(case)[0] / LOCKS)
    return times


def add_ours(value, n):
    for _ in range(n):
        value.add(1)


def add_theirs(value, lock, n):
    for _ in range(n):
        with lock:
            value.value += 1


def count_up(context):
    """Return, by way, seconds for one addition when 4 processes add at once."""
    result = {}

    def run(act, *args):
        processes = [context.Process(target=act, args=args) for _ in range(4)]
        begin = time.perf_counter()
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return (time.perf_counter() - begin) / (4 * args[-1])

    ours = shared.Value("q")
    result["shared.Value.add"] = [run(add_ours, ours, ADDS)]
    assert ours.value == 4 * ADDS, ours.value
    standard = context.Value("q")
    result["multiprocessing.Value under its lock"] = [run(add_theirs, standard, standard.get_lock(), ADDS)]
    assert standard.value == 4 * ADDS
    few = max(100, ADDS // 50)
    with multiprocessing.Manager() as manager:
        value, lock = manager.Value("q", 0), manager.Lock()
        result["Manager().Value under a Manager().Lock"] = [run(add_theirs, value, lock, few)]
        assert value.value == 4 * few
    return result


def change_chunks(a, n, seed):
    for i in np.random.default_rng(seed).integers(0, a.shape[0], n).tolist():
        with a.lock((i, 0)) as chunk:
            chunk += 1


def exact_chunks(context):
    """Return seconds for one increment of a random chunk, when 8 processes do so; and check that none was lost."""
    n = ADDS // 20
    a = shared.zeros((16, 1000), "i8", chunks=(1, 1000))
    processes = [context.Process(target=change_chunks, args=(a, n, seed)) for seed in range(8)]
    begin = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - begin
    assert (a.sum(axis=0) == 8 * n).all(), "increments were lost"
    return seconds / (8 * n)


def show(title, times, unit):
    scale = {"ms": 1e3, "us": 1e6}[unit]
    ours = statistics.median(next(iter(times.values())))
    print(f"\n{title}")
    for name, found in times.items():
        middle = statistics.median(found)
        ratio = f"{middle / ours:10.1f}x" if ours else ""
        print(f"  {name:52s}{middle * scale:12.3f} {unit}   ({min(found) * scale:.3f} to {max(found) * scale:.3f}, n={len(found)}){ratio}")
    sys.stdout.flush()


if __name__ == "__main__":
    measure.start(f"handing {NBYTES >> 20} MiB, and {MANY} arrays of 1 MB, to another process", "joblib", "sharedmem", "ray")
    context = multiprocessing.get_context(START)
    print(f"a handle has {len(pickle.dumps(shared.empty(10)))} bytes")
    show("handing it over, beyond the read itself", hand_over_large(context), "ms")
    print("\nmemory beyond one copy of the array")
    for name, nbytes in extra_memory(context).items():
        print(f"  {name:52s}{nbytes / 2**20:12.1f} MiB")
    show("many in a stream: made, handed over, looked at, dropped, each", hand_over_many(context, 16), "us")
    show("many one by one, each answered before the next", hand_over_many(context, 1), "us")
    show("lock and unlock", lock_a_chunk(), "us")
    show("one addition, 4 processes at once", count_up(context), "us")
    print(f"\n8 processes, random chunks of one array under locks: exact, {exact_chunks(context) * 1e6:.1f} us an increment")
