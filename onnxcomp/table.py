"""The latency table of a model on a target: what each chain of nodes takes, by shape, width and precision.

Chains are units (`units`): a node with the element-wise nodes that run with it. Those of the same operators,
attributes and shapes are one entry. They are timed inside whole models, whose layouts and fusions they are part of;
what enters and leaves integers, and what ONNX Runtime puts in to change layouts, stand by themselves. All of it is kept
in the context's store by the content of the models that were timed.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcomp.channels import ChannelGroup, ChannelGroups
from onnxcomp.core import Context
from onnxcomp.cost import node_costs
from onnxcomp.facts import observe, sized
from onnxcomp.latency import LatencyModel, form_of
from onnxcomp.model import file_bytes
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.placement import Crossing, crossing
from onnxcomp.report import CrossingRow, LatencyRow, LatencyTable, WidthRow
from onnxcomp.runtime import Feeds
from onnxcomp.timing import for_timing, profiles
from onnxcomp.units import Units
from onnxcomp.widths import Counts, may_go

FLOAT = "float"
_LEAST = 0.25
"""Share of its channels that every group keeps: fewer lose too much for what they save."""
_MULTIPLE = 4
"""Widths are multiples of this many positions of a tensor."""

Technique = QuantizeStatic | QuantizeDynamic


@dataclass(frozen=True, eq=False)
class FormTimes:
    """A model's times in one precision.

    Attributes:
        technique: the pass that gives it; None for float.
        times: microseconds by unit.
        changed: the units that it changes.
        layouts: microseconds of what ONNX Runtime put in by itself.
        bytes: of constants by unit.
        size: bytes of the whole file.
    """

    technique: Technique | None
    times: Mapping[str, float]
    changed: Set[str]
    layouts: float
    bytes: Mapping[str, int]
    size: int


def form_times(
    model: ir.Model, units: Units, techniques: Mapping[str, Technique], context: Context, feeds: Feeds
) -> tuple[dict[str, FormTimes], Mapping[str, int]]:
    """Times in float and in every other precision that changes anything.

    Returns:
        The times by the name of the precision, and the elements of each node's output.
    """
    few = for_timing(context)
    outcomes = {name: technique.drafted()(model, few) for name, technique in techniques.items()}
    outcomes = {name: outcome for name, outcome in outcomes.items() if outcome.modified}
    context.progress(0, 0, "timing nodes in each precision")
    whole, *found = profiles([model, *(outcome.model for outcome in outcomes.values())], context, feeds)
    costs, size = node_costs(model), file_bytes(model)
    parameters = {cost.name: cost.parameters for cost in costs}
    taken = units.bytes(costs, parameters)
    forms = {FLOAT: FormTimes(None, units.times(whole), frozenset(), whole.untraced, taken, size)}
    for (name, outcome), profile in zip(outcomes.items(), found, strict=True):
        changed = {units.of(change.node) for change in outcome.changes} & set(units.members)
        taken, size = units.bytes(node_costs(outcome.model), parameters), file_bytes(outcome.model)
        forms[name] = FormTimes(techniques[name], units.times(profile), changed, profile.untraced, taken, size)
    return forms, whole.elements


def latency_table(model: ir.Model, context: Context, feeds: Feeds, groups: ChannelGroups | None) -> LatencyTable:
    """Measure a model's table.

    Args:
        model: cleaned up.
        context: target, batch, store; samples for the ranges of static INT8.
        feeds: one run.
        groups: whose widths are timed too.
    """
    techniques: dict[str, Technique] = {
        "static INT8": QuantizeStatic.for_target(context.target),
        "dynamic INT8": QuantizeDynamic.for_target(context.target),
    }
    units = Units(model)
    context = replace(context, data=context.samples(model))
    forms, _ = form_times(model, units, techniques, context, feeds)
    shaped = sized(model, observe(model, feeds).shapes)
    return LatencyTable(
        tuple(_chains(shaped, Units(shaped), forms)),
        () if groups is None else tuple(_widths(groups, forms, context, feeds)),
        tuple(_crossings(crossing(context))) if len(forms) > 1 else (),
        {name: form.layouts for name, form in forms.items()},
    )


def _chains(model: ir.Model, units: Units, forms: Mapping[str, FormTimes]) -> Iterator[LatencyRow]:
    """An entry for each kind of chain, the slowest first."""
    alike: dict[Hashable, list[str]] = defaultdict(list)
    for unit, members in units.members.items():
        if any(form.times.get(unit) for form in forms.values()):
            alike[form_of(model, {node.name or "" for node in members})].append(unit)
    rows = []
    for names in alike.values():
        members = units.members[names[0]]
        weights = [value for value in members[0].inputs if value is not None and value.const_value is not None]
        times = {
            name: statistics.median(form.times.get(unit, 0.0) for unit in names)
            for name, form in forms.items()
            if name == FLOAT or set(names) & form.changed
        }
        rows.append(
            LatencyRow(
                " ".join(node.op_type for node in members),
                _shape(next((v for v in members[0].inputs if v is not None and v.const_value is None), None)),
                _shape(max(weights, key=lambda value: value.const_value.size, default=None)),  # type: ignore[union-attr]
                len(names),
                names[0],
                times,
            )
        )
    return iter(sorted(rows, key=lambda row: -row.count * row.microseconds[FLOAT]))


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    shape = value.const_value.shape if value.const_value is not None else value.shape
    known = None if shape is None else tuple(shape)
    return None if known is None or not all(isinstance(size, int) for size in known) else known  # type: ignore[return-value]


def _widths(
    groups: ChannelGroups, forms: Mapping[str, FormTimes], context: Context, feeds: Feeds
) -> Iterator[WidthRow]:
    """What is left of the time of a group's chains at each of its widths, an entry for each kind of group."""
    cuttable = [worth_timing(group) for group in groups]
    clocks = {}
    for place, (name, form) in enumerate(forms.items()):
        context.progress(place, len(forms), f"timing widths in {name}")
        clocks[name] = LatencyModel(groups, cuttable, context, feeds, form.technique)
    known: dict[Hashable, list[int]] = defaultdict(list)
    for index in range(len(clocks[FLOAT].groups)):
        known[form_of(groups.model, clocks[FLOAT].touched[index])].append(index)
    for alike in known.values():
        group, counts = clocks[FLOAT].groups[alike[0]], clocks[FLOAT].counts[alike[0]]
        for count in counts[1:].tolist():
            shares = {name: float(clock.share(alike[0], count)) for name, clock in clocks.items()}
            yield WidthRow(group.name, group.size, group.size - count, len(alike), shares)


def _crossings(costs: Crossing) -> Iterator[CrossingRow]:
    for size, into, out in zip(costs.sizes, costs.quantize, costs.dequantize, strict=True):
        yield CrossingRow(size, into, out)


def worth_timing(group: ChannelGroup) -> Counts:
    """How many of a group's channels may go, ascending from 0, so that kernels still work in blocks."""
    return may_go(group.size, _LEAST, _MULTIPLE // math.gcd(_MULTIPLE, group.block))


def best_form(forms: Mapping[str, FormTimes]) -> str:
    """The precision in which the whole model takes least."""
    return min(forms, key=lambda name: float(np.sum(list(forms[name].times.values()))))
