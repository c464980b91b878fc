"""Keys and values of prompts that were read before: a user who comes back costs only what is new."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import torch

STEP = 16
"""Prompts are found by beginnings whose length is a multiple of this; a shorter common beginning is read again."""


class PrefixCache:
    """Prompts by their beginnings, within `max_bytes`; the one used longest ago goes first.

    It belongs to one model. Prompts share a long beginning while a history grows at its end. Once each new event pushes
    out the oldest one, they share little more than the instruction.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        """Tokens that were found here and not read again."""
        self._entries: OrderedDict[bytes, tuple[np.ndarray, torch.Tensor, torch.Tensor]] = OrderedDict()
        self._owner: dict[bytes, bytes] = {}  # beginning -> entry that has it

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: np.ndarray) -> tuple[int, tuple[torch.Tensor, torch.Tensor] | None]:
        """The longest known beginning, without the last token, and its keys and values [layers, G, T, D].

        The last token is always read, because what follows depends on its hidden state.
        """
        for name in reversed(_beginnings(prompt[:-1])):
            owner = self._owner.get(name)
            if owner is not None:
                self._entries.move_to_end(owner)
                known, keys, values = self._entries[owner]
                size = min(len(known), len(prompt) - 1)
                differs = known[:size] != prompt[:size]
                length = int(differs.argmax()) if differs.any() else size
                self.hits += length
                return length, (keys, values)
        return 0, None

    def put(self, prompt: np.ndarray, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep a prompt's keys and values [layers, G, T, D]; one that is larger than the whole cache is not kept."""
        names = _beginnings(prompt)
        size = keys.nbytes + values.nbytes
        if not names or size > self.max_bytes:
            return
        own = hashlib.blake2b(np.ascontiguousarray(prompt, dtype=np.int64).tobytes(), digest_size=16).digest()
        if own in self._entries:
            self._entries.move_to_end(own)
            return
        while self.num_bytes + size > self.max_bytes:
            gone, (old, *tensors) = self._entries.popitem(last=False)
            self.num_bytes -= sum(tensor.nbytes for tensor in tensors)
            for name in _beginnings(old):
                if self._owner.get(name) == gone:
                    del self._owner[name]
        self._entries[own] = (np.array(prompt), keys, values)
        self.num_bytes += size
        for name in names:
            self._owner[name] = own


def _beginnings(tokens: np.ndarray) -> list[bytes]:
    """Hashes of a prompt's beginnings, shortest first."""
    digest = hashlib.blake2b(digest_size=16)
    out = []
    for start in range(0, len(tokens) - STEP + 1, STEP):
        piece = np.ascontiguousarray(tokens[start : start + STEP], dtype=np.int64)
        digest.update(piece.tobytes())
        out.append(digest.copy().digest())
    return out
