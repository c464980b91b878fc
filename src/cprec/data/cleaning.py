"""Cleans titles: each becomes one line of plain text."""

from __future__ import annotations

import html
import html.entities
import re
import unicodedata

_HTML = """
    a abbr acronym address applet area article aside audio b base basefont bdi bdo big blink blockquote body br
    button canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed
    fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe img
    input ins kbd label legend li link main map mark marquee math menu meta meter nav nobr noframes noscript object ol
    optgroup option output p param picture pre progress q rp rt ruby s samp script search section select slot small
    source span strike strong style sub summary sup svg table tbody td template textarea tfoot th thead time title tr
    track tt u ul var video wbr
"""
_ELEMENTS = frozenset(_HTML.split())
"""The elements of HTML, those that are obsolete included."""

_ATTRIBUTE = r"[a-zA-Z_:@][-\w:.@]*"
_VALUE = r"""\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
_TAG = re.compile(
    rf"</?([a-zA-Z][a-zA-Z0-9]*)(\s+{_ATTRIBUTE}{_VALUE}(?:\s+{_ATTRIBUTE}(?:{_VALUE})?)*)?\s*/?>|<!--[^<>]*-->"
)
_ENTITY = re.compile("&(#[0-9]{1,8}|#[xX][0-9a-fA-F]{1,8}|[a-zA-Z][a-zA-Z0-9]*);")

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]")
_JOINERS = re.compile("[\u200c\u200d]+")
_JOINED = re.compile(r"[^\s!-/:-@\[-`{-~\u2000-\u206f]")
"""A character that a joiner may stand beside: part of a word or an emoji."""
_JOINING = re.compile("[\u0600-\u0dff]")
"""Arabic and Indic letters and marks: a joiner may shape one that ends a word."""
_TAGS = re.compile("[\U000e0000-\U000e007f]+")
_QUOTED = re.compile("['\u2018](.*)['\u2019]")
_QUOTES = re.compile('["\u201c\u201d\u201e\u201f\u00ab\u00bb]')
_SPACES = re.compile(r"\s+")
_ODD = re.compile(
    '[<&"\x00-\x1f\x7f-\xa0\u00ab\u00ad\u00bb\u061c\u1680\u2000-\u200f\u201c-\u201f\u2028-\u202f\u205f-\u206f\u3000'
    "\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Characters that cleaning may change inside a title; most titles have none of them."""


def clean_title(text: str) -> str:
    """A title as it is written into prompts: one line of plain text.

    HTML entities are resolved (also escaped twice or more; they need their semicolon), tags of HTML and double quotes
    removed, control characters and runs of white space become one space, single quotes around the whole and dots at the
    end go. Of the invisible characters joiners inside words and emoji stay, and variation selectors. '' where nothing
    is left.

    >>> clean_title('Ben &amp;amp; Jerry&#39;s  "Half\\nBaked"...')
    "Ben & Jerry's Half Baked"
    >>> clean_title("'Ocean&quot;s 11 <b>DVD</b>'.")
    'Oceans 11 DVD'
    >>> clean_title("I <3 R&B: Map<Key, Value> &copy <untitled>")
    'I <3 R&B: Map<Key, Value> &copy <untitled>'
    """
    may_change = _ODD.search(text) or "  " in text or text[:1] in " '\u2018" or text[-1:] in " .\u2026"
    if not may_change and unicodedata.is_normalized("NFC", text):
        return text
    while True:  # until nothing changes: cleaning a clean title leaves it alone
        before = text
        text = unicodedata.normalize("NFC", _without_markup(text))
        text = _QUOTES.sub("", _CONTROL.sub(" ", _INVISIBLE.sub("", text)))
        text = _TAGS.sub(_flag, _JOINERS.sub(_joiner, text))
        text = _SPACES.sub(" ", text).strip().rstrip(". \u2026")
        while quoted := _QUOTED.fullmatch(text):
            text = quoted[1].strip().rstrip(". \u2026")
        if text == before:
            return text


def one_line(text: str) -> str:
    """A text with single spaces, in Unicode's composed form (NFC): to a reader it looks the same.

    >>> one_line(" Cafe\u0301\\n  Noir ")
    'Café Noir'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def spelling(title: str) -> str:
    """A title without case, invisible characters and differences of spaces and Unicode forms.

    >>> spelling("ＣＡＦＥ\u0301  Noir") == spelling("café noir")
    True
    """
    title = clean_title(title)
    if title.isascii():
        return title.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", title).casefold())
    return clean_title("".join(c for c in folded if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f"))


def has_word(text: str) -> bool:
    """Whether a title says anything: it holds a letter or a digit (some films are called "187")."""
    return any(character.isalnum() for character in text)


def _without_markup(text: str) -> str:
    while "<" in text or "&" in text:
        plain = _ENTITY.sub(_character, _TAG.sub(_without_element, text))
        if plain == text:
            break
        text = plain
    return text


def _without_element(tag: re.Match[str]) -> str:
    """A space in place of a tag of HTML; other text in angle brackets stays, such as "<Time>"."""
    name, attributes = tag[1], tag[2]
    if name is None:  # a comment
        return " "
    may_be_html = attributes or tag[0].startswith("</") or name.islower() or name.isupper()
    return " " if may_be_html and name.lower() in _ELEMENTS else tag[0]


def _character(entity: re.Match[str]) -> str:
    if entity[1].startswith("#"):
        return html.unescape(entity[0])
    return html.entities.html5.get(f"{entity[1]};", entity[0])


def _joiner(run: re.Match[str]) -> str:
    """The last of a run of joiners inside a word or an emoji; nothing elsewhere."""
    before, after = run.string[max(run.start() - 1, 0) : run.start()], run.string[run.end() : run.end() + 1]
    shapes_end = run[0][-1] == "\u200d" and _JOINING.match(before)
    return run[0][-1] if _JOINED.match(before) and (_JOINED.match(after) or shapes_end) else ""


def _flag(tags: re.Match[str]) -> str:
    """The invisible letters that name a flag, as that of Wales, and close; nothing elsewhere."""
    is_flag = tags.string[: tags.start()].endswith("\U0001f3f4") and tags[0].endswith("\U000e007f")
    return tags[0] if is_flag else ""
