"""HTML pages from the templates beside this file: each is one file that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cprec.evaluate.grid import Grid
from cprec.evaluate.results import Example

SHOWN_HISTORY = 8
"""Latest events of an example's history that are shown."""

TEMPLATES = Environment(
    loader=PackageLoader("cprec.evaluate", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, in this order; what is empty is not shown."""

    title: str = ""
    boxed: bool = False
    warning: str = ""
    points: Sequence[tuple[str, str]] = ()
    """A list: the kind of each statement, which may be empty, and its text."""
    figures: Mapping[str, Markup] = field(default_factory=dict)
    """Drawings by caption."""
    tables: Sequence[Grid] = ()
    terms: Mapping[str, str] = field(default_factory=dict)
    """Names, and what each stands for."""
    details: Sequence[Grid] = ()
    """Further tables, side by side where there is room."""
    fold: str = ""
    """The line to which a reader can fold terms and details; empty where they always show."""
    notes: Sequence[str] = ()
    examples: Sequence[Example] = ()


def render(title: str, sections: Sequence[Section], introduction: str = "") -> str:
    """The text of a page. All text is escaped; drawings are not, since `charts` has escaped the text in them."""
    template = TEMPLATES.get_template("page.html")
    return template.render(title=title, sections=sections, introduction=introduction, shown_history=SHOWN_HISTORY)
