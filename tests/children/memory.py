"""Prints the MiB that two training steps take beyond weights, gradients and Adam's two moments; argument: n_items."""

import sys
from pathlib import Path

from fastvae import Adam, MultiVAE
from fastvae.synthetic import synthetic_clicks


def mib(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) / 1024


n_items = int(sys.argv[1])
batch = synthetic_clicks(1024, n_items, 1024 * 40)
before = mib("VmRSS:")
model = MultiVAE([200, 600, n_items])
adam = Adam(model.parameters(), 1e-3)
for _ in range(2):
    model.loss(batch, 0.1).backward()
    adam.step()
    adam.zero_grad()
weights = sum(p.numel() * 4 for p in model.parameters()) / 2**20
print(mib("VmHWM:") - before - 4 * weights)
