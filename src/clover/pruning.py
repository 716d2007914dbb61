"""The public verbs on models: orthogonalise, prune, inspect, summarise."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from clover.attention import CloverAttention
from clover.basis import Basis, find_basis
from clover.budget import Costs, Energy, Granularity, Limits, Rule, Share, Threshold, make_plan
from clover.calibrate import calibrate
from clover.checkpoint import adopt
from clover.errors import CloverError
from clover.families import blocks
from clover.lossbudget import check_bound, keep_apart, within
from clover.plan import Plan, Spectrum
from clover.surgery import operate

Part = Literal["encoder", "decoder", "cross", "all"]
Metric = Literal["activations", "weights"]


def orthogonalize(model: PreTrainedModel, *, part: Part = "all") -> PreTrainedModel:
    """Put every head's Q-K and V-O pair into an orthonormal basis, in place. The model computes what it did before.

    Args:
        part: which attention blocks.

    Returns:
        The same model; its attention modules are ``CloverAttention`` at full rank.

    Raises:
        CloverError: see ``prune``.
    """
    return prune(model, qk=0.0, vo=0.0, part=part, metric="weights")


def prune(
    model: PreTrainedModel,
    *,
    qk: float | None = None,
    vo: float | None = None,
    part: Part = "all",
    calibration: Iterable[Any] | None = None,
    metric: Metric | None = None,
    qk_threshold: float | None = None,
    vo_threshold: float | None = None,
    qk_energy: float | None = None,
    vo_energy: float | None = None,
    max_loss: float | None = None,
    granularity: Granularity = "head",
    limits: Limits | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Remove head directions that carry little, in place, without training (CLOVER, arXiv 2411.17426).

    Each of Q-K and V-O follows one rule: a share to remove, a threshold, or the energy to keep; none means keep all.
    Or a bound on the loss decides about both.

    Args:
        qk, vo: share of the head directions to remove, 0 <= share < 1; one budget over the chosen part of the model.
        part: which attention blocks: ``encoder``, ``decoder`` (causal self-attention), ``cross`` or ``all``.
        calibration: batches for the model's forward (mappings of its arguments, or tensors); a few thousand tokens do.
        metric: ``activations`` measures directions on the calibration data, ``weights`` by the weights alone, as
            published. The default is ``activations`` when there is calibration data.
        qk_threshold, vo_threshold: remove directions whose norm product is at most this (the paper's rule).
        qk_energy, vo_energy: keep in each head the fewest directions with this share of its energy.
        max_loss: instead of all these: remove as much as keeps the perplexity's relative increase under this, 0.02 for
            2 %, on a third of the calibration batches, which is kept for measuring (at least two batches). Of a model
            without logits it is the output's relative squared error. ``clover.lossbudget.within`` tells more.
        granularity: whether ranks are free by ``head``, by ``layer`` or one for the ``model``.
        limits: bounds on the plan, see ``Limits``.
        seed: of the sample of calibration queries.

    Returns:
        The same model, smaller; ``summary(model)`` says by how much and ``save(model, path)`` keeps it.

    Raises:
        UnsupportedModelError: an attention class that no family describes.
        CloverError: a ratio outside [0, 1), weights that are not finite, head counts that contradict the weights, no
            calibration data where the metric needs it, or rules that leave nothing. The model is then unchanged.
    """
    rules = rule("qk", qk, qk_threshold, qk_energy), rule("vo", vo, vo_threshold, vo_energy)
    if max_loss is not None:
        others = (qk, vo, qk_threshold, vo_threshold, qk_energy, vo_energy)
        check_loss(max_loss, calibration if metric != "weights" else None, any(o is not None for o in others))
        used, kept_out = keep_apart(calibration or ())
        bases = find_bases(model, part=part, calibration=used, seed=seed)
        apply(model, bases, within(model, bases, kept_out, max_loss, granularity=granularity, limits=limits).plan)
        return model
    bases = find_bases(model, part=part, calibration=calibration, metric=metric, seed=seed)
    plan = plan_ranks(bases, *rules, granularity=granularity, limits=limits)
    apply(model, bases, plan)
    return model


def find_bases(
    model: PreTrainedModel,
    *,
    part: Part = "all",
    calibration: Iterable[Any] | None = None,
    metric: Metric | None = None,
    seed: int = 0,
) -> list[Basis]:
    """First step of ``prune``: decompose every block; the model stays as it is. Arguments as there."""
    metric = metric or ("weights" if calibration is None else "activations")
    if metric not in ("activations", "weights"):
        raise CloverError(f"metric is {metric!r}; it must be activations or weights")
    if metric == "activations" and calibration is None:
        raise CloverError("metric 'activations' needs calibration data; give some, or choose metric 'weights'")
    found = blocks(model, part)
    for block in found:
        block.heads().check_finite(block.name)
    moments = [None] * len(found)
    if metric == "activations":
        moments = calibrate(model, found, calibration, seed=seed)  # type: ignore[assignment,arg-type]
    return [find_basis(block, m) for block, m in zip(found, moments, strict=True)]


def plan_ranks(
    bases: list[Basis], qk: Rule, vo: Rule, *, granularity: Granularity = "head", limits: Limits | None = None
) -> Plan:
    """Second step of ``prune``: choose ranks. See ``clover.budget.make_plan``."""
    return plan_costs([basis.costs() for basis in bases], qk, vo, granularity=granularity, limits=limits)


def plan_costs(
    costs: Sequence[Costs], qk: Rule, vo: Rule, *, granularity: Granularity = "head", limits: Limits | None = None
) -> Plan:
    """As ``plan_ranks``, from what the directions of each block cost."""
    fixed = sum(c.fixed_qk for c in costs)
    if fixed and qk != Share(0.0):
        warnings.warn(
            f"Q-K of {fixed} of {len(costs)} blocks stays whole: a norm stands between their projections and logits",
            stacklevel=4,
        )
    return make_plan(costs, qk, vo, granularity=granularity, limits=limits)


def apply(model: PreTrainedModel, bases: list[Basis], plan: Plan) -> None:
    """Third step of ``prune``: cut the model to the plan, in place."""
    operate(model, bases, plan)
    adopt(model, plan)


def check_loss(max_loss: float, calibration: object, others: bool, name: str = "max_loss") -> None:
    """Whether a bound on the loss can be worked with; ``name`` is what the caller gave it as.

    Raises:
        CloverError: no number that can be a bound, no calibration data for the metric, or other rules beside it.
    """
    check_bound(max_loss)
    if others:
        raise CloverError(f"{name} {max_loss:g} decides about Q-K and V-O by itself; leave out it or the other rules")
    if calibration is None:
        raise CloverError(
            f"{name} {max_loss:g} needs calibration data to measure on; give some (--calibration FILE), "
            "and not the metric weights"
        )


def rule(name: str, share: float | None, threshold: float | None, energy: float | None) -> Rule:
    """The one rule of three that was given.

    Raises:
        CloverError: more than one was.
    """
    given = {"share": share, "threshold": threshold, "energy": energy}
    chosen = [f"{key} {value:g}" for key, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise CloverError(f"{name} is given a {' and a '.join(chosen)}; give one")
    if threshold is not None:
        return Threshold(threshold)
    if energy is not None:
        return Energy(energy)
    return Share(share or 0.0)


def inspect(
    model: PreTrainedModel,
    *,
    part: Part = "all",
    calibration: Iterable[Any] | None = None,
    metric: Metric | None = None,
) -> list[Spectrum]:
    """The spectra of all heads, beside the norms of the original directions. Arguments as in ``prune``."""
    return [b.spectrum() for b in find_bases(model, part=part, calibration=calibration, metric=metric)]


def plan_of(model: nn.Module) -> Plan:
    """The plan that a rewritten model was cut by.

    Raises:
        CloverError: the model was not rewritten by clover.
    """
    data = getattr(getattr(model, "config", None), "clover", None)
    if data is None:
        raise CloverError(f"{type(model).__name__} was not rewritten by clover; prune or orthogonalize it first")
    return Plan.from_dict(data)


def summary(model: nn.Module) -> dict[str, float | int]:
    """What was removed from a rewritten model.

    Returns:
        ``qk_removed`` and ``vo_removed`` (shares of the head directions of the blocks in the plan), parameter counts
        of those blocks and of the model, and bytes of keys and values cached for each token (in decoder and
        cross-attention, at the dtype of the weights), before and after.
    """
    plan = plan_of(model)
    after = sum(p.numel() for p in model.parameters())
    attention = sum(_attention_parameters(model, b.name) for b in plan.blocks)
    attention_before = sum(b.parameters for b in plan.blocks)
    size = next(model.parameters()).element_size()
    cached = [b for b in plan.blocks if b.part != "encoder"]
    return {
        "qk_removed": plan.qk_removed,
        "vo_removed": plan.vo_removed,
        "attention_parameters_before": attention_before,
        "attention_parameters_after": attention,
        "parameters_before": after - attention + attention_before,
        "parameters_after": after,
        "kv_bytes_per_token_before": size * sum(b.kv_heads * (b.qk + b.vo) for b in cached),
        "kv_bytes_per_token_after": size * sum(b.qk_kept + b.vo_kept for b in cached),
    }


def _attention_parameters(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    attention = next(m for m in module.modules() if isinstance(m, CloverAttention))
    projections: list[nn.Module] = [attention.get_submodule(attention.rows(which)[0]) for which in "qkv"]
    projections.append(module.get_submodule(attention.family.o) if attention.family.core else attention.o_proj)
    return sum(p.numel() for projection in set(projections) for p in projection.parameters())
