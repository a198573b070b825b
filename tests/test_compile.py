"""torch.compile sees the ops as they are: no graph break, the same loss and gradients, autocast included."""

import pytest
import torch
from helpers import random_clicks

from fastvae import MultiDAE, MultiVAE

# inductor compiles C++ for the CPU
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def gradients(loss, model, clicks, autocast):
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(clicks, 0.3)
    model.zero_grad()
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    # inductor's cache on disk does not know that another version of an op has other strides
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize(
    ("backend", "make", "autocast"),
    [
        ("aot_eager", MultiVAE, False),
        ("aot_eager", MultiVAE, True),
        ("aot_eager", MultiDAE, False),
        ("inductor", MultiVAE, False),  # builds C++, so only once
    ],
)
def test_a_compiled_loss_equals_the_eager_one(backend, make, autocast):
    torch.manual_seed(0)
    # without dropout and noise, whose random numbers inductor draws in its own way
    model = make([4, 6, 30]).eval()
    compiled = torch.compile(model.loss, fullgraph=True, backend=backend)
    for lengths in ([3, 0, 9], [5, 1, 30, 2]):
        whole = random_clicks([2, *lengths], 30, counts=True)
        batch = whole.rows(torch.arange(len(lengths), 0, -1))
        eager = gradients(model.loss, model, batch, autocast)
        for a, b in zip(gradients(compiled, model, batch, autocast), eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if autocast else 1e-5, atol=1e-5)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_every_mode_of_compile_gives_the_eager_gradients(dynamic, fullgraph):
    torch.manual_seed(0)
    model = MultiVAE([4, 6, 30]).eval()
    compiled = torch.compile(model.loss, dynamic=dynamic, fullgraph=fullgraph, backend="aot_eager")
    for lengths in ([3, 0, 9], [5, 1, 30, 2]):
        batch = random_clicks(lengths, 30)
        eager = gradients(model.loss, model, batch, False)
        for a, b in zip(gradients(compiled, model, batch, False), eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_compiled_training_step_draws_dropout_and_noise():
    torch.manual_seed(0)
    model, clicks = MultiVAE([4, 6, 30]), random_clicks([9, 12], 30)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    losses = {gradients(compiled, model, clicks, False)[0].item()}
    torch.manual_seed(2)
    losses.add(compiled(clicks, 0.3).item())
    losses.add(compiled(clicks, 0.3).item())
    assert len(losses) == 3
