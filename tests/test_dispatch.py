"""The door of the ops: what asks for a derivative that they do not have is told so, never given 0."""

import pytest
import torch
from torch.autograd import forward_ad

from fastvae import Clicks, MultiVAE, linear_multinomial_nll, multinomial_nll, sparse_linear
from fastvae.ops._dispatch import Op

X = Clicks([0, 2, 3], [0, 2, 1], n_items=4)
LOGITS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
HIDDEN, WEIGHT = LOGITS[:, :3], torch.linspace(-1, 1, 12).reshape(4, 3)
VALUES = torch.tensor([2.0, 1.0, 3.0])


COUNTS = Clicks([0, 2, 3], [0, 2, 1], VALUES, n_items=4)


def of_values(values):
    x = COUNTS.rows([0, 1])
    x.values = values
    return sparse_linear(x, WEIGHT.t())


def halves(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    both = torch.stack((t, 2 * t))
    return both[0], both[1], t + 1


def test_results_of_one_buffer_are_apart_where_torch_registers_the_op():
    def fake(t):
        return t.new_empty(t.shape), t.new_empty(t.shape), t.new_empty(t.shape)

    op = Op("test_halves", halves, halves, fake)
    t = torch.arange(3.0)
    with torch.no_grad():
        plain = op(t)
    registered = op.registered(t)
    assert len({r.untyped_storage().data_ptr() for r in plain}) == 2
    assert len({r.untyped_storage().data_ptr() for r in registered}) == 3
    for a, b in zip(plain, registered, strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(op.registered, (t,))


OPS = {
    "sparse_linear": (lambda w: sparse_linear(X, w), WEIGHT.t()),
    "sparse_linear of values": (of_values, VALUES),
    "multinomial_nll": (lambda logits: multinomial_nll(logits, X), LOGITS),
    "linear_multinomial_nll": (lambda h: linear_multinomial_nll(h, WEIGHT, None, X), HIDDEN),
    "linear_multinomial_nll of weight": (
        lambda w: linear_multinomial_nll(HIDDEN, w, None, X),
        WEIGHT,
    ),
}
REFUSED = (
    r"^fastvae: derivatives of the ops must be taken in reverse mode, got an input with a tangent "
)


def by_dual_numbers(f, at):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(at, at)))


FORWARD_MODES = {
    "jvp": lambda f, at: torch.func.jvp(f, (at,), (at,)),
    "jacfwd": lambda f, at: torch.func.jacfwd(f)(at),
    "dual numbers": by_dual_numbers,
    "dual numbers that require grad": lambda f, at: by_dual_numbers(f, at.clone().requires_grad_()),
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op, mode):
    with pytest.raises(RuntimeError, match=REFUSED):
        FORWARD_MODES[mode](*OPS[op])


def test_forward_mode_is_refused_by_the_models_loss():
    model = MultiVAE([2, 3, 4])
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (X, 0.2))

    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.jvp(loss, (weights,), (weights,))


def test_forward_mode_of_the_gradient_is_refused():
    weights, logits = torch.ones(2), LOGITS.clone().requires_grad_()
    with forward_ad.dual_level():
        loss = multinomial_nll(logits, X, user_weights=forward_ad.make_dual(weights, weights))
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(loss.sum(), logits)


def test_a_tangent_of_the_user_weights_is_followed():
    weights = torch.tensor([1.0, 2.0])
    nll, tangent = torch.func.jvp(
        lambda w: multinomial_nll(LOGITS, X, user_weights=w), (weights,), (torch.ones(2),)
    )
    torch.testing.assert_close(tangent, nll / weights)


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused_and_never_0(op):
    f, at = OPS[op]
    at = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(at).square().sum(), at, create_graph=True)
    # the first derivative is the same as without create_graph
    torch.testing.assert_close(gradient, torch.autograd.grad(f(at).square().sum(), at)[0])
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (at.sum() + gradient.square().sum()).backward()
