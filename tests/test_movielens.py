"""fastvae.movielens: fetched once, cached, and whole or not there."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from data_helpers import pairs_of

from fastvae.events import read_events
from fastvae.movielens import movielens_100k, read_titles

pytest.importorskip("polars")

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n"


ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\n242\tKolya\t1996\n1\tM*A*S*H \"x\"\t\n"  # fmt: skip


def fake_pip(command, **_):
    """What pip download leaves behind."""
    folder = Path(command[command.index("--dest") + 1])
    with zipfile.ZipFile(folder / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", INTER)
        wheel.writestr("recbole/dataset_example/ml-100k/ml-100k.item", ITEM)


def test_movielens_is_fetched_once_and_then_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fake_pip)
    inter, item = movielens_100k()
    assert inter == tmp_path / "fastvae" / "ml-100k.inter"
    assert sorted(os.listdir(tmp_path / "fastvae")) == ["ml-100k.inter", "ml-100k.item"]
    monkeypatch.setattr(subprocess, "run", None)
    assert movielens_100k() == (inter, item)
    assert pairs_of(read_events(inter)) == [("196", "242")]
    assert read_titles(item) == {"242": "Kolya", "1": 'M*A*S*H "x"'}


def test_a_full_disk_leaves_no_half_of_movielens(tmp_path, monkeypatch):
    def full(path, content):
        is_second = path.name == "ml-100k.item"
        with open(path, "wb") as file:
            file.write(content[: len(content) // (1 + is_second)])
        if is_second:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(RuntimeError, match="could not fetch the data"):
            movielens_100k(tmp_path)
    assert "ml-100k.item" not in os.listdir(tmp_path)
    assert [path.read_text() for path in movielens_100k(tmp_path)] == [INTER, ITEM]


def test_without_a_network_movielens_says_so(tmp_path, monkeypatch):
    def no_network(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(RuntimeError) as error:
        movielens_100k(tmp_path)
    assert str(error.value) == (
        f"movielens_100k: pip could not fetch the data into {tmp_path} (CalledProcessError); "
        "check the network, or use events of your own"
    )
    assert os.listdir(tmp_path) == []
