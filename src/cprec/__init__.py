"""CPRec: all-domain continual pre-training of language models for recommendation.

`from cprec import Recommender` is the way in for a trained model:

    recommender = Recommender.from_pretrained("runs/demo/finetune/books/cprec-style")
    recommender.recommend(["title of an item", "title of the next one"], k=10)

Importing `cprec` itself loads nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cprec.rank.llm import LLMRecommender as Recommender

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Recommender":
        from cprec.rank.llm import LLMRecommender  # here, because it loads torch

        return LLMRecommender
    raise AttributeError(f"module 'cprec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Recommender"])
