"""Put rewritten attention into a model: everything is checked and computed first, then installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from clover.attention import CloverAttention
from clover.basis import Basis
from clover.block import Block
from clover.errors import CloverError
from clover.families import blocks
from clover.heads import finite
from clover.plan import BlockPlan, Plan


@torch.no_grad()
def operate(model: nn.Module, bases: Sequence[Basis], plan: Plan) -> None:
    """Replace the blocks of ``bases`` by their cuts, in place. Nothing is installed unless all can be.

    Raises:
        CloverError: the plan names other blocks, or a cut is not finite in the model's dtype.
    """
    if [b.name for b in bases] != [p.name for p in plan.blocks]:
        raise CloverError("the plan was made for other blocks than those to cut; make it from the same model and part")
    here = {block.name: block for block in blocks(model)}  # of this very model, which may be a copy of the one measured
    if missing := [b.name for b in bases if b.name not in here]:
        raise CloverError(
            f"{type(model).__name__} has no block {missing[0]}; cut the model that the bases were found in"
        )
    ready = [
        (here[b.name], filled(here[b.name], b, block_plan)) for b, block_plan in zip(bases, plan.blocks, strict=True)
    ]
    for block, (attention, output) in ready:
        install(model, block, attention, output)


@torch.no_grad()
def filled(block: Block, basis: Basis, plan: BlockPlan) -> tuple[CloverAttention, nn.Linear | None]:
    """The module for a block with its cut weights, and the output projection where it lives outside of it.

    Raises:
        CloverError: the cut is not finite in the block's dtype.
    """
    attention, output = skeleton(block, plan)
    attention.fill(basis.cut(plan), output)
    named = dict(attention.named_parameters()) | {f"o_proj.{n}": p for n, p in _parameters(output)}
    for name, parameter in named.items():
        if not finite(parameter):
            raise CloverError(
                f"{basis.name}: {name} overflows {parameter.dtype}; load the model in float32 or bfloat16"
            )
    return attention, output


@cache
def attention_class(kind: Any) -> Any:
    """The rewritten module's class: whatever looks for the original one (output recorders, device maps) finds it."""
    return type(f"Clover{kind.__name__}", (CloverAttention, kind), {"__reduce__": _reduced, "__module__": __name__})


def _reduced(attention: nn.Module) -> tuple:
    """How to make it anew, for pickle and copies: its class is made here and has no place of its own."""
    return _empty, (type(attention).__bases__[1],), vars(attention)


def _empty(kind: type) -> nn.Module:
    made = attention_class(kind)
    return made.__new__(made)


def _parameters(module: nn.Module | None) -> Iterable[tuple[str, nn.Parameter]]:
    return () if module is None else module.named_parameters()


def skeleton(block: Block, plan: BlockPlan) -> tuple[CloverAttention, nn.Linear | None]:
    """The module for a block, weights not yet set, and the output projection where it lives outside of it."""
    weight: Any = block.projection("o").weight
    kind: Any = type(block.core)
    attention = attention_class(kind)(block, plan, weight.dtype, weight.device)
    attention.train(block.core.training).requires_grad_(weight.requires_grad)
    # How transformers initialises the original class is not true of this one, whose weights all come from elsewhere.
    vars(attention)["_is_hf_initialized"] = True
    if not block.family.core:
        return attention, None
    sizes = plan.queries * plan.vo_kept, block.heads().o.shape[-2]
    kwargs = {"bias": plan.output_bias, "dtype": weight.dtype, "device": weight.device}
    return attention, nn.utils.skip_init(nn.Linear, *sizes, **kwargs).requires_grad_(weight.requires_grad)


def install(model: nn.Module, block: Block, attention: CloverAttention, output: nn.Linear | None) -> None:
    """Swap the module in; hooks of the one it replaces move over."""
    attention._forward_hooks.update(block.core._forward_hooks)
    attention._forward_pre_hooks.update(block.core._forward_pre_hooks)
    attention._forward_hooks_with_kwargs.update(block.core._forward_hooks_with_kwargs)
    attention._forward_pre_hooks_with_kwargs.update(block.core._forward_pre_hooks_with_kwargs)
    if output is not None:
        model.set_submodule(f"{block.name}.{block.family.o}", output)
    model.set_submodule(block.core_name, attention)
