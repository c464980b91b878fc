"""The only place where behaviour becomes text, for every stage: pre-training, fine-tuning, scoring and decoding.

One unified template (CPRec, Ma et al. 2025, ask for one; the wording is ours, see docs/papers.md):

    Domain: {scope}                     scope: the domain's name, or "multiple" for a mixed sequence
    History:
    - {line}                            line: the title, or "[{domain}] {title}" in a mixed sequence
    - {line}
    Next: {line}<eos>

A title may be followed by other fields of its item, as "{title}; {brand}; {categories}".

A prompt is a sequence of *pieces* (a template part, a domain tag, a title). Each piece is tokenised once and on its
own, so a title has the same tokens in every document, prompt and decoding trie. Pieces start with their own white
space.
"""

from __future__ import annotations

from collections.abc import Sequence

from cprec.schema import KINDS, MIXED
from cprec.text.config import Template


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
