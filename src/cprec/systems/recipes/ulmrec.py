"""ULMRec: a language model re-ranks the first items of a recommender's lists by letters, with codes of the user.

Shao et al. 2024, "ULMRec: User-centric Large Language Model for Sequential Recommendation", on LlamaRec (Yue et al.
2023), which is the row without codes. A SASRec, or any recommender with scores, finds 20 items; a prompt lists history
and items, each with a letter, and the letter of the next item is learnt; a score is the logit of an item's letter. A
user is a few codes before the history. Where paper and code differ, this follows the code. Deviations:

- Codes are residual k-means of the retriever's vector of the history (there of the user's number and reviews), tokens
  of their own whose vectors are learnt.
- Tasks that align codes with texts about users are not here: a log has no such texts.
- Candidates in training are what the retriever finds, in an order that is drawn (there, as far as we know, random
  items). The retriever has learnt the same events, so that it finds more of them than of events to come. `by_rank=True`
  keeps its order, in lists too, so that letters say how it ranks.
- Users whose target was not found are misses (theirs are left out of the lists that are counted; the ceiling is told).
- `weight` mixes the retriever's own log-probability in. At 0 the order is the retriever's among all items that are not
  in the history, whatever was learnt; at 1, theirs, a language model that has learnt nothing gives an arbitrary order.
- Items of the history are not listed, and stand behind those that are, by the retriever's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.models import inner_model
from cprec.progress import say
from cprec.recommender import Recommender
from cprec.systems.fit import Validation, fit
from cprec.systems.hybrid import AnswerLoss, Slots
from cprec.systems.items import IdTable
from cprec.systems.language import Language
from cprec.systems.letters import LetterForm, LetterPrompts, LetterRecommender, LetterStream, Retriever, ceiling
from cprec.systems.recipes.llara import BesideSASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage, TrainedRecommender


class Finder(Protocol):
    """Settings of a recommender: a frozen dataclass."""

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> Recommender: ...


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
        """See `SystemSettings.identity`."""
        finder = self.retriever
        named = None if finder is None else [type(finder).__name__, asdict(finder)]  # type: ignore[call-overload]
        return super().identity() | {"retriever": named}

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """See `SystemSettings.make`. Says how many targets of validation queries are found at all.

        Raises Unsuitable where none is, and ConfigError for a retriever that gives no scores."""
        data = TrainingSequences.of(split, domain)
        language = self.language(data, seed)
        with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
            found = (self.retriever or self.sasrec()).make(split, domain, seed=seed, folder=Path(place))
            retriever = self.finding(found, data, seed)
            if split.validates:
                asked = Validation.of(split, domain, seed, 4000)
                share = ceiling(retriever, asked.histories, asked.targets, asked.users)
                told = f"{found.name} finds {share:.4f} of {len(asked.targets):,} targets of validation queries among "
                say(f"{domain}: {told}{self.num_candidates} items, and no new order of its lists finds more")
                if not share:
                    raise Unsuitable(f"{told}{self.num_candidates} items: there is nothing to re-rank")
            made = fit(self, split, domain, seed, Path(place), stages_of=partial(self.stages_over, language, retriever))
        made.seconds += getattr(found, "seconds", 0.0)
        return made

    def finding(self, recommender: Any, data: TrainingSequences, seed: int) -> Retriever:
        """The retriever, with codes of users."""
        codes = {"num_levels": self.user_codes, "num_codes": self.num_codes, "seed": seed}
        return Retriever(recommender, data, self.num_candidates, **codes)

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`: over a SASRec before training."""
        model = self.sasrec().stages(data, seed)[0]
        return self.stages_over(self.language(data, seed), self.finding(model.recommender(), data, seed), data, seed)

    def stages_over(
        self, language: Language, retriever: Retriever, data: TrainingSequences, seed: int
    ) -> Sequence[Stage]:
        """The stage of a language model that re-ranks the lists of this retriever."""
        num_codes = self.user_codes * self.num_codes
        prompts = LetterPrompts(language, data.domain, self.num_candidates, num_codes)
        language = self.adapted(language, seed)
        if num_codes:
            inner = inner_model(language.model)
            inner.set_input_embeddings(Slots(inner.get_input_embeddings(), IdTable(num_codes, language.width, 0)))
        stream = LetterStream(data, prompts, retriever, self.max_length, self.passes(seed), by_rank=self.by_rank)
        form = LetterForm(max_length=self.max_length, by_rank=self.by_rank, weight=self.weight)
        return [
            Stage(
                trainable=AnswerLoss(language.model),
                stream=stream,
                schedule=self.schedule(stream.num_steps),
                recommender=lambda: LetterRecommender(
                    self.LABEL or type(self).__name__, data, language, prompts, retriever, form
                ),
            )
        ]


LETTERS = ULMRec(user_codes=0)
"""LlamaRec's ranker: letters without codes of users."""
