"""LLM2Rec: a decoder that reads both ways, the losses that teach it, their streams, and the system made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.models import tiny_model, trunk_and_head
from cprec.systems.batches import Passes
from cprec.systems.embedding import (
    MASKED_TOKEN,
    SAME_TITLE,
    DropoutPairs,
    HistoryStream,
    MaskedTokens,
    TitleStream,
    read_both_ways,
    title_vectors,
)
from cprec.systems.items import read_vectors
from cprec.systems.recipes.llm2rec import LLM2Rec, LLM2RecRecommender
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM
from cprec.systems.terms import in_batch
from cprec.text.stream import NEXT_TOKEN

pytestmark = pytest.mark.usefixtures("in_fp32")
NETWORK: dict[str, Any] = {"hidden_size": 8, "num_blocks": 1, "num_heads": 2, "num_epochs": 2, "min_steps": 0}
NO_STEPS = {"language_steps": 0, "masked_steps": 0, "contrast_steps": 0}
STEPS = {"language_steps": 2, "masked_steps": 2, "contrast_steps": 2, "language_batch": 4, "title_batch": 8}


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def decoder() -> Any:
    model = tiny_model(16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= 6
    return model.eval()


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_token_reads_those_after_it_and_never_padding(model: Any) -> None:
    ids_RT, lengths_R = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 3]]), torch.tensor([4, 2])
    with torch.no_grad():
        causal_RTF = trunk_and_head(model)[0](input_ids=ids_RT, use_cache=False).last_hidden_state
        read_RTF = read_both_ways(model, ids_RT, lengths_R)
        other_RTF = read_both_ways(model, torch.tensor([[5, 6, 7, 4], [5, 6, 0, 0]]), lengths_R)
        alone_RTF = read_both_ways(model, torch.tensor([[5, 6]]), torch.tensor([2]))
        after_RTF = trunk_and_head(model)[0](input_ids=ids_RT, use_cache=False).last_hidden_state
    assert torch.equal(causal_RTF[0, 0], causal_RTF[1, 0]) and torch.equal(after_RTF, causal_RTF)
    assert (read_RTF[0, 0] - read_RTF[1, 0]).abs().max() > 1e-3
    assert (read_RTF[0, 0] - other_RTF[0, 0]).abs().max() > 1e-3, "the last token has changed"
    torch.testing.assert_close(read_RTF[1, :2], other_RTF[1, :2])
    torch.testing.assert_close(read_RTF[1, :2], alone_RTF[0])


def test_a_single_token_is_read_as_with_the_causal_mask(model: Any) -> None:
    ids_RT = torch.tensor([[5], [9]])
    with torch.no_grad():
        causal_RTF = trunk_and_head(model)[0](input_ids=ids_RT, use_cache=False).last_hidden_state
        torch.testing.assert_close(read_both_ways(model, ids_RT, torch.tensor([1, 1])), causal_RTF)


def test_attention_weights_are_left_out_as_asked() -> None:
    model, ids_RT, lengths_R = decoder(), torch.tensor([[5, 6, 7, 8]]), torch.tensor([4])
    torch.manual_seed(0)
    first, second, whole = (read_both_ways(model, ids_RT, lengths_R, dropout) for dropout in (0.3, 0.3, 0.0))
    assert not torch.equal(first, second)
    assert torch.equal(whole, read_both_ways(model, ids_RT, lengths_R))


def test_vectors_are_means_of_tokens_in_the_order_of_titles() -> None:
    model, titles = decoder().train(), Ragged.of([[5, 6, 7], [], [9], [4, 8]])
    found_VF = title_vectors(model, titles, "reading")
    assert model.training and found_VF.dtype == np.float32
    for row, number in zip(found_VF, range(4), strict=True):
        expected = np.zeros(8)
        if len(ids := titles[number]):
            ids_RT, lengths_R = torch.from_numpy(ids)[None], torch.tensor([len(ids)])
            expected = read_both_ways(model.eval(), ids_RT, lengths_R)[0].mean(0).detach()
        np.testing.assert_allclose(row, expected, atol=1e-5)


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_the_token_before_a_masked_one_predicts_it() -> None:
    """Of three tokens the second is masked: the state of the first one predicts it, which has read the third."""
    model = decoder()
    rows = {
        "input_ids": torch.tensor([[5, 2, 7]]),
        "lengths": torch.tensor([3]),
        "targets": torch.tensor([[IGNORE, 6, IGNORE]]),
    }
    (loss,) = MaskedTokens(model).losses(rows).values()
    hidden_RTF = read_both_ways(model, rows["input_ids"], rows["lengths"])
    log_probs_V = trunk_and_head(model)[1](hidden_RTF[0, 0]).log_softmax(0)
    assert loss.item() == pytest.approx(-log_probs_V[6].item(), rel=1e-5)
    loss.backward()
    assert model.get_input_embeddings().weight.grad[7].abs().sum() > 0


def test_two_readings_of_two_titles() -> None:
    """Cosines of the first readings (1, 0) and (0, 2) with the second ones (3, 4) and (0, 1) are .6, 0 and .8, 1."""
    first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    expected = math.log(1 + math.exp(-0.6 / 0.5)) + math.log(1 + math.exp((0.8 - 1.0) / 0.5))
    assert in_batch(first, second, torch.tensor([0, 1]), 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert in_batch(first, second, torch.tensor([4, 4]), 0.5).item() == 0, "equal titles are no negatives"


def test_without_dropout_two_readings_are_one() -> None:
    model = decoder()
    rows = {
        "input_ids": torch.tensor([[5, 6], [7, 0]]),
        "lengths": torch.tensor([2, 1]),
        "targets": torch.tensor([0, 1]),
    }
    mean_RF = torch.from_numpy(title_vectors(model, Ragged.of([[5, 6], [7]]), "reading"))
    cosine = F.cosine_similarity(mean_RF[0], mean_RF[1], dim=0).item()
    (loss,) = DropoutPairs(model, dropout=0.0, temperature=2.0).losses(rows).values()
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp((cosine - 1) / 2.0)), rel=1e-4)
    torch.manual_seed(0)
    (apart,) = DropoutPairs(model, dropout=0.5, temperature=2.0).losses(rows).values()
    assert apart.item() != pytest.approx(loss.item(), rel=1e-3)


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_each_title_but_the_first_is_learnt_given_those_before_it() -> None:
    titles = Ragged.of([[5, 6], [7], [], [8, 9, 10]])
    stream = HistoryStream(Ragged.of([[0, 1, 2, 3]]), titles, [2], 5, Passes(batch_size=4, num_steps=3, seed=0))
    assert (stream.num_steps, stream.longest) == (3, 9)
    batch = stream.batch(0)
    assert batch.rows["input_ids"].tolist() == [[5, 6, 2, 7, 2, 8, 9, 10]]
    assert batch.rows["targets"].tolist() == [[IGNORE, IGNORE, 7, 2, 8, 9, 10, 2]]
    assert batch.rows["position_ids"].tolist() == [list(range(8))]
    assert batch.counts == {NEXT_TOKEN: 6} and batch.num_tokens == 9
    cut = HistoryStream(Ragged.of([[0, 1, 0, 3]]), titles, [2], 2, Passes(batch_size=4, seed=0)).batch(0)
    ignored = 4 * [IGNORE]
    assert sorted(cut.rows["targets"].tolist()) == [[IGNORE, IGNORE, 7, 2, *ignored], [IGNORE, 5, 6, 2, 8, 9, 10, 2]]


def test_a_row_begins_as_the_language_model_expects() -> None:
    titles, passes = Ragged.of([[5, 6], [7], []]), Passes(batch_size=4, seed=0)
    stream = HistoryStream(Ragged.of([[0, 1], [2, 1]]), titles, [2], 5, passes, begin=[3])
    batch = stream.batch(0)
    assert sorted(batch.rows["input_ids"].tolist()) == [[3, 5, 6, 2, 7], [3, 7, 2, 0, 0]]
    assert sorted(batch.rows["targets"].tolist()) == [3 * [IGNORE] + [7, 2], [7, 2] + 3 * [IGNORE]]
    assert batch.counts == {NEXT_TOKEN: 4} and (batch.num_tokens, stream.longest) == (9, 6)


def test_histories_without_a_next_title_are_left_out() -> None:
    titles, passes = Ragged.of([[5, 6], [7], [], [8, 9, 10]]), Passes(batch_size=4, seed=0)
    batch = HistoryStream(Ragged.of([[0, 2], [2, 1]]), titles, [2], 5, passes).batch(0)
    assert batch.rows["input_ids"].tolist() == [[7]] and batch.rows["targets"].tolist() == [[2]]
    assert batch.counts == {NEXT_TOKEN: 1}, "nothing stands before the first token, which is not learnt then"
    with pytest.raises(Unsuitable, match="no history has a title after its first event"):
        HistoryStream(Ragged.of([[0, 2]]), titles, [2], 5, passes)


def test_titles_of_one_token_have_nothing_to_fill_in() -> None:
    passes = Passes(batch_size=2, num_epochs=1, seed=0)
    with pytest.raises(Unsuitable, match="no title has two tokens"):
        TitleStream(Ragged.of([[5], [6], []]), "masked", passes, mask=3, mask_share=0.2)
    assert TitleStream(Ragged.of([[5], [6, 7]]), "masked", passes, mask=3, mask_share=0.2).num_steps == 1


def test_tokens_are_masked_and_the_first_never_is() -> None:
    titles = Ragged.of([[5, 6, 7], [], [8, 9]] * 20)
    stream = TitleStream(titles, MASKED_TOKEN, Passes(batch_size=40, num_steps=30, seed=0), mask=2, mask_share=0.25)
    num_masked = 0
    for batch in stream:
        ids_RT, targets_RT, lengths_R = (batch.rows[name] for name in ("input_ids", "targets", "lengths"))
        is_masked_RT = targets_RT != IGNORE
        assert (is_masked_RT == (ids_RT == 2)).all() and not is_masked_RT[:, 0].any()
        whole = np.where(is_masked_RT, targets_RT, ids_RT)
        assert {tuple(row[:length]) for row, length in zip(whole, lengths_R, strict=True)} == {(5, 6, 7), (8, 9)}
        assert batch.counts == {MASKED_TOKEN: is_masked_RT.sum()} and not batch.whole
        num_masked += is_masked_RT.sum()
    assert num_masked / (30 * 60) == pytest.approx(0.25, abs=0.03)


def test_titles_of_equal_tokens_share_a_number() -> None:
    batch = TitleStream(Ragged.of([[5, 6], [7], [], [5, 6]]), SAME_TITLE, Passes(batch_size=4, seed=0)).batch(0)
    by_title = {tuple(row): set() for row in batch.rows["input_ids"].tolist()}
    for row, number in zip(batch.rows["input_ids"].tolist(), batch.rows["targets"].tolist(), strict=True):
        by_title[tuple(row)].add(number)
    assert sorted(map(len, by_title.values())) == [1, 1] and batch.counts == {SAME_TITLE: 3} and batch.whole


# ---- the system ------------------------------------------------------------------------------------------------------


def made_of(settings: LLM2Rec | TitleSASRec, split: Split) -> Any:
    return settings.make(split, "ring", seed=3)


@pytest.mark.slow
def test_without_steps_it_is_the_network_over_vectors_of_the_base(split: Split, tmp_path: Path) -> None:
    """To the last digit, and so it is over the vectors that it has written, however many steps made them."""
    for steps, settings in ((NO_STEPS, TitleSASRec), (STEPS, LLM2Rec)):
        own = made_of(LLM2Rec(**NETWORK, **steps), split)
        own.write_vectors(tmp_path / "items.npz")
        other = made_of(settings(**NETWORK, vectors=str(tmp_path / "items.npz")), split)
        for name, weight in own.model.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name]), name


def test_each_stage_has_a_loss_and_steps_of_its_own(data: TrainingSequences) -> None:
    stages = LLM2Rec(**NETWORK, **STEPS).stages(data, 0)
    rows = [{name: torch.tensor(array) for name, array in stage.stream.batch(0).rows.items()} for stage in stages]
    losses = [stage.trainable.losses(each) for stage, each in zip(stages, rows, strict=True)]
    assert [list(each) for each in losses] == [[NEXT_TOKEN], [MASKED_TOKEN], [SAME_TITLE], [NEXT_ITEM]]
    assert [stage.stream.num_steps for stage in stages] == [2, 2, 2, 2]


@pytest.mark.slow
def test_each_stage_changes_the_vectors(split: Split) -> None:
    vectors = []
    for name in NO_STEPS:
        made = made_of(LLM2Rec(**NETWORK, **{**NO_STEPS, name: 2}, title_batch=8, language_rate=1e-2), split)
        vectors.append(made.model.items.given())
    assert all((vectors[one] - vectors[other]).abs().max() > 1e-3 for one, other in [(0, 1), (0, 2), (1, 2)])


def test_a_finished_one_is_read_again(split: Split, tmp_path: Path) -> None:
    settings = LLM2Rec(**NETWORK, **STEPS)
    first, again = (settings.make(split, "ring", folder=tmp_path) for _ in range(2))
    assert isinstance(first, LLM2RecRecommender) and isinstance(again, LLM2RecRecommender)
    assert torch.equal(first.model.items.given(), again.model.items.given())
    stored = LLM2RecRecommender.from_arrays(first.arrays(), first.catalogue)
    assert stored.settings == settings and torch.equal(stored.model.items.given(), first.model.items.given())
    first.write_vectors(tmp_path / "items.npz")
    item_ids = [str(item) for item in first.catalogue.item_id]
    assert np.array_equal(read_vectors(tmp_path / "items.npz", item_ids), first.model.items.given().numpy())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"masked_share": 1.0}, "masked_share=1.0 must lie between 0 and 1"),
        ({"contrast_dropout": 0.0}, "contrast_dropout=0.0 must lie between 0 and 1"),
        ({"base": "m", "vectors": "v.npz"}, "base=m and vectors=v.npz: give one, as vectors need no base"),
        ({"language_steps": -1}, "language_steps=-1 must not be below 0"),
        ({"frozen_layers": 2}, "frozen_layers=2 leaves no layer of Qwen3ForCausalLM to train"),
    ],
)
def test_bad_settings_are_refused_before_training(
    changed: dict[str, Any], message: str, data: TrainingSequences
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM2Rec(**NETWORK, **changed).stages(data, 0)


def test_rows_longer_than_the_context_are_refused(data: TrainingSequences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.systems.language.CONTEXT", 10)
    with pytest.raises(
        ConfigError, match=r"rows of 11 titles have up to \d+ tokens, and the language model reads 10: let"
    ):
        LLM2Rec(**NETWORK, title_tokens=5).stages(data, 0)
