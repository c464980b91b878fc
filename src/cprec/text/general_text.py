"""Turns general text (JSON lines, Parquet, plain files) into token shards, for replay beside behaviour sequences."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, DataError, ShardError
from cprec.files import whole_folder
from cprec.progress import say, track
from cprec.provenance import file_sha256
from cprec.text.corpus import TEXT
from cprec.text.shards import open_shards, write_shards
from cprec.text.tokenizer import encode_pieces

ACCEPTED = ".jsonl (also .jsonl.gz and .jsonl.zst), .parquet (with a column `text`) or .txt"
"""The files that general text is read from."""
BATCH = 256
"""Texts that are tokenised at once."""


def text_shards(folder: Path, files: Sequence[str], tokenizer: Any, max_tokens: int, begin: Sequence[int] = ()) -> str:
    """Write the texts of some files as token shards into a folder inside `folder`, and return that folder.

    Its name is a hash of what the shards are made from, so they are made once. Each text ends with end-of-sequence; one
    of more than `max_tokens` tokens is cut into pieces of nearly equal length, each a document that begins with the
    tokens `begin`.

    Raises ConfigError for a file of another kind, DataError for one without text.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"replay={path}: no such file; give {ACCEPTED} files")
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    made_from = [*map(file_sha256, paths), hashlib.sha256(vocabulary.encode()).hexdigest(), str(max_tokens)]
    made_from += map(str, begin)
    target = folder / hashlib.sha256(" ".join(made_from).encode()).hexdigest()[:16]
    if target.is_dir():
        try:
            open_shards(target)
            return str(target)
        except ShardError:
            say(f"{target}: damaged, made again")
    documents: list[np.ndarray] = []
    for path in paths:
        found = tokenised(read_texts(path), tokenizer, max_tokens, begin)
        if not found:
            raise DataError(f"{path} has no text")
        documents += found
    about = {"vocabulary_size": len(tokenizer), "files": [path.name for path in paths], "made_from": made_from}
    with whole_folder(target) as unfinished:
        write_texts(unfinished, {"": documents}, about)
    return str(target)


def tokenised(texts: Iterator[str], tokenizer: Any, max_tokens: int, begin: Sequence[int]) -> list[np.ndarray]:
    """Texts as documents of tokens, each with its end; see `documents_of`."""
    documents: list[np.ndarray] = []
    with track(None, "tokenising text", "texts") as progress:
        while some := list(itertools.islice(texts, BATCH)):
            for ids in encode_pieces(tokenizer, some):
                documents += documents_of([*ids, tokenizer.eos_token_id], max_tokens, begin)
            progress.advance(len(some))
    return documents


def write_texts(folder: Path, documents: Mapping[str, Sequence[np.ndarray]], about: dict[str, Any]) -> None:
    """Write documents of text, by the name of their source, as token shards into a folder."""
    names = [name for name, found in documents.items() for _ in found]
    columns = {
        "domain": names,
        "kind": [TEXT] * len(names),
        "num_events": np.zeros(len(names), dtype=np.int32),
        "target_start": np.ones(len(names), dtype=np.int64),
    }
    write_shards(folder, Ragged.of([each for found in documents.values() for each in found]), columns, about)


def documents_of(ids: Sequence[int], max_tokens: int, begin: Sequence[int] = ()) -> list[np.ndarray]:
    """Cut a text into documents of at most `max_tokens` tokens and nearly equal length, each begun with `begin`.

    >>> [document.tolist() for document in documents_of([5, 6, 7, 1], 3, begin=[2])]
    [[2, 5, 6], [2, 7, 1]]
    """
    pieces = np.array_split(np.asarray(ids, dtype=np.int64), -(-len(ids) // (max_tokens - len(begin))))
    return [np.concatenate([np.asarray(begin, dtype=np.int64), piece]) for piece in pieces]


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file: `text` of each JSON line or Parquet row, or all of a plain file; empty ones are left out.

    JSON lines may be compressed (.gz, .zst). Raises ConfigError for another suffix, DataError, naming file and line,
    for a row without a text, and DataError for a file that cannot be unpacked.
    """
    return (text for text in _rows(path) if text and text.strip())


def _rows(path: Path) -> Iterator[str | None]:
    kind = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
    if kind in (".jsonl", ".json", ".ndjson"):
        for number, line in enumerate(_lines(path), start=1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                assert isinstance(text, str)
            except (ValueError, KeyError, TypeError, AssertionError):
                raise DataError(f'{path} line {number}: no JSON object with a text, as {{"text": "..."}}') from None
            yield text
    elif path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise DataError(f"{path} has no column text; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(BATCH, columns=["text"]):
            yield from batch["text"].to_pylist()
    elif path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
    else:
        raise ConfigError(f"{path}: general text is read from {ACCEPTED}")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, unpacked where its name says that it is compressed."""
    try:
        with io.TextIOWrapper(pa.input_stream(str(path)), encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from None
