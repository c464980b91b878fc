from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cprec.errors import ConfigError
from cprec.text.tokenizer import EOS, PAD, load_tokenizer, train_tokenizer


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
