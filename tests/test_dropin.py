"""Code that people have: the loops of docs/dropin.md before and after, and what they put around a model."""

import copy
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_clicks
from torch import nn

import fastvae
from bench import other_nets
from bench.dropin import their_loss
from fastvae import MultiDAE, MultiVAE

PAGE = (Path(__file__).parent.parent / "docs" / "dropin.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## ([\w-]+)\n\n```diff\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
N_ITEMS = 30
CLICKS = random_clicks([4, 9, 2, 7] * 10, N_ITEMS)


def sides(diff):
    """The file before and after, by the hunk's own counts."""
    lines = diff.splitlines()
    head = re.fullmatch(r"@@ -1,(\d+) \+1,(\d+) @@", lines[2])
    before = [line[1:] for line in lines[3:] if line[:1] in ("", " ", "-")]
    after = [line[1:] for line in lines[3:] if line[:1] in ("", " ", "+")]
    assert (len(before), len(after)) == (int(head[1]), int(head[2]))
    return "\n".join(before), "\n".join(after)


def their_models():
    module = types.ModuleType("models")

    def vae(p_dims, dropout_enc=None, dropout_dec=None, q_dims=None):
        net = other_nets.VaeCf if dropout_enc is None else other_nets.RecoTour
        return net(p_dims[::-1])

    module.MultiVAE = vae
    module.vae_loss = lambda recon, x, mu, logvar, anneal: their_loss(x, recon, mu, logvar, anneal)
    return module


@pytest.mark.parametrize("name", ["vae-cf-pytorch", "RecoTour"])
def test_a_loop_runs_before_and_after(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "models", their_models())
    arguments = (N_ITEMS,)
    if name == "RecoTour":
        arguments = [20, 25, N_ITEMS], [N_ITEMS, 25, 20], [0.5, 0.0], [0.0, 0.0]
    curves = []
    for source in sides(DIFFS[name]):
        names: dict = {}
        exec(compile(source, name, "exec"), names)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  as the loops draw
        data = CLICKS.to_scipy()
        curves.append(names["train"](data, *arguments, epochs=8, batch_size=10)[1])
    before, after = (np.array(curve) for curve in curves)
    assert len(before) == len(after) == 32 and after[-4:].mean() < after[:4].mean()
    # from other initial weights: theirs are not rebuilt
    assert abs(after[:4].mean() - before[:4].mean()) < 0.15 * before[:4].mean()


def trained(model, optimizer, around=lambda model: model):
    """A step by the loss, through whatever is around the model."""
    net, before = around(model), copy.deepcopy(model.state_dict())
    net(CLICKS, beta=0.2).backward()
    optimizer.step()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return net


def made():
    torch.manual_seed(0)
    return MultiVAE([4, 6, N_ITEMS])


def test_data_parallel_without_gpus_is_the_model():
    model = made().eval()
    wrapped = trained(model, fastvae.Adam(model.parameters()), nn.DataParallel)
    assert torch.equal(wrapped(CLICKS)[0], model(CLICKS)[0])


def test_an_average_of_models():
    model = made().eval()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average(CLICKS)[0], model(CLICKS)[0])


@pytest.mark.parametrize("make", [torch.optim.AdamW, fastvae.Adam])
def test_clipping_and_a_schedule(make):
    model = made()
    optimizer = make(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model.loss(CLICKS).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm <= 1.001e-3
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_scaler_of_gradients():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    torch.manual_seed(1)
    scaler.scale(model.loss(CLICKS)).backward()
    scaled = model.decode.output.bias.grad.clone()
    scaler.unscale_(optimizer)
    assert torch.equal(model.decode.output.bias.grad * 8, scaled)
    scaler.step(optimizer)
    scaler.update()


def test_copies_and_pickled_models(tmp_path):
    model = made().eval()
    torch.save(model, tmp_path / "whole.pt")
    for same in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert torch.equal(same(CLICKS)[0], model(CLICKS)[0])
        assert same.encode.q_layers.linear_0.weight.t().is_contiguous()


def test_functional_call_takes_other_weights():
    model, other = made().eval(), MultiVAE([4, 6, N_ITEMS]).eval()
    for x in (CLICKS, CLICKS.to_dense()):
        out = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
        assert torch.equal(out[0], other(x)[0])


def test_a_parametrized_weight_is_what_is_computed_with():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = made().eval()
    double = copy.deepcopy(model)
    with torch.no_grad():
        double.encode.q_layers.linear_0.weight.mul_(2)
    nn.utils.parametrize.register_parametrization(
        model.encode.q_layers.linear_0, "weight", Doubled()
    )
    for x in (CLICKS, CLICKS.to_dense()):
        torch.testing.assert_close(model(x)[0], double(x)[0])


@pytest.mark.parametrize("call", ["dense", "clicks", "loss"])
def test_a_parametrized_weight_is_computed_once_in_a_step(call):
    """spectral_norm goes on by a step of its iteration each time, and in public code it does so once."""

    class Counted(nn.Module):
        times = 0

        def forward(self, weight):
            self.times += 1
            return 2 * weight

    model = made()
    first = model.encode.q_layers.linear_0
    counted = Counted()
    nn.utils.parametrize.register_parametrization(first, "weight", counted)
    counted.times = 0
    if call == "loss":
        model.loss(CLICKS, 0.2)
    else:
        model(CLICKS.to_dense() if call == "dense" else CLICKS)
    assert counted.times == 1


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_weights_row_by_row_can_be_flattened(make):
    torch.manual_seed(0)
    model = make([4, 6, N_ITEMS], item_major=False).eval()
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat / 2, model.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), flat / 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(model.loss(CLICKS))
        losses[-1].backward()
        return losses[-1]

    optimizer.step(closure)
    assert losses[-1] < losses[0]
    twin = make([4, 6, N_ITEMS]).eval()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.loss(CLICKS), model.loss(CLICKS))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        nn.utils.parameters_to_vector(twin.parameters())
