"""The kernels of a training step on a GPU: microseconds of each beside its bytes, its FLOP, and the floor of both.

The floor of a launch is the longer of its bytes at the card's measured rate of copying and its FLOP at the measured
rate of a large bf16 product. What a torch operator moves follows from its shapes; our kernels, whose arguments the
profiler does not see, have formulas here. A kernel that neither knows has no floor and shows as such.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.ratio import N_BATCHES, take_turns
from bench.steps import PROVIDERS, SHAPES, Shape, new_model
from bench.tune import milliseconds
from fastvae import Clicks

EAGER, CAPTURED = "fastvae-bf16", "fastvae-graph-bf16"
N_SHOWN = 24
PRODUCTS = ("mm", "addmm", "addmm_")
RESULT_GIVEN = ("copy_", "zero_", "fill_")  # the result is an argument and is not read
BYTES = {"BFloat16": 2, "Half": 2, "float": 4, "int": 4, "double": 8, "long": 8, "bool": 1}


class Size(NamedTuple):
    """What the work of a step depends on."""

    users: int
    items: int
    clicks: int  # of the batch; dropout keeps half of them in the first layer
    weights: int
    hidden: int = 600
    latent: int = 200


class Launch(NamedTuple):
    """A kernel that ran once."""

    kernel: str
    us: float
    op: str = (
        ""  # torch's operator that launched it, and the shapes and bytes per number of its tensors
    )
    shapes: tuple[tuple[int, ...], ...] = ()
    itemsizes: tuple[int, ...] = ()
    main: bool = False  # the longest of the operator's: it is given the operator's work


# by a part of the kernel's name: bytes and FLOP of all its launches of a step, with bf16 weights and buffers
WORK: dict[str, Callable[[Size], tuple[float, float]]] = {
    "exp_gemm_raised": lambda s: (0, 0),  # leaves at once where no row is raised
    "exp_gemm": lambda s: (
        2 * (s.users * s.hidden + s.items * s.hidden + s.users * s.items),
        2 * s.users * s.items * s.hidden,
    ),
    "exp_row_kernel": lambda s: (4 * s.users * s.items, 0),
    "scale_hidden": lambda s: (4 * s.users * s.hidden, 0),
    "clicks_kernel": lambda s: (8 * s.clicks, 0),
    "multinomial_nll_fwd": lambda s: (2 * s.users * s.items, 0),
    "multinomial_nll_bwd": lambda s: (4 * s.users * s.items, 0),
    # encoded and noise read, z written; back: dz too, dencoded written
    "sample_latent_fwd": lambda s: (16 * s.users * s.latent, 0),
    "sample_latent_bwd": lambda s: (24 * s.users * s.latent, 0),
    # one part of a row at least
    "sparse_linear_finish": lambda s: (6 * s.users * s.hidden, 0),
    "sparse_linear_fwd": lambda s: (s.clicks * (4 + s.hidden) + 2 * s.users * s.hidden, s.clicks * s.hidden),
    # atomics read and write fp32 sums
    "sparse_linear_bwd_weight": lambda s: (4 * s.clicks * (1 + s.hidden), s.clicks * s.hidden),
    # weight, gradient and two moments read, all but the gradient written; ours also writes a bf16 copy of the weight
    "_adam_kernel": lambda s: (30 * s.weights, 0),
    "fusedadam": lambda s: (28 * s.weights, 0),
}  # fmt: skip


def measure(shape: Shape, n_steps: int, device: str) -> dict[str, Any]:
    """Milliseconds of the step, eager and captured; the card's rates; the kernels of the eager step, longest first."""
    clicks = shape.clicks(N_BATCHES if shape.batch_size <= 4096 else 1).to(device)
    batches = [clicks.rows(ids) for ids in torch.arange(clicks.n_users).split(shape.batch_size)]
    providers = {name: PROVIDERS[name](new_model(shape.n_items, device)) for name in (EAGER, CAPTURED)}  # fmt: skip
    for provider in providers.values():
        provider.step(batches[0])
    times = take_turns({name: (p, batches) for name, p in providers.items()}, n_steps, device)
    rates = copy_rate(device, shape), product_rate(device, shape)
    rows = by_kernel(
        launches(_events(providers[EAGER], batches, n_steps, device), device),
        size_of(shape, batches[0], providers[EAGER]), rates, n_steps,
    )  # fmt: skip
    return {
        "eager_ms": round(float(np.median(times[EAGER])), 3),
        "captured_ms": round(float(np.median(times[CAPTURED])), 3),
        "copy_tb_per_s": round(rates[0] / 1e12, 3),
        "product_tflop_per_s": round(rates[1] / 1e12, 1),
        "busy_us": round(sum(row["us"] for row in rows), 1),
        "floor_us": round(sum(row["floor_us"] or 0.0 for row in rows), 1),
        "launches": round(sum(row["calls"] for row in rows), 1),
        "kernels": rows,
    }


def size_of(shape: Shape, batch: Clicks, provider: Any) -> Size:
    """Size of a step on this batch."""
    weights = sum(p.numel() for p in provider.module.parameters())
    return Size(shape.batch_size, shape.n_items, int(batch.row_lengths().sum()), weights)


def _events(provider: Any, batches: list[Clicks], n_steps: int, device: str) -> Any:
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        for n in range(n_steps):
            provider.step(batches[n % len(batches)])
        if device == "cuda":
            torch.cuda.synchronize()
    return profiler.events()


def copy_rate(device: str, shape: Shape) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.zeros(
        2**20 if shape == SHAPES["toy"] else 2**30, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * len(source) / (milliseconds(lambda: target.copy_(source), device, 10) / 1e3)


def product_rate(device: str, shape: Shape) -> float:
    """FLOP a second of a large square product in bf16."""
    n = 128 if shape == SHAPES["toy"] else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / (milliseconds(lambda: a @ b, device, 10) / 1e3)


def launches(events: Iterable[Any], device: str) -> list[Launch]:
    """Every launch in the profiler's events; on a CPU each operator stands for a kernel of its own time."""
    events, found, linked = list(events), [], Counter()
    names = {event.name for event in events if event.device_type == DeviceType.CPU}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        # a range that was named, as the optimiser's step, shows on the device under its own name
        kernels = [(k.name, k.duration) for k in event.kernels if k.name != event.name]
        if device == "cpu":
            kernels = [(event.name, event.self_cpu_time_total)]
        tensors = [(n, tuple(shape)) for n, shape in enumerate(event.input_shapes or []) if shape]
        shapes = tuple(shape for _, shape in tensors)
        itemsizes = tuple(_itemsize(event, n) for n, _ in tensors)
        longest = max((us for _, us in kernels), default=0.0)
        for name, us in kernels:
            linked[name] += 1
            found.append(Launch(name, us, event.name, shapes, itemsizes, us == longest))
    for event in events:
        if event.device_type == DeviceType.CPU or event.name in names:
            continue
        linked[event.name] -= 1
        if linked[event.name] < 0:  # one more than operators have launched
            found.append(Launch(event.name, event.time_range.elapsed_us()))
    return found


def _itemsize(event: Any, n: int) -> int:
    """Bytes of a number of the operator's tensor n; where torch does not say, products are bf16 and the rest fp32."""
    dtypes = getattr(event, "input_dtypes", None) or []
    known = [size for name, size in BYTES.items() if n < len(dtypes) and name in dtypes[n]]
    return known[-1] if known else 2 if event.name.removeprefix("aten::") in PRODUCTS else 4


def formula_of(kernel: str) -> Callable[[Size], tuple[float, float]] | None:
    """The entry of WORK for a kernel."""
    return next((work for part, work in WORK.items() if part in kernel.lower()), None)


def work_of(launch: Launch) -> tuple[float, float] | None:
    """Bytes and FLOP of a launch by one of torch's operators, or None where they are not known."""
    if not (launch.main and launch.shapes and launch.op.startswith("aten::")):
        return None
    op, numbers = launch.op.removeprefix("aten::"), [math.prod(shape) for shape in launch.shapes]
    moved = sum(n * itemsize for n, itemsize in zip(numbers, launch.itemsizes, strict=True))
    if op in PRODUCTS:
        matrices = [shape for shape in launch.shapes if len(shape) == 2]
        for (m, k), (k_too, n) in itertools.pairwise(matrices):
            if k == k_too:
                given = (m, n) in matrices[2:]  # the result is among the arguments
                return moved + (0 if given else m * n * launch.itemsizes[-1]), 2 * m * k * n
        return None
    result = 0 if op in RESULT_GIVEN else max(numbers) * max(launch.itemsizes)
    return moved + result, 0


def by_kernel(
    found: list[Launch], size: Size, rates: tuple[float, float], n_steps: int
) -> list[dict]:
    """A row for each kernel, apart by operator and shapes where one of torch's; the longest first, all per step."""
    groups: dict[tuple, list[Launch]] = {}
    for launch in found:
        ours = formula_of(launch.kernel) is not None
        key = (launch.op, launch.shapes, launch.main) if not ours else ()
        groups.setdefault((launch.kernel, *key), []).append(launch)
    rows = []
    for group in groups.values():
        first, calls, formula = group[0], len(group) / n_steps, formula_of(group[0].kernel)
        work = formula(size) if formula else work_of(first)
        if work and not formula:
            work = (calls * work[0], calls * work[1])
        shapes = " ".join("x".join(map(str, shape)) for shape in first.shapes)
        rows.append({
            "kernel": first.kernel.removeprefix("void ")[:90],
            "op": f"{first.op} {shapes}".strip()[:90],
            "calls": round(calls, 2),
            "us": round(sum(launch.us for launch in group) / n_steps, 2),
            "mb": round(work[0] / 1e6, 2) if work else None,
            "gflop": round(work[1] / 1e9, 2) if work else None,
            "floor_us": round(1e6 * max(work[0] / rates[0], work[1] / rates[1]), 2) if work else None,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["us"])


def show(row: dict[str, Any]) -> None:
    """Print the longest kernels."""
    print(f"captured {row['captured_ms']} ms, eager {row['eager_ms']} ms")
    print(
        f"{row['launches']:.0f} launches busy for {row['busy_us']} us, floor {row['floor_us']} us"
    )
    print(f"floor at {row['copy_tb_per_s']} TB/s and {row['product_tflop_per_s']} TFLOP/s")
    print(f"{'us':>9}{'floor':>9}{'MB':>9}{'GFLOP':>9}{'calls':>7}  kernel, operator")
    for kernel in row["kernels"][:N_SHOWN]:
        cells = [kernel["us"], kernel["floor_us"], kernel["mb"], kernel["gflop"]]
        text = "".join(f"{'-' if cell is None else cell:>9}" for cell in cells)
        print(f"{text}{kernel['calls']:>7}  {kernel['kernel'][:60]}  {kernel['op'][:60]}")
