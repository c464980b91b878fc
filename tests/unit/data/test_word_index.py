"""Items by the words of a query: log P(query | item), worked out by hand, and what no query can be."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.word_index import MAX_QUERY, WordIndex, check_query
from cprec.errors import DataError

SHOP = pa.table(
    {
        "item_id": ["a", "b", "c"],
        "title": ["Red kettle", "Blue Kettle, kettle", "Cafe\u0301 cup"],
        "brand": ["Acme", None, ""],
        "categories": ["", "Kitchen", "Kitchen"],
    }
)


@pytest.fixture
def shop() -> Catalogue:
    return Catalogue.from_tables({"shop": SHOP})


def test_a_word_adds_what_bayes_rule_gives_it(shop: Catalogue) -> None:
    # Ten words in all: red kettle acme, blue kettle kettle kitchen, café cup kitchen. "kettle" is three of them.
    words, effects_WN = shop.words_of("shop").effects("KETTLE acme")
    assert words == ["kettle", "acme"]
    of_all = {"kettle": 3 / 10, "acme": 1 / 10}
    own = {"kettle": [1 / 3, 2 / 4, 0], "acme": [1 / 3, 0, 0]}
    expected = [
        [math.log(0.9 * share + 0.1 * of_all[word]) - math.log(0.1 * of_all[word]) for share in own[word]]
        for word in words
    ]
    np.testing.assert_allclose(effects_WN, expected, rtol=1e-12, atol=1e-15)
    assert effects_WN[1, 1] == 0.0  # exactly: what lacks a word ties


def test_a_repeated_word_counts_once_and_forms_of_unicode_are_alike(shop: Catalogue) -> None:
    index = shop.words_of("shop")
    assert index.matched(2, "ＣＡＦÉ cup café nothing") == index.matched(2, "café cup")
    assert list(index.matched(0, "kettle red")) == ["red", "kettle"]  # the rarer one adds more
    assert index.matched(2, "kettle") == {}


def test_items_that_have_a_word_and_may_be_returned(shop: Catalogue) -> None:
    assert shop.items_with_words("shop", "kitchen red", lambda _: True) == {"a", "b", "c"}
    assert shop.items_with_words("shop", "kettle", lambda item: item != "a") == {"b"}
    with pytest.raises(DataError, match=r"all items .* \(2\) are in the history, withdrawn or filtered out"):
        shop.items_with_words("shop", "kettle", lambda item: item == "c")
    with pytest.raises(DataError, match="query='kettles': no item of domain 'shop' has any .* near are kettle"):
        shop.items_with_words("shop", "kettles", lambda _: True)
    with pytest.raises(DataError, match="use other words"):
        shop.items_with_words("shop", "xylophone", lambda _: True)


def test_requests_that_come_at_once_build_one_index(shop: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[WordIndex] = []
    another, both = threading.Thread(target=lambda: shop.words_of("shop")), threading.Event()

    def build(texts: Any) -> WordIndex:
        if built or another.is_alive():
            both.set()
        else:
            another.start()
            both.wait(0.1)  # for as long as the other may need to begin, too
        built.append(WordIndex(texts))
        return built[-1]

    monkeypatch.setattr("cprec.data.catalogue.WordIndex", build)
    index = shop.words_of("shop")
    another.join()
    assert built == [index] and not both.is_set()


@pytest.mark.parametrize("texts", [[], ["", "!"]])
def test_without_any_word_nothing_is_known(texts: list[str]) -> None:
    words, effects_WN = WordIndex(texts).effects("red")
    assert words == [] and effects_WN.shape == (0, len(texts))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "query='' has no word"),
        (" .. !", "has no word"),
        (7, "query=7 is a int"),
        (None, "is a NoneType"),
        ("a" * (MAX_QUERY + 1), "query has 2,001 characters: give 2,000 at most"),
    ],
)
def test_what_is_no_query(query: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_query(query)
    assert check_query("a" * MAX_QUERY)
