"""Several processes train a classifier of digits on minibatches that others prepare, and average their weights in shared memory.

    python examples/shared_minibatches.py [--small]

Each trainer has a feeder, which varies the light and adds noise to pictures, and hands batches on through a short queue: a handle each.
After an epoch each trainer writes its weights into its rows of one array, and goes on with the mean of all.
The processes are forked, so that the script needs no main guard.
"""

import multiprocessing
import sys

import numpy as np

from shmarray import shared

try:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import SGDClassifier
except ImportError:
    sys.exit("this example needs scikit-learn: pip install 'shmarray[demo]'")

EPOCHS, BATCHES, BATCH = (6, 10, 100) if "--small" in sys.argv else (20, 20, 500)
TRAINERS, CLASSES = 2, np.arange(10)
context = multiprocessing.get_context("fork")

pictures, labels = load_digits(return_X_y=True)
pictures /= 16
train, test = slice(0, 1400), slice(1400, None)


def prepare(trainer, epoch, number, out):
    """Write batch ``number`` of an epoch into ``out``, with the light varied and with noise, and return its labels."""
    rng = np.random.default_rng((trainer, epoch, number))
    chosen = rng.integers(0, train.stop, BATCH)
    np.multiply(pictures[chosen], rng.uniform(0.5, 1.5, (BATCH, 1)), out=out)
    out += rng.normal(0, 0.2, out.shape)
    return labels[chosen]


def feed(trainer, queue):
    for epoch in range(EPOCHS):
        for number in range(BATCHES):
            batch = shared.empty((BATCH, 64))
            queue.put((batch, prepare(trainer, epoch, number, batch)))


def new_model():
    model = SGDClassifier(loss="log_loss", alpha=1e-4, random_state=0)
    return model.partial_fit(np.zeros((10, 64)), CLASSES, classes=CLASSES)  # makes its weights


def train_on(trainer, queue, weights, barrier):
    model = new_model()
    for _ in range(EPOCHS):
        for _ in range(BATCHES):
            model.partial_fit(*queue.get())
        weights[trainer, :, :64], weights[trainer, :, 64] = model.coef_, model.intercept_
        barrier.wait()  # all have written
        mean = weights.mean(axis=0)
        model.coef_[:], model.intercept_[:] = mean[:, :64], mean[:, 64]
        barrier.wait()  # all have read


weights, barrier = shared.zeros((TRAINERS, 10, 65)), context.Barrier(TRAINERS)
processes = []
for trainer in range(TRAINERS):
    queue = context.Queue(4)
    processes.append(context.Process(target=feed, args=(trainer, queue)))
    processes.append(context.Process(target=train_on, args=(trainer, queue, weights, barrier)))
for process in processes:
    process.start()
for process in processes:
    process.join()


def right(mean):
    """Return the share of pictures, never seen in training, that the weights tell rightly."""
    scores = pictures[test] @ mean[:, :64].T + mean[:, 64]
    return float((scores.argmax(axis=1) == labels[test]).mean())


mean = weights.mean(axis=0)
print(f"{TRAINERS} trainers, {EPOCHS * BATCHES * BATCH * TRAINERS:,} pictures: {right(mean):.1%} of the test pictures told rightly")

# The same in this process alone, batch by batch, on ordinary arrays.
models, batch = [new_model() for _ in range(TRAINERS)], np.empty((BATCH, 64))
for epoch in range(EPOCHS):
    for trainer, model in enumerate(models):
        for number in range(BATCHES):
            model.partial_fit(batch, prepare(trainer, epoch, number, batch))
    expected = np.mean([np.column_stack([model.coef_, model.intercept_]) for model in models], axis=0)
    for model in models:
        model.coef_[:], model.intercept_[:] = expected[:, :64], expected[:, 64]
np.testing.assert_array_equal(mean, expected)
assert right(mean) > 0.8
print("one process alone learns the same weights, to the bit")
