"""Save and load rewritten models: ordinary folders, safetensors, a config that describes itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from clover.errors import CloverError, reason, warn
from clover.jobs.folders import fresh_folder
from clover.model.heads import finite
from clover.pruning.checks import check_model, check_own, is_public, planned, stock
from clover.pruning.classes import belongs, model_class


def load(path: str | os.PathLike[str], *, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """Load a model, rewritten by clover or not, in the class that its config names.

    Args:
        path: a folder or a hub name.
        output_loading_info: return what transformers says of the loading, too.
        kwargs: for ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ``trust_remote_code``, ...).

    Warns of tensors that the checkpoint lacks.

    Raises:
        CloverError: no model there, or a checkpoint that contradicts itself.
    """
    kwargs.setdefault("trust_remote_code", False)  # left out, transformers asks at a terminal whether to run it
    keys = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "local_files_only")
    _, kind = _kind(path, **{k: kwargs[k] for k in keys if k in kwargs})
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, **kwargs)
    except (CloverError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: by what is damaged, lacks a package, or can't be fetched
        options = ", ".join(name for name, value in kwargs.items() if value is not False)
        asked = f", or leave out {options}" if options else ""
        raise CloverError(f"{path} can't be loaded: {reason(error)}; restore its files{asked}") from error
    if missing := sorted(info["missing_keys"]):
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        warn(f"{path} lacks {named}, which hold random numbers now; restore the file, or train what is new")
    model.eval()
    return (model, info) if output_loading_info else model


def blank(path: str | os.PathLike[str], dtype: torch.dtype) -> PreTrainedModel:
    """A model as ``load`` gives it, without weights: on the meta device, and of ``dtype`` unless its config has one.

    Raises:
        CloverError: no model there.
    """
    config, kind = _kind(path, trust_remote_code=False)
    make = kind.from_config if kind is transformers.AutoModel else kind._from_config
    try:
        with torch.device("meta"):
            model = make(config, dtype=config.dtype or dtype)
    except Exception as error:
        raise CloverError(f"{path} is no model that can be loaded: {reason(error)}") from error
    if model.can_generate():
        model.generation_config = _generation_config(path)
    return model.eval()


def _generation_config(path: str | os.PathLike[str]) -> Any:
    """As transformers finds it: in older models it is part of the config, whose class drops it."""
    try:
        return transformers.GenerationConfig.from_pretrained(path)
    except OSError:
        return transformers.GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True
        )


def check_there(path: str | os.PathLike[str]) -> None:
    """Refuse what has no config of a model, by a look at that alone.

    Raises:
        CloverError: no model there.
    """
    _kind(path, trust_remote_code=False)


def _kind(path: str | os.PathLike[str], **config_args: Any) -> tuple[Any, Any]:
    """Config of a model, and the class that it names."""
    if os.path.isfile(path):
        raise CloverError(f"{path} is a file; name the folder of the model")
    try:
        config = AutoConfig.from_pretrained(path, **config_args)
    except Exception as error:
        if isinstance(error, CloverError):
            raise
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise CloverError(f"{path} is an adapter; merge it into its model with clover merge first") from error
        raise CloverError(f"{path} is no model that can be loaded: {reason(error)}") from error
    base = _named_class(path, config)
    return config, model_class(base, type(config)) if hasattr(config, "clover") else base  # type: ignore[arg-type]


def _named_class(path: str | os.PathLike[str], config: PreTrainedConfig) -> Any:
    """The stock class that a config names, or else ``AutoModel``.

    Raises:
        CloverError: what it names is no class of a model; or it is that of a rewritten model, and names none of its
            family, as ``save`` does.
    """
    rewritten = hasattr(config, "clover")
    names: Any = config.architectures or [None]
    name = names[0] if isinstance(names, list) else names
    kind: Any = stock(str(name), type(config))
    if not rewritten and (name is None or (isinstance(name, str) and kind is None)):
        _warn_of_no_class(path, name)
        return transformers.AutoModel
    fits = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if fits and rewritten:
        fits = belongs(kind, config)
    if not fits:
        raise CloverError(
            f"config.json of {path} names {name!r} as its architecture, which is no class of {config.model_type} "
            "models; restore the file"
        )
    return kind


def _warn_of_no_class(path: str | os.PathLike[str], name: str | None) -> None:
    what = "no architecture" if name is None else f"the architecture {name}, which transformers does not have"
    warn(
        f"config.json of {path} names {what}: the model is loaded as AutoModel, and a head (lm_head, say) is left out; "
        'write the class into config.json, as in "architectures": ["LlamaForCausalLM"]'
    )


def save(
    model: PreTrainedModel, path: str | os.PathLike[str], *, beside: tuple[Any, ...] = (), max_shard_size: str = "5GB"
) -> Path:
    """Write a model folder whole or not at all: to a hidden name beside it, then renamed.

    Args:
        path: the folder to make; must not exist.
        beside: tokenizers and processors to save with the model.
        max_shard_size: largest safetensors file.

    Raises:
        CloverError: the folder exists or can't be written, a cut is not finite in the model's dtype, or the model is
            not as it was pruned, see ``check_own``.
    """
    check_model(model)
    check_own(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CloverError(
            f"adapters were added to this {type(model).__name__}, and transformers then writes them alone; save the "
            "model before add_adapter, or tune it by peft's get_peft_model and save what merge_and_unload returns"
        )
    if hasattr(model.config, "clover") and not is_public(model):
        warn(
            f"transformers has no {model._get_name()} by name, so that clover.load can't find it; load the "
            "folder by an Auto class that knows it, or prune a model that is a class of transformers"
        )
    for block in planned(model):
        for name, parameter in model.get_submodule(block).named_parameters():
            plain = type(parameter.data) is torch.Tensor and not parameter.is_meta  # quantised ones are whole numbers
            if plain and not finite(parameter):
                raise CloverError(f"{block}.{name} overflows {parameter.dtype}; save in float32 or bfloat16")
    with fresh_folder(path) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_beside(beside, folder)
    return Path(path).absolute()


def write_beside(things: tuple[Any, ...], folder: Path) -> None:
    """Write tokenizers and processors, and of Whisper's the table of spellings, which transformers leaves out."""
    for thing in things:
        thing.save_pretrained(folder)
        table = getattr(getattr(thing, "tokenizer", thing), "english_spelling_normalizer", None)
        if table:
            (folder / "normalizer.json").write_text(json.dumps(table, indent=2))


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write what ``save`` writes beside the weights."""
    config: Any = model.config
    config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
