"""fit(): who is seen when, annealing, early stopping, what is refused, what stops it."""

import copy
import itertools
import math
import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import Labelled, random_clicks, run_child
from training import N_ITEMS, assert_equal_weights, forced_metrics, learnable, model, weights

from fastvae import Adam, Clicks, MultiDAE, MultiVAE, evaluate, fit, reference
from fastvae.checkpoint import load_model
from fastvae.train import beta_at, epoch_order


@pytest.mark.parametrize(
    ("update", "cap", "total", "beta"),
    [
        pytest.param(0, 0.2, 200_000, 0.0, id="starts-at-zero"),
        pytest.param(20_000, 0.2, 200_000, 0.1, id="half-way"),
        pytest.param(40_000, 0.2, 200_000, 0.2, id="the-papers-code"),
        pytest.param(10**9, 0.2, 200_000, 0.2, id="capped"),
        pytest.param(0, 0.2, 0, 0.2, id="no-annealing-is-constant"),
        pytest.param(0, 0.0, 0, 0.0, id="constant-zero"),
    ],
)
def test_beta(update, cap, total, beta):
    assert beta_at(update, cap, total) == beta


@pytest.mark.parametrize(
    ("n_users", "batch_size", "sizes"),
    [
        pytest.param(99, 100, [99], id="fewer-users-than-a-batch"),
        pytest.param(101, 50, [50, 50, 1], id="last-batch-of-one"),
        pytest.param(100, 50, [50, 50], id="exact"),
    ],
)
def test_every_user_once_an_epoch_in_another_order(n_users, batch_size, sizes, monkeypatch):
    seen = []
    rows = Clicks.rows
    monkeypatch.setattr(
        Clicks, "rows", lambda self, ids: seen.append(ids.tolist()) or rows(self, ids)
    )
    result = fit(model(), random_clicks([3] * n_users, N_ITEMS), epochs=2, batch_size=batch_size)
    assert [len(ids) for ids in seen] == sizes * 2
    one, two = (list(itertools.chain(*half)) for half in (seen[: len(sizes)], seen[len(sizes) :]))
    assert sorted(one) == sorted(two) == list(range(n_users)) and one != two
    assert result.history[-1]["update"] == 2 * len(sizes)
    assert math.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(make, precision):
    train, validation = learnable()
    net = model(make=make)
    before = evaluate(net, *validation)["ndcg@100"]
    result = fit(net, train, validation, epochs=30, batch_size=20, lr=1e-2, precision=precision)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.9 * losses[0]
    assert result.best_metric > before + 0.1
    assert evaluate(net, *validation)["ndcg@100"] == result.best_metric
    assert (result.history[-1]["kld"] > 0) == (make is MultiVAE)
    assert next(net.parameters()).dtype == torch.float32


def test_same_seed_same_weights_whatever_was_drawn_before():
    train, validation = learnable()
    nets = [model(), model(), model()]
    for net, seed, draws in zip(nets, (3, 3, 4), (0, 7, 0), strict=True):
        torch.rand(draws)
        state = torch.get_rng_state()
        fit(net, train, validation, epochs=2, batch_size=30, seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "fit leaves the caller's generator alone"
    assert_equal_weights(weights(nets[0]), weights(nets[1]))
    assert not torch.equal(*(net.decode.output.weight for net in nets[1:]))


@pytest.mark.parametrize("in_folder", [False, True])
def test_early_stopping_returns_the_best_weights(monkeypatch, tmp_path, in_folder):
    seen = forced_metrics(monkeypatch, [0.1, 0.5, 0.4, 0.3])
    train, validation = learnable()
    net = model()
    run_dir = tmp_path / "run" if in_folder else None
    result = fit(net, train, validation, epochs=50, patience=2, run_dir=run_dir)
    assert (result.best_epoch, result.best_metric, len(result.history)) == (2, 0.5, 4)
    assert_equal_weights(weights(net), seen[1])


def test_a_metric_of_zero_still_saves_the_first_epoch(monkeypatch, tmp_path):
    seen = forced_metrics(monkeypatch, [0.0, 0.0])
    train, validation = learnable()
    result = fit(model(), train, validation, epochs=2, run_dir=tmp_path / "run")
    assert result.best_epoch == 1
    best, _ = load_model(tmp_path / "run" / "best.pt")
    assert_equal_weights(weights(best), seen[0])


def test_an_interrupted_epoch_goes_on_where_it_stopped(tmp_path, monkeypatch):
    train, validation = learnable()
    options = {"batch_size": 10, "epochs": 3, "total_anneal_steps": 50}
    straight, stopped = model(), model()
    one = fit(straight, train, validation, run_dir=tmp_path / "a", **options)
    terms, calls = MultiVAE.loss_terms, []

    def interrupting(self, *arguments):
        calls.append(1)
        if len(calls) == 14:  # the fourth batch of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", interrupting)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(stopped, train, validation, run_dir=tmp_path / "b", **options)
    assert str(caught.value) == (
        f"stopped after 1 epochs and 4 batches; saved in {tmp_path / 'b' / 'last.pt'}, resume to go on"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fresh = model(seed=9)
    two = fit(fresh, train, validation, run_dir=tmp_path / "b", resume=True, **options)
    assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    assert_equal_weights(weights(straight), weights(fresh))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_a_step_and_an_evaluation_on_319205_items_take_less_than_2_gib():
    # dense, the matrix alone would take 75.6 GiB
    done = run_child("many_items.py")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2, "GiB"


def test_the_reported_kld_is_not_annealed():
    train, _ = learnable()
    row = fit(model(), train, epochs=1, anneal_cap=0.0).history[0]
    assert row["kld"] > 0 and row["beta"] == 0 and row["loss"] == row["nll"]


def test_a_loss_that_is_not_finite_stops_with_its_place(tmp_path):
    train, validation = learnable()
    net, run = model(), tmp_path / "run"
    fit(net, train, validation, epochs=1, batch_size=40, run_dir=run)
    state = torch.load(run / "last.pt", weights_only=True)
    state["model"]["encode.q_layers.linear_1.bias"][8:] = 200.0  # exp(logvar) overflows
    torch.save(state, run / "last.pt")
    with pytest.raises(RuntimeError) as caught:
        fit(net, train, validation, epochs=2, batch_size=40, run_dir=run, resume=True)
    assert str(caught.value) == (
        "fit: loss must be finite, got nan at update 3 (epoch 2, batch 1); lower lr; "
        f"the last good checkpoint is {run / 'last.pt'}"
    )
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": np.ones((3, 3))}, TypeError, "fit: train must be Clicks, got ndarray; pass Clicks.from_matrix(x)"),
        ({"train": random_clicks([2], 5)}, ValueError, "fit: train must have the model's 40 items, got 5"),
        ({"train": random_clicks([], N_ITEMS)}, ValueError, "fit: train must have at least one user, got 0"),
        ({"validation": (random_clicks([2], 5), random_clicks([2], 5))}, ValueError, "fit: fold_in must have the model's 40 items, got 5"),
        ({"validation": (random_clicks([2], N_ITEMS), random_clicks([0], N_ITEMS))}, ValueError, "fit: validation must have a user with fold-in and held-out clicks, got none; pass None to train without"),
        ({"epochs": -1}, ValueError, "fit: epochs must be at least 0, got -1"),
        ({"batch_size": 0}, ValueError, "fit: batch_size must be at least 1, got 0"),
        ({"lr": 0}, ValueError, "fit: lr must be a finite number above 0, got 0"),
        ({"lr": "fast"}, TypeError, "fit: lr must be a number, got 'fast'"),
        ({"total_anneal_steps": 0.5}, TypeError, "fit: total_anneal_steps must be a whole number, got 0.5"),
        ({"items": ["a", "a", *"bcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"]}, ValueError, "fit: items must be distinct, got 'a' twice"),
        ({"validation": (random_clicks([2], N_ITEMS), random_clicks([2, 2], N_ITEMS))}, ValueError, "fit: held_out must have the 1 users of fold_in, got 2"),
        ({"items": {str(n): n for n in range(N_ITEMS)}}, TypeError, "fit: items must be ids in their order, got dict; pass a list"),
        ({"model": model().requires_grad_(False)}, ValueError, "fit: model must have a weight that requires grad, got none"),
        ({"lr": float("nan")}, ValueError, "fit: lr must be a finite number above 0, got nan"),
        ({"anneal_cap": float("inf")}, ValueError, "fit: anneal_cap must be a finite number of at least 0, got inf"),
        ({"patience": 3}, ValueError, "fit: patience must be None or 0 without validation, got 3"),
        ({"cuda_graph": True}, ValueError, "fit: cuda_graph must be None or False where the model is not on a GPU, got True"),
        ({"model": torch.nn.Linear(N_ITEMS, 2)}, TypeError, "fit: model must be a MultiVAE or MultiDAE, got Linear; pass the model itself where that wraps one"),
        ({"model": torch.compile(model())}, TypeError, "fit: model must be a MultiVAE or MultiDAE, got OptimizedModule; pass the model itself where that wraps one"),
        ({"validation": torch.ones(2, N_ITEMS)}, TypeError, "fit: validation must be two Clicks (fold_in, held_out), got Tensor"),
        ({"validation": (random_clicks([2], N_ITEMS),)}, TypeError, "fit: validation must be two Clicks (fold_in, held_out), got tuple of 1"),
        ({"validation": (torch.ones(1, N_ITEMS), torch.ones(1, N_ITEMS))}, TypeError, "fit: fold_in must be Clicks, got Tensor; pass Clicks.from_matrix(x)"),
        ({"patience": -1, "validation": learnable()[1]}, ValueError, "fit: patience must be at least 0, got -1"),
        ({"preset": "fast"}, ValueError, "fit: preset must be one of auto, paper, got 'fast'"),
        ({"lr_schedule": "linear"}, ValueError, "fit: lr_schedule must be one of constant, cosine, plateau, got 'linear'"),
        ({"lr_schedule": "plateau"}, ValueError, "fit: lr_schedule must be constant or cosine without validation, got plateau"),
        (
            {"lr_schedule": "plateau", "patience": 3, "validation": learnable()[1]}, ValueError,
            "fit: patience must be 0 or above 3 where lr_schedule is plateau, which waits as long before it lowers lr, got 3",
        ),
        ({"weight_decay": -0.1}, ValueError, "fit: weight_decay must be a finite number of at least 0, got -0.1"),
        ({"clip_grad_norm": 0}, ValueError, "fit: clip_grad_norm must be a finite number above 0, got 0"),
        ({"precision": "fp16"}, ValueError, "fit: precision must be one of fp32, bf16, got 'fp16'"),
        ({"normalize": "user"}, ValueError, "fit: normalize must be one of none, clicks, got 'user'"),
        ({"per_click": 1}, TypeError, "fit: per_click must be True or False, got 1"),
        ({"resume": "no"}, TypeError, "fit: resume must be True or False, got 'no'"),
        ({"precision": torch.bfloat16}, TypeError, "fit: precision must be one of fp32, bf16, got torch.bfloat16"),
        ({"batch_size": 2**31}, ValueError, "fit: batch_size must lie below 2**31, got 2147483648"),
        ({"epochs": 10**5000}, ValueError, "fit: epochs must lie below 2**31, got a whole number of more than 40 digits"),
        ({"lr": 10**400}, ValueError, "fit: lr must be a finite number above 0, got a whole number of more than 40 digits"),
        ({"seed": True}, TypeError, "fit: seed must be a whole number, got True"),
        ({"items": ["a"]}, ValueError, "fit: items must hold 40 ids, got 1"),
        ({"resume": True}, ValueError, "fit: run_dir must be given to resume, got None"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(change, error, message):
    with pytest.raises(error) as caught:
        fit(**({"model": model(), "train": learnable()[0]} | change))
    assert str(caught.value) == message


def test_ids_are_kept_by_their_position_whatever_holds_them(tmp_path):
    names = [f"item {n}" for n in range(N_ITEMS)]
    fit(model(), learnable()[0], epochs=1, items=Labelled(names), run_dir=tmp_path)
    assert load_model(tmp_path / "best.pt")[1] == names


def test_held_out_clicks_of_the_fold_in_are_left_out_once(tmp_path):
    train, (fold_in, held_out) = learnable()
    both = Clicks.from_matrix(fold_in.to_scipy() + held_out.to_scipy())
    with pytest.warns(UserWarning) as caught:
        result = fit(model(), train, (fold_in, both), epochs=2)
    overlap = [w for w in caught if "held_out" in str(w.message)]
    assert [str(w.message) for w in overlap] == [
        f"fit: held_out must hold no clicks of fold_in, got {fold_in.nnz} of {both.nnz} that it holds; "
        "they are left out, for the items of fold_in are not ranked"
    ]
    assert overlap[0].filename == __file__
    clean = fit(model(), train, (fold_in, held_out), epochs=2)
    assert [row["ndcg@100"] for row in result.history] == [row["ndcg@100"] for row in clean.history]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="validation must have a user"):
        fit(model(), train, (fold_in, fold_in), epochs=1)


def dense_fit(model, train, epochs, batch_size, seed, per_click, total_anneal_steps):
    """fit's batches, dropout masks, noise and beta with the dense reference model, divided by clicks or not."""
    dense = reference.MultiVAE(model.p_dims)
    dense.load_state_dict(model.state_dict())
    optimizer, update = torch.optim.Adam(dense.parameters(), lr=1e-3), 0
    for epoch in range(epochs):
        order, draw_seed = epoch_order(train.n_users, seed, epoch)
        torch.manual_seed(draw_seed)
        for ids in order.split(batch_size):
            clicks = train.rows(ids)
            keep = reference.dense_keep(clicks, torch.randint(2**63 - 1, (1,)), 0.5)
            noise = torch.randn(len(ids), model.p_dims[0])
            x = clicks.to_dense()
            logits, mu, logvar = dense(x, keep, noise)
            nll = -(torch.log_softmax(logits, 1) * x).sum(1)
            loss = nll + min(0.2, update / total_anneal_steps) * reference.kld(mu, logvar)
            if per_click:
                loss = loss / x.sum(1)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            update += 1
    return dense


@pytest.mark.parametrize("per_click", [False, True])
def test_fit_is_the_dense_loop_on_the_same_draws_from_a_model_in_eval_mode(per_click):
    train = random_clicks([3, 9, 5, 7, 4, 6, 8] * 6, N_ITEMS, counts=True)
    net = model().eval()  # as load_model gives it
    options = {"epochs": 2, "batch_size": 10, "seed": 3, "total_anneal_steps": 100}
    dense = dense_fit(net, train, per_click=per_click, **options)
    result = fit(net, train, per_click=per_click, **options)
    for (name, actual), expected in zip(
        net.named_parameters(), dense.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert [row["beta"] for row in result.history] == [4 / 100, 9 / 100]


def test_an_interrupt_never_saves_weights_that_are_not_finite(tmp_path, monkeypatch):
    train, _ = learnable()
    run, step = tmp_path / "run", Adam.step
    fit(model(), train, epochs=1, batch_size=20, run_dir=run)
    before = (run / "last.pt").read_bytes()

    def spoil(self):
        step(self)
        self.param_groups[0]["params"][-1].data[0] = math.inf
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Adam, "step", spoil)
    with pytest.raises(RuntimeError, match="weights must be finite"):
        fit(model(), train, epochs=2, batch_size=20, run_dir=run, resume=True)
    assert (run / "last.pt").read_bytes() == before


def test_a_second_interrupt_reaches_the_handler_of_before(monkeypatch):
    terms, before = MultiVAE.loss_terms, signal.getsignal(signal.SIGINT)
    handlers = []

    def interrupting(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", interrupting)
    with pytest.raises(KeyboardInterrupt):
        fit(model(), random_clicks([5] * 30, N_ITEMS), epochs=1, batch_size=10)
    assert handlers == [before]


def test_the_users_per_second_of_a_resumed_epoch_count_its_rest(tmp_path, monkeypatch):
    import fastvae.trainer

    train, _ = learnable()
    options = {"epochs": 1, "batch_size": 25, "run_dir": tmp_path / "run"}
    terms = MultiVAE.loss_terms

    def interrupting(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return terms(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MultiVAE, "loss_terms", interrupting)
        fit(model(), train, **options)
    clock = itertools.count(0, 3)  # three seconds between two questions
    monkeypatch.setattr(fastvae.trainer.time, "perf_counter", lambda: next(clock))
    result = fit(model(), train, resume=True, **options)
    assert result.history[0]["users_per_second"] == 25.0


def test_a_loss_of_nan_in_the_first_epoch_names_no_checkpoint(tmp_path):
    net = model()
    net.decode.output.bias.data[0] = math.nan
    with pytest.raises(RuntimeError) as caught:
        fit(net, learnable()[0], epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value).endswith("(epoch 1, batch 1); lower lr")


def test_scores_that_overflow_after_the_first_epoch_are_blamed_on_the_learning_rate(tmp_path):
    train, validation = learnable()
    options = {"epochs": 2, "batch_size": len(train), "run_dir": tmp_path / "run"}
    with pytest.raises(RuntimeError) as caught:
        fit(MultiVAE([8, 1000, N_ITEMS]), train, validation, lr=3e37, **options)
    assert str(caught.value) == "fit: scores must be finite, got nan or inf after epoch 1; lower lr"


def test_all_defaults_on_twenty_users():
    net = model()
    result = fit(net, random_clicks([5] * 20, N_ITEMS))
    assert result.best_epoch == len(result.history) == 100  # nothing to stop it


def test_a_background_job_goes_on_ignoring_ctrl_c(monkeypatch):
    terms = MultiVAE.loss_terms

    def interrupting(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", interrupting)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = fit(model(), random_clicks([5] * 30, N_ITEMS), epochs=1, batch_size=10)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(result.history) == 1


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: MultiVAE([8, 16, N_ITEMS], dropout_dec=[0.3, 0.1]), id="MultiVAE"),
        pytest.param(lambda: MultiDAE([8, N_ITEMS], dropout_enc=[0.4]), id="MultiDAE"),
        pytest.param(lambda: MultiVAE([8, N_ITEMS], tanh_after_dropout=True), id="quirk"),
    ],
)
def test_trainings_in_two_threads_are_those_of_one_after_the_other(monkeypatch, make):
    train, validation = learnable()
    torch.manual_seed(0)
    start, finals, state = make(), {}, torch.get_rng_state()

    def training(seed):
        net = copy.deepcopy(start)
        fit(net, train, validation, epochs=3, batch_size=20, seed=seed)
        return weights(net)

    alone = {seed: training(seed) for seed in (1, 2)}
    meet, terms = threading.Barrier(2, timeout=60), type(start).loss_terms

    def in_turns(self, *arguments):
        # no thread is a step ahead: each draws between two draws of the other
        meet.wait()
        return terms(self, *arguments)

    monkeypatch.setattr(type(start), "loss_terms", in_turns)
    threads = [
        threading.Thread(target=lambda seed=seed: finals.update({seed: training(seed)}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert_equal_weights(alone[seed], finals[seed])
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"


def test_a_trained_model_draws_from_torchs_own_generator_again():
    net = model()
    fit(net, random_clicks([5] * 20, N_ITEMS), epochs=1)
    net.train()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(net.loss(random_clicks([5], N_ITEMS), 0.2).item())
    assert losses[0] == losses[1]


class NoisyVAE(MultiVAE):
    def loss_terms(self, *arguments):
        nll, kld = super().loss_terms(*arguments)
        return nll * torch.rand(()), kld


def test_what_a_subclass_draws_by_itself_follows_from_the_seed_too():
    finals = []
    for draws in (0, 5):
        torch.manual_seed(0)
        net = NoisyVAE([4, N_ITEMS])
        torch.rand(draws)
        state = torch.get_rng_state()
        fit(net, random_clicks([5] * 20, N_ITEMS), epochs=2, batch_size=10)
        assert torch.equal(torch.get_rng_state(), state)
        finals.append(weights(net))
    assert_equal_weights(*finals)


def test_a_training_without_gradients_is_refused():
    train, _ = learnable()
    for off in (torch.no_grad, torch.inference_mode):
        net = model()
        with pytest.raises(ValueError) as caught, off():
            fit(net, train, epochs=1)
        assert str(caught.value) == (
            "fit: gradients must be enabled, got a call under torch.no_grad or torch.inference_mode"
        )
    with torch.inference_mode():
        net = model()
    with pytest.raises(ValueError, match=r"model must be made outside of torch\.inference_mode"):
        fit(net, train, epochs=1)


def test_clicks_made_without_gradients_are_trained_on():
    with torch.inference_mode():
        train = Clicks.from_pairs([0, 0, 0, 1], [0, 0, 1, 2], n_items=N_ITEMS, counts=True)
        moved = train.to("cpu")
    for clicks in (train, moved):
        assert fit(model(), clicks, epochs=1).best_epoch == 1
