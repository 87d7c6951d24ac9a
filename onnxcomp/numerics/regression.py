"""Ridge regression from sums, which batches add up to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.obs import refit


@dataclass(eq=False)
class Moments:
    """What inputs x and wanted outputs y sum to, or are in the mean; of nothing to begin with.

    Attributes:
        xx, yx: (groups, in, in) x x^T and (groups, out, in) y x^T.
        x, y: (groups, in) and (groups, out).
        count: of the vectors.
    """

    xx: Any = 0.0
    yx: Any = 0.0
    x: Any = 0.0
    y: Any = 0.0
    count: int = 0

    @staticmethod
    def of(x: NDArray[Any], y: NDArray[Any]) -> "Moments":
        """Sums over vectors (groups, n, in) and (groups, out, n)."""
        sums = np.matmul(x.swapaxes(1, 2), x), np.matmul(y, x), x.sum(1), y.sum(2)
        xx, yx, of_x, of_y = (part.astype(np.float64) for part in sums)
        return Moments(xx, yx, of_x, of_y, x.shape[1])

    def __iadd__(self, other: "Moments") -> "Moments":
        self.xx += other.xx
        self.yx += other.yx
        self.x += other.x
        self.y += other.y
        self.count += other.count
        return self

    def centred(self, *, biased: bool) -> "Moments":
        """Means; where a bias makes up for them, with the means of x and y taken off the products."""
        xx, yx, x, y = (part / self.count for part in (self.xx, self.yx, self.x, self.y))
        if biased:
            xx -= x[:, :, None] * x[:, None]
            yx -= y[:, :, None] * x[:, None]
        diagonal = np.arange(xx.shape[1])
        xx[:, diagonal, diagonal] = np.maximum(xx[:, diagonal, diagonal], 0)  # but for rounding
        return Moments(xx, yx, x, y, self.count)

    def fitted(self, weights: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
        """(groups, out, in) weights that fit centred moments, no further from those given than pays (`obs.refit`)."""
        return np.stack([refit(*parts, damping) for parts in zip(weights, self.xx, self.yx, strict=True)])

    def error(self, weights: NDArray[np.float64]) -> float:
        """The mean squared error of weights (groups, out, in), but for what does not depend on them."""
        return float(np.sum((weights @ self.xx - 2 * self.yx) * weights))


def best_damping(
    choices: Sequence[float], fitted: Moments, held_out: Moments, weights: NDArray[np.float64], *, biased: bool
) -> float:
    """The one that fits what is held out best; the least of them where nothing is.

    Args:
        choices: as shares of the mean of H's diagonal.
        fitted: sums to fit to.
        held_out: sums over other vectors.
        weights: (groups, out, in) to start from.
        biased: whether a bias makes up for means.
    """
    if not held_out.count:
        return min(choices)
    known, judges = fitted.centred(biased=biased), held_out.centred(biased=biased)
    return min(choices, key=lambda damping: judges.error(known.fitted(weights, damping)))
