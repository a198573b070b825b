"""fastvae.data: what is read is what was written, every event is accounted for, and no folder is trusted."""

import csv
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvae import data, events
from fastvae.clicks import Clicks
from fastvae.data import Dataset, check_writable, map_items, split_dataset
from fastvae.events import movielens_100k, read_events, read_titles

pl = pytest.importorskip("polars")
# tmp_path is one folder for all examples of a test, which is what these tests want
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
ON_DISK = settings(PROPERTY, max_examples=20)
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
    assert list(info["dropped"]) == list(events.DROPPED)
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


# reading events

EVENTS = [("007", "a"), ("007", "ü"), ("7", "a"), ("u 1", "b")]
TEXT = {
    "header.csv": "userId,movieId,rating,timestamp\n007,a,4,1\n007,ü,5,2\n7,a,3,1\nu 1,b,4.5,9\n",
    "other_order.csv": "rating,timestamp,Item ID,UID\n4,1,a,007\n5,2,ü,007\n3,1,a,7\n4.5,9,b,u 1\n",
    "two_columns.csv": "user,item\n007,a\n007,ü\n7,a\nu 1,b\n",
    "no_newline_at_end.csv": "user,item\n007,a\n007,ü\n7,a\nu 1,b",
    "windows.csv": "\ufeffuser,item\r\n007,a\r\n007,ü\r\n7,a\r\nu 1,b\r\n",
    "quoted.csv": '"user","item"\n"007","a"\n007,"ü"\n"7",a\n"u 1","b"\n',
    "semicolon.csv": "user;item\n007;a\n007;ü\n7;a\nu 1;b\n",
    "bar.txt": "user|item\n007|a\n007|ü\n7|a\nu 1|b\n",
    "header.tsv": "user\titem\n007\ta\n007\tü\n7\ta\nu 1\tb\n",
    "recbole.inter": "user_id:token\titem_id:token\ttimestamp:float\n007\ta\t1\n007\tü\t2\n7\ta\t1\nu 1\tb\t9\n",
    "headerless.data": "007\ta\t4\t881250949\n007\tü\t5\t2\n7\ta\t3\t1\nu 1\tb\t4\t9\n",
    "headerless_two_columns.csv": "007,a\n007,ü\n7,a\nu 1,b\n",
    "ratings.dat": "007::a::4::1\n007::ü::5::2\n7::a::3::1\nu 1::b::4.5::9\n",
    "star*[1].csv": "user,item\n007,a\n007,ü\n7,a\nu 1,b\n",
}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("gzipped", [False, True])
def test_text_of_every_kind_is_read_alike(tmp_path, name, gzipped):
    content = TEXT[name].encode()
    path = write(tmp_path, name, gzip.compress(content) if gzipped else content)
    events = read_events(path)
    assert pairs_of(events) == EVENTS
    assert events.users.tolist() == ["007", "7", "u 1"]
    assert events.items.tolist() == ["a", "b", "ü"]
    assert events.info["n_events"] == 4 and sum(events.info["dropped"].values()) == 0
    assert events.info["source"]["lines_joined_by_quotes"] == 0


def test_parquet_ids_become_the_text_that_a_person_would_write(tmp_path):
    path = tmp_path / "events.parquet"
    frame = pl.DataFrame(
        {
            "uid": pl.Series([2**63 + 1, 7, None], dtype=pl.UInt64),
            "iid": pl.Series(["007", "a", "b"], dtype=pl.Categorical),
            "whole": [1.0, float("nan"), 3.0],  # what pandas makes of integers with one missing
            "score": [4.5, 3.0, None],
        }
    )
    frame.write_parquet(path)
    assert pairs_of(read_events(path)) == [("7", "a"), (str(2**63 + 1), "007")]
    events = read_events(path, user="whole", min_rating=4)
    assert pairs_of(events) == [("1", "007")]
    assert events.info["dropped"]["missing_user"] == 1
    assert events.info["dropped"]["missing_rating"] == 1
    assert events.info["source"]["columns"] == {"user": "whole", "item": "iid", "rating": "score"}


def test_every_reason_has_its_own_count(tmp_path):
    rows = [
        ",a,5",  # missing user
        "  ,a,5",
        '"",,x',
        "u,,5",  # missing item
        "u,a,",  # missing rating
        "u,a",
        "u,a,good",  # unparsable rating
        "u,a,nan",
        "u,a,inf",
        "u,a,3.99",  # below
        "u,a,4",
        "u,a,5",  # duplicate
        "u,b, 4.0 ",
        "",  # a blank line has no user
    ]
    path = write(tmp_path, "events.csv", "user,item,rating\n" + "\n".join(rows) + "\n")
    events = read_events(path, min_rating=4)
    assert pairs_of(events) == [("u", "a"), ("u", "b")]
    reasons = {why: n for why, n in events.info["dropped"].items() if n}
    assert reasons == {
        "missing_user": 4,
        "missing_item": 1,
        "missing_rating": 2,
        "unparsable_rating": 3,
        "below_min_rating": 1,
        "duplicates": 1,
    }
    assert events.info["n_events"] == len(rows) == sum(reasons.values()) + events.x.nnz


def test_a_rating_of_zero_is_no_click_unless_asked_for(tmp_path):
    path = write(tmp_path, "e.csv", "user,item,rating\nu,a,0.\nu,b,1.\nv,a,\nv,b,-1\n")
    events = read_events(path)
    assert pairs_of(events) == [("u", "b"), ("v", "a"), ("v", "b")]
    assert events.info["dropped"]["zero_rating"] == 1
    assert pairs_of(read_events(path, min_rating=0)) == [("u", "a"), ("u", "b")]


def test_duplicate_pairs_count_once_or_as_often_as_they_come(tmp_path):
    path = write(tmp_path, "e.csv", "user,item\nu0,i0\nu0,i0\nu0,i1\n")
    assert read_events(path).x.values is None
    assert read_events(path).x.nnz == 2
    counted = read_events(path, counts=True)
    assert counted.x.values.tolist() == [2.0, 1.0]
    assert counted.info["dropped"]["duplicates"] == 1


def test_ids_with_a_colon_in_a_file_of_double_colons(tmp_path):
    lines = "u:1::x:2::4::2001-01-01 12:30:00\nu:1::x:3::5::2001-01-01 12:31:00\n"
    path = write(tmp_path, "ratings.dat", lines)
    assert pairs_of(read_events(path)) == [("u:1", "x:2"), ("u:1", "x:3")]
    assert pairs_of(read_events(path, min_rating=5)) == [("u:1", "x:3")]
    films = write(tmp_path, "movies.dat", "item::title::genre\n1::Star Wars: Episode IV::Action\n")
    assert read_titles(films) == {"1": "Star Wars: Episode IV"}


@pytest.mark.parametrize("separator", ["\t", "::"])
def test_quotes_are_characters_where_tabs_or_double_colons_separate(tmp_path, separator):
    rows = [("1", '"a"', "4"), ('"2"', 'b"', "5"), ('3"', '"b c', "5")]
    lines = "".join(f"{separator.join(row)}\n" for row in rows)
    events = read_events(write(tmp_path, "ratings.dat", lines))
    assert pairs_of(events) == sorted(row[:2] for row in rows)


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_joined_by_quotes_are_counted_whether_the_last_line_ends_or_not(tmp_path, end):
    plain = write(tmp_path, "plain.csv", f"user,item\nu,a\nv,b{end}")
    assert read_events(plain).info["source"]["lines_joined_by_quotes"] == 0
    quoted = write(tmp_path, "quoted.csv", f'user,item\nu,"a\nb"\nv,b{end}')
    events = read_events(quoted)
    assert pairs_of(events) == [("u", "a\nb"), ("v", "b")]
    assert events.info["source"]["lines_joined_by_quotes"] == 1


@pytest.mark.parametrize(
    ("users", "whole"),
    [([1.0, 2.0**53 - 1], True), ([1.0, 2.0**53], False), ([1.0, 1e19, 2e19], False)],
)
def test_whole_floats_become_integers_where_a_float_is_one_integer(tmp_path, users, whole):
    path = tmp_path / "events.parquet"
    pl.DataFrame({"user": users, "item": "a"}).write_parquet(path)
    texts = read_events(path).users
    assert [float(text) for text in texts] == users
    assert [text.isdigit() for text in texts] == [whole] * len(users)


def test_a_parquet_column_of_structures_is_no_column_of_ids(tmp_path):
    path = tmp_path / "nested.parquet"
    pl.DataFrame({"user": [{"a": 1}], "item": ["i"]}).write_parquet(path)
    with pytest.raises(
        ValueError, match=r"nested.parquet: 'user' of lists or structures, which are"
    ):
        read_events(path)


def test_ratings_that_are_no_numbers_are_counted_or_named(tmp_path):
    path = write(tmp_path, "comma.csv", "user;item;rating\nu;a;4,5\nu;b;3\nu;c;\nu;d;0\n;e;x\n")
    events = read_events(path)
    assert pairs_of(events) == [("u", "a"), ("u", "b"), ("u", "c")]
    assert events.info["source"]["kept_without_a_number"] == 1
    assert read_events(path, min_rating=1).info["source"]["kept_without_a_number"] == 0
    with pytest.raises(ValueError) as error:
        split_dataset(read_events(path, min_rating=4), 0, min_user_clicks=1)
    assert str(error.value) == (
        "prepare: events must leave a user with at least 1 clicks, got none of 5 events (dropped 2 with a rating below "
        "min_rating; 1 with no user id; 1 with no rating; 1 with a rating that is not a number); lower the thresholds or "
        "add data"
    )


def test_columns_can_be_named(tmp_path):
    named = write(tmp_path, "named.csv", "who,what,user,item\nu,a,1,2\n")
    assert pairs_of(read_events(named, user="who", item="what")) == [("u", "a")]
    assert pairs_of(read_events(named)) == [("1", "2")]
    marked = write(tmp_path, "marked.csv", "\ufeffwho,what\nu,a\n")
    assert pairs_of(read_events(marked, user="who", item="what")) == [("u", "a")]
    numbered = write(tmp_path, "numbered.csv", "1,2,3\n2,5,6\n")
    assert pairs_of(read_events(numbered, user="2", item="1")) == [("2", "1"), ("5", "2")]
    typed = write(tmp_path, "typed.inter", "who:token\twhat:token_seq\nu\ta\n")
    assert pairs_of(read_events(typed, user="who", item="what")) == [("u", "a")]
    words = write(tmp_path, "words.csv", "u;a b\nv;c d\n")
    assert pairs_of(read_events(words, header=False)) == [("u", "a b"), ("v", "c d")]
    assert pairs_of(read_events(words, header=False, separator=" ")) == [("u;a", "b"), ("v;c", "d")]


def test_of_several_columns_that_fit_the_likeliest_is_taken(tmp_path):
    path = write(tmp_path, "e.csv", "username,user_id,isbn,item_id\nAnn,u,1,a\n")
    assert pairs_of(read_events(path)) == [("u", "a")]


BAD_FILES = {
    "no_item.csv": (
        "user,thing\nu,a\n",
        {},
        "events: item must name a column of no_item.csv, got no column with a usual name; the columns are 'user', 'thing'",
    ),
    "wrong_name.csv": (
        "user,item\nu,a\n",
        {"user": "uid"},
        "events: user must name a column of wrong_name.csv, got 'uid'; the columns are 'user', 'item'",
    ),
    "same.csv": (
        "user,item\nu,a\n",
        {"item": "user"},
        "events: item must name another column than user, got 'user' for both",
    ),
    "same_guess.csv": (
        "user,item\nu,a\n",
        {"user": "item"},
        "events: item must name another column than user, got 'item' for both",
    ),
    "twice.csv": (
        "user,item,item\nu,a,b\n",
        {},
        "events: item must name one column of twice.csv, got 'item', which several are called; rename the others",
    ),
    "old_mac.csv": (
        "user,item\ru,a\r",
        {},
        "events: file must be a well-formed table, got old_mac.csv: lines that end in CR alone; convert the line ends to LF",
    ),
    "unknown_words.csv": (
        "who,what\nu,a\n",
        {},
        "events: file must start with a line of column names, got 'who', 'what' in unknown_words.csv; "
        "name its user and item columns, or say that it has no header",
    ),
    "no_rating.csv": (
        "1,2\n",
        {"min_rating": 4},
        "events: rating must name a column of no_rating.csv, got no column with a usual name; the columns are '1', '2'",
    ),
    "empty.csv": (
        "",
        {},
        "events: file must start with a header or an event, got an empty first line in empty.csv",
    ),
    "header_only.csv": (
        "user,item\n",
        {},
        "events: file must hold at least one event, got none in header_only.csv",
    ),
    "latin1.csv": (
        "user,item\nu,caf\xe9\n".encode("latin1"),
        {},
        "events: file must be UTF-8 text or Parquet, got other bytes in latin1.csv; convert the file first",
    ),
    "utf16.csv": (
        "user,item\nu,a\n".encode("utf-16"),
        {},
        "events: file must be UTF-8 text or Parquet, got other bytes in utf16.csv; convert the file first",
    ),
    "ragged.csv": (
        "user,item\nu,a\nu,a,b\n",
        {},
        "events: file must have no more fields on a line than on the first, got such a line in ragged.csv",
    ),
    "ragged_beyond_what_is_read.csv": (
        "user,item,time\na,x,1\nb,Hello, World,1\nc,z,1\n",
        {},
        "events: file must have no more fields on a line than on the first, got such a line in ragged_beyond_what_is_read.csv",
    ),
    "ragged_before.tsv": (
        "user\ttitle_x\titem\na\tT\tx\nb\tHello\tWorld\ty\n",
        {},
        "events: file must have no more fields on a line than on the first, got such a line in ragged_before.tsv",
    ),
    "ragged.dat": (
        "1::2::4\n1::2::4::5\n",
        {},
        "events: file must have no more fields on a line than on the first, got such a line in ragged.dat",
    ),
    "excel.csv": (
        "sep=,\nuser,item\nu,a\n",
        {},
        "events: file must start with a line of column names, got 'sep=', '' in excel.csv; remove what stands above them",
    ),
    "no_mark.csv": (
        "user,item\nu,a\n".encode("utf-16-le"),
        {},
        "events: file must be UTF-8 text or Parquet, got other bytes in no_mark.csv; convert the file first",
    ),
    "open_quote.csv": (
        'user,item\nu,"a\nv,b\n',
        {},
        "events: file must close every double quote, got 1 of them in open_quote.csv; write a quote inside a field twice",
    ),
    "long.csv": (
        "user,item" + "x" * 70_000,
        {},
        "events: file must be a well-formed table, got long.csv: a first line of more than 65536 bytes",
    ),
    "separator.csv": (
        "user,item\n",
        {"separator": "--"},
        "events: separator must be one ASCII character or '::', got '--'",
    ),
    "threshold.csv": (
        "user,item\n",
        {"min_rating": float("nan")},
        "events: min_rating must be a finite number, got nan",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, name):
    content, arguments, message = BAD_FILES[name]
    with pytest.raises(ValueError) as error:
        read_events(write(tmp_path, name, content), **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "content",
    [b"PAR1 and no more PAR1", b"PAR1", gzip.compress(b"user,item\nu,a\n" * 99)[:-9], b"\x1f\x8b\x08nothing"],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"^events: file must be .*damaged\.bin"):
        read_events(write(tmp_path, "damaged.bin", content))


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        read_events(tmp_path)
    assert str(error.value) == f"events: path must be a file, got a folder at {tmp_path}"
    with pytest.raises(ValueError) as error:
        read_events(tmp_path / "none")
    assert str(error.value) == f"events: path must be a file, got nothing at {tmp_path}/none"


def test_without_polars_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError, match=r"run pip install 'fastvae-cf\[cli\]'$"):
        read_events(write(tmp_path, "e.csv", "user,item\nu,a\n"))


@PROPERTY
@given(content=st.binary(max_size=200), name=st.sampled_from(["x.csv", "x.tsv", "x.parquet"]))
def test_any_bytes_are_read_or_refused(tmp_path, content, name):
    for prefix in (b"", b"user,item,rating\n", b"PAR1"):
        path = write(tmp_path, name, prefix + content)
        for arguments in ({}, {"header": False}):
            try:
                events = read_events(path, **arguments)
            except ValueError as error:
                assert str(error).startswith("events: ") and "\n" not in str(error)
            else:
                assert events.info["n_events"] == events.x.nnz + sum(
                    events.info["dropped"].values()
                )


# str.strip takes four control characters for white space that polars does not; a byte 0 is refused
ID = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\x1c\x1d\x1e\x1f"), max_size=12
)


@PROPERTY
@given(rows=st.lists(st.tuples(ID, ID, st.sampled_from(["", "0", "3", "4", "5", "x"])), min_size=1))
def test_csv_agrees_with_a_slow_and_obvious_reader(tmp_path, rows):
    with io.StringIO(newline="") as text:
        csv.writer(text, lineterminator="\n").writerows([("user", "item", "rating"), *rows])
        path = write(tmp_path, "rows.csv", text.getvalue())
    kept, dropped = set(), Counter()
    for user, item, rating in rows:
        if not user.strip() or not item.strip():
            dropped["missing_user" if not user.strip() else "missing_item"] += 1
        elif rating in ("", "x"):
            dropped["missing_rating" if rating == "" else "unparsable_rating"] += 1
        elif float(rating) < 4:
            dropped["below_min_rating"] += 1
        elif (user, item) in kept:
            dropped["duplicates"] += 1
        else:
            kept.add((user, item))
    events = read_events(path, min_rating=4)
    assert pairs_of(events) == sorted(kept)
    assert {why: n for why, n in events.info["dropped"].items() if n} == dict(dropped)


# splitting


def events_of(rows):
    """Events from {user: items}."""
    items = sorted({item for row in rows.values() for item in row})
    pairs = [(u, items.index(i)) for u, row in enumerate(rows.values()) for i in row]
    x = Clicks.from_pairs(*np.array(pairs, np.int64).reshape(-1, 2).T, len(rows), len(items))
    info = {"n_events": x.nnz, "dropped": {}, "source": None}
    return events.Events(x, np.array(list(rows), object), np.array(items, object), info)


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


def test_nobody_needs_to_be_held_out():
    dataset = Dataset.from_matrix(np.ones((3, 5)), n_heldout=0)
    assert dataset.train.shape == (3, 5) and dataset.test_te.shape == (0, 5)
    assert_accounted(dataset)


FEW = "n_heldout, or add data"
BAD_SETTINGS = {
    "too_many": (
        {"n_heldout": 5},
        "prepare: n_heldout must leave users to train, validate and test on, got 5 of 10 users with at least 5 clicks; lower "
        + FEW,
    ),
    "too_many_without_a_minimum": (
        {"n_heldout": 5, "min_user_clicks": 0},
        "prepare: n_heldout must leave users to train, validate and test on, got 5 of 10 users with at least 1 clicks; lower "
        + FEW,
    ),
    "fraction_of_few": (
        {"n_heldout": 0.05},
        "prepare: n_heldout must leave users to train, validate and test on, got 0.05 of 10 users with at least 5 clicks; raise "
        + FEW,
    ),
    "none_left": (
        {"n_heldout": 1, "min_user_clicks": 9},
        "prepare: events must leave a user with at least 9 clicks, got none of 60 events (dropped 60 with a user with "
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
    "seed": ({"seed": -1}, "prepare: seed must be an integer of at least 0, got -1"),
    "held_out": (
        {"held_out_fraction": 1.0},
        "prepare: held_out_fraction must lie in (0, 1), got 1.0",
    ),
    "no_fraction": (
        {"held_out_fraction": "a"},
        "prepare: held_out_fraction must lie in (0, 1), got 'a'",
    ),
    "few_ids": ({"items": ["a"]}, "prepare: items must hold 6 ids, got 1"),
    "same_ids": ({"users": [1] * 10}, "prepare: users must hold distinct ids, got 9 repeated"),
    "odd_ids": ({"items": [1.5] * 6}, "prepare: items must hold str or int ids, got float"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_in_one_sentence(name):
    arguments, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError) as error:
        Dataset.from_matrix(np.ones((10, 6)), **arguments)
    assert str(error.value) == message


@st.composite
def matrices(draw, values=False):
    n_users, n_items = draw(st.integers(3, 40)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.random((n_users, n_items)) < draw(st.floats(0.05, 1.0))
    return x * rng.integers(1, 4, x.shape) if values else x.astype(int)


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
        "prepare: items must be in the vocabulary, got 7 unknown: 'x0', 'x1', 'x2', 'x3', 'x4'; leave out strict to drop them"
    )


def test_str_and_path_are_the_same(tmp_path):
    path = write(
        tmp_path,
        "e.csv",
        "user,item\n" + "".join(f"u{u},i{i}\n" for u in range(9) for i in range(6)),
    )
    one, two = read_events(str(path)), read_events(path)
    assert pairs_of(one) == pairs_of(two)
    dataset = split_dataset(one, 2)
    dataset.save(str(tmp_path / "folder"))
    assert_same(Dataset.load(str(tmp_path / "folder")), Dataset.load(tmp_path / "folder"))
    assert check_writable(str(tmp_path / "folder")) == check_writable(tmp_path / "folder")
    titles = write(tmp_path, "t.csv", "item,title\na,A\n")
    assert read_titles(str(titles)) == read_titles(titles) == {"a": "A"}


# the dataset folder


def small_dataset(seed=0, **arguments):
    x = np.random.default_rng(seed).integers(0, 3, (30, 8))
    return Dataset.from_matrix(x, 5, seed, min_user_clicks=1, counts=True, **arguments)


@ON_DISK
@given(
    x=matrices(values=True),
    data=st.data(),
    counts=st.booleans(),
    n_heldout=st.integers(0, 1),
)
def test_any_dataset_survives_the_disk(tmp_path, x, data, counts, n_heldout):
    text = st.text(max_size=20)
    ids = [
        data.draw(st.lists(text, min_size=n, max_size=n, unique=True), label=label)
        for n, label in zip(x.shape, ("users", "items"), strict=True)
    ]
    try:
        dataset = Dataset.from_matrix(
            x, n_heldout, users=ids[0], items=ids[1], counts=counts, min_user_clicks=1
        )
    except ValueError:
        return
    dataset.save(tmp_path / "folder")
    assert_same(dataset, Dataset.load(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["folder"]


def test_ids_keep_their_meaning_and_index_0_is_an_item_like_any_other(tmp_path):
    path = write(tmp_path, "e.csv", "user,item\nu,b\nu,a\nu,10\nv,a\nw,a\n")
    dataset = split_dataset(read_events(path), 1, seed=1, min_user_clicks=1)
    dataset.save(tmp_path / "folder")
    loaded = Dataset.load(tmp_path / "folder")
    assert loaded.items.tolist() == dataset.items.tolist()
    whole = split_dataset(read_events(path), 0, min_user_clicks=1)
    assert whole.items.tolist() == ["10", "a", "b"] and whole.train.n_items == 3
    row = whole.users_train.tolist().index("v")
    assert whole.items[whole.train.rows([row]).compact().indices.numpy()].tolist() == ["a"]


def test_one_long_id_costs_its_own_length(tmp_path):
    items = [str(k) for k in range(2000)]
    items[7] = "long, " * 100_000
    x = np.eye(2000)
    Dataset.from_matrix(x, 0, items=items, min_user_clicks=1).save(tmp_path / "folder")
    # 600 kB of text; as fixed-width unicode it would be 4.8 GB
    assert (tmp_path / "folder" / "ids.npz").stat().st_size < 700_000
    assert Dataset.load(tmp_path / "folder").items.tolist() == items


def test_an_id_that_is_no_text_is_refused(tmp_path):
    dataset = small_dataset(items=["\ud800", *"abcdefg"])
    with pytest.raises(ValueError) as error:
        dataset.save(tmp_path / "folder")
    assert str(error.value) == "dataset: ids must be Unicode text, got '\\ud800'"
    assert os.listdir(tmp_path) == []


def test_saving_replaces_a_dataset_and_nothing_else(tmp_path):
    folder = tmp_path / "some" / "folder"
    small_dataset(0).save(folder)
    small_dataset(1).save(folder)
    assert_same(small_dataset(1), Dataset.load(folder))
    assert os.listdir(folder.parent) == ["folder"]
    (tmp_path / "empty").mkdir()
    small_dataset(1).save(tmp_path / "empty")

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError) as error:
        small_dataset(0).save(folder)
    assert str(error.value) == (
        f"dataset: folder must be new, empty or a dataset, got 'notes.txt' in {folder}; choose another name"
    )
    assert (folder / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "info.json").write_text("[]")
    with pytest.raises(ValueError, match=r"got 'info\.json' in"):
        check_writable(foreign)
    with pytest.raises(ValueError, match=r"^dataset: folder must be a folder, got a file at "):
        check_writable(foreign / "info.json")
    with pytest.raises(ValueError, match=r"must be a folder, got a file at .*/info.json$"):
        check_writable(foreign / "info.json" / "below")


def test_a_link_is_followed_to_the_folder_that_is_replaced(tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    small_dataset(0).save(real)
    link.symlink_to(real)
    small_dataset(1).save(link)
    assert link.is_symlink() and not real.is_symlink()
    assert_same(small_dataset(1), Dataset.load(real))
    assert_same(small_dataset(1), Dataset.load(link))
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(real.parent) == ["real"]


@pytest.mark.parametrize("name", ["folder", ".folder.old"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, name):
    folder = tmp_path / "folder"
    small_dataset(0).save(folder)
    folder.rename(tmp_path / name)  # .folder.old is what a kill between the renames leaves

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        small_dataset(1).save(folder)
    assert_same(small_dataset(0), Dataset.load(folder))
    assert os.listdir(tmp_path) == ["folder"]


KILLER = """
import os, random, shutil, signal, sys, time
import numpy as np
from fastvae.data import Dataset

folder = sys.argv[1]
small, large = (
    Dataset.from_matrix(np.ones((n, 6)), 1, items=[f"{n} {k}" for k in range(6)]) for n in (5, 3000)
)

def in_child(work, kill_after=None):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

def die_at(call, count):
    # the process ends just before this call is made for the count-th time
    owner = shutil if call == "rmtree" else os
    real, left = getattr(owner, call), [count]
    def step(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return real(*args, **kwargs)
    setattr(owner, call, step)

def check():
    loaded = Dataset.load(folder)
    assert loaded.info["users"]["read"] in (5, 3000)
    assert loaded.items[0] == f"{loaded.info['users']['read']} 0"
    return loaded.info["users"]["read"]

small.save(folder)
n_deaths, seen = 0, set()
for call, n_calls in (("rename", 3), ("fsync", 9), ("rmtree", 3)):
    for count in range(n_calls):
        def work():
            die_at(call, count)
            (large if check() == 5 else small).save(folder)
        n_deaths += in_child(work) != 0
        seen.add(check())
assert n_deaths >= 12, n_deaths

def forever():
    while True:
        small.save(folder)
        large.save(folder)

random.seed(0)
for _ in range(20):
    assert in_child(forever, random.uniform(0.001, 0.06)) == signal.SIGKILL
    seen.add(check())
small.save(folder)
assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
assert check() == 5 and seen == {5, 3000}
print("whole after every death")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "whole after every death\n", done.stderr


def npy(header, body=b""):
    text = str(header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def rewrite(path, compression=zipfile.ZIP_STORED, **members):
    """Write the .npz at path again, with other bytes for some members; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**old, **{f"{k}.npy": v for k, v in members.items()}}.items():
            if content is not None:
                archive.writestr(name, content)


def header(dtype, *shape):
    return {"descr": dtype, "fortran_order": False, "shape": shape}


def edit_info(folder, **changes):
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps({**info, **changes}))


def replace(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


def promise(path, size, compressed):
    """Let one member of the .npz claim other sizes and fit its own header to them."""
    rewrite(path, indices=npy(header("<i4", (size - 128) // 4)))
    replace(path, struct.pack("<LL", 128, 128), struct.pack("<LL", compressed, size))


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


HOSTILE = {
    "huge": (
        "train.npz",
        lambda f: rewrite(f / "train.npz", indices=npy(header("<i4", 10**12))),
        r"indices\.npy that promises 1000000000000 values in 128 bytes",
    ),
    "huge_ids": (
        "ids.npz",
        lambda f: rewrite(f / "ids.npz", items_utf8=npy(header("|u1", 10**12))),
        r"items_utf8\.npy that promises 1000000000000 values",
    ),
    "negative": (
        "train.npz",
        lambda f: rewrite(f / "train.npz", indices=npy(header("<i4", -1))),
        "that promises -1 values",
    ),
    "objects": (
        "train.npz",
        lambda f: rewrite(f / "train.npz", indices=npy(header("|O", 1), b"cos\nsystem\n(S'true'\ntR.")),
        "of shape .* and object",
    ),
    "code_for_a_header": (
        "train.npz",
        lambda f: rewrite(f / "train.npz", indices=npy("__import__('os').getcwd()")),
        "malformed",
    ),
    "two_dimensions": (
        "train.npz",
        lambda f: rewrite(f / "train.npz", shape=npy(header("<i8", 1, 2), bytes(16))),
        r"shape\.npy of shape \[1, 2\]",
    ),
    "bomb": (
        "train.npz",
        lambda f: rewrite(
            f / "train.npz", zipfile.ZIP_DEFLATED, indices=npy(header("<i4", 10**6), bytes(4 * 10**6))
        ),
        "a compressed or truncated member",
    ),
    "member_beyond_the_end": (
        "train.npz",
        lambda f: promise(f / "train.npz", 10**8, 10**8),
        r"a compressed or truncated member 'indices\.npy'",
    ),
    "member_of_two_sizes": (
        "train.npz",
        lambda f: promise(f / "train.npz", 192, 128),
        r"a compressed or truncated member 'indices\.npy'",
    ),
    "member_twice": (
        "train.npz",
        lambda f: (
            rewrite(f / "train.npz", shap_=npy(header("<i8", 2), np.array([20, 8]).tobytes())),
            replace(f / "train.npz", b"shap_", b"shape"),
        ),
        "members 'indices', 'indptr', 'shape', 'values'",
    ),
    "path_outside": (
        "train.npz",
        lambda f: rewrite(f / "train.npz", **{"../../outside": npy(header("<i4", 0))}),
        r"members '\.\./\.\./outside'",
    ),
    "member_missing": ("train.npz", lambda f: rewrite(f / "train.npz", indptr=None), "members"),
    "pickle": ("train.npz", lambda f: (f / "train.npz").write_bytes(b"\x80\x04K\x01."), "not a zip"),
    "truncated": ("vad_tr.npz", lambda f: truncate(f / "vad_tr.npz", 0.6), "not a zip"),
    "missing": ("test_te.npz", lambda f: (f / "test_te.npz").unlink(), "no such file"),
    "pipe": (
        "test_te.npz",
        lambda f: ((f / "test_te.npz").unlink(), os.mkfifo(f / "test_te.npz")),
        "no such file",
    ),
    "item_out_of_range": (
        "train.npz",
        lambda f: rewrite(f / "train.npz", shape=npy(header("<i8", 2), np.array([20, 1]).tobytes())),
        r"Clicks: indices must lie in \[0, 1\)",
    ),
    "other_vocabulary": (
        "vad_te.npz",
        lambda f: rewrite(f / "vad_te.npz", shape=npy(header("<i8", 2), np.array([5, 999]).tobytes())),
        r"must agree with the rest of the folder on \[5, 8\], got \[5, 999\]",
    ),
    "item_twice": (
        "ids.npz",
        lambda f: rewrite(f / "ids.npz", items_utf8=npy(header("|u1", 8), b"00234567")),
        "must agree with the rest of the folder on 8, got 7",
    ),
    "offsets": (
        "ids.npz",
        lambda f: rewrite(f / "ids.npz", items_offsets=npy(header("<i8", 2), np.array([0, 9**9]).tobytes())),
        "offsets that do not fit the text",
    ),
    "not_utf8": (
        "ids.npz",
        lambda f: rewrite(
            f / "ids.npz",
            items_utf8=npy(header("|u1", 1), b"\xff"),
            items_offsets=npy(header("<i8", 2), np.array([0, 1]).tobytes()),
        ),
        "utf-8",
    ),
    "version": (
        "info.json",
        lambda f: edit_info(f, version=2),
        "version 2, while this fastvae reads 1",
    ),
    "no_version": ("info.json", lambda f: edit_info(f, version=None), "version None"),
    "other_json": ("info.json", lambda f: (f / "info.json").write_text("{}"), "JSON of something else"),
    "no_json": ("info.json", lambda f: (f / "info.json").write_text("hello"), "Expecting value"),
    "deep_json": ("info.json", lambda f: (f / "info.json").write_text("[" * 10**5), "JSON|recursion"),
    "large_json": ("info.json", lambda f: (f / "info.json").write_text(" " * 2**21), "2097152 bytes"),
    "counts": ("info.json", lambda f: edit_info(f, n_events=7), "counts that do not add up"),
    "odd_counts": ("info.json", lambda f: edit_info(f, dropped={"x": "y"}), "other counts"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_foreign_folder_is_refused_in_one_sentence(tmp_path, name):
    file, damage, reason = HOSTILE[name]
    small_dataset().save(tmp_path / "folder")
    damage(tmp_path / "folder")
    tracemalloc.start()
    with pytest.raises(ValueError, match=reason) as error:
        Dataset.load(tmp_path / "folder")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert str(error.value).startswith(f"dataset: {file} must ") and "\n" not in str(error.value)


def damaged_folder(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        small_dataset().save(folder)
    return folder


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        Dataset.load(tmp_path / "none")
    assert str(error.value) == (
        f"dataset: folder must be a dataset folder, got nothing at {tmp_path}/none; write one with fastvae prepare"
    )


@pytest.mark.parametrize("change", ["missing", "not an object"])
def test_info_without_one_of_its_parts_is_refused(tmp_path_factory, change):
    folder = damaged_folder(tmp_path_factory)
    path = folder / "info.json"
    original = path.read_bytes()
    info = json.loads(original)
    parts = [name for name, part in info.items() if isinstance(part, dict) and name != "settings"]
    assert {"kept", "dropped", "users", "items", "n_evaluated", "n_skipped", "source"} <= set(parts)
    try:
        for name in parts:
            damaged = {key: value for key, value in info.items() if key != name}
            if change == "not an object":
                damaged[name] = 7
            path.write_text(json.dumps(damaged))
            with pytest.raises(ValueError, match=r"^dataset: .*info\.json"):
                Dataset.load(folder)
    finally:
        path.write_bytes(original)


@PROPERTY
@given(
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    file=st.sampled_from(sorted(data._FILES)),
)
def test_a_changed_byte_is_refused_or_harmless(tmp_path_factory, place, byte, file):
    folder = damaged_folder(tmp_path_factory)
    original = (folder / file).read_bytes()
    content = bytearray(original)
    content[int(place * len(content))] = byte
    (folder / file).write_bytes(content)
    try:
        assert_accounted(Dataset.load(folder))
    except ValueError as error:
        assert str(error).startswith("dataset: ")
    finally:
        (folder / file).write_bytes(original)


LARGE = """
import resource, sys
import numpy as np
import scipy.sparse as sp
from fastvae.data import Dataset

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(0)
n_users, n_items, nnz = 63_577, 319_205, 1_000_000
x = sp.coo_array((np.ones(nnz, np.float32), (rng.integers(0, n_users, nnz), rng.integers(0, n_items, nnz))), (n_users, n_items))
Dataset.from_matrix(x, n_heldout=0.1).save(sys.argv[1])
dataset = Dataset.load(sys.argv[1])
assert dataset.train.nnz > 700_000 and dataset.train.n_items > 250_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_catalogue_of_319205_items_takes_little_memory(tmp_path):
    command = [sys.executable, "-c", LARGE, str(tmp_path / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 500, "MiB; dense would be 77,000"


# MovieLens-100K

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


# real data


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
