"""Dense batches that are mostly zeros take the ops: the same numbers as dense products, and what must stay dense does."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_clicks

from fastvae import Clicks, MultiDAE, MultiVAE, _dense, reference, vae_loss_fn
from fastvae._dense import clicks_in

N_ITEMS = 200
LENGTHS = [3, 0, 9, 1, 10]
WIDTHS = [4, 6, N_ITEMS]


@pytest.fixture(autouse=True)
def small_batches_too(monkeypatch):
    monkeypatch.setattr(_dense, "MIN_NUMBERS", 0)


def batch(dtype=torch.float32, counts=True):
    return random_clicks(LENGTHS, N_ITEMS, counts=counts).to_dense().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts", [True, False])
def test_the_clicks_are_those_of_the_rows(dtype, counts):
    x = batch(dtype, counts)
    for given in (x, x.t().contiguous().t()):
        clicks, truth = clicks_in(given), Clicks.from_matrix(x)
        assert torch.equal(clicks.indptr, truth.indptr)
        assert torch.equal(clicks.indices, truth.indices) and clicks.shape == truth.shape
        if counts:
            assert torch.equal(clicks.values, truth.values.to(dtype))
        else:
            assert clicks.values is None
    assert clicks_in(-x).values.max() < 0


def never(*_):
    raise AssertionError("a dense product over the items")


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
@pytest.mark.parametrize("options", [{}, {"normalize_input": False, "activation": "relu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_gives_the_references_numbers_without_a_dense_product(
    make, options, dtype, monkeypatch
):
    torch.manual_seed(0)
    model = make(WIDTHS, **options).to(dtype).eval()
    dense = reference.MultiVAE(WIDTHS, two_heads=make is MultiVAE, **options).to(dtype).eval()
    dense.load_state_dict(model.state_dict())
    monkeypatch.setattr(model.encode.q_layers.linear_0.__class__, "forward", F.linear)
    monkeypatch.setattr("fastvae._layers.is_only", lambda *_: True)
    monkeypatch.setattr("fastvae._layers.F.normalize", never)
    for x in (batch(dtype), -batch(dtype), batch(dtype).bool(), batch(torch.float64)):
        ours, theirs = model(x), dense(x.to(dtype))
        pairs = zip(ours, theirs, strict=True) if make is MultiVAE else [(ours, theirs)]
        for a, b in pairs:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_gradients_are_the_references(make):
    torch.manual_seed(0)
    model, x = make(WIDTHS, dropout_enc=[0.0, 0.0]), batch()
    dense = reference.MultiVAE(WIDTHS, 0.0, two_heads=make is MultiVAE)
    dense.load_state_dict(model.state_dict())
    for net in (model, dense):
        torch.manual_seed(1)
        logits = net(x)[0] if make is MultiVAE else net(x)
        (F.log_softmax(logits, 1) * x).sum().backward()
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_dropout_is_that_of_clicks():
    """A mask of the clicks' places in the batch, drawn anew for each batch from torch's generator."""
    torch.manual_seed(0)
    model, x = MultiVAE(WIDTHS), batch()
    draws = []
    for given in (x, clicks_in(x), x):
        torch.manual_seed(7)
        draws.append(model(given)[1])
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    assert not torch.equal(model(x)[1], model(x)[1])
    layer = model.encode.q_layers.linear_0
    with torch.no_grad():
        layer.bias.zero_()
        mean = torch.stack([model.encode._first(x, active=False) for _ in range(200)]).mean(0)
        truth = F.linear(F.normalize(x), layer.weight)
    assert (mean - truth).norm() < 0.15 * truth.norm()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_vae_loss_fn_gives_the_references_loss_and_gradients(beta, monkeypatch):
    torch.manual_seed(0)
    x, results = batch(), []
    start = [torch.randn(len(x), n) for n in (N_ITEMS, 4, 4)]
    for dense in (False, True):
        logits, mu, logvar = inputs = [t.clone().requires_grad_() for t in start]
        if dense:
            nll = reference.multinomial_nll(logits, x)
            loss = (nll + beta * reference.kld(mu, logvar)).mean()
        else:
            monkeypatch.setattr("fastvae.models._dense_nll", never)
            loss = vae_loss_fn(x, logits, mu, logvar, beta)
        loss.backward()
        results.append([loss, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def with_one(value):
    x = batch()
    x[0, 0] = value
    return x


DENSE = {
    "many clicks": lambda: torch.ones(5, N_ITEMS),
    "many clicks in rows that the sample misses": lambda: torch.cat([batch(), torch.ones(12, N_ITEMS)])[
        torch.arange(17) // 2 + 8 * (torch.arange(17) % 2)
    ],
    "nan": lambda: with_one(float("nan")),
    "inf": lambda: with_one(float("inf")),
    "a square beyond fp32": lambda: with_one(1e30),
    "a square below fp32": lambda: with_one(1e-30),
    "bf16": lambda: batch(torch.bfloat16),
    "a gradient": lambda: batch().requires_grad_(),
    "another device": lambda: batch().to("meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
def test_what_stays_dense(case):
    assert clicks_in(DENSE[case]()) is None


def test_small_batches_stay_dense(monkeypatch):
    monkeypatch.undo()
    assert clicks_in(batch()) is None
    large = random_clicks([5] * 400, N_ITEMS).to_dense()
    assert large.numel() >= _dense.MIN_NUMBERS and clicks_in(large).nnz == 2000


def test_x_that_wants_a_gradient_gets_it():
    torch.manual_seed(0)
    model, x = MultiDAE(WIDTHS).eval(), batch()[[0, 2, 4]].requires_grad_()
    model(x).square().sum().backward()
    assert x.grad.norm() > 0
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].norm() > 0


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_holds_no_clicks_of_its_example():
    model, other = MultiDAE(WIDTHS).eval(), batch().flip(1)
    traced = torch.jit.trace(model, batch(), check_trace=False)
    torch.testing.assert_close(traced(other), model(other))


def test_transforms_and_the_compiler_see_dense_products():
    torch.manual_seed(0)
    model, x = MultiDAE(WIDTHS).eval(), batch()
    each = torch.func.vmap(lambda row: model(row[None])[0])(x)
    torch.testing.assert_close(each, model(x))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
