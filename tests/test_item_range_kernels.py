"""sparse_linear's kernels on ranges of the items: masks and sums are those of the whole matrix.

A file of its own: the kernels take seed and shift as a tuple, which not every tool that runs compiled kernels can pass.
"""

import itertools

import pytest
import torch
from helpers import DEVICE, random_clicks
from test_sparse_linear_kernel import (
    BLOCK_NNZ,
    SEED,
    forward,
    random_layer,
    value_gradient,
    weight_gradient,
)

from fastvae import reference
from fastvae._item_range import item_range


@pytest.mark.parametrize("counts", [False, True], ids=["binary", "counts"])
def test_columns_of_a_larger_matrix(counts):
    clicks = random_clicks([5, 0, 2 * BLOCK_NNZ + 1, 1], 2 * BLOCK_NNZ + 3, counts=counts)
    clicks = clicks.rows([2, 0, 2, 3, 1])
    (weight, _), dpre = random_layer(clicks.n_items, 8), torch.randn(5, 8, device=DEVICE)
    y, scale = forward(clicks, weight, tanh=False)
    whole = [y] + [weight_gradient(dpre, clicks, scale, way) for way in (False, True)]
    found = [torch.zeros_like(y), [], []]
    for first, last in itertools.pairwise([0, 3, 3, BLOCK_NNZ, clicks.n_items]):
        part = item_range(clicks, first, last)
        shift = {"shift": part.shift.to(DEVICE)}
        own = weight[first:last].contiguous()
        y, scale = forward(part, own, tanh=False, row_scale=part.row_scale.to(DEVICE), **shift)
        found[0] += y
        for n, way in enumerate((False, True)):
            found[1 + n].append(weight_gradient(dpre, part, scale, way, **shift))
        if counts:
            dvalues = value_gradient(dpre, own, part, scale, normalize=False, **shift)
            kept = reference.dropout_keep(torch.tensor([SEED]), whole_positions(part), 0.5)
            assert torch.equal(dvalues.cpu() != 0, kept)
    for a, b in zip([found[0], *map(torch.cat, found[1:])], whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def whole_positions(part):
    """Position in the larger matrix of each click of the range's matrix."""
    return torch.arange(len(part.indices)) + torch.repeat_interleave(
        part.shifts, part.indptr.diff()
    )
