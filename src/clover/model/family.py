"""What is said of one attention class of transformers: the row type of the table in ``families``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Latent:
    """Names in a block whose keys and values come out of one latent (MLA, arXiv 2405.04434).

    What turns by position stands beside the heads: some columns of each query, behind its others, and one key for all
    heads, which comes with the latent. The cache holds latent and key.
    """

    queries: tuple[str, ...] = ("q_a_proj", "q_a_layernorm")
    """Modules that queries go through before their projection, in blocks that have them."""
    keys: str = "kv_a_proj_with_mqa"
    """The projection to the latent, and to the key behind it."""
    norm: str = "kv_a_layernorm"
    """The norm of the latent."""
    beside: str = "qk_rope_head_dim"
    """Columns of that key."""
    turns: bool = True
    neighbours: bool | Callable[[Any], Any] = True
    """As in ``Family``; or what says so of each block, given its core."""

    @property
    def kept(self) -> tuple[str, ...]:
        """What the rewritten block takes over."""
        return *self.queries, self.keys, self.norm, self.beside


def own_window(core: Any) -> int | None:
    """The sliding window that a module says it has."""
    return getattr(core, "sliding_window", None)


@dataclass(frozen=True)
class Family:
    """Names inside one attention class. Dotted names are paths from the attention module (or from ``core``)."""

    q: str = "q_proj"
    """The first of several, parted by spaces, that a block has."""
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str | None = None
    """A projection that holds several of q, k and v; ``q``, ``k``, ``v`` then only name their order in it."""
    interleaved: bool = False
    """The fused rows run KV head by KV head (its queries, key and value) instead of all of q, all of k, all of v."""
    core: str = ""
    """The child that computes attention, where the matched class also holds the output projection beside it."""
    heads: str = "config.num_attention_heads"
    kv_heads: str | None = None
    head_dim: str = "head_dim"
    value_dim: str | None = None
    """Size of a head's values, where it may be another one."""
    latent: Latent | None = None
    scale: tuple[str, ...] = ("scaling",)
    """Factors of the logits; without one it is one over the square root of the head size."""
    growth: Callable[[Any], tuple[float, float, float] | None] | None = None
    """Gives ``b``, ``n`` and ``s`` of a core whose query at position ``p`` is multiplied by ``1 + b log(1 + floor((p +
    s) / n))``."""
    rotary: bool | Callable[[Any], Any] = False
    """Rotated by position; or what says so of each block, given its core."""
    neighbours: bool = False
    """The columns of a rotary pair are neighbours, instead of half the rotated columns apart."""
    table: Literal["halves", "neighbours", "once", "complex"] = "halves"
    """Where the model's table of the rotation has the two entries of an angle, or that it has one only: cosine and sine
    apart, or as a complex number."""
    clockwise: bool = False
    """The rotation is by minus the angle."""
    window: Callable[[Any], int | None] = own_window
    """Given its core: how far back a block sees, as it tells implementations that mask nothing by themselves."""
    norms: tuple[str, ...] = ()
    """Norms of query and key between projection and logit, where a block has them: Q-K then can't be rotated or cut
    exactly. One without weights that serves both is named twice."""
    norms_last: bool = False
    """Those norms stand behind the rotation."""
    norm_spans_heads: bool = False
    """Those norms see all heads at once, so no head may go."""
    softcap: str | None = None
    """Logits are squeezed into plus and minus this by a hyperbolic tangent."""
    sinks: str | None = None
    """A logit for each head that takes attention and gives no value."""
    position_bias: str | None = None
    """Table of a bias by distance, of a block that computes it."""
    hands_on: bool = True
    """Only the first block has that table, and returns the bias, which the others are handed."""
    causal: bool = True
    """Whether a token sees none that come after it, where the module doesn't say so (``is_causal``)."""
    repeated: str | None = None
    """A setting with which the class caches the keys and values of a KV head once for each of its query heads."""
    kept: tuple[str, ...] = ()
    """What else the class's own methods need, and the rewritten block takes over."""
    dropout: str | None = "attention_dropout"
    output_dropout: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    """This class's argument names -> the ones that we use."""
    unless: Mapping[str, str] = field(default_factory=dict)
    """Paths of settings with which the row is not true -> why."""

    def fits(self, module: nn.Module) -> bool:
        """Whether a module has the projections and the settings that this row names."""
        if not has(module, self.core) or not has(module, self.o):
            return False
        inputs = [self.fused] if self.fused else [self.q, self.k, self.v]
        settings = [self.heads, self.kv_heads, self.head_dim, *self.scale, self.dropout]
        core = module.get_submodule(self.core)
        return all(has(core, path) for path in (*inputs, *settings, self.output_dropout) if path)

    def copies(self, core: nn.Module, queries: int) -> int:
        """How many times the class caches a KV head that serves so many query heads."""
        return queries if self.repeated is not None and follow(core, self.repeated) else 1


def follow(value: Any, path: str) -> Any:
    """What stands at the end of a dotted path."""
    for part in filter(None, path.split(".")):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def has(module: nn.Module, path: str) -> bool:
    """Whether something, be it None, stands there."""
    try:
        follow(module, path)
    except (AttributeError, KeyError):
        return False
    return True
