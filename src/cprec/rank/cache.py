"""Keys and values of prompts that were read before: a user who comes back costs only what is new."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import torch

STEP = 16
"""Beginnings are known at multiples of so many tokens, and at a prompt's full length."""


class PrefixCache:
    """Prompts by their beginnings, within `max_bytes`; the one used longest ago goes first.

    It belongs to one model. Prompts of histories that grow at their end share their beginnings; those that lose their
    oldest event at each new one share little more than the instruction.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        """Tokens that were found and needed no reading."""
        self._entries: OrderedDict[bytes, tuple[np.ndarray, torch.Tensor, torch.Tensor]] = OrderedDict()
        self._owner: dict[bytes, bytes] = {}  # beginning -> entry that has it

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: np.ndarray) -> tuple[int, tuple[torch.Tensor, torch.Tensor] | None]:
        """The longest beginning that is known, but for the last token, and its keys and values [layers, G, T, D].

        The last token is always read, for its hidden state is what the titles follow.
        """
        for length, name in reversed(_beginnings(prompt[:-1])):
            entry = self._entries.get(self._owner.get(name, b""))
            if entry is not None:
                self._entries.move_to_end(self._owner[name])
                self.hits += length
                return length, entry[1:]
        return 0, None

    def put(self, prompt: np.ndarray, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep a prompt's keys and values [layers, G, T, D]; one that is larger than the whole cache is not kept."""
        names = _beginnings(prompt)
        size = keys.nbytes + values.nbytes
        if not names or size > self.max_bytes:
            return
        own = names[-1][1]
        if own in self._entries:
            self._entries.move_to_end(own)
            return
        while self.num_bytes + size > self.max_bytes:
            gone, (old, *tensors) = self._entries.popitem(last=False)
            self.num_bytes -= sum(tensor.nbytes for tensor in tensors)
            for _, name in _beginnings(old):
                if self._owner.get(name) == gone:
                    del self._owner[name]
        self._entries[own] = (np.array(prompt), keys, values)
        self.num_bytes += size
        for _, name in names:
            self._owner[name] = own


def _beginnings(tokens: np.ndarray) -> list[tuple[int, bytes]]:
    """Lengths and hashes of a prompt's beginnings, shortest first."""
    digest = hashlib.blake2b(digest_size=16)
    out = []
    for start in range(0, len(tokens), STEP):
        piece = np.ascontiguousarray(tokens[start : start + STEP], dtype=np.int64)
        digest.update(piece.tobytes())
        out.append((start + len(piece), digest.copy().digest()))
    return out
