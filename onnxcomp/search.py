"""Drafts, refines and judges candidates for one model.

1. Clean up.
2. Draft: every quantization that the target has kernels for, weights rounded to the nearest, with those nodes in INT8
   that a minimum cut over measured times puts there. All drafts are timed side by side.
3. Refine the fastest: weights rounded with error feedback, judged on the metric. Over budget, nodes return to float,
   the most sensitive first, until it holds.
4. What is still float is stored as integers where that costs neither time nor budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import onnx_ir as ir

from onnxcomp import metrics, placement, runtime
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.core import Context, Pass
from onnxcomp.errors import InputError, OnnxcompError
from onnxcomp.judges import Judges
from onnxcomp.passes.convert_float import ConvertFloat
from onnxcomp.passes.equalize import Equalize
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.simplify import Simplify
from onnxcomp.passes.smooth import Smooth
from onnxcomp.report import Figures, Step
from onnxcomp.runtime import Feeds, Protocol, Session, Timing
from onnxcomp.sensitivity import ranking
from onnxcomp.weights import Rounding

NEAREST = Rounding(gptq=False, sweeps=0, bias_correction=False)

NOISE = 0.03
"""Latencies closer than this count as equal."""

_DEFAULT_DROP = {"relative-error": 0.2}
"""Accepted loss without a budget, by metric; half a point for all others."""
_HALF_A_POINT = 0.005


class Effort(StrEnum):
    """How long the search may take."""

    QUICK = "quick"
    DEFAULT = "default"
    EXTENSIVE = "extensive"

    @property
    def judged(self) -> int | None:
        """Samples that judge a candidate; None for all."""
        return {"quick": 256, "default": 2000, "extensive": None}[self.value]

    @property
    def crossings(self) -> tuple[float, ...]:
        """Factors on the cost of entering and leaving INT8, a placement each."""
        return {"quick": (2.0,), "default": (1.0, 2.0, 4.0), "extensive": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}[self.value]

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded in the result."""
        return NEAREST if self is Effort.QUICK else Rounding()

    @property
    def protocol(self) -> Protocol:
        """How long a candidate is timed."""
        return Protocol(rounds={"quick": 5, "default": 9, "extensive": 21}[self.value])


@dataclass
class Candidate:
    """A recipe, what it made of the model, and what was measured of that."""

    name: str
    passes: tuple[Pass, ...]
    model: ir.Model
    steps: tuple[Step, ...]
    size: int = 0
    timing: Timing | None = None
    drop: float | None = None
    verdict: str = ""

    @property
    def speedup(self) -> float:
        """Against the original; 0 where it was not timed."""
        return self.timing.speedup if self.timing else 0.0

    def figures(self) -> Figures:
        """For the report."""
        latency = self.timing.median if self.timing else None
        return Figures(self.size, latency, speedup=self.timing and self.timing.speedup, drop=self.drop)


class Search:
    """Drafts, refines and judges candidates for one model."""

    def __init__(
        self,
        model: ir.Model,
        context: Context,
        judges: Judges,
        budget: Budget,
        effort: Effort,
        allowed: frozenset[str],
        keep_overridable: bool,
    ) -> None:
        self._model = model
        self.context = context
        self.judges = judges
        self.budget = budget
        self._effort = effort
        self._allowed = allowed
        self._prefix: tuple[Pass, ...] = (Simplify(keep_overridable),) if "simplify" in allowed else ()
        default = _DEFAULT_DROP.get(judges.metric.name, _HALF_A_POINT)
        self._limit = default if budget.max_drop is None else budget.max_drop
        self._max_drop = self._limit
        self.original = Session(model, context.target)
        self.feeds: Feeds = next(iter(context.examples(model, 1)))
        self.original.run(self.feeds)
        self.original_bytes = models.file_bytes(model)
        self._baseline: metrics.Score | None = None
        self._applied: dict[tuple[Pass, ...], tuple[ir.Model, tuple[Step, ...]]] = {}
        self.trials: list[Candidate] = []

    def run(self) -> Candidate:
        """The best candidate."""
        clean = self._make("clean-up", ())
        drafts = [clean, *self._drafts(clean)]
        self._time(drafts)
        clean.drop = 0.0 if clean.model is self._model else self._judge(clean)
        best = clean
        clean.verdict = "the reference for all others"
        for draft in sorted(drafts[1:], key=lambda d: -d.speedup):
            if draft.speedup < max(best.speedup, clean.speedup) * (1 + NOISE):
                draft.verdict = "not faster" if draft.speedup <= best.speedup else "not faster beyond noise"
                continue
            refined = self._refine(draft)
            if refined is not None and refined.speedup > best.speedup:
                best = refined
        return self._shrink(best)

    def more_careful(self, best: Candidate) -> Candidate:
        """A candidate with half the loss, or the cleaned-up model: for a result that fails on unseen data."""
        clean = self.trials[0]
        self._max_drop /= 2
        best.verdict = "over the budget on the final data"
        careful = self._back_off(best) if best.passes else None
        return careful or clean

    # -- candidates -------------------------------------------------------------------------------------------------

    def _make(self, name: str, passes: tuple[Pass, ...]) -> Candidate:
        self._tell(name)
        model, steps = self._apply((*self._prefix, *passes))
        candidate = Candidate(name, passes, model, steps, size=models.file_bytes(model))
        self.trials.append(candidate)
        return candidate

    def _tell(self, what: str) -> None:
        """Progress without an end: how many candidates there will be depends on what is measured."""
        self.context.progress(len(self.trials), 0, what)

    def _apply(self, passes: tuple[Pass, ...]) -> tuple[ir.Model, tuple[Step, ...]]:
        if not passes:
            return self._model, ()
        if passes not in self._applied:
            model, steps = self._apply(passes[:-1])
            outcome = passes[-1](model, self.context)
            self._applied[passes] = (outcome.model, (*steps, Step(repr(passes[-1]), outcome.changes, outcome.skips)))
        return self._applied[passes]

    def _drafts(self, clean: Candidate) -> list[Candidate]:
        """Every quantization with kernels on the target, not yet refined."""
        provider = self.context.target.provider.lower()
        drafts = []
        if provider in {"cuda", "tensorrt", "rocm", "directml", "dml"} and "convert-float" in self._allowed:
            drafts.append(self._make("fp16", (ConvertFloat(),)))
        if provider not in {"cuda", "rocm"} and "quantize-static" in self._allowed and self.context.data is not None:
            drafts.extend(self._static(clean))
        if provider == "cpu" and "quantize-dynamic" in self._allowed:
            drafts.append(self._make("dynamic INT8", (QuantizeDynamic(NEAREST),)))
        return [draft for draft in drafts if draft.steps[-1].changes and self._runs(draft)]

    def _static(self, clean: Candidate) -> list[Candidate]:
        base = replace(QuantizeStatic.for_provider(self.context.target.provider), rounding=NEAREST)
        full = self._make("static INT8", (base,))
        names = [change.node for change in full.steps[-1].changes]
        if not names or self.context.target.provider.lower() != "cpu" or not self._runs(full):
            return [full]
        floats, integers = placement.profiles([clean.model, full.model], self.context.target, self.feeds)
        crossing = placement.measure_crossing(self.context.target)
        drafts = {(): full}
        for factor in self._effort.crossings:
            chosen = placement.place(clean.model, names, floats, integers, crossing, factor)
            keep = tuple(sorted(set(names) - chosen))
            if keep not in drafts and chosen:
                name = f"static INT8 but for {len(keep)} nodes that are faster in float"
                drafts[keep] = self._make(name, (replace(base, keep=keep),))
        return list(drafts.values())

    def _runs(self, candidate: Candidate) -> bool:
        try:
            Session(candidate.model, self.context.target).run(self.feeds)
        except OnnxcompError as error:
            candidate.verdict = f"does not run: {error.fact}"
            return False
        return True

    # -- measuring --------------------------------------------------------------------------------------------------

    def _time(self, candidates: Sequence[Candidate]) -> None:
        """Time candidates beside the original and the fastest known."""
        self._tell("timing side by side")
        sessions = [Session(candidate.model, self.context.target) for candidate in candidates]
        timings = runtime.compare([self.original, *sessions], self.feeds, self._effort.protocol)
        for candidate, timing in zip(candidates, timings[1:], strict=True):
            candidate.timing = timing

    def _judge(self, candidate: Candidate) -> float:
        """How much worse than the original; infinite where the metric fails on it."""
        self._tell(f"judging: {candidate.name}")
        if self._baseline is None:
            self._baseline = self.judges.score(self.original, self.original)
        try:
            score = self.judges.score(Session(candidate.model, self.context.target), self.original)
        except InputError as error:
            candidate.verdict = error.fact
            return float("inf")
        return metrics.compare(self._baseline, score).value

    def _within(self, candidate: Candidate) -> bool:
        if candidate.drop is None:
            candidate.drop = self._judge(candidate)
        return candidate.drop <= self._max_drop

    # -- refining ---------------------------------------------------------------------------------------------------

    def _refine(self, draft: Candidate) -> Candidate | None:
        """The draft with carefully rounded weights, and nodes back in float until it keeps the budget."""
        tried = []
        for name, passes in self._variants(draft):
            candidate = draft if passes == draft.passes else self._make(name, passes)
            candidate.timing = draft.timing
            if self._within(candidate):
                if len(passes) > len(draft.passes):  # more than other numbers in the same graph
                    self._time([candidate])
                candidate.verdict = candidate.verdict or "within the budget"
                if candidate is not draft:
                    draft.verdict = f"refined as '{candidate.name}'"
                return candidate
            candidate.verdict = candidate.verdict or "over the budget"
            tried.append(candidate)
        return self._back_off(min(tried, key=lambda c: c.drop if c.drop is not None else float("inf")))

    def _variants(self, draft: Candidate) -> list[tuple[str, tuple[Pass, ...]]]:
        """The same nodes with other ways to choose ranges and weights, the usual one first."""
        last = draft.passes[-1]
        has_data = self.context.data is not None
        rounding = self._effort.rounding if has_data else NEAREST
        if isinstance(last, QuantizeStatic):
            rounded = replace(last, rounding=rounding)
            variants: list[tuple[str, tuple[Pass, ...]]] = [(f"{draft.name}, weights refined", (rounded,))]
            if self._effort is not Effort.QUICK:
                variants.append((f"{draft.name}, min-max ranges", (replace(rounded, range=Range.MINMAX),)))
                if "equalize" in self._allowed:
                    variants.append((f"{draft.name}, equalized", (Equalize(), rounded)))
            return variants
        if isinstance(last, QuantizeDynamic):
            rounded_dynamic = replace(last, rounding=rounding)
            variants = [(f"{draft.name}, weights refined", (rounded_dynamic,))]
            if self._effort is not Effort.QUICK and has_data and "smooth" in self._allowed:
                variants.append((f"{draft.name}, smoothed", (Smooth(insert=True), rounded_dynamic)))
            return variants
        return [(draft.name, draft.passes)]

    def _back_off(self, candidate: Candidate) -> Candidate | None:
        """Return nodes to float, the most sensitive first: as few as keep the budget, by bisection."""
        last = candidate.passes[-1]
        if not isinstance(last, QuantizeStatic | QuantizeDynamic):
            return None
        base, _ = self._apply((*self._prefix, *candidate.passes[:-1]))
        nodes = [change.node for change in candidate.steps[-1].changes]
        order = ranking(base, candidate.model, nodes, self.context.target, self.feeds)
        low, high = 0, len(order)
        found: Candidate | None = None
        while high - low > 1:
            middle = (low + high) // 2
            keep = tuple(sorted({*last.keep, *order[:middle]}))
            name = f"{candidate.name}, {middle} most sensitive nodes in float"
            trial = self._make(name, (*candidate.passes[:-1], replace(last, keep=keep)))
            if trial.steps[-1].changes and self._within(trial):
                trial.verdict, found, high = "within the budget", trial, middle
            else:
                trial.verdict, low = "over the budget", middle
        if found is not None:
            self._time([found])
        return found

    def _shrink(self, best: Candidate) -> Candidate:
        """Store what is still float as integers, where that costs neither time nor budget."""
        if "quantize-weights" not in self._allowed:
            return best
        limit = self.budget.size_limit(self.original_bytes)
        rounding = self._effort.rounding if self.context.data is not None else NEAREST
        fastest = best
        for base, bits in ((fastest, 8), (fastest, 4), (self.trials[0], 8), (self.trials[0], 4)):
            if base is not fastest and (limit is None or best.size <= limit):
                break
            name = f"{base.name}, remaining weights stored in {bits} bits"
            trial = self._make(name, (*base.passes, QuantizeWeights(bits=bits, rounding=rounding)))
            if not trial.steps[-1].changes or trial.size > best.size * (1 - NOISE) or not self._runs(trial):
                trial.verdict = trial.verdict or "not smaller"
                continue
            if not self._within(trial):
                trial.verdict = trial.verdict or "over the budget"
                continue
            self._time([best, trial])
            if base is fastest and trial.speedup < best.speedup * (1 - NOISE):
                trial.verdict = "slower"
                continue
            trial.verdict = "smaller at the same speed" if base is fastest else "small enough"
            best = trial
            if limit is None or best.size <= limit:
                break
        return best

    # -- the budget ------------------------------------------------------------------------------------------------

    def holds(self, drop: float | None) -> bool:
        """Whether the loss on the final data is within the budget."""
        return drop is not None and drop <= self._limit

    def unmet(self, result: Figures) -> list[str]:
        """The limits that a result breaks, in words."""
        budget, unmet = self.budget, []
        latency, speedup = result.latency or 0.0, result.speedup or 0.0
        if not self.holds(result.drop):
            unmet.append(f"{self.judges.metric.name} drops by {result.drop:.4g}, more than {self._limit:.4g}")
        if budget.max_latency is not None and latency > budget.max_latency:
            unmet.append(f"latency {latency * 1e3:.3g} ms is above {budget.max_latency * 1e3:.3g} ms")
        if budget.min_speedup is not None and speedup < budget.min_speedup:
            unmet.append(f"speed-up {speedup:.2f}x is below {budget.min_speedup:.2f}x")
        limit = budget.size_limit(self.original_bytes)
        if limit is not None and result.size > limit:
            unmet.append(f"size {result.size:,} bytes is above {limit:,}")
        return unmet
