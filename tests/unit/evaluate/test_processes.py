"""The same rankings of a language model and its blend, byte for byte, from one process and from two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cprec.blend import blend
from cprec.data.config import TableSource
from cprec.entrants import model_entrants
from cprec.evaluate import asking
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.results import CANDIDATES_UNIFORM, FULL, GENERATED, Report
from cprec.finetune import finetune
from cprec.rank.config import BlendConfig, RankConfig
from cprec.run import evaluate_models
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.train.config import FinetuneConfig, TinyModel

WORDS = ("apple", "river", "stone", "cloud", "tiger", "piano", "lemon", "grass")
MODEL, BLEND = "my model", "my model blend"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who take four to nine items each, one after the other on a ring of 48."""
    folder = tmp_path_factory.mktemp("world")
    items = [f"{n:02},{WORDS[n % 8]} number {n // 8}" for n in range(48)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]))
    events = [f"u{u:02},{(5 * u + n * n) % 48:02},{1_500_000_000 + n}" for u in range(40) for n in range(4 + u % 6)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    source = TableSource(domain="shop", interactions=f"{folder}/log.csv", items=f"{folder}/items.csv")
    return prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=(source,),
            target_domains=("shop",),
            vocabulary_size=400,
            k_core=0,
            min_events=3,
            heldout_share=0.0,
            workers=1,
        )
    )


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, and a blend that gives its log P a weight."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    finetune(
        FinetuneConfig(
            data=str(data),
            output_dir=str(folder),
            domain="shop",
            tiny=TinyModel(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
            num_train_epochs=0,
            max_length=128,
            bf16="false",
            eval_tokens=0,
            report_to=("none",),
        )
    )
    blend(BlendConfig(model=str(folder), parts=("EASE",)))
    weigh(folder, 0.7)
    return folder


def weigh(folder: Path, weight: float) -> None:
    """Give log P this weight in the blend, and EASE one half."""
    about = json.loads((folder / "blend.json").read_text())
    about["blend"] |= {"model": weight, "parts": {"EASE": {"weight": 0.5, "floor": 0.01}}}
    (folder / "blend.json").write_text(json.dumps(about))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three parts a protocol; and one thread here, as workers have."""
    monkeypatch.setattr(asking, "BATCH", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluation(data: Path, model: Path, output: Path, **changes: Any) -> EvaluateConfig:
    common = {"data": str(data), "models": {MODEL: str(model)}, "baselines": ("popularity",)}
    return EvaluateConfig(**{**common, "output_dir": str(output), **changes})


def rankings(report: Report, folder: Path) -> dict[str, bytes]:
    """The saved rankings by file, all but how long they took, and the share of exact lists that a beam found."""
    files = sorted((folder / "shop").glob("my-model*.parquet"))
    found = {path.name: pq.read_table(path) for path in files}
    tables = {name: table.replace_schema_metadata().schema.serialize().to_pybytes() for name, table in found.items()}
    for name, table in found.items():
        tables[name] += b"".join(buffer for column in table.columns for buffer in bytes_of(column))
    return tables | {arm: repr(report.domains["shop"].arms[arm].found_of_exact).encode() for arm in (MODEL, BLEND)}


def bytes_of(column: Any) -> Iterator[bytes]:
    for buffer in column.combine_chunks().buffers():
        if buffer is not None:
            yield buffer.to_pybytes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "beam"])
def test_two_processes_rank_as_one_does(data: Path, model: Path, tmp_path: Path, mode: Any) -> None:
    ranked = []
    for number in (1, 2):
        output = tmp_path / str(number)
        rank = RankConfig(mode=mode, beam_width=4)
        config = evaluation(data, model, output, rank=rank, generate=True, num_processes=number)
        ranked.append(rankings(evaluate_models(config), output))
        assert not list((output / "shop").glob("*.parts"))
    one, two = ranked
    protocols = {FULL, CANDIDATES_UNIFORM, GENERATED}
    assert {f"my-model{arm}.{name}.parquet" for arm in ("", "-blend") for name in protocols} <= set(one)
    assert (b"num_queries=40" in one[MODEL]) == (mode == "beam")
    assert one[f"my-model.{FULL}.parquet"] != one[f"my-model-blend.{FULL}.parquet"]
    assert one == two


def test_only_who_reads_titles_is_asked_in_parts(data: Path, model: Path, tmp_path: Path) -> None:
    def in_parts(**changes: Any) -> dict[str, bool]:
        config = evaluation(data, model, tmp_path, **changes)
        entrants = model_entrants(config, "shop", config.models)
        return {entrant.name: entrant.num_places is not None for entrant in entrants}

    others = {"blend without the model": False}
    assert in_parts() == others | {MODEL: True, BLEND: True}
    assert not any(in_parts(rank=RankConfig(mode="vectors")).values())
    weigh(model, 0.0)
    assert in_parts() == others | {MODEL: True, BLEND: False}
    weigh(model, 0.7)
