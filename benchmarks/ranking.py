"""Ranking a catalogue by a language model: beside transformers' `generate`, teacher forcing, and beams of our own.

    python benchmarks/ranking.py decode --titles FILE [--items 4000,50000] [--prompts 64,256] [--users 8] [--rounds 3]
    python benchmarks/ranking.py models --data FOLDER --model NAME=FOLDER ... [--domain D] [--queries 1000] [--k 10]
    python benchmarks/ranking.py grow   --model FOLDER --domain D --data FOLDER [--items 1000,10000,100000]
    python benchmarks/ranking.py codes  [--items 12000] [--users 16] [--steps 100,400] [--rounds 3]

`decode`, a random model of 10 M parameters: the ten best of a beam of 10 by `generate` with a trie as
`prefix_allowed_tokens_fn` and by ours (users a second, equal lists and scores, time to that of the prompts), one
constraint step of each (mask and choice), the score of every title by our passes to teacher forcing of each, and a user
who comes back. FILE has one title a line; without it titles are generated. `models`, trained models on the test queries
of a data folder: exact search and beams of 10, 20 and 50 on the same queries (metrics, CPU time, prefixes read, share
of the exact list, distinct scores among the K best). `grow`: prefixes read and time as the catalogue grows by generated
titles, and as K does, trained and random. `codes`: items as four codes of 256, the ten best by an exact search and by a
beam of 20, of a decoder with TIGER's sizes: before training, where all codes are about as likely and a proof would have
to read most prefixes (it ends after 2,000), with uneven random weights, and on the way of a short training on generated
histories, which makes proofs cheaper as it makes probabilities sharper.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.search.attention import PromptTree
from cprec.search.cache import PrefixCache
from cprec.search.decoding import search
from cprec.search.scoring import score_candidates
from cprec.search.trie import Trie, sort_sequences
from cprec.systems.batches import Passes
from cprec.systems.codes import ItemCodes, fitted
from cprec.systems.generator import CodeStream, decoder
from cprec.systems.signals import TrainingSequences
from cprec.train.loss import PackedLoss

VOCABULARY, END, LONGEST = 8192, 1, 12


def median_of(rounds: int, *runs: Callable[[], Any]) -> list[float]:
    """Median seconds of each, in turn, after one run to warm up."""
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for times, run in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def read_titles(path: str | None) -> list[str]:
    if path:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    random = np.random.default_rng(0)
    words = [
        "".join(chr(97 + letter) for letter in random.integers(0, 26, size)) for size in random.integers(3, 9, 3000)
    ]
    rank = 1 / np.arange(1, 3001)
    return [" ".join(random.choice(words, random.integers(2, 7), p=rank / rank.sum())) for _ in range(4000)]


def tokenized(titles: Sequence[str]) -> list[tuple[int, ...]]:
    """Distinct titles of at most 12 tokens, each closed."""
    from cprec.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(titles, VOCABULARY)
    rows = tokenizer([" " + title for title in titles])["input_ids"]
    return sorted({(*(token for token in row[:LONGEST] if token != END), END) for row in rows})


def grown(titles: list[tuple[int, ...]], number: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Titles added until there are so many, which begin as known ones do, like sequels and variants."""
    random = np.random.default_rng(0)
    if len(titles) >= number:
        return [titles[row] for row in np.sort(random.permutation(len(titles))[:number])]
    known, base = set(titles), [title[:-1] for title in titles]
    while len(known) < number:
        title = base[random.integers(len(base))]
        cut = random.integers(1, len(title) + 1)
        rest = random.integers(2, vocabulary, random.integers(1, 6)).tolist()
        known.add((*[*title[:cut], *rest][:LONGEST], END))
    return sorted(known)


# ---- beside transformers ---------------------------------------------------------------------------------------------


def random_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        initializer_range=0.08,  # probabilities as uneven as a trained model's
    )
    return LlamaForCausalLM(config).eval()


class DictTrie:
    """The children of each prefix, as people write it for `prefix_allowed_tokens_fn`."""

    def __init__(self, titles: Sequence[Sequence[int]]) -> None:
        self._root: dict[int, Any] = {}
        for title in titles:
            node = self._root
            for token in title:
                node = node.setdefault(token, {})

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        node = self._root
        for token in prefix:
            if token not in node:
                return [0]
            node = node[token]
        return list(node) or [0]


def decode(args: argparse.Namespace) -> None:
    from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

    model, titles = random_model(), tokenized(read_titles(args.titles))
    beams, users = 10, args.users
    print(
        f"{torch.get_num_threads()} threads, {users} users, {beams} beams, medians of {args.rounds} interleaved rounds"
    )
    for number in map(int, args.items.split(",")):
        some = grown(titles, number, VOCABULARY)
        start = time.perf_counter()
        trie = Trie.build(Ragged.of(some))
        seconds = time.perf_counter() - start
        nested = DictTrie(some)
        print(f"\n{number:,} items, {trie.num_nodes:,} nodes, built at {number / seconds / 1e6:.2f} M items/s")
        for length in map(int, args.prompts.split(",")):
            ids = torch.randint(2, VOCABULARY, (users, length), generator=torch.Generator().manual_seed(1))
            prompts = list(ids.numpy())
            found: dict[str, Any] = {}

            def allowed(_: int, row: Any, nested: DictTrie = nested, length: int = length) -> list[int]:
                return nested.allowed(row[length:].tolist())

            def theirs(ids: Any = ids, allowed: Any = allowed, found: dict[str, Any] = found) -> None:
                found["hf"] = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    num_beams=beams,
                    num_return_sequences=beams,
                    max_new_tokens=LONGEST + 2,
                    do_sample=False,
                    length_penalty=0.0,
                    early_stopping="never",
                    prefix_allowed_tokens_fn=allowed,
                    return_dict_in_generate=True,
                    output_scores=True,
                )

            def ours(prompts: Any = prompts, found: dict[str, Any] = found, trie: Trie = trie) -> None:
                found["ours"] = search(PromptTree(model, prompts), trie, k=10, width=beams, exact=False)

            hf, mine, prefill = median_of(args.rounds, theirs, ours, lambda prompts=prompts: PromptTree(model, prompts))
            place = {title[:-1]: row for row, title in enumerate(some)}
            rows = found["hf"].sequences[:, length:].view(users, beams, -1).tolist()
            lists = [[place.get(tuple(t for t in row if t > 1), -1) for row in user] for user in rows]
            scores = found["hf"].sequences_scores.view(users, beams).numpy()
            same = sum(theirs == mine.items[:10].tolist() for theirs, mine in zip(lists, found["ours"], strict=True))
            better = sum(f.scores[9] > s[9] + 1e-4 for f, s in zip(found["ours"], scores, strict=True))
            worse = sum(f.scores[9] < s[9] - 1e-4 for f, s in zip(found["ours"], scores, strict=True))
            error = max(np.abs(f.scores[:10] - s).max() for f, s in zip(found["ours"], scores, strict=True))
            print(
                f"  prompt {length}: generate {users / hf:.2f} users/s, ours {users / mine:.2f} ({hf / mine:.1f}x), "
                f"{mine / prefill:.2f}x the prefill alone; lists equal for {same} of {users} users, ours better for "
                f"{better} and worse for {worse}; largest score difference {error:.1e}"
            )
        rows = beams * users
        ids = torch.randint(2, VOCABULARY, (users, 64), generator=torch.Generator().manual_seed(1))
        nodes = torch.from_numpy(np.random.default_rng(0).integers(1, trie.first_child[1], rows))
        first = trie.on(torch.device("cpu"), "token")[nodes].long()
        logits = torch.randn(rows, VOCABULARY)
        processor = PrefixConstrainedLogitsProcessor(lambda _, row, n=nested: n.allowed(row[64:].tolist()), beams)
        ids = torch.cat([ids.repeat_interleave(beams, 0), first[:, None]], 1)
        begin, token = trie.on(torch.device("cpu"), "first_child"), trie.on(torch.device("cpu"), "token")

        user = torch.arange(users).repeat_interleave(beams)

        def theirs_step(processor: Any = processor, ids: Any = ids, logits: Any = logits) -> Any:
            return (processor(ids, logits) + 0).view(users, -1).topk(2 * beams)

        def our_step(
            nodes: Any = nodes, logits: Any = logits, begin: Any = begin, token: Any = token, user: Any = user
        ) -> Any:
            low = begin[nodes].long()
            counts = begin[nodes + 1] - low
            row = torch.repeat_interleave(torch.arange(len(nodes)), counts)
            column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
            score = logits[row, token[low[row] + column].long()]
            of_user = torch.bincount(user, weights=counts.double()).long()
            grid = torch.full((users, max(int(of_user.max()), 2 * beams)), -torch.inf)
            grid[user[row], torch.arange(len(row)) - (of_user.cumsum(0) - of_user)[user[row]]] = score
            return grid.topk(2 * beams)

        assert torch.equal(theirs_step().values, our_step().values) or bool((our_step().values == -torch.inf).any())
        mask, step = median_of(50, theirs_step, our_step)
        print(f"  one constraint step, {rows} rows: {1e3 * mask:.2f} and {1e3 * step:.3f} ms ({mask / step:.0f}x)")
    prompt = np.random.default_rng(0).integers(2, VOCABULARY, 256)
    some = grown(titles, 4000, VOCABULARY)
    every = Ragged.of(some)
    trie = Trie.build(every.take(sort_sequences(every)))  # sorted, so that prefixes in common are read in one pass
    sample = [some[row] for row in np.linspace(0, len(some) - 1, 16).astype(int)]
    batch = torch.zeros(16, 256 + LONGEST + 1, dtype=torch.long)
    for row, title in enumerate(sample):
        batch[row, : 256 + len(title)] = torch.tensor([*prompt, *title])
    whole, naive = median_of(
        1,
        lambda: score_candidates(PromptTree(model, [prompt]), trie, [np.arange(len(some))]),
        lambda: model(batch).logits.log_softmax(-1),
    )
    naive *= len(some) / 16
    print(
        f"\nlog-probability of all {len(some):,} titles, prompt 256: {whole:.2f} s; each forced {naive:.0f} s "
        f"(from 16 of them): {naive / whole:.1f}x"
    )
    back = [np.random.default_rng(row).integers(2, VOCABULARY, 256) for row in range(users)]
    cache = PrefixCache(1 << 30)
    PromptTree(model, [row[:230] for row in back], cache=cache)
    fresh, again = median_of(
        args.rounds, lambda: PromptTree(model, back), lambda: PromptTree(model, back, cache=_copy(cache))
    )
    print(f"a user who comes back with 26 of 256 tokens new: prompts read {fresh / again:.1f}x as fast")


def _copy(cache: PrefixCache) -> PrefixCache:
    """A cache with the same entries, so that no round finds what the one before has put there."""
    copy = PrefixCache(cache.max_bytes)
    copy._entries, copy._owner = cache._entries.copy(), dict(cache._owner)
    copy.num_bytes = cache.num_bytes
    return copy


# ---- trained models --------------------------------------------------------------------------------------------------


def models(args: argparse.Namespace) -> None:
    from cprec.evaluate.questions import read_queries
    from cprec.evaluate.statistics import bootstrap_interval
    from cprec.rank.llm import LLMRecommender
    from cprec.ranks import count_rankings, ndcg, recall
    from cprec.schema import TEST

    questions = read_queries(args.data, args.domain, TEST, max_queries=args.queries)
    queries = [replace(query, exclude=query.uncounted, uncounted=frozenset()) for query in questions.queries]
    print(f"{args.domain}, {len(queries):,} queries, K = {args.k}, {torch.get_num_threads()} threads")
    for name, folder in (text.split("=", 1) for text in args.model):
        print(
            f"\n{name}\n{'':10} NDCG   Recall    CPU ms  prefixes  proven  of exact list  mean gap  scores   NDCG less "
            "exact's"
        )
        exact: dict[str, set[str]] = {}
        true_gain = np.zeros(0)
        for mode, width in (("exact", 0), ("beam", 10), ("beam", 20), ("beam", 50)):
            recommender = LLMRecommender.from_pretrained(folder, mode=mode, beam_width=max(width, 1))
            recommender.rank(queries[:8], args.k)
            start = time.process_time()  # of all threads: other programs on the machine do not count
            rankings = recommender.rank(queries, args.k)
            seconds = time.process_time() - start
            better, tied = count_rankings(rankings, questions.target)
            gain = ndcg(better, tied, args.k)
            if mode == "exact":
                true_gain = gain
                exact = {ranking.query_id: set(ranking.item_ids) for ranking in rankings}
            share = np.mean([len(exact[r.query_id] & set(r.item_ids)) / len(exact[r.query_id]) for r in rankings])
            proofs = [ranking.proof for ranking in rankings]
            distinct = np.mean([len(set(ranking.scores[: args.k])) for ranking in rankings])
            print(
                f"{mode if mode == 'exact' else f'beam {width}':9} {ndcg(better, tied, args.k).mean():7.4f} "
                f"{recall(better, tied, args.k).mean():7.4f} {1e3 * seconds / len(rankings):8.1f} "
                f"{np.mean([p.expanded for p in proofs]):9.0f} {np.mean([p.exact for p in proofs]):7.1%} "
                f"{share:12.1%} {np.mean([p.gap for p in proofs]):10.2f} {distinct:7.1f}"
                + "   {:+.4f} ({:+.4f} to {:+.4f})".format(*bootstrap_interval(gain - true_gain, seed=0))
            )


def grow(args: argparse.Namespace) -> None:
    from cprec.evaluate.questions import read_queries
    from cprec.models import tiny_model
    from cprec.rank.llm import LLMRecommender
    from cprec.schema import TEST

    recommender = LLMRecommender.from_pretrained(args.model)
    questions = read_queries(args.data, args.domain, TEST, max_queries=args.queries)
    prompts = recommender.prompts.of(questions.queries)
    rows = recommender.prompts.encoder.titles(recommender.catalogue.rows_of(args.domain), end=True)
    titles = sorted({tuple(rows[row].tolist()) for row in range(len(rows))})
    trained = recommender.reader.model
    untrained = tiny_model(
        trained.config.vocab_size, hidden_size=192, num_hidden_layers=3, num_attention_heads=4
    ).eval()
    print(f"{len(questions.queries)} users, {torch.get_num_threads()} threads; prefixes read and ms a user, exact")
    for number in map(int, args.items.split(",")):
        larger = Trie.build(Ragged.of(grown(titles, number, trained.config.vocab_size)))
        for k in (1, 10, 50) if number == 10_000 else (10,):
            for name, model in (("trained", trained), ("random", untrained)):
                start, expanded = time.perf_counter(), []
                if name == "random" and number > 10_000:
                    continue
                users = range(0, len(prompts), 16) if name == "trained" else range(0, 4, 4)
                asked = 0
                for first in users:
                    batch = [
                        prompts[row]
                        for row in range(first, min(first + (16 if name == "trained" else 4), len(prompts)))
                    ]
                    asked += len(batch)
                    with torch.inference_mode():
                        found = search(PromptTree(model, batch), larger, k=k, width=max(k, 8))
                    expanded += [f.expanded for f in found]
                seconds = (time.perf_counter() - start) / asked
                print(
                    f"{number:>9,} items, K = {k:2}, {name:7}: {np.mean(expanded):7.0f} prefixes of "
                    f"{larger.num_nodes:,} (90 %: {np.quantile(expanded, 0.9):.0f}), {1e3 * seconds:.0f} ms",
                    flush=True,
                )


# ---- codes -----------------------------------------------------------------------------------------------------------


def code_world(num_items: int, num_users: int) -> tuple[TrainingSequences, ItemCodes]:
    """Items in 300 groups, which residual codes of their vectors tell apart, and histories that stay within a group or
    go on to the next one; a few items of each group are popular."""
    random, size = np.random.default_rng(0), 10
    group_N = random.integers(0, 300, num_items)
    vectors = random.normal(size=(300, 32))[group_N] + 0.5 * random.normal(size=(num_items, 32))
    by_group = np.argsort(group_N, kind="stable")
    first, counts = np.searchsorted(group_N[by_group], np.arange(300)), np.bincount(group_N, minlength=300)
    # Each event's group is that of the one before or the next; within a group, chances fall with the number.
    group = (random.integers(0, 300, (num_users, 1)) + (random.random((num_users, size)) < 0.3).cumsum(1)) % 300
    place = (counts[group] * random.random(group.shape) ** 3).astype(np.int64)
    ids = [f"{number:06}" for number in range(num_items)]
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": ids, "title": ids})})
    histories = Ragged.of(by_group[first[group] + place].tolist())
    data = TrainingSequences(catalogue, "shop", histories, tuple(map(str, range(num_users))))
    quantiser = fitted("residual k-means", vectors, num_levels=4, num_codes=256, seed=0)
    return data, ItemCodes.coded(quantiser, vectors, 256, "count")


def codes(args: argparse.Namespace) -> None:
    steps = [0, *map(int, args.steps.split(","))]
    with torch.inference_mode(False):
        data, item_codes = code_world(int(args.items), 4000)
        even, *trained = decoders(data, item_codes, steps)
        uneven = copy.deepcopy(even)
        for weight in uneven.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.08)
    trie = Trie.build(item_codes.sequences)
    num_inner = int((np.diff(trie.first_child) > 0).sum())
    print(
        f"\n{int(args.items):,} items, {trie.num_nodes:,} nodes, {num_inner:,} of them with children; "
        f"{torch.get_num_threads()} threads; the 10 best, medians of {args.rounds} interleaved rounds"
    )
    random = [("random, even", even), ("random, uneven", uneven)]
    for name, model in random + [(f"{number} steps", each) for number, each in zip(steps[1:], trained, strict=True)]:
        users = 1 if (name, model) in random else args.users
        prompts = item_codes.prompts(data.sequences.take(np.arange(users)))
        tree = PromptTree(model, [prompts[row] for row in range(users)])
        found: dict[str, Any] = {}

        def exact(tree: Any = tree, found: dict[str, Any] = found) -> None:
            tree.forget()
            found["exact"] = search(tree, trie, k=10, width=10, max_nodes=args.max_nodes)

        def beam(tree: Any = tree, found: dict[str, Any] = found) -> None:
            tree.forget()
            found["beam"] = search(tree, trie, k=10, width=20, exact=False)

        slow, quick = (seconds / users for seconds in median_of(args.rounds if users > 1 else 1, exact, beam))
        pairs = list(zip(found["exact"], found["beam"], strict=True))
        share = np.mean([len(np.intersect1d(ours.items, other.items)) / len(ours.items) for ours, other in pairs])
        read, of_beam = np.mean([[ours.expanded, other.expanded] for ours, other in pairs], axis=0)
        proven = np.mean([ours.exact for ours, _ in pairs])
        print(
            f"  {name}, {users} users: exact {1e3 * slow:.1f} ms a user, {read:,.0f} prefixes, {proven:.0%} proven; "
            f"beam of 20 {1e3 * quick:.1f} ms, {of_beam:.0f} prefixes, {share:.1%} of the other list; exact is "
            f"{quick / slow:.2f}x as fast",
            flush=True,
        )


def decoders(data: TrainingSequences, item_codes: ItemCodes, steps: Sequence[int]) -> list[Any]:
    """A decoder of TIGER's sizes as it is after so many steps of training, a number that rises."""
    torch.manual_seed(0)
    model = decoder(item_codes, max_length=20, dropout=0.0, hidden_size=128, num_layers=4, num_heads=4)
    loss, passes = PackedLoss(model, bf16=False), Passes(batch_size=32, num_epochs=1000, seed=0, pool=1)
    stream, optimizer = CodeStream(data, item_codes, 20, passes), torch.optim.AdamW(model.parameters())
    found = []
    for step in range(steps[-1] + 1):
        found += [copy.deepcopy(model).eval() for number in steps if number == step]
        batch = stream.batch(step)
        rows = {name: torch.from_numpy(row) for name, row in batch.rows.items()}
        sum(loss.losses(rows).values(), torch.zeros(())).div(sum(batch.counts.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30)
        optimizer.step()
        optimizer.zero_grad()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("decode")
    one.set_defaults(call=decode)
    two = commands.add_parser("models")
    two.add_argument("--model", action="append", required=True)
    two.add_argument("--k", type=int, default=10)
    two.set_defaults(call=models)
    three = commands.add_parser("grow")
    three.add_argument("--model", required=True)
    three.add_argument("--items", default="1000,10000,100000,1000000")
    three.set_defaults(call=grow)
    four = commands.add_parser("codes")
    four.add_argument("--items", default="12000")
    four.add_argument("--users", type=int, default=16)
    four.add_argument("--steps", default="100,400", help="of training, after each of which is measured; they rise")
    four.add_argument("--max-nodes", type=int, default=2000, help="prefixes that an exact search reads at most")
    four.add_argument("--rounds", type=int, default=3)
    four.set_defaults(call=codes)
    for command in (two, three):
        command.add_argument("--data", required=True)
        command.add_argument("--domain", default="scientific")
        command.add_argument("--queries", type=int, default=1000 if command is two else 64)
    for command in (one, parser):
        command.add_argument("--titles")
        command.add_argument("--items", default="4000,50000")
        command.add_argument("--prompts", default="64,256")
        command.add_argument("--users", type=int, default=8)
        command.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with torch.inference_mode():
        getattr(args, "call", decode)(args)


if __name__ == "__main__":
    main()
