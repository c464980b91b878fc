"""The file of item changes: what was promised survives, and damage is never read as something else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError
from cprec.serve.items import FILE, ItemStore, StoredItem, with_items, withdrawn_of

NEW = StoredItem(domain="books", item_id="b15", title="Niels Lyhne", brand="Reclam")
GONE = StoredItem(domain="games", item_id="g0", title="Go", withdrawn=True)


def stored(folder: Path) -> dict[tuple[str, str], StoredItem]:
    store = ItemStore(folder)
    store.close()
    return store.items


def test_changes_are_there_again(tmp_path: Path) -> None:
    store = ItemStore(tmp_path / "deep" / "state")
    store.append([NEW, GONE])
    store.append([replace(NEW, title="Niels")])
    store.close()
    expected = {("books", "b15"): replace(NEW, title="Niels"), ("games", "g0"): GONE}
    assert store.items == expected == stored(tmp_path / "deep" / "state")
    assert withdrawn_of(expected.values()) == {"games": {"g0"}}


def test_a_store_without_a_folder_takes_nothing() -> None:
    store = ItemStore(None)
    assert not store.is_open and store.items == {}
    with pytest.raises(ConfigError, match="start with state=FOLDER"):
        store.append([NEW])


def test_a_line_that_was_cut_off_never_counted(tmp_path: Path) -> None:
    store = ItemStore(tmp_path)
    store.append([NEW])
    store.append([GONE])
    store.close()
    path = tmp_path / FILE
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        assert stored(tmp_path) == {("books", "b15"): NEW}
        assert path.read_bytes() == whole[:first]
    again = ItemStore(tmp_path)
    again.append([GONE])
    again.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["flip", "drop", "swap", "edit"])
def test_damage_is_refused_and_left_as_it_is(damage: str, tmp_path: Path) -> None:
    store = ItemStore(tmp_path)
    store.append([NEW, GONE, replace(NEW, title="Niels")])
    store.close()
    path = tmp_path / FILE
    first, second, third = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "flip": first[:30] + bytes([first[30] ^ 1]) + first[31:] + second + third,
        "drop": first + third,
        "swap": first + third + second,
        "edit": first + second.replace(b"Go", b"No") + third,
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{FILE}, line [12]: the checksum is .*Restore it from a copy"):
        ItemStore(tmp_path)
    assert path.read_bytes() == damaged
    with pytest.raises(DataError):  # and not: another process has it
        ItemStore(tmp_path)


def test_one_process_has_the_folder(tmp_path: Path) -> None:
    first = ItemStore(tmp_path)
    with pytest.raises(ConfigError, match="belongs to another process"):
        ItemStore(tmp_path)
    first.close()
    ItemStore(tmp_path).close()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ItemStore(tmp_path)
    store.append([NEW])
    before = (tmp_path / FILE).read_bytes()
    write = os.write

    def half(file: int, data: bytes) -> int:
        write(file, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        store.append([GONE])
    monkeypatch.undo()
    assert (tmp_path / FILE).read_bytes() == before and ("games", "g0") not in store.items
    store.append([GONE])
    store.close()
    assert stored(tmp_path) == {("books", "b15"): NEW, ("games", "g0"): GONE}


def test_a_file_of_superseded_lines_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.serve.items.SPARE", 3)
    store = ItemStore(tmp_path)
    store.append([GONE, *(replace(NEW, title=f"Niels {number}") for number in range(6))])
    store.close()
    path = tmp_path / FILE
    before = path.read_bytes()
    assert stored(tmp_path).keys() == store.items.keys() and path.read_bytes() == before, "7 lines are few enough"
    store = ItemStore(tmp_path)
    store.append([replace(NEW, title="Niels")])
    store.close()
    path.chmod(0o640)
    (tmp_path / f"{FILE}.incomplete").write_text("of a process that was killed")
    again = ItemStore(tmp_path)
    assert len(path.read_bytes().splitlines()) == 2 and again.items == store.items
    with pytest.raises(ConfigError, match="belongs to another process"):
        ItemStore(tmp_path)
    again.append([replace(GONE, withdrawn=False)])
    again.close()
    assert stored(tmp_path) == {
        ("books", "b15"): replace(NEW, title="Niels"),
        ("games", "g0"): replace(GONE, withdrawn=False),
    }
    assert [each.name for each in tmp_path.iterdir()] == [FILE] and path.stat().st_mode & 0o777 == 0o640


def test_a_linked_file_is_written_anew_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.serve.items.SPARE", 0)
    (tmp_path / "volume").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / FILE).symlink_to(tmp_path / "volume" / FILE)
    store = ItemStore(tmp_path / "state")
    store.append([NEW, GONE, GONE, NEW, NEW])
    store.close()
    assert stored(tmp_path / "state") == {("books", "b15"): NEW, ("games", "g0"): GONE}
    assert (tmp_path / "state" / FILE).is_symlink()
    assert len((tmp_path / "volume" / FILE).read_bytes().splitlines()) == 2


def test_a_file_that_cannot_be_written_anew_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ItemStore(tmp_path)
    store.append([replace(NEW, title=f"Niels {number}") for number in range(6)])
    store.close()
    before = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr("cprec.serve.items.SPARE", 0)

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    again = ItemStore(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / FILE).read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [FILE]
    assert "cannot be rewritten: [Errno 28]" in caplog.text
    again.append([GONE])
    again.close()
    assert stored(tmp_path) == {("books", "b15"): replace(NEW, title="Niels 5"), ("games", "g0"): GONE}


KILLED = """
import sys
from cprec.serve.items import ItemStore, StoredItem
store = ItemStore(sys.argv[1])
number = 0
while True:
    store.append([StoredItem(domain="books", item_id=str(number), title="T" * 2000)])
    print(number, flush=True)
    number += 1
"""


def test_what_was_promised_survives_kill_9(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    process.kill()
    promised = 20 + len(process.stdout.read().splitlines())
    process.stdout.close()
    process.wait()
    found = stored(tmp_path)
    assert {("books", str(number)) for number in range(promised)} <= found.keys()
    assert len(found) <= promised + 1


@given(
    st.lists(
        st.builds(
            StoredItem,
            domain=st.sampled_from(["books", "games"]),
            item_id=st.text(max_size=3).filter(lambda text: text.isprintable()) | st.sampled_from(["b0", "g2", "b10"]),
            title=st.text(min_size=1, max_size=4),
        ),
        max_size=8,
    )
)
def test_a_changed_catalogue_is_what_from_tables_would_make(catalogue: Catalogue, items: list[StoredItem]) -> None:
    import pyarrow as pa

    found = with_items(catalogue, items)
    rows = {
        (catalogue.domains[catalogue.domain[row]], str(catalogue.item_id[row])): str(catalogue.title[row])
        for row in range(len(catalogue))
    } | {(item.domain, item.item_id): item.title for item in items}
    tables = {
        domain: pa.table(
            {
                "item_id": [item for name, item in rows if name == domain],
                "title": [title for (name, _), title in rows.items() if name == domain],
            }
        )
        for domain in catalogue.domains
    }
    expected = Catalogue.from_tables(tables)
    assert found.digest() == expected.digest()
    assert found.domain.dtype == expected.domain.dtype and found.domain.tolist() == expected.domain.tolist()
