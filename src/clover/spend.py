"""A budget of columns, spent on what is worth most: directions in steps, in the end by whole tiles of a block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Head = tuple[int, int]
"""Number of the block, number of the KV head in it."""


@dataclass(frozen=True)
class Curve:
    """Directions of one kind that a party keeps or loses together, in steps."""

    party: tuple[Head, ...]
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


class _Move(NamedTuple):
    """Steps of a block's curves after they went to whole tiles."""

    worth: float
    """Mean price of the columns that moved."""
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
        if not whole and (down := _down(members[b], least, steps, tile)):
            take(down)
            left += down.columns
    offers = {b: _up(members[b], steps, tile) for b, tile in tiles.items()}
    while affordable := {b: up for b, up in offers.items() if up and up.columns <= left}:
        best = max(affordable, key=lambda b: affordable[b].worth)
        take(affordable[best])
        left -= affordable[best].columns
        offers[best] = _up(members[best], steps, tiles[best])


def _down(curves: Mapping[int, Curve], least: Sequence[int], steps: Sequence[int], tile: int) -> _Move | None:
    """Drop the cheapest steps until the rest fills whole tiles; None where steps are too coarse for it."""
    now, dropped = {i: steps[i] for i in curves}, 0
    columns = sum(c.size(s) for i, c in curves.items() for s in range(now[i]))
    while (columns - dropped) % tile:
        prices = {i: c.prices[now[i] - 1] for i, c in curves.items() if now[i] > least[i]}
        if not prices or dropped > tile:
            return None
        i = min(prices, key=prices.__getitem__)
        now[i] -= 1
        dropped += curves[i].size(now[i])
    return _Move(0.0, dropped, now)


def _up(curves: Mapping[int, Curve], steps: Sequence[int], tile: int) -> _Move | None:
    """Add the dearest steps until they fill a tile or two, or the block is whole; None where they are too coarse."""
    now, added, worth = {i: steps[i] for i in curves}, 0, 0.0
    while not added or added % tile:
        prices = {i: c.prices[now[i]] for i, c in curves.items() if now[i] < len(c.prices)}
        if not prices and added:
            break
        if not prices or added > tile:
            return None
        i = max(prices, key=prices.__getitem__)
        size = curves[i].size(now[i])
        now[i] += 1
        added, worth = added + size, worth + prices[i] * size
    return _Move(worth / added, added, now)
