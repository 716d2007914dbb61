"""Which keys a query sees, as far as masks and positions say it, and how much each of them weighs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clover.errors import CloverError

HIDDEN = -9e3
"""What a mask adds to a logit to hide a key is this or less: some models, and users, add -10000."""
SOFTMAX_WEIGHT = 0.5
"""Share of the softmax in a key's weight; the rest is uniform over the visible keys, which catches keys that a cut
could make jump up and that a purely local estimate can't see."""


def bias_of(mask: Any, by_head: Tensor | None, b: int, rows: Tensor, hidden: Tensor) -> Tensor:
    """What is added to the logits of sequence ``b``: ``(heads or 1, rows, keys)`` float32, ``-inf`` if hidden.

    Args:
        mask: of all heads and queries, or flash attention's, which says what is padding, or none.
        hidden: keys that are out of sight where the mask doesn't know of queries.

    Raises:
        CloverError: a mask of another kind.
    """
    if not isinstance(mask, Tensor | None):
        raise CloverError(
            f"calibration can't read a {type(mask).__name__}; load the model with attn_implementation='sdpa'"
        )
    if mask is None or mask.dim() == 2:
        if mask is not None:
            hidden = hidden | ~mask[min(b, len(mask) - 1), : hidden.shape[1]].bool().to(hidden.device)
        bias = torch.zeros(1, *hidden.shape, device=rows.device).masked_fill(hidden, -torch.inf)
    else:
        piece = mask[min(b, len(mask) - 1)]
        piece = piece[:, rows if piece.shape[1] > 1 else rows * 0, : hidden.shape[1]]
        if piece.dtype == torch.bool:
            bias = torch.zeros_like(piece, dtype=torch.float32).masked_fill(~piece, -torch.inf)
        else:
            bias = piece.float().masked_fill(piece <= HIDDEN, -torch.inf)
    if by_head is None:
        return bias
    more = by_head[min(b, len(by_head) - 1)].float()
    return bias + (more[:, rows] if more.shape[1] > 1 else more)


def in_other_texts(positions: Tensor | None, b: int, rows: Tensor) -> Tensor:
    """Keys of other texts than the queries', ``(rows, keys)``, where flash attention tells texts in one row apart."""
    if positions is None or positions.dim() != 2:
        return torch.zeros(1, 1, dtype=torch.bool, device=rows.device)
    each = positions[min(b, len(positions) - 1)]
    text = torch.cat([each.new_zeros(1), (each.diff() != 1).cumsum(0)]).to(rows.device)
    return text[rows, None] != text


def weights_of(logits: Tensor, bias: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Weight of each key for each query: half its attention, half uniform over the keys it can see."""
    visible = (bias > -torch.inf).float()
    uniform = visible / visible.sum(-1, keepdim=True).clamp_min(1)
    if sinks is None:
        attention = logits.softmax(-1)
    else:
        sink = sinks[..., None, None].expand(*logits.shape[:-1], 1)
        attention = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    return SOFTMAX_WEIGHT * attention.nan_to_num(0.0) + (1 - SOFTMAX_WEIGHT) * uniform
