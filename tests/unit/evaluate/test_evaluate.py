"""The evaluation stage on a tiny synthetic world: rankings, metrics, certificate, reuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec import lineup
from cprec.baselines.popularity import PopularityRecommender
from cprec.baselines.random import RandomRecommender
from cprec.data.config import SyntheticConfig
from cprec.data.dataset import read_manifest, read_split
from cprec.data.splits import Split
from cprec.errors import ConfigError, CPRecError, DataError, LeakageError
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.evaluate import Entrant, check_certificate, evaluate, protocol_of, rankings_path
from cprec.evaluate.questions import FULL, FULL_WITH_SEEN, NEW_ITEMS, SAMPLED, Questions, read_questions
from cprec.evaluate.tables import metrics_of
from cprec.recommender import Certificate, Ranking, RankingQuery, Recommender
from cprec.run import SCORES, baseline_entrants, evaluate_models
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "data"
    prepare(
        PrepareConfig(
            output_dir=str(folder),
            synthetic=SyntheticConfig(num_market_users=60, num_library_users=40, items_per_domain=60),
            pretrain_domains=("beauty", "garden", "kitchen", "sports", "toys"),
            target_domains=("books",),
            k_core=0,
            vocabulary_size=600,
            min_events=3,
            min_history=1,
            heldout_share=0.1,
        )
    )
    return folder


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture
def config(data: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(data=str(data), output_dir=str(tmp_path / "out"))


@pytest.fixture(scope="module")
def split(prepared: Path) -> Split:
    return read_split(prepared)


class Counting:
    """Passes queries on and counts them."""

    def __init__(self, recommender: Recommender) -> None:
        self.name, self._recommender, self.asked = "counting", recommender, 0

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        self.asked += len(queries)
        return self._recommender.rank(queries, k)


class Knowing:
    """Returns the targets it was told, first."""

    name = "knowing"

    def __init__(self, questions: Questions, score: float = 1.0) -> None:
        pairs = zip(questions.queries, questions.target, strict=True)
        self._answers = {query.query_id: target for query, target in pairs}
        self._score = score

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        return [Ranking(query.query_id, (self._answers[query.query_id],), (self._score,)) for query in queries]


def baseline(recommender: Recommender, name: str = "") -> Entrant:
    return Entrant(name=name or recommender.name, recommender=recommender, kind="baseline")


def model(recommender: Recommender, data: Path, name: str = "model", scores: str = SCORES) -> Entrant:
    """A model trained on what the certificate covers."""
    covered = json.loads((data / "certificate.json").read_text())["artifacts"]["shards/train"]
    return Entrant(
        name=name,
        recommender=recommender,
        kind="model",
        stochastic=True,
        trained_on=(covered,),
        identity="1",
        scores=scores,
    )


# ---- questions -------------------------------------------------------------------------------------------------------


UNIFORM = SAMPLED["uniform"]


def test_queries_ask_for_the_last_event_and_know_all_that_came_before(config: EvaluateConfig, split: Split) -> None:
    questions = read_questions(config, split, "books")
    log, catalogue = split.interactions, split.catalogue
    books = catalogue.domain_index("books")
    assert len(questions.queries) == len(questions.target) == len(questions.user) > 20
    for query, target, user in zip(questions.queries, questions.target, questions.user, strict=True):
        row = list(log.user_id).index(user)
        mine = log.item[(log.user == row) & (catalogue.domain[log.item] == books)]
        ids = [str(item) for item in catalogue.item_id[mine]]
        assert target == ids[-1]
        assert query.uncounted == set(ids[:-1]) and not query.exclude
        assert query.user == f"library/{user}"
        assert query.candidates is None


def test_candidates_are_the_target_and_items_outside_the_history_frozen_to_disk(
    config: EvaluateConfig, split: Split, data: Path
) -> None:
    questions = read_questions(config, split, "books")
    for protocol in SAMPLED.values():
        for query, full, target in zip(questions.of(protocol), questions.queries, questions.target, strict=True):
            assert query.candidates is not None and len(set(query.candidates)) == 20
            assert target in query.candidates and not set(query.candidates) & (full.uncounted - {target})
    frozen = data / "queries/books/candidates20_test_seed0.parquet"
    before = frozen.read_bytes()
    again = read_questions(config, split, "books")
    assert (
        again.candidates == questions.candidates and again.sha256 == questions.sha256 and frozen.read_bytes() == before
    )
    other = read_questions(replace(config, seed=1), split, "books")
    assert other.candidates["uniform"] != questions.candidates["uniform"]
    assert frozen.read_bytes() == before


def test_candidates_of_other_queries_are_refused(config: EvaluateConfig, split: Split, data: Path) -> None:
    read_questions(config, split, "books")
    frozen = data / "queries/books/candidates20_popularity_test_seed0.parquet"
    pq.write_table(pq.read_table(frozen).slice(1), frozen)
    with pytest.raises(DataError, match="holds candidates of other queries"):
        read_questions(config, split, "books")


def test_a_sample_of_queries_is_seeded_and_in_order(config: EvaluateConfig, split: Split) -> None:
    every = [query.query_id for query in read_questions(config, split, "books").queries]
    few = [query.query_id for query in read_questions(replace(config, max_queries=7), split, "books").queries]
    assert len(few) == 7 and few == [name for name in every if name in few]
    assert few == [query.query_id for query in read_questions(replace(config, max_queries=7), split, "books").queries]
    all_of_them = read_questions(replace(config, max_queries=10**6), split, "books").queries
    assert [query.query_id for query in all_of_them] == every


def test_a_domain_without_queries_is_named(config: EvaluateConfig, split: Split) -> None:
    with pytest.raises(ConfigError, match="name 'toys' in target_domains"):
        read_questions(config, split, "toys")


def test_queries_with_fewer_candidates_than_asked_for_are_counted(config: EvaluateConfig, split: Split) -> None:
    many = replace(config, num_candidates=53)
    questions = read_questions(many, split, "books")
    sizes = [len(mine) for mine in questions.candidates["uniform"]]
    few = [size for size in sizes if size < 53]
    assert few and max(sizes) <= 53
    (note,) = [note for note in questions.notes if "(uniform)" in note]
    assert f"for {len(few)} of {len(sizes)} queries ({min(few)} at least)" in note
    assert all(target in mine for target, mine in zip(questions.target, questions.candidates["uniform"], strict=True))
    assert "popularity" not in questions.candidates  # fewer items than that have training events
    assert read_questions(replace(config, num_candidates=20), split, "books").notes == []


# ---- results ---------------------------------------------------------------------------------------------------------


def test_results_have_intervals_and_paired_differences(config: EvaluateConfig, split: Split, data: Path) -> None:
    questions = read_questions(config, split, "books")
    entrants = [
        baseline(RandomRecommender(split.catalogue)),
        baseline(PopularityRecommender(split)),
        model(Knowing(questions), data, "knowing"),
        model(PopularityRecommender(split), data, "popular model"),
        Entrant(name="oracle", recommender=Knowing(questions), kind="bound"),
    ]
    result = evaluate(config, split, "books", entrants)
    assert result["certified"] and result["num_items"] == len(split.catalogue.rows_of("books"))
    assert result["num_queries"] == len(questions.queries)
    assert list(result["arms"]) == [entrant.name for entrant in entrants]
    for arm in result["arms"].values():
        for cells in (arm, arm["candidates20"]):
            for metric in ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr"):
                assert 0 <= cells[metric]["low"] <= cells[metric]["mean"] <= cells[metric]["high"] <= 1
    assert result["arms"]["knowing"]["ndcg@10"] == {"mean": 1, "low": 1, "high": 1}
    chance = result["arms"]["random"]["candidates20"]["recall@1"]
    assert chance["low"] <= 0.05 <= chance["high"]
    pairs = {(line["a"], line["b"]): line for line in result["differences"]}
    assert list(pairs) == [
        ("popular model", "popularity"),
        ("popular model", "knowing"),
        ("knowing", "popularity"),
    ]
    assert pairs["popular model", "popularity"]["mean"] == pairs["popular model", "popularity"]["low"] == 0
    expected = 1 - result["arms"]["popularity"]["ndcg@10"]["mean"]
    assert pairs["knowing", "popularity"]["mean"] == pytest.approx(expected)
    assert pairs["knowing", "popularity"]["low"] > 0


def test_means_can_be_made_again_from_what_is_saved(config: EvaluateConfig, split: Split) -> None:
    result = evaluate(config, split, "books", [baseline(PopularityRecommender(split))])
    questions = read_questions(config, split, "books")
    rankings = pq.read_table(rankings_path(config, "books", "popularity", FULL))
    assert rankings.column_names == ["query_id", "user_id", "domain", "rank", "item_id", "score", "seen"]
    metrics = pq.read_table(Path(config.output_dir) / "books" / "metrics.parquet")
    assert set(metrics["protocol"].to_pylist()) - {NEW_ITEMS} == {FULL, FULL_WITH_SEEN, *SAMPLED.values()}
    full = metrics.filter(pa.compute.equal(metrics["protocol"], FULL))
    for name, values in metrics_of(rankings, questions, config.k).items():
        np.testing.assert_array_equal(full[name].to_numpy(), values)
        if "@" in name:
            assert values.mean() == result["arms"]["popularity"][name]["mean"]


class Certified(Knowing):
    """Every other list is proven; the others miss the target."""

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        out = []
        for number, ranking in enumerate(super().rank(queries, k)):
            proof = Certificate(gap=0.0 if number % 2 else 0.5, expanded=7)
            items = ranking.item_ids if number % 2 else (self._other[ranking.query_id],)
            out.append(replace(ranking, item_ids=items, certificate=proof))
        return out

    def __init__(self, questions: Questions) -> None:
        super().__init__(questions)
        self._other = {
            query.query_id: next(item for item in query.candidates or () if item != target)
            for query, target in zip(questions.of(UNIFORM), questions.target, strict=True)
        }


class Silent(Knowing):
    """Writes a candidate for the first half of the queries, nothing for the others."""

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        half = len(queries) // 2
        return [r if n < half else replace(r, item_ids=(), scores=()) for n, r in enumerate(super().rank(queries, k))]


def test_what_is_proven_and_what_a_beam_found_is_told(config: EvaluateConfig, split: Split, data: Path) -> None:
    questions = read_questions(config, split, "books")
    exact = Counting(Knowing(questions))
    entrant = replace(model(Certified(questions), data), modes={"exact": exact, "generate": Silent(questions)})
    beam = replace(config, mode="beam", generate=True)
    arm = evaluate(beam, split, "books", [entrant])["arms"]["model"]
    number = len(questions.queries)
    assert arm["proven"] == (number // 2) / number
    assert (arm["mean_gap"], arm["expanded"]) == (0.5, 7)
    assert arm["found_of_exact"]["num_queries"] == min(100, number) == exact.asked
    assert 0 < arm["found_of_exact"]["share"] < 1
    free = arm["generate"]
    assert free["valid_ratio"] == free["hr@1-all"] == (number // 2) / number
    assert free["hr@1-valid"] == 1
    assert evaluate(beam, split, "books", [entrant])["arms"]["model"] == arm
    assert exact.asked == min(100, number)  # what is saved needs no model


def test_metrics_from_rankings_count_ties_in_expectation(config: EvaluateConfig, split: Split) -> None:
    questions = read_questions(replace(config, max_queries=3), split, "books")
    first, second, third = (query.query_id for query in questions.queries)
    a, b = questions.target[0], questions.target[1]
    others = [str(item) for item in split.catalogue.item_id[split.catalogue.rows_of("books")] if item not in (a, b)]
    rankings = pa.table(
        {
            "query_id": [first, first, first, second, second, third],
            "item_id": [others[0], a, others[1], others[0], b, others[0]],
            "score": [3.0, 2.0, 2.0, 3.0, 2.0, 9.0],
            "seen": [False] * 6,
        }
    )
    columns = metrics_of(rankings, questions, 10)
    assert columns["num_better"].tolist() == [1, 1, 0] and columns["num_tied"].tolist() == [2, 1, 0]
    np.testing.assert_allclose(columns["mrr"], [(1 / 2 + 1 / 3) / 2, 1 / 2, 0])
    assert columns["recall@1"].tolist() == [0, 0, 0] and columns["recall@5"].tolist() == [1, 1, 0]


def test_saved_rankings_are_reused_only_for_the_same_question_and_recommender(
    config: EvaluateConfig, split: Split, data: Path
) -> None:
    counting = Counting(PopularityRecommender(split))
    entrant = model(counting, data)
    first = evaluate(config, split, "books", [entrant])
    asked = counting.asked
    every = len(read_questions(config, split, "books").of(NEW_ITEMS)) + 3 * first["num_queries"]
    assert asked == every  # the full catalogue once, with and without seen items; two sets of candidates; new items
    assert evaluate(config, split, "books", [entrant]) == first
    assert counting.asked == asked
    for changed, other in (
        (config, replace(entrant, identity="2")),
        (replace(config, k=11), replace(entrant, identity="2")),
        (replace(config, seed=4), entrant),
    ):
        before = counting.asked
        evaluate(changed, split, "books", [other])
        assert counting.asked == before + every
    before = counting.asked
    evaluate(replace(config, seed=4, exclude_seen=False), split, "books", [other])
    assert counting.asked == before, "seen items are in the saved rankings: nothing is ranked again"
    manifest = data / "dataset.json"
    manifest.write_text(manifest.read_text() + "\n")
    before = counting.asked
    evaluate(replace(config, seed=4), split, "books", [entrant])
    assert counting.asked == before + every


def test_an_interrupted_arm_leaves_nothing_and_finished_ones_stay(config: EvaluateConfig, split: Split) -> None:
    class Stopping(Counting):
        def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
            raise KeyboardInterrupt

    popular = Counting(PopularityRecommender(split))
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, split, "books", [baseline(popular), baseline(Stopping(popular), "stopping")])
    asked = popular.asked
    written = {path.name for path in (Path(config.output_dir) / "books").iterdir()}
    assert {f"counting.{FULL}.parquet", *(f"counting.{name}.parquet" for name in SAMPLED.values())} <= written
    assert not any(name.startswith(("stopping", "metrics")) for name in written)
    evaluate(config, split, "books", [baseline(popular)])
    assert popular.asked == asked


def test_saved_rankings_are_scored_again_without_torch_and_examples_show_the_best_baseline(
    config: EvaluateConfig,
) -> None:
    """Baselines alone, a trained one among them; then the same in a process that must not load torch."""
    settings = {"data": config.data, "output_dir": config.output_dir, "baselines": ("popularity", "ItemKNN", "SASRec")}
    first = evaluate_models(EvaluateConfig(**settings))
    assert first["domains"]["books"]["arms"]["SASRec"]["cost"]["num_parameters"] > 10_000
    again = (
        "import sys\n"
        "from cprec.evaluate.evaluate import EvaluateConfig\n"
        "from cprec.run import baseline_entrants, evaluate_models\n"
        f"evaluate_models(EvaluateConfig(**{settings!r}))\n"
        "assert not {'torch', 'ibis', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((Path(config.output_dir) / "report.json").read_text()) == json.loads(json.dumps(first))
    arms = first["domains"]["books"]["arms"]
    best = max(arms, key=lambda name: arms[name]["ndcg@10"]["mean"])
    assert f"{best} recommends:" in done.stdout


def test_rankings_of_a_model_that_is_gone_are_scored_again(config: EvaluateConfig, split: Split, data: Path) -> None:
    first = evaluate(config, split, "books", [model(PopularityRecommender(split), data)])
    gone = replace(config, baselines=("random",), models={"model": "nowhere"})
    again = evaluate_models(gone)["domains"]["books"]
    assert again["certified"]
    assert again["arms"]["model"]["ndcg@10"] == first["arms"]["model"]["ndcg@10"]
    with pytest.raises(
        ConfigError, match=r"models\.model=nowhere holds no weights, and its saved rankings answer other"
    ):
        evaluate_models(replace(gone, k=7))
    evaluate(config, split, "books", [model(PopularityRecommender(split), data, scores="of whole titles")])
    with pytest.raises(ConfigError, match=r"before the items of a title shared its probability need the model"):
        evaluate_models(gone)
    with pytest.raises(ConfigError, match=r"models\.other=nowhere: no finished model"):
        evaluate_models(replace(gone, models={"other": "nowhere"}))


def test_damaged_files_are_named_or_made_anew(
    config: EvaluateConfig, split: Split, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entrants = [baseline(PopularityRecommender(split))]
    whole = evaluate(config, split, "books", entrants)

    def halve(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    rankings = rankings_path(config, "books", "popularity", FULL)
    halve(rankings)
    ndcg = evaluate(config, split, "books", entrants)["arms"]["popularity"]["ndcg@10"]
    assert ndcg == whole["arms"]["popularity"]["ndcg@10"]
    assert f"{rankings} cannot be read" in capsys.readouterr().err
    for name, remedy in (("candidates20_test_seed0", "delete it, and it is drawn anew"), ("test", "prepare the data")):
        path = data / "queries" / "books" / f"{name}.parquet"
        halve(path)
        with pytest.raises(DataError, match=f"{name}.parquet cannot be read .*{remedy}"):
            evaluate(replace(config, uncertified=True), split, "books", entrants)


def test_nothing_left_to_rank_with_is_an_error(config: EvaluateConfig, split: Split) -> None:
    def unfit() -> None:
        raise ConfigError("too many items")

    for entrants in ([], [replace(baseline(PopularityRecommender(split)), open=unfit)]):
        with pytest.raises(ConfigError, match="books: nothing is left to rank with"):
            evaluate(config, split, "books", entrants)


def test_seeds_of_one_model_stand_together_in_differences(config: EvaluateConfig, split: Split, data: Path) -> None:
    seeds = [model(RandomRecommender(split.catalogue, seed=n), data, f"x (seed {n})") for n in range(2)]
    arms = [baseline(PopularityRecommender(split)), *seeds]
    found = evaluate(config, split, "books", arms)["differences"]
    assert [(line["a"], line["b"]) for line in found] == [("x (2 seeds)", "popularity")]
    json.dumps(found, allow_nan=False)
    rows = pq.read_table(Path(config.output_dir) / "books" / "metrics.parquet").to_pylist()
    assert {(row["arm"], row["stochastic"]) for row in rows} == {
        ("popularity", False),
        ("x (seed 0)", True),
        ("x (seed 1)", True),
    }
    twins = [baseline(PopularityRecommender(split), name) for name in ("one", "two")]
    (line,) = evaluate(config, split, "books", twins)["differences"]
    assert line["p_value"] == 1 and line["detectable"] is None


def test_tables_of_many_pairs_draw_more_flips(
    config: EvaluateConfig, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.evaluate.statistics.PERMUTATIONS", 9)  # as if 3 pairs were many: 100 flips for each
    knowing = baseline(Knowing(read_questions(config, split, "books")))
    others = [baseline(PopularityRecommender(split), name) for name in ("one", "two")]
    found = evaluate(config, split, "books", [knowing, *others])["differences"]
    assert [line["p_value"] for line in found] == [1 / 301] * 2


def test_an_interrupted_evaluation_leaves_no_protocol_beside_metrics_of_another(
    config: EvaluateConfig, split: Split
) -> None:
    entrants = [baseline(PopularityRecommender(split))]
    evaluate(config, split, "books", entrants)
    protocol = Path(config.output_dir) / "books" / "protocol.json"
    before = protocol.read_text()
    broken = baseline(Knowing(read_questions(config, split, "books"), score=float("nan")))
    with pytest.raises(CPRecError, match="not finite"):
        evaluate(replace(config, k=7), split, "books", [*entrants, broken])
    assert protocol.read_text() == before and json.loads(before)["k"] == 10


def test_the_seed_decides_random_and_seeds_train_what_is_trained(config: EvaluateConfig) -> None:
    lists = []
    for number, changed in enumerate(({"seed": 0}, {"seed": 3}, {"seed": 0, "seeds": (3,)})):
        output = f"{config.output_dir}{number}"
        mine = replace(config, output_dir=output, baselines=("random",), **changed)
        evaluate_models(mine)
        lists.append(pq.read_table(rankings_path(mine, "books", "random", FULL))["item_id"].to_pylist())
    assert lists[0] == lists[2] != lists[1]


def test_a_trained_baseline_of_other_data_learns_elsewhere(
    config: EvaluateConfig, split: Split, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder holds what it learnt from the data before, and it would be left out of the table."""
    folders: list[Path] = []

    class Settings:
        def make(self, split: Split, domain: str, *, seed: int, folder: Path) -> Recommender:
            folders.append(folder)
            return PopularityRecommender(split)

        def __repr__(self) -> str:
            return "settings"

    monkeypatch.setattr(lineup, "settings_of", lambda name, changed=None: Settings())
    mine = replace(config, baselines=("SASRec",))

    def open_it() -> None:
        (entrant,) = baseline_entrants(mine, split, "books")
        entrant.open()

    open_it()
    open_it()
    manifest = data / "dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"note": "prepared anew"}))
    open_it()
    assert folders[0] == folders[1] != folders[2] and folders[2].parent == folders[0].parent


def test_what_an_arm_opened_is_let_go_before_the_next_is_opened(
    config: EvaluateConfig, split: Split, data: Path
) -> None:
    happened: list[str] = []
    entrants = [
        replace(
            baseline(Counting(PopularityRecommender(split)), name),
            open=partial(happened.append, f"open {name}"),
            close=partial(happened.append, f"close {name}"),
        )
        for name in ("one", "two")
    ]
    evaluate(config, split, "books", entrants)
    assert [event for event, _ in groupby(happened)] == ["open one", "close one", "open two", "close two"]


def test_a_baseline_that_cannot_be_made_is_left_out_by_name(
    config: EvaluateConfig, split: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> None:
        raise ConfigError("too many items")

    entrants = [
        baseline(PopularityRecommender(split)),
        replace(baseline(RandomRecommender(split.catalogue)), open=too_large),
    ]
    assert list(evaluate(config, split, "books", entrants)["arms"]) == ["popularity"]
    assert "random is left out: too many items" in capsys.readouterr().err


def test_two_arms_of_one_name_are_refused(config: EvaluateConfig, split: Split) -> None:
    entrants = [baseline(PopularityRecommender(split)), baseline(PopularityRecommender(split), "Popularity")]
    with pytest.raises(ConfigError, match="two arms are called 'popularity' and 'Popularity'"):
        evaluate(config, split, "books", entrants)


def test_a_score_that_is_not_finite_is_named(config: EvaluateConfig, split: Split) -> None:
    broken = Knowing(read_questions(config, split, "books"), score=float("nan"))
    with pytest.raises(CPRecError, match="knowing gave query 'books/library/.*' a score that is not finite"):
        evaluate(config, split, "books", [baseline(broken)])


# ---- certificate -----------------------------------------------------------------------------------------------------


def changed_certificate(data: Path, **fields: object) -> None:
    path = data / "certificate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def judged(split: Split, data: Path) -> list[Entrant]:
    return [model(PopularityRecommender(split), data, "judged")]


def test_a_covering_certificate_is_accepted(config: EvaluateConfig, judged: list[Entrant]) -> None:
    assert check_certificate(config, "books", judged)


def test_a_missing_certificate_is_refused(config: EvaluateConfig, judged: list[Entrant], data: Path) -> None:
    (data / "certificate.json").unlink()
    with pytest.raises(LeakageError, match="certificate.json is missing: make it with `cprec audit"):
        check_certificate(config, "books", judged)
    assert not check_certificate(replace(config, uncertified=True), "books", judged)


def test_leaks_are_named(config: EvaluateConfig, judged: list[Entrant], data: Path) -> None:
    leak = {"name": "shards/train: no held-out event", "checked": 9, "violations": 1, "examples": []}
    changed_certificate(data, clean=False, properties=[leak])
    with pytest.raises(LeakageError, match="found leaks: shards/train: no held-out event"):
        check_certificate(config, "books", judged)


def test_other_training_data_is_refused(config: EvaluateConfig, judged: list[Entrant]) -> None:
    foreign = replace(judged[0], trained_on=(*judged[0].trained_on, "f" * 64))
    with pytest.raises(LeakageError, match="does not cover the data that judged was trained on"):
        check_certificate(config, "books", [foreign])
    with pytest.raises(LeakageError, match="judged does not say what data it was trained on"):
        check_certificate(config, "books", [replace(judged[0], trained_on=())])


def test_other_queries_are_refused(config: EvaluateConfig, judged: list[Entrant], data: Path) -> None:
    path = data / "queries/books/test.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(LeakageError, match="is not the file that"):
        check_certificate(config, "books", judged)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"artifacts": 3}', '{"artifacts": {"a": "'])
def test_a_broken_certificate_is_named(config: EvaluateConfig, judged: list[Entrant], data: Path, text: str) -> None:
    (data / "certificate.json").write_text(text)
    with pytest.raises(DataError, match="certificate.json is no certificate: make it anew"):
        check_certificate(config, "books", judged)


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"k": 4}, "k=4 must be at least 5"), ({"num_candidates": 1}, "num_candidates=1"), ({"max_queries": -1}, "-1")],
)
def test_impossible_settings_are_refused(setting: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(data="d", output_dir="o", **setting)


def test_the_protocol_says_what_numbers_depend_on(config: EvaluateConfig, split: Split, data: Path) -> None:
    lines = protocol_of(replace(config, exclude_seen=False, max_queries=50), split, read_manifest(data))
    assert "leave-one-out" in lines["split"]
    assert lines["seen items"].startswith("may be recommended again in the main table")
    assert "at most 50 a domain" in lines["queries"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"baselines": ("tea",)}, "no 'tea'"), ({"tuned": "gone.json"}, "tuned='gone.json' does not")],
)
def test_what_the_last_stage_of_a_run_refuses_is_refused_before_the_first(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from cprec.recipes.demo import demo
    from cprec.run import run

    recipe = demo(output_dir=str(tmp_path / "demo"))
    with pytest.raises(ConfigError, match=message):
        run(replace(recipe, evaluate=replace(recipe.evaluate, **changes)))
    assert not (tmp_path / "demo").exists()
