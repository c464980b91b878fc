"""Writes documents to pre-train on, examples to fine-tune on and queries to evaluate with, part by part of the log.

Any process on any machine that sees the folder may write a part; `join_parts` puts the parts together.

    DATA/shards/{train,heldout}/             behaviour sequences
    DATA/examples/DOMAIN/{train,validation}/ next-item examples of a target domain
    DATA/examples/DOMAIN/documents/          the same training events, told once: a document for each user
    DATA/queries/DOMAIN/{validation,test}.parquet
    DATA/popularity.parquet                  domain, item_id, num_events: training events of every item
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.catalogue import Catalogue
from cprec.data.config import SplitSpec
from cprec.data.dataset import POPULARITY, finish_part, read_catalogue, read_manifest
from cprec.data.interactions import Interactions, split_time
from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.data.sequences import build_sequences
from cprec.data.splits import (
    Queries,
    Split,
    comparable_domains,
    from_seconds,
    in_seconds,
    make_split,
    runs,
    user_shares,
)
from cprec.errors import ConfigError, DataError
from cprec.files import whole_folder
from cprec.schema import KINDS, SPECIFIC, TEST, TRAIN, VALIDATION, DomainInfo
from cprec.text.config import DocumentRules
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import join_shards, write_shards

RULES, ENCODER, PARTS = "rules.json", "encoder", "parts"
"""Names inside an unfinished data folder: the rules and the encoder that `write_part` reads, and where it writes."""

WHOLE = "documents"
"""The part of a domain's examples that has one document a user, with every title a target."""

QUERY_COLUMNS = frozenset(
    ("query_id", "platform", "user_id", "domain", "history_domain", "history_item", "target", "timestamp")
)
"""Columns that every file of queries has; `microsecond` is missing from older ones."""

ROW_GROUPS = b"parts"
"""Key in a queries file's metadata: the part that each of its row groups is from."""


def shard_names(target_domains: Sequence[str], examples: Sequence[str] = (TRAIN, VALIDATION, WHOLE)) -> list[str]:
    """The shard folders of a data folder, with the named parts of the examples."""
    behaviour = ["shards/train", "shards/heldout"]
    return behaviour + [f"examples/{domain}/{part}" for domain in target_domains for part in examples]


def query_names(target_domains: Sequence[str], parts: Sequence[str] = (VALIDATION, TEST)) -> list[str]:
    """The files of queries of a data folder."""
    return [f"queries/{domain}/{part}.parquet" for domain in target_domains for part in parts]


def save_rules(folder: Path, rules: DocumentRules, cuts: tuple[int, int] | None) -> None:
    """Write the rules that `write_part` follows.

    `cuts` are the first moments of validation and test where the whole log is split in time: microseconds since 1970
    UTC.
    """
    fields = asdict(rules) | {"cuts": cuts and [in_seconds(cut) for cut in cuts]}
    (folder / RULES).write_text(json.dumps(fields), encoding="utf-8")
    _open.cache_clear()  # this process may have read the rules of other settings


def read_rules(folder: Path) -> tuple[DocumentRules, tuple[int, int] | None]:
    """The rules and the cuts that `save_rules` wrote."""
    fields = json.loads((folder / RULES).read_text(encoding="utf-8"))
    cuts = fields.pop("cuts")
    fields["split"] = SplitSpec(**fields["split"])
    for name in ("target_domains", "pretrain_domains"):
        fields[name] = tuple(fields[name])
    return DocumentRules(**fields), cuts and (from_seconds(cuts[0]), from_seconds(cuts[1]))


@functools.lru_cache(maxsize=1)
def _open(folder: Path) -> tuple[DocumentRules, tuple[int, int] | None, PromptEncoder]:
    """What every part of a folder needs; read once for all parts of a process."""
    rules, cuts = read_rules(folder)
    return rules, cuts, PromptEncoder.load(folder / ENCODER, read_catalogue(folder))


def unwritten_parts(folder: Path) -> list[int]:
    """The parts of an unfinished data folder that no process has written yet; none once they are put together."""
    if is_joined(folder):
        return []
    parts = range(read_manifest(folder)["num_parts"])
    return [part for part in parts if not (folder / PARTS / f"part-{part}").is_dir()]


def is_joined(folder: Path) -> bool:
    """Whether all parts of a folder that had its tables are put together."""
    return not (folder / RULES).exists()


def write_part(folder: Path, part: int) -> None:
    """Order and split the events of a part, and write its documents; what another process has written stays."""
    path = folder / PARTS / f"part-{part}"
    if path.is_dir():
        return
    rules, cuts, encoder = _open(folder)

    def decide(catalogue: Catalogue, log: Interactions, domains: dict[str, DomainInfo]) -> Split:
        return make_split(catalogue, log, domains, rules.split, cuts=cuts, seed=rules.seed)

    with whole_folder(path) as target:
        split = finish_part(folder, part, decide, encoder.catalogue)
        assert split is not None
        writer = _PartWriter(rules, split, encoder, target, part)
        writer.write_behaviour()
        for domain in rules.target_domains:
            writer.write_examples(domain)
            writer.write_whole(domain)
            writer.write_queries(domain)
        np.save(target / "popularity.npy", np.bincount(split.train.item, minlength=len(split.catalogue)))


@dataclass
class _PartWriter:
    """Writes the documents, examples and queries of a part into a folder."""

    rules: DocumentRules
    split: Split
    encoder: PromptEncoder
    folder: Path
    part: int

    def write_behaviour(self) -> None:
        """Specific and mixed documents of the training events: shards to train on, and shards to measure perplexity."""
        split, rules, encoder = self.split, self.rules, self.encoder
        excluded, heldout = self._users_apart()
        log = split.interactions
        for name, users in (("train", ~excluded & ~heldout), ("heldout", heldout)):
            sequences = build_sequences(
                split,
                rules.pretrain_domains,
                users,
                min_events=rules.min_events,
                max_events=rules.max_events,
                mixed_order=rules.mixed_order,
            )
            items = Ragged(log.item[sequences.event], sequences.offsets)
            parts, columns = [], []
            for number, kind in enumerate(KINDS):
                rows = np.flatnonzero(sequences.kind == number)
                events = items.take(rows)
                documents, domain, user = _split_long(
                    encoder, kind, sequences.domain[rows], sequences.user[rows], events, rules.max_document_tokens
                )
                if name == "train" and rules.document_order == "shuffled":
                    documents = shuffled(documents, rules.seed)
                tokens, target = encoder.documents(kind, domain, documents)
                parts.append(tokens)
                columns.append(self._columns(kind, domain, user, documents.lengths, target))
            merged = {key: np.concatenate([part[key] for part in columns]) for key in columns[0]}
            self._write_shards(f"shards/{name}", Ragged.concatenate(parts), merged)

    def write_examples(self, domain: str) -> None:
        """Next-item examples of a domain: every training event with enough history, and the validation queries."""
        rules, encoder = self.rules, self.encoder
        number = self.split.catalogue.domain_index(domain)
        examples = {TRAIN: self._training_examples(number), VALIDATION: self._validation_examples(domain)}
        for name, (events, user) in examples.items():
            documents_domain = np.full(len(events), number)
            kept = encoder.fit(rules.history, documents_domain, events, rules.max_document_tokens - 1)
            if not kept.lengths.all():
                raise ConfigError(
                    f"max_document_tokens={rules.max_document_tokens} has no room for a title of "
                    f"max_title_tokens={encoder.max_title_tokens} after the head of the template: raise it"
                )
            tokens, target_start = encoder.documents(rules.history, documents_domain, kept)
            columns = self._columns(rules.history, documents_domain, user, kept.lengths, target_start)
            self._write_shards(f"examples/{domain}/{name}", tokens, columns)

    def write_whole(self, domain: str) -> None:
        """The training events of a domain, a document for each user with two or more; long ones are cut as behaviour
        sequences are."""
        split, rules, encoder = self.split, self.rules, self.encoder
        found = build_sequences(split, [domain], min_events=2, max_events=rules.max_events, kinds=(SPECIFIC,))
        events = Ragged(split.interactions.item[found.event], found.offsets)
        events, number, user = _split_long(
            encoder, SPECIFIC, found.domain, found.user, events, rules.max_document_tokens
        )
        tokens, target_start = encoder.documents(SPECIFIC, number, events)
        columns = self._columns(SPECIFIC, number, user, events.lengths, target_start)
        self._write_shards(f"examples/{domain}/{WHOLE}", tokens, columns)

    def write_queries(self, domain: str) -> None:
        """Validation and test queries of a domain."""
        target = self.folder / "queries" / domain
        target.mkdir(parents=True)
        for name in (VALIDATION, TEST):
            # The whole history: each recommender reads as much as it can.
            table = queries_table(self.split, self._queries(domain, name, len(self.split.interactions)))
            pq.write_table(table, target / f"{name}.parquet", compression="zstd")

    def _queries(self, domain: str, part: str, max_history: int) -> Queries:
        kind, least = self.rules.history, self.rules.min_history
        return self.split.queries(domain, part, history_kind=kind, max_history=max_history, min_history=least)

    def _users_apart(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks over users: held out of pre-training (tested in an unseen domain), and for perplexity only."""
        split, rules = self.split, self.rules
        log = split.interactions
        unseen = [split.catalogue.domains.index(d) for d in rules.target_domains if d not in rules.pretrain_domains]
        tested = np.isin(split.catalogue.domain[log.item], unseen) & ~split.events(TRAIN)
        excluded = np.zeros(len(log.user_id), dtype=bool)
        excluded[log.user[tested]] = True
        return excluded, (user_shares(log, str(rules.seed)) < rules.heldout_share) & ~excluded

    def _training_examples(self, domain: int) -> tuple[Ragged, np.ndarray]:
        """Every training event of the domain with enough history, as the last event of a row; and the row's user."""
        rules = self.rules
        rows, user, num_before = stretches(self.split, domain, rules.history, rules.max_history + 1)
        enough = np.flatnonzero(num_before >= rules.min_history)
        return rows.take(enough), user[enough]

    def _validation_examples(self, domain: str) -> tuple[Ragged, np.ndarray]:
        """Every validation query of the domain with its target as the last event of a row; and the row's user."""
        queries = self._queries(domain, VALIDATION, self.rules.max_history)
        history, target = queries.history, queries.target
        # A stable sort by row puts each target, which comes after all histories, behind its own history.
        rows = np.concatenate([history.row_of, np.arange(len(target))])
        items = np.concatenate([history.values, target])[np.argsort(rows, kind="stable")]
        return Ragged(items, history.offsets + np.arange(len(history.offsets))), queries.user

    def _columns(
        self, kind: str, domain: np.ndarray, user: np.ndarray, num_events: np.ndarray, target_start: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The index columns of documents of one kind."""
        log = self.split.interactions
        names = np.array([*self.split.catalogue.domains, ""], dtype=object)
        return {
            "domain": names[domain],
            "kind": np.full(len(user), kind, dtype=object),
            "num_events": num_events.astype(np.int32),
            "platform": np.array(log.platforms, dtype=object)[log.user_platform[user]],
            "user_id": log.user_id[user],
            "target_start": target_start,
        }

    def _write_shards(self, name: str, documents: Ragged, columns: Mapping[str, Any]) -> None:
        about = {"vocabulary_size": self.encoder.vocabulary_size}
        write_shards(self.folder / name, documents, dict(columns), about, part=self.part)


def stretches(split: Split, domain: int, history: str, longest: int) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """The training events that lead to each training event of a domain: at most `longest` of those that histories of
    this kind show, the event itself the last. With each one's user, and how many events it has before it in all."""
    shown, user = histories(split, domain, history)
    # What leads to an event is the stretch of its user's events that ends with it.
    num_before = shown.place_of
    last = np.flatnonzero(split.catalogue.domain[shown.values] == domain)
    lengths = np.minimum(num_before[last] + 1, longest)
    return gather(shown.values, last - lengths + 1, lengths), user[shown.row_of[last]], num_before[last]


def histories(split: Split, domain: int, history: str) -> tuple[Ragged, np.ndarray]:
    """Each user's training events, of those that histories of this kind show, oldest first; and the users."""
    catalogue, train = split.catalogue, split.train
    is_shown = np.arange(len(catalogue.domains)) == domain
    if history != SPECIFIC:
        is_shown = comparable_domains(catalogue, split.domains)
    events = np.flatnonzero(is_shown[catalogue.domain[train.item]])
    # Events stand user by user, in order.
    place, length, _ = runs(train.user[events])
    return Ragged(train.item[events], offsets_of(length[place == 0])), train.user[events[place == 0]]


def _split_long(
    encoder: PromptEncoder, kind: str, domain: np.ndarray, user: np.ndarray, events: Ragged, max_tokens: int
) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """Halve documents (by events) until each has at most `max_tokens` tokens or a single event."""
    while True:
        # Tokens of each document: its events, the template's frame, and the end-of-sequence.
        size = np.add.reduceat(np.r_[encoder.event_tokens(kind, events.values), 0], events.offsets[:-1])
        size = size + encoder.frame_tokens(kind, np.maximum(domain, 0)) + 1
        long = (size > max_tokens) & (events.lengths > 1)
        if not len(events) or not long.any():
            return events, domain, user
        # Each long document becomes two rows; its second one, at `second`, gets the events that the first leaves.
        copies = np.where(long, 2, 1)
        first = np.where(long, (events.lengths + 1) // 2, events.lengths)
        lengths = np.repeat(first, copies)
        second = np.cumsum(copies)[long] - 1
        lengths[second] = (events.lengths - first)[long]
        events, domain, user = Ragged(events.values, offsets_of(lengths)), domain.repeat(copies), user.repeat(copies)


_HASH_FACTORS = 40503, 9973, 31
"""Odd factors of the hash in `shuffled`: 2**16 divided by the golden ratio, which scatters neighbouring numbers widest
(Knuth, The Art of Computer Programming, 6.4), and two primes, so that the three numbers hashed do not cancel out."""


def shuffled(rows: Ragged, seed: int) -> Ragged:
    """Shuffle within rows. A row's order depends on its values and the seed alone, not on the rows around it."""
    # A hash of each value, its place and its row's sum, of 16 bits, looked up in a random table, is its sort key.
    table = np.random.default_rng(seed).permutation(1 << 16)
    sums = np.repeat(np.add.reduceat(np.r_[rows.values, 0], rows.offsets[:-1]), rows.lengths)
    of_value, of_place, of_sum = _HASH_FACTORS
    key = table[(rows.values * of_value + rows.place_of * of_place + sums * of_sum) & 0xFFFF]
    return Ragged(rows.values[np.lexsort((key, rows.row_of))], rows.offsets)


def queries_table(split: Split, queries: Queries) -> pa.Table:
    """Queries as a table: query_id, platform, user_id, domain, history_domain, history_item, target, timestamp,
    microsecond."""
    catalogue, log, history = split.catalogue, split.interactions, queries.history.values
    timestamp, microsecond = split_time(queries.time, split.domains[queries.domain].has_times)
    columns = {
        "query_id": queries.query_id,
        "platform": np.array(log.platforms, dtype=object)[log.user_platform[queries.user]],
        "user_id": log.user_id[queries.user],
        "domain": [queries.domain] * len(queries),
        "history_domain": np.array(catalogue.domains, dtype=object)[catalogue.domain[history]],
        "history_item": catalogue.item_id[history],
        "target": catalogue.item_id[queries.target],
    }
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    offsets = pa.array(queries.history.offsets, pa.int32())
    for name in ("history_domain", "history_item"):
        arrays[name] = pa.ListArray.from_arrays(offsets, arrays[name])
    times = {"timestamp": pa.array(timestamp, pa.int64()), "microsecond": pa.array(microsecond, pa.int32())}
    return pa.table(arrays | times)


# ---- parts together --------------------------------------------------------------------------------------------------


def join_parts(folder: Path, about: Mapping[str, Any]) -> None:
    """Put all parts of an unfinished data folder together; `about` goes into every shard manifest.

    It may be called again after an interruption, until `remove_parts` has deleted the parts.
    """
    rules, _, encoder = _open(folder)
    about = {"about": about, "vocabulary_size": encoder.vocabulary_size}
    parts = [folder / PARTS / f"part-{part}" for part in range(read_manifest(folder)["num_parts"])]
    for name in shard_names(rules.target_domains):
        join_shards(folder / name, [part / name for part in parts], about)
    for name in query_names(rules.target_domains):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _join_tables([part / name for part in parts], folder / name)
    counts = sum(np.load(part / "popularity.npy") for part in parts)
    write_popularity(folder, encoder.catalogue, counts)
    (folder / RULES).unlink()
    _open.cache_clear()


def remove_parts(folder: Path) -> None:
    """Delete the parts and the encoder, which only they needed."""
    for name in (PARTS, ENCODER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _join_tables(sources: list[Path], target: Path) -> None:
    """Write the rows of several Parquet files as one: a row group for each that has rows, whose number among the
    sources the metadata has under `ROW_GROUPS`."""
    numbers = [number for number, source in enumerate(sources) if pq.read_metadata(source).num_rows]
    schema = pq.read_schema(sources[0]).with_metadata({ROW_GROUPS: json.dumps(numbers)})
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for number in numbers:
            table = pq.ParquetFile(sources[number]).read().replace_schema_metadata(schema.metadata)
            writer.write_table(table, row_group_size=table.num_rows)


def read_queries_of_part(path: Path, part: int) -> pa.Table:
    """The queries that `join_parts` took from a part."""
    file = pq.ParquetFile(path)
    numbers = json.loads((file.schema_arrow.metadata or {}).get(ROW_GROUPS, b"[]"))
    if len(numbers) != file.num_row_groups:
        raise DataError(f"{path} does not say which part its rows are from: it was changed; run `cprec prepare` again")
    return file.read_row_groups([group for group, number in enumerate(numbers) if number == part])


def write_popularity(folder: Path, catalogue: Catalogue, counts: np.ndarray) -> None:
    """Write how many training events each item has: domain, item_id, num_events; rows as in the catalogue."""
    domains = np.array(catalogue.domains, dtype=object)[catalogue.domain]
    columns = {"domain": pa.array(domains, pa.string()), "item_id": pa.array(catalogue.item_id, pa.string())}
    columns["num_events"] = pa.array(counts.astype(np.int64))
    pq.write_table(pa.table(columns), folder / POPULARITY, compression="zstd")
