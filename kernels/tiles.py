"""Launch configurations: a fixed table by chip and shape. Nothing is tuned at run time.

A chip is a row of the table: "sm_75", "sm_80", "sm_90", "sm_100", "gfx942", or "interpreter" for tensors on the CPU, which only
Triton's interpreter can run. A card of another generation takes the newest row that its instructions and its shared
memory allow. `python -m bench resources` compiles every entry for its chip and prints what it costs.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

CHIPS = ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942")
MANY_USERS = 2048  # from here on the widest GEMM tile still fills every multiprocessor


class GemmTile(NamedTuple):
    """Tile of linear_multinomial_nll's GEMM: block_u users x block_i items, block_d features at a time."""

    block_u: int
    block_i: int
    block_d: int
    group_u: int  # tiles of users that share one pass over the weights
    num_warps: int
    num_stages: int


class RowTile(NamedTuple):
    """Tile of a kernel with one program per row, or per split of a row."""

    block_i: int  # columns read at once
    split_i: int  # columns of one program; a multiple of block_i
    block_nnz: int  # clicks read at once
    num_warps: int


class ClickTile(NamedTuple):
    """Tile of a kernel that gathers something for each click of a row."""

    block_nnz: int  # clicks read at once
    block_d: int  # features of their weight rows read at once
    num_warps: int


class ItemTile(NamedTuple):
    """Tile of sparse_linear's ordered weight gradient, one program per item and block of features."""

    block_words: int  # words of 32 users' marks read at once
    block_u: int  # users whose gradient rows are read at once; divides 32
    block_d: int  # features of those rows
    num_warps: int


# by chip and kind of product; a tile for few users, and one for many
_GEMM = {
    # its tensor cores are beyond the compiler: plain arithmetic for every kind
    **{
        ("sm_75", kind): (GemmTile(64, 64, 16, 16, 4, 3),) * 2
        for kind in ("bf16", "fp16", "tf32", "ieee")
    },
    ("sm_80", "bf16"): (GemmTile(64, 128, 64, 16, 4, 4), GemmTile(128, 128, 64, 16, 8, 4)),
    ("sm_80", "fp16"): (GemmTile(64, 128, 64, 16, 4, 4), GemmTile(128, 128, 64, 16, 8, 4)),
    ("sm_80", "tf32"): (GemmTile(64, 128, 32, 16, 4, 4), GemmTile(128, 128, 32, 16, 8, 4)),
    ("sm_80", "ieee"): (GemmTile(64, 64, 16, 16, 4, 3),) * 2,
    ("sm_90", "bf16"): (GemmTile(128, 128, 64, 16, 8, 3), GemmTile(128, 256, 64, 16, 8, 3)),
    ("sm_90", "fp16"): (GemmTile(128, 128, 64, 16, 8, 3),) * 2,
    ("sm_90", "tf32"): (GemmTile(128, 128, 32, 16, 8, 3),) * 2,
    ("sm_90", "ieee"): (GemmTile(64, 64, 16, 16, 4, 3),) * 2,
    ("sm_100", "bf16"): (GemmTile(128, 128, 64, 16, 8, 3),) * 2,
    ("sm_100", "fp16"): (GemmTile(128, 128, 64, 16, 8, 3),) * 2,
    ("sm_100", "tf32"): (GemmTile(128, 128, 32, 16, 8, 3),) * 2,
    ("sm_100", "ieee"): (GemmTile(64, 64, 16, 16, 4, 3),) * 2,
    ("gfx942", "bf16"): (GemmTile(128, 128, 32, 16, 4, 2),) * 2,
    ("gfx942", "fp16"): (GemmTile(128, 128, 32, 16, 4, 2),) * 2,
    ("gfx942", "tf32"): (GemmTile(64, 64, 32, 16, 4, 2),) * 2,
    ("gfx942", "ieee"): (GemmTile(64, 64, 32, 16, 4, 2),) * 2,
}
_INTERPRETER_GEMM = GemmTile(16, 64, 32, 2, 4, 1)

_FORWARD_ROW = RowTile(block_i=4096, split_i=65_536, block_nnz=256, num_warps=8)
_BACKWARD_ROW = RowTile(block_i=2048, split_i=16_384, block_nnz=256, num_warps=8)
_GFX942_BACKWARD_ROW = RowTile(block_i=4096, split_i=16_384, block_nnz=256, num_warps=8)
_INTERPRETER_ROW = RowTile(block_i=64, split_i=256, block_nnz=16, num_warps=4)

# no fewer clicks than threads: a click read twice could be read after it was changed
_STORED_CLICKS = ClickTile(block_nnz=512, block_d=8, num_warps=4)
_GATHERED_CLICKS = ClickTile(block_nnz=64, block_d=32, num_warps=4)
_INTERPRETER_CLICKS = ClickTile(block_nnz=16, block_d=32, num_warps=4)

# sparse_linear; block_nnz is at most 64, the bits of a word of its keep mask. A warp reads 512 bytes of a weight row,
# a thread eight rows at once; a warp of gfx942 has 64 threads and takes two rows
_SPARSE_LINEAR_FORWARD = {
    2: ClickTile(block_nnz=32, block_d=256, num_warps=4),
    4: ClickTile(block_nnz=32, block_d=128, num_warps=4),
}
_SPARSE_LINEAR_BACKWARD = ClickTile(block_nnz=16, block_d=128, num_warps=2)
_SPARSE_LINEAR_ITEM = ItemTile(block_words=64, block_u=8, block_d=128, num_warps=1)
_GFX942_SPARSE_LINEAR_FORWARD = {
    size: tile._replace(num_warps=2) for size, tile in _SPARSE_LINEAR_FORWARD.items()
}
_GFX942_SPARSE_LINEAR_BACKWARD = ClickTile(block_nnz=16, block_d=128, num_warps=1)
_GFX942_SPARSE_LINEAR_ITEM = ItemTile(block_words=64, block_u=8, block_d=256, num_warps=1)
_INTERPRETER_SPARSE_LINEAR = ClickTile(block_nnz=16, block_d=256, num_warps=4)
_INTERPRETER_SPARSE_LINEAR_ITEM = ItemTile(block_words=2, block_u=8, block_d=256, num_warps=1)
# of kernels that read one number a click, with four warps: no fewer than threads, so that none is read by two of them
CLICKS_PER_BLOCK = 256


def chip_of(device: torch.device) -> str:
    """Row of the table for a device."""
    return "interpreter" if device.type == "cpu" else _gpu_chip(device.index)


@functools.cache
def _gpu_chip(index: int | None) -> str:
    if torch.version.hip:
        return "gfx942"
    # 12 is the consumer generation after 10: the older instructions and half the shared memory
    major = torch.cuda.get_device_capability(index)[0]
    if major < 8:
        return "sm_75"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def product_kind(dtype: torch.dtype, allow_tf32: bool) -> str:
    """What a GEMM of this dtype multiplies: bf16, fp16, tf32 or, without a tensor core, ieee."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return half.get(dtype, "tf32" if allow_tf32 else "ieee")


def gemm_tile(chip: str, kind: str, n_users: int) -> GemmTile:
    """Tile of linear_multinomial_nll's GEMM."""
    if chip == "interpreter":
        return _INTERPRETER_GEMM
    return _GEMM[chip, kind][n_users >= MANY_USERS]


def fuses(chip: str, kind: str) -> bool:
    """Whether linear_multinomial_nll folds the exponential into its own GEMM, or leaves the GEMM to torch.

    Without a tensor core the compiler's product is far behind the vendor library's, by more than a saved pass.
    """
    return chip == "interpreter" or (kind != "ieee" and chip != "sm_75")


def forward_row_tile(chip: str) -> RowTile:
    """Tile of multinomial_nll's forward kernels."""
    return _INTERPRETER_ROW if chip == "interpreter" else _FORWARD_ROW


def backward_row_tile(chip: str) -> RowTile:
    """Tile of multinomial_nll's backward kernel."""
    special = {"interpreter": _INTERPRETER_ROW, "gfx942": _GFX942_BACKWARD_ROW}
    return special.get(chip, _BACKWARD_ROW)


def click_tile(chip: str, stored: bool) -> ClickTile:
    """Tile of linear_multinomial_nll's click kernel: stored reads one number a click, otherwise a weight row."""
    if chip == "interpreter":
        return _INTERPRETER_CLICKS
    return _STORED_CLICKS if stored else _GATHERED_CLICKS


def sparse_linear_forward_tile(chip: str, dtype: torch.dtype) -> ClickTile:
    """Tile of sparse_linear's forward kernel, by the weights' dtype."""
    if chip == "interpreter":
        return _INTERPRETER_SPARSE_LINEAR
    by_size = _GFX942_SPARSE_LINEAR_FORWARD if chip == "gfx942" else _SPARSE_LINEAR_FORWARD
    return by_size[dtype.itemsize]


def sparse_linear_backward_tile(chip: str) -> ClickTile:
    """Tile of sparse_linear's gradients that go through the clicks of a user."""
    if chip == "interpreter":
        return _INTERPRETER_SPARSE_LINEAR
    return _GFX942_SPARSE_LINEAR_BACKWARD if chip == "gfx942" else _SPARSE_LINEAR_BACKWARD


def sparse_linear_item_tile(chip: str) -> ItemTile:
    """Tile of sparse_linear's ordered weight gradient, which goes through the users of an item."""
    if chip == "interpreter":
        return _INTERPRETER_SPARSE_LINEAR_ITEM
    return _GFX942_SPARSE_LINEAR_ITEM if chip == "gfx942" else _SPARSE_LINEAR_ITEM


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU current: Triton launches on the current one, whatever its arguments live on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
