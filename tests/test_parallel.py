"""fit and evaluate by one to four gloo processes, by users and by items: the numbers of one process, whatever is cut."""

import itertools
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import CUTS, MODELS, SIZES, few_items, process, step_of, tied_items, trained
from training import learnable, model

import fastvae
from fastvae import Clicks, MultiVAE, evaluate, fit
from fastvae.checkpoint import load_model
from fastvae.parallel import ItemPart, Processes
from fastvae.run_folder import read_config

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
EACH = pytest.mark.parametrize(("cut", "size"), list(itertools.product(CUTS, SIZES)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of four processes found, in groups of one to four of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(folder)), nprocs=max(SIZES))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(max(SIZES))]


@pytest.fixture(scope="module")
def alone(folder):
    return {kind: trained(kind, folder / f"{kind}-alone") for kind in MODELS}


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
def test_more_processes_than_items(ranks, cut, size):
    for rank in range(size):
        assert_close(ranks[rank]["few", cut, size], few_items(), 1e-5)


@EACH
def test_ties_and_fewer_users_than_processes(ranks, cut, size):
    for rank in range(size):
        assert ranks[rank]["tied", cut, size] == tied_items()


def test_a_model_of_another_kind_is_shared_by_users(ranks):
    for rank in ranks:
        one, shared = rank["ties"]
        assert shared == one


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
    ranks, alone, folder, kind, cut, size
):
    run, plain = (folder / f"{kind}-{name}" for name in (f"{cut}-{size}", "alone"))
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in plain.iterdir())
    assert read_config(run) == read_config(plain)
    loaded, _ = load_model(run / "best.pt")
    assert_close(loaded.state_dict(), ranks[0][kind, cut, size]["weights"], 0)
    if size in (1, 3):
        return
    # one process goes on with what two or four wrote
    results = []
    for path in (run, plain):
        copy = folder / f"{path.name}-resumed-{cut}-{size}"
        copy.mkdir()
        for file in ("config.json", "metrics.jsonl", "best.pt", "last.pt"):
            (copy / file).write_bytes((path / file).read_bytes())
        results.append(trained(kind, None, resume_dir=copy))
    assert_close(results[0]["weights"], results[1]["weights"], 1e-5)


def test_without_a_group_or_with_other_words_the_sentence_says_so():
    train, validation = learnable()
    for call, where in ((fit, "fit"), (evaluate, "evaluate")):
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


def test_a_warm_start_is_not_cut_by_item():
    with pytest.raises(
        ValueError, match=r"^fit: warm_start must be None where parallel is items, got "
    ):
        fit(model(), learnable()[0], parallel="items", warm_start="run")


def test_one_process_imports_nothing_of_this():
    code = (
        "import sys; from fastvae import *\n"
        "net, train = MultiVAE([2, 4, 3]), Clicks([0, 1], [0], n_items=3)\n"
        "fit(net, train, epochs=1); evaluate(net, train, Clicks([0, 1], [1], n_items=3))\n"
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


def test_a_lent_model_comes_back_whole():
    net = MultiVAE([2, 4, 9])
    before = list(net.parameters())
    with ItemPart(Alone(1), net).lent(net):
        assert net.n_items == 2
        assert net.decode.output.weight.shape == (2, 4)
        # no copy of it
        assert net.decode.output.weight.data_ptr() == before[-2][3:].data_ptr()
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
    assert net.n_items == 9 and net.part is None
    assert net(Clicks([0, 1], [8], n_items=9))[0].shape == (1, 9)
