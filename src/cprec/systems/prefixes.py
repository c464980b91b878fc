"""What a generator of codes learns at the prefixes of items: rows that know them, and losses over them.

A prefix is a node of the trie of all items' codes. Suffixes: R rows, T tokens, V items or vocabulary, L levels (the
codes that every item has), K items drawn, each with a branch of B tokens, C candidates (the target and those drawn), D
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from cprec.batch import IGNORE, Batch
from cprec.data.ragged import Ragged
from cprec.models import trunk_and_head
from cprec.search.trie import Trie, levels_of
from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeStream
from cprec.systems.signals import padded
from cprec.text.stream import NEXT_TOKEN
from cprec.train.loss import PackedLoss

PREFIXES = "prefixes"
"""The name of the term over prefixes."""


def paths_of(codes: ItemCodes, trie: Trie) -> Ragged:
    """The node that each token of each item leads to.

    >>> codes = ItemCodes.of(np.array([[0, 1], [1, 0], [0, 0]]), num_codes=2)
    >>> paths = paths_of(codes, Trie.build(codes.sequences))
    >>> [paths[item].tolist() for item in range(3)]
    [[1, 4, 7], [2, 5, 8], [1, 3, 6]]
    """
    offsets = codes.sequences.offsets
    nodes = np.empty(len(codes.sequences.values), dtype=np.int64)
    at, first, node = offsets[1:] - 1, offsets[:-1], trie.leaf.astype(np.int64)
    while len(at):  # from the leaves up, all items together
        nodes[at] = node
        more = at > first
        at, first, node = at[more] - 1, first[more], trie.parent(node[more])
    return Ragged(nodes, offsets)


class NodeStream:
    """Rows of codes, with the node of the trie that each target leads to: `nodes`, int64[R, T]."""

    def __init__(
        self,
        rows: CodeStream,
        codes: ItemCodes,
        trie: Trie,
        terms: Sequence[str] = (NEXT_TOKEN,),
        *,
        whole: bool = False,
    ) -> None:
        """`terms` names the loss terms; each is divided by the number of target tokens. `whole`: one of them looks at
        all rows of a step."""
        self._rows, self._paths, self._terms, self._whole = rows, paths_of(codes, trie), tuple(terms), whole
        self.num_steps, self.num_tokens = rows.num_steps, rows.num_tokens

    def batch(self, step: int) -> Batch:
        """See `Stream.batch`."""
        plain = self._rows.batch(step)
        items = self._rows.windows.take(plain.examples)
        paths = self._paths.take(items.values)
        nodes, _ = padded(Ragged(paths.values, paths.offsets[items.offsets]), IGNORE)
        return replace(
            plain,
            rows={**plain.rows, "nodes": nodes},
            counts=dict.fromkeys(self._terms, plain.counts[NEXT_TOKEN]),
            blank={**plain.blank, "nodes": IGNORE},
            whole=self._whole,
        )


class ChoiceStream:
    """Rows of codes in which one item, drawn anew for each step, stands beside K items drawn from all.

    The first item of a row is not drawn. Behind a row come branches: the first L - 1 codes of each item drawn, which
    read what stands before the target and themselves. Of the candidates, the target first, `candidates` are the
    first L codes, `states` the columns that predict them, and `kept` says which prefixes are others than those of the
    candidates before: [R, C, L] each.
    """

    def __init__(self, rows: CodeStream, codes: ItemCodes, trie: Trie, num_drawn: int, seed: int) -> None:
        self._rows, self._lengths, self._num_drawn, self._seed = rows, codes.sequences.lengths, num_drawn, seed
        self.num_steps, self.num_tokens = rows.num_steps, rows.num_tokens
        place_VL = codes.sequences.offsets[:-1, None] + np.arange(codes.num_levels)
        self._code_VL, self._node_VL = codes.sequences.values[place_VL], paths_of(codes, trie).values[place_VL]

    def batch(self, step: int) -> Batch:
        """See `Stream.batch`."""
        plain = self._rows.batch(step)
        items, num_rows = self._rows.windows.take(plain.examples), plain.num_rows
        generator = np.random.default_rng([self._seed, step, 5])
        at_R = items.offsets[:-1] + 1 + (generator.random(num_rows) * (items.lengths - 1)).astype(np.int64)
        drawn_RK = generator.integers(len(self._code_VL), size=(num_rows, self._num_drawn))
        candidate_RC = np.column_stack([items.values[at_R], drawn_RK])
        # The column of the last token before the target: BEGIN is column 0.
        before = np.append(0, np.cumsum(self._lengths[items.values]))
        last_R = before[at_R] - before[items.offsets[:-1]]
        code_RCL, node_RCL = self._code_VL[candidate_RC], self._node_VL[candidate_RC]
        is_equal_RCCL = node_RCL[:, :, None] == node_RCL[:, None]
        rows = {
            **with_branches(plain.rows, last_R, code_RCL[:, 1:, :-1]),
            "candidates": code_RCL,
            "states": states_of(last_R, plain.rows["targets"].shape[1], code_RCL.shape),
            "kept": ~(is_equal_RCCL & np.tri(1 + self._num_drawn, k=-1, dtype=bool)[..., None]).any(2),
        }
        counts = dict.fromkeys((NEXT_TOKEN, PREFIXES), plain.counts[NEXT_TOKEN])
        return replace(plain, rows=rows, counts=counts, whole=True)


def with_branches(rows: Mapping[str, np.ndarray], last_R: np.ndarray, branch_RKB: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of codes with branches of tokens behind them, which follow a row's column `last`, read what stands up to it
    and themselves, and predict nothing: arrays [R, T + K B], `until` as for `packed_hidden`."""
    (num_rows, num_branches, size), width = branch_RKB.shape, rows["input_ids"].shape[1]
    end_K = width + size * np.arange(1, num_branches + 1)
    # What stands up to the last column before the branches is read by all, what comes then by the row alone.
    until_RT = np.where(np.arange(width) <= last_R[:, None], end_K[-1], width)
    place_RB = rows["position_ids"][np.arange(num_rows), last_R, None] + 1 + np.arange(size)
    behind = {
        "input_ids": branch_RKB.reshape(num_rows, num_branches * size),
        "position_ids": np.tile(place_RB, (1, num_branches)),
        "targets": np.full((num_rows, num_branches * size), IGNORE),
        "until": np.tile(end_K.repeat(size), (num_rows, 1)),
    }
    return {name: np.concatenate([{**rows, "until": until_RT}[name], behind[name]], axis=1) for name in behind}


def states_of(last_R: np.ndarray, width: int, shape: tuple[int, ...]) -> np.ndarray:
    """The columns that predict the codes of candidates, of which the first stands in a row of `width` columns after its
    column `last`, and the others in branches behind it: int64[R, C, L], of the shape given."""
    step_B = np.arange(shape[2] - 1)
    states_RCL = np.empty(shape, dtype=np.int64)
    states_RCL[..., 0] = last_R[:, None]
    states_RCL[:, 0, 1:] = last_R[:, None] + 1 + step_B
    states_RCL[:, 1:, 1:] = width + len(step_B) * np.arange(shape[1] - 1)[:, None] + step_B
    return states_RCL


def prefix_loss(loss_L: torch.Tensor, growth: float) -> torch.Tensor:
    """The weighted sum of the losses of prefixes of 1 to L codes: no dimensions.

    Weights are proportional to (loss / sum of losses) * exp(growth * loss) and sum to one; no gradient goes through
    them. Where all losses are zero, so is the sum.

    >>> prefix_loss(torch.tensor([1.0, 3.0]), growth=0.0).item()  # weights 1/4 and 3/4
    2.5
    """
    of_weight_L = loss_L.detach()
    weight_L = of_weight_L * (growth * of_weight_L).softmax(0)
    return (weight_L * loss_L).sum() / weight_L.sum().clamp(min=torch.finfo(torch.float32).tiny)


def choice_losses(score_RCL: torch.Tensor, kept_RCL: torch.Tensor, num_others_L: torch.Tensor) -> torch.Tensor:
    """The mean loss of the prefixes of 1 to L codes of the first candidates, by scores of all: float32[L].

    Of N other prefixes of a length, n candidates are kept and stand for all:

        L_t = -(1 / t) log [e^S / (e^S + (N / n) sum of e^S over those kept)]

    >>> scores = torch.tensor([[[0.5], [0.25], [0.125]]]).log()
    >>> kept = torch.tensor([[[True], [True], [False]]])
    >>> choice_losses(scores, kept, torch.tensor([2])).exp().item()  # (0.5 + 2 * 0.25) / 0.5
    2.0
    """
    num_kept_RL = kept_RCL[:, 1:].sum(1)
    each_RL = (num_others_L / num_kept_RL.clamp(min=1)).log()
    others_RKL = (score_RCL[:, 1:] + each_RL[:, None]).masked_fill(~kept_RCL[:, 1:], -torch.inf)
    target_RL = score_RCL[:, 0]
    total_RL = torch.cat([target_RL[:, None], others_RKL], dim=1).logsumexp(1)
    length_L = torch.arange(1, score_RCL.shape[2] + 1, device=score_RCL.device)
    return (total_RL - target_RL).mean(0) / length_L


class TemperedLoss(PackedLoss):
    """Next tokens, with the logits after each node of the trie divided by its temperature, float32[num_nodes]."""

    def __init__(self, model: Any, trie: Trie, temperatures: np.ndarray, *, bf16: bool = False) -> None:
        super().__init__(model, bf16=bf16)
        # By the node that a step leads to; nothing leads to the root.
        nodes = np.arange(1, trie.num_nodes)
        self._temperatures = torch.from_numpy(np.append(np.float32(1), temperatures[trie.parent(nodes)]))

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`. `nodes` are those of `NodeStream`."""
        hidden_RTD = self._hidden(rows["input_ids"], rows["position_ids"])
        temperature_RT = self._temperatures.to(hidden_RTD.device)[rows["nodes"].clamp(min=0)]
        return {NEXT_TOKEN: self._of_tokens(hidden_RTD / temperature_RT[..., None], rows["targets"])}


class PointwiseLoss(PackedLoss):
    """Next tokens, and `weight` times the log-probabilities of the prefixes of all items, of which each counts as the
    mean of its tokens: L_t = -(1 / t) sum of log p_s over s up to t."""

    def __init__(
        self, model: Any, trie: Trie, num_levels: int, *, weight: float, growth: float, bf16: bool = False
    ) -> None:
        super().__init__(model, bf16=bf16)
        self._num_levels, self._weight, self._growth = num_levels, weight, growth
        sizes = [stop - start for start, stop in levels_of(trie.first_child)]
        self._depth = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`. `nodes` are those of `NodeStream`."""
        hidden_RTD = self._hidden(rows["input_ids"], rows["position_ids"])
        targets_RT, is_target_RT = rows["targets"], rows["targets"] != IGNORE
        depth_RT = self._depth.to(targets_RT.device)[rows["nodes"].clamp(min=0)]
        # The tokens of one level at a time: each sum is part of both terms.
        by_level = [
            self._of_tokens(hidden_RTD, targets_RT.masked_fill(depth_RT != level, IGNORE))
            for level in range(1, self._num_levels + 1)
        ]
        rest = self._of_tokens(hidden_RTD, targets_RT.masked_fill(depth_RT <= self._num_levels, IGNORE))
        sum_L = torch.stack(by_level)
        num_items = (is_target_RT & (depth_RT == 1)).sum().clamp(min=1)
        loss_L = (sum_L / num_items).cumsum(0) / torch.arange(1, len(sum_L) + 1, device=sum_L.device)
        term = self._weight * is_target_RT.sum() * prefix_loss(loss_L, self._growth)
        return {NEXT_TOKEN: sum_L.sum() + rest, PREFIXES: term}


class PairwiseLoss(PackedLoss):
    """Next tokens, and `weight` times the cross-entropy of each target's prefixes against those of items drawn.

    The score of a prefix is its log-probability over `temperature`; see `choice_losses`."""

    def __init__(
        self,
        model: Any,
        trie: Trie,
        num_levels: int,
        *,
        weight: float,
        growth: float,
        temperature: float,
        bf16: bool = False,
    ) -> None:
        super().__init__(model, bf16=bf16)
        self._weight, self._growth, self._temperature = weight, growth, temperature
        sizes = [stop - start for start, stop in levels_of(trie.first_child)][1 : num_levels + 1]
        self._num_others_L = torch.tensor(sizes) - 1

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`. The rows are those of `ChoiceStream`."""
        hidden_RTD = self._hidden(rows["input_ids"], rows["position_ids"], rows["until"])
        loss_L = self._of_candidates(hidden_RTD, rows["candidates"], rows["states"], rows["kept"])
        num_targets = (rows["targets"] != IGNORE).sum()
        term = self._weight * num_targets * prefix_loss(loss_L, self._growth)
        return {NEXT_TOKEN: self._of_tokens(hidden_RTD, rows["targets"]), PREFIXES: term}

    def _of_candidates(
        self, hidden_RTD: torch.Tensor, code_RCL: torch.Tensor, states_RCL: torch.Tensor, kept_RCL: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss of the rows' prefixes of each length: float32[L]."""
        _, head = trunk_and_head(self.module)
        at_RXD = states_RCL.flatten(1)[..., None].expand(-1, -1, hidden_RTD.shape[2])
        states_RXD = hidden_RTD.gather(1, at_RXD).to(self._dtype)
        logits_RXV = linear(states_RXD, head.weight.to(self._dtype)).float() * self.scale
        log_prob_RX1 = logits_RXV.log_softmax(-1).gather(2, code_RCL.flatten(1)[..., None])
        score_RCL = log_prob_RX1.view(code_RCL.shape).cumsum(2) / self._temperature
        return choice_losses(score_RCL, kept_RCL, self._num_others_L.to(score_RCL.device))
