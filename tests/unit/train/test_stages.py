from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cprec.data.queries import sampled_rows
from cprec.errors import ConfigError, DataError, ShardError
from cprec.provenance import to_dict
from cprec.rank.llm import LLMRecommender
from cprec.settings import resolve
from cprec.text.config import Mixture
from cprec.text.shards import open_shards
from cprec.text.stream import NEXT_TOKEN
from cprec.text.tokenizer import load_tokenizer, train_tokenizer
from cprec.train import training
from cprec.train.checkpoint import checkpoints, read_state
from cprec.train.config import FinetuneConfig, PretrainConfig, TinyModel
from cprec.train.finetune import finetune
from cprec.train.folder import DONE, LOG, read_done, read_log
from cprec.train.pretrain import behaviour_and_more, fork, pretrain, pretrain_plan

SOURCE = Path(__file__).parents[3] / "src"


def small(output_dir: Path, **changes: Any) -> PretrainConfig:
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "tiny": TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        "learning_rate": 1e-2,
        "max_length": 96,
        "train_batch_size": 4,
        "bf16": "false",
        "save_steps": 3,
        "logging_steps": 1,
        "eval_steps": 6,
    }
    return PretrainConfig(**settings | changes)


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    return lambda name="out", **changes: small(tmp_path / name, **{"data": str(data)} | changes)


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pre-trained model, which no test changes."""
    return pretrain(small(tmp_path_factory.mktemp("base") / "out", data=str(data)))


@pytest.fixture(scope="module")
def annealed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its stable checkpoint, which no test changes."""
    return pretrain(small(tmp_path_factory.mktemp("annealed") / "out", data=str(data), anneal_steps=0.3))


@pytest.fixture
def tune(config: Callable[..., PretrainConfig]) -> Callable[..., FinetuneConfig]:
    def make(name: str = "tuned", **changes: Any) -> FinetuneConfig:
        shared = {k: getattr(config(name), k) for k in ("data", "output_dir", "tiny", "learning_rate", "max_length")}
        settings = {"train_batch_size": 4, "bf16": "false", "num_train_epochs": 2.0, "domain": "books"}
        return FinetuneConfig(**shared | settings | changes)

    return make


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / LOG) if "loss" in line}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---- the model folder ------------------------------------------------------------------------------------------------


def test_pretraining_leaves_a_model_folder_and_nothing_else(base: Path) -> None:
    folder = base
    about = read_done(folder)
    assert about is not None
    assert about["stage"] == "pretrain" and about["history"] == "specific"
    log = read_log(folder / LOG)
    assert (about["tokens"], about["consumed"]) == (log[-1]["tokens"], log[-2]["consumed"])
    assert set(log[-1]["heldout"]) == {"books (specific)", "games (specific)", "mixed"}
    assert log[-1]["heldout"]["mixed"] < 0.5 * log[0]["heldout"]["mixed"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "items", DONE, LOG, "run.json"} <= names
    assert not any(name.startswith(("checkpoint", "model.incomplete")) or name == "model" for name in names)

    found = LLMRecommender.from_pretrained(folder).recommend(["red book 0", "01"], k=3, domain="books")
    assert len({item.item_id for item in found}) == 3


def test_fine_tuning_goes_on_from_pretraining(base: Path, tune: Callable[..., FinetuneConfig]) -> None:
    tuned = finetune(tune(model_name_or_path=str(base)))
    about, before = read_done(tuned), read_done(base)
    assert about is not None and before is not None
    assert (about["stage"], about["domain"]) == ("finetune", "books")
    assert about["trained_on"] == [*before["trained_on"], about["trained_on"][-1]] and len(about["trained_on"]) == 2
    from_scratch = finetune(tune("scratch"))
    assert losses(tuned)[1] < 0.7 * losses(from_scratch)[1]
    assert LLMRecommender.from_pretrained(tuned).recommend(["01", "02"], k=2)[0].title.endswith(tuple("012345"))


@pytest.mark.slow
def test_the_seed_decides_everything(config: Callable[..., PretrainConfig]) -> None:
    first, again, other = (pretrain(config(name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert weights(first) == weights(again) != weights(other)


# ---- running again ---------------------------------------------------------------------------------------------------


def test_a_finished_run_is_reused(
    base: Path, config: Callable[..., PretrainConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "out"))
    stamp = (folder / DONE).stat().st_mtime_ns
    assert pretrain(config(save_steps=7)) == folder  # how often it was saved does not matter
    assert (folder / DONE).stat().st_mtime_ns == stamp
    assert f"{folder}: complete with these settings, reused" in capfd.readouterr().err


def test_other_settings_are_not_mixed_into_a_run(
    base: Path, config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"learning_rate was 0.01, now 0.02.*choose another output_dir or delete it"):
        pretrain(config(learning_rate=2e-2))
    assert (folder / DONE).is_file()


# Stands still in the middle of the second checkpoint, tells so, and waits to be killed.
KILLED = """
import json, sys
from cprec.config import from_mapping
from cprec.train import checkpoint
import torch
from cprec.train.pretrain import PretrainConfig, behaviour_and_more, fork, pretrain, pretrain_plan

torch.set_num_threads(1)
config = from_mapping(PretrainConfig, json.loads(sys.argv[1]))
save, calls = torch.save, []

def stuck(*arguments):
    calls.append(1)
    if len(calls) == 2:
        print("ready", flush=True)
        sys.stdin.read()
    save(*arguments)

torch.save = stuck
pretrain(config)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_never_stopped(config: Callable[..., PretrainConfig]) -> None:
    whole = pretrain(config("whole"))
    cut = config("cut")
    folder = Path(cut.output_dir)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(to_dict(cut))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "CPREC_PROGRESS": "off"},
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        ready = process.stdout.readline()
        process.kill()
        assert ready == "ready\n", process.stderr.read()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"]
    assert (folder / "checkpoint-6.incomplete").is_dir()
    assert list(losses(folder)) == list(range(1, 7))

    assert pretrain(cut) == folder
    assert losses(folder) == losses(whole)
    assert weights(folder) == weights(whole)
    done, expected = read_done(folder), read_done(whole)
    assert done is not None and expected is not None and done["consumed"] == expected["consumed"]
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_an_interrupted_publication_is_made_up_for(
    config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_publish", fail)
        pretrain(config())
    folder = pretrain(config())
    assert weights(folder) == weights(pretrain(config("whole")))


@pytest.mark.slow
def test_never_starts_again(config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        pretrain(config())
    folder = pretrain(config(resume_from_checkpoint="never"))
    assert weights(folder) == weights(pretrain(config("whole")))


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def test_adapters_are_trained_saved_and_found_again(base: Path, tune: Callable[..., FinetuneConfig]) -> None:
    tuned = finetune(tune(model_name_or_path=str(base), lora_rank=2))
    assert (tuned / "adapter_model.safetensors").is_file() and not (tuned / "model.safetensors").exists()
    recommender = LLMRecommender.from_pretrained(tuned)
    assert len(recommender.recommend(["01", "02"], k=2)) == 2


@pytest.mark.slow
def test_merged_adapters_make_a_plain_model_that_ranks_the_same(
    base: Path, tune: Callable[..., FinetuneConfig]
) -> None:
    settings = {"model_name_or_path": str(base), "lora_rank": 2}
    adapted, merged = finetune(tune("adapted", **settings)), finetune(tune("merged", lora_merge=True, **settings))
    assert (merged / "model.safetensors").is_file() and not list(merged.glob("adapter*"))
    one, other = (
        LLMRecommender.from_pretrained(folder).recommend(["01", "02"], k=4, domain="books")
        for folder in (adapted, merged)
    )
    assert [item.item_id for item in one] == [item.item_id for item in other]
    assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-4)
    with pytest.raises(ConfigError, match=r"lora_merge=true has no adapters to merge with lora_rank=0"):
        tune(lora_merge=True)


def test_adapters_need_a_base(config: Callable[..., PretrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"lora_rank=2 needs a saved base model"):
        pretrain(config(lora_rank=2))


# ---- frozen layers ---------------------------------------------------------------------------------------------------


def test_frozen_layers_stay_as_the_base_has_them(
    config: Callable[..., PretrainConfig], tune: Callable[..., FinetuneConfig]
) -> None:
    base = pretrain(config(tiny=TinyModel(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)))
    tuned = finetune(tune(model_name_or_path=str(base), frozen_layers=1, save_steps=1))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    same = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert same == {name for name in before if "embed_tokens" in name or "layers.0." in name}


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_tampered_shard_stops_the_run(config: Callable[..., PretrainConfig], data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    tokens = tmp_path / "data" / "shards" / "train" / "tokens.bin"
    contents = bytearray(tokens.read_bytes())
    contents[100] ^= 4
    tokens.write_bytes(contents)
    with pytest.raises(ShardError, match=r"shards/train/tokens.bin is not the file that manifest.json describes"):
        pretrain(config(data=str(tmp_path / "data")))


def test_a_domain_without_examples_is_named(tune: Callable[..., FinetuneConfig]) -> None:
    with pytest.raises(ConfigError, match=r"domain='films' has no fine-tuning examples .*which has those of books"):
        finetune(tune(domain="films"))
    with pytest.raises(ConfigError, match=r"data=nowhere does not exist: give the folder that `cprec prepare` wrote"):
        finetune(tune(data="nowhere"))


def test_rows_shorter_than_documents_are_refused(config: Callable[..., PretrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"does not fit a row of 16: raise max_length"):
        pretrain(config(max_length=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"max_length": -1}, "max_length=-1 must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be 0 or more"),
        ({"min_lr_ratio": 1.5}, r"min_lr_ratio=1.5 must lie in 0..1"),
        ({"max_passes": -1}, r"max_passes=-1 must be above 0, or 0 for no cap"),
    ],
)
def test_impossible_settings_are_refused(
    config: Callable[..., PretrainConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_settings_that_are_gone_say_what_to_write(config: Callable[..., PretrainConfig], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is gone: write .*train_batch_size=ROWS of an optimizer step"):
        resolve(config(), [f"{name}=4"])


@pytest.mark.slow
def test_micro_batches_change_neither_steps_nor_documents(config: Callable[..., PretrainConfig]) -> None:
    whole, cut = pretrain(config("whole")), pretrain(config("cut", micro_batch_size=1))
    one, other = read_done(whole), read_done(cut)
    assert one is not None and other is not None and one["consumed"] == other["consumed"]
    first, second = ([line["loss"] for line in read_log(each / LOG) if "loss" in line] for each in (whole, cut))
    assert second == pytest.approx(first, rel=1e-4)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="hidden_size=20 must be num_attention_heads=3 times an even number"):
        TinyModel(hidden_size=20, num_attention_heads=3)


def test_a_vocabulary_that_does_not_fit_the_base_is_refused(
    config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    from cprec.models import tiny_model

    tiny_model(40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"has 40 token embeddings but the tokens .* vocabulary of \d+: run `cprec"):
        pretrain(config(model_name_or_path=str(tmp_path / "base")))


def test_a_base_whose_tokenizer_has_other_ids_is_refused(config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    from cprec.models import tiny_model

    base = tmp_path / "base"
    tiny_model(400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(base)
    train_tokenizer(["quite other words"] * 9, 280).save_pretrained(base)
    asked = config(model_name_or_path=str(base), dry_run=True)
    with pytest.raises(
        ConfigError, match=r"are not those of .*base: \d+ of \d+ have another id .*`cprec prepare` with"
    ):
        pretrain(asked)
    load_tokenizer(str(Path(asked.data) / "tokenizer")).save_pretrained(base)
    assert pretrain(asked) == tmp_path / "out"


def gpt2(folder: Path, positions: int) -> str:
    """A model with learnt positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=positions)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dry_run", [False, True])
def test_rows_longer_than_learnt_positions_are_refused(
    config: Callable[..., PretrainConfig], tmp_path: Path, dry_run: bool
) -> None:
    base = gpt2(tmp_path / "base", 64)
    with pytest.raises(ConfigError, match=r"max_length=96, but .*base has learnt 64 positions and no more .* set max_"):
        pretrain(config(model_name_or_path=base, max_length=96, dry_run=dry_run))
    with pytest.raises(ConfigError, match=r"items may have 32 tokens .* reads 20 at once"):
        pretrain(config(model_name_or_path=gpt2(tmp_path / "short", 20), dry_run=dry_run))


def test_learnt_positions_that_suffice_are_trained_on(config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base", 96)
    pretrain(config(model_name_or_path=base, dry_run=True))  # what it takes is told of any list of blocks
    folder = pretrain(config(model_name_or_path=base, num_train_epochs=0.1))
    assert read_done(folder)["tokens"] > 0  # type: ignore[index]


def test_documents_beyond_a_rotary_context_are_told_of(
    config: Callable[..., PretrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cprec.models import tiny_model

    for positions in (40, 128):
        folder = tmp_path / str(positions)
        tiny_model(
            400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=positions
        ).save_pretrained(folder)
        pretrain(config(model_name_or_path=str(folder), dry_run=True))
        told = re.search(
            r"documents have up to (\d+) tokens, and .* was made to read 40 at once", capsys.readouterr().err
        )
        assert (told is not None) == (positions == 40)
        assert told is None or int(told[1]) > 40


def test_nothing_held_out_is_measured_if_not_wanted(config: Callable[..., PretrainConfig]) -> None:
    folder = pretrain(config(eval_tokens=0))
    assert all(line.get("heldout", {}) == {} for line in read_log(folder / LOG))


def test_one_step_of_warm_up_is_one_step(config: Callable[..., PretrainConfig]) -> None:
    folder = pretrain(config(warmup_steps=1, anneal_steps=0))
    rates = {line["learning_rate"] for line in read_log(folder / LOG) if "loss" in line}
    assert rates == {1e-2}


# ---- mixtures, replay, masks -----------------------------------------------------------------------------------------


def plan_of(config: PretrainConfig) -> Any:
    return pretrain_plan(config, behaviour_and_more(config))


def shares_of(plan: Any) -> dict[str, list[float]]:
    """Of each phase, the share of each group."""
    tokens = plan.stream.group_tokens / plan.stream.group_tokens.sum(1, keepdims=True)
    return dict(zip(plan.stream.corpus.names, tokens.T.tolist(), strict=True))


def test_phases_have_their_mixtures(config: Callable[..., PretrainConfig]) -> None:
    plan = plan_of(
        config(
            num_train_epochs=20,
            mixture=Mixture(mixed_share=0.2),
            anneal_mixture=Mixture(mixed_share=0.8, examples_share=0.1),
            anneal_steps=0.5,
        )
    )
    assert [phase.name for phase in plan.stream.phases] == ["stable", "annealing"]
    found = shares_of(plan)
    assert found["mixed"] == pytest.approx([0.2, 0.72], abs=0.01)
    assert found["examples of books"] == pytest.approx([0.0, 0.1], abs=0.01)
    assert plan.schedule.wsa.anneal == plan.stream.phase_steps[1]
    examples = plan.stream.corpus.groups[-1]
    users = open_shards(Path(config().data) / "examples/books/train").column("user_id")[examples.documents]
    assert set(users) == {f"u{n}" for n in range(30, 60)}, "of users who stand in the shards, and no others"


@pytest.mark.slow
def test_the_log_has_the_mixture_asked_for_and_the_one_that_was_read(config: Callable[..., PretrainConfig]) -> None:
    folder = pretrain(config(num_train_epochs=6, mixture=Mixture(mixed_share=0.35, domain_weights={"books": 3.0})))
    log = read_log(folder / LOG)
    asked, found = log[0]["mixture_asked"], [line["mixture"] for line in log if "mixture" in line]
    assert asked["mixed"] == pytest.approx(0.35) and asked["books (specific)"] > 1.5 * asked["games (specific)"]
    assert found[-1] == pytest.approx(asked, abs=0.01)
    for mixture in found[len(found) // 3 :]:  # not only in the end, up to how far packing moves documents
        assert mixture == pytest.approx(asked, abs=0.03)


def test_general_text_is_replayed_and_tokenised_once(config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"game {n} red " * n}) + "\n" for n in range(1, 60)))
    pq.write_table(pa.table({"text": ["blue book", None, " "], "n": [1, 2, 3]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("green " * 200)
    files = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.txt"))
    settings = {"replay": files, "num_train_epochs": 20}
    plan = plan_of(config(mixture=Mixture(text_share=0.25), **settings))
    assert shares_of(plan)["general text"] == pytest.approx([0.25, 0.25], abs=0.01)
    made = sorted((tmp_path / "out" / "general_text").iterdir())
    again = plan_of(config(mixture=Mixture(text_share=0.5), **settings))
    assert sorted((tmp_path / "out" / "general_text").iterdir()) == made, "weights change without tokenising again"
    assert shares_of(again)["general text"] == pytest.approx([0.5, 0.5], abs=0.01)
    tokens = open_shards(made[0])
    assert len(tokens) >= 61 and max(tokens.column("length")) <= 96
    decoded = load_tokenizer(str(Path(config().data) / "tokenizer")).decode(tokens.rows[0])
    assert decoded.startswith("game 1 red")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a.jsonl line 2: no JSON object with a text"),
        ("a.csv", b"text\nx\n", r"a.csv: general text is read from .jsonl"),
        ("a.txt", b" \n", r"a.txt has no text"),
    ],
)
def test_what_is_no_general_text_is_refused(
    config: Callable[..., PretrainConfig], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=message):
        behaviour_and_more(config(mixture=Mixture(text_share=0.1), replay=(str(tmp_path / name),)))


def test_items_only_covers_titles_and_the_end(config: Callable[..., PretrainConfig]) -> None:
    everything, titles = plan_of(config()), plan_of(config(loss="items_only"))
    tokenizer = load_tokenizer(str(Path(config().data) / "tokenizer"))
    found = set()
    for step in range(3):
        whole, masked = everything.stream.batch(step), titles.stream.batch(step)
        assert (whole.rows["input_ids"] == masked.rows["input_ids"]).all()
        documents = titles.stream.corpus.take(masked.examples).tokens
        marks = titles.stream._is_target(masked.examples, documents)
        for row in range(len(documents)):
            inside = marks[documents.offsets[row] : documents.offsets[row + 1]]
            text = tokenizer.decode(documents[row][inside])
            lines = tokenizer.decode(documents[row]).replace("Next:", "-").split("\n-")[1:]
            assert text == "".join(line.replace(" [books]", "").replace(" [games]", "") for line in lines)
            found.add(text)
        assert 0 < masked.counts[NEXT_TOKEN] == int(marks.sum()) < whole.counts[NEXT_TOKEN]
    assert len(found) > 20


def test_a_dry_run_says_what_it_would_do(
    config: Callable[..., PretrainConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrain(config(dry_run=True))
    said = capfd.readouterr().err
    assert "tokens in" in said and "mixed:" in said and "learning rate:" in said
    assert "memory: about" in said and "time: about" in said
    assert not (tmp_path / "out").exists()
    folder = pretrain(config(num_train_epochs=0.2))
    made = weights(folder)
    pretrain(config(learning_rate=1.0, dry_run=True))  # of other settings, too: nothing is written
    assert weights(folder) == made


# ---- forks -----------------------------------------------------------------------------------------------------------


def test_a_fork_of_equal_annealing_is_the_run_itself(annealed: Path, config: Callable[..., PretrainConfig]) -> None:
    stable = next(annealed.glob("stable-*"))
    branch = fork(config("branch", anneal_steps=0.3), stable)
    assert weights(branch) == weights(annealed)
    assert read_done(branch)["consumed"] == read_done(annealed)["consumed"]  # type: ignore[index]
    assert min(losses(branch)) == int(stable.name.partition("-")[2]) + 1, "only the annealing was trained"


def test_a_fork_may_end_otherwise_but_not_begin_otherwise(
    annealed: Path, config: Callable[..., PretrainConfig]
) -> None:
    stable = next(annealed.glob("stable-*"))
    tokens = read_state(stable).num_tokens
    longer = replace(
        config("longer", anneal_steps=0.5, anneal_mixture=Mixture(mixed_share=0.8, examples_share=0.1)),
        num_train_epochs=config().num_train_epochs * 0.7 / 0.5,
    )
    branch = fork(longer, stable)
    assert read_done(branch)["tokens"] == pytest.approx(2 * tokens, rel=0.02)  # type: ignore[index]
    assert len(read_done(branch)["trained_on"]) == 2, "the examples too"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"is not the end of the stable phase of this plan"):
        fork(config("other", anneal_steps=0.3, seed=1), stable)


@pytest.mark.slow
def test_a_stable_run_goes_on_with_more_data(annealed: Path, config: Callable[..., PretrainConfig]) -> None:
    stable = next(annealed.glob("stable-*"))
    more = pretrain(config("more", continue_from=str(stable), seed=1))
    log, before = losses(more), losses(annealed)
    assert log[1] == pytest.approx(before[int(stable.name.partition("-")[2])], rel=0.3) and log[1] < 0.7 * before[1]
    assert [line for line in read_log(more / LOG) if "learning_rate" in line][0]["learning_rate"] == 1e-2
    about = read_done(more)
    assert about is not None and len(about["trained_on"]) == 2


def test_fewshot_reads_a_sample_by_the_seed_and_nothing_else(
    data: Path, tune: Callable[..., FinetuneConfig], tmp_path: Path
) -> None:
    lengths = open_shards(data / "examples" / "books" / "train").column("length")
    for seed in (0, 1):
        folder = finetune(tune(f"few{seed}", max_documents=3, num_train_epochs=4, seed=seed))
        chosen = sampled_rows(len(lengths), 3, seed)
        done = read_done(folder)
        assert done is not None and done["tokens"] == 4 * lengths[chosen].sum()
    with pytest.raises(ConfigError, match="max_documents=-1 must be 0 or more"):
        tune(max_documents=-1)
    with pytest.raises(ConfigError, match="head_networks=0 must be at least 1"):
        tune(head_networks=0)
