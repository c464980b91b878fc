"""Every causal architecture of transformers that can be made small: trained and ranked with right, or refused by name.

docs/models.md has the list that comes out; `python tests/unit/test_architectures.py` prints it.
"""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.errors import ConfigError
from cprec.inspection import check_attention, check_isolation, output_scale
from cprec.models import packed_hidden
from cprec.search.attention import PromptTree
from cprec.train.attention import use_document_attention
from cprec.train.loss import PackedLoss

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MOST = 3_000_000
"""Parameters of a model that counts as small."""
SIZES = {
    96: "vocab_size",
    64: "max_position_embeddings n_positions max_seq_len n_ctx intermediate_size ffn_dim n_inner ffn_hidden_size"
    " encoder_ffn_dim decoder_ffn_dim mlp_hidden_size",
    32: "hidden_size n_embd d_model embed_dim word_embed_proj_dim embedding_size dim",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank mamba_d_head",
    8: "head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim state_size mamba_d_state",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts"
    " num_local_experts n_routed_experts moe_num_experts conv_kernel mamba_n_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads num_kv_heads"
    " num_experts_per_tok moe_k mamba_expand bos_token_id decoder_start_token_id",
    1: "n_group topk_group eos_token_id",
    0: "pad_token_id",
}
FIRST, SECOND = [5, 9, 3, 7, 11, 4, 6], [8, 12, 5, 20]
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
OF_CLASS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # convolutions and attention by turns, as its models have
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gemma4_text": {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_kinds() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class NotSmall(Exception):
    """An architecture that this test cannot make small."""


def small(kind: str) -> Any:
    """A small model of an architecture, of random weights that are far from what it begins with."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    try:
        made = getattr(transformers, name if isinstance(name, str) else name[0])
        usual = made.config_class()
        config = made.config_class(**_sizes(kind, usual))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in made(config).parameters())
        if size > MOST:
            raise NotSmall(f"{size:,} parameters")
        torch.manual_seed(0)
        model = made(config).eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([FIRST]))
    except NotSmall:
        raise
    except Exception as error:
        raise NotSmall(f"{type(error).__name__}: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 4
            else:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def _sizes(kind: str, usual: Any) -> dict[str, Any]:
    """The settings that make an architecture small, of those it has; scales that are 1 are changed, to be seen."""
    known = usual.to_dict()
    names = set(known) | set(getattr(usual, "attribute_map", {}))
    sizes: dict[str, Any] = {
        name: size
        for name, size in SMALL.items()
        if name in names and not isinstance(getattr(type(usual), name, None), property)
        if not isinstance(known.get(name), bool | list | dict)
        if known.get(name) is not None or name.endswith("token_id") or name in ("num_key_value_heads", "head_dim")
    }
    if "kv_lora_rank" in sizes:  # each head has its own latent keys
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if known.get("layer_types") and not isinstance(getattr(type(usual), "layer_types", None), property):
        sizes["layer_types"] = (list(dict.fromkeys(known["layer_types"])) * 2)[:2]
    if known.get("sliding_window"):
        sizes["sliding_window"] = 4
    if "is_decoder" in known:
        sizes["is_decoder"] = True
    for name, value in known.items():
        if isinstance(value, float) and value == 1 and ("multiplier" in name or "logit" in name):
            sizes[name] = 1.7
    return sizes | OF_CLASS.get(kind, {})


@dataclass(frozen=True)
class Found:
    state: str
    """supported, refused, or not made."""
    why: str = ""


@functools.cache
def examine(kind: str) -> Found:
    """What becomes of an architecture; raises where it is neither right nor refused by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = small(kind)
        except NotSmall as error:
            return Found("not made", str(error).split("\n")[0])
        name = type(model).__name__
        try:
            loss = PackedLoss(model)
            positions_given = check_attention(model)
            check_isolation(model)
        except ConfigError as error:
            assert name in str(error), f"{kind}: {error}"
            return Found("refused", str(error).split(": ")[-1] if "output layers" in str(error) else str(error))
        _compare_loss(model, loss, own=kind != "whisper")
        _compare_ranking(model)
        if positions_given:
            _compare_documents(model)
        return Found("supported", f"logits times {output_scale(model):.4g}" if output_scale(model) != 1 else "")


def _compare_loss(model: Any, loss: PackedLoss, own: bool) -> None:
    """Our loss of two packed documents is transformers' own of one and the other. (Whisper's is that of labels that
    were shifted before, so its logits are taken.)"""

    def mean_loss(ids: torch.Tensor) -> torch.Tensor:
        out = model(input_ids=ids, labels=ids, use_cache=False)
        return out.loss if own else torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])

    ids = torch.tensor([FIRST + SECOND])
    positions = torch.tensor([[*range(len(FIRST)), *range(len(SECOND))]])
    targets = torch.tensor([[*FIRST[1:], -100, *SECOND[1:], -100]])
    with torch.no_grad():
        expected = sum(mean_loss(torch.tensor([document])) * (len(document) - 1) for document in (FIRST, SECOND))
        torch.testing.assert_close(loss(ids, positions, targets), expected, rtol=1e-4, atol=1e-4)


def _compare_ranking(model: Any) -> None:
    """Log-probabilities along trees of two prompts are the model's own of the whole texts."""
    with torch.no_grad():
        tree = PromptTree(model, [np.array(FIRST), np.array(SECOND)])
        tokens, users, parents = [30, 31, 32, 33], [0, 0, 1, 1], [-1, 0, -1, -1]
        states = tree.extend(*(torch.tensor(each) for each in (tokens, users, parents)))
        texts = [[*FIRST, 30], [*FIRST, 30, 31], [*SECOND, 32], [*SECOND, 33]]
        for hidden, text in zip([*tree.prompt_hidden_UD, *states], [FIRST, SECOND, *texts], strict=True):
            expected = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(tree.logits(hidden).log_softmax(-1), expected.float(), rtol=1e-3, atol=1e-3)


def _compare_documents(model: Any) -> None:
    """Attention inside documents, as it is on a CPU, gives the states that the model's own gives."""
    ids, positions = torch.tensor([FIRST + SECOND]), torch.tensor([[*range(len(FIRST)), *range(len(SECOND))]])
    with torch.no_grad():
        expected = packed_hidden(model, ids, positions)
        use_document_attention(model)
        torch.testing.assert_close(packed_hidden(model, ids, positions), expected, rtol=1e-4, atol=1e-4)


def listed() -> str:
    """The list as docs/models.md has it."""
    found = {kind: examine(kind) for kind in causal_kinds()}

    def names(state: str, why: str = "") -> str:
        chosen = [kind for kind, each in found.items() if each.state == state and re.search(why, each.why)]
        return ", ".join(f"`{kind}`" for kind in chosen) or "none"

    reasons = {
        "output layer with a bias or soft-capped logits": "^output layers",
        "attention of another kind, or layers without attention": "attends in a way",
        "packed documents see each other": "packed documents",
        "cannot be called as a decoder with a separate output layer": "no decoder apart|does not read|does more",
    }
    lines = [f"**Supported**: {names('supported')}", ""]
    for title, why in reasons.items():
        lines += [f"**Refused**, {title}: {names('refused', why)}", ""]
    lines += [f"**Not tried**: {names('not made')}"]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("kind", causal_kinds())
def test_an_architecture_is_right_or_refused_by_name(kind: str) -> None:
    found = examine(kind)
    if found.state == "not made":
        pytest.skip(found.why)


@pytest.mark.slow
def test_the_page_lists_what_was_found() -> None:
    assert listed() in PAGE.read_text()


if __name__ == "__main__":
    for each in causal_kinds():
        try:
            print(f"# {each}: {examine(each)}")
        except (AssertionError, RuntimeError) as wrong:
            print(f"# {each}: WRONG {wrong}")
    print(listed())
