"""What users say that they like, in words: texts from a file, or keywords of their own earlier events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, LeakageError
from cprec.systems.batches import Passes
from cprec.systems.signals import TrainingSequences, windows
from cprec.systems.words import Told, WordedCodes, WordedRecommender, WordedStream, Words

Shown = Literal["last", "random"]
"""Which of the preferences of a user a ranking reads."""
Taught = Literal["last", "random", "nearest"]
"""Which of them a training row reads: `nearest` has most words in common with its first target."""

Stated = Mapping[str, Sequence[tuple[int, str]]]
"""By user the preferences, each with the number of events of the user's that it was made after, which never falls."""


def read_preferences(path: str | Path, data: TrainingSequences, setting: str = "preferences") -> Stated:
    """Preferences from a file of lines `{"user": "platform/id", "after": 3, "text": "..."}`, where `after` is how many
    of the user's events in the domain there were when it was made. Errors name the `setting` that the file is of.

    Raises ConfigError for a line that is something else, a user without training events and a file without a line, and
    LeakageError for a preference that was made after more events than there are in training: it knows held-out ones.
    """
    num_events = dict(zip(data.users, data.sequences.lengths.tolist(), strict=True))
    found: dict[str, list[tuple[int, str]]] = {}
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}={path} cannot be read: {error}") from None
    # Not `splitlines`: a text may hold other characters that end lines.
    lines = content.removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, 1):
        try:
            parts = json.loads(line)
            user, after, text = parts["user"], parts["after"], parts["text"]
            if type(after) is not int or after < 0 or not isinstance(text, str):
                raise ValueError("after must be a whole number from 0, and text a text")
            if user not in num_events:
                raise ValueError(f"user {user!r} has no training event in {data.domain!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{setting}={path}, line {number}: {error}; expected user, after and text") from None
        if after > num_events[user]:
            raise LeakageError(
                f"{setting}={path}, line {number}: it was made after {after} events of user {user!r}, who has "
                f"{num_events[user]} in training: it knows held-out events. Leave it out"
            )
        found.setdefault(user, []).append((after, text))
    if not found:
        raise ConfigError(f"{setting}={path} has no line")
    return {user: sorted(rows, key=lambda row: row[0]) for user, rows in found.items()}


class Preferences:
    """The preferences of users, as words, oldest first. Without a file each event makes one, of the words of its item
    that weigh most."""

    def __init__(self, words: Words, stated: Stated | None) -> None:
        self._from_events = stated is None
        if stated is not None:
            words.read_some([text for rows in stated.values() for _, text in rows], "preferences")
        self._stated = {
            user: (np.array([after for after, _ in rows]), words.read([text for _, text in rows]))
            for user, rows in (stated or {}).items()
        }

    def of(self, user: str | None, items: np.ndarray, of_items: Ragged, num_events: int | None = None) -> Ragged:
        """Those of a user whose latest events were of these items, with words `of_items`, and who had so many events
        in the domain; None: all those of training, or more."""
        if self._from_events:
            return of_items.take(items)
        after, words = self._stated.get(user or "", (np.empty(0), Ragged.of([])))
        known = len(after) if num_events is None else np.searchsorted(after, num_events, side="right")
        return words.take(np.arange(known))


@dataclass(frozen=True, kw_only=True)
class PreferenceCodes(WordedCodes):
    """Codes of items, the words of their texts, and the preferences of users."""

    preferences: Preferences


def chosen(words: Ragged, which: Taught, generator: np.random.Generator, target: np.ndarray) -> np.ndarray:
    """One of some preferences, by the words of the target if it is to be the nearest to it; of equals the last. Nothing
    where there is none."""
    if not len(words):
        return np.empty(0, dtype=np.int64)
    if which == "nearest":
        num_common = np.add.reduceat(np.append(np.isin(words.values, target), False), words.offsets[:-1], dtype=int)
        num_common[words.lengths == 0] = 0
        return words[len(words) - 1 - int(num_common[::-1].argmax())]
    return words[int(generator.integers(len(words))) if which == "random" else len(words) - 1]


class PreferenceStream(WordedStream):
    """Windows of training sequences behind a preference that is older than what is learnt: in each step a row is cut
    at a place that is drawn, one of the preferences made before it is read, and the items from the cut on are learnt.
    """

    def __init__(
        self, data: TrainingSequences, codes: PreferenceCodes, max_length: int, passes: Passes, taught: Taught
    ) -> None:
        super().__init__(windows(data.sequences, max_length), codes, passes)
        self._preferences, self._of_items, self._taught = codes.preferences, codes.of_items, taught
        events = windows(Ragged(np.arange(len(data.sequences.values)), data.sequences.offsets), max_length)
        first_R = events.values[events.offsets[:-1]]
        self._users = [data.users[user] for user in data.sequences.row_of[first_R]]
        self._before_R = data.sequences.place_of[first_R]

    def told(self, members: np.ndarray, generator: np.random.Generator) -> Told:
        """See `WordedStream.told`."""
        items, rows = self._rows.take(members), []
        cut_R = generator.integers(1, items.lengths)
        for row, (member, cut) in enumerate(zip(members, cut_R, strict=True)):
            history, target = items[row][:cut], items[row][cut]
            num_events = int(self._before_R[member] + cut)
            known = self._preferences.of(self._users[member], history, self._of_items, num_events)
            rows.append(chosen(known, self._taught, generator, self._of_items[target]))
        return Told(Ragged.of(rows), items, cut_R)


class PreferenceRecommender(WordedRecommender):
    """Ranks by the codes after a preference and a history: that of the query's text, or one of the user's own past."""

    def __init__(
        self, name: str, data: TrainingSequences, codes: PreferenceCodes, model: Any, shown: Shown, **ranking: Any
    ) -> None:
        """`ranking`: see `SequenceRecommender`."""
        super().__init__(name, data, codes, model, **ranking)
        self._preferences, self._shown = codes.preferences, shown

    def without_text(self, history: np.ndarray, user: str | None) -> np.ndarray:
        """See `WordedRecommender.without_text`. A draw depends on the history alone."""
        known = self._preferences.of(user, history, self._of_items)
        return chosen(known, self._shown, np.random.default_rng([0, *history]), np.empty(0, dtype=np.int64))
