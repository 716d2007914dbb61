"""Attention in the plainest steps, for graphs that leave PyTorch: no kernel, no copy of a head, any sizes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether a graph is being made that leaves PyTorch.

    In older versions of PyTorch ``is_exporting`` is also true in what ``torch.compile`` compiles (its issue 176347);
    exporters don't go through its front end, unless they are told to be strict.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def attend(groups: Iterable[tuple[Tensor, Tensor, Tensor, Tensor | None]], scaling: float) -> Tensor:
    """Attention of all heads of a block.

    Args:
        groups: for each group of heads of equal sizes queries ``(batch, heads, tokens, qk)``, keys and values ``(batch,
            kv heads, source, qk or value)``, and a mask, boolean or added, that ``(batch, heads, tokens, source)``
            broadcasts with.
        scaling: of the logits.

    Returns:
        ``(batch, tokens, columns)``, group by group, head by head.
    """
    outputs = [_heads(*group, scaling) for group in groups]
    return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]


def _heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """One group. Queries that share a KV head stand in one matrix, so that keys and values are read as they lie."""
    heads, tokens = q.shape[1:3]
    kv, n = k.shape[1], heads // k.shape[1]
    # Copies where a view would do are none in the graph, and spare the tracer its reasoning about strides.
    rows = (q * scaling).contiguous().unflatten(1, (kv, n)).flatten(2, 3) if n > 1 else q * scaling
    logits = rows @ k.mT
    logits = logits.unflatten(2, (n, tokens)).flatten(1, 2) if n > 1 else logits
    if mask is not None:
        least = torch.finfo(logits.dtype).min  # not infinity: a row without any key must not become NaN
        logits = torch.where(mask, logits, least) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1)
    out = (weights.unflatten(1, (kv, n)).flatten(2, 3) if n > 1 else weights) @ v
    out = out.unflatten(2, (n, tokens)).flatten(1, 2) if n > 1 else out
    return out.transpose(1, 2).contiguous().flatten(2)
