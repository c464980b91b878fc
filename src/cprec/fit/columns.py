"""Tells the columns of a log and of its items by their names and, where those say nothing, by what is in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cprec.data.sources.columns import DEFAULT_NAMES
from cprec.errors import ConfigError, DataError
from cprec.schema import ITEM_ID, TIMESTAMP, TITLE, USER_ID

_WORD = re.compile(r"(?i:kunden|artikel|produkt|bestell|kauf|uhr)|[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+")


def words_of(name: str) -> frozenset[str]:
    """The words of a name: `customerId` has customer and id, and `Kundennummer` kunden and nummer."""
    return frozenset(word.lower() for word in _WORD.findall(name))


WORDS: Mapping[str, frozenset[str]] = {
    USER_ID: words_of("user customer client buyer member visitor shopper reader reviewer account kunde kunden nutzer"),
    ITEM_ID: words_of("item product article sku asin isbn ean book movie film song track game artikel produkt"),
    TIMESTAMP: words_of("time date datetime timestamp day when created at ts datum zeit tag"),
    TITLE: words_of("title name label titel bezeichnung"),
}
"""Words in the name of a column that tell what it holds, English and German."""
ID_WORDS = words_of("id no nr number num code key uid sku asin isbn ean nummer")
"""Words that tell an id from other things known of a user or an item."""

MEANING = {USER_ID: "the customer", ITEM_ID: "the item", TIMESTAMP: "the time", TITLE: "the item's title"}
HINTS = {
    TIMESTAMP: "times are written as 2014-07-23, 2014-07-23T18:00:00 or 23.07.2014, or are seconds since 1970; a log "
    "without them, where the rows of each customer stand in order, needs timestamps=order",
    TITLE: "every item needs a title, because it is what a language model reads; where the log has none, give the "
    "items and their titles in a second file",
}

MOST = 0.9
"""Share of a column's values that must be of a kind for the column to be of it."""
SHARED = 0.5
"""Share of the log's values that must be among the items' for two columns to hold the same ids."""
REPEATED = 0.7
"""Distinct values among all at most, where the values are users: a log tells of users more than once."""

_DATE = re.compile(r"(\d{4}-\d\d?-\d\d?|\d\d?\.\d\d?\.\d{4})([ T].*)?")
_EARLIEST = 1e8
"""Smaller numbers are no times since 1970 in any unit."""

Ask = Callable[[str, Sequence[str]], str]
"""A question and the columns to choose from -> the one chosen."""


@dataclass(frozen=True)
class Column:
    """A column of a file: some of its values as text, and how many of all are distinct."""

    name: str
    values: Sequence[str]
    distinct: float

    @property
    def words(self) -> frozenset[str]:
        return words_of(self.name)

    def share(self, holds: Callable[[str], object]) -> float:
        """The share of its values that something holds for; 0 without values."""
        return sum(map(bool, map(holds, self.values))) / max(1, len(self.values))

    def __str__(self) -> str:
        shown = ", ".join(repr(value[:40]) for value in list(dict.fromkeys(self.values))[:2])
        return f"{self.name} (as {shown or 'nothing'})"


@dataclass(frozen=True)
class Columns:
    """The columns of a table, and those that a user has told by canonical name."""

    file: str
    columns: Sequence[Column]
    given: Mapping[str, str]

    def named(self, field: str) -> Column | None:
        """The column that is given for a field, or that has a usual name of it. Raises ConfigError if it is missing."""
        wanted = (self.given[field],) if field in self.given else DEFAULT_NAMES[field]
        found = [column for name in wanted for column in self.columns if column.name.lower() == name.lower()]
        if field in self.given and not found:
            raise ConfigError(f"columns.{field}={self.given[field]}: {self.file} has no such column; it has {self}")
        return found[0] if found else None

    def __str__(self) -> str:
        return ", ".join(map(str, self.columns))


def find(
    log: Columns, items: Columns | None, *, has_times: bool = True, ask: Ask | None = None
) -> list[dict[str, str]]:
    """The columns of users, items, times and titles: for the log, and for the items where they have a table of theirs.

    A column that is given or that has a usual name is taken; others are told by words in their names and by their
    values. Where that leaves none or several, `ask` decides. Without it, ConfigError lists the columns and says what
    to write. Raises DataError where the columns found cannot hold what they should.
    """
    found, theirs = dict[str, str](), dict[str, str]()
    if items is None:
        found[ITEM_ID] = _one(ITEM_ID, log, _fitting(ITEM_ID, log), ask)
    else:
        found[ITEM_ID], theirs[ITEM_ID] = _item_ids(log, items, ask)
    if has_times:
        times = _fitting(TIMESTAMP, log, found.values(), lambda column: column.share(is_time) >= MOST)
        found[TIMESTAMP] = _one(TIMESTAMP, log, times, ask)
        chosen = next(column for column in log.columns if column.name == found[TIMESTAMP])
        if chosen.share(lambda value: is_time(value) or _number(value) or value == "0") < SHARED:
            raise DataError(f"{log.file}: the values of {chosen} are no times that can be read; {HINTS[TIMESTAMP]}")
    repeated = _fitting(USER_ID, log, found.values(), lambda column: column.distinct <= REPEATED)
    found[USER_ID] = _one(USER_ID, log, repeated, ask)
    titled, taken = (log, found) if items is None else (items, theirs)
    texts = _fitting(TITLE, titled, taken.values(), lambda column: column.share(_has_letters) >= MOST)
    taken[TITLE] = _one(TITLE, titled, texts, ask)
    return [found] if items is None else [found, theirs]


def is_time(value: str) -> bool:
    """Whether a value is a date, a date and time, or a number of seconds (or a finer unit) since 1970.

    >>> is_time("2014-07-23"), is_time("1406138400"), is_time("23.07.2014"), is_time("07/23/2014")
    (True, True, True, False)
    """
    return bool(_DATE.fullmatch(value)) or _number(value) >= _EARLIEST


def _has_letters(value: str) -> bool:
    return any(map(str.isalpha, value))


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def _fitting(
    field: str, table: Columns, taken: Collection[str] = (), fits: Callable[[Column], bool] = lambda column: True
) -> list[Column]:
    """The columns that may be a field: the named one or, without, those that fit, are not taken, and whose names do not
    say that they hold something else; what is called a product may be its title."""
    if named := table.named(field):
        return [named]
    own = (field, ITEM_ID) if field == TITLE else (field,)
    usual = {name.lower() for other, names in DEFAULT_NAMES.items() if other not in own for name in names}
    words = frozenset[str]().union(*(of for other, of in WORDS.items() if other not in own))
    return [
        column
        for column in table.columns
        if column.name not in taken
        and (column.words & WORDS[field] or not (column.name.lower() in usual or column.words & words))
        and fits(column)
    ]


def _score(field: str, column: Column) -> int:
    """How much a column looks like a field, by its name; and a title by the words in its values."""
    is_id, is_named = bool(column.words & ID_WORDS), bool(column.words & WORDS[field])
    if field == TITLE:
        has_words = column.share(lambda value: " " in value) >= SHARED
        return 2 * is_named + has_words - is_id - 2 * bool(column.words & WORDS[USER_ID])
    if field == TIMESTAMP:
        return 2 * is_named
    return 2 * is_named + is_id - bool(column.words & WORDS[TITLE])


def _one(field: str, table: Columns, fitting: Sequence[Column], ask: Ask | None) -> str:
    """The column of a field: the one of those that fit whose name says so most; without a single one, as asked."""
    scores = [_score(field, column) for column in fitting]
    best = [column.name for column, score in zip(fitting, scores, strict=True) if score == max(scores)]
    if len(best) == 1:
        return best[0]
    question = f"{table.file}: which column is {MEANING[field]} ({field})?"
    if ask is not None:
        return ask(f"{question} The columns are {table}", [column.name for column in table.columns])
    may_be = f"{' or '.join(best)} may be" if best else "None looks like it"
    hint = f" ({HINTS[field]})" if field in HINTS else ""
    example = f", as columns.{field}={best[0]}" if best else ""
    raise ConfigError(f"{question} {may_be}; the columns are {table}. Write columns.{field}=COLUMN{example}{hint}")


def _item_ids(log: Columns, items: Columns, ask: Ask | None) -> tuple[str, str]:
    """The columns of the log and of the items that hold the same ids."""
    ours = _fitting(ITEM_ID, log)
    theirs = _fitting(ITEM_ID, items, fits=lambda column: column.distinct >= MOST)
    ids = {column.name: frozenset(column.values) for column in theirs}
    pairs = [(a, b) for a in ours for b in theirs if a.share(ids[b.name].__contains__) >= SHARED]
    if not pairs:
        raise DataError(
            f"{items.file} has no column with the ids of a column of {log.file}, each id once: is {log.file} the log, "
            f"one row an event, and {items.file} the items? Where both have the ids, written alike, write "
            f"interactions.columns.{ITEM_ID}=COLUMN and items.columns.{ITEM_ID}=COLUMN. "
            f"{log.file} has {log}; {items.file} has {items}"
        )
    scores = [_score(ITEM_ID, a) + _score(ITEM_ID, b) + (a.name == b.name) for a, b in pairs]
    best = [pair for pair, score in zip(pairs, scores, strict=True) if score == max(scores)]
    sides = [list({column.name: column for column in side}.values()) for side in zip(*best, strict=True)]
    return _one(ITEM_ID, log, sides[0], ask), _one(ITEM_ID, items, sides[1], ask)
