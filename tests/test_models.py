"""MultiVAE and MultiDAE: keys, storage, both forward forms, loss and gradients against the dense reference model."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from helpers import assert_as_accurate_as_torch, random_clicks
from torch import nn

import fastvae
from fastvae import Clicks, MultiDAE, MultiVAE, reference, vae_loss_fn

MODELS = [MultiVAE, MultiDAE]
KEYS = [
    "encode.q_layers.linear_0.weight", "encode.q_layers.linear_0.bias",
    "encode.q_layers.linear_1.weight", "encode.q_layers.linear_1.bias",
    "decode.p_layers.linear_0.weight", "decode.p_layers.linear_0.bias",
    "decode.p_layers.linear_1.weight", "decode.p_layers.linear_1.bias",
]  # fmt: skip


# what code bases differ in, each alone and both together
OPTIONS = [
    pytest.param({}, id="paper"),
    pytest.param({"normalize_input": False}, id="counts"),
    pytest.param({"activation": "relu"}, id="relu"),
    pytest.param({"normalize_input": False, "activation": "relu"}, id="counts-relu"),
]


def pair(p_dims, two_heads=True, dtype=torch.float32, seed=0, **options):
    """A model and the dense reference model with the same weights."""
    torch.manual_seed(seed)
    model = (MultiVAE if two_heads else MultiDAE)(p_dims, **options).to(dtype)
    dense = reference.MultiVAE(p_dims, two_heads=two_heads, **options).to(dtype)
    dense.load_state_dict(model.state_dict())
    return model, dense


def dense_loss(dense, clicks, beta):
    """The reference's loss with the draws that model.loss makes: first the dropout seed, then the noise."""
    seed = torch.randint(2**63 - 1, (1,))
    dtype = next(dense.parameters()).dtype
    noise = None
    if dense.two_heads:
        noise = torch.randn(len(clicks), dense.decoder[0].in_features).to(dtype)
    return dense.loss(
        clicks.to_dense().to(dtype), beta, reference.dense_keep(clicks, seed, 0.5), noise
    )


@pytest.mark.parametrize("make", MODELS)
def test_keys_shapes_and_storage(make):
    model = make([4, 6, 9])
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert list(shapes) == KEYS
    assert shapes["encode.q_layers.linear_0.weight"] == (6, 9)
    assert shapes["encode.q_layers.linear_1.weight"] == (8 if make is MultiVAE else 4, 6)
    assert shapes["decode.p_layers.linear_1.weight"] == (9, 6)
    row_major = {key: t.contiguous() + 1 for key, t in model.state_dict().items()}
    model.load_state_dict(row_major)
    for same in (model, copy.deepcopy(model), model.double().float()):
        first = same.encode.q_layers.linear_0.weight
        assert first.t().is_contiguous() and torch.equal(first, row_major[KEYS[0]])
    model.loss(random_clicks([2, 3], 9)).backward()
    first = model.encode.q_layers.linear_0.weight
    assert first.grad.stride() == first.stride()


def test_a_state_dict_is_the_weights_and_assigned_weights_go_item_by_item():
    model, other = MultiVAE([4, 6, 9]), MultiVAE([4, 6, 9])
    for key, value in model.state_dict().items():
        value.fill_(2.0)
        assert (dict(model.named_parameters())[key] == 2).all()
    row_major = {key: t.contiguous() for key, t in other.state_dict().items()}
    with torch.device("meta"):
        empty = MultiVAE([4, 6, 9])
    for assigned in (model, empty.requires_grad_(False)):
        needs_grad = assigned.encode.q_layers.linear_0.weight.requires_grad
        assigned.load_state_dict(row_major, assign=True)
        first = assigned.encode.q_layers.linear_0.weight
        assert torch.equal(first, row_major[KEYS[0]]) and first.t().is_contiguous()
        assert isinstance(first, nn.Parameter) and first.requires_grad == needs_grad
        assert assigned.decode.output.weight.data_ptr() == row_major[KEYS[-2]].data_ptr()
    half = {key: t.half() for key, t in row_major.items()}
    assert (
        empty.load_state_dict(half, assign=True)
        and empty.encode.q_layers.linear_0.weight.dtype == torch.half
    )


@pytest.mark.parametrize("make", MODELS)
def test_a_row_major_first_weight_only_costs_time(make):
    """As FSDP2 wants it."""
    torch.manual_seed(0)
    model = make([4, 6, 9])
    other = copy.deepcopy(model)
    layer = other.encode.q_layers.linear_0
    layer.weight = nn.Parameter(layer.weight.detach().contiguous())
    clicks = random_clicks([3, 1, 5], 9)
    for net in (model, other):
        optimizer = fastvae.Adam(net.parameters(), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            net.loss(clicks, beta=0.2).backward()
            optimizer.step()
    assert layer.weight.is_contiguous()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_initial_weights(make):
    torch.manual_seed(0)
    model = make([20, 60, 500])
    bound = math.sqrt(6 / 560)
    weight = model.encode.q_layers.linear_0.weight.detach()
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(
        bound / math.sqrt(3), rel=0.05
    )
    assert model.decode.p_layers.linear_1.bias.std().item() == pytest.approx(0.001, rel=0.2)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    "p_dims", [[4, 9], [4, 6, 9], [4, 5, 6, 9]], ids=["no-hidden", "one", "two"]
)
@pytest.mark.parametrize("options", OPTIONS)
def test_clicks_and_dense_give_the_same_logits_as_the_reference(make, p_dims, options):
    model, dense = pair(p_dims, make is MultiVAE, **options)
    clicks = random_clicks([3, 0, 9], 9, counts=True)
    model.eval(), dense.eval()
    outputs = [
        f(x) for f, x in ((model, clicks), (model, clicks.to_dense()), (dense, clicks.to_dense()))
    ]
    for outs in zip(*outputs, strict=True) if make is MultiVAE else [outputs]:
        torch.testing.assert_close(outs[0], outs[2])
        torch.testing.assert_close(outs[1], outs[2])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(
    "p_dims", [[4, 9], [4, 6, 9], [4, 5, 6, 9]], ids=["no-hidden", "one", "two"]
)
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_every_gradient_equal_the_reference(make, p_dims, options):
    model, dense = pair(p_dims, make is MultiVAE, **options)
    truth = copy.deepcopy(dense).double()
    clicks = random_clicks([3, 0, 9, 5], 9, counts=True).rows([3, 1, 0, 3, 2])
    losses = []
    for module, loss in ((model, type(model).loss), (dense, dense_loss), (truth, dense_loss)):
        torch.manual_seed(1)
        losses.append(loss(module, clicks, 0.3))
        losses[-1].backward()
    assert_as_accurate_as_torch(*losses)
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


class LowRank(nn.Module):
    """LoRA in place of a linear layer; .weight is the base's, as in the libraries."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


def put(model, place, make):
    """make(layer) in the place of the first or the last layer."""
    stack = model.encode.q_layers if place == "first" else model.decode.p_layers
    name = f"linear_{0 if place == 'first' else len(stack) - 1}"
    stack.add_module(name, make(stack.get_submodule(name)))


def with_hook(register):
    def make(layer):
        register(layer)
        return layer

    return make


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)
    return layer


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer):
    other = Doubling(layer.in_features, layer.out_features)
    other.load_state_dict(layer.state_dict())
    return other


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(layer)
    # the hook makes .weight anew from weight_g at each call
    layer.weight_g.data *= 2
    return layer


def pruned(layer):
    mask = torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 2
    layer = nn.utils.prune.custom_from_mask(layer, "weight", mask)
    layer.weight_orig.data *= 2
    return layer


OTHER_LAYERS = {
    "LoRA": LowRank,
    "Sequential": lambda layer: nn.Sequential(layer, nn.Tanh()),
    "forward hook": with_hook(lambda layer: layer.register_forward_hook(lambda *args: 2 * args[2])),
    "pre-hook": with_hook(
        lambda layer: layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    ),
    "backward hook": with_hook(
        lambda layer: layer.register_full_backward_hook(
            lambda _, dx, dy: tuple(g if g is None else 2 * g for g in dx)
        )
    ),
    "forward of the object": patched,
    "subclass": doubled,
    "old weight_norm": old_weight_norm,
    "pruned": pruned,
}


def assert_loss_is_dense(model):
    """Loss and gradients from clicks equal those that autograd gives for the dense forward and loss."""
    clicks = random_clicks([3, 0, 6, 1], 6, counts=True)
    results = []
    for way in ("clicks", "dense"):
        model.zero_grad()
        torch.manual_seed(1)
        if way == "clicks":
            loss = model.loss(clicks, 0.3)
        else:
            loss = vae_loss_fn(clicks.to_dense(), *model(clicks.to_dense()), 0.3)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("other", OTHER_LAYERS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_a_layer_that_is_more_than_its_weight_is_called(other, place):
    torch.manual_seed(0)
    model = MultiVAE([3, 4, 6], dropout_enc=[0.0, 0.0])
    put(model, place, OTHER_LAYERS[other])
    assert_loss_is_dense(model)


def test_a_layer_that_is_called_gets_rows_in_the_models_dtype():
    model, calls = MultiVAE([3, 4, 6]).double(), []
    layer = model.encode.q_layers.linear_0
    layer.register_forward_hook(lambda _, args, y: calls.append((args[0].dtype, y.dtype)))
    assert model.loss(random_clicks([3, 1], 6)).dtype == torch.float64
    assert calls == [(torch.float64, torch.float64)]


@pytest.mark.parametrize("other", ["hook", "replaced", "forward of the object"])
def test_a_decoder_that_is_more_than_its_layers_is_called(other):
    torch.manual_seed(0)
    model = MultiVAE([3, 4, 6], dropout_enc=[0.0, 0.0])
    if other == "hook":
        model.decode.register_forward_hook(lambda *args: 2 * args[2])
    elif other == "replaced":
        model.decode = nn.Linear(3, 6)
    else:
        patched(model.decode)
    assert_loss_is_dense(model)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("kind", ["plain", "parametrized", "subclass without a forward"])
def test_a_layer_that_is_its_weight_is_never_called_on_dense_rows(monkeypatch, kind, place):
    class Named(nn.Linear):
        pass

    model = MultiVAE([3, 4, 6])
    if kind == "parametrized":
        put(model, place, nn.utils.parametrizations.weight_norm)
    elif kind == "subclass without a forward":
        put(model, place, lambda layer: Named(layer.in_features, layer.out_features))
    for name in ("fastvae.models.multinomial_nll", "fastvae.clicks.Clicks.to_dense"):
        monkeypatch.setattr(name, None)
    model.loss(random_clicks([3, 0, 6], 6)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("make", MODELS)
def test_a_hundred_optimiser_steps_stay_with_the_reference(make):
    model, dense = pair([8, 16, 120], make is MultiVAE)
    clicks = random_clicks([5, 0, 30, 12] * 16, 120)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (model, dense)]
    for step in range(100):
        ids = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:20]
        for module, loss, optimizer in zip(
            (model, dense), (type(model).loss, dense_loss), optimizers, strict=True
        ):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss(module, clicks.rows(ids), 0.2).backward()
            optimizer.step()
    start = pair([8, 16, 120], make is MultiVAE)[0]
    for (name, p), q, s in zip(
        model.named_parameters(), dense.parameters(), start.parameters(), strict=True
    ):
        assert (p - q).norm() <= 1e-4 * q.norm(), name
        assert (p - s).norm() > 1e-2 * s.norm(), f"{name} was trained"


def test_per_click():
    model, _ = pair([4, 6, 9])
    clicks = random_clicks([3, 0, 9], 9, counts=True)
    torch.manual_seed(0)
    nll, kld = model.loss_terms(clicks)
    torch.manual_seed(0)
    by_clicks = model.loss(clicks, 0.5, per_click=True)
    n = clicks.row_sums()
    expected = sum((nll[u] + 0.5 * kld[u]) / n[u] for u in (0, 2)) / 3
    assert by_clicks.item() == pytest.approx(expected.item())


def test_per_click_counts_exactly_under_autocast():
    model = MultiVAE([4, 6, 9]).eval()
    clicks = Clicks([0, 2], [1, 3], [200.0, 57.0], n_items=9)  # 257 is no bf16 number
    with torch.autocast("cpu", torch.bfloat16):
        nll, by_clicks = (model.loss_terms(clicks, per_click)[0] for per_click in (False, True))
    torch.testing.assert_close(by_clicks * 257, nll)


def test_latent_is_sampled_in_training_only():
    model = MultiVAE([1, 4], dropout_enc=[0.0])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.encode.q_layers.linear_0.bias[1] = 2.0  # logvar: std is e, not e^2
        model.decode.p_layers.linear_0.weight[0] = 1.0
        clicks = Clicks(torch.arange(100_001), torch.zeros(100_000, dtype=torch.int64), n_items=4)
        z = model(clicks)[0][:, 0]
        assert z.std().item() == pytest.approx(math.e, rel=0.02)
        assert z.mean().item() == pytest.approx(0.0, abs=0.05)
        model.eval()
        assert torch.equal(model(clicks)[0], model(clicks)[0]) and (model(clicks)[0] == 0).all()


def test_noise_has_unit_variance_where_logvar_is_zero():
    model = MultiVAE([1, 2], dropout_enc=[0.0])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.decode.p_layers.linear_0.weight[0] = 1.0
        torch.manual_seed(0)
        z = model(Clicks(torch.arange(100_001), torch.zeros(100_000).long(), n_items=2))[0][:, 0]
    assert z.var().item() == pytest.approx(1.0, abs=0.02)
    assert z.mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize(("dtype", "logvar"), [(torch.float16, 12.0), (torch.float32, 80.0)])
def test_a_large_logvar_gives_a_finite_loss(dtype, logvar):
    # exp(12) is beyond fp16; the kld is taken in fp32
    model = MultiVAE([2, 9], dropout_enc=[0.0]).to(dtype)
    with torch.no_grad():
        model.encode.q_layers.linear_0.weight.zero_()
        model.encode.q_layers.linear_0.bias[2:] = logvar
    _, kld = model.eval().loss_terms(random_clicks([3], 9))
    assert kld.dtype == torch.float32
    # two latents: -1/2 (1 + logvar - exp(logvar)) each
    assert kld.item() == pytest.approx(math.exp(logvar) - logvar - 1, rel=1e-3)


@pytest.mark.parametrize("make", MODELS)
def test_a_user_without_clicks_adds_nothing_to_the_likelihood_and_its_gradients(make):
    torch.manual_seed(0)
    model = make([4, 6, 9]).eval()
    whole = Clicks([0, 2, 2, 3], [4, 7, 1], n_items=9)
    gradients = []
    for rows in ([0, 1, 2], [0, 2]):
        loss = model.loss(whole.rows(rows)) * len(rows)  # the sum over users
        assert torch.isfinite(loss)
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_dropout_changes_between_steps_and_is_off_in_evaluation():
    model, clicks = MultiDAE([4, 6, 30]), random_clicks([20] * 3, 30)
    assert not torch.equal(model(clicks), model(clicks))
    model.eval()
    assert torch.equal(model(clicks), model(clicks))


class QuirkOfTheOriginal(torch.nn.Module):
    """The public code's stack: children in order dropout, linear, ...; tanh after each but the last."""

    def __init__(self, linears, dropout, tanh_last=False):
        super().__init__()
        self.linears, self.dropout, self.tanh_last = linears, dropout, tanh_last

    def forward(self, h):
        for n, (linear, p) in enumerate(zip(self.linears, self.dropout, strict=True)):
            h = torch.tanh(F.dropout(h, p, self.training))
            h = linear(h)
            if n < len(self.linears) - 1 or self.tanh_last:
                h = torch.tanh(h)
        return h


@pytest.mark.parametrize("make", MODELS)
def test_tanh_after_dropout_gives_the_logits_of_the_original_code(make):
    torch.manual_seed(0)
    model = make([4, 6, 9], tanh_after_dropout=True).eval()
    clicks = random_clicks([3, 0, 9], 9)
    q, p = model.encode.q_layers, model.decode.p_layers
    encoder = QuirkOfTheOriginal([q.linear_0, q.linear_1], [0.5, 0.0], make is MultiDAE).eval()
    decoder = QuirkOfTheOriginal([p.linear_0, p.linear_1], [0.0, 0.0]).eval()
    z = encoder(F.normalize(clicks.to_dense()))[:, :4]
    for x in (clicks, clicks.to_dense()):
        out = model(x)
        torch.testing.assert_close(out[0] if make is MultiVAE else out, decoder(z))
    model.loss(clicks, 0.1).backward()
    plain = make([4, 6, 9]).eval()
    plain.load_state_dict(model.state_dict())
    assert plain.loss(clicks).item() != pytest.approx(model.loss(clicks).item())


def test_vae_loss_fn_dense_and_clicks():
    model, _ = pair([4, 6, 9])
    clicks = random_clicks([3, 0, 9], 9, counts=True)
    x = clicks.to_dense()
    out, mu, logvar = model.eval()(x)
    truth = (reference.multinomial_nll(out, x) + 0.3 * reference.kld(mu, logvar)).mean()
    for inp in (x, clicks):
        assert vae_loss_fn(inp, out, mu, logvar, 0.3).item() == pytest.approx(truth.item())
    mu, logvar = torch.ones(1, 200), torch.zeros(1, 200)
    assert vae_loss_fn(torch.zeros(1, 3), torch.zeros(1, 3), mu, logvar, 1.0).item() == 100.0


def test_bf16_autocast_is_close_and_finite():
    model, _ = pair([8, 16, 300])
    clicks = random_clicks([30] * 20, 300)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(clicks, 0.2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(clicks, 0.2).item(), rel=1e-3)
    assert all(
        torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([9],), "MultiVAE: p_dims must be at least two widths above 0, got [9]"),
        (([4, 0, 9],), "MultiVAE: p_dims must be at least two widths above 0, got [4, 0, 9]"),
        (("816",), "MultiVAE: p_dims must be a list of whole widths, got '816'"),
        ((9,), "MultiVAE: p_dims must be a list of whole widths, got 9"),
        (([4, 6.5, 9],), "MultiVAE: p_dims must be a list of whole widths, got [4, 6.5, 9]"),
        (([4, 9], None, None, "94"), "MultiVAE: q_dims must be a list of whole widths, got '94'"),
        (([4, 6, 9], [0.5]),
         "MultiVAE: dropout_enc must hold one probability for each of 2 layers, got [0.5]; q_dims is the "
         "fourth argument"),
        (([4, 6, 9], ["a", 0]), "MultiVAE: dropout_enc must hold probabilities from 0 to 1, got ['a', 0]"),
        (([4, 6, 9], [0.5, 2]), "MultiVAE: dropout_enc must hold probabilities from 0 to 1, got [0.5, 2.0]"),
        (([4, 6, 9], None, [0.0]),
         "MultiVAE: dropout_dec must hold one probability for each of 2 layers, got [0.0]; q_dims is the "
         "fourth argument"),
        (([4, 6, 9], None, None, [8, 6, 4]), "MultiVAE: q_dims must start with the 9 items of p_dims, got [8, 6, 4]"),
        (([4, 6, 9], None, None, [9, 6, 3]), "MultiVAE: q_dims must end with the 4 latents of p_dims, got [9, 6, 3]"),
    ],
)  # fmt: skip
def test_bad_widths_and_dropouts_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        MultiVAE(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "elu"}, "MultiVAE: activation must be one of tanh, relu, got 'elu'"),
        ({"activation": None}, "MultiVAE: activation must be one of tanh, relu, got None"),
        ({"normalize_input": "no"}, "MultiVAE: normalize_input must be True or False, got 'no'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        MultiVAE([4, 6, 9], **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(("older", "per_click"), [("none", False), ("clicks", True)])
def test_the_older_words_for_per_click_go_on_working(older, per_click):
    model, clicks = MultiVAE([4, 6, 9]).eval(), random_clicks([3, 0, 9], 9, counts=True)
    expected = model.loss(clicks, 0.5, per_click).item()
    text = rf"loss: normalize must become per_click=True or per_click=False, got '{older}'"
    for call in (
        lambda: model.loss(clicks, 0.5, normalize=older),
        lambda: model.loss(clicks, 0.5, older),
        lambda: model(clicks, 0.5, normalize=older),
    ):
        with pytest.warns(DeprecationWarning, match=text) as warned:
            assert call().item() == expected
        # once, and at the line of the caller
        assert [warning.filename for warning in warned] == [__file__]
    with pytest.warns(DeprecationWarning, match=text):
        terms = model.loss_terms(clicks, normalize=older)
    assert all(map(torch.equal, terms, model.loss_terms(clicks, per_click)))


def test_bad_input_is_named():
    model, clicks = MultiVAE([4, 6, 9]), random_clicks([2], 8)
    for call, error, message in [
        (lambda: model([[1.0]]), TypeError,
         "MultiVAE: x must be a dense tensor or Clicks, got list; pass Clicks.from_matrix(x)"),
        (lambda: model(clicks), ValueError, "MultiVAE: x must have shape [any, 9], got [1, 8]"),
        (lambda: model(torch.ones(9)), ValueError, "MultiVAE: x must have shape [any, 9], got [9]"),
        (lambda: model.loss(torch.ones(2, 9)), TypeError,
         "loss: clicks must be Clicks, got Tensor; pass Clicks.from_matrix(x)"),
        (lambda: model.loss(clicks), ValueError, "loss: clicks must have the model's 9 items, got 8"),
        (lambda: model.loss(clicks, normalize="user"), ValueError,
         "loss: normalize must be one of none, clicks, got 'user'"),
        (lambda: model.loss(clicks, 0.0, "user"), ValueError,
         "loss: normalize must be one of none, clicks, got 'user'"),
        (lambda: model.loss(clicks, 0.0, 1), TypeError, "loss: per_click must be True or False, got 1"),
        (lambda: model.loss(clicks, torch.ones(3)), ValueError, "loss: beta must be a scalar, got shape [3]"),
        (lambda: model.loss(clicks, "a"), TypeError, "loss: beta must be a float or a scalar tensor, got str"),
        (lambda: vae_loss_fn(clicks, torch.zeros(1, 8), torch.zeros(1, 4), torch.zeros(1, 4), None), TypeError,
         "vae_loss_fn: anneal must be a float or a scalar tensor, got NoneType"),
        (lambda: model(torch.ones(1, 9, dtype=torch.complex64)), TypeError, "MultiVAE: x must be real, got complex64"),
    ]:  # fmt: skip
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_dense_x_of_another_dtype_is_taken_as_the_models(dtype):
    model = MultiDAE([4, 9])
    x = random_clicks([2, 3], 9).to_dense()
    assert torch.equal(model.eval()(x.to(dtype)), model(x))


def test_vae_loss_fn_names_what_does_not_fit():
    out, mu = torch.zeros(2, 9), torch.zeros(2, 4)
    for arguments, error, message in [
        (([[1.0]], out, mu, mu), TypeError, "inp must be a dense tensor of 2 dimensions or Clicks, got list"),
        ((out.to_sparse(), out, mu, mu), TypeError,
         "inp must be a dense tensor of 2 dimensions or Clicks, got a sparse_coo one of shape [2, 9]"),
        ((out, out[0], mu, mu), TypeError,
         "out must be a dense tensor of 2 dimensions, got a strided one of shape [9]"),
        ((out, out, mu[:1], mu[:1]), ValueError,
         "mu and logvar must have one shape [2, n_latent], got [1, 4] and [1, 4]"),
        ((out, out, mu, mu[:, :1]), ValueError,
         "mu and logvar must have one shape [2, n_latent], got [2, 4] and [2, 1]"),
    ]:  # fmt: skip
        with pytest.raises(error) as caught:
            vae_loss_fn(*arguments, 0.1)
        assert str(caught.value) == f"vae_loss_fn: {message}"


@pytest.mark.parametrize("make", MODELS)
def test_the_loss_of_an_fp64_model_is_fp64_throughout(make):
    torch.manual_seed(0)
    model, clicks = make([2, 3, 6]).double().eval(), random_clicks([2, 4, 1], 6)
    assert all(terms.dtype == torch.float64 for terms in model.loss_terms(clicks))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (clicks, 0.3)
        )

    # the item-major weight is given to gradcheck as the contiguous tensor that it wants
    assert torch.autograd.gradcheck(
        loss,
        [
            p.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            for p in parameters
        ],
    )


def test_a_batch_without_users():
    model = MultiVAE([4, 6, 9])
    loss = model.loss(random_clicks([], 9), 0.1)
    loss.backward()
    assert loss.item() == 0.0
    for x in (random_clicks([], 9), torch.zeros(0, 9)):
        assert vae_loss_fn(x, *model(x), 0.1).item() == 0.0


@pytest.fixture
def alone():
    """torch.distributed with this process only."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def row_by_row(model):
    first = model.encode.q_layers.linear_0
    first.weight = nn.Parameter(first.weight.detach().contiguous())
    return model


def test_what_flattens_weights_refuses_the_first_unless_it_is_row_by_row(alone):
    from torch.distributed.fsdp import fully_shard

    def flattened(model):
        return nn.utils.parameters_to_vector(model.parameters())

    def by_lbfgs(model):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

        def closure():
            optimizer.zero_grad()
            loss = model.loss(clicks)
            loss.backward()
            return loss

        return optimizer.step(closure)

    clicks = random_clicks([3, 1, 5], 9)
    for use, words in (
        (flattened, "view size"), (by_lbfgs, "view size"), (fully_shard, "non-contiguous"),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, NotImplementedError), match=words):
            use(MultiVAE([4, 6, 9]))
        use(row_by_row(MultiVAE([4, 6, 9])))
    sharded = fully_shard(row_by_row(MultiVAE([4, 6, 9]).eval()))
    whole = MultiVAE([4, 6, 9]).eval()
    whole.load_state_dict({key: t.full_tensor() for key, t in sharded.state_dict().items()})
    torch.testing.assert_close(sharded(clicks, beta=0.2), whole.loss(clicks, beta=0.2))


def test_hooks_of_the_model_itself_run_where_it_is_called():
    calls, model, clicks = [], MultiVAE([4, 6, 9]), random_clicks([3, 1], 9)
    model.register_forward_hook(lambda *_: calls.append(1))
    model.loss(clicks)
    assert calls == []
    model(clicks, beta=0.2)
    model(clicks)
    assert calls == [1, 1]


def test_safetensors_takes_the_model_or_a_row_by_row_state_dict(tmp_path):
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed: pip install safetensors"
    )
    model, again = MultiVAE([4, 6, 9]), MultiVAE([4, 6, 9])
    with pytest.raises(ValueError, match="non contiguous"):
        safetensors.save_file(model.state_dict(), tmp_path / "a")
    safetensors.save_model(model, tmp_path / "a")
    safetensors.load_model(again, tmp_path / "a")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert again.encode.q_layers.linear_0.weight.t().is_contiguous()
