"""Items as sums of rows, the contrast of their parts, and the systems that are made of these."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.schema import TEST
from cprec.systems import fit as fitting
from cprec.systems.codes import pieces_of
from cprec.systems.dot_product import SequenceModel
from cprec.systems.graph import ItemGraph
from cprec.systems.items import IdTable, SumTable
from cprec.systems.recipes.h2rec import CODES, H2Rec, SemanticIDs
from cprec.systems.recipes.sasrec import WIDE
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.terms import Alignment

NUM_ITEMS = 12
SMALL: dict[str, Any] = {"hidden_size": 16, "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 16, "anneal": 0.3}
SMALL |= {"num_epochs": 5, "num_blocks": 1, "num_heads": 2}
FEW_CODES: dict[str, Any] = {"num_levels": 2, "num_codes": 8}


# ---- sums of rows ----------------------------------------------------------------------------------------------------


def sums(own: list[list[float]], num_items: int) -> SumTable:
    """Three items that share rows 0 to 2: the first one 0 and 1, the second 0 and 2, the third 1 alone."""
    table = SumTable(IdTable(num_items, 2), np.array([[0, 1], [0, 2], [1, -1]]))
    with torch.no_grad():
        table.own.table.weight.copy_(torch.tensor(own))
        table.shared.weight.copy_(torch.tensor([[0.0, 10], [0, 20], [0, 40], [7, 7]]))  # the last one only fills up
    return table


def test_an_item_is_the_sum_of_its_own_row_and_those_that_it_shares() -> None:
    table = sums([[1, 0], [2, 0], [3, 0], [4, 0], [5, 0]], 3)
    assert table.vectors().tolist() == [[1, 30], [2, 50], [3, 20], [4, 0], [5, 0]]
    assert table.vectors(torch.tensor([[2, 4], [0, 0]])).tolist() == [[[3, 20], [5, 0]], [[1, 30], [1, 30]]]
    own, shared = table.parts(torch.tensor([1]))
    assert own.tolist() == [[2, 0]] and shared.tolist() == [[0, 50]]
    table.vectors().sum().backward()
    assert table.shared.weight.grad is not None
    assert table.shared.weight.grad[:, 0].tolist() == [2, 2, 1, 0], "as many items as share the row"


def test_items_without_own_rows_are_what_they_share() -> None:
    table = sums([[4, 0], [5, 0]], 0)
    assert (table.num_items, table.num_special) == (3, 2)
    assert table.vectors().tolist() == [[0, 30], [0, 50], [0, 20], [4, 0], [5, 0]]
    assert table.vectors(torch.tensor([3, 0])).tolist() == [[4, 0], [0, 30]]


def merged(token_NL: np.ndarray, item_E: np.ndarray, num_pieces: int) -> list[list[int]]:
    """Byte-pair encoding as its definition says."""
    number = {token: place for place, token in enumerate(np.unique(token_NL).tolist())}
    words = [[number[token] for token in row] for row in token_NL.tolist()]
    for piece in range(len(number), num_pieces):
        counts = Counter[tuple[int, int]]()
        for item in item_E.tolist():
            counts.update(zip(words[item], words[item][1:], strict=False))
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]), default=None)
        if best is None or counts[best] < 2:
            break
        for word in words:
            for place in range(len(word) - 1, 0, -1):
                if (word[place - 1], word[place]) == best:
                    word[place - 1 : place + 1] = [piece]
    return words


@pytest.mark.parametrize("num_pieces", [10, 14, 25, 1000])
def test_pieces_are_those_of_byte_pair_encoding(num_pieces: int) -> None:
    generator = np.random.default_rng(0)
    token_NL = generator.integers(0, 3, (30, 4)) + 3 * np.arange(4)
    item_E = np.minimum(generator.geometric(0.15, 100) - 1, 24)
    token_NL[29, 0] = 50  # of an item without events
    found = [row[row >= 0].tolist() for row in pieces_of(token_NL, item_E, num_pieces)]
    assert found == merged(token_NL, item_E, num_pieces)
    assert max(map(max, found)) < max(13, num_pieces)
    alike = {(tuple(tokens), tuple(pieces)) for tokens, pieces in zip(token_NL.tolist(), found, strict=True)}
    assert len(alike) == len({tokens for tokens, _ in alike}) == len({pieces for _, pieces in alike})
    assert (num_pieces > 14) == (len(found[0]) == 1), "a popular item becomes one piece, given enough of them"


# ---- the contrast ----------------------------------------------------------------------------------------------------


@pytest.fixture
def alignment() -> Alignment:
    """Of three items, of which the first two were side by side."""
    first = torch.tensor([[3.0, 0], [0, 2], [1, 0]])
    second = torch.tensor([[1.0, 0], [0, 5], [0, -1]])
    graph = ItemGraph(Ragged.of([[0, 1], [2]]), 3, num_neighbours=2)
    return Alignment(lambda items: (first[items], second[items]), graph, temperature=0.5)


def loss_of(alignment: Alignment, targets: list[int]) -> float:
    return float(alignment(torch.empty(0), torch.tensor(targets), torch.empty(0)))


def test_vectors_of_one_item_and_of_neighbours_are_drawn_together(alignment: Alignment) -> None:
    e = np.exp(2.0)  # cosines over 0.5: first to second 2 0 0, 0 2 -2, 2 0 0 by rows
    by_item = [
        np.log((e + 2) / (e + 1)) + np.log((2 * e + 1) / (e + 1)),
        np.log((1 + e + 1 / e) / (1 + e)) + np.log((e + 2) / (e + 1)),
        np.log(e + 2) + np.log(2 + 1 / e),
    ]
    assert loss_of(alignment, [2, 0, 0, 1]) == pytest.approx((2 * by_item[0] + by_item[1] + by_item[2]) / 2, rel=1e-5)


def test_only_targets_of_the_step_are_contrasted(alignment: Alignment) -> None:
    e = np.exp(2.0)  # the neighbour of item 0 is not there
    expected = np.log((e + 1) / e) + np.log(2) + np.log(e + 1) + np.log(2)
    assert loss_of(alignment, [0, 2]) == pytest.approx(expected / 2, rel=1e-5)
    assert loss_of(alignment, [0, 0]) == 0, "an item alone is as near to itself as can be"


# ---- systems ---------------------------------------------------------------------------------------------------------


SYSTEMS: list[H2Rec] = [
    H2Rec(**SMALL, **FEW_CODES),
    H2Rec(**SMALL, **FEW_CODES, num_pieces=18, num_neighbours=2),
    replace(CODES, **SMALL, **FEW_CODES),
    SemanticIDs(**SMALL, **FEW_CODES | {"num_pieces": 22}),
]


@pytest.mark.parametrize("settings", SYSTEMS, ids=["rows and codes", "rows and pieces", "codes", "pieces"])
def test_learns_what_comes_next(settings: H2Rec, circle: str, split: Split) -> None:
    recommender = replace(settings, vectors=circle).make(split, "ring")
    assert recommender.name == ("H2Rec" if settings.own_rows else "Semantic IDs")
    queries = split.queries("ring", TEST, max_history=50)
    better, tied = recommender.target_ranks(
        queries.history, queries.target, users=[""] * len(queries), exclude_seen=True
    )
    assert (better + (tied - 1) / 2).mean() < 0.5


def first_step(settings: SystemSettings, data: TrainingSequences) -> tuple[Stage, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    (stage,) = settings.stages(data, 0)
    return stage, {name: torch.from_numpy(array) for name, array in stage.stream.batch(0).rows.items()}


def test_without_codes_and_contrast_it_learns_as_sasrec_does(split: Split, tmp_path: Path) -> None:
    small = SMALL | {"dropout": 0.3, "num_epochs": 1}
    losses = []
    for number, settings in enumerate((H2Rec(**small, num_levels=0, alignment_weight=0.0), replace(WIDE, **small))):
        settings.make(split, "ring", folder=tmp_path / str(number))
        (log,) = tmp_path.glob(f"{number}/*/*/log.jsonl")
        losses.append([line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) > 2, "to the digit"


def test_with_rows_of_codes_at_zero_a_step_is_that_of_sasrec(circle: str, data: TrainingSequences) -> None:
    plain, rows = first_step(replace(WIDE, **SMALL), data)
    summed, _ = first_step(H2Rec(**SMALL, **FEW_CODES, vectors=circle, alignment_weight=0.0), data)
    model, control = summed.trainable.module, plain.trainable.module
    assert isinstance(model, SequenceModel) and isinstance(control, SequenceModel)
    assert isinstance(model.items, SumTable) and isinstance(control.items, IdTable)
    assert not summed.stream.batch(0).whole
    (before,) = summed.trainable.losses(rows).values()
    torch.nn.init.zeros_(model.items.shared.weight)
    (found,), (expected,) = (stage.trainable.losses(rows).values() for stage in (summed, plain))
    assert found.item() == expected.item() != before.item()
    for loss in (found, expected):
        loss.backward()
    own, control_own = model.items.own.table.weight.grad, control.items.table.weight.grad
    assert own is not None and control_own is not None and own.abs().sum() > 0
    torch.testing.assert_close(own, control_own, rtol=0, atol=0)


def test_the_contrast_is_one_of_own_rows_with_those_of_codes(circle: str, data: TrainingSequences) -> None:
    stage, rows = first_step(H2Rec(**SMALL, **FEW_CODES, vectors=circle, alignment_weight=0.5), data)
    batch, losses = stage.stream.batch(0), stage.trainable.losses(rows)
    assert batch.whole and set(batch.counts) == set(losses) == {"next_item", "alignment"}
    twice, _ = first_step(H2Rec(**SMALL, **FEW_CODES, vectors=circle, alignment_weight=1.0), data)
    assert 2 * losses["alignment"].item() == pytest.approx(twice.trainable.losses(rows)["alignment"].item())
    before = losses["alignment"].item()
    losses["alignment"].backward()
    touched = {name for name, each in stage.trainable.module.named_parameters() if each.grad is not None}
    assert touched == {"model.items.own.table.weight", "model.items.shared.weight"}, "each parameter once"
    with torch.no_grad():
        for parameter in stage.trainable.module.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    assert stage.trainable.losses(rows)["alignment"].item() < before


# ---- bad input -------------------------------------------------------------------------------------------------------


def vectors_of(data: TrainingSequences, vectors: np.ndarray, folder: Path) -> str:
    np.savez(folder / "given.npz", item_id=np.array(data.item_ids), vectors=vectors)
    return str(folder / "given.npz")


def test_items_of_equal_vectors_share_all_their_codes_and_are_counted(
    data: TrainingSequences, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There may be fewer items than codes: then the first code of an item is its own, unless vectors are equal."""
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 3))
    vectors[7] = vectors[2]
    row_VL = H2Rec(vectors=vectors_of(data, vectors, tmp_path)).rows(data, 0)
    assert "ring: 2 of 12 items share all their codes with others" in capsys.readouterr().err
    assert row_VL.shape == (NUM_ITEMS, 4) and np.array_equal(row_VL // 128, np.tile(np.arange(4), (NUM_ITEMS, 1)))
    assert row_VL[7].tolist() == row_VL[2].tolist() and len(np.unique(row_VL[:, 0])) == NUM_ITEMS - 1


@pytest.mark.parametrize("settings", [H2Rec(), SemanticIDs(), CODES])
def test_vectors_that_tell_no_items_apart_are_refused_before_training(
    settings: H2Rec, data: TrainingSequences, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "train", None)
    equal = vectors_of(data, np.ones((NUM_ITEMS, 3)), tmp_path)
    with pytest.raises(Unsuitable, match="all 12 items of domain 'ring' have the same codes: give vectors that tell"):
        replace(settings, vectors=equal).make(split, "ring")
    for titles in ([f"B{n}" for n in range(NUM_ITEMS)], ["thing"] * NUM_ITEMS, ["-"] * NUM_ITEMS):
        poor = replace(split, catalogue=replace(split.catalogue, title=np.array(titles, dtype=object)))
        with pytest.raises(Unsuitable, match="no two titles of domain 'ring' share a word"):
            settings.make(poor, "ring")


def test_a_catalogue_of_one_item_is_refused(tmp_path: Path) -> None:
    table = pa.table({"item_id": ["only"], "title": ["red shoe"]})
    data = TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", Ragged.of([[0, 0]]), ("p/u",))
    with pytest.raises(Unsuitable, match="no two titles of domain 'shop' share a word"):
        H2Rec().stages(data, 0)
    with pytest.raises(Unsuitable, match="all 1 items of domain 'shop' have the same codes"):
        H2Rec(vectors=vectors_of(data, np.ones((1, 3)), tmp_path)).stages(data, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_levels": -1}, "num_levels=-1 must not be below 0"),
        ({"num_codes": 0}, "num_codes=0 must be above 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"num_pieces": 512}, "num_pieces=512 must be above the 512 single codes, or 0"),
        ({"own_rows": False}, "alignment_weight=0.1 needs own_rows=true and num_levels above 0"),
        ({"num_levels": 0}, "alignment_weight=0.1 needs own_rows=true and num_levels above 0"),
        ({"own_rows": False, "num_levels": 0, "alignment_weight": 0.0}, "leaves items without a row"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        H2Rec(**settings)
