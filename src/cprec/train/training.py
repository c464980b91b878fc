"""A training run, pre-training and fine-tuning alike: plan, build the model, fit it, publish the model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cprec import distributed
from cprec.card import write_card
from cprec.data.dataset import POPULARITY, read_catalogue
from cprec.errors import ConfigError
from cprec.files import publish
from cprec.models import (
    TINY,
    add_lora,
    check_attention,
    check_isolation,
    context_of,
    freeze_lowest,
    has_learned_positions,
    load_model,
    num_parameters,
    tiny_model,
    unloaded_model,
)
from cprec.progress import format_seconds, say
from cprec.provenance import CONFIG_FILE, FileHashes, read_resolved, save_resolved, to_dict
from cprec.search.trie import Trie
from cprec.text.config import PLAIN
from cprec.text.encoding import PromptEncoder
from cprec.text.prompts import Template
from cprec.text.stream import TokenStream
from cprec.text.tokenizer import load_tokenizer
from cprec.train.attention import use_document_attention
from cprec.train.catalogue_loss import CatalogueLoss
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
from cprec.train.estimate import Estimate, estimate, measure
from cprec.train.folder import DONE, LOG, METRIC, read_done, read_log
from cprec.train.forgetting import GENERAL_TEXT, general_text_batches
from cprec.train.loop import Cadence, Optimisation, perplexity, train
from cprec.train.loss import PackedLoss, prepare_loss
from cprec.train.plan import ANNEALING, FEW_STEPS, WARMUP, Plan, check_fork, describe_plan, steps_of
from cprec.train.probe import BestWeights, Probe, queries_of
from cprec.train.reuse import file_inputs, is_finished, shards_of
from cprec.train.schedule import make_schedule
from cprec.train.tracking import trackers, values_of

UNMOVED = "model"
"""In an output folder: the finished model, as long as its files are not moved to where they belong."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as a stage asks for it."""

    config: TrainingConfig
    make_plan: Callable[[], Plan]
    """Called only where the run is not finished already."""
    trained_on: list[str]
    """Hashes of the shards that the plan reads."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the other shards that the run reads, by name."""
    validation: Mapping[str, TokenStream]
    """Held-out batches by name (a domain and kind)."""
    stage: str
    about: Mapping[str, Any]
    """How the shards were made; it goes into `cprec.json`."""
    start_from: Path | None = None
    """A checkpoint whose weights and optimizer the run begins with."""
    fork_of: Path | None = None
    """The stable checkpoint of another run, with the same plan up to there, that this one goes on from."""
    keeps_stable: bool = False
    """The checkpoint at the end of the stable phase stays, for forks."""
    probe_domains: tuple[str, ...] = ()
    """Domains whose validation queries are ranked."""
    titles_trie: Trie | None = None
    """The titles of the domain's items, where their loss over the catalogue is trained."""
    weight_of_catalogue: float = 0.0
    """The part of that loss."""

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def data(self) -> Path:
        return Path(self.config.data)

    @property
    def all_trained_on(self) -> list[str]:
        """Hashes of the shards that the finished model will have been trained on, since its base."""
        return [*shards_of(self.start_from or Path(self.config.model_name_or_path)), *self.trained_on]

    def recorded_inputs(self, hashes: FileHashes) -> dict[str, str]:
        """Hashes of all that the run reads."""
        files = file_inputs(
            self.config,
            hashes,
            start_from=self.start_from,
            fork_of=self.fork_of,
            general_text=general_text_of(self.config),
        )
        ranked = {f"queries/{domain}": hashes.of(queries_of(self.data, domain)) for domain in self.probe_domains}
        return {"trained_on": " ".join(self.all_trained_on), **self.inputs, **files, **ranked}


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
            model = _make_model(config, tokenizer, unloaded_model)
        _check_fits(run, plan, model, tokenizer)
        say(str(_estimate(run, plan, model, validation)))
        return run.output_dir
    if config.resume_from_checkpoint == "never":
        distributed.by_first(lambda: remove_checkpoints(run.output_dir, stable=True))
    loss = _build(run, plan, tokenizer)
    told = None
    if plan.stream.num_steps >= FEW_STEPS:  # a shorter run is not worth the timing
        told = measure(_estimate(run, plan, loss.module, validation), loss, plan.stream)
        say(str(told))

    def record() -> None:
        save_resolved(run.output_dir, config, run.recorded_inputs(hashes))  # by now there is a copy of a hub's model
        hashes.save()

    distributed.by_first(record)
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
    loss = _build(run, plan, load_tokenizer(str(run.data / "tokenizer")))
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


def plan_of(config: TrainingConfig, stream: TokenStream) -> Plan:
    """The stream with a learning rate for each step. Lengths below 1 are fractions of all steps.

    Where the stream has a phase for warm-up or annealing, its steps count and not the setting.
    """
    num_steps, unit = stream.num_steps, config.schedule_unit
    steps = {phase.name: of_phase for phase, of_phase in zip(stream.phases, stream.phase_steps, strict=True)}
    warmup = steps.get(WARMUP, steps_of(config.warmup_steps, num_steps))
    if 0 < config.warmup_steps < 1:
        warmup = max(1, warmup)
    anneal = steps.get(ANNEALING, steps_of(config.anneal_steps, num_steps))
    if config.anneal_steps < 1:
        anneal = min(anneal, max(0, num_steps - warmup))
    schedule = make_schedule(
        config.lr_scheduler_type,
        range(1, num_steps + 1) if unit == "steps" else stream.tokens_after().tolist(),
        config.learning_rate,
        warmup_steps=warmup,
        anneal_steps=anneal,
        floor_ratio=config.min_lr_ratio,
        shape=config.anneal_shape,
    )
    return Plan(stream, schedule, unit)


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


def general_text_of(config: TrainingConfig) -> str | None:
    """The text of the forgetting meter: a file, '' for our own, or None where the model was made here and has read no
    general text to forget."""
    if config.general_text != "auto":
        return None if config.general_text == "none" else config.general_text
    made_here = Path(config.data, CONFIG_FILE).is_file() and read_resolved(config.data)["config"]["tokenizer"] == TINY
    return None if made_here or config.model_name_or_path == TINY else ""


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
        heldout_tokens=heldout * (stream.num_steps // config.eval_steps + 2),  # at the start and the end, too
    )


# ---- build -----------------------------------------------------------------------------------------------------------


def _build(run: Run, plan: Plan, tokenizer: Any) -> PackedLoss:
    """The model with its loss, checked for what packed rows need."""
    config, device = run.config, distributed.pick_device()
    attention = None if config.attn_implementation == "auto" else config.attn_implementation
    model = _make_model(config, tokenizer, partial(load_model, attn_implementation=attention)).to(device)
    _check_fits(run, plan, model, tokenizer)
    positions_given = check_attention(model)
    recompiled = config.torch_compile and config.gradient_checkpointing
    if config.attn_implementation == "auto" and device.type == "cpu" and not recompiled and positions_given:
        use_document_attention(model, compiled=config.torch_compile)
    check_isolation(model)
    bf16 = distributed.use_bf16(config.bf16, device)
    loss = prepare_loss(
        model,
        bf16=bf16,
        fsdp=config.fsdp,
        gradient_checkpointing=config.gradient_checkpointing,
        torch_compile=config.torch_compile,
    )
    if run.titles_trie is not None:
        loss = CatalogueLoss(loss.module, run.titles_trie, run.weight_of_catalogue, bf16=bf16)
    number_format = "bf16" if bf16 else "fp32"
    say(f"{num_parameters(model) / 1e6:.2f} M parameters on {distributed.describe(device)}, {number_format}")
    return loss


def _make_model(config: TrainingConfig, tokenizer: Any, load: Callable[[str], Any]) -> Any:
    """The model that the settings name, by `load` unless it is `tiny`, with its adapters."""
    if config.model_name_or_path == TINY:
        model: Any = tiny_model(
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
    if config.frozen_layers:
        freeze_lowest(model, config.frozen_layers)
    return model


def _check_fits(run: Run, plan: Plan, model: Any, tokenizer: Any) -> None:
    """Whether the model has room for the tokens, the rows and the titles.

    Raises ConfigError where it has not; says where documents are longer than it was made for.
    """
    config, about = run.config, run.about
    name, context = config.model_name_or_path, context_of(model)
    longest = int(plan.stream.corpus.lengths.max())
    _check_vocabulary(config, model, tokenizer)
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


def _check_vocabulary(config: TrainingConfig, model: Any, tokenizer: Any) -> None:
    """Raise ConfigError where a model has fewer token embeddings than the tokens of the data need, or its own tokenizer
    other ids; a model without a tokenizer cannot be compared."""
    name, vocabulary = config.model_name_or_path, tokenizer.get_vocab()
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ConfigError(
            f"{name} has {rows:,} token embeddings but the tokens in {config.data} were made with a vocabulary of "
            f"{len(tokenizer):,}: run `cprec prepare` with tokenizer={name}"
        )
    if name == TINY:
        return
    try:
        of_model = load_tokenizer(name).get_vocab()
    except ConfigError:
        return
    if other := sorted((number, token) for token, number in vocabulary.items() if of_model.get(token) != number):
        number, token = other[0]
        raise ConfigError(
            f"the tokens in {config.data} are not those of {name}: {len(other):,} of {len(vocabulary):,} have another "
            f"id there or none, as {token!r}, which is {number} in the data and {of_model.get(token)} in the model. "
            f"Run `cprec prepare` with tokenizer={name}"
        )


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
            validate=lambda: {"heldout": {name: perplexity(loss, each) for name, each in validation.items()}},
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
    model = _make_model(run.config, tokenizer, load_model)
    _check_vocabulary(run.config, model, tokenizer)

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
            shutil.copytree(run.data / "items", folder / "items")
            if (run.data / POPULARITY).is_file():  # ranks items for histories that say nothing
                shutil.copy2(run.data / POPULARITY, folder / POPULARITY)
            (folder / DONE).write_text(json.dumps(done, indent=1) + "\n")
            write_card(folder, read_resolved(run.output_dir), run.data)
        for path in sorted(unmoved.iterdir(), key=lambda path: path.name == DONE):
            publish(path, run.output_dir / path.name)
        unmoved.rmdir()

    distributed.by_first(write_and_move)
