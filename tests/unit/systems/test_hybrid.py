"""Prompts of titles with slots for items' vectors: LLaRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.evaluate.metrics import valid_ratio
from cprec.evaluate.questions import Protocol
from cprec.evaluate.rankings import table_of
from cprec.evaluate.tables import metrics_of
from cprec.models import tiny_model
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems.batches import Passes
from cprec.systems.hybrid import AnswerStream, Slots, TitlePrompts, TitleRecommender, with_slots
from cprec.systems.items import FrozenTable
from cprec.systems.language import Language
from cprec.systems.recipes.llara import LLaRA
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.train.loss import PackedLoss

TITLES = ["red shoe", "blue lamp", "green cup", "red lamp", "blue shoe", "tea", "lamp", "a pot of tea"]
VECTORS = np.random.default_rng(0).normal(size=(len(TITLES), 6)).astype(np.float32)
SMALL: dict[str, Any] = {"max_length": 3, "batch_size": 4, "num_candidates": 4, "num_epochs": 3, "hidden_size": 6}


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


def language_of(data: TrainingSequences) -> Language:
    """A decoder with random weights large enough for wrong ones to show."""
    language = LLaRA(**SMALL).language(data, 3)
    model = tiny_model(len(language.tokenizer), hidden_size=16, num_attention_heads=2, max_position_embeddings=256)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 8 if weight.ndim == 2 else 1
    return replace(language, model=model.eval())


def slotted(data: TrainingSequences) -> tuple[Language, TitlePrompts, Slots]:
    language = language_of(data)
    prompts = TitlePrompts(language, "shop")
    torch.manual_seed(0)
    with_slots(language.model, VECTORS)
    slots = language.model.get_input_embeddings()
    assert isinstance(slots, Slots)
    return language, prompts, slots


def stream_of(
    data: TrainingSequences, prompts: TitlePrompts, num_steps: int, curriculum: Any = "rising"
) -> AnswerStream:
    passes = Passes(batch_size=100, num_epochs=num_steps, seed=7)
    return AnswerStream(data, prompts, 3, passes, curriculum, num_candidates=4, listing=0.5)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_this_text(data: TrainingSequences) -> None:
    language = language_of(data)
    prompts = TitlePrompts(language, "shop")
    histories, offered = Ragged.of([[5, 1], [0]]), Ragged.of([[3, 5, 0], []])
    first, second = (prompts.of(histories, offered, slots=False)[row] for row in (0, 1))
    assert language.tokenizer.decode(first) == (
        "Domain: shop\nHistory:\n- tea\n- blue lamp\nCandidates:\n- red lamp\n- tea\n- red shoe\nNext:"
    )
    assert language.tokenizer.decode(second) == "Domain: shop\nHistory:\n- red shoe\nNext:"
    assert language.tokenizer.decode(prompts.answers(np.array([3]))[0]) == " red lamp<eos>"


def test_a_slot_stands_behind_each_title_and_holds_exactly_its_row(data: TrainingSequences) -> None:
    language, prompts, slots = slotted(data)
    histories, offered = Ragged.of([[5, 1]]), Ragged.of([[3, 5]])
    tokens = prompts.of(histories, offered, slots=True)[0]
    places = np.flatnonzero(tokens >= slots.num_embeddings)
    assert (tokens[places] - slots.num_embeddings).tolist() == [5, 1, 3, 5]
    for place, item in zip(places, [5, 1, 3, 5], strict=True):
        title = language.titles[item]
        assert tokens[place - len(title) : place].tolist() == title.tolist()
    assert np.delete(tokens, places).tolist() == prompts.of(histories, offered, slots=False)[0].tolist()
    # What the model reads there, by the two layers written out; elsewhere the tokens' rows.
    read = slots(torch.from_numpy(tokens))
    first, second = (layer for layer in slots.items.adapter.children() if isinstance(layer, nn.Linear))
    hidden = nn.functional.gelu(torch.from_numpy(VECTORS[[5, 1, 3, 5]]) @ first.weight.T + first.bias)
    torch.testing.assert_close(read[places], hidden @ second.weight.T + second.bias)
    others = np.setdiff1d(np.arange(len(tokens)), places)
    assert torch.equal(read[others], language.model.lm_head.weight[tokens[others]]), "the output layer has these rows"


def test_the_longest_prompt_must_fit(data: TrainingSequences) -> None:
    prompts = TitlePrompts(language_of(data), "shop")
    prompts.require_room_for(3, 4)
    with pytest.raises(ConfigError, match=r"reads 256: lower max_length=100, num_candidates=4 or title_tokens"):
        prompts.require_room_for(100, 4)


def test_a_base_that_scales_its_tokens_is_refused() -> None:
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(ConfigError, match="looks tokens up by Scaled, which does more than that"):
        Slots(Scaled(3, 2), FrozenTable(VECTORS, nn.Linear(6, 2), num_special=0))


# ---- what is learnt --------------------------------------------------------------------------------------------------


def test_the_answer_alone_is_learnt_after_history_and_candidates(data: TrainingSequences) -> None:
    language, prompts, slots = slotted(data)
    stream = stream_of(data, prompts, 20)
    assert {(stream.has_slots(step), stream.lists(step)) for step in range(20)} == {
        (slots, lists) for slots in (True, False) for lists in (True, False)
    }
    for step in range(20):
        batch, members = stream.batch(step), stream.members(step)
        for row, target in enumerate(stream.prefixes.targets[members]):
            ids, targets = batch.rows["input_ids"][row], batch.rows["targets"][row]
            answer = targets[targets != IGNORE]
            assert answer.tolist() == [*language.titles[target], language.end]
            asks = int(np.flatnonzero(targets != IGNORE)[0])
            text = language.tokenizer.decode(ids[: asks + 1][ids[: asks + 1] < slots.num_embeddings])
            history = "".join(f"\n- {TITLES[item]}" for item in stream.prefixes.take(members)[row])
            assert text.startswith(f"Domain: shop\nHistory:{history}\n") and text.endswith("\nNext:")
            assert ("\nCandidates:" in text) == stream.lists(step)
            assert bool((ids[: asks + 1] >= slots.num_embeddings).any()) == stream.has_slots(step)
        assert batch.counts == {"next_token": int((batch.rows["targets"] != IGNORE).sum())}


def test_candidates_are_the_target_and_others_in_any_place(data: TrainingSequences) -> None:
    stream = stream_of(data, TitlePrompts(language_of(data), "shop"), 40)
    places = []
    for step in range(40):
        members = stream.members(step)
        histories, targets = stream.prefixes.take(members), stream.prefixes.targets[members]
        for row, candidates in enumerate(map(stream.candidates(step).__getitem__, range(len(members)))):
            assert len(set(candidates)) == len(candidates) == 4
            assert not set(candidates) & set(histories[row]) and targets[row] in candidates
            places.append(candidates.tolist().index(targets[row]))
    counts = np.bincount(places, minlength=4)
    assert (abs(counts - len(places) / 4) < 4 * np.sqrt(len(places) * 3 / 16)).all()


def test_slots_come_as_often_as_the_curriculum_says(data: TrainingSequences) -> None:
    """At step s of S with the chance s / S: in the quarters of training 1/8, 3/8, 5/8 and 7/8 of the steps."""
    prompts = TitlePrompts(language_of(data), "shop")
    stream = stream_of(data, prompts, 4000)
    assert stream.num_steps == 4000
    has_slots = np.array([stream.has_slots(step) for step in range(4000)])
    shares = has_slots.reshape(4, 1000).mean(1)
    assert (abs(shares - np.array([1, 3, 5, 7]) / 8) < 4 * np.sqrt(0.25 / 1000)).all()
    assert has_slots[-1], "the last step's chance is 1"
    for curriculum, expected in (("hybrid", True), ("text", False)):
        other = stream_of(data, prompts, 50, curriculum)
        assert all(other.has_slots(step) == expected for step in range(50))


def losses_of(stage: Stage, num_steps: int) -> list[float]:
    """Losses of the first steps of training."""
    trainable, found = stage.trainable, []
    optimizer = torch.optim.AdamW(trainable.parameter_groups(0.0), lr=3e-3)
    for step in range(num_steps):
        batch = stage.stream.batch(step)
        loss = trainable.losses({name: torch.from_numpy(array) for name, array in batch.rows.items()})["next_token"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def test_without_slots_it_is_plain_prompts_to_the_digit(data: TrainingSequences) -> None:
    """The control knows no slots: the texts of prompts, written out and tokenised by piece, and a bare decoder."""
    settings = replace(LLaRA(**SMALL, listing=0.0), curriculum="text")
    (never,) = settings.stages(data, 1)  # it has slots, which no prompt fills
    (without,) = settings.stages_over(settings.language(data, 1), None, data, 1)
    language = settings.language(data, 1)
    control, stream = PackedLoss(language.model), never.stream
    assert isinstance(stream, AnswerStream)
    optimizer, expected = torch.optim.AdamW(control.parameter_groups(0.0), lr=3e-3), []
    for step in range(4):
        members, rows = stream.members(step), []
        for history, target in zip(
            map(stream.prefixes.take(members).__getitem__, range(len(members))),
            stream.prefixes.targets[members],
            strict=True,
        ):
            pieces = [
                "Domain: shop\nHistory:",
                *(p for item in history for p in ("\n-", f" {TITLES[item]}")),
                "\nNext:",
            ]
            prompt = [token for piece in pieces for token in language.tokenizer(piece)["input_ids"]]
            answer = [*language.tokenizer(f" {TITLES[target]}")["input_ids"], language.end]
            rows.append((prompt + answer, len(prompt)))
        width = max(len(tokens) for tokens, _ in rows)
        ids, targets = np.zeros((len(rows), width), dtype=np.int64), np.full((len(rows), width), IGNORE)
        for row, (tokens, start) in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            targets[row, start - 1 : len(tokens) - 1] = tokens[start:]
        places = np.tile(np.arange(width - 1), (len(rows), 1))
        given = (torch.from_numpy(array) for array in (ids[:, :-1], places, targets[:, :-1]))
        loss = control(*given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        expected.append(loss.item())
    assert losses_of(never, 4) == losses_of(without, 4) == expected
    assert losses_of(replace(settings, curriculum="hybrid").stages(data, 1)[0], 4) != expected


def test_the_projector_stays_where_prompts_have_no_slots(data: TrainingSequences) -> None:
    (stage,) = LLaRA(**SMALL).stages(data, 1)
    projector = [weight for name, weight in stage.trainable.module.named_parameters() if "adapter" in name]
    assert len(projector) == 4
    for step in range(stage.stream.num_steps):
        batch = stage.stream.batch(step)
        rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
        stage.trainable.losses(rows)["next_token"].backward()
        assert all((weight.grad is not None) == stage.stream.has_slots(step) for weight in projector)  # type: ignore[attr-defined]
        stage.trainable.module.zero_grad(set_to_none=True)


def test_of_a_base_adapters_and_projector_are_learnt_and_stored(data: TrainingSequences, tmp_path: Path) -> None:
    language = language_of(data)
    language.model.save_pretrained(tmp_path)
    language.tokenizer.save_pretrained(tmp_path)
    settings = LLaRA(**SMALL, base=str(tmp_path), lora_rank=2, frozen_layers=1)
    (stage,) = settings.stages(data, 1)
    names = list(stage.trainable.module.state_dict())
    assert names == [name for name, _ in stage.trainable.module.named_parameters()]
    assert all("lora_" in name or "adapter" in name for name in names)
    assert not any("layers/0/" in name for name in names) and any("layers/1/" in name for name in names)
    assert sum("adapter" in name for name in names) == 4
    first, *_, last = losses_of(stage, 6)
    assert last < first


# ---- rankings --------------------------------------------------------------------------------------------------------


def recommender_of(data: TrainingSequences, **changes: Any) -> tuple[TitleRecommender, Language, TitlePrompts, Slots]:
    language, prompts, slots = slotted(data)
    limits = {"max_length": 3, "beam_width": 4, "max_nodes": 500}
    made = TitleRecommender("LLaRA", data, language, prompts, **({"slots": True, "lists": True} | limits | changes))
    return made, language, prompts, slots


def query(*history: int, **changes: Any) -> RankingQuery:
    items = tuple(Item("shop", f"i{item}") for item in history)
    return RankingQuery(**{"query_id": "q", "domain": "shop", "history": items} | changes)


@torch.no_grad()
def log_prob(language: Language, prompt: np.ndarray, answer: np.ndarray) -> float:
    """By one plain pass over vectors, which are put in the slots by hand."""
    slots = language.model.get_input_embeddings()
    rows = []
    for token in [*prompt, *answer]:
        item = token - slots.num_embeddings
        is_slot = item >= 0
        rows.append(slots.items.adapter(torch.from_numpy(VECTORS[item])) if is_slot else slots.weight[token])
    logits = language.model(inputs_embeds=torch.stack(rows)[None]).logits[0].double().log_softmax(-1)
    return float(logits[len(prompt) - 1 : -1].gather(1, torch.from_numpy(answer)[:, None]).sum())


@pytest.mark.parametrize("slots", [True, False])
def test_the_catalogue_is_ranked_exactly_after_a_prompt_with_slots(data: TrainingSequences, slots: bool) -> None:
    made, language, prompts, _ = recommender_of(data, slots=slots)
    (ranking,) = made.rank([query(7, 6, 5, 1)], 5)
    prompt = prompts.of(Ragged.of([[6, 5, 1]]), slots=slots)[0]  # the latest three
    expected = {f"i{item}": log_prob(language, prompt, prompts.answers(np.array([item]))[0]) for item in range(8)}
    best = sorted(expected, key=lambda item: -expected[item])[:5]
    assert list(ranking.item_ids) == best and ranking.proof is not None and ranking.proof.exact
    assert ranking.scores == pytest.approx([expected[item] for item in best], abs=1e-4)


def test_candidates_are_ranked_after_a_prompt_that_lists_them(data: TrainingSequences) -> None:
    made, language, prompts, _ = recommender_of(data)
    asked = query(5, 1, candidates=("i3", "i7", "i0"), exclude=frozenset({"i7"}))
    (ranking,) = made.rank([asked], 1)
    prompt = prompts.of(Ragged.of([[5, 1]]), Ragged.of([[3, 7, 0]]), slots=True)[0]
    expected = {f"i{item}": log_prob(language, prompt, prompts.answers(np.array([item]))[0]) for item in (3, 0)}
    scores = dict(zip(ranking.item_ids, ranking.scores, strict=True))
    assert scores == pytest.approx(expected, abs=1e-4)
    unlisted, *_ = recommender_of(data, lists=False)
    (other,) = unlisted.rank([asked], 1)
    prompt = prompts.of(Ragged.of([[5, 1]]), slots=True)[0]
    assert other.scores[other.item_ids.index("i3")] == pytest.approx(
        log_prob(language, prompt, prompts.answers(np.array([3]))[0]), abs=1e-4
    )


def test_what_is_written_freely_is_counted_so(data: TrainingSequences, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five answers: two right, one wrong, one that is no candidate, one of which two candidates are part."""
    made, language, *_ = recommender_of(data)
    said = ["red shoe", " BLUE LAMP", "tea", "green hat", "red lamp, red shoe"]
    monkeypatch.setattr(
        "cprec.search.writing.write", lambda tree, *_: [language.tokenizer(said[n])["input_ids"] for n in range(5)]
    )
    queries = [query(6, query_id=f"q{n}", candidates=("i0", "i1", "i3", "i5")) for n in range(5)]
    found = made.generate(queries, 1)
    assert [ranking.item_ids for ranking in found] == [("i0",), ("i1",), ("i5",), (), ()]
    targets = ["i0", "i1", "i3", "i0", "i3"]
    protocol = Protocol(
        name="generate", queries=queries, target=targets, user=["u"] * 5, num_items=4, pools=("generate",)
    )
    columns = metrics_of(table_of(found, protocol, "shop"), protocol, 10, "generate")
    hit, is_valid = columns["recall@1"], columns["num_valid"] > 0
    assert valid_ratio(columns["num_valid"]) == 3 / 5
    assert hit.mean() == pytest.approx(2 / 5) and hit[is_valid].mean() == pytest.approx(2 / 3)


def test_free_writing_is_the_likeliest_token_after_each_other(data: TrainingSequences) -> None:
    made, language, prompts, slots = recommender_of(data)
    prompt = prompts.of(Ragged.of([[5, 1]]), Ragged.of([[3, 7, 0]]), slots=True)[0]
    tokens: list[int] = []
    longest = int(language.titles.lengths.max())
    while len(tokens) < longest and language.end not in tokens:
        ids = torch.from_numpy(np.array([*prompt, *tokens]))[None]
        with torch.no_grad():
            tokens.append(int(language.model(inputs_embeds=slots(ids)).logits[0, -1].argmax()))
    text = language.tokenizer.decode([token for token in tokens if token != language.end])
    heard: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cprec.search.writing.match", lambda text, titles: heard.append(text))
        assert made.generate([query(5, 1, candidates=("i3", "i7", "i0"))], 1)[0].item_ids == ()
    assert heard == [text]


def test_bad_settings_and_questions_are_refused(data: TrainingSequences) -> None:
    for changes, message in (
        ({"curriculum": "falling"}, "curriculum='falling' must be one of rising, hybrid, text"),
        ({"num_candidates": 1}, "num_candidates=1 must be 2 or more"),
        ({"listing": 1.5}, "listing=1.5 must lie in 0..1"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLaRA(**changes)
    made, *_ = recommender_of(data)
    with pytest.raises(ConfigError, match="LLaRA writes freely among candidates: give each query some"):
        made.generate([query(1)], 1)
    many: Sequence[str] = [f"i{n}" for n in range(8)] * 10
    with pytest.raises(ConfigError, match="reads 256: give fewer candidates"):
        made.rank([query(1, candidates=tuple(many))], 1)
