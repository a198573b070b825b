"""linear_multinomial_nll, CPU path and op: against the dense reference in fp64, gradcheck, opcheck, memory."""

import pytest
import torch
from helpers import assert_as_accurate_as_torch, many_users, random_clicks

from fastvae import Clicks, linear_multinomial_nll, reference
from fastvae.ops._linear_multinomial_nll_cpu import ITEMS_PER_GRADIENT
from fastvae.ops.linear_multinomial_nll import _LINEAR_MULTINOMIAL_NLL

SHAPES = [
    pytest.param([], 5, 3, id="no-users"),
    pytest.param([0, 0], 5, 3, id="no-clicks"),
    pytest.param([0, 3, 0, 2, 0], 7, 3, id="empty-rows-first-middle-last"),
    pytest.param([1], 1, 1, id="smallest"),
    pytest.param([9, 1], 9, 8, id="a-row-with-all-items"),
    pytest.param([4, 90], ITEMS_PER_GRADIENT - 1, 50, id="items-one-below-a-block"),
    pytest.param([4, 90], ITEMS_PER_GRADIENT, 50, id="items-exactly-a-block"),
    pytest.param([4, 90], ITEMS_PER_GRADIENT + 1, 50, id="items-one-above-a-block"),
    pytest.param([30] * 90, 6000, 8, id="items-in-blocks-and-a-tail"),
]


def inputs(lengths, n_items, n_hidden, dtype=torch.float32, counts=False, bias=True, spread=1.0):
    torch.manual_seed(0)
    hidden = torch.randn(len(lengths), n_hidden).to(dtype)
    weight = (spread * torch.randn(n_items, n_hidden)).to(dtype)
    b = torch.randn(n_items).to(dtype) if bias else None
    return hidden, weight, b, random_clicks(lengths, n_items, counts=counts)


def run(call, tensors, dnll):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    nll = call(*leaves)
    wanted = [t for t in leaves if t is not None]
    return [nll, *torch.autograd.grad(nll, wanted, dnll.to(nll.dtype))]


@pytest.mark.parametrize(("lengths", "n_items", "n_hidden"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_equals_the_reference(lengths, n_items, n_hidden, dtype, bias, counts):
    lengths = many_users(lengths, dtype)
    *tensors, clicks = inputs(lengths, n_items, n_hidden, dtype, counts, bias)
    x, dnll = clicks.to_dense(), torch.randn(len(lengths))
    actual = run(lambda h, w, b: linear_multinomial_nll(h, w, b, clicks), tensors, dnll)

    def dense(dtype):
        cast = [None if t is None else t.to(dtype) for t in tensors]
        return run(
            lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x.to(dtype)), cast, dnll
        )

    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    for a, s, t in zip(actual, dense(dtype), dense(torch.float64), strict=True):
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_flat_and_peaked_softmax(spread):
    *tensors, clicks = inputs([5, 20], 400, 16, spread=spread)
    x, dnll = clicks.to_dense(), torch.ones(2)
    actual = run(lambda h, w, b: linear_multinomial_nll(h, w, b, clicks), tensors, dnll)
    same = run(lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x), tensors, dnll)
    doubles = [t.double() for t in tensors]
    truth = run(
        lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x.double()), doubles, dnll
    )
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_far_beyond_the_logits(dtype):
    hidden, weight, bias, clicks = inputs([5, 20], 400, 16, dtype)
    bias *= 300
    doubles, x = [t.double() for t in (hidden, weight, bias)], clicks.to_dense().double()
    actual = linear_multinomial_nll(hidden, weight, bias, clicks)
    truth = reference.linear_multinomial_nll(*doubles, x)
    # bf16 rounds the logits, not their sums with the biases
    torch.testing.assert_close(
        actual.double(), truth, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0
    )


def test_no_grad_and_frozen_inputs_give_the_same_loss_and_only_what_is_asked():
    hidden, weight, bias, clicks = inputs([2, 0, 3], 7, 4)
    with torch.no_grad():
        plain = linear_multinomial_nll(hidden, weight, bias, clicks)
    for wanted in (0, 1, 2):
        tensors = [
            t.clone().requires_grad_(n == wanted) for n, t in enumerate((hidden, weight, bias))
        ]
        nll = linear_multinomial_nll(*tensors, clicks)
        assert torch.equal(nll, plain)
        nll.sum().backward()
        assert [t.grad is not None for t in tensors] == [n == wanted for n in range(3)]


def test_second_backward_adds_the_same_and_weights_scale_users():
    hidden, weight, bias, clicks = inputs([2, 0, 3], 7, 4)
    hidden.requires_grad_()
    weights = torch.tensor([0.0, 1.0, 2.0])
    loss = linear_multinomial_nll(
        hidden, weight, bias, clicks, reduction="sum", user_weights=weights
    )
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * first)
    dense = (
        reference.linear_multinomial_nll(hidden, weight, bias, clicks.to_dense()) * weights
    ).sum()
    torch.testing.assert_close(first, torch.autograd.grad(dense, hidden)[0])
    assert (first[:2] == 0).all()


def test_two_losses_before_one_backward_keep_their_buffers_apart():
    # large enough for the reused buffers
    *tensors, clicks = inputs([40] * 64, 5000, 8)
    weight = tensors[1].requires_grad_()
    one = linear_multinomial_nll(*tensors, clicks, reduction="sum")
    two = linear_multinomial_nll(2 * tensors[0], weight, tensors[2], clicks, reduction="sum")
    together = torch.autograd.grad(one + two, weight)[0]
    apart = [
        torch.autograd.grad(
            linear_multinomial_nll(s * tensors[0], weight, tensors[2], clicks, reduction="sum"),
            weight,
        )[0]
        for s in (1, 2)
    ]
    torch.testing.assert_close(together, apart[0] + apart[1])
    assert apart[0].data_ptr() != apart[1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [False, True])
def test_chunks_of_users_give_what_one_buffer_gives(dtype, view):
    *tensors, clicks = inputs([2, 0, 3, 1, 7], 11, 4, dtype, counts=True)
    clicks = clicks.rows([4, 0, 1, 2, 4]) if view else clicks
    dnll = torch.randn(5)
    one = run(lambda h, w, b: linear_multinomial_nll(h, w, b, clicks), tensors, dnll)
    row = 11 * dtype.itemsize
    for max_bytes in (1, row, 2 * row, 4 * row):
        some = run(
            lambda h, w, b, m=max_bytes: linear_multinomial_nll(h, w, b, clicks, max_bytes=m),
            tensors,
            dnll,
        )
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        )
        for a, b in zip(some, one, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_gradcheck_and_opcheck():
    hidden, weight, bias, clicks = inputs([2, 0, 3], 5, 3, torch.float64, counts=True)
    clicks = clicks.rows([2, 2, 0])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: linear_multinomial_nll(*t, clicks), leaves)
    csr = (clicks.indptr, clicks.indices, clicks.values, clicks.row_ids)
    leaves = [t.detach().float().requires_grad_() for t in leaves]
    for compute in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            _LINEAR_MULTINOMIAL_NLL.registered, (*leaves, None, None, *csr, compute, True, 2**32)
        )
    torch.library.opcheck(
        _LINEAR_MULTINOMIAL_NLL.registered,
        (*(t.detach() for t in leaves), None, None, *csr, torch.float32, False, 2**32),
    )


def test_fp16_autocast_on_a_cpu_does_not_overflow():
    hidden, weight, bias, clicks = inputs([1, 3], 100_000, 4, spread=0.01)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_multinomial_nll(hidden, weight, bias, clicks, reduction="sum")
        loss.backward()
    exact = linear_multinomial_nll(hidden, weight, bias, clicks, reduction="sum")
    (grad,) = torch.autograd.grad(exact, weight)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(weight.grad, grad)


def test_bf16_gradients_of_a_thousand_users_are_summed_in_fp32():
    # two items, even odds, everyone clicks the first: each user adds -1/2 to its weight's gradient
    clicks = Clicks(torch.arange(1001), torch.zeros(1000, dtype=torch.int64), n_items=2)
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_multinomial_nll(hidden, weight, None, clicks, reduction="sum").backward()
    # added one by one in bf16 the sum stops at 128
    assert weight.grad.flatten().tolist() == [-500.0, 500.0]


def test_an_upstream_gradient_beyond_fp16_stays_finite_under_bf16_autocast():
    *tensors, clicks = inputs([5, 20], 600, 64, spread=0.1)
    gradients = []
    for scale in (1.0, 2.0**17):  # 131,072: fp16 ends at 65,504
        leaves = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_multinomial_nll(*leaves, clicks, reduction="sum")
        gradients.append(torch.autograd.grad(loss * scale, leaves))
    for one, large in zip(*gradients, strict=True):
        assert torch.isfinite(large).all()
        torch.testing.assert_close(large / 2.0**17, one, rtol=1e-2, atol=1e-4)


def test_under_autocast_products_are_bf16_and_gradients_are_not_rounded_to_it():
    *tensors, clicks = inputs([5, 20, 3], 600, 64, spread=0.1)
    tensors, dnll = [t.bfloat16().float() for t in tensors], torch.ones(3)

    # two parts: the weight's gradient of one is a bf16 product
    def call(h, w, b):
        return linear_multinomial_nll(h, w, b, clicks, max_bytes=2 * 600 * 2)

    with torch.autocast("cpu", torch.bfloat16):
        nll, *gradients = run(call, tensors, dnll)
    assert torch.equal(nll, call(*(t.bfloat16() for t in tensors)))
    assert not torch.equal(nll, call(*tensors))
    for gradient in gradients:
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32():
    *tensors, clicks = inputs([5, 20, 0], 600, 64, spread=0.1)
    x, dnll = clicks.to_dense(), torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(lambda h, w, b: linear_multinomial_nll(h, w, b, clicks), tensors, dnll)
        same = run(lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x), tensors, dnll)
    doubles = [t.double() for t in tensors]
    truth = run(
        lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x.double()), doubles, dnll
    )
    assert all(t.dtype == torch.float32 for t in actual)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clicks": None}, TypeError,
         "linear_multinomial_nll: clicks must be Clicks, got NoneType; pass Clicks.from_matrix(x)"),
        ({"hidden": torch.ones(3, 4)}, ValueError,
         "linear_multinomial_nll: hidden must have shape [2, any], got [3, 4]"),
        ({"weight": torch.ones(6, 5)}, ValueError, "linear_multinomial_nll: weight must have shape [6, 4], got [6, 5]"),
        ({"bias": torch.ones(4)}, ValueError, "linear_multinomial_nll: bias must have shape [6], got [4]"),
        ({"weight": torch.ones(6, 4).double()}, TypeError,
         "linear_multinomial_nll: weight must be float32, got float64"),
        ({"bias": torch.ones(6, device="meta")}, RuntimeError,
         "linear_multinomial_nll: bias must be on cpu like clicks, got meta"),
        ({"max_bytes": 0}, ValueError, "linear_multinomial_nll: max_bytes must be at least 1, got 0"),
        ({"reduction": "avg"}, ValueError,
         "linear_multinomial_nll: reduction must be one of none, sum, mean, got 'avg'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    clicks = Clicks([0, 1, 2], [0, 5], n_items=6)
    arguments = {
        "hidden": torch.ones(2, 4),
        "weight": torch.ones(6, 4),
        "bias": None,
        "clicks": clicks,
    }
    with pytest.raises(error) as caught:
        linear_multinomial_nll(**(arguments | change))
    assert str(caught.value) == message
