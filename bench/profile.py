"""Where a training step's time goes, by torch's profiler.

    python -m bench profile [--shape ml20m ...] [--steps 10] [--by operator|kernel] [--into FILE]

On a GPU by kernel: microseconds beside bytes, FLOP and the floor of both (bench/kernels.py). On a CPU by operator and
shape, fastvae's fp32 and bf16 step: times are those of the calling thread, children not counted, with the profiler
on, a few per cent more than the steps of bench ratio; the products of the last layer are the floor: no faster call of
torch's for them is known. Writes bench/results/profile_<machine>_<shape>.json, or FILE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench import kernels
from bench.machine import RESULTS, add, card, describe, write
from bench.ratio import N_BATCHES, take_turns
from bench.steps import FLOORS, PROVIDERS, SHAPES, Shape, new_model

WIDTHS = {1, 200, 400, 600}  # of the small layers
N_SHOWN = 16  # operators by name
PRODUCTS = ("mm", "addmm", "addmm_", "mv")
PHILOX = ("__rshift__", "bitwise_xor_", "bitwise_and_", "mul")  # on one number for each click


def main(arguments: list[str]) -> None:
    """Profile each shape, print the parts of its step, write the JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench profile", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["ml20m"])
    parser.add_argument("--steps", type=int, default=10)
    by = "kernel" if device == "cuda" else "operator"
    parser.add_argument("--by", choices=("operator", "kernel"), default=by)
    parser.add_argument("--into", type=Path, help="a file of several shapes, in place of one each")
    options = parser.parse_args(arguments)
    for name in options.shape:
        row: dict[str, Any] = {"shape": name, "steps": options.steps}
        if options.by == "kernel":
            row |= kernels.measure(SHAPES[name], options.steps, device)
            kernels.show(row)
        else:
            row["providers"] = by_operator(SHAPES[name], options.steps)
        if options.into:
            add(options.into, name, row)
        else:
            write(RESULTS / f"profile_{card()}_{name}.json", {"machine": describe(), **row})


def by_operator(shape: Shape, n_steps: int) -> dict[str, dict[str, Any]]:
    """The parts of the fp32 and the bf16 step, printed."""
    rows = {}
    for name, floor in (("fastvae", "products"), ("fastvae-bf16", "products-bf16")):
        rows[name] = row = measure(name, floor, shape, n_steps)
        print(f"{name}: {row['ms']} ms a step, its products alone {row['products_alone_ms']} ms")
        for part, ms in row["parts"].items():
            print(f"  {ms:8.2f} ms  {part}")
    return rows


def measure(name: str, floor_name: str, shape: Shape, n_steps: int) -> dict[str, Any]:
    """Milliseconds of a step without the profiler, of its parts and operators with it, and of the bare products."""
    provider = PROVIDERS[name](new_model(shape.n_items))
    clicks = shape.clicks(N_BATCHES)
    batches = [clicks.rows(ids) for ids in torch.arange(clicks.n_users).split(shape.batch_size)]
    floor = FLOORS[floor_name](new_model(shape.n_items))
    provider.step(batches[0])  # as bench ratio: buffers, moments
    cases = {"step": (provider, batches), "products": (floor, [floor.to_batch(batches[0])])}
    times = take_turns(cases, n_steps, "cpu")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for n in range(n_steps):
            provider.step(batches[n % N_BATCHES])
    parts, operators = _by_part(profiler.key_averages(group_by_input_shape=True), shape, n_steps)
    return {
        "ms": round(float(np.median(times["step"])), 1),
        "products_alone_ms": round(float(np.median(times["products"])), 1),
        "profiled_ms": round(sum(parts.values()), 1),
        "parts": {part: round(ms, 2) for part, ms in sorted(parts.items(), key=lambda p: -p[1])},
        "operators": operators[:N_SHOWN],
    }


def _by_part(events: Any, shape: Shape, n_steps: int) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds a step of each part; and of each operator by its shapes, the longest first."""
    parts: dict[str, float] = {}
    operators = []
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total):
        name, shapes = event.key.removeprefix("aten::"), [s for s in event.input_shapes if s]
        ms, calls = event.self_cpu_time_total / 1e3 / n_steps, event.count / n_steps
        part = _part(name, shapes, shape)
        parts[part] = parts.get(part, 0.0) + ms
        row = {
            "operator": name,
            "shapes": str(shapes),
            "calls": round(calls, 1),
            "ms": round(ms, 2),
        }
        operators.append(row)
    return parts, operators


def _part(name: str, shapes: list, shape: Shape) -> str:
    """The part of the step that an operator on these shapes belongs to."""
    sizes = {size for sizes in shapes for size in sizes}
    if name in PRODUCTS:
        small = sizes <= WIDTHS | {shape.batch_size}
        return "small layers" if small else "products of the last layer"
    if name == "_fused_adam_":
        return "fused Adam"
    if "embedding_bag" in name:
        return "gather-sums of the first layer"
    if shape.n_items in sizes and [shape.n_items] != shapes[0] and shapes[0][-1] == shape.n_items:
        return "softmax and other passes over D"
    if name in PHILOX and len(shapes[0]) == 1 and shapes[0][0] > shape.batch_size:
        return "the dropout mask, twice"
    if name == "copy_":
        return "copies: weights to bf16, gradients to fp32"
    return "the rest"
