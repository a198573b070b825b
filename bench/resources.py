"""What every kernel costs on every chip of the table, from an ahead-of-time compile; no GPU is needed.

    python -m bench resources > bench/results/resources.txt
    python -m bench resources --json

A case is a kernel with argument types and one configuration of fastvae.kernels.tiles. The columns are counted in the
compiled code: registers and bytes of stack (where spills go) of a thread, bytes of shared memory, matrix instructions,
global loads and stores of 16 bytes, those of a single 2-byte number, and atomics on several numbers at once.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvae.kernels import (
    adam,
    bias_gradient,
    exp_gemm,
    linear_multinomial_nll,
    multinomial_nll,
    nll_steps,
    sample_latent,
    sparse_linear,
    sparse_linear_dvalues,
    tiles,
)

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
}
if "amd" in backends:
    TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# ML-20M's model: 600 hidden units, 200 latents; 20,108 items, in a buffer padded to 20,224
N_HIDDEN, N_LATENT, N_PADDED = 600, 200, 20_224
TYPES = {
    "indptr_ptr": "*i64",
    "indices_ptr": "*i32",
    "rows_ptr": "*i64",
    "seed_ptr": "*i64",
    "marks_ptr": "*i32",
    **dict.fromkeys(("keep_scale", "lr", "eps"), "fp32"),
}
N_WEIGHTS = 8  # weights and biases of its four layers


class Case(NamedTuple):
    """A kernel with one tile of the table, and what to expect of its code.

    arguments holds types of runtime arguments (a tuple of them for a tuple; None: left out) and values of constexprs;
    what it lacks comes from the tile, from TYPES, or else is a pointer to fp32 or an int32.
    """

    kernel: Any
    detail: str
    tile: Any  # of fastvae.kernels.tiles, or FixedTile
    arguments: dict[str, Any]
    tensor_core: bool = False  # holds a product that tensor cores can do
    wide: bool = True  # reads or writes tiles, 16 bytes at a time
    atomics: bool = False  # adds to several numbers at once
    # loads and stores of blocks of 2-byte numbers that lie alone, a click's or an item's, and the size of the blocks
    singles: tuple[int, str] = (0, "num_warps")


class FixedTile(NamedTuple):
    """Launch configuration of a small kernel that has no entry in the table."""

    block: int
    block_nnz: int
    num_warps: int
    wide: int = 1024


def multinomial_nll_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/multinomial_nll.py."""
    module = multinomial_nll
    forward, backward = tiles.TABLE[chip].forward_row, tiles.TABLE[chip].backward_row
    # rows aligned to 16 numbers as in a padded buffer, or to 4 as in a tensor of 20,108 columns
    for dtype, align in (("bf16", 16), ("bf16", 4), ("fp32", 4)):
        pointers = {"logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}", "ALIGN": align}
        whole = pointers | {"parts_ptr": None, "BLOCK_SPLITS": 1}
        parts = pointers | {"BLOCK_SPLITS": 16}
        detail, wide = f"{dtype}, rows aligned to {align}", dtype == "fp32" or align == 16
        kernel, singles = module._multinomial_nll_fwd_kernel, (1, "block_nnz")
        yield Case(kernel, detail, forward, whole, wide=wide, singles=singles)
        yield Case(module._multinomial_nll_split_kernel, detail, forward, parts, wide=wide)
        kernel, singles = module._multinomial_nll_bwd_kernel, (2, "block_i")
        yield Case(kernel, detail, backward, parts, wide=wide, singles=singles)
    parts = {"ALIGN": 16, "BLOCK_SPLITS": 16}
    yield Case(module._multinomial_nll_fwd_kernel, "fp32, 16 splits", forward, parts, wide=False)


def linear_multinomial_nll_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/linear_multinomial_nll.py."""
    module, table = linear_multinomial_nll, tiles.TABLE[chip]
    for dtype in ("bf16", "fp32"):
        common = {"e_ptr": f"*{dtype}", "hidden_ptr": f"*{dtype}", "scaled_ptr": f"*{dtype}"}
        common |= {"N_HIDDEN": N_HIDDEN, "N_PADDED": N_PADDED, "WIDTH": N_HIDDEN + 8}
        yield Case(module._exp_row_kernel, dtype, table.exp_row, common, singles=(3, "block_nnz"))
        scaled = FixedTile(0, 0, 4)
        arguments = common | {"BLOCK_D": 1024}
        yield Case(module._scale_hidden_kernel, dtype, scaled, arguments, wide=False, singles=(2, "wide"))  # fmt: skip


def nll_steps_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/nll_steps.py."""
    module, tile = nll_steps, tiles.TABLE[chip].exp_row
    for dtype in ("bf16", "fp32"):
        common = {"e_ptr": f"*{dtype}", "N_PADDED": N_PADDED}
        yield Case(module._largest_logits_kernel, dtype, tile, common)
        yield Case(module._exponentials_kernel, dtype, tile, common, singles=(1, "block_nnz"))
        per_click, singles = FixedTile(0, tiles.CLICKS_PER_BLOCK, 4), (2, "block_nnz")
        yield Case(module._subtract_clicks_kernel, dtype, per_click, common, wide=False, singles=singles)  # fmt: skip


def exp_gemm_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/exp_gemm.py."""
    module, table = exp_gemm, tiles.TABLE[chip]
    for kind, dtype in (("bf16", "bf16"), ("fp16", "fp16"), ("tf32", "fp32"), ("ieee", "fp32")):
        stored = "bf16" if dtype == "bf16" else "fp32"
        common = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}")
        common |= {"e_ptr": f"*{stored}", "N_HIDDEN": N_HIDDEN, "N_PADDED": N_PADDED}
        gemm = common | {"bias_ptr": "*fp32", "PRECISION": "tf32" if kind == "tf32" else "ieee"}
        core = kind != "ieee" and chip != "sm_75"
        variants = {"": {}}
        if kind in ("bf16", "ieee"):
            variants[", no grad"] = {"e_ptr": None}
        for tile in dict.fromkeys(table.gemm[kind]):
            for variant, more in variants.items():
                for kernel in (module._exp_gemm_kernel, module._exp_gemm_raised_kernel):
                    detail = f"{kind} {tile.block_u}x{tile.block_i}x{tile.block_d}{variant}"
                    yield Case(kernel, detail, tile, gemm | more, tensor_core=core)
        if kind in ("fp16", "tf32"):
            # the other kernels know the dtype only
            continue
        kernel, singles = module._clicks_kernel, (3, "block_nnz")
        detail = f"{dtype}, from E"
        yield Case(kernel, detail, table.stored_clicks, common, wide=False, singles=singles)
        gathered, detail = common | {"e_ptr": None}, f"{dtype}, from weight rows"
        yield Case(kernel, detail, table.gathered_clicks, gathered, singles=(2, "block_nnz"))
        kernel, tile = module._prepare_kernel, FixedTile(module.N_PROBE, 0, 4)
        yield Case(kernel, dtype, tile, common, wide=False, singles=(2, "block"))


def sparse_linear_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/sparse_linear.py and kernels/sparse_linear_dvalues.py."""
    module, row, no_values = sparse_linear, tiles.TABLE[chip], {"values_ptr": None}
    shape = {"N_HIDDEN": N_HIDDEN, "STRIDE_DPRE_U": N_HIDDEN, "STRIDE_DPRE_D": 1}
    shape |= {"NORMALIZE": True, "TANH": True, "TANH_INPUT": False}
    per_click = FixedTile(0, tiles.CLICKS_PER_BLOCK, 4)
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        common = shape | dict.fromkeys(("weight_ptr", "bias_ptr", "y_ptr", "dpre_ptr"), f"*{dtype}")
        for detail, more in ((f"{dtype}, values", {}), (dtype, no_values)):
            arguments = common | more
            # few users and many differ in how rows are split, not in how a program reads
            for tile in dict.fromkeys(row.sparse_forward[torch_dtype.itemsize]):
                name = f"{detail}, splits of {tile.split_nnz}"
                yield Case(module._sparse_linear_fwd_kernel, name, tile, arguments)
            if more:
                part = {"seed_ptr": ("*i64", "*i64"), "NORMALIZE": None}
                tile, name = row.sparse_forward[torch_dtype.itemsize][0], f"{dtype}, some columns"
                yield Case(module._sparse_linear_fwd_kernel, name, tile, arguments | part)
            kernel, backward = module._sparse_linear_bwd_weight_kernel, row.sparse_backward[0]
            yield Case(
                kernel,
                detail,
                backward,
                arguments,
                wide=False,
                atomics=True,
                singles=(1, "block_d"),
            )
            kernel = module._sparse_linear_bwd_weight_ordered_kernel
            yield Case(kernel, detail, row.sparse_item, arguments)
        for tile in dict.fromkeys(row.sparse_forward[torch_dtype.itemsize]):
            block_d, num_warps = module.finish_cut(N_HIDDEN)
            small = tile._replace(block_d=block_d, num_warps=num_warps)
            detail = f"{dtype}, {tile.n_splits} splits"
            yield Case(module._sparse_linear_finish_kernel, detail, small, common)
        yield Case(sparse_linear_dvalues._click_products_kernel, dtype, row.sparse_values, common)
    yield Case(module._mark_clicks_kernel, "any", per_click, {}, wide=False)
    kernel = sparse_linear_dvalues._sparse_linear_bwd_values_kernel
    yield Case(kernel, "any", per_click, shape, wide=False)


def sample_latent_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/sample_latent.py."""
    block_d, num_warps = sample_latent.block_of(N_LATENT)
    tile = FixedTile(block_d, 0, num_warps)
    for dtype in ("bf16", "fp32"):
        pointers = {
            f"{name}_ptr": f"*{dtype}" for name in ("encoded", "noise", "z", "dz", "dencoded")
        }
        shape = {"N_LATENT": N_LATENT, "BLOCK_D": block_d}
        # a warp of gfx942 has 64 threads for the same block: 8 bytes of bf16 each
        wide = chip != "gfx942" or dtype == "fp32"
        for detail, more in ((dtype, {}), (f"{dtype}, no noise", {"noise_ptr": None})):
            arguments = pointers | shape | more
            yield Case(sample_latent._sample_latent_fwd_kernel, detail, tile, arguments, wide=wide)
            yield Case(sample_latent._sample_latent_bwd_kernel, detail, tile, arguments, wide=wide)


def bias_gradient_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/bias_gradient.py."""
    block_u, block_d = bias_gradient.BLOCK_U, bias_gradient.BLOCK_D
    tile = FixedTile(block_d, 0, bias_gradient.NUM_WARPS)
    shape = {"N_COLUMNS": N_HIDDEN, "USERS": bias_gradient.USERS, "BLOCK_U": block_u, "BLOCK_D": block_d}  # fmt: skip
    kernel = bias_gradient._bias_gradient_kernel
    for dtype in ("bf16", "fp32"):
        # a warp of gfx942 has 64 threads for the same block
        wide = chip != "gfx942" or dtype == "fp32"
        pointers = {f"{name}_ptr": f"*{dtype}" for name in ("dy", "y", "dpre")}
        yield Case(kernel, dtype, tile, pointers | shape, wide=wide)
    plain = {"dy_ptr": "*bf16", "y_ptr": None, "dpre_ptr": None}
    yield Case(kernel, "bf16, no tanh", tile, plain | shape, wide=chip != "gfx942")


def adam_cases(chip: str) -> Iterator[Case]:
    """Cases of kernels/adam.py."""
    names = ("weight_ptrs", "grad_ptrs", "exp_avg_ptrs", "exp_avg_sq_ptrs", "step_ptrs")
    common = dict.fromkeys(names, ("*fp32",) * N_WEIGHTS) | dict.fromkeys(
        ("numels", "row_quads", "gap_quads"), ("i32",) * N_WEIGHTS
    )
    common |= dict.fromkeys(("decays", "log_betas"), ("fp32",) * 2)
    kernel, tile = adam._adam_kernel, tiles.TABLE[chip].adam
    shadows = common | {"lr_ptr": None, "shadow_ptrs": ("*bf16",) * N_WEIGHTS}
    # a tensor's last block is masked, number by number
    yield Case(kernel, "shadows", tile, shadows, singles=(1, "block"))
    yield Case(kernel, "fp32 alone, lr a tensor", tile, common | {"shadow_ptrs": None})


CASES = (
    sparse_linear_cases,
    sample_latent_cases,
    bias_gradient_cases,
    multinomial_nll_cases,
    linear_multinomial_nll_cases,
    nll_steps_cases,
    exp_gemm_cases,
    adam_cases,
)


def compile_case(case: Case, chip: str) -> Any:
    """Triton's CompiledKernel of a case; pointers are taken as aligned to 16 bytes, as torch's are."""
    given = (
        {name.upper(): value for name, value in case.tile._asdict().items()}
        | TYPES
        | case.arguments
    )
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(case.kernel.params):
        name = parameter.name
        argument = given.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        if parameter.is_constexpr or argument is None:
            signature[name], constants[position,] = "constexpr", given[name]
        else:
            signature[name] = argument
        if not parameter.is_constexpr and name.endswith(("_ptr", "_ptrs")):
            paths = (
                [(position, n) for n in range(len(argument))]
                if isinstance(argument, tuple)
                else [(position,)]
            )
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    options = {"num_warps": case.tile.num_warps, "num_stages": getattr(case.tile, "num_stages", 3)}
    source = ASTSource(case.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[chip], options=options)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _cuda_resources(compiled: Any) -> dict[str, Any]:
    """Registers and stack from the machine code, instructions from PTX."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    matrix = {
        name: _count(rf"\b{name}\.", ptx) for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
    }
    sixteen = r"[\w.:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)\b"
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "matrix": {name: count for name, count in matrix.items() if count},
        "loads_16": _count(rf"\bld\.global{sixteen}", ptx)
        + _count(r"\bcp\.async\.cg\.shared\.global.*, 0x10", ptx),
        "stores_16": _count(rf"\bst\.global{sixteen}", ptx),
        "singles": _count(r"\b(?:ld|st)\.global(?:\.(?!v\d)\w+)*\.[bu]16\b", ptx),
        "wide_atomics": _count(r"\b(?:atom|red)\.global[\w.:]*\.v[24]\.f32\b", ptx),
    }


def _hip_resources(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    matrix = _count(r"\bv_mfma", code)
    access = r"\b(?:global|buffer|flat)_"
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "stack": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]),
        "matrix": {"mfma": matrix} if matrix else {},
        "loads_16": _count(rf"{access}load_dwordx4\b", code),
        "stores_16": _count(rf"{access}store_dwordx4\b", code),
        "singles": _count(rf"{access}(?:load|store)_(?:[us]?short|short_d16)\w*", code),
        "wide_atomics": _count(rf"{access}atomic_pk_add", code),
    }


def measure() -> Iterator[dict[str, Any]]:
    """One row of the table for each case and chip."""
    for cases in CASES:
        for chip, target in TARGETS.items():
            for case in cases(chip):
                compiled = compile_case(case, chip)
                resources = _cuda_resources if target.backend == "cuda" else _hip_resources
                count, block = case.singles
                lanes = case.tile.num_warps * target.warp_size
                singles = count * max(1, getattr(case.tile, block) // lanes)
                yield {
                    "op": case.kernel.__module__.rpartition(".")[2],
                    "kernel": case.kernel.__name__.strip("_").removesuffix("_kernel"),
                    "case": case.detail,
                    "chip": chip,
                    "warps": case.tile.num_warps,
                    **resources(compiled),
                    "shared": compiled.metadata.shared,
                    "expected": {
                        "tensor_core": case.tensor_core,
                        "wide": case.wide,
                        "singles": singles,
                        "atomics": case.atomics,
                    },
                }


COLUMNS = (
    "kernel case chip warps registers stack shared matrix loads_16 stores_16 singles wide_atomics"
).split()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text in columns."""
    lines = [COLUMNS]
    for row in rows:
        matrix = " ".join(f"{name} {count}" for name, count in row["matrix"].items())
        cells = row | {"matrix": matrix or "-"}
        lines.append([str(cells[column]) for column in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    text = ["  ".join(cells).rstrip() for cells in padded]
    return "\n".join([f"triton {triton.__version__}", "", *text]) + "\n"


def main(arguments: list[str]) -> None:
    """Print the table, or with --json its rows."""
    parser = argparse.ArgumentParser(
        prog="python -m bench resources", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print rows with what is expected of each as JSON"
    )
    as_json = parser.parse_args(arguments).json
    if triton.knobs.runtime.interpret:
        sys.exit(
            "python -m bench resources: unset TRITON_INTERPRET, an interpreted kernel has no code"
        )
    rows = list(measure())
    sys.stdout.write(json.dumps(rows, indent=1) + "\n" if as_json else table(rows))
