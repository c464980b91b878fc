"""The leakage certificate of a data folder: made from what stands on disk, not from the code that wrote it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.data.catalogue import Catalogue
from cprec.data.dataset import (
    NUM_SLOTS,
    POPULARITY,
    event_files,
    part_path,
    read_catalogue,
    read_manifest,
    read_split,
    slot_of,
    with_microsecond,
)
from cprec.data.interactions import join_time
from cprec.data.leakage import (
    MAX_EXAMPLES,
    Grammar,
    Labels,
    Observation,
    Property,
    add_up,
    check_absent,
    check_documents,
    check_examples,
    check_heads,
    check_queries,
    check_repeated_targets,
    check_times,
    check_users,
    find_near_duplicates,
    find_ties,
    read_events,
)
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import GLOBAL_TIME, Split, SplitSpec, format_time, from_seconds, make_split
from cprec.errors import ConfigError, DataError, ShardError
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, file_sha256, read_resolved
from cprec.schema import CONTEXT, MIXED, SPLITS, TEST, TRAIN, VALIDATION
from cprec.text.config import Template
from cprec.text.documents import ROW_GROUPS, read_queries_of_part
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import DOCUMENTS, DTYPES, TOKENS, Shards, read_piece, read_shard_manifest
from cprec.text.tokenizer import TINY, beginning_of, load_tokenizer, train_on_titles
from cprec.text.workers import num_workers, run_parts

CERTIFICATE = "certificate.json"

_WORK, _READABLE = ".audit", "readable.json"
"""Folder inside the data folder for what the parts share and count while they are audited, and a file in it: the
shards, examples and queries that can be read."""


def audit(folder: str | Path, workers: int | None = None) -> dict[str, Any]:
    """Check what stands in a data folder, write `certificate.json` and return it.

    Everything is read back from disk: the canonical tables and their split, and the tokens of every shard and example.
    `clean` means that no property is violated; observations are counts that a reader should know and that prove no
    leak. Files that differ from those of the last clean certificate are a violation, until they are as they were.

    `folder` may be the folder of a run, whose data folder is `data`. Raises ConfigError for any other.
    """
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        if not (folder / "data" / "dataset.json").is_file():
            raise ConfigError(f"{folder} is no data folder: give one that `cprec prepare` wrote")
        folder /= "data"
    recorded = read_resolved(folder)["config"]
    manifest = read_manifest(folder)
    files = _hashes(folder)
    structure, readable = _check_structure(folder, recorded, manifest)
    properties = [_check_unchanged(folder, files), structure]
    observations: list[Observation] = []
    digest, fault = None, []
    work = folder / _WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        (work / _READABLE).write_text(json.dumps(readable))
        catalogue = read_catalogue(folder)
        digest = catalogue.digest()
        properties.append(_check_hashes(folder, readable, files, digest))
        _encoder(folder, catalogue, recorded).save(work)
        found = run_parts(
            f"{__name__}:audit_part", folder, range(manifest["num_parts"]), num_workers(workers), "auditing"
        )
        properties += add_up([[Property(**entry) for entry in part["properties"]] for part in found])
        observations += add_up([[Observation(**entry) for entry in part["observations"]] for part in found])
        properties.append(_check_cuts(recorded, manifest, np.sum([part["times"] for part in found], axis=0)))
        properties.append(_check_popularity(folder, catalogue, sorted(work.glob("part-*.npy"))))
        properties += _check_tokenizer(folder, catalogue, recorded)
        observations += [
            find_near_duplicates(catalogue, domain, _pretrained(recorded, catalogue))
            for domain in recorded["target_domains"]
        ]
    except (DataError, ShardError) as error:
        fault.append(str(error))
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _open.cache_clear()
    properties.append(
        Property(name="tables: they can be read as they stand", checked=1, violations=len(fault), examples=fault)
    )
    certificate = {
        "clean": all(p.violations == 0 for p in properties),
        "split": manifest.get("split"),
        "cuts": manifest.get("cuts"),
        "properties": [p.to_dict() for p in properties],
        "observations": [o.to_dict() for o in observations],
        "artifacts": {
            name: _identity(folder / name) for name in _shard_names(recorded, examples=(TRAIN,)) if name in readable
        },
        "queries": {
            name.removeprefix("queries/").removesuffix(".parquet"): files[name]
            for name in _query_names(recorded)
            if name in readable
        },
        "events": {name: files[name] for name in event_files(folder)},
        "catalogue_sha256": digest,
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
    for o in filter(lambda o: o.found, observations):
        say(f"  noted: {o.name}: {o.found:,} of {o.checked:,}")
    return certificate


def violated(certificate: dict[str, Any]) -> list[str]:
    """A line for every violated property of a certificate: how often, among how many, and examples."""
    return [
        f"{p['name']}: {p['violations']:,} of {p['checked']:,}"
        + (f", as {'; '.join(p['examples'])}" if p["examples"] else "")
        for p in certificate["properties"]
        if p["violations"]
    ]


# ---- files -----------------------------------------------------------------------------------------------------------


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the certificate speaks of, by its path in the folder.

    Candidates, which an evaluation draws and freezes beside the queries, are its own.
    """
    kinds = (CONFIG_FILE, "dataset.json", POPULARITY, "rejected.parquet")
    folders = ("items", "interactions", "tokenizer", "shards", "examples", "queries")
    paths = [folder / name for name in kinds if (folder / name).is_file()]
    paths += [path for name in folders for path in sorted((folder / name).rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: file_sha256(path)
        for name, path in names.items()
        if not (name.startswith("queries/") and path.name.startswith("candidates"))
    }


def _certified_files(folder: Path) -> dict[str, str]:
    """The files of the latest clean certificate; none where there was none."""
    try:
        earlier = json.loads((folder / CERTIFICATE).read_text())
    except (OSError, ValueError):
        return {}
    files: dict[str, str] = earlier.get("files", {}) if earlier.get("clean") else earlier.get("certified_files", {})
    return files


def _check_unchanged(folder: Path, files: dict[str, str]) -> Property:
    earlier = _certified_files(folder)
    changed = sorted(name for name in earlier.keys() | files.keys() if earlier and earlier.get(name) != files.get(name))
    return Property(
        name="files: none was changed, added or removed after it was certified",
        checked=len(earlier),
        violations=len(changed),
        examples=changed[:MAX_EXAMPLES],
    )


def _check_hashes(folder: Path, readable: Sequence[str], files: dict[str, str], catalogue_digest: str) -> Property:
    """What a shard manifest says of its own files, and of the catalogue and the tokenizer that it was made with."""
    wrong, checked = [], 0
    for name in readable:
        if name.startswith("queries/"):
            continue
        manifest = read_shard_manifest(folder / name)
        found = {f"{name}/{part}": (manifest["sha256"][part], files.get(f"{name}/{part}")) for part in _SHARD_FILES}
        about = manifest.get("about", {})
        found[f"{name}: the catalogue"] = (about.get("catalogue_sha256"), catalogue_digest)
        found[f"{name}: the tokenizer"] = (about.get("tokenizer_sha256"), files.get("tokenizer/tokenizer.json"))
        checked += len(found)
        wrong += [what for what, (expected, actual) in found.items() if expected != actual]
    return Property(
        name="shards, examples: every file, the catalogue and the tokenizer have the hash that the manifest gives",
        checked=checked,
        violations=len(wrong),
        examples=wrong[:MAX_EXAMPLES],
    )


_SHARD_FILES = (TOKENS, DOCUMENTS)
_DOCUMENT_COLUMNS = {"offset", "length", "domain", "kind", "num_events", "platform", "user_id", "target_start"}
_QUERY_COLUMNS = {"query_id", "platform", "user_id", "domain", "history_domain", "history_item", "target", "timestamp"}


def _check_structure(folder: Path, recorded: dict[str, Any], manifest: dict[str, Any]) -> tuple[Property, list[str]]:
    """Every file is whole, and each of its rows belongs to a part, so that none escapes the audit of the parts.

    Returns with it the names of the shards, examples and queries that can be read.
    """
    parts = range(manifest["num_parts"])
    problems = {name: _shard_problem(folder / name, parts) for name in _shard_names(recorded)}
    problems |= {name: _queries_problem(folder / name, parts) for name in _query_names(recorded)}
    readable = [name for name, problem in problems.items() if problem is None]
    for domain, about in manifest["domains"].items():
        problems[f"interactions/domain={domain}"] = _interactions_problem(folder, domain, about["num_events"], parts)
    wrong = [f"{name}: {problem}" for name, problem in problems.items() if problem is not None]
    return (
        Property(
            name="files: each is whole, and all its rows belong to the parts that are checked",
            checked=len(problems),
            violations=len(wrong),
            examples=wrong[:MAX_EXAMPLES],
        ),
        readable,
    )


def _explained(check: Callable[..., str | None]) -> Callable[..., str | None]:
    """What a check says, or why it could not be made."""

    @functools.wraps(check)
    def checked(*arguments: Any) -> str | None:
        try:
            return check(*arguments)
        except (OSError, pa.ArrowInvalid, ShardError) as error:
            return str(error)

    return checked


@_explained
def _shard_problem(folder: Path, parts: range) -> str | None:
    manifest = read_shard_manifest(folder)
    pieces = manifest["pieces"]
    size, expected = (folder / TOKENS).stat().st_size, manifest["num_tokens"] * DTYPES[manifest["dtype"]].itemsize
    if size != expected:
        return f"{TOKENS} has {size:,} bytes and not {expected:,}: it was cut or changed"
    for name in ("num_tokens", "num_documents"):
        if sum(piece[name] for piece in pieces) != manifest[name]:
            return f"the pieces have not {name}={manifest[name]:,} together"
    if strangers := sorted({piece["part"] for piece in pieces} - set(parts)):
        return f"pieces of part {strangers[0]}, but there are {len(parts)} parts"
    index = pq.ParquetFile(folder / DOCUMENTS)
    if missing := sorted(_DOCUMENT_COLUMNS - set(index.schema_arrow.names)):
        return f"{DOCUMENTS} has no column {missing[0]}"
    sizes = [index.metadata.row_group(number).num_rows for number in range(index.num_row_groups)]
    if sizes != [piece["num_documents"] for piece in pieces]:
        return f"the row groups of {DOCUMENTS} are not the pieces of the manifest"
    return None


@_explained
def _queries_problem(path: Path, parts: range) -> str | None:
    file = pq.ParquetFile(path)
    if missing := sorted(_QUERY_COLUMNS - set(file.schema_arrow.names)):
        return f"no column {missing[0]}"
    numbers = json.loads((file.schema_arrow.metadata or {}).get(ROW_GROUPS, b"null"))
    if not isinstance(numbers, list) or len(numbers) != file.num_row_groups or not set(numbers) <= set(parts):
        return "it does not say which part its rows are from: it was changed"
    return None


@_explained
def _interactions_problem(folder: Path, domain: str, num_events: int, parts: range) -> str | None:
    paths = [part_path(folder, "interactions", domain, part) for part in parts]
    found = sum(pq.read_metadata(path).num_rows for path in paths if path.exists())
    return None if found == num_events else f"{found:,} events, but dataset.json says {num_events:,}"


def _shard_names(recorded: dict[str, Any], examples: Sequence[str] = (TRAIN, VALIDATION)) -> Iterator[str]:
    yield from ("shards/train", "shards/heldout")
    for domain in recorded["target_domains"]:
        yield from (f"examples/{domain}/{part}" for part in examples)


def _query_names(recorded: dict[str, Any]) -> Iterator[str]:
    for domain in recorded["target_domains"]:
        yield from (f"queries/{domain}/{part}.parquet" for part in (VALIDATION, TEST))


def _identity(folder: Path) -> str:
    return Shards(np.empty(0), pa.table({}), read_shard_manifest(folder)).sha256


# ---- what all users together give ------------------------------------------------------------------------------------


def _check_cuts(recorded: dict[str, Any], manifest: dict[str, Any], times: np.ndarray) -> Property:
    """The split is the one that the settings ask for. `times`: see `_count_times`."""
    cuts = _cuts(manifest)
    spec, problems, checked = SplitSpec(**recorded["split"]), [], 1
    if manifest["split"] != recorded["split"]:
        problems.append(f"dataset.json has {manifest['split']}, {CONFIG_FILE} {recorded['split']}")
    if spec.method == GLOBAL_TIME and cuts:
        total, *around = times.tolist()
        validation, test = spec.fractions()
        shares = {VALIDATION: 1 - validation - test, TEST: 1 - test}
        for number, name in enumerate((VALIDATION, TEST)):
            checked += 1
            cut, (below, upto) = cuts[name], around[2 * number : 2 * number + 2]
            if spec.test_from is not None:
                right = cut == spec.dates()[number]
            else:
                right = below <= int(total * shares[name]) < upto
            if not right:
                problems.append(f"{name} from {format_time(cut)}, before which there are {below:,} of {total:,} events")
    return Property(
        name="split: it is the one of the settings, and its cuts lie where they say",
        checked=checked,
        violations=len(problems),
        examples=problems,
    )


def _cuts(manifest: dict[str, Any]) -> dict[str, int] | None:
    """The cuts that dataset.json has, in microseconds; None where there are none."""
    cuts = manifest.get("cuts")
    return {name: from_seconds(seconds) for name, seconds in cuts.items()} if cuts else None


def _count_times(split: Split, cuts: dict[str, int] | None) -> list[int]:
    """How many events there are; with cuts also before and up to the one of validation, before and up to that of
    test."""
    time = split.interactions.time
    moments = [cuts[VALIDATION], cuts[VALIDATION] + 1, cuts[TEST], cuts[TEST] + 1] if cuts else []
    return [len(time), *(int((time < moment).sum()) for moment in moments)]


def _check_popularity(folder: Path, catalogue: Catalogue, counted: Sequence[Path]) -> Property:
    """The table of popularity counts training events and no others."""
    expected = sum((np.load(path) for path in counted), np.zeros(len(catalogue), dtype=np.int64))
    names = np.array(catalogue.domains, dtype=object)[catalogue.domain]
    found = np.full(len(expected), -1)
    try:
        table = pq.read_table(folder / POPULARITY)
        ids = {"item_id": pa.array(catalogue.item_id, pa.string()), "domain": pa.array(names, pa.string())}
        if table.select(list(ids)).equals(pa.table(ids)):
            found = table["num_events"].to_numpy()
    except (OSError, pa.ArrowInvalid, KeyError):
        pass  # no item has a number
    wrong = np.flatnonzero(found != expected)
    return Property(
        name="popularity: every item has the number of its training events",
        checked=len(expected),
        violations=len(wrong),
        examples=[
            f"{names[row]}/{catalogue.item_id[row]}: {found[row]} counted, {expected[row]} train"
            for row in wrong[:MAX_EXAMPLES]
        ],
    )


def _check_tokenizer(folder: Path, catalogue: Catalogue, recorded: dict[str, Any]) -> list[Property]:
    """A tokenizer that was trained here is the one that the titles of the pre-training domains alone give."""
    if recorded["tokenizer"] != TINY:
        return []
    again = train_on_titles(
        catalogue, _pretrained(recorded, catalogue), recorded["vocabulary_size"], _template(recorded)
    )
    expected = json.loads(again.backend_tokenizer.to_str())
    written = json.loads(load_tokenizer(str(folder / "tokenizer")).backend_tokenizer.to_str())
    vocabulary, known = written["model"].pop("vocab"), expected["model"].pop("vocab")
    other = sorted(vocabulary.keys() - known.keys())
    if not other and vocabulary != known:
        other = sorted(token for token in known if vocabulary.get(token) != known[token])
    other += [f"its {name}" for name in expected if written.get(name) != expected[name]]
    return [
        Property(
            name="tokenizer: trained on titles of the pre-training domains again, it comes out the same",
            checked=len(vocabulary),
            violations=len(other),
            examples=other[:MAX_EXAMPLES],
        )
    ]


def _pretrained(recorded: dict[str, Any], catalogue: Catalogue) -> tuple[str, ...]:
    return tuple(recorded["pretrain_domains"]) or catalogue.domains


# ---- parts -----------------------------------------------------------------------------------------------------------


def _encoder(folder: Path, catalogue: Catalogue, recorded: dict[str, Any]) -> PromptEncoder:
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return PromptEncoder(
        tokenizer,
        catalogue,
        max_title_tokens=recorded["max_title_tokens"],
        template=_template(recorded),
        begin=beginning_of(tokenizer, recorded.get("add_bos_token", "false")),  # older folders have no such setting
    )


def _template(recorded: dict[str, Any]) -> Template:
    return Template(item_fields=recorded["item_fields"])


@functools.lru_cache(maxsize=1)
def _open(folder: Path) -> tuple[Catalogue, Grammar]:
    """What all parts need."""
    catalogue = read_catalogue(folder)
    encoder = PromptEncoder.load(folder / _WORK, catalogue)
    return catalogue, Grammar(
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
    catalogue, grammar = _open(folder)
    recorded = read_resolved(folder)["config"]
    manifest = read_manifest(folder)
    readable = json.loads((folder / _WORK / _READABLE).read_text())
    split = read_split(folder, part, catalogue)
    np.save(folder / _WORK / f"part-{part}.npy", np.bincount(split.train.item, minlength=len(catalogue)))
    auditor = _Auditor(folder, part, split, grammar, recorded, manifest)
    properties = [auditor.check_parts(manifest["num_parts"]), auditor.check_split()]
    users: dict[str, np.ndarray] = {}
    for name in filter(readable.__contains__, _shard_names(recorded)):
        found, users[name] = auditor.check(name)
        properties += found
    if {"shards/train", "shards/heldout"} <= users.keys():
        trained = np.unique(users["shards/train"])
        properties.append(
            check_absent("shards/heldout: no user of shards/train", users["shards/heldout"], trained, auditor.users)
        )
    observations: list[Observation] = []
    for domain in recorded["target_domains"]:
        for name in (VALIDATION, TEST):
            if f"queries/{domain}/{name}.parquet" in readable:
                properties.append(check_queries(split, domain, name, auditor.queries(domain, name)))
            observations += find_ties(split, domain, name, manifest["rules"]["tie_order"])
    return {
        "properties": [p.to_dict() for p in properties],
        "observations": [o.to_dict() for o in observations],
        "times": _count_times(split, _cuts(manifest)),
    }


class _Auditor:
    """Holds one part of the log while its shards, examples and queries are checked one after the other."""

    def __init__(
        self,
        folder: Path,
        part: int,
        split: Split,
        grammar: Grammar,
        recorded: dict[str, Any],
        manifest: dict[str, Any],
    ) -> None:
        log, catalogue = split.interactions, split.catalogue
        self._folder, self._part, self._split, self._grammar = folder, part, split, grammar
        self._seed, self._cuts = recorded["seed"], _cuts(manifest)
        platforms = pa.array(log.platforms, pa.string()).take(pa.array(log.user_platform))
        self._user_keys = _keys(platforms, pa.array(log.user_id, pa.string()))
        self.users = _named(platforms, pa.array(log.user_id, pa.string()))
        """What examples call each user of the log."""
        self._title_of_row = grammar.title_of_row
        self._title = self._title_of_row[log.item]
        self._train = split.events(TRAIN)
        seen = _pretrained(recorded, catalogue)
        self._other = [domain for domain in catalogue.domains if domain not in seen]
        self._unseen = [domain for domain in recorded["target_domains"] if domain not in seen]

    def check_parts(self, num_parts: int) -> Property:
        """No user is in two parts: the parts are audited each by itself."""
        log = self._split.interactions
        names = zip((log.platforms[number] for number in log.user_platform), log.user_id, strict=True)
        slots = np.array([slot_of(platform, user) for platform, user in names], dtype=np.int64)
        wrong = np.flatnonzero(slots // (NUM_SLOTS // num_parts) != self._part)
        return Property(
            name="interactions: every user stands in the part of the hash",
            checked=len(slots),
            violations=len(wrong),
            examples=self.users[wrong[:MAX_EXAMPLES]].tolist(),
        )

    def check_split(self) -> Property:
        """The split in the tables is what its parameters say."""
        split, log = self._split, self._split.interactions
        cuts = (self._cuts[VALIDATION], self._cuts[TEST]) if self._cuts else None
        again = make_split(split.catalogue, log, split.domains, split.spec, cuts=cuts, seed=self._seed)
        wrong = np.flatnonzero(again.part != split.part)
        examples = []
        for event in wrong[:MAX_EXAMPLES]:
            is_, should = SPLITS[split.part[event]], SPLITS[again.part[event]]
            title = self._name_of_title(int(self._title[event]))
            examples.append(f"{title} of {self.users[log.user[event]]} is {is_} and should be {should}")
        return Property(
            name=f"interactions: the split is what {split.spec.method} makes of them",
            checked=len(log),
            violations=len(wrong),
            examples=examples,
        )

    def check(self, name: str) -> tuple[list[Property], np.ndarray]:
        """Everything that the documents of a shard folder can be asked; and each document's user.

        The user is -1 where this part of the log has none such.
        """
        log, split = self._split.interactions, self._split
        laid_out, shards, numbers = self._read(name)
        if laid_out.violations:
            return [laid_out], np.empty(0, dtype=np.int64)
        labels = self._labels(shards, numbers)
        domain, user = self._document_domain(shards), self._user_rows(shards.documents)
        documents, size = shards.rows, len(shards)
        events = read_events(documents, domain, self._grammar)
        is_example, validates = name.startswith("examples/"), name.endswith(f"/{VALIDATION}")
        # A validation example ends with a validation event, after what was known by then.
        allowed = ~split.events(TEST) if validates else self._train
        properties = [
            laid_out,
            check_heads(name, documents, domain, self._grammar, labels),
            check_users(name, user, labels),
            *check_documents(
                name,
                events,
                size,
                user,
                log.user[allowed],
                self._title[allowed],
                log.user[~allowed],
                self._title[~allowed],
                per_document=is_example,
                group=(shards.column("kind") == MIXED).astype(int),
                labels=labels,
            ),
        ]
        if is_example:
            in_log = (log.user, self._title)
            asked = split.events(VALIDATION) if validates else self._train
            asked = asked & (split.catalogue.domain[log.item] == split.catalogue.domain_index(name.split("/")[1]))
            properties += [
                check_repeated_targets(name, events, size, user, *in_log, labels),
                check_examples(name, events, size, user, *in_log, asked=asked, shown=allowed, labels=labels),
            ]
        if self._cuts:
            cut = self._cuts[TEST if validates else VALIDATION]
            properties.append(check_times(name, events, user, log.user, self._title, log.time, cut, labels))
        if split.spec.unseen_user_share and not validates:
            unseen = np.unique(log.user[split.events(CONTEXT)])
            properties.append(check_absent(f"{name}: no unseen user", user, unseen, self.users))
        if not is_example:
            properties += self._check_unseen_domains(name, events.title, user)
        return properties, user

    def _check_unseen_domains(self, name: str, titles: np.ndarray, users: np.ndarray) -> list[Property]:
        """No item of a domain that is not pre-trained on, and no user tested in one."""
        log, catalogue = self._split.interactions, self._split.catalogue
        rows = np.flatnonzero(np.isin(catalogue.domain, [catalogue.domain_index(d) for d in self._other]))
        unseen = [catalogue.domain_index(domain) for domain in self._unseen]
        tested = ~self._train & np.isin(catalogue.domain[log.item], unseen)
        shown = dict(zip(self._title_of_row[rows].tolist(), rows.tolist(), strict=True))
        absent = np.fromiter(shown.keys(), dtype=np.int64)
        label, unseen_label = (", ".join(names) or "none" for names in (self._other, self._unseen))
        named = {title: self._name_of_item(shown[title]) for title in np.intersect1d(titles, absent).tolist()}
        return [
            check_absent(f"{name}: no item of a domain that is not pre-trained on ({label})", titles, absent, named),
            check_absent(
                f"{name}: no user tested in an unseen domain ({unseen_label})",
                users,
                np.unique(log.user[tested]),
                self.users,
            ),
        ]

    def queries(self, domain: str, name: str) -> dict[str, Any]:
        """The queries of this part's users, as rows of the log's users and of the catalogue; -1 where unknown."""
        table = read_queries_of_part(self._folder / "queries" / domain / f"{name}.parquet", self._part)
        table = with_microsecond(table).combine_chunks()
        catalogue, lengths = self._split.catalogue, pc.list_value_length(table["history_item"]).to_numpy()
        history = catalogue.rows_of_pairs(
            pc.list_flatten(table["history_domain"]), pc.list_flatten(table["history_item"])
        )
        return {
            "query_id": table["query_id"].to_numpy(),
            "user": self._user_rows(table),
            "target": catalogue.rows_of_pairs(table["domain"], table["target"]),
            "time": join_time(
                table["timestamp"].to_numpy(), table["microsecond"].to_numpy(), self._split.domains[domain].has_times
            ),
            "history": Ragged(history, offsets_of(lengths)),
        }

    def _read(self, name: str) -> tuple[Property, Shards, np.ndarray]:
        """The documents of this part in a shard folder, with the row of each in the folder's index."""
        folder = self._folder / name
        manifest = read_shard_manifest(folder)
        starts = np.cumsum([0, *(piece["num_documents"] for piece in manifest["pieces"])])
        pieces, numbers, wrong = [], [np.empty(0, dtype=np.int64)], []
        for place, listed in enumerate(manifest["pieces"]):
            if listed["part"] != self._part:
                continue
            piece = read_piece(folder, manifest, place)
            lengths = piece.column("length")
            laid_out = (
                (piece.column("offset") == offsets_of(lengths)[:-1]).all()
                and (lengths >= 0).all()
                and lengths.sum() == listed["num_tokens"]
                and pc.all(pc.equal(piece.documents["domain"], listed["domain"])).as_py() is not False
                and pc.all(pc.equal(piece.documents["kind"], listed["kind"])).as_py() is not False
            )
            if not laid_out:
                wrong.append(f"{listed['kind']} documents from {starts[place]} on")
            pieces.append(piece)
            numbers.append(np.arange(starts[place], starts[place + 1]))
        found = Property(
            name=f"{name}: documents follow one another and are of the domain and kind of their piece",
            checked=len(pieces),
            violations=len(wrong),
            examples=wrong[:MAX_EXAMPLES],
        )
        return found, Shards.concatenate([] if wrong else pieces, manifest), np.concatenate(numbers)

    def _labels(self, shards: Shards, numbers: np.ndarray) -> Labels:
        def document(number: int) -> str:
            row = shards.documents.slice(number, 1).to_pylist()[0]
            return f"document {numbers[number]} of {row['platform']}/{row['user_id']}"

        return Labels(document, lambda user, title: self._name_of_title(title))

    def _name_of_title(self, number: int) -> str:
        return self._name_of_item(int(np.argmax(self._title_of_row == number)))

    def _name_of_item(self, row: int) -> str:
        catalogue = self._split.catalogue
        return f"'{catalogue.title[row]}' ({catalogue.domains[catalogue.domain[row]]})"

    def _document_domain(self, shards: Shards) -> np.ndarray:
        """The index of each document's domain; -1 for mixed ones."""
        names = pa.array(self._split.catalogue.domains, pa.string())
        domain = pc.fill_null(pc.index_in(shards.documents["domain"], names), -1).to_numpy().astype(np.int64)
        return np.where(shards.column("kind") == MIXED, -1, domain)

    def _user_rows(self, table: pa.Table) -> np.ndarray:
        found = pc.index_in(_keys(table["platform"], table["user_id"]), self._user_keys)
        return np.asarray(pc.fill_null(found, -1).to_numpy().astype(np.int64))


def _keys(platform: Any, user_id: Any) -> Any:
    return pc.binary_join_element_wise(platform, user_id, "\x1f")


def _named(platform: Any, user_id: Any) -> np.ndarray:
    return np.asarray(pc.binary_join_element_wise(platform, user_id, "/").to_numpy(zero_copy_only=False), dtype=object)
