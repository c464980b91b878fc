"""One command on two tables: a model, a recipe that says the same, and a sentence."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cprec.cli import main
from cprec.config import essential, find_config, stage_config
from cprec.data.config import SyntheticConfig
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.evaluate.results import read_report
from cprec.fit import fit as stage
from cprec.fit.fit import fit
from cprec.rank.blend_file import read_about
from cprec.recipe import Recipe
from cprec.schema import CONTEXT, TEST, VALIDATION
from cprec.settings import from_mapping
from cprec.text.config import TINY
from cprec.text.tokenizer import train_tokenizer
from cprec.train.estimate import Estimate
from cprec.train.finetune import timed
from cprec.train.folder import refitted_on


def write(path: Path, table: pa.Table, names: dict[str, str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(names.values())
        rows.writerows([row[name] for name in names] for row in table.to_pylist())


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The books of a world of 150 readers, under other names; the current folder."""
    monkeypatch.chdir(tmp_path)
    world = SyntheticWorld(SyntheticConfig(num_library_users=150, num_market_users=1, items_per_domain=40))
    items, events = world.tables()["books"]
    write(tmp_path / "items.csv", items, {"item_id": "sku", "title": "product"})
    write(tmp_path / "events.csv", events, {"user_id": "customer", "item_id": "sku", "timestamp": "bought_at"})
    return tmp_path


def open_model(folder: Path) -> str:
    """A folder as Hugging Face's models have it, of random weights."""
    tokenizer = train_tokenizer([line.split(",")[1] for line in Path("items.csv").read_text().splitlines()], 400)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("is_open", [False, True])
def test_fit_ends_with_a_model_and_a_sentence(
    logs: Path, is_open: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_a_fixed_rate(config: object) -> Estimate:  # the machine may be busy
        return replace(timed(config), tokens_per_second=200.0)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "timed", at_a_fixed_rate)
    monkeypatch.setattr(stage, "seconds_to_train", lambda *_: 10.0)
    command = ["fit", "events.csv", "items.csv", "out", f"base={open_model(logs / 'base') if is_open else TINY}"]
    assert main([*command, "minutes=1e-9"]) == 2
    assert "Give 1 minute more" in capsys.readouterr().err
    command.append("minutes=5")
    assert main(command) == 0  # although there were too few minutes before
    out, err = capsys.readouterr()
    sentence = Path("out/answer.txt").read_text()
    assert sentence.startswith("Use ") and sentence.count("\n") == 1 and out.rstrip().endswith(sentence.strip())
    assert "customer is the user_id" in err and "bought_at is the timestamp" in err and "passes over" in err
    model = "out/models/shop/fine-tuning-only"
    assert "`cprec serve out/recommender` serves the " in err
    assert refitted_on("out/recommender") == (VALIDATION, TEST, CONTEXT) and refitted_on(model) == ()
    assert read_about("out/recommender")["blend"] == read_about(model)["blend"], "what is served is what was tried"

    recipe = find_config("out/recipe.yaml")
    assert from_mapping(Recipe, essential(recipe)) == recipe
    (table,) = recipe.prepare.tables
    assert table.items.columns == {"item_id": "sku", "title": "product"}
    assert recipe.finetune.num_train_epochs > 0.2 and recipe.prepare.max_title_tokens == 8
    report = read_report("out/report/report.json")
    arms = set(report.domains["shop"].arms)
    assert {"EASE", "fine-tuning only", "fine-tuning only blend", "blend without the model"} <= arms
    served = read_about(model)
    assert served["blend"] == served["vectors"] and served["blend"]["model"] == 0, "what is served is what was tried"
    assert report.certificate.clean
    assert Path(model, "item_head").is_dir()

    assert main(["run", "out/recipe.yaml"]) == 0  # all of it is there
    assert main(command) == 0
    assert "going on with what it says" in capsys.readouterr().err
    assert main([*command, "seed=1"]) == 2
    assert "other settings of seed (as seed=0)" in capsys.readouterr().err


@pytest.mark.slow
def test_an_open_model_stays_as_it_is_where_there_is_no_time_to_train_it(
    logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "timed", lambda config: replace(timed(config), tokens_per_second=6.0))
    monkeypatch.setattr(stage, "seconds_to_train", lambda *_: 10.0)
    assert main(["fit", "events.csv", "items.csv", "out", f"base={open_model(logs / 'base')}", "minutes=5"]) == 0
    err = capsys.readouterr().err
    assert "as it is, without training" in err and "`cprec serve out/recommender` serves the " in err
    assert find_config("out/recipe.yaml").finetune.num_train_epochs == 0
    assert Path("out/answer.txt").read_text().startswith("Use ")


def test_what_cannot_be_fitted_is_told(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path("events.csv").read_text().splitlines(keepends=True)
    Path("ten.csv").write_text("".join(lines[:11]))
    with pytest.raises(Exception, match=r"ten.csv: \d of \d customers have 4 events or more \(10 events in all\)"):
        fit(stage_config("fit", ["interactions=ten.csv", "items=items.csv", "output_dir=out"]))
    assert not Path("out").exists()
    Path("other").mkdir()
    Path("other/file").touch()
    assert main(["fit", "events.csv", "items.csv", "other"]) == 2
    assert "other exists and is not of `cprec fit`" in capsys.readouterr().err
    Path("bare.csv").write_text("sku,price\n" + "".join(f"books-{n:02d},{n}\n" for n in range(40)))
    assert main(["fit", "events.csv", "bare.csv", "out"]) == 2
    assert "bare.csv: which column is the item's title" in capsys.readouterr().err
    Path("dated.csv").write_text("customer,sku,time\n" + "".join(f"a,books-{n:02d},3. May\n" for n in range(40)))
    assert main(["fit", "dated.csv", "items.csv", "out"]) == 1
    assert "the values of time (as '3. May') are no times" in capsys.readouterr().err
    Path("bare.csv").write_text("".join(lines[1:]))
    assert main(["fit", "bare.csv", "items.csv", "out"]) == 1
    assert "That looks like a row: where a file has no header" in capsys.readouterr().err
    Path("empty.csv").write_text(lines[0])
    assert main(["fit", "empty.csv", "items.csv", "out"]) == 1
    assert "empty.csv has a header and no rows" in capsys.readouterr().err
