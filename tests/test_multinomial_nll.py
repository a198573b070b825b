"""multinomial_nll, CPU path and op: against the dense reference in fp64, hand-worked numbers, gradcheck, opcheck."""

import math
import sys

import pytest
import torch
from helpers import assert_as_accurate_as_torch, many_users, random_clicks

from fastvae import Clicks, multinomial_nll, reference
from fastvae.ops import multinomial_nll as module_function
from fastvae.ops.multinomial_nll import _MULTINOMIAL_NLL

BLOCK_I = 1024


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The edges of a block without a block's memory."""
    monkeypatch.setattr(sys.modules["fastvae.ops.multinomial_nll"], "BLOCK_BYTES", 4 * BLOCK_I)


SHAPES = [
    pytest.param([], 5, id="no-users"),
    pytest.param([0, 0], 5, id="no-clicks"),
    pytest.param([0, 3, 0, 2, 0], 7, id="empty-rows-first-middle-last"),
    pytest.param([1], 1, id="smallest"),
    pytest.param([9, 1], 9, id="a-row-with-all-items"),
    pytest.param([4, 90], BLOCK_I - 1, id="items-one-below-a-block"),
    pytest.param([4, 90], BLOCK_I, id="items-exactly-a-block"),
    pytest.param([4, 90], BLOCK_I + 1, id="items-one-above-a-block"),
    pytest.param([3] * 70, BLOCK_I // 32, id="rows-in-blocks-and-a-tail"),
]


@pytest.mark.parametrize(("lengths", "n_items"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [False, True])
def test_equals_the_reference(lengths, n_items, dtype, counts):
    lengths = many_users(lengths, dtype)
    torch.manual_seed(0)
    clicks, x = (lambda c: (c, c.to_dense()))(random_clicks(lengths, n_items, counts=counts))
    logits = (3 * torch.randn(clicks.shape)).to(dtype)
    dnll = torch.randn(len(lengths))

    def run(call, logits):
        leaf = logits.detach().requires_grad_()
        nll = call(leaf)
        return nll, *torch.autograd.grad(nll, leaf, dnll.to(nll.dtype))

    actual = run(lambda z: multinomial_nll(z, clicks), logits)
    same = run(lambda z: reference.multinomial_nll(z, x.to(dtype)), logits)
    truth = run(lambda z: reference.multinomial_nll(z, x.double()), logits.double())
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


def test_a_user_of_many_clicks_loses_no_digit():
    # summed click after click in fp32, 20,000 of them are off by 2e-6
    torch.manual_seed(0)
    clicks = random_clicks([20_000] * 20, 25_000)
    logits = torch.randn(clicks.shape)
    truth = reference.multinomial_nll(logits.double(), clicks.to_dense().double())
    same = reference.multinomial_nll(logits, clicks.to_dense())
    nll = multinomial_nll(logits, clicks)
    assert_as_accurate_as_torch(nll, same, truth, floor=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("logits", "x", "nll", "grad"),
    [
        pytest.param([0, 0, 0], [2, 1, 0], 3 * math.log(3), [-1, 0, 1], id="counts"),
        pytest.param([0, -100], [0, 1], 100.0, [1, -1], id="saturated"),
        pytest.param([1e8, 1e8], [1, 0], math.log(2), [-0.5, 0.5], id="huge-logits"),
    ],
)
def test_hand_worked(logits, x, nll, grad):
    z = torch.tensor([logits], dtype=torch.float32, requires_grad=True)
    loss = multinomial_nll(z, Clicks.from_matrix(torch.tensor([x])), reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(nll, rel=1e-6)
    assert z.grad[0].tolist() == pytest.approx(grad, abs=1e-6)


def test_a_stored_zero_counts_for_nothing():
    clicks = Clicks([0, 2], [0, 1], [0.0, 1.0], n_items=3)
    assert clicks.nnz == 1
    # ln 3; 2 ln 3 where the zero counts as a click
    assert multinomial_nll(torch.zeros(1, 3), clicks).item() == pytest.approx(1.098612, abs=5e-7)


def test_fp16_and_bf16_with_many_items():
    one_click = Clicks([0, 1], [0], n_items=100_000)
    loss = multinomial_nll(torch.zeros(1, 100_000, dtype=torch.float16), one_click)
    assert loss.item() == pytest.approx(math.log(100_000), abs=1e-2)
    torch.manual_seed(0)
    logits, clicks = torch.randn(1, 200_000).bfloat16(), random_clicks([50], 200_000)
    truth = reference.multinomial_nll(logits.double(), clicks.to_dense().double())
    assert multinomial_nll(logits, clicks).item() == pytest.approx(truth.item(), rel=1e-3)


def test_reductions_and_user_weights():
    clicks, logits = random_clicks([2, 0, 3], 7), torch.randn(3, 7, requires_grad=True)
    weights = torch.tensor([0.0, 1.0, 2.0])
    each = multinomial_nll(logits, clicks)
    assert multinomial_nll(logits, clicks, reduction="mean").item() == pytest.approx(
        each.mean().item()
    )
    weighed = multinomial_nll(logits, clicks, reduction="sum", user_weights=weights)
    (grad,) = torch.autograd.grad(weighed, logits)
    (expected,) = torch.autograd.grad(
        (reference.multinomial_nll(logits, clicks.to_dense()) * weights).sum(), logits
    )
    assert (grad[0] == 0).all()
    torch.testing.assert_close(grad, expected)


def test_logits_are_never_written_and_a_second_backward_adds_the_same():
    clicks, z = random_clicks([2, 0, 3], 7), torch.randn(3, 7, requires_grad=True)
    before = z.detach().clone()
    loss = multinomial_nll(z, clicks, reduction="mean") + z.square().mean()
    loss.backward(retain_graph=True)
    first = z.grad.clone()
    loss.backward()
    assert torch.equal(z.detach(), before)
    assert torch.equal(z.grad, 2 * first)
    with torch.no_grad():
        assert torch.equal(multinomial_nll(z, clicks), multinomial_nll(z.detach(), clicks))


def test_non_contiguous_logits_and_gradcheck():
    clicks = random_clicks([2, 0, 3], 5, counts=True).rows([2, 2, 0])
    logits = torch.randn(5, 3, dtype=torch.float64).t().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: multinomial_nll(z, clicks), logits)


def test_opcheck():
    clicks = random_clicks([2, 0, 3], 5, counts=True).rows([2, 0])
    logits = torch.randn(2, 5, requires_grad=True)
    arguments = (logits, clicks.indptr, clicks.indices, clicks.values, clicks.row_ids)
    torch.library.opcheck(_MULTINOMIAL_NLL.registered, arguments)
    assert module_function is multinomial_nll


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clicks": torch.ones(2, 6)}, TypeError,
         "multinomial_nll: clicks must be Clicks, got Tensor; pass Clicks.from_matrix(x)"),
        ({"logits": torch.ones(2, 5)}, ValueError, "multinomial_nll: logits must have shape [2, 6], got [2, 5]"),
        ({"logits": torch.ones(2, 6).int()}, TypeError, "multinomial_nll: logits must be floating point, got int32"),
        ({"logits": torch.ones(2, 6, device="meta")}, RuntimeError,
         "multinomial_nll: logits must be on cpu like clicks, got meta"),
        ({"reduction": "avg"}, ValueError, "multinomial_nll: reduction must be one of none, sum, mean, got 'avg'"),
        ({"user_weights": torch.ones(3)}, ValueError, "multinomial_nll: user_weights must have shape [2], got [3]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    arguments = {"logits": torch.ones(2, 6), "clicks": random_clicks([2, 3], 6)} | change
    with pytest.raises(error) as caught:
        multinomial_nll(**arguments)
    assert str(caught.value) == message
