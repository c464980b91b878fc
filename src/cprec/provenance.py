"""Where a result comes from: the `run.json` beside every output: settings, seed, versions, commit, input hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError

CONFIG_FILE = "run.json"

VERSIONED_PACKAGES = (
    "cprec",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "pyarrow",
    "ibis-framework",
    "duckdb",
)
"""Distributions whose versions may change a result; the ones that are not installed are left out of the record."""


def to_dict(value: Any) -> Any:
    """A configuration as JSON and YAML can hold it: dataclasses become dicts, tuples lists, paths text.

    `cprec.config.from_mapping(type(config), to_dict(config))` gives an equal config back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_dict(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a configuration cannot hold {value!r} of type {type(value).__name__}")


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that may change a result, read without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> dict[str, Any] | None:
    """The commit CPRec runs from, and whether files differ from it; None where it does not run from a git checkout."""
    import subprocess

    package = Path(__file__).resolve().parent
    root = package.parents[1]
    if package != root / "src" / "cprec" or not (root / ".git").exists():
        return None  # an installed copy, perhaps inside somebody else's checkout

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def save_resolved(folder: Path | str, config: Any, inputs: Mapping[str, str] | None = None) -> Path:
    """Write `run.json` into an output folder (made if it is missing) and return its path.

    `inputs` maps what the stage read (a file, a manifest, a model) to its SHA-256. The file is replaced as a whole: a
    kill leaves the old one or the new one. `cprec VERB folder/run.json` runs the stage again with these settings.
    """
    record = {
        "stage": type(config).__name__,
        "config": to_dict(config),
        "seed": getattr(config, "seed", None),
        "versions": versions(),
        "commit": git_commit(),
        "inputs": dict(sorted((inputs or {}).items())),
    }
    path = Path(folder) / CONFIG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return path


def read_resolved(folder: Path | str) -> dict[str, Any]:
    """The record that `save_resolved` wrote into a folder. Raises ConfigError where there is none or it is not JSON."""
    path = Path(folder) / CONFIG_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: {folder} is not an output folder of cprec") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error}); run the stage that made it again") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} does not hold a record; run the stage that made it again")
    return record
