"""What both training stages share: their settings, the set-up before the loop, and the finished model folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.errors import ConfigError, InputChanged
from cprec.provenance import (
    CONFIG_FILE,
    WEIGHTS,
    FileHashes,
    differences,
    model_hashes,
    read_resolved,
    save_resolved,
    shortened,
    to_dict,
)
from cprec.train.config import TrainingConfig
from cprec.train.folder import DONE, LOG, read_done, read_log

if TYPE_CHECKING:
    from cprec.text.stream import TokenStream
    from cprec.train.estimate import Estimate
    from cprec.train.plan import Plan

_FREE = (
    *("resume_from_checkpoint", "save_steps", "save_total_limit", "dry_run", "report_to", "run_name", "output_dir"),
    *("fsdp", "gradient_checkpointing", "torch_compile", "ddp_timeout"),
)
"""Settings that may change between the starts of one run: they do not decide what is learnt."""

_PLACES = {"data": "data", "model_name_or_path": "base", "continue_from": "start"}
"""Settings that say where an input is -> what begins the names of its files among the recorded inputs. The same files
in another place are the same input."""

_WORDS = {
    "trained_on": "the documents to train on",
    "heldout": "the held-out documents",
    "text": "the general text to replay",
    "general_text": "the text of general_text",
    "base": "the weights of the base model",
    "start": "the weights of the checkpoint to continue from",
    "fork": "the weights of the stable checkpoint",
}
"""Recorded inputs that are no files, in words."""


def finished(config: TrainingConfig, inputs: dict[str, str]) -> bool:
    """Whether output_dir holds the finished run of these settings on these inputs.

    Raises ConfigError if it holds a run, finished or not, of other settings, InputChanged if of other inputs: nothing
    is overwritten or mixed up. Inputs that are gone are told.
    """
    from cprec.progress import say

    output_dir = Path(config.output_dir)
    if not (output_dir / CONFIG_FILE).is_file():
        return False
    record = read_resolved(output_dir)
    before, now, gone = _comparable(record["inputs"], inputs, record["config"])
    changes = [_in_words(change, config) for change in differences(before, now)]
    old, new = record["config"], to_dict(config)
    changed = sorted(name for name in new.keys() | old.keys() if name not in _FREE and new.get(name) != old.get(name))
    moved = [name for name in changed if not changes and any(n.startswith(f"{_PLACES.get(name)}/") for n in now)]
    if changed := [name for name in changed if name not in moved]:
        what = ", ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in changed)
        raise ConfigError(
            f"{output_dir} holds a run with other settings ({what}): choose another output_dir or delete it"
        )
    if changes:
        raise InputChanged(
            f"{output_dir} holds a run on other input: {shortened(changes)}. Choose another output_dir, or delete "
            f"{output_dir} to train anew"
        )
    if gone:
        say(f"note: whether this changed since {output_dir} was made cannot be seen, since it is gone: {gone}")
    return (output_dir / DONE).is_file()


def _comparable(
    before: dict[str, str], now: dict[str, str], config: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str], str]:
    """Recorded inputs and those of now, as far as they can be compared; and which of them are gone."""
    if "base" in before:  # a run made when one hash of all weights was recorded, and no other file
        names = {"base": config["model_name_or_path"], "start": config.get("continue_from"), "fork": None}
        weights = {of: _of_weights(now, of) or _sha256(str(name)) for of, name in names.items() if of in before}
        gone = {of for of, name in names.items() if of in before and weights[of] == _sha256(str(name)) != before[of]}
        now = {name: value for name, value in (now | weights).items() if name in before}
    else:
        groups = {name.partition("/")[0] for name in now}
        gone = {name.partition("/")[0] for name in before} - groups
    left = {name: value for name, value in before.items() if name.partition("/")[0] not in gone}
    now = {name: value for name, value in now.items() if name.partition("/")[0] not in gone}
    return left, now, ", ".join(_WORDS.get(name, name) for name in sorted(gone))


def _in_words(change: str, config: TrainingConfig) -> str:
    name, _, what = change.partition(" ")
    group, _, file = name.partition("/")
    if not file:
        return f"{_WORDS.get(name, name)} {what}"
    place = {setting: getattr(config, setting, "") for setting, begins in _PLACES.items() if begins == group}
    return f"{file} {what}" + "".join(f" ({setting}={value})" for setting, value in place.items())


def run_training(
    config: TrainingConfig,
    *,
    make_plan: Callable[[], Plan],
    trained_on: list[str],
    validation: dict[str, TokenStream],
    about: dict[str, Any],
    inputs: dict[str, str] | None = None,
    start_from: Path | None = None,
    fork_of: Path | None = None,
) -> Path:
    """Set up model, schedule and loop, train, and write the finished model folder; returns it.

    `trained_on` are the hashes of the shards that the plan reads, and `inputs` of what else it is made of. `validation`
    maps a name (a domain and kind) to held-out batches; `about` is what this stage adds to `cprec.json`. Weights and
    optimizer begin as in the checkpoint `start_from`, or the run goes on from the stable checkpoint `fork_of` of
    another run with the same plan up to there. A finished run of equal settings is reused; an interrupted one goes on
    from its newest checkpoint.

    A damaged checkpoint is named in a warning and the one before is used.

    Raises CheckpointError if all are damaged: nothing is silently trained again; ConfigError and InputChanged as
    `finished` does.
    """
    from cprec import distributed
    from cprec.models import check_attention, check_isolation, load_model, num_parameters
    from cprec.progress import say
    from cprec.text.tokenizer import load_tokenizer
    from cprec.train.attention import use_document_attention
    from cprec.train.checkpoint import TrainState, newest_intact, read_state, remove_checkpoints, require_intact
    from cprec.train.estimate import estimate_plan, mfu, timed_rate, unloaded_model, without_weights
    from cprec.train.forgetting import GENERAL_TEXT, general_text_batches
    from cprec.train.loop import Cadence, Optimisation, perplexity, train
    from cprec.train.loss import prepare_loss
    from cprec.train.plan import ANNEALING, FEW_STEPS, check_fork, describe_plan
    from cprec.train.tracking import trackers, values_of

    distributed.join_processes(config.ddp_timeout)
    output_dir, data = Path(config.output_dir), Path(config.data)
    trained_on = [*_shards_of(start_from or Path(config.model_name_or_path)), *trained_on]
    hashes = FileHashes(output_dir)
    read = {"trained_on": " ".join(trained_on), **(inputs or {})}

    def inputs_now() -> dict[str, str]:
        return read | _file_inputs(config, start_from, fork_of, hashes)

    if not config.dry_run:
        is_finished = finished(config, distributed.by_first(inputs_now))
        distributed.by_first(hashes.save)
        if is_finished:
            say(f"{output_dir}: complete with these settings, reused")
            return output_dir
    plan = make_plan()
    stream, schedule = plan.stream, plan.schedule
    describe_plan(config, plan, say)
    for folder in filter(None, (start_from, fork_of)):
        distributed.by_first(partial(require_intact, folder))
    if fork_of is not None:
        check_fork(fork_of, plan)
    device = distributed.pick_device()
    bf16 = distributed.use_bf16(config.bf16, device)
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    begin, base = about.get("begin", []), read_done(config.model_name_or_path)
    if base is not None and base.get("begin", []) != begin:
        say(
            f"note: documents begin with the tokens {begin}, and those that {config.model_name_or_path} was trained on "
            f"with {base.get('begin', [])}: add_bos_token of `cprec prepare` decides"
        )
    text = _general_text(config)
    if text is not None:
        rows = config.per_device_train_batch_size
        held_out = general_text_batches(tokenizer, config.max_length, text, begin=begin, rows_per_batch=rows)
        validation = validation | {GENERAL_TEXT: held_out}
    is_trunk = about["stage"] == "pretrain" and fork_of is None and config.lr_scheduler_type != "cosine"

    def unloaded() -> Any:
        return without_weights(lambda: _make_model(config, tokenizer, unloaded_model))

    def will_take() -> Estimate:
        return estimate_plan(
            config,
            plan,
            unloaded(),
            device=device,
            bf16=bf16,
            heldout_tokens=sum(each.num_tokens for each in validation.values()),
            num_stable=int(is_trunk),
        )

    longest = int(stream.corpus.lengths.max())
    if config.dry_run:
        _check_fits(config, unloaded(), len(tokenizer), longest, about)
        say(str(will_take()))
        return output_dir
    if config.resume_from_checkpoint == "never":
        distributed.by_first(lambda: remove_checkpoints(output_dir, stable=True))

    attention = None if config.attn_implementation == "auto" else config.attn_implementation
    model = _make_model(config, tokenizer, partial(load_model, attn_implementation=attention)).to(device)
    _check_fits(config, model, len(tokenizer), longest, about)
    positions_given = check_attention(model)
    recompiled = config.torch_compile and config.gradient_checkpointing
    if attention is None and device.type == "cpu" and not recompiled and positions_given:
        use_document_attention(model, compiled=config.torch_compile)
    check_isolation(model)
    loss = prepare_loss(
        model,
        bf16=bf16,
        fsdp=config.fsdp,
        gradient_checkpointing=config.gradient_checkpointing,
        torch_compile=config.torch_compile,
    )

    say(
        f"{num_parameters(model) / 1e6:.2f} M parameters on {distributed.describe(device)}, "
        f"{'bf16' if bf16 else 'fp32'}"
    )

    used_share = None
    if stream.num_steps >= FEW_STEPS:
        rows = config.per_device_train_batch_size
        rate = timed_rate(loss, stream, device, rows=rows, num_processes=distributed.num_ranks())
        found = will_take().timed(rate)
        say(str(found))
        peak = found.peak * found.num_processes
        used_share = partial(mfu, flops_per_token=found.flops_per_token, peak=peak)

    def validate() -> dict[str, Any]:
        return {"heldout": {name: perplexity(loss, each) for name, each in validation.items()}}

    mixed = len(stream.corpus.groups) > 1

    def log_fields(state: TrainState) -> dict[str, Any]:
        if state.step == 0:
            return {"mixture_asked": stream.mixture_asked()} if mixed else {}
        used = {"mfu": used_share(state.num_tokens / max(state.seconds, 1e-9))} if used_share else {}
        return used | ({"mixture": stream.mixture_until(state.step)} if mixed else {})

    def record() -> None:
        save_resolved(output_dir, config, inputs_now())  # by now there is a copy of a hub's model
        hashes.save()

    distributed.by_first(record)
    saved = distributed.by_first(lambda: newest_intact(output_dir)) or fork_of
    if saved:
        say(f"going on from {saved}")
    trunk_end = stream.num_steps - plan.steps_of(ANNEALING)
    places = trackers(
        config.report_to,
        output_dir,
        config.run_name or output_dir.name,
        to_dict(config),
        step=read_state(saved).step if saved else 0,
    )
    with closing(places):
        state = train(
            loss,
            stream,
            schedule,
            output_dir=output_dir,
            optimisation=Optimisation(
                num_accumulation=config.gradient_accumulation_steps,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
            ),
            cadence=Cadence(
                logging_steps=config.logging_steps,
                eval_steps=config.eval_steps,
                save_steps=config.save_steps,
                save_total_limit=config.save_total_limit,
                stable_step=trunk_end if is_trunk else None,
            ),
            validate=validate,
            resume_from=saved,
            start_from=start_from,
            log_fields=log_fields,
            report=lambda line: places.log(line["step"], values_of(line)),
            description=about["stage"],
        )
    done = {
        **about,
        "trained_on": trained_on,
        "tokens": state.num_tokens,
        "consumed": state.consumed,
        "seconds": round(state.seconds, 1),
        "num_parameters": num_parameters(model),
    }
    _publish(output_dir, data, model, tokenizer, done, merge=config.lora_merge)
    distributed.by_first(lambda: remove_checkpoints(output_dir))
    measured = [record["heldout"] for record in read_log(output_dir / LOG) if record.get("heldout")]
    last = ", ".join(f"{name} {value:.2f}" for name, value in measured[-1].items()) if measured else "not measured"
    say(f"{output_dir}: written. Held-out perplexity: {last}")
    return output_dir


def _make_model(config: TrainingConfig, tokenizer: Any, load: Callable[[str], Any]) -> Any:
    """The model that the settings name, by `load` where it is none of our own making, with its adapters."""
    from cprec.models import TINY, add_lora, tiny_model

    if config.model_name_or_path == TINY:
        model = tiny_model(
            len(tokenizer),
            hidden_size=config.tiny.hidden_size,
            num_hidden_layers=config.tiny.num_hidden_layers,
            num_attention_heads=config.tiny.num_attention_heads,
            max_position_embeddings=max(1024, config.max_length),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            seed=config.seed,
            attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
        )
    else:
        model = load(config.model_name_or_path)
    if config.lora_rank:
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    return model


def _general_text(config: TrainingConfig) -> str | None:
    """The text of the forgetting meter: a file, '' for our own, or None: a model of our own knows nothing to forget."""
    from cprec.models import TINY

    if config.general_text != "auto":
        return None if config.general_text == "none" else config.general_text
    made_here = Path(config.data, CONFIG_FILE).is_file() and read_resolved(config.data)["config"]["tokenizer"] == TINY
    return None if made_here or config.model_name_or_path == TINY else ""


def _publish(output_dir: Path, data: Path, model: Any, tokenizer: Any, done: dict[str, Any], *, merge: bool) -> None:
    """Turn output_dir into a model folder: everything is written aside and moved in, `cprec.json` last."""
    from cprec import distributed
    from cprec.data.dataset import POPULARITY
    from cprec.models import load_model, merge_adapters
    from cprec.train.checkpoint import whole_weights, write_folder

    weights = whole_weights(model)
    aside = output_dir / "model"

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)
        if merge:
            adapted = load_model(folder)
            for path in list(folder.iterdir()):
                path.unlink()
            merge_adapters(adapted).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copytree(data / "items", folder / "items")
        if (data / POPULARITY).is_file():  # what histories that say nothing are answered with
            shutil.copy2(data / POPULARITY, folder / POPULARITY)
        (folder / DONE).write_text(json.dumps(done, indent=1) + "\n")

    def write_and_move() -> None:
        write_folder(aside, write)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == DONE):
            old = output_dir / path.name
            if old.is_dir():
                shutil.rmtree(old)
            path.replace(old)
        aside.rmdir()

    distributed.by_first(write_and_move)


def _shards_of(start: Path) -> list[str]:
    """The shards that a model of ours, or the run whose stable checkpoint this is, was trained on."""
    done = read_done(start)
    if done:
        return list(done["trained_on"])
    if start.name.startswith("stable-"):
        return read_resolved(start.parent)["inputs"]["trained_on"].split()
    return []


def _file_inputs(
    config: TrainingConfig, start_from: Path | None, fork_of: Path | None, hashes: FileHashes
) -> dict[str, str]:
    """SHA-256 of the files that a run reads, by what they are to it and their name."""
    data, text = Path(config.data), _general_text(config)
    found = {f"data/{path.relative_to(data).as_posix()}": hashes.of(path) for path in _files_of(data)}
    for name, model in (("base", config.model_name_or_path), ("start", start_from), ("fork", fork_of)):
        if model is not None:
            of_model = model_hashes(model, (*WEIGHTS, "files.json"), hashes)
            found |= {f"{name}/{file}": sha256 for file, sha256 in of_model.items()}
    if text and Path(text).is_file():
        found["general_text"] = hashes.of(text)
    return found


def _files_of(data: Path) -> list[Path]:
    """What a run takes from a data folder as it is: the tokenizer, and the items for the model folder."""
    return [path for name in ("tokenizer", "items") for path in sorted((data / name).rglob("*")) if path.is_file()]


def _of_weights(inputs: dict[str, str], of: str) -> str:
    """One hash of the weight files among some inputs; empty where there are none."""
    parts = [sha256 for name, sha256 in sorted(inputs.items()) if re.fullmatch(rf"{of}/[^/]+\.safetensors", name)]
    return _sha256(" ".join(parts)) if parts else ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_fits(config: TrainingConfig, model: Any, vocabulary_size: int, longest: int, about: dict[str, Any]) -> None:
    """Whether a model has room for the tokens, the rows and the titles; `longest` is that of the documents.

    Raises ConfigError where it has not; says where documents go beyond what it was made for.
    """
    from cprec.models import context_of, has_learned_positions
    from cprec.progress import say
    from cprec.text.config import Template

    name, context = config.model_name_or_path, context_of(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocabulary_size:
        raise ConfigError(
            f"{name} has {rows:,} token embeddings but the tokens in {config.data} were made with a vocabulary of "
            f"{vocabulary_size:,}: run `cprec prepare` with tokenizer={name}"
        )
    if context is None:
        return
    titles = about["max_title_tokens"] * len(Template(**about["template"]).item_fields)
    if titles >= context:
        raise ConfigError(
            f"items may have {titles:,} tokens (max_title_tokens={about['max_title_tokens']}), but {name} reads "
            f"{context:,} at once (max_position_embeddings), prompts included: prepare the data with a smaller "
            "max_title_tokens"
        )
    if config.max_length > context and has_learned_positions(model):
        raise ConfigError(
            f"max_length={config.max_length:,}, but {name} has learnt {context:,} positions and no more "
            f"(max_position_embeddings): set max_length={context}, with data prepared with "
            f"max_document_tokens={context} or less"
        )
    if longest > context:
        say(
            f"note: documents have up to {longest:,} tokens, and {name} was made to read {context:,} at once "
            f"(max_position_embeddings): the positions beyond are new to it, and rankings cut histories to fit; "
            f"max_document_tokens={context} of `cprec prepare` makes shorter documents"
        )
