from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cprec.errors import ConfigError
from cprec.models import add_lora, check_isolation, load_model, num_parameters, tiny_model, trunk_and_head

IDS = torch.tensor([[5, 9, 3, 7]])


def tiny_qwen(seed: int = 0) -> Any:
    return tiny_model(50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, seed=seed)


def with_adapters(seed: int = 0) -> Any:
    model = tiny_qwen()
    model.name_or_path = "base"  # as if loaded from there
    return add_lora(model, rank=2, alpha=4, seed=seed)


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# ---- the tiny model --------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights_and_nothing_else_changes() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = tiny_qwen(3)
    assert torch.equal(torch.rand(1), expected)
    for other, equal in ((tiny_qwen(3), True), (tiny_qwen(4), False)):
        assert torch.equal(first.lm_head.weight, other.lm_head.weight) == equal


def test_tied_embeddings_are_counted_once() -> None:
    model = tiny_qwen()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    by_hand = 50 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 64 + 2 * 16 + 2 * 8) + 16
    assert num_parameters(model) == by_hand


@pytest.mark.parametrize("build", [tiny_qwen, tiny_llama])
def test_a_saved_model_gives_the_same_logits(build: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    tiny_qwen()
    model = build()
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path, device=torch.device("cpu"))):
        assert torch.equal(logits(model), logits(loaded))
    assert capfd.readouterr().err == ""  # no bars across ours


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_what_is_no_model_is_named(tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what == "empty":
        folder.mkdir()
    with pytest.raises(ConfigError, match=rf"model_name_or_path='{folder}' is neither 'tiny', a model folder nor"):
        load_model(folder)


def test_half_precision_models_load_in_fp32(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.float32}


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained() -> None:
    model = with_adapters()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert torch.equal(logits(model), logits(tiny_qwen()))  # adapters begin as zero
    # q, k, v, o are 16 x 16; gate, up are 16 x 64, down 64 x 16: rank * (in + out) each, two layers
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * (4 * 32 + 3 * 80)


def test_the_seed_decides_adapters() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = with_adapters(seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    first = weights(1)
    torch.rand(1)
    assert torch.equal(first, weights(1)) and not torch.equal(first, weights(2))


def test_adapters_find_their_base_and_are_trained_further(tmp_path: Path) -> None:
    tiny_qwen().save_pretrained(tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"), rank=2, alpha=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(loaded))
    assert all("lora_" in name for name, parameter in loaded.named_parameters() if parameter.requires_grad)
    assert add_lora(loaded, rank=2, alpha=4) is loaded
    with pytest.raises(ConfigError, match=r"lora_rank=3, but the model already has adapters of rank \[2\]"):
        add_lora(loaded, rank=3, alpha=4)


def test_adapters_need_a_saved_base() -> None:
    with pytest.raises(ConfigError, match=r"lora_rank=2 needs a saved base model"):
        add_lora(tiny_qwen(), rank=2, alpha=4)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_qwen, tiny_llama, with_adapters])
def test_the_head_over_the_trunk_gives_the_logits(build: Any) -> None:
    model = build()
    trunk, head = trunk_and_head(model)
    with torch.no_grad():
        assert torch.equal(head(trunk.eval()(input_ids=IDS).last_hidden_state), logits(model))


def test_heads_that_our_loss_would_get_wrong_are_refused() -> None:
    biased = SimpleNamespace(
        get_output_embeddings=lambda: nn.Linear(4, 4), config=SimpleNamespace(), get_decoder=lambda: None
    )
    capped = SimpleNamespace(
        get_output_embeddings=lambda: nn.Linear(4, 4, bias=False),
        config=SimpleNamespace(final_logit_softcapping=30.0),
        get_decoder=lambda: None,
    )
    for model in (biased, capped):
        with pytest.raises(ConfigError, match=r"output layers with a bias or soft-capped logits .* are not supported"):
            trunk_and_head(model)


# ---- isolation of packed documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_qwen, tiny_llama, with_adapters])
def test_packed_documents_are_isolated(build: Any) -> None:
    model = build().train()
    check_isolation(model)
    assert model.training


class Leaky(nn.Module):
    """Attends to all that came before, whatever the positions say."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.config = SimpleNamespace(_attn_implementation="own")

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_decoder(self) -> Any:
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.embedding(input_ids).cumsum(1))


def test_a_model_whose_documents_see_each_other_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"packed documents see each other in this model .* attention 'own'"):
        check_isolation(Leaky())


def test_a_model_that_is_not_finite_does_not_pass() -> None:
    model = tiny_qwen()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="packed documents see each other"):
        check_isolation(model)
