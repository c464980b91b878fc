"""Amazon Reviews of 2014, 2018 and 2023 (McAuley Lab, UCSD): one review or product a line.

Reviews are JSON in all years. The metadata of 2014 are Python literals. Times are seconds in 2014 and 2018 (whole
days), milliseconds in 2023, which also has `parent_asin`, the product whatever its colour or size. Some titles of 2018
are scripts of the page in place of a title, and count as missing.
"""

from __future__ import annotations

from typing import Any

import ibis

from cprec.data.sources.readers import Format, changed, json_lines, python_literals

REVIEW = ("reviewerID", "asin", "unixReviewTime", "overall")
REVIEW_2023 = ("user_id", "parent_asin", "timestamp", "rating")
PRODUCT_2014 = ("asin", "title", "brand", "categories", "description", "price")
PRODUCT_2018 = ("asin", "title", "brand", "category", "description", "price")
PRODUCT_2023 = ("parent_asin", "title", "store", "categories", "description", "price")


def _without_scripts(products: Any) -> Any:
    title = products["title"]
    return products.mutate(title=ibis.ifelse(title.contains("getTime"), ibis.null("string"), title))


FORMATS = {
    "amazon-2014": Format(interactions=json_lines(*REVIEW), items=python_literals(*PRODUCT_2014), timestamps="seconds"),
    "amazon-2018": Format(
        interactions=json_lines(*REVIEW),
        items=changed(json_lines(*PRODUCT_2018), _without_scripts),
        timestamps="seconds",
    ),
    "amazon-2023": Format(
        interactions=json_lines(*REVIEW_2023), items=json_lines(*PRODUCT_2023), timestamps="milliseconds"
    ),
}
