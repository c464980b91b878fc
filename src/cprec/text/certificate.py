"""The leakage certificate of a data folder: made from what stands on disk, not from the code that wrote it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.data.catalogue import Catalogue
from cprec.data.dataset import read_catalogue, read_manifest, read_split
from cprec.data.leakage import (
    Grammar,
    Observation,
    Property,
    add_up,
    check_absent,
    check_documents,
    check_heads,
    check_queries,
    check_repeated_targets,
    check_times,
    find_near_duplicates,
    find_ties,
    read_events,
)
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import GLOBAL_TIME, Split, make_split
from cprec.errors import ConfigError, ShardError
from cprec.progress import say
from cprec.provenance import file_sha256, read_resolved
from cprec.schema import CONTEXT, MIXED, TEST, TRAIN, VALIDATION
from cprec.text.documents import POPULARITY, read_queries_of_part
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import DOCUMENTS, TOKENS, Shards, open_shards, read_piece, read_shard_manifest
from cprec.text.tokenizer import TINY, load_tokenizer, train_on_titles
from cprec.text.workers import num_workers, run_parts

CERTIFICATE = "certificate.json"

_WORK = ".audit"
"""Folder inside the data folder for what the parts count, while they are audited."""


def audit(folder: str | Path, workers: int | None = None) -> dict[str, Any]:
    """Check what stands in a data folder, write `certificate.json` and return it.

    Everything is read back from disk: the canonical tables and their split, and the tokens of every shard and example.
    `clean` means that no property is violated; observations are counts that a reader should know and that prove no
    leak. Files that differ from those of an earlier clean certificate are a violation.
    """
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise ConfigError(f"{folder} is no data folder: give one that `cprec prepare` wrote")
    recorded = read_resolved(folder)["config"]
    manifest = read_manifest(folder)
    files = _hashes(folder)
    properties = [_check_unchanged(folder, files), _check_manifests(folder, recorded, files)]
    work = folder / _WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        catalogue = read_catalogue(folder)
        _encoder(folder, catalogue, recorded).save(work)
        found = run_parts(
            f"{__name__}:audit_part", folder, range(manifest["num_parts"]), num_workers(workers), "auditing"
        )
        properties += add_up([[Property(**entry) for entry in part["properties"]] for part in found])
        observations = add_up([[Observation(**entry) for entry in part["observations"]] for part in found])
        properties.append(_check_popularity(folder, catalogue, sorted(work.glob("part-*.npy"))))
        properties += _check_tokenizer(folder, catalogue, recorded)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    observations += [
        find_near_duplicates(catalogue, domain, _pretrained(recorded, catalogue))
        for domain in recorded["target_domains"]
    ]
    certificate = {
        "clean": all(p.violations == 0 for p in properties),
        "split": manifest["split"],
        "cuts": manifest.get("cuts"),
        "properties": [p.to_dict() for p in properties],
        "observations": [o.to_dict() for o in observations],
        "artifacts": {name: _identity(folder / name) for name in _shard_names(recorded, examples=(TRAIN,))},
        "queries": {
            f"{domain}/{part}": files[f"queries/{domain}/{part}.parquet"]
            for domain in recorded["target_domains"]
            for part in (VALIDATION, TEST)
        },
        "catalogue_sha256": catalogue.digest(),
        "files": files,
    }
    if not certificate["clean"] and (earlier := _certified_files(folder)):
        certificate["certified_files"] = earlier
    temporary = folder / (CERTIFICATE + ".incomplete")
    temporary.write_text(json.dumps(certificate, indent=1) + "\n")
    temporary.replace(folder / CERTIFICATE)
    checked = sum(p.checked for p in properties)
    wrong = sum(p.violations for p in properties)
    say(f"certificate: {len(properties)} properties, {checked:,} checks, {wrong:,} violations")
    for p in properties:
        if p.violations:
            say(f"  VIOLATED: {p.name}: {p.violations:,} of {p.checked:,}, as {'; '.join(p.examples)}")
    for o in observations:
        say(f"  noted: {o.name}: {o.found:,} of {o.checked:,}")
    return certificate


# ---- files -----------------------------------------------------------------------------------------------------------


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the certificate speaks of, by its path in the folder."""
    kinds = ("dataset.json", POPULARITY, "rejected.parquet")
    folders = ("items", "interactions", "tokenizer", "shards", "examples", "queries")
    paths = [folder / name for name in kinds if (folder / name).is_file()]
    paths += [path for name in folders for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}


def _certified_files(folder: Path) -> dict[str, str]:
    """The files of the latest clean certificate; none where there was none."""
    try:
        earlier = json.loads((folder / CERTIFICATE).read_text())
    except (OSError, ValueError):
        return {}
    files: dict[str, str] = earlier["files"] if earlier.get("clean") else earlier.get("certified_files", {})
    return files


def _check_unchanged(folder: Path, files: dict[str, str]) -> Property:
    earlier = _certified_files(folder)
    changed = sorted(name for name in earlier.keys() | files.keys() if earlier and earlier.get(name) != files.get(name))
    return Property(
        name="no file was changed, added or removed after it was certified",
        checked=len(earlier),
        violations=len(changed),
        examples=changed[:5],
    )


def _check_manifests(folder: Path, recorded: dict[str, Any], files: dict[str, str]) -> Property:
    wrong, checked = [], 0
    for name in _shard_names(recorded):
        manifest = read_shard_manifest(folder / name)
        for part in (TOKENS, DOCUMENTS):
            checked += 1
            if files.get(f"{name}/{part}") != manifest["sha256"][part]:
                wrong.append(f"{name}/{part}")
    return Property(
        name="every shard file has the hash that its manifest gives",
        checked=checked,
        violations=len(wrong),
        examples=wrong[:5],
    )


def _shard_names(recorded: dict[str, Any], examples: Sequence[str] = (TRAIN, VALIDATION)) -> Iterator[str]:
    yield from ("shards/train", "shards/heldout")
    for domain in recorded["target_domains"]:
        yield from (f"examples/{domain}/{part}" for part in examples)


def _identity(folder: Path) -> str:
    return open_shards(folder, verify=False).sha256


# ---- what is learnt from no event ------------------------------------------------------------------------------------


def _check_popularity(folder: Path, catalogue: Catalogue, counted: Sequence[Path]) -> Property:
    """The table of popularity counts training events and no others."""
    expected = sum((np.load(path) for path in counted), np.zeros(len(catalogue), dtype=np.int64))
    table = pq.read_table(folder / POPULARITY)
    names = np.array(catalogue.domains, dtype=object)[catalogue.domain]
    same_items = table["item_id"].to_pylist() == list(catalogue.item_id) and table["domain"].to_pylist() == list(names)
    found = table["num_events"].to_numpy() if same_items else np.full(len(expected), -1)
    wrong = np.flatnonzero(found != expected)
    return Property(
        name="popularity: every item has the number of its training events",
        checked=len(expected),
        violations=len(wrong),
        examples=[
            f"{names[row]}/{catalogue.item_id[row]}: {found[row]} counted, {expected[row]} train" for row in wrong[:5]
        ],
    )


def _check_tokenizer(folder: Path, catalogue: Catalogue, recorded: dict[str, Any]) -> list[Property]:
    """A tokenizer that was trained here is the one that the titles of the pre-training domains alone give."""
    if recorded["tokenizer"] != TINY:
        return []
    again = train_on_titles(catalogue, _pretrained(recorded, catalogue), recorded["vocabulary_size"])
    written = json.loads(load_tokenizer(str(folder / "tokenizer")).backend_tokenizer.to_str())
    expected = json.loads(again.backend_tokenizer.to_str())
    vocabulary, known = written["model"]["vocab"], expected["model"]["vocab"]
    other = [] if written["model"] == expected["model"] else sorted(vocabulary.keys() - known.keys()) or ["its merges"]
    return [
        Property(
            name="tokenizer: trained on titles of the pre-training domains again, it comes out the same",
            checked=len(vocabulary),
            violations=len(other),
            examples=other[:5],
        )
    ]


def _pretrained(recorded: dict[str, Any], catalogue: Catalogue) -> tuple[str, ...]:
    return tuple(recorded["pretrain_domains"]) or catalogue.domains


# ---- parts -----------------------------------------------------------------------------------------------------------


def _encoder(folder: Path, catalogue: Catalogue, recorded: dict[str, Any]) -> PromptEncoder:
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return PromptEncoder(tokenizer, catalogue, max_title_tokens=recorded["max_title_tokens"])


@functools.lru_cache(maxsize=1)
def _open(folder: Path, _stamp: int) -> tuple[PromptEncoder, Grammar]:
    """What all parts need; the stamp tells one audit of a folder from another."""
    catalogue = read_catalogue(folder)
    encoder = PromptEncoder.load(folder / _WORK, catalogue)
    return encoder, Grammar(
        heads=encoder.heads(),
        line=encoder.line_tokens,
        next=encoder.next_tokens,
        eos=encoder.eos_id,
        tags=Ragged.of([encoder.tag_tokens(number) for number in range(len(catalogue.domains))]),
        titles=encoder.titles(np.arange(len(catalogue))),
        domain=catalogue.domain,
    )


def audit_part(folder: Path, part: int) -> dict[str, Any]:
    """Check what the users of one part have in every shard, example and query: properties and observations."""
    encoder, grammar = _open(folder, (folder / _WORK / "encoder.json").stat().st_mtime_ns)
    recorded = read_resolved(folder)["config"]
    split = read_split(folder, part, encoder.catalogue)
    auditor = _Auditor(folder, part, split, grammar, recorded)
    np.save(folder / _WORK / f"part-{part}.npy", np.bincount(split.train.item, minlength=len(split.catalogue)))
    properties = [auditor.check_split()]
    trained: dict[str, np.ndarray] = {}
    for name in _shard_names(recorded):
        try:
            shards = auditor.shards(name)
        except ShardError:
            continue  # its hash is a violation already
        properties += auditor.check(name, shards)
        trained[name] = auditor.document_user(shards)
    if {"shards/train", "shards/heldout"} <= trained.keys():
        properties.append(
            check_absent(
                "shards/heldout: no user of shards/train",
                trained["shards/heldout"],
                np.unique(trained["shards/train"]),
                split.interactions.user_id,
            )
        )
    observations = []
    tie_order = read_manifest(folder)["rules"]["tie_order"]
    for domain in recorded["target_domains"]:
        for name in (VALIDATION, TEST):
            table = auditor.queries(domain, name)
            properties.append(check_queries(split, domain, name, table))
            observations += find_ties(split, domain, name, tie_order)
    return {
        "properties": [p.to_dict() for p in properties],
        "observations": [o.to_dict() for o in observations],
    }


class _Auditor:
    """Holds one part of the log while several shards are checked."""

    def __init__(self, folder: Path, part: int, split: Split, grammar: Grammar, recorded: dict[str, Any]) -> None:
        log = split.interactions
        self._folder, self._part, self._split, self._recorded = folder, part, split, recorded
        self._grammar = grammar
        self._title_of_row = grammar.title_of_row
        platforms = np.array(log.platforms, dtype=object)[log.user_platform]
        self._users = _keys(pa.array(platforms, pa.string()), pa.array(log.user_id, pa.string()))
        self._title = self._title_of_row[log.item]
        self._train = split.events(TRAIN)
        seen = _pretrained(recorded, split.catalogue)
        self._unseen = [domain for domain in recorded["target_domains"] if domain not in seen]

    def check_split(self) -> Property:
        """The split in the tables is what its parameters say."""
        split, log = self._split, self._split.interactions
        manifest = read_manifest(self._folder)
        cuts = manifest.get("cuts")
        again = make_split(
            split.catalogue,
            log,
            split.domains,
            split.spec,
            cuts=(cuts[VALIDATION], cuts[TEST]) if cuts else None,
            seed=self._recorded["seed"],
        )
        wrong = np.flatnonzero(again.part != split.part)
        return Property(
            name=f"interactions: the split is what {split.spec.method} makes of them",
            checked=len(log),
            violations=len(wrong),
            examples=[f"{log.user_id[log.user[e]]} at {log.timestamp[e]}" for e in wrong[:5]],
        )

    def shards(self, name: str) -> Shards:
        """The documents of this part in a shard folder, with their tokens."""
        folder = self._folder / name
        manifest = read_shard_manifest(folder)
        if (folder / TOKENS).stat().st_size != manifest["num_tokens"] * np.dtype(manifest["dtype"]).itemsize:
            raise ShardError(f"{folder / TOKENS} was cut or changed")
        places = [place for place, piece in enumerate(manifest["pieces"]) if piece["part"] == self._part]
        return Shards.concatenate([read_piece(folder, manifest, place) for place in places], manifest)

    def check(self, name: str, shards: Shards) -> list[Property]:
        """Everything that documents can be asked."""
        log, split = self._split.interactions, self._split
        domain, user = self._document_domain(shards), self.document_user(shards)
        events = read_events(shards.rows, domain, self._grammar)
        is_example = name.startswith("examples/")
        # A validation example ends with a validation event, after what was known by then.
        allowed = ~split.events(TEST) if name.endswith(f"/{VALIDATION}") else self._train
        properties = [
            check_heads(name, shards.rows, domain, self._grammar),
            *check_documents(
                name,
                events,
                len(shards),
                user,
                log.user[allowed],
                self._title[allowed],
                log.user[~allowed],
                self._title[~allowed],
                per_document=is_example,
                group=(shards.column("kind") == MIXED).astype(int),
            ),
        ]
        if is_example:
            properties.append(check_repeated_targets(name, events, len(shards), user, log.user, self._title))
        if split.spec.method == GLOBAL_TIME and not name.endswith(f"/{VALIDATION}"):
            cut = read_manifest(self._folder)["cuts"][VALIDATION]
            properties.append(check_times(name, events, user, log.user, self._title, log.timestamp, cut))
        if split.spec.unseen_user_share and not name.endswith(f"/{VALIDATION}"):
            unseen = np.unique(log.user[split.events(CONTEXT)])
            properties.append(check_absent(f"{name}: no unseen user", user, unseen, log.user_id))
        if not is_example:
            properties += self._check_unseen_domains(name, events.title, user)
        return properties

    def _check_unseen_domains(self, name: str, titles: np.ndarray, users: np.ndarray) -> list[Property]:
        """No item of an unseen domain, and no user tested in one."""
        log, catalogue = self._split.interactions, self._split.catalogue
        numbers = [catalogue.domains.index(domain) for domain in self._unseen]
        rows = np.flatnonzero(np.isin(catalogue.domain, numbers))
        tested = ~self._train & np.isin(catalogue.domain[log.item], numbers)
        shown = dict(zip(self._title_of_row[rows].tolist(), catalogue.title[rows], strict=True))
        label = ", ".join(self._unseen) or "none"
        return [
            check_absent(f"{name}: no item of an unseen domain ({label})", titles, self._title_of_row[rows], shown),
            check_absent(
                f"{name}: no user tested in an unseen domain ({label})",
                users,
                np.unique(log.user[tested]),
                log.user_id,
            ),
        ]

    def queries(self, domain: str, name: str) -> dict[str, Any]:
        """The queries of this part's users, as rows of the log's users and of the catalogue; -1 where unknown."""
        table = read_queries_of_part(self._folder / "queries" / domain / f"{name}.parquet", self._part)
        table = table.combine_chunks()
        catalogue, lengths = self._split.catalogue, pc.list_value_length(table["history_item"]).to_numpy()
        history = catalogue.rows_of_pairs(
            pc.list_flatten(table["history_domain"]), pc.list_flatten(table["history_item"])
        )
        return {
            "query_id": table["query_id"].to_numpy(),
            "user": self._user_rows(table),
            "target": catalogue.rows_of_pairs(table["domain"], table["target"]),
            "timestamp": table["timestamp"].to_numpy(),
            "history": Ragged(history, offsets_of(lengths)),
        }

    def _document_domain(self, shards: Shards) -> np.ndarray:
        """The index of each document's domain; -1 for mixed ones."""
        names = pa.array(self._split.catalogue.domains, pa.string())
        domain = pc.fill_null(pc.index_in(shards.documents["domain"], names), -1).to_numpy().astype(np.int64)
        return np.where(shards.column("kind") == MIXED, -1, domain)

    def document_user(self, shards: Shards) -> np.ndarray:
        """The row of each document's user; -1 where this part of the log has no such user."""
        return self._user_rows(shards.documents)

    def _user_rows(self, table: pa.Table) -> np.ndarray:
        found = pc.index_in(_keys(table["platform"], table["user_id"]), self._users)
        return np.asarray(pc.fill_null(found, -1).to_numpy().astype(np.int64))


def _keys(platform: Any, user_id: Any) -> Any:
    return pc.binary_join_element_wise(platform, user_id, "\x1f")
