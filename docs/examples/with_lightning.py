"""Mult-VAE in Lightning: training, validation by NDCG@100 and checkpoints are those of lightning.Trainer."""

import lightning
from torch.utils.data import DataLoader

from fastvae import Adam, MultiVAE, evaluate


class LitMultiVAE(lightning.LightningModule):
    """A batch is Clicks: train.rows(ids); a validation batch is the pair of fold-in and held-out Clicks."""

    def __init__(self, p_dims, lr=1e-3, anneal_cap=0.2, total_anneal_steps=200_000):
        super().__init__()
        self.save_hyperparameters()
        self.model = MultiVAE(p_dims)

    def training_step(self, clicks, batch_idx):
        beta = min(self.hparams.anneal_cap, self.global_step / self.hparams.total_anneal_steps)
        loss = self.model.loss(clicks, beta)
        self.log("loss", loss, batch_size=len(clicks))
        return loss

    def validation_step(self, pair, batch_idx):
        self.log("ndcg@100", evaluate(self.model, *pair).to_dict()["ndcg@100"], batch_size=1)

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=self.hparams.lr)


def loaders(data, batch_size, device):
    """Of a fastvae.Dataset: the whole matrix lies on the device, and a batch is a choice of its rows."""
    train = data.train.to(device)
    batches = DataLoader(range(len(train)), batch_size, shuffle=True, collate_fn=train.rows)
    pair = tuple(part.to(device) for part in data.validation)
    return batches, DataLoader([pair], batch_size=None)
