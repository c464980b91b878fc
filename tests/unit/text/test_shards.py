from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cprec.data.ragged import Ragged
from cprec.errors import ShardError
from cprec.text.shards import DOCUMENTS, MANIFEST, TOKENS, Shards, join_shards, open_shards, read_piece, write_shards

ROWS = [[5, 6, 7], [8, 9], [10]]
COLUMNS: dict[str, Any] = {
    "domain": ["books", "", "games"],
    "kind": ["specific", "mixed", "specific"],
    "num_events": [2, 3, 1],
    "target_start": [1, 1, 0],
}


ABOUT: dict[str, Any] = {"vocabulary_size": 300, "about": {"history": "specific"}}


def write(folder: Path) -> Shards:
    write_shards(folder, Ragged.of(ROWS), COLUMNS, ABOUT)
    return open_shards(folder)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    shards = write(tmp_path / "train")
    assert [shards.rows[row].tolist() for row in range(len(shards))] == ROWS
    assert {name: shards.column(name).tolist() for name in COLUMNS} == COLUMNS
    assert shards.column("offset").tolist() == [0, 3, 5]
    assert shards.column("length").tolist() == [3, 2, 1]
    assert (shards.manifest["num_documents"], shards.manifest["num_tokens"]) == (3, 6)
    assert shards.manifest["about"] == {"history": "specific"}
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == sorted((DOCUMENTS, MANIFEST, TOKENS))


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_tokens_take_two_bytes_where_they_can(tmp_path: Path, vocabulary_size: int, dtype: str) -> None:
    largest = vocabulary_size - 1
    rows = Ragged.of([[largest, 0], [largest]])
    columns = {"kind": ["specific", "specific"], "domain": ["toys", "toys"]}
    write_shards(tmp_path / "train", rows, columns, {"vocabulary_size": vocabulary_size})
    shards = open_shards(tmp_path / "train")
    assert shards.tokens.dtype == dtype
    assert shards.rows[0].tolist() == [largest, 0]


def test_shards_without_documents(tmp_path: Path) -> None:
    columns = {name: np.array([], dtype=np.array(values).dtype) for name, values in COLUMNS.items()}
    write_shards(tmp_path / "heldout", Ragged.of([]), columns, {"vocabulary_size": 300})
    shards = open_shards(tmp_path / "heldout")
    assert len(shards) == len(shards.rows) == 0


def test_writing_again_replaces_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "train")
    (tmp_path / "train" / "tokens.bin.old").write_text("left over")
    write_shards(tmp_path / "train", Ragged.of([[4]]), {"kind": ["mixed"], "domain": [""]}, {"vocabulary_size": 300})
    assert open_shards(tmp_path / "train").rows[0].tolist() == [4]
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == sorted((DOCUMENTS, MANIFEST, TOKENS))


def test_identity_changes_with_the_contents_only(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    write_shards(tmp_path / "c", Ragged.of([*ROWS[:2], [11]]), COLUMNS, ABOUT)
    write_shards(tmp_path / "d", Ragged.of(ROWS), COLUMNS, {**ABOUT, "about": {"history": "mixed"}})
    tokens, about = open_shards(tmp_path / "c"), open_shards(tmp_path / "d")
    assert first.sha256 == again.sha256
    assert len({first.sha256, tokens.sha256, about.sha256}) == 3


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS, MANIFEST])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train")
    (tmp_path / "train" / name).unlink()
    with pytest.raises(ShardError, match=rf"train/{name} is missing: run `cprec prepare` again"):
        open_shards(tmp_path / "train")


def test_one_changed_token_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "train")
    path = tmp_path / "train" / TOKENS
    data = bytearray(path.read_bytes())
    data[4] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"train/tokens.bin is not the file that manifest.json describes"):
        open_shards(tmp_path / "train")


def test_a_changed_index_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "train")
    path = tmp_path / "train" / DOCUMENTS
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("num_events"), "num_events", [[2, 3, 9]]), path)
    with pytest.raises(ShardError, match=r"train/documents.parquet is not the file that manifest.json describes"):
        open_shards(tmp_path / "train")


def test_cut_tokens_are_noticed_without_hashing(tmp_path: Path) -> None:
    write(tmp_path / "train")
    path = tmp_path / "train" / TOKENS
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ShardError, match=r"train/tokens.bin has 10 bytes but its manifest says 6 tokens of uint16"):
        open_shards(tmp_path / "train", verify=False)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        manifest = json.loads(text)
        change(manifest)
        return json.dumps(manifest)

    return edited


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        edit(lambda manifest: manifest.pop("sha256")),
        edit(lambda manifest: manifest.update(sha256=[])),
        edit(lambda manifest: manifest.update(dtype="int16")),
        edit(lambda manifest: manifest.update(num_documents=2)),
    ],
    ids=["cut", "no object", "no hashes", "hashes of another kind", "dtype", "num_documents"],
)
def test_a_changed_manifest_is_noticed(tmp_path: Path, change: Callable[[str], str]) -> None:
    write(tmp_path / "train")
    path = tmp_path / "train" / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(ShardError, match=r"train/manifest.json"):
        open_shards(tmp_path / "train")


# ---- pieces ----------------------------------------------------------------------------------------------------------

# Domains in order, then mixed documents: what one part of the log gives.
PARTS: list[list[tuple[str, list[int]]]] = [
    [("books", [1, 2]), ("books", [3]), ("games", [4, 5, 6]), ("", [7])],
    [],
    [("games", [8]), ("toys", [9, 10]), ("", [11, 12])],
]


def write_part(folder: Path, documents: list[tuple[str, list[int]]], part: int, vocabulary_size: int = 300) -> Shards:
    columns = {
        "domain": np.array([domain for domain, _ in documents], dtype=object),
        "kind": np.array(["specific" if domain else "mixed" for domain, _ in documents], dtype=object),
        "num_events": np.array([len(tokens) for _, tokens in documents], dtype=np.int32),
    }
    rows = Ragged.of([tokens for _, tokens in documents])
    write_shards(folder, rows, columns, {"vocabulary_size": vocabulary_size}, part=part)
    return open_shards(folder)


def piece(domain: str, part: int, num_documents: int, num_tokens: int) -> dict[str, Any]:
    kind = "specific" if domain else "mixed"
    return {"domain": domain, "kind": kind, "part": part, "num_documents": num_documents, "num_tokens": num_tokens}


def test_documents_of_one_domain_and_kind_are_a_piece(tmp_path: Path) -> None:
    shards = write_part(tmp_path / "train", PARTS[0], part=5)
    assert shards.manifest["pieces"] == [piece("books", 5, 2, 3), piece("games", 5, 1, 3), piece("", 5, 1, 1)]
    file = pq.ParquetFile(tmp_path / "train" / DOCUMENTS)
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [2, 1, 1]
    assert write_part(tmp_path / "empty", [], part=5).manifest["pieces"] == []


def test_a_piece_is_read_alone(tmp_path: Path) -> None:
    shards = write_part(tmp_path / "train", PARTS[0], part=0)
    pieces = [read_piece(tmp_path / "train", shards.manifest, place) for place in range(3)]
    assert [[tokens.tolist() for tokens in map(p.rows.__getitem__, range(len(p)))] for p in pieces] == [
        [[1, 2], [3]],
        [[4, 5, 6]],
        [[7]],
    ]
    assert [p.column("offset").tolist() for p in pieces] == [[0, 2], [0], [0]], "counted from the piece's own start"
    together = Shards.concatenate(pieces[1:], shards.manifest)
    assert [together.rows[row].tolist() for row in range(2)] == [[4, 5, 6], [7]]
    assert together.column("domain").tolist() == ["games", ""]
    nothing = Shards.concatenate([], shards.manifest)
    assert len(nothing) == len(nothing.rows) == 0
    assert set(nothing.documents.column_names) >= set(shards.documents.column_names)


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(300, "uint16"), (70_000, "uint32")])
def test_joined_shards_are_those_written_at_once(tmp_path: Path, vocabulary_size: int, dtype: str) -> None:
    largest = vocabulary_size - 1
    parts = [*PARTS, [("books", [largest, 0]), ("", [largest])]]
    for number, documents in enumerate(parts):
        write_part(tmp_path / f"part{number}", documents, number, vocabulary_size)
    sources = [tmp_path / f"part{number}" for number in range(len(parts))]
    join_shards(tmp_path / "joined", sources, {"vocabulary_size": vocabulary_size, "about": 1})
    joined = open_shards(tmp_path / "joined")
    assert joined.manifest["pieces"] == [
        piece("books", 0, 2, 3), piece("books", 3, 1, 2), piece("games", 0, 1, 3), piece("games", 2, 1, 1),
        piece("toys", 2, 1, 2), piece("", 0, 1, 1), piece("", 2, 1, 2), piece("", 3, 1, 1),
    ]  # fmt: skip
    assert joined.manifest["about"] == 1

    order = ["books", "games", "toys", ""]
    everything = sorted((d for documents in parts for d in documents), key=lambda document: order.index(document[0]))
    at_once = write_part(tmp_path / "at_once", everything, 0, vocabulary_size)
    assert (tmp_path / "joined" / TOKENS).read_bytes() == (tmp_path / "at_once" / TOKENS).read_bytes()
    assert joined.documents.equals(at_once.documents)
    assert joined.tokens.dtype == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at_once", "joined", "part0", "part1", "part2", "part3"]


def test_joined_shards_without_documents(tmp_path: Path) -> None:
    for number in range(2):
        write_part(tmp_path / f"part{number}", [], number)
    join_shards(tmp_path / "joined", [tmp_path / "part0", tmp_path / "part1"], {"vocabulary_size": 300})
    joined = open_shards(tmp_path / "joined")
    assert len(joined) == 0 and joined.manifest["pieces"] == []
