"""The kernel of a layer's gradient before its tanh and of its bias' gradient: against fp64, on edges of its blocks."""

import pytest
import torch
from helpers import DEVICE, KERNEL_DTYPES, assert_as_accurate_as_torch

from fastvae.kernels.bias_gradient import BLOCK_D, BLOCK_U, USERS, bias_gradient

SHAPES = [
    pytest.param(0, 4, id="no-users"),
    pytest.param(3, 0, id="no-columns"),
    pytest.param(1, 1, id="one-number"),
    pytest.param(5, BLOCK_D - 1, id="columns-one-below-a-block"),
    pytest.param(BLOCK_U, BLOCK_D, id="exactly-a-block"),
    pytest.param(BLOCK_U + 1, 2 * BLOCK_D + 3, id="blocks-and-a-tail"),
    pytest.param(USERS, 3, id="users-of-one-program"),
    pytest.param(USERS + 1, 3, id="users-of-two-programs"),
]


def by_torch(dy, y, dtype):
    """dpre and dbias in dtype, one operator after the other; the sum as torch takes it, in fp32 inside."""
    dpre = dy.to(dtype)
    if y is not None:
        dpre = torch.ops.aten.tanh_backward.default(dpre, y.to(dtype))
    return dpre, dpre.sum(0, dtype=torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize(("n_users", "n_columns"), SHAPES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tanh", [False, True], ids=["plain", "tanh"])
def test_equals_torch(n_users, n_columns, dtype, tanh):
    torch.manual_seed(0)
    dy = torch.randn(n_users, n_columns).to(DEVICE, dtype)
    y = torch.tanh(torch.randn(n_users, n_columns)).to(DEVICE, dtype) if tanh else None
    dpre, dbias = bias_gradient(dy, y)
    assert dbias.shape == (n_columns,) and dbias.dtype == torch.float32
    same, truth = by_torch(dy, y, dtype), by_torch(dy, y, torch.float64)
    assert_as_accurate_as_torch(dbias, same[1], truth[1])
    if tanh:
        assert dpre.shape == y.shape and dpre.dtype == dtype
        assert_as_accurate_as_torch(dpre, same[0], truth[0])
    else:
        assert dpre is None


def test_a_second_run_gives_the_same_bits():
    torch.manual_seed(0)
    dy = torch.randn(2 * USERS + 5, BLOCK_D + 1, device=DEVICE)
    one, two = (bias_gradient(dy, torch.tanh(dy)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
