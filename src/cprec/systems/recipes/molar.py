"""Molar: items are what they say and show, and users are aligned late with those of a model of ids (Luo et al. 2024).

A multimodal language model makes vectors of items, a second one reads histories of them, as in HLLM, with its loss. A
SASRec, which knows items by their ids, has vectors of the same histories. The vector of a history is to be near the one
that the SASRec has of it, and far from those that it has of the other histories of a step. So ids never are part of an
item, and any item with a text or an image can be ranked. Deviations:

- The public code is HLLM over texts and images, without an alignment. What the paper leaves open of it is ours: cosines
  over a temperature in one direction, at the last position of a window, after a matrix; the SASRec is trained first,
  with these settings' decay, and stays as it is.
- Items are vectors from files (of texts, images or both) or a language model's states of titles, or a sum of the two,
  each through a small network (there one multimodal model reads text and image together, and is tuned beforehand on
  three tasks: images and texts, attributes, behaviour).
- SASRec's blocks read histories by default, with `reader="base"` blocks of the language model. Deviations of HLLM hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cprec.errors import ConfigError
from cprec.provenance import file_sha256
from cprec.systems.dot_product import states_of
from cprec.systems.items import FrozenTable, ItemTable, TablesTogether, read_vectors, two_layers
from cprec.systems.recipes.hllm import HLLM
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.terms import LateAlignment


@dataclass(frozen=True, kw_only=True)
class Molar(HLLM):
    """Settings of Molar: those of HLLM without rows of items' own; all of the alignment is ours."""

    own_rows: bool = False
    vectors: str = ""
    """An .npz file with `item_id` and `vectors` of the domain's items, in place of what a language model makes of
    titles; empty: it reads them."""
    images: str = ""
    """An .npz file like `vectors`, of the items' images, which are added; empty: there are none."""
    alignment_weight: float = 0.1
    """Weight of the alignment; 0: there is none, and no SASRec is trained."""
    alignment_temperature: float = 0.1
    """Cosines in the alignment are divided by it."""
    item_epochs: float = 60
    """Passes of the SASRec over the training rows."""
    item_steps: int = 600
    """Optimizer steps of the SASRec at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("alignment_temperature", "item_epochs")
        self.require_not_negative("alignment_weight", "item_steps")
        if self.base and not self.needs_language:
            raise ConfigError(
                f"base={self.base} and vectors={self.vectors}: give one, or reader=base, which needs both"
            )

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of files counts, not their place."""
        files = {name: getattr(self, name) for name in ("vectors", "images")}
        return super().identity() | {name: file_sha256(path) for name, path in files.items() if path}

    @property
    def needs_language(self) -> bool:
        """See `LanguageSettings.needs_language`: not over given vectors, unless its blocks read histories."""
        return not self.vectors or self.reader == "base"

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Raises ConfigError for files that are not of the items."""
        model = self.towers(data, seed)
        if not self.alignment_weight:
            return [self.of_towers(model, data, seed)]
        ids = SASRec(max_length=self.max_length, num_epochs=self.item_epochs, min_steps=self.item_steps)
        sasrec, size = ids.network(ids.frozen(data)), ids.hidden_size
        align = LateAlignment(partial(states_of, sasrec), self.hidden_size, size, self.alignment_temperature)
        aligned = self.of_towers(model, data, seed, alignment=(self.alignment_weight, align))
        return [ids.of_network(sasrec, data, seed), aligned]

    def items(self, data: TrainingSequences, language: Any) -> ItemTable:
        """See `HLLM.items`: of the files or titles, or the sum of both."""
        tables: list[ItemTable] = [] if self.vectors else [super().items(data, language)]
        for path in filter(None, (self.vectors, self.images)):
            vectors_VF, rows = read_vectors(path, data.item_ids), self.hidden_size if self.own_rows else None
            adapter = two_layers(vectors_VF.shape[1], self.hidden_size)
            tables.append(FrozenTable(vectors_VF, adapter, rows=None if tables else rows))
        return tables[0] if len(tables) == 1 else TablesTogether(tables)
