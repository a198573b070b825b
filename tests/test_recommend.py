"""Recommendations: seen items are gone, and nothing depends on blocks, duplicates or padding."""

import math
import threading
import warnings

import numpy as np
import pytest
import torch
from helpers import DEVICE, Fixed, Labelled, random_clicks
from torch import nn

from fastvae.clicks import Clicks
from fastvae.export import write_recommendations
from fastvae.models import MultiDAE, MultiVAE
from fastvae.ranking import GROUP, MIN_ROWS
from fastvae.recommend import Recommendations, recommend, recommend_blocks

INF = float("inf")


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


def test_ids_go_by_their_position_whatever_holds_them():
    found = recommend(Fixed(3.0, 2.0, 1.0), [["a"]], k=2, items=Labelled(["a", "b", "c"]))
    assert found.external() == [["b", "c"]]
    assert recommend(Fixed(3.0, 2.0), [[7]], items=np.array([7, 8])).external() == [[8]]
    by_hand = Recommendations(found.items, found.scores, Labelled(["a", "b", "c"]))
    assert by_hand.external() == [["b", "c"]]


def test_an_item_twice_in_a_history_counts_once():
    model = Fixed(3.0, 2.0)
    recommend(model, [["a", "a"]], k=1, items=["a", "b"])
    assert model.batches[0].rows([0]).to_dense().tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    "history",
    [
        [10, 30],
        (30, "10"),
        {10, 30},
        torch.tensor([10, 30]),
        np.array([30, 10], np.int16),
        np.array(["10", "30"]),
        {10: 0, 30: 0}.keys(),
        iter([10, 30]),
        Labelled([30, 10]),
    ],
    ids=["list", "tuple", "set", "tensor", "array", "texts", "keys", "iterator", "labelled"],
)
def test_a_history_may_be_any_container_of_ids(history):
    found = recommend(Fixed(3.0, 2.0, 1.0), [history], k=3, items=[10, 20, 30])
    assert found.external() == [[20]] and found.n_unknown == 0


def test_unknown_ids_are_counted_and_reported():
    histories = [["a", "x"], [], ["y", "x", "b"]]
    expected = "recommend: 3 of 5 clicks in histories are on items that the model does not know, such as 'x', 'y', 'x'; they"
    with pytest.warns(UserWarning, match=expected):
        found = recommend(Fixed(3.0, 2.0, 1.0), histories, k=1, items=["a", "b", "c"], block_size=1)
    assert found.n_unknown == 3
    assert found.external() == [["b"], ["a"], ["a"]]


def test_unknown_ids_that_came_from_an_iterator_are_counted_alone():
    expected = (
        "recommend: 1 of 1 clicks in histories are on items that the model does not know; they"
    )
    with pytest.warns(UserWarning, match=expected):
        assert recommend(Fixed(1.0), [iter(["x"])], items=["a"]).external() == [["a"]]
    with pytest.warns(UserWarning, match="does not know, such as '7'; they"):
        recommend(Fixed(1.0), [torch.tensor([7])], items=["a"])


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


def test_modes_come_back_after_the_last_of_several_threads():
    inside, done = threading.Barrier(2, timeout=60), threading.Event()

    class Waiting(Linear):
        def forward(self, clicks):
            inside.wait()
            if threading.current_thread() is late:
                assert done.wait(60)
            modes.append(self.training)
            return super().forward(clicks)

    model, clicks, modes = Waiting(5).train(), Clicks([0, 0], [], n_items=5), []
    late = threading.Thread(target=recommend, args=(model, clicks))
    late.start()
    recommend(model, clicks)
    assert not model.training, "the other thread is not done"
    done.set()
    late.join()
    assert modes == [False, False] and model.training


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
        (TypeError, "k must be a whole number, got 2.0", (EMPTY, 2.0), {}),
        (TypeError, "k must be a whole number, got True", (EMPTY, True), {}),
        (ValueError, "block_size must be at least 1, got -1", (EMPTY,), {"block_size": -1}),
        (
            ValueError,
            "histories must have the model's 2 items, got 5",
            (Clicks([0, 0], [], n_items=5),),
            {"items": ["a", "b"]},
        ),
        (ValueError, "items must hold 2 ids, got 1", ([[]],), {"items": ["a"]}),
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
            "histories must be lists of item ids, got one that is dict; wrap it in a list",
            ([{"a": 2}],),
            {"items": ["a", "b"]},
        ),
        (
            TypeError,
            "items must be ids in their order, got set; pass a list",
            ([["a"]],),
            {"items": {"a", "b"}},
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
    seen = Clicks([0, 1, 2, 2, 3], [1, 1, 1], n_items=3)
    with pytest.raises(ValueError) as raised:
        recommend(Fixed(1.0, bad, 0.0), seen, block_size=3)
    assert str(raised.value) == (
        "recommend: model must give finite scores, got nan or inf for 1 of users 0..2, first for user 2; "
        "load a checkpoint from before the loss diverged"
    )


def test_a_score_that_is_not_finite_is_that_of_a_user_counted_from_the_first_block():
    seen = Clicks([0, 1, 2, 2, 3], [1, 1, 1], n_items=3)
    with pytest.raises(ValueError, match=r"for 1 of users 2\.\.2, first for user 2; "):
        recommend(Fixed(1.0, math.nan, 0.0), seen, block_size=1)


def test_logits_of_the_wrong_shape():
    model = Fixed(1.0, 2.0)
    model.n_items = 3
    with pytest.raises(
        ValueError, match=r"^model: logits must have shape \[16, 3\], got \[16, 2\]$"
    ):
        recommend(model, Clicks([0, 0], [], n_items=3))


def test_nothing_warns(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = recommend(Fixed(1.0, 2.0), [[], ["a"], ["a", "b"]], k=3, items=["a", "b"])
        for suffix in ("csv", "jsonl"):
            write_recommendations(tmp_path / f"top.{suffix}", list("xyz"), found)
