"""The shortcut audit against numbers worked by hand, on four users and five items."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.config import SplitSpec
from cprec.data.interactions import Interactions
from cprec.data.splits import Split, make_split
from cprec.data.titles import title_vectors
from cprec.errors import ConfigError
from cprec.evaluate.findings import CAN, CANNOT, CARE, findings
from cprec.evaluate.results import Interval
from cprec.evaluate.shortcut_audit import (
    BACKWARD,
    FROM_ANY,
    ONE_STEP,
    SHUFFLED,
    TITLES,
    TWO_STEPS,
    USERS,
    Dependence,
    OutDegree,
    Reach,
    ShortcutAudit,
    Similarity,
    Targets,
    percentiles,
    share_interval,
    shortcut_audit,
)
from cprec.evaluate.shortcut_page import print_shortcuts, reading, shortcut_page, shortcut_table, write_shortcuts
from cprec.ranks import count_rankings, ndcg
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import DomainInfo

EVENTS = ((0, 1, 2, 3), (2, 3, 0, 1), (1, 2, 0, 4), (0, 2, 2, 0))
"""Items of four users: the last one tests, the one before validates, so training has 0 1, 2 3, 1 2 and 0 2."""
DAYS = ((1, 2, 3, 3), (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 2, 3))
"""The first user's target shares its day with the event before."""
WORDS = ("red shoe", "blue hat", "red hat", "red hat", "green")


def world(*, has_times: bool = True, events: Sequence[Sequence[int]] = EVENTS) -> Split:
    """The four users in one domain; every number below is worked from them."""
    blank = np.array([""] * len(WORDS), dtype=object)
    ids = np.array([f"i{n}" for n in range(len(WORDS))], dtype=object)
    kind = np.zeros(len(WORDS), dtype=np.int16)
    catalogue = Catalogue(("shop",), kind, ids, np.array(WORDS, dtype=object), blank, blank)
    lengths = [len(of_user) for of_user in events]
    days = DAYS if events is EVENTS else [range(length) for length in lengths]
    log = Interactions(
        platforms=("p",),
        user_platform=np.zeros(len(events), dtype=np.int16),
        user_id=np.array([f"u{n}" for n in range(len(events))], dtype=object),
        user=np.repeat(np.arange(len(events)), lengths),
        item=np.concatenate([np.array(of_user) for of_user in events]),
        time=np.concatenate([np.array(of_user) for of_user in days]),
        rating=np.full(sum(lengths), np.nan),
    )
    return make_split(catalogue, log, {"shop": DomainInfo("shop", "p", has_times)}, SplitSpec())


class NextNumber:
    """Recommends the item whose number comes after the last one's, and keeps what it was asked."""

    name = "next number"

    def __init__(self) -> None:
        self.asked: list[RankingQuery] = []

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        self.asked += queries
        found = []
        for query in queries:
            item = f"i{int(query.history[-1].item_id[1:]) + 1}"
            kept = (item,) if item not in query.exclude else ()
            found.append(Ranking(query.query_id, kept, (1.0,) * len(kept)))
        return found


def test_reach_is_what_training_transitions_lead_to() -> None:
    # Transitions: 0 1, 2 3, 1 2, 0 2. Training events of items 0 to 4: 2, 2, 3, 1, 0. Last items: 2, 0, 0, 2.
    reach = shortcut_audit(world(), "shop", {}).reach
    assert reach[ONE_STEP] == Reach(targets=2 / 4, catalogue=(1 + 2 + 2 + 1) / 20, popular=(1 + 5 + 5 + 1) / 32)
    assert reach[TWO_STEPS] == Reach(targets=2 / 4, catalogue=(1 + 3 + 3 + 1) / 20, popular=(1 + 6 + 6 + 1) / 32)
    assert reach[BACKWARD] == Reach(targets=1 / 4, catalogue=(2 + 0 + 0 + 2) / 20, popular=(4 + 0 + 0 + 4) / 32)
    assert astuple(reach[FROM_ANY]) == pytest.approx((2 / 4, 3 / 5, 6 / 8))
    assert reach[ONE_STEP].lift == pytest.approx(0.5 / 0.375)


def test_out_degree_counts_different_followers_of_the_last_item() -> None:
    degree = shortcut_audit(world(), "shop", {}).out_degree
    assert degree.quartiles == (1, 1.5, 2) and degree.none == 0
    assert degree.effective == pytest.approx(1.5)  # item 0 has two equally likely followers, item 2 has one
    assert {name: share for name, share in degree.histogram.items() if share} == {"1": 0.5, "2-3": 0.5}


def test_similarity_by_shared_users() -> None:
    # Users of items 0 to 4 in training: AD, AC, BCD, B, none. Targets stand at 100, 100, 100 / 6 and 50.
    similarity = shortcut_audit(world(), "shop", {}).similarity[USERS]
    assert similarity.mean == pytest.approx((100 + 100 + 100 / 6 + 50) / 4)
    assert (similarity.nearest, similarity.unrelated) == (0.5, 0.25)
    assert {place: share for place, share in enumerate(similarity.histogram) if share} == {3: 0.25, 10: 0.25, 19: 0.5}


def test_similarity_by_titles() -> None:
    # "red hat" to its equal: 100. "red shoe" to "blue hat" and to "green": alike nothing, which stand at 100 / 6 each,
    # as two of the three others share a word with it. "red hat" to "red shoe": one above, one as like, one below.
    vectors = title_vectors(WORDS)
    cosine = (vectors @ vectors.T).toarray()
    assert cosine[2, 3] == pytest.approx(1)
    assert cosine[0, 1] == cosine[0, 4] == 0
    log = np.log
    red, shoe, blue, hat = log(5 / 3), log(5), log(5), log(5 / 3)
    assert cosine[2, 0] == pytest.approx(red * red / np.hypot(red, hat) / np.hypot(red, shoe))
    assert cosine[2, 1] == pytest.approx(hat * hat / np.hypot(red, hat) / np.hypot(blue, hat))
    similarity = shortcut_audit(world(), "shop", {}).similarity[TITLES]
    assert similarity.unrelated == 0.5
    assert similarity.mean == pytest.approx((100 + 100 / 6 + 100 / 6 + 50) / 4)


def test_a_target_that_repeats_the_last_item_has_no_percentile() -> None:
    audit = shortcut_audit(world(events=[(0, 1, 2, 2)]), "shop", {})
    assert audit.targets.repeat_last == 1
    assert audit.similarity[USERS] == Similarity(mean=50, nearest=0, unrelated=0, histogram=(0.0,) * 20)


def test_percentiles_leave_the_last_item_out_and_halve_ties() -> None:
    similarity = np.array([[9.0, 1.0, 1.0, 0.0, 3.0], [0.0, 0.0, 5.0, 0.0, 0.0]])
    found = percentiles(similarity, np.array([0, 2]), np.array([1, 3]))
    assert found.tolist() == [50.0, 50.0]  # one below, one tied, one above of three; three tied
    assert percentiles(similarity, np.array([0, 2]), np.array([4, 0])).tolist() == [100.0, 50.0]
    assert percentiles(np.ones((1, 2)), np.array([0]), np.array([1])).tolist() == [50.0]


def test_targets() -> None:
    audit = shortcut_audit(world(), "shop", {})
    assert audit.targets == Targets(
        cold=0.25, repeated=0.25, repeat_last=0.0, popular_10=1.0, popular_percent=0.0, tied=0.25
    )
    assert (audit.num_items, audit.num_train_events, audit.num_queries, audit.sample) == (5, 8, 4, 4)
    assert (audit.median_history, audit.longer) == (3, {1: 1.0, 2: 1.0, 5: 0.0})
    assert audit.immediate_repeats == 0


def test_immediate_repeats_are_counted_in_training_within_users() -> None:
    audit = shortcut_audit(world(events=[(0, 0, 1, 1, 2, 3), (1, 2, 3, 4)]), "shop", {})
    assert audit.immediate_repeats == 2 / 4  # 0 0, 0 1, 1 1 and 1 2; the step from one user to the next is none


def test_ties_cannot_be_known_without_times() -> None:
    assert shortcut_audit(world(has_times=False), "shop", {}).targets.tied is None


def test_a_model_is_shown_parts_of_histories_and_may_return_the_same_items() -> None:
    model = NextNumber()
    (found,) = shortcut_audit(world(), "shop", {"next": model}).dependence
    assert found.model == "next" and found.ndcg.mean == 0.5  # 2 3 and 0 1 are right
    histories = [tuple(item.item_id for item in query.history) for query in model.asked]
    assert histories[:4] == [("i0", "i1", "i2"), ("i2", "i3", "i0"), ("i1", "i2", "i0"), ("i0", "i2", "i2")]
    assert histories[4:8] == histories[:4]  # the last 5 are all
    assert histories[8:12] == [history[-2:] for history in histories[:4]]
    assert histories[12:16] == [history[-1:] for history in histories[:4]]
    assert histories[16:20] == [history[::-1] for history in histories[:4]]
    assert [sorted(history) for history in histories[20:]] == [sorted(history) for history in histories[:4]]
    for number, query in enumerate(model.asked):
        assert query.exclude == set(histories[number % 4])
    assert set(found.shares.values()) == {None}  # some resamples of four users hold no hit


def test_a_share_is_paired_and_draws_users_whole() -> None:
    whole = np.array([1.0, 0.5, 1.0, 0.25])
    assert share_interval(whole / 2, whole, np.arange(4)) == Interval(mean=0.5, low=0.5, high=0.5)
    one_user = share_interval(np.array([1.0, 0, 0, 0]), whole, np.zeros(4))
    assert one_user == Interval(mean=1 / 2.75, low=1 / 2.75, high=1 / 2.75)
    several = share_interval(np.array([1.0, 0, 0, 0]), whole, np.arange(4))
    assert several is not None and several.low == 0 and several.high > 0.5


def test_ndcg_of_tied_scores_is_the_expected_one() -> None:
    rankings = [Ranking("a", ("x", "y"), (1.0, 1.0)), Ranking("b", ("x",), (1.0,)), Ranking("c", (), ())]
    expected = [(1 + 1 / np.log2(3)) / 2, 0.0, 0.0]
    np.testing.assert_allclose(ndcg(*count_rankings(rankings, ["y", "y", "y"]), 10), expected)


def test_a_sample_is_seeded_and_the_rest_counts_all() -> None:
    first, second = (shortcut_audit(world(), "shop", {}, max_queries=2, seed=seed) for seed in (1, 1))
    assert first == second
    assert (first.sample, first.num_queries, first.seed) == (2, 4, 1)
    assert first.reach == shortcut_audit(world(), "shop", {}).reach


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_queries=0 must be at least 1"):
        shortcut_audit(world(), "shop", {}, max_queries=0)
    with pytest.raises(ConfigError, match="'shop' has no test event with a history before it"):
        shortcut_audit(world(events=[(0, 1)]), "shop", {})


# ---- what people read ------------------------------------------------------------------------------------------------

HALF = Interval(mean=0.5, low=0.4, high=0.6)
GOOD = ShortcutAudit(
    domain="books",
    num_items=1000,
    num_train_events=9000,
    num_queries=5000,
    sample=2000,
    seed=0,
    tie_order="source",
    median_history=20.0,
    longer={1: 1.0, 2: 1.0, 5: 0.75},
    targets=Targets(cold=0.0, repeated=0.0, repeat_last=0.0, popular_10=0.01, popular_percent=0.01, tied=0.01),
    immediate_repeats=0.0,
    out_degree=OutDegree(none=0.0, quartiles=(5.0, 10.0, 15.0), effective=9.0, histogram={"none": 0.25, "1": 0.75}),
    reach={
        ONE_STEP: Reach(targets=0.04, catalogue=0.01, popular=0.02),
        TWO_STEPS: Reach(targets=0.3, catalogue=0.1, popular=0.2),
        BACKWARD: Reach(targets=0.01, catalogue=0.01, popular=0.02),
        FROM_ANY: Reach(targets=0.2, catalogue=0.1, popular=0.2),
    },
    similarity={
        USERS: Similarity(mean=60.0, nearest=0.04, unrelated=0.5, histogram=(0.05,) * 20),
        TITLES: Similarity(mean=70.0, nearest=0.2, unrelated=0.5, histogram=(0.0,) * 19 + (1.0,)),
    },
    dependence=(
        Dependence(
            model="a <walk>",
            ndcg=Interval(mean=0.1, low=0.09, high=0.11),
            shares=dict.fromkeys(("last 5", "last 2", "last 1", "reversed", SHUFFLED), HALF),
            smallest_difference=0.002,
        ),
    ),
)


def told(audit: ShortcutAudit) -> dict[str, list[str]]:
    """The findings by kind."""
    return {kind: [f.text for f in findings(audit) if f.kind == kind] for kind in (CANNOT, CARE, CAN)}


def test_a_data_set_without_shortcuts_can_show_much() -> None:
    assert told(GOOD) == {
        CANNOT: [],
        CARE: [
            "a difference of less than about 0.0020 NDCG@10 will not show (2% of the a <walk>'s 0.1000)",
            "20% of the targets are among the 1% of the items nearest to the last one by the words of their titles",
        ],
        CAN: [
            "only 4% of the targets ever followed the last item in training: what a model finds beyond these is more "
            "than a pair that it has seen",
            "a <walk>: the last event alone gives 50% [40, 60] of the NDCG@10: older events count",
            "a <walk>: order counts, shuffled histories give 50% [40, 60] of the NDCG@10",
        ],
    }


WIDE = "a <walk>: order shows no gain, shuffled histories give 120% [60, 250] of the NDCG@10; so wide an interval"


def with_share(name: str, share: Interval | None) -> ShortcutAudit:
    model = GOOD.dependence[0]
    return replace(GOOD, dependence=(replace(model, shares={**model.shares, name: share}),))


@pytest.mark.parametrize(
    ("audit", "kind", "start"),
    [
        (replace(GOOD, num_queries=999), CANNOT, "999 queries, fewer than 1,000: no claim"),
        (replace(GOOD, median_history=5.0), CANNOT, "half of the histories have 5 events or fewer"),
        (replace(GOOD, targets=replace(GOOD.targets, tied=0.43)), CANNOT, "43% of the targets are decided by the"),
        (replace(GOOD, targets=replace(GOOD.targets, tied=0.1)), CARE, "10% of the targets are decided by the order"),
        (replace(GOOD, targets=replace(GOOD.targets, tied=0.43)), CARE, "a <walk>: order counts, shuffled histories"),
        (replace(GOOD, targets=replace(GOOD.targets, tied=None)), CARE, "times are an order only"),
        (replace(GOOD, targets=replace(GOOD.targets, cold=0.1)), CARE, "10% of the targets have no training event"),
        (replace(GOOD, targets=replace(GOOD.targets, repeated=0.2)), CARE, "20% of the targets are in the history"),
        (
            replace(GOOD, targets=replace(GOOD.targets, popular_10=0.1)),
            CARE,
            "the same 10 items for everybody find 10%",
        ),
        (
            with_share("last 1", Interval(mean=0.95, low=0.9, high=1.0)),
            CANNOT,
            "a <walk>: the last event alone gives 95%",
        ),
        (with_share(SHUFFLED, Interval(mean=0.97, low=0.9, high=1.1)), CANNOT, "a <walk>: order shows no gain"),
        (with_share(SHUFFLED, Interval(mean=1.2, low=0.6, high=2.5)), CANNOT, WIDE),
        (replace(GOOD, sample=999), CANNOT, "models were asked 999 queries, fewer than 1,000"),
        (with_share(SHUFFLED, None), CANNOT, "a <walk> finds too little to say"),
    ],
)
def test_findings(audit: ShortcutAudit, kind: str, start: str) -> None:
    assert any(text.startswith(start) for text in told(audit)[kind]), told(audit)


def test_few_queries_show_nothing_that_a_model_can_do() -> None:
    few = replace(GOOD, sample=31, num_queries=31)
    assert not any(text.startswith("a <walk>") for text in told(few)[CAN])
    flat = replace(GOOD.dependence[0], smallest_difference=0.0)  # one query: no interval, and so no least difference
    assert not any("will not show" in text for f in told(replace(GOOD, dependence=(flat,))).values() for text in f)


def test_ties_that_were_drawn_are_no_artefact_of_the_file() -> None:
    drawn = told(replace(GOOD, tie_order="shuffle", targets=replace(GOOD.targets, tied=0.43)))
    assert drawn[CANNOT] == []
    assert any("which was drawn" in text for text in drawn[CARE])
    assert "a <walk>: order counts, shuffled histories give 50% [40, 60] of the NDCG@10" in drawn[CAN]


def test_findings_of_reach() -> None:
    def reached(name: str, targets: float, popular: float) -> list[str]:
        reach = GOOD.reach | {name: Reach(targets=targets, catalogue=0.1, popular=popular)}
        return [finding.text for finding in findings(replace(GOOD, reach=reach))]

    assert any(text.startswith("30% of the targets followed the last item") for text in reached(ONE_STEP, 0.3, 0.1))
    assert any("(3.0 times as many as popularity explains)" in text for text in reached(ONE_STEP, 0.3, 0.1))
    assert any(
        text.startswith("two steps: 90% of the targets are in reach, but so are 80%")
        for text in reached(TWO_STEPS, 0.9, 0.8)
    )
    assert any("pairs carry no direction" in text for text in reached(BACKWARD, 0.04, 0.02))


def test_the_table_says_what_its_columns_are() -> None:
    table = shortcut_table([GOOD, replace(GOOD, domain="films", dependence=())])
    assert [column.head for column in table.columns] == ["domain", *reading([GOOD])]
    books, films = (
        {head: cell.text for head, cell in zip(reading([GOOD]), row.cells[1:], strict=True)} for row in table.rows
    )
    assert books["1 step"] == "4.0% (2.0%)" and books["last 1"] == "50 [40, 60]"
    assert films["last 1"] == films["NDCG@10"] == "-"
    assert "last 1" not in reading([replace(GOOD, dependence=())])


def test_the_terminal_gets_domains_side_by_side_as_they_fit() -> None:
    out = io.StringIO()
    print_shortcuts([replace(GOOD, domain=f"domain_number_{number}") for number in range(12)], out)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 120
    for number in range(12):
        assert len(re.findall(rf"domain_number_{number}\b", text)) == 2  # in a table, and above its findings


def test_the_page_is_whole_and_well_formed(tmp_path: Path) -> None:
    page, record = tmp_path / "page.html", tmp_path / "record.json"
    protocol = {"ties in time": "<source> order"}
    write_shortcuts(page, record, "a & b", [GOOD, with_share("last 1", None)], protocol)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "record.json"]
    text = page.read_text()
    assert text == shortcut_page("a & b", [GOOD, with_share("last 1", None)], protocol)
    assert "a &lt;walk&gt;" in text and "<walk>" not in text and "shortcuts in a &amp; b" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    assert "http" not in text and "<script" not in text
    assert "<dd>&lt;source&gt; order</dd>" in text
    assert json.loads(record.read_text())["protocol"] == protocol
    numbers = json.loads(record.read_text())["domains"]["books"]
    assert numbers["reach"]["two steps"]["targets"] == 0.3
    assert numbers["dependence"][0]["shares"]["last 1"] is None
    assert numbers["findings"][0]["kind"] in (CANNOT, CARE, CAN)
