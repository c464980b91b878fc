"""Turns prompts into token ids: every piece is tokenised once, and a document is a ragged gather of pieces."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import clean_title
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.schema import MIXED, SPECIFIC, TITLE
from cprec.text.config import DISTINCT, PLAIN, TitleCut
from cprec.text.distinct import distinct_cuts
from cprec.text.prompts import Template
from cprec.text.tokenizer import encode_pieces


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The smallest type of token ids that has room for a vocabulary; little-endian."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


class TemplateMarks:
    """Finds the template's fixed tokens in documents, so that a loss can leave them out."""

    def __init__(self, tokenizer: Any, template: Template, domains: Sequence[str], begin: Sequence[int] = ()) -> None:
        line, next_, *tags = encode_pieces(
            tokenizer, [template.line, template.next, *(template.tag(domain) for domain in domains)]
        )
        self._marks = [np.array(line), np.array(next_)]  # they open a line, and the target
        self._tags = sorted(map(np.array, tags), key=len)
        self._mixed_head = np.array([*begin, *encode_pieces(tokenizer, [template.head(template.mixed_scope)])[0]])

    def in_titles(self, tokens: Ragged) -> np.ndarray:
        """bool per token: whether it belongs to a title, or is the end-of-sequence that closes the last title.

        The rest is the head, the opening of each line and, in mixed documents, the tag before each title.
        """
        values, starts = tokens.values, tokens.offsets[:-1]
        mixed = np.repeat(_begins_with(values, starts, self._mixed_head), tokens.lengths)
        # +1 where a stretch of the template begins and -1 where it ends: the running sum is 0 in titles alone.
        edge = np.zeros(len(values) + 1, dtype=np.int64)
        openings = [np.array([len(values)])]
        for mark in self._marks:
            at = np.flatnonzero(values == mark[0])
            at = at[_begins_with(values, at, mark)]
            end = at + len(mark)
            # The tag behind each opening of a mixed document; of several that fit, the longest, which comes last.
            width = np.zeros(len(at), dtype=np.int64)
            for tag in self._tags:
                width[_begins_with(values, end, tag)] = len(tag)
            np.add.at(edge, at, 1)
            np.add.at(edge, end + np.where(mixed[at], width, 0), -1)
            openings.append(at)
        # A head reaches from the start of its document to the first line opening, or to the end where there is none.
        opening = np.sort(np.concatenate(openings))
        head_end = np.minimum(opening[np.searchsorted(opening, starts)], tokens.offsets[1:])
        np.add.at(edge, starts, 1)
        np.add.at(edge, head_end, -1)
        return np.cumsum(edge[:-1]) == 0


def _begins_with(values: np.ndarray, starts: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """bool per start: whether the pattern stands there."""
    fits = starts + len(pattern) <= len(values)
    for place, token in enumerate(pattern):
        fits &= values[np.minimum(starts + place, len(values) - 1)] == token
    return fits


BATCH = 1 << 15
"""Titles that are tokenised at once."""

_SAVED = ("max_title_tokens", "eos_id", "vocabulary_size")


class PromptEncoder:
    """Turns item rows of a catalogue into documents, prompts and titles of token ids.

    `tokenizer` is a fast Hugging Face tokenizer with an end-of-sequence token; titles, and the other fields of items
    that the template asks for, keep at most `max_title_tokens` tokens each; `title_cut` says which ones of a title, by
    all titles of its domain in this catalogue. Documents and prompts begin with the tokens
    `begin` (`tokenizer.beginning_of`). Raises ConfigError if the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        catalogue: Catalogue,
        *,
        max_title_tokens: int = 32,
        title_cut: TitleCut = PLAIN,
        template: Template | None = None,
        begin: Sequence[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token, which closes every document and title")
        self.catalogue = catalogue
        self.template = template or Template()
        self.max_title_tokens = max_title_tokens
        self.title_cut = title_cut
        self.eos_id = int(tokenizer.eos_token_id)
        self.vocabulary_size = len(tokenizer)
        t, domains = self.template, catalogue.domains
        line, next_, *scoped = encode_pieces(
            tokenizer,
            [t.line, t.next, *map(t.head, [t.mixed_scope, *domains]), *map(t.tag, domains)],
        )
        mixed_head, *heads = ([*begin, *head] for head in scoped[: 1 + len(domains)])
        # In the order of `_set_pieces`.
        frame = Ragged.of([line, next_, mixed_head, [self.eos_id], *heads, *scoped[1 + len(domains) :]])
        items = self.encode_items(tokenizer, np.arange(len(catalogue)), max_title_tokens)
        self._set_pieces(Ragged.concatenate([frame, items]))

    def encode_items(self, tokenizer: Any, rows: np.ndarray, most: int | None = None) -> Ragged:
        """The title of each catalogue row, with the other fields that the template asks for, each cut to `most`."""
        fields = [self._encode_field(tokenizer, rows, name, most) for name in self.template.item_fields]
        if self.title_cut == DISTINCT and most is not None:
            fields[0] = self._tell_apart(tokenizer, rows, fields[0], most)
        # One field's rows after the other's: the fields of an item are every len(rows)-th of them.
        by_item = np.arange(len(fields) * len(rows)).reshape(len(fields), len(rows)).T.ravel()
        tokens = Ragged.concatenate(fields).take(by_item)
        return Ragged(tokens.values, tokens.offsets[:: len(fields)])

    def _encode_field(self, tokenizer: Any, rows: np.ndarray, name: str, most: int | None) -> Ragged:
        """One field of each catalogue row, cut to its first `most` tokens."""
        t, pieces = self.template, [Ragged.of([])]
        for start in range(0, len(rows), BATCH):  # in batches, because lists of numbers take far more room than arrays
            texts = getattr(self.catalogue, name)[rows[start : start + BATCH]]
            texts = [t.title(text) if name == TITLE else t.field(clean_title(text)) for text in texts]
            pieces.append(Ragged.of([ids[:most] for ids in encode_pieces(tokenizer, texts)]))
        return Ragged.concatenate(pieces)

    def _tell_apart(self, tokenizer: Any, rows: np.ndarray, cut: Ragged, most: int) -> Ragged:
        """The titles of catalogue rows once more, where those of a domain are equal in `cut` but not as a whole."""
        tokens = [cut[row] for row in range(len(cut))]
        domains = self.catalogue.domain[rows]
        for domain in np.unique(domains):
            mine = np.flatnonzero(domains == domain)
            numbers = cut.take(mine).numbers()
            whole = [tuple(tokens[row].tolist()) for row in mine]
            some = np.flatnonzero(np.bincount(numbers)[numbers] > 1)  # only these are tokenised again
            uncut = self._encode_field(tokenizer, rows[mine[some]], TITLE, None)
            for place, row in enumerate(some):
                whole[row] = tuple(uncut[place].tolist())
            for row, chosen in zip(mine, distinct_cuts(whole, most), strict=True):
                tokens[row] = np.array(chosen, dtype=np.int64)
        return Ragged.of(tokens)

    def with_catalogue(self, tokenizer: Any, catalogue: Catalogue) -> PromptEncoder:
        """The same for another catalogue of the same domains; items that did not change are not tokenised again.

        They keep their tokens; the cuts of the others are chosen among the others alone.
        """
        assert catalogue.domains == self.catalogue.domains
        out = copy.copy(self)
        out.catalogue = catalogue
        # The row that each item has in the old catalogue, -1 where it is new: its place in its domain, then in all.
        before = [self.catalogue.arrow_ids(domain) for domain in catalogue.domains]
        known = np.concatenate(
            [
                pc.fill_null(pc.index_in(catalogue.arrow_ids(domain), ids), -1).to_numpy().astype(np.int64)
                for domain, ids in zip(catalogue.domains, before, strict=True)
            ]
        )
        known[known >= 0] += offsets_of(np.array([len(ids) for ids in before]))[catalogue.domain[known >= 0]]
        # Items whose text did not change keep their pieces; the others get new ones, behind the old pieces.
        same = known >= 0
        for name in self.template.item_fields:
            same[same] = getattr(catalogue, name)[same] == getattr(self.catalogue, name)[known[same]]
        new = out.encode_items(tokenizer, np.flatnonzero(~same), self.max_title_tokens)
        place = np.where(same, self._titles + known, len(self._pieces) + np.cumsum(~same) - 1)
        every = Ragged.concatenate([self._pieces, new])
        out._set_pieces(every.take(np.concatenate([np.arange(self._titles), place])))
        return out

    def same_titles(self, rows: np.ndarray, other: PromptEncoder, other_rows: np.ndarray) -> bool:
        """Whether rows of two catalogues have the same tokens, one by one."""
        mine, theirs = self.titles(rows), other.titles(other_rows)
        return np.array_equal(mine.offsets, theirs.offsets) and np.array_equal(mine.values, theirs.values)

    def _set_pieces(self, pieces: Ragged) -> None:
        """Number the pieces: four that all documents share, then each domain's head, each domain's tag, the titles."""
        domains = self.catalogue.domains
        self._pieces = pieces
        # Documents are made by the million, so their tokens have the smallest type that holds the vocabulary.
        self._small_pieces = Ragged(pieces.values.astype(token_dtype(self.vocabulary_size)), pieces.offsets)
        self._line, self._next, self._mixed_head, self._eos = 0, 1, 2, 3
        self._heads = 4 + np.arange(len(domains))
        self._tags = self._heads + len(domains)
        self._titles = 4 + 2 * len(domains)

    def save(self, folder: Path) -> None:
        """Write the tokens of every piece, so that `load` need not tokenise them again."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", self._pieces.values)
        np.save(folder / "offsets.npy", self._pieces.offsets)
        about = {name: getattr(self, name) for name in (*_SAVED, "title_cut")} | {"template": asdict(self.template)}
        (folder / "encoder.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, catalogue: Catalogue) -> PromptEncoder:
        """The encoder that `save` wrote, for the same catalogue; tokens stay on disk until they are used."""
        about = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        encoder = cls.__new__(cls)
        encoder.catalogue, encoder.template = catalogue, Template(**about["template"])
        encoder.max_title_tokens, encoder.eos_id, encoder.vocabulary_size = (about[name] for name in _SAVED)
        encoder.title_cut = about.get("title_cut", PLAIN)  # older folders have none
        tokens, offsets = (np.load(folder / name, mmap_mode="r") for name in ("tokens.npy", "offsets.npy"))
        encoder._set_pieces(Ragged(tokens, offsets))
        return encoder

    @property
    def max_item_tokens(self) -> int:
        """The most tokens that an item can have."""
        return self.max_title_tokens * len(self.template.item_fields)

    @property
    def line_tokens(self) -> np.ndarray:
        """The tokens that open a line of the history; no title contains them (titles hold no newline)."""
        return self._pieces[self._line]

    @property
    def next_tokens(self) -> np.ndarray:
        """The tokens that stand before the target."""
        return self._pieces[self._next]

    def distinct_tokens(self) -> np.ndarray:
        """The tokens that any document or prompt of this catalogue can have, ascending."""
        return np.unique(self._pieces.values)

    def heads(self) -> Ragged:
        """The tokens before the first line: of specific documents of each domain, then of mixed ones."""
        return self._pieces.take(np.append(self._heads, self._mixed_head))

    def tag_tokens(self, domain: int) -> np.ndarray:
        """The tokens of a domain's tag; `domain` is an index into the catalogue's domains."""
        return self._pieces[int(self._tags[domain])]

    def titles(self, rows: np.ndarray, *, end: bool = False) -> Ragged:
        """Title tokens of catalogue rows, other fields in use included, each closed by end-of-sequence if `end`."""
        if not end:
            return self._pieces.take(self._titles + rows)
        pieces = np.stack([self._titles + rows, np.full(len(rows), self._eos)], axis=1).ravel()
        return self._join(Ragged(pieces, 2 * np.arange(len(rows) + 1)))

    def documents(self, kind: str, domains: np.ndarray, events: Ragged) -> tuple[Ragged, np.ndarray]:
        """Documents whose last event is the target.

        `events` holds catalogue rows, at least one each document; `domains` the index of each document's domain (unused
        for mixed). Returns the token rows (uint16 or uint32, as shards have them) and, per document, where the target's
        own tokens start (the title of the last event, after `Next:` and the tag).
        """
        assert (events.lengths > 0).all(), "a document needs a target"
        pieces = self._sequence(kind, domains, events, last_is_target=True)
        tokens = self._join(pieces, self._small_pieces)
        target = self._pieces.lengths[self._titles + events.values[events.offsets[1:] - 1]] + 1
        return tokens, tokens.lengths - target

    def prompts(self, kind: str, domains: np.ndarray, history: Ragged) -> Ragged:
        """Prompts that end where the title of an item of `domains` must follow; histories may be empty."""
        return self._join(self._sequence(kind, domains, history, last_is_target=False))

    def event_tokens(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """How many tokens each event adds to a document, its line opening included."""
        lengths = self._pieces.lengths
        extra = lengths[self._tags[self.catalogue.domain[rows]]] if kind == MIXED else 0
        return lengths[self._line] + extra + lengths[self._titles + rows]

    def frame_tokens(self, kind: str, domains: np.ndarray) -> np.ndarray:
        """How many tokens a prompt of each domain has beside those of its history."""
        lengths = self._pieces.lengths
        if kind == MIXED:
            return lengths[self._mixed_head] + lengths[self._next] + lengths[self._tags[domains]]
        return lengths[self._heads[domains]] + lengths[self._next]

    def fit(self, kind: str, domains: np.ndarray, history: Ragged, max_tokens: int) -> Ragged:
        """The most recent events of each history with which the prompt has at most `max_tokens` tokens."""
        room = max_tokens - self.frame_tokens(kind, domains)
        # Tokens from each event to the last of its history; events fit as long as these do.
        total = offsets_of(self.event_tokens(kind, history.values))
        to_end = np.repeat(total[history.offsets[1:]], history.lengths) - total[:-1]
        keep = to_end <= np.repeat(room, history.lengths)
        # How many events each history keeps; `reduceat` gives an empty one its neighbour's first, hence the factor.
        num_kept = np.add.reduceat(np.r_[keep, False], history.offsets[:-1]) * (history.lengths > 0)
        return Ragged(history.values[keep], offsets_of(num_kept))

    def _sequence(self, kind: str, domains: np.ndarray, events: Ragged, *, last_is_target: bool) -> Ragged:
        """Piece numbers of each document: head, then (line opening, tag if mixed, title) an event, then the end."""
        assert kind in (SPECIFIC, MIXED), kind
        mixed = kind == MIXED
        width = 3 if mixed else 2  # pieces of an event
        tail = 1 if last_is_target or not mixed else 2  # pieces behind the last event
        offsets = offsets_of(1 + width * events.lengths + tail)
        out = np.empty(offsets[-1], dtype=np.int64)
        out[offsets[:-1]] = self._mixed_head if mixed else self._heads[domains]
        # Where each event's pieces begin: behind the head, `width` for each event before it.
        at = np.repeat(offsets[:-1], events.lengths) + 1 + width * events.place_of
        out[at] = self._line
        if mixed:
            out[at + 1] = self._tags[self.catalogue.domain[events.values]]
        out[at + width - 1] = self._titles + events.values
        if last_is_target:
            # The target's line opens as `Next:` does, and the end-of-sequence closes it.
            out[at[events.offsets[1:] - 1]] = self._next
            out[offsets[1:] - 1] = self._eos
        else:
            # The prompt ends with `Next:` and, in a mixed one, the tag of the domain asked for.
            out[offsets[1:] - tail] = self._next
            if mixed:
                out[offsets[1:] - 1] = self._tags[domains]
        return Ragged(out, offsets)

    def _join(self, pieces: Ragged, of: Ragged | None = None) -> Ragged:
        """Token rows of rows of piece numbers."""
        tokens = (of or self._pieces).take(pieces.values)
        return Ragged(tokens.values, tokens.offsets[pieces.offsets])
