"""sparse_linear, CPU path and op: against the dense reference in fp64, gradcheck, opcheck, messages."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate_as_torch, many_users, random_clicks

from fastvae import Clicks, reference, sparse_linear
from fastvae.ops.sparse_linear import _SPARSE_LINEAR, ITEMS_PER_BLOCK

LENGTHS = [
    pytest.param([], 5, id="no-users"),
    pytest.param([0, 0], 5, id="no-clicks"),
    pytest.param([0, 3, 0, 2, 0], 7, id="empty-rows-first-middle-last"),
    pytest.param([1], 1, id="smallest"),
    pytest.param([9, 1], 9, id="a-row-with-all-items"),
    pytest.param([4, 500], ITEMS_PER_BLOCK - 1, id="items-one-below-a-block"),
    pytest.param([4, 500], ITEMS_PER_BLOCK, id="items-exactly-a-block"),
    pytest.param([4, 500], ITEMS_PER_BLOCK + 1, id="items-one-above-a-block"),
]


def inputs(lengths, n_items, dtype=torch.float32, counts=False, n_hidden=6, bias=True):
    torch.manual_seed(0)
    clicks = random_clicks(lengths, n_items, counts=counts)
    weight = torch.randn(n_items, n_hidden).to(dtype).t()  # item-major
    return clicks, weight, torch.randn(n_hidden).to(dtype) if bias else None


def run(call, weight, bias, dy):
    """y and the gradients of weight and bias for an upstream gradient dy."""
    leaves = [t.detach().requires_grad_() for t in (weight, bias) if t is not None]
    y = call(*leaves, *([None] if bias is None else []))
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize(("lengths", "n_items"), LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [False, True])
def test_equals_the_reference(lengths, n_items, dtype, counts):
    lengths = many_users(lengths, dtype)
    clicks, weight, bias = inputs(lengths, n_items, dtype, counts, n_hidden=16)
    dy = torch.randn(len(lengths), len(bias))
    seed, x = torch.tensor([5]), clicks.to_dense()
    for dropout, normalize, tanh, tanh_input in [
        (0.0, True, True, False),
        (0.5, True, True, True),
        (0.5, False, False, False),
        (1.0, True, False, False),
    ]:
        keep = reference.dense_keep(clicks, seed, dropout)
        options = {
            "dropout": dropout,
            "normalize": normalize,
            "tanh": tanh,
            "tanh_input": tanh_input,
        }

        def dense(w, b, dtype, keep=keep, options=options):
            return reference.sparse_linear(x.to(dtype), w, b, keep, **options)

        def sparse(w, b, options=options):
            return sparse_linear(clicks, w, b, seed=seed, **options)

        actual = run(sparse, weight, bias, dy)
        same = run(lambda w, b: dense(w, b, dtype), weight, bias, dy)
        truth = run(lambda w, b: dense(w, b, torch.float64), weight.double(), bias.double(), dy)
        for a, s, t in zip(actual, same, truth, strict=True):
            assert a.dtype == dtype
            assert_as_accurate_as_torch(a, s, t)


def test_rows_in_any_order_and_repeated_share_positions():
    clicks, weight, bias = inputs([3, 0, 5, 2], 11)
    seed = torch.tensor([3])
    whole = sparse_linear(clicks, weight, bias, dropout=0.5, seed=seed)
    view = sparse_linear(clicks.rows([3, 1, 0, 0]), weight, bias, dropout=0.5, seed=seed)
    assert torch.equal(view, whole[[3, 1, 0, 0]])


def test_gradient_has_the_weights_strides_and_no_bias_is_fine():
    clicks, weight, _ = inputs([3, 2], 11)
    weight.requires_grad_()
    sparse_linear(clicks, weight).sum().backward()
    assert weight.grad.stride() == weight.stride() == (1, 6)
    row_major = weight.detach().contiguous().requires_grad_()
    sparse_linear(clicks, row_major).sum().backward()
    assert torch.equal(row_major.grad, weight.grad)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tanh_input": True},
        {"normalize": False, "tanh": False},
        {"shift": torch.arange(4), "row_scale": torch.tensor([0.5, 1, 2, 3]).double()},
    ],
    ids=str,
)
def test_gradcheck(counts, options):
    clicks, weight, bias = inputs([2, 0, 4], 6, torch.float64, counts, n_hidden=3)
    view, seed = clicks.rows([2, 0, 1, 2]), torch.tensor([1])
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    if counts:
        view.values = view.values.double().requires_grad_()
        leaves.append(view.values)
    assert torch.autograd.gradcheck(
        lambda *_: sparse_linear(view, weight, bias, dropout=0.5, seed=seed, **options), leaves
    )


@pytest.mark.parametrize(
    ("counts", "bias", "dropout"), list(itertools.product([0, 1], [0, 1], [0.0, 0.5]))
)
def test_opcheck(counts, bias, dropout):
    clicks, weight, b = inputs([2, 0, 4], 6, counts=bool(counts), bias=bool(bias))
    weight.requires_grad_()
    view = clicks.rows([2, 0])
    seed = torch.tensor([1]) if dropout else None
    # the numbers of a part of a matrix, and none
    shift = torch.tensor([4, 0]) if dropout and counts else None
    scale = torch.tensor([0.5, 2.0]) if counts else None
    arguments = (view.indptr, view.indices, view.values, view.row_ids, weight, b, None, seed)
    options = (shift, scale, dropout, True, True, False)
    torch.library.opcheck(_SPARSE_LINEAR.registered, (*arguments, *options))


def test_normalise_first_then_dropout():
    clicks, eye = Clicks([0, 2], [0, 1], n_items=4), torch.eye(4)
    seen = set()
    for seed in torch.arange(40).split(1):
        (y,) = sparse_linear(clicks, eye, dropout=0.5, seed=seed, tanh=False).tolist()
        seen.add(tuple(round(number, 6) for number in y))
    kept = 1.414214  # 2 / sqrt(2)
    assert seen == {(a, b, 0.0, 0.0) for a in (0.0, kept) for b in (0.0, kept)}


def test_a_stored_zero_does_not_count_in_the_norm():
    clicks = Clicks([0, 2], [0, 1], [0.0, 1.0], n_items=3)
    y = sparse_linear(clicks, torch.eye(3), tanh=False)
    assert y.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("indptr", "indices"), [([0, 1, 1, 3, 3], [0, 1, 2]), ([0, 0, 0], []), ([0], [])]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_rows_without_clicks_give_the_bias_or_zero_and_whole_gradients(indptr, indices, with_bias):
    clicks = Clicks(indptr, indices, n_items=3)
    weight = torch.randn(2, 3, requires_grad=True)
    bias = torch.randn(2, requires_grad=True) if with_bias else None
    y = sparse_linear(clicks, weight, bias, tanh=False)
    empty = clicks.row_lengths() == 0
    assert y.shape == (len(indptr) - 1, 2)
    assert (y[empty] == (0 if bias is None else bias)).all()
    y.sum().backward()
    assert weight.grad.shape == weight.shape and torch.isfinite(weight.grad).all()
    if clicks.nnz == 0:
        assert (weight.grad == 0).all()


def test_one_click_users_under_dropout():
    n = 10_000
    clicks = Clicks(torch.arange(n + 1), torch.zeros(n, dtype=torch.int64), n_items=1)
    y = sparse_linear(clicks, torch.ones(1, 1), dropout=0.5, seed=torch.tensor([11]), tanh=False)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert abs((y == 0).double().mean() - 0.5) < 0.02
    assert abs(y.mean() - 1.0) < 0.04


def test_empty_row_is_exactly_the_bias_and_adds_no_gradient():
    clicks, weight, bias = inputs([2, 0, 3], 6)
    weight.requires_grad_()
    y = sparse_linear(clicks, weight, bias, tanh=False)
    assert torch.equal(y[1], bias)
    (with_empty,) = torch.autograd.grad(y.sum(), weight)
    (without,) = torch.autograd.grad(
        sparse_linear(clicks.rows([0, 2]), weight, bias, tanh=False).sum(), weight
    )
    assert torch.equal(with_empty, without)


def test_second_backward_and_autocast():
    clicks, weight, bias = inputs([2, 0, 3], 6)
    weight.requires_grad_()
    loss = sparse_linear(clicks, weight, bias).square().sum()
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * first)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_linear(clicks, weight, bias)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clicks": torch.ones(2, 6)}, TypeError,
         "sparse_linear: clicks must be Clicks, got Tensor; pass Clicks.from_matrix(x)"),
        ({"weight": torch.ones(6, 5)}, ValueError, "sparse_linear: weight must have shape [any, 6], got [6, 5]"),
        ({"weight": torch.ones(6, 6, dtype=torch.int64)}, TypeError,
         "sparse_linear: weight must be floating point, got int64"),
        ({"bias": torch.ones(5)}, ValueError, "sparse_linear: bias must have shape [6], got [5]"),
        ({"bias": torch.ones(6).double()}, TypeError, "sparse_linear: bias must be float32, got float64"),
        ({"dropout": 1.5}, ValueError, "sparse_linear: dropout must lie in [0, 1], got 1.5"),
        ({"dropout": 0.5}, ValueError, "sparse_linear: seed must be given where dropout > 0, got None"),
        ({"dropout": 0.5, "seed": torch.ones(2)}, ValueError,
         "sparse_linear: seed must be an int64 tensor [1], got float32 [2]"),
        ({"dropout": 0.5, "seed": 3}, ValueError, "sparse_linear: seed must be an int64 tensor [1], got 3"),
        ({"weight": np.ones((6, 9), np.float32)}, TypeError, "sparse_linear: weight must be a tensor, got ndarray"),
        ({"shift": torch.ones(2)}, ValueError, "sparse_linear: shift must be int64 [2], got float32 [2]"),
        ({"row_scale": torch.ones(3)}, ValueError, "sparse_linear: row_scale must be float32 [2], got float32 [3]"),
        ({"row_scale": 1.0}, ValueError, "sparse_linear: row_scale must be float32 [2], got 1.0"),
        ({"shift": torch.ones(2, dtype=torch.int64, device="meta")}, RuntimeError,
         "sparse_linear: shift must be on cpu like clicks, got meta"),
        ({"bias": torch.ones(6, device="meta")}, RuntimeError,
         "sparse_linear: bias must be on cpu like clicks, got meta"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    clicks, weight, bias = inputs([2, 3], 6)
    arguments = {"clicks": clicks, "weight": weight, "bias": bias} | change
    with pytest.raises(error) as caught:
        sparse_linear(**arguments)
    assert str(caught.value) == message
