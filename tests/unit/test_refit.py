"""Refitting: what stands beside a model learns the latest events, and is never tried on events that it learnt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cprec import lineup
from cprec.blend import blend
from cprec.data.config import TableSource
from cprec.data.dataset import read_split
from cprec.data.splits import Split
from cprec.entrants import baseline_entrants
from cprec.errors import ConfigError, CPRecError, LeakageError, Unsuitable
from cprec.evaluate.compare import compare
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.results import read_report
from cprec.finetune import finetune
from cprec.item_head import load_heads, made_from
from cprec.rank.blend import read_blend
from cprec.rank.blend_file import read_about
from cprec.rank.config import BlendConfig, RankConfig, RefitConfig
from cprec.refit import _link, _start, refit
from cprec.run import _refitted, evaluate_models
from cprec.schema import CONTEXT, SPLITS, TEST, TRAIN, VALIDATION
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.train.config import FinetuneConfig, TinyModel
from cprec.train.folder import refitted_on

SMALL = {"hidden_size": 16, "num_heads": 2, "num_blocks": 1, "batch_size": 32, "min_steps": 10, "num_epochs": 1}
WORDS = ("apple", "river", "stone", "cloud", "tiger", "piano", "lemon", "grass")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who take six items each, one after the other on a ring of 24."""
    folder = tmp_path_factory.mktemp("world")
    items = [f"{n:02},{WORDS[n % 8]} number {n // 8}" for n in range(24)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]))
    events = [f"u{u:02},{(3 * u + n * n) % 24:02},{1_500_000_000 + n}" for u in range(40) for n in range(6)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    (folder / "margin.csv").write_text("\n".join(["item_id,margin", *(f"{n:02},{n}" for n in range(24))]))
    source = TableSource(domain="shop", interactions=f"{folder}/log.csv", items=f"{folder}/items.csv")
    return prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=(source,),
            target_domains=("shop",),
            vocabulary_size=400,
            k_core=0,
            min_events=3,
            heldout_share=0.0,
            workers=1,
        )
    )


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Heads, and SASRec in blends, that train for a second."""
    settings_of = lineup.settings_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cprec.finetune.TitleSASRec", partial(TitleSASRec, **SMALL))
        patch.setattr(lineup, "settings_of", lambda name, *rest: settings_of(name, SMALL if name == "SASRec" else None))
        yield


@pytest.fixture(scope="module")
def model(data: Path, small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with a head of two networks, and a blend of everything that a part can be."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    config = FinetuneConfig(
        data=str(data),
        output_dir=str(folder),
        domain="shop",
        tiny=TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        num_train_epochs=0,
        max_length=128,
        bf16="false",
        eval_tokens=0,
        item_head=True,
        head_networks=2,
        report_to=("none",),
        seed=3,
    )
    finetune(config)
    fixed = {"EASE": 0.3, "SASRec": 0.3, "margin": 0.1}
    columns = {"margin": f"{data.parent}/margin.csv"}
    blend(
        BlendConfig(
            model=str(folder), parts=("transition graph", "EASE", "SASRec"), columns=columns, fixed=fixed, log_p=False
        )
    )
    return folder


@pytest.fixture(scope="module")
def refitted(model: Path) -> Path:
    return refit(RefitConfig(model=str(model), output_dir=f"{model}-refit", events="validation"))


@pytest.fixture(scope="module")
def split(data: Path) -> Split:
    return read_split(data)


def evaluation(data: Path, model: Path | str, output: Path, **changes: object) -> EvaluateConfig:
    return replace(
        EvaluateConfig(
            data=str(data),
            output_dir=str(output),
            baselines=("EASE",),
            models={"model": str(model)},
            rank=RankConfig(mode="vectors"),
        ),
        **changes,  # type: ignore[arg-type]
    )


def test_events_that_are_learnt_are_training_events(split: Split) -> None:
    one, both = split.learning(VALIDATION), split.learning(VALIDATION, TEST)
    counts = {part: int(split.events(part).sum()) for part in (TRAIN, VALIDATION, TEST)}
    assert counts == {TRAIN: 160, VALIDATION: 40, TEST: 40}
    assert [int(one.events(part).sum()) for part in counts] == [200, 0, 40]
    assert [int(both.events(part).sum()) for part in counts] == [240, 0, 0]
    assert (split.validates, one.validates, both.validates) == (True, False, False)
    assert np.array_equal(one.events(TEST), split.events(TEST)) and split.learning().validates


def test_head_and_parts_are_those_of_the_longer_log(model: Path, refitted: Path, split: Split, data: Path) -> None:
    was, now = (read_blend(folder, split.catalogue) for folder in (model, refitted))
    assert [(part.name, part.weight, part.floor) for part in was.parts] == [
        (part.name, part.weight, part.floor) for part in now.parts
    ]
    longer = split.learning(VALIDATION)
    before, after = ({part.name: part.recommender for part in each.parts} for each in (was, now))
    assert {"EASE", "SASRec", "margin"} <= after.keys()
    for name, recommender in after.items():
        if name == "margin":
            expected = before[name].arrays()
        else:
            expected = lineup.settings_of(name).make(longer, "shop", seed=0).arrays()
            assert any(not np.array_equal(expected[key], value) for key, value in before[name].arrays().items())
        assert all(np.array_equal(expected[key], value) for key, value in recommender.arrays().items())

    heads = [load_heads(folder, split.catalogue)["shop"] for folder in (model, refitted)]
    vectors = [head.recommender.arrays()["vectors"] for head in heads]
    assert np.array_equal(*vectors), "titles are not read again"
    first = "model.networks.0.items.rows"
    rows = [head.recommender.arrays()[first] for head in heads]
    assert rows[0].shape == rows[1].shape and not np.allclose(*rows)
    by_hand = heads[0].trained_again(longer, seed=3, folder=data.parent / "by-hand")
    assert np.array_equal(by_hand.recommender.arrays()[first], rows[1])

    weights = [(folder / "model.safetensors").read_bytes() for folder in (model, refitted)]
    assert weights[0] == weights[1] and made_from(refitted)["held_out"] == [VALIDATION]
    assert (refitted / "model.safetensors").samefile(model / "model.safetensors"), "a second name"
    assert refitted_on(model) == () and refitted_on(refitted) == (VALIDATION,)
    counts = [pq.read_table(folder / "popularity.parquet")["num_events"].to_numpy() for folder in (model, refitted)]
    assert [int(one.sum()) for one in counts] == [160, 200]
    assert np.array_equal(counts[1], np.bincount(longer.train.item, minlength=24))
    card = (refitted / "README.md").read_text()
    assert "have learnt the validation events" in card and "model-index" not in card
    assert read_about(refitted)["blend"] == read_about(model)["blend"]
    assert not list(refitted.parent.glob("*incomplete")), "the networks are in the head"


def test_users_who_are_kept_out_of_training_stay_out(split: Split) -> None:
    unseen = split.interactions.user < 10
    kept_out = replace(split, part=np.where(unseen & split.events(TRAIN), SPLITS.index(CONTEXT), split.part))
    one, every = kept_out.learning(VALIDATION), kept_out.learning(VALIDATION, TEST, CONTEXT)
    assert not (one.events(TRAIN) & unseen).any() and int(one.events(TRAIN).sum()) == 30 * 5
    assert every.events(TRAIN).all()


def test_a_setting_that_needs_validation_events_is_left_out(split: Split, tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match="patience=3 ends training by validation events"):
        replace(TitleSASRec(**SMALL), patience=3).make(split.learning(VALIDATION), "shop", folder=tmp_path)


def test_files_of_a_copy_are_the_same_but_for_the_log(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("weights")
    (tmp_path / "model.safetensors").symlink_to("real")
    (tmp_path / "log.jsonl").write_text("a line")
    for name in ("model.safetensors", "log.jsonl"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        _link(str(tmp_path / name), str(tmp_path / "copy" / name))
    assert (tmp_path / "copy/model.safetensors").read_text() == "weights"
    assert not (tmp_path / "copy/log.jsonl").samefile(tmp_path / "log.jsonl")


def test_without_validation_the_last_weights_are_kept(split: Split, tmp_path: Path) -> None:
    settings = replace(TitleSASRec(**SMALL), num_epochs=4, text_size=8)
    settings.make(split.learning(VALIDATION), "shop", folder=tmp_path)
    (record,) = tmp_path.glob("*/stage-1/system.json")
    assert json.loads(record.read_text())["best"] is None
    assert "ndcg" not in (record.parent / "log.jsonl").read_text()


def test_the_same_refit_is_reused_and_another_made_anew(
    model: Path, refitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = (refitted / "refit.json").stat().st_mtime_ns
    refit(RefitConfig(model=str(model), output_dir=str(refitted), events="validation"))
    assert "refitted from the same, reused" in capsys.readouterr().err
    assert (refitted / "refit.json").stat().st_mtime_ns == written
    moved = Path(shutil.copytree(refitted.parent, f"{refitted.parent}-moved"))
    refit(RefitConfig(model=str(moved / model.name), output_dir=str(moved / refitted.name), events="validation"))
    assert "refitted from the same, reused" in capsys.readouterr().err
    copy = Path(shutil.copytree(refitted, f"{refitted}-copy"))
    refit(RefitConfig(model=str(model), output_dir=str(copy)))
    assert refitted_on(copy) == (VALIDATION, TEST, CONTEXT)
    with pytest.raises(ConfigError, match="holds a refit of .*model: name a new folder"):
        other = Path(shutil.copytree(model, f"{model}-2"))
        refit(RefitConfig(model=str(other), output_dir=str(copy)))


def test_it_is_tried_on_test_events_beside_baselines_that_learnt_the_same(
    model: Path, refitted: Path, data: Path, split: Split, tmp_path: Path
) -> None:
    config = evaluation(data, refitted, tmp_path / "refit", refit=True)
    report = evaluate_models(config)
    result = report.domains["shop"]
    assert {"model", "model blend", "blend without the model", "EASE"} <= result.arms.keys()
    assert report.protocol["learnt"].startswith("validation events too")
    assert read_report(tmp_path / "refit/report.json").protocol == report.protocol
    (ease,) = baseline_entrants(config, split, "shop")
    made = ease.open().recommender
    expected = lineup.settings_of("EASE").make(split.learning(VALIDATION), "shop").arrays()
    assert all(np.array_equal(expected[key], value) for key, value in made.arrays().items())  # type: ignore[attr-defined]
    plain = evaluate_models(evaluation(data, model, tmp_path / "plain"))
    assert "learnt" not in plain.protocol
    with pytest.raises(ConfigError, match="learnt"):
        compare([str(tmp_path / "plain"), str(tmp_path / "refit")])
    gone = evaluation(data, tmp_path / "gone", tmp_path / "refit")
    with pytest.raises(ConfigError, match="answer other questions"):
        evaluate_models(gone)
    assert "model" in evaluate_models(replace(gone, refit=True)).domains["shop"].arms
    assert ease.identity != baseline_entrants(evaluation(data, model, tmp_path), split, "shop")[0].identity


@pytest.mark.parametrize(
    ("events", "changes", "error", "message"),
    [
        ("validation", {}, ConfigError, "has learnt the validation events, and baselines would not: set refit=true"),
        ("validation", {"part": "validation"}, LeakageError, "has learnt the validation events that it is to be tried"),
        ("all", {"refit": True}, LeakageError, "has learnt the test events that it is to be tried on"),
        ("none", {"refit": True}, ConfigError, "has not learnt the validation events: run `cprec refit"),
    ],
)
def test_what_learnt_other_events_than_the_rest_is_refused(
    events: str,
    changes: dict[str, object],
    error: type[CPRecError],
    message: str,
    model: Path,
    refitted: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    folder = {"none": model, "validation": refitted}.get(events) or refit(
        RefitConfig(model=str(model), output_dir=str(tmp_path / "all"))
    )
    with pytest.raises(error, match=message):
        evaluate_models(evaluation(data, folder, tmp_path / "out", **changes))


def test_what_cannot_be_refitted_is_told(model: Path, refitted: Path, data: Path, tmp_path: Path) -> None:
    def asked(of: Path, to: Path | str = tmp_path / "new", **changes: str) -> RefitConfig:
        return RefitConfig(model=str(of), output_dir=str(to), **changes)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="holds no finished model"):
        refit(asked(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="has learnt the validation events already"):
        refit(asked(refitted))
    with pytest.raises(LeakageError, match="weights are chosen by validation events: blend the model that it was"):
        blend(BlendConfig(model=str(refitted), parts=("EASE",), log_p=False))
    with pytest.raises(ConfigError, match="went on from that of none, which is not there as it was"):
        _start(Path("none"), {"start": "abc"})
    with pytest.raises(ConfigError, match="in use for something else"):
        refit(asked(model, data))
    with pytest.raises(ConfigError, match="choose all or validation"):
        asked(model, events="test")
    with pytest.raises(ConfigError, match="part=validation asks for them"):
        evaluation(data, model, tmp_path, refit=True, part="validation")
    changed = Path(shutil.copytree(data, tmp_path / "data"))
    about = json.loads((changed / "dataset.json").read_text())
    (changed / "dataset.json").write_text(json.dumps(about, indent=3))
    with pytest.raises(LeakageError, match="from other events than those of"):
        refit(asked(model, data=str(changed)))
    alone = Path(shutil.copytree(model, tmp_path / "alone"))
    for name in ("item_head", "blend"):
        shutil.rmtree(alone / name)
    (alone / "blend.json").unlink()
    with pytest.raises(Unsuitable, match="neither an item head nor a blend"):
        refit(asked(alone))
    assert _refitted(str(alone)) == str(alone), "a run tries it as it is"
    assert not (tmp_path / "new").exists()
