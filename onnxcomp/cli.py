"""The command line: options become typed values, Python functions do the work, `console` shows the result.

Here are the commands that make something of a model; `viewing` has those that only look.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp import __version__, budget, options, viewing
from onnxcomp.errors import OptionError
from onnxcomp.shell import Group, convert

if TYPE_CHECKING:
    from onnxcomp.console import Terminal

_CRITERIA = ["obs", "obd", "l1", "l2", "l1-nonzero", "l2-nonzero", "activation", "activation-std", "feature-map"]
_CRITERIA += ["apoz", "wanda", "gamma", "fpgm", "random"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="onnxcomp")
def main() -> None:
    """Make a trained ONNX model smaller and faster, and prove it.

    Exit codes: 0 done and budget met, 1 failed, 2 usage or bad input, 3 budget not reachable, 130 interrupted.
    """


for _command in vars(viewing).values():
    if isinstance(_command, click.Command):
        main.add_command(_command)


@main.command()
@options.model_
@options.writing
@click.option(
    "--report", metavar="FILE.html", type=click.Path(path_type=Path), help="Also write a page that shows it all."
)
@options.calib
@options.evaluation_
@options.metric
@options.limits
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
@click.option(
    "--time-limit",
    metavar="3min",
    type=options.Parsed("TIME", budget.parse_duration),
    help="Then the search ends with the best so far.",
)
@options.cache
@click.option(
    "--pareto",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Also write every result that is worth a choice between accuracy, latency and size.",
)
@options.seed
@options.memory
@options.executor_
@options.picturing
@options.showing
def optimize(
    model: Path,
    output: Path | None,
    effort: str,
    dry_run: bool,
    terminal: "Terminal",
    **settings: Any,
) -> None:
    """Make MODEL faster, then smaller, within a budget, by what is measured."""
    from onnxcomp.optimizer import Effort
    from onnxcomp.optimizer import optimize as work

    convert(work, model, output, dry_run, terminal, settings | {"effort": Effort(effort)})


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
    convert(work, model, output, dry_run, terminal, settings)


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
    convert(work, model, output, dry_run, terminal, settings)


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

    convert(work, model, output, dry_run, terminal, settings | {"reconstruct": not no_reconstruct})


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
    convert(work, model, output, dry_run, terminal, settings)


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

    convert(work, model, output, dry_run, terminal, settings | {"reconstruct": not no_reconstruct})


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
    convert(work, model, output, dry_run, terminal, settings | {"reconstruct": not no_reconstruct})


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

    convert(work, model, output, dry_run, terminal, settings)


@main.command()
@options.model_
@click.option(
    "--recipe", metavar="R", required=True, type=click.Path(path_type=Path), help="A YAML file, or a model made so."
)
@options.writing
@options.repeating
def apply(model: Path, output: Path | None, dry_run: bool, terminal: "Terminal", **settings: Any) -> None:
    """Do to MODEL what a recipe says, which another run decided on or somebody wrote by hand."""
    from onnxcomp.conversion import apply as work

    convert(work, model, output, dry_run, terminal, settings)


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
