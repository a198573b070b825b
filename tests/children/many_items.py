"""Prints the GiB that an epoch and an evaluation on 319,205 items take at most."""

import resource

import numpy as np
import scipy.sparse as sp

from fastvae import Dataset, MultiVAE, evaluate, fit

rng = np.random.default_rng(0)
n_users, n_items, nnz = 63_577, 319_205, 1_000_000
pairs = rng.integers(0, n_users, nnz), rng.integers(0, n_items, nnz)
data = Dataset.from_matrix(sp.coo_array((np.ones(nnz, np.float32), pairs), (n_users, n_items)), 200)
assert data.n_items > 250_000
model = MultiVAE([8, data.n_items])
fit(model, data.train.rows(range(500)), epochs=1, batch_size=500)
assert evaluate(model, data.test_tr, data.test_te).n_evaluated > 150
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
