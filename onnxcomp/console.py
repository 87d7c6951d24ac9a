"""What a command shows: reports as text and tables, progress bars, errors.

Colours, wrapping and bars are for terminals; into a pipe goes plain text. Names come from models and may hold anything:
they are never read as markup, and characters that are not printable are escaped.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import groupby, takewhile
from pathlib import Path

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from onnxcomp.core import Width, no_progress
from onnxcomp.explanation import Explanation, LayerRow
from onnxcomp.family import Family
from onnxcomp.files import write_text
from onnxcomp.package import Packed
from onnxcomp.report import (
    Benchmark,
    Document,
    Evaluation,
    Figures,
    FrozenRow,
    GroupRow,
    Inspection,
    LatencyTable,
    OptionRow,
    Report,
    Speed,
    Spread,
    Step,
    Trial,
    WeightRow,
)
from onnxcomp.verification import Verification
from onnxcomp.wording import (
    between,
    budget_in_words,
    byte_count,
    check_in_words,
    count,
    digits,
    grouped,
    is_share,
    latency_of,
    loss,
    printable,
    ratio,
    score,
    seconds,
    where,
    without_names,
)

_PIPE_WIDTH = 10_000  # nothing wraps in a pipe
_REFRESH = 0.1  # seconds
_NAMES = 3
_WIDTHS = 40
_GROUPS = 8
_WORDS = {
    "crossing",
    "layers",
    "made by",
    "note",
    "op",
    "output",
    "read by",
    "reason",
    "verdict",
    "what",
    "what it does",
}
"""Headings of columns that hold words."""


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
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # No refreshing thread: it would run while latency is measured.
        with Progress(*columns, console=screen, transient=True, auto_refresh=False) as bars:
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
            yield from _inspection(document, verbose)
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


# --- tables and lines -----------------------------------------------------------------------------------------------


def _line(text: str = "", style: str = "") -> Text:
    return Text(printable(text), style=style)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines, its numbers aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, heading in enumerate(headings):
        numbers = place > 0 and heading not in _WORDS
        table.add_column(_line(heading), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_line, row))
    return table


def _heading(text: str) -> Iterator[Text]:
    yield _line()
    yield _line(text, "bold")


def _notes(notes: Sequence[str]) -> Iterator[Text]:
    if notes:
        yield from _heading("Notes")
        yield from (_line(f"- {note}") for note in notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")


# --- a report -------------------------------------------------------------------------------------------------------


def _report(report: Report, verbose: bool) -> Iterator[RenderableType]:
    yield _line(f"{report.source} -> {report.output or 'memory'}", "bold")
    yield _line()
    yield from _measured(report)
    yield from _verdict(report)
    yield from _heading("What was done")
    for step in report.steps:
        yield from _step(step, verbose)
    if report.trials:
        yield from _heading("What was tried")
        yield _table(
            ["candidate", "size", "latency", "speed-up", "drop", "verdict"],
            [_trial(trial, report.metric) for trial in report.trials],
        )
    yield from _notes(report.notes)


def _measured(report: Report | Verification) -> Iterator[RenderableType]:
    yield _table(["", "original", "result", ""], _figures(report))
    yield _line()
    if report.result.latency is not None:
        yield _line(f"Latency: {report.protocol}; {where(report.environment)}", "dim")
    yield _line(f"Measured: {report.data}", "dim")


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
        yield _line(f"NOT within the budget: {'; '.join(report.unmet)}", "bold red")
    elif limits := budget_in_words(report.budget, report.metric):
        yield _line(f"Within the budget: {limits}", "green")


def _step(step: Step, verbose: bool) -> Iterator[RenderableType]:
    name = step.recipe.partition("(")[0]
    yield _line(f"  {step.recipe if verbose else name}", "cyan")
    if verbose:
        rows = [(f"    {change.node}", change.what) for change in step.changes]
        rows += [(f"    {skip.node}", f"left: {skip.reason}") for skip in step.skips]
        yield _table(["    node", "what"], rows)
        return
    changes = grouped([(change.node, change.what) for change in step.changes])
    skips = grouped([(skip.node, skip.reason) for skip in step.skips])
    if not changes:
        yield _line("    nothing changed")
    elif step.widths:
        yield from _widths(step.widths)
        narrowed = {width.group.partition("#")[0] for width in step.widths}
        changes = grouped([(change.node, change.what) for change in step.changes if change.node not in narrowed])
    for what, nodes in changes[:_GROUPS]:
        yield _line(f"    {len(nodes):>4} x {what}")
    for reason, nodes in skips[:_GROUPS]:
        yield _line(f"    {len(nodes):>4} left: {reason} ({_some(nodes)})", "dim")
    hidden = sum(len(nodes) for _, nodes in [*changes[_GROUPS:], *skips[_GROUPS:]])
    if hidden:
        yield _line(f"    {hidden:>4} more, shown by -v", "dim")


def _widths(widths: Sequence[Width]) -> Iterator[RenderableType]:
    """Groups of channels before and after, those that lost the largest share first."""
    ordered = sorted(widths, key=lambda width: len(width.kept) / width.size)
    rows = [
        (f"    {width.group}", str(width.size), str(len(width.kept)), f"{len(width.kept) / width.size:.0%}")
        for width in ordered[:_WIDTHS]
    ]
    yield _table(["    group of channels", "before", "after", "left"], rows)
    if hidden := len(ordered) - len(rows):
        yield _line(f"    and {hidden} groups that keep as much or more (-v shows them)", "dim")


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
    yield _table(headings, map(row, benchmark.models))
    yield _line()
    yield _line(
        f"Latency: {benchmark.protocol}, with 95% of the blocks in brackets; {where(benchmark.environment)}; "
        f"inputs from {benchmark.data}",
        "dim",
    )
    yield _line("Speed-up: over the first model, side by side, with its quartiles. Throughput: rows per second.", "dim")
    yield _line(
        f"Load, and memory to load and run: medians over {benchmark.processes} fresh processes, with the extremes.",
        "dim",
    )
    yield from _notes(benchmark.notes)


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
            loss(metric, model.drop) + between(model.drop_interval, lambda value: _signed(metric, value)),
            "-" if model.relative_error is None else f"{model.relative_error:.4g}",
            score("agreement", model.agreement),
        )
        for model in evaluation.models
    ]
    yield _table(["model", metric, "against the first", "relative error", "agreement"], rows)
    yield _line()
    yield _line(f"Metric: {metric} ({evaluation.data}); {where(evaluation.environment)}", "dim")
    yield _line("Intervals: 95% bootstrap; of differences on the same samples, where a minus is a gain.", "dim")
    yield from _notes(evaluation.notes)


def _signed(metric: str, value: float) -> str:
    return f"{100 * value:+.2f}" if is_share(metric) else f"{value:+.3g}"


def _inspection(model: Inspection, verbose: bool) -> Iterator[RenderableType]:
    total = sum(node.microseconds or 0 for node in model.nodes)
    shown = [node for node in model.nodes if verbose or node.parameters or node.flops or node.microseconds]

    def share(microseconds: float | None) -> str:
        return "-" if microseconds is None else f"{microseconds / total:.1%}"

    rows = [
        (
            node.name,
            node.op,
            "?" if node.shape is None else "x".join(map(str, node.shape)) or "scalar",
            count(node.parameters),
            byte_count(node.bytes),
            "?" if node.flops is None else count(node.flops),
            share(node.microseconds),
            *([node.note] if verbose else []),
        )
        for node in shown
    ]
    yield _line(f"{model.source}: opset {model.opset}, {byte_count(model.size)}", "bold")
    yield _line(f"inputs   {', '.join(model.inputs) or 'none'}")
    yield _line(f"outputs  {', '.join(model.outputs) or 'none'}")
    yield _line()
    yield _table(["node", "op", "output", "parameters", "bytes", "FLOPs", "time", *(["note"] if verbose else [])], rows)
    yield _line()
    if hidden := len(model.nodes) - len(shown):
        yield _line(f"and {hidden} nodes that store, compute and take nothing (-v shows them)", "dim")
    sums = f"{count(model.parameters)} parameters in {byte_count(model.bytes)}, {count(model.flops)} FLOPs per run"
    yield _line(f"In all {len(model.nodes)} nodes, {sums}", "bold")
    if model.protocol:
        yield _line(f"Time: {model.protocol}; - was fused into a neighbour; {where(model.environment)}", "dim")
    if model.groups:
        yield from _groups(model.groups, verbose)
    if model.frozen:
        yield from _frozen(model.frozen, verbose)
    if model.weights:
        yield from _weights(model.weights)
    if model.options:
        yield from _options(model.options)
    if model.latency is not None:
        yield from _latency(model.latency)
    yield from _notes(model.notes)


def _latency(table: LatencyTable) -> Iterator[RenderableType]:
    """The latency table."""

    def micros(value: float | None) -> str:
        return "-" if value is None else "fused" if value == 0 else seconds(value * 1e-6)

    def shape(sizes: Sequence[int] | None) -> str:
        return "-" if sizes is None else "x".join(map(str, sizes)) or "scalar"

    forms = list(table.layouts)
    yield from _heading("What chains of nodes take")
    rows = [
        (
            row.operators,
            row.first,
            f"{row.count}",
            shape(row.input),
            shape(row.weight),
            *tuple(micros(row.microseconds.get(form)) for form in forms),
        )
        for row in table.chains
    ]
    rows.append(("changes of layout", "", "", "", "", *(micros(table.layouts[form]) for form in forms)))
    yield _table(["op", "node", "times", "input", "weight", *forms], rows)
    if table.widths:
        yield from _heading("What is left of the time with fewer channels")
        yield _table(
            ["node", "times", "channels", "left", *forms],
            [
                (
                    row.group,
                    f"{row.count}",
                    f"{row.size}",
                    f"{row.width}",
                    *tuple(f"{row.shares[form]:.0%}" for form in forms),
                )
                for row in table.widths
            ],
        )
    if table.crossings:
        yield from _heading("Into integers and out of them")
        yield _table(
            ["elements", "QuantizeLinear", "DequantizeLinear"],
            [(f"{row.elements:,}", micros(row.quantize), micros(row.dequantize)) for row in table.crossings],
        )


def _weights(rows: Sequence[WeightRow]) -> Iterator[RenderableType]:
    yield from _heading("What weights bear")
    headings = ["layer", "weight", "rank", "90% by", "99% by", "1 bit", "2", "3", "4", "8", "bears"]
    yield _table(
        headings,
        [
            (
                row.name,
                "x".join(map(str, row.shape)),
                str(row.outputs) if row.spectrum else "-",
                str(row.rank_90) if row.spectrum else "-",
                str(row.rank_99) if row.spectrum else "-",
                *(f"{row.errors[bits - 1]:.2%}" for bits in (1, 2, 3, 4, 8)),
                f"{row.bits} bits" if row.bits else "-",
            )
            for row in rows
        ],
    )
    yield _line()
    yield _line("90%, 99% by: the rank that keeps so much of the output's energy. 1 bit, ...: what a codebook", "dim")
    yield _line("loses of it, by k-means alone. Bears: the fewest bits that lose no more than 1%.", "dim")


def _options(rows: Sequence[OptionRow]) -> Iterator[RenderableType]:
    for technique, own in groupby(rows, key=lambda row: row.technique):
        yield from _heading(f"What {technique} could do")
        table = []
        for part, options in groupby(own, key=lambda row: row.part):
            for number, option in enumerate(options):
                setting = f"{option.setting:g}" if isinstance(option.setting, float) else str(option.setting)
                time = f"{option.latency:.2f}x"
                table.append(("" if number else part, setting, f"{option.error:.2%}", byte_count(option.bytes), time))
        yield _table(["part", "setting", "error", "bytes", "time"], table)
    yield _line()
    yield _line(
        "Error: squared, of what the part gives, relative to its energy, by one Gram matrix of its inputs.", "dim"
    )
    yield _line("Bytes: of its weights then. Time: of the part by itself, relative to what it takes now.", "dim")


def _groups(groups: Sequence[GroupRow], verbose: bool) -> Iterator[RenderableType]:
    yield from _heading("Channels that only go together")
    headings = ["group", "channels", "made by", "read by", "tensors", "crossing"]
    yield _table(headings, [_group(group, verbose) for group in groups])
    yield _line()
    yield _line("Channels: 4 x 16 are 4, each 16 places wide, as heads are. Read by: - is no layer, and prune", "dim")
    yield _line("leaves these. Crossing: what computes over all of them, so that each changes the others.", "dim")


def _group(group: GroupRow, verbose: bool) -> tuple[str, ...]:
    """A row of the table; the folders that the names of its layers share become `...`, unless verbose."""
    levels = zip(*(name.split("/")[:-1] for name in (*group.made_by, *group.read_by)), strict=False)
    shared = "".join(f"{level[0]}/" for level in takewhile(lambda level: len(set(level)) == 1, levels))

    def layers(names: Sequence[str]) -> str:
        short = [f".../{name.removeprefix(shared)}" for name in names] if shared.strip("/") else names
        text = ", ".join(names) if verbose else _some(short)
        return text if len(names) == 1 else f"{len(names)}: {text}" if names else "-"

    kinds = Counter(crossing.partition(" ")[0] for crossing in group.crossing)
    return (
        group.name,
        str(group.size) if group.width == 1 else f"{group.size} x {group.width}",
        layers(group.made_by),
        layers(group.read_by),
        str(group.tensors),
        ", ".join(group.crossing if verbose else (f"{number} {kind}" for kind, number in kinds.items())),
    )


def _frozen(frozen: Sequence[FrozenRow], verbose: bool) -> Iterator[RenderableType]:
    yield from _heading("Layers whose channels cannot go")
    if verbose:
        yield _table(["layer", "reason"], [(row.name, row.reason) for row in frozen])
        return
    for reason, names in grouped([(row.name, row.reason) for row in frozen]):
        yield _line(f"{len(names):>4} x {reason} ({_some(names)})")


def _explanation(explanation: Explanation, verbose: bool) -> Iterator[RenderableType]:
    yield _line(f"{explanation.source}: made by onnxcomp {explanation.version}", "bold")
    yield _line(f"from the model with SHA-256 {explanation.input}", "dim")
    yield from _heading("Recipe")
    yield from (_line(f"  {line}") for line in explanation.recipe.splitlines())
    yield from _heading("What was done to each layer, and why not more")
    if verbose:
        yield _table(
            ["  layer", "what"], [(f"  {row.name}", text) for row in explanation.layers for text in _said(row)]
        )
    else:
        for texts, names in _alike(explanation.layers):
            yield _line(f"{len(names):>4} x {_some(names)}", "cyan")
            yield from (_line(f"         {text}") for text in texts)
    if explanation.trials:
        yield from _heading("What was tried when the recipe was found")
        tried = [
            (
                f"  {trial.name}",
                byte_count(trial.figures.size),
                loss(explanation.metric, trial.figures.drop),
                trial.verdict,
            )
            for trial in explanation.trials
        ]
        yield _table(["candidate", "size", "drop", "verdict"], tried)
        yield _line(f"Drop: of {explanation.metric}; - was not measured.", "dim")


def _said(layer: LayerRow) -> tuple[str, ...]:
    return (*layer.done, *(f"left by {text}" for text in layer.left)) or ("as it was: no pass of the recipe treats it",)


def _alike(layers: Sequence[LayerRow]) -> Iterator[tuple[list[str], list[str]]]:
    """What was said of layers, and of which, those of whom the same was said together, quoted names aside."""
    groups: dict[tuple[str, ...], list[LayerRow]] = defaultdict(list)
    for layer in layers:
        groups[tuple(map(without_names, _said(layer)))].append(layer)
    for common, rows in groups.items():
        each = zip(common, *map(_said, rows), strict=True)
        yield [texts[0] if len(set(texts)) == 1 else text for text, *texts in each], [row.name for row in rows]


def _verification(verification: Verification) -> Iterator[RenderableType]:
    yield _line(f"{verification.source} against {verification.against}", "bold")
    yield _line()
    yield from _measured(verification)
    yield from _heading("Limits")
    for check in verification.checks:
        words = (
            f"  {'passed' if check.passed else 'FAILED'}  {check.limit}: {check_in_words(check, verification.metric)}"
        )
        yield _line(words, "green" if check.passed else "bold red")
    yield from _notes(verification.notes)


def _family(family: Family) -> Iterator[RenderableType]:
    yield from _heading("Worth a choice")
    rows = [("original", "", *_cost(family.original, family.metric), "")]
    rows += [
        (member.file, member.name, *_cost(member.figures, family.metric), "the result" if member.chosen else "")
        for member in family.members
    ]
    yield _table(["file", "candidate", "size", "latency", "speed-up", "drop", ""], rows)


def _cost(figures: Figures, metric: str) -> tuple[str, ...]:
    speedup = "-" if figures.speedup is None else f"{figures.speedup:.2f}x"
    return byte_count(figures.size), latency_of(figures), speedup, loss(metric, figures.drop)


def pass_list(passes: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> Iterator[RenderableType]:
    """The passes with a line each, and the groups.

    Args:
        passes: summary by name.
        groups: names of passes by the group's name.
    """
    yield _table(["pass", "what it does"], list(passes.items()))
    yield _line()
    yield from (_line(f"{group} stands for {', '.join(members)}") for group, members in groups.items())


def wrote(path: Path) -> Text:
    """That a model is there now, and its data file if it has one."""
    data = path.with_name(path.name + ".data")
    return _line(f"\nWrote {path}" + (f" and {data.name}" if data.exists() else ""), "bold green")
