"""Put rewritten attention into a model: everything is checked and computed first, then installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from clover.attention.attention import CloverAttention
from clover.errors import CloverError
from clover.model.block import Block
from clover.model.heads import Heads, finite
from clover.model.survey import survey
from clover.planning.plan import BlockPlan, Plan
from clover.pruning.basis import Basis

HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name)


@torch.no_grad()
def operate(model: nn.Module, bases: Sequence[Basis], plan: Plan) -> None:
    """Replace the blocks of ``bases`` by their cuts, in place. Nothing is installed unless all can be.

    Raises:
        CloverError: the plan names other blocks or sizes that they don't have, or a cut is not finite in the model's
            dtype.
    """
    remedy = "make it by plan_ranks from the same bases, or correct it"
    plan.check(remedy)
    if [b.name for b in bases] != [p.name for p in plan.blocks]:
        raise CloverError("the plan was made for other blocks than those to cut; make it from the same model and part")
    # Of this very model, which may be a copy of the one measured.
    here = {block.name: block for block in survey(model)[0]}
    if missing := [b.name for b in bases if b.name not in here]:
        raise CloverError(
            f"{type(model).__name__} has no block {missing[0]}; cut the model that the bases were found in"
        )
    for basis, block_plan in zip(bases, plan.blocks, strict=True):
        check_fit(basis.block, basis.heads, block_plan, remedy)
        if block_plan.output_bias != basis.output_bias:
            raise CloverError(f"the plan of {basis.name} has output_bias {block_plan.output_bias}; {remedy}")
    ready = [
        (here[b.name], filled(here[b.name], b, block_plan)) for b, block_plan in zip(bases, plan.blocks, strict=True)
    ]
    for block, made in ready:
        install(model, block, made)


def check_fit(block: Block, heads: Heads, plan: BlockPlan, remedy: str) -> None:
    """Refuse a plan of another block, whatever it is called.

    Args:
        heads: of the block.
        remedy: what the user is told to do.

    Raises:
        CloverError: the part, the sizes or what is kept are not those of the block.
    """
    kv, n, d, _ = heads.q.shape
    e = heads.v.shape[1]
    if (plan.kv_heads, plan.queries, plan.qk, plan.vo) != (kv, n, d, e):
        raise CloverError(
            f"the plan of {plan.name} is for {plan.kv_heads} x {plan.queries} heads of {plan.qk} and {plan.vo}, but "
            f"the model has {kv} x {n} of {d} and {e}; {remedy}"
        )
    if plan.part != block.part:  # which says whether its attention is causal
        raise CloverError(f"the plan has {plan.name} in part {plan.part!r}, but it is in part {block.part!r}; {remedy}")
    pairs, plain = heads.pairs, d - 2 * heads.pairs
    for group in plan.groups:
        whole = (group.pairs, group.plain) == (pairs, plain)
        if group.pairs > pairs or group.plain > plain or (block.normed and not whole):
            raise CloverError(
                f"the plan keeps {group.pairs} pairs and {group.plain} other Q-K directions of {plan.name}, which has "
                f"{pairs} and {plain}{', none of which can go' if block.normed else ''}; {remedy}"
            )


@torch.no_grad()
def filled(block: Block, basis: Basis, plan: BlockPlan) -> dict[str, nn.Module]:
    """What takes the place of a block, as ``skeleton``, with the weights of its cut.

    Raises:
        CloverError: the cut is not finite in the block's dtype.
    """
    made: dict[str, Any] = skeleton(block, plan)
    made[block.core_name].fill(basis.cut(plan), made.get(block.output_name))
    for name, module in made.items():
        for inside, parameter in module.named_parameters():
            if not finite(parameter):
                raise CloverError(f"{name}.{inside} overflows {parameter.dtype}; load the model in float32 or bfloat16")
    return made


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


def skeleton(block: Block, plan: BlockPlan) -> dict[str, nn.Module]:
    """What takes a block's place, by name, weights not yet set: attention, and its output where that lies outside."""
    weight: Any = block.projection("o").weight
    kind: Any = type(block.core)
    attention = attention_class(kind)(block, plan, weight.dtype, weight.device)
    attention.train(block.core.training).requires_grad_(weight.requires_grad)
    # How transformers initialises the original class is not true of this one, whose weights all come from elsewhere.
    vars(attention)["_is_hf_initialized"] = True
    if not block.family.core:
        return {block.core_name: attention}
    sizes = plan.queries * plan.vo_kept, block.heads().o.shape[-2]
    kwargs = {"bias": plan.output_bias, "dtype": weight.dtype, "device": weight.device}
    output = nn.utils.skip_init(nn.Linear, *sizes, **kwargs).requires_grad_(weight.requires_grad)
    return {block.core_name: attention, block.output_name: output}


def install(model: nn.Module, block: Block, made: Mapping[str, nn.Module], prefix: str = "") -> None:
    """Swap the modules in; hooks of the attention that goes move over. ``prefix`` is the model's own name in theirs."""
    for kind in HOOKS:
        setattr(made[block.core_name], kind, getattr(block.core, kind))  # themselves, so that their handles remove them
    for name, module in made.items():
        model.set_submodule(name.removeprefix(prefix), module)


def rewritten(block: nn.Module) -> CloverAttention:
    """The attention of a rewritten block, be it the block itself."""
    return next(module for module in block.modules() if isinstance(module, CloverAttention))
