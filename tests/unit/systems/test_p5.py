"""P5: numbers of items as codes, tasks that rows teach, and vectors of items' places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, LeakageError, Unsuitable
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems.batches import Passes
from cprec.systems.codes import BEGIN, END, ItemCodes
from cprec.systems.generator import CodeRecommender, CodeStream
from cprec.systems.given_numbers import write_numbers
from cprec.systems.indexing import digits
from cprec.systems.prompted import Tasks, TaskStream
from cprec.systems.recipes.p5 import COLLABORATIVE, HYBRID, P5, RANDOM, SEMANTIC
from cprec.systems.recipes.tiger import TIGER
from cprec.systems.signals import TrainingSequences
from cprec.train.trainable import make_optimizer

TINY: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 6, "batch_size": 16}
TINY |= {"num_codes": 4, "num_epochs": 1, "beam_width": 4, "dropout": 0.1}
CLUSTERS: dict[str, Any] = {"num_clusters": 2, "leaf_size": 3, "num_neighbours": 2}
ONE_TASK: dict[str, Any] = {"recent_weight": 0.0, "direct_weight": 0.0}


def lists(rows: Ragged) -> list[list[int]]:
    return [rows[row].tolist() for row in range(len(rows))]


# ---- numbers of items ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [P5(), RANDOM, COLLABORATIVE, HYBRID, P5(own_tokens=True)])
def test_no_two_items_have_the_same_codes(settings: P5, data: TrainingSequences) -> None:
    codes = replace(settings, **TINY, **CLUSTERS).codes(data, seed=1)
    assert len(np.unique(codes.sequences.numbers())) == len(codes.sequences) == data.num_items
    assert max(map(max, lists(codes.sequences))) == codes.vocabulary_size - 3, "two tokens name tasks"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"indexing": "titel"}, "indexing='titel': expected one of sequential, random, collaborative, semantic"),
        ({"indexing": "given"}, "a file goes with given alone"),
        ({"numbers": "numbers.npz"}, "a file goes with given alone"),
        ({"num_clusters": 1}, "num_clusters=1: both must be 2 or more"),
        ({"num_codes": 1}, "num_codes=1, num_clusters=20: both must be 2 or more"),
        ({"direct_weight": -1.0}, "direct_weight=-1.0 must not be below 0"),
        ({"num_recent": 0}, "num_recent=0 must be above 0"),
        ({"quantiser": "product"}, "quantiser='product' says how codes of titles are made: give indexing=titles"),
        ({"indexing": "random", "vectors": "v.npz"}, "vectors='v.npz' says how codes of titles are made"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        P5(**settings)


def test_numbers_of_a_file_are_the_codes_and_are_checked_before_training(
    shop: Split, shopped: TrainingSequences, along_whole_histories: np.ndarray, tmp_path: Path
) -> None:
    numbers = digits(np.random.default_rng(0).permutation(shopped.num_items), 30)
    write_numbers(tmp_path / "clean.npz", shopped, numbers)
    write_numbers(tmp_path / "leak.npz", shopped, digits(along_whole_histories, 30))
    clean = P5(**TINY, **ONE_TASK, indexing="given", numbers=str(tmp_path / "clean.npz"))
    assert lists(clean.codes(shopped, 0).sequences) == [[*(code + 3 for code in row), END] for row in lists(numbers)]
    leak = replace(clean, numbers=str(tmp_path / "leak.npz"))
    with pytest.raises(LeakageError, match="know held-out events"):
        leak.make(shop, "shop", folder=tmp_path / "made")
    assert not (tmp_path / "made").exists()
    (tmp_path / "moved.npz").write_bytes((tmp_path / "clean.npz").read_bytes())
    assert leak.identity() != clean.identity() == replace(clean, numbers=str(tmp_path / "moved.npz")).identity()


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codes(data: TrainingSequences) -> ItemCodes:
    return P5(**TINY).codes(data, seed=0)


def tasks(data: TrainingSequences, codes: ItemCodes, *weights: float) -> TaskStream:
    marks = BEGIN, codes.vocabulary_size - 2, codes.vocabulary_size - 1
    given = Tasks(weights=weights, marks=marks, num_before=(6, 2, 0))
    return TaskStream(data, codes, 6, Passes(batch_size=16, num_epochs=2, seed=3), given)


def test_whole_histories_alone_are_the_rows_of_tiger(data: TrainingSequences, codes: ItemCodes) -> None:
    alone, tiger = tasks(data, codes, 1, 0, 0), CodeStream(data, codes, 6, Passes(batch_size=16, num_epochs=2, seed=3))
    assert alone.num_steps == tiger.num_steps
    for ours, theirs in zip(alone, tiger, strict=True):
        assert ours.counts == theirs.counts
        assert all(np.array_equal(ours.rows[name], theirs.rows[name]) for name in theirs.rows)


def test_each_row_has_the_history_of_its_task(data: TrainingSequences, codes: ItemCodes) -> None:
    """On the ring each item is one more than the one before it."""
    item_of = {tuple(row): item for item, row in enumerate(lists(codes.sequences))}
    stream, seen = tasks(data, codes, 1, 1, 1), dict[int, list[int]]()
    for batch in stream:
        ids, targets = batch.rows["input_ids"], batch.rows["targets"]
        for row, target in zip(ids, targets, strict=True):
            learnt = target[target != IGNORE].tolist()
            pieces = np.split(learnt, np.flatnonzero(np.array(learnt) == END) + 1)[:-1]
            items = [item_of[tuple(piece.tolist())] for piece in pieces]
            assert row[1 : len(learnt)].tolist() == learnt[:-1], "the mark, and then what is learnt"
            assert all((b - a) % data.num_items == 1 for a, b in zip(items, items[1:], strict=False))
            seen.setdefault(int(row[0]), []).append(len(items))
        assert batch.counts["next_token"] == (targets != IGNORE).sum()
    recent, direct = codes.vocabulary_size - 2, codes.vocabulary_size - 1
    assert set(seen) == {BEGIN, recent, direct}
    assert set(seen[direct]) == {1} and set(seen[recent]) == {2, 3} and max(seen[BEGIN]) == 7
    assert all(abs(len(lengths) / sum(map(len, seen.values())) - 1 / 3) < 0.1 for lengths in seen.values())


def test_rows_of_a_step_repeat_themselves(data: TrainingSequences, codes: ItemCodes) -> None:
    first, second = (tasks(data, codes, 1, 1, 1) for _ in range(2))
    assert np.array_equal(first.batch(3).rows["input_ids"], second.batch(3).rows["input_ids"])
    assert not np.array_equal(first.batch(0).rows["input_ids"][:, 0], first.batch(1).rows["input_ids"][:, 0])


# ---- whole words -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(codes: ItemCodes) -> Any:
    torch.manual_seed(0)
    net = P5(**TINY).decoder(codes)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter *= 12  # far from uniform
        net.transformer.words.weight.normal_()
    return net.eval()


def by_hand(model: Any, codes: ItemCodes, ids: Sequence[int]) -> torch.Tensor:
    """Logits by a model without places, from sums of vectors that are written out."""
    place, places = 0, []
    for before in [None, *ids[:-1]]:
        place += before in (BEGIN, END)
        places.append(place)
    plain = P5(**TINY, whole_words=False).decoder(codes).eval()
    state = {name: value for name, value in model.state_dict().items() if "words" not in name}
    plain.load_state_dict(state)
    with torch.inference_mode():
        vectors = plain.transformer.wte(torch.tensor(ids)) + model.transformer.words.weight[torch.tensor(places)]
        logits: torch.Tensor = plain(inputs_embeds=vectors[None], use_cache=False).logits[0]
    return logits


def test_tokens_have_the_vector_of_their_items_place(model: Any, codes: ItemCodes) -> None:
    ids = codes.prompts(Ragged.of([[11, 3, 7]])).values.tolist()
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert torch.allclose(found, by_hand(model, codes, ids), atol=1e-5)


@pytest.mark.parametrize("history", [[], [3, 11, 5, 0, 8, 1, 7]])
def test_exact_rankings_are_those_of_scoring_every_item(
    data: TrainingSequences, codes: ItemCodes, model: Any, history: list[int]
) -> None:
    """With vectors of places, and beside a longer history, whose items' places are others."""
    recommender = CodeRecommender("p5", data, codes, model, max_length=6, beam_width=3, max_nodes=2000)
    ids, scores = data.item_ids, {}
    prompt = codes.prompts(Ragged.of([history[-6:]])).values.tolist()
    for item in range(data.num_items):
        tokens = [*prompt, *codes.sequences[item].tolist()]
        logp = by_hand(model, codes, tokens).log_softmax(-1)
        scores[ids[item]] = float(sum(logp[n - 1, tokens[n]].double() for n in range(len(prompt), len(tokens))))
    best = sorted(scores, key=lambda item: -scores[item])
    asked = [RankingQuery("q", "ring", tuple(Item("ring", ids[n]) for n in row)) for row in (history, [1, 2, 3, 4])]
    ranking, _ = recommender.rank(asked, 8, "exact")
    assert list(ranking.item_ids) == best[:8]
    assert ranking.scores == pytest.approx([scores[item] for item in best[:8]], abs=1e-4)
    (given,) = recommender.rank([replace(asked[0], candidates=tuple(ids[:4]))], 1)
    assert dict(zip(given.item_ids, given.scores, strict=True)) == pytest.approx(
        {item: scores[item] for item in ids[:4]}, abs=1e-4
    )


def losses(settings: TIGER | P5, data: TrainingSequences, *, keeps_words: bool = False) -> list[float]:
    """Of the first steps of training."""
    torch.manual_seed(4)
    (stage,) = settings.stages(data, 0)
    if keeps_words:
        stage.trainable.module.get_submodule("transformer.words").requires_grad_(False)
    optimizer, found = make_optimizer(stage.trainable, weight_decay=0.1), []
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for step in range(3):
        torch.manual_seed(step)
        rows = {name: torch.from_numpy(array) for name, array in stage.stream.batch(step).rows.items()}
        loss = sum(stage.trainable.losses(rows).values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
    return found


def test_short_rows_of_short_numbers_can_be_learnt(data: TrainingSequences) -> None:
    """A decoder has room for no more tokens than its rows have: here five."""
    settings = P5(**{**TINY, "max_length": 1, "num_codes": 12})
    (stage,) = settings.stages(data, 0)
    assert stage.trainable.module.get_submodule("transformer.wpe").weight.shape == (5, 16)
    assert np.isfinite(losses(settings, data)).all()


def test_vectors_of_places_that_are_zero_change_no_loss(data: TrainingSequences) -> None:
    """Ablation equals control: kept at zero they give the losses of the decoder without them, to the digit; trained,
    they give these in the first step alone."""
    without = losses(P5(**TINY, whole_words=False), data)
    assert losses(P5(**TINY), data, keeps_words=True) == without
    trained = losses(P5(**TINY), data)
    assert trained[0] == without[0] and trained[1:] != without[1:]


def test_without_its_own_parts_p5_is_tiger(data: TrainingSequences) -> None:
    small: dict[str, Any] = {**TINY, "num_levels": 2}
    tiger = losses(TIGER(**small), data)
    p5 = P5(**small, **ONE_TASK, indexing="titles", whole_words=False)
    assert losses(p5, data) == tiger
    assert losses(replace(p5, direct_weight=0.5), data) != tiger


@pytest.mark.slow
def test_learns_what_comes_next_and_is_used_again(split: Split, tmp_path: Path) -> None:
    more = {"hidden_size": 32, "learning_rate": 2e-2, "num_epochs": 2, "dropout": 0.0}
    settings = replace(P5(), **{**TINY, **CLUSTERS, **more, **ONE_TASK})
    recommender = settings.make(split, "ring", folder=tmp_path)
    (log,) = tmp_path.glob("*/*/log.jsonl")
    logged = [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert logged[-1] < 0.9 * logged[0]
    asked = [RankingQuery("q", "ring", (Item("ring", "i03"), Item("ring", "i04")))]
    assert settings.make(split, "ring", folder=tmp_path).rank(asked, 5) == recommender.rank(asked, 5)


def test_semantic_numbers_need_categories(data: TrainingSequences) -> None:
    with pytest.raises(Unsuitable, match="needs categories that tell items apart"):
        SEMANTIC.codes(data, 0)
