"""What fit() chooses where it is told nothing, that what is given wins, and that a resumed run has its own settings."""

import json

import pytest
from training import assert_equal_weights, learnable, model, weights

from fastvae import fit
from fastvae.defaults import PAPER, make_plan

CHOSEN = ("epochs", "batch_size", "total_anneal_steps", "patience")


def plan(n_users, validated=True, anneal_cap=0.2, preset="auto", **given):
    made = make_plan(
        n_users, validated=validated, anneal_cap=anneal_cap, preset=preset, given=given
    )
    return tuple(getattr(made, name) for name in CHOSEN)


@pytest.mark.parametrize(
    ("n_users", "validated", "chosen"),
    [
        # beta at .2 after a fifth of the updates: as many steps as updates
        pytest.param(1, True, (200, 1, 200, 20), id="one-user"),
        # six batches of 125 or 126: five of 150 would leave two users
        pytest.param(752, True, (200, 126, 1200, 20), id="no-small-last-batch"),
        pytest.param(750, True, (200, 150, 1000, 20), id="ml100k"),
        pytest.param(3_000, True, (200, 500, 1200, 20), id="where-epochs-begin-to-fall"),
        pytest.param(12_000, True, (100, 500, 2400, 10), id="four-times-the-users-half-the-epochs"),
        pytest.param(48_000, True, (50, 500, 4800, 5), id="where-epochs-end-to-fall"),
        pytest.param(10**7, True, (50, 500, 10**6, 5), id="ten-million"),
        pytest.param(12_000, False, (50, 500, 1200, 0), id="nothing-to-stop-it"),
    ],
)
def test_what_is_chosen_follows_from_the_number_of_users(n_users, validated, chosen):
    assert plan(n_users, validated) == chosen


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"epochs": 20}, (20, 202, 1000, 5)),
        ({"epochs": 2}, (2, 20, 1010, 5)),
        ({"epochs": 0}, (0, 20, 0, 5)),
        ({"batch_size": 3000}, (109, 3000, 436, 10)),
        ({"total_anneal_steps": 0}, (109, 481, 0, 10)),
        ({"patience": 0}, (109, 481, 2289, 0)),
        (dict(zip(CHOSEN, (3, 7, 9, 2), strict=True)), (3, 7, 9, 2)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_given_wins_and_the_rest_fits_it(given, chosen):
    assert plan(10_100, **given) == chosen


def test_without_a_kl_term_there_is_nothing_to_warm_up():
    assert plan(10_000, anneal_cap=0.0)[2] == 0


def test_the_papers_setting():
    assert plan(750, preset="paper") == tuple(PAPER.values()) == (200, 500, 200_000, 0)
    assert plan(750, preset="paper", batch_size=100, epochs=None) == (200, 100, 200_000, 0)


def test_every_choice_has_a_reason_and_what_is_given_has_none():
    made = make_plan(750, validated=True, anneal_cap=0.2, given={"epochs": 10, "patience": None})
    assert made.lines() == [
        "batch size 20: the smallest, for 1,000 updates or what comes near, all alike",
        "total anneal steps 380: beta reaches 0.2 after 20% of the 380 updates",
        "patience 5: epochs without a better validation NDCG@100 end the training",
    ]


def test_a_warm_start_begins_at_the_cap_unless_told_otherwise():
    options = {"validated": True, "anneal_cap": 0.2, "warm": True}
    warm, fresh = make_plan(750, **options), make_plan(750, **{**options, "warm": False})
    assert warm.total_anneal_steps == 0 and fresh.total_anneal_steps == 1000
    assert warm.reasons.pop("total_anneal_steps") == (
        "beta is 0.2 from the start, as at the end of the older run"
    )
    assert warm.reasons.items() <= fresh.reasons.items() and warm.epochs == fresh.epochs
    assert make_plan(750, **options, given={"total_anneal_steps": 7}).total_anneal_steps == 7
    assert make_plan(750, **options, preset="paper").total_anneal_steps == 200_000


@pytest.mark.parametrize("validated", [True, False])
def test_a_warm_start_of_few_epochs_keeps_the_batches_of_a_training_from_scratch(validated):
    options = {"validated": validated, "anneal_cap": 0.2}
    fresh = make_plan(750, **options)
    few = make_plan(750, **options, warm=True, given={"epochs": 10})
    assert few.batch_size == fresh.batch_size > make_plan(750, **options, given={"epochs": 10}).batch_size  # fmt: skip
    assert few.reasons["batch_size"] == fresh.reasons["batch_size"]
    assert make_plan(750, **options, warm=True, given={"batch_size": 7}).batch_size == 7


def config_of(run):
    return json.loads((run / "config.json").read_text())


def test_fit_trains_by_the_plan_and_writes_it_down(tmp_path):
    train, validation = learnable()
    result = fit(model(), train, validation, anneal_cap=0.4, epochs=10, run_dir=tmp_path)
    config = config_of(tmp_path)
    assert [config[name] for name in CHOSEN] == [10, 20, 25, 5]
    assert [row["update"] for row in result.history] == [5 * n for n in range(1, 11)]
    # at the cap after a fifth of the 50 updates
    assert [row["beta"] for row in result.history][:3] == [4 / 25, 9 / 25, 0.4]
    assert fit(model(), train, preset="paper", epochs=1).history[0]["update"] == 1


def test_validation_ends_a_training_without_options():
    train, validation = learnable()
    result = fit(model(), train, validation, lr=1e-2)
    assert len(result.history) == result.best_epoch + 20 < 200


def test_a_resumed_run_goes_on_by_its_own_plan(tmp_path):
    train, validation = learnable()
    straight, halves = model(), model()
    fit(straight, train, validation, epochs=6, batch_size=30, patience=0)

    def stop(row):
        return row["epoch"] == 2

    options = {"epochs": 6, "batch_size": 30, "patience": 0, "on_epoch": stop}
    fit(halves, train, validation, run_dir=tmp_path, **options)
    result = fit(halves, train, validation, run_dir=tmp_path, resume=True)
    assert len(result.history) == 6
    assert_equal_weights(weights(straight), weights(halves))
    # more epochs, by the schedule of then
    assert len(fit(halves, train, validation, epochs=7, run_dir=tmp_path, resume=True).history) == 7
    with pytest.raises(ValueError, match="fit: batch_size must be 30 as in the run to resume"):
        fit(halves, train, validation, batch_size=31, run_dir=tmp_path, resume=True)


def test_a_run_folder_of_before_there_was_a_choice_is_resumed(tmp_path):
    train, validation = learnable()
    old = {"batch_size": 500, "total_anneal_steps": 200_000, "patience": 0}
    straight, halves = model(), model()
    fit(straight, train, validation, epochs=4, **old)
    fit(halves, train, validation, epochs=2, run_dir=tmp_path, **old)
    config = config_of(tmp_path)
    for name in ("epochs", "patience", "lr_schedule", "weight_decay", "clip_grad_norm", "total_lr_steps"):  # fmt: skip
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fit(halves, train, validation, epochs=4, run_dir=tmp_path, resume=True)
    assert_equal_weights(weights(straight), weights(halves))
    # without options as many epochs as fit had by default, and no patience
    told = []
    stop = {"on_epoch": lambda row: told.append(row) or row["epoch"] == 40}
    result = fit(halves, train, validation, run_dir=tmp_path, resume=True, **stop)
    assert [row["epoch"] for row in told] == list(range(5, 41)) and len(result.history) == 40
    with pytest.raises(ValueError) as caught:
        fit(halves, train, validation, run_dir=tmp_path, resume=True, lr_schedule="cosine")
    assert str(caught.value) == (
        "fit: lr_schedule must be constant as in the run to resume, got cosine"
    )


def test_a_plan_that_is_no_number_is_refused(tmp_path):
    train, _ = learnable()
    fit(model(), train, epochs=1, run_dir=tmp_path)
    config = config_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"epochs": "many"}))
    with pytest.raises(TypeError, match="fit: epochs must be a whole number, got 'many'"):
        fit(model(), train, run_dir=tmp_path, resume=True)
