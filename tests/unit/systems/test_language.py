"""Language models in systems: reading titles with lower blocks frozen or not, tables of such vectors, and bases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, Unsuitable
from cprec.models import number_of_blocks, tiny_model, trunk_and_head
from cprec.systems.language import (
    Language,
    LanguageEncoder,
    LanguageSettings,
    TextTable,
    TitleReader,
    tokens_of,
)
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.text.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("in_fp32")
TITLES = ["red shoe", "blue shoe of the sea", "", "green hat with feathers"]


class Reads(LanguageSettings):
    """Settings of a system that is never trained."""

    def stages(self, data: TrainingSequences, seed: int) -> list[Stage]:
        raise AssertionError


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def _tokenizer() -> Any:
    return train_tokenizer([f" {title}" for title in TITLES], 300)


def _gemma(num_tokens: int) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=num_tokens, num_hidden_layers=3, head_dim=8, sliding_window=4, layer_types=kinds, **sizes
    )
    return Gemma3ForCausalLM(config)


def _gpt2(num_tokens: int) -> Any:
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=num_tokens, n_embd=16, n_layer=3, n_head=2, n_positions=32, **ends))


def _tiny(num_tokens: int, num_layers: int = 3) -> Any:
    return tiny_model(num_tokens, hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2)


def language(make: Callable[[int], Any] = _tiny) -> Language:
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    return Language(make(len(tokenizer)).eval(), tokenizer, tokens_of(tokenizer, TITLES, 5))


def data_of(titles: list[str]) -> TrainingSequences:
    ids = [f"{number:02}" for number in range(len(titles))]
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": ids, "title": titles})})
    return TrainingSequences(catalogue, "shop", Ragged.of([[0, 1]]), ("u",))


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_tiny, _gemma, _gpt2])
@pytest.mark.parametrize("pool", ["end", "mean"])
def test_a_vector_is_a_state_of_the_model_whatever_is_frozen(make: Callable[[int], Any], pool: Any) -> None:
    """Models that scale vectors of tokens, attend in several ways or have positions by table, among them."""
    own = language(make)
    trunk, _ = trunk_and_head(own.model)
    for number_frozen in (0, 1, 2, 3):
        reader = TitleReader(own, pool=pool, frozen_layers=number_frozen).eval()
        found = reader(torch.tensor([3, 1, 0, 2, 1])).detach()
        for row, item in zip(found, (3, 1, 0, 2, 1), strict=True):
            tokens = own.titles[item].tolist() + [own.end] * (pool == "end")
            expected = torch.zeros(16)
            if tokens:
                states = trunk(input_ids=torch.tensor([tokens])).last_hidden_state[0].detach()
                expected = states[-1] if pool == "end" else states.mean(0)
            torch.testing.assert_close(row, expected)


def test_fewer_blocks_are_those_of_a_model_with_fewer() -> None:
    own = language()
    fewer = language(lambda num_tokens: _tiny(num_tokens, 2))
    fewer.model.load_state_dict(
        {n: w for n, w in own.model.state_dict().items() if n in fewer.model.state_dict()}, strict=True
    )
    items = torch.arange(4)
    read = TitleReader(own, pool="end", layers=2)(items)
    torch.testing.assert_close(read, TitleReader(fewer, pool="end")(items))
    torch.testing.assert_close(read, TitleReader(own, pool="end", layers=0.7)(items))


def test_what_is_frozen_is_no_part_of_the_module_and_the_rest_learns() -> None:
    own = language()
    num_weights = [
        sum(w.numel() for w in TitleReader(own, pool="end", frozen_layers=frozen).parameters())
        for frozen in (0, 1, 2, 3)
    ]
    block = num_weights[1] - num_weights[2]
    assert num_weights == [num_weights[0], 2 * block + 16, block + 16, 0]
    reader = TitleReader(own, pool="end", frozen_layers=2)
    reader(torch.arange(2)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in reader.parameters())
    assert set(reader.state_dict()) == {name for name, _ in reader.named_parameters()}, "checkpoints hold no more"


def test_a_share_that_is_no_block_freezes_the_vectors_of_tokens() -> None:
    reader = TitleReader(language(), pool="end", frozen_layers=0.1)
    assert [name for name, weight in reader.named_parameters() if not weight.requires_grad] == [
        "blocks.trunk.embed_tokens.weight"
    ]


def test_numbers_of_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers=4 means 4 blocks, and the language model has 3"):
        TitleReader(language(), pool="end", layers=4)
    with pytest.raises(ConfigError, match=r"frozen_layers=3, but 2 blocks are read"):
        TitleReader(language(), pool="end", layers=2, frozen_layers=3)
    with pytest.raises(ConfigError, match=r"num_blocks=4, and the language model has 3"):
        LanguageEncoder(language(), 4, 10, 8, 0.0)
    with pytest.raises(ConfigError, match=r"max_length=33, and the language model reads 32"):
        LanguageEncoder(language(_gpt2), 1, 33, 8, 0.0)
    for wrong in (-1, 1.5):
        with pytest.raises(ConfigError, match=f"frozen_layers={wrong}"):
            Reads(frozen_layers=wrong)


# ---- tables and encoders ---------------------------------------------------------------------------------------------


def test_a_table_reads_each_title_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter reads titles along the directions in which they differ, with a mean length of 5, and not what is
    common to them."""
    monkeypatch.setattr("cprec.systems.language.COMMON", 2)  # every second title
    reader = TitleReader(language(), pool="mean")
    table, asked = TextTable(reader, len(TITLES), lambda width: nn.Linear(width, 2), rows=2), []
    reader.register_forward_pre_hook(lambda _, given: asked.append(given[0].tolist()))
    with torch.no_grad():
        assert table.rows is not None
        table.rows[1] = torch.tensor([10.0, 20.0])
        found, everything = table.vectors(torch.tensor([[5, 1], [1, 0]])), table.vectors()
        assert asked == [[0, 1, 2], [0, 1, 2, 3]]
        torch.testing.assert_close(found, everything[torch.tensor([[5, 1], [1, 0]])])
        states_XK = table.states()
        torch.testing.assert_close(everything, table.adapter(states_XK) + table.rows)
        assert not states_XK[4:].any(), "special rows have no title"
        torch.testing.assert_close(states_XK[:4].mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(states_XK[:4].norm(dim=1).mean(), torch.tensor(5.0))
        assert table.vectors(torch.tensor([4])).shape == (1, 2)
        reader.register_forward_hook(lambda _, __, vectors_KF: vectors_KF + torch.arange(16))
        torch.testing.assert_close(table.states(), states_XK, atol=1e-3, rtol=1e-3)


def test_a_table_asks_for_titles_on_the_device_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    class Noted(nn.Module):
        def forward(self, items_K: torch.Tensor) -> torch.Tensor:
            devices.append(items_K.device.type)
            return torch.eye(4)

    monkeypatch.setattr("cprec.distributed.pick_device", lambda: torch.device("meta"))
    reader: Any = Noted()
    TextTable(reader, 4, lambda width: nn.Linear(width, 2), rows=None)
    assert devices == ["meta"]


def test_titles_that_are_all_alike_are_refused() -> None:
    class Alike(nn.Module):
        def forward(self, items_K: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(items_K), 4)

    reader: Any = Alike()
    with pytest.raises(Unsuitable, match="all items are alike to it"):
        TextTable(reader, 3, lambda width: nn.Linear(width, 2), rows=None)


def test_an_encoder_reads_vectors_as_the_model_reads_those_of_tokens() -> None:
    own = language(_gpt2)
    encoder = LanguageEncoder(own, 3, 32, 16, 0.0).eval()
    for linear in (encoder.into, encoder.back):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 0]])
    trunk, _ = trunk_and_head(own.model)
    states = trunk(input_ids=tokens).last_hidden_state
    given = own.model.get_input_embeddings()(tokens)
    torch.testing.assert_close(encoder(given, torch.tensor([3, 2])), states)
    torch.testing.assert_close(encoder.last(given, torch.tensor([3, 2])), states[[0, 1], [2, 1]])
    fewer = LanguageEncoder(own, 1, 32, 16, 0.0)
    assert len(fewer.blocks.trunk.h) == 1
    assert fewer.blocks.trunk.wte.state_dict() == {}, "vectors of tokens are not used"


# ---- bases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = _tokenizer()
    for part in (tokenizer, tiny_model(len(tokenizer), hidden_size=16, max_position_embeddings=8, seed=1)):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_of_no_base_the_seed_decides() -> None:
    data = data_of(TITLES)
    one, same, other = (Reads(title_tokens=2).language(data, seed) for seed in (1, 1, 2))
    assert one.titles.lengths.tolist() == [2, 2, 0, 2]
    assert one.tokenizer.decode(one.titles[1]) == " blue shoe"
    weights = [each.model.get_input_embeddings().weight for each in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_base_counts_by_its_files(base: Path) -> None:
    first = Reads(base=str(base)).identity()
    moved = shutil.copytree(base, base.with_name("moved"))
    assert Reads(base=str(moved)).identity() == first
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first["base"])
    tiny_model(300, hidden_size=16, seed=2).save_pretrained(moved)
    assert Reads(base=str(moved)).identity() != first
    assert Reads(base=str(base), title_tokens=7).language(data_of(TITLES), 0).width == 16


def test_bases_that_cannot_read_the_titles_are_refused(base: Path, tmp_path: Path) -> None:
    settings, data = Reads(base=str(base), title_tokens=8), data_of(TITLES)
    with pytest.raises(ConfigError, match=r"texts of 9 tokens .* reads 8: lower title_tokens by 1"):
        settings.language(data, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"base=.*empty cannot be used"):
        replace(settings, base=str(tmp_path / "empty")).language(data, 0)
    with pytest.raises(Unsuitable, match=r"Reads reads titles, and no item of domain 'shop' has one"):
        Reads().language(data_of(["", ""]), 0)


def test_numbers_of_blocks() -> None:
    assert [number_of_blocks(blocks, 30) for blocks in (0, 0.4, 1, 12)] == [0, 12, 1, 12]
    assert np.array_equal(tokens_of(_tokenizer(), ["red shoe", "red"], 9)[1], tokens_of(_tokenizer(), ["red"], 1)[0])
