"""Tables that are in memory already: a generated world, or the result of a query."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import ibis
import pyarrow as pa

from cprec.data.config import check_names
from cprec.data.engine import TableEngine
from cprec.data.sources.raw import RawTable
from cprec.data.sources.tables import SourceTables, canonical_tables
from cprec.data.text_files import LINE


@dataclass(frozen=True)
class MemorySource:
    """One domain in two Arrow tables with canonical column names."""

    domain: str
    platform: str
    items: pa.Table
    """item_id, title; optionally brand, categories, description, price."""
    interactions: pa.Table
    """user_id, item_id, timestamp (seconds UTC, or a position); optionally rating, order."""
    has_times: bool = True

    def __post_init__(self) -> None:
        check_names(self.domain, self.platform)


def load(engine: TableEngine, source: MemorySource) -> SourceTables:
    """The rows of both tables. Raises DataError for a missing column."""
    raw, hashes = [], {}
    for what, table in (("interactions", source.interactions), ("items", source.items)):
        place = f"memory/{source.domain}/{what}"
        rows = engine.from_arrow(table.append_column(LINE, pa.array(range(1, table.num_rows + 1), pa.int64())))
        rows = rows.mutate(ibis.literal(place).name("source_file"), rows[LINE].name("sequence"))
        raw.append(RawTable(what, rows, tuple(table.column_names), (), (Path(place),)))
        hashes[place] = _sha256(table)
    (log, items), timestamps = raw, "seconds" if source.has_times else "order"
    return replace(canonical_tables(engine, source.domain, log, items, {}, timestamps), files=(), hashes=hashes)


def _sha256(table: pa.Table) -> str:
    """SHA-256 of a table's values as an Arrow stream of one batch: the same for equal tables however they were cut."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
            writer.write_batch(batch)
    return hashlib.sha256(sink.getvalue()).hexdigest()
