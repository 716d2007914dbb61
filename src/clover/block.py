"""One attention block of a model of transformers, read as heads by the data of its family.

Nothing here knows a model's name: ``families`` has a row of names for each class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clover.errors import CloverError, UnsupportedModelError
from clover.heads import Heads


def own_window(core: Any) -> int | None:
    """The sliding window that a module says it has."""
    return getattr(core, "sliding_window", None)


@dataclass(frozen=True)
class Family:
    """Names inside one attention class. Dotted names are paths from the attention module (or from ``core``)."""

    q: str = "q_proj"
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
        if not _has(module, self.core) or not _has(module, self.o):
            return False
        inputs = [self.fused] if self.fused else [self.q, self.k, self.v]
        settings = [self.heads, self.kv_heads, self.head_dim, *self.scale, self.dropout]
        core = module.get_submodule(self.core)
        return all(_has(core, path) for path in (*inputs, *settings, self.output_dropout) if path)

    def angles(self, table: tuple[Tensor, Tensor] | Tensor, tokens: Any, pairs: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each pair, ``(batch or 1, tokens, pairs)``, from what the model hands to its blocks.

        A table shorter than the sequence is that of its last tokens: those before (class tokens) do not turn.

        Raises:
            CloverError: the table has another number of pairs than the config says.
        """
        if self.table == "complex":
            table = (table.real, table.imag)  # type: ignore[union-attr]
        width = table[0].shape[-1]
        picks = {"halves": slice(width // 2), "neighbours": slice(0, width, 2)}
        cos, sin = (t[..., picks.get(self.table, slice(width))] for t in table)
        sin = -sin if self.clockwise else sin
        if cos.shape[-1] != pairs:
            raise CloverError(
                f"the model rotates {cos.shape[-1]} pairs of a head, but its config says {pairs}; correct "
                "partial_rotary_factor in config.json"
            )
        alone = cos.dim() == 3 and cos.shape[1] == 1  # a row for each token, or for each sequence's one token
        cos, sin = (t.reshape(-1, tokens, pairs) if alone else t.view(-1, *t.shape[-2:]) for t in (cos, sin))
        still = (0, 0, tokens - cos.shape[1], 0)
        return nn.functional.pad(cos, still, value=1.0), nn.functional.pad(sin, still)


@dataclass(frozen=True)
class Block:
    """One attention block found in a model."""

    name: str
    part: str
    family: Family
    module: nn.Module
    config: Any

    @property
    def core(self) -> nn.Module:
        """The module that computes attention, the one that surgery replaces."""
        return self.module.get_submodule(self.family.core)

    @property
    def core_name(self) -> str:
        return f"{self.name}.{self.family.core}" if self.family.core else self.name

    @property
    def output_name(self) -> str:
        return f"{self.name}.{self.family.o}"

    @property
    def replaced(self) -> tuple[str, str]:
        """What the names in the model of all that a cut takes the place of begin with."""
        return f"{self.core_name}.", f"{self.output_name}."

    def get(self, path: str) -> Any:
        """An attribute of the core by dotted path."""
        first, _, rest = path.partition(".")
        return _follow(self.config, rest) if first == "config" else _follow(self.core, path)

    def dropout(self, path: str | None) -> float:
        """A probability, or that of a module; 0 without a path."""
        value = self.get(path) if path else 0.0
        return getattr(value, "p", 0.0) if isinstance(value, nn.Module) else value

    @property
    def positional(self) -> tuple[str, ...]:
        """Names of the arguments of the core's ``forward`` in their order."""
        return tuple(inspect.signature(type(self.core).forward).parameters)[1:]

    @property
    def queries(self) -> int:
        """Query heads per KV head."""
        heads = self.get(self.family.heads)
        kv = self.get(self.family.kv_heads) if self.family.kv_heads else heads
        if kv < 1 or heads % kv:
            raise CloverError(
                f"{self.name}: {heads} query heads can't share {kv} KV heads; correct the head counts in config.json"
            )
        return heads // kv

    @property
    def rotary(self) -> int:
        """Columns of a head that are rotated by position."""
        turns = self.family.rotary
        if not (turns(self.core) if callable(turns) else turns):
            return 0
        rope, size = getattr(self.config, "rope_parameters", None) or {}, self.get(self.family.head_dim)
        turned = int(size * rope.get("partial_rotary_factor", 1.0))
        if turned < size and (size - turned) % 2:  # pairs must lie at even places
            odd = f"{turned} columns of a head turn and {size - turned} don't"
            raise UnsupportedModelError(f"{self.name}: {odd}; there is no layout for an odd number beside pairs")
        return turned

    @property
    def scale(self) -> float:
        """What the inner product of query and key is multiplied by."""
        if not self.family.scale:
            return self.get(self.family.head_dim) ** -0.5
        return math.prod(self.get(path) for path in self.family.scale)

    @property
    def growth(self) -> tuple[float, float, float] | None:
        """``b``, ``n`` and ``s``, see ``Family``."""
        return self.family.growth(self.core) if self.family.growth else None

    @property
    def softcap(self) -> float | None:
        """The bound of the logits."""
        return self.get(self.family.softcap) if self.family.softcap else None

    @property
    def sinks(self) -> Tensor | None:
        """The logit of each query head that takes attention and gives no value."""
        return self.get(self.family.sinks) if self.family.sinks else None

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms of query and key."""
        return tuple(n for n in self.family.norms if not isinstance(getattr(self.core, n, nn.Identity()), nn.Identity))

    @property
    def normed(self) -> bool:
        """Whether a norm stands between the Q-K projections and the logit."""
        return bool(self.norms)

    @property
    def shifts_freely(self) -> bool:
        """Whether a number added to all logits of a query changes nothing."""
        return self.softcap is None and self.sinks is None

    @property
    def columns(self) -> Tensor:
        """Columns of a query or key in the order in which they are read: the halves of the pairs apart. int64."""
        order = torch.arange(self.get(self.family.head_dim))
        if self.family.neighbours:
            order[: self.rotary] = order[: self.rotary].unflatten(0, (-1, 2)).T.flatten()
        return order

    def projection(self, which: str) -> nn.Module:
        """The module that holds ``q``, ``k``, ``v`` or ``o``."""
        owner = self.module if which == "o" else self.core
        path = getattr(self.family, which)
        fused = self.family.fused
        return owner.get_submodule(fused if fused and not _has(owner, path) else path)

    def heads(self) -> Heads:
        """Read the block as heads; views of the model's weights where the layout allows.

        Raises:
            CloverError: a weight's shape contradicts the head counts of the config.
        """
        n, d = self.queries, self.get(self.family.head_dim)
        h = self.get(self.family.heads)
        weights, biases = self._projections(h, h // n, d)
        if self.family.neighbours:
            for which in "qk":
                order = self.columns.to(weights[which].device)
                weights[which] = weights[which][:, order]
                biases[which] = None if (bias := biases[which]) is None else bias[:, order]
        o, o_bias = _weight(self.projection("o"), self.name)
        if o.shape[1] != h * d:
            raise CloverError(
                f"{self.name}: the output projection reads {o.shape[1]} columns, but the config's {h} heads of {d} "
                f"make {h * d}; "
                "correct the head counts in config.json"
            )
        per_head = o.unflatten(1, (h // n, n, d)).permute(1, 2, 0, 3)
        return Heads(
            q=weights["q"].unflatten(0, (-1, n)), k=weights["k"], v=weights["v"], o=per_head,
            q_bias=None if biases["q"] is None else biases["q"].unflatten(0, (-1, n)),
            k_bias=biases["k"], v_bias=biases["v"], o_bias=o_bias, rotary=self.rotary,
        )  # fmt: skip

    def rows(self, which: str) -> Tensor:
        """Where the rows of ``q``, ``k`` or ``v`` stand in the weight of their projection: ``(heads, d)``, int64."""
        heads, d = self.get(self.family.heads), self.get(self.family.head_dim)
        counts = {"q": heads, "k": heads // self.queries, "v": heads // self.queries}
        holder = self.projection(which)
        members = [m for m in counts if self.projection(m) is holder]
        rows = torch.arange(sum(counts[m] for m in members) * d)
        found = next(w for member, w, _ in self._split(members, counts, d, rows, None) if member == which)
        return found if which == "v" else found[:, self.columns]

    def _projections(self, heads: int, kv: int, d: int) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Weights ``(heads, d, D)`` and biases ``(heads, d)`` of q, k and v."""
        counts = {"q": heads, "k": kv, "v": kv}
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor | None] = {}
        holders: dict[nn.Module, list[str]] = {}
        for which in counts:
            holders.setdefault(self.projection(which), []).append(which)
        for module, members in holders.items():
            weight, bias = _weight(module, self.name)
            rows = sum(counts[m] for m in members) * d
            if weight.shape[0] != rows:
                raise CloverError(
                    f"{self.name}: the projection of {', '.join(members)} has {weight.shape[0]} rows, but "
                    f"{heads} query heads and "
                    f"{kv} KV heads of {d} make {rows}; correct the head counts in config.json"
                )
            for member, w, b in self._split(members, counts, d, weight, bias):
                weights[member], biases[member] = w, b
        return weights, biases

    def _split(
        self, members: list[str], counts: dict[str, int], d: int, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        runs = counts["k"] if self.family.interleaved else 1
        w = weight.unflatten(0, (runs, -1, d))
        b = None if bias is None else bias.unflatten(0, (runs, -1, d))
        start = 0
        for member in members:
            stop = start + counts[member] // runs
            yield member, w[:, start:stop].flatten(0, 1), None if b is None else b[:, start:stop].flatten(0, 1)
            start = stop

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """One call of the core's ``forward`` in our argument names, whatever the class calls them."""
        return arguments(self.family, self.part == "cross", self.positional, args, kwargs)


def arguments(
    family: Family, cross: bool, positional: tuple[str, ...], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Name the arguments of an attention ``forward``, whose own names are ``positional``, as this project does.

    Raises:
        CloverError: a block read as self-attention is given another sequence.
    """
    names = dict(zip(positional, args, strict=False)) | kwargs
    call: dict[str, Any] = {family.rename.get(name, name): value for name, value in names.items()}
    if not cross and call.pop("key_value_states", None) is not None:
        raise CloverError(
            "an attention block that clover reads as self-attention was given key_value_states, another sequence; "
            "add the name under which its layer holds it to CROSS in clover/families.py"
        )
    mask = call.pop("encoder_attention_mask", None)
    if cross and "encoder_attention_mask" in positional:  # then the other mask is that of its own sequence
        call["attention_mask"] = mask
    return call


def head_bias(family: Family, module: Any, call: dict[str, Any], queries: Any, keys: Any, seen: Any) -> Tensor | None:
    """What is added to the logits by head, ``(batch or 1, heads, queries or 1, keys)``; taken out of the arguments.

    Args:
        module: the block, stock or rewritten.
        seen: tokens before the queries.
    """
    alibi, bias = call.pop("alibi", None), call.pop("position_bias", None)
    if alibi is not None:
        return alibi.unflatten(0, (call["hidden_states"].shape[0], -1))
    if bias is None and family.position_bias and hasattr(module, family.position_bias):
        # The device is named, for an offloaded table of biases is on none.
        bias = module.compute_bias(queries, keys, device=call["hidden_states"].device, past_seen_tokens=seen)
    return bias


def growth_at(growth: tuple[float, float, float], call: dict[str, Any], seen: Any) -> Tensor:
    """What queries are multiplied by, see ``Family.growth``: ``(batch or 1, tokens)``, float32.

    Args:
        call: the arguments; without positions among them the queries follow on ``seen`` tokens, as they lie.
    """
    states, positions = call["hidden_states"], call.get("position_ids")
    if positions is None:
        positions = torch.arange(states.shape[1], device=states.device).unsqueeze(0) + seen
    slope, step, start = growth
    return 1 + slope * torch.log1p(((positions.float() + start) / step).floor())


def norm_entries(parameter: Tensor, heads: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Where ``heads`` and the columns of a rewritten block stand in a parameter of a norm seen as ``(heads, columns)``.

    A norm that treats all heads alike has one row.
    """
    columns = block.columns
    rows = heads if parameter.numel() > len(columns) else torch.zeros(1, dtype=torch.int64)
    half = block.rotary // 2
    return rows.unsqueeze(1), torch.cat([columns[: 2 * half].view(2, half).T.flatten(), columns[2 * half :]])


def _follow(value: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _has(module: nn.Module, path: str) -> bool:
    try:
        _follow(module, path)
    except (AttributeError, KeyError):
        return False
    return True


def _weight(module: nn.Module, block: str) -> tuple[Tensor, Tensor | None]:
    """Weight as ``(out, in)`` and bias of a Linear or of GPT-2's transposed Conv1D."""
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    plain = type(module) is nn.Linear or type(module).__module__.startswith("transformers.models.")
    if not (plain and isinstance(module, nn.Linear) and type(module.weight.data) is Tensor):
        raise CloverError(
            f"{block}: a projection is a {type(module).__module__}.{type(module).__name__}, not torch's Linear; "
            "prune before quantising, and merge adapters first"
        )
    return module.weight, module.bias
