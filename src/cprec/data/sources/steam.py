"""Steam (UCSD, version 2): reviews with their day, and games; one Python literal a line.

Version 1 (`australian_users_items.json.gz`) has hours of play without a time or an order, and is not read. Unpacked,
the reviews are called `steam_new.json`.
"""

from __future__ import annotations

from cprec.data.sources.readers import Format, python_literals, renamed

REVIEW = ("username", "product_id", "date", "hours")
GAME = ("id", "title", "app_name", "publisher", "genres", "price")

FORMATS = {
    "steam": Format(
        interactions=python_literals(*REVIEW),
        items=renamed(python_literals(*GAME), product_id="id"),
        timestamps="iso",
        columns={"user_id": "username", "item_id": "product_id", "title": "app_name", "brand": "publisher"},
    )
}
