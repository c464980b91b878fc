"""The imports: their direction, no circles, and what may load before a stage runs. Read from the source with `ast`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from cprec.verbs import VERBS

PACKAGE = Path(__file__).parents[1] / "src" / "cprec"

BASE = frozenset(
    {
        "errors",
        "schema",
        "recommender",
        "ranks",
        "files",
        "batch",
        "choices",
        "provenance",
        "progress",
        "machine",
        "workers",
        "partition",
        "gguf",
    }
)
BELOW = {
    **dict.fromkeys(BASE, BASE),
    "data": BASE,
    "text": BASE | {"data"},
    "distributed": BASE,
    "models": BASE | {"data", "text", "distributed"},
    "inspection": BASE | {"models"},
    "card": BASE | {"data", "text"},
    "train": BASE | {"data", "text", "models", "inspection", "distributed", "search", "card"},
    "search": BASE | {"data", "models", "inspection", "distributed"},
    # Of the systems those that can be stored: a blend opens them without their data.
    "rank": BASE | {"data", "scoring", "text", "models", "distributed", "item_head", "search", "baselines", "systems"},
    "scoring": BASE | {"data"},
    "scaling": BASE,
    "systems": BASE | {"data", "scoring", "text", "models", "inspection", "distributed", "train", "search"},
    "item_head": BASE | {"data", "models", "distributed", "systems"},
    "baselines": BASE | {"data", "scoring"},
    "evaluate": BASE | {"data"},
    "serve": BASE | {"data"},
    # It clusters as systems do, and its intervals are those of evaluations.
    "online": BASE | {"systems", "evaluate"},
}
"""Which parts of the package each part may import besides itself. A new part needs a line here, and a reason."""

TOP = frozenset(
    {
        "run",
        "fit",
        "finetune",
        "entrants",
        "anneal",
        "blend",
        "refit",
        "tune",
        "lineup",
        "report",
        "shortcuts",
        "probes",
        "serving",
        "trained",
    }
    | {"shrink", "distil", "budget", "pretrain", "heads", "teaching"}
    | {"config", "recipe", "recipes", "settings", "field_help", "verbs", "cli", "__main__", "__init__"}
)
"""Parts that know everything below; nothing below knows them."""

# ---- what must stay light --------------------------------------------------------------------------------------------

GPU_STACK = frozenset(
    ("torch", "transformers", "peft", "safetensors", "tokenizers")
    + ("numpy", "scipy", "pyarrow", "yaml", "rich", "jinja2", "markupsafe", "filelock")
)
"""All that a machine that trains is sure to have. PyTorch needs filelock and Jinja2, and that needs MarkupSafe."""

BEYOND_AT_TOP = {
    **{f"cprec.data.{name}": {"ibis"} for name in ("build", "judging")},
    "cprec.data.engine": {"ibis", "duckdb"},
    **{f"cprec.data.sources.{name}": {"ibis"} for name in ("formats", "memory", "numbers", "raw", "tables", "times")},
    "cprec.data.sources.connections": {"ibis", "duckdb", "sqlglot"},
    "cprec.fit.look": {"ibis"},
    "cprec.rank.vllm_processor": {"vllm"},  # vLLM loads it into a process of its own
    "cprec.serve.app": {"fastapi", "starlette"},
    "cprec.serve.gate": {"starlette"},
    "cprec.serve.messages": {"pydantic", "pydantic_core"},
    "cprec.serve.monitoring": {"prometheus_client"},
    "cprec.serve.routes": {"fastapi"},
    "cprec.serve.serve": {"uvicorn"},
    "cprec.serve.strict_json": {"fastapi"},
}
"""Modules that import more than the GPU stack at their top: those that only serve, or only prepare data."""


class Promise(NamedTuple):
    """Some modules, with all that is loaded with them, need only the standard library and a few others."""

    name: str
    modules: frozenset[str]
    libraries: frozenset[str]


TRAINED_WITH = frozenset(
    {"text", "models", "distributed", "card", "train", "search", "rank", "systems", "baselines", "evaluate", "serving"}
    | {
        "run",
        "entrants",
        "anneal",
        "blend",
        "refit",
        "tune",
        "lineup",
        "online",
        "report",
        "shortcuts",
        "probes",
        "trained",
        "shrink",
        "inspection",
        "progress",
        "provenance",
    }
)
"""Parts that are loaded by machines which train, rank or judge, with data that were prepared elsewhere."""

TORCH = frozenset({"torch", "transformers", "peft", "safetensors", "tokenizers"})


@cache
def promises() -> tuple[Promise, ...]:
    """What the imports inside functions are for."""
    every = modules()
    settings = {"cprec.config", "cprec.field_help", "cprec.recipe", "cprec.settings"}
    settings |= {module for module in every if module.endswith(".config") or part_of(module) == "recipes"}
    trained = {module for module in every if part_of(module) in TRAINED_WITH} - set(BEYOND_AT_TOP)
    judging = {module for module in every if part_of(module) in {"evaluate", "run", "entrants", "lineup"}}
    return (
        Promise("the help loads nothing but the standard library", frozenset({"cprec", "cprec.cli"}), frozenset()),
        Promise("settings load nothing but the standard library", frozenset(settings), frozenset()),
        Promise("a machine that trains needs the GPU stack alone", frozenset(trained), GPU_STACK),
        Promise("judging rankings loads no PyTorch", frozenset(judging), GPU_STACK - TORCH),
    )


EXTRAS = frozenset(
    {"fastapi", "uvicorn", "prometheus_client", "optuna", "vllm", "huggingface_hub", "ibis", "duckdb", "sqlglot"}
    | {"pyspark", "py4j", "psycopg", "wandb", "tensorboard", "mlflow", "gguf"}
)
"""Libraries that a user may do without: they are imported by the function that needs them."""

IN_FUNCTIONS = {
    ("cprec.verbs", "cprec.config"): "`cprec --help` would take twice as long",
    ("cprec.verbs", "cprec.field_help"): "`cprec --help` would take twice as long",
    ("cprec.config", "cprec.provenance"): "`cprec VERB --help` is a sixth faster without it",
    ("cprec.serving", "cprec.serve.serve"): "it needs the extra cprec[serve], and `cprec recommend` does not",
    ("cprec.serve.config", "fastapi"): "the check that the extra is there",
    ("cprec.gguf", "torch"): "only the first use of a GGUF file needs it, and preparing data needs no PyTorch",
    ("cprec.gguf", "transformers"): "as PyTorch",
    ("cprec.models", "peft"): "it takes seconds to load, and most models have no adapters",
}
"""Imports inside functions that no promise and no extra explains, with the reason for each."""

VAGUE_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "misc", "tools"})


# ---- the graph of imports --------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported module, and where."""

    module: str
    line: int
    in_function: bool
    for_types: bool
    """It is under `if TYPE_CHECKING`, and never runs."""

    @property
    def at_top(self) -> bool:
        """It runs when the importing module is imported."""
        return not (self.in_function or self.for_types)

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["cprec", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str:
    """`cprec.data.sources.tables` -> `data`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str) -> tuple[Import, ...]:
    """Every import statement of a module, those in functions too."""
    return _imports(modules()[module])


@cache
def _imports(path: Path) -> tuple[Import, ...]:
    return tuple(_found(ast.parse(path.read_text(encoding="utf-8")), path, in_function=False, for_types=False))


def _found(node: ast.AST, path: Path, in_function: bool, for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, in_function, for_types)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
        assert node.module is not None
        for name in dict.fromkeys(_module_of(node.module, alias.name) for alias in node.names):
            yield Import(name, node.lineno, in_function, for_types)
    inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        types_only = for_types or (checked and isinstance(node, ast.If) and child in node.body)
        yield from _found(child, path, inside, types_only)


def _module_of(source: str, name: str) -> str:
    """The module that `from source import name` loads: `from cprec.train import loop` loads cprec.train.loop."""
    if source == "cprec" and name == "Recommender":
        return "cprec.rank.llm"  # what the lazy name stands for
    inner = f"{source}.{name}"
    return inner if source.partition(".")[0] == "cprec" and inner in modules() else source


@cache
def closure(module: str) -> frozenset[str]:
    """A module and everything that is loaded with it: other modules of the package, and top-level libraries."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        if current in modules():
            waiting += [
                used.module if used.library == "cprec" else used.library for used in imports(current) if used.at_top
            ]
            waiting += [current.rpartition(".")[0]] if "." in current else []  # the package is loaded first
        else:
            found.discard(current)
            found.add(current.partition(".")[0])
    return frozenset(found)


def libraries(module: str) -> frozenset[str]:
    """The libraries that are loaded with a module, without the standard library."""
    return frozenset(name for name in closure(module) if name.partition(".")[0] != "cprec") - sys.stdlib_module_names


def shown(module: str, used: Import) -> str:
    return f"{modules()[module].relative_to(PACKAGE)}:{used.line}"


def circles(edges: dict[str, set[str]]) -> Iterable[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                yield from visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            component = stack[place:]
            del stack[place:]
            if len(component) > 1 or node in edges[node]:
                yield component

    for node in edges:
        if node not in index:
            yield from visit(node)


def test_circles_are_found() -> None:
    assert [*circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}})] == [["b", "c"], ["d"]]


# ---- direction and order ---------------------------------------------------------------------------------------------


def test_imports_point_down() -> None:
    wrong = []
    for module in modules():
        part = part_of(module)
        if part in TOP:
            continue
        assert part in BELOW, f"{module}: say in BELOW what the part {part!r} may import"
        for used in imports(module):
            if used.library != "cprec" or used.module == "cprec" or part_of(used.module) == part:
                continue
            if module.endswith(".config") and used.module.endswith(".config"):
                continue  # settings import settings only, so they may nest those of any part
            if part_of(used.module) not in BELOW[part]:
                wrong.append(f"{shown(module, used)}: {part} must not import {used.module}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other() -> None:
    """Neither at their tops nor in functions. What is imported for types alone does not count: it never runs."""
    edges = {
        module: {used.module for used in imports(module) if not used.for_types and used.module in modules()}
        for module in modules()
    }
    found = [" <-> ".join(sorted(group)) for group in circles(edges)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("promise", range(4))
def test_what_is_light_loads_nothing_heavy(promise: int) -> None:
    name, promised, allowed = promises()[promise]
    wrong = [
        f"{module} loads {', '.join(sorted(more))}"
        for module in sorted(promised)
        if (more := libraries(module) - allowed)
    ]
    assert not wrong, "\n".join([f"{name}, but", *wrong])


def test_modules_that_need_more_than_the_gpu_stack_are_named() -> None:
    at_top = {
        module: more
        for module in modules()
        if (
            more := {used.library for used in imports(module) if used.at_top and used.library != "cprec"}
            - sys.stdlib_module_names
            - GPU_STACK
        )
    }
    assert at_top == BEYOND_AT_TOP, "import it inside the function that needs it, or say it in BEYOND_AT_TOP"


def test_imports_stand_at_the_top() -> None:
    """But for extras, those that would break a promise at the top, and those that have a reason in IN_FUNCTIONS. The
    same holds under `if TYPE_CHECKING`."""
    wrong, explained = [], set()
    for module in modules():
        for used in imports(module):
            if used.at_top:
                continue
            if (module, used.module) in IN_FUNCTIONS:
                explained.add((module, used.module))
            elif used.library not in EXTRAS and not breaks_a_promise(module, used):
                wrong.append(f"{shown(module, used)}: import {used.module} at the top")
    assert not wrong, "\n".join(wrong)
    assert explained == set(IN_FUNCTIONS), "IN_FUNCTIONS explains imports that are gone"


def breaks_a_promise(module: str, used: Import) -> bool:
    """Whether an import would make a light module heavy if it stood at the top of `module`."""
    loaded = libraries(used.module) if used.library == "cprec" else {used.library} - sys.stdlib_module_names
    return any(
        loaded - promise.libraries and any(module in closure(light) for light in promise.modules)
        for promise in promises()
    )


def test_a_name_says_what_a_module_holds() -> None:
    vague = [module for module in modules() if VAGUE_NAMES & set(module.lower().split("."))]
    assert not vague, f"{vague}: which noun or verb is it?"


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in modules().values()}
    missing = [str(folder.relative_to(PACKAGE)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}"


# ---- what a process really loads -------------------------------------------------------------------------------------

HEAVY = {"torch", "numpy", "ibis", "duckdb", "pyarrow", "transformers", "matplotlib", "scipy", "rich", "pandas"}

COMMANDS = {
    "--help": 0,
    "--version": 0,
    "no-such-verb": 2,
    "run no_such_recipe": 2,
    "run no_such_file.yaml": 2,
    "prepare": 2,
    "recommend nowhere --history tea": 2,
    "serve nowhere port=8080": 2,
    "blend nowhere": 2,
    "refit nowhere out": 2,
    "anneal nowhere": 2,
    "tune nowhere output=tuned.json": 2,
    "evaluate demo data=nowhere": 2,
    "finetune demo data=nowhere domain=books": 2,
    **{f"{verb.name} --help": 0 for verb in VERBS},
}
"""Command lines that end before a stage runs, and their exit codes."""

RUN_COMMANDS = """
import contextlib, io, json, sys
from cprec import cli
for command in sys.argv[1:]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = cli.main(command.split())
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([command, code, text.getvalue(), sorted(sys.modules)]))
"""


def python(*arguments: str) -> str:
    """What a Python process prints."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def commands() -> dict[str, tuple[int, str, set[str]]]:
    """Exit code, output and loaded modules of every command, one after the other in one process."""
    lines = map(json.loads, python("-c", RUN_COMMANDS, *COMMANDS).splitlines())
    return {command: (code, text, set(loaded)) for command, code, text, loaded in lines}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_is_light_until_a_stage_runs(
    command: str, commands: dict[str, tuple[int, str, set[str]]]
) -> None:
    code, text, loaded = commands[command]
    assert code == COMMANDS[command], text
    assert not loaded & HEAVY
    assert "Traceback" not in text
    if "nowhere" in command:
        assert "nowhere does not exist: give the " in text
    if command == "--help":  # the first
        assert "cprec.config" not in loaded


def test_scoring_saved_rankings_loads_neither_torch_nor_ibis() -> None:
    judges = [module for module in modules() if part_of(module) == "evaluate"]
    loaded = python("-c", "".join(f"import {module}\n" for module in judges) + "import sys\nprint(*sys.modules)")
    assert not set(loaded.split()) & {"torch", "transformers", "ibis", "duckdb", "matplotlib"}


def test_the_package_itself_is_light() -> None:
    loaded = python("-c", "import cprec, sys; cprec.__version__; print(*sys.modules)")
    assert not set(loaded.split()) & (HEAVY | {"dataclasses", "argparse", "inspect"})
