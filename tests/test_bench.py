"""What the benchmarks compute around their timings: a wrong ratio would be believed."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import (
    gpu,
    imports,
    kernels,
    machine,
    one_process,
    peers,
    profile,
    pytest_results,
    quality_baselines,
    quality_similar,
    ratio,
    recbole,
    report,
    scale,
    traffic,
)
from bench.provider import NotTimed
from bench.steps import PROVIDERS, Shape, check, new_model
from fastvae import Dataset, MultiVAE, evaluate
from fastvae.baselines import EASE, Popularity
from fastvae.synthetic import synthetic_clicks

SHAPE = Shape(50, 8.0, batch_size=20)


# torch.compile takes a minute; what it compiles is there without it
@pytest.mark.parametrize("name", [name for name in PROVIDERS if "compiled" not in name])
def test_a_provider_that_is_right_passes(name):
    try:
        provider = PROVIDERS[name](new_model(SHAPE.n_items))
    except NotTimed as missing:
        pytest.skip(str(missing))
    assert check(name, provider, SHAPE.clicks(1)) < (1e-2 if provider.bf16 else 1e-4)


@pytest.mark.parametrize("wrong", ["likely-padding", "forgotten-item"])
def test_a_padded_provider_that_pads_wrongly_is_not_timed(wrong):
    provider = PROVIDERS["dense-padded-graph"](new_model(SHAPE.n_items))
    bias = provider.module.decoder[-1].bias
    assert len(bias) == 64 and SHAPE.n_items == 50
    with torch.no_grad():
        bias[50:] = 0.0 if wrong == "likely-padding" else bias[50:]
        bias[:1] = -1e4 if wrong == "forgotten-item" else bias[:1]
    with pytest.raises(NotTimed, match="mine is wrong by"):
        check("mine", provider, SHAPE.clicks(1))


def test_a_captured_step_reads_the_batch_it_is_given():
    provider, clicks = PROVIDERS["dense-padded-graph"](new_model(SHAPE.n_items)), SHAPE.clicks(2)
    first, second = (provider.to_batch(clicks.rows(ids)) for ids in torch.arange(40).split(20))
    seen = []
    provider.loss = lambda batch, beta: (
        seen.append(batch.clone()) or provider.module.loss(batch, beta)
    )
    provider.step(first)
    provider.step(second)
    assert torch.equal(seen[0], first) and torch.equal(seen[1], second)


def test_what_cannot_be_timed_is_named_and_the_others_are_timed(monkeypatch):
    def missing(model):
        raise NotTimed("it is not installed")

    def too_large(model):
        raise torch.OutOfMemoryError("out of memory\nand more lines")

    monkeypatch.setitem(PROVIDERS, "missing", missing)
    monkeypatch.setitem(PROVIDERS, "too-large", too_large)
    result = ratio.measure("toy", ["missing", "fastvae", "too-large"], 1, "cpu")
    assert result["not_timed"] == {"missing": "it is not installed", "too-large": "out of memory"}
    assert result["providers"].keys() == {"fastvae", "products"}


def test_a_provider_with_a_wrong_gradient_is_not_timed():
    provider = PROVIDERS["fastvae"](new_model(SHAPE.n_items))
    loss = provider.loss
    provider.loss = lambda *arguments: loss(*arguments) * 1.01
    with pytest.raises(NotTimed, match=r"mine is wrong by 1\.0e-02"):
        check("mine", provider, SHAPE.clicks(1))


def test_a_provider_without_an_optimiser_is_not_timed():
    provider = PROVIDERS["fastvae"](new_model(SHAPE.n_items))
    provider.optimizer.step = lambda: None
    with pytest.raises(NotTimed, match="mine leaves weights as they are"):
        check("mine", provider, SHAPE.clicks(1))


def test_providers_take_turns_and_the_round_before_the_first_is_not_counted(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(ratio.time, "perf_counter", lambda: next(clock))

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step(self, batch):
            calls.append((self.name, batch))

    cases = {name: (Recorder(name), ["x", "y"]) for name in "ab"}
    times = ratio.take_turns(cases, 3, "cpu")
    assert times == {"a": [1000.0] * 3, "b": [1000.0] * 3}
    assert calls == [(name, batch) for batch in "yxyx" for name in "ab"]


def test_an_import_is_compared_with_the_one_before_it_in_the_same_round():
    # the second round ran beside something else
    rounds = [
        {"python": (9.0, 8.0), "torch": (90.0, 80.0), "torch and scipy.sparse": (95.0, 84.0), "fastvae": (99.0, 87.0)},
        {"python": (9.0, 8.0), "torch": (990.0, 180.0), "torch and scipy.sparse": (995.0, 184.0), "fastvae": (99.0, 187.0)},
        {"python": (9.0, 8.0), "torch": (91.0, 81.0), "torch and scipy.sparse": (95.0, 85.0), "fastvae": (99.0, 88.0)},
    ]  # fmt: skip
    rows = imports.summarize(rounds)
    assert rows["python"] == {"ms": 9.0, "cpu_ms": 8.0, "more_cpu_ms": 8.0}
    assert rows["torch"] == {"ms": 91.0, "cpu_ms": 81.0, "more_cpu_ms": 73.0}
    assert rows["fastvae"] == {"ms": 99.0, "cpu_ms": 88.0, "more_cpu_ms": 3.0}


def test_a_child_is_timed_by_the_wall_and_by_its_cores():
    wall, cpu = imports.milliseconds("import time; time.sleep(0.2)")
    assert wall > 200 and wall > cpu > 0


def test_peers_are_compared_with_our_runs_beside_them():
    def run(seconds):
        return {
            "epoch_s": [seconds, seconds], "cpu_s_per_epoch": 2 * seconds, "peak_rss_gib": seconds / 10,
            "setup_s": 1.0, "nll_after": 50.0,
        }  # fmt: skip

    ours = peers.OURS
    order = [
        (ours, run(10)),
        ("recbole", run(30)),
        (ours, run(20)),
        ("cornac", run(90)),
        (ours, run(40)),
    ]
    rows = peers.summarize(order, {"rectorch": "not installed"})
    assert rows["recbole"]["times_ours"] == 2.0 and rows["recbole"]["cpu_times_ours"] == 2.0
    assert rows["cornac"]["times_ours"] == 3.0 and rows["cornac"]["peak_rss_gib"] == 9.0
    assert rows[ours]["s_per_epoch"] == 20.0 and rows[ours]["times_ours"] == 1.0
    assert rows["rectorch"]["not_run"] == "not installed"


def test_the_plots_show_what_their_axes_say(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        report, "draw", lambda name, label, curves: drawn.update({name: (label, curves)})
    )
    report.plots()
    step = report.read("cpu_ml20m")
    label, curves = drawn["step_time"]
    assert "ms" in label
    assert curves["fastvae"][step["n_items"]] == step["providers"]["fastvae"]["ms"]
    label, curves = drawn["memory"]
    assert "MiB" in label
    assert curves["dense"][80_000] == report.read("memory_cpu")["peak_mib"]["dense"]["80000"]


def test_the_gpu_table_takes_the_latest_run_and_shows_the_strongest_rival_first(
    tmp_path, monkeypatch
):
    def providers(**ms):
        rows = {name.replace("_", "-"): {"ms": t, "peak_mib": 1234.4} for name, t in ms.items()}
        return {"providers": rows}

    rows = {
        "ml20m": providers(fastvae_graph_bf16=2.0, dense_padded_graph=1.0, dense_padded_compiled_graph=4.0),
        "50k-4096": providers(fastvae_graph_bf16=20.0),
    }  # fmt: skip
    card = {"gpu": "CARD", "commit": "0123456789ab", "torch": "2", "triton": "3"}
    for name, date in (("a", "2026-12-01"), ("b", "2026-12-02"), ("cut", "2026-12-03")):
        result = {
            "machine": {**card, "date": date},
            "rows": {} if name == "cut" else rows,
            "note": name,
        }
        (tmp_path / f"{name}_ratio.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    head, _, rival, ours, ratio, _, caption = report.gpu_table().splitlines()
    assert "20,108 items, batch 500" in head
    assert rival.startswith("| dense, items padded to 64, fused Adam | 1.00 (1,234) | not timed |")
    assert ours.startswith("| **fastvae** | 2.00 (1,234) | not timed |")
    assert ours.endswith("| 20.0 (1,234) |")
    assert ratio == "| times faster | 0.50 | - | - |"
    assert caption == "CARD, 2026-12-02, commit 0123456, torch 2, triton 3. b"


@pytest.mark.parametrize(
    ("operator", "shapes", "part"),
    [
        ("mm", [[20, 600], [600, 50]], "products of the last layer"),
        ("mm", [[20, 600], [600, 400]], "small layers"),
        ("_softmax", [[7, 50], [7, 50]], "softmax and other passes over D"),
        ("mul", [[160]], "the dropout mask, twice"),
        ("mul", [[20]], "the rest"),
        ("copy_", [[50, 600], [50, 600]], "copies: weights to bf16, gradients to fp32"),
        ("_embedding_bag", [[50, 600], [160]], "gather-sums of the first layer"),
        ("_fused_adam_", [], "fused Adam"),
    ],
)
def test_operators_are_counted_to_their_part_of_the_step(operator, shapes, part):
    assert profile._part(operator, shapes, SHAPE) == part


def test_the_parts_of_a_profile_add_up():
    row = profile.measure("fastvae", "products", SHAPE, 2)
    assert sum(row["parts"].values()) == pytest.approx(row["profiled_ms"], abs=0.2)
    assert row["parts"]["fused Adam"] > 0


def test_the_gpu_run_is_rehearsed_without_the_packages_that_a_gpu_machine_lacks(tmp_path):
    for name in ("typer", "rich", "polars", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name}')")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(out), "--rehearse"]
    # the run's own pytest is no part of the one that runs this test
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{tmp_path}:{gpu.ROOT}"}
    done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    rows = {name.removeprefix("rehearsal_"): file.get("rows") for name, file in result.items()}
    assert [row["code"] for row in rows["commands"].values()] == [0] * len(gpu.PARTS)
    assert result["rehearsal_tests"]["counts"] == {"passed": 1, "skipped": 1}
    assert rows["profile"]["toy"]["captured_ms"] > 0 and rows["profile"]["toy"]["kernels"]
    assert rows["ratio"]["toy"]["not_timed"] == {}
    assert rows["ratio"]["toy"]["providers"].keys() == {*gpu.PROVIDERS, "products-bf16"}
    assert rows["quality"]["toy"]["epochs_to_target"] == 1
    assert all(row["left_out"] == 0 for row in rows["tiles"].values()) and len(rows["tiles"]) == 12
    assert len(list(out.iterdir())) <= 8, "more files do not come back from some machines"


def test_a_command_out_of_time_ends_with_its_children_and_keeps_what_it_printed(tmp_path):
    code = (
        "import subprocess as s; p = s.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
    )
    command = gpu.Command("a", 0, ["timeit", "-n", "1", "-r", "1", code])
    status, tail = gpu.run(command, 5, tmp_path / "log")
    assert status is None
    child = Path("/proc") / tail[-1] / "cmdline"
    for _ in range(100):
        if not child.exists() or b"sleep" not in child.read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("the child still sleeps")


def test_a_command_is_not_begun_without_time(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"gpu: failed: b \(no time\)"):
        gpu.main(["--out", str(tmp_path), "--rehearse", "--parts", "b", "--seconds", "5"])
    rows = json.loads((tmp_path / "rehearsal_commands.json").read_text())["rows"]
    assert [row["code"] for row in rows.values()] == [None]
    assert "not begun" in capsys.readouterr().out


def test_a_gpu_is_asked_every_part_in_time():
    commands = gpu.commands("x")
    assert {command.part for command in commands} == set(gpu.PARTS)
    assert {"tests/test_gpu.py", "tests/test_sparse_linear_kernel.py"} <= set(commands[0].arguments)
    for command in commands[1:]:
        into = command.arguments[command.arguments.index("--into") + 1]
        assert re.fullmatch(r"x_\w+\.json", into)


def test_test_results_hold_failures_and_counts(tmp_path):
    results = pytest_results.Results(tmp_path / "tests.json")
    for when, outcome in (
        ("setup", "passed"),
        ("call", "failed"),
        ("teardown", "passed"),
        ("setup", "skipped"),
    ):
        results.pytest_runtest_logreport(SimpleNamespace(
            when=when, outcome=outcome, passed=outcome == "passed", failed=outcome == "failed",
            nodeid="t.py::a", longreprtext="line\nE  assert 1 == 2", duration=0.26,
        ))  # fmt: skip
    results.write()
    found = json.loads((tmp_path / "tests.json").read_text())
    assert not found["finished"] and found["counts"] == {"failed": 1, "skipped": 1}
    assert found["failures"] == {"t.py::a": ["line", "E  assert 1 == 2"]}
    assert found["longest"] == {"t.py::a": 0.3}


def test_a_second_call_adds_to_a_result_file_of_its_commit(tmp_path, monkeypatch):
    path = tmp_path / "x_ratio.json"
    machine.add(path, "ml20m", {"ms": 1})
    machine.add(path, "50k", {"ms": 2})
    machine.add(path, "ml20m", {"ms": 3})
    assert json.loads(path.read_text())["rows"] == {"ml20m": {"ms": 3}, "50k": {"ms": 2}}
    monkeypatch.setattr(machine, "_commit", lambda: "another")
    machine.add(path, "1m-1024", {"ms": 4})
    assert json.loads(path.read_text())["rows"] == {"1m-1024": {"ms": 4}}


def on_cpu(name, shapes, *launched, dtypes=None):
    return SimpleNamespace(
        name=name, device_type=DeviceType.CPU, input_shapes=shapes, input_dtypes=dtypes,
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in launched],
    )  # fmt: skip


def on_device(name, us):
    return SimpleNamespace(
        name=name, device_type=DeviceType.CUDA, time_range=SimpleNamespace(elapsed_us=lambda: us)
    )


def test_every_kernel_of_a_gpu_profile_is_counted_once_with_its_work_and_floor():
    half = ["c10::BFloat16"] * 3
    events = [
        on_cpu("Optimizer.step", [], ("Optimizer.step", 99.0)),  # a named range is no kernel
        on_cpu("aten::mm", [[500, 600], [600, 64], []], ("nvjet", 8.0), ("splitk_reduce", 2.0), dtypes=half),
        on_cpu("fastvae::op", [[500, 600]], ("_exp_gemm_kernel", 50.0), dtypes=half),
        on_cpu("aten::zero_", [[1000]], ("Memset", 3.0), dtypes=["float"]),
        *(on_device(name, us) for name, us in [("nvjet", 8.0), ("splitk_reduce", 2.0), ("Memset", 3.0)]),
        on_device("Optimizer.step", 99.0),
        on_device("_exp_gemm_kernel", 50.0),
        on_device("_exp_gemm_kernel", 5.0),  # launched by no operator of torch's
    ]  # fmt: skip
    size = kernels.Size(users=500, items=64, clicks=4000, weights=10**6)
    rows = kernels.by_kernel(kernels.launches(events, "cuda"), size, (1e12, 1e14), n_steps=1)
    assert [(row["kernel"], row["us"], row["calls"]) for row in rows] == [
        ("_exp_gemm_kernel", 55.0, 2), ("nvjet", 8.0, 1), ("Memset", 3.0, 1), ("splitk_reduce", 2.0, 1)
    ]  # fmt: skip
    gemm, product, fill, reduction = rows
    n_bytes = 2 * (500 * 600 + 600 * 64 + 500 * 64)
    assert gemm["mb"] == product["mb"] == round(n_bytes / 1e6, 2)
    assert product["floor_us"] == round(n_bytes / 1e6, 2) and product["gflop"] == 0.04
    assert fill["mb"] == 0.0 and fill["floor_us"] == 0.0
    assert reduction["floor_us"] is None, "the product's work is not counted twice"


def test_the_floor_is_the_longer_of_bytes_and_flop():
    launch = kernels.Launch("k", 1.0, "aten::mm", ((100, 100), (100, 100)), (4, 4), True)
    size = kernels.Size(1, 1, 1, 1)
    (slow_copy,) = kernels.by_kernel([launch], size, (1e9, 1e15), 1)
    (slow_product,) = kernels.by_kernel([launch], size, (1e15, 1e9), 1)
    assert slow_copy["floor_us"] == 120.0 and slow_product["floor_us"] == 2000.0


def test_kernels_with_a_formula_exist():
    folder = Path(inspect.getfile(kernels)).parent.parent / "kernels"
    sources = "".join(path.read_text() for path in folder.glob("*.py"))
    for part in kernels.WORK.keys() - {"fusedadam"}:  # torch's
        assert re.search(rf"def \w*{part}\w*\(", sources), part


def test_epochs_in_recboles_trainer_are_compared_in_the_pairs_that_ran_side_by_side():
    times = {"recbole": [4.0, 8.0, 12.0], "fastvae": [2.0, 8.0, 1.0]}
    compared = recbole._compared(times, epochs=2)
    assert compared["epoch"] == {"recbole": 12.0, "fastvae": 5.5}
    assert compared["times_faster"] == {"recbole": 1.0, "fastvae": 2.0}  # of 2, 1 and 12
    summary = recbole._summary([{"seed": 0, "ndcg@20": 0.1}, {"seed": 1, "ndcg@20": 0.3}])
    assert summary == {"ndcg@20": {"mean": 0.2, "std": 0.1414}}


def test_the_study_of_baselines_checks_with_numbers_of_its_own():
    data = Dataset.from_matrix(synthetic_clicks(200, 150, 4000), 40, 0)
    weight = quality_baselines.ease_fp64(quality_baselines.rows_of(data.train), 20.0)
    torch.testing.assert_close(
        EASE(data.train, 20.0).weight, torch.from_numpy(weight).float(), rtol=1e-4, atol=1e-6
    )
    fold_in, held_out = (quality_baselines.rows_of(part).toarray() for part in data.test)
    # many equal scores
    popularity = Popularity(data.train)
    found = quality_baselines.ndcg_fp64(
        popularity(data.test[0]).double().numpy(), fold_in, held_out
    )
    assert found == pytest.approx(evaluate(popularity, *data.test)["ndcg@100"])

    row = quality_baselines.measure(data)
    assert row["check"]["EASE in fp64"] == pytest.approx(row["EASE"]["test"], rel=1e-3)
    assert row["check"]["clicks in both parts and users in train too"] == 0
    best = max(row["EASE"]["validation"].values())
    assert row["EASE"]["validation"][row["EASE"]["reg"]] == best
    assert set(quality_baselines.MODELS) < set(row) and json.dumps(row)
    leaking = SimpleNamespace(
        train=data.train, users_train=[0, 1], users_test=[1, 2], n_items=data.n_items,
        test=(data.test[1], data.test[1]),
    )  # fmt: skip
    n_both = quality_baselines.checked(leaking, 20.0)["clicks in both parts and users in train too"]
    assert n_both == data.test[1].nnz + 1


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_are_measured_and_send_what_the_formula_says():
    rows = scale.rehearse()
    assert rows.keys() == {"users", "items"}
    for row in rows.values():
        assert row["sent"] == row["formula"] > 0
        assert row["ms"] > 0 and row["cpu_ms"] > 0
    # the first of both, in fresh processes
    assert rows["users"]["peak_mib"] == max(rows["users"]["peak_mib_by_phase"].values()) > 0


def test_the_formulas_of_several_processes_count_the_model_and_its_gradients():
    sizes = traffic.Model(n_items=50, batch_size=20, hidden=8, latent=4)
    weights = sum(p.numel() for p in MultiVAE([4, 8, 50]).parameters())
    assert sizes.item_numbers() + sizes.small_numbers() == weights
    assert sizes.sent("users") == 4 * weights + 16
    assert sizes.sent("items") == 8 * 20 * 8 + 12 * 20
    # weights, gradients, two moments; the buffer
    assert sizes.held("users", 1) == sizes.held("items", 1) == 16 * weights + 4 * 20 * 50
    assert sizes.held("users", 4) == 16 * weights + 20 * 50
    assert sizes.held("items", 2) == 8 * (weights + sizes.small_numbers()) + 2 * 20 * 50
    # three of four quarters, once to be summed and once as sums
    assert traffic.ring_ms(4_000_000, 4, 1e9) == pytest.approx(6.0)


def test_memory_of_several_processes_is_compared_by_what_an_item_adds():
    rows = {}
    for case in (
        scale.Case(cut, size, n_items)
        for cut, size in ((None, 1), ("items", 4))
        for n_items in (10, 2**20 + 10)
    ):
        added = 8 if case.cut is None else 2
        peak = 100 + added * (case.n_items - 10) / 2**20
        rows[case.name()] = {"cut": case.cut, "processes": case.processes, "n_items": case.n_items, "peak_mib": peak, "hidden": 64}  # fmt: skip
    assert scale.compared(rows) == {
        "items/4/10/64": {"peak_of_one": 1.0},
        f"items/4/{2**20 + 10}/64": {
            "peak_of_one": 0.944,
            "bytes_per_item": 2,
            "bytes_per_item_of_one": 0.25,
            "one_over_processes": 0.25,
        },
    }


def test_one_process_is_compared_in_turns_with_groups_of_one(monkeypatch):
    asked = []

    def seconds(clicks, batch_size, grouped, parallel):
        asked.append((grouped, parallel))
        return 2.0 if parallel == "items" else 1.0

    monkeypatch.setattr(one_process, "_fit", seconds)
    found = one_process.measure("toy", rounds=2)
    assert found["ratio"] == {"alone": 1, "alone-again": 1, "group": 1, "users": 1, "items": 2}
    assert sorted(map(str, asked[:5])) == sorted(map(str, asked[5:10])) != asked[:5] != asked[5:10]


def test_the_study_of_likeness_counts_the_pairs_that_are_found():
    # both test users folded in item 0; one held out 1, the other 2 and 3
    pairs = torch.zeros(4, 4, dtype=torch.float64)
    pairs[0, 1], pairs[0, 2], pairs[0, 3] = 1, 1, 1
    nearest = torch.tensor([[1, 3], [0, 2], [0, 3], [0, 1]])
    told = quality_similar._told(nearest, pairs.numpy(), torch.tensor([8.0, 4.0, 2.0, 0.0]))
    assert told == {"found": 2 / 3, "clicks": 34 / 8, "catalogue": 1.0}

    data = Dataset.from_matrix(synthetic_clicks(200, 60, 3000), 40, 0)
    rows = quality_similar.measure(data, 0, epochs=1)
    popular = rows.pop("no cosine: the most popular, whatever i is")
    assert all(row["clicks"] < popular["clicks"] for row in rows.values())
    assert popular["catalogue"] == pytest.approx((quality_similar.K + 1) / data.n_items)
