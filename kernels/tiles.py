"""Launch configurations: a fixed table by chip and shape. Nothing is tuned at run time.

A chip is a row of the table, and holds all its tiles. A card of another generation takes the newest row that its
instructions and its shared memory allow. `python -m bench resources` compiles every entry for its chip and prints what
it costs.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import compiled_for

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


class SplitTile(NamedTuple):
    """Tile of sparse_linear's kernels over the clicks of a user, and how a row is split over programs."""

    block_nnz: int  # clicks read at once; at most 64, the bits of a word of the keep mask
    block_d: int  # features of their weight rows read at once
    num_warps: int
    n_splits: int  # programs that a row can have, a power of two
    split_nnz: int  # clicks for each of them that works, the last one's fewer; blocks of block_nnz


class ItemTile(NamedTuple):
    """Tile of sparse_linear's ordered weight gradient, one program per item and block of features."""

    block_words: int  # words of 32 users' marks read at once
    block_u: int  # users whose gradient rows are read at once; divides 32
    block_d: int  # features of those rows
    num_warps: int


class AdamTile(NamedTuple):
    """Block of a weight that one program of Adam updates: four numbers, 16 bytes of each tensor, for each thread."""

    block: int
    num_warps: int


class ChipTiles(NamedTuple):
    """A row of the table: all that is launched on one chip.

    gemm             linear_multinomial_nll's own GEMM, by kind of product: for few users, for many
    fused            kinds whose exponential may be folded into that GEMM; else the GEMM is torch's
    fused_above      columns of the buffer above which it is
    exp_row          the pass over the logits of torch's GEMM; block_i is a multiple of the padding's 128
    stored_clicks    linear_multinomial_nll's clicks, one number each
    gathered_clicks  and where each has to gather a weight row
    forward_row, backward_row  multinomial_nll
    sparse_forward   sparse_linear, by bytes of a weight: for few users, for many
    sparse_backward  its weight gradient through the clicks of a user: for few users, for many
    sparse_values    its gradient of the clicks' values
    sparse_item      its ordered weight gradient, which goes through the users of an item
    adam             the optimiser's step
    """

    gemm: dict[str, tuple[GemmTile, GemmTile]]
    fused: tuple[str, ...]
    fused_above: int
    exp_row: RowTile
    stored_clicks: ClickTile
    gathered_clicks: ClickTile
    forward_row: RowTile
    backward_row: RowTile
    sparse_forward: dict[int, tuple[SplitTile, SplitTile]]
    sparse_backward: tuple[SplitTile, SplitTile]
    sparse_values: SplitTile
    sparse_item: ItemTile
    adam: AdamTile

    def gemm_tile(self, kind: str, n_users: int) -> GemmTile:
        """Tile of linear_multinomial_nll's GEMM."""
        return self.gemm[kind][n_users >= MANY_USERS]

    def fuses(self, kind: str, width: int) -> bool:
        """Whether linear_multinomial_nll folds the exponential into a GEMM of its own at this width of the buffer."""
        return kind in self.fused and width > self.fused_above

    def sparse_forward_tile(self, dtype: torch.dtype, n_users: int) -> SplitTile:
        """Tile of sparse_linear's forward, by the weights' dtype."""
        return self.sparse_forward[dtype.itemsize][n_users >= MANY_USERS]

    def sparse_backward_tile(self, n_users: int) -> SplitTile:
        """Tile of sparse_linear's weight gradient that goes through the clicks of a user."""
        return self.sparse_backward[n_users >= MANY_USERS]


def _same(tile: GemmTile, *kinds: str) -> dict[str, tuple[GemmTile, GemmTile]]:
    return {kind: (tile, tile) for kind in kinds}


# of kernels that read one number a click, with four warps: no fewer than threads, so that none is read by two of them
CLICKS_PER_BLOCK = 256
# without a tensor core the compiler's product is far behind the vendor library's, by more than a saved pass
_TENSOR_CORE = ("bf16", "fp16", "tf32")
_PLAIN = GemmTile(64, 64, 16, 16, 4, 3)

_SM_80 = ChipTiles(
    gemm={
        "bf16": (GemmTile(64, 128, 64, 16, 4, 4), GemmTile(128, 128, 64, 16, 8, 4)),
        "fp16": (GemmTile(64, 128, 64, 16, 4, 4), GemmTile(128, 128, 64, 16, 8, 4)),
        "tf32": (GemmTile(64, 128, 32, 16, 4, 4), GemmTile(128, 128, 32, 16, 8, 4)),
        **_same(_PLAIN, "ieee"),
    },
    fused=_TENSOR_CORE,
    # the pass reads a row twice: up to here the second time comes from the cache
    fused_above=65_536,
    exp_row=RowTile(block_i=2048, split_i=0, block_nnz=256, num_warps=8),
    forward_row=RowTile(block_i=4096, split_i=65_536, block_nnz=256, num_warps=8),
    backward_row=RowTile(block_i=2048, split_i=16_384, block_nnz=256, num_warps=8),
    # no fewer clicks than threads: a click read twice could be read after it was changed
    stored_clicks=ClickTile(block_nnz=512, block_d=8, num_warps=4),
    gathered_clicks=ClickTile(block_nnz=64, block_d=32, num_warps=4),
    # one warp a program, so that its sums need no shared memory. Few users: each block of a row to another program,
    # for the longest row's sake. Many: programs abound, and a row is split where it is long, for the sake of the
    # partial sums' bytes. A thread has 16 loads of 16 bytes on their way in either dtype
    sparse_forward={
        2: (SplitTile(32, 128, 1, 8, 32), SplitTile(32, 128, 1, 4, 128)),
        4: (SplitTile(16, 128, 1, 8, 32), SplitTile(16, 128, 1, 4, 128)),
    },
    sparse_backward=(SplitTile(32, 128, 4, 8, 32), SplitTile(32, 128, 4, 4, 32)),
    sparse_values=SplitTile(16, 128, 2, 8, 32),
    sparse_item=ItemTile(block_words=64, block_u=8, block_d=128, num_warps=1),
    adam=AdamTile(block=512, num_warps=4),
)
_SM_90 = _SM_80._replace(
    gemm={
        "bf16": (GemmTile(128, 128, 64, 16, 8, 3), GemmTile(128, 256, 64, 16, 8, 3)),
        **_same(GemmTile(128, 128, 64, 16, 8, 3), "fp16"),
        **_same(GemmTile(128, 128, 32, 16, 8, 3), "tf32"),
        **_same(_PLAIN, "ieee"),
    },
    # found on an H200 by bench tune: the best of 60, .82 to .70 ms at 24,576 users
    sparse_forward=_SM_80.sparse_forward
    | {2: (_SM_80.sparse_forward[2][0], SplitTile(32, 256, 1, 2, 128))},
)
_GFX942 = _SM_80._replace(
    gemm={
        **_same(GemmTile(128, 128, 32, 16, 4, 2), "bf16", "fp16"),
        **_same(GemmTile(64, 64, 32, 16, 4, 2), "tf32", "ieee"),
    },
    backward_row=RowTile(block_i=4096, split_i=16_384, block_nnz=256, num_warps=8),
    # its warps have 64 threads
    sparse_backward=(SplitTile(16, 128, 1, 8, 32), SplitTile(16, 128, 1, 4, 32)),
    sparse_values=SplitTile(16, 128, 1, 8, 32),
    sparse_item=ItemTile(block_words=64, block_u=8, block_d=256, num_warps=1),
    adam=AdamTile(block=512, num_warps=2),
)
_INTERPRETER_CLICKS = ClickTile(block_nnz=16, block_d=32, num_warps=4)
_INTERPRETER_SPARSE = (SplitTile(16, 256, 4, 4, 16),) * 2
_INTERPRETER_ROW = RowTile(block_i=64, split_i=256, block_nnz=16, num_warps=4)

TABLE = {
    # its tensor cores are beyond the compiler: plain arithmetic for every kind
    "sm_75": _SM_80._replace(gemm=_same(_PLAIN, *_TENSOR_CORE, "ieee"), fused=()),
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    "sm_100": _SM_90._replace(
        gemm=_SM_90.gemm | _same(GemmTile(128, 128, 64, 16, 8, 3), "bf16"),
    ),
    "gfx942": _GFX942,
    # tensors on the CPU, which only Triton's interpreter can run: small tiles, so that small shapes have several
    "interpreter": ChipTiles(
        gemm=_same(GemmTile(16, 64, 32, 2, 4, 1), *_TENSOR_CORE, "ieee"),
        fused=(*_TENSOR_CORE, "ieee"),
        fused_above=65_536,
        exp_row=RowTile(block_i=128, split_i=0, block_nnz=16, num_warps=4),
        forward_row=_INTERPRETER_ROW,
        backward_row=_INTERPRETER_ROW,
        stored_clicks=_INTERPRETER_CLICKS,
        gathered_clicks=_INTERPRETER_CLICKS,
        sparse_forward={2: _INTERPRETER_SPARSE, 4: _INTERPRETER_SPARSE},
        sparse_backward=_INTERPRETER_SPARSE,
        sparse_values=_INTERPRETER_SPARSE[0],
        sparse_item=ItemTile(block_words=2, block_u=8, block_d=256, num_warps=1),
        adam=AdamTile(block=256, num_warps=1),
    ),
}


def of(device: torch.device) -> ChipTiles:
    """The device's row of the table."""
    return TABLE[chip_of(device)]


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes 4 us a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest one that is not below n; triton's takes 4 us a call on the host."""
    return 1 << max(0, n - 1).bit_length()


def chip_of(device: torch.device) -> str:
    """Row of the table for a device; for torch's meta device the one that is compiled for."""
    if device.type == "meta":
        chip = compiled_for()
        assert chip is not None, "meta tensors are for launch.compiling"
        return chip
    return "interpreter" if device.type == "cpu" else _gpu_chip(device.index)


@functools.cache
def _gpu_chip(index: int | None) -> str:
    return "gfx942" if torch.version.hip else row_of(torch.cuda.get_device_capability(index)[0])


def row_of(major: int) -> str:
    """Row of the table for a CUDA card of this compute capability."""
    # 12 is the consumer generation after 10: the older instructions and half the shared memory
    return "sm_75" if major < 8 else {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def product_kind(dtype: torch.dtype, allow_tf32: bool) -> str:
    """What a GEMM of this dtype multiplies: bf16, fp16, tf32 or, without a tensor core, ieee."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return half.get(dtype, "tf32" if allow_tf32 else "ieee")


_NO_GUARD = contextlib.nullcontext()


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU current: Triton launches on the current one, whatever its arguments live on."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(tensor.device)
