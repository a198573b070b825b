"""Weights of other code: recognised by their keys, and the logits stay what that code computed."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_clicks
from torch import nn

from bench import other_nets as nets
from fastvae import MultiDAE, MultiVAE, load_model
from fastvae.checkpoint import write_checkpoint
from fastvae.convert import SOURCES, Source, converted

N_ITEMS = 12
DEPTHS = {"one-hidden": [N_ITEMS, 8, 4], "two-hidden": [N_ITEMS, 9, 6, 4]}
NETS = [nets.RecoTour, nets.VaeCf, nets.RecBole, nets.Rectorch, nets.Cornac, nets.WarpRec, nets.RePlay,
        nets.RecPack, nets.Paper]  # fmt: skip
CASES = [
    pytest.param(make, vae, dims, id=f"{make.__name__}-{'VAE' if vae else 'DAE'}-{depth}")
    for make in NETS
    for vae in (True, False)
    for depth, dims in DEPTHS.items()
    if (vae or make in nets.DAES) and not (make in nets.ONE_DEPTH and len(dims) > 3)
]
NAMES = {
    nets.RecoTour: "fastvae or RecoTour", nets.VaeCf: "vae-cf-pytorch", nets.Rectorch: "rectorch",
    nets.Paper: "the paper's TensorFlow code",
}  # fmt: skip


def net(make, vae=True, dims=DEPTHS["one-hidden"], **options):
    torch.manual_seed(0)
    dims = [dims[0] + (make is nets.RecBole), *dims[1:]]
    made = make(dims, vae, **options).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.7)  # biases that matter
    return made


def x_of(make, n_items=N_ITEMS):
    """Clicks, and what the net takes of them."""
    clicks = random_clicks([3, 0, 7, n_items], n_items, counts=True)
    x = clicks.to_dense()
    return clicks, torch.nn.functional.pad(x, (1, 0)) if make is nets.RecBole else x


def save(path, made, prefix="", wrap=lambda state: state):
    state = {f"{prefix}{key}": value for key, value in made.state_dict().items()}
    if isinstance(made, nets.Paper):
        np.savez(path, **{key: value.numpy() for key, value in made.variables.items()})
    else:
        torch.save(wrap(state), path)


def assert_same_logits(made, model, make):
    clicks, x = x_of(make)
    theirs = made(x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    theirs = theirs[:, 1:] if make is nets.RecBole else theirs
    for ours in (model(clicks), model(clicks.to_dense())):
        ours = ours[0] if isinstance(ours, tuple) else ours
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize(("make", "vae", "dims"), CASES)
def test_logits_are_those_of_the_source(tmp_path, capsys, make, vae, dims):
    made = net(make, vae, dims)
    path = tmp_path / ("weights.npz" if make is nets.Paper else "weights.pt")
    save(path, made)
    model, items = load_model(path, tanh_after_dropout=make is nets.RecoTour, verbose=True)
    assert type(model) is (MultiVAE if vae else MultiDAE) and items is None and not model.training
    assert model.q_dims == dims and model.p_dims == dims[::-1]
    assert_same_logits(made, model, make)
    said = capsys.readouterr().err
    widths = "-".join(map(str, [*dims, *dims[-2::-1]]))
    name = NAMES.get(make, make.__name__)
    assert said.startswith(f"{path}: {type(model).__name__} of {name}, widths {widths}")
    assert ("its item 0, which is padding, is left out" in said) is (make is nets.RecBole)


def test_every_source_is_among_the_cases():
    names = {NAMES.get(make, make.__name__) for make in NETS}
    assert names == {source.name for source in SOURCES}


def test_what_keys_do_not_say_is_asked_until_it_is_said(tmp_path, capsys):
    save(tmp_path / "a.pt", net(nets.RecoTour))
    save(tmp_path / "b.pt", net(nets.Cornac))
    for name, options, ending in (
        ("a.pt", {}, "RecoTour's own forward needs tanh_after_dropout=True"),
        ("a.pt", {"tanh_after_dropout": True}, "widths 12-8-4-8-12; tanh after each dropout"),
        ("b.pt", {}, "no other than it and tanh has an equal here"),
        ("b.pt", {"activation": "relu"}, "activation 'relu'; input not normalised"),
    ):
        load_model(tmp_path / name, verbose=True, **options)
        assert capsys.readouterr().err.strip().endswith(ending)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.module.", "model.", "model._orig_mod.vae."]
)
@pytest.mark.parametrize("make", [nets.VaeCf, nets.RecBole])
@pytest.mark.parametrize("vae", [True, False])
def test_whatever_stands_in_front_of_all_keys_is_dropped(tmp_path, make, vae, prefix):
    made = net(make, vae)
    save(tmp_path / "w.pt", made, prefix)
    assert_same_logits(made, load_model(tmp_path / "w.pt")[0], make)


def test_weights_beside_a_trainers_state_and_an_average_are_found(tmp_path):
    made = net(nets.Rectorch)
    save(tmp_path / "w.pt", made, wrap=lambda state: {"epoch": 3, "state_dict": state})
    assert_same_logits(made, load_model(tmp_path / "w.pt")[0], nets.Rectorch)
    average = torch.optim.swa_utils.AveragedModel(made)
    torch.save(average.state_dict(), tmp_path / "w.pt")
    assert_same_logits(made, load_model(tmp_path / "w.pt")[0], nets.Rectorch)


@pytest.mark.parametrize(
    "keys", [["model"], ["model_state_dict"], ["net"], ["state_dict", "model"]]
)
def test_weights_in_a_trainers_dictionary_are_found(tmp_path, keys):
    def wrap(state):
        for key in reversed(keys):
            state = {"epoch": 3, "optimizer": {"state": {}}, key: state}
        return state

    made = net(nets.VaeCf)
    save(tmp_path / "old.pt", made, wrap=wrap)
    assert_same_logits(made, load_model(tmp_path / "old.pt")[0], nets.VaeCf)


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="must hold a model's state_dict, got the keys 'model'"):
        load_model(tmp_path / "old.pt")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e39])
def test_weights_that_are_not_finite_in_float32_are_refused(tmp_path, wrong):
    made = net(nets.VaeCf).double()
    made.p_layers[0].bias.data[1] = wrong
    save(tmp_path / "old.pt", made)
    with pytest.raises(
        ValueError, match=r"must hold finite float32 weights, got nan or inf in decode\."
    ):
        load_model(tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [("tanh_after_dropout", False, True), ("activation", "relu", "tanh"), ("normalize_input", False, True)],
)  # fmt: skip
def test_an_option_that_a_checkpoint_of_ours_contradicts_is_refused(tmp_path, name, own, other):
    """It was left unheard: other scores than those that were asked for."""
    path = tmp_path / "own.pt"
    write_checkpoint(path, MultiVAE([2, 3, 4], **{name: own}))
    assert getattr(load_model(path, **{name: own})[0], name) == own
    with pytest.raises(
        ValueError, match=f"checkpoint: {name} must be {own!r}, which .* says, got {other!r}"
    ):
        load_model(path, **{name: other})


def test_the_quirk_is_true_or_false(tmp_path):
    """A text counted as true: load_model(path, "relu")."""
    save(tmp_path / "old.pt", net(nets.VaeCf))
    with pytest.raises(
        TypeError, match="checkpoint: tanh_after_dropout must be True or False, got 'relu'"
    ):
        load_model(tmp_path / "old.pt", "relu")
    with pytest.raises(
        TypeError, match="MultiVAE: tanh_after_dropout must be True or False, got 'no'"
    ):
        MultiVAE([2, 3, 4], tanh_after_dropout="no")


def test_weights_with_two_names_each_are_read_though_the_file_holds_them_once(tmp_path):
    made = net(nets.RecPack, dims=[300, 40, 8])
    save(tmp_path / "w.pt", made)
    named = sum(value.nbytes for value in made.state_dict().values())
    assert named > 1.5 * (tmp_path / "w.pt").stat().st_size
    clicks, x = x_of(nets.RecPack, 300)
    torch.testing.assert_close(load_model(tmp_path / "w.pt")[0](clicks)[0], made(x))


def test_a_tensorflow_checkpoints_other_variables_are_left_out(tmp_path):
    made = net(nets.Paper)
    values = {key.removesuffix(":0"): value.numpy() for key, value in made.variables.items()}
    slots = {f"{key}/Adam{n}": value for key, value in values.items() for n in ("", "_1")}
    powers = {"beta1_power": np.float32(0.9), "beta2_power": np.float32(0.99)}
    np.savez(tmp_path / "w.npz", **values, **slots, **powers)
    assert_same_logits(made, load_model(tmp_path / "w.npz")[0], nets.Paper)


def test_an_activation_that_the_keys_do_not_say_is_an_argument(tmp_path):
    made = net(nets.Cornac, act=nn.ReLU)
    save(tmp_path / "w.pt", made)
    model, _ = load_model(tmp_path / "w.pt", activation="relu")
    assert_same_logits(made, model, nets.Cornac)
    ours = MultiDAE([4, N_ITEMS], normalize_input=False, activation="relu").eval()
    torch.save(ours.state_dict(), tmp_path / "w.pt")
    again, _ = load_model(tmp_path / "w.pt", activation="relu", normalize_input=False)
    assert torch.equal(again(x_of(None)[0]), ours(x_of(None)[0]))
    for option, message in (
        ({"activation": "elu"}, "checkpoint: activation must be one of tanh, relu, got 'elu'"),
        ({"normalize_input": 1}, "checkpoint: normalize_input must be True or False, got 1"),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            load_model(tmp_path / "w.pt", **option)
        assert str(caught.value) == message


NO_SOURCES_KEYS = {
    "missing": "keys of vae-cf-pytorch without 'layers.1.bias'",
    "further": "keys of vae-cf-pytorch, and further ones: 'head.weight'",
    "half": "keys of vae-cf-pytorch, but not all of its layers, such as 'q_layers.0.weight'",
    "none": "keys of none of fastvae or RecoTour, .* such as 'a', 'b'",
    "many": "keys of none of .* such as 'a0', 'a1', 'a2'$",
    "another shape": "weights of shapes",
    "one layer": "a single layer",
}


@pytest.mark.parametrize("change", NO_SOURCES_KEYS)
def test_keys_that_are_not_all_a_sources_are_refused(change):
    state = dict(net(nets.VaeCf, vae=False).state_dict())
    if change == "missing":
        del state["layers.1.bias"]
    elif change == "further":
        state["head.weight"] = torch.zeros(2, 2)
    elif change == "half":
        whole = net(nets.VaeCf).state_dict().items()
        state = {key: value for key, value in whole if key.startswith("q_")}
    elif change == "none":
        state = {"a": torch.zeros(2, 2), "b": torch.zeros(2)}
    elif change == "many":
        state = {f"a{n}": torch.zeros(1) for n in range(20_000)}
    elif change == "one layer":
        state = {key: value for key, value in state.items() if ".0." in key}
    else:
        state["layers.1.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=NO_SOURCES_KEYS[change]):
        converted(state)


def test_our_state_dict_is_recotours(tmp_path):
    """And back: their module takes our weights, key by key."""
    for make in (MultiVAE, MultiDAE):
        model = make(DEPTHS["two-hidden"][::-1], tanh_after_dropout=True).eval()
        theirs = nets.RecoTour(DEPTHS["two-hidden"], make is MultiVAE).eval()
        theirs.load_state_dict(model.state_dict(), strict=True)
        assert_same_logits(theirs, model, nets.RecoTour)


def pickled(tmp_path, name, save):
    """A file that save(module of that name, its path) writes, where the module cannot be imported any more."""
    module = types.ModuleType(name)
    module.Net = type("Net", (nn.Linear,), {"__module__": name})
    sys.modules[name] = module
    try:
        save(module, tmp_path / "old.pt")
    finally:
        del sys.modules[name]


def test_a_pickled_module_is_refused_with_the_line_that_helps(tmp_path, monkeypatch):
    name = "theirs_models"
    pickled(tmp_path, name, lambda module, path: torch.save(module.Net(2, 2), path))
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "old.pt")
    text = str(caught.value)
    assert text.startswith(
        f"checkpoint: {tmp_path / 'old.pt'} must hold tensors and JSON, got a pickle of {name}.Net, which would run "
        "code; where you trust it and have that code, run: python -c "
    )
    # the line, where that code is
    (tmp_path / f"{name}.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    code = re.fullmatch(r'.* run: python -c "(.*)"', text)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(code, {})
    del sys.modules[name]
    written = torch.load(Path(tmp_path, "weights.pt"), weights_only=True)
    assert set(written) == {"weight", "bias"}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_line_for_cornacs_pickle_takes_its_network(tmp_path, protocol):
    import pickle  # noqa: TID251  as Cornac saves, by protocol 5

    pickled(
        tmp_path,
        "cornac",
        lambda module, path: path.write_bytes(pickle.dumps(module.Net(2, 2), protocol)),
    )
    with pytest.raises(
        ValueError, match=r"cornac\.Net.*m = pickle\.load\(.*m\.vae\.state_dict\(\)"
    ):
        load_model(tmp_path / "old.pt")


@pytest.mark.parametrize("bare", [True, False])
def test_a_trainers_pickle_of_protocol_4_is_refused_with_the_line_too(
    tmp_path, monkeypatch, recwarn, bare
):
    """RecBole's checkpoints: torch's safe reader does not get as far as what they name."""
    import pickle  # noqa: TID251  as other code saves

    def write(module, path):
        content = {"config": module.Net(2, 2), "state_dict": {"weight": torch.ones(2)}}
        if bare:
            path.write_bytes(pickle.dumps(content, 4))
        else:
            torch.save(content, path, pickle_protocol=4)

    pickled(tmp_path, "theirs_config", write)
    with pytest.raises(ValueError, match=r"got a pickle of theirs_config\.Net, which") as caught:
        load_model(tmp_path / "old.pt")
    assert not recwarn.list  # of torch's own, about the protocol
    (tmp_path / "theirs_config.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(re.fullmatch(r'.* run: python -c "(.*)"', str(caught.value))[1], {})
    del sys.modules["theirs_config"]
    assert set(torch.load(tmp_path / "weights.pt", weights_only=True)) == {"weight"}


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_begins_with_the_systems_own_is_left_unnamed(tmp_path, protocol):
    import pickle  # noqa: TID251  as an attacker saves

    class Harm:
        def __reduce__(self):
            return eval, ("1",)

    (tmp_path / "old.pt").write_bytes(pickle.dumps([Harm(), torch.ones(2)], protocol))
    with pytest.raises(ValueError, match=r"got a file that torch cannot read so$"):
        load_model(tmp_path / "old.pt")


@pytest.mark.parametrize("kind", ["objects", "integers", "compressed", "huge"])
def test_an_npz_that_is_not_plain_numbers_is_refused(tmp_path, kind):
    path, arrays = tmp_path / "w.npz", {k: v.numpy() for k, v in net(nets.Paper).variables.items()}
    if kind == "objects":
        np.savez(path, **arrays | {"bias_q_1:0": np.array([None] * 8)})
    elif kind == "integers":
        np.savez(path, **arrays | {"bias_q_1:0": np.zeros(8, int)})
    elif kind == "compressed":
        np.savez_compressed(path, **arrays)
    else:
        np.savez(path, **arrays)
        content = path.read_bytes()
        path.write_bytes(
            content.replace(b"'shape': (8,), }" + b" " * 8, b"'shape': (8000000000,),}")
        )
    expected = r"^checkpoint: .*w\.npz must " + ".*; np.savez writes" * (kind != "integers")
    with pytest.raises(ValueError, match=expected):
        load_model(path)


def test_safetensors_files_are_refused_with_what_helps(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(ValueError, match=r"got safetensors' format; torch\.save\(safetensors\."):
        load_model(tmp_path / "w.safetensors")


@pytest.fixture
def run(monkeypatch, capsys):
    """A command in this process: what it leaves on stdout and stderr."""
    from fastvae import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastvae", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            assert end.code in (0, 2)
        return capsys.readouterr()

    return call


def test_the_command_writes_a_checkpoint_with_ids_and_says_what_it_recognised(tmp_path, run):
    made = net(nets.RecBole)
    save(tmp_path / "old.pt", made)
    ids = [f"film {n}" for n in range(N_ITEMS)]
    for first in ([], ["[PAD]"]):
        (tmp_path / "ids.txt").write_text("\n".join([*first, *ids]))
        said = run(
            "convert", tmp_path / "old.pt", tmp_path / "new.pt", "--items", tmp_path / "ids.txt"
        )
        assert "MultiVAE of RecBole, widths 12-8-4-8-12" in said.err and "wrote " in said.out
        model, items = load_model(tmp_path / "new.pt")
        assert items == ids
        assert_same_logits(made, model, nets.RecBole)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (["--tanh-after-dropout"], {"tanh_after_dropout": True}),
        (["--activation", "relu"], {"activation": "relu"}),
        (["--no-normalize-input"], {"normalize_input": False}),
    ],
)
def test_the_commands_options_reach_the_model(tmp_path, run, options, config):
    save(tmp_path / "old.pt", net(nets.RecoTour))
    assert "without ids" in run("convert", tmp_path / "old.pt", tmp_path / "new.pt", *options).out
    assert load_model(tmp_path / "new.pt")[0].config().items() >= config.items()


def test_what_the_command_refuses(tmp_path, run):
    old, ids = tmp_path / "old.pt", tmp_path / "ids.txt"
    save(old, net(nets.RecoTour))
    said = run("convert", old, old).err
    assert "convert: new must be another file than the old, got" in said
    ids.write_text("a\nb\n")
    said = run("convert", old, tmp_path / "new.pt", "--items", ids).err
    assert "convert: --items must hold 12 ids, got 2" in said
    said = run("convert", old, tmp_path / "new.pt", "--items", tmp_path / "none.txt").err
    assert "convert: --items must be a file of ids, one a line, got nothing at" in said
    ids.write_text("\n".join(["a", "", *"cdefghijkl"]))
    said = run("convert", old, tmp_path / "new.pt", "--items", ids).err
    assert "convert: --items must hold ids that are not empty, got '' at position 1" in said
    assert not (tmp_path / "new.pt").exists()
    said = run("convert", old, tmp_path).err
    assert f"convert: new must be a file, got a folder or a device, {tmp_path}" in " ".join(
        said.split()
    )
    said = run("convert", old, tmp_path / "none" / "new.pt").err
    assert "convert: new must lie in an existing folder, got" in said


def test_ids_are_whole_lines(tmp_path, run):
    """A mark of the byte order and empty lines at the end are no ids; U+2028 within an id does not end it."""
    save(tmp_path / "old.pt", net(nets.RecoTour))
    ids = ["a\u2028b", *map(str, range(N_ITEMS - 1))]
    text = "\ufeff" + "\r\n".join(ids) + "\r\n\r\n"
    (tmp_path / "ids.txt").write_bytes(text.encode())
    run("convert", tmp_path / "old.pt", tmp_path / "new.pt", "--items", tmp_path / "ids.txt")
    assert load_model(tmp_path / "new.pt")[1] == ids


def test_a_source_is_a_row():
    """What the documentation promises: a new source needs no other code."""
    from fastvae import convert

    row = Source("mine", (convert._layers("up.{n}"),), (convert._layers("down.{n}"),))
    state = {key.replace("enc_layers", "up").replace("dec_layers", "down"): value
             for key, value in net(nets.Rectorch).state_dict().items()}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "SOURCES", (*SOURCES, row))
        assert str(converted(state)) == "MultiVAE of mine, widths 12-8-4-8-12"
