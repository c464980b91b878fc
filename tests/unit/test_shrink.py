from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.config import TableSource
from cprec.data.dataset import read_catalogue
from cprec.errors import ConfigError
from cprec.models import add_lora, blocks_of, drop_layers, load_model, tiny_model
from cprec.shrink import keep_tokens, least_layers, logits_of, perplexity_of, shrink, special_ids
from cprec.text.config import PrepareConfig
from cprec.text.encoding import PromptEncoder
from cprec.text.prepare import prepare
from cprec.text.tokenizer import encode_pieces, load_tokenizer, train_tokenizer
from cprec.train.config import ShrinkConfig
from cprec.train.folder import DONE
from cprec.train.forgetting import own_texts

IDS = [5, 9, 30, 7, 12, 9]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop of lamps, with the tokens of another tokenizer than the base model's."""
    folder = tmp_path_factory.mktemp("shrink")
    items = [f"t{row},Reading lamp № {row} ({'red' if row % 2 else 'white'})" for row in range(12)]
    events = [f"u{user},t{(user + step) % 12},{1_400_000_000 + step}" for user in range(20) for step in range(6)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]))
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    shop = TableSource(domain="shop", interactions=str(folder / "log.csv"), items=str(folder / "items.csv"))
    return prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=(shop,),
            target_domains=("shop",),
            k_core=0,
            vocabulary_size=300,
            min_events=3,
            heldout_share=0.0,
            workers=1,
        )
    )


@pytest.fixture(scope="module")
def base(data: Path) -> Path:
    """A model whose tokens are those of general text and of our titles, with more rows than tokens."""
    titles = [f" {title}" for title in read_catalogue(data).title]
    tokenizer = train_tokenizer([*own_texts(), *titles * 3], 900)
    folder = data.parent / "base"
    tiny_model(len(tokenizer) + 28, hidden_size=16, num_hidden_layers=3, num_attention_heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(data: Path, base: Path) -> ShrinkConfig:
    return ShrinkConfig(
        model=str(base), output_dir=str(data.parent / "small"), data=str(data.parent), layers=2, sample_documents=3
    )


def test_a_smaller_model_reads_the_data_as_before(config: ShrinkConfig, data: Path, base: Path) -> None:
    config = replace(config, layers=None, output_dir=config.output_dir + "er")
    record = shrink(config)
    before, after = record["before"], record["after"]
    assert (before["tokens"], before["layers"]) == (900, 3)
    assert (after["tokens"], after["layers"], record["layers_removed"]) == (
        len(load_tokenizer(config.output_dir)),
        3,
        [],
    )
    assert after["tokens"] < 900
    assert before["parameters"] - after["parameters"] == 16 * (928 - after["tokens"])
    # The data's texts keep their tokens, numbered anew, of which the logits are what they were.
    whole, small = (load_tokenizer(str(folder)) for folder in (base, config.output_dir))
    vocabulary = whole.get_vocab()
    old_V = np.array([vocabulary[name] for name, _ in sorted(small.get_vocab().items(), key=lambda entry: entry[1])])
    catalogue = read_catalogue(data)
    titles, small_titles = (
        PromptEncoder(each, catalogue).titles(np.arange(len(catalogue)), end=True) for each in (whole, small)
    )
    np.testing.assert_array_equal(old_V[small_titles.values], titles.values)
    model, smaller = (load_model(folder) for folder in (base, config.output_dir))
    ids = small_titles.values[:40]
    assert torch.allclose(logits_of(smaller, ids), logits_of(model, old_V[ids])[:, old_V], atol=1e-6)
    # Fewer tokens can be wrong, so that the data is predicted a little better.
    assert after["texts"]["data"]["tokens"] == before["texts"]["data"]["tokens"]
    assert after["texts"]["data"]["bits_per_byte"] < before["texts"]["data"]["bits_per_byte"]
    assert after["texts"]["general text"]["tokens"] > before["texts"]["general text"]["tokens"]


def test_tokens_of_general_text_may_stay(config: ShrinkConfig, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(own_texts()))
    texts = shrink(replace(config, output_dir=str(tmp_path / "out"), text=(str(tmp_path / "text.txt"),)))
    for name in ("data", "general text"):
        assert texts["after"]["texts"][name]["tokens"] == texts["before"]["texts"][name]["tokens"]


def test_a_smaller_model_is_made_once(config: ShrinkConfig, capsys: pytest.CaptureFixture[str]) -> None:
    record = shrink(config)
    assert len(record["layers_removed"]) == 1 and record["after"]["layers"] == 2
    assert "needs healing" in capsys.readouterr().err
    written = Path(config.output_dir, "model.safetensors").stat()
    assert shrink(config) == record == json.loads(Path(config.output_dir, "shrink.json").read_text())
    assert Path(config.output_dir, "model.safetensors").stat() == written
    with pytest.raises(ConfigError, match="other settings or from other input"):
        shrink(replace(config, layers=1))


def test_what_cannot_be_shrunk_is_refused(config: ShrinkConfig, base: Path, tmp_path: Path) -> None:
    fresh = replace(config, output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="layers=3, but the model has 3: give fewer"):
        shrink(replace(fresh, layers=3))
    with pytest.raises(ConfigError, match="is no model that `cprec shrink` wrote"):
        shrink(replace(fresh, output_dir=str(base)))
    with pytest.raises(ConfigError, match=r"text=no\.txt: no such file"):
        shrink(replace(fresh, text=("no.txt",)))
    with pytest.raises(ConfigError, match="layers=0 must be at least 1"):
        replace(fresh, layers=0)
    adapters = tmp_path / "adapters"
    add_lora(load_model(base), rank=2, alpha=4).save_pretrained(adapters)
    load_tokenizer(str(base)).save_pretrained(adapters)
    with pytest.raises(ConfigError, match="has adapters: shrink the base model"):
        shrink(replace(fresh, model=str(adapters)))
    (adapters / DONE).write_text("{}")
    with pytest.raises(ConfigError, match="was trained by cprec"):
        shrink(replace(fresh, model=str(adapters)))
    assert not (tmp_path / "out").exists()


def test_every_architecture_keeps_its_logits(model: Any, tmp_path: Path) -> None:
    smaller = copy.deepcopy(model)
    smaller.config.eos_token_id = smaller.generation_config.eos_token_id = [1, 40]
    smaller.config.pad_token_id = 7
    assert special_ids(smaller) >= {1, 7, 40}
    kept = [0, 1, 2, 5, 7, 9, 12, 30, 40]
    keep_tokens(smaller, kept, [kept.index(token) for token in IDS])
    assert (smaller.config.eos_token_id, smaller.config.pad_token_id) == ([1, 8], 4)
    assert smaller.generation_config.eos_token_id == [1, 8]
    smaller.save_pretrained(tmp_path)
    ids = [kept.index(token) for token in IDS]
    assert torch.allclose(logits_of(load_model(tmp_path), ids), logits_of(model, IDS)[:, kept], atol=1e-5)
    drop_layers(smaller, [0])
    expected = logits_of(smaller, ids)
    smaller.save_pretrained(tmp_path / "flat")
    assert torch.equal(logits_of(load_model(tmp_path / "flat"), ids), expected)


def test_tokens_without_embeddings_are_refused() -> None:
    with pytest.raises(ConfigError, match="50 token embeddings, but its tokenizer a token 50"):
        keep_tokens(tiny_model(50, hidden_size=16, num_attention_heads=2), [1, 50], [0])


def test_layers_that_do_nothing_are_left_out() -> None:
    model = tiny_model(50, hidden_size=16, num_hidden_layers=5, num_attention_heads=2).eval()
    with torch.no_grad():
        for layer in (2, 3):
            blocks_of(model)[layer].self_attn.o_proj.weight.zero_()
            blocks_of(model)[layer].mlp.down_proj.weight.zero_()
    expected = logits_of(model, IDS)
    assert least_layers(model, [IDS, IDS[:3]], 3) == [2, 3]
    drop_layers(model, [2, 3])
    assert torch.equal(logits_of(model, IDS), expected)


def test_neighbouring_layers_that_turn_the_states_least_are_found() -> None:
    """Each layer turns the states in a plane by its own angle."""
    model = tiny_model(50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2).eval()
    turns = (1.0, 3.0, 0.2)

    def turn(number: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor], __: Any) -> torch.Tensor:
            states = args[0].clone()
            angle = torch.tensor(turns[number])
            rotation = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
            states[..., 2:] = 0
            states[..., :2] = states[..., :2] @ rotation
            return states

        return hook

    with torch.no_grad():
        model.get_input_embeddings().weight[:, 2:] = 0
    for number, block in enumerate(blocks_of(model)):
        block.register_forward_hook(turn(number))
    assert least_layers(model, [IDS], 2) == [2]
    assert least_layers(model, [IDS], 1) == [0, 1]  # 1.0 + 3.0 is 0.86 beyond the half turn, 3.0 + 0.2 only 0.06


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary() -> None:
    tokenizer = train_tokenizer(["ab"], 258)
    model = tiny_model(258, hidden_size=16, num_attention_heads=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    texts = ["abc", "é"]  # 3 and 2 bytes, each a token, and two ends
    found = perplexity_of(model, tokenizer, texts)
    assert [len(ids) for ids in encode_pieces(tokenizer, texts)] == [3, 2]
    assert found["tokens"] == 7
    assert found["perplexity"] == pytest.approx(258)
    assert found["bits_per_byte"] == pytest.approx(7 * np.log2(258) / 5)
