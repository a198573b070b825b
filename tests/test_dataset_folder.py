"""fastvae.dataset_folder: what is read is what was saved, whole after any death, and no folder is trusted."""

import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from data_helpers import (
    PROPERTY,
    assert_accounted,
    assert_same,
    matrices,
    pairs_of,
    small_dataset,
    write,
)
from helpers import run_child
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvae import dataset_folder
from fastvae.data import Dataset, split_dataset
from fastvae.dataset_folder import FILES, check_writable
from fastvae.events import read_events
from fastvae.movielens import read_titles

pytest.importorskip("polars")

ON_DISK = settings(PROPERTY, max_examples=20)


@ON_DISK
@given(
    x=matrices(values=True),
    data=st.data(),
    counts=st.booleans(),
    n_heldout=st.integers(0, 1),
)
def test_any_dataset_survives_the_disk(tmp_path, x, data, counts, n_heldout):
    text = st.text(min_size=1, max_size=20).filter(str.strip)
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
    # .folder.old is what a kill between the renames leaves
    folder.rename(tmp_path / name)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        small_dataset(1).save(folder)
    assert_same(small_dataset(0), Dataset.load(folder))
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path):
    # python warns of a fork beside torch's threads
    done = run_child("kill_while_saving.py", tmp_path / "folder", PYTHONWARNINGS="ignore")
    assert done.stdout == "whole after every death\n", done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a limit of file sizes")
def test_a_disk_that_is_really_full_is_named_with_the_folder(tmp_path):
    done = run_child("full_disk.py", tmp_path / "data")
    assert done.stdout == f"[Errno 27] File too large: '{tmp_path}/data'\n", done.stderr
    assert os.listdir(tmp_path) == []


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
        lambda f: edit_info(f, version=3),
        "version 3, while this fastvae reads 1 and 2",
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
    file=st.sampled_from(sorted(FILES)),
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


def test_a_catalogue_of_319205_items_takes_little_memory(tmp_path):
    done = run_child("large_catalogue.py", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 500, "MiB; dense would be 77,000"


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


# two processes at one folder


def test_a_second_writer_of_a_dataset_folder_is_refused(tmp_path, monkeypatch):
    folder, write_files = tmp_path / "folder", dataset_folder._write_files
    small_dataset(0).save(folder)

    def while_another_saves(*arguments):
        monkeypatch.setattr(dataset_folder, "_write_files", write_files)
        with pytest.raises(ValueError) as error:
            small_dataset(2).save(folder)
        assert str(error.value) == (
            f"dataset: folder must be one that no other process writes to, got {folder}; "
            "wait for that one to end, or choose another name"
        )
        # another folder beside it is another matter
        small_dataset(2).save(tmp_path / "other")
        write_files(*arguments)

    monkeypatch.setattr(dataset_folder, "_write_files", while_another_saves)
    small_dataset(1).save(folder)
    assert_same(small_dataset(1), Dataset.load(folder))
    assert sorted(os.listdir(tmp_path)) == ["folder", "other"]
    small_dataset(2).save(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_many_writers_leave_a_whole_folder_and_readers_see_one_save_at_a_time(tmp_path):
    (tmp_path / "here").mkdir()
    arguments = tmp_path / "here" / "folder", tmp_path / "end"
    done = run_child("save_at_once.py", *arguments, PYTHONWARNINGS="ignore")
    assert done.stdout == "one dataset at a time\n", done.stderr


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    folder, read_clicks = tmp_path / "folder", dataset_folder._read_clicks
    small_dataset(0).save(folder)

    def while_another_saves(path):
        monkeypatch.setattr(dataset_folder, "_read_clicks", read_clicks)
        small_dataset(1).save(folder)
        return read_clicks(path)

    monkeypatch.setattr(dataset_folder, "_read_clicks", while_another_saves)
    assert_same(small_dataset(1), Dataset.load(folder))
