"""Cuts titles so that they stay apart: long enough for most, and where cut titles are equal, their ends make room for
what sets them apart."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from os.path import commonprefix

Tokens = tuple[int, ...]

LENGTHS = (8, 12, 16, 24, 32)
"""Tokens of a title to choose from."""
KEPT = 0.95
"""Of the titles that differ, the share that must still differ when they are cut."""

_PIECE = re.compile(r"\w+|[^\w\s]")


def title_tokens(titles: Iterable[str]) -> int:
    """The fewest tokens to which titles can be cut so that nearly all that differ still do; a word counts as one.

    >>> title_tokens(["red tea", "green tea"]), title_tokens(f"{'the ' * 9}{number}" for number in range(20))
    (8, 12)
    """
    pieces = [tuple(_PIECE.findall(title.lower())) for title in set(titles)]
    num_different = len(set(pieces))
    for length in LENGTHS[:-1]:
        if len({piece[:length] for piece in pieces}) >= KEPT * num_different:
            return length
    return LENGTHS[-1]


def distinct_cuts(titles: Sequence[Tokens], most: int) -> list[Tokens]:
    """Each title cut to `most` tokens; the last quarter of a cut that others share is taken from where they differ.

    No more titles share a cut than if all kept their first tokens, and the order of the titles does not matter. Equal
    titles have equal cuts, and so may others: those that differ only by being longer, say, or whose room is too small.

    >>> distinct_cuts([(1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 5, 9), (7, 2, 3, 4, 5)], 4)
    [(1, 2, 3, 8), (1, 2, 3, 9), (7, 2, 3, 4)]
    """
    families: dict[Tokens, set[Tokens]] = defaultdict(set)  # plain cut -> the different titles that have it
    for title in titles:
        families[title[:most]].add(title)
    chosen: dict[Tokens, Tokens] = {}
    for cut, family in families.items():
        chosen.update(_tell_apart(sorted(family), cut, max(1, most // 4)))
    _withdraw(chosen, most)
    return [chosen[title] for title in titles]


def _tell_apart(family: list[Tokens], cut: Tokens, room: int) -> dict[Tokens, Tokens]:
    """The cut of each of a family's titles: the plain one, its last `room` tokens replaced where there are several."""
    if len(family) == 1:
        return {family[0]: cut}
    out: dict[Tokens, Tokens] = {}
    waiting = [family]
    while waiting:
        alike = waiting.pop()
        shared = len(commonprefix(alike))
        groups: dict[Tokens, list[Tokens]] = defaultdict(list)
        for title in alike:
            groups[title[shared : shared + room]].append(title)
        for end, members in groups.items():
            if len(members) > 1:
                waiting.append(members)  # they differ further on
            else:
                out[members[0]] = cut[: len(cut) - len(end)] + end
    return out


def _withdraw(chosen: dict[Tokens, Tokens], most: int) -> None:
    """Give titles their plain cut back where the chosen one is that of a title with another plain cut."""
    while True:
        owners = Counter(text for text, _ in {(text, title[:most]) for title, text in chosen.items()})
        clashing = [t for t, text in chosen.items() if owners[text] > 1 and text != t[:most]]
        if not clashing:
            return
        chosen.update({title: title[:most] for title in clashing})
