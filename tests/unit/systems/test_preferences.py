"""Words before codes, preferences that are older than what is learnt, and Mender."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.batch import IGNORE
from cprec.data.build import build_dataset
from cprec.data.catalogue import Catalogue
from cprec.data.config import Rules, SplitSpec
from cprec.data.dataset import read_dataset
from cprec.data.ragged import Ragged
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import Split, make_split
from cprec.errors import ConfigError, DataError, LeakageError, Unsuitable
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import VALIDATION, Item
from cprec.systems import fit as fitting
from cprec.systems.batches import Passes
from cprec.systems.codes import BEGIN, PADDING, ItemCodes
from cprec.systems.items import write_vectors
from cprec.systems.preferences import PreferenceCodes, Preferences, PreferenceStream, Taught, chosen, read_preferences
from cprec.systems.recipes.mender import Mender
from cprec.systems.recipes.tiger import TIGER
from cprec.systems.signals import TrainingSequences
from cprec.systems.words import WordedCodes, Words, steering

COLOURS, THINGS = ("red", "blue", "green"), ("shoe", "hat", "bag", "cup")
TITLES = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS]

SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_levels": 2, "num_codes": 4}
SMALL |= {"batch_size": 16, "num_epochs": 1, "beam_width": 12, "max_length": 4, "text_size": 8}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Users like one colour and one thing, and take things of the one or the other in turn."""
    generator = np.random.default_rng(0)
    events = []
    for user in range(60):
        colour, thing = generator.integers(3), generator.integers(4)
        for time in range(7):
            own = (colour, generator.integers(4)) if generator.random() < 0.5 else (generator.integers(3), thing)
            events.append((f"u{user:02}", f"i{4 * own[0] + own[1]:02}", time))
    log = pa.table(list(zip(*events, strict=True)), ["user_id", "item_id", "timestamp"])
    items = pa.table([[f"i{n:02}" for n in range(12)], TITLES], ["item_id", "title"])
    folder = tmp_path_factory.mktemp("things") / "data"
    build_dataset([MemorySource("things", "p", items, log)], folder, Rules(k_core=0, drop_consecutive_repeats=False))
    return make_split(*read_dataset(folder), SplitSpec())


@pytest.fixture(scope="module")
def data(split: Split) -> TrainingSequences:
    return TrainingSequences.of(split, "things")


def names(words: Words, rows: Ragged) -> list[str]:
    of_number = list(words.number)
    return [" ".join(of_number[word] for word in rows[row]) for row in range(len(rows))]


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_stand_for_the_items_that_have_them(data: TrainingSequences) -> None:
    words = Words.of(data, np.arange(12.0)[:, None], most=2)
    vectors = dict(zip(words.number, words.vectors_WF.ravel().tolist(), strict=True))
    assert vectors["a"] == 5.5 and vectors["red"] == 1.5 and vectors["shoe"] == 4.0
    weights = dict(zip(words.number, words.weight_W, strict=True))
    assert (
        weights["a"] == 0 and weights["red"] == pytest.approx(np.log(3)) and weights["hat"] == pytest.approx(np.log(4))
    )
    found = words.read(["A RED, red hat", "blue shoe green", "a new thing", ""])
    assert names(words, found) == ["red hat", "blue shoe", "", ""], (
        "things weigh more than colours, the first of equals"
    )


def test_titles_without_a_word_of_their_own_are_refused(data: TrainingSequences) -> None:
    names_alone = pa.table({"item_id": ["x", "y"], "title": ["thing", "thing"]})
    alike = replace(data, catalogue=Catalogue.from_tables({"things": names_alone}))
    with pytest.raises(Unsuitable, match="no word in titles, brands and categories of domain 'things'"):
        Words.of(alike, np.ones((2, 1)), most=2)


# ---- preferences -----------------------------------------------------------------------------------------------------


def written(folder: Path, *lines: Any) -> str:
    path = folder / "said.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def said(user: Any, after: Any, text: Any) -> dict[str, Any]:
    return {"user": user, "after": after, "text": text}


def test_stated_preferences_are_known_once_they_were_made(tmp_path: Path, data: TrainingSequences) -> None:
    path = written(tmp_path, said("p/u01", 3, "hats"), said("p/u01", 0, "red"), said("p/u01", 5, "blue cup"))
    words = Words.of(data, np.zeros((12, 1)), most=2)
    preferences = Preferences(words, read_preferences(path, data))
    of = {n: names(words, preferences.of("p/u01", np.empty(0), Ragged.of([]), n)) for n in (0, 2, 3, 5, None)}
    assert of == {0: ["red"], 2: ["red"], 3: ["red", ""], 5: ["red", "", "blue cup"], None: ["red", "", "blue cup"]}
    assert len(preferences.of("p/u02", np.array([1]), Ragged.of([[0], [1]]))) == 0, "a file speaks for its users alone"


@pytest.mark.parametrize(
    ("line", "error", "match"),
    [
        (said("p/u01", 6, "red"), LeakageError, r"line 2: it was made after 6 events of user 'p/u01', who has 5"),
        (said("p/u99", 0, "red"), ConfigError, r"line 2: user 'p/u99' has no training event"),
        (said("p/u01", -1, "red"), ConfigError, r"line 2: after must be a whole number"),
        (said("p/u01", 1, None), ConfigError, r"line 2: .* and text a text"),
        ({"user": "p/u01"}, ConfigError, r"line 2: 'after'; expected user, after and text"),
        ("no json", ConfigError, r"line 2: Expecting value"),
        ("[]", ConfigError, r"line 2: list indices"),
    ],
)
def test_lines_that_are_no_preference_are_refused(
    line: Any, error: type[Exception], match: str, tmp_path: Path, data: TrainingSequences
) -> None:
    path = written(tmp_path, said("p/u00", 5, "red"), line)
    with pytest.raises(error, match=match):
        Mender(**SMALL, preferences=path).codes(data, 0)


def test_files_that_say_nothing_are_refused(tmp_path: Path, data: TrainingSequences) -> None:
    with pytest.raises(ConfigError, match="has no line"):
        read_preferences(written(tmp_path), data)
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read"):
        read_preferences(tmp_path / "none.jsonl", data)
    path = written(tmp_path, said("p/u00", 1, "qwertz"), said("p/u00", 2, ""))
    with pytest.raises(ConfigError, match="preferences: no text there has a word of an item's title"):
        Mender(**SMALL, preferences=path).codes(data, 0)


def test_texts_hold_any_character(tmp_path: Path, data: TrainingSequences) -> None:
    """Some, like U+2028 and U+0085, end lines for Python, and none for JSON."""
    texts = ["red\u2028hat", "caf\u00e9\u0085cup"]
    path = tmp_path / "said.jsonl"
    lines = [json.dumps(said("p/u01", place, text), ensure_ascii=False) for place, text in enumerate(texts)]
    path.write_bytes(("\n".join(lines) + "\n").encode())
    assert read_preferences(path, data) == {"p/u01": [*enumerate(texts)]}


def test_one_of_the_preferences_is_chosen() -> None:
    generator, known = np.random.default_rng(0), Ragged.of([[], [1, 2], [3, 4], [], [2, 5]])

    def pick(which: Taught, *target: int) -> list[int]:
        return chosen(known, which, generator, np.array(target)).tolist()

    assert pick("last") == [2, 5]
    assert pick("nearest", 3) == [3, 4] and pick("nearest", 1, 2) == [1, 2]
    assert pick("nearest", 2) == [2, 5] and pick("nearest", 9) == [2, 5], "of equals the last"
    assert {tuple(pick("random")) for _ in range(50)} == {(), (1, 2), (3, 4), (2, 5)}
    assert chosen(Ragged.of([]), "nearest", generator, np.array([1])).tolist() == []


# ---- rows ------------------------------------------------------------------------------------------------------------


def codes_of(data: TrainingSequences, taught_from: Preferences | None = None) -> PreferenceCodes:
    """Each item's codes are its colour and its thing."""
    plain = ItemCodes.of(np.stack([np.arange(12) // 4, np.arange(12) % 4], 1), num_codes=4)
    worded = WordedCodes.worded(plain, data, np.eye(12), 2)
    return PreferenceCodes(**vars(worded), preferences=taught_from or Preferences(worded.words, None))


@pytest.mark.parametrize("taught", ["last", "random", "nearest"])
def test_what_is_learnt_comes_after_the_preference(data: TrainingSequences, taught: Taught) -> None:
    codes = codes_of(data)
    stream = PreferenceStream(data, codes, 4, Passes(batch_size=32, seed=1), taught)
    item_of = {tuple(codes.sequences[item].tolist()): item for item in range(12)}
    num_rows = num_targets = 0
    for batch in stream:
        for ids, targets, places in zip(
            *(batch.rows[name] for name in ("input_ids", "targets", "position_ids")), strict=True
        ):
            assert (
                ids[2] == BEGIN and (ids[:2] >= codes.vocabulary_size).all() and places.tolist() == [*range(len(ids))]
            )
            learnt = np.flatnonzero(targets != IGNORE)
            cut = (learnt[0] - 2) // 3  # three tokens an item
            assert learnt.tolist() == [*range(2 + 3 * cut, 2 + 3 * cut + len(learnt))] and len(learnt) % 3 == 0 and cut
            row = [*ids[3 : learnt[-1] + 1].tolist(), targets[learnt[-1]]]
            assert np.array_equal(row[3 * cut :], targets[learnt])
            items = [item_of[tuple(row[at : at + 3])] for at in range(0, len(row), 3)]
            told = tuple((ids[:2] - codes.vocabulary_size).tolist())
            before = [tuple(codes.of_items[item].tolist()) for item in items[:cut]]
            assert told in before if taught != "last" else told == before[-1]
            if taught == "nearest":
                common = [len({*words} & {*codes.of_items[items[cut]].tolist()}) for words in before]
                assert common[before.index(told)] == max(common)
            num_rows += 1
            num_targets += len(learnt)
        assert batch.counts == {"next_token": int((batch.rows["targets"] != IGNORE).sum())}
    assert num_rows == 60 and num_targets == sum(sum(batch.counts.values()) for batch in stream)
    first, again = stream.batch(0), stream.batch(0)
    assert all(np.array_equal(first.rows[name], again.rows[name]) for name in first.rows)


def test_stated_preferences_stand_before_later_windows_alone(data: TrainingSequences, tmp_path: Path) -> None:
    """Sequences of five events in windows of two targets: of items 0 to 2, and 2 to 4."""
    path = written(tmp_path, *(said(user, 4, "red hat") for user in data.users))
    words = Words.of(data, np.eye(12), 2)
    codes = codes_of(data, Preferences(words, read_preferences(path, data)))
    stream = PreferenceStream(data, codes, 2, Passes(batch_size=120, seed=1), "random")
    (batch,) = stream
    reads = batch.rows["input_ids"][:, 0] != PADDING
    num_learnt = (batch.rows["targets"] != IGNORE).sum(1) // 3
    is_second = batch.examples % 2 == 1
    assert reads.tolist() == (is_second & (num_learnt == 1)).tolist(), "the fifth event alone is later than four"
    assert 0 < reads.sum() < 60


# ---- Mender ----------------------------------------------------------------------------------------------------------


def losses(settings: TIGER | Mender, split: Split, folder: Path) -> list[float]:
    settings.make(split, "things", folder=folder)
    (log,) = folder.glob("*/*/log.jsonl")
    return [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]


def test_without_words_it_learns_as_tiger_does(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "VALIDATIONS", 1)
    tiger = losses(TIGER(**SMALL), split, tmp_path / "tiger")
    assert losses(Mender(**SMALL, num_words=0), split, tmp_path / "none") == tiger and len(tiger) > 2, "to the digit"
    assert losses(Mender(**SMALL), split, tmp_path / "words") != tiger


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"shown": "nearest"}, "shown='nearest': expected last or random. Which preference is nearest .* of an oracle"),
        ({"taught": "first"}, "taught='first': expected last, random, nearest"),
        ({"num_words": -1}, "num_words=-1 must not be below 0"),
        ({"num_words": 0, "preferences": "x.jsonl"}, "preferences=x.jsonl are not read with num_words=0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Mender(**changed)


def learnt(split: Split, data: TrainingSequences, folder: Path, num_epochs: float) -> Any:
    """From users who say what the next thing will be."""
    next_up = split.queries("things", VALIDATION, max_history=9).target
    lines = [
        said(user, place, f"a {THINGS[item % 4]}")
        for row, user in enumerate(data.users)
        for place, item in enumerate([*data.sequences[row].tolist(), next_up[row]])
    ]
    settings = {
        **SMALL,
        "num_epochs": num_epochs,
        "dropout": 0.0,
        "learning_rate": 1e-2,
        "taught": "last",
        "max_length": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "VALIDATIONS", 1)
        # Codes are the thing and then the colour.
        vectors = np.hstack([2 * np.tile(np.eye(4), (3, 1)), np.repeat(np.eye(3), 4, axis=0)])
        write_vectors(folder / "vectors.npz", data.item_ids, vectors)
        files = {"preferences": written(folder, *lines), "vectors": str(folder / "vectors.npz")}
        return Mender(**settings, **files).make(split, "things", seed=1)


@pytest.fixture(scope="module")
def mender(split: Split, data: TrainingSequences, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return learnt(split, data, tmp_path_factory.mktemp("said"), 0.1)


def asked(*items: int, text: str = "") -> RankingQuery:
    return RankingQuery("q", "things", tuple(Item("things", f"i{item:02}") for item in items), user="p/u00", text=text)


@pytest.mark.slow
def test_lists_follow_the_preference(split: Split, data: TrainingSequences, tmp_path: Path) -> None:
    mender = learnt(split, data, tmp_path, 10)
    queries = [asked(*np.random.default_rng(seed).integers(0, 12, 3)) for seed in range(12)]
    before, after = np.mean([steering(mender, split.catalogue, queries, thing, 3) for thing in THINGS], axis=1).T
    assert before.mean() == pytest.approx(0.25), "each of a list is one of the four things"
    assert (after > 0.9).all(), "of twelve items three are such things"


def test_a_share_of_the_first_items_has_a_word_of_the_text(split: Split) -> None:
    class Colourful:
        name = "colourful"

        def rank(self, queries: Any, k: int) -> list[Ranking]:
            lists = {"": ("i00", "i04", "i05", "i01"), "red": ("i00", "i01", "i04", "i05")}
            return [Ranking(query.query_id, lists[query.text], (4.0, 3.0, 2.0, 1.0)) for query in queries]

    assert steering(Colourful(), split.catalogue, [asked()], "red", 2).tolist() == [[0.5, 1.0]]
    with pytest.raises(ConfigError, match="text='gold': no item of 'things' has any of its words"):
        steering(Colourful(), split.catalogue, [asked()], "gold", 4)


def test_without_a_text_the_last_preference_is_read(mender: Any) -> None:
    own = names(mender._worded.words, Ragged.of([mender.without_text(np.array([5]), "p/u00")]))[0]
    other = "shoe" if own != "shoe" else "hat"
    by_default, told, moved = mender.rank([asked(0, 5), asked(0, 5, text=f"A {own}"), asked(0, 5, text=other)], 12)
    assert told.scores == by_default.scores and told.item_ids == by_default.item_ids
    assert moved.scores != by_default.scores
    with pytest.raises(
        DataError, match="query='gold a' has no word that Mender has learnt and that tells the items of 'things' apart"
    ):
        mender.rank([asked(0, text="gold a")], 3)
    assert len(mender.rank([asked()], 12)[0].item_ids) == 12, "nor does it need a history"


def keyworded(mender: Any, shown: str) -> Any:
    """The same network, whose preferences are keywords of events."""
    out = mender.with_beams(12)
    out._preferences, out._shown = Preferences(mender._worded.words, None), shown
    return out


def test_a_drawn_preference_is_one_of_the_history_and_always_the_same(mender: Any) -> None:
    mender = keyworded(mender, "random")
    places = set()
    for seed in range(20):
        history = np.random.default_rng(seed).permutation(12)[:4]
        drawn = mender.without_text(history, None).tolist()
        assert drawn == mender.without_text(history, None).tolist()
        places.add([mender._of_items[item].tolist() for item in history].index(drawn))
    assert places == {0, 1, 2, 3}


def test_words_of_new_items_are_read(mender: Any, data: TrainingSequences) -> None:
    titles = {**dict(zip(data.item_ids, TITLES, strict=True)), "a99": "a green bag"}
    items = pa.table([list(titles), list(titles.values())], ["item_id", "title"])
    mender = keyworded(mender, "last")
    mender._codes = replace(mender._codes, new_vectors=lambda ids, titles: np.array([[0.0, 0, 2, 0, 0, 0, 1]]))
    more = mender.with_items(Catalogue.from_tables({"things": items}))
    assert more.without_text(np.array([0]), None).tolist() == mender.without_text(np.array([10]), None).tolist()
    assert "a99" in more.rank([asked(10)], 13)[0].item_ids
