"""Preference: a model learns to prefer what came next to other titles, by more than it did before (S-DPO).

Suffixes: R rows, T tokens in a row, N targets, M titles, G groups of a chosen title and those rejected beside it, X
titles of a group, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from cprec import distributed
from cprec.batch import IGNORE, Batch
from cprec.data.ragged import offsets_of, places
from cprec.models import trunk_and_head
from cprec.progress import track
from cprec.text.stream import TokenStream, one_phase
from cprec.train.loss import CHUNK, PackedLoss

PREFERENCE = "preference"
"""The loss term, a mean over events with a next item."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What a model is to prefer."""

    num_rejected: int
    """Titles that are set against each chosen one."""
    beta: float
    """What the gain of a title in logarithmic probability is multiplied by: see `softmax_dpo`."""


class PreferenceStream(TokenStream):
    """Batches of trees that learn titles alone: after an event the chosen one, then `num_rejected` others.

    They also have `titles`, int64[R, T]: where the token that follows begins a title, the title's number among those of
    all trees in the shards, else IGNORE.
    """

    def __init__(self, *arguments: Any, num_rejected: int, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._num_rejected = num_rejected

    @property
    def num_titles(self) -> int:
        """Of all trees in the shards."""
        return int(self._titles_before[-1])

    @cached_property
    def _titles_before(self) -> np.ndarray:
        """How many titles begin before each token of the shards: int64[tokens + 1]."""
        branches = self.corpus.groups[0].shards.branches
        assert branches is not None and len(self.corpus.groups) == 1
        return offsets_of(_begins(branches.is_target))

    def batch(self, step: int) -> Batch:
        """See `TokenStream.batch`."""
        batch, (group,) = super().batch(step), self.corpus.groups
        start, length = (group.shards.column(name)[group.documents[batch.examples]] for name in ("offset", "length"))
        first = self._titles_before[start]
        targets = batch.rows["targets"]
        titles, begins = np.full(targets.shape, IGNORE), _begins(targets.ravel() != IGNORE).reshape(targets.shape)
        titles[begins] = places(first, self._titles_before[start + length] - first)
        num_groups = int(begins.sum()) // (1 + self._num_rejected)
        return replace(
            batch,
            rows={**batch.rows, "titles": titles},
            counts={**batch.counts, PREFERENCE: num_groups},
            blank={**batch.blank, "titles": IGNORE},
        )

    def once(self, rows_per_step: int) -> PreferenceStream:
        """All trees of the corpus, each once."""
        phases, shape = one_phase(self.corpus.lengths.sum()), {"row_tokens": self.row_tokens, "seed": 0}
        return PreferenceStream(
            self.corpus, phases, rows_per_step=rows_per_step, num_rejected=self._num_rejected, **shape
        )


def _begins(is_target: np.ndarray) -> np.ndarray:
    """Where titles begin: at targets that stand behind none."""
    return is_target & ~np.append(False, is_target[:-1])


def softmax_dpo(gain_GX: torch.Tensor, beta: float) -> torch.Tensor:
    """Summed loss of groups of titles, the first of each being the chosen one (Chen et al. 2024, "On Softmax Direct
    Preference Optimization for Recommendation", their loss of several negatives).

    A title's gain is its logarithmic probability less that by the model before training. With the chosen title's gain w
    and those of the rejected ones l, a group costs

        -log sigmoid(-log sum_l exp(beta (l - w))) = log(1 + sum_l exp(beta (l - w))),

    the cross-entropy of the chosen title in the softmax of beta times the gains. With one rejected title it is DPO
    (Rafailov et al. 2023).

    >>> softmax_dpo(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 0.5).exp().item()
    4.0
    """
    chosen_G = torch.zeros(len(gain_GX), dtype=torch.long, device=gain_GX.device)
    return cross_entropy(beta * gain_GX, chosen_G, reduction="sum")


class PreferenceLoss(PackedLoss):
    """The loss of `softmax_dpo` over the rows of a `PreferenceStream`, in which a history is read once for all titles.

    Deviations from paper and code: prompts list no candidates (there 20, of which rejected titles are some); a title's
    probability includes that of its end; rejected titles are drawn as `train.trees.rejected` says.
    """

    def __init__(self, usual: PackedLoss, about: Preference) -> None:
        super().__init__(usual.module, bf16=usual.bf16)
        self._usual, self._about = usual, about
        self._before: torch.Tensor | None = None

    @property
    def usual(self) -> PackedLoss:
        return self._usual

    @torch.no_grad()
    def remember(self, stream: PreferenceStream, rows_per_step: int) -> None:
        """Read the log-probabilities of all titles by the model as it is, before it learns: the reference, for which no
        second model is kept. Each process reads its share.
        """
        device, once = next(self.module.parameters()).device, stream.once(rows_per_step)
        before = torch.zeros(stream.num_titles, device=device)
        self.module.eval()
        with track(once.num_tokens, "reading the reference", unit="tokens") as progress:
            for batch in once:
                for rows in batch.micro_batches(0, distributed.rank(), distributed.num_ranks()):
                    given = distributed.to_device(rows, device)
                    titles_RT = given["titles"]
                    before[titles_RT[titles_RT != IGNORE]] = self._log_probs(given)
                progress.advance(batch.num_tokens)
        self._before = distributed.sum_over_ranks(before)

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`. Before `remember` the gains are logarithmic probabilities."""
        gain_M, titles_RT = self._log_probs(rows), rows["titles"]
        if self._before is not None:
            gain_M = gain_M - self._before[titles_RT[titles_RT != IGNORE]]
        return {PREFERENCE: softmax_dpo(gain_M.view(-1, 1 + self._about.num_rejected), self._about.beta)}

    def _log_probs(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of the titles in rows, in order: float32[M]."""
        hidden_RTD = self._hidden(rows["input_ids"], rows["position_ids"], rows["until"])
        target_P, (_, head) = rows["targets"].flatten(), trunk_and_head(self.module)
        at_N = (target_P != IGNORE).nonzero()[:, 0]
        title_N = (rows["titles"].flatten()[at_N] != IGNORE).cumsum(0) - 1
        hidden_ND = hidden_RTD.flatten(0, 1)[at_N] * self.scale
        num_titles = int((rows["titles"] != IGNORE).sum())
        found_M = hidden_ND.new_zeros(num_titles, dtype=torch.float32) + hidden_RTD.sum().float() * 0.0
        for hidden_CD, target_C, title_C in zip(
            *(each.split(CHUNK) for each in (hidden_ND, target_P[at_N], title_N)), strict=True
        ):
            # Logits are made again in the backward pass, so that those of one chunk exist at once.
            of_C = checkpoint(_log_probs_of, hidden_CD, head.weight, target_C, self._dtype, use_reentrant=False)
            found_M = found_M.index_add(0, title_C, of_C)
        return found_M


def _log_probs_of(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, target_C: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    logits_CV = linear(hidden_CD.to(dtype), weight_VD.to(dtype)).float()
    return -cross_entropy(logits_CV, target_C, reduction="none")
