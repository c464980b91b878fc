"""The estimate against what PyTorch counts and what real models take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from cprec.errors import ConfigError
from cprec.models import add_lora, freeze_lowest, packed_hidden, tiny_model, unloaded_model
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.train import estimate as module
from cprec.train.checkpoint import TrainState, save_checkpoint
from cprec.train.estimate import (
    Estimate,
    estimate,
    flops_per_token,
    matmul_peak,
    mean_context,
    measure,
    micro_batch_bytes,
)
from cprec.train.loss import PackedLoss
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


@pytest.mark.parametrize("layers", [2, 5])
def test_nothing_is_computed_backwards_below_what_is_trained(layers: int) -> None:
    model = make("llama", attention="eager", num_hidden_layers=8)
    whole = flops_per_token(model, ROW_TOKENS)
    freeze_lowest(model, layers)
    told = flops_per_token(model, ROW_TOKENS)
    # Of the first trained block's inputs, which no trained weight made, nothing needs a gradient: PyTorch saves that.
    assert counted_flops(model) == pytest.approx(told, rel=0.05)
    assert told < (1 - 0.5 * layers / 8) * whole


def test_the_context_of_packed_documents() -> None:
    positions = packed_rows()[1]
    assert mean_context([40, 24]) == pytest.approx((positions + 1).double().mean().item())


def test_a_window_limits_what_a_layer_attends_to() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = make("gemma3", sliding_window=16, layer_types=kinds)
    assert flops_per_token(model, 100) - flops_per_token(model, 16) == 12 * 32 * (100 - 16)


# ---- memory ----------------------------------------------------------------------------------------------------------


def on_meta(make_model: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make_model()


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
def test_a_micro_batch_takes_about_what_a_real_model_keeps(family: str, bf16: bool) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8}
    told = micro_batch_bytes(on_meta(lambda: make(family, **sizes)), ROWS * ROW_TOKENS, bf16=bf16)
    model = make(family, **sizes).train()
    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    assert told == pytest.approx(gradients + kept_by_autograd(model, bf16), rel=0.3)


def test_adapters_need_gradients_of_their_own_alone() -> None:
    model = make("qwen3")
    model.name_or_path = "base"
    frozen = sum(p.numel() for p in model.parameters())
    whole = micro_batch_bytes(model, 1, bf16=False)
    adapted = add_lora(model, rank=2, alpha=4)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert whole - micro_batch_bytes(adapted, 1, bf16=False) == 4 * (frozen - trained)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    def told(num_layers: int, checkpointing: bool) -> float:
        model = on_meta(lambda: make("qwen3", num_hidden_layers=num_layers))
        gradients = sum(4 * parameter.numel() for parameter in model.parameters())
        tokens = ROWS * ROW_TOKENS
        return micro_batch_bytes(model, tokens, bf16=False, gradient_checkpointing=checkpointing) - gradients

    of_input = ROWS * ROW_TOKENS * 32 * 4
    assert told(9, True) - told(8, True) == of_input
    assert told(9, False) - told(8, False) > 10 * of_input


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
    found = matmul_peak(CPU, False, clock_of([0.0, 9.0, 0.0, 0.5, 0.0, 0.25, 0.0, 0.3]))
    assert found == pytest.approx(2 * 16**3 / 0.25)
    assert torch.equal(before, torch.get_rng_state()), "what training draws is as it was"
    assert matmul_peak(CPU, bf16=True) > 0


@pytest.fixture
def told(make_stream: Callable[..., TokenStream], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An estimate of a small model on the test's stream, at 100 GFLOP/s; anything may be changed by keyword."""
    monkeypatch.setattr(module, "matmul_peak", lambda device, bf16: 1e11)

    def told(model: Any = None, **changes: Any) -> Estimate:
        settings: dict[str, Any] = {"rows": 2, "num_checkpoints": 3, "output_dir": tmp_path / "a" / "b", "bf16": False}
        model = model or on_meta(lambda: make("qwen3", vocab_size=400))
        return estimate(model, changes.pop("stream", None) or make_stream(), device=CPU, **settings | changes)

    return told


Told = Callable[..., Estimate]


def test_a_micro_batch_is_timed_once_warm_and_leaves_nothing(
    make_stream: Callable[..., TokenStream], told: Told
) -> None:
    stream = make_stream(rows_per_step=5)
    model = make("qwen3", vocab_size=400)
    before = [parameter.clone() for parameter in model.parameters()]
    planned = replace(told(model, stream=stream), num_processes=3)
    found = measure(planned, PackedLoss(model), stream, clock_of([0.0, 9.0, 0.0, 0.5, 0.0, 0.4]))
    assert found.tokens_per_second == pytest.approx(3 * 2 * 96 * stream.fill / 0.4)
    assert found.measured and found.micro_batch_bytes >= 4 * found.num_trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
def test_the_memory_of_a_micro_batch_is_measured(make_stream: Callable[..., TokenStream], told: Told) -> None:
    stream = make_stream(rows_per_step=5)
    model = make("qwen3", vocab_size=400, hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    planned, loss = told(model, stream=stream), PackedLoss(model)
    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    for _ in range(2):  # the second time the process has memory left from the first
        found = measure(planned, loss, stream)
        assert 1.1 * gradients < found.micro_batch_bytes < 3 * gradients


def test_memory_that_the_process_has_kept_counts_again(make_stream: Callable[..., TokenStream], told: Told) -> None:
    stream = make_stream(rows_per_step=5)
    model = make("qwen3", vocab_size=400, hidden_size=256)
    planned, loss = told(model, stream=stream), PackedLoss(model)
    predicted = planned.micro_batch_bytes
    found = [measure(planned, loss, stream).micro_batch_bytes for _ in range(3)]
    assert all(predicted / 3 < taken < predicted * 3 for taken in found[1:]), (found, predicted)


def test_a_run_is_estimated_from_its_stream(
    make_stream: Callable[..., TokenStream], told: Told, tmp_path: Path
) -> None:
    stream = make_stream(targets_only=True)
    model = on_meta(lambda: make("qwen3", vocab_size=400))
    found = told(model, stream=stream, heldout_tokens=100)
    assert (found.num_tokens, found.heldout_tokens, found.measured) == (stream.num_tokens, 100, False)
    assert found.micro_batch_bytes == micro_batch_bytes(model, 2 * 96, bf16=False)
    batch = stream.batch(0)
    share = batch.counts[NEXT_TOKEN] / batch.num_tokens
    assert share < 0.5 and found.flops_per_token == flops_per_token(model, found.context, share)
    assert found.free_memory > 0 and found.free_disk > 0 and not (tmp_path / "a").exists()


def test_time_is_told_from_a_timed_rate_or_guessed_and_it_says_which(told: Told) -> None:
    planned = told(heldout_tokens=30_000)
    timed = replace(planned, num_tokens=1_000_000, tokens_per_second=5_000.0, measured=True)
    assert timed.seconds == pytest.approx(1_010_000 / 5_000)
    assert timed.mfu(5_000) == pytest.approx(5_000 * timed.flops_per_token / 1e11)
    assert "time: about 3:22 at 5,000 tokens/s (timed on a micro-batch" in str(timed)
    assert planned.mfu(planned.tokens_per_second) == pytest.approx(module.ASSUMED_MFU)
    assert "(not timed: a guess, 40% of the 100 GFLOP/s of matrix products here)" in str(planned)
    assert told(gradient_checkpointing=True).tokens_per_second < planned.tokens_per_second


def test_what_does_not_fit_is_said_before(told: Told) -> None:
    fits = told()
    assert "warning" not in str(fits)
    tight = replace(fits, free_memory=fits.memory_bytes - 1, free_disk=fits.disk_bytes - 1)
    of_memory, of_disk = str(tight).splitlines()[-2:]
    assert of_memory.startswith("warning: ") and "lower micro_batch_size" in of_memory
    assert of_disk.startswith("warning: ") and "save_total_limit" in of_disk


def test_the_four_lines(told: Told) -> None:
    lines = str(replace(told(), num_processes=2)).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["arithmetic", "memory", "disk", "time"]
    assert re.match(r"arithmetic: 0.05 M of 0.05 M parameters are trained; \d+ kFLOP a token, .* on average", lines[0])
    for part in ("in each of 2 processes", "weights", "Adam", "a micro-batch with its gradients", "by arithmetic"):
        assert part in lines[1]
    assert "3 checkpoints of" in lines[2]


def test_disk_is_that_of_real_folders(told: Told, tmp_path: Path) -> None:
    model = tiny_model(VOCABULARY)
    optimizer = make_optimizer(PackedLoss(model), weight_decay=0.1)
    ids, positions = packed_rows()
    PackedLoss(model)(ids, positions, ids).backward()
    optimizer.step()
    folder = save_checkpoint(tmp_path, TrainState(), PackedLoss(model), optimizer, 1)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = told(on_meta(lambda: tiny_model(VOCABULARY)))
    assert found.checkpoint_bytes == pytest.approx(written, rel=0.05)
    model.save_pretrained(tmp_path / "model")
    assert found.model_bytes == pytest.approx((tmp_path / "model" / "model.safetensors").stat().st_size, rel=0.01)
    assert found.disk_bytes == 3 * found.checkpoint_bytes + found.model_bytes


# ---- models without weights ------------------------------------------------------------------------------------------


def test_a_model_folder_is_not_loaded_and_adapters_are_seen(tmp_path: Path) -> None:
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    make("qwen3").save_pretrained(base)
    for path in base.glob("*.safetensors"):
        path.unlink()  # what is not there cannot be read
    found = on_meta(lambda: unloaded_model(base))
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in make("qwen3").parameters())
    assert {p.dtype for p in found.parameters()} == {torch.float32}

    model = make("qwen3")
    model.name_or_path = str(base)
    add_lora(model, rank=2, alpha=4).save_pretrained(adapters)
    adapted = on_meta(lambda: unloaded_model(adapters))
    assert 0 < sum(p.numel() for p in adapted.parameters() if p.requires_grad) < 10_000
    with pytest.raises(ConfigError, match="there is no folder"):
        unloaded_model(tmp_path / "nowhere")


def test_a_model_too_large_for_this_machine_is_estimated(told: Told) -> None:
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 20, "num_attention_heads": 64}
    model = on_meta(lambda: make("llama", **big, vocab_size=128_000, head_dim=128))
    found = told(model, gradient_checkpointing=True)
    assert found.weight_bytes > 70e9 and math.isfinite(found.seconds)
    assert "warning: about" in str(found)
