from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from cprec.batch import IGNORE
from cprec.errors import ConfigError
from cprec.models import add_lora, blocks_of, load_model, recorded_states, tiny_model
from cprec.provenance import read_resolved
from cprec.rank.llm import LLMRecommender
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.text.tokenizer import load_tokenizer, train_tokenizer
from cprec.train import training
from cprec.train.checkpoint import checkpoints
from cprec.train.config import DistilConfig, FinetuneConfig
from cprec.train.distil import distil, with_domain
from cprec.train.distillation import (
    DIRECTION,
    DISTANCE,
    HEADS,
    TOKENS,
    Distillation,
    DistilledLoss,
    apart,
    ends_of_groups,
    turned,
)
from cprec.train.finetune import finetune
from cprec.train.folder import LOG, read_done, read_log
from cprec.train.loss import PackedLoss, linear_divergence

ALONE = {"token_weight": 0.0, "direction_weight": 0.0, "distance_weight": 0.0, "head_weight": 0.0}
"""Settings of a student that learns from nobody."""


def model_of(size: int, num_layers: int, seed: int = 0) -> Any:
    return tiny_model(size, hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2, seed=seed)


@pytest.fixture(scope="module")
def teacher(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of four layers, as anyone saves models."""
    folder = tmp_path_factory.mktemp("teacher")
    model_of(len(tokenizer), 4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(data: Path, teacher: Path, tmp_path: Path) -> Callable[..., DistilConfig]:
    def make(name: str = "student", **changes: Any) -> DistilConfig:
        settings: dict[str, Any] = {
            "data": str(data),
            "model_name_or_path": str(teacher),
            "output_dir": str(tmp_path / name),
            "domain": "books",
            "layers": 2,
            "num_groups": 2,
            "learning_rate": 1e-2,
            "max_length": 96,
            "train_batch_size": 4,
            "num_train_epochs": 1.0,
            "bf16": "false",
            "save_steps": 3,
            "logging_steps": 1,
        }
        return DistilConfig(**settings | changes)

    return make


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / LOG) if "loss" in line}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---- the terms -------------------------------------------------------------------------------------------------------


def test_states_are_drawn_by_direction_and_by_distance_as_a_share_of_the_teachers_length() -> None:
    # The first is turned by a right angle, 5 from a state of length 3; the second is half of its counterpart.
    mine, theirs = torch.tensor([[4.0, 0.0], [2.5, 0.0]]), torch.tensor([[0.0, 3.0], [5.0, 0.0]])
    torch.testing.assert_close(turned(mine, theirs), torch.tensor(1.0))
    torch.testing.assert_close(apart(mine, theirs), torch.tensor(5 / 3 + 0.5))


def test_the_divergence_of_two_tokens_is_that_of_two_chances() -> None:
    # Logits 0 and log 3 give chances of 1/4 and 3/4, those of the teacher 0 and 0 a half each.
    found = linear_divergence(
        torch.tensor([[1.0]]),
        torch.tensor([[0.0], [math.log(3)]]),
        torch.tensor([[1.0]]),
        torch.zeros(2, 1),
        torch.float32,
    )
    torch.testing.assert_close(found, torch.tensor(0.5 * math.log(2) + 0.5 * math.log(2 / 3)))


def test_groups_end_where_whole_layers_allow() -> None:
    assert ends_of_groups(8, 4) == (2, 4, 6, 8) and ends_of_groups(30, 4) == (7, 15, 22, 30)
    assert ends_of_groups(3, 3) == (1, 2, 3) and ends_of_groups(5, 1) == (5,)


def test_all_terms_are_those_of_each_document_alone(tokenizer: Any, make_stream: Callable[..., TokenStream]) -> None:
    """Against the states and logits that transformers gives of one document after the other."""
    size, temperature = len(tokenizer), 2.0
    student, teacher = model_of(size, 3, seed=1).eval(), model_of(size, 6, seed=2).eval()
    names = {TOKENS: 0.7, DIRECTION: 2.0, DISTANCE: 0.3, HEADS: 0.5}
    about = Distillation(layers=(0, 1, 2), num_groups=2, temperature=temperature, weights=names)
    batch = make_stream(targets_only=True, more_terms=tuple(names)).batch(0)
    assert set(batch.counts) == {NEXT_TOKEN, *names} and len(set(batch.counts.values())) == 1
    rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
    found = DistilledLoss(PackedLoss(student), about, teacher.requires_grad_(False)).losses(rows)

    expected = dict.fromkeys((NEXT_TOKEN, *names), torch.zeros(()))
    norm, head = student.model.norm, student.lm_head
    for ids, positions, targets in zip(*(rows[name] for name in ("input_ids", "position_ids", "targets")), strict=True):
        begins = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        for start, stop in zip(begins, begins[1:], strict=False):
            one, at = slice(start, stop), targets[start:stop] != IGNORE
            goal = targets[one][at]
            mine, theirs = (
                model(input_ids=ids[None, one], use_cache=False, output_hidden_states=True)
                for model in (student, teacher)
            )
            logits, given = mine.logits[0, at] / temperature, theirs.logits[0, at] / temperature
            expected[NEXT_TOKEN] = expected[NEXT_TOKEN] + F.cross_entropy(mine.logits[0, at], goal, reduction="sum")
            kl = F.kl_div(logits.log_softmax(1), given.log_softmax(1), log_target=True, reduction="sum")
            expected[TOKENS] = expected[TOKENS] + 0.7 * temperature**2 * kl
            # Groups end after layers 1 and 3 of three, and 3 and 6 of six.
            for layer, other in ((1, 3), (3, 6)):
                h, t = mine.hidden_states[layer][0, at], theirs.hidden_states[other][0, at]
                cosine = (h * t).sum(1) / h.norm(dim=1) / t.norm(dim=1)
                expected[DIRECTION] = expected[DIRECTION] + 2 * (1 - cosine).sum()
                expected[DISTANCE] = expected[DISTANCE] + 0.3 * ((h - t).norm(dim=1) / t.norm(dim=1)).sum()
            middle = head(norm(mine.hidden_states[1][0, at]))
            expected[HEADS] = expected[HEADS] + 0.5 * F.cross_entropy(middle, goal, reduction="sum")
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)
        parameters = list(student.parameters())
        gradients = (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (found[name], value)
        )
        for one, other in zip(*gradients, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn_from_it(
    make_model: Callable[..., Any], make_stream: Callable[..., TokenStream]
) -> None:
    model = make_model()
    names = {TOKENS: 1.0, DIRECTION: 1.0, DISTANCE: 1.0}
    about = Distillation(layers=(0,), num_groups=1, temperature=1.0, weights=names)
    rows = {name: torch.from_numpy(array) for name, array in make_stream().batch(0).rows.items()}
    found = DistilledLoss(PackedLoss(model), about, model).losses(rows)
    for name in names:
        assert found[name].detach().abs() < 1e-2, name
        for gradient in torch.autograd.grad(
            found[name], list(model.parameters()), retain_graph=True, allow_unused=True
        ):
            assert gradient is None or gradient.abs().max() < 1e-2, name


def test_rows_without_targets_teach_nothing(
    make_model: Callable[..., Any], make_stream: Callable[..., TokenStream]
) -> None:
    names = {TOKENS: 1.0, DIRECTION: 1.0, DISTANCE: 1.0}
    about = Distillation(layers=(0,), num_groups=1, temperature=1.0, weights=names)
    rows = {name: torch.from_numpy(array) for name, array in make_stream().batch(0).rows.items()}
    blank = rows | {"targets": torch.full_like(rows["targets"], IGNORE)}
    found = DistilledLoss(PackedLoss(make_model()), about, make_model(1)).losses(blank)
    assert [term.item() for term in found.values()] == [0.0] * 4
    sum(found.values()).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("recomputed", [False, True])
def test_states_are_recorded_where_layers_are_computed_again(make_model: Callable[..., Any], recomputed: bool) -> None:
    model, ids = model_of(30, 3).train(), torch.arange(10)[None]
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with recorded_states(model, (1, 3)) as states:
        model.model(input_ids=ids, use_cache=False)
    plain = model_of(30, 3)(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 2 and torch.equal(states[0], plain[1]) and torch.equal(states[1], plain[3])
    (gradient,) = torch.autograd.grad(states[0].square().sum(), [blocks_of(model)[0].mlp.down_proj.weight])
    assert gradient.abs().sum() > 0 and len(states) == 2


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_a_student_that_learns_from_nobody_is_the_shallow_model_fine_tuned(
    config: Callable[..., DistilConfig], teacher: Path, tmp_path: Path
) -> None:
    alone = config(**ALONE)
    student = distil(alone)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    del model.model.layers[2:]
    model.config.num_hidden_layers, model.config.layer_types = 2, model.config.layer_types[:2]
    model.save_pretrained(tmp_path / "shallow")
    load_tokenizer(str(teacher)).save_pretrained(tmp_path / "shallow")
    shared = {
        name: getattr(alone, name)
        for name in ("data", "domain", "learning_rate", "max_length", "train_batch_size", "num_train_epochs", "bf16")
    }
    paths = {"model_name_or_path": str(tmp_path / "shallow"), "output_dir": str(tmp_path / "tuned")}
    tuned = finetune(FinetuneConfig(**shared, **paths, logging_steps=1))
    assert losses(student) == losses(tuned) and len(losses(student)) > 3
    assert weights(student) == weights(tuned)
    assert "fine-tuning 2 layers of the base on `books`" in (student / "README.md").read_text()


def test_a_student_is_a_model_folder_that_names_its_teacher(
    config: Callable[..., DistilConfig], teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = distil(config(head_weight=0.5, start="spaced", general_text="none"))
    done, log = read_done(folder), read_log(folder / LOG)
    assert done is not None
    assert (done["stage"], done["domain"], done["layers_of_teacher"]) == ("distil", "books", [0, 3])
    assert len(done["teacher"]) == 64 and len(done["trained_on"]) == 1
    assert read_resolved(folder)["inputs"]["base/model.safetensors"]
    # Held-out perplexity is of the next token alone.
    assert log[0]["heldout"]["books (next item)"] == pytest.approx(330, rel=0.2)
    assert log[-1]["heldout"]["books (next item)"] < 0.7 * log[0]["heldout"]["books (next item)"]
    assert set(log[1]["losses"]) == {NEXT_TOKEN, TOKENS, DIRECTION, DISTANCE, HEADS}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert len(LLMRecommender.from_pretrained(folder).recommend(["01", "02"], k=3)) == 3
    assert "2 layers of the base learn what the whole base says" in (folder / "README.md").read_text()
    capfd.readouterr()
    assert distil(config(head_weight=0.5, start="spaced", general_text="none")) == folder
    assert "complete with these settings, reused" in capfd.readouterr().err


@pytest.mark.slow
def test_an_interrupted_student_goes_on_as_if_never_stopped(
    config: Callable[..., DistilConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        distil(config())
    assert checkpoints(Path(config().output_dir))
    folder, whole = distil(config()), distil(config("whole"))
    assert weights(folder) == weights(whole) and losses(folder) == losses(whole)


@pytest.mark.slow
def test_a_student_can_teach(config: Callable[..., DistilConfig]) -> None:
    first = distil(config("first", layers=3))
    second = distil(config("second", model_name_or_path=str(first), domain="", layers=2))
    before, done = read_done(first), read_done(second)
    assert before is not None and done is not None
    assert done["domain"] == "books" and done["trained_on"] == before["trained_on"] * 2
    assert done["teacher"] != before["teacher"]


@pytest.mark.slow
def test_a_teacher_with_adapters_teaches_as_they_make_it(
    config: Callable[..., DistilConfig], teacher: Path, tmp_path: Path
) -> None:
    adapted = add_lora(load_model(teacher), rank=2, alpha=4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapted")
    load_tokenizer(str(teacher)).save_pretrained(tmp_path / "adapted")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(str(teacher)).save_pretrained(tmp_path / "merged")
    one, other = (
        distil(config(f"of {name}", model_name_or_path=str(tmp_path / name))) for name in ("adapted", "merged")
    )
    assert list(losses(one).values()) == pytest.approx(list(losses(other).values()), rel=1e-5)
    asked = config("dry", model_name_or_path=str(tmp_path / "adapted"), dry_run=True)
    assert distil(asked) == tmp_path / "dry"


@pytest.mark.slow
def test_the_estimate_counts_the_teacher(
    config: Callable[..., DistilConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    def told(**changes: Any) -> tuple[float, float]:
        distil(config(dry_run=True, **changes))
        lines = capfd.readouterr().err
        flops, memory = lines.partition("are trained; ")[2], lines.partition("(weights ")[2]
        scales = {"k": 1e3, "M": 1e6}
        return tuple(float(text.split()[0]) * scales[text.split()[1][0]] for text in (flops, memory))  # type: ignore[return-value]

    alone, taught = told(**ALONE), told()
    size = 4 * sum(weight.numel() for weight in model_of(330, 4).parameters())
    assert taught[1] - alone[1] == pytest.approx(size, rel=0.05)
    assert taught[0] > 1.5 * alone[0]
    assert not Path(config().output_dir).exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_teachers_that_do_not_fit_are_refused(
    config: Callable[..., DistilConfig], teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"layers=5, but .* has 4: a student has no more layers than its teacher"):
        distil(config(layers=5))
    with pytest.raises(ConfigError, match="was fine-tuned for no domain: name one by domain="):
        distil(config(domain=""))
    with pytest.raises(ConfigError, match=r"domain='films' has no fine-tuning examples .*which has those of books"):
        with_domain(config(domain="films"))
    with pytest.raises(ConfigError, match="there is no folder"):
        distil(config(model_name_or_path=str(tmp_path / "nowhere")))
    other = tmp_path / "other"
    model_of(400, 4).save_pretrained(other)
    train_tokenizer(["quite other words"] * 9, 280).save_pretrained(other)
    with pytest.raises(ConfigError, match="have another id there or none"):
        distil(config(model_name_or_path=str(other)))
    model_of(40, 4).save_pretrained(tmp_path / "few")
    with pytest.raises(ConfigError, match="has 40 token embeddings"):
        distil(config(model_name_or_path=str(tmp_path / "few")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "tiny"}, "is random weights, which teach nothing"),
        ({"layers": 0, "num_groups": 1}, "layers=0 must be at least 1"),
        ({"num_groups": 3}, "num_groups=3 must not be above layers=2"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"token_weight": -1.0}, "token_weight=-1.0 must be 0 or more"),
        ({"head_weight": 1.0, "num_groups": 1}, "num_groups=1 has none"),
        ({"lora_rank": 2}, "lora_rank=2 adds adapters to a saved model"),
        ({"torch_compile": True}, "torch_compile=true hides the states between layers"),
        ({"fsdp": True}, "fsdp=true hides the states between layers"),
        ({"num_train_epochs": 0.0}, "num_train_epochs=0.0 must be above 0"),
    ],
)
def test_settings_that_make_no_student_are_refused(
    config: Callable[..., DistilConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
