"""Finds items that a model reads as the same tokens and cannot tell apart: how many, why, and what that costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from cprec.schema import BRAND, CATEGORIES, TITLE
from cprec.text.config import PLAIN
from cprec.text.encoding import PromptEncoder

SPELT = 0.5
"""Tokens per character at or above which a tokenizer spells text in pieces, as it does with languages that it was not
made for. English text has about 0.25."""

NOTABLE = 0.01
"""Share of a domain's items, or loss of NDCG, at or above which `notes` says something."""

MAX_EXAMPLES = 3
MAX_CHARACTERS = 60
"""Of a title in an example."""


def best_ndcg(family_I: np.ndarray, weight_I: np.ndarray, k: int = 10) -> float:
    """The mean NDCG@K of a model that always knows the text: its item stands among the n items of that text by chance.

    `family_I` is n for each item, itself included, and `weight_I` how often it is asked for. The item's rank is uniform
    in 1 to n, so its expected NDCG@K is the mean of 1 / log2(1 + rank) over them, 0 past rank K.

    >>> best_ndcg(np.array([1]), np.array([5]))
    1.0
    >>> round(best_ndcg(np.array([2]), np.array([1])), 4)  # (1 + 0.6309) / 2
    0.8155
    >>> round(best_ndcg(np.array([20]), np.array([1])), 4)  # (1 + 0.6309 + ... + 0.2891) / 20
    0.2272
    >>> round(best_ndcg(np.array([1, 2, 2]), np.array([2, 1, 1])), 4)
    0.9077
    """
    summed = np.cumsum(1 / np.log2(1 + np.arange(1, k + 1)))  # the gains of ranks 1 to n, for n up to k
    return float(np.average(summed[np.minimum(family_I, k) - 1] / family_I, weights=weight_I))


def shared_texts(encoder: PromptEncoder, tokenizer: Any, domain: str, events_I: np.ndarray) -> dict[str, Any]:
    """How many items of a domain are read as the same text, why, and up to three examples; for `dataset.json`.

    `events_I` has the number of events of each item, in the order of the catalogue's rows.
    """
    catalogue = encoder.catalogue
    rows = catalogue.rows_of(domain)
    tokens = encoder.titles(rows)
    # Equal numbers are equal tokens (`read_as`), texts (`text`) and, of shared items, uncut tokens (`whole`).
    read_as = tokens.numbers()
    text, _ = catalogue.texts_of(domain, encoder.template.item_fields)
    family = np.bincount(read_as)[read_as]  # how many items are read as each item is
    some = np.flatnonzero(family > 1)
    uncut = encoder.encode_items(tokenizer, rows[some])
    whole = uncut.numbers()
    unknown = np.unique(tokens.row_of[tokens.values == tokenizer.unk_token_id])  # none where that is None
    empty = np.flatnonzero(tokens.lengths == 0)
    titles = catalogue.title[rows]
    characters = sum(map(len, titles[some]))
    return {
        "items": len(rows),
        "texts": len(np.unique(read_as)),
        "shared": len(some),
        "largest": int(family.max()),
        "best_ndcg_at_10": round(best_ndcg(family, events_I if events_I.any() else np.ones(len(rows))), 4),
        "equal": int((np.bincount(text)[text] > 1).sum()),
        "equal_once_tokenised": int(_holds_several(whole, text[some]).sum()),
        "equal_once_cut": int(_holds_several(read_as[some], whole).sum()),
        "tokens_per_character": round(len(uncut.values) / characters, 2) if characters else 0.0,
        "unknown_tokens": len(unknown),
        "empty": len(empty),
        "examples": {
            "shared": _largest(read_as[some], text[some], titles[some]),
            "unknown_tokens": titles[unknown[:MAX_EXAMPLES]].tolist(),
            "empty": titles[empty[:MAX_EXAMPLES]].tolist(),
        },
    }


def notes(domain: str, found: dict[str, Any], encoder: PromptEncoder) -> list[str]:
    """Lines to print about the findings of `shared_texts`, where they matter: how many items, why, and the remedy."""
    out = []
    if found["shared"] >= NOTABLE * found["items"] or found["best_ndcg_at_10"] <= 1 - NOTABLE:
        cut = f"once cut to max_title_tokens={encoder.max_title_tokens}"
        cut += f", title_cut={encoder.title_cut}" if encoder.title_cut != PLAIN else ""
        causes = {"as they stand": "equal", "once tokenised": "equal_once_tokenised", cut: "equal_once_cut"}
        why = ", ".join(f"{found[name]:,} {how}" for how, name in causes.items() if found[name])
        pairs = "; ".join(" and ".join(map(_short, pair)) for pair in found["examples"]["shared"])
        out.append(
            f"{domain}: {found['shared']:,} of {found['items']:,} items are read as the same text as others "
            f"({why}), up to {found['largest']:,} as one; a model that always knew the text would have an NDCG@10 of "
            f"{found['best_ndcg_at_10']:.3f} at best. As {pairs}. {_remedies(domain, found, encoder)}"
        )
    if found["unknown_tokens"] >= NOTABLE * found["items"]:
        out.append(
            f"{domain}: {found['unknown_tokens']:,} of {found['items']:,} items have words that the tokenizer does not "
            f"know, as {', '.join(map(_short, found['examples']['unknown_tokens']))}: choose a tokenizer for their "
            "language, or one that spells any text in bytes (tokenizer=tiny does)"
        )
    return out


def _remedies(domain: str, found: dict[str, Any], encoder: PromptEncoder) -> str:
    """What a user may do about shared texts, as one sentence without its full stop."""
    catalogue, used = encoder.catalogue, encoder.template.item_fields
    rows = catalogue.rows_of(domain)
    more = [name for name in (BRAND, CATEGORIES) if name not in used and (getattr(catalogue, name)[rows] != "").any()]
    is_spelt = found["equal_once_cut"] and found["tokens_per_character"] >= SPELT
    is_foreign = found["equal_once_tokenised"] or is_spelt
    beside = f"(prepare.item_fields={','.join((*used, *more[:1]) if more else (TITLE, BRAND))})"
    ways = [
        "raise max_title_tokens" if found["equal_once_cut"] else "",
        "choose a tokenizer for their language" if is_foreign else "",
        f"put another field beside the title {beside}" if more or len(used) == 1 else "",
        "write what sets them apart into their titles" if not more else "",
    ]
    text = ", or ".join(way for way in ways if way)
    return text[0].upper() + text[1:]


def _holds_several(group_N: np.ndarray, kind_N: np.ndarray) -> np.ndarray:
    """bool[N]: whether the group that each entry belongs to holds entries of more than one kind.

    >>> _holds_several(np.array([0, 0, 1, 1, 2]), np.array([5, 6, 7, 7, 5])).tolist()
    [True, True, False, False, False]
    """
    width = int(kind_N.max(initial=0)) + 1
    # The distinct (group, kind) pairs, each as one number; a group with two of them holds two kinds.
    pairs = np.unique(group_N.astype(np.int64) * width + kind_N)
    several: np.ndarray = np.bincount(pairs // width)[group_N] > 1
    return several


def _largest(family_N: np.ndarray, text_N: np.ndarray, title_N: np.ndarray) -> list[list[str]]:
    """Two titles of each of the largest families (items read as one text); titles that differ, where there are some."""
    out = []
    sizes = np.bincount(family_N, minlength=1)
    for family in np.argsort(-sizes, kind="stable")[:MAX_EXAMPLES]:
        members = np.flatnonzero(family_N == family)
        if len(members):
            others = members[text_N[members] != text_N[members[0]]]
            out.append([str(title_N[members[0]]), str(title_N[others[0] if len(others) else members[1]])])
    return out


def _short(title: str) -> str:
    """A title in quotes; of a long one the middle is left out, because titles often differ at the end."""
    half = MAX_CHARACTERS // 2
    return repr(title) if len(title) <= MAX_CHARACTERS else repr(f"{title[:half]} ... {title[-half:]}")
