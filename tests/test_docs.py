"""The documentation is true: what the README shows runs, in its order; settings, links and commands exist.

What takes minutes (`make demo`, `cprec run amazon_small`) is only checked to exist. Training is cut short: the same
commands, with fewer steps.
"""

from __future__ import annotations

import asyncio
import csv
import functools
import importlib.util
import json
import re
import runpy
import shlex
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from cprec import cli
from cprec.config import RECIPES, find_config
from cprec.field_help import describe_fields
from cprec.recipe import STAGE_CONFIGS, Recipe
from cprec.systems.recipes import sasrec
from cprec.text.prompts import Template, render
from cprec.verbs import VERBS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("prepare", "pretrain", "finetune", "evaluate")
SHORT = [
    "pretrain.num_train_epochs=0.2",
    "pretrain.tiny.hidden_size=32",
    "finetune.num_train_epochs=0.1",
    "finetune.tiny.hidden_size=32",
    "evaluate.max_queries=20",
]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    """A fenced block: its language, the file it shows (or ''), and its text."""

    language: str
    file: str
    text: str


def blocks(page: Path, language: str = "") -> list[Block]:
    found = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(*each) for each in found if language in ("", each[0])]


def commands(block: Block) -> list[list[str]]:
    return [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


# ---- the README, done as it says -------------------------------------------------------------------------------------


def follow(block: Block, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a block of the README shows, in the current folder."""
    if block.file and Path(block.file).is_file():  # a file that an example wrote: its beginning is shown
        assert Path(block.file).read_text().startswith(block.text)
    elif block.file:
        Path(block.file).write_text(block.text)
    elif block.language == "python":
        exec(compile(block.text, "README.md", "exec"), names)
    elif block.language == "bash":
        for program, *arguments in commands(block):
            if program == "cprec" and arguments[0] == "serve":
                monkeypatch.setattr("uvicorn.Server.run", partialmethod(ask_the_service, block))
                assert cli.main([*arguments, "port=0"]) == 0
            elif program == "curl":
                continue  # was asked while the service ran
            elif program == "cprec":
                short = SHORT if arguments[0] in (*STAGES, "run") else []
                assert cli.main([*arguments, *short]) == 0, arguments
            elif program == "python":
                monkeypatch.setattr(sys, "argv", arguments)
                runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            else:
                assert program in ("make", "source"), f"what is {program}?"
    else:
        raise AssertionError(f"a block of {block.language} without a file says nothing to do")


def ask_the_service(server: Any, block: Block, sockets: Any) -> None:
    """In place of serving: ask the application what the block asks by curl."""

    async def ask() -> None:
        transport = httpx.ASGITransport(app=server.config.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            for _, url, option, body in (words for words in commands(block) if words[0] == "curl"):
                assert option == "--json"
                answer = await client.post(url, json=json.loads(body))
                assert answer.status_code == 200 and len(answer.json()["items"]) == json.loads(body)["k"]

    asyncio.run(ask())


@pytest.mark.slow
def test_the_readme_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sasrec, "SASRec", sasrec.SASRec(hidden_size=16, num_epochs=1, min_steps=0))
    shown = blocks(README)
    names: dict[str, Any] = {}
    for block in shown:
        follow(block, names, monkeypatch)

    assert {block.language for block in shown} == {"bash", "csv", "yaml", "python"}
    assert len(names["recommender"].recommend(["books-01"], k=10)) == 10
    with open("recommendations.csv", newline="") as file:
        assert [row["user_id"] for row in csv.DictReader(file)] == ["anna"] * 3 + ["ben"] * 3
    report = json.loads(Path("runs/shop/report/report.json").read_text())
    models = {name + row for name in ("fine-tuning only", "CPRec-style") for row in ("", " blend")}
    assert {"random", "popularity", "transition graph", "blend without the model"} <= set(
        arms := report["domains"]["books"]["arms"]
    )
    assert models <= set(arms)
    assert report["certificate"]["clean"]
    out, err = capsys.readouterr()
    assert "score" in out and "transition graph" in out
    assert "warning" not in err
    folders = (ROOT / "docs" / "data.md").read_text().partition("## What is in the folders")[2].partition("\n## ")[0]
    for name, text in zip(("data", "books"), folders.split("A model folder"), strict=True):
        parts = re.findall(r"`(\w+(?:/|\.\w+))`", text)
        assert len(parts) >= 3
        assert [part for part in parts if not Path("runs/shop", name, part).exists()] == []


@pytest.mark.slow
def test_the_page_on_pretraining_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the shop of the README; the checkpoint that is continued has the number of its own steps."""
    monkeypatch.chdir(tmp_path)
    Path("shop.yaml").write_text(next(block.text for block in blocks(README, "yaml") if block.file == "shop.yaml"))
    monkeypatch.setattr(sys, "argv", ["make_logs.py"])
    runpy.run_path(str(ROOT / "examples" / "make_logs.py"), run_name="__main__")
    small = ["prepare.synthetic.num_market_users=500", "prepare.k_core=2"]
    assert cli.main(["prepare", "shop.yaml"]) == cli.main(["prepare", "demo", *small]) == 0
    assert cli.main(["pretrain", "shop.yaml", "tiny.hidden_size=32"]) == 0
    for block in blocks(ROOT / "docs" / "pretraining.md"):
        if block.file:
            stable = next(Path("runs/shop/pretrained").glob("stable-*")).name
            Path(block.file).write_text(re.sub(r"stable-\d+", stable, block.text))
            assert cli.main(["pretrain", block.file, "tiny.hidden_size=32"]) == 0
        elif block.language == "python":
            exec(compile(block.text, "pretraining.md", "exec"), {})
        else:
            for _, *arguments in commands(block):
                short = ["num_train_epochs=0.2", "max_queries=20"] if arguments[0] == "anneal" else []
                assert cli.main([*arguments, *short]) == 0, arguments
    out, _ = capsys.readouterr()
    assert "no annealing" in out and "20% 1-sqrt mixed_late" in out and "annealing: steps" in out


def test_the_open_model_of_the_readme_changes_the_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = {block.file: block.text for block in blocks(README, "yaml")}
    Path("shop.yaml").write_text(shown["shop.yaml"])
    import yaml

    changes = yaml.safe_load(shown["open_model.yaml"])
    settings = [f"{stage}.{key}={value}" for stage, fields in changes.items() for key, value in fields.items()]
    recipe = find_config("shop.yaml", settings)
    assert recipe.prepare.tokenizer == recipe.pretrain.model_name_or_path == "Qwen/Qwen3-0.6B-Base"


@pytest.mark.parametrize("module", ["cprec.online", "cprec.systems.code_report"])
def test_an_example_of_systems_prints_what_the_page_shows(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = blocks(ROOT / "docs" / "systems.md")
    number = next(number for number, block in enumerate(shown) if module in block.text)
    exec(compile(shown[number].text, "systems.md", "exec"), {})
    assert capsys.readouterr().out == shown[number + 1].text


# ---- every page ------------------------------------------------------------------------------------------------------


def shown_commands(page: Path) -> list[list[str]]:
    """Every `cprec ...` and `make ...` of a page, in blocks and in the text; placeholders are in capitals."""
    inline = re.findall(r"`((?:cprec|make) [^`]+)`", re.sub(r"\s+", " ", without_blocks(page)))
    return [*map(shlex.split, inline), *(words for block in blocks(page, "bash") for words in commands(block))]


@each_page
def test_commands_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(README, "yaml"):
        Path(block.file).write_text(block.text)
    verbs = {verb.name for verb in VERBS}
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()
    for program, *words in shown_commands(page):
        if program == "make":
            assert all("=" in word or word in targets or word in ("&&", "make") for word in words), words
        elif program == "cprec" and words[0] not in ("VERB", "--help"):
            verb, source, *settings = [*words, ""]
            assert verb in verbs, words
            if verb in (*STAGES, "run", "schedule") and source and not source.endswith("run.json"):
                find_config(
                    source, filter(None, settings), stage={"run": None, "schedule": "pretrain"}.get(verb, verb)
                )  # or


@functools.cache
def known_settings() -> set[str]:
    return {f"{stage}.{row.key}" for stage in STAGES for row in describe_fields(STAGE_CONFIGS[stage])}


@each_page
def test_settings_exist(page: Path) -> None:
    known = known_settings()
    text = page.read_text(encoding="utf-8")
    for setting in re.findall(rf"`((?:{'|'.join(STAGES)})\.\w[\w.]*)", text) if page.name != "cli.md" else []:
        if not setting.endswith(".py"):
            assert setting in known, f"{page.name}: there is no setting {setting}"


@each_page
def test_recipes_in_yaml_resolve(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        path = tmp_path / block.file
        path.write_text(block.text)
        if block.file == "open_model.yaml":  # a change to another one
            continue
        shown = [stage for stage in STAGES if re.search(rf"^{stage}:", block.text, re.M)]
        if set(shown) == set(STAGES):
            assert isinstance(find_config(str(path)), Recipe)
        for stage in shown:
            assert isinstance(find_config(str(path), (), stage=stage), STAGE_CONFIGS[stage])


@each_page
def test_files_shown_are_those_that_are_there(page: Path) -> None:
    for block in blocks(page, "python"):
        if block.file:
            assert block.text in (ROOT / block.file).read_text(encoding="utf-8")


@each_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", without_blocks(file), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page.name} links to {target}"


@each_page
def test_no_page_names_a_folder_of_one_machine(page: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:home|root|tmp|work|mnt|Users)\b\S*|\.\./shared\S*", page.read_text())
    assert not found


@pytest.mark.parametrize("script", ["make_cli", "make_results"])
def test_pages_that_scripts_write_are_current(script: str) -> None:
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"run: python docs/{script}.py"


def test_the_template_shown_is_the_one_in_use() -> None:
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    saga, novel = ("books", "Lindisfarne Dreamy Cosy Saga"), ("books", "Elwood Bold Merry Novel")
    film, target = ("films", "Ashford Urban Bright Romance"), ("books", "Dryden Classic Bold Saga")
    for kind, history in (("specific", [saga, novel]), ("mixed", [film, novel])):
        assert f"```text\n{render(Template(), kind, 'books', history, target, '<eos>')}\n```" in page


def test_recipes_that_are_named_exist() -> None:
    assert {"demo", "amazon_small"} <= set(RECIPES)
