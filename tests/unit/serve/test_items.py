"""The file of item changes: what was promised survives, and damage is never read as something else."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError
from cprec.serve.items import FILE, LOCK, ItemStore, StoredItem, with_items, withdrawn_of

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
    for item in (NEW, GONE, replace(NEW, title="Niels")):
        store.append([item])
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


def test_a_change_of_several_items_that_was_cut_off_counts_for_none(tmp_path: Path) -> None:
    store = ItemStore(tmp_path)
    store.append([NEW])
    store.append([GONE, replace(NEW, title="Niels")])
    store.close()
    path = tmp_path / FILE
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert stored(tmp_path) == {("books", "b15"): NEW}


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


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[ItemStore, ItemStore]]:
    """Two stores in one folder, as two processes have them."""
    with closing(ItemStore(tmp_path)) as one, closing(ItemStore(tmp_path)) as other:
        yield one, other


def titled(number: int) -> StoredItem:
    return replace(NEW, item_id=f"b{number}", title=f"T{number}")


def by_id(*items: StoredItem) -> dict[tuple[str, str], StoredItem]:
    return {(item.domain, item.item_id): item for item in items}


def test_each_reads_what_the_other_has_stored(two: tuple[ItemStore, ItemStore], tmp_path: Path) -> None:
    one, other = two
    assert not other.has_news
    one.append([NEW, GONE])
    assert other.has_news and not one.has_news and other.items == {}
    other.read()
    assert other.items == by_id(NEW, GONE) and not other.has_news
    before = other.items
    other.read()
    assert other.items is before, "nothing is new"
    other.append([replace(NEW, title="Niels")])
    one.read()
    assert one.items == other.items == stored(tmp_path) == by_id(replace(NEW, title="Niels"), GONE)


def test_a_change_goes_behind_those_that_were_not_read(two: tuple[ItemStore, ItemStore], tmp_path: Path) -> None:
    one, other = two
    for number in range(6):  # in turn, and nobody reads
        (one, other)[number % 2].append([titled(number), replace(NEW, title=f"Niels {number}")])
    assert stored(tmp_path) == by_id(*map(titled, range(6)), replace(NEW, title="Niels 5")) == other.items
    assert len((tmp_path / FILE).read_bytes().splitlines()) == 6


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=60)

    def change(number: int) -> None:
        with closing(ItemStore(tmp_path)) as store:
            together.wait()
            for place in range(10):
                store.append([titled(10 * number + place)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(4)))
    assert stored(tmp_path) == by_id(*map(titled, range(40)))


def test_what_others_left_unfinished_is_not_read_and_then_cut_off(
    two: tuple[ItemStore, ItemStore], tmp_path: Path
) -> None:
    one, other = two
    one.append([NEW])
    with open(tmp_path / FILE, "ab") as file:
        file.write(b"0123 half a li")  # as a process leaves it that is killed
    other.read()
    assert other.items == by_id(NEW)
    other.append([GONE])
    one.read()
    assert one.items == stored(tmp_path) == by_id(NEW, GONE)


def test_nobody_reads_a_change_that_fails(
    two: tuple[ItemStore, ItemStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    fsync = os.fsync

    def full(file: int) -> None:  # the line is whole by now, but may not last
        monkeypatch.setattr("cprec.serve.items.PATIENCE_SECONDS", 0.0)
        with pytest.raises(TimeoutError):
            other.read()
        assert other.has_news and other.items == {}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        one.append([NEW])
    monkeypatch.setattr(os, "fsync", fsync)
    other.append([GONE])
    one.read()
    assert one.items == other.items == stored(tmp_path) == by_id(GONE)


def test_a_file_that_another_process_has_rewritten_is_read_and_written_on(
    two: tuple[ItemStore, ItemStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    for number in range(6):
        one.append([replace(NEW, title=f"Niels {number}")])
    other.read()
    monkeypatch.setattr("cprec.serve.items.SPARE", 0)
    with closing(ItemStore(tmp_path)) as third:
        assert len((tmp_path / FILE).read_bytes().splitlines()) == 1 and other.has_news
        one.append([GONE])  # not into the file that is gone
        other.read()
        third.append([titled(1)])
        other.read()
        assert other.items == stored(tmp_path) == by_id(replace(NEW, title="Niels 5"), GONE, titled(1))


def test_changes_wait_until_another_process_is_done(
    two: tuple[ItemStore, ItemStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    order: list[str] = []
    asked = threading.Event()
    flock = fcntl.flock

    def noting(file: int, kind: int) -> None:
        try:
            flock(file, kind)
        except BlockingIOError:
            asked.set()
            raise

    monkeypatch.setattr(fcntl, "flock", noting)

    def change() -> None:
        with other.changing():
            order.append("other")

    waiting = threading.Thread(target=change)
    with one.changing():
        waiting.start()
        assert asked.wait(60)
        other.read()  # reading waits for nobody who only prepares a change
        order.append("one")
    waiting.join(60)
    assert order == ["one", "other"]
    monkeypatch.setattr("cprec.serve.items.PATIENCE_SECONDS", 0.0)
    with one.changing(), pytest.raises(TimeoutError), other.changing():
        pass


@pytest.mark.parametrize("how", ["removed", "emptied", "older"])
def test_a_file_that_lacks_what_was_read_is_not_believed(
    how: str, two: tuple[ItemStore, ItemStore], tmp_path: Path
) -> None:
    one, other = two
    one.append([NEW])
    path = tmp_path / FILE
    older = path.read_bytes()
    one.append([GONE])
    other.read()
    path.unlink()
    if how != "removed":
        path.write_bytes(older if how == "older" else b"")
    for act in (other.read, lambda: other.append([titled(1)])):
        with pytest.raises(OSError if how == "removed" else DataError, match=f"{FILE}|lacks changes that it had"):
            act()
    assert other.items == by_id(NEW, GONE)
    assert not path.exists() if how == "removed" else path.read_bytes() == (older if how == "older" else b"")


def test_a_file_that_was_cut_is_not_believed(two: tuple[ItemStore, ItemStore], tmp_path: Path) -> None:
    one, other = two
    one.append([NEW])
    first = (tmp_path / FILE).stat().st_size
    one.append([GONE])
    other.read()
    os.truncate(tmp_path / FILE, first)
    with pytest.raises(DataError, match="lacks changes that it had: it was cut off"):
        other.read()


def test_a_file_of_an_older_version_is_read_and_its_process_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(asdict(NEW), separators=(",", ":"))
    checksum = hashlib.sha256(f"cprec items 1 {text}".encode()).hexdigest()[:16]
    (tmp_path / FILE).write_text(f"{checksum} {text}\n")
    assert stored(tmp_path) == by_id(NEW)
    monkeypatch.setattr("cprec.serve.items.PATIENCE_SECONDS", 0.0)
    with open(tmp_path / FILE, "rb") as older:
        fcntl.flock(older, fcntl.LOCK_EX)  # which it kept as long as it ran
        with pytest.raises(ConfigError, match="belongs to another process .* an older cprec serve"):
            ItemStore(tmp_path)
    assert stored(tmp_path) == by_id(NEW)


def test_the_lock_of_changes_lies_beside_the_log(tmp_path: Path) -> None:
    for name in ("volume", "one", "other"):
        (tmp_path / name).mkdir()
    for name in ("one", "other"):
        (tmp_path / name / FILE).symlink_to(tmp_path / "volume" / FILE)
    with closing(ItemStore(tmp_path / "one")) as one, closing(ItemStore(tmp_path / "other")) as other:
        with one.changing():
            assert {each.name for each in (tmp_path / "volume").iterdir()} == {FILE, LOCK}
        one.append([NEW])
        other.read()
        assert other.items == by_id(NEW)


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


@settings(max_examples=25)
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
