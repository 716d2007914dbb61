"""The decomposition: two Gram matrices in, a pair of bases and the singular values between them out.

A head's query and key (or its value output and a column of its output projection) meet only in an inner product ``a .
b``. CLOVER (arXiv 2411.17426) picks the basis in which that product is diagonal and ordered. Everything here works on
``d x d`` matrices, ``d`` the head size; the ``D x D`` product of the projections is never formed. What the Grams are
made of (weights alone, or activations) is the caller's choice and does not change the algorithm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EMPTY = 1e-6
"""Mean eigenvalue that a Gram of zeros counts as having, relative to those beside it: its directions go first, and yet
have a basis."""


class Bases(NamedTuple):
    """Transforms to the common basis: ``(t_a @ a) . (t_b @ b) == a . b``, directions ordered from large to small."""

    t_a: Float[Tensor, "*batch d d"]
    t_b: Float[Tensor, "*batch d d"]
    values: Float[Tensor, "*batch d"]


def ridged(gram: Float[Tensor, "*batch d d"], share: float) -> Float[Tensor, "*batch d d"]:
    """A Gram and a share of its mean eigenvalue in all directions; of one that is zero, next to none of the others'."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    others = EMPTY * mean.mean()
    mean = torch.where(mean > 0, mean, torch.where(others > 0, others, 1.0))
    return gram + share * mean[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def square_root(gram: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d d"]:
    """A matrix ``L`` with ``L @ L.mT == gram``, for any positive semi-definite ``gram``, of full rank or not."""
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():  # of deficient rank, where Cholesky stops; eigenvectors take it, for twenty times the time
        eigenvalues, vectors = torch.linalg.eigh(gram)
        spectral = vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)
        root = torch.where(failed.bool()[..., None, None], spectral, root)
    return root


def decompose(gram_a: Float[Tensor, "*batch d d"], gram_b: Float[Tensor, "*batch d d"]) -> Bases:
    """Diagonalise the inner product of two vectors whose second moments are given.

    With any roots ``G = L L^T`` and ``L_a^T L_b = U S V^T``, the transforms are ``T_a = S^-1/2 V^T L_b^T`` and
    ``T_b = S^-1/2 U^T L_a^T``: no inverse of a Gram is needed, so heads of deficient rank are no special case
    (their empty directions get zero rows). Afterwards both vectors have the second moment ``diag(values)``.

    Args:
        gram_a: ``E[a a^T]``, shape ``(..., d, d)``; computed in float64 whatever comes in.
        gram_b: ``E[b b^T]``, likewise.

    Returns:
        float64 bases; keep the first ``r`` rows of each transform to cut a head to rank ``r``. Cutting direction ``i``
        costs ``values[i] ** 2`` in ``E[(a . b)^2]`` when ``a`` and ``b`` are independent.
    """
    l_a, l_b = square_root(gram_a.double()), square_root(gram_b.double())
    u, s, vh = torch.linalg.svd(l_a.mT @ l_b)
    empty = s <= s[..., :1] * s.shape[-1] * torch.finfo(s.dtype).eps
    shrink = torch.where(empty, 0, s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt()).unsqueeze(-1)
    return Bases(shrink * (vh @ l_b.mT), shrink * (u.mT @ l_a.mT), torch.where(empty, 0, s))


def weight_gram(weight: Float[Tensor, "*batch d n"]) -> Float[Tensor, "*batch d d"]:
    """Gram of a projection under white input, ``W W^T``, float64: the metric of the paper."""
    weight = weight.double()
    return weight @ weight.mT
