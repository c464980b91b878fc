"""RecBole's atomic files: X.inter and X.item, tab-separated, with types in the header (user_id:token)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cprec.data.sources.tables import (
    DEFAULT_NAMES,
    INTERACTION_FIELDS,
    SourceTables,
    TableFiles,
    TimeFormat,
    canonical_tables,
    check_names,
    find_columns,
    matching_files,
    read_files,
)
from cprec.errors import ConfigError
from cprec.schema import TIMESTAMP

if TYPE_CHECKING:
    from cprec.data.engine import TableEngine


@dataclass(frozen=True, kw_only=True)
class RecBoleSource:
    """One domain in RecBole's atomic files."""

    domain: str
    """Name of the domain: letters, digits, _ - and dots."""
    platform: str = "default"
    """Users of one platform are the same people in all its domains."""
    prefix: str
    """The files without .inter and .item, as dataset/ml-100k/ml-100k."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where canonical columns have another name in the files (without its type), as title:movie_name."""
    timestamps: TimeFormat = "auto"
    """seconds, milliseconds, iso, order, or auto; a log without a timestamp column is taken to be in order."""

    def __post_init__(self) -> None:
        check_names(self.domain, self.platform)
        if self.timestamps not in get_args(TimeFormat):
            raise ConfigError(f"timestamps={self.timestamps!r}: expected {', '.join(get_args(TimeFormat))}")
        unknown = sorted(set(self.columns) - set(DEFAULT_NAMES))
        if unknown:
            raise ConfigError(f"columns maps {', '.join(unknown)}; canonical columns are {', '.join(DEFAULT_NAMES)}")
        object.__setattr__(self, "prefix", str(self.prefix))

    def load(self, engine: TableEngine) -> SourceTables:
        """The rows of both files. Raises DataError for a missing file or column."""
        log, items = (
            read_files(engine, self.domain, what, form, typed_header=True)
            for what, form in (
                ("interactions", TableFiles(path=f"{self.prefix}.inter", separator="\t", quote="")),
                ("items", TableFiles(path=f"{self.prefix}.item", separator="\t", quote="")),
            )
        )
        timestamps = self.timestamps
        if timestamps == "auto" and TIMESTAMP not in find_columns(
            self.domain, log, INTERACTION_FIELDS, self.columns, required=()
        ):
            timestamps = "order"
        return canonical_tables(engine, self.domain, log, items, self.columns, timestamps, items_in_log=False)

    def files(self) -> dict[str, list[Path]]:
        """The files of each table (interactions, items) that are there now."""
        return {
            "interactions": matching_files(self.prefix + ".inter"),
            "items": matching_files(self.prefix + ".item"),
        }
