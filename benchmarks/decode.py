"""How near a pruned model comes to what its bytes allow, and whether it is ever slower: in turns, in one process.

    python benchmarks/decode.py [contexts] [sweep] [encoder]     (all when left out)

contexts: tokens a second that SmolLM2 writes behind 2048, 4096 and 8160 tokens, batch 1 and 8, Q-K and V-O cut by 50 %,
beside the bound (weights + KV-cache of the dense model) / (of the pruned one). The dense model's cache is transformers'
default, which copies all keys and values for each token; the pruned model's grows in place.
sweep: prefill and decode at a context of 2048, both cut by 12.5 to 75 %.
encoder: that of Whisper-base over the same sweep, beside the bound of multiply-adds (attention and MLP; convolutions
are left out on both sides).
float32, random inputs. Run it on a quiet machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer

import language
import speech
from clover.cost import compare_throughput, sizes
from clover.pruning import find_bases
from common import MODELS, SEED, chosen, record, text
from speed import cut_all

CONTEXTS, BATCHES = (2048, 4096, 8160), (1, 8)
NEW_TOKENS, REPEATS = 16, 5
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


@cache
def bases() -> tuple[Any, list]:
    model = language.load()
    tokens = AutoTokenizer.from_pretrained(MODELS / "smollm2")(text("train"), return_tensors="pt").input_ids[0]
    return model, find_bases(model, calibration=language.calibration(tokens), seed=SEED)


def contexts() -> dict:
    models = cut_all(*bases(), {"50 %": (0.5, 0.5)})
    held = {name: sizes(model) for name, model in models.items()}
    rows = []
    for context in CONTEXTS:
        for batch in BATCHES:
            rates = compare_throughput(
                models, context=context, new_tokens=NEW_TOKENS, batch=batch, repeats=REPEATS, decode_only=True
            )
            tokens = batch * (context + NEW_TOKENS // 2)  # on average, while the new ones are written
            moved = {name: held[name]["bytes"] + tokens * held[name]["kv_bytes_per_token"] for name in models}
            key = "decode_tokens_per_second"
            row = {"context": context, "batch": batch, **{name: rates[name][key] for name in models}}
            rows.append(row | {"ratio": rates["ratio"]["50 %"][key], "bound": moved["dense"] / moved["50 %"]})
    return {"dtype": "float32", "new_tokens": NEW_TOKENS, "repeats": REPEATS, "rows": rows}


def sweep() -> dict:
    models = cut_all(*bases(), {f"{ratio:.1%}": (ratio, ratio) for ratio in RATIOS})
    rates = compare_throughput(models, context=2048, new_tokens=NEW_TOKENS, repeats=REPEATS)
    return {"dtype": "float32", "batch": 1, "context": 2048, "repeats": REPEATS, "throughput": rates}


def multiply_adds(model: Any) -> int:
    """Of the layers of Whisper's encoder, for one window: projections, MLP, and attention itself."""
    tokens, total = model.config.max_source_positions, 0
    for layer in model.get_encoder().layers:
        linear = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        total += tokens * sum(m.weight.numel() for m in linear)
        plan = getattr(layer.self_attn, "clover", None)
        columns = plan.qk_kept + plan.vo_kept if plan else 2 * layer.self_attn.embed_dim
        total += tokens**2 * columns
    return total


def encoder() -> dict:
    shares = {f"{ratio:.1%}": (ratio, ratio) for ratio in RATIOS} | {"75 % + 50 %": speech.BEYOND}
    models = cut_all(speech.dense(), speech.bases("encoder", "activations"), shares)
    rates = compare_throughput(models, repeats=2 * REPEATS)
    work = {name: multiply_adds(model) for name, model in models.items()}
    bound = {name: work["dense"] / work[name] for name in models}
    return {"dtype": "float32", "batch": 1, "repeats": 2 * REPEATS, "throughput": rates, "bound": bound}


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict]] = {"contexts": contexts, "sweep": sweep, "encoder": encoder}
    for name in chosen(benchmarks):
        record(f"decode-{name}", benchmarks[name]())
