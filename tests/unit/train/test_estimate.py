"""The estimate against what PyTorch counts and what real models take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from cprec.errors import ConfigError
from cprec.models import add_lora, packed_hidden, tiny_model
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.train import estimate as module
from cprec.train.checkpoint import TrainState, save_checkpoint
from cprec.train.config import PretrainConfig
from cprec.train.estimate import (
    estimate,
    estimate_plan,
    flops_per_token,
    matmul_peak,
    mean_context,
    memory_of,
    mfu,
    timed_rate,
    unloaded_model,
    without_weights,
)
from cprec.train.loss import PackedLoss
from cprec.train.plan import make_plan
from cprec.train.trainable import make_optimizer

ROWS, ROW_TOKENS, VOCABULARY = 2, 64, 300
CPU = torch.device("cpu")


def make(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A small decoder with grouped-query attention."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    }[family]
    settings = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": attention},
        **{"tie_word_embeddings": family != "llama", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    }
    return model_class(config_class(**settings | changes))


def packed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions of rows with two documents each."""
    positions = torch.cat([torch.arange(40), torch.arange(ROW_TOKENS - 40)]).repeat(ROWS, 1)
    return torch.randint(0, VOCABULARY, positions.shape), positions


def counted_flops(model: Any, target_share: float = 1.0) -> float:
    """What PyTorch counts for a forward and backward pass, per token."""
    ids, positions = packed_rows()
    targets = ids.clone()
    targets[:, round(target_share * ROW_TOKENS) :] = -100
    loss = PackedLoss(model)

    def added_in_place(total: Any, left: Any, right: Any, out_shape: Any = None, **options: Any) -> int:
        return mm_flop(left, right)

    in_place = {torch.ops.aten.addmm_: added_in_place}  # which PyTorch does not count
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss(ids, positions, targets).backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("target_share", [1.0, 0.25])
def test_arithmetic_is_what_pytorch_counts(family: str, target_share: float) -> None:
    model = make(family, attention="eager")  # which computes every product of the row: a context of all its tokens
    assert flops_per_token(model, ROW_TOKENS, target_share) == counted_flops(model, target_share)


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    model = make("qwen3", attention="eager", num_hidden_layers=8)
    whole = flops_per_token(model, ROW_TOKENS)
    model.name_or_path = "base"
    adapted = add_lora(model, rank=2, alpha=4)
    told = flops_per_token(adapted, ROW_TOKENS)
    # Of the first block's inputs, which no trained weight made, nothing needs a gradient: PyTorch saves that.
    assert counted_flops(adapted) == pytest.approx(told, rel=0.05)
    assert told < 0.85 * whole


def test_the_context_of_packed_documents() -> None:
    positions = packed_rows()[1]
    assert mean_context([40, 24]) == pytest.approx((positions + 1).double().mean().item())


def test_a_window_limits_what_a_layer_attends_to() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = make("gemma3", sliding_window=16, layer_types=kinds)
    assert flops_per_token(model, 100) - flops_per_token(model, 16) == 12 * 32 * (100 - 16)


# ---- memory ----------------------------------------------------------------------------------------------------------


def real_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_by_autograd(model: Any, bf16: bool) -> int:
    """Bytes of the distinct storages that a real forward pass keeps for the backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # alive, so that addresses stay its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
        packed_hidden(model, *packed_rows())
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("bf16", [False, True])
def test_memory_is_that_of_a_real_model(family: str, bf16: bool) -> None:
    told = memory_of(without_weights(lambda: make(family)), rows=ROWS, row_tokens=ROW_TOKENS, bf16=bf16)
    model = make(family).train()
    optimizer = make_optimizer(PackedLoss(model), weight_decay=0.1)
    ids, positions = packed_rows()
    PackedLoss(model)(ids, positions, ids).backward()
    optimizer.step()
    means = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    assert told.weights == real_bytes(model.parameters())
    assert told.gradients == real_bytes(p.grad for p in model.parameters())
    assert told.optimizer == real_bytes(means)
    assert told.activations == kept_by_autograd(model, bf16)
    assert told.gathered == 0


def test_adapters_need_gradients_of_their_own_alone() -> None:
    def adapted() -> Any:
        model = make("qwen3")
        model.name_or_path = "base"
        return add_lora(model, rank=2, alpha=4)

    told = memory_of(without_weights(adapted), rows=ROWS, row_tokens=ROW_TOKENS, bf16=False)
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert told.weights == real_bytes(model.parameters())
    assert told.gradients == real_bytes(trained) == told.optimizer // 2
    assert told.gradients < 0.2 * told.weights


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    def told(num_layers: int, checkpointing: bool) -> int:
        model = without_weights(lambda: make("qwen3", num_hidden_layers=num_layers))
        memory = memory_of(model, rows=ROWS, row_tokens=ROW_TOKENS, bf16=False, gradient_checkpointing=checkpointing)
        return memory.activations

    of_input = ROWS * ROW_TOKENS * 32 * 4
    assert told(9, True) - told(8, True) == of_input
    assert told(9, False) - told(8, False) > 10 * of_input
    assert told(8, True) < 0.3 * told(8, False)


def test_sharding_divides_what_is_trained() -> None:
    model = without_weights(lambda: make("llama"))
    one = memory_of(model, rows=ROWS, row_tokens=ROW_TOKENS, bf16=True)
    four = memory_of(model, rows=ROWS, row_tokens=ROW_TOKENS, bf16=True, fsdp_processes=4)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(four, name) == math.ceil(getattr(one, name) / 4)
    assert four.activations < one.activations, "no bf16 copies beside what is gathered"
    assert 0 < four.gathered < one.weights


# ---- rates -----------------------------------------------------------------------------------------------------------


def clock_of(steps: list[float]) -> Callable[[], float]:
    """A clock that has moved on by the next of `steps` whenever it is read; the last one goes on."""
    now = [100.0]
    coming: Iterator[float] = iter(steps)

    def clock() -> float:
        now[0] += next(coming, steps[-1])
        return now[0]

    return clock


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.MATMUL_SIZE, "cpu", 16)
    before = torch.get_rng_state()
    found = matmul_peak(CPU, bf16=False, seconds=1.0, clock=clock_of([0, 0.5, 0.25, 0.3]))
    assert found == pytest.approx(2 * 16**3 / 0.25)
    assert torch.equal(before, torch.get_rng_state()), "what training draws is as it was"
    assert matmul_peak(CPU, bf16=True, seconds=0.0) > 0


def test_a_micro_batch_is_timed_once_warm_and_leaves_nothing(make_stream: Callable[..., TokenStream]) -> None:
    stream = make_stream(rows_per_step=5)
    model = make("qwen3", vocab_size=400)
    before = [parameter.clone() for parameter in model.parameters()]
    clock = clock_of([0, 0.5, 0.4, 9.0])
    rate = timed_rate(PackedLoss(model), stream, CPU, rows=2, num_processes=3, clock=clock)
    assert rate == pytest.approx(3 * 2 * 96 * stream.fill / 0.4, rel=0.01)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_plan_is_estimated_from_its_settings(
    make_stream: Callable[..., TokenStream], data: Path, tmp_path: Path
) -> None:
    stream = make_stream(targets_only=True)
    config = PretrainConfig(
        data=str(data), output_dir=str(tmp_path / "a" / "b"), max_length=96, per_device_train_batch_size=4, eval_steps=3
    )
    plan = make_plan(config, stream)
    model = without_weights(lambda: make("qwen3", vocab_size=400))
    told = estimate_plan(config, plan, model, device=CPU, bf16=False, heldout_tokens=100, num_stable=1)
    assert told.num_tokens == stream.num_tokens and not told.measured
    assert told.heldout_tokens == 100 * (stream.num_steps // 3 + 2)
    assert told.num_checkpoints == config.save_total_limit + 2
    assert told.memory == memory_of(model, rows=4, row_tokens=96, bf16=False)
    batch = stream.batch(0)
    share = batch.counts[NEXT_TOKEN] / batch.num_tokens
    assert share < 0.5 and told.flops_per_token == flops_per_token(model, told.context, share)
    assert told.free_memory > 0 and told.free_disk > 0 and not (tmp_path / "a").exists()
    assert told.timed(123.0).tokens_per_second == 123.0 and "123 tokens/s (timed" in told.timed(123.0).time_line


@pytest.fixture
def told() -> Callable[..., Any]:
    def told(**changes: Any) -> Any:
        settings: dict[str, Any] = {
            **{"num_tokens": 1_000_000, "lengths": [40, 24], "rows": ROWS, "row_tokens": ROW_TOKENS, "bf16": False},
            **{"peak": 1e11, "heldout_tokens": 0},
        }
        return estimate(without_weights(lambda: make("qwen3")), **settings | changes)

    return told


def test_time_is_told_from_a_timed_rate_or_guessed_and_it_says_which(told: Callable[..., Any]) -> None:
    timed = told(tokens_per_second=5_000.0, heldout_tokens=30_000)
    assert timed.seconds == pytest.approx(1_010_000 / 5_000)
    assert timed.mfu == pytest.approx(5_000 * timed.flops_per_token / 1e11) and timed.measured
    assert "time: about 3:22 at 5,000 tokens/s (timed on a micro-batch" in str(timed)
    guessed = told(num_processes=3)
    assert guessed.mfu == pytest.approx(module.ASSUMED_MFU["cpu"]) and not guessed.measured
    assert guessed.tokens_per_second == pytest.approx(3 * told().tokens_per_second)
    assert "(not timed: a guess, 40% of the 300 GFLOP/s of matrix products here)" in str(guessed)
    assert told(gradient_checkpointing=True).tokens_per_second < told().tokens_per_second
    with pytest.raises(ValueError, match="give tokens_per_second as timed, or peak"):
        told(peak=0)
    unknown = told(peak=0, tokens_per_second=10.0)
    assert math.isnan(unknown.mfu) and "nan" not in str(unknown)
    assert math.isnan(mfu(1.0, 1.0, 0.0))


def test_what_does_not_fit_is_said_before(told: Callable[..., Any]) -> None:
    fits = told()
    assert fits.warnings == [] and "warning" not in str(fits)
    tight = told(free_memory=fits.memory.total - 1, free_disk=fits.disk_bytes - 1)
    assert [warning.split(":")[0] for warning in tight.warnings] == ["warning", "warning"]
    assert "gradient_checkpointing=true" in str(tight) and "save_total_limit" in str(tight)


def test_the_four_lines(told: Callable[..., Any]) -> None:
    lines = str(told(num_processes=2, fsdp=True)).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["arithmetic", "memory", "disk", "time"]
    assert (
        lines[0].startswith("arithmetic: 0.04 M of 0.04 M parameters are trained; 2") and "to 18 on average" in lines[0]
    )
    for part in ("in each of 2 processes", "weights", "gradients", "Adam", "activations", "loss", "gathered"):
        assert part in lines[1]
    assert "3 checkpoints of" in lines[2]


def test_disk_is_that_of_real_folders(tmp_path: Path) -> None:
    model = tiny_model(VOCABULARY)
    optimizer = make_optimizer(PackedLoss(model), weight_decay=0.1)
    ids, positions = packed_rows()
    PackedLoss(model)(ids, positions, ids).backward()
    optimizer.step()
    folder = save_checkpoint(tmp_path, TrainState(), PackedLoss(model), optimizer, 1)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    told = estimate(
        without_weights(lambda: tiny_model(VOCABULARY)),
        **{"num_tokens": 1, "lengths": [2], "rows": 1, "row_tokens": 8, "bf16": False, "peak": 1e9},
    )
    assert told.checkpoint_bytes == pytest.approx(written, rel=0.05)
    model.save_pretrained(tmp_path / "model")
    assert told.model_bytes == pytest.approx((tmp_path / "model" / "model.safetensors").stat().st_size, rel=0.01)
    assert told.disk_bytes == 3 * told.checkpoint_bytes + told.model_bytes


# ---- models without weights ------------------------------------------------------------------------------------------


def test_a_model_folder_is_not_loaded_and_adapters_are_seen(tmp_path: Path) -> None:
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    make("qwen3").save_pretrained(base)
    for path in base.glob("*.safetensors"):
        path.unlink()  # what is not there cannot be read
    found = without_weights(lambda: unloaded_model(base))
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in make("qwen3").parameters())
    assert {p.dtype for p in found.parameters()} == {torch.float32}

    model = make("qwen3")
    model.name_or_path = str(base)
    add_lora(model, rank=2, alpha=4).save_pretrained(adapters)
    adapted = without_weights(lambda: unloaded_model(adapters))
    assert 0 < sum(p.numel() for p in adapted.parameters() if p.requires_grad) < 10_000
    with pytest.raises(ConfigError, match="neither a model folder nor a model"):
        unloaded_model(tmp_path / "nowhere")


def test_a_model_too_large_for_this_machine_is_estimated(told: Callable[..., Any]) -> None:
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 20, "num_attention_heads": 64}
    model = without_weights(lambda: make("llama", **big, vocab_size=128_000, head_dim=128))
    memory = memory_of(model, rows=4, row_tokens=2048, bf16=True, gradient_checkpointing=True)
    assert memory.weights > 70e9 and memory.activations > 5e9
