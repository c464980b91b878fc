"""The item head: its targets, its loss and its rankings."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from cprec.rank.llm import LLMRecommender
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.text.corpus import Corpus
from cprec.text.encoding import PromptEncoder
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
