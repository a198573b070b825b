"""Prints the MiB that evaluating and recommending take on 1,200 users and 200,000 items beyond a block's own."""

from pathlib import Path

import numpy as np
import torch

from fastvae import Clicks, evaluate, recommend

N_ITEMS = 200_000


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.n_items = N_ITEMS
        self.items = torch.nn.Parameter(torch.randn(N_ITEMS, 4))

    def forward(self, clicks):
        part = clicks.compact()
        users = torch.nn.functional.embedding_bag(
            part.indices.long(), self.items, part.indptr[:-1], mode="sum"
        )
        return users @ self.items.t()


def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024


def clicks(n_users, per_user):
    indices = np.arange(n_users * per_user) * 7919 % N_ITEMS
    return Clicks(np.arange(n_users + 1) * per_user, indices, n_items=N_ITEMS)


model, fold_in, held_out = Model(), clicks(1200, 50), clicks(1200, 13)
model(fold_in.rows(range(16)))
before = peak()
evaluate(model, fold_in, held_out)
recommend(model, fold_in, k=20)
print(peak() - before)
