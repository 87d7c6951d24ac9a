"""What to do to each part of a model, all decided together: branches, widths and precision under one limit on time.

From what is known of the parts (`appraisal`) one program chooses (`numerics.choice`): a branch that goes takes its
units' time with it, whatever their widths; a unit's time depends on its precision and its groups' widths together; a
tensor between two precisions is converted once, however many read it. What a plan really takes and loses is told back
(`learn`, `compare`), and times and errors are rescaled by it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.optimize import least_squares

from onnxcomp.appraisal import Appraisal
from onnxcomp.branches import Operands, spared
from onnxcomp.core import Option, Parts, Pass, Setting, Skip
from onnxcomp.numerics.choice import Clash, Term
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.placement import Crossing
from onnxcomp.program import Program, Row
from onnxcomp.storage import stored_weights
from onnxcomp.table import FLOAT, best_form

_LAYOUT = 2.0
"""What a conversion costs, layouts that kernels before and after it want included, over what it takes by itself, or
more where that was measured."""
_SAYING = 256.0
"""Bytes in which a file says how a weight is stored, until that is known."""
SOURCES = ("branches", "widths", "other passes", "precision")
"""Of errors."""
_USUAL = np.array([0.5, 0.4, 0.4, 1.0])
"""What is left of the errors of each source, added up, once all layers are fitted again."""
_TRUST = 0.1
"""How much that counts beside what was measured: 1 as much as one plan."""
_NEAR = 0.3
"""Difference of the logarithms of two times at which one tells half as much of the other as of itself."""
_FLAT = (0.015 / 0.2) ** 2
"""Standard error of a timing's logarithm beside how it may change with that of the time, squared."""
_FARTHEST = np.log(1000.0)
"""Of a weight's logarithm from the usual one's, at most: an error of nothing at all says that little for others."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do.

    Attributes:
        branches: sums that lose an operand, and which.
        widths: channels left by group.
        others: what other passes do, and where.
        stored: by pass, how weights are stored at last, by unit.
        forms: the precision of each unit that is left.
        error: predicted relative squared error of the outputs.
        sources: what of it, as it was measured part by part, comes from each of `SOURCES`.
        time: predicted, as a share of the float model's.
        bytes: of the file, predicted where they count.
        found: what was chosen for each branch, each row and each unit, by number; also where that changes nothing, as a
            branch takes all with it.
        floats: names of nodes that stay in float although they need not.
    """

    branches: Operands
    widths: tuple[tuple[str, int], ...]
    others: tuple[Pass, ...]
    stored: tuple[tuple[Pass, Parts], ...]
    forms: Mapping[str, str]
    error: float
    sources: tuple[float, ...]
    time: float
    bytes: int
    found: tuple[int, ...]
    floats: tuple[str, ...] = ()

    @property
    def decides(self) -> bool:
        """Whether anything but precision is decided."""
        return bool(self.branches or self.widths or self.others or self.stored)

    def same(self, other: "Plan") -> bool:
        """Whether it does the same, whatever was predicted."""
        return self._done == other._done

    @property
    def _done(self) -> tuple[object, ...]:
        return self.branches, self.widths, self.others, self.stored, self.forms

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
    """Plans for one model, as often as asked.

    Args:
        known: of its parts.
        crossing: conversion times between precisions.

    Attributes:
        branches: that may go.
        forms: the precisions, and what the model takes in each.
    """

    def __init__(self, known: Appraisal, crossing: Crossing | None) -> None:
        self._model, self._makers = known.model, known.makers
        self._crossing, self._answers, self._units = crossing, known.answers, known.units
        self.forms, self._elements, self._total = known.forms, known.elements, known.total
        self.branches, self._branch_errors = known.branches, known.branch_errors
        self._rows, self._form_errors = known.rows, known.form_errors
        self._static = next((n for n, form in self.forms.items() if isinstance(form.technique, QuantizeStatic)), None)
        self._layouts: list[float] = []
        self._timed: list[tuple[float, float]] = []
        self._seen: list[tuple[tuple[float, ...], float]] = []
        self._weights = _USUAL
        self._saying = _SAYING

    # -- the program ------------------------------------------------------------------------------------------------

    def plan(self, error: float, size: float = np.inf, counts: NDArray[np.float64] | float = 1.0) -> Plan | None:
        """The least time for an error of the outputs; None where nothing keeps that, or takes any time.

        Args:
            error: relative squared error that the outputs may have.
            size: bytes that the file may take.
            counts: (sources,) of which each unit of error from a source takes so many.
        """
        if not self._total:
            return None
        found = self._program(counts).solved(error, size - self._rest())
        return None if found is None else self._plan_of(self._program(), found)

    def errors(self, plan: Plan) -> NDArray[np.float64]:
        """(sources,) of a plan, foretold by what is known now."""
        return self._weights * plan.sources

    def again(self, plan: Plan) -> Plan:
        """The same plan, foretold by what is known now."""
        return self._plan_of(self._program(), plan.found)

    def near(self, plan: Plan) -> list[Plan]:
        """The plans that decide otherwise on one branch or one row, the fastest first."""
        program = self._program()
        found = []
        for part in range(len(self.branches) + len(self._rows)):
            for option in range(len(program.errors[part])):
                other = [*plan.found[:part], option, *plan.found[part + 1 :]]
                if program.allows(other):
                    found.append(self._plan_of(program, other))
        return sorted((other for other in found if not other.same(plan)), key=lambda other: other.time)

    def _plan_of(self, program: Program, found: Sequence[int]) -> Plan:
        gone = [branch for place, branch in enumerate(self.branches) if found[place]]
        lost = {self._units.of(name) for branch in gone for name in branch.nodes}
        rows = dict(enumerate(self._rows, len(self.branches)))
        idle = {place for place, row in rows.items() if row.touched <= lost}
        idle |= {place for unit, place in program.units.items() if unit in lost}
        chosen = [(row, found[place]) for place, row in rows.items() if found[place] and place not in idle]
        forms = {unit: program.options[unit][found[place]] for unit, place in program.units.items() if unit not in lost}
        narrow = tuple((row.part, int(row.settings[number])) for row, number in chosen if row.narrows)
        others: dict[Pass, list[Option]] = defaultdict(list)
        stored: dict[Pass, list[tuple[str, Setting]]] = defaultdict(list)
        for row, number in chosen:
            if row.stored:
                stored[row.stored[number - 1]].append((row.part, row.settings[number]))
            elif row.technique is not None:
                others[row.technique].append(row.option(number))
        errors = enumerate(zip(program.errors, found, strict=True))
        losses = [0.0 if place in idle else float(own[number]) for place, (own, number) in errors]
        parts = np.bincount(program.sources, losses, len(SOURCES))
        sources = parts / self._weights
        in_float = tuple(
            node.name or ""
            for unit, form in forms.items()
            if form == FLOAT and len(program.options[unit]) > 1
            for node in self._units.members[unit]
        )
        *times, taken = program.taken(found)
        time, size = self._rescaled(self._parts(*times)), round(taken) + self._rest()
        joins = tuple((branch.join, branch.operand) for branch in gone)
        passes = tuple(technique.taken(options) for technique, options in others.items())
        at_last = tuple((technique, tuple(parts)) for technique, parts in stored.items())
        return Plan(
            joins,
            narrow,
            passes,
            at_last,
            forms,
            sum(losses),
            tuple(sources.tolist()),
            time,
            size,
            tuple(found),
            in_float,
        )

    @property
    def sources(self) -> NDArray[np.bool_]:
        """(sources,) whether there is anything to choose."""
        kinds = {_source(row) for row in self._rows}
        return np.array([bool(self.branches), *(SOURCES.index(name) in kinds for name in SOURCES[1:3]), True])

    def left(self, plan: Plan, technique: Pass) -> list[Skip]:
        """What one of a plan's passes could have treated as well, and what the outputs lose by that alone."""
        if not isinstance(technique, Prune | PruneDepth):
            treated = {part for part, _ in getattr(technique, "parts", ())}
            rows = [row for row in self._rows if row.technique is not None and row.technique.name == technique.name]
            return [
                Skip(row.part, _too_much(f"with '{row.settings[1]}'", row.errors[1]))
                for row in rows
                if row.part not in treated
            ]
        gone = [branch for branch in self.branches if (branch.join, branch.operand) in plan.branches]
        errors = dict(zip(self.branches, self._branch_errors, strict=True))
        found = spared(self._model, self.branches, gone, lambda branch: _too_much("without it", errors[branch]))
        narrow = {maker for part, _ in plan.widths for maker in self._makers[part]}
        treated = narrow.union(*(branch.nodes for branch in gone))
        for row in (row for row in self._rows if row.narrows):
            how = f"with {row.settings[1]} of {row.settings[0]} channels of '{row.part}'"
            makers = [maker for maker in self._makers[row.part] if maker not in treated]
            found += [Skip(maker, _too_much(how, row.errors[1])) for maker in makers]
        return found

    def _program(self, counts: NDArray[np.float64] | float = 1.0) -> Program:
        """What can be chosen, by what is known of times and errors now; errors of each source count as given."""
        raw = [np.array([0.0, lost]) for lost in self._branch_errors] + [row.errors for row in self._rows]
        sources = [0] * len(self.branches) + [_source(row) for row in self._rows]
        rows = dict(enumerate(self._rows, len(self.branches)))
        units: dict[str, int] = {}
        options: dict[str, list[str]] = {}
        for unit in self._units.members:
            options[unit] = [name for name, form in self.forms.items() if name == FLOAT or unit in form.changed]
            units[unit] = len(raw)
            raw.append(np.array([self._form_errors[name].get(unit, 0.0) for name in options[unit]]))
            sources.append(3)
        weights = self._weights * counts
        errors = [weights[source] * own for source, own in zip(sources, raw, strict=True)]
        goes = self._gone_with()
        apart = [
            (first, second)
            for first, second in combinations(range(len(self.branches)), 2)
            if self.branches[first].join == self.branches[second].join  # a sum keeps one operand
        ]
        apart += [pair for pair in combinations(rows, 2) if rows[pair[0]].excludes(rows[pair[1]])]
        terms = [
            Term((part,), np.column_stack([np.zeros(len(own)), own, self._said(rows.get(part), len(own))]))
            for part, own in enumerate(errors[: len(self.branches) + len(rows)])
        ]
        terms += [
            Term(
                (place, *goes[unit], *(other for other, row in rows.items() if unit in row.touched)),
                self._costs(unit, options[unit], errors[place], len(goes[unit])),
            )
            for unit, place in units.items()
        ]
        storing = [place for place, row in rows.items() if row.stored]
        return Program(errors, sources, units, options, terms, self._clashes(units, options), apart, storing)

    def _said(self, row: Row | None, options: int) -> NDArray[np.float64]:
        """(options,) bytes in which a file says how a weight is stored."""
        return np.where(np.arange(options) > 0, self._saying if row is not None and row.stored else 0.0, 0.0)

    def _gone_with(self) -> dict[str, list[int]]:
        """Numbers of the branches that take a unit with them."""
        found: dict[str, list[int]] = defaultdict(list)
        for unit, members in self._units.members.items():
            heads = {node.name for node in members[:1]}
            found[unit] = [place for place, branch in enumerate(self.branches) if heads & branch.nodes]
        return found

    def _costs(self, unit: str, options: Sequence[str], errors: NDArray[np.float64], going: int) -> NDArray[np.float64]:
        """(precisions, *[stays, goes] for each branch, *options of each row, 3) microseconds, error, and bytes."""
        times = np.array([self.forms[name].times.get(unit, 0.0) for name in options])
        sizes = np.array([float(self.forms[name].bytes.get(unit, 0)) for name in options])
        for _ in range(going):
            times, errors, sizes = (costs[..., None] * np.array([1.0, 0.0]) for costs in (times, errors, sizes))
        for row in self._rows:
            if unit in row.touched:
                axes = len(options), *(1,) * (times.ndim - 1), -1
                share, left = (np.stack([each[name] for name in options]) for each in (row.shares, row.left))
                times, sizes = times[..., None] * share.reshape(axes), sizes[..., None] * left.reshape(axes)
                errors = errors[..., None] * np.ones(len(row.settings))
        return np.stack([times, errors, sizes], axis=-1)

    def _rest(self) -> int:
        """Bytes of the file that no unit's constants take."""
        form = self.forms[best_form(self.forms)]
        return form.size - sum(form.bytes.values())

    def _clashes(self, units: Mapping[str, int], options: Mapping[str, list[str]]) -> list[Clash]:
        """Conversions between static INT8 and the rest; other precisions convert within their nodes."""
        if self._static is None or self._crossing is None:
            return []
        found = []
        integers = {unit: np.array([name == self._static for name in names]) for unit, names in options.items()}
        floats = {unit: ~own for unit, own in integers.items()}
        for value in (value for members in self._units.members.values() for value in members[-1].outputs):
            maker = value.producer()
            assert maker is not None
            origin = self._units.of(maker.name or "")
            readers = dict.fromkeys(self._units.of(use.node.name or "") for use in value.uses())
            size = self._elements.get(maker.name or "", 0) or self._elements.get(origin, 0)
            for made, read, to_integers in ((integers, floats, False), (floats, integers, True)):
                cost = np.array([self._layout * self._crossing.cost(size, to_integers=to_integers), 0.0, 0.0])
                others = tuple((units[unit], read[unit]) for unit in readers if unit in units and unit != origin)
                others = tuple(other for other in others if other[1].any())
                if made[origin].any() and others:
                    found.append(Clash((units[origin], made[origin]), others, cost))
        return found

    @property
    def _layout(self) -> float:
        """What a conversion costs over what it takes by itself: the usual, or more where most drafts say so."""
        return max(_LAYOUT, float(np.median(self._layouts or _LAYOUT)))

    # -- what was learnt --------------------------------------------------------------------------------------------

    def share(self, form: str) -> float:
        """Predicted time of the model in one precision, as a share of the float model's.

        What that leaves in float is converted to and fro, as in any plan.
        """
        return self._rescaled(self._share(form))

    def _share(self, form: str) -> float:
        """The same, not rescaled."""
        program = self._program()
        found = [0] * len(program.errors)
        for unit, place in program.units.items():
            found[place] = program.options[unit].index(form) if form in program.options[unit] else 0
        *times, _ = program.taken(found)
        return self._parts(*times)

    def _parts(self, units: float, crossings: float) -> float:
        """What was added up, in microseconds, as a share of the float model's time."""
        return (units + crossings) / self._total if self._total else 1.0

    def _rescaled(self, parts: float) -> float:
        """A time that was added up from parts, as it will be."""
        return parts * self._scale(parts)

    def _scale(self, parts: float) -> float:
        """By how much a time is off that was added up from parts.

        By a line through all that was timed, in logarithms: parts that take their time whatever is done weigh more the
        faster the rest is, never less. What took about as long counts most, and the line is flat where little says
        otherwise.
        """
        if not self._timed or not parts:
            return 1.0
        others, ratios = np.log(np.array(self._timed)).T
        away = others - np.log(parts)
        weights = 1 / (1 + (away / _NEAR) ** 2)
        mean, ratio = np.average([away, ratios], axis=1, weights=weights)
        slope = np.sum(weights * (away - mean) * (ratios - ratio)) / (np.sum(weights * (away - mean) ** 2) + _FLAT)
        return float(np.exp(ratio - min(slope, 0.0) * mean))

    def learn(self, plan: Plan, taken: float) -> None:
        """Rescale times by what a plan took, as a share of the float model's time."""
        *times, _ = self._program().taken(plan.found)
        self._learn(self._parts(*times), taken)

    def _learn(self, parts: float, taken: float) -> None:
        if parts:
            self._timed.append((parts, taken / parts))

    def learn_size(self, plan: Plan, size: int) -> None:
        """Learn what it takes to say in a file how weights are stored, by the bytes of one."""
        if count := sum(len(parts) for _, parts in plan.stored):
            self._saying = max(self._saying + (size - self.again(plan).bytes) / count, 0.0)

    def learn_form(self, form: str, taken: float) -> None:
        """Rescale times by what the model takes in one precision, as a share of the float model's, and nothing else."""
        self._timed = []
        self._learn(self._share(form), taken)

    def learn_crossings(self, kept: Set[str], taken: float) -> None:
        """Learn what it costs to leave integers and come back, by what the model takes with some nodes in float.

        Args:
            kept: names of these nodes.
            taken: share of the float model's time.
        """
        if self._static is None:
            return
        program = self._program()
        found = [0] * len(program.errors)
        for unit, place in program.units.items():
            options = program.options[unit]
            if self._static in options and kept.isdisjoint(node.name or "" for node in self._units.members[unit]):
                found[place] = options.index(self._static)
        units, crossings, _ = program.taken(found)
        if crossings > 0:
            scale = self._scale(self._parts(units, crossings))
            self._layouts.append(self._layout * (taken / scale * self._total - units) / crossings)

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
        """Each source of error gets the weight that fits all that is known best, near the usual one.

        Least squares of logarithms: an error that was foretold a hundred times too low is as wrong as one too high.
        """
        measured = max(self._answers.error(made), 1e-12)
        if any(sources):
            self._seen.append((sources, measured))
        rows = np.array([np.array(own) / error for own, error in self._seen]).reshape(-1, len(_USUAL))

        def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.append(np.log(rows @ np.exp(logs)), np.sqrt(_TRUST) * (logs - np.log(_USUAL)))

        start = np.log(_USUAL)
        self._weights = np.exp(least_squares(residuals, start, bounds=(start - _FARTHEST, start + _FARTHEST)).x)
        return measured

    def left_as_stored(self, plan: Plan, made: ir.Model) -> list[Skip]:
        """Which weights could be stored in fewer bytes, of what a plan made of the model, and what that alone loses."""
        treated = {unit for _, parts in plan.stored for unit, _ in parts}
        names = self.stored_in(made)
        return [
            Skip(names[row.part], _too_much(f"by '{row.settings[1]}'", row.errors[1], "few bytes"))
            for row in self._rows
            if row.stored and row.part in names and row.part not in treated
        ]

    def stored_in(self, made: ir.Model) -> Mapping[str, str]:
        """By unit, the names by which passes know its weight in what became of the model."""
        return {unit: own[0].part for unit, own in stored_weights(made, self._units).items() if len(own) == 1}

    def origin(self, name: str) -> str:
        """The unit of a node of the model, or of what became of it."""
        return self._units.of(name)


def _source(row: Row) -> int:
    """The number of its source of errors: weights in few bytes lose as precision does."""
    return SOURCES.index("widths" if row.narrows else "precision" if row.stored else "other passes")


def _too_much(how: str, error: float, what: str = "little time") -> str:
    """Why something stays that could go."""
    return f"{how} the outputs have a relative squared error of {error:.2g}, too much or for too {what}"
