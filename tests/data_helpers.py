"""What the tests of reading, splitting and keeping click data share."""

import json

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fastvae.data import Dataset
from fastvae.events import DROPPED

# tmp_path is one folder for all examples of a test, which is what these tests want
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


PARTS = ("train", "vad_tr", "vad_te", "test_tr", "test_te")


IDS = ("users_train", "users_vad", "users_test", "items")


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs_of(events):
    """The (user id, item id) pairs of Events, as a sorted list."""
    x = events.x.to_scipy().tocoo()
    return sorted(zip(events.users[x.row], events.items[x.col], strict=True))


def assert_accounted(dataset):
    """Events, users and items add up: nothing is lost that is not reported."""
    info = dataset.info
    assert list(info["dropped"]) == list(DROPPED)
    assert info["n_events"] == sum(info["dropped"].values()) + sum(info["kept"].values())
    assert list(info["kept"].values()) == [getattr(dataset, part).nnz for part in PARTS]
    users, items = info["users"], info["items"]
    assert users["read"] == users["short"] + users["train"] + users["vad"] + users["test"]
    assert items["read"] == items["rare"] + items["not_in_train"] + items["vocabulary"]
    for name in ("vad", "test"):
        assert info["n_evaluated"][name] + info["n_skipped"][name] == users[name]
    lines = dataset.report()
    assert lines[0][1] == sum(number for _, number in lines[1:])
    json.dumps(info, allow_nan=False)


def assert_strong_generalisation(dataset):
    """The promises of the split, on any dataset."""
    ids = [*dataset.users_train, *dataset.users_vad, *dataset.users_test]
    assert len(set(ids)) == len(ids), "a user is in two parts"
    assert dataset.train.n_items == len(dataset.items) == len(set(dataset.items))
    assert (np.bincount(dataset.train.indices, minlength=len(dataset.items)) > 0).all()
    fraction = dataset.info["settings"]["held_out_fraction"]
    for name in ("vad", "test"):
        tr, te = (getattr(dataset, f"{name}_{kind}").to_scipy() for kind in ("tr", "te"))
        assert tr.shape == te.shape == (len(getattr(dataset, f"users_{name}")), len(dataset.items))
        assert (tr.astype(bool).multiply(te.astype(bool))).nnz == 0, "a click is in both"
        n_tr, n_te = np.diff(tr.indptr), np.diff(te.indptr)
        assert (n_te == [int(fraction * n) for n in n_tr + n_te]).all()
        assert (n_tr[n_te > 0] > 0).all(), "an evaluated user has nothing to fold in"
        assert dataset.info["n_evaluated"][name] == (n_te > 0).sum()


def assert_same(a, b):
    for part in PARTS:
        x, y = getattr(a, part), getattr(b, part)
        assert x.shape == y.shape and (x.to_scipy() != y.to_scipy()).nnz == 0, part
    for name in IDS:
        assert getattr(a, name).tolist() == getattr(b, name).tolist(), name
    assert a.info == b.info


@st.composite
def matrices(draw, values=False):
    n_users, n_items = draw(st.integers(3, 40)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.random((n_users, n_items)) < draw(st.floats(0.05, 1.0))
    return x * rng.integers(1, 4, x.shape) if values else x.astype(int)


def small_dataset(seed=0, **arguments):
    x = np.random.default_rng(seed).integers(0, 3, (30, 8))
    return Dataset.from_matrix(x, 5, seed, min_user_clicks=1, counts=True, **arguments)
