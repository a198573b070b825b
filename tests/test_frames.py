"""Click logs in frames are read as a file of them is: same ids, same counts, same messages."""

import sys
from datetime import timedelta
from decimal import Decimal

import numpy as np
import pytest
from data_helpers import assert_accounted, assert_same, pairs_of
from helpers import Fixed, run_child

from fastvae import Dataset, recommend
from fastvae.data import split_dataset
from fastvae.events import read_events
from fastvae.frames import events_from_frame
from fastvae.recommend_frame import recommend_to_frame

pl = pytest.importorskip("polars")

# users with a missing and a doubtful id, repeated pairs, every kind of rating
ROWS = {
    "userId": [1, 1, 2, 2, None, 3, 3, 3, 2],
    "movieId": ["a", "b", "a", "a", "b", None, "NA", "c", "é"],
    "rating": [5.0, 0.0, 4.0, 3.0, 5.0, 5.0, 2.5, None, 4.5],
}


def frames(rows):
    """The same table as a polars DataFrame and LazyFrame and, where pandas is there, as its DataFrame."""
    frame = pl.DataFrame(rows)
    found = {"polars": frame, "lazy": frame.lazy()}
    if (pandas := pandas_or_none()) is not None:
        found["pandas"] = pandas.DataFrame(rows, index=range(7, 7 + len(frame)))
    return found


def pandas_or_none():
    try:
        import pandas
    except ImportError:
        return None
    return pandas


KINDS = [
    "polars",
    "lazy",
    pytest.param(
        "pandas",
        marks=pytest.mark.skipif(pandas_or_none() is None, reason="the extra dev has pandas"),
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"min_rating": 4}, {"counts": True, "rating": "rating"}])
def test_a_frame_is_read_as_its_parquet_file(kind, options, tmp_path):
    pl.DataFrame(ROWS).write_parquet(tmp_path / "log.parquet")
    expected = read_events(tmp_path / "log.parquet", **options)
    log = events_from_frame(frames(ROWS)[kind], **options)
    assert log.users.tolist() == expected.users.tolist()
    assert log.items.tolist() == expected.items.tolist()
    assert pairs_of(log) == pairs_of(expected)
    assert (log.x.to_scipy() != expected.x.to_scipy()).nnz == 0
    info = dict(log.info["source"]), dict(expected.info["source"])
    assert [source.pop("file") for source in info] == ["the DataFrame", "log.parquet"]
    assert info[0] == info[1] and log.info["dropped"] == expected.info["dropped"]
    assert log.info["n_events"] == expected.info["n_events"] == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_from_a_frame_is_that_of_its_csv(kind, tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        "user": rng.integers(0, 40, 600),
        "item": rng.integers(0, 25, 600),
        "stars": rng.integers(0, 6, 600),
    }
    pl.DataFrame(rows).write_csv(tmp_path / "log.csv")
    options = {"rating": "stars", "min_rating": 2}
    expected = split_dataset(read_events(tmp_path / "log.csv", **options), 5, 3, min_user_clicks=3)
    dataset = Dataset.from_frame(frames(rows)[kind], 5, 3, **options, min_user_clicks=3)
    assert_accounted(dataset)
    dataset.save(tmp_path / "data")
    dataset = Dataset.load(tmp_path / "data")
    for part in (dataset, expected):
        part.info["source"].pop("file")
    assert_same(dataset, expected)


PANDAS_COLUMNS = {
    "int64": ([1, 2, 2], None),
    "float-with-gaps": ([1.0, 2.0, None], None),
    "Int64": ([1, 2, None], "Int64"),
    "string": (["a", "b", None], "string"),
    "object": (["a", 7, None], object),
    "category": (["a", "b", None], "category"),
    "bool": ([True, False, True], None),
    "decimal": ([Decimal("1.50"), Decimal("2"), None], object),
}


@pytest.mark.parametrize("name", PANDAS_COLUMNS)
def test_every_kind_of_pandas_column(name):
    pandas = pytest.importorskip("pandas", reason="the extra dev has pandas")
    values, dtype = PANDAS_COLUMNS[name]
    frame = pandas.DataFrame({"u": pandas.Series(values, dtype=dtype), "i": ["x", "y", "z"]})
    expected = {
        "int64": {"1", "2"}, "float-with-gaps": {"1", "2"}, "Int64": {"1", "2"}, "string": {"a", "b"},
        "object": {"a", "7"}, "category": {"a", "b"}, "bool": {"true", "false"}, "decimal": {"1.5", "2"},
    }[name]  # fmt: skip
    log = events_from_frame(frame)
    assert set(log.users) == expected
    assert log.info["dropped"]["missing_user"] == values.count(None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_messages_are_those_of_a_file(kind, tmp_path):
    rows = {"who": ["a", "b"], "what": ["x", "y"]}
    pl.DataFrame(rows).write_parquet(tmp_path / "log.parquet")
    for options in (
        {},
        {"user": "who"},
        {"user": "who", "item": "none"},
        {"user": "who", "item": "who"},
    ):
        messages = []
        for read, source in (
            (read_events, tmp_path / "log.parquet"),
            (events_from_frame, frames(rows)[kind]),
        ):
            with pytest.raises(ValueError) as raised:
                read(source, **options)
            messages.append(str(raised.value).replace("log.parquet", "the DataFrame"))
        assert messages[0] == messages[1]
    empty = {"user": [], "item": []}
    with pytest.raises(ValueError, match=r"^events: file must hold at least one event, got none"):
        events_from_frame(frames(empty)[kind])
    lists = {"user": ["a", "b"], "item": [["x"], ["y", "z"]]}
    with pytest.raises(ValueError, match=r"lists or structures, which are no ids"):
        events_from_frame(frames(lists)[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_durations_are_neither_ids_nor_times_and_stop_nobody_who_does_not_name_them(kind):
    rows = {"user": ["a", "b"], "item": ["x", "y"], "dwell": [timedelta(seconds=5)] * 2}
    assert events_from_frame(frames(rows)[kind]).x.nnz == 2
    for options in ({"time": "dwell"}, {"item": "dwell"}):
        with pytest.raises(
            ValueError,
            match=r"^events: .* of Duration.*, which has no text to be an id or a time$",
        ):
            events_from_frame(frames(rows)[kind], **options)


@pytest.mark.parametrize(
    "other", [{"user": ["a"], "item": ["x"]}, [["a", "x"]], np.zeros((2, 2)), None]
)
def test_what_is_no_frame(other):
    with pytest.raises(TypeError) as raised:
        Dataset.from_frame(other)
    assert str(raised.value) == (
        f"events: frame must be a pandas or polars DataFrame, got {type(other).__name__}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_recommendations_are_a_frame_of_the_same_library(kind):
    rows = {"user": [8, 7, 7, 9], "item": [20, 10, 30, 99]}
    frame = frames(rows)[kind]
    with pytest.warns(
        UserWarning,
        match=r"^recommend: 1 of 4 clicks in frame are on items that the model does not know, such as '99'; they",
    ) as caught:
        found = recommend_to_frame(Fixed(1.0, 2.0, 3.0), frame, k=2, items=[10, 20, 30])
    assert caught[0].filename == __file__
    assert type(found).__module__.split(".")[0] == ("pandas" if kind == "pandas" else "polars")
    columns = {name: found[name].to_list() for name in ("user", "rank", "item", "score")}
    assert columns == {
        "user": ["7", "8", "8", "9", "9"],
        "rank": [1, 1, 2, 1, 2],
        "item": ["20", "30", "10", "30", "20"],
        "score": [2.0, 3.0, 1.0, 3.0, 2.0],
    }
    named = frame.rename({"user": "a", "item": "b"}) if kind != "pandas" else frame.rename(columns={"user": "a", "item": "b"})  # fmt: skip
    with pytest.warns(UserWarning):
        others = recommend_to_frame(
            Fixed(1.0, 2.0, 3.0), named, items=[10, 20, 30], user="a", item="b", exclude=[30]
        )
    assert others["item"].to_list() == ["20", "10", "20", "10"]


@pytest.mark.parametrize("kind", KINDS)
def test_recommend_takes_and_gives_frames(kind):
    frame = frames({"user": [8, 7, 7, 9], "item": [20, 10, 30, 99]})[kind]
    model, items = Fixed(1.0, 2.0, 3.0), [10, 20, 30]
    rules = {
        "allowed": [20, 30], "exclude": [30], "keep_seen": True, "popularity_penalty": 1, "popularity": [1, 5, 1],
        "block_size": 2,
    }  # fmt: skip
    for options in (
        {},
        *({name: rules[name]} for name in ("allowed", "exclude", "keep_seen")),
        rules,
    ):
        with pytest.warns(UserWarning, match="clicks in frame are on items") as caught:
            found = recommend(model, frame, 2, items=items, **options)
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning):
            expected = recommend_to_frame(model, frame, 2, items=items, **options)
        assert type(found) is type(expected) and found.equals(expected)
    for rows, role in (({"who": [1], "item": [10]}, "user"), ({"user": [1], "what": [10]}, "item")):
        with pytest.raises(ValueError) as raised:
            recommend(model, frames(rows)[kind], items=items)
        assert str(raised.value) == (
            f"recommend: histories must have a column of {role}s with a usual name, got none; recommend_to_frame takes the "
            "names of others"
        )
    rated = frames(
        {"user": [1, 1, 2, 2, None], "item": [10, 10, 20, 30, 20], "rating": [5, 5, 0, 4, 5]}
    )[kind]
    with pytest.warns(UserWarning) as caught:
        recommend(model, rated, items=items)
    assert [str(warning.message) for warning in caught] == [
        "recommend: 2 of 5 rows of frame are no clicks, 1 with no user id; 1 with a rating of 0"
    ]
    assert caught[0].filename == __file__
    with pytest.raises(ValueError) as raised:
        recommend(model, frame)
    assert str(raised.value) == (
        "recommend: items must be the external item ids where histories are a DataFrame, got None"
    )


def test_no_library_of_frames_is_imported_before_a_frame_is_there():
    child = run_child("imports.py", "fastvae.frames", "fastvae.recommend_frame")
    assert child.returncode == 0, child.stderr
    assert not {"pandas", "polars"} & set(child.stdout.split())
    assert "polars" in sys.modules
