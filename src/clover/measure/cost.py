"""What a model costs: parameters, cache bytes and time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import DynamicCache

from clover.errors import CloverError, reason
from clover.model.traits import accepts, encoder, max_positions, reads_text_alone, writes_text
from clover.progress import track

T = TypeVar("T")
SAMPLES = 16_000 * 10
"""Of the noise that a model of raw sound is timed on: ten seconds."""


@torch.inference_mode()
def sizes(model: nn.Module) -> dict[str, int | None]:
    """Count what a model stores.

    Returns:
        ``parameters`` and ``bytes`` of all unique tensors (tied ones once), and ``kv_bytes_per_token``: measured on a
        real cache, the self-attention keys and values of one token of one sequence; None without a cache.

    Raises:
        CloverError: the model can't be run on tokens alone.
    """
    everything = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in everything),
        "bytes": sum(p.nbytes for p in everything),
        "kv_bytes_per_token": _cache_bytes(model),
    }


def _cache_bytes(model: Any, tokens: int = 4) -> int | None:
    if not model.can_generate():
        return None
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, tokens, dtype=torch.long, device=model.device)}
    if apart := model.config.is_encoder_decoder:  # then its decoder can do without what the encoder tells beside states
        model = model.get_decoder()
        width = getattr(model.config, "cross_attention_hidden_size", None) or model.config.hidden_size
        inputs["encoder_hidden_states"] = torch.zeros(1, 1, width, dtype=model.dtype, device=model.device)
    with _understood(model):
        cache = model(**inputs, use_cache=True).get("past_key_values")
    if cache is None:
        return None
    layers = (cache.self_attention_cache if apart else cache).layers
    attends = [layer for layer in layers if hasattr(layer, "keys")]  # others keep a state that does not grow
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in attends) // tokens


@torch.inference_mode()
def compare_throughput(
    models: Mapping[str, nn.Module],
    *,
    context: int = 512,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
    inputs: dict[str, torch.Tensor] | None = None,
    decode_only: bool = False,
) -> dict[str, dict[str, Any]]:
    """Speed of several models side by side: they take turns, so what slows the machine down slows all of them.

    Args:
        models: causal language models, or anything else, of which the encoders are run then; they read the same inputs.
        context: tokens read before the first is written.
        new_tokens: tokens written one at a time with the cache.
        batch: sequences at once.
        repeats: timed runs, after one to warm up.
        inputs: what the forward pass gets; by default random tokens, or random speech or images of the model's size.
        decode_only: read the context once, as one sequence that the whole batch shares, and time only the writing of
            new tokens behind it: for long contexts, which take minutes to read.

    Returns:
        For each name the medians of ``prefill_tokens_per_second`` (logits of the last token only) and
        ``decode_tokens_per_second``, each over the whole batch, or ``items_per_second`` of an encoder; and under
        ``ratio``, for every name but the first, the median of its rates over those of the first in the same turn.

    Raises:
        CloverError: a count below 1, more tokens than the model has positions for, or inputs that can't be made up
            or that the model can't read.
    """
    names = list(models)
    first = models[names[0]]
    if min(context, new_tokens, batch, repeats) < 1:
        raise CloverError(f"{context=}, {new_tokens=}, {batch=} and {repeats=} must be at least 1")
    bound, tokens = max_positions(first), context + (new_tokens if writes_text(first) else 0)
    if inputs is None and bound and tokens > bound and (writes_text(first) or reads_text_alone(first)):
        raise CloverError(f"{context=} and {new_tokens=} exceed the {bound} positions of the model; lower them")
    inputs = random_inputs(first, batch, context) if inputs is None else inputs
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    runners: dict[str, Callable[[], dict[str, float]]]
    if decode_only:
        runners = {name: _decoder(model, inputs, new_tokens) for name, model in models.items()}
    else:
        runners = {name: partial(_rates, model, inputs, new_tokens) for name, model in models.items()}
    for turn in track(range(repeats + 1), "timing"):
        for name in names if turn % 2 else reversed(names):
            runs[name].append(runners[name]())
    runs = {name: kept[1:] for name, kept in runs.items()}
    result = {name: {key: median(run[key] for run in kept) for key in kept[0]} for name, kept in runs.items()}
    turns = {name: list(zip(runs[name], runs[names[0]], strict=True)) for name in names[1:]}
    ratio = {
        name: {k: median(own[k] / of_first[k] for own, of_first in turns[name]) for k in result[name]} for name in turns
    }
    return {**result, "ratio": ratio}


def _rates(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> dict[str, float]:
    """One run, in items per second."""
    items = next(iter(inputs.values())).shape[0]
    with _understood(model):
        if not writes_text(model):
            run = encoder(model)
            return {"items_per_second": items / _clock(model, lambda: run(**inputs))[1]}
        last = {"logits_to_keep": 1} if "logits_to_keep" in accepts(model) else {}
        out, seconds = _clock(model, lambda: model(**inputs, **last, use_cache=True))
        prefill = inputs["input_ids"].numel() / seconds
        first = out.logits[:, -1:].argmax(-1)
        _, seconds = _clock(model, lambda: _write(model, out.past_key_values, first, new_tokens))
    return {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": items * new_tokens / seconds}


def _decoder(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> Callable[[], dict[str, float]]:
    """What times the writing of tokens behind a context that is read here, and forgets them again."""
    if not writes_text(model):
        raise CloverError(f"decode_only is set, but {type(model).__name__} is no causal language model; leave it out")
    ids = inputs["input_ids"]
    cache = DynamicCache(config=model.config)
    states = any(hasattr(layer, "recurrent_states") for layer in cache.layers)  # which can't be copied or taken back
    with _understood(model):
        for piece in (ids if states else ids[:1]).split(512, 1):
            last = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    if not states:
        cache.batch_repeat_interleave(len(ids))
        last = last.expand(len(ids), 1)

    def run() -> dict[str, float]:
        mine = copy.deepcopy(cache) if states else cache
        _, seconds = _clock(model, lambda: _write(model, mine, last, new_tokens))
        if not states:
            cache.crop(-new_tokens)
        return {"decode_tokens_per_second": len(ids) * new_tokens / seconds}

    return run


def _write(model: Any, cache: Any, token: torch.Tensor, new_tokens: int) -> None:
    for _ in range(new_tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)


def _clock(model: Any, call: Callable[[], T]) -> tuple[T, float]:
    synchronise = torch.get_device_module(model.device).synchronize
    synchronise()
    start = time.perf_counter()
    result = call()
    synchronise()
    return result, time.perf_counter() - start


@contextmanager
def _understood(model: Any) -> Iterator[None]:
    """What a model says of inputs that it can't read is told with what can be done."""
    try:
        yield
    except (CloverError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CloverError(
            f"{type(model).__name__} and its inputs don't go together ({reason(error)}); pass inputs that it reads to "
            "compare_throughput, or measure a part of it, such as its text or vision model"
        ) from error


def random_inputs(model: Any, batch: int, context: int) -> dict[str, torch.Tensor]:
    """Random tokens (``context`` of them at most), speech or images of a model's size: whatever it reads.

    A model that writes text gets tokens alone: images and sound would have to match their marks among the tokens.

    Raises:
        CloverError: the config doesn't tell the form of what the model reads.
    """
    reads, random = accepts(model), torch.Generator().manual_seed(0)
    alone = "input_ids" in reads and writes_text(model)
    inputs = {
        name: torch.randn(batch, *shape, generator=random).to(model.dtype)
        for name, shape in ({} if alone else _shapes(model)).items()
    }
    if "input_ids" in reads:
        with _understood(model):
            text = model.config.get_text_config()
            length = min(context, getattr(text, "max_position_embeddings", context))
            inputs["input_ids"] = torch.randint(text.vocab_size, (batch, length), generator=random)
    if not inputs:
        raise CloverError(f"{type(model).__name__} reads {', '.join(reads)}; take a part of it, or pass inputs")
    return {name: value.to(model.device) for name, value in inputs.items()}


def _shapes(model: Any) -> dict[str, list[int]]:
    """One item of the sound or the images that a model reads, if it does, by the name of the argument."""
    config, reads = model.config, accepts(model)
    if "input_features" in reads and all(hasattr(config, k) for k in ("num_mel_bins", "max_source_positions")):
        return {"input_features": [config.num_mel_bins, 2 * config.max_source_positions]}
    if "input_values" in reads:
        spectrogram = all(hasattr(config, k) for k in ("num_mel_bins", "max_length"))
        return {"input_values": [config.max_length, config.num_mel_bins] if spectrogram else [SAMPLES]}
    if "pixel_values" in reads:
        return {"pixel_values": _image_shape(model)}
    if "input_features" in reads:
        raise CloverError(
            f"what {type(model).__name__} reads as sound has a form that isn't known; take a part of it, or pass inputs"
        )
    return {}


def _image_shape(model: Any) -> list[int]:
    parts = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    vision = next((part for part in parts if getattr(part, "image_size", None)), None)
    if vision is None:
        raise CloverError(
            f"the config of {type(model).__name__} sets no size of images; take a part of it, or pass inputs"
        )
    size = vision.image_size
    return [getattr(vision, "num_channels", 3), *(size if isinstance(size, list | tuple) else (size, size))]
