"""Which inputs of a layer can go, and what the others become: group optimal brain surgeon.

For an input channel with columns S of the weight matrix W, the least increase of tr(dW H dW^T) at which W_S becomes
zero is tr(W_S [(H^-1)_SS]^-1 W_S^T), and the other weights and the inverse change by (Hassibi and Stork 1992, equations
3 to 5, for blocks; Kurtic et al. 2022, "The Optimal BERT Surgeon", equation 6):

    W    <-  W    - W_S    [(H^-1)_SS]^-1 (H^-1)_S,:
    H^-1 <-  H^-1 - (H^-1)_:,S [(H^-1)_SS]^-1 (H^-1)_S,:
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.blas import as_pays
from onnxcomp.numerics.definite import inverted, solved

_ELIMINATED = 64
"""Channels that go at a time, at most, where there are thousands: a share of what is left."""

_KEPT_ALONG = 0.2
"""Share of a matrix that may belong to what is gone before it is made smaller."""

_SWAPS = 32
_LEAST_GAIN = 1e-6
"""Of a swap, relative to what it brings back, so that rounding does not swap channels to and fro."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads a group of channels.

    Attributes:
        weight: (out, in) its matrix.
        second_moment: (in, in) H of its inputs; centred where a bias takes up the mean.
        columns: (channels, n) the columns of the matrix that read each channel.
    """

    weight: Floats
    second_moment: Floats
    columns: NDArray[np.int64]

    @property
    def energy(self) -> float:
        """tr(W H W^T): the mean square of its output, summed over its rows."""
        W = np.asarray(self.weight, np.float64)
        return float(np.einsum("ij,ij->", W @ self.second_moment, W))


@dataclass(frozen=True, eq=False)
class Elimination:
    """Every width of a group from one sweep.

    Attributes:
        order: (channels,) the channel that goes first, second, ...
        errors: (channels + 1,) the consumers' summed error, each relative to its output, when so many are gone.
    """

    order: NDArray[np.int64]
    errors: NDArray[np.float64]


def eliminate(
    consumers: Sequence[Consumer], damping: float = 1e-2, order: Sequence[int] | NDArray[np.int64] | None = None
) -> Elimination:
    """Remove the channels one after another, always the one that costs the consumers least.

    Args:
        consumers: all layers that read the channels.
        damping: added to H's diagonal, as a share of its mean.
        order: of all channels, where something else has chosen it.
    """
    states = [_State(consumer, damping) for consumer in consumers]
    total = len(consumers[0].columns)
    gone: list[int] = []
    errors = [0.0]
    while len(gone) < total:
        alive = np.setdiff1d(np.arange(total), gone) if order is None else np.asarray(order)[len(gone) :]
        scores = np.sum([state.scores(alive) for state in states], axis=0)
        count = max(1, min(_ELIMINATED, len(alive) // _ELIMINATED))
        places = np.argsort(scores, kind="stable")[:count] if order is None else np.arange(count)
        cost = max(sum(state.remove(alive[places]) for state in states), 0.0)
        # Those that go together share what they cost by what each would cost alone.
        shares = np.maximum(scores[places], 0) + np.finfo(float).tiny
        errors += (errors[-1] + cost * np.cumsum(shares / shares.sum())).tolist()
        gone += alive[places].tolist()
    return Elimination(np.asarray(gone), np.asarray(errors))


def swapped(consumers: Sequence[Consumer], gone: NDArray[np.int64], damping: float = 1e-2) -> NDArray[np.int64]:
    """Channels to remove, as many, that cost no more: one comes back and another goes while that lowers the error.

    What comes back is what lowers the error most: with C = H_RR - H_RK (H_KK)^-1 H_KR, the moment of what is gone that
    what is kept cannot tell, by tr(B [C_SS]^-1 B^T) where B = W_R C_RS. What goes is the cheapest of what is left then.

    Args:
        consumers: all layers that read the channels.
        gone: those that were to be removed.
        damping: as for `eliminate`.
    """
    moments = [_damped(consumer.second_moment, damping) for consumer in consumers]
    kept = np.setdiff1d(np.arange(len(consumers[0].columns)), gone)
    for _ in range(min(len(gone), _SWAPS)):
        pairs = list(zip(consumers, moments, strict=True))
        gains = np.sum([_gains(consumer, H, gone) for consumer, H in pairs], axis=0)
        back = gone[np.argmax(gains)]
        kept, gone = np.append(kept, back), gone[gone != back]
        costs = np.sum([_costs(consumer, H, kept, gone) for consumer, H in pairs], axis=0)
        leaves = back if costs.min() >= gains.max() * (1 - _LEAST_GAIN) else kept[np.argmin(costs)]
        kept, gone = kept[kept != leaves], np.append(gone, leaves)
        if leaves == back:
            break
    return gone


def _gains(consumer: Consumer, H: Floats, gone: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much the relative error falls when one of the channels that are gone comes back."""
    R, K = np.sort(consumer.columns[gone], axis=None), _others(consumer, gone)
    across = H[np.ix_(K, R)]
    left = H[np.ix_(R, R)] - across.T @ solved(H[np.ix_(K, K)], across)
    places = np.searchsorted(R, consumer.columns[gone])
    return removal_costs(consumer.weight[:, R] @ left, left, places) / (consumer.energy or 1.0)


def _costs(consumer: Consumer, H: Floats, kept: NDArray[np.int64], gone: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much the relative error grows when one of the channels that are kept goes."""
    K, R = _others(consumer, gone), consumer.columns[gone].ravel()
    inverse = inverted(H[np.ix_(K, K)])
    weight = consumer.weight[:, K] + consumer.weight[:, R] @ H[np.ix_(R, K)] @ inverse
    return removal_costs(weight, inverse, np.searchsorted(K, consumer.columns[kept])) / (consumer.energy or 1.0)


def _others(consumer: Consumer, channels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The columns that do not belong to some channels, ascending."""
    return np.setdiff1d(np.arange(consumer.weight.shape[1]), consumer.columns[channels])


def survivors(weight: Floats, second_moment: Floats, kept: NDArray[np.bool_], damping: float = 1e-2) -> Floats:
    """The weights (out, kept) that come nearest to the layer's output when only some columns are left.

    argmin over V of tr((W - V E) H (W - V E)^T) + damping ||V - W_K||^2, with E choosing the kept columns.
    """
    H = np.asarray(second_moment, np.float64)
    inner = H[np.ix_(kept, kept)]
    ridge = _level(H) * damping * np.eye(len(inner))
    with as_pays(len(H)):
        lost = np.asarray(weight, np.float64)[:, ~kept] @ H[np.ix_(~kept, kept)]
        correction: Floats = solved(inner + ridge, lost.T).T
    result: Floats = weight[:, kept] + correction
    return result


def refit(weight: Floats, second_moment: Floats, cross: Floats, damping: float = 1e-2) -> Floats:
    """The weights that map other inputs to the outputs wanted, no further from the old ones than pays.

    W + (G - W H) (H + damping mean(diag H) I)^-1: ridge regression centred on W.

    Args:
        weight: (out, in) to start from.
        second_moment: (in, in) H = E[x x^T] of the inputs as they are now.
        cross: (out, in) G = E[y x^T] of the outputs wanted.
        damping: as a share of H's mean diagonal.
    """
    H = np.asarray(second_moment, np.float64)
    with as_pays(len(H)):
        missing = cross - np.asarray(weight, np.float64) @ H
        result: Floats = weight + solved(H + _level(H) * damping * np.eye(len(H)), missing.T).T
    return result


def removal_costs(weight: Floats, inverse: Floats, columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """tr(W_S [(H^-1)_SS]^-1 W_S^T) of each channel: what it costs to remove it alone, the others making up for it.

    Args:
        weight: (out, in).
        inverse: (in, in) H^-1.
        columns: (channels, n) the columns S of each.
    """
    inner = inverse[columns[:, :, None], columns[:, None, :]]
    W = weight.T[columns]  # (channels, n, out)
    cost: NDArray[np.float64] = np.einsum("cij,cij->c", np.linalg.inv(inner), np.matmul(W, W.swapaxes(1, 2)))
    return cost


def damped_inverse(second_moment: Floats, damping: float) -> Floats:
    """(H + damping mean(diag H) I)^-1."""
    return inverted(_damped(second_moment, damping))


def _damped(second_moment: Floats, damping: float) -> Floats:
    H = np.array(second_moment, np.float64)
    H[np.diag_indices(len(H))] += _level(H) * damping
    return H


def _level(H: Floats) -> float:
    return float(np.diagonal(H).mean()) or 1.0


class _State:
    """One consumer while channels go.

    Of its weights only W^T W counts, so where there are more rows than columns, a triangular factor stands for them.
    """

    def __init__(self, consumer: Consumer, damping: float) -> None:
        self._energy = consumer.energy or 1.0
        weight = np.asarray(consumer.weight, np.float64)
        if len(weight) > weight.shape[1]:
            weight = np.asarray(np.linalg.qr(weight, mode="r"))
        # A row for each column of the layer: the inverse beside the weights, as both change alike.
        self._rows = np.hstack([damped_inverse(consumer.second_moment, damping), weight.T])
        self._columns = consumer.columns
        self._gone: list[int] = []

    def scores(self, channels: NDArray[np.int64]) -> NDArray[np.float64]:
        """What each channel would cost, relative to the layer's output."""
        inverse, weights = np.hsplit(self._rows, [len(self._rows)])
        return removal_costs(weights.T, inverse, self._columns[channels]) / self._energy

    def remove(self, channels: NDArray[np.int64]) -> float:
        """Remove some together and let the others make up for it."""
        S, width = self._columns[channels].ravel(), len(self._rows)
        rows = self._rows[S]
        inner, weights = rows[:, S], rows[:, width:]
        change = np.linalg.solve(inner, rows[:, :width])  # [(H^-1)_SS]^-1 (H^-1)_S,:
        cost = float(np.einsum("ij,ij->", np.linalg.inv(inner) @ weights, weights))
        # In place: thousands of columns squared are slow to write twice. BLAS takes the transpose.
        self._rows = blas.dgemm(-1.0, rows.T, change.T, 1.0, self._rows.T, trans_b=True, overwrite_c=True).T
        # What is gone must not come back by rounding: its own block stays invertible, its weights zero.
        self._rows[S] = 0
        self._rows[:, S] = 0
        self._rows[S, S] = 1
        self._gone += S.tolist()
        if len(self._gone) > width * _KEPT_ALONG:
            self._forget()
        return cost / self._energy

    def _forget(self) -> None:
        """Drop the rows and columns of what is gone."""
        width = len(self._rows)
        left = np.setdiff1d(np.arange(width), self._gone)
        self._rows = self._rows[np.ix_(left, [*left, *range(width, self._rows.shape[1])])]
        self._columns = np.searchsorted(left, self._columns)  # those that are gone are not asked for again
        self._gone = []
