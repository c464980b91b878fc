"""Typed settings, recipes, YAML files, and the record beside an output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cprec.recipe
from cprec import config as configs
from cprec import provenance
from cprec.config import describe_recipe, find_config, from_mapping, from_yaml, resolve, to_yaml
from cprec.data.config import TableFiles, TableSource
from cprec.errors import ConfigError
from cprec.field_help import describe_fields, field_docs, show_value
from cprec.provenance import WEIGHTS, FileHashes, file_sha256, model_hashes, read_resolved, save_resolved, to_dict
from cprec.recipes.arms import ARMS
from cprec.settings import parse_overrides
from cprec.text.config import PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Table:
    """A source."""

    path: Path
    """The file."""
    columns: dict[str, str]
    """Our name: theirs."""
    kind: Literal["csv", "parquet"] = "csv"


@dataclass(frozen=True, kw_only=True)
class World:
    """Another source."""

    num_users: int
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's size."""

    width: int = 64
    """Channels."""
    heads: int = 4
    """Attention heads; they divide `width`."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} must be a multiple of heads={self.heads}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage."""

    output_dir: Path
    """Where the
    results go."""
    num_steps: int = 100
    """Optimiser steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    resume: bool = True
    """Go on from a checkpoint."""
    name: str = "stage"
    domains: tuple[str, ...] = ()
    """Domains, in order."""
    betas: tuple[float, float] = (0.9, 0.95)
    limit: int | None = None
    """At most so many; none for all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    weights: dict[str, float] = None  # type: ignore[assignment]
    size: Size = Size()
    """How large."""
    sources: tuple[Table | World, ...] = ()
    world: World | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights is None:
            object.__setattr__(self, "weights", {})


BASE = Stage(output_dir=Path("out"))


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("num_steps=1_000", "num_steps", 1000),
        ("num_steps=1e3", "num_steps", 1000),
        ("num_steps=-2", "num_steps", -2),
        ("learning_rate=3e-4", "learning_rate", 3e-4),
        ("learning_rate=1", "learning_rate", 1.0),
        ("resume=no", "resume", False),
        ("resume=True", "resume", True),
        ("resume=0", "resume", False),
        ("name=a=b, c", "name", "a=b, c"),
        ("name=", "name", ""),
        ("output_dir=runs/x", "output_dir", Path("runs/x")),
        ("domains=books,games", "domains", ("books", "games")),
        ("domains=books", "domains", ("books",)),
        ("domains=", "domains", ()),
        ("betas=0.8,0.9", "betas", (0.8, 0.9)),
        ("limit=none", "limit", None),
        ("limit=5", "limit", 5),
        ("device=cuda", "device", "cuda"),
        ("weights=books:2,games:0.5", "weights", {"books": 2.0, "games": 0.5}),
        ("weights.books=2", "weights", {"books": 2.0}),
        ("size.width=128", "size", Size(width=128)),
        ("world.num_users=3", "world", World(num_users=3)),
        ("sources.0.num_users=3", "sources", (World(num_users=3),)),
    ],
)
def test_a_setting_takes_the_type_of_its_field(override: str, field: str, value: object) -> None:
    changed = resolve(BASE, [override])
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert getattr(BASE, field) == getattr(Stage(output_dir=Path("out")), field), "the original is not touched"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps=1.5", "num_steps=1.5: expected a whole number, such as 20, 1_000 or 1e6"),
        ("num_steps=inf", "num_steps=inf: expected a whole number"),
        ("learning_rate=fast", "learning_rate=fast: expected a number, such as 0.1 or 3e-4"),
        ("learning_rate=nan", "learning_rate=nan: expected a number"),
        ("resume=maybe", "resume=maybe: expected true or false"),
        ("limit=few", "limit=few: expected a whole number, such as 20, 1_000 or 1e6, or none"),
        ("device=gpu", "device=gpu: expected auto | cpu | cuda"),
        ("device=cdua", "did you mean 'cuda'?"),
        ("betas=0.9", "betas: expected 2 entries, as in float,float; got 1"),
        ("weights=books", "weights=books: expected key:value,key:value"),
        ("weights=books:x", "weights.books=x: expected a number"),
        ("lerning_rate=1", "Stage has no field 'lerning_rate'; did you mean 'learning_rate'? Its fields: output_dir, "),
        ("size.widht=1", "Size (size) has no field 'size.widht'; did you mean 'width'? Its fields: width, heads"),
        ("width=64", "Stage has no field 'width'; did you mean 'size.width'? Its fields: output_dir, "),
        ("size=big", "size=big: size is a group of settings; set one of size.width, size.heads"),
        ("size.width=63", "width=63 must be a multiple of heads=4"),
        ("num_steps.x=1", "num_steps={'x': '1'}: expected a whole number"),
        ("num_steps", "'num_steps' is not a setting; write key=value"),
        ("=3", "'=3' is not a setting"),
        ("output_dir=", "output_dir=: expected a path"),
        ("sources.1.num_users=3", "sources.1: there are 0 entries, numbered from 0; the next one is sources.0"),
        ("sources.0.num_user=3", "has no field 'sources.0.num_user'; did you mean 'num_users'?"),
        ("world.users=3", "World (world) has no field 'world.users'"),
    ],
)
def test_a_wrong_setting_says_what_is_accepted(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(BASE, [override])
    assert message in str(caught.value)


def test_settings_are_applied_together() -> None:
    # heads=6 alone does not divide the width of 64; neither does width=66 the 4 heads
    assert resolve(BASE, ["size.heads=6", "size.width=66"]).size == Size(width=66, heads=6)


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'seed' is set twice, to '1' and '2'"):
        resolve(BASE, ["seed=1", "seed=2"])
    with pytest.raises(ConfigError, match="both set 'size'"):
        resolve(BASE, ["size=x", "size.width=8"])


def test_entries_of_a_tuple_and_of_a_dict_change_alone() -> None:
    table = Table(path=Path("a.csv"), columns={"user_id": "u", "item_id": "i"})
    config = Stage(output_dir=Path("out"), sources=(table, World(num_users=2)))
    changed = resolve(config, ["sources.0.columns.item_id=asin", "sources.0.kind=parquet", "sources.1.num_users=9"])
    assert changed.sources == (
        Table(path=Path("a.csv"), columns={"user_id": "u", "item_id": "asin"}, kind="parquet"),
        World(num_users=9),
    )


COMPLETE = """
output_dir: runs/x
learning_rate: 1e-4        # YAML reads this as text
domains: [books, games]
size: {width: 32}
weights: {books: 1}
sources:
  - {path: a.csv, columns: {user_id: uid}}
  - {num_users: 7}
limit: null
"""


def test_yaml_is_a_complete_configuration(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(COMPLETE)
    config = from_yaml(path, Stage, ["size.heads=8", "sources.1.num_users=8"])
    assert config == Stage(
        output_dir=Path("runs/x"),
        learning_rate=1e-4,
        domains=("books", "games"),
        size=Size(width=32, heads=8),
        weights={"books": 1.0},
        sources=(Table(path=Path("a.csv"), columns={"user_id": "uid"}), World(num_users=8)),
    )
    path.write_text(to_yaml(config))
    assert from_yaml(path, Stage) == config


@pytest.mark.parametrize(
    ("entry", "settings", "items"),
    [
        ("items: i.csv", [], ("i.csv",)),
        ("items: [i.csv, j.csv]", ["separator=|"], TableFiles(path=("i.csv", "j.csv"), separator="|")),
        ("items: i.csv", ["columns.item_id=id"], TableFiles(path=("i.csv",), columns={"item_id": "id"})),
        ("items: {path: i.csv, decimal: ','}", ["path=j.csv"], TableFiles(path=("j.csv",), decimal=",")),
        ("items: {path: i.csv, columns: {item_id: id}}", ["columns.title=name"],
         TableFiles(path=("i.csv",), columns={"item_id": "id", "title": "name"})),
        ("{}", ["path=i.csv", "names=item_id,title"], TableFiles(path=("i.csv",), names=("item_id", "title"))),
    ],
)  # fmt: skip
def test_a_table_is_its_files_or_those_with_settings(
    tmp_path: Path, entry: str, settings: list[str], items: object
) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(f"interactions: l.csv\ndomain: toys\n{entry if entry != '{}' else ''}\n")
    source = from_yaml(path, TableSource, [f"items.{setting}" for setting in settings])
    assert source.items == items
    assert from_mapping(TableSource, to_dict(source)) == source
    plain = TableSource(domain="toys", interactions="l.csv", items="i.csv")
    assert resolve(plain, ["items.separator=|"]).items == TableFiles(path=("i.csv",), separator="|")


def test_entries_of_a_list_are_numbered() -> None:
    with pytest.raises(ConfigError, match=r"its entries are numbered: tables\.0\.items, say"):
        from_mapping(PrepareConfig, parse_overrides(["output_dir=d", "target_domains=a", "tables.items=i.csv"]))


def test_a_wrong_setting_of_a_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text("interactions: l.csv\ndomain: toys\nitems: {path: i.csv, seperator: x}\n")
    with pytest.raises(ConfigError, match=r"no field 'items.seperator'; did you mean 'separator'\? Its fields: path"):
        from_yaml(path, TableSource)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_steps: 1", "Stage needs output_dir"),
        ("output_dir: x\nsize: {width: x}", "size.width=x: expected a whole number"),
        ("output_dir: x\nname: no", "name=False: expected text (in YAML, in quotes)"),
        ("output_dir: x\nnum_steps: true", "num_steps=True: expected a whole number"),
        ("output_dir: x\nsources: [{path: a}]", "fits nothing that is accepted"),
        ("output_dir: [", "is not YAML"),
        ("output_dir: x\nnum_steps: 1\nnum_steps: 2", "num_steps is set twice, in lines 2 and 3; give it once"),
        ("output_dir: x\nsize: {width: 1, width: 2}", "size.width is set twice, in line 2"),
        ("output_dir: x\nsources: [{path: a, path: b}]", "sources.0.path is set twice, in line 2"),
        ("- a", "holds no settings"),
        ("", "holds no settings"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        from_yaml(path, Stage)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.slow
@given(
    steps=st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    name=st.text(),
    domains=st.lists(st.text(min_size=1), max_size=3),
    limit=st.none() | st.integers(),
    weights=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
)
def test_a_configuration_survives_json(steps: int, rate: float, name: str, domains: list[str], limit: int | None,
                                       weights: dict[str, float]) -> None:  # fmt: skip
    config = Stage(output_dir=Path("x"), num_steps=steps, learning_rate=rate, name=name, domains=tuple(domains),
                   limit=limit, weights=weights)  # fmt: skip
    assert from_mapping(Stage, json.loads(json.dumps(to_dict(config)))) == config


@given(steps=st.integers(), rate=st.floats(allow_nan=False), resume=st.booleans(), limit=st.none() | st.integers())
def test_what_is_shown_can_be_typed(steps: int, rate: float, resume: bool, limit: int | None) -> None:
    config = Stage(output_dir=Path("x"), num_steps=steps, learning_rate=rate, resume=resume, limit=limit)
    names = ("num_steps", "learning_rate", "resume", "limit", "betas", "device")
    assert resolve(BASE, [f"{name}={show_value(getattr(config, name))}" for name in names]) == resolve(
        config, ["output_dir=out"]
    )


# ---- recipes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TinyRecipe(configs.Recipe):
    """A recipe with one more field than usual."""

    arms: tuple[str, ...] = ("a", "b")
    """What is compared."""


def tiny(*, data: Path, num_steps: int = 10) -> TinyRecipe:
    """A recipe for these tests."""
    stage = Stage(output_dir=data / "out", num_steps=num_steps)
    stages: Any = {"prepare": stage, "pretrain": stage, "finetune": stage, "evaluate": stage}
    return TinyRecipe(name="tiny", description="for tests", **stages)


@pytest.fixture
def with_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "RECIPES", {"tiny": tiny})
    monkeypatch.setattr(configs, "STAGE_CONFIGS", dict.fromkeys(("prepare", "pretrain", "finetune", "evaluate"), Stage))
    for name in ("PrepareConfig", "PretrainConfig", "FinetuneConfig", "EvaluateConfig"):
        monkeypatch.setattr(cprec.recipe, name, Stage)  # what the annotations of Recipe name


@pytest.mark.usefixtures("with_recipe")
class TestRecipes:
    def test_arguments_and_fields(self) -> None:
        recipe = find_config("tiny", ["data=logs", "num_steps=5", "prepare.seed=3", "arms=c"])
        assert recipe.prepare == Stage(output_dir=Path("logs/out"), num_steps=5, seed=3)
        assert recipe.pretrain == Stage(output_dir=Path("logs/out"), num_steps=5)
        assert recipe.arms == ("c",)

    def test_one_list_of_settings_serves_every_verb(self) -> None:
        settings = ["data=logs", "prepare.seed=3", "finetune.seed=4", "arms=c"]
        assert find_config("tiny", settings, stage="prepare").seed == 3
        assert find_config("tiny", settings, stage="finetune").seed == 4
        assert find_config("tiny", ["data=logs", "seed=5"], stage="finetune").seed == 5

    @pytest.mark.parametrize(
        ("source", "settings", "message"),
        [
            ("tiny", [], "tiny needs data=FOLDER"),
            ("tiyn", [], "there is no recipe 'tiyn'; did you mean 'tiny'? Recipes: tiny; or give a YAML file"),
            ("tiny", ["data=x", "num_steps=many"], "num_steps=many: expected a whole number"),
            ("tiny", ["data=x", "prepare.sede=1"], "Stage (prepare) has no field 'prepare.sede'; did you mean 'seed'?"),
            ("tiny", ["data=x", "prepar.seed=1"], "TinyRecipe has no field 'prepar'; did you mean 'prepare'?"),
            ("missing.yaml", [], "missing.yaml does not exist"),
        ],
    )
    def test_faults(self, source: str, settings: list[str], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            find_config(source, settings)
        assert message in str(caught.value)

    def test_yaml_on_top_of_a_recipe(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("recipe: tiny\ndata: logs\nprepare: {num_steps: 7, size: {width: 32}}\npretrain.seed: 2\n")
        recipe = find_config(str(path), ["prepare.seed=1"])
        assert recipe.prepare == Stage(output_dir=Path("logs/out"), num_steps=7, size=Size(width=32), seed=1)
        assert recipe.pretrain.seed == 2
        assert find_config(str(path), ["seed=9"], stage="prepare").seed == 9

    def test_yaml_of_one_stage_and_the_record_of_a_run(self, tmp_path: Path) -> None:
        path = tmp_path / "prepare.yaml"
        path.write_text("output_dir: x\nseed: 4\n")
        config = find_config(str(path), ["num_steps=3"], stage="prepare")
        assert config == Stage(output_dir=Path("x"), seed=4, num_steps=3)
        record = save_resolved(tmp_path / "out", config)
        assert find_config(str(record), stage="prepare") == config

    def test_yaml_of_a_whole_recipe(self, tmp_path: Path) -> None:
        path = tmp_path / "all.yaml"
        stages = "".join(f"{stage}: {{output_dir: {stage}}}\n" for stage in configs.STAGE_CONFIGS)
        path.write_text(f"name: mine\ndescription: all by hand\n{stages}")
        recipe = find_config(str(path), ["prepare.seed=2"])
        assert recipe.prepare == Stage(output_dir=Path("prepare"), seed=2)
        assert find_config(str(path), stage="evaluate") == Stage(output_dir=Path("evaluate"))
        settings = ["seed=3", "pretrain.seed=4"]  # a plain key is of the stage, whichever stage the verb runs
        assert find_config(str(path), settings, stage="prepare") == Stage(output_dir=Path("prepare"), seed=3)
        path.write_text("prepare: {output_dir: alone}\n")
        assert find_config(str(path), stage="prepare") == Stage(output_dir=Path("alone"))
        with pytest.raises(ConfigError, match="there is no part pretrain: in it"):
            find_config(str(path), stage="pretrain")
        path.write_text("name: mine\n")
        with pytest.raises(ConfigError, match="Recipe needs prepare, evaluate"):
            find_config(str(path))

    def test_how_to_call_it(self) -> None:
        assert describe_recipe("tiny", tiny) == "tiny data=FOLDER [num_steps=10]"


def test_every_recipe_can_be_described_and_has_a_first_line() -> None:
    for name, recipe in configs.RECIPES.items():
        assert describe_recipe(name, recipe).startswith(name)
        assert (recipe.__doc__ or "").strip(), f"recipe {name} needs a docstring: it is its help"


# ---- help of the fields ----------------------------------------------------------------------------------------------


def test_field_docs_are_read_from_the_source() -> None:
    docs = field_docs(Stage)
    assert docs["output_dir"] == "Where the results go."
    assert "name" not in docs
    assert field_docs(TinyRecipe)["arms"] == "What is compared."
    assert field_docs(TinyRecipe)["name"].startswith("The recipe's name")


def test_fields_are_described_with_type_and_default() -> None:
    rows = {row.key: row for row in describe_fields(Stage)}
    assert rows["output_dir"] == ("output_dir", "path", None, "Where the results go.")
    assert rows["limit"] == ("limit", "int or none", "none", "At most so many; none for all.")
    assert rows["device"].type == "auto | cpu | cuda"
    assert rows["betas"] == ("betas", "float,float", "0.9,0.95", "")
    assert rows["size.*"] == ("size.*", "group of settings", "(below)", "How large.")
    assert rows["size.width"] == ("size.width", "int", "64", "Channels.")
    assert rows["sources"].type == "list of Table or World"
    assert rows["sources.0.path"].default is None
    assert rows["world.num_users"].text == "How many."


# ---- the record beside an output -------------------------------------------------------------------------------------


def test_save_resolved_records_what_made_an_output(tmp_path: Path) -> None:
    source = tmp_path / "log.csv"
    source.write_bytes(b"abc")
    config = Stage(output_dir=tmp_path, seed=7)
    path = save_resolved(tmp_path / "new", config, {"log.csv": file_sha256(source)})
    record = json.loads(path.read_text())
    assert path == tmp_path / "new" / provenance.CONFIG_FILE
    assert record == read_resolved(tmp_path / "new")
    assert record["stage"] == "Stage"
    assert from_mapping(Stage, record["config"]) == config
    assert record["seed"] == 7
    assert {"python", "torch", "numpy"} <= set(record["versions"])
    assert record["inputs"] == {"log.csv": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert [entry.name for entry in path.parent.iterdir()] == [provenance.CONFIG_FILE], "no unfinished file is left"


def test_reading_a_record_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not an output folder of cprec"):
        read_resolved(tmp_path)
    (tmp_path / provenance.CONFIG_FILE).write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_resolved(tmp_path)


def test_the_commit_is_none_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "cprec" / "provenance.py"))
    assert provenance.git_commit() is None


# ---- arms ------------------------------------------------------------------------------------------------------------

CHANGED_BY_ARM = {
    "no_mixed": {"mixture"},
    "no_specific": {"mixture"},
    "no_annealing": {"lr_scheduler_type"},
    "no_warmup": {"warmup_steps"},
    "cosine": {"lr_scheduler_type"},
    "linear": {"anneal_shape"},
    "items_only": {"loss"},
    "mixed_late": {"mixture", "anneal_mixture"},
    "sft_late": {"anneal_mixture"},
    "tokens_10": {"num_train_epochs"},
    "tokens_30": {"num_train_epochs"},
    "interleaved": {"mixed_order"},
    "shuffled": {"document_order"},
    "title_brand_category": {"item_fields"},
}


@pytest.mark.parametrize("arm", CHANGED_BY_ARM)
def test_an_arm_changes_what_it_says_and_its_folders(arm: str) -> None:
    plain, changed = find_config("demo"), find_config("demo", [f"arm={arm}"])

    def differences(stage: str) -> set[str]:
        before, after = (to_dict(getattr(recipe, stage)) for recipe in (plain, changed))
        return {name for name in before if before[name] != after[name]}

    folders = {"data", "output_dir"}
    assert (differences("prepare") | differences("pretrain")) - folders == CHANGED_BY_ARM[arm]
    assert differences("finetune") | differences("evaluate") <= folders
    assert changed.pretrain.output_dir == f"runs/demo/arms/{arm}/pretrain"
    own_data = arm in ("interleaved", "shuffled", "title_brand_category")
    data = f"runs/demo/arms/{arm}/data" if own_data else "runs/demo/data"
    assert {changed.prepare.output_dir, changed.pretrain.data, changed.finetune.data, changed.evaluate.data} == {data}


def test_every_arm_is_tested() -> None:
    assert set(ARMS) == set(CHANGED_BY_ARM)


def test_an_arm_goes_with_other_settings_and_one_stage() -> None:
    config = find_config("demo", ["arm=cosine", "learning_rate=1e-2"], stage="pretrain")
    assert (config.lr_scheduler_type, config.learning_rate) == ("cosine", 1e-2)
    with pytest.raises(ConfigError, match=r"there is no arm 'no_mix'; did you mean 'no_mixed'\? Arms: no_mixed, "):
        find_config("demo", ["arm=no_mix"])


def test_hashes_are_not_kept_on_a_disk_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("write_text", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    hashes = FileHashes(tmp_path)
    hashes.add("weights", (1, 0, 0), "hash", when=0)
    hashes.save()


def test_a_model_of_the_hub_is_the_commit_of_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name says nothing of its files: the copy on this machine may be replaced by a newer one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hashes = FileHashes(tmp_path)
    model = tmp_path / "models--someone--model"
    assert model_hashes("someone/model", WEIGHTS, hashes) == model_hashes("no/such/folder", WEIGHTS, hashes) == {}
    for commit in ("a" * 40, "b" * 40):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text("{}")
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs/main").write_text(commit)
        assert model_hashes("someone/model", WEIGHTS, hashes) == {"commit": commit}
