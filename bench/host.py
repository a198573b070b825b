"""What an eager step costs its host, beside the dense model's: measured on a CPU, with nothing to compute.

    python -m bench host

The model is so small that its arithmetic takes no time, its tensors say that they were on a GPU, and Triton compiles
and binds each kernel for a chip but launches nothing. So the figures are the host's share of a GPU's step, less what
the driver takes for each launch (about 2 us); the launches are counted beside them.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from fastvae import MultiVAE
from fastvae.kernels.launch import ChipDriver
from fastvae.synthetic import synthetic_clicks

from .launches import CHIP, counted_launches, pretended_gpu
from .steps import PROVIDERS, Provider

NAMES = ("dense-fused-adam", "fastvae", "dense-bf16", "fastvae-bf16")
P_DIMS, N_USERS = [4, 8, 64], 4  # products too small for oneDNN, which takes 80 us to start one
PARTS = ("forward", "backward", "optimiser")


class NoDriver(ChipDriver):
    """And a launcher, which does nothing."""

    binary_ext = "cubin"

    def __init__(self, chip: str):
        super().__init__(int(chip.removeprefix("sm_")))
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What a kernel is checked against."""
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The launcher of a compiled kernel."""
        return lambda *_: None


_results: dict[Any, Tensor] = {}


def _mm(a, b, *, out_dtype=None, out=None, mm=torch.mm):
    """torch.mm where a CPU does not have the fp32 result of a half-precision product: one call and its memory."""
    product = mm(a, b) if out is None else mm(a, b, out=out)
    if out_dtype is None:
        return product
    shape = product.shape
    if shape not in _results:
        _results[shape] = torch.empty(shape, dtype=out_dtype)
    return _results[shape]


@contextlib.contextmanager
def nothing_launched() -> Iterator[None]:
    """A pretended GPU whose kernels are compiled and bound, but not launched."""
    active = mock.patch.object(triton.runtime.driver, "_active", NoDriver(CHIP))
    with active, pretended_gpu(), mock.patch.object(torch, "mm", _mm):
        yield


def step(provider: Provider, batch: Any) -> list[float]:
    """Seconds of the parts of a step."""
    times = [time.perf_counter()]
    loss = provider.forward(batch)
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    provider.optimizer.step()
    provider.module.zero_grad(set_to_none=True)
    times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each provider: microseconds of each part and of the step, and its launches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clicks = synthetic_clicks(N_USERS, P_DIMS[-1], 8 * N_USERS)
    providers = {name: PROVIDERS[name](MultiVAE(P_DIMS)) for name in NAMES}
    for provider in providers.values():
        provider.module.train()
    batches = {name: provider.to_batch(clicks) for name, provider in providers.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    with nothing_launched():
        for n in range(rounds + rounds // 5):
            for name, provider in providers.items():  # in turns, so that all have the same noise
                parts = step(provider, batches[name])
                if n >= rounds // 5:
                    seconds[name].append(parts)
    rows = []
    for name, provider in providers.items():
        with counted_launches() as launches:
            step(provider, batches[name])
        parts = [_quiet(part) for part in zip(*seconds[name], strict=True)]
        whole = _quiet([sum(parts) for parts in seconds[name]])
        row = dict(zip(PARTS, parts, strict=True))
        rows.append({"name": name, "launches": len(launches), **row, "step": whole})
    return rows


def _quiet(seconds: Sequence[float]) -> float:
    """Microseconds at the 20% quantile: what else runs on the machine only ever adds."""
    return 1e6 * statistics.quantiles(seconds, n=5)[0]


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench host", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=500, help="steps of each provider")
    rounds = parser.parse_args(arguments).rounds
    if triton.knobs.runtime.interpret:
        sys.exit(
            "python -m bench host: unset TRITON_INTERPRET, an interpreted kernel binds nothing"
        )
    rows = measure(rounds)
    of_dense = {row["name"].endswith("bf16"): row["step"] for row in rows if "dense" in row["name"]}
    columns = ("launches", *PARTS, "step", "of dense")
    sys.stdout.write(f"{'us':17} " + " ".join(f"{name:>10}" for name in columns) + "\n")
    for row in rows:
        share = row["step"] / of_dense[row["name"].endswith("bf16")]
        cells = [f"{row[column]:10.0f}" for column in columns[:-1]]
        sys.stdout.write(" ".join([f"{row['name']:17}", *cells, f"{share:10.2f}"]) + "\n")
