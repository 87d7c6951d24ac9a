"""The commands that look at models and change none: `bench`, `eval`, `inspect`, `explain`, `verify`, `passes`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp import budget as budgets
from onnxcomp import options
from onnxcomp.errors import BudgetError, OptionError
from onnxcomp.shell import Command

if TYPE_CHECKING:
    from onnxcomp.console import Terminal


@click.command(cls=Command)
@options.models_
@options.calib
@options.running
@options.batch
@click.option("--cold", is_flag=True, help="Alternate single runs, which evict each other from caches.")
@options.seed
@options.picturing
@options.showing
def bench(models: tuple[Path, ...], cold: bool, terminal: "Terminal", **settings: Any) -> None:
    """Time MODELS side by side: latency, throughput, load time, size, memory; ratios to the first."""
    from onnxcomp.measure import bench as work
    from onnxcomp.runtime import Protocol

    with terminal.progress() as progress:
        benchmark = work(models, protocol=Protocol(cold=cold), progress=progress, **settings)
    terminal.show(benchmark)


@click.command("eval", cls=Command)
@options.models_
@options.proof
@options.metric
@options.running
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Rows per run.")
@options.picturing
@options.showing
def evaluate(models: tuple[Path, ...], evaluation: Path, terminal: "Terminal", **settings: Any) -> None:
    """Score MODELS on the same samples, and compare their outputs with the first's."""
    from onnxcomp.measure import evaluate as work

    with terminal.progress() as progress:
        result = work(models, evaluation, progress=progress, **settings)
    terminal.show(result)


@click.command("inspect", cls=Command)
@options.model_
@click.option("--groups", is_flag=True, help="Show which channels only go together, and which cannot go and why.")
@click.option("--weights", is_flag=True, help="Show the ranks and bits that each layer bears; best with --calib.")
@click.option(
    "--options", metavar="A,B", type=options.Parsed("A,B", options.parse_names), default=(),
    help="Show what these passes could do to each layer: the error, bytes and time of every setting.",
)  # fmt: skip
@click.option("--latency", is_flag=True, help="Show what each kind of node takes by shape, precision and width.")
@options.cache
@options.calib
@options.running
@options.batch
@options.seed
@options.picturing
@options.showing
def inspect_(model: Path, terminal: "Terminal", **settings: Any) -> None:
    """Show what each node of MODEL stores, computes, and takes of the time."""
    from onnxcomp.inspection import inspect as work

    with terminal.progress() as progress:
        inspection = work(model, progress=progress, **settings)
    terminal.show(inspection)


@click.command(cls=Command)
@options.model_
@options.showing
def explain(model: Path, terminal: "Terminal") -> None:
    """Show what was done to each layer of MODEL, which onnxcomp made, and why not more."""
    from onnxcomp.explanation import explain as work

    terminal.show(work(model))


def _junit() -> bytes:
    """How JUnit XML begins."""
    from onnxcomp.verification import JUNIT

    return JUNIT.encode()


@click.command(cls=Command)
@options.model_
@click.option(
    "--against",
    metavar="MODEL",
    required=True,
    type=click.Path(path_type=Path),
    help="What it is to take the place of.",
)
@options.proof
@options.metric
@options.limits
@options.running
@options.batch
@options.picturing
@click.option(
    "--junit", metavar="FILE", type=click.Path(path_type=Path), **options.removing(_junit),
    help="Also write JUnit XML, a test case for each limit.",
)  # fmt: skip
@options.showing_anew
def verify(
    model: Path,
    against: Path,
    evaluation: Path,
    budget: budgets.Budget,
    junit: Path | None,
    terminal: "Terminal",
    **settings: Any,
) -> None:
    """Judge MODEL beside the one whose place it is to take, by limits of which each must hold.

    Exit codes: 0 all hold, 3 one does not, 2 usage or bad input, 1 failed.
    """
    from onnxcomp.files import write_text
    from onnxcomp.verification import junit as as_junit
    from onnxcomp.verification import verify as work
    from onnxcomp.wording import check_in_words

    if junit is not None:
        options.check_report(junit, _junit(), inputs=(model, against, evaluation), option="--junit")
        if terminal.json is not None and Path(terminal.json).resolve() == junit.resolve():
            raise OptionError(f"both reports are to be '{junit}'", remedy="give another name to --json")
    with terminal.progress() as progress:
        result = work(model, against=against, evaluation=evaluation, budget=budget, progress=progress, **settings)
    terminal.show(result)
    if junit is not None:
        write_text(as_junit(result), junit)
    if not result.passed:
        broken = (check_in_words(check, result.metric) for check in result.checks if not check.passed)
        raise BudgetError("the gate failed: " + "; ".join(broken))


@click.command("passes", cls=Command)
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes with these passes instead.")
def passes_(schema: bool) -> None:
    """List what there is, with one line each; also what other distributions offer."""
    from onnxcomp import recipe
    from onnxcomp.console import Terminal, pass_list
    from onnxcomp.registry import GROUPS, passes, unusable
    from onnxcomp.wording import printable

    if schema:
        click.echo(json.dumps(recipe.schema(passes()), indent=2))
    else:
        Terminal().print(*pass_list({name: kind.summary for name, kind in passes().items()}, GROUPS))
    for problem in unusable():
        click.echo(printable(f"Warning: {problem}"), err=True)
