"""Systems that were ported to the shared parts learn as they did before, step by step, and so do those that are nothing
but another system once their own parts are left out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.splits import Split
from cprec.lineup import settings_of
from cprec.train.folder import LOG, read_log

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "systems_losses.json").read_text())
"""The loss of each step and NDCG@10 of each validation, as the code before the port had them, seed 3, in fp32."""
NUM_ITEMS = 40
Trained = tuple[list[float], list[float]]
SMALL = {"hidden_size": 16, "max_length": 6, "batch_size": 16, "num_epochs": 6, "learning_rate": 1e-2, "patience": 0}
FEW_NEGATIVES = {"num_negatives": 8}
CASES = {
    "SASRec (wide)": {},
    "SASRec (sampled softmax)": FEW_NEGATIVES,
    "SASRec (published)": {},
    "BERT4Rec": FEW_NEGATIVES,
    "BERT4Rec (published)": {},
    "GRU4Rec": {},
    "GRU4Rec (published)": FEW_NEGATIVES,
    "LightGCN": {**FEW_NEGATIVES, "batch_size": 64},
    "LightGCN (published)": {"batch_size": 64},
}
PLAIN: dict[str, Any] = {"weights": False, "product": False, "dropout": 0.0}
WITHOUT = {
    "NGCF": ("LightGCN", {**CASES["LightGCN"], **PLAIN}),
    "NGCF (published)": ("LightGCN (published)", {**CASES["LightGCN (published)"], **PLAIN}),
    "MQSA-TED": ("SASRec (wide)", {"short_share": 1.0, "transition_weight": 0.0}),
    "SLMRec": (
        "SASRec (wide)",
        dict.fromkeys(("direction_weight", "distance_weight", "score_weight", "head_weight"), 0.0),
    ),
    "Human priors (popularity)": ("SASRec (wide)", {"num_groups": 1, "temperature": 0.0}),
}
"""By name, the system that is left without its own parts, and the settings that leave them out."""
QUICK = ("NGCF", "MQSA-TED")
"""Of WITHOUT one on each system beneath; the others are slow."""


@pytest.fixture(scope="module")
def split(split_of_rows: Callable[..., Split]) -> Split:
    """Users who go from item to item in steps of one to three."""
    generator = np.random.default_rng(0)
    rows = []
    for user in range(60):
        item = int(generator.integers(NUM_ITEMS))
        for time in range(3 + user % 9):
            rows.append((f"u{user:02}", item, time))
            item = (item + int(generator.integers(1, 4))) % NUM_ITEMS
    return split_of_rows("steps", [f"i{number:02}" for number in range(NUM_ITEMS)], rows)


def trained(name: str, changed: dict[str, Any], split: Split, folder: Path) -> Trained:
    """The loss of each step and NDCG@10 of each validation, in the last stage."""
    settings_of(name, {**SMALL, **changed}).make(split, "steps", seed=3, folder=folder)
    *_, log = sorted(folder.glob(f"*/*/{LOG}"))
    lines = read_log(log)
    losses = [line["loss"] for line in lines if "loss" in line]
    return losses, [line["validation"]["ndcg@10"] for line in lines if "validation" in line]


@pytest.fixture(scope="module", autouse=True)
def as_then() -> Iterator[None]:
    """In fp32, and with the random numbers of PyTorch's dropout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)
        for module in ("dropout", "encoders", "graph", "terms"):
            patch.setattr(f"cprec.systems.{module}.dropout", torch.nn.functional.dropout)
        yield


@pytest.fixture(scope="module")
def case(as_then: None, split: Split, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """What `trained` gives for one of CASES, trained once."""
    return functools.cache(lambda name: trained(name, CASES[name], split, tmp_path_factory.mktemp("case")))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("(published)")) for name in CASES]
)
def test_equal_seeds_give_the_losses_of_before(name: str, case: Callable[[str], Trained]) -> None:
    losses, ndcg = case(name)
    # Equal to the last bit on the machine that recorded them; others round differently.
    assert losses == pytest.approx(GOLDEN[name]["losses"], rel=1e-5)
    assert ndcg == pytest.approx(GOLDEN[name]["validation"], abs=2e-3)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in WITHOUT if name not in QUICK)]
)
def test_without_its_own_parts_a_system_learns_as_the_one_beneath(
    name: str, case: Callable[[str], Trained], split: Split, tmp_path: Path
) -> None:
    beneath, changed = WITHOUT[name]
    alone = trained(name, changed, split, tmp_path / "alone")
    assert alone == case(beneath), "to the digit"
    assert alone[0] == pytest.approx(GOLDEN[beneath]["losses"], rel=1e-5)
    with_parts = trained(name, CASES[beneath], split, tmp_path / "with")
    assert with_parts[0] != alone[0]
