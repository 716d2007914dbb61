"""After the cut: what is kept is fitted, over all heads of a block at once, to what the whole block put out.

The cut block computes ``U D z`` from the head outputs ``z``, where the uncut one computes ``W z``: ``D`` takes each
head to its kept directions (one basis for all query heads of a KV head), ``U`` is the new output projection. Both are
least squares problems when the other is held, in the metric of the calibration: ``E[(g^T (W - U D) z)^2]``, ``g`` the
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 1e-3
"""Pull of the refitted output projection towards the cut one, relative to the mean energy of a kept direction."""
ROUNDS, STEPS = 4, 12
"""Alternations of the two problems, and conjugate gradient steps for the bases in each."""
TOLERANCE = 1e-10
"""Residual of the bases' problem, relative to its right-hand side, that counts as solved."""


@dataclass(frozen=True)
class Layout:
    """Where each kept direction of a KV head stands: row of ``bases``, its rows and columns in ``D``."""

    rows: Int[Tensor, "n kept"]
    columns: Int[Tensor, "n kept e"]
    width: int
    ranks: tuple[int, ...]
    """Directions kept of each KV head, in their order."""

    @classmethod
    def of(cls, ranks: list[tuple[int, int]], queries: int, size: int, kv_heads: int, device: torch.device) -> Layout:
        """Flat values in the order of ``ranks`` (KV head, directions kept), query heads of a KV head side by side."""
        rows, columns, at = [], [], 0
        for head, rank in ranks:
            steps = torch.arange(queries)[:, None] * rank + torch.arange(rank) + at
            span = (head * queries + torch.arange(queries))[:, None] * size + torch.arange(size)
            rows.append(steps)
            columns.append(span[:, None].expand(queries, rank, size))
            at += queries * rank
        where = torch.cat(rows, 1).to(device), torch.cat(columns, 1).to(device)
        return cls(*where, kv_heads * queries * size, tuple(rank for _, rank in ranks))

    def spread(self, bases: Float[Tensor, "kept e"]) -> Float[Tensor, "columns z"]:
        """``D`` from the bases."""
        down = bases.new_zeros(self.rows.numel(), self.width)
        down[self.rows.unsqueeze(-1), self.columns] = bases.expand(len(self.rows), -1, -1)
        return down

    # Products with ``D`` go block by block: it is zero but for a block a query head.

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of the bases, and rows and columns of ``D``, of every query head."""
        at = 0
        for rank in self.ranks:
            if rank:
                for rows, columns in zip(self.rows[:, at : at + rank], self.columns[:, at], strict=True):
                    yield slice(at, at + rank), rows, columns
            at += rank

    def times(self, bases: Float[Tensor, "kept e"], right: Float[Tensor, "z w"]) -> Float[Tensor, "columns w"]:
        """``D @ right``."""
        product = right.new_empty(self.rows.numel(), right.shape[1])
        for kept, rows, columns in self._blocks():
            product[rows] = bases[kept] @ right[columns]
        return product

    def gather(self, left: Float[Tensor, "columns m"], right: Float[Tensor, "m z"]) -> Float[Tensor, "kept e"]:
        """Sum of the entries of ``left @ right`` at each place where ``D`` has an entry of the bases (the adjoint)."""
        total = right.new_zeros(sum(self.ranks), self.columns.shape[-1])
        for kept, rows, columns in self._blocks():
            total[kept] += left[rows] @ right[:, columns]
        return total


def refit(
    whole: Float[Tensor, "M z"],
    cut: Float[Tensor, "M columns"],
    bases: Float[Tensor, "kept e"],
    layout: Layout,
    covariance: Float[Tensor, "z z"],
    metric: Float[Tensor, "M M"],
) -> tuple[Float[Tensor, "M columns"], Float[Tensor, "kept e"]]:
    """Fit the output projection and the bases of a cut block in turn.

    Args:
        whole, cut: output projection before and after the cut.
        bases: kept rows of the value transforms, KV head after KV head in the order of ``layout``.
        covariance: of the uncut head outputs.
        metric: ``E[g g^T]`` of the gradient at the block's output.

    Returns:
        The fitted projection and bases. At full rank they are what came in.
    """
    return fit(whole @ covariance, cut, bases, layout, covariance, metric)


def fit(
    target: Float[Tensor, "M z"],
    cut: Float[Tensor, "M columns"],
    bases: Float[Tensor, "kept e"],
    layout: Layout,
    covariance: Float[Tensor, "z z"],
    metric: Float[Tensor, "M M"],
) -> tuple[Float[Tensor, "M columns"], Float[Tensor, "kept e"]]:
    """As ``refit``, to any output ``y``: ``target`` is ``E[y z^T]``, of ``y`` and the head outputs, both centred."""
    fitted = _fit_output(target, cut, bases, layout, covariance)
    for _ in range(ROUNDS):
        bases = _fit_bases(target, fitted, bases, layout, covariance, metric)
        fitted = _fit_output(target, fitted, bases, layout, covariance)
    return fitted, bases


def _fit_output(target: Tensor, cut: Tensor, bases: Tensor, layout: Layout, covariance: Tensor) -> Tensor:
    """The projection for given bases; ``target`` is the whole one times the covariance."""
    gram = layout.times(bases, layout.times(bases, covariance).mT)
    energy = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    ridged = gram + RIDGE * energy * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    missing = layout.times(bases, target.mT) - gram @ cut.mT
    return cut + torch.linalg.solve(ridged, missing).mT


def _fit_bases(
    target: Tensor, cut: Tensor, bases: Tensor, layout: Layout, covariance: Tensor, metric: Tensor
) -> Tensor:
    """Conjugate gradients on the normal equations, from where the bases are."""
    left = cut.mT @ metric
    square = left @ cut

    def apply(direction: Tensor) -> Tensor:
        return layout.gather(square, layout.times(direction, covariance))

    wanted = layout.gather(left, target)
    residual = wanted - apply(bases)
    direction, energy = residual, residual.square().sum()
    for _ in range(STEPS):
        if energy <= TOLERANCE**2 * wanted.square().sum():
            break  # what is left is rounding; with little data the curvature along it may be zero or negative
        image = apply(direction)
        step = energy / (direction * image).sum()
        bases = bases + step * direction
        residual = residual - step * image
        fresh = residual.square().sum()
        direction = residual + fresh / energy * direction
        energy = fresh
    return bases
