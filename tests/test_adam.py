"""Adam: the kernel against torch's own in fp64, on edges of blocks; layouts, states, shadows that go stale."""

import copy
import io
import math

import pytest
import torch
from helpers import DEVICE, assert_as_accurate_as_torch
from torch import nn

import fastvae.adam
from fastvae import Adam, MultiVAE
from fastvae._shadows import ROWS, captured, shadow_of
from fastvae.adam import from_file, to_file
from fastvae.kernels import adam as kernels
from fastvae.kernels import tiles

BLOCK = tiles.of(torch.device(DEVICE)).adam.block
SIZES = [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    """The kernel also updates weights on the CPU: in the interpreter."""
    monkeypatch.setattr(fastvae.adam, "uses_kernels", lambda t: True)


@pytest.fixture
def launches(monkeypatch):
    """The number of tensors of each launch of the kernel."""
    seen, launch = [], kernels.launch

    def counted(kernel, grid, grads, *arguments, **constants):
        seen.append(len(grads))
        launch(kernel, grid, grads, *arguments, **constants)

    monkeypatch.setattr(kernels, "launch", counted)
    return seen


def weights_of(sizes, seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(size).to(DEVICE)) for size in sizes]


def copies(weights, dtype):
    return [nn.Parameter(w.detach().to(dtype, copy=True)) for w in weights]


def draw_gradients(weights, n_steps, seed=1):
    """For each step a gradient of each weight; their sizes span nine orders of magnitude."""
    torch.manual_seed(seed)
    return [
        [torch.randn(w.shape).to(DEVICE) * 10 ** (3 * torch.randn(w.shape).to(DEVICE)) for w in weights]
        for _ in range(n_steps)
    ]  # fmt: skip


def take_steps(optimizer, weights, gradients):
    """Steps in which a gradient of None leaves its weight out."""
    for row in gradients:
        for w, gradient in zip(weights, row, strict=True):
            w.grad = None if gradient is None else torch.empty_like(w).copy_(gradient)
        optimizer.step()


def check(weights, gradients, **options):
    """Weights and means after these steps err at most twice as much as those of torch's fused Adam."""
    trials = []
    for dtype in (torch.float32, torch.float64):
        reference = copies(weights, dtype)
        trials.append(torch.optim.Adam(reference, fused=dtype == torch.float32, **options))
        take_steps(trials[-1], reference, gradients)
    optimizer = Adam(weights, **options)
    take_steps(optimizer, weights, gradients)
    for n, w in enumerate(weights):
        same, truth = (t.param_groups[0]["params"][n] for t in trials)
        assert_as_accurate_as_torch(w, same, truth)
        for name in ("exp_avg", "exp_avg_sq"):
            by_torch, exact = (t.state[p][name] for t, p in zip(trials, (same, truth), strict=True))
            assert_as_accurate_as_torch(optimizer.state[w][name], by_torch, exact)
    return optimizer


def as_bf16(t):
    """t in bf16; the interpreter's store cuts the last bits off where a GPU's rounds."""
    if DEVICE == "cpu":
        return (
            (t.detach().contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        )
    return t.detach().bfloat16()


def test_a_hundred_steps_on_sizes_around_a_block(launches):
    weights = weights_of(SIZES)
    optimizer = check(weights, draw_gradients(weights, 100), lr=1e-2)
    assert launches == [len(SIZES)] * 100
    assert all(optimizer.state_dict()["state"][n]["step"] == 100 for n in range(len(SIZES)))


@pytest.mark.parametrize("sizes", [[3], [(3, 5), ()], [7, 0, 2]], ids=["one", "scalar", "empty"])
def test_few_and_odd_tensors(sizes):
    weights = weights_of(sizes)
    check(weights, draw_gradients(weights, 3), lr=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.0, 0.999)},
        {"betas": (0.9, 0.0)},
        {"betas": (0.5, 0.9999), "eps": 1e-3},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_options(options):
    weights = weights_of([5, BLOCK + 1])
    check(weights, draw_gradients(weights, 5), **options)


def test_more_tensors_than_a_launch_takes(launches):
    weights = weights_of([2] * (kernels.MAX_TENSORS + 1))
    check(weights, draw_gradients(weights, 2))
    assert launches == [kernels.MAX_TENSORS, 1] * 2


def test_the_first_step_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], device=DEVICE))
    weight.grad = torch.tensor([4.0, -0.5, 0.0], device=DEVICE)
    Adam([weight], lr=0.25).step()
    assert weight.tolist() == pytest.approx([0.75, 2.25, 3.0], rel=1e-6)


def test_bias_corrections_hold_after_many_steps():
    # beta ** step from nearly one to nothing
    for step in (0, 9, 99, 500, 5_000, 1_000_000):
        weight = nn.Parameter(torch.zeros(1, device=DEVICE))
        optimizer = Adam([weight], lr=1.0)
        state = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.ones(1),
            "exp_avg_sq": torch.ones(1),
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
        weight.grad = torch.ones(1, device=DEVICE)
        optimizer.step()
        expected = -math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_a_weight_without_a_gradient_is_left_out_and_not_counted():
    weights = weights_of([5, BLOCK + 1, 3])
    gradients = draw_gradients(weights, 4)
    gradients[1][0] = gradients[2][0] = gradients[3][1] = None
    optimizer = check(weights, gradients)
    steps = [state["step"].item() for state in optimizer.state_dict()["state"].values()]
    assert steps == [2, 3, 4]


def test_nan_stays_where_it_is():
    weights = weights_of([BLOCK + 1])
    gradients = draw_gradients(weights, 2)
    gradients[0][0][3] = math.nan
    take_steps(Adam(weights), weights, gradients)
    assert weights[0].isnan().nonzero().tolist() == [[3]]


def item_major(n_hidden, n_items):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(n_items, n_hidden).to(DEVICE).t())


@pytest.mark.parametrize("shape", [(5, 70), (1, 9), (9, 1), (6, 6)], ids=str)
def test_item_major_weights_stay_as_they_are(shape):
    weight = item_major(*shape)
    strides, address = weight.stride(), weight.data_ptr()
    optimizer = check([weight], draw_gradients([weight], 3))
    assert weight.stride() == optimizer.state[weight]["exp_avg"].stride() == strides
    assert weight.data_ptr() == address


@pytest.mark.parametrize(
    ("shape", "gap", "offset", "copies"),
    [
        ((3, 4), 4, 0, 0),
        ((BLOCK // 8 + 3, 12), 8, 0, 0),
        ((5, BLOCK), 4, 0, 0),
        ((2, BLOCK + 8), 16, 4, 0),
        ((3, 5), 3, 0, 1),
        ((3, 8), 3, 0, 1),
    ],
    ids=["a four", "rows in a block", "a row a block", "blocks in a row", "odd rows", "odd gaps"],
)
@pytest.mark.parametrize("items_first", [True, False], ids=["rows", "item-major"])
def test_a_gradient_with_gaps_between_its_rows(
    shape, gap, offset, copies, items_first, monkeypatch
):
    torch.manual_seed(0)
    weight, gradient = torch.randn(shape).to(DEVICE), torch.randn(shape).to(DEVICE)
    wide = torch.full((shape[0], offset + shape[1] + gap), math.nan, device=DEVICE)
    grad = wide[:, offset : offset + shape[1]].copy_(gradient)
    if not items_first:
        weight, grad, gradient = weight.t(), grad.t(), gradient.t()
    one, other, by_torch = (nn.Parameter(weight.detach().clone()) for _ in range(3))
    one.grad, other.grad, by_torch.grad = grad, gradient, gradient
    made, laid_out = [], fastvae.adam._laid_out_as
    monkeypatch.setattr(fastvae.adam, "_laid_out_as", lambda w, t: made.append(t) or laid_out(w, t))
    optimizer = Adam([one])
    optimizer.step()
    assert sum(t is grad for t in made) == copies
    Adam([other]).step()
    torch.optim.Adam([by_torch]).step()
    assert torch.equal(one, other)
    torch.testing.assert_close(one, by_torch)


def test_a_gradient_in_another_order():
    one, other = item_major(5, 7), item_major(5, 7)
    optimizers = Adam([one]), Adam([other])
    gradient = torch.randn(5, 7).to(DEVICE)
    one.grad, other.grad = gradient, torch.empty_like(other).copy_(gradient)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["fp64", "bf16", "a gap"])
def test_other_weights_are_updated_by_torch(case, launches):
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(case, torch.float32)
    weight = nn.Parameter(torch.randn(4, 6).to(DEVICE, dtype)[:, : 5 if case == "a gap" else 6])
    other = nn.Parameter(weight.detach().clone())
    optimizers = Adam([weight], shadow=True), torch.optim.Adam([other], fused=True)
    for optimizer, w in zip(optimizers, (weight, other), strict=True):
        take_steps(optimizer, [w], draw_gradients([other], 2))
    assert launches == [] and shadow_of(weight) is None
    torch.testing.assert_close(weight, other)
    # torch's fused kernel for a GPU is wrong where there is a gap, and its plain one rounds otherwise
    assert torch.equal(weight, other) or (case == "a gap" and weight.is_cuda)


def test_groups_schedules_and_a_tensor_of_a_rate():
    weights = weights_of([5, 7, 9])
    gradients = draw_gradients(weights, 6)
    results = []
    for make, rate in (
        (Adam, 0.1),
        (torch.optim.Adam, 0.1),
        (Adam, torch.tensor(0.1, device=DEVICE)),
    ):
        ws = copies(weights, torch.float32)
        optimizer = make(
            [{"params": ws[:2]}, {"params": ws[2:], "lr": 0.01, "betas": (0.8, 0.99)}], lr=rate
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        for row in gradients:
            take_steps(optimizer, ws, [row])
            schedule.step()
        results.append(ws)
    for ours, torchs, by_tensor in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(by_tensor, torchs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("of_second", "expected"),
    [
        pytest.param({"weight_decay": 0.3}, [3], id="decay"),
        pytest.param({"weight_decay": 0.0}, [3], id="no-decay"),
        pytest.param({"lr": 0.2}, [2, 1], id="lr"),
        pytest.param({"betas": (0.8, 0.99)}, [2, 1], id="betas"),
        pytest.param({"eps": 1e-6}, [2, 1], id="eps"),
    ],
)
def test_groups_that_differ_in_decay_alone_share_a_launch(launches, of_second, expected):
    weights = weights_of([5, 7, 9])
    gradients = draw_gradients(weights, 3)
    ours, theirs = copies(weights, torch.float32), copies(weights, torch.float32)
    for make, ws in ((Adam, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": ws[:2]}, {"params": ws[2:], **of_second}]
        take_steps(make(groups, lr=0.1, weight_decay=0.1), ws, gradients)
    assert launches == expected * 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_closure_computes_the_gradients():
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = Adam([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert weight.tolist() == pytest.approx([0.9] * 3)


def test_a_backward_through_weights_that_were_updated_is_refused():
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    Adam([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# states


@pytest.mark.parametrize("first", [Adam, torch.optim.Adam], ids=["ours", "torchs"])
@pytest.mark.parametrize("second", [Adam, torch.optim.Adam], ids=["ours", "torchs"])
@pytest.mark.parametrize("fused", [None, True])
def test_one_goes_on_where_the_other_stopped(first, second, fused):
    weights = [item_major(5, 7), *weights_of([3, BLOCK + 1])]
    gradients = draw_gradients(weights, 8)
    whole = copies(weights, torch.float32)
    take_steps(torch.optim.Adam(whole), whole, gradients)
    optimizer = Adam(weights) if first is Adam else first(weights, fused=fused)
    take_steps(optimizer, weights, gradients[:5])
    file = io.BytesIO()
    torch.save(to_file(optimizer.state_dict()), file)
    file.seek(0)
    resumed = second(weights)
    resumed.load_state_dict(from_file(torch.load(file, weights_only=True), weights))
    take_steps(resumed, weights, gradients[5:])
    for actual, expected in zip(weights, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_a_state_of_a_weight_row_by_row_is_taken():
    weight = item_major(5, 7)
    gradients = draw_gradients([weight], 5)
    (row_major,) = copies([weight], torch.float32)
    row_major.data = row_major.data.contiguous()
    optimizer = torch.optim.Adam([row_major])
    take_steps(optimizer, [row_major], gradients[:3])
    weight.data.copy_(row_major)
    resumed = Adam([weight])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, [row_major]), (resumed, [weight]):
        take_steps(*each, gradients[3:])
    torch.testing.assert_close(weight.data, row_major.data, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one():
    weights = [item_major(5, 7), *weights_of([BLOCK + 1])]
    gradients = draw_gradients(weights, 6)
    whole = [nn.Parameter(w.detach().clone()) for w in weights]
    take_steps(Adam(whole), whole, gradients)
    optimizer = Adam(weights)
    take_steps(optimizer, weights, gradients[:3])
    resumed = Adam(weights)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(resumed, weights, gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(weights, whole, strict=True))


def test_a_state_is_torchs_and_a_file_has_items_first():
    weight = item_major(5, 7)
    ours, torchs = Adam([weight], shadow=True), torch.optim.Adam([weight], fused=True)
    for optimizer in (ours, torchs):
        take_steps(optimizer, [weight], draw_gradients([weight], 1))
    a, b = ours.state_dict(), torchs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for name, t in b["state"][0].items():
        assert a["state"][0][name].shape == t.shape and a["state"][0][name].dtype == t.dtype
    assert to_file(a)["state"][0]["exp_avg"].shape == (7, 5)


def test_a_copied_or_unpickled_optimiser_goes_on():
    weights = weights_of([5])
    optimizer = Adam(weights, shadow=True)
    take_steps(optimizer, weights, draw_gradients(weights, 2))
    other = copy.deepcopy(optimizer)
    theirs = other.param_groups[0]["params"]
    for o, ws in ((optimizer, weights), (other, theirs)):
        take_steps(o, ws, draw_gradients(weights, 2, seed=2))
    assert torch.equal(weights[0], theirs[0])
    for weight in (weights[0], theirs[0]):
        assert torch.equal(shadow_of(weight)[:5], as_bf16(weight))


def test_a_model_that_moves_takes_its_state_along():
    weight = item_major(5, 7)
    optimizer, gradients = Adam([weight], shadow=True), draw_gradients([weight], 2)
    take_steps(optimizer, [weight], gradients[:1])
    other = nn.Parameter(weight.detach().contiguous())
    expected = Adam([other])
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weight.data = weight.data.contiguous()
    for o, w in ((optimizer, weight), (expected, other)):
        take_steps(o, [w], gradients[1:])
    assert torch.equal(weight, other)
    assert torch.equal(shadow_of(weight)[:5], as_bf16(weight))
    weight.data = weight.data.t()  # the same memory
    assert shadow_of(weight) is shadow_of(weight, transposed=True) is None


def test_what_is_refused(monkeypatch):
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    for options, message in (
        ({"lr": -1}, "Adam: lr must be a finite number of at least 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"Adam: betas must lie in \[0, 1\), got 1.0"),
        ({"eps": math.inf}, "Adam: eps must be a finite number of at least 0, got inf"),
        ({"weight_decay": -1}, "Adam: weight_decay must be a finite number of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Adam([weight], **options)
    with pytest.raises(TypeError, match=r"Adam: betas must be two numbers, got 0\.9"):
        Adam([weight], betas=0.9)
    with pytest.raises(TypeError, match="Adam: shadow must be True or False, got 1"):
        Adam([weight], shadow=1)
    with pytest.raises(ValueError, match="Adam: amsgrad must be False, got True"):
        Adam([{"params": [weight], "amsgrad": True}])
    optimizer = Adam([weight])
    message = "Adam: weight_decay must be decoupled, as AdamW's, got 0.1 of torch.optim.Adam"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(torch.optim.Adam([weight], weight_decay=0.1).state_dict())
    groups = optimizer.state_dict()["param_groups"]
    state = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
    with pytest.raises(ValueError, match=r"exp_avg must have its weight's shape \[3\], got \[4\]"):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    weight.grad = torch.ones(3, device=DEVICE).to_sparse()
    with pytest.raises(TypeError, match="Adam: gradients must be dense, got a sparse one"):
        Adam([weight]).step()
    weight.grad = torch.ones(3, device=DEVICE)
    monkeypatch.setattr(fastvae.adam, "is_being_captured", lambda t: True)
    with pytest.raises(RuntimeError, match="Adam: a step must run before a CUDA graph is captured"):
        Adam([weight]).step()


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "on-the-device"])
def test_weight_decay_is_that_of_adamw(lr):
    weights = weights_of(SIZES)
    gradients = draw_gradients(weights, 4)
    trials = []
    for dtype in (torch.float32, torch.float64):
        reference = copies(weights, dtype)
        trials.append(torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.3, fused=True))
        take_steps(trials[-1], reference, gradients)
    take_steps(Adam(weights, lr=lr, weight_decay=0.3), weights, gradients)
    for n, w in enumerate(weights):
        assert_as_accurate_as_torch(w, *(t.param_groups[0]["params"][n] for t in trials))


def test_a_groups_own_decay_is_decoupled_and_its_state_is_taken_up_by_adamw():
    finals = []
    for later in (Adam, torch.optim.AdamW):
        weights = weights_of([(3, 4), 5])
        groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0}]  # fmt: skip
        first = Adam(groups, lr=1e-2)
        take_steps(first, weights, draw_gradients(weights, 2))
        state = first.state_dict()
        second = later([{"params": [w]} for w in weights])
        second.load_state_dict(state)
        assert [group["weight_decay"] for group in second.param_groups] == [0.1, 0]
        take_steps(second, weights, draw_gradients(weights, 2, seed=5))
        Adam(weights).load_state_dict(torch.optim.AdamW(weights, weight_decay=0.1).state_dict())
        finals.append(weights)
    for ours, theirs in zip(*finals, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# shadows


def trained(weights):
    optimizer = Adam(weights, lr=0.1, shadow=True)
    take_steps(optimizer, weights, draw_gradients(weights, 2))
    return optimizer


@pytest.mark.parametrize("n_rows", [1, ROWS - 1, ROWS, ROWS + 1])
def test_a_shadow_is_the_weight_in_bf16_and_rows_of_zeros(n_rows):
    matrix, vector = weights_of([(n_rows, 3), n_rows])
    items = item_major(5, n_rows + 1)
    optimizer = trained([matrix, vector, items])
    for weight, rows in ((matrix, matrix), (vector, vector), (items, items.t())):
        shadow = shadow_of(weight, transposed=weight is items)
        assert shadow_of(weight, transposed=weight is not items) is None
        assert shadow.shape == (-(-len(rows) // ROWS) * ROWS, *rows.shape[1:])
        assert torch.equal(shadow[: len(rows)], as_bf16(rows))
        assert not shadow[len(rows) :].any()
    del optimizer
    assert shadow_of(matrix) is None, "nobody keeps them beyond their optimiser"


def test_no_shadow_unless_asked_for():
    weights = weights_of([3])
    take_steps(Adam(weights), weights, draw_gradients(weights, 1))
    assert shadow_of(weights[0]) is None


@torch.no_grad()
def change(model, way):
    weight = model.weight
    if way == "load_state_dict":
        model.load_state_dict({"weight": torch.ones(4, 3), "bias": torch.ones(4)})
    elif way == "by hand":
        weight[1, 2] = 7.0
    elif way == "init":
        nn.init.zeros_(weight)
    elif way == "a view":
        weight.detach().t().mul_(2)
    elif way == "new data":
        weight.data = torch.ones_like(weight)
    elif way == "through .data, and said so":
        weight.data.clamp_(-0.1, 0.1)
        torch.autograd.graph.increment_version(weight)
    elif way == "another optimiser":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    elif way == "another of ours":
        weight.grad = torch.ones_like(weight)
        Adam([weight], lr=0.1).step()
    elif way == "torch's adam":
        weight.grad = torch.ones_like(weight)
        torch.optim.Adam([weight], lr=0.1, fused=True).step()


WAYS = [
    "load_state_dict",
    "by hand",
    "init",
    "a view",
    "new data",
    "through .data, and said so",
    "another optimiser",
    "another of ours",
    "torch's adam",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_weight_has_no_shadow_until_it_is_written_again(way):
    model = nn.Linear(3, 4, device=DEVICE)
    weights = list(model.parameters())
    optimizer = trained(weights)
    rows = shadow_of(model.weight)
    change(model, way)
    assert shadow_of(model.weight) is None
    assert way == "load_state_dict" or shadow_of(model.bias) is not None
    optimizer.refresh_shadows()
    assert shadow_of(model.weight) is rows, "a captured graph reads the same memory"
    assert torch.equal(rows[:4], model.weight.detach().bfloat16())
    change(model, way)
    take_steps(optimizer, weights, draw_gradients(weights, 1))
    assert torch.equal(shadow_of(model.weight)[:4], as_bf16(model.weight))


def test_a_weight_without_a_gradient_keeps_its_shadow():
    weights = weights_of([3, 3])
    optimizer = trained(weights)
    take_steps(optimizer, weights, [[None, torch.ones(3, device=DEVICE)]])
    assert torch.equal(shadow_of(weights[0])[:3], as_bf16(weights[0]))


def test_a_backward_through_a_shadow_that_was_written_again_is_refused():
    weights = weights_of([3])
    optimizer = trained(weights)
    leaf = torch.ones(3, device=DEVICE, requires_grad=True)
    loss = (leaf * shadow_of(weights[0])[:3]).sum()
    take_steps(optimizer, weights, draw_gradients(weights, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_graph_casts():
    weights = weights_of([3])
    optimizer = trained(weights)
    compiled = torch.compile(lambda: shadow_of(weights[0]) is None, backend="eager", fullgraph=True)
    assert compiled() and shadow_of(weights[0]) is not None and optimizer


def test_shadows_are_not_part_of_any_state():
    model = MultiVAE([2, 4, 9]).to(DEVICE)
    optimizer = trained(list(model.parameters()))
    for state in (model.state_dict(), optimizer.state_dict(), copy.deepcopy(model).__dict__):
        file = io.BytesIO()
        torch.save(state, file)
        assert b"BFloat16" not in file.getvalue()
    assert shadow_of(model.decode.output.weight) is not None
    assert shadow_of(copy.deepcopy(model).decode.output.weight) is None


def test_a_model_is_updated_in_one_launch(launches):
    model = MultiVAE([2, 4, 9]).to(DEVICE)
    trained(list(model.parameters()))
    assert launches == [8, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("shadow", [False, True])
def test_a_captured_step_counts_on_and_follows_the_rate(shadow):
    weights = [item_major(600, 301), *weights_of([600, 2 * BLOCK + 5])]
    others = copies(weights, torch.float32)
    gradients = draw_gradients(weights, 8)
    rate = torch.tensor(0.1, device=DEVICE)
    optimizer, eager = Adam(weights, lr=rate, shadow=shadow), Adam(others, lr=0.1)
    take_steps(optimizer, weights, gradients[:2])
    take_steps(eager, others, gradients[:2])
    graph = torch.cuda.CUDAGraph()
    with captured(), torch.cuda.graph(graph):
        optimizer.step()
    for n, row in enumerate(gradients[2:]):
        for w, gradient in zip(weights, row, strict=True):
            w.grad.copy_(gradient)
        rate.fill_(0.1 / (n + 1))
        eager.param_groups[0]["lr"] = 0.1 / (n + 1)
        graph.replay()
        take_steps(eager, others, [row])
    for actual, expected in zip(weights, others, strict=True):
        assert torch.equal(actual, expected)
        if shadow:
            rows = fastvae.adam.row_major(actual.detach())
            copy_of_it = shadow_of(actual, transposed=not actual.is_contiguous())
            assert torch.equal(copy_of_it[: len(rows)], rows.bfloat16())
    assert optimizer.state_dict()["state"][0]["step"] == 8


@pytest.mark.gpu
def test_a_graph_captured_without_a_promise_to_refresh_casts():
    weights = weights_of([3])
    optimizer = trained(weights)
    graph, seen = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        seen.append(shadow_of(weights[0]))
        with captured():
            seen.append(shadow_of(weights[0]))
        weights[0].detach().add_(0)
    assert seen[0] is None and seen[1] is not None and optimizer


@pytest.mark.gpu
def test_a_full_size_step_equals_torchs():
    weights = [item_major(600, 20_108), *weights_of([600, (20_107, 600), 20_107])]
    gradients = draw_gradients(weights, 2)
    check(weights, gradients)
    take_steps(Adam(weights, shadow=True), weights, gradients[:1])


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    weights = weights_of([BLOCK + 1, 5])
    optimizer = trained(weights)
    gradients = draw_gradients(weights, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(optimizer, weights, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_state_goes_from_a_gpu_to_a_cpu_and_back(monkeypatch):
    monkeypatch.setattr(fastvae.adam, "uses_kernels", lambda t: t.is_cuda)
    on_gpu = [item_major(5, 70), *weights_of([BLOCK + 1])]
    gradients, whole = draw_gradients(on_gpu, 6), copies(on_gpu, torch.float32)
    take_steps(Adam(whole), whole, gradients)
    optimizer = Adam(on_gpu, shadow=True)
    take_steps(optimizer, on_gpu, gradients[:2])
    on_cpu = [nn.Parameter(w.detach().cpu()) for w in on_gpu]
    other = Adam(on_cpu)
    other.load_state_dict(optimizer.state_dict())
    take_steps(other, on_cpu, gradients[2:4])
    back = [nn.Parameter(w.detach().to(DEVICE)) for w in on_cpu]
    last = Adam(back)
    last.load_state_dict(other.state_dict())
    take_steps(last, back, gradients[4:])
    for actual, expected in zip(back, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
