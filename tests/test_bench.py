"""What the benchmarks compute around their timings: a wrong ratio would be believed."""

import pytest
import torch

from bench import peers, profile, ratio, report
from bench.provider import NotTimed
from bench.steps import PROVIDERS, Shape, check, new_model

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
