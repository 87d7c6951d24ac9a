"""A report as one page of HTML that needs nothing beside itself: to read, to attach to a release, to print.

Only values of the report are shown. Whatever came with the model or from the user is escaped.
"""

import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import PurePath
from string import Template

from onnxcomp import plots, registry
from onnxcomp.core import Width
from onnxcomp.plots import SERIES, Bars, Point
from onnxcomp.report import Figures, LayerRow, Report, Step, Trial
from onnxcomp.wording import (
    between,
    budget_in_words,
    byte_count,
    grouped,
    is_share,
    loss,
    printable,
    ratio,
    score,
    seconds,
    several,
    signed,
)

_DRAWN = 24
_TILES = 12
_NAMES = 8
_NOTHING = "–"
_UNTOUCHED = "as it was"
_SIGNIFICANT = 1e-3
"""Share of the model's bytes below which a layer that takes no time is not listed."""

require = plots.require


def html_of(report: Report) -> str:
    """The report as HTML; the same report gives the same text.

    Raises:
        OptionError: matplotlib is not installed.
    """
    require()
    name = PurePath(report.output or report.source).name
    sections = (
        _headline(report),
        _trials(report),
        _layers(report.layers),
        _weights(report.layers),
        _saliency([width for step in report.steps for width in step.widths]),
        _steps(report.steps),
        _skips(report.steps),
        _notes(report.notes),
        _again(report),
    )
    return Template(files("onnxcomp").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=_text(f"{name}: what onnxcomp did, and what it brought"),
        heading=_text(name),
        subheading=f"made from <code>{_text(report.source)}</code>",
        body="\n".join(sections),
        footer=_text(f"onnxcomp {report.environment.get('onnxcomp', '')}"),
    )


# --- text and tables ------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Anything as text that is no markup."""
    return escape(printable(str(value)))


def _name(value: str) -> str:
    """The same, of a node: it may break behind its separators."""
    return re.sub(r"([/.:_])(?=\w)", r"\1<wbr>", _text(value))


def _section(heading: str, *parts: str) -> str:
    return f"<section>\n<h2>{_text(heading)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _paragraph(text: str) -> str:
    return f'<p class="soft">{_text(text)}</p>'


def _table(
    headings: Mapping[str, str], rows: Iterable[Sequence[str]], marked: Sequence[bool] = (), kind: str = ""
) -> str:
    """A table that scrolls in its own box.

    Args:
        headings: with the class of their column.
        rows: texts.
        marked: which rows stand out.
        kind: class of the box.
    """
    lines = [f'<div class="scroll {kind}" tabindex="0"><table>', "<thead><tr>"]
    lines += [f'<th class="{kind}">{_text(heading)}</th>' for heading, kind in headings.items()]
    lines.append("</tr></thead><tbody>")
    for place, row in enumerate(rows):
        cells = (
            f'<td class="{kind}">{_name(cell) if kind == "name" else _text(cell)}</td>'
            for cell, kind in zip(row, headings.values(), strict=True)
        )
        chosen = ' class="chosen"' if place < len(marked) and marked[place] else ""
        lines.append(f"<tr{chosen}>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>\n{content}\n</details>"


def _pairs(pairs: Mapping[str, str]) -> str:
    inner = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs.items() if value)
    return f"<dl>{inner}</dl>"


def _legend(entries: Mapping[str, str]) -> str:
    items = (
        f'<li><span style="background: var(--{colour})"></span>{_text(name)}</li>' for name, colour in entries.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _or_nothing(value: float | None, form: Callable[[float], str]) -> str:
    return _NOTHING if value is None else form(value)


def _time(value: float) -> str:
    return seconds(value).replace(" us", " µs")


# --- headline -------------------------------------------------------------------------------------------------------


def _headline(report: Report) -> str:
    before, after = report.original, report.result
    share = after.size / before.size
    cards = [
        _card(
            "size of the file",
            ratio(1 / share, "smaller", "larger"),
            (byte_count(before.size), byte_count(after.size)),
            (f"{share:.1%} of the original, counted in bytes"),
        )
    ]
    if before.latency is not None and after.latency is not None:
        spread = "with 95% of the blocks of runs in brackets, and the quartiles of the speed-up"
        speedup = _time(after.latency)
        if after.speedup:
            speedup = ratio(after.speedup, "faster", "slower", after.speedup_interval)
        cards.append(_card("latency", speedup, tuple(_latency(figures) for figures in (before, after)), spread))
    if after.score is not None:

        def form(value: float) -> str:
            return score(report.metric, value)

        values = tuple(
            _or_nothing(figures.score, form) + between(figures.score_interval, form) for figures in (before, after)
        )
        lost = loss(report.metric, after.drop)
        remark = "with 95% intervals in brackets"
        if after.drop_interval is not None and all(map(math.isfinite, after.drop_interval)):
            lost += between(after.drop_interval, partial(signed, report.metric))
            remark += "; of the loss on the same samples, where a minus is a gain"
        cards.append(_card(report.metric, lost, values, remark))
    about = report.environment
    threads = "ONNX Runtime's own choice" if about.get("threads") == 0 else str(about.get("threads", ""))
    facts = {
        "Provider": str(about.get("provider", "")).removesuffix("ExecutionProvider"),
        "Machine": str(about.get("machine", "")),
        "Threads": threads,
        "Batch": str(about.get("batch", "")),
        "Runtime": f"ONNX Runtime {about.get('onnxruntime', '')}",
        "Latency": report.protocol if after.latency is not None else "not measured",
        "Quality": report.data,
    }
    return "\n".join(
        [
            f'<div class="cards">{"".join(cards)}</div>',
            _verdict(report),
            _section("How it was measured", _pairs(facts)),
        ]
    )


def _card(what: str, headline: str, values: Sequence[str], remark: str) -> str:
    rows = "".join(
        f"<tr><th>{name}</th><td>{_bracketed(value)}</td></tr>"
        for name, value in zip(("original", "result"), values, strict=True)
    )
    return (
        f'<div><span class="what">{_text(what)}</span><b>{_bracketed(headline)}</b>'
        f'<table>{rows}</table><span class="note">{_text(remark)}</span></div>\n'
    )


def _bracketed(value: str) -> str:
    """A value, its interval set back."""
    number, bracket, interval = value.partition(" [")
    return _text(number) + (f" <i>{_text(f'[{interval}')}</i>" if bracket else "")


def _latency(figures: Figures) -> str:
    return _or_nothing(figures.latency, _time) + between(figures.latency_interval, _time)


def _verdict(report: Report) -> str:
    if report.unmet:
        return f'<div class="verdict unmet">NOT within the budget: {_text("; ".join(report.unmet))}</div>'
    if limits := budget_in_words(report.budget, report.metric):
        return f'<div class="verdict met">Within the budget: {_text(limits)}</div>'
    return '<div class="verdict">No limits were given: the usual loss of the metric was accepted.</div>'


# --- what was tried -------------------------------------------------------------------------------------------------


def _trials(report: Report) -> str:
    heading = "Accuracy against latency"
    trials = report.trials
    if not trials and report.result.latency is None:
        return _section(heading, _paragraph("Nothing was measured that could be compared."))
    rows = [_trial(place, trial, report.metric) for place, trial in enumerate(trials, 1)]
    headings = {"#": "number", "candidate": "words", "size": "number", "latency": "number", "speed-up": "number"}
    headings |= {"loss": "number", "verdict": "words"}
    table = _table(headings, rows, [trial.verdict == "chosen" for trial in trials]) if trials else ""
    points = list(_points(report))
    if not points:
        return _section(heading, _paragraph("No model has both its latency and its loss measured."), table)
    share, budget, latency = is_share(report.metric), report.budget, report.original.latency
    fastest = [budget.max_latency] if budget.max_latency is not None else []
    fastest += [latency / budget.min_speedup] if budget.min_speedup and latency is not None else []
    svg = plots.pareto(
        points,
        "loss, points" if share else f"loss of {plots.shortened(report.metric, 30)}",
        None if budget.max_drop is None else budget.max_drop * (100 if share else 1),
        1e3 * min(fastest) if fastest else None,
        1.0 if share else 0.0,
    )
    entries = {"candidates by number, and their front": "c0", "original": "before", "result": "c1"}
    if fastest or budget.max_drop is not None:
        entries["the budget"] = "bad"
    caption = (
        "Up and to the left is better. Latencies of candidates are the original's over their speed-up, measured side "
        "by side; losses are those that the search saw, the result's is that on the samples held out. Candidates whose "
        "loss was not measured are in the table only."
    )
    beside = f'<div class="split"><figure>{svg}</figure><div>{_legend(entries)}{_paragraph(caption)}</div></div>'
    return _section(heading, beside, table)


def _points(report: Report) -> Iterator[Point]:
    factor = 100 if is_share(report.metric) else 1
    base = report.original.latency

    def point(figures: Figures, label: str, kind: str) -> Iterator[Point]:
        latency = base / figures.speedup if base is not None and figures.speedup else figures.latency
        if latency is not None and figures.drop is not None and math.isfinite(figures.drop):
            yield Point(1e3 * latency, factor * figures.drop, label, kind)

    yield from point(report.original, "original", "original")
    for place, trial in enumerate(report.trials, 1):
        yield from point(trial.figures, str(place), "trial")
    yield from point(report.result, "result", "result")


def _trial(place: int, trial: Trial, metric: str) -> tuple[str, ...]:
    figures = trial.figures
    return (
        str(place),
        trial.name,
        byte_count(figures.size) if figures.size else _NOTHING,
        _or_nothing(figures.latency, _time),
        _or_nothing(figures.speedup, lambda value: f"{value:.2f}x"),
        _or_nothing(figures.drop, lambda value: loss(metric, value) if math.isfinite(value) else "no use"),
        trial.verdict,
    )


# --- layers ---------------------------------------------------------------------------------------------------------


def _layers(rows: Sequence[LayerRow]) -> str:
    heading = "Layer by layer"
    if not rows:
        return _section(heading, _paragraph("Layers were not looked at."))
    total = max(sum(row.bytes or 0 for row in rows), sum(row.bytes_after or 0 for row in rows), 1)
    listed = [row for row in rows if _matters(row, total)]
    drawn = _largest(listed)
    kinds = list(dict.fromkeys(_kind(row) for row in drawn))
    techniques = [kind for kind in kinds if kind != _UNTOUCHED]
    colours = {_UNTOUCHED: "soft"} | dict(zip(techniques, (*SERIES, *[SERIES[-1]] * len(techniques)), strict=False))

    def panel(before: str, after: str, form: Callable[[float], str], title: str) -> str:
        bars = [
            Bars(
                row.name,
                _change(getattr(row, before), getattr(row, after), form),
                getattr(row, before),
                getattr(row, after),
                colours[_kind(row)],
            )
            for row in drawn
        ]
        return f"<div><h3>{_text(title)}</h3>{plots.bars(bars, f'{title} of each layer, before and after')}</div>"

    errors = [
        Bars(row.name, _or_nothing(row.sensitivity, _error), None, row.sensitivity, colours[_kind(row)])
        for row in drawn
    ]
    panels = (
        panel("microseconds", "microseconds_after", _microseconds, "Time"),
        panel("bytes", "bytes_after", byte_count, "Bytes of weights"),
        f"<div><h3>Sensitivity</h3>{plots.lollipops(errors, 'Error of the output of each layer')}</div>",
    )
    named = sum(bool(row.name) for row in listed)
    few = f"The {len(drawn)} layers that take or store most, of {named}. " if len(drawn) < named else ""
    words = (
        f"{few}Time is from ONNX Runtime's own profiles of both models, run in turn; {_NOTHING} is a layer that was "
        "fused into a neighbour, or is gone. Sensitivity is the relative squared error of the layer's output in the "
        f"result, with what all layers before it add; {_NOTHING} is one without a counterpart there, as after pruning."
    )
    hidden = len(rows) - len(listed)
    rest = f"{hidden} more nodes take no time of their own and store next to nothing." if hidden else ""
    table = _table(
        {
            "layer": "name", "operator": "", "time": "number", "time after": "number", "bytes": "number",
            "bytes after": "number", "technique": "words", "sensitivity": "number",
        },
        [*map(_layer, listed), _sums(rows)],
        [*[False] * len(listed), True],
        "tall",
    )  # fmt: skip
    return _section(
        heading,
        _legend({"before": "before"} | {f"after: {kind}": colours[kind] for kind in kinds}),
        f'<div class="panels">{"".join(panels)}</div>',
        _paragraph(words),
        _details(f"{several(named, 'layer')} as a table", table + (_paragraph(rest) if rest else "")),
    )


def _change(before: float | None, after: float | None, form: Callable[[float], str]) -> str:
    if before == after == 0:
        return "none"
    return f"{_or_nothing(before, form)} → {_or_nothing(after, form)}"


def _matters(row: LayerRow, total: int) -> bool:
    timed = row.microseconds is not None or row.microseconds_after is not None
    return timed or max(row.bytes or 0, row.bytes_after or 0) > _SIGNIFICANT * total


def _largest(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Those with names that take or store most, in the order of the model."""
    rows = [row for row in rows if row.name]

    def share(field: str) -> Callable[[LayerRow], float]:
        whole = sum(getattr(row, field) or 0 for row in rows) or 1
        return lambda row: (getattr(row, field) or 0) / whole

    shares = [share(field) for field in ("microseconds", "microseconds_after", "bytes", "bytes_after")]
    most = sorted(range(len(rows)), key=lambda place: (-max(part(rows[place]) for part in shares), place))[:_DRAWN]
    return [rows[place] for place in sorted(most)]


def _kind(row: LayerRow) -> str:
    """The techniques of a layer in few words; a clean-up is only worth one where it is all."""
    names = list(dict.fromkeys(technique.partition(":")[0] for technique in row.techniques))
    cleaning = {registry.passes()[name].__name__ for name in registry.GROUPS["clean-up"]}
    others = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in names if name not in cleaning]
    return " + ".join(others) or ("clean-up" if names else _UNTOUCHED)


def _microseconds(value: float) -> str:
    return _time(value * 1e-6)


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _layer(row: LayerRow) -> tuple[str, ...]:
    return (
        row.name or "put in by ONNX Runtime",
        row.op,
        _or_nothing(row.microseconds, _microseconds),
        _or_nothing(row.microseconds_after, _microseconds),
        _or_nothing(row.bytes, byte_count),
        _or_nothing(row.bytes_after, byte_count),
        "; ".join(row.techniques) or _NOTHING,
        _or_nothing(row.sensitivity, _error),
    )


def _sums(rows: Sequence[LayerRow]) -> tuple[str, ...]:
    times = [sum(getattr(row, field) or 0 for row in rows) for field in ("microseconds", "microseconds_after")]
    sizes = [sum(getattr(row, field) or 0 for row in rows) for field in ("bytes", "bytes_after")]
    return ("in all", "", *map(_microseconds, times), *map(byte_count, sizes), "", "")


# --- weights and saliency -------------------------------------------------------------------------------------------


def _weights(rows: Sequence[LayerRow]) -> str:
    heading = "Weights"
    known = [row for row in rows if row.weights is not None]
    if not known:
        return _section(heading, _paragraph("There are no weights whose values are known."))
    most = sorted(range(len(known)), key=lambda place: (-sum(_counts(known[place])), place))[:_TILES]
    tiles = []
    for row in (known[place] for place in sorted(most)):
        assert row.weights is not None
        svg = plots.histogram(row.weights, row.weights_after, f"Weights of {row.name}")
        caption = f'<figcaption title="{_text(row.name)}">{_name(plots.shortened(row.name, 60))}</figcaption>'
        tiles.append(f"<figure>{svg}{caption}</figure>")
    few = f"The {len(tiles)} largest of {len(known)}. " if len(tiles) < len(known) else ""
    words = (
        f"{few}Each is scaled to its highest bin. Clean-up folds normalisations into weights, which rescales them. "
        "No line: the layer is gone, split, or stored in a form that only its kernel reads."
    )
    return _section(
        heading,
        _legend({"original": "before", "result": "c0"}),
        f'<div class="tiles">{"".join(tiles)}</div>',
        _paragraph(words),
    )


def _counts(row: LayerRow) -> tuple[int, ...]:
    return () if row.weights is None else row.weights.counts


def _saliency(widths: Sequence[Width]) -> str:
    heading = "Saliency of channels"
    if not widths:
        return _section(heading, _paragraph("Nothing was pruned, so no channel was ranked."))
    ordered = sorted(widths, key=lambda width: len(width.kept) / max(width.size, 1))
    rows = [
        Bars(width.group, f"{width.size} → {len(width.kept)}", width.size, len(width.kept), "c0")
        for width in ordered[:_DRAWN]
    ]
    kept, removed = _relative_saliency(widths)
    parts = [f"<div><h3>Channels left</h3>{plots.bars(rows, 'Channels of each group, before and after')}</div>"]
    if kept or removed:
        svg = plots.distribution(kept, removed, "saliency, over the mean of its group")
        legend = _legend({"kept": "c0", "removed": "bad"})
        parts.append(f"<div><h3>What went and what stayed</h3>{svg}{legend}</div>")
    table = _table(
        {"group of channels": "name", "before": "number", "left": "number", "share": "number"},
        [
            (width.group, str(width.size), str(len(width.kept)), f"{len(width.kept) / max(width.size, 1):.0%}")
            for width in ordered
        ],
        kind="tall",
    )
    words = (
        "Groups of channels that only go together, those that lost the largest share first. A channel of high saliency "
        "can go where its group costs much time, and one of low saliency stay: the cost decides too."
    )
    return _section(
        heading,
        f'<div class="panels">{"".join(parts)}</div>',
        _paragraph(words),
        _details(f"{several(len(ordered), 'group')} as a table", table),
    )


def _relative_saliency(widths: Sequence[Width]) -> tuple[list[float], list[float]]:
    """Of the channels kept and of those removed, each over the mean of its group."""
    sides: tuple[list[float], list[float]] = [], []
    for width in widths:
        left, finite = set(width.kept), [value for value in width.saliency if math.isfinite(value)]
        mean = sum(map(abs, finite)) / len(finite) if finite else 0.0
        for channel, value in enumerate(width.saliency):
            if math.isfinite(value):
                sides[channel not in left].append(value / mean if mean else 0.0)
    return sides


# --- what was done, and what not ------------------------------------------------------------------------------------


def _steps(steps: Sequence[Step]) -> str:
    heading = "What was done"
    if not any(step.changes for step in steps):
        return _section(heading, _paragraph("Nothing was changed."))
    parts = []
    for step in steps:
        groups = grouped([(change.node, change.what) for change in step.changes])
        items = "".join(_group(f"{len(nodes)} × {what}", nodes) for what, nodes in groups)
        name = step.recipe.partition("(")[0]
        parts.append(f"<h3>{_text(name)}</h3>" + (f"<ul>{items}</ul>" if items else _paragraph("It changed nothing.")))
    return _section(heading, *parts)


def _group(what: str, nodes: Sequence[str]) -> str:
    names = f'<span class="soft">{", ".join(map(_name, nodes))}</span>'
    return f"<li>{_details(what, names)}</li>" if len(nodes) > _NAMES else f"<li>{_text(what)}: {names}</li>"


def _skips(steps: Sequence[Step]) -> str:
    heading = "What was left, and why"
    parts = []
    for step in steps:
        if groups := grouped([(skip.node, skip.reason) for skip in step.skips]):
            items = "".join(_group(f"{len(nodes)} × {reason}", nodes) for reason, nodes in groups)
            parts.append(f"<h3>{_text(step.recipe.partition('(')[0])}</h3><ul>{items}</ul>")
    return _section(heading, *(parts or [_paragraph("No technique left anything out that it could have treated.")]))


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return _section("Notes", f"<ul>{items}</ul>" if items else _paragraph("There is nothing else to know."))


def _again(report: Report) -> str:
    about = report.environment
    facts = {
        "Input": report.source,
        "SHA-256": report.fingerprint,
        "Result": report.output or "kept in memory",
        "Seed": str(about.get("seed", "")),
        "Versions": f"onnxcomp {about.get('onnxcomp', '')}, ONNX Runtime {about.get('onnxruntime', '')}, "
        f"Python {about.get('python', '')}",
        "Machine": str(about.get("machine", "")),
    }
    command = f"<h3>Command</h3><pre>{_text(_folded(report.command))}</pre>" if report.command else ""
    return _section(
        "How to reproduce it",
        _pairs(facts),
        command,
        _paragraph(
            "The search goes by measured time, so another machine may choose otherwise. What it chose is the recipe, "
            "which the result also carries in its metadata. This gives the same again:"
        ),
        "<pre>onnxcomp apply INPUT --recipe FILE</pre>",
        f"<h3>Recipe</h3><pre>{_text(report.recipe)}</pre>" if report.recipe else _paragraph("The recipe is empty."),
    )


def _folded(command: str) -> str:
    """A command with each option on a line of its own."""
    words = map(shlex.quote, shlex.split(command))
    return "".join(f" \\\n  {word}" if word.startswith("-") else f" {word}" for word in words).lstrip()
