"""Rotary positions (arXiv 2104.09864): the angles that a model hands to its blocks, and how they turn pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clover.errors import CloverError
from clover.model.family import Family


def angles(
    family: Family, table: Sequence[Tensor] | Tensor, tokens: Any, pairs: int, idle: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair, ``(batch or 1, tokens, pairs)``, from what the model hands to its blocks.

    A table shorter than the sequence is that of its last tokens: those before (class tokens) do not turn. With ``idle``
    an angle of zero is added at the end, for columns that do not turn.

    Raises:
        CloverError: the table has another number of pairs than the config says.
    """
    if family.table == "complex":
        table = (table.real, table.imag)  # type: ignore[union-attr]
    width = table[0].shape[-1]
    picks = {"halves": slice(width // 2), "neighbours": slice(0, width, 2)}
    cos, sin = (t[..., picks.get(family.table, slice(width))] for t in table)
    sin = -sin if family.clockwise else sin
    if cos.shape[-1] != pairs:
        raise CloverError(
            f"the model rotates {cos.shape[-1]} pairs of a head, but its config says {pairs}; correct "
            "partial_rotary_factor in config.json"
        )
    alone = cos.dim() == 3 and cos.shape[1] == 1  # a row for each token, or for each sequence's one token
    cos, sin = (t.reshape(-1, tokens, pairs) if alone else t.view(-1, *t.shape[-2:]) for t in (cos, sin))
    still = (0, int(idle), tokens - cos.shape[1], 0)
    return nn.functional.pad(cos, still, value=1.0), nn.functional.pad(sin, still)


def turned(
    x: Float[Tensor, "*any r"], cos: Float[Tensor, "*more p"], sin: Float[Tensor, "*more p"], neighbours: bool
) -> Float[Tensor, "*any r"]:
    """Turn the pairs of the last axis; what comes out has their first columns before their second."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, -1)
    return torch.cat(_turn(first, second, cos, sin), -1).to(x.dtype)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of neighbouring columns, which stay neighbours."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(_turn(first, second, cos, sin), -1).flatten(-2).to(x.dtype)


def turned_by(x: Float[Tensor, "*any r"], table: Tensor) -> Tensor:
    """Turn pairs of neighbouring columns by complex numbers of a pair each ``(1 or more, ..., r / 2)``."""
    if x.requires_grad:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table).flatten(-2)
    pairs = x.view(x.dtype.to_complex()) * table  # quicker, but gradients know nothing of a change of the dtype
    return pairs.view(pairs.dtype.to_real())


def _turn(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return first * cos - second * sin, first * sin + second * cos
