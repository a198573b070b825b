"""fastvae.events: what is read is what was written, and every event is accounted for."""

import csv
import io
import re
from collections import Counter

import pytest
from data_helpers import PROPERTY, pairs_of, write
from hypothesis import given
from hypothesis import strategies as st

from fastvae import event_ids
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


# str.strip takes four control characters for white space that polars does not; a byte 0 is refused, and words for no id
# have tests of their own
ID = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\x1c\x1d\x1e\x1f"), max_size=12
).filter(lambda text: text.strip().lower() not in event_ids._NO_ID)


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


# what a file without a header holds in the columns that are taken by their place


def without_header(kind):
    """Twelve lines of a log whose first two columns are not user and item."""
    lines = {
        # gowalla and brightkite: user, time, place
        "times": [f"{u}\t2010-10-{10 + u}T23:55:27Z\t30.2\t-97.7\t2284{u}" for u in range(12)],
        # yoochoose: session, time, item
        "times_and_fractions_of_seconds": [f"{u},2014-04-07T10:51:{10 + u}.277Z,21453650{u},0" for u in range(12)],
        "american_dates": [f"{u}\t11/{10 + u}/2019 9:05:58 AM\t{u}" for u in range(12)],
        "compact_dates": [f"{u},201010{10 + u},3" for u in range(12)],
        "months": [f"{u},2010-{1 + u:02},3" for u in range(12)],
        "days_of_the_week": [f"{u}\tTue Apr 03 18:{10 + u}:09 +0000 2012\t{u}" for u in range(12)],
        "seconds": [f"{u},{1112486027 + 7 * u},3" for u in range(40)],
        "ratings": [f"{u},{u % 5 + 0.5},{u}" for u in range(12)],
        # a user and a list of items
        "lists": [f"{u}\t{u} {u + 1} {u + 7}" for u in range(12)],
        "json_lists": [f'{u},"[{u}, {u + 1}]"' for u in range(12)],
        "lists_of_news": [f"{u}\tN{u} N{u + 9}" for u in range(12)],
        "svm": [f"{u} {u}:1 {u + 3}:1" for u in range(12)],
    }  # fmt: skip
    return "\n".join(lines[kind]) + "\n"


@pytest.mark.parametrize(
    ("kind", "got"),
    [
        ("times", "times such as '2010-10-10T23:55:27Z'"),
        ("times_and_fractions_of_seconds", "times such as '2014-04-07T10:51:10.277Z'"),
        ("american_dates", "times such as '11/10/2019 9:05:58 AM'"),
        ("compact_dates", "times such as '20101010'"),
        ("months", "times such as '2010-01'"),
        ("days_of_the_week", "times such as 'Tue Apr 03 18:10:09 +0000 2012'"),
        ("seconds", "times such as '1112486027'"),
        ("ratings", "fractions such as '0.5'"),
        ("lists", "lists such as '0 1 7'"),
        ("json_lists", "lists such as '[0, 1]'"),
        ("lists_of_news", "lists such as 'N0 N9'"),
        ("svm", "pairs of an id and a value such as '0:1'"),
    ],
)
def test_a_guessed_column_of_times_fractions_or_lists_is_refused_unless_named(tmp_path, kind, got):
    path = write(tmp_path, "log.txt", without_header(kind))
    with pytest.raises(ValueError) as error:
        read_events(path)
    assert str(error.value) == (
        f"events: item must be a column of ids where log.txt has no header, got {got} in column 2; "
        "name the columns of user and item by their numbers"
    )
    assert read_events(path, user="1", item="2").x.nnz >= 12


@pytest.mark.parametrize("items", ["1 2 3", "[4, 5]", "N1 N2", "{1;2}", "7:1"])
def test_a_guessed_column_of_lists_is_refused_under_its_name_too(tmp_path, items):
    path = write(tmp_path, "log.csv", f'user_id,item_id\nu1,"{items}"\nu2,"{items}"\n')
    with pytest.raises(ValueError) as error:
        read_events(path)
    kind = "pairs of an id and a value" if ":" in items else "lists"
    assert str(error.value) == (
        f"events: item must be a column of ids, got {kind} such as {items!r} in column item_id of log.csv; "
        "write a line for each user and item, or name the column"
    )
    assert read_events(path, item="item_id").items.tolist() == [items]


def test_a_guessed_column_of_users_is_looked_at_too(tmp_path):
    # retailrocket without its header: time, visitor, event, item
    lines = "".join(f"{1433221332117 + 7 * k},{k},view,355908\n" for k in range(40))
    path = write(tmp_path, "log.csv", lines)
    with pytest.raises(ValueError, match=r"^events: user must be a column of ids .* column 1"):
        read_events(path)
    # a test file of NeuMF: (user, item), and items that the user has not clicked
    pairs = write(tmp_path, "pairs.txt", "(0,25)\t1064\t174\n(1,133)\t1072\t3154\n")
    with pytest.raises(
        ValueError, match=r"^events: user must .* got lists such as '\(0,25\)' in col"
    ):
        read_events(pairs)
    assert read_events(path, user="2", item="4").items.tolist() == ["355908"]


def test_ids_that_look_a_little_like_times_or_numbers_are_ids(tmp_path):
    for ids in (
        [str(n) for n in range(10**9, 10**9 + 12)],
        ["1.0", "2.0", "3.0"],
        ["2001: A Space Odyssey", "12 Angry Men", "1984"],
        ["2010-10-19", "a", "b"],
        ["B000-12", "B000-13"],
        ["SKU 12 34", "x"],
    ):
        path = write(tmp_path, "log.txt", "".join(f"{u}\t{item}\n" for u, item in enumerate(ids)))
        assert read_events(path).items.tolist() == sorted(ids)


@pytest.mark.parametrize(
    "text",
    [
        "0 1 2 3\n1 4 5 6\n",
        "0\t1\t2\n1\t3\t4\n2\t1\t9\n",
        "7,30,2\n9,40,21\n",
        "ann\t1064\t174\t2791\nbob\t1072\t3154\t3368\n",
        # MIND: an impression on each line
        "".join(f"{k},U{k % 9},N{k}-1\n" for k in range(60)),
    ],
    ids=["spaces", "tabs", "commas", "names", "impressions"],
)
def test_lists_of_one_length_are_refused_unless_the_columns_are_named(tmp_path, text):
    path = write(tmp_path, "lists.txt", text)
    with pytest.raises(ValueError) as error:
        read_events(path)
    n = len(re.split(r"[\s,]", text.splitlines()[0]))
    assert str(error.value) == (
        f"events: file must have a line for each user and item where it has no header, got {n} fields on each line "
        "and no user twice in lists.txt; write lists as pairs, or name the columns of user and item by their numbers"
    )
    assert read_events(path, user="1", item="2").x.nnz == len(text.splitlines())


def test_a_matrix_is_refused_unless_the_columns_are_named(tmp_path):
    path = write(tmp_path, "matrix.csv", "0,1,1,0,1\n1,0,0,1,1\n0,0,1,1,0\n")
    with pytest.raises(ValueError) as error:
        read_events(path)
    assert str(error.value) == (
        "events: file must have a line for each user and item where it has no header, got 5 fields on each line and "
        "nothing but 0 and 1 in matrix.csv; write a matrix as pairs, or name the columns of user and item by their "
        "numbers"
    )
    assert read_events(path, user="1", item="2").x.nnz == 3


@pytest.mark.parametrize(
    "text",
    [
        "1 2 3\n1 4 5\n",  # a user twice
        "0 1 1\n0 0 -1\n",
        "7,31,5\n8,12,4\n",  # ratings
        "7,1,1112486027\n8,2,1112486029\n",  # times
        "7,1,a\n8,2,b\n",
        "1 2\n3 4\n",
        "7 1 2\n",
    ],
)
def test_a_log_of_one_event_a_user_is_no_list(tmp_path, text):
    assert read_events(write(tmp_path, "log.txt", text)).x.nnz == len(text.splitlines())


def test_whether_there_is_a_header_is_in_the_info(tmp_path):
    plain, named = (write(tmp_path, "a.csv", "1,2\n"), write(tmp_path, "b.csv", "user,item\n1,2\n"))
    assert [read_events(path).info["source"]["header"] for path in (plain, named)] == [False, True]


# words for no id


@pytest.mark.parametrize(
    "word",
    [
        "NA",
        "NULL",
        "None",
        "nan",
        "\\N",
        "N/A",
        " null ",
        "<NA>",
        "undefined",
        "(not set)",
        "-",
        "Unknown",
    ],
)
@pytest.mark.parametrize("role", ["user", "item"])
def test_a_word_for_no_id_is_missing_where_all_other_ids_have_digits(tmp_path, role, word):
    rows = [("u1", "i1"), ("u2", "i2"), ("u2", "i1")]
    without = [(word, "i2"), (word, "i1")] if role == "user" else [("u1", word), ("u2", word)]
    text = "user,item\n" + "".join(f"{u},{i}\n" for u, i in [*rows, *without])
    events = read_events(write(tmp_path, "log.csv", text))
    assert pairs_of(events) == sorted(rows)
    assert events.info["dropped"][f"missing_{role}"] == 2
    assert events.info["source"]["perhaps_no_ids"] == []
    assert events.info["n_events"] == 5


def test_a_word_that_may_be_a_name_stays_and_is_pointed_out(tmp_path):
    text = "user,item,rating\nAnn,a,1\nNone,b,1\nNone,c,1\nBob,x,1\nNULL,x,0\n  ,x,1\n"
    events = read_events(write(tmp_path, "log.csv", text))
    assert ("None", "b") in pairs_of(events) and events.x.nnz == 4
    assert events.info["source"]["perhaps_no_ids"] == [{"role": "user", "id": "None", "events": 2}]


def test_the_first_reason_counts_where_a_word_stands_for_an_id(tmp_path):
    rows = ["NA,NA,5", "NA,i1,1", "u1,NA,1", ",NA,5", "u1,i1,1", "u1,i2,5"]
    path = write(tmp_path, "log.csv", "user,item,rating\n" + "\n".join(rows) + "\n")
    dropped = read_events(path, min_rating=4).info["dropped"]
    # that of u1,NA,1 is the item: its user is there
    assert {why: n for why, n in dropped.items() if n} == {
        "missing_user": 3,
        "missing_item": 1,
        "below_min_rating": 1,
    }


def test_a_user_with_a_large_share_of_a_log_is_pointed_out(tmp_path):
    text = "user,item\n" + "".join(f"{k},a{k}\n" for k in range(60))
    text += "".join(f"-1,b{k}\n" for k in range(30))
    events = read_events(write(tmp_path, "log.csv", text))
    assert events.info["source"]["perhaps_no_ids"] == [{"role": "user", "id": "-1", "events": 30}]
    few = read_events(write(tmp_path, "few.csv", "user,item\n1,a\n2,b\n2,c\n"))
    assert few.info["source"]["perhaps_no_ids"] == []


# labels of no click


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [("is_click", 1, 0), ("label", "1.0", "0.0"), ("Clicked", "True", "False"), ("like", 1, -1)],
)
def test_impressions_that_are_read_as_clicks_are_pointed_out(tmp_path, name, yes, no):
    text = f"user_id,item_id,{name}\n1,a,{yes}\n1,b,{no}\n2,a,{no}\n2,b,\n"
    path = write(tmp_path, "log.csv", text)
    events = read_events(path)
    assert events.x.nnz == 4
    assert events.info["source"]["labels_of_0"] == [{"column": name, "events": 2}]
    asked = read_events(path, rating=name, min_rating=1)
    assert pairs_of(asked) == [("1", "a")] and asked.info["source"]["labels_of_0"] == []


def test_quantities_that_were_sent_back_are_pointed_out(tmp_path):
    text = "user,item,Quantity\nu,a,6\nu,b,-1\nv,a,0\nv,b,\n"
    path = write(tmp_path, "log.csv", text)
    assert read_events(path).info["source"]["labels_of_0"] == [{"column": "Quantity", "events": 2}]
    asked = read_events(path, rating="Quantity", min_rating=1)
    assert pairs_of(asked) == [("u", "a")] and asked.info["source"]["labels_of_0"] == []
    for values in ("1,2", "-1,-2", "1,many"):
        one, two = values.split(",")
        path = write(tmp_path, "log.csv", f"user,item,count\nu,a,{one}\nu,b,{two}\n")
        assert read_events(path).info["source"]["labels_of_0"] == []


def test_a_column_called_label_that_holds_something_else_is_no_label(tmp_path):
    for values in (("cat", "0", "1"), ("1", "1", "1"), ("0", "0", "0"), ("1", "2", "0")):
        rows = "".join(f"{u},a,{value}\n" for u, value in enumerate(values))
        events = read_events(write(tmp_path, "log.csv", "user,item,label\n" + rows))
        assert events.info["source"]["labels_of_0"] == []


@pytest.mark.parametrize(
    ("header", "kinds"),
    [
        ("timestamp,visitorid,event,itemid", ["view", "addtocart", "transaction"]),  # Retailrocket
        ("time,user_id,event_type,product_id", ["view", "cart", "purchase", "remove_from_cart"]),
        ("time,user_id,action_type,item_id", ["0", "1", "2", "3"]),  # Tmall
        ("ts,session,type,aid", ["clicks", "carts", "orders"]),  # OTTO
        ("t,user_id,Event,item_id", ["View", "Add to Cart"]),
        (None, ["pv", "buy", "cart", "fav"]),  # Taobao's UserBehavior
    ],
)
def test_events_of_several_kinds_are_pointed_out(tmp_path, header, kinds):
    lines = [header] if header else []
    lines += [f"15{k:08},u{k % 9},{kinds[k % len(kinds)]},{k % 7}" for k in range(40)]
    names = header.split(",") if header else ["1", "2", "3", "4"]
    path = write(tmp_path, "log.csv", "\n".join(lines) + "\n")
    events = read_events(path, user=names[1], item=names[3])
    counts = {kind: len(range(n, 40, len(kinds))) for n, kind in enumerate(kinds)}
    assert events.info["source"]["kinds_of_events"] == [{"column": names[2], "events": counts}]
    read = read_events(path, user=names[1], item=names[3], rating=names[2])
    assert read.info["source"]["kinds_of_events"] == []


@pytest.mark.parametrize(
    "values", [["view"], ["movie", "series"], ["play", "x"], [*map(str, range(25))]]
)
def test_a_column_of_something_else_says_no_kinds_of_events(tmp_path, values):
    rows = "".join(f"{k % 5},{k % 8},{values[k % len(values)]}\n" for k in range(60))
    for name in ("type", "category", "action" if len(values) in (1, 25) else "note"):
        events = read_events(write(tmp_path, "log.csv", f"user,item,{name}\n{rows}"))
        assert events.info["source"]["kinds_of_events"] == []


def test_ratings_of_true_and_false_are_1_and_0(tmp_path):
    path = write(tmp_path, "log.csv", "user,item,liked\nu,a,true\nu,b,FALSE\nv,a,True\n")
    events = read_events(path, rating="liked")
    assert pairs_of(events) == [("u", "a"), ("v", "a")]
    assert events.info["source"]["kept_without_a_number"] == 0


# quotes


def test_only_line_ends_in_ids_are_said_to_be_part_of_one(tmp_path):
    text = 'user,item,review\nu1,i1,"good\nvery\ngood"\nu2,i2,"x"\n'
    source = read_events(write(tmp_path, "log.csv", text)).info["source"]
    assert source["lines_joined_by_quotes"] == 2 and source["line_ends_in_ids"] == 0
    text = 'user,item,review\nu1,"i\n1",good\nu2,i2,"x\ny"\n'
    source = read_events(write(tmp_path, "log.csv", text)).info["source"]
    assert source["lines_joined_by_quotes"] == 2 and source["line_ends_in_ids"] == 1


def test_ids_that_keep_their_quotes_are_counted(tmp_path):
    # what R's write.table makes with sep="\t"
    text = '"user"\t"item"\t"rating"\n"u1"\t"i1"\t5\n"u2"\t"i1"\t4\n'
    events = read_events(write(tmp_path, "log.tsv", text))
    assert events.users.tolist() == ['"u1"', '"u2"']
    assert events.info["source"]["quoted_ids"] == 3
    single = read_events(write(tmp_path, "log.csv", "user,item\n'u1',i1\n"))
    assert single.info["source"]["quoted_ids"] == 1
    plain = read_events(write(tmp_path, "plain.csv", '"user","item"\n"u1","i1"\n'))
    assert plain.info["source"]["quoted_ids"] == 0
