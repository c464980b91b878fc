"""The model that a run trains, with its loss; checked for the data and for packed rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cprec import distributed
from cprec.errors import ConfigError
from cprec.inspection import check_attention, check_isolation
from cprec.models import (
    TINY,
    add_lora,
    context_of,
    freeze_lowest,
    has_learned_positions,
    load_model,
    num_parameters,
    require_trees,
    tiny_model,
)
from cprec.progress import say
from cprec.text.prompts import Template
from cprec.text.tokenizer import load_tokenizer
from cprec.train.attention import use_document_attention
from cprec.train.catalogue_loss import CatalogueLoss
from cprec.train.config import TrainingConfig
from cprec.train.distillation import DistilledLoss, without_adapters
from cprec.train.loss import PackedLoss, prepare_loss
from cprec.train.plan import Plan
from cprec.train.preference import PreferenceLoss
from cprec.train.run import Run


def build(run: Run, plan: Plan, tokenizer: Any) -> PackedLoss:
    """The model with its loss, checked for what packed rows need."""
    config, device = run.config, distributed.pick_device()
    attention = None if config.attn_implementation == "auto" else config.attn_implementation
    load = partial(load_model, attn_implementation=attention)
    model = make_model(config, tokenizer, run.loading(load)).to(device)
    check_fits(run, plan, model, tokenizer)
    _let_attend(model, config, plan)
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
    if run.distillation is not None and run.distillation.weights:
        loss = DistilledLoss(loss, run.distillation, _teacher(run, plan, load) if run.has_teacher else None)
    if run.preference is not None:
        loss = PreferenceLoss(loss, run.preference)
    number_format = "bf16" if bf16 else "fp32"
    say(f"{num_parameters(model) / 1e6:.2f} M parameters on {distributed.describe(device)}, {number_format}")
    return loss


def _let_attend(model: Any, config: TrainingConfig, plan: Plan) -> None:
    """Let a model attend as the settings say, inside packed documents alone. Raises ConfigError where it cannot."""
    positions_given = check_attention(model)
    recompiled = config.torch_compile and config.gradient_checkpointing
    on_cpu = next(model.parameters()).device.type == "cpu"
    if config.attn_implementation == "auto" and on_cpu and not recompiled and positions_given:
        use_document_attention(model, compiled=config.torch_compile)
    check_isolation(model)
    if plan.stream.corpus.has_trees:
        require_trees(model, config.max_length)


def _teacher(run: Run, plan: Plan, load: Callable[[str], Any]) -> Any:
    """The model that teaches, which is not trained."""
    teacher = without_adapters(load(run.config.model_name_or_path)).to(distributed.pick_device())
    _let_attend(teacher, run.config, plan)
    return teacher.requires_grad_(False).eval()


def make_model(config: TrainingConfig, tokenizer: Any, load: Callable[[str], Any]) -> Any:
    """The model that the settings name, by `load` unless it is `tiny`, with its adapters and frozen layers."""
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


def check_fits(run: Run, plan: Plan, model: Any, tokenizer: Any) -> None:
    """Whether the model has room for the tokens, the rows and the titles.

    Raises ConfigError where it has not; says where documents are longer than it was made for.
    """
    config, about = run.config, run.about
    name, context = config.model_name_or_path, context_of(model)
    longest = int(plan.stream.corpus.lengths.max())
    check_vocabulary(config, model, tokenizer)
    if context is None:
        return
    titles = (
        0 if "template" not in about else about["max_title_tokens"] * len(Template(**about["template"]).item_fields)
    )
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


def check_vocabulary(config: TrainingConfig, model: Any, tokenizer: Any) -> None:
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
