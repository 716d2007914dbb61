"""Attention in plain steps, in real numbers: for its weights, unusual softmaxes, and graphs that leave PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def exporting() -> bool:
    """Whether a graph is being made that leaves PyTorch.

    In older versions of PyTorch ``is_exporting`` is also true in what ``torch.compile`` compiles (its issue 176347);
    exporters don't go through its front end, unless they are told to be strict.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def tracing() -> bool:
    """Whether a graph of any kind is being made, whose operators are fewer."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


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
    """Attention and its weights, any sizes. Shapes as in transformers: ``(batch, heads, tokens, size)``.

    Args:
        attention_mask: added to the logits, or true where they count.
        softcap: bound of the logits.
        s_aux: logits of sinks, which take weight and give nothing, a head.
    """
    n, tokens = module.num_key_value_groups, query.shape[2]
    logits = _apart(_together(query * scaling, n) @ key.mT, n, tokens)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if attention_mask is not None:
        least = torch.finfo(logits.dtype).min  # not infinity: a row without any key must not become NaN
        seen = attention_mask.dtype == torch.bool
        logits = torch.where(attention_mask, logits, least) if seen else logits + attention_mask
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    weights = nn.functional.dropout(weights, dropout, module.training)
    return _apart(_together(weights, n) @ value, n, tokens).transpose(1, 2).contiguous(), weights


def _together(x: Tensor, n: int) -> Tensor:
    """Queries that share a KV head in one matrix, so that keys and values are read as they lie.

    The copy is none in an exported graph, and spares the tracer its reasoning about strides.
    """
    return x.contiguous().unflatten(1, (x.shape[1] // n, n)).flatten(2, 3) if n > 1 else x


def _apart(x: Tensor, n: int, tokens: Any) -> Tensor:
    return x.unflatten(2, (n, tokens)).flatten(1, 2) if n > 1 else x
