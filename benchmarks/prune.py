"""Pruned networks against the dense ones: `python -m benchmarks.prune FOLDER`.

Channels go until a share of the FLOPs, or of another cost, remains, with calibration samples alone and no labels.
`--int8` adds what `optimize` makes with pruning and without, `--beside` what `prune_others.py` made with other tools.
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
from onnxcomp.optimizer import optimize
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Target
from onnxcomp.saliency import Criterion
from onnxcomp.widths import Cost, Rates


def main() -> None:
    """Prune to each share and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    parser.add_argument("--only", help="name of one model; the image classifiers by default")
    parser.add_argument("--remains", type=float, nargs="+", default=[0.7, 0.5], help="shares that remain")
    parser.add_argument("--cost", type=Cost, default=Cost.FLOPS, help="latency: of batch 16, one thread")
    parser.add_argument(
        "--criterion", type=Criterion, nargs="+", default=[Criterion.OBS], help="others get local rates"
    )
    parser.add_argument("--multiple", type=int, default=Prune.multiple, help="widths are multiples of this")
    parser.add_argument("--int8", action="store_true", help="beside them, `optimize` with pruning and without")
    parser.add_argument("--beside", type=Path, help="folder of other models with the same inputs and outputs")
    arguments = parser.parse_args()
    for case in cases(arguments.folder):
        if case.name != arguments.only and (arguments.only or not case.name.startswith("cifar")):
            continue
        original = arguments.folder / f"{case.name}.onnx"
        model = models.load(original)
        data = open_dataset(arguments.folder / case.calib, models.input_specs(model))
        context = Context(data, Target(threads=1) if arguments.cost is Cost.LATENCY else Target(), batch=16)
        clean = Simplify()(model, context).model
        versions, seconds = {"fp32": original}, []
        versions |= {file.stem: file for file in sorted(arguments.beside.glob("*.onnx"))} if arguments.beside else {}
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
            for passes in (["clean-up", "quantize"], ["clean-up", "prune", "quantize"]) if arguments.int8 else ():
                name = f"optimize --passes {','.join(passes)}"
                versions[name] = folder / f"{len(passes)}.onnx"
                start = time.perf_counter()
                result = optimize(
                    original, output=versions[name], target=Target("cpu", 1), passes=passes, batch=16,
                    best_effort=True, **case.optimize,
                )  # fmt: skip
                chosen = " + ".join(trial.name for trial in result.report.trials if trial.verdict == "chosen")
                seconds.append(f"{name}: {time.perf_counter() - start:.0f} s, chose {chosen}")
            show(case.name, table(case, versions))
        print("", *seconds, sep="\n")


if __name__ == "__main__":
    main()
