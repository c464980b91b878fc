"""Walks, rules and item texts in pre-training: what they say, whom they tell of, and their shares of the tokens."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cprec.config import from_mapping
from cprec.data.config import TableSource
from cprec.data.dataset import read_split
from cprec.errors import ConfigError
from cprec.provenance import CONFIG_FILE, read_resolved, to_dict
from cprec.schema import TEST, TRAIN
from cprec.text.config import Curriculum, Mixture, PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import open_shards
from cprec.text.tokenizer import load_tokenizer
from cprec.train.config import PretrainConfig, TinyModel, under_current_names
from cprec.train.folder import LOG, read_log
from cprec.train.pretrain import behaviour_and_more, fork, pretrain, pretrain_plan

ALL = {"walks_share": 0.2, "rules_share": 0.1, "item_text_share": 0.1}
USERS = {"films": [f"u{n:02}" for n in range(40)], "songs": [f"u{n:02}" for n in range(10, 30)], "books": ["both"]}
USERS["films"].append("both")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users go round ten items of a domain, and each has three items that nobody else has: one in training, and the two
    that are held out. `both` is tested in books, which nobody pre-trains on. Songs have no brand and no categories."""
    folder = tmp_path_factory.mktemp("world")
    for domain, users in USERS.items():
        items = [
            f"r{n},{domain} number {n},{'Acme' if n % 2 else ''},{'Old > New' if n < 5 else ''}" for n in range(10)
        ]
        own = ("early", "valid", "last")
        items += [f"{user}{what},{user} {what} of {domain},Own," for user in users for what in own]
        if domain == "songs":
            items = [",".join([*line.split(",")[:2], "", ""]) for line in items]
        Path(folder, f"{domain}.csv").write_text("\n".join(["item_id,title,brand,categories", *items]))
        events = []
        for number, user in enumerate(users):
            ring = [f"r{(number + n) % 10}" for n in range(5)]
            history = [*ring[:2], f"{user}early", *ring[2:], f"{user}valid", f"{user}last"]
            events += [f"{user},{item},{1_500_000_000 + n}" for n, item in enumerate(history)]
        Path(folder, f"{domain}_log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    return prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=tuple(
                TableSource(
                    domain=name,
                    platform="shop",
                    interactions=f"{folder}/{name}_log.csv",
                    items=f"{folder}/{name}.csv",
                )
                for name in USERS
            ),
            target_domains=("books", "films"),
            pretrain_domains=("films", "songs"),
            vocabulary_size=400,
            k_core=0,
            min_events=3,
            heldout_share=0.2,
            workers=1,
        )
    )


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    def make(name: str = "out", **changes: Any) -> PretrainConfig:
        settings: dict[str, Any] = {
            "data": str(data),
            "output_dir": str(tmp_path / name),
            "tiny": TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            "learning_rate": 1e-2,
            "max_length": 256,
            "train_batch_size": 2,
            "bf16": "false",
            "logging_steps": 1,
            "report_to": ("none",),
            "curriculum": Curriculum(walks_per_item=3, walk_length=8, min_support=3),
        }
        return PretrainConfig(**settings | changes)

    return make


@pytest.fixture
def texts(config: Callable[..., PretrainConfig]) -> Callable[..., dict[str, list[str]]]:
    """The documents of the curriculum as text, by the group's name."""

    def read(**changes: Any) -> dict[str, list[str]]:
        settings = config(**{"mixture": Mixture(**ALL)} | changes)
        tokenizer = load_tokenizer(str(Path(settings.data) / "tokenizer"))
        groups = [group for group in behaviour_and_more(settings) if " of " in group.name]
        return {
            group.name: [tokenizer.decode(tokens) for tokens in map(group.shards.rows.__getitem__, group.documents)]
            for group in groups
        }

    return read


def histories(data: Path, domain: str) -> list[list[str]]:
    """Titles of the training events of each user whose sequences are in the shards."""
    split = read_split(data)
    log, index = split.interactions, open_shards(data / "shards" / "train").documents
    known = {
        user
        for user, name in zip(index["user_id"].to_pylist(), index["domain"].to_pylist(), strict=True)
        if name == domain
    }
    number = split.catalogue.domain_index(domain)
    found: dict[str, list[str]] = {}
    for event in np.flatnonzero(split.events(TRAIN)):
        user, item = str(log.user_id[log.user[event]]), log.item[event]
        if user in known and split.catalogue.domain[item] == number:
            found.setdefault(user, []).append(str(split.catalogue.title[item]))
    return list(found.values())


def test_nothing_is_told_that_training_does_not_know(data: Path, texts: Callable[..., dict[str, list[str]]]) -> None:
    """Of the items that one user has alone, those of training in the shards' users are told of, and no others: no
    held-out ones, none of users who measure perplexity, none of the one who is tested in the unseen domain."""
    split, found = read_split(data), texts()
    held_out = {str(split.catalogue.title[item]) for item in split.interactions.item[split.events(TEST)]}
    apart = open_shards(data / "shards" / "heldout").documents["user_id"].to_pylist()
    assert "u00 last of films" in held_out and apart
    shown = {domain: {title for titles in histories(data, domain) for title in titles} for domain in ("films", "songs")}
    for name, documents in found.items():
        every, domain = "\n".join(documents), name.rpartition(" ")[2]
        own = re.findall(r"(\w+) (early|valid|last) of (\w+)", every)
        assert {" ".join([user, what, "of", where]) for user, what, where in own} <= shown[domain]
        assert {what for _, what, _ in own} <= {"early"} and {where for _, _, where in own} <= {domain}
        assert not {user for user, _, _ in own} & {*apart, "both"}
        assert len(own) > 5 or name.startswith("rules")
    told = (re.search(r"The item (.*?) (?:is by|belongs)", text) for text in found["item texts of films"])
    with_fields = {title for title in shown["films"] if title not in ("films number 6", "films number 8")}
    assert {match.group(1) for match in told if match} == with_fields


def test_walks_read_as_histories_and_go_along_links(data: Path, texts: Callable[..., dict[str, list[str]]]) -> None:
    documents = texts()["walks of films"]
    near = {
        frozenset((one, other))
        for titles in histories(data, "films")
        for place, one in enumerate(titles)
        for other in titles[place + 1 : place + 6]
    }
    for text in documents:
        head, *lines = re.split(r"\n- |\nNext: ", text.removesuffix("<eos>"))
        assert head == "Domain: films\nHistory:" and text.count("\nNext: ") == 1 and len(lines) == 8
        assert all(frozenset(pair) in near and pair[0] != pair[1] for pair in itertools.pairwise(lines))
    assert len(documents) == 3 * len({title for titles in histories(data, "films") for title in titles})
    assert len(set(documents)) > 0.9 * len(documents)


RULE = re.compile(
    r"Domain: songs\nThose who chose (.*) also chose (.*): (\S+)% of them \((\d+) users\), (\S+) times as often as all "
    r"users\.<eos>"
)


def test_rules_count_users(data: Path, texts: Callable[..., dict[str, list[str]]]) -> None:
    users = [set(titles) for titles in histories(data, "songs")]
    having = Counter(title for titles in users for title in titles)
    both = Counter(pair for titles in users for pair in itertools.permutations(titles, 2))
    documents = texts()["rules of songs"]
    found = [match.groups() for match in map(RULE.fullmatch, documents) if match]
    assert len(found) == len(documents)
    assert {(one, other): int(count) for one, other, _, count, _ in found} == {
        pair: count for pair, count in both.items() if count >= 3
    }
    for one, other, percent, count, lift in found:
        confidence = int(count) / having[one]
        assert float(percent) == pytest.approx(100 * confidence, rel=0.05)
        assert float(lift) == pytest.approx(confidence / (having[other] / len(users)), rel=0.05)


def test_item_texts_have_brand_and_categories(texts: Callable[..., dict[str, list[str]]]) -> None:
    found = texts()
    assert "item texts of songs" not in found, "songs have neither"
    assert {
        "Domain: films\nThe item films number 1 is by Acme and belongs to Old > New.<eos>",
        "Domain: films\nThe item films number 7 is by Acme.<eos>",
        "Domain: films\nThe item films number 2 belongs to Old > New.<eos>",
    } <= set(found["item texts of films"])
    assert not any("number 6" in text for text in found["item texts of films"]), "it has neither"


def test_the_seed_decides_the_walks(
    config: Callable[..., PretrainConfig], texts: Callable[..., dict[str, list[str]]]
) -> None:
    first, again, other = texts(), texts(), texts(seed=1)
    assert first == again
    assert first["walks of films"] != other["walks of films"] and first["rules of films"] == other["rules of films"]


def test_each_kind_has_its_share_and_the_domains_divide_it(config: Callable[..., PretrainConfig]) -> None:
    settings = config(mixture=Mixture(**ALL, mixed_share=0.5, domain_weights={"songs": 3}), num_train_epochs=20)
    plan = pretrain_plan(settings, behaviour_and_more(settings))
    found = plan.stream.mixture_until(plan.stream.num_steps)
    kinds = Counter(
        {kind: sum(v for k, v in found.items() if k.startswith(kind)) for kind in ("walks", "rules", "item")}
    )
    assert kinds == pytest.approx({"walks": 0.2, "rules": 0.1, "item": 0.1}, abs=0.01)
    assert found["mixed"] == pytest.approx(0.3, abs=0.01)
    ratio = found["songs (specific)"] / found["films (specific)"]
    for kind in ("walks", "rules"):
        assert found[f"{kind} of songs"] / found[f"{kind} of films"] == pytest.approx(ratio, rel=0.1)
    without = config(mixture=Mixture(**ALL, domain_weights={"songs": 0}))
    names = [group.name for group in behaviour_and_more(without)]
    assert "walks of films" in names and "walks of songs" not in names


def test_the_loss_of_items_only_covers_titles_of_walks_and_whole_sentences(
    config: Callable[..., PretrainConfig],
) -> None:
    settings = config(mixture=Mixture(**ALL), loss="items_only", num_train_epochs=4)
    stream = pretrain_plan(settings, behaviour_and_more(settings)).stream
    tokenizer = load_tokenizer(str(Path(settings.data) / "tokenizer"))
    read = set()
    for step in range(stream.num_steps):
        documents = stream.documents(step)
        tokens = stream.corpus.take(documents).tokens
        marks = stream._is_target(documents, tokens)  # type: ignore[misc]
        for row, document in enumerate(documents):
            kind = stream.corpus.groups[stream.corpus.group[document]].kind
            inside = marks[tokens.offsets[row] : tokens.offsets[row + 1]]
            text = tokenizer.decode(tokens[row][inside])
            assert ("Domain:" in text) == (kind in ("rules", "item texts"))
            read.add(kind)
    assert {"walks", "rules", "item texts"} <= read


@pytest.mark.slow
def test_pretraining_counts_the_kinds_and_forks_read_them_again(
    config: Callable[..., PretrainConfig], data: Path
) -> None:
    settings = config(mixture=Mixture(**ALL), anneal_steps=0.3, num_train_epochs=2)
    folder = pretrain(settings)
    log = read_log(folder / LOG)
    assert log[0]["mixture_asked"]["rules of films"] > 0.02
    assert [line["mixture"] for line in log if "mixture" in line][-1]["walks of films"] > 0.05
    shards = open_shards(data / "shards" / "train").sha256
    inputs = read_resolved(folder)["inputs"]
    assert inputs["trained_on"] == shards, "no certificate speaks of other documents"
    assert len(inputs["curriculum"].split()) == 5
    assert pretrain(settings) == folder, "the same documents are made again"
    branch = fork(replace(settings, output_dir=str(folder.parent / "branch")), next(folder.glob("stable-*")))
    assert (branch / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_from_before_there_was_a_curriculum_is_reused(config: Callable[..., PretrainConfig]) -> None:
    settings = config(eval_tokens=0, curriculum=Curriculum())
    folder = pretrain(settings)
    record = json.loads((folder / CONFIG_FILE).read_text())
    del record["config"]["curriculum"]
    for name in ALL:
        assert record["config"]["mixture"].pop(name) == 0
    assert "curriculum" not in record["inputs"]
    (folder / CONFIG_FILE).write_text(json.dumps(record))
    assert pretrain(settings) == folder
    assert to_dict(from_mapping(PretrainConfig, under_current_names(record["config"]))) == to_dict(settings)


def test_what_cannot_be_made_is_refused_before_training(
    config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.train.pretrain.run_training", None)
    rules, walks = Mixture(rules_share=0.1), Mixture(walks_share=0.1)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"mixture": rules, "curriculum": Curriculum(min_support=99)},
            r"min_support=99 leaves no rule in domain 'films', where no two items have more than \d+ users in common",
        ),
        ({"mixture": walks, "max_length": 8}, "max_length=8 has no room for an item of domain 'films'"),
        ({"anneal_mixture": Mixture(item_text_share=0.1, domain_weights={"films": 0})}, "item texts, but no domain"),
        ({"mixture": Mixture(walks_share=1, domain_weights={"films": 0, "songs": 0})}, "none is read"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            pretrain_plan(config(**changes), behaviour_and_more(config(**changes)))


def test_a_branch_that_adds_examples_reads_on_in_the_same_order(config: Callable[..., PretrainConfig]) -> None:
    """A group's order depends on its number, so what comes to a branch has higher ones than what its stem has read."""
    stem = config(mixture=Mixture(**ALL))
    branch = replace(stem, anneal_mixture=replace(stem.mixture, examples_share=0.1))
    names = [[group.name for group in behaviour_and_more(each)] for each in (stem, branch)]
    assert names[1][: len(names[0])] == names[0] and len(names[1]) > len(names[0])


def test_a_domain_without_transitions_is_refused(
    config: Callable[..., PretrainConfig], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = read_split(data)
    one = replace(split.interactions, item=np.full_like(split.interactions.item, split.catalogue.rows_of("films")[0]))
    monkeypatch.setattr("cprec.train.pretrain.read_split", lambda folder: replace(split, interactions=one))
    monkeypatch.setattr("cprec.train.pretrain.events_of_shards", lambda *read: np.ones(len(split.part), dtype=bool))
    with pytest.raises(ConfigError, match="no walks of domain 'films': no item leads to another one"):
        behaviour_and_more(config(mixture=Mixture(walks_share=0.1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"walk_p": 0.0}, "walk_p=0.0 must lie in 0.01..100"),
        ({"walk_q": -2.0}, "walk_q=-2.0 must lie in 0.01..100"),
        ({"walk_length": 1}, "walk_length=1 must be at least 2"),
        ({"walks_per_item": 0}, "walks_per_item=0 must be at least 1"),
        ({"min_support": 1}, "min_support=1 must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Curriculum(**settings)


def test_shares_above_all_tokens_are_refused() -> None:
    Mixture(walks_share=0.6, rules_share=0.3, text_share=0.1)
    with pytest.raises(
        ConfigError, match=r"text_share=0.1, walks_share=0.6 and rules_share=0.4 are more than all tokens"
    ):
        Mixture(walks_share=0.6, rules_share=0.4, text_share=0.1)
    with pytest.raises(ConfigError, match=r"item_text_share=-0.1 must lie in 0..1"):
        Mixture(item_text_share=-0.1)
