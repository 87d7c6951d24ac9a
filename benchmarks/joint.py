"""The joint search beside each technique alone and every fixed order of them: `python -m benchmarks.joint FOLDER`.

All within the same loss. The search plans branches, widths and precision together. A technique alone is the same
search with no other allowed. A fixed order prunes to a share of the FLOPs and then quantizes; of several shares, the
fastest within the loss counts, by the whole evaluation file, which favours it. All versions are then timed side by
side.

Builders of ImageNet size have random weights and made-up images: what outputs lose on others stands for accuracy.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Case, Feeds, cases, peers, scratch, show, table
from models import zoo
from onnxcomp import convert
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.core import Pass
from onnxcomp.optimizer import Effort, optimize
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.simplify import Simplify
from onnxcomp.passes.unfuse import Unfuse
from onnxcomp.report import Report
from onnxcomp.runtime import Session, Target

ALONE = {
    "INT8 alone": ["clean-up", "quantize"],
    "channels alone": ["clean-up", "prune"],
    "branches alone": ["clean-up", "prune-depth"],
}
"""One technique each, with clean-up."""

LOSSES = {"minilm": 0.01, "imagenet_resnet50": 0.2, "imagenet_mobilenetv2": 0.2}
"""What a model may lose, if not what the search accepts by default, or a fixed order half a point."""

_IMAGES = 32
"""Made-up ones, for builders."""
_SIDE, _BLOCK = 28, 8
"""Blocks of one colour on each side of an image, and the pixels on each side of a block."""


def orders(share: float, quantize: Pass) -> Mapping[str, Sequence[Pass]]:
    """Fixed orders that leave a share of the FLOPs; weights in integers are not pruned, so INT8 comes last."""
    half = share**0.5
    floats: Mapping[str, Sequence[Pass]] = {
        "channels": [Prune(share, multiple=16)],
        "branches": [PruneDepth(share)],
        "channels, branches": [Prune(half, multiple=16), PruneDepth(half)],
        "branches, channels": [PruneDepth(half), Prune(half, multiple=16)],
    }
    result: dict[str, Sequence[Pass]] = {}
    for name, passes in floats.items():
        if len(passes) > 1:
            result[name] = (Simplify(), Unfuse(), *passes)
        result[f"{name}, INT8"] = (Simplify(), Unfuse(), *passes, quantize)
    return result


def fixed(case: Case, folder: Path, made: Path, loss: float, arguments: argparse.Namespace) -> dict[str, Path]:
    """Of each fixed order the one that leaves the fewest FLOPs within the loss."""
    quantize = QuantizeDynamic() if case.name == "minilm" else QuantizeStatic()
    original, target = folder / f"{case.name}.onnx", Target("cpu", 1)
    baseline = case.evaluate(Session(original, target).run)
    found: dict[str, Path] = {}
    for share in sorted(arguments.shares, reverse=True):
        for name, passes in orders(share, quantize).items():
            path = made / f"{name} {share}.onnx"
            convert(original, passes, output=path, calib=folder / case.calib, target=target, batch=max(case.batches))
            lost = baseline - case.evaluate(Session(path, target).run)
            print(f"{name} to {share:.0%}: {lost:.4f} lost{'' if lost <= loss else ', too much'}", flush=True)
            if lost <= loss:
                found[name] = path  # fewer FLOPs than before, and still within the loss
    return found


def ours(source: Any, folder: Path, name: str, **options: Any) -> tuple[Path, Report, float]:
    """What the search makes, its report, and the seconds that it took."""
    path, start = folder / f"{name}.onnx", time.perf_counter()
    result = optimize(source, output=path, target=Target("cpu", 1), best_effort=True, executor="local", **options)
    return path, result.report, time.perf_counter() - start


def told(report: Report, seconds: float) -> None:
    """What the search took, and how well plans foretold."""
    print(f"\nThe search took {seconds:.0f} s.", flush=True)
    for trial in report.trials:
        if trial.predicted is not None and trial.figures.speedup:
            off = trial.predicted / trial.figures.speedup - 1
            print(f"  {trial.name}: {trial.figures.speedup:.2f}x, {off:+.1%} foretold; {trial.verdict}")


def made_up(seed: int) -> NDArray[np.float32]:
    """Images of coloured blocks, each with a contrast and a tint of its own.

    White noise looks alike everywhere: 99.97% of the energy of a ResNet-50's outputs is then the same for all images,
    and whatever goes from the model seems to lose nothing.
    """
    random = np.random.default_rng(seed)
    blocks = random.normal(size=(_IMAGES, 3, _SIDE, _SIDE)) * random.uniform(0.3, 2, size=(_IMAGES, 1, 1, 1))
    tinted = blocks + random.normal(size=(_IMAGES, 3, 1, 1))
    return np.kron(tinted, np.ones((_BLOCK, _BLOCK))).astype(np.float32)


def built(name: str, folder: Path) -> Case:
    """A builder of ImageNet size: random weights, so that what its outputs lose on other images stands for accuracy.

    Args:
        name: of the builder.
        folder: where its model goes, and made-up images to learn from.
    """
    model = zoo.LARGE[name]()
    path, calib = folder / f"{name}.onnx", folder / f"{name}.npz"
    models.save(model, path)
    tensor = model.graph.inputs[0].name or ""
    np.savez(calib, **{tensor: made_up(0)})  # type: ignore[arg-type]
    unseen = {tensor: made_up(1)}
    expected = Session(path).run(unseen)

    def agreement(predict: Callable[[Feeds], Mapping[str, NDArray[Any]]]) -> float:
        found = predict(unseen)
        noise = sum(float(np.square(found[key] - own).sum()) for key, own in expected.items())
        return 1 - float(np.sqrt(noise / sum(float(np.square(own).sum()) for own in expected.values())))

    return Case(
        name, calib.name, agreement, "1 - relative error", lambda rows: {tensor: unseen[tensor][:rows]}, (1,),
        {"calib": calib, "passes": ["clean-up", "quantize", "prune", "prune-depth"]},
    )  # fmt: skip


def compare(case: Case, folder: Path, arguments: argparse.Namespace) -> None:
    """Search, and show what came of it beside everything else."""
    original = folder / f"{case.name}.onnx"
    options = {
        **case.optimize,
        "batch": max(case.batches),
        "budget": Budget(max_drop=LOSSES.get(case.name)),
        "effort": arguments.effort,
        "time_limit": arguments.time_limit,
    }
    with scratch() as made:
        path, report, seconds = ours(original, made, "joint", **options)
        told(report, seconds)
        versions = {"fp32": original}
        if arguments.peers:
            versions |= peers(original, case, folder / case.calib, made)
        for name, passes in ALONE.items():
            versions[name], _, seconds = ours(original, made, name, **options | {"passes": passes})
            print(f"{name}: {seconds:.0f} s", flush=True)
        if arguments.orders:
            versions |= fixed(case, folder, made, LOSSES.get(case.name, 0.005), arguments)
        versions["joint"] = path
        show(case.name, table(case, versions, rounds=arguments.rounds))


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    parser.add_argument("--only", help="name of one model or builder")
    parser.add_argument("--effort", type=Effort, default=Effort.DEFAULT)
    parser.add_argument("--time-limit", type=float, help="seconds for each search; none by default")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.95, 0.9, 0.8], help="of FLOPs, of fixed orders")
    parser.add_argument("--no-orders", dest="orders", action="store_false", help="leave fixed orders out")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave other tools out")
    arguments = parser.parse_args()
    for case in cases(arguments.folder):
        if arguments.only in (None, case.name):
            compare(case, arguments.folder, arguments)
    for name in zoo.LARGE:
        if arguments.only in (None, name):
            with scratch() as folder:
                compare(built(name, folder), folder, arguments)


if __name__ == "__main__":
    main()
