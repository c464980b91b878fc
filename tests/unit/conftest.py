from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from cprec.data.catalogue import Catalogue
from cprec.data.config import SplitSpec, SyntheticConfig, TableSource
from cprec.data.dataset import slot_of
from cprec.data.interactions import SECOND, Interactions, stable_order
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.data.splits import Split, make_split
from cprec.models import tiny_model
from cprec.schema import DomainInfo
from cprec.text.tokenizer import train_tokenizer

EOS = 1
VOCABULARY = 320


def sharpened(model: Any, factor: float = 8) -> Any:
    """Random weights give nearly uniform probabilities; larger ones make every wrong position or mask show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= factor
    return model.eval()


@functools.cache
def _model(kind: str) -> Any:
    if kind == "qwen3":
        return sharpened(tiny_model(VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gemma3":
        gemma = Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,  # shorter than prompts and titles
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        return sharpened(Gemma3ForCausalLM(gemma), 4)
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


# Llama is Qwen3 without norms of queries and keys.
@pytest.fixture(scope="session", params=["qwen3", pytest.param("llama", marks=pytest.mark.slow), "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    return _model(request.param)


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Any]:
    """A model by its kind, for modules that choose theirs."""
    return _model


@pytest.fixture(scope="session", params=["chat", "bare", "joins"])
def open_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Tokenizers as open models have them. `chat`: a chat mark ends documents, and pads; `bare`: nothing but an end,
    which stands for unknown words too; `joins`: of SentencePiece's family, whose merges spell its own marks."""
    letters = [chr(code) for code in range(33, 127)]
    if request.param == "joins":
        tokens = ["<unk>", "<s>", "</s>", "▁", *letters, "</", "s>", "<s", "▁<", "ed", "red"]
        merges = [("<", "/"), ("s", ">"), ("<", "s"), ("</", "s>"), ("<s", ">"), ("▁", "<"), ("e", "d"), ("r", "ed")]
        return LlamaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    made = train_tokenizer([" a red mug", "Domain: mugs"] * 5, 290)
    if request.param == "bare":
        plain = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token="<eos>", unk_token="<eos>")
        assert plain.pad_token is None and plain.bos_token is None
        return plain
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.bos_token, made.eos_token, made.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    return made


@functools.cache
def _teacher_forced(model: Any, prompt: tuple[int, ...], title: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt, *title]])
    with torch.no_grad():
        logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1).double()
    return sum(float(logp[place - 1, ids[0, place]]) for place in range(len(prompt), ids.shape[1]))


@pytest.fixture
def teacher_forced(model: Any) -> Callable[..., float]:
    """A title's log-probability by one forward pass over prompt and title, without a cache of keys and values; each is
    computed once."""
    return lambda prompt, title: _teacher_forced(model, tuple(prompt), tuple(title))


@pytest.fixture(scope="session")
def write_world() -> Callable[..., tuple[TableSource, ...]]:
    """Writes the tables of some domains of a synthetic world into a folder: all of them take seconds to prepare."""

    def write(folder: Path, config: SyntheticConfig, *domains: str) -> tuple[TableSource, ...]:
        world, sources = SyntheticWorld(config), []
        tables = world.tables()
        for domain in domains:
            paths = [str(folder / f"{domain}-{name}.parquet") for name in ("items", "interactions")]
            for table, path in zip(tables[domain], paths, strict=True):
                pq.write_table(table, path)
            platform = world.domains[domain].platform
            sources.append(TableSource(domain=domain, platform=platform, items=paths[0], interactions=paths[1]))
        return tuple(sources)

    return write


@pytest.fixture(scope="session")
def split_of_rows() -> Callable[..., Split]:
    """The leave-one-out split of rows (user, item, seconds), items by their number, all of platform `p`: what
    `build_dataset` would leave of them, without the third of a second that it takes. Rows must not repeat."""

    def make(domain: str, item_ids: Sequence[str], rows: Sequence[tuple[str, int, int]]) -> Split:
        titles = [f"thing {number}" for number in range(len(item_ids))]
        catalogue = Catalogue.from_tables({domain: pa.table({"item_id": item_ids, "title": titles}).sort_by("item_id")})
        users = sorted({user for user, *_ in rows}, key=lambda user: (slot_of("p", user), user))
        place = {user: number for number, user in enumerate(users)}
        user, item, time = (np.array(column) for column in zip(*((place[u], i, t) for u, i, t in rows), strict=True))
        order = stable_order(user, time)
        log = Interactions(
            platforms=("p",),
            user_platform=np.zeros(len(users), dtype=np.int16),
            user_id=np.array(users, dtype=object),
            user=user[order],
            item=catalogue.find(domain, item_ids)[item[order]],
            time=time[order] * SECOND,
            rating=np.full(len(rows), np.nan),
        )
        return make_split(catalogue, log, {domain: DomainInfo(domain, "p", True)}, SplitSpec())

    return make


RING_IDS = [f"i{number:02}" for number in range(12)]
RING = [(f"u{user:02}", (user + n) % 12, n) for user in range(90) for n in range(4 + user % 9)]


@pytest.fixture(scope="session")
def ring(split_of_rows: Callable[..., Split]) -> Split:
    """After item n comes item n + 1, round and round, from a start of each user's own."""
    return split_of_rows("ring", RING_IDS, RING)
