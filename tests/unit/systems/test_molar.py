"""Molar: the alignment by hand, HLLM as its control, and items of files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.systems.dot_product import SequenceModel
from cprec.systems.items import FrozenTable, TablesTogether
from cprec.systems.language import TextTable
from cprec.systems.recipes.hllm import HLLM
from cprec.systems.recipes.molar import Molar
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.terms import LateAlignment

pytestmark = pytest.mark.usefixtures("in_fp32")
SMALL: dict[str, Any] = {"hidden_size": 16, "batch_size": 16, "max_length": 6, "num_heads": 2, "num_epochs": 1}
OURS: dict[str, Any] = {**SMALL, "num_negatives": 4, "frozen_layers": 1, "item_epochs": 1, "item_steps": 0}


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def stages_of(settings: SystemSettings, data: TrainingSequences) -> list[Stage]:
    torch.manual_seed(0)
    return list(settings.stages(data, 3))


def trained(stage: Stage, num_steps: int = 3) -> list[dict[str, float]]:
    """The losses of some steps, by term."""
    optimizer = torch.optim.AdamW(stage.trainable.parameter_groups(0.05), lr=1e-2)
    found = []
    for step in range(num_steps):
        torch.manual_seed(step)
        batch = stage.stream.batch(step)
        rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
        losses = stage.trainable.losses(rows)
        (sum(losses.values(), torch.zeros(())) / batch.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: float(loss.detach()) for name, loss in losses.items()})
    return found


def test_the_alignment_by_hand() -> None:
    """Two windows with two targets and one: the states at 0 and 90 degrees stand for them. The trained model has its
    own at 60 and 90 degrees, so that cosines are 1/2 and 0, and sin 60 and 1; over 1/2 they are 1, 0, 1.73 and 2."""
    hidden_ND = torch.tensor([[9.0, 9.0], [3.0, 0.0], [0.0, 0.1]])
    given_NG = torch.tensor([[7.0, 1.0], [0.5, math.sqrt(0.75)], [0.0, 4.0]])
    term = LateAlignment(lambda rows: (given_NG, torch.empty(0)), 2, 2, temperature=0.5)
    with torch.no_grad():
        term.matrix.weight.copy_(torch.eye(2))
    targets = torch.tensor([[1, 2], [0, -100]])
    first = math.log(math.e**1 + math.e**0) - 1
    second = math.log(math.exp(math.sqrt(3)) + math.e**2) - 2
    found = term(hidden_ND, {"targets": targets}, torch.empty(0))
    torch.testing.assert_close(found, torch.tensor(3 * (first + second) / 2))


def test_without_alignment_it_is_hllm_whose_items_are_texts_alone(data: TrainingSequences) -> None:
    (mine,) = stages_of(Molar(**OURS, alignment_weight=0), data)
    hllm = {name: value for name, value in OURS.items() if not name.startswith("item_")}
    (control,) = stages_of(HLLM(**hllm, own_rows=False), data)
    found = trained(mine)
    assert found == trained(control) and found[0] != found[2]
    _, aligned = stages_of(Molar(**OURS), data)
    together = trained(aligned, 1)[0]
    assert together["next_item"] == found[0]["next_item"] and together["alignment"] > 0


def test_over_given_vectors_it_is_sasrec_over_them(data: TrainingSequences, circle: str) -> None:
    """With products and the softmax over all items; no language model is read."""
    (mine,) = stages_of(Molar(**SMALL, vectors=circle, alignment_weight=0, cosine=False, num_negatives=0), data)
    control = TitleSASRec(**SMALL, vectors=circle, sampled_items=0, min_steps=0, own_rows=False)
    found = trained(mine)
    assert found == trained(stages_of(control, data)[0])
    assert isinstance(mine.trainable.module.items, FrozenTable)


def test_the_model_of_ids_is_trained_first_and_stays(data: TrainingSequences) -> None:
    of_ids, aligned = stages_of(Molar(**OURS), data)
    sasrec = of_ids.trainable.module
    assert isinstance(sasrec, SequenceModel) and aligned.stream.batch(0).whole and not of_ids.stream.batch(0).whole
    before = {name: value.clone() for name, value in sasrec.state_dict().items()}
    first, again = (trained(aligned, 12)[0]["alignment"] for _ in range(2))
    assert again < 0.9 * first, "of the same rows, with the same ones dropped out"
    assert all(torch.equal(value, before[name]) for name, value in sasrec.state_dict().items())
    kept = dict(aligned.trainable.module.named_parameters())
    assert kept["alignment.matrix.weight"].shape == (64, 16)
    mine = {id(parameter) for parameter in kept.values()}
    assert not mine & {id(parameter) for parameter in sasrec.parameters()}, "it is no part of what is kept"


def test_images_are_added_to_titles_or_to_vectors(data: TrainingSequences, circle: str) -> None:
    for settings, first in (
        (Molar(**OURS, images=circle), TextTable),
        (Molar(**OURS, vectors=circle, images=circle), FrozenTable),
    ):
        *_, stage = stages_of(settings, data)
        table = stage.trainable.module.model.items  # type: ignore[union-attr]
        assert isinstance(table, TablesTogether) and isinstance(table.tables[0], first)
        one, other = (each.vectors() for each in table.tables)  # type: ignore[operator]
        torch.testing.assert_close(table.vectors(), one + other)
        torch.testing.assert_close(table.vectors(torch.tensor([2, 0])), (one + other)[[2, 0]])


def test_items_without_titles_need_vectors(tmp_path: Path) -> None:
    names = [f"i{number}" for number in range(4)]
    catalogue = Catalogue.from_tables({"ring": pa.table({"item_id": names, "title": [""] * 4})})
    untitled = TrainingSequences(catalogue, "ring", Ragged.of([[0, 1, 2], [1, 2, 3]]), ("p/a", "p/b"))
    with pytest.raises(Unsuitable, match="Molar reads titles, and no item of domain 'ring' has one"):
        Molar(**OURS).stages(untitled, 0)
    path = str(tmp_path / "images.npz")
    np.savez(path, item_id=np.array(names), vectors=np.eye(4))
    assert len(Molar(**OURS, vectors=path).stages(untitled, 0)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alignment_weight": -1.0}, "alignment_weight=-1.0 must not be below 0"),
        ({"alignment_temperature": 0.0}, "alignment_temperature=0.0 must be above 0"),
        ({"item_epochs": 0}, "item_epochs=0 must be above 0"),
        ({"base": "a", "vectors": "b"}, "base=a and vectors=b: give one, or reader=base"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Molar(**wrong)


def test_files_are_known_by_content_and_read_before_training(split: Split, circle: str, tmp_path: Path) -> None:
    settings = Molar(**OURS, images=circle)
    assert len(settings.identity()["images"]) == 64
    np.savez(tmp_path / "few.npz", item_id=np.array(["r0"]), vectors=np.ones((1, 2)))
    with pytest.raises(ConfigError, match=r"few.npz has no vector of \d+ items"):
        Molar(**OURS, vectors=str(tmp_path / "few.npz")).make(split, "ring", folder=tmp_path)
    assert not list(tmp_path.glob("*/stage-*")), "nothing was trained"
