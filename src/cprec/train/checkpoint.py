"""Checkpoints: written aside, flushed and renamed, so that a kill at any moment leaves the last complete one.

A checkpoint is a model folder of whole tensors and the optimizer's state, which processes that each hold a part of it
write part by part (torch.distributed.checkpoint). Whatever number of processes wrote it, any number can read it.
`files.json` has the size and SHA-256 of each file, so that later damage by a disk or a copy is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cprec import distributed
from cprec.errors import CheckpointError
from cprec.files import aside, whole_folder
from cprec.provenance import file_sha256
from cprec.train.trainable import Trainable

STATE, FILES = "trainer_state.json", "files.json"
OPTIMIZER, OPTIMIZER_PARTS = "optimizer.pt", "optimizer"
"""The optimizer's state: a file, or a folder that several processes wrote."""
Kind = Literal["checkpoint", "stable"]
"""`checkpoint-<step>` makes room for newer ones; `stable-<step>`, kept for anneal forks, never does."""
_NAME = re.compile(r"(checkpoint|stable)-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """How far a run has come. With the plan of the stream this is all that resuming needs besides the weights."""

    step: int = 0
    """Steps completed, which is also the next step's number."""
    num_tokens: int = 0
    num_targets: int = 0
    consumed: str = ""
    """Running SHA-256 over the examples trained on, in order."""
    seconds: float = 0.0
    """Training time, interruptions left out."""

    def advance(self, examples: bytes, num_tokens: int, num_targets: int, seconds: float) -> TrainState:
        """The state after one more step on these examples (their numbers as bytes)."""
        return TrainState(
            step=self.step + 1,
            num_tokens=self.num_tokens + num_tokens,
            num_targets=self.num_targets + num_targets,
            consumed=hashlib.sha256(self.consumed.encode() + examples).hexdigest(),
            seconds=self.seconds + seconds,
        )


@contextmanager
def checkpoint_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which appears complete as `folder` or not at all, and replaces an older one.

    Raises CheckpointError if the disk is full or cannot be written.
    """
    try:
        with whole_folder(folder) as unfinished:
            yield unfinished
    except Exception as error:
        if not _is_write_failure(error):
            raise
        raise _not_written(folder, error) from error


def _not_written(folder: Path, reason: BaseException | str) -> CheckpointError:
    place = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    return CheckpointError(
        f"{folder} could not be written ({reason}); {free / 1e6:,.0f} MB are free there. Nothing incomplete was "
        "left and earlier checkpoints are untouched: make room, then start the same command again to resume"
    )


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there; a kill on the way never leaves half of it under its name."""
    discarded = folder.with_name(folder.name + ".discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    if folder.exists():
        folder.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def _is_write_failure(error: Exception) -> bool:
    """Disk errors as Python, torch's zip writer and safetensors report them."""
    return isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or isinstance(error, SafetensorError)


def save_checkpoint(
    output_dir: Path,
    state: TrainState,
    trainable: Trainable,
    optimizer: torch.optim.Optimizer,
    keep: int,
    *,
    kind: Kind = "checkpoint",
) -> Path:
    """Write `<kind>-<step>`, then remove checkpoints of later steps and all but the newest `keep` of this and earlier
    ones. Those named `stable-` stay. All processes call it, the first one writes.

    Raises CheckpointError (see `checkpoint_folder`), in all of them.
    """
    module, folder = trainable.module, output_dir / f"{kind}-{state.step}"
    weights = whole_weights(module)
    parts = aside(output_dir / OPTIMIZER_PARTS)
    if distributed.is_sharded(module):
        _write_parts(parts, get_optimizer_state_dict(module, optimizer), of=folder)
        moments = None
    else:
        moments = get_optimizer_state_dict(module, optimizer, options=_whole())

    def write_and_make_room() -> Path:
        with checkpoint_folder(folder) as unfinished:
            trainable.save(unfinished, weights)
            if moments is None:
                parts.rename(unfinished / OPTIMIZER_PARTS)
            else:
                with open(unfinished / OPTIMIZER, "wb") as file:
                    torch.save(moments, file)
            (unfinished / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")
            (unfinished / FILES).write_text(json.dumps(_sizes_and_hashes(unfinished), indent=1) + "\n")
        _remove_old(output_dir, state.step, keep)
        return folder

    return distributed.by_first(write_and_make_room)


def _sizes_and_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _remove_old(output_dir: Path, step: int, keep: int) -> None:
    found = checkpoints(output_dir, ("checkpoint",))
    # A later step is on disk only where its checkpoint was damaged and training fell back to an earlier one.
    later = [path for path in found if step_of(path) > step]
    for old in [*later, *[path for path in found if path not in later][:-keep]]:
        remove_folder(old)


def _write_parts(folder: Path, moments: dict[str, Any], *, of: Path) -> None:
    """Each process writes what it holds of the optimizer's state. Raises CheckpointError in all if one cannot, which
    names the checkpoint that the folder is to be part `of`."""

    def make_room() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)

    distributed.by_first(make_room)
    try:
        save(moments, checkpoint_id=folder)
    except CheckpointException as error:
        distributed.by_first(lambda: shutil.rmtree(folder, ignore_errors=True))
        failures = "; ".join(f"process {rank}: {found!r}" for rank, (found, _) in error.failures.items())
        raise _not_written(of / OPTIMIZER_PARTS, failures) from error


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights that a model folder holds, on the CPU, tied ones once; of an adapted model the adapters.

    All processes call it; where weights are spread over them, the first one gets them all and the others none.
    """
    kept = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # each tensor once
    found = get_model_state_dict(model, options=_whole(trained_only=hasattr(model, "peft_config")))
    return {name: value for name, value in found.items() if name in kept}  # type: ignore[misc]


def _whole(trained_only: bool = False) -> Any:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False, ignore_frozen_params=trained_only)


def remove_checkpoints(output_dir: Path, *, stable: bool = False) -> None:
    """Remove the checkpoints of a run, those named `stable-` only if asked to, and what kills left of others."""
    shutil.rmtree(aside(output_dir / OPTIMIZER_PARTS), ignore_errors=True)
    for path in output_dir.glob("*"):
        name = path.name.removesuffix(".incomplete").removesuffix(".discarded")
        match = _NAME.fullmatch(name)
        if match and (stable or match[1] != "stable" or name != path.name):
            remove_folder(path)


def checkpoints(output_dir: Path, kinds: Sequence[Kind] = ("checkpoint", "stable")) -> list[Path]:
    """Complete checkpoints of these kinds, oldest first."""
    found = [path for kind in kinds for path in output_dir.glob(f"{kind}-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The number of steps done in a checkpoint, from its name."""
    return int(folder.name.rpartition("-")[2])


def newest_intact(output_dir: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None where there is none of any kind. A damaged one is named in
    a warning and passed over.

    Raises CheckpointError if there are checkpoints and all are damaged: nothing is silently trained again.
    """
    damaged: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        reason = damage(folder)
        if reason is None:
            if damaged:
                warnings.warn(
                    f"going on from {folder}, since a newer checkpoint is damaged: {'; '.join(damaged)}", stacklevel=2
                )
            return folder
        damaged.append(f"{folder}: {reason}")
    if damaged:
        raise CheckpointError(
            f"no checkpoint of this run is intact ({'; '.join(damaged)}): restore one, or start again with "
            "resume_from_checkpoint=never"
        )
    return None


def require_intact(folder: Path) -> None:
    """Raises CheckpointError if a checkpoint that was chosen by hand is damaged."""
    reason = damage(folder)
    if reason is not None:
        raise CheckpointError(f"{folder} is damaged ({reason}): begin from another checkpoint of its run")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if they are as they were written."""
    try:
        written = json.loads((folder / FILES).read_text())
        for name, expected in written.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if file_sha256(path) != expected["sha256"]:
                return f"the SHA-256 of {name} is not the one recorded when it was written"
        if STATE in written and (OPTIMIZER in written or f"{OPTIMIZER_PARTS}/.metadata" in written):
            return None
        return f"{FILES} does not list the files of a checkpoint"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILES} cannot be read ({error!r})"


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restore weights and optimizer in place. Raises CheckpointError if a file cannot be read or is of another model.

    Damage that leaves the files readable is found by `newest_intact` and `damage`, not here.
    """
    unreadable = (
        *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError),
        *(UnpicklingError, SafetensorError, CheckpointException),
    )
    try:
        state = read_state(folder)
        weights: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
        if hasattr(model, "peft_config"):  # peft leaves the adapter's name out of its files
            weights = {re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", n): w for n, w in weights.items()}
        expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in model.named_buffers()}  # such as the version of an item's codes
        if expected - weights.keys() or weights.keys() - known:
            raise ValueError(
                f"weights missing {sorted(expected - weights.keys())}, unexpected {sorted(weights.keys() - known)}"
            )
        _load_moments(folder, model, optimizer)
        set_model_state_dict(model, weights, options=_whole())
    except unreadable as error:
        raise CheckpointError(
            f"{folder} cannot be read into this model ({error!r}): delete it to resume from the one before"
        ) from error
    return state


def _load_moments(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer from whole tensors or parts, whichever the folder has; it is spread as the model is."""
    if (folder / OPTIMIZER_PARTS).is_dir():
        moments = get_optimizer_state_dict(model, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
            load(moments, checkpoint_id=folder / OPTIMIZER_PARTS)
        set_optimizer_state_dict(model, optimizer, moments)
    else:
        moments = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        set_optimizer_state_dict(model, optimizer, moments, options=_whole())


def read_state(folder: Path) -> TrainState:
    """The state of a run when it wrote a checkpoint. Raises CheckpointError if that cannot be read."""
    try:
        return TrainState(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} cannot be read into a run ({error!r}): delete it to resume from the one before"
        ) from error
