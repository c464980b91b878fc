"""Token shards: a flat file of tokens, an index of documents and a manifest with hashes. Write, verify, memory-map."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.errors import ShardError
from cprec.provenance import file_sha256
from cprec.schema import KINDS
from cprec.text.encoding import token_dtype

TOKENS, DOCUMENTS, MANIFEST = "tokens.bin", "documents.parquet", "manifest.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

INDEX = {
    "offset": pa.int64(),
    "length": pa.int64(),
    "domain": pa.string(),
    "kind": pa.string(),
    "num_events": pa.int32(),
    "platform": pa.string(),
    "user_id": pa.string(),
    "target_start": pa.int64(),
}
"""The columns of the index of documents, and their types."""


@dataclass(frozen=True)
class Choices:
    """Tokens that might stand in the place of others, the others among them: arrays along these tokens."""

    of: np.ndarray
    """The place of the token in whose place each might stand, ascending: int64."""
    token: np.ndarray
    chance: np.ndarray
    """float32; all that might stand in one place sum to one."""


@dataclass(frozen=True)
class Branches:
    """How the tokens of documents that are trees hang together: arrays along the tokens.

    A document's tokens stand in preorder: each before all that go on from it, and one way to go on before the next.
    """

    until: np.ndarray
    """The place in its document before which the tokens that read a token, itself included, end: int32."""
    is_target: np.ndarray
    """Whether the loss covers the token, which then stands right behind the one that it goes on from: bool."""
    choices: Choices | None = None
    """What the loss asks in the place of some of these tokens, counted over all documents. None: the tokens."""


@dataclass(frozen=True)
class Shards:
    """Documents of token ids, read in place, one after the other.

    `documents` has one row per document: its offset and length in `tokens`, domain (empty for mixed ones), kind,
    num_events, platform, user_id and target_start (where the tokens that a fine-tuning loss covers begin).
    """

    tokens: np.ndarray
    documents: pa.Table
    manifest: dict[str, Any]
    branches: Branches | None = None
    """Of documents that are trees; None: each token is read by all that follow in its document."""

    def __len__(self) -> int:
        return self.documents.num_rows

    def column(self, name: str) -> np.ndarray:
        return self.documents[name].to_numpy()

    @property
    def rows(self) -> Ragged:
        """The tokens of all documents as a ragged array over the memory-mapped file."""
        return Ragged(self.tokens, offsets_of(self.column("length")))

    def take(self, documents: np.ndarray) -> Ragged:
        """The tokens of some documents, given by row number, in one gather from the file."""
        return gather(self.tokens, self.column("offset")[documents], self.column("length")[documents])

    @classmethod
    def concatenate(cls, pieces: Sequence[Shards], manifest: dict[str, Any]) -> Shards:
        """Pieces from `read_piece`, one after the other, in memory."""
        if not pieces:
            empty = pa.table({name: pa.array([], kind) for name, kind in INDEX.items()})
            return cls(np.empty(0, dtype=DTYPES[manifest["dtype"]]), empty, manifest)
        tokens = np.concatenate([piece.tokens for piece in pieces])
        documents = pa.concat_tables([piece.documents for piece in pieces])
        # Documents follow one another within a piece, so offsets are the sums of the lengths before them.
        offsets = pa.array(offsets_of(documents["length"].to_numpy())[:-1])
        return cls(tokens, documents.set_column(0, "offset", offsets), manifest)

    @property
    def sha256(self) -> str:
        """The identity of the shards: see `manifest_sha256`."""
        return manifest_sha256(self.manifest)


Piece = tuple[dict[str, Any], np.ndarray, pa.Table]
"""Documents of one domain and kind: domain, kind and part; their tokens; and their rows of the index."""


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The identity of a shard folder: the hash of its manifest, which holds the hash of each file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_shards(
    folder: Path, documents: Ragged, columns: dict[str, Any], about: dict[str, Any], *, part: int = 0
) -> None:
    """Write documents of token ids into a folder, in place of what is there.

    The manifest comes last, but only a folder written inside `files.whole_folder` appears complete or not at all.
    `columns` has the values of the index, `domain` and `kind` among them, one for each document. `about` goes into the
    manifest and must hold `vocabulary_size`, which decides between uint16 and uint32. Neighbouring documents of one
    domain and kind are a piece: one row group of the index, which the manifest lists with `part`.
    """
    full = {"offset": documents.offsets[:-1], "length": documents.lengths, **columns}
    index = pa.table({name: pa.array(values, INDEX[name]) for name, values in full.items()})

    def pieces() -> Iterator[Piece]:
        start = 0
        for (domain, kind), rows in itertools.groupby(zip(columns["domain"], columns["kind"], strict=True)):
            stop = start + sum(1 for _ in rows)
            tokens = documents.values[documents.offsets[start] : documents.offsets[stop]]
            where = {"domain": str(domain), "kind": str(kind), "part": part}
            yield where, tokens, index.slice(start, stop - start)
            start = stop

    _write(folder, pieces(), index.schema, about)


def join_shards(folder: Path, sources: Sequence[Path], about: dict[str, Any]) -> None:
    """Write one shard folder with the pieces of several: specific ones by domain, then mixed ones; sources in order.

    One piece at a time is in memory.
    """
    opened = [open_shards(source, verify=False) for source in sources]
    found = sorted(
        (KINDS.index(piece["kind"]), piece["domain"], number, place)
        for number, source in enumerate(opened)
        for place, piece in enumerate(source.manifest["pieces"])
    )

    def pieces() -> Iterator[Piece]:
        for _, _, number, place in found:
            piece = read_piece(sources[number], opened[number].manifest, place)
            where = {key: opened[number].manifest["pieces"][place][key] for key in ("domain", "kind", "part")}
            yield where, piece.tokens, piece.documents

    _write(folder, pieces(), opened[0].documents.schema, about)


def _write(folder: Path, pieces: Iterable[Piece], schema: pa.Schema, about: dict[str, Any]) -> None:
    """Write pieces one after the other, and a manifest that lists them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = token_dtype(about["vocabulary_size"])
    listed, num_tokens, num_documents = [], 0, 0
    with (
        open(folder / TOKENS, "wb") as file,
        pq.ParquetWriter(folder / DOCUMENTS, schema, compression="zstd") as writer,
    ):
        for where, tokens, index in pieces:
            tokens.astype(dtype, copy=False).tofile(file)
            # Offsets in the whole file: the tokens before the piece, and those of its documents before each.
            offsets = num_tokens + offsets_of(index["length"].to_numpy())[:-1]
            index = index.set_column(0, schema.field(0), pa.array(offsets))
            writer.write_table(index, row_group_size=max(1, index.num_rows))
            listed.append({**where, "num_documents": index.num_rows, "num_tokens": len(tokens)})
            num_tokens += len(tokens)
            num_documents += index.num_rows
    manifest = {
        **about,
        "dtype": dtype.name,
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "pieces": listed,
        "sha256": {name: file_sha256(folder / name) for name in (TOKENS, DOCUMENTS)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_piece(folder: Path, manifest: dict[str, Any], place: int) -> Shards:
    """A piece of a shard folder, whose documents' offsets count from its own first token."""
    pieces = manifest["pieces"]
    start = sum(piece["num_tokens"] for piece in pieces[:place])
    size = pieces[place]["num_tokens"]
    dtype = DTYPES[manifest["dtype"]]
    tokens = np.fromfile(folder / TOKENS, dtype=dtype, count=size, offset=start * dtype.itemsize)
    documents = pq.ParquetFile(folder / DOCUMENTS).read_row_group(place)
    documents = documents.set_column(0, "offset", pa.array(documents["offset"].to_numpy() - start))
    return Shards(tokens, documents, manifest)


def read_shard_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard folder. Raises ShardError where it is missing or is not a manifest."""
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise ShardError(f"{path} is missing: run `cprec prepare` again for this data folder")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        assert isinstance(manifest["num_tokens"], int) and isinstance(manifest["num_documents"], int)
        _ = DTYPES[manifest["dtype"]], [manifest["sha256"][name] for name in (TOKENS, DOCUMENTS)], manifest["pieces"]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ShardError(f"{path} is not a manifest of token shards ({error!r}): run `cprec prepare` again") from error
    return manifest


TRAINING = ("offset", "length", "num_events", "target_start")
"""Columns of the index that training needs: the numbers, because the index of a large log is large."""


def open_shards(folder: Path, *, verify: bool = True, columns: Sequence[str] | None = None) -> Shards:
    """Memory-map a shard folder, and read the index: the named columns or all.

    Raises ShardError, naming the file, if one is missing, has another size, or (with `verify`) another hash.
    """
    folder = Path(folder)
    manifest = read_shard_manifest(folder)
    for name in (TOKENS, DOCUMENTS):
        if not (folder / name).is_file():
            raise ShardError(f"{folder / name} is missing: run `cprec prepare` again for this data folder")
    dtype, num_tokens = DTYPES[manifest["dtype"]], manifest["num_tokens"]
    size = (folder / TOKENS).stat().st_size
    if size != num_tokens * dtype.itemsize:
        raise ShardError(
            f"{folder / TOKENS} has {size:,} bytes but its manifest says {num_tokens:,} tokens of {dtype.name}: the "
            "file was cut or changed; run `cprec prepare` again"
        )
    for name in (TOKENS, DOCUMENTS) if verify else ():
        if file_sha256(folder / name) != manifest["sha256"][name]:
            raise ShardError(
                f"{folder / name} is not the file that {MANIFEST} describes (SHA-256 differs): it was changed after it "
                "was written; run `cprec prepare` again"
            )
    documents = pq.read_table(folder / DOCUMENTS, columns=None if columns is None else list(columns))
    if documents.num_rows != manifest["num_documents"]:
        raise ShardError(
            f"{folder / MANIFEST} says {manifest['num_documents']:,} documents but {DOCUMENTS} has "
            f"{documents.num_rows:,}: one of them was changed; run `cprec prepare` again"
        )
    tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r") if num_tokens else np.empty(0, dtype)
    return Shards(tokens, documents, manifest)
