"""Settings of pre-training, fine-tuning, distilling, anneal forks and of shrinking a base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cprec.errors import ConfigError
from cprec.text.config import TINY, Curriculum, Mixture


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Size of the decoder that `model_name_or_path=tiny` makes from random weights."""

    hidden_size: int = 128
    """Width of the residual stream."""
    num_hidden_layers: int = 2
    """Transformer blocks."""
    num_attention_heads: int = 4
    """Heads; must divide hidden_size."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must be num_attention_heads={self.num_attention_heads} times an "
                f"even number"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of pre-training and fine-tuning; names are Hugging Face's where one exists."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "per_device_train_batch_size": "train_batch_size=ROWS of an optimizer step, in all processes together",
        "gradient_accumulation_steps": "micro_batch_size=ROWS of a forward pass in one process, and train_batch_size="
        "ROWS of an optimizer step, in all processes together",
    }
    """Settings that are gone: what to write in their place."""

    data: str
    """Data folder that `cprec prepare` wrote."""
    output_dir: str
    """Where the model folder, its checkpoints and its log go."""
    model_name_or_path: str = "tiny"
    """A causal language model: a Hugging Face name, a model folder, a GGUF file, or `tiny` (small, from random
    weights)."""
    tiny: TinyModel = TinyModel()
    """Size of the tiny model; unused otherwise."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 trains all weights."""
    lora_alpha: int = 32
    """Scale of the LoRA update (alpha / rank)."""
    lora_merge: bool = False
    """Add the adapters into the weights of the finished model: a plain one, which no longer needs its base."""
    frozen_layers: float = 0.0
    """The lowest layers, which keep their weights, with the embeddings: a fraction of all if below 1, else a number.
    Nothing is computed for them in the backward pass. 0 trains all."""
    learning_rate: float = 1e-4
    """Peak learning rate (our reconstruction: 1e-4 up to 0.6 B parameters, 5e-5 for 1-3 B; small models from random
    weights want 1e-3 and more)."""
    num_train_epochs: float = 1.0
    """Passes over the training tokens; a fraction is allowed."""
    max_length: int = 1024
    """Tokens of a packed row."""
    train_batch_size: int = 8
    """Packed rows of an optimizer step, in all processes together: the same rows for any number of processes."""
    micro_batch_size: int = 0
    """Packed rows of a forward pass in one process, at most: it decides memory and time, not what is learnt. 0: all
    that the process has."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; norms are left out."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    bf16: Literal["auto", "true", "false"] = "auto"
    """Compute in bf16 with fp32 weights; auto: where the machine has instructions for it."""
    lr_scheduler_type: Literal["wsa", "constant_with_warmup", "cosine", "constant"] = "wsa"
    """Warmup-stable-annealing; or without the annealing; a cosine over all that warm-up leaves; or the peak only."""
    schedule_unit: Literal["steps", "tokens"] = "steps"
    """What the learning rate follows: optimizer steps, or the tokens read by the end of each."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"] = "auto"
    """How attention is computed; auto: as transformers chooses, but on a CPU inside documents only, which is
    quicker. All must keep packed documents apart on this model."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: much less memory for about a third more time."""
    torch_compile: bool = False
    """Compile each block: faster steps after a first one of a minute or so."""
    fsdp: bool = False
    """Under torchrun, spread weights, gradients and optimizer over the processes; else each holds them whole."""
    ddp_timeout: int = 1800
    """Seconds that a process waits for the others before it gives up."""
    warmup_steps: float = 0.03
    """Warm-up: a fraction of all steps if below 1, else a number of steps."""
    anneal_steps: float = 0.15
    """Annealing at the end: a fraction of all steps if below 1, else a number of steps; 0 stays at the peak."""
    anneal_shape: Literal["1-sqrt", "linear", "cosine", "exponential"] = "1-sqrt"
    """How the learning rate falls."""
    min_lr_ratio: float = 0.1
    """The last learning rate, as a share of the peak."""
    seed: int = 0
    """Decides the order of documents and the tiny model's first weights."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    logging_steps: int = 10
    """Steps between lines of log.jsonl."""
    eval_steps: int = 500
    """Steps between measurements of held-out perplexity and rankings of validation queries."""
    eval_tokens: int = 50_000
    """Held-out tokens measured per domain and kind, at most."""
    probe_queries: int = 0
    """Validation queries of a domain, a seeded sample, that the model ranks over the full catalogue whenever the
    perplexity is measured; 0 ranks none."""
    keep: Literal["last", "best"] = "last"
    """Which weights the finished model has: the last, or those with the highest mean NDCG@10 of these rankings, of
    equal ones the later."""
    resume_from_checkpoint: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in output_dir; never starts again."""
    report_to: tuple[str, ...] = ("auto",)
    """Where the numbers of the log go as well: tensorboard, wandb, mlflow, trackio; none; auto: TensorBoard where it is
    installed."""
    run_name: str = ""
    """What they are filed under there; empty: the name of output_dir."""
    item_head: bool = False
    """After the model also an item head: a small network that reads what the model makes of titles and ranks all items
    in one pass (mode=vectors); a blend has it as a part. That of pre-training is of all domains, those too that it has
    not seen, and fine-tuning goes on from it. Takes minutes."""
    general_text: str = "auto"
    """A text whose perplexity is measured with the held-out sets, to see what training makes a model forget: a file
    (.txt, or .jsonl or Parquet with a column `text`), none, or auto: one of our own, but none for `tiny`, which knows
    nothing to forget."""
    dry_run: bool = False
    """Show the plan (steps, tokens, mixture, learning rate) and what it will take (memory, disk, time); train
    nothing."""

    may_stay: ClassVar[bool] = False
    """Whether no training at all may be asked for."""

    def __post_init__(self) -> None:
        positive = (
            *("learning_rate", "num_train_epochs", "max_length", "train_batch_size", "max_grad_norm", "save_steps"),
            *("save_total_limit", "logging_steps", "eval_steps", "ddp_timeout"),
        )
        for name in positive:
            if name == "num_train_epochs" and self.may_stay and not self.num_train_epochs:
                continue
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        for name in (
            "weight_decay",
            "warmup_steps",
            "anneal_steps",
            "eval_tokens",
            "lora_rank",
            "frozen_layers",
            "micro_batch_size",
            "probe_queries",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.frozen_layers > 1 and self.frozen_layers % 1:
            raise ConfigError(f"frozen_layers={self.frozen_layers:g} must be a fraction below 1 or a whole number")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"min_lr_ratio={self.min_lr_ratio} must lie in 0..1")
        if self.lora_merge and not self.lora_rank:
            raise ConfigError(
                "lora_merge=true has no adapters to merge with lora_rank=0: set lora_rank, or leave it out"
            )
        if self.keep == "best" and not self.probe_queries:
            raise ConfigError(
                "keep=best goes by rankings of validation queries, and probe_queries=0 ranks none: set "
                "probe_queries=256, or keep=last"
            )
        if self.probe_queries and self.fsdp:
            raise ConfigError(
                f"probe_queries={self.probe_queries} ranks with the whole model in one process, and fsdp=true spreads "
                "it: set fsdp=false, or probe_queries=0"
            )

    @property
    def rows_per_pass(self) -> int:
        """Rows of a forward pass of one process that has all rows of a step."""
        return min(self.micro_batch_size or self.train_batch_size, self.train_batch_size)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Settings of continual pre-training."""

    mixture: Mixture = Mixture()
    """What is read, and in which shares."""
    warmup_mixture: Mixture | None = None
    """Another mixture while the learning rate rises; none: the same."""
    anneal_mixture: Mixture | None = None
    """Another mixture while it falls; none: the same."""
    curriculum: Curriculum = Curriculum()
    """How walks, rules and item texts are made, where a mixture asks for them."""
    max_passes: float = 0
    """How often a domain's documents (or the mixed ones, or the general text) are read at most; what one may not have,
    the others get. 0: as often as the shares ask."""
    replay: tuple[str, ...] = ()
    """Files of general text, JSON lines or Parquet with a column `text`, or plain .txt, for `mixture.text_share`."""
    probe_domains: tuple[str, ...] = ()
    """Target domains of the data whose validation queries `probe_queries` counts. A choice by a domain's queries, even
    of one that is not trained on, has seen a sample of its validation events."""
    loss: Literal["all", "items_only"] = "all"
    """Which tokens of behaviour sequences the loss covers: all, or the items' titles without the fixed template."""
    continue_from: str = ""
    """A stable checkpoint of another run (RUN/stable-STEP): its weights and optimizer go on with these data, without a
    warm-up."""

    branch_length: float = 0.0
    """What `cprec anneal` sets in the branches of a run: their annealing as a share of all their tokens, in place of
    `anneal_steps`, which then says where the run began to anneal. 0: no branch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.branch_length < 1:
            raise ConfigError(f"branch_length={self.branch_length} must be a share of the tokens, in 0..1")
        if bool(self.probe_queries) != bool(self.probe_domains):
            raise ConfigError(
                f"probe_queries={self.probe_queries} and probe_domains={list(self.probe_domains)}: set both, as in "
                "probe_queries=256 probe_domains=[books], or neither"
            )
        if self.max_passes < 0:
            raise ConfigError(f"max_passes={self.max_passes} must be above 0, or 0 for no cap")
        if self.continue_from and self.warmup_mixture:
            raise ConfigError("continue_from goes on without a warm-up: leave warmup_mixture out")
        if self.continue_from and not re.fullmatch(r"stable-\d+", Path(self.continue_from).name):
            raise ConfigError(
                f"continue_from={self.continue_from}: give the stable checkpoint of a run, as RUN/stable-1200"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Settings of fine-tuning."""

    may_stay: ClassVar[bool] = True

    domain: str
    """The target domain: one that `cprec prepare` wrote examples for."""
    documents: Literal["examples", "users", "trees"] = "examples"
    """What is read: an example for each event, with the loss on its title alone; each user's events once, in one
    document, with the loss on all tokens; or such documents with branches: after each event hangs what came next, as a
    prompt asks for it, and what teachers choose."""
    max_documents: int = 0
    """Few-shot: examples (or documents or trees of users) that are read at most, a sample by the seed; 0 reads all."""
    teachers: tuple[str, ...] = ()
    """Baselines that choose further targets, as `transition graph (titles),EASE`: after every training event, items
    drawn by what all of them say of each are targets, too (docs/pretraining.md). Needs documents=trees."""
    taught_targets: int = 2
    """Items that teachers choose after each event."""
    preference: int = 0
    """Titles that are set against what came next after each event: the loss then says how much more than before
    training the model prefers it to them (S-DPO, docs/pretraining.md). For a model that was fine-tuned; needs
    documents=trees. 0: none."""
    preference_beta: float = 1.0
    """What the gains of titles in logarithmic probability are multiplied by in that loss."""
    rejected: Literal["uniform", "popularity"] = "uniform"
    """How these titles are drawn from those of items with training events: all alike, or by their number of events."""
    softmax: Literal["vocabulary", "catalogue", "both"] = "vocabulary"
    """What the probabilities of a title's next token sum to one over in the loss: the vocabulary; the tokens with which
    titles of the catalogue go on there, which teaches nothing where there is one; or a sum of both losses. Rankings use
    the catalogue unless it is the vocabulary."""
    head_networks: int = 1
    """Networks of the item head, each trained with a seed of its own, whose scores are averaged: three tell more than
    one, and take three times as long (docs/results.md)."""
    catalogue_weight: float = 0.5
    """The part of the catalogue's loss with softmax=both; the rest is the vocabulary's."""
    num_train_epochs: float = 3.0
    """Passes over the examples; 0: the model stays as it is, to be given an item head."""
    anneal_steps: float = 0.95
    """Annealing: with warm-up 0.05 the learning rate falls from the peak on."""
    warmup_steps: float = 0.05
    """Warm-up: a fraction of all steps if below 1, else a number of steps."""
    anneal_shape: Literal["1-sqrt", "linear", "cosine", "exponential"] = "cosine"
    """How the learning rate falls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_documents < 0:
            raise ConfigError(f"max_documents={self.max_documents} must be 0 or more")
        if self.max_documents and self.item_head:
            raise ConfigError(
                f"max_documents={self.max_documents} is of the language model alone, and an item head learns from all "
                "events: set item_head=false"
            )
        if self.teachers and (self.documents != "trees" or self.max_documents):
            raise ConfigError(
                "teachers choose targets that hang in trees, and learn from all events: set documents=trees and "
                "max_documents=0"
            )
        if self.documents == "trees" and self.attn_implementation not in ("auto", "sdpa", "eager"):
            raise ConfigError(
                f"attn_implementation={self.attn_implementation} cannot read documents=trees: set "
                "attn_implementation=auto or sdpa"
            )
        if self.teachers and not self.num_train_epochs:
            raise ConfigError("teachers have nobody to teach where num_train_epochs=0: raise it, or leave them out")
        if self.taught_targets < 1:
            raise ConfigError(f"taught_targets={self.taught_targets} must be at least 1")
        if self.head_networks < 1:
            raise ConfigError(f"head_networks={self.head_networks} must be at least 1")
        if self.preference:
            self._check_preference()
        if not 0 < self.catalogue_weight < 1:
            raise ConfigError(f"catalogue_weight={self.catalogue_weight} must lie between 0 and 1")
        if self.softmax != "vocabulary" and self.documents != "examples":
            raise ConfigError(f"softmax={self.softmax} learns from the targets of examples: set documents=examples")
        if self.softmax != "vocabulary" and self.fsdp:
            raise ConfigError(
                f"softmax={self.softmax} needs the output layer whole in every process: set fsdp=false, or "
                "softmax=vocabulary"
            )

    def _check_preference(self) -> None:
        asked = f"preference={self.preference}"
        if self.preference < 0:
            raise ConfigError(f"{asked} must be 0 or more")
        if not self.preference_beta > 0:
            raise ConfigError(f"preference_beta={self.preference_beta} must be above 0")
        if self.documents != "trees" or self.teachers:
            raise ConfigError(f"{asked} hangs titles of its own in trees: set documents=trees, without teachers")
        if self.model_name_or_path == TINY or not self.num_train_epochs:
            raise ConfigError(
                f"{asked} trains a model that was fine-tuned: give its folder, and num_train_epochs above 0"
            )
        if self.fsdp:
            raise ConfigError(f"{asked} needs the output layer whole in every process: set fsdp=false")

    @property
    def weight_of_catalogue(self) -> float:
        """The part that the catalogue's loss has."""
        return {"vocabulary": 0.0, "catalogue": 1.0, "both": self.catalogue_weight}[self.softmax]


@dataclass(frozen=True, kw_only=True)
class DistilConfig(FinetuneConfig):
    """Settings of distilling: those of fine-tuning, of a model with fewer layers that a deeper one teaches."""

    may_stay: ClassVar[bool] = False

    model_name_or_path: str = TINY
    """The teacher: a model folder that `cprec` wrote, or any causal language model, as a Hugging Face name, a folder or
    a GGUF file."""
    domain: str = ""
    """The target domain: one that `cprec prepare` wrote examples for; empty: the one the teacher was fine-tuned on."""
    num_train_epochs: float = 3.0
    """Passes over what is read."""
    layers: int
    """Layers that the student has."""
    start: Literal["first", "spaced"] = "first"
    """Which layers of the teacher the student begins as: the first, or evenly spaced ones, with the first and the last
    among them."""
    token_weight: float = 1.0
    """Weight of the divergence of the student's next tokens from the teacher's, at the places of the targets."""
    temperature: float = 2.0
    """What the logits of both are divided by for that: above 1, unlikely tokens count more."""
    num_groups: int = 4
    """Groups that the layers of either are cut into, as evenly as they can be; states are compared at their ends."""
    direction_weight: float = 1.0
    """Weight of one minus the cosine of the student's state and the teacher's, at the end of each group."""
    distance_weight: float = 0.1
    """Weight of their distance, as a share of the length of the teacher's."""
    head_weight: float = 0.0
    """Weight of predictions of the next token from the student's states in the middle, at the end of each group but the
    last, by its own norm and output layer; 0: there are none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path == TINY:
            raise ConfigError(f"model_name_or_path={TINY} is random weights, which teach nothing: give a model folder")
        for name in ("layers", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("token_weight", "direction_weight", "distance_weight", "head_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.preference:
            raise ConfigError(
                f"preference={self.preference} is of fine-tuning: set it there, before or after distilling"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if self.num_groups > self.layers:
            raise ConfigError(f"num_groups={self.num_groups} must not be above layers={self.layers}: set it lower")
        if self.head_weight and self.num_groups == 1:
            raise ConfigError("head_weight is of states in the middle, and num_groups=1 has none: set num_groups=2")
        if self.lora_rank:
            raise ConfigError(
                f"lora_rank={self.lora_rank} adds adapters to a saved model, and a student is saved only when it has "
                "learnt: set lora_rank=0"
            )
        for name in ("fsdp", "torch_compile"):
            if getattr(self, name):
                raise ConfigError(f"{name}=true hides the states between layers, which are compared: set {name}=false")

    @property
    def weights(self) -> dict[str, float]:
        """Of the loss terms beside the usual one, by name, those above 0."""
        every = {
            "tokens": self.token_weight,
            "direction": self.direction_weight,
            "distance": self.distance_weight,
            "heads": self.head_weight,
        }
        return {name: weight for name, weight in every.items() if weight}


ForkData = Literal["same", "mixed_late", "sft_late"]
"""What a branch reads while its learning rate falls."""


@dataclass(frozen=True, kw_only=True)
class AnnealConfig:
    """Settings of anneal forks."""

    run: str
    """Folder of a pre-training run; its end-of-stable checkpoint is enough, it need not be finished."""
    start: str = ""
    """The stable checkpoint to branch from, as stable-1200; empty: the newest of the run."""
    lengths: tuple[str, ...] = ("5%", "10%", "20%")
    """Annealing of each branch, as a share of all its tokens (the shared ones included)."""
    shapes: tuple[Literal["1-sqrt", "linear", "cosine", "exponential"], ...] = ("1-sqrt",)
    """How the learning rate falls."""
    data: tuple[ForkData, ...] = ("same",)
    """What is read while it falls: the same mixture; mixed_late: four fifths of the behaviour tokens from mixed
    sequences; sft_late: a tenth of all tokens from fine-tuning examples of the pre-training domains."""
    domain: str = ""
    """Domain of the fine-tuning that compares the branches; empty: the only one that has examples."""
    num_train_epochs: float = 1.0
    """Passes of that fine-tuning; 0 compares by held-out perplexity alone."""
    learning_rate: float = 0.0
    """Peak of that fine-tuning; 0: that of the run."""
    max_queries: int = 1000
    """Validation queries that the fine-tuned branches rank, a seeded sample; 0 ranks none."""
    output_dir: str = ""
    """Where the branches and the comparison go; empty: RUN/forks."""

    def __post_init__(self) -> None:
        for length in self.lengths:
            share_of(length)
        if not (self.lengths and self.shapes and self.data):
            raise ConfigError("lengths, shapes and data must each name one thing at least")
        if self.num_train_epochs < 0 or self.learning_rate < 0 or self.max_queries < 0:
            raise ConfigError("num_train_epochs, learning_rate and max_queries must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """Settings of shrinking a base model."""

    model: str
    """The base model, as a Hugging Face name, a folder or a GGUF file; one that `cprec` has not trained yet."""
    output_dir: str
    """The model folder to write."""
    data: str
    """A data folder that `cprec prepare` wrote, with any tokenizer: the tokens of its items' texts stay."""
    text: tuple[str, ...] = ()
    """Files of general text (.jsonl, .parquet, .txt) whose tokens stay too, as those to replay."""
    layers: int | None = None
    """How many of the model's layers stay; None: all."""
    sample_documents: int = 16
    """Documents of the data, and general texts, that perplexity and the change of hidden states are measured on."""

    def __post_init__(self) -> None:
        for name in ("layers", "sample_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")


def share_of(length: str) -> float:
    """A length as a share.

    >>> share_of("5%"), share_of("0.2")
    (0.05, 0.2)
    """
    try:
        share = float(length.strip().removesuffix("%")) / (100 if length.strip().endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"lengths: {length!r} is no share between 0 and 1; write 10% or 0.1")
    return share


def under_current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run as it recorded them, with the names of today.

    >>> under_current_names({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 1})
    {'seed': 1, 'train_batch_size': 8, 'micro_batch_size': 4}
    """
    settings = dict(recorded)
    for name in ("mixture", "warmup_mixture", "anneal_mixture"):
        if settings.get(name):  # a run from before there were other kinds read none of them
            settings[name] = asdict(Mixture()) | settings[name]
    if "gradient_accumulation_steps" in settings:
        rows = settings.pop("per_device_train_batch_size")
        passes = settings.pop("gradient_accumulation_steps")
        settings |= {"train_batch_size": rows * passes, "micro_batch_size": rows if passes > 1 else 0}
    return settings
