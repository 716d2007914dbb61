"""CLOVER: make the attention of trained transformers smaller and tunable in its own latent space (arXiv 2411.17426)."""

from clover.budget import Limits
from clover.checkpoint import load, save
from clover.errors import CloverError, UnsupportedModelError
from clover.plan import Plan
from clover.pruning import inspect, orthogonalize, plan_of, prune, summary
from clover.streaming import prune_folder

try:  # peft then loads adapters of this method by their name
    from clover.config import CloverConfig
    from clover.tuner import register
except ImportError as error:
    _missing = str(error)

    def __getattr__(name: str) -> object:
        if name == "CloverConfig":
            raise ImportError(
                f"clover.CloverConfig needs peft 0.21 or later ({_missing}); pip install 'clover-attention[tune]'"
            )
        raise AttributeError(f"module 'clover' has no attribute {name!r}")
else:
    register()


__version__ = "0.1.0"
__all__ = [
    "CloverConfig",
    "CloverError",
    "Limits",
    "Plan",
    "UnsupportedModelError",
    "inspect",
    "load",
    "orthogonalize",
    "plan_of",
    "prune",
    "prune_folder",
    "save",
    "summary",
]
