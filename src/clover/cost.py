"""What a model costs: parameters, cache bytes and time."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from clover.data import max_positions
from clover.errors import CloverError
from clover.progress import track

T = TypeVar("T")
SAMPLES = 16_000 * 10
"""Of the noise that a model of raw sound is timed on: ten seconds."""


@torch.inference_mode()
def sizes(model: nn.Module) -> dict[str, int | None]:
    """Count what a model stores.

    Returns:
        ``parameters`` and ``bytes`` of all unique tensors (tied ones once), ``attention_parameters`` and
        ``attention_bytes`` of those in modules whose class is called ...Attention, and ``kv_bytes_per_token``: measured
        on a real cache, the self-attention keys and values of one token of one sequence; None without a cache.
    """
    attention = {
        id(p): p for m in model.modules() if type(m).__name__.endswith("Attention") for p in m.parameters()
    }.values()
    everything = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in everything),
        "bytes": sum(p.nbytes for p in everything),
        "attention_parameters": sum(p.numel() for p in attention),
        "attention_bytes": sum(p.nbytes for p in attention),
        "kv_bytes_per_token": _cache_bytes(model),
    }


def _cache_bytes(model: Any, tokens: int = 4) -> int | None:
    if not model.can_generate():
        return None
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    if model.config.is_encoder_decoder:
        silence = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
        encoded = BaseModelOutput(last_hidden_state=silence)
        cache = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True).past_key_values
        cache = cache.self_attention_cache
    else:
        cache = model(input_ids=ids, use_cache=True).past_key_values
    attends = [layer for layer in cache.layers if hasattr(layer, "keys")]  # others keep a state that does not grow
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
        CloverError: a count below 1, or more tokens than the model has positions for.
    """
    names = list(models)
    first = models[names[0]]
    if min(context, new_tokens, batch, repeats) < 1:
        raise CloverError(f"{context=}, {new_tokens=}, {batch=} and {repeats=} must be at least 1")
    bound, tokens = max_positions(first), context + (new_tokens if writes_text(first) else 0)
    if inputs is None and bound and tokens > bound:
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


@torch.inference_mode()
def use(model: nn.Module, *, context: int, new_tokens: int, batch: int) -> None:
    """Run a model once as ``compare_throughput`` does, untimed."""
    _rates(model, random_inputs(model, batch, context), new_tokens)


def _rates(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> dict[str, float]:
    """One run, in items per second."""
    items = next(iter(inputs.values())).shape[0]
    if not writes_text(model):
        run = encoder(model)
        return {"items_per_second": items / _clock(model, lambda: run(**inputs))[1]}
    last = {"logits_to_keep": 1} if "logits_to_keep" in accepts(model) else {}
    out, seconds = _clock(model, lambda: model(**inputs, **last, use_cache=True))
    prefill = inputs["input_ids"].numel() / seconds
    _, seconds = _clock(model, lambda: _write(model, out.past_key_values, out.logits[:, -1:].argmax(-1), new_tokens))
    return {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": items * new_tokens / seconds}


def _decoder(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> Callable[[], dict[str, float]]:
    """What times the writing of tokens behind a context that is read here, and forgets them again."""
    ids = inputs["input_ids"]
    cache = DynamicCache(config=model.config)
    states = any(hasattr(layer, "recurrent_states") for layer in cache.layers)  # which can't be copied or taken back
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


def random_inputs(model: Any, batch: int, context: int) -> dict[str, torch.Tensor]:
    """Random tokens (``context`` of them at most), speech or images of a model's size: whatever it reads."""
    config, reads = model.config, accepts(model)
    random = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    if "input_features" in reads and hasattr(config, "num_mel_bins"):
        shape = [batch, config.num_mel_bins, 2 * config.max_source_positions]
        inputs["input_features"] = torch.randn(shape, generator=random).to(model.dtype)
    elif "input_values" in reads:
        shape = [batch, config.max_length, config.num_mel_bins] if hasattr(config, "num_mel_bins") else [batch, SAMPLES]
        inputs["input_values"] = torch.randn(shape, generator=random).to(model.dtype)
    elif "pixel_values" in reads:
        vision = getattr(config, "vision_config", config)
        shape = [batch, vision.num_channels, vision.image_size, vision.image_size]
        inputs["pixel_values"] = torch.randn(shape, generator=random).to(model.dtype)
    elif {"input_features", "input_values"} & set(reads):
        raise CloverError(f"what {type(model).__name__} reads as sound has a form that isn't known; pass inputs for it")
    if "input_ids" in reads:
        text = config.get_text_config()
        length = min(context, getattr(text, "max_position_embeddings", context))
        inputs["input_ids"] = torch.randint(text.vocab_size, (batch, length), generator=random)
    if not inputs:
        raise CloverError(f"{type(model).__name__} reads {', '.join(reads)}; pass inputs for it")
    return {name: value.to(model.device) for name, value in inputs.items()}


def reads_text_alone(model: Any) -> bool:
    """Whether a model reads tokens and neither sound nor images."""
    reads = accepts(model)
    return "input_ids" in reads and not {"input_features", "input_values", "pixel_values"} & set(reads)


def encoder(model: Any) -> Any:
    """The encoder of an encoder-decoder model; of any other, the model without its head."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def accepts(model: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward pass, by name."""
    return inspect.signature(model.forward).parameters


def writes_text(model: Any) -> bool:
    """Whether a model is a causal language model."""
    return model.can_generate() and not model.config.is_encoder_decoder
