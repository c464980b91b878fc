"""A causal language model becomes a reader of titles: it continues histories, then reads both ways, fills in masked
tokens and tells titles apart.

Reading both ways and the two losses that teach it are those of LLM2Vec (BehnamGhader et al. 2024). Suffixes: R rows, T
tokens, V titles, F width of the model's states, H heads in G groups of keys and values, D their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from cprec import distributed
from cprec.batch import IGNORE, Batch
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, ModelError, Unsuitable
from cprec.models import attending_by, context_of, trunk_and_head
from cprec.progress import track
from cprec.systems.batches import Passes, RowStream
from cprec.systems.language import READ_BATCH, Language
from cprec.systems.signals import padded, windows
from cprec.systems.terms import in_batch
from cprec.text.stream import NEXT_TOKEN
from cprec.text.tokenizer import encode_pieces
from cprec.train.loss import PackedLoss

BOTH_WAYS = "both_ways"
"""The name under which transformers knows the attention."""
MASKED_TOKEN, SAME_TITLE = "masked_token", "same_title"
"""The names of the loss terms of the second and the third stage."""


def read_both_ways(model: Any, ids_RT: torch.Tensor, lengths_R: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """The last states of a causal decoder whose causal mask is off: each token reads all of its row. RTF.

    Rows are padded on the right and hold a token at least. `dropout` is the share of attention weights that is left
    out. The model must be one that takes attention of ours (`inspection.check_attention`).
    """
    AttentionInterface.register(BOTH_WAYS, _attend)
    AttentionMaskInterface.register(BOTH_WAYS, lambda *_, **__: None)
    place_T = torch.arange(ids_RT.shape[1], device=ids_RT.device)
    is_token_R11T = (place_T < lengths_R[:, None])[:, None, None]
    trunk, _ = trunk_and_head(model)
    with attending_by(trunk, BOTH_WAYS):
        read = {"is_token": is_token_R11T, "left_out": dropout}
        found = trunk(input_ids=ids_RT, position_ids=place_T[None], use_cache=False, **read)
    hidden_RTF: torch.Tensor = found.last_hidden_state
    return hidden_RTF


def _attend(
    module: Any,
    query_RHTD: torch.Tensor,
    key_RGTD: torch.Tensor,
    value_RGTD: torch.Tensor,
    attention_mask: None,
    *,
    is_token: torch.Tensor,
    left_out: float,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to all tokens of a row, with the signature of transformers: [R, T, H, D] and no weights."""
    grouped = key_RGTD.shape[1] != query_RHTD.shape[1]
    found_RHTD = F.scaled_dot_product_attention(
        query_RHTD, key_RGTD, value_RGTD, attn_mask=is_token, dropout_p=left_out, scale=scaling, enable_gqa=grouped
    )
    return found_RHTD.transpose(1, 2), None


def texts_of(language: Language) -> Ragged:
    """Titles as they are read both ways, with the tokens that the model expects before every text; those without tokens
    stay so."""
    titles = (language.titles[number] for number in range(len(language.titles)))
    return Ragged.of([[*language.begin, *title] if len(title) else [] for title in titles])


def mean_of_tokens(hidden_RTF: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
    """The mean state of each row's tokens: RF."""
    place_T = torch.arange(hidden_RTF.shape[1], device=hidden_RTF.device)
    is_token_RT1 = (place_T < lengths_R[:, None])[:, :, None]
    return (hidden_RTF.float() * is_token_RT1).sum(1) / lengths_R[:, None]


@torch.inference_mode()
def title_vectors(model: Any, titles: Ragged, description: str) -> np.ndarray:
    """The mean states of titles, read both ways: float32[V, F]; zeros for a title without tokens. Raises ModelError
    where a state is not finite."""
    device, was_training = distributed.pick_device(), model.training
    model.to(device).eval()
    order = np.argsort(titles.lengths, kind="stable")
    order = order[titles.lengths[order] > 0]
    parts = []
    with track(len(order), description, unit="titles") as progress:
        for start in range(0, len(order), READ_BATCH):
            ids, lengths = padded(titles.take(order[start : start + READ_BATCH]), 0)
            ids_RT, lengths_R = torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)
            with distributed.autocast(device, distributed.use_bf16("auto", device)):
                hidden_RTF = read_both_ways(model, ids_RT, lengths_R)
            parts.append(mean_of_tokens(hidden_RTF, lengths_R).cpu().numpy())
            progress.advance(len(ids))
    model.train(was_training)
    found = np.concatenate(parts)
    if not np.isfinite(found).all():
        raise ModelError("what a language model makes of titles is not finite (NaN or infinity): train it more slowly")
    vectors_VF = np.zeros((len(titles), found.shape[1]), dtype=np.float32)
    vectors_VF[order] = found
    return vectors_VF


# ---- losses ----------------------------------------------------------------------------------------------------------


class MaskedTokens(PackedLoss):
    """Masked next-token prediction (BehnamGhader et al. 2024, section 2.2): the model reads titles both ways, and the
    state of the token before a masked one predicts it, by the output layer of the causal model."""

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`. `targets` are the masked tokens where they stand; that of a first token is ignored,
        which none predicts."""
        with distributed.autocast(rows["input_ids"].device, self.bf16):
            hidden_RTF = read_both_ways(self.module, rows["input_ids"], rows["lengths"])
        return {MASKED_TOKEN: self._of_tokens(hidden_RTF[:, :-1], rows["targets"][:, 1:])}


class DropoutPairs(PackedLoss):
    """Contrast of titles without labels (Gao et al. 2021): read twice, each time without other attention weights, a
    title's two mean states are to be nearer to each other than to those of other titles."""

    def __init__(self, model: Any, *, dropout: float, temperature: float, bf16: bool = False) -> None:
        super().__init__(model, bf16=bf16)
        self._dropout, self._temperature = dropout, temperature

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`. `targets`, int64[R], are numbers that titles of equal tokens share: these are no
        negatives of each other."""
        ids_RT, lengths_R = rows["input_ids"].repeat(2, 1), rows["lengths"].repeat(2)
        with distributed.autocast(ids_RT.device, self.bf16):
            hidden_RTF = read_both_ways(self.module, ids_RT, lengths_R, self._dropout)
        first_RF, second_RF = mean_of_tokens(hidden_RTF, lengths_R).chunk(2)
        return {SAME_TITLE: in_batch(first_RF, second_RF, rows["targets"], self._temperature)}


# ---- streams ---------------------------------------------------------------------------------------------------------


class HistoryStream(RowStream):
    """Histories as their titles, one after the other: each title is learnt given those before it, the first is only
    read. Sequences are cut into windows, so that a pass learns each event but a user's first once."""

    def __init__(
        self,
        sequences: Ragged,
        titles: Ragged,
        mark: Sequence[int],
        max_titles: int,
        passes: Passes,
        begin: Sequence[int] = (),
    ) -> None:
        """`mark` are the tokens that end a title, `begin` those before a row; items without tokens are passed over. A
        window has `max_titles` titles to learn at most. Raises Unsuitable where there is none to learn."""
        every = (titles[number] for number in range(len(titles)))
        self._begin = np.array(begin, dtype=np.int64)
        self._pieces = Ragged.of([[*title, *mark] if len(title) else [] for title in every])
        cut = windows(sequences, max_titles)
        lengths = self._pieces.lengths[cut.values]
        num_learnt = np.add.reduceat(np.where(cut.place_of > 0, lengths, 0), cut.offsets[:-1])
        if not num_learnt.any():
            raise Unsuitable("no history has a title after its first event, so there is no next title to learn")
        self._windows, lengths = cut.take(np.flatnonzero(num_learnt)), np.add.reduceat(lengths, cut.offsets[:-1])
        lengths = lengths[num_learnt > 0]
        self.longest = len(self._begin) + int(lengths.max())
        """Tokens of the longest row."""
        super().__init__(lengths, [NEXT_TOKEN], passes)

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        items = self._windows.take(members)
        pieces = self._pieces.take(items.values)
        offsets = pieces.offsets[items.offsets]
        ids, _ = padded(Ragged(pieces.values, offsets), 0)
        is_learnt, _ = padded(Ragged(np.repeat(items.place_of > 0, pieces.lengths), offsets), False)
        begin = np.tile(self._begin, (len(ids), 1))
        targets = np.hstack([np.full_like(begin, IGNORE), np.where(is_learnt, ids, IGNORE)])[:, 1:]
        ids = np.hstack([begin, ids])[:, :-1]
        place = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        num = int((targets != IGNORE).sum()), begin.size + len(pieces.values)
        return self._batch(members, *num, input_ids=ids, position_ids=place, targets=targets)


class TitleStream(RowStream):
    """Titles that have tokens. Each but the first of a title is masked with the chance `mask_share`; where that is 0,
    targets are numbers that titles of equal tokens share, and the rows of a step stay together."""

    def __init__(self, titles: Ragged, term: str, passes: Passes, *, mask: int = 0, mask_share: float = 0.0) -> None:
        """`mask` is the token that stands for masked ones. Raises Unsuitable where there is none to mask."""
        self._titles = titles.take(np.flatnonzero(titles.lengths))
        if mask_share and titles.lengths.max(initial=0) < 2:
            raise Unsuitable("no title has two tokens, so there is none to fill in: leave out the masked steps")
        self._numbers, self._mask, self._mask_share = self._titles.numbers(), mask, mask_share
        super().__init__(self._titles.lengths, [term], passes)

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        ids, lengths = padded(self._titles.take(members), 0)
        num_tokens = int(lengths.sum())
        if not self._mask_share:
            targets = self._numbers[members]
            return self._batch(
                members, len(members), num_tokens, whole=True, input_ids=ids, lengths=lengths, targets=targets
            )
        place = np.arange(ids.shape[1])
        drawn = np.random.default_rng([self._seed, step, 5]).random(ids.shape) < self._mask_share
        masked = drawn & (place > 0) & (place < lengths[:, None])
        targets, ids = np.where(masked, ids, IGNORE), np.where(masked, self._mask, ids)
        return self._batch(members, int(masked.sum()), num_tokens, input_ids=ids, lengths=lengths, targets=targets)


# ---- stages ----------------------------------------------------------------------------------------------------------


def continuing(
    language: Language, sequences: Ragged, max_titles: int, passes: Passes
) -> tuple[PackedLoss, HistoryStream]:
    """What makes a language model continue histories: titles that end with a comma, `max_titles` to learn in a row.
    Raises ConfigError for rows that are longer than the model's context."""
    (mark,) = encode_pieces(language.tokenizer, [","])
    stream = HistoryStream(sequences, language.titles, mark, max_titles, passes, language.begin)
    context = context_of(language.model)
    if context is not None and stream.longest > context:
        raise ConfigError(
            f"rows of {max_titles + 1} titles have up to {stream.longest:,} tokens, and the language model reads "
            f"{context:,}: let it read fewer titles in a row, or fewer tokens of a title"
        )
    return PackedLoss(language.model, bf16=_bf16()), stream


def filling_in(language: Language, share: float, passes: Passes) -> tuple[MaskedTokens, TitleStream]:
    """What makes a language model fill in a share of titles' tokens, in whose place stand underscores."""
    mask = encode_pieces(language.tokenizer, ["_"])[0][0]
    stream = TitleStream(texts_of(language), MASKED_TOKEN, passes, mask=mask, mask_share=share)
    return MaskedTokens(language.model, bf16=_bf16()), stream


def telling_apart(
    language: Language, dropout: float, temperature: float, passes: Passes
) -> tuple[DropoutPairs, TitleStream]:
    """What makes a language model tell titles apart; see `DropoutPairs`."""
    loss = DropoutPairs(language.model, dropout=dropout, temperature=temperature, bf16=_bf16())
    return loss, TitleStream(texts_of(language), SAME_TITLE, passes)


def _bf16() -> bool:
    return distributed.use_bf16("auto", distributed.pick_device())
