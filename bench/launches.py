"""The launches of one captured training step, counted without a GPU; and what a step costs its host.

    python -m bench launches

A launch is a Triton kernel, or a call of torch that computes or copies: views, shapes and allocations launch nothing.
The step is fit's own, on CPU tensors that say they were on a GPU, and Triton's kernels are left out.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastvae import MultiVAE
from fastvae.kernels import tiles
from fastvae.ops import _dispatch, _linear
from fastvae.synthetic import synthetic_clicks
from fastvae.trainer import Settings, Trainer

CHIP = "sm_90"
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Names what would be launched inside, in order: kernels by their name, torch's calls as aten.name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def kernel(self, kernel: Any, *_: Any, **__: Any) -> None:
        """Stands in for the launch of a Triton kernel."""
        self.names.append(kernel.fn.__name__.strip("_"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count a call of torch, and make it."""
        result = func(*args, **(kwargs or {}))
        if _launches(func, result):
            self.names.append(str(func).removesuffix(".default"))
        return result


def _launches(func: Any, result: Any) -> bool:
    schema = func._schema
    if schema.name.removeprefix("aten::") in ALLOCATIONS:
        return False
    aliases = [value.alias_info for value in schema.returns]
    if any(alias is not None and not alias.is_write for alias in aliases):
        return False  # a view
    results = result if isinstance(result, tuple | list) else [result]
    if any(argument.alias_info and argument.alias_info.is_write for argument in schema.arguments):
        return not schema.returns or any(isinstance(t, Tensor) and t.numel() for t in results)
    return any(isinstance(t, Tensor) and t.numel() for t in results)


@contextlib.contextmanager
def pretended_gpu(launch: Callable[..., None] | None = None, chip: str = CHIP) -> Iterator[None]:
    """CPU tensors take the ways of a GPU's; launch(kernel, ...), where given, is called in place of Triton kernels."""
    patches: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", property(lambda _: True)),
        (tiles, "chip_of", lambda _: chip),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (tiles, "device_guard", lambda _: contextlib.nullcontext()),
    ]
    if launch is not None:

        def run(kernel: Any, *args: Any, **options: Any) -> None:
            launch(kernel, *args, **options)

        patches += [(JITFunction, "run", run), (InterpretedFunction, "run", run)]
    with _patched(*patches), torch.library._scoped_library("aten", "IMPL") as library:
        # products of half precision with an fp32 result, which CPUs do not have
        library.impl("mm.dtype", lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype)), "CPU")
        library.impl("mm.dtype_out", _mm_into, "CPU")
        yield


def _mm_into(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(torch.mm(a.to(dtype), b.to(dtype)))


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of what is launched inside, on a pretended GPU."""
    launches = Launches()
    # the mode that counts is no reason to take another way than without it
    unwatched = ((module, "is_watched", lambda _: False) for module in (_dispatch, _linear))
    with pretended_gpu(launches.kernel), _patched(*unwatched), launches:
        yield launches.names


@contextlib.contextmanager
def _patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def trainer(precision: str, n_items: int = 2_011, batch_size: int = 32) -> tuple[Trainer, Any]:
    """fit's trainer of the paper's model, and a batch of clicks."""
    clicks = synthetic_clicks(batch_size, n_items, 20 * batch_size)
    torch.manual_seed(0)
    settings = Settings(batch_size, 1e-3, 0.2, 0, False, precision, 0)
    model = MultiVAE([200, 600, n_items]).train()
    return Trainer(model, clicks, None, settings, None, False), clicks.rows(range(batch_size))


def step_launches(precision: str) -> list[str]:
    """The launches of one captured step: forward, backward, optimiser and the running sums."""
    run, clicks = trainer(precision)
    with counted_launches() as names:
        run.step._compute(clicks)  # an optimiser makes its state at its first step
        names.clear()
        run.step._compute(clicks)
    return names


def main(arguments: list[str]) -> None:
    """Print the launches of a step, in order, with how many of each."""
    parser = argparse.ArgumentParser(
        prog="python -m bench launches", description=__doc__.splitlines()[0]
    )
    parser.parse_args(arguments)
    for precision in ("bf16", "fp32"):
        names = step_launches(precision)
        sys.stdout.write(f"{precision}: {len(names)} launches\n")
        for name, count in Counter(names).items():
            sys.stdout.write(f"  {count:2} {name}\n")
