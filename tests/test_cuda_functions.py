"""What a GPU's tensors go through between an op's name and its kernels, on CPU tensors in Triton's interpreter.

The ops take the GPU's way where _dispatch.uses_kernels says so; here it says so of every tensor. Values and every
gradient are compared with the reference in fp64, and what the ops promise to torch.compile with what they give.
"""

import itertools

import pytest
import torch
from helpers import DEVICE, assert_as_accurate_as_torch, random_clicks
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.launches import pretended_gpu
from fastvae import (
    Adam,
    MultiDAE,
    MultiVAE,
    linear_multinomial_nll,
    multinomial_nll,
    reference,
    sparse_linear,
)
from fastvae._shadows import Shadow
from fastvae.kernels import linear_multinomial_nll as last_layer
from fastvae.ops.linear_multinomial_nll import _GRADIENTS, _LINEAR_MULTINOMIAL_NLL
from fastvae.ops.multinomial_nll import _DLOGITS, _MULTINOMIAL_NLL
from fastvae.ops.sample_latent import _DENCODED, _SAMPLE_LATENT
from fastvae.ops.sparse_linear import _DVALUES, _DWEIGHT, _SPARSE_LINEAR

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs these lines itself, see test_gpu.py"),
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float16]
LENGTHS, N_ITEMS = [4, 0, 20, 1], 70
SEED = torch.tensor([20_108])


@pytest.fixture(autouse=True)
def kernels_in_the_interpreter():
    with pretended_gpu(chip="interpreter"):
        yield


def batch(counts, rows, values_grad=False):
    """Clicks, as all rows in order or as a choice of rows with a repeated one."""
    clicks = random_clicks(LENGTHS, N_ITEMS, counts=counts)
    if values_grad:
        clicks.values.requires_grad_()
    return clicks.rows([2, 0, 2, 3, 1]) if rows else clicks


def gradients(call, leaves, dy):
    """call's value and its gradients for the leaves."""
    value = call(*leaves)
    return [value, *torch.autograd.grad(value, leaves, dy.to(value.dtype))]


def compare(op, dense, leaves, dy):
    """op against dense in fp64: at most twice the error of dense in the leaves' own dtype."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    actual = gradients(op, leaves, dy)
    same = gradients(dense, leaves, dy)
    truth = gradients(dense, [t.detach().double().requires_grad_() for t in leaves], dy)
    for a, s, t in zip(actual, same, truth, strict=True):
        assert a.shape == t.shape
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "rows", "bias", "dropout"),
    list(itertools.product([0, 1], [0, 1], [0, 1], [0.0, 0.5])),
)
def test_sparse_linear(dtype, counts, rows, bias, dropout):
    clicks = batch(bool(counts), rows)
    torch.manual_seed(0)
    # stored as nn.Linear does, not item by item: the op turns it round
    leaves = [torch.randn(8, N_ITEMS).to(dtype)]
    leaves += [torch.randn(8).to(dtype)] if bias else []
    x, keep = clicks.to_dense(), reference.dense_keep(clicks, SEED, dropout) if dropout else None
    compare(
        lambda w, b=None: sparse_linear(clicks, w, b, dropout=dropout, seed=SEED),
        lambda w, b=None: reference.sparse_linear(x.to(w.dtype), w, b, keep, dropout),
        leaves,
        torch.randn(clicks.n_users, 8),
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_sparse_linear_in_both_orders_of_its_sums(deterministic):
    torch.use_deterministic_algorithms(deterministic)
    clicks, weight = batch(True, True), torch.randn(8, N_ITEMS)
    x = clicks.to_dense()
    compare(
        lambda w: sparse_linear(clicks, w),
        lambda w: reference.sparse_linear(x.to(w.dtype), w),
        [weight],
        torch.randn(clicks.n_users, 8),
    )


@pytest.mark.parametrize("rows", [False, True], ids=["all-rows", "row-ids"])
def test_sparse_linear_values(rows):
    clicks = batch(True, rows, values_grad=True)
    weight, dy = torch.randn(8, N_ITEMS), torch.randn(clicks.n_users, 8)
    y = sparse_linear(clicks, weight, dropout=0.5, seed=SEED)
    (actual,) = torch.autograd.grad(y, [clicks.values], dy)
    whole = random_clicks(LENGTHS, N_ITEMS, counts=True)
    keep = reference.dense_keep(clicks, SEED, 0.5)
    x = whole.to_dense().double().requires_grad_()
    chosen = x if clicks.row_ids is None else x[clicks.row_ids]
    dense = reference.sparse_linear(chosen, weight.double(), None, keep, 0.5)
    (dx,) = torch.autograd.grad(dense, [x], dy.double())
    users = torch.repeat_interleave(whole.row_lengths())
    torch.testing.assert_close(
        actual.double(), dx[users, whole.indices.long()], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["all-rows", "row-ids"])
@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "column-major"])
def test_multinomial_nll(dtype, rows, transposed):
    clicks = batch(True, rows)
    torch.manual_seed(0)
    logits = (3 * torch.randn(N_ITEMS, clicks.n_users)).to(dtype).t()
    x = clicks.to_dense()
    compare(
        lambda z: multinomial_nll(z, clicks),
        lambda z: reference.multinomial_nll(z, x.to(z.dtype)),
        [logits if transposed else logits.contiguous()],
        torch.randn(clicks.n_users),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "bias"), list(itertools.product([0, 1], [0, 1])))
@pytest.mark.parametrize("max_bytes", [2**32, 1], ids=["one-buffer", "a-user-at-a-time"])
def test_linear_multinomial_nll(dtype, rows, bias, max_bytes):
    clicks = batch(True, rows)
    torch.manual_seed(0)
    leaves = [torch.randn(clicks.n_users, 8).to(dtype), torch.randn(N_ITEMS, 8).to(dtype)]
    leaves += [torch.randn(N_ITEMS).to(dtype)] if bias else []
    x = clicks.to_dense()
    compare(
        lambda h, w, b=None: linear_multinomial_nll(h, w, b, clicks, max_bytes=max_bytes),
        lambda h, w, b=None: reference.linear_multinomial_nll(h, w, b, x.to(h.dtype)),
        leaves,
        torch.randn(clicks.n_users),
    )
    with torch.no_grad():
        nll = linear_multinomial_nll(leaves[0], leaves[1], None, clicks, max_bytes=max_bytes)
    wanted = reference.linear_multinomial_nll(
        leaves[0].double(), leaves[1].double(), None, x.double()
    )
    torch.testing.assert_close(
        nll.double(), wanted, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-4
    )


def test_linear_multinomial_nll_under_autocast():
    # fp16, which the interpreter multiplies: fp32 weights are cast into a padded copy, gradients are fp32
    clicks = batch(True, True)
    torch.manual_seed(0)
    leaves = [torch.randn(clicks.n_users, 8), torch.randn(N_ITEMS, 8), torch.randn(N_ITEMS)]
    leaves = [t.half().float().requires_grad_() for t in leaves]
    dy, x = torch.randn(clicks.n_users), clicks.to_dense()
    # the pretended GPU's tensors are the CPU's to autocast
    with torch.autocast("cpu", torch.float16):
        actual = gradients(lambda h, w, b: linear_multinomial_nll(h, w, b, clicks), leaves, dy)
    assert [t.dtype for t in actual] == 4 * [torch.float32]
    assert not any(torch.equal(t, t.half().float()) for t in actual)
    near = [t.detach() * (1 + 1e-5) for t in leaves[:2]]
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(linear_multinomial_nll(*near, leaves[2], clicks), actual[0])
    half = [t.detach().half().requires_grad_() for t in leaves]
    same = gradients(lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x.half()), half, dy)
    double = [t.detach().double().requires_grad_() for t in leaves]
    truth = gradients(
        lambda h, w, b: reference.linear_multinomial_nll(h, w, b, x.double()), double, dy
    )
    for a, s, t in zip(actual, same, truth, strict=True):
        assert_as_accurate_as_torch(a, s, t)


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_training_steps_stay_with_the_cpus(make, way_of):
    clicks = random_clicks([4, 0, 20, 1, 9], N_ITEMS, counts=True)
    losses = {}
    for way in ("kernels", "cpu"):
        torch.manual_seed(0)
        model = make([4, 8, N_ITEMS], dropout_enc=[0.0, 0.0])
        optimizer = Adam(model.parameters())
        losses[way] = []
        for _ in range(3):
            torch.manual_seed(1)
            loss = model.loss(clicks.rows([4, 2, 0, 3]), beta=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[way].append(loss.item())
        way_of("cpu")
    assert losses["kernels"] == pytest.approx(losses["cpu"], rel=1e-5)


# what the ops promise


def promises(op, args):
    """Shapes, strides and dtypes of the op's results: as its fake says, and as they are."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    with mode:
        promised = op.fake(*fakes)
    given = op.plain(*args)
    described = []
    for results in (promised, given):
        results = results if isinstance(results, tuple) else (results,)
        described.append([(list(t.shape), t.stride(), t.dtype) for t in results])
    return described


def layouts(t):
    """The same numbers stored row by row, and column by column."""
    return (t, t.t().contiguous().t()) if t.ndim == 2 else (t,)


WAYS = pytest.mark.parametrize("way", ["kernels", "cpu"])


@pytest.fixture
def way_of():
    """A function that takes the GPU's way back where it is called with "cpu"."""
    # not the test's monkeypatch: this has to be undone before the pretended GPU is
    with pytest.MonkeyPatch.context() as patch:

        def choose(way):
            if way == "cpu":
                patch.setattr(torch.Tensor, "is_cuda", property(lambda _: False))

        yield choose


@WAYS
def test_fakes_of_sparse_linear(way, way_of):
    way_of(way)
    csr = batch(True, True).csr
    for weight in layouts(torch.randn(8, N_ITEMS)):
        casts = (None,) if way == "cpu" else (None, torch.randn(128, 8).half())
        for cast in casts:
            part = (torch.arange(5), torch.rand(5)) if cast is None else (None, None)
            args = (*csr, weight, torch.randn(8), cast, SEED, *part, 0.5, True, True, False)
            promised, given = promises(_SPARSE_LINEAR, args)
            assert promised == given
        nothing = (None,) * 5
        _, scale = _SPARSE_LINEAR.plain(*csr, weight, *nothing, 0.0, True, True, False)
        dpre = torch.randn(len(scale), 8)
        promised, given = promises(_DWEIGHT, (dpre, scale, *csr, None, None, N_ITEMS, 0.0, False))
        assert promised == given
        promised, given = promises(
            _DVALUES, (dpre, scale, weight, *csr, None, None, 0.0, True, False)
        )
        assert promised == given


@WAYS
def test_fakes_of_multinomial_nll(way, way_of):
    way_of(way)
    csr = batch(True, True).csr
    for logits in layouts(torch.randn(5, N_ITEMS)):
        promised, given = promises(_MULTINOMIAL_NLL, (logits, *csr))
        assert promised == given
        _, lse = _MULTINOMIAL_NLL.plain(logits, *csr)
        promised, given = promises(_DLOGITS, (torch.ones(5), logits, lse, *csr))
        assert promised == given


@WAYS
@pytest.mark.parametrize("compute", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n_hidden", [8, 2], ids=["bias-apart", "bias-in-the-product"])
def test_fakes_of_linear_multinomial_nll(way, compute, n_hidden, way_of):
    way_of(way)
    csr = batch(True, True).csr
    hiddens, weights = layouts(torch.randn(5, n_hidden)), layouts(torch.randn(N_ITEMS, n_hidden))
    for hidden, weight, max_bytes in itertools.product(hiddens, weights, (2**32, 1)):
        bias = torch.randn(N_ITEMS)
        args = (hidden, weight, bias, None, None, *csr, compute, True, max_bytes)
        promised, given = promises(_LINEAR_MULTINOMIAL_NLL, args)
        assert promised == given
        _, v, d, own = _LINEAR_MULTINOMIAL_NLL.plain(*args)
        used = own if own.numel() else weight
        needed = ((True, True, True), (False, True, False), (False, False, True))
        for needs, apart in itertools.product(needed, (False, True)):
            args = (
                torch.ones(()).expand(5),
                v,
                d,
                hidden,
                used,
                torch.randn(N_ITEMS),
                *csr,
                N_ITEMS,
            )
            promised, given = promises(_GRADIENTS, (*args, *needs, apart, torch.float32, max_bytes))
            assert promised == given


@WAYS
def test_fakes_of_sample_latent(way, way_of):
    way_of(way)
    for encoded in layouts(torch.randn(5, 6)):
        for noise in (None, torch.randn(5, 3)):
            promised, given = promises(_SAMPLE_LATENT, (encoded, noise))
            assert promised == given
            args = (encoded, noise, torch.randn(5, 3), torch.randn(5))
            promised, given = promises(_DENCODED, args)
            assert promised == given


def test_the_padding_of_the_buffer_is_written():
    # torch.library.opcheck compares whole results, padding included
    hidden, weight = torch.randn(5, 8), torch.randn(N_ITEMS, 8)
    csr = batch(True, True).csr
    args = (hidden, weight, None, None, None, *csr, torch.float32, True, 2**32)
    _, _, d, _ = _LINEAR_MULTINOMIAL_NLL.plain(*args)
    assert d.shape == (5, last_layer.stored_width(N_ITEMS))
    assert not d[:, N_ITEMS:].any()


def test_arrays_that_were_put_in_place_strided_are_read_in_order():
    x, expected = (batch(counts=True, rows=True) for _ in range(2))
    x.values, x.row_ids, x.indices, x.indptr = (
        torch.stack((t, t.flip(0)), 1)[:, 0] for t in (x.values, x.row_ids, x.indices, x.indptr)
    )
    logits = torch.linspace(-1, 1, 5 * N_ITEMS).reshape(5, N_ITEMS)
    for call in (
        lambda x: multinomial_nll(logits, x),
        lambda x: linear_multinomial_nll(logits[:, :8], logits.t()[:, [0] * 8], None, x),
        lambda x: sparse_linear(x, logits),
    ):
        torch.testing.assert_close(call(x), call(expected))


@pytest.mark.parametrize("n_items", [1, 127, 128, 129])
def test_the_optimisers_copy_is_as_wide_as_the_buffer(n_items):
    # kernels/ cannot say the width to what runs without triton: two numbers that have to agree
    weight = torch.nn.Parameter(torch.randn(n_items, 2))
    assert len(Shadow(weight).rows) == last_layer.stored_width(n_items)
