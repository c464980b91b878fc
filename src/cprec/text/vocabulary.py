"""Cuts a byte-level BPE tokenizer to the tokens of some text and what their merges need.

A text without a token that was cut is encoded as before: each merge on the way to its tokens makes a part of one of
them, so that merge is still there, and of those that remain it still comes first. In any other text the merges that
remain, and in the end the bytes, spell what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cprec.errors import ConfigError
from cprec.text.tokenizer import beginning_of, encode_pieces

_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTES = dict(zip(_VISIBLE + _HIDDEN, map(chr, [*_VISIBLE, *range(256, 256 + len(_HIDDEN))]), strict=True))
"""The character that stands for each byte in tokens (Radford et al. 2019, the code of GPT-2)."""

NEEDED = (ord("\n"), *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))
"""The bytes of every printable character in UTF-8. Some tokenizers lack others, which control characters have or no
text at all."""

_KEPT_AS_IT_IS = ("ByteLevel", "TemplateProcessing", "Sequence")
"""Post-processors that a cut tokenizer can have."""


def describe(tokenizer: Any) -> dict[str, Any]:
    """The content of the `tokenizer.json` of a Hugging Face tokenizer.

    Raises ConfigError, with the reason, for one whose vocabulary cannot be cut.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _cannot_be_cut(f"{type(tokenizer).__name__} has no tokenizer.json")
    description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise _cannot_be_cut(f"its model is {model['type']}")
    if not any(step["type"] == "ByteLevel" for step in _steps(description["pre_tokenizer"])):
        raise _cannot_be_cut("it does not split texts into bytes")
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _cannot_be_cut(f"it has {name}={model[name]!r}")
    if other := {step["type"] for step in _steps(description["post_processor"])} - set(_KEPT_AS_IT_IS):
        raise _cannot_be_cut(f"its post-processor is {', '.join(sorted(other))}")
    if lacking := [byte for byte in NEEDED if BYTES[byte] not in model["vocab"]]:
        shown = ", ".join(f"0x{byte:02X}" for byte in lacking[:5])
        raise _cannot_be_cut(
            f"it has no token for {len(lacking)} bytes of printable text, as {shown}: once its longer tokens are cut, "
            "titles with these could not be written"
        )
    return description


def _cannot_be_cut(why: str) -> ConfigError:
    return ConfigError(
        f"the vocabulary of this tokenizer cannot be cut: {why}. Byte-level BPE can (GPT-2, SmolLM, Qwen, Llama 3)"
    )


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A pre-tokenizer or post-processor and, where it is a sequence, those inside."""
    if step is None:
        return []
    inner = step.get("pretokenizers", step.get("processors", ()))
    return [step, *(each for part in inner for each in _steps(part))]


def needed_tokens(description: Mapping[str, Any], seen: Iterable[int]) -> list[int]:
    """The ids, ascending, of the tokens to keep so that texts of the tokens `seen` are encoded as before.

    These are the tokens seen, all added (special) tokens, all bytes, and of each such token every merge that makes it,
    with both parts of the merge and all that makes these.
    """
    model = description["model"]
    ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in description["added_tokens"]}
    names = {number: name for name, number in ids.items()}
    parts: dict[str, list[str]] = {}
    for left, right in model["merges"]:
        parts.setdefault(left + right, []).extend((left, right))
    waiting = [names[number] for number in seen] + [token["content"] for token in description["added_tokens"]]
    waiting += [name for name in (*BYTES.values(), model["unk_token"]) if name in ids]
    kept: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += parts.get(name, ())
    return sorted(ids[name] for name in kept)


def cut(description: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The `tokenizer.json` with the tokens `kept` alone, numbered in this order; `needed_tokens` makes that list."""
    new = {number: place for place, number in enumerate(kept)}
    model = description["model"]
    vocabulary = {name: new[number] for name, number in model["vocab"].items() if number in new}
    merges = [[left, right] for left, right in model["merges"] if left + right in vocabulary]
    added = [token | {"id": new[token["id"]]} for token in description["added_tokens"]]
    smaller = {**description, "model": model | {"vocab": vocabulary, "merges": merges}, "added_tokens": added}
    smaller = json.loads(json.dumps(smaller))  # a copy, whose inner parts may be changed
    for step in _steps(smaller["post_processor"]):
        for token in step.get("special_tokens", {}).values():
            token["ids"] = [new[number] for number in token["ids"]]
    if smaller["padding"]:
        smaller["padding"]["pad_id"] = new[smaller["padding"]["pad_id"]]
    return smaller


def cut_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A Hugging Face tokenizer with the tokens `kept` alone (see `cut`), the same in all else."""
    backend = Tokenizer.from_str(json.dumps(cut(describe(tokenizer), kept)))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_input_names=tokenizer.model_input_names,
    )


def check_cut(whole: Any, smaller: Any, kept: Sequence[int], texts: Sequence[str]) -> None:
    """Raise ConfigError unless a tokenizer has the tokens `kept` of the whole one, numbered in this order, and reads
    texts of these tokens as that does."""
    new = {token: place for place, token in enumerate(kept)}
    names = {name: new[token] for name, token in whole.get_vocab().items() if token in new}
    before = [beginning_of(whole), *encode_pieces(whole, list(texts))]
    after = [beginning_of(smaller), *encode_pieces(smaller, list(texts))]
    if smaller.get_vocab() != names or after != [[new[token] for token in ids] for ids in before]:
        raise _cannot_be_cut("saved and loaded again, it has other tokens or reads the data otherwise")
