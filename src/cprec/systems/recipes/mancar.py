"""ManCAR: latent steps that a graph of items leads, from its neighbourhood to the target (Yang et al. 2026).

Neighbours of the latest items stand before a history. A SASRec reads it, then its own last state again, T - 1 times, as
in ReaRec. State t of T learns the target at the temperature tau * t^2, and the distribution of the target and the
neighbours of the last item by softmax(-rank / (T + 1 - t)), which is wide at first and ever narrower. The first state
answers whose item distribution is within `stop_below` of the one before (Kullback-Leibler divergence), else the last.
This follows the code, in which cross-entropies are averaged over the states and divergences are summed. Deviations: the
graph is `ItemGraph` (there: Swing); neighbours that are missing, or are the target, have no share (there they do);
item vectors learn as outputs, too (there they are constants at the output, made anew in each pass); items do not read
later ones (there they do); states are not scaled to the length of item vectors, since our encoder ends in a norm; a
first stage has neither prompts nor steps (`first_epochs`). Deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from cprec.choices import Choice, OneOf, Real
from cprec.errors import ConfigError
from cprec.systems.dot_product import SequenceModel, settled
from cprec.systems.encoders import LatentSteps, SelfAttention
from cprec.systems.graph import ItemGraph, Prompts, latest
from cprec.systems.items import IdTable
from cprec.systems.recipes.latent import LatentSettings
from cprec.systems.recipes.sasrec import INITIAL
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import by_step, divergence, next_item


@dataclass(frozen=True, kw_only=True)
class ManCAR(LatentSettings):
    """Settings of ManCAR; the defaults are ours: fewer prompts and steps, which take most of its time."""

    num_neighbours: int = 10
    """Neighbours of the last item that share in a soft target, the strongest ones."""
    graph_weight: float = 1.0
    """Weight of the divergence from soft targets, summed over the states."""
    num_latest: int = 2
    """Latest items of a history whose neighbours stand before it; 0: none do."""
    prompts_each: int = 4
    """Neighbours of each of them, num_neighbours at most."""
    stop_below: float = 0.03
    """Divergence of two states below which the later one answers; 0: the last state answers."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **LatentSettings.SEARCH,
        "graph_weight": Real(low=0.03, high=3, log=True),
        "num_latest": OneOf(values=(1, 2, 4)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_neighbours", "prompts_each")
        self.require_not_negative("graph_weight", "num_latest", "stop_below")
        if self.prompts_each > self.num_neighbours:
            raise ConfigError(
                f"prompts_each={self.prompts_each} must not be above num_neighbours={self.num_neighbours}"
            )

    def second(self, data: TrainingSequences, items: IdTable, encoder: SelfAttention, seed: int) -> Stage:
        graph = ItemGraph(data.sequences, data.num_items, self.num_neighbours)
        reasoning = LatentSteps(encoder, self.num_steps, self.hidden_size)
        nn.init.normal_(reasoning.step.weight, std=INITIAL)
        prompts = Prompts(graph, self.num_latest, self.prompts_each, self.hidden_size) if self.num_latest else None
        stop = partial(settled, stop_below=self.stop_below, temperature=self.temperature)
        model = SequenceModel(items, reasoning, stop, prompts)
        states = range(1, self.num_steps + 2)
        each = [next_item("softmax", temperature=self.temperature * t**2) for t in states]
        teachers = {"graph": (self.graph_weight, Guided(graph, self.temperature))}
        return self.on_prefixes(data, model, {NEXT_ITEM: (1.0, by_step(each))}, seed, teachers=teachers)


class Guided(nn.Module):
    """A teacher: the divergence of a history's states, [N, W, D], from soft targets of widths W, W - 1, ... 1; their
    sum."""

    def __init__(self, graph: ItemGraph, temperature: float) -> None:
        super().__init__()
        self.graph, self._temperature = graph, temperature

    def forward(
        self, hidden_NWD: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        last_N, num_states = latest(rows["items"], 1, self.graph.num_items)[:, 0], hidden_NWD.shape[1]
        found = []
        for place, hidden_ND in enumerate(hidden_NWD.unbind(1)):
            soft = self.graph.soft_targets(last_N, rows["targets"], num_states - place)
            found.append(divergence(hidden_ND / self._temperature, weight_VD, *soft))
        return torch.stack(found).sum()


CONTROL = ManCAR(num_steps=0, num_blocks=5)
"""Blocks instead of steps, with the same prompts and the narrowest soft target; see `latent`."""

PUBLISHED = ManCAR(
    max_length=50,
    hidden_size=256,
    learning_rate=1e-3,
    batch_size=512,
    num_epochs=300,
    first_epochs=0,
    num_steps=5,
    num_latest=4,
    prompts_each=7,
    stop_below=0.0,
    anneal=0.0,
    patience=3,
)
"""ManCAR with the dimensions, heads, dropout, steps, prompts, neighbours and weights of the code for CDs; 300 passes at
most. Its script names a weight of 0.5 for the cross-entropy, but does not pass it on, and its evaluation of each pass
takes all steps; so does this."""
