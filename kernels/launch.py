"""Launching a kernel: one door for all, behind which kernels can also be compiled side by side and not launched.

A first call of each kernel compiles it, half a second of one core and more: of a training's dozen one after the other.
Triton can compile in threads, where the arguments are known beforehand; tensors on torch's meta device are enough.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import triton
from triton import AsyncCompileMode
from triton.backends.compiler import GPUTarget

_compiled_for: ContextVar[str | None] = ContextVar("fastvae_compiled_for", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants); only its compilation within compiling()."""
    # by run: kernel[grid] makes a function first
    kernel.run(*args, grid=grid, warmup=_compiled_for.get() is not None, **constants)


def compiled_for() -> str | None:
    """Within compiling(), the row of tiles.TABLE that tensors on the meta device take."""
    return _compiled_for.get()


@contextlib.contextmanager
def compiling(chip: str) -> Iterator[Callable[[], int]]:
    """Launches inside only compile, in as many threads as there are cores; all are done when the block ends.

    Yields what counts the kernels so far.

    chip  row of tiles.TABLE; the instructions are those of the current GPU, or of Triton's active driver
    """
    token = _compiled_for.set(chip)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool) as mode:
            yield lambda: len(mode.future_kernels)
    finally:
        _compiled_for.reset(token)


class ChipDriver:
    """What Triton asks of a driver to compile for a card that is not there; it launches nothing."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The chip to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def without_gpu(capability: int) -> None:
    """Let Triton compile for a CUDA card of this compute capability, 90 for an H100, where there is no GPU."""
    # for the rest of the process: there is no driver to go back to
    triton.runtime.driver.set_active(ChipDriver(capability))
