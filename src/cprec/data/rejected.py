"""Rows that cannot be used: why, and the file that keeps them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError

REJECTED = "rejected.parquet"

NO_USER = "no user id"
NO_ITEM = "no item id"
BAD_TIME = "timestamp cannot be read"
UNKNOWN_ITEM = "item is not in the items table"
TITLELESS_ITEM = "item has no title"
NO_TITLE = "title without a word"
EMPTIED = "title without a word once it is cleaned"
TWICE = "item id occurs before"
CONFLICT = "item id occurs before with another title"

_SCHEMA = pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("row", pa.string())])


class RejectedRows:
    """`rejected.parquet` while it is written; memory holds one batch."""

    def __init__(self, path: Path, strict: bool) -> None:
        self._strict = strict
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="zstd")

    def __enter__(self) -> RejectedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, batches: Iterable[pa.RecordBatch]) -> Counter[str]:
        """Keep rows (file, line, reason, row) and count them by reason. Raises DataError at the first one if strict."""
        counts: Counter[str] = Counter()
        for batch in batches:
            rows = pa.Table.from_batches([batch]).select(_SCHEMA.names).cast(_SCHEMA)
            if rows.num_rows and self._strict:
                first = rows.slice(0, 1).to_pylist()[0]
                raise DataError(
                    f"{first['file']}, line {first['line']}: {first['reason']}: {first['row']} (strict stops at the "
                    "first bad row)"
                )
            self._writer.write_table(rows)
            for entry in rows["reason"].value_counts().to_pylist():
                counts[entry["values"]] += entry["counts"]
        return counts
