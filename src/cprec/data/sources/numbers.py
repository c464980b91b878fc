"""Numbers as people write them: 12.5 or 12,5, 1,234.50 or 1.234,50, with a currency before or behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cprec.data.config import DecimalSign

if TYPE_CHECKING:
    from cprec.data.engine import TableEngine

NO_VALUE = ("", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nil", "\\n", "-", "--")
"""Texts that mean that there is no number, upper and lower case alike."""

_BLANK = "[\\s\u00a0\u2009\u202f]"
_CURRENCY = r"(?:[A-Z]{3}|[A-Z]{0,2}\p{Sc}|kr\.?|zł|Kč|Ft|Rs\.?|Fr\.?)"
_AROUND = f"^{_BLANK}*(?:{_CURRENCY}{_BLANK}*)?|(?:{_BLANK}*{_CURRENCY})?{_BLANK}*$"
_SPACE = " '’\u00a0\u2009\u202f"
"""Between thousands, whatever the decimal sign is."""


@dataclass(frozen=True)
class Numbers:
    """A column read as numbers."""

    values: Any
    """float64 expression of the column's table; null where there is no number."""
    num_unread: int = 0
    """Cells that hold something, but no number that has one meaning."""
    num_unclear: int = 0
    """Of the unread: how many are one number with a decimal point and another with a decimal comma, as 1,234."""
    unread: str = ""
    """One that is no number."""
    unclear: str = ""
    """One that is unclear."""
    comma: str = ""
    """A value whose comma was taken for the decimal sign, where auto found that out."""


def read_numbers(engine: TableEngine, table: Any, column: str | None, decimal: DecimalSign) -> Numbers:
    """A column of numbers, or of text that holds them.

    With `auto` a text that is a number with one of the two decimal signs only, as 12,50 or 1.234,50, is that number.
    What would be another number with the other sign, as 1,234, is read as the rest of the column is: where all that is
    clear has the same sign, by that one; where nothing is clear, a point is decimal; else it is unread.
    """
    import ibis

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
    point, comma = _reading(bare, ".", ","), _reading(bare, ",", ".")
    only_comma = comma.notnull() & point.isnull()
    if decimal == "auto":
        has_two = point.notnull() & comma.notnull() & (point != comma)
        clear = table.aggregate(
            commas=only_comma.sum(), points=(point.notnull() & comma.isnull()).sum(), comma=text.max(where=only_comma)
        )
        found = engine.to_arrow(clear).to_pylist()[0]
        if not found["commas"]:
            is_clear = ibis.literal(True) if found["points"] else plain.notnull()
            values = ibis.ifelse(has_two & ~is_clear, ibis.null("float64"), point)
        elif not found["points"]:
            values = comma
        else:
            values = ibis.ifelse(has_two, ibis.null("float64"), ibis.coalesce(point, comma))
    else:
        has_two, found = ibis.literal(False), {"comma": None}
        values = point if decimal == "." else comma
    is_unread = there & values.isnull()
    summary = table.aggregate(
        num_unread=is_unread.sum(),
        num_unclear=(is_unread & has_two).sum(),
        unread=text.max(where=is_unread & ~has_two),
        unclear=text.max(where=is_unread & has_two),
    )
    counts = engine.to_arrow(summary).to_pylist()[0]
    counts = {name: count or type(getattr(Numbers, name))() for name, count in counts.items()}
    return Numbers(values, comma=found["comma"] or "", **counts)


def _reading(bare: Any, point: str, comma: str) -> Any:
    """Text as a number with `point` before its decimals, and `comma`, blanks or apostrophes between thousands."""
    import ibis

    whole = rf"(?:\d+|[1-9]\d{{0,2}}(?:[{comma}]\d{{2,3}})*[{comma}]\d{{3}}|[1-9]\d{{0,2}}(?:[{_SPACE}]\d{{3}})+)"
    pattern = rf"^[+-]?(?:{whole}(?:[{point}]\d*)?|[{point}]\d+)(?:[eE][+-]?\d+)?$"
    digits = bare.re_replace(f"[{comma}{_SPACE}]", "").replace(point, ".")
    return _finite(ibis.ifelse(bare.re_search(pattern), digits, ibis.null("string")).try_cast("float64"))


def _finite(number: Any) -> Any:
    import ibis

    return ibis.ifelse(number.isnan() | number.isinf(), ibis.null("float64"), number)
