"""What of a model is exported: graphs of plain tensors, with a name for all that goes in and out.

A language model is one graph with its KV-cache as inputs and outputs, empty before the first token; an encoder-decoder
is two, of which the encoder also makes the cache of cross-attention; a model of two towers is one graph for each;
anything else is one graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from clover.errors import UnsupportedModelError
from clover.measure.cost import random_inputs
from clover.model.answers import INPUTS
from clover.model.traits import accepts, writes_text

Shape = tuple[int | str, ...]
"""Sizes of a tensor; a string names one that is free."""
PADDED = 2
"""Tokens of the first sequence of an example that are padding."""


@dataclass(frozen=True)
class Graph:
    """One graph: what computes it, and what goes in and out."""

    name: str
    module: nn.Module
    """Takes the inputs in their order and returns the outputs in theirs."""
    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]
    fill: Callable[[Mapping[str, int]], dict[str, Tensor]]
    """Makes inputs of given free sizes; random, but such as the model could meet."""
    free: tuple[Mapping[str, int], ...]
    """Sizes to try: the first is traced, with all the others the graph is checked."""

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs with PyTorch."""
        return dict(zip(self.outputs, self.module(*inputs.values()), strict=True))


class _Call(nn.Module):
    """A function of a model and plain tensors, as a module: what exporters take."""

    def __init__(self, model: nn.Module, compute: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.compute(*tensors)


def graphs(model: Any) -> list[Graph]:
    """The graphs that together are the model, in evaluation mode."""
    if experts := next((m for m in model.modules() if type(m).__name__.endswith("Experts")), None):
        raise UnsupportedModelError(
            f"{type(model).__name__} has {type(experts).__name__}, each of which takes as many tokens as it happens "
            "to be sent; run it in PyTorch"
        )
    if writes_text(model):
        if senses := accepts(model).keys() & {*INPUTS} - {"input_ids"}:
            raise UnsupportedModelError(
                f"{type(model).__name__} also reads {min(senses)}, for which its graph would have no place; "
                "use --format padded"
            )
        return [_decoder(model)]
    if model.can_generate() and model.config.is_encoder_decoder:
        if "input_ids" in accepts(model.get_encoder()):
            raise UnsupportedModelError(
                f"{type(model).__name__} reads text in its encoder, and of encoder-decoders only those of speech are "
                "written as ONNX; use --format padded"
            )
        encoder = _cross_encoder(model)
        return [encoder, _cross_decoder(model, encoder)]
    towers = {"text": "get_text_features", "vision": "get_image_features"}
    if all(hasattr(model, method) for method in towers.values()):
        return [_plain(model, f"{name}_model", getattr(model, method)) for name, method in towers.items()]
    return [_plain(model, "model", model)]


# --- without a cache ---

_SIZES = ((2, 8), (1, 5), (3, 9))
"""Batch, and tokens where there are any."""


def _plain(model: Any, name: str, call: Callable[..., Any]) -> Graph:
    """A graph without a cache; of tokens, sequence length and padding are free."""
    reads = inspect.signature(getattr(call, "forward", call)).parameters
    example = {k: v for k, v in random_inputs(model, 2, 8).items() if k in reads}
    inputs: dict[str, Shape] = {k: ("batch", *v.shape[1:]) for k, v in example.items()}
    if "input_ids" in inputs:
        texts = [k for k in ("input_ids", "attention_mask", "token_type_ids") if k in reads]
        inputs |= dict.fromkeys(texts, ("batch", "sequence"))

    def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors(call(**dict(zip(inputs, tensors, strict=True)))).values())

    def fill(free: Mapping[str, int]) -> dict[str, Tensor]:
        made = {k: v for k, v in random_inputs(model, free["batch"], free.get("sequence", 1)).items() if k in inputs}
        if "attention_mask" in inputs:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
            if len(made["input_ids"]) > 1:
                made["attention_mask"][0, -PADDED:] = 0
        if "token_type_ids" in inputs:
            made["token_type_ids"] = torch.zeros_like(made["input_ids"])
        return {k: made[k] for k in inputs}

    names = inputs.get("input_ids", ("batch",))
    free = tuple({k: v for k, v in zip(names, size, strict=False) if isinstance(k, str)} for size in _SIZES)
    with torch.no_grad():
        outputs = tuple(_tensors(call(**fill(free[0]))))
    return Graph(name, _Call(model, compute), inputs, outputs, fill, free)


def _tensors(out: Any) -> dict[str, Tensor]:
    """The tensors that a forward pass returns, by name."""
    return {"features": out} if isinstance(out, Tensor) else {k: v for k, v in out.items() if isinstance(v, Tensor)}


# --- with a cache ---


def _decoder(model: Any) -> Graph:
    """A causal language model: reads any number of tokens behind any number of cached ones."""
    options = [k for k in ("position_ids",) if k in accepts(model)]
    columns = _columns(_cached(model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values))
    past = _cache_inputs(columns, "past_key_values.{}.{}", "past")
    inputs: dict[str, Shape] = {
        "input_ids": ("batch", "sequence"), "attention_mask": ("batch", "past + sequence"),
        **dict.fromkeys(options, ("batch", "sequence")), **past,
    }  # fmt: skip
    plain = len(inputs) - len(past)

    def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, tensors[:plain], strict=False))
        out = model(**named, past_key_values=_cache(tensors[plain:]), use_cache=True)
        return out.logits, *_cached(out.past_key_values)

    def fill(free: Mapping[str, int]) -> dict[str, Tensor]:
        batch, tokens, had = free["batch"], free["sequence"], free["past"]
        made = random_inputs(model, batch, had + tokens)
        mask = torch.ones_like(made["input_ids"])
        if batch > 1 and had > PADDED:
            mask[0, :PADDED] = 0
        made |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        cache = DynamicCache()
        if had:
            before = {k: v[:, :had] for k, v in made.items() if k in inputs}
            with torch.no_grad():
                cache = model(**before, past_key_values=cache, use_cache=True).past_key_values
        made |= {k: made[k][:, had:] for k in ("input_ids", "position_ids")}
        return {k: made[k] for k in inputs if k in made} | _filled(past, cache, free)

    free = (
        {"batch": 2, "sequence": 3, "past": 5}, {"batch": 1, "sequence": 7, "past": 0},
        {"batch": 3, "sequence": 1, "past": 6}, {"batch": 1, "sequence": 1, "past": 1},
    )  # fmt: skip
    outputs = ("logits", *_cache_inputs(columns, "present.{}.{}", "past"))
    return Graph("model", _Call(model, compute), inputs, outputs, fill, free)


def _cross_encoder(model: Any) -> Graph:
    """The encoder of an encoder-decoder, and the cross-attention's keys and values of what it has read."""
    run = model.get_encoder()
    example = {k: v for k, v in random_inputs(model, 2, 8).items() if k in accepts(run)}
    inputs: dict[str, Shape] = {k: ("batch", *v.shape[1:]) for k, v in example.items()}

    def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
        hidden = run(**dict(zip(inputs, tensors, strict=True))).last_hidden_state
        # The decoder runs for its cross-attention's cache alone; the rest of it is cut from the graph.
        start = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        out = model(encoder_outputs=BaseModelOutput(hidden), decoder_input_ids=start, use_cache=True)
        return hidden, *_cached(out.past_key_values.cross_attention_cache)

    def fill(free: Mapping[str, int]) -> dict[str, Tensor]:
        return {k: v for k, v in random_inputs(model, free["batch"], 1).items() if k in inputs}

    with torch.no_grad():
        layers = (len(compute(*example.values())) - 1) // 2
    names = [f"present.{i}.encoder.{kind}" for i in range(layers) for kind in ("key", "value")]
    outputs = ("last_hidden_state", *names)
    return Graph("encoder_model", _Call(model, compute), inputs, outputs, fill, ({"batch": 2}, {"batch": 1}))


def _cross_decoder(model: Any, encoder: Graph) -> Graph:
    """The decoder of an encoder-decoder, which meets the encoder in the cross-attention's cache alone."""
    width = model.config.hidden_size

    def hear(batch: int) -> Tensor:
        return encoder.module(*encoder.fill({"batch": batch}).values())[0]

    with torch.no_grad():
        start = torch.zeros(1, 1, dtype=torch.long)
        cache = model(encoder_outputs=BaseModelOutput(hear(1)), decoder_input_ids=start, use_cache=True).past_key_values
    own, cross = _cached(cache.self_attention_cache), _cached(cache.cross_attention_cache)
    past = _cache_inputs(_columns(own), "past_key_values.{}.decoder.{}", "past")
    heard = _cache_inputs(_columns(cross), "past_key_values.{}.encoder.{}", cross[0].shape[2])
    inputs: dict[str, Shape] = {"input_ids": ("batch", "sequence"), **past, **heard}

    def compute(ids: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        cache = EncoderDecoderCache(_cache(tensors[: len(past)]), _cache(tensors[len(past) :]))
        # Nothing reads it, for all layers have it in their cache; but where it is missing they leave out the attention.
        silence = BaseModelOutput(ids.new_zeros(ids.shape[0], 1, width).to(model.dtype))
        out = model(encoder_outputs=silence, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        return out.logits, *_cached(out.past_key_values.self_attention_cache)

    @torch.no_grad()
    def fill(free: Mapping[str, int]) -> dict[str, Tensor]:
        batch, had = free["batch"], free["past"]
        ids = torch.randint(model.config.vocab_size, (batch, had + free["sequence"]))
        read = ids[:, : max(had, 1)]
        cache = model(encoder_outputs=BaseModelOutput(hear(batch)), decoder_input_ids=read, use_cache=True)
        own, cross = cache.past_key_values.self_attention_cache, cache.past_key_values.cross_attention_cache
        made = _filled(past, own if had else DynamicCache(), free)
        return {"input_ids": ids[:, had:], **made, **_filled(heard, cross, free)}

    free = (
        {"batch": 2, "sequence": 3, "past": 5}, {"batch": 1, "sequence": 4, "past": 0},
        {"batch": 3, "sequence": 1, "past": 6},
    )  # fmt: skip
    outputs = ("logits", *_cache_inputs(_columns(own), "present.{}.decoder.{}", "past"))
    return Graph("decoder_model", _Call(model, compute), inputs, outputs, fill, free)


def _cache(tensors: tuple[Tensor, ...]) -> Cache:
    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


def _cached(cache: Any) -> list[Tensor]:
    """Keys and values of all layers, in turns.

    Raises:
        UnsupportedModelError: a layer keeps another state.
    """
    if stateful := [type(layer).__name__ for layer in cache.layers if hasattr(layer, "recurrent_states")]:
        raise UnsupportedModelError(
            f"the cache has a {stateful[0]}, whose state a graph with keys and values can't carry; run it in PyTorch"
        )
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def _columns(cached: list[Tensor]) -> list[tuple[int, int]]:
    """Heads and columns of each tensor of a cache."""
    return [(t.shape[1], t.shape[3]) for t in cached]


def _cache_inputs(columns: list[tuple[int, int]], name: str, tokens: int | str) -> dict[str, Shape]:
    """Names and shapes of a cache's tensors."""
    kinds = ("key", "value")
    return {
        name.format(i // 2, kinds[i % 2]): ("batch", heads, tokens, size) for i, (heads, size) in enumerate(columns)
    }


def _filled(shapes: Mapping[str, Shape], cache: Any, free: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a cache by name; of an empty one, tensors without tokens."""
    if cache.layers:
        return dict(zip(shapes, _cached(cache), strict=True))
    return {k: torch.zeros([free[s] if isinstance(s, str) else s for s in shape]) for k, shape in shapes.items()}
