"""Preference: what is set against what came next, the loss of it, and a run that learns by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.data.config import TableSource
from cprec.data.dataset import read_split
from cprec.data.queries import sampled_rows
from cprec.errors import ConfigError
from cprec.finetune import finetune
from cprec.models import load_model, tiny_model
from cprec.provenance import to_dict
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import Shards
from cprec.text.tokenizer import load_tokenizer
from cprec.train import training
from cprec.train.checkpoint import checkpoints
from cprec.train.config import DistilConfig, FinetuneConfig, TinyModel
from cprec.train.finetune import run_of
from cprec.train.folder import LOG, read_log
from cprec.train.loss import PackedLoss
from cprec.train.preference import PREFERENCE, Preference, PreferenceLoss, PreferenceStream, softmax_dpo
from cprec.train.training import encoder_of
from cprec.train.trees import rejected, trees_of

NUM_ITEMS = 12
TITLES = [f"thing {number}" for number in range(NUM_ITEMS - 2)] + ["thing 0", "never chosen"]
"""The last but one is called as the first, the last has no events."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users walk along ten items, the last but one in place of the first for some; item 5 is in every history."""
    folder = tmp_path_factory.mktemp("world")
    items = [f"{number:02},{title}" for number, title in enumerate(TITLES)]
    Path(folder, "items.csv").write_text("\n".join(["item_id,title", *items]))
    events = []
    for user in range(24):
        walk = [5, *((user + n) % 10 or (0, 10)[user % 2] for n in range(3 + user % 3)), 5, 5]
        events += [f"u{user:02},{item:02},{1_500_000_000 + n}" for n, item in enumerate(walk)]
    Path(folder, "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    tables = (TableSource(domain="ring", interactions=f"{folder}/log.csv", items=f"{folder}/items.csv"),)
    rules: dict[str, Any] = {"k_core": 0, "min_events": 2, "min_history": 1, "vocabulary_size": 300, "workers": 1}
    return prepare(PrepareConfig(output_dir=str(folder / "data"), tables=tables, target_domains=("ring",), **rules))


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, as anyone saves models."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer(str(data / "tokenizer"))
    tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(data: Path, base: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    def make(name: str = "tuned", **changes: Any) -> FinetuneConfig:
        settings: dict[str, Any] = {
            "data": str(data),
            "output_dir": str(tmp_path / name),
            "model_name_or_path": str(base),
            "domain": "ring",
            "documents": "trees",
            "preference": 3,
            "num_train_epochs": 2.0,
            "learning_rate": 1e-2,
            "max_length": 256,
            "train_batch_size": 2,
            "bf16": "false",
            "eval_tokens": 0,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": ("none",),
        }
        return FinetuneConfig(**settings | changes)

    return make


def log_of(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_log(folder / LOG) if name in line]


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_a_group_costs_what_one_works_out_by_hand() -> None:
    # Gains 0 of the chosen title, 0 and log 4 of the others, beta a half: 1 + exp(0) + exp(log 2) = 4.
    gains = torch.tensor([[0.0, 0.0, math.log(4)], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(softmax_dpo(gains, 0.5), torch.tensor(math.log(4) + math.log(3)))


def test_with_one_rejected_title_it_is_dpo() -> None:
    policy, reference = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 30
    # Rafailov et al. 2023, equation 7.
    ratios = (policy - reference).unbind(1)
    dpo = -F.logsigmoid(0.3 * ratios[0] - 0.3 * ratios[1]).sum()
    torch.testing.assert_close(softmax_dpo(policy - reference, 0.3), dpo)


def test_it_is_the_papers_formula_and_its_gradient_weighs_hard_titles() -> None:
    gains = torch.randn(1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    beta, (chosen, *others) = 0.7, gains[0]
    papers = -F.logsigmoid(-torch.stack([(beta * (other - chosen)).exp() for other in others]).sum().log())
    loss = softmax_dpo(gains, beta)
    torch.testing.assert_close(loss, papers)
    (gradient,) = torch.autograd.grad(loss, gains)
    shares = (beta * gains[0]).softmax(0).detach()
    # What is given to the chosen title is taken from the others, from each as much as it is preferred.
    torch.testing.assert_close(gradient[0], beta * (shares - F.one_hot(torch.tensor(0), 4)))
    torch.testing.assert_close(gradient.sum(), torch.zeros((), dtype=torch.float64))


def test_no_gain_overflows_and_beta_scales_the_first_gradient() -> None:
    torch.testing.assert_close(softmax_dpo(torch.tensor([[-2000.0, 3000.0]]), 1.0), torch.tensor(5000.0))
    nothing = torch.zeros(1, 4, requires_grad=True)
    whole, tenth = (torch.autograd.grad(softmax_dpo(nothing, beta), nothing)[0] for beta in (1.0, 0.1))
    torch.testing.assert_close(whole, torch.tensor([[-0.75, 0.25, 0.25, 0.25]]))
    torch.testing.assert_close(tenth, whole / 10)


# ---- what is set against a target ------------------------------------------------------------------------------------


def titles_of(config: FinetuneConfig) -> tuple[np.ndarray, np.ndarray]:
    """Chosen items of 3,000 events, and what is set against them."""
    data = Path(config.data)
    split = read_split(data)
    about = {"template": {}, "max_title_tokens": 32}
    chosen = np.arange(3000) % 11
    return chosen, rejected(config, split, encoder_of(data, about, load_tokenizer(str(data / "tokenizer"))), chosen)


def test_titles_of_a_group_differ_and_were_chosen_by_someone(config: Callable[..., FinetuneConfig]) -> None:
    chosen, drawn = titles_of(config())
    named = np.array(TITLES)[np.column_stack([chosen, drawn])]
    assert all(len(set(row)) == 4 for row in named)
    assert drawn.shape == (3000, 3) and drawn.max() == 10
    again = titles_of(config())[1]
    assert np.array_equal(drawn, again) and not np.array_equal(drawn, titles_of(config(seed=1))[1])
    # Events of one target have draws of their own.
    shared = np.mean([len(set(one) & set(other)) for one, other in zip(drawn[3::22], drawn[14::22], strict=False)])
    assert shared == pytest.approx(3 * 3 / 10, abs=0.15)


def test_titles_are_drawn_alike_or_by_their_events(config: Callable[..., FinetuneConfig]) -> None:
    split = read_split(config().data)
    counts = np.bincount(split.train.item, minlength=NUM_ITEMS)[:11]
    for how, weights in (("uniform", counts > 0), ("popularity", counts)):
        chosen, drawn = titles_of(config(preference=1, rejected=how))
        mine = drawn[chosen == 3][:, 0]
        expected = weights * (np.arange(11) != 3)
        found = np.bincount(mine, minlength=11) / len(mine)
        assert found == pytest.approx(expected / expected.sum(), abs=0.07), how


def test_more_titles_than_there_are_are_refused(config: Callable[..., FinetuneConfig]) -> None:
    with pytest.raises(
        ConfigError, match="preference=10 sets 10 titles against each.*10 different titles: set it to 9"
    ):
        trees_of(config(preference=10, max_length=512), None)
    assert trees_of(config(preference=9, max_length=512), None).branches is not None


# ---- what is read ----------------------------------------------------------------------------------------------------


def groups_in(shards: Shards, documents: np.ndarray, eos: int) -> list[list[list[int]]]:
    """What each title of each group reads, with the title: K + 1 examples at a time."""
    assert shards.branches is not None
    paths = []
    for first, size in zip(shards.column("offset")[documents], shards.column("length")[documents], strict=True):
        tokens, until = shards.tokens[first : first + size], shards.branches.until[first : first + size]
        for end in np.flatnonzero(tokens == eos):
            paths.append([int(tokens[place]) for place in range(end + 1) if until[place] > end])
    return [paths[start : start + 4] for start in range(0, len(paths), 4)]


def log_prob(model: Any, example: list[int], title: int) -> torch.Tensor:
    """Of the last `title` tokens of an example, given those before."""
    ids = torch.tensor([example])
    log_p = model(ids).logits[0, :-1].log_softmax(1)
    return log_p[torch.arange(len(example) - 1), ids[0, 1:]][-title:].sum()


def test_a_step_costs_what_its_prompts_cost_apart(config: Callable[..., FinetuneConfig], base: Path) -> None:
    mine = config(preference_beta=0.4, max_documents=4)
    shards, tokenizer = trees_of(mine, None), load_tokenizer(str(base))
    stream = run_of(mine).make_plan().stream
    assert isinstance(stream, PreferenceStream)
    before, model = load_model(base), load_model(base)
    loss = PreferenceLoss(PackedLoss(model), Preference(num_rejected=3, beta=0.4))
    loss.remember(stream, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    expected, (next_token,) = torch.zeros(()), tokenizer("\nNext:", add_special_tokens=False)["input_ids"][-1:]
    groups = groups_in(shards, sampled_rows(len(shards), 4, mine.seed), tokenizer.eos_token_id)
    with torch.no_grad():
        for group in groups:
            prompt = max(place for place, token in enumerate(group[0]) if token == next_token) + 1
            assert len({tuple(example[:prompt]) for example in group}) == 1 and len(set(map(tuple, group))) == 4
            gains = [
                log_prob(model, example, len(example) - prompt) - log_prob(before, example, len(example) - prompt)
                for example in group
            ]
            odds = torch.stack([(0.4 * (gain - gains[0])).exp() for gain in gains[1:]]).sum()
            expected += -F.logsigmoid(-odds.log())
    found, count = torch.zeros(()), 0
    once = stream.once(2)
    for batch in once:
        for rows in batch.micro_batches(1):
            found += loss.losses({name: torch.from_numpy(array) for name, array in rows.items()})[PREFERENCE].detach()
        count += batch.counts[PREFERENCE]
    assert count == len(groups) > 8
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_rows_without_titles_cost_nothing(config: Callable[..., FinetuneConfig], base: Path) -> None:
    batch = run_of(config()).make_plan().stream.batch(0)
    blank = {name: np.full_like(array, batch.blank.get(name, 0)) for name, array in batch.rows.items()}
    blank |= {name: batch.rows[name] for name in batch.rows.keys() - batch.blank.keys()}
    loss = PreferenceLoss(PackedLoss(load_model(base)), Preference(num_rejected=3, beta=1.0))
    found = loss.losses({name: torch.from_numpy(array) for name, array in blank.items()})[PREFERENCE]
    found.backward()
    assert found.item() == 0 and (batch.rows["titles"] != IGNORE).any()


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_begins_without_a_preference_and_gains_one(config: Callable[..., FinetuneConfig]) -> None:
    losses = log_of(finetune(config(num_train_epochs=40.0, learning_rate=1e-2, max_documents=2, save_steps=100)))
    assert losses[0] == pytest.approx(math.log(4), abs=1e-4)
    assert losses[-1] < 0.5 * math.log(4)


def test_an_interrupted_run_goes_on_as_if_never_stopped(
    config: Callable[..., FinetuneConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune(config("whole"))

    class Stop(Exception):
        pass

    def stopping(*arguments: Any, **settings: Any) -> Any:
        report = settings["report"]

        def stop_at(line: Any) -> None:
            report(line)
            if line["step"] == 5:
                raise Stop

        return train(*arguments, **settings | {"report": stop_at})

    train = training.train
    monkeypatch.setattr(training, "train", stopping)
    with pytest.raises(Stop):
        finetune(config("stopped"))
    monkeypatch.undo()
    assert checkpoints(Path(config("stopped").output_dir))
    stopped = finetune(config("stopped"))
    assert log_of(stopped) == log_of(whole)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


FINETUNE = """
import json, sys
import torch
from cprec.config import from_mapping
from cprec.train.finetune import FinetuneConfig, finetune

torch.set_num_threads(1)
finetune(from_mapping(FinetuneConfig, json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(config: Callable[..., FinetuneConfig], processes: Any) -> None:
    """Each reads its share of the reference; in the last step there is one row for both."""
    alone, two = config("alone", train_batch_size=3), config("two", train_batch_size=3)
    finetune(alone)
    processes.run(2, FINETUNE, json.dumps(to_dict(two)))
    assert log_of(Path(two.output_dir)) == pytest.approx(log_of(Path(alone.output_dir)), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": -1}, "must be 0 or more"),
        ({"preference_beta": 0.0}, "above 0"),
        ({"documents": "examples"}, "documents=trees"),
        ({"teachers": ("EASE",)}, "without teachers"),
        ({"model_name_or_path": "tiny", "tiny": TinyModel()}, "was fine-tuned"),
        ({"num_train_epochs": 0.0}, "was fine-tuned"),
        ({"fsdp": True}, "fsdp=false"),
    ],
)
def test_what_does_not_go_together_is_refused(
    config: Callable[..., FinetuneConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_student_has_no_preference(base: Path) -> None:
    with pytest.raises(ConfigError, match="preference=2 is of fine-tuning"):
        DistilConfig(
            data="data",
            output_dir="out",
            model_name_or_path=str(base),
            layers=1,
            num_groups=1,
            documents="trees",
            preference=2,
        )
