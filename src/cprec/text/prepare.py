"""Stage: logs -> canonical tables, splits, behaviour sequences, token shards, examples, queries and a certificate."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.data.config import ConnectionSource, Rules, TableSource
from cprec.data.sources.files import files_of
from cprec.errors import ConfigError, DataError, InputChanged, LeakageError
from cprec.provenance import (
    CONFIG_FILE,
    TOKENIZER,
    FileHashes,
    differences,
    file_sha256,
    file_state,
    model_hashes,
    read_resolved,
    save_resolved,
    shortened,
    to_dict,
)
from cprec.schema import MIXED, SPECIFIC, TEST, VALIDATION
from cprec.text.config import PrepareConfig

if TYPE_CHECKING:
    from cprec.data.catalogue import Catalogue
    from cprec.text.encoding import PromptEncoder


HOW = ("output_dir", "engine", "memory_limit", "spill_dir", "workers", "partition")
"""Settings that change where and how a data folder is made, but not what is in it."""


def prepare(config: PrepareConfig) -> Path:
    """Write the data folder of a configuration and return it; a folder already complete with it is reused.

    The folder is made aside and renamed at the end, so an interrupted run leaves nothing that looks complete; the same
    command goes on where it was interrupted once the tables are there.

    Raises ConfigError where the folder is of other settings, InputChanged where what it was made from has changed.
    """
    from cprec.progress import say
    from cprec.text.documents import is_joined, is_written
    from cprec.text.workers import num_workers, run_parts

    output_dir = Path(config.output_dir)
    if _is_complete(config, output_dir):
        say(f"{output_dir}: complete with these settings, reused")
        return output_dir
    folder = output_dir.with_name(output_dir.name + ".incomplete")
    number, count = config.share()

    def unwritten(parts: range) -> list[int]:
        return [] if is_joined(folder) else [part for part in parts if not is_written(folder, part)]

    with _alone(output_dir):
        if _is_complete(config, output_dir):
            return output_dir  # another process was quicker
        if not _has_tables(config, folder):
            _write_tables(config, folder)
        parts = range(json.loads((folder / "dataset.json").read_text())["num_parts"])
        mine = unwritten(parts[number::count])
    run_parts("cprec.text.documents:write_part", folder, mine, num_workers(config.workers), "writing documents")
    with _alone(output_dir):
        if not folder.is_dir():
            return output_dir  # another process put the parts together
        if missing := unwritten(parts):
            say(f"partition {config.partition} is written; {len(missing)} of {len(parts)} parts are left to the others")
            return output_dir
        _finish(config, folder)
        folder.rename(output_dir)
    say(f"{output_dir}: written")
    return output_dir


@contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    """Wait until no other process is here; a process that dies is here no longer."""
    from filelock import FileLock

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    path = output_dir.with_name(f".{output_dir.name}.lock")
    with FileLock(path):
        yield
        if output_dir.is_dir():
            path.unlink(missing_ok=True)


def _is_complete(config: PrepareConfig, folder: Path) -> bool:
    """Whether a data folder is there, with these settings and input. Raises ConfigError if it is there with others."""
    if not folder.exists():
        return False
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} exists and is not a data folder: choose another output_dir or delete it")
    if changed := _changed(config, folder):
        raise ConfigError(
            f"{folder} was prepared with other settings of {', '.join(changed)}: choose another output_dir or delete it"
        )
    if changed := _changed_inputs(config, folder):
        raise InputChanged(
            f"{folder} was prepared from other input: {shortened(changed)}. Choose another output_dir, or delete "
            f"{folder} to prepare it anew"
        )
    return True


def _has_tables(config: PrepareConfig, folder: Path) -> bool:
    """Whether an unfinished folder has its tables, made with these settings from this input."""
    from cprec.progress import say

    if not (folder / CONFIG_FILE).is_file():
        return False
    changed = _changed(config, folder)
    if changed and config.partition:
        raise ConfigError(
            f"{folder} was begun with other settings of {', '.join(changed)}: give every partition the same settings, "
            "or delete it"
        )
    if not changed and (inputs := _changed_inputs(config, folder)):
        if config.partition:
            raise InputChanged(
                f"{folder} was begun from other input: {shortened(inputs)}. Every partition must read the same: delete "
                f"{folder} to begin anew"
            )
        say(f"{folder} was begun from other input and is begun anew: {shortened(inputs)}")
        return False
    return not changed


def _changed(config: PrepareConfig, folder: Path) -> list[str]:
    """The settings that differ from those a folder was made with, where they change what is in it."""
    old, new = read_resolved(folder)["config"], to_dict(config)
    for table in old.get("tables", ()):
        for name in ("encoding", "decimal"):  # a folder may be older than these
            table.setdefault(name, getattr(TableSource, name))
    changed = {name for name in old.keys() | new.keys() if name not in HOW and old.get(name) != new.get(name)}
    if "add_bos_token" not in old:  # from before there was this setting, when nothing stood before a text
        changed.discard("add_bos_token")
        if _beginning(config, folder):
            changed.add("add_bos_token (none were added; add_bos_token=false goes on so)")
    return sorted(changed)


def _files(config: PrepareConfig) -> dict[tuple[str, str], list[Path]]:
    """The files that each table of each domain is read from, as they are there now; none where all are gone."""
    sources: list[Any] = [*config.tables, *config.recbole, *config.public]
    return {(source.domain, table): paths for source in sources for table, paths in files_of(source).items()}


def _changed_inputs(config: PrepareConfig, folder: Path) -> list[str]:
    """What has changed of the input that a folder was made from; what cannot be compared is said."""
    from cprec.progress import say

    hashes, recorded = FileHashes(folder), read_resolved(folder)["inputs"]
    before: dict[tuple[str, str], dict[str, str]] = {}
    for entry in json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["sources"]:
        before.setdefault((entry["domain"], entry["table"]), {})[entry["path"]] = entry["sha256"]
    changed, unseen = [], []
    for (domain, table), paths in _files(config).items():
        if paths:
            now = {str(path): hashes.of(path) for path in paths}
            changed += differences(before.get((domain, table), {}), now)
        else:
            unseen.append(f"the files of {domain}/{table} are gone")
    for source in config.connections:
        try:
            found = _fingerprints(source, hashes)
        except (ConfigError, DataError) as error:
            unseen.append(f"the database of {source.domain} cannot be reached now ({error})")
            continue
        for table, now_is in found.items():
            was, name = recorded.get(_of_table(source, table)), f"{source.domain}/{table} in {source.shown}"
            if was is None:
                unseen.append(f"{name}, which gave nothing to compare it by")
            elif isinstance(now_is, DataError):
                changed.append(f"{name} cannot be read now: {now_is}")
            elif now_is is None or was.partition(":")[0] != now_is.partition(":")[0]:
                kinds = [str(value).partition(":")[0] for value in (was, now_is)]
                unseen.append(f"{name}, which gave the hash of a {kinds[0]} then and of a {kinds[1]} now")
            elif was != now_is:
                changed.append(f"{name} changed")
    tokenizer = {name: sha256 for name, sha256 in recorded.items() if name.startswith(_TOKENIZER)}
    if tokenizer:
        if of_tokenizer := _tokenizer_hashes(config, hashes):
            changes = differences(tokenizer, of_tokenizer)
            changed += [f"{change.removeprefix(_TOKENIZER)} (tokenizer={config.tokenizer})" for change in changes]
        else:
            unseen.append(f"tokenizer={config.tokenizer} is gone")
    hashes.save()
    if unseen and not changed:
        say(
            f"note: whether this changed since {folder} was made cannot be seen (delete {folder} to prepare it anew): "
            f"{'; '.join(unseen)}"
        )
    return changed


_TOKENIZER = "tokenizer://"
"""What begins the names of a tokenizer's files among the recorded inputs; no path has two slashes in a row."""


def _of_table(source: ConnectionSource, table: str) -> str:
    """The name of a table's fingerprint among the recorded inputs."""
    return f"fingerprint://{source.domain}/{table}"


def _fingerprints(source: ConnectionSource, hashes: FileHashes) -> dict[str, str | DataError | None]:
    from cprec.data.sources.connections import fingerprints  # needs Ibis, which machines that train may lack

    return fingerprints(source, hashes.of)


def _tokenizer_hashes(config: PrepareConfig, hashes: FileHashes) -> dict[str, str]:
    from cprec.text.tokenizer import TINY

    found = {} if config.tokenizer == TINY else model_hashes(config.tokenizer, TOKENIZER, hashes)
    return {_TOKENIZER + name: sha256 for name, sha256 in found.items()}


def _write_tables(config: PrepareConfig, folder: Path) -> None:
    """Canonical tables, the tokenizer and the tokens of every title: what all parts need."""
    from cprec.data.build import build_tables
    from cprec.data.dataset import read_catalogue
    from cprec.progress import say
    from cprec.text.documents import ENCODER
    from cprec.text.encoding import PromptEncoder

    sources = _sources(config)
    _check_domains(config, [source.domain for source in sources])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = time.time_ns()
    states = {path: file_state(path) for paths in _files(config).values() for path in paths}
    hashes = FileHashes(folder)
    fingerprints = {
        _of_table(source, table): found
        for source in config.connections
        for table, found in _fingerprints(source, hashes).items()
        if isinstance(found, str)
    }
    build_tables(
        sources,
        folder,
        Rules(
            k_core=config.k_core,
            k_core_scope=config.k_core_scope,
            deduplicate=config.deduplicate,
            drop_consecutive_repeats=config.drop_consecutive_repeats,
            tie_order=config.tie_order,
            strict=config.strict,
        ),
        seed=config.seed,
        engine=config.engine,
        memory_limit=config.memory_limit,
        spill=config.spill_dir,
        progress=say,
    )
    for path, state in states.items():
        if file_state(path) != state:
            raise DataError(f"{path} was changed while it was read: run the command again once it is written")
    catalogue = read_catalogue(folder)
    _rules(config, folder, catalogue).save(folder)
    tokenizer = _tokenizer(config, catalogue)
    of_tokenizer = _tokenizer_hashes(config, hashes)  # a hub's model has its copy here now
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = PromptEncoder(
        tokenizer,
        catalogue,
        max_title_tokens=config.max_title_tokens,
        template=config.template(),
        begin=_beginning(config, folder),
    )
    encoder.save(folder / ENCODER)
    _count_shared(config, folder, tokenizer, encoder)
    inputs = _input_hashes(folder)
    for path, state in states.items():
        if str(path) in inputs:
            hashes.add(path, state, inputs[str(path)], before)
    hashes.save()
    save_resolved(folder, replace(config, partition=None), inputs | fingerprints | of_tokenizer)


def _count_shared(config: PrepareConfig, folder: Path, tokenizer: Any, encoder: PromptEncoder) -> None:
    """Enter into `dataset.json` which items are read as the same text, and say so where it matters.

    Raises DataError for items of a target domain of which the tokenizer leaves nothing: they cannot be ranked.
    """
    from cprec.data.dataset import count_events, read_manifest, write_manifest
    from cprec.progress import say
    from cprec.text.shared_texts import notes, shared_texts

    manifest, catalogue = read_manifest(folder), encoder.catalogue
    for domain in sorted({*config.target_domains, *pretrain_domains(config, catalogue)}):
        found = shared_texts(encoder, tokenizer, domain, count_events(folder, catalogue, domain))
        manifest["domains"][domain]["texts"] = found
        for note in notes(domain, found, encoder):
            say(f"note: {note}")
        if found["empty"] and domain in config.target_domains:
            raise DataError(
                f"the tokenizer leaves nothing of {found['empty']:,} items of domain {domain!r}, as "
                f"{', '.join(map(repr, found['examples']['empty']))}: choose another tokenizer, or leave them out"
            )
    write_manifest(folder, manifest)


def _rules(config: PrepareConfig, folder: Path, catalogue: Catalogue) -> Any:
    from cprec.data.build import count_times
    from cprec.data.config import GLOBAL_TIME
    from cprec.data.dataset import read_domains
    from cprec.data.splits import cut_times
    from cprec.text.documents import DocumentRules

    cuts = None
    if config.split.method == GLOBAL_TIME:
        times, counts = count_times(folder, config.engine, config.memory_limit, config.spill_dir)
        cuts = cut_times(config.split, read_domains(folder), times, counts)
    return DocumentRules(
        target_domains=config.target_domains,
        pretrain_domains=pretrain_domains(config, catalogue),
        split=config.split,
        cuts=cuts,
        mixed_order=config.mixed_order,
        document_order=config.document_order,
        min_events=config.min_events,
        max_events=config.max_events,
        max_document_tokens=config.max_document_tokens,
        history=config.history,
        max_history=config.max_history,
        min_history=config.min_history,
        heldout_share=config.heldout_share,
        seed=config.seed,
    )


def _finish(config: PrepareConfig, folder: Path) -> None:
    """Put the parts together, say what there is, and certify it; what an interrupted run did of it is not done
    again."""
    from cprec.data.dataset import read_catalogue, read_manifest, write_manifest
    from cprec.data.splits import in_seconds
    from cprec.text.certificate import audit, violated
    from cprec.text.documents import DocumentRules, is_joined, join_parts, remove_parts

    if not is_joined(folder):
        manifest = read_manifest(folder)
        cuts = DocumentRules.read(folder).cuts
        manifest["split"] = asdict(config.split)
        manifest["cuts"] = cuts and dict(zip((VALIDATION, TEST), map(in_seconds, cuts), strict=True))
        write_manifest(folder, manifest)
        join_parts(folder, {"about": _about(config, read_catalogue(folder), folder)})
    remove_parts(folder)
    _describe(config, folder)
    certificate = audit(folder, workers=config.workers)
    if not certificate["clean"]:
        raise LeakageError("\n  ".join(["the written data leak:", *violated(certificate)]))


def _describe(config: PrepareConfig, folder: Path) -> None:
    """Say how much was written; raise DataError where nothing can be trained or evaluated with it."""
    import pyarrow.parquet as pq

    from cprec.data.dataset import read_domains
    from cprec.progress import say
    from cprec.text.shards import read_shard_manifest

    for name in ("train", "heldout"):
        manifest = read_shard_manifest(folder / "shards" / name)
        counts = dict.fromkeys((SPECIFIC, MIXED), 0)
        for piece in manifest["pieces"]:
            counts[piece["kind"]] += piece["num_documents"]
        say(
            f"shards/{name}: {counts[SPECIFIC]:,} domain-specific and {counts[MIXED]:,} mixed documents, "
            f"{manifest['num_tokens']:,} tokens"
        )
        if name == "heldout" and not manifest["num_documents"] and config.heldout_share > 0:
            say(f"note: no user is held out to measure perplexity: raise heldout_share={config.heldout_share:g}")
        if name == "train" and not manifest["num_documents"]:
            raise DataError(
                f"no behaviour sequence has min_events={config.min_events} events in the training part: the log is too "
                "small, or lower min_events"
            )
    domains = read_domains(folder)
    ordered = [name for name in config.pretrain_domains or domains if not domains[name].has_times]
    if ordered and config.mixed_order == "time":
        say(
            f"note: {', '.join(ordered)} only order{'s' if len(ordered) == 1 else ''} each user's events, so mixed "
            "sequences leave "
            f"{'it' if len(ordered) == 1 else 'them'} out; mixed_order=interleave spreads them among the others"
        )
    for domain in config.target_domains:
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
                raise DataError(
                    f"domain {domain!r} has no {name} queries: no user has enough events (min_history, split)"
                )


def _sources(config: PrepareConfig) -> list[Any]:
    sources: list[Any] = [*config.tables, *config.recbole, *config.public, *config.connections]
    if config.synthetic is not None:
        from cprec.data.sources.memory import MemorySource
        from cprec.data.sources.synthetic import SyntheticWorld

        world = SyntheticWorld(config.synthetic)
        for domain, (items, interactions) in world.tables().items():
            info = world.domains[domain]
            sources.append(MemorySource(domain, info.platform, items, interactions, info.has_times))
    return sources


def _check_domains(config: PrepareConfig, domains: Sequence[str]) -> None:
    for field in ("target_domains", "pretrain_domains"):
        unknown = sorted(set(getattr(config, field)) - set(domains))
        if unknown:
            raise ConfigError(f"{field} names {', '.join(unknown)}, but the data has: {', '.join(sorted(domains))}")


def _tokenizer(config: PrepareConfig, catalogue: Catalogue) -> Any:
    """The base model's tokenizer, or one trained on the titles that pre-training sees."""
    from cprec.text.tokenizer import TINY, load_tokenizer, train_on_titles

    if config.tokenizer != TINY:
        return load_tokenizer(config.tokenizer)
    return train_on_titles(catalogue, pretrain_domains(config, catalogue), config.vocabulary_size, config.template())


def _beginning(config: PrepareConfig, folder: Path) -> list[int]:
    """The tokens that documents begin with, by the tokenizer in a data folder."""
    from cprec.text.tokenizer import beginning_of, load_tokenizer

    return beginning_of(load_tokenizer(str(folder / "tokenizer")), config.add_bos_token)


def pretrain_domains(config: PrepareConfig, catalogue: Catalogue) -> tuple[str, ...]:
    return config.pretrain_domains or catalogue.domains


def _about(config: PrepareConfig, catalogue: Catalogue, folder: Path) -> dict[str, Any]:
    """What a model must know of the data that it was trained on: it travels from shard manifests to `cprec.json`."""
    begin = _beginning(config, folder)
    return {
        "template": asdict(config.template()),
        "max_title_tokens": config.max_title_tokens,
        **({"begin": begin} if begin else {}),  # missing where nothing stands before a text
        "history": config.history,
        "max_history": config.max_history,
        "catalogue_sha256": catalogue.digest(),
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
    }


def _input_hashes(folder: Path) -> dict[str, str]:
    return {
        str(source["path"]): source["sha256"] for source in json.loads((folder / "dataset.json").read_text())["sources"]
    }
