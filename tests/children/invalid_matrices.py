"""Prints what Clicks.from_matrix says of each invalid matrix, a line of JSON each: a crash shows as lines that lack."""

import json
import warnings

import numpy as np
import scipy.sparse as sp
import torch

from fastvae import Clicks

ONES, SHAPE = np.ones(2), (2, 5)


def changed(matrix, **arrays):
    """A scipy matrix with some of its arrays replaced, which scipy does not look at."""
    for name, array in arrays.items():
        setattr(matrix, name, array)
    return matrix


def compressed(make, *arrays, shape=SHAPE):
    """A torch tensor of compressed rows or columns that torch does not check."""
    return make(*(torch.tensor(array) for array in arrays), shape, check_invariants=False)


def scipy(make, indptr, indices=(0, 1), shape=SHAPE):
    valid = make(
        (
            np.ones(len(indices)),
            np.zeros(len(indices), int),
            [0] * (shape[make is sp.csc_matrix]) + [len(indices)],
        ),
        shape=shape,
    )
    return changed(valid, indptr=np.array(indptr), indices=np.array(indices))


def lil(rows, data):
    matrix = sp.lil_array(SHAPE)
    for n, (row, values) in enumerate(zip(rows, data, strict=True)):
        matrix.rows[n], matrix.data[n] = row, values
    return matrix


def dok(*places):
    matrix = sp.dok_array(SHAPE)
    matrix._dict.update(dict.fromkeys(places, 1.0))
    return matrix


def coo(row, col):
    return changed(
        sp.coo_array((ONES, ([0, 1], [0, 1])), shape=SHAPE), coords=(np.array(row), np.array(col))
    )


def unsafe(indices):
    return torch.sparse_coo_tensor(
        torch.tensor(indices), torch.ones(2), SHAPE, check_invariants=False
    )


csr, csc, bsr = torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_bsr_tensor
LARGE = np.append(np.arange(200_000) * 7, 3)
CASES = {
    "torch csr falls": lambda: compressed(csr, [0, 3, 2], [0, 1], [1.0, 1.0]),
    "torch csr below 0": lambda: compressed(csr, [0, -1, 2], [0, 1], [1.0, 1.0]),
    "torch csr past the end": lambda: compressed(csr, [0, 1, 9], [0, 1], [1.0, 1.0]),
    "torch csr short": lambda: compressed(csr, [0, 1, 1], [0, 1], [1.0, 1.0]),
    "torch csr column": lambda: compressed(csr, [0, 1, 2], [0, 5], [1.0, 1.0]),
    "torch csc falls": lambda: compressed(csc, [0, 3, 2, 2, 2, 2], [0, 1], [1.0, 1.0]),
    "torch csc row": lambda: compressed(csc, [0, 1, 2, 2, 2, 2], [0, 2], [1.0, 1.0]),
    "torch bsr falls": lambda: compressed(bsr, [0, 3, 2], [0, 1], [[[1.0]], [[1.0]]]),
    "torch bsr column": lambda: compressed(bsr, [0, 1, 2], [0, 2], [[[1.0] * 2], [[1.0] * 2]], shape=(2, 4)),
    "torch coo row": lambda: unsafe([[0, 3], [0, 1]]),
    "torch coo below 0": lambda: unsafe([[0, -1], [0, 1]]),
    "torch coo column": lambda: unsafe([[0, 1], [0, 5]]),
    "scipy csr falls": lambda: sp.csr_matrix((ONES, [0, 1], [0, 3, 2]), shape=SHAPE),
    "scipy csr other users": lambda: scipy(sp.csr_matrix, [0, 4, 1, 5], range(5), (3, 5)),
    "scipy csr past the end": lambda: scipy(sp.csr_matrix, [0, 1, 9]),
    "scipy csr too few rows": lambda: scipy(sp.csr_matrix, [0, 2]),
    "scipy csr column": lambda: scipy(sp.csr_matrix, [0, 1, 2], [0, -1]),
    "scipy csr data": lambda: changed(sp.csr_matrix((ONES, [0, 1], [0, 1, 2]), shape=SHAPE), data=np.ones(1)),
    "scipy csr large": lambda: scipy(sp.csr_matrix, LARGE, range(3), (200_000, 5)),
    "scipy csc falls": lambda: scipy(sp.csc_matrix, [0, 3, 2, 2, 2, 2]),
    "scipy csc row": lambda: scipy(sp.csc_matrix, [0, 1, 2, 2, 2, 2], [0, 9]),
    "scipy bsr column": lambda: changed(
        sp.bsr_array(np.ones((2, 4)), blocksize=(1, 2)), indices=np.array([0, 9, 0, 1])
    ),
    "scipy coo row": lambda: coo([0, 3], [0, 1]),
    "scipy coo below 0": lambda: coo([0, -1], [0, 1]),
    "scipy coo lengths": lambda: coo([0, 1, 1], [0, 1, 2]),
    "scipy lil column": lambda: lil([[0], [7]], [[1.0], [1.0]]),
    "scipy lil lengths": lambda: lil([[0], []], [[1.0], [1.0] * 1000]),
    "scipy dok place": lambda: dok((0, 0), (2, 1)),
}  # fmt: skip

warnings.simplefilter("ignore")
for name, make in CASES.items():
    try:
        said = f"accepted: {Clicks.from_matrix(make()).to_dense().tolist()}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said]), flush=True)
