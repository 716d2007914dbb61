"""A basis and the costs of its directions as plain tensors, which a safetensors file can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clover.decomposition.decompose import Bases
from clover.model.block import Block
from clover.planning.budget import Costs
from clover.pruning.basis import Basis

COSTS = "costs."


def pack(basis: Basis) -> dict[str, Tensor]:
    """A basis without its weights and moments."""
    packed: dict[str, Tensor] = {}
    for name, value in vars(basis).items():
        if isinstance(value, Tensor):
            packed[name] = value
        elif isinstance(value, Bases):
            packed |= {f"{name}.{key}": tensor for key, tensor in value._asdict().items()}
    return packed


def unpack(block: Block, packed: Mapping[str, Tensor]) -> Basis:
    """The basis again, beside the block that it is of; without moments."""
    heads = block.heads().map(Tensor.detach)
    here = {key: tensor.to(heads.q.device) for key, tensor in packed.items() if not key.startswith(COSTS)}
    values: dict[str, Any] = {key: tensor for key, tensor in here.items() if "." not in key}
    for name in {key.partition(".")[0] for key in here if "." in key}:
        values[name] = Bases(*(here[f"{name}.{key}"] for key in Bases._fields))
    return Basis(block, heads, None, **values)


def pack_costs(costs: Costs) -> dict[str, Tensor]:
    """What the directions of a block cost; all that is no tensor becomes one of JSON's bytes."""
    tensors = {COSTS + key: value for key, value in vars(costs).items() if isinstance(value, Tensor)}
    others = {key: value for key, value in vars(costs).items() if not isinstance(value, Tensor)}
    return tensors | {COSTS: torch.tensor(list(json.dumps(others).encode()), dtype=torch.uint8)}


def unpack_costs(packed: Mapping[str, Tensor]) -> Costs:
    """What ``pack_costs`` packed."""
    others: dict[str, Any] = json.loads(bytes(packed[COSTS].tolist()))
    tensors = {k.removeprefix(COSTS): t for k, t in packed.items() if k.startswith(COSTS) and k != COSTS}
    return Costs(**others | tensors)
