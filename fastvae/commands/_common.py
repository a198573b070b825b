"""What several commands do: the device, the run, its items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import console
from ..checkpoint import load_model
from ..clicks import Clicks
from ..data import Dataset, map_items
from ..dataset_folder import is_dataset_folder
from ..models import MultiDAE, MultiVAE
from ..run_folder import BEST, read_config


def device_named(name: str | None) -> torch.device:
    """The device that --device names; a GPU where there is one and None is named."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu where torch finds no GPU, got {name}")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu or cuda, got {name}") from None


def load_run(run: Path, tanh_after_dropout: bool) -> tuple[MultiVAE | MultiDAE, list[str] | None]:
    """Model and external item ids of a run folder's best checkpoint, or of a checkpoint file."""
    if not run.exists():
        raise ValueError(
            f"run must be a run folder or a checkpoint, got nothing at {run}; fastvae train writes one"
        )
    path = run / BEST if run.is_dir() else run
    if not path.exists():
        got = "a dataset folder" if is_dataset_folder(run) else f"a folder without {BEST}"
        raise ValueError(
            f"run must be a run folder or a checkpoint, got {got} at {run}; the run comes first"
        )
    return load_model(path, tanh_after_dropout, verbose=True)


def read_ids(where: str, name: str, path: Path | None) -> list[str] | None:
    """External ids of a text file, one a line; spaces are part of an id, empty lines are not ids. None stays None."""
    if path is None:
        return None
    return [line for line in read_lines(where, name, path) if line.strip()]


def read_lines(where: str, name: str, path: Path) -> list[str]:
    """The lines of a file of ids, without the empty ones at its end; a mark of the byte order is no part of the first."""
    if not path.is_file():
        got = f"a folder at {path}" if path.is_dir() else f"nothing at {path}"
        raise ValueError(f"{where}: {name} must be a file of ids, one a line, got {got}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"{where}: {name} must be a text file in UTF-8, got other bytes in {path}"
        ) from None
    # splitlines would also split at what stands within a name, such as U+2028
    return text.rstrip("\n").split("\n") if text.strip() else []


def check_items(run: Path, n_items: int, vocabulary: list[str] | None, items: Any) -> None:
    """ValueError unless a run has the items of the data."""
    if n_items != len(items):
        raise ValueError(
            f"checkpoint has {n_items} items, data has {len(items)}: {run} was trained on other data"
        )
    known = set(items if vocabulary is None else vocabulary)
    other = next((item for item in items if item not in known), None)
    if other is not None:
        raise ValueError(
            f"checkpoint has other items than the data, which has {other!r}: {run} was trained on other data"
        )


def new_model(
    command: str, model: str, hidden: str, latent: int, dropout: float, n_items: int
) -> MultiVAE | MultiDAE:
    """The model that the options of a command describe."""
    if model not in ("vae", "dae"):
        raise ValueError(f"{command}: model must be vae or dae, got {model}")
    try:
        widths = [] if hidden == "none" else [int(width) for width in hidden.split(",")]
    except ValueError:
        raise ValueError(
            f"{command}: hidden must be widths such as 600 or 1000,600, or none, got {hidden}"
        ) from None
    p_dims = [latent, *widths[::-1], n_items]
    dropout_enc = [dropout] + [0.0] * len(widths)
    try:
        return (MultiVAE if model == "vae" else MultiDAE)(p_dims, dropout_enc)
    except (RuntimeError, OverflowError, TypeError) as error:
        # torch's words for too many bytes
        raise ValueError(
            f"{command}: hidden and latent must be widths whose weights fit in memory, got {p_dims}"
        ) from error


def check_users(command: str, users: str) -> None:
    """ValueError unless users names held-out users."""
    if users not in ("test", "vad"):
        raise ValueError(f"{command}: users must be test or vad, got {users}")


def measured_clicks(
    run: Path, data: Dataset, users: str, n_items: int, vocabulary: list[str] | None
) -> tuple[Clicks, Clicks, Clicks]:
    """Train, fold-in and held-out clicks of a dataset in the order of a model's items."""
    check_items(run, n_items, vocabulary, data.items)
    _note_other_split(run, data)
    parts = data.test if users == "test" else data.validation
    # the checkpoint's order of the items counts, not the dataset's
    train, fold_in, held_out = (
        map_items(x, data.items, vocabulary or data.items)[0] for x in (data.train, *parts)
    )
    return train, fold_in, held_out


def _note_other_split(run: Path, data: Dataset) -> None:
    """A line on stderr where the run was trained on other users than the dataset's: test users may be among them."""
    folder = run.parent if run.name in ("best.pt", "last.pt") else run
    if not (folder / "config.json").is_file():
        return
    if read_config(folder).get("train") != data.train.fingerprint():
        console.note(
            f"{run} was trained on other clicks than this dataset's train users; users that it knows may be among "
            "those measured here"
        )
