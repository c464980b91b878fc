"""What stands between the command line and the service: models are opened by name, and baselines stand in for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cprec import serving
from cprec.errors import ConfigError
from cprec.recipes.demo import demo
from cprec.serve.config import RecommendConfig, ServeConfig


class FakeModel:
    """Stands for a model and for its catalogue."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        self.catalogue = self

    def digest(self) -> str:
        return "other" if "other" in self.folder else "same"

    @classmethod
    def from_pretrained(cls, folder: str, name: str = "", **_: Any) -> FakeModel:
        return cls(folder, name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches `recommend` and `serve`."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serving, "LLMRecommender", FakeModel)
    monkeypatch.setattr(serving, "recommend_one", lambda *arguments: found.append(arguments))
    monkeypatch.setattr("cprec.serve.serve.serve", lambda *arguments: found.append(arguments))
    return found


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Model folders; two have the same name, and the last has another catalogue."""
    paths = [tmp_path / name for name in ("a/x", "a/y", "b/x", "other/z")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "run.json").write_text('{"config": {"data": "nowhere"}}')
    return [str(path) for path in paths]


def test_engines_have_names_of_their_own(
    calls: list[Any], folders: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPREC_PROGRESS", "plain")
    ax, ay, bx, _ = folders
    serving.open_and_serve(ServeConfig(models=(ax, f"{ay}/")))
    serving.open_and_serve(ServeConfig(models=(ax, bx)))
    (config, engines, baselines), (_, namesakes, _) = calls
    assert config.models == (ax, f"{ay}/") and baselines == []
    assert [engine.name for engine in engines] == ["x", "y"]
    assert [engine.name for engine in namesakes] == [ax, bx]
    assert "nowhere is not here: no list stands in" in capsys.readouterr().err


def test_models_of_two_catalogues_are_refused(calls: list[Any], folders: list[str]) -> None:
    with pytest.raises(ConfigError, match="has another catalogue than"):
        serving.open_and_serve(ServeConfig(models=(folders[0], folders[3])))
    assert not calls


def test_recommend_opens_its_model(calls: list[Any], folders: list[str]) -> None:
    config = RecommendConfig(model=folders[0], history=("a",))
    serving.open_and_recommend(config)
    ((given, model),) = calls
    assert given == config and model.folder == folders[0]


def test_the_demo_is_served_with_both_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServeConfig] = []
    monkeypatch.setattr(serving, "open_and_serve", served.append)
    recipe = demo()
    serving.serve_demo(recipe)
    (config,) = served
    assert config.models == ("runs/demo/finetune/kitchen/cprec-style", "runs/demo/finetune/kitchen/fine-tuning-only")
    assert (config.data, config.state) == ("runs/demo/data", "runs/demo/serve")
