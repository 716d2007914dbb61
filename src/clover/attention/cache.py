"""A KV-cache layer that grows in place: a new token is written, not the whole cache copied."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from clover.errors import CloverError

GROWTH, LEAST = 8, 64
"""A buffer that is full grows by an ``1 / GROWTH`` of its tokens, and by ``LEAST`` of them at least."""
STEP, ANY_LENGTH = 64, ("cpu",)
"""Tokens in one of the lengths that products are given, see ``stepped``, but on devices that take any length."""


class Room:
    """Tokens at the beginning of a buffer ``(batch, room, columns)``."""

    def __init__(self, buffer: Tensor, tokens: int) -> None:
        self.buffer, self.tokens = buffer, tokens

    @classmethod
    def of(cls, held: Any, fresh: Tensor) -> Room:
        """The tokens that are held, ``(batch, 1, tokens, columns)``, with room for those of ``fresh`` and some more."""
        had = held.shape[2] if held is not None and held.dim() > 1 else 0  # a layer may begin with empty vectors
        total = had + fresh.shape[1]
        length = -(-(total + max(LEAST, total // GROWTH)) // STEP) * STEP
        buffer = fresh.new_empty(fresh.shape[0], length, fresh.shape[2])
        if fresh.device.type not in ANY_LENGTH:  # what is there may be read, if not used, see ``stepped``
            buffer.narrow(1, total, length - total).zero_()
        if had:
            buffer[:, :had] = held[:, 0]
        return cls(buffer, had)

    def takes(self, new: int) -> bool:
        """Whether that many more tokens can be written into it."""
        frozen = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        return self.tokens + new <= self.buffer.shape[1] and not frozen

    def view(self) -> Tensor:
        """``(batch, 1, tokens, columns)``."""
        return self.buffer.narrow(1, 0, self.tokens).unsqueeze(1)

    def __getstate__(self) -> dict[str, Any]:
        """What may be written to a file: none of what the memory held before."""
        buffer = self.buffer.clone()
        buffer[:, self.tokens :] = 0
        return {"buffer": buffer, "tokens": self.tokens}


class GrowingLayer(DynamicLayer):
    """A ``DynamicLayer``; the flat columns of one "head", its ``keys`` and ``values`` lie in buffers with room.

    Cropping leaves them there, so what ``keys`` gave before is overwritten by the tokens that follow. Whatever else is
    done to a cache (reordering for beams, moving) leaves other tensors in their place; they are taken over into a fresh
    buffer at the next token.
    """

    def __init__(self) -> None:
        self.rooms: dict[str, Any] = {"keys": None, "values": None}  # a ``Room``, or what was put in its place
        super().__init__()

    def _held(self, which: str) -> Any:
        room = self.rooms[which]
        return room.view() if isinstance(room, Room) else room

    keys: Any = property(lambda self: self._held("keys"), lambda self, held: self.rooms.update(keys=held))
    values: Any = property(lambda self: self._held("values"), lambda self, held: self.rooms.update(values=held))

    def __copy__(self) -> GrowingLayer:
        """Both go on from here, each in a buffer of its own."""
        twin = object.__new__(type(self))
        held = {which: self._held(which) for which in self.rooms}
        twin.__dict__ |= vars(self) | {"rooms": {k: x.clone() if isinstance(x, Tensor) else x for k, x in held.items()}}
        return twin

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forget the last tokens, as a ``DynamicLayer`` does."""
        rooms = dict(self.rooms)
        super().crop(*args, **kwargs)
        for which, held in self.rooms.items():
            room = rooms[which]
            if isinstance(room, Room) and held is not room:
                room.tokens = held.shape[2]
                self.rooms[which] = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``(batch, 1, new tokens, columns)``; returns the whole. Those of other heads are not kept flat."""
        if key_states.shape[1] != 1 or not writable(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self.append(key_states.squeeze(1), value_states.squeeze(1))
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``(batch, new tokens, columns)``; returns the whole, in the same form."""
        self.dtype, self.device = keys.dtype, keys.device
        whole = self._append("keys", keys), self._append("values", values)
        self.is_initialized = True
        return whole

    def _append(self, which: str, fresh: Shaped[Tensor, "batch new columns"]) -> Shaped[Tensor, "batch tokens columns"]:
        room, new = self.rooms[which], fresh.shape[1]
        if type(room) is not Room or not room.takes(new):
            room = self.rooms[which] = Room.of(self._held(which), fresh)
        room.buffer.narrow(1, room.tokens, new).copy_(fresh)
        room.tokens += new
        return room.buffer.narrow(1, 0, room.tokens)

    def stepped(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values up to a whole number of ``STEP`` tokens; those that are not there yet are finite, no more.

        The first product of each shape costs cuBLAS 0.1 to 0.2 ms, several times the product itself, and a cache has
        another length for each token; and rows of logits that end in no whole 16 bytes have slower kernels.
        """
        keys, values = self.rooms.values()
        if not isinstance(keys, Room) or not isinstance(values, Room):
            return None
        tokens = -(-keys.tokens // STEP) * STEP
        return keys.buffer.narrow(1, 0, tokens), values.buffer.narrow(1, 0, tokens)


def writable(keys: Tensor, values: Tensor) -> bool:
    """Whether these may be written into a buffer: no graph, of a compiler or of gradients, must know of them."""
    return not (keys.requires_grad or values.requires_grad or torch.compiler.is_compiling())


def plain(cache: Any) -> bool:
    """Whether all that the cache does with new tokens is to hand them to its layer."""
    return type(cache).update is Cache.update and "update" not in vars(cache) and not cache.offloading


def begun(cache: Any, layer: int, tokens: int) -> bool:
    """Whether a layer that grows in place holds these last tokens and no others."""
    held = cache.layers[layer]
    return type(held) is GrowingLayer and plain(cache) and held.rooms["keys"].tokens == tokens


def append(cache: Cache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Put ``(batch, new tokens, columns)`` behind what a layer of the cache holds; returns the whole.

    An empty dynamic layer becomes one that grows in place, see ``grow``; any other kind stays what it is.

    Raises:
        CloverError: the layer holds keys of other heads.
    """
    held = cache.layers[layer] if layer < len(cache.layers) else None
    if type(held) is not GrowingLayer:
        held = grow(cache, layer)
    if type(held) is GrowingLayer and plain(cache) and writable(keys, values):
        return held.append(keys, values)
    keys, values = cache.update(keys.unsqueeze(1), values.unsqueeze(1), layer)
    return keys.squeeze(1), values.squeeze(1)


def grow(cache: Cache, layer: int) -> Any:
    """The layer; an empty dynamic one becomes one that grows in place, and so do those behind it.

    All at once: code that runs between large products is slow, for they drive it out of the processor's caches.

    Raises:
        CloverError: it holds keys of other heads.
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
    if untouched(cache.layers[layer]) and not cache.offloading:
        cache.layers[layer:] = [GrowingLayer() if untouched(other) else other for other in cache.layers[layer:]]
    return cache.layers[layer]


def untouched(layer: Any) -> bool:
    """Whether nothing was ever put into this dynamic layer, and it is of no other kind."""
    return type(layer) is DynamicLayer and not layer.is_initialized


def stepped(cache: Any, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``(batch, tokens, columns)`` of a layer, on GPUs up to a step, see ``GrowingLayer.stepped``."""
    if keys.device.type in ANY_LENGTH or cache is None or torch.compiler.is_compiling():
        return keys, values
    cache = getattr(cache, "self_attention_cache", cache)
    held = cache.layers[layer]
    return (held.stepped() if isinstance(held, GrowingLayer) and plain(cache) else None) or (keys, values)
