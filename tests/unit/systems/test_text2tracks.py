"""Items that are asked for in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.batch import IGNORE
from cprec.data.build import build_dataset
from cprec.data.config import Rules, SplitSpec
from cprec.data.dataset import read_dataset
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import Split, make_split
from cprec.errors import ConfigError, DataError
from cprec.rank.system import SystemRecommender
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems import fit as fitting
from cprec.systems.batches import Passes
from cprec.systems.codes import BEGIN, PADDING
from cprec.systems.recipes.text2tracks import AskingStream, Text2Tracks
from cprec.systems.signals import TrainingSequences

COLOURS, THINGS = ("red", "blue", "green"), ("shoe", "hat", "bag", "cup")
TITLES = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS]
SILENT = 7
"""The blue cup, whose title does not say that it is one."""
SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_levels": 2, "num_codes": 4}
SMALL |= {"batch_size": 32, "num_epochs": 1, "beam_width": 12, "text_size": 8, "num_words": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Users have things of one kind, of any colour."""
    generator = np.random.default_rng(0)
    events = [
        (f"u{user:02}", f"i{4 * colour + user % 4:02}", time)
        for user in range(40)
        for time, colour in enumerate(generator.integers(0, 3, 6))
    ]
    log = pa.table(list(zip(*events, strict=True)), ["user_id", "item_id", "timestamp"])
    titles = ["a blue" if number == SILENT else title for number, title in enumerate(TITLES)]
    items = pa.table([[f"i{n:02}" for n in range(12)], titles], ["item_id", "title"])
    folder = tmp_path_factory.mktemp("things") / "data"
    build_dataset([MemorySource("things", "p", items, log)], folder, Rules(k_core=0, drop_consecutive_repeats=False))
    return make_split(*read_dataset(folder), SplitSpec())


@pytest.fixture(scope="module")
def data(split: Split) -> TrainingSequences:
    return TrainingSequences.of(split, "things")


def rows_of(stream: AskingStream, codes: Any) -> list[tuple[int, set[int]]]:
    """Items of all rows of a stream, and the words before them."""
    item_of = {tuple(codes.sequences[item].tolist()): item for item in range(12)}
    found = []
    for batch in stream:
        for ids, targets in zip(batch.rows["input_ids"], batch.rows["targets"], strict=True):
            assert ids[2] == BEGIN and (targets[:2] == IGNORE).all()
            words = {int(token) - codes.vocabulary_size for token in ids[:2] if token != PADDING}
            found.append((item_of[tuple(targets[targets != IGNORE].tolist())], words))
    return found


def test_some_words_of_an_item_ask_for_it(data: TrainingSequences) -> None:
    codes = Text2Tracks(**SMALL).codes(data, 0)
    stream = AskingStream(data, codes, Passes(batch_size=32, num_epochs=20, seed=1), {})
    found = rows_of(stream, codes)
    assert len(found) == 20 * (12 + len(data.sequences.values)), "each item once, and for each event"
    asked: dict[int, set[frozenset[int]]] = {item: set() for item in range(12)}
    for item, words in found:
        asked[item].add(frozenset(words))
    for item in range(12):
        one, *other = codes.of_items[item].tolist()
        both = {frozenset({one, *other}), frozenset({one}), *(frozenset({word}) for word in other)}
        assert asked[item] == both, "any of its words, and never none"


def test_queries_of_users_ask_for_the_event_right_after_them(data: TrainingSequences, tmp_path: Path) -> None:
    said = [(data.users[0], 2, "gift green"), (data.users[0], 4, "never learnt"), (data.users[3], 0, "bag")]
    lines = [json.dumps({"user": user, "after": after, "text": text}) for user, after, text in said]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    settings = Text2Tracks(**SMALL, queries=str(tmp_path / "queries.jsonl"))
    codes = settings.codes(data, 0)
    stream = settings.stream(data, codes, 0)
    assert isinstance(stream, AskingStream)
    found = [(item, words) for item, words in rows_of(stream, codes)]
    assert len(found) == 2 + 12, "the third asks for what is held out; items stand for themselves once"
    number = codes.words.number
    assert (int(data.sequences[0][2]), {number["green"]}) in found and (
        int(data.sequences[3][0]),
        {number["bag"]},
    ) in found


def test_queries_without_a_word_that_counts_ask_for_nothing(data: TrainingSequences, tmp_path: Path) -> None:
    path, user = tmp_path / "queries.jsonl", data.users[0]
    lines = [json.dumps({"user": user, "after": after, "text": text}) for after, text in ((1, "qwertz"), (2, "green"))]
    settings = Text2Tracks(**SMALL, queries=str(path))
    path.write_text("\n".join(lines))
    stream = settings.stream(data, codes := settings.codes(data, 0), 0)
    assert isinstance(stream, AskingStream) and len(rows_of(stream, codes)) == 1 + 12
    path.write_text(lines[0])
    with pytest.raises(ConfigError, match="queries: no text there has a word of an item's title"):
        settings.stream(data, codes, 0)


def test_errors_name_the_setting_of_queries(data: TrainingSequences, tmp_path: Path) -> None:
    settings = Text2Tracks(**SMALL, queries=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"^queries=.*none\.jsonl cannot be read"):
        settings.stream(data, settings.codes(data, 0), 0)


def made(split: Split, **changed: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "VALIDATIONS", 1)
        return Text2Tracks(**{**SMALL, **changed}).make(split, "things", seed=1)


def ranked(recommender: Any, text: str, *items: int, k: int = 12) -> tuple[list[int], tuple[float, ...]]:
    history = tuple(Item("things", f"i{item:02}") for item in items)
    (ranking,) = recommender.rank([RankingQuery("q", "things", history, text=text)], k)
    return [int(item[1:]) for item in ranking.item_ids], ranking.scores


@pytest.mark.slow
def test_words_find_their_item_and_so_do_words_that_it_does_not_have(split: Split) -> None:
    trained = made(split, num_epochs=80, learning_rate=1e-2)
    for number, title in enumerate(TITLES):
        found, _ = ranked(trained, title)
        assert found[0] == number, "also the blue cup, by the company that it keeps in histories"
    assert set(ranked(trained, "cup")[0][:3]) == {3, SILENT, 11}


def test_without_a_text_the_latest_item_is_asked_for(split: Split) -> None:
    recommender = made(split, num_epochs=0.2)
    assert ranked(recommender, "", 0, 6) == ranked(recommender, TITLES[6], 1, 2), "nor are histories read"
    assert ranked(recommender, "", 0, 6) != ranked(recommender, "", 6, 0)
    assert len(ranked(recommender, "")[0]) == 12


def test_people_ask_it_in_words(split: Split) -> None:
    """All items are ranked by the words, also those that have none of them, and nothing else is read."""
    engine = SystemRecommender(made(split, num_epochs=0.2), "Text2Tracks")
    found = engine.recommend(query="cup", k=12)
    assert [(int(one.item_id[1:]), one.score) for one in found] == [
        *zip(*ranked(engine.recommender, "cup"), strict=True)
    ]
    assert {one.words for one in found} == {("cup",), ()}
    assert engine.recommend(query="\uff23\uff35\uff30", k=12) == found, "forms of Unicode are alike"
    with pytest.warns(UserWarning, match="Text2Tracks reads the query alone, not the history"):
        assert engine.recommend(["i00"], query="cup", exclude_seen=False, k=12) == found
    after = RankingQuery("q", "things", (Item("things", "i00"),))
    assert engine.shown(after) == after.history and not engine.shown(engine.asked_in_words(after, "cup"))
    for nothing in ("qwertz", "a"):
        with pytest.raises(DataError, match=f"query='{nothing}' has no word that Text2Tracks has learnt"):
            engine.recommend(query=nothing)
    with pytest.raises(DataError, match="has no word: give words"):
        engine.recommend(query="?!")


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_words=0 must be above 0"):
        Text2Tracks(num_words=0)
    with pytest.raises(ConfigError, match="patience=2: next items cannot judge"):
        Text2Tracks(patience=2)
