"""A rewritten model in the stock architecture again: what was cut becomes zeros, and any runtime can read it.

This saves nothing. It is for places that know neither this project nor heads of unequal size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from clover.attention.attention import CloverAttention
from clover.errors import CloverError, UnsupportedModelError
from clover.model.block import Block, norm_entries
from clover.model.survey import survey
from clover.planning.plan import Group, Plan
from clover.pruning.prune import plan_of
from clover.pruning.surgery import rewritten


@torch.no_grad()
def pad(model: PreTrainedModel) -> PreTrainedModel:
    """A new model of the original class that computes what the rewritten one does.

    Args:
        model: pruned or orthogonalised; it stays as it is.

    Returns:
        The same dtype and device, the original number of parameters (plus biases, where the class has a switch for them
        and the plan needs one).

    Raises:
        CloverError: ``model`` was not rewritten by clover.
        UnsupportedModelError: the class has no bias that could take up the mean of what was cut.
    """
    plan = plan_of(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise CloverError(
            f"{type(model).__name__} is quantised; export the unquantised model, then quantise the result"
        )
    stock = _stock(model, plan)
    here = {block.name: block for block in survey(stock)[0]}
    cut = [here[b.name] for b in plan.blocks]
    replaced = tuple(name for b in cut for name in b.replaced)
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith(replaced)}
    missing = [k for k in stock.load_state_dict(rest, strict=False).missing_keys if not k.startswith(replaced)]
    if missing:
        raise CloverError(f"the rewritten model lacks {missing[0]}; load it again from its folder")
    for block in cut:
        _fill(block, model.get_submodule(block.name))
    stock.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return stock.eval()


def _stock(model: Any, plan: Plan) -> PreTrainedModel:
    """A model of the original class and sizes, its weights not yet set."""
    kind: Any = type(model).__bases__[1]
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    config.__class__ = type(model.config).__bases__[1]
    del config.clover
    for block in plan.blocks:
        # The switch is in the config that the block was made from: of a vision-language model one inside the whole.
        part = copies.get(id(rewritten(model.get_submodule(block.name)).config), config)
        if block.output_bias and getattr(part, "attention_bias", None) is False:
            part.attention_bias = True
    weight = next(model.parameters())
    return kind._from_config(config, dtype=weight.dtype).to(weight.device)


def _fill(block: Block, holder: nn.Module) -> None:
    """Set all weights of a stock block from those of a rewritten one."""
    attention = rewritten(holder)
    plan, n = attention.clover, attention.clover.queries
    output: Any = holder.get_submodule(block.family.o) if block.family.core else attention.o_proj
    _give_back(block, attention)
    wide = {which: _Wide(block, which) for which in ("q", "k", "v", "o")}
    o = wide["o"].weight.new_zeros(plan.kv_heads, n, plan.vo, wide["o"].weight.shape[0])
    for group, at_qk, at_v in plan.spans():
        kv = len(group.heads)
        for which, each, start, size in (("q", n, at_qk, group.qk), ("k", 1, at_qk, group.qk),
                                         ("v", 1, at_v, group.value)):  # fmt: skip
            path, inside = attention.rows(which)
            source: Any = attention.get_submodule(path)
            rows = slice(inside.start + each * start, inside.start + each * (start + kv * size))
            places = torch.arange(size).expand(kv, size)
            if which != "v" and attention.rotary:
                places = _places(attention, group, at_qk)
            heads = torch.tensor([h * each + i for h in group.heads for i in range(each)])
            wide[which].put(
                heads, places.repeat_interleave(each, 0), source.weight[rows],
                None if source.bias is None else source.bias[rows],
            )  # fmt: skip
        columns = output.weight[:, n * at_v : n * (at_v + kv * group.value)]
        o[list(group.heads), :, : group.value] = columns.T.view(kv, n, group.value, -1)
    kept = {h: group.value for group in plan.groups for h in group.heads}
    free = next(((h, plan.vo - 1) for h in range(plan.kv_heads) if kept.get(h, 0) < plan.vo), None)
    if output.bias is not None and not wide["o"].take_bias(output.bias):
        _constant(block, output.bias, wide["v"], o, free)
    wide["o"].weight.copy_(o.flatten(0, 2).T)


def _give_back(block: Block, attention: CloverAttention) -> None:
    """Set what a rewritten block took over as it was."""
    order = dict(zip(attention.norms, attention.head_order(), strict=False))
    stock = dict(block.core.named_parameters())
    for name, value in attention.named_parameters():
        owner = name.partition(".")[0]
        if owner in order:
            entries = norm_entries(stock[name], order[owner], block)
            stock[name].view(-1, attention.clover.qk)[entries] = value.view(-1, attention.clover.qk)
        elif owner in (block.family.sinks, block.family.position_bias, *block.family.kept):
            stock[name].copy_(value)
    if attention.beside:
        block.queries_beside()[attention.head_order()[0]] = attention.queries_beside()


def _places(attention: CloverAttention, group: Group, start: int) -> Int[Tensor, "kv size"]:
    """Where the columns of a group's queries and keys stand in a stock head: pairs half a head apart, then the rest."""
    kv, size, half = len(group.heads), group.qk, attention.rotary // 2
    keys = attention.frequencies[attention.clover.queries * attention.clover.qk_kept // 2 :]
    pairs = keys[start // 2 : (start + kv * size) // 2].view(kv, size // 2).long().cpu()
    turns = pairs < half
    rest = 2 * ((~turns).cumsum(1) - 1) + 2 * half
    first, second = torch.where(turns, pairs, rest), torch.where(turns, pairs + half, rest + 1)
    return torch.stack([first, second], -1).flatten(1)


class _Wide:
    """One projection of a stock block, its rows by head."""

    def __init__(self, block: Block, which: str) -> None:
        module: Any = block.projection(which)
        self.weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        self.bias = module.bias
        self.rows = None if which == "o" else block.rows(which)
        rows = slice(None) if self.rows is None else self.rows.flatten()
        self.weight[rows] = 0
        if self.bias is not None:
            self.bias[rows] = 0

    def put(
        self,
        heads: Int[Tensor, " b"],
        places: Int[Tensor, "b size"],
        weight: Float[Tensor, "r n"],
        bias: Float[Tensor, " r"] | None,
    ) -> None:
        """Set rows ``places`` of ``heads``; the others stay zero."""
        assert self.rows is not None
        rows = self.rows[heads].gather(1, places).flatten().to(weight.device)
        self.weight[rows] = weight
        if bias is not None and self.bias is not None:
            self.bias[rows] = bias

    def take_bias(self, bias: Float[Tensor, " out"]) -> bool:
        """Set the bias of an output projection, if it has one."""
        if self.bias is not None:
            self.bias.copy_(bias)
        return self.bias is not None


def _constant(
    block: Block, bias: Float[Tensor, " out"], v: _Wide, o: Float[Tensor, "kv n e out"], free: tuple[int, int] | None
) -> None:
    """Let attention itself produce a constant: a value that is always 1 comes out as 1, where its weights sum to 1.

    Raises:
        UnsupportedModelError: values have no bias, sinks take weight, or no column is free.
    """
    if v.bias is None or v.rows is None or block.sinks is not None:
        raise UnsupportedModelError(
            f"{type(block.module).__name__} has no bias for the mean of what was cut from {block.name}; "
            "prune it by the weights alone, or keep the rewritten model"
        )
    if free is None:
        raise UnsupportedModelError(
            f"{block.name} keeps all its V-O directions, so none is free for the constant of its values; prune V-O too"
        )
    head, column = free
    v.bias[v.rows[head, column]] = 1
    o[head, 0, column] = bias
