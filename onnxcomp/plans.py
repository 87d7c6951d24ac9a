"""Candidates that are planned: branches, widths and precision together, ever nearer to the loss that is allowed."""

import contextlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

import numpy as np

from onnxcomp import placement
from onnxcomp.candidates import NOISE, Candidate, Effort, Workbench
from onnxcomp.errors import OnnxcompError
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.planning import Plan, Planner
from onnxcomp.table import FLOAT
from onnxcomp.weights import NEAREST

PLANNED = ("prune", "prune-depth")
"""Passes whose choices are made together, with those of precision."""
_USUAL_ERROR = 0.012
"""Relative squared error of the outputs that is taken to lose what is allowed, until something is known."""
_TRUST = 0.5
"""How far: like one plan that had this share of that error."""
_AIM = 0.6
"""Share of the loss that is allowed that a plan is to lose: what is measured on samples varies."""
_BEYOND = 1.25
"""How far a neighbour of a plan may go beyond the error that plans are to have: what it loses is measured."""
_STEP = 4.0
"""The most by which what is known changes that error."""


class Plans:
    """Plans for one model, made into candidates.

    Args:
        bench: where they are made.
        clean: the cleaned-up model.
        best: the best without a plan; what it is made by comes behind each plan.
        allowed: names of the passes that may be used.
        effort: how long to fit.

    Attributes:
        best: the best so far, which whoever asks for candidates keeps up to date.
    """

    def __init__(self, bench: Workbench, clean: Candidate, best: Candidate, allowed: Set[str], effort: Effort) -> None:
        self._bench, self._clean, self._base, self._effort, self._behind = bench, clean, best, effort, best.passes
        self.best = best
        self._planner: Planner | None = None
        self._count = 0
        self._known: list[tuple[float, float]] = []
        self._plans: dict[Candidate, Plan] = {}
        try:
            self._planner = self._measured(best, allowed)
        except OnnxcompError as failure:
            bench.trials.append(Candidate("plans", (), best.model, (), verdict=f"not possible: {failure.fact}"))
        if self._planner is not None:
            form = "INT8" if "INT8" in self._planner.forms else FLOAT
            self._share = clean.speedup / best.speedup
            self._planner.learn(self._planner.share(form), self._share)
            self._learn_crossings()
            self._known.append((self._planner.error(best.model), bench.drop(best)))

    def _learn_crossings(self) -> None:
        """From all drafts in static INT8 but for some nodes."""
        assert self._planner is not None
        for trial in self._bench.trials:
            first = trial.passes[0] if len(trial.passes) == 1 else None
            if isinstance(first, QuantizeStatic) and first.keep and trial.speedup:
                self._planner.learn_crossings(set(first.keep), self._clean.speedup / trial.speedup)

    def towards(self, allowed: float, most: int) -> Iterator[Candidate]:
        """Candidates, each planned with what those before it took and lost.

        Between them they are timed beside the best without a plan, and judged.

        Args:
            allowed: loss that a plan may have.
            most: plans; fewer where the next one does not promise to be faster than `best`.
        """
        for _ in range(most):
            found = self._at(_next_error(self._known, allowed), self.best)
            if found is None:
                return
            yield from found

    def polished(self, allowed: float, most: int) -> Iterator[Candidate]:
        """Neighbours of the best plan that promise to be faster within the loss: local search, as far as it helps.

        Args:
            allowed: loss that a plan may have.
            most: candidates.
        """
        tried: set[Plan] = set(self._plans.values())
        for _ in range(most):
            plan = self._plans.get(self.best)
            if plan is None or self._planner is None:
                return
            error = _next_error(self._known, allowed) * _BEYOND
            near = (other for other in self._planner.near(plan) if other.error <= error and other not in tried)
            other = next(near, None)
            if other is None or other.time >= plan.time:
                return
            tried.add(other)
            yield from self._made(other)

    def beyond(self, errors: Sequence[float]) -> Iterator[Candidate]:
        """Candidates whose outputs have about these errors, for a choice between loss and time."""
        for error in errors:
            yield from self._at(error) or ()

    def _at(self, error: float, best: Candidate | None = None) -> Iterator[Candidate] | None:
        """The fastest plan of an error, as a candidate, if it promises to be faster than the best so far."""
        plan = None if self._planner is None else self._planner.plan(error)
        if plan is None or not (plan.branches or plan.widths):
            return None
        if best is not None and self._clean.speedup / plan.time < best.speedup * (1 + NOISE):
            return None
        return self._made(plan)

    def _made(self, plan: Plan) -> Iterator[Candidate]:
        """The plan as a candidate; what it took and lost is learnt."""
        assert self._planner is not None
        behind, passes = self._behind, plan.passes(jointly=self._effort is Effort.EXTENSIVE)
        if behind and isinstance(last := behind[-1], QuantizeStatic | QuantizeDynamic):
            keep, quantized = {*last.keep, *plan.floats}, {unit for unit, form in plan.forms.items() if form != FLOAT}
            with contextlib.suppress(OnnxcompError):  # `make` says why
                left = {node.name or "" for node in self._bench.applied(passes)[0].graph}
                keep, quantized = keep & left, quantized & left
            behind = (*behind[:-1], *([replace(last, keep=tuple(sorted(keep)))] if quantized else []))
        self._count += 1
        name = f"{len(plan.branches)} branches gone and {len(plan.widths)} groups narrower, plan {self._count}"
        trial = self._bench.make(name, (*passes, *behind))
        trial.predicted = self._clean.speedup / plan.time
        self._plans[trial] = plan
        yield trial
        if trial.speedup:
            self._planner.learn(plan.time, self._share * self._base.speedup / trial.speedup)
            self._known.append((self._planner.compare(plan, trial.model), self._bench.drop(trial)))

    def _measured(self, best: Candidate, allowed: Set[str]) -> Planner | None:
        """What can be planned with, if there is anything to choose."""
        context = self._bench.context
        ways = {name: name in allowed for name in PLANNED}
        if context.data is None or not any(ways.values()) or best.speedup <= 0:
            return None
        last = best.passes[-1] if best.passes else None
        quantizers: dict[str, QuantizeStatic | QuantizeDynamic] = {}
        if isinstance(last, QuantizeStatic | QuantizeDynamic):
            quantizers["INT8"] = replace(last, rounding=NEAREST)
        planner = Planner(
            self._clean.model, quantizers, context.data, context, self._bench.batch.feeds, placement.crossing(context),
            prune=ways["prune"], prune_depth=ways["prune-depth"],
        )  # fmt: skip
        if planner.untraced:
            verdict = f"not possible: channels cannot be traced: {planner.untraced}"
            self._bench.trials.append(Candidate("plans", (), best.model, (), verdict=verdict))
        return planner if planner.has_choices else None


def _next_error(known: Sequence[tuple[float, float]], allowed: float) -> float:
    """The error of a plan that is to lose most of what is allowed.

    Losses on samples are noisy, errors are not: losses are taken to be proportional to errors, with the slope that fits
    all of what is known best, the usual error among it.
    """
    points = [(_TRUST * _USUAL_ERROR, _TRUST * allowed), *known]
    slope = sum(error * lost for error, lost in points) / sum(error * error for error, _ in points)
    usual = allowed / _USUAL_ERROR
    return _AIM * allowed / float(np.clip(slope, usual / _STEP, usual * _STEP)) if allowed else 0.0
