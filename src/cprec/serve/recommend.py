"""Stage: histories in (command line or file), titles with scores out."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from cprec.errors import ConfigError, CPRecError, DataError

USER, HISTORY = "user_id", "history"
SEPARATOR = "|"


class Recommends(Protocol):
    """What this stage needs of a recommender."""

    def recommend(
        self, history: Sequence[Any], k: int = 10, *, domain: str | None = None, exclude_seen: bool = True
    ) -> Sequence[Any]: ...


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
    histories = list(_read(Path(config.input)))
    rows: list[dict[str, Any]] = []
    with track(len(histories), "recommending", unit="users") as progress:
        for user, history in histories:
            try:
                found = recommender.recommend(history, config.k, domain=config.domain, exclude_seen=config.exclude_seen)
            except (CPRecError, ValueError) as error:
                raise DataError(f"{config.input}, user {user!r}: {error}") from error
            rows += [
                {USER: user, "rank": rank, "item_id": item.item_id, "title": item.title, "score": item.score}
                for rank, item in enumerate(found, 1)
            ]
            progress.advance()
    _write(Path(config.output), rows)
    say(f"{config.output}: {len(rows):,} recommendations for {len(histories):,} users")


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
    if not path.is_file():
        raise DataError(f"{path} does not exist")
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

        yield from pq.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    else:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
    names = (USER, "rank", "item_id", "title", "score")
    temporary = path.with_name(path.name + ".incomplete")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: [row[name] for row in rows] for name in names}), temporary)
    else:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)
