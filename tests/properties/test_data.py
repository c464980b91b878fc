from __future__ import annotations

import itertools
import random
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.data.build import build_dataset
from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import clean_title, spelling
from cprec.data.config import Rules, SplitSpec
from cprec.data.dataset import read_dataset, read_manifest
from cprec.data.interactions import SECOND, Interactions, stable_order
from cprec.data.sequences import build_sequences, interleaved
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import Split, make_split
from cprec.errors import DataError
from cprec.schema import KINDS, DomainInfo

DOMAINS = ("books", "games", "toys")
NUM_ITEMS = 4
LEAVE_ONE_OUT = SplitSpec()

events = st.tuples(
    st.integers(0, 3), st.integers(0, len(DOMAINS) - 1), st.integers(0, NUM_ITEMS - 1), st.integers(0, 30)
)
logs = st.lists(events, min_size=1, max_size=80)


def split_of(rows: list[tuple[int, int, int, int]], timeless: bool = True, spec: SplitSpec = LEAVE_ONE_OUT) -> Split:
    """Three domains of four items; `games` has no real times unless said otherwise."""
    ids = [str(number) for number in range(NUM_ITEMS)]
    catalogue = Catalogue.from_tables({name: pa.table({"item_id": ids, "title": ids}) for name in DOMAINS})
    user, domain, item, time = np.array(rows).T
    order = stable_order(user, time)
    log = Interactions(
        platforms=("shop",),
        user_platform=np.zeros(4, dtype=np.int16),
        user_id=np.array(["a", "b", "c", "d"], dtype=object),
        user=user[order],
        item=(domain * NUM_ITEMS + item)[order],
        time=time[order],
        rating=np.full(len(rows), np.nan),
    )
    infos = {name: DomainInfo(name, "shop", not (timeless and name == "games")) for name in DOMAINS}
    return make_split(catalogue, log, infos, spec)


def apply_rules(rows: list[tuple[str, str, float]], k_core: int) -> list[tuple[str, str, float]]:
    """The rules of `build_dataset` in plain Python: (user, item, time) sorted by user, time and place in the source."""
    kept = sorted(dict.fromkeys(rows), key=lambda row: (row[0], row[2]))
    while True:
        before = kept
        kept = [row for at, row in enumerate(kept) if not at or row[:2] != kept[at - 1][:2]]
        users = Counter(user for user, _, _ in kept)
        kept = [row for row in kept if users[row[0]] >= k_core]
        items = Counter(item for _, item, _ in kept)
        kept = [row for row in kept if items[row[1]] >= k_core]
        if kept == before:
            return kept


@st.composite
def some_events(draw: st.DrawFn) -> list[tuple[str, str, float]]:
    """Events of one domain, by a seed, some a part of a second apart: enough of them that a core is mostly left."""
    generator = random.Random(draw(st.integers(0, 1_000_000)))
    size = draw(st.sampled_from([40, 55, 25, 3]))
    return [(generator.choice("abcdef"), generator.choice("wxyz"), generator.randrange(12) / 8) for _ in range(size)]


@pytest.mark.slow
@settings(max_examples=5)  # each one starts an engine
@given(some_events(), st.sampled_from([3, 5, 8, 2, 0]))
def test_rules_in_the_table_engine_equal_plain_python(rows: list[tuple[str, str, float]], k_core: int) -> None:
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    titles = sorted(set(items))
    source = MemorySource(
        "toys",
        "shop",
        pa.table({"item_id": titles, "title": titles}),
        pa.table({"user_id": users, "item_id": items, "timestamp": times}),
    )
    expected = apply_rules(rows, k_core)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        try:
            build_dataset([source], path, Rules(k_core=k_core))
        except DataError:
            assert not expected
            return
        catalogue, log, _ = read_dataset(path)
        manifest = read_manifest(path)
    found = zip(log.user_id[log.user], catalogue.item_id[log.item], (log.time / SECOND).tolist(), strict=True)
    assert sorted(found, key=lambda row: row[0]) == expected, "users by id; the rest is in order"
    check_counts(manifest["domains"]["toys"], len(rows), expected)


@given(logs)
def test_leave_one_out_partitions_and_keeps_the_order(rows: list[tuple[int, int, int, int]]) -> None:
    split = split_of(rows)
    masks = np.stack([split.events(part) for part in ("train", "validation", "test")])
    assert (masks.sum(axis=0) == 1).all()
    event_domain = split.catalogue.domain[split.interactions.item]
    for user in range(4):
        for domain in range(len(DOMAINS)):
            parts = split.part[(split.interactions.user == user) & (event_domain == domain)].tolist()
            expected = [0] * (len(parts) - 2) + [1, 2] if len(parts) >= 3 else [0] * len(parts)
            assert parts == expected


@given(logs, st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_sequences_hold_each_training_event_at_most_once_and_no_other(
    rows: list[tuple[int, int, int, int]], min_events: int, more: int, pooled: bool
) -> None:
    split = split_of(rows)
    max_events = min_events + more
    sequences = build_sequences(split, DOMAINS, min_events=min_events, max_events=max_events, pooled=pooled)
    train = split.events("train")
    event_domain = split.catalogue.domain[split.interactions.item]
    row_of = np.repeat(np.arange(len(sequences)), sequences.lengths)
    for kind in range(len(KINDS)):
        used = sequences.event[(sequences.kind == kind)[row_of]]
        assert len(np.unique(used)) == len(used)
        assert train[used].all()
    assert (sequences.lengths <= max_events).all()
    for row in range(len(sequences)):
        held = sequences.event[sequences.offsets[row] : sequences.offsets[row + 1]]
        assert (np.diff(held) > 0).all(), "in the user's order"
        assert (split.interactions.user[held] == sequences.user[row]).all()
        if sequences.kind[row] == KINDS.index("specific"):
            assert (event_domain[held] == sequences.domain[row]).all()
        else:
            assert sequences.domain[row] == -1
            assert len(np.unique(event_domain[held])) >= 2
            assert DOMAINS.index("games") not in event_domain[held], "it has no real times"
            assert len(held) >= min_events


@given(logs, st.integers(1, 4), st.integers(0, 6))
def test_specific_sequences_cover_and_their_sizes_differ_by_at_most_one(
    rows: list[tuple[int, int, int, int]], min_events: int, more: int
) -> None:
    split = split_of(rows)
    max_events = min_events + more
    sequences = build_sequences(split, DOMAINS, min_events=min_events, max_events=max_events, kinds=["specific"])
    event_domain = split.catalogue.domain[split.interactions.item]
    for user in range(4):
        for domain in range(len(DOMAINS)):
            mask = (split.interactions.user == user) & (event_domain == domain) & split.events("train")
            sizes = sequences.lengths[(sequences.user == user) & (sequences.domain == domain)]
            if mask.sum() < min_events:
                assert not len(sizes)
            else:
                assert sizes.sum() == mask.sum()
                assert len(sizes) == -(-mask.sum() // max_events)
                assert sizes.max() - sizes.min() <= 1


@given(logs, st.sampled_from(["specific", "mixed"]), st.sampled_from(["validation", "test"]), st.integers(0, 5))
def test_histories_come_before_their_target_and_hold_no_test_event(
    rows: list[tuple[int, int, int, int]], kind: str, part: str, max_history: int
) -> None:
    split = split_of(rows, timeless=False)
    event_domain = split.catalogue.domain[split.interactions.item]
    for number, domain in enumerate(DOMAINS):
        queries = split.queries(domain, part, history_kind=kind, max_history=max_history, min_history=0)
        assert queries.event.tolist() == np.flatnonzero((event_domain == number) & split.events(part)).tolist()
        assert len(set(queries.query_id)) == len(queries)
        for row, event in enumerate(queries.event):
            known = np.flatnonzero(
                (split.interactions.user == split.interactions.user[event])
                & (np.arange(len(split.part)) < event)
                & ~split.events("test")
                & ((event_domain == number) | (kind == "mixed"))
            )
            assert (
                queries.history[row].tolist() == split.interactions.item[known[-max_history or len(known) :]].tolist()
            )


@given(
    st.lists(st.tuples(st.integers(-(2**62), 2**62), st.integers(0, 5), st.integers(-3, 3)), max_size=50),
    st.booleans(),
)
def test_packed_keys_sort_as_separate_ones(rows: list[tuple[int, int, int]], wide: bool) -> None:
    keys = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    if not wide:
        keys[0] %= 1000
    expected = sorted(range(len(rows)), key=lambda row: tuple(keys[:, row]))
    assert stable_order(*keys).tolist() == expected


@given(st.text() | st.text(alphabet="&amp;quot#39;<b>/.'\" \n…", max_size=40))
def test_a_clean_title_is_one_line_and_stays_as_it_is(text: str) -> None:
    title = clean_title(text)
    assert clean_title(title) == title
    assert title == title.strip()
    assert len(title.splitlines()) <= 1
    assert '"' not in title and not title.endswith(".")


ODD = "<>&;=/!-#39bBr'\"\u2018\u2019. \n\u00a0\u2026\u0301\u1112\u1161\u0645\u094d\u200b\u200c\u200d\u2067\ufe0f\u3164"
ODD += "\u2764\U0001f3f4\U000e0067\U000e007f"


@given(st.text(alphabet=ODD, max_size=30))
def test_cleaning_ends_at_a_text_that_it_leaves_alone(text: str) -> None:
    title = clean_title(text)
    assert clean_title(title) == title
    assert not set(title) & set('"\n\u00a0\u200b\u2067\u3164') and "  " not in title
    assert unicodedata.is_normalized("NFC", title)
    assert title[:1] not in ("\u200c", "\u200d") and title[-1:] not in (".", "\u200c")


@given(st.text(max_size=20) | st.text(alphabet=ODD, max_size=20))
def test_a_spelling_is_that_of_itself_and_of_the_clean_title(text: str) -> None:
    assert spelling(text) == spelling(clean_title(text)) == spelling(spelling(text))


def apply_pooled_rules(
    rows: dict[str, list[tuple[str, str, float]]], k_core: int
) -> dict[str, list[tuple[str, str, float]]]:
    """The rules with the users of all domains counted together, in plain Python."""
    kept = {domain: sorted(dict.fromkeys(some), key=lambda row: (row[0], row[2])) for domain, some in rows.items()}
    while True:
        before = kept
        kept = {d: [r for at, r in enumerate(s) if not at or r[:2] != s[at - 1][:2]] for d, s in kept.items()}
        users = Counter(user for some in kept.values() for user, _, _ in some)
        kept = {domain: [row for row in some if users[row[0]] >= k_core] for domain, some in kept.items()}
        items = {domain: Counter(item for _, item, _ in some) for domain, some in kept.items()}
        kept = {domain: [row for row in some if items[domain][row[1]] >= k_core] for domain, some in kept.items()}
        if kept == before:
            return kept


@pytest.mark.slow
@settings(max_examples=10)  # each one starts an engine
@given(
    some_events(),
    some_events(),
    some_events(),
    st.sampled_from([5, 8, 10, 2, 0]),
)
def test_a_pooled_core_equals_plain_python(
    films: list[tuple[str, str, float]],
    toys: list[tuple[str, str, float]],
    books: list[tuple[str, str, float]],
    k_core: int,
) -> None:
    shop = {"films": films, "toys": toys}
    library = {"books": books}  # of another platform: users of the same names are other people
    sources = []
    for platform, domains in (("shop", shop), ("library", library)):
        for domain, some in domains.items():
            users, items, times = (list(column) for column in zip(*some, strict=True))
            titles = sorted(set(items))
            sources.append(
                MemorySource(
                    domain,
                    platform,
                    pa.table({"item_id": titles, "title": titles}),
                    pa.table({"user_id": users, "item_id": items, "timestamp": times}),
                )
            )
    expected = apply_pooled_rules(shop, k_core) | apply_pooled_rules(library, k_core)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        try:
            build_dataset(sources, path, Rules(k_core=k_core, k_core_scope="pooled"))
        except DataError:
            assert not all(expected.values())
            return
        catalogue, log, _ = read_dataset(path)
        manifest = read_manifest(path)
    assert set(catalogue.domains) == set(expected)
    for number, domain in enumerate(catalogue.domains):
        mask = catalogue.domain[log.item] == number
        ids = catalogue.item_id[log.item[mask]]
        found = zip(log.user_id[log.user[mask]], ids, (log.time[mask] / SECOND).tolist(), strict=True)
        assert sorted(found, key=lambda row: row[0]) == expected[domain]
        check_counts(manifest["domains"][domain], len((shop | library)[domain]), expected[domain])


def check_counts(about: dict[str, Any], num_read: int, left: list[tuple[str, str, float]]) -> None:
    """Each rule's report: what it left and removed adds up from what was read to what is there."""
    counts = about["counts"]
    assert counts[0]["events"] == num_read
    for before, after in itertools.pairwise(counts):
        assert after["removed"] == before["events"] - after["events"] >= 0
    last = counts[-1]
    if "too_few_events" in last:
        assert last["consecutive_repeats"] + last["too_few_events"] == last["removed"]
    assert (last["events"], last["users"], last["items"]) == (
        len(left),
        len({user for user, _, _ in left}),
        len({item for _, item, _ in left}),
    )
    assert (about["num_events"], about["num_users"]) == (last["events"], last["users"])


@given(logs, st.integers(1, 3), st.integers(1, 3))
def test_last_n_partitions_and_keeps_the_order(
    rows: list[tuple[int, int, int, int]], num_validation: int, num_test: int
) -> None:
    spec = SplitSpec(method="last-n", num_validation=num_validation, num_test=num_test)
    split = split_of(rows, spec=spec)
    event_domain = split.catalogue.domain[split.interactions.item]
    asked = Counter()
    for user in range(4):
        for domain in range(len(DOMAINS)):
            parts = split.part[(split.interactions.user == user) & (event_domain == domain)].tolist()
            num_train = len(parts) - num_validation - num_test
            held_out = [0] * num_train + [1] * num_validation + [2] * num_test
            assert parts == (held_out if num_train > 0 else [0] * len(parts))
            asked[domain] += num_test * (num_train > 0)
    for number, domain in enumerate(DOMAINS):
        queries = split.queries(domain, "test", max_history=5)
        assert len(queries) == len(set(queries.query_id)) == asked[number]


@given(logs, st.lists(st.booleans(), min_size=3, max_size=3))
def test_interleaving_keeps_the_order_of_each_run_and_spreads_it(
    rows: list[tuple[int, int, int, int]], has_times: list[bool]
) -> None:
    split = split_of(rows)
    user = split.interactions.user
    domain = split.catalogue.domain[split.interactions.item]
    run = np.where(np.array(has_times)[domain], -1, domain)
    order = interleaved(user, run)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert (user[order] == user).all(), "each user's events stay together"
    for someone in range(4):
        mine = order[user[order] == someone]
        for number in set(run[mine].tolist()):
            events = np.flatnonzero((user == someone) & (run == number))
            assert mine[run[mine] == number].tolist() == events.tolist()
            for other in set(run[mine].tolist()) - {number}:
                # Between two neighbours of one run lies at most its fair share of another, rounded up.
                places = np.flatnonzero(run[mine] == number)
                between = np.diff(np.cumsum(run[mine] == other)[places])
                size = np.count_nonzero(run[mine] == other)
                assert (between <= -(-size // len(events))).all()
