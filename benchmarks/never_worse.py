"""Nothing that `optimize` makes is worse than what it was given: `python -m benchmarks.never_worse`.

Every model that the project can build, with random weights and made-up inputs, or with `--backend` those of the ONNX
backend tests with their own inputs, is optimized with the default settings of an effort, then timed beside its input in
processes of its own. A result may not be slower than its input by more than noise, nor larger, nor lose more than its
budget, unless its report says so. Exit code 1 where one is.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import onnx_ir as ir

from benchmarks.common import show
from models import zoo
from onnxcomp import model as models
from onnxcomp.data import open_dataset
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import file_bytes, free_inputs, spec_of
from onnxcomp.optimizer import Effort, Result, optimize
from onnxcomp.runtime import Feeds, Protocol, Target, Timing
from onnxcomp.stopwatch import time_apart
from onnxcomp.synthetic import synthetic
from tests.backend_suite import cases

NOISE = 0.03
"""Of the median of the rounds; the upper quartile must be below 1 too, as these models run for microseconds."""
TARGET = Target("cpu", 1)


def faults(result: Result, size: int, timing: Timing) -> Iterator[str]:
    """What is worse, and not said."""
    if not result.report.met:
        return
    if timing.speedup < 1 - NOISE and timing.speedup_high < 1:
        yield "slower"
    if file_bytes(result.model) > size:
        yield "larger"


@dataclass(frozen=True)
class Given:
    """A model, and one sample of inputs that suit it; None where those are made up."""

    name: str
    model: ir.Model
    inputs: Feeds | None = None

    def feeds(self) -> Feeds:
        """One run."""
        if self.inputs is not None:
            return self.inputs
        data = synthetic(models.input_specs(self.model), 1, 0, models.vocabularies(self.model))
        return next(iter(data.batches(1))).feeds


def built() -> Iterator[Given]:
    """Every model that the project can build."""
    for name in zoo.BUILDERS:
        model = models.load(zoo.build(name))
        if all(spec_of(value) is not None for value in free_inputs(model)):
            yield Given(name, model)


def backend(every: int, start: int) -> Iterator[Given]:
    """The models of the ONNX backend tests that load and can be fed, or every so many of them from one on."""
    for case in islice(cases(), start, None, every):
        try:
            model = models.load(case.model)
            open_dataset([case.inputs], models.input_specs(model))
        except OnnxcompError:
            continue
        yield Given(case.name, model, case.inputs)


def row(given: Given, effort: Effort) -> dict[str, str]:
    """What became of a model; empty where that is what was given."""
    calib = None if given.inputs is None else [given.inputs]
    try:
        result = optimize(given.model, calib=calib, target=TARGET, effort=effort, best_effort=True)
    except OnnxcompError as error:
        return {"model": given.name, "refused": error.fact.splitlines()[0][:80]}
    if not result.report.steps:
        return {}
    timing = time_apart([given.model, result.model], TARGET, given.feeds(), Protocol(rounds=15))[1]
    size = file_bytes(given.model)
    return {
        "model": given.name,
        "speed-up": f"{timing.speedup:.2f} ({timing.speedup_low:.2f}-{timing.speedup_high:.2f})",
        "of its size": f"{file_bytes(result.model) / size:.1%}",
        "relative error": f"{result.report.result.drop:.2g}",
        "budget": "met" if result.report.met else "not met, as it says",
        "worse": ", ".join(faults(result, size, timing)),
    }


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", type=Effort, default=Effort.QUICK)
    parser.add_argument("--only", help="name of one model")
    parser.add_argument(
        "--backend",
        type=int,
        metavar="EVERY",
        help="the ONNX backend tests in place of the models built: every so many",
    )
    parser.add_argument("--start", type=int, default=0, help="with --backend, the number of the first")
    arguments = parser.parse_args()
    everything = built() if arguments.backend is None else backend(arguments.backend, arguments.start)
    rows = [row(given, arguments.effort) for given in everything if arguments.only in (None, given.name)]
    show("Models that came out otherwise", [found for found in rows if found])
    print(f"{len(rows)} models, {rows.count({})} of them left as they were")
    sys.exit(any(found.get("worse") for found in rows))


if __name__ == "__main__":
    main()
