"""What several test files share: the device, random clicks, and the one rule of accuracy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastvae.clicks import Clicks

# address ranges that kernels may touch though they lie in no tensor of the launch
FAR: list[tuple[int, int]] = []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 dots are wrong in the interpreter (bit patterns are multiplied), so bf16 runs on a GPU only
KERNEL_DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    KERNEL_DTYPES.append(torch.bfloat16)


def run_child(name, *arguments, **environment):
    """A program of tests/children in a process of its own, with what it prints; it can import what tests can."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(tests / "children" / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


class Labelled:
    """As a pandas.Series of another order of labels: position n by numpy and in a loop, label n by index."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __iter__(self):
        return iter(self.ids)

    def __getitem__(self, label):
        return self.ids[::-1][label]

    def __array__(self, dtype=None, copy=None):
        return np.array(self.ids, dtype)


class Fixed(nn.Module):
    """Gives every user the same logits: a view of its own tensor, as careless models do."""

    def __init__(self, *logits):
        super().__init__()
        self.n_items = len(logits)
        self.register_buffer("logits", torch.tensor(logits, dtype=torch.float32))
        self.batches = []

    def forward(self, clicks):
        self.batches.append(clicks)
        return self.logits.expand(clicks.n_users, -1)


def assert_as_accurate_as_torch(actual, same_dtype, truth, slack=2.0, floor=1e-5):
    """The kernel may err at most slack times as much as plain torch does at the same dtype (Frobenius norm).

    actual      what the kernel gave
    same_dtype  what the reference gives at the kernel's dtype
    truth       what the reference gives in fp64 on the same, already rounded inputs
    floor       error allowed in any case, relative to the norm of truth
    """
    assert actual.shape == truth.shape
    assert truth.dtype == torch.float64
    actual, same_dtype, truth = (t.detach().double().cpu() for t in (actual, same_dtype, truth))
    assert torch.isfinite(actual).all()
    error, torch_error = (actual - truth).norm(), (same_dtype - truth).norm()
    allowed = slack * torch_error + floor * truth.norm()
    assert error <= allowed, (
        f"error {error:.3e}, torch's own {torch_error:.3e}, allowed {allowed:.3e}"
    )


def random_clicks(lengths, n_items, seed=0, counts=False):
    """Clicks whose row u has lengths[u] distinct random items; counts=True draws values 1..4."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(n_items, length, replace=False)) for length in lengths]
    indices = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    values = rng.integers(1, 5, len(indices)) if counts else None
    return Clicks(
        np.concatenate(([0], np.cumsum(lengths))).astype(np.int64), indices, values, n_items
    )


def many_users(lengths, dtype):
    """The same users 24 times over in half precision: one user's rounding is luck, for the op and for torch alike."""
    return lengths * 24 if dtype in (torch.float16, torch.bfloat16) else lengths
