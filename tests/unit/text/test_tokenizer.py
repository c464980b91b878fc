from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from cprec.errors import ConfigError
from cprec.text.tokenizer import EOS, PAD, beginning_of, encode_pieces, load_tokenizer, train_tokenizer


@pytest.mark.parametrize(
    "text", ["", "Dune", " Émile №5 😀", "a\n- b\r\n\tc   d ", "don't , stop .", "\x00\u200d\u0301"]
)
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_and_size(tokenizer: Any) -> None:
    assert 258 < len(tokenizer) <= 320
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    assert tokenizer.convert_tokens_to_ids([PAD, EOS]) == [0, 1]


def test_the_line_opening_is_one_token_once_seen() -> None:
    tokenizer = train_tokenizer(["\n- a"] * 5, 300)
    assert len(tokenizer("\n-", add_special_tokens=False)["input_ids"]) == 1


def test_the_same_texts_give_the_same_tokenizer() -> None:
    texts = ["the cat sat", "the mat", "a cat"]
    first, second = (train_tokenizer(texts, 270).get_vocab() for _ in range(2))
    assert first == second


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocabulary_size=257 is below 258 \(256 bytes and 2 special tokens\)"):
        train_tokenizer(["a"], 257)
    assert len(train_tokenizer(["a"], 258)) == 258


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = " Dune\n- [games] Ludo! 42"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (1, 0)


def that_adds(single: str, *special: str) -> Any:
    """A tokenizer that writes a text as a template says."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(["the cat x"], 270)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in (EOS, *special)}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=list(names.items()))
    return tokenizer


@pytest.mark.parametrize(
    ("single", "special", "expected"),
    [
        ("$A", (), []),
        ("<s> $A", ("<s>",), ["<s>"]),
        ("<s> $A <eos>", ("<s>",), ["<s>"]),
        ("$A <eos>", (), []),
        ("[gMASK] <sop> $A", ("[gMASK]", "<sop>"), ["[gMASK]", "<sop>"]),
    ],
)
def test_texts_begin_as_the_tokenizer_begins_them(single: str, special: tuple[str, ...], expected: list[str]) -> None:
    tokenizer = that_adds(single, *special)
    assert tokenizer.convert_ids_to_tokens(beginning_of(tokenizer)) == expected
    assert beginning_of(tokenizer, "false") == []


def test_a_beginning_may_be_asked_for_where_there_is_a_token(tokenizer: Any) -> None:
    with_token = that_adds("$A", "<s>")
    with_token.bos_token = "<s>"
    assert beginning_of(with_token) == []
    assert with_token.convert_ids_to_tokens(beginning_of(with_token, "true")) == ["<s>"]
    with pytest.raises(ConfigError, match="add_bos_token=true, but the tokenizer has no beginning-of-sequence token"):
        beginning_of(tokenizer, "true")


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<eos>", "</s>", "<s>", "</s></s>"])
def test_marks_that_a_text_spells_stay_text(open_tokenizer: Any, mark: str) -> None:
    text = f" Mug {mark} red{mark}"
    (ids,) = encode_pieces(open_tokenizer, [text])
    assert not set(ids) & set(open_tokenizer.all_special_ids)
    assert open_tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_texts_without_marks_are_left_as_the_tokenizer_writes_them(open_tokenizer: Any) -> None:
    texts = [" a red mug", "x < y", ""]
    assert encode_pieces(open_tokenizer, texts) == open_tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert encode_pieces(open_tokenizer, []) == []


def test_a_letter_that_is_a_special_token_is_refused() -> None:
    words = Tokenizer(WordLevel({"end": 0, "a": 1}, unk_token="end"))
    words.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", unk_token="end")
    assert encode_pieces(tokenizer, ["aa"]) == [[1, 1]]
    with pytest.raises(ConfigError, match="writes 'b' in 'ab' as a special token, so no title may hold it"):
        encode_pieces(tokenizer, ["ab"])
