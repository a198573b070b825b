"""Search the launch configurations of kernels/tiles.py on the GPU at hand, and print the table's lines.

    python -m bench tune [--users 500 4096] [--items 20108] [--clicks 73] [--limit N] [--into FILE]

All candidates are compiled first, side by side in as many processes as there are cores. Each is then compared with
the table's own entry before it is timed; one that is wrong or does not fit the chip is left out and counted. The best
of each kind is printed as source, beside the present entry and the gain; the table itself is not written.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import add, describe
from fastvae.kernels import linear_multinomial_nll, multinomial_nll, products, sparse_linear, tiles
from fastvae.step import matmul_precision
from fastvae.synthetic import synthetic_clicks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
# of a searching process: logits, their gradient and buffers of two kinds; a context takes half a GiB beside them
BYTES_PER_LOGIT = 16


class Search(NamedTuple):
    """A kernel whose tile is sought: run(tile) launches it and gives what the candidates are compared by."""

    name: str
    run: Callable[[Any], Tensor]
    present: Any  # the table's entry
    candidates: Iterable[Any]
    precision: str = "fp32"  # of torch's products beside the kernel

    def chosen(self, limit: int | None) -> list[Any]:
        """The candidates, or so many of them drawn at random, the same each time."""
        candidates = list(self.candidates)
        return random.Random(0).sample(candidates, min(limit or len(candidates), len(candidates)))


def milliseconds(call: Callable[[], Any], device: str, rounds: int) -> float:
    """Median time of a call after a warm-up."""
    call()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def fastest(search: Search, options: argparse.Namespace) -> dict:
    """The fastest of the candidates beside the present tile."""

    def timed(tile: Any) -> float:
        return milliseconds(lambda: search.run(tile), options.device, options.rounds)

    expected = search.run(search.present).float()
    best, best_ms, n_left_out = search.present, timed(search.present), 0
    row = {"present": repr(best), "present_ms": round(best_ms, 4)}
    candidates = search.chosen(options.limit)
    for tile in candidates:
        try:
            actual = search.run(tile).float()
            if not (actual - expected).norm() <= 1e-2 * expected.norm():
                raise ValueError("wrong")
            ms = timed(tile)
        except Exception:  # too much shared memory, too many registers, or wrong: not a candidate
            n_left_out += 1
            continue
        if ms < best_ms:
            best, best_ms = tile, ms
    row |= {
        "best": repr(best),
        "best_ms": round(best_ms, 4),
        "gain": round(row["present_ms"] / best_ms, 2),
    }
    return {**row, "tried": len(candidates), "left_out": n_left_out}


def compile_share(options: argparse.Namespace, share: int, n_shares: int) -> None:
    """Launch every n-th tile once: Triton keeps the compiled kernels on the disk, where the timing finds them."""
    for search in searches(options):
        for tile in [search.present, *search.chosen(options.limit)][share::n_shares]:
            with contextlib.suppress(Exception):  # what does not fit is counted when it is timed
                search.run(tile)


def compile_all(options: argparse.Namespace) -> None:
    """compile_share in as many processes as asked for and the memory holds."""
    n = options.processes
    if options.device == "cuda":
        of_each = 2**30 + BYTES_PER_LOGIT * max(options.users) * options.items
        n = max(1, min(n, torch.cuda.mem_get_info()[0] // of_each))
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_share, options, share, n) for share in range(n)]:
            done.result()


def gemm_tiles() -> Iterable[tiles.GemmTile]:
    """Tiles of the GEMM with the exponential in its epilogue."""
    shapes = itertools.product((64, 128), (128, 256), (32, 64), (8, 16), (4, 8), (3, 4))
    return (tiles.GemmTile(*shape) for shape in shapes)


def row_tiles(split: int) -> Iterable[tiles.RowTile]:
    """Tiles of the row kernels; a split is a multiple of a block."""
    shapes = itertools.product((1024, 2048, 4096, 8192), (256, 512), (4, 8, 16, 32))
    return (tiles.RowTile(block_i, split, block_nnz, warps) for block_i, block_nnz, warps in shapes)


def split_tiles(block_nnz: tuple[int, ...], warps: tuple[int, ...]) -> Iterable[tiles.SplitTile]:
    """Tiles of sparse_linear's kernels over the clicks of a user; every split is a block or four."""
    shapes = itertools.product(block_nnz, (64, 128, 256), warps, (1, 2, 4, 8, 16), (1, 4))
    return (tiles.SplitTile(n, d, w, splits, n * blocks) for n, d, w, splits, blocks in shapes)


def item_tiles() -> Iterable[tiles.ItemTile]:
    """Tiles of sparse_linear's ordered weight gradient."""
    return (
        tiles.ItemTile(*shape)
        for shape in itertools.product((32, 64, 128), (4, 8, 16), (128, 256), (1, 2, 4))
    )


def searches(options: argparse.Namespace) -> Iterator[Search]:
    """Every search that is asked for, at each number of users."""
    return (search for search in _all_searches(options) if re.search(options.only, search.name))


def _all_searches(options: argparse.Namespace) -> Iterator[Search]:
    for n_users in options.users:
        x = synthetic_clicks(n_users, options.items, n_users * options.clicks).to(options.device)
        csr = (x.indptr, x.indices, x.values, x.row_ids)
        yield from _linear_multinomial_nll(n_users, csr, options)
        yield from _multinomial_nll(n_users, csr, options)
        yield from _sparse_linear(n_users, csr, options)


def _linear_multinomial_nll(n_users: int, csr, options) -> Iterator[Search]:
    """The GEMM of each kind; and torch's GEMM with the pass over its rows, whose time is in all of these."""
    table = tiles.of(torch.device(options.device))
    for kind, dtype in DTYPES.items():
        hidden = torch.randn(n_users, options.hidden, device=options.device).to(dtype)
        weight = 0.05 * torch.randn(options.items, options.hidden, device=options.device)
        weight = products.cast_weight(weight, dtype)
        d = weight.new_empty(
            n_users,
            products.stored_width(options.items),
            dtype=linear_multinomial_nll.stored_dtype(dtype),
        )

        def run(tile, fused=True, hidden=hidden, weight=weight, d=d):
            chosen = {"tile" if fused else "row_tile": tile}
            return linear_multinomial_nll.exp_rows(
                hidden, weight, None, csr, options.items, d, fused=fused, **chosen
            )[0]

        name = f"linear_multinomial_nll {kind} {n_users} users"
        yield Search(name, run, table.gemm_tile(kind, n_users), gemm_tiles(), kind)
        yield Search(
            f"{name}, torch's GEMM and a pass", lambda tile, run=run: run(tile, False),
            table.exp_row, row_tiles(0), kind,
        )  # fmt: skip


def _multinomial_nll(n_users: int, csr, options) -> Iterator[Search]:
    """Forward and backward row kernels."""
    table = tiles.of(torch.device(options.device))
    logits = torch.randn(n_users, options.items, device=options.device).to(torch.bfloat16)
    _, lse = multinomial_nll.multinomial_nll_fwd(logits, csr)
    dnll = torch.ones(n_users, device=options.device)
    yield Search(
        f"multinomial_nll forward {n_users} users",
        lambda tile: multinomial_nll.multinomial_nll_fwd(logits, csr, tile=tile)[0],
        table.forward_row, row_tiles(table.forward_row.split_i),
    )  # fmt: skip
    yield Search(
        f"multinomial_nll backward {n_users} users",
        lambda tile: multinomial_nll.multinomial_nll_bwd(logits, lse, dnll, csr, tile=tile),
        table.backward_row, row_tiles(table.backward_row.split_i),
    )  # fmt: skip


def _sparse_linear(n_users: int, csr, options) -> Iterator[Search]:
    """Forward, weight gradient by atomics, weight gradient in order."""
    table = tiles.of(torch.device(options.device))
    seed = torch.tensor([1], device=options.device)
    dpre = torch.randn(n_users, options.hidden, device=options.device)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(options.items, options.hidden, device=options.device).to(dtype)

        def forward(tile, weight=weight):
            return sparse_linear.sparse_linear_fwd(
                csr, weight, None, seed, dropout=0.5, normalize=True, tanh=True, tanh_input=False, tile=tile
            )  # fmt: skip

        present = table.sparse_forward_tile(dtype, n_users)
        name = f"sparse_linear forward {dtype} {n_users} users".replace("torch.", "")
        candidates = split_tiles((16, 32, 64), (1, 2))
        yield Search(name, lambda tile, f=forward: f(tile)[0], present, candidates)
    scale = forward(None)[1]

    def weight_gradient(deterministic, **tile):
        return sparse_linear.sparse_linear_bwd_weight(
            dpre, csr, seed, scale, options.items, dropout=0.5, tanh_input=False, deterministic=deterministic, **tile
        )  # fmt: skip

    yield Search(
        f"sparse_linear backward, atomics {n_users} users",
        lambda tile: weight_gradient(False, tile=tile),
        table.sparse_backward_tile(n_users), split_tiles((16, 32), (2, 4)),
    )  # fmt: skip
    yield Search(
        f"sparse_linear backward, ordered {n_users} users",
        lambda tile: weight_gradient(True, item_tile=tile),
        table.sparse_item, item_tiles(),
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Compile, time and print every search, and keep each as it is done."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--users", type=int, nargs="*", default=[500, 4096])
    parser.add_argument("--items", type=int, default=20_108)
    parser.add_argument("--clicks", type=int, default=73, help="of a user, in the mean")
    parser.add_argument("--hidden", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="searches whose name has this in it, a pattern")
    parser.add_argument("--limit", type=int, help="candidates of each search at most")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--into", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu" and "TRITON_INTERPRET" not in os.environ:
        raise SystemExit(
            "tune: a GPU is needed, and torch finds none; TRITON_INTERPRET=1 rehearses"
        )
    print(describe())
    compile_all(options)
    for search in searches(options):
        with matmul_precision(search.precision):
            row = fastest(search, options)
        print(f"{search.name:60} {row['best']:90} {row['best_ms']:9.4f} ms, {row['gain']:.2f} x the present "
              f"entry; {row['left_out']} of {row['tried']} left out", flush=True)  # fmt: skip
        if options.into:
            add(options.into, search.name, row)
