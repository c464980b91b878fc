"""Column names of every table, and the frozen records that the stages exchange.

Identity: a user is (platform, user_id), the same person in every domain of one platform; an item is (domain, item_id).
Ids are text, kept as given, never renumbered. This module imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass

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
