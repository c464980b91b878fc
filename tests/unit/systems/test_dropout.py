"""Dropout by few random bits: shares, scales and gradients."""

from __future__ import annotations

import pytest
import torch

from cprec.systems.dropout import Dropout, dropout
from cprec.systems.encoders import SelfAttention


@pytest.mark.parametrize("share", [0.1, 0.4, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_is_dropped_and_the_rest_grows_to_make_up_for_it(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.ones(3, 333, 101, dtype=dtype, requires_grad=True)
    dropped = dropout(values, share, training=True)
    is_kept = dropped != 0
    assert is_kept.float().mean().item() == pytest.approx(1 - share, abs=0.005)
    torch.testing.assert_close(dropped[is_kept].float().unique(), torch.tensor([1 / (1 - share)]), rtol=5e-3, atol=0)
    dropped.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, dropped.detach(), msg="what is dropped learns nothing")


def test_places_are_dropped_independently() -> None:
    """Also those that share a random number of 64 bits."""
    torch.manual_seed(1)
    is_kept = (dropout(torch.ones(50_000, 8), 0.5, training=True) > 0).float()
    together = is_kept.T @ is_kept / len(is_kept)
    torch.testing.assert_close(together, 0.25 + 0.25 * torch.eye(8), atol=0.01, rtol=0)


def test_a_seed_repeats_it_and_nothing_happens_outside_training() -> None:
    values, module = torch.randn(5, 7), Dropout(0.3)
    torch.manual_seed(2)
    first = module(values)
    assert not torch.equal(module(values), first)
    torch.manual_seed(2)
    assert torch.equal(module(values), first)
    assert module.eval()(values) is values and dropout(values, 0.0, training=True) is values
    assert not dropout(values, 1.0, training=True).any()
    assert dropout(values[:0], 0.5, training=True).shape == (0, 7)


def test_a_share_of_less_than_half_a_level_drops_nothing() -> None:
    """A level is 1 / 65,536; a share of more than half of it is rounded up to it."""
    torch.manual_seed(4)
    values = torch.ones(100, 1000)
    assert torch.equal(dropout(values, 1e-6, training=True), values)
    assert (dropout(values, 1e-5, training=True) == 0).sum() < 20


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["pre_norm", "query_norm"])
def test_attention_that_drops_out_is_otherwise_the_fused_one(
    causal: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the random numbers differs: with all of them kept, states and gradients are those without dropout."""
    torch.manual_seed(3)
    sizes = {"max_length": 6, "num_blocks": 2, "num_heads": 2, "dropout": 0.0, "causal": causal}
    encoder = SelfAttention(8, **sizes, attention_dropout=0.4, block=kind)  # type: ignore[arg-type]
    inputs, lengths = torch.randn(3, 6, 8), torch.tensor([6, 1, 4])
    monkeypatch.setattr("cprec.systems.encoders.dropout", lambda values, share, *, training: values)

    def states_and_gradient(training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        encoder.train(training).zero_grad()
        states = encoder(inputs, lengths)
        weight = encoder.blocks[0].query_key_value.weight  # type: ignore[union-attr]
        states[0].square().sum().backward()
        return states, weight.grad.clone()  # type: ignore[union-attr,operator]

    for by_hand, fused in zip(states_and_gradient(True), states_and_gradient(False), strict=True):
        torch.testing.assert_close(by_hand, fused, rtol=1e-4, atol=1e-5)
