"""Render the tables of README.md and of pages in docs/, and two plots, from the committed JSON files.

python -m bench report            writes the pages, bench/results/step_time.png and memory.png
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from bench import traffic
from bench.machine import RESULTS
from bench.quality_baselines import MODELS
from bench.quality_defaults import GRID, name_of
from bench.steps import SHAPES

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "bench" / "NOTES.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("measured", "frameworks", "new-data", "training", "comparing", "distributed")
    ),
)

PLOTTED = ("netflix", "ml20m", "msd", "50k")
GPU_SHAPES = ("ml20m", "ml20m-24576", "50k-4096")
GPU_OURS = "fastvae-graph-bf16"
RIVALS = {
    "dense-padded-compiled-graph": "dense, items padded to 64, torch.compile, fused Adam",
    "dense-padded-graph": "dense, items padded to 64, fused Adam",
}
STEP_ROWS = {
    "fastvae-bf16": "**fastvae**, bf16",
    "fastvae": "**fastvae**, fp32",
    "embedding_bag": "embedding_bag + log_softmax, fused Adam, fp32",
    "dense-compiled-bf16": "dense, torch.compile, fused Adam, bf16",
    "dense-compiled": "dense, torch.compile, fused Adam, fp32",
    "dense-bf16": "dense, fused Adam, bf16",
    "dense-fused-adam": "dense, fused Adam, fp32",
    "dense": "dense, fp32 (what public code does)",
}
WARM_ROWS = {
    "from_scratch": "from scratch",
    "warm": "**warm start**",
    "warm_without_moments": "warm start without moments",
    "warm_in_small_batches": "warm start in small batches",
}
FIRST_ROWS = ("fastvae-bf16", "fastvae", "dense-compiled-bf16", "dense")  # of README's first screen


def read(name: str) -> dict:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def first_table() -> str:
    """The step table's rows for the first screen."""
    return step_table(FIRST_ROWS)


def step_table(names: Iterable[str] = tuple(STEP_ROWS)) -> str:
    """Milliseconds per training step and peak memory on a CPU, at ML-20M's shape."""
    result = read("cpu_ml20m")
    rows, machine = result["providers"], result["machine"]
    step = (
        f"{result['n_items']:,} items, batch {result['batch_size']}, {machine['threads']} CPU cores"
    )
    lines = [
        f"| training step, {step} | ms | times faster | peak MiB |",
        "| --- | --: | --: | --: |",
    ]
    for name in names:
        text = STEP_ROWS[name]
        if name in rows:
            ratio = rows["dense"]["ms"] / rows[name]["ms"]
            lines.append(
                f"| {text} | {rows[name]['ms']:.0f} | {ratio:.1f} | {rows[name]['peak_mib']:.0f} |"
            )
    return "\n".join(lines)


def newest_gpu() -> dict:
    """The latest step times of a GPU that have the first shape: a run may have been cut short."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*_ratio.json")]
    whole = [result for result in results if GPU_SHAPES[0] in result["rows"]]
    return max(whole, key=lambda result: result["machine"]["date"])


def gpu_table() -> str:
    """Milliseconds and memory of a captured bf16 step on a GPU: the strongest rival first, then ours."""
    result = newest_gpu()
    rows, machine = [result["rows"].get(name) for name in GPU_SHAPES], result["machine"]
    first = rows[0]["providers"]
    rival = min(first.keys() & RIVALS.keys(), key=lambda name: first[name]["ms"])
    lines = [
        "| training step, bf16, one CUDA graph: ms (MiB) |"
        + "".join(f" {SHAPES[n].n_items:,} items, batch {SHAPES[n].batch_size:,} |" for n in GPU_SHAPES),
        "| --- |" + " --: |" * len(rows),
    ]  # fmt: skip
    timed = {
        name: [row["providers"].get(name) if row else None for row in rows]
        for name in (rival, GPU_OURS)
    }
    for name, cells in timed.items():
        text = RIVALS.get(name, "**fastvae**")
        lines.append(f"| {text} | " + " | ".join(map(_step_cell, cells)) + " |")
    ratios = [
        f"{other['ms'] / ours['ms']:.2f}" if other and ours else "-"
        for other, ours in zip(*timed.values(), strict=True)
    ]
    lines.append("| times faster | " + " | ".join(ratios) + " |")
    eager = ""
    if {"fastvae-bf16", "dense-bf16"} <= first.keys():
        ours, dense = (f"{first[name]['ms']:.1f}" for name in ("fastvae-bf16", "dense-bf16"))
        eager = f" Without graphs, batch 500: fastvae {ours} ms, dense {dense}."
    where = f"{machine['gpu']}, {machine['date']}, commit {machine['commit'][:7]}, torch {machine['torch']}"
    note = f" {result['note']}" if "note" in result else ""
    return "\n".join([*lines, "", f"{where}, triton {machine['triton']}.{eager}{note}"])


def _step_cell(row: dict | None) -> str:
    if row is None:
        return "not timed"
    memory = f" ({row['peak_mib']:,.0f})" if "peak_mib" in row else ""
    return f"{row['ms']:.{2 if row['ms'] < 10 else 1}f}{memory}"


def peers_table() -> str:
    """Seconds per epoch and memory of other packages, beside ours in the same run."""
    result = read("peers_cpu")
    data, settings = result["data"], result["settings"]
    lines = [
        "| Mult-VAE of | s per epoch | times ours | peak GiB |",
        "| --- | --: | --: | --: |",
    ]
    for row in result["models"].values():
        if "s_per_epoch" in row:
            lines.append(
                f"| {row['model']} | {row['s_per_epoch']:.1f} | {row['times_ours']:.1f} | {row['peak_rss_gib']:.2f} |"
            )
    lines.append("")
    lines.append(
        f"{data['n_users']:,} users x {data['n_items']:,} items of MovieLens-10M, batch {settings['batch_size']}, "
        f"fp32, {settings['threads']} threads. Times ours: beside our runs directly before and after. What they "
        "compute differs: see `differs` in bench/results/peers_cpu.json."
    )
    return "\n".join(lines)


def recbole_table() -> str:
    """An epoch in RecBole's trainer by its model and by ours, and what they reach with its early stopping."""
    result = read("recbole_cpu")
    timed = {name[5:]: row for name, row in result["rows"].items() if name.startswith("time ")}
    lines = ["| seconds an epoch (times faster) | " + " | ".join(timed) + " |"]
    lines.append("| --- |" + " --: |" * len(timed))
    names = {
        "recbole": "RecBole's MultiVAE",
        "fastvae, RecBole's optimiser": "fastvae.recbole, RecBole's optimiser",
        "fastvae": "**fastvae.recbole**",
    }
    for name, text in names.items():
        cells = [_epoch_cell(row["cpu_s"], name) for row in timed.values()]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    lines += ["", "| ml-100k, test, mean of three seeds ± their spread | NDCG@100 | Recall@20 |"]
    lines.append("| --- | --: | --: |")
    names = {**names, "fastvae": "fastvae.recbole", "fastvae, noise_std 1": "with `noise_std: 1`"}
    for name, row in result["rows"]["quality ml-100k"].items():
        cells = [
            f"{row[key]['mean']:.4f} ± {row[key]['std']:.4f}" for key in ("ndcg@100", "recall@20")
        ]
        lines.append(f"| {names[name]} | " + " | ".join(cells) + " |")
    machine = result["machine"]
    lines += [
        "",
        f"Seconds of one core's processor time ({machine['threads']} thread, torch {machine['torch']}), on a shared machine.",
    ]
    return "\n".join(lines)


def _epoch_cell(times: dict, name: str) -> str:
    digits = 2 if times["epoch"]["recbole"] < 10 else 1
    return f"{times['epoch'][name]:.{digits}f} ({times['times_faster'][name]:.1f})"


def memory_line() -> str:
    """Peak memory of training steps at the largest size measured."""
    result = read("memory_cpu")
    sizes = result["peak_mib"]
    n_items = max(map(int, sizes["fastvae"]))
    peaks = ", ".join(f"{name} {rows[str(n_items)]:,.0f}" for name, rows in sizes.items())
    return (
        f"Peak memory of training steps with {n_items:,} items, batch {result['batch_size']}, in MiB: {peaks}. "
        "Most of it is weights, gradients and Adam's moments, which all have alike."
    )


def quality_table() -> str:
    """NDCG and recall on held-out users, and memory."""
    ml10m, ml100k, gowalla = (read(f"quality_{name}") for name in ("ml10m", "ml100k", "gowalla"))
    lines = [
        "| test users | model | NDCG@100 | Recall@20 | Recall@50 |",
        "| --- | --- | --: | --: | --: |",
    ]
    where = (
        f"MovieLens-10M, {ml10m['runs']['fp32']['n_evaluated']:,} users, {ml10m['epochs']} epochs"
    )
    names = {"fp32": "fastvae fp32", "bf16": "fastvae bf16", "dense": "dense reference fp32"}
    for name, text in names.items():
        run = ml10m["runs"][name]
        lines.append(
            f"| {where} | {text} | {run['ndcg@100']:.4f} ± {run['ndcg@100_stderr']:.4f} | "
            f"{run['recall@20']:.4f} | {run['recall@50']:.4f} |"
        )
    runs = ml100k["runs"]
    means = [
        sum(run[key] for run in runs) / len(runs) for key in ("ndcg@100", "recall@20", "recall@50")
    ]
    lines.append(
        f"| MovieLens-100K, {runs[0]['n_evaluated']} users, mean of {len(runs)} splits | fastvae fp32 | "
        + " | ".join(f"{mean:.4f}" for mean in means)
        + " |"
    )
    lines.append("")
    lines.append(
        f"A training epoch with validation on {gowalla['n_items']:,} items (gowalla, batch 500) peaks at "
        f"{gowalla['peak_rss_gib']:.2f} GiB of memory in all."
    )
    return "\n".join(lines)


def warm_start_table() -> str:
    """A data set that has grown: from scratch, and from the older run in a fifth of the epochs; means over seeds."""
    lines = [
        "| train users, items (new), seeds | training | epochs | best validation NDCG@100 | test NDCG@100 | "
        "test, more than from scratch | of new items alone |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    sets = {"ml10m": "MovieLens-10M", "anime": "anime", "ml100k": "MovieLens-100K"}
    for name, title in sets.items():
        result = read(f"warm_start_{name}")
        # one run of before there were seeds
        seeds = list(result["seeds"].values()) if "seeds" in result else [result]
        first = seeds[0]
        where = f"{title}: {first['users_now']:,}, {first['items_now']:,} ({first['items_new']:,}), {len(seeds)}"
        for key in (key for key in WARM_ROWS if key in first["runs"]):
            cells = _warm_cells([seed["runs"][key] for seed in seeds], key != "from_scratch")
            lines.append(f"| {where} | {WARM_ROWS[key]} | {' | '.join(cells)} |")
            where = ""
    return "\n".join(lines)


def _warm_cells(runs: list[dict], is_warm: bool) -> list[str]:
    """Of one kind of training, a run a seed."""
    # a training from scratch goes on until its patience is out
    epochs = [len(run["validation_ndcg@100"]) if is_warm else run["best_epoch"] for run in runs]
    columns = {
        "validation": [max(run["validation_ndcg@100"]) for run in runs],
        "test": [run["test"]["ndcg@100"] for run in runs],
        "new": [run["test_new_items"]["ndcg@100"] for run in runs],
    }
    means = {name: statistics.mean(values) for name, values in columns.items()}
    gains = [run.get("more_than_from_scratch") for run in runs]
    return [
        ", ".join(map(str, epochs)),
        f"{means['validation']:.4f}",
        f"{means['test']:.4f}",
        _gain(gains) if is_warm and all(gains) else "",
        f"{means['new']:.3f}",
    ]


def _gain(rows: list[dict]) -> str:
    """The mean of paired differences of several splits, with the standard error that their users give it."""
    mean = statistics.mean(row["mean"] for row in rows)
    error = sum(row["stderr"] ** 2 for row in rows) ** 0.5 / len(rows)
    return f"{mean:+.4f} ± {error:.4f}"


def baselines_table() -> str:
    """Test NDCG@100 of popularity, item-kNN, EASE and Mult-VAE on the same splits; of several splits the mean."""
    rows, vae = read("quality_baselines")["rows"], read("quality_defaults")["rows"]
    lines = [
        f"| data | users to train on, items, test users | {' | '.join(MODELS)} | Mult-VAE |",
        "| --- | --: " + "| --: " * (1 + len(MODELS)) + "|",
    ]
    for case in dict.fromkeys(name.split("/")[0] for name in rows):
        splits = [name for name in rows if name.split("/")[0] == case]
        found = [rows[name] for name in splits]
        first, times = found[0], f"{len(found)} x " if len(found) > 1 else ""
        cells = [f"{first['n_train']:,}, {first['n_items']:,}, {times}{first['n_test']:,}"]
        for model in MODELS:
            tests = [row[model] for row in found]
            error = sum(test["stderr"] ** 2 for test in tests) ** 0.5 / len(tests)
            cells.append(f"{statistics.mean(test['test'] for test in tests):.4f} ± {error:.4f}")
        cells.append(f"{statistics.mean(vae[f'{name}/defaults']['test'] for name in splits):.4f}")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def leaks_line() -> str:
    """What the study of baselines would show a leak by."""
    rows = [row for row in read("quality_baselines")["rows"].values() if "check" in row]
    checks = [row["check"] for row in rows]
    apart = max(abs(row["check"]["EASE in fp64"] - row["EASE"]["test"]) for row in rows)
    both = sum(check["clicks in both parts and users in train too"] for check in checks)
    others, popular = (
        [check[f"{model}, held-out clicks of another user"] for check in checks]
        for model in ("EASE", "popularity")
    )
    return (
        f"On {len(checks)} of these splits EASE was also computed by numpy alone in fp64, with a ranking and a metric of its "
        f"own: it differs by at most {apart:.5f}. Clicks both folded in and held out, and users both trained "
        f"and tested on: {both}. With another user's held-out clicks EASE falls to {min(others):.3f} to {max(others):.3f}, "
        f"below popularity's {min(popular):.3f} to {max(popular):.3f}."
    )


def similar_table() -> str:
    """Which cosine finds items that are alike."""
    result = read("quality_similar")
    lines = [
        f"| the {result['k']} nearest by the cosine of | pairs found | their training clicks | share of the catalogue |",
        "| --- | --: | --: | --: |",
    ]
    for name, row in result["means"].items():
        cells = f"{row['found']:.4f} | {row['clicks']:.0f} | {row['catalogue']:.3f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def defaults_table() -> str:
    """Test NDCG@100 of each point of the study by data set, mean of its splits."""
    rows = read("quality_defaults")["rows"]
    points = [name_of("", 0, point).split("/", 2)[2] for point in GRID]
    lines = [f"| data | users to train on | {' | '.join(points)} |"]
    lines.append("| --- " + "| --: " * (1 + len(points)) + "|")
    for case in dict.fromkeys(name.split("/")[0] for name in rows):
        found = {name: row for name, row in rows.items() if name.split("/")[0] == case}
        cells = [f"{next(iter(found.values()))['n_train']:,}"]
        for point in points:
            values = [row["test"] for name, row in found.items() if name.split("/", 2)[2] == point]
            cells.append(f"{statistics.mean(values):.4f}" if values else "-")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def imports_line() -> str:
    """What the import takes beside torch's."""
    rows = read("imports_cpu")["imports"]
    own, scipy = (rows[name]["more_cpu_ms"] for name in ("fastvae", "torch and scipy.sparse"))
    return (
        f"`import fastvae` takes {rows['fastvae']['cpu_ms'] / 1000:.2f} s of a core, where `import torch` takes "
        f"{rows['torch']['cpu_ms'] / 1000:.2f} s: {scipy:.0f} ms are scipy.sparse's and {own:.0f} ms its own."
    )


def scale_table() -> str:
    """Peak memory of each process, and what it sends in a step, by cut and number of processes."""
    rows = read("scale_cpu")["rows"]
    names = {
        "None/1": "one",
        **{f"{c}/{n}": f"{n}, `{c}`" for c in ("users", "items") for n in (2, 4)},
    }
    found: dict[str, dict[tuple[int, int], dict]] = {name: {} for name in names}
    for row in rows.values():
        found[f"{row['cut']}/{row['processes']}"][row["n_items"], row["hidden"]] = row
    sizes = sorted(found["None/1"])
    head = "".join(f" {n_items:,} items, {hidden} hidden |" for n_items, hidden in sizes)
    lines = [
        f"| processes: peak MiB of each (bytes sent in a step) |{head}",
        "| --- |" + " --: |" * len(sizes),
    ]
    for name, text in names.items():
        cells = [_scale_cell(found[name].get(size)) for size in sizes]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _scale_cell(row: dict | None) -> str:
    if row is None:
        return "-"
    sent = f" ({row['sent']:,})" if "sent" in row else ""
    return f"{row['peak_mib']:,.0f}{sent}"


TABLES = {
    "first": first_table,
    "gpu": gpu_table,
    "step": step_table,
    "quality": quality_table,
    "peers": peers_table,
    "recbole": recbole_table,
    "memory": memory_line,
    "imports": imports_line,
    "warm_start": warm_start_table,
    "defaults": defaults_table,
    "traffic": traffic.table,
    "scale": scale_table,
    "baselines": baselines_table,
    "leaks": leaks_line,
    "similar": similar_table,
}


def marks(text: str) -> list[str]:
    """The names of a page's marked parts."""
    return re.findall(r"^<!-- bench:(\w+) -->$", text, re.MULTILINE)


def render(text: str) -> str:
    """A page's text with each marked part replaced by its table."""
    for name in marks(text):
        pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
        table = TABLES[name]()
        text = pattern.sub(lambda mark, table=table: mark[1] + table + "\n" + mark[2], text)
    return text


def draw(name: str, label: str, curves: dict[str, dict[int, float]]) -> None:
    """A plot over the number of items, a line for each provider."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for provider, points in curves.items():
        style = "-" if provider.startswith("fastvae") else "--"
        axis.plot(*zip(*sorted(points.items()), strict=True), style, marker="o", label=provider)
    axis.set(xlabel="items", ylabel=label, ylim=(0, None), title="CPU, batch 500")
    axis.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def plots() -> None:
    """Step time and peak memory by number of items."""
    results = [read(f"cpu_{shape}") for shape in PLOTTED]
    names = set.intersection(*(set(result["providers"]) for result in results))
    times = {
        name: {result["n_items"]: result["providers"][name]["ms"] for result in results}
        for name in STEP_ROWS
        if name in names
    }
    draw("step_time", "ms per training step", times)
    sizes = read("memory_cpu")["peak_mib"]
    peaks = {name: {int(n): mib for n, mib in rows.items()} for name, rows in sizes.items()}
    draw("memory", "peak MiB of training", peaks)


def main(_: list[str]) -> None:
    """Rewrite the pages and draw the plots."""
    pages = {path: path.read_text() for path in PAGES}
    missing = set(TABLES).difference(*map(marks, pages.values()))
    if missing:
        raise SystemExit(f"report: a page must hold the mark <!-- bench:{min(missing)} -->")
    for path, text in pages.items():
        path.write_text(render(text))
    plots()
