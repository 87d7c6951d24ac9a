"""Affine quantization as ONNX defines it: q = saturate(round(x / scale) + zero_point), x' = (q - zero_point) * scale.

Scales and zero points broadcast against the values by NumPy's rules: () per tensor, (out, 1) per row of a matrix,
`spread_blocks` of (out, blocks) for blocks along the input axis.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcomp.errors import DataError, OptionError
from onnxcomp.numerics.arrays import Floats, Ints

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # denormal scales are flushed to zero by some kernels
_LARGEST_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class IntGrid:
    """The integers that a tensor may take.

    Attributes:
        bits: 2 to 16; 7 is the reduced range that cannot saturate 16-bit sums of uint8 * int8 pairs.
        signed: int8 and its kin rather than uint8.
        symmetric: the zero point is the middle of the grid.

    Raises:
        OptionError: bits out of range.
    """

    bits: int
    signed: bool
    symmetric: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise OptionError(f"cannot quantize to {self.bits} bits", remedy="choose 2 to 16 bits")

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        # ARM kernels add pairs of int8 products in 16 bits, where (-128)^2 twice overflows: 8 bits end at -127.
        narrow = self.symmetric and self.signed and self.bits == 8
        return (-(1 << self.bits - 1) if self.signed else 0) + narrow

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 0 if self.signed else 1 << self.bits - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's narrowest type that holds the grid (int8 or uint8 below 8 bits too)."""
        return np.dtype(f"{'int' if self.signed else 'uint'}{8 if self.bits <= 8 else 16}")

    def __str__(self) -> str:
        return str(self.dtype) if self.bits in (8, 16) else f"{self.bits}-bit {self.dtype}"


class AffineParameters(NamedTuple):
    """Scale (float32, positive, finite, not denormal) and zero point (the grid's dtype) of the same shape."""

    scale: NDArray[np.float32]
    zero_point: Ints


def parameters_from_range(low: ArrayLike, high: ArrayLike, grid: IntGrid) -> AffineParameters:
    """The parameters whose grid covers [low, high] and holds zero exactly.

    Args:
        low: smallest values to represent, any shape; raised to zero at most.
        high: largest values to represent, same shape; lowered to zero at least.
        grid: the integers to use. A symmetric grid covers [-m, m] with m = max(-low, high).

    Raises:
        DataError: a bound is NaN or infinite.
    """
    bottom = np.minimum(np.asarray(low, np.float64), 0.0)
    top = np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.isfinite(bottom).all() and np.isfinite(top).all()):
        raise DataError("a range to quantize is not finite", "NaN or infinity in weights or activations")
    if grid.symmetric:
        scale = np.maximum(-bottom, top) / (grid.qmax - grid.middle)
    else:
        scale = (top - bottom) / (grid.qmax - grid.qmin)
    # A range of nothing but zero takes any scale; 1 is the one that reads best.
    scale = np.where(scale == 0, 1.0, np.clip(scale, _SMALLEST_SCALE, _LARGEST_SCALE))
    if grid.symmetric:
        zero_point = np.full(scale.shape, grid.middle)
    else:
        zero_point = np.clip(np.rint(grid.qmin - bottom / scale), grid.qmin, grid.qmax)
    return AffineParameters(scale.astype(np.float32), zero_point.astype(grid.dtype))


def quantize(values: Floats, scale: Floats, zero_point: ArrayLike, grid: IntGrid) -> Ints:
    """ONNX QuantizeLinear: round half to even, then saturate.

    Args:
        values: any shape, without NaN.
        scale: broadcastable to values.
        zero_point: broadcastable to values.
        grid: the integers to saturate to.

    Returns:
        Integers of the values' shape and the grid's dtype.
    """
    return _steps(values, scale, np.asarray(zero_point, values.dtype), grid).astype(grid.dtype)


def dequantize(integers: Ints, scale: Floats, zero_point: ArrayLike) -> Floats:
    """ONNX DequantizeLinear: (q - zero_point) * scale, in the scale's dtype."""
    centred = integers.astype(np.int32) - np.asarray(zero_point, np.int32)
    result: Floats = centred.astype(scale.dtype) * scale
    return result


def fake_quantize(values: Floats, scale: Floats, zero_point: ArrayLike, grid: IntGrid) -> Floats:
    """Quantize and dequantize, in the precision of values and scale together."""
    zero = np.asarray(zero_point, values.dtype)
    result = _steps(values, scale, zero, grid)
    result -= zero
    result *= scale
    return result


def spread_blocks(parameters: NDArray[Any], block: int, width: int) -> NDArray[Any]:
    """Repeats (out, blocks) scales or zero points along the input axis to (out, width); the last block may be cut."""
    return np.repeat(parameters, block, axis=1)[:, :width]


def _steps(values: Floats, scale: Floats, zero_point: Floats, grid: IntGrid) -> Floats:
    with np.errstate(over="ignore"):  # a quotient past float32 saturates like any other
        steps: Floats = np.asarray(values / scale)
    np.rint(steps, out=steps)
    steps += zero_point
    return np.clip(steps, grid.qmin, grid.qmax, out=steps)
