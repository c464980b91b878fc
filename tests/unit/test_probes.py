"""Probes of user vectors: planted vectors with known answers, encoders with and without order, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.baselines.popularity import PopularityRecommender
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.probes import most_frequent, probe, shuffled
from cprec.systems.dot_product import DotProductModel, DotProductRecommender, Rows, SequenceModel, Vectors
from cprec.systems.encoders import Mean
from cprec.systems.items import IdTable
from cprec.systems.recipes.gru4rec import GRU4Rec
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import TrainingSequences

KINDS = ("tea", "tea", "tea", "mug", "mug", "")
"""Of six items."""
NUM_ITEMS = len(KINDS)
GENERATOR = np.random.default_rng(7)

Encode = Callable[[Rows], torch.Tensor]


class Planted(DotProductModel):
    """Its vectors of users are what a function makes of rows."""

    def __init__(self, encode: Encode) -> None:
        super().__init__()
        self._encode = encode

    def vectors(self) -> Vectors:
        return Vectors(torch.zeros(NUM_ITEMS, 1), torch.zeros(NUM_ITEMS + 1, 1))

    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("it is not trained")

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        return self._encode(rows).float()


def catalogue_of(kinds: Sequence[str]) -> Catalogue:
    names = [f"i{number}" for number in range(NUM_ITEMS)]
    return Catalogue.from_tables({"shop": pa.table({"item_id": names, "title": names, "categories": list(kinds)})})


def recommender_of(
    model: DotProductModel, *, max_length: int = 20, kinds: Sequence[str] = KINDS, users: Sequence[str] = ()
) -> DotProductRecommender:
    data = TrainingSequences(catalogue_of(kinds), "shop", Ragged.of([]), tuple(users))
    return DotProductRecommender("planted", data, model, max_length)


def lengths_of(rows: Rows) -> torch.Tensor:
    return (rows["items"] < NUM_ITEMS).sum(1, keepdim=True)


def random_histories(lengths: Sequence[int] | np.ndarray) -> Ragged:
    return Ragged.of([GENERATOR.integers(NUM_ITEMS, size=length) for length in lengths])


def test_the_length_is_found_as_far_as_the_vector_tells_it() -> None:
    """To base 2 the logarithms of 1, 2, 4 and 8 have the variance 5/4, and 1/4 within the short and the long ones."""
    histories = random_histories(GENERATOR.permutation(np.repeat([1, 2, 4, 8], 500)))
    for encode, known in ((lambda rows: lengths_of(rows).log(), 1.0), (lambda rows: lengths_of(rows) > 3, 0.8)):
        found = probe(recommender_of(Planted(encode)), histories)["length"]
        assert found.value == pytest.approx(known, abs=0.01) and found.low <= found.value <= found.high
        assert found.chance == 0 and found.measure == "R2" and found.num_users == 1000


def test_the_length_is_that_of_the_events_that_the_model_reads() -> None:
    recommender = recommender_of(Planted(lambda rows: lengths_of(rows).log()), max_length=4)
    found = probe(recommender, random_histories(np.repeat([2, 3, 9], 40)))["length"]
    assert found.value == pytest.approx(1, abs=1e-3)


def test_vectors_that_say_nothing_are_at_chance() -> None:
    noise = torch.Generator().manual_seed(0)
    model = Planted(lambda rows: torch.rand(len(rows["items"]), 4, generator=noise))
    found = probe(recommender_of(model), random_histories(GENERATOR.integers(1, 9, size=2000)))
    assert list(found) == ["length", "order", "category"]
    for each in found.values():
        assert each.low < each.chance + 0.02 and abs(each.value - each.chance) < 0.04, str(each)


def test_an_order_is_found_as_far_as_the_vector_tells_it() -> None:
    """Rising pairs become falling ones. Of the five other orders of three events two begin below their end."""
    pairs = Ragged.of([[0, 1], [2, 5]] * 20)
    found = probe(recommender_of(Planted(lambda rows: rows["items"][:, :1] < rows["items"][:, 1:2])), pairs)["order"]
    assert (found.value, found.low, found.high, found.chance, found.num_users) == (1, 1, 1, 0.5, 20)
    model = Planted(lambda rows: rows["items"][:, :1] < rows["items"][:, 2:3])
    found = probe(recommender_of(model), Ragged.of([[0, 1, 4]] * 2000))["order"]
    assert found.value == pytest.approx((1 + 3 / 5) / 2, abs=0.02)


def test_an_encoder_that_takes_the_mean_does_not_know_the_order() -> None:
    torch.manual_seed(0)
    recommender = recommender_of(SequenceModel(IdTable(NUM_ITEMS, 8, num_special=1), Mean(0.0)))
    found = probe(recommender, random_histories(GENERATOR.integers(2, 12, size=1000)))
    assert (found["order"].value, found["order"].low, found["order"].high) == (0.5, 0.5, 0.5)
    assert found["category"].low > found["category"].chance


def test_the_category_is_found_by_counts_of_it() -> None:
    """30 users have mostly tea and 10 mostly mugs; the last ten have items without a category, or none."""
    histories = Ragged.of([[0, 5, 1, 3]] * 30 + [[3, 5, 5, 5]] * 10 + [[5, 5]] * 5 + [[]] * 5)
    kinds = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0]])
    recommender = recommender_of(Planted(lambda rows: kinds[rows["items"]].sum(1)))
    found = probe(recommender, histories)["category"]
    is_first = np.random.default_rng(0).permutation(45)[:40] < 45 / 2
    assert found.value == 1 and found.num_users == (~is_first).sum()
    assert found.chance == pytest.approx((~is_first[:30]).sum() / (~is_first).sum())


def test_names_are_for_what_a_model_learnt_of_its_users() -> None:
    """A user's vector is the name. By name the length is known, and the order is asked about without names."""
    lengths = np.tile([2, 6], 30)
    users = [f"p/{user}" for user in range(60)]
    recommender = recommender_of(Planted(lambda rows: rows["users"][:, None] % 2), users=users)
    histories = Ragged.of([[0, 1] * (length // 2) for length in lengths])
    named, nameless = (probe(recommender, histories, names) for names in (users, None))
    assert named["length"].value > 0.99 and abs(nameless["length"].value) < 0.1
    assert named["order"].value == nameless["order"].value == 0.5


@pytest.mark.parametrize(
    "settings", [GRU4Rec(hidden_size=16), SASRec(hidden_size=16)], ids=lambda each: type(each).__name__
)
def test_a_network_that_reads_events_one_by_one_knows_their_order(settings: SystemSettings) -> None:
    """Users go from the first items to the last ones. Weights are random: reading in order is enough."""
    torch.manual_seed(0)
    histories = Ragged.of([np.sort(GENERATOR.integers(NUM_ITEMS, size=5)) for _ in range(300)])
    data = TrainingSequences(catalogue_of(KINDS), "shop", histories, tuple(f"p/{user}" for user in range(300)))
    (stage,) = settings.stages(data, 0)
    found = probe(stage.recommender(), histories, data.users)
    assert found["order"].low > 0.6
    assert found == probe(stage.recommender(), histories, data.users), "by the same seed"


def test_what_histories_cannot_answer_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = Planted(lambda rows: rows["items"][:, :1])
    assert not probe(recommender_of(model, kinds=[""] * NUM_ITEMS), Ragged.of([[1, 1]] * 40))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "no probe of length: it is the same for all users of one half",
        "no probe of order: there are 0 users to ask about it, and 20 are needed",
        "no probe of category: there are 0 users to ask about it, and 20 are needed",
    ]
    assert not probe(recommender_of(model), Ragged.of([[]]))


def test_bad_input_is_refused(ring: Split) -> None:
    histories = Ragged.of([[1, 2]] * 40)
    with pytest.raises(ConfigError, match="popularity has no user vectors.*such as SASRec"):
        probe(PopularityRecommender(ring), histories)
    with pytest.raises(ConfigError, match="2 names of users for 40 histories"):
        probe(recommender_of(Planted(lengths_of)), histories, ["p/1", "p/2"])


def test_a_shuffled_row_has_the_same_values_in_another_order() -> None:
    rows = Ragged.of([[1, 2], [3, 3, 3, 3, 4], *([0, 1, 2],) * 50])
    found = shuffled(rows, np.random.default_rng(1))
    assert all(sorted(found[row]) == sorted(rows[row]) for row in range(len(rows)))
    assert all(list(found[row]) != list(rows[row]) for row in range(len(rows)))
    assert len({tuple(found[row]) for row in range(2, len(rows))}) == 5


def test_of_equal_labels_the_first_is_taken() -> None:
    row, label = most_frequent(Ragged.of([[], [4, 0], [3, 4, 0], [5]]), np.array(KINDS))
    assert row.tolist() == [1, 2] and np.unique(KINDS)[label].tolist() == ["mug", "mug"]
