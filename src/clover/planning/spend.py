"""A budget of columns, spent on what is worth most: directions in steps, in the end by whole tiles of a block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

PART = 8
"""One of so many columns of a block may move for the sake of tiles, where two tiles don't do."""
Kind = Literal["pair", "plain", "value"]
"""Of directions: rotary pairs and others of Q-K, and those of V-O."""
Head = tuple[int, int]
"""Number of the block, number of the KV head in it."""


@dataclass(frozen=True)
class Curve:
    """Directions of one kind that a party keeps or loses together, in steps."""

    party: tuple[Head, ...]
    kind: Kind
    columns: int
    """Columns of a direction: 2 for a rotary pair, else 1."""
    bounds: tuple[int, ...]
    """Directions kept after 0, 1, 2, ... steps."""
    prices: tuple[float, ...]
    """Mean cost of each step, a head and a column; never increasing."""
    least: int
    """Steps that must be kept."""

    def size(self, step: int) -> int:
        """Columns that one step adds, over the party."""
        return (self.bounds[step + 1] - self.bounds[step]) * self.columns * len(self.party)


def spend(curves: Sequence[Curve], budget: float, keep_one: bool, tiles: Mapping[int, int]) -> list[int]:
    """Buy the dearest steps first until the budget of columns is spent.

    Args:
        curves: what is for sale.
        budget: columns, over all heads.
        keep_one: whether every block keeps a head, or nothing of it would be left.
        tiles: for the blocks that have to keep whole tiles of columns, how many columns a tile has. A block whose steps
            are too coarse for it keeps what it has.

    Returns:
        Directions of each curve that are kept.
    """
    least = _least(curves, keep_one)
    steps = list(least)
    left = math.floor(budget + 1e-6) - sum(c.size(s) for c, n in zip(curves, steps, strict=True) for s in range(n))
    offers = [(-price, i, s) for i, c in enumerate(curves) for s, price in enumerate(c.prices) if s >= steps[i]]
    for _, i, s in sorted(offers):
        if s == steps[i] and curves[i].size(s) <= left:
            steps[i] += 1
            left -= curves[i].size(s)
    _even_out(curves, least, steps, left, tiles)
    return [c.bounds[n] for c, n in zip(curves, steps, strict=True)]


def _least(curves: Sequence[Curve], keep_one: bool) -> list[int]:
    """Steps of each curve that aren't for sale."""
    least = [c.least for c in curves]
    if not keep_one:
        return least
    best: dict[int, int] = {}
    for i, c in enumerate(curves):
        for b in {b for b, _ in c.party}:
            if b not in best or c.prices[0] > curves[best[b]].prices[0]:
                best[b] = i
    for i in best.values():
        least[i] = max(least[i], 1)
    return least


class _Choice(NamedTuple):
    """What one curve may keep instead of what it does."""

    worth: float
    """Price of what it gains, less that of what it loses."""
    columns: int
    """Gained, or lost if negative."""
    steps: int


class _Move(NamedTuple):
    """The same for all curves of a block."""

    worth: float
    columns: int
    steps: dict[int, int]


def _even_out(
    curves: Sequence[Curve], least: Sequence[int], steps: list[int], left: int, tiles: Mapping[int, int]
) -> None:
    """Bring each block down to whole tiles, then give what that freed to the tiles that are worth most, in place."""
    members = {b: {i: c for i, c in enumerate(curves) if {block for block, _ in c.party} == {b}} for b in tiles}

    def take(move: _Move) -> None:
        for i, n in move.steps.items():
            steps[i] = n

    for b, tile in tiles.items():
        whole = all(steps[i] == len(c.prices) for i, c in members[b].items())
        if not whole and (move := _level(members[b], least, steps, tile)):
            take(move)
            left -= move.columns
    offers = {b: _up(members[b], steps, tile, left) for b, tile in tiles.items()}
    while affordable := {b: up for b, up in offers.items() if up}:
        best = max(affordable, key=lambda b: affordable[b].worth)
        take(affordable[best])
        left -= affordable[best].columns
        for b, up in affordable.items():
            if b == best or up.columns > left:
                offers[b] = _up(members[b], steps, tiles[b], left)


def _level(curves: Mapping[int, Curve], least: Sequence[int], steps: Sequence[int], tile: int) -> _Move | None:
    """Drop steps, and add others for fewer columns, so that the least is lost and what is kept fills tiles.

    None where the steps are too coarse for it.
    """
    columns = sum(c.size(s) for i, c in curves.items() for s in range(steps[i]))
    for reach in _reaches(columns, tile):
        ways = _ways({i: _choices(c, steps[i], least[i], reach) for i, c in curves.items()}, reach)
        whole = [moved for moved in ways if (columns + moved) % tile == 0 and moved <= 0]
        if whole:
            best = max(whole, key=lambda moved: ways[moved].worth)
            return ways[best]
    return None


def _up(curves: Mapping[int, Curve], steps: Sequence[int], tile: int, left: int) -> _Move | None:
    """Add the steps that are worth most and fill tiles, or all there are; None where that can't be had for ``left``."""
    columns = sum(c.size(s) for i, c in curves.items() for s in range(steps[i]))
    rest = sum(c.size(s) for i, c in curves.items() for s in range(steps[i], len(c.prices)))
    for reach in _reaches(columns, tile):
        ways = _ways({i: _choices(c, steps[i], steps[i], reach) for i, c in curves.items()}, min(left, reach))
        whole = [ways[moved] for moved in ways if moved and (moved % tile == 0 or moved == rest)]
        if whole:
            best = max(whole, key=lambda move: move.worth / move.columns)
            return best._replace(worth=best.worth / best.columns)
    return None


def _reaches(columns: int, tile: int) -> list[int]:
    """How many columns may move at most: first few, then more."""
    return sorted({2 * tile, max(2 * tile, columns // PART)})


def _choices(curve: Curve, now: int, least: int, reach: int) -> list[_Choice]:
    """What can become of a curve that keeps ``now`` steps: each way to add or drop up to so many columns."""
    found = [_Choice(0.0, 0, now)]
    for n in range(now, len(curve.prices)):
        size = curve.size(n)
        found.append(_Choice(found[-1].worth + size * curve.prices[n], found[-1].columns + size, n + 1))
    found.reverse()
    for n in range(now - 1, least - 1, -1):
        size = curve.size(n)
        found.append(_Choice(found[-1].worth - size * curve.prices[n], found[-1].columns - size, n))
    return [choice for choice in found if abs(choice.columns) <= reach]


def _ways(choices: Mapping[int, Sequence[_Choice]], reach: int) -> dict[int, _Move]:
    """For each number of columns that a block can gain or lose, up to ``reach``, the way that leaves it worth most.

    A knapsack with one choice a curve, by dynamic programming.
    """
    ways = {0: _Move(0.0, 0, {})}
    for i, of_curve in choices.items():
        longer: dict[int, _Move] = {}
        for worth, columns, steps in ways.values():
            for more, gained, n in of_curve:
                total = columns + gained
                if abs(total) <= reach and (total not in longer or worth + more > longer[total].worth):
                    longer[total] = _Move(worth + more, total, steps | {i: n})
        ways = longer
    return ways
