"""How many channels each group keeps: the least error for what must remain of a cost.

A node's cost is proportional to what is left of each axis that it computes over, so the cost of a choice of widths
needs no model, and a step in one group has a price: the error it adds by the cost it saves. Steps are taken along the
lower convex hull of each group's errors, the cheapest first (Lagrange relaxation; Shoham and Gersho 1988).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.channels import ChannelGroups
from onnxcomp.core import Choice
from onnxcomp.cost import Totals, node_costs
from onnxcomp.layers import FLOATS


class Cost(Choice):
    """What a target limits."""

    FLOPS = "flops"
    PARAMS = "params"
    SIZE = "size"


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
        most: how many may go.
    """

    order: NDArray[np.int64]
    errors: NDArray[np.float64]
    most: int


def allocate(
    cost: CostModel, curves: Sequence[Curve | None], remains: float, *, multiple: int = 1
) -> NDArray[np.int64]:
    """How many channels go from each group so that the cost falls to a share of itself.

    Args:
        cost: of the model.
        curves: one for each of its groups; None where nothing may go.
        remains: share of the cost that is to remain.
        multiple: widths are multiples of this, where a group has as many channels.

    Returns:
        (groups,) counts. All that may go, if that is not enough.
    """
    goal = remains * cost.total()
    removed = np.zeros(len(curves))
    hulls = [[] if curve is None else _hull(curve, multiple) for curve in curves]
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
        saved = cost.saving(best, removed, there - here)
        step = there - here
        if saved > current - goal:  # the last step need not be whole
            step = min(step, int(np.ceil((current - goal) / saved * step / multiple)) * multiple)
        current -= cost.saving(best, removed, step)
        removed[best] += step
        places[best] += 1
    return removed.astype(np.int64)


def _hull(curve: Curve, multiple: int) -> list[tuple[int, float]]:
    """Vertices of the lower convex hull of the errors over the counts that leave such widths."""
    size = len(curve.order)
    counts = [n for n in range(curve.most + 1) if n == 0 or size < multiple or (size - n) % multiple == 0]
    hull: list[tuple[int, float]] = []
    for count in counts:
        point = count, float(curve.errors[count])
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(first: tuple[int, float], middle: tuple[int, float], last: tuple[int, float]) -> bool:
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])


def totals(model: ir.Model) -> Totals:
    """Parameters, bytes and FLOPs of a model."""
    return Totals.of(node_costs(model))
