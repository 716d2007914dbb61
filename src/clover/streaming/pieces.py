"""A model that is never whole in memory: its shape without weights, and one attention block at a time with them."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from clover.errors import CloverError, reason
from clover.model.block import Block
from clover.model.heads import finite
from clover.model.precision import workplace
from clover.planning.plan import BlockPlan
from clover.pruning.basis import Basis
from clover.pruning.checkpoint import blank
from clover.pruning.surgery import filled
from clover.streaming.shards import DTYPES, Checkpoint, Entry


@dataclass(frozen=True)
class Merged:
    """One tensor of the model that the checkpoint holds in parts, such as the weights of a layer's experts."""

    converter: WeightConverter
    parts: dict[str, tuple[str, str]]
    """Name of a part in what is written -> its name in the checkpoint, and the converter's pattern that it matches."""

    def value(self, key: str, read: Callable[[str], Tensor], model: PreTrainedModel) -> Tensor:
        """The tensor, put together as transformers does; ``key`` is its name in the model."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.parts.values():
            converter.add_tensor(key, name, pattern, read(name))
        return converter.convert(key, model=model, config=model.config)[key]


@dataclass(frozen=True)
class Pieces:
    """A checkpoint beside its model on the meta device."""

    source: Checkpoint
    model: PreTrainedModel
    names: Mapping[str, str]
    """Names of the model's tensors -> names in the checkpoint."""
    merged: Mapping[str, Merged]
    """Names of those that are made of several in the checkpoint."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Pieces:
        """Match a folder's tensors with the model that its config describes.

        Raises:
            CloverError: no model there that can be streamed; a tensor is missing or has another shape than the config
                says.
        """
        source = Checkpoint.open(folder)
        # As transformers finds the dtype of a model whose config has none: of the first file, the first by name.
        in_order = sorted(source.entries.items(), key=lambda item: (item[1].file, item[0]))
        floats = (DTYPES[entry.dtype] for _, entry in in_order if entry.dtype in DTYPES)
        model = blank(folder, next((d for d in floats if d.is_floating_point), torch.float32))
        if getattr(model.config, "quantization_config", None) is not None:
            raise CloverError(f"{folder} is quantised; prune the unquantised model, then quantise it")
        pieces = cls(source, model, *_match(model, source))
        pieces._check()
        pieces._untie()
        return pieces

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """Every tensor of the model, on the meta device."""
        return self.model.state_dict()

    def fill(self, name: str) -> nn.Module:
        """A copy of a module of the model, with its weights, ready to be computed with (as ``precision.ready``)."""
        filled = copy.deepcopy(self.model.get_submodule(name))
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

    def expect(self, block: Block) -> None:
        """Let the system read a block's files ahead, while something else is computed."""
        for key, name in self.names.items():
            if key.startswith(block.replaced):
                self.source.entries[name].expect()

    def real(self, block: Block) -> Block:
        """A block with its weights."""
        return replace(block, module=self.fill(block.name))

    def _load(self, name: str, module: nn.Module) -> None:
        """Give the tensors of a module, but not of its children, their values."""
        device, dtype = workplace(self.model.dtype)
        prefix = f"{name}." if name else ""
        for tensors in (vars(module)["_parameters"], vars(module)["_buffers"]):
            for key, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                value = self._value(prefix + key, tensor.dtype)
                if value is None:
                    value = self.constants[prefix + key].to(device)
                else:
                    value = value.to(device, dtype if value.is_floating_point() else value.dtype)
                tensors[key] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """What no checkpoint need hold, such as frequencies of positions, as the model's own code sets it.

        Raises:
            CloverError: its code leaves one as it is.
        """
        model, found = copy.deepcopy(self.model), {}
        for path, module in model.named_modules():
            vars(module).pop("_is_hf_initialized", None)
            for tensors in (vars(module)["_parameters"], vars(module)["_buffers"]):
                for key, tensor in tensors.items():
                    name = f"{path}.{key}".lstrip(".")
                    if tensor is None or name in self.merged or self._source_name(name) is not None:
                        continue
                    made = torch.empty_like(tensor, device="cpu")
                    tensors[key] = found[name] = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
        model.initialize_weights()
        for name, tensor in found.items():
            if tensor.numel() and not tensor._version:
                raise CloverError(
                    f"{type(model).__name__} leaves {name} unset, and {self.source.folder} lacks it; prune it in memory"
                )
        return {name: tensor.detach() for name, tensor in found.items()}

    def _value(self, key: str, dtype: torch.dtype) -> Tensor | None:
        """A tensor of the model, if the checkpoint holds it."""

        def read(name: str) -> Tensor:
            return self.source.entries[name].read(name).to(dtype)

        if key in self.merged:
            return self.merged[key].value(key, read, self.model)
        name = self._source_name(key)
        return None if name is None else read(name)

    def _source_name(self, key: str) -> str | None:
        """Under which name the checkpoint holds a tensor of the model, or the one that it is tied to."""
        return next((self.names[name] for name in (key, *self._tied(key)) if name in self.names), None)

    def _tied(self, key: str) -> list[str]:
        """The other names of a tensor of the model: a file may hold it under any one of them."""
        ties = self.model.all_tied_weights_keys
        first = ties.get(key, key)
        return [name for name in (first, *(n for n, of in ties.items() if of == first)) if name != key]

    def untouched(self, gone: tuple[str, ...]) -> Iterator[tuple[str, Entry]]:
        """What is copied as it lies, by its name in what is written: all tensors whose names don't begin so."""
        for key, name in self.names.items():
            if not key.startswith(gone):
                yield key, self.source.entries[name]
        for key, merged in self.merged.items():
            if not key.startswith(gone):
                yield from ((part, self.source.entries[name]) for part, (name, _) in merged.parts.items())

    def home(self, block: Block) -> str:
        """The file that holds the block's output projection."""
        return self.source.entries[self.names[f"{block.output_name}.weight"]].file.name

    def _untie(self) -> None:
        """Of tensors that the config ties, and the checkpoint holds both unlike: each its own, as in transformers."""
        for key, of in self.model.all_tied_weights_keys.items():
            mine, theirs = (self.source.entries.get(self.names.get(name, "")) for name in (key, of))
            if mine and theirs and not mine.equals(theirs):
                owner, _, name = key.rpartition(".")
                module = self.model.get_submodule(owner)
                setattr(module, name, nn.Parameter(torch.empty_like(getattr(module, name)), requires_grad=False))

    def _check(self) -> None:
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        for key, tensor in self.shapes.items():
            name, shape = self._found(key)
            if shape is None:
                tied = any(name in self.names or name in self.merged for name in self._tied(key))
                if tied or any(re.search(pattern, key) for pattern in ignored):
                    continue
                raise CloverError(f"{self.source.folder} has no tensor for {key}; restore the files")
            if shape != tuple(tensor.shape):
                raise CloverError(
                    f"{name} has shape {shape}, but config.json gives {tuple(tensor.shape)}; restore the files"
                )

    def _found(self, key: str) -> tuple[str, tuple[int, ...] | None]:
        """Name and shape in the checkpoint of a tensor of the model."""
        if key in self.names:
            return self.names[key], self.source.entries[self.names[key]].shape
        if key not in self.merged:
            return key, None

        def shaped(name: str) -> Tensor:
            return torch.empty(self.source.entries[name].shape, device="meta")

        try:
            return key, tuple(self.merged[key].value(key, shaped, self.model).shape)
        except (RuntimeError, ValueError) as error:
            raise CloverError(
                f"the parts of {key} in {self.source.folder} don't fit: {reason(error)}; restore them"
            ) from error


def _match(model: PreTrainedModel, source: Checkpoint) -> tuple[dict[str, str], dict[str, Merged]]:
    """Where the checkpoint holds the model's tensors, by the renamings and mergers that transformers loads with."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names: dict[str, str] = {}
    merged: dict[str, Merged] = {}
    shapes = model.state_dict()
    for name in sorted(source.entries, key=dot_natural_key):  # the order in which parts are put together
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if pattern is None:
            names[key] = name
            continue
        converter = by_pattern[pattern]
        if len(converter.target_patterns) > 1:
            raise CloverError(
                f"{name} in {source.folder} holds several tensors of the model, which streaming can't take apart; "
                "prune it in memory"
            )
        merged.setdefault(key, Merged(converter, {})).parts[rename_source_key(name, renamings, [])[0]] = name, pattern
    return names, merged


@torch.no_grad()
def cut(block: Block, basis: Basis, plan: BlockPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a block's cut, by their names in the model.

    Raises:
        CloverError: the cut is not finite in that dtype.
    """
    made = filled(block, basis, plan)
    state = {f"{name}.{key}": t for name, m in made.items() for key, t in m.to(dtype).state_dict().items()}
    for name, tensor in state.items():
        if not finite(tensor):
            raise CloverError(f"{name} overflows {dtype}; save the model in float32 or bfloat16 first")
    return state
