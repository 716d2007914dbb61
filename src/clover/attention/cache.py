"""A KV-cache layer that grows in place: a new token is written, not the whole cache copied."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from clover.errors import CloverError

ROOM, LEAST = 8, 64
"""A buffer that is full grows by an ``1 / ROOM`` of its tokens, and by ``LEAST`` of them at least."""
WHICH = "keys", "values"
STEP, ANY_LENGTH = 64, ("cpu",)
"""Tokens in one of the lengths that products are given, see ``stepped``, but on devices that take any length."""


class GrowingLayer(DynamicLayer):
    """A ``DynamicLayer`` whose ``keys`` and ``values`` are views into buffers with room for more tokens.

    Whatever else is done to a cache (cropping, reordering for beams, moving) leaves other tensors in their place;
    they are taken over into a fresh buffer at the next token.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, Tensor] = {}

    def __copy__(self) -> GrowingLayer:
        """Both go on from here, each in a buffer of its own."""
        twin = object.__new__(type(self))
        twin.__dict__ |= vars(self) | {"buffers": {}}
        return twin

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``(batch, heads, new tokens, columns)``; returns the whole, of which it keeps views."""
        if torch.compiler.is_compiling() or key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(
        self, which: str, fresh: Shaped[Tensor, "batch heads new size"]
    ) -> Shaped[Tensor, "batch heads tokens size"]:
        held, buffer = getattr(self, which), self.buffers.get(which)
        had = held.shape[-2] if held.dim() > 1 else 0  # a layer begins with empty vectors
        total = had + fresh.shape[-2]
        frozen = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if buffer is None or frozen or buffer.shape[-2] < total or not _begins(held, buffer):
            room = -(-(total + max(LEAST, total // ROOM)) // STEP) * STEP
            buffer = self.buffers[which] = fresh.new_empty(*fresh.shape[:2], room, fresh.shape[-1])
            buffer[:, :, total:] = 0  # what is there may be read, if not used
            if had:
                buffer[:, :, :had] = held
        buffer.narrow(2, had, fresh.shape[2]).copy_(fresh)
        return buffer.narrow(2, 0, total)

    def stepped(self) -> tuple[Tensor, Tensor]:
        """Keys and values up to a whole number of ``STEP`` tokens; those that are not there yet are finite, no more.

        The first product of each shape costs cuBLAS 0.1 to 0.2 ms, several times the product itself, and a cache has
        another length for each token; and rows of logits that end in no whole 16 bytes have slower kernels.
        """
        tokens = -(-self.keys.shape[-2] // STEP) * STEP
        if not all(name in self.buffers and _begins(getattr(self, name), self.buffers[name]) for name in WHICH):
            return self.keys, self.values
        keys, values = (self.buffers[name].narrow(2, 0, tokens) for name in WHICH)
        return keys, values

    def reset(self) -> None:
        """Forget all tokens."""
        self.buffers = {}
        super().reset()


def _begins(held: Tensor, buffer: Tensor) -> bool:
    """Whether what is held is still the beginning of the buffer, for all its sequences."""
    same = held.data_ptr() == buffer.data_ptr() and held.shape[0] == buffer.shape[0]
    return same and held.stride() == buffer.stride()


def grow(cache: Cache, layer: int) -> None:
    """Let an empty dynamic layer of a cache be one that grows in place; any other kind stays what it is.

    Raises:
        CloverError: the layer holds keys of other heads.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    held = getattr(cache.layers[layer], "keys", None)
    if isinstance(held, Tensor) and held.dim() == 4 and held.shape[1] != 1:
        raise CloverError(
            f"the cache holds keys of {held.shape[1]} heads, as the unpruned model or prefix tuning makes them; begin "
            "with an empty cache, and tune a pruned model by its weights or by a prompt"
        )
    if type(cache.layers[layer]) is DynamicLayer and not cache.layers[layer].is_initialized and not cache.offloading:
        cache.layers[layer] = GrowingLayer()


def stepped(cache: Any, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``(batch, tokens, columns)`` of a layer, on GPUs up to a step, see ``GrowingLayer.stepped``."""
    if cache is None or keys.device.type in ANY_LENGTH or torch.compiler.is_compiling():
        return keys, values
    held = getattr(cache, "self_attention_cache", cache).layers[layer]
    if not isinstance(held, GrowingLayer):
        return keys, values
    keys, values = held.stepped()
    return keys[:, 0], values[:, 0]
