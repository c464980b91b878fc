"""Runs killed at random moments, again and again, end as if they had never been."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cprec.config import from_mapping
from cprec.recipes.demo import demo
from cprec.text.prepare import prepare
from cprec.train import training
from cprec.train.checkpoint import OPTIMIZER, checkpoints
from cprec.train.config import PretrainConfig
from cprec.train.folder import LOG, read_done, read_log
from cprec.train.pretrain import pretrain

ROOT = Path(__file__).parents[2]

# Tells of every moment at which it may be killed: before each call of the functions that read, train and write.
TRAIN = """
import json, os, sys
import torch
from cprec.config import from_mapping
from cprec.train import checkpoint, loop, training
from cprec.train.pretrain import PretrainConfig, pretrain

torch.set_num_threads(1)

def told(owner, name):
    function = getattr(owner, name)
    def call(*arguments, **named):
        print(name, flush=True)
        sys.stdin.readline()
        return function(*arguments, **named)
    setattr(owner, name, call)

told(os, "fsync")
told(torch, "save")
told(checkpoint, "remove_folder")
told(checkpoint, "file_sha256")
told(training, "_publish")
told(loop.TrainState, "advance")
told(loop._Log, "write")
pretrain(from_mapping(PretrainConfig, json.loads(sys.argv[1])))
"""


def killed_after(settings: dict[str, Any], moments: int) -> str | None:
    """Train until that many moments have passed, then SIGKILL; returns the last one, or None if training ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "CPREC_PROGRESS": "off", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        for _ in range(moments):
            name = process.stdout.readline()
            if not name:
                _, errors = process.communicate()
                assert process.returncode == 0, errors
                return None
            process.stdin.write("\n")
            process.stdin.flush()
        name = process.stdout.readline()
        process.kill()
    return name.strip() or None


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How to pre-train on a small world."""
    folder = tmp_path_factory.mktemp("world")
    config = demo(output_dir=str(folder)).prepare
    world = replace(config.synthetic, num_market_users=60, num_library_users=40, items_per_domain=30)
    prepare(replace(config, synthetic=world, heldout_share=0.1))
    return {
        "data": config.output_dir,
        "tiny": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "learning_rate": 0.01,
        "max_length": 256,
        "train_batch_size": 4,
        "bf16": "false",
        "save_steps": 4,
        "logging_steps": 1,
        "eval_steps": 10,
        "eval_tokens": 500,
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_again_and_again_ends_as_one_that_never_was(
    settings: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    assert killed_after({**settings, "output_dir": str(whole)}, 10**6) is None
    steps = len([line for line in read_log(whole / LOG) if "loss" in line])
    assert steps > 12

    draw = random.Random(seed)
    where = []
    while (last := killed_after({**settings, "output_dir": str(cut)}, draw.randint(1, 150))) is not None:
        where.append(last)
        assert len(where) < 100, "the run does not get on"
    assert len(where) >= 3 and len(set(where)) >= 2, where
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    done, expected = read_done(cut), read_done(whole)
    assert done is not None and expected is not None
    assert (done["consumed"], done["tokens"]) == (expected["consumed"], expected["tokens"])
    without_times = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_log(folder / LOG)]
        for folder in (cut, whole)
    ]
    assert without_times[0] == without_times[1]
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def start(name: str) -> Path:
        return pretrain(from_mapping(PretrainConfig, {**settings, "output_dir": str(tmp_path / name)}))

    whole = start("whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_publish", stop)
        start("cut")
    before, newest = checkpoints(tmp_path / "cut")[-2:]
    optimizer = newest / OPTIMIZER
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"going on from {before}, .*{newest}: {OPTIMIZER} has .* bytes instead of"):
        cut = start("cut")
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
