"""A training run, pre-training and fine-tuning alike: plan, build the model, fit it, publish the model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cprec import distributed
from cprec.card import write_card
from cprec.data.dataset import POPULARITY, read_catalogue
from cprec.files import publish
from cprec.machine import busy_cores, num_cores
from cprec.models import (
    context_of,
    load_model,
    num_parameters,
    unloaded_model,
)
from cprec.progress import format_seconds, say
from cprec.provenance import FileHashes, read_resolved, save_resolved, to_dict
from cprec.text.config import PLAIN
from cprec.text.encoding import PromptEncoder
from cprec.text.prompts import Template
from cprec.text.stream import TokenStream
from cprec.text.tokenizer import load_tokenizer
from cprec.train.build import build, check_fits, check_vocabulary, make_model
from cprec.train.checkpoint import (
    TrainState,
    checkpoint_folder,
    newest_intact,
    read_state,
    remove_checkpoints,
    require_intact,
    whole_weights,
)
from cprec.train.config import TrainingConfig
from cprec.train.distillation import without_adapters
from cprec.train.estimate import Estimate, estimate, measure
from cprec.train.folder import DONE, LOG, METRIC, read_done, read_log
from cprec.train.forgetting import GENERAL_TEXT, general_text_batches
from cprec.train.loop import Cadence, Optimisation, perplexity, train
from cprec.train.loss import PackedLoss
from cprec.train.plan import ANNEALING, FEW_STEPS, Plan, check_fork, describe_plan
from cprec.train.preference import PreferenceLoss, PreferenceStream
from cprec.train.probe import BestWeights, Probe, queries_of
from cprec.train.reuse import is_finished
from cprec.train.run import Run, general_text_of
from cprec.train.tracking import trackers, values_of

UNMOVED = "model"
"""In an output folder: the finished model, as long as its files are not moved to where they belong."""


def run_training(run: Run) -> Path:
    """Train a model and write its folder; returns the folder.

    A finished run of equal settings on equal input is reused. An interrupted one goes on from its newest checkpoint; a
    damaged checkpoint is named in a warning and the one before is used.

    Raises CheckpointError if all checkpoints are damaged: nothing is silently trained again. Raises ConfigError and
    InputChanged as `is_finished` does.
    """
    config, hashes = run.config, FileHashes(run.output_dir)
    distributed.join_processes(config.ddp_timeout)
    if not config.dry_run:
        finished = is_finished(config, distributed.by_first(lambda: run.recorded_inputs(hashes)))
        distributed.by_first(hashes.save)
        if finished:
            distributed.by_first(lambda: _clear(run))  # a kill at the very end leaves something
            say(f"{run.output_dir}: complete with these settings, reused")
            return run.output_dir
    if not config.num_train_epochs:
        return _publish_untrained(run, hashes)
    plan = _plan(run)
    tokenizer = load_tokenizer(str(run.data / "tokenizer"))
    _note_other_begin(run)
    validation = dict(run.validation) | _general_text_stream(config, tokenizer, run.about.get("begin", []))
    if config.dry_run:
        with torch.device("meta"):
            model = make_model(config, tokenizer, run.loading(unloaded_model))
        check_fits(run, plan, model, tokenizer)
        say(str(_estimate(run, plan, model, validation)))
        return run.output_dir
    if config.resume_from_checkpoint == "never":
        distributed.by_first(lambda: remove_checkpoints(run.output_dir, stable=True))
    loss = build(run, plan, tokenizer)
    told = None
    if plan.stream.num_steps >= FEW_STEPS:  # a shorter run is not worth the timing
        told = measure(_estimate(run, plan, loss.module, validation), loss, plan.stream)
        say(str(told))
        # What this program itself adds to the load by now is its threads at most.
        if (wanted := busy_cores()) > torch.get_num_threads() + num_cores() / 4:
            say(f"note: programs want {wanted:.1f} of {num_cores()} cores, so this is slower than on an idle machine")

    def record() -> None:
        save_resolved(run.output_dir, config, run.recorded_inputs(hashes))  # by now there is a copy of a hub's model
        hashes.save()

    distributed.by_first(record)
    if isinstance(loss, PreferenceLoss):
        assert isinstance(plan.stream, PreferenceStream)
        loss.remember(plan.stream, config.rows_per_pass)
    best = _best_weights(run, loss, tokenizer)
    state = _fit(run, plan, loss, validation, best, told)
    kept = best.restore()
    _publish(run, loss, tokenizer, state, kept)
    distributed.by_first(best.forget)
    distributed.by_first(lambda: _clear(run))
    _tell(run, state, kept)
    return run.output_dir


def time_training(run: Run) -> Estimate:
    """What a run will take, its speed timed on a micro-batch. Nothing is learnt or written."""
    plan = run.make_plan()
    loss = build(run, plan, load_tokenizer(str(run.data / "tokenizer")))
    return measure(_estimate(run, plan, loss.module, run.validation), loss, plan.stream)


def encoder_of(data: Path, about: Mapping[str, Any], tokenizer: Any) -> PromptEncoder:
    """What makes prompts and titles as the documents of a data folder have them; `about` is how those were made."""
    return PromptEncoder(
        tokenizer,
        read_catalogue(data),
        max_title_tokens=about["max_title_tokens"],
        title_cut=about.get("title_cut", PLAIN),  # older folders have none
        template=Template(**about["template"]),
        begin=about.get("begin", ()),
    )


def _tell(run: Run, state: TrainState, kept: Mapping[str, Any] | None) -> None:
    """Say what the weights of the finished model reach, and what it cost to know."""
    log, step = read_log(run.output_dir / LOG), kept["step"] if kept else state.step
    ranked = [line for line in log if METRIC in line]
    if ranked:
        reached = ", ".join(f"{name} {value:.4f}" for name, value in (kept or ranked[-1])[METRIC].items())
        seconds = sum(line["probe_seconds"] for line in ranked)
        say(
            f"kept the weights after step {step:,} of {state.step:,}. NDCG@10 of validation queries: {reached}. "
            f"Ranking them {len(ranked)} times took {format_seconds(seconds)}, "
            f"{seconds / max(state.seconds, 1e-9):.1%} of the time of training"
        )
    measured = [line["heldout"] for line in log if line.get("heldout") and line["step"] == step]
    shown = ", ".join(f"{name} {value:.2f}" for name, value in measured[-1].items()) if measured else "not measured"
    say(f"{run.output_dir}: written. Held-out perplexity: {shown}")


# ---- plan ------------------------------------------------------------------------------------------------------------


def _plan(run: Run) -> Plan:
    """The plan, described to the user; the checkpoints that the run begins with are intact and fit it."""
    plan = run.make_plan()
    describe_plan(plan, say)
    for folder in filter(None, (run.start_from, run.fork_of)):
        distributed.by_first(partial(require_intact, folder))
    if run.fork_of is not None:
        check_fork(run.fork_of, plan)
    return plan


def _note_other_begin(run: Run) -> None:
    begin, base = run.about.get("begin", []), read_done(run.config.model_name_or_path)
    if base is not None and base.get("begin", []) != begin:
        say(
            f"note: documents begin with the tokens {begin}, but {run.config.model_name_or_path} was trained on "
            f"documents that begin with {base.get('begin', [])}: add_bos_token of `cprec prepare` decides"
        )


def _general_text_stream(config: TrainingConfig, tokenizer: Any, begin: list[int]) -> dict[str, TokenStream]:
    text = general_text_of(config)
    if text is None:
        return {}
    rows = config.rows_per_pass
    return {GENERAL_TEXT: general_text_batches(tokenizer, config.max_length, text, begin=begin, rows_per_batch=rows)}


def _estimate(run: Run, plan: Plan, model: Any, validation: Mapping[str, TokenStream]) -> Estimate:
    """What the run will take, by arithmetic."""
    config, stream, device = run.config, plan.stream, distributed.pick_device()
    rows_each = -(-stream.batch(0).num_rows // distributed.num_ranks())
    heldout = sum(each.num_tokens for each in validation.values())
    before = int(stream.corpus.lengths.sum()) if run.preference else 0  # read once for the reference
    return estimate(
        model,
        stream,
        device=device,
        bf16=distributed.use_bf16(config.bf16, device),
        rows=min(config.micro_batch_size or rows_each, rows_each),
        gradient_checkpointing=config.gradient_checkpointing,
        fsdp=config.fsdp,
        output_dir=run.output_dir,
        num_checkpoints=config.save_total_limit + 1 + run.keeps_stable,  # one is being written
        heldout_tokens=before + heldout * (stream.num_steps // config.eval_steps + 2),  # at the start and the end, too
        teacher=_unloaded_teacher(run) if run.has_teacher else None,
    )


def _unloaded_teacher(run: Run) -> Any:
    with torch.device("meta"):
        return without_adapters(unloaded_model(run.config.model_name_or_path)).requires_grad_(False)


# ---- fit -------------------------------------------------------------------------------------------------------------


def _best_weights(run: Run, loss: PackedLoss, tokenizer: Any) -> BestWeights:
    """What ranks while the run trains, and keeps its best weights."""
    config, probes = run.config, {}
    if run.probe_domains and distributed.is_first():
        encoder = encoder_of(run.data, run.about, tokenizer)
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for domain in run.probe_domains:
            path, context = queries_of(run.data, domain), context_of(loss.module) or 1 << 30
            probes[domain] = Probe.read(path, config.probe_queries, encoder, run.about, context=context, pad_id=pad_id)
    return BestWeights(loss, probes, run.output_dir, keep=config.keep == "best")


def _fit(
    run: Run,
    plan: Plan,
    loss: PackedLoss,
    validation: Mapping[str, TokenStream],
    best: BestWeights,
    told: Estimate | None,
) -> TrainState:
    """Train to the end of the plan, from the newest checkpoint if there is one."""
    config, stream = run.config, plan.stream
    saved = distributed.by_first(lambda: newest_intact(run.output_dir)) or run.fork_of
    if saved:
        say(f"going on from {saved}")
    is_mixed = len(stream.corpus.groups) > 1

    def log_fields(state: TrainState) -> dict[str, Any]:
        if state.step == 0:
            return {"mixture_asked": stream.mixture_asked()} if is_mixed else {}
        rate = state.num_tokens / max(state.seconds, 1e-9)
        used = {"mfu": told.mfu(rate)} if told else {}
        return used | ({"mixture": stream.mixture_until(state.step)} if is_mixed else {})

    reported = trackers(
        config.report_to,
        run.output_dir,
        config.run_name or run.output_dir.name,
        to_dict(config),
        step=read_state(saved).step if saved else 0,
    )
    with closing(reported):
        return train(
            loss,
            stream,
            plan.schedule,
            output_dir=run.output_dir,
            optimisation=Optimisation(
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                micro_batch_size=config.micro_batch_size,
            ),
            cadence=Cadence(
                logging_steps=config.logging_steps,
                eval_steps=config.eval_steps,
                save_steps=config.save_steps,
                save_total_limit=config.save_total_limit,
                stable_step=stream.num_steps - plan.steps_of(ANNEALING) if run.keeps_stable else None,
            ),
            validate=lambda: {"heldout": {name: perplexity(loss.usual, each) for name, each in validation.items()}},
            probe=best,
            resume_from=saved,
            start_from=run.start_from,
            log_fields=log_fields,
            report=lambda line: reported.log(line["step"], values_of(line)),
            description=run.stage,
        )


# ---- publish ---------------------------------------------------------------------------------------------------------


def _clear(run: Run) -> None:
    """Remove what a finished run no longer needs."""
    remove_checkpoints(run.output_dir)
    shutil.rmtree(run.output_dir / UNMOVED, ignore_errors=True)


def _publish_untrained(run: Run, hashes: FileHashes) -> Path:
    """Make a model folder of a model as it is; returns the folder."""
    if run.config.dry_run:
        say(f"{run.output_dir}: {run.config.model_name_or_path} as it is, without training (num_train_epochs=0)")
        return run.output_dir
    tokenizer = load_tokenizer(str(run.data / "tokenizer"))
    model = make_model(run.config, tokenizer, load_model)
    check_vocabulary(run.config, model, tokenizer)

    def record() -> None:
        save_resolved(run.output_dir, run.config, run.recorded_inputs(hashes))
        hashes.save()

    distributed.by_first(record)
    _publish(run, PackedLoss(model), tokenizer, TrainState())
    say(f"{run.output_dir}: written, {run.config.model_name_or_path} as it is")
    return run.output_dir


def _publish(
    run: Run, loss: PackedLoss, tokenizer: Any, state: TrainState, kept: Mapping[str, Any] | None = None
) -> None:
    """Turn output_dir into a model folder: everything is written aside and moved in, `cprec.json` last."""
    done = {
        "stage": run.stage,
        **run.about,
        "trained_on": run.all_trained_on,
        "tokens": state.num_tokens,
        "consumed": state.consumed,
        "seconds": round(state.seconds, 1),
        "num_parameters": num_parameters(loss.module),
        **({"kept": kept} if kept else {}),
    }
    weights = whole_weights(loss.module)
    unmoved = run.output_dir / UNMOVED

    def write_and_move() -> None:
        with checkpoint_folder(unmoved) as folder:
            loss.save(folder, weights)
            if run.config.lora_merge:
                adapted = load_model(folder)
                for path in [path for path in folder.iterdir() if path.is_file()]:
                    path.unlink()
                adapted.merge_and_unload().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if run.has_items:
                shutil.copytree(run.data / "items", folder / "items")
            if (run.data / POPULARITY).is_file():  # ranks items for histories that say nothing
                shutil.copy2(run.data / POPULARITY, folder / POPULARITY)
            (folder / DONE).write_text(json.dumps(done, indent=1) + "\n")
            if run.has_items:  # a card tells how to recommend
                write_card(folder, read_resolved(run.output_dir), run.data)
        for path in sorted(unmoved.iterdir(), key=lambda path: path.name == DONE):
            publish(path, run.output_dir / path.name)
        unmoved.rmdir()

    distributed.by_first(write_and_move)
