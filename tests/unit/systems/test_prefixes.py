"""Generators of codes that learn and rank by the trie of all items' codes: APAO, MSCGRec, PRISM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.batch import IGNORE, Batch
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.search.trie import Trie
from cprec.systems.codes import ItemCodes
from cprec.systems.prefixes import prefix_loss
from cprec.systems.recipes.apao import APAO, POINTWISE
from cprec.systems.recipes.mscgrec import MSCGRec
from cprec.systems.recipes.prism import PRISM
from cprec.systems.recipes.tiger import TIGER, CodeSettings
from cprec.systems.signals import TrainingSequences

NUM_ITEMS, NUM_CODES = 24, 3
SMALL: dict[str, Any] = {"max_length": 4, "batch_size": 3, "num_levels": 2, "num_codes": NUM_CODES}
SHARP = {"coolest": 0.4, "warmest": 0.9, "branches": 1.5}


@pytest.fixture(scope="module", autouse=True)
def in_fp32() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)
        yield


@pytest.fixture(scope="module")
def shop() -> TrainingSequences:
    generator = np.random.default_rng(0)
    colour, thing = ("red", "green", "blue"), ("shoe", "lamp", "cup", "tea")
    titles = [f"{colour[n % 3]} {thing[n % 4]} {n // 7}" for n in range(NUM_ITEMS)]
    table = pa.table({"item_id": [f"i{n:02}" for n in range(NUM_ITEMS)], "title": titles})
    sequences = Ragged.of([generator.integers(0, NUM_ITEMS, size).tolist() for size in (5, 2, 9, 4, 7)])
    users = tuple(f"p/u{n}" for n in range(5))
    return TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", sequences, users)


@pytest.fixture(scope="module")
def codes() -> ItemCodes:
    """Some items share their codes, and not every prefix goes on in every way."""
    generator = np.random.default_rng(1)
    return ItemCodes.of(generator.integers(0, NUM_CODES, (NUM_ITEMS, 2)), NUM_CODES)


@pytest.fixture(scope="module")
def model(codes: ItemCodes) -> Any:
    torch.manual_seed(0)
    net = TIGER(**SMALL, hidden_size=16, num_layers=2, num_heads=2).decoder(codes)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter *= 8  # far from uniform
    return net.eval()


@functools.cache
def children(sequences: tuple[tuple[int, ...], ...], prefix: tuple[int, ...]) -> list[int]:
    """The tokens with which items that begin so go on."""
    return sorted({each[len(prefix)] for each in sequences if each[: len(prefix)] == prefix and each != prefix})


def written(codes: ItemCodes) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(codes.sequences[item].tolist()) for item in range(len(codes.sequences)))


LogProbs = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Log-probabilities of tokens by logits [V] and the children of a prefix."""


def plain(logits: torch.Tensor, goes_on: list[int]) -> torch.Tensor:
    return logits.log_softmax(0)


def of_children(logits: torch.Tensor, goes_on: list[int]) -> torch.Tensor:
    return logits - logits[goes_on].logsumexp(0)


def cooled(logits: torch.Tensor, goes_on: list[int]) -> torch.Tensor:
    # At the root, where three codes go on, the temperature is 1.
    temperature = 1.0 if goes_on[0] < 3 + NUM_CODES and goes_on[0] >= 3 else 0.4 + 0.5 * exp(-len(goes_on) / 1.5)
    return (logits / temperature).log_softmax(0)


def steps(model: Any, codes: ItemCodes, history: list[int], item: int, log_probs: LogProbs) -> torch.Tensor:
    """The log-probability of each token of an item after a history, by one pass over everything."""
    prompt, tokens = codes.prompts(Ragged.of([history])).values.tolist(), written(codes)[item]
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    found = [
        log_probs(logits[len(prompt) - 1 + place], children(written(codes), tokens[:place]))[token]
        for place, token in enumerate(tokens)
    ]
    return torch.stack(found)


RULES: list[tuple[CodeSettings, LogProbs]] = [
    (APAO(**SMALL), plain),
    (MSCGRec(**SMALL), of_children),
    (MSCGRec(**SMALL, softmax="vocabulary"), plain),
    (PRISM(**SMALL, **SHARP), cooled),
]
NAMES = ["APAO", "MSCGRec", "MSCGRec over the vocabulary", "PRISM"]


# ---- rankings and losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "log_probs"), RULES, ids=NAMES)
@pytest.mark.parametrize("history", [[], [3, 17, 5, 8, 21]])
def test_exact_rankings_are_those_of_scoring_every_item(
    settings: CodeSettings,
    log_probs: LogProbs,
    history: list[int],
    shop: TrainingSequences,
    codes: ItemCodes,
    model: Any,
) -> None:
    recommender = settings.code_recommender(shop, codes, model)
    with torch.inference_mode():
        scores = {
            f"i{item:02}": steps(model, codes, history[-4:], item, log_probs).double().sum().item()
            for item in range(NUM_ITEMS)
        }
    best = sorted(scores, key=lambda item: -scores[item])
    asked = RankingQuery("q", "shop", tuple(Item("shop", f"i{item:02}") for item in history))
    (ranking,) = recommender.rank([replace(asked, exclude=frozenset(best[:2]))], 8, "exact")
    assert list(ranking.item_ids) == best[2:10]
    assert ranking.scores == pytest.approx([scores[item] for item in best[2:10]], abs=1e-4)
    assert ranking.proof is not None and ranking.proof.exact
    (given,) = recommender.rank([replace(asked, candidates=("i01", "i09", "i20"))], 1)
    assert given.scores == pytest.approx(
        sorted((scores[item] for item in ("i01", "i09", "i20")), reverse=True), abs=1e-4
    )
    if log_probs is of_children:
        assert sum(map(exp, scores.values())) == pytest.approx(1, abs=1e-5)


def first_batch(settings: CodeSettings, data: TrainingSequences, codes: ItemCodes) -> tuple[Batch, Any]:
    batch = settings.stream(data, codes, 0).batch(0)
    return batch, {name: torch.from_numpy(array) for name, array in batch.rows.items()}


def windows_of(settings: CodeSettings, data: TrainingSequences, codes: ItemCodes, batch: Batch) -> list[list[int]]:
    rows: Any = TIGER(**SMALL).stream(data, codes, 0)
    return [rows.windows[row].tolist() for row in batch.examples]


@pytest.mark.parametrize(("settings", "log_probs"), RULES[1:], ids=NAMES[1:])
def test_training_is_by_the_probabilities_of_rankings(
    settings: CodeSettings, log_probs: LogProbs, shop: TrainingSequences, codes: ItemCodes, model: Any
) -> None:
    batch, rows = first_batch(settings, shop, codes)
    (loss,) = settings.trainable(shop, codes, model).losses(rows).values()
    expected = [
        -steps(model, codes, row[:place], item, log_probs)
        for row in windows_of(settings, shop, codes, batch)
        for place, item in enumerate(row)
    ]
    torch.testing.assert_close(loss, torch.cat(expected).sum(), rtol=1e-5, atol=1e-4)
    assert list(batch.counts.values()) == [len(torch.cat(expected))]
    wanted = torch.autograd.grad(torch.cat(expected).sum(), list(model.parameters()))
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted, rtol=1e-3, atol=1e-3)


# ---- APAO ------------------------------------------------------------------------------------------------------------


def test_weights_of_prefixes_grow_with_their_losses_and_have_no_gradient() -> None:
    losses = torch.tensor([log(2), log(4), log(8)], requires_grad=True)  # 1, 2 and 3 times log 2
    plain_sum = prefix_loss(losses, growth=0.0)
    assert plain_sum.item() == pytest.approx((1 + 4 + 9) / 6 * log(2))
    plain_sum.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    # Times exp(loss), they are in proportion to 1 * 2, 2 * 4, 3 * 8.
    assert prefix_loss(losses, growth=1.0).item() == pytest.approx((2 + 2 * 8 + 3 * 24) / 34 * log(2))
    assert prefix_loss(torch.zeros(3), growth=1.0).item() == 0


def test_pointwise_prefixes_are_means_of_their_tokens(shop: TrainingSequences, codes: ItemCodes, model: Any) -> None:
    settings = replace(POINTWISE, **SMALL, prefix_weight=0.3, growth=0.7)
    batch, rows = first_batch(settings, shop, codes)
    losses = settings.trainable(shop, codes, model).losses(rows)
    items = [
        -steps(model, codes, row[:place], item, plain)
        for row in windows_of(settings, shop, codes, batch)
        for place, item in enumerate(row)
    ]
    assert {len(item) for item in items} == {3, 4}, "some have one more code"
    first, second = (torch.stack([item[:length].mean() for item in items]).mean() for length in (1, 2))
    share = [(value * (0.7 * value).exp()).item() for value in (first, second)]
    expected = 0.3 * (share[0] * first + share[1] * second) / sum(share)
    found = losses["prefixes"] / batch.counts["prefixes"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["next_token"], torch.cat(items).sum(), rtol=1e-5, atol=1e-4)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(torch.autograd.grad(found, list(model.parameters())), wanted, rtol=1e-3, atol=1e-4)
    assert batch.whole and set(batch.counts.values()) == {len(torch.cat(items))}


def test_pairwise_prefixes_are_set_against_others_read_alone(
    shop: TrainingSequences, codes: ItemCodes, model: Any
) -> None:
    settings = APAO(**SMALL, prefix_weight=0.3, temperature=2.0, num_negatives=5)
    batch, rows = first_batch(settings, shop, codes)
    losses = settings.trainable(shop, codes, model).losses(rows)
    num_prefixes = [len({each[:length] for each in written(codes)}) for length in (1, 2)]
    by_length: list[list[torch.Tensor]] = [[], []]
    for number, window in enumerate(windows_of(settings, shop, codes, batch)):
        candidates = [tuple(each) for each in batch.rows["candidates"][number].tolist()]
        item_of = {each[:2]: item for item, each in enumerate(written(codes))}
        # BEGIN and the tokens of the items before the target stand before its first code.
        before = np.cumsum([1, *(len(codes.sequences[item]) for item in window)])
        place = before.tolist().index(batch.rows["states"][number, 0, 0] + 1)
        assert place > 0 and written(codes)[window[place]][:2] == candidates[0]
        scores = [steps(model, codes, window[:place], item_of[each], plain)[:2].cumsum(0) / 2 for each in candidates]
        for length in (1, 2):
            others: dict[tuple[int, ...], torch.Tensor] = {}
            for each, score in zip(candidates[1:], scores[1:], strict=True):
                if each[:length] != candidates[0][:length]:
                    others.setdefault(each[:length], score[length - 1])
            target, scale = scores[0][length - 1].exp(), (num_prefixes[length - 1] - 1) / max(1, len(others))
            total = target + scale * sum((score.exp() for score in others.values()), torch.zeros(()))
            by_length[length - 1].append(-(target / total).log() / length)
    mean = torch.stack([torch.stack(each).mean() for each in by_length])
    expected = 0.3 * (mean.detach() / mean.detach().sum() * mean).sum()
    found = losses["prefixes"] / batch.counts["prefixes"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found, list(model.parameters()), retain_graph=True), wanted)


def test_branches_leave_the_loss_of_next_tokens_as_it_is(shop: TrainingSequences, codes: ItemCodes, model: Any) -> None:
    found = []
    for settings in (APAO(**SMALL, num_negatives=5), TIGER(**SMALL)):
        batch, rows = first_batch(settings, shop, codes)
        found.append((settings.trainable(shop, codes, model).losses(rows)["next_token"], batch.counts["next_token"]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-5)
    assert found[0][1] == found[1][1] and batch.num_tokens == found[1][1]


def test_targets_and_others_are_drawn_anew_in_each_step_and_repeat_themselves(
    shop: TrainingSequences, codes: ItemCodes
) -> None:
    stream = APAO(**SMALL | {"batch_size": 100, "num_epochs": 2}).stream(shop, codes, 0)
    first, again, other = (stream.batch(step).rows for step in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    assert {name for name in first if first[name].shape != other[name].shape} == set()
    assert (first["candidates"] != other["candidates"]).any() and (first["until"] != other["until"]).any()
    assert (first["targets"][:, -16:] == IGNORE).all() and first["kept"][:, 0].all()


def test_one_code_needs_no_branches(shop: TrainingSequences) -> None:
    single = ItemCodes.of(np.arange(NUM_ITEMS)[:, None] % NUM_CODES, NUM_CODES)
    settings = APAO(**SMALL | {"num_levels": 1}, hidden_size=16, num_layers=1, num_heads=2)
    batch, rows = first_batch(settings, shop, single)
    losses = settings.trainable(shop, single, settings.decoder(single)).losses(rows)
    assert batch.rows["input_ids"].shape == batch.rows["targets"].shape and losses["prefixes"] > 0


# ---- MSCGRec ---------------------------------------------------------------------------------------------------------


def test_codes_of_modalities_stand_side_by_side(shop: TrainingSequences, tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    np.savez(images, item_id=np.array(shop.item_ids), vectors=np.random.default_rng(2).normal(size=(NUM_ITEMS, 5)))
    settings = MSCGRec(**SMALL, text_size=8, collaborative_size=4, images=str(images))
    every, texts = (each.codes(shop, 0) for each in (settings, replace(settings, collaborative_size=0, images="")))
    all_VL, texts_VL = (
        each.sequences.values[each.sequences.offsets[:-1, None] + np.arange(num)] - 3 - NUM_CODES * np.arange(num)
        for each, num in ((every, 6), (texts, 2))
    )
    assert all_VL.max() < NUM_CODES and all_VL.shape == (NUM_ITEMS, 6) and (all_VL[:, :2] == texts_VL).all()
    # Items that nobody had in training are alike by who had them, and by nothing else.
    unseen = np.setdiff1d(np.arange(NUM_ITEMS), shop.sequences.values)
    assert len(unseen) > 1 and len(np.unique(all_VL[unseen, 2:4], axis=0)) == 1
    assert len(np.unique(all_VL[unseen, 4:], axis=0)) > 1
    assert settings.identity() != replace(settings, images="").identity()
    moved = images.rename(tmp_path / "moved.npz")
    assert replace(settings, images=str(moved)).identity()["images"] != str(moved), "the content counts"


# ---- PRISM -----------------------------------------------------------------------------------------------------------


def test_temperatures_fall_with_the_number_of_branches() -> None:
    items = ItemCodes.of(np.array([[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [2, 1]]), 3)
    settings = PRISM(coolest=0.5, warmest=1.5, branches=1 / log(2))  # 0.5 + 2^-K
    found = settings.temperatures(Trie.build(items.sequences))
    # The root; codes with 3, 1 and 2 children; then pairs of codes, after which only the end comes.
    assert found[:4].tolist() == [1.0, 0.625, 1.0, 0.75] and found[4:10].tolist() == [1.0] * 6


def test_the_quantiser_reads_who_had_an_item_as_far_as_the_item_is_known(shop: TrainingSequences) -> None:
    had = Ragged.of([[0, 1], [0, 1], [0, 2], [3, 0], [5, 1]])
    data = replace(shop, sequences=had)
    settings = PRISM(**SMALL, text_size=8, collaborative_size=4, collaborative_weight=2.0)
    found = settings.vectors_of(data, "text")
    assert found.shape == (NUM_ITEMS, 12)
    assert found[:, :8] == pytest.approx(TIGER(text_size=8).frozen(data), abs=1e-6)
    length = np.linalg.norm(found[:, 8:], axis=1)
    expected = [2 * log(1 + events) / log(5) for events in (4, 3, 1, 1, 0, 1)]
    assert length[:6] == pytest.approx(expected, rel=1e-5) and not length[6:].any()


# ---- TIGER without them ----------------------------------------------------------------------------------------------


TINY = {**SMALL, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "dropout": 0.2, "text_size": 8, "num_epochs": 2}
WITHOUT: dict[str, CodeSettings] = {
    "APAO": APAO(prefix_weight=0.0),
    "MSCGRec": MSCGRec(collaborative_size=0, softmax="vocabulary"),
    "PRISM": PRISM(collaborative_weight=0.0, coolest=1.0, warmest=1.0),
}
WITH: dict[str, CodeSettings] = {"APAO": APAO(), "APAO (pointwise)": POINTWISE, "MSCGRec": MSCGRec(), "PRISM": PRISM()}


def learnt(settings: CodeSettings, data: TrainingSequences) -> tuple[list[float], tuple[float, ...]]:
    """The losses of some steps, and the scores of a list by the weights that come of them."""
    torch.manual_seed(0)
    (stage,) = replace(settings, **TINY).stages(data, 0)
    optimizer = torch.optim.AdamW(stage.trainable.parameter_groups(0.1), lr=1e-2)
    found = []
    for step in range(stage.stream.num_steps):
        batch = stage.stream.batch(step)
        losses = stage.trainable.losses({name: torch.from_numpy(array) for name, array in batch.rows.items()})
        loss = sum((losses[name] / batch.counts[name] for name in losses), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    (ranking,) = stage.recommender().rank([RankingQuery("q", "shop", (Item("shop", "i03"),))], 5)
    return found, ranking.scores


@pytest.fixture(scope="module")
def control(shop: TrainingSequences) -> tuple[list[float], tuple[float, ...]]:
    return learnt(TIGER(), shop)


@pytest.mark.parametrize("name", WITHOUT)
def test_without_its_own_parts_it_learns_as_tiger_does(name: str, shop: TrainingSequences, control: Any) -> None:
    assert learnt(WITHOUT[name], shop) == control and len(control[0]) > 4, "to the digit"


@pytest.mark.parametrize("name", WITH)
def test_with_its_own_parts_it_learns_something_else(name: str, shop: TrainingSequences, control: Any) -> None:
    losses, scores = learnt(WITH[name], shop)
    assert losses[0] != control[0][0] and scores != control[1]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APAO(prefix_weight=-1), "prefix_weight=-1 must not be below 0"),
        (lambda: APAO(temperature=0), "temperature=0 must be above 0"),
        (lambda: APAO(num_negatives=-2), "num_negatives=-2 must not be below 0"),
        (lambda: MSCGRec(softmax="all"), "softmax='all' must be vocabulary or catalogue"),  # type: ignore[arg-type]
        (lambda: MSCGRec(collaborative_size=-1), "collaborative_size=-1 must not be below 0"),
        (lambda: PRISM(coolest=0.9), "warmest=0.8 must be at least coolest=0.9"),
        (lambda: PRISM(branches=0), "branches=0 must be above 0"),
        (lambda: PRISM(of="collaborative"), "of='collaborative': codes are of texts and of who had an item"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], CodeSettings], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
