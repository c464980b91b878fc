"""Stage: logs -> canonical tables, splits, behaviour sequences, token shards, examples, queries and a certificate."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cprec.data.sources.recbole import RecBoleSource
from cprec.data.sources.synthetic import SyntheticConfig
from cprec.data.sources.tables import TableSource
from cprec.data.splits import SplitSpec
from cprec.errors import ConfigError, DataError
from cprec.provenance import CONFIG_FILE, file_sha256, read_resolved, save_resolved, to_dict
from cprec.schema import KINDS, MIXED, SPECIFIC, TEST, TRAIN, VALIDATION

if TYPE_CHECKING:
    import numpy as np

    from cprec.data.catalogue import Catalogue
    from cprec.data.ragged import Ragged
    from cprec.data.splits import Queries, Split
    from cprec.text.encoding import PromptEncoder


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of data preparation."""

    output_dir: str
    """The data folder to write."""
    tables: tuple[TableSource, ...] = ()
    """Domains in Parquet, CSV or JSONL files, one entry each."""
    recbole: tuple[RecBoleSource, ...] = ()
    """Domains in RecBole's atomic files, one entry each."""
    synthetic: SyntheticConfig | None = None
    """The synthetic world, for trying things out."""
    target_domains: tuple[str, ...]
    """Domains to fine-tune and evaluate on."""
    pretrain_domains: tuple[str, ...] = ()
    """Domains to pre-train on; none named means all. A target that is not among them is *unseen*: neither its items
    nor the users it is tested on occur in pre-training."""
    k_core: int = 5
    """Users and items with fewer events in a domain are left out, repeatedly; 0 keeps all."""
    drop_consecutive_repeats: bool = True
    """Leave out an event of the same item as the user's event before."""
    tie_order: Literal["source", "item_id", "shuffle"] = "source"
    """Order of a user's events of equal time. It decides held-out events where times are coarse."""
    split: SplitSpec = SplitSpec()
    """What is held out, in every domain."""
    tokenizer: str = "tiny"
    """The base model's tokenizer (a Hugging Face name or folder), or `tiny`: a byte-level BPE trained on the titles."""
    vocabulary_size: int = 8192
    """Of the tiny tokenizer."""
    max_title_tokens: int = 32
    """Titles are cut to this many tokens; items whose cut titles are equal cannot be told apart."""
    min_events: int = 5
    """Shortest behaviour sequence to pre-train on."""
    max_events: int = 20
    """Longer sequences are cut into chunks of nearly equal size."""
    max_document_tokens: int = 1024
    """A chunk with more tokens is cut in two again."""
    history: Literal["specific", "mixed"] = "specific"
    """What prompts of fine-tuning and evaluation show: the target domain's events, or those of all domains."""
    max_history: int = 10
    """Events in a prompt at most, the latest ones; queries keep the whole history."""
    min_history: int = 3
    """Events in a prompt at least; shorter ones give no example and no query."""
    heldout_share: float = 0.005
    """Share of users whose sequences are only used to measure perplexity, by hash of the user."""
    strict: bool = False
    """Stop at the first bad row instead of setting it aside in rejected.parquet."""
    memory_limit: str | None = None
    """Memory for the table engine, as 8GB; None leaves it to the engine."""
    seed: int = 0
    """Decides the held-out users and shuffled ties."""

    def __post_init__(self) -> None:
        if not (self.tables or self.recbole or self.synthetic):
            raise ConfigError(
                "no source of data: give tables=..., recbole=... or synthetic=... (see `cprec prepare --help`)"
            )
        if not self.target_domains:
            raise ConfigError("target_domains is empty: name at least one domain to fine-tune and evaluate on")
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"heldout_share={self.heldout_share} must lie in 0..1")
        for name in ("max_title_tokens", "min_events", "max_events", "max_history", "max_document_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.min_events < 2 or self.max_events < self.min_events:
            raise ConfigError(
                f"min_events={self.min_events} must be at least 2 and at most max_events={self.max_events}"
            )
        if not 0 <= self.min_history <= self.max_history:
            raise ConfigError(f"min_history={self.min_history} must lie in 0..max_history={self.max_history}")


def prepare(config: PrepareConfig) -> Path:
    """Write the data folder of a configuration and return it; a folder already complete with it is reused.

    The folder is made aside and renamed at the end, so an interrupted run leaves nothing that looks complete.
    """
    from cprec.progress import say

    output_dir = Path(config.output_dir)
    if (output_dir / CONFIG_FILE).is_file():
        old, new = read_resolved(output_dir)["config"], to_dict(config)
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if changed:
            raise ConfigError(
                f"{output_dir} was prepared with other settings of {', '.join(changed)}: choose another output_dir or "
                "delete it"
            )
        say(f"{output_dir}: complete with these settings, reused")
        return output_dir
    if output_dir.exists():
        raise ConfigError(f"{output_dir} exists and is no data folder: choose another output_dir or delete it")
    folder = output_dir.with_name(output_dir.name + ".incomplete")
    shutil.rmtree(folder, ignore_errors=True)
    _prepare_into(config, folder)
    folder.rename(output_dir)
    say(f"{output_dir}: written")
    return output_dir


def _prepare_into(config: PrepareConfig, folder: Path) -> None:
    from cprec.data.dataset import build_dataset, read_dataset, write_split
    from cprec.data.splits import make_split
    from cprec.progress import say
    from cprec.text.certificate import audit
    from cprec.text.encoding import PromptEncoder

    build_dataset(
        _sources(config),
        folder,
        min_user_events=config.k_core,
        min_item_events=config.k_core,
        drop_consecutive_repeats=config.drop_consecutive_repeats,
        tie_order=config.tie_order,
        seed=config.seed,
        strict=config.strict,
        memory_limit=config.memory_limit,
    )
    catalogue, interactions, domains = read_dataset(folder)
    _check_domains(config, catalogue)
    split = make_split(catalogue, interactions, domains, config.split)
    write_split(folder, split)
    say(f"{len(interactions.user):,} events of {len(interactions.user_id):,} users, {len(catalogue):,} items")

    tokenizer = _tokenizer(config, catalogue)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = PromptEncoder(tokenizer, catalogue, max_title_tokens=config.max_title_tokens)
    about = _about(config, split, encoder, folder)
    _write_behaviour(config, split, encoder, folder, about)
    for domain in config.target_domains:
        _write_examples(config, split, encoder, folder, domain, about)
        _write_queries(config, split, folder, domain)
    save_resolved(folder, config, _input_hashes(folder))
    certificate = audit(folder)
    if not certificate["clean"]:
        raise DataError(f"the written data leak: {json.dumps(certificate['properties'], indent=1)}")


def _sources(config: PrepareConfig) -> list[Any]:
    sources: list[Any] = [*config.tables, *config.recbole]
    if config.synthetic is not None:
        from cprec.data.sources.memory import MemorySource
        from cprec.data.sources.synthetic import SyntheticWorld

        world = SyntheticWorld(config.synthetic)
        for domain, (items, interactions) in world.tables().items():
            info = world.domains[domain]
            sources.append(MemorySource(domain, info.platform, items, interactions, info.has_times))
    return sources


def _check_domains(config: PrepareConfig, catalogue: Catalogue) -> None:
    for field in ("target_domains", "pretrain_domains"):
        unknown = sorted(set(getattr(config, field)) - set(catalogue.domains))
        if unknown:
            raise ConfigError(f"{field} names {', '.join(unknown)}, but the data has: {', '.join(catalogue.domains)}")


def _tokenizer(config: PrepareConfig, catalogue: Catalogue) -> Any:
    """The base model's tokenizer, or one trained on the titles that pre-training sees."""
    import numpy as np

    from cprec.text.prompts import Template
    from cprec.text.tokenizer import TINY, load_tokenizer, train_tokenizer

    if config.tokenizer != TINY:
        return load_tokenizer(config.tokenizer)
    template = Template()
    rows = np.concatenate([catalogue.rows_of(domain) for domain in pretrain_domains(config, catalogue)])
    fixed = [
        template.head(domain) + template.line + template.next + template.tag(domain) for domain in catalogue.domains
    ]
    return train_tokenizer(
        [
            *fixed * 100,
            template.head(template.mixed_scope),
            *(template.title(title) for title in catalogue.title[rows]),
        ],
        config.vocabulary_size,
    )


def pretrain_domains(config: PrepareConfig, catalogue: Catalogue) -> tuple[str, ...]:
    return config.pretrain_domains or catalogue.domains


def _about(config: PrepareConfig, split: Split, encoder: PromptEncoder, folder: Path) -> dict[str, Any]:
    """What a model must know of the data that it was trained on: it travels from shard manifests to `cprec.json`."""
    return {
        "template": asdict(encoder.template),
        "max_title_tokens": config.max_title_tokens,
        "history": config.history,
        "max_history": config.max_history,
        "catalogue_sha256": split.catalogue.digest(),
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
    }


def _users_apart(config: PrepareConfig, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Masks over users: held out of pre-training altogether (tested in an unseen domain), and for perplexity only."""
    import hashlib

    import numpy as np

    seen = pretrain_domains(config, split.catalogue)
    log = split.interactions
    unseen = [split.catalogue.domains.index(d) for d in config.target_domains if d not in seen]
    tested = np.isin(split.catalogue.domain[log.item], unseen) & (split.part != 0)
    excluded = np.zeros(len(log.user_id), dtype=bool)
    excluded[log.user[tested]] = True

    def share(platform: int, user: str) -> float:
        name = f"{config.seed}/{log.platforms[platform]}/{user}".encode()
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64

    hashes = np.array([share(p, u) for p, u in zip(log.user_platform, log.user_id, strict=True)])
    return excluded, (hashes < config.heldout_share) & ~excluded


def _write_behaviour(
    config: PrepareConfig, split: Split, encoder: PromptEncoder, folder: Path, about: dict[str, Any]
) -> None:
    """Specific and mixed documents of the training events: shards to train on, and shards to measure perplexity."""
    import numpy as np

    from cprec.data.ragged import Ragged
    from cprec.data.sequences import build_sequences
    from cprec.progress import say
    from cprec.text.shards import write_shards

    excluded, heldout = _users_apart(config, split)
    log, catalogue = split.interactions, split.catalogue
    for name, users in (("train", ~excluded & ~heldout), ("heldout", heldout)):
        sequences = build_sequences(
            split,
            pretrain_domains(config, catalogue),
            users,
            min_events=config.min_events,
            max_events=config.max_events,
        )
        parts, columns = [], []
        for number, kind in enumerate(KINDS):
            rows = np.flatnonzero(sequences.kind == number)
            events = Ragged(log.item[sequences.event], sequences.offsets).take(rows)
            documents, domain, user = _split_long(
                encoder, kind, sequences.domain[rows], sequences.user[rows], events, config.max_document_tokens
            )
            tokens, target = encoder.documents(kind, domain, documents)
            parts.append(tokens)
            columns.append(_columns(split, kind, domain, user, documents.lengths, target))
        merged = {key: np.concatenate([part[key] for part in columns]) for key in columns[0]}
        shards = write_shards(
            folder / "shards" / name,
            Ragged.concatenate(parts),
            merged,
            {"vocabulary_size": encoder.vocabulary_size, "about": about},
        )
        counts = {kind: int((merged["kind"] == kind).sum()) for kind in KINDS}
        say(
            f"shards/{name}: {counts[SPECIFIC]:,} domain-specific and {counts[MIXED]:,} mixed documents, "
            f"{shards.manifest['num_tokens']:,} tokens"
        )
        if name == "heldout" and not len(shards) and config.heldout_share > 0:
            say(
                f"note: no user is held out to measure perplexity: raise heldout_share={config.heldout_share:g} for a "
                f"log of {len(users):,} users"
            )
        if name == "train" and not len(shards):
            raise DataError(
                f"no behaviour sequence has min_events={config.min_events} events in the training part: the log is too "
                "small, or lower min_events"
            )


def _split_long(
    encoder: PromptEncoder, kind: str, domain: np.ndarray, user: np.ndarray, events: Ragged, max_tokens: int
) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """Halve documents (by events) until each has at most `max_tokens` tokens or a single event."""
    import numpy as np

    from cprec.data.ragged import Ragged

    while True:
        cost = np.add.reduceat(np.r_[encoder.event_tokens(kind, events.values), 0], events.offsets[:-1])
        long = (cost + encoder.frame_tokens(kind, np.maximum(domain, 0)) + 1 > max_tokens) & (events.lengths > 1)
        if not len(events) or not long.any():
            return events, domain, user
        halves = np.where(long, 2, 1)
        first = np.where(long, (events.lengths + 1) // 2, events.lengths)
        lengths = np.repeat(first, halves)
        second = np.cumsum(halves)[long] - 1
        lengths[second] = (events.lengths - first)[long]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        events, domain, user = Ragged(events.values, offsets), np.repeat(domain, halves), np.repeat(user, halves)


def _columns(
    split: Split, kind: str, domain: np.ndarray, user: np.ndarray, num_events: np.ndarray, target_start: np.ndarray
) -> dict[str, np.ndarray]:
    """The index columns of documents of one kind."""
    import numpy as np

    log = split.interactions
    names = np.array([*split.catalogue.domains, ""], dtype=object)
    return {
        "domain": names[domain],
        "kind": np.full(len(user), kind, dtype=object),
        "num_events": num_events.astype(np.int32),
        "platform": np.array(log.platforms, dtype=object)[log.user_platform[user]],
        "user_id": log.user_id[user],
        "target_start": target_start,
    }


def _write_examples(
    config: PrepareConfig, split: Split, encoder: PromptEncoder, folder: Path, domain: str, about: dict[str, Any]
) -> None:
    """Next-item examples of a domain: every training event with enough history, and the validation queries."""
    import numpy as np

    from cprec.data.ragged import Ragged
    from cprec.progress import say
    from cprec.text.shards import write_shards

    number = split.catalogue.domains.index(domain)
    validation = split.queries(
        domain,
        VALIDATION,
        history_kind=config.history,
        max_history=config.max_history,
        min_history=config.min_history,
    )
    history, target = validation.history, validation.target
    with_target = np.concatenate([history.values, target])
    slots = np.concatenate([history.row_of, np.arange(len(target))])
    order = np.argsort(slots, kind="stable")
    validation_events = Ragged(with_target[order], history.offsets + np.arange(len(history.offsets)))
    for name, events, user in (
        ("train", *_training_examples(config, split, number)),
        ("validation", validation_events, validation.user),
    ):
        documents_domain = np.full(len(events), number)
        kept = encoder.fit(config.history, documents_domain, events, config.max_document_tokens - 1)
        if not kept.lengths.all():
            raise ConfigError(
                f"max_document_tokens={config.max_document_tokens} has no room for a title of "
                f"max_title_tokens={config.max_title_tokens} after the head of the template: raise it"
            )
        tokens, target_start = encoder.documents(config.history, documents_domain, kept)
        shards = write_shards(
            folder / "examples" / domain / name,
            tokens,
            _columns(split, config.history, documents_domain, user, kept.lengths, target_start),
            {"vocabulary_size": encoder.vocabulary_size, "about": about},
        )
        say(f"examples/{domain}/{name}: {len(shards):,} examples, {shards.manifest['num_tokens']:,} tokens")
        if name == "train" and not len(shards):
            raise DataError(
                f"domain {domain!r} has no user with more than min_history={config.min_history} training events: lower "
                "min_history, or choose another target domain"
            )


def _training_examples(config: PrepareConfig, split: Split, domain: int) -> tuple[Ragged, np.ndarray]:
    """Every training event of the domain as the last event of a row, after its history; and the row's user."""
    import numpy as np

    from cprec.data.ragged import Ragged, offsets_of
    from cprec.data.splits import comparable_domains

    log = split.interactions
    mask = split.events(TRAIN)
    if config.history == SPECIFIC:
        mask &= split.catalogue.domain[log.item] == domain
    else:
        mask &= comparable_domains(split.catalogue, split.domains)[split.catalogue.domain[log.item]]
    events = np.flatnonzero(mask)
    user, item = log.user[events], log.item[events]
    first = np.flatnonzero(np.r_[True, user[1:] != user[:-1]]) if len(user) else np.empty(0, dtype=np.int64)
    within = np.arange(len(user)) - np.repeat(first, np.diff(np.r_[first, len(user)]))
    targets = np.flatnonzero((within >= config.min_history) & (split.catalogue.domain[item] == domain))
    lengths = np.minimum(within[targets], config.max_history) + 1
    offsets = offsets_of(lengths)
    place = np.repeat(targets - lengths + 1, lengths) + np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return Ragged(item[place], offsets), user[targets]


def _write_queries(config: PrepareConfig, split: Split, folder: Path, domain: str) -> None:
    """Validation and test queries of a domain."""
    import pyarrow.parquet as pq

    from cprec.progress import say

    target = folder / "queries" / domain
    target.mkdir(parents=True)
    for part in (VALIDATION, TEST):
        queries = split.queries(
            domain,
            part,
            history_kind=config.history,
            max_history=len(split.interactions),  # the whole history: each recommender reads as much as it can
            min_history=config.min_history,
        )
        if not len(queries):
            raise DataError(f"domain {domain!r} has no {part} queries: no user has enough events (min_history, split)")
        pq.write_table(queries_table(split, queries, domain), target / f"{part}.parquet", compression="zstd")
        say(f"queries/{domain}: {len(queries):,} {part} queries")


def queries_table(split: Split, queries: Queries, domain: str) -> Any:
    """Queries as a table: query_id, platform, user_id, domain, history_domain, history_item, target, timestamp."""
    import numpy as np
    import pyarrow as pa

    catalogue, log = split.catalogue, split.interactions
    names = np.array(catalogue.domains, dtype=object)
    offsets = pa.array(queries.history.offsets.astype(np.int32))

    def lists(values: np.ndarray) -> Any:
        return pa.ListArray.from_arrays(offsets, pa.array(values, pa.string()))

    return pa.table(
        {
            "query_id": pa.array(queries.query_id, pa.string()),
            "platform": pa.array(np.array(log.platforms, dtype=object)[log.user_platform[queries.user]], pa.string()),
            "user_id": pa.array(log.user_id[queries.user], pa.string()),
            "domain": pa.array([domain] * len(queries), pa.string()),
            "history_domain": lists(names[catalogue.domain[queries.history.values]]),
            "history_item": lists(catalogue.item_id[queries.history.values]),
            "target": pa.array(catalogue.item_id[queries.target], pa.string()),
            "timestamp": pa.array(queries.timestamp, pa.int64()),
        }
    )


def _input_hashes(folder: Path) -> dict[str, str]:
    return {
        str(source["path"]): source["sha256"] for source in json.loads((folder / "dataset.json").read_text())["sources"]
    }
