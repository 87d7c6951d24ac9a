"""The command line: options become typed values, Python functions do the work, `console` shows the result.

Exit codes: 0 done and budget met, 1 failed, 2 usage or bad input, 3 budget not reachable, 130 interrupted. Heavy
imports wait until a command runs, so that `--help` answers at once.
"""

import atexit
import gc
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp import __version__, budget, options
from onnxcomp.errors import BudgetError, OnnxcompError, OptionError

if TYPE_CHECKING:
    from onnxcomp.console import Terminal
    from onnxcomp.report import Report, Result

_INTERRUPTED = 130
_CRITERIA = ["obs", "obd", "l1", "l2", "l1-nonzero", "l2-nonzero", "activation", "activation-std", "feature-map"]
_CRITERIA += ["apoz", "wanda", "gamma", "fpgm", "random"]


class _Command(click.Command):
    """A command whose failures are one message and the documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        atexit.register(gc.freeze)  # the interpreter would look through all objects for garbage as it ends: 0.3 s
        logging.getLogger().addHandler(logging.NullHandler())  # libraries' log records do not go to the terminal
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own ways to end
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(_INTERRUPTED)
        except OnnxcompError as error:
            click.echo(_safe(f"Error: {error}"), err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            click.echo(_safe(f"Error: {error}"), err=True)
            ctx.exit(OnnxcompError.exit_code)
        except Exception as error:  # noqa: BLE001  (whatever is left is a defect, and still no reason for a traceback)
            if ctx.params.get("verbose"):
                click.echo(_safe(traceback.format_exc()), err=True)
            message = next(iter(str(error).splitlines()), "")
            click.echo(
                _safe(
                    f"Error: {type(error).__name__}: {message}\n  This is a defect of onnxcomp: please report it with"
                )
                + " the output of -v.",
                err=True,
            )
            ctx.exit(OnnxcompError.exit_code)


def _safe(text: str) -> str:
    from onnxcomp.wording import printable

    return printable(text)


class _Group(click.Group):
    command_class = _Command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="onnxcomp")
def main() -> None:
    """Make a trained ONNX model smaller and faster, and prove it.

    Exit codes: 0 done and budget met, 1 failed, 2 usage or bad input, 3 budget not reachable, 130 interrupted.
    """


@main.command()
@options.model_
@options.writing
@click.option(
    "--report", metavar="FILE.html", type=click.Path(path_type=Path), help="Also write a page that shows it all."
)
@options.calib
@options.evaluation_
@options.metric
@options.max_drop
@click.option("--max-latency", metavar="5ms", type=options.Parsed("TIME", budget.parse_latency), help="Per run.")
@click.option(
    "--min-speedup", metavar="2x", type=options.Parsed("RATIO", budget.parse_speedup), help="Over the original."
)
@click.option("--max-size", metavar="25%|10MB", type=options.Parsed("SIZE", budget.parse_size), help="Of the file.")
@options.best_effort
@click.option(
    "--passes",
    metavar="A,B",
    type=options.Parsed("A,B", options.parse_names),
    help="Use only these, see `onnxcomp passes`.",
)
@options.exclude
@options.overridable
@options.running
@options.batch
@click.option(
    "--effort", type=click.Choice(["quick", "default", "extensive"]), default="default", show_default=True,
    help="How long to search.",
)  # fmt: skip
@options.seed
@options.memory
@options.picturing
@options.showing
def optimize(
    model: Path,
    output: Path | None,
    max_drop: float | None,
    max_latency: float | None,
    min_speedup: float | None,
    max_size: budget.Budget | None,
    effort: str,
    dry_run: bool,
    terminal: "Terminal",
    **settings: Any,
) -> None:
    """Make MODEL faster, then smaller, within a budget, by what is measured."""
    from onnxcomp.optimizer import Effort
    from onnxcomp.optimizer import optimize as work

    size = max_size or budget.Budget()
    limits = budget.Budget(max_drop, max_latency, min_speedup, size.max_size, size.max_size_share)
    settings |= {"budget": limits, "effort": Effort(effort)}
    _convert(work, model, output, dry_run, terminal, settings)


@main.command()
@options.model_
@options.writing
@click.option(
    "--scheme",
    type=click.Choice(["int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16", "bf16"]),
    default="int8",
    show_default=True,
    help="What becomes of weights and activations.",
)
@click.option(
    "--range",
    "range_",
    type=click.Choice(["minmax", "percentile", "entropy", "mse"]),
    default="mse",
    show_default=True,
    help="How int8 chooses the range of an activation.",
)
@click.option("--no-gptq", is_flag=True, help="Round weights to the nearest, without error feedback.")
@click.option("--no-polish", is_flag=True, help="No coordinate descent on rounded weights.")
@click.option("--no-bias-correction", is_flag=True, help="Leave biases as they are.")
@click.option("--no-equalize", is_flag=True, help="No cross-layer equalization before int8.")
@click.option("--no-smooth", is_flag=True, help="No SmoothQuant before int8 and int8-dynamic.")
@options.learning
def quantize(
    model: Path,
    output: Path | None,
    scheme: str,
    range_: str,
    dry_run: bool,
    terminal: "Terminal",
    **settings: Any,
) -> None:
    """Clean MODEL up and quantize it as asked, wherever the scheme can; show the loss."""
    from onnxcomp.passes.quantize_static import Range
    from onnxcomp.techniques import Scheme
    from onnxcomp.techniques import quantize as work

    for step in ("gptq", "polish", "bias_correction", "equalize", "smooth"):
        settings[step] = not settings.pop(f"no_{step}")
    settings |= {"scheme": Scheme(scheme), "range": Range(range_)}
    _convert(work, model, output, dry_run, terminal, settings)


@main.command()
@options.model_
@options.writing
@options.goal
@click.option(
    "--criterion",
    type=click.Choice(_CRITERIA),
    default="obs",
    show_default=True,
    help="What makes a channel worth keeping.",
)
@click.option(
    "--aggregate",
    type=click.Choice(["mean", "max", "sum"]),
    default="mean",
    show_default=True,
    help="What becomes of the scores of layers that share channels.",
)
@click.option("--no-normalise", is_flag=True, help="Do not divide each layer's scores by their mean first.")
@click.option(
    "--rates",
    type=click.Choice(["measured", "global", "local"]),
    default="measured",
    show_default=True,
    help="Least measured error for the cost, lowest scores of the whole model, or the same share everywhere.",
)
@click.option("--penalty", type=float, default=0.0, show_default=True, help="lambda in: score - lambda * cost.")
@click.option("--threshold", type=float, help="Channels that score less go, in place of --target.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Each ranks what is left anew.")
@click.option("--multiple", type=click.IntRange(1), default=2, show_default=True, help="Widths are multiples of this.")
@click.option(
    "--least",
    type=options.Parsed("SHARE", budget.parse_share),
    default=0.1,
    show_default=True,
    help="Share of its channels that every group keeps.",
)
@options.no_reconstruct
@options.learning
def prune(
    model: Path,
    output: Path | None,
    goal: tuple[str, float] | None,
    no_normalise: bool,
    no_reconstruct: bool,
    dry_run: bool,
    terminal: "Terminal",
    **settings: Any,
) -> None:
    """Remove whole channels of MODEL until a share of its cost remains, and fit the others again."""
    from onnxcomp.techniques import prune as work

    if (goal is None) == (settings["threshold"] is None):
        raise OptionError("how much is to go is not said once", remedy="give either --target or --threshold")
    if goal is not None:
        settings |= {"cost": goal[0], "remains": goal[1]}
    settings |= {"normalised": not no_normalise, "reconstruct": not no_reconstruct}
    _convert(work, model, output, dry_run, terminal, settings)


@main.command()
@options.model_
@options.writing
@click.option("--bits", type=click.IntRange(1, 8), default=4, show_default=True, help="Per weight, beside codebooks.")
@click.option(
    "--method",
    type=click.Choice(["kmeans", "product", "hash"]),
    default="kmeans",
    show_default=True,
    help="Single values or vectors from a codebook, or values by the hash of a weight's place.",
)
@click.option("--channels", type=click.IntRange(1), help="Output channels to a codebook.  [default: all]")
@options.no_reconstruct
@options.learning
def share(
    model: Path, output: Path | None, no_reconstruct: bool, dry_run: bool, terminal: "Terminal", **settings: Any
) -> None:
    """Let the weights of MODEL share values: fewer bytes in the file, on every provider.

    Sessions decode the weights once, when they load: the result runs as fast as the original, from as much memory.
    """
    from onnxcomp.techniques import share as work

    _convert(work, model, output, dry_run, terminal, settings | {"reconstruct": not no_reconstruct})


@main.command()
@options.model_
@options.writing
@click.option(
    "--sparsity",
    metavar="50%|2:4",
    type=options.Parsed("SPARSITY", options.parse_sparsity),
    default="50%",
    show_default=True,
    help="Share that becomes zero, or so many of every so many inputs.",
)
@click.option(
    "--block",
    metavar="RxC",
    type=options.Parsed("RxC", options.parse_block),
    default="1x1",
    show_default=True,
    help="Outputs x inputs that become zero together.",
)
@click.option(
    "--choose",
    type=click.Choice(["magnitude", "wanda", "sparsegpt", "admm"]),
    default="admm",
    show_default=True,
    help="What makes a weight worth keeping.",
)
@options.no_reconstruct
@options.learning
def sparsify(
    model: Path,
    output: Path | None,
    sparsity: tuple[float, int],
    no_reconstruct: bool,
    dry_run: bool,
    terminal: "Terminal",
    **settings: Any,
) -> None:
    """Make weights of MODEL zero, and store the others alone: fewer bytes in the file, on every provider.

    ONNX Runtime multiplies by zeros as by other numbers: nothing runs faster, but for 2:4 on TensorRT, whose kernels
    use the sparse units of NVIDIA GPUs from Ampere on.
    """
    from onnxcomp.techniques import sparsify as work

    settings |= {"sparsity": sparsity[0], "of": sparsity[1], "reconstruct": not no_reconstruct}
    _convert(work, model, output, dry_run, terminal, settings)


@main.command()
@options.model_
@options.writing
@click.option("--ternary", is_flag=True, help="Signs and zeros, 1.6 bits per weight, instead of signs alone.")
@click.option("--bases", type=click.IntRange(1, 4), default=1, show_default=True, help="Patterns of signs added up.")
@click.option(
    "--ends", type=click.IntRange(0, 8), default=8, show_default=True,
    help="Bits of the first and last layers; 0 treats them like the others.",
)  # fmt: skip
@options.no_reconstruct
@options.learning
def binarize(
    model: Path, output: Path | None, no_reconstruct: bool, dry_run: bool, terminal: "Terminal", **settings: Any
) -> None:
    """Make the weights of MODEL signs and scales: fewer bytes in the file, on every provider.

    Sessions decode the weights once, when they load: no provider of ONNX Runtime has kernels for binary weights, so the
    result runs as fast as the original.
    """
    from onnxcomp.techniques import binarize as work

    _convert(work, model, output, dry_run, terminal, settings | {"reconstruct": not no_reconstruct})


@main.command()
@options.model_
@options.writing
@options.goal
@click.option(
    "--method",
    type=click.Choice(["auto", "svd", "spatial", "tucker", "cp"]),
    default="auto",
    show_default=True,
    help="Forms to try; auto leaves out cp, which is slow.",
)
@click.option(
    "--energy", metavar="99%", type=options.SHARE, help="Of each layer's output that is kept, in place of --target."
)
@click.option("--multiple", type=click.IntRange(1), default=1, show_default=True, help="Ranks are multiples of this.")
@options.no_reconstruct
@options.learning
def factorize(
    model: Path,
    output: Path | None,
    goal: tuple[str, float] | None,
    no_reconstruct: bool,
    dry_run: bool,
    terminal: "Terminal",
    **settings: Any,
) -> None:
    """Decompose layers of MODEL into smaller ones in a row until a share of its cost remains.

    More nodes can take longer than fewer FLOPs save. With flops= or latency= as target, forms that are slower on
    --provider than the layer are not used; params= and size= save bytes at any speed.
    """
    from onnxcomp.techniques import factorize as work

    if (goal is None) == (settings["energy"] is None):
        raise OptionError("how much is to go is not said once", remedy="give either --target or --energy")
    if goal is not None:
        settings |= {"cost": goal[0], "remains": goal[1]}
    _convert(work, model, output, dry_run, terminal, settings | {"reconstruct": not no_reconstruct})


@main.command()
@options.model_
@options.writing
@options.overridable
@options.running
@options.batch
@options.seed
@options.showing
def simplify(model: Path, output: Path | None, dry_run: bool, terminal: "Terminal", **settings: Any) -> None:
    """Clean MODEL up: the same function from fewer, cheaper nodes."""
    from onnxcomp.techniques import simplify as work

    _convert(work, model, output, dry_run, terminal, settings)


@main.command()
@options.model_
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="[default: MODEL.onnxpack]")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@options.showing
def pack(model: Path, output: Path | None, overwrite: bool, terminal: "Terminal") -> None:
    """Put MODEL and its external data into one entropy-coded file, which `unpack` turns back into the same bytes."""
    from onnxcomp.package import SUFFIX
    from onnxcomp.package import pack as work

    output = output or model.with_name(model.name.removesuffix(".onnx") + SUFFIX)
    terminal.show(work(model, output, overwrite=overwrite))


@main.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="[default: PACKAGE.onnx]")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option(
    "--max-bytes", metavar="64GB", type=options.BYTES, default="64GB", show_default=True, help="Most to unpack."
)
@options.showing
def unpack(package: Path, output: Path | None, overwrite: bool, max_bytes: int, terminal: "Terminal") -> None:
    """Write the model of PACKAGE, with its external data beside it, as they were."""
    from onnxcomp.package import SUFFIX
    from onnxcomp.package import unpack as work

    output = output or package.with_name(package.name.removesuffix(SUFFIX) + ".onnx")
    terminal.show(work(package, output, overwrite=overwrite, most=max_bytes))


def _convert(
    work: "Callable[..., Result]",
    model: Path,
    output: Path | None,
    dry_run: bool,
    terminal: "Terminal",
    settings: dict[str, Any],
) -> None:
    """Run a conversion, show its report, and say where the file went."""
    from onnxcomp.console import wrote
    from onnxcomp.report import Result

    if not model.name:
        raise OptionError("no model was named", remedy="give the path of an .onnx file")
    output = output or model.with_name(model.name.removesuffix(".onnx") + ".opt.onnx")
    page = settings.get("report")
    for path in (output, page):
        if (
            path is not None
            and terminal.json not in {None, "-"}
            and Path(str(terminal.json)).resolve() == path.resolve()
        ):
            raise OptionError(f"two files are both to be '{path}'", remedy="give another name to --json")
    try:
        with terminal.progress() as progress:
            result = work(model, output=output, dry_run=dry_run, progress=progress, **settings)
    except BudgetError as error:
        if isinstance(error.result, Result):
            terminal.show(error.result.report)
            terminal.print(*([] if page is None else [wrote(page)]))
        raise
    terminal.show(result.report)
    terminal.print("\nDry run: no model was written." if dry_run else wrote(output))
    terminal.print(*([] if page is None else [wrote(page)]))
    _refuse_unmet(result.report)


def _refuse_unmet(report: "Report") -> None:
    """A best effort was written as asked, and is still over the budget."""
    if not report.met:
        raise BudgetError("the budget was not reached: " + "; ".join(report.unmet))


@main.command()
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


@main.command("eval")
@options.models_
@click.option(
    "--eval", "evaluation", metavar="P", required=True, type=click.Path(path_type=Path), help="Data to score on."
)
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


@main.command("inspect")
@options.model_
@click.option("--groups", is_flag=True, help="Show which channels only go together, and which cannot go and why.")
@click.option("--weights", is_flag=True, help="Show the ranks and bits that each layer bears; best with --calib.")
@options.calib
@options.running
@options.batch
@options.seed
@options.picturing
@options.showing
def inspect_(model: Path, terminal: "Terminal", **settings: Any) -> None:
    """Show what each node of MODEL stores, computes, and takes of the time."""
    from onnxcomp.inspection import inspect as work

    terminal.show(work(model, **settings))


@main.command("passes")
def passes_() -> None:
    """List what there is, with one line each."""
    from onnxcomp.console import Terminal, pass_list
    from onnxcomp.registry import GROUPS, passes

    Terminal().print(*pass_list({name: kind.summary for name, kind in passes().items()}, GROUPS))
