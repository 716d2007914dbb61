"""Attention in plain steps, for where its weights are wanted or no fused kernel knows its softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain steps, for its weights. Shapes as in transformers: ``(batch, heads, tokens, size)``.

    Args:
        softcap: bound of the logits.
        s_aux: logits of sinks, which take weight and give nothing, a head.
    """
    n = module.num_key_value_groups
    key, value = key.repeat_interleave(n, 1), value.repeat_interleave(n, 1)
    logits = query @ key.mT * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if attention_mask is not None:
        logits = logits + attention_mask
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights[..., : key.shape[-2]], dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
