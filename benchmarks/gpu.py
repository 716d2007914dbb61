"""A model of LLaMA-2-7B's shape on one GPU: pruned, run and tuned, in bfloat16.

    python benchmarks/gpu.py [eager] [pruning] [tuning] [compiled]     (default: all)

pruning: seconds and most memory to prune by the weights, and calibrated on 16 x 512 tokens.
eager: prefill and decode of the dense model and of cuts, in turns, beside the bound of their bytes for decode; and what
is written first in a process, at lengths that libraries have no kernel chosen for yet.
compiled: the same for one token with a static cache, under torch.compile and CUDA graphs, on fewer layers.
tuning: seconds and memory of a training step, CLOVER beside LoRA (whose step PiSSA's is) and DoRA, as many parameters.
Weights are random, but heads differ and their spectra fall as in trained models, so that ranks come out ragged.
``CLOVER_LAYERS`` takes the place of the 32 layers.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import clover
from clover.measure.cost import compare_throughput, sizes
from clover.planning.budget import Share
from clover.pruning.prune import apply, find_bases, plan_ranks
from clover.tuning.methods import adapter_config
from clover.tuning.recipe import Recipe
from common import SEED, chosen, in_turns, record
from giants import SEVEN

LAYERS = int(os.environ.get("CLOVER_LAYERS", SEVEN["num_hidden_layers"]))
CUTS = {"25 %": 0.25, "50 %": 0.5}
PREFILL, DECODE = ((2048, 1), (512, 8)), ((2048, 1), (2048, 8), (4000, 8))
"""Contexts and batches."""
FIRST = 1000, 1100, 1200
NEW_TOKENS, REPEATS = 16, 15
FEWER = 4
STEP = (4, 512)


def model_of(layers: int = LAYERS) -> Any:
    """Random weights; rows of queries, keys and values fall in each head at a rate of its own."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**SEVEN | {"num_hidden_layers": layers, "max_position_embeddings": 8192})
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                    rate = torch.rand(heads, 1) * 4
                    fall = torch.exp(-rate * torch.rand(heads, size).sort(-1).values)
                    projection.weight.mul_(fall.flatten().unsqueeze(-1))
    return model


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(SEVEN["vocab_size"], (1, 512), generator=generator).cuda() for _ in range(16)]


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its milliseconds on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return result, start.elapsed_time(end)


def adapted(base: Any, method: str) -> Any:
    return get_peft_model(base, adapter_config(base, Recipe(method=method)))


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def pruning() -> dict:
    find_bases(model_of(1), calibration=data()[:1], seed=SEED)  # libraries are loaded
    found: dict[str, Any] = {"layers": LAYERS, "sequences": 16, "length": 512}
    for name, calibration in (("weights", None), ("calibrated", data())):
        model = model_of()
        free()
        before = torch.cuda.memory_allocated()
        bases, finding = clocked(partial(find_bases, model, calibration=calibration, seed=SEED))
        plan, planning = clocked(partial(plan_ranks, bases, Share(0.25), Share(0.25)))
        _, cutting = clocked(partial(apply, model, bases, plan))
        found[name] = {
            "bases_seconds": finding / 1e3, "plan_seconds": planning / 1e3, "cut_seconds": cutting / 1e3,
            "model_bytes": before, "peak_bytes": torch.cuda.max_memory_allocated(), **clover.summary(model),
        }  # fmt: skip
        del model, bases
        free()
    return found


@cache
def cuts(layers: int) -> dict[str, Any]:
    """The dense model and its cuts, by the weights."""
    model = model_of(layers)
    bases = find_bases(model)
    made = {"dense": model}
    for name, share in CUTS.items():
        made[name] = copy.deepcopy(model)
        apply(made[name], bases, plan_ranks(bases, Share(share), Share(share)))
    return made


def bounds(models: dict[str, Any], batch: int, tokens: int) -> dict[str, float]:
    """How many times faster each could write than the first, by the bytes of weights and cache that are read."""
    held = {name: sizes(model) for name, model in models.items()}
    moved = {n: h["bytes"] + batch * tokens * h["kv_bytes_per_token"] for n, h in held.items()}  # type: ignore[operator]
    return {name: moved["dense"] / moved[name] for name in moved}


@torch.inference_mode()
def first_tokens(model: Any, context: int) -> float:
    """Tokens a second behind a context, each at a length that this model never had."""
    ids = torch.randint(1000, (1, context), device="cuda")
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def write() -> None:
        for _ in range(NEW_TOKENS):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    return NEW_TOKENS / clocked(write)[1] * 1e3


def eager() -> dict:
    models, rows = cuts(LAYERS), []
    for context in FIRST:
        rates: Any = {name: first_tokens(model, context) for name, model in models.items()}
        rows.append({"what": "first", "context": context, "batch": 1, "rates": rates})
    for context, batch in PREFILL:
        rates = compare_throughput(models, context=context, batch=batch, new_tokens=1, repeats=REPEATS)
        rows.append({"what": "prefill", "context": context, "batch": batch, "rates": rates})
    for context, batch in DECODE:
        options: dict[str, Any] = {"new_tokens": NEW_TOKENS, "repeats": REPEATS, "decode_only": True}
        rates = compare_throughput(models, context=context, batch=batch, **options)
        bound = bounds(models, batch, context)
        rows.append({"what": "decode", "context": context, "batch": batch, "rates": rates, "bound": bound})
    cuts.cache_clear()  # or they count as held by what is measured next
    return {"layers": LAYERS, "new_tokens": NEW_TOKENS, "repeats": REPEATS, "rows": rows}


def compiled() -> dict:
    models, rows = cuts(FEWER), []
    steps = {n: torch.compile(m, mode="reduce-overhead", fullgraph=True, dynamic=False) for n, m in models.items()}
    for context, batch in (DECODE[0], DECODE[-1]):
        torch.compiler.reset()
        times = {name: partial(_token, models[name], step, context, batch) for name, step in steps.items()}
        runs = {name: make() for name, make in times.items()}
        turns = in_turns({name: lambda r=run: clocked(r)[1] for name, run in runs.items()}, 20)  # type: ignore[misc]
        middle = {name: median(turn[name] for turn in turns) for name in runs}
        ratio = {name: median(turn["dense"] / turn[name] for turn in turns) for name in runs}
        bound = bounds(models, batch, context)
        rows.append({"context": context, "batch": batch, "milliseconds": middle, "ratio": ratio, "bound": bound})
    return {"layers": FEWER, "rows": rows}


@torch.no_grad()
def _token(model: Any, step: Any, context: int, batch: int) -> Callable[[], Any]:
    """A call that writes one token behind a context of so many; compiled and warm."""
    held = StaticCache(config=model.config, max_cache_len=context + 64)
    ids = torch.randint(1000, (batch, context), device="cuda")
    model(input_ids=ids, past_key_values=held, use_cache=True, logits_to_keep=1)
    at = torch.full((batch, 1), context, device="cuda")

    @torch.no_grad()
    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return step(input_ids=ids[:, :1], position_ids=at, past_key_values=held, use_cache=True).logits

    for _ in range(4):
        run()
    return run


def tuning() -> dict:
    batch = torch.randint(1000, STEP, generator=torch.Generator().manual_seed(SEED)).cuda()
    found: dict[str, Any] = {"layers": LAYERS, "batch": STEP, "methods": {}}
    for method in ("clover", "lora", "dora"):
        free()
        torch.manual_seed(SEED)
        base = model_of()
        model, starting = clocked(partial(adapted, base, method))
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-5)

        def step(model: Any = model, optimiser: Any = optimiser) -> None:
            model(input_ids=batch, labels=batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        times = [clocked(step)[1] for _ in range(REPEATS + 2)][2:]
        found["methods"][method] = {
            "start_seconds": starting / 1e3, "step_milliseconds": median(times), "steps": times,
            "peak_bytes": torch.cuda.max_memory_allocated(), "parameters": sum(p.numel() for p in trained),
        }  # fmt: skip
        del base, model, optimiser, trained, step
    return found


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict]] = {
        "eager": eager, "pruning": pruning, "tuning": tuning, "compiled": compiled,
    }  # fmt: skip
    for name in chosen(benchmarks):
        record(f"gpu-{name}", benchmarks[name]())
