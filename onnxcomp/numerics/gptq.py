"""Weights rounded to an integer grid by their effect on the layer's output: GPTQ and coordinate descent."""

import numpy as np
from numpy.typing import ArrayLike

from onnxcomp.numerics.affine import IntGrid, dequantize, quantize
from onnxcomp.numerics.arrays import Floats, Ints
from onnxcomp.numerics.feedback import Nearest, descend, feedback, inputs_first, row_errors


def round_gptq(
    W: Floats,
    H: Floats,
    scale: Floats,
    zero_point: ArrayLike,
    grid: IntGrid,
    *,
    block: int = 128,
    damping: float = 1e-2,
    order: bool = True,
) -> Ints:
    """Integers for W whose layer error is at most that of nearest rounding, row by row.

    Args:
        W: (out, in) weights.
        H: (in, in) positive semidefinite Gram matrix of the inputs; may be singular, with zero rows.
        scale: broadcastable to W, for blocks by `affine.spread_blocks`.
        zero_point: broadcastable to W.
        grid: the integers to use.
        block: as for `feedback`.
        damping: as for `feedback`.
        order: as for `feedback`.

    Returns:
        (out, in) integers of the grid's dtype.

    Raises:
        numpy.linalg.LinAlgError: H with its damping is not positive definite.
    """
    values = feedback(W, H, _on(grid, scale, zero_point, W.shape), block=block, damping=damping, order=order)
    # The greedy order may lose against plain rounding, and so may the damping: keep what is better in each row.
    result, nearest = quantize(values, scale, zero_point, grid), quantize(W, scale, zero_point, grid)
    worse = row_errors(values - W, H) > row_errors(dequantize(nearest, scale, zero_point) - W, H)
    result[worse] = nearest[worse]
    return result


def polish(
    W: Floats,
    H: Floats,
    Q: Ints,
    scale: Floats,
    zero_point: ArrayLike,
    grid: IntGrid,
    sweeps: int = 3,
    block: int = 128,
) -> Ints:
    """Coordinate descent on the integers: each weight in turn to its best with the others fixed.

    Args:
        W: (out, in) weights to approach.
        H: (in, in) positive semidefinite Gram matrix of the inputs.
        Q: (out, in) integers to start from.
        scale: broadcastable to W.
        zero_point: broadcastable to W.
        grid: the integers to use.
        sweeps: most passes over the inputs; fewer if nothing moves any more.
        block: as for `descend`.

    Returns:
        (out, in) integers of the grid's dtype, with a layer error at most that of Q.
    """
    start = dequantize(Q, np.asarray(scale, np.float64), zero_point)
    values = descend(W, H, start, _on(grid, scale, zero_point, W.shape), sweeps, block)
    return quantize(values, scale, zero_point, grid)


def _on(grid: IntGrid, scale: Floats, zero_point: ArrayLike, shape: tuple[int, ...]) -> Nearest:
    scales, zeros = inputs_first(scale, shape), inputs_first(zero_point, shape)
    return lambda q, wanted: dequantize(quantize(wanted, scales[q], zeros[q], grid), scales[q], zeros[q])
