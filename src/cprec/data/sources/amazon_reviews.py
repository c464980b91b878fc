"""Amazon Reviews of 2014, 2018 and 2023 (McAuley Lab, UCSD): one review or product a line.

Reviews are JSON in all years. The metadata of 2014 are Python literals. Times are seconds in 2014 and 2018 (whole
days), milliseconds in 2023, which also has `parent_asin`, the product whatever its colour or size. Some titles of 2018
are scripts of the page in place of a title, and count as missing.
"""

from __future__ import annotations

from typing import Any

from cprec.data.sources.readers import changed, json_lines, python_literals

REVIEW = ("reviewerID", "asin", "unixReviewTime", "overall")
REVIEW_2023 = ("user_id", "parent_asin", "timestamp", "rating")
PRODUCT_2014 = ("asin", "title", "brand", "categories", "description", "price")
PRODUCT_2018 = ("asin", "title", "brand", "category", "description", "price")
PRODUCT_2023 = ("parent_asin", "title", "store", "categories", "description", "price")


def _without_scripts(products: Any) -> Any:
    import ibis

    title = products["title"]
    return products.mutate(title=ibis.ifelse(title.contains("getTime"), ibis.null("string"), title))


_LICENCE = (
    "Amazon review data (McAuley Lab, UCSD) state no licence: published for research; cite the papers named on their "
    "page"
)
_UCSD_2014 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon"
_UCSD_2018 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"
_UCSD_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw"

FORMATS: dict[str, dict[str, Any]] = {
    "amazon-2014": {
        "platform": "amazon",
        "interactions": (
            "reviews_{category}_5.json.gz",
            "reviews_{category}_5.json",
            "reviews_{category}.json.gz",
            "reviews_{category}.json",
        ),
        "items": ("meta_{category}.json.gz", "meta_{category}.json"),
        "read_interactions": json_lines(*REVIEW),
        "read_items": python_literals(*PRODUCT_2014),
        "timestamps": "seconds",
        "licence": _LICENCE,
        "urls": (
            f"{_UCSD_2014}/categoryFiles/reviews_{{category}}_5.json.gz",
            f"{_UCSD_2014}/categoryFiles/meta_{{category}}.json.gz",
        ),
        "page": "https://jmcauley.ucsd.edu/data/amazon/",
    },
    "amazon-2018": {
        "platform": "amazon",
        "interactions": (
            "{category}_5.json.gz",
            "{category}_5.json",
            "{category}.json.gz",
            "{category}.json",
        ),
        "items": ("meta_{category}.json.gz", "meta_{category}.json"),
        "read_interactions": json_lines(*REVIEW),
        "read_items": changed(json_lines(*PRODUCT_2018), _without_scripts),
        "timestamps": "seconds",
        "licence": _LICENCE,
        "urls": (
            f"{_UCSD_2018}/categoryFilesSmall/{{category}}_5.json.gz",
            f"{_UCSD_2018}/metaFiles2/meta_{{category}}.json.gz",
        ),
        "page": "https://nijianmo.github.io/amazon/",
    },
    "amazon-2023": {
        "platform": "amazon",
        "interactions": ("{category}.jsonl.gz", "{category}.jsonl"),
        "items": ("meta_{category}.jsonl.gz", "meta_{category}.jsonl"),
        "read_interactions": json_lines(*REVIEW_2023),
        "read_items": json_lines(*PRODUCT_2023),
        "timestamps": "milliseconds",
        "licence": _LICENCE,
        "urls": (
            f"{_UCSD_2023}/review_categories/{{category}}.jsonl.gz",
            f"{_UCSD_2023}/meta_categories/meta_{{category}}.jsonl.gz",
        ),
        "page": "https://amazon-reviews-2023.github.io/",
    },
}
