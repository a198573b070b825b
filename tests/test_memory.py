"""Memory of a training step at many items, measured in a process of its own and scaled to a million."""

import sys

import pytest
from helpers import run_child


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_items_need_one_buffer_beside_weights_gradients_and_moments():
    n_items, batch = 50_000, 1024
    run = run_child("memory.py", n_items)
    assert run.returncode == 0, run.stderr
    extra, buffer = float(run.stdout), batch * n_items * 4 / 2**20
    # the part that does not grow with the items: libraries, threads, small layers
    fixed = 150
    assert buffer < extra < buffer + fixed, f"{extra} MiB beside a buffer of {buffer} MiB"
    # design: a million items train within weights, gradients, optimiser and 4.5 GB
    assert (extra - fixed) * (1_000_000 / n_items) + fixed < 4.5e9 / 2**20
