"""Public data sets: what their files are called, and where to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cprec.data.config import PublicSource


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of one public data set."""

    interactions: tuple[str, ...]
    """Names that the file of events may have; the first one that is there is read. {category} is filled in."""
    items: tuple[str, ...] = ()
    """Names that the file of items may have; empty where the events name their item."""
    licence: str
    """One sentence, shown before a download."""
    urls: tuple[str, ...] = ()
    """Addresses of the files, or of one archive; {category} is filled in. Empty where it cannot be fetched directly."""
    page: str
    """Where the data set is described, and can be had by hand."""


def public_files(source: PublicSource) -> dict[str, list[Path]]:
    """The files of each table (interactions, items) of a public data set that are there now."""
    layout = LAYOUTS[source.format]
    named = {"interactions": layout.interactions, "items": layout.items}
    return {table: [path for path in [find_file(source, names)] if path] for table, names in named.items() if names}


def find_file(source: PublicSource, names: tuple[str, ...]) -> Path | None:
    """The first of some files that is there, in the folder of a data set or one below it."""
    folder = Path(source.folder)
    for name in (name.format(category=source.category) for name in names):
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    return None


# ---- the data sets ---------------------------------------------------------------------------------------------------

_AMAZON_LICENCE = (
    "Amazon review data (McAuley Lab, UCSD) state no licence: published for research; cite the papers named on their "
    "page"
)
_UCSD = "https://mcauleylab.ucsd.edu/public_datasets"
_UCSD_2014 = f"{_UCSD}/data/amazon"
_UCSD_2018 = f"{_UCSD}/data/amazon_v2"
_UCSD_2023 = f"{_UCSD}/data/amazon_2023/raw"
_GOODREADS = f"{_UCSD}/gdrive/goodreads/byGenre"


def _packed(*names: str) -> tuple[str, ...]:
    """Each name with .gz behind it, then without."""
    return tuple(name + end for name in names for end in (".gz", ""))


def _movielens(size: str, interactions: str, items: str) -> Layout:
    return Layout(
        interactions=(interactions,),
        items=(items,),
        licence="MovieLens (GroupLens, University of Minnesota): for research, with acknowledgement; neither "
        "redistribution nor commercial use without permission",
        urls=(f"https://files.grouplens.org/datasets/movielens/ml-{size}.zip",),
        page="https://grouplens.org/datasets/movielens/",
    )


LAYOUTS = {
    "amazon-2014": Layout(
        interactions=_packed("reviews_{category}_5.json", "reviews_{category}.json"),
        items=_packed("meta_{category}.json"),
        licence=_AMAZON_LICENCE,
        urls=(
            f"{_UCSD_2014}/categoryFiles/reviews_{{category}}_5.json.gz",
            f"{_UCSD_2014}/categoryFiles/meta_{{category}}.json.gz",
        ),
        page="https://jmcauley.ucsd.edu/data/amazon/",
    ),
    "amazon-2018": Layout(
        interactions=_packed("{category}_5.json", "{category}.json"),
        items=_packed("meta_{category}.json"),
        licence=_AMAZON_LICENCE,
        urls=(
            f"{_UCSD_2018}/categoryFilesSmall/{{category}}_5.json.gz",
            f"{_UCSD_2018}/metaFiles2/meta_{{category}}.json.gz",
        ),
        page="https://nijianmo.github.io/amazon/",
    ),
    "amazon-2023": Layout(
        interactions=_packed("{category}.jsonl"),
        items=_packed("meta_{category}.jsonl"),
        licence=_AMAZON_LICENCE,
        urls=(
            f"{_UCSD_2023}/review_categories/{{category}}.jsonl.gz",
            f"{_UCSD_2023}/meta_categories/meta_{{category}}.jsonl.gz",
        ),
        page="https://amazon-reviews-2023.github.io/",
    ),
    "movielens-100k": _movielens("100k", "u.data", "u.item"),
    "movielens-1m": _movielens("1m", "ratings.dat", "movies.dat"),
    "movielens-20m": _movielens("20m", "ratings.csv", "movies.csv"),
    "movielens-25m": _movielens("25m", "ratings.csv", "movies.csv"),
    "movielens-32m": _movielens("32m", "ratings.csv", "movies.csv"),
    "steam": Layout(
        interactions=("steam_reviews.json.gz", "steam_new.json.gz", "steam_reviews.json", "steam_new.json"),
        items=_packed("steam_games.json"),
        licence="Steam reviews (UCSD) are crawled and state no licence: for research; cite the papers named there",
        urls=(
            "https://cseweb.ucsd.edu/~wckang/steam_reviews.json.gz",
            "https://cseweb.ucsd.edu/~wckang/steam_games.json.gz",
        ),
        page="https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
    ),
    "goodreads": Layout(
        interactions=_packed("goodreads_interactions_{category}.json", "goodreads_reviews_{category}.json"),
        items=_packed("goodreads_books_{category}.json", "goodreads_books.json"),
        licence="Goodreads data (UCSD): for academic use only, not to be redistributed; cite the papers named there",
        urls=(
            f"{_GOODREADS}/goodreads_interactions_{{category}}.json.gz",
            f"{_GOODREADS}/goodreads_books_{{category}}.json.gz",
        ),
        page="https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
    ),
    "yelp": Layout(
        interactions=("yelp_academic_dataset_review.json", "review.json"),
        items=("yelp_academic_dataset_business.json", "business.json"),
        licence="Yelp Open Dataset: for academic use under Yelp's own terms, to which you agree before the download",
        page="https://business.yelp.com/data/resources/open-dataset/",
    ),
    "lastfm-hetrec": Layout(
        interactions=("user_taggedartists-timestamps.dat",),
        items=("artists.dat",),
        licence="LastFM, HetRec 2011 (GroupLens, from Last.fm): for non-commercial research",
        urls=("https://files.grouplens.org/datasets/hetrec2011/hetrec2011-lastfm-2k.zip",),
        page="https://grouplens.org/datasets/hetrec-2011/",
    ),
    "online-retail": Layout(
        interactions=("Online Retail.csv", "OnlineRetail.csv", "online_retail.csv", "online_retail_II.csv", "data.csv"),
        licence="Online Retail (UCI Machine Learning Repository): CC BY 4.0",
        urls=("https://archive.ics.uci.edu/static/public/352/data.csv",),
        page="https://archive.ics.uci.edu/dataset/352/online+retail",
    ),
}
