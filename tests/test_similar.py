"""Vectors give the model's own order by inner product, and similar items are those of the definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, Fixed, random_clicks
from torch import nn

from fastvae import MultiDAE, MultiVAE, recommend
from fastvae.ranking import MIN_ROWS
from fastvae.similar import item_vectors, similar_items, user_vectors

N_ITEMS = 300


@pytest.fixture(params=["vae", "vae-of-other-code", "dae", "dae-without-hidden-layer"])
def model(request):
    torch.manual_seed(0)
    made = {
        "vae": lambda: MultiVAE([8, 64, N_ITEMS]),
        "vae-of-other-code": lambda: MultiVAE([8, 64, N_ITEMS], tanh_after_dropout=True),
        "dae": lambda: MultiDAE([8, 64, N_ITEMS], dropout_dec=[0.3, 0.3]),
        "dae-without-hidden-layer": lambda: MultiDAE([16, N_ITEMS]),
    }[request.param]()  # fmt: skip
    with torch.no_grad():
        # logits as far apart as after a training
        made.decode.output.weight *= 20
        made.decode.output.bias.normal_()
    return made.to(DEVICE)


X = random_clicks([u % 9 for u in range(40)], N_ITEMS)


def test_inner_products_are_the_logits(model):
    users, items = user_vectors(model, X), item_vectors(model)
    assert model.training and users.dtype == items.dtype == torch.float32
    assert users.device.type == items.device.type == "cpu"
    truth = model.double().eval()(X.to(DEVICE).to_dense().double())
    truth = (truth[0] if isinstance(truth, tuple) else truth).detach().cpu()
    torch.testing.assert_close(users.double() @ items.double().t(), truth, rtol=1e-5, atol=1e-5)


def test_an_index_gives_the_models_order(model):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed: the extra dev has it")
    vectors = item_vectors(model).numpy()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, found = index.search(user_vectors(model, X).numpy(), 20)
    expected = recommend(model, X, 20, keep_seen=True)
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-4, atol=1e-5)
    # a pair within the rounding of its sum may change places
    clear = -np.diff(expected.scores.numpy(), axis=1) > 1e-6
    clear = np.pad(clear, ((0, 0), (1, 0)), constant_values=True)[:, :-1] & clear
    assert clear.mean() > 0.98
    assert (found == expected.items.numpy())[:, :-1][clear].all()


def test_vectors_do_not_depend_on_blocks_or_on_who_else_is_asked_for(monkeypatch):
    torch.manual_seed(0)
    model = MultiVAE([8, 64, N_ITEMS]).to(DEVICE)
    together = user_vectors(model, X)
    monkeypatch.setattr("fastvae.similar.BLOCK_BYTES", 1)  # MIN_ROWS users at once
    apart = user_vectors(model, X)
    torch.testing.assert_close(apart, together)
    if DEVICE == "cpu":  # a GPU's libraries choose another kernel for fewer rows
        assert torch.equal(apart, together)
        assert torch.equal(user_vectors(model, X.rows([39]))[0], together[39])
    assert user_vectors(model, X.rows([])).shape == (0, 65)


def test_histories_are_those_of_recommend():
    model, items = MultiDAE([4, 3]), ["a", "b", "c"]
    lists = user_vectors(model, [["a", "c"], []], items=items)
    assert torch.equal(lists, user_vectors(model, np.array([[1, 0, 1], [0, 0, 0]])))
    text = "user_vectors: 1 of 2 clicks in histories are on items that the model does not know, such as 'x'; they are ignored"
    with pytest.warns(UserWarning, match=f"^{text}$") as warned:
        assert torch.equal(
            user_vectors(model, [["a", "x"]], items=items),
            user_vectors(model, [["a"]], items=items),
        )
    assert [warning.filename for warning in warned] == [__file__]


def slow_similar(model, item, k):
    """By definition, in fp64."""
    weight = model.decode.output.weight.detach().double().cpu()
    rows = F.normalize(weight - weight.mean(0), dim=1)
    cosines = (rows @ rows[item]).tolist()
    best = sorted((j for j in range(len(rows)) if j != item), key=lambda j: (-cosines[j], j))[:k]
    return best, [cosines[j] for j in best]


def test_similar_items_are_those_of_the_definition(model):
    asked = [7, 299, 0, 7]
    found = similar_items(model, asked, k=20)
    for n, item in enumerate(asked):
        best, cosines = slow_similar(model, item, 20)
        assert found.items[n].tolist() == best
        assert found.scores[n].tolist() == pytest.approx(cosines, abs=1e-6)
        alone = similar_items(model, item, k=20)
        assert torch.equal(alone.items[0], found.items[n])
        if DEVICE == "cpu":
            assert torch.equal(alone.scores[0], found.scores[n])


def test_equal_items_are_most_alike_and_ties_come_in_order():
    model = MultiDAE([4, 40])
    weight = model.decode.output.weight.data
    weight[[30, 5, 21]] = 2 * weight[9] - weight.mean(0)
    weight[[30, 5, 21]] = weight[5].clone()
    found = similar_items(model, 21, 39)
    assert found.items[0, :2].tolist() == [5, 30]
    assert found.scores[0, :2].tolist() == pytest.approx([1, 1])


def test_a_vector_added_to_all_rows_changes_nothing_nor_does_the_bias():
    torch.manual_seed(0)
    model = MultiDAE([4, 40])
    before = similar_items(model, range(40), 5)
    model.decode.output.weight.data += torch.tensor([3.0, -2.0, 0.5, 1.0])
    model.decode.output.bias.data.normal_(std=5)
    after = similar_items(model, range(40), 5)
    assert torch.equal(after.items, before.items)
    torch.testing.assert_close(after.scores, before.scores, rtol=1e-4, atol=1e-4)


def test_ids_short_lists_and_rows_of_zero():
    model, items = MultiDAE([2, 3]), ["a", "10", "c"]
    model.decode.output.weight.data.zero_()
    found = similar_items(model, 10, k=5, items=items)
    assert list(found) == [[("a", 0.0), ("c", 0.0)]]
    assert found.items.tolist() == [[0, 2, -1, -1, -1]]
    assert similar_items(model, ["c", "a"], 1, items=items).external() == [["a"], ["10"]]
    assert similar_items(model, [], 2).items.shape == (0, 2)
    many = similar_items(model, ["a"] * (2 * MIN_ROWS + 1), 2, items=items)
    assert many.external() == [["10", "c"]] * len(many)


MODEL = MultiDAE([2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: item_vectors(Fixed(1.0)), TypeError,
         "item_vectors: model must be a MultiVAE or MultiDAE whose last layer is an nn.Linear alone, got Fixed"),
        (lambda: user_vectors(3, X), TypeError, "user_vectors: model must be a MultiVAE, a MultiDAE, or another torch "
         "module with n_items, got int"),
        (lambda: user_vectors(MODEL, X), ValueError, "user_vectors: histories must have the model's 3 items, got 300"),
        (lambda: user_vectors(MODEL, [["a"]]), ValueError,
         "user_vectors: items must be the external item ids where histories are lists, got None"),
        (lambda: similar_items(MODEL, 3), ValueError,
         "similar_items: item must be a position in [0, 3) where items is None, got 3"),
        (lambda: similar_items(MODEL, "a"), ValueError,
         "similar_items: item must be a position in [0, 3) where items is None, got 'a'"),
        (lambda: similar_items(MODEL, ["a", "x"], items="a b c".split()), ValueError,
         "similar_items: item must be one of the model's 3 items, got 'x'"),
        (lambda: similar_items(MODEL, 1.0), TypeError,
         "similar_items: item must hold ids that are str or int, got float at position 0"),
        (lambda: similar_items(MODEL, 1, 0), ValueError, "similar_items: k must be at least 1, got 0"),
        (lambda: similar_items(MODEL, 1, items=["a"]), ValueError, "similar_items: items must hold 3 ids, got 1"),
    ],
)  # fmt: skip
def test_arguments_are_checked(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_a_layer_that_is_called_has_no_vectors():
    class Scaled(nn.Linear):
        def forward(self, h):
            return 2 * super().forward(h)

    model = MultiDAE([2, 3])
    model.decode.p_layers.linear_0 = Scaled(2, 3)
    for call in (
        item_vectors,
        lambda m: similar_items(m, 0),
        lambda m: user_vectors(m, np.ones((1, 3))),
    ):
        with pytest.raises(
            TypeError, match=r"whose last layer is an nn.Linear alone, got MultiDAE$"
        ):
            call(model)


def test_weights_that_are_not_finite():
    model = MultiDAE([2, 3])
    model.decode.output.weight.data[1, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"^similar_items: model must have finite weights .*, got nan or inf; load"
    ):
        similar_items(model, 0)
