"""Find the attention blocks of a model, by the rows of ``families``."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from clover.errors import CloverError, UnsupportedModelError, warn
from clover.model.alike import alike
from clover.model.block import Block
from clover.model.families import APART, CROSS, FAMILIES, PACKED, REFUSED, WRITERS
from clover.model.family import Family


def blocks(model: nn.Module, part: str = "all") -> list[Block]:
    """Find the attention blocks of a model, in the order of its modules.

    Args:
        part: ``encoder`` (self-attention that reads), ``decoder`` (self-attention that writes), ``cross`` or ``all``.

    Warns of blocks that stay as they are.

    Raises:
        UnsupportedModelError: all parts are wanted, and there is an attention class that no row describes.
        CloverError: the model has no block in that part, or is pruned already.
    """
    found, others = survey(model)
    kind, parts = type(model).__name__, sorted({b.part for b in found})
    if others and part in ("all", *(() if found else (part,))):
        alone = f"; or give a part ({' or '.join(parts)}), and it stays as it is" if found else ""
        raise UnsupportedModelError(f"{others[0]}{alone}")
    if not found:
        raise _unsupported(f"{kind} has no attention block of a known class{_packed(model)}")
    chosen = [b for b in found if part in ("all", b.part)]
    if not chosen:
        unknown = f" that is known: {others[0]}" if others else ""
        raise CloverError(
            f"{kind} has no attention block in part {part!r}{unknown}{_packed(model)}; it has {', '.join(parts)}"
        )
    if others:
        warn(f"some attention stays as it is: {others[0]}")
    return chosen


def survey(model: nn.Module) -> tuple[list[Block], list[UnsupportedModelError]]:
    """The attention blocks that a row describes, in the order of the modules, and what is wrong with each other one.

    Raises:
        CloverError: the model is pruned already.
    """
    found: list[Block] = []
    others: list[UnsupportedModelError] = []
    covered: list[str] = []
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for name, module in model.named_modules():
        kind = type(module)
        if hasattr(module, "clover"):
            raise CloverError(f"{name} was rewritten by clover before; start from the original model")
        if (block := block_of(model, name, module)) is not None:
            try:
                why = _obstacle(block, places[id(module)], _owner(model, name.split(".")))
            except CloverError as error:
                others.append(UnsupportedModelError(str(error)))
            else:
                found += [block] if why is None else []
                others += [] if why is None else [_refused(name, kind, why)]
            covered.append(name + ".")
        elif kind.__name__ in REFUSED:
            others.append(_refused(name, kind, REFUSED[kind.__name__]))
        elif _needs_a_row(kind) and not name.startswith(tuple(covered)) and not _holds_a_block(module):
            others.append(_unsupported(f"{type(model).__name__} has attention of class {kind.__name__}"))
    return found, others


def _obstacle(block: Block, places: list[str], owner: nn.Module) -> str | None:
    """Why a block that its row describes can't be rewritten, if so.

    Args:
        places: its names in the model.
        owner: the model of transformers that holds it; in a larger one, others have tables of their own.

    Raises:
        CloverError: the config contradicts the model.
    """
    if block.part == "cross" and block.rotary:
        return "its queries and keys turn by positions in two sequences"
    if len(places) > 1:
        return f"it is also {places[1]}, in which it would stay as it is"
    tables = (t for name, t in owner.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    turned = {2 * table.numel() for table in tables} if block.rotary else set()
    if turned and block.rotary not in turned:
        raise CloverError(
            f"the model rotates {' or '.join(map(str, sorted(turned)))} columns of a head, but its config says "
            f"{block.rotary}; correct partial_rotary_factor in config.json"
        )
    return next((why for setting, why in block.family.unless.items() if block.get(setting)), None)


def is_attention(module: nn.Module) -> bool:
    """Whether a row describes the class of this module."""
    return _row_of(module) is not None


def _row_of(module: nn.Module) -> Family | None:
    """The row of a class of transformers: its own, or that of a class in the table whose code it is."""
    kind: Any = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    if kind.__name__ in FAMILIES or kind.__name__ in REFUSED or not _needs_a_row(kind):
        return FAMILIES.get(kind.__name__)
    fitting = tuple(name for name, family in FAMILIES.items() if family.fits(module))
    return FAMILIES.get(alike(kind, fitting) or "") if fitting else None


def _needs_a_row(kind: Any) -> bool:
    """Whether a class is called attention and is none of those that stay as they are."""
    return kind.__name__.endswith("Attention") and kind.__name__ not in APART and not _packs(kind)


def _packs(kind: Any) -> bool:
    return PACKED in inspect.signature(kind.forward).parameters


def _packed(model: nn.Module) -> str:
    """What is to be said of attention that stays dense because it reads items of many sizes as one row."""
    kinds = {type(m) for m in model.modules() if type(m).__name__.endswith("Attention") and _packs(type(m))}
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    return f" (its {names} reads items of many sizes as one row, and stays as it is)" if names else ""


def _holds_a_block(module: nn.Module) -> bool:
    """Whether a class called attention puts norms or a residual around one."""
    return any(is_attention(child) for child in module.children())


def block_of(model: nn.Module, name: str, module: nn.Module) -> Block | None:
    """The block of an attention module that a row describes; ``name`` is its path in ``model``."""
    family = _row_of(module)
    if family is None:
        return None
    core = module.get_submodule(family.core)
    path = name.split(".")
    part = "cross" if path[-1] in CROSS else "decoder" if _writes(core, family, path) else "encoder"
    causal = part != "cross" and bool(getattr(core, "is_causal", family.causal))
    config = getattr(core, "config", None) or _owner(model, path).config
    return Block(name, part, replace(family, causal=causal), module, config)


def _owner(model: Any, path: list[str]) -> Any:
    """The innermost model of transformers that holds a module."""
    above = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path) - 1, 0, -1))
    return next((module for module in above if isinstance(module, PreTrainedModel)), model)


def _writes(core: Any, family: Family, path: list[str]) -> bool:
    """Whether a self-attention belongs to what writes and keeps a cache; a causal one does, and not only that."""
    return bool(getattr(core, "is_causal", family.causal) or getattr(core, "is_decoder", not WRITERS.isdisjoint(path)))


def _refused(name: str, kind: type, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is of class {kind.__name__}, which clover can't rewrite exactly: {why}; choose another model"
    )


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}, which clover doesn't support; README.md says what it does, CONTRIBUTING.md how to add a family"
    )
