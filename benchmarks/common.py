"""What the benchmarks share: the real models and their data, peers, and printing."""

import contextlib
import io
import logging
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcomp.model import load
from onnxcomp.runtime import Protocol, Session, Target
from onnxcomp.stopwatch import time_apart

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        name: of the model file, without suffix.
        calib: calibration file.
        evaluate: the figure of merit, higher is better, from `predict`.
        unit: what that figure is.
        feeds: one input by batch size.
        batches: the batch sizes that are timed.
        optimize: options for `onnxcomp.optimize`.
    """

    name: str
    calib: str
    evaluate: Callable[[Callable[[Feeds], Mapping[str, NDArray[Any]]]], float]
    unit: str
    feeds: Callable[[int], Feeds]
    batches: tuple[int, ...]
    optimize: Mapping[str, Any]


def cases(folder: Path) -> Iterator[Case]:
    """The benchmark models that lie in a folder."""
    for name in ("cifar_resnet20", "cifar_resnet56"):
        if (folder / f"{name}.onnx").exists():
            yield _cifar(folder, name)
    if (folder / "minilm.onnx").exists():
        yield _sentences(folder)
    if (folder / "ultraface_rfb320.onnx").exists():
        yield _faces(folder)


def _cifar(folder: Path, name: str) -> Case:
    data = np.load(folder / "cifar10_eval.npz")
    images, labels = data["input"], data["label"]

    def accuracy(predict: Callable[[Feeds], Mapping[str, NDArray[Any]]]) -> float:
        hits = [
            (predict({"input": images[i : i + 50]})["logits"].argmax(1) == labels[i : i + 50]).sum()
            for i in range(0, len(images), 50)
        ]
        return float(sum(hits) / len(images))

    return Case(
        name, "cifar10_calib.npz", accuracy, "top-1", lambda batch: {"input": images[:batch]}, (1, 16),
        {"calib": folder / "cifar10_calib.npz", "evaluation": folder / "cifar10_eval.npz"},
    )  # fmt: skip


def _sentences(folder: Path) -> Case:
    sys.path.insert(0, str(folder))
    import stsb_metric  # type: ignore[import-not-found]

    data = np.load(folder / "stsb_calib.npz")
    ids, mask = data["input_ids"], data["attention_mask"]
    lengths = mask.sum(1)

    def feeds(batch: int) -> Feeds:
        if batch == 1:
            row = int(np.abs(lengths - np.median(lengths)).argmin())
            rows = slice(row, row + 1)
        else:
            rows = slice(0, batch)
        length = int(lengths[rows].max())
        return {"input_ids": ids[rows, :length], "attention_mask": mask[rows, :length]}

    return Case(
        "minilm", "stsb_calib.npz", stsb_metric.evaluate, "Spearman", feeds, (1, 16),
        {"calib": folder / "stsb_calib.npz", "metric": f"{folder / 'stsb_metric.py'}:evaluate"},
    )  # fmt: skip


def _faces(folder: Path) -> Case:
    photographs = np.load(folder / "faces_eval.npz")["input"]
    original = Session(str(folder / "ultraface_rfb320.onnx"))
    expected = [original.run({"input": photo[None]}) for photo in photographs]

    def same_faces(predict: Callable[[Feeds], Mapping[str, NDArray[Any]]]) -> float:
        """Share of all faces, in both models' answers, that the other model sees too."""
        pairs = [(want, predict({"input": photo[None]})) for want, photo in zip(expected, photographs, strict=True)]
        seen = [found for want, got in pairs for found in (*seen_too(want, got), *seen_too(got, want))]
        return float(np.mean(seen))

    return Case(
        "ultraface_rfb320", "faces_calib.npz", same_faces, "faces both see",
        lambda batch: {"input": photographs[:1]}, (1,),
        {"calib": folder / "faces_calib.npz", "evaluation": folder / "faces_eval.npz"},
    )  # fmt: skip


SEEN, UNSURE = 0.7, 0.5
"""A score above SEEN is a face; the other model must find it likelier than not, lest the threshold alone decides."""


def seen_too(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> list[bool]:
    """For each face that one model sees, whether the other gives a box there: IoU above 0.5 (PASCAL VOC)."""
    also = faces(other, UNSURE)
    return [any(intersection_over_union(box, match) > 0.5 for match in also) for box in faces(one, SEEN)]


def faces(outputs: Mapping[str, NDArray[Any]], threshold: float, overlap: float = 0.3) -> NDArray[np.float64]:
    """The detector's faces: boxes scored above the threshold, after greedy non-maximum suppression.

    Returns:
        (faces, 4): left, top, right, bottom in shares of the image.
    """
    scores, boxes = outputs["scores"][0, :, 1], outputs["boxes"][0]
    found = np.flatnonzero(scores > threshold)
    order = found[np.argsort(-scores[found], kind="stable")]
    kept: list[int] = []
    for index in order:
        if all(intersection_over_union(boxes[index], boxes[other]) <= overlap for other in kept):
            kept.append(int(index))
    return np.asarray(boxes[kept], np.float64)


def intersection_over_union(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of two boxes (left, top, right, bottom)."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(np.maximum(sides, 0)))
    total = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - common
    return common / total if total > 0 else 0.0


def peers(model: Path, case: Case, calib: Path, folder: Path) -> dict[str, Path]:
    """ONNX Runtime's own quantizers at their best published settings; those that fail or do not load are left out."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            data = np.load(calib)
            names = list(case.feeds(1))
            size = 64 if len(case.batches) > 1 else 1
            self._items = iter([{n: data[n][i : i + size] for n in names} for i in range(0, len(data[names[0]]), size)])

        def get_next(self) -> Any:
            return next(self._items, None)

    ready = folder / f"{case.name}.ready.onnx"
    static, dynamic = folder / f"{case.name}.ort_static.onnx", folder / f"{case.name}.ort_dynamic.onnx"
    logging.disable(logging.WARNING)
    made: dict[str, Path] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
        except Exception:  # noqa: BLE001 - a peer's failure is a result
            ready = model
        try:
            quantize_static(
                str(ready), str(static), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            made["ORT static (uint8/int8 per channel, min-max)"] = static
        except Exception as error:  # noqa: BLE001
            print(f"ORT static failed on {case.name}: {error}")
        try:
            quantize_dynamic(str(ready), str(dynamic), per_channel=True, weight_type=QuantType.QInt8)
            made["ORT dynamic (int8 per channel)"] = dynamic
        except Exception as error:  # noqa: BLE001
            print(f"ORT dynamic failed on {case.name}: {error}")
    return made


def table(
    case: Case, models: Mapping[str, Path], *, threads: int = 1, rounds: int = 11, cold: bool = False
) -> list[dict[str, Any]]:
    """Size, figure of merit and latency of several models, the first being the one to compare with."""
    target = Target("cpu", threads)
    loaded: dict[str, Session] = {}
    rows = []
    for name, path in models.items():
        try:
            loaded[name] = Session(path, target)
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result
            rows.append({"model": name, "error": str(error).splitlines()[0][:120]})
    timings = {
        batch: time_apart(
            [load(models[name]) for name in loaded],
            target,
            case.feeds(batch),
            Protocol(rounds=rounds, cold=cold, seconds=90),
        )
        for batch in case.batches
    }
    size = models[next(iter(models))].stat().st_size
    for index, name in enumerate(loaded):
        score = case.evaluate(Session(models[name], Target("cpu", 0)).run)
        row: dict[str, Any] = {
            "model": name,
            case.unit: round(score, 4),
            "bytes": models[name].stat().st_size,
            "of fp32": f"{models[name].stat().st_size / size:.1%}",
        }
        for batch, results in timings.items():
            timing = results[index]
            row[f"b{batch} ms"] = round(timing.median * 1e3, 3)
            row[f"b{batch} x"] = f"{timing.speedup:.2f} ({timing.speedup_low:.2f}-{timing.speedup_high:.2f})"
        rows.append(row)
    return rows


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n### {title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |", flush=True)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix="onnxcomp-benchmark-") as folder:
        yield Path(folder)
