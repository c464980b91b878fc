"""The evaluation stage on a tiny synthetic world: rankings, metrics, certificate, reuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec import lineup
from cprec.baselines.popularity import PopularityRecommender
from cprec.baselines.random import RandomRecommender
from cprec.card import CARD, read_front_matter
from cprec.data.config import SyntheticConfig, TableSource
from cprec.data.dataset import read_split
from cprec.data.splits import Split
from cprec.entrants import SCORES, baseline_entrants, check_baselines, model_entrants
from cprec.errors import ConfigError, CPRecError, DataError, InputChanged, LeakageError, Unsuitable
from cprec.evaluate.asking import Entrant, Opened
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.coverage import check_certificate
from cprec.evaluate.evaluate import evaluate, protocol_of
from cprec.evaluate.questions import SAMPLED, Protocol, Questions, read_questions
from cprec.evaluate.rankings import rankings_path
from cprec.evaluate.report_page import markdown_table, ranking_lines
from cprec.evaluate.results import (
    CANDIDATES_UNIFORM,
    FULL,
    FULL_WITH_SEEN,
    NEW_ITEMS,
    FoundOfExact,
    Interval,
    Metric,
    Proofs,
    read_report,
)
from cprec.evaluate.slices import events_of_users
from cprec.evaluate.tables import metrics_of
from cprec.provenance import FileHashes, file_sha256
from cprec.rank.config import RankConfig
from cprec.recommender import Proof, Ranking, RankingQuery, Recommender
from cprec.run import evaluate_models
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.trained import Trained


@pytest.fixture(scope="module")
def prepared(write_world: Callable[..., tuple[TableSource, ...]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of the synthetic world, one of each platform."""
    folder = tmp_path_factory.mktemp("evaluate")
    world = SyntheticConfig(num_market_users=60, num_library_users=40, items_per_domain=60)
    prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=write_world(folder, world, "books", "toys"),
            pretrain_domains=("toys",),
            target_domains=("books",),
            k_core=0,
            vocabulary_size=300,
            min_events=3,
            min_history=1,
            heldout_share=0.1,
        )
    )
    return folder / "data"


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture
def config(data: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(data=str(data), output_dir=str(tmp_path / "out"))


@pytest.fixture(scope="module")
def split(prepared: Path) -> Split:
    return read_split(prepared)


@pytest.fixture
def quick_sasrec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained systems are small, and see the data once."""
    small = {"num_epochs": 1, "min_steps": 0, "hidden_size": 16, "num_heads": 1, "num_blocks": 1}
    of_name = lineup.settings_of

    def settings_of(name: str, changed: Mapping[str, Any] | None = None) -> Any:
        return of_name(name, small if lineup.is_trained(name) else changed)

    monkeypatch.setattr(lineup, "settings_of", settings_of)


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
    opened = Opened(recommender=recommender, scores_once=True)
    return Entrant(name=name or recommender.name, kind="baseline", open=lambda: opened)


def model(recommender: Recommender, data: Path, name: str = "model", **identity: Any) -> Entrant:
    """A model trained on what the certificate covers."""
    covered = json.loads((data / "certificate.json").read_text())["artifacts"]["shards/train"]
    return Entrant(
        name=name,
        kind="model",
        open=lambda: Opened(recommender=recommender),
        identity={"model": "1", **identity},
        stochastic=True,
        trained_on=(covered,),
    )


def questions_of(config: EvaluateConfig, split: Split, domain: str = "books") -> Questions:
    """What `evaluate` asks."""
    asked = {name: getattr(config, name) for name in ("max_queries", "num_candidates", "seed")}
    return read_questions(config.data, split, domain, config.part, **asked)


def protocol_named(questions: Questions, name: str) -> Protocol:
    return next(protocol for protocol in questions.protocols(generate=True) if protocol.name == name)


# ---- questions -------------------------------------------------------------------------------------------------------


def test_queries_ask_for_the_last_event_and_know_all_that_came_before(config: EvaluateConfig, split: Split) -> None:
    questions = questions_of(config, split)
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
    questions = questions_of(config, split)
    for protocol in SAMPLED.values():
        sampled = protocol_named(questions, protocol).queries
        for query, full, target in zip(sampled, questions.queries, questions.target, strict=True):
            assert query.candidates is not None and len(set(query.candidates)) == 20
            assert target in query.candidates and not set(query.candidates) & (full.uncounted - {target})
    frozen = data / "queries/books/candidates20_test_seed0.parquet"
    before = frozen.read_bytes()
    again = questions_of(config, split)
    assert (
        again.candidates == questions.candidates and again.sha256 == questions.sha256 and frozen.read_bytes() == before
    )
    other = questions_of(replace(config, seed=1), split)
    assert other.candidates["uniform"] != questions.candidates["uniform"]
    assert frozen.read_bytes() == before


def test_candidates_of_other_queries_are_refused(config: EvaluateConfig, split: Split, data: Path) -> None:
    questions_of(config, split)
    frozen = data / "queries/books/candidates20_popularity_test_seed0.parquet"
    pq.write_table(pq.read_table(frozen).slice(1), frozen)
    with pytest.raises(DataError, match="holds candidates of other queries"):
        questions_of(config, split)


def test_a_sample_of_queries_is_seeded_and_in_order(config: EvaluateConfig, split: Split) -> None:
    every = [query.query_id for query in questions_of(config, split).queries]
    few = [query.query_id for query in questions_of(replace(config, max_queries=7), split).queries]
    assert len(few) == 7 and few == [name for name in every if name in few]
    assert few == [query.query_id for query in questions_of(replace(config, max_queries=7), split).queries]
    all_of_them = questions_of(replace(config, max_queries=10**6), split).queries
    assert [query.query_id for query in all_of_them] == every


def test_a_domain_without_queries_is_named(config: EvaluateConfig, split: Split) -> None:
    with pytest.raises(ConfigError, match="name 'toys' in target_domains"):
        questions_of(config, split, "toys")


def test_queries_with_fewer_candidates_than_asked_for_are_counted(config: EvaluateConfig, split: Split) -> None:
    many = replace(config, num_candidates=53)
    questions = questions_of(many, split)
    sizes = [len(mine) for mine in questions.candidates["uniform"]]
    few = [size for size in sizes if size < 53]
    assert few and max(sizes) <= 53
    (note,) = [note for note in questions.notes if "(uniform)" in note]
    assert f"for {len(few)} of {len(sizes)} queries ({min(few)} at least)" in note
    assert all(target in mine for target, mine in zip(questions.target, questions.candidates["uniform"], strict=True))
    assert "popularity" not in questions.candidates  # fewer items than that have training events
    assert questions_of(replace(config, num_candidates=20), split).notes == []


# ---- results ---------------------------------------------------------------------------------------------------------


def test_results_have_intervals_and_paired_differences(config: EvaluateConfig, split: Split, data: Path) -> None:
    questions = questions_of(config, split)
    entrants = [
        baseline(RandomRecommender(split.catalogue)),
        baseline(PopularityRecommender(split)),
        model(Knowing(questions), data, "knowing"),
        model(PopularityRecommender(split), data, "popular model"),
        replace(baseline(Knowing(questions), "oracle"), kind="bound"),
    ]
    result = evaluate(config, split, "books", entrants)
    assert result.certified and result.num_items == len(split.catalogue.rows_of("books"))
    assert result.num_queries == len(questions.queries)
    assert list(result.arms) == [entrant.name for entrant in entrants]
    for arm in result.arms.values():
        for pool in (FULL, CANDIDATES_UNIFORM):
            for name, k in (("recall", 1), ("recall", 5), ("recall", 10), ("ndcg", 5), ("ndcg", 10), ("mrr", None)):
                cell = arm.metrics[Metric(name, k, pool)]
                assert 0 <= cell.low <= cell.mean <= cell.high <= 1
    assert result.main == Metric("ndcg", 10, FULL)
    assert result.arms["knowing"].metrics[result.main] == Interval(1, 1, 1)
    chance = result.arms["random"].metrics[Metric("recall", 1, CANDIDATES_UNIFORM)]
    assert chance.low <= 0.05 <= chance.high
    pairs = {(line.a, line.b): line.test for line in result.differences}
    assert list(pairs) == [
        ("popular model", "popularity"),
        ("popular model", "knowing"),
        ("knowing", "popularity"),
    ]
    assert pairs["popular model", "popularity"].mean == pairs["popular model", "popularity"].low == 0
    expected = 1 - result.arms["popularity"].metrics[result.main].mean
    assert pairs["knowing", "popularity"].mean == pytest.approx(expected)
    assert pairs["knowing", "popularity"].low > 0


def test_means_can_be_made_again_from_what_is_saved(config: EvaluateConfig, split: Split) -> None:
    result = evaluate(config, split, "books", [baseline(PopularityRecommender(split))])
    questions = questions_of(config, split)
    rankings = pq.read_table(rankings_path(config.output_dir, "books", "popularity", FULL))
    assert rankings.column_names == ["query_id", "user_id", "domain", "rank", "item_id", "score", "seen"]
    metrics = pq.read_table(Path(config.output_dir) / "books" / "metrics.parquet")
    assert set(metrics["protocol"].to_pylist()) - {NEW_ITEMS} == {FULL, FULL_WITH_SEEN, *SAMPLED.values()}
    asked = pq.read_table(Path(config.output_dir) / "books" / "queries.parquet")
    assert asked["user events"].to_pylist() == events_of_users(split, questions.queries).tolist()
    full = metrics.filter(pa.compute.equal(metrics["protocol"], FULL))
    for name, values in metrics_of(rankings, protocol_named(questions, FULL), config.k, FULL).items():
        np.testing.assert_array_equal(full[name].to_numpy(), values)
        if "@" in name:
            assert values.mean() == result.arms["popularity"].metrics[Metric.of(name, FULL)].mean


class Certified(Knowing):
    """Every other list is proven; the others miss the target."""

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        out = []
        for number, ranking in enumerate(super().rank(queries, k)):
            proof = Proof(gap=0.0 if number % 2 else 0.5, expanded=7)
            items = ranking.item_ids if number % 2 else (self._other[ranking.query_id],)
            out.append(replace(ranking, item_ids=items, proof=proof))
        return out

    def __init__(self, questions: Questions) -> None:
        super().__init__(questions)
        self._other = {
            query.query_id: next(item for item in query.candidates or () if item != target)
            for query, target in zip(
                protocol_named(questions, CANDIDATES_UNIFORM).queries, questions.target, strict=True
            )
        }


class Silent(Knowing):
    """Writes a candidate for the first half of the queries, nothing for the others."""

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        half = len(queries) // 2
        return [r if n < half else replace(r, item_ids=(), scores=()) for n, r in enumerate(super().rank(queries, k))]


def test_what_is_proven_and_what_a_beam_found_is_told(config: EvaluateConfig, split: Split, data: Path) -> None:
    questions = questions_of(config, split)
    exact = Counting(Knowing(questions))
    modes = {"exact": exact.rank, "generate": Silent(questions).rank}
    opened = Opened(recommender=Certified(questions), modes=modes)
    entrant = replace(model(exact, data), open=lambda: opened, beam=True)
    free = replace(config, generate=True)
    arm = evaluate(free, split, "books", [entrant]).arms["model"]
    number = len(questions.queries)
    assert arm.proofs == Proofs(proven=(number // 2) / number, mean_gap=0.5, expanded=7)
    assert isinstance(arm.found_of_exact, FoundOfExact) and 0 < arm.found_of_exact.share < 1
    assert arm.found_of_exact.num_queries == min(100, number) == exact.asked
    assert arm.generated is not None
    assert arm.generated.valid_ratio == arm.generated.hit_rate_all == (number // 2) / number
    assert arm.generated.hit_rate_valid == 1
    assert evaluate(free, split, "books", [entrant]).arms["model"] == arm
    assert exact.asked == min(100, number)  # what is saved needs no model


def test_a_baseline_that_writes_freely_is_asked_to(config: EvaluateConfig, split: Split, data: Path) -> None:
    questions = questions_of(config, split)
    opened = Opened(recommender=Knowing(questions), modes={"generate": Silent(questions).rank})
    free = replace(config, generate=True)
    entrants = [Entrant(name=name, kind="baseline", open=lambda: opened, writes=name == "a") for name in ("a", "b")]
    result = evaluate(free, split, "books", entrants)
    number, found = len(questions.queries), result.arms["a"].generated
    assert found is not None and result.arms["b"].generated is None
    (line,) = (line for line in ranking_lines(result) if "freely" in line)
    share = number // 2 / number
    assert line == (
        f"a, writing freely for {number} queries: ValidRatio {share:.3f}, HR@1-all {share:.4f}, HR@1-valid 1.0000"
    )


def test_metrics_from_rankings_count_ties_in_expectation(config: EvaluateConfig, split: Split) -> None:
    questions = questions_of(replace(config, max_queries=3), split)
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
    columns = metrics_of(rankings, protocol_named(questions, FULL), 10, FULL)
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
    every = first.pools[NEW_ITEMS].num_queries + 3 * first.num_queries
    assert asked == every  # the full catalogue once, with and without seen items; two sets of candidates; new items
    assert evaluate(config, split, "books", [entrant]) == first
    assert counting.asked == asked
    for changed, other in (
        (config, replace(entrant, identity={"model": "2"})),
        (replace(config, k=11), replace(entrant, identity={"model": "2"})),
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
    evaluate(replace(config, seed=4, uncertified=True), split, "books", [entrant])
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


@pytest.mark.slow
def test_saved_rankings_are_scored_again_without_torch_and_examples_show_the_best_baseline(
    config: EvaluateConfig, quick_sasrec: None
) -> None:
    """Baselines alone, a trained one among them; then the same in a process that must not load torch."""
    settings = {"data": config.data, "output_dir": config.output_dir, "baselines": ("popularity", "ItemKNN", "SASRec")}
    first = evaluate_models(EvaluateConfig(**settings))
    assert (first.domains["books"].arms["SASRec"].cost.num_parameters or 0) > 1_000
    again = (
        "import sys\n"
        "from cprec.evaluate.config import EvaluateConfig\n"
        "from cprec.run import evaluate_models\n"
        f"evaluate_models(EvaluateConfig(**{settings!r}))\n"
        "assert not {'torch', 'ibis', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_report(Path(config.output_dir) / "report.json") == first
    best = first.domains["books"].best()
    assert best is not None and f"{best.name} recommends:" in done.stdout


RULE = {"rank": asdict(RankConfig()), "scores": SCORES}


def test_rankings_of_a_model_that_is_gone_are_scored_again(config: EvaluateConfig, split: Split, data: Path) -> None:
    first = evaluate(config, split, "books", [model(PopularityRecommender(split), data, **RULE)])
    gone = replace(config, baselines=("random",), models={"model": "nowhere"})
    again = evaluate_models(gone).domains["books"]
    assert again.certified and again.unseen is None  # nothing was pre-trained
    assert again.arms["model"].metrics == first.arms["model"].metrics
    for changed in (replace(gone, k=7), replace(gone, rank=RankConfig(beam_width=3))):
        with pytest.raises(ConfigError, match=r"models\.model=nowhere holds no weights, and its saved rankings answer"):
            evaluate_models(changed)
    of_titles = {**RULE, "scores": "of whole titles"}
    evaluate(config, split, "books", [model(PopularityRecommender(split), data, **of_titles)])
    with pytest.raises(ConfigError, match=r"before the items of a title shared its probability need the model"):
        evaluate_models(gone)
    with pytest.raises(ConfigError, match=r"models\.other=nowhere: no finished model"):
        evaluate_models(replace(gone, models={"other": "nowhere"}))


def test_results_stand_in_the_card_of_the_model(config: EvaluateConfig, split: Split, data: Path) -> None:
    """In the text and in the metadata, equal to those of the report; the card of no other folder is touched."""
    evaluate(config, split, "books", [model(PopularityRecommender(split), data, **RULE)])
    folder = Path(config.output_dir, "folder")
    folder.mkdir()
    covered = json.loads((data / "certificate.json").read_text())["artifacts"]["shards/train"]
    about = {"trained_on": [covered], "num_parameters": 1, "tokens": 1, "seconds": 1.0}
    (folder / "cprec.json").write_text(json.dumps(about))
    (folder / "log.jsonl").touch()
    (folder / CARD).write_text("# A model\n\n## Results\n\nnone\n")
    report = evaluate_models(replace(config, baselines=("random",), models={"model": str(folder)}))
    (result,) = read_front_matter(folder / CARD)["model-index"][0]["results"]
    cells = read_report(Path(config.output_dir) / "report.json").domains["books"].arms["model"].metrics
    assert result["dataset"] == {"type": "books", "name": "books", "split": config.part}
    assert [(each["name"], each["value"]) for each in result["metrics"]] == [
        (f"{shown}@10 (model)", cells[Metric(name, 10, FULL)].mean)
        for name, shown in (("ndcg", "NDCG"), ("recall", "Recall"))
    ]
    text = (folder / CARD).read_text()
    assert markdown_table(report, "books") in text and "Rows of this model: **model**." in text
    assert "none" not in text and str(data) not in text


def test_rankings_of_earlier_versions_are_scored_again_where_the_model_is_gone(
    config: EvaluateConfig, split: Split, data: Path
) -> None:
    """How models rank stood among the questions then, and an identity was one hash."""
    first = evaluate(config, split, "books", [model(PopularityRecommender(split), data, **RULE)])
    for path in (Path(config.output_dir) / "books").glob("model.*.parquet"):
        table = pq.read_table(path)
        answers = json.loads(table.schema.metadata[b"answers"])
        rank = {name: value for name, value in answers["identity"]["rank"].items() if name != "normaliser"}
        answers |= {"identity": "0123", **rank, "scores": SCORES}
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"answers": json.dumps(answers)}), path)
    gone = replace(config, baselines=("random",), models={"model": "nowhere"})
    assert evaluate_models(gone).domains["books"].arms["model"].metrics == first.arms["model"].metrics
    with pytest.raises(ConfigError, match="its saved rankings answer other"):
        evaluate_models(replace(gone, rank=RankConfig(score="mean")))


def test_how_models_rank_is_part_of_who_they_are_and_not_of_the_questions(
    config: EvaluateConfig, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, prompts and code count, too. Baselines know nothing of it: they are not ranked again."""
    folder = tmp_path / "model"
    folder.mkdir()
    about = {"trained_on": ["1"], "template": {"line": "-"}, "num_parameters": 1, "tokens": 1, "seconds": 1.0}
    (folder / "cprec.json").write_text(json.dumps(about))
    (folder / "model.safetensors").write_bytes(b"weights")

    def identity(**rank: Any) -> Mapping[str, Any]:
        (entrant,) = model_entrants(replace(config, rank=RankConfig(**rank)), "books", {"model": str(folder)})
        return entrant.identity

    before = identity()
    assert identity() == before
    assert identity(beam_width=3) != before
    (folder / "cprec.json").write_text(json.dumps(about | {"seconds": 2.0}))
    assert identity() == before, "a model that was trained again, and came out the same"
    (folder / "cprec.json").write_text(json.dumps(about | {"template": {"line": "*"}}))
    assert identity() != before
    (folder / "cprec.json").write_text(json.dumps(about))
    (folder / "model.safetensors").write_bytes(b"others")
    assert identity() != before
    (folder / "model.safetensors").write_bytes(b"weights")
    assert rows(config, folder) == ["model"]
    monkeypatch.setattr("cprec.entrants.code_sha256", lambda module: "other code")
    assert identity() != before

    popular = replace(config, baselines=("popularity",))
    answers = [
        baseline_entrants(one, split, "books")[0].identity
        for one in (popular, replace(popular, rank=RankConfig(mode="beam", beam_width=3)))
    ]
    assert answers[0] == answers[1]


def rows(config: EvaluateConfig, folder: Path) -> list[str]:
    return [entrant.name for entrant in model_entrants(config, "books", {"model": str(folder)})]


def test_an_item_head_has_a_row_of_its_own(config: EvaluateConfig, tmp_path: Path) -> None:
    """For its own domain (that of pre-training is of all), and where the model itself does not rank by it."""
    about = {"trained_on": ["1"], "domain": "books", "num_parameters": 1, "tokens": 1, "seconds": 1.0}
    (tmp_path / "cprec.json").write_text(json.dumps(about))
    (tmp_path / "item_head").mkdir()
    for path in ("model.safetensors", "item_head/model.safetensors"):
        (tmp_path / path).write_bytes(b"weights")
    assert rows(config, tmp_path) == ["model", "model item head"]
    assert rows(replace(config, rank=RankConfig(mode="vectors")), tmp_path) == ["model"]
    (tmp_path / "cprec.json").write_text(json.dumps(about | {"domain": "games"}))
    assert rows(config, tmp_path) == ["model"]
    (tmp_path / "cprec.json").write_text(json.dumps({name: about[name] for name in about if name != "domain"}))
    assert rows(config, tmp_path) == ["model", "model item head"]


def test_damaged_files_are_named_or_made_anew(
    config: EvaluateConfig, split: Split, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entrants = [baseline(PopularityRecommender(split))]
    whole = evaluate(config, split, "books", entrants)

    def halve(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    rankings = rankings_path(config.output_dir, "books", "popularity", FULL)
    halve(rankings)
    again = evaluate(config, split, "books", entrants)
    assert again.arms["popularity"].metrics == whole.arms["popularity"].metrics
    assert f"{rankings} cannot be read" in capsys.readouterr().err
    for name, remedy in (("candidates20_test_seed0", "delete it, and it is drawn anew"), ("test", "prepare the data")):
        path = data / "queries" / "books" / f"{name}.parquet"
        halve(path)
        with pytest.raises(DataError, match=f"{name}.parquet cannot be read .*{remedy}"):
            evaluate(replace(config, uncertified=True), split, "books", entrants)


def test_nothing_left_to_rank_with_is_an_error(config: EvaluateConfig, split: Split) -> None:
    def unfit() -> Opened:
        raise Unsuitable("too many items")

    for entrants in ([], [replace(baseline(PopularityRecommender(split)), open=unfit)]):
        with pytest.raises(ConfigError, match="books: nothing is left to rank with"):
            evaluate(config, split, "books", entrants)


def test_seeds_of_one_model_stand_together_in_differences(config: EvaluateConfig, split: Split, data: Path) -> None:
    seeds = [model(RandomRecommender(split.catalogue, seed=n), data, f"x (seed {n})") for n in range(2)]
    arms = [baseline(PopularityRecommender(split)), *seeds]
    found = evaluate(config, split, "books", arms).differences
    assert [(line.a, line.b) for line in found] == [("x (2 seeds)", "popularity")]
    rows = pq.read_table(Path(config.output_dir) / "books" / "metrics.parquet").to_pylist()
    assert {(row["arm"], row["stochastic"]) for row in rows} == {
        ("popularity", False),
        ("x (seed 0)", True),
        ("x (seed 1)", True),
    }
    twins = [baseline(PopularityRecommender(split), name) for name in ("one", "two")]
    (line,) = evaluate(config, split, "books", twins).differences
    assert line.test.p_value == 1 and line.test.detectable is None


def test_blends_of_several_seeds_are_told_in_place_of_their_models(
    config: EvaluateConfig, split: Split, data: Path
) -> None:
    names = [f"x{row} (seed {seed})" for seed in range(2) for row in ("", " item head", " blend")]
    seeds = [model(RandomRecommender(split.catalogue, seed=n), data, name) for n, name in enumerate(names)]
    found = evaluate(config, split, "books", [baseline(PopularityRecommender(split)), *seeds]).differences
    blend, head, alone = (f"x{row} (2 seeds)" for row in (" blend", " item head", ""))
    assert [(line.a, line.b) for line in found] == [
        (blend, "popularity"),
        (blend, alone),
        (blend, head),
        (head, alone),
    ]


def test_tables_of_many_pairs_draw_more_flips(
    config: EvaluateConfig, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.evaluate.statistics.PERMUTATIONS", 9)  # as if 3 pairs were many: 100 flips for each
    knowing = baseline(Knowing(questions_of(config, split)))
    others = [baseline(PopularityRecommender(split), name) for name in ("one", "two")]
    found = evaluate(config, split, "books", [knowing, *others]).differences
    assert [line.test.p_value for line in found] == [1 / 301] * 2


def test_an_interrupted_evaluation_leaves_no_protocol_beside_metrics_of_another(
    config: EvaluateConfig, split: Split
) -> None:
    entrants = [baseline(PopularityRecommender(split))]
    evaluate(config, split, "books", entrants)
    protocol = Path(config.output_dir) / "books" / "protocol.json"
    before = protocol.read_text()
    broken = baseline(Knowing(questions_of(config, split), score=float("nan")))
    with pytest.raises(CPRecError, match="not finite"):
        evaluate(replace(config, k=7), split, "books", [*entrants, broken])
    assert protocol.read_text() == before and json.loads(before)["k"] == 10


def test_the_seed_decides_random_and_seeds_train_what_is_trained(config: EvaluateConfig) -> None:
    lists = []
    for number, changed in enumerate(({"seed": 0}, {"seed": 3}, {"seed": 0, "seeds": (3,)})):
        output = f"{config.output_dir}{number}"
        mine = replace(config, output_dir=output, baselines=("random",), **changed)
        evaluate_models(mine)
        lists.append(pq.read_table(rankings_path(mine.output_dir, "books", "random", FULL))["item_id"].to_pylist())
    assert lists[0] == lists[2] != lists[1]


def test_a_trained_baseline_keeps_its_row_when_data_are_prepared_again(
    config: EvaluateConfig, data: Path, quick_sasrec: None
) -> None:
    """Its folder has weights that were learnt from other events."""
    mine = replace(config, baselines=("popularity", "SASRec"), uncertified=True)
    first = evaluate_models(mine).domains["books"]
    path = next((data / "interactions" / "domain=books").glob("*.parquet"))
    events = pq.read_table(path)
    item = events["item_id"].to_pylist()
    item[events["split"].to_pylist().index("train")] = item[-1]
    column = events.column_names.index("item_id")
    pq.write_table(events.set_column(column, events.field(column), pa.array(item, events.field(column).type)), path)
    manifest = data / "dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"note": "prepared again"}))
    again = evaluate_models(mine).domains["books"]
    assert list(again.arms) == list(first.arms) == ["popularity", "SASRec"]
    folder = Path(config.output_dir) / "baselines" / "books" / "sasrec"
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2
    assert Trained.read(folder).events["dataset.json"] == file_sha256(manifest), "the latest is what is served"


def test_what_an_arm_opened_is_let_go_before_the_next_is_opened(config: EvaluateConfig, split: Split) -> None:
    alive: weakref.WeakSet[Recommender] = weakref.WeakSet()

    def opened() -> Opened:
        assert not alive
        recommender = PopularityRecommender(split)
        alive.add(recommender)
        return Opened(recommender=recommender)

    entrants = [Entrant(name=name, kind="baseline", open=opened) for name in ("one", "two")]
    evaluate(config, split, "books", entrants)
    assert not alive


def test_who_scores_once_is_asked_for_a_batch_under_every_protocol_before_the_next(
    config: EvaluateConfig, split: Split, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.evaluate.asking.BATCH", 8)
    asked: list[tuple[str, bool]] = []

    class Noting(Counting):
        def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
            asked.append((queries[0].query_id, queries[0].candidates is None))
            return super().rank(queries, k)

    few = replace(config, max_queries=16)
    first, second = (questions_of(few, split).queries[row].query_id for row in (0, 8))
    evaluate(few, split, "books", [baseline(Noting(PopularityRecommender(split)))])
    of_everyone = [call for call in asked if call[0] in (first, second)]
    assert [query for query, _ in of_everyone[:3]] == [first] * 3 and (second, True) in of_everyone[3:]
    asked.clear()
    evaluate(few, split, "books", [model(Noting(PopularityRecommender(split)), data)])
    assert asked[:2] == [(first, True), (second, True)], "what a model has finished is saved before it goes on"


def test_who_scores_once_scores_each_query_once_for_all_protocols(
    config: EvaluateConfig, split: Split, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for new items too, which ask some of the queries; what writes freely is asked by itself, at the end."""
    monkeypatch.setattr("cprec.evaluate.asking.BATCH", 8)
    scored: list[str] = []
    written: list[str] = []

    class Noting(PopularityRecommender):
        def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
            scored.extend(query.query_id for query in queries)
            return super().scores(domain, queries)

    def write(queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        assert len(scored) == number
        written.extend(query.query_id for query in queries)
        return [Ranking(query.query_id, (), ()) for query in queries]

    questions = questions_of(config, split)
    number, new_items = len(questions.queries), protocol_named(questions, NEW_ITEMS).queries
    assert 0 < len(new_items) < number
    opened = Opened(recommender=Noting(split), modes={"generate": write}, scores_once=True)
    entrant = replace(model(opened.recommender, data), open=lambda: opened)
    evaluate(replace(config, generate=True), split, "books", [entrant])
    assert scored == written == [query.query_id for query in questions.queries]


def test_a_baseline_that_does_not_suit_the_data_is_left_out_by_name(
    config: EvaluateConfig, split: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large() -> Opened:
        raise Unsuitable("too many items")

    entrants = [
        baseline(PopularityRecommender(split)),
        replace(baseline(RandomRecommender(split.catalogue)), open=too_large),
    ]
    assert list(evaluate(config, split, "books", entrants).arms) == ["popularity"]
    assert "random is left out: too many items" in capsys.readouterr().err


def test_another_error_of_a_baseline_leaves_no_row_out(config: EvaluateConfig, split: Split) -> None:
    def other_data() -> Opened:
        raise InputChanged("its folder was made from other data")

    entrants = [
        baseline(PopularityRecommender(split)),
        replace(baseline(RandomRecommender(split.catalogue)), open=other_data),
    ]
    with pytest.raises(InputChanged, match="made from other data"):
        evaluate(config, split, "books", entrants)


@pytest.mark.parametrize("name", ["Popularity", "popularity", " popularity!"])
def test_two_arms_of_one_name_are_refused(config: EvaluateConfig, split: Split, name: str) -> None:
    own = "".join(list(name))  # equal, and not the same object
    entrants = [baseline(PopularityRecommender(split)), baseline(PopularityRecommender(split), own)]
    with pytest.raises(ConfigError, match=f"two arms are called 'popularity' and '{name}'"):
        evaluate(config, split, "books", entrants)


def test_a_score_that_is_not_finite_is_named(config: EvaluateConfig, split: Split) -> None:
    broken = Knowing(questions_of(config, split), score=float("nan"))
    with pytest.raises(CPRecError, match="knowing gave query 'books/library/.*' a score that is not finite"):
        evaluate(config, split, "books", [baseline(broken)])


# ---- certificate -----------------------------------------------------------------------------------------------------


def changed_certificate(data: Path, **fields: object) -> None:
    path = data / "certificate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def judged(data: Path) -> dict[str, list[str]]:
    """What a model was trained on."""
    return {"judged": [json.loads((data / "certificate.json").read_text())["artifacts"]["shards/train"]]}


def covers(config: EvaluateConfig, judged: Mapping[str, Sequence[str]]) -> bool:
    hashes = FileHashes(config.output_dir)
    return check_certificate(config.data, "books", config.part, judged, hashes, uncertified=config.uncertified)


def test_a_covering_certificate_is_accepted(config: EvaluateConfig, judged: dict[str, list[str]]) -> None:
    assert covers(config, judged)


def test_a_missing_certificate_is_refused(config: EvaluateConfig, judged: dict[str, list[str]], data: Path) -> None:
    (data / "certificate.json").unlink()
    with pytest.raises(LeakageError, match="certificate.json is missing: make it with `cprec audit"):
        covers(config, judged)
    assert not covers(replace(config, uncertified=True), judged)


def test_leaks_are_named(config: EvaluateConfig, judged: dict[str, list[str]], data: Path) -> None:
    leak = {"name": "shards/train: no held-out event", "checked": 9, "violations": 1, "examples": []}
    changed_certificate(data, clean=False, properties=[leak])
    with pytest.raises(LeakageError, match="found leaks: shards/train: no held-out event"):
        covers(config, judged)


def test_other_training_data_is_refused(config: EvaluateConfig, judged: dict[str, list[str]]) -> None:
    with pytest.raises(LeakageError, match="does not cover the data that judged was trained on"):
        covers(config, {"judged": [*judged["judged"], "f" * 64]})
    with pytest.raises(LeakageError, match="judged does not say what data it was trained on"):
        covers(config, {"judged": []})


def test_other_queries_are_refused(config: EvaluateConfig, judged: dict[str, list[str]], data: Path) -> None:
    path = data / "queries/books/test.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(LeakageError, match="is not the file that"):
        covers(config, judged)


def test_other_events_than_the_certificate_covers_are_refused_for_baselines_too(
    config: EvaluateConfig, split: Split, data: Path
) -> None:
    path = next((data / "interactions" / "domain=toys").glob("*.parquet"))
    events = path.read_bytes()
    pq.write_table(pq.read_table(path).slice(1), path)
    popular = [baseline(PopularityRecommender(split))]
    with pytest.raises(LeakageError, match=r"domain=toys/part-0.parquet changed: the events in .* run `cprec audit"):
        evaluate(config, split, "books", popular)
    assert not evaluate(replace(config, uncertified=True), split, "books", popular).certified
    path.write_bytes(events)
    assert evaluate(config, split, "books", popular).certified
    (path.parent / "part-7.parquet").write_bytes(events)
    with pytest.raises(LeakageError, match="part-7.parquet is new"):
        evaluate(config, split, "books", popular)


def test_a_certificate_from_before_it_named_event_files_is_to_be_made_anew(config: EvaluateConfig, data: Path) -> None:
    changed_certificate(data, files={})
    with pytest.raises(LeakageError, match="does not say which events it covers: make it anew with `cprec audit"):
        covers(config, {})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"artifacts": 3}', '{"artifacts": {"a": "'])
def test_a_broken_certificate_is_named(
    config: EvaluateConfig, judged: dict[str, list[str]], data: Path, text: str
) -> None:
    (data / "certificate.json").write_text(text)
    with pytest.raises(DataError, match="certificate.json is no certificate: make it anew"):
        covers(config, judged)


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"k": 4}, "k=4 must be at least 5"), ({"num_candidates": 1}, "num_candidates=1"), ({"max_queries": -1}, "-1")],
)
def test_impossible_settings_are_refused(setting: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(data="d", output_dir="o", **setting)


def test_the_protocol_says_what_numbers_depend_on(config: EvaluateConfig, split: Split) -> None:
    lines = protocol_of(replace(config, exclude_seen=False, max_queries=50), split, "beam search")
    assert "leave-one-out" in lines["split"]
    assert lines["seen items"].startswith("may be recommended again in the main table")
    assert "at most 50 a domain" in lines["queries"] and lines["language models"] == "beam search"


def test_a_baseline_with_other_settings_is_ranked_anew_and_named(config: EvaluateConfig, split: Split) -> None:
    asked = replace(config, baselines=("EASE", "titles"))
    other = replace(asked, settings={"EASE": {"decay": "1.0"}})  # as the command line has it
    first, second = (evaluate_models(each).domains["books"].arms for each in (asked, other))
    (changed,) = baseline_entrants(replace(other, baselines=("EASE",)), split, "books")
    assert changed.identity["settings"]["decay"] == 1.0
    assert first["titles"].metrics == second["titles"].metrics and first["EASE"].metrics != second["EASE"].metrics
    assert protocol_of(other, split, "")["baselines"] == "EASE with decay=1.0"


def test_settings_that_do_not_go_with_tuned_ones_are_refused_before_any_domain_is_ranked(tmp_path: Path) -> None:
    wide = {"asked": {}, "settings": {"hidden_size": 64, "num_heads": 4}}
    (tmp_path / "tuned.json").write_text(json.dumps({"books": {}, "toys": {"SASRec": wide}}))
    tuned = {"tuned": str(tmp_path / "tuned.json"), "baselines": ("SASRec",)}
    asked = EvaluateConfig(data="", output_dir="", settings={"SASRec": {"hidden_size": 66}})
    check_baselines(replace(asked, baselines=("SASRec",)))
    with pytest.raises(ConfigError, match="hidden_size=66"):
        check_baselines(replace(asked, **tuned))
    check_baselines(replace(asked, **tuned, settings={"SASRec": {"num_heads": 8}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ("tea",)}, "no 'tea'"),
        ({"tuned": "gone.json"}, "tuned='gone.json' does not"),
        ({"settings": {"EASE (published)": {}}}, r"settings.EASE \(published\): .* is none of baselines=random,"),
        ({"settings": {"EASE": {"deca": 1}}}, "did you mean 'decay'"),
        ({"settings": {"EASE": {"decay": "much"}}}, "settings.EASE.decay=much"),
        ({"settings": {"EASE": {"decay": 3.0}}}, "decay=3.0 must"),
    ],
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
