"""What could be done to each part of a model, and what that would take and lose, measured before anything is planned.

1. The model is profiled in every precision that the target has kernels for, and again with more and more channels gone:
   the time of each unit, by its precision and by the widths on both its sides.
2. What the outputs lose is measured: without each branch, at a few widths of each group whose narrowing saves time, and
   in each precision, where every unit is taken for an equal part of the loss.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp import model as models
from onnxcomp.branches import Branch, branches, without_branches
from onnxcomp.channels import ChannelGroup, ChannelGroups, channel_groups
from onnxcomp.core import Context, Option, Pass, no_progress
from onnxcomp.cost import node_costs
from onnxcomp.effects import Answers, abroad
from onnxcomp.errors import OnnxcompError
from onnxcomp.executors import mapped
from onnxcomp.latency import LatencyModel
from onnxcomp.numerics.blas import one_thread
from onnxcomp.numerics.choice import undominated
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.program import Row
from onnxcomp.pruning import Pruner
from onnxcomp.reconstruction import reconstruct
from onnxcomp.runtime import Feeds
from onnxcomp.saliency import Aggregate, Criterion
from onnxcomp.samples import Dataset
from onnxcomp.storage import Stored, stored_weights
from onnxcomp.surgery import without
from onnxcomp.table import FLOAT, best_form, form_times, worth_timing
from onnxcomp.units import Units
from onnxcomp.widths import Counts

_SAVES = 0.08
"""Share of a unit's time that a width must save to be worth measuring its loss: less is noise."""
_LITTLE = 0.002
"""Share of the model's time that a part must be able to save, for another pass to be tried on it."""
_ROUNDS = 3
"""Of profiles of models with fewer channels, of five runs each."""
_HOPELESS = 1.8
"""How many times as long as in the best precision a model takes in float, where no width makes float worth it."""
_LEVELS = 4
"""Widths of each group that are timed: all channels, three quarters, half, a quarter."""
_FITTED_LAYERS = 4
"""Behind a branch that goes, which are fitted before it is measured what the outputs lose: a fifth of it or less."""
_FITTED_SAMPLES = 128
_NOTHING = 1e-6
"""Share of the largest error among a part's options that counts as rounding."""
_PROBES = 2
"""Widths of each group at which it is measured what the outputs lose."""


class Appraisal:
    """What is known of a model's parts.

    Args:
        model: cleaned up, in float.
        quantizers: by name, with weights rounded to the nearest; the one that a model is best quantized with first.
        data: to learn from.
        context: target, exclusions, batch.
        feeds: one run at the batch size that counts.
        prune: whether channels may go.
        prune_depth: whether branches may go.
        others: passes whose options for parts of the model are choices too.
        storing: passes whose options for what weights take are, where bytes count.
        sized: whether bytes count beside time.
        unseen: samples on which outputs are compared, as what is fitted to `data` does better on it; `data` if none.

    Attributes:
        model: the same.
        answers: what the model says on a few samples.
        units: its nodes that run as one.
        forms: the precisions, and what the model takes in each.
        elements: of each node's output.
        total: microseconds of the float model.
        form_errors: what the outputs lose by unit in each precision.
        branches: that may go.
        branch_errors: what the outputs lose without each.
        rows: what else can be done.
        makers: the layers that make a group's channels, by its name.
        untraced: why channels could not be traced, so that nothing may go; empty where they could.
        refused: what other passes offer and cannot do, and why.
    """

    def __init__(
        self,
        model: ir.Model,
        quantizers: Mapping[str, QuantizeStatic | QuantizeDynamic],
        data: Dataset,
        context: Context,
        feeds: Feeds,
        *,
        prune: bool,
        prune_depth: bool,
        others: Sequence[Pass] = (),
        storing: Sequence[Pass] = (),
        sized: bool = False,
        unseen: Dataset | None = None,
    ) -> None:
        self.model, self._context, self._data, self._sized = model, context, data, sized
        self._unseen = unseen or data
        self.answers = Answers(model, self._unseen, context)
        self.units = Units(model)
        self.untraced = ""
        known = replace(context, data=data)
        self.forms, self.elements = form_times(model, self.units, quantizers, known, feeds)
        self.total = sum(self.forms[FLOAT].times.values())
        self.form_errors = self._measured_errors(data)
        self._groups = self._traced(data)
        self.makers = {group.name: group.made_by for group in self._groups or ()}
        self.branches = self._found_branches() if prune_depth else []
        self.branch_errors = context.recall(
            "branch errors", (model, known, unseen, prune_depth), self._measured_branches
        )
        self.rows: list[Row] = []
        if prune and self._groups:
            timed = self._timed()
            self.rows += context.recall(
                "width errors",
                (model, known, unseen, [self.forms[name].technique for name in timed], [*self.forms], feeds, sized),
                lambda: list(self._measured_widths(data, feeds, timed)),
            )
        self.refused: list[tuple[str, str]] = []
        best = self.forms[best_form(self.forms)].technique
        measured = [("options", [technique], partial(self._measured_options, technique)) for technique in others]
        measured += [("stored", [*storing], partial(self._measured_storage, storing))] if storing and sized else []
        for what, how, measure in measured:
            rows, refused = context.recall(what, (how, model, known, unseen, [*self.forms], best, sized), measure)
            self.rows += rows
            self.refused += refused

    @property
    def has_choices(self) -> bool:
        """Whether anything can go, or be treated otherwise."""
        return bool(self.branches or self.rows)

    def _measured_errors(self, data: Dataset) -> dict[str, dict[str, float]]:
        """Of the outputs, by unit in each precision: of what the whole loses, every unit takes an equal part."""
        found: dict[str, dict[str, float]] = {FLOAT: {}}
        for name, form in self.forms.items():
            if form.technique is not None:
                made = form.technique(self.model, replace(self._context, data=data)).model
                found[name] = dict.fromkeys(form.changed, self.answers.error(made) / max(len(form.changed), 1))
        return found

    def _traced(self, data: Dataset) -> ChannelGroups | None:
        try:
            return channel_groups(self.model, next(iter(data.batches(1))).feeds)
        except OnnxcompError as error:
            self.untraced = error.fact
            return None

    def _found_branches(self) -> list[Branch]:
        if self._groups is None:
            return []
        names = {value.name: shape for value, shape in self._groups.facts.shapes.items()}
        shapes = {v: names[v.name] for node in self.model.graph for v in node.outputs if v.name in names}
        shapes |= {value: names[value.name] for value in self.model.graph.inputs if value.name in names}
        nodes = {node.name or "": node for node in self.model.graph}
        return [
            branch
            for branch in branches(self.model, shapes)
            if not any(self._context.excludes(nodes[name]) for name in branch.nodes)
        ]

    def _measured_branches(self) -> list[float]:
        context, model = self._context, self.model
        few = self._data.at_most(_FITTED_SAMPLES, context.seed + 1).loaded()  # mostly others than those that judge it
        alone = replace(context, data=None, progress=no_progress, cache={}, store=None, executor=None)
        executor, room = abroad(model, context)
        work = partial(_branch_error, model if executor is None else models.to_bytes(model), self.answers, few, alone)
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
        pruner = Pruner(self._groups, data, self._context, refit=True, answers=self.answers)
        useful = self._timed_widths(self._groups, pruner, data, feeds, timed)
        names = {group.name for group in useful}
        self._context.progress(0, 0, "ranking channels")
        rankings = pruner.rank(Criterion.OBS, Aggregate.MEAN, normalised=True, only=names)
        most = {group: (ranking, int(useful[group][0][-1])) for group, ranking in rankings.items()}
        for group, curve in pruner.curves(most, _PROBES).items():
            counts, shares, touched = useful[group]
            left = self._bytes_left(group, counts, touched) if self._sized else np.ones(len(counts))
            settings = tuple((group.size - counts).tolist())
            yield Row(group.name, settings, curve.errors[counts], shares, dict.fromkeys(self.forms, left), touched)

    def _timed_widths(
        self, groups: ChannelGroups, pruner: Pruner, data: Dataset, feeds: Feeds, timed: Sequence[str]
    ) -> dict[ChannelGroup, tuple[Counts, dict[str, NDArray[np.float64]], set[str]]]:
        """What narrowing saves, for each group where it saves anything in some precision.

        Returns:
            How many channels may go, what is then left of the time of the units that the group touches, by precision,
            and these units. Precisions that are not timed do as the first of those that are.
        """
        cuttable = [worth_timing(group) if group in pruner.cuttable else np.zeros(1, np.int64) for group in groups]
        self._context.progress(0, 0, "timing widths")
        known = replace(self._context, data=data)
        clocks = {
            name: LatencyModel(groups, cuttable, known, feeds, self.forms[name].technique, _ROUNDS, _LEVELS)
            for name in timed
        }
        first = clocks[timed[0]]
        useful = {}
        for index, (group, counts) in enumerate(zip(groups, first.counts, strict=True)):
            keep = np.full(len(counts), self._sized) | (counts == 0)
            shares = {}
            for name, clock in clocks.items():
                shares[name] = own = np.array([clock.share(index, int(count)) for count in counts])
                keep |= _saving(own)
            if keep.sum() > 1:
                by_form = {name: shares.get(name, shares[timed[0]])[keep] for name in self.forms}
                useful[group] = counts[keep], by_form, {self.units.of(name) for name in first.touched[index]}
        return useful

    def _bytes_left(self, group: ChannelGroup, counts: Counts, touched: Set[str]) -> NDArray[np.float64]:
        """Share of their bytes that units have left without some channels of a group, by how many of them."""
        assert self._groups is not None
        parameters = {cost.name: cost.parameters for cost in node_costs(self.model)}
        whole = sum(self.forms[FLOAT].bytes.get(unit, 0) for unit in touched)
        found = []
        for count in counts.tolist():
            cut = without(self._groups, {group: range(count)}) if count else self.model
            left = self.units.bytes(node_costs(cut), parameters)
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
            for option in technique.offered(self.model, context):
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
        try:
            for number in range(1, max((len(row.settings) for row in rows), default=1)):
                technique.taken([row.option(min(number, len(row.settings) - 1)) for row in rows])
        except OnnxcompError as failure:  # plans would take these
            return [], [*refused, (technique.name, failure.fact)]
        return rows, refused

    def _useful(self, options: Sequence[Option]) -> list[Option]:
        """Those that save enough, and to which none is better in error and all that counts."""
        unit, table = self.units.of(options[0].part), self.forms[FLOAT]
        whole, size = table.times.get(unit, 0.0), table.bytes.get(unit, 0)
        least = max(_SAVES, _LITTLE * self.total / whole if whole else 1.0)
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
        """Of what the outputs lose: measured for one option in the middle, and in proportion for the others."""
        probe = _telling(options)
        # On all data: what is fitted to few vectors gives those right, at any rank.
        made = technique.drafted().taking([probe])(self.model, replace(self._context, data=self._data)).model
        errors = _in_proportion(self.answers.error(made), probe, options)
        whole = max(self.forms[FLOAT].bytes.get(self.units.of(probe.part), 0), 1)
        return Row(
            probe.part,
            (0, *(option.setting for option in options)),
            np.array([0.0, *errors]),
            dict.fromkeys(self.forms, np.array([1.0, *(option.latency for option in options)])),
            dict.fromkeys(self.forms, np.array([1.0, *(option.bytes / whole for option in options)])),
            {self.units.of(probe.part)},
            technique,
        )

    def _measured_storage(self, techniques: Sequence[Pass]) -> tuple[list[Row], list[tuple[str, str]]]:
        """In how few bytes passes can store each unit's weight, in the best precision; what they cannot, and why."""
        context, base = replace(self._context, data=self._data), self.forms[best_form(self.forms)]
        model = self.model if base.technique is None else base.technique(self.model, context).model
        few = replace(context, data=self._data.at_most(_FITTED_SAMPLES, context.seed + 1))
        answers = self.answers if model is self.model else Answers(model, self._unseen, context)
        weights = {unit: own[0] for unit, own in stored_weights(model, self.units).items() if len(own) == 1}
        found: dict[str, list[tuple[Pass, Option, float]]] = defaultdict(list)
        refused = []
        for technique in techniques:
            by_part: dict[str, list[Option]] = defaultdict(list)
            context.progress(0, 0, f"looking for what {technique.name} can store")
            try:
                for option in technique.offered(model, few):
                    by_part[option.part].append(option)
            except OnnxcompError as failure:
                refused.append((technique.name, failure.fact))
            for place, (unit, weight) in enumerate(weights.items()):
                context.progress(place, len(weights), f"measuring what {technique.name} loses")
                small = [option for option in by_part[weight.part] if option.bytes < weight.bytes * (1 - _SAVES)]
                if small:
                    probe = _telling(small)
                    try:
                        outcome = technique.drafted().taken([probe])(model, few)
                    except OnnxcompError as failure:
                        refused.append((f"{technique.name} on {weight.part}", failure.fact))
                        continue
                    if outcome.modified:
                        errors = _in_proportion(answers.error(outcome.model), probe, small)
                        found[unit] += [(technique, *pair) for pair in zip(small, errors, strict=True)]
        floats = {unit: own[0].bytes for unit, own in stored_weights(self.model, self.units).items() if len(own) == 1}
        return [self._stored(unit, weights[unit], floats.get(unit), ways) for unit, ways in found.items()], refused

    def _stored(
        self, unit: str, weight: Stored, in_floats: int | None, ways: Sequence[tuple[Pass, Option, float]]
    ) -> Row:
        """The ways to store a weight to which none is better in error and bytes."""
        errors, sizes = (np.array(own) for own in zip(*((error, own.bytes) for _, own, error in ways), strict=True))
        useful = [ways[number] for number in undominated(errors, sizes[:, None])]
        left = {}
        for name, form in self.forms.items():
            whole = max(form.bytes.get(unit, 0), 1)
            others = max(whole - ((in_floats or whole) if name == FLOAT else weight.bytes), 0)  # biases and scales
            left[name] = np.array([1.0, *((others + option.bytes) / whole for _, option, _ in useful)])
        return Row(
            unit,
            (0, *(option.setting for _, option, _ in useful)),
            np.array([0.0, *(error for _, _, error in useful)]),
            dict.fromkeys(self.forms, np.ones(len(useful) + 1)),
            left,
            {unit},
            stored=tuple(technique for technique, _, _ in useful),
        )


def _telling(options: Sequence[Option]) -> Option:
    """One in the middle of those whose error is more than rounding."""
    largest = max(option.error for option in options)
    telling = [option for option in options if option.error >= _NOTHING * largest]
    return telling[len(telling) // 2]


def _in_proportion(lost: float, probe: Option, options: Sequence[Option]) -> list[float]:
    """What the outputs lose by options, in proportion to their errors, where it is known for one of them."""
    return [lost * (option.error / probe.error if probe.error else 1.0) for option in options]


def _saving(shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Of options that take less and less of a time, those that save enough beside the one before them that does."""
    found, last = np.zeros(len(shares), bool), 1.0
    for number, share in enumerate(shares.tolist()):
        if share < last - _SAVES:
            found[number], last = True, share
    return found


@one_thread()
def _branch_error(source: ir.Model | bytes, answers: Answers, data: Dataset, context: Context, branch: Branch) -> float:
    """What the outputs lose where a branch is gone, once the layers behind it make up for it; the same anywhere."""
    model = models.load(source)
    shallower = without_branches(model, [(branch.join, branch.operand)])
    reconstruct(model, shallower, {}, data, context, jointly=False, most=_FITTED_LAYERS)
    return answers.error(shallower)
