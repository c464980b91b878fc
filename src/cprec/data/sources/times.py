"""Reads the times of a log: seconds or a finer unit since 1970, dates as ISO writes them or with dots, or positions
that order a user's events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ibis

from cprec.data.engine import TableEngine
from cprec.data.sources.numbers import exact
from cprec.data.sources.raw import RawTable
from cprec.errors import DataError

MIN_SECONDS = 1e8
"""Smaller numbers (before March 1973) are not times of a log: auto takes them for positions, and asks."""
MAX_SECONDS = 1e11
"""Larger numbers (from the year 5138 on) are not seconds: auto takes them for a finer unit, milliseconds first, then
each unit for numbers 1,000 times as large."""
PER_SECOND = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
LATEST_SECONDS = 4_102_444_800
"""The year 2100. No event happens from then on, or before 1970."""
FIRST_DAY, LAST_DAY = 19_700_101, 21_000_101
"""Days written as one number, year, month and day: the first one of 1970 and of 2100."""
WITH_DOTS = r"^(\d\d?)\.(\d\d?)\.(\d{4})(.*)$"
"""A date as 25.09.2022, the day first, with or without a time."""
NOT_A_TIME = 1e300
"""Numbers from here on are taken for unreadable, smaller ones for times out of range."""
MIXED_SHARE = 0.1
"""Where more of the times than this are of another format, auto asks; fewer are rejected row by row."""

OUT_OF_RANGE = "timestamp before 1970 or after 2099"
COARSER = {
    "milliseconds": "timestamp in seconds among milliseconds",
    "microseconds": "timestamp in a coarser unit among microseconds",
    "nanoseconds": "timestamp in a coarser unit among nanoseconds",
}
TOO_EARLY = "timestamp before March 1973, which auto takes for none"


def is_moment(kind: Any) -> bool:
    """Whether a type of Ibis is that of times or dates."""
    return bool(kind.is_timestamp() or kind.is_date())


def read_times(engine: TableEngine, value: Any, time_format: str) -> tuple[Any, Any]:
    """int64 seconds since 1970 UTC, or positions, and int32 microseconds beyond them.

    Both are null where a value is not of the format.
    """
    if time_format == "iso":
        moment = _moment(value)
        return moment.truncate("s").epoch_seconds().cast("int64"), engine.microsecond(moment).cast("int32")
    number = value.try_cast("float64")
    if time_format == "order":  # positions may have more digits than a float
        floor = exact(number).floor()
        timestamp = ibis.coalesce(floor.cast("int64"), value.try_cast("int64"))
        return timestamp, ibis.coalesce(_microseconds(number - floor, 1), 0).cast("int32")
    per_second = PER_SECOND[time_format]
    seconds = number / per_second
    floor = exact(seconds).floor()
    rest = _microseconds(number - floor * per_second, per_second)
    if time_format == "nanoseconds":  # they have more digits than a float, and no fraction
        whole = value.try_cast("int64")
        beyond = whole % per_second
        floor = ibis.ifelse(whole >= 0, ((whole - beyond) / per_second).round(), floor)
        rest = (beyond / 1000).floor()
    # A number too large for any time is out of range; it is told apart from what cannot be read.
    is_too_large = floor.isnull() & (seconds.abs() < NOT_A_TIME)
    return ibis.ifelse(is_too_large, LATEST_SECONDS, floor.cast("int64")), rest.cast("int32")


def _moment(value: Any) -> Any:
    """A column as times, null where a value is not a date."""
    if value.type().is_timestamp():
        return value
    if value.type().is_string():
        day, month, year, rest = (value.re_extract(WITH_DOTS, group) for group in (1, 2, 3, 4))
        value = ibis.ifelse(value.re_search(WITH_DOTS), year + "-" + month + "-" + day + rest, value)
    return value.try_cast("timestamp('UTC')")


def _microseconds(rest: Any, per_second: int) -> Any:
    """A part of a second in whole microseconds, the nearest one of the same second."""
    return (rest * (10**6 / per_second)).round().clip(0, 999_999)


def time_problem(seconds: Any, time_format: str, *, is_guessed: bool) -> Any:
    """Why a time cannot be that of an event, or null."""
    none = ibis.null("string")
    if time_format == "order":
        return none
    cases = [((seconds < 0) | (seconds >= LATEST_SECONDS), OUT_OF_RANGE)]
    if time_format in COARSER:
        cases.append((seconds < MIN_SECONDS, COARSER[time_format]))
    if time_format == "seconds" and is_guessed:
        cases.append((seconds < MIN_SECONDS, TOO_EARLY))
    return ibis.cases(*cases, else_=none)


# ---- the format ------------------------------------------------------------------------------------------------------


def detect_time_format(engine: TableEngine, domain: str, log: RawTable, column: str) -> str:
    """The format of most values: seconds, a finer unit, or iso.

    Raises DataError where many are of another format, or look like positions.
    """
    value = log.table[column]
    if is_moment(value.type()):
        return "iso"
    number = value.try_cast("float64")
    formats = _formats(value, number)
    summary = log.table.aggregate(
        numbers=number.count(), middle=number.abs().median(), **{name: holds.sum() for name, holds in formats.items()}
    )
    found = engine.row(summary)
    numbers, middle, counts = found["numbers"], found["middle"], {name: found[name] or 0 for name in formats}

    def example(holds: Any) -> str:
        return repr(engine.value(value.cast("string").min(where=holds)))

    where = f"{log.files[0]}: the values of {column} (domain {domain!r})"
    best, *others = sorted(counts, key=lambda name: -counts[name])
    for other in others:
        if counts[other] > MIXED_SHARE * (counts[best] + counts[other]):
            raise DataError(
                f"{where} are of two formats: {counts[best]:,} {best} (as {example(formats[best])}) and "
                f"{counts[other]:,} {other} (as {example(formats[other])}); write all of them alike, or choose one "
                f"with timestamps={best}, which rejects the others"
            )
    if counts.get("iso", 0) > numbers or not numbers or middle is None:
        return "iso"  # where nothing can be parsed, rows are rejected one by one, and the message shows some
    if middle < MIN_SECONDS:
        fix = "If they only order a user's events, say timestamps=order; if they are times, say timestamps=seconds"
        day = exact(number)
        is_day = (day >= FIRST_DAY) & (day < LAST_DAY) & (day == day.floor())
        if engine.value(is_day.sum()) * 2 > numbers:
            fix = f"If they are dates, as {example(is_day)} seems to be, write them as 2014-07-23"
        raise DataError(f"{where} are around {middle:,.0f}: as seconds since 1970 that is not a time of a log. {fix}")
    return best


def _formats(value: Any, number: Any) -> Mapping[str, Any]:
    """Format -> whether each value is of it, by its size, or because it is a date."""
    size = number.abs()
    formats = {
        unit: (size >= MIN_SECONDS * per_second) & (size < MAX_SECONDS * per_second)
        for unit, per_second in PER_SECOND.items()
    }
    if value.type().is_string():
        formats["iso"] = _moment(ibis.ifelse(number.isnull(), value, ibis.null("string"))).notnull()
    return formats
