"""Heads of unequal sizes side by side: a token's columns lie flat, group by group, head by head.

Index tables that bring the flat columns into the shapes that kernels want, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

SPAN = 8
"""KV heads that a single new token reads as one: more would waste arithmetic, fewer would waste launches."""
TILE = 16
"""Columns that matrix units of CPUs and GPUs like to work on at once."""
LONG = 512
"""Tokens that are worth a thread of their own in a sum over all tokens."""


class Padding(NamedTuple):
    """Which flat column each column takes when all heads are padded to the same size; and back, for the outputs."""

    size: int
    queries: Tensor
    keys: Tensor
    """One past the last, where zeros must be, for a column that a head doesn't have."""
    values: Tensor
    outputs: Tensor

    @classmethod
    @torch.inference_mode(False)  # made under it, they could not be used in training later
    def of(cls, sizes: list[tuple[int, int]], n: int, device: torch.device) -> Padding:
        """Heads of (Q-K, V-O) ``sizes``, ``n`` queries each."""
        size = -(-max(max(s) for s in sizes) // TILE) * TILE

        def columns(widths: list[int], repeats: int, absent: int) -> tuple[Tensor, Tensor]:
            widths = [w for w in widths for _ in range(repeats)]
            places = torch.cat([head * size + torch.arange(w) for head, w in enumerate(widths)])
            taken = torch.full((len(widths) * size,), absent)
            taken[places] = torch.arange(len(places))
            return taken.to(device), places.to(device)

        qk, value = ([s[i] for s in sizes] for i in (0, 1))
        queries, keys, values = (columns(*of)[0] for of in ((qk, n, 0), (qk, 1, sum(qk)), (value, 1, 0)))
        return cls(size, queries, keys, values, columns(value, n, 0)[1])


class Span(NamedTuple):
    """A stretch of neighbouring KV heads in the flat layout, see ``CloverAttention._attend_one``."""

    first: int
    heads: int
    columns: tuple[slice, slice, slice]
    """Of queries, keys and values."""
    into_rows: Tensor
    """Where each query column goes in the rows."""
    from_rows: Tensor
    """Where each output column comes from."""

    @classmethod
    @torch.inference_mode(False)  # made under it, they could not be used in training later
    def of(cls, sizes: list[tuple[int, int]], first: int, last: int, n: int, device: torch.device) -> Span:
        """The KV heads ``first`` to ``last`` of heads with (Q-K, V-O) ``sizes``, ``n`` queries each."""
        before, inside = sizes[:first], sizes[first:last]
        qk, value = (sum(s[i] for s in inside) for i in (0, 1))
        at_qk, at_value = (sum(s[i] for s in before) for i in (0, 1))
        index: list[list[int]] = [[], []]
        for which, width in enumerate((qk, value)):
            start = 0
            for head, size in enumerate(inside):
                rows = range(head * n, (head + 1) * n)
                index[which] += [row * width + start + c for row in rows for c in range(size[which])]
                start += size[which]
        columns = slice(n * at_qk, n * (at_qk + qk)), slice(at_qk, at_qk + qk), slice(at_value, at_value + value)
        into_rows, from_rows = (torch.tensor(i, device=device) for i in index)
        return cls(first, last - first, columns, into_rows, from_rows)


class Tables:
    """The index tables of a block's heads, on the device where the block is run.

    Made by the first call: one that is not compiled, or the tables would belong to the graph.
    """

    padding: Padding
    spans: list[Span]

    def __init__(self, sizes: list[tuple[int, int]], n: int) -> None:
        """Heads of (Q-K, V-O) ``sizes`` in the order of the flat layout, ``n`` queries each."""
        self.sizes, self.n = sizes, n
        self.device: torch.device | None = None

    def move(self, device: torch.device) -> None:
        """Make the tables, unless they are there."""
        if self.device == device:
            return
        firsts, last = range(0, len(self.sizes), SPAN), len(self.sizes)
        self.padding = Padding.of(self.sizes, self.n, device)
        self.spans = [Span.of(self.sizes, at, min(at + SPAN, last), self.n, device) for at in firsts]
        self.device = device


def by_head(mask: Any, heads: Callable[[], list[int]]) -> Any:
    """What of a mask is for some heads, asked for if it matters; one for all, or of a kind of its own, as it is."""
    own = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1
    return mask[:, heads()] if own else mask


def kernel_size(qk: int, value: int, dtype: torch.dtype) -> int:
    """Columns that a fused attention kernel is given of a head.

    It wants one size for all, and whole tiles, half as wide in float32: an odd size takes longer than a larger one of
    whole tiles, and in half precision its fallbacks cost far more than a few zero columns.
    """
    tile = TILE if dtype.itemsize < 4 else TILE // 2
    return max(TILE, -(-max(qk, value) // tile) * tile)


def as_heads(flat: Tensor, heads: int) -> Tensor:
    """The columns as equal heads: ``(batch, heads, tokens, size)``, a view."""
    return flat.view(*flat.shape[:2], heads, flat.shape[-1] // heads).transpose(1, 2)


def take(x: Tensor, which: Tensor) -> Tensor:
    """These columns of ``x``, in this order."""
    return x.gather(-1, which.expand(*x.shape[:-1], -1))


def joined(parts: list[Tensor]) -> Tensor:
    """Columns of all parts in one tensor."""
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def weighted_sum(
    weights: Float[Tensor, "batch rows tokens"], values: Float[Tensor, "batch tokens columns"]
) -> Float[Tensor, "batch rows columns"]:
    """``weights @ values`` of few rows over many tokens.

    CPUs share out the rows and columns of a product but never its sum, and for one sequence leave most of it to one
    thread; so the tokens are shared out here.
    """
    tokens = weights.shape[-1]
    if torch.compiler.is_compiling() or len(weights) > 1 or tokens < LONG or weights.device.type != "cpu":
        return torch.bmm(weights, values)
    threads = min(torch.get_num_threads(), tokens // LONG)
    each = tokens // threads
    shared = each * threads
    w, v = weights[0, :, :shared].unflatten(-1, (threads, each)).transpose(0, 1), values[0, :shared]
    total = torch.bmm(w, v.unflatten(0, (threads, each))).sum(0, keepdim=True)
    return total if shared == tokens else total + torch.bmm(weights[..., shared:], values[:, shared:])


def padded(x: Tensor, size: int) -> Tensor:
    """``x`` with zero columns up to ``size``."""
    return nn.functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x
