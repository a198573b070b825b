"""Several processes save datasets of equal sizes to one folder, others load it: no mixture is ever there."""

import os
import sys
import time

import numpy as np

from fastvae.data import Dataset

folder = sys.argv[1]
SECONDS, N_WRITERS, N_READERS = 2, 3, 2
# writer n has its number in every item id, and a click for its number in every user's row
datasets = [
    Dataset.from_matrix(
        np.eye(N_WRITERS, dtype=int)[[n] * 40].repeat(2, 1) + [[1] * (2 * N_WRITERS)] * 40,
        5,
        items=[f"{n} {k}" for k in range(2 * N_WRITERS)],
        counts=True,
    )
    for n in range(N_WRITERS)
]
datasets[0].save(folder)
end = time.monotonic() + SECONDS


def write(n):
    n_saved = 0
    while time.monotonic() < end:
        try:
            datasets[n].save(folder)
            n_saved += 1
        except ValueError as error:
            assert "no other process writes to" in str(error), error
    assert n_saved > 0


def read():
    while time.monotonic() < end:
        loaded = Dataset.load(folder)
        n = int(loaded.items[0].split()[0])
        for clicks in (loaded.train, *loaded.validation, *loaded.test):
            expected = 1 + (clicks.indices // 2 == n)
            assert (clicks.values == expected).all(), "files of two saves"


children = []
for work in [lambda n=n: write(n) for n in range(N_WRITERS)] + [read] * N_READERS:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
if [os.waitpid(child, 0)[1] for child in children] == [0] * len(children):
    read()
    assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
    print("one dataset at a time")
