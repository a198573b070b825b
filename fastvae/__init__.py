"""fastvae: Mult-VAE and Mult-DAE on sparse clicks."""

# first: it waits for Ctrl-C while the command imports the rest
from . import _interrupt  # noqa: F401
from .adam import Adam
from .checkpoint import load_model
from .clicks import Clicks
from .data import Dataset
from .evaluate import evaluate, ndcg_at_k, recall_at_k
from .models import MultiDAE, MultiVAE, vae_loss_fn
from .ops import has_triton, linear_multinomial_nll, multinomial_nll, sparse_linear
from .recommend import recommend
from .step import GraphedStep
from .train import fit

__all__ = [
    "Adam",
    "Clicks",
    "Dataset",
    "GraphedStep",
    "MultiDAE",
    "MultiVAE",
    "evaluate",
    "fit",
    "has_triton",
    "linear_multinomial_nll",
    "load_model",
    "multinomial_nll",
    "ndcg_at_k",
    "recall_at_k",
    "recommend",
    "sparse_linear",
    "vae_loss_fn",
]
