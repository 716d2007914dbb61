"""How near a pruned model comes to what its bytes allow, and whether it is ever slower: in turns, in one process.

    python benchmarks/decode.py [contexts] [sweep] [eighth] [encoder]     (all when left out)

contexts: tokens a second that SmolLM2 writes behind 2048, 4096 and 8160 tokens, batch 1 and 8, Q-K and V-O cut by 50 %,
beside the bound (weights + KV-cache of the dense model) / (of the pruned one). The dense model's cache is transformers'
default, which copies all keys and values for each token; the pruned model's grows in place.
sweep: prefill and decode at contexts of 128 and 2048, both cut by 12.5 to 75 %; and, for how exact that is, by 0 %: a
second copy of the dense model.
eighth: the smallest of these cuts at 2048 again, alone and for longer.
encoder: that of Whisper-base over the same sweep, beside the bound of multiply-adds (attention and MLP; convolutions
are left out on both sides).
float32, random inputs. Run it on a quiet machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from transformers import AutoTokenizer

import language
import speech
from clover.measure.cost import sizes
from clover.pruning.prune import find_bases
from common import MODELS, SEED, apart, chosen, record, text
from speed import cut_all, loaded, throughput

CONTEXTS, BATCHES = (2048, 4096, 8160), (1, 8)
NEW_TOKENS, REPEATS, ENCODINGS = 16, 9, 41
SWEEP, LONGER = {"128": 121, "2048": 11}, 31
"""How often each context is measured: cuts this small change a prefill by a few per cent, as does a busy machine."""
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


@cache
def measured() -> tuple[Any, Any]:
    """The model and its bases, which take minutes."""
    model = language.load()
    tokens = AutoTokenizer.from_pretrained(MODELS / "smollm2")(text("train"), return_tensors="pt").input_ids[0]
    return model, find_bases(model, calibration=language.calibration(tokens), seed=SEED)


@contextmanager
def cuts(ratios: Iterable[float]) -> Iterator[dict[str, str]]:
    shares = {f"{ratio:.1%}": (ratio, ratio) if ratio else None for ratio in ratios}
    with cut_all(*measured(), shares) as folders:
        yield folders


def contexts() -> dict:
    sizes_of = [(context, batch) for context in CONTEXTS for batch in BATCHES]
    options: dict[str, Any] = {"new_tokens": NEW_TOKENS, "repeats": REPEATS, "decode_only": True}
    with cuts([0.5]) as folders:
        runs = apart(throughput, folders, [{"context": c, "batch": b, **options} for c, b in sizes_of])
        held: Any = {name: sizes(model) for name, model in loaded(folders).items()}
    rows, key = [], "decode_tokens_per_second"
    for (context, batch), rates in zip(sizes_of, runs, strict=True):
        tokens = batch * (context + NEW_TOKENS // 2)  # on average, while the new ones are written
        moved = {name: held[name]["bytes"] + tokens * held[name]["kv_bytes_per_token"] for name in held}
        found = {"dense": rates["dense"][key], "50 %": rates["50.0%"][key], "ratio": rates["ratio"]["50.0%"][key]}
        rows.append({"context": context, "batch": batch, **found, "bound": moved["dense"] / moved["50.0%"]})
    return {"dtype": "float32", "new_tokens": NEW_TOKENS, "repeats": REPEATS, "rows": rows}


def sweep(ratios: Iterable[float] = (0, *RATIOS), repeats: dict[str, int] = SWEEP) -> dict:
    with cuts(ratios) as folders:
        runs = [{"context": int(c), "new_tokens": NEW_TOKENS, "repeats": turns} for c, turns in repeats.items()]
        found = apart(throughput, folders, runs)
    return {"dtype": "float32", "batch": 1, "repeats": repeats, "contexts": dict(zip(repeats, found, strict=True))}


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
    shares = {"0.0%": None} | {f"{ratio:.1%}": (ratio, ratio) for ratio in RATIOS} | {"75 % + 50 %": speech.BEYOND}
    with cut_all(speech.dense(), speech.bases("encoder", "activations"), shares) as folders:
        (rates,) = apart(throughput, folders, [{"repeats": ENCODINGS}])
        work = {name: multiply_adds(model) for name, model in loaded(folders).items()}
    bound = {name: work["dense"] / work[name] for name in work}
    return {"dtype": "float32", "batch": 1, "repeats": ENCODINGS, "throughput": rates, "bound": bound}


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict]] = {
        "contexts": contexts,
        "sweep": sweep,
        "eighth": partial(sweep, (0, 0.125), {"2048": LONGER}),
        "encoder": encoder,
    }
    for name in chosen(benchmarks):
        record(f"decode-{name}", benchmarks[name]())
