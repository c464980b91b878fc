from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.batch import IGNORE
from cprec.errors import ConfigError, DataError
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.train.forgetting import general_text_batches
from cprec.train.loop import perplexity
from cprec.train.loss import PackedLoss


def read_back(tokenizer: Any, stream: TokenStream) -> list[str]:
    """The documents of a stream as text, in order of the rows."""
    found: list[str] = []
    for batch in stream:
        for ids, positions in zip(batch.rows["input_ids"], batch.rows["position_ids"], strict=True):
            pieces = np.split(ids, np.flatnonzero(positions == 0)[1:])
            found += [tokenizer.decode(piece) for piece in pieces if piece[0] != stream.pad_id or len(set(piece)) > 1]
    return found


def test_our_own_text_is_read_whole_and_the_same_each_time(tokenizer: Any) -> None:
    text = files("cprec.train").joinpath("general.txt").read_text(encoding="utf-8")
    assert 550 < len(text.split()) < 750
    first, second = (general_text_batches(tokenizer, 2048) for _ in range(2))
    documents = read_back(tokenizer, first)
    assert sorted(documents) == sorted(paragraph + "<eos>" for paragraph in text.strip().split("\n\n"))
    assert [batch.rows["input_ids"].tolist() for batch in first] == [
        batch.rows["input_ids"].tolist() for batch in second
    ]


def test_long_texts_are_cut_to_rows_and_nothing_is_lost(tokenizer: Any) -> None:
    whole, cut = general_text_batches(tokenizer, 2048), general_text_batches(tokenizer, 64)
    assert cut.num_tokens == whole.num_tokens and cut.row_tokens == 64
    assert len("".join(read_back(tokenizer, cut))) == len("".join(read_back(tokenizer, whole)))
    targets = sum(batch.counts[NEXT_TOKEN] for batch in cut)
    assert targets == cut.num_tokens - len(cut.corpus), "all tokens but the first of each piece are predicted"


def test_perplexity_of_a_model_that_knows_nothing_is_about_its_vocabulary(
    make_model: Callable[..., Any], tokenizer: Any
) -> None:
    batches = general_text_batches(tokenizer, 96)
    found = perplexity(PackedLoss(make_model()), batches)
    assert found == pytest.approx(len(tokenizer), rel=0.2)
    assert found == perplexity(PackedLoss(make_model()), batches), "batches can be read again"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_text_of_ones_own(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    path, texts = tmp_path / f"own.{kind}", ["red book", "blue <eos> game"]
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text("\n".join(texts))
    stream = general_text_batches(tokenizer, 64, str(path))
    expected = [text + "<eos>" for text in (["\n".join(texts)] if kind == "txt" else texts)]
    assert sorted(read_back(tokenizer, stream)) == sorted(expected)
    (batch,) = stream
    assert tokenizer.eos_token_id not in batch.rows["input_ids"][batch.rows["position_ids"] == 0]
    ends = int((batch.rows["targets"] == tokenizer.eos_token_id).sum())
    assert ends == len(expected), "an end that a text spells out is no end"


def test_of_a_large_file_only_the_beginning_is_read(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text('{"text": "red book 1"}\n' * 400 + "not JSON: never reached\n")
    stream = general_text_batches(tokenizer, 64, str(path), max_tokens=100, rows_per_batch=1)
    assert stream.num_tokens == 100
    assert all(batch.rows["input_ids"].shape == (1, 64) for batch in stream)
    assert all((batch.rows["targets"] != IGNORE).any() for batch in stream)


def test_what_cannot_be_read_is_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.txt: no such file; give .jsonl"):
        general_text_batches(tokenizer, 64, str(tmp_path / "missing.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"empty.txt has no text"):
        general_text_batches(tokenizer, 64, str(empty))


def test_each_document_of_the_text_begins_as_those_it_stands_beside(tokenizer: Any) -> None:
    plain, begun = general_text_batches(tokenizer, 64), general_text_batches(tokenizer, 64, begin=[3])
    documents = [begun.corpus.take(np.array([row])).tokens.values.tolist() for row in range(len(begun.corpus))]
    assert all(document[0] == 3 and len(document) <= 64 for document in documents)
    assert sum(len(document) - 1 for document in documents) == plain.num_tokens
