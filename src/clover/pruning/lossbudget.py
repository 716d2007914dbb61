"""How much may go for a given loss: predicted by the costs, then measured on data that was kept out of the calibration.

The loss is what a cut changes in the model's own predictions: the Kullback-Leibler divergence of the cut model from the
whole one, in nats a token; ``exp`` of it is the factor by which the perplexity of a text like the data's grows. Of a
model without logits it is the squared error of its first output, relative to the output's square.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clover.errors import CloverError
from clover.model.answers import ROWS, answer, on, padding, several, valid
from clover.model.precision import or_wider
from clover.model.running import forward
from clover.planning.budget import Costs, Granularity, Limits, Share, is_number, make_plan
from clover.planning.plan import Plan
from clover.progress import track
from clover.pruning.basis import Basis
from clover.pruning.surgery import operate

KEPT_OUT = 3
"""One calibration batch of so many is kept out, to be measured on."""
GAUGE = 0.25
"""Share of Q-K, and of V-O, whose loss is measured to learn what a predicted nat of either is worth."""
FAR = 4
"""A loss so many times larger or smaller than what is looked for says little; then another cut is measured."""
TYPICAL = 0.02
"""Nats that suggestions are gauged at."""
LOOKS = 6
"""Most cuts that are measured on the way to the bound, after one of Q-K and one of V-O alone."""
AIM, NEAR = 0.95, 0.9
"""Shares of the bound: what a try aims at, and what is near enough to stop."""
MOST = 0.95
"""Largest share of directions that is ever removed."""
CERTAINTY = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""Standard errors that a measured mean must stay under the bound by, to be right 19 times of 20: one-sided quantiles of
Student's t for 1, 2, ..., 10 degrees of freedom, one less than there are sequences; the last for more."""


def check_bound(max_loss: float) -> float:
    """The bound in nats.

    Raises:
        CloverError: not a positive finite number.
    """
    if not (is_number(max_loss) and 0 < max_loss < math.inf):
        raise CloverError(f"max_loss is {max_loss!r}; it must be more than 0, such as 0.02 for 2 % more perplexity")
    return math.log1p(max_loss)


def keep_apart(batches: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to calibrate on, and those kept out of it: the second of every three.

    Raises:
        CloverError: fewer than two.
    """
    whole = list(several(batches))
    if len(whole) < 2:
        raise CloverError(
            f"a loss is measured on data kept out of the calibration, but of {len(whole)} batches none can be spared; "
            "give more, or make them of fewer sequences each"
        )
    used = [b for i, b in enumerate(whole) if i % KEPT_OUT != 1]
    return used, whole[1::KEPT_OUT]


@dataclass(frozen=True)
class Forecast:
    """Nats that go with each column of the heads, in either kind, cheapest first; float64."""

    qk: Float[Tensor, " a"]
    vo: Float[Tensor, " b"]

    @classmethod
    def of(cls, costs: Sequence[Costs]) -> Forecast:
        """From what the directions of each block cost."""
        pair = [c.pair_cost.flatten().repeat_interleave(2) / 2 for c in costs if not c.fixed_qk]
        plain = [c.plain_cost.flatten() for c in costs if not c.fixed_qk]
        empty = costs[0].value_cost.new_zeros(0)
        # An error e costs half its square in nats, see ``Moments.gradient``.
        value = [c.value_cost.flatten() / 2 for c in costs]
        return cls(torch.cat([empty, *pair, *plain]).sort().values, torch.cat(value).sort().values)

    def loss(self, qk: float, vo: float) -> float:
        """Nats for these shares, ranks free."""
        return sum(
            prices[: round(share * len(prices))].sum().item() for prices, share in ((self.qk, qk), (self.vo, vo))
        )

    def scaled(self, qk: float = 1.0, vo: float = 1.0) -> Forecast:
        """The same with other prices a nat."""
        return Forecast(self.qk * qk, self.vo * vo)

    def shares(self, total: float) -> tuple[float, float]:
        """Shares of Q-K and of V-O when the cheapest ``total`` of all columns go."""
        order = torch.cat([self.qk, self.vo]).argsort()[: round(total * (len(self.qk) + len(self.vo)))]
        qk = int((order < len(self.qk)).sum())
        return min(MOST, qk / max(len(self.qk), 1)), min(MOST, (len(order) - qk) / len(self.vo))

    def reach(self, nats: float) -> float:
        """Share of all columns, the cheapest, that go for so many nats."""
        spent = torch.cat([self.qk, self.vo]).sort().values.cumsum(0)
        return min(MOST, int(torch.searchsorted(spent, nats, right=True)) / len(spent))

    def alone(self, kind: str, nats: float) -> float:
        """Share of Q-K or of V-O, that goes for so many nats without the other."""
        prices = getattr(self, kind)
        return min(MOST, int(torch.searchsorted(prices.cumsum(0), nats, right=True)) / max(len(prices), 1))


@dataclass(frozen=True)
class Measured:
    """Nats that a cut loses on the data kept out."""

    nats: float
    """Without logits the logarithm of 1 + the relative squared error: either way ``exp(nats) - 1`` is told."""
    error: float
    """Standard error of the mean, over the sequences; infinite where there is one."""
    sequences: int

    @property
    def ceiling(self) -> float:
        """The upper end of a one-sided 95 % confidence interval; this is held against the bound."""
        return self.nats + CERTAINTY[min(max(self.sequences, 2), len(CERTAINTY) + 1) - 2] * self.error


@dataclass(frozen=True)
class Point:
    """A cut that was tried: the shares that its plan removes, what was predicted and what was measured, in nats."""

    removed: float
    """Share of all directions, of Q-K and V-O together."""
    qk: float
    vo: float
    predicted: float
    """By the prices known when it was tried."""
    measured: float
    ceiling: float
    """``Measured.ceiling``, which is held against the bound."""


@dataclass(frozen=True)
class Outcome:
    """The cut that stays under the bound, and what was learned on the way."""

    plan: Plan
    bound: float
    forecast: Forecast
    """Corrected by what was measured."""
    points: tuple[Point, ...]
    """In the order of trying."""
    chosen: Point | None
    """None where every cut that was tried loses more than the bound; nothing is removed then."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for people: relative increases of perplexity, not nats."""
        told = [_told(point) for point in self.points]
        curve = [{"removed": t, **dict(zip(("qk", "vo"), s, strict=True)), "loss": _relative(self.forecast.loss(*s))}
                 for t in CURVE for s in [self.forecast.shares(t)]]  # fmt: skip
        return {"max_loss": math.expm1(self.bound), "chosen": self.chosen and _told(self.chosen),
                "measured": told, "predicted": curve}  # fmt: skip


CURVE = tuple(i / 20 for i in range(1, 17))
"""Shares of all directions that the predicted curve is told at."""


def _relative(nats: float) -> float:
    return math.expm1(min(nats, 700.0))  # just under what overflows; whatever comes near it is broken anyway


def _told(point: Point) -> dict[str, float]:
    shares = {"removed": point.removed, "qk": point.qk, "vo": point.vo}
    return shares | {k: _relative(getattr(point, k)) for k in ("predicted", "measured", "ceiling")}


def within(
    model: nn.Module,
    bases: Sequence[Basis],
    kept_out: Sequence[Any],
    max_loss: float,
    *,
    granularity: Granularity = "head",
    limits: Limits | None = None,
) -> Outcome:
    """The largest cut found whose measured loss stays within a bound; the model stays as it is.

    Directions go cheapest first, of Q-K and V-O together. What a predicted nat of each is worth is measured by cuts of
    each alone; then the common budget is narrowed down by cuts that are measured in their turn. The cut that is
    returned is one of these.

    Args:
        bases: of the blocks to cut, calibrated.
        kept_out: batches that the bases have not seen, see ``keep_apart``.
        max_loss: relative increase of perplexity that is allowed, 0.02 for 2 %.
        granularity, limits: see ``make_plan``.

    Raises:
        CloverError: ``max_loss`` is not positive and finite, or a batch that the model gives no finite output for.
    """
    bound = check_bound(max_loss)
    trials = _Trials(model, bases, kept_out, granularity, limits)
    forecast = trials.gauge(bound)
    if any(point.ceiling == math.inf for point in trials.tried.values()):
        raise CloverError(
            "one sequence kept out of the calibration can't tell how far a measured loss may be off; give more data"
        )
    low, high, factor = 0.0, MOST, 1.0
    for _ in range(LOOKS):
        total = forecast.reach(AIM * bound / factor)
        if not low < total < high:
            total = (low + high) / 2
        point = trials.look(forecast, *forecast.shares(total))
        factor = point.ceiling / point.predicted if point.ceiling > 0 < point.predicted else factor
        low, high = (total, high) if point.ceiling <= bound else (low, total)
        if NEAR * bound <= point.ceiling <= bound or high - low < trials.grain:
            break
    passed = [(plan, point) for plan, point in trials.tried.items() if point.ceiling <= bound and point.removed > 0]
    plan, chosen = max(passed, key=lambda found: trials.columns(found[0]), default=(trials.plan(0.0, 0.0), None))
    return Outcome(plan, bound, forecast, tuple(trials.tried.values()), chosen)


@dataclass(frozen=True)
class Suggestion:
    """Shares to remove for a loss, predicted."""

    max_loss: float
    qk: float
    vo: float


def suggest(
    model: nn.Module, bases: Sequence[Basis], kept_out: Sequence[Any], losses: Iterable[float] = (0.01, 0.02, 0.05)
) -> list[Suggestion]:
    """Shares of Q-K and V-O for some losses, by a forecast that a few measured cuts have corrected.

    A hint, which ``within`` would verify. Other arguments and errors are those of ``within``.
    """
    forecast = gauge(model, bases, kept_out, TYPICAL)
    return [Suggestion(loss, *forecast.shares(forecast.reach(check_bound(loss)))) for loss in losses]


def gauge(model: nn.Module, bases: Sequence[Basis], kept_out: Sequence[Any], nats: float) -> Forecast:
    """The forecast whose prices are measured near a loss in nats, on a cut of Q-K and on one of V-O alone.

    ``shares`` of it divides a total between Q-K and V-O. Other arguments and errors are those of ``within``.
    """
    return _Trials(model, bases, kept_out).gauge(nats)


class _Trials:
    """Cuts that are tried on a twin of the model."""

    def __init__(
        self,
        model: nn.Module,
        bases: Sequence[Basis],
        kept_out: Sequence[Any],
        granularity: Granularity = "head",
        limits: Limits | None = None,
    ) -> None:
        self.model, self.bases, self.kept_out = model, bases, kept_out
        self.granularity, self.limits = granularity, limits
        self.costs = [basis.costs() for basis in bases]
        self.tried: dict[Plan, Point] = {}
        self.grain = 1 / sum(c.kv_heads * (c.qk + c.count("value")) for c in self.costs)
        """Share of one column."""

    def plan(self, qk: float, vo: float) -> Plan:
        """Ranks at these shares."""
        return make_plan(self.costs, Share(qk), Share(vo), granularity=self.granularity, limits=self.limits)

    def columns(self, plan: Plan) -> int:
        """Columns that a plan removes."""
        return sum(b.kv_heads * (b.qk + b.vo) - b.qk_kept - b.vo_kept for b in plan.blocks)

    def look(self, forecast: Forecast, qk: float, vo: float) -> Point:
        """Measure one cut."""
        plan = self.plan(qk, vo)
        if plan not in self.tried:
            found = measure(self.model, self.bases, plan, self.kept_out)
            predicted = forecast.loss(qk, vo)
            removed = self.columns(plan) * self.grain
            self.tried[plan] = Point(removed, plan.qk_removed, plan.vo_removed, predicted, found.nats, found.ceiling)
        return self.tried[plan]

    def gauge(self, target: float) -> Forecast:
        """The forecast with prices as measured on a cut of Q-K and on one of V-O alone, near a target in nats."""
        forecast = Forecast.of(self.costs)
        for kind in ("qk", "vo"):
            if not len(getattr(forecast, kind)):  # norms fix it
                continue
            share = GAUGE
            for _ in range(2):
                shares = (share, 0.0) if kind == "qk" else (0.0, share)
                point, predicted = self.look(forecast, *shares), forecast.loss(*shares)
                if getattr(point, kind) > 0 and point.measured > 0 < predicted:
                    forecast = forecast.scaled(**{kind: point.measured / predicted})
                if target / FAR <= point.measured <= target * FAR:
                    break
                share = forecast.alone(kind, target)
        return forecast


@torch.no_grad()
def measure(model: nn.Module, bases: Sequence[Basis], plan: Plan, batches: Iterable[Any]) -> Measured:
    """What a cut loses on some data; the model stays as it is. Arguments and errors are those of ``compare``."""
    cut = twin(model)
    operate(cut, bases, plan)
    return compare(twin(model), cut, batches)


@torch.no_grad()
def compare(whole: nn.Module, cut: nn.Module, batches: Iterable[Any]) -> Measured:
    """What one model loses against another, in nats a token (without logits, see ``Measured.nats``).

    Args:
        whole, cut: the models, in evaluation mode.
        batches: as for ``calibrate``; a mean is taken over all tokens that are not padding.

    Raises:
        CloverError: no batches, or one that a model gives no finite output for.
    """
    device = next(cut.parameters()).device
    found = [
        (losses.sum().item(), len(losses), words)
        for batch in track(batches, "measure")
        for losses, words in _by_sequence(whole, cut, on(batch, device))
    ]
    sums, tokens, words = zip(*found, strict=True) if found else ((), (), ())
    if not sum(tokens):
        raise CloverError(
            "there is nothing to measure the loss on; give at least one batch with a token that is not padding"
        )
    mean = sum(sums) / sum(tokens)
    if not math.isfinite(mean):
        raise CloverError(
            "the output on data kept out of the calibration is not finite; check the data"
            + or_wider(next(whole.parameters()).dtype)
        )
    spread = [s - mean * n for s, n in zip(sums, tokens, strict=True)]  # sequences count by their tokens
    error = statistics.stdev(spread) * len(sums) ** 0.5 / sum(tokens) if len(sums) > 1 else math.inf
    return Measured(mean, error, len(sums)) if all(words) else Measured(math.log1p(mean), error / (1 + mean), len(sums))


def twin(model: nn.Module) -> nn.Module:
    """Another model with the very same weights, in evaluation mode; its modules can be replaced on their own."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def _by_sequence(whole: nn.Module, cut: nn.Module, batch: Any) -> Iterator[tuple[Tensor, bool]]:
    """The loss of every token (or label) of every sequence of a batch, and whether it is in nats."""
    (p, words, by_token), (q, *_) = (answer(forward(model, batch), batch, model) for model in (whole, cut))
    compare, real = divergence if words else relative_error, valid(p, padding(batch, whole).decoder if by_token else ())
    for row in range(len(p)):
        kept = (x[row][real[row]] if x.dim() == 3 else x[row].reshape(1, -1) for x in (p, q))
        pieces = zip(*(x.split(ROWS) for x in kept), strict=True)
        yield torch.cat([compare(*pair) for pair in pieces]), words


def divergence(p: Float[Tensor, "n words"], q: Float[Tensor, "n words"]) -> Float[Tensor, " n"]:
    """``KL(softmax(p) || softmax(q))`` of each row, in nats; words that ``p`` rules out don't count."""
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0)  # rounding may go below


def relative_error(p: Float[Tensor, "n d"], q: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """``|p - q|^2 / |p|^2`` of each row."""
    p, q = p.double(), q.double()
    return (p - q).square().sum(-1) / p.square().sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
