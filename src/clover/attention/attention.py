"""The attention module of a rewritten model: any ranks, any family, through transformers' attention interface.

Heads of equal sizes form groups. A token's queries (and keys, values) lie flat, group by group, head by head, so a
layer is four plain ``Linear`` modules and one call of the attention function a group; the cache holds exactly the
columns that are kept, as one "head" of ``(batch, 1, tokens, columns)``. A rotated pair takes two neighbouring
columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clover.attention.cache import append, begun, stepped
from clover.attention.eager import eager_attention, exporting, tracing
from clover.attention.ragged import (
    Tables,
    aligned,
    as_heads,
    attend_one,
    by_head,
    is_by_head,
    joined,
    kernel_size,
    padded,
    rewritable,
    short,
    take,
    turns_as_it_lies,
)
from clover.errors import CloverError
from clover.model.block import Block, arguments, growth_at, head_bias, norm_entries
from clover.model.mla import read
from clover.model.rotation import angles, turn_pairs, turned, turned_by
from clover.planning.plan import BlockPlan


class CloverAttention(nn.Module):
    """Attention whose heads keep only the directions of a plan.

    Submodules, plain ``Linear`` so that quantisers and adapters find what they know: ``qkv_proj`` with the rows of the
    queries, of the keys, then of the values (``q_proj`` and ``kv_proj`` where keys and values read another sequence)
    and, unless the model keeps it elsewhere, ``o_proj``. Buffer ``frequencies``, int64: for each pair of flat
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
        self.family, self.config, self.positional = family, block.config, block.positional
        self.layer_idx: Any = getattr(core, "layer_idx", None)
        self.is_causal, self.is_cross = family.causal, plan.part == "cross"
        self.num_key_value_groups = plan.queries
        self.scaling, self.growth, self.softcap = block.scale, block.growth, block.softcap
        self.attention_dropout = block.dropout(family.dropout)
        self.output_dropout = block.dropout(family.output_dropout)
        self.sliding_window = family.window(core)
        self.rotary = block.rotary
        self.beside, self.neighbours_beside = block.beside, block.neighbours_beside
        self.apart = self.is_cross or family.latent is not None

        heads, n = block.heads(), plan.queries
        width, source, out = heads.q.shape[-1], heads.k.shape[-1], heads.o.shape[-2]
        self.columns = [(group.qk + self.beside, group.value) for group in plan.groups]
        self.uneven = len(plan.groups) > 1 or len(set(self.columns[0])) > 1
        self.sizes = [n * plan.qk_kept, plan.qk_kept, plan.vo_kept]
        # A key bias shifts all logits of a query alike and softmax ignores it, unless position or a norm comes between.
        # A value bias comes out as it is if the weights sum to 1, and is part of the output's bias.
        self.plain_softmax = block.plain_softmax
        kept = {
            "q": True,
            "k": block.rotary > 0 or block.normed or not self.plain_softmax,
            "v": block.sinks is not None,
        }
        held = {"q": heads.q_bias, "k": heads.k_bias, "v": heads.v_bias}
        self.biased = {which for which in "qkv" if kept[which] and held[which] is not None}

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Module:
            # Not even drawn: for large weights that takes longer than to compute them.
            return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=dtype, device=device)

        if self.apart:
            self.q_proj = linear(width, self.sizes[0] + len(plan.query_order) * self.beside, "q" in self.biased)
            self.kv_proj = linear(source, sum(self.sizes[1:]), not self.biased.isdisjoint("kv"))
        else:
            self.qkv_proj = linear(width, sum(self.sizes), bool(self.biased))
        self.o_proj = nn.Identity() if family.core else linear(n * plan.vo_kept, out, plan.output_bias)
        self.norms = block.norms
        self._take_over(block)
        rotated = (n + 1) * plan.qk_kept // 2 if self.rotary else 0
        sizes = [size for g, size in zip(plan.groups, self.columns, strict=True) for _ in g.heads]
        self._tables = Tables(sizes, n, self.scaling, plan.query_order)
        self.register_buffer("frequencies", torch.zeros(rotated, dtype=torch.int64, device=device))

    @torch.no_grad()
    def _take_over(self, block: Block) -> None:
        """Copy what a cut leaves as it is; in norms, put the parameters of the heads into our order."""
        core: Any = block.core
        for name in (*self.norms, self.family.sinks, self.family.position_bias, *self.family.kept):
            if name is not None and hasattr(core, name):
                setattr(self, name, copy.deepcopy(getattr(core, name)))
        if self.beside:
            self.queries_beside().copy_(block.queries_beside()[self.head_order()[0]])
        for name, heads in zip(self.norms, self.head_order(), strict=False):
            for parameter in getattr(self, name).parameters():
                entries = norm_entries(parameter, heads, block)
                parameter.data = parameter.view(-1, self.clover.qk)[entries].reshape(-1, *parameter.shape[1:])

    def head_order(self) -> tuple[Tensor, Tensor]:
        """Which query heads and which KV heads of the original lie in the flat layout, int64."""
        return torch.tensor(self.clover.query_order), torch.tensor([h for g in self.clover.groups for h in g.heads])

    def rows(self, which: str) -> tuple[str, slice]:
        """The name of the projection that holds ``q``, ``k`` or ``v``, and their rows in it."""
        start = {"q": 0, "k": self.sizes[0], "v": sum(self.sizes[:2])}[which]
        stop = start + self.sizes["qkv".index(which)]
        if not self.apart:
            return "qkv_proj", slice(start, stop)
        first = 0 if which == "q" else self.sizes[0]
        return ("q_proj" if which == "q" else "kv_proj"), slice(start - first, stop - first)

    def queries_beside(self) -> Tensor:
        """As ``Block.queries_beside``, of the query heads that are left, in the order of the flat layout."""
        projection: Any = self.q_proj
        return projection.weight[self.sizes[0] :].unflatten(0, (-1, self.beside))

    @property
    def cached(self) -> tuple[int, int]:
        """Numbers that a cache holds of a token, in the block that was and in this one."""
        if self.family.latent is not None:  # the latent and the key beside it, in both
            held: Any = self.kv_proj
            return held.in_features + self.beside, held.in_features + self.beside
        before = self.family.copies(self, self.clover.queries) * self.clover.kv_heads
        return before * (self.clover.qk + self.clover.vo), self.clover.qk_kept + self.clover.vo_kept

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
                projection.bias[rows] = pieces[f"{which}_bias"] if which in self.biased else 0
        o: Any = self.o_proj if output is None else output
        o.weight.copy_(pieces["o"])
        if o.bias is not None:
            o.bias.copy_(pieces["o_bias"])
        if self.rotary:
            self.frequencies.copy_(pieces["frequencies"])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Attend; takes the arguments of the class it replaces.

        Returns:
            The block's output ``(batch, tokens, D)`` and, from the eager implementation, the attention weights
            ``(batch, query heads, tokens, source)`` in the order of the original heads (zero for heads that are gone).
            Between them the position bias, in families whose blocks hand it on.
        """
        call = arguments(self.family, self.is_cross, self.positional, args, kwargs)
        if call.get("cache") is not None:
            raise CloverError("a pruned model can't share a paged cache; use generate")
        x, seen = call["hidden_states"], self._seen(call)
        queries, keys, values, row = self._project(x, call)
        if self.growth:
            row, queries = None, queries * growth_at(self.growth, call, seen).unsqueeze(-1).to(queries.dtype)
        bias = head_bias(self.family, self, call, x.shape[1], keys.shape[1], seen)
        mask = self._mask(call.pop("attention_mask", None), bias, x.shape[1], keys.shape[1])
        residual = call.pop("residual", None)
        weights: list[Tensor | None] = [None]
        if self._writes_one(x, keys, mask):
            tokens = keys.shape[1]
            if not self.apart:
                keys, values = stepped(call.get("past_key_values"), self.layer_idx, keys, values)
            z = attend_one(self._tables, queries, keys, values, mask, tokens)
        else:
            if self.uneven and not (exporting() and self.plain_softmax):
                self._tables.at(queries)  # made before a graph is compiled, whichever way that goes
            for name in ("hidden_states", "past_key_values", "key_value_states", "position_embeddings", "use_cache",
                         "sliding_window"):  # fmt: skip
                call.pop(name, None)
            z, weights = self._attend(queries, keys, values, row, mask, call)
        y = self.o_proj(z)
        if self.training:
            y = nn.functional.dropout(y, self.output_dropout)
        y = y if residual is None else y + residual
        return (y, *([bias] if self.family.position_bias and self.family.hands_on else []), self._in_order(weights))

    def _seen(self, call: dict[str, Any]) -> Any:
        """Tokens that the cache holds, for families whose logits depend on it."""
        if not (self.family.position_bias or self.growth) or call.get("past_key_values") is None:
            return 0
        seen = call["past_key_values"].get_seq_length(self.layer_idx)
        return seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts on in place

    def _project(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Flat queries ``(batch, tokens, columns)``, and keys and values with whatever the cache holds before them.

        Where it holds nothing, and they could stay where they were computed, also the rows that begin with all three.
        """
        cache = call.get("past_key_values")
        if self.is_cross:
            return *self._project_cross(x, call["key_value_states"], cache), None
        if self.family.latent is not None:
            return *self._project_latent(x, call.get("position_embeddings"), cache), None
        row, parts = self.qkv_proj(x), [sum(self.sizes[:2]), self.sizes[2]]
        stays = not self.norms and turns_as_it_lies(row)
        ours = stays and rewritable(row, self.qkv_proj)  # if not, as it lies all the same: rounding must not differ
        if stays and self.rotary and row.shape[-1] % 2:
            row, parts = nn.functional.pad(row, (0, 1)), [*parts, 1]
        qk, values, *_ = row.split_with_sizes(parts, -1)
        if self.norms and not self.family.norms_last:
            qk = self._normed(qk)
        if self.rotary:
            qk = self._rotate(qk, call.get("position_embeddings"), ours)
        if self.norms and self.family.norms_last:
            qk = self._normed(qk)
        queries, keys = qk.split_with_sizes(self.sizes[:2], -1)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            keys, values = append(cache, self.layer_idx, keys, values)
            ours = ours and begun(cache, self.layer_idx, x.shape[1])
        return queries, keys, values, row if ours else None

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

    def _project_latent(self, x: Tensor, position_embeddings: Any, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The same where keys and values come out of a latent: that, and the key beside it, is what the cache holds."""
        assert self.family.latent is not None
        source, latent, key = read(self, self.family.latent, x)
        queries, beside = self.q_proj(source).tensor_split([self.sizes[0]], -1)
        beside = beside.unflatten(-1, (-1, self.beside))
        if self.family.latent.turns:
            cos, sin = angles(self.family, position_embeddings, x.shape[1], self.beside // 2)
            beside = turned(beside, cos.unsqueeze(2), sin.unsqueeze(2), self.neighbours_beside)
            key = turned(key, cos, sin, self.neighbours_beside)
        if cache is not None:
            latent, key = append(cache, self.layer_idx, latent, key)
        keys, values = self.kv_proj(latent).split_with_sizes(self.sizes[1:], -1)
        return self._beside(queries, beside), self._beside(keys, key.unsqueeze(2)), values

    def _beside(self, flat: Tensor, more: Tensor) -> Tensor:
        """Columns of all heads, and behind those of each its own of ``more``, ``(batch, tokens, heads or 1, r)``."""
        n = flat.shape[-1] // self.sizes[1]
        heads = [n * len(group.heads) for group in self.clover.groups]
        parts = flat.split([h * group.qk for h, group in zip(heads, self.clover.groups, strict=True)], -1)
        beside = more.expand(-1, -1, sum(heads), -1).split(heads, 2)
        pairs = zip(parts, beside, strict=True)
        return joined([torch.cat([p.unflatten(-1, (m.shape[2], -1)), m], -1).flatten(2) for p, m in pairs])

    def _normed(self, qk: Tensor) -> Tensor:
        """Norm each head, or all together."""
        pairs = [(getattr(self, n), t) for n, t in zip(self.norms, qk.split(self.sizes[:2], -1), strict=True)]
        if self.family.norm_spans_heads:
            return torch.cat([norm(t) for norm, t in pairs], -1)
        return torch.cat([norm(t.unflatten(-1, (-1, self.clover.qk))).flatten(-2) for norm, t in pairs], -1)

    def _rotate(self, qk: Tensor, position_embeddings: Any, in_place: bool = False) -> Tensor:
        """Turn every pair of columns, of queries and keys together, by its own frequency."""
        if position_embeddings is None:
            raise TypeError("attention with rotary positions was called without position_embeddings")
        given = self.family, position_embeddings, qk.shape[1], self.rotary // 2, self.clover.qk > self.rotary
        # Compilers and exporters know real numbers only, and so did MPS for long.
        if not in_place and (tracing() or qk.is_mps):
            return turn_pairs(qk, *(take(t, self.frequencies) for t in angles(*given)))
        # Every layer is handed the same tensors, so what is made of them is kept on one.
        keeper: Any = position_embeddings if isinstance(position_embeddings, Tensor) else position_embeddings[0]
        kept = getattr(keeper, "clover_table", None)
        if kept is None or kept.shape[-2] != qk.shape[1]:  # some models add tokens between layers
            # There are no complex numbers of half precision to rely on.
            keeper.clover_table = torch.complex(*(t.float() if t.dtype.itemsize < 4 else t for t in angles(*given)))
        table = take(keeper.clover_table, self.frequencies)  # a column for each pair
        if in_place:
            qk.view(qk.dtype.to_complex()).mul_(table)
            return qk
        return turned_by(aligned(qk.float() if qk.dtype.itemsize < 4 else qk, 2), table).to(qk.dtype)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, row: Tensor | None, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One call a group: ``(batch, tokens, columns)``, and the weights of each group."""
        name = self.config._attn_implementation
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        if exporting() and self.plain_softmax:  # other runtimes know no fused kernel for these sizes
            interface = eager_attention
        plainly = interface is eager_attention
        dropout = self.attention_dropout if self.training else 0.0
        options |= {"scaling": self.scaling, "sliding_window": self.sliding_window, "dropout": dropout}
        if self.uneven and not plainly and short(queries, keys):
            options |= {} if self.plain_softmax else self._softmax_options(slice(None))
            return self._attend_padded(partial(interface, self, **options), queries, keys, values, row, mask), [None]
        outputs, weights, last = [], [], 0
        for group, q, k, v, m in self._groups(queries, keys, values, mask):
            first, last = last, last + q.shape[1]
            if not plainly:
                q, k, v = (padded(t, kernel_size(q.shape[-1], group.value, q.dtype)) for t in (q, k, v))
            out, weight = interface(self, q, k, v, m, **options, **self._softmax_options(slice(first, last)))
            outputs.append(out[..., : group.value].flatten(2))
            weights.append(weight)
        return joined(outputs), weights if name == "eager" else [None]

    def _softmax_options(self, heads: slice) -> dict[str, Any]:
        """What the attention of these query heads of the flat layout needs besides; plain softmax must not know it."""
        options: dict[str, Any] = {} if self.softcap is None else {"softcap": self.softcap}
        if self.family.sinks:
            sinks = getattr(self, self.family.sinks)
            options["s_aux"] = sinks[self._tables.heads(sinks.device)[heads]]
        return options

    def _attend_padded(
        self, attend: Callable, queries: Tensor, keys: Tensor, values: Tensor, row: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """All heads in one call, padded to the largest: ``(batch, tokens, columns)``."""
        padding, _ = self._tables.at(queries)
        q, k, v = padding.heads(queries, keys, values, row)
        return padding.flat(attend(q, k, v, by_head(mask, self._tables.heads))[0])

    def _groups(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Iterator[tuple]:
        """Each group with its queries, keys, values ``(batch, heads, tokens, columns)`` and its mask."""
        n, groups = self.clover.queries, self.clover.groups
        heads = [len(group.heads) for group in groups]
        qk, vo = ([h * size[i] for h, size in zip(heads, self.columns, strict=True)] for i in (0, 1))
        split = queries.split([n * size for size in qk], -1), keys.split(qk, -1), values.split(vo, -1)
        masks = [mask] * len(groups)
        if is_by_head(mask):
            masks = by_head(mask, self._tables.heads).split([n * h for h in heads], 1)
        for group, h, q, k, v, m in zip(groups, heads, *split, masks, strict=True):
            yield group, as_heads(q, n * h), as_heads(k, h), as_heads(v, h), m

    def _writes_one(self, x: Tensor, keys: Tensor, mask: Any) -> bool:
        """Whether this is one new token for heads that no fused kernel can take together."""
        if not self.uneven or exporting() or x.shape[1] != 1:  # exported, their number is free
            return False
        if not self.plain_softmax or self.training:
            return False
        name, window = self.config._attn_implementation, self.sliding_window
        if name == "sdpa":
            return True
        padding = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)  # flash attention is told no more
        return "flash" in name and padding and (window is None or keys.shape[1] <= window)

    def _mask(self, mask: Any, bias: Tensor | None, queries: Any, keys: Any) -> Any:
        """The mask; a bias by head is added to it."""
        if bias is None:
            return mask
        if not isinstance(mask, Tensor | None):
            raise CloverError(
                f"{self.config._attn_implementation} has no place for a bias by head; set attn_implementation to sdpa"
            )
        if mask is None and self.is_causal and queries > 1:  # else left to the kernels, which a mask would stop
            mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril()
        if mask is None:
            return bias
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask

    def _in_order(self, weights: list[Tensor | None]) -> Tensor | None:
        """Attention weights of all groups in the order of the original query heads."""
        if weights[0] is None:
            return None
        known = torch.cat([w for w in weights if w is not None], 1)
        whole = known.new_zeros(known.shape[0], self.clover.kv_heads * self.clover.queries, *known.shape[2:])
        return whole.index_copy(1, self._tables.heads(whole.device), known)

    def extra_repr(self) -> str:
        return ", ".join(f"{len(g.heads)} kv heads of {g.qk}/{g.value}" for g in self.clover.groups)
