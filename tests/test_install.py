"""What an installation needs: no triton, no GPU and no C compiler for the CPU path, and no deprecated API."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import run_child

import fastvae


def on_a_cpu(name, *arguments, **environment):
    """A child program that sees no GPU."""
    return run_child(name, *arguments, CUDA_VISIBLE_DEVICES="", **environment)


def test_without_triton_everything_works_on_a_cpu_and_a_gpu_is_told_what_is_missing():
    done = on_a_cpu("train_on_a_cpu.py", "triton=missing")
    assert done.stdout == (
        "sparse_linear: a GPU needs triton, which is missing; pip install triton, or move clicks and model to the CPU\n"
    ), done.stderr


def test_has_triton_says_whether_it_is_there():
    try:
        import triton  # noqa: F401
    except ImportError:
        assert fastvae.has_triton() is False
    else:
        assert fastvae.has_triton() is True


# what `import fastvae` leaves for those who ask for it, and whose time it costs them alone
LATER = {
    f"fastvae.{name}"
    for name in (
        "cli", "commands", "compare", "console", "demo", "export", "kernels", "lenskit", "movielens", "options",
        "parallel", "parallel_trainer", "recbole", "recommend_frame", "reference", "similar", "synthetic", "tensorboard",
        "trials", "tune", "user_values", "words",
    )
}  # fmt: skip


def test_importing_brings_torch_and_scipy_sparse_and_of_our_own_what_a_training_takes():
    """The time of the import is measured by python -m bench imports."""
    children = (
        on_a_cpu("imports.py", *names) for names in (("torch", "scipy.sparse"), ("fastvae",))
    )
    known, now = (set(child.stdout.split()) for child in children)
    ours = {name for name in now if name.partition(".")[0] == "fastvae"}
    assert "fastvae.train" in ours
    assert now - known - ours == set()
    assert ours & LATER == set()
    assert all(importlib.util.find_spec(name) for name in LATER)


def test_the_cpu_path_needs_no_c_compiler_and_no_writable_home(tmp_path):
    home, cache = tmp_path / "home", tmp_path / "none"
    home.mkdir(mode=0o500)
    done = on_a_cpu(
        "train_on_a_cpu.py",
        PATH=str(tmp_path),
        CC="",
        CXX="",
        HOME=str(home),
        TRITON_CACHE_DIR=str(cache),
    )
    assert done.returncode == 0, done.stderr
    assert not cache.exists() and not list(home.iterdir())


def test_nothing_deprecated_is_used():
    kinds = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
    errors = ",".join(f"error::{kind}" for kind in kinds)
    done = on_a_cpu("train_on_a_cpu.py", PYTHONWARNINGS=errors)
    assert done.returncode == 0, done.stderr


def test_triton_is_required_on_linux_only_and_every_requirement_has_a_lower_bound():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    declared = re.findall(r'^  "(.*)",$', dependencies, re.MULTILINE)
    assert [line for line in declared if line.startswith("triton")] == [
        "triton>=3.6; platform_system == 'Linux'"
    ]
    assert all(">=" in line for line in declared)
    try:
        installed = importlib.metadata.requires("fastvae-cf")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastvae-cf is not installed, so it has no metadata")
    marked = [line for line in installed if line.startswith("triton")]
    assert [re.sub(r"['\"]", "'", line).replace(" ", "") for line in marked] == [
        "triton>=3.6;platform_system=='Linux'"
    ]


@pytest.mark.slow
def test_the_wheel_holds_the_kernels_and_works_elsewhere(tmp_path):
    """Built from a source distribution, so that this is checked too."""
    root = Path(__file__).parent.parent
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=root, check=True, capture_output=True)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (unpacked,) = (tmp_path / "source").iterdir()
    subprocess.run([*build, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())
    wanted = {"fastvae/py.typed", "fastvae/kernels/__init__.py", "fastvae/kernels/tiles.py"}
    assert wanted <= names and len(names) == len(archive.infolist())
    places = on_a_cpu("where.py", PYTHONPATH=str(tmp_path / "site")).stdout.splitlines()
    assert len(places) == 2 and all(str(tmp_path / "site") in place for place in places)
