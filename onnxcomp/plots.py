"""Plots as inline SVG: drawn by matplotlib, coloured and lettered by the page that they stand in.

Matplotlib is imported when a plot is drawn. Its colours here are placeholders that become the page's custom properties,
so that plots follow dark mode; text stays text, in the page's font; names are never read as markup or mathematics. The
same values give the same bytes.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from onnxcomp.errors import OptionError
from onnxcomp.report import Histogram
from onnxcomp.wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "ink": "#010203", "soft": "#020304", "line": "#030405", "panel": "#040506", "before": "#050607", "bad": "#060708",
    "c0": "#070809", "c1": "#08090a", "c2": "#090a0b", "c3": "#0a0b0c", "c4": "#0b0c0d", "c5": "#0c0d0e",
}  # fmt: skip
"""Placeholders by the name of the custom property that takes their place."""

SERIES = tuple(name for name in _COLOURS if re.fullmatch(r"c\d", name))
"""Colours that tell things apart."""

_WIDTH = 340.0  # units of the drawing, about a phone's pixels
_TEXT = 11.0
_ROW = 33.0
_DECADES = 1e6
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxcomp",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.size": _TEXT,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["soft"],
    "axes.edgecolor": _COLOURS["line"],
    "xtick.color": _COLOURS["line"],
    "ytick.color": _COLOURS["line"],
    "xtick.labelcolor": _COLOURS["soft"],
    "ytick.labelcolor": _COLOURS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.6,
}


def require() -> None:
    """Refuse to go on where nothing can be drawn.

    Raises:
        OptionError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise OptionError(
            "a page needs matplotlib, which is not installed",
            "onnxcomp was installed without its extra for pages",
            "pip install 'onnxcomp[report]'",
        )


def shortened(name: str, most: int = 44, head: int | None = None) -> str:
    """A name on one line, its middle left out where it is long: there names of layers are most alike.

    Args:
        name: any text.
        most: characters.
        head: of them before the gap; half by default.
    """
    line = " ".join(printable(name).split())
    if len(line) <= most:
        return line
    head = (most - 1) // 2 if head is None else head
    return f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"


def told_apart(names: Sequence[str], most: int = 44) -> list[str]:
    """Names shortened alike, by the cut nearest to the middle that leaves different ones different."""
    half = (most - 1) // 2
    cuts = sorted(range(most), key=lambda head: (abs(head - half), head))
    wanted = len(set(names))
    short = ([shortened(name, most, head) for name in names] for head in cuts)
    return next((found for found in short if len(set(found)) == wanted), [shortened(name, most) for name in names])


# --- the plots ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A model among others.

    Attributes:
        latency: milliseconds.
        loss: of the metric, as the axis shows it.
        label: beside it.
        kind: `original`, `trial` or `result`.
    """

    latency: float
    loss: float
    label: str
    kind: str = "trial"


def pareto(
    points: Sequence[Point],
    axis: str,
    most_loss: float | None = None,
    most_latency: float | None = None,
    span: float = 0,
) -> str:
    """Loss against latency, the better the further up and left, with the front of those that none beats in both.

    Args:
        points: the result is measured on other samples, and is no part of the front.
        axis: what the loss is.
        most_loss: the budget of losses.
        most_latency: the budget of milliseconds.
        span: of losses, at least.
    """
    with _drawing(280, 380) as figure:
        axes = _axes(figure, 58, 42, 12, 12)
        axes.grid(True)
        axes.set_axisbelow(True)
        looks = {"original": ("s", 46, "before"), "trial": ("o", 34, "c0"), "result": ("*", 190, "c1")}
        for point in points:
            marker, size, colour = looks[point.kind]
            axes.scatter(
                [point.latency], [point.loss], size, marker=marker, color=_COLOURS[colour],
                edgecolors=_COLOURS["panel"], linewidths=0.8, zorder=3,
            )  # fmt: skip
        limits = [value for value in (most_loss,) if value is not None]
        losses, latencies = [point.loss for point in points] + limits, [point.latency for point in points]
        low, high = min(losses, default=0.0), max(losses, default=0.0)
        spread = max(high - low, span, 1e-9)
        slack = (spread - (high - low)) / 2 + 0.14 * spread
        axes.set_ylim(high + slack, low - slack)
        right = max([*latencies, most_latency or 0.0], default=0.0) or 1.0
        axes.set_xlim(0, 1.14 * right)
        if front := _front([point for point in points if point.kind != "result"]):  # from one edge to the other
            axes.step(
                [front[0].latency, *(point.latency for point in front), 1.14 * right],
                [high + slack, *(point.loss for point in front), front[-1].loss],
                where="post", color=_COLOURS["c0"], linewidth=1.4,
            )  # fmt: skip
        if most_loss is not None:
            axes.axhline(most_loss, color=_COLOURS["bad"], linewidth=1.2, linestyle=(0, (4, 3)))
        if most_latency is not None:
            axes.axvline(most_latency, color=_COLOURS["bad"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel("latency, ms")
        axes.set_ylabel(axis)
        _label(axes, points)
        return _svg(figure, f"{len(points)} models: {axis} against latency in milliseconds")


def _front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, the fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.latency, point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def _label(axes: "Axes", points: Sequence[Point]) -> None:
    """Beside each point, in the first of several places where nothing is yet."""
    taken = [axes.transData.transform((point.latency, point.loss)) for point in points]
    boxes = [(x - 5, y - 5, x + 5, y + 5) for x, y in taken]
    for (x, y), point in zip(taken, points, strict=True):
        width = 6.2 * len(point.label)
        centre, after, before = x - width / 2, x + 9, x - 9 - width
        places = [(centre, y + 7), (centre, y - 16), (after, y - 4), (before, y - 4), (after, y + 6), (before, y + 6)]
        places += [(after, y - 14), (before, y - 14), (centre, y + 18), (centre, y - 27)]
        left, bottom = next((p for p in places if not _meets((*p, p[0] + width, p[1] + 10), boxes)), places[0])
        boxes.append((left, bottom, left + width, bottom + 10))
        across, up = axes.transAxes.inverted().transform((left, bottom))
        axes.text(across, up, point.label, transform=axes.transAxes, fontsize=10, zorder=4)


def _meets(box: tuple[float, float, float, float], others: Sequence[tuple[float, float, float, float]]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


@dataclass(frozen=True)
class Bars:
    """A name with up to two bars below it.

    Attributes:
        name, words: on the left and on the right.
        before, after: lengths; None for no bar.
        colour: of the second.
    """

    name: str
    words: str
    before: float | None
    after: float | None
    colour: str


def bars(rows: Sequence[Bars], title: str) -> str:
    """Names above their bars, which so fit on a phone."""
    with _drawing(_ROW * len(rows) + 4) as figure:
        axes = _list_axes(figure, len(rows))
        longest = max((length for row in rows for length in (row.before, row.after) if length is not None), default=0)
        axes.set_xlim(0, longest or 1)
        for place, (row, name) in enumerate(zip(rows, told_apart([row.name for row in rows]), strict=True)):
            _heading(axes, place, name, row.words)
            for length, top, colour in ((row.before, 16, "before"), (row.after, 22.5, row.colour)):
                if length is not None:
                    axes.barh(_ROW * place + top, length, 5.5, align="edge", color=_COLOURS[colour])
        return _svg(figure, title)


def lollipops(rows: Sequence[Bars], title: str) -> str:
    """The same, with a dot on a logarithmic axis in place of the second bar; it ends six decades below the highest."""
    with _drawing(_ROW * len(rows) + 30) as figure:
        axes = _list_axes(figure, len(rows), below=26)
        values = [row.after for row in rows if row.after is not None and row.after > 0]
        high = max(values, default=1.0)
        low = max(min(values, default=1e-3), high / _DECADES)
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(low) - 0.01), 10 ** math.ceil(math.log10(high) + 0.01))
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:g}" if value >= 1 else f"{value:.0e}".replace("e-0", "e-")
        )
        axes.tick_params(axis="x", bottom=True, labelbottom=True, which="major")
        axes.spines["bottom"].set_visible(True)
        axes.grid(True, axis="x")
        for place, (row, name) in enumerate(zip(rows, told_apart([row.name for row in rows]), strict=True)):
            _heading(axes, place, name, row.words)
            if row.after is not None and row.after > 0:
                x, y = max(row.after, low), _ROW * place + 22
                axes.plot([axes.get_xlim()[0], x], [y, y], color=_COLOURS[row.colour], linewidth=2)
                axes.plot([x], [y], "o", color=_COLOURS[row.colour], markersize=5)
        return _svg(figure, title)


def histogram(before: Histogram, after: Histogram | None, title: str) -> str:
    """How values are distributed: the original's filled, the result's as a line; each by its own highest bin."""
    with _drawing(92, 164) as figure:
        axes = _axes(figure, 6, 22, 6, 4)
        edges = np.linspace(before.low, before.high, len(before.counts) + 1)
        axes.stairs(_scaled(before.counts), edges, fill=True, color=_COLOURS["before"])
        if after is not None:
            axes.stairs(_scaled(after.counts), edges, color=_COLOURS["c0"], linewidth=1.4, baseline=None)
        axes.set_ylim(0, 1.08)
        axes.set_xlim(before.low, before.high)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xticks([before.low, before.high], [f"{before.low:.3g}", f"{before.high:.3g}"], fontsize=9.5)
        first, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        return _svg(figure, title)


def _scaled(counts: Sequence[int]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    array = np.asarray(counts, np.float64)
    return np.asarray(array / (array.max(initial=0.0) or 1.0))


def distribution(kept: Sequence[float], removed: Sequence[float], axis: str) -> str:
    """What was kept and what went, by what it was worth; on a logarithmic axis beyond two decades."""
    values = np.asarray([*kept, *removed], np.float64)
    positive = values[values > 0]
    decades = bool(positive.size) and positive.max() > 100 * positive.min()
    floor = positive.min() if decades else 0.0
    pair = [
        np.maximum(np.asarray(part, np.float64), floor) if decades else np.asarray(part) for part in (kept, removed)
    ]
    low, high = (floor, values.max()) if decades else (min(values.min(), 0.0), values.max())
    high = high if high > low else low + 1.0
    edges = np.geomspace(low, high, 31) if decades else np.linspace(low, high, 31)
    with _drawing(240) as figure:
        axes = _axes(figure, 44, 40, 12, 8)
        axes.hist(pair, edges.tolist(), histtype="stepfilled", stacked=True, color=[_COLOURS["c0"], _COLOURS["bad"]])
        if decades:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(axis)
        axes.set_ylabel("channels")
        return _svg(figure, f"Channels kept and removed, by {axis}")


# --- figures --------------------------------------------------------------------------------------------------------


@contextmanager
def _drawing(height: float, width: float = _WIDTH) -> Iterator["Figure"]:
    """A figure of so many units, drawn by matplotlib's own style whatever the user's is."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), style.context(["default", _RC]):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font draws them
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def _axes(figure: "Figure", left: float, bottom: float, right: float, top: float) -> "Axes":
    """Axes with margins in units."""
    width, height = 72 * figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, max(1 - (bottom + top) / height, 1e-3))
    )


def _list_axes(figure: "Figure", count: int, below: float = 2) -> "Axes":
    """Axes on which a unit down is one of the drawing, without lines and ticks."""
    side = 16 if below > 2 else 0  # half of a tick's label
    axes = _axes(figure, side, below, side, 2)
    axes.set_ylim(_ROW * max(count, 1), 0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks([])
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    return axes


def _heading(axes: "Axes", place: int, name: str, words: str) -> None:
    across = axes.get_yaxis_transform()
    y, size = _ROW * place + 11.5, 9.5 if len(name) + len(words) > 50 else 10.5
    axes.text(0, y, name, transform=across, fontsize=size)
    axes.text(1, y, words, transform=across, fontsize=size, ha="right", color=_COLOURS["soft"])


# --- SVG ------------------------------------------------------------------------------------------------------------


def _svg(figure: "Figure", title: str) -> str:
    """The figure as an element for a page of HTML, where no two figures have the same title."""
    text = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing)
    root = ElementTree.fromstring(text.getvalue())
    _plain(root, f"p{hashlib.sha256(title.encode('utf-8', 'replace')).hexdigest()[:10]}-")
    for extra in ("width", "height", "version"):
        root.attrib.pop(extra, None)
    root.attrib |= {"xmlns": _SVG.strip("{}"), "role": "img", "aria-label": " ".join(printable(title).split())}
    return ElementTree.tostring(root, encoding="unicode")


def _plain(element: ElementTree.Element, prefix: str) -> None:
    """Without namespaces, metadata and styles; identifiers unique on the page, colours and font the page's."""
    for child in list(element):
        if child.tag in {f"{_SVG}metadata", f"{_SVG}style"}:
            element.remove(child)
        else:
            _plain(child, prefix)
    element.tag = element.tag.removeprefix(_SVG)
    if element.tag == "g":  # nothing points to groups
        element.attrib.pop("id", None)
    element.attrib = {name.removeprefix(_LINK): _value(name, text, prefix) for name, text in element.attrib.items()}


_VARIABLES: Mapping[str, str] = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}


def _value(name: str, text: str, prefix: str) -> str:
    if name == "id":
        return prefix + text
    if name == f"{_LINK}href":
        return text.replace("#", f"#{prefix}", 1)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", re.sub(r"font-family:[^;]*;?", "", text))
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)
