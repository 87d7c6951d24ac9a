"""Candidates that are planned: branches, widths and precision together, ever nearer to the loss that is allowed."""

import contextlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

from onnxcomp import placement
from onnxcomp.candidates import NEAREST, Candidate, Effort, Workbench
from onnxcomp.errors import OnnxcompError
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.planning import Plan, Planner
from onnxcomp.table import FLOAT

PLANNED = ("prune", "prune-depth")
"""Passes whose choices are made together, with those of precision."""
_FIRST_ERROR = 0.05
"""Relative squared error of the outputs, before what is left makes up for it, that the first plan may have."""
_STEP = 2.5
"""The most by which the error of the next plan differs from the last one's."""
_AIM = 0.7
"""Share of the loss that is allowed that a plan is to lose: what is measured on samples varies."""


class Plans:
    """Plans for one model, made into candidates.

    Args:
        bench: where they are made.
        clean: the cleaned-up model.
        best: the best without a plan; what it is made by comes behind each plan.
        allowed: names of the passes that may be used.
        effort: how long to fit.
    """

    def __init__(self, bench: Workbench, clean: Candidate, best: Candidate, allowed: Set[str], effort: Effort) -> None:
        self._bench, self._clean, self._effort, self._behind = bench, clean, effort, best.passes
        self._planner: Planner | None = None
        self._count = 0
        try:
            self._planner = self._measured(best, allowed)
        except OnnxcompError as failure:
            bench.trials.append(Candidate("plans", (), best.model, (), verdict=f"not possible: {failure.fact}"))
        if self._planner is not None:
            form = "INT8" if "INT8" in self._planner.forms else FLOAT
            self._planner.learn(self._planner.share(form), clean.speedup / best.speedup)
        self._lost = max(bench.drop(best), 0.0)
        self._known: list[tuple[float, float]] = []

    def towards(self, allowed: float, most: int) -> Iterator[Candidate]:
        """Candidates, each planned with what those before it took and lost; between them they are timed and judged.

        Args:
            allowed: loss that a plan may have, that of the best without one included.
            most: plans.
        """
        error = _FIRST_ERROR
        for _ in range(most):
            found = self._at(error)
            if found is None:
                return
            yield from found
            if not self._known:
                return
            error = _next_error(self._known, allowed - self._lost)

    def beyond(self, errors: Sequence[float]) -> Iterator[Candidate]:
        """Candidates whose outputs have about these errors, for a choice between loss and time."""
        for error in errors:
            yield from self._at(error) or ()

    def _at(self, error: float) -> Iterator[Candidate] | None:
        """The fastest plan of an error, as a candidate; what it took and lost is learnt."""
        plan = None if self._planner is None else self._planner.plan(error)
        if plan is None or not (plan.branches or plan.widths):
            return None
        return self._made(plan)

    def _made(self, plan: Plan) -> Iterator[Candidate]:
        assert self._planner is not None
        behind, passes = self._behind, plan.passes(jointly=self._effort is Effort.EXTENSIVE)
        if behind and isinstance(last := behind[-1], QuantizeStatic | QuantizeDynamic):
            keep = {*last.keep, *plan.floats}
            with contextlib.suppress(OnnxcompError):  # `make` says why
                keep &= {node.name or "" for node in self._bench.applied(passes)[0].graph}
            behind = (*behind[:-1], replace(last, keep=tuple(sorted(keep))))
        self._count += 1
        name = f"{len(plan.branches)} branches gone and {len(plan.widths)} groups narrower, plan {self._count}"
        trial = self._bench.make(name, (*passes, *behind))
        trial.predicted = self._clean.speedup / plan.time
        yield trial
        if trial.speedup:
            self._planner.learn(plan.time, self._clean.speedup / trial.speedup)
            self._known.append((plan.error, max(self._bench.drop(trial) - self._lost, 0.0)))

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
        return planner if planner.has_choices else None


def _next_error(known: Sequence[tuple[float, float]], allowed: float) -> float:
    """The error of a plan that is to lose most of what is allowed, by what others lost for theirs."""
    error, lost = known[-1]
    wanted = _AIM * allowed
    return error * min(max(wanted / max(lost, wanted / _STEP), 1 / _STEP), _STEP)
