"""CLOVER fine-tuning as a method of peft.

The base weights stay as they are, quantised or not; each targeted projection is wrapped, and its outputs are turned by
the cores (see ``cores``). The adapter file holds the cores and their bases, so loading computes no decomposition.
``import clover`` makes the method known to peft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clover.errors import CloverError, UnsupportedModelError, warn
from clover.tuning.config import NAME, CloverConfig, extend_enum
from clover.tuning.linear import CloverLinear
from clover.tuning.targets import Slot, find_slots, out_features, rows_in_blocks


class CloverModel(BaseTuner):
    """Wraps the projections of a model; what ``peft.get_peft_model`` builds for a ``CloverConfig``."""

    prefix = "clover_"
    tuner_layer_cls = CloverLinear
    _found: dict[str, list[Slot]]
    _takes_all = False
    """Whether every linear projection was asked for, rather than some by name."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft; the user's config stays as it is, and an adapter that can't be added leaves nothing behind."""
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        before = {layer: adapter_name in layer.clover_cores for layer in self._layers()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_back(adapter_name, before)
            raise
        finally:
            self._found = {}  # it can't be pickled

    def _take_back(self, adapter_name: str, before: dict[CloverLinear, bool]) -> None:
        """Undo what was added of an adapter, given the layers that were there, and whether each had one of its name.

        peft takes a model with a wrapped layer for one that is tuned already, and then freezes nothing.
        """
        for name, layer in list(self.model.named_modules(remove_duplicate=False)):
            if isinstance(layer, CloverLinear):
                if layer not in before:
                    self.model.set_submodule(name, layer.base_layer)
                elif not before[layer] and adapter_name in layer.clover_cores:
                    del layer.clover_cores[adapter_name]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in peft; what comes back when adapters are taken out is whole, and need be given no weights."""
        if isinstance(new_module, CloverLinear):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _layers(self) -> list[CloverLinear]:
        return [module for module in self.model.modules() if isinstance(module, CloverLinear)]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The trained numbers in float32, or in the dtype of the base if that is asked for."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # other modules that are trained
        for layer in self._layers():
            layer.cast(adapter_name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where peft looks for an adapter of each row of the batch: all rows have the active ones."""
        if kwargs.get("adapter_names") is not None:
            raise CloverError(
                f"adapter_names is {kwargs['adapter_names']!r}, but CLOVER has the active adapters for all rows of a "
                "batch; choose them by set_adapter, leave them out by disable_adapter, and give each its own batch"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As in peft, which leaves out what has the name of another adapter anywhere in its own.

        Raises:
            CloverError: that would be a part of this one.
        """
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = [layer for layer in model.modules() if isinstance(layer, CloverLinear)]
        own = [layer.clover_cores[adapter_name] for layer in layers if adapter_name in layer.clover_cores]
        held = sum(len(cores.state_dict()) for cores in own)
        others = any(f".clover_cores.{other}." in key for other in unwanted_adapter_names for key in found)
        if others or sum(f".clover_cores.{adapter_name}." in key for key in found) < held:
            names = ", ".join(map(repr, unwanted_adapter_names))
            raise CloverError(
                f"adapter {adapter_name!r} can't be saved beside {names}, which is also what a part of it is called; "
                "load that one under another name"
            )
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name on file of a core's tensor: without the adapter's, so that it loads under any."""
        head, found, tail = key.rpartition(f".clover_cores.{adapter_name}.")
        return f"{head}.clover_cores.{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The stored tensors by their names in the model; peft would pass over those that have no place there.

        Raises:
            CloverError: a core has none.
        """
        placed = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        for key in state_dict:
            module, found, _ = key.partition(".clover_cores.")
            if found and key in placed:  # it kept its name
                raise CloverError(
                    f"the adapter has a core for {module.removeprefix('base_model.model.')}, for which there is no "
                    "place in this model; load it on the one that it was made for (with all its layers, unpruned if "
                    "that was, pruned alike if that was)"
                )
        return placed

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._found = find_slots(self.model, peft_config.block_size)
        self._takes_all = peft_config.target_modules == "all-linear"
        if peft_config.target_modules is None:
            wanted = {n for n, slots in self._found.items() if any(s.part in peft_config.parts for s in slots)}
            if not wanted:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has no {' or '.join(peft_config.parts)} of a known class to tune; "
                    "name modules in target_modules; README.md says which attention is known"
                )
            short = tuple({_suffix(name) for name in wanted})
            meant = {
                n for n, _ in self.model.named_modules() if n in short or n.endswith(tuple(f".{s}" for s in short))
            }
            peft_config.target_modules = set(short)
            if not meant <= wanted:  # named one by one, and peft then looks at no other setting
                chosen = {name for name in wanted if self._check_target_module_exists(peft_config, name)}
                if not chosen:
                    raise CloverError(
                        f"layers_to_transform={peft_config.layers_to_transform} and exclude_modules leave nothing to "
                        "tune; choose layers that hold attention"
                    )
                peft_config.target_modules = chosen
        return peft_config

    def fold(self, adapter_name: str = "default") -> None:
        """Make an adapter smaller for inference: of its cores and bases keep the change of the weights alone.

        The outputs stay; ``save_pretrained`` then writes about a third. Training it further is no longer CLOVER.

        Raises:
            CloverError: there is no adapter of that name.
        """
        if adapter_name not in self.peft_config:
            raise CloverError(f"adapter {adapter_name!r} is unknown; choose among {', '.join(self.peft_config)}")
        for layer in self._layers():
            if adapter_name in layer.clover_cores:
                for core in layer._cores(adapter_name):
                    core.fold()
        folded = copy.copy(self.peft_config[adapter_name])  # others may hold the same
        folded.core = "folded"
        self.peft_config[adapter_name] = folded

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse: each adapter has bases of its own, which have no sum.

        Raises:
            CloverError: always.
        """
        raise CloverError(
            "CLOVER's adapters have no weighted sum; let several act at once (model.base_model.set_adapter([...])), or "
            "merge them together (merge_adapter([...]))"
        )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) and resolve_quantization_backend(base) is None:
            raise ValueError(
                f"Target module {current_key} is a {type(base).__module__}.{type(base).__name__}, which is not "
                "supported; CLOVER tunes linear projections (Linear, Conv1D and quantised ones): "
                "leave it out of target_modules, or train it whole through modules_to_save"
            )
        known = [s for s in self._found.get(current_key, []) if s.rows.numel()]
        slots = [s for s in known if s.part in config.parts] or known
        if not slots and out_features(base) % config.block_size and (self._takes_all or config.bases_stored):
            if self._takes_all:  # else it was told when the adapter was made
                warn(
                    f"{current_key} has {out_features(base)} rows, which blocks of {config.block_size} don't divide: "
                    "it stays as it is"
                )
            return
        slots = slots or [rows_in_blocks(current_key, base, config.block_size)]
        if isinstance(target, CloverLinear):
            target.update_layer(adapter_name, slots, config)
            return
        layer = CloverLinear(target, adapter_name, slots, config, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _suffix(name: str) -> str:
    """``self_attn.v_proj`` for ``model.layers.3.self_attn.v_proj``: the same in every layer."""
    *_, parent, last = ["", *name.split(".")]
    return last if parent.isdigit() or not parent else f"{parent}.{last}"


def register() -> None:
    """Make the method known to peft, unless it is by now."""
    if extend_enum() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=CloverConfig, model_cls=CloverModel)
