"""Finds the fastest candidate within the budget, then makes it smaller.

1. Clean up.
2. Draft every quantization that the target has kernels for, weights rounded to the nearest, with
   those nodes in INT8 that a minimum cut over measured times puts there. All drafts are timed side by side.
3. Refine the fastest: weights rounded with error feedback, judged on the metric. Over budget, nodes return to float,
   the most sensitive first, until it holds.
4. Plan which branches go, how wide layers are and what runs as integers, all together; measure, and plan again.
5. What is still float is stored as integers where that costs neither time nor budget; then weights are shared, made
   sparse or binary, where the user asked for it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from onnxcomp import placement, registry
from onnxcomp.budget import Budget, within
from onnxcomp.candidates import NEAREST, NOISE, Candidate, Effort, Workbench
from onnxcomp.core import Pass
from onnxcomp.drafts import drafts, variants
from onnxcomp.errors import OnnxcompError
from onnxcomp.metrics import Metric
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.planning import FLOAT, Plan, Planner
from onnxcomp.report import Figures
from onnxcomp.sensitivity import ranking

_PLANNED = ("prune", "prune-depth")
"""Passes whose choices are made together, with those of precision."""
_FIRST_ERROR = 0.05
"""Relative squared error of the outputs, before what is left makes up for it, that the first plan may have."""
_STEP = 2.5
"""The most by which the error of the next plan differs from the last one's."""
_AIM = 0.7
"""Share of the loss that is allowed that a plan is to lose: what is measured on samples varies."""


def accepted_drop(metric: Metric, budget: Budget) -> float:
    """The largest loss to accept: the budget's, else a relative error of 0.2, else half a point."""
    default = 0.2 if metric.name.partition(":")[0] == "relative-error" else 0.005
    return default if budget.max_drop is None else budget.max_drop


class Search:
    """The search over candidates of one model.

    Attributes:
        clean: the cleaned-up model, the reference for all others.
        drafted: whether anything beside it could be tried.
        allows_more: whether anything beside it was allowed.
    """

    def __init__(
        self,
        bench: Workbench,
        budget: Budget,
        effort: Effort,
        allowed: frozenset[str],
        original_bytes: int,
        named: Sequence[str] = (),
    ) -> None:
        self._bench, self._budget, self._effort, self._allowed, self._named = bench, budget, effort, allowed, named
        self._limit = self._max_drop = accepted_drop(bench.judges.gate, budget)
        self._original_bytes = original_bytes
        self._has_data = bench.context.data is not None
        self.clean = bench.make("clean-up", ())
        self._unplanned: Candidate | None = None
        self.drafted, self.allows_more = False, bool(allowed - {"simplify"})

    def run(self) -> Candidate:
        """The best candidate."""
        made = drafts(self._bench, self.clean, self._allowed, self._effort, self._named)
        self.drafted = bool(made)
        self._bench.time(self.clean, *made)
        self._bench.drop(self.clean)
        self.clean.verdict = "the reference for all others"
        best = self.clean
        for draft in sorted(made, key=lambda draft: -draft.speedup):
            refined = self._refine(draft) if self._gains(draft, best) else draft
            if refined is not None and self._gains(refined, best):
                best = refined
            elif refined is not None:
                refined.verdict = "not faster beyond noise" if refined.speedup > best.speedup else "not faster"
        planned = self._together(best)
        self._unplanned = None if planned is best else best
        return self._shrink(planned)

    def fallbacks(self, best: Candidate) -> Iterator[Candidate]:
        """What to take instead of a candidate that fails on unseen data.

        The best without a plan, one that loses half as much, then clean-up.
        Not more: the final data would become one more judge.
        """
        if best is self.clean:
            return
        best.verdict = "over the budget on the final data"
        if self._unplanned is not None:
            best = self._shrink(self._unplanned)
            yield best
            if best is self.clean:
                return
            best.verdict = "over the budget on the final data"
        self._max_drop /= 2
        quantized = max((i for i, p in enumerate(best.passes) if _has_nodes(p)), default=None)
        careful = self.clean
        if quantized is not None:
            before = best.passes[: quantized + 1]
            draft = best if before == best.passes else self._bench.make(f"{best.name}, before that", before)
            careful = self._back_off(draft) or self.clean
        careful = self._shrink(careful)
        if careful.passes not in {(), best.passes}:
            yield careful
            careful.verdict = "over the budget on the final data"
        yield self.clean

    def _gains(self, candidate: Candidate, best: Candidate) -> bool:
        """Whether it is faster; of what the user asked for by name, as fast and smaller is enough."""
        return candidate.faster(best) or (candidate.name in self._named and candidate.smaller(best))

    # -- less to compute --------------------------------------------------------------------------------------------

    def _together(self, best: Candidate) -> Candidate:
        """Branches, widths and precision planned together, ever nearer to the loss that the budget allows."""
        try:
            planner = self._planner(best)
        except OnnxcompError as failure:
            self._bench.trials.append(Candidate("plans", (), best.model, (), verdict=f"not possible: {failure.fact}"))
            return best
        if planner is None:
            return best
        behind = best.passes
        form = "INT8" if "INT8" in planner.forms else FLOAT
        planner.learn(planner.share(form), self.clean.speedup / best.speedup)
        loss = max(self._bench.drop(best), 0.0)
        error, known = _FIRST_ERROR, list[tuple[float, float]]()
        for turn in range(max(self._effort.plans, any(ways in self._named for ways in _PLANNED))):
            plan = planner.plan(error)
            if plan is None or not (plan.branches or plan.widths):
                break
            trial = self._planned(plan, behind, turn)
            if not self._bench.works(trial):
                break
            self._bench.time(*dict.fromkeys([self.clean, best, trial]))
            planner.learn(plan.time, self.clean.speedup / trial.speedup)
            trial.predicted = plan.time
            known.append((plan.error, max(self._bench.drop(trial) - loss, 0.0)))
            if self._within(trial) and trial.faster(best):
                best = trial
            elif trial.verdict == "within the budget":
                trial.verdict = "not faster beyond noise"
            error = self._next_error(known, self._max_drop - loss)
        return best

    def _planner(self, best: Candidate) -> Planner | None:
        """Measured, if there is anything to choose."""
        data = self._bench.context.data
        ways = {name: name in self._allowed for name in _PLANNED}
        if data is None or not any(ways.values()) or best.speedup <= 0:
            return None
        last = best.passes[-1] if best.passes else None
        quantizers: dict[str, QuantizeStatic | QuantizeDynamic] = {}
        if isinstance(last, QuantizeStatic | QuantizeDynamic):
            quantizers["INT8"] = replace(last, rounding=NEAREST)
        crossing = placement.measure_crossing(self._bench.context.target)
        planner = Planner(
            self.clean.model, quantizers, data, self._bench.context, self._bench.batch.feeds, crossing,
            prune=ways["prune"], prune_depth=ways["prune-depth"],
        )  # fmt: skip
        return planner if planner.has_choices else None

    def _planned(self, plan: Plan, behind: tuple[Pass, ...], turn: int) -> Candidate:
        """The plan, and then the passes that the best candidate without it has."""
        passes = plan.passes(jointly=self._effort is Effort.EXTENSIVE)
        if behind and isinstance(last := behind[-1], QuantizeStatic | QuantizeDynamic):
            keep = {*last.keep, *plan.floats}
            with contextlib.suppress(OnnxcompError):  # `make` says why
                keep &= {node.name or "" for node in self._bench.applied(passes)[0].graph}
            behind = (*behind[:-1], replace(last, keep=tuple(sorted(keep))))
        passes = (*passes, *behind)
        name = f"{len(plan.branches)} branches gone and {len(plan.widths)} groups narrower, plan {turn + 1}"
        return self._bench.make(name, passes)

    def _next_error(self, known: Sequence[tuple[float, float]], allowed: float) -> float:
        """The error of a plan that is to lose most of what is allowed, by what others lost for theirs."""
        error, lost = known[-1]
        wanted = _AIM * allowed
        return error * min(max(wanted / max(lost, wanted / _STEP), 1 / _STEP), _STEP)

    # -- refining ---------------------------------------------------------------------------------------------------

    def _within(self, candidate: Candidate) -> bool:
        """Whether the budget on the metric holds; the verdict says so."""
        holds = within(self._bench.drop(candidate), self._max_drop)
        candidate.verdict = candidate.verdict or f"{'within' if holds else 'over'} the budget"
        return holds

    def _refine(self, draft: Candidate) -> Candidate | None:
        """The draft with carefully rounded weights, and nodes back in float until it keeps the budget."""
        tried = []
        for name, passes in variants(draft, self._allowed, self._effort, has_data=self._has_data):
            candidate = draft if passes == draft.passes else self._bench.make(name, passes)
            if candidate is not draft:
                draft.verdict = f"refined as '{name}'"
                if not self._bench.works(candidate):
                    continue
            candidate.timing = draft.timing
            if self._within(candidate):
                if len(passes) > len(draft.passes):  # more than other numbers in the same graph
                    self._bench.time(candidate)
                return candidate
            tried.append(candidate)
        return self._back_off(min(tried, key=self._bench.drop)) if tried else None

    def _back_off(self, candidate: Candidate) -> Candidate | None:
        """Return nodes to float, the most sensitive first: as few as keep the budget, by bisection."""
        *before, last = candidate.passes
        if not isinstance(last, QuantizeStatic | QuantizeDynamic):
            return None
        bench = self._bench
        base, _ = bench.applied(tuple(before))
        order = ranking(base, candidate.model, candidate.changed, bench.context.target, bench.batch.feeds)
        low, high = 0, len(order)
        found: Candidate | None = None
        while high - low > 1:
            middle = (low + high) // 2
            keep = tuple(sorted({*last.keep, *order[:middle]}))
            trial = bench.make(
                f"{candidate.name}, {middle} most sensitive nodes in float", (*before, replace(last, keep=keep))
            )
            if bench.works(trial) and self._within(trial):
                found, high = trial, middle
            else:
                low = middle
        if found is not None:
            bench.time(found)
        return found

    # -- shrinking --------------------------------------------------------------------------------------------------

    def _shrink(self, best: Candidate) -> Candidate:
        """Store weights in fewer bits, where that costs no budget; nor time, unless size has a limit.

        What is still float becomes integers; then come the ways that the user asked for by name.
        """
        limit = self._budget.size_limit(self._original_bytes)
        if "quantize-weights" in self._allowed:
            rounding = self._effort.rounding if self._has_data else NEAREST
            storages = {
                f"remaining weights stored in {bits} bits": QuantizeWeights(bits=bits, rounding=rounding)
                for bits in (8, 4)
            }
            best = self._stored(best, best, storages, limit, slower=False)
            if limit is not None and best.size > limit:
                best = self._stored(self.clean, best, storages, limit, slower=True)
        for name in (name for name in self._named if name in registry.STORING):
            technique = registry.passes()[name]()
            # Sessions decode what these store, and then run the same kernels: a difference in time is noise.
            best = self._stored(best, best, {name: technique}, limit, slower=True)
        return best

    def _stored(
        self, base: Candidate, best: Candidate, storages: Mapping[str, Pass], limit: int | None, *, slower: bool
    ) -> Candidate:
        """The best of `base` with its weights stored in one of several ways, as small as the limit on size asks."""
        for how, technique in storages.items():
            name = f"{base.name}, {how}"
            trial = self._bench.make(name, (*base.passes, technique))
            fits = limit is not None and trial.size <= limit
            if not self._bench.works(trial):
                continue
            small = trial.size <= best.size * (1 - NOISE) and trial.size < self._original_bytes
            if not small and not (fits and trial.size < best.size):
                trial.verdict = "not smaller"
                continue
            if not self._within(trial):
                continue
            self._bench.time(best, trial)
            if not slower and trial.speedup < best.speedup * (1 - NOISE):
                trial.verdict = "slower"
                continue
            trial.verdict, best = "smaller", trial
            if limit is None or fits:
                break
        return best

    # -- the budget -------------------------------------------------------------------------------------------------

    def holds(self, drop: float | None) -> bool:
        """Whether the loss on the final data is within the budget."""
        return drop is not None and within(drop, self._limit)

    def unmet(self, result: Figures) -> list[str]:
        """The limits that a result breaks, in words."""
        budget, unmet = self._budget, []
        latency, speedup = result.latency or 0.0, result.speedup or 0.0
        if not self.holds(result.drop):
            unmet.append(f"{self._bench.judges.gate.name} drops by {result.drop:.4g}, more than {self._limit:.4g}")
        if budget.max_latency is not None and latency > budget.max_latency:
            unmet.append(f"latency {latency * 1e3:.3g} ms is above {budget.max_latency * 1e3:.3g} ms")
        if budget.min_speedup is not None and speedup < budget.min_speedup:
            unmet.append(f"speed-up {speedup:.2f}x is below {budget.min_speedup:.2f}x")
        limit = budget.size_limit(self._original_bytes)
        if limit is not None and result.size > limit:
            unmet.append(f"size {result.size:,} bytes is above {limit:,}")
        return unmet


def _has_nodes(technique: object) -> bool:
    """Whether single nodes can be taken back."""
    return isinstance(technique, QuantizeStatic | QuantizeDynamic)
