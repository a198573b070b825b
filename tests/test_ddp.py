"""Two gloo processes under plain DistributedDataParallel give what one process gives, in training and evaluation."""

import re
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import random_clicks
from torch.nn.parallel import DistributedDataParallel

from fastvae import Clicks, MultiDAE, MultiVAE, evaluate

N_ITEMS, N_USERS, WORLD = 30, 7, 2
MODELS = {"MultiVAE": MultiVAE, "MultiDAE": MultiDAE}
# rows of each rank by step: even ranks' batches, then the odd one out, whose last batch is short
BATCHES = [([0, 1], [2, 3]), ([4, 5], [6, 1]), ([0, 6], [3])]


# what docs/distributed.md shows is what is tested
PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
SHOWN: dict = {}
for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
    exec(compile(block, PAGE.name, "exec"), SHOWN)


def trained(name, rank=None):
    """Parameters after three steps; rank None: one process on the joined batches."""
    torch.manual_seed(0)
    # without dropout and noise, which two processes draw apart
    model = MODELS[name]([4, 6, N_ITEMS]).eval()
    clicks = random_clicks([3, 0, 9, 5, 1, 7, 2], N_ITEMS, counts=True)
    net = model if rank is None else DistributedDataParallel(model)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batches in BATCHES:
        joined = [row for batch in batches for row in batch]
        if rank is not None:
            SHOWN["step"](net, adam, clicks, batches[rank], len(joined), beta=0.2)
            continue
        adam.zero_grad()
        model.loss(clicks.rows(joined), beta=0.2).backward()
        adam.step()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def case():
    """A model, fold-in and held-out clicks of seven users; one has nothing to predict."""
    torch.manual_seed(1)
    fold_in = random_clicks([3, 1, 4, 2, 5, 2, 6], N_ITEMS)
    held_out = random_clicks([2, 3, 1, 0, 4, 1, 2], N_ITEMS, 1).to_dense()
    held_out[fold_in.to_dense() > 0] = 0
    return MultiVAE([4, 6, N_ITEMS]).eval(), fold_in, Clicks.from_matrix(held_out)


def process(rank, port, folder):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    try:
        result = {name: trained(name, rank) for name in MODELS}
        # disjoint ranges of users: 0..3 and 4..6, in batches of two and a last one of one
        model, fold_in, held_out = case()
        totals = torch.zeros(3, dtype=torch.float64)
        for users in torch.arange(N_USERS).tensor_split(WORLD)[rank].split(2):
            totals += SHOWN["sums_and_count"](model, fold_in.rows(users), held_out.rows(users))
        dist.all_reduce(totals)
        torch.manual_seed(0)
        model, clicks = MultiDAE([4, 6, N_ITEMS]), random_clicks([20], N_ITEMS)
        torch.manual_seed(rank)
        dropped = model(clicks).detach()
        torch.save(result | {"totals": totals, "dropped": dropped}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_one_process_on_the_joined_batches(ranks, name):
    single = trained(name)
    for key, expected in single.items():
        assert torch.equal(ranks[0][name][key], ranks[1][name][key]), key
        torch.testing.assert_close(ranks[0][name][key], expected, rtol=1e-6, atol=1e-6, msg=key)
    assert not torch.equal(single["decode.p_layers.linear_1.weight"], untrained(name))


def untrained(name):
    torch.manual_seed(0)
    return MODELS[name]([4, 6, N_ITEMS]).state_dict()["decode.p_layers.linear_1.weight"]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_sums_and_counts_over_ranks_are_the_metrics_of_one_process(ranks):
    model, fold_in, held_out = case()
    result = evaluate(model, fold_in, held_out, ["ndcg@100", "recall@20"])
    assert (result.n_evaluated, result.n_skipped) == (6, 1)
    for rank in ranks:
        ndcg, recall, n_evaluated = rank["totals"].tolist()
        assert n_evaluated == result.n_evaluated
        assert ndcg / n_evaluated == pytest.approx(result["ndcg@100"], rel=1e-15)
        assert recall / n_evaluated == pytest.approx(result["recall@20"], rel=1e-15)
    assert torch.equal(ranks[0]["totals"], ranks[1]["totals"])


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_with_seeds_of_their_own_draw_masks_of_their_own(ranks):
    assert not torch.equal(*(rank["dropped"] for rank in ranks))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("per_click", [False, True])
def test_forward_with_beta_is_the_loss(name, per_click):
    torch.manual_seed(0)
    model, clicks = MODELS[name]([4, 6, N_ITEMS]), random_clicks([3, 0, 9], N_ITEMS)
    torch.manual_seed(1)
    by_forward = model(clicks, beta=0.2, per_click=per_click)
    torch.manual_seed(1)
    assert torch.equal(by_forward, model.loss(clicks, 0.2, per_click))
    assert model(clicks, beta=0.0).shape == ()


@pytest.mark.parametrize("name", MODELS)
def test_per_click_without_beta_is_refused(name):
    model, clicks = MODELS[name]([4, 6, N_ITEMS]), Clicks([0, 1], [0], n_items=N_ITEMS)
    with pytest.raises(ValueError) as caught:
        model(clicks, per_click=True)
    assert str(caught.value) == f"{name}: beta must be given where per_click is True, got None"
    with pytest.raises(TypeError, match=r"^loss: clicks must be Clicks, got Tensor"):
        model(clicks.to_dense(), beta=0.2)
