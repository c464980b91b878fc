"""Finds the source's column for each canonical one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cprec.data.sources.raw import RawTable
from cprec.errors import DataError
from cprec.schema import BRAND, CATEGORIES, DESCRIPTION, ITEM_ID, ORDER, PRICE, RATING, TIMESTAMP, TITLE, USER_ID

DEFAULT_NAMES: dict[str, tuple[str, ...]] = {
    USER_ID: ("user_id", "user", "userId", "uid", "reviewerID", "customer_id", "visitorid"),
    ITEM_ID: ("item_id", "item", "itemId", "iid", "parent_asin", "asin", "product_id", "movieId", "itemid"),
    TIMESTAMP: ("timestamp", "time", "datetime", "date", "unixReviewTime", "event_time"),
    RATING: ("rating", "ratings", "overall", "stars", "score"),
    ORDER: ("order", "position"),
    TITLE: ("title", "item_title", "name", "item_name", "product_name", "movie_title"),
    BRAND: ("brand", "store"),
    CATEGORIES: ("categories", "category", "genres", "genre", "class"),
    DESCRIPTION: ("description",),
    PRICE: ("price",),
}
"""Names under which a column is found without being mapped, the first one that is there; upper and lower case alike."""

SINGLE_VALUES = (USER_ID, ITEM_ID, TIMESTAMP, TITLE)
"""Canonical columns that hold one value, never a list or an object."""

_DATUM = re.compile(r"[+-]?\d+([.,]\d+)*|\d{4}-\d\d?-\d\d?([ T].*)?")
"""A number or a date."""


def find_columns(
    domain: str, raw: RawTable, fields: Sequence[str], mapping: Mapping[str, str], required: Sequence[str]
) -> dict[str, str]:
    """The source column of each canonical one: the one mapped, or the first default name that is there.

    Databases fold names to upper or lower case: a name that is not there exactly so is found in another case.

    Raises DataError for a required column that is not found, and where several could be meant.
    """
    found: dict[str, str] = {}
    for name in fields:
        wanted = (mapping[name],) if name in mapping else DEFAULT_NAMES[name]
        columns = next(filter(None, (_named(raw.columns, alias) for alias in wanted)), [])
        if len(columns) > 1:
            raise DataError(
                f"{raw.files[0]}: {' and '.join(map(repr, columns))} of the {raw.what} of domain {domain!r} may each "
                f"be meant by {name}: give the columns different names, or map the right one: "
                f"{raw.key}columns.{name}=COLUMN"
            )
        if columns:
            found[name] = columns[0]
        elif name in mapping or name in required:
            raise missing_column(domain, raw, name, mapped=mapping.get(name))
    return found


def _named(columns: Sequence[str], name: str) -> list[str]:
    """The columns of a name, or, where there is none, of that name in another case."""
    return [other for other in columns if other == name] or [
        other for other in columns if other.lower() == name.lower()
    ]


def missing_column(
    domain: str, raw: RawTable, name: str, *, mapped: str | None = None, otherwise: str = ""
) -> DataError:
    """The error for a column that is not found, with the names that were looked for."""
    looked_for = repr(mapped) if mapped else " or ".join(map(repr, DEFAULT_NAMES[name]))
    hint = ""
    if raw.what == "items" and name == TITLE:
        hint = "; every item needs a title, because it is what a language model reads"
    no_header = no_header_hint(raw.columns, raw.key)
    return DataError(
        f"{raw.files[0]}: no column for {name} (looked for {looked_for}); the {raw.what} of domain {domain!r} have "
        f"{', '.join(map(repr, raw.columns))}"
        + (no_header or f". Map it: {raw.key}columns.{name}=COLUMN{otherwise}{hint}")
    )


def no_header_hint(names: Sequence[str], key: str) -> str:
    """A hint for names that look like a row, with numbers or dates in it.

    Empty where `key`, which stands before the names of the table's settings, says that it has none.
    """
    if not key or not any(_DATUM.fullmatch(name.strip()) for name in names):
        return ""
    return (
        f". That looks like a row: where a file has no header, say what its {len(names)} columns are, in order, as "
        f"{key}names=user_id,item_id,timestamp for three"
    )


def check_types(domain: str, raw: RawTable, found: Mapping[str, str]) -> None:
    """Raise DataError where a column that must hold one value holds lists, structs or bytes."""
    for name in SINGLE_VALUES:
        if name not in found:
            continue
        kind = raw.table[found[name]].type()
        is_joined = name == TITLE and kind.is_array() and kind.value_type.is_string()
        if not is_joined and (kind.is_nested() or kind.is_binary()):
            raise DataError(
                f"{raw.files[0]}: column {found[name]!r} holds {kind}, and {name} (domain {domain!r}) must be text or "
                f"numbers: write it as such, or map another column: {raw.key}columns.{name}=COLUMN"
            )
