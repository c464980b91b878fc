"""Token shards: a flat token file, a document index and a manifest with hashes. Write, verify, memory-map."""

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

from cprec.data.ragged import Ragged, gather
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
class Shards:
    """Documents of token ids, read in place.

    `documents` has one row per document: domain (empty for mixed), kind, num_events, platform, user_id, target_start
    (where the tokens that a fine-tuning loss covers begin), beside offset and length into `tokens`.
    """

    tokens: np.ndarray
    documents: pa.Table
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return self.documents.num_rows

    def column(self, name: str) -> np.ndarray:
        return self.documents[name].to_numpy()

    @property
    def rows(self) -> Ragged:
        """The documents' tokens as a ragged array over the memory-mapped file."""
        offset, length = self.column("offset"), self.column("length")
        end = offset[-1:] + length[-1:] if len(offset) else np.zeros(1, dtype=np.int64)
        return Ragged(self.tokens, np.concatenate([offset, end]).astype(np.int64))

    def take(self, documents: np.ndarray) -> Ragged:
        """The tokens of some documents, given by row number, in one gather from the file."""
        return gather(self.tokens, self.column("offset")[documents], self.column("length")[documents])

    @classmethod
    def concatenate(cls, pieces: Sequence[Shards], manifest: dict[str, Any]) -> Shards:
        """Pieces that `read_piece` gave, one after the other, in memory."""
        if not pieces:
            empty = pa.table({name: pa.array([], kind) for name, kind in INDEX.items()})
            return cls(np.empty(0, dtype=DTYPES[manifest["dtype"]]), empty, manifest)
        starts = np.cumsum([0, *(len(piece.tokens) for piece in pieces)])
        tables = [
            piece.documents.set_column(0, "offset", pa.array(piece.column("offset") + start))
            for piece, start in zip(pieces, starts, strict=False)
        ]
        return cls(np.concatenate([piece.tokens for piece in pieces]), pa.concat_tables(tables), manifest)

    @property
    def sha256(self) -> str:
        """The identity of the shards: see `manifest_sha256`."""
        return manifest_sha256(self.manifest)


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The identity of a shard folder: the hash of its manifest, which holds the hash of each file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_shards(
    folder: Path, documents: Ragged, columns: dict[str, Any], about: dict[str, Any], *, part: int = 0
) -> Shards:
    """Write documents of token ids; the folder appears complete or not at all.

    `columns` has one value per document for each column of the index, `domain` and `kind` among them; `about` goes into
    the manifest and must hold `vocabulary_size`, which decides between uint16 and uint32. Documents of one domain and
    kind that stand together are a piece: one row group of the index, listed in the manifest with `part`.
    """
    full = {"offset": documents.offsets[:-1], "length": documents.lengths, **columns}
    index = pa.table({name: pa.array(values, INDEX[name]) for name, values in full.items()})
    starts = _piece_starts(columns["domain"], columns["kind"])

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray, pa.Table]]:
        for start, stop in itertools.pairwise([*starts, len(documents)]):
            first, last = documents.offsets[start], documents.offsets[stop]
            where = {"domain": str(columns["domain"][start]), "kind": str(columns["kind"][start]), "part": part}
            yield where, documents.values[first:last], index.slice(start, stop - start)

    _write(folder, pieces(), index.schema, about)
    return open_shards(folder, verify=False)


def _piece_starts(domain: Any, kind: Any) -> list[int]:
    names = np.array([f"{k}/{d}" for k, d in zip(kind, domain, strict=True)], dtype=object)
    return [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist()] if len(names) else []


def join_shards(folder: Path, sources: Sequence[Path], about: dict[str, Any]) -> Shards:
    """One shard folder of the pieces of several: all of the first domain and kind, then the next; sources in order.

    A piece at a time is in memory. The order of domains and kinds is that in which the sources have them.
    """
    opened = [open_shards(source, verify=False) for source in sources]
    rank = {key: place for place, key in enumerate(_common_order([source.manifest["pieces"] for source in opened]))}
    found = sorted(
        (rank[piece["kind"], piece["domain"]], number, place)
        for number, source in enumerate(opened)
        for place, piece in enumerate(source.manifest["pieces"])
    )

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray, pa.Table]]:
        for _, number, place in found:
            piece = read_piece(sources[number], opened[number].manifest, place)
            where = {key: opened[number].manifest["pieces"][place][key] for key in ("domain", "kind", "part")}
            yield where, piece.tokens, piece.documents

    _write(folder, pieces(), opened[0].documents.schema, about)
    return open_shards(folder, verify=False)


def _common_order(lists: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[str, str]]:
    """Kinds and domains in order: specific ones by domain, then mixed ones."""
    keys = {(piece["kind"], piece["domain"]) for pieces in lists for piece in pieces}
    return sorted(keys, key=lambda key: (KINDS.index(key[0]), key[1]))


def _write(
    folder: Path,
    pieces: Iterable[tuple[dict[str, Any], np.ndarray, pa.Table]],
    schema: pa.Schema,
    about: dict[str, Any],
) -> None:
    """Write pieces one after the other: (what it is, its tokens, its rows of the index)."""
    temporary = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = token_dtype(about["vocabulary_size"])
    listed, num_tokens, num_documents = [], 0, 0
    with (
        open(temporary / TOKENS, "wb") as file,
        pq.ParquetWriter(temporary / DOCUMENTS, schema, compression="zstd") as writer,
    ):
        for where, tokens, index in pieces:
            tokens.astype(dtype, copy=False).tofile(file)
            lengths = index["length"].to_numpy()
            offsets = pa.array(num_tokens + np.cumsum(lengths) - lengths)
            index = index.set_column(0, schema.field(0), offsets)
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
        "sha256": {name: file_sha256(temporary / name) for name in (TOKENS, DOCUMENTS)},
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def read_piece(folder: Path, manifest: dict[str, Any], place: int) -> Shards:
    """One piece of a shard folder, with the offsets of its documents counted from its own first token."""
    pieces = manifest["pieces"]
    start = sum(piece["num_tokens"] for piece in pieces[:place])
    size = pieces[place]["num_tokens"]
    dtype = DTYPES[manifest["dtype"]]
    tokens = np.fromfile(folder / TOKENS, dtype=dtype, count=size, offset=start * dtype.itemsize)
    documents = pq.ParquetFile(folder / DOCUMENTS).read_row_group(place)
    documents = documents.set_column(0, "offset", pa.array(documents["offset"].to_numpy() - start))
    return Shards(tokens, documents, manifest)


def read_shard_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard folder. Raises ShardError where it is missing or none."""
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise ShardError(f"{path} is missing: run `cprec prepare` again for this data folder")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        assert isinstance(manifest["num_tokens"], int) and isinstance(manifest["num_documents"], int)
        _ = DTYPES[manifest["dtype"]], [manifest["sha256"][name] for name in (TOKENS, DOCUMENTS)], manifest["pieces"]
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ShardError(f"{path} is no manifest of token shards ({error!r}): run `cprec prepare` again") from error
    return manifest


TRAINING = ("offset", "length", "num_events", "target_start")
"""Columns of the index that training needs: numbers alone, for the index of a large log is large."""


def open_shards(folder: Path, *, verify: bool = True, columns: Sequence[str] | None = None) -> Shards:
    """Memory-map a shard folder; of the index, `columns` or all of it.

    Raises ShardError, naming the file, if one is missing, has another size, or (with `verify`) another hash.
    """
    folder = Path(folder)
    manifest = read_shard_manifest(folder)
    for name in (TOKENS, DOCUMENTS):
        if not (folder / name).is_file():
            raise ShardError(f"{folder / name} is missing: run `cprec prepare` again for this data folder")
    recorded, dtype, num_tokens = manifest["sha256"], DTYPES[manifest["dtype"]], manifest["num_tokens"]
    num_documents = manifest["num_documents"]
    size = (folder / TOKENS).stat().st_size
    if size != num_tokens * dtype.itemsize:
        raise ShardError(
            f"{folder / TOKENS} has {size:,} bytes but its manifest says {num_tokens:,} tokens of {dtype.name}: the "
            "file was cut or changed; run `cprec prepare` again"
        )
    for name in (TOKENS, DOCUMENTS) if verify else ():
        if file_sha256(folder / name) != recorded[name]:
            raise ShardError(
                f"{folder / name} is not the file that {MANIFEST} describes (SHA-256 differs): it was changed after it "
                "was written; run `cprec prepare` again"
            )
    documents = pq.read_table(folder / DOCUMENTS, columns=None if columns is None else list(columns))
    if documents.num_rows != num_documents:
        raise ShardError(
            f"{folder / MANIFEST} says {num_documents:,} documents but {DOCUMENTS} has {documents.num_rows:,}: one of "
            "them was changed; run `cprec prepare` again"
        )
    tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r") if num_tokens else np.empty(0, dtype)
    return Shards(tokens, documents, manifest)
