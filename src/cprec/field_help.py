"""The help on a configuration: each field's key, type and default, and the docstring under it in the source."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from cprec.settings import describe_type, field_type, is_required, settable_fields


class FieldHelp(NamedTuple):
    """The help on one field."""

    key: str
    type: str
    default: str | None
    """None for a field that must be given."""
    text: str


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring literal under each field of a dataclass, read from its source; inherited fields included."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        except (OSError, TypeError):
            continue  # no source: a zipped or compiled installation
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                literal = text.value
                if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                    docs[field.target.id] = re.sub(r"\s+", " ", literal.value).strip()
    return docs


def describe_fields(cls: type, prefix: str = "", instance: Any = None) -> list[FieldHelp]:
    """Every field of a configuration class with type, default and docstring; nested ones follow under dotted keys.

    `instance` gives defaults that differ from those of the class. Entries of a tuple are numbered: `sources.0.path`.
    """
    docs = field_docs(cls)
    rows: list[FieldHelp] = []
    for name, field in settable_fields(cls).items():
        annotation = field_type(cls, name)
        required = instance is None and is_required(field)
        value = None if required else _default_of(field) if instance is None else getattr(instance, name)
        nested = _nested_configs(annotation)
        if not dataclasses.is_dataclass(annotation):
            default = None if required else show_value(value) if not nested or not value else "(below)"
            rows.append(FieldHelp(f"{prefix}{name}", describe_type(annotation), default, docs.get(name, "")))
        elif name in docs:
            rows.append(FieldHelp(f"{prefix}{name}.*", "group of settings", "(below)", docs[name]))
        for inner, key in nested:
            rows += describe_fields(inner, f"{prefix}{name}.{key}", value if type(value) is inner else None)
    return rows


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _nested_configs(annotation: Any) -> list[tuple[type, str]]:
    """The configuration classes in an annotation, each with the prefix of its keys."""
    if dataclasses.is_dataclass(annotation):
        return [(typing.cast(type, annotation), "")]
    origin = get_origin(annotation)
    if origin in (dict, Mapping, Literal):
        return []
    number = "0." if origin in (tuple, list, Sequence) else ""
    return [(inner, number + key) for entry in get_args(annotation) for inner, key in _nested_configs(entry)]


def show_value(value: Any) -> str:
    """A value as it would be typed on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(show_value(entry) for entry in value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{show_value(entry)}" for key, entry in value.items())
    return str(value)


def describe_settings(cls: type, leave_out: str = "") -> str:
    """The help on the settings of a configuration class, without those that `leave_out` names with spaces between them:
    first those that must be given, then the others."""
    rows = [row for row in describe_fields(cls) if row.key not in leave_out.split()]
    needed = [row for row in rows if row.default is None and "." not in row.key]
    others = [row for row in rows if row not in needed]
    sections = (("needed, from the recipe or from you, as key=value:", needed), ("settings, as key=value:", others))
    return "\n\n".join("\n".join([title, *map(_described, section)]) for title, section in sections if section)


def _described(row: FieldHelp) -> str:
    default = "" if row.default in (None, "(below)") else f" = {row.default}" if row.default else " = (empty)"
    first = f"  {row.key}: {row.type}{default}"
    return f"{first}\n{wrapped(row.text, '      ')}" if row.text else first


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines that fit the terminal, of 50 to 100 characters."""
    width = min(100, max(50, shutil.get_terminal_size((100, 24)).columns))
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
