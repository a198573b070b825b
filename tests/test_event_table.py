"""fastvae.event_table: files of every kind are read as written, or refused in one sentence."""

import bz2
import gzip
import lzma
import sys
import uuid
from decimal import Decimal

import pytest
from data_helpers import PROPERTY, pairs_of, write
from hypothesis import given
from hypothesis import strategies as st

from fastvae.events import read_events
from fastvae.movielens import read_titles

pl = pytest.importorskip("polars")

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
    path = write(tmp_path, name, gzip.compress(content, mtime=0) if gzipped else content)
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


def test_other_parquet_columns_may_be_of_any_kind(tmp_path):
    path = tmp_path / "log.parquet"
    columns = {
        "user": ["a", "b"],
        "item": [1, 2],
        "label": [[0], [1]],
        "action": [{"a": 1}, {"a": 2}],
        "event": [b"\xff", b"\xfe"],
        "kind": pl.Series(["view", "buy"], dtype=pl.Categorical),
    }
    pl.DataFrame(columns).write_parquet(path)
    source = read_events(path).info["source"]
    assert source["labels_of_0"] == []
    assert source["kinds_of_events"] == [{"column": "kind", "events": {"buy": 1, "view": 1}}]


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
        "events: item must name a column of no_item.csv, got no column with a usual name; the "
        "columns are 'user', 'thing'",
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
        "events: file must be a well-formed table, got old_mac.csv: lines that end in CR alone; "
        "convert the line ends to LF",
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
        "events: rating must name a column of no_rating.csv, got no column with a usual name; the "
        "columns are '1', '2'",
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
        "events: file must have no more fields on a line than on the first, got such a line in "
        "ragged_beyond_what_is_read.csv",
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
        "events: file must start with a line of column names, got 'sep=', '' in excel.csv; remove "
        "what stands above them",
    ),
    "no_mark.csv": (
        "user,item\nu,a\n".encode("utf-16-le"),
        {},
        "events: file must be UTF-8 text or Parquet, got other bytes in no_mark.csv; convert the file first",
    ),
    "open_quote.csv": (
        'user,item\nu,"a\nv,b\n',
        {},
        "events: file must close every double quote, got 1 of them in open_quote.csv; write a "
        "quote inside a field twice",
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


FORMAT = "events: file must be CSV, TSV, .inter or Parquet, got "
FEWER = (
    "events: file must have as many fields on each line as on the first where it has no header, "
    "got fewer fields on "
)
OTHER_FORMATS = {
    # a movie's number, then its lines of user, rating, date
    "netflix.txt": (
        "1:\n1488844,3,2005-09-06\n822109,5,2005-05-13\n2:\n",
        FORMAT + "an item alone on the first line, as in the Netflix Prize in netflix.txt; "
        "write the item on each of its lines",
    ),
    "lines.jsonl": (
        '{"user": 1, "item": 2}\n',
        FORMAT + "JSON in lines.jsonl; convert it to CSV or Parquet",
    ),
    "array.json": (
        '\ufeff [{"user": 1, "item": 2}]',
        FORMAT + "JSON in array.json; convert it to CSV or Parquet",
    ),
    # as the older Amazon reviews, which are python's dictionaries
    "reviews.json": (
        "{'reviewerID': 'A1', 'asin': '0'}\n",
        FORMAT + "JSON in reviews.json; convert it to CSV or Parquet",
    ),
    "login.csv": (
        "<!DOCTYPE html>\n<html>",
        FORMAT + "HTML or XML in login.csv; download or convert the data",
    ),
    "sheet.xlsx": (
        b"PK\x03\x04rest",
        FORMAT + "a zip archive or an Excel sheet in sheet.xlsx; unpack or export it",
    ),
    "log.csv.bz2": (
        bz2.compress(b"user,item\nu,a\n"),
        FORMAT + "a packed file other than gzip in log.csv.bz2; unpack it",
    ),
    "log.csv.xz": (
        lzma.compress(b"user,item\nu,a\n"),
        FORMAT + "a packed file other than gzip in log.csv.xz; unpack it",
    ),
    "log.db": (b"SQLite format 3\0", FORMAT + "a SQLite database in log.db; export the table"),
    "log.feather": (
        b"ARROW1\0\0",
        FORMAT + "another binary format in log.feather; convert it to Parquet",
    ),
    "pointer.csv": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
        FORMAT + "a Git LFS pointer in pointer.csv; fetch the data itself",
    ),
    "matrix.mtx": (
        "%%MatrixMarket matrix coordinate real general\n3 3 2\n1 1 5\n",
        FORMAT
        + "a MatrixMarket matrix in matrix.mtx; read it by scipy.io.mmread for Dataset.from_matrix",
    ),
    # a user and all items, as NGCF and LightGCN publish
    "train.txt": (
        "0 1 2 3\n1 4 5\n2 6\n",
        FEWER + "2 lines in train.txt; write a line for each user and item",
    ),
    "trailing_spaces.txt": (
        "0 1 2 3 \n1 4 5 \n\n",
        FEWER + "1 lines in trailing_spaces.txt; write a line for each user and item",
    ),
    "commas.csv": (
        "0,1,2,3\n1,4\n",
        FEWER + "1 lines in commas.csv; write a line for each user and item",
    ),
    "colons.dat": (
        "0::1::2\n1::4\n",
        FEWER + "1 lines in colons.dat; write a line for each user and item",
    ),
    # a user and the number of lines that follow
    "blocks.txt": (
        "0|2\n137915\t90\n137916\t80\n",
        FEWER + "2 lines in blocks.txt; write a line for each user and item",
    ),
    "comment.txt": (
        "# FromNodeId\tToNodeId\n0\t1\n",
        "events: file must start with a line of column names, got '# FromNodeId', 'ToNodeId' in comment.txt; "
        "remove what stands above them",
    ),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_file_of_another_format_is_called_by_its_name(tmp_path, name):
    content, message = OTHER_FORMATS[name]
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        read_events(path)
    assert str(error.value) == message
    if "must start with" not in message:
        # who says that there is no header gets no other data
        with pytest.raises(ValueError) as error:
            read_events(path, header=False)
        assert str(error.value) == message


def test_a_last_field_may_be_left_out_where_there_is_a_header(tmp_path):
    path = write(tmp_path, "log.csv", "user,item,rating\nu,a\nu,b,5\n")
    assert pairs_of(read_events(path)) == [("u", "a"), ("u", "b")]
    blank = write(tmp_path, "blank.csv", "1,2\n\n3,4\n \n")
    assert pairs_of(read_events(blank)) == [("1", "2"), ("3", "4")]
    quoted = write(tmp_path, "quoted.csv", '1,2,"a,b"\n3,4,c\n')
    assert pairs_of(read_events(quoted)) == [("1", "2"), ("3", "4")]


def test_parquet_decimals_and_uuids_are_written_as_people_write_them(tmp_path):
    path = tmp_path / "events.parquet"
    uuids = [uuid.UUID(int=k * 2**121 + 2**64 - k) for k in (61, 62, 63)]
    numbers = [Decimal("7"), Decimal("700"), Decimal("7.50")]
    frame = pl.DataFrame(
        {
            "user": [value.bytes for value in uuids],
            "item": pl.Series(numbers).cast(pl.Decimal(38, 10)),
            "whole": pl.Series([10, 20, 100]).cast(pl.Decimal(20, 0)),
            "text": [b"a", "\u00fc".encode(), None],
            "digest": [b"\xff" * 8] * 3,
        }
    )
    frame.write_parquet(path)
    assert pairs_of(read_events(path)) == sorted(
        zip(map(str, uuids), ["7", "700", "7.5"], strict=True)
    )
    events = read_events(path, user="text", item="whole")
    assert pairs_of(events) == [("a", "10"), ("\u00fc", "20")]
    with pytest.raises(ValueError) as error:
        read_events(path, user="digest")
    assert str(error.value) == (
        "events: file must be a well-formed table, got events.parquet: "
        "'digest' of bytes that are neither text nor UUIDs"
    )


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, name):
    content, arguments, message = BAD_FILES[name]
    with pytest.raises(ValueError) as error:
        read_events(write(tmp_path, name, content), **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "content",
    [b"PAR1 and no more PAR1", b"PAR1", gzip.compress(b"user,item\nu,a\n" * 99, mtime=0)[:-9], b"\x1f\x8b\x08nothing"],
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
