"""Q-K under rotary positions (RoPE): which pairs to keep, and the complex gains that make up for the rest.

A logit is a sum over pairs of ``Re(z_q conj(z_k) e^{i(m-n)phi})``, one complex number for each pair, and the only
linear maps that commute with every rotation are complex gains, one for each pair. So frequencies can't be mixed, but
a pair can be dropped and the gains of the others refitted, to change the attention distribution least. "Least" is
measured by the Gram of the pairs' contributions, centred under each query's weights of the keys: under its attention,
half its quadratic form is a KL divergence.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clover.decomposition.decompose import ridged
from clover.model.heads import energies

RIDGE = 1e-3
"""Pull of the refitted gains towards 1, relative to the mean energy of a feature."""


def features(q: Float[Tensor, "*#batch m r"], k: Float[Tensor, "*#batch t r"]) -> Float[Tensor, "*#batch m t r"]:
    """What each pair adds to each logit: real parts, then imaginary parts.

    Args:
        q, k: rotated (or not yet rotated: the same) queries and keys, real parts in the first half of the columns.
    """
    q_re, q_im = q.unsqueeze(-2).chunk(2, -1)
    k_re, k_im = k.unsqueeze(-3).chunk(2, -1)
    return torch.cat([q_re * k_re + q_im * k_im, q_im * k_re - q_re * k_im], -1)


def white_gram(q: Float[Tensor, "kv n r D"], k: Float[Tensor, "kv r C"]) -> Float[Tensor, "kv n r r"]:
    """The Gram of ``features`` where no data is at hand: white input, query and key independent, any distance."""
    half = k.shape[1] // 2
    q_energy, k_energy = (e[..., :half] + e[..., half:] for e in map(energies, (q, k)))
    return torch.diag_embed(((q_energy * k_energy.unsqueeze(1)) / 2).repeat(1, 1, 2))


def by_energy(gram: Float[Tensor, "kv n r r"]) -> tuple[Int[Tensor, "kv p"], Float[Tensor, "kv p"]]:
    """What ``eliminate`` returns for a diagonal Gram, where no pair can make up for another."""
    energy = ridged(gram.double(), RIDGE).diagonal(dim1=-2, dim2=-1)[..., : gram.shape[-1] // 2].sum(1)
    cost, order = energy.sort(stable=True, dim=-1)
    return order.flip(-1), cost.flip(-1)


def eliminate(gram: Float[Tensor, "kv n r r"]) -> tuple[Int[Tensor, "kv p"], Float[Tensor, "kv p"]]:
    """Order pairs by backward elimination with gains refitted at each step.

    Pairs are chosen for all query heads of a KV head at once (its keys are shared), gains for each query head.
    Each step removes the pair of least added cost, in closed form (as Optimal Brain Surgeon does).

    Returns:
        Pairs from the last removed (best) to the first, and what each removal added to the quadratic form, made
        non-increasing. float64.
    """
    kv, n, width, _ = gram.shape
    pairs = width // 2
    if not pairs:
        return torch.zeros(kv, 0, dtype=torch.long, device=gram.device), gram.new_zeros(kv, 0)
    # Real and imaginary parts are axes of their own: (kv, n, 2, pairs, 2, pairs).
    inverse = torch.linalg.inv(ridged(gram.double(), RIDGE)).unflatten(-1, (2, pairs)).unflatten(-3, (2, pairs))
    gains = torch.stack([gram.new_ones(kv, n, pairs), gram.new_zeros(kv, n, pairs)], 2).double()
    order, cost = [], []
    gone = torch.zeros(kv, pairs, dtype=torch.bool, device=gram.device)
    rows, eye = torch.arange(kv, device=gram.device), torch.eye(2, dtype=torch.float64, device=gram.device)
    for _ in range(pairs):
        core = _inverse(inverse.diagonal(dim1=3, dim2=5).permute(0, 1, 4, 2, 3))  # of each pair alone
        price = torch.einsum("gnip,gnpij,gnjp->gp", gains, core, gains)
        worst = price.masked_fill(gone, torch.inf).argmin(-1)
        order.append(worst)
        cost.append(price[rows, worst].clamp_min(0))
        gone[rows, worst] = True
        wide = inverse[rows, :, :, :, :, worst]  # its columns: (kv, n, 2, pairs, 2)
        step = wide @ _inverse(wide[rows, :, :, worst]).unsqueeze(2)
        gains -= (step @ gains[rows, :, :, worst][:, :, None, :, None]).squeeze(-1)
        inverse -= torch.einsum("gnapi,gnbqi->gnapbq", step, wide)
        # What is removed stays removed, whatever rounding says.
        gains[rows, :, :, worst] = 0
        inverse[rows, :, :, worst] = 0
        inverse[rows, :, :, :, :, worst] = 0
        inverse[rows, :, :, worst, :, worst] = eye
    removed = torch.stack(cost, -1).cummax(-1).values
    return torch.stack(order, -1).flip(-1), removed.flip(-1)


def fit_gains(gram: Float[Tensor, "h n r r"], kept: Int[Tensor, "h p"]) -> Float[Tensor, "h n p 2"]:
    """Real and imaginary gain of each kept pair: least squares for the sum of all pairs' real parts."""
    h, n, width, _ = gram.shape
    pairs, p = width // 2, kept.shape[1]
    if p == pairs:
        return torch.tensor([1.0, 0.0], dtype=torch.float64, device=gram.device).expand(h, n, pairs, 2)
    columns = torch.cat([kept, kept + pairs], -1)[:, None]
    rows = ridged(gram.double(), RIDGE).gather(-2, columns.unsqueeze(-1).expand(h, n, 2 * p, width))
    gone = torch.ones(h, pairs, dtype=torch.float64, device=gram.device).scatter(1, kept, 0.0)
    missing = (rows[..., :pairs] @ gone[:, None, :, None]).squeeze(-1)
    gains = torch.linalg.solve(rows.gather(-1, columns.unsqueeze(-2).expand(h, n, 2 * p, 2 * p)), missing)
    gains[..., :p] += 1
    return torch.stack(gains.chunk(2, -1), -1)


def gained(
    q: Float[Tensor, "h n r x"], gains: Float[Tensor, "h n p 2"], kept: Int[Tensor, "h p"]
) -> Float[Tensor, "h n 2*p x"]:
    """Rows of the kept pairs of queries, times their gains: real and imaginary parts side by side.

    A gain ``(alpha, beta)`` weighs the pair's real and imaginary contribution: it multiplies ``z_q`` by ``alpha - i
    beta``.
    """
    h, n, width, _ = q.shape
    head = torch.arange(h, device=q.device)[:, None, None], torch.arange(n, device=q.device)[:, None]
    real, imaginary = q[(*head, kept[:, None])].double(), q[(*head, kept[:, None] + width // 2)].double()
    alpha, beta = gains.unsqueeze(-1).unbind(-2)
    return torch.stack([alpha * real + beta * imaginary, alpha * imaginary - beta * real], 3).flatten(2, 3)


def chosen(k: Float[Tensor, "h r x"], kept: Int[Tensor, "h p"]) -> Float[Tensor, "h 2*p x"]:
    """Rows of the kept pairs of keys: real and imaginary parts side by side."""
    columns = torch.stack([kept, kept + k.shape[1] // 2], -1).flatten(1)
    return k[torch.arange(len(k), device=k.device)[:, None], columns].double()


def _inverse(matrix: Float[Tensor, "*batch 2 2"]) -> Float[Tensor, "*batch 2 2"]:
    """Of positive definite matrices, in closed form: libraries take these small ones one by one."""
    a, b, _, d = matrix.flatten(-2).unbind(-1)
    return torch.stack([d, -b, -b, a], -1).unflatten(-1, (2, 2)) / (a * d - b * b)[..., None, None]
