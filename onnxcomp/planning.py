"""What to do to each part of a model, all decided together: branches, widths and precision under one limit on time.

1. The model is profiled in every precision that the target has kernels for, and again with more and more channels gone:
   the time of each unit, by its precision and by the widths on both its sides.
2. What the outputs lose is measured: without each branch, at a few widths of each group whose narrowing saves time, and
   in each precision, where every unit is taken for an equal part of the loss.
3. One program chooses (`numerics.choice`): a branch that goes takes its units' time with it, whatever their widths; a
   unit's time depends on its precision and its groups' widths together; a tensor between two precisions is converted
   once, however many read it.
4. What a plan really takes and loses is told back (`learn`, `compare`), and times and errors are rescaled by it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.optimize import nnls

from onnxcomp import model as models
from onnxcomp.branches import Branch, branches, without_branches
from onnxcomp.channels import ChannelGroup, ChannelGroups, channel_groups
from onnxcomp.core import Context, Option, Parts, Pass, no_progress
from onnxcomp.cost import node_costs
from onnxcomp.effects import Answers, abroad
from onnxcomp.errors import OnnxcompError
from onnxcomp.executors import mapped
from onnxcomp.latency import LatencyModel
from onnxcomp.numerics.blas import one_thread
from onnxcomp.numerics.choice import Clash, Term, undominated
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.placement import Crossing
from onnxcomp.program import Program, Row, either
from onnxcomp.pruning import Pruner
from onnxcomp.reconstruction import reconstruct
from onnxcomp.runtime import Feeds
from onnxcomp.saliency import Aggregate, Criterion
from onnxcomp.samples import Dataset
from onnxcomp.surgery import without
from onnxcomp.table import FLOAT, best_form, form_times
from onnxcomp.units import Units
from onnxcomp.widths import Counts, may_go

_LEAST = 0.25
"""Share of its channels that every group keeps: fewer lose too much for what they save."""
_MULTIPLE = 4
"""Widths are multiples of this."""
_SAVES = 0.08
"""Share of a unit's time that a width must save to be worth measuring its loss: less is noise."""
_LITTLE = 0.002
"""Share of the model's time that a part must be able to save, for another pass to be tried on it."""
_LAYOUT = 2.0
"""What a conversion costs, layouts that kernels before and after it want included, over what it takes by itself: at
least that, until it was measured."""
_ROUNDS = 2
"""Of profiles of models with fewer channels, of five runs each."""
_HOPELESS = 2.0
"""How many times as long as in the best precision a model takes in float, where no width makes float worth it."""
_LEVELS = 4
"""Widths of each group that are timed: all channels, three quarters, half, a quarter."""
_FITTED_LAYERS = 4
"""Behind a branch that goes, which are fitted before it is measured what the outputs lose: a fifth of it or less."""
_FITTED_SAMPLES = 128
_SOURCES = ("branches", "widths", "other passes", "precision")
"""Of errors."""
_USUAL = np.array([0.8, 0.5, 0.5, 1.0])
"""What is left of the errors of each source, added up, once all layers are fitted again."""
_TRUST = 0.1
"""How much that counts beside what was measured: 1 as much as one plan."""
_PROBES = 2
"""Widths of each group at which it is measured what the outputs lose."""


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        branches: sums that lose an operand, and which.
        widths: channels left by group.
        others: what other passes do, and where.
        forms: the precision of each unit.
        error: predicted relative squared error of the outputs.
        sources: what of it, as it was measured part by part, comes from each of `_SOURCES`.
        time: predicted, as a share of the float model's.
        bytes: of the file, predicted where they count.
        found: what was chosen for each branch, each row and each unit, by number.
        floats: names of nodes that stay in float although they need not.
    """

    branches: Parts
    widths: Parts
    others: tuple[Pass, ...]
    forms: Mapping[str, str] = field(hash=False)
    error: float
    sources: tuple[float, ...]
    time: float
    bytes: int
    found: tuple[int, ...]
    floats: tuple[str, ...] = ()

    @property
    def decides(self) -> bool:
        """Whether anything but precision is decided."""
        return bool(self.branches or self.widths or self.others)

    def same(self, other: "Plan") -> bool:
        """Whether it does the same, whatever was predicted."""
        return self.found == other.found

    def passes(self, *, jointly: bool) -> tuple[Pass, ...]:
        """That make the model shallower and narrower, and do what else is to be done before it is quantized.

        Args:
            jointly: fit the layers of a row together.
        """
        return (
            *([Prune(parts=self.widths, branches=self.branches, jointly=jointly)] if self.widths else []),
            *([PruneDepth(parts=self.branches, jointly=jointly)] if self.branches and not self.widths else []),
            *self.others,
        )


class Planner:
    """Measures a model once, and plans as often as asked.

    Attributes:
        forms: the precisions, and what the model takes in each.
        branches: that may go.
        untraced: why channels could not be traced, so that nothing may go; empty where they could.
        refused: what other passes offer and cannot do, and why.

    Args:
        model: cleaned up, in float.
        quantizers: by name, with weights rounded to the nearest; the one that a model is best quantized with first.
        data: to learn from.
        context: target, exclusions, batch.
        feeds: one run at the batch size that counts.
        crossing: conversion times between precisions.
        prune: whether channels may go.
        prune_depth: whether branches may go.
        others: passes whose options for parts of the model are choices too.
        sized: whether bytes count beside time.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizers: Mapping[str, QuantizeStatic | QuantizeDynamic],
        data: Dataset,
        context: Context,
        feeds: Feeds,
        crossing: Crossing | None,
        *,
        prune: bool,
        prune_depth: bool,
        others: Sequence[Pass] = (),
        sized: bool = False,
    ) -> None:
        self._sized = sized
        self._model, self._context, self._crossing = model, context, crossing
        self._data = data
        self._answers = Answers(model, data, context)
        self._units = Units(model)
        self.untraced = ""
        self._layout = _LAYOUT
        self._ratios: list[float] = []
        self._seen: list[tuple[tuple[float, ...], float]] = []
        self._weights = _USUAL
        self.forms, self.elements = form_times(model, self._units, quantizers, replace(context, data=data), feeds)
        self._total = sum(self.forms[FLOAT].times.values())
        self._form_errors = self._measured_errors(data)
        self._groups = self._traced(data)
        self.branches = self._found_branches() if prune_depth else []
        known = replace(context, data=data)
        self._branch_errors = context.recall("branch errors", (model, known, prune_depth), self._measured_branches)
        self._rows: list[Row] = []
        if prune and self._groups:
            timed = self._timed()
            self._rows += context.recall(
                "width errors",
                (model, known, [self.forms[name].technique for name in timed], [*self.forms], feeds, sized),
                lambda: list(self._measured_widths(data, feeds, timed)),
            )
        self.refused: list[tuple[str, str]] = []
        for technique in others:
            rows, refused = context.recall(
                "options", (technique, model, known, [*self.forms], sized), partial(self._measured_options, technique)
            )
            self._rows += rows
            self.refused += refused

    # -- what is measured -------------------------------------------------------------------------------------------

    def _measured_errors(self, data: Dataset) -> dict[str, dict[str, float]]:
        """Of the outputs, by unit in each precision: of what the whole loses, every unit takes an equal part."""
        found: dict[str, dict[str, float]] = {FLOAT: {}}
        for name, form in self.forms.items():
            if form.technique is not None:
                made = form.technique(self._model, replace(self._context, data=data)).model
                found[name] = dict.fromkeys(form.changed, self._answers.error(made) / max(len(form.changed), 1))
        return found

    def _traced(self, data: Dataset) -> ChannelGroups | None:
        try:
            return channel_groups(self._model, next(iter(data.batches(1))).feeds)
        except OnnxcompError as error:
            self.untraced = error.fact
            return None

    def _found_branches(self) -> list[Branch]:
        if self._groups is None:
            return []
        names = {value.name: shape for value, shape in self._groups.facts.shapes.items()}
        shapes = {v: names[v.name] for node in self._model.graph for v in node.outputs if v.name in names}
        shapes |= {value: names[value.name] for value in self._model.graph.inputs if value.name in names}
        nodes = {node.name or "": node for node in self._model.graph}
        return [
            branch
            for branch in branches(self._model, shapes)
            if not any(self._context.excludes(nodes[name]) for name in branch.nodes)
        ]

    def _measured_branches(self) -> list[float]:
        context, model = self._context, self._model
        few = self._data.at_most(_FITTED_SAMPLES, context.seed + 1).loaded()  # mostly others than those that judge it
        alone = replace(context, data=None, progress=no_progress, cache={}, store=None, executor=None)
        executor, room = abroad(model, context)
        work = partial(_branch_error, model if executor is None else models.to_bytes(model), self._answers, few, alone)
        found: list[float] = []
        for error in mapped(work, self.branches, executor, room):
            found.append(error)
            context.progress(len(found), len(self.branches), "measuring what branches are worth")
        return found

    def _timed(self) -> list[str]:
        """The precisions in which narrower models are timed: the best, and float where that may come to be better."""
        best, times = best_form(self.forms), {name: sum(form.times.values()) for name, form in self.forms.items()}
        return [best] if best == FLOAT or times[FLOAT] > _HOPELESS * times[best] else [best, FLOAT]

    def _measured_widths(self, data: Dataset, feeds: Feeds, timed: Sequence[str]) -> Iterator[Row]:
        """The groups whose narrowing saves time in some precision, and what the outputs lose by it."""
        assert self._groups is not None
        pruner = Pruner(self._groups, data, self._context, refit=True)
        useful = self._timed_widths(self._groups, pruner, data, feeds, timed)
        names = {group.name for group in useful}
        self._context.progress(0, 0, "ranking channels")
        rankings = pruner.rank(Criterion.OBS, Aggregate.MEAN, normalised=True, only=names)
        most = {group: (ranking, int(useful[group][0][-1])) for group, ranking in rankings.items()}
        for group, curve in pruner.curves(most, _PROBES).items():
            counts, shares, touched = useful[group]
            left = self._bytes_left(group, counts, touched) if self._sized else np.ones(len(counts))
            settings = tuple((group.size - counts).tolist())
            yield Row(group.name, settings, curve.errors[counts], shares, left, touched)

    def _timed_widths(
        self, groups: ChannelGroups, pruner: Pruner, data: Dataset, feeds: Feeds, timed: Sequence[str]
    ) -> dict[ChannelGroup, tuple[Counts, dict[str, NDArray[np.float64]], set[str]]]:
        """What narrowing saves, for each group where it saves anything in some precision.

        Returns:
            How many channels may go, what is then left of the time of the units that the group touches, by precision,
            and these units. Precisions that are not timed do as the first of those that are.
        """
        cuttable = [
            may_go(group.size, _LEAST, _MULTIPLE) if group in pruner.cuttable else np.zeros(1, np.int64)
            for group in groups
        ]
        self._context.progress(0, 0, "timing widths")
        known = replace(self._context, data=data)
        clocks = {
            name: LatencyModel(groups, cuttable, known, feeds, self.forms[name].technique, _ROUNDS, _LEVELS)
            for name in timed
        }
        first = clocks[timed[0]]
        useful = {}
        for index, (group, counts) in enumerate(zip(groups, first.counts, strict=True)):
            keep = self._sized | (counts == 0)
            shares = {}
            for name, clock in clocks.items():
                shares[name] = own = np.array([clock.share(index, int(count)) for count in counts])
                keep = keep | (own < np.minimum.accumulate(np.append(1.0, own[:-1])) - _SAVES)
            if keep.sum() > 1:
                by_form = {name: shares.get(name, shares[timed[0]])[keep] for name in self.forms}
                useful[group] = counts[keep], by_form, {self._units.of(name) for name in first.touched[index]}
        return useful

    def _bytes_left(self, group: ChannelGroup, counts: Counts, touched: Set[str]) -> NDArray[np.float64]:
        """Share of their bytes that units have left without some channels of a group, by how many of them."""
        assert self._groups is not None
        parameters = {cost.name: cost.parameters for cost in node_costs(self._model)}
        whole = sum(self.forms[FLOAT].bytes.get(unit, 0) for unit in touched)
        found = []
        for count in counts.tolist():
            cut = without(self._groups, {group: range(count)}) if count else self._model
            left = self._units.bytes(node_costs(cut), parameters)
            found.append(sum(left.get(unit, 0) for unit in touched) / max(whole, 1))
        return np.array(found)

    def _measured_options(self, technique: Pass) -> tuple[list[Row], list[tuple[str, str]]]:
        """What another pass can do to save time, for each part where that is worth it; and what it cannot, and why."""
        context = replace(self._context, data=self._data)
        by_part: dict[str, list[Option]] = defaultdict(list)
        context.progress(0, 0, f"looking for what {technique.name} can do")
        rows, refused = [], []
        failed: dict[str, list[str]] = defaultdict(list)
        try:
            for option in technique.offered(self._model, context):
                by_part[option.part].append(option)
        except OnnxcompError as failure:
            refused.append((technique.name, failure.fact))
        for place, options in enumerate(by_part.values()):
            context.progress(place, len(by_part), f"measuring what {technique.name} loses")
            if useful := self._useful(options):
                try:
                    with technique.answering():
                        rows.append(self._row(technique, useful))
                except OnnxcompError as failure:
                    failed[failure.fact].append(useful[0].part)
        for fact, (first, *others) in failed.items():
            refused.append((f"{technique.name} on {first}{f' and {len(others)} more' if others else ''}", fact))
        return rows, refused

    def _useful(self, options: Sequence[Option]) -> list[Option]:
        """Those that save enough, and to which none is better in error and all that counts."""
        unit, table = self._units.of(options[0].part), self.forms[FLOAT]
        whole, size = table.times.get(unit, 0.0), table.bytes.get(unit, 0)
        least = max(_SAVES, _LITTLE * self._total / whole if whole else 1.0)
        saving = [
            option
            for option in options
            if option.latency <= 1 - least or (self._sized and option.bytes < size * (1 - _SAVES))
        ]
        if not saving:
            return []
        errors = np.array([option.error for option in saving])
        costs = np.array([(option.latency, option.bytes if self._sized else 0) for option in saving])
        return [saving[number] for number in undominated(errors, costs)]

    def _row(self, technique: Pass, options: Sequence[Option]) -> Row:
        """Of what the outputs lose: measured for the option in the middle, and in proportion for the others."""
        probe = options[len(options) // 2]
        # On all data: what is fitted to few vectors gives those right, at any rank.
        made = technique.drafted().taking([probe])(self._model, replace(self._context, data=self._data)).model
        gain = self._answers.error(made) / max(probe.error, 1e-12)
        whole = max(self.forms[FLOAT].bytes.get(self._units.of(probe.part), 0), 1)
        return Row(
            probe.part,
            (0, *(option.setting for option in options)),
            np.array([0.0, *(gain * option.error for option in options)]),
            dict.fromkeys(self.forms, np.array([1.0, *(option.latency for option in options)])),
            np.array([1.0, *(option.bytes / whole for option in options)]),
            {self._units.of(probe.part)},
            technique,
        )

    # -- the program ------------------------------------------------------------------------------------------------

    def plan(self, error: float, size: float = np.inf) -> Plan | None:
        """The least time for an error of the outputs; None where nothing keeps that, or takes any time.

        Args:
            error: relative squared error that the outputs may have.
            size: bytes that the file may take.
        """
        if not self._total:
            return None
        program = self._program()
        found = program.solved(error, size - self._rest())
        return None if found is None else self._plan_of(program, found)

    def near(self, plan: Plan) -> list[Plan]:
        """The plans that decide otherwise on one branch or one row, the fastest first."""
        program = self._program()
        found = []
        for part in range(len(self.branches) + len(self._rows)):
            for option in range(len(program.errors[part])):
                other = [*plan.found[:part], option, *plan.found[part + 1 :]]
                if option != plan.found[part] and program.allows(other):
                    found.append(self._plan_of(program, other))
        return sorted(found, key=lambda other: other.time)

    def _plan_of(self, program: Program, found: Sequence[int]) -> Plan:
        forms = {unit: program.options[unit][found[place]] for unit, place in program.units.items()}
        gone = [branch for place, branch in enumerate(self.branches) if found[place]]
        lost = {self._units.of(name) for branch in gone for name in branch.nodes}
        chosen = [
            (row, number)
            for row, number in zip(self._rows, found[len(self.branches) :], strict=False)
            if number and not row.touched <= lost
        ]
        narrow = tuple((row.part, row.settings[number]) for row, number in chosen if row.technique is None)
        others: dict[Pass, list[Option]] = defaultdict(list)
        for row, number in chosen:
            if row.technique is not None:
                others[row.technique].append(row.option(number))
        losses = [float(own[number]) for own, number in zip(program.errors, found, strict=True)]
        parts = np.bincount(program.sources, losses, len(_SOURCES))
        sources = np.divide(parts, self._weights, out=np.zeros(len(parts)), where=self._weights > 0)
        in_float = tuple(
            node.name or ""
            for unit, form in forms.items()
            if form == FLOAT and len(program.options[unit]) > 1
            for node in self._units.members[unit]
        )
        *times, taken = program.taken(found)
        time, size = sum(times) / self._total * self._scale(), round(taken) + self._rest()
        joins = tuple((branch.join, branch.operand) for branch in gone)
        passes = tuple(technique.taking(options) for technique, options in others.items())
        return Plan(
            joins, narrow, passes, forms, sum(losses), tuple(sources.tolist()), time, size, tuple(found), in_float
        )

    def _program(self) -> Program:
        """What can be chosen, by what is known of times and errors now."""
        raw = [np.array([0.0, lost]) for lost in self._branch_errors] + [row.errors for row in self._rows]
        sources = [0] * len(self.branches) + [1 if row.technique is None else 2 for row in self._rows]
        rows = dict(enumerate(self._rows, len(self.branches)))
        units: dict[str, int] = {}
        options: dict[str, list[str]] = {}
        for unit in self._units.members:
            options[unit] = [name for name, form in self.forms.items() if name == FLOAT or unit in form.changed]
            units[unit] = len(raw)
            raw.append(np.array([self._form_errors[name].get(unit, 0.0) for name in options[unit]]))
            sources.append(3)
        errors = [self._weights[source] * own for source, own in zip(sources, raw, strict=True)]
        goes = self._gone_with()
        nothing = [np.zeros(len(own)) for own in errors]
        terms = [Term((part,), np.column_stack([nothing[part], own, nothing[part]])) for part, own in enumerate(errors)]
        terms += [
            Term((first, second), either(2, 2))  # a sum keeps one operand
            for first, second in combinations(range(len(self.branches)), 2)
            if self.branches[first].join == self.branches[second].join
        ]
        terms += [
            Term((first, second), either(len(raw[first]), len(raw[second])))
            for first, second in combinations(rows, 2)
            if rows[first].excludes(rows[second])
        ]
        terms += [
            Term(
                (units[unit], *goes[unit], *(place for place, row in rows.items() if unit in row.touched)),
                self._costs(unit, options[unit], len(goes[unit])),
            )
            for unit in units
        ]
        return Program(errors, sources, units, options, terms, self._clashes(units, options))

    def _gone_with(self) -> dict[str, list[int]]:
        """Numbers of the branches that take a unit with them."""
        found: dict[str, list[int]] = defaultdict(list)
        for unit, members in self._units.members.items():
            heads = {node.name for node in members[:1]}
            found[unit] = [place for place, branch in enumerate(self.branches) if heads & branch.nodes]
        return found

    def _costs(self, unit: str, options: Sequence[str], going: int) -> NDArray[np.float64]:
        """(precisions, *[stays, goes] for each branch, *options of each row, 3) microseconds, no error, and bytes."""
        times = np.array([self.forms[name].times.get(unit, 0.0) for name in options])
        sizes = np.array([float(self.forms[name].bytes.get(unit, 0)) for name in options])
        for _ in range(going):
            times, sizes = (costs[..., None] * np.array([1.0, 0.0]) for costs in (times, sizes))
        for row in self._rows:
            if unit in row.touched:
                shares = np.stack([row.shares[name] for name in options])
                shares = shares.reshape(len(options), *(1,) * (times.ndim - 1), -1)
                times, sizes = times[..., None] * shares, sizes[..., None] * row.left
        return np.stack([times, np.zeros_like(times), sizes], axis=-1)

    def _rest(self) -> int:
        """Bytes of the file that no unit's constants take."""
        form = self.forms[best_form(self.forms)]
        return form.size - sum(form.bytes.values())

    def _clashes(self, units: Mapping[str, int], options: Mapping[str, list[str]]) -> list[Clash]:
        """Conversions between static INT8 and the rest; other precisions convert within their nodes."""
        static = next((name for name, form in self.forms.items() if isinstance(form.technique, QuantizeStatic)), None)
        if static is None or self._crossing is None:
            return []
        found = []
        is_static = {unit: np.array([name == static for name in names]) for unit, names in options.items()}
        for value in (value for members in self._units.members.values() for value in members[-1].outputs):
            maker = value.producer()
            assert maker is not None
            origin = self._units.of(maker.name or "")
            readers = dict.fromkeys(self._units.of(use.node.name or "") for use in value.uses())
            readers = {unit: None for unit in readers if unit in units and unit != origin}
            size = self.elements.get(maker.name or "", 0) or self.elements.get(origin, 0)
            for inside, integers in ((is_static, False), (None, True)):
                cost = np.array([self._layout * self._crossing.cost(size, to_integers=integers), 0.0, 0.0])
                first = is_static[origin] if inside is not None else ~is_static[origin]
                others = tuple(
                    (units[unit], ~is_static[unit] if inside is not None else is_static[unit]) for unit in readers
                )
                others = tuple(other for other in others if other[1].any())
                if first.any() and others:
                    found.append(Clash((units[origin], first), others, cost))
        return found

    # -- what was learnt --------------------------------------------------------------------------------------------

    def share(self, form: str) -> float:
        """Predicted time of the model in one precision, as a share of the float model's."""
        whole, floats = (sum(self.forms[name].times.values()) for name in (form, FLOAT))
        return self._scale() * whole / floats

    def _scale(self) -> float:
        """By how much times are off: the mean over all that was timed, as each timing is off by several percent."""
        return float(np.exp(np.mean(np.log(self._ratios)))) if self._ratios else 1.0

    def learn(self, predicted: float, taken: float) -> None:
        """Rescale times by what something took, as shares of the float model's time."""
        self._ratios.append(self._scale() * taken / predicted)

    def learn_crossings(self, kept: Set[str], taken: float) -> None:
        """Learn what it costs to leave integers and come back, by what the model takes with some nodes in float.

        Args:
            kept: names of these nodes.
            taken: share of the float model's time.
        """
        program = self._program()
        found = [0] * len(program.errors)
        for unit, place in program.units.items():
            if kept.isdisjoint(node.name or "" for node in self._units.members[unit]):
                found[place] = len(program.options[unit]) - 1
        units, crossings, _ = program.taken(found)
        if crossings > 0:
            self._layout *= max((taken / self._scale() * self._total - units) / crossings, 1.0)

    def compare(self, plan: Plan, made: ir.Model, *, quantized: bool = True) -> float:
        """The error of a plan's outputs, as it is; errors of later plans are rescaled by it.

        Args:
            plan: what was done.
            made: what came of it.
            quantized: whether precision is part of it already. What fitting makes up for is small beside what integers
                lose, and told better before that.
        """
        return self._compared(plan.sources if quantized else (*plan.sources[:-1], 0.0), made)

    def compare_form(self, form: str, made: ir.Model) -> float:
        """The same of the model in one precision, where nothing else was done to it."""
        return self._compared((0.0, 0.0, 0.0, sum(self._form_errors[form].values())), made)

    def _compared(self, sources: tuple[float, ...], made: ir.Model) -> float:
        """Each source of error gets the weight that fits all that is known best: least squares of relative errors.

        The usual ones are where they start.
        """
        measured = max(self._answers.error(made), 1e-12)
        if any(sources):
            self._seen.append((sources, measured))
        rows = [np.array(own) / error for own, error in self._seen]
        prior = np.sqrt(_TRUST) * np.diag(1 / _USUAL)
        values = [*np.ones(len(rows)), *np.full(len(_USUAL), np.sqrt(_TRUST))]
        self._weights = nnls(np.vstack([*rows, prior]), np.array(values))[0]
        return measured

    def origin(self, name: str) -> str:
        """The unit of a node of the model, or of what became of it."""
        return self._units.of(name)

    @property
    def has_choices(self) -> bool:
        """Whether anything can go."""
        return bool(self.branches or self._rows)


@one_thread()
def _branch_error(source: ir.Model | bytes, answers: Answers, data: Dataset, context: Context, branch: Branch) -> float:
    """What the outputs lose where a branch is gone, once the layers behind it make up for it; the same anywhere."""
    model = models.load(source)
    shallower = _without(model, [branch])
    reconstruct(model, shallower, {}, data, context, jointly=False, most=_FITTED_LAYERS)
    return answers.error(shallower)


def _without(model: ir.Model, gone: Sequence[Branch]) -> ir.Model:
    return without_branches(model, [(branch.join, branch.operand) for branch in gone])
