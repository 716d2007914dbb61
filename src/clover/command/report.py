"""Show what pruning did: figures of the spectra, the table of before and after, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clover.command.curve import loss_section
from clover.errors import CloverError
from clover.extras import extra
from clover.jobs.folders import whole_file
from clover.planning.plan import BlockPlan, Plan, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import LineStyleType as Style

Rows = Sequence[Sequence[float]]
Summary = Mapping[str, Any]
Measurements = Mapping[str, Mapping[str, Any]]

FORMATS = ("png", "svg", "pdf")
SINGULAR, NORMS = "#2563eb", "#d97706"
DASHES = (0, (4, 1.6))
FLOOR = 1e-5  # of the largest value: what lies below is numerical noise, and would squeeze the rest of a log axis


class Row(NamedTuple):
    """One line of the table of before and after, as text that is ready to print."""

    what: str
    before: str
    after: str
    change: str


def table(summary: Summary, measurements: Measurements | None = None) -> list[Row]:
    """What a model was before and is after, one row a quantity.

    Args:
        summary: of a pruned model; rows whose keys are missing are left out, so that ``{}`` is no rows.
        measurements: ``{"perplexity": {"before": 25.9, "after": 28.1}}``; either number may be missing or None. With
            ``"unit": "%"`` the values are percentages and their change is told in points.
    """
    rows = []
    for key, what in (("qk_removed", "Q-K directions"), ("vo_removed", "V-O directions")):
        if key in summary:
            rows.append(
                Row(what, "100.0 %", f"{1 - summary[key]:.1%}".replace("%", " %"), _change(1, 1 - summary[key]))
            )
    for key, what in (
        ("attention_parameters", "attention parameters"),
        ("parameters", "parameters"),
        ("kv_bytes_per_token", "KV cache, bytes per token"),
    ):
        if summary.get(f"{key}_before"):  # an encoder has no cache
            rows.append(_row(what, summary[f"{key}_before"], summary[f"{key}_after"]))
    for what, values in (measurements or {}).items():
        rows.append(_row(what, values.get("before"), values.get("after"), values.get("unit", "")))
    return rows


def plot_spectra(spectra: Sequence[Spectrum], path: str | os.PathLike[str]) -> None:
    """Draw every block's singular values beside its vanilla norms, on a log scale.

    Q-K panels fill the left half and V-O panels the right, one panel a block in the order given. Solid lines are the
    singular values, dashed lines the norm products of the original head dimensions; a thin line is one KV head, the
    bold one the median over heads. Values under 1e-5 of the largest are off the scale.

    Args:
        spectra: at least one block.
        path: the suffix, ``.png``, ``.svg`` or ``.pdf``, says the format. An old file there is replaced.

    Raises:
        CloverError: no spectra, another suffix, a path that cannot be written, or matplotlib is not installed.
    """
    check_target(path, *FORMATS)
    if not spectra:
        raise CloverError("there are no spectra to plot: the model has no attention block in the chosen part")
    _replace(Path(path), _render(spectra, Path(path).suffix.lower().removeprefix("."), dpi=150))


def check_target(path: str | os.PathLike[str], *kinds: str) -> None:
    """Raise now what writing a page, or a picture of one of these kinds, would raise after hours of work.

    Raises:
        CloverError: matplotlib is not installed, another suffix, or the folder of ``path`` is missing or cannot be
            written to.
    """
    path = Path(path)
    if kinds and path.suffix.lower().removeprefix(".") not in kinds:
        raise CloverError(f"cannot write {str(path)!r}: its suffix must be one of .{', .'.join(kinds)}")
    if os.path.isdir(path) or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise _unwritable(path)
    extra("matplotlib", "report")


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    spectra: Sequence[Spectrum],
    plan: Plan | None,
    summary: Summary,
    measurements: Measurements | None = None,
    loss: Mapping[str, Any] | None = None,
) -> None:
    """Write one HTML file that needs nothing else: numbers, ranks kept, spectra and the plan.

    Args:
        path: the file; it appears whole or not at all, and an old one is replaced.
        title: heading of the page, plain text.
        spectra: of the original model; an empty sequence leaves the figure out.
        plan: what was kept; None leaves the heat maps out.
        summary: see ``table``; ``{}`` where nothing was pruned.
        measurements: see ``table``.
        loss: how a bound on the loss was kept, see ``lossbudget.Outcome.to_dict``; None leaves the curve out.

    Raises:
        CloverError: the path cannot be written, or there are spectra and matplotlib is not installed.
    """
    body = [
        f"<header><h1>{escape(title)}</h1>{_headline(spectra, plan, summary)}</header>",
        _table_section(table(summary, measurements)),
        loss_section(loss) if loss else "",
        _ranks_section(plan) if plan else "",
        _spectra_section(spectra) if spectra else "",
        _PLAN.format(escape(json.dumps(plan.to_dict(), indent=1))) if plan else "",
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = _PAGE.format(title=escape(title), style=style, body="\n".join(filter(None, body)))
    _replace(Path(path), page.encode())


def _row(what: str, before: float | None, after: float | None, unit: str = "") -> Row:
    return Row(what, _number(before, unit), _number(after, unit), _change(before, after, unit))


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "n/a"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def _change(before: float | None, after: float | None, unit: str = "") -> str:
    if before is None or after is None:
        return "n/a"
    if before == after:
        return "unchanged"
    if unit == "%":
        return f"{after - before:+.2f} points"
    return f"{after / before - 1:+.1%}".replace("%", " %") if before else "n/a"


def _labels(blocks: Sequence[Spectrum | BlockPlan]) -> list[tuple[str, str]]:
    """A short (stack, number) for each block: ("encoder", "3") for ``model.encoder.layers.3.self_attn``.

    Blocks whose names differ in their numbers only are one stack. It is called by its part, with the words of its name
    that not all stacks of that part share.
    """
    keys = [(block.part, re.sub(r"\d+", "*", block.name)) for block in blocks]
    result = []
    for block, (part, pattern) in zip(blocks, keys, strict=True):
        twins = [set(other.split(".")) for other_part, other in keys if other_part == part]
        own = [word for word in pattern.split(".") if word not in set.intersection(*twins)]
        result.append((" ".join([part, *own]), ".".join(re.findall(r"\d+", block.name)) or block.name))
    return result


def _replace(path: Path, data: bytes) -> None:
    try:
        with whole_file(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise _unwritable(path) from error


def _unwritable(path: Path) -> CloverError:
    cause = "it is a folder" if os.path.isdir(path) else "its folder is missing, full or read-only"
    return CloverError(f"cannot write {str(path)!r}: {cause}; name a file in a folder that you may write to")


def _render(spectra: Sequence[Spectrum], kind: str, *, dpi: int, transparent: bool = False) -> bytes:
    buffer = io.BytesIO()
    _figure(spectra).savefig(buffer, format=kind, dpi=dpi, transparent=transparent)
    return buffer.getvalue()


def _figure(spectra: Sequence[Spectrum]) -> Figure:
    extra("matplotlib", "report")
    from matplotlib.figure import Figure  # no pyplot: no global state is touched, and no display asked for
    from matplotlib.lines import Line2D

    across = min(len(spectra), 3 if len(spectra) <= 24 else 4)
    down = math.ceil(len(spectra) / across)
    height = 1.4 * down + 1.3
    figure = Figure(figsize=(12, height))
    labels = _labels(spectra)
    alone = len({stack for stack, _ in labels}) == 1
    titles = [f"{'layer' if alone else stack} {number}" for stack, number in labels]
    panels = [(s.qk, s.qk_norms) for s in spectra], [(s.vo, s.vo_norms) for s in spectra]
    for half, name, columns in zip(figure.subfigures(1, 2, squeeze=False)[0], ("Q-K", "V-O"), panels, strict=True):
        axes = half.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
        half.subplots_adjust(left=0.1, right=0.98, bottom=0.5 / height, top=1 - 0.9 / height, wspace=0.1, hspace=0.24)
        half.suptitle(name, x=0.1, y=1 - 0.52 / height, ha="left", va="center", fontsize=12, fontweight="bold")
        half.supxlabel("direction, from large to small", x=0.54, y=0.08 / height, va="bottom", fontsize=8.5)
        _draw_panels(axes, columns, titles, across)
    key = [
        Line2D([], [], color=SINGULAR, lw=1.8, label="singular values (CLOVER)"),
        Line2D([], [], color=NORMS, lw=1.8, ls=DASHES, label="vanilla norms"),
        Line2D([], [], color="#555555", lw=0.6, label="thin: one KV head, bold: their median"),
    ]
    figure.legend(handles=key, loc="upper center", ncols=3, frameon=False, fontsize=9, borderaxespad=0.6)
    return figure


def _draw_panels(axes: Sequence[Axes], pairs: Sequence[tuple[Rows, Rows]], titles: Sequence[str], across: int) -> None:
    """One half of the figure. The axes are shared, so that scale, limits and ticks are set once, on the first."""
    from matplotlib.ticker import LogLocator, NullLocator

    kinds = [[v for rows in kind for row in rows for v in row if 0 < v < math.inf] for kind in zip(*pairs, strict=True)]
    kinds = [values for values in kinds if values]
    if kinds:
        low = min(max(min(values), FLOOR * max(values)) for values in kinds)
        axes[0].set_yscale("log")
        axes[0].set_ylim(low / 1.6, 1.6 * max(map(max, kinds)))
        axes[0].yaxis.set_major_locator(LogLocator(numticks=5))
        axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_xlim(0, 1 + max((len(row) for pair in pairs for rows in pair for row in rows), default=1))
    for ax, (values, norms), title in zip(axes, pairs, titles, strict=False):
        ax.set_title(title, loc="left", fontsize=8, pad=2.5)
        if not values:
            ax.text(0.5, 0.5, "left as it is", transform=ax.transAxes, ha="center", fontsize=8, color="#777777")
        ax.tick_params(labelsize=7.5, length=2.5, color="#999999")
        ax.grid(color="#888888", alpha=0.2, lw=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        size = max((len(row) for row in (*values, *norms)), default=1)
        _draw_rows(ax, norms, size, NORMS, DASHES)
        _draw_rows(ax, values, size, SINGULAR, "solid")
    for ax in axes[len(pairs) :]:
        ax.set_axis_off()
    for ax in axes[len(pairs) - across : len(pairs)]:  # the last row may be short: label what is lowest
        ax.tick_params(labelbottom=True)


def _draw_rows(ax: Axes, rows: Rows, size: int, colour: str, style: Style) -> None:
    """A thin line a row and their bold median. A row shorter than ``size``, of rotary pairs say, is stretched to it."""
    from matplotlib.collections import LineCollection

    def points(row: Sequence[float]) -> list[tuple[float, float]]:
        return [(i * size / len(row), value) for i, value in enumerate(row, 1) if 0 < value < math.inf]

    median = [statistics.median(column) for column in zip(*rows)]  # noqa: B905 - the heads of one block have one size
    for lines, width, alpha in ((rows if len(rows) > 1 else (), 0.5, 0.45), ((median,), 1.5, 1.0)):
        segments = [line for line in map(points, lines) if line]
        # the limits are set: letting each collection update those of all shared axes takes quadratic time
        ax.add_collection(
            LineCollection(segments, colors=colour, linewidths=width, linestyles=style, alpha=alpha), autolim=False
        )


def _headline(spectra: Sequence[Spectrum], plan: Plan | None, summary: Summary) -> str:
    if "qk_removed" not in summary:
        return f'<p class="lead">Spectra of {len(spectra)} attention blocks. Nothing was removed.</p>'
    qk, vo = (f"<strong>{summary[k]:.1%}</strong>".replace("%", "&nbsp;%") for k in ("qk_removed", "vo_removed"))
    text = f"Removed {qk} of the Q&#8209;K and {vo} of the V&#8209;O head directions"
    gone = sum(rank is None for block in plan.blocks for rank in _ranks(block, "vo")) if plan else 0
    if gone:
        text += f"; <strong>{gone}</strong> {'head is' if gone == 1 else 'heads are'} gone whole"
    return f'<p class="lead">{text}.</p>'


def _table_section(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{escape(what[:1].upper() + what[1:])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in (before, after, change.replace("-", "\N{MINUS SIGN}")))
        + "</tr>\n"
        for what, before, after, change in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "Before", "After", "Change"))
    return f'<section><h2>Before and after</h2><table class="sizes"><tr>{head}</tr>\n{lines}</table></section>'


def _ranks(block: BlockPlan, side: str) -> list[int | None]:
    """The directions that each KV head keeps, None for a head that is gone whole."""
    kept = {head: group.qk if side == "qk" else group.value for group in block.groups for head in group.heads}
    return [kept.get(head) for head in range(block.kv_heads)]


def _ranks_section(plan: Plan) -> str:
    stacks: dict[str, list[tuple[str, BlockPlan]]] = {}
    for (stack, number), block in zip(_labels(plan.blocks), plan.blocks, strict=True):
        stacks.setdefault(stack, []).append((number, block))
    maps = []
    for stack, blocks in stacks.items():
        heading = f"<h3>{escape(stack)}</h3>" if len(stacks) > 1 else ""
        maps.append(f'{heading}<div class="maps">{_heat_map(blocks, "qk")}{_heat_map(blocks, "vo")}</div>')
    return (
        "<section><h2>Directions kept, by layer and head</h2>"
        '<p class="note">Rows are layers, columns are key-value heads. <span class="key scale"></span> none to all of '
        'the head&rsquo;s directions; <span class="key gone"></span> the head is gone whole.</p>'
        f"{''.join(maps)}</section>"
    )


def _heat_map(blocks: Sequence[tuple[str, BlockPlan]], side: str) -> str:
    columns = max(block.kv_heads for _, block in blocks)
    head = "".join(f'<th scope="col">{i}</th>' for i in range(columns))
    lines = [f'<tr><th scope="col">layer</th>{head}<th scope="col" class="mean">kept</th></tr>']
    for number, block in blocks:
        ranks, size = _ranks(block, side), block.qk if side == "qk" else block.vo
        cells = "".join(_cell(rank, size) for rank in ranks) + "<td></td>" * (columns - len(ranks))
        share = sum(rank or 0 for rank in ranks) / (size * len(ranks))
        lines.append(
            f'<tr title="{escape(block.name)}"><th scope="row">{escape(number)}</th>{cells}'
            f'<td class="mean">{share * 100:.0f} %</td></tr>'
        )
    caption = f"{'Q-K' if side == 'qk' else 'V-O'} directions kept"
    width = " dense" if columns > 16 else ""
    return f'<div class="map{width}"><table><caption>{caption}</caption>\n' + "\n".join(lines) + "</table></div>"


def _cell(rank: int | None, size: int) -> str:
    if rank is None:
        return '<td class="gone" title="head gone whole">&times;</td>'
    share = rank / size
    text = ' class="full"' if share > 0.55 else ""
    return f'<td{text} style="background:rgb(37 99 235/{share:.2f})" title="{rank} of {size}">{rank}</td>'


def _spectra_section(spectra: Sequence[Spectrum]) -> str:
    image = base64.b64encode(_render(spectra, "png", dpi=160, transparent=True)).decode()
    alt = (
        f"Small multiples on a log scale, one panel for each of {len(spectra)} attention blocks, Q-K left and V-O "
        "right: singular values as solid lines, norms of the original dimensions as dashed lines, from large to small."
    )
    return (
        "<section><h2>Spectra</h2>"
        '<p class="note">The faster a solid line falls, the more directions can go at little cost. The dashed lines '
        "are the norms that pruning without a change of basis would go by. Calibrated values are in units of their "
        "own: there compare slopes, not heights.</p>"
        f'<figure><img src="data:image/png;base64,{image}" alt="{escape(alt)}"></figure></section>'
    )


_PLAN = "<section><h2>Plan</h2><details><summary>As JSON</summary><pre>{}</pre></details></section>"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
