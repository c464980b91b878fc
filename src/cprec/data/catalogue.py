"""Catalogue: item ids, cleaned titles and domains, in one fixed order of rows."""

from __future__ import annotations

import difflib
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cprec.data.cleaning import clean_title, spelling
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.word_index import WordIndex
from cprec.errors import DataError, UnknownItemError
from cprec.schema import BRAND, CATEGORIES, DESCRIPTION, ITEM_ID, PRICE, TITLE, Item

MAX_UNKNOWN_SHOWN = 5
_INDEXING = threading.Lock()
"""Held while an index of words is built: it takes seconds for a large catalogue, and requests come at once."""

TextKind = Literal["any", "item_id", "title"]

_Near = Callable[[str, dict[str, int]], list[str]]


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
        ids = list(item_ids)
        return self._look_up(domain, ids, ids, self._row_of_id[self.domain_index(domain)], "id", _near_ids)

    def find_titles(self, domain: str, titles: Iterable[str]) -> np.ndarray:
        """int64 rows of titles of a domain, in the order given, as `look_up` knows them; raises as it and `find` do."""
        titles = list(titles)
        known = self._row_of_title[self.domain_index(domain)]
        rows = [self.look_up(title, domain, "title", elsewhere=False) for title in titles]
        keys = [title if row is None else str(self.title[row]) for title, row in zip(titles, rows, strict=True)]
        return self._look_up(domain, titles, keys, known, "id or title", self._near_titles)

    def item_of(self, domain: str, text: str) -> Item | None:
        """The item that a text means, as `look_up` knows it; None where there is none. Raises as it does."""
        row = self.look_up(text, domain)
        return None if row is None else Item(self.domains[self.domain[row]], str(self.item_id[row]))

    def row_of_id(self, domain: str, item_id: str) -> int | None:
        """The row of an item of a domain; None where there is none."""
        return self._row_of_id[self.domain_index(domain)].get(item_id)

    def look_up(self, text: str, domain: str, kind: TextKind = "any", *, elsewhere: bool = True) -> int | None:
        """The row of the item that a text means, None where there is none: the one way from texts to items.

        The text is the item's id or exactly its title, in `domain` or then in the others; or else its title in another
        spelling (case, spaces, invisible characters, Unicode forms), in `domain` or then in the others. Of items of one
        title the first is meant. `kind` looks for ids or titles alone, and without `elsewhere` in `domain` alone.

        Raises UnknownItemError where a spelling fits several titles, naming them.
        """
        domains = [domain, *(name for name in self.domains if name != domain and elsewhere)]
        for index in map(self.domain_index, domains):
            row = None if kind == "title" else self._row_of_id[index].get(text)
            if row is None and kind != "item_id":
                titles = self._row_of_title[index]
                row = titles.get(text, titles.get(clean_title(text)))
            if row is not None:
                return row
        if kind == "item_id":
            return None
        key = spelling(text)
        for those in (domains[:1], domains[1:]):
            found = [row for name in those for row in self._rows_of_spelling[self.domain_index(name)].get(key, ())]
            if len(found) > 1:
                names = [
                    f"{str(self.title[row])!r} ({self.item_id[row]} of {self.domains[self.domain[row]]})"
                    for row in found[:MAX_UNKNOWN_SHOWN]
                ]
                more = f" and {len(found) - len(names)} more" if len(found) > len(names) else ""
                raise UnknownItemError(
                    f"{text!r} is not a title as it is written, and may mean {', '.join(names)}{more}: write the "
                    "title as it is there, or give the item's id"
                )
            if found:
                return found[0]
        return None

    def of_equal_text(self, domain: str, item_ids: Iterable[str], fields: Sequence[str] = (TITLE,)) -> frozenset[str]:
        """Items of a domain with all others whose text is that of one of them: their `fields` are the same.

        Raises UnknownItemError as `find` does.
        """
        rows, first = self.find(domain, item_ids), int(self.rows_of(domain)[0])
        if not len(rows):
            return frozenset()
        texts, rows_of_text = self.texts_of(domain, fields)
        equal = rows_of_text.take(np.unique(texts[rows - first])).values
        return frozenset(map(str, self.item_id[first + equal]))

    def _look_up(
        self, domain: str, asked: list[str], keys: list[str], known: dict[str, int], what: str, near: _Near
    ) -> np.ndarray:
        """The rows of `keys` in `known`; `asked` has the same texts as the caller wrote them, for the message."""
        try:
            return np.fromiter(map(known.__getitem__, keys), np.int64, len(keys))
        except KeyError:
            missing = {text: key for text, key in zip(asked, keys, strict=True) if key not in known}
            lines = []
            for text, key in list(missing.items())[:MAX_UNKNOWN_SHOWN]:
                nearest = near(key, known)
                lines.append(f"{text!r}" + (f" (nearest: {', '.join(map(repr, nearest))})" if nearest else ""))
            more = len(missing) - len(lines)
            raise UnknownItemError(
                f"{len(missing)} item{'s are' if len(missing) > 1 else ' is'} not among the "
                f"{len(self.rows_of(domain)):,} of domain {domain!r}, by {what}: {'; '.join(lines)}"
                f"{f'; and {more} more' if more else ''}"
            ) from None

    def _near_titles(self, key: str, known: dict[str, int]) -> list[str]:
        """Titles that share most words with the one asked for, then those spelt alike."""
        folded = {title.casefold(): title for title in reversed(known)}
        words = set(key.casefold().split())
        shared = Counter({title: len(words.intersection(title.split())) for title in reversed(folded)})
        alike = [title for title, count in shared.most_common(50) if count]
        best = difflib.get_close_matches(key.casefold(), alike or list(folded)[-20_000:], n=3, cutoff=0.3)
        return [folded[title] for title in best]

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

    def titles_of(self, domain: str) -> list[str]:
        """The titles of a domain's items, in the order of its rows."""
        return [str(title) for title in self.title[self.rows_of(domain)]]

    def places_in(self, other: Catalogue, domain: str) -> np.ndarray:
        """Where each item of a domain stands among those that another catalogue has of it; -1 where it has none of the
        id: int64[N]."""
        places = pc.index_in(self.arrow_ids(domain), other.arrow_ids(domain))
        return np.asarray(pc.fill_null(places, -1)).astype(np.int64)

    def arrow_ids(self, domain: str) -> pa.Array:
        """The item ids of a domain in the order of its rows."""
        return self._arrow_ids[self.domain_index(domain)]

    @cached_property
    def _arrow_ids(self) -> list[pa.Array]:
        return [pa.array(self.item_id[rows], pa.string()) for rows in self._rows_of_domain]

    @cached_property
    def _rows_of_domain(self) -> list[np.ndarray]:
        starts = np.searchsorted(self.domain, np.arange(len(self.domains) + 1))
        rows = [np.arange(start, stop) for start, stop in pairwise(starts)]
        for each in rows:
            each.flags.writeable = False  # one array for all who ask
        return rows

    @cached_property
    def _row_of_id(self) -> list[dict[str, int]]:
        return [dict(zip(self.item_id[rows], rows.tolist(), strict=True)) for rows in self._rows_of_domain]

    @cached_property
    def _row_of_title(self) -> list[dict[str, int]]:
        """By domain, the first row of each title."""
        reversed_rows = [rows[::-1] for rows in self._rows_of_domain]
        return [dict(zip(self.title[rows], rows.tolist(), strict=True)) for rows in reversed_rows]

    @cached_property
    def spellings(self) -> list[str]:
        """The spelling of each row's title."""
        return [spelling(title) for title in self.title]

    @cached_property
    def _rows_of_spelling(self) -> list[dict[str, tuple[int, ...]]]:
        """By domain, the first row of each title that has a spelling."""
        out = []
        for row_of_title in self._row_of_title:
            known: dict[str, tuple[int, ...]] = {}
            for row in sorted(row_of_title.values()):
                key = self.spellings[row]
                known[key] = (*known.get(key, ()), row)
            out.append(known)
        return out

    def index(self, fields: Sequence[str] = (TITLE,)) -> None:
        """Build the indexes of `look_up`, of `words_of`, and of `of_equal_text` for these fields, before the first call
        needs them."""
        _ = self._row_of_id, self._rows_of_spelling
        for domain in self.domains:
            self.texts_of(domain, fields)
            self.words_of(domain)

    def words_of(self, domain: str) -> WordIndex:
        """The items of a domain, by place, by the words of their titles, brands and categories. One thread builds the
        index, and others that ask for it meanwhile wait."""
        if domain in self._word_indexes:
            return self._word_indexes[domain]
        with _INDEXING:
            if domain not in self._word_indexes:
                rows = self.rows_of(domain)
                shared = {text: spelling(text) for name in (BRAND, CATEGORIES) for text in getattr(self, name)[rows]}
                texts = [
                    f"{self.spellings[row]} {shared[self.brand[row]]} {shared[self.categories[row]]}"
                    for row in rows.tolist()
                ]
                self._word_indexes[domain] = WordIndex(texts)
        return self._word_indexes[domain]

    def items_with_words(self, domain: str, query: str, may_return: Callable[[str], bool]) -> frozenset[str]:
        """Ids of the items of a domain that have a word of a query, as far as they may be returned. Raises DataError
        where none is left."""
        index, ids = self.words_of(domain), self.item_id[self.rows_of(domain)]
        found = frozenset(item_id for item_id in ids[index.having(query)].tolist() if may_return(item_id))
        if not found:
            raise index.no_match(query, f"domain {domain!r}")
        return found

    @cached_property
    def _word_indexes(self) -> dict[str, WordIndex]:
        """The results of `words_of` so far."""
        return {}

    def texts_of(self, domain: str, fields: Sequence[str]) -> tuple[np.ndarray, Ragged]:
        """For each item of a domain the number of its text, and for each text its items, by place in the domain."""
        fields = tuple(fields)
        if (domain, fields) not in self._numbered_texts:
            rows = self.rows_of(domain)
            columns = [pa.array(getattr(self, name)[rows], pa.string()) for name in fields]
            texts = pc.binary_join_element_wise(*columns, "\x1f").dictionary_encode().indices.to_numpy()
            members = Ragged(np.argsort(texts, kind="stable"), offsets_of(np.bincount(texts)))
            self._numbered_texts[domain, fields] = texts, members
        return self._numbered_texts[domain, fields]

    @cached_property
    def _numbered_texts(self) -> dict[tuple[str, tuple[str, ...]], tuple[np.ndarray, Ragged]]:
        """The results of `texts_of` so far, by domain and fields."""
        return {}

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
            names = (ITEM_ID, TITLE, BRAND, CATEGORIES)
            text = {name: pa.array(getattr(self, name)[rows], pa.string()) for name in names}
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
