"""What went through tensors, layers and channels: statistics of which parts merge to what the whole gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.channels import Slot
from onnxcomp.layers import Layer
from onnxcomp.numerics.histogram import Histogram
from onnxcomp.numerics.moments import Moments

_ROUNDING = 1e-12
"""Of a float64 sum over up to a million squares, relative to it."""

Place: TypeAlias = tuple[str, int, bytes]
"""Where channels lie: the tensor's name, the axis, and the bytes of their positions along it."""


class Channels(NamedTuple):
    """A slot without its value."""

    tensor: str
    axis: int
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Observed:
    """A tensor to observe, with the axis over which its channels run, if any."""

    value: ir.Value
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """What went through one tensor; a monoid under `merge`.

    Attributes:
        histogram: of all its elements or evenly spaced ones; its extremes are exact.
        low, high: (channels,) exact extremes per channel, or (1,) where the tensor has no channel axis.
    """

    histogram: Histogram
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, elements: NDArray[np.floating], low: NDArray[np.floating], high: NDArray[np.floating]) -> Self:
        """Statistics of one batch; extremes that are not among the elements are counted once."""
        values, least, largest = np.ravel(elements), np.min(low, initial=np.inf), np.max(high, initial=-np.inf)
        nothing = least > largest  # an empty tensor: the reductions gave their neutral elements
        if not (nothing or (values.size and values.min() <= least and values.max() >= largest)):  # also if one is NaN
            values = np.append(values, [least, largest])
        return cls(Histogram.of(values), np.ravel(low).astype(np.float64), np.ravel(high).astype(np.float64))

    def merge(self, other: "TensorStatistics") -> "TensorStatistics":
        """Statistics of both together."""
        return TensorStatistics(
            self.histogram.merge(other.histogram), np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        )

    @property
    def absolute_maximum(self) -> NDArray[np.float64]:
        """(channels,) largest magnitude."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclass(frozen=True, eq=False)
class Gram:
    """Sum of x x^T over a layer's input vectors x, each with a 1 appended; a monoid under `merge`.

    Attributes:
        total: (groups, in + 1, in + 1) float64.
        rows: how many vectors.
    """

    total: NDArray[np.float64]
    rows: int

    @classmethod
    def of(cls, rows: NDArray[np.floating]) -> Self:
        """The Gram matrix of (groups, rows, in) vectors."""
        wide = np.ones((*rows.shape[:2], rows.shape[2] + 1))
        wide[..., :-1] = rows
        with np.errstate(invalid="ignore", over="ignore"):  # `calibrate` refuses what is not finite, by name
            return cls(np.matmul(wide.swapaxes(1, 2), wide), rows.shape[1])

    def merge(self, other: "Gram", *, in_place: bool = False) -> "Gram":
        """The Gram matrix of both sets of vectors; in the memory of this one, which is then spent, if asked for.

        What came from another process may be read-only: then in memory of its own.
        """
        total = np.add(self.total, other.total, out=self.total if in_place and self.total.flags.writeable else None)
        return Gram(total, self.rows + other.rows)

    @property
    def second_moment(self) -> NDArray[np.float64]:
        """(groups, in, in): H = E[x x^T]."""
        result: NDArray[np.float64] = self.total[:, :-1, :-1] / max(self.rows, 1)
        return result

    @property
    def mean(self) -> NDArray[np.float64]:
        """(groups, in): E[x]."""
        result: NDArray[np.float64] = self.total[:, :-1, -1] / max(self.rows, 1)
        return result

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(groups, in, in), exactly zero for inputs that are constant but for rounding."""
        mean = self.mean
        result = self.second_moment
        before = np.diagonal(result, axis1=1, axis2=2).copy()
        result -= mean[:, :, None] * mean[:, None, :]
        varies = np.diagonal(result, axis1=1, axis2=2) > _ROUNDING * before
        if not varies.all():
            result *= varies[:, :, None] * varies[:, None, :]
        return result


@dataclass(frozen=True, eq=False)
class Statistics:
    """Everything one pass learnt; N parts merge to what the whole gives.

    Attributes:
        tensors: by tensor name.
        grams: by layer name.
        channels: by place, as `moments` looks them up.
    """

    tensors: Mapping[str, TensorStatistics] = field(default_factory=dict)
    grams: Mapping[str, Gram] = field(default_factory=dict)
    channels: Mapping[Place, Moments] = field(default_factory=dict)

    def merge(self, other: "Statistics", *, in_place: bool = False) -> "Statistics":
        """Statistics of both data together; in the memory of these, which are then spent, if asked for."""
        tensors = dict(self.tensors)
        for name, part in other.tensors.items():
            tensors[name] = tensors[name].merge(part) if name in tensors else part
        grams = dict(self.grams)
        for name, gram in other.grams.items():
            grams[name] = grams[name].merge(gram, in_place=in_place) if name in grams else gram
        channels = dict(self.channels)
        for place, moments in other.channels.items():
            channels[place] = channels[place].merge(moments) if place in channels else moments
        return Statistics(tensors, grams, channels)

    def moments(self, slot: Slot) -> Moments:
        """Of the channels that lie there; they must have been asked for."""
        return self.channels[place_of(slot)]

    def answers(self, request: Observed | Slot | Layer) -> bool:
        """Whether this holds what is asked for: of a tensor per channel, if an axis is given."""
        if isinstance(request, Slot):
            return place_of(request) in self.channels
        if isinstance(request, Layer):
            return request.name in self.grams
        known = self.tensors.get(request.value.name or "")
        return known is not None and (request.axis is None or known.low.size > 1)


def place_of(slot: Slot | Channels) -> Place:
    """Where they lie, as `Statistics.channels` has it."""
    return slot.tensor, slot.axis, slot.positions.tobytes()
