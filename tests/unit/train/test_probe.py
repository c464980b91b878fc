"""The ranking probe: what it measures, what it keeps, and that training does not notice it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cprec.data.dataset import read_catalogue, write_manifest
from cprec.errors import ConfigError
from cprec.rank.llm import LLMRecommender
from cprec.ranks import count_rankings, ndcg
from cprec.recommender import RankingQuery
from cprec.schema import SCHEMA_VERSION, Item
from cprec.text.prompts import Template
from cprec.text.tokenizer import load_tokenizer
from cprec.train.checkpoint import TrainState
from cprec.train.config import FinetuneConfig, PretrainConfig, TinyModel
from cprec.train.finetune import finetune
from cprec.train.folder import LOG, METRIC, read_done, read_log
from cprec.train.loss import PackedLoss
from cprec.train.pretrain import pretrain
from cprec.train.probe import BEST, BestWeights, Probe, queries_of
from cprec.train.training import encoder_of

ABOUT = {"template": asdict(Template()), "max_title_tokens": 32, "history": "specific", "max_history": 10}


@pytest.fixture(scope="module")
def asked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder with validation queries of books, one for a target that was seen before; no file of test
    queries is there to be read."""
    folder = tmp_path_factory.mktemp("asked") / "data"
    shutil.copytree(data, folder)
    domains = {name: {"platform": "shop", "has_times": True} for name in ("books", "games")}
    write_manifest(folder, {"schema_version": SCHEMA_VERSION, "domains": domains})
    histories = [[f"{(start + step) % 18:02}" for step in range(1 + start % 4)] for start in range(24)]
    targets = [f"{(start + 1 + start % 4) % 18:02}" for start in range(23)] + ["05"]
    columns = {
        "domain": ["books"] * 24,
        "history_domain": [["books"] * len(history) for history in histories],
        "history_item": histories,
        "target": targets,
    }
    path = folder / "queries/books/validation.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)
    return folder


def made(asked: Path, num_queries: int = 0, **about: Any) -> Probe:
    tokenizer = load_tokenizer(str(asked / "tokenizer"))
    encoder = encoder_of(asked, ABOUT, tokenizer)
    settings = {**ABOUT, **about}
    return Probe.read(queries_of(asked, "books"), num_queries, encoder, settings, context=1024, pad_id=0)


def expected(asked: Path, model: Any, **options: Any) -> float:
    """NDCG@10 by the recommender that evaluations rank with."""
    tokenizer, rows = load_tokenizer(str(asked / "tokenizer")), pq.read_table(queries_of(asked, "books")).to_pylist()
    recommender = LLMRecommender(model, tokenizer, read_catalogue(asked), domain="books", **options)
    queries = [
        RankingQuery(
            query_id=str(number),
            domain="books",
            history=tuple(Item("books", item) for item in row["history_item"]),
            exclude=frozenset(row["history_item"]),
        )
        for number, row in enumerate(rows)
    ]
    found = count_rankings(recommender.rank(queries, 10), [row["target"] for row in rows])
    return float(ndcg(*found, 10).mean())


@pytest.mark.parametrize("over", ["vocabulary", "catalogue"])
def test_it_measures_what_an_evaluation_measures(asked: Path, make_model: Callable[..., Any], over: Any) -> None:
    for seed in range(3):
        model = make_model(seed).train()
        found = made(asked, softmax=over)(model, bf16=False)
        assert model.training
        assert found == pytest.approx(expected(asked, model, mode="exact", trained_over=over), abs=1e-12) and found > 0


def test_the_sample_is_the_same_in_every_run(asked: Path) -> None:
    first, again = (made(asked, 5).target_Q for _ in range(2))
    assert len(first) == 5 and first.tolist() == again.tolist()


# ---- which weights are kept ------------------------------------------------------------------------------------------


class Scripted:
    """Gives values in turn, in place of a probe."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = iter(values)

    def __call__(self, model: Any, *, bf16: bool) -> float:
        return next(self._values)


@pytest.mark.parametrize(("values", "kept"), [([0.1, 0.4, 0.2], 1), ([0.3, 0.3, 0.1], 1), ([0.0, 0.0, 0.0], 2)])
def test_the_best_weights_are_kept_and_of_equal_ones_the_later(
    make_model: Callable[..., Any], tmp_path: Path, values: list[float], kept: int
) -> None:
    loss = PackedLoss(make_model())
    first = next(loss.module.parameters())
    best = BestWeights(loss, {"books": Scripted(values)}, tmp_path, keep=True)  # type: ignore[dict-item]
    for step in range(3):
        with torch.no_grad():
            first.fill_(step)
        assert best(TrainState(step=step))[METRIC] == {"books": values[step]}
        # What was kept outlasts the process.
        best = BestWeights(loss, best._probes, tmp_path, keep=True)
    assert best.restore() == {"step": kept, METRIC: {"books": values[kept]}}
    assert (first == kept).all()


def test_without_keeping_nothing_is_written(make_model: Callable[..., Any], tmp_path: Path) -> None:
    best = BestWeights(PackedLoss(make_model()), {"a": Scripted([0.5])}, tmp_path, keep=False)  # type: ignore[dict-item]
    assert best(TrainState())[METRIC] == {"a": 0.5}
    assert best.restore() is None and not list(tmp_path.iterdir())


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tune(asked: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    def make(name: str, **changes: Any) -> FinetuneConfig:
        settings: dict[str, Any] = {
            "data": str(asked),
            "output_dir": str(tmp_path / name),
            "domain": "books",
            "tiny": TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            "learning_rate": 1e-2,
            "max_length": 96,
            "train_batch_size": 4,
            "bf16": "false",
            "eval_steps": 3,
            "save_steps": 4,
            "logging_steps": 1,
            "report_to": ("none",),
            "probe_queries": 24,
            "keep": "best",
        }
        return FinetuneConfig(**settings | changes)

    return make


def of_log(folder: Path, name: str) -> dict[int, Any]:
    return {line["step"]: line[name] for line in read_log(folder / LOG) if name in line}


def test_it_changes_nothing_but_which_weights_a_finished_run_has(
    tune: Callable[..., FinetuneConfig], asked: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranked, plain = finetune(tune("ranked")), finetune(tune("plain", probe_queries=0, keep="last"))
    assert of_log(ranked, "loss") == of_log(plain, "loss")
    assert not of_log(plain, METRIC) and "kept" not in (read_done(plain) or {})
    recorded = [json.loads((folder / "run.json").read_text())["inputs"] for folder in (ranked, plain)]
    assert recorded[0].keys() - recorded[1].keys() == {"queries/books"}
    values = {step: found["books"] for step, found in of_log(ranked, METRIC).items()}
    step = max(values, key=lambda step: (values[step], step))
    assert (read_done(ranked) or {})["kept"] == {"step": step, METRIC: {"books": values[step]}} and len(values) > 3
    model = LLMRecommender.from_pretrained(ranked).reader.model  # type: ignore[attr-defined]
    assert made(asked)(model, bf16=False) == pytest.approx(values[step])
    assert not (ranked / BEST).exists()
    assert f"kept the weights after step {step} of {max(values)}. NDCG@10" in capfd.readouterr().err


def test_a_stopped_run_keeps_what_the_uninterrupted_one_keeps(
    tune: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights, of step 3, come before the checkpoint of step 8, which the run goes on from."""

    def run(name: str, values: list[float]) -> Path:
        monkeypatch.setattr(Probe, "__call__", lambda *_, **__: values.pop(0))
        return finetune(tune(name))

    whole = run("whole", [0.1, 0.9, 0.2, 0.3, 0.4, 0.5])
    with pytest.raises(IndexError):
        run("cut", [0.1, 0.9, 0.2])
    cut = run("cut", [0.3, 0.4, 0.5])
    assert (read_done(cut) or {})["kept"] == (read_done(whole) or {})["kept"] == {"step": 3, METRIC: {"books": 0.9}}
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert of_log(cut, METRIC) == of_log(whole, METRIC)


def test_pretraining_ranks_in_the_domains_that_are_named(tune: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    shared = {name: getattr(tune("pre"), name) for name in ("data", "output_dir", "tiny", "max_length", "bf16")}
    ranking = {"probe_queries": 24, "keep": "best"}
    folder = pretrain(PretrainConfig(**shared, **ranking, probe_domains=("books",), num_train_epochs=0.5))
    assert set(of_log(folder, METRIC)[0]) == {"books"} and "kept" in (read_done(folder) or {})
    with pytest.raises(ConfigError, match=r"no validation queries of 'games'"):
        pretrain(PretrainConfig(**{**shared, "output_dir": "other"}, **ranking, probe_domains=("games",)))


def test_data_without_queries_are_told_of(tune: Callable[..., FinetuneConfig], data: Path) -> None:
    with pytest.raises(ConfigError, match=f"{data} has no validation queries of 'books'"):
        finetune(tune("old", data=str(data)))


def test_settings_that_rank_nothing_are_refused(tune: Callable[..., FinetuneConfig]) -> None:
    with pytest.raises(ConfigError, match="keep=best goes by rankings .* set probe_queries=256, or keep=last"):
        tune("nothing", probe_queries=0)
    with pytest.raises(ConfigError, match="set fsdp=false, or probe_queries=0"):
        tune("spread", fsdp=True)
    for settings in ({"probe_queries": 8}, {"probe_domains": ("books",)}):
        with pytest.raises(ConfigError, match="set both"):
            PretrainConfig(data="data", output_dir="out", **settings)
