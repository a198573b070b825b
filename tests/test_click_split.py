"""Splits by time and leave-one-out: what goes where, by a slow walk over the events, and nothing lost uncounted."""

import json
from datetime import date, datetime, timedelta, timezone

import numpy as np
import pytest
from data_helpers import PARTS, assert_same
from test_cli import run  # noqa: F401

from fastvae import Dataset, MultiVAE, evaluate, fit
from fastvae.data import split_dataset
from fastvae.events import read_events

pytest.importorskip("polars")
DAY = datetime(2020, 1, 1, tzinfo=timezone.utc)


def write_log(path, n_users=30, as_dates=False, header="user,item,timestamp"):
    """Users of 1 to 12 clicks at distinct days; a few events without a time, and pairs that come again later."""
    rng = np.random.default_rng(0)
    rows = []
    for u in range(n_users):
        n = rng.integers(1, 13)
        days = rng.choice(300, n, replace=False) * n_users + u
        items = rng.choice(15, n, replace=False)
        rows += [(f"u{u:02}", f"i{i:02}", int(day)) for i, day in zip(items, days, strict=True)]
    rows += [(u, i, day + 10_000) for u, i, day in rows[::7]]
    lines = [f"{u},{i},{text_of(day, as_dates)}" for u, i, day in rows]
    lines += ["u00,i00,", "u01,i01,soon"]
    path.write_text("\n".join([header, *lines]) + "\n")
    return {(u, i): day for u, i, day in reversed(rows)}


def text_of(day, as_dates):
    return (DAY + timedelta(days=day)).isoformat() if as_dates else day


def clicks_of(x, users, items):
    return {(users[u], items[i]) for u, i in zip(*x.to_scipy().nonzero(), strict=True)}


def sets_of(data):
    users = (data.users_train, *[data.users_vad] * 2, *[data.users_test] * 2)
    return {
        p: clicks_of(getattr(data, p), u, data.items) for p, u in zip(PARTS, users, strict=True)
    }


def slow_split(times, stage_of):
    """The five sets of (user, item) by the definitions, from the stage of each click."""
    stage = {pair: stage_of(pair) for pair in times}
    known = {i for (_, i), s in stage.items() if s == 0}
    before = [{p for p in times if stage[p] < s and p[1] in known} for s in (1, 2)]
    held = [
        {p for p in times if stage[p] == s and p[1] in known and any(q[0] == p[0] for q in tr)}
        for s, tr in zip((1, 2), before, strict=True)
    ]
    return {
        "train": before[0], "vad_tr": before[0], "vad_te": held[0], "test_tr": before[1], "test_te": held[1],
    }  # fmt: skip


def ranks(times):
    """Of each click: how many later ones the user has, and how many clicks in all."""
    found = {}
    for user, item in times:
        own = sorted(day for (u, _), day in times.items() if u == user)
        found[user, item] = len(own) - 1 - own.index(times[user, item]), len(own)
    return found


def long_users(times, least):
    n = {u: sum(v == u for v, _ in times) for u, _ in times}
    return {pair: day for pair, day in times.items() if n[pair[0]] >= least}


def assert_adds_up(data):
    info = data.info
    assert info["n_events"] == sum(info["dropped"].values()) + sum(info["kept"].values())
    assert info["users"]["read"] == info["users"]["short"] + info["users"]["test"]
    assert info["users"]["vad"] == info["users"]["test"] == len(data.users_test)
    assert (data.train.row_lengths() > 0).all() and len(data.users_train) == data.train.n_users
    for pair, name in ((data.validation, "vad"), (data.test, "test")):
        n_tr, n_te = (x.row_lengths().numpy() for x in pair)
        assert (n_tr[n_te > 0] > 0).all() and info["n_evaluated"][name] == (n_te > 0).sum() > 0
    lines = data.report()
    assert lines[0][1] == sum(n for _, n in lines[1:])
    json.dumps(info, allow_nan=False)


@pytest.mark.parametrize("as_dates", [False, True], ids=["numbers", "dates"])
@pytest.mark.parametrize("kind", ["time", "leave-one-out", "date"])
def test_a_split_is_its_definition(kind, as_dates, tmp_path):
    times = long_users(write_log(tmp_path / "log.csv", as_dates=as_dates), 3)
    log = read_events(tmp_path / "log.csv", time=True)
    assert log.info["dropped"]["missing_time"] == log.info["dropped"]["unparsable_time"] == 1
    after, options = ranks(times), {"by": kind}
    if kind == "time":
        options["held_out_fraction"] = 0.3

        def stage(pair):
            rank, n = after[pair]
            return 2 * (rank < int(0.3 * n)) or 1 * (rank < 2 * int(0.3 * n))
    elif kind == "leave-one-out":

        def stage(pair):
            return max(0, 2 - after[pair][0])
    else:
        options = {"by": "time", "date": text_of(7000, as_dates)}
        earlier = sorted(day for day in times.values() if day < 7000)
        start = earlier[-(len(times) - len(earlier))]

        def stage(pair):
            return 2 * (times[pair] >= 7000) or 1 * (times[pair] >= start)

    data = split_dataset(log, min_user_clicks=3, **options)
    assert sets_of(data) == slow_split(times, stage)
    assert_adds_up(data)
    assert data.info["version"] == 2 and data.shares_users
    data.save(tmp_path / "data")
    assert_same(Dataset.load(tmp_path / "data"), data)
    histories = data.histories()
    assert (
        histories.users.tolist() == data.users_test.tolist() and histories.x.nnz == data.test_tr.nnz
    )
    model = MultiVAE([3, data.n_items])
    fit(model, data.train, data.validation, epochs=1, batch_size=10)
    assert evaluate(model, *data.test).n_evaluated == data.info["n_evaluated"]["test"]


def test_clicks_of_one_time_and_without_times_are_drawn_by_the_seed(tmp_path):
    lines = [f"u{u},i{i},5" for u in range(9) for i in range(8)]
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "\n".join(lines))
    for time in (True, None):
        log = read_events(tmp_path / "log.csv", time=time)
        one, same, other = (split_dataset(log, seed=s, by="leave-one-out") for s in (1, 1, 2))
        assert_same(one, same)
        assert sets_of(one)["test_te"] != sets_of(other)["test_te"]
        held_out = [i for _, i in sets_of(one)["test_te"]]
        assert len(held_out) == 9 and len(set(held_out)) > 2


def test_a_log_with_times_is_split_by_user_too(tmp_path):
    write_log(tmp_path / "log.csv")
    data = split_dataset(read_events(tmp_path / "log.csv", time="timestamp"), 3)
    assert not data.shares_users and data.info["version"] == 2
    data.save(tmp_path / "data")
    assert_same(Dataset.load(tmp_path / "data"), data)
    without = split_dataset(read_events(tmp_path / "log.csv"), 3)
    assert without.info["version"] == 1 and "missing_time" not in without.info["dropped"]


@pytest.mark.parametrize(
    "given", ["2020-02-10", date(2020, 2, 10), datetime(2020, 2, 10), "2020-02-10T00:00:00Z"]
)
@pytest.mark.parametrize("unit", [1, 1000, None], ids=["seconds", "milliseconds", "dates"])
def test_a_date_for_times_of_any_unit(given, unit, tmp_path):
    rows = []
    for u in range(6):
        for i in range(9):
            when = DAY + timedelta(days=5 * i + u)
            rows.append(
                f"u{u},i{(i + u) % 9},{when.isoformat() if unit is None else int(when.timestamp() * unit)}"
            )
    (tmp_path / "log.csv").write_text("user,item,when\n" + "\n".join(rows))
    log = read_events(tmp_path / "log.csv", time="when")
    data = split_dataset(log, by="time", date=given)
    late = {(f"u{u}", f"i{(i + u) % 9}") for u in range(6) for i in range(9) if 5 * i + u >= 40}
    known = set(data.items)
    assert sets_of(data)["test_te"] == {p for p in late if p[1] in known}
    assert data.info["dropped"]["test_unknown_items"] == len({p for p in late if p[1] not in known})
    assert_adds_up(data)


def test_what_a_split_by_click_refuses(tmp_path):
    write_log(tmp_path / "log.csv")
    plain, timed = read_events(tmp_path / "log.csv"), read_events(tmp_path / "log.csv", time=True)
    cases = [
        (plain, {"by": "time"}, "events must have times for a split by time, got none"),
        (timed, {"by": "clock"}, "by must be one of users, time, leave-one-out, got 'clock'"),
        (
            timed,
            {"date": 5},
            "date must be left out of a split by users, got 5; it is for a split by time",
        ),
        (
            timed,
            {"by": "leave-one-out", "date": 5},
            "date must be left out of a split by leave-one-out, got 5; it is for a split by time",
        ),
        (
            timed,
            {"by": "time", "n_heldout": 0.1},
            "n_heldout must be left out of a split by time, got 0.1; it is for a split by users",
        ),
        (
            timed,
            {"by": "leave-one-out", "n_heldout": 0},
            "n_heldout must be left out of a split by leave-one-out, got 0; it is for a split by users",
        ),
        (
            timed,
            {"by": "time", "strict": True},
            "strict must be left out of a split by time, got True; it is for a split by users",
        ),
        (
            timed,
            {"by": "leave-one-out", "held_out_fraction": 0.2},
            "held_out_fraction must be left out of a split by leave-one-out, got 0.2; it is for a split by users, or by",
        ),
        (
            timed,
            {"by": "time", "date": 5, "held_out_fraction": 0.2},
            "held_out_fraction must be left out of a split by a date, got 0.2; it is for a split by users, or by",
        ),
        (timed, {"by": "time", "held_out_fraction": 0.5}, "held_out_fraction must lie below 0.5"),
        (
            timed,
            {"by": "time", "date": "soon"},
            "date must be a date such as 2020-01-31 or a number",
        ),
        (
            timed,
            {"by": "time", "date": "2020-01-31"},
            f"date must be a number on the scale of the times, up to {timed.times.max():.0f}, got '2020-01-31'",
        ),
        (
            timed,
            {"by": "time", "date": 10**6},
            "date must leave fewer clicks from it on than before it",
        ),
        (
            timed,
            {"by": "time", "date": 0},
            "date must leave fewer clicks from it on than before it",
        ),
    ]
    for log, options, message in cases:
        with pytest.raises(ValueError) as raised:
            split_dataset(log, **options)
        assert str(raised.value).startswith(f"prepare: {message}"), options
    with pytest.raises(
        ValueError, match=r"^events: time must name a column of log.csv, got 'when'"
    ):
        read_events(tmp_path / "log.csv", time="when")


def test_the_options_of_prepare_reach_the_split(tmp_path, run):  # noqa: F811
    log = tmp_path / "log.csv"
    write_log(log, as_dates=True, header="user,item,when")
    events = read_events(log, time="when")
    cases = [
        (("--split", "time", "--time", "when", "--held-out-fraction", 0.3), {"by": "time", "held_out_fraction": 0.3}),
        (("--split", "time", "--time", "when", "--date", "2040-01-01"), {"by": "time", "date": "2040-01-01"}),
        (("--split", "leave-one-out", "--time", "when", "--seed", 4), {"by": "leave-one-out", "seed": 4}),
        (("--time", "when", "--heldout", 4), {"n_heldout": 4}),
    ]  # fmt: skip
    for options, settings in cases:
        code, out, err = run("prepare", log, tmp_path / "data", *options)
        note = (
            ""
            if "--split" in options
            else (
                "--time only drops events without a time where --split is users; --split time and leave-one-out go by the times\n"
            )
        )
        assert (code, err) == (0, note), options
        assert_same(Dataset.load(tmp_path / "data"), split_dataset(events, **settings))
        assert "columns: user 'user', item 'item', time 'when'\n" in out
        assert ("the same in all three" in out) == ("--split" in options)
    for options, message in (
        (("--split", "clock", "--time", "when"), "prepare: --split must be one of users, time"),
        (("--split", "time"), "prepare: --time must name a column of log.csv, got no column with"),
        (
            ("--date", "2040-01-01"),
            "prepare: --date must be left out of a split by users, got '2040-01-01'; it is for --split time\n",
        ),
        (
            ("--split", "time", "--time", "when", "--heldout", 50),
            "prepare: --heldout must be left out of a split by time, got 50; it is for --split users\n",
        ),
        (
            ("--split", "leave-one-out", "--time", "when", "--held-out-fraction", 0.3),
            "prepare: --held-out-fraction must be left out of a split by leave-one-out, got 0.3; it is for --split users, "
            "or by time without a date\n",
        ),
        (
            ("--split", "leave-one-out", "--time", "whem"),
            "prepare: --time must name a column of log.csv, got 'whem'",
        ),
    ):
        code, _, err = run("prepare", log, tmp_path / "other", *options)
        assert code == 2 and err.startswith(f"fastvae: {message}"), err


def test_leave_one_out_draws_by_the_seed_where_no_column_is_of_times_and_says_so(tmp_path, run):  # noqa: F811
    log = tmp_path / "log.csv"
    write_log(log, header="user,item,when")
    code, _, err = run("prepare", log, tmp_path / "data", "--split", "leave-one-out", "--seed", 4)
    assert code == 0 and err == (
        "no column has a usual name for times, so the click that is held out of each user is drawn at random by --seed; "
        "--time names a column for the last one\n"
    )
    expected = split_dataset(read_events(log), by="leave-one-out", seed=4)
    assert_same(Dataset.load(tmp_path / "data"), expected)


SECONDS = [1_500_000_000 + 86_400 * n for n in range(40)]


def read_times(path, times, **options):
    """Events of a log whose users each have five clicks, at these times."""
    rows = [f"u{n // 5},i{n % 5},{time}" for n, time in enumerate(times)]
    path.write_text("\n".join(["user,item,time", *rows]) + "\n")
    return read_events(path, time=True, **options)


@pytest.mark.parametrize("most", range(4))
@pytest.mark.parametrize("other", range(4))
def test_times_of_two_units_are_refused_with_the_first_of_the_fewer(most, other, tmp_path):
    names = ("seconds", "milliseconds", "microseconds", "nanoseconds")
    times = [second * 1000**most for second in SECONDS]
    times[7] = times[9] = "-1"
    for n in (8, 33):
        times[n] = SECONDS[n] * 1000**other
    if most == other:
        assert read_times(tmp_path / "log.csv", times).info["dropped"]["missing_time"] == 2
        return
    with pytest.raises(ValueError) as raised:
        read_times(tmp_path / "log.csv", times)
    assert str(raised.value) == (
        f"events: time must be of one unit in all of column 'time' of log.csv, got {times[8]}, {names[other]} since 1970, "
        f"where most are {names[most]}, and 2 such of 38 times; convert them first"
    )


@pytest.mark.parametrize(
    "times",
    [
        pytest.param([*range(-1, 39)], id="days"),
        pytest.param(
            [round(5e8 * 1.3**n) for n in range(40)], id="microseconds-since-the-log-began"
        ),
        pytest.param([0] * 20 + [1] * 20, id="flags"),
    ],
)
def test_times_of_no_unit_are_left_as_they_are(times, tmp_path):
    log = read_times(tmp_path / "log.csv", times)
    assert log.times.tolist() == times and log.info["dropped"]["missing_time"] == 0


@pytest.mark.parametrize("as_dates", [False, True], ids=["numbers", "dates"])
def test_0_and_minus_1_are_no_times_among_times_since_1970(as_dates, tmp_path, run):  # noqa: F811
    times = list(SECONDS)
    for n, second in ((3, 0), (13, -1), (23, 864_000)):
        times[n] = second
    if as_dates:
        times = [datetime.fromtimestamp(second, timezone.utc).isoformat() for second in times]
    log = read_times(tmp_path / "log.csv", times)
    assert log.info["dropped"]["missing_time"] == 2 and log.x.nnz == 38
    code, out, err = run(
        "prepare",
        tmp_path / "log.csv",
        tmp_path / "data",
        "--split",
        "time",
        "--min-user-clicks",
        1,
    )
    assert code == 0 and " 2 " in next(line for line in out.splitlines() if "no time" in line)
    # as microseconds this is a number of milliseconds since 1970 too
    far = "1970-01-11T00:00:00.000000" if as_dates else "864000"
    assert err.splitlines() == [
        "2 events have the time 0 or -1 where the others are since 1970; they count as events without a time",
        f"1 events have a time far from the others, such as {far}, and are put in order all the same; the others lie "
        "between 1982 and 2039",
    ]


@pytest.mark.parametrize(
    "form",
    ["%Y-%m-%d %H:%M:%S UTC", "%Y-%m-%dT%H:%M:%SZ", "%Y/%m/%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S.000+00:00", "%Y-%m-%d %H:%M:%S+00"],
)  # fmt: skip
def test_forms_of_dates(form, tmp_path):
    texts = [datetime.fromtimestamp(second, timezone.utc).strftime(form) for second in SECONDS]
    log = read_times(tmp_path / "log.csv", texts)
    assert log.times.tolist() == [second * 1e6 for second in SECONDS]


def test_a_split_that_holds_nothing_out_says_so(tmp_path, run):  # noqa: F811
    write_log(tmp_path / "log.csv")
    data, options = tmp_path / "data", ("--split", "time", "--held-out-fraction", 0.01)
    code, _, err = run("prepare", tmp_path / "log.csv", data, *options)
    assert code == 0 and err.splitlines() == [
        f"no {name} user has a click held out, so that nothing can be measured on them; a larger --held-out-fraction "
        "holds out more"
        for name in ("validation", "test")
    ]
    code, _, err = run("train", data, tmp_path / "run")
    assert code == 2 and err.endswith("; prepare it with a larger --held-out-fraction\n")


def test_one_time_for_all_events_is_pointed_out(tmp_path, run):  # noqa: F811
    for time in (0, 1_600_000_000):
        log = read_times(tmp_path / "log.csv", [time] * 40)
        assert log.times.tolist() == [time] * 40
        code, _, err = run("prepare", tmp_path / "log.csv", tmp_path / "data", "--split", "time")
        assert code == 0 and err == (
            f"all events have the same time, {time}; clicks of one time are put in order at random by --seed\n"
        )


def test_a_column_without_a_time_is_refused_with_its_first_text(tmp_path):
    with pytest.raises(ValueError) as raised:
        read_times(tmp_path / "log.csv", ["", *[f"{day:02}.01.2020" for day in range(1, 40)]])
    assert str(raised.value) == (
        "events: time must be a column of numbers or of dates such as 2020-01-31, got '01.01.2020' in column 'time' of "
        "log.csv, and no other that can be read"
    )
