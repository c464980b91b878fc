from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.data import catalogue as catalogue_module
from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import spelling
from cprec.errors import DataError, UnknownItemError


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue.from_tables(
        {
            "toys": pa.table({"item_id": ["t1", "t2"], "title": ["Red Ball", "Doll"], "brand": ["Acme", None]}),
            "books": pa.table({"item_id": ["b3", "b1", "b2"], "title": ["Emma", "Ulysses", "emma"]}),
        }
    )


def test_rows_are_sorted_by_domain_and_item(catalogue: Catalogue) -> None:
    assert catalogue.domains == ("books", "toys")
    assert catalogue.item_id.tolist() == ["b1", "b2", "b3", "t1", "t2"]
    assert catalogue.domain.tolist() == [0, 0, 0, 1, 1]
    assert catalogue.domain.dtype == np.int16
    assert catalogue.brand.tolist() == ["", "", "", "Acme", ""]
    assert catalogue.rows_of("toys").tolist() == [3, 4]
    assert len(catalogue) == 5


def test_find_answers_in_the_order_asked(catalogue: Catalogue) -> None:
    assert catalogue.find("books", ["b3", "b1", "b3"]).tolist() == [2, 0, 2]
    assert catalogue.find("books", []).tolist() == []


def test_unknown_ids_are_named_with_the_nearest(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownItemError) as raised:
        catalogue.find("books", ["b1", "b33", *(f"x{n}" for n in range(9))])
    message = str(raised.value)
    assert "10 items are not among the 3 of domain 'books', by id: 'b33' (nearest: 'b3'" in message
    assert message.endswith("; and 5 more")


def test_an_id_of_another_domain_is_unknown(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownItemError, match="1 item is not among the 3 of domain 'books', by id: 't1'"):
        catalogue.find("books", ["t1"])


def test_titles_are_found_after_cleaning_whatever_their_case(catalogue: Catalogue) -> None:
    assert catalogue.find_titles("toys", ["  red   BALL. "]).tolist() == [3]
    assert catalogue.find_titles("books", ["Emma", "emma", "Emma."]).tolist() == [2, 1, 2], "exact ones first"
    with pytest.raises(
        UnknownItemError, match=r"1 item is not .*, by id or title: ' Blue ball' \(nearest: 'Red Ball'\)"
    ):
        catalogue.find_titles("toys", [" Blue ball"])


@pytest.fixture
def alike() -> Catalogue:
    def table(**titles: str) -> pa.Table:
        return pa.table({"item_id": list(titles), "title": list(titles.values())})

    return Catalogue.from_tables(
        {
            "films": table(f1="US", f2="Us", f3="Twin Title", f4="Twin Title", f5="Solaris", f6="f1", f7="Strasse"),
            "books": table(b1="us", b2="Solaris", b3="SOLARIS", b4="Dune", b5="\u0645\u06cc\u200c\u062e", f9="Kite"),
            "games": table(g1="dune", g2="Go"),
        }
    )


@pytest.mark.parametrize(
    ("text", "kind", "item_id"),
    [
        ("US", "any", "f1"),
        ("Us", "any", "f2"),
        ("us", "any", "b1"),  # exact in another domain goes before another spelling in this one
        ("Us.", "any", "f2"),
        ("Twin Title", "any", "f3"),  # of equal titles the first
        (" twin  TITLE", "any", "f3"),
        ("solaris", "any", "f5"),  # of the domain's own spellings one, whatever others have
        ("SOLARIS", "any", "b3"),
        ("f1", "any", "f1"),  # an id goes before a title
        ("f1", "title", "f6"),
        ("F1", "any", "f6"),
        ("f2", "title", None),
        ("f9", "any", "f9"),
        ("go", "item_id", None),
        ("STRA\u00dfE", "any", "f7"),
        ("Ｇｏ", "any", "g2"),
        ("\u0645\u06cc\u062e", "any", "b5"),
        ("&lt;b&gt;Go", "any", "g2"),
        ("", "any", None),
        ("...", "any", None),
    ],
)
def test_a_text_means_an_id_then_an_exact_title_then_another_spelling(
    alike: Catalogue, text: str, kind: Any, item_id: str | None
) -> None:
    row = alike.look_up(text, "films", kind)
    assert (None if row is None else alike.item_id[row]) == item_id


def test_a_spelling_of_several_titles_is_refused_with_their_names(alike: Catalogue) -> None:
    named = r"'uS' is not a title as it is written, and may mean 'US' \(f1 of films\), 'Us' \(f2 of films\): write "
    for find in (lambda: alike.look_up("uS", "films"), lambda: alike.find_titles("films", ["US", "uS"])):
        with pytest.raises(UnknownItemError, match=named):
            find()
    with pytest.raises(UnknownItemError, match=r"may mean 'Dune' \(b4 of books\), 'dune' \(g1 of games\)"):
        alike.look_up("DUNE", "films")
    assert alike.look_up("DUNE", "games") == alike.find("games", ["g1"])[0]
    assert alike.look_up("Dune", "films", elsewhere=False) is None


def test_a_look_up_spells_its_own_text_alone(alike: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    alike.index()
    spelt: list[str] = []
    monkeypatch.setattr(catalogue_module, "spelling", lambda text: spelt.append(text) or spelling(text))
    monkeypatch.setattr(catalogue_module, "offsets_of", None)  # what `of_equal_text` needs is there too
    assert alike.look_up("STRASSE", "films") == alike.find("films", ["f7"])[0]
    with pytest.raises(UnknownItemError):
        alike.look_up("uS", "films")
    assert spelt == ["STRASSE", "uS"]
    assert alike.of_equal_text("films", ["f4"]) == {"f3", "f4"}


def test_items_of_equal_text_are_found_by_the_fields_in_use() -> None:
    titles = ["Twin", "twin", "Twin", "Other", "Twin"]
    table = pa.table({"item_id": list("abcde"), "title": titles, "brand": ["x", "x", "y", "x", "x"]})
    catalogue = Catalogue.from_tables({"toys": table, "books": table.slice(0, 1)})
    assert catalogue.of_equal_text("toys", ["a", "d", "a"]) == {"a", "c", "d", "e"}
    assert catalogue.of_equal_text("toys", ["c"], ("title", "brand")) == {"c"}
    assert catalogue.of_equal_text("toys", ["e"], ("title", "brand")) == {"a", "e"}
    assert catalogue.of_equal_text("books", ["a"]) == {"a"}
    assert catalogue.of_equal_text("books", []) == frozenset()
    with pytest.raises(UnknownItemError, match="'z'"):
        catalogue.of_equal_text("toys", ["z"])


def test_an_unknown_domain_is_named_with_those_known(catalogue: Catalogue) -> None:
    with pytest.raises(DataError, match="there is no domain 'games'; the data has books, toys"):
        catalogue.rows_of("games")


def test_a_catalogue_is_read_as_it_was_written(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.write(tmp_path)
    again = Catalogue.read(tmp_path)
    assert again.domains == catalogue.domains
    for name in ("domain", "item_id", "title", "brand", "categories"):
        assert getattr(again, name).tolist() == getattr(catalogue, name).tolist()
    assert again.digest() == catalogue.digest()


def test_the_digest_sees_every_field(catalogue: Catalogue) -> None:
    tables = {"books": pa.table({"item_id": ["b1"], "title": ["Emma"]})}
    other = {"books": pa.table({"item_id": ["b1"], "title": ["Emma"], "categories": ["novel"]})}
    assert Catalogue.from_tables(tables).digest() != Catalogue.from_tables(other).digest()


def test_an_id_that_occurs_twice_is_refused() -> None:
    with pytest.raises(DataError, match="item id 'a' occurs twice in domain 'books'"):
        Catalogue.from_tables({"books": pa.table({"item_id": ["a", "a"], "title": ["x", "y"]})})


def test_a_folder_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no catalogue"):
        Catalogue.read(tmp_path)
