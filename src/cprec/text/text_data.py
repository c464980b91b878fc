"""A data folder of text, to train a base model on: general text and product text, without users and items.

DATA/dataset.json                   the files that were read
DATA/tokenizer/                     the base model's, or a tiny one trained on these texts
DATA/shards/{train,heldout}/        the texts of each file, as documents of a kind of their own
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from cprec.data.dataset import write_manifest
from cprec.data.sources.files import matching_files
from cprec.errors import ConfigError, DataError
from cprec.progress import say
from cprec.provenance import file_sha256, save_resolved
from cprec.schema import SCHEMA_VERSION
from cprec.text.config import TINY, PrepareConfig
from cprec.text.general_text import ACCEPTED, read_texts, tokenised, write_texts
from cprec.text.inputs import TEXT_TABLE, InputRecord
from cprec.text.tokenizer import beginning_of, load_tokenizer, train_tokenizer


def write_text_data(config: PrepareConfig, folder: Path) -> None:
    """Write the data folder of `config.text` into `folder`, in place of what is there.

    Of each file the share `heldout_share` of its texts, chosen by hash, is only used to measure perplexity. Raises
    ConfigError for a file that is not there, of another kind, or of the name of another; DataError for one without
    text.
    """
    files = _files_by_name(config)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record = InputRecord(config, folder)
    if config.tokenizer == TINY:
        texts = chain.from_iterable(_texts(config, path, "train") for path in files.values())
        tokenizer = train_tokenizer(texts, config.vocabulary_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    begin = beginning_of(tokenizer, config.add_bos_token)
    about = {"text": sorted(files), **({"begin": begin} if begin else {})}
    for part in ("train", "heldout"):
        documents = {
            name: tokenised(_texts(config, path, part), tokenizer, config.max_document_tokens, begin)
            for name, path in files.items()
        }
        for name, found in documents.items():
            say(f"shards/{part}: {name}: {len(found):,} documents, {sum(map(len, found)):,} tokens")
            if part == "train" and not found:
                raise DataError(f"{files[name]} has no text to train on")
        write_texts(folder / "shards" / part, documents, {"vocabulary_size": len(tokenizer), "about": about})
    record.check_unchanged()
    sources = [
        {"domain": "", "table": TEXT_TABLE, "path": str(path), "sha256": file_sha256(path)} for path in files.values()
    ]
    write_manifest(folder, {"schema_version": SCHEMA_VERSION, "domains": {}, "sources": sources})
    save_resolved(folder, config, record.hashes(config.tokenizer))


def _files_by_name(config: PrepareConfig) -> dict[str, Path]:
    """The files of text by their names up to the first dot."""
    files: dict[str, Path] = {}
    for pattern in config.text:
        found = [path for path in matching_files(pattern) if path.is_file()]
        if not found:
            raise ConfigError(f"text={pattern}: no such file; give {ACCEPTED} files")
        for path in found:
            name = path.name.partition(".")[0]
            if name in files:
                raise ConfigError(f"text={path}: there is another file {name}, {files[name]}: rename one of the two")
            files[name] = path
    return files


def _texts(config: PrepareConfig, path: Path, part: str) -> Iterator[str]:
    """The texts of a file that are of a part."""
    return (text for text in read_texts(path) if _is_held_out(text, config) == (part == "heldout"))


def _is_held_out(text: str, config: PrepareConfig) -> bool:
    digest = hashlib.sha256(f"{config.seed}/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < config.heldout_share
