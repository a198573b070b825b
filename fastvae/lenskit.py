"""LensKit components that score items by Mult-VAE and Mult-DAE: MultiVAEScorer, MultiDAEScorer.

    from lenskit.pipeline import topn_pipeline
    pipe = topn_pipeline(MultiVAEScorer(epochs=50))
    pipe.train(dataset)

Every interaction of the data set counts as a click, whatever its rating. A user is scored by the items of the query, so
users whom the training has not seen are scored too; without such items the scores are nan, as LensKit's own models give.
Source: lenskit 2025.8 and 2026.4, the protocols Component and Trainable.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch

from .clicks import Clicks
from .models import MultiDAE, MultiVAE
from .train import fit

try:
    from lenskit.data import Dataset, ItemList, QueryInput, RecQuery, Vocabulary
    from lenskit.pipeline import Component
    from lenskit.training import Trainable, TrainingOptions
    from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
except ModuleNotFoundError as error:
    if error.name != "lenskit":
        raise
    raise ImportError(
        "lenskit: the scorers need LensKit, which is missing; run pip install 'fastvae-cf[lenskit]'"
    ) from error


class MultiDAEConfig(BaseModel):
    """Settings of MultiDAEScorer: of the model, and of fastvae.fit, which says what they mean."""

    embedding_size: PositiveInt = 200
    hidden_sizes: list[PositiveInt] = [600]
    dropout: float = 0.5
    epochs: PositiveInt = 200
    batch_size: PositiveInt = 500
    learning_rate: PositiveFloat = 1e-3
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"


class MultiVAEConfig(MultiDAEConfig):
    """Settings of MultiVAEScorer."""

    anneal_cap: NonNegativeFloat = 0.2
    total_anneal_steps: NonNegativeInt = 200_000


class _Scorer(Component[ItemList], Trainable):
    """What the two scorers share.

    model  trained; None before
    items  LensKit's numbers of the items that it scores
    """

    config: MultiDAEConfig
    kind: ClassVar[type[MultiVAE] | type[MultiDAE]]
    model: MultiVAE | MultiDAE | None = None
    items: Vocabulary

    def is_trained(self) -> bool:
        """Whether there is a model to score by."""
        return self.model is not None

    def train(self, data: Dataset, options: TrainingOptions | None = None) -> None:
        """Train on the interactions of a data set; options give the device and the seed."""
        options = TrainingOptions() if options is None else options
        if self.is_trained() and not options.retrain:
            return
        clicks = Clicks.from_matrix(data.interactions().matrix().scipy()).binary()
        seed = int(options.random_generator().integers(2**31))
        model = self._new_model(clicks.n_items, seed)
        model.to(options.configured_device(gpu_default=True))
        settings = self.config
        more = {}
        if isinstance(settings, MultiVAEConfig):
            more["anneal_cap"] = settings.anneal_cap
            more["total_anneal_steps"] = settings.total_anneal_steps
        fit(
            model,
            clicks,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            lr=settings.learning_rate,
            precision=settings.precision,
            seed=seed,
            **more,  # type: ignore[arg-type]
        )
        self.model, self.items = model.eval(), data.items

    def _new_model(self, n_items: int, seed: int) -> MultiVAE | MultiDAE:
        settings = self.config
        p_dims = [settings.embedding_size, *settings.hidden_sizes[::-1], n_items]
        dropout = [settings.dropout, *(0.0 for _ in settings.hidden_sizes)]
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self.kind(p_dims, dropout)

    def __call__(self, query: QueryInput, items: ItemList) -> ItemList:
        """The items, each with its logit for the query's items as score; nan where one side is not known."""
        scores = np.full(len(items), np.nan, np.float32)
        history = RecQuery.create(query).query_items
        clicked = np.empty(0, np.int64) if history is None else self._places(history)
        clicked = np.unique(clicked[clicked >= 0])
        if len(clicked):
            places = self._places(items)
            known = places >= 0
            scores[known] = self._logits(clicked)[places[known]]
        return ItemList(items, scores=scores)

    def _places(self, items: ItemList) -> np.ndarray:
        return items.numbers(vocabulary=self.items, missing="negative")

    @torch.inference_mode()
    def _logits(self, clicked: np.ndarray) -> np.ndarray:
        """Logits of all items [n_items] for one user's."""
        assert self.model is not None
        clicks = Clicks([0, len(clicked)], clicked, n_items=self.model.n_items)
        device = next(self.model.parameters()).device
        result = self.model(clicks.to(device))
        logits = result[0] if isinstance(result, tuple) else result
        return logits[0].float().cpu().numpy()


class MultiVAEScorer(_Scorer):
    """Scores by Mult-VAE (Liang et al. 2018); settings: MultiVAEConfig."""

    config: MultiVAEConfig
    kind = MultiVAE


class MultiDAEScorer(_Scorer):
    """Scores by Mult-DAE (Liang et al. 2018); settings: MultiDAEConfig."""

    config: MultiDAEConfig
    kind = MultiDAE
