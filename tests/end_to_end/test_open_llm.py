"""The recipes `open_llm` and `base_text` in their short forms: small models, trained for some seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.cli import main
from cprec.models import tiny_model
from cprec.provenance import read_resolved
from cprec.recipes.open_llm import WORDS, open_llm
from cprec.schema import VALIDATION
from cprec.text.tokenizer import load_tokenizer, train_tokenizer
from cprec.train.folder import LOG, read_done, read_log, refitted_on
from cprec.train.forgetting import GENERAL_TEXT, own_texts

pytestmark = pytest.mark.slow

KINDS = ("lamp", "kettle", "spade", "scarf")
COLOURS = ("red", "white", "green", "blue", "black", "grey")
QUICK_PARTS = "blend.parts=EASE,titles"
"""The recipe's own have three networks, which take minutes for each model."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the recipe's domains: customers who stay with a kind of thing, mostly."""
    folder = tmp_path_factory.mktemp("data")
    titles = [f"{kind} No {size}, {colour}" for kind in KINDS for size in range(3) for colour in COLOURS]
    for number, name in enumerate(("amazon14_beauty", "amazon14_toys")):
        generator = np.random.default_rng(number)
        kind = np.repeat(generator.integers(4, size=120), 8)
        stays = generator.random(len(kind)) < 0.8
        kind = np.where(stays, kind, generator.integers(4, size=len(kind)))
        item = 18 * kind + generator.integers(18, size=len(kind))
        events = {
            "user_id": [f"u{row // 8}" for row in range(len(kind))],
            "item_id": [f"i{one}" for one in item],
            "timestamp": 1_400_000_000 + 3600 * np.arange(len(kind)),
            "position": np.arange(len(kind)) % 8,
        }
        (folder / name).mkdir()
        pq.write_table(pa.table(events), folder / name / "interactions.parquet")
        items = {"item_id": [f"i{row}" for row in range(len(titles))], "title": titles}
        pq.write_table(pa.table(items), folder / name / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open model: its tokens are those of general text."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(own_texts(), 700)
    tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=5, num_attention_heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("hours", [0.0, 1.0])
def test_what_the_model_adds_is_asked_of_a_blend_with_networks_over_words(tmp_path: Path, hours: float) -> None:
    recipe = open_llm(data=tmp_path, hours=hours)
    assert recipe.blend is not None and WORDS in recipe.blend.parts and WORDS in recipe.evaluate.baselines


def test_an_open_model_is_cut_trained_within_hours_blended_and_judged(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "general.txt").write_text(own_texts()[0])
    settings = [f"data={data}", f"model={base}", "domains=beauty,toys", "hours=0.001", "text=general.txt"]
    settings += ["evaluate.max_queries=20", "blend.max_queries=20", "finetune.item_head=false"]
    settings += ["evaluate.rank.max_nodes=20", "blend.max_nodes=20"]  # such a model would read all titles
    settings += ["evaluate.baselines=titles", QUICK_PARTS]
    assert main(["run", "open_llm", *settings]) == 0
    run = tmp_path / "runs/open_llm"
    assert len(load_tokenizer(str(run / "model"))) < 700
    passes = json.loads((run / "budget.json").read_text())
    folder = run / "finetune/toys/cprec-style"
    settings_of = read_resolved(folder)["config"]
    assert settings_of["num_train_epochs"] == passes["finetune.num_train_epochs"] > 0
    assert settings_of["frozen_layers"] == 0.4
    assert len(read_done(folder)["trained_on"]) > 1
    assert GENERAL_TEXT in read_log(run / "pretrain" / LOG)[0]["heldout"]
    page = (run / "report.html").read_text()
    assert "Forgetting: perplexity on the general text" in page and "after pre-training" in page
    report = json.loads((run / "report.json").read_text())
    for domain in report["domains"].values():
        for model in ("fine-tuning only", "CPRec-style"):
            assert {model, f"{model} blend"} <= domain["arms"].keys()
    models = sorted(run.glob("finetune/*/*"))
    assert len(models) == 4
    capsys.readouterr()
    assert main(["run", "open_llm", *settings]) == 0
    said = capsys.readouterr().err
    for made in ("data-whole", "model", "data", "pretrain", *(str(path.relative_to(run)) for path in models)):
        assert f"{Path('runs/open_llm', made)}: complete with these settings, reused" in said


def test_heads_and_parts_learn_the_validation_events_before_the_test(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"data={data}", f"model={base}", "domains=toys", "finetune.head_networks=1", "evaluate.seeds=0,1"]
    settings += ["evaluate.baselines=titles", QUICK_PARTS]
    assert main(["run", "open_llm", *settings, "evaluate.refit=true"]) == 0
    run = tmp_path / "runs/open_llm"
    assert refitted_on(run / "finetune/toys/base-model-seed-1-refit") == (VALIDATION,)
    (domain,) = json.loads((run / "report.json").read_text())["domains"].values()
    assert {"base model (seed 0)", "base model blend (seed 1)", "blend without the model"} <= domain["arms"].keys()


def test_a_base_model_is_trained_on_text_cut_healed_and_made_a_recommender(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sentences = [f"{sentence}." for text in own_texts() for sentence in text.split(". ")]
    goods = [f"{kind} No {size}, {colour}" for kind in KINDS for size in range(9) for colour in COLOURS]
    for name, texts in (("general", sentences), ("products", goods)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = "text=general.jsonl,products.jsonl"
    settings = [files, "prepare.heldout_share=0.2", "pretrain.num_train_epochs=6", "pretrain.train_batch_size=4"]
    tiny = ["pretrain.tiny.hidden_size=32", "pretrain.tiny.num_attention_heads=2", "prepare.vocabulary_size=500"]
    assert main(["run", "base_text", *settings, "model=tiny", "output_dir=first", *tiny]) == 0

    shop = [f"data={data}", "domains=beauty"]
    assert main(["prepare", "open_llm", *shop, "model=first/pretrain", "output_dir=whole"]) == 0
    assert main(["shrink", "first/pretrain", "cut", "data=whole/data", files, "layers=1"]) == 0
    assert main(["run", "base_text", *settings, "model=cut", "output_dir=healed", "pretrain.learning_rate=3e-3"]) == 0
    out, _ = capsys.readouterr()
    for run in ("first", "healed"):
        before, *_, after = (line["heldout"] for line in read_log(Path(run, "pretrain", LOG)) if "heldout" in line)
        for name in ("text of general", "text of products"):
            assert after[name] < 0.9 * before[name]
            assert f"{before[name]:,.2f}" in out and f"{after[name]:,.2f}" in Path(run, "training.html").read_text()
    assert GENERAL_TEXT in before, "a model that had read something, and may forget it"
    assert main(["run", "base_text", *settings, "model=cut", "output_dir=healed", "pretrain.learning_rate=3e-3"]) == 0
    assert capsys.readouterr().err.count("complete with these settings, reused") == 2

    model = [*shop, "model=healed/pretrain", "output_dir=shop"]
    assert main(["prepare", "open_llm", *model]) == 0
    tune = ["finetune.domain=beauty", "finetune.num_train_epochs=0.5", "finetune.item_head=false"]
    assert main(["finetune", "open_llm", *model, *tune]) == 0
    assert len(read_done("shop/finetune")["trained_on"]) == 1, "text is no behaviour"
    assert main(["recommend", "shop/finetune", "--history", "lamp No 1, red", "--k", "2"]) == 0
