"""The command line: options become typed values, Python functions do the work, `console` shows the result.

Exit codes: 0 done and budget met, 1 failed, 2 usage or bad input, 3 budget not reachable, 130 interrupted. Heavy
imports wait until a command runs, so that `--help` answers at once.
"""

import atexit
import functools
import gc
import inspect
import io
import logging
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp import __version__, budget
from onnxcomp.errors import BudgetError, OnnxcompError, OptionError

if TYPE_CHECKING:
    from onnxcomp.console import Terminal
    from onnxcomp.data import ImageOptions
    from onnxcomp.report import Report, Result
    from onnxcomp.runtime import Target

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
    from onnxcomp.console import printable

    return printable(text)


class _Group(click.Group):
    command_class = _Command


class _Parsed(click.ParamType[Any]):
    """An option read by a function that raises OptionError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except OptionError as error:
            self.fail(error.fact + (f"; {error.remedy}" if error.remedy else ""), param, ctx)


def _parse_image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise OptionError(f"'{text}' is not an image size", remedy="write it like 224 or 480x640 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def _parse_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"'{text}' is not a list of numbers", remedy="write it like 0.485,0.456,0.406") from None


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parse_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise OptionError(f"'{text}' is not a regular expression: {error}") from None
    return text


_Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _as_one(name: str, build: Callable[..., Any], *options: _Decorator) -> _Decorator:
    """Options that reach the command as one argument, made of them by `build`."""
    parts = list(inspect.signature(build).parameters)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            value = build(**{part: given.pop(part) for part in parts})
            command(**given, **{name: value})

        return _all(*options)(wrapped)

    return decorate


def _all(*options: _Decorator) -> _Decorator:
    """Several options, shown by --help in this order."""
    return lambda command: functools.reduce(lambda done, option: option(done), reversed(options), command)


def _target(provider: str, threads: int) -> "Target":
    from onnxcomp.runtime import Target

    target = Target(provider, threads)
    _ = target.providers  # refused here, before any work
    return target


def _terminal(json: str | None, quiet: bool, verbose: bool) -> "Terminal":
    from onnxcomp.console import Terminal
    from onnxcomp.model import check_target

    path = Path(json) if json not in {None, "-"} else None
    if path is not None and (path.is_file() or not path.exists()):
        check_target(path, overwrite=_is_report(path))
    return Terminal(json, quiet, verbose)


def _is_report(path: Path) -> bool:
    """Whether a file is one that `--json` wrote, or empty, so that another may take its place."""
    with path.open("rb") if path.is_file() else io.BytesIO() as stream:
        start = stream.read(64)
    return not start or start.lstrip().startswith(b'{\n  "schema"')


def _images(
    image_size: tuple[int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    layout: Any,
) -> "ImageOptions":
    from onnxcomp.data import ImageOptions

    return ImageOptions(image_size, mean or ImageOptions.mean, std or ImageOptions.std, layout)


_SHARE = _Parsed("SHARE", budget.parse_share)
_BYTES = _Parsed("BYTES", budget.parse_bytes)
_NUMBERS = _Parsed("R,G,B", _parse_numbers)

_model = click.argument("model", type=click.Path(path_type=Path))
_models = click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))

_calib = click.option(
    "--calib",
    metavar="P",
    type=click.Path(path_type=Path),
    help="Data to learn from: .npz, or a folder of samples or images.",
)
_eval = click.option(
    "--eval", "evaluation", metavar="P", type=click.Path(path_type=Path), help="Data to measure the result on."
)
_metric = click.option(
    "--metric",
    metavar="NAME|FILE.py:FUNC",
    help="What to measure.  [default: accuracy with labels, else relative-error]",
)
_batch = click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows per run.")
_seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random.")
_exclude = click.option(
    "--exclude",
    metavar="REGEX",
    type=_Parsed("REGEX", _parse_pattern),
    help="Leave alone the nodes whose name matches.",
)
_memory = click.option(
    "--memory", metavar="2GB", type=_BYTES, default="2GB", show_default=True, help="Most that calibration keeps."
)
_max_drop = click.option(
    "--max-drop", metavar="1%", type=_SHARE, help="Most that the metric may lose, in its own unit: 1% is 0.01."
)
_best_effort = click.option("--best-effort", is_flag=True, help="Write the result even if it breaks the budget.")
_overridable = click.option(
    "--keep-overridable", is_flag=True, help="Leave weights that are also graph inputs overridable."
)
_writing = _all(
    click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="[default: MODEL.opt.onnx]"),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
    click.option("--dry-run", is_flag=True, help="Decide and show, but write no model."),
)
_running = _as_one(
    "target",
    _target,
    click.option("--provider", default="cpu", show_default=True, help="Where the model runs: cpu, cuda, tensorrt, ..."),
    click.option(
        "--threads", type=click.IntRange(0), default=0, help="Within an operator.  [default: ONNX Runtime's choice]"
    ),
)
_showing = _as_one(
    "terminal",
    _terminal,
    click.option("--json", metavar="FILE", help="Also write the report as JSON; - is standard output."),
    click.option("-q", "--quiet", is_flag=True, help="Show nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Show every node, and the traceback of a defect."),
)
_picturing = _as_one(
    "images",
    _images,
    click.option(
        "--image-size",
        metavar="HxW|N",
        type=_Parsed("HxW|N", _parse_image_size),
        help="Of images.  [default: the model's]",
    ),
    click.option(
        "--mean", metavar="R,G,B", type=_NUMBERS, help="Subtracted from pixels, in 0-1 or 0-255.  [default: 0]"
    ),
    click.option("--std", metavar="R,G,B", type=_NUMBERS, help="Divides pixels, in 0-1 or 0-255.  [default: 1]"),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Of images.  [default: guessed]"),
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="onnxcomp")
def main() -> None:
    """Make a trained ONNX model smaller and faster, and prove it.

    Exit codes: 0 done and budget met, 1 failed, 2 usage or bad input, 3 budget not reachable, 130 interrupted.
    """


@main.command()
@_model
@_writing
@_calib
@_eval
@_metric
@_max_drop
@click.option("--max-latency", metavar="5ms", type=_Parsed("TIME", budget.parse_latency), help="Per run.")
@click.option("--min-speedup", metavar="2x", type=_Parsed("RATIO", budget.parse_speedup), help="Over the original.")
@click.option("--max-size", metavar="25%|10MB", type=_Parsed("SIZE", budget.parse_size), help="Of the file.")
@_best_effort
@click.option(
    "--passes", metavar="A,B", type=_Parsed("A,B", _parse_names), help="Use only these, see `onnxcomp passes`."
)
@_exclude
@_overridable
@_running
@_batch
@click.option(
    "--effort", type=click.Choice(["quick", "default", "extensive"]), default="default", show_default=True,
    help="How long to search.",
)  # fmt: skip
@_seed
@_memory
@_picturing
@_showing
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
@_model
@_writing
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
@_calib
@_eval
@_metric
@_max_drop
@_best_effort
@_exclude
@_overridable
@_running
@_batch
@_seed
@_memory
@_picturing
@_showing
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
    from onnxcomp.convert import Scheme
    from onnxcomp.convert import quantize as work
    from onnxcomp.passes.quantize_static import Range

    for step in ("gptq", "polish", "bias_correction", "equalize", "smooth"):
        settings[step] = not settings.pop(f"no_{step}")
    settings |= {"scheme": Scheme(scheme), "range": Range(range_)}
    _convert(work, model, output, dry_run, terminal, settings)


@main.command()
@_model
@_writing
@click.option(
    "--target",
    "goal",
    metavar="COST=SHARE",
    type=_Parsed("COST=SHARE", budget.parse_target),
    help="What remains: flops=50%, params=70%, size=60% or latency=75% (on --provider, at --batch and --threads).",
)
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
    type=_Parsed("SHARE", budget.parse_share),
    default=0.1,
    show_default=True,
    help="Share of its channels that every group keeps.",
)
@click.option("--no-reconstruct", is_flag=True, help="Do not fit the layers again.")
@_calib
@_eval
@_metric
@_max_drop
@_best_effort
@_exclude
@_overridable
@_running
@_batch
@_seed
@_memory
@_picturing
@_showing
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
    from onnxcomp.convert import prune as work

    if (goal is None) == (settings["threshold"] is None):
        raise OptionError("how much is to go is not said once", remedy="give either --target or --threshold")
    if goal is not None:
        settings |= {"cost": goal[0], "remains": goal[1]}
    settings |= {"normalised": not no_normalise, "reconstruct": not no_reconstruct}
    _convert(work, model, output, dry_run, terminal, settings)


@main.command()
@_model
@_writing
@_overridable
@_running
@_batch
@_seed
@_showing
def simplify(model: Path, output: Path | None, dry_run: bool, terminal: "Terminal", **settings: Any) -> None:
    """Clean MODEL up: the same function from fewer, cheaper nodes."""
    from onnxcomp.convert import simplify as work

    _convert(work, model, output, dry_run, terminal, settings)


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
    if terminal.json not in {None, "-"} and Path(str(terminal.json)).resolve() == output.resolve():
        raise OptionError(f"the model and the report are both to be '{output}'", remedy="give another name to --json")
    try:
        with terminal.progress() as progress:
            result = work(model, output=output, dry_run=dry_run, progress=progress, **settings)
    except BudgetError as error:
        if isinstance(error.result, Result):
            terminal.show(error.result.report)
        raise
    terminal.show(result.report)
    terminal.print("\nDry run: no model was written." if dry_run else wrote(output))
    _refuse_unmet(result.report)


def _refuse_unmet(report: "Report") -> None:
    """A best effort was written as asked, and is still over the budget."""
    if not report.met:
        raise BudgetError("the budget was not reached: " + "; ".join(report.unmet))


@main.command()
@_models
@_calib
@_running
@_batch
@click.option("--cold", is_flag=True, help="Alternate single runs, which evict each other from caches.")
@_seed
@_picturing
@_showing
def bench(models: tuple[Path, ...], cold: bool, terminal: "Terminal", **settings: Any) -> None:
    """Time MODELS side by side: latency, throughput, load time, size, memory; ratios to the first."""
    from onnxcomp.measure import bench as work
    from onnxcomp.runtime import Protocol

    with terminal.progress() as progress:
        benchmark = work(models, protocol=Protocol(cold=cold), progress=progress, **settings)
    terminal.show(benchmark)


@main.command("eval")
@_models
@click.option(
    "--eval", "evaluation", metavar="P", required=True, type=click.Path(path_type=Path), help="Data to score on."
)
@_metric
@_running
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Rows per run.")
@_picturing
@_showing
def evaluate(models: tuple[Path, ...], evaluation: Path, terminal: "Terminal", **settings: Any) -> None:
    """Score MODELS on the same samples, and compare their outputs with the first's."""
    from onnxcomp.measure import evaluate as work

    with terminal.progress() as progress:
        result = work(models, evaluation, progress=progress, **settings)
    terminal.show(result)


@main.command("inspect")
@_model
@click.option("--groups", is_flag=True, help="Show which channels only go together, and which cannot go and why.")
@_calib
@_running
@_batch
@_seed
@_picturing
@_showing
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
