"""The share of one job where a scheduler runs the same command several times: `partition=i/n`."""

from __future__ import annotations

from cprec.errors import ConfigError


def share_of(partition: str | None) -> tuple[int, int]:
    """A partition as numbers: (0, 1) where there is none.

    >>> share_of("2/4"), share_of(None)
    ((2, 4), (0, 1))
    """
    number, slash, count = (partition or "0/1").partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"partition={partition!r}: write i/n with i from 0 to n-1, as 0/4")
    return int(number), int(count)
