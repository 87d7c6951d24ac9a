"""How many channels each group keeps: the least error for what must remain of a cost.

A node's cost is proportional to what is left of each axis that it computes over, so the cost of a choice of widths
needs no model, and a step in one group has a price: the error it adds by the cost it saves. Steps are taken along the
lower convex hull of each group's errors over its savings, the cheapest first (Lagrange relaxation; Shoham and Gersho
1988). Beside that, the two rates in common use: the lowest scores of the whole model, or the same share everywhere.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.channels import ChannelGroup, ChannelGroups
from onnxcomp.core import Choice
from onnxcomp.cost import Totals, node_costs
from onnxcomp.layers import FLOATS

Counts: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

_SHARES = 1001
"""Steps of a local rate."""


class Cost(Choice):
    """What a target limits."""

    FLOPS = "flops"
    PARAMS = "params"
    SIZE = "size"
    LATENCY = "latency"


class Rates(Choice):
    """How it is decided how many channels each group loses."""

    MEASURED = "measured"
    """The least error of the outputs, as measured, for the cost saved."""
    GLOBAL = "global"
    """The lowest scores of the whole model."""
    LOCAL = "local"
    """The same share of each group."""


class Priced(Protocol):
    """What a model costs by how many channels are gone from each of its groups."""

    groups: tuple[ChannelGroup, ...]

    def total(self, removed: Floats | None = None) -> float:
        """The cost with so many channels gone from each group."""

    def saving(self, group: int, removed: Floats, count: int) -> float:
        """What removing some more channels of one group saves."""


@dataclass(frozen=True)
class _Share:
    """What a group holds of an axis: positions per channel, and whether other groups' channels lie between its own."""

    group: int
    per_channel: float
    across: bool


@dataclass(frozen=True)
class _Term:
    """A cost with the axes that it is proportional to."""

    cost: float
    axes: tuple[tuple[_Share, ...], ...]


class CostModel:
    """The cost of a model by the widths of its groups.

    Args:
        groups: of the model.
        which: which cost.
    """

    def __init__(self, groups: ChannelGroups, which: Cost) -> None:
        self.groups = tuple(groups)
        self._shares = _shares(groups)
        terms = _flops(groups) if which is Cost.FLOPS else _stored(groups, which)
        self._terms = [_Term(cost, tuple(self._shares[a] for a in axes if a in self._shares)) for cost, axes in terms]
        self._by_group: dict[int, list[_Term]] = defaultdict(list)
        for term in self._terms:
            for group in {share.group for axis in term.axes for share in axis}:
                self._by_group[group].append(term)

    def total(self, removed: NDArray[np.float64] | None = None) -> float:
        """The cost with so many channels gone from each group."""
        gone = np.zeros(len(self.groups)) if removed is None else removed
        return sum(_value(term, gone) for term in self._terms)

    def saving(self, group: int, removed: NDArray[np.float64], count: int) -> float:
        """What removing some more channels of one group saves."""
        more = removed.copy()
        more[group] += count
        return sum(_value(term, removed) - _value(term, more) for term in self._by_group[group])


def _value(term: _Term, gone: NDArray[np.float64]) -> float:
    value = term.cost
    for axis in term.axes:
        inside = 1.0
        for share in axis:
            lost = share.per_channel * gone[share.group]
            if share.across:
                value *= 1 - lost
            else:
                inside -= lost
        value *= inside
    return value


def _shares(groups: ChannelGroups) -> dict[tuple[ir.Value, int], tuple[_Share, ...]]:
    found: dict[tuple[ir.Value, int], list[_Share]] = defaultdict(list)
    for index, group in enumerate(groups):
        for slot in group.slots:
            length = groups.facts.shapes[slot.value][slot.axis]
            found[slot.value, slot.axis].append(
                _Share(index, slot.positions.shape[1] / length, slot.positions.size == length)
            )
    return {key: tuple(shares) for key, shares in found.items()}


_Axes = tuple[tuple[ir.Value, int], ...]


def _stored(groups: ChannelGroups, which: Cost) -> list[tuple[float, _Axes]]:
    result: list[tuple[float, _Axes]] = []
    for graph in groups.model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and (which is Cost.SIZE or tensor.dtype in FLOATS):
                cost = tensor.nbytes if which is Cost.SIZE else tensor.size
                result.append((float(cost), tuple((value, axis) for axis in range(len(tensor.shape)))))
    return result


def _flops(groups: ChannelGroups) -> list[tuple[float, _Axes]]:
    model = groups.model.clone()
    for graph, twin in zip(groups.model.graphs(), model.graphs(), strict=True):
        for node, copy in zip(graph, twin, strict=True):
            for value, other in zip(node.outputs, copy.outputs, strict=True):
                if value in groups.facts.shapes:
                    other.shape = ir.Shape(groups.facts.shapes[value])
    costs = {cost.name: cost.flops for cost in node_costs(model)}
    result = []
    for node in groups.model.graph.all_nodes():
        if flops := costs.get(node.name or ""):
            result.append((float(flops), _computed_over(node, groups)))
    return result


def _computed_over(node: ir.Node, groups: ChannelGroups) -> _Axes:
    """The axes whose lengths multiply to the node's FLOPs."""
    shapes = groups.facts.shapes
    out = node.outputs[0]
    axes = [(out, axis) for axis in range(len(shapes.get(out, ())))]
    first, second = (node.inputs[k] if len(node.inputs) > k else None for k in (0, 1))
    if first is None or second is None or second not in shapes or first not in shapes:
        return tuple(axes)
    match node.op_type:
        case "Conv":
            axes.append((second, 1))
        case "ConvTranspose":
            axes = [(first, 1), (second, 1)]
        case "Gemm":
            axes.append((first, 0 if node.attributes.get_int("transA", 0) else 1))
        case "MatMul":
            axes.append((first, len(shapes[first]) - 1))
        case "LSTM" | "GRU" | "RNN":
            weights = second, node.inputs[2]
            axes = [(value, axis) for value in weights[1:] if value is not None for axis in (1, 2)]
    return tuple(axes)


@dataclass(frozen=True, eq=False)
class Curve:
    """What a group's widths cost in error.

    Attributes:
        order: (size,) the channel that goes first, second, ...
        errors: (size + 1,) error when so many are gone.
    """

    order: NDArray[np.int64]
    errors: NDArray[np.float64]


def allocate(cost: Priced, curves: Sequence[Curve | None], remains: float, counts: Sequence[Counts]) -> Counts:
    """How many channels go from each group so that the cost falls to a share of itself at the least error.

    Args:
        cost: of the model.
        curves: one for each of its groups; None where nothing may go.
        remains: share of the cost that is to remain.
        counts: for each group, how many channels may go, ascending.

    Returns:
        (groups,) counts. All that may go, if that is not enough.
    """
    goal = remains * cost.total()
    removed = np.zeros(len(curves))
    hulls = [
        [] if curve is None else _hull(cost, group, curve, allowed)
        for group, (curve, allowed) in enumerate(zip(curves, counts, strict=True))
    ]
    places = [0] * len(curves)
    current = cost.total()
    while current > goal:
        best, best_price = -1, np.inf
        for group, hull in enumerate(hulls):
            if places[group] + 1 >= len(hull):
                continue
            (here, error), (there, worse) = hull[places[group]], hull[places[group] + 1]
            saved = cost.saving(group, removed, there - here)
            price = (worse - error) / saved if saved > 0 else np.inf
            if price < best_price:
                best, best_price = group, price
        if best < 0:
            break
        here, there = hulls[best][places[best]][0], hulls[best][places[best] + 1][0]
        for count in counts[best]:  # the last step need not be whole
            if here < count <= there and current - cost.saving(best, removed, count - here) <= goal:
                there = int(count)
                break
        current -= cost.saving(best, removed, there - here)
        removed[best] += there - here
        places[best] += 1
    return removed.astype(np.int64)


def _hull(cost: Priced, group: int, curve: Curve, counts: Counts) -> list[tuple[int, float]]:
    """Vertices (count, error) of the lower convex hull of a group's errors over what it saves on its own."""
    nothing = np.zeros(len(cost.groups))
    hull: list[tuple[int, float, float]] = []
    for count in counts.tolist():
        point = count, cost.saving(group, nothing, count), float(curve.errors[count])
        if hull and point[1] <= hull[-1][1]:
            continue  # more channels gone, and nothing saved by it
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(count, error) for count, _, error in hull]


def _above(first: tuple[int, float, float], middle: tuple[int, float, float], last: tuple[int, float, float]) -> bool:
    return (middle[2] - first[2]) * (last[1] - first[1]) >= (last[2] - first[2]) * (middle[1] - first[1])


def below(scores: Sequence[Floats | None], threshold: float, counts: Sequence[Counts]) -> Counts:
    """How many channels of each group score less than a threshold, rounded down to what may go."""
    return np.array(
        [
            0 if own is None else _most(allowed, int((own < threshold).sum()))
            for own, allowed in zip(scores, counts, strict=True)
        ]
    )


def by_score(cost: Priced, scores: Sequence[Floats | None], remains: float, counts: Sequence[Counts]) -> Counts:
    """A global rate: the channels that score lowest in the whole model go, until a share of the cost remains."""
    levels = np.unique(np.concatenate([own for own in scores if own is not None] or [np.zeros(0)]))
    return _first(cost, remains, [*levels, np.inf], lambda level: below(scores, level, counts))


def by_share(cost: Priced, scores: Sequence[Floats | None], remains: float, counts: Sequence[Counts]) -> Counts:
    """A local rate: each group loses the same share of its channels, until a share of the cost remains."""

    def going(share: float) -> Counts:
        return np.array(
            [
                0 if own is None else _most(allowed, round(share * len(own)))
                for own, allowed in zip(scores, counts, strict=True)
            ]
        )

    return _first(cost, remains, np.linspace(0, 1, _SHARES).tolist(), going)


def _first(cost: Priced, remains: float, levels: Sequence[float], counts: Callable[[float], Counts]) -> Counts:
    """The counts of the first level that is cheap enough, each costing no more than the one before; else the last."""
    goal = remains * cost.total()
    place = bisect_left(levels, True, key=lambda level: cost.total(counts(level).astype(np.float64)) <= goal)
    return counts(levels[min(place, len(levels) - 1)])


def _most(counts: Counts, limit: int) -> int:
    return int(counts[np.searchsorted(counts, limit, side="right") - 1])


def may_go(size: int, least: float, multiple: int) -> Counts:
    """How many of a group's channels may go, ascending from 0.

    Args:
        size: its channels.
        least: share of them that stays; one always does.
        multiple: what is left is a multiple of this, in groups of as many channels.
    """
    counts = np.arange(min(size - 1, int(size * (1 - least))) + 1)
    fits = (counts == 0) | ((size - counts) % multiple == 0) | (size < multiple)
    result: Counts = counts[fits]
    return result


def totals(model: ir.Model) -> Totals:
    """Parameters, bytes and FLOPs of a model."""
    return Totals.of(node_costs(model))
