"""Trains and recommends, and says what a GPU would need; with triton=missing as where it is not installed."""

import sys

if "triton=missing" in sys.argv:
    # what import triton sees where it is not installed
    sys.modules["triton"] = None

import numpy as np

import fastvae
from fastvae.ops.sparse_linear import _SPARSE_LINEAR

x = fastvae.Clicks.from_pairs([0, 0, 1, 1, 2], [0, 3, 3, 4, 1])
model = fastvae.MultiVAE([2, 4, 5])
held_out = fastvae.Clicks.from_pairs([0, 1, 2], [1, 0, 0], 3, 5)
result = fastvae.fit(model, x, (x, held_out), epochs=2, batch_size=2)
assert np.isfinite(result.history[-1]["loss"])
assert fastvae.recommend(model, x, k=2).items.shape == (3, 2)
if "triton=missing" in sys.argv:
    assert fastvae.has_triton() is False
    try:
        _SPARSE_LINEAR.cuda(*[None] * 14)
    except RuntimeError as error:
        print(error)
