"""Candidates of one model: made by passes, run, timed and judged beside the original."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir

from onnxcomp import model as models
from onnxcomp import stopwatch
from onnxcomp.core import Context, Outcome, Pass
from onnxcomp.deadline import Deadline
from onnxcomp.errors import OnnxcompError
from onnxcomp.footprint import memory_of
from onnxcomp.judges import Baseline, Judges, must_run
from onnxcomp.measure import paced
from onnxcomp.recipe import Recipe
from onnxcomp.record import signed
from onnxcomp.report import Figures, Step, Trial
from onnxcomp.runtime import Protocol, Session, Timing
from onnxcomp.weights import NEAREST, Rounding

Found = TypeVar("Found")

NOISE = 0.03
"""Latencies and sizes closer than this count as equal."""


_DOUBT = 0.3
"""Share of a loss by which likelihoods may be wrong about it, beside their noise."""
_FINGERPRINT = "0" * 64
"""As long as those are that results get."""


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
    def plans(self) -> int:
        """Plans for fewer branches and channels, each made with what the one before it lost in view."""
        return {"quick": 0, "default": 3, "extensive": 8}[self.value]

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded in the result."""
        return NEAREST if self is Effort.QUICK else Rounding()

    @property
    def protocol(self) -> Protocol:
        """How long a candidate is timed."""
        return Protocol(rounds={"quick": 5, "default": 9, "extensive": 21}[self.value])


class Loss(NamedTuple):
    """A drop that is believed.

    Attributes:
        value: in the metric's unit.
        noise: its standard error; None where that is not known.
    """

    value: float
    noise: float | None


@dataclass(eq=False)
class Candidate:
    """A recipe, what it made of the model, and what was measured of that.

    Attributes:
        drop: how much worse than the original it judges.
        noise: standard error of that; None where it is not known.
        expected: the same by how likely its answers are, where that is known.
        predicted: speed-up that was foretold, from that of what it starts from, timed beside it.
    """

    name: str
    passes: tuple[Pass, ...]
    model: ir.Model
    steps: tuple[Step, ...]
    size: int = 0
    timing: Timing | None = None
    drop: float | None = None
    noise: float | None = None
    expected: Loss | None = None
    verdict: str = ""
    predicted: float | None = None
    memory: int | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the nodes that the last pass changed."""
        return tuple(change.node for change in self.steps[-1].changes) if self.steps else ()

    @property
    def speedup(self) -> float:
        """Against the original; 0 where it was not timed."""
        return self.timing.speedup if self.timing else 0.0

    @property
    def gains_time(self) -> bool:
        """Whether it is faster than the original, beyond noise: by the median, and in three of four rounds."""
        return self.timing is not None and self.speedup > 1 + NOISE and self.timing.speedup_low > 1

    @property
    def loses_time(self) -> bool:
        """Whether it is slower than the original, by the median alone: of many rounds, that tells."""
        return self.timing is not None and self.speedup < 1 - NOISE

    def faster(self, other: "Candidate") -> bool:
        """Whether it is, beyond noise: by the median, and in three of four rounds."""
        return self.seems_faster(other) and self.timing is not None and self.timing.speedup_low > other.speedup

    def seems_faster(self, other: "Candidate") -> bool:
        """Whether it is, by the median alone: of many rounds, that tells."""
        return self.timing is not None and self.speedup > other.speedup * (1 + NOISE)

    def smaller(self, other: "Candidate") -> bool:
        """Whether it is, and as fast."""
        return self.size < other.size * (1 - NOISE) and self.speedup >= other.speedup * (1 - NOISE)

    def figures(self) -> Figures:
        """For the report."""
        if self.timing is None:
            return Figures(self.size, drop=self.drop, memory=self.memory)
        timing = self.timing
        return Figures(
            self.size,
            timing.median,
            speedup=timing.speedup,
            drop=self.drop,
            memory=self.memory,
            speedup_interval=timing.quartiles,
        )

    def trial(self) -> Trial:
        """For the report."""
        return Trial(self.name, self.figures(), self.verdict, self.predicted)


class Workbench:
    """Makes candidates of one model, and times and judges them.

    Args:
        model: the original.
        original: the same, loaded.
        context: for the passes.
        judges: the data in their roles, and the metric.
        effort: how long to measure.
        prefix: passes that all candidates begin with.
        deadline: when to stop.

    Attributes:
        model: the original.
        batch: the run that latency is measured on.
        rows: its samples.
        trials: all candidates so far.

    Raises:
        DataError: the original does not run on the data.
    """

    def __init__(
        self,
        model: ir.Model,
        original: Session,
        context: Context,
        judges: Judges,
        effort: Effort,
        prefix: tuple[Pass, ...],
        deadline: Deadline | None = None,
    ) -> None:
        self.model, self._prefix = model, prefix
        self.original, self.judges, self.deadline = original, judges, deadline or Deadline()
        self.context = replace(context, progress=self.deadline.watching(context.progress))
        self.batch = judges.run_of(context.batch)
        self.rows = self.batch.valid + self.batch.padding
        must_run(original, self.batch.feeds, invented=context.data is None)
        self._protocol = context.recall(
            "pace", (model, self.batch.feeds, effort), lambda: paced(effort.protocol, original, self.batch.feeds)
        )
        self._timing_seconds = self._scoring_seconds = 0.0
        self._applied: dict[tuple[Pass, ...], tuple[ir.Model, tuple[Step, ...]]] = {}
        self.trials: list[Candidate] = []

    @property
    def provider(self) -> str:
        """Short name of the execution provider, however the user wrote it."""
        return self.context.target.short

    def make(self, name: str, passes: tuple[Pass, ...]) -> Candidate:
        """Apply passes to the original. Where one fails, the candidate has no steps and its verdict says why.

        Raises:
            DataError: a sample is at fault.
        """
        self._tell(name)
        try:
            model, steps = self.applied(passes)
            candidate = Candidate(name, passes, model, steps, self._written(model, passes))
        except OnnxcompError as error:
            for _ in self.context.data or ():
                pass  # reading all samples tells broken data from a model that overflows on good ones
            candidate = Candidate(name, passes, self.model, (), verdict=f"not possible: {error.fact}")
        self.trials.append(candidate)
        return candidate

    def begin_with(self, technique: Pass) -> None:
        """Let all candidates that are made from now on begin with one more pass."""
        self._prefix = (*self._prefix, technique)

    def _written(self, model: ir.Model, passes: tuple[Pass, ...]) -> int:
        """Bytes of a result's file with its recipe; what came of it is said besides where there is room."""
        return models.file_bytes(signed(model, self.model, self.recipe(passes), _FINGERPRINT))

    def recipe(self, passes: tuple[Pass, ...]) -> Recipe:
        """What makes a candidate of the original."""
        exclude = self.context.exclude
        return Recipe((*self._prefix, *passes), self.context.seed, None if exclude is None else exclude.pattern)

    def applied(self, passes: tuple[Pass, ...]) -> tuple[ir.Model, tuple[Step, ...]]:
        """What passes make of the original, behind the prefix."""
        return self._apply((*self._prefix, *passes))

    def _apply(self, passes: tuple[Pass, ...]) -> tuple[ir.Model, tuple[Step, ...]]:
        if not passes:
            return self.model, ()
        if passes not in self._applied:
            model, steps = self._apply(passes[:-1])
            outcome = self._called(passes[-1], model)
            self._applied[passes] = (outcome.model, (*steps, Step.of(passes[-1], outcome)))
        return self._applied[passes]

    def _called(self, technique: Pass, model: ir.Model) -> Outcome:
        outcome = self.context.recall("pass", (technique, model, self.context), lambda: technique(model, self.context))
        return outcome if outcome.modified else replace(outcome, model=model)

    def untouched(self, size: int) -> Candidate:
        """The original as a candidate.

        Args:
            size: bytes of its file.
        """
        candidate = Candidate("the model as it was", (), self.model, (), size, drop=0.0)
        self.trials.append(candidate)
        return candidate

    def works(self, candidate: Candidate) -> bool:
        """Whether the last pass changed anything and the result runs; else the verdict says why."""
        if not candidate.changed:
            candidate.verdict = candidate.verdict or "nothing to change"
            return False
        try:
            Session(candidate.model, self.context.target).run(self.batch.feeds)
        except OnnxcompError as error:
            candidate.verdict = f"does not run: {error.fact}"
            return False
        return True

    def time(self, *candidates: Candidate, rounds: int = 1) -> None:
        """Time candidates beside the original.

        Args:
            candidates: to time.
            rounds: how many times as many as usual.
        """
        self._tell("timing side by side")
        usual = self._protocol
        protocol = replace(usual, rounds=rounds * usual.rounds, seconds=rounds * usual.seconds)
        timed = [self.model, *(candidate.model for candidate in candidates)]
        measure = partial(stopwatch.time_apart, timed, self.context.target, self.batch.feeds, protocol)
        timings, seconds = self.context.recall(
            "timings", (timed, self.batch.feeds, protocol), partial(_clocked, measure)
        )
        self._timing_seconds = max(self._timing_seconds, seconds / rounds)
        self._reserve()
        for candidate, timing in zip(candidates, timings[1:], strict=True):
            candidate.timing = timing

    def memory(self, candidate: Candidate) -> float:
        """Bytes by which a process grows that loads and runs it; infinite where it fails or nobody knows."""
        if candidate.memory is None:
            self._tell(f"measuring the memory of: {candidate.name}")
            candidate.memory = self._footprint(candidate.model)
        return float("inf") if candidate.memory is None else candidate.memory

    def _footprint(self, model: ir.Model) -> int | None:
        target, feeds = self.context.target, self.batch.feeds
        try:
            return self.context.recall("memory", (model, feeds), lambda: memory_of(model, target, feeds))
        except OnnxcompError:
            return None

    def original_figures(self, size: int, *, memory: bool) -> Figures:
        """The original's, as far as limits depend on them.

        Args:
            size: bytes of its file.
            memory: measure that too.
        """
        return Figures(size, memory=self._footprint(self.model) if memory else None)

    def drop(self, candidate: Candidate) -> float:
        """How much worse than the original it judges; infinite where it fails."""
        if candidate.drop is None:
            self._tell(f"judging: {candidate.name}")
            candidate.drop, candidate.noise, candidate.expected = self._judge(candidate)
        return candidate.drop

    def loss(self, candidate: Candidate) -> Loss:
        """How much worse it is by all that is known: what judged, and how likely the original holds its answers.

        The one counts hits and misses, which have a standard error of a third of a point on 2,000 images; the other
        counts likelihoods, which have much less but are only as true as the original is calibrated. Each counts by its
        variance.
        """
        counted = Loss(self.drop(candidate), candidate.noise)
        if candidate.expected is None or not np.isfinite(counted.value):
            return counted
        return _combined(counted, candidate.expected)

    @cached_property
    def baseline(self) -> Baseline:
        """What the original gives on the data that judge."""
        return self.judges.baseline(self.original, self.context)

    def _judge(self, candidate: Candidate) -> tuple[float, float | None, Loss | None]:
        """The drop, its standard error, and the same by likelihoods."""
        if candidate.model is self.model:
            return 0.0, 0.0, None
        judges, compare = self.judges, partial(self._compared, candidate.model)
        (drop, noise, expected, failure), seconds = self.context.recall(
            "drop", (candidate.model, self.model, judges.judge, judges.gate), partial(_clocked, compare)
        )
        self._scoring_seconds = max(self._scoring_seconds, seconds)
        self._reserve()
        candidate.verdict = failure or candidate.verdict
        return drop, noise, expected

    def _compared(self, model: ir.Model) -> tuple[float, float | None, Loss | None, str]:
        """The drop, its standard error, the same by likelihoods, and why the drop is infinite."""
        baseline = self.baseline
        try:
            session = Session(model, self.context.target)
            found, likely = self.judges.compared(session, self.original, baseline, self.context)
        except OnnxcompError as error:  # the original gave a score, so it is the candidate's fault
            return float("inf"), None, None, error.fact
        expected = None if likely is None else Loss(likely.value, likely.standard_error)
        return found.value, found.standard_error, expected, ""

    def _reserve(self) -> None:
        """Leave time to time the result once more, and to score it and the original on the final data."""
        share = self.judges.final.samples / max(self.judges.judge.samples, 1)
        self.deadline.reserve = self._timing_seconds + 2 * share * self._scoring_seconds

    def _tell(self, what: str) -> None:
        """Progress without an end: how many candidates there will be depends on what is measured."""
        self.context.progress(len(self.trials), 0, what)


def _combined(counted: Loss, expected: Loss) -> Loss:
    """By inverse variances; a loss by likelihoods is doubted by a share of the larger one."""
    doubt = np.hypot(expected.noise or 0.0, _DOUBT * max(abs(counted.value), expected.value))
    if not counted.noise or expected.noise is None or not doubt:
        return counted
    weights = np.array([counted.noise, doubt]) ** -2.0
    value = weights @ [counted.value, expected.value] / weights.sum()
    return Loss(float(value), float(weights.sum() ** -0.5))


def _clocked(compute: Callable[[], Found]) -> tuple[Found, float]:
    """What comes of it, and the seconds that it took."""
    start = time.perf_counter()
    found = compute()
    return found, time.perf_counter() - start
