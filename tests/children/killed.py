"""Trains in one folder, and in another where it is killed twenty times and resumed; prints how often it was killed."""

import os
import random
import signal
import sys
import time

import torch
from training import learnable, model

from fastvae import fit

EPOCHS, N_KILLS = 110, 20


def train(folder, resume=False, epochs=EPOCHS):
    train, validation = learnable()
    fit(
        model(),
        train,
        validation,
        epochs=epochs,
        batch_size=25,
        patience=0,
        run_dir=folder,
        resume=resume,
    )


def start(folder):
    child = os.fork()
    if child:
        return child
    try:
        train(folder, os.path.exists(os.path.join(folder, "last.pt")))
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)
    os._exit(0)


def n_epochs(folder):
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            return len(file.readlines())
    except FileNotFoundError:
        return 0


def kill_somewhere(folder):
    # some epochs further, and then at any moment of an epoch
    target, child = n_epochs(folder) + random.randrange(5), start(folder)
    while n_epochs(folder) < target and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run neither failed nor came to its end"


def main(straight, killed):
    sys.modules["matplotlib"] = None  # the curve is not what is tested, and takes a second
    torch.set_num_threads(1)  # a child must not wait for threads that a fork leaves behind
    train(None, epochs=1)  # what torch imports at the first step, a child need not import again
    assert os.waitpid(start(straight), 0)[1] == 0
    random.seed(0)
    seen = []
    for _ in range(N_KILLS):
        kill_somewhere(killed)
        seen.append(n_epochs(killed))
    assert 3 < seen[-1] < EPOCHS and len(set(seen)) > 3, seen
    assert os.waitpid(start(killed), 0)[1] == 0
    print("killed", len(seen))


main(*sys.argv[1:])
