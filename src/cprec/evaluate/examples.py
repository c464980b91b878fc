"""A few users of a domain, with what some arms recommend them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from cprec.data.catalogue import Catalogue
from cprec.evaluate.questions import Questions
from cprec.evaluate.results import Example

NUM_EXAMPLES, NUM_ITEMS = 3, 5


def examples_of(
    questions: Questions, catalogue: Catalogue, rankings: Mapping[str, Path], *, exclude_seen: bool
) -> list[Example]:
    """The first users with the first items of each arm; `rankings` are saved ones of the full catalogue, by arm."""

    def title(domain: str, item: str) -> str:
        return str(catalogue.title[catalogue.find(domain, [item])[0]])

    shown = [query.query_id for query in questions.queries[:NUM_EXAMPLES]]
    lists: dict[str, dict[str, list[tuple[str, float]]]] = {query_id: {} for query_id in shown}
    for arm, path in rankings.items():
        for row in pq.read_table(path, filters=[("query_id", "in", shown)]).to_pylist():
            found = lists[row["query_id"]].setdefault(arm, [])
            if len(found) < NUM_ITEMS and not (row["seen"] and exclude_seen):
                found.append((title(questions.domain, row["item_id"]), row["score"]))
    return [
        Example(
            domain=questions.domain,
            user=questions.user[number],
            history=[title(item.domain, item.item_id) for item in questions.queries[number].history],
            target=title(questions.domain, questions.target[number]),
            recommendations=lists[query_id],
        )
        for number, query_id in enumerate(shown)
    ]
