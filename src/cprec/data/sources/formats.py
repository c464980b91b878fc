"""How the files of each public data set are read.

- Amazon Reviews (McAuley Lab, UCSD): one review or product a line. Reviews are JSON; the metadata of 2014 are Python
  literals. Times are seconds in 2014 and 2018 (whole days), milliseconds in 2023, which also has `parent_asin`, the
  product whatever its colour or size. Some titles of 2018 are scripts of the page, and count as missing.
- MovieLens (GroupLens): 100K (tabs and bars, Latin-1), 1M (two colons, Latin-1), and the CSV files of 20M to 32M.
- Steam (UCSD, version 2): reviews with their day, and games; one Python literal a line. Unpacked, the reviews are
  called `steam_new.json`. Version 1 (`australian_users_items.json.gz`) has hours of play without a time or an order,
  and is not read.
- Goodreads (UCSD): shelves and reviews with the moment they were added, and books. The category is a genre, or, where
  the files are there, `dedup` for all of them. A rating of 0 is none. `goodreads_interactions.csv` has neither times
  nor an order that anybody states, and is not read.
- Yelp Open Dataset: reviews and businesses, one JSON object a line; times are in UTC.
- LastFM of HetRec 2011: which artists a user tagged, and when; several tags at once are one event (`deduplicate`). Its
  counts of listening have no time and are not read.
- Online Retail and Online Retail II (UCI): the lines of a shop's invoices; one product of an invoice a line. The
  archive's own CSV is `data.csv`; its sheet (`Online Retail.xlsx`) is read once it is saved as CSV. A line is set aside
  with its reason where it has no customer, belongs to a cancelled invoice, has a quantity of zero or less, or is not of
  a product (postage, fees, manual corrections: their stock codes do not begin with five digits). Times are the shop's
  local ones, read as UTC. The events name their product themselves.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ibis

from cprec.data.engine import TableEngine
from cprec.data.sources.raw import RawTable
from cprec.data.sources.readers import Format, Read, changed, delimited, json_lines, python_literals
from cprec.data.text_files import first_line

# ---- Amazon ----------------------------------------------------------------------------------------------------------

_AMAZON_REVIEWS = json_lines("reviewerID", "asin", "unixReviewTime", "overall")


def _without_scripts(products: Any) -> Any:
    title = products["title"]
    return products.mutate(title=ibis.ifelse(title.contains("getTime"), ibis.null("string"), title))


# ---- MovieLens -------------------------------------------------------------------------------------------------------

_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
"""Columns of u.item after the first five: 1 where a film is of the genre."""

_FILM_100K = ("movieId", "title", "released", "video", "url", *_GENRES)
_RATING = ("userId", "movieId", "rating", "timestamp")


def _name_genres(films: Any) -> Any:
    """The flags of u.item as one text."""
    named = [ibis.ifelse(films[genre] == "1", genre + ", ", "") for genre in _GENRES]
    return films.mutate(genres=functools.reduce(operator.add, named).re_replace(", $", "")).drop(*_GENRES)


def _films(**form: Any) -> Read:
    """Films with their genres as "Action, Comedy" in place of "Action|Comedy"."""
    films = delimited("movieId", "title", "genres", **form)
    return changed(films, lambda table: table.mutate(genres=table["genres"].replace("|", ", ")))


_MOVIELENS_CSV = Format(interactions=delimited(*_RATING, header=True), items=_films(header=True), timestamps="seconds")


# ---- Goodreads -------------------------------------------------------------------------------------------------------


def _goodreads_time(text: Any) -> Any:
    """ "Fri Jul 28 00:00:00 -0700 2017" as "2017-07-28T00:00:00-07:00"; what is shaped otherwise stays as it is."""
    months = ibis.literal("JanFebMarAprMayJunJulAugSepOctNovDec")
    month = ((months.find(text.substr(4, 3)) / 3).floor().cast("int64") + 1).cast("string").lpad(2, "0")
    moment = (
        text.substr(26, 4) + "-" + month + "-" + text.substr(8, 2) + "T" + text.substr(11, 8) + text.substr(20, 3)
        + ":" + text.substr(23, 2)
    )  # fmt: skip
    shape = r"^[A-Z][a-z]{2} (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d\d \d\d:\d\d:\d\d [+-]\d{4} \d{4}$"
    return ibis.ifelse(text.re_search(shape), moment, text)


def _shelves(table: Any) -> Any:
    return table.mutate(date_added=_goodreads_time(table["date_added"]), rating=table["rating"].nullif("0"))


# ---- Online Retail ---------------------------------------------------------------------------------------------------

_RETAIL_I = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country")
_RETAIL_II = ("Invoice", "StockCode", "Description", "Quantity", "InvoiceDate", "Price", "Customer ID", "Country")
_RETAIL = ("invoice", "item_id", "title", "quantity", "timestamp", "price", "customer", "country")


def _retail_time(text: Any) -> Any:
    """ "12/1/2010 8:26" (month first) as "2010-12-01T08:26:00"; what is shaped otherwise stays as it is."""
    shape = r"^(\d{1,2})/(\d{1,2})/(\d{4}) (\d{1,2}):(\d{2})(:\d{2})?$"
    part = [text.re_extract(shape, group) for group in range(6)]
    moment = (
        part[3] + "-" + part[1].lpad(2, "0") + "-" + part[2].lpad(2, "0") + "T" + part[4].lpad(2, "0") + ":" + part[5]
        + ":00"
    )  # fmt: skip
    return ibis.ifelse(text.re_search(shape), moment, text)


def _invoices(engine: TableEngine, what: str, files: tuple[Path, ...]) -> RawTable:
    is_second = "Customer ID" in first_line(files[0])
    read = delimited(*(_RETAIL_II if is_second else _RETAIL_I), header=True, encoding=_encoding(files[0]))
    raw = read(engine, what, files)
    names = zip(_RETAIL, raw.columns, strict=True)
    lines = raw.table.rename({new: old for new, old in names if new != old})
    quantity = lines["quantity"].try_cast("float64")
    problem = ibis.cases(
        (lines["invoice"].upper().startswith("C"), "cancelled invoice"),
        (~lines["item_id"].re_search(r"^\d{5}"), "no product: postage, a fee or a correction"),
        (quantity.isnull() | (quantity <= 0), "quantity is not above zero"),
        else_=ibis.null("string"),
    )
    customer, time = lines["customer"].re_replace(r"\.0$", ""), _retail_time(lines["timestamp"])
    table = lines.mutate(customer=customer, problem=problem, timestamp=time)
    return replace(raw, table=table, columns=("customer", "item_id", "timestamp", "title", "price", "problem"))


def _encoding(path: Path) -> str:
    """utf-8 if the file is, else latin-1, which most copies are."""
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


# ---- all of them -----------------------------------------------------------------------------------------------------

FORMATS = {
    "amazon-2014": Format(
        interactions=_AMAZON_REVIEWS,
        items=python_literals("asin", "title", "brand", "categories", "description", "price"),
        timestamps="seconds",
    ),
    "amazon-2018": Format(
        interactions=_AMAZON_REVIEWS,
        items=changed(json_lines("asin", "title", "brand", "category", "description", "price"), _without_scripts),
        timestamps="seconds",
    ),
    "amazon-2023": Format(
        interactions=json_lines("user_id", "parent_asin", "timestamp", "rating"),
        items=json_lines("parent_asin", "title", "store", "categories", "description", "price"),
        timestamps="milliseconds",
    ),
    "movielens-100k": Format(
        interactions=delimited(*_RATING, separator="\t", quote=""),
        items=changed(delimited(*_FILM_100K, separator="|", quote="", encoding="latin-1"), _name_genres, "genres"),
        timestamps="seconds",
    ),
    "movielens-1m": Format(
        interactions=delimited(*_RATING, separator="::", quote=""),
        items=_films(separator="::", quote="", encoding="latin-1"),
        timestamps="seconds",
    ),
    **dict.fromkeys(("movielens-20m", "movielens-25m", "movielens-32m"), _MOVIELENS_CSV),
    "steam": Format(
        interactions=python_literals("username", "product_id", "date", "hours"),
        items=changed(
            python_literals("id", "title", "app_name", "publisher", "genres", "price"),
            lambda games: games.mutate(product_id=games["id"]),
            "product_id",
        ),
        timestamps="iso",
        columns={"user_id": "username", "item_id": "product_id", "title": "app_name", "brand": "publisher"},
    ),
    "goodreads": Format(
        interactions=changed(json_lines("user_id", "book_id", "date_added", "rating"), _shelves),
        items=json_lines("book_id", "title", "publisher", "description"),
        timestamps="iso",
        columns={"item_id": "book_id", "timestamp": "date_added", "brand": "publisher"},
    ),
    "yelp": Format(
        interactions=json_lines("user_id", "business_id", "date", "stars"),
        items=json_lines("business_id", "name", "categories"),
        timestamps="iso",
        columns={"item_id": "business_id"},
    ),
    "lastfm-hetrec": Format(
        interactions=delimited("userID", "artistID", "tagID", "timestamp", separator="\t", quote="", header=True),
        items=delimited("artistID", "name", "url", "pictureURL", separator="\t", quote="", header=True),
        timestamps="milliseconds",
        columns={"user_id": "userID", "item_id": "artistID", "title": "name"},
    ),
    "online-retail": Format(interactions=_invoices, timestamps="iso", columns={"user_id": "customer"}),
}
"""Name of a format, as settings write it -> how its files are read."""
