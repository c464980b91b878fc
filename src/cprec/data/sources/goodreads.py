"""Goodreads (UCSD): shelves and reviews with the moment they were added, and books; one JSON object a line.

The category is a genre, or, where the files are there, `dedup` for all of them. A rating of 0 is none.
`goodreads_interactions.csv` has neither times nor an order that anybody states, and is not read.
"""

from __future__ import annotations

from typing import Any

import ibis

from cprec.data.sources.readers import Format, changed, json_lines

SHELF = ("user_id", "book_id", "date_added", "rating")
BOOK = ("book_id", "title", "publisher", "description")

MONTHS = "JanFebMarAprMayJunJulAugSepOctNovDec"


def iso_time(text: Any) -> Any:
    """ "Fri Jul 28 00:00:00 -0700 2017" as "2017-07-28T00:00:00-07:00"; what is shaped otherwise stays as it is."""
    month = ((ibis.literal(MONTHS).find(text.substr(4, 3)) / 3).floor().cast("int64") + 1).cast("string").lpad(2, "0")
    moment = (
        text.substr(26, 4) + "-" + month + "-" + text.substr(8, 2) + "T" + text.substr(11, 8) + text.substr(20, 3)
        + ":" + text.substr(23, 2)
    )  # fmt: skip
    shape = r"^[A-Z][a-z]{2} (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d\d \d\d:\d\d:\d\d [+-]\d{4} \d{4}$"
    return ibis.ifelse(text.re_search(shape), moment, text)


FORMATS = {
    "goodreads": Format(
        interactions=changed(
            json_lines(*SHELF),
            lambda shelves: shelves.mutate(
                date_added=iso_time(shelves["date_added"]), rating=shelves["rating"].nullif("0")
            ),
        ),
        items=json_lines(*BOOK),
        timestamps="iso",
        columns={"item_id": "book_id", "timestamp": "date_added", "brand": "publisher"},
    )
}
