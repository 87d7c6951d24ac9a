"""What a command shows: reports as text and tables, progress bars, errors.

Colours, wrapping and bars are for terminals; into a pipe goes plain text. Names come from models and may hold anything:
they are never read as markup, and characters that are not printable are escaped.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from onnxcomp.core import CHANNELS_LEFT, Width, no_progress
from onnxcomp.explanation import Explanation, LayerRow
from onnxcomp.family import Family
from onnxcomp.files import write_text
from onnxcomp.inspected import inspection
from onnxcomp.package import Packed
from onnxcomp.report import (
    Benchmark,
    Document,
    Evaluation,
    Figures,
    Inspection,
    Report,
    Speed,
    Spread,
    Step,
    Trial,
)
from onnxcomp.tables import columns, heading, line, notes, some
from onnxcomp.verification import Verification
from onnxcomp.wording import (
    alike,
    between,
    budget_in_words,
    byte_count,
    check_in_words,
    digits,
    grouped,
    in_common,
    latency_of,
    loss,
    ratio,
    score,
    seconds,
    signed,
    where,
)

_PIPE_WIDTH = 10_000  # nothing wraps in a pipe
_REFRESH = 0.1  # seconds
_WIDTHS = 40
_GROUPS = 8


@dataclass(frozen=True)
class Terminal:
    """Where a command's output goes.

    Attributes:
        json: file for the machine-readable report; `-` is standard output, which then gets nothing else.
        quiet: show nothing but errors.
        verbose: show every node.
    """

    json: str | None = None
    quiet: bool = False
    verbose: bool = False

    def show(self, document: Document) -> None:
        """Print a document, and write it as JSON where asked to.

        Raises:
            ModelError: the file cannot be written.
        """
        self.print(*render(document, self.verbose))
        if self.json is not None:
            text = json.dumps(document.to_json(), indent=2, allow_nan=False) + "\n"
            if self.json == "-":
                click.echo(text, nl=False)
            else:
                write_text(text, self.json)

    def print(self, *lines: RenderableType) -> None:
        """Print to standard output."""
        if self.quiet or self.json == "-":
            return
        screen = Console(highlight=False, markup=False, emoji=False)
        if screen.is_terminal:
            screen.print(*lines, sep="\n")
            return
        page = Console(
            file=StringIO(), width=_PIPE_WIDTH, color_system=None, highlight=False, markup=False, emoji=False
        )
        with page.capture() as text:
            page.print(*lines, sep="\n")
        click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))

    @contextmanager
    def progress(self) -> Iterator[Callable[[int, int, str], None]]:
        """What long work calls with (done, total or 0, what): bars on standard error, if that is a terminal."""
        screen = Console(stderr=True)
        if self.quiet or not screen.is_terminal:
            yield no_progress
            return
        parts = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # No refreshing thread: it would run while latency is measured.
        with Progress(*parts, console=screen, transient=True, auto_refresh=False) as bars:
            task = bars.add_task("", visible=False)
            shown = 0.0

            def update(done: int, total: int, what: str) -> None:
                nonlocal shown
                if bars.tasks[0].description != what:
                    bars.reset(task, description=what)
                finished = 0 < total <= done
                bars.update(task, completed=done, total=total or None, visible=not finished)
                if finished or time.monotonic() - shown > _REFRESH:
                    bars.refresh()
                    shown = time.monotonic()

            yield update


def render(document: Document, verbose: bool = False) -> Iterator[RenderableType]:
    """A document as rich's renderables, one below the other.

    Args:
        document: what to show.
        verbose: with every node and the settings of every pass.
    """
    match document:
        case Report():
            yield from _report(document, verbose)
        case Benchmark():
            yield from _benchmark(document)
        case Evaluation():
            yield from _evaluation(document)
        case Inspection():
            yield from inspection(document, verbose)
        case Packed():
            yield from _package(document)
        case Explanation():
            yield from _explanation(document, verbose)
        case Verification():
            yield from _verification(document)
        case Family():
            yield from _family(document)


def _package(packed: Packed) -> Iterator[RenderableType]:
    for name, size in packed.files.items():
        yield f"{name}: {byte_count(size)}"
    total = sum(packed.files.values())
    yield f"{packed.package}: {byte_count(packed.size)}, {total / packed.size:.2f}x smaller"


# --- a report -------------------------------------------------------------------------------------------------------


def _report(report: Report, verbose: bool) -> Iterator[RenderableType]:
    yield line(f"{report.source} -> {report.output or 'memory'}", "bold")
    yield line()
    yield from _measured(report)
    yield from _verdict(report)
    yield from heading("What was done")
    for step in report.steps:
        yield from _step(step, verbose)
    if report.trials:
        yield from heading("What was tried")
        yield columns(
            ["candidate", "size", "latency", "speed-up", "drop", "verdict"],
            [_trial(trial, report.metric) for trial in report.trials],
        )
    yield from notes(report.notes)


def _measured(report: Report | Verification) -> Iterator[RenderableType]:
    yield columns(["", "original", "result", ""], _figures(report))
    yield line()
    if report.result.latency is not None:
        yield line(f"Latency: {report.protocol}; {where(report.environment)}", "dim")
    yield line(f"Measured: {report.data}", "dim")


def _figures(report: Report | Verification) -> Iterator[tuple[str, str, str, str]]:
    before, after = report.original, report.result
    share = f"{ratio(before.size / after.size, 'smaller', 'larger')} ({after.size / before.size:.0%})"
    yield "size", byte_count(before.size), byte_count(after.size), share
    if before.latency is not None and after.latency is not None:
        speedup = ratio(after.speedup, "faster", "slower") if after.speedup else ""
        yield "latency", latency_of(before), latency_of(after), speedup
    if before.memory and after.memory:
        smaller = ratio(before.memory / after.memory, "less", "more")
        yield "memory", byte_count(before.memory), byte_count(after.memory), smaller
    if after.score is not None:

        def form(value: float) -> str:
            return score(report.metric, value)

        first, second = (
            "-" if figures.score is None else form(figures.score) + between(figures.score_interval, form)
            for figures in (before, after)
        )
        yield report.metric, first, second, loss(report.metric, after.drop)


def _verdict(report: Report) -> Iterator[Text]:
    if report.unmet:
        yield line(f"NOT within the budget: {'; '.join(report.unmet)}", "bold red")
    elif limits := budget_in_words(report.budget, report.metric):
        yield line(f"Within the budget: {limits}", "green")


def _step(step: Step, verbose: bool) -> Iterator[RenderableType]:
    name = step.recipe.partition("(")[0]
    yield line(f"  {step.recipe if verbose else name}", "cyan")
    if verbose:
        rows = [(f"    {change.node}", change.what) for change in step.changes]
        rows += [(f"    {skip.node}", f"left: {skip.reason}") for skip in step.skips]
        yield columns(["    node", "what"], rows)
        return
    changes = grouped([(change.node, change.what) for change in step.changes])
    skips = grouped([(skip.node, skip.reason) for skip in step.skips])
    if not changes:
        yield line("    nothing changed")
    elif step.widths:
        yield from _widths(step.widths)
        changes = [(what, nodes) for what, nodes in changes if CHANNELS_LEFT not in what]
    for what, nodes in changes[:_GROUPS]:
        yield line(f"    {len(nodes):>4} x {what}")
    for reason, nodes in skips[:_GROUPS]:
        yield line(f"    {len(nodes):>4} left: {reason} ({some(nodes)})", "dim")
    hidden = sum(len(nodes) for _, nodes in [*changes[_GROUPS:], *skips[_GROUPS:]])
    if hidden:
        yield line(f"    {hidden:>4} more, shown by -v", "dim")


def _widths(widths: Sequence[Width]) -> Iterator[RenderableType]:
    """Groups of channels before and after, those that lost the largest share first."""
    ordered = sorted(widths, key=lambda width: len(width.kept) / width.size)
    rows = [
        (f"    {width.group}", str(width.size), str(len(width.kept)), f"{len(width.kept) / width.size:.0%}")
        for width in ordered[:_WIDTHS]
    ]
    yield columns(["    group of channels", "before", "after", "left"], rows)
    if hidden := len(ordered) - len(rows):
        yield line(f"    and {hidden} groups that keep as much or more (-v shows them)", "dim")


def _trial(trial: Trial, metric: str) -> tuple[str, ...]:
    figures = trial.figures
    foretold = "" if trial.predicted is None else f" ({trial.predicted:.2f}x foretold)"
    return (
        f"  {trial.name}",
        byte_count(figures.size),
        latency_of(figures),
        "-" if figures.speedup is None else f"{figures.speedup:.2f}x{foretold}",
        loss(metric, figures.drop),
        trial.verdict,
    )


# --- the other documents --------------------------------------------------------------------------------------------


def _benchmark(benchmark: Benchmark) -> Iterator[RenderableType]:
    def row(model: Speed) -> tuple[str, ...]:
        latency = model.latency
        return (
            model.source,
            seconds(latency.median) + between((latency.low, latency.high), seconds),
            f"{latency.speedup:.2f}x [{latency.speedup_low:.2f}, {latency.speedup_high:.2f}]",
            f"{digits(model.throughput)}/s",
            _spread(model.load, seconds),
            byte_count(model.size),
            "-" if model.memory is None else _spread(model.memory, byte_count),
        )

    headings = ["model", "latency", "speed-up", "throughput", "load", "size", "memory"]
    yield columns(headings, map(row, benchmark.models))
    yield line()
    yield line(
        f"Latency: {benchmark.protocol}, with 95% of the blocks in brackets; {where(benchmark.environment)}; "
        f"inputs from {benchmark.data}",
        "dim",
    )
    yield line("Speed-up: over the first model, side by side, with its quartiles. Throughput: rows per second.", "dim")
    yield line(
        f"Load, and memory to load and run: medians over {benchmark.processes} fresh processes, with the extremes.",
        "dim",
    )
    yield from notes(benchmark.notes)


def _spread(spread: Spread, form: Callable[[float], str]) -> str:
    return form(spread.median) + between((spread.low, spread.high), form)


def _evaluation(evaluation: Evaluation) -> Iterator[RenderableType]:
    metric = evaluation.metric

    def form(value: float) -> str:
        return score(metric, value)

    rows = [
        (
            model.source,
            form(model.score) + between(model.score_interval, form),
            loss(metric, model.drop) + between(model.drop_interval, partial(signed, metric)),
            "-" if model.relative_error is None else f"{model.relative_error:.4g}",
            score("agreement", model.agreement),
        )
        for model in evaluation.models
    ]
    yield columns(["model", metric, "against the first", "relative error", "agreement"], rows)
    yield line()
    yield line(f"Metric: {metric} ({evaluation.data}); {where(evaluation.environment)}", "dim")
    yield line("Intervals: 95% bootstrap; of differences on the same samples, where a minus is a gain.", "dim")
    yield from notes(evaluation.notes)


def _explanation(explanation: Explanation, verbose: bool) -> Iterator[RenderableType]:
    yield line(f"{explanation.source}: made by onnxcomp {explanation.version}", "bold")
    yield line(f"from the model with SHA-256 {explanation.input}", "dim")
    yield from heading("Recipe")
    yield from (line(f"  {text}") for text in explanation.recipe.splitlines())
    yield from heading("What was done to each layer, and why not more")
    if verbose:
        yield columns(
            ["  layer", "what"], [(f"  {row.name}", text) for row in explanation.layers for text in _said(row)]
        )
    else:
        for texts, names in _alike(explanation.layers):
            yield line(f"{len(names):>4} x {some(names)}", "cyan")
            yield from (line(f"         {text}") for text in texts)
    if explanation.trials:
        yield from heading("What was tried when the recipe was found")
        tried = [
            (
                f"  {trial.name}",
                byte_count(trial.figures.size),
                loss(explanation.metric, trial.figures.drop),
                trial.verdict,
            )
            for trial in explanation.trials
        ]
        yield columns(["candidate", "size", "drop", "verdict"], tried)
        yield line(f"Drop: of {explanation.metric}; - was not measured.", "dim")


def _said(layer: LayerRow) -> tuple[str, ...]:
    return (*layer.done, *(f"left by {text}" for text in layer.left)) or ("as it was: no pass of the recipe treats it",)


def _alike(layers: Sequence[LayerRow]) -> Iterator[tuple[list[str], list[str]]]:
    """What was said of layers, and of which, those together of whom much the same was said."""
    groups: dict[tuple[str, ...], list[LayerRow]] = defaultdict(list)
    for layer in layers:
        groups[tuple(map(alike, _said(layer)))].append(layer)
    for rows in groups.values():
        yield [in_common(texts) for texts in zip(*map(_said, rows), strict=True)], [row.name for row in rows]


def _verification(verification: Verification) -> Iterator[RenderableType]:
    yield line(f"{verification.source} against {verification.against}", "bold")
    yield line()
    yield from _measured(verification)
    yield from heading("Limits")
    for check in verification.checks:
        words = (
            f"  {'passed' if check.passed else 'FAILED'}  {check.limit}: {check_in_words(check, verification.metric)}"
        )
        yield line(words, "green" if check.passed else "bold red")
    yield from notes(verification.notes)


def _family(family: Family) -> Iterator[RenderableType]:
    yield from heading("Worth a choice")
    rows = [("original", "", *_cost(family.original, family.metric), "")]
    rows += [
        (member.file, member.name, *_cost(member.figures, family.metric), "the result" if member.chosen else "")
        for member in family.members
    ]
    yield columns(["file", "candidate", "size", "latency", "speed-up", "drop", ""], rows)


def _cost(figures: Figures, metric: str) -> tuple[str, ...]:
    speedup = "-" if figures.speedup is None else f"{figures.speedup:.2f}x"
    return byte_count(figures.size), latency_of(figures), speedup, loss(metric, figures.drop)


def pass_list(passes: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> Iterator[RenderableType]:
    """The passes with a line each, and the groups.

    Args:
        passes: summary by name.
        groups: names of passes by the group's name.
    """
    yield columns(["pass", "what it does"], list(passes.items()))
    yield line()
    yield from (line(f"{group} stands for {', '.join(members)}") for group, members in groups.items())


def wrote(path: Path) -> Text:
    """That a model is there now, and its data file if it has one."""
    data = path.with_name(path.name + ".data")
    return line(f"\nWrote {path}" + (f" and {data.name}" if data.exists() else ""), "bold green")
