"""Metrics equal those of ranx, ir-measures and RecTools where definitions agree, and differ as the docs say.

The libraries are optional: a test skips where its library is not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.sparse import csr_array

from cprec.evaluate.metrics import coverage, first_k, intra_list_diversity, novelty
from cprec.ranks import average_precision, ndcg, precision, recall, reciprocal_rank

pytestmark = pytest.mark.slow

NUM_ITEMS, CUTS = 30, (1, 5, 10)


@pytest.fixture(autouse=True)
def other_libraries_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Answers to queries by item position, the first best, without ties; `target` may be missing from an answer."""

    items: list[list[int]]
    target: list[int]

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        return {f"q{number:03}": {f"i{item:02}": 1} for number, item in enumerate(self.target)}

    @property
    def run(self) -> dict[str, dict[str, float]]:
        return {
            f"q{number:03}": {f"i{item:02}": float(-place) for place, item in enumerate(items)}
            for number, items in enumerate(self.items)
        }

    @property
    def ranks(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = list(zip(self.items, self.target, strict=True))
        better = [items.index(target) if target in items else len(items) for items, target in pairs]
        return np.array(better), np.array([int(target in items) for items, target in pairs])

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        list_N = [number for number, items in enumerate(self.items) for _ in items]
        return np.array(list_N), np.array([item for items in self.items for item in items])


@pytest.fixture
def lists() -> Lists:
    """200 answers of 1 to 20 of 30 items; about two in three miss the target."""
    generator = np.random.default_rng(0)
    items = [generator.permutation(NUM_ITEMS)[: generator.integers(1, 21)].tolist() for _ in range(200)]
    return Lists(items=items, target=generator.integers(0, NUM_ITEMS, 200).tolist())


# ---- ranx ------------------------------------------------------------------------------------------------------------


def by_ranx(qrels: dict, run: dict, names: list[str]) -> dict[str, np.ndarray]:
    ranx = pytest.importorskip("ranx")
    judged = ranx.Run(run)
    ranx.evaluate(ranx.Qrels(qrels), judged, names, return_mean=False)
    return {name: np.array([judged.scores[name][query] for query in qrels]) for name in names}


def test_ranx_agrees_without_ties(lists: Lists) -> None:
    names = [f"{metric}@{k}" for metric in ("recall", "hit_rate", "precision", "ndcg", "mrr", "map") for k in CUTS]
    theirs = by_ranx(lists.qrels, lists.run, [*names, "mrr"])
    ours = {"recall": recall, "hit_rate": recall, "precision": precision, "ndcg": ndcg}
    ours |= {"mrr": reciprocal_rank, "map": average_precision}
    for name in names:
        metric, _, k = name.partition("@")
        np.testing.assert_allclose(theirs[name], ours[metric](*lists.ranks, int(k)), atol=1e-12, err_msg=name)
    np.testing.assert_allclose(theirs["mrr"], reciprocal_rank(*lists.ranks), atol=1e-12)


# ---- ir-measures (trec_eval) -----------------------------------------------------------------------------------------


def by_ir_measures(qrels: dict, run: dict, measures: list[object]) -> dict[object, np.ndarray]:
    ir_measures = pytest.importorskip("ir_measures")
    values = {(m.measure, m.query_id): m.value for m in ir_measures.iter_calc(measures, qrels, run)}
    return {measure: np.array([values[measure, query] for query in qrels]) for measure in measures}


def test_ir_measures_agrees_without_ties(lists: Lists) -> None:
    library = pytest.importorskip("ir_measures")
    ours = {library.R: recall, library.Success: recall, library.nDCG: ndcg, library.P: precision}
    ours |= {library.AP: average_precision, library.RR: reciprocal_rank}
    pairs = {measure @ k: (metric, k) for measure, metric in ours.items() for k in CUTS}
    theirs = by_ir_measures(lists.qrels, lists.run, [*pairs, library.RR])
    for measure, (metric, k) in pairs.items():
        np.testing.assert_allclose(theirs[measure], metric(*lists.ranks, k), atol=1e-6, err_msg=str(measure))
    np.testing.assert_allclose(theirs[library.RR], reciprocal_rank(*lists.ranks), atol=1e-6)


@pytest.mark.parametrize("library", ["ranx", "ir_measures"])
def test_one_order_of_a_tie_is_taken_by_others_and_the_mean_of_all_by_us(library: str) -> None:
    """Three items tie for ranks 1 to 3; the target takes each place under some naming of the items."""
    pytest.importorskip(library)
    values = []
    for target in ("a", "b", "c"):
        qrels, run = {"q": {target: 1}}, {"q": {"a": 1.0, "b": 1.0, "c": 1.0}}
        if library == "ranx":
            values.append(float(by_ranx(qrels, run, ["ndcg@2"])["ndcg@2"][0]))
        else:
            import ir_measures

            measure = ir_measures.nDCG @ 2
            values.append(float(by_ir_measures(qrels, run, [measure])[measure][0]))
    assert sorted(values) == pytest.approx([0, 1 / np.log2(3), 1])
    assert ndcg(np.array([0]), np.array([3]), 2)[0] == pytest.approx(np.mean(values))


# ---- RecTools --------------------------------------------------------------------------------------------------------


def tables(lists: Lists):
    """The answers and the targets as RecTools reads them."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("rectools")
    list_N, item_N = lists.flat
    rank_N = [place + 1 for items in lists.items for place in range(len(items))]
    reco = pandas.DataFrame({"user_id": list_N, "item_id": item_N, "rank": rank_N})
    return reco, pandas.DataFrame({"user_id": range(len(lists.target)), "item_id": lists.target})


def test_rectools_agrees_but_for_its_own_ndcg(lists: Lists) -> None:
    reco, targets = tables(lists)
    from rectools.metrics import MAP, MRR, NDCG, HitRate, Precision, Recall

    for k in CUTS:
        pairs = [
            (Recall(k), recall),
            (HitRate(k), recall),
            (Precision(k), precision),
            (MAP(k), average_precision),
            (MRR(k), reciprocal_rank),
            (NDCG(k, divide_by_achievable=True), ndcg),
        ]
        for theirs, ours in pairs:
            values = theirs.calc_per_user(reco, targets).sort_index()
            np.testing.assert_allclose(values, ours(*lists.ranks, k), atol=1e-12, err_msg=str(theirs))
        by_default = NDCG(k).calc_per_user(reco, targets).sort_index()
        all_hits = (1 / np.log2(np.arange(1, k + 1) + 1)).sum()  # as if every place could hold a relevant item
        np.testing.assert_allclose(by_default * all_hits, ndcg(*lists.ranks, k), atol=1e-12)
        np.testing.assert_allclose(
            MAP(k, divide_by_k=True).calc_per_user(reco, targets).sort_index() * k,
            average_precision(*lists.ranks, k),
            atol=1e-12,
        )


def test_rectools_agrees_on_novelty_coverage_and_diversity(lists: Lists) -> None:
    reco, _ = tables(lists)
    import pandas as pd
    from rectools.metrics import CatalogCoverage, IntraListDiversity, MeanInvUserFreq
    from rectools.metrics.distances import PairwiseDistanceCalculator

    generator = np.random.default_rng(1)
    log = pd.DataFrame({"user_id": generator.integers(0, 50, 300), "item_id": generator.integers(0, 25, 300)})
    users_I = log.drop_duplicates().groupby("item_id").size().reindex(range(NUM_ITEMS), fill_value=0).to_numpy()
    assert (users_I == 0).sum() >= 5  # items that nobody had
    vectors = generator.random((NUM_ITEMS, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    class Cosine(PairwiseDistanceCalculator):
        def _get_distances_for_item_pairs(self, items_0, items_1):
            return 1 - (vectors[np.asarray(items_0)] * vectors[np.asarray(items_1)]).sum(axis=1)

    list_N, item_N = lists.flat
    for k in CUTS:
        kept = first_k(list_N, k)
        flat = (list_N[kept], item_N[kept], len(lists.items))
        theirs = MeanInvUserFreq(k).calc_per_user(reco, log).sort_index()
        np.testing.assert_allclose(theirs, novelty(*flat, users_I, log["user_id"].nunique()), atol=1e-12)
        covered = CatalogCoverage(k, normalize=True).calc(reco, range(NUM_ITEMS))
        assert covered == coverage(item_N[kept], NUM_ITEMS)
        ours = intra_list_diversity(*flat, csr_array(vectors))
        diverse = IntraListDiversity(k, distance_calculator=Cosine()).calc_per_user(reco).sort_index()
        np.testing.assert_allclose(diverse, np.nan_to_num(ours), atol=1e-12)  # a list of one item: 0 there, none here
