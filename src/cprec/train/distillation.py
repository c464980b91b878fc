"""A model with fewer layers that learns from one with more: how it begins, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from cprec import distributed
from cprec.batch import IGNORE
from cprec.inspection import output_scale
from cprec.models import blocks_of, drop_layers, last_norm, packed_hidden, recorded_states, trunk_and_head
from cprec.train.loss import PackedLoss, linear_divergence

TOKENS, DIRECTION, DISTANCE, HEADS = "tokens", "direction", "distance", "heads"
"""Loss terms: the teacher's next tokens, the direction and the distance of its states, next tokens from the middle."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a student is made of its teacher and learns from it."""

    layers: tuple[int, ...]
    """The layers of the teacher, 0 being the first, that the student begins as."""
    num_groups: int
    """Groups that the layers of either are cut into."""
    temperature: float
    """What both models' logits are divided by before their next tokens are compared."""
    weights: Mapping[str, float]
    """Of the loss terms, those above 0."""

    @property
    def has_teacher(self) -> bool:
        """Whether any term compares the two."""
        return bool(self.weights.keys() - {HEADS})

    def student_from(self, load: Callable[[str], Any]) -> Callable[[str], Any]:
        """Loads a teacher by `load`, and leaves the student of it."""

        def loaded(name: str) -> Any:
            model = without_adapters(load(name))
            drop_layers(model, sorted(set(range(len(blocks_of(model)))) - set(self.layers)))
            return model

        return loaded


def without_adapters(model: Any) -> Any:
    """The model with its adapters, if it has any, added to its weights, all of which can be trained."""
    return model.merge_and_unload().requires_grad_(True) if hasattr(model, "peft_config") else model


def spaced(num_kept: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly, the first and the last among them; of one the first.

    >>> spaced(4, 10), spaced(3, 4), spaced(1, 5)
    ((0, 3, 6, 9), (0, 2, 3), (0,))
    """
    return tuple(
        (2 * place * (num_layers - 1) + num_kept - 1) // max(1, 2 * (num_kept - 1)) for place in range(num_kept)
    )


def ends_of_groups(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """The last layer of each group, 1 being the first layer; groups differ by one layer at most.

    >>> ends_of_groups(8, 4), ends_of_groups(30, 4)
    ((2, 4, 6, 8), (7, 15, 22, 30))
    """
    return tuple(group * num_layers // num_groups for group in range(1, num_groups + 1))


def turned(mine_ND: torch.Tensor, theirs_ND: torch.Tensor) -> torch.Tensor:
    """One minus the cosine of each state and its counterpart, summed."""
    return (1 - cosine_similarity(mine_ND, theirs_ND, dim=1)).sum()


def apart(mine_ND: torch.Tensor, theirs_ND: torch.Tensor) -> torch.Tensor:
    """The distance of each state from its counterpart, as a share of the counterpart's length, summed."""
    return ((mine_ND - theirs_ND).norm(dim=1) / theirs_ND.norm(dim=1)).sum()


class DistilledLoss(PackedLoss):
    """The usual loss of a student, with what its teacher adds at the positions of targets (Xu et al. 2025, SLMRec).

    With the student's state h and the teacher's t at the end of a group of layers, each position costs

        direction * (1 - cos(h, t)) + distance * |h - t| / |t|

    for every group; tokens * T^2 * KL(p, q), where p and q are the softmaxes of the teacher's and of the student's
    logits divided by the temperature T (Hinton et al. 2015); and heads times the loss of the next tokens from the
    states at the end of every group but the last. All weights are those of `Distillation`.

    Deviations: in their code |h - t| is not divided by |t|, which is 50 to 230 in SmolLM2-135M, so that this term would
    drown the others; states are matched at the last position, where an item is predicted, here at every target; the
    heads in the middle have matrices of their own, thrown away afterwards, and here states go through the model's own
    norm and output layer (as in LayerSkip, Elhoushi et al. 2024), so that a student is a plain model. The divergence of
    next tokens is ours.

    Suffixes: R rows, T tokens in a row, N positions of targets, D width.
    """

    def __init__(self, usual: PackedLoss, about: Distillation, teacher: Any | None = None) -> None:
        super().__init__(usual.module, bf16=usual.bf16)
        self._usual, self._about, self._teacher = usual, about, teacher
        self._ends = ends_of_groups(len(blocks_of(self.module)), about.num_groups)
        if HEADS in about.weights:
            last_norm(self.module)  # refuses models without

    @property
    def usual(self) -> PackedLoss:
        return self._usual

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        with recorded_states(self.module, self._ends) as states:
            found = dict(self._usual.losses(rows))
        if self._teacher is not None:
            found |= self._of_teacher(states, rows)
        if HEADS in self._about.weights:
            norm = last_norm(self.module)
            middle = [self._of_tokens(norm(state), rows["targets"], rows.get("weights")) for state in states[:-1]]
            found[HEADS] = torch.stack(middle).sum()
        return {name: self._about.weights.get(name, 1.0) * term for name, term in found.items()}

    def _of_teacher(self, states: Sequence[torch.Tensor], rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The terms that compare the student's states at the ends of groups with the teacher's, without weights."""
        targets_RT, weights, found = rows["targets"], self._about.weights, dict[str, torch.Tensor]()
        first_RT = targets_RT if targets_RT.ndim == 2 else targets_RT[..., 0]  # of several targets of a position
        at_N = (first_RT.flatten() != IGNORE).nonzero().squeeze(1)
        pairs = [
            (mine.flatten(0, 1)[at_N].float(), theirs.flatten(0, 1)[at_N].float())
            for mine, theirs in zip(states, self._states_of_teacher(rows), strict=True)
        ]
        if DIRECTION in weights:
            found[DIRECTION] = torch.stack([turned(*pair) for pair in pairs]).sum()
        if DISTANCE in weights:
            found[DISTANCE] = torch.stack([apart(*pair) for pair in pairs]).sum()
        if TOKENS in weights:
            found[TOKENS] = self._of_distributions(*pairs[-1])
        return found

    @torch.no_grad()
    def _states_of_teacher(self, rows: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        ids_RT = rows["input_ids"]
        ends = ends_of_groups(len(blocks_of(self._teacher)), self._about.num_groups)
        with recorded_states(self._teacher, ends) as states, distributed.autocast(ids_RT.device, self.bf16):
            packed_hidden(self._teacher, ids_RT, rows["position_ids"], rows.get("until"))
        return states

    def _of_distributions(self, mine_ND: torch.Tensor, theirs_ND: torch.Tensor) -> torch.Tensor:
        temperature = self._about.temperature
        (_, head), (_, their_head) = trunk_and_head(self.module), trunk_and_head(self._teacher)
        scale, their_scale = self.scale / temperature, output_scale(self._teacher) / temperature
        given = theirs_ND * their_scale, their_head.weight
        return temperature**2 * linear_divergence(mine_ND * scale, head.weight, *given, self._dtype)
