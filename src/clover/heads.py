"""One attention block of any family, seen as heads."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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

    def double(self) -> Heads:
        """The same in float64, detached from the model."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: t.detach().double() for name, t in tensors.items()})

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
            if not all(piece.isfinite().all() for piece in tensor):  # by heads: no mask as large as the weights
                bad = "NaN" if tensor.isnan().any() else "infinite values"
                raise CloverError(f"{name}: the weights of {field.name} contain {bad}; repair or reload the checkpoint")
