"""Find a recipe, apply typed `key=value` settings, read and write configurations as YAML.

A configuration is a frozen dataclass, one per stage, defined beside the stage. A recipe is a function that returns a
complete `Recipe`; its keyword arguments (`data=FOLDER`, say) are set as `key=value` like any field. Settings are
gathered first and applied together, so that checks between fields see the final values only.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from cprec.errors import ConfigError
from cprec.provenance import to_dict

if TYPE_CHECKING:
    from cprec.evaluate.evaluate import EvaluateConfig
    from cprec.text.prepare import PrepareConfig
    from cprec.train.finetune import FinetuneConfig
    from cprec.train.pretrain import PretrainConfig

ConfigT = TypeVar("ConfigT")

STAGE_CONFIGS = {
    "prepare": "cprec.text.prepare:PrepareConfig",
    "pretrain": "cprec.train.pretrain:PretrainConfig",
    "finetune": "cprec.train.finetune:FinetuneConfig",
    "evaluate": "cprec.evaluate.evaluate:EvaluateConfig",
    "recommend": "cprec.serve.recommend:RecommendConfig",
}
"""Where each stage's configuration class lives: `module:class`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run: one configuration per stage. A recipe that needs more than these subclasses it and adds fields."""

    name: str
    """The recipe's name, as on the command line."""
    description: str
    """What the run shows, in one sentence."""
    prepare: PrepareConfig
    """From raw logs to token shards, examples and queries."""
    pretrain: PretrainConfig
    """Continual pre-training on the token shards."""
    finetune: FinetuneConfig
    """Fine-tuning on next-item examples of a domain."""
    evaluate: EvaluateConfig
    """Ranking the held-out queries, and the numbers made from the rankings."""


def load_object(path: str) -> Any:
    """The object that `module:name` names; the module is imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# ---- settings as a tree ----------------------------------------------------------------------------------------------


class _Settings(dict[str, Any]):
    """A tree of settings from `a.b=value`: it changes the named entries of what it meets and keeps the others."""


def parse_overrides(overrides: Iterable[str]) -> _Settings:
    """`["a.b=1", "c=x"]` as the tree `{"a": {"b": "1"}, "c": "x"}`; values stay text.

    >>> parse_overrides(["train.seed=1", "name=x=y"])
    {'train': {'seed': '1'}, 'name': 'x=y'}
    """
    tree = _Settings()
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals or not key or "" in key.split("."):
            raise ConfigError(f"{override!r} is not a setting; write key=value, as in seed=1 or train.seed=1")
        _plant(tree, key, value.strip(), override)
    return tree


def _plant(tree: _Settings, key: str, value: Any, shown: str) -> None:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, _Settings())
        if not isinstance(tree, _Settings):
            raise ConfigError(f"{shown!r} and an earlier setting both set {part!r}; give one of them")
    if last in tree:
        raise ConfigError(f"{key!r} is set twice, to {tree[last]!r} and {value!r}; give it once")
    tree[last] = value


def _tree_of(mapping: Mapping[str, Any], source: str) -> _Settings:
    """A YAML mapping as a tree of settings; a key may be dotted."""
    tree = _Settings()
    for key, value in mapping.items():
        _plant(tree, str(key), value, f"{key} in {source}")
    return tree


def _merge(first: _Settings, second: _Settings) -> _Settings:
    """Both trees in one; where both name an entry, the second's holds."""
    merged = _Settings(first)
    for key, value in second.items():
        under = merged.get(key)
        if isinstance(value, _Settings) and isinstance(under, list) and all(part.isdecimal() for part in value):
            entries = _merge(_Settings({str(index): entry for index, entry in enumerate(under)}), value)
            merged[key] = entries
        elif isinstance(value, _Settings) and isinstance(under, Mapping):
            merged[key] = _merge(_Settings(under), value)
        else:
            merged[key] = value
    return merged


# ---- applying settings -----------------------------------------------------------------------------------------------


def resolve(config: ConfigT, overrides: Iterable[str]) -> ConfigT:
    """A copy of a frozen dataclass with typed `key=value` settings applied, `a.b=value` inside nested ones.

    Text becomes what the field's annotation says: int (`1_000` and `1e3` too), float, bool (true/false, yes/no, on/off,
    1/0), str, Path, Literal, Optional (`none`), tuple (`a,b`), dict (`key:value,key:value`, or one entry by
    `field.key=value`), nested dataclasses (`field.name=value`) and tuples of them (`field.0.name=value`).

    Raises ConfigError naming the field, the value and what is accepted, and the nearest field for a misspelt one.
    """
    return update(config, parse_overrides(overrides))


def update(config: ConfigT, settings: Mapping[str, Any], where: str = "") -> ConfigT:
    """A copy of a frozen dataclass with a tree of settings applied, all at once; see `resolve`."""
    cls = type(config)
    known = _settable(cls)
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise _unknown_field(name, cls, where)
        changes[name] = _convert(value, _Annotation(cls, name), f"{where}{name}", getattr(config, name))
    return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def from_mapping(cls: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
    """A configuration of class `cls` from a mapping of its fields; what has no default must be there."""
    known = _settable(cls)
    for name in values:
        if name not in known:
            raise _unknown_field(name, cls, where)
    missing = [name for name, field in known.items() if name not in values and _is_required(field)]
    if missing:
        raise ConfigError(f"{_owner(cls, where)} needs {_listed(where + name for name in missing)}")
    converted = {name: _convert(value, _Annotation(cls, name), f"{where}{name}") for name, value in values.items()}
    return cls(**converted)


def _settable(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _owner(cls: type, where: str) -> str:
    return f"{cls.__name__} ({where.rstrip('.')})" if where else cls.__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _unknown_field(name: str, cls: type, where: str) -> ConfigError:
    known = _settable(cls)
    hint = _did_you_mean(name, known)
    return ConfigError(f"{_owner(cls, where)} has no field {where + name!r}{hint or '.'} Its fields: {_listed(known)}")


class _Annotation(NamedTuple):
    """A field's annotation, evaluated only when a value is converted to it."""

    cls: type
    name: str

    def evaluate(self) -> Any:
        return field_type(self.cls, self.name)


def field_type(cls: type, name: str) -> Any:
    """The evaluated annotation of a dataclass field."""
    if issubclass(cls, Recipe) and name in STAGE_CONFIGS and name in Recipe.__annotations__:
        return load_object(STAGE_CONFIGS[name])
    for owner in cls.__mro__:
        if name in owner.__dict__.get("__annotations__", {}):
            annotation = owner.__annotations__[name]
            if not isinstance(annotation, str):
                return annotation
            return eval(annotation, vars(sys.modules[owner.__module__]), dict(vars(owner)))
    raise AssertionError(f"{cls.__name__} has no field {name}")


# ---- one value -------------------------------------------------------------------------------------------------------

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def _convert(value: Any, annotation: Any, where: str, current: Any = None) -> Any:
    """`value` (text of the command line, or what YAML holds) as `annotation` says, or ConfigError.

    `current` is what the field holds so far: nested settings change a part of it.
    """
    if isinstance(annotation, _Annotation):
        if _is_config(current) and isinstance(value, Mapping):
            return update(current, value, f"{where}.")
        annotation = annotation.evaluate()
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(annotation), where, current)
    if origin is typing.Annotated:
        return _convert(value, get_args(annotation)[0], where, current)
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
    shown = value if isinstance(value, str) else _plain(value)
    return ConfigError(f"{where}={shown}: expected {_ACCEPTED.get(annotation) or describe_type(annotation)}{hint}")


def _plain(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)


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
    number = float(value)
    if number != number:
        raise ValueError
    return number


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError


def _to_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError  # YAML reads no, on, null and dates as other things than text


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
            return _convert(value, others[0], where, current)
        except ConfigError as error:
            hint = ", or none" if len(members) > 1 and not isinstance(value, Mapping) else ""
            raise ConfigError(f"{error}{hint}") from None
    if _is_config(current) and isinstance(value, _Settings):
        return update(current, value, f"{where}.")
    if not isinstance(value, str):  # YAML has told text from numbers already
        for member in others:
            if isinstance(member, type) and type(value) is member:
                return value
    results, refusals = [], []
    for member in sorted(others, key=lambda member: member in (str, Path)):  # anything is text: ask it last
        try:
            results.append(_convert(value, member, where, current))
        except ConfigError as error:
            refusals.append(str(error))
            continue
        if not dataclasses.is_dataclass(member):
            break
    configs = [result for result in results if _is_config(result)]
    if len(configs) > 1:
        kinds = _listed(type(config).__name__ for config in configs)
        raise ConfigError(f"{where}={_plain(value)} fits more than one of {kinds}; set a field that tells them apart")
    if results:
        return results[0]
    raise ConfigError(
        f"{where}={value if isinstance(value, str) else _plain(value)} fits nothing that is accepted: "
        + "; ".join(refusals)
    )


def _convert_literal(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    for choice in choices:
        if str(value) == str(choice):
            return choice
    hint = _did_you_mean(str(value), [str(choice) for choice in choices])
    raise ConfigError(f"{where}={value}: expected {' | '.join(str(choice) for choice in choices)}{hint}")


def _convert_tuple(value: Any, annotation: Any, where: str, current: Any) -> Any:
    arguments = get_args(annotation)
    fixed = get_origin(annotation) is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis)
    make = list if get_origin(annotation) is list else tuple
    if isinstance(value, _Settings) and all(key.isdecimal() for key in value):
        entries = list(current or ())
        for key, entry in sorted(value.items(), key=lambda pair: int(pair[0])):
            index = int(key)
            if index > len(entries):
                raise ConfigError(
                    f"{where}.{key}: there are {len(entries)} entries, numbered from 0; "
                    f"the next one is {where}.{len(entries)}"
                )
            kind = arguments[index] if fixed else arguments[0]
            changed = _convert(entry, kind, f"{where}.{key}", entries[index] if index < len(entries) else None)
            entries[index : index + 1] = [changed]
        return make(entries)
    if isinstance(value, str):
        value = [entry.strip() for entry in value.split(",")] if value.strip() else []
        value = value[:-1] if value and value[-1] == "" else value  # "a," is a tuple of one, as in Python
    if not isinstance(value, (list, tuple)):
        raise _refused(value, annotation, where, ", entries separated by commas")
    if fixed and len(value) != len(arguments):
        raise ConfigError(
            f"{where}: expected {len(arguments)} entries, as in {describe_type(annotation)}; got {len(value)}"
        )
    kinds = arguments if fixed else arguments[:1] * len(value)
    return make(
        _convert(entry, kind, f"{where}.{index}") for index, (entry, kind) in enumerate(zip(value, kinds, strict=True))
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
    kept = dict(current or {}) if isinstance(value, _Settings) else {}
    changed = {
        _convert(key, key_type, where): _convert(entry, value_type, f"{where}.{key}", (current or {}).get(key))
        for key, entry in value.items()
    }
    return {**kept, **changed}


def _convert_config(value: Any, cls: type, where: str, current: Any) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        fields = _listed(f"{where}.{name}" for name in _settable(cls))
        raise ConfigError(f"{where}={value}: {where} is a group of settings; set one of {fields}")
    if isinstance(value, _Settings) and type(current) is cls:
        return update(current, value, f"{where}.")
    return from_mapping(cls, value, f"{where}.")


def describe_type(annotation: Any) -> str:
    """An annotation in the words of the help: `int`, `a | b`, `list of text`, `int or none`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        names = [describe_type(entry) for entry in arguments if entry is not type(None)]
        return " or ".join([*names, "none"] if type(None) in arguments else names)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return ",".join(describe_type(entry) for entry in arguments)
    if origin in (tuple, list, Sequence):
        return f"list of {describe_type(arguments[0])}"
    if origin in (dict, Mapping):
        return f"{describe_type(arguments[0])}:{describe_type(arguments[1])},..."
    names = {str: "text", Path: "path", bool: "true | false", int: "int", float: "float"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


# ---- recipes and files -----------------------------------------------------------------------------------------------


def recipes() -> Mapping[str, Callable[..., Recipe]]:
    """Every recipe by name: the dict in `cprec.recipes`."""
    from cprec.recipes import RECIPES

    return RECIPES


def describe_recipe(name: str, recipe: Callable[..., Any]) -> str:
    """How to call a recipe: `amazon_small data=PATH [output_dir=runs/amazon]`."""
    words = [name]
    for parameter in inspect.signature(recipe).parameters.values():
        if parameter.default is parameter.empty:
            words.append(f"{parameter.name}={_placeholder(recipe, parameter.name)}")
        else:
            words.append(f"[{parameter.name}={show_value(parameter.default)}]")
    return " ".join(words)


def _placeholder(recipe: Callable[..., Any], name: str) -> str:
    annotation = _parameter_type(recipe, name)
    return {Path: "FOLDER", int: "NUMBER", float: "NUMBER", bool: "true|false"}.get(annotation, "TEXT")


def _parameter_type(recipe: Callable[..., Any], name: str) -> Any:
    annotation = inspect.signature(recipe).parameters[name].annotation
    if annotation is inspect.Parameter.empty:
        return str
    if isinstance(annotation, str):
        return eval(annotation, getattr(recipe, "__globals__", {}))
    return annotation


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


def _build_recipe(name: str, settings: _Settings) -> tuple[Recipe, _Settings]:
    """The recipe with the settings that are its own arguments, and the settings left over."""
    known = recipes()
    if name not in known:
        hint = _did_you_mean(name, known)
        raise ConfigError(
            f"there is no recipe {name!r}{hint or '.'} Recipes: {_listed(sorted(known)) or 'none'}; "
            "or give a YAML file (ending in .yaml, .yml or .json)"
        )
    recipe = known[name]
    parameters = inspect.signature(recipe).parameters
    arguments = {
        key: _convert(value, _parameter_type(recipe, key), key) for key, value in settings.items() if key in parameters
    }
    missing = [
        f"{key}={_placeholder(recipe, key)}"
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in arguments
    ]
    if missing:
        raise ConfigError(f"{name} needs {' '.join(missing)}")
    return recipe(**arguments), _Settings({key: value for key, value in settings.items() if key not in parameters})


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; a `config.json` of an output folder gives the settings recorded in it."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings; write `key: value` lines, or `recipe: NAME` and what to change")
    if {"stage", "config", "versions"} <= set(values) and isinstance(values["config"], dict):
        values = values["config"]
    return {str(key): value for key, value in values.items()}


def from_yaml(path: Path | str, cls: type[ConfigT], overrides: Iterable[str] = ()) -> ConfigT:
    """A configuration of class `cls` from a YAML or JSON file of its fields, with `key=value` settings on top."""
    settings = _merge(_tree_of(read_yaml(path), str(path)), parse_overrides(overrides))
    try:
        return from_mapping(cls, settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def to_yaml(config: Any) -> str:
    """A configuration as YAML text, fields in the order of the class; `from_yaml` reads it back."""
    import yaml

    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
    return text


def find_config(source: str, overrides: Iterable[str] = (), stage: str | None = None) -> Any:
    """The resolved configuration that `cprec VERB SOURCE key=value ...` means.

    `source` names a recipe or a YAML file. A file with the line `recipe: NAME` changes that recipe; any other file is a
    complete configuration. Without `stage` the result is a whole `Recipe`; with it, that stage's configuration. There a
    plain key is a recipe argument or a field of the stage, and `STAGE.key` is a field of any stage of the recipe, so
    that one list of settings serves every verb.
    """
    settings = parse_overrides(overrides)
    is_file = source.endswith((".yaml", ".yml", ".json"))
    if not is_file:
        return _from_recipe(source, settings, stage)
    values = read_yaml(source)
    try:
        if "recipe" in values:
            name = str(values.pop("recipe"))
            return _from_recipe(name, _merge(_tree_of(values, source), settings), stage)
        settings = _merge(_tree_of(values, source), settings)
        if stage is None or set(Recipe.__annotations__) <= set(values):
            recipe = from_mapping(Recipe, settings)
            return recipe if stage is None else getattr(recipe, stage)
        return from_mapping(load_object(STAGE_CONFIGS[stage]), settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _from_recipe(name: str, settings: _Settings, stage: str | None) -> Any:
    recipe, rest = _build_recipe(name, settings)
    if stage is None:
        return update(recipe, rest)
    fields = set(_settable(type(recipe)))
    of_stage = _Settings({key: value for key, value in rest.items() if key not in fields})
    recipe = update(recipe, {key: value for key, value in rest.items() if key in fields})
    return update(getattr(recipe, stage), of_stage)


# ---- documentation of fields -----------------------------------------------------------------------------------------


class FieldHelp(NamedTuple):
    """What the help shows of one field."""

    key: str
    type: str
    default: str | None
    """None: it must be given."""
    text: str


def field_docs(cls: type) -> dict[str, str]:
    """The docstring literal under each field of a dataclass, read from its source; inherited fields included."""
    import ast
    import textwrap

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


def describe_fields(cls: type, prefix: str = "") -> list[FieldHelp]:
    """Every field of a configuration class with type, default and docstring; nested ones under dotted keys."""
    docs = field_docs(cls)
    rows: list[FieldHelp] = []
    for name, field in _settable(cls).items():
        annotation = field_type(cls, name)
        if dataclasses.is_dataclass(annotation):
            rows += describe_fields(typing.cast(type, annotation), f"{prefix}{name}.")
            continue
        if field.default is not dataclasses.MISSING:
            default: str | None = show_value(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = show_value(field.default_factory())
        else:
            default = None
        rows.append(FieldHelp(f"{prefix}{name}", describe_type(annotation), default, docs.get(name, "")))
    return rows
