from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from cprec.errors import ConfigError
from cprec.inspection import check_isolation
from cprec.models import load_model, packed_hidden
from cprec.train import attention
from cprec.train.attention import DOCUMENTS, use_document_attention
from cprec.train.loss import prepare_loss

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"num_key_value_heads": 2},  # two heads share keys and values
    "gemma3_text": {"num_key_value_heads": 1, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": 3},
}


def make(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(family, vocab_size=50, **size | {"num_key_value_heads": 4} | changes)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config)


def rows_of(*lengths: list[int]) -> torch.Tensor:
    """Position ids of rows of documents of these lengths."""
    return torch.tensor([[place for length in row for place in range(length)] for row in lengths])


POSITIONS = rows_of([7, 33, 1, 23], [64], [31, 32, 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("short", [512, 16])
def test_it_equals_attention_with_masks(family: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and gradients, with and without written-out weights, on documents of many lengths."""
    monkeypatch.setattr(attention, "SHORT", short)
    masked = make(family, **FAMILIES[family])
    inside = copy.deepcopy(masked)
    use_document_attention(inside)
    ids = torch.randint(0, 50, POSITIONS.shape, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(32, generator=torch.Generator().manual_seed(3))
    states = [packed_hidden(model, ids, POSITIONS) for model in (masked, inside)]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    for found in states:
        (found @ weight).square().sum().backward()
    for (name, expected), found in zip(masked.named_parameters(), inside.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(
                found.grad, expected.grad, rtol=1e-3, atol=1e-4 * expected.grad.abs().max(), msg=name
            )  # type: ignore[arg-type]


TREE = [
    # Three branches behind 2, two behind 1; a document behind the tree, and padding.
    *[(0, 12), (1, 12), (2, 8), (3, 5), (4, 5), (3, 8), (4, 7), (4, 8), (2, 10), (3, 10), (2, 12), (3, 12)],
    *[(0, 15), (1, 15), (2, 15), (0, 16)],
]
"""Position ids and the places where readers end, of a row of 16 tokens."""


@pytest.mark.parametrize("attend", ["documents", "sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_of_a_tree_sees_what_it_goes_on_from_and_nothing_else(family: str, attend: str) -> None:
    """Its state, and the gradients that it leaves, are those of its path read alone."""
    changes = FAMILIES[family] if attend == "documents" else FAMILIES[family] | {"sliding_window": 64}
    model = make(family, attn_implementation="eager" if attend == "eager" else "sdpa", **changes)
    alone = copy.deepcopy(model)
    if attend == "documents":
        use_document_attention(model)
    ids = torch.randint(0, 50, (2, len(TREE)), generator=torch.Generator().manual_seed(2))
    positions, until = (torch.tensor([column, column]) for column in zip(*TREE, strict=True))
    found = packed_hidden(model, ids, positions, until)
    expected = torch.zeros_like(found)
    for row in range(2):
        for at in range(len(TREE)):
            path = [place for place in range(at + 1) if TREE[place][1] > at]
            assert [TREE[place][0] for place in path] == list(range(len(path)))
            states = packed_hidden(alone, ids[row, path][None], torch.arange(len(path))[None])
            expected = expected.index_put((torch.tensor(row), torch.tensor(at)), states[0, -1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(3))
    for states in (found, expected):
        (states @ weight).square().sum().backward()
    for (name, other), mine in zip(alone.named_parameters(), model.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(
                mine.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()), msg=name
            )


@pytest.mark.parametrize(
    ("family", "attend", "message"),
    [("mistral", "sdpa", "sees 3 tokens back, and rows have 16"), ("llama", "flex_attention", "with flex_attention")],
)
def test_trees_are_refused_by_attention_that_would_see_something_else(family: str, attend: str, message: str) -> None:
    model = make(family, **FAMILIES[family])
    model.config._attn_implementation = attend
    positions, until = (torch.tensor([column]) for column in zip(*TREE, strict=True))
    with pytest.raises(ConfigError, match=f"documents=trees.*{message}"):
        packed_hidden(model, positions, positions, until)


def test_the_plain_attention_has_the_right_gradients() -> None:
    torch.manual_seed(0)
    states = [torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    # Scores are made in single precision.
    assert torch.autograd.gradcheck(
        lambda *qkv: attention._PlainAttention.apply(*qkv, hidden, 0.7), states, eps=1e-2, atol=1e-3, rtol=1e-2
    )


def test_documents_do_not_see_each_other_and_the_folder_does_not_know(tmp_path: Path) -> None:
    model = make("qwen3")
    use_document_attention(model)
    check_isolation(model)
    model.save_pretrained(tmp_path)
    assert DOCUMENTS not in (tmp_path / "config.json").read_text()
    assert load_model(tmp_path).config._attn_implementation == "sdpa"


def test_gradient_checkpointing_recomputes_the_same() -> None:
    ids = torch.randint(0, 50, POSITIONS.shape, generator=torch.Generator().manual_seed(2))
    grads = []
    for recompute in (False, True):
        model = make("qwen3")
        use_document_attention(model)
        model.train()
        prepare_loss(model, bf16=False, gradient_checkpointing=recompute)
        packed_hidden(model, ids, POSITIONS).square().sum().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(grads[0], grads[1])
