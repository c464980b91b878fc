"""Settings of where logs come from, which of their rows are kept, and what is held out of training."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Literal, get_args
from urllib.parse import urlsplit

from cprec.errors import ConfigError
from cprec.schema import BRAND, CATEGORIES, DESCRIPTION, ITEM_ID, ORDER, PRICE, RATING, TIMESTAMP, TITLE, USER_ID

INTERACTION_FIELDS = (USER_ID, ITEM_ID, TIMESTAMP, RATING, ORDER)
ITEM_FIELDS = (ITEM_ID, TITLE, BRAND, CATEGORIES, DESCRIPTION, PRICE)
FIELDS = tuple(dict.fromkeys((*INTERACTION_FIELDS, *ITEM_FIELDS)))
"""Every canonical column that a source may have."""

TimeFormat = Literal["auto", "seconds", "milliseconds", "microseconds", "nanoseconds", "iso", "order"]
DecimalSign = Literal["auto", ".", ","]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


# ---- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """The files of one table, with settings of their own."""

    PLAIN: ClassVar = "path"

    path: str | tuple[str, ...]
    """A file, a pattern as logs/part-*.parquet, or several."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where canonical columns have another name in these files; they come before the domain's."""
    names: tuple[str, ...] = ()
    """Of delimited files without a header: the names of their columns, in order."""
    separator: str | None = None
    """Between fields of delimited files; None: as for the domain."""
    quote: str | None = None
    """Around fields of delimited files; None: as for the domain."""
    encoding: str | None = None
    """Of text files; None: as for the domain."""
    decimal: DecimalSign | None = None
    """Of numbers in text; None: as for the domain."""


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """One domain in Parquet, CSV, TSV or JSON-lines files (the suffix tells; .csv, .tsv and .jsonl also with .gz)."""

    domain: str
    """Name of the domain: letters, digits, _ - and dots."""
    platform: str = "default"
    """Users of one platform are the same people in all its domains."""
    interactions: str | tuple[str, ...] | TableFiles
    """The log: a file, a pattern as logs/part-*.parquet, or several; one row per event. With settings of its own:
    {path: orders.csv, columns: {item_id: product}, separator: ";"}."""
    items: str | tuple[str, ...] | TableFiles | None = None
    """The items and their titles: a file, a pattern, several, or those with settings of their own. None: the log itself
    has a title in every row."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where canonical columns (user_id, item_id, timestamp, rating, order, title, brand, categories, description,
    price) have another name in the files, as user_id:customer."""
    timestamps: TimeFormat = "auto"
    """seconds, milliseconds, microseconds or nanoseconds since 1970 (UTC), iso (2014-07-23T18:00:00.250, UTC unless it
    says otherwise; also 23.07.2014), order (numbers, or just the order of rows, that only mean something within one
    user), or auto, which tells all but the last apart. Parts of a second count, down to a microsecond."""
    separator: str | None = None
    """Between fields of delimited files; None: a comma in .csv, a tab in .tsv."""
    quote: str = '"'
    """Around fields of delimited files that hold a separator; empty where quotes are ordinary characters."""
    encoding: str = "utf-8"
    """Of text files, as Python names it: utf-8, windows-1252, latin-1, utf-16 or gb18030, say."""
    decimal: DecimalSign = "auto"
    """Before the decimals of numbers in text: a point, a comma, or auto, which finds it out of each column; what stays
    unclear (is 1,234 above a thousand?) is left out, and counted."""

    def __post_init__(self) -> None:
        check_names(self.domain, self.platform)
        _check_choice("timestamps", self.timestamps, get_args(TimeFormat))
        for name in ("interactions", "items"):
            value = getattr(self, name)
            if value is None:
                continue
            given = value.path if isinstance(value, TableFiles) else value
            paths = tuple(str(path) for path in ((given,) if isinstance(given, (str, os.PathLike)) else given))
            if not paths or not all(paths):
                raise ConfigError(f"{name} of domain {self.domain!r} names no file")
            object.__setattr__(self, name, replace(value, path=paths) if isinstance(value, TableFiles) else paths)
        _check_form(self, "", FIELDS)
        for name, form in self.forms().items():
            if isinstance(getattr(self, name), TableFiles):
                _check_form(form, f"{name}.", self._fields(name))

    def forms(self) -> dict[str, TableFiles]:
        """How each table (interactions, items) is written: its own settings, or else the domain's."""
        return {
            name: self._form(name, own if isinstance(own, TableFiles) else TableFiles(path=own))
            for name, own in (("interactions", self.interactions), ("items", self.items))
            if own is not None
        }

    def _form(self, name: str, own: TableFiles) -> TableFiles:
        shared = {column: source for column, source in self.columns.items() if column in self._fields(name)}
        return replace(
            own,
            columns={**shared, **own.columns},
            separator=self.separator if own.separator is None else own.separator,
            quote=self.quote if own.quote is None else own.quote,
            encoding=own.encoding or self.encoding,
            decimal=own.decimal or self.decimal,
        )

    def _fields(self, name: str) -> tuple[str, ...]:
        """The canonical columns that a table may have; a log without a table of items has those of both."""
        if self.items is None:
            return FIELDS
        return INTERACTION_FIELDS if name == "interactions" else ITEM_FIELDS


@dataclass(frozen=True, kw_only=True)
class RecBoleSource:
    """One domain in RecBole's atomic files."""

    domain: str
    """Name of the domain: letters, digits, _ - and dots."""
    platform: str = "default"
    """Users of one platform are the same people in all its domains."""
    prefix: str
    """The files without .inter and .item, as dataset/ml-100k/ml-100k."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where canonical columns have another name in the files (without its type), as title:movie_name."""
    timestamps: TimeFormat = "auto"
    """seconds, milliseconds, iso, order, or auto; a log without a timestamp column is taken to be in order."""

    def __post_init__(self) -> None:
        check_names(self.domain, self.platform)
        _check_choice("timestamps", self.timestamps, get_args(TimeFormat))
        _check_columns(self.columns)
        object.__setattr__(self, "prefix", str(self.prefix))

    def forms(self) -> dict[str, TableFiles]:
        """How each table (interactions, items) is written."""
        suffixes = {"interactions": "inter", "items": "item"}
        return {
            name: TableFiles(path=f"{self.prefix}.{suffix}", columns=self.columns, separator="\t", quote="")
            for name, suffix in suffixes.items()
        }


FormatName = Literal[
    "amazon-2014",
    "amazon-2018",
    "amazon-2023",
    "movielens-100k",
    "movielens-1m",
    "movielens-20m",
    "movielens-25m",
    "movielens-32m",
    "steam",
    "goodreads",
    "yelp",
    "lastfm-hetrec",
    "online-retail",
]

_PLATFORMS = {"lastfm-hetrec": "lastfm", "online-retail": "online-retail"}
"""The platform of a public data set, where it is not its name up to the first dash."""

_EXAMPLE_CATEGORIES = {"amazon": "Gift_Cards", "goodreads": "poetry"}
"""Platforms whose data sets have one pair of files for each category, and a category as its files name it."""


@dataclass(frozen=True, kw_only=True)
class PublicSource:
    """A public data set in its own files."""

    format: FormatName
    """Which data set, and which year or size of it."""
    folder: str
    """The folder with its files; with `download`, where they go."""
    category: str | None = None
    """Amazon and Goodreads: the category as their files name it, as Gift_Cards."""
    domain: str = ""
    """Name of the domain; empty: made of the format and the category."""
    platform: str = ""
    """Users of one platform are the same people in all its domains; empty: the data set's own."""
    download: bool = False
    """Fetch the files that are missing. You must agree to the data set's licence, which is shown."""

    def __post_init__(self) -> None:
        _check_choice("format", self.format, get_args(FormatName))
        own_platform = _PLATFORMS.get(self.format, self.format.partition("-")[0])
        self._check_category(_EXAMPLE_CATEGORIES.get(own_platform))
        if not self.domain:
            name = f"{self.format}_{self.category}" if self.category else self.format
            object.__setattr__(self, "domain", re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"))
        if not self.platform:
            object.__setattr__(self, "platform", own_platform)
        check_names(self.domain, self.platform)

    def _check_category(self, example: str | None) -> None:
        if example and not self.category:
            raise ConfigError(f"format={self.format} needs a category as its files name it, as category={example}")
        if self.category and not example:
            raise ConfigError(f"format={self.format} has no categories: leave category={self.category!r} out")
        if self.category and not re.fullmatch("[A-Za-z0-9_]+", self.category):
            raise ConfigError(
                f"category={self.category!r}: write it as the names of its files have it, without suffixes and spaces, "
                f"as {example}"
            )


@dataclass(frozen=True, kw_only=True)
class ConnectionSource:
    """One domain in two tables, or two queries, of a database or warehouse."""

    domain: str
    """Name of the domain: letters, digits, _ - and dots."""
    platform: str = "default"
    """Users of one platform are the same people in all its domains."""
    url: str
    """What Ibis connects to, as duckdb://shop.db or postgres://user@host/database. $NAME is the environment variable of
    that name: write passwords so, because settings are recorded."""
    interactions: str
    """The log: a table, schema.table, or any query that the database takes; one row per event."""
    items: str
    """The items and their titles: a table, schema.table, or a query."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where canonical columns (user_id, item_id, timestamp, rating, order, title, brand, categories, description,
    price) have another name, as user_id:customer."""
    timestamps: TimeFormat = "auto"
    """seconds, milliseconds, microseconds, nanoseconds, iso (dates and timestamps of the database too), order, or
    auto."""

    def __post_init__(self) -> None:
        check_names(self.domain, self.platform)
        _check_columns(self.columns)
        _check_choice("timestamps", self.timestamps, get_args(TimeFormat))
        if "://" not in self.url:
            raise ConfigError(
                f"url={self.url!r} is no address: write it as duckdb://shop.db or postgres://user@host/db"
            )
        if (password := urlsplit(self.url).password) and "$" not in password:
            raise ConfigError(
                "url holds a password, and settings are recorded: put it into an environment variable and write its "
                "name, as postgres://user:$PGPASSWORD@host/db"
            )

    @property
    def shown(self) -> str:
        """The address without its options."""
        return self.url.partition("?")[0]


MAX_SYNTHETIC_ITEMS = 66_240
"""Different titles of a synthetic domain: 20 brands, 12 kinds, and each of the 276 pairs of 24 quality words."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The synthetic world: market (beauty, garden, kitchen, sports, toys) and library (books, films).

    The strengths were set by reason, not by any method's results: a matching word of taste, habit or signal makes an
    item about seven times as likely (e ** 2), all alike; popularity is milder, so that ranking by it alone is weak.
    """

    num_market_users: int = 3000
    """Users of the platform market."""
    num_library_users: int = 1200
    """Users of the platform library; none of them is a user of market."""
    items_per_domain: int = 300
    """Items of each domain."""
    min_events: int = 5
    """Fewest events of a user in a domain that the user is active in."""
    max_events: int = 9
    """Most events of a user in a domain; numbers between are equally likely."""
    domain_share: float = 0.8
    """Chance that a user is active in a domain of the platform; everyone is active in one at least."""
    popularity_strength: float = 0.5
    """Exponent of Zipf's law over a domain's items; 0 makes all equally popular."""
    taste_strength: float = 2.0
    """Log-odds that an item gains by each quality word, and by the brand, that the user loves."""
    habit_strength: float = 2.0
    """Log-odds that an item gains if its kind often follows the kind of the user's latest item in the domain."""
    cross_domain_strength: float = 2.0
    """Log-odds that an item gains by each quality word it shares with the user's latest item in the domain that
    triggers its own; 0 removes the planted signal."""
    seed: int = 0
    """Decides catalogues, users and events."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_events <= self.max_events:
            raise ConfigError(
                f"min_events={self.min_events} must be at least 1 and at most max_events={self.max_events}"
            )
        if not self.max_events < self.items_per_domain <= MAX_SYNTHETIC_ITEMS:
            raise ConfigError(
                f"items_per_domain={self.items_per_domain} must be more than max_events={self.max_events}, because no "
                f"user has an item twice, and at most {MAX_SYNTHETIC_ITEMS}, the number of different titles"
            )
        if min(self.num_market_users, self.num_library_users) < 1:
            raise ConfigError(
                f"num_market_users={self.num_market_users} and num_library_users={self.num_library_users} must be at "
                "least 1"
            )
        if not 0 < self.domain_share <= 1:
            raise ConfigError(f"domain_share={self.domain_share} must be above 0 and at most 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be at least 0")
        for name in ("popularity_strength", "taste_strength", "habit_strength", "cross_domain_strength"):
            if not 0 <= getattr(self, name) <= 50:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0..50")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the logs come from."""

    tables: tuple[TableSource, ...] = ()
    """Domains in Parquet, CSV or JSONL files, one entry each."""
    recbole: tuple[RecBoleSource, ...] = ()
    """Domains in RecBole's atomic files, one entry each."""
    public: tuple[PublicSource, ...] = ()
    """Public data sets in their own files, one entry each."""
    connections: tuple[ConnectionSource, ...] = ()
    """Domains in a database or warehouse, one entry each."""
    synthetic: SyntheticConfig | None = None
    """The synthetic world, for trying things out."""
    text: tuple[str, ...] = ()
    """Files of text (.jsonl, .parquet, .txt; patterns too) in place of all logs: a folder to train a base model on,
    without users and items."""

    def __post_init__(self) -> None:
        logs = self.tables or self.recbole or self.public or self.connections or self.synthetic
        if not (logs or self.text):
            raise ConfigError(
                "no source of data: give tables=..., recbole=..., public=..., connections=... or synthetic=... (see "
                "`cprec prepare --help`)"
            )
        if logs and self.text:
            raise ConfigError(
                f"text={', '.join(self.text)} stands beside logs: pre-training reads general text with them by "
                "pretrain.replay; a folder of text holds nothing else"
            )


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which rows of the logs are kept, and in what order."""

    k_core: int = 5
    """Users and items with fewer events in a domain are left out, repeatedly; 0 keeps all."""
    k_core_scope: Literal["domain", "pooled"] = "domain"
    """What counts as a user's events for k_core: those of the domain, or of all domains of the platform."""
    deduplicate: bool = True
    """Events of the same user, item and time count once."""
    drop_consecutive_repeats: bool = True
    """Leave out an event of the same item as the user's event before."""
    tie_order: Literal["source", "item_id", "shuffle"] = "source"
    """Order of a user's events of equal time. It decides held-out events where times are coarse."""
    strict: bool = False
    """Stop at the first bad row instead of setting it aside in rejected.parquet."""

    def __post_init__(self) -> None:
        if self.k_core < 0:
            raise ConfigError(f"k_core={self.k_core} must be at least 0")
        _check_choice("k_core_scope", self.k_core_scope, ("domain", "pooled"))
        _check_choice("tie_order", self.tie_order, ("source", "item_id", "shuffle"))


# ---- splits ----------------------------------------------------------------------------------------------------------

LEAVE_ONE_OUT = "leave-one-out"
LAST_N = "last-n"
GLOBAL_TIME = "global-time"
METHODS = (LEAVE_ONE_OUT, LAST_N, GLOBAL_TIME)


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """What is held out of training, in every domain."""

    method: Literal["leave-one-out", "last-n", "global-time"] = "leave-one-out"
    """leave-one-out: of each user and domain the last event tests and the one before validates. last-n: the last
    num_test events test and the num_validation before them validate. global-time: two dates, the same in all
    domains."""
    num_validation: int | None = None
    """last-n: events of each user and domain that validate, 1 unless given."""
    num_test: int | None = None
    """last-n: events of each user and domain that test, the latest ones, 1 unless given."""
    validation_fraction: float | None = None
    """global-time: share of all events that validate, 0.1 unless the dates are given."""
    test_fraction: float | None = None
    """global-time: share of all events that test, the latest ones, 0.1 unless the dates are given."""
    validation_from: str | None = None
    """global-time: first moment of validation, ISO date or date and time (UTC), in place of the fractions."""
    test_from: str | None = None
    """global-time: first moment of test, ISO date or date and time (UTC), in place of the fractions."""

    unseen_user_share: float = 0.0
    """Share of users (by hash of the seed and the user) nothing of whom trains, in any domain: their events before the
    held-out ones are only shown as history. Their validation queries are among those that validate."""

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        fractions = {name: getattr(self, name) for name in ("validation_fraction", "test_fraction")}
        dates = {name: getattr(self, name) for name in ("validation_from", "test_from")}
        given = [name for name, value in (fractions | dates).items() if value is not None]
        if self.method != GLOBAL_TIME and given:
            raise ConfigError(f"{given[0]} means something for method={GLOBAL_TIME} only, not for {self.method}")
        self._check_numbers()
        for name, fraction in fractions.items():
            if fraction is not None and not 0 < fraction < 1:
                raise ConfigError(f"{name}={fraction} must lie between 0 and 1")
        if sum(self.fractions()) >= 1:
            raise ConfigError(
                f"validation_fraction and test_fraction sum to {sum(self.fractions())}: nothing would train"
            )
        has_date = [name for name, value in dates.items() if value is not None]
        if len(has_date) == 1 or (has_date and len(given) > len(has_date)):
            raise ConfigError("give validation_from and test_from together, and no fractions beside them; or no dates")
        if has_date:
            validation, test = self.dates()
            if not validation < test:
                raise ConfigError(f"validation_from={self.validation_from} must be before test_from={self.test_from}")

    def _check_numbers(self) -> None:
        for name in ("num_validation", "num_test"):
            number = getattr(self, name)
            if number is not None and self.method != LAST_N:
                raise ConfigError(f"{name} means something for method={LAST_N} only, not for {self.method}")
            if number is not None and number < 1:
                raise ConfigError(f"{name}={number} must be at least 1")
        if not 0 <= self.unseen_user_share < 1:
            raise ConfigError(f"unseen_user_share={self.unseen_user_share} must lie between 0 and 1")

    def numbers(self) -> tuple[int, int]:
        """Events of each user and domain that validate and that test, where they are counted from the end."""
        return self.num_validation or 1, self.num_test or 1

    def fractions(self) -> tuple[float, float]:
        """Shares of events that validate and that test."""
        return (
            0.1 if self.validation_fraction is None else self.validation_fraction,
            0.1 if self.test_fraction is None else self.test_fraction,
        )

    def dates(self) -> tuple[int, int]:
        """`validation_from` and `test_from` in microseconds since 1970 UTC."""
        return _microseconds("validation_from", self.validation_from), _microseconds("test_from", self.test_from)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _microseconds(name: str, text: str | None) -> int:
    """An ISO date, or date and time, in microseconds since 1970 UTC."""
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        raise ConfigError(f"{name}={text!r} is no ISO date; write 2014-07-23 or 2014-07-23T18:00:00") from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime.fromtimestamp(0, UTC)
    return since // timedelta(microseconds=1)


def check_names(domain: str, platform: str) -> None:
    """Raise ConfigError unless a domain and a platform can name folders and queries."""
    for what, name in (("domain", domain), ("platform", platform)):
        if not _NAME.fullmatch(name):
            suggestion = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-") or "shop"
            raise ConfigError(
                f"{what}={name!r}: use letters, digits, _ - and dots, beginning with a letter or digit: "
                f"{suggestion!r}, say"
            )


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ConfigError(f"{name}={value!r}: expected {', '.join(accepted)}")


def _check_columns(columns: Mapping[str, str]) -> None:
    if unknown := sorted(set(columns) - set(FIELDS)):
        raise ConfigError(f"columns maps {', '.join(unknown)}; canonical columns are {', '.join(FIELDS)}")


def _check_form(form: TableSource | TableFiles, key: str, fields: Sequence[str]) -> None:
    """Raise ConfigError for settings of a table, or of a whole domain, that cannot be.

    `key` stands before the names of the settings in messages, as `items.`; it is empty for those of the domain.
    """
    if unknown := sorted(set(form.columns) - set(fields)):
        raise ConfigError(
            f"{key}columns maps {', '.join(unknown)}, which is not canonical{f' in the {key[:-1]}' if key else ''}; "
            f"canonical columns (on the left of each pair) are {', '.join(fields)}"
        )
    if form.separator == "":
        raise ConfigError(f"{key}separator is empty; give the character between fields, or none for the usual one")
    between, quote = form.separator or ",", form.quote or ""
    if len(quote) > 1 or any(sign in between + quote for sign in "\r\n\0") or between in quote:
        raise ConfigError(
            f"{key}separator={form.separator!r}, {key}quote={form.quote!r}: the quote is one character or none, the "
            "separator is another, and neither ends a line"
        )
    if not _is_encoding(form.encoding or "utf-8"):
        raise ConfigError(
            f"{key}encoding={form.encoding!r} is no encoding of text that Python has; write utf-8, windows-1252, "
            "latin-1, utf-16 or gb18030, say"
        )
    if form.decimal not in (None, *get_args(DecimalSign)):
        raise ConfigError(f"{key}decimal={form.decimal!r}: expected auto, a point or a comma")
    names = [name.lower() for name in getattr(form, "names", ())]
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise ConfigError(f"{key}names={','.join(names)}: every column needs a name of its own (case does not count)")


def _is_encoding(name: str) -> bool:
    """Whether Python has an encoding of text with this name."""
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        return False
    return True
