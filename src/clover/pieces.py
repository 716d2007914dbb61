"""A model that is never whole in memory: its shape without weights, and one attention block at a time with them."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clover.basis import Basis
from clover.block import Block
from clover.checkpoint import blank, workplace
from clover.errors import CloverError
from clover.families import blocks
from clover.plan import BlockPlan
from clover.shards import DTYPES, Checkpoint
from clover.surgery import filled


@dataclass(frozen=True)
class Pieces:
    """A checkpoint beside its model on the meta device."""

    source: Checkpoint
    model: PreTrainedModel
    names: Mapping[str, str]
    """Names of the model's tensors -> names in the checkpoint."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Pieces:
        """Match a folder's tensors with the model that its config describes.

        Raises:
            CloverError: no model there that can be streamed; a tensor is missing or has another shape than the config
                says.
        """
        source = Checkpoint.open(folder)
        floats = [DTYPES[e.dtype] for e in source.entries.values() if e.dtype in DTYPES]
        model = blank(folder, next((d for d in floats if d.is_floating_point), torch.float32))
        if getattr(model.config, "quantization_config", None) is not None:
            raise CloverError(f"{folder} is quantised; prune the unquantised model, then quantise it")
        names = _match(model, source)
        pieces = cls(source, model, names)
        pieces._check()
        return pieces

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """Every tensor of the model, on the meta device."""
        return self.model.state_dict()

    def blocks(self, part: str) -> list[Block]:
        """The attention blocks of a part, without weights. See ``families.blocks``."""
        return blocks(self.model, part)

    def fill(self, name: str, module: nn.Module | None = None) -> nn.Module:
        """A copy of a module of the model, with its weights, ready to be computed with (as ``checkpoint.ready``)."""
        filled = copy.deepcopy(self.model.get_submodule(name) if module is None else module)
        for path, part in filled.named_modules():
            self._load(f"{name}.{path}".rstrip("."), part)
        return filled

    def shell(self, layers: Iterable[str]) -> PreTrainedModel:
        """A copy of the model with the weights that lie outside the layers, save those behind them."""
        shell, inside = copy.deepcopy(self.model), tuple(f"{layer}." for layer in layers)
        head = shell.get_output_embeddings()
        for name, module in shell.named_modules():
            if not f"{name}.".startswith(inside) and module is not head:
                self._load(name, module)
        return shell

    def real(self, block: Block) -> Block:
        """A block with its weights."""
        return replace(block, module=self.fill(block.name, block.module))

    def _load(self, name: str, module: nn.Module) -> None:
        """Give the tensors of a module, but not of its children, their values."""
        device, dtype = workplace(self.model.dtype)
        prefix = f"{name}." if name else ""
        fresh = False
        for tensors in (vars(module)["_parameters"], vars(module)["_buffers"]):
            for key, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                source = self._source(prefix + key)
                if source is None:  # a buffer that no checkpoint holds, such as frequencies of positions
                    value, fresh = torch.empty_like(tensor, device=device), True
                else:
                    value = self.source.read(source).to(tensor.dtype)
                    value = value.to(device, dtype if value.is_floating_point() else value.dtype)
                value = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                vars(value)["_is_hf_initialized"] = source is not None
                tensors[key] = value
        if fresh:
            self.model._init_weights(module)

    def _source(self, key: str) -> str | None:
        """Where the checkpoint holds a tensor of the model."""
        return self.names.get(key) or self.names.get(self.model.all_tied_weights_keys.get(key, ""))

    def inside(self, block: Block) -> tuple[str, ...]:
        """What the names in the model of all that a cut of the block takes the place of begin with."""
        return f"{block.core_name}.", f"{block.name}.{block.family.o}."

    def home(self, block: Block) -> str:
        """The file that holds the block's output projection."""
        return self.source.entries[self.names[f"{block.name}.{block.family.o}.weight"]].file.name

    def _check(self) -> None:
        tied, ignored = self.model.all_tied_weights_keys, self.model._keys_to_ignore_on_load_missing or ()
        for key, tensor in self.shapes.items():
            if key not in self.names:
                if key in tied or any(re.search(pattern, key) for pattern in ignored):
                    continue
                raise CloverError(f"{self.source.folder} has no tensor for {key}; restore the files")
            entry = self.source.entries[self.names[key]]
            if entry.shape != tuple(tensor.shape):
                raise CloverError(
                    f"{self.names[key]} has shape {entry.shape}, but config.json gives {tuple(tensor.shape)}; "
                    "restore the files"
                )


def _match(model: PreTrainedModel, source: Checkpoint) -> dict[str, str]:
    """The model's names of the checkpoint's tensors, by the renamings that transformers loads with."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    others = [c for c in conversions if not isinstance(c, WeightRenaming)]
    names: dict[str, str] = {}
    shapes = model.state_dict()
    for name in source.entries:
        key, converted = rename_source_key(name, renamings, others, model.base_model_prefix, shapes)
        if converted is not None:
            raise CloverError(f"{name} in {source.folder} is in an old layout; load and save the model once")
        names[key] = name
    return names


@torch.no_grad()
def cut(block: Block, basis: Basis, plan: BlockPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a block's cut, by their names in the model.

    Raises:
        CloverError: the cut is not finite in that dtype.
    """
    attention, output = filled(block, basis, plan)
    made: dict[str, nn.Module] = {block.core_name: attention}
    if output is not None:
        made[f"{block.name}.{block.family.o}"] = output
    state = {f"{name}.{key}": t for name, m in made.items() for key, t in m.to(dtype).state_dict().items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise CloverError(f"{name} overflows {dtype}; save the model in float32 or bfloat16 first")
    return state
