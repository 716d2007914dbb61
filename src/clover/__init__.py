"""CLOVER: make the attention of trained transformers smaller and tunable in its own latent space (arXiv 2411.17426)."""

from clover.errors import CloverError, UnsupportedModelError
from clover.measure.data import calibration_batches
from clover.measure.evaluate import evaluate
from clover.planning.budget import Limits
from clover.planning.plan import Plan
from clover.pruning.checkpoint import load, save
from clover.pruning.prune import inspect, orthogonalize, plan_of, prune, summary
from clover.streaming.stream import prune_folder

__version__ = "0.1.0"
__all__ = [
    "CloverError",
    "Limits",
    "Plan",
    "UnsupportedModelError",
    "calibration_batches",
    "evaluate",
    "inspect",
    "load",
    "orthogonalize",
    "plan_of",
    "prune",
    "prune_folder",
    "save",
    "summary",
]

try:  # peft then loads adapters of this method by their name
    from clover.tuning.tuner import register
except ImportError as error:
    _missing = str(error)

    def __getattr__(name: str) -> object:
        if name == "CloverConfig":
            raise ImportError(
                f"clover.CloverConfig needs peft 0.21 or later ({_missing}); pip install 'clover-attention[tune]'"
            )
        raise AttributeError(f"module 'clover' has no attribute {name!r}")
else:
    from clover.tuning.config import CloverConfig

    register()
    __all__ += ["CloverConfig"]
