"""The audit of one part of the log: its events against the shards, examples and queries made from them.

Parts are audited one by one, in any process, because a user stands in one part only. `certificate.audit` writes what
all parts need into the audit folder, and puts their findings together.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cprec.data.catalogue import Catalogue
from cprec.data.dataset import NUM_SLOTS, read_catalogue, read_manifest, read_split, slot_of, with_microsecond
from cprec.data.interactions import join_time
from cprec.data.leakage import (
    MAX_EXAMPLES,
    Events,
    Grammar,
    Labels,
    Observation,
    Property,
    check_absent,
    check_documents,
    check_examples,
    check_heads,
    check_queries,
    check_repeated_targets,
    check_times,
    check_users,
    find_ties,
    read_events,
)
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import Split, from_seconds, make_split
from cprec.provenance import read_resolved
from cprec.schema import CONTEXT, MIXED, SPLITS, TEST, TRAIN, VALIDATION
from cprec.text.documents import WHOLE, query_names, read_queries_of_part, shard_names
from cprec.text.encoding import PromptEncoder
from cprec.text.prompts import Template
from cprec.text.shards import Shards, read_piece, read_shard_manifest

AUDIT_FOLDER = ".audit"
"""Inside the data folder, while it is audited: the encoded catalogue and the counts of the parts."""

READABLE = "readable.json"
"""In the audit folder: the names of the shards, examples and queries that can be read."""


def property_of(
    name: str, checked: int, wrong: Sequence[Any] | np.ndarray, describe: Callable[[Any], str] = str
) -> Property:
    """A property that the entries of `wrong` violate; `describe` says of one what it is."""
    examples = [describe(entry) for entry in wrong[:MAX_EXAMPLES]]
    return Property(name=name, checked=checked, violations=len(wrong), examples=examples)


@dataclass(frozen=True)
class Prepared:
    """A data folder with the settings and the manifest that stand in it."""

    folder: Path
    settings: dict[str, Any]
    """The settings of `cprec prepare`, from run.json."""
    manifest: dict[str, Any]
    """dataset.json."""

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        return cls(folder, read_resolved(folder)["config"], read_manifest(folder))

    @property
    def target_domains(self) -> list[str]:
        return list(self.settings["target_domains"])

    def pretrain_domains(self, catalogue: Catalogue) -> tuple[str, ...]:
        return tuple(self.settings["pretrain_domains"]) or catalogue.domains

    @property
    def shard_names(self) -> list[str]:
        """The shard folders to check; data folders from before there were whole documents lack those."""
        names = shard_names(self.target_domains)
        return [name for name in names if Path(name).name != WHOLE or (self.folder / name).is_dir()]

    @property
    def template(self) -> Template:
        return Template(item_fields=self.settings["item_fields"])

    @property
    def cuts(self) -> dict[str, int] | None:
        """The first moments of validation and test, in microseconds; None where no cut in time splits the log."""
        cuts = self.manifest.get("cuts")
        return {name: from_seconds(seconds) for name, seconds in cuts.items()} if cuts else None


@functools.lru_cache(maxsize=1)
def open_grammar(folder: Path) -> tuple[Catalogue, Grammar]:
    """The catalogue, and how its documents are written; read once for all parts of a process."""
    catalogue = read_catalogue(folder)
    return catalogue, grammar_of(PromptEncoder.load(folder / AUDIT_FOLDER, catalogue))


def grammar_of(encoder: PromptEncoder) -> Grammar:
    """How an encoder writes documents."""
    catalogue = encoder.catalogue
    return Grammar(
        heads=encoder.heads(),
        line=encoder.line_tokens,
        next=encoder.next_tokens,
        eos=encoder.eos_id,
        tags=Ragged.of([encoder.tag_tokens(number) for number in range(len(catalogue.domains))]),
        titles=encoder.titles(np.arange(len(catalogue))),
        domain=catalogue.domain,
    )


def audit_part(folder: Path, part: int) -> dict[str, Any]:
    """Check the documents, examples and queries of the users of one part.

    Returns properties, observations and counts of events in time as plain JSON; how many training events each item has
    goes into the audit folder.
    """
    catalogue, grammar = open_grammar(folder)
    data = Prepared.read(folder)
    readable = set(json.loads((folder / AUDIT_FOLDER / READABLE).read_text(encoding="utf-8")))
    split = read_split(folder, part, catalogue)
    np.save(folder / AUDIT_FOLDER / f"part-{part}.npy", np.bincount(split.train.item, minlength=len(catalogue)))
    auditor = _PartAuditor(data, part, split, grammar)
    properties = [auditor.check_parts(), auditor.check_split(), *auditor.check_documents(readable)]
    observations: list[Observation] = []
    for domain in data.target_domains:
        for name in (VALIDATION, TEST):
            if readable.intersection(query_names([domain], [name])):
                properties.append(check_queries(split, domain, name, auditor.queries(domain, name)))
            observations += find_ties(split, domain, name, data.manifest["rules"]["tie_order"])
    # The number of events; with cuts also those before and up to the validation cut, then the test cut.
    time, cuts = split.interactions.time, data.cuts
    moments = [cuts[VALIDATION], cuts[VALIDATION] + 1, cuts[TEST], cuts[TEST] + 1] if cuts else []
    return {
        "properties": [asdict(p) for p in properties],
        "observations": [asdict(o) for o in observations],
        "times": [len(time), *(int((time < moment).sum()) for moment in moments)],
    }


class _PartAuditor:
    """Holds one part of the log while its shards, examples and queries are checked one after the other."""

    def __init__(self, data: Prepared, part: int, split: Split, grammar: Grammar) -> None:
        log, catalogue = split.interactions, split.catalogue
        self._data, self._part, self._split, self._grammar = data, part, split, grammar
        platforms = pa.array(log.platforms, pa.string()).take(pa.array(log.user_platform))
        user_ids = pa.array(log.user_id, pa.string())
        self._user_keys = _user_keys(platforms, user_ids)
        self._users = pc.binary_join_element_wise(platforms, user_ids, "/").to_numpy(zero_copy_only=False)
        """What examples call each user of the log."""
        self._title = grammar.title_of_row[log.item]
        """The title number of each event of the log."""
        self._train = split.events(TRAIN)
        self._pretrained = data.pretrain_domains(catalogue)

    # ---- the log ----

    def check_parts(self) -> Property:
        """No user is in two parts: the parts are audited each by itself."""
        log = self._split.interactions
        platforms = (log.platforms[number] for number in log.user_platform)
        slots = np.fromiter(map(slot_of, platforms, log.user_id), dtype=np.int64)
        slots_per_part = NUM_SLOTS // self._data.manifest["num_parts"]
        wrong = np.flatnonzero(slots // slots_per_part != self._part)
        what = "interactions: every user stands in the part of the hash"
        return property_of(what, len(slots), self._users[wrong])

    def check_split(self) -> Property:
        """The split in the tables is the one that its parameters give."""
        split, log, found = self._split, self._split.interactions, self._data.cuts
        cuts, seed = (found[VALIDATION], found[TEST]) if found else None, self._data.settings["seed"]
        expected = make_split(split.catalogue, log, split.domains, split.spec, cuts=cuts, seed=seed)

        def describe(event: int) -> str:
            is_, should = SPLITS[split.part[event]], SPLITS[expected.part[event]]
            title, user = self._name_of_title(int(self._title[event])), self._users[log.user[event]]
            return f"{title} of {user} is {is_} and should be {should}"

        wrong = np.flatnonzero(expected.part != split.part)
        what = f"interactions: the split is what {split.spec.method} makes of them"
        return property_of(what, len(log), wrong, describe)

    # ---- shards and examples ----

    def check_documents(self, readable: set[str]) -> Iterator[Property]:
        """The documents of every shard folder that can be read; no user of the held-out ones is trained on."""
        users: dict[str, np.ndarray] = {}
        for name in filter(readable.__contains__, self._data.shard_names):
            found, users[name] = self._check_shards(name)
            yield from found
        if {"shards/train", "shards/heldout"} <= users.keys():
            trained = np.unique(users["shards/train"])
            yield check_absent("shards/heldout: no user of shards/train", users["shards/heldout"], trained, self._users)

    def _check_shards(self, name: str) -> tuple[list[Property], np.ndarray]:
        """All checks of the documents of a shard folder; and each document's user, -1 where unknown."""
        laid_out, shards, numbers = self._read(name)
        if laid_out.violations:
            return [laid_out], np.empty(0, dtype=np.int64)
        split, cuts = self._split, self._data.cuts
        user, labels = self._user_rows(shards.documents), self._labels(shards, numbers)
        is_example, validates = name.startswith("examples/"), name.endswith(f"/{VALIDATION}")
        # A validation example ends with a validation event, and may show everything before it.
        allowed = ~split.events(TEST) if validates else self._train
        events, properties = self._check_lines(name, shards, user, allowed, labels)
        if is_example and not name.endswith(f"/{WHOLE}"):
            properties += self._check_examples(name, events, user, allowed, labels)
        if cuts:
            log, cut = split.interactions, cuts[TEST if validates else VALIDATION]
            properties.append(check_times(name, events, user, log.user, self._title, log.time, cut, labels))
        if split.spec.unseen_user_share and not validates:
            unseen = np.unique(split.interactions.user[split.events(CONTEXT)])
            properties.append(check_absent(f"{name}: no unseen user", user, unseen, self._users))
        if not is_example:
            properties += self._check_unseen_domains(name, events.title, user)
        return [laid_out, *properties], user

    def _check_lines(
        self, name: str, shards: Shards, user: np.ndarray, allowed: np.ndarray, labels: Labels
    ) -> tuple[Events, list[Property]]:
        """Take documents apart, and hold each line against the log, of which `allowed` (a mask) may be shown."""
        log, documents, mixed = self._split.interactions, shards.rows, shards.column("kind") == MIXED
        # The index of each document's domain; -1 for mixed ones and for names that the catalogue does not have.
        names = pa.array(self._split.catalogue.domains, pa.string())
        domain = pc.fill_null(pc.index_in(shards.documents["domain"], names), -1).to_numpy().astype(np.int64)
        domain[mixed] = -1
        events = read_events(documents, domain, self._grammar)
        return events, [
            check_heads(name, documents, domain, self._grammar, labels),
            check_users(name, user, labels),
            *check_documents(
                name,
                events,
                len(shards),
                user,
                log.user[allowed],
                self._title[allowed],
                log.user[~allowed],
                self._title[~allowed],
                per_document=name.startswith("examples/") and not name.endswith(f"/{WHOLE}"),
                group=mixed.astype(int),
                labels=labels,
            ),
        ]

    def _check_examples(
        self, name: str, events: Events, user: np.ndarray, shown: np.ndarray, labels: Labels
    ) -> list[Property]:
        """Examples ask only for events that they may ask for, and show only events before those."""
        log, catalogue = self._split.interactions, self._split.catalogue
        _, domain, part = name.split("/")
        of_domain = catalogue.domain[log.item] == catalogue.domain_index(domain)
        asked = self._split.events(part) & of_domain
        size = len(user)
        return [
            check_repeated_targets(name, events, size, user, log.user, self._title, labels),
            check_examples(name, events, size, user, log.user, self._title, asked=asked, shown=shown, labels=labels),
        ]

    def _check_unseen_domains(self, name: str, titles: np.ndarray, users: np.ndarray) -> list[Property]:
        """No item of a domain that is not pre-trained on, and no user tested in one."""
        log, catalogue = self._split.interactions, self._split.catalogue
        others = [domain for domain in catalogue.domains if domain not in self._pretrained]
        rows = np.flatnonzero(np.isin(catalogue.domain, list(map(catalogue.domain_index, others))))
        # One catalogue row for each title number of the other domains, to name what is found.
        row_of_title = dict(zip(self._grammar.title_of_row[rows].tolist(), rows.tolist(), strict=True))
        absent = np.fromiter(row_of_title.keys(), dtype=np.int64)
        named = {title: self._name_of_item(row_of_title[title]) for title in np.intersect1d(titles, absent).tolist()}
        # Users with a held-out event in a domain that is a target and not pre-trained on.
        unseen = [domain for domain in self._data.target_domains if domain not in self._pretrained]
        is_unseen = np.isin(catalogue.domain[log.item], list(map(catalogue.domain_index, unseen)))
        tested = np.unique(log.user[~self._train & is_unseen])
        no_item = f"{name}: no item of a domain that is not pre-trained on ({', '.join(others) or 'none'})"
        no_user = f"{name}: no user tested in an unseen domain ({', '.join(unseen) or 'none'})"
        return [
            check_absent(no_item, titles, absent, named),
            check_absent(no_user, users, tested, self._users),
        ]

    def _read(self, name: str) -> tuple[Property, Shards, np.ndarray]:
        """The documents of this part in a shard folder, with the row of each in the folder's index."""
        folder = self._data.folder / name
        manifest = read_shard_manifest(folder)
        starts = np.cumsum([0, *(piece["num_documents"] for piece in manifest["pieces"])])
        pieces, numbers, wrong = [], [np.empty(0, dtype=np.int64)], []
        for place, listed in enumerate(manifest["pieces"]):
            if listed["part"] != self._part:
                continue
            piece = read_piece(folder, manifest, place)
            if not _is_laid_out(piece, listed):
                wrong.append(f"{listed['kind']} documents from {starts[place]} on")
            pieces.append(piece)
            numbers.append(np.arange(starts[place], starts[place + 1]))
        what = "documents follow one another and are of the domain and kind of their piece"
        found = property_of(f"{name}: {what}", len(pieces), wrong)
        return found, Shards.concatenate([] if wrong else pieces, manifest), np.concatenate(numbers)

    # ---- queries ----

    def queries(self, domain: str, name: str) -> dict[str, Any]:
        """The queries of this part's users, as rows of the log's users and of the catalogue; -1 where unknown."""
        (path,) = query_names([domain], [name])
        table = with_microsecond(read_queries_of_part(self._data.folder / path, self._part)).combine_chunks()
        catalogue, lengths = self._split.catalogue, pc.list_value_length(table["history_item"]).to_numpy()
        history = catalogue.rows_of_pairs(
            pc.list_flatten(table["history_domain"]), pc.list_flatten(table["history_item"])
        )
        return {
            "query_id": table["query_id"].to_numpy(),
            "user": self._user_rows(table),
            "target": catalogue.rows_of_pairs(table["domain"], table["target"]),
            "time": join_time(
                table["timestamp"].to_numpy(), table["microsecond"].to_numpy(), self._split.domains[domain].has_times
            ),
            "history": Ragged(history, offsets_of(lengths)),
        }

    # ---- names and numbers ----

    def _labels(self, shards: Shards, numbers: np.ndarray) -> Labels:
        def document(number: int) -> str:
            (row,) = shards.documents.slice(number, 1).to_pylist()
            return f"document {numbers[number]} of {row['platform']}/{row['user_id']}"

        return Labels(document, lambda user, title: self._name_of_title(title))

    def _name_of_title(self, number: int) -> str:
        return self._name_of_item(int(np.argmax(self._grammar.title_of_row == number)))

    def _name_of_item(self, row: int) -> str:
        catalogue = self._split.catalogue
        return f"'{catalogue.title[row]}' ({catalogue.domains[catalogue.domain[row]]})"

    def _user_rows(self, table: pa.Table) -> np.ndarray:
        """The row of each entry's user in the log; -1 for a user that the log does not have."""
        found = pc.index_in(_user_keys(table["platform"], table["user_id"]), self._user_keys)
        return np.asarray(pc.fill_null(found, -1).to_numpy().astype(np.int64))


def _is_laid_out(piece: Shards, listed: dict[str, Any]) -> bool:
    """Whether documents follow one another without a gap, all of the domain and kind of their piece."""
    lengths = piece.column("length")
    return bool(
        (piece.column("offset") == offsets_of(lengths)[:-1]).all()
        and (lengths >= 0).all()
        and lengths.sum() == listed["num_tokens"]
        and pc.all(pc.equal(piece.documents["domain"], listed["domain"])).as_py() is not False
        and pc.all(pc.equal(piece.documents["kind"], listed["kind"])).as_py() is not False
    )


def _user_keys(platform: Any, user_id: Any) -> Any:
    """Platform and id as one text, joined by the ASCII unit separator."""
    return pc.binary_join_element_wise(platform, user_id, "\x1f")
