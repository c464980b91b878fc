from __future__ import annotations

import pytest

from cprec.data.cleaning import clean_title, has_word, spelling


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
        ("a<b", "a<b"),
        ("a<b and c>d", "a<b and c>d"),
        ("Lamp <!-- big -->red", "Lamp red"),
        ("\u06dd\u0661 \u0e01\u0e33\u200b\u0e41\u0e1e\u0e07", "\u06dd\u0661 \u0e01\u0e33\u0e41\u0e1e\u0e07"),
        ("I <3 you", "I <3 you"),
        ("Map<Key,Value> in Depth", "Map<Key,Value> in Depth"),
        ("<untitled>", "<untitled>"),
        ("<Artist Name>", "<Artist Name>"),
        ("<Time>, <Data Day> and <b day>", "<Time>, <Data Day> and <b day>"),
        ("<BR>One<br/>two</P>", "One two"),
        ("<Font Color=red size='1'>Red</Font >", "Red"),
        ('<img alt="5 > 3" src=a.png hidden>Sum', "Sum"),
        ("&lt;a title=&quot;big <i>lamp</i>&quot;&gt;Lamp&lt;/a&gt;", "Lamp"),
        ("AT&T, R&B; 5 &copy &lt 6", "AT&T, R&B; 5 &copy &lt 6"),
        ("AT&amp;amp;amp;T &notit; &eacute;&#xe9;&#233;", "AT&T &notit; ééé"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\u200c\u0645\u06cc\u200c \u062e\u200c!", "\u0645\u06cc \u062e!"),
        ("\u0d28\u0d4d\u200d a", "\u0d28\u0d4d\u200d a"),
        ("Auf\u200clage\u200d.", "Auf\u200clage"),
        (
            "\U0001f469\U0001f3fd\u200d\U0001f4bb x \u2764\ufe0f\u200d\U0001f525 1\ufe0f\u20e3",
            "\U0001f469\U0001f3fd\u200d\U0001f4bb x \u2764\ufe0f\u200d\U0001f525 1\ufe0f\u20e3",
        ),
        (
            "\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f Wales \U000e0041\U000e0042",
            "\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f Wales",
        ),
        ("\U0001f1f0\U0001f1f7 \u1112\u1161\u11ab", "\U0001f1f0\U0001f1f7 \ud55c"),
        ("\u2067\u0633\u0644\u0627\u0645\u2069 \u200e1\u200f", "\u0633\u0644\u0627\u0645 1"),
        ("\u3164\u2063\u061c", ""),
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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("US", "us"),
        ("Red  Ball.", "red ball"),
        ("Stra\u00dfe", "STRASSE"),
        ("\uff21\uff22\uff23", "abc"),
        ("\ufb01n", "FIN"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645"),
        ("\u2764\ufe0f 1", "\u2764 1"),
    ],
)
def test_spellings_of_a_title_are_alike(one: str, other: str) -> None:
    assert spelling(one) == spelling(other)
    assert spelling(one) == spelling(spelling(one))


def test_other_words_are_spelt_another_way() -> None:
    assert len({spelling(title) for title in ("resume", "r\u00e9sum\u00e9", "re sume")}) == 3
