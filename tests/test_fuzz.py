"""Fuzz targets: whatever bytes lie in a click log or a checkpoint, they are read, or refused in one sentence.

A few seconds each by default; FASTVAE_FUZZ_SECONDS=120 shares that many among the targets.
"""

import io
import json
import os
import random
import time
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvae import MultiVAE, load_model
from fastvae.checkpoint import read_checkpoint, write_checkpoint
from fastvae.events import read_events
from fastvae.movielens import read_titles

N_TARGETS = 3
SECONDS = float(os.environ.get("FASTVAE_FUZZ_SECONDS", "15")) / N_TARGETS
ROUND = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def fuzz(target):
    """Rounds of new examples until the target's time is over: hypothesis counts examples, not seconds."""
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        target()


def assert_one_sentence(error, *starts):
    assert str(error).startswith(starts) and "\n" not in str(error) and len(str(error)) < 1000


# click logs

FIELD = st.one_of(
    st.sampled_from(["", " ", "u", "007", "1e400", "-0", "nan", '"', '""', '"a', "a,b", "\x00", "ü", "::", "\ufeff"]),
    st.text(max_size=6),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip
HEADER = st.sampled_from(
    ["user,item,rating", "userId\tmovieId", "user_id:token\titem_id:token", "a::b::c", "user;item;score", ""]
)  # fmt: skip


@st.composite
def tables(draw):
    separator = draw(st.sampled_from([",", "\t", "::", ";", "|", " "]))
    end = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\r"]))
    rows = draw(st.lists(st.lists(FIELD, min_size=1, max_size=4), max_size=6))
    text = draw(HEADER) + end + end.join(separator.join(row) for row in rows)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw, whole):
    """Bytes with some of them changed, cut or doubled."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        begin = draw(st.integers(0, len(content) - 1))
        end = min(len(content), begin + draw(st.integers(0, 40)))
        content[begin:end] = draw(
            st.one_of(st.binary(max_size=40), st.just(bytes(content[begin:end]) * 2))
        )
    return bytes(content)


def parquet():
    pl = pytest.importorskip("polars")
    buffer = io.BytesIO()
    log = {"user": ["u", "v", "w"], "item": [1, 2, 1], "rating": [4.0, None, 2.0]}
    pl.DataFrame(log).write_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_any_click_log_is_read_or_refused(tmp_path, kind):
    contents = tables() if kind == "text" else damaged(parquet())

    @ROUND
    @given(contents, st.sampled_from([None, True, False]), st.sampled_from([None, 0, 3.5]))
    def target(content, header, min_rating):
        path = tmp_path / "events"
        path.write_bytes(content)
        try:
            log = read_events(path, header=header, min_rating=min_rating)
        except ValueError as error:
            assert_one_sentence(error, "events: ")
        else:
            assert log.info["n_events"] == log.x.nnz + sum(log.info["dropped"].values())
            assert log.x.shape == (len(log.users), len(log.items))
            json.dumps(log.info, allow_nan=False)
        try:
            read_titles(path)
        except ValueError as error:
            assert_one_sentence(error, "events: ")

    pytest.importorskip("polars")
    fuzz(target)


# checkpoints


def checkpoint_bytes(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "whole.pt"
    write_checkpoint(path, MultiVAE([2, 3, 4]), list("abcd"), position=[1, 2, 3])
    return path.read_bytes()


def with_member(whole, member, content):
    """The archive with other bytes for one member, so that no checksum hides them from the reader."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(member) else old.read(name))
    return buffer.getvalue()


def member(whole, ending):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith(ending))


@st.composite
def metas(draw, meta):
    """The JSON of a checkpoint with one value replaced by any JSON."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers(-5, 10**12) | st.text(max_size=5) | st.floats(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )  # fmt: skip
    meta = json.loads(meta)
    owner = draw(st.sampled_from([meta, meta["config"]]))
    owner[draw(st.sampled_from(sorted(owner)))] = draw(anything)
    return json.dumps(meta)


def test_any_checkpoint_is_read_or_refused(tmp_path):
    whole = checkpoint_bytes(tmp_path)
    parts = torch.load(io.BytesIO(whole), weights_only=True)
    pickled = damaged(member(whole, "data.pkl"))

    def resaved(meta):
        buffer = io.BytesIO()
        torch.save(parts | {"meta": meta}, buffer)
        return buffer.getvalue()

    contents = st.one_of(
        damaged(whole),
        pickled.map(lambda content: with_member(whole, "data.pkl", content)),
        metas(parts["meta"]).map(resaved),
    )

    @ROUND
    @given(contents)
    def target(content):
        path = tmp_path / "model.pt"
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of other pickle protocols
            try:
                read_checkpoint(path)
                model, items = load_model(path)
            except ValueError as error:
                assert_one_sentence(error, "checkpoint: ")
            else:
                assert model.n_items == 4 and (items is None or len(items) == 4)

    fuzz(target)


def test_a_changed_bit_anywhere_in_a_checkpoint_is_refused_or_harmless(tmp_path):
    whole, rng = checkpoint_bytes(tmp_path), random.Random(0)
    path = tmp_path / "model.pt"
    for _ in range(60):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model, _ = load_model(path)
            except ValueError as error:
                assert_one_sentence(error, "checkpoint: ")
            else:
                assert model.p_dims == [2, 3, 4]
