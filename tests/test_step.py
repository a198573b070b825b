"""The training step: its gradients, its precision, and its replay as a CUDA graph."""

import contextlib
import copy
import math

import pytest
import torch
from helpers import random_clicks
from training import N_ITEMS, assert_equal_weights, learnable, model, weights

import fastvae.adam
from fastvae import Adam, GraphedStep, MultiDAE, MultiVAE, fit
from fastvae._shadows import shadow_of
from fastvae.checkpoint import read_checkpoint
from fastvae.ops.linear_multinomial_nll import _apart
from fastvae.step import backward_of_mean, matmul_precision


def test_gradients_are_those_of_the_mean_over_users(monkeypatch):
    train, seen = random_clicks([3, 5] * 5, N_ITEMS), []
    step = Adam.step

    def record(self):
        seen.append(self.param_groups[0]["params"][-1].grad.clone())
        step(self)

    monkeypatch.setattr(Adam, "step", record)
    net = MultiDAE([4, N_ITEMS], dropout_enc=[0.0])
    loss = net.loss(train)
    loss.backward()
    expected = net.decode.output.bias.grad.clone()
    net.zero_grad()
    fit(net, train, epochs=1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3)], ids=["float", "tensor"])
def test_backward_of_the_mean_without_the_mean(make, beta):
    net, train, gradients = make([4, N_ITEMS]), random_clicks([3, 5, 0] * 5, N_ITEMS), []
    for backward in (
        lambda nll, kld: (nll + beta * kld).mean().backward(),
        lambda nll, kld: backward_of_mean(nll, kld, beta, list(net.parameters())),
    ):
        net.zero_grad()
        torch.manual_seed(0)
        backward(*net.loss_terms(train))
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_backward_leaves_gradients_as_they_come():
    wide = torch.ones(5, 8)

    class Apart(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum(1)

        @staticmethod
        def backward(ctx, dy):
            return wide[:, :4]

    weight, frozen = (torch.nn.Parameter(torch.zeros(5, 4)) for _ in range(2))
    frozen.grad = torch.ones(5, 4)
    backward_of_mean(Apart.apply(weight), torch.zeros(5), 0.1, [weight, frozen])
    assert weight.grad.data_ptr() == wide.data_ptr() and frozen.grad is None


def with_parametrization(net):
    torch.nn.utils.parametrizations.weight_norm(net.encode.q_layers.linear_0)


def with_a_row_major_first(net):
    layer = net.encode.q_layers.linear_0
    layer.weight = torch.nn.Parameter(layer.weight.detach().contiguous())


def with_an_item_minor_last(net):
    layer = net.decode.output
    layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, Adam])
@pytest.mark.parametrize(
    "change",
    [lambda net: None, with_parametrization, with_a_row_major_first, with_an_item_minor_last],
)
def test_gradients_of_another_order_than_their_weights_are_taken_right(make, change):
    """torch's fused optimisers read weight and gradient one number after the other, whatever their strides."""
    clicks, finals = random_clicks([3, 9, 1], N_ITEMS), []
    for way in ("step", "loop"):
        net = model().eval()
        change(net)
        if way == "step":
            fused = {} if make is Adam else {"fused": True}
            step = GraphedStep(net, make(net.parameters(), lr=0.1, **fused))
            for _ in range(3):
                step(clicks, 0.2)
        else:
            make_plain = torch.optim.Adam if make is Adam else make
            optimizer = make_plain(net.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                net.loss(clicks, 0.2).backward()
                optimizer.step()
        finals.append(weights(net))
    for key, value in finals[1].items():
        torch.testing.assert_close(finals[0][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_runs_in_the_precision_asked_for(monkeypatch, precision):
    terms, seen = MultiVAE.loss_terms, []

    def record(self, *arguments):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", record)
    torch.set_float32_matmul_precision("high")
    try:
        fit(model(), random_clicks([3] * 5, N_ITEMS), epochs=1, precision=precision)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [(precision == "bf16", "highest")]


@pytest.mark.parametrize("make", [Adam, torch.optim.Adam])
def test_gradients_come_as_the_product_leaves_them_where_the_optimiser_takes_them_so(
    monkeypatch, make
):
    terms, seen = MultiVAE.loss_terms, []

    def record(self, *arguments):
        seen.append(_apart.get())
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", record)
    net = model()
    GraphedStep(net, make(net.parameters()))(random_clicks([3] * 5, N_ITEMS))
    assert seen == [make is Adam] and not _apart.get()


class Graphs:
    """What stands in for CUDA graphs on a CPU: a capture runs nothing, a replay takes the step as it was recorded."""

    def __init__(self, monkeypatch):
        self.events = []  # "eager", "capture", "replay"
        self.error = None  # what a capture fails with
        self.replaying = False
        compute = GraphedStep._compute

        def counted(step, clicks):
            self.events.append("replay" if self.replaying else "eager")
            return compute(step, clicks)

        monkeypatch.setattr(GraphedStep, "_compute", counted)
        monkeypatch.setattr("fastvae.cuda_graph.can_capture", lambda device: True)
        monkeypatch.setattr("fastvae.cuda_graph.capture", self.capture)

    def capture(self, run, device):
        self.events.append("capture")
        if self.error is not None:
            raise self.error

        def replay():
            self.replaying = True
            run()
            self.replaying = False

        return replay


@pytest.fixture
def graphs(monkeypatch):
    return Graphs(monkeypatch)


def eager_twin(net, *arguments, **options):
    """The same training without graphs; the draws of both start at one seed."""
    twin = copy.deepcopy(net)
    fit(twin, *arguments, cuda_graph=False, **options)
    return twin


@pytest.mark.parametrize(
    ("n_users", "batch_size", "epochs", "events"),
    [
        # nine full batches and a tenth of 5 an epoch, the first three of the run eager
        pytest.param(
            95, 10, 2,
            ["eager"] * 3 + ["capture"] + ["replay"] * 6 + ["eager"] + ["replay"] * 9 + ["eager"],
            id="many-batches",
        ),
        pytest.param(20, 10, 3, ["eager"] * 3 + ["capture"] + ["replay"] * 3, id="two-an-epoch"),
        pytest.param(
            25, 10, 2, ["eager"] * 4 + ["capture", "replay", "eager"], id="two-and-a-part-an-epoch"
        ),
        pytest.param(10, 10, 5, ["eager"] * 3 + ["capture"] + ["replay"] * 2, id="one-an-epoch"),
        pytest.param(7, 10, 5, ["eager"] * 3 + ["capture"] + ["replay"] * 2, id="less-than-one"),
        pytest.param(
            15, 10, 4, ["eager"] * 6 + ["capture", "replay", "eager"], id="one-and-a-part-an-epoch"
        ),
        pytest.param(30, 10, 1, ["eager"] * 3, id="over-before-a-capture"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_graphs_come_by_themselves_and_equal_eager_steps(
    graphs, make, n_users, batch_size, epochs, events
):
    train, net = random_clicks([5] * n_users, N_ITEMS), model(make=make)
    options = {"epochs": epochs, "batch_size": batch_size, "total_anneal_steps": 10}
    eager = eager_twin(net, train, **options)
    graphs.events.clear()
    fit(net, train, **options)
    assert graphs.events == events
    assert_equal_weights(weights(eager), weights(net))


def test_a_run_with_graphs_is_resumed_bit_for_bit(graphs, tmp_path):
    train, validation = learnable()
    options = {"batch_size": 15, "lr": 1e-2, "total_anneal_steps": 50}
    straight, fresh = model(), model(seed=9)
    one = fit(straight, train, validation, epochs=4, run_dir=tmp_path / "a", **options)
    fit(model(), train, validation, epochs=2, run_dir=tmp_path / "b", **options)
    two = fit(fresh, train, validation, epochs=4, run_dir=tmp_path / "b", resume=True, **options)
    assert graphs.events.count("capture") == 3 and graphs.events.count("replay") > 20
    assert_equal_weights(weights(straight), weights(fresh))
    assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    # what a graph needs of the optimiser is not in the file, which any machine may resume
    for run in "ab":
        groups = read_checkpoint(tmp_path / run / "last.pt")["optimizer"]["param_groups"]
        assert [group["capturable"] for group in groups] == [False]


def test_a_capture_that_fails_warns_once_and_leaves_no_gradient(graphs, monkeypatch):
    train, failed = random_clicks([5] * 95, N_ITEMS), model()
    eager = eager_twin(failed, train, epochs=2, batch_size=10)

    def fail(run, device):
        for p in failed.parameters():
            # memory that no kernel has filled
            p.grad = torch.full_like(p, math.nan)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("fastvae.cuda_graph.capture", fail)
    with pytest.warns(
        UserWarning, match=r"eager steps go on \(operation .* capturing\)$"
    ) as warned:
        fit(failed, train, epochs=2, batch_size=10)
    assert len(warned) == 1
    assert_equal_weights(weights(eager), weights(failed))


def test_without_memory_for_a_step_beside_the_graph_eager_steps_go_on(graphs, monkeypatch):
    train, net = random_clicks([5] * 95, N_ITEMS), model()
    eager = eager_twin(net, train, epochs=2, batch_size=10)
    graphs.events.clear()
    terms, failed = MultiVAE.loss_terms, []

    def too_large(self, clicks, *arguments):
        out = terms(self, clicks, *arguments)
        if len(clicks) == 5 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    monkeypatch.setattr(MultiVAE, "loss_terms", too_large)
    with pytest.warns(UserWarning, match=r"eager steps go on \(its memory is needed\)"):
        fit(net, train, epochs=2, batch_size=10)
    # the step that failed is taken anew with the draws that it had
    assert graphs.events == ["eager"] * 3 + ["capture"] + ["replay"] * 6 + ["eager"] * 12
    assert_equal_weights(weights(eager), weights(net))


def test_without_memory_for_an_eager_step_the_error_is_torchs(monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MultiVAE, "loss_terms", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        fit(model(), random_clicks([5] * 5, N_ITEMS), epochs=1)


@pytest.mark.parametrize("cuda_graph", [None, False])
def test_without_a_gpu_or_by_wish_there_is_no_graph(monkeypatch, cuda_graph):
    if cuda_graph is False:
        monkeypatch.setattr("fastvae.cuda_graph.can_capture", lambda device: True)
    monkeypatch.setattr("fastvae.cuda_graph.capture", None)
    fit(model(), random_clicks([5] * 50, N_ITEMS), epochs=1, batch_size=5, cuda_graph=cuda_graph)


def test_the_precision_of_products_comes_back_after_the_last_block_of_all_threads():
    torch.set_float32_matmul_precision("medium")
    try:
        one, two = contextlib.ExitStack(), contextlib.ExitStack()
        one.enter_context(matmul_precision("fp32"))
        two.enter_context(matmul_precision("bf16"))
        # the first one ends while the second one still computes
        one.close()
        assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(ValueError) as caught, matmul_precision("tf32"):
            pass
        assert str(caught.value) == (
            "fit: precision must be the same kind of fp32 product in all threads, got high beside highest"
        )
        two.close()
        assert torch.get_float32_matmul_precision() == "medium"
        with matmul_precision("tf32"):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# loops of one's own


def loop(step, batches, seed=0):
    """The loss of each batch."""
    torch.manual_seed(seed)
    losses = []
    for clicks, beta in batches:
        nll, kld = step(clicks, beta).tolist()
        losses.append((nll + float(beta) * kld) / len(clicks))
    return losses


def adam_of(net, lr=1e-2, **options):
    return torch.optim.Adam(net.parameters(), lr=lr, fused=True, **options)


def batches_of(clicks, n, size=4, beta=0.2):
    """n batches in another order each."""
    ids = torch.Generator().manual_seed(1)
    return [(clicks.rows(torch.randperm(len(clicks), generator=ids)[:size]), beta) for _ in range(n)]  # fmt: skip


@pytest.mark.parametrize("per_click", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["unclipped", "clipped"])
def test_a_step_is_torchs_usual_loop(graphs, per_click, max_norm):
    clicks, ours = random_clicks([3, 0, 9, 5, 1, 7, 2], N_ITEMS, counts=True), model()
    theirs = copy.deepcopy(ours)
    batches = batches_of(clicks, 8)
    step = GraphedStep(ours, adam_of(ours), per_click=per_click, max_norm=max_norm)
    losses = loop(step, batches)
    adam, norms = adam_of(theirs), []

    def usual(batch, beta):
        nll, kld = theirs.loss_terms(batch, per_click)
        loss = (nll + beta * kld).mean()
        adam.zero_grad()
        loss.backward()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
        adam.step()
        return torch.stack((nll, kld)).detach().sum(1)

    assert losses == pytest.approx(loop(usual, batches), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert graphs.events == ["eager"] * 3 + ["capture"] + ["replay"] * 5
    assert all(norm > max_norm for norm in norms), "something was clipped"


def test_sums_are_the_terms_of_all_steps(graphs):
    clicks, net = random_clicks([3, 0, 9, 5, 1, 7, 2], N_ITEMS), model().eval()
    step = GraphedStep(net, torch.optim.SGD(net.parameters(), lr=0.0))
    batches = batches_of(clicks, 6)
    losses = loop(step, batches)
    terms = [net.loss_terms(batch) for batch, _ in batches]
    expected = [sum(term[n].sum().item() for term in terms) for n in (0, 1)]
    assert step.sums.tolist() == pytest.approx(expected)
    assert sum(losses) * 4 == pytest.approx(expected[0] + 0.2 * expected[1])
    step.sums.zero_()
    assert step(*batches[0]).tolist() == step.sums.tolist()
    assert "replay" in graphs.events


def test_a_whole_matrix_and_a_beta_on_the_device_are_replayed_too(graphs):
    clicks, net = random_clicks([3, 0, 9, 5], N_ITEMS), model()
    twin = copy.deepcopy(net)
    step, eager = GraphedStep(net, adam_of(net)), GraphedStep(twin, adam_of(twin), cuda_graph=False)
    batches = [(clicks, 0.1 * n) for n in range(6)]
    losses = loop(step, [(batch, torch.tensor(beta)) for batch, beta in batches])
    assert losses == pytest.approx(loop(eager, batches), rel=1e-7)
    assert_equal_weights(weights(net), weights(twin))
    assert graphs.events.count("replay") == 3


def frozen_changes():
    """What changes in the middle of a loop, each with what it does to step and its matrix."""

    def set_group(name, value):
        return lambda step, clicks: step.optimizer.param_groups[0].update({name: value}) or clicks

    def freeze(step, clicks):
        step.model.encode.q_layers.layer(0).weight.requires_grad_(False)
        return clicks

    def evaluate_only(step, clicks):
        step.model.eval()
        return clicks

    def other_dropout(step, clicks):
        step.model.encode.q_layers.dropout[0] = 0.1
        return clicks

    def move(step, clicks):
        for p in step.model.parameters():
            p.data = p.data.clone()
        return clicks

    def roll_back(step, clicks):
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        return clicks

    def other_matrix(step, clicks):
        return random_clicks([4] * len(clicks), N_ITEMS, seed=7)

    def other_values(step, clicks):
        return clicks.binary()

    def deterministic(step, clicks):
        torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
        return clicks

    return {
        "lr": set_group("lr", 0.5),
        "lr-becomes-a-tensor": set_group("lr", torch.tensor(0.5)),
        "betas": set_group("betas", (0.5, 0.5)),
        "weight-decay": set_group("weight_decay", 0.1),
        "a-frozen-weight": freeze,
        "eval": evaluate_only,
        "dropout": other_dropout,
        "moved-weights": move,
        "loaded-optimizer": roll_back,
        "another-matrix": other_matrix,
        "other-values": other_values,
        "deterministic-algorithms": deterministic,
    }


@pytest.mark.parametrize("change", frozen_changes())
def test_what_a_graph_has_frozen_leads_to_a_new_one(graphs, change):
    finals = []
    for cuda_graph in (False, None):
        net = model()
        step = GraphedStep(net, adam_of(net), cuda_graph=cuda_graph)
        clicks = random_clicks([3, 1, 9, 5, 1, 7, 2], N_ITEMS, counts=True)
        loop(step, batches_of(clicks, 5))
        clicks = frozen_changes()[change](step, clicks)
        before = len(graphs.events)
        loop(step, batches_of(clicks, 5), seed=1)
        finals.append(weights(net))
    assert graphs.events[before:] == ["eager"] * 3 + ["capture"] + ["replay"] * 2
    assert_equal_weights(*finals)


def test_a_schedule_fills_a_learning_rate_on_the_device_without_a_new_graph(graphs):
    # the graph reads the tensor: what it holds when it is replayed counts
    clicks, finals = random_clicks([3, 1, 9, 5, 1, 7, 2], N_ITEMS), []
    for cuda_graph in (False, None):
        graphs.events.clear()
        net = model()
        adam = adam_of(net, lr=torch.tensor(1e-2))
        schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)
        step = GraphedStep(net, adam, cuda_graph=cuda_graph)
        for batch in batches_of(clicks, 8):
            step(*batch)
            schedule.step()
        finals.append(adam.param_groups[0]["lr"].item())
    assert finals == [pytest.approx(1e-2 * 0.5**8)] * 2
    assert graphs.events == ["eager"] * 3 + ["capture"] + ["replay"] * 5


def test_a_float_learning_rate_that_never_rests_stays_eager(graphs):
    clicks, net = random_clicks([3, 1, 9, 5], N_ITEMS), model()
    adam = adam_of(net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.9)
    step = GraphedStep(net, adam)
    for batch in batches_of(clicks, 8):
        step(*batch)
        schedule.step()
    assert graphs.events == ["eager"] * 8


def test_gradients_from_before_do_not_count():
    finals, clicks = [], random_clicks([5] * 20, N_ITEMS)
    for stale in (False, True):
        net = model()
        frozen = net.decode.output.bias.requires_grad_(False)
        before = frozen.clone()
        if stale:
            for p in net.parameters():
                p.grad = torch.ones_like(p)
        step = GraphedStep(net, adam_of(net))
        loop(step, batches_of(clicks, 2))
        finals.append(weights(net))
        assert torch.equal(frozen, before)
        assert all(p.grad is None for p in net.parameters())
    assert_equal_weights(*finals)


def test_a_replay_reads_no_shadow_of_weights_that_were_loaded_since(graphs, monkeypatch):
    net, clicks, seen = MultiDAE([4, N_ITEMS]), random_clicks([5] * 3, N_ITEMS), []
    weight = net.decode.output.weight
    step = GraphedStep(net, Adam(net.parameters(), shadow=True))
    # the kernel's way through Adam, which the interpreter takes
    monkeypatch.setattr(fastvae.adam, "uses_kernels", lambda t: True)
    loop(step, [(clicks, 0.1)] * 4)
    assert graphs.events[-1] == "replay" and shadow_of(weight) is not None
    net.load_state_dict({k: torch.full_like(v, 3.0) for k, v in net.state_dict().items()})
    assert shadow_of(weight) is None
    terms = MultiDAE.loss_terms

    def looking(self, *arguments):
        seen.append(shadow_of(weight)[:N_ITEMS].float())
        return terms(self, *arguments)

    monkeypatch.setattr(MultiDAE, "loss_terms", looking)
    step(clicks, 0.1)
    assert torch.equal(seen[0], torch.full_like(weight, 3.0))


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    net, clicks = model(), random_clicks([3, 1], N_ITEMS)
    net.decode.output.bias.data[0] = math.nan
    before = weights(net)
    with pytest.raises(RuntimeError) as caught:
        GraphedStep(net, adam_of(net))(clicks)
    assert str(caught.value) == "GraphedStep: loss must be finite, got nan; lower the learning rate"
    for key, value in weights(net).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def inference_model():
    with torch.inference_mode():
        return model()


def meta_model():
    with torch.device("meta"):
        return model()


def half_model():
    net = model()
    net.decode.output.half()
    return net


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "GraphedStep: model must be a MultiVAE or MultiDAE, got Linear; pass the model itself where that wraps one"),
        ({"model": half_model()}, ValueError, "GraphedStep: model must be float32, got float16; call model.float(): precision='bf16' computes in bf16 all the same"),
        ({"model": meta_model()}, ValueError, "GraphedStep: model must have weights in memory, got the device meta; make it outside of torch.device('meta')"),
        ({"model": model().requires_grad_(False)}, ValueError, "GraphedStep: model must have a weight that requires grad, got none"),
        ({"model": inference_model()}, ValueError, "GraphedStep: model must be made outside of torch.inference_mode, got weights that cannot be trained"),
        ({"optimizer": None}, TypeError, "GraphedStep: optimizer must be a torch optimizer, got NoneType"),
        ({"max_norm": 0}, ValueError, "GraphedStep: max_norm must be a finite number above 0, got 0"),
        ({"max_norm": "1"}, TypeError, "GraphedStep: max_norm must be a number, got '1'"),
        ({"per_click": "clicks"}, TypeError, "GraphedStep: per_click must be True or False, got 'clicks'"),
        ({"precision": "fp64"}, ValueError, "GraphedStep: precision must be one of fp32, bf16, got 'fp64'"),
        ({"cuda_graph": True}, ValueError, "GraphedStep: cuda_graph must be None or False where the model is not on a GPU, got True"),
        ({"cuda_graph": 1}, TypeError, "GraphedStep: cuda_graph must be True or False, got 1"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(change, error, message):
    net = model()
    with pytest.raises(error) as caught:
        GraphedStep(**({"model": net, "optimizer": adam_of(net)} | change))
    assert (type(caught.value), str(caught.value)) == (error, message)


def test_a_call_that_does_not_fit_is_named():
    net, clicks = model(), random_clicks([3], 5)
    step = GraphedStep(net, adam_of(net))
    with pytest.raises(ValueError) as caught:
        step(clicks)
    assert str(caught.value) == "GraphedStep: clicks must have the model's 40 items, got 5"
    with pytest.raises(ValueError, match="GraphedStep: gradients must be enabled"), torch.no_grad():
        step(random_clicks([3], N_ITEMS))


def test_an_optimizer_that_cannot_be_captured_is_refused_before_it_trains(graphs):
    net = model()
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(ValueError) as caught:
        GraphedStep(net, adam)
    assert str(caught.value) == (
        "GraphedStep: optimizer must be made with fused=True or capturable=True for a CUDA graph, got neither; "
        "or pass cuda_graph=False"
    )
    GraphedStep(net, adam, cuda_graph=False)
    GraphedStep(net, torch.optim.SGD(net.parameters(), lr=0.1))  # it has no such option
