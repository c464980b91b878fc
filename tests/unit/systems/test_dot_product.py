"""States of training rows, whatever rows are read together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cprec.batch import IGNORE
from cprec.errors import ConfigError
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems.dot_product import DotProductRecommender, SequenceModel, Vectors, parts_of_like_length
from cprec.systems.encoders import Encoder, Mean, Recurrent
from cprec.systems.items import IdTable
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.signals import TrainingSequences

NUM_ITEMS = 30
LENGTHS = (40, 3, 1, 0, 7, 20, 2, 3, 5, 1)


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40))
def test_each_row_is_in_one_part_and_fills_more_than_half_of_it(lengths: list[int]) -> None:
    parts = parts_of_like_length(torch.tensor(lengths))
    assert sorted(row for part_P, _ in parts for row in part_P.tolist()) == list(range(len(lengths)))
    for part_P, width in parts:
        of_part = [lengths[row] for row in part_P.tolist()]
        assert width == max(1, *of_part)
        if len(parts) > 1:
            assert all(2 * max(1, length) > width for length in of_part)
        else:
            assert 2 * sum(lengths) >= width * len(lengths) or len(set(lengths)) == 1 or max(lengths) <= 1


def test_rows_of_nearly_one_length_are_read_at_once() -> None:
    (part,) = parts_of_like_length(torch.tensor([9, 5, 8, 6]))
    assert part[0].tolist() == [0, 1, 2, 3] and part[1] == 9


@pytest.mark.parametrize("name", ["SASRec", "SASRec (query_norm)", "GRU4Rec", "mean with gaps"])
def test_states_are_those_of_rows_that_are_read_alone(name: str) -> None:
    torch.manual_seed(0)
    items, targets = np.full((len(LENGTHS), 40), NUM_ITEMS), np.full((len(LENGTHS), 40), IGNORE)
    generator = np.random.default_rng(0)
    for row, length in enumerate(LENGTHS):
        items[row, :length], targets[row, :length] = generator.integers(NUM_ITEMS, size=(2, length))
    targets[5, ::3] = IGNORE  # positions that predict nothing stand between others
    model = _model(name).eval()
    rows = {"items": torch.from_numpy(items), "targets": torch.from_numpy(targets)}
    if name == "mean with gaps":
        rows["gaps"] = torch.from_numpy((generator.random(items.shape) < 0.3).astype(np.float32))
    assert len(parts_of_like_length(torch.tensor(LENGTHS))) > 1
    vectors = model.vectors()
    states_ND, targets_N = model.states(vectors, rows)
    assert torch.equal(targets_N, rows["targets"][rows["targets"] != IGNORE])
    torch.testing.assert_close(states_ND, torch.cat([_alone(model, vectors, rows, row) for row in range(len(LENGTHS))]))


def test_user_vectors_times_item_vectors_are_scores(data: TrainingSequences) -> None:
    """Histories of all lengths, more of them than are read at once, come back in the order of the queries."""
    torch.manual_seed(0)
    model = SequenceModel(*SASRec(hidden_size=8, num_heads=2).parts(12))
    recommender = DotProductRecommender("untrained", data, model, 50)
    items = [Item("ring", f"i{number:02}") for number in range(12)]
    queries = [RankingQuery(str(n), "ring", tuple(items[n % 12 :][: n % 7])) for n in range(80)]
    vectors_QD = recommender.user_vectors("ring", queries)
    products_QV = vectors_QD @ model.vectors().items_VD.detach().numpy().T
    np.testing.assert_allclose(products_QV, recommender.scores("ring", queries), rtol=0, atol=1e-5)
    np.testing.assert_allclose(vectors_QD[6:7], recommender.user_vectors("ring", queries[6:7]), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="elsewhere"):
        recommender.user_vectors("elsewhere", queries)


def _model(name: str) -> SequenceModel:
    if name == "GRU4Rec":
        return SequenceModel(IdTable(NUM_ITEMS, 8, num_special=1), Recurrent(8, num_layers=1, dropout=0.0))
    block = "query_norm" if "query_norm" in name else "pre_norm"
    table, encoder = SASRec(hidden_size=8, num_heads=2, block=block).parts(NUM_ITEMS)
    read: Encoder = Mean(0.0, gaps=True) if name == "mean with gaps" else encoder
    return SequenceModel(table, read)


def _alone(model: SequenceModel, vectors: Vectors, rows: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    assert isinstance(model.encoder, Encoder)
    length = max(1, LENGTHS[row])
    inputs_1TD = vectors.inputs[rows["items"][row : row + 1, :length]]
    if "gaps" in rows:
        inputs_1TD = torch.cat([inputs_1TD, rows["gaps"][row : row + 1, :length, None]], dim=2)
    states_TD = model.encoder(inputs_1TD, torch.tensor([LENGTHS[row]]))[0]
    return states_TD[rows["targets"][row, :length] != IGNORE]
