"""Checkpoints in parts: where no process holds the item-sized tensors whole, each writes the rows of its own items.

    best.pt            a checkpoint without these tensors; its meta says which file has which items
    best.pt.parts-3/   a folder of torch.distributed.checkpoint: for each tensor and range of items a file of torch.save

The folder comes first, under a new name. Then best.pt, which names it, is replaced at once, and the folder of before goes: a
save that is killed leaves the last checkpoint whole.

torch.distributed.checkpoint's own index, .metadata, is a pickle, which its reader would run: it is written, for tools of
torch, and never read here. The meta says the same in JSON. So what is read is tensors by weights_only, any range of the
items at any number of processes, and one process needs no torch.distributed for it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._files import naming, sync

if TYPE_CHECKING:
    from .parallel import Processes

# as torch.distributed.checkpoint names them
_FILE = re.compile(r"__\d+_\d+\.distcp")


def folders_of(path: Path) -> list[Path]:
    """Folders of parts of the checkpoint at this path, whether it names them or not."""
    path = _at_its_end(path)
    named = re.compile(re.escape(path.name) + r"\.parts-\d+")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(p for p in beside if named.fullmatch(p.name) and p.is_dir())


def _at_its_end(path: Path) -> Path:
    """Where a link leads to: there the checkpoint is replaced."""
    return Path(os.path.realpath(path))


def remove_folders(path: Path, keep: str | None) -> None:
    """Remove the folders of parts of the checkpoint at this path, but the one of this name."""
    for folder in folders_of(path):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def written(
    processes: Processes, path: Path, tensors: Mapping[str, tuple[Tensor, int]], n_items: int
) -> Iterator[dict[str, Any]]:
    """Write a folder of parts for the checkpoint at path, and yield what its meta says of it; collective.

    tensors  by name, this process' items of each, and the dimension that they are in

    Where the block fails, the folder goes again.
    Raises: in all processes, what the first that cannot write raises.
    """
    with processes.together():
        taken = [int(folder.name.rsplit("-", 1)[1]) for folder in folders_of(path)]
    name = processes.objects(f"{path.name}.parts-{max(taken, default=-1) + 1}")[0]
    folder = _at_its_end(path).with_name(name)
    try:
        yield {"folder": name, "tensors": _save(processes, folder, tensors, n_items)}
    except BaseException:
        if processes.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _save(
    processes: Processes, folder: Path, tensors: Mapping[str, tuple[Tensor, int]], n_items: int
) -> dict[str, Any]:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    shapes = {name: _resized(t.shape, axis, n_items) for name, (t, axis) in tensors.items()}
    first = processes.share(n_items).start
    # a file for each tensor: torch.load reads it by itself
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    axes = {name: axis for name, (_, axis) in tensors.items()}
    with naming(folder):
        try:
            saved = dcp.save(
                {name: t.detach() for name, (t, _) in tensors.items()},
                storage_writer=writer,
                planner=_planner(axes, shapes, first),
                process_group=processes.group,
            )
        except CheckpointException as error:
            failed = error.failures
            raise failed[min(failed)][0] from None
    if processes.rank == 0:
        sync(folder)
    found: dict[str, dict[str, Any]] = {}
    for name, axis in axes.items():
        found[name] = {"shape": shapes[name], "axis": axis, "parts": []}
    for index, place in saved.storage_data.items():
        tensor = found[index.fqn]
        tensor["parts"].append([index.offset[tensor["axis"]], place.relative_path])
    for tensor in found.values():
        tensor["parts"].sort()
    return found


def _planner(axes: dict[str, int], shapes: dict[str, list[int]], first: int) -> Any:
    """What tells torch.distributed.checkpoint that a tensor is a range of a larger one."""
    from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, metadata, planner

    class RangePlanner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            items = []
            for name, t in self.state_dict.items():
                # a process without items has nothing to write
                if t.shape[axes[name]] == 0:
                    continue
                offsets = torch.Size(_resized([0] * t.ndim, axes[name], first))
                whole = planner.TensorWriteData(
                    chunk=metadata.ChunkStorageMetadata(offsets, t.shape),
                    properties=metadata.TensorProperties.create_from_tensor(t),
                    size=torch.Size(shapes[name]),
                )
                index = metadata.MetadataIndex(name, offsets)
                kind = planner.WriteItemType.SHARD
                items.append(planner.WriteItem(index, kind, tensor_data=whole))
            self.plan = SavePlan(items)
            return self.plan

        def lookup_object(self, index: Any) -> Tensor:
            return self.state_dict[index.fqn]

    return RangePlanner(flatten_state_dict=False)


def _resized(shape: Any, axis: int, size: int) -> list[int]:
    return [size if n == axis else old for n, old in enumerate(shape)]


def read_parts(
    path: Path, meta: Any, items: slice | None, load: Callable[[Path], Any]
) -> dict[str, Tensor]:
    """The tensors of the parts of the checkpoint at path, of all items or of these.

    meta    what written() gave; it comes from a file, and is looked at as such
    load    reads a file of one tensor
    Raises: ValueError where the parts are not what the meta says.
    """
    name = meta["folder"]
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.parts-\d+", name):
        raise ValueError("a folder of another name")
    folder = _at_its_end(path).with_name(name)
    if not folder.is_dir():
        raise ValueError(f"no folder {name} beside it, which belongs to it")
    tables = {key: _checked(folder, table) for key, table in meta["tensors"].items()}
    files = [file for _, _, parts in tables.values() for _, _, file in parts]
    if len(set(files)) < len(files):
        raise ValueError("a part that is taken twice")
    return {key: _read(folder, table, items, load) for key, table in tables.items()}


def _checked(folder: Path, table: Any) -> tuple[list[int], int, list[tuple[int, int, str]]]:
    """Shape, dimension of the items, and the ranges with their files, in order; no larger than the files are."""
    shape, axis = [int(size) for size in table["shape"]], int(table["axis"])
    if min(shape) < 0 or not 0 <= axis < len(shape):
        raise ValueError("parts without a shape")
    firsts = [int(first) for first, _ in table["parts"]]
    bounds = [*firsts, shape[axis]]
    # nothing missing, nothing twice
    if bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError("parts that do not make a whole")
    parts = []
    for (first, last), (_, file) in zip(pairwise(bounds), table["parts"], strict=True):
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise ValueError("a part of another name")
        n_bytes = 4 * math.prod(_resized(shape, axis, last - first))
        if n_bytes > (folder / file).stat().st_size:
            raise ValueError(f"{file} in {folder.name} cut short")
        parts.append((first, last, file))
    return shape, axis, parts


def _read(folder: Path, table: Any, items: slice | None, load: Callable[[Path], Any]) -> Tensor:
    shape, axis, parts = table
    own = slice(0, shape[axis]) if items is None else items
    if own.stop > shape[axis]:
        raise ValueError(f"parts of {shape[axis]} items")
    size = _resized(shape, axis, own.stop - own.start)
    # item by item in memory, as the weights are
    laid_out = size[::-1] if axis == 1 else size
    found = torch.empty(laid_out, dtype=torch.float32, device="cpu")
    found = found.t() if axis == 1 else found
    for first, last, file in parts:
        begin, end = max(first, own.start), min(last, own.stop)
        if begin >= end:
            continue
        try:
            t = load(folder / file)
        except OSError:
            raise
        # torch's own words would advise to run what is in it
        except Exception as error:
            raise ValueError(f"{file} in {folder.name} that torch cannot read so") from error
        if not isinstance(t, Tensor) or list(t.shape) != _resized(shape, axis, last - first):
            raise ValueError(f"{file} in {folder.name} with something else in it")
        found.narrow(axis, begin - own.start, end - begin).copy_(
            t.narrow(axis, begin - first, end - begin)
        )
    return found
