"""Run a model a layer at a time, all batches through one layer before the next is looked at.

A layer is an entry of a list of modules that holds attention. What each layer is called with (masks, positions, the
output of an encoder) is found by running the model's own forward with its layers left out; only hidden states are
carried from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clover.errors import CloverError, reason
from clover.model.block import Block
from clover.model.running import forward, replaced
from clover.progress import track

MEMORY = 2**28
"""Bytes of hidden states that are carried in memory, on a GPU a quarter of what is free; the rest lies on disk."""


@dataclass(frozen=True)
class Stack:
    """A list of layers: its path in the model, and the layers' numbers."""

    name: str
    layers: tuple[str, ...]


@dataclass
class Call:
    """What one layer is called with for one batch, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Layer = Callable[[str, Iterable[tuple[Tensor, Call]]], nn.Module]
"""Is given a layer's path and its inputs, batch by batch; returns the module that carries them on."""


def stacks(model: nn.Module, blocks: Sequence[Block]) -> list[Stack]:
    """The lists of layers that hold the blocks, in the order of the model's modules.

    Raises:
        CloverError: a block in no list.
    """
    found: dict[str, nn.ModuleList] = {}
    for block in blocks:
        parts = block.name.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts)))
        lists = {path: m for path in paths if isinstance(m := model.get_submodule(path), nn.ModuleList)}
        if not lists:
            raise CloverError(f"{block.name} is in no list of layers; calibrate the model in memory")
        found |= dict([next(iter(lists.items()))])
    return [Stack(name, tuple(f"{name}.{i}" for i in range(len(layers)))) for name, layers in found.items()]


class Carried(Sequence[Tensor]):
    """Hidden states of each batch: in memory up to a size, beyond it in files of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.left = folder, MEMORY
        self.held: list[Tensor | Path] = []
        self.device = "cpu"

    def append(self, value: Tensor) -> None:
        """Add a batch."""
        if value.is_cuda and not self.held:
            self.left = torch.cuda.mem_get_info(value.device)[0] // 4
        self.left, self.device = self.left - value.nbytes, str(value.device)
        if self.left >= 0 or self.folder is None:
            self.held.append(value)
        else:
            self.folder.mkdir(exist_ok=True)
            self.held.append(self.folder / f"{id(self)}-{len(self.held)}.safetensors")
            self[len(self.held) - 1] = value

    def __setitem__(self, at: int, value: Tensor) -> None:
        place = self.held[at]
        if isinstance(place, Path):
            save_file({"hidden": value.contiguous()}, place)
        else:
            self.held[at] = value

    def __getitem__(self, at: Any) -> Any:
        value = self.held[at]
        return load_file(value, device=self.device)["hidden"] if isinstance(value, Path) else value

    def __len__(self) -> int:
        return len(self.held)


@torch.no_grad()
def walk(
    model: nn.Module, order: Sequence[Stack], batches: Sequence[Any], layer: Layer, spill: Path | None = None
) -> None:
    """Take batches through all layers of a model.

    Args:
        model: its modules outside the layers must have weights, save those behind the last layer.
        order: the lists of layers, see ``stacks``.
        batches: mappings of the forward's arguments, or tensors for the first.
        layer: called for each layer in turn.
        spill: a folder for hidden states that don't fit ``MEMORY``.

    Raises:
        CloverError: a layer that can't be run alone.
    """
    done: dict[str, Carried] = {}
    forms: dict[str, Form] = {}
    for stack in order:

        def record(at: int, form: Form | None, stack: Stack = stack) -> tuple[Tensor, list[Call]]:
            return _record(model, order, stack, batches[at], {name: of[at] for name, of in done.items()}, forms, form)

        hidden, calls = Carried(spill), []
        for at in range(len(batches)):
            first, found = record(at, None)
            hidden.append(first)
            calls.append(found)
        for i, name in enumerate(track(stack.layers, "layers")):
            module = layer(name, zip(hidden, [found[i] for found in calls], strict=True))
            for at in range(len(batches)):
                hidden[at], rest = run(module, hidden[at], calls[at][i])
                if i == 0:  # only now it is known what the model hands from layer to layer
                    calls[at] = record(at, Form(rest))[1]
                    forms[stack.name] = Form(None if rest is None else (None,) * len(rest))
        done[stack.name] = hidden


def entered(model: nn.Module, order: Sequence[Stack], batch: Any) -> list[str]:
    """The stacks that a batch enters, by name, in their order: as far as a model whose layers do nothing can be run."""
    found: list[str] = []

    def note(name: str, *args: Any, **kwargs: Any) -> Tensor:
        found.append(name)
        return args[0] if args else kwargs["hidden_states"]

    stubs = {model.get_submodule(layer): partial(note, stack.name) for stack in order for layer in stack.layers}
    with replaced(stubs), suppress(Exception), torch.no_grad():  # what layers return may matter, as does the head
        forward(model, batch)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Form:
    """How layers return hidden states: alone, or with what else the first of them returned, such as a position bias."""

    rest: tuple[Any, ...] | None

    def of(self, hidden: Tensor) -> Any:
        """What a layer would have returned."""
        return hidden if self.rest is None else (hidden, *self.rest)


def run(module: nn.Module, hidden: Tensor, call: Call) -> tuple[Tensor, tuple[Any, ...] | None]:
    """Call a layer; returns the hidden states, and what else came in a tuple with them (None without one)."""
    out = module(hidden, *call.args, **call.kwargs)
    return (out, None) if isinstance(out, Tensor) else (out[0], tuple(out[1:]))


class _ReachedError(Exception):
    """The last layer that matters was called; what comes behind it isn't needed."""


def _record(
    model: nn.Module,
    order: Sequence[Stack],
    stack: Stack,
    batch: Any,
    done: Mapping[str, Tensor],
    forms: Mapping[str, Form],
    form: Form | None,
) -> tuple[Tensor, list[Call]]:
    """What goes into the first layer of a stack, and what its layers are called with, behind what is done.

    Args:
        forms: of the stacks that are done.
        form: of this one; while it is not known, only the first layer's call is found.
    """
    calls: list[Call] = []
    first: list[Tensor] = []

    def note(last: bool, *args: Any, **kwargs: Any) -> Any:
        given = dict(kwargs)
        hidden = args[0] if args else given.pop("hidden_states")
        if first and hidden is not first[-1] and not torch.equal(hidden, first[-1]):
            raise CloverError(
                f"{type(model).__name__} changes hidden states between the layers of {stack.name} (as where features "
                "of images are added there); calibrate it in memory"
            )
        first.append(hidden)
        calls.append(Call(args[1:], given))
        if last or form is None:
            raise _ReachedError
        return form.of(hidden)

    def skip(result: Tensor | None, past: bool, form: Form, *args: Any, **kwargs: Any) -> Any:
        if result is None:
            hidden = args[0] if args else kwargs["hidden_states"]
            # Whoever reads a layer's output beside the last one's must not take this for it.
            result = torch.full_like(hidden, torch.nan) if past else hidden
        return form.of(result)

    stubs: dict[str, Callable[..., Any]] = {}
    for other in order:
        for name in other.layers:
            last = name == other.layers[-1]
            result, known = done.get(other.name) if last else None, forms.get(other.name, Form(None))
            past = other.name in done
            stubs[name] = partial(note, last) if other == stack else partial(skip, result, past, known)
    with replaced({model.get_submodule(name): stub for name, stub in stubs.items()}):
        try:
            forward(model, batch)
        except _ReachedError:
            if not first[0].isfinite().all():
                raise CloverError(
                    f"what comes into {stack.name} is not finite: it reads outputs of single layers before it (as with "
                    "vision_feature_layer -2), or weights or data are damaged; calibrate the model in memory"
                ) from None
            return first[0], calls
        except RuntimeError as error:
            raise CloverError(
                f"the model can't be run up to {stack.name} alone ({reason(error)}); calibrate it in memory"
            ) from error
    raise CloverError(f"no calibration batch reached {stack.name}; give batches that run that part of the model")
