"""What the peers of this project ask of the calibration data, gathered in the same pass as this project's own moments.

    with watching(model, found) as facts:
        bases = find_bases(model, calibration=batches)
    facts[0].input ...

Hooks only: whoever runs the model with gradients inside the block feeds every method the same tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clover.model.block import Block
from clover.model.heads import Heads


@dataclass
class Facts:
    """Sums over the calibration tokens of one block: products in float32, sums in float64. Nothing is centred."""

    block: Block
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def heads(self) -> Heads:
        """The block's weights, float64."""
        return self.block.heads().map(lambda t: t.detach().double())

    def mean(self, name: str) -> Tensor:
        """Mean of what was added under a name, second moments unless it says otherwise.

        ``input`` and ``source``: what Q and what K and V read. ``query``, ``key`` (behind the rotation) and ``value``:
        per head. ``output``: head outputs in front of W_o; ``output_mean``: their mean. ``k_fisher``, ``v_fisher``:
        squared gradient of the weights, summed over entries. ``influence``: 1 - cosine of a layer's input and output.
        """
        return self.sums[name] / self.counts[name]

    def add(self, name: str, value: Tensor, count: int) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.double()
        self.counts[name] += count


@contextmanager
def watching(model: nn.Module, found: Sequence[Block]) -> Iterator[list[Facts]]:
    """Facts of the blocks, filled by every forward pass (and backward pass, for the gradients) in the context."""
    facts = [Facts(block) for block in found]
    hooks = [hook for f in facts for hook in _attach(model, f)]
    try:
        yield facts
    finally:
        for hook in hooks:
            hook.remove()


def _attach(model: nn.Module, facts: Facts) -> list[Any]:
    block = facts.block
    layer = model.get_submodule(block.name.rpartition(".")[0])
    hooks = [
        block.core.register_forward_pre_hook(
            lambda _, a, k: _projections(facts, block.arguments(a, k)), with_kwargs=True
        ),
        block.projection("o").register_forward_pre_hook(lambda _, a: _outputs(facts, a[0])),
        layer.register_forward_hook(lambda _, a, k, out: _influence(facts, a, k, out), with_kwargs=True),
    ]
    return hooks + [block.projection(w).register_forward_hook(_fisher(facts, w)) for w in "kv"]


@torch.no_grad()
def _projections(facts: Facts, call: dict[str, Any]) -> None:
    heads = facts.block.heads()
    x = call["hidden_states"]
    source = x if call.get("key_value_states") is None else call["key_value_states"]
    table = [t.float() for t in call.get("position_embeddings", ())]
    q = _project(heads.q.flatten(0, 1), None if heads.q_bias is None else heads.q_bias.flatten(0, 1), x)
    k, v = _project(heads.k, heads.k_bias, source), _project(heads.v, heads.v_bias, source)
    if heads.rotary:
        q, k = (_turn(t, *table) for t in (q, k))
    for name, t in (("query", q.unflatten(1, heads.q.shape[:2])), ("key", k), ("value", v)):
        facts.add(name, (t.mT @ t).sum(0), t.shape[0] * t.shape[-2])
    for name, t in (("input", x), ("source", source)):
        t = t.flatten(0, 1).float()
        facts.add(name, t.T @ t, len(t))


def _project(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """``(batch, heads, tokens, d)``."""
    y = x.float().unsqueeze(1) @ weight.float().mT
    return y if bias is None else y + bias.float().unsqueeze(1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]
    re, im = x[..., :width].chunk(2, -1)
    return torch.cat([x[..., :width] * cos + torch.cat([-im, re], -1) * sin, x[..., width:]], -1)


@torch.no_grad()
def _outputs(facts: Facts, z: Tensor) -> None:
    z = z.flatten(2).flatten(0, 1).float()
    facts.add("output", z.T @ z, len(z))
    facts.add("output_mean", z.sum(0), len(z))


@torch.no_grad()
def _influence(facts: Facts, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    before = args[0] if args else kwargs["hidden_states"]
    after = out[0] if isinstance(out, tuple) else out
    similar = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    facts.add("influence", (1 - similar).sum(), similar.numel())


def _fisher(facts: Facts, which: str) -> Any:
    """Diagonal Fisher information of a projection's weight, summed over its entries, one gradient a batch."""

    def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
        if not output.requires_grad and torch.is_grad_enabled():
            output.requires_grad_()  # the first block's: nothing before it is trained
        x = args[0].flatten(0, 1)

        def add(gradient: Tensor) -> None:
            rows = gradient.flatten(0, 1)[:, facts.block.rows(which).flatten()]
            facts.add(f"{which}_fisher", (rows.T.float() @ x.float()).square().sum(), 1)

        if output.requires_grad:
            output.register_hook(add)

    return hook
