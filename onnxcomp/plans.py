"""Candidates that are planned: branches, widths and precision together, ever nearer to the loss that is allowed."""

import contextlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from onnxcomp import kernels, placement, registry
from onnxcomp.appraisal import Appraisal
from onnxcomp.branches import STAYS
from onnxcomp.budget import within
from onnxcomp.candidates import NOISE, Candidate, Effort, Workbench
from onnxcomp.core import NOT_NAMED, Option, Pass
from onnxcomp.errors import OnnxcompError
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.planning import SOURCES, Plan, Planner
from onnxcomp.report import Step
from onnxcomp.scoring import FloatArray
from onnxcomp.table import FLOAT
from onnxcomp.weights import NEAREST
from onnxcomp.wording import several

PLANNED = ("prune", "prune-depth")
"""Passes whose choices are made together, with those of precision. Those of any other with options can be too."""
_USUAL_ERROR = 0.012
"""Relative squared error of the outputs that is taken to lose what is allowed, until something is known."""
_USUAL_LOSS = 0.005
"""What that is taken to lose where labels tell, whatever is allowed: half a point of accuracy."""
_SCATTER = 0.3
"""Losses of the same error differ by about this share."""
_UNKNOWN_NOISE = 0.25
"""Standard error of a loss, as a share of what is allowed, where the metric tells none."""
_LEAST_NOISE = 0.1
"""The same at least: that two models gave the same answers on some samples does not make their loss certain."""
_AIM = 0.85
"""Share of the loss that is allowed that a plan is to lose."""
_AIM_CAREFUL = 0.6
"""The same where labels are counted, which on other samples lose a third of a point more or less, and where some other
samples have shown that a plan lost more."""
_RETREAT = 0.9
"""Share of what a plan that lost too much could have lost, for the next one to lose: the same samples judge it."""
_LEAST_LOSS = 1e-12
"""Of what lost too much, where even a gain was asked for."""
_WORTH = 1.1
"""How much faster a plan must be than the best, to be followed by one more than planned, even if it lost too much."""
_FAR = 2.0
"""Times the error foretold that the outputs of a plan that lost too much must have, to be followed by one more, too."""
_LESSONS = 2
"""How often plans that lost too much are."""
_BEYOND = 1.25
"""How far a neighbour of a plan may go beyond the error that plans are to have: what it loses is measured."""
_FILLED = 0.97
"""Share of a limit on size that a plan may take: bytes are foretold by parts, and the result gets its recipe."""
_STRETCH = (1.0, 2.0, 4.0)
"""Times the error that plans are to have, that one may have which the limit on size needs."""
_STEP = 4.0
"""The most by which what is known changes that error, from the usual one, the largest that was tried or one that lost
too much."""
_PASSES = 4
"""Over what is known: losses scatter less where their slope is less than the usual one."""
_PRIOR = 0.5 + 0.5 * np.eye(len(SOURCES))
"""Covariance of the logarithms of what errors of each source lose, as long as nothing is known: half of the variance is
the model's, half the source's. A MiniLM lost a third as much to some branches as to widths, a ResNet-56 as much."""
_FAIR = 0.25
"""Share of the largest error of any other source but precision, that one must have had in a plan to have been tried."""
_OPTIONAL = np.array([source != "precision" for source in SOURCES])
"""Sources that a plan can leave alone."""
_NOT = 1000.0
"""Times that errors count of sources which a plan is to leave alone."""
_NO_CHOICE = "nothing was worth measuring here: too little would be saved, or it cannot be done"
"""Why a plan could not take what a pass could have."""


class Plans:
    """Plans for one model, made into candidates.

    Args:
        bench: where they are made.
        clean: the cleaned-up model.
        best: the best without a plan; what it is made by comes behind each plan.
        allowed: names of the passes that may be used.
        effort: how long to fit.
        loss: that a plan may have.
        most: bytes that the result may take; None for no limit.

    Attributes:
        best: the best so far, which whoever asks for candidates keeps up to date.
    """

    def __init__(
        self,
        bench: Workbench,
        clean: Candidate,
        best: Candidate,
        allowed: Set[str],
        effort: Effort,
        loss: float,
        most: int | None = None,
    ) -> None:
        self._loss, self._most = loss, most
        self._bench, self._clean, self._base, self._effort, self._behind = bench, clean, best, effort, best.passes
        self.best = best
        self._planner: Planner | None = None
        self._count = 0
        self._is_root = bench.judges.gate.name.partition(":")[0] == "relative-error"
        self._has_labels = bench.judges.gate.needs == "labels"
        self._known: list[Lost] = []
        self._errors: dict[Candidate, FloatArray] = {}
        self._plans: dict[Candidate, Plan] = {}
        self._failed: list[Candidate] = []
        self._tried = np.zeros(len(SOURCES), bool)
        try:
            self._planner = self._measured(best, allowed)
        except OnnxcompError as failure:
            bench.trials.append(Candidate("plans", (), best.model, (), verdict=f"not possible: {failure.fact}"))
        if self._planner is not None:
            form = "INT8" if "INT8" in self._planner.forms else FLOAT
            self._share = clean.speedup / best.speedup
            self._planner.learn_form(form, self._share)
            self._learn_crossings()
            self._planner.learn_form(form, self._share)  # by what conversions cost
            self._learn_loss(best, np.array([0.0, 0.0, 0.0, self._planner.compare_form(form, best.model)]))

    def _linear(self, loss: float) -> float:
        """A loss that grows with the squared error: the relative error is its root."""
        return loss * loss if self._is_root else loss

    def _learn_loss(self, trial: Candidate, errors: FloatArray) -> None:
        """From what a candidate lost, by the data that judge, at some errors of its outputs by source."""
        loss, noise = self._bench.loss(trial)
        if noise is not None and self._is_root:
            noise *= 2 * loss
        self._known.append(Lost(errors, self._linear(loss), noise))
        self._errors[trial] = errors

    def _slopes(self) -> tuple[FloatArray, FloatArray]:
        """(sources,) what is lost for each unit of error, and the least that it may be."""
        if self._loss <= 0:
            return np.ones(len(SOURCES)), np.ones(len(SOURCES))
        usual = 1.0 if self._is_root else (_USUAL_LOSS if self._has_labels else self._loss) / _USUAL_ERROR
        return losses_per_error(self._known, self._linear(self._loss), usual)

    def _aim(self, share: float = 1.0) -> float:
        """The loss that the next plan is to have: that of the best without one, and most of what is left.

        Args:
            share: of the loss that is allowed.
        """
        allowed = self._linear(share * self._loss)
        base = min(float(self._slopes()[0] @ self._errors[self._base]), allowed)
        return base + (_AIM if share == 1 and not self._has_labels else _AIM_CAREFUL) * (allowed - base)

    def expected(self, trial: Candidate) -> float:
        """The loss that the error of a candidate's outputs suggests, with less noise than what judges has.

        That which was measured, where nothing is known about the error or nothing may be lost.
        """
        if trial not in self._errors or not self._loss:
            return self._bench.loss(trial).value
        lost = float(self._slopes()[0] @ self._errors[trial])
        return float(np.sqrt(lost)) if self._is_root else lost

    def _learn_crossings(self) -> None:
        """From all drafts in static INT8 but for some nodes."""
        assert self._planner is not None
        for trial in self._bench.trials:
            first = trial.passes[0] if len(trial.passes) == 1 else None
            if isinstance(first, QuantizeStatic) and first.keep and trial.speedup:
                self._planner.learn_crossings(set(first.keep), self._clean.speedup / trial.speedup)

    def towards(self, most: int, share: float = 1.0) -> Iterator[Candidate]:
        """Candidates, each planned with what those before it took and lost.

        Between them they are timed beside the best without a plan, and judged.

        Args:
            most: plans, beside those that made `best` much faster, and some that lost too much but are much faster, or
                had errors foretold far too low; fewer where the next one does not promise to be faster.
            share: of the loss that is allowed, that a plan may have.
        """
        if self._planner is None:
            return
        lessons = _LESSONS
        while most > 0:
            found = self._next(share, before := self.best)
            if found is None:
                return
            most -= 1
            for trial in found:
                yield trial
                failed = trial.speedup and not within(self._bench.drop(trial), self._loss)
            if failed:
                self._failed.append(trial)
                far = self._errors[trial].sum() > _FAR * self._plans[trial].error
                if lessons and (far or trial.speedup > self.best.speedup * _WORTH):
                    lessons -= 1
                    most += 1
            if self.best.speedup > before.speedup * _WORTH:
                most += 1

    def _next(self, share: float, best: Candidate) -> Iterator[Candidate] | None:
        """A plan for most of a share of the loss that is allowed, and for less than those had that lost too much.

        Where none for that much is faster than the best, one for as much as those may have had. Of sources that were
        not tried alone, once, if that promises to be faster where they lose the least they may: what they lose can be
        told then, and what else was tried is worth as well.
        """
        assert self._planner is not None
        slopes, hoped = self._slopes()
        new = self._untried()
        if new.any() and share == 1 and best.size <= (self._most or np.inf):
            alone = np.where(new, hoped, np.where(_OPTIONAL, _NOT * slopes, slopes))
            plan = self._promising(self._aim(), alone, best)
            if plan is not None and self._planner.errors(plan)[new].any():
                self._tried |= new
                return self._made(plan)
        enough = min((self._enough(failed, slopes) for failed in self._failed), default=np.inf)
        plan = self._promising(min(self._aim(share), enough), slopes, best)
        if plan is None and share == 1 and self._aim() < enough < np.inf:
            plan = self._promising(enough, slopes, best)
        return None if plan is None else self._made(plan)

    def _untried(self) -> NDArray[np.bool_]:
        """(sources,) whether there is something to choose of which no plan had a fair error.

        Where errors themselves are what may be lost, all sources lose as much by them, and there is nothing to learn.
        """
        if self._planner is None or self._is_root:
            return np.zeros(len(SOURCES), bool)
        most = np.max([lost.errors for lost in self._known], axis=0)
        rare: NDArray[np.bool_] = most < _FAIR * most[_OPTIONAL].max()
        return _OPTIONAL & self._planner.sources & ~self._tried & rare

    def _enough(self, failed: Candidate, slopes: FloatArray) -> float:
        """The loss, foretold as that of a plan that lost too much is now, that may be: a little less than just enough.

        On a line from no loss to what that plan lost or, where that allows for more, from what the best one lost.
        """
        allowed, lost = self._linear(self._loss), max(self._linear(self._bench.drop(failed)), _LEAST_LOSS)
        end = self._again(failed, slopes)
        enough = _RETREAT * max(allowed / lost, 1 / _STEP) * end
        if self.best in self._plans:
            begin, kept = self._again(self.best, slopes), self._linear(max(self._bench.drop(self.best), 0.0))
            if begin < end and kept < lost:
                enough = max(enough, begin + (end - begin) * (_RETREAT * allowed - kept) / (lost - kept))
        return enough

    def _again(self, trial: Candidate, slopes: FloatArray) -> float:
        """The loss of a plan, foretold by what is known now."""
        assert self._planner is not None
        return float(slopes @ self._planner.errors(self._planner.again(self._plans[trial])))

    def polished(self, most: int) -> Iterator[Candidate]:
        """Neighbours of the best plan that promise to be faster within the loss: local search, as far as it helps.

        Args:
            most: candidates.
        """
        for _ in range(most):
            if self._planner is None or self.best not in self._plans:
                return
            plan, (slopes, _) = self._planner.again(self._plans[self.best]), self._slopes()
            near = (other for other in self._planner.near(plan) if not self._is_known(other))
            most_lost = self._aim() * _BEYOND
            other = next((other for other in near if slopes @ self._planner.errors(other) <= most_lost), None)
            if other is None or other.time >= plan.time:
                return
            yield from self._made(other)

    def beyond(self, errors: Sequence[float]) -> Iterator[Candidate]:
        """Candidates whose outputs have about these errors, for a choice between loss and time."""
        for error in errors:
            if (plan := self._promising(error, np.ones(len(SOURCES)))) is not None:
                yield from self._made(plan)

    def _promising(self, loss: float, slopes: FloatArray, best: Candidate | None = None) -> Plan | None:
        """The fastest plan for a loss by some slopes, if it promises to be faster than the best so far.

        The first one is made in any case: by what fitting makes up for in it, the next ones are planned. Under a limit
        on size, one that keeps it if there is any. Where the best does not, that need not be faster, and may have a
        larger error: what it loses is measured.
        """
        if self._planner is None:
            return None
        plan = self._small(loss, slopes, best)
        needed = plan is not None and best is not None and best.size > (self._most or 0)
        plan = plan or self._planner.plan(loss, counts=slopes)
        if plan is None or not plan.decides or self._is_known(plan):
            return None
        promises = best is None or plan.time * (1 + NOISE) <= self._foretold(best)
        return plan if promises or needed or not self._plans else None

    def explained(self, made: Candidate) -> tuple[Step, ...]:
        """What each pass did to a candidate, and why its plan left the rest, where passes only say that it did."""
        found = (
            (trial, plan) for trial, plan in self._plans.items() if made.passes[: len(trial.passes)] == trial.passes
        )
        trial, plan = next(found, (made, None))
        if self._planner is None or plan is None:
            return made.steps
        steps = list(made.steps)
        first = len(steps) - len(made.passes)
        for place, technique in enumerate(trial.passes, first):
            if technique.stores:
                left = self._planner.left_as_stored(plan, self._bench.applied(trial.passes[: place - first])[0])
            else:
                left = self._planner.left(plan, technique)
            known = {(skip.node, STAYS in skip.reason) for skip in left}
            unnamed = [skip for skip in steps[place].skips if skip.reason.endswith(NOT_NAMED)]
            told = {skip for skip in unnamed if (skip.node, STAYS in skip.reason) in known}
            others = [skip for skip in steps[place].skips if skip not in told]
            others = [replace(skip, reason=_NO_CHOICE) if skip.reason == NOT_NAMED else skip for skip in others]
            steps[place] = replace(steps[place], skips=(*others, *left))
        return tuple(steps)

    def _is_known(self, plan: Plan) -> bool:
        """Whether a candidate does the same."""
        return any(plan.same(other) for other in self._plans.values())

    def _foretold(self, best: Candidate) -> float:
        """What the best takes, as a share of the float model's time: of a plan, what is foretold by what is known now.

        A plan is compared with its like: what is measured has noise, and may be off for both in the same way.
        """
        if self._planner is not None and best in self._plans:
            return self._planner.again(self._plans[best]).time
        return self._share * self._base.speedup / best.speedup

    def _small(self, loss: float, slopes: FloatArray, best: Candidate | None) -> Plan | None:
        """The fastest plan within the limit on size, if there is one."""
        if self._planner is None or self._most is None:
            return None
        losses = [loss * more for more in _STRETCH] if best is not None and best.size > self._most else [loss]
        return next(filter(None, (self._planner.plan(each, _FILLED * self._most, slopes) for each in losses)), None)

    def _made(self, plan: Plan) -> Iterator[Candidate]:
        """The plan as a candidate; what it took and lost is learnt."""
        assert self._planner is not None
        passes = plan.passes(jointly=self._effort is not Effort.QUICK)
        behind = self._quantized(plan, passes)
        self._count += 1
        stored = tuple(self._stored(plan, (*passes, *behind)))
        trial = self._bench.make(f"plan {self._count}: {_in_words(plan)}", (*passes, *behind, *stored))
        trial.predicted = self._predicted(plan)
        self._plans[trial] = plan
        self._planner.learn_size(plan, trial.size)
        yield trial
        if trial.speedup:
            trial.predicted = self._predicted(plan)
            self._planner.learn(plan, self._share * self._base.speedup / trial.speedup)
            if behind or stored:
                self._planner.compare(plan, self._bench.applied(passes)[0], quantized=False)
            error = self._planner.compare(plan, trial.model)
            foretold = self._planner.errors(plan)
            self._learn_loss(trial, error * foretold / foretold.sum() if foretold.any() else foretold)

    def _predicted(self, plan: Plan) -> float:
        """The speed-up that a plan promises, from that of the best without one, which is timed beside it.

        What integers gain over float drifts by a tenth within minutes on some machines: what is foretold is what the
        plan gains beside that.
        """
        return self._base.speedup * self._share / plan.time

    def _quantized(self, plan: Plan, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        """What follows a plan's passes: that which made the best without a plan, on the nodes that the plan says."""
        assert self._planner is not None
        *before, last = self._behind or (None,)
        if not isinstance(last, QuantizeStatic | QuantizeDynamic):
            return self._behind
        keep, quantized = {*last.keep, *plan.floats}, {unit for unit, form in plan.forms.items() if form != FLOAT}
        with contextlib.suppress(OnnxcompError):  # `make` says why
            narrow, _ = self._bench.applied(passes)
            left = {node.name or "" for node in narrow.graph}
            new = left - {node.name for node in self._clean.model.graph}  # what became of a layer is where it was
            keep = (keep & left) | {name for name in new if self._planner.origin(name) in keep}
            last = replace(last, keep=tuple(sorted(keep)))
            if not any(self._planner.origin(name) in quantized for name in left):
                return tuple(before)
            if isinstance(last, QuantizeStatic) and last.as_gemm:
                last = kernels.with_fastest(narrow, last, self._bench.context, self._bench.batch.feeds)
        return (*before, last)

    def _stored(self, plan: Plan, passes: tuple[Pass, ...]) -> Iterator[Pass]:
        """How weights are stored at last, by the names that they have in what other passes made."""
        assert self._planner is not None
        with contextlib.suppress(OnnxcompError):  # `make` says why
            names = self._planner.stored_in(self._bench.applied(passes)[0]) if plan.stored else {}
            for technique, parts in plan.stored:
                options = [Option(names[unit], setting, 0.0, 0) for unit, setting in parts if unit in names]
                if options:  # of none all would be stored
                    yield technique.taken(options)

    def _measured(self, best: Candidate, allowed: Set[str]) -> Planner | None:
        """What can be planned with, if there is anything to choose."""
        context, sized = self._bench.context, self._most is not None
        ways = {name: name in allowed for name in PLANNED}
        others = [technique() for technique in optional(allowed - {technique.name for technique in best.passes})]
        storing = [registry.named(name)() for name in sorted(allowed & registry.storing()) if sized]
        if context.data is None or not (any(ways.values()) or others or storing) or best.speedup <= 0:
            return None
        last = best.passes[-1] if best.passes else None
        quantizers: dict[str, QuantizeStatic | QuantizeDynamic] = {}
        if isinstance(last, QuantizeStatic | QuantizeDynamic):
            quantizers["INT8"] = replace(last, rounding=NEAREST)
        known = Appraisal(
            self._clean.model, quantizers, context.data, context, self._bench.batch.feeds,
            prune=ways["prune"], prune_depth=ways["prune-depth"], others=others, storing=storing,
            sized=sized, unseen=self._bench.judges.judge,
        )  # fmt: skip
        untraced = [("plans", f"channels cannot be traced: {known.untraced}")] if known.untraced else []
        for name, reason in [*untraced, *known.refused]:
            self._bench.trials.append(Candidate(name, (), best.model, (), verdict=f"not possible: {reason}"))
        return Planner(known, placement.crossing(context)) if known.has_choices else None


def optional(names: Set[str]) -> list[type[Pass]]:
    """The passes of some names that offer options for parts of a model, and may save time by them."""
    able = names - {*PLANNED} - registry.storing()
    return [kind for name, kind in registry.passes().items() if name in able and kind.offers_options()]


def _in_words(plan: Plan) -> str:
    """What it does, without precision."""
    branches, groups = len(plan.branches), len(plan.widths)
    said = [f"{several(branches, 'branch', 'branches')} gone"] if branches else []
    said += [f"{several(groups, 'group')} narrower"] if groups else []
    for technique in plan.others:
        parts = len(getattr(technique, "parts", ()))
        said.append(f"{technique.name} on {several(parts, 'part')}")
    said += [f"{technique.name} of {several(len(parts), 'weight')}" for technique, parts in plan.stored]
    return ", ".join(said)


@dataclass(frozen=True, eq=False)
class Lost:
    """What was lost at some error of the outputs.

    Attributes:
        errors: (sources,) relative squared errors, which add up.
        loss: that grows with them.
        noise: standard error of the loss; None where it is not known.
    """

    errors: FloatArray
    loss: float
    noise: float | None


def losses_per_error(known: Sequence[Lost], allowed: float, usual: float) -> tuple[FloatArray, FloatArray]:
    """The slopes that are most likely, if losses are proportional to the errors of each source.

    Errors are free of noise, losses on samples are not: each counts by its variance, and so do the slopes that are
    taken until something is known, which are alike (maximum a posteriori, logarithms of slopes being normal).

    Args:
        known: what was measured.
        allowed: loss, which sets the scale of a noise that is not known.
        usual: slope to start with.

    Returns:
        (sources,) slopes, and the same less the standard errors of their logarithms.
    """
    finite = [lost for lost in known if np.isfinite(lost.loss)]
    errors = np.array([lost.errors for lost in finite]).reshape(-1, len(SOURCES))
    losses = np.array([lost.loss for lost in finite])
    noises = [_UNKNOWN_NOISE * allowed if lost.noise is None else lost.noise for lost in finite]
    noise = np.maximum(noises, _LEAST_NOISE * allowed)
    farthest = errors.sum(axis=1).max(initial=0.0)
    least = min(usual, allowed / farthest if farthest else usual) / _STEP
    bounds = np.log(least), np.log(usual * _STEP)
    start = logs = np.full(len(SOURCES), np.log(usual))
    whitening = np.linalg.cholesky(np.linalg.inv(_PRIOR)).T
    for _ in range(_PASSES):
        scale = np.hypot(noise, _SCATTER * errors @ np.minimum(np.exp(logs), usual))
        scaled, wanted = errors / scale[:, None], losses / scale

        def residuals(logs: FloatArray, scaled: FloatArray = scaled, wanted: FloatArray = wanted) -> FloatArray:
            return np.append(scaled @ np.exp(logs) - wanted, whitening @ (logs - start))

        def jacobian(logs: FloatArray, scaled: FloatArray = scaled) -> FloatArray:
            return np.vstack([scaled * np.exp(logs), whitening])

        logs = least_squares(residuals, np.clip(logs, *bounds), jacobian, bounds).x
    slopes, rows = np.exp(logs), jacobian(logs)
    return slopes, np.maximum(slopes * np.exp(-np.sqrt(np.diag(np.linalg.inv(rows.T @ rows)))), least)
