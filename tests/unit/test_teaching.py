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
from cprec.data.queries import sampled_rows
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, InputChanged
from cprec.finetune import finetune
from cprec.recommender import RankingQuery
from cprec.scoring import ScoringRecommender
from cprec.teaching import taught_by
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import read_shard_manifest
from cprec.text.tokenizer import load_tokenizer
from cprec.train import finetune as language_model
from cprec.train import trees
from cprec.train.config import FinetuneConfig, TinyModel
from cprec.train.finetune import tokens_of_pass
from cprec.train.folder import read_done
from cprec.train.trees import trees_of

NUM_ITEMS = 12


class Fixed(ScoringRecommender):
    """Gives every query the same scores."""

    name = "fixed"

    def __init__(self, split: Split, scores: Sequence[float]) -> None:
        self.catalogue, self._scores = split.catalogue, np.array(scores, dtype=float)

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        return np.tile(self._scores, (len(queries), 1))


def draw(
    split: Split, teachers: Sequence[Sequence[float]], histories: Sequence[Sequence[int]], number: int = 1, **more: Any
) -> np.ndarray:
    """Items drawn after histories by teachers with these scores; nothing came next."""
    made = [Fixed(split, scores) for scores in teachers]
    settings = {"came_next": np.full(len(histories), -1), "seed": 0} | more
    return teaching.drawn(made, split, "ring", Ragged.of(histories), number=number, **settings).items


def shares_drawn(split: Split, teachers: Sequence[Sequence[float]], history: Sequence[int]) -> np.ndarray:
    """How often each item is drawn after a history, of 4,000 times."""
    return np.bincount(draw(split, teachers, [history] * 4_000)[:, 0], minlength=NUM_ITEMS) / 4_000


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_chances_are_products_of_shares_of_the_best_score(ring: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "MOST", 4)
    first, second = [0.0] * NUM_ITEMS, [1.0] * NUM_ITEMS
    first[1:5], second[1:5] = [8, 4, 4, 2], [1, 1, 0.5, 2]  # shares 1, .5, .5, .25 and .5, .5, .25, 1
    found = shares_drawn(ring, [first, second], [7])
    assert found[1:5] == pytest.approx(np.array([0.5, 0.25, 0.125, 0.25]) / 1.125, abs=0.02)
    assert found.sum() == pytest.approx(found[1:5].sum()), "others are not among the best four"


def test_items_drawn_after_one_history_differ_and_each_is_drawn_from_those_left(ring: Split) -> None:
    scores = [0.0] * NUM_ITEMS
    scores[1:4] = [4.0, 2.0, 2.0]
    found = draw(ring, [scores], [[7]] * 4_000, number=3)
    assert all(len(set(row)) == 3 for row in found)
    pairs = {pair: np.mean((found[:, :2] == pair).all(1)) for pair in [(1, 2), (2, 1), (2, 3)]}
    # Ten others have the floor of one in a hundred: 4, 2, 2 of 8.36 first; 2 of 4.36 or 4 of 6.36 of what is left.
    total = 1 + 0.5 + 0.5 + 8 * teaching.FLOOR
    assert pairs[1, 2] == pytest.approx(1 / total * 0.5 / (total - 1), abs=0.02)
    assert pairs[2, 1] == pytest.approx(0.5 / total / (total - 0.5), abs=0.02)
    assert pairs[2, 3] == pytest.approx(0.5 / total * 0.5 / (total - 0.5), abs=0.02)


def test_an_item_that_a_teacher_knows_nothing_of_has_the_floor(ring: Split) -> None:
    scores = [0.0] * NUM_ITEMS
    scores[3] = 5.0
    found = shares_drawn(ring, [scores], [7])
    others = np.delete(found, [3, 7])
    assert found[3] == pytest.approx(1 / (1 + 10 * teaching.FLOOR), abs=0.02)
    assert others == pytest.approx(teaching.FLOOR / (1 + 10 * teaching.FLOOR), abs=0.01) and found[7] == 0


def test_what_is_known_is_not_drawn(ring: Split) -> None:
    """The items of the history, and the one that came next; where nothing else is left, nothing."""
    scores = np.arange(NUM_ITEMS) + 1.0
    found = draw(ring, [scores], [[11, 2]] * 500, came_next=np.full(500, 9), number=3)
    assert not np.isin(found, [11, 2, 9]).any() and len(np.unique(found)) == NUM_ITEMS - 3
    assert (draw(ring, [scores], [range(NUM_ITEMS)], number=2) == -1).all()
    few = draw(ring, [scores], [range(2, NUM_ITEMS)], number=50)[0]
    assert few.tolist()[:2] in ([0, 1], [1, 0]) and (few[2:] == -1).all() and len(few) == NUM_ITEMS


def test_draws_are_those_of_the_seed_whatever_the_batches(ring: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    histories, scores = [[row % NUM_ITEMS] for row in range(50)], [np.arange(NUM_ITEMS)]
    whole = draw(ring, scores, histories, number=3)
    monkeypatch.setattr(teaching, "BATCH", 7)
    assert np.array_equal(draw(ring, scores, histories, number=3), whole)
    assert not np.array_equal(draw(ring, scores, histories, number=3, seed=1), whole)


# ---- what becomes a branch -----------------------------------------------------------------------------------------


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
        documents="trees",
        teachers=("transition graph", "popularity"),
        num_train_epochs=0.5,
        max_length=128,
        bf16="false",
        eval_tokens=0,
        report_to=("none",),
    )


def branches(config: FinetuneConfig) -> list[tuple[list[int], int]]:
    """The branches of all trees: the items of the history, and the target."""
    shards, tokenizer = trees_of(config, taught_by(config)), load_tokenizer(f"{config.data}/tokenizer")
    assert shards.branches is not None
    out = []
    for first, size in zip(shards.column("offset"), shards.column("length"), strict=True):
        tokens, until = shards.tokens[first : first + size], shards.branches.until[first : first + size]
        for end in np.flatnonzero(tokens == tokenizer.eos_token_id):
            path = [place for place in range(end + 1) if until[place] > end]
            *history, target = tokenizer.decode(tokens[path].tolist()).splitlines()[2:]
            assert target.startswith("Next: thing ") and target.endswith("<eos>")
            items = [int(line.split("thing ")[1].removesuffix("<eos>")) for line in (*history, target)]
            out.append((items[:-1], items[-1]))
    return out


def of_users(config: FinetuneConfig) -> list[list[int]]:
    """Each user's training events."""
    split = read_split(config.data)
    train, rows = split.train, split.catalogue.rows_of("ring")
    assert rows[0] > 0
    return [(train.item[(train.user == user) & (train.item >= rows[0])] - rows[0]).tolist() for user in range(60)]


def test_after_every_training_event_hang_what_came_and_what_is_taught(config: FinetuneConfig) -> None:
    found, users = branches(replace(config, taught_targets=3)), of_users(config)
    prefixes = [items[: n + 1] for items in users for n in range(len(items))]
    came = [(items[:n], items[n]) for items in users for n in range(1, len(items))]
    assert sorted(history for history, _ in found) == sorted([*prefixes * 3, *(history for history, _ in came)])
    assert all(each in found for each in came)
    taught = list(found)
    for each in came:
        taught.remove(each)
    assert not any(each in came for each in taught), "what came next is not taught as well"
    last = [(history, target) for history, target in taught if history in users]
    follows = np.mean([target == (history[-1] + 1) % NUM_ITEMS for history, target in last])
    assert len(last) >= 180 and follows > 0.25, "chance has a twelfth"
    assert all(target not in history for history, target in taught)


def test_what_is_known_has_no_chance(ring: Split) -> None:
    made = [Fixed(ring, np.arange(NUM_ITEMS) + 1.0)]
    chosen = teaching.drawn(made, ring, "ring", Ragged.of([[11, 2], range(12)]), np.array([9, -1]), number=1, seed=0)
    assert set(chosen.among[0][chosen.chance[0] == 0]) == {11, 2, 9}
    assert chosen.chance.sum(1) == pytest.approx(np.array([1, 0])), "where all is known, nothing has one"


def test_a_user_who_knows_nearly_all_has_what_is_left(config: FinetuneConfig) -> None:
    """No branch, and no chance, of an item that is known."""
    all_of_them = replace(config, taught_targets=NUM_ITEMS)
    shards, found = trees_of(all_of_them, taught_by(all_of_them)), branches(all_of_them)
    assert shards.branches is not None and shards.branches.choices is not None
    assert np.isfinite(shards.branches.choices.chance).all()
    assert all(target not in history for history, target in found)
    longest = max(of_users(config), key=len)
    expected = sorted(set(range(NUM_ITEMS)) - set(longest))
    same = of_users(config).count(longest)
    assert sorted(target for history, target in found if history == longest) == sorted(expected * same)


def test_without_teachers_a_tree_has_the_examples_of_its_user(config: FinetuneConfig) -> None:
    came = [(items[:n], items[n]) for items in of_users(config) for n in range(1, len(items))]
    assert sorted(branches(replace(config, teachers=()))) == sorted(came)


def test_a_run_reads_its_trees_once_a_pass(config: FinetuneConfig) -> None:
    read = trees_of(config, taught_by(config))
    assert int(read.column("length").max()) <= config.max_length
    about = read_done(finetune(config))
    assert about is not None
    assert about["tokens"] == pytest.approx(0.5 * len(read.tokens), rel=0.02)
    assert len(about["trained_on"]) == 1, "the events that they learnt are those of the certified data"
    assert tokens_of_pass(config) == pytest.approx(len(read.tokens), rel=0.3)
    for few in (0, 5):
        plain = replace(config, teachers=(), max_documents=few)
        rows = sampled_rows(len(trees_of(plain, None)), few, config.seed)
        assert tokens_of_pass(plain) == trees_of(plain, None).column("length")[rows].sum()


def test_a_branch_reads_no_more_events_than_a_prompt(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here three."""

    def shown(folder: Path) -> dict[str, Any]:
        manifest = read_shard_manifest(folder)
        return manifest | {"about": manifest["about"] | {"max_history": 3}}

    number = len(branches(config))
    monkeypatch.setattr(trees, "read_shard_manifest", shown)
    found = branches(config)
    assert max(len(history) for history, _ in found) == 3 and len(found) == number
    assert all(target not in history for history, target in found)


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
    with pytest.raises(InputChanged, match="the code of the teachers"):
        finetune(config)
    assert json.loads(Path(config.output_dir, "run.json").read_text())["inputs"]["taught"] != "another"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": ("the graph",)}, "'the graph' cannot teach; these can: popularity"),
        ({"teachers": ("SASRec",)}, "'SASRec' cannot teach"),
        ({"teachers": ("EASE",), "documents": "users"}, "set documents=trees"),
        ({"teachers": ("EASE",), "max_documents": 5}, "max_documents=0"),
        ({"teachers": ("EASE",), "num_train_epochs": 0}, "nobody to teach"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 cannot read documents=trees"),
        ({"max_length": 20}, "max_length=20 has no room for an event with its branches"),
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
