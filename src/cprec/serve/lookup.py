"""Items of a catalogue by what a client calls them, and what a client is told of items."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from cprec.data.catalogue import Catalogue, TextKind
from cprec.data.cleaning import spelling
from cprec.errors import UnknownItemError
from cprec.schema import Item
from cprec.serve import messages as m

MOST_NAMED = 100
"""Unknown ids that a refusal names."""


def look_up_history(catalogue: Catalogue, domain: str, events: Sequence[m.Event | str]) -> tuple[Item, ...]:
    """The items of a history, by id or title: in the domain that an event names, or else in `domain`, then the others.

    Raises Refused, which names those that are nowhere.
    """
    known: dict[tuple[TextKind, str, str | None], Item | None] = {}
    out, unknown = [], []
    key: tuple[TextKind, str, str | None]
    for event in events:
        if isinstance(event, str):
            key = "any", event, None
        elif event.item_id is not None:
            key = "item_id", event.item_id, event.domain
        else:
            key = "title", event.title or "", event.domain
        if key not in known:
            known[key] = _find(catalogue, key, domain)
        if (item := known[key]) is None:
            unknown.append(key[1])
        else:
            out.append(item)
    if unknown:
        raise _unknown(list(dict.fromkeys(unknown)), "of the history")
    return tuple(out)


def _find(catalogue: Catalogue, key: tuple[TextKind, str, str | None], target: str) -> Item | None:
    kind, text, where = key
    if where is not None and where not in catalogue.domains:
        raise m.Refused(422, f"domain={where!r} in the history: name one of {', '.join(catalogue.domains)}")
    try:
        row = catalogue.look_up(text, where or target, kind, elsewhere=where is None)
    except UnknownItemError as error:
        raise m.Refused(422, str(error), [text]) from None
    return None if row is None else Item(catalogue.domains[catalogue.domain[row]], str(catalogue.item_id[row]))


def check_ids(catalogue: Catalogue, domain: str, ids: Sequence[str]) -> None:
    """Raise Refused for ids that the domain does not have."""
    unknown = [name for name in dict.fromkeys(ids) if catalogue.row_of_id(domain, name) is None]
    if unknown:
        raise _unknown(unknown, f"of domain {domain!r}")


def _unknown(unknown: Sequence[str], whose: str) -> m.Refused:
    few = ", ".join(repr(text[:80]) for text in unknown[:3]) + (f" and {len(unknown) - 3} more" * (len(unknown) > 3))
    return m.Refused(422, f"not in the catalogue: {few}, {whose}; GET /v1/items finds ids", unknown[:MOST_NAMED])


def scored_items(
    catalogue: Catalogue, domain: str, item_ids: Sequence[str], scores: Sequence[float]
) -> list[m.ScoredItem]:
    """Items with their titles and scores; there may be more scores than items."""
    return [
        m.ScoredItem(item_id=item_id, title=title_of(catalogue, domain, item_id), score=score)
        for item_id, score in zip(item_ids, scores, strict=False)
    ]


def title_of(catalogue: Catalogue, domain: str, item_id: str) -> str:
    """The title of an item that is in the catalogue."""
    row = catalogue.row_of_id(domain, item_id)
    assert row is not None
    return str(catalogue.title[row])


class TitleSearch:
    """Finds items of a catalogue by words of their titles."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._spelt = pa.array(catalogue.spellings, pa.string())

    def find(self, query: str, domain: str | None) -> Sequence[int]:
        """Rows whose id is the query, then rows whose title contains each of its words, also inside a longer word."""
        catalogue = self.catalogue
        domains = catalogue.domains if domain is None else (domain,)
        exact = [row for name in domains if (row := catalogue.row_of_id(name, query)) is not None]
        # Titles are compared without regard to case, spaces and forms of Unicode.
        words = spelling(query).split()
        if not words and query.strip():
            return exact
        # The rows of a domain are contiguous, and so are those of all domains.
        first, last = (catalogue.rows_of(name)[[0, -1]] for name in (domains[0], domains[-1]))
        start, titles = int(first[0]), self._spelt.slice(int(first[0]), int(last[1]) - int(first[0]) + 1)
        # Start with all titles of these domains, and keep those that contain each word.
        kept = pa.array([True]).take(pa.array([0] * len(titles), pa.int8()))
        for word in words:
            kept = pc.and_(kept, pc.match_substring(titles, word))
        rows = (pc.indices_nonzero(kept).to_numpy() + start).tolist()
        return [*exact, *(row for row in rows if row not in exact)]
