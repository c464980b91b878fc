"""Every public format, from a few lines as its files have them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest

from cprec.data.build import build_dataset
from cprec.data.config import FormatName, PublicSource, Rules
from cprec.data.dataset import read_manifest
from cprec.data.sources.layouts import LAYOUTS
from cprec.data.sources.lines import as_text, python_literal
from cprec.data.sources.public import FORMATS
from cprec.errors import ConfigError, DataError

DAY = 1_406_073_600  # 2014-07-23
Row = tuple[str, str, int]


def lines(*objects: Any) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in objects).encode()


def literals(*objects: Any) -> bytes:
    return "".join(repr(entry) + "\n" for entry in objects).encode()


REVIEW = {"reviewerID": "A1", "asin": "B1", "overall": 4.0, "unixReviewTime": DAY, "reviewText": "x"}
FILMS_1M = "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Café Métropole (1937)::Comedy\n".encode("latin-1")
FLAGS = "|".join(["0", "0", "0", "1", "1", "1", *["0"] * 13])
RETAIL = (
    "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
    "536365,85123A,WHITE HANGING HEART,6,12/1/2010 8:26,2.55,17850,United Kingdom\n"
    "C536379,85123A,WHITE HANGING HEART,-1,12/1/2010 9:41,2.55,17850,United Kingdom\n"
    "536370,POST,POSTAGE,3,12/1/2010 8:45,18.00,12583,France\n"
    "536371,22086,CAFÉ BOX,0,12/1/2010 9:00,1,13748,United Kingdom\n"
    "536372,22086,CAFÉ BOX,1,12/1/2010 9:01,1,,United Kingdom\n"
    "536373,22086,CAFÉ BOX,2,12/1/2010 13:02,1,17850.0,United Kingdom\n"
).encode("latin-1")

CASES: dict[str, tuple[dict[str, bytes], dict[str, str], list[Row], dict[str, str], dict[str, int]]] = {
    # format: files, settings, events (user, item, time), titles, rejected
    "amazon-2014": (
        {
            "reviews_Beauty_5.json.gz": gzip.compress(lines(REVIEW)),
            "meta_Beauty.json.gz": gzip.compress(
                literals({"asin": "B1", "title": 'It\'s "Soap"', "categories": [["Beauty", "Bath"]], "price": 4.99})
                + b"{'asin': 'B2', 'title': nope}\n"
            ),
        },
        {"category": "Beauty"},
        [("A1", "B1", DAY)],
        {"B1": "It's Soap"},
        {"malformed row: no dict as Python spells it": 1},
    ),
    "amazon-2018": (
        {
            "Gift_Cards_5.json.gz": gzip.compress(lines(REVIEW)),
            "meta_Gift_Cards.json.gz": gzip.compress(
                lines({"asin": "B1", "title": "Card", "category": ["Gift Cards"], "price": "$25.00"})
            ),
        },
        {"category": "Gift_Cards"},
        [("A1", "B1", DAY)],
        {"B1": "Card"},
        {},
    ),
    "amazon-2023": (
        {
            "Gift_Cards.jsonl": lines(
                {"user_id": "A1", "asin": "V1", "parent_asin": "B1", "rating": 5.0, "timestamp": DAY * 1000 + 250}
            ),
            "meta_Gift_Cards.jsonl": lines({"parent_asin": "B1", "title": "Card", "store": "Shop", "price": None}),
        },
        {"category": "Gift_Cards"},
        [("A1", "B1", DAY)],
        {"B1": "Card"},
        {},
    ),
    "movielens-100k": (
        {
            "ml-100k/u.data": b"196\t2\t3\t881250949\n186\t1\t3\t891717742\n",
            "ml-100k/u.item": (
                f"1|Toy Story (1995)|01-Jan-1995||http://x|{FLAGS}\n"
                f"2|Café Métropole (1937)|01-Jan-1937||http://y|{FLAGS}\n"
            ).encode("latin-1"),
        },
        {},
        [("186", "1", 891717742), ("196", "2", 881250949)],
        {"1": "Toy Story (1995)", "2": "Café Métropole (1937)"},
        {},
    ),
    "movielens-1m": (
        {"ratings.dat": b"1::2::5::978300760\n1::1::4::978300761\n1::9\n", "movies.dat": FILMS_1M},
        {},
        [("1", "2", 978300760), ("1", "1", 978300761)],
        {"1": "Toy Story (1995)", "2": "Café Métropole (1937)"},
        {"malformed row: missing columns": 1},
    ),
    "movielens-32m": (
        {
            "ratings.csv": b"userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n",
            "movies.csv": 'movieId,title,genres\n2,"Misérables, Les (1995)",Drama|War\n'.encode(),
        },
        {},
        [("1", "2", 1112486027)],
        {"2": "Misérables, Les (1995)"},
        {},
    ),
    "steam": (
        {
            "steam_reviews.json.gz": gzip.compress(
                literals({"username": "Ann", "product_id": "70", "date": "2014-07-23", "hours": 1.5, "text": "fun\n"})
            ),
            "steam_games.json.gz": gzip.compress(
                literals({"id": "70", "app_name": "Half-Life", "genres": ["Action"], "price": 9.99})
            ),
        },
        {},
        [("Ann", "70", DAY)],
        {"70": "Half-Life"},
        {},
    ),
    "goodreads": (
        {
            "goodreads_interactions_poetry.json": lines(
                {"user_id": "u", "book_id": "7", "rating": 5, "date_added": "Tue Jul 22 17:00:00 -0700 2014"},
                {"user_id": "u", "book_id": "7", "rating": 5, "date_added": "Wed Jul 23 10:00:00 +0000 2014"},
                {"user_id": "v", "book_id": "7", "rating": 5, "date_added": "Wed Jul 24 00:00:00 +0000 2014"},
                {"user_id": "w", "book_id": "7", "rating": 5, "date_added": "Wed Xyz 24 00:00:00 +0000 2014"},
            ),
            "goodreads_books_poetry.json": lines({"book_id": "7", "title": "Odes", "publisher": "P"}),
        },
        {"category": "poetry"},
        [("u", "7", DAY), ("v", "7", DAY + 86400)],
        {"7": "Odes"},
        {"timestamp cannot be read": 1},
    ),
    "yelp": (
        {
            "yelp_academic_dataset_review.json": lines(
                {"user_id": "u", "business_id": "b", "stars": 3.0, "date": "2014-07-23 00:00:10"}
            ),
            "yelp_academic_dataset_business.json": lines(
                {"business_id": "b", "name": "Café", "categories": "Food, Coffee", "hours": {"Monday": "8-9"}}
            ),
        },
        {},
        [("u", "b", DAY + 10)],
        {"b": "Café"},
        {},
    ),
    "lastfm-hetrec": (
        {
            "user_taggedartists-timestamps.dat": b"userID\tartistID\ttagID\ttimestamp\n"
            b"2\t52\t13\t1238536800000\n2\t52\t15\t1238536800000\n2\t53\t15\t1238536801000\n",
            "artists.dat": "id\tname\turl\tpictureURL\n52\tSigur Rós\tx\ty\n53\tMorcheeba\tx\t\n".encode(),
        },
        {},
        [("2", "52", 1238536800), ("2", "53", 1238536801)],
        {"52": "Sigur Rós", "53": "Morcheeba"},
        {},
    ),
    "online-retail": (
        {"Online Retail.csv": RETAIL},
        {},
        [("17850", "85123A", 1291191960), ("17850", "22086", 1291208520)],
        {"85123A": "WHITE HANGING HEART", "22086": "CAFÉ BOX", "POST": "POSTAGE"},
        {
            "cancelled invoice": 1,
            "no product: postage, a fee or a correction": 1,
            "quantity is not above zero": 1,
            "no user id": 1,
        },
    ),
}


PLATFORMS = {"lastfm-hetrec": "lastfm", "online-retail": "online-retail"}

CATEGORIES = {
    "amazon-2014": "Beauty, Bath",
    "amazon-2018": "Gift Cards",
    "movielens-100k": "Animation, Children's, Comedy",
    "movielens-1m": "Animation, Children's, Comedy",
    "movielens-32m": "Drama, War",
    "steam": "Action",
}
"""Of the first item of a format: lists and genres are text."""


QUICK = ("amazon-2014", "amazon-2023", "movielens-1m", "lastfm-hetrec", "online-retail")
"""A format of each kind of file: literals of Python, objects of JSON, and tables with `::`, tabs and commas."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES])
def test_a_format_is_read(name: str, tmp_path: Path) -> None:
    files, settings, events, titles, rejected = CASES[name]
    for file, content in files.items():
        path = tmp_path / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    source = PublicSource(format=name, folder=str(tmp_path / "raw"), **settings)  # type: ignore[arg-type]
    folder = build_dataset([source], tmp_path / "data", Rules(k_core=0))
    table = pq.read_table(folder / "interactions").to_pylist()
    assert sorted((row["user_id"], row["item_id"], row["timestamp"]) for row in table) == sorted(events)
    items = pq.read_table(folder / "items").to_pylist()
    assert {row["item_id"]: row["title"] for row in items} == titles
    assert name not in CATEGORIES or items[0]["categories"] == CATEGORIES[name]
    about = read_manifest(folder)["domains"][source.domain]
    assert about["rejected"] == rejected
    assert about["platform"] == source.platform == PLATFORMS.get(name, name.partition("-")[0])


def test_every_format_has_a_case_or_a_sibling_that_has_one() -> None:
    siblings = {"movielens-20m": "movielens-32m", "movielens-25m": "movielens-32m"}
    assert {siblings.get(name, name) for name in FORMATS} == set(CASES)
    assert set(FORMATS) == set(LAYOUTS) == set(get_args(FormatName))
    assert all(layout.licence and layout.page.startswith("https://") for layout in LAYOUTS.values())
    for name, layout in LAYOUTS.items():
        assert bool(layout.items) == (FORMATS[name].items is not None)
        assert any("{category}" in file for file in layout.interactions) == name.startswith(("amazon", "goodreads"))


def test_names_are_made_of_the_format() -> None:
    source = PublicSource(format="amazon-2018", folder="x", category="Gift_Cards")
    assert (source.domain, source.platform) == ("amazon_2018_gift_cards", "amazon")
    with pytest.raises(ConfigError, match="format=amazon-2018 needs a category"):
        PublicSource(format="amazon-2018", folder="x")
    with pytest.raises(ConfigError, match="format=steam has no categories"):
        PublicSource(format="steam", folder="x", category="y")
    with pytest.raises(ConfigError, match="format='imdb': expected amazon-2014"):
        PublicSource(format="imdb", folder="x")  # type: ignore[arg-type]


def test_missing_files_are_named(tmp_path: Path) -> None:
    source = PublicSource(format="movielens-1m", folder=str(tmp_path))
    with pytest.raises(DataError, match=r"has no ratings.dat, which movielens-1m needs: set download=true, or get it"):
        build_dataset([source], tmp_path / "data", Rules())
    with pytest.raises(
        ConfigError,
        match="yelp cannot be downloaded directly: get yelp_academic_dataset_review.json and .*business.json from https://",
    ):
        build_dataset([PublicSource(format="yelp", folder=str(tmp_path), download=True)], tmp_path / "data", Rules())


@pytest.mark.parametrize(
    "line", ["", "1", "[1]", "{'a': f()}", "{'a'", "{" * 3000, "{'a': " + "9" * 5000 + "}", "\0", "{'a': -'b'}"]
)
def test_a_line_that_is_no_dict_is_a_value_error(line: str) -> None:
    with pytest.raises(ValueError):
        as_text(python_literal(line))
        raise ValueError("a number of that length is no text")


def test_real_bytes_of_amazon_and_movielens(real_data: Path, tmp_path: Path) -> None:
    sources = [
        PublicSource(format="amazon-2018", folder=str(real_data / "raw" / "amazon2018"), category="Gift_Cards"),
        PublicSource(format="movielens-1m", folder=str(real_data / "raw" / "movielens_dat")),
    ]
    folder = build_dataset(sources, tmp_path / "data", Rules(k_core=0))
    domains = read_manifest(folder)["domains"]
    cards, films = domains["amazon_2018_gift_cards"], domains["movielens_1m"]
    assert cards["counts"][0] == {"rule": "read", "events": 2972, "users": 458, "items": 148}
    assert (cards["num_items"], cards["rejected"]) == (1547, {})
    assert (films["num_items"], films["num_events"]) == (3883, 19)
    titles = pq.read_table(folder / "items" / "domain=movielens_1m")["title"].to_pylist()
    assert any("é" in title for title in titles), "Latin-1, not UTF-8"
