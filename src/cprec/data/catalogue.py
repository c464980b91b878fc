"""Catalogue: item ids, cleaned titles and domains, in one fixed order of rows."""

from __future__ import annotations

import difflib
import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.errors import DataError, UnknownItemError
from cprec.schema import BRAND, CATEGORIES, DESCRIPTION, ITEM_ID, PRICE, TITLE, Item

MAX_UNKNOWN_SHOWN = 5

_Near = Callable[[str, dict[str, int]], list[str]]

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_QUOTED = re.compile("['\u2018](.*)['\u2019]")
_QUOTES = re.compile('["\u201c\u201d\u201e\u201f\u00ab\u00bb]')
_SPACES = re.compile(r"\s+")


def clean_title(text: str) -> str:
    """A title as it is written into prompts: one line of plain text.

    HTML entities are resolved (also escaped twice or more), tags and double quotes removed, control characters and runs
    of white space become one space, single quotes around the whole and dots at the end go. '' where nothing is left.

    >>> clean_title('Ben &amp;amp; Jerry&#39;s  "Half\\nBaked"...')
    "Ben & Jerry's Half Baked"
    >>> clean_title("'Ocean&quot;s 11 <b>DVD</b>'.")
    'Oceans 11 DVD'
    """
    while True:  # until nothing changes: cleaning a clean title leaves it alone
        before = text
        text = unicodedata.normalize("NFC", html.unescape(text))
        text = _TAG.sub(" ", text)
        text = _QUOTES.sub("", _CONTROL.sub(" ", _INVISIBLE.sub("", text)))
        text = _SPACES.sub(" ", text).strip().rstrip(". \u2026")
        if quoted := _QUOTED.fullmatch(text):
            text = quoted[1].strip()
        if text == before:
            return text


def has_word(text: str) -> bool:
    """Whether a title says anything: it holds a letter or a digit (some films are called "187")."""
    return any(character.isalnum() for character in text)


@dataclass(frozen=True)
class Catalogue:
    """Every item of every domain; rows are sorted by (domain, item_id), so each domain is one run of rows."""

    domains: tuple[str, ...]
    """Sorted; `domain` holds indices into it."""
    domain: np.ndarray
    """int16[num_items]."""
    item_id: np.ndarray
    """object[num_items] of str."""
    title: np.ndarray
    """object[num_items] of str, cleaned, never empty."""
    brand: np.ndarray
    """object[num_items] of str, '' where absent."""
    categories: np.ndarray
    """object[num_items] of str, '' where absent."""

    def __len__(self) -> int:
        return len(self.item_id)

    def rows_of(self, domain: str) -> np.ndarray:
        """int64 rows of a domain, which follow one another; not to be written to. Raises DataError for a domain that is
        not here."""
        return self._rows_of_domain[self.domain_index(domain)]

    def domain_index(self, domain: str) -> int:
        """The position of a domain in `domains`. Raises DataError for one that is not here."""
        try:
            return self.domains.index(domain)
        except ValueError:
            raise DataError(f"there is no domain {domain!r}; the data has {', '.join(self.domains)}") from None

    def find(self, domain: str, item_ids: Iterable[str]) -> np.ndarray:
        """int64 rows of item ids of a domain, in the order given.

        Raises UnknownItemError naming up to five ids that are not there, with the nearest that are.
        """
        return self._look_up(domain, list(item_ids), self._row_of_id[self.domain_index(domain)], "item id", _near_ids)

    def find_titles(self, domain: str, titles: Iterable[str]) -> np.ndarray:
        """int64 rows of titles of a domain, in the order given; cleaned first, upper and lower case alike.

        Where several items have the title, the first row is meant. Raises UnknownItemError as `find` does.
        """
        keys = [clean_title(title).casefold() for title in titles]
        known = self._row_of_title[self.domain_index(domain)]
        return self._look_up(domain, keys, known, "title", self._near_titles)

    def row_of(self, domain: str, text: str) -> int | None:
        """The row of an item by id, else by title as `find_titles` knows it; None where there is neither."""
        row = self.row_of_id(domain, text)
        return row if row is not None else self.row_of_title(domain, text)

    def item_of(self, domain: str, text: str) -> Item | None:
        """The item that a text means, as `row_of` knows it: of the domain, else of the others in their order."""
        for name in [domain, *(other for other in self.domains if other != domain)]:
            row = self.row_of(name, text)
            if row is not None:
                return Item(name, str(self.item_id[row]))
        return None

    def row_of_id(self, domain: str, item_id: str) -> int | None:
        """The row of an item of a domain; None where there is none."""
        return self._row_of_id[self.domain_index(domain)].get(item_id)

    def row_of_title(self, domain: str, title: str) -> int | None:
        """The row of an item by title, as `find_titles` knows it; None where there is none."""
        return self._row_of_title[self.domain_index(domain)].get(clean_title(title).casefold())

    def _look_up(self, domain: str, keys: list[str], known: dict[str, int], what: str, near: _Near) -> np.ndarray:
        found = [known.get(key) for key in keys]
        if None in found:
            missing = list(dict.fromkeys(key for key in keys if key not in known))
            lines = []
            for key in missing[:MAX_UNKNOWN_SHOWN]:
                nearest = near(key, known)
                lines.append(f"{key!r}" + (f" (nearest: {', '.join(map(repr, nearest))})" if nearest else ""))
            more = len(missing) - len(lines)
            raise UnknownItemError(
                f"{len(missing)} {what}{'s are' if len(missing) > 1 else ' is'} not among the {len(known):,} items of "
                f"domain {domain!r}: {'; '.join(lines)}{f'; and {more} more' if more else ''}"
            )
        return np.array(found, dtype=np.int64)

    def _near_titles(self, key: str, known: dict[str, int]) -> list[str]:
        """Titles that share most words with the one asked for, then those spelt alike."""
        words = set(key.split())
        shared = Counter({title: len(words.intersection(title.split())) for title in known})
        alike = [title for title, count in shared.most_common(50) if count]
        best = difflib.get_close_matches(key, alike or list(known)[:20_000], n=3, cutoff=0.3)
        return [str(self.title[known[title]]) for title in best]

    def rows_of_pairs(self, domains: pa.ChunkedArray | pa.Array, item_ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """int64 rows of items given by domain and id, -1 where there is no such item."""
        rows = np.full(len(item_ids), -1, dtype=np.int64)
        of_domain = pc.fill_null(pc.index_in(domains, pa.array(self.domains, pa.string())), -1).to_numpy()
        for index, domain in enumerate(self.domains):
            at = np.flatnonzero(of_domain == index)
            if len(at):
                found = pc.index_in(item_ids.take(pa.array(at)), self.arrow_ids(domain))
                known = pc.fill_null(found, -1).to_numpy().astype(np.int64)
                rows[at] = np.where(known < 0, -1, known + self.rows_of(domain)[0])
        return rows

    @cached_property
    def item_id_rank(self) -> np.ndarray:
        """Where each row's item id stands among all ids in the order of their code points; equal ids rank alike."""
        ids = pa.array(self.item_id, pa.string())
        distinct = ids.unique()
        return pc.index_in(ids, distinct.take(pc.array_sort_indices(distinct))).to_numpy().astype(np.int64)

    def arrow_ids(self, domain: str) -> pa.Array:
        """The item ids of a domain in the order of its rows."""
        return self._arrow_ids[self.domain_index(domain)]

    @cached_property
    def _arrow_ids(self) -> list[pa.Array]:
        return [pa.array(self.item_id[self.rows_of(domain)], pa.string()) for domain in self.domains]

    @cached_property
    def _rows_of_domain(self) -> list[np.ndarray]:
        starts = np.searchsorted(self.domain, np.arange(len(self.domains) + 1))
        rows = [np.arange(start, stop) for start, stop in pairwise(starts)]
        for each in rows:
            each.flags.writeable = False  # one array for all who ask
        return rows

    @cached_property
    def _row_of_id(self) -> list[dict[str, int]]:
        rows: list[dict[str, int]] = []
        for domain in self.domains:
            of_domain = self.rows_of(domain)
            rows.append(dict(zip(self.item_id[of_domain], of_domain.tolist(), strict=True)))
        return rows

    @cached_property
    def _row_of_title(self) -> list[dict[str, int]]:
        rows: list[dict[str, int]] = []
        for domain in self.domains:
            known: dict[str, int] = {}
            for row in self.rows_of(domain).tolist():
                known.setdefault(self.title[row].casefold(), row)
            rows.append(known)
        return rows

    def digest(self) -> str:
        """SHA-256 over all rows: equal catalogues have equal digests, wherever they are stored."""
        digest = hashlib.sha256()
        names = np.array(self.domains, dtype=object)
        for row in zip(names[self.domain], self.item_id, self.title, self.brand, self.categories, strict=True):
            digest.update(("\x1f".join(row) + "\x1e").encode())
        return digest.hexdigest()

    @classmethod
    def read(cls, folder: str | Path) -> Catalogue:
        """The catalogue in `folder/items/domain=*/`. Raises DataError where there is none."""
        folders = sorted(Path(folder, "items").glob("domain=*"), key=lambda path: path.name.partition("=")[2])
        if not folders:
            raise DataError(f"{folder} holds no catalogue: there is no items/domain=... in it")
        tables = {
            path.name.partition("=")[2]: read_parts(path, [ITEM_ID, TITLE, BRAND, CATEGORIES]) for path in folders
        }
        return cls.from_tables(tables)

    @classmethod
    def from_tables(cls, tables: dict[str, pa.Table]) -> Catalogue:
        """From one table per domain with item_id, title, and optionally brand and categories, in any order of rows.

        Raises DataError for an item id that occurs twice in a domain.
        """
        domains = tuple(sorted(tables))
        sorted_tables = [tables[domain].sort_by(ITEM_ID) for domain in domains]
        columns: dict[str, np.ndarray] = {}
        for name in (ITEM_ID, TITLE, BRAND, CATEGORIES):
            columns[name] = np.concatenate([np.empty(0, dtype=object), *(_text(t, name) for t in sorted_tables)])
        index = np.repeat(np.arange(len(domains), dtype=np.int16), [table.num_rows for table in sorted_tables])
        ids = columns[ITEM_ID]
        twice = np.flatnonzero((ids[1:] == ids[:-1]) & (index[1:] == index[:-1]))
        if len(twice):
            raise DataError(f"item id {ids[twice[0]]!r} occurs twice in domain {domains[index[twice[0]]]!r}")
        return cls(domains, index, ids, columns[TITLE], columns[BRAND], columns[CATEGORIES])

    def write(self, folder: str | Path) -> None:
        """Write `folder/items/domain=*/part-0.parquet`; descriptions and prices, which are not kept here, are null."""
        for domain in self.domains:
            rows = self.rows_of(domain)
            path = Path(folder, "items", f"domain={domain}", "part-0.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            text = {
                name: pa.array(column[rows], pa.string())
                for name, column in (
                    (ITEM_ID, self.item_id),
                    (TITLE, self.title),
                    (BRAND, self.brand),
                    (CATEGORIES, self.categories),
                )
            }
            absent = {DESCRIPTION: pa.nulls(len(rows), pa.string()), PRICE: pa.nulls(len(rows), pa.float64())}
            pq.write_table(pa.table({**text, **absent}), path, compression="zstd")


def read_parts(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of `folder/part-*.parquet`, in the order of the parts. Raises DataError where a file is not readable."""
    files = sorted(folder.glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise DataError(f"{folder} holds no part-*.parquet")
    try:
        return pa.concat_tables([pq.ParquetFile(path).read(columns) for path in files])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder} cannot be read: {error}") from None


def _text(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.full(table.num_rows, "", dtype=object)
    return np.asarray(table[name].cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False), dtype=object)


def _near_ids(key: str, known: dict[str, int]) -> list[str]:
    alike = [name for name in known if name[:2] == key[:2]] or list(known)
    return difflib.get_close_matches(key, alike[:20_000], n=3, cutoff=0.6)
