"""Checkpoints: tensors and JSON only, whole or not there; whatever else lies at the path is refused in one sentence."""

import json
import os
import pickle  # noqa: TID251  hostile files are made with it
import re
import resource
import signal
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Labelled, random_clicks, run_child

from fastvae import Clicks, MultiDAE, MultiVAE, fit, load_model, recommend
from fastvae.checkpoint import read_checkpoint, write_checkpoint

ITEMS = ["b", "a", "10", "007", "ü"]


def model(seed=0):
    torch.manual_seed(seed)
    return MultiVAE([2, 4, 5])


def saved(folder, items=ITEMS):
    path = Path(folder, "model.pt")
    write_checkpoint(path, model(), items)
    return path


def rewrite(path, compression=zipfile.ZIP_STORED, **members):
    """Write the archive again with other bytes for some members, or with further ones."""
    with zipfile.ZipFile(path) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(old)).split("/")[0]
    new = {f"{top}/{name}": content for name, content in members.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (old | new).items():
            archive.writestr(name, content)


def data_pkl(path):
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


# what is kept


def test_ids_and_weights_survive_and_meta_is_json(tmp_path):
    path = saved(tmp_path, np.array(ITEMS))
    loaded, items = load_model(path)
    assert items == ITEMS and all(type(item) is str for item in items)
    assert not loaded.training and loaded.config() == model().config()
    for key, value in model().state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    parts = torch.load(path, weights_only=True)
    assert set(parts) == {"meta", "model"} and json.loads(parts["meta"])["format"] == 1
    assert load_model(saved(tmp_path, None))[1] is None
    # external ids lead through a history to external ids, index 0 included
    found = recommend(loaded, [["a"]], k=4, items=items)
    assert set(found.external()[0]) == {"b", "10", "007", "ü"}


def test_numpy_numbers_and_ids_are_stored_as_pythons_own(tmp_path, monkeypatch):
    import fastvae.trainer

    monkeypatch.setattr(fastvae.trainer, "evaluate", lambda *_, **__: {"ndcg@100": np.float64(0.3)})
    train = random_clicks([2, 3], 5)
    validation = Clicks([0, 1], [0], n_items=5), Clicks([0, 1], [1], n_items=5)
    fit(model(), train, validation, epochs=1, run_dir=tmp_path, items=np.array(ITEMS))
    for name in ("best.pt", "last.pt"):
        torch.load(tmp_path / name, weights_only=True)
    assert read_checkpoint(tmp_path / "last.pt")["best"] == [1, 0.3]
    assert load_model(tmp_path / "best.pt")[1] == ITEMS


def test_a_gpus_checkpoint_is_read_and_resumed_on_a_cpu(tmp_path):
    train = random_clicks([2, 3, 1, 4], 5)
    options = {"batch_size": 2, "total_anneal_steps": 0}
    fit(model(), train, epochs=1, run_dir=tmp_path, **options)
    for name in ("best.pt", "last.pt"):
        path = tmp_path / name
        cpu, cuda = (b"X" + len(p).to_bytes(4, "little") + p for p in (b"cpu", b"cuda:1"))
        rewrite(path, **{"data.pkl": data_pkl(path).replace(cpu, cuda)})
        assert data_pkl(path).count(b"cuda:1") == 1
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "last.pt", weights_only=True)
    assert load_model(tmp_path / "best.pt")[0].decode.output.weight.device.type == "cpu"
    resumed = model(seed=9)
    fit(resumed, train, epochs=2, run_dir=tmp_path, resume=True, **options)
    straight = model()
    fit(straight, train, epochs=2, **options)
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_str_and_path_are_the_same(tmp_path):
    write_checkpoint(str(tmp_path / "a.pt"), model(), ITEMS)
    assert load_model(str(tmp_path / "a.pt"))[1] == load_model(tmp_path / "a.pt")[1] == ITEMS


# what is refused


class Code:
    def __reduce__(self):
        return os.system, ("touch code-has-run",)


def pickle_with_code(path):
    path.write_bytes(pickle.dumps({"model": Code()}, protocol=2))


def archive_with_code(path):
    rewrite(path, **{"data.pkl": pickle.dumps({"meta": Code()}, protocol=2)})


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def path_outside(path):
    rewrite(path, **{"../../outside.pt": b"x"})


def bomb(path):
    rewrite(path, zipfile.ZIP_DEFLATED, **{"data.pkl": data_pkl(path) + bytes(10**8)})


def huge_storage(path):
    """The header of the storage and the tensor's shape promise 10**12 rows."""
    long = b"\x8a\x06" + (10**12).to_bytes(6, "little")  # a pickled integer
    five = b"K\x05"  # the items
    assert five in data_pkl(path)
    rewrite(path, **{"data.pkl": data_pkl(path).replace(five, long).replace(b"K\x14", long)})


def huge_by_stride(path):
    """10**12 rows that all are one number: torch itself reads it, and a copy would take 16 TB."""
    torch.save({"encode.q_layers.linear_0.weight": torch.zeros(1, 1).expand(10**12, 4)}, path)


def sparse(path):
    torch.save({"a": torch.sparse_coo_tensor(torch.zeros(2, 0), [], (10**9, 10**9))}, path)


def cyclic(path):
    parts = []
    parts.append(parts)
    torch.save({"model": parts}, path)


UNREADABLE = [pickle_with_code, archive_with_code, truncated, path_outside, bomb, huge_storage,
              huge_by_stride, sparse]  # fmt: skip


@pytest.mark.parametrize("damage", UNREADABLE)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_hostile_file_is_refused_in_one_sentence_without_memory(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path)
    damage(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        load_model(path)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value) == (
        f"checkpoint: {path} must be a whole checkpoint of tensors and JSON, got a file that torch cannot read so"
    )
    assert traced < 8e6 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16
    assert not Path("code-has-run").exists() and not Path("../../outside.pt").exists()


def meta(**changes):
    text = {"format": 1, "model": "MultiVAE", "config": model().config(), "items": ITEMS}
    return json.dumps(text | changes)


FOREIGN = {
    "no-model": (
        {"meta": meta()},
        "must hold a model's state_dict, got the keys 'meta'; torch.save the state_dict alone",
    ),
    "odd-keys": (
        {"a\nb": 1},
        "must hold a model's state_dict, got the keys 'a\\nb'; torch.save the state_dict alone",
    ),
    "a-list": (
        [torch.zeros(1)],
        "must hold a model's state_dict, got none; torch.save the state_dict alone",
    ),
    "no-version": (
        {"meta": "{}", "model": model().state_dict()},
        "must say its format, got a file without",
    ),
    "deep-meta": (
        {"meta": "[" * 10**5, "model": model().state_dict()},
        "must say its format, got a file without",
    ),
    "other-version": (
        {"meta": meta(format=3), "model": model().state_dict()},
        "must have format 1 or 2, got 3; use the fastvae version that wrote it",
    ),
    "no-parts": (
        {"meta": meta(format=2), "model": model().state_dict()},
        "must be whole with its folder, got another ('parts'); copy both together",
    ),
    "other-class": (
        {"meta": meta(model="os.system"), "model": model().state_dict()},
        "must fit MultiVAE or MultiDAE, got another model ('os.system')",
    ),
    "other-widths": (
        {"meta": meta(config={"p_dims": [2, 4, 10**12], "q_dims": [10**12, 4, 2]}), "model": model().state_dict()},
        "must fit MultiVAE or MultiDAE, got another model "
        "(encode.q_layers.linear_0.weight is [4, 5], not [4, 1000000000000])",
    ),
    "many-layers": (
        {"meta": meta(config={"p_dims": [1] * 10**5, "q_dims": [1] * 10**5}), "model": model().state_dict()},
        "must fit MultiVAE or MultiDAE, got another model (another number of layers)",
    ),
    "other-keys": (
        {"fc1.weight": torch.zeros(2, 2)},
        "must fit MultiVAE or MultiDAE, got another model (keys of none of fastvae or RecoTour, vae-cf-pytorch, "
        "RecBole, rectorch, Cornac, WarpRec, RePlay, RecPack, the paper's TensorFlow code, such as 'fc1.weight')",
    ),
    "few-ids": (
        {"meta": meta(items=["a"]), "model": model().state_dict()},
        "must fit MultiVAE or MultiDAE, got another model (1 item ids for 5 items)",
    ),
    "ids-twice": (
        {"meta": meta(items=["a", "b", "a", "c", "b"]), "model": model().state_dict()},
        "must fit MultiVAE or MultiDAE, got another model (the item id 'a' twice)",
    ),
    "empty-ids": (
        {"meta": meta(items=["a", "b", " ", "c", "d"]), "model": model().state_dict()},
        "must fit MultiVAE or MultiDAE, got another model (an empty item id)",
    ),
    "odd-ids": (
        {"meta": meta(items=[1, 2, 3, 4, 5]), "model": model().state_dict()},
        "must fit MultiVAE or MultiDAE, got another model (item ids that are no text)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_in_one_sentence(tmp_path, name):
    parts, reason = FOREIGN[name]
    path = tmp_path / "model.pt"
    torch.save(parts, path)
    with pytest.raises(ValueError) as caught:
        load_model(path)
    assert str(caught.value) == f"checkpoint: {path} {reason}"


def test_a_list_in_itself_is_refused(tmp_path):
    cyclic(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="must hold a model's state_dict, got the keys 'model'; "):
        load_model(tmp_path / "model.pt")


def test_a_path_without_a_file_says_who_writes_one(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(ValueError) as caught:
            load_model(path)
        assert str(caught.value) == (
            f"checkpoint: path must be a file, got {path}; fastvae train writes best.pt into its run folder"
        )


def test_a_plain_state_dict_of_either_model_is_inferred(tmp_path):
    for make in (MultiVAE, MultiDAE):
        net = make([2, 4, 5])
        torch.save(net.state_dict(), tmp_path / "theirs.pt")
        loaded, items = load_model(tmp_path / "theirs.pt")
        assert type(loaded) is make and loaded.p_dims == [2, 4, 5] and items is None
        clicks = Clicks([0, 2], [0, 3], n_items=5)
        ours, theirs = (
            out[0] if make is MultiVAE else out for out in (loaded(clicks), net.eval()(clicks))
        )
        assert torch.equal(ours, theirs)


def test_a_state_dict_in_torchs_old_format_is_read(tmp_path):
    torch.save(model().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    loaded, _ = load_model(tmp_path / "old.pt")
    assert torch.equal(loaded.decode.output.weight, model().decode.output.weight)


# a resume from what is not a run


def test_a_bare_state_dict_is_read_with_the_quirk_that_is_asked_for(tmp_path):
    torch.manual_seed(0)
    quirky = MultiVAE([2, 4, 5], tanh_after_dropout=True).eval()
    torch.save(quirky.state_dict(), tmp_path / "m.pt")
    x = random_clicks([2, 3], 5)
    for quirk in (True, False):
        loaded, _ = load_model(tmp_path / "m.pt", tanh_after_dropout=quirk)
        assert loaded.config()["tanh_after_dropout"] is quirk
        assert torch.equal(loaded(x)[0], quirky(x)[0]) is quirk


@pytest.mark.parametrize("options", [{"normalize_input": False}, {"activation": "relu"}])
def test_the_models_options_come_back(tmp_path, options):
    net = MultiDAE([2, 4, 5], **options).eval()
    write_checkpoint(tmp_path / "m.pt", net)
    loaded, _ = load_model(tmp_path / "m.pt")
    x = random_clicks([2, 3], 5)
    assert loaded.config() == net.config() and torch.equal(loaded(x), net(x))


def test_a_checkpoint_from_before_the_options_is_read_as_it_was(tmp_path):
    config = {
        k: v for k, v in model().config().items() if k not in ("normalize_input", "activation")
    }
    torch.save({"meta": meta(config=config), "model": model().state_dict()}, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt")[0].config() == model().config()


def test_layers_are_counted_as_numbers(tmp_path):
    deep = MultiDAE([2, *range(3, 15), 5])
    torch.save(deep.state_dict(), tmp_path / "m.pt")
    loaded, _ = load_model(tmp_path / "m.pt")
    assert loaded.p_dims == deep.p_dims and loaded.q_dims == deep.q_dims


def test_item_ids_that_are_numbers_are_kept_as_text(tmp_path):
    assert load_model(saved(tmp_path, [10, 20, 30, 40, 50]))[1] == ["10", "20", "30", "40", "50"]


def test_item_ids_go_by_their_position_and_need_one(tmp_path):
    assert load_model(saved(tmp_path, Labelled(list("edcba"))))[1] == list("edcba")
    for ids, got in (({"a": 1, "b": 0}, "dict"), (set("abcde"), "set"), ("abcde", "str")):
        with pytest.raises(
            TypeError, match=rf"^checkpoint: items must be ids .* got {got}; pass a"
        ):
            saved(tmp_path, ids)


def test_sparse_weights_are_refused(tmp_path):
    weights = model().state_dict()
    key = "decode.p_layers.linear_1.weight"
    torch.save({**weights, key: weights[key].to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="must be a whole checkpoint of tensors and JSON"):
        load_model(tmp_path / "m.pt")


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
    content = bytearray(path.read_bytes())
    weight = model().encode.q_layers.layer(0).weight.detach().t().contiguous()
    first = content.index(weight.numpy().tobytes()[:4], member.header_offset)
    content[first + 3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole checkpoint of tensors and JSON"):
        load_model(path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    torch.save(
        {key: value.to(dtype) for key, value in model().state_dict().items()}, tmp_path / "m.pt"
    )
    with pytest.raises(ValueError, match="weights that are no floating point numbers"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_the_state_dict_of_a_wrapped_model_is_read(tmp_path, prefix):
    torch.save(
        {prefix + key: value for key, value in model().state_dict().items()}, tmp_path / "m.pt"
    )
    loaded, _ = load_model(tmp_path / "m.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model().parameters(), strict=True)
    )


def test_the_state_dict_of_a_compiled_model_is_read(tmp_path):
    torch.save(torch.compile(model()).state_dict(), tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt")[0].config() == model().config()


def run(folder):
    fit(model(), random_clicks([2, 3], 5), epochs=1, run_dir=folder, items=ITEMS)
    return folder


def resume(folder, items=ITEMS):
    fit(model(), random_clicks([2, 3], 5), epochs=2, run_dir=folder, resume=True, items=items)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "[" * 10**5, "\xff", " " * 2**21], ids=lambda c: repr(c[:3])
)
def test_a_broken_config_is_refused_in_one_sentence(tmp_path, content):
    path = run(tmp_path) / "config.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError) as caught:
        resume(tmp_path)
    assert str(caught.value) == (
        f"run: {path} must be a run's settings in JSON, got something else; put the file back, or train anew "
        "in another folder"
    )


def test_a_hostile_last_checkpoint_is_refused_in_one_sentence(tmp_path):
    path = run(tmp_path) / "last.pt"
    whole = path.read_bytes()
    for damage in (pickle_with_code, truncated, path_outside):
        path.write_bytes(whole)
        damage(path)
        with pytest.raises(ValueError, match=re.escape(f"checkpoint: {path} must be a whole")):
            resume(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": None}, r"'NoneType' object"),
        ({"position": [1]}, "not enough values to unpack"),
        ({"position": ["a", 0, 0]}, "invalid literal for int()"),
        ({"sums": torch.zeros(9)}, "The size of tensor a"),
        ({"history": "{"}, "Expecting property name"),
        ({"best": None}, "cannot unpack non-iterable NoneType"),
        ({"model": {"a": torch.zeros(1)}}, "Error"),
    ],
)
def test_a_last_checkpoint_of_something_else_is_refused_in_one_sentence(tmp_path, change, reason):
    path = run(tmp_path) / "last.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(ValueError) as caught:
        resume(tmp_path)
    start = f"fit: {path} must hold the state of this run, got another file ("
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    assert reason in str(caught.value)


def test_moments_of_another_shape_are_refused(tmp_path):
    path = run(tmp_path) / "last.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3, 3)
    torch.save(state, path)
    with pytest.raises(ValueError) as caught:
        resume(tmp_path)
    assert str(caught.value) == (
        f"fit: {path} must hold the state of this run, got another file "
        "(Adam: exp_avg must have its weight's shape [4], got [3, 3])"
    )


def test_a_model_for_a_last_checkpoint_is_refused(tmp_path):
    path = run(tmp_path) / "last.pt"
    write_checkpoint(path, model(), ITEMS)
    with pytest.raises(ValueError) as caught:
        resume(tmp_path)
    assert str(caught.value) == (
        f"fit: {path} must hold the state of this run, got another file ('optimizer')"
    )


def test_items_in_another_order_are_not_resumed(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError) as caught:
        resume(tmp_path, items=["b", "10", "a", "007", "ü"])
    assert str(caught.value) == (
        "fit: items must be those of the run to resume, in its order, got '10' for 'a' at position 1; "
        "pass the data of that run"
    )
    resume(tmp_path)


# a full disk


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_checkpoint_and_names_the_file(tmp_path, monkeypatch, call):
    path = saved(tmp_path)
    whole = path.read_bytes()
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError) as caught:
        write_checkpoint(path, model(1), ITEMS)
    assert str(caught.value) == f"[Errno 28] No space left on device: '{path}'"
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit of the file size")
def test_a_disk_that_ends_in_the_middle_of_a_write_is_reported_as_such(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    done = run_child("small_disk.py", path)
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n", done.stderr
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["model.pt"]
