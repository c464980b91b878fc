"""In which numbers a model reads prompts."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cprec import distributed
from cprec.search.reading import ModelReader


@pytest.mark.parametrize(
    ("width", "has_bf16", "expected"), [(512, True, True), (256, True, False), (512, False, False)]
)
def test_on_a_cpu_wide_models_read_in_bf16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, width: int, has_bf16: bool, expected: bool
) -> None:
    monkeypatch.setattr(distributed, "use_bf16", lambda setting, device: has_bf16)
    size = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **size))
    assert ModelReader(model, bf16=None).bf16 is expected
    assert not ModelReader(model, bf16=False).bf16
