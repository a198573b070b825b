"""Search the launch configurations of kernels/tiles.py on the GPU at hand, and print the table's lines.

    python -m bench tune [--users 500 4096] [--items 20108] [--clicks 73]

Every candidate is compared with the table's own entry before it is timed; one that is wrong or does not fit the chip is left
out and counted. The best of each kind is printed as source, beside the present entry and the gain; nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bench.machine import describe
from fastvae.kernels import linear_multinomial_nll, multinomial_nll, sparse_linear, tiles
from fastvae.step import matmul_precision
from fastvae.synthetic import synthetic_clicks

N_HIDDEN = 600
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


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


def search(
    name: str, run: Callable[[Any], Tensor], present: Any, candidates: Iterable[Any], options
) -> None:
    """Print the fastest of the candidates beside the present tile."""
    expected = run(present).float()
    best, best_ms = present, milliseconds(lambda: run(present), options.device, options.rounds)
    present_ms, n_left_out = best_ms, 0
    for tile in candidates:
        try:
            actual = run(tile).float()
            if not (actual - expected).norm() <= 1e-2 * expected.norm():
                raise ValueError("wrong")
            ms = milliseconds(lambda tile=tile: run(tile), options.device, options.rounds)
        except Exception:  # too much shared memory, too many registers, or wrong: not a candidate
            n_left_out += 1
            continue
        if ms < best_ms:
            best, best_ms = tile, ms
    gain = present_ms / best_ms
    print(
        f"{name:44} {best!r:90} {best_ms:9.4f} ms, {gain:.2f} x the present entry; {n_left_out} left out"
    )


def gemm_tiles() -> Iterable[tiles.GemmTile]:
    """Tiles of the GEMM with the exponential in its epilogue."""
    shapes = itertools.product((64, 128), (128, 256), (32, 64), (8, 16), (4, 8), (3, 4))
    return (tiles.GemmTile(*shape) for shape in shapes)


def row_tiles(split: int) -> Iterable[tiles.RowTile]:
    """Tiles of the row kernels; a split is a multiple of a block."""
    shapes = itertools.product((1024, 2048, 4096, 8192), (256, 512), (4, 8, 16))
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


def tune_linear_multinomial_nll(n_users: int, csr, options) -> None:
    """The GEMM of each kind, and the fused way against torch's GEMM with a row kernel."""
    table = tiles.of(torch.device(options.device))
    for kind, dtype in DTYPES.items():
        hidden = torch.randn(n_users, N_HIDDEN, device=options.device).to(dtype)
        weight = (0.05 * torch.randn(options.items, N_HIDDEN, device=options.device)).to(dtype)

        n_items = options.items
        d = torch.empty(
            n_users,
            linear_multinomial_nll.stored_width(n_items),
            dtype=linear_multinomial_nll.stored_dtype(dtype),
            device=options.device,
        )

        def run(tile, fused=True, hidden=hidden, weight=weight, d=d, n_items=n_items):
            return linear_multinomial_nll.exp_rows(
                hidden, weight, None, csr, n_items, d, fused=fused, tile=tile
            )[0]

        name = f"linear_multinomial_nll {kind} {n_users} users"
        with matmul_precision(kind):
            search(name, run, table.gemm_tile(kind, n_users), gemm_tiles(), options)
            plain = milliseconds(lambda run=run: run(None, False), options.device, options.rounds)
        print(f"{name:44} torch's GEMM and the row kernels: {plain:.4f} ms")


def tune_multinomial_nll(n_users: int, csr, options) -> None:
    """Forward and backward row kernels."""
    table = tiles.of(torch.device(options.device))
    logits = torch.randn(n_users, options.items, device=options.device).to(torch.bfloat16)
    _, lse = multinomial_nll.multinomial_nll_fwd(logits, csr)
    dnll = torch.ones(n_users, device=options.device)
    forward, backward = table.forward_row, table.backward_row
    search(
        f"multinomial_nll forward {n_users} users",
        lambda tile: multinomial_nll.multinomial_nll_fwd(logits, csr, tile=tile)[0],
        forward, row_tiles(forward.split_i), options,
    )  # fmt: skip
    search(
        f"multinomial_nll backward {n_users} users",
        lambda tile: multinomial_nll.multinomial_nll_bwd(logits, lse, dnll, csr, tile=tile),
        backward, row_tiles(backward.split_i), options,
    )  # fmt: skip


def tune_sparse_linear(n_users: int, csr, options) -> None:
    """Forward, weight gradient by atomics, weight gradient in order."""
    table = tiles.of(torch.device(options.device))
    seed = torch.tensor([1], device=options.device)
    dpre = torch.randn(n_users, N_HIDDEN, device=options.device)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(options.items, N_HIDDEN, device=options.device).to(dtype)

        def forward(tile, weight=weight):
            return sparse_linear.sparse_linear_fwd(
                csr, weight, None, seed, dropout=0.5, normalize=True, tanh=True, tanh_input=False, tile=tile
            )  # fmt: skip

        present = table.sparse_forward_tile(dtype, n_users)
        name = f"sparse_linear forward {dtype} {n_users} users".replace("torch.", "")
        search(
            name,
            lambda tile, f=forward: f(tile)[0],
            present,
            split_tiles((16, 32, 64), (1, 2)),
            options,
        )
    scale = forward(None)[1]

    def weight_gradient(deterministic, **tile):
        return sparse_linear.sparse_linear_bwd_weight(
            dpre, csr, seed, scale, options.items, dropout=0.5, tanh_input=False, deterministic=deterministic, **tile
        )  # fmt: skip

    search(
        f"sparse_linear backward, atomics {n_users} users",
        lambda tile: weight_gradient(False, tile=tile),
        table.sparse_backward_tile(n_users), split_tiles((16, 32), (2, 4)), options,
    )  # fmt: skip
    search(
        f"sparse_linear backward, ordered {n_users} users",
        lambda tile: weight_gradient(True, item_tile=tile),
        table.sparse_item, item_tiles(), options,
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Search every table and print."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--users", type=int, nargs="*", default=[500, 4096])
    parser.add_argument("--items", type=int, default=20_108)
    parser.add_argument("--clicks", type=int, default=73, help="of a user, in the mean")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("tune: a GPU is needed, and torch finds none")
    options.device = "cuda"
    print(describe())
    for n_users in options.users:
        x = synthetic_clicks(n_users, options.items, n_users * options.clicks).to("cuda")
        csr = x.csr
        for tune in (tune_linear_multinomial_nll, tune_multinomial_nll, tune_sparse_linear):
            tune(n_users, csr, options)
