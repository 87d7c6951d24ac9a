"""Finds the fastest candidate within the budget, then makes it smaller.

1. Clean up; keep sums apart from normalizations where the kernel that both would be fused into is slower.
2. Draft every quantization that the target has kernels for, weights rounded to the nearest, with
   those nodes in INT8 that a minimum cut over measured times puts there. All drafts are timed side by side.
3. Refine the fastest: weights rounded with error feedback, judged on the metric. Over budget, nodes return to float,
   the most sensitive first, until it holds.
4. Time that again, where the fastest of several may have had luck. Plan which branches go, how wide layers are and
   what runs as integers, all together; measure, and plan again. With time for it, look at the best plan's neighbours
   too.
5. What is still float is stored as integers where that costs neither time nor budget; where a limit on size needs
   four bits and these lose too much, the most sensitive nodes have eight. Then weights are shared, made sparse or
   binary, where the user asked for it; under a limit on size plans did so already, as far as it needs.
6. What shows no clear gain is timed at length, and gives way to what it was made of if it is slower than the original.
   Nothing larger than the original is kept unless a limit on size allows for that; at last there is the original.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise, product

import numpy as np
import onnx_ir as ir

from onnxcomp import kernels, registry
from onnxcomp.budget import Budget, Check, within
from onnxcomp.candidates import NOISE, Candidate, Effort, Workbench
from onnxcomp.core import Pass
from onnxcomp.drafts import drafts, variants
from onnxcomp.metrics import Metric
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.unfuse import Unfuse
from onnxcomp.plans import PLANNED, Plans, optional
from onnxcomp.report import Figures, Step
from onnxcomp.sensitivity import ranking
from onnxcomp.weights import NEAREST
from onnxcomp.wording import several

_BITS = (8, 4)
"""In which weights are stored that are still float; the first alone where nothing tells accuracy and no limit asks."""
_UNTOLD = 0.02
"""The relative error up to which channels and branches go, beside what else is done, where nothing tells accuracy and
the user named no limit: a detector lost one face of seven at 0.04, and nine of ten within 0.2."""
_LITTLE = 0.003
"""Share of its bytes that clean-up must save to be worth anything by that alone; less is names and metadata."""
_AT_LENGTH = 4
"""Times as many rounds, where a few leave open which of two is faster."""
_LUCK = 1.15
"""How many times as fast as all others one may seem that is not."""
_RUNGS = (0.25, 0.5)
"""Shares of the nodes in INT8 that return to float, for a choice."""
_ERRORS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Of outputs, at which plans are made for a choice."""


def accepted_drop(metric: Metric, budget: Budget) -> float:
    """The largest loss to accept: the budget's, else a relative error of 0.2, else half a point."""
    default = 0.2 if metric.name.partition(":")[0] == "relative-error" else 0.005
    return default if budget.max_drop is None else budget.max_drop


class Search:
    """The search over candidates of one model.

    Attributes:
        clean: the cleaned-up model, the reference for all others.
        best: the best candidate so far.
        plans: what made candidates of plans, if anything did.
        asked: the budget, with a limit on the drop in any case.
        drafted: whether anything beside it could be tried.
        allows_more: whether anything beside it was allowed.
        allows_integers: whether quantization was.
    """

    def __init__(
        self,
        bench: Workbench,
        budget: Budget,
        effort: Effort,
        allowed: frozenset[str],
        original: Figures,
        named: Sequence[str] = (),
    ) -> None:
        self._bench, self._budget, self._effort, self._allowed, self._named = bench, budget, effort, allowed, named
        self._max_drop = accepted_drop(bench.judges.gate, budget)
        self.asked = replace(budget, max_drop=self._max_drop)
        self._original = original
        self._has_data = bench.context.data is not None
        self.best = self.clean = bench.make("clean-up", ())
        self.plans: Plans | None = None
        self._unplanned: Candidate | None = None
        self._allowed_to_plans = self._max_drop
        self._sound: list[Candidate] = []  # faster than clean-up, and within all limits by the judging data
        self.drafted, self.allows_more = False, bool(allowed - {*registry.GROUPS["clean-up"]})
        self.allows_integers = not allowed.isdisjoint(registry.GROUPS["quantize"])

    def run(self) -> Candidate:
        """The best candidate that the time allows."""
        with self._bench.deadline:
            self._unfuse()
            self._draft()
            self._plan()
            made = [self.clean, self.best]
            for smaller in self._smaller(self.best):
                made.append(smaller)
                self.best = smaller
            for safer in self._safer(made):
                self.best = safer
        if self.best is self.clean and self._bench.deadline.passed:
            self.best = self._unjudged()
        return self._plain() if self.best is self.clean else self.best

    def _unjudged(self) -> Candidate:
        """The fastest that no time was left to judge, for the final data to judge; else clean-up."""
        timed = [
            trial
            for trial in self._bench.trials
            if trial.passes and trial.drop is None and trial.faster(self.clean) and not self._larger(trial)
        ]
        return self.clean if self._budget.limits_memory else max(timed, key=lambda t: t.speedup, default=self.clean)

    def _plain(self) -> Candidate:
        """Clean-up, or the model as it was where that gains nothing, or made it slower or larger."""
        clean, size = self.clean, self._original.size
        needed = self._needs(clean, size)
        if not clean.changed:
            fault = "nothing to change" if clean.steps else clean.verdict
        elif clean.loses_time and not needed:
            fault = "slower than the original"
        elif self._larger(clean):
            fault = "larger than the original"
        elif clean.timing and not clean.gains_time and not needed and clean.size > size * (1 - _LITTLE):
            fault = "neither faster nor smaller"
        else:
            return clean
        clean.verdict = fault
        return self._bench.untouched(size)

    def fallbacks(self, failed: Candidate) -> Iterator[Candidate]:
        """What to take instead of a candidate that fails on unseen data.

        The fastest that loses half as much, the best without a plan with nodes back in float until it does, then
        clean-up, or the model as it was. Not more: the final data would become one more judge.
        """
        for make in (self._gentler, self._careful):
            if not failed.passes:
                return
            failed.verdict = "over the budget on the final data"
            best = None
            with self._bench.deadline:
                for better in make(failed):
                    best = better
                if best is not None:
                    best = self._shrink(best)
            if best is not None and best.passes not in {(), failed.passes}:
                yield best
                failed = best
        failed.verdict = "over the budget on the final data"
        yield self._plain()

    def _gentler(self, failed: Candidate) -> Iterator[Candidate]:
        """The fastest that is to lose half of what is allowed at most, else without a plan; then a plan for that loss.

        By what the errors of outputs suggest where those are known: one part of the data proved too noisy a judge.
        """
        lost = self._bench.drop if self.plans is None else self.plans.expected
        gentle = [
            trial
            for trial in self._sound
            if within(lost(trial), self._allowed_to_plans / 2)
            and failed.passes[: len(trial.passes)] != trial.passes  # what failed, or was made into it
        ]
        best = max(gentle, key=lambda trial: trial.speedup, default=self._unplanned)
        if best is None:
            return
        yield best
        if self.plans is not None:
            self.plans.best = best
            for trial in self.plans.towards(1, share=0.5):
                if self._sounds(trial, best) and self._gains(trial, best):
                    yield trial

    def _careful(self, _: Candidate) -> Iterator[Candidate]:
        """One that loses half as much: the best without a plan, with nodes back in float."""
        self._max_drop /= 2
        passes = self._unplanned.passes if self._unplanned is not None else self.best.passes
        quantized = max((place for place, technique in enumerate(passes) if _has_nodes(technique)), default=None)
        if quantized is None:
            return
        before = passes[: quantized + 1]
        known = next((trial for trial in self._bench.trials if trial.passes == before), None)
        found = self._back_off(known or self._bench.make("before what followed", before))
        if found is not None:
            yield found

    def _unfuse(self) -> None:
        """Clean up with sums apart from normalizations, where the target's kernels are faster so."""
        bench = self._bench
        if "unfuse" in self._allowed and kernels.fuses_slowly(self.clean.model, bench.context, bench.batch.feeds):
            bench.trials.remove(self.clean)
            bench.begin_with(Unfuse())
            self.best = self.clean = bench.make("clean-up", ())

    def _draft(self) -> None:
        """Every quantization as a draft, and the fastest refined."""
        made = drafts(self._bench, self.clean, self._allowed, self._effort, self._named)
        self.drafted = bool(made)
        if made or self.clean.changed or (self.allows_more and self._bench.deadline.limited):
            self._bench.time(self.clean, *made)  # where time is limited, also to know what the proof will take
        self._bench.drop(self.clean)
        self.clean.verdict = "the reference for all others"
        for draft in sorted(made, key=lambda draft: -draft.speedup):
            refined = self._refine(draft) if self._gains(draft, self.best) else draft
            if refined is not None and self._gains(refined, self.best):
                self.best = refined
                self._sound.append(refined)
            elif refined is not None and self._larger(refined):
                refined.verdict = "larger than the original"
            elif refined is not None:
                refined.verdict = "not faster beyond noise" if refined.speedup > self.best.speedup else "not faster"

    def _plan(self) -> None:
        """Branches, widths and precision together."""
        limit = self._budget.size_limit(self._original.size)
        planned = {*PLANNED, *(technique.name for technique in optional(self._allowed))}
        planned |= set() if limit is None else registry.storing()
        most = max(self._effort.plans, any(way in self._named for way in planned))
        if not most or not self._allowed & planned:
            return
        unplanned = self._again(self.best)
        if self._untold:
            self._allowed_to_plans = min(self._max_drop, float(np.hypot(self._bench.drop(unplanned), _UNTOLD)))
        self.plans = Plans(
            self._bench, self.clean, unplanned, self._allowed, self._effort, self._allowed_to_plans, limit
        )
        polished = self.plans.polished(most if self._effort is Effort.EXTENSIVE else 0)
        for trial in chain(self.plans.towards(most), polished):
            if not self._sounds(trial, unplanned, self.best):
                continue
            fits, known = (limit is None or each.size <= limit for each in (trial, self.best))
            if fits and self._gains(trial, self.clean):
                self._sound.append(trial)
            if fits > known or (fits == known and self._gains(trial, self.best)):
                self.best, self._unplanned = trial, unplanned
                self.plans.best = trial
            else:
                trial.verdict = "not faster beyond noise" if fits == known else "above the limit on size"

    def _again(self, best: Candidate) -> Candidate:
        """The best, timed again where luck may have made it that; clean-up where it then gains nothing."""
        others = [trial for trial in self._bench.trials if trial.timing not in {None, best.timing}]
        if best.timing is not None and all(best.timing.speedup_low > _LUCK * other.speedup for other in others):
            return best
        self._bench.time(*dict.fromkeys([self.clean, best]))
        if best is not self.clean and not self._gains(best, self.clean):
            best.verdict = "not faster beyond noise when timed again"
            self._sound.remove(best)
            self.best = self.clean
        return self.best

    def _sounds(self, trial: Candidate, *others: Candidate) -> bool:
        """Whether a plan runs and loses little enough; it is timed beside others."""
        if not self._bench.works(trial):
            return False
        self._bench.time(*dict.fromkeys([*others, trial]))
        if not self._within(trial):
            return False
        if not within(self._bench.drop(trial), self._allowed_to_plans):
            allowed = f"{self._allowed_to_plans:g}"
            trial.verdict = f"an error above {allowed}, and nothing tells what that means for accuracy"
            return False
        return True

    def explained(self, made: Candidate) -> tuple[Step, ...]:
        """What each pass did to a candidate, and why not more."""
        return made.steps if self.plans is None else self.plans.explained(made)

    def others(self) -> list[Candidate]:
        """All candidates that run and were timed and judged, more of them made for a choice."""
        with self._bench.deadline:
            more = [trial for trial in self._more() if self._bench.works(trial)]
            self._bench.time(*more)
            for trial in more:
                self._within(trial)
        return [
            trial
            for trial in self._bench.trials
            if trial.timing is not None and trial.drop is not None and trial.model is not self._bench.model
        ]

    def _more(self) -> Iterator[Candidate]:
        """Plans of other errors, fewer nodes in INT8, and weights in fewer bits."""
        known = {trial.passes for trial in self._bench.trials}
        quantized = next((trial for trial in (self._unplanned, self.best) if trial is not None), self.clean)
        *before, last = quantized.passes or (None,)
        if isinstance(last, QuantizeStatic | QuantizeDynamic):
            base, _ = self._bench.applied(tuple(before))
            order = self._order(base, quantized)
            for share in _RUNGS:
                keep = tuple(sorted({*last.keep, *order[: round(share * len(order))]}))
                yield self._bench.make(
                    f"{quantized.name}, {share:.0%} of its nodes in float", (*before, replace(last, keep=keep))
                )
        if "quantize-weights" in self._allowed:
            for basis, bits in product((self.best, self.clean), _BITS):
                passes = (*basis.passes, self._storage(bits))
                if passes not in known:
                    yield self._bench.make(f"{basis.name}, weights stored in {bits} bits", passes)
        if self.plans is not None:
            yield from self.plans.beyond(_ERRORS)

    def _gains(self, candidate: Candidate, best: Candidate) -> bool:
        """Whether it is faster; of what the user asked for by name, as fast and smaller is enough.

        Nothing larger than the original gains. Under a limit on memory, what keeps it comes before what does not. What
        seems faster, but not in most rounds, is timed at length, and then the median tells.
        """
        if self._larger(candidate):
            return False
        limit = self._budget.memory_limit(self._original.memory or 0)
        if limit is not None:
            used, known = (self._bench.memory(each) for each in (candidate, best))
            if (used <= limit) != (known <= limit):
                return used < known
        if candidate.faster(best) or (candidate.name in self._named and candidate.smaller(best)):
            return True
        if candidate.seems_faster(best):
            self._bench.time(best, candidate, rounds=_AT_LENGTH)
        return candidate.seems_faster(best)

    def _larger(self, candidate: Candidate) -> bool:
        """Whether it is larger than the original, and than a limit that allows for that."""
        return candidate.size > max(self._original.size, self._budget.size_limit(self._original.size) or 0)

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
        """Return nodes to float, as few as keep the budget."""
        found = self._undone(candidate, "in float", ()) if _has_nodes(candidate.passes[-1]) else None
        if found is not None:
            self._bench.time(found)
        return found

    def _undone(self, candidate: Candidate, how: str, instead: tuple[Pass, ...]) -> Candidate | None:
        """What a candidate's last pass did undone on nodes, the most sensitive first: as few as keep the budget.

        By bisection.

        Args:
            candidate: over the budget.
            how: these nodes are then.
            instead: what is done to them.
        """
        *before, last = candidate.passes
        assert isinstance(last, QuantizeStatic | QuantizeDynamic | QuantizeWeights)
        base, _ = self._bench.applied(tuple(before))
        order = self._order(base, candidate)
        low, high = 0, len(order)
        found: Candidate | None = None
        while high - low > 1:
            middle = (low + high) // 2
            keep = tuple(sorted({*last.keep, *order[:middle]}))
            kept = several(middle, "most sensitive node", "most sensitive nodes")
            trial = self._bench.make(f"{candidate.name}, {kept} {how}", (*before, replace(last, keep=keep), *instead))
            if self._bench.works(trial) and self._within(trial):
                found, high = trial, middle
            else:
                low = middle
        return found

    def _order(self, base: ir.Model, candidate: Candidate) -> list[str]:
        """The quantized nodes, the most sensitive first."""
        return ranking(base, candidate.model, candidate.changed, self._bench.context.target, self._bench.batch.feeds)

    # -- shrinking --------------------------------------------------------------------------------------------------

    def _shrink(self, best: Candidate) -> Candidate:
        """The smallest that is made of a candidate, and no slower than the original."""
        made = [self.clean, best, *self._smaller(best)]
        return [made[-1], *self._safer(made)][-1]

    def _safer(self, made: Sequence[Candidate]) -> Iterator[Candidate]:
        """What to take instead of the last, and so on, each time that what was taken proves slower than the original.

        What does not tell is timed again, at length. What was named for storage is as fast as before, once decoded.

        Args:
            made: each of what is before it.
        """
        made = list(dict.fromkeys(made))
        for before, trial in reversed(list(pairwise(made))):
            if trial.passes[-1].stores or self._needs(trial, before.size) or not self._slower(trial):
                return
            yield before
        self._slower(made[0])

    def _slower(self, trial: Candidate) -> bool:
        """Whether it is slower than the original; the verdict then says so."""
        if not (trial.gains_time and trial.passes) and trial.changed:
            self._bench.time(trial, rounds=_AT_LENGTH)
        if trial.loses_time:
            trial.verdict = "slower than the original"
        return trial.loses_time

    def _smaller(self, best: Candidate) -> Iterator[Candidate]:
        """Weights stored in fewer bits, where that costs no budget; nor time, unless size has a limit.

        What is still float becomes integers; then come the ways that the user asked for by name.
        """
        limit = self._budget.size_limit(self._original.size)
        if "quantize-weights" in self._allowed:
            limited = limit is not None or self._budget.memory_limit(self._original.memory or 0) is not None
            widths = _BITS[:1] if self._untold and not limited else _BITS
            storages = {f"remaining weights stored in {bits} bits": self._storage(bits) for bits in widths}
            if best is not self.clean or limit is None or best.size <= limit:
                for smaller in self._stored(best, best, storages, limit, slower=False):
                    yield (best := smaller)
            if limit is not None and best.size > limit:
                for smaller in self._stored(self.clean, best, storages, limit, slower=True):
                    slower = smaller.speedup < best.speedup * (1 - NOISE)
                    if smaller.size > limit and self._budget.limits_time and slower:
                        smaller.verdict = "slower, and still above the limit on size"
                        continue
                    yield (best := smaller)
        for name in (name for name in self._named if name in registry.storing()):
            technique = registry.passes()[name]()
            # Sessions decode what these store, and then run the same kernels: a difference in time is noise.
            for smaller in self._stored(best, best, {name: technique}, limit, slower=True):
                yield (best := smaller)

    def _storage(self, bits: int) -> QuantizeWeights:
        return QuantizeWeights(bits=bits, rounding=self._effort.rounding if self._has_data else NEAREST)

    def _stored(
        self, base: Candidate, best: Candidate, storages: Mapping[str, Pass], limit: int | None, *, slower: bool
    ) -> Iterator[Candidate]:
        """Ever smaller forms of `base` with its weights stored in one of several ways, as small as a limit asks."""
        held = False
        for how, technique in storages.items():
            name = f"{base.name}, {how}"
            trial = self._bench.make(name, (*base.passes, technique))
            fits = limit is not None and trial.size <= limit
            if not self._bench.works(trial):
                continue
            small = trial.size <= best.size * (1 - NOISE) and trial.size < self._original.size
            if not small and not (fits and trial.size < best.size):
                trial.verdict = "not smaller"
                continue
            if not self._within(trial):
                needed = held and limit is not None and trial.size <= limit < best.size
                mixed = self._mixed(trial, limit or 0) if needed else None
                if mixed is None:
                    continue
                trial = mixed
            held = True
            self._bench.time(best, trial)
            if not slower and trial.speedup < best.speedup * (1 - NOISE):
                trial.verdict = "slower"
                continue
            trial.verdict, best = "smaller", trial
            yield best
            if limit is None or fits:
                return

    def _mixed(self, coarse: Candidate, limit: int) -> Candidate | None:
        """A candidate whose weights have too few bits, with more for the most sensitive, if that keeps both limits."""
        technique = coarse.passes[-1]
        if not isinstance(technique, QuantizeWeights):
            return None
        found = self._undone(coarse, f"in {max(_BITS)} bits", (replace(technique, bits=max(_BITS)),))
        if found is not None and found.size > limit:
            found.verdict = "above the limit on size"
            return None
        return found

    def _needs(self, trial: Candidate, size: int) -> bool:
        """Whether a limit needs a candidate, however slow, in place of something of that size."""
        budget, original = self._budget, self._original
        limit = budget.size_limit(original.size)
        return budget.memory_limit(original.memory or 0) is not None or (
            limit is not None and trial.size <= limit < size
        )

    @property
    def _untold(self) -> bool:
        """Whether nothing tells accuracy, and the user named no limit."""
        return self._budget.max_drop is None and not self._bench.judges.tell_accuracy

    # -- the budget -------------------------------------------------------------------------------------------------

    def holds(self, drop: float | None) -> bool:
        """Whether the loss on the final data is within the budget."""
        return drop is not None and within(drop, self.asked.max_drop or 0.0)

    def unmet(self, original: Figures, result: Figures) -> list[Check]:
        """The limits that a result breaks."""
        return [check for check in self.asked.checks(original, result) if not check.passed]


def _has_nodes(technique: object) -> bool:
    """Whether single nodes can be taken back."""
    return isinstance(technique, QuantizeStatic | QuantizeDynamic)
