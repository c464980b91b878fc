"""Stage: histories in (command line or file), titles with scores out.

A file is read, ranked and written in parts of `USERS_AT_ONCE` users, so memory does not grow with it. Each part is
written aside and moved into `OUTPUT.parts` once it is whole; the same command after a kill goes on behind the parts
that are there, and at the end they become the output, in the order of the input.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from cprec.errors import ConfigError, CPRecError, DataError

T = TypeVar("T")

USER, HISTORY = "user_id", "history"
SEPARATOR = "|"
COLUMNS = (USER, "rank", "item_id", "title", "score")
USERS_AT_ONCE = 512
"""Users of a part: what a kill may cost."""


class Recommends(Protocol):
    """What this stage needs of a recommender."""

    def recommend(
        self, history: Sequence[Any], k: int = 10, *, domain: str | None = None, exclude_seen: bool = True
    ) -> Sequence[Any]: ...

    def recommend_many(
        self, histories: Sequence[Any], k: int = 10, *, domain: str | None = None, exclude_seen: bool = True
    ) -> Sequence[Sequence[Any]]: ...


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Settings of recommendation."""

    model: str
    """Model folder that `cprec pretrain` or `cprec finetune` wrote."""
    history: tuple[str, ...] = ()
    """One history, oldest event first: item ids or titles."""
    domain: str | None = None
    """Domain to recommend from; by default the one the model was fine-tuned for."""
    k: int = 10
    """Items to recommend."""
    input: str | None = None
    """File of histories: CSV (columns user_id and history, events separated by |), JSONL or Parquet (a list)."""
    output: str | None = None
    """File to write for `input`, CSV, JSONL or Parquet by its name: user_id, rank, item_id, title, score."""
    exclude_seen: bool = True
    """Leave out the items of the history."""

    def __post_init__(self) -> None:
        if bool(self.history) == bool(self.input):
            raise ConfigError("give either --history with ids or titles, oldest first, or --input FILE with many")
        if self.input and not self.output:
            raise ConfigError("--input needs --output FILE (.csv, .jsonl or .parquet)")
        if self.k < 1:
            raise ConfigError(f"k={self.k} must be at least 1")
        for name in ("input", "output"):
            path = getattr(self, name)
            if path and Path(path).suffix not in (".csv", ".jsonl", ".parquet"):
                raise ConfigError(f"{name}={path!r}: only .csv, .jsonl and .parquet files are known")


def recommend(config: RecommendConfig, recommender: Recommends) -> None:
    """Print recommendations for one history, or write those for a file of histories."""
    if config.history:
        _show(config, recommender, sys.stdout)
        return
    from cprec.progress import say, track

    assert config.input and config.output
    source, output = Path(config.input), Path(config.output)
    parts = _parts_folder(config, source, output)
    written = 0
    with track(_count(source), "recommending", unit="users") as progress:
        for number, users in enumerate(_chunks(_read(source), USERS_AT_ONCE)):
            part = parts / f"{number:09d}{output.suffix}"
            if not part.exists():
                _write(part, _recommended(config, recommender, users))
            written += len(users)
            progress.advance(len(users))
    _join(sorted(parts.glob(f"?????????{output.suffix}")), output)
    shutil.rmtree(parts)
    say(f"{output}: {config.k} recommendations for each of {written:,} users")


def _parts_folder(config: RecommendConfig, source: Path, output: Path) -> Path:
    """The folder of finished parts. Raises ConfigError where they are those of another command or another input."""
    if not source.is_file():
        raise DataError(f"{source} does not exist")
    folder = output.with_name(output.name + ".parts")
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    model = Path(config.model, "cprec.json")
    settings = {name: getattr(config, name) for name in ("model", "domain", "k", "exclude_seen")}
    about = {
        "input_sha256": digest,
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else None,
        "users_at_once": USERS_AT_ONCE,
        **settings,
    }
    path = folder / "about.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differs = sorted(name for name in about if about[name] != before.get(name))
        if differs:
            raise ConfigError(
                f"{folder} holds parts of another run ({', '.join(differs)} differ): remove it to begin anew, or "
                "repeat the command that was interrupted"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(json.dumps(about), encoding="utf-8")
    os.replace(temporary, path)
    return folder


def _recommended(
    config: RecommendConfig, recommender: Recommends, users: Sequence[tuple[str, list[str]]]
) -> list[dict[str, Any]]:
    """The rows of some users. Raises DataError naming the first user whose history cannot be answered."""
    options: dict[str, Any] = {"domain": config.domain, "exclude_seen": config.exclude_seen}
    try:
        lists = recommender.recommend_many([history for _, history in users], config.k, **options)
    except (CPRecError, ValueError):
        for user, history in users:
            try:
                recommender.recommend(history, config.k, **options)
            except (CPRecError, ValueError) as error:
                raise DataError(f"{config.input}, user {user!r}: {error}") from error
        raise
    return [
        {USER: user, "rank": rank, "item_id": item.item_id, "title": item.title, "score": item.score}
        for (user, _), found in zip(users, lists, strict=True)
        for rank, item in enumerate(found, 1)
    ]


def _chunks(rows: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _count(path: Path) -> int:
    """The rows of a file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.ParquetFile(path).metadata.num_rows)
    if path.suffix == ".csv":
        return sum(1 for _ in _rows(path))
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _show(config: RecommendConfig, recommender: Recommends, out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    try:
        found = recommender.recommend(config.history, config.k, domain=config.domain, exclude_seen=config.exclude_seen)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    table = Table(box=None)
    for name, justify in (("rank", "right"), ("title", "left"), ("item", "left"), ("log-probability", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for rank, item in enumerate(found, 1):
        table.add_row(str(rank), item.title, item.item_id, f"{item.score:.2f}")
    Console(file=out).print(table)


def _read(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(user, history) of each row. Raises DataError naming file and row."""
    for number, row in enumerate(_rows(path), 1):
        missing = [name for name in (USER, HISTORY) if row.get(name) is None]
        if missing:
            raise DataError(
                f"{path}, row {number}: no {' and no '.join(missing)}; it has {', '.join(map(str, row))}. Each row "
                f"needs {USER} and {HISTORY} (ids or titles, oldest first; in CSV separated by {SEPARATOR})"
            )
        history = row[HISTORY]
        events = history.split(SEPARATOR) if isinstance(history, str) else list(history)
        events = [str(event).strip() for event in events if str(event).strip()]
        if not events:
            raise DataError(f"{path}, row {number}: the history of user {row[USER]!r} is empty")
        yield str(row[USER]), events


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(USERS_AT_ONCE):
            yield from batch.to_pylist()
    elif path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    else:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise DataError(
                        f'{path}, line {number} is not an object like {{"{USER}": "u1", "{HISTORY}": ["title"]}}'
                    )
                yield row


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write aside and rename: the file appears complete or not at all."""
    temporary = path.with_name(path.name + ".incomplete")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {"rank": pa.int64(), "score": pa.float64()}
        schema = pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
    else:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                csv.DictWriter(file, COLUMNS).writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


def _join(parts: Sequence[Path], output: Path) -> None:
    """The parts as one file, one after the other."""
    temporary = output.with_name(output.name + ".incomplete")
    if output.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not parts:
            _write(output, [])
            return
        with pq.ParquetWriter(temporary, pq.ParquetFile(parts[0]).schema_arrow) as writer:
            for group in _chunks(iter(parts), 32):  # row groups of some size
                writer.write_table(pa.concat_tables([pq.read_table(part) for part in group]))
    else:
        with open(temporary, "wb") as file:
            if output.suffix == ".csv":
                file.write((",".join(COLUMNS) + "\r\n").encode())
            for part in parts:
                with open(part, "rb") as piece:
                    shutil.copyfileobj(piece, file)
    os.replace(temporary, output)
