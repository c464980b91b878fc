"""What every recommender must do, on a world whose law is known."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cprec.data.build import build_dataset
from cprec.data.catalogue import Catalogue
from cprec.data.config import Rules, SplitSpec, SyntheticConfig
from cprec.data.dataset import finish_part, read_dataset, read_split
from cprec.data.queries import ranking_queries
from cprec.data.sources.memory import MemorySource
from cprec.data.sources.synthetic import OracleRecommender, SyntheticWorld
from cprec.data.splits import Split, make_split
from cprec.entrants import baseline_entrants, baselines_folder
from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.rankings import slug
from cprec.lineup import Settings, settings_of
from cprec.probes import probe
from cprec.recommender import Ranking, RankingQuery, Recommender
from cprec.schema import MIXED, SPECIFIC, TEST
from cprec.systems.signals import TrainingSequences
from cprec.trained import open_trained
from cprec.tune import mean_ndcg

K = 10
SEED = 5
DOMAINS = ("garden", "kitchen")
"""Of market: kitchen is triggered by garden."""


@dataclass(frozen=True)
class Setting:
    """What recommenders learn from and are asked."""

    world: SyntheticWorld
    split: Split
    queries: list[RankingQuery]
    """Every test event of kitchen, by the domain's history; items of the history are excluded."""
    targets: list[str]
    data: Path
    """The data folder."""

    @property
    def catalogue(self) -> Catalogue:
        return self.split.catalogue


def _queries(split: Split, domain: str, kind: str) -> tuple[list[RankingQuery], list[str]]:
    return ranking_queries(split, split.queries(domain, TEST, history_kind=kind, max_history=20))


def _setting(folder: Path, num_users: int) -> Setting:
    world = SyntheticWorld(SyntheticConfig(num_market_users=num_users, num_library_users=1, items_per_domain=60))
    tables = world.tables()
    sources = [MemorySource(domain, world.domains[domain].platform, *tables[domain]) for domain in DOMAINS]
    build_dataset(sources, folder, Rules(k_core=0))
    split = make_split(*read_dataset(folder), SplitSpec())
    finish_part(folder, 0, lambda *log: make_split(*log, SplitSpec()))
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | {"split": {"method": "leave-one-out"}}))
    return Setting(world, split, *_queries(split, "kitchen", SPECIFIC), folder)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Few users: each of them is a query of validation, and systems that write codes search once for each."""
    return _setting(tmp_path_factory.mktemp("contract") / "data", num_users=100)


Make = Callable[[Setting], Recommender]

ONE_DOMAIN = (
    *("recent popularity", "freshness", "titles", "transition graph (last item)", "transition graph (two hops)"),
    *("transition graph (titles)", "ItemKNN", "EASE", "iALS"),
)
"""Baselines that are made for one domain."""

SMALL = {"hidden_size": 8, "max_length": 10, "num_epochs": 0.2}
WRITTEN = {"num_layers": 1, "num_codes": 8, "batch_size": 512, "beam_width": 4}
ON_GRAPH = {"num_negatives": 8, "batch_size": 512}
OF_CODES = {**WRITTEN, "text_size": 8}
FILLED_IN = {"num_blocks": 1, "num_levels": 3, "num_codes": 8, "text_size": 8, "batch_size": 512, "beam_width": 4}
CASCADE = {"num_layers": 1, "text_size": 8, "batch_size": 512, "beam_width": 4}
SYSTEMS: dict[str, dict[str, Any]] = {
    "LightGCN": ON_GRAPH,
    "NGCF": ON_GRAPH,
    "AlphaRec": {**ON_GRAPH, "text_size": 8, "adapter_size": 8},
    "PinSage": {"text_size": 8, "num_walks": 5, "num_neighbours": 3, "num_negatives": 8},
    "dual embeddings": {"num_negatives": 3},
    "GRU4Rec": {},
    "Mamba4Rec": {},
    "HMamba": {},
    "SIGMA": {"kept": 2},
    "BERT4Rec": {"num_negatives": 8},
    "SASRec": {"min_steps": 0},
    "LLM2Rec": {"min_steps": 0, "language_steps": 1, "masked_steps": 1, "contrast_steps": 1, "title_batch": 16},
    "MMM4Rec": {"text_size": 8},
    "ICSRec": {"num_intentions": 4},
    "SRA-CL": {"text_size": 8, "num_neighbours": 2},
    "MQSA-TED": {},
    "H2Rec": {"text_size": 8, "num_codes": 8},
    "Semantic IDs": {"text_size": 8, "num_codes": 8, "num_pieces": 50},
    "Semantic IDs (codes)": {"text_size": 8, "num_codes": 8},
    "SLMRec": {"teacher_blocks": 4},
    "HLLM": {"num_negatives": 8, "title_tokens": 4, "frozen_layers": 1},
    "Lite-LLM4Rec": {"title_tokens": 4, "frozen_layers": 1, "num_blocks": 1},
    "CoVE": {"title_tokens": 4, "layers": 1, "batch_size": 512},
    "Molar": {"num_negatives": 8, "title_tokens": 4, "frozen_layers": 1, "item_epochs": 0.2, "item_steps": 0},
    "Human priors": {"num_groups": 3},
    "Human priors (horizon)": {},
    "ReaRec": {"first_epochs": 0.2},
    "ReaRec (progressive)": {"first_epochs": 0.2},
    "ManCAR": {"first_epochs": 0.2},
    "IGR-SR": {"first_epochs": 0.2, "num_intents": 2},
    "Recformer": {"first_epochs": 0.2, "last_epochs": 0.2, "batch_size": 256, "num_blocks": 1, "max_tokens": 32},
    "TIGER": OF_CODES,
    "APAO": {**OF_CODES, "num_negatives": 3},
    "APAO (pointwise)": OF_CODES,
    "MSCGRec": {**OF_CODES, "collaborative_size": 8},
    "PRISM": {**OF_CODES, "collaborative_size": 8},
    "P5 (sequential)": WRITTEN,
    "P5 (random)": WRITTEN,
    "P5 (collaborative)": {**WRITTEN, "num_clusters": 3, "leaf_size": 10},
    "P5 (semantic)": WRITTEN,
    "P5 (hybrid)": {**WRITTEN, "num_clusters": 3, "leaf_size": 10},
    "SynerGen": {"ranking_negatives": 3},
    "ContRec": {"min_steps": 0, "text_size": 8, "num_steps": 2},
    "RecGPT": {"text_size": 8, "num_blocks": 1, "steps": (2, 2)},
    **dict.fromkeys(("COBRA", "COBRA (codes alone)"), {"num_levels": 2, "num_codes": 4, **CASCADE}),
    "COBRA (vectors alone)": CASCADE,
    "MDGR": {**FILLED_IN, "warm_up": 1},
    "REG4Rec": FILLED_IN,
    "STREAM-Rec": OF_CODES,
    **dict.fromkeys(("Mender", "Text2Tracks"), OF_CODES),
    **dict.fromkeys(
        ("ULMRec", "ULMRec (letters)"), {"item_epochs": 0.2, "item_steps": 0, "num_epochs": 0.05, "title_tokens": 3}
    ),
    "LLaRA": {"item_epochs": 0.2, "item_steps": 0, "title_tokens": 3, "num_epochs": 0.05, "beam_width": 2},
}
"""Systems, trained for a few steps, with settings that make these cheap."""

OF_EACH_KIND = frozenset(
    {"LightGCN", "PinSage", "dual embeddings"}  # a graph of users and items; walks; pairs from baskets
    | {"GRU4Rec", "Mamba4Rec", "BERT4Rec", "SASRec"}  # encoders: recurrent, state space, cloze, causal
    | {"Semantic IDs", "TIGER", "MDGR"}  # rows of codes; codes that are written one by one, or in any order
    | {"Human priors", "ReaRec"}  # several heads; latent steps
)
"""One system for each part that makes its rankings: the quick tests ask these, and the slow ones the others. All of
them but those that are ALIKE are asked quickly whether they have learnt from held-out events."""

WRITERS = frozenset(
    name
    for name in SYSTEMS
    if name.startswith(
        ("TIGER", "APAO", "MSCGRec", "PRISM", "COBRA", "MDGR", "REG4Rec", "STREAM-Rec", "P5", "LLaRA", "ULMRec")
    )
    or name in ("Mender", "Text2Tracks")
)
"""Systems that write codes or titles, and have no vectors of users."""

ALIKE = frozenset(
    {"P5 (random)", "P5 (collaborative)", "P5 (semantic)"}
    | {"HLLM", "Lite-LLM4Rec", "CoVE", "Molar", "Recformer"}
    | {"APAO", "APAO (pointwise)", "COBRA (codes alone)", "COBRA (vectors alone)", "REG4Rec", "STREAM-Rec"}
    | {"LLaRA", "ULMRec", "ULMRec (letters)"}
    | {"ContRec", "Mender", "SynerGen", "Text2Tracks"}
    | {"ReaRec (progressive)", "ManCAR", "IGR-SR", "SLMRec", "Human priors (horizon)", "Semantic IDs (codes)"}
    | {"NGCF", "HMamba", "SIGMA", "PRISM"}  # as LightGCN, Mamba4Rec twice, and MSCGRec
)
"""Systems that learn from events as another row does, which is asked quickly whether it learnt from held-out ones."""

SPARSE = frozenset(
    {"transition graph", "transition graph (last item)", "transition graph (two hops)", "transition graph (titles)"}
    | {"ItemKNN", "titles"}
)
"""Those that return only items which something speaks for."""

TOLERANCE = {"llm": 1e-4, "iALS": 1e-5, "P5": 1e-4, **dict.fromkeys(SYSTEMS, 1e-4)}
"""How far scores may differ where sums of another shape round otherwise."""


def _random(setting: Setting) -> Recommender:
    from cprec.baselines.random import RandomRecommender

    return RandomRecommender(setting.catalogue, 7)


def _popularity(setting: Setting) -> Recommender:
    from cprec.baselines.popularity import PopularityRecommender

    return PopularityRecommender(setting.split)


def _transition_graph(setting: Setting) -> Recommender:
    from cprec.baselines.transition_graph import TransitionGraphRecommender

    return TransitionGraphRecommender(setting.split)


class OfEachDomain:
    """Recommenders that learn one domain, one for each, behind one protocol; each is made when it is first asked."""

    def __init__(self, settings: Settings, split: Split) -> None:
        self.of_domain = functools.cache(lambda domain: settings.make(split, domain, seed=SEED))

    @property
    def name(self) -> str:
        return self.of_domain(DOMAINS[0]).name

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        found = {}
        for domain in DOMAINS:
            mine = [number for number, query in enumerate(queries) if query.domain == domain]
            ranked = self.of_domain(domain).rank([queries[number] for number in mine], k)
            found |= dict(zip(mine, ranked, strict=True))
        return [found[number] for number in range(len(queries))]


def _settings(name: str) -> Settings:
    """The settings of a row of the line-up, by the name that it has in tables."""
    return settings_of(name, {**SMALL, **SYSTEMS[name]} if name in SYSTEMS else None)


def _made(name: str) -> Make:
    return lambda setting: OfEachDomain(_settings(name), setting.split)


def _oracle(setting: Setting) -> Recommender:
    return OracleRecommender(setting.world)


def _llm(setting: Setting) -> Recommender:
    from cprec.models import tiny_model
    from cprec.rank.llm import LLMRecommender
    from cprec.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(map(str, setting.catalogue.title), vocabulary_size=600)  # few tokens a title
    model = tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, seed=3)
    return LLMRecommender(model, tokenizer, setting.catalogue, beam_width=8, batch_size=5, history=MIXED, max_history=5)


MAKERS: dict[str, Make] = {
    "random": _random,
    "popularity": _popularity,
    "transition graph": _transition_graph,
    **{name: _made(name) for name in (*ONE_DOMAIN, *SYSTEMS)},
    "oracle": _oracle,
    "llm": _llm,
}


def each_of(names: Iterable[str]) -> list[Any]:
    """Names as parameters; those of systems that are not OF_EACH_KIND are slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SYSTEMS and name not in OF_EACH_KIND)) for name in names
    ]


Made = Callable[[str], Any]


@pytest.fixture(scope="module")
def made(setting: Setting) -> Made:
    """Recommenders by their names; each is made once, when it is first asked for."""
    return functools.cache(lambda name: MAKERS[name](setting))


@pytest.fixture(params=each_of(MAKERS))
def recommender(request: pytest.FixtureRequest, made: Made) -> Recommender:
    found: Recommender = made(request.param)
    return found


@pytest.fixture(scope="module")
def asked(setting: Setting) -> list[RankingQuery]:
    """Queries of every form: both kinds of history, none at all, candidates, exclusions, in another domain."""
    mixed = _queries(setting.split, "kitchen", MIXED)[0]
    garden = _queries(setting.split, "garden", SPECIFIC)[0]
    generator = np.random.default_rng(0)
    ids = setting.world.item_ids("kitchen")
    some = setting.queries[20:23]
    return [
        *setting.queries[:5],
        *mixed[8:11],
        *garden[:3],
        *(replace(query, history=(), exclude=frozenset()) for query in setting.queries[14:16]),
        *(replace(query, exclude=frozenset()) for query in setting.queries[17:19]),
        *(replace(query, candidates=tuple(generator.permutation(ids)[:20].tolist())) for query in some),
        *(replace(query, candidates=ids, exclude=frozenset(), history=query.history[-1:]) for query in mixed[26:28]),
    ]


def assert_same(first: Ranking, second: Ranking, tolerance: float = 0.0) -> None:
    """The same items with the same scores; where scores may differ by rounding, near ties may stand in any order."""
    assert first.query_id == second.query_id
    if tolerance:
        scores = [dict(zip(ranking.item_ids, ranking.scores, strict=True)) for ranking in (first, second)]
        assert scores[0] == pytest.approx(scores[1], abs=tolerance)
    else:
        assert first == second


def test_follows_the_protocol(recommender: Recommender) -> None:
    assert isinstance(recommender, Recommender)
    assert recommender.name
    assert recommender.rank([], K) == []


def test_one_ranking_per_query_in_their_order(recommender: Recommender, asked: Sequence[RankingQuery]) -> None:
    assert [ranking.query_id for ranking in recommender.rank(asked, K)] == [query.query_id for query in asked]


@pytest.mark.parametrize("k", [1, K, 1000])
def test_rankings_are_of_the_domain_without_repeats_best_first(
    recommender: Recommender, setting: Setting, asked: Sequence[RankingQuery], k: int
) -> None:
    for query, ranking in zip(asked, recommender.rank(asked, k), strict=True):
        assert len(ranking.item_ids) == len(ranking.scores) == len(set(ranking.item_ids))
        assert set(ranking.item_ids) <= set(setting.world.item_ids(query.domain))
        assert all(type(item) is str for item in ranking.item_ids)
        assert all(type(score) is float for score in ranking.scores)
        assert np.isfinite(ranking.scores).all()
        assert all(a >= b for a, b in itertools.pairwise(ranking.scores))
        if query.candidates is None:
            assert all(score == ranking.scores[k - 1] for score in ranking.scores[k:]), "only ties come on top of k"


def test_honours_allow(recommender: Recommender, setting: Setting, asked: Sequence[RankingQuery]) -> None:
    few = {domain: frozenset(setting.world.item_ids(domain)[3:9]) for domain in ("kitchen", "garden")}
    allowing = [replace(query, allow=few[query.domain], exclude=frozenset()) for query in asked]
    for query, ranking in zip(allowing, recommender.rank(allowing, 1000), strict=True):
        assert set(ranking.item_ids) <= few[query.domain]
        if query.candidates is None and recommender.name in ("random", "popularity", "llm"):  # others leave out
            assert set(ranking.item_ids) == few[query.domain]


def test_honours_exclude(recommender: Recommender, asked: Sequence[RankingQuery]) -> None:
    first = recommender.rank(asked, K)
    excluding = [
        replace(query, exclude=query.exclude | frozenset(ranking.item_ids[:3]))
        for query, ranking in zip(asked, first, strict=True)
    ]
    for query, ranking in zip(excluding, recommender.rank(excluding, K), strict=True):
        assert not set(ranking.item_ids) & query.exclude


def test_uncounted_items_come_beside_the_k_best(recommender: Recommender, asked: Sequence[RankingQuery]) -> None:
    """One ranking with the seen items uncounted holds both: the k best without them, and the k best of all."""
    full = [query for query in asked if query.candidates is None and query.exclude]
    both = recommender.rank([replace(q, exclude=frozenset(), uncounted=q.exclude) for q in full], K)
    without = recommender.rank(full, K)
    among_all = recommender.rank([replace(query, exclude=frozenset()) for query in full], K)
    tolerance = TOLERANCE.get(recommender.name, 0.0)
    for query, ranking, left_out, kept in zip(full, both, without, among_all, strict=True):
        pairs = list(zip(ranking.item_ids, ranking.scores, strict=True))
        assert [score for item, score in pairs if item not in query.exclude] == pytest.approx(
            left_out.scores, abs=tolerance
        )
        best = ranking.scores[: len(kept.scores)]
        assert best == pytest.approx(kept.scores, abs=tolerance)
        assert all(a >= b for a, b in itertools.pairwise(ranking.scores))


def test_ranks_all_candidates_and_nothing_else(recommender: Recommender, asked: Sequence[RankingQuery]) -> None:
    given = [query for query in asked if query.candidates is not None]
    assert any(set(query.candidates or ()) & query.exclude for query in given)
    for query, ranking in zip(given, recommender.rank(given, 1), strict=True):
        assert set(ranking.item_ids) == set(query.candidates or ()) - query.exclude


@pytest.mark.parametrize("name", each_of(name for name in MAKERS if name not in SPARSE))
def test_the_full_catalogue_gives_k_items(name: str, made: Made, asked: Sequence[RankingQuery]) -> None:
    full = [query for query in asked if query.candidates is None]
    for ranking in made(name).rank(full, K):
        assert len(ranking.item_ids) >= K


def test_a_batch_is_answered_as_singly(recommender: Recommender, asked: Sequence[RankingQuery]) -> None:
    tolerance = TOLERANCE.get(recommender.name, 0.0)
    for query, ranking in zip(asked, recommender.rank(asked, K), strict=True):
        assert_same(recommender.rank([query], K)[0], ranking, tolerance)


@pytest.mark.parametrize("name", each_of(MAKERS))
def test_repeats_itself_under_one_seed(name: str, made: Made, setting: Setting, asked: Sequence[RankingQuery]) -> None:
    before = made(name).rank(asked, K)
    assert made(name).rank(asked, K) == before
    if not isinstance(made(name), OfEachDomain):  # those are made again below, from other held-out events
        assert MAKERS[name](setting).rank(asked, K) == before


@pytest.mark.parametrize("name", [*ONE_DOMAIN, "SASRec", "TIGER"])
def test_a_recommender_of_one_domain_refuses_another(name: str, made: Made, setting: Setting) -> None:
    recommender = made(name).of_domain("garden")
    assert recommender.name == name
    with pytest.raises(
        ConfigError, match=f"{re.escape(name)} was made for domain 'garden' and is asked about 'kitchen'"
    ):
        recommender.rank(setting.queries[:1], K)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "TIGER")) for name in SYSTEMS])
def test_a_trained_row_opens_as_it_was_evaluated(
    name: str, setting: Setting, asked: Sequence[RankingQuery], tmp_path: Path
) -> None:
    """To the digit, with nothing trained: by the folder that an evaluation leaves."""
    settings = {name: {**SMALL, **SYSTEMS[name]}}
    config = EvaluateConfig(data=str(setting.data), output_dir=str(tmp_path), baselines=(name,), settings=settings)
    (entrant,) = baseline_entrants(config, read_split(setting.data), "kitchen")
    trained = entrant.open().recommender
    served = open_trained(baselines_folder(str(tmp_path), "kitchen") / slug(name))
    assert served.name == name and served.domains == ("kitchen",)
    assert served.way == ("letters" if name.startswith("ULMRec") else None if name in WRITERS else "vectors")
    queries = [replace(query, user=None) for query in asked if query.domain == "kitchen"]
    expected = trained.rank(queries, K)
    assert [replace(one, proof=None) for one in served.rank(queries, K)] == [
        replace(one, proof=None) for one in expected
    ]


@pytest.mark.parametrize("name", each_of(name for name in SYSTEMS if name not in WRITERS))
def test_vectors_of_users_can_be_probed(name: str, made: Made, setting: Setting) -> None:
    recommender, data = made(name).of_domain("kitchen"), TrainingSequences.of(setting.split, "kitchen")
    for users in (data.users, None):
        found = probe(recommender, data.sequences, users)
        assert list(found) == ["length", "order", "category"]
        assert all(each.low <= each.value <= each.high <= 1 for each in found.values())
        if name in ("LightGCN", "NGCF", "AlphaRec", "PinSage"):
            assert found["order"].value == 0.5, "sums and means have no order"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in (*ONE_DOMAIN, *SYSTEMS)]
)
def test_what_is_held_out_changes_nothing_where_the_seed_is_the_same(
    name: str, made: Made, setting: Setting, asked: Sequence[RankingQuery]
) -> None:
    """Learning sees the training part only: held-out events may be of any other items of their domain. Validation
    events choose the weights of systems, so that for these only test events may."""
    log, catalogue = setting.split.interactions, setting.split.catalogue
    ends = np.array([catalogue.rows_of(domain)[[0, -1]].sum() for domain in catalogue.domains])
    held_out = setting.split.events("test") if name in SYSTEMS else ~setting.split.events("train")
    other = replace(
        log,
        item=np.where(held_out, ends[catalogue.domain[log.item]] - log.item, log.item),
        time=np.where(held_out, log.time + 10**15, log.time),
    )
    queries = [query for query in asked if query.domain == "kitchen"]
    first = made(name).of_domain("kitchen").rank(queries, K)
    again = _settings(name).make(replace(setting.split, interactions=other), "kitchen", seed=SEED)
    for one, other in zip(first, again.rank(queries, K), strict=True):
        assert_same(one, other, 0.0)


@pytest.mark.slow
def test_baselines_beat_chance_and_the_oracle_beats_all(tmp_path: Path) -> None:
    many = _setting(tmp_path / "data", num_users=400)
    assert len(many.queries) > 300
    made = {name: make(many) for name, make in MAKERS.items() if name not in SYSTEMS}
    quality = {name: mean_ndcg(recommender, many.queries, many.targets) for name, recommender in made.items()}
    hopeless = {
        "random",
        "llm",
        "recent popularity",
        "freshness",
    }  # not trained; or fed on what little trains late in this world
    for name in set(quality) - hopeless:
        assert quality[name] > quality["random"] + 0.02, name
    assert quality["oracle"] > max(value for name, value in quality.items() if name != "oracle") + 0.1
