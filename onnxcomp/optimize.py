"""The main job: which passes, where, under a budget, decided by measurement.

1. Clean up.
2. Draft: every quantization that the target has kernels for, weights rounded to the nearest, with those nodes in INT8
   that a minimum cut over measured times puts there. All drafts are timed side by side.
3. Refine the fastest: weights rounded with error feedback, judged on the metric. Over budget, nodes return to float, the
   most sensitive first, until it holds.
4. What is still float is stored as integers where that costs neither time nor budget.
5. Score once on data that nothing has seen, time once more beside the original, write.
"""

import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp import metrics, placement, runtime
from onnxcomp import model as models
from onnxcomp.budget import Budget
from onnxcomp.core import Context, Pass, no_progress
from onnxcomp.data import ImageOptions, open_dataset, split
from onnxcomp.errors import BudgetError, InputError, OnnxcompError, OptionError
from onnxcomp.passes.convert_float import ConvertFloat
from onnxcomp.passes.equalize import Equalize
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.passes.simplify import Simplify
from onnxcomp.passes.smooth import Smooth
from onnxcomp.registry import GROUPS, resolve
from onnxcomp.report import Figures, Report, Step, Trial
from onnxcomp.runtime import Feeds, Protocol, Session, Target, Timing
from onnxcomp.samples import Dataset
from onnxcomp.sensitivity import ranking
from onnxcomp.synthetic import synthetic
from onnxcomp.weights import Rounding

VERSION = "0.1.0"

NEAREST = Rounding(gptq=False, sweeps=0, bias_correction=False)

_DEFAULT_DROP = {"relative-error": 0.2}
"""Accepted loss without a budget, by metric; half a point for all others."""
_HALF_A_POINT = 0.005

_RUN = 16
"""Samples per run when judging; some ONNX Runtime kernels differ by batch, so neither 1 nor hundreds."""

_NOISE = 0.03
"""Latencies closer than this count as equal."""


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


@dataclass(frozen=True)
class Result:
    """An optimized model and its proof."""

    model: ir.Model
    report: Report


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


def optimize(
    source: models.ModelSource,
    *,
    output: str | os.PathLike[str] | None = None,
    calib: Any = None,
    evaluation: Any = None,
    metric: str | None = None,
    budget: Budget = Budget(),
    passes: Sequence[str] | None = None,
    exclude: str | None = None,
    target: Target = Target(),
    batch: int = 1,
    effort: Effort = Effort.DEFAULT,
    seed: int = 0,
    memory: int = 2 * 10**9,
    images: ImageOptions | None = None,
    overwrite: bool = False,
    best_effort: bool = False,
    dry_run: bool = False,
    keep_overridable: bool = False,
    progress: Callable[[int, int, str], None] = no_progress,
) -> Result:
    """Make a model faster, then smaller, within a budget, and prove it.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`; never modified.
        output: where to write the result; None to keep it in memory.
        calib: data that techniques may learn from, as `data.open_dataset` takes them.
        evaluation: data that results are judged on; without it a part of `calib`.
        metric: a metric's name or `FILE.py:FUNCTION`; by default accuracy where there are labels, else relative error.
        budget: limits. Without `max_drop`: 0.5 points with labels, a relative output error of 0.2 without.
        passes: names of the passes to use, or groups; clean-up and quantization by default.
        exclude: regular expression of node names to leave alone.
        target: execution provider and threads.
        batch: samples per run that latency is measured at.
        effort: how long to search.
        seed: of the split of the data and everything random.
        memory: cap in bytes on what calibration keeps.
        images: how image files become inputs.
        overwrite: replace an existing output.
        best_effort: write the best found even where it breaks the budget.
        dry_run: decide and measure, but write nothing.
        keep_overridable: leave weights that are also graph inputs overridable.
        progress: called with (done, total, what).

    Returns:
        The model and its report.

    Raises:
        InputError: the model, the data or an option cannot be used.
        BudgetError: no result within the budget; its `result` is the best effort.
    """
    if output is not None and not dry_run:
        models.check_target(output, overwrite=overwrite, inputs=(source,))
    allowed = resolve(passes if passes is not None else ["simplify", *GROUPS])
    pattern = _pattern(exclude)
    model = models.load(source)
    specs = models.input_specs(model)
    if batch < 1:
        raise OptionError(f"a batch of {batch} is not possible", remedy="--batch 1 or more")
    judges = _Judges.of(model, specs, calib, evaluation, metric, images, seed, effort)
    context = Context(judges.tune, target, batch, seed, memory, pattern, progress)
    search = _Search(model, context, judges, budget, effort, allowed, keep_overridable)
    best = search.run()
    result = search.report(best, source, output)
    while best.passes and not search.holds(result.report.result):
        best = search.more_careful(best)
        result = search.report(best, source, output)
    if not result.report.met and not best_effort:
        error = BudgetError(
            "no result within the budget: " + "; ".join(result.report.unmet),
            "the limits conflict for this model and target",
            "relax a limit, try --effort extensive, or write the best found with --best-effort",
        )
        error.result = result
        raise error
    if output is not None and not dry_run:
        models.save(result.model, output, overwrite=overwrite)
    return result


def _pattern(exclude: str | None) -> re.Pattern[str] | None:
    try:
        return None if exclude is None else re.compile(exclude)
    except re.error as error:
        raise OptionError(f"--exclude '{exclude}' is not a regular expression: {error}") from error


@dataclass
class _Judges:
    """The data in their three roles, and what they are scored with."""

    tune: Dataset | None
    judge: Dataset
    final: Dataset
    metric: metrics.Metric
    description: str
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: ir.Model,
        specs: Sequence[models.TensorSpec],
        calib: Any,
        evaluation: Any,
        metric: str | None,
        images: ImageOptions | None,
        seed: int,
        effort: Effort,
    ) -> "_Judges":
        notes: list[str] = []
        learn = None if calib is None else open_dataset(calib, specs, images)
        proof = None if evaluation is None else open_dataset(evaluation, specs, images)
        if learn is not None and proof is not None:
            half = split(proof, seed)
            whole = half.shared
            final = proof if whole else proof.select(_complement(len(proof), seed))
            judge = proof if whole else proof.select(set(range(len(proof))) - set(_complement(len(proof), seed)))
            tune: Dataset | None = learn
        elif learn is not None or proof is not None:
            parts = split(learn if learn is not None else proof, seed)  # type: ignore[arg-type]
            tune, judge, final, whole = parts.tune, parts.judge, parts.final, parts.shared
        else:
            tune, whole = None, True
            judge = final = synthetic(specs, _RUN, seed, models.vocabularies(model))
            notes.append(
                "No data were given: errors are measured on made-up inputs and say little about real ones, and "
                "techniques that need data stay off. Give --calib and --eval."
            )
        chosen = metrics.parse_metric(metric) if metric else None
        reason = "as asked"
        if chosen is None:
            probe = next(iter(final.batches(_RUN)))
            chosen, reason = metrics.default_metric(probe.targets, Session(model).run(probe.feeds))
        if isinstance(chosen, metrics.UserMetric):
            description = f"{chosen.name}, called whole (judge = final)"
        else:
            if effort.judged is not None and len(judge) > effort.judged and not whole:
                judge = judge.select(np.random.default_rng(seed).permutation(len(judge))[: effort.judged].tolist())
            same = f"{len(final)} samples, too few to split (judge = final)"
            description = f"{chosen.name} ({reason}) on " + (
                same if whole else f"{len(final)} samples held out from the search, which judged on {len(judge)} others"
            )
        return cls(tune, judge, final, chosen, description, notes)

    def score(self, session: Session, reference: Session, *, final: bool = False) -> metrics.Score:
        """Score a model on the judge's data, or on the final ones."""
        data = self.final if final else self.judge
        return metrics.evaluate(self.metric, session.run, data, reference.run, _RUN)


def _complement(count: int, seed: int) -> list[int]:
    """Half of the samples, drawn at random."""
    return sorted(np.random.default_rng(seed).permutation(count)[: count // 2].tolist())


class _Search:
    """Drafts, refines and judges candidates for one model."""

    def __init__(
        self,
        model: ir.Model,
        context: Context,
        judges: _Judges,
        budget: Budget,
        effort: Effort,
        allowed: frozenset[str],
        keep_overridable: bool,
    ) -> None:
        self._model = model
        self._context = context
        self._judges = judges
        self._budget = budget
        self._effort = effort
        self._allowed = allowed
        self._prefix: tuple[Pass, ...] = (Simplify(keep_overridable),) if "simplify" in allowed else ()
        default = _DEFAULT_DROP.get(judges.metric.name, _HALF_A_POINT)
        self._limit = default if budget.max_drop is None else budget.max_drop
        self._max_drop = self._limit
        self._original = Session(model, context.target)
        self._feeds: Feeds = next(iter(context.examples(model, 1)))
        self._original.run(self._feeds)
        self._bytes = self._size(model)
        self._baseline: metrics.Score | None = None
        self._applied: dict[tuple[Pass, ...], tuple[ir.Model, tuple[Step, ...]]] = {}
        self._trials: list[Candidate] = []
        self.notes = list(judges.notes)

    def run(self) -> Candidate:
        """The best candidate."""
        clean = self._make("clean-up", ())
        drafts = [clean, *self._drafts(clean)]
        self._time(drafts)
        clean.drop = 0.0 if clean.model is self._model else self._judge(clean)
        best = clean
        clean.verdict = "the reference for all others"
        for draft in sorted(drafts[1:], key=lambda d: -d.speedup):
            if draft.speedup < max(best.speedup, clean.speedup) * (1 + _NOISE):
                draft.verdict = "not faster" if draft.speedup <= best.speedup else "not faster beyond noise"
                continue
            refined = self._refine(draft)
            if refined is not None and refined.speedup > best.speedup:
                best = refined
        return self._shrink(best)

    def more_careful(self, best: Candidate) -> Candidate:
        """A candidate with half the loss, or the cleaned-up model: for a result that fails on unseen data."""
        clean = self._trials[0]
        self._max_drop /= 2
        best.verdict = "over the budget on the final data"
        careful = self._back_off(best) if best.passes else None
        return careful or clean

    # -- candidates -------------------------------------------------------------------------------------------------

    def _make(self, name: str, passes: tuple[Pass, ...]) -> Candidate:
        model, steps = self._apply((*self._prefix, *passes))
        candidate = Candidate(name, passes, model, steps, size=self._size(model))
        self._trials.append(candidate)
        return candidate

    def _apply(self, passes: tuple[Pass, ...]) -> tuple[ir.Model, tuple[Step, ...]]:
        if not passes:
            return self._model, ()
        if passes not in self._applied:
            model, steps = self._apply(passes[:-1])
            outcome = passes[-1](model, self._context)
            self._applied[passes] = (outcome.model, (*steps, Step(repr(passes[-1]), outcome.changes, outcome.skips)))
        return self._applied[passes]

    def _size(self, model: ir.Model) -> int:
        if models.tensor_bytes(model) > models.PROTOBUF_LIMIT:
            return models.tensor_bytes(model)
        return len(models.to_bytes(model))

    def _drafts(self, clean: Candidate) -> list[Candidate]:
        """Every quantization with kernels on the target, not yet refined."""
        provider = self._context.target.provider.lower()
        drafts = []
        if provider in {"cuda", "tensorrt", "rocm", "directml", "dml"} and "convert-float" in self._allowed:
            drafts.append(self._make("fp16", (ConvertFloat(),)))
        if provider not in {"cuda", "rocm"} and "quantize-static" in self._allowed and self._context.data is not None:
            drafts.extend(self._static(clean))
        if provider == "cpu" and "quantize-dynamic" in self._allowed:
            drafts.append(self._make("dynamic INT8", (QuantizeDynamic(NEAREST),)))
        return [draft for draft in drafts if draft.steps[-1].changes and self._runs(draft)]

    def _static(self, clean: Candidate) -> list[Candidate]:
        full = self._make("static INT8", (QuantizeStatic(rounding=NEAREST),))
        names = [change.node for change in full.steps[-1].changes]
        if not names or self._context.target.provider.lower() != "cpu" or not self._runs(full):
            return [full]
        floats, integers = placement.profiles([clean.model, full.model], self._context.target, self._feeds)
        crossing = placement.measure_crossing(self._context.target)
        drafts = {(): full}
        for factor in self._effort.crossings:
            chosen = placement.place(clean.model, names, floats, integers, crossing, factor)
            keep = tuple(sorted(set(names) - chosen))
            if keep not in drafts and chosen:
                name = f"static INT8 but for {len(keep)} nodes that are faster in float"
                drafts[keep] = self._make(name, (QuantizeStatic(rounding=NEAREST, keep=keep),))
        return list(drafts.values())

    def _runs(self, candidate: Candidate) -> bool:
        try:
            Session(candidate.model, self._context.target).run(self._feeds)
        except OnnxcompError as error:
            candidate.verdict = f"does not run: {error.fact}"
            return False
        return True

    # -- measuring --------------------------------------------------------------------------------------------------

    def _time(self, candidates: Sequence[Candidate]) -> None:
        """Time candidates beside the original and the fastest known."""
        sessions = [Session(candidate.model, self._context.target) for candidate in candidates]
        timings = runtime.compare([self._original, *sessions], self._feeds, self._effort.protocol)
        for candidate, timing in zip(candidates, timings[1:], strict=True):
            candidate.timing = timing

    def _judge(self, candidate: Candidate) -> float:
        """How much worse than the original; infinite where the metric fails on it."""
        if self._baseline is None:
            self._baseline = self._judges.score(self._original, self._original)
        try:
            score = self._judges.score(Session(candidate.model, self._context.target), self._original)
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
        has_data = self._context.data is not None
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
                variants.append((f"{draft.name}, smoothed", (Smooth(), rounded_dynamic)))
            return variants
        return [(draft.name, draft.passes)]

    def _back_off(self, candidate: Candidate) -> Candidate | None:
        """Return nodes to float, the most sensitive first: as few as keep the budget, by bisection."""
        last = candidate.passes[-1]
        if not isinstance(last, QuantizeStatic | QuantizeDynamic):
            return None
        base, _ = self._apply((*self._prefix, *candidate.passes[:-1]))
        nodes = [change.node for change in candidate.steps[-1].changes]
        order = ranking(base, candidate.model, nodes, self._context.target, self._feeds)
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
        limit = self._budget.size_limit(self._bytes)
        rounding = self._effort.rounding if self._context.data is not None else NEAREST
        fastest = best
        for base, bits in ((fastest, 8), (fastest, 4), (self._trials[0], 8), (self._trials[0], 4)):
            if base is not fastest and (limit is None or best.size <= limit):
                break
            name = f"{base.name}, remaining weights stored in {bits} bits"
            trial = self._make(name, (*base.passes, QuantizeWeights(bits=bits, rounding=rounding)))
            if not trial.steps[-1].changes or trial.size > best.size * (1 - _NOISE) or not self._runs(trial):
                trial.verdict = trial.verdict or "not smaller"
                continue
            if not self._within(trial):
                trial.verdict = trial.verdict or "over the budget"
                continue
            self._time([best, trial])
            if base is fastest and trial.speedup < best.speedup * (1 - _NOISE):
                trial.verdict = "slower"
                continue
            trial.verdict = "smaller at the same speed" if base is fastest else "small enough"
            best = trial
            if limit is None or best.size <= limit:
                break
        return best

    # -- the proof --------------------------------------------------------------------------------------------------

    def report(self, best: Candidate, source: models.ModelSource, output: str | os.PathLike[str] | None) -> Result:
        """Score on the final data, time beside the original, and put the recipe into the model."""
        fingerprint = models.fingerprint(source)
        best.verdict = "chosen"
        stamped = best.model.clone()
        stamped.metadata_props.update(
            {
                "onnxcomp.version": VERSION,
                "onnxcomp.input": fingerprint,
                "onnxcomp.recipe": "\n".join(step.recipe for step in best.steps if step.changes),
            }
        )
        session = Session(stamped, self._context.target)
        before, after = runtime.compare([self._original, session], self._feeds, Protocol(rounds=15))
        baseline = self._judges.score(self._original, self._original, final=True)
        score = self._judges.score(session, self._original, final=True)
        drop = metrics.compare(baseline, score)
        size = self._size(stamped)
        original = Figures(
            self._bytes, before.median, (before.low, before.high), 1.0, baseline.value, baseline.interval, 0.0
        )
        result = Figures(size, after.median, (after.low, after.high), after.speedup, score.value, score.interval, drop.value)
        unmet = self._unmet(result)
        notes = list(self.notes)
        if not best.passes:
            notes.append("No quantization was both faster and within the budget: the cleaned-up model is the result.")
        if result.speedup is not None and result.speedup < 1 - _NOISE:
            notes.append("The result is slower than the original on this target.")
        return Result(
            stamped,
            Report(
                source=str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__,
                output=None if output is None else str(output),
                fingerprint=fingerprint,
                environment=self._environment(),
                protocol=str(self._effort.protocol),
                metric=self._judges.metric.name,
                data=self._judges.description,
                budget=self._budget,
                met=not unmet,
                unmet=tuple(unmet),
                original=original,
                result=result,
                steps=best.steps,
                trials=tuple(Trial(c.name, c.figures(), c.verdict) for c in self._trials),
                notes=tuple(notes),
            ),
        )

    def holds(self, result: Figures) -> bool:
        """Whether the loss on the final data is within the budget."""
        return result.drop is not None and result.drop <= self._limit

    def _unmet(self, result: Figures) -> list[str]:
        budget, unmet = self._budget, []
        assert result.latency is not None and result.speedup is not None
        if not self.holds(result):
            unmet.append(f"{self._judges.metric.name} drops by {result.drop:.4g}, more than {self._limit:.4g}")
        if budget.max_latency is not None and result.latency > budget.max_latency:
            unmet.append(f"latency {result.latency * 1e3:.3g} ms is above {budget.max_latency * 1e3:.3g} ms")
        if budget.min_speedup is not None and result.speedup < budget.min_speedup:
            unmet.append(f"speed-up {result.speedup:.2f}x is below {budget.min_speedup:.2f}x")
        limit = budget.size_limit(self._bytes)
        if limit is not None and result.size > limit:
            unmet.append(f"size {result.size:,} bytes is above {limit:,}")
        return unmet

    def _environment(self) -> dict[str, str | int]:
        return {
            "onnxcomp": VERSION,
            "onnxruntime": runtime.VERSION,
            "provider": self._context.target.providers[0],
            "threads": self._context.target.threads,
            "batch": self._context.batch,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "python": platform.python_version(),
            "seed": self._context.seed,
        }
