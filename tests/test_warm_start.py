"""Warm start: weights, biases and moments by external id, new and gone items, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from training import (
    IDS,
    LATER,
    N_ITEMS,
    assert_equal_weights,
    later_clicks,
    learnable,
    model,
    weights,
)

from fastvae import Adam, Clicks, MultiDAE, MultiVAE, fit
from fastvae.adam import from_file
from fastvae.checkpoint import read_checkpoint, write_checkpoint
from fastvae.data import map_items
from fastvae.warm_start import WarmStart

FAST = {"batch_size": 30, "lr": 0.01, "total_anneal_steps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three epochs with validation."""
    path = tmp_path_factory.mktemp("runs") / "run"
    fit(model(), *learnable(), epochs=3, items=IDS, run_dir=path, **FAST)
    return path


def later_model(make=MultiVAE, dims=(8, 16), seed=9):
    torch.manual_seed(seed)
    return make([*dims, len(LATER)])


def columns():
    """Of each known item: its column later, and then."""
    return zip(*((k, IDS.index(i)) for k, i in enumerate(LATER) if i in IDS), strict=True)


def is_new():
    return torch.tensor([item not in IDS for item in LATER])


def test_known_items_keep_their_numbers_and_new_ones_are_zero(folder):
    net, old = later_model(), read_checkpoint(folder / "best.pt")["model"]
    fit(net, later_clicks(), epochs=0, items=LATER, warm_start=folder / "best.pt")
    now, then = (list(part) for part in columns())
    for name, value in net.state_dict().items():
        if name == "encode.q_layers.linear_0.weight":
            assert torch.equal(value[:, now], old[name][:, then])
            assert not value[:, is_new()].any()
        elif name.startswith("decode.p_layers.linear_1"):
            assert torch.equal(value[now], old[name][then])
            assert name.endswith("bias") or not value[is_new()].any()
        else:
            assert torch.equal(value, old[name])


def test_the_logits_of_known_items_are_those_of_before(folder):
    net, old = later_model(), model()
    old.load_state_dict(read_checkpoint(folder / "best.pt")["model"])
    start = WarmStart.read(folder, net, LATER)
    start.load_into(net, Adam(net.parameters()), later_clicks())
    x = learnable()[0]
    moved, n_gone = map_items(x, IDS, LATER)
    assert n_gone > 0
    users = np.flatnonzero(np.diff(moved.indptr) == np.diff(x.indptr))
    now, then = (list(part) for part in columns())
    with torch.no_grad():
        logits, _, _ = net.eval()(moved.rows(users))
        before, _, _ = old.eval()(x.rows(users))
    torch.testing.assert_close(logits[:, now], before[:, then], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [False, True])
def test_a_new_item_is_expected_as_often_as_it_was_clicked(folder, counts):
    """The gradient of the nll by its bias is zero."""
    net, x = later_model(), later_clicks()
    if counts:
        x = Clicks(x.indptr, x.indices, 1.0 + (torch.arange(x.nnz) % 3), x.n_items)
    WarmStart.read(folder, net, LATER).load_into(net, Adam(net.parameters()), x)
    with torch.no_grad():
        p = net.double().eval()(x.to_dense().double())[0].softmax(1)
    n_clicks = x.to_dense().double()
    expected = (n_clicks.sum(1, keepdim=True) * p).sum(0)[is_new()]
    actual = n_clicks.sum(0)[is_new()]
    assert actual[2] == 0
    actual[2] = 0.5
    torch.testing.assert_close(expected, actual, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_moments_are_those_of_last_and_zero_for_new_items(folder, name):
    net = later_model()
    optimizer = Adam(net.parameters(), lr=0.5)
    start = WarmStart.read(folder / name, net, LATER)
    start.load_into(net, optimizer, later_clicks())
    assert start.moments_from == folder / "last.pt"
    assert optimizer.param_groups[0]["lr"] == 0.5
    old = model()
    state = from_file(read_checkpoint(folder / "last.pt")["optimizer"], list(old.parameters()))
    now, then = (list(part) for part in columns())
    for n, (key, weight) in enumerate(net.named_parameters()):
        for part, value in optimizer.state[weight].items():
            before = state["state"][n][part]
            if value.ndim == 0:
                assert value == before == 12  # steps
            elif key == "encode.q_layers.linear_0.weight":
                assert value.stride() == weight.stride()
                assert torch.equal(value[:, now], before[:, then])
                assert not value[:, is_new()].any()
            elif key.startswith("decode.p_layers.linear_1"):
                assert torch.equal(value[now], before[then]) and not value[is_new()].any()
            else:
                assert torch.equal(value, before)


def test_a_training_goes_on_as_if_it_had_not_stopped_where_the_items_are_the_same(tmp_path):
    """A last.pt as warm start is the state after its epoch; only epoch and update count anew."""
    train, _ = learnable()
    ones = {**FAST, "batch_size": 100}
    fit(model(), train, epochs=1, items=IDS, run_dir=tmp_path / "a", seed=5, **ones)
    whole, net = model(), model(seed=7)
    step = {"items": IDS, "seed": 5, **ones}
    fit(net, train, epochs=1, warm_start=tmp_path / "a" / "last.pt", **step)
    # the same epoch twice by hand: epoch 1 is drawn as epoch 0 was
    from fastvae.trainer import Settings, Trainer

    trainer = Trainer(whole, train, None, Settings(100, 0.01, 0.2, 0, False, "fp32", 5), None, None)
    from fastvae.progress import ProgressBar

    with ProgressBar(False, 1, 100) as bar:
        trainer.run_epochs(1, 0, bar, lambda: False)
        trainer.epoch = 0
        trainer.run_epochs(1, 0, bar, lambda: False)
    assert_equal_weights(weights(net), weights(whole))


def test_a_warm_started_run_is_resumed_bit_for_bit(folder, tmp_path):
    train = later_clicks()
    held = tuple(map_items(part, IDS, LATER)[0] for part in learnable()[1])
    common = {"items": LATER, "warm_start": folder / "best.pt", **FAST}
    whole, parts = later_model(), later_model()
    a = fit(whole, train, held, epochs=3, run_dir=tmp_path / "a", **common)
    fit(parts, train, held, epochs=1, run_dir=tmp_path / "b", **common)
    b = fit(later_model(seed=3), train, held, epochs=3, run_dir=tmp_path / "b", resume=True, **common)  # fmt: skip
    rows = [[{**row, "users_per_second": 0} for row in result.history] for result in (a, b)]
    assert rows[0] == rows[1]
    one, two = (read_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert_equal_weights(one["model"], two["model"])


def test_the_run_folder_says_where_it_began(folder, tmp_path):
    fit(later_model(), later_clicks(), epochs=0, items=LATER, warm_start=folder, run_dir=tmp_path / "b")  # fmt: skip
    assert json.loads((tmp_path / "b" / "config.json").read_text())["warm_start"] == {
        "checkpoint": str(folder / "best.pt"),
        "moments": str(folder / "last.pt"),
        "items_taken_over": 35,
        "items_new": 3,
        "items_gone": 5,
    }


def test_beta_is_at_its_cap_from_the_first_update_on(folder, tmp_path):
    common = {"epochs": 1, "batch_size": 10, "items": LATER, "anneal_cap": 0.3}
    fit(later_model(), later_clicks(), warm_start=folder, run_dir=tmp_path / "warm", **common)
    fit(later_model(), later_clicks(), run_dir=tmp_path / "fresh", **common)
    betas = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text())["beta"]
        for name in ("warm", "fresh")
    ]
    steps = [
        json.loads((tmp_path / name / "config.json").read_text())["total_anneal_steps"]
        for name in ("warm", "fresh")
    ]
    assert betas[0] == 0.3 and steps[0] == 0 and steps[1] > 0
    # and a resumed run keeps it
    fit(
        later_model(),
        later_clicks(),
        warm_start=folder,
        run_dir=tmp_path / "warm",
        resume=True,
        **common,
    )


def test_without_a_last_checkpoint_moments_start_at_zero(folder, tmp_path):
    shutil.copy(folder / "best.pt", tmp_path / "alone.pt")
    net = later_model()
    optimizer = Adam(net.parameters())
    start = WarmStart.read(tmp_path / "alone.pt", net, LATER)
    start.load_into(net, optimizer, later_clicks())
    assert not optimizer.state
    assert str(start) == (
        f"warm start from {tmp_path / 'alone.pt'}: 35 items taken over, 3 new, 5 gone; "
        "Adam's moments start at zero, no last.pt beside it has them"
    )
    assert str(WarmStart.read(folder, net, LATER)).endswith(
        f"; Adam's moments from {folder / 'last.pt'}"
    )


def test_layers_frozen_now_or_then(folder, tmp_path):
    net = later_model()
    net.encode.q_layers.linear_1.weight.requires_grad_(False)
    fit(net, later_clicks(), epochs=1, items=LATER, warm_start=folder, run_dir=tmp_path / "a")
    old = read_checkpoint(folder / "best.pt")["model"]["encode.q_layers.linear_1.weight"]
    assert torch.equal(net.encode.q_layers.linear_1.weight, old)
    # the file does not say which of the layers its moments belong to
    assert WarmStart.read(tmp_path / "a", later_model(), LATER).moments is None


@pytest.mark.parametrize(
    ("make", "dims"),
    [
        pytest.param(MultiDAE, (8,), id="the-only-two-layers-have-items"),
        pytest.param(MultiVAE, (4, 8, 16), id="two-hidden-layers"),
    ],
)
def test_other_models(make, dims, tmp_path):
    then = make([*dims, N_ITEMS])
    fit(then, learnable()[0], epochs=1, items=IDS, run_dir=tmp_path / "a", **FAST)
    net = later_model(make, dims)
    fit(net, later_clicks(), epochs=0, items=LATER, warm_start=tmp_path / "a")
    now, before = (list(part) for part in columns())
    assert torch.equal(net.decode.output.weight[now], then.decode.output.weight[before])
    assert not net.decode.output.weight[is_new()].any()
    first, old = (m.encode.q_layers.linear_0.weight for m in (net, then))
    assert torch.equal(first[:, now], old[:, before])


def refused(tmp_path, folder, what):
    """Arguments of fit that are refused, and the message's end."""
    path = tmp_path / "x.pt"
    common = {"items": LATER, "warm_start": path}
    if what == "no ids here":
        return {**common, "items": None}, "fit: items must be given with warm_start, got None"
    if what == "no path":
        return (
            {**common, "warm_start": 3},
            "fit: warm_start must be the path of a run folder or a checkpoint, got int",
        )
    if what == "no ids there":
        write_checkpoint(path, model())
        return common, (
            f"fit: warm_start must be a checkpoint with item ids, got {path} without; fastvae convert --items gives it them"
        )
    if what == "no common item":
        write_checkpoint(path, model(), [f"other {n}" for n in range(N_ITEMS)])
        return common, f"fit: warm_start must have items of this data, got none of 38 in {path}"
    if what == "other widths":
        write_checkpoint(path, MultiVAE([8, 15, N_ITEMS]), IDS)
        return common, (
            f"fit: warm_start must have the model's p_dims [8, 16], got [8, 15] in {path}"
        )
    if what == "other quirk":
        write_checkpoint(path, MultiVAE([8, 16, N_ITEMS], tanh_after_dropout=True), IDS)
        return common, (
            f"fit: warm_start must have the model's tanh_after_dropout False, got True in {path}"
        )
    if what == "other class":
        write_checkpoint(path, MultiDAE([8, 16, N_ITEMS]), IDS)
        return common, (
            f"fit: warm_start must have the model's class MultiVAE, got MultiDAE in {path}"
        )
    if what == "other moments":
        optimizer = {"state": {n: {"exp_avg": torch.ones(3)} for n in range(8)}}
        write_checkpoint(path, model(), IDS, optimizer=optimizer)
        return common, f"fit: {path} must hold Adam's state of its weights, got something else"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        "no ids here",
        "no path",
        "no ids there",
        "no common item",
        "other widths",
        "other quirk",
        "other class",
        "other moments",
    ],
)
def test_what_is_refused(tmp_path, folder, what):
    arguments, message = refused(tmp_path, folder, what)
    with pytest.raises((TypeError, ValueError)) as error:
        fit(later_model(), later_clicks(), epochs=1, run_dir=tmp_path / "b", **arguments)
    assert str(error.value) == message
    assert not (tmp_path / "b").exists()
