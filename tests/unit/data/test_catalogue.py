from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue, clean_title, has_word
from cprec.errors import DataError, UnknownItemError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Plain title", "Plain title"),
        ("Salt &amp; Pepper", "Salt & Pepper"),
        ("Salt &amp;amp; Pepper", "Salt & Pepper"),
        ("It&#39;s", "It's"),
        ("12&quot; Pan", "12 Pan"),
        ('"Quoted"', "Quoted"),
        ("'Quoted'", "Quoted"),
        ("Boys' Boots", "Boys' Boots"),
        ("two\nlines\r\n\tand tabs", "two lines and tabs"),
        ("nul\x00 and\x85more", "nul and more"),
        ("  many    spaces ", "many spaces"),
        ("Lotion, 4.50-Fluid Ounce...", "Lotion, 4.50-Fluid Ounce"),
        ("Trailing dots . .", "Trailing dots"),
        ('<span id="productTitle">Lamp</span>', "Lamp"),
        ("5 < 6 > 4", "5 < 6 > 4"),
        ("zero\u200bwidth", "zerowidth"),
        ("Cafe\u0301", "Café"),
        ("...", ""),
        ("", ""),
    ],
)
def test_titles_become_one_line_of_plain_text(raw: str, clean: str) -> None:
    assert clean_title(raw) == clean
    assert clean_title(clean) == clean


def test_a_title_needs_a_letter_or_a_digit() -> None:
    assert has_word("187") and has_word("é") and has_word("東京")
    assert not has_word("") and not has_word("- ? !")


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
    assert catalogue.find_titles("books", ["Emma"]).tolist() == [1], "of equal titles the first row is meant"
    with pytest.raises(
        UnknownItemError, match=r"1 item is not .*, by id or title: ' Blue ball' \(nearest: 'Red Ball'\)"
    ):
        catalogue.find_titles("toys", [" Blue ball"])


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
