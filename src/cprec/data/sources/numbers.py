"""Numbers as people write them: 12.5 or 12,5, 1,234.50 or 1.234,50, with a currency before or behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ibis

from cprec.data.config import DecimalSign
from cprec.data.engine import TableEngine
from cprec.schema import MAX_WHOLE

NO_VALUE = ("", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nil", "\\n", "-", "--")
"""Texts that mean that there is no number, upper and lower case alike."""

_BLANK = "[\\s\u00a0\u2009\u202f]"
_CURRENCY = r"(?:[A-Z]{3}|[A-Z]{0,2}\p{Sc}|kr\.?|zł|Kč|Ft|Rs\.?|Fr\.?)"
_AROUND = f"^{_BLANK}*(?:{_CURRENCY}{_BLANK}*)?|(?:{_BLANK}*{_CURRENCY})?{_BLANK}*$"
"""Blanks and a currency before or behind a number."""
_SPACE = " '’\u00a0\u2009\u202f"
"""Between thousands, whatever the decimal sign is."""


@dataclass(frozen=True)
class Numbers:
    """A column read as numbers."""

    values: Any
    """float64 expression of the column's table; null where there is no number."""
    num_unread: int = 0
    """Cells that are not empty, and are no number or an ambiguous one."""
    num_unclear: int = 0
    """Of the unread: how many are one number with a decimal point and another with a decimal comma, as 1,234."""
    unread: str = ""
    """One that is not a number."""
    unclear: str = ""
    """One that is unclear."""
    comma: str = ""
    """A value whose comma was taken for the decimal sign, where auto found that out."""


def read_numbers(engine: TableEngine, table: Any, column: str | None, decimal: DecimalSign) -> Numbers:
    """A column of numbers, or of text that holds them.

    With `auto` a text that is a number with one of the two decimal signs only, as 12,50 or 1.234,50, is that number.
    A text that would be another number with the other sign, as 1,234, is read as the rest of the column is: where all
    clear numbers have the same sign, by that one; where nothing is clear, a point is decimal; else it is unread.
    """
    if column is None:
        return Numbers(ibis.null("float64"))
    value = table[column]
    if value.type().is_numeric() or value.type().is_boolean():
        return Numbers(_finite(value.try_cast("float64")))
    text = value if value.type().is_string() else value.cast("string")
    there = ~text.strip().lower().isin(NO_VALUE)
    plain = _finite(text.try_cast("float64"))
    if decimal != ",":
        # A case looks at the text only where there is no number: this runs over every row of a log.
        unread = ibis.ifelse(plain.isnull() & text.notnull(), there, False)
        if not engine.value(unread.sum()):
            return Numbers(plain)
    bare = text.re_replace(_AROUND, "")
    point, comma = _number(bare, ".", ","), _number(bare, ",", ".")
    if decimal != "auto":
        return _counted(engine, table, Numbers(point if decimal == "." else comma), text, there, ibis.literal(False))
    has_two = point.notnull() & comma.notnull() & (point != comma)
    found = _read_by_the_rest(engine, table, text, plain, point, comma)
    return _counted(engine, table, found, text, there, has_two)


def _read_by_the_rest(engine: TableEngine, table: Any, text: Any, plain: Any, point: Any, comma: Any) -> Numbers:
    """The numbers of a column whose decimal sign is not known, by the signs of those that are clear.

    `plain` is the text as a number of the engine's own form, `point` and `comma` are the text read with each sign.
    """
    has_two = point.notnull() & comma.notnull() & (point != comma)
    only_comma = comma.notnull() & point.isnull()
    only_point = point.notnull() & comma.isnull()
    clear = table.aggregate(commas=only_comma.sum(), points=only_point.sum(), comma=text.max(where=only_comma))
    found = engine.row(clear)
    none = ibis.null("float64")
    if not found["commas"]:
        is_clear = ibis.literal(True) if found["points"] else plain.notnull()
        return Numbers(ibis.ifelse(has_two & ~is_clear, none, point))
    values = ibis.ifelse(has_two, none, ibis.coalesce(point, comma)) if found["points"] else comma
    return Numbers(values, comma=found["comma"])


def _counted(engine: TableEngine, table: Any, numbers: Numbers, text: Any, there: Any, has_two: Any) -> Numbers:
    """Numbers with counts and examples of the cells that are not read; `there` says which cells hold something."""
    is_unread = there & numbers.values.isnull()
    summary = table.aggregate(
        num_unread=is_unread.sum(),
        num_unclear=(is_unread & has_two).sum(),
        unread=text.max(where=is_unread & ~has_two),
        unclear=text.max(where=is_unread & has_two),
    )
    counts = engine.row(summary)
    return replace(numbers, **{name: count for name, count in counts.items() if count})


def exact(number: Any) -> Any:
    """A float where its whole part has all its digits, else null: of NaN and infinity too, which have no floor."""
    # Parquet's statistics know no NaN, and engines that trust them take the comparison alone for true.
    has_all_digits = ~number.isnan() & (number.abs() < float(MAX_WHOLE))
    return ibis.ifelse(has_all_digits, number, ibis.null("float64")).cast("float64")


def _number(bare: Any, point: str, comma: str) -> Any:
    """Text as a number with `point` before its decimals, and `comma`, blanks or apostrophes between thousands."""
    # Digits alone; groups of two or three digits between commas (Indian numbers have both); groups of three between
    # blanks. Then decimals and an exponent, or decimals alone.
    whole = rf"(?:\d+|[1-9]\d{{0,2}}(?:[{comma}]\d{{2,3}})*[{comma}]\d{{3}}|[1-9]\d{{0,2}}(?:[{_SPACE}]\d{{3}})+)"
    pattern = rf"^[+-]?(?:{whole}(?:[{point}]\d*)?|[{point}]\d+)(?:[eE][+-]?\d+)?$"
    digits = bare.re_replace(f"[{comma}{_SPACE}]", "").replace(point, ".")
    return _finite(ibis.ifelse(bare.re_search(pattern), digits, ibis.null("string")).try_cast("float64"))


def _finite(number: Any) -> Any:
    return ibis.ifelse(number.isnan() | number.isinf(), ibis.null("float64"), number)
