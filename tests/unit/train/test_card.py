"""The model card: what training writes, what an evaluation puts in, and that the hub and people can use it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from cprec.card import CARD, Score, card_of, fill_in, read_front_matter
from cprec.errors import DataError
from cprec.models import tiny_model
from cprec.provenance import read_resolved
from cprec.text.tokenizer import load_tokenizer
from cprec.train.config import FinetuneConfig, PretrainConfig
from cprec.train.finetune import finetune
from cprec.train.pretrain import pretrain

SHARED: dict[str, Any] = {
    "data": "data",
    "max_length": 96,
    "train_batch_size": 4,
    "bf16": "false",
    "eval_tokens": 0,
    "general_text": "none",
    "num_train_epochs": 0.1,
    "report_to": ("none",),
}
PRETRAIN = PretrainConfig(output_dir="pretrained", model_name_or_path="base", **SHARED)
FINETUNE = FinetuneConfig(output_dir="tuned", model_name_or_path="pretrained", domain="books", **SHARED)
OF_BASE = "---\nlicense: other\nlicense_name: mine\nbase_model: someone/else\ntags: [a]\n---\n# Base\n"


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a card, a run that pre-trained it, and one that fine-tuned that."""
    folder = tmp_path_factory.mktemp("cards")
    shutil.copytree(data, folder / "data")
    size = len(load_tokenizer(str(folder / "data/tokenizer")))
    tiny_model(size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder / "base")
    (folder / "base" / CARD).write_text(OF_BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain(PRETRAIN)
        finetune(FINETUNE)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the test stands."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_hub_reads_the_card(here: Path) -> None:
    for name in ("pretrained", "tuned"):
        found = ModelCard.load(here / name / CARD).data.to_dict()
        assert found == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "license": "other",
            "license_name": "mine",
            "tags": ["recommendation", "cprec"],
        }
    text = (here / "tuned" / CARD).read_text()
    assert "# tuned\n" in text and "the model folder `pretrained`" in text and str(here) not in text


@pytest.mark.parametrize("name", ["pretrained", "tuned"])
def test_the_code_of_the_card_runs(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with_cprec, with_transformers = re.findall(r"^```python\n(.*?)^```$", (here / name / CARD).read_text(), re.M | re.S)
    capsys.readouterr()
    exec(with_cprec.replace('"FOLDER"', repr(name)), {})
    assert len(capsys.readouterr().out.splitlines()) == 5
    names: dict[str, Any] = {}
    exec(with_transformers.replace('"FOLDER"', repr(name)), names)
    assert names["prompt"].startswith("Domain: books\nHistory:\n- ") and names["prompt"].endswith("\nNext:")
    assert names["written"].shape[1] > names["ids"].shape[1]


def test_what_a_card_says_of_its_base(here: Path) -> None:
    def base_model(**changes: Any) -> Any:
        record = read_resolved("tuned")
        record["inputs"] |= changes.pop("inputs", {})
        record["config"] |= changes
        Path("card.md").write_text(card_of(Path("tuned"), record, Path("data")))
        return read_front_matter(Path("card.md")).get("base_model")

    assert base_model() is None
    card = Path("pretrained", CARD)
    card.write_text(card.read_text().replace("tags:", "base_model: org/name\ntags:", 1))
    assert base_model() == "org/name", "a card of ours names what the model goes back to"
    assert base_model(model_name_or_path="base") is None, "someone else's names what that model was made from"
    assert base_model(model_name_or_path="org/hub", inputs={"base/commit": "123"}) == "org/hub"
    assert "[org/hub](https://huggingface.co/org/hub), commit `123`" in Path("card.md").read_text()
    assert base_model(model_name_or_path="tiny") is None
    assert "random weights" in Path("card.md").read_text()
    Path("tuned/adapter_config.json").write_text("{}")
    assert base_model() is None, "adapters belong to the folder, not to what it was made from"
    assert read_front_matter(Path("card.md"))["library_name"] == "peft"


def test_a_card_names_the_teachers(here: Path) -> None:
    record = read_resolved("tuned")
    record["config"]["teachers"] = ["transition graph", "EASE"]
    text = card_of(Path("tuned"), record, Path("data"))
    assert (
        "- training: fine-tuning on `books`, towards what came next and what transition graph and EASE ranked" in text
    )
    assert "towards" not in Path("tuned", CARD).read_text()


def test_adapters_get_our_card_and_no_path_as_their_base(here: Path) -> None:
    finetune(replace(FINETUNE, output_dir="adapters", model_name_or_path="base", lora_rank=2))
    found = read_front_matter(Path("adapters", CARD))
    assert found["library_name"] == "peft" and "base_model" not in found and "cprec" in found["tags"]


def test_a_model_that_was_not_trained_is_told_as_it_is(here: Path) -> None:
    finetune(replace(FINETUNE, output_dir="as-it-is", model_name_or_path="base", num_train_epochs=0, item_head=True))
    text = Path("as-it-is", CARD).read_text()
    assert "A language model as it came" in text and "- training: none; " in text
    assert "fine-tuning" not in text and "transformers import" not in text and 'from_pretrained("FOLDER")' in text


def test_a_record_that_cannot_be_read_costs_the_card_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("pretrained", CARD).write_text("---\na: [\n---\n")
    finetune(replace(FINETUNE, output_dir="again"))
    assert Path("again/cprec.json").is_file() and not Path("again", CARD).exists()
    assert "again gets no model card (README.md): DataError" in capfd.readouterr().err


# ---- results ---------------------------------------------------------------------------------------------------------

SCORES = [
    Score("1", "test", "ndcg_at_10", "NDCG@10 (mine)", 0.0625),
    Score("1", "test", "recall_at_10", "Recall@10 (mine)", 0.1),
    Score("toys: all", "test", "ndcg_at_10", "NDCG@10 (mine)", 0.5),
]


def test_results_replace_earlier_ones_and_nothing_else(here: Path) -> None:
    card = here / "tuned" / CARD
    before = card.read_text()
    for old, new in (
        ("tags:", "language: no # Norwegian\ntags:"),
        ("# tuned", "# \\1"),
        ("## Before", "## Long before"),
    ):
        before = before.replace(old, new, 1)
    card.write_text(before)
    assert fill_in("tuned", "earlier", SCORES[:1]) and fill_in("tuned", "| a \\1 |\n", SCORES)
    start, section = before.partition("Not evaluated")[0], "| a \\1 |\n\n## Long before"
    head, rest = start.removeprefix("---\n").split("---\n")
    index = read_front_matter(card)["model-index"]
    expected = f"---\n{head}{yaml.safe_dump({'model-index': index}, sort_keys=False)}---\n{rest}{section}"
    assert card.read_text() == expected + before.partition("## Long before")[2]
    found = ModelCard.load(card).data
    assert found.model_name == "tuned"
    read = [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_name, r.metric_value) for r in found.eval_results]
    assert read == [tuple(score) for score in SCORES]


def test_a_card_without_a_section_for_results_is_left_alone(here: Path) -> None:
    assert not fill_in("base", "new", SCORES) and (here / "base" / CARD).read_text() == OF_BASE
    assert not fill_in("data", "new", SCORES) and not (here / "data" / CARD).exists()


@pytest.mark.parametrize("head", ["a: [", "- a"])
def test_front_matter_that_cannot_be_read_is_told(tmp_path: Path, head: str) -> None:
    (tmp_path / CARD).write_text(f"---\n{head}\n---\n")
    with pytest.raises(
        DataError, match=rf"{re.escape(str(tmp_path / CARD))}.* (is not YAML|must be names with values)"
    ):
        read_front_matter(tmp_path / CARD)


def test_a_card_without_front_matter_gets_some(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("# Title\n\n## Results\n")
    assert fill_in(tmp_path, "new", SCORES)
    head, _, body = (tmp_path / CARD).read_text().removeprefix("---\n").partition("---\n")
    assert list(yaml.safe_load(head)) == ["model-index"] and body == "# Title\n\n## Results\n\nnew\n\n"
