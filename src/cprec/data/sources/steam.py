"""Steam (UCSD, version 2): reviews with their day, and games; one Python literal a line.

Version 1 (`australian_users_items.json.gz`) has hours of play without a time or an order, and is not read. Unpacked,
the reviews are called `steam_new.json`.
"""

from __future__ import annotations

from typing import Any

from cprec.data.sources.readers import python_literals, renamed

REVIEW = ("username", "product_id", "date", "hours")
GAME = ("id", "title", "app_name", "publisher", "genres", "price")

FORMATS: dict[str, dict[str, Any]] = {
    "steam": {
        "platform": "steam",
        "interactions": ("steam_reviews.json.gz", "steam_new.json.gz", "steam_reviews.json", "steam_new.json"),
        "items": ("steam_games.json.gz", "steam_games.json"),
        "read_interactions": python_literals(*REVIEW),
        "read_items": renamed(python_literals(*GAME), product_id="id"),
        "timestamps": "iso",
        "columns": {"user_id": "username", "item_id": "product_id", "title": "app_name", "brand": "publisher"},
        "licence": "Steam reviews (UCSD) are crawled and state no licence: for research; cite the papers named there",
        "urls": (
            "https://cseweb.ucsd.edu/~wckang/steam_reviews.json.gz",
            "https://cseweb.ucsd.edu/~wckang/steam_games.json.gz",
        ),
        "page": "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
    },
}
