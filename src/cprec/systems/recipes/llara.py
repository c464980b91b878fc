"""LLaRA: a language model reads titles, each with the vector that a sequential recommender has of the item.

Liao et al. 2024, "LLaRA: Large Language-Recommendation Assistant"; where paper and code differ, this follows the code.
A SASRec is trained first and then stays as it is. A prompt names the history and candidates; behind each title stands a
slot, which holds the SASRec's vector of the item through two layers, the projector. Only the answer's title is learnt.
The prompts of step s of S have slots with the chance s / S; else none has, and the projector stays as it is.
Deviations:

- The wording is that of all prompts here (there one of three, at random, which name films, games or artists).
- In half of the steps prompts list no candidates (theirs always do, 20), so that the whole catalogue can be ranked: by
  the exact search over titles after such a prompt. `listing=1` is theirs.
- A step with text alone has no slots (there a token that marks them, which is learnt).
- The SASRec is ours: softmax over all items, 64 dimensions (there binary cross-entropy; GRU4Rec and Caser are tried).
- Free writing is greedy and matched to candidates by `search.writing.match`: an answer that is a candidate's title
  counts, though other titles occur in it (there none may).
- The learning rate falls linearly (there by a cosine), and weights are chosen by lists over the catalogue (there by
  HR@1 of what is written).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.systems.fit import fit
from cprec.systems.hybrid import (
    AnswerLoss,
    AnswerStream,
    Curriculum,
    TitlePrompts,
    TitleRecommender,
    check_rows,
    with_slots,
)
from cprec.systems.language import Language
from cprec.systems.recipes.beside_sasrec import BesideSASRec, place
from cprec.systems.recipes.sasrec import CausalRecommender
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage, TrainedRecommender


@dataclass(frozen=True, kw_only=True)
class LLaRA(BesideSASRec):
    """Settings of LLaRA: the length of histories, candidates, passes and adapters are the code's, the others ours."""

    curriculum: Curriculum = "rising"
    """When prompts have slots: ever more often (`rising`), in all steps (`hybrid`) or never (`text`), which needs no
    SASRec."""
    num_candidates: int = 20
    """Candidates in a prompt that lists them, the target among them, the others drawn anew in each step."""
    listing: float = 0.5
    """Share of the steps whose prompts list candidates. 0: no prompt does, also where candidates are ranked. 1: all do,
    and the catalogue, by which weights are chosen, is ranked after a kind of prompt that was never learnt."""
    beam_width: int = 10
    """Prefixes of titles that a beam keeps at each depth; weights are chosen by beams."""
    max_nodes: int = 500
    """Prefixes that are read for a list at most; where they do not suffice for a proof, it is the best found."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("beam_width", "max_nodes")
        if self.curriculum not in get_args(Curriculum):
            raise ConfigError(f"curriculum={self.curriculum!r} must be one of {', '.join(get_args(Curriculum))}")
        if self.num_candidates < 2:
            raise ConfigError(f"num_candidates={self.num_candidates} must be 2 or more: the target and others")
        if not 0 <= self.listing <= 1:
            raise ConfigError(f"listing={self.listing} must lie in 0..1: it is a share of steps")

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """See `SystemSettings.make`. The SASRec stands in a folder beside. Raises ConfigError also where the language
        model cannot read the longest prompt."""
        language, vectors_VF, seconds = self.language(TrainingSequences.of(split, domain), seed), None, 0.0
        TitlePrompts(language, domain).require_room_for(self.max_length, self.num_candidates if self.listing else 0)
        if self.curriculum != "text":
            check_rows(language.model.get_input_embeddings())
        with place(folder) as shared:
            if self.curriculum != "text":
                sasrec = self.sasrec().make(split, domain, seed=seed, folder=shared)
                assert isinstance(sasrec, CausalRecommender)
                vectors_VF, seconds = sasrec.model.vectors().items_VD.detach().cpu().numpy(), sasrec.seconds
            stages = partial(self.stages_over, language, vectors_VF)
            made = fit(self, split, domain, seed, shared, stages_of=stages)
        made.seconds += seconds
        return made

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`: over vectors that say nothing, as before a SASRec is trained."""
        nothing_VF = np.zeros((data.num_items, self.hidden_size), dtype=np.float32)
        return self.stages_over(self.language(data, seed), nothing_VF, data, seed)

    def stages_over(
        self, language: Language, vectors_VF: np.ndarray | None, data: TrainingSequences, seed: int
    ) -> Sequence[Stage]:
        """The stage of a language model, with slots of these vectors; None: there are no slots."""
        prompts = TitlePrompts(language, data.domain)
        if vectors_VF is not None:
            with_slots(language.model, vectors_VF)
        stream = AnswerStream(
            data,
            prompts,
            self.max_length,
            self.passes(seed),
            self.curriculum,
            num_candidates=self.num_candidates,
            listing=self.listing,
        )
        return [
            Stage(
                trainable=AnswerLoss(language.model),
                stream=stream,
                schedule=self.schedule(stream.num_steps),
                recommender=lambda: TitleRecommender(
                    type(self).__name__,
                    data,
                    language,
                    prompts,
                    slots=self.curriculum != "text",
                    lists=self.listing > 0,
                    max_length=self.max_length,
                    beam_width=self.beam_width,
                    max_nodes=self.max_nodes,
                ),
            )
        ]
