"""Items that are read as the same text: how many, why, what that costs, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.config import TableSource
from cprec.data.dataset import read_manifest
from cprec.errors import DataError
from cprec.text.config import PrepareConfig
from cprec.text.encoding import PromptEncoder
from cprec.text.prepare import prepare
from cprec.text.prompts import Template
from cprec.text.shared_texts import notes, shared_texts
from cprec.text.tokenizer import train_tokenizer

WORDS = ("red", "blue", "ball", "kite", "big", "12", "16")
TEMPLATE = ("domain:", "toys", "history:", "-", "next:")


@pytest.fixture(scope="module")
def by_words() -> Any:
    """One token a word; a word that is not among WORDS is [UNK], and "void" is nothing at all."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "<eos>", *WORDS, *TEMPLATE])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("void", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>")


def catalogue_of(titles: list[str], brands: list[str] | None = None) -> Catalogue:
    ids = [f"t{row}" for row in range(len(titles))]
    return Catalogue.from_tables(
        {"toys": pa.table({"item_id": ids, "title": titles, "brand": brands or [""] * len(ids)})}
    )


TITLES = [
    "red ball",
    "red ball",
    "Red ball",
    "big blue ball 12",
    "big blue ball 16",
    "kite",
    "Drachen",
    "Papierdrachen",
]


def test_items_of_one_text_are_counted_by_what_made_them_equal(by_words: Any) -> None:
    encoder = PromptEncoder(by_words, catalogue_of(TITLES), max_title_tokens=3)
    events = np.array([1, 1, 1, 2, 2, 5, 0, 0])
    found = shared_texts(encoder, by_words, "toys", events)
    assert found == {
        "items": 8,
        "texts": 4,  # red ball, big blue ball, kite, [UNK]
        "shared": 7,
        "largest": 3,
        # of 12 events 3 are of families of three, 4 of two, 5 of one; 0.6309 = 1 / log2(3)
        "best_ndcg_at_10": pytest.approx((3 * (1 + 0.6309 + 0.5) / 3 + 4 * (1 + 0.6309) / 2 + 5) / 12, abs=1e-4),
        "equal": 2,
        "equal_once_tokenised": 5,  # Red and red, Drachen and Papierdrachen
        "equal_once_cut": 2,
        "tokens_per_character": 0.21,
        "unknown_tokens": 2,
        "empty": 0,
        "examples": {
            "shared": [
                ["red ball", "Red ball"],
                ["big blue ball 12", "big blue ball 16"],
                ["Drachen", "Papierdrachen"],
            ],
            "unknown_tokens": ["Drachen", "Papierdrachen"],
            "empty": [],
        },
    }
    shared, unknown = notes("toys", found, encoder)
    assert shared == (
        "toys: 7 of 8 items are read as the same text as others (2 as they stand, 5 once tokenised, 2 once cut to "
        "max_title_tokens=3), up to 3 as one; a model that always knew the text would have an NDCG@10 of 0.866 at best."
        " As 'red ball' and 'Red ball'; 'big blue ball 12' and 'big blue ball 16'; 'Drachen' and 'Papierdrachen'. "
        "Raise max_title_tokens, or choose a tokenizer for their language, or put another field beside the title "
        "(prepare.item_fields=title,brand), or write what sets them apart into their titles"
    )
    assert unknown.startswith("toys: 2 of 8 items have words that the tokenizer does not know, as 'Drachen', 'Papier")


def test_another_field_tells_items_apart(by_words: Any) -> None:
    catalogue = catalogue_of(["red ball", "red ball", "kite"], ["big", "blue", ""])
    alone = PromptEncoder(by_words, catalogue)
    (note,) = notes("toys", shared_texts(alone, by_words, "toys", np.ones(3)), alone)
    assert note.endswith(". Put another field beside the title (prepare.item_fields=title,brand)")
    beside = PromptEncoder(by_words, catalogue, template=Template(item_fields=("title", "brand")))
    # "; big" and "; blue" are [UNK] and a word each
    found = shared_texts(beside, by_words, "toys", np.ones(3))
    assert (found["shared"], found["largest"], found["best_ndcg_at_10"]) == (0, 1, 1.0)


def test_titles_of_a_script_that_is_cut_early() -> None:
    tokenizer = train_tokenizer(["River Tulip Hazel"] * 9, 300)  # spells Japanese in bytes, three a letter
    catalogue = catalogue_of(
        [f"\u9759\u53f0\u8449\u5ca1\u5e83\u4eac\u5e4c\u90fd\u8272{n}" for n in range(10)] + ["River"]
    )
    for most, shared in ((27, 10), (40, 0)):
        encoder = PromptEncoder(tokenizer, catalogue, max_title_tokens=most)
        found = shared_texts(encoder, tokenizer, "toys", np.zeros(11))
        assert (found["equal_once_cut"], found["unknown_tokens"]) == (shared, 0)
        told = notes("toys", found, encoder)
        assert len(told) == (shared > 0)
        assert all("Raise max_title_tokens, or choose a tokenizer for their language" in note for note in told)


def test_no_other_tokenizer_for_titles_that_are_read_in_words() -> None:
    tokenizer = train_tokenizer(["River Tulip Hazel", "River Tulip Amber"] * 9, 400)
    encoder = PromptEncoder(tokenizer, catalogue_of(["River Tulip Hazel", "River Tulip Amber"]), max_title_tokens=2)
    (note,) = notes("toys", shared_texts(encoder, tokenizer, "toys", np.ones(2)), encoder)
    assert "Raise max_title_tokens, or put another field beside the title" in note


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., PrepareConfig]:
    def make(titles: list[str], **changes: Any) -> PrepareConfig:
        items = "".join(f"t{row},{title}\n" for row, title in enumerate(titles))
        (tmp_path / "items.csv").write_text("item_id,title\n" + items)
        count = len(titles)
        log = "".join(
            f"u{user},t{(user + step) % count},{1_400_000_000 + step}\n" for user in range(30) for step in range(6)
        )
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + log)
        table = TableSource(domain="toys", interactions=str(tmp_path / "log.csv"), items=str(tmp_path / "items.csv"))
        settings = {"output_dir": str(tmp_path / "data"), "tables": (table,), "target_domains": ("toys",), "workers": 1}
        return PrepareConfig(**settings | {"k_core": 0, "min_events": 3, "heldout_share": 0.0} | changes)

    return make


def test_prepare_says_and_writes_it(
    config: Callable[..., PrepareConfig], by_words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_words.save_pretrained(tmp_path / "words")
    folder = prepare(config(TITLES, tokenizer=str(tmp_path / "words"), max_title_tokens=3))
    told = " ".join(capsys.readouterr().err.split())
    assert "note: toys: 7 of 8 items are read as the same text as others" in told
    assert "note: toys: 2 of 8 items have words that the tokenizer does not know" in told
    texts = read_manifest(folder)["domains"]["toys"]["texts"]
    assert (texts["shared"], texts["largest"], texts["unknown_tokens"]) == (7, 3, 2)
    # u0 to u29 have six events in a row of eight items each: every item has 22 or 23 of the 180
    assert texts["best_ndcg_at_10"] == pytest.approx((3 * 0.7103 + 4 * 0.8155 + 1) / 8, abs=0.005)
    assert json.loads((folder / "certificate.json").read_text())["clean"]


def test_a_title_of_which_the_tokenizer_leaves_nothing_stops_a_target(
    config: Callable[..., PrepareConfig], by_words: Any, tmp_path: Path
) -> None:
    by_words.save_pretrained(tmp_path / "words")
    with pytest.raises(DataError, match="the tokenizer leaves nothing of 1 items of domain 'toys', as 'void': choose"):
        prepare(config(["red", "void", "ball"], tokenizer=str(tmp_path / "words")))
