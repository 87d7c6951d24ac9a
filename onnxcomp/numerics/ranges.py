"""Which range of values the integers should cover: of activations from a histogram, of weights from their matrix."""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcomp.errors import OptionError
from onnxcomp.numerics.affine import IntGrid, fake_quantize, parameters_from_range
from onnxcomp.numerics.arrays import Floats, Ints
from onnxcomp.numerics.histogram import Histogram

_Array: TypeAlias = NDArray[np.float64]

_DAMPING = 1e-2  # of the mean diagonal of H: inputs that calibration never woke still count for something
_ELEMENTS = 1 << 20  # weights searched at a time: bounds the temporaries at a few times 4 MB


def minmax(histogram: Histogram) -> tuple[float, float]:
    """The exact extremes, (0, 0) if there are no values."""
    return (histogram.minimum, histogram.maximum) if histogram.count else (0.0, 0.0)


def percentile(histogram: Histogram, percent: float = 99.99) -> tuple[float, float]:
    """The central interval that holds `percent` of the values: half of the rest is cut off on either side.

    Either end is within one bin's width of the order statistic (NumPy's method "inverted_cdf").

    Raises:
        OptionError: percent is not in (0, 100].
    """
    if not 0 < percent <= 100:
        raise OptionError(f"percentile {percent} is not in (0, 100]", remedy="use a value such as 99.99")
    if not histogram.count:
        return 0.0, 0.0
    tail = (1 - percent / 100) / 2
    return _quantile(histogram, tail), _quantile(histogram, 1 - tail)


def entropy(histogram: Histogram, grid: IntGrid) -> tuple[float, float]:
    """The clipping threshold T on |x| with the least KL divergence from the quantized distribution.

    Migacz, "8-bit inference with TensorRT", GTC 2017. P is the histogram of |x| up to T with the tail added to its
    last bin; Q is the same without the tail, averaged over each quantization step's occupied bins. Values equal to
    zero are left out of both: they are represented exactly, and after a ReLU they would outweigh all others.
    A threshold ends at an occupied bin, since elsewhere the divergence is infinite. At most about 256 thresholds
    are tried, evenly spaced.

    Args:
        histogram: of the activations.
        grid: asymmetric grids spend all their levels on one-sided data, otherwise half of the levels go to |x|.

    Returns:
        [-T, T] cut to the extremes of the data.
    """
    magnitudes, one_sided = _magnitudes(histogram)
    levels = 1 << (grid.bits - (grid.symmetric or not one_sided))
    if magnitudes.size <= levels:
        return minmax(histogram)
    stride = -(-(magnitudes.size - levels) // 256)
    stops = range(magnitudes.size, levels - 1, -stride)
    threshold = histogram.width * min(stops, key=lambda stop: _divergence(magnitudes, stop, levels))
    return max(-threshold, histogram.minimum), min(threshold, histogram.maximum)


def mse(histogram: Histogram, grid: IntGrid) -> tuple[float, float]:
    """The range with the least expected squared error of rounding and clipping.

    Bins count as points at their centres, values equal to zero as exact. For asymmetric grids low and high are
    searched one after the other, starting from the best common shrinkage.
    """
    if not histogram.count:
        return 0.0, 0.0
    values, counts = _points(histogram)

    def error(lows: _Array, highs: _Array) -> _Array:
        return _squared_error(values, lows[:, None], highs[:, None], grid) @ counts

    low, high = _search(
        np.asarray(min(histogram.minimum, 0.0)),
        np.asarray(max(histogram.maximum, 0.0)),
        error,
        np.geomspace(1.0, 1e-3, 48),
        grid.symmetric,
    )
    return float(low), float(high)


def expected_error(histogram: Histogram, low: float, high: float, grid: IntGrid) -> float:
    """Mean squared error of the histogram's values when [low, high] is quantized, each taken at its bin's centre."""
    values, counts = _points(histogram)
    return float(counts @ _squared_error(values, low, high, grid)) / max(histogram.count, 1)


def weight_scales(W: Floats, grid: IntGrid, H: Floats | None = None, *, search: bool = True) -> NDArray[np.float32]:
    """Symmetric scales (out,), one per row, with the least tr(dW H dW^T) under nearest rounding.

    Args:
        W: (out, in) weights.
        grid: a symmetric grid.
        H: (in, in) Gram matrix of the inputs; without it the error is ||dW||^2.
        search: as for `blockwise`.
    """
    return blockwise(W, W.shape[1], grid, H, search=search)[0][:, 0]


def blockwise(
    W: Floats, block: int, grid: IntGrid, H: Floats | None = None, *, search: bool = True
) -> tuple[NDArray[np.float32], Ints | None]:
    """Scales, and zero points if the grid is asymmetric, per row and block of inputs, found by search.

    Each block is judged by its own part of H: the error between blocks is left to the rounding.

    Args:
        W: (out, in) weights; the last block is shorter if `block` does not divide `in`.
        block: inputs per scale.
        grid: the integers to use.
        H: (in, in) Gram matrix of the inputs; without it the error is ||dW||^2.
        search: else ranges are whole: 2.4 ms instead of 187 for 512 x 4608 weights.

    Returns:
        Scales (out, blocks) and zero points (out, blocks) or None.
    """
    out, width = W.shape
    blocks = -(-width // block)
    gram = None if H is None else _diagonal_blocks(H, block, blocks)
    rows = max(1, _ELEMENTS // (blocks * block))
    scales = np.empty((out, blocks), np.float32)
    zero_points = np.empty((out, blocks), grid.dtype)
    for start in range(0, out, rows):
        part = slice(start, start + rows)
        padded = np.zeros((len(W[part]), blocks * block), np.float32)
        padded[:, :width] = W[part]
        stack = np.ascontiguousarray(padded.reshape(-1, blocks, block).swapaxes(0, 1))
        scale, zero_point = _parameters(stack, grid, gram, search=search)
        scales[part], zero_points[part] = scale.T, zero_point.T
    return scales, None if grid.symmetric else zero_points


def _parameters(stack: Floats, grid: IntGrid, gram: Floats | None, *, search: bool) -> tuple[NDArray[np.float32], Ints]:
    """Parameters (blocks, out) for weights (blocks, out, block), given H's diagonal blocks (blocks, block, block)."""

    def error(lows: _Array, highs: _Array) -> _Array:
        totals = np.empty(lows.shape)
        for index, (scale, zero_point) in enumerate(zip(*parameters_from_range(lows, highs, grid), strict=True)):
            delta = fake_quantize(stack, scale[..., None], zero_point[..., None], grid) - stack
            weighted = delta if gram is None else np.matmul(delta, gram)
            totals[index] = np.einsum("brk,brk->br", delta, weighted)
        return totals

    low = np.minimum(stack.min(axis=-1), 0.0).astype(np.float64)
    high = np.maximum(stack.max(axis=-1), 0.0).astype(np.float64)
    if search:
        low, high = _search(low, high, error, np.geomspace(1.0, 0.35, 16), grid.symmetric)
    return parameters_from_range(low, high, grid)


def _search(
    low: _Array, high: _Array, error: Callable[[_Array, _Array], _Array], factors: _Array, symmetric: bool
) -> tuple[_Array, _Array]:
    """Shrinks ranges so that `error` is least.

    First both ends together, then (unless symmetric) each on its own, then twice a finer look around the best.

    Args:
        low: the full ranges' lower ends, any shape.
        high: their upper ends.
        error: of (trials, *shape) ranges, as many errors.
        factors: from 1 downwards, evenly spaced in logarithm.
        symmetric: both ends always move together.
    """
    best_low, best_high, least = low, high, error(low[None], high[None])[0]

    def attempt(lows: _Array, highs: _Array) -> None:
        nonlocal best_low, best_high, least
        lows, highs = np.broadcast_arrays(lows, highs)
        errors = error(lows, highs)
        first = errors.argmin(axis=0)[None]
        trial_low, trial_high, trial = (np.take_along_axis(a, first, axis=0)[0] for a in (lows, highs, errors))
        better = trial < least
        best_low, best_high = np.where(better, trial_low, best_low), np.where(better, trial_high, best_high)
        least = np.where(better, trial, least)

    ratio = factors[0] / factors[1]
    factors = factors.reshape(-1, *[1] * low.ndim)
    attempt(low * factors[1:], high * factors[1:])
    if not symmetric and low.any() and high.any():  # else the one end that is not zero has been searched
        attempt(low * factors, best_high[None])
        attempt(best_low[None], high * factors)
    for _ in range(2):
        steps = np.geomspace(1 / ratio, ratio, 9).reshape(-1, *[1] * low.ndim)
        if symmetric:
            attempt(np.maximum(best_low * steps, low), np.minimum(best_high * steps, high))
        else:
            attempt(np.maximum(best_low * steps, low), best_high[None])
            attempt(best_low[None], np.minimum(best_high * steps, high))
        ratio **= 0.25
    return best_low, best_high


def _diagonal_blocks(H: Floats, block: int, blocks: int) -> Floats:
    """H's diagonal blocks (blocks, block, block) in float32, scaled to a mean diagonal of 1 and damped."""
    width = len(H)
    level = float(np.diagonal(H).mean()) or 1.0
    stack = np.zeros((blocks, block, block), np.float32)
    for index in range(blocks):
        inputs = slice(index * block, min((index + 1) * block, width))
        size = inputs.stop - inputs.start
        stack[index, :size, :size] = H[inputs, inputs] / level
        stack[index] += _DAMPING * np.eye(block, dtype=np.float32)
    return stack


def _points(histogram: Histogram) -> tuple[_Array, _Array]:
    """Centres and counts of the bins that hold more than zeros."""
    counts, edges = histogram.nonzero_counts, histogram.edges
    centres = np.clip((edges[:-1] + edges[1:]) / 2, histogram.minimum, histogram.maximum)
    return centres[counts > 0], counts[counts > 0].astype(np.float64)


def _squared_error(values: _Array, low: ArrayLike, high: ArrayLike, grid: IntGrid) -> _Array:
    scale, zero_point = parameters_from_range(low, high, grid)
    return np.square(fake_quantize(values, scale.astype(np.float64), zero_point, grid) - values).astype(np.float64)


def _quantile(histogram: Histogram, share: float) -> float:
    """The value below which a share of the values lies, by linear interpolation within its bin."""
    rank = math.ceil(share * histogram.count - 1e-6)  # a rounding error must not push a whole number to the next one
    if rank <= 1:
        return histogram.minimum
    cumulative = np.cumsum(histogram.counts)
    index = int(np.searchsorted(cumulative, rank))
    missing = (cumulative[index] - rank) / histogram.counts[index]
    value = float(histogram.edges[index + 1] - missing * histogram.width)
    return min(max(value, histogram.minimum), histogram.maximum)


def _magnitudes(histogram: Histogram) -> tuple[_Array, bool]:
    """Counts of |x| by bin, without zeros and up to the last occupied bin, and whether all x have one sign."""
    counts, zero = histogram.nonzero_counts.astype(np.float64), -histogram.first
    negative, positive = counts[:zero][::-1], counts[zero:]
    folded = np.zeros(max(negative.size, positive.size))
    folded[: negative.size] += negative
    folded[: positive.size] += positive
    return np.trim_zeros(folded, "b"), not (negative.any() and positive.any())


def _divergence(magnitudes: _Array, stop: int, levels: int) -> float:
    """KL(P || Q) of the bins below `stop`, infinite if the last of them is empty."""
    inside = magnitudes[:stop]
    if inside[-1] == 0:
        return np.inf
    level = np.arange(stop) * levels // stop
    occupied = inside > 0
    average = np.bincount(level, inside) / np.maximum(np.bincount(level, occupied), 1)
    reference = inside.copy()
    reference[-1] += magnitudes[stop:].sum()
    p, q = reference[occupied] / reference.sum(), average[level][occupied]
    return float(p @ np.log(p * (q.sum() / q)))
