"""What several processes hold: no second copy of a weight where weights are compared or made whole; one does what several do."""

import gc
import weakref
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from training import IDS, N_ITEMS, learnable, model, weights

from fastvae import evaluate, fit, parallel, parallel_trainer, recommend
from fastvae.checkpoint import load_model
from fastvae.ops import _buffers
from fastvae.parallel import ItemPart, Processes
from fastvae.parallel_trainer import ParallelTrainer
from fastvae.trainer import Settings

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_luck():
    """Nothing is collected by chance."""
    gc.disable()
    yield
    gc.enable()


def largest_allocation(call):
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    return max(event.self_cpu_memory_usage for event in profiler.events())


def test_weights_are_compared_and_made_whole_some_rows_at_a_time(group, monkeypatch):
    monkeypatch.setattr(parallel, "BLOCK_BYTES", 2**16)
    processes, n_items = Processes("fit", "items"), 2**14
    whole = torch.randn(n_items, 16)
    sums = [parallel._sum_of_bits(t) for t in (whole, whole.t(), whole[:0])]
    assert sums == [whole.view(torch.int32).sum()] * 2 + [0]
    compare = largest_allocation(lambda: processes.check_same("model", [whole, whole.t()], ""))
    # as int64
    assert compare <= 2 * 2**16 < whole.nbytes
    joined = processes.joined(whole, n_items)
    assert torch.equal(joined, whole)
    assert largest_allocation(lambda: processes.joined(whole, n_items)) == whole.nbytes


def test_what_training_held_is_gone_before_the_weights_are_made_whole(group, no_luck, monkeypatch):
    monkeypatch.setattr(_buffers, "_pool", {})
    settings = Settings(50, 1e-2, 0.2, 0, False, "fp32", 0)
    net, train = model(), learnable()[0]
    trainer = ParallelTrainer(Processes("fit", "items"), net, train, None, settings, None, None)
    trainer._step(torch.arange(50))
    _buffers.empty((2**18,), torch.float32)
    cut = [getattr(layer, name) for layer, name, _ in trainer.part._cut]
    state = trainer.optimizer.state
    held = [weakref.ref(t) for t in (*cut, *(state[p]["exp_avg"] for p in cut))]
    # as the first optimiser of a process is, which imports much of torch
    circle = [trainer.optimizer]
    circle.append(circle)
    del cut, state, circle
    join, alive = ItemPart._set, []

    def watched(layer, name, *args):
        alive.append([t() is not None for t in held])
        join(layer, name, *args)

    monkeypatch.setattr(ItemPart, "_set", staticmethod(watched))
    trainer._join()
    assert _buffers._pool == {}
    # the moments first, then each weight as the whole one takes its place
    assert alive == [[n < 3 and n >= done for n in range(6)] for done in range(3)]
    assert net.n_items == N_ITEMS


@pytest.mark.parametrize("cut", parallel.PARALLEL)
def test_a_group_of_one_trains_as_one_process(group, tmp_path, monkeypatch, cut):
    def refuse(*_):
        raise AssertionError("a step that is shared")

    monkeypatch.setattr(parallel_trainer.ParallelTrainer, "__init__", refuse)
    train, validation = learnable()
    found = []
    for shared in ({}, {"parallel": cut}):
        net = model()
        fit(net, train, validation, epochs=2, run_dir=tmp_path / str(shared), **shared)
        found.append(weights(net))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("cut", parallel.PARALLEL)
@pytest.mark.parametrize(
    ("backend", "device"),
    [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.gpu)],
)
def test_what_several_do_on_a_device_is_right_for_one(backend, device, cut, tmp_path, monkeypatch):
    # a GPU has no second process for NCCL: one takes all the steps of several
    monkeypatch.setattr(
        parallel_trainer.Several, "_is_one", property(lambda _: False, Mock()), raising=False
    )
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        train, (fold_in, held_out) = learnable()
        found = []
        for shared in ({}, {"parallel": cut}):
            net, run = model().to(device), tmp_path / f"run{len(shared)}"
            parts = {"checkpoint_bytes": 0} if cut == "items" and shared else {}
            options = {"epochs": 2, "batch_size": 50, "clip_grad_norm": 0.1, "run_dir": run}
            # a graph draws other noise
            options |= {"cuda_graph": False}
            fit(net, train, (fold_in, held_out), items=IDS, **options, **shared, **parts)
            assert sorted(path.name for path in run.glob("*.parts-*")) == (
                ["best.pt.parts-1", "last.pt.parts-1"] if parts else []
            )
            fit(
                net,
                train,
                (fold_in, held_out),
                items=IDS,
                resume=True,
                **options | {"epochs": 3},
                **shared,
                **parts,
            )
            loaded, _ = load_model(run / "best.pt")
            top = recommend(net, fold_in, 5, **shared)
            metrics = evaluate(net, fold_in, held_out, **shared).mean
            found.append((weights(net), loaded.state_dict(), top.items, top.scores, metrics))
        rtol, atol = (1e-5, 1e-7) if device == "cpu" else (1e-4, 1e-5)
        torch.testing.assert_close(*found, rtol=rtol, atol=atol)
    finally:
        dist.destroy_process_group()
