"""Which weights of a model can be tuned in their own latent space, and the decomposition that each starts from.

A *slot* is a stack of equal blocks of rows in the weight of one module: the value rows of every KV head, the key
rows, rows of an MLP projection in blocks. Each block of ``d`` rows gets one ``d x d`` core. Slots of dense and of
pruned models look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clover.decomposition.decompose import Bases, decompose, weight_gram
from clover.errors import CloverError
from clover.model.families import MLP
from clover.model.survey import block_of, is_attention

Part = Literal["qk", "q", "vo", "up", "gate"]
PARTS: tuple[Part, ...] = ("qk", "q", "vo", "up", "gate")
Read = Callable[[nn.Module], Tensor]
"""Gives the weight ``(out, in)`` of a projection, whatever it is wrapped, sharded or quantised in."""


@dataclass(frozen=True)
class Slot:
    """Blocks of rows of one weight that are tuned alike."""

    part: str
    rows: Int[Tensor, "b d"]
    partner: Callable[[Read], Float[Tensor, "b d d"]] | None = None
    """The Gram matrix of what the blocks are multiplied with, across the layer; absent for a decomposition of the
    weight alone (arXiv 2411.17426, section 3: under RoPE nothing can be moved across Q-K)."""

    def decompose(self, weight: Float[Tensor, "out in"], read: Read) -> Bases:
        """Singular values of every block, or of its product with its partner, and the directions on the block's side.

        Returns:
            ``t_a`` acts on the block's outputs, see ``decompose``; float64.
        """
        gram = weight_gram(weight[self.rows.to(weight.device)])
        if self.partner is None:
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            return decompose(gram, eye.expand_as(gram))
        return decompose(gram, self.partner(read).to(gram.device))


class _Place(NamedTuple):
    """Where heads of equal sizes stand in the weight of a module."""

    path: str
    module: nn.Module
    rows: Int[Tensor, "heads d"]
    """Of an output projection: columns."""


def _slots(q: _Place, k: _Place, v: _Place, o: _Place, crosses: bool) -> Iterator[tuple[str, Slot]]:
    """Slots of heads, by path; ``crosses``: nothing stands between queries and keys, so Q-K is one product."""
    kv = len(k.rows)
    yield q.path, Slot("q", q.rows.sort(-1).values)  # alone, any order does, and what lies in order is not gathered
    if crosses:
        yield k.path, Slot("qk", k.rows, partial(_stacked_gram, q, kv, False))
    else:
        yield k.path, Slot("qk", k.rows.sort(-1).values)
    yield v.path, Slot("vo", v.rows, partial(_stacked_gram, o, kv, True))


def _stacked_gram(place: _Place, kv: int, transposed: bool, read: Read) -> Float[Tensor, "kv d d"]:
    """Gram of all query heads of each KV head together."""
    weight = read(place.module)
    rows = (weight.T if transposed else weight)[place.rows.to(weight.device)]
    return weight_gram(rows.unflatten(0, (kv, -1)).transpose(1, 2).flatten(2))


def find_slots(model: nn.Module, block_size: int) -> dict[str, list[Slot]]:
    """Every slot of the model's known attention blocks and of the MLPs beside them, by the path of its module.

    Args:
        block_size: rows in a block of an MLP projection. One whose rows it doesn't divide has no slots yet: nobody may
            want it.
    """
    found: dict[str, list[Slot]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for path, slot in _attention(model, name, module):
            found.setdefault(path, []).append(slot)
        for path, part in _mlp(modules, name, module):
            found[path] = [Slot(part, _in_blocks(out_features(modules[path]), block_size))]
    return found


def _in_blocks(rows: int, size: int) -> Int[Tensor, "b d"]:
    """Row numbers in blocks; none where ``size`` does not divide them."""
    return torch.arange(0 if rows % size else rows).unflatten(0, (-1, size))


def rows_in_blocks(name: str, module: nn.Module, size: int) -> Slot:
    """All rows of a projection in blocks of ``size``, each decomposed alone.

    Raises:
        CloverError: ``size`` does not divide the rows.
    """
    rows = out_features(module)
    if rows % size:
        raise CloverError(
            f"{name} has {rows} rows, which blocks of {size} don't divide; choose a block_size that does "
            f"(a divisor of {rows}), or leave the module out"
        )
    return Slot("block", _in_blocks(rows, size))


def out_features(module: Any) -> int:
    """Rows of a projection; GPT-2's transposed Conv1D calls them ``nf``."""
    return module.nf if hasattr(module, "nf") else module.out_features


def in_features(module: Any) -> int:
    """Columns of a projection; GPT-2's transposed Conv1D calls them ``nx``."""
    return module.nx if hasattr(module, "nx") else module.in_features


def _attention(model: nn.Module, name: str, module: Any) -> Iterator[tuple[str, Slot]]:
    if hasattr(module, "clover"):
        yield from _pruned_attention(model, name, module)
        return
    block = block_of(model, name, module)
    if block is None or hasattr(block.core, "clover"):
        return  # the core, found on its own, speaks for the block
    paths = {m: f"{name}.{path}" for path, m in module.named_modules()}
    q, k, v = (_Place(paths[m := block.projection(which)], m, block.rows(which)) for which in "qkv")
    o = _Place("", block.projection("o"), torch.arange(len(q.rows) * v.rows.shape[1]).view(len(q.rows), -1))
    yield from _slots(q, k, v, o, crosses=not block.rotary and not block.normed)


def _pruned_attention(model: nn.Module, name: str, module: Any) -> Iterator[tuple[str, Slot]]:
    """The groups of a pruned block, each of its own size; columns lie group by group, head by head."""
    family, n = module.family, module.clover.queries
    o = model.get_submodule(f"{name.removesuffix('.' + family.core)}.{family.o}") if family.core else module.o_proj

    def rows(start: int, heads: int, size: int) -> Tensor:
        return torch.arange(start, start + heads * size).view(heads, size)

    def place(which: str, start: int, heads: int, size: int) -> _Place:
        path, inside = module.rows(which)
        return _Place(f"{name}.{path}", module.get_submodule(path), rows(inside.start + start, heads, size))

    for group, at_qk, at_v in module.clover.spans():
        kv = len(group.heads)
        q, k = place("q", n * at_qk, n * kv, group.qk), place("k", at_qk, kv, group.qk)
        v, columns = place("v", at_v, kv, group.value), rows(n * at_v, n * kv, group.value)
        yield from _slots(q, k, v, _Place("", o, columns), crosses=not module.rotary and not module.norms)


def _mlp(modules: dict[str, nn.Module], name: str, module: Any) -> Iterator[tuple[str, str]]:
    """Paths of the MLP projections beside an attention block, with their part."""
    if hasattr(module, "clover"):
        name = name.removesuffix("." + module.family.core)
    elif not is_attention(module):
        return
    parent = name.rpartition(".")[0]
    for part, paths in MLP.items():
        for path in paths:
            full = f"{parent}.{path}" if parent else path
            if full in modules:
                yield full, part
