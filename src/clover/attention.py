"""The attention module of a rewritten model: any ranks, any family, through transformers' attention interface.

Heads of equal sizes form groups. A token's queries (and keys, values) lie flat, group by group, head by head, so a layer
is four plain ``Linear`` modules and one call of the attention function a group; the cache holds exactly the columns that
are kept, as one "head" of ``(batch, 1, tokens, columns)``. A rotated pair takes two neighbouring columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clover.families import Block, arguments
from clover.plan import BlockPlan, Group


class CloverAttention(nn.Module):
    """Attention whose heads keep only the directions of a plan.

    Submodules: ``q_proj``, ``k_proj``, ``v_proj`` and, unless the model keeps it elsewhere, ``o_proj``: plain ``Linear``,
    so quantisers and adapters find what they know. Buffer ``frequencies``: for each rotated column the column of the
    model's cos and sin table that turns it, int32.
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
        rotated = (n + 1) * plan.qk_kept if self.rotary else 0
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
        outputs, weights = [], []
        for group, q, k, v, m in self._groups(queries, keys, values, mask):
            size = max(group.qk, group.value)
            if q.shape[2] > 1 and self.config._attn_implementation != "eager":
                # The fused kernels want one head size; the slow fallback costs far more than a few zero columns.
                q, k, v = (_pad(t, size) for t in (q, k, v))
            out, weight = interface(
                self, q, k, v, m, scaling=self.scaling, sliding_window=self.sliding_window,
                dropout=self.attention_dropout if self.training else 0.0, **call,
            )  # fmt: skip
            outputs.append(out[..., : group.value].flatten(2))
            weights.append(weight)
        z = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        y = nn.functional.dropout(self.o_proj(z), self.output_dropout, self.training)
        if residual is not None:
            y = y + residual
        return y, self._in_order(weights)

    def _project(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Flat queries ``(batch, tokens, columns)``, and keys and values with whatever the cache holds before them."""
        cache = call.get("past_key_values")
        table = self._rotation(call.get("position_embeddings"))
        queries = self.q_proj(x)
        cached = False
        if isinstance(cache, EncoderDecoderCache):
            if self.is_cross:
                cached = bool(cache.is_updated.get(self.layer_idx))
                cache.is_updated[self.layer_idx] = True
                cache = cache.cross_attention_cache
            else:
                cache = cache.self_attention_cache
        if cached:
            return self._turn(queries, table, 0), cache.layers[self.layer_idx].keys[:, 0], cache.layers[self.layer_idx].values[:, 0]
        source = x if (other := call.get("key_value_states")) is None else other
        keys, values = self.k_proj(source), self.v_proj(source)
        queries, keys = self._normed(queries, keys)
        queries, keys = self._turn(queries, table, 0), self._turn(keys, table, queries.shape[-1])
        if cache is not None:
            keys, values = (t[:, 0] for t in cache.update(keys[:, None], values[:, None], self.layer_idx))
        return queries, keys, values

    def _normed(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not self.family.norms:
            return queries, keys
        norms = [getattr(self, name) for name in self.family.norms]
        size = self.clover.qk
        return tuple(n(t.unflatten(-1, (-1, size))).flatten(-2) for n, t in zip(norms, (queries, keys), strict=True))  # type: ignore[return-value]

    def _rotation(self, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Cos and signed sin for each flat column of queries and keys, gathered from the model's table."""
        if not self.rotary:
            return None
        if position_embeddings is None:
            raise TypeError("attention with rotary positions was called without position_embeddings")
        cos, sin = position_embeddings
        half = self.rotary // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        if self.clover.qk > self.rotary:  # the last column of the table stands for directions that do not turn
            cos, sin = nn.functional.pad(cos, (0, 1), value=1.0), nn.functional.pad(sin, (0, 1))
        return cos.index_select(-1, self.frequencies), sin.index_select(-1, self.frequencies)

    def _turn(self, x: Tensor, table: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        """Rotate pairs of columns as (real, imaginary) by the columns of the table that begin at ``start``."""
        if table is None:
            return x
        cos, sin = (t[..., start : start + x.shape[-1]] for t in table)
        apart = self.rotary // 2 if self.family.norms else 1  # norms keep their heads in the original order
        swapped = x.unflatten(-1, (-1, 2, apart)).flip(-2).flatten(-3)
        return torch.addcmul(x * cos, swapped, sin)

    def _groups(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None):  # noqa: ANN202
        """Each group with its queries, keys, values ``(batch, heads, tokens, columns)`` and its mask."""
        n, at_qk, at_v = self.clover.queries, 0, 0
        for group in self.clover.groups:
            kv = len(group.heads)
            q = queries[..., n * at_qk : n * (at_qk + kv * group.qk)].unflatten(-1, (kv * n, group.qk))
            k = keys[..., at_qk : at_qk + kv * group.qk].unflatten(-1, (kv, group.qk))
            v = values[..., at_v : at_v + kv * group.value].unflatten(-1, (kv, group.value))
            m = mask if mask is None or mask.shape[1] == 1 else mask[:, self._query_heads(group)]
            yield group, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), m
            at_qk, at_v = at_qk + kv * group.qk, at_v + kv * group.value

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
