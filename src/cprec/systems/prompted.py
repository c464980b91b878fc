"""Rows of codes as prompts: several tasks, told apart by their first token, and vectors of items' places.

Suffixes: R rows, U prompts, M new nodes of a tree, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cprec.data.ragged import Ragged, gather
from cprec.models import trunk_and_head
from cprec.systems.batches import Passes
from cprec.systems.codes import END, ItemCodes
from cprec.systems.generator import CodeStream
from cprec.systems.signals import TrainingSequences, windows


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks that rows may teach, the first of which is to read whole windows; an entry of each field for each task."""

    weights: Sequence[float]
    """In proportion to their chances."""
    marks: Sequence[int]
    """The first tokens of their rows."""
    num_before: Sequence[int]
    """Items that stand before the last one, at most."""


class TaskStream(CodeStream):
    """The rows of `CodeStream`, each for a task that is drawn anew for each step. For the first task a row is its
    window; for others it ends with an event of the window, not the first one, that is drawn as well."""

    def __init__(
        self, data: TrainingSequences, codes: ItemCodes, max_length: int, passes: Passes, tasks: Tasks
    ) -> None:
        super().__init__(data, codes, max_length, passes)
        self._codes, self._windows = codes, windows(data.sequences, max_length)
        self._chances = np.array(tasks.weights) / np.sum(tasks.weights)
        self._marks, self._num_before = np.array(tasks.marks), np.array(tasks.num_before)

    def rows(self, members: np.ndarray, step: int) -> Ragged:
        """See `CodeStream.rows`."""
        generator = np.random.default_rng([self._seed, step, 5])
        task_R = generator.choice(len(self._marks), len(members), p=self._chances)
        taken = self._windows.take(members)
        last_R = np.where(task_R == 0, taken.lengths - 1, generator.integers(1, taken.lengths))
        first_R = np.maximum(last_R - self._num_before[task_R], 0)
        tokens = self._codes.prompts(gather(taken.values, taken.offsets[:-1] + first_R, last_R - first_R + 1))
        tokens.values[tokens.offsets[:-1]] = self._marks[task_R]
        return tokens


def add_whole_words(model: Any, num_places: int) -> None:
    """Add to each token's input vector that of its item's place in the row, which binds the tokens of an item (the
    whole-word embedding of Geng et al. 2022). The first token has place 0, the tokens of the n-th item, its END among
    them, place n.

    These vectors are trained and start at zero. A `PromptTree` reads them as well: its nodes are tokens of the item
    after the prompt.
    """
    trunk, head = trunk_and_head(model)
    trunk.words = nn.Embedding.from_pretrained(torch.zeros(num_places, head.weight.shape[1]), freeze=False)
    trunk.register_forward_pre_hook(_with_words, with_kwargs=True)


def _with_words(trunk: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    (ids,), tree = arguments or (given.pop("input_ids"),), given.get("tree")
    if getattr(tree, "users", None) is None:
        ends_RT = ids == END
        # An END belongs to the item that it closes. Padding behind a full row has the last place, which nobody reads.
        place = (ends_RT.cumsum(1) - ends_RT.long() + 1).clamp(max=trunk.words.num_embeddings - 1)
        place[:, 0] = 0
    else:
        assert tree is not None
        num_items_U = torch.tensor([np.count_nonzero(prompt == END) for prompt in tree.prompts], device=ids.device)
        place = num_items_U[tree.users][None] + 1
    return (), {**given, "inputs_embeds": trunk.wte(ids) + trunk.words(place)}
