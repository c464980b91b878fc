"""Typed settings: from `key=value` text or YAML to the fields of frozen dataclasses.

All settings are gathered into one tree first and applied together, so that checks between fields see only final values.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from cprec.errors import ConfigError

ConfigT = TypeVar("ConfigT")


# ---- settings as a tree ----------------------------------------------------------------------------------------------


class SettingsTree(dict[str, Any]):
    """A tree of settings, as made from `a.b=value`. It changes the entries that it names and keeps the others; a plain
    dict replaces a whole dict."""

    plain: Any = None
    """The single value that a file gives where this tree changes a group of settings. A configuration class with an
    attribute `PLAIN` reads it as the value of the field that `PLAIN` names."""


def parse_overrides(overrides: Iterable[str]) -> SettingsTree:
    """Make a tree of `key=value` texts: `a.b=1` is the entry `b` of the group `a`. Values stay text.

    >>> parse_overrides(["train.seed=1", "name=x=y"])
    {'train': {'seed': '1'}, 'name': 'x=y'}
    """
    tree = SettingsTree()
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key or "" in key.split("."):
            raise ConfigError(f"{override!r} is not a setting; write key=value, as in seed=1 or train.seed=1")
        _add(tree, key, value.strip(), override)
    return tree


def _add(tree: SettingsTree, key: str, value: Any, shown: str) -> None:
    """Put a value under a dotted key; `shown` is how an error names the setting."""
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, SettingsTree())
        if not isinstance(tree, SettingsTree):
            raise ConfigError(f"{shown!r} and an earlier setting both set {part!r}; give one of them")
    if last in tree:
        raise ConfigError(f"{key!r} is set twice, to {tree[last]!r} and {value!r}; give it once")
    tree[last] = value


def tree_of(mapping: Mapping[str, Any], source: str) -> SettingsTree:
    """Make a tree of a YAML mapping, whose keys may be dotted."""
    tree = SettingsTree()
    for key, value in mapping.items():
        _add(tree, str(key), value, f"{key} in {source}")
    return tree


def merge(first: SettingsTree, second: SettingsTree) -> SettingsTree:
    """Join two trees; where both have an entry, the second's counts."""
    merged = SettingsTree(first)
    for key, value in second.items():
        under = merged.get(key)
        if isinstance(value, SettingsTree) and isinstance(under, list) and all(part.isdecimal() for part in value):
            merged[key] = merge(SettingsTree({str(index): entry for index, entry in enumerate(under)}), value)
        elif isinstance(value, SettingsTree) and isinstance(under, Mapping):
            merged[key] = merge(SettingsTree(under), value)
        elif isinstance(value, SettingsTree):
            merged[key] = SettingsTree(value)
            merged[key].plain = under
        else:
            merged[key] = value
    return merged


# ---- applying settings -----------------------------------------------------------------------------------------------


def resolve(config: ConfigT, overrides: Iterable[str]) -> ConfigT:
    """Copy a frozen dataclass with typed `key=value` settings applied; `a.b=value` sets a field of a nested one.

    Text becomes what the field's annotation says: int (`1_000` and `1e3` too), float, bool (true/false, yes/no, on/off,
    1/0), str, Path, Literal, Optional (`none`), tuple (`a,b`), dict (`key:value,key:value`, or one entry by
    `field.key=value`), nested dataclasses (`field.name=value`) and tuples of them (`field.0.name=value`).

    Raises ConfigError, which names the field, the value and what is accepted, and the nearest field for a misspelt one.
    """
    return update(config, parse_overrides(overrides))


def update(config: ConfigT, settings: Mapping[str, Any], where: str = "") -> ConfigT:
    """Copy a frozen dataclass with a tree of settings applied all at once; see `resolve`."""
    cls = type(config)
    known = settable_fields(cls)
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise _unknown_field(name, cls, where)
        current = getattr(config, name)
        if _is_config(current) and isinstance(value, Mapping):
            changes[name] = update(current, value, f"{where}{name}.")
        else:
            changes[name] = convert(value, field_type(cls, name), f"{where}{name}", current)
    return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def from_mapping(cls: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
    """Make a configuration of class `cls` from a mapping of its fields; those without a default must be there."""
    known = settable_fields(cls)
    for name in values:
        if name not in known:
            raise _unknown_field(name, cls, where)
    missing = [name for name, field in known.items() if name not in values and is_required(field)]
    if missing:
        raise ConfigError(f"{_owner(cls, where)} needs {', '.join(where + name for name in missing)}")
    converted = {name: convert(value, field_type(cls, name), f"{where}{name}") for name, value in values.items()}
    return cls(**converted)


def settable_fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _owner(cls: type, where: str) -> str:
    return f"{cls.__name__} ({where.rstrip('.')})" if where else cls.__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _unknown_field(name: str, cls: type, where: str) -> ConfigError:
    known = settable_fields(cls)
    if name in getattr(cls, "RENAMED", ()):
        return ConfigError(f"{where + name} is gone: write {cls.RENAMED[name]}")  # type: ignore[attr-defined]
    groups = {group: field_type(cls, group) for group in known}
    inside = [
        f"{where}{group}.{name}"
        for group, kind in groups.items()
        if dataclasses.is_dataclass(kind) and name in settable_fields(kind)  # type: ignore[arg-type]
    ]
    hint = f"; did you mean {inside[0]!r}?" if inside else did_you_mean(name, known)
    return ConfigError(
        f"{_owner(cls, where)} has no field {where + name!r}{hint or '.'} Its fields: {', '.join(known)}"
    )


def field_type(cls: type, name: str) -> Any:
    """The annotation of a dataclass field, as a type: text is evaluated in the module of its class."""
    for owner in cls.__mro__:
        if name in owner.__dict__.get("__annotations__", {}):
            annotation = owner.__annotations__[name]
            if not isinstance(annotation, str):
                return annotation
            return eval(annotation, vars(sys.modules[owner.__module__]), dict(vars(owner)))
    raise AssertionError(f"{cls.__name__} has no field {name}")


# ---- one value -------------------------------------------------------------------------------------------------------

_BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def convert(value: Any, annotation: Any, where: str, current: Any = None) -> Any:
    """Convert a value (text from the command line, or from YAML) to the type `annotation`, or raise ConfigError.

    `current` is the value that the field has so far; a tree of settings changes a part of it.
    """
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(annotation), where, current)
    if origin is typing.Annotated:
        return convert(value, get_args(annotation)[0], where, current)
    if origin is Literal:
        return _convert_literal(value, get_args(annotation), where)
    if origin in (tuple, list, Sequence):
        return _convert_tuple(value, annotation, where, current)
    if origin in (dict, Mapping):
        return _convert_dict(value, annotation, where, current)
    if dataclasses.is_dataclass(annotation):
        return _convert_config(value, typing.cast(type, annotation), where, current)
    if annotation is Any:
        return value
    converter = _SCALARS.get(annotation)
    if converter is None:
        raise TypeError(f"{where}: settings of type {describe_type(annotation)} are not supported")
    try:
        return converter(value)
    except (ValueError, TypeError, OverflowError):
        raise _refused(value, annotation, where) from None


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _refused(value: Any, annotation: Any, where: str, hint: str = "") -> ConfigError:
    accepted = _ACCEPTED.get(annotation) or describe_type(annotation)
    return ConfigError(f"{where}={_plain(value)}: expected {accepted}{hint}")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else repr(dict(value) if isinstance(value, Mapping) else value)


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    if math.isnan(number := float(value)):
        raise ValueError
    return number


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if (text := str(value).lower()) not in _BOOLS:
        raise ValueError
    return _BOOLS[text]


def _to_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError  # YAML does not read no, on, null and dates as text


def _to_path(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError
    return Path(value).expanduser()


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_str,
    Path: _to_path,
}
_ACCEPTED: dict[Any, str] = {
    int: "a whole number, such as 20, 1_000 or 1e6",
    float: "a number, such as 0.1 or 3e-4",
    bool: "true or false",
    str: "text (in YAML, in quotes)",
    Path: "a path",
}


def _convert_union(value: Any, members: tuple[Any, ...], where: str, current: Any) -> Any:
    wants_none = value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    if wants_none and type(None) in members:
        return None
    others = [member for member in members if member is not type(None)]
    if len(others) == 1:
        try:
            return convert(value, others[0], where, current)
        except ConfigError as error:
            hint = ", or none" if len(members) > 1 and not isinstance(value, Mapping) else ""
            raise ConfigError(f"{error}{hint}") from None
    if _is_config(current) and isinstance(value, SettingsTree):
        return update(current, value, f"{where}.")
    # A mapping can only be meant for a group of settings; one whose keys are numbers is meant for a tuple.
    groups = [member for member in others if dataclasses.is_dataclass(member)]
    if isinstance(value, Mapping) and len(groups) == 1 and not (value and all(str(key).isdecimal() for key in value)):
        return convert(value, groups[0], where, current)
    if not isinstance(value, str):  # YAML has already told text from numbers
        for member in others:
            if isinstance(member, type) and type(value) is member:
                return value
    # Otherwise try every member; groups must not fit both, of other types the first that fits counts.
    results, refusals = [], []
    for member in sorted(others, key=lambda member: member in (str, Path)):  # anything can be text: try it last
        try:
            results.append(convert(value, member, where, current))
        except ConfigError as error:
            refusals.append(str(error))
            continue
        if not dataclasses.is_dataclass(member):
            break
    configs = [result for result in results if _is_config(result)]
    if len(configs) > 1:
        kinds = ", ".join(type(config).__name__ for config in configs)
        raise ConfigError(f"{where}={_plain(value)} fits more than one of {kinds}; set a field that tells them apart")
    if results:
        return results[0]
    raise ConfigError(f"{where}={_plain(value)} fits nothing that is accepted: {'; '.join(refusals)}")


def _convert_literal(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    text = str(value).lower() if isinstance(value, bool) else str(value)  # YAML reads true as a bool
    for choice in choices:
        if text == str(choice):
            return choice
    hint = did_you_mean(str(value), [str(choice) for choice in choices])
    raise ConfigError(f"{where}={value}: expected {_choices(choices)}{hint}")


def _choices(choices: Iterable[Any]) -> str:
    """List the choices; those that begin with a sign are in quotes."""
    return " | ".join(str(choice) if str(choice)[:1].isalnum() else repr(choice) for choice in choices)


def _convert_tuple(value: Any, annotation: Any, where: str, current: Any) -> Any:
    arguments = get_args(annotation)
    fixed = get_origin(annotation) is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis)
    make = list if get_origin(annotation) is list else tuple
    if isinstance(value, SettingsTree) and all(key.isdecimal() for key in value):
        # Numbered settings change single entries, and may add one after another at the end.
        entries = list(current or ())
        for key, entry in sorted(value.items(), key=lambda pair: int(pair[0])):
            index = int(key)
            if index > len(entries):
                raise ConfigError(
                    f"{where}.{key}: there are {len(entries)} entries, numbered from 0; "
                    f"the next one is {where}.{len(entries)}"
                )
            kind = arguments[index] if fixed else arguments[0]
            changed = convert(entry, kind, f"{where}.{key}", entries[index] if index < len(entries) else None)
            entries[index : index + 1] = [changed]
        return make(entries)
    if isinstance(value, str):
        value = [entry.strip() for entry in value.split(",")] if value.strip() else []
        value = value[:-1] if value and value[-1] == "" else value  # "a," is a tuple of one, as in Python
    if isinstance(value, SettingsTree):
        raise _refused(value, annotation, where, f"; its entries are numbered: {where}.0.{next(iter(value))}, say")
    if not isinstance(value, (list, tuple)):
        raise _refused(value, annotation, where, ", entries separated by commas")
    if fixed and len(value) != len(arguments):
        raise ConfigError(
            f"{where}: expected {len(arguments)} entries, as in {describe_type(annotation)}; got {len(value)}"
        )
    kinds = arguments if fixed else arguments[:1] * len(value)
    return make(
        convert(entry, kind, f"{where}.{index}") for index, (entry, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _convert_dict(value: Any, annotation: Any, where: str, current: Any) -> dict[Any, Any]:
    key_type, value_type = get_args(annotation)
    if isinstance(value, str):
        pairs = [entry.partition(":") for entry in value.split(",") if entry.strip()]
        if any(not colon for _, colon, _ in pairs):
            raise ConfigError(f"{where}={value}: expected key:value,key:value")
        value = {key.strip(): entry.strip() for key, _, entry in pairs}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}={value!r}: expected key:value,key:value, or a mapping in YAML")
    kept = dict(current or {}) if isinstance(value, SettingsTree) else {}
    changed = {
        convert(key, key_type, where): convert(entry, value_type, f"{where}.{key}", (current or {}).get(key))
        for key, entry in value.items()
    }
    return {**kept, **changed}


def _convert_config(value: Any, cls: type, where: str, current: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        fields = ", ".join(f"{where}.{name}" for name in settable_fields(cls))
        raise ConfigError(f"{where}={value}: {where} is a group of settings; set one of {fields}")
    if isinstance(value, SettingsTree):
        # A single value that stood here before becomes the field PLAIN of the group.
        plain = value.plain if current is None else current
        if hasattr(cls, "PLAIN") and plain is not None and type(current) is not cls:
            return from_mapping(cls, {cls.PLAIN: plain, **value}, f"{where}.")
        if type(current) is cls:
            return update(current, value, f"{where}.")
    return from_mapping(cls, value, f"{where}.")


def describe_type(annotation: Any) -> str:
    """Describe a type as the help does: `int`, `a | b`, `list of text`, `int or none`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        members = [describe_type(entry) for entry in arguments if entry is not type(None)]
        return " or ".join([*members, "none"] if type(None) in arguments else members)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return _choices(arguments)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return ",".join(describe_type(entry) for entry in arguments)
    if origin in (tuple, list, Sequence):
        return f"list of {describe_type(arguments[0])}"
    if origin in (dict, Mapping):
        key, value = arguments
        nested = get_origin(value) is Mapping
        return "values by name and field" if nested else f"{describe_type(key)}:{describe_type(value)},..."
    names: dict[Any, str] = {str: "text", Path: "path", bool: "true | false", int: "int", float: "float"}
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))
