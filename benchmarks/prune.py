"""Pruned networks against the dense ones: `python -m benchmarks.prune FOLDER`.

Channels go until a share of the FLOPs, or of the latency, remains, with calibration images alone and no labels.
Accuracy is that of the whole evaluation file, latency is taken side by side on one thread.
"""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.common import cases, scratch, show, table
from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Target
from onnxcomp.saliency import Criterion
from onnxcomp.widths import Cost, Rates


def main() -> None:
    """Prune the image classifiers to each share and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    parser.add_argument("--only", help="name of one model")
    parser.add_argument("--remains", type=float, nargs="+", default=[0.7, 0.5], help="shares that remain")
    parser.add_argument("--cost", type=Cost, default=Cost.FLOPS, help="latency: of batch 16, one thread")
    parser.add_argument(
        "--criterion", type=Criterion, nargs="+", default=[Criterion.OBS], help="others get local rates"
    )
    parser.add_argument("--multiple", type=int, default=1, help="widths are multiples of this")
    arguments = parser.parse_args()
    for case in cases(arguments.folder):
        if not case.name.startswith("cifar") or arguments.only not in (None, case.name):
            continue
        original = arguments.folder / f"{case.name}.onnx"
        model = models.load(original)
        data = open_dataset(arguments.folder / case.calib, models.input_specs(model))
        context = Context(data, Target(threads=1) if arguments.cost is Cost.LATENCY else Target(), batch=16)
        clean = Simplify()(model, context).model
        versions, seconds = {"fp32": original}, []
        with scratch() as folder:
            for criterion, share in itertools.product(arguments.criterion, arguments.remains):
                name = f"{criterion}, {share:.0%} of the {arguments.cost}"
                technique = Prune(share, arguments.cost, criterion, multiple=arguments.multiple)
                if criterion is not Criterion.OBS:  # as other tools have it
                    technique = replace(technique, rates=Rates.LOCAL, reconstruct=False)
                start = time.perf_counter()
                pruned = technique(clean, context).model
                seconds.append(f"{name}: {time.perf_counter() - start:.0f} s")
                versions[name] = folder / f"{criterion}-{share}.onnx"
                models.save(pruned, versions[name])
            show(case.name, table(case, versions))
        print(f"\npruning took {', '.join(seconds)}")


if __name__ == "__main__":
    main()
