"""What tuning costs: CLOVER beside LoRA, DoRA and PiSSA on the same modules with as many parameters; and its start.

    python benchmarks/tuning.py [steps] [memory] [start]     (all when left out)

steps: seconds of a training step of SmolLM2 at several batch shapes, methods in turns in one process (a ratio is the
median of those of each turn), and the bytes that a step keeps for its backward pass.
memory: most bytes that a process holds while it trains, each method in a process of its own.
start: seconds to make the cores of SmolLM2, and those of a model of LLaMA-2-7B's shape (random weights, one layer at a
time, so that it fits into memory; bfloat16).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from clover import CloverConfig
from clover.tuning.methods import adapter_config
from clover.tuning.recipe import METHODS, Recipe
from common import MODELS, SEED, chosen, in_turns, isolated, peak_memory, record, reset_peak_memory, timed

SHAPES = ((8, 128), (2, 512))
ROUNDS = 9


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODELS / "smollm2", dtype=torch.float32)


def adapted(method: str) -> Any:
    model = load()
    torch.manual_seed(SEED)
    return get_peft_model(model, adapter_config(model, Recipe(method=method))).train()


def saved_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, without the weights."""
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch).loss
    total = sum(kept.values())
    loss.backward()
    return total


def batch_of(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, (rows, tokens), generator=torch.Generator().manual_seed(SEED))
    return {"input_ids": ids, "labels": ids}


def optimiser_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def train_step(model: Any, optimiser: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    model(**batch).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def steps() -> dict:
    models = {method: adapted(method) for method in METHODS}
    result: dict[str, Any] = {
        "dtype": "float32",
        "rounds": ROUNDS,
        "trainable_parameters": {
            n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()
        },
    }
    for rows, tokens in SHAPES:
        batch = batch_of(rows, tokens)
        optimisers = {name: optimiser_of(model) for name, model in models.items()}

        def step(name: str, batch: dict = batch, optimisers: dict = optimisers) -> float:
            return timed(partial(train_step, models[name], optimisers[name], batch))[1]

        calls: dict[str, Callable[[], float]] = {n: lambda n=n: step(n) for n in models}  # type: ignore[misc]
        turns = in_turns(calls, ROUNDS)
        kept = {n: saved_bytes(m, batch) for n, m in models.items()}
        result[f"{rows} x {tokens}"] = {
            n: {
                "seconds": median(turn[n] for turn in turns),
                "time_over_lora": median(turn[n] / turn["lora"] for turn in turns),
                "saved_bytes": kept[n], "memory_over_lora": kept[n] / kept["lora"],
            } for n in models
        }  # fmt: skip
    return result


def peak(method: str, rows: int, tokens: int) -> dict[str, int]:
    """Bytes that this process holds when all is there that lasts, and the most during a step of training."""
    model = adapted(method)
    optimiser = optimiser_of(model)
    train_step(model, optimiser, batch_of(1, 8))  # makes the optimiser's state
    gc.collect()
    before = reset_peak_memory()
    train_step(model, optimiser, batch_of(rows, tokens))
    return {"before_bytes": before, "peak_bytes": peak_memory()}


def memory() -> dict:
    rows, tokens = SHAPES[0]
    found = {method: isolated(peak, method, rows, tokens) for method in METHODS}
    lora = found["lora"]["peak_bytes"]
    methods = {name: bytes_ | {"over_lora": bytes_["peak_bytes"] / lora} for name, bytes_ in found.items()}
    return {"dtype": "float32", f"{rows} x {tokens}": methods}


def start() -> dict:
    torch.manual_seed(SEED)
    small = timed(partial(get_peft_model, load(), CloverConfig()))[1]
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32,
        num_hidden_layers=1, vocab_size=32,
    )  # fmt: skip
    layers = []
    for _ in range(3):
        gc.collect()
        with torch.device("cpu"):
            layer = LlamaForCausalLM(config).to(torch.bfloat16)
        layers.append(timed(partial(get_peft_model, layer, CloverConfig()))[1])
    return {
        "smollm2_seconds": small,
        "llama_2_7b_layer_seconds": layers,
        "llama_2_7b_seconds": 32 * sorted(layers)[1],
        "llama_2_7b": "32 times the median of three layers of its shape",
    }


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict]] = {"steps": steps, "memory": memory, "start": start}
    for name in chosen(benchmarks):
        record(f"tuning-{name}", benchmarks[name]())
