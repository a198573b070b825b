"""The ops: one file each, named as in kernels/ and in reference.py."""

from ._dispatch import has_triton
from .linear_multinomial_nll import linear_multinomial_nll
from .multinomial_nll import multinomial_nll
from .sample_latent import sample_latent
from .sparse_linear import sparse_linear

__all__ = [
    "has_triton",
    "linear_multinomial_nll",
    "multinomial_nll",
    "sample_latent",
    "sparse_linear",
]
