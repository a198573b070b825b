"""The loss in steps by the kernels: ranges of items summed by hand, against the dense reference in fp64."""

import itertools

import pytest
import torch
from helpers import (
    DEVICE,
    KERNEL_DTYPES,
    assert_as_accurate_as_torch,
    many_users,
    random_clicks,
)

from fastvae import Clicks, reference
from fastvae._item_range import item_range
from fastvae.kernels import nll_steps, tiles
from fastvae.kernels.linear_multinomial_nll import (
    Gradients,
    cast_weight,
    stored_dtype,
    stored_width,
)

BLOCK_I = tiles.TABLE["interpreter"].exp_row.block_i
BLOCK_NNZ = tiles.TABLE["interpreter"].exp_row.block_nnz
SINGLES = 32 if DEVICE == "cpu" else tiles.CLICKS_PER_BLOCK
N_HIDDEN = 8
CASES = [  # clicks of each user, bounds of the ranges
    pytest.param([], [0, 2, 5], id="no-users"),
    pytest.param([0, 0], [0, 0], id="no-items"),
    pytest.param([0, 3, 0], [0, 0, 3, 3, 7], id="empty-rows-and-empty-ranges"),
    pytest.param([1], [0, 1], id="one-click-one-item"),
    pytest.param([9, BLOCK_NNZ, BLOCK_NNZ + 1], [0, BLOCK_I - 1, 2 * BLOCK_I - 1, 3 * BLOCK_I], id="around-a-block"),
    pytest.param([SINGLES, SINGLES + 1], [0, SINGLES + 2], id="around-a-block-of-single-numbers"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks_of_single_numbers(monkeypatch):
    monkeypatch.setattr(tiles, "CLICKS_PER_BLOCK", SINGLES)


def layer(n_users, n_items, dtype=torch.float32, bias=True, scale=1.0):
    torch.manual_seed(0)
    hidden = torch.randn(n_users, N_HIDDEN).to(DEVICE, dtype) * scale
    weight = torch.randn(n_items, N_HIDDEN).to(DEVICE, dtype)
    return hidden, weight, torch.randn(n_items).to(DEVICE, dtype) if bias else None


class Range:
    """What the steps of one range leave to the next."""

    def __init__(self, hidden, weight, bias, clicks):
        self.hidden, self.bias, self.csr = hidden, bias, clicks.to(DEVICE).csr
        self.n_items, self.weight = len(weight), cast_weight(weight, hidden.dtype)
        shape = (len(hidden), stored_width(self.n_items))
        self.d = torch.empty(shape, dtype=stored_dtype(hidden.dtype), device=DEVICE)

    def largest_logits(self):
        return nll_steps.largest_logits(self.hidden, self.weight, self.bias, self.n_items, self.d)

    def exponentials(self, k):
        return nll_steps.exponentials(self.d, self.bias, self.csr, self.n_items, k)

    def gradients(self, n_clicks, total, dnll):
        nll_steps.subtract_clicks(self.d, self.csr, self.n_items, total / n_clicks.clamp_min(1e-30))
        needs = (True, True, self.bias is not None)
        products = Gradients(self.hidden, self.weight, self.n_items, needs, torch.float32)
        products.add(slice(0, len(self.hidden)), self.d, n_clicks / total, dnll)
        return products.results()


def by_kernels(clicks, bounds, hidden, weight, bias, dnll):
    """nll, and the gradients of hidden, weight and bias."""
    parts = []
    for a, b in itertools.pairwise(bounds):
        own_bias = None if bias is None else bias[a:b]
        parts.append(Range(hidden, weight[a:b], own_bias, item_range(clicks, a, b)))
    k = torch.stack([part.largest_logits() for part in parts]).amax(0)
    total, below = torch.stack([part.exponentials(k) for part in parts]).sum(0)
    n_clicks = clicks.row_sums().to(DEVICE)
    nll = torch.where(n_clicks > 0, n_clicks * total.log() + below, 0)
    total = torch.where(total > 0, total, 1)
    gradients = [part.gradients(n_clicks, total, dnll) for part in parts]
    dhidden, dweight, dbias = zip(*gradients, strict=True)
    dhidden = torch.stack(dhidden).float().sum(0)
    return nll, dhidden, torch.cat(dweight), *([] if bias is None else [torch.cat(dbias)])


def by_torch(clicks, hidden, weight, bias, dnll, dtype):
    given = (hidden, weight, bias)
    leaves = [t.detach().to(dtype).requires_grad_() for t in given if t is not None]
    bias = None if bias is None else leaves[2]
    x = clicks.to_dense().to(DEVICE, dtype)
    nll = reference.linear_multinomial_nll(*leaves[:2], bias, x)
    return nll, *torch.autograd.grad(nll, leaves, dnll.to(dtype))


def check(clicks, bounds, **options):
    weights = layer(clicks.n_users, clicks.n_items, **options)
    dnll = torch.rand(clicks.n_users, device=DEVICE)
    got = by_kernels(clicks, bounds, *weights, dnll)
    same = by_torch(clicks, *weights, dnll, weights[0].dtype)
    truth = by_torch(clicks, *weights, dnll, torch.float64)
    for a, s, t in zip(got, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize(("lengths", "bounds"), CASES)
@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_ranges_give_what_all_items_give(lengths, bounds, counts):
    check(random_clicks(lengths, bounds[-1], counts=counts), bounds)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_any_dtype_with_and_without_bias(dtype):
    clicks = random_clicks(many_users([3, 0], dtype)[:24], 20, counts=True)
    check(clicks, [0, 7, 20], dtype=dtype, bias=dtype != torch.float32)


def test_a_range_whose_logits_are_far_below_the_others():
    check(random_clicks([4, 0, 9], 30, counts=True), [0, 1, 12, 30], scale=100.0)


def test_rows_in_any_order_and_repeated():
    clicks = random_clicks([5, 0, 9], 20, counts=True).rows([2, 0, 2, 1])
    check(clicks, [0, 10, 20])


def test_all_logits_minus_infinity_have_no_exponentials():
    clicks = Clicks([0, 1], [2], n_items=4)
    bias = torch.full((4,), -torch.inf, device=DEVICE)
    part = Range(torch.ones(1, 1, device=DEVICE), torch.zeros(4, 1, device=DEVICE), bias, clicks)
    k = part.largest_logits()
    assert torch.isfinite(k).all()
    assert part.exponentials(k).flatten().tolist() == [0, torch.inf]
