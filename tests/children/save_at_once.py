"""Several processes save datasets of equal sizes to one folder, others load it: no mixture is ever there."""

import os
import sys
import time

import numpy as np

from fastvae.data import Dataset

folder, end = sys.argv[1:]
N_WRITERS, N_SAVES, N_READERS = 3, 5, 2
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


def write(n):
    n_saved = 0
    while n_saved < N_SAVES:
        try:
            datasets[n].save(folder)
            n_saved += 1
        except ValueError as error:
            assert "no other process writes to" in str(error), error
            time.sleep(0.002)


def read():
    while True:
        loaded = Dataset.load(folder)
        n = int(loaded.items[0].split()[0])
        for clicks in (loaded.train, *loaded.validation, *loaded.test):
            # Clicks of ones have no values
            values = 1 if clicks.values is None else clicks.values
            assert (values == 1 + (clicks.indices // 2 == n)).all(), "files of two saves"
        if os.path.exists(end):
            return


def start(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


readers = [start(read) for _ in range(N_READERS)]
writers = [start(lambda n=n: write(n)) for n in range(N_WRITERS)]
failed = [os.waitpid(child, 0)[1] for child in writers]
open(end, "w").close()
failed += [os.waitpid(child, 0)[1] for child in readers]
if not any(failed):
    read()
    assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
    print("one dataset at a time")
