"""What a model tells of itself: what it reads, whether it writes, how much, and from which token on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from clover.errors import CloverError
from clover.model.answers import INPUTS


def accepts(model: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward pass, by name."""
    return inspect.signature(model.forward).parameters


def _reads(model: Any) -> set[str]:
    return set(INPUTS) & set(accepts(model))


def reads_text_alone(model: Any) -> bool:
    """Whether a model reads tokens and neither sound nor images."""
    return _reads(model) == {"input_ids"}


def encoder(model: Any) -> Any:
    """The encoder of an encoder-decoder model; of any other, what is in front of its head, or all that reads inputs."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    parts = (model.base_model, *(part for part in model.children() if isinstance(part, PreTrainedModel)))
    return next((part for part in parts if part is not model and _reads(model) <= _reads(part)), model)


def writes_text(model: Any) -> bool:
    """Whether a model is a causal language model."""
    return model.can_generate() and not model.config.is_encoder_decoder


def max_positions(model: nn.Module) -> int | None:
    """Most tokens that the model reads at once, or None if its config sets no bound, nor those of its two sides."""
    config: Any = model.config
    configs = (config, *(getattr(config, side, None) for side in ("text_config", "encoder", "decoder")))
    bounds = (getattr(each, "max_position_embeddings", None) for each in configs)
    bound = min((b for b in bounds if b is not None and b > 0), default=None)
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((i for m in tables if (i := getattr(m, "padding_idx", None)) is not None), None)
    # A position table with a padding row starts counting behind that row.
    return bound if bound is None or padding is None else bound - padding - 1


def decoder_start(model: Any) -> int:
    """The token that a decoder reads before it writes its first.

    Raises:
        CloverError: the model's configs name none.
    """
    for config in (model.config, getattr(model, "generation_config", None), getattr(model.config, "decoder", None)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (token := getattr(config, name, None)) is not None:
                return token
    raise CloverError("the model names no decoder_start_token_id; set it in config.json")


def is_whisper(model: Any) -> bool:
    """Whether it is told language and task by tokens, and writes text by what it hears, as Whisper's class does."""
    return hasattr(model.config, "median_filter_width")  # which Whisper alone has, to tell times


def is_multilingual(model: nn.Module) -> bool:
    """Whether a Whisper model is told language and task; English-only ones must not be."""
    return getattr(getattr(model, "generation_config", None), "is_multilingual", True)
