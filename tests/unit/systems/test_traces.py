"""Traces that lead to the next item, and STREAM-Rec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.models import tiny_model
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems import fit as fitting
from cprec.systems.codes import BEGIN, END, ItemCodes
from cprec.systems.recipes.stream_rec import STREAMRec
from cprec.systems.recipes.tiger import TIGER
from cprec.systems.signals import TrainingSequences
from cprec.systems.traces import TracedCodes, TracingRecommender


def on_a_line(trace_length: int) -> TracedCodes:
    """Items at 0, 1, 10 and 11. The tokens 3 and 4 stand for 0.5 and 10.5, and 5 and 6 for -0.5 and 0.5."""
    codes = ItemCodes.of(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), num_codes=2)
    return TracedCodes.traced(codes, np.array([[0.0], [1], [10], [11]]), trace_length)


def test_a_trace_fits_what_the_items_before_leave_of_the_next_one() -> None:
    codes = on_a_line(3)
    assert (codes.token_C.tolist(), codes.token_CD.ravel().tolist()) == ([3, 4, 5, 6], [0.5, 10.5, -0.5, 0.5])
    # To 11 from nothing: 10.5, then 0.5 by the first token that has it, and of 0 left the first of the nearest.
    # Then to 1 from 11: -10 is nearest to -0.5, again and again. Then to 10 from their mean, 6: 4 is nearest to 0.5.
    traces = codes.traces(Ragged.of([[3, 1, 2], [3]]))
    assert traces.tolist() == [[4, 3, 3], [5, 5, 5], [3, 3, 3], [4, 3, 3]]


def test_each_item_follows_its_trace_and_a_row_may_be_empty() -> None:
    prompts = on_a_line(2).prompts(Ragged.of([[], [3, 1], []]))
    rows = [prompts[row].tolist() for row in range(3)]
    assert rows == [[BEGIN], [BEGIN, 4, 3, 4, 6, END, 5, 5, 3, 6, END], [BEGIN]]
    assert on_a_line(2).longest == 5


def test_without_a_trace_prompts_are_those_of_codes() -> None:
    histories, codes = Ragged.of([[], [3, 1], [0]]), on_a_line(0)
    plain = ItemCodes(codes.sequences, codes.vocabulary_size, codes.num_collisions).prompts(histories)
    traced = codes.prompts(histories)
    assert np.array_equal(traced.values, plain.values) and np.array_equal(traced.offsets, plain.offsets)
    assert codes.longest == 3


SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_levels": 2, "num_codes": 4}
SMALL |= {"batch_size": 16, "num_epochs": 1, "beam_width": 4, "max_length": 8}


@pytest.mark.slow
def test_without_a_trace_it_learns_as_tiger_does(
    circle: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "VALIDATIONS", 1)
    losses = []
    for number, settings in enumerate(
        (STREAMRec(**SMALL, trace_length=0, vectors=circle), TIGER(**SMALL, vectors=circle))
    ):
        settings.make(split, "ring", folder=tmp_path / str(number))
        (log,) = tmp_path.glob(f"{number}/*/*/log.jsonl")
        losses.append([line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) > 2, "to the digit"


def test_lists_are_exact_after_the_likeliest_trace(circle: str, data: TrainingSequences) -> None:
    codes = STREAMRec(**SMALL, trace_length=2, vectors=circle).codes(data, 0)
    model = tiny_model(codes.vocabulary_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 12  # far from uniform
    model.eval()

    def log_probs(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = (
                model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
            )
        return found

    recommender = TracingRecommender("traces", data, codes, model, max_length=5, beam_width=3, max_nodes=2000)
    histories = ([3, 7, 1], [], [5])
    queries = [
        RankingQuery("q", "ring", tuple(Item("ring", data.item_ids[item]) for item in history)) for history in histories
    ]
    for history, ranking in zip(histories, recommender.rank(queries, 5, "exact"), strict=True):
        prompt = codes.prompts(Ragged.of([history])).values.tolist()
        for _ in range(2):
            last = log_probs(prompt)[-1]
            prompt.append(max(codes.token_C.tolist(), key=lambda token: float(last[token])))
        scores = {}
        for number, item in enumerate(data.item_ids):
            tokens = codes.sequences[number].tolist()
            found = log_probs(prompt + tokens)
            scores[item] = float(sum(found[len(prompt) - 1 + at, token] for at, token in enumerate(tokens)))
        best = sorted(scores, key=lambda item: -scores[item])[:5]
        assert list(ranking.item_ids) == best
        assert ranking.scores == pytest.approx([scores[item] for item in best], abs=1e-4)
        assert ranking.proof is not None and ranking.proof.exact


def test_a_trace_of_negative_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="trace_length=-1 must not be below 0"):
        STREAMRec(trace_length=-1)
