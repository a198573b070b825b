"""Epochs of the Mult-VAE of other packages, each installed in an environment of its own, beside fastvae's.

python -m bench peers [--users N] [--threads N]     needs FASTVAE_DATA; writes bench/results/peers_cpu.json
python -m bench peers --convert     logits of their own networks beside ours with their weights; peer_weights.json

Processes run one after the other, ours between any two: ours, A, ours, B, ours, C, ours. All train on the same users
with the same widths, batch and learning rate, in fp32, through the package's own data set and training loop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.machine import RESULTS, describe, write
from bench.peer_runner import ANNEAL_CAP, ANNEAL_STEPS, BATCH_SIZE, LATENT, N_CHECKED, WIDTH
from bench.peer_weights import compare
from bench.quality import load
from fastvae import Dataset

DATA, N_HELDOUT, SEED = "ml10m_fastvae", 4000, 0
ENVIRONMENTS = Path(__file__).parent.parent / ".venv-peers"
RUNNER = Path(__file__).with_name("peer_runner.py")
TIMEOUT = 1800  # seconds, of an installation or a run
TORCH = f"torch=={torch.__version__.split('+')[0]}"  # the one that runs ours

PIP = ["--quiet", "--disable-pip-version-check"]

OURS = "fastvae"
REQUIREMENTS = {
    "recbole": [TORCH, "recbole==1.2.1", "numpy==1.26.4", "scipy==1.11.4", "pandas<3", "setuptools"],
    "cornac": [TORCH, "cornac==3.0.1"],
    "rectorch": [TORCH, "rectorch==0.0.9b0", "numpy==2.4.6", "pandas"],
}  # fmt: skip
WEIGHTS_ONLY = {"recpack": [TORCH, "recpack==0.3.6"]}
MODELS = {
    OURS: "fastvae.fit, MultiVAE",
    "recbole": "RecBole 1.2.1, MultiVAE",
    "cornac": "Cornac 3.0.1, VAECF",
    "rectorch": "rectorch 0.0.9b0, MultiVAE",
}

# read in the installed code; ours: inputs L2-normalised, dropout 0.5 on them, standard normal noise, kld summed over
# latents, mean over users, beta from 0 up to the cap, users shuffled each epoch, xavier uniform weights, biases of std
# 0.001
DIFFERENCES = {
    "recbole": [
        "noise of standard deviation 0.01 in place of 1 "
        "(model/general_recommender/multivae.py, MultiVAE.reparameterize)",
        "latent_dimension counts mu and logvar together: 400 gives 200 latents (MultiVAE.__init__, forward)",
        "item 0 is padding and has an input and a softmax class; user 0 is padding and is trained as a user without "
        "clicks (model/abstract_recommender.py, AutoEncoderMixin.get_rating_matrix; "
        "data/dataloader/user_dataloader.py, UserDataLoader)",
        "clicks are kept as a matrix padded to the longest user, and each batch is made dense from it "
        "(data/dataset/dataset.py, Dataset._history_matrix; AutoEncoderMixin.get_rating_matrix)",
        "beta is counted from update 1, not 0 (MultiVAE.calculate_loss)",
        "xavier normal weights, biases 0 (model/init.py, xavier_normal_initialization)",
        "loss terms, normalisation, dropout and shuffling as ours",
    ],
    "cornac": [
        "input neither normalised nor dropped out (models/vaecf/vaecf.py, VAE.encode)",
        "users in the same order every epoch (vaecf.py, learn: user_iter(shuffle=False))",
        "beta constant, here at the cap; no annealing (vaecf.py, learn)",
        "log(softmax + 1e-10) in place of log-softmax (vaecf.py, VAE.decode, VAE.loss)",
        "every step computes the terms of all four likelihoods over [users, items] and uses one (vaecf.py, VAE.loss)",
        "each batch is made dense in float64, then cast to float32 (vaecf.py, learn)",
        "torch's default initial weights and biases (vaecf.py, VAE.__init__)",
        "noise and loss terms (sum over latents and items, mean over users) as ours",
    ],
    "rectorch": [
        "initial biases of standard deviation 1 (nets.py, VAE_net.init_weights: normal_ without arguments)",
        "each batch is made dense on the host (samplers.py, DataSampler.__iter__)",
        "normalisation, dropout, noise, loss terms, annealing, shuffling and initial weights as ours",
    ],
}  # fmt: skip


def train_clicks(n_users: int | None) -> dict[str, np.ndarray]:
    """CSR arrays of our training users, or of the first n_users of them with the items they clicked."""
    train = Dataset.from_matrix(load(DATA), N_HELDOUT, SEED).train
    train = train.rows(torch.arange(min(n_users or train.n_users, train.n_users))).compact()
    items, indices = np.unique(train.indices.numpy(), return_inverse=True)
    return {
        "indptr": train.indptr.numpy(),
        "indices": indices.astype(np.int32),
        "shape": np.array([train.n_users, len(items)]),
    }


def install(name: str) -> Path:
    """Python of the peer's environment, which is made where it is missing or was made for other requirements."""
    folder = ENVIRONMENTS / name
    python, ready = folder / "bin" / "python", folder / "ready.json"
    wanted = (REQUIREMENTS | WEIGHTS_ONLY)[name]
    requirements = json.dumps(wanted)
    if not ready.exists() or ready.read_text() != requirements:
        print(f"installing {name}: {' '.join(wanted)}", flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", *PIP, *wanted])
        ready.write_text(requirements)
    return python


def run(python: Path, name: str, clicks: Path, epochs: int) -> dict:
    """What one process reports about its epochs."""
    load_before = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:  # some write logs where they run
        command = [str(python), "-I", str(RUNNER), name, str(clicks), str(epochs)]
        output = _run(command, cwd=folder)
    return {**json.loads(output.splitlines()[-1]), "load_before": load_before}


def _run(command: list[str], **options) -> str:
    """Output of a command; RuntimeError with the last line that names an error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, **options)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if "rror" in line] or lines
        raise RuntimeError(errors[-1] if errors else f"exit status {done.returncode}")
    return done.stdout


def measure(clicks: Path, names: list[str], epochs: int) -> tuple[list, dict]:
    """(name, report) in the order of the processes, ours around every peer; and why peers did not run."""
    pythons, not_run, reports = {}, {}, []
    for name in names:
        try:
            pythons[name] = install(name)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            not_run[name] = f"not installed: {error}"
    order = [OURS, *(name for peer in pythons for name in (peer, OURS))]
    for name in order:
        try:
            report = run(pythons.get(name, Path(sys.executable)), name, clicks, epochs)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if name == OURS:
                raise
            not_run[name] = str(error)
            continue
        print(f"{name:10}{report['epoch_s']} s   {report['peak_rss_gib']:.2f} GiB", flush=True)
        reports.append((name, report))
    return reports, not_run


def summarize(reports: list, not_run: dict) -> dict:
    """By model: medians, peak, ratio to our epochs in the processes directly before and after, and what differs."""
    rows = {}
    for name in dict.fromkeys(name for name, _ in reports):
        places = [n for n, (other, _) in enumerate(reports) if other == name]
        runs = [reports[n][1] for n in places]
        beside = [r for n in places for other, r in reports[max(n - 1, 0) : n + 2] if other == OURS]
        epoch_s, ours_s = _median(runs, "epoch_s"), _median(beside, "epoch_s")
        cpu_s, our_cpu_s = (median(r["cpu_s_per_epoch"] for r in part) for part in (runs, beside))
        rows[name] = {
            "model": MODELS[name],
            "s_per_epoch": round(epoch_s, 2),
            "times_ours": round(epoch_s / ours_s, 2),
            "cpu_s_per_epoch": round(cpu_s, 2),
            "cpu_times_ours": round(cpu_s / our_cpu_s, 2),
            "peak_rss_gib": max(r["peak_rss_gib"] for r in runs),
            "setup_s": median(r["setup_s"] for r in runs),
            "nll_after": round(median(r["nll_after"] for r in runs), 2),
            "differs": DIFFERENCES.get(name, []),
            "runs": runs,
        }
    for name, error in not_run.items():
        rows[name] = {"model": MODELS[name], "not_run": error, "differs": DIFFERENCES[name]}
    return rows


def _median(runs: list[dict], key: str) -> float:
    return median(value for run in runs for value in run[key])


def main(arguments: list[str]) -> None:
    """Install, measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench peers", description=__doc__)
    parser.add_argument("--users", type=int, help="only so many of the training users")
    parser.add_argument("--epochs", type=int, default=2, help="in each process")
    parser.add_argument("--threads", type=int, help="of every process; default: torch's own choice")
    parser.add_argument("--peer", choices=REQUIREMENTS, nargs="*", default=list(REQUIREMENTS))
    parser.add_argument("--name", default="peers_cpu", help="of the result file")
    parser.add_argument("--convert", action="store_true", help="compare logits; train nothing")
    options = parser.parse_args(arguments)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # the processes inherit it
    if options.convert:
        compare(install, [*options.peer, *WEIGHTS_ONLY])
        return
    with tempfile.TemporaryDirectory() as folder:
        clicks, arrays = Path(folder, "clicks.npz"), train_clicks(options.users)
        np.savez(clicks, **arrays)
        reports, not_run = measure(clicks, options.peer, options.epochs)
    n_users, n_items = arrays["shape"].tolist()
    result = {
        "machine": describe(),
        "data": {"name": DATA, "n_users": n_users, "n_items": n_items, "nnz": len(arrays["indices"]),
                 "users": "all training users" if options.users is None else f"the first {n_users} training users"},
        "settings": {"widths": [n_items, WIDTH, LATENT], "batch_size": BATCH_SIZE, "lr": 1e-3, "precision": "fp32",
                     "anneal_cap": ANNEAL_CAP, "total_anneal_steps": ANNEAL_STEPS, "epochs": options.epochs,
                     "threads": reports[0][1]["threads"],
                     "nll_after": f"nats per user, mean of the first {N_CHECKED} training users, after the last epoch"},
        "order": [name for name, _ in reports],
        "models": summarize(reports, not_run),
    }  # fmt: skip
    _print(result["models"])
    write(RESULTS / f"{options.name}.json", result)


def _print(rows: dict) -> None:
    for row in rows.values():
        if "not_run" in row:
            print(f"{row['model']:28}not run: {row['not_run']}")
            continue
        print(
            f"{row['model']:28}{row['s_per_epoch']:8.1f} s an epoch {row['times_ours']:7.2f} x ours "
            f"{row['cpu_s_per_epoch']:8.1f} s of processor {row['cpu_times_ours']:7.2f} x ours "
            f"{row['peak_rss_gib']:7.2f} GiB   nll {row['nll_after']:.1f}"
        )
