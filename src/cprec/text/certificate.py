"""The leakage certificate of a data folder: made from what stands on disk, not from the code that wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cprec.data.dataset import read_split
from cprec.data.leakage import Grammar, Property, check_absent, check_documents, check_heads, read_events, title_numbers
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.provenance import file_sha256, read_resolved
from cprec.schema import MIXED, TEST, TRAIN, VALIDATION
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import Shards, open_shards
from cprec.text.tokenizer import load_tokenizer

CERTIFICATE = "certificate.json"


def audit(folder: str | Path) -> dict[str, Any]:
    """Check what stands in a data folder, write `certificate.json` and return it.

    Everything is read back from disk: the canonical tables and their split, and the tokens of every shard and example.
    """

    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise ConfigError(f"{folder} is no data folder: give one that `cprec prepare` wrote")
    recorded = read_resolved(folder)["config"]
    split = read_split(folder)
    catalogue = split.catalogue
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    encoder = PromptEncoder(tokenizer, catalogue, max_title_tokens=recorded["max_title_tokens"])
    seen = tuple(recorded["pretrain_domains"]) or catalogue.domains
    auditor = _Auditor(split, encoder)
    properties, artifacts = [], {}
    for name in ("shards/train", "shards/heldout"):
        shards = open_shards(folder / name)
        artifacts[name] = shards.sha256
        properties += auditor.check(name, shards, per_document=False)
        unseen = [domain for domain in recorded["target_domains"] if domain not in seen]
        properties += auditor.check_unseen(name, shards, seen, unseen)
    for domain in recorded["target_domains"]:
        name = f"examples/{domain}/train"
        shards = open_shards(folder / name)
        artifacts[name] = shards.sha256
        properties += auditor.check(name, shards, per_document=True)
    queries = {}
    for domain in recorded["target_domains"]:
        for part in (VALIDATION, TEST):
            path = folder / "queries" / domain / f"{part}.parquet"
            queries[f"{domain}/{part}"] = file_sha256(path)
            properties.append(auditor.check_queries(domain, part, path))
    certificate = {
        "clean": all(p.violations == 0 for p in properties),
        "split": asdict(split.spec),
        "properties": [p.to_dict() for p in properties],
        "artifacts": artifacts,
        "queries": queries,
        "catalogue_sha256": catalogue.digest(),
    }
    temporary = folder / (CERTIFICATE + ".incomplete")
    temporary.write_text(json.dumps(certificate, indent=1) + "\n")
    temporary.replace(folder / CERTIFICATE)
    checked = sum(p.checked for p in properties)
    wrong = sum(p.violations for p in properties)
    say(f"certificate: {len(properties)} properties, {checked:,} checks, {wrong:,} violations")
    return certificate


class _Auditor:
    """Holds the log and the grammar of documents while several shards are checked."""

    def __init__(self, split: Split, encoder: PromptEncoder) -> None:

        catalogue, log = split.catalogue, split.interactions
        self._split, self._catalogue = split, catalogue
        self._grammar = Grammar(
            heads=encoder.heads(),
            line=encoder.line_tokens,
            next=encoder.next_tokens,
            eos=encoder.eos_id,
            tags=Ragged.of([encoder.tag_tokens(number) for number in range(len(catalogue.domains))]),
            titles=encoder.titles(np.arange(len(catalogue))),
            domain=catalogue.domain,
        )
        self._title_of_row, _, _ = title_numbers(self._grammar)
        self._user_row = {
            (log.platforms[platform], user): row
            for row, (platform, user) in enumerate(zip(log.user_platform, log.user_id, strict=True))
        }
        self._title = self._title_of_row[log.item]
        self._train = split.events(TRAIN)

    def check(self, name: str, shards: Shards, *, per_document: bool) -> list[Property]:

        log = self._split.interactions
        domain = self._document_domain(shards)
        events = read_events(shards.rows, domain, self._grammar)
        heads = check_heads(name, shards.rows, domain, self._grammar)
        return [
            heads,
            *check_documents(
                name,
                events,
                len(shards),
                self._document_user(shards),
                log.user[self._train],
                self._title[self._train],
                log.user[~self._train],
                self._title[~self._train],
                per_document=per_document,
                group=(shards.column("kind") == MIXED).astype(int),
            ),
        ]

    def check_unseen(self, name: str, shards: Shards, seen: tuple[str, ...], unseen: list[str]) -> list[Property]:
        """No item of an unseen domain, and no user tested in one."""

        log, catalogue = self._split.interactions, self._catalogue
        numbers = [catalogue.domains.index(domain) for domain in unseen]
        rows = np.flatnonzero(np.isin(catalogue.domain, numbers))
        tested = ~self._train & np.isin(catalogue.domain[log.item], numbers)
        events = read_events(shards.rows, self._document_domain(shards), self._grammar)
        titles = {int(number): str(catalogue.title[row]) for row, number in enumerate(self._title_of_row)}
        label = ", ".join(unseen) or "none"
        return [
            check_absent(
                f"{name}: no item of an unseen domain ({label})", events.title, self._title_of_row[rows], titles
            ),
            check_absent(
                f"{name}: no user tested in an unseen domain ({label})",
                self._document_user(shards),
                np.unique(log.user[tested]),
                {row: str(user) for row, user in enumerate(log.user_id)},
            ),
        ]

    def check_queries(self, domain: str, part: str, path: Path) -> Property:
        """No query shows its own target, unless the user's earlier events have that item too."""
        log, catalogue = self._split.interactions, self._catalogue
        known = self._train if part == VALIDATION else ~self._split.events(TEST)
        earlier = set(zip(log.user[known].tolist(), log.item[known].tolist(), strict=True))
        wrong, table = [], pq.read_table(path)
        for row in table.to_pylist():
            user = self._user_row[row["platform"], row["user_id"]]
            shown = any(
                d == domain and i == row["target"]
                for d, i in zip(row["history_domain"], row["history_item"], strict=True)
            )
            if shown and (user, int(catalogue.find(domain, [row["target"]])[0])) not in earlier:
                wrong.append(row["query_id"])
        return Property(
            name=f"queries/{domain}/{part}: no query shows its own target event",
            checked=table.num_rows,
            violations=len(wrong),
            examples=wrong[:5],
        )

    def _document_domain(self, shards: Shards) -> np.ndarray:

        number = {name: index for index, name in enumerate(self._catalogue.domains)}
        mixed = shards.column("kind") == MIXED
        return np.array(
            [-1 if m else number[d] for m, d in zip(mixed, shards.column("domain"), strict=True)], dtype=int
        )

    def _document_user(self, shards: Shards) -> np.ndarray:

        pairs = zip(shards.column("platform"), shards.column("user_id"), strict=True)
        return np.array([self._user_row[pair] for pair in pairs], dtype=np.int64)
