from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.errors import DataError
from cprec.models import tiny_model
from cprec.search.trie import Trie
from cprec.text.stream import NEXT_CHILD, NEXT_TOKEN
from cprec.train.catalogue_loss import CatalogueLoss, TitleNodes
from cprec.train.loss import PackedLoss

EOS, VOCABULARY = 1, 20
TITLES = [[5, 6, 7, EOS], [5, 6, EOS], [5, 6, EOS], [9, 8, EOS], [9, 8, EOS], [10, 5, 6, EOS]]  # two are shared
TRIE = Trie.build(Ragged.of(TITLES))
# A title in the history is no target; each document ends with its target.
DOCUMENTS = [[15, 16, 5, 6, *TITLES[0]], [17, *TITLES[1]], [15, *TITLES[3]], [18, 15, *TITLES[5]]]
FIRST = np.array([4, 1, 1, 2])


def nodes() -> list[list[int]]:
    tokens = Ragged.of(DOCUMENTS)
    found = TitleNodes(TRIE)(tokens, FIRST)
    return [found[start:stop].tolist() for start, stop in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def rows() -> dict[str, torch.Tensor]:
    shape = len(DOCUMENTS), max(map(len, DOCUMENTS))
    arrays = {name: np.full(shape, IGNORE) for name in ("targets", "nodes")}
    ids = np.zeros(shape, dtype=np.int64)
    for row, (document, found) in enumerate(zip(DOCUMENTS, nodes(), strict=True)):
        ids[row, : len(document)] = document
        arrays["targets"][row, FIRST[row] - 1 : len(document) - 1] = document[FIRST[row] :]
        arrays["nodes"][row, : len(document) - 1] = found[1:]
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    arrays |= {"input_ids": ids, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture
def model() -> Any:
    return tiny_model(VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def reference(model: Any) -> torch.Tensor:
    """Position by position: cross-entropy among the tokens with which titles that begin alike go on."""
    loss = torch.zeros(())
    for document, first in zip(DOCUMENTS, FIRST, strict=True):
        logits = model(input_ids=torch.tensor([document])).logits[0]
        for place in range(first, len(document)):
            so_far = document[first:place]
            goes_on = sorted({title[len(so_far)] for title in TITLES if title[: len(so_far)] == so_far})
            target = torch.tensor(goes_on.index(document[place]))
            loss = loss + cross_entropy(logits[place - 1, goes_on], target)
    return loss


def test_targets_are_found_in_the_trie_where_there_is_a_choice() -> None:
    leads_to = {tuple(title): int(leaf) for title, leaf in zip(TITLES, TRIE.leaf.tolist(), strict=True)}
    first, *_ = found = nodes()
    assert first[:4] == [IGNORE] * 4 and first[4] == 1  # 5 is the root's first child
    assert first[5] == IGNORE and first[7] == IGNORE  # only 6 follows 5, and only the end follows 5 6 7
    assert found[1][3] == leads_to[5, 6, EOS]  # the end, or 7
    assert found[2] == [IGNORE, 2, IGNORE, IGNORE] and found[3] == [IGNORE, IGNORE, 3, IGNORE, IGNORE, IGNORE]


def test_loss_and_gradients_are_those_of_a_slow_reference(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.train.catalogue_loss.CHUNK", 2)
    expected = reference(model)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    losses = CatalogueLoss(model, TRIE, 1.0).losses(rows())
    assert list(losses) == [NEXT_CHILD]
    torch.testing.assert_close(losses[NEXT_CHILD], expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(losses[NEXT_CHILD], list(model.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_both_losses_have_their_weights_and_rows_without_nodes_the_vocabulary_alone(model: Any) -> None:
    whole = PackedLoss(model).losses(rows())[NEXT_TOKEN]
    losses = CatalogueLoss(model, TRIE, 0.25).losses(rows())
    torch.testing.assert_close(losses[NEXT_TOKEN], 0.75 * whole)
    torch.testing.assert_close(losses[NEXT_CHILD], 0.25 * reference(model), rtol=1e-5, atol=1e-6)
    plain = {name: array for name, array in rows().items() if name != "nodes"}
    assert CatalogueLoss(model, TRIE, 0.25).losses(plain) == {NEXT_TOKEN: whole}


def test_rows_without_a_choice_give_no_loss(model: Any) -> None:
    blank = rows() | {"nodes": torch.full_like(rows()["nodes"], IGNORE)}
    loss = CatalogueLoss(model, TRIE, 1.0).losses(blank)[NEXT_CHILD]
    loss.backward()
    assert loss.item() == 0


def test_targets_that_are_no_titles_are_refused() -> None:
    with pytest.raises(DataError, match="no titles of the catalogue: prepare the data anew"):
        TitleNodes(TRIE)(Ragged.of([[15, 5, 7, EOS]]), np.array([1]))
