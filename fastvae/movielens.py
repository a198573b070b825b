"""MovieLens-100K for the demo: fetched once, then cached; and the titles of its films."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .event_table import open_table


def movielens_100k(cache: str | os.PathLike | None = None) -> tuple[Path, Path]:
    """Paths of MovieLens-100K's events (ml-100k.inter) and films (ml-100k.item); fetched once, then from the cache.

    cache  folder; default fastvae in $XDG_CACHE_HOME or ~/.cache

    The data may be used for research, not redistributed (GroupLens), so it is not part of this package: it is taken
    out of the recbole 1.2.1 wheel, which pip downloads. Raises: RuntimeError where that fails.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvae"
    cache = Path(cache)
    paths = cache / "ml-100k.inter", cache / "ml-100k.item"
    if all(path.is_file() for path in paths):
        return paths
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download_wheel("recbole==1.2.1", folder)
            wheel = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                for path in paths:
                    part = Path(folder, path.name)
                    part.write_bytes(archive.read(f"recbole/dataset_example/ml-100k/{path.name}"))
                    os.replace(part, path)
    except (
        OSError,
        subprocess.SubprocessError,
        zipfile.BadZipFile,
        KeyError,
        StopIteration,
    ) as error:
        raise RuntimeError(
            f"movielens_100k: pip could not fetch the data into {cache} ({type(error).__name__}); "
            "check the network, or use events of your own"
        ) from error
    return paths


def _download_wheel(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", folder, requirement]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def read_titles(
    path: str | os.PathLike, item: str | None = None, title: str | None = None
) -> dict[str, str]:
    """Item id -> title from a table that `read_events` could read, such as ml-100k.item; later rows win."""
    table = open_table(path, None, None, (item, title))
    frame = table.collect({"item": table.find("item", item), "title": table.find("title", title)})
    return dict(frame.drop_nulls().iter_rows())
