"""Files of recommendations read back, and appear whole or not at all."""

import csv
import json
import os
import sys

import numpy as np
import pytest
import torch
from helpers import Fixed, Labelled, run_child

from fastvae.clicks import Clicks
from fastvae.evaluate import Popularity
from fastvae.events import Events
from fastvae.export import Written, recommend_to_file, write_recommendations
from fastvae.recommend import Recommendations, recommend, recommend_blocks

INF = float("inf")

ITEMS = ["plain", 'quo"te', "com,ma", "new\nline", "carriage\rreturn", " space ", "Amélie 映画"]
USERS = ['u"1', "u,2", "ü\n3"]


@pytest.fixture
def found():
    torch.manual_seed(0)
    items = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, 0, 5, -1]])
    return Recommendations(items, torch.randn(3, 4).where(items >= 0, torch.tensor(-INF)), ITEMS)


def expected_rows(found):
    return [
        (user, rank, item, score)
        for user, row in zip(USERS, found, strict=True)
        for rank, (item, score) in enumerate(row, 1)
    ]


def test_csv_reads_back(found, tmp_path):
    assert write_recommendations(tmp_path / "top.csv", USERS, found) == 3
    with open(tmp_path / "top.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["user", "rank", "item", "score"]
    assert [(u, int(r), i, float(np.float32(s))) for u, r, i, s in rows] == expected_rows(found)


def test_json_lines_read_back(found, tmp_path):
    write_recommendations(str(tmp_path / "top.jsonl"), USERS, found)
    lines = [json.loads(line) for line in (tmp_path / "top.jsonl").read_bytes().split(b"\n")[:-1]]
    assert lines == [
        {"user": user, "items": items, "scores": [float(str(np.float32(s))) for _, s in row]}
        for user, items, row in zip(USERS, found.external(), found, strict=True)
    ]
    assert [[float(np.float32(s)) for s in line["scores"]] for line in lines] == [
        [s for _, s in row] for row in found
    ]


def test_parquet_reads_back(found, tmp_path):
    polars = pytest.importorskip("polars")
    write_recommendations(tmp_path / "top.parquet", USERS, found)
    frame = polars.read_parquet(tmp_path / "top.parquet")
    assert dict(frame.schema) == {
        "user": polars.String,
        "rank": polars.Int32,
        "item": polars.String,
        "score": polars.Float32,
    }
    assert frame.rows() == expected_rows(found)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_blocks_give_the_same_file(found, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("polars")
    parts = (
        Recommendations(found.items[u : u + 1], found.scores[u : u + 1], list(ITEMS))
        for u in range(3)
    )
    write_recommendations(tmp_path / f"whole.{suffix}", USERS, found)
    write_recommendations(tmp_path / f"parts.{suffix}", USERS, parts)
    if suffix == "parquet":
        import polars

        whole, parts = (polars.read_parquet(tmp_path / f"{n}.parquet") for n in ("whole", "parts"))
        assert whole.equals(parts)
    else:
        assert (tmp_path / f"whole.{suffix}").read_bytes() == (
            tmp_path / f"parts.{suffix}"
        ).read_bytes()


def test_a_link_is_written_through_and_a_device_left_alone(found, tmp_path):
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    link.symlink_to(real)
    write_recommendations(link, USERS, found)
    assert link.is_symlink() and real.read_text().startswith("user,rank,item,score")
    for path, form in ((tmp_path, "csv"), (os.devnull, "csv")):
        with pytest.raises(ValueError) as raised:
            write_recommendations(path, USERS, found, format=form)
        assert str(raised.value) == (
            f"write_recommendations: path must be a file, got a folder or a device, {str(path)!r}"
        )


def test_without_a_vocabulary_the_indices_are_written(tmp_path):
    found = recommend(Fixed(0.5, 2.0, 1.0), Clicks([0, 0, 2], [1, 2], n_items=3), k=2)
    write_recommendations(tmp_path / "top.out", [7, 8], found, format="csv")
    assert (tmp_path / "top.out").read_text().splitlines() == [
        "user,rank,item,score",
        "7,1,1,2.0",
        "7,2,2,1.0",
        "8,1,0,0.5",
    ]
    write_recommendations(tmp_path / "top.csv", [7, 8], found, items=["a", "b", "c"])
    assert (tmp_path / "top.csv").read_text().splitlines()[3] == "8,1,a,0.5"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("TOP.CSV", "user,rank,item,score\r\nÄ,1,ü,0.1\r\n"),
        ("Top.JsonL", '{"user": "Ä", "items": ["ü"], "scores": [0.1]}\n'),
    ],
    ids=["csv", "jsonl"],
)
def test_text_is_utf8_with_the_shortest_scores(tmp_path, name, content):
    found = Recommendations(torch.tensor([[0]]), torch.tensor([[0.1]]), ["ü"])
    write_recommendations(tmp_path / name, ["Ä"], found)
    assert (tmp_path / name).read_bytes() == content.encode()


def test_items_come_before_the_vocabulary_and_each_block_has_its_own(tmp_path):
    item, score = torch.tensor([[0]]), torch.tensor([[0.5]])
    blocks = [Recommendations(item, score, names) for names in (["a"], ["b"], None, ["c"])]
    for items, expected in ((None, ["a", "b", "0", "c"]), (["z"], ["z"] * 4)):
        write_recommendations(tmp_path / "top.csv", range(4), blocks, items)
        with open(tmp_path / "top.csv", newline="") as file:
            assert [row["item"] for row in csv.DictReader(file)] == expected


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_str_and_path_are_the_same(found, tmp_path, suffix):
    for kind, path in (("str", str(tmp_path / f"s.{suffix}")), ("path", tmp_path / f"p.{suffix}")):
        assert write_recommendations(path, USERS, found) == len(USERS), kind
    assert (tmp_path / f"s.{suffix}").read_bytes() == (tmp_path / f"p.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_interrupted_write_leaves_the_old_file(found, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("polars")

    def blocks():
        yield found
        raise ValueError("recommend: half way")

    path = tmp_path / f"top.{suffix}"
    path.write_text("old")
    with pytest.raises(ValueError, match="half way"):
        write_recommendations(path, USERS * 2, blocks())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_ids_go_by_their_position_whatever_holds_them(tmp_path):
    found = Recommendations(torch.tensor([[0], [2]]), torch.ones(2, 1), Labelled(["a", "b", "c"]))
    for name, items in (("a.csv", None), ("b.csv", Labelled(["a", "b", "c"]))):
        write_recommendations(tmp_path / name, Labelled(["u", "v"]), found, items)
        rows = (tmp_path / name).read_text().splitlines()
        assert rows[1:] == ["u,1,a,1.0", "v,1,c,1.0"]
    for ids, got in (({"u": 0, "v": 1}, "dict"), ({"u", "v"}, "set"), ("uv", "str")):
        with pytest.raises(TypeError) as raised:
            write_recommendations(tmp_path / "c.csv", ids, found)
        assert str(raised.value) == (
            f"write_recommendations: user_ids must be ids in their order, got {got}; pass a list"
        )


@pytest.mark.parametrize("users", [USERS[:2], [*USERS, "one more"]])
def test_as_many_user_ids_as_users(found, tmp_path, users):
    with pytest.raises(ValueError) as raised:
        write_recommendations(tmp_path / "top.csv", users, found)
    assert str(raised.value) == (
        f"write_recommendations: user_ids must have 3 ids, one per user, got {len(users)}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("top.xlsx", None, "path must end in .csv, .jsonl or .parquet, got 'top.xlsx'"),
        ("top.csv", "xml", "format must be csv, jsonl or parquet, got 'xml'"),
    ],
)
def test_unknown_formats(found, tmp_path, name, format, message):
    with pytest.raises(ValueError) as raised:
        write_recommendations(tmp_path / name, USERS, found, format=format)
    assert str(raised.value) == f"write_recommendations: {message}"


def test_missing_folder(found, tmp_path):
    with pytest.raises(ValueError, match=r"path must lie in an existing folder, got .*; create"):
        write_recommendations(tmp_path / "no" / "top.csv", USERS, found)


def test_no_users_give_a_file_without_rows(tmp_path):
    blocks = recommend_blocks(Fixed(1.0, 2.0), [], items=["a", "b"])
    assert write_recommendations(tmp_path / "top.csv", [], blocks) == 0
    assert (tmp_path / "top.csv").read_bytes() == b"user,rank,item,score\r\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a limit of file sizes")
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_full_disk_is_one_line_with_the_files_name(tmp_path, suffix):
    path = tmp_path / f"top.{suffix}"
    done = run_child("full_disk.py", path)
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n", done.stderr
    assert os.listdir(tmp_path) == []


def test_parquet_without_polars(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError) as raised:
        write_recommendations(tmp_path / "top.parquet", USERS, found)
    assert str(raised.value) == (
        "write_recommendations: Parquet needs polars; run pip install 'fastvae-cf[cli]'"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_log_is_matched_with_the_model_by_id_and_what_it_lacks_is_counted(tmp_path):
    model = Popularity(Clicks.from_pairs([0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2], n_items=3))
    items = ["a", "b", "c"]
    # the log has its own order of items, and two that the model does not know
    rows = {"all": ["a", "b", "c"], "some": ["c", "x"], "new": ["x", "y"]}
    names = ["c", "x", "b", "a", "y"]
    pairs = [(u, names.index(item)) for u, row in enumerate(rows.values()) for item in row]
    log = Events(
        Clicks.from_pairs(*np.array(pairs).T, len(rows), len(names)),
        np.array(list(rows), object),
        np.array(names, object),
        {},
    )
    path = tmp_path / "top.jsonl"
    done = recommend_to_file(path, model, log, k=2, items=items)
    assert done == Written(n_users=3, k=2, n_clicks=7, n_unknown=3, n_new=1, n_empty=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["user"]: line["items"] for line in lines} == {
        "all": [],
        "some": ["b", "a"],
        "new": ["c", "b"],
    }
    kept = recommend_to_file(path, model, log, k=99, items=items, keep_seen=True)
    assert kept.k == 3 and kept.n_empty == 0
    assert json.loads(path.read_text().splitlines()[0])["items"] == ["c", "b", "a"]


def test_without_items_the_log_must_have_those_of_the_model(tmp_path):
    model = Popularity(Clicks.from_pairs([0, 0, 1], [0, 1, 1]))
    log = Events(Clicks([0, 1], [1], n_items=2), np.array(["u"]), np.array(["a", "b"]), {})
    path = tmp_path / "top.csv"
    assert recommend_to_file(path, model, log).n_users == 1
    assert path.read_text().splitlines()[1] == "u,1,a,1.0"
    path.unlink()
    other = Events(Clicks([0, 1], [1], n_items=3), np.array(["u"]), np.array(["a", "b", "c"]), {})
    with pytest.raises(ValueError, match=r"^recommend: items must hold 2 ids, got 3$"):
        recommend_to_file(path, model, other)
    with pytest.raises(ValueError, match=r"^recommend: k must be at least 1, got 0"):
        recommend_to_file(path, model, log, k=0)
    assert not path.exists()
