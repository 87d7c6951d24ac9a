"""What commands share: options that become typed values, and the parsing of their text."""

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp import budget
from onnxcomp.errors import ModelError, OptionError

if TYPE_CHECKING:
    from onnxcomp.console import Terminal
    from onnxcomp.data import ImageOptions
    from onnxcomp.runtime import Target


class Parsed(click.ParamType[Any]):
    """An option read by a function that raises OptionError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What the function makes of the text."""
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


def parse_names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_sparsity(text: str) -> tuple[float, int]:
    """A share, or N:M: how many of every so many become zero. Gives the share and M, or 0."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        return budget.parse_share(text), 0
    zero, of = int(match[1]), int(match[2])
    if not 0 < zero < of:
        raise OptionError(f"'{text}' leaves no sense", remedy="write it like 2:4: two zeros in every four weights")
    return zero / of, of


def parse_block(text: str) -> tuple[int, int]:
    """Outputs x inputs."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise OptionError(f"'{text}' is not a block", remedy="write it like 4x1: outputs x inputs")
    return int(match[1]), int(match[2])


def _parse_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise OptionError(f"'{text}' is not a regular expression: {error}") from None
    return text


def _parse_executor(text: str) -> str:
    from onnxcomp.executors import parse

    return parse(text)


_Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _as_one(name: str, build: Callable[..., Any], *options: _Decorator) -> _Decorator:
    """Options that reach the command as one argument, made of them by `build`."""
    parts = list(inspect.signature(build).parameters)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            value = build(**{part: given.pop(part) for part in parts})
            command(**given, **{name: value})

        return together(*options)(wrapped)

    return decorate


def together(*options: _Decorator) -> _Decorator:
    """Several options, shown by --help in this order."""
    return lambda command: functools.reduce(lambda done, option: option(done), reversed(options), command)


def _target(provider: str, threads: int) -> "Target":
    from onnxcomp.runtime import Target

    target = Target(provider, threads)
    _ = target.providers  # refused here, before any work
    return target


def _limits(
    max_drop: float | None,
    max_latency: float | None,
    min_speedup: float | None,
    max_size: budget.Budget | None,
    max_memory: budget.Budget | None,
) -> budget.Budget:
    size, memory = max_size or budget.Budget(), max_memory or budget.Budget()
    return budget.Budget(
        max_drop, max_latency, min_speedup, size.max_size, size.max_size_share, memory.max_memory,
        memory.max_memory_share,
    )  # fmt: skip


_JSON = b'{\n  "schema"'
"""How reports begin."""


def _terminal(json: str | None, quiet: bool, verbose: bool) -> "Terminal":
    from onnxcomp.console import Terminal

    if json not in {None, "-"}:
        check_report(Path(str(json)), _JSON, option="--json")
    return Terminal(json, quiet, verbose)


def check_report(path: Path, beginning: bytes, inputs: Sequence[object] = (), *, option: str) -> None:
    """Refuse a report that could not be written, or would replace something that is no such report.

    Args:
        path: where it is to be.
        beginning: of all such reports.
        inputs: as for `files.check_target`.
        option: that gave the path.

    Raises:
        ModelError: it cannot be written there.
    """
    from onnxcomp.files import check_target

    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe or a device
    check_target(path, overwrite=True, inputs=inputs, option=option)
    with path.open("rb") if path.is_file() else io.BytesIO() as stream:
        start = stream.read(64)
    if start and not start.lstrip().startswith(beginning):
        raise ModelError(f"'{path}' exists, and is no such report", remedy=f"give another name to {option}")


def removing(beginning: Callable[[], bytes]) -> dict[str, Any]:
    """Settings of an option for a report, so that a former one goes before anything else can be refused or fail.

    What is there afterwards is then of this run, whatever came of it.

    Args:
        beginning: gives how all such reports begin; what begins otherwise stays.
    """

    def remove(_: click.Context, option: click.Parameter, path: Any) -> Any:
        if path not in {None, "-"} and Path(path).is_file():
            with contextlib.suppress(ModelError, OSError):  # told where it is about to be written
                check_report(Path(path), beginning(), option=option.opts[0])
                Path(path).unlink()
        return path

    return {"is_eager": True, "callback": remove}


def _images(
    image_size: tuple[int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    layout: Any,
) -> "ImageOptions":
    from onnxcomp.data import ImageOptions

    return ImageOptions(image_size, mean or ImageOptions.mean, std or ImageOptions.std, layout)


SHARE = Parsed("SHARE", budget.parse_share)
BYTES = Parsed("BYTES", budget.parse_bytes)
_NUMBERS = Parsed("R,G,B", _parse_numbers)

model_ = click.argument("model", type=click.Path(path_type=Path))
models_ = click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))

calib = click.option(
    "--calib",
    metavar="P",
    type=click.Path(path_type=Path),
    help="Data to learn from: .npz, or a folder of samples or images.",
)
evaluation_ = click.option(
    "--eval", "evaluation", metavar="P", type=click.Path(path_type=Path), help="Data to measure the result on."
)
proof = click.option(
    "--eval", "evaluation", metavar="P", required=True, type=click.Path(path_type=Path), help="Data to score on."
)
metric = click.option(
    "--metric",
    metavar="NAME|FILE.py:FUNC",
    help="What to measure.  [default: accuracy with labels, else relative-error]",
)
batch = click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows per run.")
seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random.")
exclude = click.option(
    "--exclude",
    metavar="REGEX",
    type=Parsed("REGEX", _parse_pattern),
    help="Leave alone the nodes whose name matches.",
)
memory = click.option(
    "--memory", metavar="2GB", type=BYTES, default="2GB", show_default=True, help="Most that calibration keeps."
)
executor_ = click.option(
    "--executor",
    metavar="E",
    type=Parsed("EXECUTOR", _parse_executor),
    default="local",
    show_default=True,
    help="Where calibration and scoring are done: none (one process), local[:N] (processes here), dask://HOST:PORT.",
)
max_drop = click.option(
    "--max-drop", metavar="1%", type=SHARE, help="Most that the metric may lose, in its own unit: 1% is 0.01."
)
limits = _as_one(
    "budget",
    _limits,
    max_drop,
    click.option("--max-latency", metavar="5ms", type=Parsed("TIME", budget.parse_latency), help="Per run."),
    click.option("--min-speedup", metavar="2x", type=Parsed("RATIO", budget.parse_speedup), help="Over the original."),
    click.option("--max-size", metavar="25%|10MB", type=Parsed("SIZE", budget.parse_size), help="Of the file."),
    click.option(
        "--max-memory",
        metavar="50%|1GB",
        type=Parsed("SIZE", functools.partial(budget.parse_size, of="memory")),
        help="By which a process grows that loads and runs it.",
    ),
)
best_effort = click.option("--best-effort", is_flag=True, help="Write the result even if it breaks the budget.")
overridable = click.option(
    "--keep-overridable", is_flag=True, help="Leave weights that are also graph inputs overridable."
)
writing = together(
    click.option("-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="[default: MODEL.opt.onnx]"),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
    click.option("--dry-run", is_flag=True, help="Decide and show, but write no model."),
)
running = _as_one(
    "target",
    _target,
    click.option("--provider", default="cpu", show_default=True, help="Where the model runs: cpu, cuda, tensorrt, ..."),
    click.option(
        "--threads", type=click.IntRange(0), default=0, help="Within an operator.  [default: ONNX Runtime's choice]"
    ),
)


def _showing(**json: Any) -> _Decorator:
    return _as_one(
        "terminal",
        _terminal,
        click.option("--json", metavar="FILE", help="Also write the report as JSON; - is standard output.", **json),
        click.option("-q", "--quiet", is_flag=True, help="Show nothing but errors."),
        click.option("-v", "--verbose", is_flag=True, help="Show every node, and the traceback of a defect."),
    )


showing = _showing()
showing_anew = _showing(**removing(lambda: _JSON))
"""The same, where a report of a former run must not pass for one of this."""

picturing = _as_one(
    "images",
    _images,
    click.option(
        "--image-size",
        metavar="HxW|N",
        type=Parsed("HxW|N", _parse_image_size),
        help="Of images.  [default: the model's]",
    ),
    click.option(
        "--mean", metavar="R,G,B", type=_NUMBERS, help="Subtracted from pixels, in 0-1 or 0-255.  [default: 0]"
    ),
    click.option("--std", metavar="R,G,B", type=_NUMBERS, help="Divides pixels, in 0-1 or 0-255.  [default: 1]"),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Of images.  [default: guessed]"),
)

learning = together(
    calib, evaluation_, metric, max_drop, best_effort, exclude, overridable, running, batch, seed, memory, executor_,
    picturing, showing,
)  # fmt: skip
"""What every technique takes that learns from data and is measured on them."""

repeating = together(
    calib, evaluation_, metric, max_drop, best_effort, running, batch, memory, executor_, picturing, showing,
)  # fmt: skip
"""The same without what a recipe says."""


def _cache(cache: Path | None, no_cache: bool) -> Path | None:
    if no_cache or cache == Path("none"):
        return None
    from platformdirs import user_cache_path

    return cache or user_cache_path("onnxcomp")


cache = _as_one(
    "cache",
    _cache,
    click.option(
        "--cache",
        metavar="DIR",
        envvar="ONNXCOMP_CACHE",
        type=click.Path(path_type=Path),
        help="Where to keep what was made and measured, or none.  [default: the user's folder for caches]",
    ),
    click.option("--no-cache", is_flag=True, help="Make and measure all anew."),
)
"""Work that was cut short goes on where it was."""

goal = click.option(
    "--target",
    "goal",
    metavar="COST=SHARE",
    type=Parsed("COST=SHARE", budget.parse_target),
    help="What remains: flops=50%, params=70%, size=60% or latency=75% (on --provider, at --batch and --threads).",
)

no_reconstruct = click.option("--no-reconstruct", is_flag=True, help="Do not fit layers again.")
