"""The public verbs on models: orthogonalise, prune, inspect, summarise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from clover.calibration.calibrate import calibrate
from clover.errors import CloverError, warn
from clover.model.mla import projections
from clover.model.survey import blocks
from clover.planning.budget import Costs, Energy, Granularity, Limits, Rule, Share, Threshold, is_number, make_plan
from clover.planning.plan import Plan, Spectrum
from clover.pruning.basis import Basis, find_basis
from clover.pruning.checks import check_model, check_own
from clover.pruning.classes import adopt
from clover.pruning.lossbudget import Outcome, check_bound, keep_apart, within
from clover.pruning.surgery import operate, rewritten

Part = Literal["encoder", "decoder", "cross", "all"]
Metric = Literal["activations", "weights"]
Rules = tuple[Rule, Rule]
"""What goes of Q-K, and of V-O."""
NOTHING: Rules = (Share(0.0), Share(0.0))


@dataclass(frozen=True)
class Choice:
    """What ``prune`` decides before the model changes."""

    bases: list[Basis]
    plan: Plan
    outcome: Outcome | None = None
    """How a bound on the loss was kept, where there was one."""


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
        part: which attention blocks: ``encoder``, ``decoder`` (self-attention of what writes), ``cross`` or ``all``.
        calibration: batches for the model's forward (mappings of its arguments, or tensors); a few thousand tokens do.
        metric: ``activations`` measures directions on the calibration data, ``weights`` by the weights alone, as
            published. The default is ``activations`` when there is calibration data.
        qk_threshold, vo_threshold: remove directions whose norm product is at most this (the paper's rule).
        qk_energy, vo_energy: keep in each head the fewest directions with this share of its energy.
        max_loss: instead of all these: remove as much as keeps the perplexity's relative increase under this, 0.02 for
            2 %, on a third of the calibration batches, which is kept for measuring (at least two batches). Of a model
            without logits it is the output's relative squared error. ``clover.pruning.lossbudget.within`` tells more.
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
    request = wanted(
        qk=qk, vo=vo, qk_threshold=qk_threshold, vo_threshold=vo_threshold, qk_energy=qk_energy, vo_energy=vo_energy,
        max_loss=max_loss, metric=metric, data=calibration,
    )  # fmt: skip
    found = choose(
        model, request, part=part, calibration=calibration, metric=metric, granularity=granularity, limits=limits,
        seed=seed,
    )  # fmt: skip
    apply(model, found.bases, found.plan)
    return model


# --- what is asked for ---


def wanted(
    *,
    max_loss: float | None = None,
    metric: str | None = None,
    data: object = None,
    called: Callable[[str], str] = str,
    **shares: float | None,
) -> Rules | float:
    """Two rules or a bound on the loss, as ``choose`` takes them; what doesn't go together is refused before any work.

    Args:
        max_loss, metric, shares: as in ``prune``.
        data: the calibration data, or what they are to be read from.
        called: the name that the user knows an argument of ``prune`` by.

    Raises:
        CloverError: names the argument.
    """
    found = rules(**shares, called=called)
    measured_by(metric, data, called)
    if max_loss is None:
        return found
    check_bound(max_loss)
    given = f"{called('max_loss')} {max_loss:g}"
    if any(value is not None for value in shares.values()):
        raise CloverError(f"{given} decides about Q-K and V-O by itself; leave out it or the other rules")
    if data is None or metric == "weights":
        raise CloverError(
            f"{given} needs calibration data to measure on; give {called('calibration')}, and not the metric weights"
        )
    return float(max_loss)


def rules(
    *,
    qk: float | None = None,
    vo: float | None = None,
    qk_threshold: float | None = None,
    vo_threshold: float | None = None,
    qk_energy: float | None = None,
    vo_energy: float | None = None,
    called: Callable[[str], str] = str,
) -> Rules:
    """The rule for Q-K and that for V-O; where none is given, all stays. Arguments and errors as in ``wanted``."""
    return _rule("qk", called, qk, qk_threshold, qk_energy), _rule("vo", called, vo, vo_threshold, vo_energy)


def _rule(name: str, called: Callable[[str], str], *values: float | None) -> Rule:
    kinds: dict[str, type[Rule]] = {name: Share, f"{name}_threshold": Threshold, f"{name}_energy": Energy}
    given = [(a, kind, value) for (a, kind), value in zip(kinds.items(), values, strict=True) if value is not None]
    if len(given) > 1:
        each = " and ".join(f"{kind.__name__.lower()} {value}" for _, kind, value in given)
        raise CloverError(f"{called(name)} is given {each}; give one")
    for argument, kind, value in given:
        if not is_number(value):
            raise CloverError(f"{called(argument)} is {value!r}; it must be a number, such as 0.25")
        try:
            return kind(value)
        except CloverError as error:
            raise CloverError(f"{called(argument)}: {error}") from None
    return Share(0.0)


def measured_by(metric: str | None, data: object, called: Callable[[str], str] = str) -> Metric:
    """The metric, by default the one that the data allow. Arguments and errors as in ``wanted``."""
    chosen = metric or ("weights" if data is None else "activations")
    name = called("metric")
    if chosen == "weights":
        return "weights"
    if chosen != "activations":
        raise CloverError(f"{name} is {chosen!r}; it must be activations or weights")
    if data is None:
        raise CloverError(f"{name} activations needs calibration data; give {called('calibration')}, or {name} weights")
    return "activations"


# --- the steps ---


def choose(
    model: PreTrainedModel,
    request: Rules | float,
    *,
    part: Part = "all",
    calibration: Iterable[Any] | None = None,
    metric: Metric | None = None,
    granularity: Granularity = "head",
    limits: Limits | None = None,
    seed: int = 0,
) -> Choice:
    """Bases and ranks for what is ``wanted``; the model stays as it is. Other arguments and errors as in ``prune``."""
    if isinstance(request, tuple):
        bases = find_bases(model, part=part, calibration=calibration, metric=metric, seed=seed)
        return Choice(bases, plan_ranks(bases, *request, granularity=granularity, limits=limits))
    used, kept_out = keep_apart(calibration or ())
    bases = find_bases(model, part=part, calibration=used, metric=metric, seed=seed)
    outcome = within(model, bases, kept_out, request, granularity=granularity, limits=limits)
    return Choice(bases, outcome.plan, outcome)


def find_bases(
    model: PreTrainedModel,
    *,
    part: Part = "all",
    calibration: Iterable[Any] | None = None,
    metric: Metric | None = None,
    seed: int = 0,
) -> list[Basis]:
    """First step of ``prune``: decompose every block; the model stays as it is. Arguments as there."""
    check_model(model)
    metric = measured_by(metric, calibration)
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
    """Second step of ``prune``: choose ranks. See ``clover.planning.budget.make_plan``."""
    return plan_costs([basis.costs() for basis in bases], qk, vo, granularity=granularity, limits=limits)


def plan_costs(
    costs: Sequence[Costs], qk: Rule, vo: Rule, *, granularity: Granularity = "head", limits: Limits | None = None
) -> Plan:
    """As ``plan_ranks``, from what the directions of each block cost."""
    fixed = sum(c.fixed_qk for c in costs)
    if fixed and qk != Share(0.0):
        warn(f"Q-K of {fixed} of {len(costs)} blocks stays whole: a norm stands between their projections and logits")
    return make_plan(costs, qk, vo, granularity=granularity, limits=limits)


def apply(model: PreTrainedModel, bases: list[Basis], plan: Plan) -> None:
    """Third step of ``prune``: cut the model to the plan, in place."""
    check_model(model)
    operate(model, bases, plan)
    adopt(model, plan)


# --- what is told of models ---


def inspect(
    model: PreTrainedModel,
    *,
    part: Part = "all",
    calibration: Iterable[Any] | None = None,
    metric: Metric | None = None,
) -> list[Spectrum]:
    """The spectra of all heads, beside the norms of the original directions. Arguments as in ``prune``."""
    return [b.spectrum() for b in find_bases(model, part=part, calibration=calibration, metric=metric)]


def plan_of(model: PreTrainedModel) -> Plan:
    """The plan that a rewritten model was cut by.

    Raises:
        CloverError: the model was not rewritten by clover, or not as a whole.
    """
    check_model(model)
    check_own(model)
    data = getattr(model.config, "clover", None)
    if data is None:
        raise CloverError(f"{type(model).__name__} was not rewritten by clover; prune or orthogonalize it first")
    return Plan.from_dict(data)


def summary(model: PreTrainedModel) -> dict[str, float | int]:
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
    cached = [rewritten(model.get_submodule(b.name)).cached for b in plan.blocks if b.part != "encoder"]
    return {
        "qk_removed": plan.qk_removed,
        "vo_removed": plan.vo_removed,
        "attention_parameters_before": attention_before,
        "attention_parameters_after": attention,
        "parameters_before": after - attention + attention_before,
        "parameters_after": after,
        "kv_bytes_per_token_before": size * sum(before for before, _ in cached),
        "kv_bytes_per_token_after": size * sum(after for _, after in cached),
    }


def _attention_parameters(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    attention = rewritten(module)
    own: list[nn.Module] = [attention.get_submodule(attention.rows(which)[0]) for which in "qkv"]
    own.append(module.get_submodule(attention.family.o) if attention.family.core else attention.o_proj)
    own += projections(attention, attention.family.latent)
    return sum(p.numel() for projection in set(own) for p in projection.parameters())
