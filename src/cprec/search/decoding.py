"""Search of a trie of token sequences: best-first with a proof, or by a beam that says how far it may be off.

A sequence's log-probability only falls as tokens are added, and the items that have the sequence share it evenly. So no
item below a prefix scores higher than the prefix itself, less log n for the fewest items n that share a sequence there.
A prefix whose bound is below the K-th best item leads to nothing better. When no other prefix is left, the K items are
proven to be the best of all.

A prefix that only one sequence goes on from is read to the end of that sequence in one pass. If the only way on is
certain, it is not read at all.

Priors are added to the scores of items, each its own. Then the greatest below a prefix, less the share, joins the
prefix's weighted log-probability, and the rest is as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cprec.errors import ConfigError
from cprec.search.normaliser import Normaliser, OverVocabulary
from cprec.search.priors import Priors
from cprec.search.reading import Tree
from cprec.search.trie import Trie

SLACK = 0.5
"""An item's score may differ by this with what is read beside it. In bf16 SmolLM2-135M was off by at most 0.36."""
GROWTH = 1.5
"""A pass that proves reads so many times the prefixes of the one before: less than half the passes, for a few more
prefixes (docs/ranking.md)."""


@dataclass(frozen=True)
class Found:
    """The items found for one user, best first: positions in the trie, with scores."""

    items: np.ndarray
    """int64; items of equal score by position."""
    scores: np.ndarray
    """float64."""
    kth: float
    """Score of the K-th item; -inf where there are fewer than K."""
    bound: float
    """No item that was not found scores higher than this; -inf if nothing was left out."""
    expanded: int
    """Prefixes that the model read, the prompt not counted."""

    @property
    def exact(self) -> bool:
        """Whether it is proven that no other item belongs to the K best, or ties with the K-th."""
        return self.bound < self.kth or self.bound == -np.inf

    @property
    def gap(self) -> float:
        """The most by which a missed item can score above the K-th that was found; 0 if exact."""
        return 0.0 if self.exact else float(self.bound - self.kth)


@dataclass(frozen=True)
class Prefixes:
    """Prefixes that could be expanded, users ascending."""

    user: torch.Tensor
    node: torch.Tensor
    parent: torch.Tensor
    """Place in the tree of the prefix without its last token; -1 right after the prompt."""
    score: torch.Tensor
    """float64: log-probability of the prefix."""
    bound: torch.Tensor
    """float64: no item below scores higher."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, chosen: torch.Tensor) -> Prefixes:
        return Prefixes(*(column[chosen] for column in vars(self).values()))


def search(
    tree: Tree,
    trie: Trie,
    *,
    k: int,
    width: int,
    exact: bool = True,
    excluded: Sequence[np.ndarray] | None = None,
    allowed: Sequence[np.ndarray | None] | None = None,
    max_nodes: int | None = None,
    seconds: float | None = None,
    stop: Callable[[], bool] | None = None,
    per_token: bool = False,
    normaliser: Normaliser | None = None,
    priors: Priors | None = None,
    place_of: Sequence[float] | None = None,
) -> list[Found]:
    """The `k` best items for each prompt of `tree`, by log-probability: that of the sequence with its end, less log n
    for the n items in stock that share it. With `priors`, of the trie's items for each prompt, by the sum of its
    weighted value and the item's prior.

    A beam comes first: at each depth the `width` prefixes with the highest bounds go on, and every sequence that ends
    is kept, so finished sequences take no place in the beam. With `exact` the prefixes that it left behind follow, the
    best first, `width` in a pass and `GROWTH` times as many in each further one, until none is as good as the K-th
    item. It ends before that when a user has read `max_nodes` prefixes, `seconds` are over, or `stop()`, which is asked
    before each pass, is true; then the best found is returned, with the gap. Time does not stop the beam, so lists are
    always full. `per_token` divides an item's log-probability by the number of its tokens, the end included; a bound is
    then divided by the tokens of the longest sequence below the prefix. `normaliser` says what a step's probabilities
    add up to one over; by default the vocabulary. `place_of` has the score of one item for each user, where nothing but
    its place among the first K matters: the search then ends as soon as K items are above it, and reads nothing that is
    below it.

    Items with equal sequences (and priors) tie, and all found that tie with the K-th are returned. `excluded` and
    `allowed` hold item positions for each user (None allows all); prefixes without a permitted item are never entered.
    Raises ConfigError for a width or `k` below 1, DataError for priors of another number of prompts or items.
    """
    if k < 1 or width < 1:
        raise ConfigError(f"k={k} and width={width} must be at least 1")
    return _Search(
        tree, trie, k, excluded, allowed, max_nodes, seconds, stop, per_token, normaliser, priors, place_of
    ).run(width, exact)


class _Search:
    """One search for all users of a tree. All users' prefixes are searched together, as columns of tensors."""

    def __init__(
        self,
        tree: Tree,
        trie: Trie,
        k: int,
        excluded: Sequence[np.ndarray] | None,
        allowed: Sequence[np.ndarray | None] | None,
        max_nodes: int | None,
        seconds: float | None,
        stop: Callable[[], bool] | None,
        per_token: bool,
        normaliser: Normaliser | None,
        priors: Priors | None,
        place_of: Sequence[float] | None,
    ) -> None:
        self.tree, self.trie, self.k = tree, trie, k
        self.normaliser = normaliser or OverVocabulary(trie)
        self.device = tree.prompt_hidden_UD.device
        self.users = tree.num_users
        self.max_nodes = max_nodes
        stop_at = None if seconds is None else time.monotonic() + seconds
        self.timed = stop_at is not None or stop is not None
        self.stop = lambda: (stop_at is not None and time.monotonic() > stop_at) or (stop is not None and stop())
        self.token, self.first_child = trie.on(self.device, "token"), trie.on(self.device, "first_child")
        self.tail = trie.on(self.device, "tail")
        self.reach = _Reach(trie, self.users, excluded, allowed, self.device)
        self.scores = _Scores(trie, self.reach, per_token, priors, self.device)
        empty = torch.zeros(0, dtype=torch.long, device=self.device)
        self.found = empty, empty, empty.double()  # user, item, score
        self.threshold = torch.full((self.users,), -torch.inf, dtype=torch.float64, device=self.device)
        # Nothing below `least` matters, and nothing more does once the threshold is above `enough`.
        self.least, self.enough = self.threshold.clone(), -self.threshold
        if place_of is not None:
            score = torch.tensor(place_of, dtype=torch.float64, device=self.device)
            self.least, self.enough = score - SLACK, score + SLACK
        self.dropped = self.threshold.clone()  # the best bound of prefixes that were given up without being read
        self.expanded = torch.zeros(self.users, dtype=torch.long, device=self.device)

    def run(self, width: int, exact: bool) -> list[Found]:
        users = torch.arange(self.users, device=self.device)
        roots = torch.zeros_like(users)
        zero = torch.zeros_like(users, dtype=torch.float64)
        # Every user begins at the root, behind the prompt, whose state is known.
        start = Prefixes(users, roots, torch.full_like(users, -1), zero, zero)
        start = start.take(self.reach.items(users, roots) > 0)
        fresh = self._children(start, start.parent, self.tree.prompt_hidden_UD, start.user)
        left: list[Prefixes] = []
        # The beam, depth by depth.
        while len(fresh):
            chosen, rest = self._best(fresh, width, timed=False)
            left.append(rest)
            if not exact:
                self._drop(rest)
            fresh = self._expand(chosen)
        # What it left behind, the best first, until nothing is as good as the K-th item.
        frontier = self._hopeful(_joined(left, self.users)) if exact and left else None
        while frontier is not None and len(frontier):
            chosen, rest = self._best(frontier, width)
            width = int(GROWTH * width)
            if not len(chosen):  # budgets are spent
                self._drop(rest)
                break
            frontier = self._hopeful(_joined([rest, self._expand(chosen)], self.users))
        return self._results()

    # ---- one pass ----------------------------------------------------------------------------------------------------

    def _expand(self, chosen: Prefixes) -> Prefixes:
        """Let the model read prefixes. Keeps the sequences that end, and returns the children that may still matter."""
        if not len(chosen):
            return chosen
        # What is read: each prefix's node, and those behind it where only one sequence goes on, in one flat run.
        tail = self.tail[chosen.node].long()
        counts = tail.clamp(min=1)
        prefix, node = self._onward(chosen.node, counts)
        begin = counts.cumsum(0) - counts
        first = self.tree.num_nodes
        parent = first + torch.arange(len(node), device=self.device) - 1
        parent[begin] = chosen.parent
        user = chosen.user[prefix]
        hidden = self.tree.extend(self.token[node].long(), user, parent)
        self.expanded += torch.bincount(user, minlength=self.users)
        alone = tail > 0
        if bool(alone.any()):
            # Each token of an only sequence is the next one after the state before it.
            row = alone[prefix].nonzero()[:, 0]
            child, rows = self.first_child[node[row]].long(), torch.arange(len(row), device=self.device)
            steps = self.normaliser.log_probs(self.tree, hidden[row], node[row], rows, child)
            score = chosen.score.index_add(0, prefix[row], steps)
            self._keep(chosen.user[alone], self._leaf(chosen.node[alone]), score[alone])
        split = (~alone).nonzero()[:, 0]
        return self._children(chosen.take(split), first + begin[split], hidden, begin[split])

    def _onward(self, node: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As many nodes as `counts` says from each node on, itself included, each the first child of the one before:
        the row of the node that each comes from, and the nodes, in one flat run."""
        columns = [node]
        for step in range(1, int(counts.max())):
            columns.append(torch.where(counts > step, self.first_child[columns[-1]].long(), -1))
        nodes = torch.stack(columns, dim=1)
        row, column = (nodes >= 0).nonzero(as_tuple=True)
        return row, nodes[row, column]

    def _leaf(self, node: torch.Tensor) -> torch.Tensor:
        """The leaf of the only sequence behind each node; of a leaf itself."""
        counts = self.tail[node].long() + 1
        return self._onward(node, counts)[1][counts.cumsum(0) - 1]

    def _children(self, above: Prefixes, place: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor) -> Prefixes:
        """Children of prefixes; `rows` says where in `hidden` [M, D] the state of each prefix is, and `place` where it
        is in the tree."""
        if not len(above):
            return above
        # All children of all prefixes, in one flat run: `row` is the prefix of each, `child` its node.
        begin = self.first_child[above.node].long()
        counts = self.first_child[above.node + 1] - begin
        row = torch.repeat_interleave(torch.arange(len(above), device=self.device), counts)
        child = begin[row] + torch.arange(len(row), device=self.device) - (counts.cumsum(0) - counts)[row]
        # Children without an item that this user may be given are left out.
        alive = (self.reach.items(above.user[row], child) > 0).nonzero()[:, 0]
        row, child = row[alive], child[alive]
        user, token = above.user[row], self.token[child].long()
        # A child's score is its prefix's and one more token.
        score = above.score[row] + self.normaliser.log_probs(self.tree, hidden[rows], above.node, row, child)
        ends = token == self.trie.end
        if self.normaliser.only_way_is_certain:
            ends |= self.tail[child] > 0
        if bool(ends.any()):
            self._keep(user[ends], self._leaf(child[ends]), score[ends])
        row, child, user, score = (column[~ends] for column in (row, child, user, score))
        return self._hopeful(Prefixes(user, child, place[row], score, self.scores.bound(user, child, score)))

    def _keep(self, user: torch.Tensor, leaf: torch.Tensor, log_prob: torch.Tensor) -> None:
        """Of the items found, those of `leaf` included, keep each user's `k` best and what ties with the last; set the
        thresholds."""
        # Each sequence that ended stands for all its items that this user may be given.
        row, place = self.scores.spans(leaf)
        item = self.scores.by_sequence[place].long()
        row, place, item = (column[self.reach.permits(user[row], item)] for column in (row, place, item))
        user = user[row]
        score = self.scores.of_items(user, place, leaf[row], log_prob[row])
        # All items found so far, by user, the best of each user first.
        columns = [torch.cat(pair) for pair in zip(self.found, (user, item, score), strict=True)]
        order = torch.argsort(columns[2], descending=True, stable=True)
        order = order[torch.argsort(columns[0][order], stable=True)]
        user, item, score = (column[order] for column in columns)
        counts = torch.bincount(user, minlength=self.users)
        number = torch.arange(len(user), device=self.device) - (counts.cumsum(0) - counts)[user]
        last = number == self.k - 1
        self.threshold[user[last]] = score[last]
        kept = score >= self.threshold[user]
        self.found = user[kept], item[kept], score[kept]

    # ---- what to expand ----------------------------------------------------------------------------------------------

    def _best(self, prefixes: Prefixes, number: int, timed: bool = True) -> tuple[Prefixes, Prefixes]:
        """Each user's best `number` prefixes, as far as budgets go (that of time if `timed`), and the others."""
        counts = torch.bincount(prefixes.user, minlength=self.users)
        widest = int(counts.max())
        chosen = torch.zeros(len(prefixes), dtype=torch.bool, device=self.device)
        if timed and self.timed and self.stop():
            pass
        elif widest > number or self.max_nodes is not None:
            # Bounds in a grid, a row for each user, so that one topk serves all.
            begin = counts.cumsum(0) - counts
            column = torch.arange(len(prefixes), device=self.device) - begin[prefixes.user]
            grid = torch.full((self.users, widest), -torch.inf, dtype=torch.float64, device=self.device)
            # A prefix may be impossible (-inf) and must still come before the padding.
            grid[prefixes.user, column] = prefixes.bound.clamp(min=torch.finfo(torch.float64).min)
            best = grid.topk(min(number, widest), dim=1).indices
            # Of the best columns, those that are no padding and within the budget.
            real = torch.arange(best.shape[1], device=self.device) < counts[:, None]
            best = torch.where(real, begin[:, None] + best, 0)
            if self.max_nodes is not None:
                cost = torch.where(real, self.tail[prefixes.node[best]].clamp(min=1), 0)
                real &= cost.cumsum(1) <= (self.max_nodes - self.expanded)[:, None]
            chosen[best[real]] = True
        else:
            chosen[:] = True
        return prefixes.take(chosen.nonzero()[:, 0]), prefixes.take((~chosen).nonzero()[:, 0])

    def _hopeful(self, prefixes: Prefixes) -> Prefixes:
        """Prefixes with a bound of at least the K-th score, where they matter; the others are dropped."""
        least = torch.where(self.threshold > self.enough, torch.inf, torch.maximum(self.threshold, self.least))
        kept = prefixes.bound >= least[prefixes.user]
        if bool(kept.all()):
            return prefixes
        self._drop(prefixes.take((~kept).nonzero()[:, 0]))
        return prefixes.take(kept.nonzero()[:, 0])

    def _drop(self, prefixes: Prefixes) -> None:
        """Give prefixes up; the best bound among them is remembered for the gap."""
        self.dropped.scatter_reduce_(0, prefixes.user, prefixes.bound, "amax")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _results(self) -> list[Found]:
        """What was found for each user."""
        user, item, score = (column.cpu().numpy() for column in self.found)
        order = np.lexsort((item, -score, user))
        user, item, score = user[order], item[order], score[order]
        at = np.searchsorted(user, np.arange(self.users + 1))
        threshold, dropped = self.threshold.tolist(), self.dropped.tolist()
        expanded = self.expanded.tolist()
        return [
            Found(
                items=item[at[number] : at[number + 1]],
                scores=score[at[number] : at[number + 1]],
                kth=threshold[number],
                bound=dropped[number],
                expanded=expanded[number],
            )
            for number in range(self.users)
        ]


class _Scores:
    """The scores of items, and what bounds them at nodes. Suffixes: U users, N items (in stock)."""

    def __init__(self, trie: Trie, reach: _Reach, per_token: bool, priors: Priors | None, device: torch.device) -> None:
        self.by_sequence = trie.on(device, "by_sequence")
        self._first_item, self._num_items = trie.on(device, "first_item"), trie.on(device, "num_items")
        self._num_sharing = trie.on(device, "num_sharing")
        self._longest = trie.on(device, "longest") if per_token else None
        self._gain, self._weight = None, 1.0
        if priors is not None:
            priors.check(reach.num_users, len(trie.leaf))
            self._weight = priors.weight
            # What is added to the model's part of each item, by sequence: the prior, less the item's share. Items that
            # the user may not be given have -inf, so that they raise no bound.
            leaf_N = torch.from_numpy(trie.leaf[trie.by_sequence]).to(device)
            share_N = self._of_model(-self._num_sharing[leaf_N].double().log(), leaf_N).cpu().numpy()
            gain_UN = priors.values_UN[:, trie.by_sequence] + share_N
            gain_UN[~reach.permitted_UN()[:, trie.by_sequence]] = -np.inf
            # One user's behind the other's, and one more, so that each run of items has an end.
            self._gain = np.append(gain_UN, -np.inf)

    def bound(self, user: torch.Tensor, node: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
        """No item below a node, to which `log_prob` leads, scores higher for the user of the same row: float64."""
        if self._gain is None:
            return self._of_model(log_prob - self._num_sharing[node].double().log(), node)
        return self._of_model(log_prob, node) + self._greatest(self._gain, user, node)

    def of_items(
        self, user: torch.Tensor, place: torch.Tensor, leaf: torch.Tensor, log_prob: torch.Tensor
    ) -> torch.Tensor:
        """The score of each item, by its place in `by_sequence`, of a leaf to which `log_prob` leads: float64."""
        if self._gain is None:
            return self.bound(user, leaf, log_prob)
        gain = self._gain[(user * len(self.by_sequence) + place).cpu().numpy()]
        return self._of_model(log_prob, leaf) + torch.from_numpy(gain).to(log_prob.device)

    def _greatest(self, gain: np.ndarray, user: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """The greatest gain of the items below each node, none of which is above another for one user: float64."""
        first = user * len(self.by_sequence) + self._first_item[node]
        runs = torch.stack([first, first + self._num_items[node]], dim=1).cpu().numpy()
        # Runs of items that ascend, each with the gap behind it, whose greatest is not asked for.
        order = np.argsort(runs[:, 0])
        out = np.empty(len(runs))
        out[order] = np.maximum.reduceat(gain, runs[order].ravel())[::2]
        return torch.from_numpy(out).to(node.device)

    def spans(self, node: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The items in stock below each node, one after the other: the row of the node, and the place of the item in
        `by_sequence`."""
        counts = self._num_items[node].long()
        row = torch.repeat_interleave(torch.arange(len(node), device=node.device), counts)
        shift = self._first_item[node] - (counts.cumsum(0) - counts)
        return row, torch.arange(len(row), device=node.device) + shift[row]

    def _of_model(self, log_prob: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """The model's part of a score; above a leaf, the most that it can be."""
        if self._longest is not None:
            log_prob = log_prob / self._longest[node]
        if self._weight == 1:
            return log_prob
        # Impossible sequences have -inf, and 0 * -inf is no number.
        return self._weight * log_prob if self._weight else torch.zeros_like(log_prob)


class _Reach:
    """Which items a user may be given, and how many below a node: those in stock less the excluded ones, or the allowed
    ones.

    What differs from the stock is kept sparsely: the excluded or allowed items by (user, item), and their counts by
    (user, node) for the nodes above them.
    """

    def __init__(
        self,
        trie: Trie,
        users: int,
        excluded: Sequence[np.ndarray] | None,
        allowed: Sequence[np.ndarray | None] | None,
        device: torch.device,
    ) -> None:
        self._there = trie.on(device, "num_items")
        self.num_users, self._num_items, self._num_nodes = users, len(trie.leaf), trie.num_nodes
        listed = np.zeros(users, dtype=bool)  # users whose sparse items are those allowed, not those excluded
        of_items, of_nodes, counts = ([np.empty(0, dtype=np.int64)] for _ in range(3))
        for user in range(users):
            gone = np.unique(excluded[user]) if excluded is not None else np.empty(0, dtype=np.int64)
            items = gone
            allow = allowed[user] if allowed is not None else None
            if allow is not None:
                listed[user] = True
                items = np.setdiff1d(allow, gone)
            items = items[trie.in_stock[items]] if len(items) else items
            if len(items):
                nodes, below = trie.paths(items)
                of_items.append(user * self._num_items + items)
                of_nodes.append(user * self._num_nodes + nodes)
                counts.append(below)
        self._of_items, self._of_nodes, self._counts = (
            torch.from_numpy(np.concatenate(pieces)).to(device) for pieces in (of_items, of_nodes, counts)
        )
        self._listed = torch.from_numpy(listed).to(device)

    def items(self, user: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Items below each node for the user of the same row: int64."""
        there = self._there[node].long()
        if not len(self._of_nodes):
            return torch.where(self._listed[user], 0, there)
        at, known = _look_up(self._of_nodes, user * self._num_nodes + node)
        counts = torch.where(known, self._counts[at], 0)
        return torch.where(self._listed[user], counts, there - counts)

    def permits(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Whether the user of the same row may be given an item in stock: bool."""
        if not len(self._of_items):
            return ~self._listed[user]
        _, known = _look_up(self._of_items, user * self._num_items + item)
        return known == self._listed[user]

    def permitted_UN(self) -> np.ndarray:
        """Which items in stock each user may be given: bool[U, N], items by position."""
        known = np.zeros((self.num_users, self._num_items), dtype=bool)
        known.flat[self._of_items.cpu().numpy()] = True
        permitted: np.ndarray = known == self._listed.cpu().numpy()[:, None]
        return permitted


def _look_up(keys: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each key stands among ascending `keys`, by bisection, and whether it is there."""
    at = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
    return at, keys[at] == key


def _joined(pieces: Sequence[Prefixes], users: int) -> Prefixes:
    """All prefixes, users ascending."""
    if len(pieces) == 1:
        return pieces[0]
    together = Prefixes(*(torch.cat(columns) for columns in zip(*(vars(p).values() for p in pieces), strict=True)))
    return together.take(torch.argsort(together.user, stable=True))
