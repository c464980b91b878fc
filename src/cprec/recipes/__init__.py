"""Recipes: functions that return a complete `Recipe`, found by name in the one dict below.

A recipe's keyword arguments are set on the command line like any field; what must be chosen has no default.
"""

from __future__ import annotations

from collections.abc import Callable

from cprec.recipe import Recipe
from cprec.recipes.amazon_small import amazon_small
from cprec.recipes.base_text import base_text
from cprec.recipes.baselines import baselines
from cprec.recipes.demo import demo
from cprec.recipes.open_llm import open_llm

RECIPES: dict[str, Callable[..., Recipe]] = {
    "demo": demo,
    "amazon_small": amazon_small,
    "open_llm": open_llm,
    "base_text": base_text,
    "baselines": baselines,
}
"""Name on the command line -> the function that makes the recipe."""
