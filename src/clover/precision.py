"""Where and in which dtype a model is computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights."""
    return next(model.parameters()).dtype


def ready(model: Any) -> tuple[Any, torch.dtype]:
    """The model where and in the dtype that it can be computed with, and the dtype that it had.

    One that was quantised when it was loaded stays as it is.
    """
    dtype = dtype_of(model)
    return (model if getattr(model, "is_quantized", False) else model.to(*workplace(dtype))), dtype


def workplace(dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where a model is computed with: on the GPU, else in float32, since half precision crawls on a CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda"), dtype
    return torch.device("cpu"), torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
