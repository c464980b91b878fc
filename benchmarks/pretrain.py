"""Pre-training, beside transformers' Trainer and TRL's SFTTrainer: real tokens a second on the same documents.

    python benchmarks/pretrain.py [--sizes 10m] [--dtypes fp32,bf16] [--rounds 3] [--documents 320]
                                  [--variants compiled,masked]

Each contestant makes a pass over the same generated documents (lengths as users' histories have, mean about 125, up to
512) with the same model from the same weights and about 4,096 tokens an optimizer step; in turn, in one process.
Padding is not counted. The Trainer pads to the longest of its batch, TRL packs into rows of 512 (best fit, as its
`bfd`), ours packs into rows of 512. TRL is left out where it is not installed (`pip install trl datasets`). Variants of
ours: `compiled` blocks, once they are; `masked`, transformers' own attention over whole rows.

Also: how full our rows are, what of a step is not forward, backward or optimizer, how fast the stream alone is, and the
largest tensor that a step makes. On a CUDA device a Qwen3-style model of 0.5 B parameters in rows of 2,048 is measured
too: tokens a second, share of the measured matmul rate, memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cprec import distributed
from cprec.batch import Batch
from cprec.data.ragged import Ragged, offsets_of
from cprec.distributed import pick_device, use_bf16
from cprec.text.corpus import Corpus
from cprec.text.shards import write_shards
from cprec.text.stream import TokenStream, one_phase
from cprec.train.attention import use_document_attention
from cprec.train.loop import Cadence, Optimisation, train
from cprec.train.loss import PackedLoss, prepare_loss
from cprec.train.schedule import make_schedule

ROW_TOKENS, ROWS, DOCUMENTS_A_STEP = 512, 8, 32
SIZES = {
    "10m": {"hidden_size": 256, "num_hidden_layers": 10, "num_attention_heads": 4, "vocab_size": 8192},
    "50m": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 24576},
}
LEARNING_RATE = 3e-4


def documents(num: int, vocabulary_size: int, longest: int = ROW_TOKENS) -> Ragged:
    """Random tokens in documents of lengths as behaviour sequences have."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(math.log(105), 0.6, num).clip(24, longest).astype(np.int64)
    return Ragged(random.integers(5, vocabulary_size, lengths.sum()), offsets_of(lengths))


def make_model(size: dict[str, int], family: str = "llama") -> Any:
    """A model of random weights, the same each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    heads, width = size["num_attention_heads"], size["hidden_size"]
    config = AutoConfig.for_model(
        family,
        **{"num_key_value_heads": heads, "head_dim": width // heads} | size,
        intermediate_size=size.get("intermediate_size", -(-8 * width // 3 // 16) * 16),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


# ---- the contestants -------------------------------------------------------------------------------------------------


def stream_of(rows: Ragged, folder: Path, vocabulary_size: int, row_tokens: int, num_rows: int) -> TokenStream:
    num = len(rows)
    columns = {
        "domain": ["books"] * num,
        "kind": ["specific"] * num,
        "num_events": np.full(num, 8, dtype=np.int32),
        "target_start": np.ones(num, dtype=np.int64),
    }
    shards = write_shards(folder / "shards", rows, columns, {"vocabulary_size": vocabulary_size})
    plan = one_phase(len(rows.values))
    return TokenStream(Corpus.of(shards), plan, rows_per_step=num_rows, row_tokens=row_tokens, seed=0)


def loss_of(loss: PackedLoss, batch: Batch) -> torch.Tensor:
    """The summed loss of a batch."""
    (value,) = loss.losses(distributed.to_device(batch.rows, next(loss.parameters()).device)).values()
    return value


def prepared(model: Any, stream: TokenStream, bf16: bool, variant: str = "") -> PackedLoss:
    """The model as a stage prepares it; a compiled one has met every shape of batch once."""
    device, compiled = next(model.parameters()).device, variant == "compiled"
    if device.type == "cpu" and variant != "masked":
        use_document_attention(model, compiled=compiled)
    loss = prepare_loss(model, bf16=bf16, torch_compile=compiled)
    if compiled:
        batches = {batch.rows["input_ids"].shape: batch for batch in stream}
        for batch in batches.values():
            loss_of(loss, batch).backward()
        loss.zero_grad(set_to_none=True)
    return loss


def ours(loss: PackedLoss, stream: TokenStream, folder: Path) -> None:
    """One pass by the loop itself, logging as it does."""
    num_steps = stream.num_steps
    train(
        loss,
        stream,
        make_schedule(
            "constant",
            range(1, num_steps + 1),
            LEARNING_RATE,
            warmup_steps=0,
            anneal_steps=0,
            floor_ratio=0,
            shape="linear",
        ),
        output_dir=folder,
        optimisation=Optimisation(weight_decay=0.1, max_grad_norm=1.0),
        cadence=Cadence(logging_steps=10, eval_steps=10**9, save_steps=10**9, save_total_limit=1),
        validate=dict,
        description="ours",
    )


def arguments(folder: Path, bf16: bool) -> dict[str, Any]:
    """What Trainer and SFTTrainer are told alike."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0,
        "optim": "adamw_torch_fused",
    }


def trainer(model: Any, rows: Ragged, folder: Path, bf16: bool) -> Callable[[], None]:
    """transformers' Trainer, padding to the longest of the batch."""
    from transformers import Trainer, TrainingArguments

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(each["input_ids"]) for each in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(batch):
            ids[row, : len(each["input_ids"])] = torch.from_numpy(each["input_ids"])
            mask[row, : len(each["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    settings = TrainingArguments(**arguments(folder, bf16), per_device_train_batch_size=DOCUMENTS_A_STEP)
    data = [{"input_ids": rows[row].astype(np.int64)} for row in range(len(rows))]
    return Trainer(model, settings, data_collator=collate, train_dataset=data).train  # type: ignore[arg-type]


def sft_trainer(model: Any, rows: Ragged, folder: Path, bf16: bool) -> Callable[[], None]:
    """TRL's SFTTrainer, packing by best fit."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    settings = SFTConfig(
        **arguments(folder, bf16),
        per_device_train_batch_size=ROWS,
        packing=True,
        packing_strategy="bfd",
        max_length=ROW_TOKENS,
        gradient_checkpointing=False,
    )
    data = Dataset.from_dict({"input_ids": [rows[row].tolist() for row in range(len(rows))]})
    return SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer).train


# ---- measuring -------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def clocked(clock: list[float]) -> Iterator[None]:
    """Adds up the seconds of forward, backward, clipping and optimizer steps."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock[0] += time.perf_counter() - start

        return run

    with (
        patch.object(PackedLoss, "forward", timed(PackedLoss.forward)),
        patch.object(torch.Tensor, "backward", timed(torch.Tensor.backward)),
        patch.object(torch.optim.AdamW, "step", timed(torch.optim.AdamW.step)),
        patch("torch.nn.utils.clip_grad_norm_", timed(torch.nn.utils.clip_grad_norm_)),
    ):
        yield


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def compare(name: str, bf16: bool, rounds: int, num_documents: int, with_trl: bool, variants: Sequence[str]) -> None:
    """One size in one number format: the table, then what concerns ours alone."""
    size = SIZES[name]
    rows = documents(num_documents, size["vocab_size"])
    base = make_model(size)
    num_tokens = len(rows.values)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stream = stream_of(rows, folder, size["vocab_size"], ROW_TOKENS, ROWS)

        def start(contestant: str) -> Callable[[], Any]:
            model, where = copy.deepcopy(base), Path(tempfile.mkdtemp(dir=folder))
            if contestant.startswith("ours"):
                loss = prepared(model, stream, bf16, contestant.removeprefix("ours").removeprefix(", "))
                return lambda: ours(loss, stream, where)
            make = {"Trainer, padded to the longest": trainer, "TRL, packed": sft_trainer}[contestant]
            return make(model, rows, where, bf16)

        names = ["ours", *(f"ours, {variant}" for variant in variants), "Trainer, padded to the longest"]
        names += ["TRL, packed"] if with_trl else []
        warm = documents(2 * DOCUMENTS_A_STEP, size["vocab_size"])
        with contextlib.redirect_stdout(io.StringIO()):
            trainer(copy.deepcopy(base), warm, folder, bf16)()
        times: dict[str, list[float]] = {each: [] for each in names}
        clock, of_ours = [0.0], 0.0
        for _ in range(rounds):
            for each in names:
                torch.compiler.reset()
                work = start(each)
                with clocked(clock if each == "ours" else [0.0]), contextlib.redirect_stdout(io.StringIO()):
                    spent = seconds(work)
                times[each].append(spent)
                of_ours += spent if each == "ours" else 0.0
        parameters = sum(p.numel() for p in base.parameters()) / 1e6
        print(f"\n{name} ({parameters:.1f} M parameters), {'bf16' if bf16 else 'fp32'}: {num_tokens:,} tokens a pass")
        for each in names:
            ratio = statistics.median(a / b for a, b in zip(times[each], times["ours"], strict=True))
            rate = num_tokens / statistics.median(times[each])
            print(f"  {each:<32}{rate:>8,.0f} tokens/s{'' if each == 'ours' else f'   ours {ratio:.2f}x as fast'}")
        alone = statistics.median(seconds(lambda: list(stream)) for _ in range(5))
        watch = Largest()
        with watch:
            loss_of(PackedLoss(copy.deepcopy(base), bf16=bf16), stream.batch(0)).backward()
        positions = stream.batch(0).rows["input_ids"].size
        print(
            f"  rows {stream.fill:.1%} full; {1 - clock[0] / of_ours:.1%} of the time is none of forward, backward and "
            f"optimizer\n  the stream alone {num_tokens / alone:,.0f} tokens/s, "
            f"{statistics.median(times['ours']) / alone:,.0f}x what the model takes\n"
            f"  largest tensor of a step {watch.elements / 1e6:.1f} M elements; tokens x vocabulary would be "
            f"{positions * size['vocab_size'] / 1e6:.0f} M"
        )


# ---- one GPU ---------------------------------------------------------------------------------------------------------


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of large bf16 products, the best of some."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / min(seconds(lambda: a @ b) for _ in range(20))


def on_gpu(row_tokens: int = 2048, num_rows: int = 16) -> None:
    """Tokens a second, MFU and memory of a Qwen3-style model of 0.5 B parameters."""
    device = pick_device()
    size = {
        **{"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"head_dim": 64, "intermediate_size": 3072, "vocab_size": 151_936},
    }
    rows = documents(6000, size["vocab_size"], row_tokens)
    peak = matmul_rate(device)
    for variant in ("", "compiled"):
        model = make_model(size, "qwen3").to(device)
        with tempfile.TemporaryDirectory() as temporary:
            stream = stream_of(rows, Path(temporary), size["vocab_size"], row_tokens, num_rows)
            loss = prepared(model, stream, True, variant)
            ours(loss, stream, Path(temporary) / "warm")
            torch.cuda.reset_peak_memory_stats()
            spent = seconds(lambda: ours(loss, stream, Path(temporary) / "run"))  # noqa: B023
        matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)  # the tied head once, as it is used
        context = float((np.diff(rows.offsets) ** 2).sum()) / len(rows.values) / 2
        width = size["num_attention_heads"] * size["head_dim"]
        flops = 6 * matrices + 12 * size["num_hidden_layers"] * width * context
        rate = len(rows.values) / spent
        print(
            f"\n0.5 B Qwen3-style, rows of {row_tokens:,}, bf16{', ' * bool(variant)}{variant}: {rate:,.0f} tokens/s, "
            f"{flops * rate / peak:.1%} of the measured matmul rate ({peak / 1e12:.0f} TFLOP/s), "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10m", help="10m, 50m or both (the larger takes most of an hour)")
    parser.add_argument("--dtypes", default="fp32,bf16" if use_bf16("auto", pick_device()) else "fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=320)
    parser.add_argument("--variants", default="")
    options = parser.parse_args()
    variants = [variant for variant in options.variants.split(",") if variant]
    if unknown := set(variants) - {"compiled", "masked"}:
        parser.error(f"--variants: {', '.join(unknown)} is none of compiled, masked")
    os.environ["CPREC_PROGRESS"] = "off"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        import trl  # noqa: F401

        with_trl = True
    except ImportError:
        with_trl = False
        print("TRL is not installed (pip install trl datasets): its row is left out")
    if torch.cuda.is_available():
        on_gpu()
        return
    print(f"{torch.get_num_threads()} threads, medians of {options.rounds} interleaved passes")
    for name in options.sizes.split(","):
        for dtype in options.dtypes.split(","):
            compare(name, dtype == "bf16", options.rounds, options.documents, with_trl, variants)


if __name__ == "__main__":
    main()
