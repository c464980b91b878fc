"""Checkpoints: written aside, flushed and renamed, so that a kill at any moment leaves the last complete one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from cprec.errors import CheckpointError

STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """What a run has done so far; with the plan of the stream it is all that resuming needs besides the weights."""

    step: int = 0
    """Steps completed, which is also the next step's number."""
    num_tokens: int = 0
    num_targets: int = 0
    consumed: str = ""
    """Running SHA-256 over the documents trained on, in order."""
    seconds: float = 0.0
    """Training time, interruptions left out."""

    def advance(self, documents: bytes, num_tokens: int, num_targets: int, seconds: float) -> TrainState:
        """The state after one more step on these documents (their row numbers as bytes)."""
        return TrainState(
            step=self.step + 1,
            num_tokens=self.num_tokens + num_tokens,
            num_targets=self.num_targets + num_targets,
            consumed=hashlib.sha256(self.consumed.encode() + documents).hexdigest(),
            seconds=self.seconds + seconds,
        )


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` by `write(temporary folder)`; it appears complete or not at all, and replaces an older one.

    Raises CheckpointError if the disk is full or cannot be written; the temporary folder is removed.
    """
    temporary = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _flush(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_write_failure(error):
            raise
        free = shutil.disk_usage(folder.parent).free if folder.parent.exists() else 0
        raise CheckpointError(
            f"{folder} could not be written ({error}); {free / 1e6:,.0f} MB are free there. Nothing incomplete was "
            "left and earlier checkpoints are untouched: make room, then start the same command again to resume"
        ) from error


def _is_write_failure(error: Exception) -> bool:
    """Disk errors as Python, torch's zip writer and safetensors report them."""
    return (
        isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or type(error).__name__ == "SafetensorError"
    )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    output_dir: Path,
    state: TrainState,
    model: Any,
    optimizer: torch.optim.Optimizer,
    keep: int,
    name: str = "checkpoint",
) -> Path:
    """Write `<name>-<step>` and remove all but the newest `keep` of the checkpoints that resuming goes on from.

    Raises CheckpointError (see `write_folder`).
    """

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        with open(folder / OPTIMIZER, "wb") as file:
            torch.save(optimizer.state_dict(), file)
        (folder / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")

    folder = output_dir / f"{name}-{state.step}"
    write_folder(folder, write)
    for old in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read_state(folder: Path) -> TrainState:
    """How far the run was that wrote a checkpoint. Raises CheckpointError where that cannot be read."""
    try:
        return TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint that can be read ({error!r})") from error


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restore weights and optimizer in place. Raises CheckpointError if a file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    unreadable = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, UnpicklingError, SafetensorError)
    try:
        state = TrainState(**json.loads((folder / STATE).read_text()))
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
        adapter = folder / "adapter_model.safetensors"
        if adapter.is_file():
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, load_file(adapter))
        else:
            weights: dict[str, torch.Tensor] = {}
            for path in sorted(folder.glob("model*.safetensors")):
                weights |= load_file(path)
            missing, unexpected = model.load_state_dict(weights, strict=False)
            tied = set(getattr(model, "_tied_weights_keys", None) or ())
            if unexpected or set(missing) - tied:
                raise ValueError(f"weights missing {sorted(set(missing) - tied)}, unexpected {sorted(unexpected)}")
            model.tie_weights()
    except unreadable as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error!r}): delete it to resume from the one before"
        ) from error
    return state
