"""What a model must be to be worked on and saved: one of transformers itself, and the one that its plan is of."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from clover.attention.attention import CloverAttention
from clover.errors import CloverError

INSIDE = {
    "OptimizedModule": "its _orig_mod, and compile what comes out",
    "DataParallel": "its module",
    "DistributedDataParallel": "its module",
    "FullyShardedDataParallel": "its module",
}
"""Wrappers, by the names of their classes -> what to give instead. Those of peft have names without end."""
HOMES = "transformers.models."
"""What the names of modules begin with that hold a family's config and models."""


def check_model(model: Any) -> None:
    """Refuse what only wraps a model, or is none of transformers'.

    Raises:
        CloverError: it names the class and what to give instead.
    """
    if isinstance(model, PreTrainedModel):
        if getattr(model, "_compiled_call_impl", None) is not None:
            raise CloverError(f"this {type(model).__name__} was compiled; compile what comes out instead")
        if model.device.type == "mps":
            raise CloverError("MPS knows no float64, in which heads are decomposed; move the model to the CPU first")
        return
    kind = type(model)
    if kind.__module__.partition(".")[0] == "peft":
        instead = "what its merge_and_unload() returns"
    else:
        instead = INSIDE.get(kind.__name__, "the model of transformers itself")
    raise CloverError(f"{kind.__name__} is no model of transformers; give {instead}")


def check_own(model: PreTrainedModel) -> None:
    """Refuse a model whose rewritten blocks are not those of the plan in its config: its folder could not be loaded.

    Raises:
        CloverError: a part of the model was rewritten by itself, or the model is a part of one that was.
    """
    here, there = rewritten_names(model), planned(model)
    if here == there:
        return
    kind = type(model).__name__
    for name, module in model.named_modules():
        own = planned(module) if name and isinstance(module, PreTrainedModel) else None
        if own and own == rewritten_names(module):
            alone = f", or save its {name} by itself" if is_public(module) else ""
            raise CloverError(
                f"of this {kind} only {name} was pruned, and a part has no place in the plan of the whole; prune the "
                f"whole model with part=...{alone}"
            )
    if here:
        raise CloverError(f"this {kind} is a part of a pruned model, which has the plan; save that model whole")
    raise CloverError(
        f"the config of this {kind} has a plan for {min(there)}, which was not rewritten; make the model from the "
        "config of an unpruned one, or load the pruned one"
    )


def stock(name: str, config: type[PreTrainedConfig]) -> Any:
    """What transformers calls by that name (without our prefix), at its top or beside a family's models; or None."""
    name = name.removeprefix("Clover")
    if (found := getattr(transformers, name, None)) is not None:
        return found
    for kind in config.__mro__:
        if kind.__module__.startswith(HOMES):
            home = kind.__module__.replace(".configuration_", ".modeling_")
            return getattr(importlib.import_module(home), name, None) if find_spec(home) else None
    return None


def is_public(model: nn.Module) -> bool:
    """Whether a config can name the class: one of transformers."""
    config: Any = model.config
    return stock(type(model).__name__, type(config)) is not None


def rewritten_names(model: nn.Module) -> set[str]:
    """The names of the blocks that were rewritten, without those that wrappers of modules (FSDP) put in between."""
    paths = (
        name.removesuffix(f".{module.family.core}") if module.family.core else name
        for name, module in model.named_modules()
        if isinstance(module, CloverAttention)
    )
    return {".".join(part for part in path.split(".") if not part.startswith("_")) for path in paths}


def planned(model: PreTrainedModel) -> set[str]:
    """The names of the blocks in the plan of a model's config."""
    plan = getattr(model.config, "clover", None) or {}
    return {block["name"] for block in plan.get("blocks", ())}
