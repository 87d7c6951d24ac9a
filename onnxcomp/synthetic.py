"""Made-up inputs for a model that comes without data: right in form, arbitrary in content."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcomp.model import TensorSpec
from onnxcomp.samples import Batch, Dataset, checked_sample

_IMAGE_SIDE = 64
"""Pixels on an axis of unknown length of an image: enough to be halved five times."""

_LENGTH = 16
"""Elements on any other axis of unknown length."""

_UNKNOWN_INTEGERS = 2
"""Integers of unknown meaning are below this, so that they index any axis that is not trivial."""


def synthetic(
    specs: Sequence[TensorSpec], samples: int = 32, seed: int = 0, vocabulary: Mapping[str, int] | None = None
) -> Dataset:
    """Samples that the model accepts, the same for the same seed.

    Axes of unknown length get one length per name: 1 for a leading axis, 64 for the later ones of an input with 4 or
    more axes, as those are images or volumes, and 16 otherwise. Inputs of unknown rank get one axis.

    Values: floats are standard normal, booleans fair coins, strings a few words. Integers are below their vocabulary
    where it is known; else pixels in uint8 images, 1 in scalars, and 0 or 1 elsewhere. By name, masks are all ones,
    token types and segments zeros, and positions count up.

    Args:
        specs: the model's inputs.
        samples: number of samples.
        seed: of the random generator; the i-th sample depends on the seed and i alone.
        vocabulary: exclusive upper bounds of integer inputs by name, such as the rows of the table they index.
    """
    specs, bounds = tuple(specs), dict(vocabulary or {})
    shapes = _shapes(specs)

    def read(index: int) -> Batch:
        random = np.random.default_rng([seed, index])
        raw = {spec.name: _values(random, spec, shapes[spec.name], bounds.get(spec.name)) for spec in specs}
        return checked_sample(raw, {}, specs, f"synthetic sample {index}")

    leading = {axis for spec in specs for axis in (spec.shape or ())[:1]}
    later = {axis for spec in specs for axis in (spec.shape or ())[1:] if isinstance(axis, str)}
    stackable = len(leading) == 1 and not leading & later
    return Dataset(specs, samples, read, stackable=stackable, origin="synthetic data")


def _shapes(specs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """A shape for each input in which the same name of an axis has the same length everywhere."""
    lengths: dict[str, int] = {}

    def length(spec: TensorSpec, axis: int) -> int:
        shape = spec.shape or ()
        size = shape[axis]
        if isinstance(size, int):
            return size
        default = 1 if axis == 0 else _IMAGE_SIDE if len(shape) >= 4 else _LENGTH
        return default if size is None else lengths.setdefault(size, default)

    return {
        spec.name: (1,) if spec.shape is None else tuple(length(spec, axis) for axis in range(len(spec.shape)))
        for spec in specs
    }


def _values(random: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...], bound: int | None) -> NDArray[Any]:
    name, dtype = spec.name.lower(), spec.dtype
    if dtype.hasobject:
        return random.choice(np.array(["a", "few", "plain", "words"], object), shape)
    if "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(bool)
    if dtype.kind == "c":
        return (random.standard_normal(shape) + 1j * random.standard_normal(shape)).astype(dtype)
    if dtype.name.startswith(("int", "uint")):  # also those of ml_dtypes, whose kind is `V`
        if "token_type" in name or "segment" in name:
            return np.zeros(shape, dtype)
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        if not shape and bound is None:  # a count, length or step: zero can divide, and kill ONNX Runtime's process
            return np.ones(shape, dtype)
        pixels = dtype == np.uint8 and len(shape) >= 4
        return random.integers(0, bound or (256 if pixels else _UNKNOWN_INTEGERS), shape).astype(dtype)
    values = random.standard_normal(shape)
    if np.isnan(np.float32(-1).astype(dtype).astype(np.float32)):  # float8e8m0 has no sign
        values = np.abs(values)
    return values.astype(dtype)
