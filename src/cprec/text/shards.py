"""Token shards: a flat token file, a document index and a manifest with hashes. Write, verify, memory-map."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cprec.data.ragged import Ragged
from cprec.errors import ShardError
from cprec.provenance import file_sha256

TOKENS, DOCUMENTS, MANIFEST = "tokens.bin", "documents.parquet", "manifest.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


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

    @property
    def sha256(self) -> str:
        """Identity of the shard: the hash of its manifest, which holds the hash of each file."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()


def write_shards(folder: Path, documents: Ragged, columns: dict[str, Any], about: dict[str, Any]) -> Shards:
    """Write documents of token ids; the folder appears complete or not at all.

    `columns` has one value per document for each column of the index; `about` goes into the manifest and must hold
    `vocabulary_size`, which decides between uint16 and uint32.
    """
    temporary = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = DTYPES["uint16" if about["vocabulary_size"] <= 1 << 16 else "uint32"]
    documents.values.astype(dtype).tofile(temporary / TOKENS)
    index = pa.table({"offset": documents.offsets[:-1], "length": documents.lengths, **columns})
    pq.write_table(index, temporary / DOCUMENTS, compression="zstd")
    manifest = {
        **about,
        "dtype": dtype.name,
        "num_documents": len(documents),
        "num_tokens": int(documents.offsets[-1]),
        "sha256": {name: file_sha256(temporary / name) for name in (TOKENS, DOCUMENTS)},
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return open_shards(folder, verify=False)


def open_shards(folder: Path, *, verify: bool = True) -> Shards:
    """Memory-map a shard folder.

    Raises ShardError, naming the file, if one is missing, has another size, or (with `verify`) another hash.
    """
    folder = Path(folder)
    for name in (MANIFEST, TOKENS, DOCUMENTS):
        if not (folder / name).is_file():
            raise ShardError(f"{folder / name} is missing: run `cprec prepare` again for this data folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        recorded = {name: str(manifest["sha256"][name]) for name in (TOKENS, DOCUMENTS)}
        dtype, num_tokens = DTYPES[manifest["dtype"]], int(manifest["num_tokens"])
        num_documents = int(manifest["num_documents"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{folder / MANIFEST} is no manifest of token shards ({error!r}): run `cprec prepare` again"
        ) from error
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
    documents = pq.read_table(folder / DOCUMENTS)
    if documents.num_rows != num_documents:
        raise ShardError(
            f"{folder / MANIFEST} says {num_documents:,} documents but {DOCUMENTS} has {documents.num_rows:,}: one of "
            "them was changed; run `cprec prepare` again"
        )
    tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r") if num_tokens else np.empty(0, dtype)
    return Shards(tokens, documents, manifest)
