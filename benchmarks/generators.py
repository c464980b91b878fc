"""Recommenders that write items as codes: what beams lose, which form of items is worth its cost, and new items.

    python benchmarks/generators.py [--data FOLDER --domain D] [--rows "TIGER,APAO"] [--queries 200] [--epochs E]
                                    [--parts beams,forms,growth] [--new-items 0.1] [--settings JSON] [--folder FOLDER]

`--data` is a folder that `cprec prepare` wrote; without it a small world is generated. The queries are a sample of test
events, full catalogue, items of the history left out. Finished training is kept under `--folder` and used again; all
figures are in a JSON file there. One thread; times are CPU time, searches of 16 queries at once, in turn.

beams    Every generator over codes, trained once: NDCG@10 of exact lists and of beams of 10, 20 and 50; the share of
         the exact ten that each beam finds; of the targets among the exact best B, those that a beam of B loses (more
         than 80 % by arXiv 2601.22925); time; lists that are proven within the prefixes of the settings; and how often
         what the decoder writes without a trie is an item: by the likeliest token at each step, or one drawn by chance.
forms    One decoder and as many passes over codes of titles, over codes of which items stand near each other in
         training events, and over the tokens of titles.
growth   A share of the items is unknown in training, with all their events, and added afterwards: recall@10 of targets
         that are new, among all items and among new ones alone, and of targets that are not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cprec.data.build import build_dataset
from cprec.data.config import Rules, SplitSpec, SyntheticConfig
from cprec.data.dataset import read_dataset, read_split
from cprec.data.queries import ranking_queries, sampled_rows
from cprec.data.ragged import Ragged
from cprec.data.sources.memory import MemorySource
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.data.splits import Split, make_split
from cprec.errors import ConfigError, Unsuitable
from cprec.evaluate.statistics import compare_pair
from cprec.files import write_whole
from cprec.lineup import LINEUP, is_trained, settings_of
from cprec.provenance import code_sha256
from cprec.ranks import count_rankings, ndcg, recall
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import TEST
from cprec.systems.codes import END, FIRST_CODE, PADDING, ItemCodes
from cprec.systems.generator import CodeRecommender
from cprec.systems.recipes.tiger import TIGER, CodeSettings
from cprec.systems.signals import TrainingSequences, padded
from cprec.text.tokenizer import encode_pieces, train_tokenizer

TOP = 10
BEAMS = (10, 20, 50)
BATCH = 16
"""Queries that are searched together; exact lists of many more would keep the states of many prefixes."""
PARTS = ("beams", "forms", "growth")
KITCHEN = "kitchen"
FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "benchmark-generators"
Queries = tuple[list[RankingQuery], list[str]]
"""Queries and their targets."""


# ---- title tokens as an item form ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TitleCodes(ItemCodes):
    """Token sequences of titles. Items of equal titles share a leaf, and its probability evenly."""

    def with_items(self, vectors_ND: np.ndarray) -> TitleCodes:
        """See `ItemCodes.with_items`; here the vector of an item is its sequence, filled up with PADDING."""
        rows = Ragged.of([row[row != PADDING].tolist() for row in vectors_ND])
        return replace(self, sequences=Ragged.concatenate([self.sequences, rows]))

    def take(self, items: np.ndarray) -> TitleCodes:
        """See `ItemCodes.take`."""
        return replace(self, sequences=self.sequences.take(items))


@dataclass(frozen=True, kw_only=True)
class TitleTokens(CodeSettings):
    """TIGER with the tokens of titles in place of codes, of a tokenizer that is trained on the titles."""

    vocabulary_size: int = 2048
    """Tokens of the tokenizer, at most."""
    max_title_tokens: int = 12
    """Tokens of a title that are read, the first ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("vocabulary_size", "max_title_tokens")

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: with the code that this is built on, which the record cannot see from here."""
        return super().identity() | {"code": code_sha256(TIGER.__module__)}

    def codes(self, data: TrainingSequences, seed: int) -> TitleCodes:
        """See `CodeSettings.codes`."""
        tokenizer = train_tokenizer(data.titles, self.vocabulary_size)

        def sequences(titles: Sequence[str], most: int) -> Ragged:
            pieces = encode_pieces(tokenizer, [f" {title}" for title in titles])
            return Ragged.of([[*(FIRST_CODE + token for token in row[:most]), END] for row in pieces])

        known = sequences(data.titles, self.max_title_tokens)
        longest = int(known.lengths.max()) - 1  # the decoder has no room for more
        return TitleCodes(
            known,
            FIRST_CODE + len(tokenizer),
            num_collisions=0,
            collisions="share",
            new_vectors=lambda _, titles: padded(sequences(titles, longest), PADDING)[0],
        )


FORMS: Mapping[str, CodeSettings] = {
    "codes of titles": TIGER(),
    "codes of events": TIGER(of="collaborative"),
    "title tokens": TitleTokens(),
}
CAN_GROW = ("codes of titles", "title tokens")
"""Forms that a new item has as well."""


# ---- what is asked ---------------------------------------------------------------------------------------------------


def generated(folder: Path, num_users: int, num_items: int) -> Split:
    """One domain, kitchen, of a synthetic world."""
    if not (folder / "dataset.json").exists():
        config = SyntheticConfig(num_market_users=num_users, num_library_users=1, items_per_domain=num_items)
        source = MemorySource(KITCHEN, "market", *SyntheticWorld(config).tables()[KITCHEN])
        build_dataset([source], folder, Rules(k_core=0))
    return make_split(*read_dataset(folder), SplitSpec())


def asked_of(split: Split, domain: str, most: int, targets: frozenset[str] | None = None) -> Queries:
    """A sample of the domain's test queries, perhaps of some targets alone. Raises Unsuitable where there are none."""
    asked = split.queries(domain, TEST, max_history=max(1, len(split.interactions)))
    rows = np.arange(len(asked))
    if targets is not None:
        rows = rows[[item in targets for item in split.catalogue.item_id[asked.target]]]
    if not len(rows):
        raise Unsuitable(f"domain {domain!r} has no test query of such a target: choose another domain, or more items")
    return ranking_queries(split, asked, rows[sampled_rows(len(rows), most, seed=0)])


def generators() -> list[str]:
    """The rows of the line-up that write codes."""
    return [name for name in LINEUP if is_trained(name) and isinstance(settings_of(name), CodeSettings)]


def changed(settings: CodeSettings, values: Mapping[str, Any]) -> CodeSettings:
    """Settings with other values. Raises ConfigError for those that they do not have."""
    try:
        return replace(settings, **values)
    except TypeError as error:
        raise ConfigError(f"settings={dict(values)}: {error}") from None


# ---- what is measured ------------------------------------------------------------------------------------------------


def searched(
    made: CodeRecommender, asked: Queries, beams: Sequence[int]
) -> tuple[dict[int, list[Ranking]], list[float]]:
    """The ten best by an exact search (0) and by each beam, and milliseconds of CPU time a query of each."""
    lists: dict[int, list[Ranking]] = {width: [] for width in (0, *beams)}
    seconds = dict.fromkeys(lists, 0.0)
    made.rank(asked[0][:BATCH], TOP, "beam")  # warms up
    for start in range(0, len(asked[0]), BATCH):
        batch = asked[0][start : start + BATCH]
        for width, found in lists.items():
            began = time.process_time()
            found += made.with_beams(width).rank(batch, TOP, "beam") if width else made.rank(batch, TOP, "exact")
            seconds[width] += time.process_time() - began
    return lists, [1e3 * each / len(asked[0]) for each in seconds.values()]


def in_batches(made: CodeRecommender, queries: Sequence[RankingQuery], k: int, mode: str) -> list[Ranking]:
    starts = range(0, len(queries), BATCH)
    return [each for start in starts for each in made.rank(queries[start : start + BATCH], k, mode)]


def losses(made: CodeRecommender, asked: Queries, beams: Sequence[int]) -> list[tuple[int, int]]:
    """For each width B how many targets are among the exact best B, and how many of these the B best of a beam of B do
    not hold. An item tied with the last belongs to a list."""
    queries, targets = asked
    better_Q, tied_Q = count_rankings(in_batches(made, queries, max(beams), "exact"), targets)
    out = []
    for width in beams:
        found = in_batches(made.with_beams(width), queries, width, "beam")
        is_found_Q = np.array([target in ranking.item_ids for target, ranking in zip(targets, found, strict=True)])
        among_Q = (tied_Q > 0) & (better_Q < width)
        out.append((int(among_Q.sum()), int((among_Q & ~is_found_Q).sum())))
    return out


def valid_share(made: CodeRecommender, queries: Sequence[RankingQuery], seed: int | None) -> float:
    """How often what the decoder writes after a history without a trie is an item's sequence: the likeliest token at
    each step, or with a seed one drawn by its chance among all tokens, whatever the softmax of the rankings is. A trace
    that comes before is not counted."""
    sequences = made._codes.sequences
    known = {(*sequences[item].tolist()[:-1], END) for item in range(len(sequences))}  # COBRA's END says which item
    prompts = made._prompts(queries)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    num_valid = 0
    for start in range(0, len(queries), BATCH):
        members = range(start, min(start + BATCH, len(queries)))
        with torch.inference_mode():
            rows = written(
                made._reader.read([prompts[row] for row in members]), int(sequences.lengths.max()), generator
            )
        num_valid += sum(tuple(row) in known for row in rows)
    return num_valid / len(queries)


def written(tree: Any, longest: int, generator: torch.Generator | None) -> list[list[int]]:
    """The tokens that are written after each prompt of a tree, up to END or `longest` of them."""
    rows: list[list[int]] = [[] for _ in range(tree.num_users)]
    going = torch.arange(tree.num_users)  # prompts that nothing has ended yet
    parents, hidden = torch.full_like(going, -1), tree.prompt_hidden_UD
    for _ in range(longest):
        if generator is None:
            token = tree.likeliest(hidden)
        else:
            token = torch.multinomial(tree.logits(hidden).softmax(-1), 1, generator=generator)[:, 0]
        for user, each in zip(going.tolist(), token.tolist(), strict=True):
            rows[user].append(each)
        goes_on = token != END
        going, first = going[goes_on], tree.num_nodes
        if not len(going):
            break
        hidden = tree.extend(token[goes_on], going, parents[goes_on])
        parents = first + torch.arange(len(going))
    return rows


def gains(rankings: Sequence[Ranking], targets: Sequence[str]) -> np.ndarray:
    """NDCG@10 of each query."""
    return ndcg(*count_rankings(rankings, targets), TOP)


# ---- the three parts -------------------------------------------------------------------------------------------------


def beam_row(made: CodeRecommender, max_nodes: int, asked: Queries) -> dict[str, Any]:
    """The figures of a generator."""
    queries, targets = asked
    lists, milliseconds = searched(made, asked, BEAMS)
    best = [set(ranking.item_ids) for ranking in lists[0]]
    read = [ranking.proof.expanded for ranking in lists[0] if ranking.proof]
    return {
        "ndcg@10": [float(gains(found, targets).mean()) for found in lists.values()],
        "found": [
            float(np.mean([len(b & set(r.item_ids)) / len(b) for b, r in zip(best, lists[width], strict=True)]))
            for width in BEAMS
        ],
        "lost": losses(made, asked, BEAMS),
        "milliseconds": milliseconds,
        "prefixes": float(np.mean(read)),
        "proven": float(np.mean(np.array(read) <= max_nodes)),
        "valid": [valid_share(made, queries, seed) for seed in (None, 0)],
        "parameters": made.num_parameters,
        "training_seconds": made.seconds,
    }


def show_beams(name: str, row: Mapping[str, Any]) -> None:
    """A line of the table."""
    exact, *of_beams = row["ndcg@10"]
    lost = [f"{lost / among if among else 0:.1%} of {among}" for among, lost in row["lost"]]
    cells = [
        *(name, f"{exact:.4f}", joined(of_beams, ".4f"), joined(row["found"], ".1%"), " / ".join(lost)),
        *(f"{row['milliseconds'][0]:.1f}", joined(row["milliseconds"][1:], ".1f"), f"{row['prefixes']:.0f}"),
        *(f"{row['proven']:.1%}", joined(row["valid"], ".1%")),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def joined(values: Sequence[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def head(*names: str) -> None:
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)


def beam_ratios(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Ratios of beams to exact lists, and all that beams lose."""
    print()
    for name, row in rows.items():
        exact = row["milliseconds"][0]
        times = joined([exact / each for each in row["milliseconds"][1:]], ".2f")
        quality = joined([each / row["ndcg@10"][0] if row["ndcg@10"][0] else 1.0 for each in row["ndcg@10"][1:]], ".3f")
        print(f"{name}: exact lists take {times} times as long as the beams, whose NDCG@10 is {quality} of theirs")
    for number, width in enumerate(BEAMS):
        among, lost = (sum(row["lost"][number][which] for row in rows.values()) for which in (0, 1))
        share = lost / among if among else 0.0
        print(f"a beam of {width} loses {lost:,} of {among:,} targets among the exact {width} best, {share:.1%}")


@dataclass(frozen=True)
class Benchmark:
    """One domain, and how its generators are trained."""

    split: Split
    domain: str
    folder: Path
    values: Mapping[str, Any]
    """Settings of all rows."""
    num_queries: int
    seed: int

    def made(self, settings: CodeSettings, split: Split | None = None) -> CodeRecommender:
        """A trained generator."""
        found = changed(settings, self.values).make(
            split or self.split, self.domain, seed=self.seed, folder=self.folder / "trained"
        )
        if not isinstance(found, CodeRecommender):
            raise Unsuitable(f"{found.name} is not searched by codes alone")
        return found

    def beams(self, names: Sequence[str]) -> dict[str, Any]:
        """What beams lose, for each of these rows."""
        asked, rows = asked_of(self.split, self.domain, self.num_queries), {}
        print(f"\n{self.domain}, {len(asked[0]):,} test queries; beams of {' / '.join(map(str, BEAMS))}\n")
        head(
            *("generator", "NDCG@10, exact", "of beams", "of the exact ten", "targets of the exact best B lost"),
            *("ms, exact", "of beams", "prefixes, exact", "proven", "written and valid, likeliest / drawn"),
        )
        for name in names:
            settings = settings_of(name)
            assert isinstance(settings, CodeSettings)
            try:
                made = self.made(settings)
            except Unsuitable as error:
                print(f"| {name} | left out: {error} |", flush=True)
                continue
            rows[name] = beam_row(made, changed(settings, self.values).max_nodes, asked)
            show_beams(name, rows[name])
        beam_ratios(rows)
        return rows

    def forms(self) -> dict[str, Any]:
        """What each form of items is worth."""
        asked, rows, of_query = asked_of(self.split, self.domain, self.num_queries), {}, {}
        print(f"\n{self.domain}, {len(asked[0]):,} test queries; exact lists\n")
        head("item", "NDCG@10", "parameters", "tokens an item", "ms, exact / beam of 20", "training, s")
        for name, settings in FORMS.items():
            made = self.made(settings)
            lists, milliseconds = searched(made, asked, (20,))
            of_query[name] = gains(lists[0], asked[1])
            rows[name] = row = {
                "ndcg@10": float(of_query[name].mean()),
                "parameters": made.num_parameters,
                "tokens": float(made._codes.sequences.lengths.mean()),
                "milliseconds": milliseconds,
                "training_seconds": made.seconds,
            }
            cells = (
                f"{row['ndcg@10']:.4f} | {row['parameters']:,} | {row['tokens']:.1f} | {joined(milliseconds, '.1f')}"
            )
            print(f"| {name} | {cells} | {row['training_seconds']:.0f} |", flush=True)
        print()
        first, *others = FORMS
        for name in others:
            test = compare_pair(of_query[name], of_query[first], seed=0)
            rows[name]["difference"] = [test.mean, test.low, test.high]
            tokens, exact = (rows[name][what] / rows[first][what] for what in ("tokens", "training_seconds"))
            times = rows[name]["milliseconds"][0] / rows[first]["milliseconds"][0]
            print(
                f"{name} beside {first}: NDCG@10 {test.mean:+.4f} ({test.low:+.4f} to {test.high:+.4f}), for "
                f"{tokens:.2f} times the tokens, {exact:.2f} times the training and {times:.2f} times the time a query"
            )
        return rows

    def growth(self, share: float) -> dict[str, Any]:
        """How well new items are found, a share of all."""
        known, new = without_items(self.split, self.domain, share, self.seed)
        every = frozenset(self.split.catalogue.item_id[self.split.catalogue.rows_of(self.domain)])
        of_new, of_old = (
            asked_of(self.split, self.domain, self.num_queries, targets) for targets in (new, every - new)
        )
        alone = [replace(query, allow=new) for query in of_new[0]]
        print(
            f"\n{self.domain}, {len(new):,} of {len(every):,} items new; {len(of_new[0]):,} test queries of new "
            f"targets and {len(of_old[0]):,} of others; recall@10\n"
        )
        head("item", "new", "others", "new, if learnt", "new among new ones", "new ones in the lists")
        rows = {}
        for name in CAN_GROW:
            whole = self.made(FORMS[name])
            grown = self.made(FORMS[name], known).with_items(self.split.catalogue)
            lists = {
                "new": in_batches(grown, of_new[0], TOP, "auto"),
                "others": in_batches(grown, of_old[0], TOP, "auto"),
                "learnt": in_batches(whole, of_new[0], TOP, "auto"),
                "alone": in_batches(grown, alone, TOP, "auto"),
            }
            row = {
                what: float(recall(*count_rankings(found, (of_old if what == "others" else of_new)[1]), TOP).mean())
                for what, found in lists.items()
            }
            returned = [
                item for what in ("new", "others") for ranking in lists[what] for item in ranking.item_ids[:TOP]
            ]
            rows[name] = row | {"share_of_lists": float(np.mean([item in new for item in returned]))}
            print(f"| {name} | {' | '.join(format(value, '.4f') for value in rows[name].values())} |", flush=True)
        rows["chance"] = dict.fromkeys(("new", "others", "learnt"), min(1.0, TOP / len(every)))
        rows["chance"] |= {"alone": min(1.0, TOP / len(new)), "share_of_lists": len(new) / len(every)}
        print(f"| chance | {' | '.join(format(value, '.4f') for value in rows['chance'].values())} |\n", flush=True)
        for name in CAN_GROW:
            ratio = rows[name]["new"] / rows[name]["others"] if rows[name]["others"] else 0.0
            print(f"{name}: new targets are found {ratio:.2f} times as often as others")
        return rows


def without_items(split: Split, domain: str, share: float, seed: int) -> tuple[Split, frozenset[str]]:
    """The split without a seeded sample of a domain's items and without all their events, and the ids of these."""
    catalogue, log, rows = split.catalogue, split.interactions, split.catalogue.rows_of(domain)
    gone = np.random.default_rng(seed).permutation(rows)[: round(share * len(rows))]
    kept = np.ones(len(catalogue), dtype=bool)
    kept[gone] = False
    columns = ("domain", "item_id", "title", "brand", "categories")
    event, place = kept[log.item], np.cumsum(kept) - 1
    known = replace(
        split,
        catalogue=replace(catalogue, **{name: getattr(catalogue, name)[kept] for name in columns}),
        interactions=replace(log.select(event), item=place[log.item[event]]),
        part=split.part[event],
    )
    return known, frozenset(map(str, catalogue.item_id[gone]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--domain", default=KITCHEN)
    parser.add_argument("--users", type=int, default=600, help="of the world, where there are no data")
    parser.add_argument("--items", type=int, default=200, help="of the world")
    parser.add_argument("--rows", default="", help="generators; all by default")
    parser.add_argument("--queries", type=int, default=200, help="at most; 0: all")
    parser.add_argument("--epochs", type=float, help="passes of each training; those of the settings by default")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--new-items", type=float, default=0.1)
    parser.add_argument("--settings", type=json.loads, default={}, help='of all rows, as {"num_layers": 2}')
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    names = [name.strip() for name in asked.rows.split(",") if name.strip()] or generators()
    if unknown := sorted(set(names) - set(generators())):
        parser.error(f"--rows: {unknown[0]!r} is none of {', '.join(generators())}")
    parts = asked.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if not 0 < asked.new_items < 1:
        parser.error(f"--new-items={asked.new_items} must lie between 0 and 1")
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    world = asked.folder / f"world-{asked.users}-{asked.items}"
    split = read_split(asked.data) if asked.data else generated(world, asked.users, asked.items)
    values = asked.settings | ({} if asked.epochs is None else {"num_epochs": asked.epochs})
    benchmark = Benchmark(split, asked.domain, asked.folder, values, asked.queries, asked.seed)
    calls = {
        "beams": lambda: benchmark.beams(names),
        "forms": benchmark.forms,
        "growth": lambda: benchmark.growth(asked.new_items),
    }
    path = asked.folder / f"{asked.domain}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}  # of parts that were asked for before
    for part in parts:
        results[part] = {"asked": {name: str(value) for name, value in vars(asked).items()}, "rows": calls[part]()}
        write_whole(path, json.dumps(results, indent=1) + "\n")
    print(f"\nall figures: {path}")


if __name__ == "__main__":
    main()
