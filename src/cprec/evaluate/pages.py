"""A page as a list of sections: one HTML file that needs nothing from elsewhere, or lines in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from cprec.evaluate.grid import Grid, print_line
from cprec.evaluate.results import Example

SHOWN_HISTORY = 8
"""Latest events of an example's history that are shown."""

TEMPLATES = Environment(
    loader=PackageLoader("cprec.evaluate", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: f"{value:.1f}" if isinstance(value, float) else value,  # coordinates of drawings
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
    """Drawings by caption; not in the terminal."""
    tables: Sequence[Grid] = ()
    terms: Mapping[str, str] = field(default_factory=dict)
    """Names, and what each stands for."""
    details: Sequence[Grid] = ()
    """Further tables, side by side where there is room; not in the terminal."""
    fold: str = ""
    """The line to which a reader can fold terms and details; empty where they always show."""
    notes: Sequence[str] = ()
    examples: Sequence[Example] = ()


def render(title: str, sections: Sequence[Section], introduction: str = "") -> str:
    """The text of a page. All text is escaped."""
    template = TEMPLATES.get_template("page.html")
    return template.render(title=title, sections=sections, introduction=introduction, shown_history=SHOWN_HISTORY)


def print_sections(console: Console, sections: Sequence[Section]) -> None:
    """Print sections in the terminal, without their figures and details."""
    for section in sections:
        if section.title:
            console.print()
            print_line(console, section.title, "bold")
        if section.warning:
            print_line(console, section.warning, "bold red")
        for grid in section.tables:
            if grid.rows:
                console.print(grid.for_terminal())
                console.print()
        for kind, text in section.points:
            print_line(console, f"{kind}: {text}" if kind else text, indent=2)
        for name, text in section.terms.items():
            print_line(console, f"{name}: {text}", "dim", 2)
        for note in section.notes:
            print_line(console, note, "dim")
        for example in section.examples:
            _print_example(console, example)
    console.print()


def _print_example(console: Console, example: Example) -> None:
    more = len(example.history) - SHOWN_HISTORY
    console.print()
    print_line(console, f"User {example.user} in {example.domain}", "bold")
    print_line(console, f"had, latest last{f' ({more:,} earlier left out)' if more > 0 else ''}:", indent=2)
    for title in example.history[-SHOWN_HISTORY:]:
        print_line(console, title, indent=5)
    print_line(console, "held out, came next:", indent=2)
    print_line(console, example.target, "bold", 5)
    for arm, found in example.recommendations.items():
        print_line(console, f"{arm} recommends:", indent=2)
        for place, (title, score) in enumerate(found, 1):
            hit = title == example.target
            text = f"{place}. {title} ({score:.2f}){'  <- came next' if hit else ''}"
            print_line(console, text, "green" if hit else "", 5)
