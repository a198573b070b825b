"""The other ways to compute the step: the dense model, plain to as fast as torch makes it; other sparse losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.provider import Captured, NotTimed, Provider
from fastvae import Clicks, MultiVAE, reference

ALIGNED = 64  # items that the padded model's width is a multiple of: its products then take the fast kernels
NEVER = -1e4  # bias of an item that is padding: its probability is 0, and stays so


def dense(model: MultiVAE, bf16: bool, tuned: bool, compiled: bool) -> Provider:
    """The reference model; tuned: fused Adam."""
    with _device(model):
        module = reference.MultiVAE(model.p_dims)
    module.load_state_dict(model.state_dict())
    adam = torch.optim.Adam(module.parameters(), lr=1e-3, **({"fused": True} if tuned else {}))
    loss = _compiled(module.loss) if compiled else module.loss
    # the dense batch is made outside the timed step: in its favour
    return Provider(module, loss, adam, Clicks.to_dense, bf16)


def padded_dense(model: MultiVAE, compiled: bool) -> Provider:
    """The strongest dense way: items padded, bf16, fused capturable Adam, the whole step in one CUDA graph."""
    *widths, n_items = model.p_dims
    n_padded = -(-n_items // ALIGNED) * ALIGNED
    with _device(model):
        module = reference.MultiVAE([*widths, n_padded])
    with torch.no_grad():
        for name, ours in model.state_dict().items():
            padded = module.get_parameter(name).zero_()
            padded[tuple(map(slice, ours.shape))] = ours
        module.decoder[-1].bias[n_items:] = NEVER
    adam = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True, capturable=True)
    loss = _compiled(module.loss) if compiled else module.loss

    def to_batch(clicks: Clicks) -> Tensor:
        return F.pad(clicks.to_dense(), (0, n_padded - n_items))

    return Captured(module, loss, adam, to_batch, True)


class EmbeddingBagModel(nn.Module):
    """The usual way out: embedding_bag for the first layer, dense log_softmax and a gather for the loss."""

    def __init__(self, model: MultiVAE):
        super().__init__()
        dense = reference.MultiVAE(model.p_dims)
        dense.load_state_dict(model.state_dict())
        self.table = nn.Parameter(dense.encoder[0].weight.detach().t().contiguous())
        self.bias = nn.Parameter(dense.encoder[0].bias.detach())
        self.second, (self.third, self.last) = dense.encoder[1], dense.decoder

    def to_batch(self, clicks: Clicks) -> tuple:
        """What loss takes, made outside the timed step."""
        return clicks, None

    def loss(self, batch: tuple, beta: float) -> Tensor:
        """Mean over users of nll + beta * kld."""
        clicks, target = batch[0].compact(), batch[1]
        item, lengths = clicks.indices.long(), clicks.row_lengths()
        user = torch.repeat_interleave(lengths)
        weights = lengths.float().rsqrt()[user]
        weights = F.dropout(weights, 0.5, self.training)
        h = F.embedding_bag(
            item, self.table, clicks.indptr[:-1], mode="sum", per_sample_weights=weights
        )
        mu, logvar = self.second(torch.tanh(h + self.bias)).chunk(2, 1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu) if self.training else mu
        nll = self.nll(torch.tanh(self.third(z)), user, item, target)
        return nll / len(clicks) + beta * reference.kld(mu, logvar).mean()

    def nll(self, hidden: Tensor, user: Tensor, item: Tensor, target: None) -> Tensor:
        """Summed over the batch."""
        return -torch.log_softmax(self.last(hidden), 1)[user, item].sum()


class SparseCrossEntropyModel(EmbeddingBagModel):
    """EmbeddingBagModel with PyG's loss, which also takes the targets as pairs."""

    def __init__(self, model: MultiVAE):
        try:
            from torch_geometric.utils.cross_entropy import sparse_cross_entropy
        except ImportError as error:
            raise NotTimed(f"torch_geometric is not installed ({error})") from error
        super().__init__(model)
        self.sparse_cross_entropy = sparse_cross_entropy

    def nll(self, hidden: Tensor, user: Tensor, item: Tensor, target: None) -> Tensor:
        """Summed over the batch."""
        logits = self.last(hidden)
        return self.sparse_cross_entropy(logits, torch.stack((user, item))) * len(logits)


class LinearCrossEntropyModel(EmbeddingBagModel):
    """EmbeddingBagModel with torch's linear_cross_entropy, whose targets are a dense matrix of probabilities."""

    def __init__(self, model: MultiVAE):
        if not hasattr(F, "linear_cross_entropy"):
            raise NotTimed(f"torch {torch.__version__} has no linear_cross_entropy")
        super().__init__(model)

    def to_batch(self, clicks: Clicks) -> tuple:
        """The dense target is made outside the timed step: in its favour."""
        return clicks, clicks.to_dense()

    def nll(self, hidden: Tensor, user: Tensor, item: Tensor, target: Tensor) -> Tensor:
        """Summed over the batch."""
        weight, bias = self.last.weight, self.last.bias
        return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="sum")


def sparse(model: MultiVAE, kind: type[EmbeddingBagModel]) -> Provider:
    """A model with a sparse first layer, and fused Adam, in fp32."""
    with _device(model):
        module = kind(model)
    adam = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
    return Provider(module, module.loss, adam, module.to_batch, False)


def _compiled(loss: Callable) -> Callable:
    # eager code in place of the ninth variant would flatter us
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # for one shape: after another provider's it would be compiled for any, and be slower
    return torch.compile(loss, dynamic=False)


def _device(model: MultiVAE) -> torch.device:
    return next(model.parameters()).device
