"""Shared, ternary, sparse and low-rank weights beside the original: `python -m benchmarks.weights FOLDER`.

No labels and no fine-tuning: calibration samples alone. Each technique runs as its pass does by itself, and again
without data, where it is what it is in the textbooks: k-means on single weights, thresholds for ternary ones, the
smallest magnitudes gone.
"""

import argparse
import time
from pathlib import Path

import onnx

from benchmarks.common import cases, scratch, show, table
from onnxcomp import model as models
from onnxcomp.core import Context, Pass
from onnxcomp.data import open_dataset
from onnxcomp.package import pack
from onnxcomp.passes.binarize import Binarize
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.factorize import Method as Form
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.share import Method, Share
from onnxcomp.passes.simplify import Simplify
from onnxcomp.passes.sparsify import Choose, Sparsify
from onnxcomp.widths import Cost

TECHNIQUES: dict[str, dict[str, Pass]] = {
    "share": {f"{bits} bits": Share(bits) for bits in (4, 3, 2)},
    "vectors": {f"vectors, {bits} bits": Share(bits, Method.PRODUCT) for bits in (3, 2, 1)},
    "hash": {f"hash, {bits} bits": Share(bits, Method.HASH) for bits in (8, 4)},
    "binary": {"ternary": Binarize(ternary=True), "2 bases of signs": Binarize(bases=2), "signs": Binarize()},
    "sparse": {"50% zero": Sparsify(0.5), "2:4": Sparsify(0.5, 4), "75% zero": Sparsify(0.75)},
    "minilm": {"75% of the parameters of its products": Factorize(0.883)},  # embeddings are half of all
    "lowrank": {
        "70% of the parameters": Factorize(0.7),
        "70%, SVD alone": Factorize(0.7, method=Form.SVD),
        "50% of the parameters": Factorize(0.5),
    },
}

PLAIN: dict[str, Pass] = {
    "ternary": Binarize(ternary=True),
    "50% zero": Sparsify(0.5, choose=Choose.MAGNITUDE, reconstruct=False),
    "2:4": Sparsify(0.5, 4, choose=Choose.MAGNITUDE, reconstruct=False),
    **{name: technique for kind in ("share", "vectors") for name, technique in TECHNIQUES[kind].items()},
}
"""What is also shown without data."""


def main() -> None:
    """Make every version of a model and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the models and their data")
    parser.add_argument("--only", default="cifar_resnet20", help="name of one model")
    usual = [name for name in TECHNIQUES if name != "minilm"]
    parser.add_argument("--what", nargs="*", default=usual, help=f"of {', '.join(TECHNIQUES)}")
    parser.add_argument("--package", type=float, help="also prune to this share of the parameters, share 2 bits, pack")
    arguments = parser.parse_args()
    (case,) = (case for case in cases(arguments.folder) if case.name == arguments.only)
    original = arguments.folder / f"{case.name}.onnx"
    model = models.load(original)
    data = open_dataset(arguments.folder / case.calib, models.input_specs(model))
    clean = Simplify()(model, Context(data)).model
    versions, notes = {"fp32": original}, []
    with scratch() as folder:
        for name, technique in ((n, t) for what in arguments.what for n, t in TECHNIQUES[what].items()):
            for kind, context in {"": Context(data), ", plain": Context()}.items():
                if kind and name not in PLAIN:
                    continue
                start = time.perf_counter()
                made = (PLAIN[name] if kind else technique)(clean, context).model
                versions[name + kind] = folder / f"{len(versions)}.onnx"
                models.save(made, versions[name + kind])
                structure = versions[name + kind].stat().st_size - stored(versions[name + kind])
                notes.append(f"{name}{kind}: {time.perf_counter() - start:.0f} s, {structure} bytes are not constants")
        if arguments.package:
            start = time.perf_counter()
            pruned = Prune(arguments.package, Cost.PARAMS)(clean, Context(data)).model
            made = Share(2)(pruned, Context(data)).model
            for name, version in {"pruned": pruned, "pruned, 2 bits": made}.items():
                versions[name] = folder / f"{len(versions)}.onnx"
                models.save(version, versions[name])
            packed = pack(versions["pruned, 2 bits"], folder / "packed")
            ratio = original.stat().st_size / packed.size
            seconds = time.perf_counter() - start
            notes.append(
                f"pruned, 2 bits, packed: {packed.size} bytes, {ratio:.1f}x smaller than fp32, {seconds:.0f} s"
            )
        show(case.name, table(case, versions))
    print("", *notes, sep="\n")


def stored(path: Path) -> int:
    """Bytes of a file's constants."""
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)


if __name__ == "__main__":
    main()
