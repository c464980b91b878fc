"""Stage: logs -> canonical tables, splits, behaviour sequences, token shards, examples, queries and a certificate."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from filelock import FileLock

from cprec.data.config import GLOBAL_TIME, TableSource
from cprec.data.dataset import count_events, read_catalogue, read_domains, read_manifest, write_manifest
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.data.splits import cut_times, in_seconds
from cprec.errors import ConfigError, DataError, InputChanged, LeakageError
from cprec.files import aside, publish
from cprec.partition import share_of
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, file_sha256, read_resolved, save_resolved, shortened, to_dict
from cprec.schema import KINDS, MIXED, SPECIFIC, TEST, VALIDATION
from cprec.text.certificate import audit, violated
from cprec.text.config import TINY, DocumentRules, PrepareConfig
from cprec.text.documents import ENCODER, is_joined, join_parts, read_rules, remove_parts, save_rules, unwritten_parts
from cprec.text.encoding import PromptEncoder
from cprec.text.inputs import InputRecord, changed_inputs
from cprec.text.shards import read_shard_manifest
from cprec.text.shared_texts import notes, shared_texts
from cprec.text.text_data import write_text_data
from cprec.text.tokenizer import beginning_of, load_tokenizer, train_on_titles
from cprec.workers import num_workers, run_parts

if TYPE_CHECKING:
    from cprec.data.build import Source  # with Ibis, which machines that train may lack

EXECUTION_SETTINGS = ("output_dir", "engine", "memory_limit", "spill_dir", "workers", "partition")
"""Settings that change where and how a data folder is made, but not its content."""


def prepare(config: PrepareConfig) -> Path:
    """Write the data folder of a configuration and return it; a folder already complete with it is reused.

    The folder is made aside and renamed at the end, so an interrupted run leaves nothing that looks complete; the same
    command goes on where it was interrupted once the tables are there. A folder of text is written as `text_data` says.

    Raises ConfigError where the folder was made with other settings, InputChanged where its input has changed.
    """
    output_dir = Path(config.output_dir)
    if _is_complete(config, output_dir):
        say(f"{output_dir}: complete with these settings, reused")
        return output_dir
    folder = aside(output_dir)
    with _locked(output_dir):
        if _is_complete(config, output_dir):
            return output_dir  # another process was quicker
        if config.text:
            write_text_data(config, folder)
            publish(folder, output_dir)
            say(f"{output_dir}: written")
            return output_dir
        if not _has_tables(config, folder):
            _write_tables(config, folder)
    number, count = share_of(config.partition)
    parts = [part for part in unwritten_parts(folder) if part % count == number]
    run_parts("cprec.text.documents:write_part", folder, parts, num_workers(config.workers), "writing documents")
    with _locked(output_dir):
        if not folder.is_dir():
            return output_dir  # another process put the parts together
        if missing := unwritten_parts(folder):
            say(f"partition {config.partition} is written; {len(missing)} parts are left to the others")
            return output_dir
        _join_parts(config, folder)
        _describe(config, folder)
        certificate = audit(folder, workers=config.workers)
        if not certificate["clean"]:
            raise LeakageError("\n  ".join(["the written data leak:", *violated(certificate)]))
        publish(folder, output_dir)
    say(f"{output_dir}: written")
    return output_dir


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Wait until no other process is here; the lock of a process that dies is released."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    path = output_dir.with_name(f".{output_dir.name}.lock")
    with FileLock(path):
        yield
        if output_dir.is_dir():
            path.unlink(missing_ok=True)


# ---- folders of earlier runs -----------------------------------------------------------------------------------------


def _is_complete(config: PrepareConfig, folder: Path) -> bool:
    """Whether a data folder is there, with these settings and input. Raises ConfigError if it is there with others."""
    if not folder.exists():
        return False
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} exists and is not a data folder: choose another output_dir or delete it")
    if changed := _changed_settings(config, folder):
        raise ConfigError(
            f"{folder} was prepared with other settings of {', '.join(changed)}: choose another output_dir or delete it"
        )
    if changed := changed_inputs(config, config.tokenizer, folder):
        raise InputChanged(
            f"{folder} was prepared from other input: {shortened(changed)}. Choose another output_dir, or delete "
            f"{folder} to prepare it anew"
        )
    return True


def _has_tables(config: PrepareConfig, folder: Path) -> bool:
    """Whether an unfinished folder has its tables, made with these settings from this input."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    if changed := _changed_settings(config, folder):
        if config.partition:
            raise ConfigError(
                f"{folder} was begun with other settings of {', '.join(changed)}: give every partition the same "
                "settings, or delete it"
            )
        return False
    if changed := changed_inputs(config, config.tokenizer, folder):
        if config.partition:
            raise InputChanged(
                f"{folder} was begun from other input: {shortened(changed)}. Every partition must read the same: "
                f"delete {folder} to begin anew"
            )
        say(f"{folder} was begun from other input and is begun anew: {shortened(changed)}")
        return False
    return True


def _changed_settings(config: PrepareConfig, folder: Path) -> list[str]:
    """The settings that differ from those a folder was made with, of those that decide its content."""
    old, new = read_resolved(folder)["config"], to_dict(config)
    for table in old.get("tables", ()):
        for name in ("encoding", "decimal"):  # a folder may be older than these, and than `text`
            table.setdefault(name, getattr(TableSource, name))
    old.setdefault("text", [])
    names = (old.keys() | new.keys()) - set(EXECUTION_SETTINGS)
    changed = {name for name in names if old.get(name) != new.get(name)}
    if "add_bos_token" not in old:  # from before there was this setting, when nothing stood before a text
        changed.discard("add_bos_token")
        if _beginning(config, folder):
            changed.add("add_bos_token (none were added; add_bos_token=false goes on so)")
    return sorted(changed)


# ---- tables ----------------------------------------------------------------------------------------------------------


def _write_tables(config: PrepareConfig, folder: Path) -> None:
    """Write the canonical tables, the tokenizer and the tokens of every title, which all parts need."""
    sources = _domain_sources(config)
    domains = sorted(source.domain for source in sources)
    for name in ("target_domains", "pretrain_domains"):
        if unknown := sorted(set(getattr(config, name)) - set(domains)):
            raise ConfigError(f"{name} names {', '.join(unknown)}, but the data has: {', '.join(domains)}")
    # Before anything is read, which may take long: a wrong name costs nothing.
    tokenizer = None if config.tokenizer == TINY else load_tokenizer(config.tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record = InputRecord(config, folder)
    cuts = _build_tables(config, sources, folder)
    record.check_unchanged()
    catalogue = read_catalogue(folder)
    rules = replace(config.document_rules(), pretrain_domains=config.pretrain_domains or catalogue.domains)
    save_rules(folder, rules, cuts)
    if tokenizer is None:
        tokenizer = train_on_titles(catalogue, rules.pretrain_domains, config.vocabulary_size, config.template())
    tokenizer.save_pretrained(folder / "tokenizer")
    most, begin = config.max_title_tokens, _beginning(config, folder)
    encoder = PromptEncoder(
        tokenizer,
        catalogue,
        max_title_tokens=most,
        title_cut=config.title_cut,
        template=config.template(),
        begin=begin,
    )
    encoder.save(folder / ENCODER)
    _count_shared_texts(folder, tokenizer, encoder, rules)
    # Last: the folder has its tables once it has this file.
    save_resolved(folder, replace(config, partition=None), record.hashes(config.tokenizer))


def _domain_sources(config: PrepareConfig) -> list[Source]:
    """Every domain's source; the domains of the synthetic world are tables in memory."""
    from cprec.data.sources.memory import MemorySource  # with Ibis, as `Source`

    sources: list[Source] = [*config.tables, *config.recbole, *config.public, *config.connections]
    if config.synthetic is not None:
        world = SyntheticWorld(config.synthetic)
        for domain, (items, interactions) in world.tables().items():
            info = world.domains[domain]
            sources.append(MemorySource(domain, info.platform, items, interactions, info.has_times))
    return sources


def _build_tables(config: PrepareConfig, sources: list[Source], folder: Path) -> tuple[int, int] | None:
    """Write the canonical tables. Returns the cuts in time that split the log, None where no such cut does."""
    from cprec.data.build import build_tables, count_times  # with Ibis, as `Source`

    build_tables(
        sources,
        folder,
        config,
        seed=config.seed,
        engine=config.engine,
        memory_limit=config.memory_limit,
        spill=config.spill_dir,
        progress=say,
    )
    if config.split.method != GLOBAL_TIME:
        return None
    times, counts = count_times(folder, config.engine, config.memory_limit, config.spill_dir)
    return cut_times(config.split, read_domains(folder), times, counts)


def _beginning(config: PrepareConfig, folder: Path) -> list[int]:
    """The tokens that documents begin with, by the tokenizer in a data folder."""
    return beginning_of(load_tokenizer(str(folder / "tokenizer")), config.add_bos_token)


def _count_shared_texts(folder: Path, tokenizer: Any, encoder: PromptEncoder, rules: DocumentRules) -> None:
    """Enter into `dataset.json` which items are read as the same text, and say so where it matters.

    Raises DataError for items of a target domain that have no token left: they cannot be ranked.
    """
    manifest, catalogue = read_manifest(folder), encoder.catalogue
    for domain in sorted({*rules.target_domains, *rules.pretrain_domains}):
        found = shared_texts(encoder, tokenizer, domain, count_events(folder, catalogue, domain))
        manifest["domains"][domain]["texts"] = found
        for note in notes(domain, found, encoder):
            say(f"note: {note}")
        if found["empty"] and domain in rules.target_domains:
            raise DataError(
                f"the tokenizer leaves nothing of {found['empty']:,} items of domain {domain!r}, as "
                f"{', '.join(map(repr, found['examples']['empty']))}: choose another tokenizer, or leave them out"
            )
    write_manifest(folder, manifest)


# ---- parts -----------------------------------------------------------------------------------------------------------


def _join_parts(config: PrepareConfig, folder: Path) -> None:
    """Put the parts together, unless an interrupted run did so already."""
    if not is_joined(folder):
        manifest, (_, cuts) = read_manifest(folder), read_rules(folder)
        manifest["split"] = asdict(config.split)
        manifest["cuts"] = cuts and dict(zip((VALIDATION, TEST), map(in_seconds, cuts), strict=True))
        write_manifest(folder, manifest)
        begin = _beginning(config, folder)
        # What a model must know of the data that it was trained on: it goes on from shard manifests to `cprec.json`.
        about = {
            "template": asdict(config.template()),
            "max_title_tokens": config.max_title_tokens,
            "title_cut": config.title_cut,
            **({"begin": begin} if begin else {}),  # missing where nothing stands before a text
            "history": config.history,
            "max_history": config.max_history,
            "catalogue_sha256": read_catalogue(folder).digest(),
            "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
        }
        join_parts(folder, about)
    remove_parts(folder)


# ---- the summary -----------------------------------------------------------------------------------------------------


def _describe(config: PrepareConfig, folder: Path) -> None:
    """Say how much was written. Raises DataError where nothing can be trained or evaluated with it."""
    for name in ("train", "heldout"):
        manifest = read_shard_manifest(folder / "shards" / name)
        counts = dict.fromkeys(KINDS, 0)
        for piece in manifest["pieces"]:
            counts[piece["kind"]] += piece["num_documents"]
        say(
            f"shards/{name}: {counts[SPECIFIC]:,} domain-specific and {counts[MIXED]:,} mixed documents, "
            f"{manifest['num_tokens']:,} tokens"
        )
        if name == "train" and not manifest["num_documents"]:
            raise DataError(
                f"no behaviour sequence has min_events={config.min_events} events in the training part: the log is too "
                "small, or lower min_events"
            )
    if not manifest["num_documents"] and config.heldout_share > 0:
        say(f"note: no user is held out to measure perplexity: raise heldout_share={config.heldout_share:g}")
    domains = read_domains(folder)
    ordered = [name for name in config.pretrain_domains or domains if not domains[name].has_times]
    if ordered and config.mixed_order == "time":
        verb, them = ("orders", "it") if len(ordered) == 1 else ("order", "them")
        say(
            f"note: {', '.join(ordered)} only {verb} each user's events, so mixed sequences leave {them} out; "
            f"mixed_order=interleave spreads {them} among the others"
        )
    for domain in config.target_domains:
        _describe_target(config, folder, domain)


def _describe_target(config: PrepareConfig, folder: Path, domain: str) -> None:
    for name in ("train", VALIDATION):
        manifest = read_shard_manifest(folder / "examples" / domain / name)
        say(f"examples/{domain}/{name}: {manifest['num_documents']:,} examples, {manifest['num_tokens']:,} tokens")
        if name == "train" and not manifest["num_documents"]:
            raise DataError(
                f"domain {domain!r} has no user with more than min_history={config.min_history} training events: "
                "lower min_history, or choose another target domain"
            )
    for name in (VALIDATION, TEST):
        num_queries = pq.read_metadata(folder / "queries" / domain / f"{name}.parquet").num_rows
        say(f"queries/{domain}: {num_queries:,} {name} queries")
        if not num_queries:
            raise DataError(f"domain {domain!r} has no {name} queries: no user has enough events (min_history, split)")
