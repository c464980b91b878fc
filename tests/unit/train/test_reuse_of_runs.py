"""What a run read decides whether it is used again or gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cprec.errors import ConfigError, InputChanged
from cprec.models import tiny_model
from cprec.provenance import FileHashes
from cprec.text.tokenizer import load_tokenizer
from cprec.train.config import FinetuneConfig, PretrainConfig
from cprec.train.finetune import finetune
from cprec.train.folder import model_identity, read_done
from cprec.train.pretrain import pretrain

SHARED: dict[str, Any] = {
    "data": "data",
    "max_length": 96,
    "train_batch_size": 4,
    "bf16": "false",
    "eval_tokens": 500,
    "report_to": ("none",),
}
PRETRAIN = PretrainConfig(
    output_dir="pretrained", model_name_or_path="base", num_train_epochs=0.1, general_text="general.txt", **SHARED
)
FINETUNE = FinetuneConfig(
    output_dir="tuned", model_name_or_path="pretrained", num_train_epochs=0.1, domain="books", lora_rank=2, **SHARED
)


def start(which: str) -> Path:
    return pretrain(PRETRAIN) if which == "pretrain" else finetune(FINETUNE)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a base model, a run that pre-trained it, and one that fine-tuned that with adapters."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(data, folder / "data")
    size = len(load_tokenizer(str(folder / "data/tokenizer")))
    tiny_model(size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder / "base")
    (folder / "general.txt").write_text("A text of general words.\n" * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for which in ("pretrain", "finetune"):
            start(which)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the test stands."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def flip(path: str) -> Callable[[], None]:
    """The last byte is another one; size and time stay."""

    def run() -> None:
        before, content = os.stat(path), Path(path).read_bytes()
        Path(path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return run


def append(path: str, text: str = "\n") -> Callable[[], None]:
    return lambda: Path(path).write_text(Path(path).read_text() + text) and None


def another_manifest(folder: str) -> Callable[[], None]:
    """Shards of the same documents that say something else about themselves."""

    def run() -> None:
        path = Path(folder, "manifest.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "another"}))

    return run


ITEMS = "data/items/domain=books/part-0.parquet"
CHANGES: dict[str, tuple[str, Callable[[], None], str]] = {
    "weights": ("pretrain", flip("base/model.safetensors"), r"model.safetensors changed \(model_name_or_path=base\)"),
    "configuration": ("pretrain", append("base/config.json"), r"config.json changed \(model_name_or_path=base\)"),
    "documents": ("pretrain", another_manifest("data/shards/train"), "the documents to train on changed"),
    "held-out documents": ("pretrain", another_manifest("data/shards/heldout"), "the held-out documents changed"),
    "items": (
        "pretrain",
        lambda: shutil.copy("data/items/domain=games/part-0.parquet", ITEMS) and None,
        "items/domain",
    ),
    "tokenizer": ("pretrain", append("data/tokenizer/tokenizer_config.json"), r"tokenizer_config.json changed"),
    "general text": ("pretrain", append("general.txt"), "the text of general_text changed"),
    "examples": ("finetune", another_manifest("data/examples/books/train"), "the documents to train on changed"),
    "its base": ("finetune", flip("pretrained/model.safetensors"), "model.safetensors changed .*=pretrained"),
}


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_on_other_input_is_refused(here: Path, change: str, is_finished: bool) -> None:
    which, make, named = CHANGES[change]
    folder = Path("tuned" if which == "finetune" else "pretrained")
    if not is_finished:
        (folder / "cprec.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "hashes.json"}
    make()
    if change == "its base":
        before.pop(folder / "model.safetensors", None)
    with pytest.raises(InputChanged, match=f"{folder} holds a run on other input: .*{named}.*delete {folder} to train"):
        start(which)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "hashes.json"}


def rewritten() -> None:
    for path in [*Path("base").iterdir(), *Path("data/items").rglob("*.parquet"), Path("general.txt")]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (10**9, 10**9))


UNCHANGED: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "times": rewritten,
    "what is beside the weights": lambda: Path("base/README.md").write_text("a model"),
    "the notes": lambda: Path("pretrained/hashes.json").unlink(),
}


@pytest.mark.parametrize("change", UNCHANGED)
def test_a_run_on_the_same_input_is_used_again(here: Path, change: str, capfd: pytest.CaptureFixture[str]) -> None:
    UNCHANGED[change]()
    for which in ("pretrain", "finetune"):
        start(which)
    said = capfd.readouterr().err
    assert said.count("complete with these settings, reused") == 2 and "cannot tell" not in said


def test_moved_folders_are_the_same_input(here: Path) -> None:
    Path("moved").mkdir()
    for name in ("base", "data", "pretrained"):
        Path(name).rename(f"moved/{name}")
    moved = replace(PRETRAIN, data="moved/data", model_name_or_path="moved/base", output_dir="moved/pretrained")
    stamp = Path("moved/pretrained/cprec.json").stat().st_mtime_ns
    assert pretrain(moved) == Path("moved/pretrained")
    assert Path("moved/pretrained/cprec.json").stat().st_mtime_ns == stamp
    shutil.copytree("moved/base", "other")
    flip("other/model.safetensors")()
    with pytest.raises(ConfigError, match="model_name_or_path was 'base', now 'other'"):
        pretrain(replace(moved, model_name_or_path="other"))
    with pytest.raises(ConfigError, match="model_name_or_path was 'base', now 'tiny'"):
        pretrain(replace(moved, model_name_or_path="tiny"))


def test_a_base_that_is_gone_is_told(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("base")
    pretrain(PRETRAIN)
    said = capfd.readouterr().err
    assert "because it is gone: the weights of the base model" in said and "reused" in said


def as_before(folder: str, base: str) -> None:
    """The record of a run as it was when one hash of all weights stood for the base model."""
    path = Path(folder, "run.json")
    record = json.loads(path.read_text())
    weights = hashlib.sha256(Path(base, "model.safetensors").read_bytes()).hexdigest() if base != "tiny" else "tiny"
    record["inputs"] = {
        "trained_on": record["inputs"]["trained_on"],
        "base": hashlib.sha256(weights.encode()).hexdigest(),
    }
    path.write_text(json.dumps(record))


def test_runs_made_before_are_compared_by_the_hashes_they_have(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    as_before("pretrained", "base")
    pretrain(PRETRAIN)
    assert "reused" in capfd.readouterr().err
    flip("base/model.safetensors")()
    with pytest.raises(InputChanged, match="holds a run on other input: the weights of the base model changed"):
        pretrain(PRETRAIN)
    shutil.rmtree("base")
    pretrain(PRETRAIN)
    assert "gone: the weights of the base model" in capfd.readouterr().err


def test_what_a_model_ranks_with_is_its_identity(here: Path) -> None:
    def identity() -> str:
        return model_identity("tuned", FileHashes("tuned"))

    seen = {identity()}
    about = read_done("tuned")
    assert about is not None
    Path("tuned/cprec.json").write_text(json.dumps(about | {"seconds": 1e6}))
    append("tuned/log.jsonl")()
    assert identity() in seen, "how long it took does not matter"
    changes = (
        lambda: Path("tuned/cprec.json").write_text(json.dumps(about | {"max_history": 3})),
        flip("tuned/adapter_model.safetensors"),
        flip("pretrained/model.safetensors"),  # what its adapters are added to
        append("tuned/tokenizer_config.json"),
        flip("tuned/items/domain=books/part-0.parquet"),
    )
    for number, change in enumerate(changes, start=2):
        change()
        seen.add(identity())
        assert len(seen) == number


def test_a_run_recorded_under_older_names_is_reused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "tuned" / "run.json"
    record = json.loads(path.read_text())
    rows = record["config"].pop("train_batch_size")
    for name in ("micro_batch_size", "probe_queries", "keep"):  # these came later
        del record["config"][name]
    record["config"] |= {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2}
    path.write_text(json.dumps(record))
    start("finetune")
    assert "complete with these settings, reused" in capsys.readouterr().err
    record["config"]["gradient_accumulation_steps"] = 3
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="train_batch_size was 6, now 4"):
        start("finetune")
