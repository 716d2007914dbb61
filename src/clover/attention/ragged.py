"""Heads of unequal sizes side by side: a token's columns lie flat, group by group, head by head.

Index tables that bring the flat columns into the shapes that kernels want, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clover.attention.eager import tracing

SPAN, ROWS = 8, 128
"""What a single new token reads as one: more would waste arithmetic, fewer would waste launches. KV heads on CPUs; on
GPUs, where launches cost more than zeros, as many as have so many query heads."""
WIDE = {4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Numbers of so many bytes: what neighbouring columns are moved as. Not all devices know the widest."""
TILE = 16
"""Columns that matrix units of CPUs and GPUs like to work on at once."""
LONG = 512
"""Tokens that are worth a thread of their own in a sum over all tokens."""
SHORT, SHORT_ON_GPU = 2**16, 2**24
"""Up to this many logits a head, heads of unequal sizes are padded into one call: launches cost more than zeros, and a
few heads leave most of a GPU idle."""
LEAST = -3e38
"""The logit of what must not be seen; not infinity, or a row that sees nothing would become NaN."""
NOTHING, FEW = 1e-30, 512
"""Attention weights below ``NOTHING`` are zero: they change no float32 sum, and denormal numbers are slow on CPUs. Not
worth a look where there are only a ``FEW`` keys."""


class Move(NamedTuple):
    """Columns taken ``unit`` neighbours at a time, for it is their number that takes time, not their size."""

    unit: int
    which: Tensor

    def each(self) -> Tensor:
        """The single columns, in their new order."""
        return (self.unit * self.which.unsqueeze(-1) + torch.arange(self.unit, device=self.which.device)).flatten()

    def of(self, x: Tensor) -> Tensor:
        """The columns of ``x`` ``(batch, tokens, columns)``, in their new order."""
        if self.unit == 1:
            return pick(x, self.which)
        wide = WIDE.get(self.unit * x.itemsize)  # under autocast, what was cached is wider than the queries
        if wide is None or x.requires_grad or tracing():
            parts = x.unflatten(-1, (-1, self.unit))
            which = self.which.unsqueeze(-1).expand(*parts.shape[:-2], -1, self.unit)
            return parts.gather(-2, which).flatten(-2)
        return take(aligned(x, self.unit).view(wide), self.which).view(x.dtype)


class Padding(NamedTuple):
    """Which flat column each column takes when all heads are padded to the same size; and back, for the outputs."""

    size: int
    queries: Move
    keys: Move
    values: Move
    outputs: Move | None
    """None where all stay in their places."""
    row: Tensor
    """The same of queries, keys and values at once, out of a row that begins with them."""
    counts: list[int]
    """How many heads each of the three has."""
    present: Tensor | None
    """Which columns of the keys a head has, 1 or 0, ``(kv heads, 1, size)``; None where it has all."""

    @classmethod
    @torch.inference_mode(False)  # made under it, they could not be used in training later
    def of(cls, sizes: list[tuple[int, int]], n: int, device: torch.device, dtype: torch.dtype) -> Padding:
        """Heads of (Q-K, V-O) ``sizes``, ``n`` queries each."""
        size = -(-max(max(s) for s in sizes) // TILE) * TILE
        widest = max(WIDE) if device.type in ("cpu", "cuda") else 8

        def columns(widths: list[int], repeats: int) -> tuple[Move, Move, Tensor]:
            unit = gcd(*widths, widest // dtype.itemsize)
            widths = [w // unit for w in widths for _ in range(repeats)]
            places = torch.cat([head * (size // unit) + torch.arange(w) for head, w in enumerate(widths)])
            taken = torch.full((len(widths) * size // unit,), -1)
            taken[places] = torch.arange(len(places))
            present = (taken >= 0).repeat_interleave(unit)
            return Move(unit, taken.clamp(min=0).to(device)), Move(unit, places.to(device)), present

        qk, value = ([s[i] for s in sizes] for i in (0, 1))
        keys, _, present = columns(qk, 1)
        known = None if present.all() else present.to(device, dtype).view(-1, 1, size)
        queries, values = columns(qk, n)[0], columns(value, 1)[0]
        firsts = 0, n * sum(qk), (n + 1) * sum(qk)
        row = torch.cat([m.each() + first for m, first in zip((queries, keys, values), firsts, strict=True)])
        counts = [n * len(sizes), len(sizes), len(sizes)]
        outputs = None if set(value) == {size} else columns(value, n)[1]
        return cls(size, queries, keys, values, outputs, row, counts, known)

    def flat(self, heads: Float[Tensor, "batch tokens heads size"]) -> Float[Tensor, "batch tokens columns"]:
        """The outputs of all heads, each in its own size."""
        z = heads.flatten(2)
        return z if self.outputs is None else self.outputs.of(z)

    def heads(self, queries: Tensor, keys: Tensor, values: Tensor, row: Tensor | None) -> tuple[Tensor, ...]:
        """All three as heads of one size, ``(batch, heads, tokens, size)``; of a ``row`` that has them, in one go."""
        if row is None:
            moves = (self.queries, queries), (self.keys, keys), (self.values, values)
            q, k, v = (as_heads(move.of(x), count) for (move, x), count in zip(moves, self.counts, strict=True))
            return q, k if self.present is None else k * self.present, v
        q, k, v = as_heads(pick(row, self.row), sum(self.counts)).split_with_sizes(self.counts, 1)
        return q, k if self.present is None else k.mul_(self.present), v


class Span(NamedTuple):
    """A stretch of neighbouring KV heads in the flat layout, see ``attend_one``."""

    first: int
    heads: int
    columns: tuple[slice, slice, slice]
    """Of queries, keys and values."""
    own: Tensor
    """The scale of the logits where a column is of the row's own head, else 0, ``(rows, columns)``."""
    query: Tensor | None
    """Which query column stands there; None where all rows have the same in theirs."""
    from_rows: Tensor
    """Where each output column comes from."""

    @classmethod
    @torch.inference_mode(False)  # made under it, they could not be used in training later
    def of(cls, sizes: list[tuple[int, int]], first: int, last: int, n: int, scale: Tensor) -> Span:
        """The KV heads ``first`` to ``last`` of heads with (Q-K, V-O) ``sizes``, ``n`` queries each."""
        device = scale.device
        before, inside = sizes[:first], sizes[first:last]
        at_qk, at_value = (sum(s[i] for s in before) for i in (0, 1))
        qk, value = ([s[i] for s in inside] for i in (0, 1))
        width, out = sum(qk), sum(value)
        columns = (
            slice(n * at_qk, n * (at_qk + width)), slice(at_qk, at_qk + width), slice(at_value, at_value + out),
        )  # fmt: skip
        row_head = torch.arange(len(inside)).repeat_interleave(n)
        own = row_head[:, None] == torch.arange(len(inside)).repeat_interleave(torch.tensor(qk))
        query = torch.zeros(own.shape, dtype=torch.long)
        query[own] = torch.arange(n * width)
        mine = row_head[:, None] == torch.arange(len(inside)).repeat_interleave(torch.tensor(value))
        from_rows = torch.arange(mine.numel()).view(mine.shape)[mine]
        return cls(
            first, last - first, columns, own.to(device) * scale, None if n == 1 else query.flatten().to(device),
            from_rows.to(device),
        )  # fmt: skip

    def rows(self, queries: Float[Tensor, "batch 1 columns"]) -> Float[Tensor, "batch rows width"]:
        """Each query head, scaled, in a row as wide as the keys of all heads, zero where those of others stand."""
        spread = queries  # where all rows have the same
        if self.query is not None:  # of two axes; of three, that takes several times as long
            spread = queries.squeeze(1).index_select(1, self.query).view(-1, *self.own.shape)
        if queries.dtype == self.own.dtype:
            return spread * self.own
        if queries.requires_grad or torch.compiler.is_compiling():
            return (spread * self.own).to(queries.dtype)
        rows = torch.empty(len(queries), *self.own.shape, dtype=queries.dtype, device=queries.device)
        return torch.mul(spread, self.own, out=rows)  # computed wide, rounded as it is written


class Tables:
    """The index tables of a block's heads, on each device where the block is run.

    Made by the first call there: one that is not compiled, or the tables would belong to the graph.
    """

    def __init__(self, sizes: list[tuple[int, int]], n: int, scale: float, order: list[int]) -> None:
        """Heads of (Q-K, V-O) ``sizes`` in the order of the flat layout, ``n`` queries each.

        Args:
            scale: of the logits.
            order: the numbers that the query heads have in the original, in the order of the flat layout.
        """
        self.sizes, self.n, self.scale, self.order = sizes, n, scale, order
        self.made: dict[tuple[torch.device, torch.dtype], tuple[Padding, list[Span]]] = {}
        self.orders: dict[torch.device, Tensor] = {}

    def at(self, queries: Tensor) -> tuple[Padding, list[Span]]:
        """Those for queries of this dtype on this device."""
        place = queries.device, queries.dtype
        if place not in self.made:
            self.made[place] = self._make(*place)
        return self.made[place]

    def heads(self, device: torch.device) -> Tensor:
        """The query heads of the flat layout, int64, by their numbers in the original."""
        if torch.compiler.is_compiling():
            return torch.tensor(self.order, device=device)
        if device not in self.orders:
            with torch.inference_mode(False):
                self.orders[device] = torch.tensor(self.order, device=device)
        return self.orders[device]

    @torch.compiler.disable(
        reason="tables of the heads are made by the first call: call the model before it is compiled"
    )
    def _make(self, device: torch.device, dtype: torch.dtype) -> tuple[Padding, list[Span]]:
        span = SPAN if device.type == "cpu" else max(1, ROWS // self.n)
        firsts, last = range(0, len(self.sizes), span), len(self.sizes)
        scale = torch.tensor(self.scale, dtype=torch.promote_types(dtype, torch.float32), device=device)
        spans = [Span.of(self.sizes, at, min(at + span, last), self.n, scale) for at in firsts]
        return Padding.of(self.sizes, self.n, device, dtype), spans

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"made": {}, "orders": {}}  # where it is loaded, devices may be others


def attend_one(
    tables: Tables, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, tokens: Any
) -> Tensor:
    """One token against ``tokens`` of the flat cache, all heads at once: ``(batch, 1, columns)``.

    Reading the cache is what takes the time, so it is read once and as it lies: each query stands in a row as
    wide as all keys, zero outside its own head's columns, and of each row of results only its own head's columns
    are taken.
    """
    results, dtype, cpu = [], queries.dtype, queries.is_cpu
    if isinstance(mask, Tensor) and mask.dim() == 2:  # flash attention's: what of the tokens so far is padding
        tokens = min(tokens, mask.shape[1])
        keys, values, mask = keys[:, :tokens], values[:, :tokens], mask[:, None, None, -tokens:].bool()
    _, spans = tables.at(queries)
    # Products that end in rows of logits of no whole 16 bytes take GPUs several times as long; so do those that
    # begin with them.
    turned = keys.shape[1] > FEW if cpu else keys.shape[1] * keys.itemsize % 16 != 0
    if cpu and queries.dtype.itemsize < 4:
        # oneDNN compiles a half-precision product anew for each length of the cache: milliseconds a token.
        queries, keys, values = queries.float(), keys.float(), values.float()
    spare = keys.shape[1] - tokens
    least = max(LEAST, torch.finfo(queries.dtype).min)
    if mask is not None:
        mask = by_head(mask, tables.heads)
        if spare:
            mask = nn.functional.pad(mask, (0, spare), value=False if mask.dtype == torch.bool else least)
    for span in spans:
        q, k, v = queries, keys, values
        if len(spans) > 1:
            q, k, v = (x[..., part] for x, part in zip((q, k, v), span.columns, strict=True))
        rows = span.rows(q)
        # Over many keys rows @ k.mT takes CPUs twice as long; it takes GPUs a copy less in what follows.
        logits = torch.bmm(k, rows.mT).mT if turned else torch.bmm(rows, k.mT)
        if mask is not None:
            m = mask[:, :, 0]
            if mask.shape[1] > 1:
                m = m.narrow(1, span.first * tables.n, span.heads * tables.n)
            logits = torch.where(m, logits, least) if m.dtype == torch.bool else (logits + m).to(logits.dtype)
        elif spare:
            logits[..., tokens:] = least
        weights = logits.softmax(-1)  # GPUs compute that in float32 by themselves
        if weights.shape[-1] > FEW and cpu:
            weights = nn.functional.threshold(weights, NOTHING, 0.0, inplace=not weights.requires_grad)
        if turned and not cpu:
            weights = weights.mT.contiguous().mT
        columns = weighted_sum(weights, v).view(-1, rows.shape[1] * v.shape[2])
        results.append(columns.index_select(1, span.from_rows))
    z = joined(results).unsqueeze(1)
    return z if z.dtype == dtype else z.to(dtype)


def by_head(mask: Any, heads: Callable[[torch.device], Tensor]) -> Any:
    """A mask of each head with its heads in this order; any other as it is."""
    return mask.index_select(1, heads(mask.device)) if is_by_head(mask) else mask


def is_by_head(mask: Any) -> bool:
    """Whether a mask has something of its own for each query head."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1


def kernel_size(qk: int, value: int, dtype: torch.dtype) -> int:
    """Columns that a fused attention kernel is given of a head.

    It wants one size for all, and whole tiles, half as wide in float32: an odd size takes longer than a larger one of
    whole tiles, and in half precision its fallbacks cost far more than a few zero columns.
    """
    tile = TILE if dtype.itemsize < 4 else TILE // 2
    return max(TILE, -(-max(qk, value) // tile) * tile)


def short(queries: Tensor, keys: Tensor) -> bool:
    """Whether heads of unequal sizes are better padded into one call."""
    return queries.shape[1] * keys.shape[1] <= (SHORT if queries.device.type == "cpu" else SHORT_ON_GPU)


def as_heads(flat: Tensor, heads: int) -> Tensor:
    """The columns as equal heads: ``(batch, heads, tokens, size)``, a view."""
    return flat.view(*flat.shape[:2], heads, flat.shape[-1] // heads).transpose(1, 2)


def take(x: Tensor, which: Tensor) -> Tensor:
    """These columns of ``x``, in this order."""
    return x.gather(-1, which.expand(*x.shape[:-1], -1))


def pick(x: Float[Tensor, "batch tokens columns"], which: Tensor) -> Float[Tensor, "batch tokens taken"]:
    """The same, in the form that is quickest for single columns of float32 on CPUs."""
    apart = x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)  # to be copied first
    if apart or not x.is_cpu or x.requires_grad:
        return take(x, which)
    return x.flatten(0, 1).index_select(1, which).view(*x.shape[:2], len(which))


def joined(parts: list[Tensor], dim: int = -1) -> Tensor:
    """All parts in one tensor, by their columns if not said otherwise; a single one as it is."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def weighted_sum(
    weights: Float[Tensor, "batch rows tokens"], values: Float[Tensor, "batch tokens columns"]
) -> Float[Tensor, "batch rows columns"]:
    """``weights @ values`` of few rows over many tokens.

    CPUs share out the rows and columns of a product but never its sum, and for one sequence leave most of it to one
    thread; so the tokens are shared out here.
    """
    tokens = weights.shape[-1]
    if tokens < LONG or weights.shape[0] > 1 or not weights.is_cpu or torch.compiler.is_compiling():
        return torch.bmm(weights, values)
    threads = min(torch.get_num_threads(), tokens // LONG)
    each = tokens // threads
    shared = each * threads
    w, v = weights[0, :, :shared].unflatten(-1, (threads, each)).transpose(0, 1), values[0, :shared]
    total = torch.bmm(w, v.unflatten(0, (threads, each))).sum(0, keepdim=True)
    return total if shared == tokens else total + torch.bmm(weights[..., shared:], values[:, shared:])


def rewritable(x: Tensor, made_by: nn.Module) -> bool:
    """Whether a module's output may be written over: none other than the caller has it."""
    heard = made_by._forward_hooks or "forward" in vars(made_by) or nn.modules.module._global_forward_hooks
    return type(x) is Tensor and type(made_by) is nn.Linear and not heard and x.is_contiguous()


def turns_as_it_lies(x: Tensor) -> bool:
    """Whether pairs of columns can be turned without a copy: on CPUs, where memory costs more than arithmetic."""
    return x.is_cpu and x.itemsize >= 4 and not (x.requires_grad or tracing())


def padded(x: Tensor, size: int) -> Tensor:
    """``x`` with zero columns up to ``size``; on GPUs a copy unless kernels that read 16 bytes at once can take it."""
    if x.shape[-1] < size:
        return nn.functional.pad(x, (0, size - x.shape[-1]))
    return x if x.device.type == "cpu" else aligned(x, 16 // x.itemsize)


def aligned(x: Tensor, unit: int) -> Tensor:
    """``x``, or a copy, whose columns can be read ``unit`` neighbours at a time."""
    if x.stride(-1) == 1 and not any(start % unit for start in (x.storage_offset(), *x.stride()[:-1])):
        return x
    return x.clone(memory_format=torch.contiguous_format)
