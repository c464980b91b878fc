"""A fine-tuned model and its student by the command line: made, blended, served, judged by the same certificate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from cprec.cli import main
from cprec.data.config import TableSource
from cprec.rank.llm import LLMRecommender
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import open_shards
from cprec.text.stream import NEXT_CHILD, NEXT_TOKEN
from cprec.train.folder import LOG, read_done, read_log

pytestmark = pytest.mark.slow

KINDS, COLOURS = ("lamp", "kettle", "spade", "scarf"), ("red", "white", "green", "blue", "black", "grey")
ALIKE = ["bf16=false", "max_length=128", "train_batch_size=8", "learning_rate=5e-3", "logging_steps=1", "save_steps=50"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop whose customers stay with a kind of thing, mostly."""
    folder, generator = tmp_path_factory.mktemp("distil"), np.random.default_rng(0)
    titles = [f"{kind} No {size} {colour}" for kind in KINDS for size in range(2) for colour in COLOURS]
    lines = ["user_id,item_id,timestamp"]
    for user in range(70):
        kind = generator.integers(4)
        for step in range(8):
            item = 12 * (kind if generator.random() < 0.9 else generator.integers(4)) + generator.integers(12)
            lines.append(f"u{user},t{item},{1_400_000_000 + 3600 * step}")
    (folder / "items.csv").write_text("\n".join(["item_id,title", *(f"t{row},{t}" for row, t in enumerate(titles))]))
    (folder / "log.csv").write_text("\n".join(lines))
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
def teacher(data: Path) -> Path:
    """A model of four layers that has learnt the shop."""
    folder = data.parent / "teacher"
    tiny = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    settings = {
        "data": str(data),
        "output_dir": str(folder),
        "domain": "shop",
        "documents": "users",
        "tiny": tiny,
        "num_train_epochs": 6,
    }
    (data.parent / "teacher.json").write_text(json.dumps(settings))
    assert main(["finetune", str(data.parent / "teacher.json"), *ALIKE]) == 0
    return folder


@pytest.fixture
def distil(data: Path, teacher: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, *settings: str) -> Path:
        given = [f"data={data}", "layers=2", "num_groups=2", *ALIKE, *settings]
        assert main(["distil", str(teacher), str(tmp_path / name), *given]) == 0
        return tmp_path / name

    return run


def divergence(data: Path, teacher: Path, student: Path) -> float:
    """KL of a student's next tokens from the teacher's over validation prompts, in nats a token."""
    shards = open_shards(data / "examples" / "shop" / "validation")
    documents = shards.take(np.arange(20))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (teacher, student)]
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(len(documents)):
            ids = torch.from_numpy(documents[row].astype(np.int64))[None]
            theirs, mine = (model(input_ids=ids).logits[0].log_softmax(1) for model in models)
            total += F.kl_div(mine, theirs, log_target=True, reduction="sum").item()
            count += ids.shape[1]
    return total / count


def test_a_student_is_a_recommender_like_its_teacher(
    distil: Callable[..., Path], data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    student = distil("student", "softmax=both", "head_weight=0.3", "num_train_epochs=1")
    done, before = read_done(student), read_done(teacher)
    assert done is not None and before is not None
    assert (done["stage"], done["domain"], done["softmax"]) == ("distil", "shop", "both")
    assert done["trained_on"][:-1] == before["trained_on"] and len(done["trained_on"]) == 2
    terms = {NEXT_TOKEN, NEXT_CHILD, "tokens", "direction", "distance", "heads"}
    assert set(read_log(student / LOG)[1]["losses"]) == terms
    card = (student / "README.md").read_text()
    assert "distilling" in card and "it covers all behaviour" in card
    assert len(LLMRecommender.from_pretrained(student).recommend(["t1", "t2"], k=5)) == 5
    assert main(["blend", str(student), "with=EASE, popularity", "max_queries=20"]) == 0
    assert json.loads((student / "blend.json").read_text())
    asked: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets=None: asked.append(server.config.app))
    assert main(["serve", str(student), "port=0"]) == 0 and len(asked) == 1
    capsys.readouterr()
    assert main(["recommend", str(student), "--history", "t1", "--k", "3"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) >= 3


def test_a_teacher_makes_a_student_that_answers_as_it_does(
    distil: Callable[..., Path], data: Path, teacher: Path
) -> None:
    taught = distil("taught", "num_train_epochs=1", "token_weight=10")
    alone = distil("alone", "num_train_epochs=1", "token_weight=0", "direction_weight=0", "distance_weight=0")
    assert divergence(data, teacher, taught) < 0.7 * divergence(data, teacher, alone)
    assert divergence(data, teacher, teacher) < 1e-6


def test_a_student_may_read_trees_and_have_an_item_head(
    distil: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(TitleSASRec, hidden_size=8, num_blocks=1, num_epochs=1, min_steps=0)
    monkeypatch.setattr("cprec.finetune.TitleSASRec", small)
    trees = ["documents=trees", "teachers=EASE", "taught_targets=1"]
    student = distil("trees", *trees, "num_train_epochs=0.1", "item_head=true", "general_text=none")
    assert {"tokens", "direction"} < set(read_log(student / LOG)[1]["losses"])
    assert (student / "item_head").is_dir()


def test_a_teacher_that_the_certificate_does_not_cover_is_refused(
    data: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    def refused(message: str, model: Path = teacher, folder: Path = data) -> None:
        capsys.readouterr()
        assert main(["distil", str(model), str(tmp_path / "out"), f"data={folder}", "layers=2", "num_groups=2"]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    stranger = Path(shutil.copytree(teacher, tmp_path / "stranger"))
    about = json.loads((stranger / "cprec.json").read_text())
    (stranger / "cprec.json").write_text(json.dumps(about | {"trained_on": ["0" * 64]}))
    refused(f"does not cover the data that {stranger} was trained on", stranger)
    (stranger / "cprec.json").write_text(json.dumps(about))
    (stranger / "refit.json").write_text(json.dumps({"held_out": ["validation"]}))
    refused("has learnt the validation events", stranger)
    unsure = Path(shutil.copytree(data, tmp_path / "data"))
    (unsure / "certificate.json").unlink()
    refused("certificate.json is missing", folder=unsure)
