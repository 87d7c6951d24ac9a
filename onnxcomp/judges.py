"""The data in their roles: what techniques learn from, what judges candidates, what scores the result once."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp import metrics
from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.data import ImageOptions, Split, divisible, open_dataset, split
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.measure import SCORING_ROWS, evaluated, rows_of, usual_metric
from onnxcomp.padding import noted, notes_on
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch, Dataset, Feeds
from onnxcomp.scoring import FloatArray
from onnxcomp.synthetic import synthetic

_TEMPERATURES = tuple(np.geomspace(0.25, 16, 25).tolist())
_COMPARED = 8
"""Part of the samples, one in so many, on which outputs are compared where nothing else is scored on them."""
_ROOM = 8
"""Part of the memory cap, one in so many, that likelihoods may take."""


@dataclass(frozen=True)
class Baseline:
    """What the original gives on the data that judge.

    Attributes:
        score: by what a budget is on.
        temperature: at which it is as sure as it is right; None where it has no labels, or no scores that tell.
        scores: (samples, 1, classes) its log likelihoods, where it has a temperature.
    """

    score: metrics.Score
    temperature: float | None = None
    scores: FloatArray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Judges:
    """The data in their three roles, and what they are scored with.

    Attributes:
        tune: what techniques may learn from; None where all data are made up.
        judge: what the search sees.
        final: what the result is scored on.
        metric: what is scored.
        description: metric and samples in words.
        notes: what the user should know about them.
    """

    tune: Dataset | None
    judge: Dataset
    final: Dataset
    metric: metrics.Metric
    description: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: ir.Model,
        original: Session,
        calib: Any,
        evaluation: Any,
        metric: str | Callable[[Any], float] | None,
        images: ImageOptions | None,
        seed: int,
        most: int | None,
    ) -> "Judges":
        """Assign the data.

        Args:
            model: the original.
            original: the same, loaded.
            calib: data to learn from, or None: then a part of `evaluation`.
            evaluation: data to judge on, or None: then a part of `calib`.
            metric: as the user wrote it, or None for the default.
            images: how image files become inputs.
            seed: of the split.
            most: samples that judge candidates; None for all.

        Raises:
            InputError: data or metric cannot be used.
        """
        chosen = metrics.parse_metric(metric) if metric else None
        specs = models.input_specs(model)
        learn, proof = (
            None if given is None else noted(open_dataset(given, specs, images), lambda: original)
            for given in (calib, evaluation)
        )
        notes = notes_on(learn, proof)
        tune: Dataset | None
        if learn is None and proof is None:
            judge = final = synthetic(specs, SCORING_ROWS, seed, models.vocabularies(model))
            tune = None
            notes.append(
                "No data were given: errors are measured on made-up inputs and say little about real ones, and "
                "techniques that need data stay off. Give --calib and --eval."
            )
        else:
            parts = _deal(learn, proof, seed, scored=not isinstance(chosen, metrics.UserMetric))
            tune, judge, final = parts.tune, parts.judge, parts.final
            if parts.shared:
                notes.append("Errors are measured on the samples that techniques learn from, and flattered: give more.")
            elif learn is None:
                part = "Most" if tune.samples > judge.samples + final.samples else "Half"
                notes.append(f"{part} of the evaluation data is used to calibrate, as there is no --calib.")
        for batch in islice(final.batches(SCORING_ROWS), None if tune is None else 1):
            if not must_run(original, batch.feeds, invented=tune is None):
                notes.append("The original's outputs are not all finite: where they are not, no error is measured.")
                break
        reason = "as asked"
        if chosen is None:
            chosen, reason = usual_metric(original, final)
        if isinstance(chosen, metrics.UserMetric):
            description = f"{chosen.name}, called whole (judge = final)"
        elif judge is final:
            description = f"{chosen.name} ({reason}) on {final.samples} samples, too few to split (judge = final)"
        else:
            if most is not None:
                judge = judge.at_most(most, seed)
            description = (
                f"{chosen.name} ({reason}) on {final.samples} samples held out from the search, "
                f"which judged on {judge.samples} others"
            )
        return cls(tune, judge, final, chosen, description, tuple(notes))

    @functools.cached_property
    def gate(self) -> metrics.Metric:
        """What a budget is on: the metric, but the relative error where the original's own score is infinite (SQNR)."""
        return gate_of(self.metric)

    def score(
        self, session: Session, reference: Session, context: Context = Context(), *, final: bool = False
    ) -> metrics.Score:
        """Score a model on the judge's data, or on the final ones, by what a budget is on."""
        return evaluated(self.gate, session, self.final if final else self.judge, reference, context)

    def baseline(self, original: Session, context: Context = Context()) -> Baseline:
        """Score the original on the judge's data, with how likely it holds each class where that can be told."""
        if self._beside is None or not self._tells_likelihoods(original, context):
            return Baseline(self.score(original, original, context))
        wanted = [self._counted, self._beside.surprise, self._beside.scores]
        counted, surprises, scores = rows_of(wanted, original, self.judge, original, context)
        score, means = metrics.scored(self._counted, counted), surprises.mean((0, 1))
        best = int(means.argmin())
        if not np.isfinite(means).all() or best in (0, len(means) - 1):  # at an end they are no scores to go by
            return Baseline(score)
        return Baseline(score, _TEMPERATURES[best], scores)

    def compared(
        self, session: Session, original: Session, baseline: Baseline, context: Context = Context()
    ) -> tuple[metrics.Drop, metrics.Drop | None]:
        """What a candidate loses on the judge's data: as counted and, where that is known, by likelihoods."""
        if self._beside is None or baseline.temperature is None or baseline.scores is None:
            return metrics.compare(baseline.score, self.score(session, original, context)), None
        counted, answers = rows_of([self._counted, self._beside.answers], session, self.judge, original, context)
        return (
            metrics.compare(baseline.score, metrics.scored(self._counted, counted)),
            metrics.expected_drop(baseline.scores, answers, baseline.temperature),
        )

    @property
    def _counted(self) -> metrics.StreamedMetric:
        """The metric where it counts labels."""
        assert isinstance(self.gate, metrics.StreamedMetric)
        return self.gate

    @functools.cached_property
    def _beside(self) -> metrics.Likelihoods | None:
        return metrics.Likelihoods.beside(self.gate, _TEMPERATURES)

    def _tells_likelihoods(self, original: Session, context: Context) -> bool:
        """Whether each sample has a label and scores, whose logarithms there is room for; by the first of them."""
        assert self._beside is not None
        first = self.judge.select(range(min(SCORING_ROWS, len(self.judge))))
        try:
            (scores,) = metrics.rows_of([self._beside.scores], original.run, first, None, SCORING_ROWS)
        except OnnxcompError:
            return False
        fits = scores[0].nbytes * self.judge.samples <= context.memory // _ROOM
        return fits and len(np.unique(scores)) > 2  # else it says classes, not how likely they are

    @property
    def tell_accuracy(self) -> bool:
        """Whether the metric knows what is right, by labels or by the user's own code, and not only what changed."""
        return self.metric.needs != "reference"

    def run_of(self, rows: int) -> Batch:
        """One run to measure latency on, of that many rows where model and data allow; few samples are repeated."""
        return one_run(self.judge if self.tune is None else self.tune, rows)


def gate_of(metric: metrics.Metric) -> metrics.Metric:
    """What a budget is on: the metric, but the relative error where the original's own score is infinite (SQNR)."""
    if metric.needs != "reference" or math.isfinite(metric.best):
        return metric
    _, _, output = metric.name.partition(":")
    return metrics.parse_metric(f"relative-error:{output}" if output else "relative-error")


def one_run(data: Dataset, rows: int) -> Batch:
    """The first of that many rows where model and data allow; few samples are repeated."""
    return next(iter(data.select(row % len(data) for row in range(rows)).batches(rows)))


def must_run(original: Session, feeds: Feeds, *, invented: bool) -> bool:
    """Refuse data that the original itself cannot work on.

    Returns:
        Whether what it gives is finite.

    Raises:
        DataError: it does not run.
    """
    try:
        outputs = original.run(feeds)
    except OnnxcompError as error:
        raise DataError(
            f"the model does not run on {'made-up inputs' if invented else 'the data'}: {error.fact}",
            "inputs such as sizes, axes and indices have a meaning that cannot be guessed" if invented else error.cause,
            "give real ones with --calib or --eval" if invented else "give data that the model accepts, or --batch 1",
        ) from error
    arrays = (array for array in outputs.values() if isinstance(array, np.ndarray) and array.dtype.kind == "f")
    return all(bool(np.isfinite(array).all()) for array in arrays)


def _deal(learn: Dataset | None, proof: Dataset | None, seed: int, *, scored: bool) -> Split:
    """Deal out one dataset, or keep one to learn from and halve the other; what is too small serves in every role.

    Args:
        learn: the data to learn from.
        proof: those to judge on; one of both is enough.
        seed: of who gets which.
        scored: whether they are what is scored. A user's metric has data of its own, so that a few samples are enough
            on which outputs are compared.
    """
    if learn is not None and proof is not None:
        if not divisible(proof, 2):
            return Split(learn, proof, proof)
        order = np.random.default_rng(seed).permutation(len(proof)).tolist()
        half = len(order) // 2
        return Split(learn, proof.select(order[half:]), proof.select(order[:half]))
    only = proof if learn is None else learn
    assert only is not None
    if scored or not divisible(only, _COMPARED):
        return split(only, seed)
    order = np.random.default_rng(seed).permutation(len(only)).tolist()
    few = only.select(order[: len(order) // _COMPARED])
    return Split(only.select(order[len(order) // _COMPARED :]), few, few)
