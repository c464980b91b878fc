from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cprec.errors import ConfigError
from cprec.inspection import check_attention, check_isolation, output_scale
from cprec.models import (
    add_lora,
    blocks_of,
    context_of,
    freeze_lowest,
    load_model,
    num_parameters,
    packed_hidden,
    tiny_model,
    trunk_and_head,
)

IDS = torch.tensor([[5, 9, 3, 7]])


def tiny_qwen(seed: int = 0) -> Any:
    return tiny_model(50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, seed=seed)


def with_adapters(seed: int = 0) -> Any:
    model = tiny_qwen()
    model.name_or_path = "base"  # as if loaded from there
    return add_lora(model, rank=2, alpha=4, seed=seed)


SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def tiny_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": False} | changes))


def tiny_smollm(**changes: Any) -> Any:
    """A Llama with tied embeddings, as SmolLM2 is."""
    return tiny_llama(tie_word_embeddings=True, **changes)


def tiny_gemma(**changes: Any) -> Any:
    """Gemma 3: sliding and full attention by turns, scaled and tied embeddings, norms that begin at zero."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | {"sliding_window": 3, "layer_types": kinds} | changes))


def tiny_qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"tie_word_embeddings": True} | changes))


FAMILIES = [tiny_qwen3, tiny_llama, tiny_smollm, tiny_gemma]


def train_two_steps(model: Any) -> None:
    """Two steps on packed rows of two documents each."""
    from cprec.train.loss import PackedLoss
    from cprec.train.trainable import make_optimizer

    loss = PackedLoss(model)
    optimizer = make_optimizer(loss, weight_decay=0.1)
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)
    targets = torch.where(positions.roll(-1, 1) > 0, ids.roll(-1, 1), -100)
    model.train()
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 3e-2
        (loss(ids, positions, targets) / 10).backward()
        optimizer.step()
        optimizer.zero_grad()


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


@pytest.mark.parametrize("build", [tiny_qwen, *FAMILIES])
def test_a_trained_and_saved_model_gives_the_same_logits_in_transformers_alone(
    build: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    tiny_qwen()
    model = build()
    before = logits(model)
    train_two_steps(model)
    assert (logits(model) - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path, device=torch.device("cpu"))):
        assert type(loaded) is type(model)
        assert torch.equal(logits(model), logits(loaded))
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied == bool(model.config.tie_word_embeddings)
    assert capfd.readouterr().err == ""  # no bars across ours


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"model_name_or_path='{tmp_path}' is neither 'tiny', a model folder, a GGUF"
    ):
        load_model(tmp_path)


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


@pytest.mark.parametrize(("layers", "frozen"), [(1, [0]), (0.5, [0]), (0.2, [])])
def test_the_lowest_layers_and_the_embeddings_keep_their_weights(layers: float, frozen: list[int]) -> None:
    model = tiny_qwen()  # two layers, whose output layer has the embeddings' weights
    freeze_lowest(model, layers)
    still = {name.split(".mlp")[0] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert "model.embed_tokens.weight" in still
    assert {name for name in still if name.endswith(("layers.0", "layers.1"))} == {f"model.layers.{i}" for i in frozen}
    assert model.model.norm.weight.requires_grad


def test_learned_positions_are_embeddings_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32))
    freeze_lowest(model, 2)
    trained = {name.split(".")[1] + "." + name.split(".")[2] for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {"h.2", "ln_f.weight", "ln_f.bias"}


def test_an_output_layer_of_its_own_is_trained() -> None:
    model = tiny_llama()
    freeze_lowest(model, 1)
    assert model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad


def test_no_model_is_frozen_whole() -> None:
    with pytest.raises(ConfigError, match=r"frozen_layers=2 leaves no layer .* it has 2, so give 1 at most"):
        freeze_lowest(tiny_qwen(), 2)


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


@pytest.mark.parametrize("build", FAMILIES)
def test_merged_adapters_are_a_plain_model_with_the_same_logits(build: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    build().save_pretrained(tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"), rank=2, alpha=4)
    train_two_steps(model)
    adapted, base = logits(model), logits(load_model(tmp_path / "base"))
    assert (adapted - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(tmp_path / "adapter")), adapted, rtol=0, atol=0)
    merged = load_model(tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    for name in ("merged", "base"):  # the base itself is as it was
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        expected = adapted if name == "merged" else base
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied == bool(loaded.config.tie_word_embeddings)


def test_adapters_need_a_saved_base() -> None:
    with pytest.raises(ConfigError, match=r"lora_rank=2 needs a saved base model"):
        add_lora(tiny_qwen(), rank=2, alpha=4)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_qwen, with_adapters, *FAMILIES])
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


@pytest.mark.parametrize("build", [with_adapters, *FAMILIES])
def test_blocks_are_the_layers(build: Any) -> None:
    assert len(blocks_of(build())) == 2


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no list of blocks called `layers`.*fsdp=false and torch_compile=false"):
        blocks_of(Leaky())


# ---- isolation of packed documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [with_adapters, *FAMILIES])
def test_packed_documents_are_isolated(build: Any) -> None:
    model = build().train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_isolation(model)
    assert model.training and torch.equal(torch.rand(2), expected)


ATTENTION = [
    "eager",
    "sdpa",
    pytest.param(
        "flex_attention",
        marks=[
            pytest.mark.slow,  # it is compiled
            pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's compiler warns of itself
        ],
    ),
    pytest.param(
        "flash_attention_2",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn"),
        ],
    ),
]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("build", FAMILIES)
def test_each_attention_implementation_isolates(build: Any, attention: str, tmp_path: Path) -> None:
    if (build, attention) == (tiny_gemma, "flex_attention"):
        pytest.skip("torch 2.13 makes C++ that does not compile for sliding windows on a CPU")
    build(head_dim=16).save_pretrained(tmp_path)  # flex attention takes heads of 16 and more
    device = torch.device("cuda" if attention.startswith("flash") else "cpu")
    model = load_model(tmp_path, device=device, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    check_isolation(model.to(torch.bfloat16) if attention.startswith("flash") else model)


def test_dropout_does_not_look_like_a_leak() -> None:
    model = tiny_llama(attention_dropout=0.5)
    check_isolation(model)


class Recording(nn.Module):
    """A decoder that returns its input ids as hidden states, and keeps the shapes it was given."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.head = nn.Linear(1, 50, bias=False)
        self.config = SimpleNamespace(_attn_implementation=attention)
        self.shapes: list[tuple[int, ...]] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_decoder(self) -> Any:
        def trunk(input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
            assert input_ids.shape == position_ids.shape and not use_cache
            self.shapes.append(tuple(input_ids.shape))
            return SimpleNamespace(last_hidden_state=input_ids[..., None].float())

        return trunk


@pytest.mark.parametrize(("attention", "shape"), [("sdpa", (2, 3)), ("flash_attention_2", (1, 6))])
def test_flash_attention_gets_all_rows_as_one(attention: str, shape: tuple[int, ...]) -> None:
    model, ids = Recording(attention), torch.tensor([[5, 6, 7], [8, 9, 10]])
    hidden = packed_hidden(model, ids, torch.tensor([[0, 1, 0], [0, 1, 2]]))
    assert model.shapes == [shape] and torch.equal(hidden, ids[..., None].float())


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
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.mixed(self.embedding(input_ids)))

    def mixed(self, embedded_RTD: torch.Tensor) -> torch.Tensor:
        return embedded_RTD.cumsum(1)


class LeakyInTraining(Leaky):
    def mixed(self, embedded_RTD: torch.Tensor) -> torch.Tensor:
        return embedded_RTD.cumsum(1) if self.training else embedded_RTD


class LeakyInSeveralRows(Leaky):
    """As attention that tells documents apart in a batch of one row only."""

    def mixed(self, embedded_RTD: torch.Tensor) -> torch.Tensor:
        return embedded_RTD.cumsum(1) if len(embedded_RTD) > 1 else embedded_RTD


@pytest.mark.parametrize("leaky", [Leaky, LeakyInTraining, LeakyInSeveralRows])
def test_a_model_whose_documents_see_each_other_is_refused(leaky: type[Leaky]) -> None:
    with pytest.raises(ConfigError, match=r"packed documents see each other in this model .* attention 'own'"):
        check_isolation(leaky().eval())


def test_a_model_that_is_not_finite_does_not_pass() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = float("nan")  # a token that no check reads
    with pytest.raises(ConfigError, match=r"weights of this model are not finite: model\.embed_tokens\.weight has NaN"):
        check_isolation(model)


def test_states_that_are_not_finite_are_no_leak() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
        model.model.layers[0].mlp.down_proj.weight.fill_(1e30)
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM gives states that are not finite .* its weights are finite"
    ):
        check_isolation(model)


# ---- what lies between trunk and logits ------------------------------------------------------------------------------


def tiny_cohere(**changes: Any) -> Any:
    """Logits are 0.0625 times what the output layer gives."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SHAPE | {"logit_scale": 0.0625} | changes))


def tiny_granite(**changes: Any) -> Any:
    """Logits are what the output layer gives, divided by 6."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SHAPE | {"logits_scaling": 6.0} | changes))


@pytest.mark.parametrize(("build", "scale"), [(tiny_llama, 1.0), (tiny_cohere, 0.0625), (tiny_granite, 1 / 6)])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_loss_is_that_of_transformers_whatever_scales_the_logits(build: Any, scale: float, adapted: bool) -> None:
    from cprec.train.loss import PackedLoss

    model = build().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # logits that are far from equal
    if adapted:
        model.name_or_path = "base"
        model = add_lora(model, rank=2, alpha=4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1
    assert output_scale(model) == scale
    targets = torch.cat([IDS[:, 1:], torch.tensor([[-100]])], 1)
    positions = torch.arange(4)[None]
    expected = model(input_ids=IDS, labels=IDS).loss * 3
    found = PackedLoss(model)(IDS, positions, targets)
    torch.testing.assert_close(found, expected)
    assert abs(expected.item() / 3 - math.log(50)) > 0.1  # no guess
    weight = model.get_output_embeddings().weight
    if not adapted:
        torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))
    with torch.no_grad():
        half = PackedLoss(model, bf16=True)(IDS, positions, targets)
    torch.testing.assert_close(half, expected.detach(), rtol=2e-2, atol=0)


def test_more_than_a_constant_between_trunk_and_logits_is_refused_by_name() -> None:
    class Shifted(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(50) * 1e-3
            return out

    model = tiny_llama()
    model.__class__ = Shifted
    with pytest.raises(ConfigError, match=r"Shifted does more between its last layer and its logits than to multiply"):
        output_scale(model)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("GptOss", r"GptOssForCausalLM attends in a way that cannot be read as a tree of titles \(it has s_aux\)"),
        ("Mamba", r"MambaForCausalLM attends in .* \(of 2 layers 0 are attention, run 0 times\)"),
    ],
)
def test_attention_that_ours_cannot_stand_for_is_refused_by_name(kind: str, why: str) -> None:
    import transformers

    sizes = {"num_local_experts": 4} if kind == "GptOss" else {}
    shape = {k: v for k, v in SHAPE.items() if kind == "GptOss" or not k.startswith(("num_att", "num_key", "head"))}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape | sizes))
    with pytest.raises(ConfigError, match=why):
        check_attention(model)


def test_of_a_stretched_context_the_original_counts() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10_000.0}
    shape = SHAPE | {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "pad_token_id": 0}
    model = Phi3ForCausalLM(Phi3Config(**shape, rope_parameters=factors))
    assert context_of(model) == 64
    assert context_of(tiny_llama(max_position_embeddings=256)) == 256


def test_what_is_tried_when_a_model_is_opened_leaves_it_as_it_was() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    before = model.config._attn_implementation
    assert check_attention(model) and output_scale(model) == 1
    assert model.training and model.config._attn_implementation == before
