"""Exact ranking with priors of items: time and prefixes read, with them and without, in turn.

    python benchmarks/blending.py [--items 50000] [--queries 16] [--k 10] [--linked 200] [--floor 0.001] [--rounds 3]
                                  [--steps 300]

A small model learns histories of generated titles, of which few are popular and most are rare, for `steps` steps, and
ranks the catalogue after others. The priors are as those of a walk on a graph of transitions: per query `linked` items,
whose shares of the best fall as 1, 1/2, 1/3 and so on, and a floor for all others. The linked items are drawn evenly
(nothing ties them to what the model holds likely), or by popularity (as where the two agree). The time is that of
prompts and search, all that priors cost in it included, but not their making.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from ranking import END, grown, median_of

from cprec.data.ragged import Ragged
from cprec.models import tiny_model
from cprec.search.attention import PromptTree
from cprec.search.decoding import Found, search
from cprec.search.priors import Priors
from cprec.search.trie import Trie

VOCABULARY, LENGTH = 1024, 64


def histories(titles: list[tuple[int, ...]], share: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Titles one after the other, cut to rows of `LENGTH` tokens."""
    rows = random.choice(len(titles), (number, LENGTH // 2), p=share)
    return np.array([[token for item in row for token in titles[item]][:LENGTH] for row in rows])


def trained(
    titles: list[tuple[int, ...]], share: np.ndarray, steps: int, random: np.random.Generator
) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_model(VOCABULARY, hidden_size=128, num_hidden_layers=3, num_attention_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = torch.from_numpy(histories(titles, share, 32, random))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.2f} after {steps} steps")
    return model.eval()


def walk_like(linked_UL: np.ndarray, num_items: int, floor: float) -> Priors:
    """The log of linked items' shares, 1, 1/2, 1/3 and so on, and of the floor for all others."""
    values_UN = np.full((len(linked_UL), num_items), np.log(floor))
    shares = np.maximum(1 / np.arange(1, linked_UL.shape[1] + 1), floor)
    np.put_along_axis(values_UN, linked_UL, np.broadcast_to(np.log(shares), linked_UL.shape), axis=1)
    return Priors(values_UN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--linked", type=int, default=200)
    parser.add_argument("--floor", type=float, default=0.001)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    random = np.random.default_rng(0)
    words = [
        tuple(row[: random.integers(2, 7)]) for row in (random.zipf(1.3, (4000, 6)) % (VOCABULARY - 2) + 2).tolist()
    ]
    titles = grown(sorted({(*row, END) for row in words}), args.items, VOCABULARY)
    share = random.permutation(1 / np.arange(10, args.items + 10))
    share /= share.sum()
    trie = Trie.build(Ragged.of(titles))
    model = trained(titles, share, args.steps, random)
    prompts = [row[: np.flatnonzero(row == END)[-1] + 1] for row in histories(titles, share, args.queries, random)]
    print(
        f"{args.items:,} items, {trie.num_nodes:,} nodes, {args.queries} queries, K = {args.k}, {args.linked} linked "
        f"items a query, floor {args.floor}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds"
    )

    @torch.inference_mode()
    def run(priors: Priors | None) -> list[Found]:
        return search(PromptTree(model, prompts), trie, k=args.k, width=max(args.k, 8), priors=priors)

    given: dict[str, Priors | None] = {"without priors": None}
    for name, chance in (("linked evenly", None), ("linked by popularity", share)):
        linked = [random.choice(args.items, args.linked, replace=False, p=chance) for _ in prompts]
        given[name] = walk_like(np.stack(linked), args.items, args.floor)
    seconds = median_of(args.rounds, *(lambda one=one: run(one) for one in given.values()))
    for (name, one), taken in zip(given.items(), seconds, strict=True):
        found = run(one)
        print(
            f"{name:20} {1e3 * taken / args.queries:7.1f} ms a query ({taken / seconds[0]:.2f}x), "
            f"{np.mean([f.expanded for f in found]):6.0f} prefixes, {np.mean([f.exact for f in found]):.0%} proven"
        )


if __name__ == "__main__":
    main()
