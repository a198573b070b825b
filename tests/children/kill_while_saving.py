"""Saves a dataset folder in children that die at every call, and checks that a whole one is there afterwards."""

import os
import random
import shutil
import signal
import sys
import time

import numpy as np

from fastvae.data import Dataset

folder = sys.argv[1]
small, large = (
    Dataset.from_matrix(np.ones((n, 6)), 1, items=[f"{n} {k}" for k in range(6)]) for n in (5, 3000)
)


def in_child(work, kill_after=None):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def die_at(call, count):
    """The process ends just before this call is made for the count-th time."""
    owner = shutil if call == "rmtree" else os
    real, left = getattr(owner, call), [count]

    def step(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return real(*args, **kwargs)

    setattr(owner, call, step)


def check():
    loaded = Dataset.load(folder)
    assert loaded.info["users"]["read"] in (5, 3000)
    assert loaded.items[0] == f"{loaded.info['users']['read']} 0"
    return loaded.info["users"]["read"]


def save_the_other(call, count):
    die_at(call, count)
    (large if check() == 5 else small).save(folder)


def forever():
    while True:
        small.save(folder)
        large.save(folder)


small.save(folder)
n_deaths, seen = 0, set()
for call, n_calls in (("rename", 3), ("fsync", 9), ("rmtree", 3)):
    for count in range(n_calls):
        n_deaths += in_child(lambda call=call, count=count: save_the_other(call, count)) != 0
        seen.add(check())
assert n_deaths >= 12, n_deaths

random.seed(0)
for _ in range(20):
    assert in_child(forever, random.uniform(0.001, 0.06)) == signal.SIGKILL
    seen.add(check())
small.save(folder)
assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
assert check() == 5 and seen == {5, 3000}
print("whole after every death")
