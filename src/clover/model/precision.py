"""Where and in which dtype a model is computed with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    named = chain(model.named_parameters(), model.named_buffers())
    return ((name, tensor) for name, tensor in named if tensor.is_floating_point())


def or_wider(dtype: torch.dtype) -> str:
    """What else can be done about numbers that are not finite; nothing where they are wide already."""
    return "" if not dtype.is_floating_point or torch.finfo(dtype).bits >= 32 else ", or use float32"


def ready(model: Any, narrow: Collection[str] = ()) -> tuple[Any, Callable[[Any], Any]]:
    """The model where and in the dtype that it can be computed with, and what gives its tensors their dtypes back.

    One that was quantised when it was loaded stays as it is. A few tensors of a narrow model may be wide, since they
    would lose by less, and never get narrow between.

    Args:
        narrow: modules whose tensors are wide in memory alone.
    """
    main = next(model.parameters()).dtype
    wide = ((name, t.dtype) for name, t in _floats(model) if t.dtype != main)
    others = {name: dtype for name, dtype in wide if set(narrow).isdisjoint(name.split("."))}

    def restore(model: Any) -> Any:
        for name, tensor in _floats(model):
            tensor.data = tensor.data.to(others.get(name, main))
        return model

    if getattr(model, "is_quantized", False):
        return model, restore
    device, dtype = workplace(main)
    # A GPU computes in the dtypes that there are: to make one of them all would narrow those that must stay wide.
    return (model.to(device) if device.type == "cuda" else model.to(device, dtype)), restore


def workplace(dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where a model is computed with: on the GPU, else in float32, since half precision crawls on a CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda"), dtype
    return torch.device("cpu"), torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@contextmanager
def exact_products() -> Iterator[None]:
    """While it lasts, products of float32 are not shortened (TF32): sums of such are no Grams any more."""
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    kinds = [backend.matmul for backend in backends if hasattr(backend, "matmul")]
    if not hasattr(kinds[0], "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    held = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, held, strict=True):
            kind.fp32_precision = precision


def unrounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would give the products of float32 half precision."""

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return computed
