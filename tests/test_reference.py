"""The oracle itself, pinned by published and hand-worked numbers."""

import math

import pytest
import torch

from fastvae import reference
from fastvae.ops._dropout import dropout_keep as cpu_keep

PHILOX_WORDS = [  # first word of the known answers of Random123's kat_vectors, philox4x32 10 rounds
    pytest.param(0, 0, 0x6627E8D5, id="all-zero"),
]


@pytest.mark.parametrize(("seed", "position", "word"), PHILOX_WORDS)
def test_dropout_keep_is_philox(seed, position, word):
    seed, position = torch.tensor([seed]), torch.tensor([position])
    at = (word >> 8) / 2**24
    assert reference.dropout_keep(seed, position, at).item()
    assert not reference.dropout_keep(seed, position, at + 2**-24).item()


@pytest.mark.parametrize("keep", [reference.dropout_keep, cpu_keep], ids=["reference", "cpu"])
def test_the_threshold_of_the_dropout_is_rounded(keep):
    seed, position = torch.tensor([0]), torch.tensor([0])
    word = PHILOX_WORDS[0].values[2] >> 8
    assert keep(seed, position, (word + 0.4) / 2**24).item()
    assert not keep(seed, position, (word + 0.6) / 2**24).item()


def philox_by_hand(key, counter):
    """Ten rounds in Python integers, as in Salmon et al. 2011, figure 2."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0


def test_dropout_keep_at_large_seeds_and_positions():
    for seed in (1, 2**31, 2**63 - 1):
        position = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**40 - 1])
        keep = reference.dropout_keep(torch.tensor([seed]), position, 0.5).tolist()
        for n, kept in zip(position.tolist(), keep, strict=True):
            word = philox_by_hand((seed % 2**32, seed >> 32), (n % 2**32, n >> 32, 0, 0))
            assert kept == ((word >> 8) >= 2**23)


def test_dropout_keep_rate_and_extremes():
    position, seed = torch.arange(200_000), torch.tensor([7])
    assert reference.dropout_keep(seed, position, 0.0).all()
    assert not reference.dropout_keep(seed, position, 1.0).any()
    for p in (0.1, 0.5, 0.9):
        rate = 1 - reference.dropout_keep(seed, position, p).double().mean().item()
        assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / len(position))
    one, other = (reference.dropout_keep(torch.tensor([s]), position, 0.5) for s in (7, 8))
    assert abs((one == other).double().mean() - 0.5) < 0.01


def test_hand_worked_losses():
    zeros, x = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
    assert reference.multinomial_nll(zeros, x).item() == pytest.approx(3 * math.log(3))
    saturated = reference.multinomial_nll(torch.tensor([[0.0, -100.0]]), torch.tensor([[0.0, 1.0]]))
    assert saturated.item() == pytest.approx(100.0)
    # summed over latents, not averaged: 0.5 would be the mean
    assert reference.kld(torch.ones(1, 200), torch.zeros(1, 200)).item() == pytest.approx(100.0)


def test_hand_worked_first_layer():
    x, keep = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0] * 4]), torch.tensor([[True] * 4] * 2)
    y = reference.sparse_linear(x, torch.eye(4), keep=keep, dropout=0.5, tanh=False)
    # normalise first, then dropout's factor 2: 2 / sqrt(2)
    assert y[0].tolist() == pytest.approx([math.sqrt(2), math.sqrt(2), 0, 0])
    assert y[1].tolist() == [0.0] * 4
