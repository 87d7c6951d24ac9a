"""4-bit weights against fp32: `python -m benchmarks.int4 FOLDER`."""

import argparse
from pathlib import Path

from benchmarks.common import cases, scratch, show, table
from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Target


def main() -> None:
    """Quantize the embedding model's matrices and tables to 4 bits and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    arguments = parser.parse_args()
    case = next(case for case in cases(arguments.folder) if case.name == "minilm")
    original = arguments.folder / f"{case.name}.onnx"
    model = models.load(original)
    data = open_dataset(arguments.folder / case.calib, models.input_specs(model))
    context = Context(data, Target("cpu", 1))
    with scratch() as folder:
        ours = folder / "ours.onnx"
        models.save(QuantizeWeights(bits=4)(Simplify()(model, context).model, context).model, ours)
        show("4-bit weights, embedding included", table(case, {"fp32": original, "onnxcomp int4-weights": ours}))


if __name__ == "__main__":
    main()
