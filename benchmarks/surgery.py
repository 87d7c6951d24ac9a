"""Channels cut out of real models against the same channels masked: `python -m benchmarks.surgery FOLDER`.

Random groups lose random channels, several times for each model, and the outputs of the model without them are compared
with those of the whole model in which they are multiplied by zero. Ends with 1 where they differ by more than rounding.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import cases, show
from models.masking import answers, masked
from onnxcomp import model as models
from onnxcomp.channels import channel_groups
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Session
from onnxcomp.surgery import without

TOLERANCE = 1e-3


def main() -> None:
    """Compare on every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in cases(arguments.folder):
        model = models.load(arguments.folder / f"{case.name}.onnx")
        data = open_dataset(arguments.folder / case.calib, models.input_specs(model))
        groups = channel_groups(Simplify()(model, Context(data)).model, case.feeds(1))
        random = np.random.default_rng(arguments.seed)
        worst = 0.0
        for _ in range(arguments.draws):
            chosen = [groups[int(place)] for place in np.flatnonzero(random.random(len(groups)) < 0.5)]
            removed = {
                group: random.choice(group.size, random.integers(1, group.size), replace=False).tolist()
                for group in chosen
                if group.size > 1
            }
            wanted = answers(masked(groups, removed), case.feeds(1))
            for name, actual in Session(without(groups, removed)).run(case.feeds(1)).items():
                scale = max(float(np.abs(wanted[name]).max()), 1e-3)
                worst = max(worst, float(np.abs(np.asarray(actual, np.float64) - wanted[name]).max()) / scale)
        rows.append(
            {
                "model": case.name,
                "groups": len(groups),
                "frozen": len(groups.frozen),
                "largest difference": f"{worst:.1e}",
            }
        )
    show("surgery against masking", rows)
    sys.exit(any(float(row["largest difference"]) > TOLERANCE for row in rows))


if __name__ == "__main__":
    main()
