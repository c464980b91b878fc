"""The tokenizer of a run: the base model's own, or a small byte-level BPE trained on catalogue text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import clean_title
from cprec.errors import ConfigError
from cprec.gguf import model_source
from cprec.provenance import TOKENIZER
from cprec.text.config import TINY
from cprec.text.prompts import Template

EOS = "<eos>"
PAD = "<pad>"

UNIT = r"\n-| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
"""What the tiny tokenizer splits text into first: words, numbers and marks, each with the space before it, and the line
opening of the template. Every piece of the template starts a unit, so a document has the tokens of its pieces."""

TEMPLATE_REPEATS = 100
"""How often the template's parts stand among the titles in training, so that they are merged to few tokens."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 8192) -> Any:
    """A byte-level BPE over `texts`, as a fast Hugging Face tokenizer; any text can be encoded and decoded exactly.

    Raises ConfigError if `vocabulary_size` is too small for the 256 bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocabulary_size < smallest:
        raise ConfigError(f"vocabulary_size={vocabulary_size} is below {smallest} (256 bytes and 2 special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(UNIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[PAD, EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def train_on_titles(catalogue: Catalogue, domains: Sequence[str], vocabulary_size: int, template: Template) -> Any:
    """A tiny tokenizer trained on nothing but the template's fixed parts and the item fields that it asks for, of the
    items of some domains."""
    rows = np.concatenate([catalogue.rows_of(domain) for domain in domains])
    fixed = [
        template.head(domain) + template.line + template.next + template.tag(domain) for domain in catalogue.domains
    ]
    return train_tokenizer(
        [
            *fixed * TEMPLATE_REPEATS,
            template.head(template.mixed_scope),
            *(template.title(title) for title in catalogue.title[rows]),
            *(
                template.field(clean_title(text))
                for name in template.item_fields[1:]
                for text in getattr(catalogue, name)[rows]
            ),
        ],
        vocabulary_size,
    )


def beginning_of(tokenizer: Any, add_bos_token: str = "auto") -> list[int]:
    """The tokens that stand before every document and prompt.

    With `auto` they are those that the tokenizer itself puts before a text (a beginning-of-sequence token, or none);
    with `true` its beginning-of-sequence token, where it puts none; with `false` none. Raises ConfigError where it has
    no such token.
    """
    if add_bos_token == "false":
        return []
    whole, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    if not places:
        raise ConfigError(
            "the tokenizer encodes 'x' differently where it adds special tokens, so what it puts before a text cannot "
            "be told: set add_bos_token=false"
        )
    begin = [int(token) for token in whole[: places[0]]]
    if begin or add_bos_token == "auto":
        return begin
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            "add_bos_token=true, but the tokenizer has no beginning-of-sequence token: leave it at auto, which begins "
            "texts as the tokenizer does"
        )
    return [int(tokenizer.bos_token_id)]


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a model, by Hugging Face name, folder or GGUF file. Raises ConfigError where there is none."""
    source = model_source(name_or_path)
    if Path(source).is_dir() and not any(path for pattern in TOKENIZER for path in Path(source).glob(pattern)):
        raise ConfigError(f"{name_or_path} holds no tokenizer (tokenizer.json, say)")  # transformers makes an empty one
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"tokenizer={name_or_path!r} is neither '{TINY}' nor the name, folder or GGUF file of a model with a "
            f"tokenizer that Hugging Face transformers can load: {error}"
        ) from error


def encode_pieces(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of each text by itself, nothing added; what spells a special token ("<eos>", "<|im_end|>") stays text.

    Raises ConfigError for a text that the tokenizer cannot write without one.
    """
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    marks = _special_ids(tokenizer)
    return [
        ids if marks.isdisjoint(ids) else _spelt_apart(tokenizer, text, marks)
        for text, ids in zip(texts, encoded, strict=True)
    ]


def _special_ids(tokenizer: Any) -> set[int]:
    """The ids that no text may have; the one for unknown words is a text's own, unless it also ends documents."""
    named = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*named, *tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})


def _spelt_apart(tokenizer: Any, text: str, marks: set[int]) -> list[int]:
    """The tokens of a text whose letters the tokenizer joins to special tokens, as some of SentencePiece's family do:
    the text is cut behind the first letter of each, and the pieces are tokenised by themselves."""
    ids: list[int] = []
    while True:
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        places = zip(found["input_ids"], found["offset_mapping"], strict=True)
        start, end = next((place for token, place in places if token in marks), (0, 0))
        if not end:
            return ids + found["input_ids"]
        if end - start < 2:
            raise ConfigError(
                f"the tokenizer writes {text[start:end]!r} in {text!r} as a special token, so no title may hold it: "
                "take another tokenizer, or clean the titles"
            )
        ids += _spelt_apart(tokenizer, text[: start + 1], marks)
        text = text[start + 1 :]
