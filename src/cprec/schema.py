"""Column names of every table, and the frozen records that the stages exchange.

Identity: a user is (platform, user_id), the same person in every domain of one platform; an item is (domain, item_id).
Ids are text, kept as given, never renumbered. This module imports nothing but the standard library.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from uuid import UUID

USER_ID = "user_id"
ITEM_ID = "item_id"
DOMAIN = "domain"
PLATFORM = "platform"
TIMESTAMP = "timestamp"
MICROSECOND = "microsecond"
RATING = "rating"
ORDER = "order"
SPLIT = "split"
TITLE = "title"
BRAND = "brand"
CATEGORIES = "categories"
DESCRIPTION = "description"
PRICE = "price"

ITEM_COLUMNS = (ITEM_ID, DOMAIN, TITLE, BRAND, CATEGORIES, DESCRIPTION, PRICE)
INTERACTION_COLUMNS = (USER_ID, ITEM_ID, DOMAIN, TIMESTAMP, MICROSECOND, RATING, ORDER)

TRAIN, VALIDATION, TEST, CONTEXT = "train", "validation", "test", "context"
SPLITS = (TRAIN, VALIDATION, TEST, CONTEXT)
"""What an event is for; stored as an int8 code, the position in this tuple. Context is what an unseen user did before
the held-out events: shown as history, never learnt from."""

SPECIFIC, MIXED = "specific", "mixed"
KINDS = (SPECIFIC, MIXED)
"""Behaviour sequences of one domain, and of all domains of a platform in time order."""

SCHEMA_VERSION = 2


MAX_WHOLE = 1 << 53
"""Whole numbers below have all their digits as a float."""


def id_text(value: object) -> str | None:
    """An id, or any cell that names something, as text: the rule that the readers of logs apply to whole columns.

    Text stays as it is, and whole numbers have no decimal point, whatever type they were read as. None where there is
    no value: null, NaN, infinity, blank text. Raises TypeError for what is no single value.

    >>> id_text("007"), id_text(12.0), id_text(Decimal("12.00")), id_text(float("nan")), id_text(" ")
    ('007', '12', '12', None, None)
    """
    if value is None or isinstance(value, str):
        return str(value) if value and not value.isspace() else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, Decimal):
        return re.sub(r"\.0+$", "", format(value, "f")) if value.is_finite() else None
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return None
        return str(int(number)) if abs(number) < MAX_WHOLE and number.is_integer() else repr(number)
    if isinstance(value, (date, UUID)):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}: give text or a whole number")


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a catalogue, by its identity."""

    domain: str
    item_id: str


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """What is known of a domain beyond its rows."""

    name: str
    platform: str
    has_times: bool
    """False where the timestamps only order one user's events, so that they cannot be compared between domains."""
