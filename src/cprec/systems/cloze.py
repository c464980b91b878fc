"""A cloze over the codes of the next item: a decoder that reads both ways fills in those of its codes that are masked.

Suffixes: N targets, or items of which some codes are known; L codes of an item, K codes of a level, D width, V items, R
rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from cprec.batch import IGNORE, Batch
from cprec.systems.batches import Passes, WindowStream
from cprec.systems.dot_product import Rows, SequenceModel
from cprec.systems.encoders import SelfAttention
from cprec.systems.items import MASK, IdTable, ItemTable
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM
from cprec.systems.terms import next_item
from cprec.train.trainable import decay_matrices


class CodeTable(ItemTable):
    """Items as sums of the rows of their codes."""

    def __init__(self, rows: IdTable, code_VL: np.ndarray, num_codes: int) -> None:
        """`rows` has a row for each code of each level, level by level, and the special rows after them."""
        super().__init__()
        self.num_items, self.num_special, self.rows, self.num_codes = len(code_VL), rows.num_special, rows, num_codes
        _, same_V, counts = np.unique(code_VL, axis=0, return_inverse=True, return_counts=True)
        self.register_buffer("codes", torch.from_numpy(code_VL), persistent=False)
        self.register_buffer("alike", torch.from_numpy(counts[same_V]), persistent=False)

    @property
    def code_VL(self) -> torch.Tensor:
        return self.get_buffer("codes")

    @property
    def alike_V(self) -> torch.Tensor:
        """How many items have all the codes of each item, itself included: int64."""
        return self.get_buffer("alike")

    def row_of(self, code_NL: torch.Tensor) -> torch.Tensor:
        """The numbers of the rows of codes: int64[N, L]."""
        return code_NL + torch.arange(code_NL.shape[1], device=code_NL.device) * self.num_codes

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        rows = self.rows.vectors()
        sums_VD = F.embedding(self.row_of(self.code_VL), rows).sum(1)
        whole = torch.cat([sums_VD, rows[self.rows.num_items :]])
        return whole if items is None else F.embedding(items, whole)

    def rows_LKD(self) -> torch.Tensor:
        """The rows of the codes of each level."""
        return self.rows.vectors()[: self.rows.num_items].unflatten(0, (-1, self.num_codes))


class CodeCloze(nn.Module):
    """Reads a history, and says how probable each code of the next item is, given some of its other codes.

    The decoder reads the history's last state and, after it, the rows of the codes of one item; a mask stands for those
    that are to be filled in. Without a decoder the state itself asks for each code, whatever the others are. Codes have
    the same rows in histories, in the decoder and at its output.
    """

    def __init__(self, items: CodeTable, encoder: SelfAttention, decoder: SelfAttention | None) -> None:
        super().__init__()
        self.items, self.history, self.decoder = items, SequenceModel(items, encoder), decoder

    def states(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The state of the history at each position with a target, and the targets: ND, N."""
        return self.history.states(self.history.vectors(), rows)

    def hidden(self, states_ND: torch.Tensor, code_NL: torch.Tensor, masked_NL: torch.Tensor) -> torch.Tensor:
        """What the rows of codes are multiplied with in each position: NLD. Codes that are masked are not read."""
        if self.decoder is None or not len(states_ND):
            return states_ND[:, None].expand(-1, code_NL.shape[1], -1)
        rows = self.items.rows
        row_NL = torch.where(masked_NL, rows.num_items + MASK, self.items.row_of(code_NL))
        # The encoder scales what it reads as rows of a table; a state is normed and stays as it is.
        state_N1D = states_ND[:, None] / states_ND.shape[1] ** 0.5
        lengths_N = torch.full((len(code_NL),), 1 + code_NL.shape[1], device=code_NL.device)
        hidden: torch.Tensor = self.decoder(torch.cat([state_N1D, rows.vectors(row_NL)], dim=1), lengths_N)
        return hidden[:, 1:]

    def log_probs(self, states_ND: torch.Tensor, code_NL: torch.Tensor, masked_NL: torch.Tensor) -> torch.Tensor:
        """The logarithm of each code's probability in each position: NLK."""
        hidden_NLD = self.hidden(states_ND, code_NL, masked_NL)
        return torch.einsum("nld,lkd->nlk", hidden_NLD, self.items.rows_LKD()).log_softmax(-1)


class ClozeStream(WindowStream):
    """Windows of training sequences; each position predicts codes of the item after it, those that `masked` says:
    bool[R, T, L]. How many are masked is uniform from one up to the most, and which ones is random; both depend on seed
    and step alone. The most grows from one to all of them in the first `growth` of the steps, in proportion."""

    def __init__(
        self, data: TrainingSequences, max_length: int, passes: Passes, *, num_levels: int, growth: float
    ) -> None:
        super().__init__(data, [NEXT_ITEM], max_length, passes)
        self._num_levels, self._growth = num_levels, growth

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        targets = batch.rows["targets"]
        generator = np.random.default_rng([self._seed, step, 5])
        growing = self._growth * self.num_steps
        most = 1 + (self._num_levels - 1) * (min(1.0, step / growing) if growing else 1.0)
        num_RT = 1 + (generator.random(targets.shape) * most).astype(np.int64)
        place_RTL = generator.random((*targets.shape, self._num_levels)).argsort(-1).argsort(-1)
        masked = (place_RTL < num_RT[..., None]) & (targets != IGNORE)[..., None]
        return replace(batch, rows={**batch.rows, "masked": masked}, counts={NEXT_ITEM: int(masked.sum())})


class ClozeLoss:
    """The masked codes' negative log-probability, given the history and the codes that are not masked, as a
    `Trainable`.

    With `guided`, as many codes of a target are masked as its row says, but those that the network, when all are
    masked, is least sure of; the others are filled in first when it ranks (see `paths`).
    """

    def __init__(self, model: CodeCloze, *, guided: bool = False) -> None:
        self.module, self._guided = model, guided
        self._softmax = next_item("softmax")

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        model = self.module
        states_ND, target_N = model.states(rows)
        masked_NL = rows["masked"][rows["targets"] != IGNORE]
        code_NL = model.items.code_VL[target_N]
        if self._guided:
            masked_NL = least_sure(model, states_ND.detach(), masked_NL.sum(1))
        hidden_NLD, rows_LKD = model.hidden(states_ND, code_NL, masked_NL), model.items.rows_LKD()
        terms = [
            self._softmax(hidden_NLD[at_N, level], code_NL[at_N, level], rows_LKD[level])
            for level, at_N in enumerate(masked_NL.T)
        ]
        return {NEXT_ITEM: sum(terms[1:], terms[0])}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return decay_matrices(self.module, weight_decay)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")


def sureness(log_NLK: torch.Tensor, masked_NL: torch.Tensor) -> torch.Tensor:
    """How probable the likeliest code is in each position, as a logarithm; -inf where it is known: NL."""
    return log_NLK.amax(2).masked_fill(~masked_NL, -torch.inf)


@torch.no_grad()
def least_sure(model: CodeCloze, states_ND: torch.Tensor, num_N: torch.Tensor) -> torch.Tensor:
    """The `num_N` positions of each item whose codes the model is least sure of when all are masked, of equals the
    last ones: bool[N, L]."""
    num_levels = model.items.code_VL.shape[1]
    all_NL = torch.ones(len(states_ND), num_levels, dtype=torch.bool, device=states_ND.device)
    sure_NL = sureness(model.log_probs(states_ND, torch.zeros_like(all_NL, dtype=torch.int64), all_NL), all_NL)
    place_NL = sure_NL.argsort(dim=1, descending=True, stable=True).argsort(1)
    return place_NL >= num_levels - num_N[:, None]
