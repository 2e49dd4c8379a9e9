"""Figures of reports, drawn by matplotlib as SVG that takes its colours from the page.

Colours are stand-ins that ``_page_colours`` replaces by the page's variables, so that one drawing
serves light and dark; text stays text, and no two drawings share an id.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdrun.errors import UserError
from kdrun.report.details import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#010203", "#040506"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(10, 18))
"""Stand-ins for the page's colours: text, lines of the grid, and eight colours of data."""

WIDTH, HEIGHT = 4.6, 3.0
"""Inches of 72 units; a drawing fits the width of a phone without being shrunk."""

STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "text.parse_math": False,  # labels are what users typed
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "kdrun",
}


RARE = 0.01
"""A bin of the reliability diagram with a smaller share of the samples is not drawn."""

LABEL, TITLE = 26, 52
"""Characters in a line of a label beside the axes, and of a title or in a legend."""

EARLY = 0.2
"""This share of the epochs may lie outside a figure of curves, so that the rest can be seen."""


@dataclass(frozen=True)
class Line:
    """A curve with a band.

    Attributes:
        label: what it shows.
        x: ``(N,)``; ``mean`` likewise.
        low: lower end of the band, and ``high`` its upper; None: no band.
        colour: number of its colour.
        reference: drawn dashed.
    """

    label: str
    colour: int
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    reference: bool = False


@dataclass(frozen=True)
class Point:
    """One row of a comparison: mean, deviation and published number; None where unknown."""

    label: str
    mean: float | None
    std: float | None
    published: float | None
    reference: bool = False


def curves(title: str, lines: Sequence[Line], y: str) -> str:
    """Curves over epochs, with bands; the axis begins where the curves are early in training."""
    with styled():
        figure, axes = blank_figure(HEIGHT + 0.14 * len(lines))
        for line in lines:
            colour = SERIES[line.colour % len(SERIES)]
            dashes = "--" if line.reference else "-"
            # One epoch alone is a point.
            mark = "o" if len(line.x) == 1 else None
            axes.plot(line.x, line.mean, dashes, color=colour, marker=mark, label=line.label)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, lw=0)
        axes.set(title=title, xlabel="epoch", ylabel=y)
        whole_epochs(axes, max(len(line.x) for line in lines))
        _focus(axes, [line.mean for line in lines])
        legend(figure, axes)
        return svg_of(figure, f"{title}: {y} over epochs")


def comparison(title: str, points: Sequence[Point], x: str) -> str:
    """Rows with their deviations, and published numbers beside them."""
    with styled():
        labels = [wrapped(point.label, LABEL) for point in points]
        figure, axes = blank_figure(0.9 + 0.1 * len(points) + 0.165 * _lines(labels))
        places = np.arange(len(points))[::-1]
        for place, point in zip(places, points, strict=True):
            colour = SERIES[1] if point.reference else SERIES[0]
            if point.mean is not None:
                spread = point.std or 0.0
                axes.errorbar(point.mean, place, xerr=spread, fmt="o", color=colour, capsize=2.5)
            if point.published is not None:
                axes.plot(point.published, place, "x", color=SERIES[2], markersize=6)
        for point in points:
            if point.reference and point.mean is not None:
                axes.axvline(point.mean, color=SERIES[1], linewidth=0.8, linestyle=":")
        axes.set_yticks(places, labels)
        axes.set_ylim(-0.7, len(points) - 0.3)
        axes.set(title=title, xlabel=x)
        axes.grid(axis="y", visible=False)
        return svg_of(figure, f"{title}: {x} of each row")


def reliability_diagram(
    title: str, networks: Mapping[str, Reliability], colours: Mapping[str, int]
) -> str:
    """Confidence against accuracy; the diagonal is perfect calibration."""
    with styled():
        figure, axes = blank_figure(HEIGHT + 0.14 * len(networks))
        axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
        for label, found in networks.items():
            colour = SERIES[colours[label] % len(SERIES)]
            # The accuracy of a handful of samples is noise.
            often = found.share >= RARE
            confidence, accuracy = found.confidence[often], found.accuracy[often]
            axes.plot(confidence, accuracy, color=colour, linewidth=1)
            axes.scatter(confidence, accuracy, 6 + 120 * found.share[often], color=colour)
            axes.plot([], [], "o-", color=colour, label=f"{label} (ECE {found.error:.1f}%)")
        axes.set(
            title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03)
        )
        legend(figure, axes)
        return svg_of(figure, f"{title}: reliability diagram")


def heatmap(
    title: str, matrix: np.ndarray, labels: Sequence[str], x: str, y: str, low: float = 0.0
) -> str:
    """Percentages from ``low`` on as colours, and as numbers where there is room."""
    with styled():
        size = len(labels)
        rows = list(labels)
        long = max(map(len, labels), default=0) > 2
        if long:
            # Columns are told by the number of the row of the same name.
            named = enumerate(labels, start=1)
            rows = [wrapped(f"{number}: {label}", LABEL - 2) for number, label in named]
            labels = [str(number) for number in range(1, size + 1)]
        figure, axes = blank_figure(
            max(4.4 if size > 6 else 3.4, 0.6 + 0.08 * size + 0.165 * _lines(rows))
        )
        axes.imshow(matrix, cmap="viridis", vmin=low, vmax=100)
        axes.grid(visible=False)
        shown = range(size) if size <= 25 else range(0, size, -(-size // 20))
        axes.set_xticks(list(shown), [labels[i] for i in shown])
        axes.set_yticks(list(shown), [rows[i] for i in shown])
        axes.set(title=title, xlabel=x, ylabel=y)
        if size <= 12:
            for i in range(size):
                for j in range(size):
                    dark = matrix[i, j] < low + 0.6 * (100 - low)
                    value = f"{matrix[i, j]:.0f}" if matrix[i, j] >= 0.5 else ""
                    colour = "white" if dark else "black"
                    axes.text(j, i, value, ha="center", va="center", fontsize=7, color=colour)
        return svg_of(figure, f"{title}: {y} by {x}, percent")


def shares(title: str, epochs: np.ndarray, terms: Mapping[str, np.ndarray]) -> str:
    """What share of the loss each weighted term makes up, over epochs."""
    with styled():
        figure, axes = blank_figure(HEIGHT + 0.14 * len(terms))
        size = np.abs(np.stack(list(terms.values())))
        parts = 100 * size / np.maximum(size.sum(0), 1e-12)
        colours = [SERIES[number % len(SERIES)] for number in range(len(terms))]
        if len(epochs) == 1:
            bottom = 0.0
            for part, name, colour in zip(parts, terms, colours, strict=True):
                axes.bar([epochs[0]], part, bottom=bottom, color=colour, label=name, width=0.5)
                bottom += float(part[0])
        else:
            axes.stackplot(epochs, parts, labels=list(terms), colors=colours, alpha=0.85)
            axes.set_xlim(epochs[0], epochs[-1])
        axes.set(title=title, xlabel="epoch", ylabel="share of the loss, %", ylim=(0, 100))
        whole_epochs(axes, len(epochs))
        legend(figure, axes)
        return svg_of(figure, f"{title}: shares of the loss over epochs")


def bars(title: str, values: Mapping[str, float], x: str) -> str:
    """Percentages side by side."""
    with styled():
        figure, axes = blank_figure(0.9 + 0.3 * len(values))
        places = np.arange(len(values))[::-1]
        axes.barh(places, list(values.values()), color=SERIES[0], height=0.6)
        for place, value in zip(places, values.values(), strict=True):
            axes.text(value + 1, place, f"{value:.1f}", va="center", fontsize=8.5)
        axes.set_yticks(places, list(values))
        axes.set(title=title, xlabel=x, xlim=(0, max(100, 1.1 * max(values.values()))))
        axes.grid(axis="y", visible=False)
        return svg_of(figure, title)


def sensitivity(
    title: str, points: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str
) -> str:
    """A result against one option: every run, and the mean at each value, for each method."""
    with styled():
        figure, axes = blank_figure(HEIGHT + 0.14 * len(points))
        values = np.array([value for found in points.values() for value, _ in found])
        for number, (label, found) in enumerate(points.items()):
            colour = SERIES[number % len(SERIES)]
            array = np.array(sorted(found))
            axes.scatter(array[:, 0], array[:, 1], 14, color=colour, alpha=0.6)
            places = np.unique(array[:, 0])
            means = [array[array[:, 0] == place, 1].mean() for place in places]
            axes.plot(places, means, color=colour, label=label)
        if values.min() > 0 and values.max() / values.min() >= 30:
            logarithmic(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        legend(figure, axes)
        return svg_of(figure, f"{title}: {y} against {x}")


# -- drawing ---------------------------------------------------------------------------------------


def styled() -> AbstractContextManager[None]:
    """The look of all figures, for the length of a block."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError("pages need matplotlib: pip install 'kdrun[report]'") from None
    return rc_context(STYLE)


def blank_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the common width, ``height`` inches high, with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    # The page's font may be wider than the one that is measured here.
    figure.get_layout_engine().set(w_pad=0.12)
    return figure, figure.add_subplot()


def logarithmic(axes: Axes) -> None:
    """A logarithmic axis to the right, with plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}" if x < 1e6 else f"{x:.0e}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def whole_epochs(axes: Axes, count: int) -> None:
    """Whole epochs on the axis; a single one in the middle of it."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    if count == 1:
        axes.set_xticks([1])
        axes.set_xlim(0, 2)


def _focus(axes: Axes, means: Sequence[np.ndarray]) -> None:
    """Let the axis begin (or end, for what falls) where the curves are after the first epochs."""
    later = [mean[max(1, round(EARLY * len(mean))) :] for mean in means if len(mean) > 4]
    if len(later) < len(means):
        return
    values = np.concatenate(later)
    values = values[np.isfinite(values)]
    if not len(values) or not np.ptp(values):
        return
    room = 0.08 * np.ptp(values)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, values.min() - room), min(high, values.max() + room))


def legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it never hides data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 2 if max(map(len, labels)) < 22 else 1
        shown = [wrapped(label, TITLE) for label in labels]
        figure.set_figheight(figure.get_figheight() + 0.14 * (_lines(shown) - len(shown)))
        figure.legend(handles, shown, loc="outside lower left", ncols=columns)


def wrapped(label: str, width: int) -> str:
    """A label in lines of at most so many characters; nothing of it is left out."""
    lines = textwrap.wrap(label, width, break_on_hyphens=False)
    return "\n".join(lines) or label


def _lines(labels: Sequence[str]) -> int:
    return sum(label.count("\n") + 1 for label in labels)


def svg_of(figure: Figure, description: str) -> str:
    """The drawing as an ``<svg>`` element for a page."""
    for axes in figure.axes:
        axes.set_title(wrapped(axes.get_title(loc="left"), TITLE))
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    head, end, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = f'<svg {box[0]} role="img" aria-label="{label}"'
    return _page_colours(_without_ids(head + end + body)).strip()


def _without_ids(text: str) -> str:
    """Ids that nothing refers to go; the others get a name that no other drawing has."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    prefix = f"d{hashlib.sha256(text.encode()).hexdigest()[:8]}-"

    def replaced(found: re.Match[str]) -> str:
        return f' id="{prefix}{found[1]}"' if found[1] in used else ""

    text = re.sub(r' id="([^"]*)"', replaced, text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)


def _page_colours(text: str) -> str:
    names = {INK: "--ink", FAINT: "--line"}
    names |= {colour: f"--data{number}" for number, colour in enumerate(SERIES)}
    for colour, name in names.items():
        text = text.replace(colour, f"var({name})")
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
