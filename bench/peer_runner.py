"""Train one package's own Mult-VAE on the clicks of a file; bench peers runs this inside that package's environment.

python -I peer_runner.py NAME clicks.npz EPOCHS     prints JSON as its last line

It needs numpy, scipy, torch and the package.

Every runner builds the package's data set and model from x, lets the package's own loop train, and returns the
model's number of parameters and a function for the log-probabilities of the first users, with x in that package's
order of items.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

WIDTH, LATENT = 600, 200
BATCH_SIZE = 500
ANNEAL_CAP, ANNEAL_STEPS = 0.2, 200_000
N_CHECKED = 500  # users whose nll after training is reported: it shows that the model was trained


def peak_rss_gib() -> float:
    """Highest resident memory of this process so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20
    except (OSError, StopIteration):  # getrusage alone would start from the parent's peak on Linux
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Clock:
    """Seconds of each epoch (with clock: one epoch); processor seconds and peak memory from the first to the last."""

    def __init__(self):
        self.seconds: list[float] = []
        self.process_start = time.perf_counter()
        self.setup: dict[str, float] = {}

    def __enter__(self) -> None:
        if not self.setup:
            seconds = time.perf_counter() - self.process_start
            self.setup = {"setup_s": round(seconds, 1), "setup_peak_rss_gib": peak_rss_gib()}
            self.cpu_start = time.process_time()
        self.started = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.cpu = time.process_time() - self.cpu_start
        self.peak = peak_rss_gib()

    def timed(self, train_epoch):
        """A method that trains an epoch, timed."""

        def call(*args, **kwargs):
            with self:
                return train_epoch(*args, **kwargs)

        return call


def run_fastvae(x: sp.csr_matrix, epochs: int, clock: Clock):
    """Ours: fit()."""
    from fastvae import Clicks, MultiVAE, fit
    from fastvae.trainer import Trainer

    torch.manual_seed(0)
    train, model = Clicks.from_matrix(x), MultiVAE([LATENT, WIDTH, x.shape[1]])
    Trainer._run_epoch = clock.timed(Trainer._run_epoch)
    annealing = {"anneal_cap": ANNEAL_CAP, "total_anneal_steps": ANNEAL_STEPS}
    fit(model, train, epochs=epochs, batch_size=BATCH_SIZE, **annealing)
    model.eval()
    dense = _dense(x)
    return model, lambda: (dense, model(dense)[0].log_softmax(1))


def run_recbole(x: sp.csr_matrix, epochs: int, clock: Clock):
    """RecBole: Trainer.fit with its UserDataLoader; every click is a training click."""
    from recbole.config import Config
    from recbole.data import create_dataset
    from recbole.data.utils import get_dataloader
    from recbole.model.general_recommender.multivae import MultiVAE
    from recbole.trainer import Trainer

    _write_recbole(x, Path("clicks"))
    settings = {
        "data_path": ".", "checkpoint_dir": "saved", "use_gpu": False, "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id"]}, "eval_args": {"split": {"RS": [1.0]}},
        "mlp_hidden_size": [WIDTH], "latent_dimension": 2 * LATENT, "train_batch_size": BATCH_SIZE,
        "anneal_cap": ANNEAL_CAP, "total_anneal_steps": ANNEAL_STEPS, "epochs": epochs,
    }  # fmt: skip
    config = Config(model="MultiVAE", dataset="clicks", config_dict=settings)
    (train,) = create_dataset(config).build()
    loader = get_dataloader(config, "train")(config, train, None, shuffle=True)
    model = MultiVAE(config, train)
    trainer = Trainer(config, model)
    trainer._train_epoch = clock.timed(trainer._train_epoch)
    trainer.fit(loader, saved=False, verbose=False)
    model.eval()
    users = torch.arange(1, 1 + min(N_CHECKED, x.shape[0]))  # 0 is its padding
    dense = model.get_rating_matrix(users)
    return model, lambda: (dense, model(dense)[0].log_softmax(1))


def _write_recbole(x: sp.csr_matrix, folder: Path) -> None:
    folder.mkdir()
    users, items = x.nonzero()
    with open(folder / "clicks.inter", "w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\n")
        file.writelines(f"{u}\t{i}\n" for u, i in zip(users, items, strict=True))


def run_cornac(x: sp.csr_matrix, epochs: int, clock: Clock):
    """Cornac: VAECF.fit; an epoch is one pass of user_iter, the last step included."""
    from cornac.data import Dataset
    from cornac.models import VAECF

    users, items = x.nonzero()
    train = Dataset.from_uir(zip(users.tolist(), items.tolist(), repeat(1.0)))
    del users, items
    user_iter = train.user_iter

    def timed_iter(*args, **kwargs):
        with clock:
            yield from user_iter(*args, **kwargs)

    train.user_iter = timed_iter
    model = VAECF(
        k=LATENT,
        autoencoder_structure=[WIDTH],
        n_epochs=epochs,
        batch_size=BATCH_SIZE,
        beta=ANNEAL_CAP,
        seed=0,
    )
    model.fit(train)
    dense = _dense(train.matrix)
    vae = model.vae.eval()
    return vae, lambda: (dense, vae.decode(vae.encode(dense)[0]).clamp_min(1e-30).log())


def run_rectorch(x: sp.csr_matrix, epochs: int, clock: Clock):
    """rectorch: MultiVAE.train with its DataSampler."""
    from rectorch.models import MultiVAE
    from rectorch.nets import MultiVAE_net
    from rectorch.samplers import DataSampler

    torch.manual_seed(0)
    net = MultiVAE_net([LATENT, WIDTH, x.shape[1]])
    model = MultiVAE(net, beta=ANNEAL_CAP, anneal_steps=ANNEAL_STEPS)
    model.train_epoch = clock.timed(model.train_epoch)
    model.train(DataSampler(x, batch_size=BATCH_SIZE), num_epochs=epochs)
    net.eval()
    dense = _dense(x)
    return net, lambda: (dense, net(dense)[0].log_softmax(1))


RUNNERS = {
    "fastvae": ("fastvae-cf", run_fastvae),
    "recbole": ("recbole", run_recbole),
    "cornac": ("cornac", run_cornac),
    "rectorch": ("rectorch", run_rectorch),
}


def _dense(x: sp.csr_matrix) -> torch.Tensor:
    return torch.from_numpy(x[:N_CHECKED].toarray().astype(np.float32))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(name: str, path: str, epochs: str) -> None:
    """Train, then print what was measured."""
    sys.argv = sys.argv[:1]  # RecBole reads it
    arrays = np.load(path)
    values = np.ones(len(arrays["indices"]), np.float32)
    x = sp.csr_matrix((values, arrays["indices"], arrays["indptr"]), shape=arrays["shape"])
    clock, (package, runner) = Clock(), RUNNERS[name]
    model, log_probabilities = runner(x, int(epochs), clock)
    with torch.no_grad():
        dense, log_p = log_probabilities()
        nll = -(dense * log_p).sum(1).mean().item()
    versions = {p: _version(p) for p in (package, "torch", "numpy", "scipy", "pandas")}
    result = {
        "epoch_s": [round(seconds, 2) for seconds in clock.seconds],
        "cpu_s_per_epoch": round(clock.cpu / len(clock.seconds), 2),
        "peak_rss_gib": round(clock.peak, 3),
        **{key: round(value, 3) for key, value in clock.setup.items()},
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "nll_after": round(nll, 2),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
