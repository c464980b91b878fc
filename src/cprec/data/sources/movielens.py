"""MovieLens (GroupLens): 100K (tabs and bars, Latin-1), 1M (two colons, Latin-1), and the CSV files of 20M to 32M."""

from __future__ import annotations

from typing import Any

import ibis

from cprec.data.sources.readers import Format, Read, changed, delimited

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

FILM_100K = ("movieId", "title", "released", "video", "url", *GENRES)
RATING = ("userId", "movieId", "rating", "timestamp")


def _name_genres(films: Any) -> Any:
    """The flags of u.item as one text."""
    named = [ibis.ifelse(films[genre] == "1", genre + ", ", "") for genre in GENRES]
    text = named[0]
    for name in named[1:]:
        text = text + name
    return films.mutate(genres=text.re_replace(", $", "")).drop(*GENRES)


def _space_genres(films: Any) -> Any:
    """Genres as "Action, Comedy" in place of "Action|Comedy"."""
    return films.mutate(genres=films["genres"].replace("|", ", "))


def _films(**form: Any) -> Read:
    return changed(delimited("movieId", "title", "genres", **form), _space_genres)


_CSV = Format(interactions=delimited(*RATING, header=True), items=_films(header=True), timestamps="seconds")

FORMATS = {
    "movielens-100k": Format(
        interactions=delimited(*RATING, separator="\t", quote=""),
        items=changed(delimited(*FILM_100K, separator="|", quote="", encoding="latin-1"), _name_genres, "genres"),
        timestamps="seconds",
    ),
    "movielens-1m": Format(
        interactions=delimited(*RATING, separator="::", quote=""),
        items=_films(separator="::", quote="", encoding="latin-1"),
        timestamps="seconds",
    ),
    "movielens-20m": _CSV,
    "movielens-25m": _CSV,
    "movielens-32m": _CSV,
}
