"""Yelp Open Dataset: reviews and businesses, one JSON object a line; times are in UTC."""

from __future__ import annotations

from cprec.data.sources.readers import Format, json_lines

FORMATS = {
    "yelp": Format(
        interactions=json_lines("user_id", "business_id", "date", "stars"),
        items=json_lines("business_id", "name", "categories"),
        timestamps="iso",
        columns={"item_id": "business_id"},
    )
}
