"""Reading the clicks of a row that dropout keeps, block by block: what sparse_linear's kernels share.

keep[n] is a function of the seed and of the click's position n in the matrix, so that every kernel draws it again and
none of it is stored. The mask is that of fastvae.reference.dropout_keep. Where the matrix holds some columns of a larger
one, seed_ptr is a tuple of the seed and of what user u's positions lack to those there.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tiles


@triton.jit
def tanh_of(x):
    # a polynomial near zero (Cephes tanhf), where the other formula would lose the last digits
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = x + x * z * (p * z - 3.33332819422e-1)
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def coefficient(scale, value, TANH_INPUT: tl.constexpr):
    a = scale * value
    if TANH_INPUT:
        a = tanh_of(a)
    return a


@triton.jit
def dropout_keep(seed_ptr, u, n, drop_below):
    if hasattr(
        seed_ptr, "__len__"
    ):  # a tuple; triton 3.6 fails where one is asked for what it has not
        seed = tl.load(seed_ptr[0])
        n += tl.load(seed_ptr[1] + u)
    else:
        seed = tl.load(seed_ptr)
    low = (n & 0xFFFFFFFF).to(tl.uint32)
    high = (n >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return (word >> 8).to(tl.int32) >= drop_below


@triton.jit
def row_and_features(N_HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr):
    """The program's user or item, and its features; those of one user or item start side by side."""
    n_blocks: tl.constexpr = (N_HIDDEN + BLOCK_D - 1) // BLOCK_D
    d = tl.program_id(0) % n_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return (tl.program_id(0) // n_blocks).to(tl.int64), d


@triton.jit
def programs_of(begin, end, n_splits, SPLIT_NNZ: tl.constexpr):
    """How many of n_splits programs work on a row, in turns of a block: one for each SPLIT_NNZ clicks begun.

    A grid can't depend on the data without waiting for the device: the other programs exist, and leave at once.
    """
    wanted = (end - begin + SPLIT_NNZ - 1) // SPLIT_NNZ
    return tl.minimum(tl.maximum(wanted, 1), n_splits)


@triton.jit
def positions(start, BLOCK_NNZ: tl.constexpr):
    return start + tl.arange(0, BLOCK_NNZ).to(tl.int64)  # a position passes 2**31 in a large matrix


@triton.jit
def load_kept(indices_ptr, seed_ptr, u, start, end, drop_below, BLOCK_NNZ: tl.constexpr):
    """Position and item of a block of user u's clicks; live where a click lies before end and isn't dropped."""
    n = positions(start, BLOCK_NNZ)
    live = n < end
    # not predicated on keep: the index is on its way while Philox runs
    item = tl.load(indices_ptr + n, mask=live, other=0)
    if seed_ptr is not None:
        # by way of one word: else each of the 32 threads that share a weight row draws its number again
        tl.static_assert(BLOCK_NNZ <= 64)
        bit = positions(0, BLOCK_NNZ)
        word = tl.sum((live & dropout_keep(seed_ptr, u, n, drop_below)).to(tl.int64) << bit, axis=0)
        live = ((word >> bit) & 1) == 1
    return n, item, live


@triton.jit
def offsets(r, live, d, STRIDE_R: tl.constexpr, STRIDE_D: tl.constexpr, N_HIDDEN: tl.constexpr):
    """Offsets of features d of rows r, and the mask of the live ones."""
    # int64: row 2,100,000 of 1,024 features lies beyond 2**31
    offset = r.to(tl.int64)[:, None] * STRIDE_R + (d.to(tl.int64) * STRIDE_D)[None, :]
    return offset, live[:, None] & (d < N_HIDDEN)[None, :]


def dropout_arguments(
    seed: Tensor | None, shift: Tensor | None, dropout: float
) -> tuple[Tensor | tuple[Tensor, Tensor] | None, int, float]:
    """The kernels' seed, the 24-bit number below which a click is dropped, and the factor of those kept."""
    if seed is None or dropout == 0:
        return None, 0, 1.0
    drawn_by = seed if shift is None else (seed, shift)
    return drawn_by, round(dropout * 2**24), 1 / (1 - dropout) if dropout < 1 else 0.0


def cut_features(tile: tiles.SplitTile | tiles.ItemTile, n_hidden: int) -> tuple[int, int, int]:
    """Features of a block, blocks of a row, warps of a program: a narrow layer takes a part of the tile."""
    block_d = min(tile.block_d, tiles.next_power_of_2(n_hidden))
    return block_d, tiles.cdiv(n_hidden, block_d), max(1, tile.num_warps * block_d // tile.block_d)
