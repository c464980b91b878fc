"""Files of histories: whatever stops it, each user is there once in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.errors import ConfigError, DataError
from cprec.serve import recommend as stage
from cprec.serve.recommend import RecommendConfig, recommend

USERS = [f"user, {number}" for number in range(23)]


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


class Echo:
    """Recommends the last event again, k times."""

    def __init__(self, killed_at: int = 1 << 30) -> None:
        self.asked: list[str] = []
        self._killed_at = killed_at

    def recommend(self, history: Sequence[str], k: int = 10, **_: Any) -> list[Any]:
        return self.recommend_many([history], k)[0]

    def recommend_many(self, histories: Sequence[Sequence[str]], k: int = 10, **_: Any) -> list[list[Any]]:
        self.asked += [history[-1] for history in histories]
        if len(self.asked) > self._killed_at:
            raise Killed
        if any(history[-1] == "unknown" for history in histories):
            raise ValueError("no such item")
        return [
            [SimpleNamespace(item_id=f"{h[-1]}-{rank}", title=f"Ti\ntle {h[-1]}", score=-rank / 3) for rank in range(k)]
            for h in histories
        ]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "USERS_AT_ONCE", 4)


@pytest.fixture(params=[".csv", ".jsonl", ".parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"histories{request.param}"
    rows = [{"user_id": user, "history": ["a", f"item {number}"]} for number, user in enumerate(USERS)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [f'"{row["user_id"]}",{"|".join(row["history"])}' for row in rows]
        path.write_text("\n".join(["user_id,history", *lines]) + "\n")
    return path


def users_of(path: Path) -> list[tuple[str, int, str]]:
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        import csv

        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    assert rows and list(rows[0]) == ["user_id", "rank", "item_id", "title", "score"]
    return [(row["user_id"], int(row["rank"]), row["item_id"]) for row in rows]


EXPECTED = [(user, rank, f"item {n}-{rank - 1}") for n, user in enumerate(USERS) for rank in (1, 2)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("killed_at", [0, 3, 9, 21])
def test_a_run_killed_goes_on_where_it_was(source: Path, suffix: str, killed_at: int, tmp_path: Path) -> None:
    output = tmp_path / f"recs{suffix}"
    config = RecommendConfig(model="m", input=str(source), output=str(output), k=2)
    with pytest.raises(Killed):
        recommend(config, Echo(killed_at))
    assert not output.exists()
    again = Echo()
    recommend(config, again)
    assert users_of(output) == EXPECTED
    assert len(again.asked) == len(USERS) - killed_at // 4 * 4  # what was whole is not asked again
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, output.name])


def test_parts_of_another_command_are_not_mixed_in(source: Path, tmp_path: Path) -> None:
    config = RecommendConfig(model="m", input=str(source), output=str(tmp_path / "recs.csv"), k=2)
    with pytest.raises(Killed):
        recommend(config, Echo(5))
    other = RecommendConfig(model="m", input=str(source), output=str(tmp_path / "recs.csv"), k=3)
    with pytest.raises(ConfigError, match=r"recs.csv.parts holds parts of another run \(k differ\): remove it"):
        recommend(other, Echo())
    with open(source, "ab") as file:
        file.write(b"\n")
    with pytest.raises(ConfigError, match="input_sha256 differ"):
        recommend(config, Echo())


def test_a_history_that_cannot_be_answered_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    rows = [{"user_id": f"u{number}", "history": ["a"]} for number in range(6)] + [
        {"user_id": "w", "history": ["unknown"]}
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RecommendConfig(model="m", input=str(path), output=str(tmp_path / "out.csv"), k=1)
    with pytest.raises(DataError, match=r"in.jsonl, user 'w': no such item"):
        recommend(config, Echo())
    missing = RecommendConfig(model="m", input=str(tmp_path / "no.csv"), output=str(tmp_path / "out.csv"))
    with pytest.raises(DataError, match="no.csv does not exist"):
        recommend(missing, Echo())


def test_no_more_than_a_part_is_in_memory(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    sizes = []
    monkeypatch.setattr(
        stage, "_write", lambda path, rows, write=stage._write: (sizes.append(len(rows)), write(path, rows))
    )
    recommend(RecommendConfig(model="m", input=str(source), output=str(tmp_path / "o.csv"), k=2), Echo())
    assert sizes == [8] * 5 + [6]


def test_a_file_without_rows_gives_one_without_rows(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    for suffix in (".csv", ".jsonl", ".parquet"):
        output = tmp_path / f"out{suffix}"
        recommend(RecommendConfig(model="m", input=str(tmp_path / "in.jsonl"), output=str(output)), Echo())
        assert output.exists()
