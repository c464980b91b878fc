from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cprec import cli
from cprec.anneal import TRUNK, anneal
from cprec.data.config import SyntheticConfig, TableSource
from cprec.errors import ConfigError
from cprec.provenance import CONFIG_FILE
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.train.config import AnnealConfig, PretrainConfig, TinyModel
from cprec.train.folder import read_done, read_log
from cprec.train.pretrain import pretrain


@pytest.fixture(scope="module")
def data(write_world: Callable[..., tuple[TableSource, ...]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated world."""
    folder = tmp_path_factory.mktemp("anneal")
    world = SyntheticConfig(num_market_users=250, num_library_users=20, items_per_domain=40)
    return prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=write_world(folder, world, "kitchen", "toys"),
            pretrain_domains=("kitchen", "toys"),
            target_domains=("kitchen",),
            k_core=0,
            vocabulary_size=400,
            max_title_tokens=8,
            max_document_tokens=128,
            min_events=3,
            min_history=1,
            heldout_share=0.05,
            workers=1,
        )
    )


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A pre-training run with a stable checkpoint."""
    return pretrain(
        PretrainConfig(
            data=str(data),
            output_dir=str(data.parent / "run"),
            tiny=TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            learning_rate=1e-2,
            num_train_epochs=0.5,
            max_length=256,
            bf16="false",
            anneal_steps=0.2,
        )
    )


@pytest.mark.slow
def test_branches_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = anneal(AnnealConfig(run=str(run), lengths=("20%", "0.4"), data=("same", "sft_late"), max_queries=20))
    names = [TRUNK, "20% 1-sqrt same", "20% 1-sqrt sft_late", "40% 1-sqrt same", "40% 1-sqrt sft_late"]
    assert list(found["rows"]) == names
    same, whole = run / "forks" / "20-1-sqrt-same", read_done(run)
    assert (same / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes(), "the run's own end"
    rows = found["rows"]
    assert rows[names[1]]["total_tokens"] == whole["tokens"]  # type: ignore[index]
    trunk = rows[TRUNK]["total_tokens"]
    assert rows[names[3]]["tokens"] == pytest.approx(trunk * 0.4 / 0.6, rel=0.05)
    assert rows[TRUNK]["heldout"] and rows[names[1]]["heldout"] == read_log(run / "log.jsonl")[-1]["heldout"]
    for name, row in rows.items():
        assert 0 <= row["ndcg@10"]["mean"] <= 1 and row["next_item_perplexity"] > 1
        assert ("against_trunk" in row) == (name != TRUNK)
    said = capsys.readouterr().out
    assert all(name in said for name in names) and "held-out perplexity" in said
    page = (run / "forks" / "forks.html").read_text()
    charts = page.split("<svg")[1:]
    assert len(charts) >= 3 and "nan" not in page.lower().replace("anneal", "")
    for chart in charts:
        ElementTree.fromstring("<svg" + chart.partition("</svg>")[0] + "</svg>")
    assert json.loads((run / "forks" / "forks.json").read_text())["rows"].keys() == rows.keys()

    stamp = (same / "cprec.json").stat().st_mtime_ns
    more = anneal(AnnealConfig(run=str(run), lengths=("20%", "30%"), num_train_epochs=0))
    assert list(more["rows"]) == [TRUNK, names[1], "30% 1-sqrt same"]
    assert (same / "cprec.json").stat().st_mtime_ns == stamp, "a branch that is there is reused"
    assert "ndcg@10" not in more["rows"][names[1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": ("5 percent",)}, "lengths: '5 percent' is no share between 0 and 1; write 10% or 0.1"),
        ({"lengths": ("100%",)}, "'100%' is no share"),
        ({"lengths": ()}, "lengths, shapes and data must each name one thing at least"),
        ({"start": "stable-7"}, "has no stable-7: it is written at the end of the stable phase"),
        ({"run": "nowhere"}, "run=nowhere: no run of `cprec pretrain` is there"),
    ],
)
def test_what_cannot_be_branched_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    (tmp_path / CONFIG_FILE).touch()  # as a run has it
    (tmp_path / "stable-3").mkdir()
    with pytest.raises(ConfigError, match=message):
        anneal(AnnealConfig(**({"run": str(tmp_path)} | settings)))  # type: ignore[arg-type]


def test_the_schedule_is_shown_before_a_run(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data.parent / "plan.yaml"
    source.write_text(f"data: {data}\noutput_dir: x\nmax_length: 256\nlearning_rate: 2e-3\nanneal_steps: 0.5\n")
    assert cli.main(["schedule", str(source), "train_batch_size=2", "anneal_mixture.mixed_share=0.9"]) == 0
    said = capsys.readouterr().out
    assert "mixed: " in said and "annealing 90" in said
    assert "2.00e-03 " in said and "█" in said
    last = [line for line in said.splitlines() if line.startswith("annealing: steps")]
    assert last and last[0].endswith("to 0.0002")
