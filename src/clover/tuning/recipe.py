"""One tuning run in settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from clover.errors import CloverError

METHODS = {"clover": 3e-4, "lora": 1e-3, "dora": 1e-3, "pissa": 1e-4}
"""Each with the learning rate that was best for SmolLM2-135M on the commonsense sets, see docs/results.md."""


@dataclass(frozen=True)
class Recipe:
    """One run, whole: with the same recipe, data and base another run gives the same adapter."""

    method: str = "clover"
    steps: int = 100
    lr: float | None = None
    """The largest; None takes that of ``METHODS``."""
    batch: int = 8
    """Examples a step, in each process."""
    seed: int = 0
    warmup: int = 10
    """Steps over which the learning rate rises; it then falls to zero along a line."""
    length: int = 512
    """Tokens at most in an example, and no more than the model has positions for."""
    parts: tuple[str, ...] = ("qk", "vo", "up")
    core: str = "full"
    block_size: int = 64
    """Rows in a block of an MLP projection."""
    rank: int | None = None
    """Of the LoRA methods; None takes the rank nearest to CLOVER's number of parameters."""

    @property
    def rate(self) -> float:
        """The largest learning rate."""
        return METHODS[self.method] if self.lr is None else self.lr

    @property
    def rise(self) -> int:
        """Steps of warm-up: no more than half of all."""
        return min(self.warmup, self.steps // 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the learning rate and the warm-up that are used."""
        return asdict(self) | {"lr": self.rate, "warmup": self.rise}

    def check(self) -> None:
        """Refuse what can't be run.

        Raises:
            CloverError: names the value and its remedy.
        """
        if self.method not in METHODS:
            raise CloverError(f"method {self.method!r} is unknown; choose among {', '.join(METHODS)}")
        for name, least in {"steps": 1, "batch": 1, "length": 2, "block_size": 1}.items():
            if getattr(self, name) < least:
                raise CloverError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.rate < math.inf:
            raise CloverError(f"lr is {self.lr}; it must be a positive finite number")
        if not 0 <= self.seed < 2**32:
            raise CloverError(f"seed is {self.seed}; it must be at least 0 and less than 2**32")
        if self.rank is not None and self.rank < 1:
            raise CloverError(f"rank is {self.rank}; it must be at least 1")
        if self.rank is not None and self.method == "clover":
            raise CloverError(f"rank is {self.rank}, but clover has none: its cores are as wide as heads; leave it out")
