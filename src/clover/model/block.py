"""One attention block of a model of transformers, read as heads by the data of its family.

Nothing here knows a model's name: ``families`` has a row of names for each class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clover.errors import CloverError, UnsupportedModelError
from clover.model.family import Family, follow, has
from clover.model.heads import Heads
from clover.model.mla import projections, read


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
        return follow(self.config, rest) if first == "config" else follow(self.core, path)

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
    def plain_softmax(self) -> bool:
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
        own = [path for path in getattr(self.family, which).split() if has(owner, path)]
        there = (path for path in own if follow(owner, path) is not None)
        return owner.get_submodule(next(there, self.family.fused or getattr(self.family, which)))

    @property
    def beside(self) -> int:
        """Columns of a query that stand beside those of its head, see ``Latent``."""
        return self.get(self.family.latent.beside) if self.family.latent else 0

    @property
    def neighbours_beside(self) -> bool:
        """Whether the pairs of those columns are neighbours."""
        latent = self.family.latent
        said = latent.neighbours if latent else False
        return bool(said(self.core) if callable(said) else said)

    @property
    def pairs_beside(self) -> int:
        """How many pairs of those columns turn by position."""
        return self.beside // 2 if self.family.latent and self.family.latent.turns else 0

    @property
    def parameters_beside(self) -> int:
        """Weights and biases of those columns of the queries, and of the projections to the latents."""
        ways = projections(self.core, self.family.latent)
        return sum(p.numel() for way in ways for p in way.parameters()) + (
            self.queries_beside().numel() if self.beside else 0
        )

    def reads(self, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the queries read, what keys and values read, and the key beside them, not turned, if there is one.

        Args:
            call: see ``arguments``.
        """
        x, other = call["hidden_states"], call.get("key_value_states")
        if self.family.latent:
            return read(self.core, self.family.latent, x)
        return x, x if other is None else other, None

    def queries_beside(self) -> Float[Tensor, "heads r D"]:
        """The rows of those columns in the projection of the queries; a view."""
        weight, _ = _weight(self.projection("q"), self.name)
        return weight.unflatten(0, (self.get(self.family.heads), -1))[:, self._sizes["q"] - self.beside :]

    @property
    def _sizes(self) -> dict[str, int]:
        """Rows of a head in the projections of queries, keys and values."""
        d, e = self.get(self.family.head_dim), self.get(self.family.value_dim or self.family.head_dim)
        return {"q": d + self.beside, "k": d, "v": e}

    def heads(self) -> Heads:
        """Read the block as heads; views of the model's weights where the layout allows.

        Raises:
            CloverError: a weight's shape contradicts the head counts of the config.
        """
        n, h, e = self.queries, self.get(self.family.heads), self._sizes["v"]
        weights, biases = self._projections()
        if self.family.neighbours:
            for which in "qk":
                order = self.columns.to(weights[which].device)
                weights[which] = weights[which][:, order]
                biases[which] = None if (bias := biases[which]) is None else bias[:, order]
        o, o_bias = _weight(self.projection("o"), self.name)
        if o.shape[1] != h * e:
            raise CloverError(
                f"{self.name}: the output projection reads {o.shape[1]} columns, but the config's {h} heads of {e} "
                f"make {h * e}; "
                "correct the head counts in config.json"
            )
        per_head = o.unflatten(1, (h // n, n, e)).permute(1, 2, 0, 3)
        return Heads(
            q=weights["q"].unflatten(0, (-1, n)), k=weights["k"], v=weights["v"], o=per_head,
            q_bias=None if biases["q"] is None else biases["q"].unflatten(0, (-1, n)),
            k_bias=biases["k"], v_bias=biases["v"], o_bias=o_bias, rotary=self.rotary,
        )  # fmt: skip

    def rows(self, which: str) -> Tensor:
        """Where the rows of ``q``, ``k`` or ``v`` stand in the weight of their projection: ``(heads, d)``, int64."""
        members = self._members(self.projection(which))
        total = sum(self._counts[m] * self._sizes[m] for m in members)
        found = next(w for member, w, _ in self._split(members, torch.arange(total), None) if member == which)
        return found if which == "v" else found[:, self.columns]

    @property
    def _counts(self) -> dict[str, int]:
        """Heads of queries, keys and values."""
        heads = self.get(self.family.heads)
        return {"q": heads, "k": heads // self.queries, "v": heads // self.queries}

    def _members(self, holder: nn.Module) -> list[str]:
        """Which of queries, keys and values a projection holds."""
        return [which for which in "qkv" if self.projection(which) is holder]

    def _projections(self) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Weights ``(heads, d, D)`` and biases ``(heads, d)`` of q, k and v."""
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor | None] = {}
        for holder in dict.fromkeys(self.projection(which) for which in "qkv"):
            members, (weight, bias) = self._members(holder), _weight(holder, self.name)
            rows = sum(self._counts[m] * self._sizes[m] for m in members)
            if weight.shape[0] != rows:
                size = " and ".join(map(str, dict.fromkeys(self._sizes[m] for m in members)))
                raise CloverError(
                    f"{self.name}: the projection of {', '.join(members)} has {weight.shape[0]} rows, but "
                    f"{self._counts['q']} query heads and {self._counts['k']} KV heads of {size} make {rows}; correct "
                    "the head counts in config.json"
                )
            for member, w, b in self._split(members, weight, bias):
                weights[member], biases[member] = w, b
        return weights, biases

    def _split(
        self, members: list[str], weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Rows of one projection by heads; of queries without the columns beside."""
        runs = self._counts["k"] if self.family.interleaved else 1

        def by_head(rows: Tensor, start: int, count: int, size: int) -> Tensor:
            run = rows.unflatten(0, (runs, -1))[:, start : start + count * size]
            return run.unflatten(1, (count, size)).flatten(0, 1)

        start = 0
        for member in members:
            count, size = self._counts[member] // runs, self._sizes[member]
            own = slice(size - self.beside if member == "q" else size)
            w = by_head(weight, start, count, size)[:, own]
            yield member, w, None if bias is None else by_head(bias, start, count, size)[:, own]
            start += count * size

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
    call: dict[str, Any] = dict(zip(positional, args, strict=False)) | kwargs
    for name, ours in family.rename.items():
        if name in call:
            call[ours] = call.pop(name)
    if not cross and call.pop("key_value_states", None) is not None:
        raise CloverError(
            "an attention block that clover reads as self-attention was given key_value_states, another sequence; "
            "add the name under which its layer holds it to CROSS in clover/model/families.py"
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


def _weight(module: nn.Module, block: str) -> tuple[Tensor, Tensor | None]:
    """Weight as ``(out, in)`` and bias of a Linear or of GPT-2's transposed Conv1D."""
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    plain = type(module) is nn.Linear or type(module).__module__.startswith("transformers.models.")
    if not (plain and isinstance(module, nn.Linear) and type(module.weight.data) is Tensor):
        if isinstance(module, nn.Linear) and type(module.weight.data) is not Tensor:
            kind = type(module.weight.data).__name__
            raise CloverError(f"{block}: the weight of a projection is a {kind}; prune before quantising or sharding")
        raise CloverError(
            f"{block}: a projection is a {type(module).__module__}.{type(module).__name__}, not torch's Linear; "
            "prune before quantising, and merge adapters first"
        )
    return module.weight, module.bias
