"""The forgetting meter: perplexity on general text that never changes, against that of the model a run began with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError, DataError
from cprec.text.corpus import Corpus
from cprec.text.general_text import ACCEPTED, documents_of, read_texts
from cprec.text.shards import Shards
from cprec.text.stream import TokenStream, one_phase
from cprec.text.tokenizer import encode_pieces

GENERAL_TEXT = "general text"
"""The name of this text among the held-out perplexities."""


def general_text_batches(
    tokenizer: Any,
    row_tokens: int,
    path: str = "",
    *,
    begin: Sequence[int] = (),
    rows_per_batch: int = 8,
    max_tokens: int = 50_000,
) -> TokenStream:
    """Packed rows of a fixed general text, the same for the same arguments.

    The text is our own, some 600 words on everyday things, or the first `max_tokens` tokens of the file `path`:
    JSON lines or Parquet with a column `text`, or plain .txt. Each text ends with end-of-sequence; longer ones than a
    row are cut into documents of nearly equal length that begin with the tokens `begin`. Perplexities can be compared
    between models with one tokenizer only.

    Raises ConfigError if there is no such file or it is of another kind, DataError if it has no text to predict.
    """
    documents: list[np.ndarray] = []
    num_tokens = 0
    for text in own_texts() if not path else _texts_of(Path(path)):
        ids = [*encode_pieces(tokenizer, [text])[0], tokenizer.eos_token_id][: max_tokens - num_tokens]
        documents += documents_of(ids, row_tokens, begin)
        num_tokens += len(ids)
        if num_tokens >= max_tokens:
            break
    if all(len(document) < 2 for document in documents):
        raise DataError(f"{path} has no text: give one with a few hundred words, or leave it out for our own")
    return TokenStream(
        Corpus.of(_in_memory(documents)),
        one_phase(sum(map(len, documents))),
        rows_per_step=rows_per_batch,
        row_tokens=row_tokens,
        seed=0,
    )


def own_texts() -> list[str]:
    """Our own general text, some 600 words on everyday things."""
    return files("cprec.train").joinpath("general.txt").read_text(encoding="utf-8").strip().split("\n\n")


def _texts_of(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give {ACCEPTED}")
    return read_texts(path)


def _in_memory(documents: list[np.ndarray]) -> Shards:
    rows = Ragged(np.concatenate(documents), offsets_of(np.array([len(document) for document in documents])))
    index = {"offset": rows.offsets[:-1], "length": rows.lengths}
    return Shards(rows.values, pa.table({name: pa.array(values, pa.int64()) for name, values in index.items()}), {})
