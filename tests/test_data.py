"""fastvae.data: strong generalisation, and every event accounted for."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from data_helpers import (
    PARTS,
    PROPERTY,
    assert_accounted,
    assert_same,
    assert_strong_generalisation,
    matrices,
    small_dataset,
    write,
)
from helpers import Labelled
from hypothesis import given
from hypothesis import strategies as st

from fastvae import data
from fastvae.clicks import Clicks
from fastvae.data import Dataset, map_items, split_dataset
from fastvae.events import Events, read_events

pytest.importorskip("polars")


def events_of(rows):
    """Events from {user: items}."""
    items = sorted({item for row in rows.values() for item in row})
    pairs = [(u, items.index(i)) for u, row in enumerate(rows.values()) for i in row]
    x = Clicks.from_pairs(*np.array(pairs, np.int64).reshape(-1, 2).T, len(rows), len(items))
    info = {"n_events": x.nnz, "dropped": {}, "source": None}
    return Events(x, np.array(list(rows), object), np.array(items, object), info)


def test_items_are_filtered_before_users():
    # c and d are clicked once; without them u3 is left with one click, and goes
    rows = {"u0": "ab", "u1": "ab", "u2": "abc", "u3": "ad"}
    # b is clicked exactly as often as an item must be, and stays
    dataset = split_dataset(events_of(rows), 1, min_user_clicks=2, min_item_clicks=3)
    assert_accounted(dataset)
    assert sorted([*dataset.users_train, *dataset.users_vad, *dataset.users_test]) == ["u0", "u1", "u2"]  # fmt: skip
    assert dataset.items.tolist() == ["a", "b"]
    assert dataset.info["dropped"]["rare_items"] == 2
    assert dataset.info["dropped"]["short_users"] == 1


def test_the_last_users_of_the_permutation_are_test_and_those_before_validation():
    x = np.ones((10, 6))
    dataset = Dataset.from_matrix(x, n_heldout=2, seed=3)
    order = [str(u) for u in np.random.default_rng(3).permutation(10)]
    assert dataset.users_train.tolist() == order[:6]
    assert dataset.users_vad.tolist() == order[6:8]
    assert dataset.users_test.tolist() == order[8:]
    assert dataset.info["kept"] == {
        "train": 36,
        "vad_fold_in": 10,
        "vad_held_out": 2,
        "test_fold_in": 10,
        "test_held_out": 2,
    }
    assert Dataset.from_matrix(x, n_heldout=0.2, seed=3).users_vad.tolist() == order[6:8]


def test_a_fraction_of_the_users_is_rounded_down():
    users = Dataset.from_matrix(np.ones((15, 5)), n_heldout=0.1).info["users"]
    assert [users[name] for name in ("train", "vad", "test")] == [13, 1, 1]


def test_held_out_clicks_outside_the_vocabulary_are_dropped_and_counted():
    # whoever is not a train user has x in front of the item: no train user knows these
    seed = 0
    last = np.random.default_rng(seed).permutation(12)[-2:]
    rows = {f"u{u}": ["a", "b", "c", "e", "f"] for u in range(12)}
    for u in last:
        rows[f"u{u}"] = ["a", "b", "c", "d", "e", "f", "x0", "x1"]
    dataset = split_dataset(events_of(rows), 1, seed)
    assert_accounted(dataset)
    assert dataset.items.tolist() == ["a", "b", "c", "e", "f"]
    assert dataset.info["dropped"]["vad_unknown_items"] == 3
    assert dataset.info["dropped"]["test_unknown_items"] == 3
    # int(0.2 * 5) of the five known clicks, not int(0.2 * 8) of all eight
    assert dataset.vad_te.nnz == 1 and dataset.vad_tr.nnz == 4
    with pytest.raises(ValueError) as error:
        split_dataset(events_of(rows), 1, seed, strict=True)
    assert str(error.value) == (
        "prepare: items must be in the vocabulary, got 3 unknown: 'd', 'x0', 'x1'; leave out strict to drop them"
    )


def test_users_too_short_to_hold_anything_out_are_counted_and_skipped():
    lengths = [1, 2, 4, 5, 10]
    x = np.zeros((30, 10))
    order = np.random.default_rng(0).permutation(30)
    x[order[:20]] = 1
    for u, length in zip(order[20:25], lengths, strict=True):
        x[u, :length] = 1
    for u in order[25:]:
        x[u, :1] = 1
    dataset = Dataset.from_matrix(x, n_heldout=5, min_user_clicks=1)
    assert dataset.vad_te.row_lengths().tolist() == [0, 0, 0, 1, 2]
    assert dataset.vad_tr.row_lengths().tolist() == [1, 2, 4, 4, 8]
    assert dataset.info["n_evaluated"] == {"vad": 2, "test": 0}
    assert dataset.info["n_skipped"] == {"vad": 3, "test": 5}
    assert_accounted(dataset)


def test_an_explicit_zero_is_no_click():
    x = sp.csr_array((np.array([0.0, 1.0] * 4), np.array([0, 1] * 4), np.arange(0, 9, 2)), (4, 3))
    dataset = Dataset.from_matrix(x, n_heldout=1, min_user_clicks=1)
    assert dataset.info["n_events"] == 4
    assert dataset.items.tolist() == ["1"]


def test_a_user_without_clicks_goes_whatever_the_minimum():
    x = np.ones((6, 5))
    x[[0, 3]] = 0
    dataset = Dataset.from_matrix(x, n_heldout=1, min_user_clicks=0)
    assert dataset.info["users"] == {"read": 6, "short": 2, "train": 2, "vad": 1, "test": 1}
    users = (*dataset.users_train, *dataset.users_vad, *dataset.users_test)
    assert set(users) == {"1", "2", "4", "5"}
    assert_accounted(dataset)


def test_counts_stay_with_their_pair():
    x = np.arange(1, 61).reshape(10, 6)
    dataset = Dataset.from_matrix(x, n_heldout=3, counts=True)
    for users, parts in (("train", ("train",)), ("vad", ("vad_tr", "vad_te"))):
        values = sum(getattr(dataset, part).to_dense() for part in parts)
        assert values.tolist() == x[getattr(dataset, f"users_{users}").astype(int)].tolist()
    assert Dataset.from_matrix(x, n_heldout=3).train.values is None


def test_validation_and_test_are_pairs_of_fold_in_and_held_out_clicks():
    dataset = small_dataset()
    assert dataset.validation == (dataset.vad_tr, dataset.vad_te)
    assert dataset.test == (dataset.test_tr, dataset.test_te)
    for fold_in, held_out in (dataset.validation, dataset.test):
        assert fold_in.nnz > held_out.nnz > 0 and fold_in.shape == held_out.shape
    with pytest.raises(AttributeError):
        dataset.vad_tr = dataset.test_tr


def test_histories_are_the_fold_in_clicks_of_the_users_asked_for():
    dataset = small_dataset()
    parts = {"train": dataset.train, "vad": dataset.vad_tr, "test": dataset.test_tr}
    for name, x in parts.items():
        log = dataset.histories(name)
        assert log.x.fingerprint() == x.fingerprint()
        assert log.users.tolist() == getattr(dataset, f"users_{name}").tolist()
        assert log.items.tolist() == dataset.items.tolist()
    everybody = dataset.histories()
    assert everybody.x.to_dense().tolist() == np.vstack([x.to_dense() for x in parts.values()]).tolist()  # fmt: skip
    assert everybody.users.tolist() == [u for name in parts for u in getattr(dataset, f"users_{name}")]  # fmt: skip
    with pytest.raises(ValueError) as error:
        dataset.histories("validation")
    assert str(error.value) == (
        "histories: users must be one of train, vad, test, all, got 'validation'"
    )


def test_nobody_needs_to_be_held_out():
    dataset = Dataset.from_matrix(np.ones((3, 5)), n_heldout=0)
    assert dataset.train.shape == (3, 5) and dataset.test_te.shape == (0, 5)
    assert_accounted(dataset)


FEW = "n_heldout, or add data"


BAD_SETTINGS = {
    "too_many": (
        {"n_heldout": 5},
        "prepare: n_heldout must leave users to train, validate and test on, got 5 of 10 users "
        "with at least 5 clicks; lower " + FEW,
    ),
    "too_many_without_a_minimum": (
        {"n_heldout": 5, "min_user_clicks": 0},
        "prepare: n_heldout must leave users to train, validate and test on, got 5 of 10 users "
        "with at least 1 clicks; lower " + FEW,
    ),
    "fraction_of_few": (
        {"n_heldout": 0.05},
        "prepare: n_heldout must leave users to train, validate and test on, got 0.05 of 10 users "
        "with at least 5 clicks; raise " + FEW,
    ),
    "none_left": (
        {"n_heldout": 1, "min_user_clicks": 9},
        "prepare: events must leave a user with at least 9 clicks, got none of 60 events (dropped "
        "60 with a user with "
        "fewer than min_user_clicks); lower the thresholds or add data",
    ),
    "fraction": (
        {"n_heldout": 0.5},
        "prepare: n_heldout must be a number of users or a fraction in (0, 0.5), got 0.5",
    ),
    "negative": (
        {"n_heldout": -1},
        "prepare: n_heldout must be a number of users or a fraction in (0, 0.5), got -1",
    ),
    "seed": ({"seed": -1}, "prepare: seed must be at least 0, got -1"),
    "held_out": (
        {"held_out_fraction": 1.0},
        "prepare: held_out_fraction must lie in (0, 1), got 1.0",
    ),
    "few_ids": ({"items": ["a"]}, "prepare: items must hold 6 ids, got 1"),
    "empty_id": (
        {"items": ["a", "b", "", "c", "d", "e"]},
        "prepare: items must hold ids that are not empty, got '' at position 2",
    ),
    "blank_id": (
        {"users": [*"abcdefghi", " "]},
        "prepare: users must hold ids that are not empty, got ' ' at position 9",
    ),
    "same_ids": ({"users": [1] * 10}, "prepare: users must be distinct, got '1' twice"),
}


WRONG_TYPES = {
    "no_fraction": (
        {"held_out_fraction": "a"},
        "prepare: held_out_fraction must be a number, got 'a'",
    ),
    "no_number_of_users": (
        {"n_heldout": "a"},
        "prepare: n_heldout must be a number of users or a fraction, got 'a'",
    ),
    "flag_for_a_number_of_users": (
        {"n_heldout": True},
        "prepare: n_heldout must be a number of users or a fraction, got True",
    ),
    "half_a_seed": ({"seed": 0.5}, "prepare: seed must be a whole number, got 0.5"),
    "no_id": (
        {"items": [*"abcde", None]},
        "prepare: items must hold ids that are str or int, got NoneType at position 5",
    ),
    "odd_ids": (
        {"items": [1.5] * 6},
        "prepare: items must hold ids that are str or int, got float at position 0",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_in_one_sentence(name):
    arguments, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError) as error:
        Dataset.from_matrix(np.ones((10, 6)), **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_settings_of_a_wrong_type_are_a_type_error(name):
    arguments, message = WRONG_TYPES[name]
    with pytest.raises(TypeError) as error:
        Dataset.from_matrix(np.ones((10, 6)), **arguments)
    assert str(error.value) == message


@PROPERTY
@given(
    x=matrices(values=True),
    n_heldout=st.one_of(st.integers(0, 8), st.floats(0.05, 0.45)),
    seed=st.integers(0, 2**40),
    min_user_clicks=st.integers(0, 6),
    min_item_clicks=st.integers(0, 4),
    held_out_fraction=st.floats(0.01, 0.99),
    counts=st.booleans(),
)
def test_the_split_keeps_its_promises(x, n_heldout, seed, counts, **split):
    try:
        dataset = Dataset.from_matrix(x, n_heldout, seed, counts=counts, **split)
    except ValueError as error:
        assert "must leave" in str(error)
        return
    assert_accounted(dataset)
    assert_strong_generalisation(dataset)
    columns = dataset.items.astype(int)
    for name, parts in (("train", PARTS[:1]), ("vad", PARTS[1:3]), ("test", PARTS[3:])):
        clicks = sum(getattr(dataset, part).to_dense() for part in parts).numpy()
        truth = x[getattr(dataset, f"users_{name}").astype(int)][:, columns]
        assert (clicks == (truth if counts else truth > 0)).all()
    again = Dataset.from_matrix(sp.coo_array(x), n_heldout, seed, counts=counts, **split)
    assert_same(dataset, again)


def test_the_order_of_the_rows_and_their_repeats_do_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"u{u},i{i}" for u, i in zip(*(rng.random((60, 40)) < 0.3).nonzero(), strict=True)]
    folders = []
    for k, lines in enumerate((rows, rows[::-1], list(rng.permutation(rows)))):
        path = write(tmp_path, "events.csv", "user,item\n" + "\n".join(lines))
        folders.append(tmp_path / str(k))
        split_dataset(read_events(path), 10, seed=4).save(folders[-1])
    for name in os.listdir(folders[0]):
        first, *others = [(folder / name).read_bytes() for folder in folders]
        assert all(first == other for other in others), name
    other_seed = split_dataset(read_events(path), 10, seed=5)
    assert other_seed.users_test.tolist() != Dataset.load(folders[0]).users_test.tolist()


def test_held_out_clicks_are_drawn_evenly():
    x = Clicks.from_matrix(np.ones((4000, 10)))
    held_out = data._draw_held_out(x, 0.2, np.random.default_rng(0)).reshape(4000, 10)
    assert (held_out.sum(1) == 2).all()
    # each position 800 times, standard deviation 25
    assert abs(held_out.sum(0) - 800).max() < 5 * 25


def test_ids_go_by_their_position_whatever_holds_them():
    x, users = np.ones((10, 5)), [f"u{n}" for n in range(10)]
    data = Dataset.from_matrix(x, 2, users=Labelled(users), items=Labelled("abcde"))
    expected = Dataset.from_matrix(x, 2, users=users, items=list("abcde"))
    for name in ("users_train", "users_vad", "users_test", "items"):
        assert getattr(data, name).tolist() == getattr(expected, name).tolist()
    moved, _ = map_items(Clicks([0, 1], [0], n_items=2), Labelled("ab"), Labelled("cba"))
    assert moved.indices.tolist() == [2]


@pytest.mark.parametrize("ids", [set("abcde"), dict.fromkeys("abcde"), "abcde"])
def test_ids_without_an_order_are_refused(ids):
    x, got = np.ones((10, 5)), type(ids).__name__
    for call in (
        lambda: Dataset.from_matrix(x, 2, items=ids),
        lambda: map_items(Clicks.from_matrix(x), ids, list("abcde")),
        lambda: map_items(Clicks.from_matrix(x), list("abcde"), ids),
    ):
        with pytest.raises(TypeError, match=f"must be ids in their order, got {got}; pass a list$"):
            call()


def test_items_are_mapped_by_id():
    x = Clicks.from_matrix(np.array([[1, 2, 0], [0, 0, 3]]))
    moved, n_unknown = map_items(x, ["a", "d", 10], ["10", "c", "b", "a"])
    assert moved.to_dense().tolist() == [[0, 0, 0, 1], [3, 0, 0, 0]]
    assert n_unknown == 1
    with pytest.raises(ValueError) as error:
        map_items(x, ["a", "d", 10], ["10", "c", "b", "a"], strict=True)
    assert str(error.value) == (
        "prepare: items must be in the vocabulary, got 1 unknown: 'd'; leave out strict to drop them"
    )


def test_held_out_clicks_on_unknown_items_are_dropped_and_counted_or_named():
    vocabulary, items = list("abc"), ["a", "b", *(f"x{n}" for n in range(7))]
    fold_in, held_out = ("a", "x0"), ("b", "x1")
    dropped = 0
    for row, left in ((fold_in, ["a"]), (held_out, ["b"])):
        x = Clicks.from_pairs([0, 0], [items.index(item) for item in row], 1, len(items))
        moved, n_unknown = map_items(x, items, vocabulary)
        assert [vocabulary[i] for i in moved.indices] == left
        dropped += n_unknown
    assert dropped == 2
    with pytest.raises(ValueError) as error:
        map_items(Clicks([0, 9], range(9), n_items=9), items, vocabulary, strict=True)
    assert str(error.value) == (
        "prepare: items must be in the vocabulary, got 7 unknown: 'x0', 'x1', 'x2', 'x3', 'x4'; "
        "leave out strict to drop them"
    )


@pytest.mark.skipif("FASTVAE_DATA" not in os.environ, reason="FASTVAE_DATA names no data folder")
@pytest.mark.parametrize("name", ["ml100k_ge4", "gowalla", "ml10m_fastvae"])
def test_real_clicks_split_as_promised(name):
    with np.load(Path(os.environ["FASTVAE_DATA"], f"{name}.npz"), allow_pickle=False) as file:
        indptr, indices, shape = file["indptr"], file["indices"], file["shape"]
    x = Clicks(indptr, indices.astype(np.int64), None, int(shape[1]))
    dataset = Dataset.from_matrix(x, n_heldout=150, seed=1)
    assert dataset.info["users"]["short"] == 0
    assert dataset.info["n_skipped"]["test"] < 5
    assert_accounted(dataset)
    assert_strong_generalisation(dataset)
