"""fastvae: Mult-VAE and Mult-DAE on sparse clicks."""

from .clicks import Clicks
from .models import MultiDAE, MultiVAE, vae_loss_fn
from .ops import linear_multinomial_nll, multinomial_nll, sparse_linear

__all__ = [
    "Clicks",
    "MultiDAE",
    "MultiVAE",
    "linear_multinomial_nll",
    "multinomial_nll",
    "sparse_linear",
    "vae_loss_fn",
]
