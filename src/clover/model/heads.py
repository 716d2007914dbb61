"""One attention block of any family, seen as heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clover.errors import CloverError


@dataclass(frozen=True)
class Heads:
    """The projections of one attention block, query heads filed under the KV head that they read.

    Sizes: ``kv`` KV heads, ``n`` query heads each, head sizes ``d`` (query, key) and ``e`` (value), model widths
    ``D`` in and ``M`` out; keys and values may read another sequence, of width ``C``. Weights act from the left, ``q
    = W x``.
    """

    q: Float[Tensor, "kv n d D"]
    k: Float[Tensor, "kv d C"]
    v: Float[Tensor, "kv e C"]
    o: Float[Tensor, "kv n M e"]
    q_bias: Float[Tensor, "kv n d"] | None
    k_bias: Float[Tensor, "kv d"] | None
    v_bias: Float[Tensor, "kv e"] | None
    o_bias: Float[Tensor, " M"] | None
    rotary: int = 0
    """Leading columns of a head that are rotated by position (RoPE), in pairs ``(f, f + rotary / 2)``."""

    @property
    def pairs(self) -> int:
        """Rotary pairs a head."""
        return self.rotary // 2

    def map(self, change: Callable[[Tensor], Tensor]) -> Heads:
        """The same with every tensor changed."""
        changed: dict[str, Any] = {n: change(t) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **changed)

    def parameters(self) -> int:
        """Number of weights and biases in the block."""
        return sum(t.numel() for t in (getattr(self, f.name) for f in fields(self)) if isinstance(t, Tensor))

    def check_finite(self, name: str) -> None:
        """Refuse NaN, infinite or absent weights; ``name`` is the block's path in the model.

        Raises:
            CloverError: names the projection.
        """
        for field in fields(self):
            tensor = getattr(self, field.name)
            if not isinstance(tensor, Tensor):
                continue
            if tensor.is_meta:
                raise CloverError(f"{name}: {field.name} is on the meta device; load the model's weights first")
            if not finite(tensor):
                bad = "NaN" if tensor.isnan().any() else "infinite values"
                raise CloverError(f"{name}: the weights of {field.name} contain {bad}; repair or reload the checkpoint")


def energies(rows: Float[Tensor, "kv *n d D"]) -> Float[Tensor, "kv *n d"]:
    """Squared norms of rows, float64; head by head, since copying all weights takes longer than the sums."""
    return torch.stack([torch.einsum("...dn,...dn->...d", head, head) for head in map(Tensor.double, rows)])


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; reads once and makes no mask as large as the tensor."""
    return not tensor.numel() or all(extreme.isfinite() for extreme in tensor.detach().aminmax())
