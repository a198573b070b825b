"""multinomial_nll's kernels: against the dense reference in fp64, on edges of blocks and splits, and by hand."""

import math
import mmap

import pytest
import torch
from helpers import DEVICE, KERNEL_DTYPES, assert_as_accurate_as_torch, random_clicks

from fastvae import Clicks, reference
from fastvae.kernels import multinomial_nll as kernels
from fastvae.kernels import tiles
from fastvae.kernels.multinomial_nll import multinomial_nll_bwd, multinomial_nll_fwd

TILE = tiles.RowTile(block_i=64, split_i=256, block_nnz=16, num_warps=4)
BLOCK_I, SPLIT_I, BLOCK_NNZ = TILE[:3]
SHAPES = [
    pytest.param([], 5, id="no-users"),
    pytest.param([0, 0], 5, id="no-clicks"),
    pytest.param([0, 3, 0, 2, 0], 7, id="empty-rows-first-middle-last"),
    pytest.param([1], 1, id="one-click-one-item"),
    pytest.param([BLOCK_I + 9, 1], BLOCK_I + 9, id="a-row-with-all-items"),
    pytest.param([BLOCK_NNZ - 1, BLOCK_NNZ, BLOCK_NNZ + 1], 40, id="rows-around-a-block-of-clicks"),
    pytest.param([0, 5 * BLOCK_NNZ + 3], 200, id="a-row-of-several-blocks-of-clicks"),
    pytest.param([4, 0, 20], BLOCK_I - 1, id="items-one-below-a-block"),
    pytest.param([4, 0, 20], BLOCK_I, id="items-exactly-a-block"),
    pytest.param([4, 0, 20], BLOCK_I + 1, id="items-one-above-a-block"),
    pytest.param([4, 0, 90], SPLIT_I - 1, id="items-one-below-a-split"),
    pytest.param([4, 0, 90], SPLIT_I, id="items-exactly-a-split"),
    pytest.param([4, 0, 90], SPLIT_I + 1, id="items-one-above-a-split"),
    pytest.param([4, 0, 90], 2 * SPLIT_I + BLOCK_I + 7, id="three-splits-and-a-tail"),
]


def csr(clicks):
    """A Clicks as the launchers take it."""
    clicks = clicks.to(DEVICE)
    return clicks.csr


def run(logits, clicks, dnll, tile=TILE, inplace=False):
    """nll and dlogits by the kernels."""
    nll, lse = multinomial_nll_fwd(logits, csr(clicks), tile=tile)
    return nll, multinomial_nll_bwd(logits, lse, dnll, csr(clicks), inplace=inplace, tile=tile)


def by_torch(logits, x, dnll, dtype):
    """nll and dlogits by the reference, computed in dtype."""
    leaf = logits.detach().to(dtype).requires_grad_()
    nll = reference.multinomial_nll(leaf, x.to(logits.device, dtype))
    return nll, *torch.autograd.grad(nll, leaf, dnll.to(nll.dtype))


def check(logits, clicks, dnll, tile=TILE):
    actual = run(logits, clicks, dnll, tile)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == logits.dtype
    same = by_torch(logits, clicks.to_dense(), dnll, logits.dtype)
    truth = by_torch(logits, clicks.to_dense(), dnll, torch.float64)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


def random_logits(n_users, n_items, dtype=torch.float32):
    torch.manual_seed(0)
    return (3 * torch.randn(n_users, n_items)).to(DEVICE, dtype)


def reserve(n, dtype):
    """A tensor of n numbers that takes memory only where it is written, on the CPU."""
    if DEVICE == "cuda":
        return torch.empty(n, dtype=dtype, device=DEVICE)
    return torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize), dtype=dtype)


@pytest.mark.parametrize(("lengths", "n_items"), SHAPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_equals_the_reference(lengths, n_items, dtype, counts):
    clicks = random_clicks(lengths, n_items, counts=counts)
    check(random_logits(*clicks.shape, dtype), clicks, torch.randn(len(lengths), device=DEVICE))


@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_row_ids_in_any_order_and_repeated(counts):
    clicks = random_clicks([5, 0, 30, 1], 70, counts=counts).rows([2, 0, 2, 1, 3, 2])
    check(random_logits(6, 70), clicks, torch.randn(6, device=DEVICE))


def test_rows_apart_and_not_aligned():
    clicks = random_clicks([5, 0, 30], 2 * BLOCK_I)
    buffer = random_logits(3, 2 * BLOCK_I + 5)
    check(buffer[:, 3:-2], clicks, torch.randn(3, device=DEVICE))


def test_counts_by_hand():
    clicks = Clicks([0, 2], [0, 1], [2, 1], n_items=3)
    nll, dlogits = run(torch.zeros(1, 3, device=DEVICE), clicks, torch.ones(1, device=DEVICE))
    assert nll.item() == pytest.approx(3 * math.log(3), rel=1e-6)
    torch.testing.assert_close(dlogits.cpu(), torch.tensor([[-1.0, 0.0, 1.0]]), atol=1e-6, rtol=0)


def test_a_click_far_below_the_peak_by_hand():
    clicks = Clicks([0, 1], [1], n_items=2)
    logits = torch.tensor([[0.0, -100.0]], device=DEVICE)
    nll, dlogits = run(logits, clicks, torch.ones(1, device=DEVICE))
    assert nll.item() == 100
    assert dlogits.tolist() == [[1, -1]]


@pytest.mark.parametrize("n_items", [3, SPLIT_I + 3], ids=["one-split", "two-splits"])
def test_large_logits_keep_the_loss(n_items):
    # two equal logits on top: each click costs log 2, which is below the spacing of fp32 at 1e8
    logits = torch.zeros(1, n_items, device=DEVICE)
    logits[0, [0, n_items - 1]] = 1e8
    clicks = Clicks([0, 1], [n_items - 1], n_items=n_items)
    nll, dlogits = run(logits, clicks, torch.ones(1, device=DEVICE))
    assert nll.item() == pytest.approx(math.log(2), rel=1e-6)
    assert dlogits[0, [0, 1, n_items - 1]].tolist() == pytest.approx([0.5, 0, -0.5], abs=1e-7)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_peaked_softmax_keeps_the_clicked_gradient(dtype, inplace):
    logits = torch.tensor([[0.0, -8.0, -9.0]], device=DEVICE).to(dtype)
    clicks = Clicks([0, 1], [0], n_items=3)
    _, truth = by_torch(logits, clicks.to_dense(), torch.ones(1, device=DEVICE), torch.float64)
    _, dlogits = run(logits, clicks, torch.ones(1, device=DEVICE), inplace=inplace)
    # the clicked entry is a difference that cancels: right to its own last digits, not to those of 1
    rtol = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(dlogits.double(), truth, rtol=rtol, atol=0)


def test_excluded_items_take_no_part():
    logits = random_logits(2, 3 * BLOCK_I)
    logits[:, : BLOCK_I + 3] = -math.inf
    inside = Clicks([0, 2, 3], [0, 5, 9], n_items=2 * BLOCK_I - 3)
    clicks = Clicks(inside.indptr, inside.indices + BLOCK_I + 3, n_items=3 * BLOCK_I)
    dnll = torch.ones(2, device=DEVICE)
    nll, dlogits = run(logits, clicks, dnll)
    nll_inside, dlogits_inside = run(logits[:, BLOCK_I + 3 :].contiguous(), inside, dnll)
    torch.testing.assert_close(nll, nll_inside)
    torch.testing.assert_close(dlogits[:, BLOCK_I + 3 :], dlogits_inside)
    assert not dlogits[:, : BLOCK_I + 3].any()


def test_half_precision_sums_do_not_overflow():
    nll, lse = multinomial_nll_fwd(
        torch.zeros(1, 100_000, dtype=torch.float16, device=DEVICE),
        csr(Clicks([0, 1], [99_999], n_items=100_000)),
        tile=tiles.TABLE["sm_90"].forward_row,
    )
    assert nll.item() == pytest.approx(math.log(100_000), rel=1e-6)
    assert lse[:, 0].tolist() == pytest.approx([0, math.log(100_000)], rel=1e-6)


def test_the_tiles_of_the_table():
    n_items = tiles.TABLE["sm_90"].backward_row.split_i + 100
    clicks = random_clicks([300, 0, 7], n_items, counts=True)
    logits, dnll = random_logits(3, n_items), torch.randn(3, device=DEVICE)
    nll, lse = multinomial_nll_fwd(logits, csr(clicks), tile=tiles.TABLE["sm_90"].forward_row)
    tile = tiles.TABLE["sm_90"].backward_row
    dlogits = multinomial_nll_bwd(logits, lse, dnll, csr(clicks), tile=tile)
    truth = by_torch(logits, clicks.to_dense(), dnll, torch.float64)
    same = by_torch(logits, clicks.to_dense(), dnll, torch.float32)
    assert_as_accurate_as_torch(nll, same[0], truth[0])
    assert_as_accurate_as_torch(dlogits, same[1], truth[1])


def test_upstream_gradients_of_any_stride():
    clicks = random_clicks([5, 9, 30], 70)
    logits = random_logits(3, 70)
    _, ones = run(logits, clicks, torch.ones(3, device=DEVICE))
    _, expanded = run(logits, clicks, torch.ones((), device=DEVICE).expand(3))
    assert torch.equal(ones, expanded)
    weights = torch.tensor([0.0, 1.0, 2.0], device=DEVICE)
    _, strided = run(logits, clicks, torch.stack([weights, weights + 7], 1)[:, 0])
    assert not strided[0].any()
    torch.testing.assert_close(strided, ones * weights[:, None])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_in_place_on_request_only(dtype):
    clicks = random_clicks([BLOCK_I + 30, 0, 1], SPLIT_I + 30, counts=True)
    buffer = random_logits(3, SPLIT_I + 40, dtype)
    before = buffer.clone()
    logits, dnll = buffer[:, : SPLIT_I + 30], torch.randn(3, device=DEVICE)
    _, dlogits = run(logits, clicks, dnll)
    _, again = run(logits, clicks, dnll)
    assert torch.equal(buffer, before)
    assert torch.equal(dlogits, again)  # a second backward
    _, written = run(logits, clicks, dnll, inplace=True)
    assert written.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:, : SPLIT_I + 30], dlogits)
    assert torch.equal(buffer[:, SPLIT_I + 30 :], before[:, SPLIT_I + 30 :])


def test_stored_zeros_count_for_nothing():
    # Clicks drops them; arrays from elsewhere may hold them
    indptr, indices = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1], dtype=torch.int32)
    values = torch.tensor([0.0, 1.0, 0.0])
    arrays = [t.to(DEVICE) for t in (indptr, indices, values)]
    logits = torch.zeros(2, 3, device=DEVICE)
    nll, lse = multinomial_nll_fwd(logits, (*arrays, None), tile=TILE)
    assert nll.tolist() == pytest.approx([math.log(3), 0])
    dlogits = multinomial_nll_bwd(
        logits, lse, torch.ones(2, device=DEVICE), (*arrays, None), tile=TILE
    )
    third = 1 / 3
    assert dlogits.flatten().tolist() == pytest.approx([third, third, third - 1, 0, 0, 0])


def test_a_bad_row_is_loud_and_alone():
    logits = random_logits(2, 70)
    logits[0, 69] = math.nan
    nll, dlogits = run(logits, random_clicks([3, 3], 70), torch.ones(2, device=DEVICE))
    assert nll.isnan().tolist() == [True, False]
    assert dlogits[0].isnan().all()
    assert dlogits[1].isfinite().all()


def far_logits(n_users, n_items, stride):
    far = reserve((n_users - 1) * stride + n_items, torch.float16)
    logits = far.as_strided((n_users, n_items), (stride, 1))
    return logits.copy_(random_logits(n_users, n_items, torch.float16))


def test_1024_users_of_2_100_000_items_apart():
    # by strides: row 1023 starts at 2,148,300,000, beyond 32 bits
    logits = far_logits(1024, 5, 2_100_000)
    clicks = random_clicks([2] * 1024, 5)
    nll, lse = multinomial_nll_fwd(logits, csr(clicks), tile=TILE)
    last = [0, 1022, 1023]
    one = multinomial_nll_fwd(logits[last].contiguous(), csr(clicks.rows(last)), tile=TILE)
    assert torch.equal(nll[last], one[0])
    assert torch.equal(lse[:, last], one[1])


@pytest.mark.parametrize("n_items", [5, SPLIT_I + 5], ids=["one-split", "two-splits"])
def test_backward_offsets_beyond_32_bits(n_items):
    # the stride itself fits 32 bits, row 2 does not
    logits = far_logits(3, n_items, 1_100_000_000)
    clicks, dnll = random_clicks([2] * 3, n_items), torch.ones(3, device=DEVICE)
    expected = run(logits.contiguous(), clicks, dnll)
    for actual, wanted in zip(run(logits, clicks, dnll, inplace=True), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(logits, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_items", [20_108, 20_109, 65_536, 200_003])
def test_large_shapes_on_a_gpu(dtype, n_items):
    clicks = random_clicks([100, 0, 5_000, 1] * 8, n_items, counts=True)
    check(random_logits(32, n_items, dtype), clicks, torch.randn(32, device=DEVICE), tile=None)


def test_row_ids_that_do_not_lie_side_by_side_are_refused():
    clicks, logits = random_clicks([2] * 6, 9), torch.zeros(3, 9, device=DEVICE)
    indptr, indices, values, _ = csr(clicks)
    strided = (indptr, indices, values, torch.arange(6, device=DEVICE)[::2])
    with pytest.raises(ValueError, match=r"^kernels: rows must be contiguous, got stride 2$"):
        multinomial_nll_fwd(logits, strided, tile=TILE)
    lse, dnll = torch.zeros(2, 3, device=DEVICE), torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"^kernels: rows must be contiguous, got stride 2$"):
        multinomial_nll_bwd(logits, lse, dnll, strided, tile=TILE)


def test_no_grid_of_the_backward_has_a_second_axis_of_item_blocks(monkeypatch):
    # a GPU's second axis ends at 65,535 programs: 2**31 - 1 items in splits of 16,384 are more
    grids = []
    monkeypatch.setattr(kernels, "launch", lambda _, grid, *__, **___: grids.append(grid))
    logits = torch.zeros(1, 1, device=DEVICE).expand(1, 2**31 - 1)
    lse, dnll = torch.zeros(2, 1, device=DEVICE), torch.ones(1, device=DEVICE)
    empty = csr(Clicks([0, 0], [], n_items=1))
    tile = tiles.TABLE["sm_90"].backward_row
    multinomial_nll_bwd(logits, lse, dnll, empty, inplace=True, tile=tile)
    assert grids == [(-(-(2**31 - 1) // tile.split_i),)]
