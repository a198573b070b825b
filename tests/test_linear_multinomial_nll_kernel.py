"""linear_multinomial_nll's kernels: against the dense reference in fp64, both ways behind the one launcher."""

import math
import mmap

import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICE, KERNEL_DTYPES, assert_as_accurate_as_torch, random_clicks
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae import Clicks, reference
from fastvae.kernels import exp_gemm, tiles
from fastvae.kernels.linear_multinomial_nll import (
    Gradients,
    cast_weight,
    exp_rows,
    stored_dtype,
    stored_width,
)
from fastvae.kernels.products import PAD, WHOLE

TILE = tiles.GemmTile(block_u=16, block_i=64, block_d=32, group_u=2, num_warps=4, num_stages=1)
BLOCK_U, BLOCK_I, BLOCK_D, GROUP_U = TILE[:4]
BLOCK_NNZ = tiles.TABLE["interpreter"].stored_clicks.block_nnz
N_PROBE = 64  # fewer than in earnest: the tests that need unprobed items stay small
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch-gemm"])
SHAPES = [  # clicks of each user, items, hidden units
    pytest.param([], 5, 8, id="no-users"),
    pytest.param([0, 0], 0, 8, id="no-items"),
    pytest.param([0, 0], 5, 8, id="no-clicks"),
    pytest.param([0, 3, 0, 2, 0], 7, 8, id="empty-rows-first-middle-last"),
    pytest.param([1], 1, 1, id="one-click-one-item-one-hidden-unit"),
    pytest.param([PAD + 9, 1], PAD + 9, 8, id="a-row-with-all-items"),
    pytest.param(
        [BLOCK_NNZ, BLOCK_NNZ + 1, 4 * BLOCK_NNZ + 3], 90, 8, id="rows-around-a-block-of-clicks"
    ),
    pytest.param([4, 0, 20], BLOCK_I - 1, 50, id="items-one-below-a-block"),
    pytest.param([4, 0, 20], BLOCK_I, 50, id="items-exactly-a-block"),
    pytest.param([4, 0, 20], BLOCK_I + 1, 50, id="items-one-above-a-block"),
    pytest.param([4, 0, 20], PAD - 1, 200, id="items-one-below-the-padding"),
    pytest.param([4, 0, 20], PAD, 200, id="items-exactly-the-padding"),
    pytest.param([4, 0, 20], PAD + 1, 200, id="items-one-above-the-padding"),
    pytest.param([4, 0, 20], 70, BLOCK_D, id="hidden-exactly-a-block"),
    pytest.param([4, 0, 20], 70, 600, id="hidden-600"),
    pytest.param([2] * (BLOCK_U - 1), 9, 8, id="users-one-below-a-block"),
    pytest.param([2] * BLOCK_U, 9, 8, id="users-exactly-a-block"),
    pytest.param([2] * (BLOCK_U + 1), 9, 8, id="users-one-above-a-block"),
    pytest.param([2] * (BLOCK_U * GROUP_U + 1), PAD + 9, 8, id="users-in-two-groups"),
    pytest.param([5, 9], N_PROBE - 1, 8, id="items-one-below-the-probe"),
    pytest.param([5, 9], N_PROBE + 1, 8, id="items-one-above-the-probe"),
]


# the interpreter computes with numpy, which warns where a GPU goes on with inf or NaN
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def few_probed(monkeypatch):
    monkeypatch.setattr(exp_gemm, "N_PROBE", N_PROBE)


def csr(clicks):
    """A Clicks as the launchers take it."""
    clicks = clicks.to(DEVICE)
    return clicks.csr


def random_layer(n_users, n_items, n_hidden, dtype=torch.float32, bias=True):
    """hidden, weight and bias with logits of a few units."""
    torch.manual_seed(0)
    hidden = torch.randn(n_users, n_hidden).to(DEVICE, dtype)
    weight = (3 / max(1, n_hidden) ** 0.5 * torch.randn(n_items, n_hidden)).to(DEVICE, dtype)
    return hidden, weight, torch.randn(n_items).to(DEVICE, dtype) if bias else None


def forward(layer, clicks, needs_grad=True, **options):
    """nll, v and D, or None without needs_grad."""
    hidden, weight, bias = layer
    weight, n_items, d = cast_weight(weight, hidden.dtype), len(weight), None
    if needs_grad:
        shape = (len(hidden), stored_width(n_items))
        d = torch.empty(shape, dtype=stored_dtype(hidden.dtype), device=DEVICE)
    return *exp_rows(hidden, weight, bias, csr(clicks), n_items, d, **options), d


def backward(layer, v, d, dnll, needs=(True, True, True)):
    """Gradients of hidden, weight and bias."""
    hidden, weight, _ = layer
    gradients = Gradients(hidden, weight, len(weight), needs, torch.float32)
    gradients.add(slice(0, len(hidden)), d, v, dnll)
    return gradients.results()


def run(layer, clicks, dnll, **options):
    """nll and the gradients of hidden, weight and, where there is one, bias by the kernels."""
    nll, v, d = forward(layer, clicks, **options)
    grads = backward(layer, v, d, dnll, (True, True, layer[2] is not None))
    return [nll, *(g for g in grads if g is not None)]


def by_torch(layer, clicks, dnll, dtype):
    """The same by the reference, computed in dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in layer if t is not None]
    bias = None if layer[2] is None else leaves[2]
    nll = reference.linear_multinomial_nll(*leaves[:2], bias, clicks.to_dense().to(DEVICE, dtype))
    return [nll, *torch.autograd.grad(nll, leaves, dnll.to(nll.dtype))]


def check(layer, clicks, dnll, **options):
    actual = run(layer, clicks, dnll, **options)
    assert [t.dtype for t in actual[:2]] == [torch.float32, layer[0].dtype]
    assert all(t.dtype == torch.float32 for t in actual[2:])
    same = by_torch(layer, clicks, dnll, layer[0].dtype)
    truth = by_torch(layer, clicks, dnll, torch.float64)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)
    return actual


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that any torch call returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize(("lengths", "n_items", "n_hidden"), SHAPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@FUSED
def test_equals_the_reference(lengths, n_items, n_hidden, dtype, fused):
    # with a few users the rounding of bf16 logits is luck, for the kernels and for torch alike: over 30 seeds a gradient
    # of 8 rows with all items errs .3 to 1.9 times as much as torch's, of 128 .6 to 1.1 times
    repeats = 8 if DEVICE == "cpu" else 128
    lengths = lengths * repeats if dtype == torch.bfloat16 else lengths
    layer = random_layer(len(lengths), n_items, n_hidden, dtype)
    dnll = torch.randn(len(lengths), device=DEVICE)
    check(layer, random_clicks(lengths, n_items), dnll, fused=fused)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@FUSED
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_counts_and_rows_in_any_order_and_repeated(dtype, fused, bias):
    clicks = random_clicks([5, 0, 30, 1], 70, counts=True).rows([2, 0, 2, 1, 3, 2])
    layer = random_layer(6, 70, 50, dtype, bias)
    check(layer, clicks, torch.randn(6, device=DEVICE), fused=fused)


@FUSED
def test_counts_by_hand(fused):
    clicks = Clicks([0, 2], [0, 1], [2, 1], n_items=3)
    layer = [
        torch.ones(1, 1, device=DEVICE),
        torch.zeros(3, 1, device=DEVICE),
        torch.zeros(3, device=DEVICE),
    ]
    nll, dhidden, dweight, dbias = run(layer, clicks, torch.ones(1, device=DEVICE), fused=fused)
    assert nll.item() == pytest.approx(3 * math.log(3), rel=1e-6)
    assert dhidden.tolist() == [[0]]
    assert dweight[:, 0].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    assert dbias.tolist() == pytest.approx([-1, 0, 1], abs=1e-6)


@FUSED
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_click_far_below_the_peak_by_hand(fused, dtype):
    # E of the clicked item is zero: its logit can't be had from there
    clicks = Clicks([0, 1], [1], n_items=2)
    layer = [torch.ones(1, 1), torch.tensor([[0.0], [-100.0]]), torch.tensor([1.0, -1.0])]
    layer = [t.to(DEVICE, dtype) for t in layer]
    nll, dhidden, dweight, dbias = run(layer, clicks, torch.ones(1, device=DEVICE), fused=fused)
    assert nll.item() == 102
    assert dhidden.tolist() == [[100]]
    assert dweight.tolist() == [[1], [-1]]
    assert dbias.tolist() == [1, -1]
    nll, _, _ = forward(layer, clicks, needs_grad=False, tile=TILE)
    assert nll.item() == 102


@FUSED
def test_large_logits_keep_the_loss(fused):
    layer = [torch.ones(1, 1), torch.tensor([[1e8], [1e8], [0.0]]), None]
    layer = [t if t is None else t.to(DEVICE) for t in layer]
    clicks = Clicks([0, 1], [0], n_items=3)
    nll, _, dweight = run(layer, clicks, torch.ones(1, device=DEVICE), fused=fused)
    assert nll.item() == pytest.approx(math.log(2), rel=1e-6)
    assert dweight[:, 0].tolist() == pytest.approx([-0.5, 0.5, 0], abs=1e-6)


@FUSED
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_peaked_softmax(fused, dtype):
    # the clicked item takes nearly all of the softmax: its gradient is what the others leave
    hidden, weight, bias = random_layer(5, 200, 8, dtype)
    bias[::40] += 12
    clicks = Clicks([0, 1, 2, 3, 4, 5], [0, 40, 80, 120, 160], n_items=200)
    check((hidden, weight, bias), clicks, torch.ones(5, device=DEVICE), fused=fused)


@pytest.mark.parametrize("above", [39.0, 41.0, 100.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_whose_largest_logits_the_probe_has_missed(above, dtype):
    # every third item is probed, items 1 and 2 are not; only rows of positive hidden[0] are affected
    n_items = 2 * N_PROBE + 2
    hidden, weight, bias = random_layer(BLOCK_U + 3, n_items, 8, dtype)
    hidden[:, 0] = torch.tensor([1.0, 0.0, -1.0]).repeat(7)[: BLOCK_U + 3]
    hidden[3:, 0] = 0
    weight[1:3, 0] = above
    clicks = random_clicks([3, 0, 40] + [5] * BLOCK_U, n_items)
    dnll = torch.randn(BLOCK_U + 3, device=DEVICE)
    nll, *_ = check((hidden, weight, bias), clicks, dnll, fused=True)
    layer = (hidden, weight, bias)
    without, _, _ = forward(layer, clicks, needs_grad=False, tile=TILE)
    torch.testing.assert_close(without, nll, rtol=1e-6, atol=0)


def test_a_miss_of_the_probe_by_hand():
    # all logits are 0 but that of item 1, which the probe misses; one user has clicked it, one hasn't
    n_items = 2 * N_PROBE + 2
    weight = torch.zeros(n_items, 1, device=DEVICE)
    weight[1] = 500
    layer = (torch.ones(2, 1, device=DEVICE), weight, None)
    clicks = Clicks([0, 1, 2], [1, 0], n_items=n_items)
    nll, dhidden, dweight = run(layer, clicks, torch.ones(2, device=DEVICE), fused=True)
    assert nll.tolist() == [0, 500]
    assert dhidden[:, 0].tolist() == [0, 500]
    assert dweight[:3, 0].tolist() == [-1, 1, 0]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_without_gradients_the_same_loss_and_no_large_tensor(dtype, bias):
    n_users, n_items = 20, 3 * PAD
    layer = random_layer(n_users, n_items, 8, dtype, bias)
    clicks = random_clicks([0, 40] + [3] * (n_users - 2), n_items, counts=True)
    nll, _, _ = forward(layer, clicks, fused=True, tile=TILE)
    clicks = clicks.to(DEVICE)
    with Allocations() as allocations:
        without, _, _ = forward(layer, clicks, needs_grad=False, tile=TILE)
    assert allocations.largest < n_users * n_items * 2
    torch.testing.assert_close(without, nll, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=0)


def test_what_the_forward_stores():
    assert stored_dtype(torch.bfloat16) == torch.bfloat16
    assert stored_dtype(torch.float16) == torch.float32  # exp(k) has no room in fp16
    assert stored_width(20_108) == 20_224
    assert stored_width(PAD) == PAD


def test_a_weight_is_padded_only_where_it_is_copied_anyway():
    weight = torch.randn(PAD + 1, 3, device=DEVICE)
    assert cast_weight(weight, torch.float32) is weight
    cast = cast_weight(weight, torch.float16)
    assert cast.shape == (2 * PAD, 3)
    assert torch.equal(cast[: PAD + 1], weight.half()) and not cast[PAD + 1 :].any()


@FUSED
@pytest.mark.parametrize(
    "n_items", [WHOLE - 1, WHOLE, WHOLE + 1, 2 * WHOLE + 1, PAD + WHOLE, PAD + 1]
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_cast_weight_gives_what_an_uncast_one_gives(fused, n_items, dtype):
    hidden, weight, bias = random_layer(3, n_items, 8, dtype)
    clicks, dnll = random_clicks([5, 0, 30], n_items), torch.randn(3, device=DEVICE)
    padded = cast_weight(weight.float(), dtype)
    results = []
    for used in (weight, weight if dtype == torch.float32 else padded):
        d = torch.full(
            (3, stored_width(n_items)), math.nan, dtype=stored_dtype(dtype), device=DEVICE
        )
        nll, v = exp_rows(hidden, used, bias, csr(clicks), n_items, d, fused=fused)
        gradients = Gradients(hidden, used, n_items, (True, True, True), torch.float32)
        gradients.add(slice(0, 3), d, v, dnll)
        results.append([nll, v, d, *gradients.results()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@FUSED
@pytest.mark.parametrize("n_items", [PAD - 1, PAD, PAD + 1])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_padded_bias_gives_what_a_plain_one_gives(monkeypatch, fused, n_items, dtype):
    # of many users the library's product adds it
    monkeypatch.setattr("fastvae.kernels.tiles.MANY_USERS", 3)
    hidden, weight, bias = random_layer(3, n_items, 8, dtype)
    clicks, width = random_clicks([5, 0, 30], n_items), stored_width(n_items)
    padded = [weight.new_zeros(width, 8), bias.new_full((width,), 7.0)]
    for wide, t in zip(padded, (weight, bias), strict=True):
        wide[:n_items] = t
    # in the products' dtype it is added before the logits are rounded
    plain = bias.float() if dtype == torch.bfloat16 else bias
    results = []
    for used in ((weight, plain), padded):
        d = torch.full((3, width), math.nan, dtype=stored_dtype(dtype), device=DEVICE)
        nll, v = exp_rows(hidden, *used, csr(clicks), n_items, d, fused=fused)
        assert not d[:, n_items:].any()
        results.append([nll, d * v[:, None]])
    # a bf16 logit near 10 is rounded by up to .03, with the bias or before it
    rounding = 0.1 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


def test_rows_that_may_lie_apart_spare_the_bias_a_product():
    layer, clicks = random_layer(3, 70, 8), random_clicks([5, 0, 30], 70)
    hidden, weight, _ = layer
    _, v, d = forward(layer, clicks, tile=TILE)
    results = []
    for apart in (False, True):
        products = Gradients(hidden, weight, 70, (True, True, True), torch.float32, apart)
        products.add(slice(0, 3), d, v, torch.ones(3, device=DEVICE))
        results.append(products.results())
        assert len(products.products) == 2 - apart
    assert [r[1].stride(0) for r in results] == [8, 16]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@FUSED
def test_a_second_backward_and_nothing_written(fused):
    layer = random_layer(5, 70, 8, torch.float16)
    before = [t.clone() for t in layer]
    clicks, dnll = random_clicks([5, 0, 30, 1, 9], 70), torch.randn(5, device=DEVICE)
    _, v, d = forward(layer, clicks, fused=fused, tile=TILE)
    kept = d.clone()
    first, second = (backward(layer, v, d, dnll) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(d, kept)
    assert all(torch.equal(a, b) for a, b in zip(layer, before, strict=True))


@FUSED
def test_the_padding_is_zero(fused):
    layer, clicks = random_layer(BLOCK_U + 1, 70, 8), random_clicks([2] * (BLOCK_U + 1), 70)
    _, _, d = forward(layer, clicks, fused=fused, tile=TILE)
    assert d.shape == (BLOCK_U + 1, PAD)
    assert not d[:, 70:].any()
    torch.testing.assert_close(
        d.sum(1), torch.zeros_like(d[:, 0]), rtol=0, atol=1e-5 * d.max().item()
    )


def test_the_sum_of_a_row_is_that_of_what_is_stored():
    # all but one exponential are rounded down alike; in fp16, for bf16 is wrong in the interpreter
    n_items, hidden = 500, torch.zeros(1, 8, device=DEVICE, dtype=torch.float16)
    bias = torch.full((n_items,), math.log(1 / 3), device=DEVICE)
    bias[7] = 0
    d = torch.empty(1, stored_width(n_items), device=DEVICE, dtype=torch.float16)
    clicks = csr(Clicks([0, 1], [7], n_items=n_items))
    _, v = exp_rows(hidden, hidden.expand(n_items, -1), bias, clicks, n_items, d, fused=False)
    others = d[0, :n_items].double().sum() - d[0, 7].double()
    assert others < (n_items - 1) / 3 - 0.03
    assert 1 / v[0].item() == pytest.approx(others.item() + 1, rel=1e-6)


@triton.jit
def _store_tile_kernel(logits_ptr, e_ptr, sums_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + at[:, None] * BLOCK + at[None, :])
    place = tl.program_id(0)
    exp_gemm._store_tile(logits, e_ptr, sums_ptr, BLOCK, 1, place, place, BLOCK, BLOCK, BLOCK, True)


def test_the_sums_of_a_tile_are_those_of_what_is_stored():
    logits = torch.full((16, 16), math.log(1 / 3), device=DEVICE)
    e = torch.empty(16, 16, device=DEVICE, dtype=torch.bfloat16)
    sums = torch.empty(16, device=DEVICE)
    _store_tile_kernel[(1,)](logits, e, sums, BLOCK=16)
    assert not torch.allclose(e.float(), logits.exp(), rtol=1e-4)
    torch.testing.assert_close(sums, e.float().sum(1), rtol=1e-6, atol=0)


@FUSED
def test_nothing_is_written_past_the_buffer(fused):
    # tiles of 16 users x 256 items, and a buffer of 3 rows x 128
    around = torch.full((5, PAD), 7.0, device=DEVICE)
    layer, clicks = random_layer(3, 70, 8), csr(random_clicks([2] * 3, 70))
    wide = TILE._replace(block_i=2 * PAD)
    exp_rows(*layer, clicks, 70, around[1:4], fused=fused, tile=wide)
    assert (around[[0, 4]] == 7).all()
    assert not around[1:4, 70:].any()


@FUSED
def test_upstream_gradients_of_any_stride(fused):
    layer, clicks = random_layer(3, 70, 8), random_clicks([5, 9, 30], 70)
    ones = run(layer, clicks, torch.ones(3, device=DEVICE), fused=fused)
    expanded = run(layer, clicks, torch.ones((), device=DEVICE).expand(3), fused=fused)
    assert all(torch.equal(a, b) for a, b in zip(ones, expanded, strict=True))
    # a user of weight zero takes no part in any gradient
    weights = torch.tensor([0.0, 1.0, 2.0], device=DEVICE)
    _, dhidden, *weighted = run(
        layer, clicks, torch.stack([weights, weights + 7], 1)[:, 0], fused=fused
    )
    assert not dhidden[0].any()
    _, _, *others = run((layer[0][1:], *layer[1:]), clicks.rows([1, 2]), weights[1:], fused=fused)
    for a, b in zip(weighted, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@FUSED
@pytest.mark.parametrize("asked", [0, 1, 2, None], ids=["hidden", "weight", "bias", "nothing"])
def test_only_what_is_asked_for(fused, asked):
    layer, clicks = random_layer(3, 70, 8), random_clicks([5, 0, 30], 70)
    dnll, needs = torch.ones(3, device=DEVICE), tuple(asked == i for i in range(3))
    _, v, d = forward(layer, clicks, fused=fused, tile=TILE)
    every, some = backward(layer, v, d, dnll), backward(layer, v, d, dnll, needs)
    for need, a, b in zip(needs, some, every, strict=True):
        assert torch.equal(a, b) if need else a is None


@FUSED
def test_stored_zeros_count_for_nothing(fused):
    # Clicks drops them; arrays from elsewhere may hold them
    indptr, indices = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1], dtype=torch.int32)
    arrays = [t.to(DEVICE) for t in (indptr, indices, torch.tensor([0.0, 1.0, 0.0]))]
    layer = (torch.ones(2, 1, device=DEVICE), torch.zeros(3, 1, device=DEVICE), None)
    d = torch.empty(2, PAD, device=DEVICE)
    nll, v = exp_rows(*layer, (*arrays, None), 3, d, fused=fused, tile=TILE)
    assert nll.tolist() == pytest.approx([math.log(3), 0])
    assert (d[:, :3] * v[:, None]).flatten().tolist() == pytest.approx(
        [1 / 3, 1 / 3, -2 / 3, 0, 0, 0]
    )


@pytest.mark.parametrize("needs_grad", [True, False])
@FUSED
def test_a_bad_row_is_loud_and_alone(needs_grad, fused):
    hidden, weight, bias = random_layer(3, 70, 8)
    hidden[1, 3] = math.nan
    clicks = random_clicks([3, 3, 3], 70)
    nll, _, _ = forward((hidden, weight, bias), clicks, needs_grad, fused=fused, tile=TILE)
    assert nll.isnan().tolist() == [False, True, False]


@FUSED
def test_logits_of_minus_infinity(fused):
    # every item is out of the question: no clicks, no loss; an item with a click can't be
    bias = torch.full((5,), -math.inf, device=DEVICE)
    layer = (torch.zeros(1, 2, device=DEVICE), torch.zeros(5, 2, device=DEVICE), bias)
    for loss in run(
        layer, Clicks([0, 0], [], n_items=5), torch.ones(1, device=DEVICE), fused=fused
    ):
        assert not loss.any()
    bias[:3] = 0
    nll, *_ = run(layer, Clicks([0, 1], [4], n_items=5), torch.ones(1, device=DEVICE), fused=fused)
    assert nll.tolist() == [math.inf]


def test_the_tiles_of_the_table(monkeypatch):
    # the wide tile reaches past the padded width, the click tile past the rows
    layer, clicks = random_layer(3, PAD - 5, 600), random_clicks([70, 0, 7], PAD - 5, counts=True)
    wanted, here = tiles.TABLE["sm_90"], tiles.of(torch.device(DEVICE))
    for tile in (wanted.stored_clicks, wanted.gathered_clicks):
        row = here._replace(stored_clicks=tile, gathered_clicks=tile)
        monkeypatch.setattr(tiles, "of", lambda device, row=row: row)
        # narrow enough in depth for the shared memory of a T4
        wide = tiles.GemmTile(64, 256, 32, 16, 8, 2)
        check(layer, clicks, torch.randn(3, device=DEVICE), fused=True, tile=wide)
        monkeypatch.undo()
    monkeypatch.setattr(tiles, "of", lambda device: here._replace(exp_row=wanted.exp_row))
    check(layer, clicks, torch.randn(3, device=DEVICE), fused=False)


def reserve(n, dtype):
    """A tensor of n numbers that takes memory only where it is written, on the CPU."""
    if DEVICE == "cuda":
        return torch.empty(n, dtype=dtype, device=DEVICE)
    return torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize), dtype=dtype)


@FUSED
def test_1024_users_of_2_100_000_items_apart(fused):
    # the buffer's rows by strides: row 1023 starts at 2,148,300,000, beyond 32 bits
    n_users, stride, width = 1024, 2_100_096, 4096
    memory = reserve((n_users - 1) * stride + width, torch.float32)
    e = memory.as_strided((n_users, width), (stride, 1))
    layer, clicks = random_layer(n_users, 5, 1), random_clicks([2] * n_users, 5)
    nll, v = exp_rows(*layer, csr(clicks), 5, e, fused=fused)
    last = [0, 1022, 1023]
    hidden, weight, bias = layer
    expected = forward((hidden[last], weight, bias), clicks.rows(last), fused=True)
    wanted_nll, wanted_v, wanted_d = expected
    torch.testing.assert_close(nll[last], wanted_nll)
    dlogits = v[last, None] * e[last, :PAD]
    torch.testing.assert_close(dlogits, wanted_v[:, None] * wanted_d)


def test_weight_rows_beyond_32_bits():
    # item 4,000,000 of 600 hidden units: its weights start at 2,400,000,000
    n_items, n_hidden = 4_000_001, 600
    weight = reserve(n_items * n_hidden, torch.float16).view(n_items, n_hidden)
    hidden = torch.ones(1, n_hidden, dtype=torch.float16, device=DEVICE)
    weight[-1] = 0.5
    ones, zeros = torch.ones(1, 1, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    results = torch.empty(2, 1, device=DEVICE)
    clicks = csr(Clicks([0, 1], [n_items - 1], n_items=n_items))
    exp_gemm._clicks_kernel[(1,)](
        hidden, weight, None, zeros, ones, *clicks, None, results, 1,
        N_HIDDEN=n_hidden, N_PADDED=0, BLOCK_NNZ=16, BLOCK_D=32,
    )  # fmt: skip
    # log 1 - 600 * 0.5, and 1 / 1
    assert results.flatten().tolist() == [-300, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_users", [500, tiles.MANY_USERS])
@FUSED
def test_large_shapes_on_a_gpu(dtype, n_users, fused, monkeypatch):
    monkeypatch.undo()  # the number of probed items in earnest
    lengths = ([100, 0, 5_000, 1] * n_users)[:n_users]
    layer, clicks = random_layer(n_users, 20_108, 600, dtype), random_clicks(lengths, 20_108)
    check(layer, clicks, torch.randn(n_users, device=DEVICE), fused=fused, tile=None)


@FUSED
def test_row_ids_that_do_not_lie_side_by_side_are_refused(fused):
    indptr, indices, values, _ = csr(random_clicks([2] * 6, 9))
    strided = (indptr, indices, values, torch.arange(6, device=DEVICE)[::2])
    layer, d = random_layer(3, 9, 8), torch.empty(3, PAD, device=DEVICE)
    with pytest.raises(ValueError, match=r"^kernels: rows must be contiguous, got stride 2$"):
        exp_rows(*layer, strided, 9, d, fused=fused)
