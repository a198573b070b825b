"""How often a captured training step launches something, by a count that needs no GPU; and that the count counts."""

import pytest
import torch

from bench.launches import Launches, step_launches

# as many as there are: the dense model's step has 86 and 67
LIMITS = {"bf16": 31, "fp32": 36}


@pytest.fixture(autouse=True)
def as_in_training():
    """Deterministic algorithms take other kernels."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", LIMITS)
def test_a_captured_step_launches_few(precision):
    names = step_launches(precision)
    print(f"{precision}: {len(names)} launches", *names, sep="\n  ")
    assert len(names) <= LIMITS[precision]
    # the step is whole: a forward, a backward, an optimiser, each weight's and each bias' gradient
    for part in (
        "sparse_linear_fwd_kernel",
        "sample_latent_fwd_kernel",
        "sample_latent_bwd_kernel",
    ):
        assert names.count(part) == 1
    assert sum("adam" in name for name in names) == 1


def test_what_counts_as_a_launch():
    x, index = torch.ones(3, 4), torch.tensor([0, 2])
    cases = {
        "views": (lambda: x.t()[1:].unsqueeze(0).expand(2, 3, 3).detach(), []),
        "allocation": (lambda: torch.empty_like(x).new_empty(5), []),
        "nothing to copy": (lambda: (x.contiguous(), x.to(torch.float32)), []),
        "empty results": (lambda: torch.zeros(0).add(1).add_(1), []),
        "copies": (lambda: x.t().contiguous(), ["aten.clone"]),
        "casts": (lambda: x.to(torch.float16), ["aten._to_copy"]),
        "writes": (lambda: x.fill_(1).mul_(1), ["aten.fill_.Scalar", "aten.mul_.Tensor"]),
        "a write into a view": (lambda: x[0].copy_(x[1]), ["aten.copy_"]),
        "gathers": (lambda: x[index], ["aten.index.Tensor"]),
        "draws": (lambda: torch.randn_like(x), ["aten.randn_like"]),
        "several at once": (lambda: torch._foreach_add_([x, x], 0), ["aten._foreach_add_.Scalar"]),
        "by their result": (lambda: torch.mul(x, x, out=x), ["aten.mul.out"]),
    }
    for name, (call, expected) in cases.items():
        with Launches() as launches:
            call()
        assert launches.names == expected, name
