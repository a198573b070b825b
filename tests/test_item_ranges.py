"""Ops on ranges of the items, without processes: summed by hand they give what one piece gives."""

import itertools

import pytest
import torch
from helpers import assert_as_accurate_as_torch, many_users, random_clicks
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvae import Clicks, linear_multinomial_nll, reference, sparse_linear
from fastvae._item_range import item_range
from fastvae.ops._nll_steps import NllSteps

N_ITEMS, N_HIDDEN = 30, 5
SEED = torch.tensor([7])


@st.composite
def cases(draw):
    """Clicks, rows of them or None, and bounds of one to five ranges, of which some may be empty."""
    lengths = draw(st.lists(st.integers(0, N_ITEMS), min_size=0, max_size=5))
    clicks = random_clicks(lengths, N_ITEMS, draw(st.integers(0, 99)), draw(st.booleans()))
    rows = (
        draw(st.none() | st.lists(st.integers(0, len(lengths) - 1), max_size=6))
        if lengths
        else None
    )
    cuts = sorted(draw(st.lists(st.integers(0, N_ITEMS), max_size=4)))
    return clicks if rows is None else clicks.rows(rows), [0, *cuts, N_ITEMS]


def ranges(clicks, bounds):
    return [(slice(a, b), item_range(clicks, a, b)) for a, b in itertools.pairwise(bounds)]


def layer(n_out, n_in, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(n_out, n_in).to(dtype), torch.randn(n_out).to(dtype)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_first_layers_of_ranges_add_up(case, dropout, tanh_input):
    clicks, bounds = case
    weight, bias = layer(N_HIDDEN, N_ITEMS)
    weight.requires_grad_()
    options = {"dropout": dropout, "seed": SEED, "tanh_input": tanh_input, "tanh": False}
    whole = sparse_linear(clicks, weight, bias, **options)
    dy = torch.randn_like(whole)
    (gradient,) = torch.autograd.grad(whole, weight, dy)
    total = bias.expand_as(whole)
    for items, part in ranges(clicks, bounds):
        own = weight.detach()[:, items].requires_grad_()
        y = sparse_linear(part, own, shift=part.shift, row_scale=part.row_scale, **options)
        total = total + y
        # the same mask, so the same gradient
        (own_gradient,) = torch.autograd.grad(y, own, dy)
        torch.testing.assert_close(own_gradient, gradient[:, items], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_losses_of_ranges_are_that_of_all_items(case, with_bias):
    clicks, bounds = case
    check_loss(clicks, bounds, with_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_in_half_precision(dtype):
    clicks = random_clicks(many_users([3, 0, 9, 30], dtype), N_ITEMS, counts=True)
    check_loss(clicks, [0, 7, 7, 20, N_ITEMS], dtype=dtype)


def check_loss(clicks, bounds, with_bias=True, dtype=torch.float32, scale=1.0):
    weight, bias = layer(N_ITEMS, N_HIDDEN, dtype)
    hidden = torch.randn(clicks.n_users, N_HIDDEN).to(dtype) * scale
    dnll, bias = torch.rand(clicks.n_users), bias if with_bias else None
    got = by_ranges(clicks, bounds, hidden, weight, bias, dnll)
    same = by_torch(clicks, hidden, weight, bias, dnll, dtype)
    truth = by_torch(clicks, hidden, weight, bias, dnll, torch.float64)
    for a, s, t in zip(got, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


def by_ranges(clicks, bounds, hidden, weight, bias, dnll):
    """nll, and the gradients of hidden, weight and bias."""
    parts = [
        NllSteps(hidden, weight[items], None if bias is None else bias[items], x.csr, hidden.dtype)
        for items, x in ranges(clicks, bounds)
    ]
    k = torch.stack([part.largest_logits() for part in parts]).amax(0)
    sums = torch.stack([part.exponentials(k) for part in parts]).sum(0)
    results = [part.subtract_clicks(sums, clicks.row_sums()) for part in parts]
    assert all(torch.equal(nll, results[0][0]) for nll, _ in results)
    gradients = [
        part.gradients(dnll, v, True, True, bias is not None)
        for part, (_, v) in zip(parts, results, strict=True)
    ]
    dhidden, dweight, dbias = zip(*gradients, strict=True)
    dbias = [] if bias is None else [torch.cat(dbias)]
    return results[0][0], torch.stack(dhidden).sum(0), torch.cat(dweight), *dbias


def by_torch(clicks, hidden, weight, bias, dnll, dtype):
    leaves = [
        t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias) if t is not None
    ]
    bias = leaves[2] if bias is not None else None
    nll = reference.linear_multinomial_nll(*leaves[:2], bias, clicks.to_dense().to(dtype))
    return nll, *torch.autograd.grad(nll, leaves, dnll.to(dtype))


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_a_range_whose_logits_are_far_below_the_others(scale):
    check_loss(random_clicks([4, 0, 9], N_ITEMS, counts=True), [0, 1, 20, N_ITEMS], scale=scale)


def test_a_row_of_minus_infinity_costs_inf_where_it_has_clicks():
    clicks, weight = Clicks([0, 1, 1], [2], n_items=4), torch.zeros(4, 1)
    bias, hidden = torch.full((4,), -torch.inf), torch.ones(2, 1)
    nll = by_ranges(clicks, [0, 2, 4], hidden, weight, bias, torch.ones(2))[0]
    assert nll.tolist() == [torch.inf, 0.0]
    assert torch.equal(nll, linear_multinomial_nll(hidden, weight, bias, clicks))


def test_columns_of_a_matrix_with_the_numbers_of_its_rows():
    clicks = Clicks([0, 3, 3, 5], [0, 2, 3, 1, 2], [3.0, 4.0, 1.0, 2.0, 2.0], n_items=4)
    part = item_range(clicks, 1, 3)
    assert part.to_dense().tolist() == [[0, 4], [0, 0], [2, 2]]
    assert part.shift.tolist() == [1, 2, 2]
    assert part.row_scale.tolist() == pytest.approx([26**-0.5, 0, 8**-0.5])
    assert part.row_sums().tolist() == [8, 0, 4]
    chosen = item_range(clicks.rows([2, 0]), 1, 3)
    for batch in (chosen, part.rows([2, 0])):
        assert batch.to_dense().tolist() == [[2, 2], [0, 4]]
        assert batch.shift.tolist() == [2, 1]
        assert batch.row_sums().tolist() == [4, 8]
    # binary rows have no values to square
    binary = item_range(clicks.binary(), 1, 3)
    assert binary.values is None
    assert binary.row_scale.tolist() == pytest.approx([3**-0.5, 0, 2**-0.5])
    assert binary.row_sums().tolist() == [3, 0, 2]
