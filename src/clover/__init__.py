"""CLOVER: make the attention of trained transformers smaller in its own latent space (arXiv 2411.17426)."""

from clover.budget import Limits
from clover.checkpoint import load, save
from clover.errors import CloverError, UnsupportedModelError
from clover.plan import Plan
from clover.pruning import inspect, orthogonalize, plan_of, prune, summary

__version__ = "0.1.0"
__all__ = [
    "CloverError",
    "Limits",
    "Plan",
    "UnsupportedModelError",
    "inspect",
    "load",
    "orthogonalize",
    "plan_of",
    "prune",
    "save",
    "summary",
]
