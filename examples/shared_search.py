"""What is the most valuable load a lorry can take? Processes search branches of the tree, and all know the best load so far.

    python examples/shared_search.py [--small]

A branch is given up when even its bound cannot beat the best value that anybody has found: one number in shared memory, read at every
node, without waiting. The processes are forked, so that the script needs no main guard.
"""

import itertools
import multiprocessing
import sys

import numpy as np

from shmarray import shared

ITEMS, PROCESSES, DEEP = (30, 3, 5) if "--small" in sys.argv else (50, 4, 6)
rng = np.random.default_rng(8)
weights = rng.integers(200, 1000, ITEMS)
values = weights + rng.integers(1, 100, ITEMS)  # nearly as valuable as heavy: the hard kind
order = np.argsort(-values / weights)
weights, values = weights[order].tolist(), values[order].tolist()
CAPACITY = sum(weights) // 2
context = multiprocessing.get_context("fork")


def bound(i, weight, value):
    """Return the most that items from i on can add up to, if the last one could be cut."""
    room = CAPACITY - weight
    for w, v in zip(weights[i:], values[i:], strict=True):
        if w > room:
            return value + v * room / w
        room -= w
        value += v
    return value


def search(prefixes, best, load, visited, is_shared):
    nodes, mine = 0, 0
    while (prefix := prefixes.get()) is not None:
        taken = list(prefix)
        stack = [(len(taken), sum(itertools.compress(weights, taken)), sum(itertools.compress(values, taken)), tuple(taken))]
        while stack:
            i, weight, value, taken = stack.pop()
            nodes += 1
            if weight > CAPACITY:
                continue
            if value > mine:
                mine = value
                if best.max(value) == value:  # one step: the larger of the two stays
                    with load.lock() as items:
                        if items @ values < value:
                            items[:] = [*taken, *[0] * (ITEMS - i)]
            if i < ITEMS and bound(i, weight, value) > (best.value if is_shared else mine):
                stack.append((i + 1, weight, value, (*taken, 0)))
                stack.append((i + 1, weight + weights[i], value + values[i], (*taken, 1)))
    visited.add(nodes)


def find(is_shared):
    prefixes, best, load, visited = context.SimpleQueue(), shared.Value("q"), shared.zeros(ITEMS, "i8"), shared.Value("q")
    arguments = (prefixes, best, load, visited, is_shared)
    searchers = [context.Process(target=search, args=arguments) for _ in range(PROCESSES)]
    for process in searchers:
        process.start()
    for prefix in itertools.product((1, 0), repeat=DEEP):
        prefixes.put(prefix)
    for _ in searchers:
        prefixes.put(None)
    for process in searchers:
        process.join()
    return best.value, load.copy(), visited.value


best, load, visited = find(is_shared=True)
print(f"{load.sum()} of {ITEMS} things, worth {best}, weigh {load @ weights} of {CAPACITY}")
alone = find(is_shared=False)[2]
print(f"{visited:,} nodes looked at; {alone:,} if each process knows its own best alone ({alone / visited:.2f} times)")

# The same by dynamic programming over all weights.
table = np.zeros(CAPACITY + 1, "i8")
for w, v in zip(weights, values, strict=True):
    table[w:] = np.maximum(table[w:], table[:-w] + v)
assert best == table[-1] == load @ values and load @ weights <= CAPACITY
print("dynamic programming finds the same value")
