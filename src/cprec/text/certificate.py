"""The leakage certificate of a data folder: made from the files on disk, without the code that wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.catalogue import Catalogue
from cprec.data.config import GLOBAL_TIME, SplitSpec
from cprec.data.dataset import POPULARITY, data_folder, part_path, read_catalogue
from cprec.data.leakage import Observation, Property, add_up, find_near_duplicates
from cprec.data.splits import format_time
from cprec.errors import DataError, ShardError
from cprec.files import write_whole
from cprec.progress import say
from cprec.provenance import CONFIG_FILE, file_sha256
from cprec.schema import TEST, TRAIN, VALIDATION
from cprec.text.audit_part import AUDIT_FOLDER, READABLE, Prepared, open_grammar, property_of
from cprec.text.config import PLAIN, TINY
from cprec.text.documents import QUERY_COLUMNS, ROW_GROUPS, WHOLE, query_names, shard_names
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import DOCUMENTS, DTYPES, INDEX, TOKENS, manifest_sha256, read_shard_manifest
from cprec.text.tokenizer import beginning_of, load_tokenizer, train_on_titles
from cprec.workers import num_workers, run_parts

CERTIFICATE = "certificate.json"


def audit(folder: str | Path, workers: int | None = None) -> dict[str, Any]:
    """Check the files of a data folder, write `certificate.json` and return its content.

    Everything is read back from disk: the canonical tables and their split, and the tokens of every shard and example.
    `clean` means that no property is violated; observations are counts that a reader should know, but that prove no
    leak. Files that differ from those of the last clean certificate are a violation until they are restored.

    `folder` may be the folder of a run, whose data folder is `data`. Raises ConfigError for any other.
    """
    data = Prepared.read(data_folder(folder))
    files = _file_hashes(data.folder)
    structure, readable = _check_structure(data)
    findings: list[Property | Observation] = [_check_unchanged(data.folder, files), structure]
    catalogue_sha256, unreadable = None, []
    try:
        catalogue = read_catalogue(data.folder)
        catalogue_sha256 = catalogue.digest()
        findings.append(_check_hashes(data.folder, readable, files, catalogue_sha256))
        for finding in _check_contents(data, catalogue, readable, num_workers(workers)):
            findings.append(finding)
    except (DataError, ShardError) as error:
        unreadable.append(str(error))
    findings.append(property_of("tables: they can be read as they stand", 1, unreadable))
    properties = [finding for finding in findings if isinstance(finding, Property)]
    observations = [finding for finding in findings if isinstance(finding, Observation)]
    certificate = _certificate(data, properties, observations, readable, files, catalogue_sha256)
    write_whole(data.folder / CERTIFICATE, json.dumps(certificate, indent=1) + "\n")
    num_checks, num_wrong = sum(p.checked for p in properties), sum(p.violations for p in properties)
    say(f"certificate: {len(properties)} properties, {num_checks:,} checks, {num_wrong:,} violations")
    for o in observations:
        if o.found:
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


def _certificate(
    data: Prepared,
    properties: Sequence[Property],
    observations: Sequence[Observation],
    readable: Sequence[str],
    files: dict[str, str],
    catalogue_sha256: str | None,
) -> dict[str, Any]:
    """What `certificate.json` holds.

    `artifacts` are the shards that a model may be trained on (the manifest of a folder stands for all of it), `queries`
    the questions that an evaluation may ask; `files` has the tables that a baseline may learn from, among all others.
    """
    folder, domains = data.folder, data.target_domains
    certificate = {
        "clean": all(p.violations == 0 for p in properties),
        "split": data.manifest.get("split"),
        "cuts": data.manifest.get("cuts"),
        "properties": [asdict(p) for p in properties],
        "observations": [asdict(o) for o in observations],
        "artifacts": {
            name: manifest_sha256(read_shard_manifest(folder / name))
            for name in shard_names(domains, examples=(TRAIN, WHOLE))
            if name in readable
        },
        "queries": {
            name.removeprefix("queries/").removesuffix(".parquet"): files[name]
            for name in query_names(domains)
            if name in readable
        },
        "catalogue_sha256": catalogue_sha256,
        "files": files,
    }
    if not certificate["clean"] and (earlier := _certified_files(folder)):
        certificate["certified_files"] = earlier
    return certificate


# ---- files -----------------------------------------------------------------------------------------------------------


def _file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that the certificate speaks of, by its path in the folder.

    Candidates are not among them: an evaluation draws them and freezes them beside the queries.
    """
    paths = [folder / name for name in (CONFIG_FILE, "dataset.json", POPULARITY, "rejected.parquet")]
    for name in ("items", "interactions", "tokenizer", "shards", "examples", "queries"):
        found = sorted((folder / name).rglob("*"))
        paths += [path for path in found if not (name == "queries" and path.name.startswith("candidates"))]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths if path.is_file()}


def _certified_files(folder: Path) -> dict[str, str]:
    """The files of the latest clean certificate; none where there was none."""
    try:
        earlier = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(earlier.get("files" if earlier.get("clean") else "certified_files", {}))


def _check_unchanged(folder: Path, files: dict[str, str]) -> Property:
    earlier = _certified_files(folder)
    changed = sorted({name for name, _ in earlier.items() ^ files.items()}) if earlier else []
    return property_of("files: none was changed, added or removed after it was certified", len(earlier), changed)


def _check_hashes(folder: Path, readable: Sequence[str], files: dict[str, str], catalogue_sha256: str) -> Property:
    """Shard manifests have the true hashes of their own files, of the catalogue and of the tokenizer."""
    found: dict[str, tuple[str | None, str | None]] = {}
    for name in readable:
        if not name.startswith("queries/"):
            manifest = read_shard_manifest(folder / name)
            about = manifest.get("about", {})
            for file in (TOKENS, DOCUMENTS):
                found[f"{name}/{file}"] = (manifest["sha256"][file], files.get(f"{name}/{file}"))
            found[f"{name}: the catalogue"] = (about.get("catalogue_sha256"), catalogue_sha256)
            found[f"{name}: the tokenizer"] = (about.get("tokenizer_sha256"), files.get("tokenizer/tokenizer.json"))
    wrong = [name for name, (expected, actual) in found.items() if expected != actual]
    what = "every file, the catalogue and the tokenizer have the hash that the manifest gives"
    return property_of(f"shards, examples: {what}", len(found), wrong)


def _check_structure(data: Prepared) -> tuple[Property, list[str]]:
    """Every file is whole, and each of its rows belongs to a part, so that none escapes the audit of the parts.

    Returns with it the names of the shards, examples and queries that can be read.
    """
    folder, parts = data.folder, range(data.manifest["num_parts"])
    problems = {name: _problem(_check_shards, folder / name, parts) for name in data.shard_names}
    problems |= {name: _problem(_check_queries, folder / name, parts) for name in query_names(data.target_domains)}
    readable = [name for name, problem in problems.items() if problem is None]
    for domain, about in data.manifest["domains"].items():
        name = f"interactions/domain={domain}"
        problems[name] = _problem(_check_interactions, folder, domain, about["num_events"], parts)
    wrong = [f"{name}: {problem}" for name, problem in problems.items() if problem is not None]
    what = "files: each is whole, and all its rows belong to the parts that are checked"
    return property_of(what, len(problems), wrong), readable


def _problem(check: Callable[..., str | None], *arguments: Any) -> str | None:
    """What a check finds wrong, or why it could not be made; None where all is well."""
    try:
        return check(*arguments)
    except (OSError, pa.ArrowInvalid, ShardError) as error:
        return str(error)


def _check_shards(folder: Path, parts: range) -> str | None:
    manifest = read_shard_manifest(folder)
    pieces = manifest["pieces"]
    size, expected = (folder / TOKENS).stat().st_size, manifest["num_tokens"] * DTYPES[manifest["dtype"]].itemsize
    if size != expected:
        return f"{TOKENS} has {size:,} bytes and not {expected:,}: it was cut or changed"
    for name in ("num_tokens", "num_documents"):
        if sum(piece[name] for piece in pieces) != manifest[name]:
            return f"the pieces do not add up to {name}={manifest[name]:,}"
    if unknown := sorted({piece["part"] for piece in pieces} - set(parts)):
        return f"pieces of part {unknown[0]}, but there are {len(parts)} parts"
    index = pq.ParquetFile(folder / DOCUMENTS)
    if missing := sorted(INDEX.keys() - set(index.schema_arrow.names)):
        return f"{DOCUMENTS} has no column {missing[0]}"
    sizes = [index.metadata.row_group(number).num_rows for number in range(index.num_row_groups)]
    if sizes != [piece["num_documents"] for piece in pieces]:
        return f"the row groups of {DOCUMENTS} are not the pieces of the manifest"
    return None


def _check_queries(path: Path, parts: range) -> str | None:
    file = pq.ParquetFile(path)
    if missing := sorted(QUERY_COLUMNS - set(file.schema_arrow.names)):
        return f"no column {missing[0]}"
    numbers = json.loads((file.schema_arrow.metadata or {}).get(ROW_GROUPS, b"null"))
    if not isinstance(numbers, list) or len(numbers) != file.num_row_groups or not set(numbers) <= set(parts):
        return "it does not say which part its rows are from: it was changed"
    return None


def _check_interactions(folder: Path, domain: str, num_events: int, parts: range) -> str | None:
    paths = [part_path(folder, "interactions", domain, part) for part in parts]
    found = sum(pq.read_metadata(path).num_rows for path in paths if path.exists())
    return None if found == num_events else f"{found:,} events, but dataset.json says {num_events:,}"


# ---- contents --------------------------------------------------------------------------------------------------------


def _check_contents(
    data: Prepared, catalogue: Catalogue, readable: Sequence[str], workers: int
) -> Iterator[Property | Observation]:
    """The findings of the parts, added up, and then those that need all users together."""
    work, parts = data.folder / AUDIT_FOLDER, range(data.manifest["num_parts"])
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        (work / READABLE).write_text(json.dumps(readable), encoding="utf-8")
        tokenizer = load_tokenizer(str(data.folder / "tokenizer"))
        begin = beginning_of(tokenizer, data.settings.get("add_bos_token", "false"))  # older folders have none
        most = data.settings["max_title_tokens"]
        cut = data.settings.get("title_cut", PLAIN)  # older folders have none
        PromptEncoder(
            tokenizer, catalogue, max_title_tokens=most, title_cut=cut, template=data.template, begin=begin
        ).save(work)
        found = run_parts("cprec.text.audit_part:audit_part", data.folder, parts, workers, "auditing")
        counts = [np.load(path) for path in sorted(work.glob("part-*.npy"))]
    finally:
        shutil.rmtree(work, ignore_errors=True)
        open_grammar.cache_clear()
    yield from add_up([[Property(**entry) for entry in part["properties"]] for part in found])
    yield from add_up([[Observation(**entry) for entry in part["observations"]] for part in found])
    yield _check_cuts(data, np.sum([part["times"] for part in found], axis=0))
    yield _check_popularity(data.folder, catalogue, sum(counts, np.zeros(len(catalogue), dtype=np.int64)))
    if data.settings["tokenizer"] == TINY:
        yield _check_tokenizer(data, catalogue)
    for domain in data.target_domains:
        yield find_near_duplicates(catalogue, domain, data.pretrain_domains(catalogue))


def _check_cuts(data: Prepared, times: np.ndarray) -> Property:
    """The split is the one that the settings ask for.

    `times` has the number of events; with cuts also those before and up to the validation cut, then the test cut.
    """
    cuts, recorded, written = data.cuts, data.settings["split"], data.manifest["split"]
    spec, problems, checked = SplitSpec(**recorded), [], 1
    if written != recorded:
        problems.append(f"dataset.json has {written}, {CONFIG_FILE} {recorded}")
    if spec.method == GLOBAL_TIME and cuts:
        total, *around = times.tolist()
        validation, test = spec.fractions()
        shares = (1 - validation - test, 1 - test)
        checked += len(shares)
        for number, name in enumerate((VALIDATION, TEST)):
            cut, (below, upto) = cuts[name], around[2 * number : 2 * number + 2]
            is_share = below <= int(total * shares[number]) < upto
            if not (is_share if spec.test_from is None else cut == spec.dates()[number]):
                problems.append(f"{name} from {format_time(cut)}, before which there are {below:,} of {total:,} events")
    return property_of("split: it is the one of the settings, and its cuts lie where they say", checked, problems)


def _check_popularity(folder: Path, catalogue: Catalogue, expected: np.ndarray) -> Property:
    """The table of popularity counts training events and no others: `expected` has those of each catalogue row."""
    names = np.array(catalogue.domains, dtype=object)[catalogue.domain]
    found = np.full(len(expected), -1)
    try:
        table = pq.read_table(folder / POPULARITY)
        ids = {"item_id": pa.array(catalogue.item_id, pa.string()), "domain": pa.array(names, pa.string())}
        if table.select(list(ids)).equals(pa.table(ids)):
            found = table["num_events"].to_numpy()
    except (OSError, pa.ArrowInvalid, KeyError):
        pass  # every item is then without a number
    wrong = np.flatnonzero(found != expected)
    return property_of(
        "popularity: every item has the number of its training events",
        len(expected),
        wrong,
        lambda row: f"{names[row]}/{catalogue.item_id[row]}: {found[row]} counted, {expected[row]} train",
    )


def _check_tokenizer(data: Prepared, catalogue: Catalogue) -> Property:
    """A tokenizer that was trained here is the one that the titles of the pre-training domains alone give."""
    domains = data.pretrain_domains(catalogue)
    trained = train_on_titles(catalogue, domains, data.settings["vocabulary_size"], data.template)
    expected = json.loads(trained.backend_tokenizer.to_str())
    written = json.loads(load_tokenizer(str(data.folder / "tokenizer")).backend_tokenizer.to_str())
    vocabulary, known = written["model"].pop("vocab"), expected["model"].pop("vocab")
    other = sorted(vocabulary.keys() - known.keys())
    if not other and vocabulary != known:
        other = sorted(token for token in known if vocabulary.get(token) != known[token])
    other += [f"its {name}" for name in expected if written.get(name) != expected[name]]
    what = "tokenizer: trained on titles of the pre-training domains again, it comes out the same"
    return property_of(what, len(vocabulary), other)
