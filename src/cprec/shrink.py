"""Stage: a base model without the tokens that the data never use and, if asked, without some of its layers.

Suffixes: T tokens, D hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cprec.data.dataset import data_folder, read_catalogue
from cprec.errors import ConfigError
from cprec.files import whole_folder, write_whole
from cprec.models import blocks_of, drop_layers, load_model, num_parameters, trunk_and_head
from cprec.progress import say
from cprec.provenance import (
    CONFIG_FILE,
    TOKENIZER,
    WEIGHTS,
    FileHashes,
    file_sha256,
    model_hashes,
    read_resolved,
    save_resolved,
    to_dict,
)
from cprec.text.encoding import PromptEncoder
from cprec.text.general_text import ACCEPTED, read_texts
from cprec.text.prompts import Template
from cprec.text.shards import open_shards, read_shard_manifest
from cprec.text.tokenizer import beginning_of, encode_pieces, load_tokenizer
from cprec.text.vocabulary import check_cut, cut_tokenizer, describe, needed_tokens
from cprec.train.config import ShrinkConfig
from cprec.train.folder import read_done
from cprec.train.forgetting import own_texts

RECORD = "shrink.json"
SAMPLE_CHARACTERS = 2_000
"""So much of a text is read to measure perplexity."""
BATCH = 1_000
"""General texts that are tokenised at once."""


# ---- the stage -------------------------------------------------------------------------------------------------------


def shrink(config: ShrinkConfig) -> dict[str, Any]:
    """Write the smaller model's folder; returns what its `shrink.json` holds: sizes and perplexity before and after.

    A folder that was made with these settings from the same input is reused. Raises ConfigError where the model or its
    tokenizer cannot be cut or has no such number of layers, where the model was trained on behaviour already (the
    record of that would be lost), and where the output folder holds something else.
    """
    output, data = Path(config.output_dir), data_folder(config.data)
    inputs = _check_input(config, data)
    if _is_complete(config, output, inputs):
        say(f"{output}: complete with these settings, reused")
        return dict(json.loads((output / RECORD).read_text(encoding="utf-8")))
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    if hasattr(model, "peft_config"):
        raise ConfigError(f"model={config.model} has adapters: shrink the base model that they belong to")
    texts = _sample(config, data)
    removed = _removed_layers(config, model, tokenizer, texts)
    kept = _needed(config, data, model, tokenizer, texts["data"])
    smaller = cut_tokenizer(tokenizer, kept)
    before, probe = _describe(model, tokenizer, texts), _ids(smaller, texts["data"][0])
    keep_tokens(model, kept, probe)
    if removed:
        drop_layers(model, removed)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        smaller.save_pretrained(folder)
        saved, its_tokenizer = load_model(folder), load_tokenizer(str(folder))
        check_cut(tokenizer, its_tokenizer, kept, texts["data"])
        _check_logits(saved, probe, logits_of(model, probe))
        record = {"layers_removed": removed, "before": before, "after": _describe(saved, its_tokenizer, texts)}
        write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")
        save_resolved(folder, config, inputs)
    _tell(output, record)
    return record


def _check_input(config: ShrinkConfig, data: Path) -> dict[str, str]:
    """SHA-256 of what is read, by name."""
    done = read_done(config.model)
    if done is not None and done.get("trained_on") != []:  # text alone leaves no record to lose
        raise ConfigError(f"model={config.model} was trained by cprec: shrink its base model, and train that")
    if missing := [path for path in config.text if not Path(path).is_file()]:
        raise ConfigError(f"text={missing[0]}: no such file; give {ACCEPTED} files")
    hashes = FileHashes(config.output_dir)
    of_model = model_hashes(config.model, (*WEIGHTS, *TOKENIZER), hashes)
    documents = read_shard_manifest(data / "shards" / "train")
    return {
        **{f"model/{name}": sha256 for name, sha256 in of_model.items()},
        **{f"data/shards/train/{name}": sha256 for name, sha256 in documents["sha256"].items()},
        **{f"text/{path}": file_sha256(path) for path in config.text},
        "data/items": documents["about"]["catalogue_sha256"],
    }


def _is_complete(config: ShrinkConfig, output: Path, inputs: dict[str, str]) -> bool:
    """Whether the folder is there, made so. Raises ConfigError where something else is there."""
    if not output.exists():
        return False
    if not (output / RECORD).is_file():
        raise ConfigError(f"{output} exists and is no model that `cprec shrink` wrote: choose another folder")
    record = read_resolved(output)
    if (record["config"], record["inputs"]) != (to_dict(config), inputs):
        raise ConfigError(
            f"{output} was made with other settings or from other input, which {output / CONFIG_FILE} names: choose "
            "another folder or delete it"
        )
    return True


def _tell(output: Path, record: dict[str, Any]) -> None:
    before, after = record["before"], record["after"]
    for name in ("tokens", "layers", "parameters"):
        say(f"{name}: {before[name]:,} -> {after[name]:,}")
    for name, old in before["texts"].items():
        new = after["texts"][name]
        say(
            f"{name}: perplexity {old['perplexity']:.2f} -> {new['perplexity']:.2f} ({old['tokens']:,} -> "
            f"{new['tokens']:,} tokens), bits a byte {old['bits_per_byte']:.3f} -> {new['bits_per_byte']:.3f}"
        )
    if record["layers_removed"]:
        say(
            f"note: without layers {record['layers_removed'][0]} to {record['layers_removed'][-1]} this model needs "
            "healing: continue its pre-training before it is fine-tuned or judged"
        )
    say(f"{output}: written; prepare the data again with tokenizer={output}")


# ---- texts -----------------------------------------------------------------------------------------------------------


def _sample(config: ShrinkConfig, data: Path) -> dict[str, list[str]]:
    """The texts that perplexity is measured on: documents of the data, and the first general texts."""
    general = islice(_general_texts(config), config.sample_documents) if config.text else own_texts()
    shards, tokenizer = open_shards(data / "shards" / "train", verify=False), load_tokenizer(str(data / "tokenizer"))
    rows = np.unique(np.linspace(0, len(shards) - 1, config.sample_documents).astype(np.int64))
    documents = shards.take(rows)
    texts = {
        "data": [
            tokenizer.decode(documents[row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in range(len(rows))
        ],
        "general text": list(general),
    }
    return {name: [text[:SAMPLE_CHARACTERS] for text in some] for name, some in texts.items()}


def _general_texts(config: ShrinkConfig) -> Iterator[str]:
    for path in config.text:
        yield from read_texts(Path(path))


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text between two ends of sequence, so that each of them is predicted."""
    return [tokenizer.eos_token_id, *encode_pieces(tokenizer, [text])[0], tokenizer.eos_token_id]


def _needed(config: ShrinkConfig, data: Path, model: Any, tokenizer: Any, sample: list[str]) -> list[int]:
    """The ids of the tokens that the data, the files of `text` and the model's configuration need."""
    description = describe(tokenizer)
    seen = special_ids(model) & set(tokenizer.get_vocab().values())
    seen.update(_tokens_of_data(data, tokenizer).tolist(), *(_ids(tokenizer, text) for text in sample))
    texts = _general_texts(config)
    while batch := list(islice(texts, BATCH)):
        seen.update(*encode_pieces(tokenizer, batch))
    return needed_tokens(description, seen)


def _tokens_of_data(data: Path, tokenizer: Any) -> np.ndarray:
    """Every token of the items' texts, none of them cut, and of the template around them."""
    template = Template(**read_shard_manifest(data / "shards" / "train")["about"]["template"])
    return PromptEncoder(
        tokenizer,
        read_catalogue(data),
        max_title_tokens=sys.maxsize,
        template=template,
        begin=beginning_of(tokenizer),
    ).distinct_tokens()


# ---- tokens ----------------------------------------------------------------------------------------------------------


def special_ids(model: Any) -> set[int]:
    """The tokens that a model's configurations name (beginning, end, padding and others)."""
    return {token for _, _, tokens in _named_tokens(model) for token in tokens}


def _named_tokens(model: Any) -> Iterator[tuple[Any, str, list[int]]]:
    """Each setting that names tokens: the configuration, the setting's name, the tokens."""
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    for config in {id(each): each for each in configs if each is not None}.values():
        for name, value in list(vars(config).items()):
            if name.endswith(("_token_id", "suppress_tokens")) and value is not None:
                yield config, name, value if isinstance(value, list) else [value]


@torch.no_grad()
def keep_tokens(model: Any, kept: Sequence[int], sample: Sequence[int]) -> None:
    """Leave a model the embeddings and the output weights of the tokens `kept` alone, numbered anew in this order.

    Raises ConfigError where the model has no such tokens, and where the logits of a `sample` of new ids change.
    """
    embedding, (_, head) = model.get_input_embeddings(), trunk_and_head(model)
    if kept[-1] >= len(embedding.weight):
        raise ConfigError(
            f"the model has {len(embedding.weight):,} token embeddings, but its tokenizer a token {kept[-1]:,}: they "
            "do not belong together"
        )
    ids_V = torch.tensor(kept)
    expected = logits_of(model, ids_V[list(sample)])[:, ids_V]
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[ids_V])
    head.weight = embedding.weight if tied else nn.Parameter(head.weight[ids_V])
    new = {token: place for place, token in enumerate(kept)}
    embedding.num_embeddings = head.out_features = model.config.get_text_config().vocab_size = len(kept)
    embedding.padding_idx = new.get(embedding.padding_idx)
    for config, name, tokens in list(_named_tokens(model)):
        known = [new[token] for token in tokens if token in new]
        setattr(config, name, known if isinstance(getattr(config, name), list) else next(iter(known), None))
    _check_logits(model, sample, expected)


@torch.no_grad()
def logits_of(model: Any, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The logits [T, V] of the tokens after each of one text."""
    logits: torch.Tensor = model(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0]
    return logits


def _check_logits(model: Any, sample: Sequence[int], expected: torch.Tensor) -> None:
    logits = logits_of(model, sample)
    error = (
        float((logits - expected).abs().max() / expected.abs().max()) if logits.shape == expected.shape else math.inf
    )
    if not error < 1e-4:
        raise ConfigError(
            f"{type(model).__name__} cannot be cut: its logits change (relative difference {error:.2g}), "
            "because more in it depends on the vocabulary or the layers"
        )


# ---- layers ----------------------------------------------------------------------------------------------------------


def _removed_layers(config: ShrinkConfig, model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> list[int]:
    """The layers that go, chosen while the model still has all its tokens."""
    if config.layers is None:
        return []
    return least_layers(model, [_ids(tokenizer, text) for some in texts.values() for text in some], config.layers)


def least_layers(model: Any, rows: Sequence[Sequence[int]], num_kept: int) -> list[int]:
    """The neighbouring layers, as many as must go, over which the hidden states of some texts turn least.

    Measured by the angle between what the first of them reads and what the layer after the last reads (Gromov et al.
    2024, "The Unreasonable Ineffectiveness of the Deeper Layers", section 3.2), here as the mean over all tokens of the
    texts; theirs is of each text's last token. Raises ConfigError where the model has not more layers than `num_kept`.
    """
    num_layers = len(blocks_of(model))
    if num_kept >= num_layers:
        raise ConfigError(
            f"layers={num_kept}, but the model has {num_layers}: give fewer, or leave it out to keep all of them"
        )
    num_removed = num_layers - num_kept
    total = torch.zeros(num_kept + 1, dtype=torch.float64)
    for ids in rows:
        states_LTD = _states_of(model, ids).double()
        cosine_LT = functional.cosine_similarity(states_LTD[:-num_removed], states_LTD[num_removed:], dim=-1)
        total += cosine_LT.clamp(-1, 1).acos().sum(dim=1)
    first = int(total.argmin())
    return list(range(first, first + num_removed))


@torch.no_grad()
def _states_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """What each layer reads of a text, and what the last one writes: [L + 1, T, D]."""
    states: list[torch.Tensor] = []
    blocks = blocks_of(model)
    with ExitStack() as hooks:
        for block in blocks:
            hook = block.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
            hooks.callback(hook.remove)
        last = blocks[-1].register_forward_hook(
            lambda _, args, out: states.append((out if isinstance(out, torch.Tensor) else out[0])[0])
        )
        hooks.callback(last.remove)
        model(input_ids=torch.tensor([ids]), use_cache=False)
    return torch.stack(states)


# ---- measures --------------------------------------------------------------------------------------------------------


def _describe(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> dict[str, Any]:
    """The sizes of a model, and how well it predicts each kind of text."""
    return {
        "tokens": len(tokenizer),
        "layers": len(blocks_of(model)),
        "parameters": num_parameters(model),
        "texts": {name: perplexity_of(model, tokenizer, some) for name, some in texts.items()},
    }


def perplexity_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """`perplexity` of the tokens of some texts, each with its end, and `bits_per_byte` of their UTF-8, which models of
    different tokenizers can be compared by; and the number of `tokens`."""
    nats, num_tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor(_ids(tokenizer, text))
        nats += float(functional.cross_entropy(logits_of(model, ids[:-1]), ids[1:], reduction="sum"))
        num_tokens += len(ids) - 1
    num_bytes = sum(len(text.encode()) for text in texts)
    return {
        "tokens": num_tokens,
        "perplexity": math.exp(nats / num_tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }
