"""Launching a kernel: one door for all, behind which kernels can also be compiled side by side and not launched.

A first call of each kernel compiles it, half a second of one core and more: of a training's dozen one after the other.
Triton can compile in threads, where the arguments are known beforehand; tensors on torch's meta device are enough.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from triton import AsyncCompileMode

_compiled_for: ContextVar[str | None] = ContextVar("fastvae_compiled_for", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants); only its compilation within compiling()."""
    # by run: kernel[grid] makes a function first
    kernel.run(*args, grid=grid, warmup=_compiled_for.get() is not None, **constants)


def compiled_for() -> str | None:
    """Within compiling(), the row of tiles.TABLE that tensors on the meta device take."""
    return _compiled_for.get()


@contextlib.contextmanager
def compiling(chip: str) -> Iterator[None]:
    """Launches inside only compile, in as many threads as there are cores; all are done when the block ends.

    chip  row of tiles.TABLE; the instructions are those of the current GPU, or of Triton's active driver
    """
    token = _compiled_for.set(chip)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
            yield
    finally:
        _compiled_for.reset(token)
