"""INT8 against fp32 and ONNX Runtime's own quantizers: `python -m benchmarks.int8 FOLDER`.

Each model is optimized on its calibration file, then all versions are timed side by side, one thread, in alternating
blocks of 20 consecutive runs after warm-up, and scored on the whole evaluation file.
"""

import argparse
import time
from pathlib import Path

from benchmarks.common import cases, peers, scratch, show, table
from onnxcomp import model as models
from onnxcomp.optimizer import Effort, optimize
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Target


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    parser.add_argument("--only", help="name of one model")
    parser.add_argument("--effort", type=Effort, default=Effort.DEFAULT)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cold", action="store_true", help="alternate single runs: caches are evicted")
    parser.add_argument("--batch", type=int, default=1, help="batch that the search optimizes for")
    arguments = parser.parse_args()
    for case in cases(arguments.folder):
        if arguments.only not in (None, case.name):
            continue
        original = arguments.folder / f"{case.name}.onnx"
        with scratch() as folder:
            clean = folder / "clean.onnx"
            models.save(Simplify()(models.load(original)).model, clean)
            ours = folder / "ours.onnx"
            start = time.perf_counter()
            result = optimize(
                original, output=ours, target=Target("cpu", 1), effort=arguments.effort, batch=arguments.batch,
                best_effort=True, passes=["clean-up", "quantize"], **case.optimize,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            versions = {"fp32": original, "onnxcomp simplify": clean}
            versions |= peers(original, case, arguments.folder / case.calib, folder)
            versions["onnxcomp optimize"] = ours
            show(case.name, table(case, versions, rounds=arguments.rounds, cold=arguments.cold))
        chosen = [trial.name for trial in result.report.trials if trial.verdict == "chosen"]
        print(f"\noptimize took {seconds:.0f} s and chose: {', '.join(chosen)}")


if __name__ == "__main__":
    main()
