"""Recformer: attributes as tokens, runs of them, attention within a window, its losses, and the stages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.schema import TEST
from cprec.systems.attributes import (
    KEY,
    MASK,
    START,
    VALUE,
    AttributeModel,
    AttributeReader,
    InBatch,
    MaskedWords,
    Words,
    words_of,
)
from cprec.systems.encoders import SelfAttention
from cprec.systems.fit import WEIGHTS
from cprec.systems.recipes.recformer import CONTRAST, WORDS, Recformer
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM

pytestmark = pytest.mark.usefixtures("in_fp32")
SMALL: dict[str, Any] = {"hidden_size": 8, "num_blocks": 1, "num_heads": 2, "batch_size": 16, "max_length": 4}
WORD_TOKENS = Words(
    Ragged.of([[3, 4, 5], [3, 6], [], [3, 7, 8, 9]]), Ragged.of([[1, 2, 2], [1, 2], [], [1, 2, 2, 2]]), 10
)
V = 4


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def reader_of(window: int = 0, *, num_blocks: int = 2, max_items: int = 3, max_tokens: int = 12) -> AttributeReader:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 2, "dropout": 0.0, "causal": False}
    blocks = SelfAttention(8, max_length=1, num_blocks=num_blocks, **sizes).blocks
    return AttributeReader(
        WORD_TOKENS, 8, list(blocks), max_items=max_items, max_tokens=max_tokens, window=window
    ).eval()


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_attributes_are_keys_and_values() -> None:
    table = {"item_id": ["a", "b"], "title": ["red shoe", "hat"], "brand": ["Acme", None], "categories": [None, "red"]}
    data = TrainingSequences(Catalogue.from_tables({"shop": pa.table(table)}), "shop", Ragged.of([[0, 1]]), ("u",))
    words = words_of(data, 32)
    title, red, shoe, brand, acme = words.tokens[0].tolist()
    again, hat, category, same = words.tokens[1].tolist()
    assert (again, same) == (title, red) and len({title, red, shoe, brand, acme, hat, category}) == 7
    assert words.kinds[0].tolist() == [KEY, VALUE, VALUE, KEY, VALUE]
    assert min(words.tokens.values) > MASK and max(words.tokens.values) < words.num_tokens
    assert words_of(data, 2).tokens[0].tolist() == [title, red, brand, acme], "each attribute is cut by itself"


def test_what_is_read_tells_runs_apart() -> None:
    """A run with other attributes is another run, which must not be taken for one that is finished."""
    table = {"item_id": ["a"], "title": ["hat"], "brand": ["Acme"], "categories": ["red"]}
    digests = {
        TrainingSequences(
            Catalogue.from_tables({"shop": pa.table(items)}), "shop", Ragged.of([[0, 0]]), ("u",)
        ).digest()
        for items in (table, *(table | {name: ["other"]} for name in table))
    }
    assert len(digests) == 5


def test_items_without_attributes_are_refused() -> None:
    table = pa.table({"item_id": ["a", "b"], "title": ["", ""]})
    data = TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", Ragged.of([[0, 1]]), ("u",))
    with pytest.raises(Unsuitable, match="no item of domain 'shop' has a title, a brand or a category"):
        words_of(data, 32)


def test_a_run_begins_with_the_latest_item() -> None:
    runs = reader_of().runs(torch.tensor([[0, 2, 1], [3, V, V], [V, V, V]]))
    assert runs.token_RL.tolist() == [[START, 3, 6, 3, 4, 5], [START, 3, 7, 8, 9, 0], [START, 0, 0, 0, 0, 0]]
    assert runs.kind_RL.tolist()[0] == [0, KEY, VALUE, KEY, VALUE, VALUE]
    assert runs.item_RL.tolist() == [[0, 1, 1, 3, 3, 3], [0, 1, 1, 1, 1, 0], [0] * 6]
    few = torch.tensor([[0, 1, 3]])
    assert reader_of(max_items=2).runs(few).token_RL.tolist() == [[START, 3, 7, 8, 9, 3, 6]]
    assert reader_of(max_tokens=4).runs(few).token_RL.tolist() == [[START, 3, 7, 8]]


# ---- attention -------------------------------------------------------------------------------------------------------


def test_a_window_as_long_as_the_run_on_either_side_is_no_window() -> None:
    items_RT = torch.tensor([[0, 1, 3], [3, V, V]])
    full, wide, narrow = (reader_of(window) for window in (0, 18, 2))
    runs = full.runs(items_RT)
    assert runs.token_RL.shape[1] == 10
    torch.testing.assert_close(wide(runs), full(runs))
    assert (narrow(runs) - full(runs)).abs().max() > 1e-3


def test_a_token_reads_its_window_and_the_start_which_reads_all() -> None:
    reader = reader_of(2, num_blocks=1)
    runs = reader.runs(torch.tensor([[0, 1, 3]]))
    changed = runs._replace(token_RL=runs.token_RL.clone())
    changed.token_RL[0, 8] = 9
    moved_L = (reader(changed) - reader(runs))[0].abs().amax(1) > 1e-6
    assert moved_L.nonzero().squeeze(1).tolist() == [0, 7, 8, 9]


def test_padding_changes_nothing() -> None:
    reader = reader_of(2)
    both = reader(reader.runs(torch.tensor([[0, 1, 3], [3, V, V]])))
    alone = reader(reader.runs(torch.tensor([[3]])))
    torch.testing.assert_close(both[1, :5], alone[0])


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_a_history_is_set_against_the_targets_of_the_others() -> None:
    """Three histories, of which two share a target: that target stands there once."""
    model = AttributeModel(reader_of(), V, 8)
    states_ND, targets = torch.randn(3, 8), torch.tensor([0, 3, 0])
    first_D, second_D = model.read(torch.tensor([[0], [3]])).detach()
    expected = 0.0
    for state_D, own_D, other_D in zip(
        states_ND, (first_D, second_D, first_D), (second_D, first_D, second_D), strict=True
    ):
        expected += math.log(1 + math.exp((state_D @ other_D - state_D @ own_D).item() / 0.5))
    found = InBatch(model, 0.5)(states_ND, {"targets": targets}, model.vectors().items_VD)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert first_D.norm().item() == pytest.approx(1)


def test_all_words_masked_are_predicted_from_their_states() -> None:
    reader = reader_of()
    words = MaskedWords(reader, 8, share=1.0)
    rows = {"items": torch.tensor([[0, V], [1, 3]]), "targets": torch.tensor([1, 2])}
    expected = 0.0
    for items_RT in (rows["items"], rows["targets"][:, None]):
        runs = reader.runs(items_RT)
        is_word_RL = runs.token_RL > MASK
        hidden_RLD = reader(runs._replace(token_RL=torch.where(is_word_RL, MASK, runs.token_RL)))
        logits_RLX = words.head(hidden_RLD) @ reader.word.weight.T
        expected += F.cross_entropy(logits_RLX[is_word_RL], runs.token_RL[is_word_RL]).item()
    assert words(torch.empty(2, 8), rows, torch.empty(4, 8)).item() == pytest.approx(2 * expected, rel=1e-5)
    assert not [name for name, _ in words.named_parameters() if not name.startswith("head")]


# ---- the system ------------------------------------------------------------------------------------------------------


def losses_of(settings: Recformer, data: TrainingSequences) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    first, *_ = settings.stages(data, 3)
    rows = {name: torch.from_numpy(array) for name, array in first.stream.batch(0).rows.items()}
    torch.manual_seed(1)
    return dict(first.trainable.losses(rows))


def test_without_masks_or_a_window_its_losses_are_the_same(data: TrainingSequences) -> None:
    """Masks add a term, and a window changes nothing where it holds all runs."""
    whole = losses_of(Recformer(**SMALL, window=512), data)
    contrast, full = (losses_of(Recformer(**SMALL, **changed), data) for changed in ({"mask_weight": 0}, {"window": 0}))
    assert list(whole) == [CONTRAST, WORDS] and list(contrast) == [CONTRAST]
    assert torch.equal(whole[CONTRAST], contrast[CONTRAST])
    torch.testing.assert_close(whole, full)


def test_stages_are_left_out(data: TrainingSequences) -> None:
    for first, last, expected in ((1, 1, 3), (0, 1, 2), (0, 0, 1)):
        stages = Recformer(**SMALL, first_epochs=first, last_epochs=last).stages(data, 0)
        assert len(stages) == expected
        assert list(stages[-1].stream.batch(0).counts) == [NEXT_ITEM]
        assert stages[0].stream.batch(0).whole == (first > 0)


def test_the_matrix_of_the_last_stage_is_that_of_the_best_weights_before_it(split: Split, tmp_path: Path) -> None:
    settings = Recformer(**SMALL, num_epochs=0.2, first_epochs=0.2, last_epochs=0.2)
    made: Any = settings.make(split, "ring", folder=tmp_path)
    items_VD = made.model.vectors().items_VD.clone()
    (folder,) = tmp_path.iterdir()
    before = load_file(folder / "stage-2" / WEIGHTS)
    assert torch.equal(before["items_VD"], items_VD)
    made.model.load_state_dict(before)
    made.model.read_all_items()
    torch.testing.assert_close(made.model.vectors().items_VD, items_VD)


@pytest.mark.slow
def test_learns_what_comes_next(split: Split) -> None:
    settings = Recformer(**{**SMALL, "hidden_size": 16}, dropout=0.0, learning_rate=1e-2, num_epochs=3, first_epochs=6)
    queries = split.queries("ring", TEST, max_history=50)
    users = [f"p/{split.interactions.user_id[row]}" for row in queries.user]
    made = settings.make(split, "ring")
    better, _ = made.target_ranks(queries.history, queries.target, users=users, exclude_seen=True)
    assert (better == 0).mean() > 0.8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": -1}, "window=-1 must not be below 0"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"mask_share": 1.0}, "mask_share=1.0 must be below 1"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recformer(**changed)
