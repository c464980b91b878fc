from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from cprec.batch import IGNORE, Batch
from cprec.errors import ConfigError
from cprec.models import tiny_model
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.train.attention import use_document_attention
from cprec.train.loss import BLOCK, CHUNK, PackedLoss, linear_cross_entropy, prepare_loss

WIDTH, VOCABULARY = 16, 37


def problem(num: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, WIDTH, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=random).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (num,), generator=random)


@pytest.mark.parametrize("block", [10, BLOCK])
@pytest.mark.parametrize("num", [1, 7, CHUNK, 2 * CHUNK + 5])
def test_values_and_gradients_are_those_of_torch(num: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.train.loss.BLOCK", block)
    hidden, weight, target = problem(num)
    loss = linear_cross_entropy(hidden, weight, target, torch.float32)
    mine = torch.autograd.grad(0.25 * loss, [hidden, weight])
    full = cross_entropy(hidden @ weight.T, target, reduction="sum")
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)
    for got, expected in zip(mine, torch.autograd.grad(0.25 * full, [hidden, weight]), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [1, CHUNK + 5])
def test_several_targets_count_by_their_chances(num: int) -> None:
    hidden, weight, _ = problem(num)
    random = torch.Generator().manual_seed(1)
    target = torch.randint(VOCABULARY, (num, 4), generator=random)
    target[:, 3] = target[:, 0]  # equal ones add up
    chance = torch.rand(num, 4, generator=random)
    chance /= chance.sum(1, keepdim=True)
    loss = linear_cross_entropy(hidden, weight, target, torch.float32, chance_NK=chance)
    mine = torch.autograd.grad(0.25 * loss, [hidden, weight])
    of_all = torch.zeros(num, VOCABULARY).scatter_add_(1, target, chance)
    full = cross_entropy(hidden @ weight.T, of_all, reduction="sum")
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)
    for got, expected in zip(mine, torch.autograd.grad(0.25 * full, [hidden, weight]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_rows_with_one_target_and_with_several_have_the_same_loss() -> None:
    """Where the weight is all on the first of them."""
    random = torch.Generator().manual_seed(0)
    loss = PackedLoss(tiny_model(VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    ids = torch.randint(VOCABULARY, (3, 8), generator=random)
    positions, targets = torch.arange(8).expand(3, -1), torch.roll(ids, -1, 1)
    targets[:, -1], targets[1] = IGNORE, IGNORE
    several = torch.stack([targets, torch.full_like(targets, IGNORE)], 2)
    weights = torch.stack([(targets != IGNORE).float(), torch.zeros(3, 8)], 2)
    rows = {"input_ids": ids, "position_ids": positions}
    one = loss.losses(rows | {"targets": targets})[NEXT_TOKEN]
    assert loss.losses(rows | {"targets": several, "weights": weights})[NEXT_TOKEN].item() == one.item() > 0
    half = loss.losses(rows | {"targets": several.clamp(min=0), "weights": weights / 2 + weights.flip(2) / 2})
    assert half[NEXT_TOKEN].item() != pytest.approx(one.item())


def test_a_hand_worked_loss() -> None:
    # logits (0, ln 3): probabilities 1/4 and 3/4
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [torch.log(torch.tensor(3.0))]])
    for target, probability in ((0, 0.25), (1, 0.75)):
        loss = linear_cross_entropy(hidden, weight, torch.tensor([target]), torch.float32)
        assert loss.exp().item() == pytest.approx(1 / probability)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen: str) -> None:
    hidden, weight, target = problem(9)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, target, torch.float32).backward()
    got = {"hidden": hidden.grad, "weight": weight.grad}
    assert got.pop(frozen) is None
    trained = weight if frozen == "hidden" else hidden
    (expected,) = torch.autograd.grad(cross_entropy(hidden @ weight.T, target, reduction="sum"), [trained])
    torch.testing.assert_close(next(iter(got.values())), expected, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((2, WIDTH), 1e4), torch.ones(VOCABULARY, WIDTH)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), torch.float32)
    assert loss.item() == pytest.approx(2 * torch.log(torch.tensor(float(VOCABULARY))).item(), rel=1e-4)


def test_bf16_products_come_close_and_gradients_keep_their_types() -> None:
    hidden, weight, target = problem(300, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, target, torch.bfloat16)
    loss.backward()
    full_hidden = hidden.detach().float().requires_grad_()
    full = cross_entropy(full_hidden @ weight.T, target, reduction="sum")
    expected = torch.autograd.grad(full, [full_hidden, weight])
    assert loss.item() == pytest.approx(full.item(), rel=2e-2)
    assert hidden.grad is not None and weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    for got, exact in zip((hidden.grad.float(), weight.grad), expected, strict=True):
        assert (got - exact).norm() < 0.03 * exact.norm()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = problem(5)
    products = []
    monkeypatch.setattr(torch, "mm", lambda *arguments, **_: products.append(arguments))
    monkeypatch.setattr(torch, "zeros_like", lambda *arguments, **_: products.append(arguments))
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, target, torch.float32)
    assert not products


def test_no_targets_cost_nothing() -> None:
    hidden, weight, _ = problem(5)
    loss = linear_cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.int64), torch.float32)
    loss.backward()
    assert loss.item() == 0 and weight.grad is not None and not weight.grad.any()


# ---- the loss of packed rows -----------------------------------------------------------------------------------------

MakeStream = Callable[..., TokenStream]
MakeModel = Callable[..., Any]


def loss_of(loss: PackedLoss, batch: Batch) -> torch.Tensor:
    rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
    return loss.losses(rows)[NEXT_TOKEN]


def loss_and_gradients(loss: PackedLoss, stream: TokenStream) -> tuple[float, list[torch.Tensor]]:
    value = loss_of(loss.train(), stream.batch(0))
    gradients = torch.autograd.grad(value / 100, [p for p in loss.parameters() if p.requires_grad])
    return value.item(), list(gradients)


def assert_same(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    for before, after in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)


def test_rows_without_targets_have_no_loss_and_no_gradients(make_model: MakeModel, make_stream: MakeStream) -> None:
    loss, batch = PackedLoss(make_model()), make_stream().batch(0)
    batch.rows["targets"].fill(IGNORE)
    value = loss_of(loss, batch)
    value.backward()
    assert value.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())  # sums over processes need them all


def test_recomputing_gives_the_same_loss_and_gradients(make_model: MakeModel, make_stream: MakeStream) -> None:
    plain = loss_and_gradients(PackedLoss(make_model()), make_stream())
    model = make_model()
    loss = prepare_loss(model, bf16=False, gradient_checkpointing=True)
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert_same(plain, loss_and_gradients(loss, make_stream()))
    assert len(calls) == 2  # forward, and once more in the backward pass


def test_a_model_that_cannot_recompute_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="gradient_checkpointing=true, but Qwen3ForCausalLM does not support it"):
        prepare_loss(model, bf16=False, gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiling_gives_the_same_loss_and_gradients(
    make_model: MakeModel, make_stream: MakeStream, checkpointing: bool
) -> None:
    from torch._dynamo.utils import counters

    plain = loss_and_gradients(PackedLoss(make_model()), make_stream())
    counters.clear()
    model = make_model()
    if not checkpointing:
        use_document_attention(model, compiled=True)
    loss = prepare_loss(model, bf16=False, torch_compile=True, gradient_checkpointing=checkpointing)
    assert_same(plain, loss_and_gradients(loss, make_stream()))
    assert counters["stats"]["unique_graphs"] > 0
    assert {name.removeprefix("module.") for name in loss.state_dict()} == set(make_model().state_dict())


def test_an_end_that_also_pads_is_learnt_like_any_other(make_stream: Callable[..., TokenStream]) -> None:
    """transformers gives the padding token of a model's configuration no gradient where it is read; the end of a
    document is a target, and never read by another one."""
    batch, grads = make_stream().batch(0), []
    plain = tiny_model(330, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    for pad in (0, 1):  # 1 ends documents
        model = tiny_model(330, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=pad)
        model.load_state_dict(plain.state_dict())
        rows = {name: torch.from_numpy(values).long() for name, values in batch.rows.items()}
        PackedLoss(model)(rows["input_ids"], rows["position_ids"], rows["targets"]).backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*grads) and grads[0][1].abs().max() > 0
