"""fit, evaluate and recommend by one to four gloo processes, by users and by items: the numbers of one process, whatever is cut."""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import random_clicks
from parallel_cases import (
    CLIP,
    CUTS,
    FIT,
    GOES_ON,
    MANY,
    MODELS,
    SIZES,
    begun_with,
    draw_nothing,
    few_items,
    lists,
    of_many,
    process,
    started,
    step_of,
    tied_items,
    trained,
    with_ties,
    written,
)
from training import IDS, N_ITEMS, learnable, model

import fastvae
from fastvae import evaluate, fit, recommend
from fastvae._parallel_scores import RangeScorer
from fastvae.checkpoint import load_model, read_checkpoint, write_checkpoint
from fastvae.parallel import Processes
from fastvae.ranking import BlockScorer
from fastvae.run_folder import RunFolder, read_config

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
EACH = pytest.mark.parametrize(("cut", "size"), list(itertools.product(CUTS, SIZES)))


@pytest.fixture(scope="module", autouse=True)
def no_curve():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw_curve", draw_nothing)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of four processes found, in groups of one to four of them."""
    return started(process, folder, max(SIZES))


@pytest.fixture(scope="module")
def many(ranks, folder):
    """What each of more processes found."""
    return started(of_many, folder, MANY)


@pytest.fixture(scope="module")
def alone(folder):
    return {kind: trained(kind, folder / f"{kind}-alone") for kind in MODELS}


@pytest.fixture(scope="module")
def longer():
    """What one process has after two epochs more, without a break."""
    return {kind: trained(kind, None, epochs=7) for kind in MODELS}


def assert_close(a, b, rtol):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert (value - b[key]).norm() <= rtol * b[key].norm(), key


@EACH
@pytest.mark.parametrize("kind", MODELS)
def test_training_gives_the_numbers_of_one_process(ranks, alone, kind, cut, size):
    expected = alone[kind]
    for rank in range(size):
        found = ranks[rank][kind, cut, size]
        assert found["best"] == expected["best"]
        assert_close(found["weights"], expected["weights"], 1e-5)
        for row, other in zip(found["history"], expected["history"], strict=True):
            for name in ("loss", "nll", "kld", "ndcg@100"):
                assert row[name] == pytest.approx(other[name], rel=1e-5), name
        # process 0 alone calls back
        assert found["called"] == (5 if rank == 0 else 0)
        # weights that all hold are the same bits
        assert all(
            torch.equal(value, ranks[0][kind, cut, size]["weights"][key])
            for key, value in found["weights"].items()
        )


@EACH
def test_metrics_are_those_of_one_process(ranks, cut, size):
    _, validation = learnable()
    for rank, kind in itertools.product(range(size), MODELS):
        found = ranks[rank][kind, cut, size]
        net = model(make=MODELS[kind])
        net.load_state_dict(found["weights"])
        expected = evaluate(net, *validation, [*found["metrics"]])
        assert found["metrics"] == pytest.approx(expected.mean, abs=1e-12)
        for name, values in found["values"].items():
            assert values == pytest.approx(expected.values[name], abs=1e-12)


@EACH
def test_a_gradient_of_every_weight_is_that_of_one_process(ranks, cut, size):
    batch = learnable()[0].rows([5, 7, 2, 2, 90])
    expected, terms = step_of(None, None, batch)
    for rank in range(size):
        gradients, found, _ = ranks[rank]["step", cut, size]
        torch.testing.assert_close(found, terms, rtol=1e-6, atol=0)
        assert_close(gradients, expected, 1e-5)


@pytest.fixture(scope="module")
def few_alone():
    """By clip_grad_norm."""
    return {max_norm: few_items(max_norm) for max_norm in (None, CLIP)}


@EACH
def test_gradients_are_clipped_by_the_norm_of_all(ranks, few_alone, cut, size):
    batch = learnable()[0].rows([5, 7, 2, 2, 90])
    expected, _ = step_of(None, None, batch, CLIP)
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert norm == pytest.approx(CLIP, rel=1e-4)
    name = "decode.p_layers.linear_1.weight"
    assert not torch.allclose(few_alone[CLIP][name], few_alone[None][name], rtol=1e-3)
    for rank in range(size):
        assert_close(ranks[rank]["clipped", cut, size][0], expected, 1e-5)
        assert_close(ranks[rank]["clipped fit", cut, size], few_alone[CLIP], 1e-5)


@pytest.fixture(scope="module")
def begun(ranks, folder):
    return begun_with(folder / "vae-parts-3")


@EACH
def test_a_warm_start_takes_over_what_one_process_does(ranks, begun, cut, size):
    for rank in range(size):
        assert_close(ranks[rank]["warm", cut, size], begun, 1e-5)


@EACH
def test_what_is_sent_is_what_the_formula_says(ranks, cut, size):
    sent = ranks[0]["step", cut, size][2]
    net = model()
    n_users, n_hidden = 5, net.p_dims[1]
    if cut == "items":
        # first layer and dhidden 4 B H each, k 4 B, S and T 8 B
        assert sorted(sent) == sorted([4 * n_users * n_hidden] * 2 + [4 * n_users, 8 * n_users])
    else:
        # nll and kld, fp64, and the gradients
        assert sum(sent) == 16 + sum(4 * p.numel() for p in net.parameters())


@EACH
def test_more_processes_than_items(ranks, few_alone, cut, size):
    for rank in range(size):
        assert_close(ranks[rank]["few", cut, size], few_alone[None], 1e-5)


@EACH
def test_ties_and_fewer_users_than_processes(ranks, cut, size):
    expected = tied_items()
    for rank in range(size):
        assert ranks[rank]["tied", cut, size] == expected


def test_a_model_of_another_kind_is_shared_by_users(ranks):
    for rank in ranks:
        one, shared = rank["ties"]
        assert shared == one


@pytest.fixture(scope="module")
def lists_alone():
    return lists()


@EACH
def test_lists_are_those_of_one_process_to_the_bit(ranks, lists_alone, cut, size):
    for rank in range(size):
        found = ranks[rank]["lists", cut, size]
        assert found.keys() == lists_alone.keys()
        for key, (items, scores) in lists_alone.items():
            assert torch.equal(found[key][0], items), key
            assert torch.equal(found[key][1], scores), key


def test_the_lists_that_are_compared_have_ties_and_short_ones(lists_alone):
    items, scores = lists_alone["none", 3]
    assert (scores[:, 1:] == scores[:, :-1]).any()
    assert (items < 0).any() and (items >= 20).any()


@EACH
def test_the_file_is_that_of_one_process(ranks, folder, cut, size):
    expected = written(folder / "top.csv")
    assert all(ranks[rank]["written", cut, size] == expected for rank in range(size))
    found = folder / f"top-{cut}-{size}.csv"
    assert found.read_bytes() == (folder / "top.csv").read_bytes()


def test_where_one_process_fails_to_score_or_to_write_all_raise_it(ranks):
    nan = (
        "ValueError: recommend: model must give finite scores, got nan or inf for 1 of users 0..4, first for user 0; "
        "load a checkpoint from before the loss diverged"
    )
    by_items = (
        "parallel must be 'users' for a model that is not a MultiVAE or MultiDAE with a plain last layer, "
        "got 'items' for NanOf"
    )
    for rank in ranks:
        assert rank["errors of lists"] == [
            "ValueError: write_recommendations: path must end in .csv, .jsonl or .parquet, got 'top.txt'",
            "OSError: no space left at block 1",
            "OSError: no space left at the end",
            "ValueError: block must be made, got 1",
            nan,
            f"ValueError: recommend: {by_items}",
            f"ValueError: evaluate: {by_items}",
            4,
        ]


def test_each_process_scores_its_users_alone(ranks):
    assert [rank["rows"] for rank in ranks] == [20] * 4


def test_what_one_process_is_given_otherwise_all_refuse(ranks, folder):
    told = ranks[0]["other arguments"]
    assert all(rank["other arguments"] == told for rank in ranks[1:])
    names = [re.match("[A-Za-z]+: ([a-z]+: [a-z_ ]+) must", text)[1] for text in told]
    assert names == [
        "fit: batch_size", "fit: epochs", "fit: seed", "fit: precision", "fit: validation", "fit: train", "fit: parallel",
        "fit: run_dir", "fit: items", "fit: checkpoint_bytes", "fit: on_epoch", "fit: lr",
        "evaluate: metrics", "evaluate: fold_in and held_out", "evaluate: model", "evaluate: metrics",
        "recommend: k", "recommend: histories", "recommend: allowed or exclude", "recommend: k",
    ]  # fmt: skip
    assert told[0] == (
        "ValueError: fit: batch_size must be the same in all processes, got 49 in process 1 and 50 in process 0; "
        "call it with the same arguments in all of them"
    )
    assert "got 2 in process 2 and 1 in process 0" in told[1]
    assert told[11] == "ValueError: fit: lr must be a finite number above 0, got -1"
    assert not (folder / "of one").exists()


def test_who_is_not_in_the_group_hears_so(ranks):
    assert ["outside" in rank for rank in ranks] == [False, True, True, True]
    assert ranks[2]["outside"].startswith(
        "fit: group must contain this process, got one without process 2;"
    )


def test_all_processes_tell_the_same_error(ranks):
    for rank in ranks:
        assert rank["messages"] == [
            None,
            "fit: process 1 must not fail, got this",
            "fit: process 0 must not fail, got this",
            *[
                "fit: model must be the same in all processes, got another in process 1 than in process 0; "
                "seed alike before it is made"
            ]
            * 2,
        ]


@EACH
@pytest.mark.parametrize("kind", MODELS)
def test_the_run_folder_is_that_of_one_process_and_goes_on_in_one(
    ranks, alone, longer, folder, kind, cut, size
):
    run, plain = (folder / f"{kind}-{name}" for name in (f"{cut}-{size}", "alone"))
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in plain.iterdir())
    assert read_config(run) == read_config(plain)
    loaded, _ = load_model(run / "best.pt")
    assert_close(loaded.state_dict(), ranks[0][kind, cut, size]["weights"], 0)
    if size in (1, 3):
        return
    # one process goes on with what two or four wrote
    copy = folder / f"{run.name}-resumed"
    shutil.copytree(run, copy)
    found = trained(kind, copy, epochs=7, resume=True)
    assert_close(found["weights"], longer[kind]["weights"], 1e-5)


@pytest.mark.parametrize(("form", "size"), list(itertools.product(GOES_ON, (*SIZES, MANY))))
def test_another_number_of_processes_goes_on_as_without_a_break(ranks, many, longer, form, size):
    expected = longer["vae"]
    for rank in range(size):
        found = (many if size == MANY else ranks)[rank]["on", form, size]
        assert_close(found["weights"], expected["weights"], 1e-5)
        assert [row["epoch"] for row in found["history"]] == list(range(1, 8))
        for row, other in zip(found["history"], expected["history"], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


# one process alone writes one file
@pytest.mark.parametrize("size", SIZES[1:])
def test_a_checkpoint_in_parts_holds_what_one_file_does(ranks, folder, size):
    run, plain = (folder / f"vae-{name}-{size}" for name in ("parts", "items"))
    assert read_config(run) == read_config(plain)
    files = [path for path in run.glob("*.pt.parts-*/*") if path.name != ".metadata"]
    # three weights with items, and six moments of them, of each process, and of the last save alone
    assert len(files) == (3 + 9) * size
    for name in ("best.pt", "last.pt"):
        found, expected = (read_checkpoint(path / name) for path in (run, plain))
        same(found["model"], expected["model"])
        loaded, items = load_model(run / name)
        same(loaded.state_dict(), expected["model"])
        assert items == IDS
    for n, moments in expected["optimizer"]["state"].items():
        same(found["optimizer"]["state"][n], moments)


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        assert torch.equal(found[key], t) and found[key].stride() == t.stride(), key


@pytest.mark.parametrize("size", SIZES[1:])
def test_only_what_is_above_the_limit_is_in_parts(ranks, folder, size):
    # by items only; the three processes are allowed the bytes of last.pt, the others those of best.pt
    for cut, expected in (("items", [1, 1 if size == 3 else 2]), ("users", [1, 1])):
        run = folder / f"few-{cut}-{size}"
        paths = [run / name for name in ("best.pt", "last.pt")]
        assert [read_checkpoint(path)["meta"]["format"] for path in paths] == expected
        for path in paths:
            same(load_model(path)[0].state_dict(), ranks[0]["clipped fit", cut, size])
        # whose processes have had one item or none
        copy = shutil.copytree(run, folder / f"{run.name}-resumed")
        found = few_items(CLIP, run_dir=copy, resume=True, epochs=4)
        assert_close(found, few_items(CLIP, epochs=4), 1e-5)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(-1, ValueError, "at least 0, got -1"), (1e9, TypeError, "a whole number, got 1000000000.0")],
)
def test_checkpoint_bytes_are_a_number_of_bytes(value, error, words):
    with pytest.raises(error, match=f"^fit: checkpoint_bytes must be {words}$"):
        fit(model(), learnable()[0], checkpoint_bytes=value)


def test_the_command_recommends_from_parts(ranks, folder, tmp_path, monkeypatch):
    pytest.importorskip("polars")
    from fastvae import cli

    path = folder / "vae-parts-3" / "best.pt"
    net, items = load_model(path)
    write_checkpoint(tmp_path / "plain.pt", net, items)
    (tmp_path / "log.csv").write_text(
        "user,item\n" + "".join(f"u{n % 3},i{n}\n" for n in range(20))
    )
    for name, run in (("parts.csv", path.parent), ("plain.csv", tmp_path / "plain.pt")):
        arguments = ["recommend", run, tmp_path / "log.csv", tmp_path / name]
        monkeypatch.setattr(sys, "argv", ["fastvae", *map(str, arguments)])
        cli.main()
    found = (tmp_path / "parts.csv").read_text()
    assert found == (tmp_path / "plain.csv").read_text() and found.count("\n") == 1 + 3 * 10


def test_torch_reads_a_folder_of_parts_too(ranks, folder):
    from torch.distributed import checkpoint as dcp

    path = next((folder / "vae-parts-3").glob("best.pt.parts-*"))
    expected = load_model(folder / "vae-parts-3" / "best.pt")[0].state_dict()
    name = "encode.q_layers.linear_0.weight"
    found = {f"model/{name}": torch.zeros(16, N_ITEMS)}
    # its own index is a pickle, which this project never reads
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, checkpoint_id=path, no_dist=True)
    assert torch.equal(found[f"model/{name}"], expected[name])


def test_a_full_disk_of_one_process_is_told_by_all_and_leaves_nothing(ranks, folder):
    path = folder / "full.pt.parts-0"
    for rank in ranks:
        assert rank["full"] == (f"[Errno 28] No space left on device: '{path}'", [])


@pytest.fixture
def parts(ranks, folder, tmp_path):
    """A run whose checkpoints three processes have written in parts, to be damaged."""
    return shutil.copytree(folder / "vae-parts-3", tmp_path / "run")


def change_meta(path, change):
    content = torch.load(path, weights_only=True)
    meta = json.loads(content["meta"])
    change(meta["parts"]["tensors"]["model/decode.p_layers.linear_1.weight"], meta["parts"])
    torch.save(content | {"meta": json.dumps(meta)}, path)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def other_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def pickled(file):
    torch.save(argparse.Namespace(bytes=torch.zeros(1000)), file)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_short, "__0_1.distcp in .* that torch cannot read so"),
        (other_byte, "that torch cannot read so"),
        (pickled, "that torch cannot read so"),
        (lambda file: file.write_bytes(b""), "cut short"),
        (Path.unlink, "No such file"),
        (lambda file: torch.save(torch.zeros(13, 17), file), "something else in it"),
    ],
)
def test_a_damaged_part_gives_one_sentence(parts, damage, reason):
    path = parts / "best.pt"
    # the last layer's weight, of process 0
    damage(next(parts.glob("best.pt.parts-*")) / "__0_1.distcp")
    with pytest.raises(ValueError) as caught:
        load_model(path)
    words = str(caught.value)
    start = f"checkpoint: {path} must be whole with its folder, got another ("
    assert words.startswith(start) and words.endswith("); copy both together")
    assert re.search(reason, words) and "\n" not in words


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table, parts: parts.update(folder="../run"), "a folder of another name"),
        (lambda table, parts: parts.update(folder="a.parts-1"), "no folder a.parts-1 beside it"),
        (lambda table, parts: table["parts"].pop(0), "parts that do not make a whole"),
        (lambda table, parts: table["parts"].append([14, "a"]), "parts that do not make a whole"),
        (lambda table, parts: table["parts"][0].__setitem__(1, "../a"), "a part of another name"),
        (
            lambda table, parts: table["parts"][0].__setitem__(1, table["parts"][1][1]),
            "a part that is taken twice",
        ),
        (lambda table, parts: table.update(shape=[40, 10**12]), "__0_1.distcp in .* cut short"),
        (lambda table, parts: table.update(axis=2), "parts without a shape"),
        (lambda table, parts: parts.update(tensors={"model/a/b": table}), ""),
        (lambda table, parts: parts.clear(), "folder"),
    ],
)
def test_a_checkpoint_that_names_other_parts_gives_one_sentence(parts, change, reason):
    change_meta(parts / "best.pt", change)
    with pytest.raises(
        ValueError, match=r"^checkpoint: .* must be whole with its folder, got"
    ) as caught:
        load_model(parts / "best.pt")
    assert re.search(rf"\(.*{reason}.*\); copy both together", str(caught.value))


def test_what_a_killed_save_leaves_is_removed_and_the_last_checkpoint_is_whole(parts, longer):
    # killed before best.pt and last.pt name the new folders
    for name in ("best.pt", "last.pt"):
        (left,) = parts.glob(f"{name}.parts-*")
        half = left.with_name(f"{name}.parts-77")
        half.mkdir()
        (half / "__0_0.distcp").write_bytes((left / "__0_0.distcp").read_bytes()[:50])
    found = trained("vae", parts, epochs=7, resume=True, options=FIT | {"items": IDS})
    assert_close(found["weights"], longer["vae"]["weights"], 1e-5)
    # one process holds the whole model and writes one file
    assert not [path for path in parts.iterdir() if path.is_dir()]


def test_a_run_that_died_before_its_first_last_checkpoint_starts_anew(parts):
    (parts / "last.pt").unlink()
    (parts / "curve.png").unlink(missing_ok=True)
    found = trained("vae", parts, epochs=1, options=FIT | {"items": IDS})
    assert found["best"] == 1 and not [path for path in parts.iterdir() if path.is_dir()]


def test_without_a_group_or_with_other_words_the_sentence_says_so():
    train, validation = learnable()
    for call, where in ((fit, "fit"), (evaluate, "evaluate"), (recommend, "recommend")):
        pair = validation if call is evaluate else (train,)
        with pytest.raises(ValueError) as caught:
            call(model(), *pair, parallel="items")
        assert str(caught.value) == (
            f"{where}: parallel must be None without a process group, got items; "
            "call torch.distributed.init_process_group first"
        )
        with pytest.raises(
            ValueError, match=f"^{where}: parallel must be one of users, items, got"
        ):
            call(model(), *pair, parallel="rows")


def test_one_process_imports_nothing_of_this():
    code = (
        "import sys; from fastvae import *\n"
        "net, train = MultiVAE([2, 4, 3]), Clicks([0, 1], [0], n_items=3)\n"
        "fit(net, train, epochs=1); evaluate(net, train, Clicks([0, 1], [1], n_items=3))\n"
        "recommend(net, train)\n"
        "print([name for name in sys.modules if 'fastvae' in name and 'parallel' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    # and what does, does so when it is called
    for path in Path(fastvae.__file__).parent.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if re.match(r"(import|from) torch\.distributed", line)]


class Alone(Processes):
    """A group of one of four, without any."""

    def __init__(self, rank, size=4):
        self.rank, self.size = rank, size


def test_shares_are_those_of_tensor_split():
    for n, size in itertools.product((0, 1, 3, 4, 10), (1, 3, 4)):
        for rank, expected in enumerate(torch.arange(n).tensor_split(size)):
            assert torch.equal(torch.arange(n)[Alone(rank, size).share(n)], expected)


@pytest.mark.parametrize("n_items", [3, 40, 70])
def test_each_process_scores_its_items_alone_to_the_bit(n_items):
    net, clicks = with_ties(n_items), random_clicks([1, 0, 3, 2] * 5, n_items)
    whole = BlockScorer(net, clicks, 3, None).scores(0)[:, :n_items]
    for size in (1, 4, 7):
        parts = []
        for rank in range(size):
            own = Alone(rank, size).share(n_items)
            scores = RangeScorer(Alone(rank, size), net, clicks, 3).scores(0)
            # but for what fills a group of columns
            assert scores.shape[1] - (own.stop - own.start) < 32
            parts.append(scores[:, : own.stop - own.start])
        assert torch.equal(torch.cat(parts, 1), whole)
