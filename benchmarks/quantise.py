"""Pruning and quantisation, alone and together: bytes and perplexity of SmolLM2.

    python benchmarks/quantise.py [NAME ...]     (all when left out; one result file each)

NAME is MODEL, MODEL-WEIGHTS, MODEL--CACHE or MODEL-WEIGHTS-CACHE with a MODEL of dense, 25 and 50 (per cent of Q-K and
V-O removed), WEIGHTS of int8 (torchao) and nf4 (bitsandbytes), CACHE of fp8 and int4 (transformers' QuantizedCache;
int4 is HQQ's, in groups of 16 columns). Every model is saved, quantised as it is loaded, saved again and measured as it
is loaded from there. The first 24,576 tokens of WikiText-2 test, in windows of 1024 that are read in pieces of 128
through the cache, so that all but the newest tokens are read as the cache keeps them.
"""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, DynamicCache, QuantizedCache, TorchAoConfig

import clover
import language
from clover.attention.attention import CloverAttention
from clover.planning.budget import Limits, Share
from clover.pruning.prune import apply, find_bases, plan_ranks
from common import MODELS, SEED, chosen, record, text

MODELS_OF = {"dense": None, "25": 0.25, "50": 0.5}
TOGETHER = [
    "", "-int8", "-nf4", "--fp8", "--int4", "-int8-fp8", "-nf4-fp8", "-nf4-int4",
]  # fmt: skip
NAMES = [model + rest for model in MODELS_OF for rest in TOGETHER]
FIRST, WINDOW, PIECE, GROUP = 24_576, 1024, 128, 16


@cache
def tokens(split: str) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(MODELS / "smollm2")(text(split), return_tensors="pt").input_ids[0]


@cache
def bases() -> list:
    return find_bases(language.load(), calibration=language.calibration(tokens("train")), seed=SEED)


def smaller(share: float | None) -> Any:
    """The dense model or a pruned one. Heads' sizes are multiples of 16, which the groups of an int4 cache need."""
    model = language.load()
    if share:
        apply(model, bases(), plan_ranks(bases(), Share(share), Share(share), limits=Limits(multiple=GROUP)))
    return model


def weights(kind: str, model: Any) -> dict[str, Any]:
    """Options that let a model be quantised as it is loaded.

    bitsandbytes repacks four bits by blocks of 64 columns on CPUs with AVX-512, which cut projections don't fill: they
    stay whole.
    """
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": "cpu"}
    attention = [m for m in model.modules() if isinstance(m, CloverAttention)]
    linear = {n for m in attention for n, child in m.named_children() if isinstance(child, torch.nn.Linear)}
    options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    if linear:
        options["llm_int8_skip_modules"] = [*sorted(linear), "lm_head"]
    settings = BitsAndBytesConfig(load_in_4bit=True, **options)
    return {"quantization_config": settings, "device_map": "cpu"}


def empty(kind: str, model: Any) -> Any:
    """An empty cache."""
    if kind == "fp8":
        return QuantizedCache(backend="fp8", config=model.config)
    if kind == "int4":
        options: dict[str, Any] = {"nbits": 4, "q_group_size": GROUP, "residual_length": PIECE}
        return QuantizedCache(backend="hqq", config=model.config, axis_key=0, axis_value=0, **options)
    return DynamicCache()


def held(thing: Any) -> int:
    """Bytes of all tensors in a layer of a cache, whatever it keeps them in."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, tuple | list) else ()
    return sum(held(part) for part in parts)


@torch.inference_mode()
def perplexity(model: Any, kind: str) -> tuple[float, float]:
    """Perplexity, and bytes of the cache for each token of a full window."""
    total, count, size = 0.0, 0, 0.0
    for window in tokens("test")[:FIRST].split(WINDOW):
        kept, last = empty(kind, model), None
        for piece in window.split(PIECE):
            logits = model(input_ids=piece[None], past_key_values=kept, use_cache=True).logits[0].float()
            known = logits if last is None else torch.cat([last, logits])
            targets = piece[1:] if last is None else piece
            total += torch.nn.functional.cross_entropy(known[:-1], targets, reduction="sum").item()
            count, last = count + len(targets), logits[-1:]
        names = ("_quantized_keys", "_quantized_values") if kind else ("keys", "values")
        size = sum(held(getattr(layer, name)) for layer in kept.layers for name in names) / len(window)
    return math.exp(total / count), size


def measure(name: str) -> dict:
    which, quantised, cached = [*name.split("-"), "", ""][:3]
    with tempfile.TemporaryDirectory() as scratch:
        whole = smaller(MODELS_OF[which])
        folder = clover.save(whole, Path(scratch) / "whole")
        if quantised:
            model = clover.load(folder, dtype=torch.float32, **weights(quantised, whole))
            folder = clover.save(model, Path(scratch) / "small")
        model = clover.load(folder, dtype=torch.float32, device_map="cpu" if quantised else None)
        value, kv = perplexity(model, cached)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    protocol = {"tokens": FIRST, "window": WINDOW, "piece": PIECE, "dtype": "float32"}
    return {"perplexity": value, "file_bytes": size, "kv_bytes_per_token": kv, "protocol": protocol}


if __name__ == "__main__":
    for name in chosen(NAMES):
        record(f"quantise-{name}", measure(name))
