"""How good the codes of items are: how much they tell apart, and how much of items and histories they know.

Suffixes: N items, E pairs of events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cprec.systems.codes import ItemCodes
from cprec.systems.signals import TrainingSequences, consecutive


@dataclass(frozen=True)
class LevelReport:
    """One level of codes, without those before it."""

    used: float
    """Share of its codes that some item has."""
    bits: float
    """Entropy of the items' codes."""
    most_bits: float
    """The most that it could be: that of codes that equally many items have."""
    together: float
    """Share of training transitions, each from an item to the next, other one, whose two items have one code."""
    together_by_chance: float
    """The same if the second items were exchanged among all transitions."""
    category: float | None
    """Share of the entropy of the items' categories that the code tells; None where they have fewer than two."""
    category_by_chance: float | None
    """The same if the codes were exchanged among the items, once: many codes of few items tell much by luck."""


@dataclass(frozen=True)
class CodeReport:
    """The codes of a domain's items; printed in two lines, or as a table."""

    num_items: int
    num_collisions: int
    num_moved: int
    outcome: str
    """What becomes of items that share all their codes."""
    levels: tuple[LevelReport, ...]

    def __str__(self) -> str:
        moved = f"{self.num_moved:,} have another last code than their own, and " if self.num_moved else ""
        used, bits = self._percent("used"), " / ".join(f"{level.bits:.1f}" for level in self.levels)
        of_category = ""
        if self.levels[0].category is not None:
            by_chance = self._percent("category_by_chance")
            of_category = f"; they tell {self._percent('category')} % of the category (by chance {by_chance} %)"
        return (
            f"of {self.num_items:,} items {moved}{self.num_collisions:,} share all their codes{self.outcome}\n"
            f"codes in use {used} %, entropy {bits} of {self.levels[0].most_bits:.1f} bits; "
            f"{self._percent('together')} % of transitions stay within a code (by chance "
            f"{self._percent('together_by_chance')} %){of_category}"
        )

    def table(self) -> str:
        """A row for each level, in Markdown."""
        heads: tuple[str, ...] = ("level", "codes in use", "entropy, bits", "of most", "within a code", "by chance")
        heads += ("category told", "by chance") if self.levels[0].category is not None else ()
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for number, level in enumerate(self.levels, 1):
            share = level.bits / level.most_bits if level.most_bits else 0.0
            row = [f"{number}", f"{level.used:.3f}", f"{level.bits:.2f}", f"{share:.3f}"]
            told = (level.together, level.together_by_chance, level.category, level.category_by_chance)
            row += [f"{value:.3f}" for value in told if value is not None]
            lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines)

    def _percent(self, name: str) -> str:
        return " / ".join(f"{100 * getattr(level, name):.0f}" for level in self.levels)


def code_report(codes: ItemCodes, data: TrainingSequences) -> CodeReport:
    """What the codes of the items of training sequences are worth, level by level."""
    outcome = ""
    if codes.num_collisions:
        outcome = " and their probability" if codes.collisions == "share" else " and get one more"
    pairs_E2, categories = consecutive(data.sequences), np.array(data.categories)
    levels = tuple(_level(code_N, codes.num_codes, pairs_E2, categories) for code_N in codes.code_NL.T)
    return CodeReport(len(codes.code_NL), codes.num_collisions, codes.num_moved, outcome, levels)


def _level(code_N: np.ndarray, num_codes: int, pairs_E2: np.ndarray, categories: np.ndarray) -> LevelReport:
    first_E, second_E = code_N[pairs_E2].T
    counts = [np.bincount(codes, minlength=num_codes) / max(1, len(pairs_E2)) for codes in (first_E, second_E)]
    has_one = categories != ""
    told: list[float | None] = [None, None]
    if len(np.unique(categories[has_one])) > 1:
        exchanged_N = np.random.default_rng(0).permutation(code_N[has_one])
        told = [_told(codes, categories[has_one]) for codes in (code_N[has_one], exchanged_N)]
    return LevelReport(
        used=len(np.unique(code_N)) / num_codes,
        bits=_entropy(code_N),
        most_bits=float(np.log2(num_codes)),
        together=float((first_E == second_E).sum() / max(1, len(pairs_E2))),
        together_by_chance=float(counts[0] @ counts[1]),
        category=told[0],
        category_by_chance=told[1],
    )


def _told(code_N: np.ndarray, category_N: np.ndarray) -> float:
    """The mutual information of codes and categories, as a share of the categories' entropy."""
    number_N = np.unique(category_N, return_inverse=True)[1]
    both = _entropy(code_N * (number_N.max() + 1) + number_N)
    return (_entropy(code_N) + _entropy(number_N) - both) / _entropy(number_N)


def _entropy(values: np.ndarray) -> float:
    """Entropy of the shares of equal values, in bits.

    >>> _entropy(np.array([3, 3, 5, 7]))
    1.5
    """
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float((share * np.log2(1 / share)).sum())
