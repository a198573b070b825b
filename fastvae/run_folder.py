"""The run folder of fit(): the names of its files, what each holds, and who may write to it.

    config.json    settings, model, data             metrics.jsonl  a line per epoch
    best.pt        best validation NDCG@100          last.pt        where to resume
    curve.png      loss and NDCG@100 by epoch

and beside a checkpoint in parts its folder, see _checkpoint_parts.py.

Tensors and JSON only. One training at a time holds the folder; a killed one leaves nothing that the next cannot use.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._checkpoint_parts import folders_of
from ._checks import shown
from ._files import locked, naming, remove_leftovers, write_text
from .checkpoint import read_checkpoint, write_checkpoint
from .clicks import Clicks
from .models import MultiDAE, MultiVAE

METRIC = "ndcg@100"  # decides which epoch is best
CONFIG, METRICS, BEST, LAST, CURVE = (
    "config.json", "metrics.jsonl", "best.pt", "last.pt", "curve.png",
)  # fmt: skip
# what runs of older versions do not say, as they could not choose
_SINCE = {
    "normalize_input": True, "activation": "tanh", "lr_schedule": "constant", "weight_decay": 0.0,
    "clip_grad_norm": None, "total_lr_steps": None,
}  # fmt: skip
_BEFORE_A_CHECKPOINT = {CONFIG, METRICS, BEST}
_MAX_JSON = 2**20  # bytes of config.json; ours have five hundred


class RunFolder:
    """A run's files, and the advice of messages about it.

    path        the folder, which claimed() makes or checks
    model       the one to train: its weights go to the checkpoints, its arguments to config.json
    settings    of fit, as JSON values; a resumed run must have the same
    limits      epochs and patience, for config.json; a resumed run may have others
    train, validation  the clicks, whose digests tell a resumed run that they are the same
    items       external ids for the checkpoints, or None; a resumed run without takes those it had
    """

    def __init__(
        self,
        path: Path,
        model: MultiVAE | MultiDAE,
        settings: dict[str, Any],
        train: Clicks,
        validation: tuple[Clicks, Clicks] | None,
        items: Sequence[str] | None,
        limits: dict[str, int] | None = None,
    ):
        _check_reloadable(model)
        self.path, self.model, self.items = path, model, items
        self.limits = limits or {}
        self.best, self.last = path / BEST, path / LAST
        self.config = {
            "model": type(model).__name__,
            **model.config(),
            "n_users": train.n_users,
            **settings,
            "train": train.fingerprint(),
            "validation": validation and [clicks.fingerprint() for clicks in validation],
        }

    @contextlib.contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """Make the folder, or check that it can be resumed, and keep a second training out of it for the block."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"fit: run_dir must be a folder, got a file at {self.path}")
        if resume and not self.path.exists():
            raise ValueError(f"fit: run_dir must hold a run to resume, got nothing at {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            self._check_resume() if resume else self._start()
            yield

    def _start(self) -> None:
        """The folder must be new, empty, or left by a run that died before its first checkpoint."""
        if self.last.exists():
            raise ValueError(
                f"fit: run_dir must be a new folder, got {self.path} with a run in it; "
                "resume that run or name another folder"
            )
        self._remove_leftovers()
        names = {path.name for path in self.path.iterdir()}
        # of a save that was killed; the next save removes them
        for path in (self.best, self.last):
            names -= {folder.name for folder in folders_of(path)}
        if names and not (names <= _BEFORE_A_CHECKPOINT and self._is_ours()):
            foreign = sorted(names - _BEFORE_A_CHECKPOINT or names)[:3]
            raise ValueError(
                f"fit: run_dir must be a new or empty folder, got {self.path} with "
                f"{', '.join(foreign)} in it; name another folder"
            )
        write_text(self.path / CONFIG, json.dumps(self.config | self.limits, indent=2) + "\n")
        self.rewrite_metrics([])

    def _is_ours(self) -> bool:
        mine = set(self.config) - set(_SINCE)
        return (self.path / CONFIG).exists() and mine <= set(read_config(self.path))

    def _remove_leftovers(self) -> None:
        remove_leftovers(self.path, _BEFORE_A_CHECKPOINT | {LAST})

    def _check_resume(self) -> None:
        """ValueError unless the folder holds a run of the same settings."""
        for name in (LAST, CONFIG):
            if not (self.path / name).exists():
                raise ValueError(
                    f"fit: run_dir must hold a run to resume, got {self.path} without {name}; "
                    "train without resume, in a new folder"
                )
        then = _SINCE | read_config(self.path)
        for name, value in self.config.items():
            if then.get(name) == value:
                continue
            if name in ("train", "validation"):
                got = "none" if value is None else "others"
                raise ValueError(f"fit: {name} must be the clicks of the run to resume, got {got}")
            old = then.get(name)
            if name == "normalize":  # which fit calls per_click
                name, old, value = "per_click", old == "clicks", value == "clicks"
            raise ValueError(f"fit: {name} must be {old} as in the run to resume, got {value}")
        self._remove_leftovers()

    def take_items(self, then: list[str] | None) -> None:
        """The items of the run to resume; ValueError where others, or the same in another order, are given."""
        if then is None and self.items is not None:
            raise ValueError("fit: items must be None as in the run to resume, got ids")
        if then is None or self.items is None:
            self.items = then
            return
        for n, (old, new) in enumerate(zip(then, self.items, strict=False)):
            if old != str(new):
                raise ValueError(
                    f"fit: items must be those of the run to resume, in its order, got {str(new)!r} "
                    f"for {old!r} at position {n}; pass the data of that run"
                )

    def write_best(self) -> None:
        """The weights as they are, as those of the best epoch."""
        self._write_checkpoint(self.best)

    def read_best(self) -> dict[str, Any]:
        """Weights of the best epoch. Raises: ValueError where there is no such checkpoint."""
        return self._read_checkpoint(self.best)["model"]

    def write_last(self, **state: Any) -> None:
        """The weights as they are, and the state that a resume needs besides."""
        self._write_checkpoint(self.last, **state)

    def read_last(self) -> dict[str, Any]:
        """What write_last wrote; its items are compared with those given."""
        state = self._read_checkpoint(self.last)
        self.take_items(state.get("meta", {}).get("items"))
        return state

    # what is done otherwise where several processes hold the weights

    def _write_checkpoint(self, path: Path, **state: Any) -> None:
        write_checkpoint(path, self.model, self.items, **state)

    def _read_checkpoint(self, path: Path) -> dict[str, Any]:
        return read_checkpoint(path)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add an epoch's line."""
        path = self.path / METRICS
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewrite_metrics(self, history: list[dict[str, Any]]) -> None:
        """All lines anew: a kill between a line and its checkpoint leaves one too many."""
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in history))

    def draw_curve(self, history: list[dict[str, Any]]) -> None:
        """Write the learning curve, where matplotlib (extra cli) is there."""
        if not history:
            return
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        epoch = [row["epoch"] for row in history]
        axis.plot(epoch, [row["loss"] for row in history], color="tab:blue", marker=".")
        axis.set(xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        # a folder's name may hold $, which is no formula
        axis.set_title(f"{self.config['model']}, {self.path.name}", parse_math=False)
        axis.set_ylabel("training loss (nats per user)", color="tab:blue")
        if METRIC in history[0]:
            right = axis.twinx()
            right.plot(epoch, [row[METRIC] for row in history], color="tab:orange", marker=".")
            right.set_ylabel("validation NDCG@100", color="tab:orange")
        figure.savefig(self.path / CURVE, dpi=120)


def _check_reloadable(model: MultiVAE | MultiDAE) -> None:
    """TypeError or ValueError unless load_model could make the model again from its weights and arguments."""
    if type(model) not in (MultiVAE, MultiDAE):
        raise TypeError(
            f"fit: model must be a MultiVAE or MultiDAE itself where run_dir is given, got {type(model).__name__}; "
            "load_model could not make it again"
        )
    with torch.device("meta"):
        again = type(model)(**model.config())
    plain = again.state_dict()
    shapes = {key: getattr(value, "shape", None) for key, value in model.state_dict().items()}
    for key in dict.fromkeys([*shapes, *plain]):
        if key not in plain or shapes.get(key) != plain[key].shape:
            what = "lacks" if key not in shapes else "has" if key not in plain else "reshapes"
            raise ValueError(
                f"fit: model must have the weights of a plain {type(model).__name__} where run_dir is given, got one "
                f"that {what} {key}; load_model could not make it again"
            )
    parts = dict(model.named_modules())
    for name, part in again.named_modules():
        _check_part(name or type(model).__name__, parts[name], part)


def _check_part(name: str, part: nn.Module, plain: nn.Module) -> None:
    """ValueError unless part of a model computes what plain does with the same weights."""
    hooked = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
    if hooked or type(part).forward is not type(plain).forward:
        raise ValueError(
            f"fit: model must have plain layers where run_dir is given, got {name} of another class or with hooks; "
            "load_model could not make it again"
        )
    for setting, value in vars(plain).items():
        is_plain = isinstance(value, bool | int | float | str | list)
        if is_plain and setting[0] != "_" and setting != "training":
            now = getattr(part, setting)
            if now != value:
                raise ValueError(
                    f"fit: model must be as its arguments say where run_dir is given, got {setting} {shown(now)} for "
                    f"{shown(value)} in {name}; load_model could not make it again"
                )


def planned_in(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """These settings of a run to resume, those of them that its config.json holds; none where there is no such run."""
    if not (folder / CONFIG).exists():
        return {}
    then = read_config(folder)
    return {name: then[name] for name in names if then.get(name) is not None}


def advice(run: RunFolder | None) -> str:
    """What to do about a loss that is not finite."""
    if run is None or not run.last.exists():
        return "lower lr"
    return f"lower lr; the last good checkpoint is {run.last}"


def interrupt_message(run: RunFolder | None, epoch: int, batch: int) -> str:
    """Where an interrupted run stands."""
    where = f"stopped after {epoch} epochs" + (f" and {batch} batches" if batch else "")
    return where if run is None else f"{where}; saved in {run.last}, resume to go on"


def _locked(folder: Path) -> contextlib.ExitStack:
    """Hold the folder's lock."""
    try:
        return locked(folder)
    except BlockingIOError:
        raise ValueError(
            f"fit: run_dir must be a folder that no other training writes to, got {folder}; "
            "wait for that one to end, or name another folder"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises: ValueError where it is not there or no such thing."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_JSON else None
    except (ValueError, RecursionError, OSError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            f"run: {path} must be a run's settings in JSON, got something else; "
            "put the file back, or train anew in another folder"
        )
    return config
