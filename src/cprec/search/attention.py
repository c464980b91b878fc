"""A decoder that reads each prompt once, and then any tree of continuations: no key or value is copied for a beam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from cprec.distributed import autocast
from cprec.inspection import output_scale
from cprec.models import attending_by, trunk_and_head
from cprec.search.cache import PrefixCache
from cprec.search.finite import require_finite

PROMPT_TREE = "prompt_tree"
"""The name under which transformers knows the attention."""
LOGITS = 1 << 25
"""Logits made at once."""
STATES = 64
"""States whose logits of given tokens are made at once."""


class PromptTree:
    """Prompts of several users and the continuations tried for each.

    A node, which is one more token, attends to its user's prompt, its ancestors and itself. Prompts keep their keys and
    values in one grid, nodes theirs in one flat buffer; a node knows the places of its ancestors there.
    U users, T prompt positions (padded on the right), M new nodes, P longest path, H heads in G groups of h, D width.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[np.ndarray],
        *,
        bf16: bool = False,
        pad_id: int = 0,
        cache: PrefixCache | None = None,
    ) -> None:
        """Reads the prompts, of at least one token each. Beginnings that `cache` knows are not read again."""
        AttentionInterface.register(PROMPT_TREE, _attend)
        AttentionMaskInterface.register(PROMPT_TREE, lambda *_, **__: None)
        self._trunk, self._head = trunk_and_head(model)
        self._scale = output_scale(model)
        self._device = next(model.parameters()).device
        self._bf16 = bf16
        self._keys: dict[int, torch.Tensor] = {}  # by layer: [U, G, T, D]
        self._values: dict[int, torch.Tensor] = {}
        self._nodes: dict[int, torch.Tensor] = {}  # by layer: [places, keys and values, G, D]
        self._paths = torch.zeros(0, 1, dtype=torch.long, device=self._device)  # [nodes, P]: ancestors, then itself
        self._depths = torch.zeros(0, dtype=torch.long, device=self._device)  # of each node, 0 right after the prompt
        self.num_nodes = 0
        self.num_read = 0
        """Prompt tokens that were read, and not found in the cache."""
        self.prompts = prompts
        self.users: torch.Tensor | None = None
        """The prompt, by number, of each node that is being read: [M]; None while prompts are read."""
        self._read(prompts, pad_id, cache)

    def _read(self, prompts: Sequence[np.ndarray], pad_id: int, cache: PrefixCache | None) -> None:
        """One pass over what is new of each prompt, behind what the cache has of it."""
        lengths = np.array([len(prompt) for prompt in prompts])
        known = [cache.find(prompt) if cache is not None else (0, None) for prompt in prompts]
        start = np.array([length for length, _ in known])
        new = lengths - start
        self.num_read = int(new.sum())
        # The new ends, side by side from the left, whatever stands before each.
        ids = np.full((len(prompts), int(new.max())), pad_id, dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : new[row]] = prompt[start[row] :]
        self._lengths = torch.from_numpy(lengths).to(self._device)
        self._padded = bool((lengths != lengths.max()).any())
        self._start = torch.from_numpy(start).to(self._device) if start.any() else None
        if self._start is not None:
            self._place_known([entry for _, entry in known], start, int((start + ids.shape[1]).max()))
        positions = torch.from_numpy(start[:, None] + np.arange(ids.shape[1])).to(self._device)
        hidden = self._forward(torch.from_numpy(ids).to(self._device), positions)
        if self._start is not None:
            # A long known beginning beside a long new end leaves room behind all prompts: cut it off.
            longest = int(lengths.max())
            for grids in (self._keys, self._values):
                grids.update({layer: grid[:, :, :longest].contiguous() for layer, grid in grids.items()})
        # What follows a prompt depends on the state of its last token.
        rows = torch.arange(len(prompts), device=self._device)
        self.prompt_hidden_UD = hidden[rows, torch.from_numpy(new - 1).to(self._device)]
        for row, prompt in enumerate(prompts if cache is not None else ()):
            assert cache is not None
            keys, values = (
                torch.stack([grids[layer][row, :, : len(prompt)] for layer in sorted(grids)])
                for grids in (self._keys, self._values)
            )
            cache.put(prompt, keys, values)

    def _place_known(
        self, entries: Sequence[tuple[torch.Tensor, torch.Tensor] | None], start: np.ndarray, length: int
    ) -> None:
        """Put known keys and values at the beginning of grids of `length` positions; `start` are known of each row."""
        for row, entry in enumerate(entries):
            if entry is None:
                continue
            for layer, (key, value) in enumerate(zip(*entry, strict=True)):
                if layer not in self._keys:
                    shape = (len(entries), key.shape[0], length, key.shape[2])
                    self._keys[layer], self._values[layer] = key.new_zeros(shape), key.new_zeros(shape)
                self._keys[layer][row, :, : start[row]] = key[:, : start[row]]
                self._values[layer][row, :, : start[row]] = value[:, : start[row]]

    def extend(self, tokens_M: torch.Tensor, users_M: torch.Tensor, parents_M: torch.Tensor) -> torch.Tensor:
        """See `Tree.extend`; a node's state is its hidden state: [M, D]."""
        self._grow(parents_M)
        self.users = users_M
        self._place(users_M)
        where = self._lengths[users_M] + self._new_depths
        hidden = self._forward(tokens_M[None], where[None])[0]
        self.num_nodes += len(tokens_M)
        return hidden

    def forget(self) -> None:
        """See `Tree.forget`."""
        self._paths, self._depths, self.num_nodes = self._paths[:0], self._depths[:0], 0

    @property
    def num_users(self) -> int:
        return len(self._lengths)

    def log_probs(self, hidden_MD: torch.Tensor, row_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        """See `Tree.log_probs`."""
        # Logits of a block of states at a time; rows ascend, so each block's tokens stand together.
        size = max(1, LOGITS // int(self._head.weight.shape[0]))
        starts = torch.arange(0, len(hidden_MD) + size, size, device=row_N.device)
        ends = torch.searchsorted(row_N, starts).tolist()
        pieces = [row_N.new_empty(0, dtype=torch.float64)]
        for start, low, high in zip(starts.tolist(), ends, ends[1:], strict=False):
            if low == high:
                continue
            logits = self.logits(hidden_MD[start : start + size])
            row = row_N[low:high] - start
            normaliser = logits.logsumexp(-1)
            require_finite(normaliser)
            pieces.append((logits[row, token_N[low:high]] - normaliser[row]).double())
        return torch.cat(pieces)

    def token_logits(self, hidden_MD: torch.Tensor, row_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        """See `Tree.token_logits`: products with the rows of the output layer that are asked for."""
        pieces = [row_N.new_empty(0, dtype=torch.float64)]
        for start in range(0, len(hidden_MD), STATES):
            low, high = torch.searchsorted(row_N, row_N.new_tensor([start, start + STATES])).tolist()
            # Tokens that several states of a block ask for are multiplied once, with all of them.
            tokens, column = token_N[low:high].unique(return_inverse=True)
            with autocast(self._device, self._bf16):
                logits = linear(hidden_MD[start : start + STATES], self._head.weight[tokens]).float() * self._scale
            pieces.append(logits[row_N[low:high] - start, column].double())
        return torch.cat(pieces)

    def likeliest(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """See `Tree.likeliest`."""
        likeliest = self.logits(hidden_MD).max(-1)
        require_finite(likeliest.values)
        return likeliest.indices

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the next token: float32[..., V]."""
        with autocast(self._device, self._bf16):
            return self._head(hidden).float() * self._scale

    # ---- where nodes are ---------------------------------------------------------------------------------------------

    def _grow(self, parents: torch.Tensor) -> None:
        """Paths of the new nodes: each is its parent's path, and then itself."""
        first, size = self.num_nodes, len(parents)
        inside = parents >= first
        # One deeper than the parent, where the parent was there before.
        known = torch.where(inside, -1, parents)
        depth = torch.cat([self._depths, self._depths.new_zeros(size)])
        depth[first:] = torch.where(known >= 0, depth[known.clamp(min=0)] + 1, 0)
        generation = [torch.arange(size, device=parents.device)]
        if bool(inside.any()):
            # Some parents are new as well: take the nodes generation by generation, parents before children.
            generation = []
            todo = torch.ones(size, dtype=torch.bool, device=parents.device)
            done = torch.ones(first + size, dtype=torch.bool, device=parents.device)
            done[first:] = False
            while bool(todo.any()):
                ready = todo & (~inside | done[parents.clamp(min=0)])
                rows = ready.nonzero()[:, 0]
                mine = parents[rows]
                depth[first + rows] = torch.where(mine >= 0, depth[mine.clamp(min=0)] + 1, 0)
                done[first + rows] = True
                todo &= ~ready
                generation.append(rows)
        # All paths in a table that is wide enough for the deepest node; places beyond a node's depth mean nothing.
        width = max(self._paths.shape[1], int(depth[first:].max()) + 1 if size else 1)
        paths = self._paths.new_zeros(first + size, width)
        paths[:first, : self._paths.shape[1]] = self._paths
        for rows in generation:
            mine = parents[rows]
            paths[first + rows] = paths[mine.clamp(min=0)] * (mine >= 0)[:, None]
            paths[first + rows, depth[first + rows]] = first + rows
        self._paths, self._depths = paths, depth
        self._new_depths = depth[first:]
        width = int(self._new_depths.max()) + 1 if size else 1
        self._new_paths = paths[first:, :width]
        self._on_path = torch.arange(width, device=parents.device)[None] <= self._new_depths[:, None]  # [M, P]

    def _place(self, users: torch.Tensor) -> None:
        """Places of nodes in a grid with a row for each user, so that a user's nodes meet its prompt in one product."""
        counts = torch.bincount(users, minlength=self.num_users)
        present = counts.nonzero()[:, 0]
        self._present = None if len(present) == self.num_users else present
        row = torch.repeat_interleave(torch.arange(len(present), device=users.device), counts[present])
        widest = int(counts.max())
        first = counts[present].cumsum(0) - counts[present]
        column = torch.arange(len(users), device=users.device) - first[row]
        if widest * len(present) == len(users):
            self._grid = self._at = None  # the flat order is that of the grid already
        else:
            # `_at` is the place of each node in the flattened grid, `_grid` the node of each place (0 for empty ones).
            self._at = row * widest + column
            self._grid = torch.zeros(len(present) * widest, dtype=torch.long, device=users.device)
            self._grid[self._at] = torch.arange(len(users), device=users.device)
        self._shape = len(present), widest
        if self._padded:
            # Added to scores, this hides the padding of shorter prompts.
            lengths = self._lengths if self._present is None else self._lengths[present]
            real = torch.arange(int(self._lengths.max()), device=users.device) < lengths[:, None]
            self._hidden_UT = torch.zeros(real.shape, device=users.device).masked_fill_(~real, -torch.inf)

    # ---- the forward pass --------------------------------------------------------------------------------------------

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with attending_by(self._trunk, PROMPT_TREE), autocast(self._device, self._bf16):
            return self._trunk(input_ids=ids, position_ids=positions, use_cache=False, tree=self).last_hidden_state

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of prompts [U, H, T, D], or of new nodes [1, H, M, D] once these are read; heads come last but one
        in what is returned."""
        dtype = torch.bfloat16 if self._bf16 else query.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if len(self._depths) > self.num_nodes:  # nodes that are being read
            return self._attend_nodes(layer, query[0], key[0], value[0], scale, window)[None]
        return self._attend_prompts(layer, query, key, value, scale, window).transpose(1, 2)

    def _attend_prompts(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Causal attention within each prompt, behind what is known of it: [U, H, T, D]. Fills the layer's grids."""
        start, tokens = self._start, query.shape[2]
        if start is None:
            key, value = key.contiguous(), value.contiguous()  # products with nodes would copy them each time
            self._keys[layer], self._values[layer] = key, value
        else:
            # New keys and values go behind the known ones, which begin each row of the grids.
            rows = torch.arange(len(start), device=start.device)[:, None]
            where = start[:, None] + torch.arange(tokens, device=start.device)
            self._keys[layer][rows, :, where] = key.transpose(1, 2)
            self._values[layer][rows, :, where] = value.transpose(1, 2)
            key, value = self._keys[layer], self._values[layer]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if start is None and (window is None or tokens <= window):
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        # Which places of the grid each new token sees: those up to its own, and no more than the window.
        at = torch.arange(tokens, device=query.device)
        mine = at[None] if start is None else start[:, None] + at
        other = torch.arange(key.shape[2], device=query.device)
        sees = other <= mine[..., None]
        if window is not None:
            sees &= mine[..., None] - other < window
        return scaled_dot_product_attention(query, key, value, attn_mask=sees[:, None], scale=scale)

    def _attend_nodes(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """One softmax over the prompt, met user by user, and over the path, gathered node by node: [M, H, D]."""
        heads, size, width = query.shape
        num_groups = key.shape[0]
        # Scores with the node's own path, ancestors and itself.
        near = self._near(layer, key, value)  # [M, P, 2, G, D]
        query = (query * scale).transpose(0, 1).reshape(size, num_groups, heads // num_groups, width)  # [M, G, h, D]
        near_weight = torch.einsum("mghd,mpgd->mghp", query, near[:, :, 0])
        near_weight = near_weight.masked_fill(~self._on_path[:, None, None], -torch.inf)
        # Scores with the prompt.
        far_key, far_value = self._keys[layer], self._values[layer]
        if self._present is not None:
            far_key, far_value = far_key[self._present], far_value[self._present]
        length = int(far_key.shape[2])
        far_weight = self._to_grid(query) @ far_key.transpose(2, 3)  # [U, G, N h, T]
        if self._padded:
            far_weight = far_weight + self._hidden_UT[:, None, None, :length].to(far_weight.dtype)
        if window is not None:
            far_weight = self._windowed(far_weight, heads // num_groups, window)
            ago = self._new_depths[:, None] - torch.arange(near.shape[1], device=query.device)
            near_weight = near_weight.masked_fill((ago >= window)[:, None, None], -torch.inf)
        # One softmax over both, in the grid, and then each part with its own values.
        weight = torch.cat([far_weight, self._to_grid(near_weight)], dim=3).softmax(-1, dtype=torch.float32)
        weight = weight.to(query.dtype)
        far = self._to_flat(weight[..., :length] @ far_value, heads // num_groups)
        near_weight = self._to_flat(weight[..., length:], heads // num_groups)
        return (far + torch.einsum("mghp,mpgd->mghd", near_weight, near[:, :, 1])).reshape(size, heads, width)

    def _near(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keys and values along the path of each new node: [M, P, 2, G, D]. Its own are put into the buffer first."""
        first, last = self.num_nodes, self.num_nodes + key.shape[1]
        buffer = self._nodes.get(layer)
        if buffer is None or len(buffer) < last:
            larger = key.new_empty(max(last, 2 * first, 256), 2, key.shape[0], key.shape[2])
            if buffer is not None:
                larger[:first] = buffer[:first]
            self._nodes[layer] = buffer = larger
        buffer[first:last, 0] = key.transpose(0, 1)
        buffer[first:last, 1] = value.transpose(0, 1)
        return buffer[self._new_paths]

    def _windowed(self, weight: torch.Tensor, heads: int, window: int) -> torch.Tensor:
        """Prompt positions that a sliding window hides from nodes set to -inf."""
        users, widest = self._shape
        at = self._lengths[self.users] + self._new_depths
        at = at if self._grid is None else at[self._grid]
        hidden = at.view(users, widest)[:, :, None] - torch.arange(weight.shape[3], device=at.device) >= window
        hidden = hidden[:, :, None].expand(-1, -1, heads, -1).reshape(users, 1, widest * heads, -1)
        return weight.masked_fill(hidden, -torch.inf)

    def _to_grid(self, flat: torch.Tensor) -> torch.Tensor:
        """[M, G, h, X] to [U, G, N h, X]."""
        users, widest = self._shape
        grid = flat if self._grid is None else flat[self._grid]
        _, groups, heads, width = flat.shape
        return grid.view(users, widest, groups, heads, width).transpose(1, 2).reshape(users, groups, -1, width)

    def _to_flat(self, grid: torch.Tensor, heads: int) -> torch.Tensor:
        """[U, G, N h, X] to [M, G, h, X]."""
        users, groups, _, width = grid.shape
        flat = grid.view(users, groups, -1, heads, width).transpose(1, 2).reshape(-1, groups, heads, width)
        return flat if self._at is None else flat[self._at]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    tree: PromptTree,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; returns [batch, tokens, H, D] and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree.attend(module.layer_idx, query, key, value, scale, sliding_window), None
