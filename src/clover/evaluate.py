"""Measure a model: perplexity, word error rate, multiple choice, sizes and speed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from clover.progress import track


@dataclass(frozen=True)
class Score:
    """One measured number. ``protocol`` says everything that is needed to measure it again."""

    task: str
    value: float
    protocol: dict

    def to_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: nn.Module, tokens: torch.Tensor, *, window: int = 1024, stride: int | None = None, limit: int | None = None
) -> Score:
    """Perplexity of a causal language model on one long text.

    Windows of ``window`` tokens start every ``stride`` tokens; each token is scored once, in the first window that
    holds it, with everything before it in that window as context. The first token of the text is never scored; with
    non-overlapping windows (``stride == window``, the default) neither is the first of any window.

    Args:
        tokens: token ids of the whole text, shape ``(n,)``, integer.
        window: tokens a window, context included.
        stride: tokens between window starts, 1 to ``window``.
        limit: read at most this many tokens.

    Raises:
        ValueError: fewer than two tokens, or a stride outside ``1..window``.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; it must lie between 1 and the window, {window}")
    tokens = tokens[:limit].to(next(model.parameters()).device)
    if len(tokens) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(tokens)}")
    total, count, scored = 0.0, 0, 0
    for start in track(range(0, len(tokens) - 1, stride), "perplexity"):
        piece = tokens[start : start + window]
        fresh = len(piece) - max(scored - start, 1)  # targets that no earlier window has scored
        if fresh <= 0:
            break
        nll = _negative_log_likelihood(model, piece)[-fresh:]
        total, count, scored = total + nll.sum().item(), count + fresh, start + len(piece)
    protocol = {"window": window, "stride": stride, "tokens": len(tokens), "scored": count, "dtype": _dtype(model)}
    return Score("perplexity", math.exp(total / count), protocol)


def _negative_log_likelihood(model: nn.Module, piece: torch.Tensor, chunk: int = 128) -> torch.Tensor:
    """Nats for each of ``piece[1:]``; logits are made ``chunk`` rows at a time, for they dwarf the hidden states."""
    hidden = model.base_model(piece[None], use_cache=False).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()
    rows = [
        nn.functional.cross_entropy(head(h).float(), t, reduction="none")
        for h, t in zip(hidden.split(chunk), piece[1:].split(chunk), strict=True)
    ]
    return torch.cat(rows)


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
