"""Top-k: the order is exact, seen items are gone, and nothing depends on blocks, duplicates or padding."""

import csv
import json
import math
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import DEVICE, random_clicks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fastvae.clicks import Clicks
from fastvae.export import write_recommendations
from fastvae.models import MultiDAE, MultiVAE
from fastvae.recommend import (
    GROUP,
    MIN_ROWS,
    BlockScorer,
    Recommendations,
    recommend,
    recommend_blocks,
    top_k,
)

INF = float("inf")


class Fixed(nn.Module):
    """Gives every user the same logits: a view of its own tensor, as careless models do."""

    def __init__(self, *logits):
        super().__init__()
        self.n_items = len(logits)
        self.register_buffer("logits", torch.tensor(logits, dtype=torch.float32))
        self.batches = []

    def forward(self, clicks):
        self.batches.append(clicks)
        return self.logits.expand(clicks.n_users, -1)


class Linear(nn.Module):
    """A small DAE-like model with real matrix products; a batch norm shows whether eval mode is on."""

    def __init__(self, n_items, n_hidden=96):
        super().__init__()
        torch.manual_seed(0)
        self.n_items = n_items
        self.first, self.last = nn.Linear(n_items, n_hidden), nn.Linear(n_hidden, n_items)
        self.norm = nn.BatchNorm1d(n_hidden)

    def forward(self, clicks):
        return self.last(torch.tanh(self.norm(self.first(clicks.to_dense()))))


def slow_top_k(scores, k):
    """By definition: sort items by falling score, then by index; drop those of score -inf."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in ranked if scores[i] > -INF][:k]


# top_k

SCORES = st.one_of(
    st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, 2.0**-149, -(2.0**-149), 2.0**127, INF]),
    st.floats(width=32, allow_nan=False),
)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 150)), elements=SCORES),
    st.integers(1, 5),
)
def test_top_k_equals_sorting_by_score_then_index(scores, k):
    values, items = top_k(torch.from_numpy(scores).to(DEVICE), k)
    assert items.shape == values.shape == (len(scores), min(k, scores.shape[1]))
    for u, row in enumerate(scores.tolist()):
        expected = slow_top_k(row, k)
        padding = items.shape[1] - len(expected)
        assert items[u].tolist() == expected + [-1] * padding
        assert values[u].tolist() == [row[i] for i in expected] + [-INF] * padding


@pytest.mark.parametrize("k", [1, 2, 50, 200])
@pytest.mark.parametrize(
    "n_items",
    [
        pytest.param(1, id="smallest"),
        pytest.param(GROUP * 210, id="groups"),
        pytest.param(GROUP * 210 - 1, id="one-short-of-a-group"),
        pytest.param(GROUP * 210 + 7, id="groups-and-a-tail"),
    ],
)
def test_top_k_with_many_ties(n_items, k):
    scores = torch.randint(-3, 3, (4, n_items), generator=torch.Generator().manual_seed(n_items))
    _, items = top_k(scores.float().to(DEVICE), k)
    for row, found in zip(scores.tolist(), items.tolist(), strict=True):
        assert found == slow_top_k(row, k)


def test_equal_scores_come_in_item_order():
    _, items = top_k(torch.zeros(2, 10_000, device=DEVICE), 5)
    assert items.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("nan", [math.nan, -math.nan, INF - INF])
@pytest.mark.parametrize("n_items", [4, 5000])
def test_a_nan_of_either_sign_ranks_first_and_stays_nan(nan, n_items):
    scores = -torch.arange(n_items, dtype=torch.float32, device=DEVICE)[None]
    scores[0, 1], scores[0, -2] = INF, nan
    values, items = top_k(scores, 3)
    assert items.tolist() == [[n_items - 2, 1, 0]]
    assert math.isnan(values[0, 0]) and values[0, 1:].tolist() == [INF, 0.0]


def test_top_k_without_users_or_items():
    assert top_k(torch.zeros(0, 3), 2)[1].shape == (0, 2)
    assert top_k(torch.zeros(2, 0), 2)[1].shape == (2, 0)


# which items


def test_seen_items_are_left_out_though_logits_are_negative():
    found = recommend(Fixed(-1.0, -2.0, -3.0), Clicks([0, 1], [0], n_items=3), k=2)
    assert found.items.tolist() == [[1, 2]]
    assert found.scores.tolist() == [[-2.0, -3.0]]


def test_items_of_score_zero_do_not_vanish():
    found = recommend(Fixed(0.0, 0.0, -1.0), Clicks([0, 0], [], n_items=3), k=3)
    assert found.items.tolist() == [[0, 1, 2]]
    assert list(found) == [[(0, 0.0), (1, 0.0), (2, -1.0)]]


def test_a_stored_zero_is_not_seen():
    history = Clicks([0, 2], [0, 1], [0.0, 1.0], n_items=3)
    assert recommend(Fixed(3.0, 2.0, 1.0), history, k=2).items.tolist() == [[0, 2]]


def test_all_items_seen_gives_an_empty_list():
    found = recommend(Fixed(1.0, 2.0), [["a", "b"], ["a"]], k=2, items=["a", "b"])
    assert found.external() == [[], ["b"]]
    assert found.items.tolist() == [[-1, -1], [1, -1]]
    assert found.scores.tolist() == [[-INF, -INF], [2.0, -INF]]
    assert list(found) == [[], [("b", 2.0)]]


def test_keep_seen_ranks_all_items():
    found = recommend(Fixed(1.0, 2.0, 3.0), Clicks([0, 3], [0, 1, 2], n_items=3), 2, keep_seen=True)
    assert found.items.tolist() == [[2, 1]]


@pytest.mark.parametrize("k", [4, GROUP + 8])
def test_k_above_the_number_of_items(k):
    found = recommend(Fixed(1.0, 2.0), [["a"]], k, items=["a", "b"])
    assert found.items.tolist() == [[1] + [-1] * (k - 1)]
    assert found.scores.tolist() == [[2.0] + [-INF] * (k - 1)]
    assert found.external() == [["b"]]


def test_no_users():
    found = recommend(Fixed(1.0, 2.0), [], k=3, items=["a", "b"])
    assert len(found) == 0 and found.items.shape == found.scores.shape == (0, 3)
    assert list(found) == found.external() == []


def test_a_user_without_clicks_gets_the_models_answer():
    model = Linear(40).eval()
    empty = Clicks([0, 0], [], n_items=40)
    assert recommend(model, empty, k=1).items[0, 0] == model(empty)[0].argmax()


# which user


def test_rows_follow_the_order_of_the_call():
    model, x = Linear(60), random_clicks([3, 0, 5, 60, 1, 9, 2, 2, 7, 4], 60)
    both = recommend(model, x.rows([5, 3]), k=6)
    alone = recommend(model, x.rows([5]), k=6)
    assert torch.equal(both.items[0], alone.items[0])
    assert torch.equal(both.scores[0], alone.scores[0])
    assert both.items[1].tolist() == [-1] * 6  # user 3 has seen everything
    twice = recommend(model, x.rows([5, 5]), k=6)
    assert torch.equal(twice.items[0], twice.items[1])
    assert torch.equal(twice.scores[0], twice.scores[1])


@pytest.mark.parametrize("block_size", [1, 3, 7, MIN_ROWS, 33, 1000])
def test_the_block_size_changes_no_bit(block_size):
    model, x = Linear(3000), random_clicks([u % 9 for u in range(70)], 3000)
    whole, blocks = recommend(model, x, k=20), recommend(model, x, k=20, block_size=block_size)
    assert torch.equal(whole.items, blocks.items)
    assert torch.equal(whole.scores, blocks.scores)


@pytest.mark.parametrize("model_class", [MultiVAE, MultiDAE])
def test_the_models_give_the_same_bits_alone_and_together(model_class):
    torch.manual_seed(0)
    model, x = (
        model_class([200, 600, 1500]).to(DEVICE),
        random_clicks([u % 9 for u in range(40)], 1500),
    )
    together = recommend(model, x, k=5)
    assert together.items.device.type == "cpu"
    for u in (0, 17, 39):
        alone = recommend(model, x.rows([u]), k=5)
        assert torch.equal(alone.items[0], together.items[u])
        assert not set(alone.items[0].tolist()) & set(x.rows([u]).compact().indices.tolist())
        if DEVICE == "cpu":  # a GPU's matrix products may round otherwise at another batch size
            assert torch.equal(alone.scores[0], together.scores[u])


def test_one_user_costs_one_block_whatever_the_number_of_users():
    model, x = Fixed(*range(50)), random_clicks([2] * 1000, 50)
    recommend(model, x.rows([999]), k=1)
    assert [(len(batch), len(batch.indices)) for batch in model.batches] == [(MIN_ROWS, 2)]


@pytest.mark.parametrize(
    ("n_items", "n_users", "rows"),
    [
        pytest.param(31_990, 100, 58, id="2**24 // (8 * 32_000 + 24 * (1000 + 320) + 64 * 10)"),
        pytest.param(60, 7000, 6241, id="2**24 // (8 * 64 + 24 * 64 + 64 * 10)"),
        pytest.param(2**17, 100, MIN_ROWS, id="at-least-MIN_ROWS"),
        pytest.param(60, 5, 5, id="fewer-users"),
        pytest.param(60, 0, 1, id="no-users"),
    ],
)
def test_a_block_has_as_many_rows_as_fit(monkeypatch, n_items, n_users, rows):
    monkeypatch.setattr(sys.modules["fastvae.recommend"], "BLOCK_BYTES", 2**24)
    scorer = BlockScorer(Fixed(), Clicks([0] * (n_users + 1), [], n_items=n_items), 10, None)
    assert scorer.block_size == rows
    assert scorer.buffer.shape == (rows, -(-n_items // GROUP) * GROUP)


def test_blocks_come_one_by_one():
    model = Fixed(*range(50))
    blocks = recommend_blocks(model, random_clicks([2] * 100, 50), k=3, block_size=40)
    assert len(model.batches) == 0
    assert [len(next(blocks)), len(model.batches)] == [40, 1]
    assert [len(block) for block in blocks] == [40, 20]


# external ids


def test_external_ids_go_in_and_out():
    found = recommend(Fixed(3.0, 2.0, 1.0), [["a"]], k=3, items=["b", "a", "10"])
    assert found.external() == [["b", "10"]]  # index 0 is an item, not padding
    assert found.n_unknown == 0
    assert recommend(Fixed(3.0, 2.0, 1.0), [[10]], items=["b", "a", "10"]).external() == [
        ["b", "a"]
    ]


def test_an_item_twice_in_a_history_counts_once():
    model = Fixed(3.0, 2.0)
    recommend(model, [["a", "a"]], k=1, items=["a", "b"])
    assert model.batches[0].rows([0]).to_dense().tolist() == [[1.0, 0.0]]


def test_unknown_ids_are_counted_and_reported():
    histories = [["a", "x"], [], ["y", "x", "b"]]
    expected = (
        "recommend: 3 of 5 clicks in histories are on items that the model does not know; they"
    )
    with pytest.warns(UserWarning, match=expected):
        found = recommend(Fixed(3.0, 2.0, 1.0), histories, k=1, items=["a", "b", "c"], block_size=1)
    assert found.n_unknown == 3
    assert found.external() == [["b"], ["a"], ["a"]]


def test_clicks_with_a_vocabulary_give_external_ids():
    found = recommend(Fixed(1.0, 2.0), Clicks([0, 1], [1], n_items=2), k=2, items=["a", "b"])
    assert found.external() == [["a"]]


def test_external_needs_a_vocabulary():
    with pytest.raises(ValueError, match=r"^external: vocabulary must be .* ids, got None; pass"):
        recommend(Fixed(1.0, 2.0), Clicks([0, 1], [1], n_items=2)).external()


# the model is left as it was


def test_modes_and_gradients_come_back():
    model = Linear(30).train()
    model.last.eval()
    running = model.norm.running_mean.clone()
    recommend(model, random_clicks([1] * 20, 30), k=2)
    assert model.training and model.norm.training and not model.last.training
    assert torch.equal(model.norm.running_mean, running)
    assert torch.is_grad_enabled()
    model(random_clicks([2] * 20, 30)).sum().backward()
    assert model.first.weight.grad.abs().sum() > 0


def test_what_a_model_keeps_from_evaluation_serves_training():
    class Keeping(Linear):
        kept = None

        def forward(self, clicks):
            if self.kept is None:
                self.kept = torch.ones(clicks.n_items) / clicks.n_items
            return super().forward(clicks) * self.kept

    model, clicks = Keeping(30), random_clicks([2] * 20, 30)
    recommend(model, clicks, k=2)
    model(clicks).sum().backward()
    assert model.first.weight.grad.abs().sum() > 0


def test_modes_come_back_after_an_error():
    class Broken(Linear):
        def forward(self, clicks):
            raise KeyError

    model = Broken(5).train()
    with pytest.raises(KeyError):
        recommend(model, Clicks([0, 0], [], n_items=5))
    assert model.training and torch.is_grad_enabled()


def test_the_models_own_tensor_is_not_written():
    model = Fixed(1.0, 2.0)
    recommend(model, Clicks([0, 1], [1], n_items=2))
    assert model.logits.tolist() == [1.0, 2.0]


def test_a_tuple_of_logits_and_latents_and_half_precision():
    class Vae(Fixed):
        def forward(self, clicks):
            logits = super().forward(clicks)
            return logits.bfloat16(), logits, logits

    assert recommend(Vae(1.0, 2.0), Clicks([0, 0], [], n_items=2), k=2).items.tolist() == [[1, 0]]


# errors

EMPTY = Clicks([0, 0], [], n_items=2)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (ValueError, "k must be at least 1, got 0", (EMPTY, 0), {}),
        (TypeError, "k must be an int, got float", (EMPTY, 2.0), {}),
        (TypeError, "k must be an int, got bool", (EMPTY, True), {}),
        (ValueError, "block_size must be at least 1, got -1", (EMPTY,), {"block_size": -1}),
        (
            ValueError,
            "histories must have 2 items like the model, got 5",
            (Clicks([0, 0], [], n_items=5),),
            {"items": ["a", "b"]},
        ),
        (ValueError, "items must have 2 ids like the model, got 1", ([[]],), {"items": ["a"]}),
        (ValueError, "items must be distinct, got 'a' twice", ([[]],), {"items": ["a", "a"]}),
        (
            ValueError,
            "items must be the external item ids where histories are lists, got None",
            ([["a"]],),
            {},
        ),
        (
            TypeError,
            "histories must be lists of item ids, got one that is str; wrap it in a list",
            (["a"],),
            {"items": ["a", "b"]},
        ),
        (
            TypeError,
            "histories must be lists of item ids, got one that is int; wrap it in a list",
            ([1],),
            {"items": ["a", "b"]},
        ),
    ],
)
def test_arguments_are_checked_before_the_first_block(error, message, args, options):
    model = Fixed(1.0, 2.0)
    with pytest.raises(error) as raised:
        recommend_blocks(model, *args, **options)
    assert str(raised.value) == f"recommend: {message}"
    assert model.batches == []


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError) as raised:
        recommend(Fixed(1.0, bad, 0.0), Clicks([0, 0, 1], [1], n_items=3))
    assert str(raised.value) == (
        "recommend: model must give finite scores, got nan or inf for 1 of users 0..1; "
        "load a checkpoint from before the loss diverged"
    )


def test_logits_of_the_wrong_shape():
    model = Fixed(1.0, 2.0)
    model.n_items = 3
    with pytest.raises(
        ValueError, match=r"^model: logits must have shape \[16, 3\], got \[16, 2\]$"
    ):
        recommend(model, Clicks([0, 0], [], n_items=3))


# files

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


def test_parquet_without_polars(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError) as raised:
        write_recommendations(tmp_path / "top.parquet", USERS, found)
    assert str(raised.value) == (
        "write_recommendations: Parquet needs polars; run pip install 'fastvae-cf[cli]'"
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_warns(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = recommend(Fixed(1.0, 2.0), [[], ["a"], ["a", "b"]], k=3, items=["a", "b"])
        for suffix in ("csv", "jsonl"):
            write_recommendations(tmp_path / f"top.{suffix}", "xyz", found)
