"""SASRec over vectors of titles: what an item is comes from its text, and what it adds to that is learnt.

An item's vector is its frozen text vector through a small network, plus a row of its own that starts at zero; the rest
is SASRec with the softmax over all items, or over a sample of a large catalogue. Near to UniSRec (Hou et al. 2022),
which has a mixture of experts as the network and rows instead of none or all, and to HLLM (Chen et al. 2024), which
trains the text encoder too. The vectors are TF-IDF of titles reduced by SVD unless a file of vectors is given; the item
head of a language model gives its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.torch import load_file
from scipy.linalg import orthogonal_procrustes
from torch import nn

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.titles import ALIKE
from cprec.errors import ConfigError
from cprec.provenance import file_sha256
from cprec.systems.dot_product import DotProductModel, SequenceModel
from cprec.systems.encoders import BlockKind
from cprec.systems.items import NUM_SPECIAL, FrozenTable, two_layers, write_vectors
from cprec.systems.recipes.sasrec import INITIAL, CausalRecommender, CausalSettings
from cprec.systems.settings import TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.vectors import TitleSpace

LENGTH = 5.0
"""The length of TF-IDF vectors, about that of a language model's coordinates in an item head: with vectors of length
one the network learns less (docs/experiments.md)."""
ROWS = "items.rows"
"""The weights that belong to items, one row each."""


@dataclass(frozen=True, kw_only=True)
class TitleSASRec(TextSettings, CausalSettings):
    """Settings of SASRec over vectors of titles, chosen on the validation queries of Amazon Scientific, Amazon Beauty
    and MovieLens-100K (docs/experiments.md)."""

    hidden_size: int = 192
    block: BlockKind = "query_norm"
    dropout: float = 0.4
    attention_dropout: float = 0.4
    learning_rate: float = 1e-3
    beta2: float = 0.999
    weight_decay: float = 0.05
    sorted_batches: int = 1
    num_epochs: float = 8
    min_steps: int = 600
    sampled_items: int = 2048
    text_size: int = 384
    own_rows: bool = True
    """Each item has a row of its own; without, an item is its text alone, and the same network serves other items."""
    start: str = ""
    """A .safetensors file of the weights to start from, those of a network without rows that has the same `block` and
    `num_heads`, which the file does not say; empty: random ones."""

    LABEL: ClassVar[str] = "a network over titles"

    def frozen(self, data: TrainingSequences) -> np.ndarray:
        """See `TextSettings.frozen`. Vectors of a file are taken as they are."""
        vectors_VF = super().frozen(data)
        return vectors_VF if self.vectors else LENGTH * vectors_VF

    def shaped_like(self, other: CausalSettings) -> TitleSASRec:
        """These settings with the network of others, whose weights then fit."""
        shape = ("hidden_size", "max_length", "num_blocks", "num_heads", "block")
        return replace(self, **{name: getattr(other, name) for name in shape})

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"start": file_sha256(self.start)} if self.start else {})

    def network(self, frozen_VF: np.ndarray) -> SequenceModel:
        """See `CausalSettings.network`. Raises ConfigError where the weights to start from are of another network."""
        size = self.hidden_size
        adapter = two_layers(frozen_VF.shape[1], size)
        encoder = self.encoder()
        nn.init.normal_(encoder.position.weight, std=INITIAL)
        model = SequenceModel(FrozenTable(frozen_VF, adapter, rows=size if self.own_rows else None), encoder)
        if self.start:
            untrained = {ROWS: model.state_dict()[ROWS]} if self.own_rows else {}
            try:
                model.load_state_dict(load_file(self.start) | untrained)
            except RuntimeError as error:
                raise ConfigError(f"start={self.start} holds weights of another network: {error}") from None
        return model

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> TitleSASRecRecommender:
        return TitleSASRecRecommender(replace(self, start=""), data, model)


class TitleSASRecRecommender(CausalRecommender):
    """Ranks by a trained SASRec over vectors of titles."""

    SETTINGS = TitleSASRec
    _trained: TitleSASRecRecommender | None = None
    """The one over the catalogue of training, where this is over another."""

    def with_catalogue(self, catalogue: Catalogue) -> TitleSASRecRecommender | None:
        """See `StoredRecommender.with_catalogue`: a new item has the vector of its title, and in place of a row of its
        own the mean of those of `ALIKE` items with the most similar titles, weighed by their cosines. None where the
        vectors are those of a file."""
        before = self._trained or self
        if self.settings.vectors:  # type: ignore[attr-defined]
            return None
        arrays, place_N = before.arrays(), catalogue.places_in(before.catalogue, self.domain)
        new_N, num_before = place_N < 0, len(arrays["vectors"])
        trained = {name: weights[:num_before] for name, weights in arrays.items() if name.endswith(ROWS)}
        for name, row_ND in trained.items():
            arrays[name] = np.concatenate([row_ND[place_N], arrays[name][num_before:]])
        arrays["vectors"] = arrays["vectors"][place_N]
        if new_N.any():
            titles = [title for title, is_new in zip(catalogue.titles_of(self.domain), new_N, strict=True) if is_new]
            arrays["vectors"][new_N] = before._vectors_of(titles)
            alike_MN = before._space.words.nearest(titles, ALIKE)
            for name, row_ND in trained.items():
                arrays[name][:-NUM_SPECIAL][new_N] = alike_MN @ row_ND
        made = self.from_arrays(arrays, catalogue)
        made._trained = before
        return made

    @cached_property
    def _space(self) -> TitleSpace:
        """The directions of its titles' words: made when the first item comes."""
        return TitleSpace(self.catalogue.titles_of(self.domain), self.settings.text_size)  # type: ignore[attr-defined]

    @cached_property
    def _turn_FF(self) -> np.ndarray:
        """Turns these directions to those that were learnt: another machine may find those of equal strength turned."""
        turn_FF, _ = orthogonal_procrustes(self._space.vectors, self.model.items.given().cpu().numpy())
        return turn_FF

    def _vectors_of(self, titles: Sequence[str]) -> np.ndarray:
        """Vectors of titles in the directions that were learnt: float32[N, F]."""
        return np.asarray(LENGTH * self._space.of(titles) @ self._turn_FF, dtype=np.float32)

    def write_vectors(self, path: str | Path) -> None:
        """Write the vectors of the items' titles, as `TextSettings.vectors` reads them."""
        item_ids = self.catalogue.item_id[self.catalogue.rows_of(self.domain)]
        write_vectors(path, list(map(str, item_ids)), self.model.items.given().cpu().numpy())


AVERAGED = TitleSASRec(num_networks=3)
"""As many networks as an item head of the recipe `open_llm`, over words: what such a head has of its language model is
what it is ahead of this."""
