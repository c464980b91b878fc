"""The item head of pre-training: what it may learn from, what it says of unseen domains, and what goes on from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cprec.data.config import TableSource
from cprec.data.dataset import read_split
from cprec.data.splits import Split, as_one_domain
from cprec.errors import DataError, InputChanged, LeakageError
from cprec.finetune import finetune
from cprec.item_head import load_heads, made_from
from cprec.pretrain import pretrain, seconds_of_head
from cprec.rank.llm import LLMRecommender
from cprec.recommender import RankingQuery
from cprec.schema import TEST, TRAIN, VALIDATION, Item
from cprec.systems.recipes.title_sasrec import ROWS, TitleSASRec
from cprec.systems.signals import TrainingSequences
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.shards import open_shards
from cprec.text.tokenizer import load_tokenizer
from cprec.train.config import FinetuneConfig, PretrainConfig, TinyModel
from cprec.train.pretrain import events_of_shards
from cprec.train.training import encoder_of

WORDS = ("apple", "river", "stone", "cloud", "tiger", "piano", "lemon", "grass")
COLOURS = ("red", "blue", "green", "black", "white", "brown")
SEEN = ("films", "songs")
NAMED = {"films": "film", "songs": "song", "books": "film song"}
SMALL = {"hidden_size": 16, "num_heads": 2, "num_blocks": 1, "batch_size": 32, "min_steps": 200, "num_epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In films, songs and books an item of one word is followed by one of the next, of any colour. Nobody pre-trains on
    books, nor on `both`, who are tested there."""
    folder = tmp_path_factory.mktemp("world")
    users = {"films": 40, "songs": 40, "books": 16}
    for domain, count in users.items():
        names = [f"u{n:02}" for n in range(count)] if domain != "books" else [f"v{n:02}" for n in range(count)]
        if domain != "songs":
            names += [f"both{n}" for n in range(4)]
        titles = [f"{word} {colour} {NAMED[domain]}" for word in WORDS for colour in COLOURS]
        items = [f"{n:02},{title}" for n, title in enumerate(titles)]
        Path(folder, f"{domain}.csv").write_text("\n".join(["item_id,title", *items]))
        walks = [
            (name, (3 * u + n) % 8 * 6 + (u // 8 + n * n) % 6, n) for u, name in enumerate(names) for n in range(7)
        ]
        events = [f"{name},{item:02},{1_500_000_000 + n}" for name, item, n in walks]
        Path(folder, f"{domain}_log.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]))
    return prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=tuple(
                TableSource(domain=name, interactions=f"{folder}/{name}_log.csv", items=f"{folder}/{name}.csv")
                for name in users
            ),
            target_domains=("books", "films"),
            pretrain_domains=SEEN,
            vocabulary_size=400,
            k_core=0,
            min_events=3,
            heldout_share=0.0,
            workers=1,
        )
    )


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Small heads. Heads of weights of the same shapes read them differently in pre-training and fine-tuning."""
    other = {"block": "pre_norm", "num_heads": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cprec.pretrain.TitleSASRec", partial(TitleSASRec, **SMALL | other, learning_rate=0.02, dropout=0.1)
        )
        patch.setattr(
            "cprec.finetune.TitleSASRec", partial(TitleSASRec, **SMALL | {"min_steps": 0}, learning_rate=1e-9)
        )
        yield


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    return PretrainConfig(
        data=str(data),
        output_dir=str(tmp_path_factory.mktemp("runs") / "pretrained"),
        tiny=TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        num_train_epochs=0.2,
        max_length=128,
        bf16="false",
        eval_tokens=0,
        item_head=True,
        report_to=("none",),
    )


@pytest.fixture(scope="module")
def pretrained(config: PretrainConfig, small: None) -> Path:
    return pretrain(config)


@pytest.fixture(scope="module")
def tuning(config: PretrainConfig, pretrained: Path, data: Path) -> FinetuneConfig:
    return FinetuneConfig(
        data=str(data),
        output_dir=f"{pretrained}-tuned",
        model_name_or_path=str(pretrained),
        domain="books",
        num_train_epochs=0,
        max_length=128,
        bf16="false",
        eval_tokens=0,
        item_head=True,
        report_to=("none",),
    )


@pytest.fixture
def split(data: Path) -> Split:
    return read_split(data)


def test_the_time_of_training_can_be_told_before(config: PretrainConfig, small: None) -> None:
    assert seconds_of_head(config) > 0


# ---- what it may learn from ------------------------------------------------------------------------------------------


def test_domains_as_one_are_their_users_and_items_side_by_side(split: Split) -> None:
    """By brute force over the events; a user of two domains is two users."""
    log, catalogue = split.interactions, split.catalogue
    one = as_one_domain(split, "all", SEEN, np.ones(len(log), dtype=bool))
    titles = [title for name in SEEN for title in catalogue.title[catalogue.rows_of(name)]]
    assert one.catalogue.title.tolist() == titles
    assert one.catalogue.item_id.tolist() == sorted(set(one.catalogue.item_id))

    def told(of: Split, domains: tuple[str, ...], part: str) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for row in np.flatnonzero(of.events(part)):
            item, user = of.interactions.item[row], of.interactions.user_id[of.interactions.user[row]]
            name = of.catalogue.domains[of.catalogue.domain[item]]
            if name in domains:
                out.setdefault(user if name == "all" else f"{user}/{name}", []).append(of.catalogue.title[item])
        return out

    for part in (TRAIN, VALIDATION, TEST):
        assert told(one, ("all",), part) == told(split, SEEN, part)
    queries = one.queries("all", VALIDATION, max_history=99)
    assert len(queries) == sum(len(split.queries(name, VALIDATION, max_history=99)) for name in SEEN)
    assert set(queries.history.lengths) == {5}


def known_events(split: Split, data: Path) -> np.ndarray:
    shards = open_shards(data / "shards" / "train")
    encoder = encoder_of(data, shards.manifest["about"], load_tokenizer(str(data / "tokenizer")))
    return events_of_shards(split, shards, encoder)


def test_only_users_whose_documents_are_in_the_shards_are_learnt_from(split: Split, data: Path) -> None:
    """Those who are tested in the domain that is not pre-trained on have events in films, too."""
    shards = open_shards(data / "shards" / "train")
    one = as_one_domain(split, "all", SEEN, known_events(split, data))
    learners = {name.split("/")[1] for name in TrainingSequences.of(one, "all").users}
    assert learners == set(shards.column("user_id")) == {f"u{n:02}" for n in range(40)}
    assert {name.split("/")[0] for name in one.interactions.user_id} == learners, "validation queries, too"


@pytest.mark.parametrize("planted", [VALIDATION, TEST])
def test_events_that_the_shards_do_not_hold_are_caught(split: Split, data: Path, planted: str) -> None:
    """A held-out event of one user is marked as one of training."""
    part = split.part.copy()
    names = split.interactions.user_id[split.interactions.user]
    films = split.catalogue.domain[split.interactions.item] == split.catalogue.domain_index("films")
    part[split.events(planted) & films & (names == "u07")] = 0
    with pytest.raises(
        LeakageError, match=r"1 users have other .* 'u07' in 'films', with '.* film' 1 times for 0: the"
    ):
        known_events(replace(split, part=part), data)


def test_an_event_in_place_of_another_is_caught(split: Split, data: Path) -> None:
    """The last of training and the one of validation after it change their parts: the number of events stays."""
    log, part = split.interactions, split.part.copy()
    films = split.catalogue.domain[log.item] == split.catalogue.domain_index("films")
    mine = np.flatnonzero(films & (log.user_id[log.user] == "u07"))
    last, after = mine[split.events(TRAIN)[mine]][-1], mine[split.events(VALIDATION)[mine]][0]
    part[last], part[after] = part[after], part[last]
    with pytest.raises(
        LeakageError, match=r"1 users have other training events .* as 'u07' in 'films', with '.* film'"
    ):
        known_events(replace(split, part=part), data)
    moved = log.item.copy()
    first, second = mine[split.events(TRAIN)[mine]][:2]
    moved[[first, second]] = moved[[second, first]]
    known_events(replace(split, interactions=replace(log, item=moved)), data)  # documents may be shuffled


# ---- what it says of domains -----------------------------------------------------------------------------------------


def words(split: Split, rows: np.ndarray) -> np.ndarray:
    """The first words of the titles of some items."""
    return np.array([title.split()[0] for title in split.catalogue.title[rows]])


def hits(model: LLMRecommender, split: Split, domain: str) -> float:
    """The share of test queries whose best item has the word of the target."""
    queries = split.queries(domain, TEST, max_history=99)
    asked = [
        RankingQuery(name, domain, tuple(Item(domain, split.catalogue.item_id[row]) for row in rows))
        for name, rows in zip(queries.query_id, queries.history, strict=True)
    ]
    best = split.catalogue.rows_of(domain)[model.item_log_probs(domain, asked).argmax(1)]
    return float((words(split, best) == words(split, queries.target)).mean())


def test_a_domain_never_seen_is_ranked_by_what_its_titles_say(pretrained: Path, split: Split) -> None:
    """One in eight by chance, and at most a fifth by popularity: the words follow one another as in other domains."""
    model = LLMRecommender.from_pretrained(pretrained, mode="vectors")
    assert model.domains == ("books", "films", "songs")
    targets = words(split, split.queries("books", TEST, max_history=99).target)
    assert max(float((targets == word).mean()) for word in WORDS) <= 0.2, "whatever is popular"
    found = {domain: hits(model, split, domain) for domain in model.domains}
    assert found["books"] > 0.3 and min(found["films"], found["songs"]) > 0.7, found


def test_a_finished_head_is_reused_and_another_models_is_refused(
    config: PretrainConfig, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (pretrained / "item_head" / "head.safetensors").stat().st_mtime_ns
    pretrain(config)
    assert "item_head: complete, reused" in capsys.readouterr().err
    assert (pretrained / "item_head" / "head.safetensors").stat().st_mtime_ns == before
    other = shutil.copytree(pretrained, tmp_path / "other")
    about = json.loads((other / "cprec.json").read_text())
    (other / "cprec.json").write_text(json.dumps(about | {"tokens": 1}))
    with pytest.raises(DataError, match=r"belongs to another model .* train again with item_head=true"):
        LLMRecommender.from_pretrained(other)


# ---- what goes on from it --------------------------------------------------------------------------------------------


def test_the_head_of_fine_tuning_starts_from_it(tuning: FinetuneConfig, pretrained: Path, split: Split) -> None:
    """With next to no steps it ranks as that one does; its items have rows of their own, which start at zero."""
    tuned = finetune(tuning)
    base, model = (LLMRecommender.from_pretrained(folder, blend=False) for folder in (pretrained, tuned))
    query = RankingQuery("q", "books", (Item("books", "12"), Item("books", "18")))
    expected = base.item_log_probs("books", [query])
    assert model.item_log_probs("books", [query]) == pytest.approx(expected, abs=1e-4)
    heads = load_heads(tuned, split.catalogue)
    assert list(heads) == ["books"] and not heads["books"].serves_any_domain
    assert "start" in made_from(tuned) and made_from(tuned)["domain"] == "books"


def test_another_number_of_networks_is_another_head_of_the_same_model(
    tuning: FinetuneConfig, pretrained: Path, split: Split, tmp_path: Path
) -> None:
    config = replace(tuning, output_dir=str(tmp_path / "tuned"))
    folder = finetune(config)
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    assert made_from(folder)["networks"] == 1
    finetune(replace(config, head_networks=2))
    assert made_from(folder)["networks"] == 2 and (folder / "model.safetensors").stat().st_mtime_ns == weights
    names = load_heads(folder, split.catalogue)["books"].recommender.arrays()
    assert sum(name.endswith(ROWS) for name in names) == 2


def test_a_head_that_began_elsewhere_is_never_taken_for_it(
    tuning: FinetuneConfig, pretrained: Path, tmp_path: Path
) -> None:
    """It is made anew where the base has another head, or none; without the base nothing is taken for finished."""
    base = shutil.copytree(pretrained, tmp_path / "base")
    config = replace(tuning, model_name_or_path=str(base), output_dir=str(tmp_path / "tuned"))
    folder = finetune(config)
    begun = made_from(folder)
    shutil.rmtree(base / "item_head")
    finetune(config)
    assert made_from(folder) == {name: value for name, value in begun.items() if name != "start"} != begun
    shutil.rmtree(base)
    with pytest.raises(InputChanged):
        finetune(config)
