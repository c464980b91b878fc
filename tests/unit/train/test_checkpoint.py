from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cprec.errors import CheckpointError
from cprec.models import add_lora, load_model, tiny_model
from cprec.train.checkpoint import (
    FILES,
    OPTIMIZER,
    STATE,
    TrainState,
    checkpoint_folder,
    checkpoints,
    damage,
    load_checkpoint,
    newest_intact,
    remove_checkpoints,
    require_intact,
    save_checkpoint,
)
from cprec.train.loss import PackedLoss
from cprec.train.trainable import make_optimizer

MakeModel = Callable[..., Any]


def take_steps(model: Any, optimizer: torch.optim.Optimizer, num: int) -> None:
    """Some steps on one sentence."""
    ids = torch.arange(5, 15)[None]
    for _ in range(num):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model: Any) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = make_optimizer(PackedLoss(model), weight_decay=0.1)
    take_steps(model, optimizer, 2)
    return model, optimizer


def test_the_state_counts_and_chains_documents() -> None:
    first = TrainState().advance(b"ab", 10, 9, 0.5)
    again = TrainState().advance(b"ab", 10, 9, 0.7)
    second = first.advance(b"c", 5, 4, 0.25)
    assert (second.step, second.num_tokens, second.num_targets, second.seconds) == (2, 15, 13, 0.75)
    assert first.consumed == again.consumed
    assert len({TrainState().consumed, first.consumed, second.consumed, again.advance(b"d", 5, 4, 0).consumed}) == 4


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(make_model: MakeModel, tmp_path: Path) -> None:
    model, optimizer = trained(make_model())
    state = TrainState(step=7, num_tokens=70, num_targets=60, consumed="abc", seconds=0.1 + 0.2)
    folder = save_checkpoint(tmp_path, state, PackedLoss(model), optimizer, keep=1)
    assert folder.name == "checkpoint-7"
    other = make_model(seed=9)
    other_optimizer = make_optimizer(PackedLoss(other), weight_decay=0.1)
    assert load_checkpoint(folder, other, other_optimizer) == state
    take_steps(model, optimizer, 3)
    take_steps(other, other_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_checkpoint_of_adapters_restores_them(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    model, optimizer = trained(add_lora(load_model(tmp_path / "base"), rank=2, alpha=4))
    folder = save_checkpoint(tmp_path, TrainState(step=1), PackedLoss(model), optimizer, keep=1)
    other = add_lora(load_model(tmp_path / "base"), rank=2, alpha=4, seed=1)
    load_checkpoint(folder, other, make_optimizer(PackedLoss(other), weight_decay=0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_only_the_newest_are_kept(make_model: MakeModel, tmp_path: Path) -> None:
    model, optimizer = trained(make_model())
    (tmp_path / "checkpoint-11.incomplete").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    for step in (2, 9, 10):
        save_checkpoint(tmp_path, TrainState(step=step), PackedLoss(model), optimizer, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert (tmp_path / "checkpoint-best").is_dir()
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", [STATE, OPTIMIZER, "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_a_damaged_checkpoint_is_named(make_model: MakeModel, tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = trained(make_model())
    folder = save_checkpoint(tmp_path, TrainState(step=3), PackedLoss(model), optimizer, keep=1)
    path = folder / name
    contents = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": contents[: len(contents) // 2], "garbage": b"\x93not it" * 9}[damage])
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3 cannot be read into .*: delete it to resume from the one before"
    ):
        load_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize("text", ["[]", "null", '{"step": 3, "colour": "red"}'])
def test_a_state_of_another_kind_is_refused(make_model: MakeModel, tmp_path: Path, text: str) -> None:
    model, optimizer = trained(make_model())
    folder = save_checkpoint(tmp_path, TrainState(step=3), PackedLoss(model), optimizer, keep=1)
    (folder / STATE).write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot be read"):
        load_checkpoint(folder, model, optimizer)


def test_a_checkpoint_of_another_model_is_refused(make_model: MakeModel, tokenizer: Any, tmp_path: Path) -> None:
    model, optimizer = trained(make_model())
    folder = save_checkpoint(tmp_path, TrainState(step=3), PackedLoss(model), optimizer, keep=1)
    deeper = tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot be read"):
        load_checkpoint(folder, deeper, make_optimizer(PackedLoss(deeper), weight_decay=0.1))


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "model"
    for text in ("first", "second"):
        with checkpoint_folder(folder) as unfinished:
            (unfinished / "inner").mkdir()
            (unfinished / "inner" / "file").write_text(text)
            assert not folder.exists() or text != "first"
    with pytest.raises(ZeroDivisionError), checkpoint_folder(folder) as unfinished:
        (unfinished / "file").write_text("third")
        raise ZeroDivisionError
    assert (folder / "inner" / "file").read_text() == "second"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"file/model could not be written \(.*make room, then start the same"),
        checkpoint_folder(tmp_path / "file" / "model"),
    ):
        pass


def test_the_state_file_is_readable_json(make_model: MakeModel, tmp_path: Path) -> None:
    model, optimizer = trained(make_model())
    folder = save_checkpoint(tmp_path, TrainState(step=3, num_tokens=12), PackedLoss(model), optimizer, keep=1)
    assert json.loads((folder / STATE).read_text())["num_tokens"] == 12


# ---- damage ----------------------------------------------------------------------------------------------------------


def change(path: Path, how: str) -> None:
    """Damages a file: its size stays the same if one bit flips."""
    contents = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(contents[: len(contents) // 2])
    else:
        contents[len(contents) // 2] ^= 1
        path.write_bytes(contents)


SAYS = {
    "missing": r"(is missing|cannot be read \(FileNotFoundError)",
    "cut": r"(has [\d,]+ bytes instead of [\d,]+|cannot be read \(JSONDecodeError)",
    "flipped": r"(the SHA-256 of .* is not the one recorded when it was written|files.json)",
}


@pytest.mark.parametrize("name", [STATE, OPTIMIZER, FILES, "model.safetensors", "config.json"])
@pytest.mark.parametrize("how", list(SAYS))
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    make_model: MakeModel, tmp_path: Path, name: str, how: str
) -> None:
    model, optimizer = trained(make_model())
    good, bad = (
        save_checkpoint(tmp_path, TrainState(step=step), PackedLoss(model), optimizer, keep=2) for step in (3, 6)
    )
    assert newest_intact(tmp_path) == bad and damage(bad) is None
    change(bad / name, how)
    with pytest.warns(UserWarning, match=rf"going on from {good}, .*is damaged: {bad}: .*{SAYS[how]}"):
        assert newest_intact(tmp_path) == good


def test_no_intact_checkpoint_is_an_error_and_none_at_all_is_not(make_model: MakeModel, tmp_path: Path) -> None:
    assert newest_intact(tmp_path) is None
    model, optimizer = trained(make_model())
    for step in (3, 6):
        change(
            save_checkpoint(tmp_path, TrainState(step=step), PackedLoss(model), optimizer, keep=2) / OPTIMIZER,
            "flipped",
        )
    with pytest.raises(CheckpointError, match=r"no checkpoint .* intact \(.*checkpoint-6.*checkpoint-3.*=never"):
        newest_intact(tmp_path)


def test_a_damaged_checkpoint_chosen_by_hand_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model, optimizer = trained(make_model())
    folder = save_checkpoint(tmp_path, TrainState(step=3), PackedLoss(model), optimizer, keep=1, kind="stable")
    require_intact(folder)
    change(folder / "model.safetensors", "flipped")
    with pytest.raises(CheckpointError, match=r"stable-3 is damaged \(the SHA-256 of model.safetensors .*another"):
        require_intact(folder)


@pytest.mark.parametrize("listed", ["[]", "{}", '{"model.safetensors": 3}', '{"model.safetensors": {}}'])
def test_a_list_of_files_that_proves_nothing_is_not_believed(
    make_model: MakeModel, tmp_path: Path, listed: str
) -> None:
    model, optimizer = trained(make_model())
    folder = save_checkpoint(tmp_path, TrainState(step=3), PackedLoss(model), optimizer, keep=1)
    (folder / FILES).write_text(listed)
    assert (damage(folder) or "").startswith(FILES)


def test_a_damaged_checkpoint_of_a_later_step_does_not_crowd_out_good_ones(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model, optimizer = trained(make_model())
    save_checkpoint(tmp_path, TrainState(step=10), PackedLoss(model), optimizer, keep=1)
    save_checkpoint(
        tmp_path, TrainState(step=7), PackedLoss(model), optimizer, keep=1
    )  # training fell back to before 7
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-7"]


# ---- stable checkpoints ----------------------------------------------------------------------------------------------


def test_stable_checkpoints_are_resumed_from_and_never_make_room(make_model: MakeModel, tmp_path: Path) -> None:
    model, optimizer = trained(make_model())
    save_checkpoint(tmp_path, TrainState(step=4), PackedLoss(model), optimizer, keep=1)
    stable = save_checkpoint(tmp_path, TrainState(step=5), PackedLoss(model), optimizer, keep=1, kind="stable")
    assert newest_intact(tmp_path) == stable
    for step in (6, 7):
        save_checkpoint(tmp_path, TrainState(step=step), PackedLoss(model), optimizer, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["stable-5", "checkpoint-7"]
    for name in ("checkpoint-3.incomplete", "stable-2.discarded", "checkpoint-best"):
        (tmp_path / name).mkdir()
    remove_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-best", "stable-5"]
    remove_checkpoints(tmp_path, stable=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]
