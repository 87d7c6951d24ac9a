"""Data without writing code: what a path or a Python object holds, as a dataset that fits the model."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcomp.errors import DataError
from onnxcomp.images import IMAGE_SUFFIXES, ImageOptions, image_reader
from onnxcomp.model import TensorSpec
from onnxcomp.npz import Column, Scratch, load_npy, load_npz, npy_column, npz_columns, reading, write_npz
from onnxcomp.samples import Batch, Dataset, Feeds, checked_sample, common_rows, strings
from onnxcomp.synthetic import synthetic

__all__ = [
    "Batch",
    "Dataset",
    "Feeds",
    "ImageOptions",
    "Split",
    "divisible",
    "open_dataset",
    "split",
    "synthetic",
]

SMALLEST_SPLIT = 100
"""Fewer samples than this are too few to tune, judge and score on different ones."""

_ACCEPTED = "give an .npz, a folder of .npz or .npy, a folder of images, or test_data_set_* folders"


def open_dataset(source: Any, specs: Sequence[TensorSpec], images: ImageOptions | None = None) -> Dataset:
    """Read samples from a path or a Python object, checked against the model's inputs.

    Paths:
        - `.npz`, keys named like the inputs, all with one leading sample axis. Other keys are targets if their first
          axis has that length, else `Dataset.constants`. An array with as many axes as the input holds rows, which
          are batched; one with an axis more holds whole runs. A single `.npy` will do for a model of one input.
        - a folder of `.npz` or `.npy`, one sample each, with or without the batch axis. Lengths may differ.
        - a folder of images. Class folders give an int64 target `label`, their place when sorted by name.
        - `test_data_set_*` folders of ONNX, or one of them: `input_N.pb`, with `output_N.pb` as targets.

    From Python:
        - a mapping of arrays, read like an `.npz`.
        - an iterable of feeds, each a run as the model takes it, or a `CalibrationDataReader` of ONNX Runtime
          (`get_next`, and `rewind` if there is one). As these may be consumable only once, the items are copied to a
          temporary folder, which goes when the dataset does. The last one may fall short of a fixed batch.
        - a `Dataset`, returned as it is.

    An `.npz` stored uncompressed is read in place, row by row. A compressed one cannot be read in slices: it is
    decompressed once into a temporary folder (`TMPDIR` says where).

    Args:
        source: one of the above.
        specs: the model's inputs.
        images: how images become arrays; None guesses from the input.

    Raises:
        DataError: the source cannot be read, is empty, or does not fit the inputs. Every sample is checked when it is
            read, the first one already here. NaN and infinity are refused in inputs, not in targets.
        OptionError: the image options do not fit the input.
    """
    specs = tuple(specs)
    if isinstance(source, Dataset):
        return source
    if not specs:
        raise DataError("the model takes no inputs, so no data fit it", remedy="leave the data out")
    if isinstance(source, str | os.PathLike):
        dataset = _from_path(Path(source), specs, images or ImageOptions())
    elif isinstance(source, Mapping):
        columns = {name: np.asarray(array) for name, array in source.items()}
        dataset = _from_columns(columns, specs, "the mapping")
    elif hasattr(source, "get_next"):
        if hasattr(source, "rewind"):
            source.rewind()
        dataset = _from_runs(iter(source.get_next, None), specs)
    elif isinstance(source, Iterable):
        dataset = _from_runs(source, specs)
    else:
        raise DataError(
            f"{type(source).__name__} is not a source of data",
            remedy="give a path, a mapping of arrays, an iterable of feeds or a CalibrationDataReader",
        )
    if not dataset.size:
        raise DataError(f"{dataset.origin} holds no samples", remedy=_ACCEPTED)
    dataset.read(0)
    return dataset


@dataclass(frozen=True)
class Split:
    """Three views on one dataset: what passes see, what the search sees, what is scored once at the end."""

    tune: Dataset
    judge: Dataset
    final: Dataset

    @property
    def shared(self) -> bool:
        """Whether there were too few samples to split, so that all three are the same."""
        return self.tune is self.final


def split(dataset: Dataset, seed: int = 0) -> Split:
    """Deal the samples out at random: half to tune, a quarter each to judge and final.

    Fewer than `SMALLEST_SPLIT` samples are not split: all three are the dataset itself. Runs that a source gave whole
    are dealt out whole.
    """
    if not divisible(dataset, 4):
        return Split(dataset, dataset, dataset)
    order = np.random.default_rng(seed).permutation(dataset.size).tolist()
    half, three_quarters = len(order) // 2, len(order) * 3 // 4
    parts = order[:half], order[half:three_quarters], order[three_quarters:]
    return Split(*map(dataset.select, parts))


def divisible(dataset: Dataset, parts: int) -> bool:
    """Whether there are samples enough to split, and entries enough for that many parts."""
    return dataset.samples >= SMALLEST_SPLIT and dataset.size >= parts


def _from_path(path: Path, specs: tuple[TensorSpec, ...], images: ImageOptions) -> Dataset:
    if not path.exists():
        raise DataError(f"there is no {path}", remedy=_ACCEPTED)
    if path.is_file() and path.suffix == ".npz":
        return _from_columns(npz_columns(path), specs, str(path))
    if path.is_file() and path.suffix == ".npy":
        name = _only_input(specs, path)
        with reading(path):
            return _from_columns({name: npy_column(path)}, specs, str(path))
    if not path.is_dir():
        raise DataError(f"{path} is not in a format that can be read", remedy=_ACCEPTED)
    with reading(path):
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    sets = [entry for entry in entries if entry.is_dir() and entry.name.startswith("test_data_set_")]
    if sets or any(path.glob("input_*.pb")):
        return _from_test_data(sets or [path], specs, path)
    if files := [entry for entry in entries if entry.suffix in (".npz", ".npy")]:
        return _from_files(files, specs, path)
    return _from_images(entries, specs, path, images)


def _from_columns(columns: Mapping[str, Column], specs: tuple[TensorSpec, ...], origin: str) -> Dataset:
    """Samples along the first axis of arrays. An input whose array has an axis more than the model's has whole runs."""
    inputs = {spec.name: columns[spec.name].shape for spec in specs if spec.name in columns}
    counts = {shape[:1] for shape in inputs.values()}
    if len(counts) > 1 or () in counts:
        raise DataError(
            f"the inputs in {origin} differ in their number of samples: "
            + ", ".join(f"{name!r} has shape {list(shape)}" for name, shape in inputs.items()),
            "an array without the leading sample axis",
            "give every input the same leading sample axis",
        )
    # Without a single input, take any array's length and let the first sample say what is missing.
    lengths = [*counts, *(column.shape[:1] for column in columns.values() if column.shape), (1,)]
    size = lengths[0][0]
    whole = {spec.name for spec in specs if spec.shape is not None and len(inputs.get(spec.name, ())) > len(spec.shape)}
    along = [name for name, column in columns.items() if column.shape[:1] == (size,)]

    def read(index: int) -> Batch:
        rows = {name: columns[name][index : index + 1] for name in along}
        raw = {name: array[0] if name in whole else array for name, array in rows.items()}
        targets = {name: array for name, array in rows.items() if name not in inputs}
        sample = checked_sample(raw, targets, specs, f"sample {index} of {origin}", pads=not whole)
        return replace(sample, valid=1)

    constants = {name: np.asarray(column) for name, column in columns.items() if name not in along}
    return Dataset(specs, size, read, stackable=not whole, constants=constants, origin=origin)


def _from_files(files: list[Path], specs: tuple[TensorSpec, ...], folder: Path) -> Dataset:
    """One sample per file, with or without the batch axis."""

    def read(index: int) -> Batch:
        path = files[index]
        arrays = {_only_input(specs, path): load_npy(path)} if path.suffix == ".npy" else load_npz(path)
        raw, targets = _part(arrays, specs)
        ranks = {spec.name: len(spec.shape) for spec in specs if spec.shape is not None}
        bare = {name for name, array in raw.items() if array.ndim + 1 == ranks.get(name)}
        raw = {name: array[None] if name in bare else array for name, array in raw.items()}
        targets = {name: array[None] if bare else np.atleast_1d(array) for name, array in targets.items()}
        return checked_sample({**targets, **raw}, targets, specs, str(path), pads=True)

    return Dataset(specs, len(files), read, origin=str(folder))


def _from_runs(items: Iterable[Mapping[str, Any]], specs: tuple[TensorSpec, ...]) -> Dataset:
    """Runs that may come only once, copied to disk."""
    scratch = Scratch()
    rows: list[int] = []
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(
                f"item {number} of the iterable is {type(item).__name__}, not a mapping of arrays",
                remedy=f"yield dictionaries like {{{specs[0].name!r}: array}}",
            )
        arrays = {name: np.asarray(array) for name, array in item.items()}
        for name, array in arrays.items():
            if array.dtype.hasobject:
                text = strings(array)
                if text is None:
                    raise DataError(
                        f"{name!r} in item {number} of the iterable holds Python objects", remedy="give plain arrays"
                    )
                arrays[name] = text.astype(np.str_)
        write_npz(scratch.path / f"{number}.npz", arrays)
        rows.append(common_rows(_part(arrays, specs)[0]) or 1)

    def read(index: int) -> Batch:
        arrays = load_npz(scratch.path / f"{index}.npz")
        raw, targets = _part(arrays, specs)
        whole = {**targets, **raw}
        return checked_sample(whole, targets, specs, f"item {index} of the iterable", pads=index == len(rows) - 1)

    return Dataset(specs, len(rows), read, tuple(rows), stackable=False, origin="the iterable")


def _from_test_data(folders: list[Path], specs: tuple[TensorSpec, ...], origin: Path) -> Dataset:
    """ONNX's own test data: TensorProtos that belong to an input or output by position, or by their name if it fits."""
    names = [spec.name for spec in specs]

    def tensors(folder: Path, kind: str) -> Iterator[tuple[int, str, Any]]:
        for path in sorted(folder.glob(f"{kind}_*.pb")):
            with reading(path):
                tensor = onnx.TensorProto.FromString(path.read_bytes())
                yield int(path.stem.removeprefix(f"{kind}_")), tensor.name, onnx.numpy_helper.to_array(tensor)

    def read(index: int) -> Batch:
        folder, raw = folders[index], {}
        for position, name, array in tensors(folder, "input"):
            raw[names[position] if name not in names and position < len(names) else name] = array
        targets = {name or f"output_{position}": array for position, name, array in tensors(folder, "output")}
        return checked_sample(raw, targets, specs, str(folder))

    return Dataset(specs, len(folders), read, stackable=False, origin=str(origin))


def _from_images(entries: list[Path], specs: tuple[TensorSpec, ...], folder: Path, options: ImageOptions) -> Dataset:
    """Images of a folder, or of its subfolders as classes."""

    def images(paths: Iterable[Path]) -> list[Path]:
        return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")

    loose = images(entries)
    classes = [entry for entry in entries if entry.is_dir()]
    labelled = [(path, label) for label, entry in enumerate(classes) for path in images(entry.rglob("*"))]
    if loose and labelled:
        raise DataError(
            f"{folder} holds images both loose and in subfolders, {loose[0].name} and {labelled[0][0].name}",
            remedy="move the loose images into class folders, or give a folder of one kind",
        )
    files = [path for path, _ in labelled] or loose
    if not files:
        raise DataError(f"{folder} holds no samples", remedy=_ACCEPTED)
    name = _only_input(specs, folder)
    load = image_reader(specs[0], options)

    def read(index: int) -> Batch:
        with reading(files[index]):
            image = load(files[index])
        targets = {"label": np.array([labelled[index][1]], np.int64)} if labelled else {}
        return checked_sample({name: image[None]}, targets, specs, str(files[index]), pads=True)

    return Dataset(specs, len(files), read, origin=str(folder))


def _part(arrays: Feeds, specs: Sequence[TensorSpec]) -> tuple[Feeds, Feeds]:
    """The model's inputs, and the rest."""
    names = {spec.name for spec in specs}
    raw = {name: array for name, array in arrays.items() if name in names}
    return raw, {name: array for name, array in arrays.items() if name not in names}


def _only_input(specs: Sequence[TensorSpec], source: Path) -> str:
    """The input's name for files that hold one unnamed array."""
    if len(specs) != 1:
        raise DataError(
            f"{source} gives one array per sample, the model takes {len(specs)} inputs",
            remedy="use .npz with the keys " + ", ".join(repr(spec.name) for spec in specs),
        )
    return specs[0].name
