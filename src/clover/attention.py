"""The attention module of a rewritten model: any ranks, any family, through transformers' attention interface.

Heads of equal sizes form groups. A token's queries (and keys, values) lie flat, group by group, head by head, so a
layer is four plain ``Linear`` modules and one call of the attention function a group; the cache holds exactly the
columns that are kept, as one "head" of ``(batch, 1, tokens, columns)``. A rotated pair takes two neighbouring
columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clover.families import Block, arguments
from clover.plan import BlockPlan, Group

SPAN = 8
"""KV heads that a single new token reads as one: more would waste arithmetic, fewer would waste launches."""
SHORT = 2**18
"""Up to this many logits a head, heads of unequal sizes are padded into one call: launches cost more than sums."""
NOTHING = 1e-30
"""Attention weights below this are zero: they change no float32 sum, and denormal numbers are slow on CPUs."""


class _Padding(NamedTuple):
    """Where the flat columns of all heads go when every head is padded to the same size."""

    size: int
    queries: Tensor
    """For each flat column, its padded one; the padded columns without one are zero."""
    keys: Tensor
    """For each padded column, a flat one: the head's own, or any, since it meets a zero."""
    values: Tensor
    outputs: Tensor
    """For each flat column of the output, its padded one."""

    @classmethod
    @torch.inference_mode(False)  # made under it, they could not be used in training later
    def of(cls, sizes: list[tuple[int, int]], n: int, device: torch.device) -> _Padding:
        """Heads of (Q-K, V-O) ``sizes``, ``n`` queries each."""
        size = max(max(s) for s in sizes)

        def spread(widths: list[int], repeats: int) -> tuple[Tensor, Tensor]:
            widths = [w for w in widths for _ in range(repeats)]
            into = torch.cat([head * size + torch.arange(w) for head, w in enumerate(widths)])
            source = torch.zeros(len(widths) * size, dtype=torch.int64)
            source[into] = torch.arange(len(into))
            return into.to(device), source.to(device)

        qk, value = ([s[i] for s in sizes] for i in (0, 1))
        return cls(size, spread(qk, n)[0], spread(qk, 1)[1], spread(value, 1)[1], spread(value, n)[0])


class _Span(NamedTuple):
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
    def of(cls, sizes: list[tuple[int, int]], first: int, last: int, n: int, device: torch.device) -> _Span:
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


class CloverAttention(nn.Module):
    """Attention whose heads keep only the directions of a plan.

    Submodules: ``q_proj``, ``k_proj``, ``v_proj`` and, unless the model keeps it elsewhere, ``o_proj``: plain
    ``Linear``, so quantisers and adapters find what they know. Buffer ``frequencies``, int32: for each pair of flat
    columns of queries, then of keys, the number of its frequency in the model's table, or one past the last where it
    does not turn.
    """

    frequencies: Tensor

    def __init__(self, block: Block, plan: BlockPlan, dtype: torch.dtype, device: torch.device | str) -> None:
        """Build the module with uninitialised weights.

        Args:
            block: the block to take the place of; sizes, scale and dropouts are read from it.
            plan: what it keeps.
        """
        nn.Module.__init__(self)
        core, family = block.core, block.family
        self.clover = plan
        self.family, self.config = family, block.config
        self.layer_idx = getattr(core, "layer_idx", None)
        self.is_causal = plan.part == "decoder"
        self.is_cross = plan.part == "cross"
        self.num_key_value_groups = plan.queries
        self.scaling = block.get(family.scale)
        self.attention_dropout = block.get(family.dropout)
        self.output_dropout = block.get(family.output_dropout) if family.output_dropout else 0.0
        self.sliding_window = getattr(core, "sliding_window", getattr(block.config, "sliding_window", None))
        self.rotary = block.rotary

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

        heads = block.heads()
        width, source, out = heads.q.shape[-1], heads.k.shape[-1], heads.o.shape[-2]
        n = plan.queries
        self.q_proj = linear(width, n * plan.qk_kept, heads.q_bias is not None)
        self.k_proj = linear(source, plan.qk_kept, keeps_key_bias(block) and heads.k_bias is not None)
        self.v_proj = linear(source, plan.vo_kept, False)
        self.o_proj = nn.Identity() if family.core else linear(n * plan.vo_kept, out, plan.output_bias)
        for name in family.norms:
            setattr(self, name, copy.deepcopy(getattr(core, name)))
        rotated = (n + 1) * plan.qk_kept // 2 if self.rotary else 0
        self._made_spans: list[_Span] = []
        self._made_padding: _Padding | None = None
        self.register_buffer("frequencies", torch.zeros(rotated, dtype=torch.int32, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend; takes the arguments of the class it replaces.

        Returns:
            The block's output ``(batch, tokens, D)`` and, from the eager implementation, the attention weights
            ``(batch, query heads, tokens, source)`` in the order of the original heads (zero for heads that are gone).
        """
        call = arguments(self.family, self.is_cross, args, kwargs)
        x = call.pop("hidden_states")
        queries, keys, values = self._project(x, call)
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mask = self._mask(call.pop("attention_mask", None), call.pop("alibi", None), x.shape[0])
        residual = call.pop("residual", None)
        for name in ("past_key_values", "key_value_states", "position_embeddings", "use_cache", "sliding_window"):
            call.pop(name, None)
        if self._writes_one(x):
            y = self.o_proj(self._attend_one(queries, keys, values, mask))
            return (y if residual is None else y + residual), None
        attend = partial(
            interface, self, scaling=self.scaling, sliding_window=self.sliding_window,
            dropout=self.attention_dropout if self.training else 0.0, **call,
        )  # fmt: skip
        weights: list[Tensor | None] = [None]
        if self._is_short(queries, keys):
            z = self._attend_padded(attend, queries, keys, values, mask)
        else:
            z, weights = self._attend_by_group(attend, queries, keys, values, mask)
        y = nn.functional.dropout(self.o_proj(z), self.output_dropout, self.training)
        if residual is not None:
            y = y + residual
        return y, self._in_order(weights)

    def _project(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Flat queries ``(batch, tokens, columns)``, and keys and values with whatever the cache holds before them."""
        cache = call.get("past_key_values")
        queries = self.q_proj(x)
        cached = False
        if isinstance(cache, EncoderDecoderCache):
            if self.is_cross:
                cached = bool(cache.is_updated.get(self.layer_idx))
                cache.is_updated[self.layer_idx] = True
                cache = cache.cross_attention_cache
            else:
                cache = cache.self_attention_cache
        if cache is not None and cached:
            return queries, cache.layers[self.layer_idx].keys[:, 0], cache.layers[self.layer_idx].values[:, 0]
        source = x if (other := call.get("key_value_states")) is None else other
        keys, values = self.k_proj(source), self.v_proj(source)
        queries, keys = self._normed(queries, keys)
        queries, keys = self._rotate(queries, keys, call.get("position_embeddings"))
        if cache is not None:
            keys, values = (t[:, 0] for t in cache.update(keys[:, None], values[:, None], self.layer_idx))
        return queries, keys, values

    def _normed(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not self.family.norms:
            return queries, keys
        # A norm takes its heads in their original order, halves apart; behind it the halves are paired for the
        # rotation.
        sizes, half = self.clover.qk, self.rotary // 2
        heads = [t.unflatten(-1, (-1, sizes)) for t in (queries, keys)]
        normed = [getattr(self, name)(t) for name, t in zip(self.family.norms, heads, strict=True)]
        paired = [t[..., : 2 * half].unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2) for t in normed]
        q, k = (torch.cat([p, t[..., 2 * half :]], -1).flatten(-2) for p, t in zip(paired, normed, strict=True))
        return q, k

    def _rotate(
        self, queries: Tensor, keys: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Turn every pair of columns by its own frequency, as one complex product over queries and keys together."""
        if not self.rotary:
            return queries, keys
        if position_embeddings is None:
            raise TypeError("attention with rotary positions was called without position_embeddings")
        half, dtype = self.rotary // 2, queries.dtype
        cos, sin = (t[..., :half] for t in position_embeddings)
        table = torch.stack([cos, sin], -1)
        if self.clover.qk > self.rotary:  # columns that do not turn find a 1 at the end
            table = torch.cat(
                [table, torch.eye(2, dtype=table.dtype, device=table.device)[:1].expand(*table.shape[:-2], 1, 2)], -2
            )
        x = torch.cat([queries, keys], -1)
        x = x.view(*x.shape[:-1], -1, 2)
        if dtype.itemsize < 4:  # there are no complex numbers of half precision to rely on
            x, table = x.float(), table.float()
        turned = torch.view_as_complex(x) * torch.view_as_complex(table).index_select(-1, self.frequencies)
        flat = torch.view_as_real(turned).flatten(-2).to(dtype)
        return flat.split([queries.shape[-1], keys.shape[-1]], -1)

    def _is_short(self, queries: Tensor, keys: Tensor) -> bool:
        """Whether one padded call is cheaper than one for each group."""
        fused = self.config._attn_implementation != "eager"
        return fused and len(self.clover.groups) > 1 and queries.shape[1] * keys.shape[1] <= SHORT

    def _attend_padded(
        self, attend: Callable, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """All heads in one call, padded to the largest: ``(batch, tokens, columns)``."""
        if self._made_padding is None or self._made_padding.queries.device != queries.device:
            self._made_padding = _Padding.of(self._sizes(), self.clover.queries, queries.device)
        size, q_to, k_from, v_from, out_from = self._made_padding
        kv, n = len(v_from) // size, self.clover.queries
        wide = queries.new_zeros(*queries.shape[:2], kv * n * size).index_copy(-1, q_to, queries)
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, [h for group in self.clover.groups for h in self._query_heads(group)]]
        k, v = (t.index_select(-1, order) for t, order in ((keys, k_from), (values, v_from)))
        out, _ = attend(_heads(wide, 0, kv * n, size), _heads(k, 0, kv, size), _heads(v, 0, kv, size), mask)
        return out.flatten(2).index_select(-1, out_from)

    def _attend_by_group(
        self, attend: Callable, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One call a group: ``(batch, tokens, columns)``, and the weights of each group."""
        outputs, weights = [], []
        for group, q, k, v, m in self._groups(queries, keys, values, mask):
            if self.config._attn_implementation != "eager":
                # The fused kernels want one head size; their fallback costs far more than a few zero columns.
                size = max(group.qk, group.value)
                q, k, v = (_pad(t, size) for t in (q, k, v))
            out, weight = attend(q, k, v, m)
            outputs.append(out[..., : group.value].flatten(2))
            weights.append(weight)
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0], weights

    def _groups(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Iterator[tuple]:
        """Each group with its queries, keys, values ``(batch, heads, tokens, columns)`` and its mask."""
        n = self.clover.queries
        for group, at_qk, at_v in self.clover.spans():
            kv = len(group.heads)
            q = _heads(queries, n * at_qk, n * kv, group.qk)
            k, v = _heads(keys, at_qk, kv, group.qk), _heads(values, at_v, kv, group.value)
            m = mask if mask is None or mask.shape[1] == 1 else mask[:, self._query_heads(group)]
            yield group, q, k, v, m

    def _writes_one(self, x: Tensor) -> bool:
        """Whether this is one new token for heads that no fused kernel can take together."""
        uneven = len(self.clover.groups) > 1 or self.clover.groups[0].qk != self.clover.groups[0].value
        return uneven and x.shape[1] == 1 and not self.training and self.config._attn_implementation == "sdpa"

    def _attend_one(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """One token against the flat cache, all heads at once: ``(batch, 1, columns)``.

        Reading the cache is what takes the time, so it is read once and as it lies: each query stands in a row as
        wide as all keys, zero outside its own head's columns, and of each row of results only its own head's columns
        are taken.
        """
        n, results = self.clover.queries, []
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, [h for group in self.clover.groups for h in self._query_heads(group)]]
        for span in self._spans(queries.device):
            q, k, v = (x[..., part] for x, part in zip((queries, keys, values), span.columns, strict=True))
            rows = q.new_zeros(len(q), span.heads * n * k.shape[-1])
            rows.index_copy_(1, span.into_rows, q.flatten(1) * self.scaling)
            logits = rows.view(len(q), span.heads * n, -1) @ k.mT
            if mask is not None:
                m = mask[:, :, 0] if mask.shape[1] == 1 else mask[:, span.first * n : (span.first + span.heads) * n, 0]
                logits = logits.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else logits + m
            weights = logits.softmax(-1, dtype=torch.float32)
            weights = nn.functional.threshold(weights, NOTHING, 0.0, inplace=True).to(v.dtype)
            results.append((weights @ v).flatten(1).index_select(1, span.from_rows))
        return (torch.cat(results, -1) if len(results) > 1 else results[0]).unsqueeze(1)

    def _spans(self, device: torch.device) -> list[_Span]:
        """The heads in stretches of at most ``SPAN``, made once for a device."""
        if not self._made_spans or self._made_spans[0].into_rows.device != device:
            sizes = self._sizes()
            self._made_spans = [
                _Span.of(sizes, first, min(first + SPAN, len(sizes)), self.clover.queries, device)
                for first in range(0, len(sizes), SPAN)
            ]
        return self._made_spans

    def _sizes(self) -> list[tuple[int, int]]:
        """Q-K and V-O columns of every KV head that is left, in the order of the flat layout."""
        return [(g.qk, g.value) for g in self.clover.groups for _ in g.heads]

    def _query_heads(self, group: Group) -> list[int]:
        n = self.clover.queries
        return [h * n + i for h in group.heads for i in range(n)]

    def _mask(self, mask: Tensor | None, alibi: Tensor | None, batch: int) -> Tensor | None:
        """The additive mask; a bias by head (ALiBi) is added to it."""
        if alibi is None:
            return mask
        bias = alibi.unflatten(0, (batch, -1))
        return bias if mask is None else bias + mask

    def _in_order(self, weights: list[Tensor | None]) -> Tensor | None:
        """Attention weights of all groups in the order of the original query heads."""
        if weights[0] is None:
            return None
        order = [h for group in self.clover.groups for h in self._query_heads(group)]
        known = torch.cat([w for w in weights if w is not None], 1)
        whole = known.new_zeros(known.shape[0], self.clover.kv_heads * self.clover.queries, *known.shape[2:])
        return whole.index_copy(1, torch.tensor(order, device=whole.device), known)

    def extra_repr(self) -> str:
        return ", ".join(f"{len(g.heads)} kv heads of {g.qk}/{g.value}" for g in self.clover.groups)


def _heads(flat: Tensor, start: int, heads: int, size: int) -> Tensor:
    """``heads`` heads of ``size`` columns from ``start`` on: ``(batch, heads, tokens, size)``, a view."""
    batch, tokens, _ = flat.shape
    return flat.narrow(-1, start, heads * size).view(batch, tokens, heads, size).transpose(1, 2)


def keeps_key_bias(block: Block) -> bool:
    """A key bias shifts all logits of a query alike and softmax ignores it, unless position or a norm comes between."""
    return block.rotary > 0 or block.normed


def eager_attention(
    module: CloverAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain steps, for its weights. Shapes as in transformers: ``(batch, heads, tokens, size)``."""
    n = module.num_key_value_groups
    key, value = key.repeat_interleave(n, 1), value.repeat_interleave(n, 1)
    logits = query @ key.mT * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)  # as every eager attention of transformers
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _pad(x: Tensor, size: int) -> Tensor:
    return nn.functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x
