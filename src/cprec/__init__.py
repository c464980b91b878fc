"""CPRec: all-domain continual pre-training of language models for recommendation.

`from cprec import Recommender` is the way in for a trained model:

    recommender = Recommender.from_pretrained("runs/demo/finetune/books/cprec-style")
    recommender.recommend(["title of an item", "title of the next one"], k=10)

The folder that `cprec evaluate` keeps of a trained baseline, `OUT/baselines/DOMAIN/NAME`, is opened alike.

Importing `cprec` itself loads nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cprec.trained import Recommender

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Recommender":
        from cprec.trained import Recommender  # here, because it loads torch

        return Recommender
    raise AttributeError(f"module 'cprec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Recommender"])
