"""Items that are out of the question: logits of -inf, one or a whole row of them, by every way to the loss.

A user without clicks costs 0 and has no gradient; a click on such an item costs inf; nothing is NaN.
"""

import contextlib
import math

import pytest
import torch
from helpers import DEVICE

from bench.launches import pretended_gpu
from fastvae import Clicks, linear_multinomial_nll, multinomial_nll, vae_loss_fn

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
INF = math.inf
ZERO_NLL = math.log(1 + math.e) - 1
# no clicks, a click on -inf in a row of it, a click on -inf, a click beside -inf, a row without -inf
LOGITS = torch.tensor([[-INF] * 3, [-INF] * 3, [-INF, 0, 1], [-INF, 0, 1], [0, -INF, -INF]])
CLICKS = Clicks([0, 0, 1, 2, 3, 3], [1, 0, 2], n_items=3).to(DEVICE)
EXPECTED = [0, INF, INF, ZERO_NLL, 0]
LATENT = torch.zeros(5, 1, device=DEVICE)


def by_linear(logits, max_bytes=2**30):
    """The same logits as bias, a user at a time, for all users have one bias."""
    hidden, weight = logits.new_ones(1, 1), logits.new_zeros(3, 1)
    return torch.cat(
        [
            linear_multinomial_nll(
                hidden, weight, bias, CLICKS.rows([u]).compact(), max_bytes=max_bytes
            )
            for u, bias in enumerate(logits)
        ]
    )


def by_loss(x):
    """vae_loss_fn's value for each user alone."""
    return lambda logits: torch.stack(
        [vae_loss_fn(x[u], logits[u : u + 1], LATENT[:1], LATENT[:1], 0.0) for u in range(5)]
    )


ROWS = [CLICKS.rows([u]) for u in range(5)]
WAYS = {
    "multinomial_nll": lambda logits: multinomial_nll(logits, CLICKS),
    "linear_multinomial_nll": by_linear,
    "linear_multinomial_nll in chunks": lambda logits: by_linear(logits, 1),
    "vae_loss_fn of Clicks": by_loss(ROWS),
    "vae_loss_fn of a dense x": by_loss([row.to_dense() for row in ROWS]),
}


KERNEL_DTYPES = [torch.float32, torch.float16]
CASES = [
    (way, dtype, where)
    for way in WAYS
    for dtype in [*KERNEL_DTYPES, *([torch.float64] if DEVICE == "cpu" else [])]
    for where in ["here", *(["kernels"] if DEVICE == "cpu" else [])]
    # a dense x has no kernel, and they have no fp64
    if where == "here" or (dtype in KERNEL_DTYPES and "dense" not in way)
]


@pytest.mark.parametrize(("way", "dtype", "where"), CASES, ids=str)
def test_rows_and_items_of_minus_infinity(way, dtype, where):
    with pretended_gpu(chip="interpreter") if where == "kernels" else contextlib.nullcontext():
        logits = LOGITS.to(DEVICE, dtype).requires_grad_()
        nll = WAYS[way](logits)
        (gradient,) = torch.autograd.grad(nll.sum(), logits)
    assert nll.tolist() == pytest.approx(EXPECTED, rel=1e-2 if dtype == torch.float16 else 1e-5)
    assert not gradient.isnan().any()
    assert not gradient[[0, 4]].any()
    softmax = math.e / (1 + math.e)
    assert gradient[3].tolist() == pytest.approx([0, 1 - softmax, softmax - 1], rel=1e-2)


def test_a_nan_stays_a_nan():
    logits = LOGITS.to(DEVICE).clone()
    logits[1, 0] = logits[3, 0] = math.nan
    assert WAYS["multinomial_nll"](logits).isnan().tolist() == [False, True, False, True, False]
    assert by_linear(logits).isnan().tolist() == [False, True, False, True, False]
