"""The curve of loss over what is removed, predicted and measured, as a section of the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from clover.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREDICTED, BOUND, MEASURED = "#2563eb", "#d97706", "#6b7280"
SPAN = 30
"""Losses are drawn from the bound over this to the bound times this."""


def loss_section(loss: Mapping[str, Any]) -> str:
    """One section of HTML.

    Args:
        loss: what ``clover.pruning.lossbudget.Outcome.to_dict`` gives.

    Raises:
        CloverError: matplotlib is not installed.
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
    drawing = io.BytesIO()
    _figure(loss).savefig(drawing, format="svg", transparent=True, bbox_inches="tight")
    what = escape(
        f"Loss over the share of directions removed: {len(loss['measured'])} measured cuts, the predicted curve and "
        "the bound."
    )
    image = f"data:image/svg+xml;base64,{base64.b64encode(drawing.getvalue()).decode()}"
    return (
        f'<section><h2>What a cut costs</h2><p class="note">{found}</p>'
        f'<figure><img class="loss" src="{image}" alt="{what}"></figure><p class="note">{note}</p></section>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}&nbsp;%"


def _figure(loss: Mapping[str, Any]) -> Figure:
    extra("matplotlib", "report")
    from matplotlib.figure import Figure  # no pyplot: no global state is touched, and no display asked for
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    bound, points, curve = loss["max_loss"], loss["measured"], loss["predicted"]
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    axes.plot([c["removed"] for c in curve], [c["loss"] for c in curve], color=PREDICTED, lw=1.8)
    axes.axhline(bound, color=BOUND, lw=1.4, ls=(0, (4, 2.5)))
    axes.annotate(f"bound {100 * bound:g} %", (1, bound), xycoords=("axes fraction", "data"), xytext=(-2, 4),
                  textcoords="offset points", ha="right", color=BOUND, fontsize=9)  # fmt: skip
    for point in points:
        taken, both = point == loss["chosen"], point["qk"] > 0 < point["vo"]
        axes.errorbar(
            point["removed"], point["measured"], yerr=[[0], [max(0.0, point["ceiling"] - point["measured"])]],
            fmt="s" if taken else "o", ms=8 if taken else 5.5, mew=1.4, elinewidth=1, color=MEASURED,
            mfc=PREDICTED if taken else MEASURED if both else "none",
        )  # fmt: skip
    axes.set(yscale="log", ylim=(bound / SPAN, bound * SPAN), xlabel="directions removed")
    axes.set_xlim(0, 1.08 * max([0.3, *(point["removed"] for point in points)]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=9, color=MEASURED, labelcolor=MEASURED)
    axes.xaxis.label.set(color=MEASURED, fontsize=9)
    axes.grid(color=MEASURED, alpha=0.25, lw=0.5)
    axes.spines[:].set_visible(False)
    return figure
