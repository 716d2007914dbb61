"""After the cut: what is kept is fitted, over all heads of a block at once, to what the whole block put out.

The cut block computes ``U D z`` from the head outputs ``z``, where the uncut one computes ``W z``: ``D`` takes each
head to its kept directions (one basis for all query heads of a KV head), ``U`` is the new output projection. Both are
least squares problems when the other is held, in the metric of the calibration: ``E[(g^T (W - U D) z)^2]``, ``g`` the
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from clover.decomposition.decompose import ridged

RIDGE = 1e-3
"""Pull of the refitted output projection towards the cut one, relative to the mean energy of a kept direction."""
ROUNDS, STEPS = 4, 12
"""Alternations of the two problems, and conjugate gradient steps for the bases in each."""
TOLERANCE = 1e-10
"""Residual of the bases' problem, relative to its right-hand side, that counts as solved."""


@dataclass(frozen=True)
class Kept:
    """Where the kept directions stand: KV head after KV head in ``bases``, query heads of each side by side in ``D``.

    Products with ``D``, which is zero but for a block a query head, go by groups of heads that keep equally many.
    """

    groups: tuple[tuple[Tensor, int], ...]
    """KV heads that follow one another, int64, and how many directions each of them keeps."""
    queries: int
    size: int
    kv_heads: int

    @classmethod
    def of(cls, ranks: list[tuple[int, int]], queries: int, size: int, kv_heads: int, device: torch.device) -> Kept:
        """The layout of bases that follow one another as in ``ranks``, ``(KV head, directions kept)`` each."""
        equal = groupby(ranks, key=lambda rank: rank[1])
        groups = tuple((torch.tensor([h for h, _ in heads], device=device), rank) for rank, heads in equal)
        return cls(groups, queries, size, kv_heads)

    def _parts(self, bases: Float[Tensor, "kept e"]) -> Iterator[tuple[Tensor, Tensor]]:
        """The heads of each group and their bases, ``(heads, rank, e)``."""
        sizes = [len(heads) * rank for heads, rank in self.groups]
        for (heads, rank), own in zip(self.groups, bases.split(sizes), strict=True):
            yield heads, own.view(len(heads), rank, self.size)

    def times(self, bases: Float[Tensor, "kept e"], right: Float[Tensor, "z w"]) -> Float[Tensor, "columns w"]:
        """``D @ right``."""
        by_head = right.unflatten(0, (self.kv_heads, self.queries, self.size))
        return torch.cat([(own.unsqueeze(1) @ by_head[heads]).flatten(0, 2) for heads, own in self._parts(bases)])

    def gather(self, left: Float[Tensor, "columns m"], right: Float[Tensor, "m z"]) -> Float[Tensor, "kept e"]:
        """Sum of the entries of ``left @ right`` at each place where ``D`` has an entry of the bases (the adjoint)."""
        by_head, found, at = right.unflatten(1, (self.kv_heads, self.queries, self.size)), [], 0
        for heads, rank in self.groups:
            rows = len(heads) * self.queries * rank
            own = left[at : at + rows].view(len(heads), self.queries, rank, left.shape[1])
            found.append((own @ by_head[:, heads].permute(1, 2, 0, 3)).sum(1).flatten(0, 1))
            at += rows
        return torch.cat(found)


def fit(
    target: Float[Tensor, "M z"],
    cut: Float[Tensor, "M columns"],
    bases: Float[Tensor, "kept e"],
    layout: Kept,
    covariance: Float[Tensor, "z z"],
    metric: Float[Tensor, "M M"],
) -> tuple[Float[Tensor, "M columns"], Float[Tensor, "kept e"]]:
    """Fit the output projection and the bases of a cut block in turn.

    Args:
        target: ``E[y z^T]`` of the block's output ``y`` and the head outputs, both centred: ``W @ covariance``.
        cut: output projection after the cut.
        bases: kept rows of the value transforms, KV head after KV head in the order of ``layout``.
        covariance: of the uncut head outputs, positive definite: in energies below zero the fit would gain endlessly.
        metric: ``E[g g^T]`` of the gradient at the block's output.

    Returns:
        The fitted projection and bases. At full rank they are what came in.
    """
    fitted = _fit_output(target, cut, bases, layout, covariance)
    for _ in range(ROUNDS):
        bases = _fit_bases(target, fitted, bases, layout, covariance, metric)
        fitted = _fit_output(target, fitted, bases, layout, covariance)
    return fitted, bases


def _fit_output(target: Tensor, cut: Tensor, bases: Tensor, layout: Kept, covariance: Tensor) -> Tensor:
    """The projection for given bases; ``target`` is the whole one times the covariance."""
    gram = layout.times(bases, layout.times(bases, covariance).mT)
    missing = layout.times(bases, target.mT) - gram @ cut.mT
    return cut + torch.linalg.solve(ridged(gram, RIDGE), missing).mT


def _fit_bases(target: Tensor, cut: Tensor, bases: Tensor, layout: Kept, covariance: Tensor, metric: Tensor) -> Tensor:
    """Conjugate gradients on the normal equations, from where the bases are."""
    left = cut.mT @ metric
    square = left @ cut

    def apply(direction: Tensor) -> Tensor:
        return layout.gather(square, layout.times(direction, covariance))

    wanted = layout.gather(left, target)
    residual = wanted - apply(bases)
    direction, energy = residual, residual.square().sum()
    solved = TOLERANCE**2 * wanted.square().sum()
    for _ in range(STEPS):
        if energy <= solved:
            break  # what is left is rounding; with little data the curvature along it may be zero or negative
        image = apply(direction)
        step = energy / (direction * image).sum()
        bases = bases + step * direction
        residual = residual - step * image
        fresh = residual.square().sum()
        direction = residual + fresh / energy * direction
        energy = fresh
    return bases
