"""From costs to ranks: who keeps what.

Ranks are free per head at first; then the heads of a block are gathered into a few groups of equal sizes, since a group
is what is stored and run, and so what is paid for. A direction that a group's size gives to a head is kept, not padded.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from clover.errors import CloverError
from clover.planning.plan import BlockPlan, Group, Plan
from clover.planning.spend import Curve, Head, Kind, spend

Granularity = Literal["head", "layer", "model"]
TILES = 8
"""In a block with fewer, a whole tile would be too coarse a step."""


@dataclass(frozen=True)
class Costs:
    """What cutting costs in one block: a row per KV head, directions best first.

    ``*_cost[h, i]`` is the price of cutting direction ``i`` of head ``h`` once all after it are cut. Calibrated: for
    Q-K nats of the attention distribution, for V-O twice the nats of what the model says (streamed: squared error,
    relative to the size of what it goes to). By the weights: squared singular values. ``*_norm`` is the paper's product
    of row norms after the change of basis.
    """

    name: str
    part: str
    queries: int
    pair_cost: Float[Tensor, "kv p"]
    pair_norm: Float[Tensor, "kv p"]
    plain_cost: Float[Tensor, "kv s"]
    plain_norm: Float[Tensor, "kv s"]
    value_cost: Float[Tensor, "kv e"]
    value_norm: Float[Tensor, "kv e"]
    output_bias: bool
    parameters: int
    fixed_qk: bool = False
    """Q-K can't be cut exactly (a norm stands between projection and logit) and stays whole."""
    keeps_heads: bool = False
    """No head may go."""

    @property
    def kv_heads(self) -> int:
        return self.value_cost.shape[0]

    def cost(self, kind: Kind) -> Float[Tensor, "kv i"]:
        """What the directions of a kind cost."""
        return getattr(self, f"{kind}_cost")

    def norm(self, kind: Kind) -> Float[Tensor, "kv i"]:
        """The paper's norm products of the directions of a kind."""
        return getattr(self, f"{kind}_norm")

    def count(self, kind: Kind) -> int:
        """Directions of a kind in each head."""
        return self.cost(kind).shape[1]

    @property
    def qk(self) -> int:
        """Columns of a query or key."""
        return 2 * self.count("pair") + self.count("plain")


def is_number(value: object) -> bool:
    """Whether it is a real number, Python's or numpy's."""
    return isinstance(value, Real)


@dataclass(frozen=True)
class Share:
    """Cut this share of the head directions, 0 <= share < 1, the cheapest first."""

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise CloverError(f"the share to remove is {self.share}; it must be at least 0 and less than 1")


@dataclass(frozen=True)
class Threshold:
    """Cut every direction whose norm product is at most this (the paper's rule)."""

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < math.inf:
            raise CloverError(f"the threshold is {self.value}; it must be a finite number that is not negative")


@dataclass(frozen=True)
class Energy:
    """Keep in each head the fewest directions that hold this share of its energy, 0 < share <= 1."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise CloverError(f"the energy to keep is {self.share}; it must be more than 0 and at most 1")


Rule = Share | Threshold | Energy


@dataclass(frozen=True)
class Limits:
    """Bounds on what a plan may choose.

    Attributes:
        groups: head groups a block may have; more follow the spectra closer, fewer run faster.
        multiple: columns kept are a multiple of this, where the head size allows.
        minimum: least columns of a head that stays, in Q-K and in V-O.
        tile: under a ``Share``, what a block keeps over all heads fills whole tiles of this many rows of its
            projections: matrix units waste the rest. Not in blocks of fewer than ``TILES`` tiles; 1 for none.
        drop_heads: whether a head may go whole (when its V-O rank comes to 0).
    """

    groups: int = 4
    multiple: int = 1
    minimum: int = 1
    tile: int = 16
    drop_heads: bool = True

    def __post_init__(self) -> None:
        for name in ("groups", "multiple", "minimum", "tile"):
            if not (isinstance(value := getattr(self, name), Integral) and int(value) >= 1):
                raise CloverError(f"limit {name} is {value!r}; it must be a whole number of at least 1")


def make_plan(
    costs: Sequence[Costs], qk: Rule, vo: Rule, *, granularity: Granularity = "head", limits: Limits | None = None
) -> Plan:
    """Choose the ranks of every head.

    Args:
        costs: one entry a block.
        qk: rule for the Q-K directions; one budget over all blocks that can be cut.
        vo: rule for the V-O directions.
        granularity: ``head`` lets every head have its own ranks (gathered into ``limits.groups`` groups a block),
            ``layer`` gives all heads of a block the same, ``model`` all heads of the model.

    Raises:
        CloverError: a rule removes everything from a block, or the granularity is unknown or does not fit the model.
    """
    limits = limits or Limits()
    norms = [norm for c in costs if not c.fixed_qk for norm in (c.pair_norm, c.plain_norm)]
    if isinstance(qk, Threshold) and norms and all((norm <= qk.value).all() for norm in norms):
        raise CloverError(f"the model would lose every Q-K direction at {qk.value}; lower the threshold")
    parties = _parties(costs, qk, vo, granularity, limits)
    ranks = _ranks(costs, parties, qk, vo, limits)
    sizes = ([ranks.get((b, h), _Size(0, 0, 0)) for h in range(c.kv_heads)] for b, c in enumerate(costs))
    return Plan(tuple(_block_plan(c, of_block) for c, of_block in zip(costs, sizes, strict=True)))


@dataclass(frozen=True)
class _Size:
    """Directions that one head keeps."""

    pairs: int
    plain: int
    value: int


def _block_plan(costs: Costs, sizes: list[_Size]) -> BlockPlan:
    groups = {size: tuple(h for h, s in enumerate(sizes) if s == size) for size in sizes if size.value}
    if not groups:
        raise CloverError(f"{costs.name} would lose every direction; lower the ratio or the threshold")
    ordered = sorted(groups.items(), key=lambda item: item[1])
    return BlockPlan(
        costs.name, costs.part, costs.queries, costs.kv_heads, costs.qk, costs.count("value"),
        tuple(Group(heads, size.pairs, size.plain, size.value) for size, heads in ordered), costs.output_bias,
        costs.parameters,
    )  # fmt: skip


# --- parties: sets of heads that get equal ranks; what is in none is removed entirely ---


def _parties(
    costs: Sequence[Costs], qk: Rule, vo: Rule, granularity: Granularity, limits: Limits
) -> list[tuple[Head, ...]]:
    layers = [tuple((b, h) for h in range(c.kv_heads)) for b, c in enumerate(costs)]
    if granularity == "layer":
        return layers
    if granularity == "model":
        shapes = {(c.count("pair"), c.count("plain"), c.count("value"), c.fixed_qk) for c in costs}
        if len(shapes) > 1:
            raise CloverError("granularity 'model' needs the same head size in all blocks; use 'layer' or 'head'")
        return [tuple(head for layer in layers for head in layer)]
    if granularity != "head":
        raise CloverError(f"granularity is {granularity!r}; it must be head, layer or model")
    ranks = _ranks(costs, [(head,) for layer in layers for head in layer], qk, vo, limits)
    return [party for layer in layers for party in _cluster({head: ranks[head] for head in layer}, limits.groups)]


def _cluster(sizes: dict[Head, _Size], count: int) -> list[tuple[Head, ...]]:
    """At most ``count`` parties of heads of near sizes (Ward's criterion); heads that go whole are in none."""
    points = {head: (2 * size.pairs, size.plain, size.value) for head, size in sizes.items()}
    centres: dict[tuple[Head, ...], list[float]] = {}  # of the parties so far
    pairs: list[tuple[float, tuple[Head, ...], tuple[Head, ...]]] = []  # a heap; those of parties that are gone remain

    def add(new: tuple[Head, ...]) -> None:
        at = [sum(column) / len(new) for column in zip(*(points[h] for h in new), strict=True)]
        for old, there in centres.items():
            weight = len(old) * len(new) / (len(old) + len(new))
            heapq.heappush(pairs, (weight * math.dist(there, at) ** 2, old, new))
        centres[new] = at

    for head, size in sizes.items():
        if size.value:
            add((head,))
    while len(centres) > 1:
        near, a, b = heapq.heappop(pairs)
        if a not in centres or b not in centres:
            continue
        if len(centres) <= count and near > 0:
            break
        del centres[a], centres[b]
        add(a + b)
    return list(centres)


# --- ranks of the parties ---


def _ranks(
    costs: Sequence[Costs], parties: Sequence[tuple[Head, ...]], qk: Rule, vo: Rule, limits: Limits
) -> dict[Head, _Size]:
    value = _choose(costs, [_curve(costs, party, "value", limits) for party in parties], vo, limits)
    qk_kinds: tuple[Kind, ...] = ("pair", "plain")
    curves = [
        _curve(costs, party, kind, limits, gone=not kept)
        for kind in qk_kinds
        for party, kept in zip(parties, value, strict=True)
    ]
    both = _choose(costs, curves, qk, limits)
    pairs, plain = both[: len(parties)], both[len(parties) :]
    return {head: _Size(p, s, e) for party, p, s, e in zip(parties, pairs, plain, value, strict=True) for head in party}


def _curve(costs: Sequence[Costs], party: tuple[Head, ...], kind: Kind, limits: Limits, gone: bool = False) -> Curve:
    """What a party's directions of a kind are worth; none are for sale where its values are gone."""
    first = costs[party[0][0]]
    columns, count, rotary = 2 if kind == "pair" else 1, 0 if gone else first.count(kind), first.count("pair") > 0
    # Beside rotary pairs the plain columns come in twos, so that pairs stay aligned in the flat layout.
    grain = 2 if rotary and kind == "plain" else 1
    step = math.lcm(grain, limits.multiple // math.gcd(limits.multiple, columns))
    start = math.ceil(limits.minimum / columns / step) * step
    bounds = [0, *range(start, count, step), count] if count else [0]
    mean = torch.stack([costs[b].cost(kind)[h] for b, h in party]).mean(0).tolist()
    prices = [sum(mean[i:j]) / ((j - i) * columns) for i, j in pairwise(bounds)]
    for i in range(1, len(prices)):
        prices[i] = min(prices[i], prices[i - 1])
    return Curve(party, kind, columns, tuple(bounds), tuple(prices), _unsold(first, kind, limits, len(prices)))


def _unsold(costs: Costs, kind: Kind, limits: Limits, steps: int) -> int:
    """Steps of a party that it keeps in any case."""
    if kind == "value":
        return min(int(costs.keeps_heads or not limits.drop_heads), steps)
    if costs.fixed_qk:
        return steps
    return min(int(kind == "pair" or not costs.count("pair")), steps)


def _choose(costs: Sequence[Costs], curves: Sequence[Curve], rule: Rule, limits: Limits) -> list[int]:
    """Directions that the rule keeps of each curve; all are of values, or all of Q-K."""
    if not curves:
        return []
    if isinstance(rule, Share):
        value = curves[0].kind == "value"
        left = (1 - rule.share) * sum(_columns(c, value) for c in costs)
        fixed = (c for c in curves if not value and costs[c.party[0][0]].fixed_qk)
        left += sum(c.size(step) for c in fixed for step in range(c.least))
        return spend(curves, left, value, _tiles(costs, value, limits.tile))
    found = []
    for curve in curves:
        wanted = 0 if len(curve.bounds) == 1 else max(_rank(costs[b], h, curve.kind, rule) for b, h in curve.party)
        found.append(next(bound for bound in curve.bounds[curve.least :] if bound >= min(wanted, curve.bounds[-1])))
    return found


def _columns(costs: Costs, value: bool) -> int:
    """Columns of a block that can be cut."""
    if value:
        return costs.kv_heads * costs.count("value")
    return 0 if costs.fixed_qk else costs.kv_heads * costs.qk


def _rank(costs: Costs, head: int, kind: Kind, rule: Threshold | Energy) -> int:
    """Directions of one head that a rule keeps."""
    if isinstance(rule, Threshold):
        return int((costs.norm(kind)[head] > rule.value).sum())
    energy = costs.cost(kind)[head].cumsum(0)
    if not len(energy):
        return 0
    return int((energy < rule.share * energy[-1]).sum()) + 1 if rule.share < 1 else len(energy)


def _tiles(costs: Sequence[Costs], value: bool, tile: int) -> dict[int, int]:
    """For each block that has enough of them, the columns that fill whole tiles of its projections' rows.

    Keys fill half a tile at least: a cache whose rows stand at 16 bytes is what kernels for half precision read.
    """
    found = {}
    for b, c in enumerate(costs):
        if _columns(c, value) >= TILES * tile:
            found[b] = tile if value else max(tile // math.gcd(tile, c.queries + 1), tile // 2)
    return found
