"""What the trained baselines share: training windows of item numbers, batches for the one training loop, and ranking.

Items of the domain are numbered as they stand in the catalogue, 0 to N - 1; the number N pads. Suffixes: R rows,
T positions, D width, V items, Q queries.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cprec import distributed
from cprec.baselines.objectives import Objective, check_objective, objective_loss
from cprec.baselines.ranking import ScoringRecommender
from cprec.baselines.search import Choice, OneOf, Real
from cprec.batch import IGNORE, Batch
from cprec.data.catalogue import Catalogue
from cprec.data.interactions import Interactions, stable_order
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.ranks import ndcg
from cprec.recommender import RankingQuery
from cprec.schema import VALIDATION
from cprec.train.checkpoint import newest_intact, remove_checkpoints
from cprec.train.folder import LOG, read_log
from cprec.train.loop import Cadence, Optimisation, train
from cprec.train.schedule import WSA
from cprec.train.trainable import decay_matrices

NEXT_ITEM = "next_item"
"""The name of the one loss term."""
POOL = 32
"""Batches among which windows are sorted by length: enough that a batch holds hardly any padding."""
VALIDATION_QUERIES = 4000
"""Validation queries, a seeded sample at most, that decide which weights are kept."""
ENCODE_BATCH = 512
"""Histories encoded at once."""
SCORES = 1 << 20
"""Scores counted at once: as many as stay in the cache."""
ITEM_BLOCK = 1024
"""Items of a product on a CPU: with all of a large catalogue it takes twice as long."""


class _Enough(Exception):
    """Training has not become better for long enough."""


class ItemModel(nn.Module, ABC):
    """A model that represents histories and items by vectors; their products are scores."""

    @abstractmethod
    def forward(
        self, input_ids_RT: torch.Tensor, targets_RT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Representations where a target is, the targets themselves, and the items' vectors: ND, N, VD."""

    @abstractmethod
    def encode(self, input_ids_RT: torch.Tensor, lengths_R: torch.Tensor, users_R: torch.Tensor) -> torch.Tensor:
        """Representations of whole histories, padded on the right, by users (rows of the training log, -1 if they are
        not in it): RD."""

    @abstractmethod
    def items(self) -> torch.Tensor:
        """Vectors of all items: VD."""


class ItemTrainable:
    """An item model with its objective, as a `Trainable`."""

    def __init__(self, model: ItemModel, objective: Objective, num_negatives: int, bf16: bool) -> None:
        self.module, self._objective, self._num_negatives = model, objective, num_negatives
        self._dtype = torch.bfloat16 if bf16 else torch.float32

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        hidden_ND, target_N, weight_VD = self.module(rows["input_ids"], rows["targets"])
        loss = objective_loss(
            self._objective,
            hidden_ND,
            weight_VD,
            target_N,
            num_negatives=self._num_negatives,
            dtype=self._dtype,
        )
        return {NEXT_ITEM: loss}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return decay_matrices(self.module, weight_decay)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class TrainedBaseline(ABC):
    """Settings that all trained baselines share."""

    objective: Objective = "softmax"
    """What is minimised; see `objectives.objective_loss`."""
    num_negatives: int = 0
    """Items drawn for an objective that does not rank them all."""
    max_length: int = 50
    """Events of a history that are read, the latest ones; longer training sequences are cut into windows of as many
    targets."""
    hidden_size: int = 128
    """Width of the items' vectors."""
    dropout: float = 0.5
    """Share of activations left out in training."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW (0.9, 0.95)."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    batch_size: int = 128
    """Windows of an optimizer step."""
    num_epochs: float = 20
    """Passes over the training windows."""
    anneal: float = 0.4
    """Share of the steps at the end over which the learning rate falls to zero, linearly."""
    patience: int = 0
    """Validations (there are 15 in a run) without a better one after which training stops; 0: it goes to the end."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128, 256)),
        "dropout": Real(low=0.1, high=0.7),
        "learning_rate": Real(low=3e-4, high=3e-3, log=True),
        "weight_decay": OneOf(values=(0.0, 0.01, 0.1)),
        "batch_size": OneOf(values=(64, 128, 256)),
    }

    def __post_init__(self) -> None:
        check_objective(self.objective, self.num_negatives)
        for name in ("max_length", "hidden_size", "learning_rate", "batch_size", "num_epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("dropout", "anneal"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0..1, 1 left out")

    @abstractmethod
    def build(self, log: TrainingLog) -> ItemModel:
        """The model before training, its weights drawn with torch's seed."""

    def stream(self, log: TrainingLog, seed: int) -> BatchStream:
        """What it trains on, step by step: every window, each position of which predicts the next item."""
        return WindowStream(log, self, seed)

    def history(self, rows: Ragged, num_items: int) -> tuple[np.ndarray, np.ndarray]:
        """The latest events of histories, padded on the right, and how many: int64[R, T], int64[R]."""
        return padded(recent(rows, self.max_length), num_items)

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> TrainedRecommender:
        """The recommender of a domain, trained on its training events; a finished one in `folder` is reused, an
        interrupted one goes on. The weights with the best NDCG@10 on the validation queries are kept (full catalogue,
        items of the history left out).

        Raises ConfigError if the folder holds a run of other settings or data, or the domain has nothing to train on.
        """
        if folder is None:
            with TemporaryDirectory() as temporary:
                return _trained(self, split, domain, seed, Path(temporary))
        return _trained(self, split, domain, seed, folder)


@dataclass(frozen=True)
class TrainingLog:
    """The training events of a domain as sequences of item numbers."""

    sequences: Ragged
    """One row for each user with a training event, in time order."""
    users: tuple[str, ...]
    """platform/user_id of each row."""
    num_items: int

    @classmethod
    def of(cls, split: Split, domain: str) -> TrainingLog:
        """Raises ConfigError if no user has two training events in the domain."""
        log, mine = split.train, split.catalogue.rows_of(domain)
        chosen = np.flatnonzero(split.catalogue.domain[log.item] == split.catalogue.domain_index(domain))
        chosen = chosen[stable_order(log.user[chosen])]
        user, first, counts = np.unique(log.user[chosen], return_index=True, return_counts=True)
        if not len(counts) or counts.max() < 2:
            raise ConfigError(f"domain {domain!r} has no user with two training events: there is nothing to train on")
        return cls(Ragged(log.item[chosen] - mine[0], offsets_of(counts)), tuple(user_names(log, user)), len(mine))

    def digest(self) -> str:
        """SHA-256 of what there is to learn from."""
        content = (
            *(self.sequences.values.tobytes(), self.sequences.offsets.tobytes()),
            *(str(self.num_items).encode(), "\n".join(self.users).encode()),
        )
        return hashlib.sha256(b"".join(content)).hexdigest()


def user_names(log: Interactions, rows: np.ndarray) -> list[str]:
    """platform/user_id of users by row, as queries name them."""
    return [f"{log.platforms[log.user_platform[row]]}/{log.user_id[row]}" for row in rows]


class BatchStream(ABC):
    """Batches of examples in a seeded order that is a pure function of the step; what the training loop reads."""

    num_steps: int
    num_tokens: int
    """Examples' events in all steps."""

    def __init__(self, lengths: np.ndarray, settings: TrainedBaseline, seed: int) -> None:
        self._lengths, self._size, self._seed = lengths, settings.batch_size, seed
        self._per_epoch = -(-len(lengths) // settings.batch_size)
        self.num_steps = max(1, round(self._per_epoch * settings.num_epochs))
        self.num_tokens = round(self.num_steps / self._per_epoch * int(lengths.sum()))
        self._order = lru_cache(maxsize=2)(self._order_of)

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The examples of a step; it needs no earlier step."""

    def members(self, step: int) -> np.ndarray:
        """The examples of a step: of one length, nearly, and in random order of length over an epoch."""
        epoch, place = divmod(step, self._per_epoch)
        return self._order(epoch)[place]

    def _order_of(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._lengths))
        batches = []
        for start in range(0, len(order), POOL * self._size):
            pool = order[start : start + POOL * self._size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += [pool[first : first + self._size] for first in range(0, len(pool), self._size)]
        return [batches[number] for number in generator.permutation(len(batches))]

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(self.num_steps))


class WindowStream(BatchStream):
    """Windows of training sequences; each position predicts the item after it."""

    def __init__(self, log: TrainingLog, settings: TrainedBaseline, seed: int) -> None:
        self._windows = windows(log.sequences, settings.max_length)
        self._pad = log.num_items
        super().__init__(self._windows.lengths - 1, settings, seed)

    def batch(self, step: int) -> Batch:
        """See `BatchStream.batch`."""
        members = self.members(step)
        rows, lengths = padded(self._windows.take(members), self._pad)
        has_next = np.arange(1, rows.shape[1]) < lengths[:, None]
        targets = np.where(has_next, rows[:, 1:], IGNORE)
        inputs = np.where(has_next, rows[:, :-1], self._pad)
        num_targets = int((lengths - 1).sum())
        return Batch(
            rows={"input_ids": inputs, "targets": targets},
            counts={NEXT_ITEM: num_targets},
            num_tokens=num_targets,
            examples=members,
            blank={"targets": IGNORE},
        )


def windows(sequences: Ragged, max_targets: int) -> Ragged:
    """Sequences cut from their ends into windows of at most `max_targets` targets: each item but a sequence's first is
    a target once, and the last item of a window is the first of the next.

    >>> cut = windows(Ragged.of([[0, 1, 2, 3, 4], [5]]), 2)
    >>> [cut[row].tolist() for row in range(len(cut))]
    [[0, 1, 2], [2, 3, 4]]
    """
    targets = sequences.lengths - 1
    counts = -(-np.maximum(targets, 0) // max_targets)
    row = np.repeat(np.arange(len(sequences)), counts)
    left = np.repeat(offsets_of(counts)[1:], counts) - 1 - np.arange(len(row))  # windows after it
    stop = sequences.offsets[row + 1] - left * max_targets
    start = np.maximum(stop - max_targets - 1, sequences.offsets[row])
    lengths = stop - start
    offsets = offsets_of(lengths)
    place = np.repeat(start - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Ragged(sequences.values[place], offsets)


def padded(rows: Ragged, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal length, one position at least, filled up on the right, and their true lengths.

    >>> padded(Ragged.of([[1, 2], [], [3]]), 9)[0].tolist()
    [[1, 2], [9, 9], [3, 9]]
    """
    lengths = rows.lengths
    out = np.full((len(rows), max(1, int(lengths.max(initial=0)))), fill, dtype=np.int64)
    out[rows.row_of, np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], lengths)] = rows.values
    return out, lengths


def recent(rows: Ragged, most: int) -> Ragged:
    """The last `most` values of each row."""
    lengths = np.minimum(rows.lengths, most)
    offsets = offsets_of(lengths)
    place = np.repeat(rows.offsets[1:] - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
    return Ragged(rows.values[place], offsets)


class TrainedRecommender(ScoringRecommender):
    """Ranks by the products of a history's representation with the items' vectors; a history without events in the
    domain is represented by padding alone."""

    def __init__(
        self,
        name: str,
        settings: TrainedBaseline,
        model: ItemModel,
        catalogue: Catalogue,
        domain: str,
        users: Mapping[str, int],
        seconds: float,
    ) -> None:
        self.name, self.catalogue, self.domain = name, catalogue, domain
        self._users = users
        self.seconds = seconds
        """Seconds that training took."""
        self._settings, self._model = settings, model.eval()
        with torch.inference_mode():
            self._items_VD = model.items().contiguous()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`. Raises ConfigError for another domain than the one trained on."""
        if domain != self.domain:
            raise ConfigError(f"{self.name} was trained on domain {self.domain!r}, not {domain!r}: train one for it")
        users = np.array([self._users.get(query.user or "", -1) for query in queries], dtype=np.int64)
        return self.score_histories(self.histories(domain, queries), users).cpu().numpy()

    @torch.inference_mode()
    def score_histories(self, histories: Ragged, users: np.ndarray) -> torch.Tensor:
        """Scores of all items after histories of item numbers, of users by row of the training log: float32[Q, V]."""
        return self._products(self._encoded(histories, users))

    def _encoded(self, histories: Ragged, users: np.ndarray) -> torch.Tensor:
        """Representations of histories: QD."""
        ids, lengths = self._settings.history(histories, len(self._items_VD))
        device = self._items_VD.device
        return self._model.encode(*(torch.from_numpy(each).to(device) for each in (ids, lengths, users)))

    def _products(self, hidden_QD: torch.Tensor, out_QV: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of all items: QV."""
        if out_QV is None:
            out_QV = hidden_QD.new_empty(len(hidden_QD), len(self._items_VD))
        block = ITEM_BLOCK if out_QV.device.type == "cpu" else max(1, len(self._items_VD))
        for start in range(0, len(self._items_VD), block):
            items_BD = self._items_VD[start : start + block]
            torch.mm(hidden_QD, items_BD.T, out=out_QV[:, start : start + block])
        return out_QV

    def target_ranks(
        self, histories: Ragged, targets: np.ndarray, *, users: Sequence[str], exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many items score above each target, and how many as high, itself included: int64[Q] each.

        Counted in the scores of the full catalogue, without sorting them. A target that is left out, because the
        history has it, is tied with nothing (0): a miss.
        """
        rows = np.array([self._users.get(user, -1) for user in users], dtype=np.int64)
        better = np.empty(len(targets), dtype=np.int64)
        tied = np.empty(len(targets), dtype=np.int64)
        order = np.argsort(np.minimum(histories.lengths, self._settings.max_length), kind="stable")
        num_items, device = len(self._items_VD), self._items_VD.device
        num_rows = max(1, SCORES // num_items)
        with torch.inference_mode():
            room = torch.empty(2, min(num_rows, len(order)), num_items, device=device)  # used again and again
            for start in range(0, len(order), ENCODE_BATCH):
                batch = order[start : start + ENCODE_BATCH]
                hidden_QD = self._encoded(histories.take(batch), rows[batch])
                for hidden_CD, first in zip(hidden_QD.split(num_rows), range(0, len(batch), num_rows), strict=True):
                    chosen = batch[first : first + num_rows]
                    scores_CV, marks_CV = room[:, : len(chosen)]
                    self._products(hidden_CD, scores_CV)
                    target_C1 = torch.from_numpy(targets[chosen]).to(device)[:, None]
                    score_C1 = scores_CV.gather(1, target_C1)
                    if exclude_seen:
                        asked = histories.take(chosen)
                        scores_CV[torch.from_numpy(asked.row_of), torch.from_numpy(asked.values)] = -torch.inf
                        scores_CV.scatter_(1, target_C1, score_C1)
                    # Ones and zeros as floats are added up many times as fast as truth values.
                    better[chosen] = torch.gt(scores_CV, score_C1, out=marks_CV).sum(1).cpu().numpy()
                    tied[chosen] = torch.eq(scores_CV, score_C1, out=marks_CV).sum(1).cpu().numpy()
        if exclude_seen:
            tied[histories.row_of[histories.values == targets[histories.row_of]]] = 0
        return better, tied


def _trained(settings: TrainedBaseline, split: Split, domain: str, seed: int, folder: Path) -> TrainedRecommender:
    name, log = type(settings).__name__, TrainingLog.of(split, domain)
    users = {user: row for row, user in enumerate(log.users)}
    device = distributed.pick_device()
    histories, targets, askers = _validation_queries(settings, split, domain, seed)
    made_from = {
        **{"baseline": name, "settings": asdict(settings), "domain": domain, "seed": seed, "data": log.digest()},
        "validation": hashlib.sha256(histories.values.tobytes() + targets.tobytes()).hexdigest(),
    }
    torch.manual_seed(seed)
    model = settings.build(log).to(device)
    record, weights = folder / "baseline.json", folder / "best.safetensors"
    known = json.loads(record.read_text()) if record.is_file() else None
    if known is not None and known["made_from"] != made_from:
        changed = sorted(key for key in made_from if known["made_from"].get(key) != made_from[key])
        raise ConfigError(
            f"{folder} holds a baseline of other {', '.join(changed)}: delete it or choose another folder"
        )
    seconds = (known or {}).get("seconds")
    if seconds is None:
        folder.mkdir(parents=True, exist_ok=True)

        def validate() -> dict[str, Any]:
            recommender = TrainedRecommender(name, settings, model, split.catalogue, domain, users, 0.0)
            ranks = recommender.target_ranks(histories, targets, users=askers, exclude_seen=True)
            value = float(ndcg(*ranks, 10).mean())
            model.train()
            earlier = _validations(folder)
            if value > max(earlier, default=-1.0):
                save_file(model.state_dict(), folder / "best.incomplete")
                (folder / "best.incomplete").replace(weights)
            elif settings.patience and len(earlier) - int(np.argmax(earlier)) >= settings.patience:
                raise _Enough
            return {"validation": {"ndcg@10": value}}

        stream = settings.stream(log, seed)
        schedule = WSA(
            total=stream.num_steps,
            peak=settings.learning_rate,
            warmup=min(100, stream.num_steps // 10),
            anneal=round(settings.anneal * stream.num_steps),
            shape="linear",
        )
        _write(record, {"made_from": made_from})
        try:
            train(
                ItemTrainable(model, settings.objective, settings.num_negatives, distributed.use_bf16("auto", device)),
                stream,
                lambda step: schedule.after(step + 1),
                output_dir=folder,
                optimisation=Optimisation(weight_decay=settings.weight_decay, max_grad_norm=5.0, seed=seed),
                cadence=Cadence(
                    logging_steps=max(1, stream.num_steps // 100),
                    eval_steps=max(1, stream.num_steps // 15),
                    save_steps=max(1, stream.num_steps // 4),
                    save_total_limit=1,
                ),
                validate=validate,
                resume_from=newest_intact(folder),
                description=f"{domain}: training {name}",
            )
        except _Enough:
            say(f"{domain}: {name} has not become better for {settings.patience} validations")
        last = [line for line in read_log(folder / LOG) if "loss" in line][-1]
        seconds = round(last["tokens"] / last["tokens_per_second"], 3)
        _write(record, {"made_from": made_from, "best": max(_validations(folder)), "seconds": seconds})
        remove_checkpoints(folder)
    model.load_state_dict(load_file(weights, device=str(device)))
    return TrainedRecommender(name, settings, model, split.catalogue, domain, users, seconds)


def _validation_queries(
    settings: TrainedBaseline, split: Split, domain: str, seed: int
) -> tuple[Ragged, np.ndarray, list[str]]:
    """Histories, targets and users of the queries that choose the weights: a seeded sample. Raises ConfigError where
    there are none."""
    queries = split.queries(domain, VALIDATION, max_history=max(settings.max_length, 1000))
    if not len(queries):
        raise ConfigError(f"domain {domain!r} has no validation event to choose the weights of a baseline by")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(queries))[:VALIDATION_QUERIES])
    first = int(split.catalogue.rows_of(domain)[0])
    asked = queries.history.take(chosen)
    users = user_names(split.interactions, queries.user[chosen])
    return Ragged(asked.values - first, asked.offsets), queries.target[chosen] - first, users


def _validations(folder: Path) -> list[float]:
    """What the validations of a run have measured so far."""
    path = folder / LOG
    lines = read_log(path) if path.is_file() else []
    return [line["validation"]["ndcg@10"] for line in lines if "validation" in line]


def _write(path: Path, record: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
