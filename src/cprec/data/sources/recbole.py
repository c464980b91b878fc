"""RecBole's atomic files: X.inter and X.item, tab-separated, with types in the header (user_id:token)."""

from __future__ import annotations

from cprec.data.config import INTERACTION_FIELDS, RecBoleSource
from cprec.data.engine import TableEngine
from cprec.data.sources.columns import find_columns
from cprec.data.sources.table_files import read_files
from cprec.data.sources.tables import SourceTables, canonical_tables
from cprec.schema import TIMESTAMP


def load(engine: TableEngine, source: RecBoleSource) -> SourceTables:
    """The rows of both files. Raises DataError for a missing file or column."""
    read = {
        name: read_files(engine, source.domain, name, form, typed_header=True) for name, form in source.forms().items()
    }
    log, timestamps = read["interactions"], source.timestamps
    has_time = TIMESTAMP in find_columns(source.domain, log, INTERACTION_FIELDS, source.columns, required=())
    if timestamps == "auto" and not has_time:
        timestamps = "order"
    return canonical_tables(engine, source.domain, log, read["items"], source.columns, timestamps)
