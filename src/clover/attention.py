"""The attention module of a rewritten model: any ranks, any family, through transformers' attention interface.

Heads of equal sizes form groups. A token's queries (and keys, values) lie flat, group by group, head by head, so a
layer is four plain ``Linear`` modules and one call of the attention function a group; the cache holds exactly the
columns that are kept, as one "head" of ``(batch, 1, tokens, columns)``. A rotated pair takes two neighbouring
columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clover.cache import growing
from clover.families import Block, arguments
from clover.plan import BlockPlan, Group

SPAN = 8
"""KV heads that a single new token reads as one: more would waste arithmetic, fewer would waste launches."""
NOTHING = 1e-30
"""Attention weights below this are zero: they change no float32 sum, and denormal numbers are slow on CPUs."""


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

    Submodules, plain ``Linear`` so that quantisers and adapters find what they know: ``qkv_proj`` with the rows of the
    queries, of the keys, then of the values (``q_proj`` and ``kv_proj`` where keys and values read another sequence)
    and, unless the model keeps it elsewhere, ``o_proj``. Buffer ``frequencies``, int32: for each pair of flat
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
        self.layer_idx: Any = getattr(core, "layer_idx", None)
        self.is_causal = plan.part == "decoder"
        self.is_cross = plan.part == "cross"
        self.num_key_value_groups = plan.queries
        self.scaling = block.get(family.scale)
        self.attention_dropout = block.get(family.dropout)
        self.output_dropout = block.get(family.output_dropout) if family.output_dropout else 0.0
        self.sliding_window = getattr(core, "sliding_window", getattr(block.config, "sliding_window", None))
        self.rotary = block.rotary

        heads, n = block.heads(), plan.queries
        width, source, out = heads.q.shape[-1], heads.k.shape[-1], heads.o.shape[-2]
        self.sizes = [n * plan.qk_kept, plan.qk_kept, plan.vo_kept]
        # A key bias shifts all logits of a query alike and softmax ignores it, unless position or a norm comes between.
        self.keeps_key_bias = block.rotary > 0 or block.normed
        biases = heads.q_bias is not None, self.keeps_key_bias and heads.k_bias is not None

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

        if self.is_cross:
            self.q_proj = linear(width, self.sizes[0], biases[0])
            self.kv_proj = linear(source, sum(self.sizes[1:]), biases[1])
        else:
            self.qkv_proj = linear(width, sum(self.sizes), any(biases))
        self.o_proj = nn.Identity() if family.core else linear(n * plan.vo_kept, out, plan.output_bias)
        for name in family.norms:
            setattr(self, name, copy.deepcopy(getattr(core, name)))
        rotated = (n + 1) * plan.qk_kept // 2 if self.rotary else 0
        self._made_spans: list[_Span] = []
        self.register_buffer("frequencies", torch.zeros(rotated, dtype=torch.int32, device=device))

    def rows(self, which: str) -> tuple[str, slice]:
        """The name of the projection that holds ``q``, ``k`` or ``v``, and their rows in it."""
        start = {"q": 0, "k": self.sizes[0], "v": sum(self.sizes[:2])}[which]
        stop = start + self.sizes["qkv".index(which)]
        if not self.is_cross:
            return "qkv_proj", slice(start, stop)
        first = 0 if which == "q" else self.sizes[0]
        return ("q_proj" if which == "q" else "kv_proj"), slice(start - first, stop - first)

    @torch.no_grad()
    def fill(self, pieces: Mapping[str, Tensor], output: nn.Linear | None = None) -> None:
        """Set the weights.

        Args:
            pieces: of one block, from ``Basis.cut``; biases that this module has no use for are left out.
            output: the output projection, where it lives outside of this module.
        """
        for which in "qkv":
            name, rows = self.rows(which)
            projection: nn.Linear = self.get_submodule(name)  # type: ignore[assignment]
            projection.weight[rows] = pieces[which].to(projection.weight.dtype)
            if projection.bias is not None:
                kept = which == "q" or (which == "k" and self.keeps_key_bias)
                projection.bias[rows] = pieces[f"{which}_bias"] if kept and f"{which}_bias" in pieces else 0
        o: Any = self.o_proj if output is None else output
        o.weight.copy_(pieces["o"])
        if o.bias is not None:
            o.bias.copy_(pieces["o_bias"])
        if self.rotary:
            self.frequencies.copy_(pieces["frequencies"])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend; takes the arguments of the class it replaces.

        Returns:
            The block's output ``(batch, tokens, D)`` and, from the eager implementation, the attention weights
            ``(batch, query heads, tokens, source)`` in the order of the original heads (zero for heads that are gone).
        """
        call = arguments(self.family, self.is_cross, args, kwargs)
        x = call.pop("hidden_states")
        queries, keys, values = self._project(x, call)
        mask = self._mask(call.pop("attention_mask", None), call.pop("alibi", None), x.shape[0])
        residual = call.pop("residual", None)
        weights: list[Tensor | None] = [None]
        if self._writes_one(x):
            z = self._attend_one(queries, keys, values, mask)
        else:
            for name in ("past_key_values", "key_value_states", "position_embeddings", "use_cache", "sliding_window"):
                call.pop(name, None)
            z, weights = self._attend(queries, keys, values, mask, call)
        y = self.o_proj(z)
        if self.training:
            y = nn.functional.dropout(y, self.output_dropout)
        return (y if residual is None else y + residual), self._in_order(weights)

    def _project(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Flat queries ``(batch, tokens, columns)``, and keys and values with whatever the cache holds before them."""
        cache = call.get("past_key_values")
        if self.is_cross:
            return self._project_cross(x, call["key_value_states"], cache)
        qk, values = self.qkv_proj(x).split([sum(self.sizes[:2]), self.sizes[2]], -1)
        if self.family.norms:
            qk = self._normed(qk)
        if self.rotary:
            qk = self._rotate(qk, call.get("position_embeddings"))
        queries, keys = qk.split(self.sizes[:2], -1)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            cache = growing(cache, self.layer_idx)
            keys, values = (t[:, 0] for t in cache.update(keys[:, None], values[:, None], self.layer_idx))
        return queries, keys, values

    def _project_cross(self, x: Tensor, source: Tensor | None, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The same where keys and values read another sequence; a cache that has seen it gives them back."""
        queries = self.q_proj(x)
        if isinstance(cache, EncoderDecoderCache):
            known = bool(cache.is_updated.get(self.layer_idx))
            cache.is_updated[self.layer_idx] = True
            cache = cache.cross_attention_cache
            if known:
                return queries, cache.layers[self.layer_idx].keys[:, 0], cache.layers[self.layer_idx].values[:, 0]
        keys, values = self.kv_proj(source).split(self.sizes[1:], -1)
        if cache is not None:
            keys, values = (t[:, 0] for t in cache.update(keys[:, None], values[:, None], self.layer_idx))
        return queries, keys, values

    def _normed(self, qk: Tensor) -> Tensor:
        """Norm each head, whose columns lie in their original order, halves apart; pair the halves for the rotation."""
        half, heads = self.rotary // 2, [t.unflatten(-1, (-1, self.clover.qk)) for t in qk.split(self.sizes[:2], -1)]
        normed = torch.cat([getattr(self, n)(t) for n, t in zip(self.family.norms, heads, strict=True)], -2)
        paired = normed[..., : 2 * half].unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
        return torch.cat([paired, normed[..., 2 * half :]], -1).flatten(-2)

    def _rotate(self, qk: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """Turn every pair of columns, of queries and keys together, by its own frequency."""
        if position_embeddings is None:
            raise TypeError("attention with rotary positions was called without position_embeddings")
        cos, sin = (t[..., : self.rotary // 2] for t in position_embeddings)
        if self.clover.qk > self.rotary:  # columns that do not turn find an angle of zero at the end
            cos, sin = nn.functional.pad(cos, (0, 1), value=1.0), nn.functional.pad(sin, (0, 1))
        if torch.compiler.is_compiling():  # compilers and exporters know real numbers only
            return _turn(qk, cos.index_select(-1, self.frequencies), sin.index_select(-1, self.frequencies))
        if half := qk.dtype.itemsize < 4:  # there are no complex numbers of half precision to rely on
            cos, sin = cos.float(), sin.float()
        table = torch.complex(cos, sin).index_select(-1, self.frequencies)
        x = qk.float() if half else qk
        if any(stride % 2 for stride in x.stride()[:-1]):
            x = x.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table
        return torch.view_as_real(turned).flatten(-2).to(qk.dtype)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One call a group: ``(batch, tokens, columns)``, and the weights of each group."""
        name = self.config._attn_implementation
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        options |= {"scaling": self.scaling, "sliding_window": self.sliding_window, "dropout": dropout}
        outputs, weights = [], []
        for group, q, k, v, m in self._groups(queries, keys, values, mask):
            if name != "eager":
                # The fused kernels want one head size; their fallback costs far more than a few zero columns.
                size = max(group.qk, group.value)
                q, k, v = (_pad(t, size) for t in (q, k, v))
            out, weight = interface(self, q, k, v, m, **options)
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


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring columns by angles whose cosines and sines are given, in real numbers."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(x.dtype)


def _heads(flat: Tensor, start: int, heads: int, size: int) -> Tensor:
    """``heads`` heads of ``size`` columns from ``start`` on: ``(batch, heads, tokens, size)``, a view."""
    batch, tokens, _ = flat.shape
    return flat.narrow(-1, start, heads * size).view(batch, tokens, heads, size).transpose(1, 2)


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
