"""The direction of the imports, and what may load before a stage runs. Read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cprec.verbs import VERBS

PACKAGE = Path(__file__).parents[1] / "src" / "cprec"

BASE = frozenset({"errors", "schema", "recommender", "ranks", "files", "batch", "provenance", "progress", "machine"})
BELOW = {
    **dict.fromkeys(BASE, BASE),
    "data": BASE,
    "text": BASE | {"data"},
    "distributed": BASE,
    "models": BASE | {"data", "text", "distributed"},
    "train": BASE | {"data", "text", "models", "distributed"},
    "search": BASE | {"data", "models", "distributed"},
    "systems": BASE | {"data", "text", "models", "distributed", "train", "search"},
    "rank": BASE | {"data", "text", "models", "distributed", "search"},
    "baselines": BASE | {"data"},
    "evaluate": BASE | {"data"},
    "serve": BASE | {"data"},
}
"""Which parts of the package each part may import besides itself. A new part needs a line here, and a reason."""

TOP = frozenset(
    {"run", "entrants", "anneal", "report", "shortcuts", "config", "recipe", "settings", "field_help", "recipes"}
    | {"cli", "verbs", "serving", "__main__", "__init__"}
)
"""Parts that know everything below; nothing below knows them."""

EXCEPTIONS = {
    "baselines": {
        *("cprec.train.loop", "cprec.train.schedule", "cprec.train.loss", "cprec.train.checkpoint"),
        *("cprec.train.folder", "cprec.train.trainable", "cprec.distributed"),
    }
}
"""A baseline that is trained uses the one training loop and what that hands out, and the metrics to choose weights."""

GPU_STACK = frozenset(
    ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
    + ("numpy", "scipy", "pyarrow", "yaml", "rich", "jinja2", "markupsafe", "typer")
)
"""All that a training machine may be sure to have; anything else is imported inside the function that needs it. PyTorch
needs Jinja2, and that needs MarkupSafe."""

PREPARATION = ("cprec.data.engine", "cprec.data.judging", "cprec.data.build", "cprec.data.sources")
"""Modules that only data preparation loads, on a machine that has Ibis and DuckDB."""

WITHOUT_ENGINE = ("cprec.data.sources.files", "cprec.data.sources.layouts", "cprec.data.sources.synthetic")
"""Modules beside those that are loaded elsewhere too: to see whether files changed, and to rank by the true chances."""

INSIDE = {"cprec.rank.vllm_processor": "vllm"}
"""Modules that a library loads into a process of its own, and that library."""

VAGUE_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "misc", "tools"})


class Import(NamedTuple):
    """One imported module, and where."""

    module: str
    line: int
    at_import: bool
    """It runs when the importing module is imported: outside functions and `if TYPE_CHECKING`."""


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["cprec", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return found


def part_of(module: str) -> str:
    """`cprec.data.sources.tables` -> `data`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[Import]:
    """Every import statement of a file, those in functions too."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            if node.module.split(".")[0] == "cprec":  # `from cprec.train import loop` imports cprec.train.loop
                for alias in node.names:
                    as_module = PACKAGE.joinpath(*node.module.split(".")[1:], alias.name)
                    is_module = as_module.with_suffix(".py").exists() or as_module.is_dir()
                    yield Import(f"{node.module}.{alias.name}" if is_module else node.module, node.lineno, at_import)
                    if node.module == "cprec" and alias.name == "Recommender":
                        yield Import("cprec.rank.llm", node.lineno, at_import)  # what the lazy name stands for
            else:
                yield Import(node.module, node.lineno, at_import)
        for child in ast.iter_child_nodes(node):
            in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body
            yield from visit(child, at_import and not in_function and not for_types)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def needs_engine(module: str) -> bool:
    """Whether a module may be loaded by data preparation alone."""
    parts = module.split(".")
    ancestors = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return module not in WITHOUT_ENGINE and module != "cprec.data.sources" and bool(ancestors & set(PREPARATION))


def test_imports_point_down() -> None:
    wrong = []
    for module, path in modules().items():
        part = part_of(module)
        if part in TOP:
            continue
        assert part in BELOW, f"{module}: say in BELOW what the part {part!r} may import"
        for used in imports(path):
            if used.module.split(".")[0] != "cprec" or used.module == "cprec" or part_of(used.module) == part:
                continue
            if module.endswith(".config") and used.module.endswith(".config"):
                continue  # settings import settings only, so they may nest those of any part
            if module.endswith(".config") and used.module.endswith(".config"):
                continue  # settings may hold settings
            if part_of(used.module) not in BELOW[part] and used.module not in EXCEPTIONS.get(part, ()):
                wrong.append(f"{path.relative_to(PACKAGE)}:{used.line}: {part} must not import {used.module}")
    assert not wrong, "\n".join(wrong)


def test_modules_need_only_the_gpu_stack_to_be_imported() -> None:
    wrong = []
    for module, path in modules().items():
        known = sys.stdlib_module_names | GPU_STACK | {"cprec", INSIDE.get(module)}
        if needs_engine(module):
            known |= {"ibis", "duckdb", "sqlglot"}
        for used in imports(path):
            name = used.module.split(".")[0]
            if used.at_import and name not in known:
                wrong.append(
                    f"{path.relative_to(PACKAGE)}:{used.line}: import {name} inside the function that needs it"
                )
    assert not wrong, "\n".join(wrong)


def test_only_preparation_loads_the_table_engine() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{used.line}: import {used.module} inside the function that needs it"
        for module, path in modules().items()
        for used in imports(path)
        if used.at_import and needs_engine(used.module) and not needs_engine(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_name_says_what_a_module_holds() -> None:
    vague = [module for module in modules() if VAGUE_NAMES & set(module.lower().split("."))]
    assert not vague, f"{vague}: which noun or verb is it?"


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in modules().values()}
    missing = [str(folder.relative_to(PACKAGE)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}"


HEAVY = {"torch", "numpy", "ibis", "duckdb", "pyarrow", "transformers", "matplotlib", "scipy", "rich", "pandas"}


def loaded_by(*command: str) -> tuple[set[str], str, int]:
    """Top-level packages that a Python process imports, what it prints, and its exit code."""
    result = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    rest = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("import time:"))
    return names, result.stdout + rest, result.returncode


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("no-such-verb", 2),
        ("run no_such_recipe", 2),
        ("run no_such_file.yaml", 2),
        ("prepare", 2),
        *[(f"{verb.name} --help", 0) for verb in VERBS],
    ],
)
def test_the_command_line_is_light_until_a_stage_runs(arguments: str, code: int) -> None:
    names, printed, exit_code = loaded_by("-m", "cprec", *arguments.split())
    assert exit_code == code, printed
    assert not names & HEAVY
    assert "Traceback" not in printed


def test_scoring_saved_rankings_loads_neither_torch_nor_ibis() -> None:
    judges = [name for name in modules() if part_of(name) in {"data", "evaluate"} and not needs_engine(name)]
    names, printed, exit_code = loaded_by("-c", "".join(f"import {module}\n" for module in judges))
    assert exit_code == 0, printed
    assert not names & {"torch", "transformers", "ibis", "duckdb", "matplotlib"}


def test_the_package_itself_is_light() -> None:
    names, printed, exit_code = loaded_by("-c", "import cprec; cprec.__version__")
    assert exit_code == 0, printed
    assert not names & (HEAVY | {"dataclasses", "argparse", "inspect"})
