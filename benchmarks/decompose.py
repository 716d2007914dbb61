"""Speed and accuracy of the decomposition, on random weights of true sizes.

    python benchmarks/decompose.py [layer] [whisper]     (both when left out)

layer: one layer of LLaMA-2-7B's shape, Q-K and V-O of all heads, float32. This project against ``torch.svd_lowrank``
with 16 iterations on the D x D products (the published code) and against full ``torch.linalg.svd`` of them.
whisper: ``clover.orthogonalize`` on a whole model of Whisper-large-v3's sizes, in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

import clover
from clover.decomposition.decompose import decompose, weight_gram
from common import SEED, chosen, isolated, peak_memory, record, reset_peak_memory, side_by_side, timed

Pair = tuple[Tensor, Tensor]
"""Two projections that meet in an inner product, ``(heads, d, D)`` float32; head ``h`` computes ``a[h].T @ b[h]``."""
WIDTH, HEADS, SIZE = 4096, 32, 128
ITERATIONS = 16
REPEATS = 3
LOW_RANK_HEADS = 4  # of each pair, timed by svd_lowrank
ERROR_HEADS = 2  # of each pair, whose error is measured
FULL_HEADS = 2  # timed by the full SVD; the first of them warms up
LARGE_V3 = {
    "vocab_size": 51866, "num_mel_bins": 128, "d_model": 1280,
    "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
    "decoder_layers": 32, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120,
}  # fmt: skip


def random_pairs(width: int, heads: int, size: int) -> dict[str, Pair]:
    """Random Q-K and V-O projections; the singular values of each head fall from 1 to 0.01."""
    generator = torch.Generator().manual_seed(SEED)

    def projection() -> Tensor:
        turn = torch.linalg.qr(torch.randn(heads, size, size, generator=generator)).Q
        rows = torch.randn(heads, size, width, generator=generator) / math.sqrt(width)
        return (turn * torch.logspace(0, -2, size)) @ rows

    return {"qk": (projection(), projection()), "vo": (projection(), projection())}


def by_head(pair: Pair) -> Iterable[Pair]:
    return zip(*pair, strict=True)


def find(pair: Pair) -> tuple[Tensor, Tensor]:
    """The bases of all heads: transforms ``(heads, d, d)`` float64."""
    return decompose(weight_gram(pair[0]), weight_gram(pair[1]))[:2]


def rewrite(pair: Pair) -> Pair:
    """All heads in their new bases: what a pruned or orthogonalised layer stores."""
    a, b = ((t @ w.double()).float() for t, w in zip(find(pair), pair, strict=True))
    return a, b


def low_rank(product: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The published way: factors ``(d, D)`` whose product is the given ``(D, D)`` one."""
    u, s, v = torch.svd_lowrank(product, q=size, niter=ITERATIONS)
    return (u * s).T, v.T


def full(product: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The same factors by a full SVD."""
    u, s, vh = torch.linalg.svd(product)
    return (u * s)[:, :size].T, vh[:size]


def low_rank_seconds(pairs: dict[str, Pair]) -> float:
    """Seconds in ``svd_lowrank`` for every head, from a few of them; forming the products is not counted."""
    some = [(a[:LOW_RANK_HEADS], b[:LOW_RANK_HEADS]) for a, b in pairs.values()]
    spent = sum(timed(partial(low_rank, a.T @ b, len(a)))[1] for pair in some for a, b in by_head(pair))
    return spent * len(pairs["qk"][0]) / len(some[0][0])


def error(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> float:
    """Relative Frobenius error of one head's product, in float64."""
    true = a.double().T @ b.double()
    return float((true - new_a.double().T @ new_b.double()).norm() / true.norm())


def errors(pairs: dict[str, Pair], method: Callable[[Pair], Iterable[Pair]]) -> float:
    """Median error over the first heads of both pairs; ``method`` takes them to the new factors of each head."""
    some = [(a[:ERROR_HEADS], b[:ERROR_HEADS]) for a, b in pairs.values()]
    return median(error(*old, *new) for pair in some for old, new in zip(by_head(pair), method(pair), strict=True))


def layer(width: int = WIDTH, heads: int = HEADS, size: int = SIZE, repeats: int = REPEATS) -> dict:
    pairs = random_pairs(width, heads, size)
    torch.manual_seed(SEED)  # svd_lowrank starts from random vectors
    seconds = side_by_side(
        {
            "find": lambda: timed(lambda: [find(p) for p in pairs.values()])[1],
            "rewrite": lambda: timed(lambda: [rewrite(p) for p in pairs.values()])[1],
            "svd_lowrank": lambda: low_rank_seconds(pairs),
        },
        repeats,
    )
    a, b = pairs["qk"]
    products = [a[h].T @ b[h] for h in range(FULL_HEADS)]
    runs = [timed(partial(full, m, size)) for m in products]
    one_head = median(spent for _, spent in runs[1:])
    return {
        "width": width, "heads": heads, "head_size": size, "dtype": "float32",
        "repeats": repeats, "iterations": ITERATIONS,
        "seconds": {**seconds, "full_svd_one_head": one_head, "full_svd": one_head * 2 * heads},
        "svd_lowrank_method": f"{LOW_RANK_HEADS} heads of each pair, times {heads / LOW_RANK_HEADS:g}",
        "full_svd_method": f"one product after one to warm up, times {2 * heads} products",
        "speedup_over_svd_lowrank": {name: seconds["svd_lowrank"] / seconds[name] for name in ("find", "rewrite")},
        "speedup_over_full_svd": one_head * 2 * heads / seconds["rewrite"],
        "error": {
            "this_project": errors(pairs, lambda pair: by_head(rewrite(pair))),
            "svd_lowrank": errors(pairs, lambda pair: [low_rank(a.T @ b, size) for a, b in by_head(pair)]),
            "full_svd": median(error(a[h], b[h], *factors) for h, (factors, _) in enumerate(runs)),
        },
    }  # fmt: skip


def orthogonalize(sizes: dict[str, int], dtype: str) -> dict:
    """Runs in its own process."""
    torch.manual_seed(SEED)
    config = WhisperConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
    torch.set_default_dtype(getattr(torch, dtype))
    model = WhisperForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    before = reset_peak_memory()
    _, seconds = timed(lambda: clover.orthogonalize(model))
    return {
        "sizes": sizes, "dtype": dtype, "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "seconds": seconds, "bytes_before": before, "peak_bytes": peak_memory(), "extra_bytes": peak_memory() - before,
    }  # fmt: skip


def whisper(sizes: dict[str, int] = LARGE_V3, dtype: str = "float16") -> dict:
    return isolated(orthogonalize, sizes, dtype)


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict]] = {"layer": layer, "whisper": whisper}
    for name in chosen(benchmarks):
        record(f"decompose-{name}", benchmarks[name]())
