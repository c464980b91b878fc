"""Writes a data folder in the forms that other libraries read, with the same split and the same text as here.

    recbole             RecBole's atomic files; general models take our split by `benchmark_filename`
    recbole-sequential  the same for its sequential models, which want each event's history beside it
    rectools, replay    Parquet frames with the columns that RecTools and RePlay name
    messages            chats of a prompt and its answer (LLaMA-Factory, TRL)
    text                documents to pre-train on, and prompts with completions (LLaMA-Factory, TRL)

Tables are read part by part and text is decoded in batches, so memory does not grow with the log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cprec.data.dataset import part_path, read_catalogue, read_domains, read_manifest, with_microsecond
from cprec.data.interactions import SECOND
from cprec.data.ragged import gather
from cprec.data.splits import runs
from cprec.errors import ConfigError, DataError, LeakageError
from cprec.files import whole_folder
from cprec.progress import say, track
from cprec.provenance import file_sha256
from cprec.schema import (
    BRAND,
    CATEGORIES,
    CONTEXT,
    ITEM_ID,
    MICROSECOND,
    PRICE,
    RATING,
    SPECIFIC,
    SPLIT,
    TEST,
    TIMESTAMP,
    TITLE,
    TRAIN,
    USER_ID,
    VALIDATION,
)
from cprec.text.certificate import CERTIFICATE
from cprec.text.shards import TOKENS, Shards, open_shards
from cprec.text.tokenizer import load_tokenizer

EXPORT, DATASET_INFO = "export.json", "dataset_info.json"

BATCH = 4096
"""Documents that are turned into text at once."""

SPECIAL_MARK = re.compile(
    r"[<\[](?:(?<=<)(?:\|[^<>|\s]{1,60}\||｜[^<>｜]{1,60}｜|</?SYS>|/?(?:s|bos|eos|pad|unk|mask|think|tool_call)"
    r"|(?:start|end)_of_(?:turn|text)|endoftext|(?:unused|extra_id_)_?\d+|image|video|audio)>"
    r"|(?<=\[)/?(?:INST|BOS|EOS|PAD|UNK|CLS|SEP|g?MASK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK)\])"
)
"""How tokenizers and chat templates write special tokens. In a title such a mark is text here, but a trainer that
tokenises the text again may take it for the token."""

MAX_SAMPLED = 1000
"""Documents of a file whose text is tokenised again, to say whether that gives our tokens."""

MAX_LIST = 50
"""Items in a history of `recbole-sequential`: RecBole's MAX_ITEM_LIST_LENGTH."""

LIST_BATCH = 1 << 14
"""Histories that are written at once."""


@dataclass(frozen=True)
class Export:
    """An export under way: what it reads, where it writes, and what `export.json` will say."""

    folder: Path
    target: Path
    domains: tuple[str, ...]
    """The domains to write."""
    manifest: Mapping[str, Any]
    """dataset.json of the data folder."""
    rows: dict[str, int] = field(default_factory=dict)
    """How many rows each file has."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else `export.json` says."""
    info: dict[str, Any] = field(default_factory=dict)
    """What LLaMA-Factory's dataset_info.json says of files of text."""

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.folder / "tokenizer"))

    def events(self, domain: str) -> list[Path]:
        """The files of a domain's interactions; each user's events stand together in one of them, in order.

        Raises DataError where they do not hold as many events as the manifest says.
        """
        paths = [part_path(self.folder, "interactions", domain, part) for part in range(self.manifest["num_parts"])]
        paths = [path for path in paths if path.is_file()]  # a part without users of this domain has no file
        found = sum(_open(path).metadata.num_rows for path in paths)
        expected = self.manifest["domains"][domain]["num_events"]
        if found != expected:
            raise DataError(
                f"{self.folder}: dataset.json says {expected:,} events of domain {domain!r}, but its files hold "
                f"{found:,}: one is missing or was changed; prepare the data again"
            )
        return paths

    def items(self, domain: str) -> pa.Table:
        return _open(part_path(self.folder, "items", domain, 0)).read()


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read: {error}; prepare the data again") from None


def export(folder: str | Path, format: str, output_dir: str | Path | None = None, domains: Sequence[str] = ()) -> Path:
    """Write a data folder in another form into a new folder, and return that.

    `format` is one of `FORMATS`. By default `output_dir` is the data folder's name followed by the format, and all
    `domains` are written. `export.json` records the format, the SHA-256 of the catalogue and of the certificate, and
    the rows and the SHA-256 of each file. The folder appears complete or not at all.

    Raises ConfigError for an unknown format or domain and for an output folder that exists; DataError for a value that
    the format cannot hold; LeakageError where text is asked for and no clean certificate covers it.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: expected {', '.join(FORMATS)}")
    read_domains(folder)  # a folder of text has none
    manifest = read_manifest(folder)
    if manifest.get("split") is None:
        raise DataError(f"{folder} has no split yet: run `cprec prepare` to its end")
    chosen = _known(domains, manifest)
    output_dir = _output_dir(folder, format, output_dir)
    with whole_folder(output_dir) as target:
        out = Export(folder, target, chosen, manifest)
        FORMATS[format](out)
        files = sorted(path for path in target.rglob("*") if path.is_file())
        certificate = folder / CERTIFICATE
        about = {
            "format": format,
            "domains": list(chosen),
            "split": manifest["split"],
            "catalogue_sha256": read_catalogue(folder).digest(),
            "certificate_sha256": file_sha256(certificate) if certificate.is_file() else None,
            "rows": out.rows,
            **out.notes,
            "sha256": {path.relative_to(target).as_posix(): file_sha256(path) for path in files},
        }
        (target / EXPORT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{output_dir}: {sum(out.rows.values()):,} rows in {len(out.rows)} files, as {format}")
    return output_dir


def _output_dir(folder: Path, format: str, output_dir: str | Path | None) -> Path:
    """The folder to write, which must be a new one outside the data folder."""
    if output_dir is None:
        named = folder if folder.name not in ("", "..") else folder.resolve()
        output_dir = named.with_name(f"{named.name}-{format}")
    output_dir = Path(output_dir)
    if folder.resolve() in output_dir.resolve().parents:
        raise ConfigError(f"{output_dir} lies in the data folder, whose files are certified: choose another folder")
    if output_dir.exists():
        raise ConfigError(f"{output_dir} is there already: choose another folder, or delete it")
    return output_dir


def _known(domains: Sequence[str], manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The domains asked for, each once; all where none is named."""
    unknown = sorted(set(domains) - set(manifest["domains"]))
    if unknown:
        raise ConfigError(f"there is no domain {unknown[0]!r}; the data has {', '.join(sorted(manifest['domains']))}")
    return tuple(dict.fromkeys(domains)) or tuple(sorted(manifest["domains"]))


# ---- tables ----------------------------------------------------------------------------------------------------------

_TYPES = {USER_ID: pa.string(), ITEM_ID: pa.string(), TIMESTAMP: pa.int64(), MICROSECOND: pa.int32()}
_NO_EVENTS = pa.schema(_TYPES | {RATING: pa.float64(), SPLIT: pa.string()}).empty_table()

_ALL_PARTS = (TRAIN, VALIDATION, TEST, CONTEXT)


def _write_events(
    out: Export,
    domain: str,
    files: Mapping[str, tuple[str, ...]],
    shape: Callable[[pa.Table, np.ndarray], Iterator[pa.Table]],
    open_writer: Callable[[Path, pa.Schema], Any],
) -> None:
    """Write the events of a domain into `files`, each with its parts of the split, in one pass over the log.

    `shape` turns the rows of a table that a mask chooses into the tables to write.
    """
    (out.target / domain).mkdir(exist_ok=True)
    paths = out.events(domain)
    num_unrated = num_events = 0
    with ExitStack() as stack, track(len(paths), f"exporting {domain}", "parts") as progress:
        schema = next(shape(_NO_EVENTS, np.zeros(0, dtype=bool))).schema
        writers = {name: stack.enter_context(open_writer(out.target / domain / name, schema)) for name in files}
        out.rows.update({f"{domain}/{name}": 0 for name in files})
        for path in paths:
            table = with_microsecond(_open(path).read())
            num_unrated += table[RATING].null_count
            num_events += table.num_rows
            for name, parts in files.items():
                mask = pc.is_in(table[SPLIT], pa.array(parts)).to_numpy()
                for rows in shape(table, mask):
                    writers[name].write_table(rows)
                    out.rows[f"{domain}/{name}"] += rows.num_rows
            progress.advance()
    if 0 < num_unrated < num_events and shape is not _with_history:
        out.notes.setdefault("num_without_rating", {})[domain] = num_unrated
        say(f"note: {num_unrated:,} of {num_events:,} events of {domain} have no rating; they get 1")


def _write_items(out: Export, domain: str, name: str, items: pa.Table, open_writer: Callable[..., Any]) -> None:
    with open_writer(out.target / domain / name, items.schema) as writer:
        writer.write_table(items)
    out.rows[f"{domain}/{name}"] = items.num_rows


# ---- RecBole ---------------------------------------------------------------------------------------------------------

# fmt: off
_READ_AS_MISSING = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
)
# fmt: on
"""Text that pandas, with which RecBole reads files, takes for a missing value."""

BENCHMARK = {"train": (TRAIN,), "valid": (VALIDATION,), "test": (TEST,)}
"""RecBole's names of the parts of the split, for `benchmark_filename: [train, valid, test]`."""


class _Tsv(pa.csv.CSVWriter):
    """Writes tables with tabs between fields and no quotes, as RecBole reads them."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        options = pa.csv.WriteOptions(delimiter="\t", quoting_style="none", quoting_header="none")
        super().__init__(path, schema, write_options=options)
        self._path = path

    def write_table(self, table: pa.Table) -> None:
        for name in table.column_names:
            if name.endswith("_id:token"):
                missing = pc.is_in(table[name], pa.array(_READ_AS_MISSING))
                self._refuse(table, name, missing, ", which RecBole reads as no id at all")
        try:
            super().write_table(table)
        except pa.ArrowInvalid:
            for name in table.column_names:
                if pa.types.is_string(table[name].type):
                    wrong = pc.match_substring_regex(table[name], '[\t\n\r"]')
                    why = " holds a tab, a quote or an end of line, which atomic files cannot hold"
                    self._refuse(table, name, wrong, why)
            raise

    def _refuse(self, table: pa.Table, name: str, wrong: pa.ChunkedArray, why: str) -> None:
        """Raise DataError for the first of a column's values that a mask marks, where there is one."""
        if len(values := table[name].filter(wrong)):
            raise DataError(
                f"{self._path.name}: {name.partition(':')[0]} {values[0].as_py()!r}{why}; map another column, or "
                "export to another format"
            )


def write_recbole(out: Export, *, sequential: bool = False) -> None:
    """DOMAIN/DOMAIN.inter with every event, .train, .valid and .test.inter with our split, and DOMAIN.item.

    For sequential models the events of our split carry the items before them, because RecBole makes such lists only
    where it splits, and there is no DOMAIN.inter. The history is that of our queries: the user's earlier events in the
    domain, held-out ones too. An event without a history is left out, as RecBole does.
    """
    for domain in out.domains:
        files: dict[str, tuple[str, ...]] = {} if sequential else {f"{domain}.inter": _ALL_PARTS}
        files |= {f"{domain}.{name}.inter": parts for name, parts in BENCHMARK.items()}
        _write_events(out, domain, files, _with_history if sequential else _atomic, _Tsv)
        _write_items(out, domain, f"{domain}.item", _atomic_items(out.items(domain)), _Tsv)


def _atomic(table: pa.Table, mask: np.ndarray) -> Iterator[pa.Table]:
    table = table.filter(pa.array(mask))
    columns = {
        "user_id:token": table[USER_ID],
        "item_id:token": table[ITEM_ID],
        "rating:float": pc.fill_null(table[RATING], 1.0),
        "timestamp:float": _seconds_text(table),
    }
    yield pa.table(columns)


def _seconds_text(table: pa.Table) -> pa.ChunkedArray:
    """Seconds in full, as 1577836802 or 1577836802.535000."""
    whole, rest = (table[name].cast(pa.string()) for name in (TIMESTAMP, MICROSECOND))
    full = pc.binary_join_element_wise(whole, pc.utf8_lpad(rest, 6, "0"), ".")
    return pc.if_else(pc.equal(table[MICROSECOND], 0), whole, full)


def _with_history(table: pa.Table, mask: np.ndarray) -> Iterator[pa.Table]:
    """The chosen events after their users' latest `MAX_LIST` items; the rows of a user stand together."""
    user, item = table[USER_ID].combine_chunks(), table[ITEM_ID].combine_chunks()
    spaced = item.filter(pc.match_substring(item, " "))
    if len(spaced):
        raise DataError(
            f"item_id {spaced[0].as_py()!r} holds a space, which separates the items of a history in atomic files; use "
            "the format recbole, and let RecBole split"
        )
    num_before, _, _ = runs(user.dictionary_encode().indices.to_numpy())
    chosen = np.flatnonzero(mask & (num_before > 0))
    for start in range(0, max(1, len(chosen)), LIST_BATCH):
        some = chosen[start : start + LIST_BATCH]
        # The history of an event is the stretch of rows that ends before it.
        lengths = np.minimum(num_before[some], MAX_LIST)
        rows = gather(np.arange(len(item)), some - lengths, lengths)
        lists = pa.ListArray.from_arrays(pa.array(rows.offsets, pa.int32()), item.take(pa.array(rows.values)))
        columns = {
            "user_id:token": user.take(pa.array(some)),
            "item_id_list:token_seq": pc.binary_join(lists, " "),
            "item_id:token": item.take(pa.array(some)),
        }
        yield pa.table(columns)


def _atomic_items(items: pa.Table) -> pa.Table:
    """The catalogue of a domain; a column in which no item has a value is left out."""
    names = {
        ITEM_ID: "item_id:token",
        TITLE: "title:token_seq",
        BRAND: "brand:token",
        CATEGORIES: "categories:token_seq",
        PRICE: "price:float",
    }
    kept = [name for name in names if name in (ITEM_ID, TITLE) or items[name].null_count < len(items)]
    return pa.table({names[name]: items[name] for name in kept})


# ---- data frames -----------------------------------------------------------------------------------------------------

FRAMES: dict[str, dict[str, str]] = {
    "rectools": {USER_ID: "user_id", ITEM_ID: "item_id", RATING: "weight", TIMESTAMP: "datetime"},
    "replay": {USER_ID: "query_id", ITEM_ID: "item_id", RATING: "rating", TIMESTAMP: "timestamp"},
}
"""Canonical column -> the library's column. Times are timestamps for RecTools, float seconds for RePlay."""

ITEMS = "items"


def read_frame(folder: str | Path, format: str, domain: str, part: str) -> Any:
    """The pandas frame that a file of the format `rectools` or `replay` holds, without writing that file.

    `part` is train, validation, test or context, or `items` for the catalogue of the domain. An event without a rating
    weighs 1. Raises ConfigError for a format, domain or part that is not there.
    """
    if format not in FRAMES:
        raise ConfigError(f"format={format!r}: expected {', '.join(FRAMES)}")
    if part not in (*_ALL_PARTS, ITEMS):
        raise ConfigError(f"part={part!r}: expected {', '.join((*_ALL_PARTS, ITEMS))}")
    manifest = read_manifest(folder)
    _known([domain], manifest)
    out = Export(Path(folder), Path(), (domain,), manifest)
    if part == ITEMS:
        return _item_frame(out.items(domain)).to_pandas()
    tables = [_NO_EVENTS, *(with_microsecond(_open(path).read()) for path in out.events(domain))]
    frames = [frame for table in tables for frame in _frame(table, pc.equal(table[SPLIT], part).to_numpy(), format)]
    return pa.concat_tables(frames).to_pandas()


def write_frames(out: Export, format: str) -> None:
    """DOMAIN/{train,validation,test,items}.parquet, with the columns of `FRAMES`; context too, if users are unseen."""
    parts = _ALL_PARTS if out.manifest["split"]["unseen_user_share"] else (TRAIN, VALIDATION, TEST)
    files = {f"{part}.parquet": (part,) for part in parts}
    for domain in out.domains:
        _write_events(out, domain, files, partial(_frame, format=format), _Parquet)
        _write_items(out, domain, f"{ITEMS}.parquet", _item_frame(out.items(domain)), _Parquet)


_Parquet = partial(pq.ParquetWriter, compression="zstd")


def _frame(table: pa.Table, mask: np.ndarray, format: str) -> Iterator[pa.Table]:
    """The chosen events as rows of a format."""
    table = table.filter(pa.array(mask))
    columns = {theirs: table[name] for name, theirs in FRAMES[format].items()}
    columns[FRAMES[format][RATING]] = pc.fill_null(table[RATING], 1.0)
    if format == "rectools":
        whole = columns["datetime"].cast(pa.timestamp("s")).cast(pa.timestamp("us"))  # Parquet has no seconds
        columns["datetime"] = pc.add(whole, table[MICROSECOND].cast(pa.int64()).cast(pa.duration("us")))
    else:
        rest = pc.divide(table[MICROSECOND].cast(pa.float64()), SECOND)
        columns["timestamp"] = pc.add(columns["timestamp"].cast(pa.float64()), rest)
    yield pa.table(columns)


def _item_frame(items: pa.Table) -> pa.Table:
    return items.select([ITEM_ID, TITLE, BRAND, CATEGORIES, PRICE])


# ---- text ------------------------------------------------------------------------------------------------------------


_CHAT_INFO = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


def write_messages(out: Export) -> None:
    """messages_DOMAIN.jsonl and messages_DOMAIN_validation.jsonl: chats of a prompt and the title that follows it."""
    found = _targets(out)
    if not set(found) & set(out.domains):
        raise ConfigError(
            f"there are no examples of {', '.join(out.domains)}; the data has those of {', '.join(found)}"
        )
    _write_examples(out, "messages", _chats, _CHAT_INFO)


def write_text(out: Export) -> None:
    """text.jsonl and text_heldout.jsonl, the documents of pre-training; completions_DOMAIN.jsonl and
    completions_DOMAIN_validation.jsonl, prompts and completions of fine-tuning.

    Where only some domains are chosen, mixed documents are left out, because they show others too. The text has no
    token that begins or ends a sequence: LLaMA-Factory and TRL add them as the tokenizer does.
    """
    for name, part in (("text", TRAIN), ("text_heldout", "heldout")):
        shards = _certified(out, f"shards/{part}")
        rows = np.arange(len(shards))
        if set(out.domains) != set(out.manifest["domains"]):
            chosen = pc.is_in(shards.documents["domain"], pa.array(out.domains))
            rows = rows[pc.and_(chosen, pc.equal(shards.documents["kind"], SPECIFIC)).to_numpy()]
        _write_lines(out, name, shards, rows, _documents, {"columns": {"prompt": "text"}})
    info = {"columns": {"prompt": "prompt", "response": "completion"}}
    _write_examples(out, "completions", _completions, info)


def _write_examples(out: Export, stem: str, entries: _Entries, info: Mapping[str, Any]) -> None:
    """Write the examples of every chosen domain that has some, and LLaMA-Factory's dataset_info.json, the last file."""
    for domain in _targets(out):
        if domain in out.domains:
            for name, part in ((f"{stem}_{domain}", TRAIN), (f"{stem}_{domain}_{VALIDATION}", VALIDATION)):
                shards = _certified(out, f"examples/{domain}/{part}")
                _write_lines(out, name, shards, np.arange(len(shards)), entries, info)
    (out.target / DATASET_INFO).write_text(json.dumps(out.info, indent=1) + "\n", encoding="utf-8")


def _targets(out: Export) -> list[str]:
    """The domains that have examples."""
    return sorted(path.name for path in (out.folder / "examples").glob("*") if path.is_dir())


def _certified(out: Export, name: str) -> Shards:
    """Shards that a clean certificate covers as they stand. Raises LeakageError where none does."""
    path = out.folder / CERTIFICATE
    certificate = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not certificate.get("clean"):
        what = "is not clean" if certificate else "is missing"
        raise LeakageError(f"{path} {what}: see `cprec audit {out.folder}`, or prepare the data again")
    shards = open_shards(out.folder / name)
    if certificate["files"].get(f"{name}/{TOKENS}") != shards.manifest["sha256"][TOKENS]:
        raise LeakageError(f"{out.folder / name} was changed after it was certified: run `cprec audit {out.folder}`")
    return shards


_Entries = Callable[[Shards, Any, np.ndarray], Iterator[dict[str, Any]]]
"""Makes the JSON entries of some documents of a shard, which are given by row, with a tokenizer."""


def _documents(shards: Shards, tokenizer: Any, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Whole documents."""
    return ({"text": text} for text in _decoded(shards, tokenizer, rows))


def _completions(shards: Shards, tokenizer: Any, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Prompts and completions, which make up the document; the loss is on the completion."""
    # A completion decoded alone may lose its leading space, so it is cut from the decoded document.
    prompts = _decoded(shards, tokenizer, rows, shards.column("target_start"))
    for prompt, document in zip(prompts, _decoded(shards, tokenizer, rows), strict=True):
        if not document.startswith(prompt):
            raise DataError(f"the tokenizer decodes this prompt differently inside its document: {prompt!r}")
        yield {"prompt": prompt, "completion": document[len(prompt) :]}


def _chats(shards: Shards, tokenizer: Any, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Conversations: the prompt is the user's message, the title the assistant's."""
    for pair in _completions(shards, tokenizer, rows):
        answer = {"role": "assistant", "content": pair["completion"].strip()}
        yield {"messages": [{"role": "user", "content": pair["prompt"]}, answer]}


def _decoded(shards: Shards, tokenizer: Any, rows: np.ndarray, stops: np.ndarray | None = None) -> list[str]:
    """The text of some documents, without the tokens that begin each, up to the end-of-sequence token or to `stops`."""
    tokens, begin = shards.rows, len(shards.manifest.get("about", {}).get("begin", ()))
    pieces = [tokens[row][begin : -1 if stops is None else stops[row]].tolist() for row in rows.tolist()]
    return list(tokenizer.batch_decode(pieces, clean_up_tokenization_spaces=False)) if pieces else []


def _write_lines(
    out: Export, stem: str, shards: Shards, rows: np.ndarray, entries: _Entries, info: Mapping[str, Any]
) -> None:
    """Write a line of JSON for each document, and note how many hold the mark of a special token."""
    name, num_marked, example = f"{stem}.jsonl", 0, ""
    with (
        open(out.target / name, "w", encoding="utf-8") as file,
        track(len(rows), f"exporting {name}", "documents") as progress,
    ):
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            for entry in entries(shards, out.tokenizer, some):
                line = json.dumps(entry, ensure_ascii=False)
                file.write(f"{line}\n")
                if found := SPECIAL_MARK.search(line):
                    num_marked, example = num_marked + 1, found[0]
            progress.advance(len(some))
    out.rows[name] = len(rows)
    out.notes.setdefault("special_marks", {})[name] = num_marked
    if len(rows):  # LLaMA-Factory cannot read a file without rows
        out.info[f"cprec_{stem}"] = {"file_name": name, **info}
    if num_marked:
        say(
            f"note: {name}: {num_marked:,} of {len(rows):,} documents hold a mark of chat templates, as {example!r}; "
            "what trains on them may take it for a special token"
        )
    if entries is not _chats:  # whose tokens depend on a chat template
        _tokenise_again(out, name, shards, rows)


def _tokenise_again(out: Export, name: str, shards: Shards, rows: np.ndarray) -> None:
    """Note how many documents keep their tokens when their text is tokenised again, by a sample spread over the file.

    The tokenizer may add its own special tokens. Some documents may change: titles are tokenised one by one here, and
    tokenizers other than the tiny one may join pieces; a title that was cut may end inside a character.
    """
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_SAMPLED)).astype(np.int64)]
    texts, tokens = _decoded(shards, out.tokenizer, sample), shards.rows
    retokenised = out.tokenizer(texts)["input_ids"] if texts else []
    ours = [tokens[row].tolist() for row in sample.tolist()]
    equal = sum(mine in (ids, [*ids, mine[-1]]) for ids, mine in zip(retokenised, ours, strict=True))
    out.notes.setdefault("tokenised_again", {})[name] = {"checked": len(sample), "equal": equal}
    if equal < len(sample):
        say(f"note: {name}: of {len(sample):,} documents tokenised again, {len(sample) - equal:,} give other tokens")


FORMATS: dict[str, Callable[[Export], None]] = {
    "recbole": write_recbole,
    "recbole-sequential": partial(write_recbole, sequential=True),
    "rectools": partial(write_frames, format="rectools"),
    "replay": partial(write_frames, format="replay"),
    "messages": write_messages,
    "text": write_text,
}
