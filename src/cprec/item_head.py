"""Item heads: SASRec over what a language model makes of titles, trained beside the model and kept in its folder.

An item's vector is what the lower part of the model makes of its title, along the directions in which the titles of
the domain differ most. `TitleSASRec` reads a history of such vectors and compares it with all of them, so a ranking
needs no decoding, and an item that came after training has a vector at once. In a head of one domain each item also
has a row of its own; one of several domains knows items by their titles alone, so it serves any domain.

Suffixes: N items of the domain in catalogue order, F numbers of a title's states, K directions, Q queries, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from cprec import distributed
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import DataError, ModelError
from cprec.files import whole_folder
from cprec.models import ONE_FORWARD, blocks_of, trunk_and_head
from cprec.provenance import file_sha256
from cprec.recommender import RankingQuery
from cprec.schema import TITLE
from cprec.systems.fit import seconds_to_fit
from cprec.systems.recipes.sasrec import WEIGHT
from cprec.systems.recipes.title_sasrec import ROWS, TitleSASRec, TitleSASRecRecommender
from cprec.systems.signals import TrainingSequences
from cprec.systems.vectors import DIRECTIONS, Directions

FOLDER = "item_head"
"""In a model folder: the files of the head, apart from those that other libraries read."""
ARRAYS, _SETTINGS = "head.safetensors", "head.json"
_MODEL = "cprec.json"
"""What a model says of itself: by its hash a head knows its model."""
TITLE_TOKENS = 32
"""Tokens of a title, or of each other field, that are read; ranking by titles may read fewer."""
DEPTH = 0.4
"""Share of the blocks that read titles; higher ones tell items apart no better (docs/experiments.md)."""
_BATCH = 64

Read = Callable[[np.ndarray], np.ndarray]
"""The states of the titles of some catalogue rows: float32[N, F]."""


@torch.inference_mode()
def title_states(model: Any, titles: Ragged, advance: Callable[[int], None] = lambda number: None) -> np.ndarray:
    """What a causal language model makes of titles: float32[N, F].

    The means over a title's tokens of their embeddings and of their states after `DEPTH` of the blocks, each scaled to
    length one, side by side; zeros for a title without tokens. The blocks above are not run. `advance` is told how many
    titles were read.

    Raises ModelError where a state is not finite.
    """
    trunk, device = trunk_and_head(model)[0], next(model.parameters()).device
    bf16 = distributed.use_bf16("auto", device)
    blocks = blocks_of(model)
    first, last = blocks[0], blocks[max(1, round(DEPTH * len(blocks))) - 1]
    order = np.argsort(titles.lengths, kind="stable")
    parts = []
    for batch in (order[start : start + _BATCH] for start in range(0, len(order), _BATCH)):
        tokens, lengths = titles.take(batch), titles.lengths[batch]
        ids_RT = np.zeros((len(batch), max(1, int(lengths.max()))), dtype=np.int64)
        is_token_RT = np.arange(ids_RT.shape[1]) < lengths[:, None]
        ids_RT[is_token_RT] = tokens.values
        # Padding stands on the right, where no earlier token reads it.
        with ONE_FORWARD, distributed.autocast(device, bf16):
            depths = _run(trunk, torch.from_numpy(ids_RT).to(device), first, last)
        is_token_RT1 = torch.from_numpy(is_token_RT).to(device)[:, :, None]
        means = [F.normalize((one.float() * is_token_RT1).sum(1), dim=-1) for one in depths]
        parts.append(torch.cat(means, dim=1).cpu().numpy())
        advance(len(batch))
    states_NF: np.ndarray = np.concatenate(parts)[np.argsort(order)]
    if not np.isfinite(states_NF).all():
        raise ModelError("the states of titles are not finite (NaN or infinity): take an earlier checkpoint")
    return states_NF


class _Enough(Exception):
    """Ends a forward pass whose remaining blocks are not needed."""


def _run(trunk: Any, ids_RT: torch.Tensor, first: nn.Module, last: nn.Module) -> list[torch.Tensor]:
    """What a decoder's first block reads of some tokens, and what a later one gives: RTD each."""
    found: list[torch.Tensor] = []

    def before(_: Any, given: Any) -> None:
        found.append(given[0])

    def after(_: Any, __: Any, output: Any) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])
        raise _Enough

    hooks = first.register_forward_pre_hook(before), last.register_forward_hook(after)
    try:
        trunk(input_ids=ids_RT, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_of_items(name: str) -> bool:
    """Whether an array of a head, by its name, has a row for each item beside its title's vector."""
    return name.endswith(ROWS)


def made_from(model: Path) -> dict[str, Any]:
    """What the head of a model folder has learnt from; empty where there is no head."""
    path = model / FOLDER / _SETTINGS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["made_from"] if path.is_file() else {}
    return found


def seconds_to_train(split: Split, domain: str, seed: int) -> float:
    """About how long a head of one network takes to train, its reading of titles left out; see `seconds_to_fit`."""
    data = TrainingSequences.of(split, domain)
    nothing_NK = np.zeros((data.num_items, min(DIRECTIONS, data.num_items)), dtype=np.float32)
    with _reading(TitleSASRec(), data, nothing_NK) as settings:
        return seconds_to_fit(settings, split, domain, seed)


@contextmanager
def _reading(
    settings: TitleSASRec, data: TrainingSequences, vectors_NK: np.ndarray, start: ItemHead | None = None
) -> Iterator[TitleSASRec]:
    """The settings with files of the items' vectors, and of the weights to start from, which are gone afterwards."""
    with TemporaryDirectory() as temporary:
        vectors, weights = Path(temporary, "vectors.npz"), Path(temporary, "start.safetensors")
        np.savez(vectors, item_id=np.array(data.item_ids), vectors=vectors_NK)
        if start is not None:
            arrays = start.recommender.arrays()
            save_file({n.removeprefix(WEIGHT): array for n, array in arrays.items() if n.startswith(WEIGHT)}, weights)
        yield replace(settings, vectors=str(vectors), start="" if start is None else str(weights))


@dataclass(frozen=True)
class ItemHead:
    """A trained item head of one domain, over the items of a catalogue."""

    directions: Directions
    recommender: TitleSASRecRecommender
    """Over the titles' coordinates along the directions."""

    @classmethod
    def train(
        cls,
        split: Split,
        domain: str,
        read: Read,
        *,
        settings: TitleSASRec,
        seed: int,
        folder: Path,
        start: ItemHead | None = None,
    ) -> ItemHead:
        """A head that has learnt from the training events of a domain; its best weights are chosen by validation
        queries. `folder` keeps unfinished training, which goes on when the same is asked again. With `start`, a head
        without rows, it has the axes and the network of that one and begins with its weights.

        Raises Unsuitable where the domain has nothing to learn from or to validate with.
        """
        states_NF = read(split.catalogue.rows_of(domain))
        directions = Directions.of(states_NF) if start is None else start.directions.around(states_NF)
        vectors_NK = directions.project(states_NF)
        if start is not None:
            settings = settings.shaped_like(start.recommender.settings)
        return cls._of_vectors(split, domain, directions, vectors_NK, settings, seed, folder, start)

    def trained_again(self, split: Split, *, seed: int, folder: Path, start: ItemHead | None = None) -> ItemHead:
        """The head as the same training makes it of another split of the same items, whose titles are not read again.
        See `train`."""
        mine, settings = self.recommender, self.recommender.settings
        assert isinstance(settings, TitleSASRec)
        vectors_NK = mine.arrays()["vectors"]
        return self._of_vectors(split, mine.domain, self.directions, vectors_NK, settings, seed, folder, start)

    @classmethod
    def _of_vectors(
        cls,
        split: Split,
        domain: str,
        directions: Directions,
        vectors_NK: np.ndarray,
        settings: TitleSASRec,
        seed: int,
        folder: Path,
        start: ItemHead | None,
    ) -> ItemHead:
        data = TrainingSequences.of(split, domain)
        with _reading(settings, data, vectors_NK, start) as with_files:
            made = with_files.make(split, domain, seed=seed, folder=folder)
        assert isinstance(made, TitleSASRecRecommender)
        return cls(directions, settings.recommender(data, made.model))  # the files are gone

    @property
    def serves_any_domain(self) -> bool:
        """Whether items are their titles alone."""
        return not any(map(_is_of_items, self.recommender.arrays()))

    def of(self, catalogue: Catalogue, domain: str, read: Read) -> ItemHead:
        """The same head, of any domain, over the items of one."""
        states_NF = read(catalogue.rows_of(domain))
        directions = self.directions.around(states_NF)
        own = {"domain": np.array(domain), "vectors": directions.project(states_NF)}
        return ItemHead(directions, TitleSASRecRecommender.from_arrays(self.recommender.arrays() | own, catalogue))

    def log_probs(self, queries: Sequence[RankingQuery], in_stock_N: np.ndarray) -> np.ndarray:
        """The logarithm of the share that each item has after each query's history: float64[Q, N].

        The shares of the items in stock sum to one; that of a withdrawn item is measured by theirs. Raises ModelError
        where a score is not finite.
        """
        scores_QN = self.recommender.scores_once(self.recommender.domain, queries).astype(np.float64)
        best_Q1 = scores_QN[:, in_stock_N].max(1, keepdims=True)
        scores_QN -= best_Q1
        log_QN: np.ndarray = scores_QN - np.log(np.exp(scores_QN[:, in_stock_N]).sum(1, keepdims=True))
        if not np.isfinite(log_QN).all():
            raise ModelError("the scores of the item head are not finite (NaN or infinity): take an earlier checkpoint")
        return log_QN

    def over(self, catalogue: Catalogue, read: Read, fields: Sequence[str] = (TITLE,)) -> ItemHead:
        """The same head over the items of another catalogue. Items that are new, or differ in the `fields` that are
        read, are read anew; a new item has no row of its own."""
        was, domain, arrays = self.recommender.catalogue, self.recommender.domain, self.recommender.arrays()
        before, after = was.rows_of(domain), catalogue.rows_of(domain)
        number = {item: place for place, item in enumerate(was.item_id[before])}
        known = np.array([number.get(item, -1) for item in catalogue.item_id[after]], dtype=np.int64)
        same = known >= 0
        for name in fields:
            same &= getattr(was, name)[before][known] == getattr(catalogue, name)[after]
        arrays["vectors"] = vectors_NK = arrays["vectors"][known]
        if not same.all():
            vectors_NK[~same] = self.directions.project(read(after[~same]))
        for name in filter(_is_of_items, arrays):
            rows_ND = arrays[name]
            own_ND = np.where((known >= 0)[:, None], rows_ND[known], 0)
            arrays[name] = np.concatenate([own_ND, rows_ND[len(before) :]]).astype(np.float32)
        return ItemHead(self.directions, TitleSASRecRecommender.from_arrays(arrays, catalogue))


def save_heads(model: Path, heads: Mapping[str, ItemHead], made_from: Mapping[str, Any]) -> None:
    """Write the heads into a model folder, in place of any that are there: one, by its domain, or those of all domains
    of the catalogue, in its order, which differ in their items and their means alone. `made_from` says what they have
    learnt from beside the model."""
    head, *_ = heads.values()
    arrays = head.recommender.arrays() | {"axes": head.directions.axes_FK}
    arrays["mean"] = np.stack([one.directions.mean_F for one in heads.values()])
    arrays["vectors"] = np.concatenate([one.recommender.arrays()["vectors"] for one in heads.values()])
    domain, settings = str(arrays.pop("domain")), json.loads(str(arrays.pop("settings")))
    about = {"domain": domain if len(heads) == 1 else None, "settings": settings, "made_from": made_from}
    about |= {"model": file_sha256(model / _MODEL)}
    with whole_folder(model / FOLDER) as folder:
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / ARRAYS)
        (folder / _SETTINGS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_heads(model: Path, catalogue: Catalogue) -> dict[str, ItemHead]:
    """The heads of a model folder by domain, over the model's own items; empty where it has none.

    Raises DataError where their files are damaged, incomplete, or of another model.
    """
    folder = model / FOLDER
    if not folder.is_dir():
        return {}
    try:
        about = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS)
        if about["model"] != file_sha256(model / _MODEL):
            raise ValueError("it belongs to another model than the folder holds now")
        means_DF, axes_FK = np.atleast_2d(arrays.pop("mean")), arrays.pop("axes")
        arrays["settings"] = np.array(json.dumps(about["settings"]))
        domains = catalogue.domains if about["domain"] is None else (about["domain"],)
        stops = np.cumsum([len(catalogue.rows_of(domain)) for domain in domains])
        heads = {}
        for domain, mean_F, vectors_NK in zip(domains, means_DF, np.split(arrays["vectors"], stops[:-1]), strict=True):
            own = arrays | {"domain": np.array(domain), "vectors": vectors_NK}
            recommender = TitleSASRecRecommender.from_arrays(own, catalogue)
            heads[domain] = ItemHead(Directions(mean_F, axes_FK), recommender)
        return heads
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{folder} cannot be used ({error}): delete it and train again with item_head=true") from None
