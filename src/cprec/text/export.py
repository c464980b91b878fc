"""A data folder in the forms that other libraries read, with the same split and the same text as here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cprec.data.dataset import part_path, read_catalogue, read_manifest
from cprec.errors import ConfigError, DataError
from cprec.progress import say, track
from cprec.provenance import file_sha256
from cprec.schema import (
    BRAND,
    CATEGORIES,
    CONTEXT,
    ITEM_ID,
    PRICE,
    RATING,
    SPLIT,
    TEST,
    TIMESTAMP,
    TITLE,
    TRAIN,
    USER_ID,
    VALIDATION,
)
from cprec.text.shards import Shards, open_shards
from cprec.text.tokenizer import load_tokenizer

EXPORT = "export.json"

BATCH = 4096
"""Documents that are turned into text at once."""


@dataclass(frozen=True)
class _Data:
    """A data folder that is read part by part."""

    folder: Path
    domains: tuple[str, ...]
    num_parts: int

    def events(self, domain: str) -> Iterator[pa.Table]:
        """The interactions of a domain, a part at a time."""
        for part in range(self.num_parts):
            path = part_path(self.folder, "interactions", domain, part)
            if path.is_file():
                yield pq.ParquetFile(path).read()

    def items(self, domain: str) -> pa.Table:
        return pq.ParquetFile(part_path(self.folder, "items", domain, 0)).read()

    def targets(self) -> tuple[str, ...]:
        """The domains that have examples."""
        found = sorted(path.name for path in (self.folder / "examples").glob("*") if path.is_dir())
        return tuple(domain for domain in found if domain in self.domains)


def export(folder: str | Path, form: str, output_dir: str | Path, domains: Sequence[str] = ()) -> Path:
    """Write a data folder in another form into a new folder, and return that.

    `form` is one of `FORMS`; `domains` are those to write, none named means all. Memory holds one part of the log.
    `export.json` says what was written and from what. The folder appears complete or not at all.

    Raises ConfigError for a form or domain that is not there and a folder that is in use; DataError for a value that
    the form cannot hold.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    if form not in FORMS:
        raise ConfigError(f"form={form!r}: expected {', '.join(FORMS)}")
    manifest = read_manifest(folder)
    if manifest.get("split") is None:
        raise DataError(f"{folder} has no split yet: run `cprec prepare` to its end")
    unknown = sorted(set(domains) - set(manifest["domains"]))
    if unknown:
        raise ConfigError(f"there is no domain {unknown[0]!r}; the data has {', '.join(sorted(manifest['domains']))}")
    if output_dir.exists():
        raise ConfigError(f"{output_dir} is there already: choose another folder, or delete it")
    data = _Data(folder, tuple(domains) or tuple(sorted(manifest["domains"])), manifest["num_parts"])
    aside = output_dir.with_name(f"{output_dir.name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    counts = FORMS[form](data, aside)
    certificate = folder / "certificate.json"
    about = {
        "form": form,
        "domains": list(data.domains),
        "rows": counts,
        "split": manifest["split"],
        "catalogue_sha256": read_catalogue(folder).digest(),
        "certificate_sha256": file_sha256(certificate) if certificate.is_file() else None,
        "files": {path.relative_to(aside).as_posix(): file_sha256(path) for path in _files(aside)},
    }
    (aside / EXPORT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    aside.rename(output_dir)
    say(f"{output_dir}: {sum(counts.values()):,} rows in {len(counts)} files, as {form}")
    return output_dir


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- RecBole ---------------------------------------------------------------------------------------------------------


def _recbole(data: _Data, target: Path) -> dict[str, int]:
    """Atomic files: DOMAIN/DOMAIN.inter and .item, and DOMAIN.train, .valid, .test.inter for its benchmark_filename."""
    counts = {}
    for domain in data.domains:
        (target / domain).mkdir()
        items = data.items(domain)
        columns = {
            "item_id:token": items[ITEM_ID],
            "title:token_seq": items[TITLE],
            "brand:token_seq": pc.fill_null(items[BRAND], ""),
            "categories:token_seq": pc.fill_null(items[CATEGORIES], ""),
            "price:float": items[PRICE],
        }
        counts[f"{domain}/{domain}.item"] = _write_tsv(target / domain / f"{domain}.item", [pa.table(columns)])
        for name, part in (("", None), (".train", TRAIN), (".valid", VALIDATION), (".test", TEST)):
            file = f"{domain}{name}.inter"
            rows = (_recbole_events(table, part) for table in data.events(domain))
            counts[f"{domain}/{file}"] = _write_tsv(target / domain / file, rows)
    return counts


def _recbole_events(table: pa.Table, part: str | None) -> pa.Table:
    table = table if part is None else table.filter(pc.equal(table[SPLIT], part))
    return pa.table(
        {
            "user_id:token": table[USER_ID],
            "item_id:token": table[ITEM_ID],
            "rating:float": pc.fill_null(table[RATING], 1.0),
            "timestamp:float": table[TIMESTAMP],
        }
    )


def _write_tsv(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write tables with tabs between fields and no quotes, which RecBole does not know; returns the number of rows."""
    options = pa.csv.WriteOptions(delimiter="\t", quoting_style="none", quoting_header="none")
    rows, writer = 0, None
    try:
        for table in tables:
            writer = writer or pa.csv.CSVWriter(path, table.schema, write_options=options)
            try:
                writer.write_table(table)
            except pa.ArrowInvalid:
                raise DataError(_unwritable(table, path)) from None
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


def _unwritable(table: pa.Table, path: Path) -> str:
    for name in table.column_names:
        if pa.types.is_string(table.schema.field(name).type):
            for value in table[name].to_pylist():
                if value is not None and any(mark in value for mark in '\t\n\r"'):
                    return (
                        f"{path.name}: {name.partition(':')[0]} {value!r} holds a tab, a quote or an end of line, "
                        "which atomic files cannot; map another column, or export to another form"
                    )
    return f"{path.name} cannot be written"


# ---- data frames -----------------------------------------------------------------------------------------------------

FRAMES: dict[str, dict[str, str]] = {
    "rectools": {USER_ID: "user_id", ITEM_ID: "item_id", RATING: "weight", TIMESTAMP: "datetime"},
    "replay": {USER_ID: "query_id", ITEM_ID: "item_id", RATING: "rating", TIMESTAMP: "timestamp"},
}
"""Canonical column to the library's; RecTools has moments, RePlay seconds."""


def read_frame(folder: str | Path, form: str, domain: str, part: str) -> Any:
    """One part of a split (train, validation, test) as the pandas frame that RecTools or RePlay take.

    An event without a rating weighs 1. Raises ConfigError for a form that is not in `FRAMES`.
    """
    if form not in FRAMES:
        raise ConfigError(f"form={form!r}: expected {', '.join(FRAMES)}")
    data = _Data(Path(folder), (domain,), read_manifest(folder)["num_parts"])
    return pa.concat_tables([_frame(table, form, part) for table in data.events(domain)]).to_pandas()


def _frame(table: pa.Table, form: str, part: str) -> pa.Table:
    table = table.filter(pc.equal(table[SPLIT], part))
    columns = {}
    for name, theirs in FRAMES[form].items():
        column = pc.fill_null(table[name], 1.0) if name == RATING else table[name]
        columns[theirs] = column.cast(pa.timestamp("s")).cast(pa.timestamp("us")) if theirs == "datetime" else column
    return pa.table(columns)


def _frames(form: str) -> Callable[[_Data, Path], dict[str, int]]:
    def write(data: _Data, target: Path) -> dict[str, int]:
        counts = {}
        for domain in data.domains:
            (target / domain).mkdir()
            for part in (TRAIN, VALIDATION, TEST, CONTEXT):
                rows = (_frame(table, form, part) for table in data.events(domain))
                if number := _write_parquet(target / domain / f"{part}.parquet", rows):
                    counts[f"{domain}/{part}.parquet"] = number
            items = data.items(domain).select([ITEM_ID, TITLE, BRAND, CATEGORIES, PRICE])
            counts[f"{domain}/items.parquet"] = _write_parquet(target / domain / "items.parquet", [items])
        return counts

    return write


def _write_parquet(path: Path, tables: Iterable[pa.Table]) -> int:
    rows, writer = 0, None
    for table in tables:
        if table.num_rows:
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            rows += table.num_rows
    if writer is not None:
        writer.close()
    return rows


# ---- text ------------------------------------------------------------------------------------------------------------


def _messages(data: _Data, target: Path) -> dict[str, int]:
    """Chats of a prompt and its answer from the training examples, as LLaMA-Factory and TRL take them."""
    counts, info = {}, {}
    for domain in data.targets():
        name = f"messages_{domain}"

        def lines(domain: str = domain) -> Iterator[dict[str, Any]]:
            for prompt, answer in _examples(data.folder, domain):
                asked = {"role": "user", "content": prompt}
                yield {"messages": [asked, {"role": "assistant", "content": answer.strip()}]}

        counts[f"{name}.jsonl"] = _write_lines(target / f"{name}.jsonl", lines())
        info[f"cprec_{name}"] = {
            "file_name": f"{name}.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        }
    (target / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    return counts


def _text(data: _Data, target: Path) -> dict[str, int]:
    """The documents of pre-training, and prompts with completions: what our own training reads, as text."""
    shards, tokenizer = open_shards(data.folder / "shards" / "train"), load_tokenizer(str(data.folder / "tokenizer"))
    texts = ({"text": text} for text in _decoded(shards, tokenizer, shards.column("length") - 1))
    counts = {"text.jsonl": _write_lines(target / "text.jsonl", texts)}
    info: dict[str, Any] = {"cprec_text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}}}
    for domain in data.targets():
        name = f"completions_{domain}"
        pairs = ({"prompt": prompt, "completion": answer} for prompt, answer in _examples(data.folder, domain))
        counts[f"{name}.jsonl"] = _write_lines(target / f"{name}.jsonl", pairs)
        info[f"cprec_{name}"] = {
            "file_name": f"{name}.jsonl",
            "columns": {"prompt": "prompt", "response": "completion"},
        }
    (target / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    return counts


def _examples(folder: Path, domain: str) -> Iterator[tuple[str, str]]:
    """Prompt and completion of every training example; together, and with the end, they are its tokens."""
    shards, tokenizer = open_shards(folder / "examples" / domain / "train"), load_tokenizer(str(folder / "tokenizer"))
    starts = shards.column("target_start")
    prompts = _decoded(shards, tokenizer, starts)
    answers = _decoded(shards, tokenizer, shards.column("length") - 1, starts)
    return zip(prompts, answers, strict=True)


def _decoded(shards: Shards, tokenizer: Any, stops: np.ndarray, starts: np.ndarray | None = None) -> Iterator[str]:
    """The text of each document's tokens from `starts` (0) to `stops`."""
    rows = shards.rows
    for first in range(0, len(shards), BATCH):
        some = range(first, min(first + BATCH, len(shards)))
        pieces = [rows[row][0 if starts is None else starts[row] : stops[row]].tolist() for row in some]
        yield from tokenizer.batch_decode(pieces, clean_up_tokenization_spaces=False)


def _write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file, track(None, path.name, "rows") as progress:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            count += 1
            if count % BATCH == 0:
                progress.advance(BATCH)
    return count


FORMS: dict[str, Callable[[_Data, Path], dict[str, int]]] = {
    "recbole": _recbole,
    "rectools": _frames("rectools"),
    "replay": _frames("replay"),
    "messages": _messages,
    "text": _text,
}
