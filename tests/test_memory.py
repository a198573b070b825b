"""Memory of a training step at many items, measured in a process of its own and scaled to a million."""

import subprocess
import sys

import pytest

SCRIPT = """
from pathlib import Path
import torch
from fastvae import MultiVAE
from fastvae.synthetic import synthetic_clicks
from fastvae.step import ItemMajorAdam

def mib(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) / 1024

batch = synthetic_clicks(1024, {n_items}, 1024 * 40)
before = mib("VmRSS:")
model = MultiVAE([200, 600, {n_items}])
adam = ItemMajorAdam(model, 1e-3)
for _ in range(2):
    model.loss(batch, 0.1).backward()
    adam.step()
weights = sum(p.numel() * 4 for p in model.parameters()) / 2**20
print(mib("VmHWM:") - before - 4 * weights)  # beyond weights, gradients and Adam's two moments
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_items_need_one_buffer_beside_weights_gradients_and_moments():
    n_items, batch = 50_000, 1024
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(n_items=n_items)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    extra, buffer = float(run.stdout), batch * n_items * 4 / 2**20
    # the part that does not grow with the items: libraries, threads, small layers
    fixed = 150
    assert buffer < extra < buffer + fixed, f"{extra} MiB beside a buffer of {buffer} MiB"
    # design: a million items train within weights, gradients, optimiser and 4.5 GB
    assert (extra - fixed) * (1_000_000 / n_items) + fixed < 4.5e9 / 2**20
