"""Which weights become zero, and what the others become: tr((W - W') H (W - W')^T) with W' zero outside a mask.

Masks follow the magnitude |w|, Wanda's |w| ||x|| (Sun et al. 2024, equation 1), or SparseGPT's w^2 / [H^-1]_qq
(Frantar and Alistarh 2023, section 3), chosen block by block of inputs while the error is passed on to the inputs that
follow; or mask and weights are found together by ADMM (Boza 2024, algorithm 1), which sees how inputs stand in for each
other. What is left is then the exact least squares solution on the mask, row by row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.feedback import feedback

_STEPS = 50
_TOLERANCE = 1e-5
_BLOCK = 128
_PENALTIES = (0.1, 1.0)
_TURNS = 40

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pattern:
    """What may be zero.

    Attributes:
        share: of the weights that become zero.
        of: that share of every so many consecutive inputs of a row (N:M); 0 for anywhere.
        block: (rows, columns) that are zero together.
    """

    share: float
    of: int = 0
    block: tuple[int, int] = (1, 1)

    def keep(self, scores: Floats) -> Mask:
        """The mask of what scores most, for scores (out, in)."""
        rows, columns = self.block
        padded = np.pad(scores, [(0, -len(scores) % rows), (0, -scores.shape[1] % columns)])
        blocks = padded.reshape(len(padded) // rows, rows, -1, columns).sum(axis=(1, 3))
        kept = self._by_group(blocks) if self.of else self._anywhere(blocks)
        wide = np.repeat(np.repeat(kept, rows, axis=0), columns, axis=1)
        return np.asarray(wide[: len(scores), : scores.shape[1]])

    def _anywhere(self, scores: Floats) -> Mask:
        gone, flat = round(self.share * scores.size), scores.ravel()
        if gone == 0:
            return np.ones(scores.shape, bool)
        most = np.partition(flat, gone - 1)[gone - 1]
        kept: Mask = ~(flat <= most)
        equal = np.flatnonzero(flat == most)  # of these the first go
        kept[equal[gone - int((flat < most).sum()) :]] = True
        return kept.reshape(scores.shape)

    def _by_group(self, scores: Floats) -> Mask:
        width = scores.shape[1] // self.of * self.of  # what is left over stays
        groups = scores[:, :width].reshape(len(scores), -1, self.of)
        ranks = np.argsort(np.argsort(groups, axis=2, kind="stable"), axis=2)
        kept = np.ones(scores.shape, bool)
        kept[:, :width] = (ranks >= round(self.share * self.of)).reshape(len(scores), width)
        return kept


def magnitude_mask(W: Floats, pattern: Pattern) -> Mask:
    """By |w|."""
    return pattern.keep(np.square(W))


def wanda_mask(W: Floats, H: Floats, pattern: Pattern) -> Mask:
    """By |w| ||x||, for H (in, in); each row loses the same share."""
    scores = np.square(W) * np.diagonal(H)
    if pattern.of or pattern.block != (1, 1):
        return pattern.keep(scores)
    return np.concatenate([pattern.keep(row[None]) for row in scores])


def obs_mask(W: Floats, H: Floats, pattern: Pattern, damping: float = 1e-2) -> Mask:
    """By w^2 / [H^-1]_qq of the weights as they are when their turn comes, for H (in, in)."""
    size = _BLOCK
    if step := max(pattern.of, pattern.block[1]):
        size = max(_BLOCK // step, 1) * step
    mask = np.ones(W.shape, bool)

    def opened(inputs: NDArray[np.int64], weights: NDArray[np.float64], pivots: NDArray[np.float64]) -> None:
        mask[:, inputs] = pattern.keep(np.square(weights / pivots[:, None]).T)

    feedback(
        W, H, lambda q, wanted: np.where(mask[:, q], wanted, 0.0), block=size, damping=damping, order=False,
        opened=opened,
    )  # fmt: skip
    return mask


def admm_mask(W: Floats, H: Floats, pattern: Pattern) -> Mask:
    """By alternating directions: weights that are free but near to sparse ones, and sparse ones near to those.

    With inputs scaled to unit power, X = (W H + rho (Z - U)) (H + rho I)^-1, Z = X + U on the mask that keeps most of
    it, U <- U + X - Z. The penalty rho grows, so that the mask is free to change at first and settles at last. One
    eigendecomposition of H gives all the inverses.
    """
    power = np.maximum(np.diagonal(H), 0)
    scale = np.sqrt(power + 1e-12 * (float(power.mean()) or 1.0))
    moment, target = np.asarray(H / np.outer(scale, scale)), W * scale
    values, vectors = np.linalg.eigh(moment)
    base = target @ moment @ vectors
    mask = pattern.keep(np.square(target))
    sparse, dual, before = np.where(mask, target, 0.0), np.zeros(target.shape), _PENALTIES[0]
    for rho in np.geomspace(*_PENALTIES, _TURNS):
        dual *= before / rho
        free = (base + rho * ((sparse - dual) @ vectors)) / (values + rho) @ vectors.T + dual
        mask = pattern.keep(np.square(free))
        sparse = np.where(mask, free, 0.0)
        dual, before = free - sparse, rho
    return mask


def refit_on(W: Floats, H: Floats, mask: Mask, damping: float = 1e-3) -> NDArray[np.float64]:
    """The weights on a mask that come nearest to the layer's output: conjugate gradients, all rows at once.

    Args:
        W: (out, in) weights to approach.
        H: (in, in) positive semidefinite Gram matrix of the inputs.
        mask: (out, in) of what may differ from zero.
        damping: added to H's diagonal, as a share of its mean.
    """
    moment = np.array(H, np.float64)
    moment[np.diag_indices(len(moment))] += damping * (float(np.diagonal(H).mean()) or 1.0)
    target = np.asarray(W, np.float64)
    scale = 1 / np.diagonal(moment)
    found = np.where(mask, target, 0.0)
    residual = np.where(mask, (target - found) @ moment, 0.0)
    direction = residual * scale
    power = np.einsum("ri,ri->r", residual, direction)
    goal = _TOLERANCE**2 * power
    for _ in range(_STEPS):
        if np.all(power <= goal):
            break
        pushed = np.where(mask, direction @ moment, 0.0)
        curvature = np.einsum("ri,ri->r", direction, pushed)
        length = np.divide(power, curvature, out=np.zeros_like(power), where=curvature > 0)
        found += length[:, None] * direction
        residual -= length[:, None] * pushed
        before, power = power, np.einsum("ri,ri->r", residual, residual * scale)
        ratio = np.divide(power, before, out=np.zeros_like(power), where=before > 0)
        direction = residual * scale + ratio[:, None] * direction
    return found
