"""Parquet files of an evaluation: written whole or not at all, and read with a clear error."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cprec.errors import DataError
from cprec.files import whole_file


def read_saved(path: Path, remedy: str) -> pa.Table:
    """The table of a file. Raises DataError, which ends with the `remedy`, where it is damaged."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read ({error}): {remedy}") from None


def write_saved(table: pa.Table, path: Path) -> None:
    """Write a table; a file that was there stays as it is until the new one is complete."""
    with whole_file(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
