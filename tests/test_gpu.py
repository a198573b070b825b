"""The ops and models on a CUDA device: accuracy, determinism, no waiting, graph replay, opcheck, compile, fit."""

import copy
import warnings

import pytest
import torch
from helpers import assert_as_accurate_as_torch, random_clicks

from fastvae import (
    MultiDAE,
    MultiVAE,
    evaluate,
    fit,
    linear_multinomial_nll,
    multinomial_nll,
    recommend,
    reference,
    sparse_linear,
)
from fastvae.ops.linear_multinomial_nll import _LINEAR_MULTINOMIAL_NLL
from fastvae.ops.multinomial_nll import _MULTINOMIAL_NLL
from fastvae.ops.sparse_linear import _SPARSE_LINEAR

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [40, 0, 1, 300, 7] * 16


def gradients(call, leaves, dy):
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = call(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def compare(op, dense, leaves, dy):
    """op on the GPU against dense in fp64, at most twice the error of dense at the op's own dtype."""
    actual, same = gradients(op, leaves, dy), gradients(dense, leaves, dy)
    truth = gradients(dense, [t.double() for t in leaves], dy)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("n_hidden", [8, 600])
def test_sparse_linear(dtype, counts, n_hidden):
    torch.manual_seed(0)
    clicks = random_clicks(LENGTHS, 500, counts=counts).to("cuda").rows(torch.arange(79, -1, -1))
    weight = torch.randn(500, n_hidden, device="cuda").to(dtype).t()
    bias, seed = torch.randn(n_hidden, device="cuda").to(dtype), torch.tensor([3], device="cuda")
    x, keep = clicks.to_dense(), reference.dense_keep(clicks, seed, 0.5)
    compare(
        lambda w, b: sparse_linear(clicks, w, b, dropout=0.5, seed=seed),
        lambda w, b: reference.sparse_linear(x.to(w.dtype), w, b, keep, 0.5),
        [weight, bias],
        torch.randn(80, n_hidden, device="cuda"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_items", [500, 70_001])
def test_multinomial_nll(dtype, n_items):
    torch.manual_seed(0)
    clicks = random_clicks(LENGTHS, n_items, counts=True).to("cuda")
    x, logits = clicks.to_dense(), (3 * torch.randn(80, n_items, device="cuda")).to(dtype)
    compare(
        lambda z: multinomial_nll(z, clicks),
        lambda z: reference.multinomial_nll(z, x.to(z.dtype)),
        [logits],
        torch.randn(80, device="cuda"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_items", [500, 20_108])
@pytest.mark.parametrize("max_bytes", [2**32, 2**20])
def test_linear_multinomial_nll(dtype, n_items, max_bytes):
    torch.manual_seed(0)
    clicks = random_clicks(LENGTHS, n_items, counts=True).to("cuda")
    x = clicks.to_dense()
    leaves = [
        torch.randn(*shape, device="cuda") for shape in ((80, 600), (n_items, 600), (n_items,))
    ]
    leaves = [t.to(dtype) for t in (leaves[0], 0.05 * leaves[1], leaves[2])]
    compare(
        lambda h, w, b: linear_multinomial_nll(h, w, b, clicks, max_bytes=max_bytes),
        lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x.to(h.dtype)),
        leaves,
        torch.randn(80, device="cuda"),
    )


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_loss_equals_the_cpus_and_is_bitwise_repeatable(make):
    torch.manual_seed(0)
    model, clicks = make([16, 64, 500]).eval(), random_clicks(LENGTHS, 500)
    on_gpu = copy.deepcopy(model).cuda()
    x = clicks.to("cuda")
    losses, grads = [], []
    for module, batch in ((model, clicks), (on_gpu, x), (on_gpu, x)):
        module.zero_grad()
        losses.append(module.loss(batch, 0.2))
        losses[-1].backward()
        grads.append([p.grad.cpu() for p in module.parameters()])
    torch.testing.assert_close(losses[0], losses[1].cpu(), rtol=1e-5, atol=1e-5)
    for cpu, one, two in zip(*grads, strict=True):
        torch.testing.assert_close(cpu, one, rtol=1e-3, atol=1e-5)
        assert torch.equal(one, two)


@pytest.mark.parametrize("per_click", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_a_training_step_never_waits_for_the_device(per_click, counts):
    model = MultiVAE([16, 64, 500]).cuda()
    clicks = random_clicks(LENGTHS, 500, counts=counts).to("cuda")
    ids = torch.arange(80, device="cuda").flip(0)
    model.loss(clicks.rows(ids), 0.2, per_click).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(clicks.rows(ids), 0.2, per_click).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_with_changing_batches_and_masks():
    torch.manual_seed(0)
    model, clicks = MultiDAE([16, 64, 500]).cuda(), random_clicks(LENGTHS, 500).to("cuda")
    ids = torch.arange(10, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model.loss(clicks.rows(ids)).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = model.loss(clicks.rows(ids))
        loss.backward()
    losses = set()
    for _ in range(3):
        graph.replay()
        losses.add(loss.item())
    assert len(losses) == 3, "a replay draws a new mask"
    model.eval()
    # compiles the kernels without dropout: a capture cannot
    model.loss(clicks.rows(ids)).backward()
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = model.loss(clicks.rows(ids))
        loss.backward()
    for batch in (
        torch.arange(10, 20),
        torch.arange(79, 69, -1),
        torch.zeros(10, dtype=torch.int64),
    ):
        ids.copy_(batch)
        graph.replay()
        replayed = [p.grad.clone() for p in model.parameters()]
        fresh = copy.deepcopy(model)
        fresh.zero_grad(set_to_none=True)
        expected = fresh.loss(clicks.rows(batch.cuda()))
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for a, p in zip(replayed, fresh.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)


def test_opcheck():
    clicks = random_clicks([3, 0, 9], 12, counts=True).to("cuda").rows(torch.tensor([2, 0]))
    csr = (clicks.indptr, clicks.indices, clicks.values, clicks.row_ids)
    weight = torch.randn(12, 8, device="cuda").t().requires_grad_()
    seed, hidden = (
        torch.tensor([3], device="cuda"),
        torch.randn(2, 8, device="cuda", requires_grad=True),
    )
    torch.library.opcheck(
        _SPARSE_LINEAR.registered,
        (*csr, weight, *(None,) * 2, seed, *(None,) * 2, 0.5, True, True, False),
    )
    torch.library.opcheck(
        _MULTINOMIAL_NLL.registered, (torch.randn(2, 12, device="cuda", requires_grad=True), *csr)
    )
    last = torch.randn(12, 8, device="cuda", requires_grad=True)
    for compute in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            _LINEAR_MULTINOMIAL_NLL.registered,
            (hidden, last, None, None, None, *csr, compute, True, 2**32),
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_compile(autocast):
    torch._dynamo.reset()
    model, clicks = MultiVAE([16, 64, 500]).cuda().eval(), random_clicks(LENGTHS, 500).to("cuda")
    compiled = torch.compile(model.loss, fullgraph=True)
    results = []
    for loss in (model.loss, compiled):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            value = loss(clicks, 0.2)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-4, atol=1e-4)


def test_mixed_devices_and_fp64_are_named():
    clicks, weight = random_clicks([2], 6).to("cuda"), torch.randn(4, 6)
    with pytest.raises(
        RuntimeError, match="sparse_linear: weight must be on cuda:0 like clicks, got cpu"
    ):
        sparse_linear(clicks, weight)
    with pytest.raises(TypeError, match="weight must be float32, bfloat16, float16 on a GPU"):
        sparse_linear(clicks, weight.double().cuda())


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_fit_evaluate_recommend_and_resume(tmp_path, precision):
    train = random_clicks([20] * 200, 500)
    fold_in, held_out = random_clicks([10] * 30, 500, seed=1), random_clicks([3] * 30, 500, seed=2)
    finals = []
    for run in ("a", "b"):
        torch.manual_seed(0)
        model = MultiVAE([16, 64, 500]).cuda()
        options = {"batch_size": 64, "total_anneal_steps": 0, "precision": precision}
        options |= {"run_dir": tmp_path / run}
        if run == "b":
            fit(model, train, (fold_in, held_out), epochs=1, **options)
        fit(model, train, (fold_in, held_out), epochs=3, resume=run == "b", **options)
        finals.append(model)
    for a, b in zip(*(m.parameters() for m in finals), strict=True):
        assert torch.equal(a, b)
    on_cpu = evaluate(finals[0].cpu(), fold_in, held_out)["ndcg@100"]
    assert evaluate(finals[1].cuda(), fold_in, held_out)["ndcg@100"] == pytest.approx(
        on_cpu, abs=1e-3
    )
    assert recommend(finals[1], fold_in, 5).items.shape == (30, 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fit_by_a_cuda_graph_equals_eager_steps(precision):
    # without dropout and noise both compute the same; 205 users: the last batch of an epoch stays eager
    train, finals = random_clicks([20] * 205, 500).to("cuda"), []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = MultiDAE([16, 64, 500], dropout_enc=[0.0, 0.0]).cuda()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a failed capture warns
            result = fit(
                model, train, epochs=4, batch_size=20, precision=precision, cuda_graph=cuda_graph
            )
        finals.append([torch.tensor([row["loss"] for row in result.history]), *model.parameters()])
    for eager, graphed in zip(*finals, strict=True):
        torch.testing.assert_close(graphed, eager, rtol=1e-4, atol=1e-5)
    assert finals[1][0][-1] < finals[1][0][0]


def test_a_failed_capture_warns_once_and_goes_on(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    train = random_clicks([20] * 200, 500).to("cuda")
    with pytest.warns(UserWarning, match="could not be captured as a CUDA graph") as warned:
        result = fit(
            MultiVAE([16, 64, 500]).cuda(), train, epochs=2, batch_size=20, cuda_graph=True
        )
    assert len(warned) == 1 and len(result.history) == 2
