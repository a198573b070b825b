"""Checkpoints: tensors and JSON in one torch file, read with weights_only, so that no code in it can run.

    {"meta": JSON text (format, model, config, items), "model": state_dict, ...what a resume needs}

A plain state_dict of other Mult-VAE code with the same keys is read too; its model is inferred from the shapes.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ._checks import check_ids
from ._files import replacing
from .models import MultiDAE, MultiVAE

FORMAT = 1
_WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")
_MODELS: dict[str, type[MultiVAE] | type[MultiDAE]] = {"MultiVAE": MultiVAE, "MultiDAE": MultiDAE}


def write_checkpoint(
    path: str | os.PathLike[str],
    model: MultiVAE | MultiDAE,
    items: Sequence[str] | None = None,
    **state: Any,
) -> None:
    """Write a model, the external ids of its items, and any further tensors and numbers; all or nothing.

    Raises: OSError (a full disk, say) with the file's name; whatever stood at path is still there then.
    """
    meta = {
        "format": FORMAT,
        "model": type(model).__name__,
        "config": model.config(),
        "items": None
        if items is None
        else [str(item) for item in check_ids("checkpoint", "items", items)],
    }
    parts = {"meta": json.dumps(meta), "model": model.state_dict(), **state}
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(parts, file)
        except RuntimeError as error:
            # torch's writer says "unexpected pos" where the disk said that it is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parts of a checkpoint on the CPU, with "meta" as a dictionary; {"model": ...} alone for a plain state_dict.

    Raises: ValueError for a file that is no checkpoint, is damaged, would run code, or has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"checkpoint: path must be a file, got {path}; fastvae train writes best.pt into its run folder"
        )
    try:
        _check_archive(path)
        parts = torch.load(path, map_location="cpu", weights_only=True)
        _check_size(parts, path.stat().st_size)
    except Exception as error:  # whatever a foreign file provokes, it is refused in one sentence
        raise ValueError(
            f"checkpoint: {path} must be a whole checkpoint of tensors and JSON, got a file that torch cannot read so"
        ) from error
    if _is_state_dict(parts):
        # DistributedDataParallel, DataParallel and torch.compile put their own name in front
        return {"model": {_WRAPPED.sub("", key): value for key, value in parts.items()}}
    if not isinstance(parts, dict) or not _is_state_dict(parts.get("model")):
        got = f"the keys {', '.join(map(repr, parts))}"[:120] if isinstance(parts, dict) else "none"
        raise ValueError(
            f"checkpoint: {path} must hold a model's state_dict, got {got}; torch.save the state_dict alone"
        )
    try:
        meta = json.loads(parts["meta"])
        version = meta["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"checkpoint: {path} must say its format, got a file without") from None
    if version != FORMAT:
        raise ValueError(
            f"checkpoint: {path} must have format {FORMAT}, got {version}; use the fastvae version that wrote it"
        )
    return parts | {"meta": meta}


def load_model(
    path: str | os.PathLike[str], tanh_after_dropout: bool = False
) -> tuple[MultiVAE | MultiDAE, list[str] | None]:
    """A model in eval mode on the CPU, and the external ids of its items where the file holds them.

    path                a checkpoint of fit(), or torch.save(model.state_dict()) of other code with the same keys
    tanh_after_dropout  for a plain state_dict only: see MultiVAE
    Raises: ValueError where the file is no such thing.
    """
    parts = read_checkpoint(path)
    weights, meta = parts["model"], parts.get("meta")
    try:
        if meta is None:
            model = _infer(weights, tanh_after_dropout)
        else:
            if 2 * sum(len(meta["config"][dims]) - 1 for dims in ("p_dims", "q_dims")) != len(
                weights
            ):
                raise ValueError("another number of layers")
            with torch.device("meta"):  # no memory before the shapes have been compared
                model = _MODELS[meta["model"]](**meta["config"])
        if not all(value.is_floating_point() for value in weights.values()):
            raise ValueError("weights that are no floating point numbers")
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        if shapes != (got := {key: value.shape for key, value in weights.items()}):
            other = next(key for key in [*shapes, *got] if shapes.get(key) != got.get(key))
            raise ValueError(f"{other} is {_shape(got, other)}, not {_shape(shapes, other)}")
        items = None if meta is None else _item_ids(meta.get("items"), model.n_items)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # keys of the file may hold anything
        raise ValueError(
            f"checkpoint: {path} must fit MultiVAE or MultiDAE, got another model ({reason})"
        ) from error
    # float32 whatever torch's default is
    model.float().to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval(), items


def _shape(shapes: Mapping[str, torch.Size], key: str) -> str:
    return str(list(shapes[key])) if key in shapes else "missing"


def _is_state_dict(parts: Any) -> bool:
    return (
        isinstance(parts, Mapping)
        and len(parts) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in parts.items())
    )


def _check_archive(path: Path) -> None:
    """Refuse an archive with paths outside, or that unpacks to more than its own size."""
    if not zipfile.is_zipfile(path):
        return  # torch before 1.6 wrote no archive; torch.load compares the sizes in such a file
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"a path outside, {member.filename!r}")
            if (
                member.compress_type != zipfile.ZIP_STORED
                or member.file_size != member.compress_size
            ):
                raise ValueError(f"a compressed member, {member.filename!r}")
        if damaged := archive.testzip():  # torch compares no checksums
            raise ValueError(f"another checksum in {damaged!r}")


def _check_size(parts: Any, n_bytes: int) -> None:
    """Refuse tensors that claim more than the file has: a stride of 0 makes 10**12 rows of one number."""
    total = 0
    for tensor in _tensors(parts):
        if tensor.layout != torch.strided:
            raise ValueError("a sparse tensor")
        total += tensor.numel() * tensor.element_size()
    if total > n_bytes:
        raise ValueError(f"tensors of {total} bytes in a file of {n_bytes}")


def _tensors(parts: Any) -> Iterator[Tensor]:
    waiting: list[Any] = [parts]
    # a list that holds itself, or one list a thousand times, is met once
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, Mapping | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            waiting.extend(part.values() if isinstance(part, Mapping) else part)


def _item_ids(items: Any, n_items: int) -> list[str] | None:
    if items is None:
        return None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError("item ids that are no text")
    if len(items) != n_items:
        raise ValueError(f"{len(items)} item ids for {n_items} items")
    if not all(item.strip() for item in items):
        raise ValueError("an empty item id")
    if len(set(items)) < len(items):
        again = next(item for item, times in Counter(items).items() if times > 1)
        raise ValueError(f"the item id {again[:40]!r} twice")
    return items


def _infer(weights: Mapping[str, Tensor], tanh_after_dropout: bool) -> MultiVAE | MultiDAE:
    """The model with these shapes, on the meta device."""
    q_dims, p_dims = (_widths(weights, part) for part in ("encode.q_layers", "decode.p_layers"))
    two_heads = q_dims[-1] == 2 * p_dims[0]
    if two_heads:
        q_dims[-1] //= 2
    with torch.device("meta"):
        make = MultiVAE if two_heads else MultiDAE
        return make(p_dims, q_dims=q_dims, tanh_after_dropout=tanh_after_dropout)


def _widths(weights: Mapping[str, Tensor], part: str) -> list[int]:
    pattern = re.compile(re.escape(part) + r"\.linear_(\d+)\.weight")
    layers = sorted((int(m[1]), key) for key in weights if (m := pattern.fullmatch(key)))
    if not layers:
        raise ValueError(f"no {part}.linear_0.weight in it")
    shapes = [weights[key].shape for _, key in layers]
    return [shapes[0][1], *(shape[0] for shape in shapes)]
