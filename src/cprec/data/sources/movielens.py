"""MovieLens (GroupLens): 100K (tabs and bars, Latin-1), 1M (two colons, Latin-1), and the CSV files of 20M to 32M."""

from __future__ import annotations

from typing import Any

from cprec.data.sources.readers import changed, delimited

GENRES = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
"""Columns of u.item after the first five: 1 where a film is of the genre."""

RATING = ("userId", "movieId", "rating", "timestamp")


def _name_genres(films: Any) -> Any:
    """The flags of u.item as one text."""
    import ibis

    named = [ibis.ifelse(films[genre] == "1", genre + ", ", "") for genre in GENRES]
    text = named[0]
    for name in named[1:]:
        text = text + name
    return films.mutate(genres=text.re_replace(", $", "")).drop(*GENRES)


def _space_genres(films: Any) -> Any:
    """Genres as "Action, Comedy" in place of "Action|Comedy"."""
    return films.mutate(genres=films["genres"].replace("|", ", "))


_LICENCE = (
    "MovieLens (GroupLens, University of Minnesota): for research, with acknowledgement; neither redistribution nor "
    "commercial use without permission"
)
_ROOT = "https://files.grouplens.org/datasets/movielens"
_OLD = "latin-1"
_FILM = ("movieId", "title", "genres")


def _layout(archive: str, **parts: Any) -> dict[str, Any]:
    return {
        "platform": "movielens",
        "timestamps": "seconds",
        "licence": _LICENCE,
        "urls": (f"{_ROOT}/{archive}.zip",),
        "page": "https://grouplens.org/datasets/movielens/",
        **parts,
    }


FORMATS: dict[str, dict[str, Any]] = {
    "movielens-100k": _layout(
        "ml-100k",
        interactions=("u.data",),
        items=("u.item",),
        read_interactions=delimited(*RATING, separator="\t", quote=""),
        read_items=changed(
            delimited("movieId", "title", "released", "video", "url", *GENRES, separator="|", quote="", encoding=_OLD),
            _name_genres,
            "genres",
        ),
    ),
    "movielens-1m": _layout(
        "ml-1m",
        interactions=("ratings.dat",),
        items=("movies.dat",),
        read_interactions=delimited(*RATING, separator="::", quote=""),
        read_items=changed(delimited(*_FILM, separator="::", quote="", encoding=_OLD), _space_genres),
    ),
    **{
        f"movielens-{size}": _layout(
            f"ml-{size}",
            interactions=("ratings.csv",),
            items=("movies.csv",),
            read_interactions=delimited(*RATING, header=True),
            read_items=changed(delimited(*_FILM, header=True), _space_genres),
        )
        for size in ("20m", "25m", "32m")
    },
}
