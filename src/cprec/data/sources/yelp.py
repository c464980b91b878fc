"""Yelp Open Dataset: reviews and businesses, one JSON object a line; times are in UTC."""

from __future__ import annotations

from typing import Any

from cprec.data.sources.readers import json_lines

FORMATS: dict[str, dict[str, Any]] = {
    "yelp": {
        "platform": "yelp",
        "interactions": ("yelp_academic_dataset_review.json", "review.json"),
        "items": ("yelp_academic_dataset_business.json", "business.json"),
        "read_interactions": json_lines("user_id", "business_id", "date", "stars"),
        "read_items": json_lines("business_id", "name", "categories"),
        "timestamps": "iso",
        "columns": {"item_id": "business_id"},
        "licence": "Yelp Open Dataset: for academic use under Yelp's own terms, to which you agree before the download",
        "page": "https://business.yelp.com/data/resources/open-dataset/",
    },
}
