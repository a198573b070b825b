"""Lanes: with a GPU the kernel tests run on it, without one they run in Triton's interpreter on the CPU."""

import os
import signal

# threads that spin starve one another on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# triton reads this when a kernel is decorated, so it has to be set before the first import of fastvae.kernels
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products need it

import pytest


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Deterministic algorithms also fill torch.empty with NaN, so a store that was forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_interrupts():
    """Shells start background jobs with SIGINT ignored; the tests of Ctrl-C hold there too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
