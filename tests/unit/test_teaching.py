"""Targets that other recommenders choose: what is drawn, what becomes an example, and what a run records of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cprec import teaching
from cprec.data.config import TableSource
from cprec.data.dataset import read_split
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, InputChanged
from cprec.finetune import finetune
from cprec.recommender import RankingQuery
from cprec.schema import TRAIN
from cprec.scoring import ScoringRecommender
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import open_shards
from cprec.text.tokenizer import load_tokenizer
from cprec.train import finetune as language_model
from cprec.train.config import FinetuneConfig, TinyModel
from cprec.train.finetune import tokens_of_pass
from cprec.train.folder import read_done

NUM_ITEMS = 12
TOKENS = "max_document_tokens"


class Fixed(ScoringRecommender):
    """Gives every query the same scores."""

    name = "fixed"

    def __init__(self, split: Split, scores: Sequence[float]) -> None:
        self.catalogue, self._scores = split.catalogue, np.array(scores, dtype=float)

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        return np.tile(self._scores, (len(queries), 1))


def shares_drawn(split: Split, teachers: Sequence[Sequence[float]], history: Sequence[int]) -> np.ndarray:
    """How often each item is drawn after a history, of 4,000 times."""
    histories = Ragged.of([list(history)])
    made = [Fixed(split, scores) for scores in teachers]
    items = teaching.drawn(made, split, "ring", histories, 4_000, seed=0)
    return np.bincount(items[0], minlength=NUM_ITEMS) / 4_000


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_chances_are_products_of_shares_of_the_best_score(ring: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "MOST", 4)
    first, second = [0.0] * NUM_ITEMS, [1.0] * NUM_ITEMS
    first[1:5], second[1:5] = [8, 4, 4, 2], [1, 1, 0.5, 2]  # shares 1, .5, .5, .25 and .5, .5, .25, 1
    found = shares_drawn(ring, [first, second], [7])
    assert found[1:5] == pytest.approx(np.array([0.5, 0.25, 0.125, 0.25]) / 1.125, abs=0.02)
    assert found.sum() == pytest.approx(found[1:5].sum()), "others are not among the best four"


def test_an_item_that_a_teacher_knows_nothing_of_has_the_floor(ring: Split) -> None:
    scores = [0.0] * NUM_ITEMS
    scores[3] = 5.0
    found = shares_drawn(ring, [scores], [7])
    others = np.delete(found, [3, 7])
    assert found[3] == pytest.approx(1 / (1 + 10 * teaching.FLOOR), abs=0.02)
    assert others == pytest.approx(teaching.FLOOR / (1 + 10 * teaching.FLOOR), abs=0.01) and found[7] == 0


def test_an_item_of_the_history_is_drawn_only_where_there_is_no_other(ring: Split) -> None:
    scores = np.arange(NUM_ITEMS) + 1.0
    assert shares_drawn(ring, [scores], [11, 2])[[11, 2]].tolist() == [0, 0]
    everything = shares_drawn(ring, [scores], range(NUM_ITEMS))
    assert everything == pytest.approx(scores / scores.sum(), abs=0.02)


def test_draws_are_those_of_the_seed_whatever_the_batches(ring: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = Ragged.of([[row % NUM_ITEMS] for row in range(50)])
    fixed = [Fixed(ring, np.arange(NUM_ITEMS))]

    def draw(seed: int) -> np.ndarray:
        return teaching.drawn(fixed, ring, "ring", histories, 3, seed)

    whole = draw(0)
    monkeypatch.setattr(teaching, "BATCH", 7)
    assert np.array_equal(draw(0), whole) and not np.array_equal(draw(1), whole)


# ---- what becomes an example -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After item n comes item n + 1; every user's two last events, which are held out, go backwards instead. The items
    of another domain stand before them in the catalogue."""
    folder = tmp_path_factory.mktemp("world")
    Path(folder, "others.csv").write_text("item_id,title\na,other thing\nb,another thing")
    others = [f"u{user:02},{item},{1_400_000_000 + n}" for user in range(9) for n, item in enumerate("abab")]
    Path(folder, "others_log.csv").write_text("\n".join(["user_id,item_id,timestamp", *others]))
    items = [f"{n:02},thing {n}" for n in range(NUM_ITEMS)]
    Path(folder, "items.csv").write_text("\n".join(["item_id,title", *items]))
    events = []
    for user in range(60):
        walk = [(user + n) % NUM_ITEMS for n in range(4 + user % 4)]
        walk += [(walk[-1] - 3) % NUM_ITEMS, (walk[-1] - 4) % NUM_ITEMS]
        events += [f"u{user:02},{item:02},{1_500_000_000 + n}" for n, item in enumerate(walk)]
    Path(folder, "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    tables = (
        TableSource(domain="others", interactions=f"{folder}/others_log.csv", items=f"{folder}/others.csv"),
        TableSource(domain="ring", interactions=f"{folder}/log.csv", items=f"{folder}/items.csv"),
    )
    rules: dict[str, Any] = {"k_core": 0, "min_events": 2, "min_history": 1, "vocabulary_size": 300, "workers": 1}
    return prepare(PrepareConfig(output_dir=str(folder / "data"), tables=tables, target_domains=("ring",), **rules))


@pytest.fixture
def config(data: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        data=str(data),
        output_dir=str(tmp_path / "tuned"),
        domain="ring",
        tiny=TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        teachers=("transition graph", "popularity"),
        num_train_epochs=0.5,
        max_length=128,
        bf16="false",
        eval_tokens=0,
        report_to=("none",),
    )


def texts(config: FinetuneConfig) -> list[tuple[list[int], int]]:
    """The examples that are taught: the items of the history, and the target."""
    found, tokenizer = teaching._examples(config), load_tokenizer(str(Path(config.data, "tokenizer")))
    out = []
    for row in range(len(found)):
        text = tokenizer.decode(found.take(np.array([row])).values.tolist())
        *history, target = [int(line.split("thing ")[1].removesuffix("<eos>")) for line in text.splitlines()[2:]]
        start = int(found.column("target_start")[row])
        assert tokenizer.decode(found.take(np.array([row])).values[start:].tolist()).strip() == f"thing {target}<eos>"
        out.append((history, target))
    return out


def test_every_prefix_of_the_training_events_gets_its_targets(config: FinetuneConfig) -> None:
    split = read_split(config.data)
    train, rows = split.train, split.catalogue.rows_of("ring")
    assert rows[0] > 0
    of_users = [train.item[(train.user == user) & (train.item >= rows[0])] - rows[0] for user in np.unique(train.user)]
    prefixes = [items[: n + 1].tolist() for items in of_users for n in range(len(items))]
    found = texts(replace(config, taught_targets=3))
    assert sorted(history for history, _ in found) == sorted(prefixes * 3), "and of no held-out event"
    follows = np.mean([target == (history[-1] + 1) % NUM_ITEMS for history, target in found])
    assert follows > 0.3, "chance has less than a tenth"
    assert all(target not in history for history, target in found if len(set(history)) < NUM_ITEMS)


@pytest.mark.parametrize("most", range(24, 36))
def test_examples_have_no_more_tokens_than_documents_may(
    config: FinetuneConfig, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some just fit, whatever the number."""
    read = teaching.read_resolved
    monkeypatch.setattr(teaching, "read_resolved", lambda folder: {"config": read(folder)["config"] | {TOKENS: most}})
    found = teaching._examples(config)
    assert most - 4 <= found.column("length").max() <= most


def test_a_run_reads_the_examples_of_its_teachers_once_a_pass(config: FinetuneConfig) -> None:
    own = open_shards(Path(config.data, "examples", "ring", TRAIN)).manifest["num_tokens"]
    taught = int(teaching._examples(config).column("length").sum())
    about = read_done(finetune(config))
    assert about is not None
    assert about["tokens"] == pytest.approx(0.5 * (own + taught), rel=0.02)
    assert len(about["trained_on"]) == 1, "the events that they learnt are those of the certified data"
    assert tokens_of_pass(config) == 3 * own and tokens_of_pass(replace(config, teachers=())) == own


def test_a_run_with_teachers_is_another_run(config: FinetuneConfig) -> None:
    finetune(config)
    finetune(config)  # reused
    with pytest.raises(ConfigError, match="teachers was"):
        finetune(replace(config, teachers=()))


def test_changed_events_are_other_input_of_the_teachers(
    config: FinetuneConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(config)
    path = next((data / "interactions" / "domain=ring").glob("*.parquet"))
    before, table = path.read_bytes(), pq.read_table(path)
    try:
        pq.write_table(table.slice(0, table.num_rows - 1), path)
        with pytest.raises(InputChanged, match="other input: interactions/domain=ring/part-0.parquet changed"):
            finetune(config)
    finally:
        path.write_bytes(before)
    monkeypatch.setattr(teaching, "code_sha256", lambda name: "another")
    with pytest.raises(InputChanged, match="the events or the code of the teachers"):
        finetune(config)
    assert json.loads(Path(config.output_dir, "run.json").read_text())["inputs"]["taught"] != "another"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": ("the graph",)}, "'the graph' cannot teach; these can: popularity"),
        ({"teachers": ("SASRec",)}, "'SASRec' cannot teach"),
        ({"teachers": ("EASE",), "documents": "users"}, "set documents=examples"),
        ({"teachers": ("EASE",), "max_documents": 5}, "max_documents=0"),
        ({"teachers": ("EASE",), "num_train_epochs": 0}, "nobody to teach"),
        ({"taught_targets": 0}, "taught_targets=0 must be at least 1"),
    ],
)
def test_what_cannot_be_taught_is_refused(config: FinetuneConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(replace(config, **changes))
    assert not Path(config.output_dir).exists()


def test_teachers_are_not_forgotten_by_who_cannot_make_them(config: FinetuneConfig) -> None:
    with pytest.raises(ConfigError, match="call cprec.finetune.finetune"):
        language_model.finetune(config)


def test_a_teacher_that_the_data_do_not_suit_is_named(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.baselines.ease.free_memory", lambda: 10)
    with pytest.raises(ConfigError, match="teachers: EASE cannot be made of this data"):
        finetune(replace(config, teachers=("EASE",)))
