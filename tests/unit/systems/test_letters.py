"""Lists that are re-ranked by letters: ULMRec."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.models import tiny_model
from cprec.ranks import ndcg
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.scoring import ScoringRecommender
from cprec.systems.hybrid import Slots
from cprec.systems.items import IdTable
from cprec.systems.language import Language
from cprec.systems.letters import LetterForm, LetterPrompts, LetterRecommender, Retriever, ceiling
from cprec.systems.recipes.ulmrec import ULMRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.train.loss import PackedLoss

TITLES = ["red shoe", "blue lamp", "green cup", "red lamp", "blue shoe", "tea", "lamp", "a pot of tea"]
SMALL: dict[str, Any] = {"max_length": 3, "batch_size": 4, "num_candidates": 4, "num_epochs": 3, "hidden_size": 6}
SCORES = np.array([[0.1, 0.9, 0.3, 0.8, 0.5, 0.2, 0.7, -1.0]])


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


@pytest.fixture(scope="module")
def data() -> TrainingSequences:
    generator = np.random.default_rng(0)
    table = pa.table({"item_id": [f"i{n}" for n in range(len(TITLES))], "title": TITLES})
    sequences = Ragged.of([generator.permutation(len(TITLES))[:size].tolist() for size in (5, 2, 8, 1, 4)])
    users = tuple(f"p/u{n}" for n in range(5))
    return TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", sequences, users)


class Fixed(ScoringRecommender):
    """Scores that do not depend on the history; with `size` items there are further ones, which nothing speaks for."""

    name, floor = "fixed", -0.5

    def __init__(self, catalogue: Catalogue, domain: str = "shop") -> None:
        self.catalogue, self.domain = catalogue, domain

    def scores(self, domain: str, queries: Any) -> np.ndarray:
        num_items = len(self.catalogue.rows_of(domain))
        return np.resize(SCORES, (1, num_items)).repeat(len(queries), axis=0)

    def user_vectors(self, domain: str, queries: Any) -> np.ndarray:
        """How long the history is, alone."""
        return np.array([[float(len(query.history)), 0.0] for query in queries])


def language_of(data: TrainingSequences) -> Language:
    """A decoder with random weights large enough for wrong ones to show."""
    language = ULMRec(**SMALL).language(data, 3)
    model = tiny_model(len(language.tokenizer), hidden_size=16, num_attention_heads=2, max_position_embeddings=256)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 8 if weight.ndim == 2 else 1
    return replace(language, model=model.eval())


def recommender_of(
    data: TrainingSequences, *, num_items: int = 4, by_rank: bool = False, weight: float = 1.0
) -> tuple[LetterRecommender, Language, LetterPrompts]:
    language = language_of(data)
    prompts = LetterPrompts(language, "shop", 4)
    form = LetterForm(max_length=3, by_rank=by_rank, weight=weight)
    retriever = Retriever(Fixed(data.catalogue), data, num_items)
    return LetterRecommender("letters", data, language, prompts, retriever, form), language, prompts


def query(*history: int, **changes: Any) -> RankingQuery:
    items = tuple(Item("shop", f"i{item}") for item in history)
    return RankingQuery(**{"query_id": "q", "domain": "shop", "history": items} | changes)


# ---- prompts and what is learnt --------------------------------------------------------------------------------------


def test_a_prompt_is_this_text(data: TrainingSequences) -> None:
    language = language_of(data)
    prompts = LetterPrompts(language, "shop", 4, num_codes=6)
    tokens = prompts.of(Ragged.of([[5, 1]]), Ragged.of([[3, 5, 0]]), np.array([[2, 4]]))[0]
    first = language.model.get_input_embeddings().num_embeddings
    assert tokens[tokens >= first].tolist() == [first + 2, first + 4]
    assert language.tokenizer.decode(tokens[tokens < first]) == (
        "User:\nDomain: shop\nHistory:\n- tea\n- blue lamp\nCandidates:\n(A) red lamp\n(B) tea\n(C) red shoe\nNext: ("
    )
    plain = prompts.of(Ragged.of([[5, 1]]), Ragged.of([[3, 5, 0]]))[0]
    assert language.tokenizer.decode(plain).startswith("Domain: shop\nHistory:\n- tea")
    assert [language.tokenizer.decode([letter]) for letter in prompts.letters] == ["A", "B", "C", "D"]


def stages_of(settings: ULMRec, data: TrainingSequences) -> Stage:
    torch.manual_seed(0)
    retriever = settings.finding(Fixed(data.catalogue), data, 0)
    (stage,) = settings.stages_over(settings.language(data, 1), retriever, data, 1)
    return stage


def test_candidates_are_what_is_found_and_the_target_in_drawn_places(data: TrainingSequences) -> None:
    stream: Any = stages_of(ULMRec(**SMALL), data).stream
    places, inside, in_order = [], 0, 0
    for step in range(stream.num_steps):
        members, candidates = stream.members(step), stream.candidates(step)
        for row, prefix in enumerate(members):
            history, target = stream.prefixes.take(np.array([prefix]))[0], stream.prefixes.targets[prefix]
            assert target in candidates[row] and not set(history) & set(candidates[row])
            assert len(set(candidates[row])) == len(candidates[row]) <= 4
            best = [item for item in np.argsort(-SCORES[0]) if item not in stream._all.take(np.array([prefix]))[0]]
            found = [item for item in best if SCORES[0, item] > -0.5][:4]
            inside += target in found
            expected = set(found) if target in found else {*found[:3], target}
            assert set(candidates[row]) == expected
            places.append(candidates[row].tolist().index(target))
            in_order += candidates[row].tolist() == sorted(candidates[row], key=lambda item: -SCORES[0, item])
    assert 0 < inside < len(places)
    assert len(set(places)) == 4
    assert in_order < len(places) / 2, "letters do not tell the retriever's order"
    ordered: Any = stages_of(ULMRec(**SMALL, by_rank=True), data).stream
    for step in range(ordered.num_steps):
        for row, target in enumerate(ordered.prefixes.targets[ordered.members(step)]):
            others = [item for item in ordered.candidates(step)[row] if item != target]
            assert others == sorted(others, key=lambda item: -SCORES[0, item])


def losses_of(trainable: Any, batches: Any) -> list[float]:
    """Losses of the first steps of training."""
    found, optimizer = [], torch.optim.AdamW(trainable.parameter_groups(0.0), lr=3e-3)
    for rows in batches:
        loss = trainable.losses({name: torch.from_numpy(array) for name, array in rows.items()})["next_token"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def test_without_codes_it_is_the_re_ranker_by_letters_to_the_digit(data: TrainingSequences) -> None:
    """The control is a bare decoder, and its rows are texts written out and tokenised piece by piece."""
    settings = ULMRec(**SMALL, user_codes=0)
    stage = stages_of(settings, data)
    language, stream = settings.language(data, 1), stage.stream
    rows = []
    for step in range(3):
        members: Any = stream.members(step)  # type: ignore[attr-defined]
        texts = []
        for row, history in enumerate(map(stream.prefixes.take(members).__getitem__, range(len(members)))):  # type: ignore[attr-defined]
            offered = stream.candidates(step)[row]  # type: ignore[attr-defined]
            pieces = ["Domain: shop\nHistory:", *(p for item in history for p in ("\n-", f" {TITLES[item]}"))]
            pieces += ["\nCandidates:"]
            for letter, item in zip("ABCD", offered, strict=False):
                pieces += ["\n(", letter, ")", f" {TITLES[item]}"]
            tokens = [t for piece in [*pieces, "\nNext: ("] for t in language.tokenizer(piece)["input_ids"]]
            target = stream.prefixes.targets[members[row]]  # type: ignore[attr-defined]
            texts.append((tokens, language.tokenizer("ABCD"[offered.tolist().index(target)])["input_ids"][0]))
        width = max(len(tokens) for tokens, _ in texts)
        ids, targets = np.zeros((len(texts), width), dtype=np.int64), np.full((len(texts), width), IGNORE)
        for row, (tokens, answer) in enumerate(texts):
            ids[row, : len(tokens)], targets[row, len(tokens) - 1] = tokens, answer
        places = np.tile(np.arange(width), (len(texts), 1))
        rows.append({"input_ids": ids, "position_ids": places, "targets": targets})
    own = losses_of(stage.trainable, (stream.batch(step).rows for step in range(3)))
    assert own == losses_of(PackedLoss(language.model), rows)
    with_codes = stages_of(replace(settings, user_codes=1, num_codes=2), data)
    assert losses_of(with_codes.trainable, (with_codes.stream.batch(step).rows for step in range(3))) != own


def test_codes_are_those_of_the_history_so_far(data: TrainingSequences) -> None:
    """Vectors hold the length of the history alone, of which training has 1, 2, 4, 5 and 8: codes are its cluster."""
    retriever = Retriever(Fixed(data.catalogue), data, 4, num_levels=2, num_codes=3, seed=0)
    histories = Ragged.of([[0], [1, 2], [3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    codes = retriever.codes(retriever.queries(histories, ["p/new"] * 4))
    assert codes is not None and codes.shape == (4, 2)
    assert (codes[:, 0] < 3).all() and (codes[:, 1] >= 3).all() and (codes[:, 1] < 6).all()
    assert codes[1].tolist() == codes[2].tolist() != codes[3].tolist()
    assert Retriever(Fixed(data.catalogue), data, 4).codes(retriever.queries(histories, ["p/new"] * 4)) is None
    stage = stages_of(ULMRec(**SMALL, num_codes=3), data)
    batch = stage.stream.batch(0)
    slots: Any = next(module for module in stage.trainable.module._whole[0].modules() if isinstance(module, Slots))
    assert isinstance(slots.items, IdTable) and slots.items.num_items == 6
    assert ((batch.rows["input_ids"] >= slots.num_embeddings).sum(1) == 2).all()


# ---- rankings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_rank", [True, False])
def test_items_found_are_ranked_by_their_letters_and_others_behind_them(data: TrainingSequences, by_rank: bool) -> None:
    made, language, prompts = recommender_of(data, by_rank=by_rank)
    (ranking,) = made.rank([query(7, 0, 1, exclude=frozenset({"i7", "i0", "i1"}))], 8)
    # Items 3, 6, 4 and 2 are found, 1 being in the history; each order of letters has its own prompt.
    found = np.array([3, 6, 4, 2])
    order = np.arange(4) if by_rank else made._order(np.array([7, 0, 1]), 4)
    prompt = prompts.of(Ragged.of([[7, 0, 1]]), Ragged.of([found[order]]))[0]
    with torch.no_grad():
        logits = language.model(torch.from_numpy(prompt)[None]).logits[0, -1, torch.from_numpy(prompts.letters)]
    expected = dict(zip([f"i{item}" for item in found[order]], logits.log_softmax(0).tolist(), strict=True))
    scores = dict(zip(ranking.item_ids, ranking.scores, strict=True))
    assert {item: scores[item] for item in expected} == pytest.approx(expected, abs=1e-4)
    assert list(ranking.item_ids) == [*sorted(expected, key=lambda item: -expected[item]), "i5"]


def test_without_its_weight_the_order_is_the_retrievers(data: TrainingSequences) -> None:
    made, *_ = recommender_of(data, weight=0.0)
    seen = frozenset({"i1", "i3"})
    asked = [query(3, 1, exclude=seen), query(3, 1, exclude=seen, allow=frozenset({"i0", "i2", "i4"})), query(5)]
    for ours, theirs in zip(made.rank(asked, 8), Fixed(data.catalogue).rank(asked, 8), strict=True):
        assert ours.item_ids == theirs.item_ids
    history_last = made.rank([query(1)], 8)[0].item_ids
    assert history_last == ("i3", "i6", "i4", "i2", "i1", "i5", "i0"), "what the history has is not listed"


def test_lists_hold_the_best_and_of_equals_the_first(data: TrainingSequences, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stable sort of all items, with ties and items that nothing speaks for, and with lists too long."""
    scores = np.random.default_rng(1).integers(-2, 4, size=(50, len(TITLES))).astype(float)
    monkeypatch.setattr(Fixed, "scores", lambda self, domain, queries: scores)
    histories = Ragged.of([[row % 8, row // 8] for row in range(50)])
    for num_items in (1, 3, 8, 9):
        retriever = Retriever(Fixed(data.catalogue), data, num_items)
        _, found = retriever.lists(retriever.queries(histories, ["p/u0"] * 50), histories)
        for row in range(50):
            best = [item for item in np.argsort(-scores[row], kind="stable").tolist() if scores[row, item] > -0.5]
            assert found[row].tolist() == [item for item in best if item not in histories[row]][:num_items]


def test_the_retrievers_part_is_its_probability(data: TrainingSequences) -> None:
    """Of shares 0.8, 0.7, 0.5 and 0.3, which add up to 2.3, and of logits their softmax."""
    retriever = Retriever(Fixed(data.catalogue), data, 4)
    shares = np.array([0.8, 0.7, 0.5, 0.3])
    np.testing.assert_allclose(np.exp(retriever.log_probs(shares)), shares / 2.3)
    assert np.isfinite(retriever.log_probs(np.array([0.5, 0.0, -0.3]))).all()
    np.testing.assert_allclose(retriever.log_probs(np.array([0.0, -0.1])), np.log([0.5, 0.5]))
    retriever.recommender.scale = "logit"
    np.testing.assert_allclose(np.exp(retriever.log_probs(np.log(shares) + 5)), shares / 2.3)


def test_the_ceiling_counts_and_what_is_not_found_is_a_miss(data: TrainingSequences) -> None:
    """Without what the history has, items 1, 3, 6, 4, 2, 5, 0 come in this order, of which two are found."""
    made, *_ = recommender_of(data, num_items=2)
    histories, targets, users = Ragged.of([[7], [1], [1, 3], [2]]), np.array([3, 4, 4, 0]), ["p/u0"] * 4
    assert ceiling(made.retriever, histories, targets, users) == 2 / 4  # the first, and the third
    better, tied = made.target_ranks(histories, targets, users=users, exclude_seen=True)
    assert tied.tolist() == [1, 0, 1, 0] and (better[[0, 2]] < 2).all()
    assert (ndcg(better, tied, 10) > 0).tolist() == [True, False, True, False]


@dataclass(frozen=True)
class Finds:
    """Settings of a retriever."""

    floor: float = -0.5

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> Fixed:
        made = Fixed(split.catalogue, domain)
        made.floor = self.floor
        return made


def test_a_retriever_that_finds_nothing_is_refused_before_training(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ULMRec(**SMALL, retriever=Finds(floor=5.0), user_codes=0)
    before = settings.identity()
    with pytest.raises(Unsuitable, match="fixed finds 0.0000 of .* there is nothing to re-rank"):
        settings.make(split, "ring")
    assert settings.identity() != replace(settings, retriever=Finds()).identity()
    with monkeypatch.context() as patch:
        patch.setattr("cprec.systems.recipes.ulmrec.code_sha256", lambda module: f"another {module}")
        assert settings.identity() != before, "other code finds other items"


@dataclass(frozen=True)
class Trains(Finds):
    """Settings of a retriever that must not be trained."""

    def make(self, *_: Any, **__: Any) -> Fixed:
        raise AssertionError("the retriever was trained first")


def test_a_language_model_that_cannot_do_it_is_refused_before_a_retriever_is_trained(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ULMRec(**SMALL, retriever=Trains())
    with pytest.raises(ConfigError, match="frozen_layers=2 leaves no layer"):
        replace(settings, frozen_layers=2).make(split, "ring")
    monkeypatch.setattr("cprec.systems.language.CONTEXT", 40)
    with pytest.raises(ConfigError, match=r"a prompt has \d+ tokens, and the language model reads 40"):
        settings.make(split, "ring")
    language = ULMRec(**SMALL).language(TrainingSequences.of(split, "ring"), 0)
    language.tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=len(language.tokenizer), num_hidden_layers=1, head_dim=8, **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="looks tokens up by Gemma3TextScaledWordEmbedding"):
        replace(settings, base=str(tmp_path)).make(split, "ring")


def test_bad_settings_and_retrievers_are_refused(data: TrainingSequences) -> None:
    for changes, message in (
        ({"num_candidates": 27}, r"num_candidates=27 must lie in 2\.\.26"),
        ({"weight": 2.0}, r"weight=2\.0 must lie in 0\.\.1"),
        ({"user_codes": -1}, "user_codes=-1 must not be below 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ULMRec(**changes)
    made, *_ = recommender_of(data)
    unfit: Any = type("Unfit", (), {"name": "beams"})()
    with pytest.raises(ConfigError, match="beams gives no scores of all items"):
        Retriever(unfit, data, 4)
    with pytest.raises(ConfigError, match="letters has no vectors of users to make codes of: set user_codes=0"):
        Retriever(made, data, 4, num_levels=1, num_codes=2)
    with pytest.raises(ConfigError, match="the language model reads 256 with the answer: lower max_length"):
        LetterPrompts(language_of(data), "shop", 4).of(Ragged.of([[0] * 100]), Ragged.of([[1]]))
