"""Tiny models with an adapter, as the tests of tuning want them."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from clover import CloverConfig
from families import build, outputs


def config(**kwargs: Any) -> CloverConfig:
    return CloverConfig(**{"block_size": 16, **kwargs})


def disturb(model: nn.Module, scale: float = 0.02) -> None:
    """Pretend to have trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn_like(parameter))


def fresh(name: str = "llama-gqa") -> tuple[Any, dict[str, torch.Tensor]]:
    return build(name, torch.float32)


def tuned(name: str = "llama-gqa", **kwargs: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A model with a disturbed adapter, its batch, and what it computes."""
    model, batch = fresh(name)
    model = get_peft_model(model, config(**kwargs)).eval()
    disturb(model)
    return model, batch, outputs(model, batch)
