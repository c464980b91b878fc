"""A second readout of a language model: the state before a title against a vector for each item of a domain.

An item's vector is made from its title by the model's own embeddings, plus a row that training moves away from zero. So
an item that came after training has a vector at once.

Suffixes: N items, D width, Q queries or positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from cprec.data.ragged import Ragged

FOLDER = "item_head"
"""In a model folder: where the weights of the head are, apart from those that other libraries read."""
_WEIGHTS = f"{FOLDER}/model.safetensors"
_PREFIX = f"{FOLDER}."
"""Before the names of the head's weights in a model that has it as a part."""


class ItemHead(nn.Module):
    """Vectors of a domain's items, and what turns a state of the model into one to multiply them with."""

    def __init__(self, titles: Ragged, width: int, dropout: float = 0.2) -> None:
        """`titles` are the tokens of each item's title, none empty; `dropout` is that of states in training."""
        super().__init__()
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.title = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.rows = nn.Parameter(torch.zeros(len(titles), width))
        self.state = nn.Linear(width, width)
        self._set_titles(titles)

    def _set_titles(self, titles: Ragged) -> None:
        for name, values in (("_tokens", titles.values), ("_starts", titles.offsets[:-1])):
            self.register_buffer(name, torch.from_numpy(values.astype(np.int64)), persistent=False)

    def vectors(self, embedding_VD: torch.Tensor) -> torch.Tensor:
        """The items' vectors, from the token embeddings of the model: ND."""
        assert isinstance(self._tokens, torch.Tensor) and isinstance(self._starts, torch.Tensor)
        pooled_ND = F.embedding_bag(self._tokens, embedding_VD, self._starts, mode="mean")
        return self.title(self.norm(pooled_ND)) + self.rows

    def states(self, hidden_QD: torch.Tensor) -> torch.Tensor:
        """What is multiplied with the vectors: QD."""
        return self.state(F.dropout(hidden_QD, self.dropout, self.training))

    def over(self, titles: Ragged, known: np.ndarray) -> ItemHead:
        """The same head over other items; `known` is the number that each has here, -1 for new ones, which have no row
        of their own."""
        head = ItemHead(titles, self.rows.shape[1], self.dropout).to(self.rows.device)
        weights = self.state_dict()
        rows = weights["rows"][torch.from_numpy(known).clamp(min=0)]
        rows[torch.from_numpy(known) < 0] = 0
        head.load_state_dict(weights | {"rows": rows})
        return head.train(self.training)


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a model that may have a head as its part `item_head`: those of the rest, and of the head."""
    of_head = {name: value for name, value in weights.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in weights.items() if name not in of_head}, of_head


def save_head(folder: Path, of_head: Mapping[str, torch.Tensor]) -> None:
    """Write the weights of a head, named as in its model, into a model folder."""
    (folder / _WEIGHTS).parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in of_head.items()}, folder / _WEIGHTS)


def load_head(folder: Path, titles: Ragged) -> ItemHead | None:
    """The head of a model folder, over the items that it was trained on; None where it has none."""
    if not (folder / _WEIGHTS).is_file():
        return None
    weights = {name.removeprefix(_PREFIX): value for name, value in load_file(folder / _WEIGHTS).items()}
    head = ItemHead(titles, weights["rows"].shape[1])
    head.load_state_dict(weights)
    return head.eval()
