"""ULMRec: a language model re-ranks the first items of a recommender's lists by letters, with codes of the user.

Shao et al. 2024, "ULMRec: User-centric Large Language Model for Sequential Recommendation", on LlamaRec (Yue et al.
2023), which is the row without codes. A SASRec, or any recommender with scores, finds 20 items; a prompt lists history
and items, each with a letter, and the letter of the next item is learnt; a score is the logit of an item's letter. A
user is a few codes before the history. Where paper and code differ, this follows the code. Deviations:

- Codes are residual k-means of the retriever's vector of the history (there of the user's number and reviews), tokens
  of their own whose vectors are learnt.
- Tasks that align codes with texts about users are not here: a log has no such texts.
- Candidates in training are what the retriever finds and the next item, in an order that is drawn (there, as far as we
  know, random items). The retriever has learnt the same events, so that it finds more of them than of those to come.
  `by_rank=True` keeps its order, in lists too, so that letters say how it ranks.
- Users whose target was not found are misses (there they are left out of what is counted); how many these are is told.
- `weight` mixes the retriever's own log-probability in. At 0 the order is the retriever's among all items that are not
  in the history, whatever was learnt; at 1, theirs, a language model that has learnt nothing gives an arbitrary order.
- Items of the history are not listed, and stand behind those that are, by the retriever's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.provenance import code_sha256
from cprec.systems.fit import Validation, fit
from cprec.systems.hybrid import AnswerLoss, check_rows
from cprec.systems.language import Language
from cprec.systems.letters import (
    CEILING_QUERIES,
    Finder,
    LetterForm,
    LetterPrompts,
    Retriever,
    re_ranking,
    tell_ceiling,
)
from cprec.systems.recipes.beside_sasrec import BesideSASRec, place
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage, TrainedRecommender


@dataclass(frozen=True, kw_only=True)
class ULMRec(BesideSASRec):
    """Settings of ULMRec: candidates, the length of histories and adapters are the code's, the others ours."""

    max_length: int = 20
    num_epochs: float = 1
    retriever: Finder | None = None
    """Settings of the recommender whose lists are re-ranked; None: a SASRec."""
    num_candidates: int = 20
    """Items of its lists that have letters, 26 at most."""
    user_codes: int = 2
    """Codes of a user; 0: there are none, and it is LlamaRec."""
    num_codes: int = 32
    """Codes of a level."""
    by_rank: bool = False
    """Letters follow the retriever's order, in training and in lists; without, an order that is drawn."""
    weight: float = 1.0
    """Share of the language model in scores beside the retriever."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_codes")
        self.require_not_negative("user_codes")
        if not 2 <= self.num_candidates <= len(ascii_uppercase):
            raise ConfigError(f"num_candidates={self.num_candidates} must lie in 2..{len(ascii_uppercase)}: letters")
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight={self.weight} must lie in 0..1: it is a share")

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: of another retriever than the SASRec its settings and code count."""
        finder: Any = self.retriever
        if finder is None:
            return super().identity()
        own = finder.identity() if hasattr(finder, "identity") else asdict(finder)
        return super().identity() | {"retriever": [type(finder).__name__, own, code_sha256(type(finder).__module__)]}

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """See `SystemSettings.make`. Says how many targets of validation queries are found at all.

        Raises Unsuitable where none is, and ConfigError for a retriever that gives no scores; before one is trained,
        also for a language model that cannot read the longest prompt.
        """
        data = TrainingSequences.of(split, domain)
        language = self.language(data, seed)
        prompts = LetterPrompts(language, domain, self.num_candidates, self.user_codes * self.num_codes)
        prompts.require_room_for(self.max_length, self.user_codes)
        if self.user_codes:
            check_rows(language.model.get_input_embeddings())
        with place(folder) as shared:
            found = (self.retriever or self.sasrec()).make(split, domain, seed=seed, folder=shared)
            retriever = self.finding(found, data, seed)
            if split.validates:
                tell_ceiling(retriever, Validation.of(split, domain, seed, CEILING_QUERIES))
            made = fit(self, split, domain, seed, shared, stages_of=partial(self.stages_over, language, retriever))
        made.seconds += getattr(found, "seconds", 0.0)
        return made

    def finding(self, recommender: Any, data: TrainingSequences, seed: int) -> Retriever:
        """The retriever, with codes of users."""
        codes = {"num_levels": self.user_codes, "num_codes": self.num_codes, "seed": seed}
        return Retriever(recommender, data, self.num_candidates, **codes)

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`: over a SASRec before training."""
        untrained = self.sasrec().stages(data, seed)[0].recommender
        assert untrained is not None
        return self.stages_over(self.language(data, seed), self.finding(untrained(), data, seed), data, seed)

    def stages_over(
        self, language: Language, retriever: Retriever, data: TrainingSequences, seed: int
    ) -> Sequence[Stage]:
        """The stage of a language model that re-ranks the lists of this retriever."""
        form = LetterForm(max_length=self.max_length, by_rank=self.by_rank, weight=self.weight)
        stream, recommender = re_ranking(type(self).__name__, data, language, retriever, form, self.passes(seed))
        schedule = self.schedule(stream.num_steps)
        return [Stage(trainable=AnswerLoss(language.model), stream=stream, schedule=schedule, recommender=recommender)]


LETTERS = ULMRec(user_codes=0)
"""LlamaRec's ranker: letters without codes of users."""
