from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from cprec.train.loss import CHUNK, linear_cross_entropy

WIDTH, VOCABULARY = 16, 37


def problem(num: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, WIDTH, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=random).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (num,), generator=random)


@pytest.mark.parametrize("num", [1, 7, CHUNK, 2 * CHUNK + 5])
def test_values_and_gradients_are_those_of_torch(num: int) -> None:
    hidden, weight, target = problem(num)
    loss = linear_cross_entropy(hidden, weight, target, torch.float32)
    mine = torch.autograd.grad(0.25 * loss, [hidden, weight])
    full = cross_entropy(hidden @ weight.T, target, reduction="sum")
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)
    for got, expected in zip(mine, torch.autograd.grad(0.25 * full, [hidden, weight]), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


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
