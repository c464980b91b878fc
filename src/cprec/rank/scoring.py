"""Log-likelihood of each candidate's text: all candidates of a user in one forward pass after the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cprec.data.ragged import Ragged
from cprec.rank.attention import PromptTree


def score_candidates(tree: PromptTree, candidates: Sequence[Ragged]) -> list[np.ndarray]:
    """Summed log-probability of each candidate's title tokens, the end of sequence included.

    `candidates` holds, for each prompt of `tree`, its candidates' title tokens. The titles stand side by side after the
    prompt and do not see each other. Returns float64[number of candidates] for each prompt.
    """
    device = tree.prompt_hidden_UD.device
    total = np.array([len(titles.values) for titles in candidates])
    width = max(int(total.max()), 1)
    shape = (len(candidates), width)
    tokens, depth = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    title = np.full(shape, -1, dtype=np.int64)
    for row, titles in enumerate(candidates):
        size = len(titles.values)
        tokens[row, :size] = titles.values
        title[row, :size] = titles.row_of
        depth[row, :size] = np.arange(size) - np.repeat(titles.offsets[:-1], titles.lengths)
    at = np.arange(width)
    sees = (title[:, :, None] == title[:, None, :]) & (at[:, None] >= at[None])[None]
    sees |= (at[:, None] == at[None])[None]
    tokens_UN, depth_UN = torch.from_numpy(tokens).to(device), torch.from_numpy(depth).to(device)
    hidden_UND = tree.extend(tokens_UN, depth_UN, torch.from_numpy(sees).to(device))
    before = torch.cat([tree.prompt_hidden_UD[:, None], hidden_UND[:, :-1]], dim=1)
    first = depth_UN == 0  # the first token of every title follows the prompt
    before = torch.where(first[..., None], tree.prompt_hidden_UD[:, None], before)
    out = []
    for row, titles in enumerate(candidates):
        size = len(titles.values)
        logp = tree.log_probabilities(before[row, :size])
        chosen = logp.gather(1, tokens_UN[row, :size, None])[:, 0].double().cpu().numpy()
        out.append(np.bincount(titles.row_of, weights=chosen, minlength=len(titles)))
    return out
