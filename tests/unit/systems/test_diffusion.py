"""The head that denoises, rankings by what it ends at, the term that keeps states apart, and ContRec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.systems import fit as fitting
from cprec.systems import terms
from cprec.systems.diffusion import DiffusionHead, continuous_tokens
from cprec.systems.recipes.contrec import ContRec
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.terms import dispersive

# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_keep_distances_up_to_scale_and_the_strongest_directions() -> None:
    vectors = np.random.default_rng(0).normal(size=(9, 4)) * [5, 3, 1, 0.1] + 7
    whole, strongest = continuous_tokens(vectors, 99), continuous_tokens(vectors, 2)
    assert whole.shape == (9, 4) and np.square(whole).mean() == pytest.approx(1)
    ratio = np.linalg.norm(whole[:4] - whole[4:8], axis=1) / np.linalg.norm(vectors[:4] - vectors[4:8], axis=1)
    assert ratio == pytest.approx(ratio[0])
    assert np.corrcoef(strongest.T, whole[:, :2].T)[:2, 2:].round(5).tolist() == [[1, 0], [0, 1]]
    assert not continuous_tokens(np.ones((3, 2)), 2).any()


# ---- the head --------------------------------------------------------------------------------------------------------


def head_of(tokens: list[list[float]], num_steps: int, told: Any) -> DiffusionHead:
    """A head that tells `told(noisy, angle)`."""
    head = DiffusionHead(np.array(tokens, dtype=np.float32), 2, num_steps=num_steps, seed=1)
    head.clean = lambda noisy_NF, hidden_ND, angle_N1: told(noisy_NF, angle_N1)  # type: ignore[method-assign]
    return head


def test_steps_are_those_of_the_formula() -> None:
    noise = head_of([[1.0], [-1.0]], 1, None).get_buffer("noise_F")
    halved = head_of([[1.0], [-1.0]], 2, lambda noisy_NF, angle_N1: noisy_NF / 2)
    # At a right angle the noise n is all there is, and n / 2 is told. At half of it stands (n / 2 + n) / sqrt(2), of
    # which a half is told, and that is where the last step ends.
    assert halved.denoised(torch.zeros(1, 2)).item() == pytest.approx(1.5 / 2**0.5 / 2 * noise.item())
    constant = head_of([[1.0], [-1.0]], 7, lambda noisy_NF, angle_N1: torch.full_like(noisy_NF, 0.25))
    assert constant.denoised(torch.zeros(3, 2)).flatten().tolist() == pytest.approx([0.25] * 3)


def test_noise_flows_to_a_token_where_the_head_tells_the_mean_of_what_is_possible() -> None:
    """Of tokens 1 and -1, equally probable, the mean given noisy x at an angle a is tanh(x cos a / sin(a) ** 2)."""
    for noise in (-2.0, -0.1, 0.1, 2.0):
        head = head_of([[1.0], [-1.0]], 30, lambda x, a: torch.tanh(x * a.cos() / a.sin() ** 2))
        head.get_buffer("noise_F").fill_(noise)
        assert head.denoised(torch.zeros(1, 2)).item() == pytest.approx(np.sign(noise), abs=0.05)


def test_the_loss_is_the_mean_square_that_is_missed() -> None:
    head = head_of([[1.0, 3.0], [0.0, 0.0]], 1, lambda noisy_NF, angle_N1: torch.zeros_like(noisy_NF))
    assert head(torch.zeros(3, 2), torch.tensor([0, 1, 0]), torch.empty(0)).item() == 2 * (1 + 9) / 2
    seen = []
    head = head_of(
        [[1.0, 3.0], [0.0, 0.0]], 1, lambda noisy_NF, angle_N1: seen.append((noisy_NF, angle_N1)) or noisy_NF
    )
    torch.manual_seed(0)
    head(torch.zeros(4000, 2), torch.zeros(4000, dtype=torch.long), torch.empty(0))
    noisy, angle = seen[0]
    noise = (noisy - angle.cos() * torch.tensor([1.0, 3.0])) / angle.sin()
    assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(1, abs=0.05)
    assert angle.mean().item() == pytest.approx(np.pi / 4, abs=0.03) and angle.max().item() <= np.pi / 2


# ---- states apart ----------------------------------------------------------------------------------------------------


def test_the_dispersive_term_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    term, nothing = dispersive(0.5), torch.empty(0)
    two = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # a mean square of 2
    expected = 2 * np.log((2 + 2 * np.exp(-2 / 0.5)) / 4)
    assert term(two, nothing, nothing).item() == pytest.approx(expected)
    assert term(torch.ones(5, 3), nothing, nothing).item() == pytest.approx(0, abs=1e-5), "states that are one"
    near = torch.tensor([[0.0], [0.1]], requires_grad=True)
    term(near, nothing, nothing).backward()
    assert near.grad is not None and near.grad[0] > 0 > near.grad[1], "a step down moves them apart"
    monkeypatch.setattr(terms, "SPREAD", 2)
    four = torch.tensor([[0.0, 0.0], [9.0, 9.0], [2.0, 0.0], [5.0, 5.0]])
    assert term(four, nothing, nothing).item() == pytest.approx(2 * expected), "each other state, for twice as many"


# ---- ContRec ---------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 16, "num_blocks": 1, "num_heads": 2, "batch_size": 16, "min_steps": 0}
SMALL |= {"num_epochs": 4, "sampled_items": 0, "learning_rate": 1e-2}
OFF: dict[str, Any] = {"diffusion_weight": 0.0, "dispersive_weight": 0.0}


def learnt(settings: TitleSASRec, split: Split, folder: Path) -> tuple[Any, list[Any]]:
    """The recommender, and what its training told."""
    made: Any = settings.make(split, "ring", seed=2, folder=folder)
    (log,) = folder.glob("*/*/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return made, [line.get("loss") or line["validation"] for line in lines if "loss" in line or "validation" in line]


@pytest.fixture(scope="module")
def few_validations() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "VALIDATIONS", 2)
        yield


def scores(recommender: Any, data: TrainingSequences) -> np.ndarray:
    some = data.sequences.take(np.arange(6))
    found: np.ndarray = recommender.score_histories(some, data.users[:6]).numpy()
    return found


def test_without_its_own_parts_it_is_sasrec_over_titles(
    split: Split, data: TrainingSequences, tmp_path: Path, circle: str, few_validations: None
) -> None:
    control, told = learnt(TitleSASRec(**SMALL, vectors=circle), split, tmp_path / "control")
    alone, told_alone = learnt(ContRec(**SMALL, **OFF, vectors=circle), split, tmp_path / "alone")
    assert told_alone == told and len(told) > 4, "to the digit"
    assert np.array_equal(scores(control, data), scores(alone, data))
    (stage,) = ContRec(**SMALL, vectors=circle).stages(data, 0)
    batch = stage.stream.batch(0)
    rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
    assert list(stage.trainable.losses(rows)) == list(batch.counts) == ["next_item", "diffusion", "dispersive"]
    assert batch.whole, "states of a step are compared"


def test_scores_mix_the_softmax_with_distances_from_the_denoised_token(
    split: Split, data: TrainingSequences, tmp_path: Path, circle: str, few_validations: None
) -> None:
    made, _ = learnt(ContRec(**SMALL, vectors=circle, share=0.3, num_steps=4), split, tmp_path)
    model, some = made.model, data.sequences.take(np.arange(6))
    with torch.inference_mode():
        items, vectors = torch.from_numpy(made._read(some)), model.network.vectors()
        hidden = model.network.encode(vectors, {"items": items})
        token, apart = model.head.denoised(hidden), model.head.get_buffer("token_VF")
        squares = (token[:, None] - apart).square().sum(2)
        expected = 0.7 * hidden @ vectors.items_VD.T - 0.3 * squares / 2 + 0.3 * token.square().sum(1)[:, None] / 2
    assert scores(made, data) == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.array_equal(scores(made, data), scores(made, data)), "the noise is fixed"
    assert squares.argmin(1).tolist() != [0] * 6


@pytest.mark.slow
def test_distances_alone_find_the_next_item(
    split: Split, data: TrainingSequences, tmp_path: Path, circle: str, few_validations: None
) -> None:
    settings = {**SMALL, "num_epochs": 12, "dropout": 0.0, "attention_dropout": 0.0}
    made, _ = learnt(ContRec(**settings, vectors=circle, share=1.0), split, tmp_path)
    step = Ragged.of([[item, (item + 1) % data.num_items] for item in range(data.num_items)])
    best = made.score_histories(step, [""] * data.num_items).numpy().argmax(1)
    assert np.mean(best == (np.arange(data.num_items) + 2) % data.num_items) > 0.8


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"share": 1.5}, r"share=1.5 must lie in 0..1"),
        ({"diffusion_weight": -1}, "diffusion_weight=-1 must not be below 0"),
        ({"num_steps": 0}, "num_steps=0 must be above 0"),
        ({"num_networks": 3}, "num_networks=3: the head goes with one network"),
        ({"sampled_items": 9}, "sampled_items=9, .* leave both as they are"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ContRec(**changed)


def test_items_with_one_vector_are_refused(data: TrainingSequences, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", item_id=np.array(data.item_ids), vectors=np.ones((data.num_items, 3)))
    with pytest.raises(Unsuitable, match="all items of domain 'ring' have the same vector"):
        ContRec(**SMALL, vectors=str(tmp_path / "one.npz")).stages(data, 0)
