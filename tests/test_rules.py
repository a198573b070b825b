"""Rules of recommendation: what is allowed, left out and penalised, by the same exact order of the others."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import DEVICE, Fixed, random_clicks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae import Clicks, MultiDAE, MultiVAE, recommend
from fastvae.baselines import Popularity
from fastvae.events import Events
from fastvae.export import recommend_to_file
from fastvae.ranking import GROUP, MIN_ROWS, BlockScorer, top_k
from fastvae.recommend import recommend_blocks
from fastvae.rules import Rules

INF = float("inf")


def by_definition(scores, seen, k, allowed=None, exclude=()):
    """Items and scores of one user, padded to k."""
    left = [i for i in range(len(scores)) if allowed is None or i in allowed]
    left = [i for i in left if i not in exclude and i not in seen]
    best = sorted(left, key=lambda i: (-scores[i], i))[:k]
    padding = k - len(best)
    return best + [-1] * padding, [scores[i] for i in best] + [-INF] * padding


NO_ITEM = pytest.mark.filterwarnings("ignore:recommend. allowed and exclude leave no item")


@NO_ITEM
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rules_are_what_they_say_with_ties(data):
    n_items = data.draw(st.sampled_from([1, 2, GROUP - 1, GROUP, 3 * GROUP + 5]))
    logits = data.draw(st.lists(st.integers(-2, 2), min_size=n_items, max_size=n_items))
    some = st.lists(st.integers(0, n_items - 1), max_size=n_items)
    allowed, exclude = data.draw(st.none() | some), data.draw(st.none() | some)
    rows, k = data.draw(st.lists(some, max_size=3)), data.draw(st.integers(1, 40))
    keep_seen = data.draw(st.booleans())
    histories = Clicks.from_matrix(
        np.array([[i in row for i in range(n_items)] for row in rows]).reshape(-1, n_items)
    )
    model = Fixed(*logits).to(DEVICE)
    found = recommend(model, histories, k, keep_seen=keep_seen, allowed=allowed, exclude=exclude)
    for u, row in enumerate(rows):
        items, scores = by_definition(logits, () if keep_seen else row, k, allowed, exclude or ())
        assert found.items[u].tolist() == items and found.scores[u].tolist() == scores


N_ITEMS = 300


def models():
    torch.manual_seed(0)
    for make, p_dims in ((MultiVAE, [8, 64, N_ITEMS]), (MultiDAE, [8, N_ITEMS])):
        model = make(p_dims).to(DEVICE)
        last = model.decode.output
        with torch.no_grad():
            # items 7, 50 and 211 always tie
            last.weight[[50, 211]], last.bias[[50, 211]] = (
                last.weight[7].clone(),
                last.bias[7].item(),
            )
        yield model


SIZES = [
    pytest.param(0, id="none"),
    pytest.param(1, id="one"),
    pytest.param(MIN_ROWS - 1, id="fewer-than-a-product-takes"),
    pytest.param(GROUP - 1, id="a-group-with-the-spare-column"),
    pytest.param(GROUP, id="a-group-and-the-spare-column"),
    pytest.param(N_ITEMS // 2, id="alone"),
    pytest.param(N_ITEMS // 2 + 1, id="of-all"),
    pytest.param(N_ITEMS, id="all"),
]


@NO_ITEM
@pytest.mark.parametrize("n_allowed", SIZES)
def test_few_items_are_scored_alone_in_the_order_of_all(n_allowed, monkeypatch):
    x = random_clicks([u % 9 for u in range(40)], N_ITEMS).to(DEVICE)
    allowed = np.random.default_rng(n_allowed).permutation(N_ITEMS)
    allowed = np.concatenate([[7, 50, 211], allowed[~np.isin(allowed, [7, 50, 211])]])[:n_allowed]
    for model in models():
        every = recommend(model, x, N_ITEMS)
        with monkeypatch.context() as patch:
            if n_allowed <= N_ITEMS // 2:
                patch.delattr(type(model.decode), "forward")  # no logits of the others
            found = recommend(model, x, 10, allowed=allowed, block_size=17)
        for u in range(len(x)):
            left = torch.isin(every.items[u], torch.from_numpy(allowed))
            items, scores = every.items[u][left][:10], every.scores[u][left][:10]
            assert found.items[u].tolist() == items.tolist() + [-1] * (10 - len(items))
            if DEVICE == "cpu":  # a GPU's products may round otherwise at another number of items
                assert torch.equal(found.scores[u, : len(items)], scores)


def test_a_last_layer_with_a_hook_is_called_as_a_whole():
    (model, _), x = models(), random_clicks([3] * 4, N_ITEMS).to(DEVICE)
    plain = recommend(model, x, 3, allowed=range(20))
    model.decode.output.register_forward_hook(lambda layer, args, logits: -logits)
    hooked, every = recommend(model, x, 3, allowed=range(20)), recommend(model, x, N_ITEMS)
    assert not torch.equal(hooked.items, plain.items)
    for found, ranked in zip(hooked.items.tolist(), every.items.tolist(), strict=True):
        assert found == [i for i in ranked if 0 <= i < 20][:3]


@pytest.mark.parametrize("allowed", [None, [3, 0, 1]])
@pytest.mark.parametrize("kind", ["clicks", "array", "tensor", "list"])
def test_popularity_costs_its_logarithm(allowed, kind):
    train = Clicks.from_pairs([0, 1, 2, 3, 0, 1], [0, 0, 0, 0, 1, 1], n_items=4, counts=True)
    counts = [4, 2, 0, 0]
    popularity = {
        "clicks": train.rows([3, 2, 1, 0]), "array": np.array(counts), "tensor": torch.tensor(counts), "list": counts,
    }[kind]  # fmt: skip
    found = recommend(
        Fixed(1.0, 1.0, -9.0, -0.5), Clicks([0, 0], [], n_items=4), 3,
        allowed=allowed, popularity_penalty=1.5, popularity=popularity,
    )  # fmt: skip
    # 1 - 1.5 log 2 is above -0.5, 1 - 1.5 log 4 below
    assert found.items.tolist() == [[1, 3, 0]]
    expected = [1 - 1.5 * math.log(2), -0.5, 1 - 1.5 * math.log(4)]
    torch.testing.assert_close(found.scores, torch.tensor([expected]))


def test_a_user_counts_once_for_an_item_as_in_the_baseline():
    train = Clicks([0, 2, 3], [0, 1, 1], [5.0, 1.0, 1.0], n_items=3)
    options = {"k": 3, "popularity_penalty": 0.7}
    for x in (train, random_clicks([1, 0], 3)):
        found, same = (
            recommend(Fixed(0.0, 0.1, 0.2), x, popularity=counts, **options)
            for counts in (train, Popularity(train).counts)
        )
        assert torch.equal(found.scores, same.scores)


@pytest.mark.parametrize("order", ["by-count", "positions", "items"])
def test_labelled_counts_are_in_the_order_of_the_items(order):
    pandas = pytest.importorskip("pandas", reason="the extra dev has pandas")
    items, counts = ["a", "b", "c"], [2, 0, 9]
    model, options = Fixed(1.0, 1.0, 1.0), {"items": ["a", "b", "c"], "popularity_penalty": 1}
    expected = recommend(model, [[]], 3, popularity=counts, **options)
    if order == "by-count":
        with pytest.raises(ValueError) as raised:
            recommend(model, [[]], popularity=pandas.Series([9, 2], ["c", "a"]), **options)
        assert str(raised.value) == (
            "recommend: popularity must be in the order of the items, got labels 'c', 'a'; pass "
            "popularity.reindex(items, fill_value=0)"
        )
        return
    labels = items if order == "items" else None
    found = recommend(model, [[]], 3, popularity=pandas.Series(counts, labels), **options)
    assert torch.equal(found.scores, expected.scores)


def test_no_penalty_changes_no_bit_and_needs_no_counts():
    model, x = next(models()), random_clicks([3] * 4, N_ITEMS)
    found = recommend(model, x, 5, popularity_penalty=0, popularity=None)
    assert torch.equal(found.scores, recommend(model, x, 5).scores)


def test_ids_are_those_of_items_in_any_container():
    model, items = Fixed(4.0, 3.0, 2.0, 1.0), ["a", "b", "10", "d"]
    for allowed in (
        ["b", 10],
        ("10", "b", "b"),
        {"b", "10"},
        np.array(["b", "10"]),
        iter(["b", "10"]),
    ):
        found = recommend(model, [["a"], ["b"]], 3, items=items, allowed=allowed)
        assert found.external() == [["b", "10"], ["10"]]
    found = recommend(model, [[]], 4, items=items, allowed=["a", "b", "d"], exclude={"b"})
    assert found.external() == [["a", "d"]]
    assert recommend(model, Clicks([0, 0], [], n_items=4), 2, exclude=range(3)).items.tolist() == [[3, -1]]  # fmt: skip


def test_unknown_ids_are_named_and_counted_where_the_call_stands():
    for name in ("allowed", "exclude"):
        text = (
            f"recommend: 5 of 6 ids in {name} are of items that the model does not know, such as ' a', '\"b\"', 'item_id'; "
            "they are ignored"
        )
        ids = [" a", "a", '"b"', "item_id", "y", "z"]
        with pytest.warns(UserWarning, match=f"^{text}$") as warned:
            recommend(Fixed(1.0, 2.0), [[]], items=["a", "b"], **{name: ids})
        assert [warning.filename for warning in warned] == [__file__]


def test_rules_that_leave_no_item_say_so_where_the_call_stands():
    for rules in ({"allowed": []}, {"exclude": ["a", "b"]}, {"allowed": ["b"], "exclude": ["b"]}):
        with pytest.warns(
            UserWarning, match="^recommend: allowed and exclude leave no item"
        ) as warned:
            found = recommend(Fixed(1.0, 2.0), [[]], items=["a", "b"], **rules)
        assert found.external() == [[]]
        assert [warning.filename for warning in warned] == [__file__]


def test_a_choice_of_unknown_items_alone_is_refused():
    with pytest.raises(ValueError) as raised:
        recommend(Fixed(1.0, 2.0), [[]], items=["a", "b"], allowed=["a ", 7])
    assert str(raised.value) == (
        "recommend: allowed must hold ids of the model's items, such as 'a', 'b', got none among 2, such as 'a ', '7'"
    )


EMPTY = Clicks([0, 0], [], n_items=2)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "allowed must hold positions in [0, 2) where items is None, got 2", {"allowed": [0, 2]}),
        (ValueError, "exclude must hold positions in [0, 2) where items is None, got -1", {"exclude": [-1]}),
        (ValueError, "allowed must hold positions in [0, 2) where items is None, got 'a'", {"allowed": ["a"]}),
        (TypeError, "allowed must be ids in their order, got str; pass a list", {"allowed": "a"}),
        (TypeError, "allowed must hold ids that are str or int, got bool at position 0", {"allowed": [True, False]}),
        (TypeError, "exclude must hold ids that are str or int, got float at position 0", {"exclude": [1.0]}),
        (ValueError, "popularity_penalty must be a finite number of at least 0, got -1", {"popularity_penalty": -1}),
        (TypeError, "popularity_penalty must be a number, got '1'", {"popularity_penalty": "1"}),
        (ValueError, "popularity must be the training clicks, or a count for each item, where popularity_penalty is "
         "given, got None", {"popularity_penalty": 1}),
        (ValueError, "popularity must have the model's 2 items, got 3",
         {"popularity_penalty": 1, "popularity": Clicks([0, 1], [1], n_items=3)}),
        (ValueError, "popularity must have shape [2], a count for each of the model's items, got [3]",
         {"popularity_penalty": 1, "popularity": [1, 2, 3]}),
        (ValueError, "popularity must hold finite counts of at least 0, got -2.0 at position 1",
         {"popularity_penalty": 1, "popularity": [1, -2]}),
        (TypeError, "popularity must be Clicks or a count for each item, got int",
         {"popularity_penalty": 1, "popularity": 3}),
    ],
)  # fmt: skip
def test_rules_are_checked_before_the_first_block(error, message, options):
    model = Fixed(1.0, 2.0)
    with pytest.raises(error) as raised:
        recommend_blocks(model, EMPTY, **options)
    assert str(raised.value) == f"recommend: {message}"
    assert model.batches == []


def test_a_file_obeys_the_rules(tmp_path):
    log = Events(
        Clicks([0, 1, 2], [0, 1], n_items=2), np.array(["u", "v"]), np.array(["c", "z"]), {}
    )
    done = recommend_to_file(
        tmp_path / "top.jsonl", Fixed(4.0, 3.0, 2.0, 1.0), log, k=3, items=["a", "b", "c", "d"],
        allowed=["a", "c", "d"], exclude=["d"], popularity_penalty=1.0, popularity=[8, 1, 1, 1],
    )  # fmt: skip
    assert done.n_empty == 0
    lines = [json.loads(line) for line in (tmp_path / "top.jsonl").read_text().splitlines()]
    assert [line["items"] for line in lines] == [["a"], ["c", "a"]]
    assert lines[1]["scores"][0] == 2.0 and lines[1]["scores"][1] == pytest.approx(4 - math.log(8))


# blocks

PENALTY = torch.ones(N_ITEMS)
# of any model, of few items alone, of most items
RULES = [Rules(torch.arange(0, N_ITEMS, 7), PENALTY), Rules(torch.arange(N_ITEMS - 1), PENALTY)]
READING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "equal",
)


class Counting(TorchDispatchMode):
    """How often an op reads a value on the host, or has a shape that follows from one."""

    def __init__(self):
        super().__init__()
        self.n, self.names = 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.__name__.split(".")[0]
        self.names.add(name)
        self.n += name in READING
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("make", [lambda: Fixed(*range(N_ITEMS)), lambda: next(models())])
def test_rules_make_no_block_wait_for_a_device(make):
    clicks, counted = random_clicks([3] * 80, N_ITEMS).to(DEVICE), []
    for rules in (None, *RULES):
        scorer = BlockScorer(make().to(DEVICE), clicks, 5, 40, rules=rules)
        with Counting() as mode:
            for start in scorer.starts:
                scorer.items(top_k(scorer.scores(start), 5)[1])
        assert {"index_put_", "topk"} < mode.names
        counted.append(mode.n)
    assert counted == [counted[0]] * 3


@pytest.mark.gpu
def test_a_block_under_rules_waits_for_no_gpu():
    clicks = random_clicks([3] * 80, N_ITEMS).to("cuda")
    for rules in RULES:
        scorer = BlockScorer(next(models()), clicks, 5, 40, rules=rules)
        scorer.scores(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for start in scorer.starts:
                scorer.items(top_k(scorer.scores(start), 5)[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_size_of_a_block_follows_from_the_items_that_are_scored(monkeypatch):
    monkeypatch.setattr("fastvae.ranking.BLOCK_BYTES", 2**24)
    n_items, clicks = 31_990, Clicks([0] * 40_001, [], n_items=31_990)
    rules = Rules(torch.arange(GROUP))
    few = BlockScorer(Fixed(*[0.0] * n_items), clicks, 10, None, rules=rules)
    assert few.block_size == 2**24 // (8 * 2 * GROUP + 24 * 2 * GROUP + 64 * 10 + 4 * n_items)
    alone = BlockScorer(MultiDAE([2, n_items]), clicks, 10, None, rules=rules)
    assert alone.block_size == 2**24 // (8 * 2 * GROUP + 24 * 2 * GROUP + 64 * 10)
    assert alone.buffer.shape == (alone.block_size, 2 * GROUP)
