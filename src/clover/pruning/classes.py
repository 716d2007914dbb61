"""Rewritten models as classes of transformers: what makes them save and load with their plan.

transformers is extended where it asks to be: a model type, registered with its Auto classes. A rewritten model is an
instance of a subclass of its original class, whose constructor rebuilds the attention from the plan in the config; the
quantisation slot of the config stays free. Without ``import clover`` transformers refuses the folder, and the config
is so made that a class named outright (``LlamaForCausalLM.from_pretrained``) refuses it too, instead of guessing.
Nothing of transformers is changed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter
from transformers.models.auto import modeling_auto

from clover.errors import CloverError
from clover.model.block import Block
from clover.model.survey import is_attention, survey
from clover.planning.plan import Plan
from clover.pruning.checks import HOMES, check_own
from clover.pruning.surgery import check_fit, install, skeleton

MODEL_TYPE = "clover (pip install clover-attention, then import clover before loading)"
GUARD = "unknown before `import clover` (pip install clover-attention); then load with clover.load or an Auto class"
GUARDED = ("attn_implementation", "transformers_weights")
"""Where a config names an attention implementation, and the file of the weights: whoever builds a model without our
class, or loads one, stumbles over it, and who only reads the config does not. No argument takes the second's place."""


class RewrittenConfig(PreTrainedConfig):
    """What a config of this model type is read as first; gives way to the subclass of the original config."""

    model_type = MODEL_TYPE
    auto_map = MappingProxyType[str, str]({})  # TRL asks where the code of a class that is not transformers' is

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = config_dict.get("base_model_type")
        if not isinstance(base, str) or base not in transformers.CONFIG_MAPPING or "clover" not in config_dict:
            raise CloverError(
                f"config.json names no known base_model_type ({base!r}) or has no clover plan; restore the file"
            )
        return config_class(transformers.CONFIG_MAPPING[base]).from_dict(config_dict, **kwargs)


class _ConfigMixin:
    """Adds the plan to a family's config. ``clover`` is the plan as plain data."""

    model_type = MODEL_TYPE
    auto_map = RewrittenConfig.auto_map
    _auto_class = None  # a family's own, of code beside its weights, says nothing of how we are loaded

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "clover" not in config_dict and "base_model_type" not in config_dict:  # peft asks what the model began as
            return _family(cls).from_dict(config_dict, **kwargs)
        config_dict = dict(config_dict)
        plan, base = config_dict.pop("clover", None), config_dict.pop("base_model_type", config_dict.get("model_type"))
        if not isinstance(plan, dict):
            raise CloverError(f"the clover plan in config.json is damaged (it is {plan!r}); restore the file")
        for name in GUARDED:
            if config_dict.get(name) == GUARD:
                del config_dict[name]
        _known(config_dict.get("dtype"))
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        config = result[0] if isinstance(result, tuple) else result
        _mark(config, Plan.from_dict(plan), base)
        return result

    def to_diff_dict(self) -> dict[str, Any]:
        ours = {"model_type": MODEL_TYPE, "base_model_type": self.model_type, **dict.fromkeys(GUARDED, GUARD)}
        return super().to_diff_dict() | ours | {"clover": getattr(self, "clover", {})}  # type: ignore[misc]


def _family(kind: type) -> Any:
    """The family's class of a config that carries a plan."""
    return next(base for base in kind.__mro__ if not issubclass(base, _ConfigMixin))


def belongs(kind: Any, config: PreTrainedConfig) -> bool:
    """Whether a stock class is one of the family of a config that carries a plan."""
    own = _family(type(config))
    return issubclass(own, kind.config_class or ()) or any(kind in found for _, found in _models_of(own))


def _models_of(config: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The tables of the Auto classes that know a family's config, and its classes there, which may be another's."""
    for auto in vars(modeling_auto).values():
        table = getattr(auto, "_model_mapping", None)
        if table is not None and config in table:
            try:
                found = table[config]
            except (ImportError, ValueError):  # a class that transformers lacks, or that lacks a package
                continue
            yield table, found if isinstance(found, tuple) else (found,)


def _known(dtype: Any) -> None:
    """Refuse a dtype that torch does not have."""
    if dtype is not None and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise CloverError(f"config.json gives dtype {dtype!r}, which torch does not have; restore the file")


def _mark(config: PreTrainedConfig, plan: Plan, base: str) -> None:
    config.clover = plan.to_dict()
    config.model_type = base  # the rest of transformers treats the model as the family that it is


@contextmanager
def _as_its_family(model: Any, config: Any) -> Iterator[None]:
    """Let a class that makes its base model from the same config get the family's: the plan is carried out once."""
    ours = config.__class__
    config.__class__ = _family(ours)
    vars(model)["config_class"] = config.__class__  # against which models made of two others hold their config
    try:
        yield
    finally:
        config.__class__ = ours
        del vars(model)["config_class"]


class _ModelMixin:
    """Rebuilds the attention of a model from the plan in its config."""

    _auto_class = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with _as_its_family(self, config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        plan = Plan.from_dict(getattr(config, "clover", {}))
        own = rebuild(self, plan)  # type: ignore[arg-type]
        if own != plan:  # it is that of a language model, say, and this its base: from here on it has this one's names
            _own_config(self)
            self.config.clover = own.to_dict()  # type: ignore[attr-defined]
        self._tp_plan = _replicated(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the original class says: of what it calls custom code, transformers leaves some constants unset."""
        return cls._original().is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """As the original class says, in whose module transformers then looks for what tells."""
        return cls._original()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Likewise."""
        return cls._original()._can_set_experts_implementation()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a plan that is not that of the blocks is refused (``check_own``)."""
        check_own(self)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Refuse at once: what fails later fails in a thread of transformers, which passes over it."""
        raise CloverError("a pruned model can't share a paged cache (generate_batch); use generate")

    @classmethod
    def _original(cls) -> Any:
        return next(base for base in cls.__mro__ if not issubclass(base, _ModelMixin))

    def _get_name(self) -> str:
        """The original class's: by it transformers' Trainer knows whether labels are shifted."""
        return self._original().__name__

    def _get_static_cache_init_shape(self) -> None:
        """A static cache takes its shapes from the first keys and values, not from the config."""
        return None

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but tensors that contradict the plan are an error, never a warning."""
        wants_info = kwargs.pop("output_loading_info", False)
        tolerant, kwargs["ignore_mismatched_sizes"] = kwargs.get("ignore_mismatched_sizes", False), True
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if wrong := _contradiction(model, info, tolerant):
            raise CloverError(
                f"the tensors in {path} contradict the plan in its config.json: {wrong}; restore the files"
            )
        for module in model.modules():
            if hasattr(module, "clover") and not module.frequencies.numel():
                # One without numbers that comes out of a file shares an address with others, and torch.save stumbles.
                module.frequencies = torch.zeros_like(module.frequencies)
        _name_as_here(model)
        return (model, info) if wants_info else model


def _contradiction(model: PreTrainedModel, info: dict[str, Any], tolerant: bool) -> str | None:
    """What in the tensors, as ``from_pretrained`` reports on them, contradicts the plan.

    Args:
        tolerant: outside of attention shapes may differ, as for a new head.
    """
    prefix = f"{model.base_model_prefix}."
    attention = [n for n, module in model.named_modules() if hasattr(module, "clover") or is_attention(module)]

    def inside(keys: Iterable[str]) -> list[str]:
        blocks = tuple(f"{name}." for name in attention)
        return sorted(k for k in keys if k.startswith(blocks) or k.removeprefix(prefix).startswith(blocks))

    for key, found, planned in info["mismatched_keys"]:
        if tolerant and not inside([key]):
            continue
        return f"{key} has shape {tuple(found)}, the plan says {tuple(planned)}"
    for key in inside(info["missing_keys"]):
        return f"{key} is missing"
    for key in inside(info["unexpected_keys"]):  # a block that the plan forgot: its weights are in another basis
        return f"{key} is not in it"
    return None


def _replicated(model: Any) -> dict[str, str]:
    """The plan of tensor parallelism without rewritten blocks: their heads differ, so each device has them whole."""
    blocks = tuple(
        f"{re.sub(r'[0-9]+', '*', name)}." for name, module in model.named_modules() if hasattr(module, "clover")
    )
    return {name: how for name, how in (model._tp_plan or {}).items() if not name.startswith(blocks)}


@cache
def config_class(base: Any) -> Any:
    """The subclass of a family's config that carries a plan; its models become known to the Auto classes."""
    made = type(f"Clover{base.__name__}", (_ConfigMixin, base), {"__module__": __name__})
    for table, found in list(_models_of(base)):
        ours = tuple(model_class(model, made) for model in found)
        table.register(made, ours if len(ours) > 1 else ours[0], exist_ok=True)
    return made


@cache
def model_class(base: Any, config: Any) -> Any:
    """The subclass of a model class that rebuilds its attention from the plan."""
    made = type(f"Clover{base.__name__}", (_ModelMixin, base), {"config_class": config, "__module__": __name__})
    own = config.__bases__[1]
    made.__qualname__ += _place(base) + ("" if base.config_class is own else f":{own.__name__}{_place(own)}")
    for name in (base.__name__, own.model_type):
        if mergers := _mergers(get_checkpoint_conversion_mapping(name)):
            register_checkpoint_conversion_mapping(made.__name__, mergers, overwrite=True)
            break
    return made


def _mergers(conversions: Iterable[Any] | None) -> list[WeightConverter]:
    """Those conversions of names and tensors that put several tensors of a file (a layer's experts) into one."""
    return [c for c in conversions or () if isinstance(c, WeightConverter)]


def _name_as_here(model: Any) -> None:
    """Let a model be saved under its own names, merged tensors in parts.

    Loading translates a family's old tensor names for classes of transformers alone, not for ours.
    """
    model._weight_conversions = _mergers(get_model_conversion_mapping(model, add_legacy=False))


def __getattr__(name: str) -> Any:
    """The classes that are made here, by name, which may tell where and with which config: so pickle finds them."""
    told, _, own = name.partition(":")
    base: Any = _placed(told.removeprefix("Clover")) if name.startswith("Clover") else None
    if base is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if issubclass(base, PreTrainedConfig):
        return config_class(base)
    return model_class(base, config_class(_placed(own) if own else base.config_class))


def _place(kind: type) -> str:
    """Where a class is found, if not in transformers itself."""
    lost = kind.__module__.startswith(HOMES) and not hasattr(transformers, kind.__name__)
    return "@" + kind.__module__.replace(".", "/") if lost else ""


def _placed(told: str) -> Any:
    """The class of a name and its ``_place``."""
    name, _, home = told.partition("@")
    home = home.replace("/", ".")
    return getattr(import_module(home) if home.startswith(HOMES) else transformers, name, None)


AutoConfig.register(MODEL_TYPE, RewrittenConfig, exist_ok=True)


def adopt(model: PreTrainedModel, plan: Plan) -> None:
    """Make a model that has been operated on one that saves and loads with its plan."""
    _own_config(model)
    base = model.config.model_type
    config = config_class(model.config.__class__)
    model.config.__class__ = config
    _mark(model.config, plan, base)
    kind = model_class(model.__class__, config)
    # The constructor is where transformers notes which outputs (attentions, hidden states) a class can record.
    PreTrainedModel.__init__(kind.__new__(kind), copy.deepcopy(model.config))
    model.__class__ = kind
    _name_as_here(model)
    _align_by_what_is_left(model, plan)


def _align_by_what_is_left(model: Any, plan: Plan) -> None:
    """Let Whisper tell the times of words without heads that attend to nothing, or to all alike."""
    heads: Any = getattr(getattr(model, "generation_config", None), "alignment_heads", None) or ()
    if heads and (cross := [block for block in plan.blocks if block.part == "cross"]):
        n = cross[0].queries
        left = {
            (layer, n * head + i)
            for layer, block in enumerate(cross)
            for group in block.groups if group.qk and group.value
            for head in group.heads for i in range(n)
        }  # fmt: skip
        told = model.generation_config
        model.generation_config = ours = copy.deepcopy(told)
        ours.alignment_heads = [list(h) for h in map(tuple, heads) if h in left] or None
        if getattr(told, "_original_object_hash", None) == hash(told):
            # What else stands in a file is not checked by transformers as it is saved, unless someone changed it.
            ours._original_object_hash = hash(ours)


def _own_config(model: PreTrainedModel) -> None:
    """Part the config, which is about to change, from models that were made from the same object, or that hold this."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(module)[name] = copies[id(value)]


def rebuild(model: nn.Module, plan: Plan) -> Plan:
    """Give a fresh model the attention modules of a plan, weights not yet loaded.

    Returns:
        The plan, by the names that the blocks have in this model; without those of a side (a decoder, say) that its
        class leaves out.

    Raises:
        CloverError: the plan names a block that the model lacks, or all of them, or sizes that its config contradicts.
    """
    found: dict[str, Block] = {block.name: block for block in survey(model)[0]}
    prefix = getattr(model, "base_model_prefix", "") + "."
    own = []
    for part in plan.blocks:
        block = next(
            (found[n] for n in (part.name, part.name.removeprefix(prefix), prefix + part.name) if n in found), None
        )
        if block is None and _elsewhere(model, part.name.removeprefix(prefix)):
            continue
        if block is None:
            raise CloverError(
                f"the plan cuts {part.name}, which {type(model).__name__} does not have; restore config.json"
            )
        check_fit(block, block.heads(), part, "restore config.json")
        own.append(replace(part, name=block.name))
        install(model, block, skeleton(block, own[-1]))
    if plan.blocks and not own:
        raise CloverError(
            f"{type(model).__name__} has none of the blocks that the plan cuts ({plan.blocks[0].name}, ...); load "
            "the folder as the class that it names, or one with the same layers"
        )
    return Plan(tuple(own))


def _elsewhere(model: Any, name: str) -> bool:
    """Whether a block stands in a side of a model that this class leaves out, and not merely beyond its last layer."""
    module = getattr(model, model.base_model_prefix, model)
    for step in name.split("."):
        if not hasattr(module, step):
            return not step.isdigit()
        module = getattr(module, step)
    return False
