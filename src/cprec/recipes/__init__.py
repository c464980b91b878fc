"""Recipes: functions that return a complete `Recipe`, found by name in the one dict below.

A recipe's keyword arguments are set on the command line like any field; what must be chosen has no default.
"""

from __future__ import annotations

from collections.abc import Callable

from cprec.config import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {}
"""Name on the command line -> the function that makes the recipe."""
