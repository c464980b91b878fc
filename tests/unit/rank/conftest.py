from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cprec.models import tiny_model

EOS = 1
VOCABULARY = 320


def sharpened(model: Any) -> Any:
    """Random weights give nearly uniform probabilities; larger ones make every wrong position or mask show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    return model.eval()


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "qwen3":
        return sharpened(tiny_model(VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return sharpened(LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def teacher_forced(model: Any) -> Callable[..., float]:
    """A title's log-probability by one forward pass over prompt and title, without a cache."""

    def score(prompt: list[int], title: list[int]) -> float:
        ids = torch.tensor([[*prompt, *title]])
        with torch.no_grad():
            logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1).double()
        return sum(float(logp[place - 1, ids[0, place]]) for place in range(len(prompt), ids.shape[1]))

    return score
