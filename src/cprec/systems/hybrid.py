"""Prompts of titles with slots: a token after each title stands for the item's vector, given by another model.

In what a language model reads, the number of its tokens + i is the slot of item i. It stands in rows like any token, so
that the loss and the search know nothing of it. Suffixes: V items, F width of given vectors, D width of the language
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from cprec import distributed
from cprec.batch import IGNORE, Batch
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.models import context_of, inner_model
from cprec.recommender import Ranking, RankingQuery
from cprec.scoring import positions_of
from cprec.search.writing import generate
from cprec.systems.batches import Passes, Prefixes, RowStream
from cprec.systems.generator import SequenceRecommender
from cprec.systems.items import FrozenTable, ItemTable
from cprec.systems.language import Language
from cprec.systems.signals import TrainingSequences, padded
from cprec.text.prompts import OFFERED, Template
from cprec.text.stream import NEXT_TOKEN
from cprec.text.tokenizer import encode_pieces
from cprec.train.loss import PackedLoss
from cprec.train.trainable import decay_matrices

Curriculum = Literal["rising", "hybrid", "text"]
"""When prompts have slots: ever more often, always, or never."""

_HEAD, _LINE, _OFFERED, _NEXT, _FIRST_TITLE = range(5)


def check_rows(rows: nn.Module) -> None:
    """Raise ConfigError where a language model does more to tokens than to look up their rows."""
    if type(rows) is not nn.Embedding:
        raise ConfigError(
            f"the language model looks tokens up by {type(rows).__name__}, which does more than that, and vectors in "
            "slots would not be treated alike: take another base (Llama, Qwen, Mistral and SmolLM will do)"
        )


class Slots(nn.Embedding):
    """What a language model reads of tokens: their rows, and in slots the vectors of items, through a projector."""

    def __init__(self, rows: nn.Embedding, items: ItemTable) -> None:
        """The rows stay those of the model, which may have them at its output as well; see `check_rows`."""
        check_rows(rows)
        super().__init__(rows.num_embeddings, rows.embedding_dim, _weight=rows.weight)
        self.weight, self.items = rows.weight, items

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        """The vector of each token: [..., D]. Without a slot the projector has no part in it, and so no gradient."""
        is_slot = token >= self.num_embeddings
        rows = super().forward(token.masked_fill(is_slot, 0))
        if not is_slot.any():
            return rows
        vectors = self.items.vectors(token[is_slot] - self.num_embeddings)
        return rows.index_put(is_slot.nonzero(as_tuple=True), vectors.to(rows.dtype))


def with_slots(model: Any, vectors_VF: np.ndarray, *, own_rows: bool = False) -> None:
    """Give a language model slots, of these vectors through two layers (Liao et al. 2024); with `own_rows` each has a
    trained row, which starts at zero, as well."""
    inner = inner_model(model)
    rows = inner.get_input_embeddings()
    size = rows.embedding_dim
    projector = nn.Sequential(nn.Linear(vectors_VF.shape[1], size), nn.GELU(), nn.Linear(size, size))
    inner.set_input_embeddings(Slots(rows, FrozenTable(vectors_VF, projector, 0, size if own_rows else None)))


class TitlePrompts:
    """Prompts of a domain's titles, as tokens: those of a history, perhaps those of candidates, and the place where the
    next title is to stand."""

    def __init__(self, language: Language, domain: str) -> None:
        template, self.titles, self.end = Template(), language.titles, language.end
        parts = [template.head(domain), template.line, OFFERED, template.next]
        head, *others = encode_pieces(language.tokenizer, parts)
        fixed = Ragged.of([[*language.begin, *head], *others])
        slots = language.model.get_input_embeddings().num_embeddings + np.arange(len(self.titles))
        with_slots = _joined(self.titles, Ragged(slots, np.arange(len(slots) + 1)))
        self._pieces = {False: Ragged.concatenate([fixed, self.titles]), True: Ragged.concatenate([fixed, with_slots])}
        self._ends = _joined(self.titles, Ragged(np.full(len(slots), self.end), np.arange(len(slots) + 1)))
        self._context = int(context_of(language.model) or 1 << 30)

    def of(self, histories: Ragged, offered: Ragged | None = None, *, slots: bool) -> Ragged:
        """The tokens of prompts with these histories and candidates, by number, if any; each title with its slot or all
        without."""
        rows = []
        for row in range(len(histories)):
            candidates = np.empty(0) if offered is None else offered[row]
            rows.append(
                [_HEAD, *_lines(histories[row]), *[_OFFERED] * bool(len(candidates)), *_lines(candidates), _NEXT]
            )
        pieces = Ragged.of(rows)
        tokens = self._pieces[slots].take(pieces.values)
        return Ragged(tokens.values, tokens.offsets[pieces.offsets])

    def answers(self, items: np.ndarray) -> Ragged:
        """The titles of items, each closed by the token that ends it."""
        return self._ends.take(items)

    def require_room(self, prompts: Ragged, advice: str) -> None:
        """Raise ConfigError where the model cannot read a prompt and the longest title behind it."""
        longest = int(prompts.lengths.max(initial=0)) + int(self._ends.lengths.max())
        if longest > self._context:
            raise ConfigError(
                f"a prompt has {longest:,} tokens with its answer, and the language model reads {self._context:,}: "
                f"{advice}"
            )

    def require_room_for(self, max_length: int, num_candidates: int) -> None:
        """Raise ConfigError where there is no room for the longest titles in all places of a prompt."""
        longest = np.argsort(-self.titles.lengths, kind="stable")
        history, candidates = (np.resize(longest, size) for size in (max_length, num_candidates))
        whole = self.of(Ragged.of([history]), Ragged.of([candidates]), slots=True)
        self.require_room(
            whole,
            f"lower max_length={max_length}, num_candidates={num_candidates} or title_tokens, whose titles have up to "
            f"{int(self.titles.lengths.max())}",
        )


def _lines(items: Sequence[int] | np.ndarray) -> Iterator[int]:
    for item in items:
        yield from (_LINE, _FIRST_TITLE + int(item))


def _joined(first: Ragged, second: Ragged) -> Ragged:
    """Each row of the first with that of the second behind it."""
    both = Ragged.concatenate([first, second])
    pairs = both.take(np.arange(len(both)).reshape(2, -1).T.ravel())
    return Ragged(pairs.values, pairs.offsets[::2])


class AnswerStream(RowStream):
    """Prompts of prefixes of training sequences, each with the title of the next item, which alone is learnt.

    All prompts of a step have slots or none has, and all list candidates or none does; which, and the candidates, is
    drawn by the seed and the step alone.
    """

    def __init__(
        self,
        data: TrainingSequences,
        prompts: TitlePrompts,
        max_length: int,
        passes: Passes,
        curriculum: Curriculum,
        *,
        num_candidates: int,
        listing: float,
    ) -> None:
        self.prefixes, self._prompts, self._num_items = Prefixes(data, max_length), prompts, data.num_items
        self._curriculum, self._num_candidates, self._listing = curriculum, num_candidates, listing
        every = self.prefixes.take(np.arange(len(self.prefixes)))
        read = offsets_of(prompts.titles.lengths[every.values] + 1)[every.offsets]
        super().__init__(np.diff(read), [NEXT_TOKEN], passes)

    def has_slots(self, step: int) -> bool:
        """Whether the prompts of a step, 0 the first, have slots. In a rising curriculum the chance is (step + 1) of
        all steps."""
        if self._curriculum != "rising":
            return self._curriculum == "hybrid"
        return self._draws(step, 4).random() < (step + 1) / self.num_steps

    def lists(self, step: int) -> bool:
        """Whether the prompts of a step list candidates."""
        return self._draws(step, 5).random() < self._listing

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        histories, items = self.prefixes.take(members), self.prefixes.targets[members]
        offered = self.candidates(step) if self.lists(step) else None
        prompts = self._prompts.of(histories, offered, slots=self.has_slots(step))
        tokens, lengths = padded(_joined(prompts, self._prompts.answers(items)), 0)
        place = np.arange(tokens.shape[1] - 1)
        is_asked = (place >= prompts.lengths[:, None] - 1) & (place < lengths[:, None] - 1)
        return self._batch(
            members,
            int(is_asked.sum()),
            int(self._lengths[members].sum()),
            input_ids=np.ascontiguousarray(tokens[:, :-1]),
            position_ids=np.tile(place, (len(members), 1)),
            targets=np.where(is_asked, tokens[:, 1:], IGNORE),
        )

    def candidates(self, step: int) -> Ragged:
        """The candidates of a step's rows, in random order: the target, and items that are not in the history."""
        members, generator = self.members(step), self._draws(step, 6)
        histories, rows = self.prefixes.take(members), []
        for row, target in enumerate(self.prefixes.targets[members]):
            taken = np.append(histories[row], target)
            size = min(self._num_items, self._num_candidates + len(taken))
            drawn = generator.choice(self._num_items, size, replace=False)
            others = drawn[~np.isin(drawn, taken)][: self._num_candidates - 1]
            rows.append(generator.permutation(np.append(others, target)))
        return Ragged.of(rows)

    def _draws(self, step: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, step, what])


class Trained(nn.Module):
    """The weights of a model that are trained, and no others: what is optimised, and stored."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = (model,)  # so that it is no part of this
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)

    def _apply(self, fn: Any, recurse: bool = True) -> Trained:
        self._whole[0]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> Trained:
        self._whole[0].train(mode)
        return super().train(mode)


class AnswerLoss:
    """The loss of the tokens that are asked for, as a `Trainable`."""

    def __init__(self, model: Any) -> None:
        self._loss = PackedLoss(model, bf16=distributed.use_bf16("auto", distributed.pick_device()))
        self.module = Trained(model)

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        return self._loss.losses(rows)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return decay_matrices(self.module, weight_decay)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")


class TitleRecommender(SequenceRecommender):
    """Ranks by the probability of titles after prompts of titles. Candidates are listed in the prompt, in their order,
    if it learnt so."""

    def __init__(
        self,
        name: str,
        data: TrainingSequences,
        language: Language,
        prompts: TitlePrompts,
        *,
        slots: bool,
        lists: bool,
        **ranking: Any,
    ) -> None:
        """`ranking`: see `SequenceRecommender`."""
        super().__init__(name, data, language.model, bf16=None, **ranking)
        self._words, self._tokenizer, self._slots, self._lists = prompts, language.tokenizer, slots, lists
        self._rank_by(data.catalogue, prompts.answers(np.arange(data.num_items)))

    def generate(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """The candidate that is written freely for each query, if one is: the likeliest token after each other.

        Raises ConfigError for queries without candidates.
        """
        if any(query.candidates is None for query in queries):
            raise ConfigError(f"{self.name} writes freely among candidates: give each query some")
        longest, end = int(self._words.titles.lengths.max()), self._words.end
        return self._after_prompts(
            queries, lambda tree, asked: generate(tree, end, asked, self._titles_of, longest, self._tokenizer)
        )

    def _titles_of(self, query: RankingQuery) -> Ragged:
        return self._words.titles.take(positions_of(self.catalogue, self.domain, [query.candidates or ()]).values)

    def _prompts(self, queries: Sequence[RankingQuery]) -> Ragged:
        offered = [query.candidates or () if self._lists else () for query in queries]
        items = positions_of(self.catalogue, self.domain, offered)
        prompts = self._words.of(self._histories(queries), items, slots=self._slots)
        self._words.require_room(prompts, "give fewer candidates, or lower max_length or title_tokens and train again")
        return prompts
