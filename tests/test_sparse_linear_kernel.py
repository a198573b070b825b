"""sparse_linear's kernels: against the dense reference in fp64, on edges of rows and blocks, and by hand."""

import bisect
import itertools
import math
import mmap

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    DEVICE,
    FAR,
    KERNEL_DTYPES,
    assert_as_accurate_as_torch,
    many_users,
    random_clicks,
)

from fastvae import Clicks, reference
from fastvae.kernels import kept_clicks, tiles
from fastvae.kernels.sparse_linear import sparse_linear_bwd_weight, sparse_linear_fwd
from fastvae.kernels.sparse_linear_dvalues import sparse_linear_bwd_values

# small tiles: blocks end early, and a row of several blocks is cheap
TILE = tiles.SplitTile(block_nnz=16, block_d=64, num_warps=4, n_splits=2, split_nnz=16)
ITEM_TILE = tiles.ItemTile(block_words=2, block_u=8, block_d=64, num_warps=1)
BLOCK_NNZ, BLOCK_D = TILE[:2]
WORD, BLOCK_U = 32, ITEM_TILE.block_words * 32  # users of a word of marks, of a block of words
# clicks of a block that is read one number a thread; a GPU needs as many as a program has threads
SINGLES = 32 if DEVICE == "cpu" else tiles.CLICKS_PER_BLOCK
OPTIONS = {"dropout": 0.5, "normalize": True, "tanh": True, "tanh_input": False}
SEED = 20_108

LENGTHS = [
    pytest.param([], 5, id="no-users"),
    pytest.param([0, 0], 5, id="no-clicks"),
    pytest.param([0, 3, 2], 7, id="first-row-empty"),
    pytest.param([3, 0, 2], 7, id="middle-row-empty"),
    pytest.param([3, 2, 0], 7, id="last-row-empty"),
    pytest.param([1], 1, id="one-click-one-item"),
    pytest.param([21, 1], 21, id="a-row-with-all-items"),
    pytest.param([BLOCK_NNZ - 1, BLOCK_NNZ, BLOCK_NNZ + 1], 20, id="rows-around-a-block"),
    pytest.param([2, 3 * BLOCK_NNZ + 5, 0], 60, id="a-row-of-blocks-and-a-tail"),
    pytest.param([SINGLES, SINGLES + 1], SINGLES + 2, id="rows-around-a-block-of-single-numbers"),
]


@pytest.fixture(autouse=True)
def small_blocks_of_single_numbers(monkeypatch):
    monkeypatch.setattr(tiles, "CLICKS_PER_BLOCK", SINGLES)


def csr(clicks):
    """A Clicks as the launchers take it: indptr, indices, values, rows."""
    clicks = clicks.to(DEVICE)
    return clicks.csr


def seed_tensor(seed):
    return None if seed is None else torch.tensor([seed], device=DEVICE)


def random_layer(n_items, n_hidden, dtype=torch.float32, bias=True):
    """Item-major weight and bias."""
    torch.manual_seed(0)
    weight = torch.randn(n_items, n_hidden).to(DEVICE, dtype)
    return weight, torch.randn(n_hidden).to(DEVICE, dtype) if bias else None


def forward(clicks, weight, bias=None, seed=SEED, tile=TILE, item_tile=None, **options):
    """y and scale by the kernel."""
    options = OPTIONS | options
    return sparse_linear_fwd(csr(clicks), weight, bias, seed_tensor(seed), **options, tile=tile)


def weight_gradient(
    dpre, clicks, scale, deterministic, seed=SEED, tile=TILE, item_tile=ITEM_TILE, **options
):
    """dweight by the kernels."""
    options = OPTIONS | options
    return sparse_linear_bwd_weight(
        dpre, csr(clicks), seed_tensor(seed), scale, clicks.n_items, deterministic=deterministic,
        dropout=options["dropout"], tanh_input=options["tanh_input"], shift=options.get("shift"),
        tile=tile, item_tile=item_tile,
    )  # fmt: skip


def value_gradient(dpre, weight, clicks, scale, seed=SEED, tile=TILE, item_tile=None, **options):
    """dvalues by the kernels."""
    options = OPTIONS | options
    del options["tanh"]
    return sparse_linear_bwd_values(
        dpre, weight, csr(clicks), seed_tensor(seed), scale, **options, tile=tile
    )


def by_kernel(clicks, weight, bias, dpre, **options):
    """y, dweight both ways, and, where there are values, dvalues."""
    y, scale = forward(clicks, weight, bias, **options)
    gradients = [weight_gradient(dpre, clicks, scale, way, **options) for way in (False, True)]
    if clicks.values is not None:
        gradients.append(value_gradient(dpre, weight, clicks, scale, **options))
    assert y.dtype == weight.dtype
    assert all(t.dtype == torch.float32 for t in [scale, *gradients])
    return y, *gradients


def by_torch(clicks, weight, bias, dpre, dtype, **options):
    """The same by the reference, computed in dtype; dpre is the gradient before the tanh."""
    options = OPTIONS | options
    weight, dpre = weight.cpu().to(dtype).requires_grad_(), dpre.cpu().to(dtype)
    bias = None if bias is None else bias.cpu().to(dtype)
    users, items = whole_matrix(clicks)
    x = torch.zeros(len(clicks.indptr) - 1, clicks.n_items, dtype=dtype)
    x[users, items] = 1 if clicks.values is None else clicks.values.to(dtype)
    x.requires_grad_()
    batch = x if clicks.row_ids is None else x[clicks.row_ids]
    keep = reference.dense_keep(clicks, torch.tensor([SEED]), options["dropout"])
    pre = reference.sparse_linear(batch, weight.t(), bias, keep, **options | {"tanh": False})
    dweight, dx = torch.autograd.grad(pre, (weight, x), dpre)
    y = reference.sparse_linear(batch, weight.t(), bias, keep, **options)
    return y, dweight, dweight, *([] if clicks.values is None else [dx[users, items]])


def whole_matrix(clicks):
    """User and item of every click of the matrix, whatever rows were chosen."""
    return torch.repeat_interleave(clicks.indptr.diff()), clicks.indices.long()


def check(clicks, weight, bias, tile=TILE, item_tile=ITEM_TILE, **options):
    dpre = torch.randn(clicks.n_users, weight.shape[1]).to(DEVICE, weight.dtype)
    actual = by_kernel(clicks, weight, bias, dpre, tile=tile, item_tile=item_tile, **options)
    same = by_torch(clicks, weight, bias, dpre, weight.dtype, **options)
    truth = by_torch(clicks, weight, bias, dpre, torch.float64, **options)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize(("lengths", "n_items"), LENGTHS)
@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_equals_the_reference(lengths, n_items, counts):
    check(random_clicks(lengths, n_items, counts=counts), *random_layer(n_items, 8))


@pytest.mark.parametrize("n_hidden", [1, 8, 50, BLOCK_D - 1, BLOCK_D, BLOCK_D + 1, 200, 600, 1000])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_any_width_and_dtype(n_hidden, dtype):
    # a width of one gives few numbers to compare roundings by
    lengths = many_users([4], dtype) if n_hidden == 1 else [4, 0, 2]
    tile, item_tile = TILE._replace(block_d=256), ITEM_TILE._replace(block_d=256)
    if n_hidden < 200:
        tile, item_tile = TILE, ITEM_TILE
    clicks = random_clicks(lengths, 6, counts=True)
    check(clicks, *random_layer(6, n_hidden, dtype), tile=tile, item_tile=item_tile)


@pytest.mark.parametrize("tanh_input", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_any_options(tanh_input, normalize, dropout, counts):
    clicks = random_clicks([3, 0, 8], 9, counts=counts)
    options = {"dropout": dropout, "normalize": normalize, "tanh_input": tanh_input}
    check(clicks, *random_layer(9, 8), **options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_bias_and_tanh(dtype, tanh, bias):
    check(random_clicks([3, 0, 8], 9), *random_layer(9, 40, dtype, bias), tanh=tanh)


def test_gradients_of_the_whole_layer():
    clicks, (weight, bias) = random_clicks([5, 0, 18], 21, counts=True), random_layer(21, 8)
    dy = torch.randn(3, 8, device=DEVICE)
    y, scale = forward(clicks, weight, bias)
    dweight = weight_gradient(dy * (1 - y.square()), clicks, scale, False)
    truths = []
    for dtype in (torch.float32, torch.float64):
        leaf, x = weight.cpu().to(dtype).requires_grad_(), clicks.to_dense().to(dtype)
        keep = reference.dense_keep(clicks, torch.tensor([SEED]), 0.5)
        dense = reference.sparse_linear(x, leaf.t(), bias.cpu().to(dtype), keep, 0.5)
        truths += torch.autograd.grad(dense, leaf, dy.cpu().to(dtype))
    assert_as_accurate_as_torch(dweight, *truths)


@pytest.mark.parametrize("tanh_input", [False, True])
@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_row_ids_in_any_order_and_repeated(counts, tanh_input):
    clicks = random_clicks([5, 0, BLOCK_NNZ + 1, 1, 3], BLOCK_NNZ + 1, counts=counts)
    check(clicks.rows([2, 0, 2, 1, 2]), *random_layer(BLOCK_NNZ + 1, 8), tanh_input=tanh_input)


@pytest.mark.parametrize("n_users", [WORD - 1, WORD, WORD + 1, BLOCK_U, BLOCK_U + WORD + 1])
@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_ordered_gradient_of_users_around_a_word_and_a_block(n_users, counts):
    clicks = random_clicks([2] * n_users, 4, counts=counts)
    dpre, scale = torch.randn(n_users, 8, device=DEVICE), torch.rand(n_users, device=DEVICE)
    actual = weight_gradient(dpre, clicks, scale, True, dropout=0.0)
    truth = clicks.to_dense().t().double() @ (dpre * scale[:, None]).cpu().double()
    assert_as_accurate_as_torch(actual, truth.float(), truth)


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_the_tiles_of_the_table(chip):
    tile, backward = tiles.TABLE[chip].sparse_forward[4][0], tiles.TABLE[chip].sparse_backward[0]
    clicks = random_clicks([tile.block_nnz + 1, 0], tile.block_nnz + 1, counts=True)
    weight, bias = random_layer(clicks.n_items, tile.block_d + 2)
    check(clicks, weight, bias, tile=tile, item_tile=tiles.TABLE[chip].sparse_item)
    check(clicks, weight, bias, tile=backward)


def test_the_table_by_default():
    clicks = random_clicks([20, 0], 30, counts=True)
    check(clicks, *random_layer(30, 20), tile=None, item_tile=None)


def test_a_row_by_hand():
    # x = [1, 1, 0, 0]: normalise to 0.707107, then keep at twice that
    clicks, weight = Clicks([0, 2], [0, 1], n_items=4), torch.eye(4, device=DEVICE)
    seed = next(
        seed
        for seed in itertools.count()
        if reference.dropout_keep(torch.tensor([seed]), torch.arange(2), 0.5).tolist()
        == [True, False]
    )
    y, scale = forward(clicks, weight, seed=seed, tanh=False)
    assert y.flatten().tolist() == pytest.approx([2**0.5, 0, 0, 0])
    assert scale.tolist() == pytest.approx([2**0.5])


def test_a_row_without_clicks_gives_the_bias_and_no_gradient():
    clicks, (weight, bias) = random_clicks([3, 0, 2], 7, counts=True), random_layer(7, 8)
    y, scale = forward(clicks, weight, bias, tanh=False)
    assert torch.equal(y[1], bias)
    assert scale[1] == 0
    others, dpre = clicks.rows([0, 2]), torch.randn(3, 8, device=DEVICE)
    for deterministic in (False, True):
        dweight = weight_gradient(dpre, clicks, scale, deterministic)
        without = weight_gradient(dpre[[0, 2]], others, scale[[0, 2]], deterministic)
        assert torch.equal(dweight, without)


def test_a_row_of_zeros_is_finite():
    # Clicks drops stored zeros; an op's values may become zero
    clicks = random_clicks([3, 2], 7, counts=True)
    clicks.values[:3] = 0
    weight, bias = random_layer(7, 8)
    y, scale = forward(clicks, weight, bias, tanh=False)
    assert torch.equal(y[0], bias)
    assert scale[0] == 0
    dvalues = value_gradient(torch.ones(2, 8, device=DEVICE), weight, clicks, scale)
    assert dvalues[:3].tolist() == [0, 0, 0]
    assert dvalues.isfinite().all()


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "ordered"])
def test_no_users_still_give_a_gradient(deterministic):
    clicks, empty = random_clicks([3], 7), torch.empty(0, 8, device=DEVICE)
    dweight = weight_gradient(empty, clicks.rows([]), empty[:, 0], deterministic)
    assert dweight.shape == (7, 8)
    assert not dweight.any()


def test_everything_dropped():
    clicks, (weight, bias) = random_clicks([5, 20], 25, counts=True), random_layer(25, 8)
    dpre = torch.ones(2, 8, device=DEVICE)
    y, *gradients = by_kernel(clicks, weight, bias, dpre, dropout=1.0)
    torch.testing.assert_close(y, bias.tanh().expand(2, 8))
    assert not any(g.any() for g in gradients)


def test_no_seed_no_dropout():
    clicks, (weight, bias) = random_clicks([5, 20], 25), random_layer(25, 8)
    y, scale = forward(clicks, weight, bias, seed=None)
    whole, whole_scale = forward(clicks, weight, bias, dropout=0.0)
    assert torch.equal(y, whole)
    assert torch.equal(scale, whole_scale)


@pytest.mark.parametrize(
    "low, high", [(1e-30, 1e-3), (1e-3, 0.1), (0.1, 0.6), (0.6, 1), (1, 4), (4, 9), (9, 200)]
)
def test_tanh_is_as_accurate_as_torch_at_any_size(low, high):
    x = torch.logspace(math.log10(low), math.log10(high), 1000, device=DEVICE)
    x = torch.cat([x, -x])
    # the bias of a row without clicks; a relative error, so that each number weighs the same
    empty, tile = Clicks([0, 0], [], n_items=1), TILE._replace(block_d=256)
    y, _ = forward(empty, torch.zeros(1, len(x), device=DEVICE), x, tile=tile)
    truth = x.double().tanh()
    assert_as_accurate_as_torch(y[0] / truth, x.tanh() / truth, truth / truth, floor=0)


def test_a_bad_weight_is_loud_and_alone():
    clicks, (weight, bias) = Clicks([0, 2, 3], [0, 2, 1], n_items=3), random_layer(3, 8)
    weight[2] = torch.nan
    y, _ = forward(clicks, weight, bias, dropout=0.0)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@triton.jit
def _keep_kernel(seed_ptr, n_ptr, keep_ptr, drop_below, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    keep = kept_clicks.dropout_keep(seed_ptr, 0, tl.load(n_ptr + k), drop_below)
    tl.store(keep_ptr + k, keep)


def kernel_keep(seed, position, dropout):
    """dropout_keep by the kernels' own function."""
    keep = torch.zeros(len(position), dtype=torch.bool, device=DEVICE)
    _, drop_below, _ = kept_clicks.dropout_arguments(seed_tensor(seed), None, dropout)
    _keep_kernel[(1,)](
        seed_tensor(seed), position.to(DEVICE), keep, drop_below, BLOCK=len(position)
    )
    return keep.cpu()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 + 5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("first", [0, 2**31 - 100, 2**32 - 100, 2**40 + 7])
def test_the_mask_is_the_references_bit_for_bit(seed, first):
    position = first + torch.arange(256)
    for dropout in (1e-9, 0.1, 0.5, 0.99, 1.0):
        keep = reference.dropout_keep(torch.tensor([seed]), position, dropout)
        assert torch.equal(kernel_keep(seed, position, dropout), keep)


def test_the_mask_at_its_threshold():
    # the smallest probability, in steps of 2**-24, that drops click 0
    words = range(2**24 + 1)
    seed, position = torch.tensor([SEED]), torch.zeros(1, dtype=torch.int64)
    first = bisect.bisect(
        words, 0, key=lambda k: not reference.dropout_keep(seed, position, k / 2**24).item()
    )
    assert 0 < first < 2**24
    assert kernel_keep(SEED, position, (first - 1) / 2**24).item()
    assert not kernel_keep(SEED, position, first / 2**24).item()
    # rounded to such a step
    assert kernel_keep(SEED, position, (first - 0.6) / 2**24).item()
    assert not kernel_keep(SEED, position, (first - 0.4) / 2**24).item()


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_mask_keeps_its_share_and_depends_on_the_seed(dropout):
    position = torch.arange(2**15)
    one, again, other = (kernel_keep(seed, position, dropout) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    # six standard deviations
    sigma = (dropout * (1 - dropout) / len(position)) ** 0.5
    for keep in (one, other):
        assert abs(keep.double().mean() - (1 - dropout)) < 6 * sigma
    both = (one & other).double().mean()
    assert abs(both - (1 - dropout) ** 2) < 6 * sigma


@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_forward_and_backward_drop_the_same_clicks(counts):
    # with the unit matrix as weight y is the layer's input, and with it as dpre dweight is y transposed
    clicks, unit = random_clicks([20, 7, 0, 1, 14], 23, counts=counts), torch.eye(23, device=DEVICE)
    rows = [3, 0, 1, 0, 4]
    y, scale = forward(clicks.rows(rows), unit, tanh=False)
    keep = reference.dense_keep(clicks.rows(rows), torch.tensor([SEED]), 0.5)
    assert torch.equal(y.cpu() != 0, keep)
    for deterministic in (False, True):
        dpre = torch.eye(5, device=DEVICE)
        dweight = weight_gradient(dpre, clicks.rows(rows), scale, deterministic)
        assert torch.equal(dweight, y.t())
    if counts:
        dpre = torch.ones(5, 23, device=DEVICE)
        dvalues = value_gradient(dpre, unit, clicks.rows(rows), scale, normalize=False)
        keep = reference.dense_keep(clicks, torch.tensor([SEED]), 0.5)[whole_matrix(clicks)]
        assert torch.equal(dvalues.cpu() != 0, keep)


def test_weights_of_dropped_clicks_are_not_read():
    clicks, (weight, bias) = random_clicks([20], 20, counts=True), random_layer(20, 8)
    keep = reference.dense_keep(clicks, torch.tensor([SEED]), 0.5)[0].to(DEVICE)
    assert 0 < keep.sum() < 20
    weight[~keep] = torch.nan
    y, scale = forward(clicks, weight, bias)
    dvalues = value_gradient(torch.ones(1, 8, device=DEVICE), weight, clicks, scale)
    assert y.isfinite().all()
    assert dvalues.isfinite().all()


def test_another_seed_another_mask():
    clicks, unit = random_clicks([40], 40), torch.eye(40, device=DEVICE)
    first, _ = forward(clicks, unit, seed=1)
    again, _ = forward(clicks, unit, seed=1)
    other, _ = forward(clicks, unit, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first != 0, other != 0)


@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_the_ordered_way_repeats_bit_for_bit(counts):
    clicks = random_clicks([2] * 18, 3, counts=counts)
    clicks = clicks.rows([*range(18), 0, 0, 7])
    dpre, scale = torch.randn(21, 8, device=DEVICE), torch.rand(21, device=DEVICE)
    first = weight_gradient(dpre, clicks, scale, True)
    assert torch.equal(weight_gradient(dpre, clicks, scale, True), first)
    if counts:
        weight, _ = random_layer(3, 8)
        scale = scale[clicks.row_ids]
        values = value_gradient(dpre, weight, clicks, scale)
        assert torch.equal(value_gradient(dpre, weight, clicks, scale), values)


STRIDED = [
    pytest.param(lambda t: t[:1, :1].expand(3, 8), id="one-number"),
    pytest.param(lambda t: t[:1].expand(3, 8), id="one-row"),
    pytest.param(lambda t: t[:, :1].expand(3, 8), id="one-column"),
    pytest.param(lambda t: t.t().contiguous().t(), id="transposed"),
    pytest.param(lambda t: torch.cat([t, t + 1], 1)[:, :8], id="part-of-a-wider-one"),
]


@pytest.mark.parametrize("change", STRIDED)
def test_gradients_of_any_stride(change):
    clicks, (weight, _) = random_clicks([3, 0, 6], 7, counts=True), random_layer(7, 8)
    _, scale = forward(clicks, weight)
    dpre = change(torch.randn(3, 8, device=DEVICE))
    assert not dpre.is_contiguous()
    for part in (clicks, clicks.rows([0, 2, 2])):
        of_part = scale if part is clicks else scale[[0, 2, 2]]
        for deterministic in (False, True):
            actual = weight_gradient(dpre, part, of_part, deterministic)
            wanted = weight_gradient(dpre.contiguous(), part, of_part, deterministic)
            torch.testing.assert_close(actual, wanted)
        actual = value_gradient(dpre, weight, part, of_part)
        torch.testing.assert_close(actual, value_gradient(dpre.contiguous(), weight, part, of_part))


def test_launches_happen_on_the_tensors_device(monkeypatch):
    guarded, guard = [], tiles.device_guard
    monkeypatch.setattr(tiles, "device_guard", lambda t: guarded.append(t.device) or guard(t))
    check(random_clicks([2], 3, counts=True), *random_layer(3, 8))
    assert guarded == 4 * [torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")]


def far_memory(dtype, reach):
    """at(offset, n): n numbers at an offset below reach from an origin. They start as 0, and take no memory on a CPU.

    As much lies before the origin, where an offset that wraps at 32 bits lands: wrong, but not out of bounds.
    """
    n_bytes = 2 * (reach + 4096) * dtype.itemsize
    if DEVICE == "cuda":
        if n_bytes > torch.cuda.mem_get_info()[0]:
            pytest.skip("needs more memory than the GPU has left")
        memory = torch.zeros(n_bytes, dtype=torch.uint8, device=DEVICE).view(dtype)
        return lambda offset, n: memory[reach + 4096 + offset :][:n]
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    memory = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    FAR.append((address, address + n_bytes))

    def at(offset, n):
        first = (reach + 4096 + offset) * dtype.itemsize
        return torch.frombuffer(memory, dtype=dtype, count=n, offset=first)

    return at


FAR_ITEM, FAR_HIDDEN = 2_100_000, 1024  # offset 2,150,400,000
FAR_TILE = TILE._replace(block_d=FAR_HIDDEN)
FAR_ITEM_TILE = ITEM_TILE._replace(block_d=FAR_HIDDEN)


def far_click(value=2.0):
    indices, values = torch.tensor([FAR_ITEM], dtype=torch.int32), torch.tensor([value])
    return Clicks([0, 1], [0], n_items=1)._like(torch.tensor([0, 1]), indices, values, 1)


def test_weight_rows_beyond_32_bits():
    at = far_memory(torch.float16, FAR_ITEM * FAR_HIDDEN)
    row = torch.randn(FAR_HIDDEN, device=DEVICE).half()
    at(FAR_ITEM * FAR_HIDDEN, FAR_HIDDEN).copy_(row)
    weight = at(0, FAR_HIDDEN).view(1, FAR_HIDDEN)
    options = {"dropout": 0.0, "normalize": False, "tile": FAR_TILE}
    y, scale = forward(far_click(), weight, tanh=False, **options)
    assert torch.equal(y[0], 2 * row)
    dpre = torch.ones(1, FAR_HIDDEN, device=DEVICE)
    dvalues = value_gradient(dpre, weight, far_click(), scale, **options)
    assert dvalues.item() == pytest.approx(row.float().sum().item(), rel=1e-4)


def test_gradient_rows_beyond_32_bits(monkeypatch):
    at = far_memory(torch.float32, FAR_ITEM * FAR_HIDDEN)
    dpre, scale = torch.randn(1, FAR_HIDDEN, device=DEVICE), torch.ones(1, device=DEVICE)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: at(0, FAR_HIDDEN).view(1, -1))
    weight_gradient(dpre, far_click(), scale, False, dropout=0.0, tile=FAR_TILE)
    assert torch.equal(at(FAR_ITEM * FAR_HIDDEN, FAR_HIDDEN), 2 * dpre[0])


def test_marks_beyond_32_bits(monkeypatch):
    # 65 users, three words of marks an item; only the last user has a click
    item = 800_000_000
    at = far_memory(torch.int32, item * 3 + 3)
    indptr, indices = torch.tensor([0] * 65 + [1]), torch.tensor([item], dtype=torch.int32)
    clicks = Clicks([0], [], n_items=1)._like(indptr, indices, None, 1)
    dpre, scale = torch.ones(65, 8, device=DEVICE), torch.ones(65, device=DEVICE)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: at(0, 3).view(1, 3))
    dweight = weight_gradient(dpre, clicks, scale, True, dropout=0.0)
    assert at(item * 3, 3).tolist() == [0, 0, 1]
    assert not dweight.any()


def test_positions_beyond_32_bits():
    first, n = 2**32 + 5, 40
    at = far_memory(torch.int32, first + n)
    at(first, n).copy_(torch.arange(n))
    indptr, indices = torch.tensor([first, first + n], device=DEVICE), at(0, 1)
    keep = reference.dropout_keep(torch.tensor([SEED]), first + torch.arange(n), 0.5)
    clicks = Clicks([0], [], n_items=n)._like(indptr, indices, None, n)
    y, scale = forward(clicks, torch.eye(n, device=DEVICE), tanh=False)
    assert torch.equal(y[0].cpu() != 0, keep)
    for deterministic in (False, True):
        dpre = torch.ones(1, 1, device=DEVICE)
        dweight = weight_gradient(dpre, clicks, scale, deterministic)
        assert torch.equal(dweight[:, 0].cpu() != 0, keep)


@pytest.fixture
def far_programs(monkeypatch):
    """Every launch's program ids start at FAR_ITEM, on the axis of users and items."""
    if DEVICE == "cuda":
        pytest.skip("a GPU counts its programs from 0")
    builder = triton.runtime.interpreter.interpreter_builder
    program_id = type(builder).create_get_program_id

    def shifted(axis):
        handle = program_id(builder, axis)
        handle.data += FAR_ITEM if axis == 0 else 0
        return handle

    monkeypatch.setattr(builder, "create_get_program_id", shifted)


def far_user():
    """A user FAR_ITEM of two clicks, and nobody before."""
    indptr = far_memory(torch.int64, FAR_ITEM + 2)
    indptr(FAR_ITEM + 1, 1).fill_(2)
    indices, values = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1.0, 2.0])
    return Clicks([0, 0], [], n_items=2)._like(indptr(0, 2), indices, values, 2)


def test_users_beyond_32_bits_forward(far_programs, monkeypatch):
    y, scale = far_memory(torch.float32, FAR_ITEM * FAR_HIDDEN), far_memory(torch.float32, FAR_ITEM)
    parts = far_memory(torch.float32, FAR_ITEM * FAR_TILE.n_splits * FAR_HIDDEN)
    outputs = iter([y(0, FAR_HIDDEN).view(1, -1), scale(0, 1), parts(0, FAR_HIDDEN).view(1, -1)])
    weight, _ = random_layer(2, FAR_HIDDEN)
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: next(outputs))
    options = {"dropout": 0.0, "normalize": False, "tanh": False}
    forward(far_user(), weight, tile=FAR_TILE, **options)
    torch.testing.assert_close(y(FAR_ITEM * FAR_HIDDEN, FAR_HIDDEN), weight[0] + 2 * weight[1])
    assert scale(FAR_ITEM, 1) == 1


def test_users_beyond_32_bits_backward(far_programs):
    far_dpre, far_scale = (
        far_memory(torch.float32, FAR_ITEM * FAR_HIDDEN),
        far_memory(torch.float32, FAR_ITEM),
    )
    row = far_dpre(FAR_ITEM * FAR_HIDDEN, FAR_HIDDEN)
    row.copy_(torch.randn(FAR_HIDDEN))
    far_scale(FAR_ITEM, 1).fill_(1)
    dpre, scale = far_dpre(0, FAR_HIDDEN).view(1, -1), far_scale(0, 1)
    options = {"dropout": 0.0, "normalize": False, "tile": FAR_TILE}
    dweight = weight_gradient(dpre, far_user(), scale, False, **options)
    assert torch.equal(dweight, torch.stack([row, 2 * row]))
    weight, _ = random_layer(2, FAR_HIDDEN)
    dvalues = value_gradient(dpre, weight, far_user(), scale, **options)
    torch.testing.assert_close(dvalues, weight @ row)


def test_items_beyond_32_bits_in_order(far_programs, monkeypatch):
    dweight = far_memory(torch.float32, FAR_ITEM * FAR_HIDDEN)
    marks = far_memory(torch.int32, FAR_ITEM)
    marks(FAR_ITEM, 1).fill_(1)  # the first user has clicked that item
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: dweight(0, FAR_HIDDEN).view(1, -1))
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: marks(0, 1).view(1, 1))
    clicks = far_user().binary()
    clicks.indptr = far_memory(torch.int64, FAR_ITEM + 2)(0, 2)  # no more clicks to mark
    dpre, scale = torch.randn(1, FAR_HIDDEN), torch.full((1,), 0.5)
    weight_gradient(dpre, clicks, scale, True, dropout=0.0, item_tile=FAR_ITEM_TILE)
    assert torch.equal(dweight(FAR_ITEM * FAR_HIDDEN, FAR_HIDDEN), dpre[0] / 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_large_shapes_on_a_gpu(dtype, counts):
    clicks = random_clicks([100, 0, 5_000, 1] * 20, 20_108, counts=counts).rows([*range(80), 2, 2])
    check(clicks, *random_layer(20_108, 600, dtype), tile=None, item_tile=None)


@pytest.mark.gpu
def test_a_cuda_graph_follows_rows_and_seed():
    clicks = random_clicks([30, 0, 200, 1, 60], 300, counts=True)
    weight, bias = random_layer(300, 600)
    indptr, indices, values, _ = csr(clicks)
    rows, seed = torch.tensor([0, 1, 2], device=DEVICE), seed_tensor(1)
    dpre = torch.randn(3, 600, device=DEVICE)

    def step():
        arrays = indptr, indices, values, rows
        y, scale = sparse_linear_fwd(arrays, weight, bias, seed, **OPTIONS)
        options = {"dropout": 0.5, "tanh_input": False}
        dweight = sparse_linear_bwd_weight(
            dpre, arrays, seed, scale, 300, deterministic=True, **options
        )
        dvalues = sparse_linear_bwd_values(
            dpre, weight, arrays, seed, scale, normalize=True, **options
        )
        return y, dweight, dvalues

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new_rows, new_seed in (([4, 4, 0], 2), ([3, 2, 1], 3)):
        rows.copy_(torch.tensor(new_rows))
        seed.fill_(new_seed)
        graph.replay()
        for replayed, wanted in zip(captured, step(), strict=True):
            assert torch.equal(replayed, wanted)


@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts-and-tanh-of-the-input"])
@pytest.mark.parametrize(
    ("n_splits", "split_nnz"), [(1, BLOCK_NNZ), (2, 2 * BLOCK_NNZ), (8, BLOCK_NNZ)]
)
def test_rows_around_the_cuts_of_their_splits(n_splits, split_nnz, counts):
    # one below, at and above each program's share, and a row that comes round to the first program again
    tile = TILE._replace(n_splits=n_splits, split_nnz=split_nnz)
    around = [split_nnz * n + d for n in (1, n_splits) for d in (-1, 0, 1)]
    lengths = [0, 1, *around, 2 * n_splits * split_nnz + 3]
    clicks = random_clicks(lengths, max(lengths) + 1, counts=counts)
    weight, bias = random_layer(clicks.n_items, 8)
    check(clicks, weight, bias, tile=tile, tanh_input=counts)


def test_a_split_row_keeps_the_clicks_of_an_unsplit_one():
    # without rounding: weights of one, no norm, so that y counts the clicks that dropout keeps
    clicks = random_clicks([200, 3, 0, 64], 300)
    weight, _ = random_layer(300, 8)
    options = {"normalize": False, "tanh": False, "dropout": 0.5}
    sums = [
        forward(clicks, torch.ones_like(weight), tile=TILE._replace(n_splits=n), **options)[0]
        for n in (1, 2, 8)
    ]
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_a_split_row_gives_the_same_bits_again():
    clicks = random_clicks([200, 3, 0, 64], 300, counts=True)
    weight, bias = random_layer(300, 50)
    tile = TILE._replace(n_splits=8)
    first, second = (forward(clicks, weight, bias, tile=tile)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("n_splits", [1, 2, 4, 8])
def test_a_batch_without_clicks_however_split(n_splits):
    clicks, (weight, bias) = random_clicks([0, 0, 0], 7), random_layer(7, 8)
    tile = TILE._replace(n_splits=n_splits)
    y, scale = forward(clicks, weight, bias, tile=tile, tanh=False)
    assert torch.equal(y, bias.expand(3, 8))
    assert torch.equal(scale, torch.zeros_like(scale))


@triton.jit
def _programs_kernel(length_ptr, n_programs_ptr, n_splits, SPLIT_NNZ: tl.constexpr):
    length = tl.load(length_ptr + tl.program_id(0))
    n_programs = kept_clicks.programs_of(7, 7 + length, n_splits, SPLIT_NNZ)
    tl.store(n_programs_ptr + tl.program_id(0), n_programs)


@pytest.mark.parametrize("n_splits", [1, 2, 4, 8])
def test_a_long_row_has_all_programs_and_a_short_one_a_single(n_splits):
    # a cut elsewhere gives the same sums, and only takes longer
    cut, last = 32, 32 * n_splits
    lengths = [0, 1, cut - 1, cut, cut + 1, last - 1, last, last + 1, 9 * last]
    n_programs = torch.zeros(len(lengths), dtype=torch.int64, device=DEVICE)
    given = torch.tensor(lengths, device=DEVICE)
    _programs_kernel[(len(lengths),)](given, n_programs, n_splits, SPLIT_NNZ=cut)
    assert n_programs.tolist() == [1, 1, 1, 1, min(2, n_splits), *[n_splits] * 4]


@pytest.mark.parametrize("chip", tiles.TABLE)
def test_splits_of_the_table(chip):
    row, many = tiles.TABLE[chip], tiles.MANY_USERS
    for tile in (*row.sparse_forward[2], *row.sparse_forward[4], *row.sparse_backward):
        assert tile.block_nnz <= 64 and tile.split_nnz % tile.block_nnz == 0
        assert tile.n_splits & (tile.n_splits - 1) == 0
    for n_users, which in ((many - 1, 0), (many, 1)):
        assert row.sparse_forward_tile(torch.float32, n_users) is row.sparse_forward[4][which]
        assert row.sparse_backward_tile(n_users) is row.sparse_backward[which]


STRIDED_ROWS = {
    "strided": lambda t: t[::2],
    "column": lambda t: t.view(3, 2)[:, 0],
    "expanded": lambda t: t[1:2].expand(3),
}


@pytest.mark.parametrize("change", STRIDED_ROWS.values(), ids=STRIDED_ROWS)
def test_row_ids_that_do_not_lie_side_by_side_are_refused(change):
    indptr, indices, values, _ = csr(random_clicks([2] * 6, 9, counts=True))
    strided = (indptr, indices, values, change(torch.arange(6, device=DEVICE)))
    (weight, bias), dpre = random_layer(9, 8), torch.ones(3, 8, device=DEVICE)
    seed, scale, some = seed_tensor(SEED), dpre[:, 0], {"dropout": 0.5, "tanh_input": False}
    refused = pytest.raises(ValueError, match=r"^kernels: rows must be contiguous, got stride \d$")
    with refused:
        sparse_linear_fwd(strided, weight, bias, seed, **OPTIONS)
    for deterministic in (False, True):
        with refused:
            sparse_linear_bwd_weight(
                dpre, strided, seed, scale, 9, deterministic=deterministic, **some
            )
    with refused:
        sparse_linear_bwd_values(dpre, weight, strided, seed, scale, normalize=True, **some)
