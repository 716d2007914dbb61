"""Other methods that make attention smaller, from the equations of their papers, as pure functions.

A method gets the facts of all blocks and the share to remove, and gives each block back at its original sizes with the
low-rank result multiplied out: numerically the small model, without a runtime for each. What it would store and cache
is counted beside. Each is written for this comparison; what differs from the paper stands in its docstring.
Where norms of queries and keys fix Q-K, the share goes from V-O alone, for every method; those that can't cut V-O alone
take as many parameters elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clover.decomposition.decompose import decompose
from clover.model.heads import Heads
from facts import Facts

RIDGE = 1e-6


@dataclass(frozen=True)
class Cut:
    """A block as a method leaves it."""

    heads: Heads
    parameters: float
    """Weights and biases that the method stores for the block."""
    cached: float
    """Numbers that it caches for a token: keys and values, or what stands for them."""
    behind: Float[Tensor, "kv d d"] | None = None
    """A map of the keys that acts behind the rotation; the query sees ``q . (behind k)``."""


class Inapplicable(Exception):
    """A method that is not defined for a model."""


Method = Callable[[Sequence[Facts], float], list[Cut]]


def _ridged(gram: Tensor) -> Tensor:
    energy = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return gram + RIDGE * energy * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _keep(count: int, share: float, step: int = 1) -> int:
    """How many of ``count`` are left, a multiple of ``step``, at least one step."""
    return max(step, step * round((1 - share) * count / step))


def _sizes(heads: Heads, qk: Sequence[float], vo: Sequence[float], biases: float = 0) -> dict[str, Any]:
    """Parameters and cached numbers of a block whose KV heads keep ``qk`` and ``vo`` directions, ``biases`` beside."""
    n, _, wide = heads.q.shape[1:]
    reads, writes = heads.k.shape[-1], heads.o.shape[2]
    stored = sum(qk) * (n * wide + reads) + sum(vo) * (n * writes + reads)
    stored += sum(qk) * (n * (heads.q_bias is not None) + (heads.k_bias is not None))
    return {"parameters": stored + biases, "cached": sum(qk) + sum(vo)}


def _even(heads: Heads, qk: int, vo: int) -> dict[str, Any]:
    bias = heads.o_bias is not None or heads.v_bias is not None
    return _sizes(heads, [qk] * len(heads.k), [vo] * len(heads.k), heads.o.shape[2] * bias)


def _map_qk(heads: Heads, to_q: Tensor | None = None, to_k: Tensor | None = None) -> Heads:
    """Queries and keys times a ``(kv, d, d)`` map."""
    q, q_bias, k, k_bias = heads.q, heads.q_bias, heads.k, heads.k_bias
    if to_q is not None:
        q = to_q.unsqueeze(1) @ q
        q_bias = None if q_bias is None else (to_q.unsqueeze(1) @ q_bias.unsqueeze(-1)).squeeze(-1)
    if to_k is not None:
        k, k_bias = to_k @ k, None if k_bias is None else (to_k @ k_bias.unsqueeze(-1)).squeeze(-1)
    return replace(heads, q=q, k=k, q_bias=q_bias, k_bias=k_bias)


def _map_v(heads: Heads, to_v: Tensor) -> Heads:
    bias = None if heads.v_bias is None else (to_v @ heads.v_bias.unsqueeze(-1)).squeeze(-1)
    return replace(heads, v=to_v @ heads.v, v_bias=bias)


def _cut_product(gram_a: Tensor, gram_b: Tensor, rank: int) -> Tensor:
    """The map of ``b`` under which ``a . b`` has the given rank and the least error: ``(kv, d, d)``."""
    bases = decompose(_ridged(gram_a), _ridged(gram_b))
    return bases.t_a[:, :rank].mT @ bases.t_b[:, :rank]


def _mask(score: Float[Tensor, "kv d"], keep: int) -> Tensor:
    """Diagonal map that keeps the columns of the largest scores of each head."""
    best = score.argsort(-1, descending=True)[:, :keep]
    return torch.diag_embed(torch.zeros_like(score).scatter(1, best, 1.0))


def _by_pairs(score: Tensor, rotary: int) -> Tensor:
    """Under RoPE both columns of a pair get the pair's sum: they stay or go together."""
    half = rotary // 2
    pair = score[:, :half] + score[:, half:rotary]
    return torch.cat([pair, pair, score[:, rotary:]], -1)


def _select(heads: Heads, score: Tensor, share: float) -> tuple[Heads, int]:
    """Keep the Q-K columns of the largest score, pairs whole."""
    keep = _keep(score.shape[1], share, 2 if heads.rotary else 1)
    if heads.rotary:
        score = _by_pairs(score, heads.rotary)
    return _map_qk(heads, to_k=_mask(score, keep)), keep


def _grams(facts: Facts) -> tuple[Tensor, Tensor]:
    """Second moments of queries (summed over the query heads of a KV head) and keys."""
    return facts.mean("query").sum(1), facts.mean("key")


def _column_norms(query: Tensor, key: Tensor) -> Tensor:
    """Product of the norms of each query and key column."""
    return (query.diagonal(dim1=-2, dim2=-1) * key.diagonal(dim1=-2, dim2=-1)).sqrt()


def _output_gram(heads: Heads) -> Tensor:
    return torch.einsum("gnme,gnmf->gef", heads.o, heads.o)


def _qk(f: Facts, share: float) -> float:
    """The share of Q-K that goes."""
    return 0.0 if f.block.normed else share


def _of_all(f: Facts, share: float) -> float:
    """The share of all weights that goes."""
    h = f.heads
    fixed = h.q.numel() + h.k.numel() if f.block.normed else 0
    return share * (1 - fixed / (h.parameters() - _biases(h)))


def norms(facts: Sequence[Facts], share: float) -> list[Cut]:
    """Norm pruning: dimensions of least ``||w_q|| ||w_k||`` and ``||w_v|| ||w_o||`` go, as many in each head."""
    cuts = []
    for f in facts:
        h = f.heads
        score = (h.q.square().sum((1, -1)) * h.k.square().sum(-1)).sqrt()
        cut, qk = _select(h, score, _qk(f, share))
        vo = _keep(h.v.shape[1], share)
        cut = _map_v(cut, _mask((h.v.square().sum(-1) * h.o.square().sum((1, 2))).sqrt(), vo))
        cuts.append(Cut(cut, **_even(h, qk, vo)))
    return cuts


def svd_llm(facts: Sequence[Facts], share: float) -> list[Cut]:
    """SVD-LLM (arXiv 2403.07378): each matrix alone, truncated in the metric of its input.

    ``W C^{1/2}`` is truncated to rank r, which projects W on eigenvectors of ``W C W^T``. Two factors of rank r hold
    ``r (m + n)`` numbers, so r is chosen for the parameters; keys and values are cached whole (as the paper does).
    """
    cuts = []
    for f in facts:
        h, stored = f.heads, 0
        flat = {"q": h.q.flatten(0, 2), "k": h.k.flatten(0, 1), "v": h.v.flatten(0, 1), "o": _flat_o(h)}
        moments = {"q": f.mean("input"), "k": f.mean("source"), "v": f.mean("source"), "o": f.mean("output")}
        new = {}
        for name, weight in flat.items():
            m, n = weight.shape
            if f.block.normed and name in "qk":
                new[name], stored = weight, stored + m * n
                continue
            rank = max(1, math.floor((1 - share) * m * n / (m + n)))
            basis = torch.linalg.eigh(weight @ moments[name] @ weight.T).eigenvectors[:, -rank:]
            new[name], stored = basis @ (basis.T @ weight), stored + rank * (m + n)
        cut = replace(h, q=new["q"].view_as(h.q), k=new["k"].view_as(h.k), v=new["v"].view_as(h.v),
                      o=_heads_of_o(new["o"], h))  # fmt: skip
        cuts.append(Cut(cut, stored + _biases(h), _whole_cache(h)))
    return cuts


def a3(facts: Sequence[Facts], share: float) -> list[Cut]:
    """A3 (arXiv 2505.12942): Q-K and O-V of each head by SVD in the metric of their inputs; one rank for all heads.

    Q-K minimises the error of the logits, O-V that of the head's output behind attention. Under RoPE column pairs are
    selected by the product of their norms in that metric, as in the paper; nothing is refitted.
    """
    return [_a3_block(f, share) for f in facts]


def _a3_block(f: Facts, share: float) -> Cut:
    h = f.heads
    query, key = _grams(f)
    if h.rotary or f.block.normed:
        score = _column_norms(query, key)
        cut, qk = _select(h, score, _qk(f, share))
    else:
        qk = _keep(h.k.shape[1], share)
        cut = _map_qk(h, to_k=_cut_product(query, key, qk))
    vo = _keep(h.v.shape[1], share)
    attended = torch.einsum("gnagnb->gab", _per_head(f.mean("output"), h))
    cut = _map_v(cut, _cut_product(_output_gram(h), attended, vo))
    return Cut(cut, **_even(h, qk, vo))


def modegpt(facts: Sequence[Facts], share: float) -> list[Cut]:
    """MoDeGPT's attention (arXiv 2408.09632): CR columns for Q-K, SVD for V-O, shares by block influence.

    Columns are selected by the product of their activation norms, in every model; V-O is decomposed in the metric of
    the block's input, before attention. A layer's share is proportional to ``softmax(-influence / 0.1)``, at most 0.95.
    The influence is that of the whole layer.
    """
    cuts = []
    for f, mine in zip(facts, _allocate([float(f.mean("influence")) for f in facts], share), strict=True):
        h = f.heads
        query, key = _grams(f)
        score = _column_norms(query, key)
        cut, qk = _select(h, score, _qk(f, mine))
        vo = _keep(h.v.shape[1], mine)
        cut = _map_v(cut, _cut_product(_output_gram(h), f.mean("value"), vo))
        cuts.append(Cut(cut, **_even(h, qk, vo)))
    return cuts


def _allocate(influence: list[float], share: float, temperature: float = 0.1, most: float = 0.95) -> list[float]:
    """Shares whose mean is ``share``, larger for layers that change less."""
    weight = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / temperature, 0)
    shares = weight * share * len(influence)
    for _ in range(len(influence)):  # what exceeds the bound goes to the others
        full = shares >= most
        shares[full] = most
        if full.all() or shares.mean() >= share - 1e-9:
            break
        rest = share * len(influence) - most * int(full.sum())
        shares[~full] = weight[~full] / weight[~full].sum() * rest
    return shares.tolist()


def kq_svd(facts: Sequence[Facts], share: float) -> list[Cut]:
    """KQ-SVD (arXiv 2512.05916): the best low-rank form of the logits themselves, acting on the cache.

    Keys are projected behind the rotation, which weights can't hold: only the cache gets smaller, the parameters stay,
    and grow by the projections. Values likewise against W_o (which takes them up). One rank for all heads.
    """
    cuts = []
    for f in facts:
        h = f.heads
        d, e = h.k.shape[1], h.v.shape[1]
        qk, vo = _keep(d, _qk(f, share)), _keep(e, share)
        cut = _map_v(h, _cut_product(_output_gram(h), f.mean("value"), vo))
        if f.block.normed:
            cuts.append(Cut(cut, **_even(h, d, vo)))
            continue
        behind: Tensor | None = _cut_product(*_grams(f), qk)
        sizes = _even(h, d, vo) if h.rotary else _even(h, qk, vo)
        if h.rotary:
            sizes |= {"parameters": sizes["parameters"] + 2 * len(h.k) * d * qk, "cached": len(h.k) * (qk + vo)}
        else:
            cut, behind = _map_qk(cut, to_k=behind), None
        cuts.append(Cut(cut, behind=behind, **sizes))
    return cuts


def palu(facts: Sequence[Facts], share: float, group: int = 4) -> list[Cut]:
    """Palu (arXiv 2407.21118): K and V of up to four heads at once become latents, which are cached.

    Truncated in the metric of the input, ranks by Fisher information over all K and V (without gradients: the same for
    all), at most 95 % of full. Keys are rebuilt from their latents before the rotation; the value's factor goes into
    W_o, which each query head then reads at the latent's width. Matched on the cache.
    """
    ranks = _palu_ranks(facts, share)
    cuts = []
    for f, (k_rank, v_rank) in zip(facts, ranks, strict=True):
        h = f.heads
        new: dict[str, Any] = {}
        parameters, cached = h.q.numel() + _biases(h), 0
        for name, rank in (("k", k_rank), ("v", v_rank)):
            weight = getattr(h, name)
            if f.block.normed and name == "k":
                parameters, cached = parameters + weight.numel(), cached + weight[..., 0].numel()
                continue
            parts = []
            for heads in weight.split(group):
                flat = heads.flatten(0, 1)
                keep = max(1, round(rank * len(flat)))
                basis = torch.linalg.eigh(flat @ f.mean("source") @ flat.T).eigenvectors[:, -keep:]
                parts.append((basis @ (basis.T @ flat)).view_as(heads))
                # The key's second factor is stored; W_o takes up the value's.
                back = len(flat) if name == "k" else len(heads) * h.q.shape[1] * h.o.shape[2]
                parameters, cached = parameters + keep * (flat.shape[1] + back), cached + keep
            new[name] = torch.cat(parts)
        cuts.append(Cut(replace(h, **new), parameters, cached))
    return cuts


def _palu_ranks(facts: Sequence[Facts], share: float, most: float = 0.95) -> list[tuple[float, float]]:
    """Share of the rank that K and V of each block keep; their mean is ``1 - share``."""
    normed = facts[0].block.normed
    names = ["v_fisher"] if normed else ["k_fisher", "v_fisher"]
    known = all(name in f.sums for f in facts for name in names)
    fisher = [float(f.mean(name)) if known else 1.0 for f in facts for name in names]
    kept = torch.tensor(fisher, dtype=torch.float64)
    weight, target = kept / kept.sum(), (1 - share) * len(fisher)
    kept = weight * target
    for _ in range(len(fisher)):
        full = kept >= most
        if not full.any() or full.all() or float(kept.clamp_max(most).sum()) >= target - 1e-9:
            break
        kept = torch.where(full, most, weight / weight[~full].sum() * (target - most * int(full.sum())))
    kept = kept.clamp(0.02, max(most, 1 - share))
    if normed:
        return [(1.0, rank) for rank in kept.tolist()]
    return list(zip(kept[::2].tolist(), kept[1::2].tolist(), strict=True))


def flap(facts: Sequence[Facts], share: float) -> list[Cut]:
    """FLAP (arXiv 2312.11983): heads whose output fluctuates least go whole; the mean of what they wrote stays as bias.

    The score of a column is its variance times the squared norm of its column of W_o; a head's is the mean, compared
    over all layers after standardising inside each. KV heads go with their query heads.

    Raises:
        Inapplicable: a layer has one KV head, which leaves nothing to standardise by.
    """
    if any(len(f.heads.k) == 1 for f in facts):
        raise Inapplicable("FLAP compares the heads of a layer; here a layer has one KV head")
    scores = []
    for f in facts:
        h = f.heads
        variance = f.mean("output").diagonal() - f.mean("output_mean").square()
        score = (variance.view(*h.o.shape[:2], -1) * h.o.square().sum(2)).mean((1, 2))
        scores.append((score - score.mean()) / score.std().clamp_min(1e-12))
    flat = torch.cat(scores)
    gone = torch.zeros_like(flat, dtype=torch.bool)
    gone[flat.argsort()[: round(_of_all(facts[0], share) * len(flat))]] = True
    return [_drop(f, mask) for f, mask in zip(facts, gone.split([len(s) for s in scores]), strict=True)]


def wanda_sp(facts: Sequence[Facts], share: float) -> list[Cut]:
    """Wanda-sp (as FLAP's paper defines it): heads by ``sum |W_o| ||z||``, the same share of every layer.

    With FLAP's bias compensation. What the whole number of heads leaves over is carried to the next layer.
    """
    cuts, owed = [], 0.0
    for f in facts:
        h = f.heads
        norm = f.mean("output").diagonal().sqrt().view(*h.o.shape[:2], -1)
        score = (h.o.abs().sum(2) * norm).sum((1, 2))
        owed += _of_all(f, share) * len(score)
        count = min(int(owed + 1e-9), len(score))
        owed -= count
        gone = torch.zeros_like(score, dtype=torch.bool)
        gone[score.argsort()[:count]] = True
        cuts.append(_drop(f, gone))
    return cuts


def _drop(f: Facts, gone: Tensor) -> Cut:
    h = f.heads
    kept = torch.where(gone, 0.0, 1.0).double()
    o = h.o * kept[:, None, None, None]
    mean = f.mean("output_mean").view(*h.o.shape[:2], -1)
    bias = torch.einsum("gnme,gne->m", h.o - o, mean) + (0 if h.o_bias is None else h.o_bias)
    left = int(kept.sum())
    full = [h.k.shape[1]] * left, [h.v.shape[1]] * left
    return Cut(replace(h, o=o, o_bias=bias), **_sizes(h, *full, biases=len(bias)))


def slicegpt(facts: Sequence[Facts], share: float) -> list[Cut]:
    """SliceGPT's attention (arXiv 2401.15024): the block reads and writes only leading principal components.

    Q, K and V read those of the block's input, W_o writes those of its output. The paper slices the residual stream
    itself, with the MLP's matrices; here the stream keeps its width, so the projections between are stored, and
    counted when the share is matched. The cache stays whole.
    """
    cuts = []
    for f in facts:
        h = f.heads
        weights, cross = h.parameters() - _biases(h), f.sums["source"].ne(f.sums["input"]).any()
        square = h.q.shape[-1] ** 2 + h.o.shape[2] ** 2 + bool(cross) * h.k.shape[-1] ** 2
        gone = 1 - (1 - _of_all(f, share)) * weights / (weights + square)
        x, source = (_leading(f.mean(name), gone) for name in ("input", "source"))
        flat = _flat_o(h)
        out = _leading(flat @ f.mean("output") @ flat.T, gone)
        cut = replace(h, q=h.q @ x, k=h.k @ source, v=h.v @ source, o=_heads_of_o(out @ flat, h))
        cuts.append(Cut(cut, (1 - gone) * (weights + square) + _biases(h), _whole_cache(h)))
    return cuts


def _leading(moment: Tensor, share: float) -> Tensor:
    """Projection on the leading principal components."""
    basis = torch.linalg.eigh(moment).eigenvectors[:, -_keep(len(moment), share) :]
    return basis @ basis.T


def _flat_o(h: Heads) -> Tensor:
    return h.o.permute(2, 0, 1, 3).flatten(1)


def _heads_of_o(flat: Tensor, h: Heads) -> Tensor:
    kv, n, _, e = h.o.shape
    return flat.unflatten(1, (kv, n, e)).permute(1, 2, 0, 3)


def _per_head(moment: Tensor, h: Heads) -> Tensor:
    kv, n, _, e = h.o.shape
    return moment.unflatten(0, (kv, n, e)).unflatten(-1, (kv, n, e))


def _biases(h: Heads) -> int:
    return sum(b.numel() for b in (h.q_bias, h.k_bias, h.v_bias, h.o_bias) if b is not None)


def _whole_cache(h: Heads) -> int:
    return h.k[..., 0].numel() + h.v[..., 0].numel()


METHODS: dict[str, Method] = {
    "norms": norms, "svd-llm": svd_llm, "a3": a3, "modegpt": modegpt, "kq-svd": kq_svd, "palu": palu,
    "flap": flap, "wanda-sp": wanda_sp, "slicegpt": slicegpt,
}  # fmt: skip
