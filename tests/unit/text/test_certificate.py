"""Leaks are planted in the written files, so that hashes and manifests fit and only the content is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cprec import cli
from cprec.data.config import SplitSpec, TableSource
from cprec.data.dataset import POPULARITY, part_path, read_split, slot_of
from cprec.data.interactions import SECOND
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.provenance import file_sha256
from cprec.schema import TEST, TRAIN, VALIDATION
from cprec.text.certificate import CERTIFICATE, audit, violated
from cprec.text.config import PrepareConfig
from cprec.text.documents import ROW_GROUPS
from cprec.text.prepare import prepare
from cprec.text.prompts import Template
from cprec.text.shards import MANIFEST, TOKENS, join_shards, open_shards, write_shards
from cprec.text.tokenizer import load_tokenizer, train_on_titles, train_tokenizer

DOMAINS = ("books", "games", "toys")
NUM_USERS, NUM_ITEMS = 100, 30
DAY, START = 24 * 3600, 1_400_000_000
COLOURS = ("red", "blue", "green", "white", "black")


def write_logs(folder: Path) -> tuple[TableSource, ...]:
    """Three domains of one shop. Every user has events in two of them, and some of them twice; ann's last two books
    have the same time."""
    random = np.random.default_rng(4)
    sources = []
    events: dict[str, list[tuple[str, str, int]]] = {domain: [] for domain in DOMAINS}
    for user in range(NUM_USERS):
        chosen = [DOMAINS[user % 3], DOMAINS[(user + 1 + user // 3 % 2) % 3]]
        time = START + int(random.integers(0, 100)) * DAY
        items = {domain: random.permutation(NUM_ITEMS)[: random.integers(7, 10)].tolist() for domain in chosen}
        items[chosen[0]].insert(4, items[chosen[0]][1])  # a repeat
        queue = random.permutation([domain for domain in chosen for _ in items[domain]])
        for domain in queue:
            time += int(random.integers(1, 20)) * DAY // 4
            events[domain].append((f"u{user:03}", f"{domain[0]}{items[domain].pop(0):02}", time))
    ann = [("ann", f"b{number:02}", START + 50 * DAY + min(number, 8) * DAY) for number in range(10)]
    events["books"] += ann
    for domain in DOMAINS:
        titles = [f"{COLOURS[n % 5]} {domain[:-1]} {n // 5}" for n in range(NUM_ITEMS)]
        if domain == "toys":
            titles[3] = "Black Book: 2"  # books have it too, in other letters
        items = {"item_id": [f"{domain[0]}{n:02}" for n in range(NUM_ITEMS)], "title": titles}
        users, ids, when = zip(*events[domain], strict=True)
        log = {"user_id": users, "item_id": ids, "timestamp": when}
        for name, table in (("items", items), ("log", log)):
            pq.write_table(pa.table(table), folder / f"{domain}.{name}.parquet")
        sources.append(
            TableSource(
                domain=domain,
                platform="shop",
                interactions=str(folder / f"{domain}.log.parquet"),
                items=str(folder / f"{domain}.items.parquet"),
            )
        )
    return tuple(sources)


@dataclass
class Document:
    """A document as text, and its row of the index."""

    text: str
    part: int
    domain: str
    kind: str
    platform: str
    user_id: str

    @property
    def titles(self) -> list[str]:
        """The titles of its lines; in a mixed document with their tags."""
        lines = self.text.removesuffix("<eos>").split("\n")[2:]
        return [line.removeprefix("Next:").removeprefix("-").strip() for line in lines]

    def show(self, title: str, domain: str = "") -> None:
        """Add a line at the end of the history."""
        tag = f" [{domain}]" if self.kind == "mixed" else ""
        self.text = self.text.replace("\nNext:", f"\n-{tag} {title}\nNext:")


class Shop:
    """A data folder to spoil."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def split(self) -> Split:
        return read_split(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.folder / "tokenizer"))

    @property
    def num_parts(self) -> int:
        return int(json.loads((self.folder / "dataset.json").read_text())["num_parts"])

    def part_of(self, user_id: str) -> int:
        return slot_of("shop", user_id) * self.num_parts // 4096

    def titles(self, user_id: str, domain: str | None = None, part: str | None = None) -> list[str]:
        """The titles of a user's events in a domain and in a part of the split, in order; or of all."""
        log, catalogue = self.split.interactions, self.split.catalogue
        mask = log.user_id[log.user] == user_id
        if domain is not None:
            mask &= catalogue.domain[log.item] == catalogue.domain_index(domain)
        if part is not None:
            mask &= self.split.events(part)
        return [str(title) for title in catalogue.title[log.item[mask]]]

    # ---- shards and examples ----

    def read(self, name: str) -> list[Document]:
        shards = open_shards(self.folder / name)
        ids = [shards.rows[number].tolist() for number in range(len(shards))]
        texts = self.tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
        rows = shards.documents.select(["domain", "kind", "platform", "user_id"]).to_pylist()
        parts = [piece["part"] for piece in shards.manifest["pieces"] for _ in range(piece["num_documents"])]
        return [Document(text, part, **row) for text, part, row in zip(texts, parts, rows, strict=True)]

    def write(self, name: str, documents: list[Document], **about: str) -> None:
        """The documents with an index, a manifest and pieces that fit, as `prepare` writes them."""
        old = json.loads((self.folder / name / MANIFEST).read_text())
        keep = {"about": old["about"] | about, "vocabulary_size": len(self.tokenizer)}
        order = ["books", "games", "toys", ""]
        sources = []
        for part in range(self.num_parts):
            mine = [document for document in documents if document.part == part]
            mine.sort(key=lambda document: order.index(document.domain))
            tokens = Ragged.of(self.token_ids([document.text for document in mine]))
            columns: dict[str, Any] = {name: [getattr(d, name) for d in mine] for name in ("domain", "kind")}
            columns["num_events"] = [len(document.titles) for document in mine]
            columns |= {name: [getattr(d, name) for d in mine] for name in ("platform", "user_id")}
            ends = [document.titles[-1].rpartition("] ")[2] for document in mine]
            columns["target_start"] = tokens.lengths - 1 - [*map(len, self.token_ids([f" {end}" for end in ends]))]
            sources.append(self.folder / f"part-{part}")
            write_shards(sources[-1], tokens, columns, {"vocabulary_size": keep["vocabulary_size"]}, part=part)
        join_shards(self.folder / name, sources, keep)
        for source in sources:
            shutil.rmtree(source)

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts)["input_ids"]) if texts else []

    def spoil(
        self, name: str, change: Callable[[Document], object], where: Callable[[Document], bool] = lambda _: True
    ) -> Document:
        """Change the first document of a kind, and write all of them; returns it as it was changed."""
        documents = self.read(name)
        document = next(filter(where, documents))
        change(document)
        self.write(name, documents)
        return document

    # ---- other files ----

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads((self.folder / name).read_text())
        change(content)
        (self.folder / name).write_text(json.dumps(content))

    def edit_table(self, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
        path = self.folder / name
        pq.write_table(change(pq.ParquetFile(path).read()), path)

    def edit_query(self, name: str, change: Callable[[dict[str, Any]], object], user_id: str | None = None) -> str:
        """Change one query of a file, that of a user or the first one; returns its id."""
        path = self.folder / f"queries/{name}.parquet"
        file, found = pq.ParquetFile(path), ""
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
        with pq.ParquetWriter(path.with_suffix(".new"), file.schema_arrow) as writer:
            for group in groups:
                rows = group.to_pylist()
                for row in rows:
                    if not found and user_id in (None, row["user_id"]):
                        found = row["query_id"]
                        change(row)
                writer.write_table(pa.Table.from_pylist(rows, group.schema), row_group_size=len(rows))
        path.with_suffix(".new").rename(path)
        assert found
        return found

    def sign(self, name: str) -> None:
        """Write the hashes of a shard folder's files into its manifest, as they are now."""

        def change(manifest: dict[str, Any]) -> None:
            manifest["sha256"] = {file: file_sha256(self.folder / name / file) for file in manifest["sha256"]}

        self.edit_json(f"{name}/{MANIFEST}", change)

    # ---- the audit ----

    def audit(self) -> dict[str, Any]:
        return audit(self.folder, workers=1)

    def violations(self) -> dict[str, int]:
        """The violated properties, by the first words of their names."""
        properties = self.audit()["properties"]
        self.examples = [example for p in properties for example in p["examples"]]
        return {p["name"].partition(" (")[0]: p["violations"] for p in properties if p["violations"]}


HELD_OUT = "no held-out event"
BEYOND = "no event that the training part of the log does not have"
LINES = "every document has lines, and each is a title of the catalogue"
HEADS = "before its lines every document has the head of the template and nothing else"
USERS = "every document is of a user of the log"
REPEATED = "no target inside its own prompt, except where the user had it before"
BEFORE = "each ends with an event that it may ask for and shows only what came before it"
AFTER_CUT = "no event from the cut on, in any domain"
OTHER_DOMAIN = "no item of a domain that is not pre-trained on"
TESTED = "no user tested in an unseen domain"
UNSEEN_USER = "no unseen user"
LAID_OUT = "documents follow one another and are of the domain and kind of their piece"
QUERIES = "each asks for a held-out event and shows only what came before it"
CHANGED = "files: none was changed, added or removed after it was certified"
WHOLE = "files: each is whole, and all its rows belong to the parts that are checked"
HASHES = "shards, examples: every file, the catalogue and the tokenizer have the hash that the manifest gives"
SPLIT_COLUMN = "interactions: the split is what leave-one-out makes of them"
PARTS = "interactions: every user stands in the part of the hash"
SETTINGS = "split: it is the one of the settings, and its cuts lie where they say"
COUNTS = "popularity: every item has the number of its training events"
TOKENIZER = "tokenizer: trained on titles of the pre-training domains again, it comes out the same"
TABLES = "tables: they can be read as they stand"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tables_once: None) -> Iterator[Callable[..., Path]]:
    """Prepares a data folder of the shop, in several parts; the same settings give the same folder."""
    base = tmp_path_factory.mktemp("shop")
    sources = write_logs(base)
    made: dict[str, Path] = {}

    def make(part_events: int = 1000, **settings: Any) -> Path:
        key = repr((part_events, settings))
        if key not in made:
            config: dict[str, Any] = {
                "tables": sources,
                "pretrain_domains": ("books", "games"),
                "target_domains": ("books", "toys"),
                "k_core": 0,
                "vocabulary_size": 400,
                "min_events": 3,
                "max_events": 6,
                "min_history": 1,
                "heldout_share": 0.1,
                "workers": 1,
            }
            config |= settings
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("cprec.data.build.PART_EVENTS", part_events)
                made[key] = prepare(PrepareConfig(output_dir=str(base / f"data{len(made)}"), **config))
        return made[key]

    yield make


@pytest.fixture
def copy(prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., Shop]:
    """A copy of a data folder; without the certificate, so that only contents count, unless it is asked for."""

    def copy(*, certified: bool = False, **settings: Any) -> Shop:
        folder = tmp_path / "data"
        shutil.copytree(prepared(**settings), folder)
        if not certified:
            (folder / CERTIFICATE).unlink()
        return Shop(folder)

    return copy


@pytest.fixture
def shop(copy: Callable[..., Shop]) -> Shop:
    return copy()


BY_TIME: dict[str, Any] = {"split": SplitSpec(method="global-time"), "history": "mixed"}
UNSEEN_USERS: dict[str, Any] = {
    "split": SplitSpec(method="last-n", num_test=2, unseen_user_share=0.3),
    "history": "mixed",
    "mixed_order": "interleave",
}

# ---- clean data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="leave-one-out"),
        pytest.param(BY_TIME, id="global-time", marks=pytest.mark.slow),
        pytest.param(UNSEEN_USERS, id="last-n", marks=pytest.mark.slow),
    ],
)
def test_clean_data_are_clean_in_one_part_and_in_several(
    copy: Callable[..., Shop], prepared: Callable[..., Path], settings: dict[str, Any]
) -> None:
    shop = copy(certified=True, **settings)
    assert shop.num_parts == 2
    before = json.loads((shop.folder / CERTIFICATE).read_text())
    certificate = shop.audit()
    assert certificate["clean"] and not violated(certificate)
    assert certificate["artifacts"] == before["artifacts"] and certificate["queries"] == before["queries"]
    names = [p["name"] for p in certificate["properties"]]
    assert len(set(names)) == len(names) and all(p["checked"] for p in certificate["properties"])
    one = json.loads((prepared(part_events=10**6, **settings) / CERTIFICATE).read_text())

    def counts(certificate: dict[str, Any]) -> list[tuple[str, int]]:
        entries = [*certificate["properties"], *certificate["observations"]]
        return [(e["name"], e["checked"]) for e in entries if not e["name"].startswith("files")]

    per_piece = [(name, checked) for name, checked in counts(certificate) if LAID_OUT in name]
    assert set(counts(certificate)) - set(per_piece) <= set(counts(one))
    assert len(counts(certificate)) == len(counts(one))


def test_everything_that_is_read_is_hashed(shop: Shop) -> None:
    found = {path.relative_to(shop.folder).as_posix() for path in shop.folder.rglob("*") if path.is_file()}
    certificate = shop.audit()
    assert set(certificate["files"]) == found - {"hashes.json"}  # no stage reads that to make anything
    assert not list(shop.folder.glob(".*"))
    assert set(certificate["artifacts"]) == {
        "shards/train",
        "shards/heldout",
        *(f"examples/{domain}/{part}" for domain in ("books", "toys") for part in (TRAIN, "documents")),
    }
    assert set(certificate["queries"]) == {f"{d}/{p}" for d in ("books", "toys") for p in (VALIDATION, TEST)}


def test_the_events_that_baselines_learn_from_are_hashed(copy: Callable[..., Shop]) -> None:
    shop = copy(certified=True)
    interactions = {
        part_path(Path(), "interactions", domain, part).as_posix() for domain in DOMAINS for part in range(2)
    }
    items = {part_path(Path(), "items", domain, 0).as_posix() for domain in DOMAINS}
    certificate = json.loads((shop.folder / CERTIFICATE).read_text())
    hashes = {name: file_sha256(shop.folder / name) for name in {"dataset.json"} | interactions | items}
    assert hashes.items() <= certificate["files"].items() and "events" not in certificate
    shop.edit_json(CERTIFICATE, lambda older: older.pop("files"))  # as certificates once were
    assert hashes.items() <= shop.audit()["files"].items(), "`cprec audit` adds them"


def test_documents_written_again_are_the_same(shop: Shop) -> None:
    for name in ("shards/train", "examples/toys/validation"):
        before = open_shards(shop.folder / name).sha256
        shop.write(name, shop.read(name))
        assert open_shards(shop.folder / name).sha256 == before


def test_ties_and_titles_that_two_domains_share_are_noted(shop: Shop) -> None:
    noted = {o["name"]: o for o in shop.audit()["observations"]}
    (ties,) = [o for name, o in noted.items() if name.startswith("queries/books/test: targets that tie order (source)")]
    (last,) = [o for name, o in noted.items() if name.startswith("queries/books/test: of the targets")]
    assert (ties["found"], ties["examples"]) == (1, ["shop/ann"]) and ties["checked"] > 50
    assert (last["checked"], last["found"]) == (1, 1)
    (alike,) = [o for name, o in noted.items() if name.startswith("toys: ")]
    assert (alike["checked"], alike["found"], alike["examples"]) == (NUM_ITEMS, 1, ["Black Book: 2"])


# ---- documents -------------------------------------------------------------------------------------------------------


def unrepeated(shop: Shop, document: Document, domain: str = "books", part: str = TEST) -> bool:
    """Whether the user held out an event in a domain whose title occurs nowhere else in the log."""
    held_out = shop.titles(document.user_id, domain, part)
    return bool(held_out) and shop.titles(document.user_id, domain).count(held_out[-1]) == 1


PLACES = [(VALIDATION, "history"), (TEST, "history"), (TEST, "target")]
FILES = [
    ("shards/train", "specific"),
    ("shards/train", "mixed"),
    ("shards/heldout", "specific"),
    ("examples/books/train", "specific"),
    ("examples/books/documents", "specific"),
]


@pytest.mark.parametrize(
    ("name", "kind", "part", "place"),
    [  # quick: each file with one place, and each place with one file
        pytest.param(*file, *place, marks=[pytest.mark.slow] * (row % len(PLACES) != column))
        for row, file in enumerate(FILES)
        for column, place in enumerate(PLACES)
    ],
)
def test_a_held_out_event_is_found(shop: Shop, name: str, kind: str, part: str, place: str) -> None:
    def change(document: Document) -> None:
        title = shop.titles(document.user_id, "books", part)[-1]
        if place == "history":
            document.show(title, "books")
        else:
            head, _, _ = document.text.rpartition("\nNext:")
            tag = " [books]" if kind == "mixed" else ""
            document.text = f"{head}\nNext:{tag} {title}<eos>"

    document = shop.spoil(
        name,
        change,
        lambda d: d.kind == kind and d.domain in ("books", "") and unrepeated(shop, d, part=part),
    )
    expected = {f"{name}: {HELD_OUT}": 1}
    if name == "examples/books/train":
        expected[f"{name}: {BEFORE}"] = 1
    assert shop.violations() == expected
    title = shop.titles(document.user_id, "books", part)[-1]
    assert any(f"'{title}' (books) in document " in e and f"shop/{document.user_id}" in e for e in shop.examples)


@pytest.mark.parametrize(
    ("name", "kind"), [("shards/train", "specific"), ("shards/train", "mixed"), ("examples/books/train", "mixed")]
)
def test_an_event_after_the_cut_in_another_domain_is_found(copy: Callable[..., Shop], name: str, kind: str) -> None:
    shop = copy(**BY_TIME)
    document = shop.spoil(
        name,
        lambda d: d.show(shop.titles(d.user_id, "games", TEST)[-1], "games"),
        lambda d: d.kind == kind and d.domain in ("games", "books", "") and unrepeated(shop, d, "games"),
    )
    expected = {f"{name}: {HELD_OUT}": 1, f"{name}: {AFTER_CUT}": 1}
    if name.startswith("examples/"):
        expected[f"{name}: {BEFORE}"] = 1
    elif document.domain == "books":  # no line of a specific document of books is a game
        expected = {f"{name}: {LINES}": 1}
    assert shop.violations() == expected


@pytest.mark.parametrize("name", ["shards/train", "examples/books/documents"])
def test_an_event_told_twice_is_found(shop: Shop, name: str) -> None:
    documents = shop.read(name)
    once = next(d for d in documents if len(shop.titles(d.user_id)) == len(set(shop.titles(d.user_id))))
    once.show(once.titles[0])
    shop.write(name, documents)
    assert shop.violations() == {f"{name}: {BEYOND}": 1}
    assert any(once.titles[0] in example for example in shop.examples)


def test_a_document_told_twice_is_found(shop: Shop) -> None:
    name = "shards/heldout"
    documents = shop.read(name)
    shop.write(name, [*documents, documents[0]])
    assert shop.violations() == {f"{name}: {BEYOND}": len(set(documents[0].titles))}


def test_a_document_with_events_of_another_user_is_found(shop: Shop) -> None:
    documents = shop.read("shards/train")
    document, other = next(
        (d, e)
        for d in documents
        for e in documents
        if d.part == e.part and d.kind == "specific" and not set(d.titles) & set(shop.titles(e.user_id, d.domain))
    )
    document.user_id = other.user_id
    shop.write("shards/train", documents)
    assert shop.violations() == {f"shards/train: {BEYOND}": len(set(document.titles))}


def test_a_document_of_nobody_is_found(shop: Shop) -> None:
    def change(document: Document) -> None:
        document.user_id = "nobody"

    document = shop.spoil("examples/toys/train", change)
    assert shop.violations() == {
        f"examples/toys/train: {USERS}": 1,
        f"examples/toys/train: {BEYOND}": len(set(document.titles)),
        f"examples/toys/train: {BEFORE}": 1,
    }
    assert "document 0 of shop/nobody" in shop.examples


@pytest.mark.parametrize(
    ("kind", "old", "new", "text", "expected"),
    [
        ("specific", "History:", "History: u001 will buy", "", HEADS),
        ("specific", "Domain: books", "Domain: games", "", HEADS),
        ("mixed", "Domain: multiple", "Domain: books", "", HEADS),
        ("specific", "\nNext:", "\n- mauve book 1\nNext:", "", LINES),
        ("specific", "\nNext:", "\n- red game 1\nNext:", "", LINES),
        ("specific", "\nNext:", "\n- [games] red game 1\nNext:", "", LINES),
        ("mixed", "\nNext:", "\n- [games] red book 1\nNext:", "", LINES),
        ("mixed", "\nNext:", "\n- red game 1\nNext:", "", LINES),
        ("specific", "<eos>", "<eos> and then a red toy<eos>", "", LINES),
    ],
)
def test_a_text_that_is_not_of_the_template_is_found(
    shop: Shop, kind: str, old: str, new: str, text: str, expected: str
) -> None:
    def change(document: Document) -> None:
        assert old in document.text
        document.text = document.text.replace(old, new, 1)

    document = shop.spoil("shards/train", change, lambda d: d.kind == kind and d.domain in ("books", ""))
    assert shop.violations() == {f"shards/train: {expected}": 1}
    assert f"shop/{document.user_id}" in shop.examples[0]


def test_an_item_of_an_unseen_domain_is_found(shop: Shop) -> None:
    shop.spoil("shards/train", lambda d: d.show("red toy 0", "toys"), lambda d: d.kind == "mixed")
    assert shop.violations() == {f"shards/train: {OTHER_DOMAIN}": 1, f"shards/train: {BEYOND}": 1}
    assert "'red toy 0' (toys)" in shop.examples


def test_a_document_of_an_unseen_domain_is_found(shop: Shop) -> None:
    documents, name = shop.read("shards/heldout"), "shards/heldout"
    user = next(d.user_id for d in shop.read("examples/toys/train") if len(shop.titles(d.user_id, "toys", TRAIN)) > 4)
    titles = list(dict.fromkeys(shop.titles(user, "toys", TRAIN)))
    text = "Domain: toys\nHistory:" + "".join(f"\n- {title}" for title in titles[:-1]) + f"\nNext: {titles[-1]}<eos>"
    documents.append(Document(text, shop.part_of(user), "toys", "specific", "shop", user))
    shop.write(name, documents)
    assert shop.violations() == {f"{name}: {OTHER_DOMAIN}": len(titles), f"{name}: {TESTED}": 1}
    assert f"shop/{user}" in shop.examples


def test_a_user_who_is_tested_in_an_unseen_domain_is_found(shop: Shop) -> None:
    tested = {d.user_id for d in shop.read("examples/toys/validation")}
    example = next(d for d in shop.read("examples/books/train") if d.user_id in tested)
    shop.write("shards/train", [*shop.read("shards/train"), example])
    assert shop.violations() == {f"shards/train: {TESTED}": 1}
    assert shop.examples == [f"shop/{example.user_id}"]


def test_an_unseen_user_is_found(copy: Callable[..., Shop]) -> None:
    shop = copy(**UNSEEN_USERS)
    log = shop.split.interactions
    unseen = sorted(set(log.user_id[log.user[shop.split.events("context")]]))
    user = next(u for u in unseen if len(shop.titles(u, "books", "context")) > 3 and not shop.titles(u, "toys"))
    titles = list(dict.fromkeys(shop.titles(user, "books", "context")))[:3]
    text = f"Domain: books\nHistory:\n- {titles[0]}\n- {titles[1]}\nNext: {titles[2]}<eos>"
    document = Document(text, shop.part_of(user), "books", "specific", "shop", user)
    shop.write("shards/train", [*shop.read("shards/train"), document])
    assert shop.violations() == {f"shards/train: {UNSEEN_USER}": 1, f"shards/train: {HELD_OUT}": 3}
    assert f"shop/{user}" in shop.examples


def test_a_held_out_user_who_trains_is_found(shop: Shop) -> None:
    documents = shop.read("shards/heldout")
    document = documents[0]
    shop.write("shards/train", [*shop.read("shards/train"), document])
    of_user = sum(d.user_id == document.user_id for d in documents)
    assert shop.violations() == {"shards/heldout: no user of shards/train": of_user}


# ---- examples --------------------------------------------------------------------------------------------------------


def test_a_validation_example_that_shows_a_test_event_is_found(shop: Shop) -> None:
    name = "examples/books/validation"
    shop.spoil(name, lambda d: d.show(shop.titles(d.user_id, "books", TEST)[0]), lambda d: unrepeated(shop, d))
    assert shop.violations() == {f"{name}: {HELD_OUT}": 1, f"{name}: {BEFORE}": 1}


def test_a_validation_example_that_asks_for_a_training_event_is_found(shop: Shop) -> None:
    name = "examples/toys/validation"

    def change(document: Document) -> None:  # the same events, the last two of them in the other order
        first, second = document.titles[-2:]
        document.text = document.text.replace(f"- {first}\nNext: {second}", f"- {second}\nNext: {first}")

    shop.spoil(name, change, lambda d: len(set(d.titles)) == len(d.titles) > 3)
    assert shop.violations() == {f"{name}: {BEFORE}": 1}


def test_a_training_example_that_shows_a_later_training_event_is_found(shop: Shop) -> None:
    name = "examples/books/train"

    def later(document: Document) -> list[str]:
        titles = shop.titles(document.user_id, "books", TRAIN)
        return titles[len(document.titles) :] if len(set(titles)) == len(titles) else []

    document = shop.spoil(name, lambda d: d.show(later(d)[0]), lambda d: bool(later(d)))
    assert shop.violations() == {f"{name}: {BEFORE}": 1}
    assert shop.examples[0].endswith(f"of shop/{document.user_id}")


def test_a_target_inside_its_own_prompt_is_found_but_not_a_repeat_of_the_log(shop: Shop) -> None:
    name = "examples/books/train"
    assert any(d.titles[-1] in d.titles[:-1] for d in shop.read(name)), "the log has no repeat"
    shop.spoil(name, lambda d: d.show(d.titles[-1]), lambda d: shop.titles(d.user_id, "books").count(d.titles[-1]) == 1)
    assert shop.violations() == {f"{name}: {REPEATED}": 1, f"{name}: {BEYOND}": 1, f"{name}: {BEFORE}": 1}


# ---- the split, popularity, the tokenizer ----------------------------------------------------------------------------


def call_a_test_event_train(shop: Shop) -> tuple[str, str]:
    """In the table of interactions; returns the user and the title."""
    document = next(
        d
        for d in shop.read("shards/train")
        if d.domain == "books"
        and unrepeated(shop, d)
        and d.user_id != "ann"
        and len(shop.titles(d.user_id, "books", TRAIN)) <= 5
    )
    title = shop.titles(document.user_id, "books", TEST)[0]
    path = part_path(Path(), "interactions", "books", shop.part_of(document.user_id)).as_posix()

    def change(table: pa.Table) -> pa.Table:
        hers = pc.and_(pc.equal(table["user_id"], document.user_id), pc.equal(table["split"], TEST))
        assert pc.sum(hers).as_py() == 1
        place = table.column_names.index("split")
        return table.set_column(place, "split", pc.if_else(hers, TRAIN, table["split"]))

    shop.edit_table(path, change)
    return document.user_id, title


def test_a_test_event_that_the_tables_call_train_is_found(shop: Shop) -> None:
    user, title = call_a_test_event_train(shop)
    assert shop.violations() == {SPLIT_COLUMN: 1, COUNTS: 1, f"queries/books/test: {QUERIES}": 1}
    assert f"'{title}' (books) of shop/{user} is train and should be test" in shop.examples


def test_it_is_found_too_where_everything_else_follows(shop: Shop) -> None:
    user, title = call_a_test_event_train(shop)
    shop.spoil("shards/train", lambda d: d.show(title), lambda d: (d.user_id, d.domain) == (user, "books"))
    count(shop, "books", title, 1)
    path = shop.folder / "queries/books/test.parquet"
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for group in groups:
            writer.write_table(group.filter(pc.not_equal(group["user_id"], user)))
    assert shop.violations() == {SPLIT_COLUMN: 1}


def count(shop: Shop, domain: str, title: str, more: int) -> None:
    """Count an item more often in the table of popularity."""
    catalogue = shop.split.catalogue
    (row,) = [row for row in catalogue.rows_of(domain) if catalogue.title[row] == title]

    def change(table: pa.Table) -> pa.Table:
        counts = table["num_events"].to_numpy().copy()
        counts[row] += more
        return table.set_column(2, "num_events", pa.array(counts))

    shop.edit_table(POPULARITY, change)


def test_popularity_that_counts_held_out_events_is_found(shop: Shop) -> None:
    split = shop.split
    held_out = np.bincount(split.interactions.item[split.events(TEST)], minlength=len(split.catalogue))

    def change(table: pa.Table) -> pa.Table:
        return table.set_column(2, "num_events", pa.array(table["num_events"].to_numpy() + held_out))

    shop.edit_table(POPULARITY, change)
    assert shop.violations() == {COUNTS: np.count_nonzero(held_out)}
    row = int(np.flatnonzero(held_out)[0])
    assert shop.examples[0].startswith(f"books/{split.catalogue.item_id[row]}: ")


def test_popularity_of_other_items_or_none_is_found(shop: Shop) -> None:
    shop.edit_table(POPULARITY, lambda table: table.slice(1))
    assert shop.violations() == {COUNTS: 3 * NUM_ITEMS}
    (shop.folder / POPULARITY).write_text("none")
    assert shop.violations() == {COUNTS: 3 * NUM_ITEMS}
    (shop.folder / POPULARITY).unlink()
    assert shop.violations() == {COUNTS: 3 * NUM_ITEMS}


@pytest.mark.parametrize("leak", ["titles of the unseen domain", "what test users did", "an added token"])
def test_a_tokenizer_that_saw_more_is_found(shop: Shop, leak: str) -> None:
    """All documents follow it: only its own words give it away."""
    names = [f"{folder}/{part}" for folder in ("examples/books", "examples/toys") for part in (TRAIN, VALIDATION)]
    documents = {name: shop.read(name) for name in ("shards/train", "shards/heldout", *names)}
    for domain in ("books", "toys"):  # as in folders from before there were these
        shutil.rmtree(shop.folder / "examples" / domain / "documents")
    catalogue = shop.split.catalogue
    if leak == "titles of the unseen domain":
        tokenizer = train_on_titles(catalogue, DOMAINS, 400, Template())
    elif leak == "an added token":
        tokenizer = train_on_titles(catalogue, DOMAINS[:2], 400, Template())
        tokenizer.add_tokens([" red book 3"])
    else:
        texts = [d.text.removesuffix("<eos>") for name in documents for d in documents[name]]
        tokenizer = train_tokenizer([*texts, *catalogue.title], 400)
    tokenizer.save_pretrained(shop.folder / "tokenizer")
    shop.tokenizer = load_tokenizer(str(shop.folder / "tokenizer"))
    for name, of_name in documents.items():
        shop.write(name, of_name, tokenizer_sha256=file_sha256(shop.folder / "tokenizer/tokenizer.json"))
    found = shop.violations()
    assert list(found) == [TOKENIZER] and found[TOKENIZER] >= 1
    if leak == "titles of the unseen domain":
        assert any("toy" in example for example in shop.examples)
    if leak == "an added token":
        assert shop.examples == ["its added_tokens"]


# ---- queries ---------------------------------------------------------------------------------------------------------


def earlier(shop: Shop, row: dict[str, Any]) -> tuple[str, int]:
    """The item and the time of the user's first event in the query's domain."""
    log, catalogue = shop.split.interactions, shop.split.catalogue
    mine = (log.user_id[log.user] == row["user_id"]) & (catalogue.domain[log.item] == 0)
    event = np.flatnonzero(mine)[0]
    return str(catalogue.item_id[log.item[event]]), int(log.time[event] // SECOND)


def show(row: dict[str, Any], domain: str, item: str) -> None:
    row["history_domain"].append(domain)
    row["history_item"].append(item)


QUERY_FAULTS: dict[str, Callable[[Shop, dict[str, Any]], object]] = {
    "shows its own target": lambda shop, row: show(row, "books", row["target"]),
    "shows an item that is not there": lambda shop, row: show(row, "books", "b99"),
    "shows an event twice": lambda shop, row: show(row, "books", row["history_item"][-1]),
    "asks for a training event": lambda shop, row: row.update(
        zip(("target", "timestamp"), earlier(shop, row), strict=True), history_item=[], history_domain=[]
    ),
    "asks for an item of that time that was another": lambda shop, row: row.update(target=earlier(shop, row)[0]),
    "asks at another time": lambda shop, row: row.update(timestamp=row["timestamp"] - 1),
    "asks for an item that is not there": lambda shop, row: row.update(target="b99"),
    "is of another domain": lambda shop, row: row.update(domain="games", target="g" + row["target"][1:]),
    "is of nobody": lambda shop, row: row.update(user_id="nobody"),
}


@pytest.mark.parametrize("fault", QUERY_FAULTS)
def test_a_query_that_is_wrong_is_found(shop: Shop, fault: str) -> None:
    user = next(d.user_id for d in shop.read("examples/books/validation") if unrepeated(shop, d))
    query = shop.edit_query("books/test", lambda row: QUERY_FAULTS[fault](shop, row), user)
    assert shop.violations() == {f"queries/books/test: {QUERIES}": 1}
    assert shop.examples == [query]


def test_a_query_for_an_event_of_another_part_is_found(shop: Shop) -> None:
    path = shop.folder / "queries/books/test.parquet"
    shutil.copyfile(shop.folder / "queries/books/validation.parquet", path)
    assert shop.violations() == {f"queries/books/test: {QUERIES}": pq.read_metadata(path).num_rows}


def test_a_query_for_a_held_out_event_of_another_domain_is_found(shop: Shop) -> None:
    """The catalogue of the domain would be asked for an item that is not in it."""
    books, toys = (pq.read_table(shop.folder / f"queries/{domain}/test.parquet") for domain in ("books", "toys"))
    both = set(books["user_id"].to_pylist()) & set(toys["user_id"].to_pylist())
    other = next(row for row in toys.to_pylist() if row["user_id"] in both)
    query = shop.edit_query("books/test", lambda row: row.update(other), other["user_id"])
    assert shop.violations() == {f"queries/books/test: {QUERIES}": 1}
    assert query.startswith("books/")


@pytest.mark.parametrize("settings", [BY_TIME, UNSEEN_USERS], ids=["global-time", "last-n"])
def test_a_mixed_history_that_shows_a_later_or_a_test_event_of_another_domain_is_found(
    copy: Callable[..., Shop], settings: dict[str, Any]
) -> None:
    shop = copy(**settings)
    log, catalogue = shop.split.interactions, shop.split.catalogue
    tests = shop.split.events(TEST) & (catalogue.domain[log.item] == 1)
    by_time = settings is BY_TIME

    def games(row: dict[str, Any]) -> list[int]:
        """Test events of games: later ones, or (they may never be shown with last-n) earlier ones."""
        mine = tests & (log.user_id[log.user] == row["user_id"])
        mine &= (log.time > row["timestamp"] * SECOND) if by_time else (log.time < row["timestamp"] * SECOND)
        shown = dict.fromkeys(row["history_item"])
        return [event for event in np.flatnonzero(mine) if catalogue.item_id[log.item[event]] not in shown]

    rows = pq.read_table(shop.folder / "queries/books/test.parquet").to_pylist()
    user, item = next((row["user_id"], catalogue.item_id[log.item[games(row)[0]]]) for row in rows if games(row))
    query = shop.edit_query("books/test", lambda row: show(row, "games", item), user)
    assert shop.violations() == {f"queries/books/test: {QUERIES}": 1}
    assert shop.examples == [query]


def test_queries_that_are_filed_under_another_part_are_found(shop: Shop) -> None:
    path = shop.folder / "queries/toys/validation.parquet"
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]

    def write(parts: bytes) -> None:
        with pq.ParquetWriter(path, file.schema_arrow.with_metadata({ROW_GROUPS: parts})) as writer:
            for group in groups:
                writer.write_table(group)

    write(b"[1, 0]")
    assert shop.violations() == {f"queries/toys/validation: {QUERIES}": sum(sizes)}
    for parts in (b"[2, 1]", b"[0]", b"{}", b"null"):
        write(parts)
        assert shop.violations() == {WHOLE: 1}
        assert "does not say which part" in shop.examples[0]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_byte_of_the_tokens_changed_is_found(copy: Callable[..., Shop]) -> None:
    shop, name = copy(certified=True), "shards/train"
    tokens = np.memmap(shop.folder / name / TOKENS, dtype="<u2", mode="r+")
    tokens[-2] = 2  # the last token of the last title is now a "!"
    tokens.flush()
    assert shop.violations() == {CHANGED: 1, HASHES: 1, f"{name}: {LINES}": 1}
    assert f"{name}/{TOKENS}" in shop.examples
    shop.sign(name)
    assert shop.violations() == {CHANGED: 2, f"{name}: {LINES}": 1}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["shards/train", "examples/toys/train"])
def test_tokens_cut_short_are_found(copy: Callable[..., Shop], name: str, signed: bool) -> None:
    shop = copy(certified=True)
    path = shop.folder / name / TOKENS
    path.write_bytes(path.read_bytes()[:-2])
    if signed:
        shop.sign(name)
    assert shop.violations() == {CHANGED: 1 + signed, WHOLE: 1}
    assert any("tokens.bin has" in example and "it was cut or changed" in example for example in shop.examples)
    certificate = json.loads((shop.folder / CERTIFICATE).read_text())
    assert not certificate["clean"] and name not in certificate["artifacts"]


def test_a_file_that_is_missing_or_none_is_found(shop: Shop) -> None:
    (shop.folder / "shards/heldout" / MANIFEST).unlink()
    (shop.folder / "examples/books/train/documents.parquet").write_text("PAR1")
    (shop.folder / "queries/books/test.parquet").unlink()
    assert shop.violations() == {WHOLE: 3}
    assert any("manifest.json is missing" in example for example in shop.examples)


def test_files_added_removed_or_changed_after_certification_are_found(copy: Callable[..., Shop]) -> None:
    shop = copy(certified=True)
    (shop.folder / "shards/train/more.bin").write_text("")
    (shop.folder / "rejected.parquet").unlink()
    path = part_path(Path(), "interactions", "books", 0).as_posix()
    before = (shop.folder / path).read_bytes()

    def rate(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index("rating"), "rating", pa.array([1.0] * table.num_rows))

    shop.edit_table(path, rate)  # harmless, but not what was certified
    for _ in range(2):
        assert shop.violations() == {CHANGED: 3}
        assert set(shop.examples) == {"shards/train/more.bin", "rejected.parquet", path}
    (shop.folder / "shards/train/more.bin").unlink()
    (shop.folder / path).write_bytes(before)
    assert shop.violations() == {CHANGED: 1}
    shutil.copyfile(shop.folder / POPULARITY, shop.folder / "rejected.parquet")
    assert shop.violations() == {CHANGED: 1}


def test_a_file_that_is_put_back_is_certified_again(copy: Callable[..., Shop]) -> None:
    shop = copy(certified=True)
    path = shop.folder / POPULARITY
    before = path.read_bytes()
    count(shop, "books", "red book 0", 1)
    assert shop.violations() == {CHANGED: 1, COUNTS: 1}
    path.write_bytes(before)
    assert shop.violations() == {}
    assert "certified_files" not in json.loads((shop.folder / CERTIFICATE).read_text())


def test_candidates_drawn_by_an_evaluation_are_no_change(copy: Callable[..., Shop]) -> None:
    shop = copy(certified=True)
    (shop.folder / "queries/books/candidates20_test_seed0.parquet").write_text("")
    assert shop.violations() == {}


def test_pieces_listed_under_another_part_are_found(shop: Shop) -> None:
    name, documents = "shards/train", shop.read("shards/train")
    pieces = json.loads((shop.folder / name / MANIFEST).read_text())["pieces"]
    size = pieces[0]["num_documents"]
    shop.edit_json(f"{name}/{MANIFEST}", lambda manifest: manifest["pieces"][0].update(part=1))
    titles = {title for document in documents[:size] for title in document.titles}
    assert shop.violations() == {f"{name}: {USERS}": size, f"{name}: {BEYOND}": len(titles)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"part": 2}, {WHOLE: 1}),
        ({"part": -1}, {WHOLE: 1}),
        ({"num_documents": 1}, {WHOLE: 1}),
        ({"num_tokens": 1}, {WHOLE: 1}),
        ({"domain": "games"}, {f"shards/train: {LAID_OUT}": 1}),
        ({"kind": "mixed"}, {f"shards/train: {LAID_OUT}": 1}),
    ],
)
def test_pieces_that_do_not_fit_are_found(shop: Shop, change: dict[str, Any], expected: dict[str, int]) -> None:
    shop.edit_json(f"shards/train/{MANIFEST}", lambda manifest: manifest["pieces"][0].update(change))
    assert shop.violations() == expected


@pytest.mark.parametrize("column", ["length", "offset"])
def test_tokens_between_documents_are_found(shop: Shop, column: str) -> None:
    """Training reads by offset and length: what lies between documents must not hide from the audit."""
    path = shop.folder / "shards/train/documents.parquet"
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    values = groups[0][column].to_numpy().copy()
    values[0] += 1
    groups[0] = groups[0].set_column(groups[0].column_names.index(column), column, pa.array(values))
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for group in groups:
            writer.write_table(group)
    shop.sign("shards/train")
    assert shop.violations() == {f"shards/train: {LAID_OUT}": 1}


def test_shards_of_another_catalogue_or_tokenizer_are_found(shop: Shop) -> None:
    shop.edit_json(f"shards/train/{MANIFEST}", lambda manifest: manifest["about"].update(catalogue_sha256="0"))
    shop.edit_json(f"shards/heldout/{MANIFEST}", lambda manifest: manifest["about"].update(tokenizer_sha256="0"))
    assert shop.violations() == {HASHES: 2}
    assert shop.examples == ["shards/train: the catalogue", "shards/heldout: the tokenizer"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_user_in_two_parts_is_found(shop: Shop) -> None:
    """Each half of the log would have its own last event."""
    user = next(d.user_id for d in shop.read("examples/toys/train"))
    home = shop.part_of(user)
    away = 1 - home
    moved: list[pa.Table] = []

    def take(table: pa.Table) -> pa.Table:
        moved.append(table.filter(pc.equal(table["user_id"], user)))
        return table.filter(pc.not_equal(table["user_id"], user))

    def give(table: pa.Table) -> pa.Table:
        both = pa.concat_tables([table, moved.pop()])
        order = sorted(range(both.num_rows), key=lambda row: slot_of("shop", both["user_id"][row].as_py()))
        return both.take(order)

    shop.edit_table(part_path(Path(), "interactions", "toys", home).as_posix(), take)
    shop.edit_table(part_path(Path(), "interactions", "toys", away).as_posix(), give)
    found = shop.violations()
    assert found[PARTS] == 1 and f"shop/{user}" in shop.examples


def test_events_that_are_missing_or_too_many_are_found(shop: Shop) -> None:
    shop.edit_json("dataset.json", lambda manifest: manifest["domains"]["games"].update(num_events=7))
    assert shop.violations() == {WHOLE: 1}
    assert "but dataset.json says 7" in shop.examples[0]


def test_cuts_that_are_not_those_of_the_settings_are_found(copy: Callable[..., Shop]) -> None:
    shop = copy(**BY_TIME)
    shop.edit_json("dataset.json", lambda manifest: manifest["cuts"].update(validation=manifest["cuts"]["test"] - 1))
    assert shop.violations()[SETTINGS] == 1


def test_dates_that_are_not_those_of_the_settings_are_found(copy: Callable[..., Shop]) -> None:
    dates = {"validation_from": "2014-08-25", "test_from": "2014-09-05"}
    shop = copy(split=SplitSpec(method="global-time", **dates))
    shop.edit_json("dataset.json", lambda manifest: manifest["cuts"].update(test=manifest["cuts"]["test"] + 1))
    assert shop.violations() == {SETTINGS: 1}
    assert shop.examples[0].startswith("test from 2014-09-05 00:00:01, before which there are ")


def test_a_split_that_is_not_that_of_the_settings_is_found(shop: Shop) -> None:
    shop.edit_json("dataset.json", lambda manifest: manifest["split"].update(method="last-n"))
    assert shop.violations()[SETTINGS] == 1


@pytest.mark.parametrize("fault", ["cut", "order", "item", "catalogue"])
def test_tables_that_cannot_be_read_give_an_unclean_certificate(copy: Callable[..., Shop], fault: str) -> None:
    shop = copy(certified=True)
    path = part_path(Path(), "interactions", "games", 1).as_posix()
    if fault == "cut":
        (shop.folder / path).write_bytes((shop.folder / path).read_bytes()[:-9])
    elif fault == "order":
        shop.edit_table(path, lambda table: table.take(list(range(table.num_rows))[::-1]))
    elif fault == "item":
        place = 1
        shop.edit_table(
            path, lambda table: table.set_column(place, table.column_names[place], pa.array(["?"] * table.num_rows))
        )
    else:
        shutil.rmtree(shop.folder / "items/domain=games")
    found = shop.violations()
    assert found == {CHANGED: 1, TABLES: 1} | ({WHOLE: 1} if fault == "cut" else {})
    assert not json.loads((shop.folder / CERTIFICATE).read_text())["clean"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_fails_and_says_what_is_wrong(
    copy: Callable[..., Shop], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.text.certificate.num_workers", lambda wanted: 1)
    shop = copy(certified=True)
    assert cli.main(["audit", str(shop.folder)]) == 0
    document = shop.spoil(
        "shards/train", lambda d: d.show(shop.titles(d.user_id, "books", TEST)[0], "books"), lambda d: d.kind == "mixed"
    )
    capsys.readouterr()
    assert cli.main(["audit", str(shop.folder)]) == 1
    said = capsys.readouterr().err
    assert f"{CERTIFICATE} is not clean: 2 of " in said
    assert f"\n  shards/train: {HELD_OUT}: 1 of " in said
    assert f"of shop/{document.user_id}" in said


@pytest.mark.slow
def test_documents_are_taken_apart_in_batches(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shards/train", "examples/books/train"):
        shop.spoil(name, lambda d: d.show("mauve book 1"), lambda d: d.kind == "specific" and d.part == 1)
    whole = shop.audit()["properties"]
    for batch in (7, 300):
        monkeypatch.setattr("cprec.data.leakage.BATCH", batch)
        assert shop.audit()["properties"] == whole


# ---- real logs -------------------------------------------------------------------------------------------------------

REAL = {
    "amazon14_beauty": ("amazon", "seconds"),
    "amazon18_giftcards": ("amazon", "seconds"),
    "movielens_100k": ("movielens", "seconds"),
    "lastfm_hetrec": ("lastfm", "order"),
    "steam_llara": ("steam", "order"),
}


def ties_by_hand(folder: Path) -> tuple[int, int, int]:
    """Of the users with three events or more: how many there are, how many have another event at the time of their
    last one, and for how many of these the last one has the greatest item id of that time."""
    items, log = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("items", "interactions"))
    titled = {row["item_id"] for row in items if any(character.isalnum() for character in row["title"] or "")}
    users: dict[str, list[tuple[int, int, str]]] = {}
    for row in log:
        if row["item_id"] in titled:
            users.setdefault(row["user_id"], []).append((row["timestamp"], row["position"], row["item_id"]))
    long = [sorted(events) for events in users.values() if len(events) > 2]
    tied = [events for events in long if events[-1][0] == events[-2][0]]
    greatest = [e for e in tied if e[-1][2] == max(item for time, _, item in e if time == e[-1][0])]
    return len(long), len(tied), len(greatest)


@pytest.mark.slow
def test_real_data_are_clean_and_their_ties_are_told(real_data: Path, tmp_path: Path) -> None:
    sources = tuple(
        TableSource(
            domain=domain,
            platform=platform,
            interactions=str(real_data / domain / "interactions.parquet"),
            items=str(real_data / domain / "items.parquet"),
            columns={"order": "position"},
            timestamps=timestamps,  # type: ignore[arg-type]
        )
        for domain, (platform, timestamps) in REAL.items()
    )
    folder = prepare(
        PrepareConfig(
            output_dir=str(tmp_path / "data"),
            tables=sources,
            target_domains=("amazon14_beauty", "amazon18_giftcards", "movielens_100k", "steam_llara"),
            pretrain_domains=("amazon14_beauty", "movielens_100k", "lastfm_hetrec", "steam_llara"),
            k_core=0,
            drop_consecutive_repeats=False,
            max_title_tokens=8,
            min_events=3,
            min_history=1,
        )
    )
    certificate = audit(folder)
    assert certificate["clean"] and sum(p["checked"] for p in certificate["properties"]) > 3_000_000
    noted = {o["name"]: o for o in certificate["observations"]}

    def find(start: str) -> dict[str, Any]:
        return next(o for name, o in noted.items() if name.startswith(start))

    for domain in ("amazon14_beauty", "amazon18_giftcards", "movielens_100k"):
        ties = find(f"queries/{domain}/test: targets that tie order")
        last = find(f"queries/{domain}/test: of the targets")
        assert (ties["checked"], ties["found"], last["found"]) == ties_by_hand(real_data / domain)
        assert last["checked"] == ties["found"]
    beauty = find("queries/amazon14_beauty/test: targets that tie order")
    by_id = find("queries/amazon14_beauty/test: of the targets")
    assert beauty["found"] / beauty["checked"] > 0.2 and by_id["found"] / by_id["checked"] > 0.9
    assert not any(name.startswith("queries/steam_llara") for name in noted)  # no times, no ties
