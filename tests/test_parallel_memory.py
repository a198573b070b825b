"""What several processes hold: no second copy of a weight where weights are compared or made whole; one alone shares nothing."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from training import N_ITEMS, learnable, model, weights

from fastvae import fit, parallel, parallel_trainer
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
