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
        if spans and _gives_the_same(data, original, padding := Padding(spec.name, axes, spans)):
            return replace(data, padding=padding)
    return data


def notes_on(*given: Dataset | None) -> list[str]:
    """What a user should know of the padding in some data."""
    known = (data.padding for data in given if data is not None and data.padding is not None)
    return [
        f"Padding is left out of what is learnt and compared: {padding.share:.0%} of the positions, which "
        f"'{padding.mask}' masks, and without which the model gives the same."
        for padding in list(known)[:1]
    ]


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


def _gives_the_same(data: Dataset, original: Callable[[], Session], padding: Padding) -> bool:
    """Whether the model gives the same without it, by the shortest entries."""
    order = np.argsort([stop - start for start, stop, _ in padding.spans], kind="stable")[:_TRIED]
    try:
        session = original()
        for entry in order.tolist():
            feeds = data.read(entry).feeds
            whole, cut = session.run(feeds), session.run(padding.cut(feeds, entry))
            if not all(_alike(array, cut[name], *padding.spans[entry]) for name, array in whole.items()):
                return False
    except OnnxcompError:  # it wants that length, or more than is left
        return False
    return True


def _alike(whole: Any, cut: Any, start: int, stop: int, length: int) -> bool:
    """Whether an output is the same, or the part of it that belongs to some of its positions."""
    if not isinstance(whole, np.ndarray) or not isinstance(cut, np.ndarray) or whole.ndim != cut.ndim:
        return False
    for axis, sizes in enumerate(zip(whole.shape, cut.shape, strict=True)):
        if sizes == (length, stop - start):
            whole = whole.take(range(start, stop), axis)
    if whole.shape != cut.shape or whole.dtype.kind != "f":
        return bool(np.array_equal(whole, cut))
    return _error(whole, cut) <= _SAME


def _error(whole: NDArray[Any], cut: NDArray[Any]) -> float:
    """Relative and squared; NaN or infinite where either is."""
    expected = whole.astype(np.float64)
    with np.errstate(all="ignore"):
        noise, energy = np.square(expected - cut).sum(), np.square(expected).sum()
        return float(noise / energy) if noise else 0.0
