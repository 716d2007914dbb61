"""What a recipe means to peft: CLOVER, or LoRA and its kin on the same modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from clover.errors import CloverError
from clover.model.families import WRITERS
from clover.model.traits import writes_text
from clover.tuning.config import CloverConfig
from clover.tuning.recipe import Recipe
from clover.tuning.targets import find_slots, in_features, out_features


def adapter_config(model: nn.Module, recipe: Recipe) -> PeftConfig:
    """The peft config of a recipe's method; the LoRA family gets CLOVER's modules.

    Of a model that also sees or hears, it is the part that writes: text reaches no other, and what has no gradient
    would stop processes that train together.

    Raises:
        CloverError: an unknown method, or a model without anything to tune.
    """
    recipe.check()
    task = "CAUSAL_LM" if writes_text(model) else None
    ours = CloverConfig(parts=recipe.parts, core=recipe.core, block_size=recipe.block_size, task_type=task)
    found = find_slots(model, recipe.block_size)
    writing = {name: slots for name, slots in found.items() if not WRITERS.isdisjoint(name.split("."))}
    if recipe.method == "clover" and not writing:
        return ours
    chosen = {name: [s for s in slots if s.part in recipe.parts] for name, slots in (writing or found).items()}
    chosen = {name: slots for name, slots in chosen.items() if slots}
    if not chosen:
        raise CloverError(f"{type(model).__name__} has no {' or '.join(recipe.parts)} to tune; choose other parts")
    if recipe.method == "clover":
        return replace(ours, target_modules=sorted(chosen))
    rank = recipe.rank or matching_rank(model, chosen, diagonal=recipe.core == "diagonal")
    return LoraConfig(
        r=rank, lora_alpha=rank if recipe.method == "pissa" else 2 * rank, target_modules=sorted(chosen),
        use_dora=recipe.method == "dora", init_lora_weights="pissa" if recipe.method == "pissa" else True,
        task_type=task,
    )  # fmt: skip


def matching_rank(model: nn.Module, chosen: dict[str, list[Any]], diagonal: bool = False) -> int:
    """The LoRA rank whose number of parameters on these modules is nearest to that of CLOVER's cores."""
    modules = dict(model.named_modules())
    cores = sum(s.rows.numel() * (1 if diagonal else s.rows.shape[1]) for slots in chosen.values() for s in slots)
    widths = 0
    for name in chosen:
        module: Any = modules[name]
        widths += in_features(module) + out_features(module)
    return max(1, round(cores / widths))
