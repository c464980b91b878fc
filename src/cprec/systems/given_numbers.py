"""Numbers of items from a file, and a check that they do not know held-out events.

The numbers of the first P5 (Geng et al. 2022) were given out along whole histories, as Rajput et al. 2023 report, so
that a test item that nobody had before stands right behind the item before it: a model copies a number and adds one. A
hash in the file says which training events it was made of. That stops numbers of another split, but it is only what the
file says, so the numbers themselves are checked as well.

The check looks at held-out steps from an item to the next that no training user had both of: training cannot know that
the two belong together. Numbers that are made of training events, titles or categories put like items near each other,
and likeness fades from place to place. So of the steps that go at most `NEAR` places up or down, about one in ten goes
to the very next place, and in a list sorted by title nearly one in five. Numbers along whole histories put nine in ten
there. Refused are numbers for which it would be improbable (`IMPROBABLE`) if three in ten did. The order of places is
that of the codes, compared one after the other.

The check finds numbers along histories, not every leak: clusters of whole histories pass, and so does all where few
steps are new (dense logs, small domains). Numbers that systems make themselves need no check, because they are made of
training sequences alone.

Suffixes: V items, P steps, L codes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.special import bdtrc

from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import Split
from cprec.errors import ConfigError, LeakageError
from cprec.schema import TEST, VALIDATION
from cprec.systems.signals import TrainingSequences

NEAR = 5
"""Places up or down that count as near."""
ALLOWED = 0.3
"""Share of near steps that may go to the next place."""
IMPROBABLE = 1e-6
"""Chance below which it is not luck."""


def write_numbers(path: str | Path, data: TrainingSequences, codes: Ragged) -> None:
    """Write the codes of a domain's items, which were made of these training sequences alone."""
    code_VL = np.full((len(codes), int(codes.lengths.max())), -1)
    code_VL[codes.row_of, codes.place_of] = codes.values
    np.savez(path, item_id=np.array(data.item_ids), codes=code_VL, fitted_on=np.array(data.digest()))


def read_numbers(path: str | Path, data: TrainingSequences) -> Ragged:
    """The codes of a domain's items from an .npz file with `item_id`, `codes` (whole numbers from 0, a row for each,
    filled up with -1 on the right) and `fitted_on` (`TrainingSequences.digest` of what they were made of).

    Raises ConfigError for a file that holds something else, lacks an item or has two items of equal codes, and
    LeakageError where it does not say that it was made of these training sequences.
    """
    try:
        with np.load(path) as file:
            ids, code_VL = [str(item) for item in file["item_id"].tolist()], file["codes"]
            fitted_on = str(file["fitted_on"]) if "fitted_on" in file else ""
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"numbers={path} is not an .npz file with item_id, codes and fitted_on ({error})") from None
    if fitted_on != data.digest():
        says = f"says {fitted_on[:12]}..." if fitted_on else "does not say (fitted_on)"
        raise LeakageError(
            f"numbers={path} {says} which training events it was made of, and those of domain {data.domain!r} are "
            f"{data.digest()[:12]}...: numbers that were made of others may know held-out events. Make them of this "
            "split's training events (given_numbers.write_numbers notes the hash)"
        )
    if code_VL.ndim != 2 or code_VL.dtype.kind != "i" or len(code_VL) != len(ids):
        raise ConfigError(
            f"numbers={path} holds {len(ids):,} item_id and codes of shape {list(code_VL.shape)}, {code_VL.dtype}: "
            "expected a row of whole numbers for each item_id"
        )
    row_of = {item: row for row, item in enumerate(ids)}
    if missing := [item for item in data.item_ids if item not in row_of]:
        raise ConfigError(f"numbers={path} has no codes of {len(missing):,} items, {missing[0]!r} among them")
    code_VL = code_VL[[row_of[item] for item in data.item_ids]].astype(np.int64)
    is_code = code_VL >= 0
    if (code_VL < -1).any() or not is_code[:, :1].all() or (is_code[:, 1:] & ~is_code[:, :-1]).any():
        raise ConfigError(
            f"numbers={path}: codes are whole numbers from 0, one at least, and -1 stands only behind them"
        )
    codes = Ragged(code_VL[is_code], offsets_of(is_code.sum(1)))
    if num_alike := len(codes) - len(np.unique(codes.numbers())):
        raise ConfigError(f"numbers={path}: codes must tell items apart, but {num_alike:,} are those of another item")
    return codes


def check_numbers(path: str | Path, split: Split, domain: str) -> None:
    """Raise what `read_numbers` and `check_places` do for a file of numbers."""
    check_places(places_of(read_numbers(path, TrainingSequences.of(split, domain))), split, domain)


def places_of(codes: Ragged) -> np.ndarray:
    """The place of each item in the order of the codes: int64[V].

    >>> places_of(Ragged.of([[1], [0, 7], [0]])).tolist()
    [2, 1, 0]
    """
    place_V = np.empty(len(codes), dtype=np.int64)
    place_V[sorted(range(len(codes)), key=lambda item: codes[item].tolist())] = np.arange(len(codes))
    return place_V


def steps_not_in_training(split: Split, domain: str) -> np.ndarray:
    """Held-out events of a domain with the event before each of them, items that no training user had both of: int64[P,
    2], as items are numbered in the domain."""
    first = int(split.catalogue.rows_of(domain)[0])
    asked = [split.queries(domain, part, max_history=1) for part in (VALIDATION, TEST)]
    steps_P2 = np.concatenate([np.stack([each.history.values, each.target], axis=1) for each in asked]) - first
    train, num_items = split.train, len(split.catalogue.rows_of(domain))
    mine = split.catalogue.domain[train.item] == split.catalogue.domain_index(domain)
    events = train.item[mine] - first, train.user[mine]
    had_VU = sparse.csr_array((np.ones(len(events[0])), events), (num_items, int(train.user.max(initial=0)) + 1))
    num_both_P = had_VU[steps_P2[:, 0]].multiply(had_VU[steps_P2[:, 1]]).sum(axis=1)
    return steps_P2[(num_both_P == 0) & (steps_P2[:, 0] != steps_P2[:, 1])]


def check_places(place_V: np.ndarray, split: Split, domain: str) -> None:
    """Raise LeakageError where the places of items show that histories were numbered with their held-out events."""
    before_P, after_P = place_V[steps_not_in_training(split, domain)].T
    step_P = after_P - before_P
    num_near, num_next = int((np.abs(step_P) <= NEAR).sum()), int((step_P == 1).sum())
    if num_next and bdtrc(num_next - 1, num_near, ALLOWED) < IMPROBABLE:
        raise LeakageError(
            f"the numbers of domain {domain!r} know held-out events: of {num_near:,} held-out steps to an item at most "
            f"{NEAR} places away, which no training history has, {num_next:,} go to the very next place, where at most "
            f"{ALLOWED:.0%} would by likeness. They were given out along whole histories: number the training events "
            "alone"
        )
