"""The names of recommenders."""

from __future__ import annotations

from cprec.lineup import ALL, LINEUP, names_of


def test_every_row_can_be_asked_for_on_the_command_line() -> None:
    """There a comma stands between names."""
    assert names_of(",".join(reversed(LINEUP)).split(",")) == names_of([ALL]) == list(LINEUP)
