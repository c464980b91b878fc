"""Events that do not fit among the others of a sequence: how they are scored, found and left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.schema import VALIDATION
from cprec.systems import fit as fitting
from cprec.systems.denoise import ClozeScorer, GraphScorer, PlaceScorer, denoised, fit_of_events
from cprec.systems.dot_product import DotProductRecommender, SequenceModel
from cprec.systems.encoders import SelfAttention
from cprec.systems.items import MASK, IdTable
from cprec.systems.recipes.bert4rec import BERT4Rec
from cprec.systems.recipes.denoised import DenoisedSASRec
from cprec.systems.recipes.sasrec import SASRec, SASRecRecommender
from cprec.systems.signals import TrainingSequences

NUM_ITEMS = 30
TINY: dict[str, Any] = {
    "hidden_size": 8,
    "num_blocks": 1,
    "num_heads": 2,
    "num_epochs": 2,
    "min_steps": 0,
    "dropout": 0.0,
}


class Given(PlaceScorer):
    """Log-probabilities and replacements that were given."""

    def __init__(self, log_p: list[float], likeliest: list[int] | None = None) -> None:
        self._log_p, self._likeliest = np.array(log_p), np.array(likeliest or [0] * len(log_p))

    def log_probabilities(self) -> np.ndarray:
        return self._log_p

    def likeliest(self, events_K: np.ndarray) -> np.ndarray:
        return self._likeliest[events_K]


def circle(share: float, seed: int = 0) -> tuple[Ragged, np.ndarray]:
    """Walks of 200 users on a circle of 30 items, in which a share of the events has another item, drawn at random; and
    which events these are."""
    generator = np.random.default_rng(seed)
    rows = [(start + np.arange(length)) % NUM_ITEMS for start, length in generator.integers((0, 8), (30, 21), (200, 2))]
    clean = Ragged.of(rows)
    is_noise = generator.random(len(clean.values)) < share
    other = (clean.values + generator.integers(1, NUM_ITEMS, len(clean.values))) % NUM_ITEMS
    return Ragged(np.where(is_noise, other, clean.values), clean.offsets), is_noise


def of(sequences: Ragged, data: TrainingSequences) -> TrainingSequences:
    users = tuple(f"p/u{row}" for row in range(len(sequences)))
    return replace(data, sequences=sequences, users=users, times=np.arange(len(sequences.values)))


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_transitions_score_an_event_without_its_own_links() -> None:
    """Sequences 0 1, 0 1 and 0 2, neighbours only, with a prior of one link; shares are 1/2, 1/3 and 1/6. After 0 came
    1 twice and 2 once.

    The first 1: without its own link one of two links leads to it, (1 + 1/3) / (2 + 1) = 4/9. The 2: none of two, (0 +
    1/6) / 3 = 1/18. The 0 before 1: one of one other, (1 + 1/2) / 2 = 3/4. The 0 before 2: none of none, (1/2) / 1.
    """
    scorer = GraphScorer(Ragged.of([[0, 1], [0, 1], [0, 2]]), 3, window=1, prior=1.0)
    expected = [3 / 4, 4 / 9, 3 / 4, 4 / 9, 1 / 2, 1 / 18]
    np.testing.assert_allclose(np.exp(scorer.log_probabilities()), expected, rtol=1e-12)
    fit_E = fit_of_events(Ragged.of([[0, 1], [0, 1], [0, 2]]), scorer)
    np.testing.assert_allclose(np.exp(fit_E[[1, 5]]), [4 / 3, 1 / 3], rtol=1e-12)


def test_farther_events_weigh_less_and_an_event_alone_fits_as_anywhere() -> None:
    """The first 2 has 1 before it, weight 1, and 0 before that, weight 1/2; a third of the events are 2. Without its
    own links, after 1 came 2 once, and after 0 nothing but 1, once. With a prior of two links that is (1 + 2/3) / (1 +
    2) and (0 + 2/3) / (1 + 2)."""
    sequences = Ragged.of([[0, 1, 2], [3], [1, 2]])
    scorer = GraphScorer(sequences, 4, window=2, prior=2.0)
    assert np.exp(scorer.log_probabilities()[2]) == pytest.approx((5 / 9 + 2 / 9 / 2) / 1.5)
    assert fit_of_events(sequences, scorer)[3] == pytest.approx(0)


def test_probabilities_of_all_items_in_a_place_sum_to_one() -> None:
    """The score of an item put there does not depend on its being there, which would add 0.13. The sum is exact but
    for the items of the neighbours, which have links of their own."""
    log, place, total = circle(0.2)[0], 3, 0.0
    for item in range(NUM_ITEMS):
        values = log.values.copy()
        values[place] = item
        total += np.exp(GraphScorer(Ragged(values, log.offsets), NUM_ITEMS, prior=1e-9).log_probabilities()[place])
    assert total == pytest.approx(1, abs=0.03)


def test_the_likeliest_other_item_is_the_step_that_noise_took() -> None:
    sequences, is_noise = circle(0.1)
    events = np.flatnonzero(is_noise)
    found = GraphScorer(sequences, NUM_ITEMS).likeliest(events)
    assert (found == circle(0.0)[0].values[events]).mean() > 0.9


def test_masked_items_are_scored_by_the_model() -> None:
    """As by hand: each event masked, the others read, and the softmax of the products at the mask. Five events are cut
    into the first two and the last three."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_length": 3, "num_blocks": 1, "num_heads": 1, "dropout": 0.0, "causal": False}
    model = SequenceModel(IdTable(6, 8), SelfAttention(8, **settings)).eval()
    scorer = ClozeScorer(model, Ragged.of([[0, 1, 2, 3, 4], [], [5]]), 3)
    found, likeliest = scorer.log_probabilities(), scorer.likeliest(np.array([5, 1]))
    with torch.inference_mode():
        vectors = model.vectors()
        for event, (row, place) in {0: ([0, 1], 0), 1: ([0, 1], 1), 3: ([2, 3, 4], 1), 5: ([5], 0)}.items():
            masked = [*row[:place], 6 + MASK, *row[place + 1 :]]
            state = model.encoder(vectors.inputs[torch.tensor([masked])], torch.tensor([len(masked)]))[0, place]  # type: ignore[operator]
            log_p = (vectors.items_VD @ state).log_softmax(0)
            assert found[event] == pytest.approx(float(log_p[row[place]]), abs=1e-5)
            if event in (1, 5):
                log_p[row[place]] = -torch.inf
                assert likeliest[[5, 1].index(event)] == log_p.argmax()


# ---- events that go --------------------------------------------------------------------------------------------------


def test_what_fits_worst_goes_as_far_as_the_share_allows(data: TrainingSequences) -> None:
    """Equal shares of four items, 1/4 each: an event fits by log P + log 4. Of six events two may go (a third), of two
    one; the threshold spares the rest."""
    sequences = Ragged.of([[0, 1, 2, 3, 0, 1], [2, 3]])
    fit_E = [-9.0, 1.0, -5.0, -7.0, 0.5, 2.0, -3.0, -4.0]
    scorer = Given([value - np.log(4) for value in fit_E], [3] * 8)
    clean = denoised(of(sequences, data), scorer, -1.0, most=1 / 3)
    assert [clean.sequences[row].tolist() for row in range(2)] == [[1, 2, 0, 1], [2]]
    assert clean.times is not None and clean.times.tolist() == [1, 2, 4, 5, 6]
    clean = denoised(of(sequences, data), scorer, -6.0, most=1.0, replaces=True)
    assert clean.sequences.values.tolist() == [3, 1, 2, 3, 0, 1, 2, 3]
    assert clean.times is not None and len(clean.times) == 8


def test_a_user_without_events_is_left_out_and_nothing_at_all_is_refused(data: TrainingSequences) -> None:
    three = of(Ragged.of([[0], [1, 2], [3, 0]]), data)
    clean = denoised(three, Given([-9.0, 0, 0, 0, 0]), -5.0)
    assert clean.users == ("p/u1", "p/u2") and clean.sequences.offsets.tolist() == [0, 2, 4]
    with pytest.raises(Unsuitable, match=r"threshold=9 and most=0\.2 leave no user of domain 'ring' two training"):
        denoised(three, Given([-9.0, 0, 0, 0, 0]), 9)


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_noise_is_found(share: float, seed: int, data: TrainingSequences) -> None:
    """Chance would be right in 10 and 20 % of the events."""
    sequences, is_noise = circle(share, seed)
    is_found = fit_of_events(sequences, GraphScorer(sequences, NUM_ITEMS)) < 0
    precision, recall = (is_found & is_noise).sum() / is_found.sum(), (is_found & is_noise).sum() / is_noise.sum()
    assert precision > 0.95 and recall > 0.75
    clean = denoised(of(sequences, data), GraphScorer(sequences, NUM_ITEMS), 0.0, most=0.3)
    assert len(clean.sequences.values) < len(sequences.values) * (1 - 0.6 * share)


def test_without_noise_nothing_goes(data: TrainingSequences) -> None:
    sequences, _ = circle(0.0)
    clean = denoised(of(sequences, data), GraphScorer(sequences, NUM_ITEMS), 0.0)
    np.testing.assert_array_equal(clean.sequences.values, sequences.values)


def test_a_model_of_masked_items_finds_noise(data: TrainingSequences, split: Split) -> None:
    """Ten of the ring's events have an item five steps further on. A BERT4Rec of the ring says what stood there. The
    events beside them fit badly as well, since it reads these; chance would find 6 % in three times as many events."""
    settings: dict[str, Any] = {"hidden_size": 16, "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 16}
    settings |= {"num_epochs": 15, "num_blocks": 1, "last_share": 0.0, "objective": "softmax", "num_negatives": 0}
    made = BERT4Rec(**settings).make(split, "ring")
    values = data.sequences.values.copy()
    long = np.flatnonzero(data.sequences.lengths >= 6)[::5]
    noise = data.sequences.offsets[long] + 3
    values[noise] = (values[noise] + 5) % 12
    assert isinstance(made, DotProductRecommender) and isinstance(made.model, SequenceModel)
    sequences = Ragged(values, data.sequences.offsets)
    scorer = ClozeScorer(made.model, sequences, 50)
    fit_E = fit_of_events(sequences, scorer)
    assert len(noise) == 10
    worst = np.argsort(fit_E)[: 3 * len(noise)]
    assert np.isin(noise, worst).mean() >= 0.6
    assert (scorer.likeliest(noise) == data.sequences.values[noise]).mean() >= 0.8


# ---- the recipe ------------------------------------------------------------------------------------------------------


def test_the_best_threshold_by_validation_is_kept(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SASRec is trained on all events and on those of each threshold; what it makes is a SASRec like others."""
    seen: list[TrainingSequences] = []
    fit, ndcg, values = fitting.fit, fitting.Validation.ndcg, iter([0.1, 0.3, 0.3])

    def noted(*arguments: Any) -> Any:
        made = fit(*arguments)
        seen.append(arguments[-1])
        made.seconds = 1.0
        return made

    monkeypatch.setattr(fitting, "fit", noted)
    monkeypatch.setattr(
        fitting.Validation, "ndcg", lambda self, made: next(values) if len(seen) == 3 else ndcg(self, made)
    )
    made = DenoisedSASRec(**TINY, thresholds=(9.0, 0.0), most_noise=0.25).make(split, "ring", folder=tmp_path)
    monkeypatch.undo()
    assert (
        "ring: NDCG@10 on validation queries is 0.1000 from all events, 0.3000 from those of threshold 9, 0.3000 from "
        "those of threshold 0; those of threshold 9 it is"
    ) in " ".join(capsys.readouterr().err.split())
    events = [len(each.sequences.values) for each in seen]
    assert events[0] == len(TrainingSequences.of(split, "ring").sequences.values) >= events[2] > events[1]
    assert isinstance(made, SASRecRecommender) and made.settings == SASRec(**TINY) and made.seconds == 3.0
    queries = split.queries("ring", VALIDATION, max_history=9)
    histories, users = queries.history, [""] * len(queries)
    scores = made.score_histories(histories, users)
    assert len(list(tmp_path.iterdir())) == len(set(events))
    each = [fit(SASRec(**TINY), split, "ring", 0, tmp_path, data).score_histories(histories, users) for data in seen]
    assert [torch.equal(scores, other) for other in each] == [False, True, False]


def test_what_cannot_be_chosen_is_refused(split: Split) -> None:
    with pytest.raises(Unsuitable, match="which of 3 kinds of training sequences is best is chosen by validation"):
        DenoisedSASRec(**TINY, thresholds=(0.0, 1.0)).make(split.learning(VALIDATION), "ring")
    with pytest.raises(ConfigError, match=r"thresholds=\(\) tries nothing"):
        DenoisedSASRec(thresholds=())
    with pytest.raises(ConfigError, match=r"most_noise=0\.0 must lie above 0"):
        DenoisedSASRec(most_noise=0.0)
    with pytest.raises(ConfigError, match="num_networks=3: it is one network"):
        DenoisedSASRec(num_networks=3)
