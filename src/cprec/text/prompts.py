"""The wording of every document and prompt, in pre-training, fine-tuning, scoring and decoding.

`Template` holds the words. `render` puts them together as text, for people and tests; `encoding.PromptEncoder` puts
together the same pieces as token ids, for models.

One unified template (CPRec, Ma et al. 2025, ask for one; the wording is ours, see docs/papers.md):

    Domain: {scope}                     scope: the domain's name, or "multiple" for a mixed sequence
    History:
    - {line}                            line: the title, or "[{domain}] {title}" in a mixed sequence
    - {line}
    Next: {line}<eos>

A title may be followed by other fields of its item, as "{title}; {brand}; {categories}".

Two kinds of documents tell of no user. A rule is a pair of items with its numbers, and an item text is an item with
other fields:

    Domain: {domain}
    Those who chose {title} also chose {title}: {percent}% of them ({n} users), {lift} times as often as all users.<eos>

    Domain: {domain}
    The item {title} is by {brand} and belongs to {categories}.<eos>

A prompt is a sequence of *pieces* (a template part, a domain tag, a title). Each piece is tokenised once and on its
own, so a title has the same tokens in every document, prompt and decoding trie. Pieces start with their own white
space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cprec.errors import ConfigError
from cprec.schema import BRAND, CATEGORIES, KINDS, MIXED, TITLE

ITEM_FIELDS = (TITLE, BRAND, CATEGORIES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The fixed parts of the unified template. Raises ConfigError for item fields that are not in ITEM_FIELDS."""

    scope: str = "Domain:"
    history: str = "\nHistory:"
    line: str = "\n-"
    next: str = "\nNext:"
    mixed_scope: str = "multiple"
    item_fields: tuple[str, ...] = (TITLE,)
    """The fields that stand for an item: its title, then others."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_fields", tuple(self.item_fields))  # files hold lists
        wrong = set(self.item_fields) - set(ITEM_FIELDS)
        if self.item_fields[:1] != (TITLE,) or wrong or len(set(self.item_fields)) < len(self.item_fields):
            raise ConfigError(
                f"item_fields={', '.join(self.item_fields)}: begin with title, then brand or categories, each once"
            )

    def head(self, scope: str) -> str:
        """Everything before the first line; `scope` is a domain's name or `mixed_scope`."""
        return f"{self.scope} {scope}{self.history}"

    def sentence(self, domain: str, opening: str) -> str:
        """How a document begins that is a sentence on items of a domain."""
        return f"{self.scope} {domain}\n{opening}"

    def tag(self, domain: str) -> str:
        """The tag before each title of a mixed sequence, which shows the item's domain."""
        return f" [{domain}]"

    def title(self, title: str) -> str:
        """A title as a piece: it begins with the space after the dash, the tag or `Next:`."""
        return f" {title}"

    def field(self, text: str) -> str:
        """Another field of an item as a piece after its title; nothing where the item has none."""
        return f"; {text}" if text else ""


def render(
    template: Template,
    kind: str,
    domain: str,
    history: Sequence[tuple[str, str]],
    target: tuple[str, str] | None = None,
    eos: str = "",
) -> str:
    """The text of a document (with a target) or of a prompt that asks for one (without).

    `history` and `target` hold (domain, title) pairs, oldest first; other fields of an item may follow its title.
    `domain` is the scope of a specific sequence and the domain asked for in a mixed prompt. `encoding.PromptEncoder`
    assembles the tokens of this text in arrays.

    >>> print(render(Template(), "specific", "books", [("books", "Dune")], ("books", "Emma"), "<eos>"))
    Domain: books
    History:
    - Dune
    Next: Emma<eos>
    >>> print(render(Template(), "mixed", "games", [("books", "Dune"), ("games", "Go")]))
    Domain: multiple
    History:
    - [books] Dune
    - [games] Go
    Next: [games]
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    mixed = kind == MIXED

    def line(event: tuple[str, str]) -> str:
        return (template.tag(event[0]) if mixed else "") + template.title(event[1])

    parts = [template.head(template.mixed_scope if mixed else domain)]
    parts += [template.line + line(event) for event in history]
    parts.append(template.next)
    if target is not None:
        parts += [line(target), eos]
    elif mixed:
        parts.append(template.tag(domain))
    return "".join(parts)


OFFERED = "\nCandidates:"
"""What stands before the titles of candidates, in prompts of systems that list them after the history."""

CHOSE, ALSO_CHOSE, THE_ITEM = "Those who chose", " also chose", "The item"
"""What stands before titles in sentences."""


def rule_numbers(support: int, confidence: float, lift: float) -> str:
    """How a rule ends.

    >>> rule_numbers(6, 0.1234, 8.04)
    ': 12% of them (6 users), 8 times as often as all users.'
    >>> rule_numbers(12, 1.0, 0.456)
    ': 100% of them (12 users), 0.46 times as often as all users.'
    """
    return f": {_short(100 * confidence)}% of them ({support} users), {_short(lift)} times as often as all users."


def item_fields(brand: str, categories: str) -> str:
    """What a sentence says of an item; nothing of one that has neither field.

    >>> item_fields("Ace", "Novels"), item_fields("", "Novels"), item_fields("", "")
    (' is by Ace and belongs to Novels.', ' belongs to Novels.', '')
    """
    told = [f" is by {brand}"] * bool(brand) + [f" belongs to {categories}"] * bool(categories)
    return " and".join(told) + "." if told else ""


def _short(number: float) -> str:
    """Two digits, or all those before the point."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
