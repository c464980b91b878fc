from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cprec import distributed
from cprec.batch import IGNORE
from cprec.errors import TrainingError
from cprec.provenance import to_dict
from cprec.text.stream import TokenStream
from cprec.train.checkpoint import checkpoints, damage
from cprec.train.config import PretrainConfig, TinyModel
from cprec.train.folder import LOG, read_done, read_log
from cprec.train.pretrain import pretrain

MakeConfig = Callable[..., PretrainConfig]
PATIENCE = 600
"""Seconds after which processes that wait for each other for ever are given up."""

PRETRAIN = """
import json, sys
import torch
from cprec.config import from_mapping
from cprec.train.pretrain import PretrainConfig, pretrain

torch.set_num_threads(1)
for settings in json.loads(sys.argv[1]):
    pretrain(from_mapping(PretrainConfig, settings))
"""

# Prints "ready" when step 7 begins, then waits for a line.
WAITING = (
    """
import sys
from cprec.train.schedule import Schedule

learning_rate = Schedule.__call__

def wait(self, step):
    if step == 6 and not seen:
        seen.append(step)
        print("ready", flush=True)
        sys.stdin.readline()
    return learning_rate(self, step)

seen = []
Schedule.__call__ = wait
"""
    + PRETRAIN
)


@pytest.fixture
def config(data: Path, tmp_path: Path) -> MakeConfig:
    """Three rows a step: two processes get two and one, and the last step leaves one of them without any."""

    def make(name: str, **changes: Any) -> PretrainConfig:
        settings: dict[str, Any] = {
            "data": str(data),
            "output_dir": str(tmp_path / name),
            "tiny": TinyModel(hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
            "learning_rate": 1e-2,
            "max_length": 96,
            "train_batch_size": 3,
            "micro_batch_size": 1,
            "bf16": "false",
            "save_steps": 5,
            "logging_steps": 1,
            "eval_steps": 8,
        }
        return PretrainConfig(**settings | changes)

    return make


def as_json(*configs: PretrainConfig) -> str:
    return json.dumps([to_dict(config) for config in configs])


def curve(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_log(folder / LOG) if name in line]


def consumed(folder: Path) -> str:
    done = read_done(folder)
    assert done is not None
    return str(done["consumed"])


def assert_same_curves(one: Path, other: Path) -> None:
    """Gradient norms too: Adam would hide gradients that are all too large by the same factor."""
    for name in ("loss", "grad_norm"):
        assert curve(other, name) == pytest.approx(curve(one, name), rel=1e-3)
    measured = zip(read_log(one / LOG), read_log(other / LOG), strict=True)
    for before, after in measured:
        assert after.get("heldout", {}) == pytest.approx(before.get("heldout", {}), rel=1e-3)


def assert_same_run(one: Path, other: Path) -> None:
    """The same documents, and the same numbers but for the order of sums."""
    assert consumed(one) == consumed(other)
    assert_same_curves(one, other)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-2, atol=2e-3)


# ---- one process -----------------------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged() -> None:
    distributed.join_processes()
    assert (distributed.rank(), distributed.num_ranks(), distributed.is_first()) == (0, 1, True)
    tensor = torch.ones(2)
    assert distributed.sum_over_ranks(tensor) is tensor and distributed.whole(tensor) is tensor
    assert distributed.by_first(lambda: 3) == 3 and distributed.all_equal("a")
    with pytest.raises(ZeroDivisionError):
        distributed.by_first(lambda: 1 // 0)
    module = torch.nn.Linear(2, 2)
    distributed.shard(module, [], bf16=False)
    assert not distributed.is_sharded(module)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("max_rows", [0, 1, 2])
def test_processes_share_out_the_rows(make_stream: Callable[..., TokenStream], num_ranks: int, max_rows: int) -> None:
    stream = make_stream(rows_per_step=5)
    for batch in (stream.batch(0), stream.batch(stream.num_steps - 1)):
        shares = [batch.micro_batches(max_rows, rank, num_ranks) for rank in range(num_ranks)]
        assert len({len(share) for share in shares}) == 1  # sharded processes work in step
        micro = [part for share in shares for part in share]
        assert all(len(part["input_ids"]) for part in micro)
        with_targets = [part for part in micro if (part["targets"] != IGNORE).any()]
        for name, rows in batch.rows.items():
            assert np.array_equal(np.concatenate([part[name] for part in with_targets]), rows)
        assert max(len(part["input_ids"]) for part in micro) <= (max_rows or -(-batch.num_rows // num_ranks))


def test_only_failed_exchanges_are_named_so() -> None:
    with (
        pytest.raises(TrainingError, match=r"lost touch with the others \(.*gloo.*Connection closed.*to resume"),
        distributed.naming_lost_processes(),
    ):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321\nframe 1")
    with pytest.raises(RuntimeError, match="shapes"), distributed.naming_lost_processes():
        raise RuntimeError("shapes differ")


# ---- two processes ---------------------------------------------------------------------------------------------------

EXCHANGES = """
import torch
from cprec import distributed
from cprec.batch import IGNORE
from cprec.errors import CheckpointError, TrainingError

distributed.join_processes(60)
distributed.join_processes(60)
rank = distributed.rank()
assert distributed.num_ranks() == 2 and distributed.is_first() == (rank == 0)
assert distributed.by_first(lambda: f"from {rank}") == "from 0"
assert distributed.sum_over_ranks(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
assert distributed.all_equal("same") and not distributed.all_equal(str(rank))

def fail(error):
    raise error

for error, expected in ((CheckpointError("full"), CheckpointError), (OSError("gone"), OSError)):
    try:
        distributed.by_first(lambda: fail(error))
    except Exception as raised:
        assert isinstance(raised, expected if rank == 0 else (CheckpointError, TrainingError)), raised
        assert str(error) in str(raised)
    else:
        raise AssertionError("nothing was raised")

distributed.BUCKET = 10  # several exchanges for few numbers
parameters = [torch.nn.Parameter(torch.zeros(n, 2)) for n in (3, 1, 9, 2)] + [torch.nn.Parameter(torch.zeros(1))]
for number, parameter in enumerate(parameters[:-1]):
    parameter.grad = torch.full_like(parameter, number + rank)
distributed.sum_gradients(parameters)
for number, parameter in enumerate(parameters[:-1]):
    assert (parameter.grad == 2 * number + 1).all(), parameter.grad
assert parameters[-1].grad is None
print("done")
"""


@pytest.mark.slow
def test_what_processes_exchange(processes: Any) -> None:
    assert processes.run(2, EXCHANGES) == ["done\n", "done\n"]


@pytest.mark.slow
def test_two_processes_train_as_one(config: MakeConfig, processes: Any) -> None:
    alone = pretrain(config("alone"))
    others = [config("plain"), config("sharded", fsdp=True, gradient_checkpointing=True)]
    half = config("half", fsdp=True, bf16="true")  # shards are gathered in bf16, norms too
    processes.run(2, PRETRAIN, as_json(*others, half))
    assert curve(Path(half.output_dir), "loss") == pytest.approx(curve(alone, "loss"), rel=1e-2)
    for other in others:
        assert_same_run(alone, Path(other.output_dir))
        assert (alone / "model.safetensors").stat().st_size == (
            Path(other.output_dir) / "model.safetensors"
        ).stat().st_size
        assert not list(Path(other.output_dir).glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_another_number_of_processes_goes_on(
    config: MakeConfig, processes: Any, monkeypatch: pytest.MonkeyPatch, fsdp: bool
) -> None:
    """Begun by two, continued by one, and the other way round: the same documents, the same numbers."""
    from cprec.train import training

    whole = pretrain(config("whole"))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    up = config("up", fsdp=fsdp)  # one, then two
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_publish", stop)
        pretrain(up)
    assert checkpoints(Path(up.output_dir))
    processes.run(2, PRETRAIN, as_json(up))
    assert_same_run(whole, Path(up.output_dir))

    down = config("down", fsdp=fsdp)  # two, then one
    first, second = processes.start(2, WAITING, as_json(down))
    assert (first.stdout.readline(), second.stdout.readline()) == ("ready\n", "ready\n")
    for _ in range(2):  # one of them is told to stop, and again by torchrun: both do, once they have saved
        second.send_signal(signal.SIGTERM)
    for process in (first, second):
        process.stdin.write("go on\n")
        process.stdin.flush()
    for process in (first, second):
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode not in (0, -signal.SIGTERM, -signal.SIGKILL) and "KeyboardInterrupt" in errors, errors
    found = checkpoints(Path(down.output_dir))
    assert [path.name for path in found] == ["checkpoint-5", "checkpoint-7"]
    parts = sorted(found[0].glob("optimizer/*.distcp"))
    assert len(parts) == (2 if fsdp else 0), "each process writes its part of the optimizer's state"
    for part in parts[:1]:
        assert damage(found[0]) is None
        part.write_bytes(part.read_bytes()[:-1])
        assert "optimizer/" in str(damage(found[0]))
    pretrain(down)
    assert_same_run(whole, Path(down.output_dir))


@pytest.mark.slow
def test_adapters_are_sharded_and_resumed(config: MakeConfig, processes: Any) -> None:
    base = pretrain(config("base"))
    settings = {"model_name_or_path": str(base), "lora_rank": 2, "fsdp": True}
    alone, two = config("alone", **settings), config("two", **settings)
    pretrain(alone)
    first, second = processes.start(2, WAITING, as_json(two))
    assert (first.stdout.readline(), second.stdout.readline()) == ("ready\n", "ready\n")
    for process in (first, second):
        process.kill()
    processes.run(2, PRETRAIN, as_json(two))
    assert_same_curves(Path(alone.output_dir), Path(two.output_dir))
    mine, theirs = (load_file(Path(each.output_dir) / "adapter_model.safetensors") for each in (alone, two))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_stops_the_others_and_leaves_the_run_resumable(
    config: MakeConfig, processes: Any, lost: int, fsdp: bool
) -> None:
    whole = pretrain(config("whole"))
    cut = config("cut", fsdp=fsdp, ddp_timeout=60)
    folder = Path(cut.output_dir)
    both = processes.start(2, WAITING, as_json(cut))
    assert [process.stdout.readline() for process in both] == ["ready\n", "ready\n"]
    both[lost].kill()
    _, errors = both[1 - lost].communicate("go on\n", timeout=PATIENCE)
    assert both[1 - lost].returncode == 1
    assert re.search(rf"TrainingError: process {1 - lost} of 2 lost touch with .*start the same command again", errors)
    (checkpoint,) = checkpoints(folder)
    assert checkpoint.name == "checkpoint-5" and damage(checkpoint) is None
    pretrain(cut)
    assert_same_run(whole, folder)


@pytest.mark.slow
def test_a_full_disk_stops_all_of_a_sharded_run_and_leaves_nothing_half_written(
    config: MakeConfig, processes: Any
) -> None:
    small_disk = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))\n"
    )
    full = config("full", fsdp=True, report_to=("none",))
    for process in processes.start(2, small_disk + PRETRAIN, as_json(full)):
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and "checkpoint-5/optimizer could not be written (process" in errors, errors
        assert "make room, then start the same command again" in errors
    assert not [path.name for path in Path(full.output_dir).iterdir() if path.is_dir()]


@pytest.mark.slow
def test_processes_on_other_data_are_refused(config: MakeConfig, processes: Any, data: Path, tmp_path: Path) -> None:
    script = "import os, sys\nsys.argv[1] = sys.argv[1 + int(os.environ['RANK'])]\n" + PRETRAIN
    mine, theirs = config("out"), config("out", seed=1)
    for process in processes.start(2, script, as_json(mine), as_json(theirs)):
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and "do not read the same data or resume from the same checkpoint" in errors


# Process 1 dies before step 7, the first time.
DIES_ONCE = (
    """
import os, pathlib, signal, sys
from cprec.text.stream import TokenStream

batch, mark = TokenStream.batch, pathlib.Path(sys.argv[2])

def die(self, step):
    if step == 6 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step)

TokenStream.batch = die
"""
    + PRETRAIN
)


@pytest.mark.slow
def test_torchrun_starts_the_processes_again_and_they_go_on(config: MakeConfig, tmp_path: Path) -> None:
    alone, restarted = pretrain(config("alone")), config("restarted", fsdp=True)
    (tmp_path / "train.py").write_text(DIES_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    source = str(Path(__file__).parents[3] / "src")
    settings = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    result = subprocess.run(
        [*command, str(tmp_path / "train.py"), as_json(restarted), str(tmp_path / "mark")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mark").exists()
    assert f"going on from {restarted.output_dir}/checkpoint-5" in result.stderr
    assert_same_run(alone, Path(restarted.output_dir))
