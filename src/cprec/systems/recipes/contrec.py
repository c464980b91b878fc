"""ContRec: the next item is a vector, which a small diffusion head denoises from what read the history.

Qu et al. 2025, "Diffusion Generative Recommendation with Continuous Tokens". The control is SASRec (titles): an
encoder reads items by their given vectors and a row of their own, and learns the next one by a softmax over all items.
Beside it a head learns to tell the next item's token, a continuous vector, from noise and the encoder's state. A list
mixes the scores of the softmax with the distances of items' tokens from the one that the head ends at, `share` of which
counts; the noise that it begins at is fixed, so that a history always has the same list. The dispersive term keeps
states apart (`terms.dispersive`).

Deviations, as far as the paper's parts are known to us (no code was released): tokens are the given vectors in their
strongest directions (there a variational autoencoder of fixed variance makes several tokens of an item, with users' as
well); the encoder is causal attention (there a language model, whose own text is what is mixed in); the head tells the
token itself, and steps without noise. With `diffusion_weight=0` and `dispersive_weight=0` it is SASRec (titles) with a
softmax over all items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from cprec.choices import Choice, Real
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.systems.diffusion import Denoised, DiffusionHead, continuous_tokens
from cprec.systems.dot_product import DotProductRecommender, SequenceModel
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage, TrainedRecommender
from cprec.systems.terms import Term, dispersive


@dataclass(frozen=True, kw_only=True)
class ContRec(TitleSASRec):
    """Settings of ContRec; those of the head and the terms are ours."""

    sampled_items: int = 0
    token_size: int = 32
    """Numbers of an item's token, at most: the strongest directions of the given vectors."""
    diffusion_weight: float = 1.0
    """Weight of the head's loss; 0: there is no head."""
    num_steps: int = 10
    """Steps from noise to a token."""
    share: float = 0.2
    """Share of distances from the denoised token in a score; the rest is the softmax's. 1: distances alone."""
    dispersive_weight: float = 0.1
    """Weight of the term that keeps states apart; 0: there is none."""
    dispersive_temperature: float = 0.5
    """Mean squares of the difference of two states are divided by it."""

    LABEL: ClassVar[str] = "ContRec"
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **TitleSASRec.SEARCH,
        "diffusion_weight": Real(low=0.1, high=10.0, log=True),
        "share": Real(low=0.0, high=1.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("token_size", "num_steps", "dispersive_temperature")
        self.require_not_negative("diffusion_weight", "dispersive_weight")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share={self.share} must lie in 0..1: it is the share of distances in a score")
        if self.sampled_items or self.num_networks > 1:
            raise ConfigError(
                f"sampled_items={self.sampled_items}, num_networks={self.num_networks}: the head goes with one network "
                "and the softmax over all items, so leave both as they are"
            )

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """See `SystemSettings.make`."""
        return self.make_one(split, domain, seed=seed, folder=folder)

    def of_network(
        self, model: SequenceModel, data: TrainingSequences, seed: int, terms: Mapping[str, tuple[float, Term]] = {}
    ) -> Stage:
        """See `CausalSettings.of_network`. Raises Unsuitable for vectors that are all equal."""
        head = None
        if self.diffusion_weight:
            token_VF = continuous_tokens(model.items.given().numpy(), self.token_size)
            if not token_VF.any():
                raise Unsuitable(
                    f"all items of domain {data.domain!r} have the same vector, so no token tells them apart"
                )
            head = DiffusionHead(token_VF, self.hidden_size, num_steps=self.num_steps, seed=seed)
            terms = {**terms, "diffusion": (self.diffusion_weight, head)}
        if self.dispersive_weight:
            terms = {**terms, "dispersive": (self.dispersive_weight, dispersive(self.dispersive_temperature))}
        stage = super().of_network(model, data, seed, terms)
        if head is None:
            return stage

        def recommender() -> DotProductRecommender:
            return DotProductRecommender(self.LABEL, data, Denoised(model, head, self.share), self.max_length)

        return replace(stage, recommender=recommender)
