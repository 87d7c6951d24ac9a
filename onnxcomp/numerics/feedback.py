"""Weights onto a set of values so that the layer's output, not each weight, keeps close: tr(dW H dW^T), H = E[x x^T].

`feedback` fixes one input after another and lets the inputs still open make up for the error (Frantar et al. 2022,
"GPTQ", algorithm 1; Frantar and Alistarh 2022, "OBC"). `descend` then revisits every weight with the others fixed. What
values a weight may have (a grid, a codebook, zero and itself) is a function of the caller.

With H + damping = R R^T, R upper triangular, U = R^-1 is the factor of GPTQ: U^T U = H^-1. Finding it this way takes
one Cholesky factorization and one triangular inverse, and never forms H^-1.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxcomp.numerics.arrays import Floats

Nearest: TypeAlias = Callable[[int, NDArray[np.float64]], Floats]
"""From an input's number and what its weights (out,) should be, the nearest that they may be."""

Opened: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]], None]
"""Told of each block before its first input: their numbers (n,), weights as they are now (n, out), and U_qq (n,)."""


def layer_error(dW: Floats, H: Floats) -> float:
    """tr(dW H dW^T): the squared output error summed over rows, for dW (out, in) and H (in, in)."""
    return float(row_errors(dW, H).sum())


def row_errors(dW: Floats, H: Floats) -> NDArray[np.float64]:
    """(out,) the squared output error of each row, for dW (out, in) and H (in, in)."""
    wide = np.asarray(dW, np.float64)
    errors: NDArray[np.float64] = np.einsum("ij,ij->i", wide @ np.asarray(H, np.float64), wide)
    return errors


def grouped_error(dW: Floats, H: Floats) -> float:
    """The same where each of several equal runs of rows sees other inputs: H (groups, in, in)."""
    return sum(layer_error(rows, moment) for rows, moment in zip(np.split(dW, len(H)), H, strict=True))


def feedback(
    W: Floats,
    H: Floats,
    nearest: Nearest,
    *,
    block: int = 128,
    damping: float = 1e-2,
    order: bool = True,
    opened: Opened | None = None,
) -> NDArray[np.float64]:
    """Values for W, input by input, each input's error passed on to those that follow.

    Args:
        W: (out, in) weights.
        H: (in, in) positive semidefinite Gram matrix of the inputs; may be singular, with zero rows.
        nearest: the values that there are.
        block: inputs whose error is passed on within the block first, then to all later inputs in one product.
        damping: added to H's diagonal, as a share of its mean. It must be positive where H is singular.
        order: take the inputs by falling diag(H), so that the most important meet the most freedom.
        opened: told of each block.

    Returns:
        (out, in) values.

    Raises:
        numpy.linalg.LinAlgError: H with its damping is not positive definite.
    """
    sequence = np.argsort(-np.diagonal(H), kind="stable") if order else np.arange(len(H))
    U = inverse_factor(H[np.ix_(sequence, sequence)], damping)
    # Inputs come first here: each step works on one input of all rows, which then lies together in memory.
    remaining = inputs_first(W, W.shape)[sequence]
    values = np.empty(remaining.shape)
    for start in range(0, len(H), block):
        stop = min(start + block, len(H))
        if opened is not None:
            opened(sequence[start:stop], remaining[start:stop], np.diagonal(U)[start:stop])
        errors = np.zeros((stop - start, len(W)))
        for q in range(start, stop):
            values[q] = nearest(int(sequence[q]), remaining[q])
            errors[q - start] = (remaining[q] - values[q]) / U[q, q]
            remaining[q + 1 : stop] -= U[q, q + 1 : stop, None] * errors[q - start]
        remaining[stop:] -= U[start:stop, stop:].T @ errors
    result = np.empty(W.shape)
    result[:, sequence] = values.T
    return result


def descend(
    W: Floats, H: Floats, V: Floats, nearest: Nearest, sweeps: int = 3, block: int = 128
) -> NDArray[np.float64]:
    """Coordinate descent: v_q <- nearest(v_q + ((W - V) H)_q / H_qq), each input in turn.

    For one weight with the others fixed the error is a parabola, whose least point among the values is the one nearest
    its vertex: no step makes the layer error larger. Inputs with H_qq = 0 keep their values.

    Args:
        W: (out, in) weights to approach.
        H: (in, in) positive semidefinite Gram matrix of the inputs.
        V: (out, in) values to start from.
        nearest: the values that there are.
        sweeps: most passes over the inputs; fewer if nothing moves any more.
        block: inputs whose changes reach the other blocks in one product.

    Returns:
        (out, in) values with a layer error at most that of V.
    """
    H = np.asarray(H, np.float64)
    diagonal = np.diagonal(H)
    target, values = inputs_first(W, W.shape), inputs_first(V, W.shape)
    for _ in range(sweeps):
        pull = H @ (target - values)
        moved = False
        for start in range(0, len(H), block):
            stop = min(start + block, len(H))
            local = pull[start:stop].copy()
            changes = np.zeros_like(local)
            for q in start + np.flatnonzero(diagonal[start:stop] > 0):
                found = nearest(int(q), values[q] + local[q - start] / diagonal[q])
                changes[q - start] = found - values[q]
                values[q] = found
                if changes[q - start].any():
                    local[q - start + 1 :] -= H[q + 1 : stop, q, None] * changes[q - start]
                    moved = True
            pull[stop:] -= H[stop:, start:stop] @ changes
        if not moved:
            break
    return np.ascontiguousarray(values.T)


def inverse_factor(H: Floats, damping: float) -> NDArray[np.float64]:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1."""
    from scipy.linalg import cholesky, solve_triangular  # here: loading it takes 0.15 s

    damped = np.array(H, np.float64)
    level = float(np.diagonal(damped).mean()) or 1.0  # all inputs dead: any multiple of the identity will do
    damped[np.diag_indices(len(damped))] += level * damping
    # Cholesky gives L L^T; on the reversed matrix L reversed is the upper factor.
    R = cholesky(damped[::-1, ::-1], lower=True)[::-1, ::-1]
    U: NDArray[np.float64] = solve_triangular(R, np.eye(len(R)))
    return U


def inputs_first(parameters: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Parameters broadcast to (out, in), as a float64 copy of shape (in, out)."""
    return np.array(np.broadcast_to(np.asarray(parameters), shape).T, np.float64, order="C")
