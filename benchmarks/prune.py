"""Pruned networks against the dense ones: `python -m benchmarks.prune FOLDER`.

Channels go until a share of the FLOPs remains, with calibration images alone and no labels; accuracy is that of the
whole evaluation file, latency is taken side by side on one thread.
"""

import argparse
import time
from pathlib import Path

from benchmarks.common import cases, scratch, show, table
from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.simplify import Simplify


def main() -> None:
    """Prune the image classifiers to each share and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    parser.add_argument("--only", help="name of one model")
    parser.add_argument("--remains", type=float, nargs="+", default=[0.7, 0.5], help="shares of the FLOPs")
    parser.add_argument("--multiple", type=int, default=1, help="widths are multiples of this")
    arguments = parser.parse_args()
    for case in cases(arguments.folder):
        if not case.name.startswith("cifar") or arguments.only not in (None, case.name):
            continue
        original = arguments.folder / f"{case.name}.onnx"
        model = models.load(original)
        context = Context(open_dataset(arguments.folder / case.calib, models.input_specs(model)))
        clean = Simplify()(model, context).model
        versions, seconds = {"fp32": original}, []
        with scratch() as folder:
            for share in arguments.remains:
                start = time.perf_counter()
                pruned = Prune(share, multiple=arguments.multiple)(clean, context).model
                seconds.append(f"{share:.0%}: {time.perf_counter() - start:.0f} s")
                versions[f"onnxcomp prune, {share:.0%} of the FLOPs"] = folder / f"{share}.onnx"
                models.save(pruned, folder / f"{share}.onnx")
            show(case.name, table(case, versions))
        print(f"\npruning took {', '.join(seconds)}")


if __name__ == "__main__":
    main()
