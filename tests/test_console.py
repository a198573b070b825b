"""fastvae.console: what may have been meant otherwise is said, and names are never markup."""

import numpy as np
import pytest
from data_helpers import small_dataset, write

from fastvae.events import read_events

pytest.importorskip("polars")


@pytest.fixture
def console(monkeypatch):
    from rich.console import Console

    from fastvae import console

    monkeypatch.setattr(console, "out", Console(width=100))
    monkeypatch.setattr(console, "err", Console(stderr=True, width=100))
    return console


NOTES = {
    "no_header.csv": (
        "7,i7,5\n8,i7,4\n",
        "no_header.csv has no header: the users are column 1 (2 ids, such as '7'), the items are column 2 "
        "(1 ids, such as 'i7'); --user and --item name other columns\n",
    ),
    "spaces.csv": (
        "user,item\nu, a\nv,b\n",
        "1 ids have spaces around them, which are part of an id; another log must have them too\n",
    ),
    "impressions.csv": (
        "user,item,is_click\nu,a,1\nu,b,0\nv,a,0\n",
        "column 'is_click' says no for 2 of 3 events, which were read as clicks all the same; "
        "--rating is_click --min-rating 1 leaves them out\n",
    ),
    "rounded.csv": (
        "user,item\n1.23E+11,a\n1e+20,a\n12e4,b\n",
        "2 ids are numbers such as 1.23E+11, as spreadsheets shorten them; different ids may have become the same, "
        "so export the log anew with its ids as text\n",
    ),
    "kinds.csv": (
        "user,item,event\nu,a,view\nu,b,cart\nv,a,view\n",
        "column event says that events are of 2 kinds, 'view' (2), 'cart' (1), which were all read as clicks; "
        "where some are none, leave out their lines\n",
    ),
    "no_user.csv": (
        "user,item\nAnn,a\nNone,b\nNone,c\nBob,x\n",
        "user 'None' has 2 events, 50.0% of all; where this stands for no id, remove those lines\n",
    ),
    "quotes.tsv": (
        '"user"\t"item"\n"u"\t"i"\n',
        "2 ids keep the quotes around them, which are part of an id where the columns are separated by tabs or ::, "
        "and single quotes everywhere\n",
    ),
    "texts.csv": (
        'user,item,review\nu,a,"good\nvery"\n',
        "1 line ends lie inside double quotes of other columns than user and item; where those hold no texts of "
        "several lines, look for a stray quote\n",
    ),
    "stray.csv": (
        'user,item\nu,"a\nb"\n',
        "1 line ends lie inside double quotes and were read as part of an id; look for a stray quote\n",
    ),
    "comma.csv": (
        "user;item;rating\nu;a;4,5\n",
        "1 events have a rating that is not a number and were kept as clicks; "
        "with --min-rating they would be dropped\n",
    ),
    "plain.csv": ("user,item,rating\nu,a,4\n", ""),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_may_have_been_meant_otherwise_is_said(tmp_path, capsys, console, name):
    content, note = NOTES[name]
    console.note_doubts(read_events(write(tmp_path, name, content)))
    printed = capsys.readouterr()
    assert printed.err == note and printed.out == ""


def test_the_column_of_ratings_is_shown_too(tmp_path, capsys, console):
    path = write(tmp_path, "log.csv", "7,i7,5\n8,i7,4\n")
    console.note_doubts(read_events(path, min_rating=5))
    assert "the ratings are column 3; --user and --item" in capsys.readouterr().err


def test_names_are_never_markup(tmp_path, capsys, console):
    name = "data[v2] [/] [red]x[/red] :bomb:"
    for show in (console.say, console.note, console.complain, console.heading):
        show(name)
    printed = capsys.readouterr()
    assert printed.out.count(name) == 2 and printed.err.count(name) == 2
    from fastvae.evaluate import Evaluation

    console.show_results({name: Evaluation({"ndcg@1": 0.5}, {"ndcg@1": 0.1}, 1, 0)})
    assert name in capsys.readouterr().out
    log = read_events(write(tmp_path, "wei[b].csv", "[b]u[/b],[/]\n1,2\n"), "[b]u[/b]", "[/]")
    console.note_doubts(log)
    log = read_events(write(tmp_path, "wei[b].csv", "1,[/]\n2,[b]\n"))
    console.note_doubts(log)
    assert "wei[b].csv has no header" in capsys.readouterr().err


def test_a_dataset_is_shown_with_what_became_of_every_event(capsys, console):
    dataset = small_dataset()
    console.show_dataset(dataset)
    printed = capsys.readouterr().out
    for text, n in dataset.report():
        assert any(text in line and f"{n:,}" in line for line in printed.splitlines())
    n_users = [len(ids) for ids in (dataset.users_train, dataset.users_vad, dataset.users_test)]
    assert np.array(n_users).sum() == 30
    assert "users: {} train, {} validation, {} test; 8 items".format(*n_users) in printed
