"""Rounds weights to a grid so that the layer's output, not each weight, keeps close: tr(dW H dW^T), H = E[x x^T].

`round_gptq` fixes one input after another and lets the inputs still open make up for the error (Frantar et al. 2022,
"GPTQ", algorithm 1; Frantar and Alistarh 2022, "OBC"). `polish` then revisits every weight with the others fixed.

With H + damping = R R^T, R upper triangular, U = R^-1 is the factor of GPTQ: U^T U = H^-1. Finding it this way takes
one Cholesky factorization and one triangular inverse, and never forms H^-1.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcomp.numerics.affine import IntGrid, dequantize, quantize
from onnxcomp.numerics.arrays import Floats, Ints


def layer_error(dW: Floats, H: Floats) -> float:
    """tr(dW H dW^T): the squared output error summed over rows, for dW (out, in) and H (in, in)."""
    return float(_row_errors(dW, H).sum())


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
        block: inputs whose error is passed on within the block first, then to all later inputs in one product.
        damping: added to H's diagonal, as a share of its mean. It must be positive where H is singular.
        order: take the inputs by falling diag(H), so that the most important meet the most freedom.

    Returns:
        (out, in) integers of the grid's dtype.

    Raises:
        numpy.linalg.LinAlgError: H with its damping is not positive definite.
    """
    sequence = np.argsort(-np.diagonal(H), kind="stable") if order else np.arange(len(H))
    U = _inverse_factor(H[np.ix_(sequence, sequence)], damping)
    # Inputs come first here: each step works on one input of all rows, which then lies together in memory.
    open_weights = _inputs_first(W, W.shape)[sequence]
    scales = _inputs_first(scale, W.shape)[sequence]
    zeros = _inputs_first(zero_point, W.shape)[sequence]
    rounded = np.empty(open_weights.shape, grid.dtype)
    for start in range(0, len(H), block):
        stop = min(start + block, len(H))
        errors = np.zeros((stop - start, len(W)))
        for q in range(start, stop):
            rounded[q] = quantize(open_weights[q], scales[q], zeros[q], grid)
            errors[q - start] = (open_weights[q] - dequantize(rounded[q], scales[q], zeros[q])) / U[q, q]
            open_weights[q + 1 : stop] -= U[q, q + 1 : stop, None] * errors[q - start]
        open_weights[stop:] -= U[start:stop, stop:].T @ errors

    result = np.empty(W.shape, grid.dtype)
    result[:, sequence] = rounded.T
    # The greedy order may lose against plain rounding, and so may the damping: keep what is better in each row.
    nearest = quantize(W, scale, zero_point, grid)
    worse = _row_errors(dequantize(result, scale, zero_point) - W, H) > _row_errors(
        dequantize(nearest, scale, zero_point) - W, H
    )
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
    """Coordinate descent on the integers: w_q <- Q(w_q + ((W - W_Q) H)_q / H_qq), each input in turn.

    For one weight with the others fixed the error is a parabola, whose least point on the grid is the one nearest its
    vertex: no step makes the layer error larger. Inputs with H_qq = 0 keep their integers.

    Args:
        W: (out, in) weights to approach.
        H: (in, in) positive semidefinite Gram matrix of the inputs.
        Q: (out, in) integers to start from.
        scale: broadcastable to W.
        zero_point: broadcastable to W.
        grid: the integers to use.
        sweeps: most passes over the inputs; fewer if nothing moves any more.
        block: inputs whose changes reach the other blocks in one product.

    Returns:
        (out, in) integers of the grid's dtype, with a layer error at most that of Q.
    """
    H = np.asarray(H, np.float64)
    diagonal = np.diagonal(H)
    target = _inputs_first(W, W.shape)
    scales = _inputs_first(scale, W.shape)
    zeros = _inputs_first(zero_point, W.shape)
    integers = np.ascontiguousarray(Q.T)
    for _ in range(sweeps):
        values = dequantize(integers, scales, zeros)
        pull = H @ (target - values)
        moved = False
        for start in range(0, len(H), block):
            stop = min(start + block, len(H))
            local = pull[start:stop].copy()
            changes = np.zeros_like(local)
            for q in start + np.flatnonzero(diagonal[start:stop] > 0):
                integers[q] = quantize(values[q] + local[q - start] / diagonal[q], scales[q], zeros[q], grid)
                changes[q - start] = dequantize(integers[q], scales[q], zeros[q]) - values[q]
                if changes[q - start].any():
                    local[q - start + 1 :] -= H[q + 1 : stop, q, None] * changes[q - start]
                    moved = True
            pull[stop:] -= H[stop:, start:stop] @ changes
        if not moved:
            break
    return np.ascontiguousarray(integers.T)


def _inverse_factor(H: Floats, damping: float) -> NDArray[np.float64]:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1."""
    from scipy.linalg import cholesky, solve_triangular  # here: loading it takes 0.15 s

    damped = np.array(H, np.float64)
    level = float(np.diagonal(damped).mean()) or 1.0  # all inputs dead: any multiple of the identity will do
    damped[np.diag_indices(len(damped))] += level * damping
    # Cholesky gives L L^T; on the reversed matrix L reversed is the upper factor.
    R = cholesky(damped[::-1, ::-1], lower=True)[::-1, ::-1]
    U: NDArray[np.float64] = solve_triangular(R, np.eye(len(R)))
    return U


def _inputs_first(parameters: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Parameters broadcast to (out, in), as a float64 copy of shape (in, out)."""
    return np.array(np.broadcast_to(np.asarray(parameters), shape).T, np.float64, order="C")


def _row_errors(dW: Floats, H: Floats) -> NDArray[np.float64]:
    wide = np.asarray(dW, np.float64)
    errors: NDArray[np.float64] = np.einsum("ij,ij->i", wide @ np.asarray(H, np.float64), wide)
    return errors
