"""What the processes of tests/test_parallel.py do; the same without a group is what they are compared with."""

import contextlib
import errno
import gc
import itertools
import multiprocessing
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from helpers import Fixed, random_clicks
from training import IDS, LATER, N_ITEMS, later_clicks, learnable, model, weights

from fastvae import Clicks, MultiDAE, MultiVAE, _checkpoint_parts, evaluate, fit, recommend
from fastvae._parallel_scores import made_by_first
from fastvae.events import Events
from fastvae.export import recommend_to_file
from fastvae.parallel import ItemPart, Processes
from fastvae.parallel_trainer import ItemsStep, UsersStep
from fastvae.run_folder import CURVE, RunFolder
from fastvae.step import GraphedStep

SIZES, CUTS = (1, 2, 3, 4), ("users", "items")
MODELS = {"vae": MultiVAE, "dae": MultiDAE}
# 33 + 33 + 33 + 1 users of a batch: the last one has fewer users than processes
FIT = {"epochs": 5, "batch_size": 33, "total_anneal_steps": 0, "lr": 1e-2}


def noisy(kind, n_items=N_ITEMS):
    """A model that draws all there is: clicks, noise, hidden units."""
    torch.manual_seed(0)
    return MODELS[kind]([8, 16, n_items], dropout_enc=[0.5, 0.3], dropout_dec=[0.0, 0.3])


MANY = 8  # processes that only go on with what fewer have begun
# of checkpoints in one file and in parts: which number of processes goes on with what which other has written
GOES_ON = {"items": {1: 4, 2: 1, 3: 4, 4: 3, MANY: 2}, "parts": {1: 3, 2: 4, 3: 2, 4: 3, MANY: 3}}
CLIP = 0.1  # far below the norms that there are
FEW_BYTES = 4 * (4 * 3 + 3 * 4 + 3)  # of few_items' weights with items, which is not too many
IN_PARTS = {"checkpoint_bytes": 0, "items": IDS}


def trained(kind, run_dir, epochs=FIT["epochs"], resume=False, options=FIT, **shared):
    """History, weights and metrics after 20 updates; evaluation with the values of each user."""
    train, validation = learnable()
    net = noisy(kind)
    called = []
    options = options | {"epochs": epochs, "on_epoch": called.append, "per_click": kind == "dae"}
    found = fit(net, train, validation, run_dir=run_dir, resume=resume, **options, **shared)
    result = evaluate(net, *validation, ["ndcg@100", "recall@5", "coverage@3"], **shared)
    return {
        "history": found.history,
        "best": found.best_epoch,
        "weights": weights(net),
        "metrics": result.mean,
        "values": result.values,
        "called": len(called),
    }


def gone_on(folder, form, size, group):
    """As trained(), of a copy of a run that another number of processes has begun."""
    run, copy = f"vae-{form}-{GOES_ON[form][size]}", f"vae-{form}-on-{size}"
    if dist.get_rank(group) == 0:
        shutil.copytree(f"{folder}/{run}", f"{folder}/{copy}")
    options = FIT | (IN_PARTS if form == "parts" else {})
    shared = {"parallel": "items", "group": group}
    return trained("vae", f"{folder}/{copy}", 7, True, options, **shared)


def few_items(clip_grad_norm=None, **shared):
    """Fewer items than processes."""
    torch.manual_seed(0)
    net = MultiVAE([2, 4, 3])
    options = {"epochs": 3, "batch_size": 2, "lr": 0.1, "total_anneal_steps": 0}
    options |= {"clip_grad_norm": clip_grad_norm} | shared
    fit(net, random_clicks([1, 2, 0, 3, 2], 3), **options)
    return weights(net)


def begun_with(run, **shared):
    """Weights after an epoch that begins with those and the moments of a run of other items."""
    torch.manual_seed(9)
    net = noisy("vae", len(LATER))
    fit(net, later_clicks(), items=LATER, warm_start=run, **FIT | {"epochs": 1}, **shared)
    return weights(net)


def step_of(cut, group, batch, max_norm=None):
    """Weights after one update of plain SGD at a rate of 1, whose change is the gradient, and nll and kld."""
    net = noisy("vae")
    before = weights(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net.train()
    torch.manual_seed(3)
    if cut is None:
        terms = GraphedStep(net, optimizer, max_norm=max_norm)(batch, beta=0.2)
    elif cut == "users":
        step = UsersStep(net, optimizer, Processes("fit", cut, group), max_norm=max_norm)
        step._net.register_comm_hook(group, mean_of_bucket)
        terms = step(batch, beta=0.2)
    else:
        part = ItemPart(Processes("fit", cut, group), net)
        part.cut(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        SENT.clear()
        terms = ItemsStep(net, optimizer, part, max_norm=max_norm)(part.clicks(batch), beta=0.2)
        sent = list(SENT)
        part.join(net)
        SENT[:] = sent
    return {key: before[key] - value for key, value in weights(net).items()}, terms


# bytes of each tensor that was reduced
SENT: list[int] = []


def mean_of_bucket(group, bucket):
    """What DistributedDataParallel does with some gradients, by the function that counts."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    size = dist.get_world_size(group)
    return work.get_future().then(lambda done: done.value()[0] / size)


@contextlib.contextmanager
def counting():
    """Collect the bytes of what this process reduces."""
    reduce = dist.all_reduce

    def counted(t, *args, **options):
        SENT.append(t.nbytes)
        return reduce(t, *args, **options)

    dist.all_reduce = counted
    SENT.clear()
    try:
        yield
    finally:
        dist.all_reduce = reduce


def messages(group, rank):
    """What a block in which one process fails, and models that differ, give in each."""
    processes, told = Processes("fit", "users", group), []
    for fails in (None, 1, 0):
        try:
            with processes.together():
                if rank == fails:
                    raise ValueError(f"fit: process {rank} must not fail, got this")
            told.append(None)
        except ValueError as error:
            told.append(str(error))
    torch.manual_seed(rank)
    for cut in CUTS:
        try:
            fit(MultiVAE([2, 4, N_ITEMS]), learnable()[0], epochs=1, parallel=cut, group=group)
        except RuntimeError as error:
            told.append(str(error))
    return told


def other_arguments(group, rank, folder):
    """What all processes raise where one of them is given something else, and who is not in the group."""
    train, (fold_in, held_out) = learnable()
    shared, told = {"parallel": "items", "group": group}, []

    def fitted(**options):
        data = options.pop("train", train), options.pop("validation", None)
        fit(model(), *data, **{"epochs": 1, "batch_size": 50} | shared | options)

    def scored(call, *pair, net=None, **options):
        call(net or model(), *pair, **shared | options)

    turned = train.rows(range(train.n_users - 1, -1, -1))
    other = model()
    with torch.no_grad():
        other.encode.q_layers.layer(0).bias.add_(1)
    for at, call, odd in (
        (1, fitted, {"batch_size": 49}),
        (2, fitted, {"epochs": 2}),
        (3, fitted, {"seed": 1}),
        (1, fitted, {"precision": "bf16"}),
        (1, fitted, {"validation": (fold_in, held_out)}),
        (1, fitted, {"train": turned}),
        (1, fitted, {"parallel": "users"}),
        (1, fitted, {"run_dir": f"{folder}/of one"}),
        (1, fitted, {"items": IDS}),
        (1, fitted, {"checkpoint_bytes": 1}),
        (1, fitted, {"on_epoch": print}),
        (2, fitted, {"lr": -1}),
        (1, lambda **o: scored(evaluate, fold_in, held_out, **o), {"metrics": ["recall@5"]}),
        (1, lambda **o: scored(evaluate, fold_in, o.pop("to_find", held_out), **o), {"to_find": fold_in.rows(range(fold_in.n_users - 1, -1, -1))}),
        (1, lambda **o: scored(evaluate, fold_in, held_out, **o), {"net": other}),
        (1, lambda **o: scored(evaluate, fold_in, held_out, **o), {"metrics": []}),
        (3, lambda **o: scored(recommend, o.pop("of", train), **o), {"k": 3}),
        (1, lambda **o: scored(recommend, o.pop("of", train), **o), {"of": turned}),
        (1, lambda **o: scored(recommend, o.pop("of", train), **o), {"exclude": [1]}),
        (1, lambda **o: scored(recommend, o.pop("of", train), **o), {"k": 0}),
    ):  # fmt: skip
        try:
            call(**odd if rank == at else {})
            told.append(None)
        except (ValueError, TypeError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
    dist.barrier(group)
    return told


def full_disk(group, rank, folder):
    """What a save in parts tells each process where one finds no space, and what it leaves."""
    from torch.distributed.checkpoint import FileSystemWriter

    processes, write = Processes("fit", "items", group), FileSystemWriter.write_data
    own = torch.ones(len(range(10)[processes.share(10)]), 2)

    def write_nothing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        FileSystemWriter.write_data = write_nothing
    try:
        with _checkpoint_parts.written(processes, folder / "full.pt", {"model/w": (own, 0)}, 10):
            told = None
    except OSError as error:
        told = str(error)
    finally:
        FileSystemWriter.write_data = write
    dist.barrier(group)
    return told, sorted(path.name for path in folder.glob("full.pt*"))


def ties(group):
    """Metrics of a model whose scores tie, by one process and shared by users."""
    net = Fixed(*([1.0, 2.0] * (N_ITEMS // 2)))
    _, validation = learnable()
    names = ["ndcg@10", "map@5"]
    return [
        evaluate(net, *validation, names, **shared).mean
        for shared in ({}, {"parallel": "users", "group": group})
    ]


def tied_items(**shared):
    """Metrics of a model of zeros, which ranks by number alone."""
    net = model()
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
    fold_in, held_out = learnable()[1]
    few = [clicks.rows([0, 1, 2]) for clicks in (fold_in, held_out)]
    return [evaluate(net, *pair, ["ndcg@40"], **shared).mean for pair in ((fold_in, held_out), few)]


RULES = {
    "none": {},
    "few of one range": {"allowed": [3, 0, 39, 5]},
    "all but a few": {"exclude": [0, 1, 20]},
    "none left": {"allowed": []},
    "less of the popular": {"popularity_penalty": 0.5, "popularity": range(N_ITEMS)},
    "seen too": {"keep_seen": True, "exclude": [7]},
}


def with_ties(n_items=N_ITEMS):
    """A model of which every fifth item has the same scores, in all ranges of the items."""
    torch.manual_seed(0)
    net = MultiVAE([2, 16, n_items])
    with torch.no_grad():
        for weight in (net.decode.output.weight, net.decode.output.bias):
            weight.copy_(weight[torch.arange(n_items) % 5 % n_items])
    return net


def lists(**shared):
    """Items and scores by name, of histories one of which is empty, by uneven blocks and shares."""
    net, histories = with_ties(), random_clicks([5, 0, 8, 3, 39, 40, 1] * 3, N_ITEMS)
    found = {
        (name, k): recommend(net, histories, k, block_size=size, **rules, **shared)
        for (name, rules), (k, size) in itertools.product(RULES.items(), ((3, None), (200, 4)))
    }
    few = random_clicks([1, 2, 0], 3)
    # a process without an item, also where others leave one out
    found |= {
        n: recommend(with_ties(3), few.rows(range(n)), 2, exclude=[1], **shared) for n in range(4)
    }
    found["other kind"] = recommend(Fixed(*([2.0, 1.0] * 20)), histories, 30, **by_users(shared))
    return {key: (each.items, each.scores) for key, each in found.items()}


def by_users(shared):
    return shared | {"parallel": "users"} if shared else shared


def written(path, **shared):
    """What recommend_to_file says that it wrote."""
    histories, names = random_clicks([5, 0, 40, 3, 9], N_ITEMS), np.arange(N_ITEMS).astype(str)
    log = Events(histories, np.array(list("abcde")), names, {})
    return recommend_to_file(path, with_ties(), log, 7, exclude=["3"], **shared)


class NanOf(Fixed):
    """Gives nan for users who have clicked item 0."""

    def forward(self, clicks):
        return super().forward(clicks).where(clicks.to_dense()[:, :1] == 0, torch.nan)


def errors_of_lists(group, folder):
    """What all processes raise where process 0 cannot write, one has no finite scores, and the model has no layer."""
    processes, told = Processes("recommend", "users", group), []

    def blocks(bad=None):
        for n in range(3):
            if n == bad:
                raise ValueError("block must be made, got 1")
            # a collective: it would wait for ever for a process that has left
            yield float(processes.sum(torch.ones(1)))

    def failing(at):
        def make(blocks):
            for n, block in enumerate(blocks):
                assert block == processes.size
                if n == at:
                    raise OSError(f"no space left at block {n}")
            raise OSError("no space left at the end")

        return make

    shared = {"parallel": "users", "group": group}
    nobody = Clicks([0, 1, 1, 1, 1, 1], [0], n_items=N_ITEMS)
    fixed = NanOf(*range(N_ITEMS))
    for call in (
        lambda: written(f"{folder}/top.txt", **shared),
        lambda: made_by_first(processes, blocks(), failing(1)),
        lambda: made_by_first(processes, blocks(), failing(None)),
        lambda: made_by_first(processes, blocks(bad=1), failing(2)),
        lambda: recommend(fixed, nobody, 3, **shared),
        lambda: recommend(fixed, nobody, 3, **shared | {"parallel": "items"}),
        lambda: evaluate(fixed, nobody, nobody, **shared | {"parallel": "items"}),
    ):
        try:
            call()
        except (OSError, ValueError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return [*told, float(processes.sum(torch.ones(1)))]


def rows_scored(group):
    """How many users the model of this process is called with, by users."""
    net = Fixed(*range(N_ITEMS))
    recommend(net, random_clicks([1] * 80, N_ITEMS), 3, parallel="users", group=group)
    return sum(map(len, net.batches))


def draw_nothing(folder, history):
    """In place of RunFolder.draw_curve, which takes as long as a training here; tests/test_torchrun.py draws one."""
    (folder.path / CURVE).touch()


def started(process, folder, n):
    """Run process(rank, folder) in a group of n processes; what each returns, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # all are forks of one process that has imported what takes seconds, and nothing else
    multiprocessing.set_forkserver_preload(["fastvae.parallel_trainer", "torch._dynamo"])
    torch.multiprocessing.start_processes(
        in_group, (process, n, port, str(folder)), nprocs=n, start_method="forkserver"
    )
    return [torch.load(f"{folder}/{rank}-of-{n}.pt", weights_only=False) for rank in range(n)]


def in_group(rank, process, n, port, folder):
    torch.set_num_threads(1)
    # fit collects what a training has held: without torch's own objects that takes no time
    gc.freeze()
    RunFolder.draw_curve = draw_nothing
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=n)
    try:
        torch.save(process(rank, folder), f"{folder}/{rank}-of-{n}.pt")
        # who ends takes along what another has yet to read of it
        Path(folder, f"{rank}-of-{n}.done").touch()
        while len(list(Path(folder).glob(f"*-of-{n}.done"))) < n:
            time.sleep(0.05)
    finally:
        dist.destroy_process_group()


def of_many(rank, folder):
    """What each of many processes has that go on with a run of few."""
    return {("on", form, MANY): gone_on(folder, form, MANY, dist.group.WORLD) for form in GOES_ON}


def process(rank, folder):
    """What each of four processes finds, in groups of one to four of them."""
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    batch = learnable()[0].rows([5, 7, 2, 2, 90])
    found = {}
    for size, cut in itertools.product(SIZES, CUTS):
        if rank >= size:
            continue
        shared = {"parallel": cut, "group": groups[size]}
        for kind in MODELS:
            run_dir = f"{folder}/{kind}-{cut}-{size}"
            found[kind, cut, size] = trained(kind, run_dir, **shared)
        if cut == "items":
            run_dir = f"{folder}/vae-parts-{size}"
            found["vae", "parts", size] = trained("vae", run_dir, options=FIT | IN_PARTS, **shared)
        found["few", cut, size] = few_items(**shared)
        n_bytes = FEW_BYTES if size != 3 else 3 * FEW_BYTES
        few = {"run_dir": f"{folder}/few-{cut}-{size}", "checkpoint_bytes": n_bytes}
        found["clipped fit", cut, size] = few_items(CLIP, **few, **shared)
        found["clipped", cut, size] = step_of(cut, groups[size], batch, CLIP)
        found["tied", cut, size] = tied_items(**shared)
        found["lists", cut, size] = lists(**shared)
        path = f"{folder}/top-{cut}-{size}.csv"
        found["written", cut, size] = written(path, **shared)
        with counting():
            found["step", cut, size] = *step_of(cut, groups[size], batch), list(SENT)
    dist.barrier()
    for size, form in itertools.product(SIZES, GOES_ON):
        if rank < size:
            found["on", form, size] = gone_on(folder, form, size, groups[size])
    for size, cut in itertools.product(SIZES, CUTS):
        if rank < size:
            shared = {"parallel": cut, "group": groups[size]}
            found["warm", cut, size] = begun_with(f"{folder}/vae-parts-3", **shared)
    found["messages"] = messages(groups[4], rank)
    found["other arguments"] = other_arguments(groups[4], rank, folder)
    try:
        Processes("fit", "users", groups[1])
    except ValueError as error:
        found["outside"] = str(error)
    found["full"] = full_disk(groups[4], rank, Path(folder))
    found["ties"] = ties(groups[4])
    found["errors of lists"] = errors_of_lists(groups[4], folder)
    found["rows"] = rows_scored(groups[4])
    return found
