"""Checkpoints: tensors and JSON in one torch file, read with weights_only, so that no code in it can run.

    {"meta": JSON text (format, model, config, items), "model": state_dict, ...what a resume needs}

Item-sized tensors that several processes hold in ranges may lie in a folder beside it: see _checkpoint_parts.py. A plain
state_dict is read too, of ours or of other Mult-VAE code: see convert.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from . import _checkpoint_parts
from ._checks import check_choice, check_flag, check_ids
from ._files import replacing
from ._layers import ACTIVATIONS
from .convert import converted, is_npz, line_to_save, pickled_names, read_npz
from .models import MultiDAE, MultiVAE

FORMAT, FORMAT_IN_PARTS = 1, 2
# what torch.load with weights_only says of code that a pickle would run
_CODE = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")
# modules that a pickled state_dict names too
_OF_STATE_DICTS = ("torch", "collections", "numpy", "_codecs")
_OPTIONS = ("tanh_after_dropout", "activation", "normalize_input")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# builtins are __builtin__ in Python 2, and in protocol 2
_SYSTEM = sys.stdlib_module_names | {"__builtin__"}
_MODELS: dict[str, type[MultiVAE] | type[MultiDAE]] = {"MultiVAE": MultiVAE, "MultiDAE": MultiDAE}


def write_checkpoint(
    path: str | os.PathLike[str],
    model: MultiVAE | MultiDAE,
    items: Sequence[str] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    parts: Mapping[str, Any] | None = None,
    **state: Any,
) -> None:
    """Write a model (with these weights where given), the external ids of its items, and any further tensors and numbers; all or nothing.

    parts  what the checkpoint says of a folder beside it that holds the other tensors, see _checkpoint_parts.py

    Raises: OSError (a full disk, say) with the file's name; whatever stood at path is still there then.
    """
    path = Path(path)
    meta = {
        "format": FORMAT if parts is None else FORMAT_IN_PARTS,
        "model": type(model).__name__,
        "config": model.config(),
        "items": None
        if items is None
        else [str(item) for item in check_ids("checkpoint", "items", items)],
    }
    if parts is not None:
        meta["parts"] = parts
    weights = model.state_dict() if weights is None else weights
    content = {"meta": json.dumps(meta), "model": weights, **state}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer says "unexpected pos" where the disk said that it is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    _checkpoint_parts.remove_folders(path, None if parts is None else parts["folder"])


def read_checkpoint(path: str | os.PathLike[str], items: slice | None = None) -> dict[str, Any]:
    """The parts of a checkpoint on the CPU, with "meta" as a dictionary; {"model": ...} alone for plain weights.

    items  of tensors that lie in a folder beside it read these items only; others are given whole

    Raises: ValueError for a file that is no checkpoint, is damaged, would run code, or has another format.
    """
    path = Path(path)
    parts = _content(path)
    if "meta" in parts and parts["meta"]["format"] == FORMAT_IN_PARTS:
        _take_in(path, parts, items)
    return parts


def _content(path: Path) -> dict[str, Any]:
    """As read_checkpoint, but for the tensors in a folder beside it."""
    if not path.is_file():
        raise ValueError(
            f"checkpoint: path must be a file, got {path}; fastvae train writes best.pt into its run folder"
        )
    try:
        parts = _read(path)
    except Exception as error:  # whatever a foreign file provokes, it is refused in one sentence
        _refuse_pickled(path, error)
        raise ValueError(
            f"checkpoint: {path} must be a whole checkpoint of tensors and JSON, got {_unreadable(path)}"
        ) from error
    parts = _unwrapped(parts)
    if _is_state_dict(parts):
        return {"model": dict(parts)}
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
    if version not in (FORMAT, FORMAT_IN_PARTS):
        raise ValueError(
            f"checkpoint: {path} must have format {FORMAT} or {FORMAT_IN_PARTS}, got {version}; "
            "use the fastvae version that wrote it"
        )
    return parts | {"meta": meta}


def _unreadable(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile):
        if is_npz(path):
            return "arrays that are compressed or no plain numbers; np.savez writes others"
    if path.suffix == ".safetensors":
        return "safetensors' format; torch.save(safetensors.torch.load_file(file), path) writes torch's"
    return "a file that torch cannot read so"


def _unwrapped(parts: Any) -> Any:
    """A state_dict out of the dictionary, or the dictionaries in each other, that trainers save with their own state."""
    for _ in range(4):  # one may hold itself
        if not isinstance(parts, Mapping) or "meta" in parts:
            break
        inner = (parts[key] for key in _WRAPPERS if isinstance(parts.get(key), Mapping))
        parts = next(inner, parts)
    return parts


def _take_in(path: Path, parts: dict[str, Any], items: slice | None) -> None:
    """Put the tensors of the folder beside a checkpoint where they belong in it."""
    try:
        tensors = _checkpoint_parts.read_parts(path, parts["meta"]["parts"], items, _read)
        for name, t in tensors.items():
            *keys, last = name.split("/")
            place: Any = parts
            for key in keys:
                place = place[int(key) if key.isdecimal() else key]
            place[last] = t
    # whatever a foreign folder provokes
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"checkpoint: {path} must be whole with its folder, got another ({reason}); "
            "copy both together"
        ) from error


def _read(path: Path) -> Any:
    _check_archive(path)
    if is_npz(path):
        parts: Any = read_npz(path)
    else:
        # it warns of a pickle's protocol, and then refuses it or not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = torch.load(path, map_location="cpu", weights_only=True)
    _check_size(parts, path.stat().st_size)
    return parts


def _refuse_pickled(path: Path, error: Exception) -> None:
    """Of an object of other code, say how its weights are had; a pickle that names the system's is left unnamed."""
    try:
        names, bare = pickled_names(path)
    except Exception:  # whatever a foreign file provokes
        names, bare = [], False
    code = _CODE.search(str(error))
    others = [name for name in names if name.split(".")[0] not in _OF_STATE_DICTS]
    others += [code[1]] if code else []
    # a state_dict that pickle wrote itself
    others += [name for name in names if bare and name.startswith("torch.")]
    module = others[0].split(".")[0] if others else "builtins"
    if module not in _SYSTEM:
        raise ValueError(
            f"checkpoint: {path} must hold tensors and JSON, got a pickle of {others[0][:80]}, which would run code; "
            f"where you trust it and have that code, run: {line_to_save(path, module, bare)}"
        ) from error


def load_model(
    path: str | os.PathLike[str],
    tanh_after_dropout: bool = False,
    *,
    activation: str | None = None,
    normalize_input: bool | None = None,
    verbose: bool = False,
) -> tuple[MultiVAE | MultiDAE, list[str] | None]:
    """A model in eval mode on the CPU, and the external ids of its items where the file holds them.

    path     a checkpoint of fit(); or plain weights: torch.save(model.state_dict()) of ours, RecoTour, vae-cf-pytorch,
             RecBole, rectorch, Cornac, WarpRec, RePlay or RecPack, an .npz of the paper's TensorFlow code
    tanh_after_dropout, activation, normalize_input
             for plain weights, whose file does not say: see MultiVAE; None is what that code computes. A checkpoint of
             fit() says itself, and others than its own are refused
    verbose  say on stderr what plain weights were recognised as
    Raises: ValueError where the file is no such thing, or its weights are plain and not finite.
    """
    parts = read_checkpoint(path)
    weights, meta = parts["model"], parts.get("meta")
    _check_options(tanh_after_dropout, activation, normalize_input)
    if meta is not None:
        _check_against(path, meta, tanh_after_dropout or None, activation, normalize_input)
    try:
        if meta is None:
            other = converted(weights, tanh_after_dropout, activation, normalize_input)
            model, weights = other.model, other.weights
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
            key = next(key for key in [*shapes, *got] if shapes.get(key) != got.get(key))
            raise ValueError(f"{key} is {_shape(got, key)}, not {_shape(shapes, key)}")
        items = None if meta is None else _item_ids(meta.get("items"), model.n_items)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # keys of the file may hold anything
        raise ValueError(
            f"checkpoint: {path} must fit MultiVAE or MultiDAE, got another model ({reason})"
        ) from error
    if meta is None:
        _check_finite(path, weights)
        if verbose:
            print(f"{path}: {other}", file=sys.stderr)
    # float32 whatever torch's default is
    model.float().to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval(), items


def _check_options(tanh_after_dropout: Any, activation: Any, normalize_input: Any) -> None:
    check_flag("checkpoint", "tanh_after_dropout", tanh_after_dropout)
    if activation is not None:
        check_choice("checkpoint", "activation", activation, tuple(ACTIVATIONS))
    if normalize_input is not None:
        check_flag("checkpoint", "normalize_input", normalize_input)


def _check_against(path: Any, meta: Any, *options: Any) -> None:
    """Refuse an option that is given and is another than the checkpoint's own, which would be left unheard."""
    config = meta.get("config")
    for name, given in zip(_OPTIONS, options, strict=True):
        if given is not None and isinstance(config, dict) and config.get(name, given) != given:
            raise ValueError(
                f"checkpoint: {name} must be {config[name]!r}, which {path} says, got {given!r}; "
                "leave it out, or convert the plain weights anew"
            )


def _check_finite(path: Any, weights: Mapping[str, Tensor]) -> None:
    for key, weight in weights.items():
        if not weight.float().isfinite().all():
            raise ValueError(
                f"checkpoint: {path} must hold finite float32 weights, got nan or inf in {key[:80]}; "
                "take weights from before the loss diverged"
            )


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
    # RecPack's have two names for each
    if total > 2 * n_bytes:
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
