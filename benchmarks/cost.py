"""What the tool itself costs: `python -m benchmarks.cost FOLDER`.

Time of a whole `onnxcomp quantize` process against N fp32 forward passes, and its peak memory for few and many samples.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.common import scratch, show
from onnxcomp.runtime import Session, Target

STEPS = {
    "range methods alone": ("--no-gptq", "--no-polish", "--no-bias-correction", "--no-equalize", "--no-smooth"),
    "with Gram-based steps": (),
}
"""Switches of `onnxcomp quantize`."""


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    arguments = parser.parse_args()
    with scratch() as folder:
        _time(arguments.folder, folder)
        _memory(arguments.folder, folder)


def _time(source: Path, folder: Path) -> None:
    images = np.load(source / "cifar10_calib.npz")["input"]
    rows = []
    for name in ("cifar_resnet20", "cifar_resnet56"):
        passes = min(_forward(source / f"{name}.onnx", images) for _ in range(3))
        for what, switches in STEPS.items():
            seconds = min(
                _quantize(source / f"{name}.onnx", source / "cifar10_calib.npz", folder, switches)[0] for _ in range(3)
            )
            rows.append(
                {
                    "model": name,
                    "samples": len(images),
                    "steps": what,
                    "forward passes, s": round(passes, 2),
                    "whole process, s": round(seconds, 2),
                    "limit 1.5 passes + 3 s": round(1.5 * passes + 3, 2) if switches else "60 (ResNet-56)",
                }
            )
    show("Time of static quantization", rows)


def _memory(source: Path, folder: Path) -> None:
    images = np.load(source / "cifar10_calib.npz")["input"]
    rows = []
    for name in ("cifar_resnet20", "cifar_resnet56"):
        for samples in (128, 1024, 4096):
            calib = folder / f"calib{samples}.npz"
            np.savez(calib, input=np.resize(images, (samples, *images.shape[1:])))
            for what, switches in STEPS.items():
                runs = [_quantize(source / f"{name}.onnx", calib, folder, switches)[1] for _ in range(3)]
                peak = statistics.median(runs)
                rows.append({"model": name, "samples": samples, "steps": what, "peak memory, MB": round(peak / 1e6)})
    show("Peak memory of static quantization", rows)


def _forward(model: Path, images: np.ndarray) -> float:
    session = Session(model, Target())
    session.run({"input": images[:64]})
    start = time.perf_counter()
    for first in range(0, len(images), 64):
        session.run({"input": images[first : first + 64]})
    return time.perf_counter() - start


def _quantize(model: Path, calib: Path, folder: Path, switches: tuple[str, ...]) -> tuple[float, int]:
    """Seconds and peak bytes of one process."""
    run_and_tell = (
        "import resource, sys\nfrom onnxcomp.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\nsys.exit(code)"
    )
    options = ["--scheme", "int8", "--calib", str(calib), "-o", str(folder / "out.onnx"), "--overwrite", "-q"]
    command = [sys.executable, "-c", run_and_tell, "quantize", str(model), *options, *switches]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak = next(line for line in done.stdout.splitlines() if line.startswith("PEAK"))
    return seconds, int(peak.split()[1]) * 1024


if __name__ == "__main__":
    main()
