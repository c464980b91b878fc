"""Arms that are one model trained with several seeds. Their names say so.

In a table of differences such arms stand together and are never tested against each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SUFFIX = re.compile(r"(?P<model>.+) \(seed \d+\)")


def arm_of(model: str, seed: int) -> str:
    """The name of an arm that is one of several seeds.

    >>> arm_of("SASRec", 1)
    'SASRec (seed 1)'
    """
    return f"{model} (seed {seed})"


def model_of(arm: str) -> str:
    """The name of an arm without its seed."""
    match = SUFFIX.fullmatch(arm)
    return match["model"] if match else arm


def together(arms: Iterable[str]) -> dict[str, list[str]]:
    """Arms by the name that their model has in a table, in the order given; an arm without a seed stands alone.

    >>> together(["EASE", "SASRec (seed 0)", "SASRec (seed 1)"])
    {'EASE': ['EASE'], 'SASRec (2 seeds)': ['SASRec (seed 0)', 'SASRec (seed 1)']}
    """
    models: dict[tuple[str, bool], list[str]] = {}
    for arm in arms:
        models.setdefault((model_of(arm), SUFFIX.fullmatch(arm) is not None), []).append(arm)
    return {f"{model} ({len(own)} seeds)" if len(own) > 1 else own[0]: own for (model, _), own in models.items()}
