"""The curve of loss over what is removed, predicted and measured, as a drawing for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
SPAN = 30
"""Losses are drawn from the bound over this to the bound times this."""
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def loss_section(loss: Mapping[str, Any]) -> str:
    """One section of HTML.

    Args:
        loss: what ``clover.pruning.lossbudget.Outcome.to_dict`` gives.
    """
    chosen, bound = loss["chosen"], loss["max_loss"]
    if chosen:
        found = (
            f"The cut that was taken loses <strong>{_percent(chosen['measured'])}</strong>, with 95 % confidence less "
            f"than {_percent(chosen['ceiling'])}; the bound is {_percent(bound)}."
        )
    else:
        found = f"Every cut that was tried loses more than the bound of {_percent(bound)}; nothing was removed."
    note = (
        "Loss is the relative increase of perplexity (without logits: the squared error of the output), measured on "
        "data kept out of the calibration. The line is predicted, the dots are measured; the bars end at what the mean "
        "of such data is below 19 times in 20 (Student's t). Hollow dots cut one of Q&#8209;K and V&#8209;O alone. "
        "The filled square is the cut that was taken."
    )
    return (
        f'<section><h2>What a cut costs</h2><p class="note">{found}</p><figure>{_drawing(loss)}</figure>'
        f'<p class="note">{note}</p></section>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}&nbsp;%"


def _drawing(loss: Mapping[str, Any]) -> str:
    bound, points, curve = loss["max_loss"], loss["measured"], loss["predicted"]
    low, high = bound / SPAN, bound * SPAN
    widest = max([0.3, *(p["removed"] for p in points)]) * 1.08

    def x(removed: float) -> float:
        return LEFT + min(removed / widest, 1.0) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        part = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    line = [(x(c["removed"]), y(c["loss"])) for c in curve if c["removed"] <= widest and low < c["loss"] < high]
    parts = [*_axes(x, y, low, high, widest), _line(line), _bound(y(bound), bound)]
    parts += [_dot(p, x(p["removed"]), y(p["measured"]), y(p["ceiling"]), p == loss["chosen"]) for p in points]
    what = escape(
        f"Loss over the share of directions removed: {len(points)} measured cuts, the predicted curve and the bound."
    )
    return f'<svg class="loss" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what}">{"".join(parts)}</svg>'


def _axes(x: Any, y: Any, low: float, high: float, widest: float) -> list[str]:
    parts = []
    for tick in (t for t in TICKS if low <= t <= high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g} %</text>')
    step = 0.1 if widest > 0.35 else 0.05
    for i in range(int(widest / step) + 1):
        parts.append(
            f'<text x="{x(i * step):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{100 * i * step:.0f}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">directions removed, %</text>')
    return parts


def _line(points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="predicted" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'


def _bound(at: float, bound: float) -> str:
    label = f'<text class="bound" x="{WIDTH - RIGHT}" y="{at - 5:.1f}" text-anchor="end">bound {100 * bound:g} %</text>'
    return f'<path class="bound" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>{label}'


def _dot(point: Mapping[str, float], at: float, measured: float, ceiling: float, chosen: bool) -> str:
    title = f"Q-K {point['qk']:.1%}, V-O {point['vo']:.1%}: {point['measured']:.2%}"
    bar = f'<path class="bar" d="M{at:.1f} {measured:.1f}V{ceiling:.1f}"/>'
    if chosen:
        mark = f'<rect class="chosen" x="{at - 5:.1f}" y="{measured - 5:.1f}" width="10" height="10">'
        return f"{bar}{mark}<title>{title}</title></rect>"
    kind = "dot" if point["qk"] > 0 < point["vo"] else "dot alone"
    return f'{bar}<circle class="{kind}" cx="{at:.1f}" cy="{measured:.1f}" r="4"><title>{title}</title></circle>'
