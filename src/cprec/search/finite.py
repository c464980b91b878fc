"""The one check that what a model says is a number: where its log-probabilities are made, whoever reads for it."""

from __future__ import annotations

import torch

from cprec.errors import ModelError


def require_finite(values: torch.Tensor) -> None:
    """Raise ModelError where values of a model are infinite or no numbers.

    `values` are the normalisers of its distributions, or what is NaN where these are not finite: a token that a model
    forbids has the logit -inf, and with it a distribution that is as good as any.
    """
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            "the model's scores are not finite: its weights are damaged, or too large for the precision they are read "
            "in. Bring the folder back from a good copy, or train the model again"
        )
