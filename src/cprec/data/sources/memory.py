"""Tables that are in memory already: a generated world, or the result of a query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cprec.data.sources.tables import RawTable, SourceTables, canonical_tables

if TYPE_CHECKING:
    import pyarrow as pa

    from cprec.data.engine import TableEngine


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


def load(engine: TableEngine, source: MemorySource) -> SourceTables:
    """The rows of both tables. Raises DataError for a missing column."""
    from dataclasses import replace
    from pathlib import Path

    import ibis

    from cprec.data.text_files import LINE

    raw = []
    for what, table in (("interactions", source.interactions), ("items", source.items)):
        numbered = table.append_column(LINE, [_numbers(table.num_rows)])
        rows = engine.from_arrow(numbered)
        place = f"memory/{source.domain}/{what}"
        rows = rows.mutate(ibis.literal(place).name("source_file"), rows[LINE].name("sequence"))
        raw.append(RawTable(what, rows, tuple(table.column_names), (), (Path(place),)))
    tables = canonical_tables(
        engine,
        source.domain,
        raw[0],
        raw[1],
        {},
        "seconds" if source.has_times else "order",
        items_in_log=False,
    )
    hashes = {f"memory/{source.domain}/interactions": _sha256(source.interactions)}
    hashes[f"memory/{source.domain}/items"] = _sha256(source.items)
    return replace(tables, files=(), hashes=hashes)


def _numbers(count: int) -> pa.Array:
    import pyarrow as pa

    return pa.array(range(1, count + 1), pa.int64())


def _sha256(table: pa.Table) -> str:
    """SHA-256 of a table's values as an Arrow stream of one batch: the same for equal tables however they were cut."""
    import hashlib

    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
            writer.write_batch(batch)
    return hashlib.sha256(sink.getvalue()).hexdigest()
