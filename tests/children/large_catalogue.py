"""Saves and loads a dataset of 319,205 items; prints the memory that it took, in MiB."""

import resource
import sys

import numpy as np
import scipy.sparse as sp

from fastvae.data import Dataset

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(0)
n_users, n_items, nnz = 63_577, 319_205, 1_000_000
pairs = rng.integers(0, n_users, nnz), rng.integers(0, n_items, nnz)
x = sp.coo_array((np.ones(nnz, np.float32), pairs), (n_users, n_items))
Dataset.from_matrix(x, n_heldout=0.1).save(sys.argv[1])
dataset = Dataset.load(sys.argv[1])
assert dataset.train.nnz > 700_000 and dataset.train.n_items > 250_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
