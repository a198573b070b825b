"""Every kernel compiled for every chip of the table, on a machine without a GPU: registers, memory, instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from bench import resources
from fastvae.kernels import tiles

ROOT = Path(__file__).parents[1]
# registers of a thread, and bytes of shared memory of a block, that the chip can give
LIMITS = {
    "sm_75": (255, 64 * 1024),
    "sm_80": (255, 163 * 1024),
    "sm_90": (255, 227 * 1024),
    "sm_100": (255, 227 * 1024),
    "gfx942": (512, 64 * 1024),
}
MATRIX = {
    "sm_80": {"mma.sync"},
    "sm_90": {"wgmma.mma_async"},
    "sm_100": {"tcgen05.mma", "mma.sync"},
    "gfx942": {"mfma"},
}


@pytest.fixture(scope="session")
def rows():
    """The table's rows, from a process of its own: in this one the kernels may be decorated for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "resources", "--json"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def name(row):
    return f"{row['kernel']}, {row['case']}, {row['chip']}"


def offenders(rows, is_wrong):
    return [name(row) for row in rows if is_wrong(row)]


def test_every_kernel_is_compiled_for_every_chip(rows):
    files = (ROOT / "kernels").glob("*.py")
    jitted = {
        line.split("(")[0].removeprefix("def _").removesuffix("_kernel")
        for file in files
        for line in file.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert jitted
    for chip in resources.TARGETS:
        assert {row["kernel"] for row in rows if row["chip"] == chip} == jitted


def test_nothing_spills(rows):
    assert not offenders(rows, lambda row: row["stack"] != 0)


def test_registers_and_shared_memory_are_within_the_chip(rows):
    assert not offenders(rows, lambda row: row["registers"] > LIMITS[row["chip"]][0])
    assert not offenders(rows, lambda row: row["shared"] > LIMITS[row["chip"]][1])


def test_products_run_on_tensor_cores(rows):
    products = [row for row in rows if row["expected"]["tensor_core"]]
    assert {row["chip"] for row in products} == set(MATRIX) & set(resources.TARGETS)
    assert not offenders(products, lambda row: not MATRIX[row["chip"]] & set(row["matrix"]))


def test_tiles_are_read_16_bytes_at_a_time(rows):
    assert not offenders(rows, lambda row: row["expected"]["wide"] and not row["loads_16"])


def test_large_outputs_are_written_16_bytes_at_a_time(rows):
    # on gfx942 a thread holds fewer neighbours of a product
    kernels = (
        "exp_gemm",
        "exp_row",
        "multinomial_nll_bwd",
        "sample_latent_fwd",
        "sample_latent_bwd",
    )
    large = [
        r
        for r in rows
        if r["kernel"] in kernels and r["expected"]["wide"] and r["chip"] != "gfx942"
    ]
    assert large
    assert not offenders(large, lambda row: not row["stores_16"] and "no grad" not in row["case"])


def test_two_byte_accesses_are_gathers_only(rows):
    assert not offenders(rows, lambda row: row["singles"] > row["expected"]["singles"])


def test_gradients_are_added_several_numbers_at_once(rows):
    # sm_80 has no such instruction; gfx942 has one for pairs of halves only
    adding = [r for r in rows if r["expected"]["atomics"] and r["chip"] in ("sm_90", "sm_100")]
    assert adding
    assert not offenders(adding, lambda row: not row["wide_atomics"])


def test_the_committed_table_is_what_this_compiler_gives(rows):
    committed = (ROOT / "bench" / "results" / "resources.txt").read_text()
    if committed.splitlines()[0] != f"triton {triton.__version__}":
        pytest.skip("the committed table is from another version of triton")
    again = "python -m bench resources > bench/results/resources.txt"
    assert committed == resources.table(rows), f"a kernel or a tile has changed: {again}"


@pytest.mark.parametrize(
    ("capability", "chip"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_a_card_takes_the_newest_row_that_it_can_run(monkeypatch, capability, chip):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    tiles._gpu_chip.cache_clear()
    try:
        assert tiles.chip_of(torch.device("cuda", 0)) == chip
    finally:
        tiles._gpu_chip.cache_clear()
    fused = tiles.TABLE[chip].fused
    assert ("bf16" in fused) == (chip != "sm_75") and "ieee" not in fused
