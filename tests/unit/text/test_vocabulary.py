from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cprec.errors import ConfigError
from cprec.text.tokenizer import beginning_of, encode_pieces, load_tokenizer, train_tokenizer
from cprec.text.vocabulary import BYTES, NEEDED, check_cut, cut, cut_tokenizer, describe, needed_tokens

WORDS = st.lists(st.text("abc é苹", min_size=1, max_size=8), min_size=1, max_size=8)


@given(WORDS, st.integers(258, 290), WORDS, st.lists(st.one_of(st.text(max_size=8), st.text("abc é苹", max_size=12))))
def test_texts_of_kept_tokens_keep_their_tokens_and_any_text_can_be_written(
    corpus: list[str], size: int, seen: list[str], others: list[str]
) -> None:
    whole = train_tokenizer(corpus * 3, size)
    before = encode_pieces(whole, [*seen, *others])
    kept = needed_tokens(describe(whole), {token for ids in before[: len(seen)] for token in ids})
    smaller = cut_tokenizer(whole, kept)
    new = {token: place for place, token in enumerate(kept)}
    assert smaller.get_vocab() == {name: new[token] for name, token in whole.get_vocab().items() if token in new}
    after = encode_pieces(smaller, [*seen, *others])
    for old, ids in zip(before, after, strict=True):
        if set(old) <= new.keys():
            assert ids == [new[token] for token in old]
    assert all(set(ids) <= new.keys() for ids in before[: len(seen)])
    assert [smaller.decode(ids) for ids in after] == [*seen, *others]
    assert needed_tokens(describe(smaller), {token for ids in after[: len(seen)] for token in ids}) == [*new.values()]


def bpe(tokens: list[str], merges: list[str], added: tuple[str, ...] = ("<eos>",)) -> Any:
    """A tokenizer of the bytes, these tokens and, beyond the vocabulary, some special ones."""
    names = [*BYTES.values(), *tokens]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {name: place for place, name in enumerate(names)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merge.split() for merge in merges]}
    text = json.dumps({"version": "1.0", "pre_tokenizer": byte_level, "decoder": byte_level, "model": model})
    backend = Tokenizer.from_str(text)
    backend.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_what_stays_is_what_the_merges_of_a_token_need() -> None:
    tokenizer = bpe(["ab", "bc", "abc", "cd", "de", "abcde"], ["a b", "b c", "ab c", "a bc", "c d", "d e", "abc de"])
    seen = encode_pieces(tokenizer, ["abc"])[0]
    kept = needed_tokens(describe(tokenizer), seen)
    names = tokenizer.convert_ids_to_tokens(kept)
    assert names == [*BYTES.values(), "ab", "bc", "abc", "<eos>"]  # bc makes abc too, by another merge
    smaller = cut_tokenizer(tokenizer, kept)
    assert [smaller.convert_ids_to_tokens(ids) for ids in encode_pieces(smaller, ["abcde", "cde"])] == [
        ["abc", "d", "e"],
        ["c", "d", "e"],
    ]


def test_a_cut_tokenizer_begins_texts_and_names_special_tokens_as_before(tmp_path: Path) -> None:
    tokenizer = bpe(["zz", "ab"], ["z z", "a b"], ("<eos>", "<bos>", "<tool>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))]
    )
    tokenizer.bos_token, tokenizer.chat_template, tokenizer.model_max_length = "<bos>", "{{ messages }}", 77
    kept = needed_tokens(describe(tokenizer), encode_pieces(tokenizer, ["ab"])[0])
    cut_tokenizer(tokenizer, kept).save_pretrained(tmp_path)
    smaller = load_tokenizer(str(tmp_path))
    assert len(smaller) == len(kept) == 256 + 1 + 3
    assert beginning_of(smaller) == [kept.index(token) for token in beginning_of(tokenizer)] == [258]
    assert smaller.convert_ids_to_tokens(smaller("ab<tool>")["input_ids"]) == ["<bos>", "ab", "<tool>"]
    check_cut(tokenizer, smaller, kept, ["ab", "bab"])
    with pytest.raises(ConfigError, match="reads the data otherwise"):
        check_cut(tokenizer, cut_tokenizer(tokenizer, [*kept[1:], kept[0]]), kept, ["ab"])
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "model_max_length"):
        assert getattr(smaller, name) == getattr(tokenizer, name)


def test_a_padding_token_is_numbered_anew() -> None:
    tokenizer = bpe(["ab"], ["a b"])
    tokenizer.backend_tokenizer.enable_padding(pad_id=257, pad_token="<eos>")
    description = describe(tokenizer)
    assert cut(description, needed_tokens(description, []))["padding"]["pad_id"] == 256


def test_each_byte_has_the_character_that_tokenizers_give_it() -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(BYTES.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x10000, 64), 0x1F600]))
    [(spelt, _)] = split.pre_tokenize_str(text)
    assert spelt == "".join(BYTES[byte] for byte in text.encode())
    printable = {byte for character in text if character.isprintable() for byte in character.encode()}
    assert printable <= set(NEEDED)


def changed(change: Callable[[dict[str, Any]], Any]) -> Any:
    description = json.loads(bpe(["ab"], ["a b"]).backend_tokenizer.to_str())
    change(description)
    return SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(description)))


REFUSED: dict[str, Any] = {
    "has no tokenizer.json": SimpleNamespace(),
    "its model is Unigram": changed(lambda it: it["model"].update(type="Unigram")),
    "does not split texts into bytes": changed(lambda it: it.update(pre_tokenizer=None)),
    "byte_fallback=True": changed(lambda it: it["model"].update(byte_fallback=True)),
    "end_of_word_suffix='</w>'": changed(lambda it: it["model"].update(end_of_word_suffix="</w>")),
    "post-processor is BertProcessing": changed(lambda it: it.update(post_processor={"type": "BertProcessing"})),
    "no token for 2 bytes of printable text, as 0x41, 0xE8": changed(
        lambda it: [it["model"]["vocab"].pop(BYTES[byte]) for byte in (0x41, 0xE8, 0x00, 0xFF)]
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_tokenizer_that_cannot_be_cut_is_refused(why: str) -> None:
    with pytest.raises(ConfigError, match="cannot be cut") as refused:
        describe(REFUSED[why])
    assert why in str(refused.value)
