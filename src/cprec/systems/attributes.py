"""Items as their attributes in words, histories as runs of such items, and a model that compares both.

Suffixes: V items, A tokens of an item, R rows, T items of a history, L tokens of a run, D width, N targets, U different
items among them, M masked tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cprec.data.ragged import Ragged
from cprec.errors import Unsuitable
from cprec.systems.dot_product import DotProductModel, Rows, Vectors
from cprec.systems.signals import TrainingSequences, padded
from cprec.systems.terms import product_dtype
from cprec.text.tokenizer import encode_pieces, train_tokenizer
from cprec.train.loss import linear_cross_entropy

ATTRIBUTES = {"title": "title", "brand": "brand", "category": "categories"}
"""The key of each attribute, which is read as a word, and the column of the catalogue that it is in."""
VOCABULARY = 8192
"""Tokens of the tokenizer, at most."""
PADDING, START, MASK, NUM_SPECIAL = 0, 1, 2, 3
"""Tokens that are no words; those of the tokenizer, less its own, come after them."""
KEY, VALUE = 1, 2
"""Kinds of tokens; 0 is that of the start."""
NUM_KINDS = 3
READ_BATCH = 64
"""Rows that are read at once where nothing is trained."""


class Words(NamedTuple):
    """The attributes of a domain's items as tokens: each key with its value, those an item has, one after the other."""

    tokens: Ragged
    kinds: Ragged
    num_tokens: int
    """Of the vocabulary, those that are no words among them."""


def words_of(data: TrainingSequences, most: int) -> Words:
    """The attributes of a domain's items, each of at most `most` tokens with its key; a tokenizer is trained on them.
    Raises Unsuitable where no item has any."""
    rows = data.catalogue.rows_of(data.domain)
    texts = {key: [str(text) for text in getattr(data.catalogue, name)[rows]] for key, name in ATTRIBUTES.items()}
    pairs = [(row, key, text) for row in range(len(rows)) for key in ATTRIBUTES if (text := texts[key][row].strip())]
    if not pairs:
        raise Unsuitable(
            f"Recformer reads attributes, and no item of domain {data.domain!r} has a title, a brand or a category: "
            "take a system that needs no text"
        )
    tokenizer = train_tokenizer([f" {text}" for _, key, text in pairs for text in (key, text)], VOCABULARY)
    keys = dict(zip(ATTRIBUTES, encode_pieces(tokenizer, [f" {key}" for key in ATTRIBUTES]), strict=True))
    values = encode_pieces(tokenizer, [f" {text}" for _, _, text in pairs])
    found: list[list[int]] = [[] for _ in rows]
    kinds: list[list[int]] = [[] for _ in rows]
    for (row, key, _), value in zip(pairs, values, strict=True):
        # The tokenizer's own two tokens are first in its vocabulary.
        found[row] += [token + NUM_SPECIAL - 2 for token in (keys[key] + value)[:most]]
        kinds[row] += ([KEY] * len(keys[key]) + [VALUE] * len(value))[:most]
    return Words(Ragged.of(found), Ragged.of(kinds), len(tokenizer) + NUM_SPECIAL - 2)


class Runs(NamedTuple):
    """Rows of items as tokens, padded on the right: a start, then the attributes of the latest item, and so on back."""

    token_RL: torch.Tensor
    kind_RL: torch.Tensor
    item_RL: torch.Tensor
    """How manieth item from the latest a token is of, from 1; 0 at the start and in padding."""


class AttributeReader(nn.Module):
    """Reads runs: vectors of tokens, positions, kinds and items, added up, then blocks that read both ways.

    A token reads those within half a `window` on either side and the start, which reads all (Beltagy et al. 2020); with
    a window of 0 all read all. Where half a window is as long as a run, both are the same.
    """

    def __init__(
        self, words: Words, size: int, blocks: Sequence[nn.Module], *, max_items: int, max_tokens: int, window: int
    ) -> None:
        """Of a run the first `max_tokens` tokens are read, of at most `max_items` items."""
        super().__init__()
        self._max_items, self._max_tokens, self._window = max_items, max_tokens, window
        for name, values in (("token_XA", words.tokens), ("kind_XA", words.kinds)):
            rows = Ragged(values.values, np.append(values.offsets, values.offsets[-1]))  # an item of no token pads
            self.register_buffer(name, torch.from_numpy(padded(rows, PADDING)[0]), persistent=False)
        self.word, self.kind = nn.Embedding(words.num_tokens, size), nn.Embedding(NUM_KINDS, size)
        self.position, self.item = nn.Embedding(max_tokens, size), nn.Embedding(max_items + 1, size)
        self.first_norm, self.last_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.blocks = nn.ModuleList(blocks)

    def runs(self, items_RT: torch.Tensor) -> Runs:
        """Runs of rows of items, which are padded on the right with V."""
        token_XA, kind_XA = self.get_buffer("token_XA"), self.get_buffer("kind_XA")
        latest_RT = items_RT.flip(1)
        place_RT = (latest_RT < len(token_XA) - 1).cumsum(1)
        token_RL = token_XA[latest_RT].masked_fill((place_RT > self._max_items)[:, :, None], PADDING).flatten(1)
        # Tokens move to the left, in their order; padding comes after them.
        longest = min(int((token_RL != PADDING).sum(1).max()), self._max_tokens - 1)
        order_RL = (token_RL == PADDING).byte().argsort(dim=1, stable=True)[:, :longest]
        item_RL = place_RT[:, :, None].expand(-1, -1, token_XA.shape[1]).flatten(1)
        token_RL, kind_RL, item_RL = (
            each_RL.gather(1, order_RL) for each_RL in (token_RL, kind_XA[latest_RT].flatten(1), item_RL)
        )
        item_RL = item_RL.masked_fill(token_RL == PADDING, 0)
        return Runs(F.pad(token_RL, (1, 0), value=START), F.pad(kind_RL, (1, 0)), F.pad(item_RL, (1, 0)))

    def forward(self, runs: Runs) -> torch.Tensor:
        """The states of runs' tokens: RLD."""
        place_L = torch.arange(runs.token_RL.shape[1], device=runs.token_RL.device)
        added_RLD = (
            self.word(runs.token_RL) + self.position(place_L) + self.kind(runs.kind_RL) + self.item(runs.item_RL)
        )
        hidden_RLD = self.first_norm(added_RLD)
        mask_R1LL = self._readable(runs.token_RL != PADDING, place_L)
        for block in self.blocks:
            hidden_RLD = block(hidden_RLD, mask_R1LL)
        normed_RLD: torch.Tensor = self.last_norm(hidden_RLD)
        return normed_RLD

    def loss(self, hidden_MD: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
        """The summed cross-entropy of tokens, by products with their vectors."""
        return linear_cross_entropy(hidden_MD, self.word.weight, target_M, product_dtype())

    def _readable(self, is_token_RL: torch.Tensor, place_L: torch.Tensor) -> torch.Tensor:
        """Which tokens each may read: [R, 1, 1 or L, L]."""
        if not self._window:
            return is_token_RL[:, None, None]
        near_LL = (place_L[:, None] - place_L).abs() <= self._window // 2
        near_LL |= (place_L[:, None] == 0) | (place_L == 0)
        return (is_token_RL[:, None] & near_LL)[:, None]


class AttributeModel(DotProductModel):
    """A history is the state of its run's start, an item that of the run of it alone, both of length one. The matrix of
    all items is made anew only when it is asked for; it has no gradient."""

    def __init__(self, reader: AttributeReader, num_items: int, size: int) -> None:
        super().__init__()
        self.reader, self.num_items = reader, num_items
        self.register_buffer("items_VD", torch.zeros(num_items, size))

    def vectors(self) -> Vectors:
        items_VD = self.get_buffer("items_VD")
        return Vectors(items_VD, items_VD)

    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DotProductModel.states`: of rows with one target each."""
        return self.read(rows["items"]), rows["targets"]

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        return torch.cat([self.read(items_RT) for items_RT in rows["items"].split(READ_BATCH)])

    def read(self, items_RT: torch.Tensor) -> torch.Tensor:
        """The vectors of rows of items: RD."""
        return F.normalize(self.reader(self.reader.runs(items_RT))[:, 0], dim=1)

    @torch.no_grad()
    def read_all_items(self) -> None:
        """Make the matrix anew, without dropout."""
        was_training, items_VD = self.training, self.get_buffer("items_VD")
        self.eval()
        for items_R in torch.arange(self.num_items, device=items_VD.device).split(READ_BATCH):
            items_VD[items_R] = self.read(items_R[:, None])
        self.train(was_training)


class InBatch:
    """Contrast of histories with their next items: the cross-entropy, by cosines over a temperature, of each history's
    target among all targets of the step (Li et al. 2023). An item is read once."""

    def __init__(self, model: AttributeModel, temperature: float) -> None:
        self._model, self._temperature = model, temperature

    def __call__(
        self, hidden_ND: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        items_U, place_N = rows["targets"].unique(return_inverse=True)
        score_NU = hidden_ND @ self._model.read(items_U[:, None]).T / self._temperature
        return F.cross_entropy(score_NU, place_N, reduction="sum")


class MaskedWords(nn.Module):
    """Masked tokens of histories and of targets are predicted from their states: the mean over those of the histories,
    plus that over those of the targets, times the number of rows, by which the sum of a step is divided."""

    def __init__(self, reader: AttributeReader, size: int, share: float) -> None:
        super().__init__()
        self._runs, self._read, self._loss, self._share = reader.runs, reader.forward, reader.loss, share
        self.head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))

    def forward(
        self, hidden_ND: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        losses = [self._of(self._runs(items_RT)) for items_RT in (rows["items"], rows["targets"][:, None])]
        return torch.stack(losses).sum() * len(rows["targets"])

    def _of(self, runs: Runs) -> torch.Tensor:
        """The mean loss of a share of the tokens, drawn with torch's seed; 0 where none is drawn."""
        drawn_RL = torch.rand(runs.token_RL.shape, device=runs.token_RL.device) < self._share
        masked_RL = drawn_RL & (runs.token_RL >= NUM_SPECIAL)
        hidden_RLD = self._read(runs._replace(token_RL=runs.token_RL.masked_fill(masked_RL, MASK)))
        hidden_MD, target_M = self.head(hidden_RLD[masked_RL]), runs.token_RL[masked_RL]
        return self._loss(hidden_MD, target_M) / max(1, len(target_M))
