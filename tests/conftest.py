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


@pytest.fixture(autouse=True)
def no_access_out_of_bounds(request):
    """An access outside the launch's tensors fails in the interpreter: a missing mask might add zeros unseen."""
    if not request.module.__name__.endswith(("_kernel", "_kernels")) or torch.cuda.is_available():
        yield
        return
    import numpy as np
    from helpers import FAR
    from triton.runtime import interpreter

    FAR.clear()
    allowed = []
    arguments, accesses = interpreter.GridExecutor._init_args_hst, interpreter._interpreter

    def remember(self, args, kwargs):
        given = (*args, *kwargs.values())
        flat = [t for arg in given for t in (arg if isinstance(arg, tuple) else (arg,))]
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        last = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
        allowed[:] = FAR + [
            (t.data_ptr(), t.data_ptr() + (n + 1) * t.itemsize)
            for t, n in zip(tensors, last, strict=True)
            if t.numel()
        ]
        return arguments(self, args, kwargs)

    class Checked:
        def load(self, ptr, mask, other, dtype):
            check_bounds(ptr[mask], np.dtype(dtype).itemsize)
            return accesses.load(ptr, mask, other, dtype)

        def store(self, ptr, value, mask):
            check_bounds(ptr[mask], value.dtype.itemsize)
            return accesses.store(ptr, value, mask)

        def atomic_rmw(self, op, ptr, value, mask, sem):
            check_bounds(ptr[mask], value.dtype.itemsize)
            return accesses.atomic_rmw(op, ptr, value, mask, sem)

    def check_bounds(address, size):
        inside = np.zeros(address.shape, bool)
        for begin, end in allowed:
            inside |= (address >= begin) & (address + np.uint64(size) <= end)
        assert inside.all(), "an access out of bounds"

    # a patch of its own: the tests' one would be undone after all fixtures of a test file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", remember)
        patch.setattr(interpreter, "_interpreter", Checked())
        yield


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
