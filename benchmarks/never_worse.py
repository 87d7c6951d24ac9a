"""Nothing that `optimize` makes is worse than what it was given: `python -m benchmarks.never_worse`.

Every model that the project can build, with random weights and made-up inputs, is optimized with the default settings
of an effort, then timed beside its input in processes of its own. A result may not be slower than its input by more
than noise, nor larger, nor lose more than its budget, unless its report says so. Exit code 1 where one is.
"""

import argparse
import sys
from collections.abc import Iterator

from benchmarks.common import show
from models import zoo
from onnxcomp import model as models
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import file_bytes, free_inputs, spec_of
from onnxcomp.optimizer import Effort, Result, optimize
from onnxcomp.runtime import Protocol, Target, Timing
from onnxcomp.stopwatch import time_apart
from onnxcomp.synthetic import synthetic

NOISE = 0.03
"""Of the median of the rounds; the upper quartile must be below 1 too, as these models run for microseconds."""
GROWTH = 1.01
"""Metadata are not weights."""


def faults(result: Result, size: int, timing: Timing) -> Iterator[str]:
    """What is worse, and not said."""
    if not result.report.met:
        return
    if timing.speedup < 1 - NOISE and timing.speedup_high < 1:
        yield "slower"
    if file_bytes(result.model) > size * GROWTH:
        yield "larger"


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", type=Effort, default=Effort.QUICK)
    parser.add_argument("--only", help="name of one model")
    arguments = parser.parse_args()
    rows, bad = [], 0
    for name in zoo.BUILDERS:
        if arguments.only not in (None, name):
            continue
        model = models.load(zoo.build(name))
        if any(spec_of(value) is None for value in free_inputs(model)):
            continue
        try:
            result = optimize(model, target=Target("cpu", 1), effort=arguments.effort, best_effort=True)
        except OnnxcompError as error:
            rows.append({"model": name, "refused": error.fact.splitlines()[0][:80]})
            continue
        data = synthetic(models.input_specs(model), 1, 0, models.vocabularies(model))
        feeds = next(iter(data.batches(1))).feeds
        timing = time_apart([model, result.model], Target("cpu", 1), feeds, Protocol(rounds=15))[1]
        size = file_bytes(model)
        found = list(faults(result, size, timing))
        bad += bool(found)
        rows.append(
            {
                "model": name,
                "speed-up": f"{timing.speedup:.2f} ({timing.speedup_low:.2f}-{timing.speedup_high:.2f})",
                "of its size": f"{file_bytes(result.model) / size:.1%}",
                "relative error": f"{result.report.result.drop:.2g}",
                "budget": "met" if result.report.met else "not met, as it says",
                "worse": ", ".join(found),
            }
        )
    show("Every model that the project builds", rows)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
