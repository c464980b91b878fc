"""A data folder of text alone, and the base model that is trained on it."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cprec.config import find_config
from cprec.data.dataset import data_folder, read_catalogue, read_split
from cprec.errors import ConfigError, DataError, InputChanged
from cprec.pretrain import pretrain
from cprec.rank.llm import LLMRecommender
from cprec.recipe import Recipe
from cprec.recipes.base_text import base_text
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import open_shards
from cprec.text.tokenizer import load_tokenizer
from cprec.train.folder import LOG, read_done, read_log
from cprec.train.pretrain import behaviour_and_more, pretrain_plan

WIKI = [f"The river {name} flows past {n} towns into the sea." for name in ("Ouse", "Exe") for n in range(30)]
SHOP = [f"Kettle No {n}\nCategory: kitchen" for n in range(40)]


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two files of text, one of them compressed."""
    (tmp_path / "wiki.jsonl").write_text(lines(WIKI))
    (tmp_path / "shop.jsonl.gz").write_bytes(gzip.compress(lines(SHOP).encode()))
    files = tuple(str(tmp_path / name) for name in ("wiki.jsonl", "shop.jsonl.gz"))
    made = base_text(text=files, model="tiny", output_dir=str(tmp_path / "out"))
    assert made.pretrain is not None
    return replace(
        made,
        prepare=replace(made.prepare, vocabulary_size=300, heldout_share=0.2),
        pretrain=replace(
            made.pretrain,
            tiny=replace(made.pretrain.tiny, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            max_length=128,
            train_batch_size=4,
            num_train_epochs=2,
            bf16="false",
        ),
    )


def texts_in(data: Path, part: str) -> dict[str, list[str]]:
    """The texts of each file, as the shards of a part have them."""
    shards, tokenizer = open_shards(data / "shards" / part), load_tokenizer(str(data / "tokenizer"))
    assert set(shards.documents["kind"].to_pylist()) == {"general text"}
    found: dict[str, list[str]] = {}
    for row, name in enumerate(shards.documents["domain"].to_pylist()):
        *ids, end = shards.rows[row].tolist()
        assert end == tokenizer.eos_token_id
        found.setdefault(name, []).append(tokenizer.decode(ids))
    return found


def test_texts_are_read_or_held_out_and_none_is_lost(recipe: Recipe) -> None:
    data = prepare(recipe.prepare)
    train, heldout = texts_in(data, "train"), texts_in(data, "heldout")
    for name, texts in (("wiki", WIKI), ("shop", SHOP)):
        assert sorted(train[name] + heldout[name]) == sorted(texts)
        assert 0.05 < len(heldout[name]) / len(texts) < 0.4
    assert not (data / "items").exists()


def test_a_folder_of_text_is_made_once_of_what_the_files_hold(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(recipe.prepare)
    assert "complete with these settings, reused" not in capsys.readouterr().err
    prepare(recipe.prepare)
    assert "complete with these settings, reused" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="other settings of heldout_share"):
        prepare(replace(recipe.prepare, heldout_share=0.3))
    (tmp_path / "wiki.jsonl").write_text(lines(WIKI[1:]))
    with pytest.raises(InputChanged, match=r"wiki\.jsonl changed"):
        prepare(recipe.prepare)


def test_what_needs_users_and_items_refuses_text(recipe: Recipe) -> None:
    data = prepare(recipe.prepare)
    for use in (data_folder, read_split, read_catalogue):
        with pytest.raises(DataError, match=r"data holds text, without users and items: only pre-training reads it"):
            use(data)


def test_a_base_model_is_trained_on_text_alone(recipe: Recipe) -> None:
    prepare(recipe.prepare)
    assert recipe.pretrain is not None
    plan = pretrain_plan(recipe.pretrain, behaviour_and_more(recipe.pretrain))
    assert plan.stream.corpus.names == ["text of shop", "text of wiki"]
    sizes = [group.num_tokens for group in plan.stream.corpus.groups]
    shares = plan.stream.group_tokens.sum(0) / plan.stream.num_tokens
    assert shares.tolist() == pytest.approx([size / sum(sizes) for size in sizes], abs=0.02)
    folder = pretrain(recipe.pretrain)
    first, *_, last = (line["heldout"] for line in read_log(folder / LOG) if "heldout" in line)
    assert set(first) == {"text of shop", "text of wiki"}
    assert all(last[name] < 0.9 * first[name] for name in first)
    assert read_done(folder)["trained_on"] == []
    assert not (folder / "README.md").exists()
    with pytest.raises(ConfigError, match="is a base model that was trained on text: train it on a log first"):
        LLMRecommender.from_pretrained(folder)
    for refused, message in (
        (replace(recipe.pretrain, item_head=True, output_dir="none"), "item_head=true reads the titles of items, and"),
        (replace(recipe.pretrain, loss="items_only", output_dir="none"), "loss=items_only is of the titles in"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(refused)


def test_what_is_no_text_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, *names: str) -> None:
        with pytest.raises(kind, match=message):
            prepare(replace(recipe.prepare, text=tuple(str(tmp_path / name) for name in names)))

    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "shop.jsonl.gz").read_bytes()[:60])
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wiki.txt").write_text("Another river.")
    refused(ConfigError, r"text=.*gone\.txt: no such file; give \.jsonl", "gone.txt")
    refused(ConfigError, r"there is another file wiki, .*wiki\.jsonl: rename one", "wiki.jsonl", "wiki.txt")
    refused(DataError, r"cut\.jsonl\.gz cannot be unpacked", "cut.jsonl.gz")
    refused(DataError, r"empty\.txt has no text to train on", "wiki.jsonl", "empty.txt")
    assert not Path(recipe.prepare.output_dir).exists()


def test_text_stands_alone() -> None:
    with pytest.raises(ConfigError, match="a folder of text has no domains"):
        PrepareConfig(output_dir="out", text=("wiki.txt",), target_domains=("books",))
    with pytest.raises(ConfigError, match="text=wiki.txt stands beside logs"):
        find_config("demo", ["prepare.text=wiki.txt", "prepare.target_domains="])
    with pytest.raises(ConfigError, match="target_domains is empty"):
        find_config("demo", ["prepare.target_domains="])


def test_the_recipe_trains_all_of_a_model_on_all_files() -> None:
    recipe = find_config("base_text", ["text=general.jsonl,products.jsonl.zst", "model=small"])
    assert recipe.prepare.text == ("general.jsonl", "products.jsonl.zst")
    assert recipe.prepare.tokenizer == recipe.pretrain.model_name_or_path == "small"
    assert (recipe.pretrain.data, recipe.pretrain.frozen_layers) == (recipe.prepare.output_dir, 0)
    assert recipe.prepare.max_document_tokens <= recipe.pretrain.max_length
    assert recipe.finetune is recipe.blend is None
    with pytest.raises(ConfigError, match="the recipe base_text has no stage finetune, so it has no arms"):
        find_config("base_text", ["text=general.jsonl", "model=tiny", "arm=no_warmup"])
