"""The measurements of generators in their smallest form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.generators import TOP, Benchmark, asked_of, generated, losses, main, valid_share, without_items, written
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import TRAIN, Item
from cprec.systems.codes import BEGIN, END, PADDING, ItemCodes
from cprec.systems.recipes.tiger import TIGER
from cprec.systems.signals import TrainingSequences, padded

SMALL = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_codes": 8, "num_epochs": 1, "text_size": 8}
NUM_ITEMS, NUM_QUERIES = 60, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generators")


@pytest.fixture(scope="module")
def split(folder: Path) -> Split:
    return generated(folder / f"world-150-{NUM_ITEMS}", 150, NUM_ITEMS)


@pytest.mark.slow
def test_all_parts_in_their_smallest_form(
    folder: Path, split: Split, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # it would hold for all tests of this process
    small = ["--folder", str(folder), "--users", "150", "--items", str(NUM_ITEMS), "--queries", str(NUM_QUERIES)]
    main([*small, "--rows", "TIGER,PRISM", "--settings", json.dumps(SMALL)])
    told = capsys.readouterr().out
    results = json.loads((folder / "kitchen.json").read_text())

    rows = results["beams"]["rows"]
    assert list(rows) == ["TIGER", "PRISM"] and all(f"| {name} | " in told for name in rows)
    for row in rows.values():
        shares = [*row["ndcg@10"], *row["found"], *row["valid"], row["proven"]]
        assert all(0 <= share <= 1 for share in shares)
        assert all(0 <= lost <= among <= NUM_QUERIES for among, lost in row["lost"])
        assert min(row["milliseconds"]) > 0 and row["proven"] == 1  # there are fewer prefixes than may be read
        assert row["found"] == sorted(row["found"])
    # The widest beam has room for most prefixes of so small a world.
    assert np.mean([row["found"][-1] for row in rows.values()]) > 0.9

    # Exact lists are those of scores of all items.
    made = benchmark_of(folder, split).made(TIGER())
    assert rows["TIGER"]["ndcg@10"][0] == pytest.approx(brute_force(made, split), abs=1e-9)

    forms = results["forms"]["rows"]
    assert forms["codes of titles"]["ndcg@10"] == rows["TIGER"]["ndcg@10"][0]
    assert 4 <= forms["codes of titles"]["tokens"] <= 5 < forms["title tokens"]["tokens"] <= 13
    assert forms["title tokens"]["parameters"] > forms["codes of titles"]["parameters"]
    low, high = (forms["title tokens"]["difference"][place] for place in (1, 2))
    assert low <= forms["title tokens"]["ndcg@10"] - forms["codes of titles"]["ndcg@10"] <= high

    growth = results["growth"]["rows"]
    assert all(0 <= value <= 1 for row in growth.values() for value in row.values())
    assert growth["codes of titles"]["alone"] == growth["title tokens"]["alone"] == 1, "six are new, and ten are listed"
    assert "all figures" in told


def benchmark_of(folder: Path, split: Split) -> Benchmark:
    return Benchmark(split, "kitchen", folder, SMALL, NUM_QUERIES, 0)


def brute_force(made: Any, split: Split) -> float:
    """NDCG@10 with each item's probability written out: the product of the chances of its tokens after the history,
    from one forward pass over all items."""
    codes, first = made._codes, split.catalogue.rows_of("kitchen")[0]
    item_NL, lengths = padded(codes.sequences, PADDING)
    found = []
    for query, target in zip(*asked_of(split, "kitchen", NUM_QUERIES), strict=True):
        history = split.catalogue.find("kitchen", [item.item_id for item in query.history]) - first
        prompt = np.concatenate([[BEGIN], *(codes.sequences[item] for item in history[-20:])])
        ids = torch.from_numpy(np.hstack([np.tile(prompt, (NUM_ITEMS, 1)), item_NL]))
        with torch.inference_mode():
            log_probs = made._reader.model(ids[:, :-1]).logits.log_softmax(-1)
        chosen = log_probs.gather(2, ids[:, 1:, None])[:, len(prompt) - 1 :, 0].double().numpy()
        scores = np.where(np.arange(chosen.shape[1]) < lengths[:, None], chosen, 0.0).sum(1)
        scores[history] = -np.inf
        (row,) = split.catalogue.find("kitchen", [target]) - first
        better = int((scores > scores[row] + 1e-6).sum())
        found.append(1 / np.log2(better + 2) if better < TOP else 0.0)
    return float(np.mean(found))


@pytest.mark.slow
def test_new_items_leave_no_trace_in_training(split: Split) -> None:
    known, new = without_items(split, "kitchen", 0.1, seed=0)
    assert len(new) == 6 and len(known.catalogue) == NUM_ITEMS - 6
    # What is left of each user are the same items in the same order, and as many of each part.
    old = {str(item) for item in split.catalogue.item_id} - new
    kept = np.array([item in old for item in split.catalogue.item_id[split.interactions.item]])
    before = split.catalogue.item_id[split.interactions.item[kept]]
    assert np.array_equal(known.catalogue.item_id[known.interactions.item], before)
    assert np.array_equal(known.part, split.part[kept])
    learnt = TrainingSequences.of(known, "kitchen")
    assert set(learnt.item_ids) == old and len(learnt.sequences.values) == known.events(TRAIN).sum()


class Scripted:
    """A tree whose next tokens are known: prompt 0 writes 5 and END, prompt 1 writes 6 without an end."""

    num_users, num_nodes = 2, 0
    prompt_hidden_UD = torch.tensor([0, 1])

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tensor([{0: 5, 1: 6, 2: END}[state] for state in hidden.tolist()])

    def extend(self, tokens: torch.Tensor, users: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        # A node's parent is its prompt's latest node.
        self.asked = [*getattr(self, "asked", []), (tokens.tolist(), users.tolist(), parents.tolist())]
        self.num_nodes += len(tokens)
        return torch.tensor([{5: 2, 6: 1}[token] for token in tokens.tolist()])


def test_what_is_written_freely_ends_with_end_or_with_its_length() -> None:
    tree = Scripted()
    assert written(tree, 3, None) == [[5, END], [6, 6, 6]]
    assert tree.asked[:2] == [([5, 6], [0, 1], [-1, -1]), ([6], [1], [1])]


def test_what_is_written_is_valid_where_it_is_an_item_with_its_end() -> None:
    codes = ItemCodes.of(np.array([[2], [3]]), num_codes=4)  # tokens 5 and 6, each with END
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": ["a", "b"], "title": ["a", "b"]})})
    reader = SimpleNamespace(read=lambda prompts: Scripted())
    prompts = codes.prompts(Ragged.of([[0], [1]]))
    made: Any = SimpleNamespace(
        _codes=codes, _reader=reader, _prompts=lambda queries: prompts, catalogue=catalogue, domain="shop"
    )
    queries = [RankingQuery(item, "shop", (Item("shop", item),)) for item in "ab"]
    assert valid_share(made, queries, None) == 0.5  # 5 and END is an item, 6 and 6 is none


class Listed:
    """Answers with lists that are known: `exact` of any length, and what a beam of each width finds."""

    EXACT = "abcd"
    OF_BEAMS: ClassVar = {1: "a", 2: "ac", 4: "acdb"}

    def __init__(self, width: int = 0) -> None:
        self.width = width

    def with_beams(self, width: int) -> Listed:
        return Listed(width)

    def rank(self, queries: Sequence[RankingQuery], k: int, mode: str) -> list[Ranking]:
        items = tuple((self.EXACT if mode == "exact" else self.OF_BEAMS[self.width])[:k])
        return [
            Ranking(query.query_id, items, tuple(-float(place) for place in range(len(items)))) for query in queries
        ]


def test_a_target_is_lost_where_a_beam_misses_one_that_its_width_has_room_for() -> None:
    targets = ["a", "b", "c", "d", "nowhere"]
    queries = [RankingQuery(str(number), "shop", ()) for number in range(5)]
    # Of the exact best 1: a. Of the best 2: a and b, which the beam of 2 misses. Of the best 4: all four.
    assert losses(Listed(), (queries, targets), (1, 2, 4)) == [(1, 0), (2, 1), (4, 0)]  # type: ignore[arg-type]
