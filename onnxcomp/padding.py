"""Finds what is padding in data: positions that an input masks, and on which nothing depends that the model says.

Sequences in a file are as long as the longest of them. Of 512 sentences of STS-B that a MiniLM learns from, 68% of the
positions are such padding: they would be most of what statistics are made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import OnnxcompError
from onnxcomp.model import TensorSpec
from onnxcomp.runtime import Session
from onnxcomp.samples import Dataset, Padding

_TRIED = 8
"""Entries with the most padding, on which it is tried whether anything depends on it."""
_SAME = 1e-6
"""Relative squared error of outputs that kernels may have which work on other lengths."""


def noted(data: Dataset, original: Callable[[], Session]) -> Dataset:
    """The same data, with what is padding in them, if anything is.

    A mask is an input of ones and zeros alone, along an axis that the model leaves open. What it masks is padding if
    the model gives the same without it.

    Args:
        data: for the model.
        original: gives the model, loaded, where something is masked.
    """
    for spec in data.specs:
        axes = _along(data.specs, spec)
        spans = _spans(data, spec.name, axes) if axes else None
        if spans and (padding := _tried(data, original, Padding(spec.name, axes, (), spans))):
            return replace(data, padding=padding)
    return data


def notes_on(*given: Dataset | None, learns: bool = True) -> list[str]:
    """What a user should know of the padding in some data, of which something is left out."""
    known = (data.padding for data in given if data is not None and data.padding is not None)
    padding = next(known, None)
    what = " and ".join(["learnt"] * learns + ["compared"] * bool(padding and padding.outputs))
    if padding is None or not what:
        return []
    share = f"{padding.share:.0%} of the positions, which '{padding.mask}' masks"
    return [f"Padding is left out of what is {what}: {share}, and without which the model gives the same."]


def _along(specs: Sequence[TensorSpec], mask: TensorSpec) -> tuple[tuple[str, int], ...]:
    """The axes of inputs, samples aside, that are as long as the last one of what may be a mask."""
    if mask.shape is None or len(mask.shape) < 2 or isinstance(mask.shape[-1], int) or mask.dtype.kind not in "biuf":
        return ()
    return tuple(
        (spec.name, axis)
        for spec in specs
        for axis, length in enumerate(spec.shape or ())
        if axis and length == mask.shape[-1]
    )


def _spans(data: Dataset, mask: str, axes: Sequence[tuple[str, int]]) -> tuple[tuple[int, int, int], ...] | None:
    """What each entry has between padding on both sides; None where it is no mask, or masks nothing."""
    found, padded = [], False
    for entry in data:
        array = entry.feeds[mask]
        length = array.shape[-1]
        if not np.isin(array, (0, 1)).all() or any(entry.feeds[name].shape[axis] != length for name, axis in axes):
            return None
        counts = np.flatnonzero(array.any(axis=tuple(range(array.ndim - 1))))
        found.append((int(counts[0]), int(counts[-1]) + 1, length) if len(counts) else (0, length, length))
        padded |= found[-1] != (0, length, length)
    return tuple(found) if padded else None


def _tried(data: Dataset, original: Callable[[], Session], padding: Padding) -> Padding | None:
    """The same with the axes of outputs, if by the shortest entries the model gives the same without it."""
    order = np.argsort([stop - start for start, stop, _ in padding.spans], kind="stable")[:_TRIED]
    outputs: set[tuple[str, int]] = set()
    try:
        session = original()
        for entry in order.tolist():
            feeds = data.read(entry).feeds
            whole, cut = session.run(feeds), session.run(padding.cut(feeds, entry))
            for name, array in whole.items():
                axes = _shorter(array, cut[name], *padding.spans[entry])
                if axes is None:
                    return None
                outputs |= {(name, axis) for axis in axes}
    except OnnxcompError:  # it wants that length, or more than is left
        return None
    return replace(padding, outputs=tuple(sorted(outputs)))


def _shorter(whole: Any, cut: Any, start: int, stop: int, length: int) -> list[int] | None:
    """The axes along which an output is shorter for some of its positions alone; None where that is not the same."""
    if not isinstance(whole, np.ndarray) or not isinstance(cut, np.ndarray) or whole.ndim != cut.ndim:
        return None
    sizes = [*zip(whole.shape, cut.shape, strict=True)]
    axes = [axis for axis, both in enumerate(sizes) if axis and both[0] != both[1] and both == (length, stop - start)]
    for axis in axes:
        whole = whole.take(range(start, stop), axis)
    if whole.shape != cut.shape or whole.dtype.kind != "f":
        return axes if np.array_equal(whole, cut) else None
    return axes if _error(whole, cut) <= _SAME else None


def _error(whole: NDArray[Any], cut: NDArray[Any]) -> float:
    """Relative and squared; NaN or infinite where either is."""
    expected = whole.astype(np.float64)
    with np.errstate(all="ignore"):
        noise, energy = np.square(expected - cut).sum(), np.square(expected).sum()
        return float(noise / energy) if noise else 0.0
