"""pytest-benchmark cases: each op forward and backward, whole training steps, evaluation and top-k.

    make bench        or  python -m pytest bench -k ml20m

A case is compared with the dense reference before it is timed, and fails instead if it is wrong. On a CPU the batch
is 500; a GPU adds the large batches that fit it.
"""

import pytest
import torch

from bench.steps import PROVIDERS, SHAPES, check, new_model
from fastvae import (
    evaluate,
    linear_multinomial_nll,
    multinomial_nll,
    recommend,
    reference,
    sparse_linear,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_HIDDEN = 600
TIMING = {"warmup_rounds": 2, "rounds": 7, "iterations": 1}
FOR_CPU = ("ml20m", "netflix", "msd", "50k")


@pytest.fixture(scope="module", params=FOR_CPU if DEVICE == "cpu" else SHAPES)
def batch(request):
    """One batch of users of a data set's shape."""
    torch.manual_seed(0)
    return SHAPES[request.param].clicks(1).to(DEVICE)


def timed(benchmark, call, setup=None):
    """Time call(*setup()), the device's work included."""

    def run(*arguments):
        call(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=setup, **TIMING)


def assert_right(actual, expected):
    """The first users of a result against the reference."""
    torch.testing.assert_close(actual[: len(expected)], expected, rtol=1e-3, atol=1e-4)


def first_layer(batch):
    weight = torch.randn(batch.n_items, N_HIDDEN, device=DEVICE).t().requires_grad_()
    bias = torch.zeros(N_HIDDEN, device=DEVICE, requires_grad=True)
    seed = torch.tensor([1], device=DEVICE)
    few = batch.rows(torch.arange(8))
    expected = reference.sparse_linear(
        few.to_dense(), weight, bias, reference.dense_keep(few, seed, 0.5), 0.5
    )
    assert_right(sparse_linear(few, weight, bias, dropout=0.5, seed=seed), expected)
    return lambda: sparse_linear(batch, weight, bias, dropout=0.5, seed=seed)


def loss_of_logits(batch):
    logits = torch.randn(batch.shape, device=DEVICE, requires_grad=True)
    few = batch.rows(torch.arange(8))
    assert_right(
        multinomial_nll(logits, batch), reference.multinomial_nll(logits[:8], few.to_dense())
    )
    return lambda: multinomial_nll(logits, batch, reduction="mean")


def last_layer(batch):
    hidden = torch.randn(len(batch), N_HIDDEN, device=DEVICE, requires_grad=True)
    weight = (0.05 * torch.randn(batch.n_items, N_HIDDEN, device=DEVICE)).requires_grad_()
    bias = torch.zeros(batch.n_items, device=DEVICE, requires_grad=True)
    few = batch.rows(torch.arange(8))
    expected = reference.linear_multinomial_nll(hidden[:8], weight, bias, few.to_dense())
    assert_right(linear_multinomial_nll(hidden, weight, bias, batch), expected)
    return lambda: linear_multinomial_nll(hidden, weight, bias, batch, reduction="mean")


OPS = {
    "sparse_linear": first_layer,
    "multinomial_nll": loss_of_logits,
    "linear_multinomial_nll": last_layer,
}


@pytest.mark.parametrize("op", OPS)
def test_forward(benchmark, batch, op):
    forward = OPS[op](batch)
    with torch.no_grad():
        timed(benchmark, forward)


@pytest.mark.parametrize("op", OPS)
def test_backward(benchmark, batch, op):
    forward = OPS[op](batch)
    timed(benchmark, lambda y: y.sum().backward(), setup=lambda: ((forward(),), {}))


STEPS = ("fastvae", "fastvae-bf16", "dense", "dense-bf16", "embedding_bag")


@pytest.mark.parametrize("provider", STEPS)
def test_training_step(benchmark, batch, provider):
    if provider != "fastvae" and batch.n_items > 21_000 and DEVICE == "cpu":
        pytest.skip("the baselines of the larger shapes are timed by bench ratio")
    ready = PROVIDERS[provider](new_model(batch.n_items).to(DEVICE))
    check(provider, ready, batch)
    inputs = ready.to_batch(batch)
    timed(benchmark, lambda: ready.step(inputs))


def test_evaluation(benchmark, batch):
    model = new_model(batch.n_items).to(DEVICE)
    timed(benchmark, lambda: evaluate(model, batch, batch))


def test_recommendation(benchmark, batch):
    model = new_model(batch.n_items).to(DEVICE)
    timed(benchmark, lambda: recommend(model, batch, 20))
