"""Free writing, matched to candidates: how LLaRA (Liao et al. 2024) and S-DPO (Chen et al. 2024) rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cprec.data.ragged import Ragged
from cprec.recommender import Ranking, RankingQuery
from cprec.search.ranking import may_return
from cprec.search.reading import Tree


def generate(
    tree: Tree,
    end: int,
    queries: Sequence[RankingQuery],
    titles_of: Callable[[RankingQuery], Ragged],
    max_tokens: int,
    tokenizer: Any,
) -> list[Ranking]:
    """The candidate that the model writes after the prompt of each query, if it writes one; `end` ends a title.

    `titles_of` gives the tokens of a query's candidates, `max_tokens` at most, by which what is written is known.
    """
    out = []
    for query, tokens in zip(queries, write(tree, end, max_tokens), strict=True):
        candidates, titles = query.candidates or (), titles_of(query)
        known = [tokenizer.decode(titles[number]) for number in range(len(titles))]
        said = match(tokenizer.decode(tokens), known)
        item = None if said is None else candidates[said]
        chosen = (item,) if item is not None and may_return(query, item) else ()
        out.append(Ranking(query.query_id, chosen, (1.0,) * len(chosen)))
    return out


def write(tree: Tree, end: int, max_tokens: int) -> list[np.ndarray]:
    """Greedy text after each prompt, up to the token `end` (left out) or `max_tokens`: int64 tokens of each user.
    Nothing keeps the model to titles of the catalogue."""
    device = tree.prompt_hidden_UD.device
    out: list[list[int]] = [[] for _ in range(tree.num_users)]
    users = torch.arange(tree.num_users, device=device)
    parents, hidden = torch.full_like(users, -1), tree.prompt_hidden_UD
    for _ in range(max_tokens):
        tokens = tree.likeliest(hidden)
        # Users whose text has ended take no further part.
        going = tokens != end
        users, parents, tokens = users[going], parents[going], tokens[going]
        if not len(users):
            break
        for user, token in zip(users.tolist(), tokens.tolist(), strict=True):
            out[user].append(token)
        first = tree.num_nodes
        hidden = tree.extend(tokens, users, parents)
        parents = first + torch.arange(len(users), device=device)
    return [np.array(tokens, dtype=np.int64) for tokens in out]


def match(text: str, titles: Sequence[str]) -> int | None:
    """The candidate that a text means: the one with this title, or with this title in another case, or else the only
    one whose title occurs in the text. None if there is none, or if several fit. Outer spaces do not matter.

    >>> match("Us ", ["US", "Us", "Go"]), match("us", ["US", "Us"]), match("I say GO", ["Go", "Chess"])
    (1, None, 0)
    """
    exact, names = text.strip(), [title.strip() for title in titles]
    said, folded = exact.casefold(), [name.casefold() for name in names]
    for found in (
        [n for n, name in enumerate(names) if name == exact],
        [n for n, name in enumerate(folded) if name == said],
        [n for n, name in enumerate(folded) if name in said],
    ):
        if found:
            return found[0] if len(found) == 1 else None
    return None
