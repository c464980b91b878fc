"""Language models in systems: which one, its tokens of titles, what it makes of them, and tables of such vectors.

Suffixes: V items, X items and special rows, K some items, R rows, T tokens or positions, F width of the language model,
D width of items' vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from cprec import distributed
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, Unsuitable
from cprec.gguf import model_source
from cprec.models import blocks_of, context_of, load_model, number_of_blocks, tiny_model, trunk_and_head
from cprec.progress import track
from cprec.provenance import TOKENIZER, WEIGHTS, FileHashes, model_hashes
from cprec.systems.dropout import Dropout
from cprec.systems.encoders import Encoder, at_last
from cprec.systems.items import NUM_SPECIAL, ItemTable
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import TrainingSequences, padded
from cprec.systems.vectors import Directions
from cprec.text.prompts import Template
from cprec.text.tokenizer import beginning_of, encode_pieces, load_tokenizer, train_tokenizer
from cprec.train.trainable import decay_matrices

VOCABULARY = 4096
"""Tokens of a tokenizer that is trained on titles, at most."""
CONTEXT = 8192
"""Tokens that a decoder of random weights may read."""
LENGTH = 5.0
"""The mean length of vectors that an adapter reads. Of shorter ones its biases would make most: items would be near
each other at first."""
COMMON = 64
"""Titles, spread over the catalogue, that tell what is common to all."""
READ_BATCH = 64
"""Titles, of like length, that are read at once."""

Pool = Literal["end", "mean"]
"""What stands for a title: the state of the token that ends it, or the mean of the states of its own tokens."""


@dataclass(frozen=True)
class Language:
    """A language model, and the titles of a domain in its tokens."""

    model: Any
    """A causal language model of transformers, in fp32."""
    tokenizer: Any
    titles: Ragged
    """Of each item in the order of the catalogue, without tokens before or after them; some may have none."""

    @property
    def begin(self) -> list[int]:
        """The tokens that stand before every text; mostly none."""
        return beginning_of(self.tokenizer)

    @property
    def end(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def width(self) -> int:
        """Of the model's states."""
        return int(self.model.get_input_embeddings().embedding_dim)


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(SystemSettings):
    """Settings of systems in which a language model reads titles."""

    base: str = ""
    """A causal language model: its Hugging Face name, its folder or a GGUF file. Empty: a small decoder of random
    weights, with a tokenizer trained on the domain's titles."""
    title_tokens: int = 32
    """Tokens of a title that are read, the first ones."""
    frozen_layers: float = 0.0
    """Of the blocks that are read, the lowest ones, which stay as they are, with the tokens' vectors below them: a
    fraction below 1, or a number. 0: all is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("title_tokens")
        check_blocks("frozen_layers", self.frozen_layers)

    @property
    def needs_language(self) -> bool:
        """Whether the language model reads anything with these settings."""
        return True

    def language(self, data: TrainingSequences, seed: int) -> Language:
        """The language model before training, and the domain's titles; of no base, by the seed.

        Raises ConfigError for a base that is no language model, whose tokenizer has no token that ends a text, or whose
        context is shorter than a title; Unsuitable where no title has a token.
        """
        if self.base:
            try:
                model, tokenizer = load_model(self.base), load_tokenizer(self.base)
            except ConfigError as error:
                raise ConfigError(f"base={self.base} cannot be used: {error}") from error
        else:
            tokenizer = train_tokenizer([Template().title(title) for title in data.titles], VOCABULARY)
            ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            model = tiny_model(len(tokenizer), max_position_embeddings=CONTEXT, seed=seed, **ids)
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"base={self.base}: its tokenizer has no token that ends a text, and titles need one")
        most = self.title_tokens + len(beginning_of(tokenizer)) + 1
        if (context := context_of(model)) is not None and context < most:
            raise ConfigError(
                f"title_tokens={self.title_tokens} makes texts of {most} tokens with those around a title, and "
                f"base={self.base} reads {context}: lower title_tokens by {most - context}"
            )
        titles = tokens_of(tokenizer, data.titles, self.title_tokens)
        if not len(titles.values):
            raise Unsuitable(
                f"{self.LABEL or type(self).__name__} reads titles, and no item of domain {data.domain!r} has one: "
                "take a system that needs no text"
            )
        return Language(model, tokenizer, titles)

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the files of the base count, not their place."""
        if not self.base:
            return super().identity()
        hashes = FileHashes(model_source(self.base))
        return super().identity() | {"base": model_hashes(self.base, (*WEIGHTS, *TOKENIZER), hashes) or self.base}


def check_blocks(name: str, blocks: float) -> None:
    """Raise ConfigError unless a setting is a share of blocks or a number of them."""
    if blocks < 0 or (blocks > 1 and blocks % 1):
        raise ConfigError(f"{name}={blocks:g} must be a fraction below 1 or a whole number")


def tokens_of(tokenizer: Any, texts: Sequence[str], most: int) -> Ragged:
    """The first tokens of texts, `most` at most, as they are where they follow other words."""
    pieces = encode_pieces(tokenizer, [Template().title(text) if text else "" for text in texts])
    return Ragged.of([tokens[:most] for tokens in pieces])


def mean_rows(titles: Ragged, rows_TF: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of each title's tokens, VF; of an item without a title that of all other means."""
    values, starts = torch.from_numpy(titles.values), torch.from_numpy(titles.offsets[:-1])
    means_VF = nn.functional.embedding_bag(values, rows_TF, starts, mode="mean")
    has_title_V = torch.from_numpy(titles.lengths > 0)
    means_VF[~has_title_V] = means_VF[has_title_V].mean(0)
    return means_VF


class _Below(nn.Module):
    """Stands in a decoder's list for a block that is not run, and gives the states that are known there."""

    states: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden if self.states is None else self.states


class Blocks(nn.Module):
    """A copy of some blocks of a language model and of its last norm, without its output layer."""

    _last: torch.Tensor | None = None

    def __init__(self, model: Any, blocks: range, *, reads_tokens: bool) -> None:
        """If it does not read tokens it has no vectors of them, and is given the states below its first block."""
        super().__init__()
        trunk, _ = trunk_and_head(model)
        self._below, self._reads_tokens = _Below(), reads_tokens
        kept = [copy.deepcopy(blocks_of(model)[number]) for number in blocks]
        # Configurations say by a block's number how it attends, so that each keeps its place in the list.
        instead: dict[int, Any] = {id(blocks_of(model)): nn.ModuleList([self._below] * blocks.start + kept)}
        if not reads_tokens:
            instead[id(trunk.get_input_embeddings())] = nn.Identity()
        self.trunk = copy.deepcopy(trunk, instead)
        kept[-1].register_forward_hook(self._note)

    def forward(self, given: torch.Tensor, *, normed: bool = True, in_bf16: bool = True) -> torch.Tensor:
        """The last states, before or after the norm, of tokens, int64[R, T], or of what states, RTF, become: RTF in
        fp32, computed in bf16 where that is allowed and the machine is good at it. Padding is on the right, where no
        earlier place reads it."""
        with distributed.autocast(given.device, in_bf16 and distributed.use_bf16("auto", given.device)):
            if self._reads_tokens:
                found = self.trunk(input_ids=given, use_cache=False)
            else:
                # Some decoders scale what they are given before their first block.
                self._below.states = given
                found = self.trunk(inputs_embeds=given, use_cache=False)
        last_RTF, self._below.states, self._last = self._last, None, None
        assert last_RTF is not None
        states_RTF: torch.Tensor = found.last_hidden_state if normed else last_RTF
        return states_RTF.float()

    def _note(self, _: Any, __: Any, output: Any) -> None:
        self._last = output if isinstance(output, torch.Tensor) else output[0]


class TitleReader(nn.Module):
    """Makes a vector of each title by the lower blocks of a language model and its last norm.

    The lowest of these blocks may be frozen, with the vectors of tokens. Then the states that they make of all titles'
    tokens are computed once and kept, in fp32, and only the blocks above are run. If all are frozen, the norm is too,
    and the titles' vectors are kept. What is frozen is no part of the module.
    """

    kept: torch.Tensor | None

    def __init__(self, language: Language, *, pool: Pool, layers: float = 0.0, frozen_layers: float = 0.0) -> None:
        """`layers` is how many blocks read, a fraction below 1 or a number; 0: all. `frozen_layers` is a fraction or a
        number of those. Raises ConfigError where there are not as many blocks."""
        super().__init__()
        model, total = language.model.to(distributed.pick_device()), len(blocks_of(language.model))
        num_read = number_of_blocks(layers, total) if layers else total
        if not 0 < num_read <= total:
            raise ConfigError(f"layers={layers:g} means {num_read} blocks, and the language model has {total}")
        num_frozen = number_of_blocks(frozen_layers, num_read)
        if num_frozen > num_read:
            raise ConfigError(f"frozen_layers={frozen_layers:g}, but {num_read} blocks are read: give so many at most")
        self.width, self._pool, self._num_begin = language.width, pool, len(language.begin)
        ending = [language.end] if pool == "end" else []
        texts = [[*language.begin, *language.titles[number], *ending] for number in range(len(language.titles))]
        self._texts = Ragged.of(texts)
        self._places = Ragged(np.arange(len(self._texts.values)), self._texts.offsets)
        self.register_buffer("kept", None, persistent=False)
        self.blocks: Blocks | None = None
        if num_frozen:
            lower = Blocks(model, range(num_frozen), reads_tokens=True)
            self.kept = self._once(lower, is_all=num_frozen == num_read)
        if num_frozen < num_read:
            self.blocks = Blocks(model, range(num_frozen, num_read), reads_tokens=not num_frozen)
            if frozen_layers and not num_frozen:
                self.blocks.trunk.get_input_embeddings().requires_grad_(False)

    def forward(self, items_K: torch.Tensor) -> torch.Tensor:
        """The vectors of some titles, by number: KF."""
        if self.blocks is None:
            assert self.kept is not None
            return self.kept[items_K]
        numbers, found = items_K.cpu().numpy(), [torch.empty(0, self.width, device=items_K.device)]
        order = np.argsort(self._texts.lengths[numbers], kind="stable")
        for batch in _batches(numbers[order]):
            source = self._texts if self.kept is None else self._places
            given, lengths_R = self._padded(source, batch)
            states_RTF = self.blocks(given if self.kept is None else self.kept[given])
            found.append(self._pooled(states_RTF, lengths_R))
        return torch.cat(found)[torch.from_numpy(np.argsort(order)).to(items_K.device)]

    @torch.no_grad()
    def _once(self, lower: Blocks, *, is_all: bool) -> torch.Tensor:
        """What blocks make of all titles: their vectors, VF, or the states of all tokens, one after the other."""
        order, found = np.argsort(self._texts.lengths, kind="stable"), []
        with track(len(order), "reading titles", unit="titles") as progress:
            for batch in _batches(order):
                ids_RT, lengths_R = self._padded(self._texts, batch)
                states_RTF = lower(ids_RT, normed=is_all)
                is_token_RT = torch.arange(ids_RT.shape[1], device=ids_RT.device) < lengths_R[:, None]
                found.append(self._pooled(states_RTF, lengths_R) if is_all else states_RTF[is_token_RT])
                progress.advance(len(batch))
        places = order if is_all else self._places.take(order).values
        return torch.cat(found)[torch.from_numpy(np.argsort(places))]

    def _padded(self, source: Ragged, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of some titles, filled up on the right, and their lengths: RT and R."""
        device = distributed.pick_device() if self.blocks is None else next(self.blocks.parameters()).device
        rows_RT, lengths_R = padded(source.take(numbers), 0)
        return torch.from_numpy(rows_RT).to(device), torch.from_numpy(lengths_R).to(device)

    def _pooled(self, states_RTF: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """One vector of the states of each title: RF; zeros where the mean is one of no tokens."""
        if self._pool == "end":
            return at_last(states_RTF, lengths_R)
        place_T = torch.arange(states_RTF.shape[1], device=lengths_R.device)
        is_own_RT1 = ((place_T >= self._num_begin) & (place_T < lengths_R[:, None]))[:, :, None]
        return (states_RTF * is_own_RT1).sum(1) / is_own_RT1.sum(1).clamp(min=1)


def _batches(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """What is read at once, in order."""
    return (numbers[start : start + READ_BATCH] for start in range(0, len(numbers), READ_BATCH))


class TextTable(ItemTable):
    """Vectors that a language model makes of titles, through an adapter, which is trained. A title is read once,
    however often its item is asked for. Special rows are what the adapter makes of zeros.

    The adapter reads them along the directions in which those of all titles differ most before training, which stay,
    and without what is common to them: a step of training moves that by far more than what tells titles apart. How far
    it has moved is measured by a few titles, which are read along. With `rows`, their width, each item has a trained
    row beside it, which starts at zero and is added.
    """

    def __init__(
        self,
        reader: TitleReader,
        num_items: int,
        adapter: Callable[[int], nn.Module],
        *,
        rows: int | None,
        num_special: int = NUM_SPECIAL,
    ) -> None:
        """`adapter` makes it for vectors of a width."""
        super().__init__()
        self.num_items, self.num_special, self.reader = num_items, num_special, reader
        common = torch.arange(num_items)[:: -(-num_items // COMMON)]
        self.register_buffer("common", common, persistent=False)
        with torch.no_grad():
            states_VF = reader(torch.arange(num_items, device=distributed.pick_device())).cpu()
        directions = Directions.of(states_VF.numpy())
        length = np.linalg.norm(directions.project(states_VF.numpy()), axis=1).mean()
        if not length > 0:
            raise Unsuitable("a language model reads the titles, and all items are alike to it: it tells none apart")
        scale = LENGTH / length
        axes_FK = torch.from_numpy(directions.axes_FK * np.float32(scale))
        # As parameters without gradients they are in checkpoints.
        self.mean_F, self.axes_FK, self.common_F = (
            nn.Parameter(given.contiguous(), requires_grad=False)
            for given in (torch.from_numpy(directions.mean_F), axes_FK, states_VF[common].mean(0))
        )
        self.adapter = adapter(axes_FK.shape[1])
        self.rows = None if rows is None else nn.Parameter(torch.zeros(num_items + num_special, rows))

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        adapted: torch.Tensor = self.adapter(self.states(items))
        if self.rows is not None:
            adapted = adapted + (self.rows if items is None else nn.functional.embedding(items, self.rows))
        return adapted

    def states(self, items: torch.Tensor | None = None) -> torch.Tensor:
        """What the adapter reads, of some items, by number, or of all: [..., K] or [V + S, K]."""
        common = self.get_buffer("common")
        if items is None:
            items = torch.arange(self.num_items + self.num_special, device=common.device)
        read, place = torch.cat([common, items.flatten()]).unique(return_inverse=True)  # special rows come last
        read_F = self.reader(read[read < self.num_items])
        moved_F = read_F[place[: len(common)]].mean(0) - self.common_F
        states = (read_F - (self.mean_F + moved_F)) @ self.axes_FK
        states = nn.functional.pad(states, (0, 0, 0, len(read) - len(states)))
        return states[place[len(common) :]].unflatten(0, items.shape)


class LanguageEncoder(Encoder):
    """Reads histories with the lower blocks of a language model, to which items' vectors are what vectors of tokens
    are, each through a linear map, and maps its states back. Without a size there are no maps: items are tokens."""

    def __init__(self, language: Language, num_blocks: int, max_length: int, size: int | None, dropout: float) -> None:
        """Raises ConfigError where the language model has fewer blocks, or a shorter context than histories are."""
        super().__init__()
        if num_blocks > (total := len(blocks_of(language.model))):
            raise ConfigError(f"num_blocks={num_blocks}, and the language model has {total}: give so many at most")
        if (context := context_of(language.model)) is not None and context < max_length:
            raise ConfigError(f"max_length={max_length}, and the language model reads {context}: give so many at most")
        self.blocks = Blocks(language.model, range(num_blocks), reads_tokens=False)
        width = language.width
        self.into = nn.Identity() if size is None else nn.Linear(size, width)
        self.back = nn.Identity() if size is None else nn.Linear(width, size)
        self.dropout = Dropout(dropout)

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.into(self.dropout(inputs_RTD))
        return embedded

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        # Scores of one history must not depend on those that are read with it, as in bf16 they would.
        hidden_RTD: torch.Tensor = self.back(self.blocks(embedded_RTD, in_bf16=self.training))
        return hidden_RTD

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return at_last(self.read(embedded_RTD, lengths_R), lengths_R)


def language_groups(module: nn.Module, weight_decay: float, rate_share: float) -> list[dict[str, Any]]:
    """Parameter groups of a module, in which the weights of language models have a share of the learning rate; see
    `Trainable.parameter_groups`."""
    blocks = (part for part in module.modules() if isinstance(part, Blocks))
    of_language = {id(weight) for part in blocks for weight in part.parameters()}
    groups = []
    for group in decay_matrices(module, weight_decay):
        for is_language, share in ((False, 1.0), (True, rate_share)):
            chosen = [weight for weight in group["params"] if (id(weight) in of_language) == is_language]
            groups.append({**group, "params": chosen, "rate_share": share})
    return [group for group in groups if group["params"]]
