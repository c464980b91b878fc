"""The check that a model's log-probabilities are numbers. It runs on the device that holds them."""

from __future__ import annotations

import torch

from cprec.errors import ModelError


def require_finite(values: torch.Tensor) -> None:
    """Raise ModelError where values of a model are infinite or NaN.

    `values` are the normalisers of its distributions, or anything that is NaN where these are not finite. Logits
    themselves may be -inf: models use it to forbid tokens, and the distribution is still valid.
    """
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            "the model's scores are not finite: its weights are damaged, or too large for the precision they are read "
            "in. Bring the folder back from a good copy, or train the model again"
        )
