"""fastvae.events: what is read is what was written, and every event is accounted for."""

import csv
import io
from collections import Counter

import pytest
from data_helpers import PROPERTY, pairs_of, write
from hypothesis import given
from hypothesis import strategies as st

from fastvae.data import split_dataset
from fastvae.events import read_events

pytest.importorskip("polars")


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


def test_ratings_that_are_no_numbers_are_counted_or_named(tmp_path):
    path = write(tmp_path, "comma.csv", "user;item;rating\nu;a;4,5\nu;b;3\nu;c;\nu;d;0\n;e;x\n")
    events = read_events(path)
    assert pairs_of(events) == [("u", "a"), ("u", "b"), ("u", "c")]
    assert events.info["source"]["kept_without_a_number"] == 1
    assert read_events(path, min_rating=1).info["source"]["kept_without_a_number"] == 0
    with pytest.raises(ValueError) as error:
        split_dataset(read_events(path, min_rating=4), 0, min_user_clicks=1)
    assert str(error.value) == (
        "prepare: events must leave a user with at least 1 clicks, got none of 5 events (dropped 2 "
        "with a rating below "
        "min_rating; 1 with no user id; 1 with no rating; 1 with a rating that is not a number); "
        "lower the thresholds or "
        "add data"
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
