"""Where a result comes from: `run.json` beside every output, with settings, seed, versions, commit and input hashes.

A stage uses its earlier output again only if its input is still the same. `hashes.json` beside `run.json` notes the
size and times of every file that was hashed, so that a file which was not touched since need not be read again.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError
from cprec.files import write_whole

CONFIG_FILE, HASHES_FILE = "run.json", "hashes.json"

VERSIONED_PACKAGES = (
    *("cprec", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers"),
    *("numpy", "scipy", "pyarrow", "ibis-framework", "duckdb"),
)
"""Distributions whose versions may change a result; those that are not installed are left out of the record."""


def to_dict(value: Any) -> Any:
    """Turn a configuration into what JSON and YAML can hold: dataclasses become dicts, tuples lists, and paths text.

    `cprec.config.from_mapping(type(config), to_dict(config))` gives an equal configuration.
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


@functools.cache
def code_sha256(module: str) -> str:
    """SHA-256 of the source of a module of CPRec and of every module of CPRec that it imports, directly or not.

    It changes whenever code changes that the module runs; imports in functions count as well.
    """
    hashes: dict[Path, bytes] = {}
    waiting = [module]
    while waiting:
        path = _PACKAGE.joinpath(*waiting.pop().split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.is_file() and path not in hashes:
            hashes[path], imported = _read_source(path)
            waiting += imported
    digest = hashlib.sha256()
    for path in sorted(hashes):
        digest.update(hashes[path])
    return digest.hexdigest()


_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def _read_source(path: Path) -> tuple[bytes, list[str]]:
    """SHA-256 of a source, and the modules of CPRec that it imports; names that are no modules among them."""
    source, names = path.read_bytes(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return hashlib.sha256(source).digest(), [name for name in names if name.startswith("cprec.")]


class FileHashes:
    """SHA-256 of files. A file whose size and times are still those in `folder/hashes.json` is not read again.

    A file that was written less than two seconds before it was hashed is not noted there: where the clock of the file
    system is coarse, it could change again and keep the same times.
    """

    def __init__(self, folder: Path | str) -> None:
        self._path = Path(folder, HASHES_FILE)
        self._changed = False
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {str(name): (*state, str(sha256)) for name, (*state, sha256) in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self._known = {}  # the file is missing or damaged: everything is read

    def of(self, path: Path | str) -> str:
        """SHA-256 of a file's bytes, as they are now."""
        state, start = file_state(path), time.time_ns()
        known = self._known.get(str(path))
        if known is not None and known[:-1] == state:
            return known[-1]
        sha256 = file_sha256(path)
        self.add(path, state, sha256, start)
        return sha256

    def add(self, path: Path | str, state: tuple[int, ...], sha256: str, when: int) -> None:
        """Note the hash of a file that had `state` at the time `when` (in nanoseconds), and has not changed since."""
        self._known.pop(str(path), None)
        # Only if the file is old enough to have other times after another change.
        if max(state[1:]) < when - _COARSE_CLOCK:
            self._known[str(path)] = (*state, sha256)
        self._changed = True

    def save(self) -> None:
        """Write the hashes, if the folder is there and can be written; without them files are merely read again."""
        if not self._changed or not self._path.parent.is_dir():
            return
        with suppress(OSError):
            write_whole(self._path, json.dumps(dict(sorted(self._known.items())), indent=1) + "\n")
            self._changed = False


_COARSE_CLOCK = 2_000_000_000
"""Nanoseconds from one tick to the next of the coarsest clock of a file system in use."""


def file_state(path: Path | str) -> tuple[int, int, int]:
    """The size of a file, when it was written, and when its entry in the file system last changed, in nanoseconds.

    The last cannot be set by hand, so it shows that a file was replaced by one of the same size and time of writing.
    """
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Compare the hashes of named inputs: which changed, which are new and which are gone.

    >>> differences({"a.csv": "1", "b.csv": "2"}, {"a.csv": "3", "c.csv": "2"})
    ['a.csv changed', 'b.csv is gone', 'c.csv is new']
    """
    found = {name: "changed" for name in before.keys() & now.keys() if before[name] != now[name]}
    found |= dict.fromkeys(before.keys() - now.keys(), "is gone") | dict.fromkeys(now.keys() - before.keys(), "is new")
    return [f"{name} {what}" for name, what in sorted(found.items())]


def shortened(changes: Sequence[str], most: int = 5) -> str:
    """The first of some changes, and how many more there are."""
    more = len(changes) - most
    return "; ".join(changes[:most]) + (f"; and {more:,} more" if more > 0 else "")


WEIGHTS = (
    *("config.json", "generation_config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin"),
    *("adapter_config.json", "adapter_model.bin"),
)
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "*.tiktoken"),
)
ITEM_HEAD = ("item_head/head.*",)
"""Files of a model folder that decide what a model computes, how text becomes tokens, and what its item head ranks."""


def model_hashes(name_or_path: Path | str, patterns: Iterable[str], hashes: FileHashes) -> dict[str, str]:
    """SHA-256 of the files of a model folder, by name; those of an adapter's base model are named `base/...`.

    For a GGUF file, its own SHA-256. For a model of the Hugging Face hub, the commit of the copy on this machine. Empty
    if there is none of them.
    """
    folder = Path(name_or_path)
    if is_gguf(folder):
        return {folder.name: hashes.of(folder)} if folder.is_file() else {}
    if not folder.is_dir():
        commit = _hub_commit(str(name_or_path))
        return {"commit": commit} if commit else {}
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    found = {path.relative_to(folder).as_posix(): hashes.of(path) for path in sorted(paths)}
    if "adapter_config.json" in found:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if base := about["base_model_name_or_path"]:
            found |= {f"base/{name}": value for name, value in model_hashes(base, patterns, hashes).items()}
    return found


def is_gguf(path: Path | str) -> bool:
    """Whether a path is that of a GGUF file, by its ending."""
    return Path(path).suffix.lower() == ".gguf"


def _hub_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:
            return None  # the path of a folder that does not exist
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that may change a result, read without importing them."""
    found = {"python": platform.python_version()}
    for name in VERSIONED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> dict[str, Any] | None:
    """The commit that CPRec runs from, and whether files differ from it; None outside a git checkout."""
    package = Path(__file__).resolve().parent
    root = package.parents[1]
    if package != root / "src" / "cprec" or not (root / ".git").exists():
        return None  # an installed copy, perhaps inside another project's checkout

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def save_resolved(folder: Path | str, config: Any, inputs: Mapping[str, str] | None = None) -> Path:
    """Write `run.json` into an output folder, which is made if it is missing, and return its path.

    `inputs` maps what the stage read (a file, a manifest, a model) to its SHA-256. `cprec VERB folder/run.json` runs
    the stage again with these settings.
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
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
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
