"""The item head: its targets, its loss and its rankings."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.item_head import ItemHead, load_head
from cprec.rank.blend import Blend, write_blend
from cprec.rank.blend_file import Setting
from cprec.rank.llm import LLMRecommender
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.search.attention import PromptTree
from cprec.search.priors import Priors
from cprec.text.corpus import Corpus
from cprec.text.encoding import PromptEncoder
from cprec.text.prompts import Template
from cprec.text.shards import open_shards, write_shards
from cprec.text.stream import NEXT_ITEM, NEXT_TOKEN, TokenStream, one_phase
from cprec.train.checkpoint import newest_intact, read_state, whole_weights
from cprec.train.config import FinetuneConfig
from cprec.train.loss import ItemHeadLoss, PackedLoss


@pytest.fixture
def catalogue() -> Catalogue:
    titles = ["red book 1", "blue book", "green book 2 3", "red"]
    table = pa.table({"item_id": ["a", "b", "c", "d"], "title": titles})
    return Catalogue.from_tables({"books": table, "games": table})


@pytest.fixture
def encoder(tokenizer: Any, catalogue: Catalogue) -> PromptEncoder:
    return PromptEncoder(tokenizer, catalogue)


EVENTS = Ragged.of([[4, 6, 5], [7, 7], [5]])
"""Of three documents of `games`, whose items are the rows from 4 on."""


@pytest.fixture
def stream(tokenizer: Any, encoder: PromptEncoder, tmp_path: Path) -> TokenStream:
    domains = np.ones(3, dtype=np.int64)
    tokens, target_start = encoder.documents("specific", domains, EVENTS)
    names = {"domain": "games", "kind": "specific", "platform": "shop", "user_id": "u"}
    columns = {name: np.full(3, value, dtype=object) for name, value in names.items()}
    columns |= {"num_events": EVENTS.lengths, "target_start": target_start}
    of_events = {"items": Ragged(EVENTS.values - 4, EVENTS.offsets), "starts": encoder.title_starts(domains, EVENTS)}
    write_shards(tmp_path, tokens, columns | of_events, {"vocabulary_size": len(tokenizer)})
    shards = open_shards(tmp_path)
    plan = one_phase(shards.manifest["num_tokens"])
    return TokenStream(Corpus.of(shards), plan, rows_per_step=2, row_tokens=96, seed=0, items=True)


@pytest.fixture
def headed(make_model: Callable[..., Any], encoder: PromptEncoder) -> Any:
    model = make_model()
    torch.manual_seed(0)
    model.item_head = ItemHead(encoder.titles(np.arange(4, 8)), 16)
    torch.nn.init.normal_(model.item_head.rows)
    return model


def test_items_stand_before_their_titles(stream: TokenStream, encoder: PromptEncoder) -> None:
    found = []
    for batch in stream:
        ids, items = batch.rows["input_ids"], batch.rows["items"]
        assert batch.counts[NEXT_ITEM] == (items != IGNORE).sum()
        for row, place in np.argwhere(items != IGNORE):
            title = encoder.titles(np.array([4 + items[row, place]]))[0]
            assert ids[row, place + 1 : place + 1 + len(title)].tolist() == title.tolist()
            opens = ids[row, : place + 1].tolist()
            marks = (encoder.line_tokens.tolist(), encoder.next_tokens.tolist())
            assert any(opens[-len(mark) :] == mark for mark in marks)
            found.append(int(items[row, place]))
    assert sorted(found) == [1, 2, 3], "all but the first of each document"


def test_the_loss_is_the_cross_entropy_over_the_catalogue(stream: TokenStream, headed: Any) -> None:
    loss, rows = ItemHeadLoss(headed.eval(), 0.5), {k: torch.from_numpy(v) for k, v in stream.batch(0).rows.items()}
    terms = loss.losses(rows)
    head, embedding = headed.item_head, headed.get_input_embeddings().weight
    hidden = loss._hidden(rows["input_ids"], rows["position_ids"])
    titles = [head._tokens[a:b] for a, b in zip(head._starts, [*head._starts[1:], len(head._tokens)], strict=True)]
    vectors = torch.stack([head.title(head.norm(embedding[title].mean(0))) for title in titles]) + head.rows
    slow = torch.nn.functional.cross_entropy(
        (head.state(hidden) @ vectors.T).flatten(0, 1), rows["items"].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert terms[NEXT_ITEM].item() == pytest.approx(0.5 * slow.item(), rel=1e-5)
    assert terms[NEXT_TOKEN].item() == pytest.approx(PackedLoss(headed).losses(rows)[NEXT_TOKEN].item(), rel=1e-6)
    mine = torch.autograd.grad(terms[NEXT_ITEM], [head.rows, embedding], retain_graph=True)
    theirs = torch.autograd.grad(0.5 * slow, [head.rows, embedding])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(mine, theirs, strict=True))


def test_a_saved_head_is_the_same_and_gives_new_items_vectors(
    headed: Any, tokenizer: Any, catalogue: Catalogue, encoder: PromptEncoder, tmp_path: Path
) -> None:
    ItemHeadLoss(headed, 1.0).save(tmp_path, whole_weights(headed))
    head = load_head(tmp_path, encoder.titles(np.arange(4, 8)))
    assert head is not None and all(
        torch.equal(head.state_dict()[k], v) for k, v in headed.item_head.state_dict().items()
    )
    made = LLMRecommender(headed, tokenizer, catalogue, domain="games", mode="vectors", item_head=head)
    queries = [RankingQuery("q", "games", (Item("games", name),), exclude=frozenset(name)) for name in "abc"]
    rankings, scores = made.rank(queries, 2), made.item_log_probs("games", queries)
    assert np.exp(scores).sum(1) == pytest.approx(1)
    for row, (query, ranking) in enumerate(zip(queries, rankings, strict=True)):
        best = [item for item in np.array(list("abcd"))[np.argsort(-scores[row])] if item not in query.exclude]
        assert list(ranking.item_ids) == best[:2]
    table = pa.table({"item_id": ["0", "b", "c", "d"], "title": ["blue 1", "blue book", "green book 2 3", "red"]})
    other = Catalogue.from_tables({"books": table, "games": table})
    later = made.with_items(other, {"games": frozenset("d")})
    changed = later.item_log_probs("games", queries[1:2])[0]
    assert np.exp(changed[:3]).sum() == pytest.approx(1), "the items in stock"
    assert changed[1] - changed[2] == pytest.approx(scores[1][1] - scores[1][2], abs=1e-5)
    assert set(later.rank(queries[1:2], 4)[0].item_ids) == {"0", "c"}


# ---- a part of a blend -----------------------------------------------------------------------------------------------


class Margins:
    """A source of priors: what is known of each item, whoever asks; and the weights of the model's two readouts."""

    def __init__(self, catalogue: Catalogue, weight: float, item_head: float) -> None:
        self.catalogue, self.weight, self.item_head = catalogue, weight, item_head

    def priors(self, domain: str, queries: Sequence[RankingQuery]) -> Priors:
        ids = self.catalogue.item_id[self.catalogue.rows_of(domain)]
        values = [float(ord(item) % 3) for item in ids]
        return Priors(np.tile(values, (len(queries), 1)), self.weight, self.item_head)

    def with_catalogue(self, catalogue: Catalogue) -> Margins:
        return Margins(catalogue, self.weight, self.item_head)


@pytest.fixture
def opened(headed: Any, tokenizer: Any, catalogue: Catalogue) -> Callable[..., LLMRecommender]:
    """The model with its head; given weights, blended."""

    def opened(weight: float | None = None, item_head: float = 0.0, **options: Any) -> LLMRecommender:
        head = headed.item_head.eval()
        made = LLMRecommender(headed, tokenizer, catalogue, domain="games", item_head=head, **options)
        made.blend = None if weight is None else Margins(catalogue, weight, item_head)
        return made

    return opened


def games(*history: str, **changes: Any) -> RankingQuery:
    return RankingQuery("q", "games", tuple(Item("games", name) for name in history), **changes)


ASKED = [
    games("a", "c", exclude=frozenset("a")),
    games("b", uncounted=frozenset("bd")),
    games(allow=frozenset("bc")),
    games("d", candidates=("c", "a")),
]


def ids_and_scores(rankings: Sequence[Ranking]) -> list[dict[str, float]]:
    return [dict(zip(one.item_ids, one.scores, strict=True)) for one in rankings]


@pytest.mark.parametrize(("weight", "item_head"), [(0.7, 1.5), (1.0, 0.0), (0.0, 0.8), (0.0, 0.0)])
@pytest.mark.parametrize("mode", ["exact", "beam"])
def test_scores_are_the_sum_of_both_readouts_and_the_priors(
    opened: Callable[..., LLMRecommender], weight: float, item_head: float, mode: str
) -> None:
    """By brute force; after items came and went, too."""
    alone, blended = opened(mode=mode), opened(weight, item_head, mode=mode)
    table = pa.table({"item_id": ["0", "b", "c", "d"], "title": ["blue 1", "blue book", "green book 2 3", "red"]})
    other, later = (
        Catalogue.from_tables({"books": table, "games": table}),
        [games("c"), games("b", exclude=frozenset("c"))],
    )
    withdrawn = {"games": frozenset("d")}
    for one, both, asked in (
        (alone, blended, ASKED),
        (alone.with_items(other, withdrawn), blended.with_items(other, withdrawn), later),
    ):
        ids = one.catalogue.item_id[one.catalogue.rows_of("games")]
        for query, found in zip(asked, ids_and_scores(both.rank(asked, 4)), strict=True):
            every = tuple(item for item in ids if item in found)
            log_prob = ids_and_scores(one.rank([games(*(i.item_id for i in query.history), candidates=every)], 4))[0]
            of_head = dict(zip(ids, one.item_log_probs("games", [query])[0], strict=True))
            expected = {item: weight * log_prob[item] + item_head * of_head[item] + ord(item) % 3 for item in every}
            assert found == pytest.approx(expected, abs=1e-5)
            gone = one.withdrawn.get("games", frozenset()) if query.candidates is None else frozenset()
            reach = set(query.candidates or ids) - query.exclude - gone
            assert set(found) == reach & (query.allow or reach)
            assert list(found.values()) == sorted(found.values(), reverse=True)
    first = blended.rank(ASKED[:2], 1)
    for ranking, every in zip(first, ids_and_scores(blended.rank(ASKED[:2], 4)), strict=True):
        assert ranking.item_ids[0] == next(iter(every)) and ranking.proof is not None
        assert ranking.proof.exact or mode == "beam"


def test_a_prompt_is_read_once_and_titles_only_where_log_p_counts(
    opened: Callable[..., LLMRecommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    of_prompts, of_titles = PromptTree._read, PromptTree.extend
    monkeypatch.setattr(PromptTree, "_read", lambda *given: read.append("prompts") or of_prompts(*given))  # type: ignore[func-returns-value]
    monkeypatch.setattr(PromptTree, "extend", lambda *given: read.append("titles") or of_titles(*given))  # type: ignore[func-returns-value]
    for weights, expected in (((0.5, 1.0), {"prompts", "titles"}), ((0.0, 1.0), {"prompts"}), ((0.0, 0.0), set())):
        read.clear()
        opened(*weights).rank(ASKED[:3], 2)
        assert set(read) == expected and read.count("prompts") == len(expected & {"prompts"})


def test_vectors_with_a_blend_is_the_blend_without_log_p(opened: Callable[..., LLMRecommender]) -> None:
    blended = opened(0.0, 0.8)
    assert blended.rank(ASKED, 2, "vectors") == blended.rank(ASKED, 2)
    with pytest.raises(ConfigError, match=r"gives log P the weight 0.5: open the model with mode='vectors'"):
        opened(0.5, 0.8).rank(ASKED, 2, "vectors")


def test_a_blend_that_is_read_gives_the_lists_that_it_was_written_for(
    headed: Any, tokenizer: Any, catalogue: Catalogue, opened: Callable[..., LLMRecommender], tmp_path: Path
) -> None:
    """For reading titles and for `vectors`, each by its own numbers; without the head it is refused."""
    ItemHeadLoss(headed, 1.0).save(tmp_path, whole_weights(headed))
    tokenizer.save_pretrained(tmp_path)
    catalogue.write(tmp_path)
    about = {"template": asdict(Template()), "max_title_tokens": 32, "history": "specific", "max_history": 10}
    (tmp_path / "cprec.json").write_text(json.dumps(about | {"domain": "games"}))
    settings = {
        "blend": Setting(0.7, {}, 0.5, item_head=1.5),
        "vectors": Setting(0.0, {}, 0.4, item_head=0.8),
        "without_model": Setting(0.0, {}, 0.3),
    }
    write_blend(tmp_path, "games", {}, settings, {"asked": {}})
    made = opened()
    for mode in ("auto", "vectors"):
        made.blend = Blend.of(settings["vectors" if mode == "vectors" else "blend"], "games", {}, catalogue)
        read = LLMRecommender.from_pretrained(tmp_path, mode=mode, bf16=False)
        for one, other in zip(read.rank(ASKED, 2), made.rank(ASKED, 2), strict=True):
            assert one.item_ids == other.item_ids and one.scores == pytest.approx(other.scores, abs=1e-5)
    shutil.rmtree(tmp_path / "item_head")
    for mode, what in (("auto", "blend.json"), ("vectors", "mode=vectors")):
        with pytest.raises(ConfigError, match=rf"{what} needs an item head for domain 'games', and .* has none"):
            LLMRecommender.from_pretrained(tmp_path, mode=mode)


def test_a_run_that_is_resumed_ends_as_one_that_is_not(
    run: Callable[..., Any], headed: Any, stream: TokenStream, tmp_path: Path
) -> None:
    stream = TokenStream(stream.corpus, one_phase(400), rows_per_step=1, row_tokens=96, seed=0, items=True)
    again = copy.deepcopy(headed)
    state, whole = run(
        tmp_path / "whole", model=headed, trainable=ItemHeadLoss(headed, 1.0), stream=stream, save_steps=2
    )
    saved = newest_intact(tmp_path / "whole")
    assert saved is not None and read_state(saved).step < state.step
    torch.nn.init.zeros_(again.item_head.rows)  # the checkpoint has others
    _, resumed = run(
        tmp_path / "again", model=again, trainable=ItemHeadLoss(again, 1.0), stream=stream, resume_from=saved
    )
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_has_no_head_is_refused(make_model: Callable[..., Any], tokenizer: Any, catalogue: Catalogue) -> None:
    with pytest.raises(ConfigError, match=r"has none: fine-tune with item_head=1 documents=users"):
        LLMRecommender(make_model(), tokenizer, catalogue, domain="games").rank(
            [RankingQuery("q", "games", ())], 1, "vectors"
        )
    with pytest.raises(ConfigError, match=r"set documents=users"):
        FinetuneConfig(data="d", output_dir="o", domain="games", item_head=1.0)
