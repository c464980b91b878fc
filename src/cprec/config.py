"""Find a recipe or a YAML file and turn it into the configuration that a command runs.

A configuration is a frozen dataclass, one per stage, in the `config.py` of the stage's package. A recipe is a function
that returns a complete `Recipe`; its keyword arguments (such as `data=FOLDER`) are set as `key=value` like any field.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from cprec.errors import ConfigError
from cprec.field_help import show_value
from cprec.fit.config import FitConfig
from cprec.recipe import STAGE_CONFIGS, Recipe
from cprec.recipes import RECIPES
from cprec.recipes.arms import ARMS, with_arm
from cprec.settings import (
    SettingsTree,
    convert,
    did_you_mean,
    from_mapping,
    merge,
    parse_overrides,
    resolve,
    settable_fields,
    tree_of,
    update,
)

__all__ = [
    "ARMS",
    "RECIPES",
    "STAGE_CONFIGS",
    "Recipe",
    "describe_recipe",
    "find_config",
    "fit_config",
    "from_mapping",
    "from_yaml",
    "resolve",
    "stage_config",
    "to_yaml",
    "update",
]

ConfigT = TypeVar("ConfigT")

_TABLE = re.compile(r"\.(csv|tsv|jsonl|ndjson|json|parquet|pq)(\.gz)?$")
"""The end of the name of a table's file."""


def describe_recipe(name: str, recipe: Callable[..., Any]) -> str:
    """Show how to call a recipe, as in `amazon_small data=FOLDER [output_dir=runs/amazon]`."""
    words = [name]
    for parameter in inspect.signature(recipe).parameters.values():
        if parameter.default is parameter.empty:
            words.append(f"{parameter.name}={_placeholder(recipe, parameter.name)}")
        else:
            words.append(f"[{parameter.name}={show_value(parameter.default)}]")
    return " ".join(words)


def _placeholder(recipe: Callable[..., Any], name: str) -> str:
    annotation = get_type_hints(recipe).get(name, str)
    return {Path: "FOLDER", int: "NUMBER", float: "NUMBER", bool: "true|false"}.get(annotation, "TEXT")


def _build_recipe(name: str, settings: SettingsTree) -> tuple[Recipe, SettingsTree]:
    """Call a recipe with the settings that are its arguments; return it and the other settings."""
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise ConfigError(
            f"there is no recipe {name!r}{hint or '.'} Recipes: {', '.join(sorted(RECIPES)) or 'none'}; "
            "or give a YAML file (ending in .yaml, .yml or .json)"
        )
    recipe = RECIPES[name]
    parameters = inspect.signature(recipe).parameters
    rest = SettingsTree({key: value for key, value in settings.items() if key not in parameters})
    arm = rest.pop("arm", None)
    types = get_type_hints(recipe)
    arguments = {key: convert(value, types.get(key, str), key) for key, value in settings.items() if key in parameters}
    missing = [
        f"{key}={_placeholder(recipe, key)}"
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in arguments
    ]
    if missing:
        raise ConfigError(f"{name} needs {' '.join(missing)}")
    built = recipe(**arguments)
    if arm is None:
        return built, rest
    if arm not in ARMS:
        raise ConfigError(f"there is no arm {arm!r}{did_you_mean(arm, ARMS) or '.'} Arms: {', '.join(ARMS)}")
    return with_arm(built, arm), rest


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read the mapping in a YAML or JSON file; of the `run.json` of an output folder, the settings recorded in it."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        document = loader.get_single_node()
        _check_keys(document, str(path))
        values = None if document is None else loader.construct_document(document)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings; write `key: value` lines, or `recipe: NAME` and what to change")
    if {"stage", "config", "versions"} <= set(values) and isinstance(values["config"], dict):
        values = values["config"]
    return {str(key): value for key, value in values.items()}


def _check_keys(node: Any, path: str, where: str = "", above: tuple[Any, ...] = ()) -> None:
    """Raise ConfigError for a key that a mapping of a YAML document has twice: YAML would use the last one."""
    import yaml

    if not isinstance(node, yaml.CollectionNode) or any(node is other for other in above):
        return
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            _check_keys(entry, path, f"{where}{index}.", (*above, node))
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(getattr(key, "value", key)), key.start_mark.line + 1
        if name in lines and name != "<<":
            places = f"lines {lines[name]} and {line}" if lines[name] != line else f"line {line}"
            raise ConfigError(f"{path}: {where}{name} is set twice, in {places}; give it once")
        lines[name] = line
        _check_keys(value, path, f"{where}{name}.", (*above, node))


def from_yaml(path: Path | str, cls: type[ConfigT], overrides: Iterable[str] = ()) -> ConfigT:
    """Make a configuration of class `cls` from a YAML or JSON file of its fields, with `key=value` settings on top."""
    settings = merge(tree_of(read_yaml(path), str(path)), parse_overrides(overrides))
    try:
        return from_mapping(cls, settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def to_yaml(config: Any) -> str:
    """Write a configuration as YAML text, with the fields in the order of the class; `from_yaml` reads it back."""
    import yaml

    from cprec.provenance import to_dict

    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
    return text


def essential(config: Any, always: Collection[str] = ()) -> Any:
    """What the file of a recipe must say, as a mapping: settings that are not the defaults, and those in `always`."""
    if isinstance(config, tuple):
        return [essential(entry, always) for entry in config]
    if not dataclasses.is_dataclass(config):
        return config
    told = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default or field.name in always:
            told[field.name] = essential(value, always)
    return told


def stage_config(stage: str, overrides: Iterable[str], **given: Any) -> Any:
    """The configuration of a stage from `key=value` settings alone; those in `given` take precedence."""
    return from_mapping(STAGE_CONFIGS[stage], parse_overrides(overrides) | given)


def fit_config(words: Sequence[str], overrides: Iterable[str]) -> FitConfig:
    """The settings of `cprec fit`: its words are the log, the items and the folder to write, the last two optional."""
    files = [word for word in words if _TABLE.search(word.lower())]
    folders = [word for word in words if word not in files]
    if not 1 <= len(files) <= 2 or len(folders) > 1:
        raise ConfigError(
            f"cprec fit {' '.join(words)}: give the log, the items and the folder to write, as cprec fit events.csv "
            "items.csv runs/shop; files end in .csv, .tsv, .jsonl (also with .gz) or .parquet"
        )
    names = dict(zip(("interactions", "items"), files, strict=False)) | dict(
        zip(("output_dir",), folders, strict=False)
    )
    return from_mapping(FitConfig, merge(SettingsTree(names), parse_overrides(overrides)))


def find_config(source: str, overrides: Iterable[str] = (), stage: str | None = None) -> Any:
    """The resolved configuration that `cprec VERB SOURCE key=value ...` means.

    `source` names a recipe or a YAML file. A file with the line `recipe: NAME` changes that recipe; any other file
    holds the configurations of stages, each under its name, or that of one stage alone. Without `stage` the result is a
    whole `Recipe`; with it, the configuration of that stage. A plain key is then an argument of the recipe or a field
    of the stage, and `STAGE.key` is a field of any stage, so that one list of settings serves every verb.
    """
    settings = parse_overrides(overrides)
    if not source.endswith((".yaml", ".yml", ".json")):
        return _from_recipe(source, settings, stage)
    values = read_yaml(source)
    try:
        if "recipe" in values:
            name = str(values.pop("recipe"))
            return _from_recipe(name, merge(tree_of(values, source), settings), stage)
        if stage is None:
            values = {"name": Path(source).stem, "description": "", **values}
            return from_mapping(Recipe, merge(tree_of(values, source), settings))
        return _from_stages(values, source, settings, stage)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _from_stages(values: dict[str, Any], source: str, settings: SettingsTree, stage: str) -> Any:
    """The configuration of one stage from a file that holds it alone, or that holds several, each under its name."""
    config = STAGE_CONFIGS[stage]
    fields = set(settable_fields(Recipe))
    if not fields & set(STAGE_CONFIGS) & set(values):
        return from_mapping(config, merge(tree_of(values, source), settings))
    if stage not in values:
        raise ConfigError(f"there is no part {stage}: in it")
    of_stage = SettingsTree({key: value for key, value in settings.items() if key not in fields})
    of_stage = merge(SettingsTree(settings.get(stage, {})), of_stage)
    return from_mapping(config, merge(tree_of(values[stage], source), of_stage))


def _from_recipe(name: str, settings: SettingsTree, stage: str | None) -> Any:
    recipe, rest = _build_recipe(name, settings)
    if stage is None:
        return update(recipe, rest)
    fields = set(settable_fields(type(recipe)))
    of_stage = SettingsTree({key: value for key, value in rest.items() if key not in fields})
    recipe = update(recipe, {key: value for key, value in rest.items() if key in fields})
    config = getattr(recipe, stage)
    if config is None:
        raise ConfigError(f"the recipe {name} has no stage {stage}")
    if recipe.hours and stage in ("pretrain", "finetune"):
        raise ConfigError(f"hours={recipe.hours:g} are of the whole run: use `cprec run`, or leave them out")
    return update(config, of_stage)
