"""From costs to ranks: who keeps what.

Ranks are free per head at first; then the heads of a block are gathered into a few groups of equal sizes, since a group
is what is stored and run, and so what is paid for. A direction that a group's size gives to a head is kept, not padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clover.errors import CloverError
from clover.planning.plan import BlockPlan, Group, Plan
from clover.planning.spend import Curve, Head, spend

Granularity = Literal["head", "layer", "model"]
Kind = Literal["pair", "plain", "value"]
TILES = 8
"""In a block with fewer, a whole tile would be too coarse a step."""


@dataclass(frozen=True)
class Costs:
    """What cutting costs in one block: a row per KV head, directions best first.

    ``*_cost[h, i]`` is the price of cutting direction ``i`` of head ``h`` once all after it are cut: nats of the
    attention distribution for Q-K, squared error of the block's output for V-O. ``*_norm`` is the paper's product of
    row norms after the change of basis.
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

    def count(self, kind: Kind) -> int:
        """Directions of a kind in each head."""
        return getattr(self, f"{kind}_cost").shape[1]

    @property
    def qk(self) -> int:
        """Columns of a query or key."""
        return 2 * self.count("pair") + self.count("plain")


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
            if getattr(self, name) < 1:
                raise CloverError(f"limit {name} is {getattr(self, name)}; it must be at least 1")


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
    sets: list[tuple[Head, ...]] = [(head,) for head, size in sizes.items() if size.value]
    points = {head: (2 * size.pairs, size.plain, size.value) for head, size in sizes.items()}

    def centre(party: tuple[Head, ...]) -> list[float]:
        return [sum(column) / len(party) for column in zip(*(points[h] for h in party), strict=True)]

    def distance(a: tuple[Head, ...], b: tuple[Head, ...]) -> float:
        return len(a) * len(b) / (len(a) + len(b)) * math.dist(centre(a), centre(b)) ** 2

    while len(sets) > 1:
        near, a, b = min((distance(a, b), a, b) for i, a in enumerate(sets) for b in sets[i + 1 :])
        if len(sets) <= count and near > 0:
            break
        sets = [s for s in sets if s not in (a, b)] + [a + b]
    return sets


# --- ranks of the parties ---


def _ranks(
    costs: Sequence[Costs], parties: Sequence[tuple[Head, ...]], qk: Rule, vo: Rule, limits: Limits
) -> dict[Head, _Size]:
    values: list[Kind] = ["value"] * len(parties)
    value = _choose(costs, [_curve(costs, p, "value", limits) for p in parties], values, vo, limits.tile)
    alive = {head for p, kept in zip(parties, value, strict=True) if kept for head in p}
    kinds: list[Kind] = [kind for kind in get_args(Kind)[:2] for _ in parties]
    curves = [
        _curve(costs, p, kind, limits, gone=p[0] not in alive) for p, kind in zip([*parties] * 2, kinds, strict=True)
    ]
    both = _choose(costs, curves, kinds, qk, limits.tile)
    pairs, plain = both[: len(parties)], both[len(parties) :]
    return {head: _Size(p, s, e) for party, p, s, e in zip(parties, pairs, plain, value, strict=True) for head in party}


def _curve(costs: Sequence[Costs], party: tuple[Head, ...], kind: Kind, limits: Limits, gone: bool = False) -> Curve:
    first = costs[party[0][0]]
    columns, count, rotary = 2 if kind == "pair" else 1, 0 if gone else first.count(kind), first.count("pair") > 0
    # Beside rotary pairs the plain columns come in twos, so that pairs stay aligned in the flat layout.
    grain = 2 if rotary and kind == "plain" else 1
    step = math.lcm(grain, limits.multiple // math.gcd(limits.multiple, columns))
    start = math.ceil(limits.minimum / columns / step) * step
    bounds = [0, *range(start, count, step), count] if count else [0]
    mean = torch.stack([getattr(costs[b], f"{kind}_cost")[h] for b, h in party]).mean(0).tolist()
    prices = [sum(mean[i:j]) / ((j - i) * columns) for i, j in pairwise(bounds)]
    for i in range(1, len(prices)):
        prices[i] = min(prices[i], prices[i - 1])
    drops = limits.drop_heads and not first.keeps_heads
    must = not drops if kind == "value" else kind == "pair" or not rotary
    least = len(prices) if kind != "value" and first.fixed_qk else min(int(must), len(prices))
    return Curve(party, columns, tuple(bounds), tuple(prices), least)


def _choose(costs: Sequence[Costs], curves: Sequence[Curve], kinds: Sequence[Kind], rule: Rule, tile: int) -> list[int]:
    """Directions of each curve that the rule keeps."""
    if isinstance(rule, Share):
        whole = sum(
            c.count("value") * c.kv_heads if "value" in kinds else c.qk * c.kv_heads * (not c.fixed_qk) for c in costs
        )
        fixed = sum(
            sum(map(c.size, range(c.least))) for c in curves if costs[c.party[0][0]].fixed_qk and "value" not in kinds
        )
        tiles = _tiles(costs, "value" in kinds, tile)
        return spend(curves, fixed + (1 - rule.share) * whole, "value" in kinds, tiles)
    wanted = [
        max(_rank(costs[b], h, kind, rule) for b, h in curve.party) if len(curve.bounds) > 1 else 0
        for curve, kind in zip(curves, kinds, strict=True)
    ]
    return [
        next(bound for bound in c.bounds[c.least :] if bound >= min(want, c.bounds[-1]))
        for c, want in zip(curves, wanted, strict=True)
    ]


def _rank(costs: Costs, head: int, kind: Kind, rule: Threshold | Energy) -> int:
    """Directions of one head that a rule keeps."""
    if isinstance(rule, Threshold):
        return int((getattr(costs, f"{kind}_norm")[head] > rule.value).sum())
    energy = getattr(costs, f"{kind}_cost")[head].cumsum(0)
    if not len(energy):
        return 0
    return int((energy < rule.share * energy[-1]).sum()) + 1 if rule.share < 1 else len(energy)


def _tiles(costs: Sequence[Costs], value: bool, tile: int) -> dict[int, int]:
    """For each block that has enough of them, the columns that fill whole tiles of its projections' rows.

    Keys fill half a tile at least: a cache whose rows stand at 16 bytes is what kernels for half precision read.
    """
    found = {}
    for b, c in enumerate(costs):
        if c.kv_heads * (c.count("value") if value else c.qk) >= TILES * tile and (value or not c.fixed_qk):
            found[b] = tile if value else max(tile // math.gcd(tile, c.queries + 1), tile // 2)
    return found
